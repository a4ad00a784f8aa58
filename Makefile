# slurmlime: `make demo` and `make test` set up what they need by themselves.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# The newest clients of the agents' gateway, which its tests need.
CLIENTS := $(VENV)/clients/.ready
# Warnings of pip are about the machine's package indexes; errors are still shown.
PIP    := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check

# Two processes for two cores compute, and two wait for Slurm or a supervisor meanwhile (tests/helpers/parallel.py). Each
# may hold engines and trainers: 16 GB in all.
PARALLEL := -n 4

# The second environment: Python 3.12, the newest versions that fit, and the builds for CUDA that a GPU node runs.
CURRENT       := .venv-current
CURRENT_READY := $(CURRENT)/.ready
CURRENT_TESTS  = $(shell sed 's/\#.*//' tests/current.txt)

# Another megatron-core, in front of that of .venv-current, and the tests of all that calls it: families of models,
# layouts, checkpoints of all versions, flags. 0.16 is in .venv.
OTHER_MEGATRON = $(abspath $(CURRENT))/megatron-core-$(VERSION)
MEGATRON_TESTS := tests/model tests/checkpoint tests/training tests/arguments/test_arguments_megatron.py

# What is imported is compiled once, pytest's rewritten tests too, and not by each of many processes.
export PYTHONDONTWRITEBYTECODE =
COMPILE := -m compileall -q hpc rltrain analysis

.PHONY: help setup slurm demo test test-all test-fast test-current test-current-fast test-megatron test-gpu chaos lint lock format bench clean

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

$(CLIENTS): requirements/clients.txt $(READY)
	@$(BIN)/python -m venv --without-pip $(dir $@)
	@$(PIP) --python $(dir $@) install -r requirements/clients.txt
	@touch $@

slurm: ## install Debian's Slurm packages, which the sandbox and its tests need (root)
	@requirements/install-debian.sh

test test-all: $(READY) $(CLIENTS)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then requirements/install-debian.sh; fi
	@$(BIN)/python $(COMPILE)
	@$(BIN)/python -m pytest $(PARALLEL) $(if $(filter test,$@),-m "not learning and not resolving",-m "not resolving")

test: ## every test but whole runs that learn for minutes, on the real parts
test-all: ## those too

test-fast: $(READY) ## only the tests that start no engine, no trainer and no job
	@$(BIN)/python $(COMPILE)
	@$(BIN)/python -m pytest -n 3 -m "not slow and not slurm"

test-gpu: ## what to run first on a GPU node, in the environment of docs/gpu.md that is activated; skips without a GPU
	@python3 -m pytest -m gpu -rs -s tests/gpu

test-current-fast: $(CURRENT_READY) ## test-fast in .venv-current
	@$(CURRENT)/bin/python $(COMPILE)
	@$(CURRENT)/bin/python -m pytest -n 3 -m "not slow and not slurm"

test-current: test-current-fast ## the tests and the demo in .venv-current, as on a GPU node (5 minutes and 11 GB to make)
	@$(CURRENT)/bin/python -m pytest -n 2 -m "slow and not learning" $(CURRENT_TESTS)

test-megatron: $(CURRENT_READY) ## the trainer's tests with another megatron-core than that of .venv-current: VERSION=0.18.2, 0.17 or later
	@test -n "$(VERSION)" || { echo "which one? Such as: make test-megatron VERSION=0.18.2" >&2; exit 2; }
	@$(CURRENT)/bin/python -m pip --quiet --quiet --disable-pip-version-check install --no-deps --upgrade \
		--target $(OTHER_MEGATRON) megatron-core==$(VERSION)
	@PYTHONPATH=$(OTHER_MEGATRON) $(CURRENT)/bin/python -m pytest -n 2 -m "not learning" $(MEGATRON_TESTS)

$(CURRENT_READY): requirements/gpu.txt requirements/current.txt pyproject.toml
	@echo "virtual environment in $(CURRENT)"
	@python=$$(PYTHON312="$(PYTHON312)" requirements/python312.sh) && "$$python" -m venv $(CURRENT)
	@$(CURRENT)/bin/python -m pip --quiet --quiet --disable-pip-version-check install \
		-c requirements/gpu.txt -r requirements/current.txt -e '.[train,gpu,notebook,dev]'
	@touch $@

lock: $(CURRENT_READY) ## resolve requirements/gpu.txt again; UPGRADE=--upgrade takes the newest of everything
	@requirements/lock.sh $(CURRENT)/bin/uv $(UPGRADE)

chaos: $(READY) ## storms of faults over runs on a real Slurm, over 4 minutes after MINUTES=10; SEED=1 is yours to set, too
	@$(BIN)/python -m hpc.chaos --seed $(or $(SEED),1) --storms 1000000 --minutes $(or $(MINUTES),10)

lint: $(READY) ## ruff, mypy, shellcheck, hadolint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy --strict rltrain/arguments rltrain/algorithms
	@$(BIN)/shellcheck --exclude=SC2016 .ci/run requirements/*.sh containers/apptainer-python tests/golden/*
	@$(BIN)/hadolint containers/Dockerfile

format: $(READY) ## let ruff rewrite
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY) ## every benchmark; each prints a ratio
	@for script in benchmarks/*.py benchmarks/agents/*.py benchmarks/cluster/*.py benchmarks/rollout/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean: ## remove the virtual environments and caches
	rm -rf $(VENV) $(CURRENT) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
