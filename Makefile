# Few verbs: demo, test, test-faults, check, audit, bench. The first two set up .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-faults check audit bench setup

demo: setup ## the whole job on an embedded model and data; ends by naming the report
	$(BIN)/hlora demo

test: setup ## all tests, in two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-faults: setup ## the long version of tests/faults: killed at 400 points, the disk failing at 200
	OMP_NUM_THREADS=1 HLORA_KILL_POINTS=400 $(BIN)/pytest tests/faults -n 2

check: setup ## lint, format, types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

audit: setup ## known holes in the dependencies that constraints.txt pins
	$(BIN)/python .ci/audit.py

bench: setup ## recording and penalty alone, and what they add to a training step: docs/performance.md
	$(BIN)/python benchmarks/core.py
	$(BIN)/python benchmarks/overhead.py

setup: .venv/installed

# torch first and by its pinned version: elsewhere in the resolution pip may take a CUDA build of several gigabytes.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
