# `make demo` and `make test` set up everything they need on a machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-all test-gpu lint docs bench clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llm,dev]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m bilevel.run problem=llm_reweight

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

test: lint docs
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: lint docs
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(VENV)/.ready
	$(BIN)/python -m pytest -m gpu

# Interrupted, it goes on with the script that it was at; once all have ended, it starts anew.
BENCHMARKS = step_cost overhead methods weights_quality peers/run scale
bench: $(BENCHMARKS:%=build/bench/%.done)
	rm -rf build/bench

build/bench/%.done: $(VENV)/.ready
	$(BIN)/python benchmarks/$*.py $(OPTIONS_$*)
	mkdir -p $(@D)
	touch $@

# Without a GPU the table of the large shapes stays as it is, and a tiny one shows that it runs.
OPTIONS_scale = $(shell $(BIN)/python -c 'import torch; print("" if torch.cuda.is_available() else "--device cpu --shapes tiny --results build")')

clean:
	rm -rf $(VENV) build *.egg-info
