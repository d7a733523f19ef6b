# Two commands do everything: `make quickstart` and `make test`. Both create .venv and install.
# PYTHON=python3.12 picks another interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
STORE ?= graftwork-store

.PHONY: quickstart test round lint format clean

quickstart: .venv/installed
	$(BIN)/graftwork run quickstart --store $(STORE)
	@echo
	@$(BIN)/graftwork results --store $(STORE) --pipeline quickstart
	@echo "Report:  $(STORE)/reports/quickstart.html"
	@echo "MLflow:  $(BIN)/graftwork ui --store $(STORE)"

test: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# As other machines would: other kernels, two threads, other interpreters. ROUND="--whole --python ..."
round: .venv/installed-test
	$(BIN)/python tests/round.py $(ROUND)

lint: .venv/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/installed-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv build *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; set PYTHON=python3.11 or newer" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/installed-test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ .venv/installed
