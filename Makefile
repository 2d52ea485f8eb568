# Every target works from a bare clone: it makes .venv and installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# sam2's optional CUDA extension serves mask post-processing only; nothing here calls it.
export SAM2_BUILD_CUDA = 0

.PHONY: demo test test-all test-minimum lint docs bench report cov clean

demo: $(READY)
	$(BIN)/sward demo

# Two processes of one thread each: on two cores in half the time.
test: export OMP_NUM_THREADS ?= 1
test: $(READY)
	$(BIN)/python -m pytest tests/ -n 2 --dist loadfile

test-all: $(READY)
	$(BIN)/python -m pytest tests/ -m "slow or not slow"

# The oldest versions that pyproject.toml allows, in an environment of their own; tests of what touches other packages most.
MINIMUM := .venv-minimum
test-minimum: export OMP_NUM_THREADS ?= 1
test-minimum: $(MINIMUM)/.ready
	$(MINIMUM)/bin/python -m pytest tests/runs tests/models tests/data tests/training/test_checkpoints.py tests/losses/test_objective.py

$(MINIMUM)/.ready: pyproject.toml tests/support/oldest_versions.py
	test -x $(MINIMUM)/bin/python || $(PYTHON) -m venv $(MINIMUM)
	$(MINIMUM)/bin/python tests/support/oldest_versions.py > $(MINIMUM)/constraints.txt
	$(MINIMUM)/bin/python -m pip install --disable-pip-version-check -q -c $(MINIMUM)/constraints.txt -e ".[all]"
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site in site/; a broken link or an unknown name is an error. Needs no network.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# More options of pytest-benchmark: make bench OPTIONS=--benchmark-compare
bench: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=min,median,iqr,rounds $(OPTIONS)

report: $(READY)
	$(BIN)/python -m sward_kernels.report --output benchmarks/results

cov: $(READY)
	$(BIN)/coverage run --source=sward,sward_kernels -m pytest tests/
	$(BIN)/coverage report --skip-covered

# pip is left as venv brings it: newer ones build sam2 in an environment with a second, larger torch.
$(READY): setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[all]"
	touch $@

clean:
	rm -rf $(VENV) $(MINIMUM)
