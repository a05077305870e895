# All that a developer needs: `make test`, `make demo`. See `make help`.
#
# torch comes first and by itself, so that nothing below can pull another build of it. Its CPU build
# is enough for the tests and the demo; on a machine whose pip would fetch the CUDA build for that
# version, TORCH_FLAGS='--index-url https://download.pytorch.org/whl/cpu'. With a GPU: TORCH=torch.
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests run side by side in as many processes.
JOBS ?= 2

# The name holds what cannot be seen in a file's age: another torch, a checkout that was moved.
KEY := $(shell printf '%s' '$(TORCH) $(CURDIR)' | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.stamp-$(KEY)
# Stands while pip runs. Found at the start, it means that pip was killed and may have left half a
# package: start over. An error that pip reports itself (no network) leaves nothing half-done.
UNFINISHED := $(VENV)/.unfinished
INSTALL := $(BIN)/python -m pip -qq install
ON_ERROR := { rc=$$?; [ $$rc -gt 128 ] || rm -f $(UNFINISHED); exit $$rc; }

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)
unexport OMP_NUM_THREADS PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help setup test test-kill test-long test-triton lint demo clean

help:
	@echo 'make test    ruff, then the tests, $(JOBS) at a time (JOBS=...)'
	@echo 'make test-long   the proofs that take minutes'
	@echo 'make demo    trains, samples, compares, and writes a report (ARGS="..." is passed on)'
	@echo 'make test-kill   fifty kill -9 of training runs (KILLS=...), and the bits compared'
	@echo 'make test-triton   the kernel tests on another Triton (TRITON=$(TRITON))'
	@echo 'make lint    ruff alone'
	@echo 'make setup   only the installation into $(VENV), which the others do by themselves'
	@echo 'make clean   removes caches and build results; keeps $(VENV) and runs/'
	@echo
	@echo 'TORCH=$(TORCH)   PYTHON=$(PYTHON)'

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py Makefile $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo 'Python 3.10 or newer is needed: make PYTHON=python3.11 ...' >&2; exit 1; }
	@if [ -e $(UNFINISHED) ]; then echo 'set-up was cut off, starting again'; rm -rf $(VENV); fi
	@rm -f $(VENV)/.stamp-*
	@[ -x $(BIN)/python ] || echo '[1/3] virtual environment'
	@mkdir -p $(VENV) && touch $(UNFINISHED)
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || $(ON_ERROR)
	@echo '[2/3] $(TORCH)'
	@$(INSTALL) $(TORCH_FLAGS) '$(TORCH)' || $(ON_ERROR)
	@echo '[3/3] mixflow_fast and what its tests need (a minute or two the first time)'
	@$(INSTALL) setuptools wheel ninja || $(ON_ERROR)
	@$(INSTALL) --editable '.[dev]' --no-build-isolation || $(ON_ERROR)
	@rm -f $(UNFINISHED)
	@touch $@

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

test: lint
	$(BIN)/python -m pytest -q --durations=10 -n $(JOBS) --dist worksteal

# What takes minutes: every configuration of a proof of which `make test` runs a few.
test-long: $(STAMP)
	$(BIN)/python -m pytest -q --durations=10 --long -m long

# Ten minutes on two free cores; `make test` does three kills.
KILLS ?= 50
test-kill: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.kill_harness --kills $(KILLS)

# The kernels on the oldest Triton they run on, in an environment of its own. Its interpreter takes
# no numpy from 2.4 on.
TRITON ?= triton==3.6.0
TRITON_VENV := .venv-$(subst =,,$(TRITON))
KERNEL_TESTS := tests/kernels tests/benchmarks/test_compile_report.py

$(TRITON_VENV)/.stamp-$(KEY):
	$(PYTHON) -m venv --clear $(TRITON_VENV)
	$(TRITON_VENV)/bin/python -m pip -qq install $(TORCH_FLAGS) '$(TORCH)'
	$(TRITON_VENV)/bin/python -m pip -qq install '$(TRITON)' 'numpy<2.4' pytest pyyaml tqdm \
	    safetensors pillow
	@touch $@

test-triton: $(TRITON_VENV)/.stamp-$(KEY)
	$(TRITON_VENV)/bin/python -m pytest -q $(KERNEL_TESTS)

demo: $(STAMP)
	$(BIN)/mixflow-fast demo $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
