# Needs make, a POSIX shell and Python >= 3.11 with pip. What a target needs besides goes into a virtual environment
# in the checkout, the first time it is needed and again when pyproject.toml has changed.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --no-input --disable-pip-version-check
SOURCES := src tests examples benchmarks

# Stamps, each written when its step has ended well. UNFINISHED lies in a virtual environment from its creation to
# the end of its first installation: one that still has it was interrupted, and is made anew.
FOR_RUN := $(VENV)/.splat-run
FOR_DEV := $(VENV)/.splat-dev
UNFINISHED := $(VENV)/.splat-unfinished

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint types bench clean

help:  ## list the targets
	@echo "make TARGET [PYTHON=$(PYTHON)] [VENV=$(VENV)] [JOBS=$(JOBS)] [ARGS='...']"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST))

demo: $(FOR_RUN)  ## show what SPLAT does, on this machine (ARGS: to `splat demo`)
	@$(BIN)/splat demo $(ARGS)

test: lint types  ## lint, types, then the tests in JOBS processes (ARGS: to pytest)
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(FOR_DEV)  ## ruff: rules and formatting
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(FOR_DEV)  ## pyright
	@$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(FOR_RUN)  ## measure (ARGS: to `python -m benchmarks.run`)
	@$(BIN)/python -m benchmarks.run $(ARGS)

clean:  ## remove the virtual environment, caches, build outputs and the demo's pictures
	@if [ -e $(VENV)/pyvenv.cfg ] || [ -e $(UNFINISHED) ]; then rm -rf $(VENV); fi
	@rm -rf .hypothesis .pytest_cache .ruff_cache build dist splat-demo*.png
	@find $(wildcard $(SOURCES)) -name __pycache__ -prune -exec rm -rf {} +

$(FOR_RUN): pyproject.toml
	@$(create_venv)
	@echo "splat: installing SPLAT and what it needs into $(VENV) (once, about half a minute)"
	@$(PIP) -e .
	@rm -f $(UNFINISHED) && touch $@

$(FOR_DEV): pyproject.toml
	@$(create_venv)
	@echo "splat: installing SPLAT, what it needs and the tools that check it into $(VENV) (once, about a minute)"
	@$(PIP) -e '.[dev]'
	@rm -f $(UNFINISHED) && touch $(FOR_RUN) $@

# Leaves a complete virtual environment alone, whoever made it. bin/ goes first, so that an interrupted removal shows.
define create_venv
if [ -x $(BIN)/python ] && [ ! -e $(UNFINISHED) ]; then exit 0; fi; \
fail() { echo "splat: $$1" >&2; exit 1; }; \
command -v $(PYTHON) > /dev/null || \
	fail "no $(PYTHON) here; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	fail "needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12"; \
$(PYTHON) -c 'import ensurepip' 2> /dev/null || \
	fail "$(PYTHON) cannot fill a virtual environment: it has no ensurepip; Debian and Ubuntu: apt install python3-venv"; \
[ ! -e $(VENV) ] || [ -e $(VENV)/pyvenv.cfg ] || [ -e $(UNFINISHED) ] || \
	fail "$(VENV) is there but is no virtual environment; remove it, or name another: make VENV=.venv2"; \
echo "splat: creating $(VENV) with $$($(PYTHON) -V) (once, about 5 s)"; \
rm -rf $(BIN) && rm -rf $(VENV) && mkdir -p $(VENV) && touch $(UNFINISHED) && $(PYTHON) -m venv $(VENV)
endef
