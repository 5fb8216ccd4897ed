# The project's commands; `make` lists them. They run in .venv, which the first command builds.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The last Transformers 4, with whose names and defaults the Hub's UPerNet checkpoints were saved.
TRANSFORMERS4 := .cache/transformers-4.56.2
# mmsegmentation, mmpretrain, segmentation_models_pytorch and timm, in a virtual environment of their own. Beside it an
# old timm, whose Swin is that of Swin's own repository.
FOREIGN := .cache/foreign
# `fastuper serve` with Gradio, and Debian's Chromium, which the tests of the page drive.
PAGE := .cache/page
CHROMIUM ?= chromium
# One worker for each core; idle workers take tests from busy ones.
PARALLEL := --numprocesses auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo train-scenes test test-exhaustive test-fast test-transformers4 test-foreign test-page test-minimum accuracy bench bench-quick compiled gpu-check lint format types clean

help: ## list the commands
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):[^#]*## /  make \1\t/' | expand -t 26

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

setup: $(STAMP) ## build the virtual environment in .venv (a few minutes, once)

demo: $(STAMP) ## segment a generated scene, and compare label map and time with Transformers
	$(BIN)/python -m examples.demo

train-scenes: $(STAMP) ## train a small model on generated scenes (over an hour on two cores); resumes where it stopped
	$(BIN)/python examples/train_scenes.py

test: $(STAMP) ## run the tests that need no GPU (about 12 minutes on two cores of an Intel Xeon)
	$(BIN)/python -m pytest -m "not exhaustive" $(PARALLEL)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreted -m "not exhaustive" $(PARALLEL)

$(VENV)/.exhaustive: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[dev,executorch]'
	@touch $@

test-exhaustive: $(VENV)/.exhaustive ## run the tests that `make test` leaves out: Inductor, export and ONNX for every backbone, training under torchrun (over an hour)
	$(BIN)/python -m pytest -m exhaustive $(PARALLEL)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreted -m exhaustive $(PARALLEL)

test-fast: $(STAMP) ## run the tests without the slow ones, in one process
	$(BIN)/python -m pytest -m "not slow and not exhaustive"

$(TRANSFORMERS4)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --upgrade --target $(TRANSFORMERS4) transformers==4.56.2
	@touch $@

# Other libraries' weights are compared with networks of those libraries, not of Transformers.
test-transformers4: $(TRANSFORMERS4)/.installed ## run the tests beside Transformers against Transformers 4.56.2
	PYTHONPATH=$(TRANSFORMERS4) $(BIN)/python -m pytest tests/parity tests/patch -m "not slow and not exhaustive" --ignore-glob='tests/parity/test_*_weights.py' $(PARALLEL)

$(FOREIGN)/.installed: pyproject.toml tests/foreign/requirements.txt
	$(PYTHON) -m venv $(FOREIGN)
	$(FOREIGN)/bin/python -m pip install --quiet --upgrade pip
	$(FOREIGN)/bin/python -m pip install --quiet --requirement tests/foreign/requirements.txt --editable .
	$(FOREIGN)/bin/python -m pip install --quiet --no-deps --target $(FOREIGN)/timm-0.6.13 timm==0.6.13
	@touch $@

test-foreign: $(FOREIGN)/.installed ## convert checkpoints that the real mmsegmentation, smp and timm make, and compare logits
	$(FOREIGN)/bin/python -m pytest tests/foreign $(PARALLEL)

# Gradio takes an older Pillow than the other tests have.
$(PAGE)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --upgrade --target $(PAGE) gradio fastapi httpx playwright
	@touch $@

test-page: $(PAGE)/.installed ## test `fastuper serve`, and drive its page in Chromium (a minute)
	@command -v $(CHROMIUM) > /dev/null || { echo "Chromium is missing: apt-get install chromium, or CHROMIUM=/path/to/it make test-page"; exit 1; }
	PYTHONPATH=$(CURDIR)/$(PAGE) CHROMIUM=$(CHROMIUM) $(BIN)/python -m pytest tests/serve tests/page --numprocesses 2 --dist loadfile

test-minimum: ## run the tests of `make test` with the oldest versions that pyproject.toml allows, in a second virtual environment
	$(PYTHON) -m venv .cache/minimum
	.cache/minimum/bin/python -m pip install --quiet --constraint tests/minimum-versions.txt --editable '.[dev]'
	.cache/minimum/bin/python -m pytest -m "not exhaustive" $(PARALLEL)
	TRITON_INTERPRET=1 .cache/minimum/bin/python -m pytest tests/interpreted -m "not exhaustive" $(PARALLEL)

accuracy: $(STAMP) ## measure the distance from float64 beside Transformers, and update README's table
	$(BIN)/python -m bench.accuracy
	$(BIN)/python -m bench.tables

$(VENV)/.bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[dev,bench]'
	@touch $@

bench: $(VENV)/.bench ## time everything beside the peers, and update tables and plots (three hours on an idle machine)
	$(BIN)/python -m bench.run
	$(BIN)/python -m bench.training
	$(BIN)/python -m bench.parsing
	$(BIN)/python -m bench.accelerate
	$(BIN)/python -m bench.backbones
	$(BIN)/python -m bench.exports
	$(BIN)/python -m bench.tables
	$(BIN)/python -m bench.plots

bench-quick: $(VENV)/.bench ## print the essential ratios, in under 3 minutes
	$(BIN)/python -m bench.run --quick

compiled: $(STAMP) ## compile every Triton kernel ahead of time for three GPUs, and update bench/results/compiled.json
	$(BIN)/python -m bench.compiled

# Uses the machine's own Python if it has all packages: its PyTorch matches the driver.
gpu-check: ## on a machine with a GPU: test the kernels, and time them beside PyTorch and Transformers (10 minutes)
	@if $(PYTHON) -c "import hypothesis, matplotlib, pytest_timeout, rich, timm, torch, transformers, triton" 2> /dev/null; \
	then PYTHONPATH=.:kernels $(PYTHON) -m bench.gpu; else $(MAKE) setup && $(BIN)/python -m bench.gpu; fi

lint: $(STAMP) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## fix style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## check the types
	$(BIN)/mypy

clean: ## remove the virtual environment and all build results
	rm -rf $(VENV) .cache build dist demo *.egg-info
