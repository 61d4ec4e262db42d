# The commands of this project. `make demo` builds, installs and runs the main job; `make test` runs what CI runs.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Build caches live outside the clone, so that a fresh clone (and the next CI run) reuses them.
export CARGO_TARGET_DIR ?= $(HOME)/.cache/heliostat/target
# Cargo must not pick another interpreter than the one that the module is for.
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
PYTEST := $(BIN)/python -X faulthandler -m pytest
CRATES := $(wildcard crates/*/Cargo.toml)

.DEFAULT_GOAL := help
.PHONY: help demo build test test-all test-rust test-python test-loom lint format stubs bench bench-quick wheel clean toolchain

help:
	@echo "make demo      build in release mode, install into .venv, run the main job"
	@echo "make test      everything that CI runs"
	@echo "make test-all  the slow suites too"
	@echo "make lint      rustfmt, clippy, ruff, mypy"
	@echo "make bench     the benchmarks (ARGS='--peer PYTHON' to compare)"
	@echo "make wheel     a wheel under dist/ that works without the source tree"
	@echo "make clean     removes .venv and what builds left in the tree"

toolchain:
	@PYTHON="$(PYTHON)" bash tools/check_toolchain.sh

$(BIN)/python: | toolchain
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.requirements: pyproject.toml tools/requirements.txt | $(BIN)/python
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tools/requirements.txt
	@touch $@

# Cargo itself knows what is up to date, so this always runs.
build: toolchain $(VENV)/.requirements
	@$(BIN)/maturin develop --release --quiet

demo: build
	@$(BIN)/python examples/inverted_index.py

test: lint test-rust build stubs
	@$(MAKE) --no-print-directory test-python MARK="not slow"

test-all: lint test-rust test-loom build stubs
	@$(MAKE) --no-print-directory test-python MARK="slow or not slow"

test-rust: toolchain $(VENV)/.requirements
	cargo test --workspace --exclude ray-py --locked

# The lock-free parts under loom. Each crate that has such tests names them loom_*.
test-loom: toolchain
	RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR="$(CARGO_TARGET_DIR)/loom" \
	cargo test --release --locked -p ray-rpc -p ray-store --test 'loom_*'

test-python:
	@$(PYTEST) -m "$(or $(MARK),not slow)" $(ARGS)

lint: toolchain $(VENV)/.requirements
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	$(BIN)/ruff check python tests benchmarks examples tools
	$(BIN)/ruff format --check python tests benchmarks examples tools
	$(BIN)/mypy

format: $(VENV)/.requirements
	cargo fmt --all
	$(BIN)/ruff check --fix python tests benchmarks examples tools
	$(BIN)/ruff format python tests benchmarks examples tools

stubs: build
	@$(BIN)/python tools/check_stubs.py

bench: build
	@$(BIN)/python -m benchmarks $(ARGS)

# What calls cost the driver against benchmarks/quick.json, with what was built last.
bench-quick: $(VENV)/.requirements
	@$(BIN)/python -m benchmarks.quick $(ARGS)

wheel: toolchain $(VENV)/.requirements
	@$(BIN)/maturin build --release --out dist

clean:
	rm -rf $(VENV) dist build python/ray/*.so .pytest_cache .ruff_cache .mypy_cache
