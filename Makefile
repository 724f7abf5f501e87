# Two commands for everyone: `make demo` and `make test`. They need Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One process per core; the tests of a file share its fixtures, so they stay together.
PARALLEL := -n auto --dist loadfile

.PHONY: demo test check test-all clean help

help:
	@echo "make demo      train a small model, measure forgetting without and with replay (3 to 10 minutes)"
	@echo "make test      the tests"
	@echo "make check     what every change must pass: ruff, types, floors, tests"
	@echo "make test-all  the tests and the slow sweeps"
	@echo "make clean     remove the environment and what the demo made"

# The environment, from pinned versions, made anew when they change.
$(READY): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(READY)

demo: $(READY)
	$(BIN)/postgrad demo postgrad-demo

test: $(READY)
	$(BIN)/python -m pytest $(PARALLEL)

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow"

clean:
	rm -rf $(VENV) postgrad-demo build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
