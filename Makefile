# Everything runs in .venv, which `make setup` makes; `make` alone lists the targets.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo compare proofs test test-slow lint bench bench-peers kernels gpu-check clean

help:
	@echo "make setup      make .venv with the library (editable) and all development tools"
	@echo "                PYTHON=/path/to/python: from that interpreter; a torch it has is used, not replaced"
	@echo "make demo       run examples/demo.py"
	@echo "make compare    train all blocks at one size on real text, and compare them: half an hour"
	@echo "make proofs     docs/results.md: what the layers remember; hours of one core, and goes on where it stopped"
	@echo "make test       the fast tests, in parallel"
	@echo "make test-slow  all tests, with many more examples a property"
	@echo "make lint       ruff and mypy"
	@echo "make bench      every layer and operation: forward, forward with backward, decode"
	@echo "make bench-peers  installs other libraries from PyPI; a table of them beside ours in reports/bench"
	@echo "make kernels    docs/kernels.md and the baseline of the kernels' hot loops, written anew"
	@echo "make gpu-check  on a GPU: the kernels' tests, then a table of milliseconds beside other libraries"
	@echo "make clean      remove .venv, builds and caches"

# .venv is made once, from $(PYTHON); a later `make setup` brings it up to date. A torch that $(PYTHON)
# has becomes visible in .venv through host.pth. That works for a system's interpreter, for conda's and
# for one in a virtual environment (--system-site-packages does not, there), and pip never writes to them.
SITE = import sysconfig; print(sysconfig.get_path("purelib"))
HOST = import sys, importlib.util as u; t = u.find_spec("torch"); \
	print(*(p + "\n" for p in sys.path if t and p.endswith("-packages")), sep="", end="")
VERSION = import importlib.metadata as m; print(m.version("torch"))

ifneq ($(and $(wildcard $(BIN)/python),$(filter command,$(origin PYTHON))),)
setup:
	@echo ".venv is here already: to make it from $(PYTHON), run 'make clean' first." >&2; exit 1
else
setup: $(BIN)/python
	@# With a host's torch the lock pins that one, and not Triton, which belongs to it. The tools are
	@# .venv's own whatever the host has.
	@set -e; lock=.venv/constraints.txt; cp constraints.txt $$lock; \
	if [ -s .venv/host.pth ]; then \
		torch=$$($(BIN)/python -c '$(VERSION)'); sed -E '/^(torch|triton)==/d' constraints.txt > $$lock; \
		echo "torch $$torch is there already: .venv uses it, and it stays as it is."; \
		$(BIN)/python -m pip install --no-deps --force-reinstall -r $$lock; \
		echo "torch==$$torch" >> $$lock; \
	fi
	$(BIN)/python -m pip install -c .venv/constraints.txt -e '.[dev]'
	@echo "Ready: make demo, make test. The same with uv:"
	@echo "  uv venv .venv && uv pip install -c constraints.txt -e '.[dev]'"
endif

$(BIN)/python:
	$(PYTHON) -m venv .venv
	$(PYTHON) -c '$(HOST)' > .venv/host.pth
	cp .venv/host.pth "$$($(BIN)/python -c '$(SITE)')"

$(BIN)/pytest:
	@echo "There is no .venv yet: run 'make setup' first." >&2; exit 1

demo: $(BIN)/pytest
	$(BIN)/python examples/demo.py

compare: $(BIN)/pytest
	$(BIN)/python examples/compare.py

# What was measured before is kept, and what is missing is measured.
proofs: $(BIN)/pytest
	$(BIN)/python examples/proofs.py

# loadgroup: tests that share something costly to build name a group and run in one process.
test: $(BIN)/pytest
	$(BIN)/pytest -m "not slow" -n auto --maxprocesses 8 --dist loadgroup

test-slow: $(BIN)/pytest
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadgroup --hypothesis-profile slow

lint: $(BIN)/pytest
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(BIN)/pytest
	$(BIN)/pytest benchmarks --benchmark-only

bench-peers: $(BIN)/pytest
	$(BIN)/python -m pip install -c .venv/constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/peers_table.py

kernels: $(BIN)/pytest
	$(BIN)/python tests/kernels/table.py

# Without a GPU the tests run on a stand-in, and then it ends with an error: nothing to measure.
gpu-check: $(BIN)/pytest
	$(BIN)/pytest tests/kernels/test_gpu.py -rs
	$(BIN)/python -c "import longctx_layers; raise SystemExit(not longctx_layers.selfcheck())"
	$(BIN)/python benchmarks/gpu_table.py

clean:
	rm -rf .venv build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
