# Everything runs in .venv, made on the first use with Python (3.11 or later) and pip alone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# compiled with little optimisation: tests compile much and run little
LITTLE := XLA_FLAGS="--xla_backend_optimization_level=1 $(XLA_FLAGS)"
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: setup demo test parity soak bench docs lint clean
.DELETE_ON_ERROR:

setup: $(VENV)/.dev

demo: $(VENV)/.run
	$(BIN)/posttrain demo

test: $(VENV)/.dev
	$(LITTLE) $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

parity: $(VENV)/.parity
	$(LITTLE) $(BIN)/python -m pytest -m parity --numprocesses $(WORKERS) --dist loadfile

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak --numprocesses $(WORKERS) --dist loadfile

# PEERS=trl: compared with TRL too, which the parity environment installs; PEERS=trl,tunix: with
# Tunix as well, in an environment of its own
bench: $(VENV)/$(if $(PEERS),.parity,.dev) $(if $(findstring tunix,$(PEERS)),.venv-tunix/.made)
	BENCH_PEERS=$(PEERS) $(BIN)/python -m pytest -m bench --capture no

.venv-tunix/.made:
	$(PYTHON) -m venv .venv-tunix
	.venv-tunix/bin/python -m pip install --quiet google-tunix==0.1.7
	touch $@

# the pages that are written from docstrings, and from results
docs: $(VENV)/.run
	$(BIN)/python docs/losses.py
	$(BIN)/python docs/scale.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

clean:
	rm -rf $(VENV) .venv-tunix .cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[dev,qlora,math,tpu]'
	touch $@ $(VENV)/.run

# torch first and alone: where the index offers a CPU build of it, that one is taken
$(VENV)/.parity: $(VENV)/.dev
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[dev,qlora,math,tpu,parity]'
	touch $@
