# Each target sets up .venv by itself; nothing but Python >= 3.11, cmake and a C++ compiler is needed.
PYTHON ?= python3
BIN := .venv/bin
RESULTS ?= build/bench
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test test-gpu lint bench clean

demo: .venv/ready
	$(BIN)/fastad demo --out demo

# Two processes: most tests use one core. A file's tests stay together, for what they share.
test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-gpu: .venv/ready
	$(BIN)/python -m pytest tests/ops -m gpu

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Needs nothing but the demo, which it makes, and is meant for half an hour on two cores: batches
# and seconds of bench.models are fewer than by default. Its files go to $(RESULTS); the committed
# ones in bench/results come from single benches. `bench.soak` and `bench.peers` stand apart.
DEMO_MODELS := demo/run demo/bench/grad.engine \
	$(foreach m,uniad rd4ad intra,demo/bench/$(m).quick demo/bench/$(m).engine)

bench: .venv/ready
	$(BIN)/python -m bench.resize --results $(RESULTS)
	$(BIN)/python -m bench.ops --threads 1 --results $(RESULTS)
	$(BIN)/python -m bench.engines demo
	$(BIN)/python -m bench.models $(DEMO_MODELS) --batch 1 --batch 8 --budget-s 20 \
		--results $(RESULTS)
	$(BIN)/python -m bench.end_to_end demo/bench/grad.engine --results $(RESULTS)
	$(BIN)/python -m bench.precisions demo/run --test-data demo/textures --name demo \
		--results $(RESULTS)
	$(BIN)/python -m bench.cold demo/textures.engine --results $(RESULTS)

# Rebuilt when the C++ sources or the declared dependencies change.
.venv/ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'fastad[tensorrt-tests]' \
		|| echo 'without the TensorRT packages: the tests of that path will be skipped'
	touch $@

clean:
	rm -rf .venv build
