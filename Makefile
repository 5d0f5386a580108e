# Few verbs: demo, test, check, bench. The first two set up .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench setup

demo: setup ## the whole job on an embedded model and data; ends by naming the report
	$(BIN)/hlora demo

test: setup ## all tests
	$(BIN)/pytest

check: setup ## lint, format, types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: setup ## recording and penalty alone, how they grow, and what they add to a training step: docs/performance.md
	$(BIN)/python benchmarks/core.py
	$(BIN)/python benchmarks/core.py --growth
	$(BIN)/python benchmarks/overhead.py

setup: .venv/installed

# torch first and by its pinned version: elsewhere in the resolution pip may take a CUDA build of several gigabytes.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
