# Everything sets itself up: the first call makes .venv and installs, later ones are quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE := 1
export PYTHONUTF8 := 1

.PHONY: help models-table install demo test test-all lint bench compare search clean

help:
	@echo "make demo      dense and accelerated videos side by side, a table and a report (minutes)"
	@echo "make test      the test suite"
	@echo "make test-all  with the wide sweeps"
	@echo "make lint      ruff and mypy"
	@echo "make models-table  docs/models.md anew, from the tests of all models"
	@echo "make bench     prices of attention on this device"
	@echo "make compare   the whole comparison of the README (40 minutes on 2 cores)"
	@echo "make search    search a plan for the sample model (minutes)"

$(STAMP): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (first call only; downloads torch and friends, a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "accel needs Python 3.10 to 3.13; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@# the one warning of an editable install is about folders named like the package: there is none
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[samples,dev]'
	@touch $@
	@echo "== set up"

install: $(STAMP)

demo: $(STAMP)
	@echo "== dense against the plan of samples/plans and two recipes, on the trained sample model"
	@$(BIN)/accel-compare experiment=demo

test: $(STAMP)
	@echo "== tests (GPU tests are skipped where there is none)"
	@$(BIN)/pytest -q -m "not slow" -ra --durations=5 -n auto --maxprocesses 4 --dist loadfile

test-all: $(STAMP)
	@$(BIN)/pytest -q -ra --durations=20

lint: $(STAMP)
	@echo "== ruff and mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

models-table: $(STAMP)
	@$(BIN)/python tests/models/table.py

bench: $(STAMP)
	@$(BIN)/accel-bench

compare: $(STAMP)
	@$(BIN)/accel-compare experiment=wan-digits

search: $(STAMP)
	@$(BIN)/accel-search

clean:
	rm -rf build outputs .pytest_cache .ruff_cache .mypy_cache
