# Each target works alone on a fresh machine: it makes .venv and installs what it needs; a second call is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow coverage lint format bench claims docs clean

# mup is a test oracle; the torchvision that its metadata asks for is a CUDA build, and its code does not import it.
# torch first and by its exact version: on the tested machines that is the CPU build, and a range takes the newest CUDA one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps mup
	touch $@

demo: $(STAMP)  ## trains a Mixture-of-Experts language model in about two minutes and shows what came out
	$(BIN)/lightning-mue fit --config configs/quickstart.yaml

test: $(STAMP)  ## the fast tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not slow and not gpu'

coverage: $(STAMP)  ## the fast tests, and the lines that none of them runs; tracing makes them 1.6 times as long
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not slow and not gpu' --cov --cov-report=term:skip-covered

test-slow: $(STAMP)  ## the tests that are too slow for every change: several processes, large models
	$(BIN)/python -m pytest -q -m 'slow and not gpu'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## the CPU benchmarks; ratios only
	$(BIN)/python benchmarks/moe.py
	$(BIN)/python benchmarks/callback.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/optimizer.py

claims: $(STAMP)  ## what the results claim, on which processor, and whether it holds
	$(BIN)/python benchmarks/targets.py

docs: $(STAMP)  ## writes the papers' tables into docs/derivations from the code
	$(BIN)/python -m lightning_mue.parameterizations.document

clean:
	rm -rf $(VENV) logs .pytest_cache .mypy_cache .ruff_cache
