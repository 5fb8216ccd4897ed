# What can be done here; `make` lists it. Everything runs in .venv, which is built once, when it is first needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The last Transformers whose names and defaults the Hub's UPerNet checkpoints were made with, beside the newest.
TRANSFORMERS4 := .cache/transformers-4.56.2
# One worker for each core; whoever is ready takes tests from the others.
PARALLEL := --numprocesses auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo train-scenes test test-exhaustive test-fast test-transformers4 test-minimum accuracy bench bench-quick compiled gpu-check lint format types clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 22

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

setup: $(STAMP) ## build the virtual environment in .venv (a few minutes, once)

demo: $(STAMP) ## segment a generated scene, and compare the label map and the time with Transformers'
	$(BIN)/python -m examples.demo

train-scenes: $(STAMP) ## train a small model on generated scenes (an hour and more on two cores); goes on where it was stopped
	$(BIN)/python examples/train_scenes.py

test: $(STAMP) ## run the tests that need no GPU (a quarter of an hour on two cores)
	$(BIN)/python -m pytest -m "not exhaustive" $(PARALLEL)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreted -m "not exhaustive" $(PARALLEL)

test-exhaustive: $(STAMP) ## run what `make test` leaves out: Inductor, export and ONNX for every backbone; training under torchrun; an hour
	$(BIN)/python -m pytest -m exhaustive $(PARALLEL)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreted -m exhaustive $(PARALLEL)

test-fast: $(STAMP) ## run the tests that take a moment
	$(BIN)/python -m pytest -m "not slow and not exhaustive"

$(TRANSFORMERS4)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --upgrade --target $(TRANSFORMERS4) transformers==4.56.2
	@touch $@

test-transformers4: $(TRANSFORMERS4)/.installed ## run the comparisons with Transformers against 4.56.2 as well
	PYTHONPATH=$(TRANSFORMERS4) $(BIN)/python -m pytest tests/parity -m "not slow and not exhaustive" $(PARALLEL)

test-minimum: ## run every test with the oldest versions that pyproject.toml allows, in a virtual environment of their own
	$(PYTHON) -m venv .cache/minimum
	.cache/minimum/bin/python -m pip install --quiet --constraint tests/minimum-versions.txt --editable '.[dev]'
	.cache/minimum/bin/python -m pytest -m "not exhaustive" $(PARALLEL)
	TRITON_INTERPRET=1 .cache/minimum/bin/python -m pytest tests/interpreted -m "not exhaustive" $(PARALLEL)

accuracy: $(STAMP) ## measure the distance from float64 beside Transformers, and redraw README's table
	$(BIN)/python -m bench.accuracy
	$(BIN)/python -m bench.tables

$(VENV)/.bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[dev,bench]'
	@touch $@

bench: $(VENV)/.bench ## time everything beside the peers: three hours on an idle machine
	$(BIN)/python -m bench.run
	$(BIN)/python -m bench.training
	$(BIN)/python -m bench.tables
	$(BIN)/python -m bench.plots

bench-quick: $(VENV)/.bench ## print the essential ratios, in under 3 minutes
	$(BIN)/python -m bench.run --quick

compiled: $(STAMP) ## compile every Triton kernel for GPUs that are not here, and rewrite the table of what became of it
	$(BIN)/python -m bench.compiled

# With a PyTorch of the machine's own, where it has what is needed: it is the one that fits its driver.
gpu-check: ## on a machine with a GPU: test the kernels, and time them beside PyTorch and Transformers (10 minutes)
	@if $(PYTHON) -c "import hypothesis, matplotlib, pytest_timeout, rich, timm, torch, transformers, triton" 2> /dev/null; \
	then PYTHONPATH=.:kernels $(PYTHON) -m bench.gpu; else $(MAKE) setup && $(BIN)/python -m bench.gpu; fi

lint: $(STAMP) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## rewrite the files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## check the types
	$(BIN)/mypy

clean: ## remove the virtual environment and everything built
	rm -rf $(VENV) .cache build dist demo *.egg-info
