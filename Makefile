# make help lists the targets. Needs make, a C compiler and Python 3.11, 3.12 or 3.13.
# PYTHON=python3.12          another interpreter for .venv
# TORCH_INDEX=URL            where to get PyTorch from (its CPU build: see docs/setup.md)
# ARGS="seed=1 trainer=cpu"  more overrides for `make demo`
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: demo test test-slow setup setup-dev lint format clean help no-interpreter

PYTHON ?=
TORCH_INDEX ?=
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet -c constraints.txt
# Written last, so that an interrupted install is repeated.
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev

# The first interpreter that runs, is 3.11 to 3.13 and can make an environment with pip.
define MAKE_VENV
for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python); do \
  "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
    2>/dev/null || continue; \
  "$$python" -c 'import ensurepip, venv' 2>/dev/null || { nopip="$$python"; continue; }; \
  found="$$python"; break; \
done; \
if [ -n "$$found" ]; then \
  echo "making $(VENV) with $$found ($$("$$found" --version))"; \
  "$$found" -m venv --clear $(VENV); \
elif [ -n "$$nopip" ]; then \
  echo "make: $$nopip cannot make an environment: install its venv module (on Debian and" \
    "Ubuntu: apt install python3-venv) or name another with PYTHON=" >&2; exit 1; \
else \
  echo "make: no Python 3.11, 3.12 or 3.13 found$(if $(PYTHON), as '$(PYTHON)'): install one," \
    "or name it with PYTHON=/path/to/python" >&2; exit 1; \
fi
endef

demo: $(READY)  ## train all stages on the embedded data, write the report
	$(PY) train.py stage=grpo $(ARGS)
	$(PY) -m fourstage report

test: $(READY)  ## run the tests (a few minutes)
	$(PY) -m pytest

test-slow: $(READY)  ## run the slow tests: kill and resume training, several processes
	$(PY) -m pytest -m slow -n 0

setup: $(READY)  ## make .venv and install the tested versions

setup-dev: $(READY_DEV)  ## the same plus transformers, trl, peft and openai, for tests against them

lint: $(READY)  ## ruff: check lint and format, change nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY)  ## ruff: fix lint and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove .venv and caches (not runs: python -m fourstage runs rm does that)
	rm -rf $(VENV) build .pytest_cache .ruff_cache src/fourstage.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

$(READY): constraints.txt pyproject.toml $(shell test -x $(PY) || echo no-interpreter)
	@rm -f $@
	@$(PY) -m pip --version > /dev/null 2>&1 || { $(MAKE_VENV); }
	@echo "installing into $(VENV) (some minutes the first time)"
	@[ -z "$(TORCH_INDEX)" ] || $(PIP) torch --index-url "$(TORCH_INDEX)" || { echo "make: PyTorch" \
	  "could not be installed from TORCH_INDEX=$(TORCH_INDEX): pip's reason is above. Is the address" \
	  "right, and is there a network?" >&2; exit 1; }
	@$(PIP) -e ".[test]" || { echo "make: the install failed: pip's reason is above. (It needs a" \
	  "network, and pycosat is compiled, which needs a C compiler and Python's headers: on Debian and" \
	  "Ubuntu apt install gcc python3-dev)" >&2; exit 1; }
	-@$(PY) -c "from fourstage.kernels import build; build.library()"  # compile the kernels now
	@touch $@

no-interpreter:

$(READY_DEV): $(READY)
	@$(PIP) -e ".[dev]" || { echo "make: the install failed: pip's reason is above" >&2; exit 1; }
	@touch $@
