# One entry for everything a person or a CI machine runs. Needs python3 (>= 3.10) and make; all else comes from the
# package index into .venv. Variables: PYTHON (interpreter), TORCH (requirement installed first; add pip options to
# choose a build, e.g. TORCH="torch==2.13.0 --index-url URL"), DATA (folder of real recordings, may be empty),
# OUT (results), BENCH_FLAGS.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DATA ?= $(wildcard ../shared/data)
OUT ?= out
BENCH_FLAGS ?= --quick
MODEL := sae_weights/mini.en
# the bundled SAEs' place in a grid, as calibration/mixtures/mini.en.toml has it
SAES := batchtopk-k25-x8

BIN := $(VENV)/bin
RUN := $(BIN)/python -m
DATA_FLAG := $(if $(DATA),--data $(DATA))
# how the bundled steering is chosen
SWEEP = --model mini.en --labels $(OUT)/labels.jsonl $(DATA_FLAG) --corpus $(OUT)/corpus --gate-kind any --no-refit \
  --edits additive_l3_k50,both_l3_k16 --screened 12 --finalists 2 --heard 60 --joined 120 --frontier 120

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow lint weights steering-again sae-sweep bench bench-env clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: $(VENV)/.installed  ## install into .venv and show three clips before and after steering
	@$(RUN) calibration.demo

test: $(VENV)/.installed-dev  ## the quick tests
	@$(RUN) pytest

test-slow: $(VENV)/.installed-dev  ## the tests marked slow
	@$(RUN) pytest -m slow

lint: $(VENV)/.installed-dev  ## ruff and mypy
	@$(RUN) ruff check .
	@$(RUN) mypy

bench: $(VENV)/.installed-dev  ## the trade-off table and plot (BENCH_FLAGS= for the full run)
	@$(RUN) benchmarks.tradeoff $(BENCH_FLAGS) $(DATA_FLAG) --out $(OUT)/tradeoff

bench-env: $(VENV)/.installed-dev  ## environments of the libraries that benchmarks.training compares with (out/peers)
	@$(RUN) benchmarks.training --make-envs $(if $(TORCH),--torch "$(TORCH)")

weights: $(VENV)/.installed-dev  ## rebuild sae_weights/mini.en from nothing (resumable; hours on two cores)
	@$(RUN) calibration.synthesis --out $(OUT)/corpus --utterances 40000 --non-speech 3000 --seed 1
	@$(if $(DATA),$(RUN) calibration.corpus --data $(DATA) --out $(OUT)/corpus)
	@$(RUN) calibration.mini_whisper --corpus $(OUT)/corpus --out $(OUT)/mini --seed 1
	@$(RUN) calibration.bundle model --checkpoint $(OUT)/mini/checkpoint.pt --out $(MODEL)
	@$(RUN) calibration.train --model mini.en --mixture mini.en \
	  --corpus $(OUT)/corpus $(DATA_FLAG) --out $(OUT)/saes
	@$(RUN) calibration.hallucinations --model mini.en $(DATA_FLAG) --out $(OUT)/labels.jsonl
	@$(RUN) calibration.fit --model mini.en --saes $(OUT)/saes/$(SAES)-seed0 --labels $(OUT)/labels.jsonl \
	  --corpus $(OUT)/corpus $(DATA_FLAG) --out $(OUT)/fit
	@$(RUN) calibration.sweep --fit $(OUT)/fit $(SWEEP) --out $(MODEL)
	@cp $(OUT)/saes/$(SAES)-seed0/layer_*.safetensors $(MODEL)/
	@mkdir -p $(MODEL)/seed1 && cp $(OUT)/saes/$(SAES)-seed1/layer_*.safetensors $(MODEL)/seed1/
	@$(RUN) calibration.bundle card --quick --corpus $(OUT)/corpus --saes $(OUT)/saes $(DATA_FLAG) --out $(MODEL)

steering-again: $(VENV)/.installed-dev  ## fit the bundled steering's edits and window fits anew, keep its frame probes
	@$(RUN) calibration.synthesis --out $(OUT)/corpus --utterances 40000 --non-speech 3000 --seed 1
	@$(RUN) calibration.fit --model mini.en --saes $(MODEL) --labels $(OUT)/labels.jsonl --corpus $(OUT)/corpus \
	  $(DATA_FLAG) --layers 3 --clips 60 --real 30 --out $(OUT)/fit-again
	@$(RUN) calibration.sweep --fit $(OUT)/fit --again $(MODEL)/steering.safetensors --rivals $(OUT)/fit-again \
	  --only steering $(SWEEP) --out $(MODEL)

sae-sweep: $(VENV)/.installed-dev  ## L0 against error of SAEs of mini.en: table, figures, operating point
	@$(RUN) calibration.train --model mini.en --mixture mini.en --corpus $(OUT)/corpus $(DATA_FLAG) \
	  --k 8,16,25,50,100 --expansion 8,32 --seed 0 --steps 300 --buffer-batches 50 --warm-up 15 \
	  --wer-clips 0 --out $(OUT)/sae-sweep

clean:  ## remove .venv and caches, keep results
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A recipe whose line fails leaves no interpreter behind, so the next run starts over.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "error: $(PYTHON) was not found: install Python 3.10 or newer, or name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), expected 3.10 or newer: name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments: install its venv module" \
	       "(Debian, Ubuntu: apt install python3-venv) or name another with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)

# Torch first: a plain dependency on it takes the newest build, gigabytes of CUDA packages included.
# pip below 21.3 (shipped with early 3.10) cannot install a pyproject.toml in place.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "installing whisper-steer into $(VENV) (only the first time; some minutes)"
	@$(RUN) pip install --quiet --upgrade "pip>=23"
	@$(if $(TORCH),$(RUN) pip install --quiet $(TORCH))
	@$(RUN) pip install --quiet -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	@echo "installing the tools for tests and calibration into $(VENV) (only the first time)"
	@$(RUN) pip install --quiet -e ".[dev]"
	@touch $@
