# Every target works in a fresh clone. The first one installs into .venv, and does so
# again only after pyproject.toml or constraints.txt has changed.

# Any Python from 3.11 on.
PYTHON ?= python3
# What pip is asked for to get torch, which only the oracle and the tests need. On Linux
# pip's default build of it brings gigabytes of CUDA libraries; PyTorch's own index has
# a build without them:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# The tested versions; /dev/null takes the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
# Limits of the oracle for `make equivalence`, by default those it comes with. With another
# JAX, torch or backend, name a file: it is measured first if it does not exist.
#   make equivalence CALIBRATION=build/calibration.json
CALIBRATION ?=
# Test processes (0 runs the tests in pytest's own), and further arguments to pytest.
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint $(CONSTRAINTS)
# Not `python -m pytest`: with this folder on its path pytest would compile all of the project anew for its asserts.
PYTEST := $(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-quick equivalence lint format bench clean

help:
	@echo "make demo         train, fine-tune, check and compare a small model from nothing (about 4 minutes)"
	@echo "make test         the test suite (six to seven minutes on two cores of its own)"
	@echo "make test-all     and every planted mistake in every family and dtype"
	@echo "make test-quick   what a change breaks first (under 3 minutes)"
	@echo "make equivalence  JAX against PyTorch: every family, shape and dtype, and planted faults; build/equivalence"
	@echo "make lint         ruff and pyright"
	@echo "make format       let ruff rewrite what it can"
	@echo "make bench        decode and training speed"
	@echo "make install      everything the other targets need, into $(VENV)"
	@echo "make clean        remove caches and build output; keeps $(VENV), demo and runs"
	@echo "Variables: PYTHON=$(PYTHON) TORCH='$(TORCH)' CONSTRAINTS=$(CONSTRAINTS) WORKERS=$(WORKERS) CALIBRATION=$(CALIBRATION) ARGS='$(ARGS)'"

install: $(VENV)/installed-test

demo: $(VENV)/installed-oracle
	@$(BIN)/python scripts/demo.py

test: $(VENV)/installed-test
	@$(PYTEST) -m "not exhaustive" $(ARGS)

test-all: $(VENV)/installed-test
	@$(PYTEST) $(ARGS)

test-quick: $(VENV)/installed-test
	@$(PYTEST) -m "not slow and not exhaustive" $(ARGS)

equivalence: $(VENV)/installed-oracle $(CALIBRATION)
	@$(BIN)/python -m oracle equivalence --out build/equivalence $(if $(CALIBRATION),--calibration $(CALIBRATION))

ifneq ($(CALIBRATION),)
$(CALIBRATION): | $(VENV)/installed-oracle
	@mkdir -p $(dir $@)
	@$(BIN)/python -m oracle calibrate --quick --out $@
endif

lint: $(VENV)/installed-test
	@echo "ruff check"
	@$(BIN)/ruff check --quiet .
	@echo "ruff format --check"
	@$(BIN)/ruff format --check --quiet .
	@echo "pyright"
	@$(BIN)/pyright

format: $(VENV)/installed-test
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

bench: $(VENV)/installed-test
	@$(BIN)/python scripts/bench_decode.py
	@$(BIN)/python scripts/bench_train.py

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find jaxgpt torchref oracle scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian's python3 comes without ensurepip, which `venv` needs; then the outer pip fills the environment.
$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit("Python %d.%d is too old; jaxgpt needs 3.11 or newer: make PYTHON=python3.11" \
		% sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { $(PYTHON) -m venv --without-pip $(VENV) \
		&& $(PYTHON) -m pip --disable-pip-version-check --python $(BIN)/python install --quiet pip; }
	@touch $@

# torch comes first and without its dependencies, so that an index named in TORCH serves torch alone.
$(VENV)/installed-oracle: pyproject.toml $(CONSTRAINTS) | $(VENV)/made
	@echo "installing torch"
	@$(PIP) --no-deps $(TORCH)
	@echo "installing jaxgpt"
	@$(PIP) --editable '.[oracle]'
	@touch $@

$(VENV)/installed-test: $(VENV)/installed-oracle
	@echo "installing the test tools"
	@$(PIP) --editable '.[oracle,test]'
	@touch $@
