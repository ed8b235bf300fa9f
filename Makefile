# Two commands: `make compare` trains and writes a report, `make test` checks the code.
# Both set up their own environment in .venv the first time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRAIN := $(BIN)/python -m experiments.train --multirun

.PHONY: help compare claims gauntlet test lint clean

help: ## Show the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "densitylr needs Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) -V 2>&1): use make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[experiments,dev]'
	@touch $@

compare: $(READY) ## Train flat, geometric and controlled rates on the bundled MNIST; write outputs/compare/report.html
	$(TRAIN) experiment=compare
	$(BIN)/python -m experiments.report outputs/compare

claims: $(READY) ## Train the runs behind the README's claims, 3 to 5 seeds (45 minutes), and check them
	$(TRAIN) experiment=claims optimizer=sgd,adamw profile=flat,geometric controller=fixed,density output=outputs/claims/repair
	$(TRAIN) experiment=claims optimizer=adam controller=fixed,density output=outputs/claims/repair
	$(TRAIN) experiment=claims optimizer=sgd optimizer.lr=1e-5 controller=free seed=0,1,2 output=outputs/claims/free
	$(TRAIN) experiment=claims optimizer=adam optimizer.lr=1e-6 controller=free seed=0,1,2 output=outputs/claims/free
	$(TRAIN) experiment=claims optimizer=sgd optimizer.lr=1 controller=fixed,warmup seed=0,1,2 output=outputs/claims/warmup
	$(TRAIN) experiment=claims optimizer=adam optimizer.lr=0.1 controller=fixed,warmup seed=0,1,2 output=outputs/claims/warmup
	$(BIN)/python -m experiments.claims outputs/claims

test: lint ## Lint, type-check and run the tests
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.architecture

gauntlet: $(READY) ## Train a part of the gauntlet (a few minutes) and write outputs/gauntlet/report.html
	$(BIN)/python -m experiments.gauntlet suite=quick

clean: ## Remove the environment and caches; outputs stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
