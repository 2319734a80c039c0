# Everything here makes its own .venv on first use. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/

.PHONY: setup demo test test-slow check bench format

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)pip install --quiet --upgrade "pip>=25.1"
	$(RUN)pip install --quiet --no-compile --constraint constraints.txt --editable . --group dev
	touch $@

demo: setup ## compress a small network at several sizes
	$(RUN)featherweight demo

test: setup ## all tests but the slow ones
	$(RUN)pytest --numprocesses 2 --dist worksteal

test-slow: setup ## the whole runs that `make test` leaves out
	$(RUN)pytest --numprocesses 2 --dist worksteal -m slow

check: setup ## lint, formatting, types
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)pyright

format: setup
	$(RUN)ruff check --fix .
	$(RUN)ruff format .

bench: setup ## the tables of README.md, on the networks of ../shared
	$(RUN)python -m bench.layers
	$(RUN)python -m bench.networks
	$(RUN)python -m bench.obs --only speed growth resnet20 masks
	$(RUN)python -m bench.allocate prediction
	$(RUN)python -m bench.allocate targets
	$(RUN)python -m bench.allocate operations
	$(RUN)python -m bench.memory
	$(RUN)python -m bench.additive layers ablation decoding networks finetuned
