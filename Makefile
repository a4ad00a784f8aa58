# slurmlime: `make demo` and `make test` set up what they need by themselves.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Warnings of pip are about the machine's package indexes; errors are still shown.
PIP    := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check

# Two tests of different files at a time: each may start engines, trainers and a Slurm cluster of its own.
PARALLEL := -n 2 --dist loadfile

.PHONY: help setup slurm demo test test-fast lint format bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## make .venv with everything a CPU machine needs (about a minute, 2 GB)

$(READY): requirements/cpu.txt requirements/cpu-no-deps.txt requirements/constraints.txt pyproject.toml
	@echo "[1/4] virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/4] PyTorch"
	@$(PIP) install -c requirements/constraints.txt torch==2.13.0
	@echo "[3/4] Megatron-core, SGLang and the rest"
	@$(PIP) install -c requirements/constraints.txt -r requirements/cpu.txt
	@$(PIP) install --no-deps -r requirements/cpu-no-deps.txt
	@echo "[4/4] slurmlime itself"
	@$(PIP) install -c requirements/constraints.txt -e .
	@touch $@

demo: $(READY) ## train a small model to add: SFT, then GRPO (about 5 minutes)
	@$(BIN)/python -m hpc.submit

slurm: ## install Debian's Slurm packages, which the sandbox and its tests need (root)
	@requirements/install-debian.sh

test: $(READY) ## every test, on the real parts
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then requirements/install-debian.sh; fi
	@$(BIN)/python -m pytest $(PARALLEL)

test-fast: $(READY) ## only the tests that start no engine, no trainer and no job
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not slurm"

lint: $(READY) ## ruff, mypy, shellcheck
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/shellcheck --exclude=SC2016 .ci/run requirements/*.sh tests/golden/*

format: $(READY) ## let ruff rewrite
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY) ## every benchmark; each prints a ratio
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
