# make demo   set up, then train a sharded mixture of experts on real text on 8 fake CPU devices
# make test   set up, then run the tests; make test-fast leaves the slow ones out; make sweep runs the cells that it leaves out
# make battery   the invariance battery alone: one answer to a train step on every mesh, schedule and dispatcher
# A second run reuses the set-up. PYTHON=python3.12 chooses another interpreter (3.11 or newer).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Each process has 8 fake devices of its own and needs about 5 GB.
PYTEST := $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.3

.PHONY: demo test test-fast battery sweep lint smoke clean

demo: $(VENV)/.run-ready
	$(BIN)/moe-jax train tiny_switch

test: $(VENV)/.dev-ready lint
	$(PYTEST)
	$(MAKE) --no-print-directory smoke

test-fast: $(VENV)/.dev-ready lint
	$(PYTEST) -m 'not slow'

sweep: $(VENV)/.dev-ready
	$(PYTEST) -m sweep

battery: $(VENV)/.dev-ready
	$(PYTEST) tests/test_invariance.py

lint: $(VENV)/.dev-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check moe_jax

# The other supported Python, where the machine has one: it installs, imports, trains a few steps and generates.
smoke:
	@tools/smoke_python312.sh

$(VENV)/.run-ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "moe-jax needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev-ready: $(VENV)/.run-ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .cache
