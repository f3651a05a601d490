# `make` prints what there is. Each target makes .venv first where it is missing, or pyproject.toml or the constraints
# have changed. LATEST=1: with the newest versions that pyproject.toml allows, in place of those the tests last ran with.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS = constraints-$(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt
# with one thread a process, pytest's workers and the ranks they start do not crowd each other
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=20

help:  ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

setup: .venv/installed  ## make .venv with everything for training, tests and checks

.venv/installed: pyproject.toml $(wildcard constraints-*.txt) $(if $(LATEST),always)
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"error: Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}; give another with PYTHON=…")'
	$(PYTHON) -m venv .venv
ifdef LATEST
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
else
	$(BIN)/python -m pip install --quiet --upgrade --constraint $(call CONSTRAINTS,$(PYTHON)) pip
	$(BIN)/python -m pip install --quiet --constraint $(call CONSTRAINTS,$(PYTHON)) --build-constraint $(call CONSTRAINTS,$(PYTHON)) --editable '.[dev]'
endif
	touch $@

constraints:  ## write down the versions that are in .venv, for `make setup` to install
	{ echo "# What \`make setup\` installs: all versions that the tests ran with. Written by \`make constraints\`."; \
	  $(BIN)/python -m pip freeze --all --exclude-editable; } > constraints.new
	mv constraints.new $(call CONSTRAINTS,$(BIN)/python)

quickstart: setup  ## generate data, train on them, evaluate, write the report (about 8 minutes on 2 cores)
	$(BIN)/siglip-data make-tiny data/tiny
	$(BIN)/siglip-train experiment=quickstart run_dir=outputs/quickstart

test: setup  ## run the tests but the slow ones (no GPU needed)
	$(TEST) -m "not slow and not gpu"

test-all: setup  ## run the slow tests too: faults, property runs, all shapes
	$(TEST) -m "not gpu"

faults: setup  ## inject the faults alone, and print what became of each
	$(TEST) tests/faults

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

map: setup  ## print every module, its lines and what it is for, and the sizes of the house
	$(BIN)/python -m tests.house.module_map
	$(BIN)/python -m tests.house.measures

types: setup  ## mypy
	$(BIN)/mypy

check: lint types test-all  ## everything that CI runs

.DEFAULT_GOAL := help
.PHONY: help always setup constraints quickstart test test-all faults test-gpu fmt lint map types check
