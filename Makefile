# dbtrain: `make demo` shows it, `make test` checks it. Both set up .venv first and can be run again at any time.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# PyTorch is chosen here and not in requirements.txt, because its builds differ by device: `make setup TORCH=2.11.0`.
TORCH ?= 2.13.0
PYTHON ?= python3
# Folders of wheels that pip has been told of serve uv as well.
UV_FIND_LINKS ?= $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
export UV_FIND_LINKS
# Without compiled modules every worker process would compile PyTorch's on its own when it starts.
export UV_COMPILE_BYTECODE := 1

UV := $(or $(shell command -v uv),.uv/bin/uv)
BIN := .venv/bin
STAMP := .venv/.ready-$(TORCH)
RUNS := runs/demo
# Two files of tests at a time: many of them wait for processes.
AT_ONCE := --numprocesses=2 --dist=loadfile --durations=20

.PHONY: help setup demo test slow long lint types imports bench chaos simulate pins clean

help:
	@echo 'make demo    train digits in 3 blocks as Ray workers, assemble, evaluate beside the end-to-end network'
	@echo 'make test    the fast tests            make slow    the slow ones (real clusters, longer training)'
	@echo 'make long    those that take minutes each: two machines, a lost head, every family killed twice'
	@echo 'make lint    ruff, mypy, import rule   make bench   what the figures in the docs come from'
	@echo 'make chaos   kill, freeze and damage everything of a run 30 times, and compare it with an undisturbed one'
	@echo 'make simulate  1,000 blocks on 100 nodes that fail, beside a synchronous job'
	@echo 'make setup   .venv with everything     make pins    renew requirements.txt'

setup: $(STAMP)

.uv/bin/uv:
	@echo '== getting uv'
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --quiet uv

$(STAMP): pyproject.toml requirements.txt $(if $(shell command -v uv),,.uv/bin/uv)
	@echo '== setting up .venv (PyTorch $(TORCH))'
	@test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) .venv
	$(UV) pip install --quiet --python $(BIN)/python 'torch==$(TORCH)' --constraint requirements.txt --editable '.[demo,dev]'
	@rm -f .venv/.ready-*
	@touch $@

demo: setup
	@echo '== 1/5  training 3 blocks, each in a Ray worker of its own'
	$(BIN)/dbtrain train configs/demo/vit.yaml --run $(RUNS)/vit --backend ray
	@echo '== 2/5  training the end-to-end network on the same data, equal layer-evaluations'
	$(BIN)/dbtrain baseline configs/demo/vit.yaml --run $(RUNS)/vit-baseline --backend ray
	@echo '== 3/5  assembling the blocks'
	$(BIN)/dbtrain assemble $(RUNS)/vit
	@echo '== 4/5  evaluating every read-out, and comparing'
	$(BIN)/dbtrain evaluate $(RUNS)/vit --baseline $(RUNS)/vit-baseline
	$(BIN)/dbtrain compare $(RUNS)/vit $(RUNS)/vit-baseline
	@echo '== 5/5  drawing'
	$(BIN)/dbtrain figures $(RUNS)/vit --baseline $(RUNS)/vit-baseline
	@echo
	@echo 'Done. Look at:  $(RUNS)/vit/figures/*.png  $(RUNS)/vit/model/  $(RUNS)/vit/events.jsonl'

test: setup
	$(BIN)/python -m pytest -m 'not slow' $(AT_ONCE)

slow: setup
	$(BIN)/python -m pytest -m 'slow and not long' $(AT_ONCE)

long: setup
	$(BIN)/python -m pytest -m long $(AT_ONCE)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/bench.py

simulate: setup
	$(BIN)/python benchmarks/simulator.py

# `make chaos SEED=7` draws the same faults again.
chaos: setup
	$(BIN)/python benchmarks/chaos.py --faults 30 $(if $(SEED),--seed $(SEED))

pins: $(if $(shell command -v uv),,.uv/bin/uv)
	echo 'torch==$(TORCH)' > .venv/torch-pin.txt
	$(UV) pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	  --no-emit-find-links --no-emit-package torch --all-extras --upgrade \
	  --constraint .venv/torch-pin.txt --output-file .venv/pins.txt pyproject.toml
	@grep -vE '^(nvidia-|cuda-|triton|setuptools)' .venv/pins.txt > requirements.txt  # they follow from PyTorch's build

clean:
	rm -rf .venv .uv runs data .pytest_cache .mypy_cache .ruff_cache .hypothesis
