# `make` prints what there is. Each target makes .venv first where it is missing or pyproject.toml has changed.
PYTHON ?= python3
BIN := .venv/bin
# with one thread a process, pytest's workers and the ranks they start do not crowd each other
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

help:  ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

setup: .venv/installed  ## make .venv with everything for training, tests and checks

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"error: Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}; give another with PYTHON=…")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

quickstart: setup  ## generate data, train on them, evaluate, write the report (about 8 minutes on 2 cores)
	$(BIN)/siglip-data make-tiny data/tiny
	$(BIN)/siglip-train experiment=quickstart run_dir=outputs/quickstart

test: setup  ## run the tests but the slow ones (no GPU needed)
	$(TEST) -m "not slow and not gpu"

test-all: setup  ## run the slow tests too: faults, property runs, all shapes
	$(TEST) -m "not gpu"

test-gpu: setup  ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

fmt: setup  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup  ## ruff, import floors, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell siglip_train kernels data_tools tests benchmarks conf README.md CONTRIBUTING.md

map: setup  ## print every module, its lines and what it is for
	$(BIN)/python -m tests.house.module_map

types: setup  ## mypy
	$(BIN)/mypy

check: lint types test-all  ## everything that CI runs

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all test-gpu fmt lint map types check
