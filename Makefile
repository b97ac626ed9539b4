# Everything runs in .venv. Whatever needs it makes it first; `make` alone lists the targets.

PYTHON ?= python3
BIN := .venv/bin
# Pages are written to runs/, which git ignores; with PUBLISH=1 the committed ones are renewed.
PUBLISHED := $(if $(PUBLISH),--publish)
# loadgroup: tests that share something costly to build name a group and run in one process.
TESTS := -n auto --maxprocesses 8 --dist loadgroup

.PHONY: help setup environment demo compare results proofs test test-slow test-newest test-oldest lint \
	bench bench-peers targets kernels gpu-check clean

help:
	@echo "Each of these makes .venv first if it is missing or incomplete."
	@echo "make demo       run examples/demo.py"
	@echo "make test       the fast tests, in parallel"
	@echo "make test-slow  all tests, with many more examples a property"
	@echo "make test-newest, make test-oldest  the fast tests with the newest and with the oldest supported"
	@echo "                versions of all libraries, in .venv-newest and .venv-oldest (several GB each)"
	@echo "make lint       ruff and mypy"
	@echo "make compare    train all blocks at one size on real text, and compare them: half an hour"
	@echo "make results    what the layers remember; hours of one core, and continues where it stopped"
	@echo "make bench      every layer and operation: forward, forward with backward, decode"
	@echo "make bench-peers  installs other libraries from PyPI; a table that compares them with ours"
	@echo "make targets    what the CPU path must reach, measured: half an hour"
	@echo "make kernels    tables about the kernels' machine code, and the baseline of their hot loops"
	@echo "make gpu-check  on a GPU: the kernels' tests, then a table of milliseconds beside other libraries"
	@echo "make setup      bring .venv (the library, editable, and all development tools) up to date"
	@echo "make clean      remove the virtual environments, builds and caches"
	@echo ""
	@echo "PYTHON=/path/to/python  make .venv from that interpreter; a torch it has is used, not replaced"
	@echo "PUBLISH=1               renew the committed page (docs/, reports/) instead of writing to runs/"

ENVIRONMENT = PYTHON_GIVEN='$(filter command,$(origin PYTHON))' \
	.ci/environment .venv '$(PYTHON)' $(1) constraints.txt

setup:
	@$(call ENVIRONMENT,update)
	@echo "Ready: make demo, make test. The same with uv:"
	@echo "  uv venv .venv && uv pip install -c constraints.txt -e '.[dev]'"

environment:
	@$(call ENVIRONMENT,needed)

demo: environment
	$(BIN)/python examples/demo.py $(PUBLISHED)

compare: environment
	$(BIN)/python examples/compare.py $(PUBLISHED)

# What was measured before is kept, and what is missing is measured. `proofs` is its old name.
proofs: results
results: environment
	$(BIN)/python -m benchmarks.memory.results $(PUBLISHED)

test: environment
	$(BIN)/pytest $(TESTS) -m "not slow"

test-slow: environment
	$(BIN)/pytest $(TESTS) --hypothesis-profile slow

# What a plain `pip install` brings today. An environment that is there is upgraded.
test-newest:
	@.ci/environment .venv-newest '$(PYTHON)' update '' --upgrade --upgrade-strategy eager
	.venv-newest/bin/pytest $(TESTS) -m "not slow"

# constraints-oldest.txt has the lower bounds of pyproject.toml. Python 3.10 is the oldest.
OLDEST_PYTHON ?= $(or $(shell python3.10 -c 'import sys; print(sys.executable)' 2> /dev/null),$(PYTHON))
test-oldest:
	@.ci/environment .venv-oldest '$(OLDEST_PYTHON)' update constraints-oldest.txt
	.venv-oldest/bin/pytest $(TESTS) -m "not slow"

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: environment
	$(BIN)/pytest benchmarks --benchmark-only

bench-peers: environment
	$(BIN)/python -m pip install -c .venv/constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.speed.peers_table $(PUBLISHED)

targets: environment
	$(BIN)/python -m benchmarks.speed.targets $(PUBLISHED)

kernels: environment
	$(BIN)/python -m benchmarks.kernels.table $(PUBLISHED)

# Without a GPU the tests run on a stand-in, and then it ends with an error: nothing to measure.
gpu-check: environment
	$(BIN)/pytest tests/kernels/test_gpu.py -rs
	$(BIN)/python -c "import longctx_layers; raise SystemExit(not longctx_layers.selfcheck())"
	$(BIN)/python -m benchmarks.speed.gpu_table $(PUBLISHED)

clean:
	rm -rf .venv .venv-newest .venv-oldest build dist *.egg-info
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
