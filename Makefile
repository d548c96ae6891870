# Each target sets up .venv by itself; nothing but Python >= 3.11, cmake and a C++ compiler is needed.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test test-gpu lint bench clean

demo: .venv/ready
	$(BIN)/fastad demo --out demo

test: .venv/ready
	$(BIN)/python -m pytest

test-gpu: .venv/ready
	$(BIN)/python -m pytest tests/ops -m gpu

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python -m bench.resize
	$(BIN)/python -m bench.ops --threads 1

# Rebuilt when the C++ sources or the declared dependencies change.
.venv/ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'fastad[tensorrt-tests]' \
		|| echo 'without the TensorRT packages: the tests of that path will be skipped'
	touch $@

clean:
	rm -rf .venv build
