# Two commands: `make bench` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell grep '^uv==' requirements.lock)
export HF_HUB_OFFLINE = 1
export HF_DATASETS_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help bench test price lint format site real-model lock clean

help: ## this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "Optional; without them everything works, and tests that need one are skipped by name:"
	@echo "  chromium            the browser tests of the site (.ci/browser installs Debian's; CI requires it)"
	@echo "  an NVIDIA GPU       --device cuda; Triton kernels run in its interpreter without one"
	@echo "  energy sensors      joules: NVML, or RAPL readable in /sys/class/powercap; else null and a reason"
	@echo "  the extras ray, lm-eval   --engine ray, --via lm-eval; \`make\` installs them, plain pip does not"

bench: $(VENV)/.installed ## a tour: headline comparisons measured here, the published figures beside them, the site
	$(BIN)/stepmark tour

# What measures time has the machine to itself; the rest shares it, one worker pinned to each core.
TIMED := tests/test_meter.py bench/test_instruments.py

test: $(VENV)/.installed ## every test, the ruler and the quick suite
	$(BIN)/python -m pytest --quick --numprocesses auto --dist worksteal --junitxml build/junit/shared.xml $(TIMED:%=--ignore=%)
	$(BIN)/python -m pytest --junitxml build/junit/timed.xml $(TIMED)

WHAT := cells list

price: $(VENV)/.installed ## what one more method costs: smoke cells, stepmark list; WHAT="site tests" for the others
	$(BIN)/python bench/price.py $(WHAT)

lint: $(VENV)/.installed ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

site: $(VENV)/.installed ## build the site from the published records
	$(BIN)/stepmark site

REAL := .stepmark/real-model
METHODS := autoregressive prompt_lookup jacobi lookahead_decoding lookahead_small lazyllm beam_search harp h2o tova sink_window kv_int8

# The weights are under the Gemma terms, https://ai.google.dev/gemma/terms; they stay in an ignored folder.
real-model: $(VENV)/.installed ## training-free decoding on a real model: Gemma 3 270M of the package index, half an hour
	$(BIN)/python bench/real_model.py $(REAL)
	$(BIN)/stepmark run --backbone $(REAL)/gemma-3-270m --items 8 --new-tokens 16 --rung 1 --rung 16 $(METHODS:%=--method %)
	$(BIN)/python bench/real_model.py --held .stepmark/results

lock: $(VENV)/.installed ## resolve the lower bounds of pyproject.toml into requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-header --no-annotate --no-emit-package amdsmi pyproject.toml -o requirements.lock

clean: ## remove what the commands made, the environment included
	rm -rf $(VENV) build dist .stepmark .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Stepmark needs Python 3.11 or newer; try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(UV)'
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@
