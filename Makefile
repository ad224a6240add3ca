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

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/weights_quality.py
	$(BIN)/python benchmarks/peers/run.py
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python benchmarks/scale.py; \
	else $(BIN)/python benchmarks/scale.py --device cpu --shapes tiny --results build; fi

clean:
	rm -rf $(VENV) build *.egg-info
