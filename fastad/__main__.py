"""`python -m fastad`."""

from fastad.cli import main

if __name__ == "__main__":
    main()
