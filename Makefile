# ltx2_train: every command a person or a machine needs. `make` alone lists them.
#
# Variables (make <target> NAME=value):
#   VENV         where the virtual environment lives                              (.venv)
#   PYTHON       the interpreter that makes it, >= 3.11             (found by itself)
#   TORCH_INDEX  package index of another torch build, for torch alone   (remembered)
#   CONSTRAINTS  pinned versions      (constraints/cpu.txt without a GPU, none with one)
#   ARGS         passed on to demo, the benches and the proofs, and to pytest by test, proof and gpu

VENV ?= .venv
ARGS ?=
, := ,
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := ltx2_train data_prep conf tests

# A GPU is there when the driver's tool lists one. Pinned versions are the tested CPU set; with a GPU the default build of torch is wanted.
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
CONSTRAINTS ?= $(if $(GPU),,constraints/cpu.txt)
PIP := $(BIN)/python -m pip install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
LOG := $(VENV)/install.log
FAILED := { tail -n 20 $(LOG); echo "Installing failed; all of it stands in $(LOG)"; exit 1; }

# The index given once is remembered beside the environment, so that `make test` later does not replace that torch.
INDEX_RECORD := $(VENV)/.torch-index
RECORDED_INDEX := $(shell cat $(INDEX_RECORD) 2>/dev/null)
TORCH_INDEX ?= $(RECORDED_INDEX)
REINSTALL := $(if $(filter-out $(RECORDED_INDEX),$(TORCH_INDEX)),reinstall)

# The first interpreter that is new enough; 3.11 and 3.12 are the tested ones.
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python3.13 python3.14 python; do \
	$$p $(IS_NEW_ENOUGH) >/dev/null 2>&1 && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint format types proof proof-engines proof-bounce soak gpu bench bench-engines clean reinstall

help:  ## this list
	@echo "ltx2_train: pretrain and fine-tune LTX-2, the open audio-video diffusion transformer"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | \
		while IFS='	' read -r name text; do printf '  make %-13s %s\n' "$$name" "$$text"; done
	@echo
	@echo "Variables: VENV, PYTHON, TORCH_INDEX, CONSTRAINTS, ARGS (explained at the top of the Makefile)."
	@echo "Start with 'make demo'; it builds the environment first."

setup: $(STAMP)  ## build the virtual environment (CPU or CUDA is found by itself); nothing to do when it is up to date

# torch comes first and alone, so that TORCH_INDEX concerns nothing else. Without a GPU and without TORCH_INDEX pip's own configuration
# is asked what it would install: a build with gigabytes of CUDA libraries works too, but is said beforehand.
$(STAMP): pyproject.toml $(wildcard $(CONSTRAINTS)) $(REINSTALL)
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found. Install one, or name it: make setup PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) $(IS_NEW_ENOUGH) || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); Python >= 3.11 is needed"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing with $$($(BIN)/python --version), $(if $(GPU),a GPU found,no GPU found)$(if $(CONSTRAINTS),$(,) versions of $(CONSTRAINTS)): some minutes the first time (details: $(LOG))"
	@set -e; index="$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))"; : > $(LOG); \
	if [ -z "$$index$(GPU)" ] && [ "$$(uname -s)" = Linux ]; then \
		found=$$($(PIP) --quiet --dry-run --no-deps --ignore-installed --report - 'torch>=2.11' 2>>$(LOG) || true); \
		case "$$found" in *+cpu*) ;; *) \
			echo "  pip's configuration has no CPU build of torch, so gigabytes of CUDA libraries come along;"; \
			echo "  for a small one: make setup TORCH_INDEX=... with the CPU index that PyTorch's install page names" ;; esac; \
	fi; \
	echo "  torch"; $(PIP) $(if $(REINSTALL),--force-reinstall) $$index 'torch>=2.11' >>$(LOG) 2>&1 || $(FAILED); \
	echo "  everything else"; $(PIP) --editable '.[dev]' >>$(LOG) 2>&1 || $(FAILED)
	@echo "$(TORCH_INDEX)" > $(INDEX_RECORD)
	@$(BIN)/python -c 'import torch; print(f"Ready: torch {torch.__version__},", "CUDA" if torch.cuda.is_available() else "CPU")'
	@echo "To type commands in a shell of your own: source $(BIN)/activate"
	@touch $@

demo: setup  ## the whole story on small synthetic clips: make data, train, sample with sound, write a report (about 8 minutes)
	$(BIN)/python -m ltx2_train.cli.demo $(ARGS)

test: setup  ## the tests, without slow proofs and without those that need a GPU
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

check: lint types test  ## everything a change must pass: format, lint, types, tests

lint: setup  ## formatting and lint, read only
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

format: setup  ## put the formatting right and mend what lint can mend
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

types: setup  ## mypy on the package
	$(BIN)/mypy

proof: setup  ## the long proofs: parity, released weights and exactness with their figures, then the tests marked slow
	$(BIN)/python -m tests.proofs.parity
	$(BIN)/python -m tests.proofs.weights
	$(BIN)/python -m tests.proofs.exactness
	$(BIN)/python -m pytest -m slow $(ARGS)

proof-engines: setup  ## parity of both engines, kill matrix, flipped bits, LoRA's memory (needs the extra deepspeed)
	$(BIN)/python -m tests.proofs.engines $(ARGS)

proof-bounce: setup  ## the click falls on the impact: train from scratch, sample, measure sync, write docs/bounce.* (up to 2 hours on two cores)
	$(BIN)/python -m tests.proofs.bounce $(ARGS)

soak: setup  ## a tiny run killed at random moments, twenty times, against the same run straight
	$(BIN)/python -m tests.proofs.soak $(ARGS)

gpu: setup  ## the tests that need a CUDA device: each is a test of the CPU on another device
	$(BIN)/python -m pytest -m gpu $(ARGS)

bench-engines: setup  ## a LoRA step of the 19 B model under each recompute policy and with ZeRO-3 offload: for a machine with GPUs
	$(BIN)/python -m tests.bench.bench_engines $(ARGS)

bench: setup  ## the demo model against diffusers' transformer; a guided step against its passes apart: time and peak memory
	$(BIN)/python -m tests.bench.bench_transformer $(ARGS)
	$(BIN)/python -m tests.bench.bench_guided $(ARGS)

reinstall: ;

clean:  ## remove caches and build leftovers; the environment and outputs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
