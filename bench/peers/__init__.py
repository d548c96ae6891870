"""What a user would run instead of fastad, timed in the same run: `python -m bench.peers`."""
