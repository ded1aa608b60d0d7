# make demo   set up, train on handwritten digits, sample them, say how many are right
# make test   set up and run the tests       make test-all   the slow ones too
# make check  lint, types, the direction of imports          make docs   the handbook, in site/

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e

.PHONY: install demo test test-all check docs clean

install: $(VENV)/installed
demo: $(VENV)/installed-demo
	$(BIN)/python examples/digits.py --out runs/demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto

test-all: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto -m "slow or not slow" --timeout 1800

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict --quiet

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) .
	touch $@

$(VENV)/installed-%: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) '.[$*]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) site build *.egg-info
