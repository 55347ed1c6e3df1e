# The only commands anybody must know. `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= demo-out
JOBS ?= 2

# Single-threaded math: repeatable to the bit, and 2 processes do not fight for the cores.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-compile test-gpu parity bench bench-gpu study-tqd study-tqd-gpu lint type layers docs fmt ci clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-13s %s\n", $$1, $$2}'

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 13), f"Python 3.10-3.12 is needed, this is {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

install: $(STAMP) ## set up .venv (the other targets do it by themselves)

demo: $(STAMP) ## MP4 files -> shards -> image, low-res, high-res, RLHF -> sampled videos and a report
	$(BIN)/contentv demo out=$(OUT)

test: $(STAMP) lint type layers ## checks and all tests but the slow ones
	$(BIN)/python -m pytest -m 'not slow and not gpu and not npu and not compile and not dist' -n $(JOBS)
	$(BIN)/python -m pytest -m 'dist and not slow and not gpu and not npu and not compile'
	CONTENTV_TYPECHECK=0 $(BIN)/python -m pytest -m 'compile and not slow and not gpu and not npu'

test-all: $(STAMP) lint type layers ## everything that runs without an accelerator
	$(BIN)/python -m pytest -m 'not gpu and not npu and not compile'
	CONTENTV_TYPECHECK=0 $(BIN)/python -m pytest -m 'compile and not gpu and not npu'

test-gpu: ## the tests that need a CUDA device, in the current Python environment
	CONTENTV_TYPECHECK=0 $(PYTHON) -m pytest -m gpu tests/kernels

parity: $(STAMP) ## the tests that compare with published modules -> benchmarks/results/, docs/parity.md
	$(BIN)/python benchmarks/parity.py

bench: $(STAMP) ## after `make demo`: its numbers, reuse, the loader, curation, the plan -> benchmarks/results/
	$(BIN)/python benchmarks/demo.py --demo $(OUT)
	$(BIN)/python benchmarks/reuse.py --demo $(OUT)
	$(BIN)/python benchmarks/gradients.py --demo $(OUT)
	$(BIN)/python benchmarks/model_step.py
	$(BIN)/python benchmarks/loader_speed.py
	$(BIN)/python benchmarks/data_scale.py
	$(BIN)/python benchmarks/curate_speed.py
	$(BIN)/python benchmarks/score_meaning.py
	$(BIN)/python benchmarks/plan_accuracy.py
	$(BIN)/python benchmarks/tqd_cost.py

study-tqd: $(STAMP) ## does routing clips by quality pay? 90 small trainings; goes on where it stopped -> docs/tqd.md
	$(BIN)/python benchmarks/tqd_study --jobs $(JOBS)

bench-gpu: ## kernels and a training step at the 8B width against diffusers -> benchmarks/results/
	$(PYTHON) benchmarks/gpu_kernels.py
	$(PYTHON) benchmarks/gpu_step.py
	$(PYTHON) benchmarks/model_step.py --device cuda --dtype bfloat16 --warmups 3 --repeats 20

study-tqd-gpu: ## the study's larger version, on one CUDA device, in the current Python environment
	$(PYTHON) benchmarks/tqd_study --size large --device cuda --jobs 4

lint: $(STAMP) ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP) ## mypy --strict
	$(BIN)/mypy

layers: $(STAMP) ## import contracts between the packages
	$(BIN)/lint-imports

docs: $(STAMP) ## write docs/keys.md, the tables of docs/model.md and docs/parity.md from code and results
	$(BIN)/python -m contentv.config.document > docs/keys.md
	$(BIN)/python -m contentv.config.figures
	$(BIN)/python benchmarks/parity.py --page-only
	$(BIN)/python benchmarks/parallel_table.py

fmt: $(STAMP) ## format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ci: test ## what CI runs

clean: ## remove caches and builds (not .venv)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
