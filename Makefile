# One verb each; continuous integration (.ci/run) calls the same ones.
#   make PYTHON=python3.12 VENV=/tmp/venv test

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PACKAGES := pdserve router prefill_worker decode_worker controller load_generator simulator

.PHONY: install up test check format proto docs bench simulate-faults simulate-mutations faults scale-storm soak clean

install: $(VENV)/.installed-dev  ## everything that the other verbs need

up: $(VENV)/.installed  ## start the system on this machine; ARGS="--port 9000 --decode 2"
	$(BIN)/pdserve up $(ARGS)

test: $(VENV)/.installed-dev  ## run all tests; ARGS="tests/unit -x"
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed-dev  ## everything that can be found wrong without running the system
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/make_stubs.py --check
	$(BIN)/python tools/make_metrics_docs.py --check
	$(BIN)/python tools/make_config_docs.py --check
	$(BIN)/python -m tools.make_faults_docs --check
	$(BIN)/python -m tools.make_dashboards --check
	$(BIN)/python -m tools.make_splitting_docs --check

format: $(VENV)/.installed-dev  ## rewrite the code in the project's form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(VENV)/.installed-dev  ## generate the stubs from proto/
	$(BIN)/python tools/make_stubs.py

docs: $(VENV)/.installed-dev  ## generate the pages that follow from the code
	$(BIN)/python tools/make_metrics_docs.py
	$(BIN)/python tools/make_config_docs.py
	$(BIN)/python -m tools.make_faults_docs
	$(BIN)/python -m tools.make_dashboards
	$(BIN)/python -m tools.make_splitting_docs

bench: $(VENV)/.installed-dev  ## the benchmarks in their short form
	$(BIN)/python -m benchmarks.engine --smoke
	$(BIN)/python -m benchmarks.handoff --smoke
	$(BIN)/python -m benchmarks.overlap --smoke
	$(BIN)/python -m benchmarks.router --smoke

simulate-faults: $(VENV)/.installed-dev  ## whole systems with faults in virtual time; ARGS="--seeds 0:500 --jobs 2"
	$(BIN)/python -m tests.simulation --seeds 0:20000 --jobs 2 --results benchmarks/results/simulation.json $(ARGS)

simulate-mutations: $(VENV)/.installed-dev  ## whether the simulation finds planted bugs
	$(BIN)/python -m tests.simulation.mutations

faults: $(VENV)/.installed-dev  ## every fault at every state of the real system; ARGS="--rounds 3"
	$(BIN)/python -m tests.faults.matrix $(ARGS)
	$(BIN)/python -m tools.make_faults_docs

scale-storm: $(VENV)/.installed-dev  ## scale-ins, drains and rollouts under load; ARGS="--scale-ins 10"
	$(BIN)/python -m tests.faults.pool_changes $(ARGS)
	$(BIN)/python -m tools.make_faults_docs

soak: $(VENV)/.installed-dev  ## mixed load with faults for a long time; MINUTES=20
	$(BIN)/python -m tests.faults.soak --minutes $(or $(MINUTES),20) $(ARGS)
	$(BIN)/python -m tools.make_faults_docs

clean:  ## remove what the verbs above have made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed
