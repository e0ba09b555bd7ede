# The commands of this repository: `make help` lists them. Everything runs in .venv, which is made on first use.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.excise-installed
PIP   := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# A Python 3.11 that really starts (a version manager's shim may stand in PATH without a version behind it).
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
# Where CPU builds of torch are found. Used only where it answers and no NVIDIA driver is present; set it empty to
# take whatever pip's own settings offer.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

ARGS ?=

.PHONY: help venv demo test test-all check bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

venv: $(STAMP)  ## make .venv with Python 3.11 and the tested versions

# Redone when the dependencies change. An older .venv is completed in place; one that does not start is made anew.
# torch comes first and alone: the build it is installed in then satisfies everybody else, and pip never looks for another.
# What builds from source (excise itself, seqeval) is built without isolation, so its builders come before it.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; then \
		if [ -z "$(PYTHON)" ]; then echo "excise needs Python 3.11: install it, or: make venv PYTHON=/path/to/python3.11" >&2; exit 1; fi; \
		echo "making $(VENV) with $(PYTHON)"; rm -rf $(VENV); "$(PYTHON)" -m venv $(VENV); fi
	@echo "installing $(TORCH) and the versions of constraints.txt (minutes on first use)"
	@index=""; if [ -n "$(TORCH_INDEX)" ] && ! command -v nvidia-smi >/dev/null && $(BIN)/python -c \
		'import sys, urllib.request as r; r.urlopen(sys.argv[1] + "/torch/", timeout=10)' "$(TORCH_INDEX)" >/dev/null 2>&1; \
		then index="--extra-index-url $(TORCH_INDEX)"; fi; \
	$(PIP) $$index "$(TORCH)"
	@$(PIP) setuptools setuptools-scm hatchling editables
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## train, forget and report on a small synthetic world (no network, a minute or two)
	$(BIN)/excise demo $(ARGS)

test: $(STAMP)  ## the fast tests
	$(BIN)/pytest -x -q $(ARGS)

test-all: $(STAMP)  ## every test, the slow ones too
	$(BIN)/pytest -q -m "slow or not slow" $(ARGS)

check: $(STAMP)  ## style, format, types, import rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/pytest -q tests/test_architecture.py

bench: $(STAMP)  ## speed and memory against the plain step and the naive way -> docs/results/speed.md
	$(BIN)/python benchmarks/bench.py $(ARGS)

clean:  ## remove generated files, the environment excepted
	rm -rf dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
