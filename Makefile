# Few verbs: demo, data, test, test-all, test-faults, check, docs, audit, bench. Each sets up .venv as far as it needs.
PYTHON ?= python3
BIN := .venv/bin
# Python compiles a module when it is first imported. Compiling all of torch took 32 of the 43 s of its installation.
PIP := $(BIN)/pip install --disable-pip-version-check --no-compile --constraint constraints.txt
# Images of Python set this. Each process then compiles again all that it imports: 35 s for hlora.pipeline, not 15 s.
export PYTHONDONTWRITEBYTECODE :=
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

.PHONY: demo data test test-all test-faults check check-types check-style docs audit bench

demo: .venv/demo ## the whole job on an embedded model and data; ends by naming the report
	$(BIN)/hlora demo

data: .venv/demo ## what configs/ and benchmarks/ read, from the hub into data/
	$(BIN)/python configs/get_data.py

test: .venv/dev ## what a newcomer runs: the fast tests, in two processes of one thread each
	$(PYTEST) -m "not slow" -rs

test-all: .venv/all test ## the fast tests, then all others
	$(PYTEST) -m slow -rs

test-faults: .venv/dev ## the long version of tests/faults: killed at 400 points, the disk failing at 200
	HLORA_LONG=1 $(PYTEST) tests/faults

check: check-types check-style ## lint, format, types, imports, declared dependencies

check-types: .venv/dev
	$(BIN)/mypy

check-style: .venv/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports && $(BIN)/deptry src

docs: .venv/docs ## the documentation as a site, into site/; a link that leads nowhere fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "open site/index.html"

audit: .venv/dev ## known holes in the dependencies that constraints.txt pins
	$(BIN)/python .ci/audit.py

bench: .venv/demo ## recording and penalty alone, and what they add to a training step: docs/performance.md
	$(BIN)/python benchmarks/core.py
	$(BIN)/python benchmarks/overhead.py

# A file for each set of packages that .venv holds; each set adds to the one before it.
.venv/demo: pyproject.toml constraints.txt
	@echo "Setting up .venv, once. What the demo needs: torch and some 120 packages."
	@echo "With the CUDA build of torch, which pip takes on Linux: 3 GB to fetch, 5.4 GB on disk."
	@echo "With a CPU build: 0.4 GB to fetch, 1.5 GB on disk. Free here: $$(df -h . | awk 'NR == 2 { print $$4 }')."
	$(PYTHON) -m venv .venv
# torch first and by its pinned version: elsewhere in the resolution pip may take another build.
	$(PIP) torch
	$(PIP) --editable '.[demo]'
	touch $@

.venv/docs: .venv/demo
	$(PIP) --editable '.[docs]'
	touch $@

.venv/dev: .venv/demo
	@echo "Adding what the tests need: pytest, linters, mypy, bitsandbytes, pip-audit."
	$(PIP) --editable '.[dev]'
	touch $@

.venv/all: .venv/dev
	@echo "Adding what the remaining tests need: Ray, W&B, MLflow, trackio, torchao, HQQ."
	$(PIP) --editable '.[all]'
	touch $@
