# Needs make, a POSIX shell and Python >= 3.11 with pip. What a target needs besides goes into a virtual environment
# in the checkout, the first time it is needed and again when pyproject.toml has changed.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=
# What `make torch` installs. PyPI's own wheel for Linux brings gigabytes of CUDA; this one is for processors.
TORCH ?= torch --index-url https://download.pytorch.org/whl/cpu
# A second Python, with the newer JAX and jax-triton that only it gets, for the tests that lower for GPUs. May be empty.
PYTHON312 ?= $(shell for python in python3.12 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do \
	"$$python" -c "" 2> /dev/null && command -v "$$python" && break; done)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --no-input --disable-pip-version-check
SOURCES := src tests examples benchmarks

# Stamps, each written when its step has ended well. UNFINISHED lies in a virtual environment from its creation to
# the end of its first installation: one that still has it was interrupted, and is made anew.
FOR_RUN := $(VENV)/.splat-run
FOR_DEV := $(VENV)/.splat-dev
FOR_TORCH := $(VENV)/.splat-torch
FOR_312 := $(VENV)/python3.12/.splat-lowering
UNFINISHED := $(VENV)/.splat-unfinished

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all torch test-torch lint types bench clean

help:  ## list the targets
	@echo "make TARGET [PYTHON=$(PYTHON)] [VENV=$(VENV)] [JOBS=$(JOBS)] [ARGS='...']"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST))

demo: $(FOR_RUN)  ## show what SPLAT does, on this machine (ARGS: to `splat demo`)
	@$(BIN)/splat demo $(ARGS)

test: lint types $(if $(PYTHON312),$(FOR_312))  ## lint, types, then the tests in JOBS processes (ARGS: to pytest)
	@$(if $(PYTHON312),SPLAT_TEST_PYTHON312=$(VENV)/python3.12/bin/python) SPLAT_TEST_SAMPLE=$${SPLAT_TEST_SAMPLE-new} \
		$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-all:  ## the same with all tests: of some large grids, `make test` draws a share
	@SPLAT_TEST_SAMPLE= $(MAKE) --no-print-directory test

torch: $(FOR_TORCH)  ## install PyTorch, so that `make test` tests its front end too (TORCH: what to install)

test-torch: $(FOR_DEV) $(FOR_TORCH)  ## install PyTorch and test its front end (ARGS: to pytest)
	@$(BIN)/python -m pytest -n $(JOBS) tests/torch $(ARGS)

lint: $(FOR_DEV)  ## ruff: rules and formatting
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(FOR_DEV)  ## pyright
	@$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(FOR_RUN)  ## measure (ARGS: to `splat bench`; without them, its suite `figures`)
	@$(BIN)/splat bench $(or $(ARGS),figures)

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
	@$(call lowering_plugin,$(BIN))
	@rm -f $(UNFINISHED) && touch $(FOR_RUN) $@

$(FOR_TORCH): $(FOR_DEV)
	@echo "splat: installing PyTorch into $(VENV) (once; about 200 MB)"
	@$(PIP) $(TORCH)
	@touch $@

$(FOR_312): pyproject.toml
	@echo "splat: installing JAX and Triton for $$($(PYTHON312) -V) into $(VENV)/python3.12 (once, about a minute)"
	@rm -rf $(VENV)/python3.12 && $(PYTHON312) -m venv $(VENV)/python3.12
	@$(VENV)/python3.12/bin/python -m pip install -qq --no-input --disable-pip-version-check -e '.[kernels]' flatbuffers
	@$(call lowering_plugin,$(VENV)/python3.12/bin)
	@touch $@

# JAX lowers for CUDA on any Linux machine with this plugin alone: 7.5 MB, without the 400 MB that it asks for.
define lowering_plugin
case "$$(uname -s)" in Linux) version=$$($(1)/python -c 'import jaxlib; print(jaxlib.__version__)'); \
$(1)/python -m pip install -qq --no-input --disable-pip-version-check --no-deps "jax-cuda13-plugin==$$version" || \
	echo "splat: no CUDA plugin for jaxlib $$version; tests that lower for GPUs will be skipped" >&2;; esac
endef

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
