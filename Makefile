# `make demo` and `make test` are the two commands; both go through `make setup`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint train-tiny clean
setup: $(STAMP)

NATIVE := setup.py $(wildcard thalweg/kernels/cpu/native/*)
$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "thalweg needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: setup
	@$(BIN)/thalweg demo

# All but the tests of servers, which are timed, run side by side. Threads of kernels that wait must then not spin:
# there are more of them than cores.
SIDE_BY_SIDE := $(addprefix tests/,benchmarks cache checkpoint cli config engine evaluation kernels memory model planner text training)
PYTEST = $(BIN)/python -m pytest -m 'not stress'
test: setup lint
	OMP_WAIT_POLICY=passive $(PYTEST) -n auto --maxprocesses 4 --dist loadfile $(SIDE_BY_SIDE)
	$(PYTEST) $(addprefix --ignore=,$(SIDE_BY_SIDE))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# Makes the embedded model anew: about 40 minutes on one core. Progress is kept in build/train and resumed.
train-tiny: setup
	$(BIN)/python -m training.train --work build/train --model thalweg/data/default --out thalweg/data/default

clean:
	rm -rf $(VENV) build dist *.egg-info thalweg/kernels/cpu/*.so
