# Everything happens in .venv in this checkout; `make demo` and `make test` set it up by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test lint typecheck bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "swanlab-ray needs Python 3.11 or newer: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(INSTALLED)

demo: install
	$(BIN)/swanlab-ray demo

test: install lint typecheck
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow the finder of an editable install, so it gets a tree of links.
typecheck: install
	mkdir -p build/typecheck/swanlab_ray
	for package in observer actors plugin; do ln -sfn "$(CURDIR)/$$package" build/typecheck/swanlab_ray/$$package; done
	MYPYPATH=build/typecheck $(BIN)/mypy -p swanlab_ray
	MYPYPATH=build/typecheck $(BIN)/mypy tests

bench: install
	$(BIN)/python -m tests.benchmarks.bench_log
	$(BIN)/python -m tests.benchmarks.bench_ingest
	$(BIN)/python -m tests.benchmarks.bench_step

clean:
	rm -rf $(VENV) build *.egg-info
