# Two commands: `make demo` and `make test`. Both make their environment in .venv themselves.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BENCH ?=
BIN := $(VENV)/bin

.PHONY: demo test check bench clean

# torch comes first and alone: what follows must accept it and not replace it.
$(VENV)/.torch: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77"
	$(BIN)/python -m pip install --quiet torch==2.13.0
	touch $@

$(VENV)/.bench: $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[bench]"
	touch $@

$(VENV)/.test: $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@

demo: $(VENV)/.bench
	$(BIN)/python -m plait.bench.demo

bench: $(VENV)/.bench
	$(BIN)/plait bench $(BENCH)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: check
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

clean:
	rm -rf $(VENV) .demo build *.egg-info
