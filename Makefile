# Everything happens in .venv in this checkout; `make demo` and `make test` set it up by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Python keeps the byte code of what is used when it is used first; pip would compile all of it on one core.
PIP := $(BIN)/python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxschedchunk 1

.PHONY: install demo check test test-axolotl test-newest test-others check-units lint typecheck docs wheel wheel-test bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "swanlab-ray needs Python 3.11 or newer: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable '.[test]'
	touch $(INSTALLED)

demo: install
	$(BIN)/swanlab-ray demo

# On a slow machine everything gets the time that it needs there.
test: install
	TESTS_SLOWNESS=$$($(BIN)/python -m tests.slowness) $(MAKE) --jobs 5 lint typecheck test-axolotl test-newest test-others

test-others: install build/oldest build/newest build/launchers build/imported
	$(PYTEST) --ignore tests/test_plugin.py

# Beside the others, from which they have other libraries; what they print is shown when they are over.
test-axolotl test-newest: test-%: install build/% build/imported
	PYTHONPATH="$(CURDIR)/build/$*:$(CURDIR)" $(BIN)/python -m pytest $(TESTS_WITH_$*) > build/test-$*.txt; \
		code=$$?; cat build/test-$*.txt; exit $$code

TESTS_WITH_axolotl := tests/test_plugin.py
TESTS_WITH_newest := tests/test_contracts.py tests/test_settings.py tests/test_tracker.py

# No Ray, no torchrun, no trainer: less than a minute, once .venv is there.
check: install
	$(MAKE) --jobs 2 lint typecheck check-units

check-units: install
	$(BIN)/python -m pytest --numprocesses 8 --maxschedchunk 1 --quick

# The byte code of what all of pytest's workers import at the same time is made once.
build/imported: $(INSTALLED)
	$(BIN)/python -m tests.preloaded
	mkdir -p build
	touch $@

# Other versions of libraries, which the tests put in front of the installed ones.
build/%: tests/%.txt | install
	rm -rf $@ $@.part
	$(PIP) --no-deps --target $@.part --requirement $<
	mv $@.part $@

# The command reference, from each command's own help.
docs: install
	$(BIN)/python -m tests.command_reference > docs/commands.md

# One file that pip installs anywhere, in dist/.
wheel: install
	$(PIP) build
	rm -rf build/lib
	rm -f dist/swanlab_ray-*.whl
	$(BIN)/python -m build --wheel --outdir dist .

# The wheel with each extra in an environment of its own, installed as people do it. Gigabytes, and many minutes.
wheel-test: install
	TESTS_WHEEL=installed $(BIN)/python -m pytest tests/test_wheel.py

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
	$(BIN)/python -m tests.benchmarks.bench_journal
	$(BIN)/python -m tests.benchmarks.bench_memory
	$(BIN)/python -m tests.benchmarks.bench_completions
	$(BIN)/python -m tests.benchmarks.bench_spans
	$(BIN)/python -m tests.benchmarks.bench_restart
	$(BIN)/python -m tests.benchmarks.bench_machines

clean:
	rm -rf $(VENV) build dist *.egg-info
