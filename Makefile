# Two commands matter: `make demo` and `make test`. Each sets up everything it needs, from nothing.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.14.1 torchvision==0.29.1
BUILD  ?= auto

PY := $(VENV)/bin/python
NATIVE_SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-pure lint format bench build sanitize clean help

help:
	@echo "make demo    adapt real pretrained networks on real images and texts (about nine minutes)"
	@echo "make test    the test suite"
	@echo "make lint    ruff and mypy       make format   ruff format"
	@echo "make bench   kernel benchmarks   make build    rebuild the native kernels"

# The environment: torch, the package with every extra that tests and demos use, native kernels built in place.
$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH) numpy setuptools wheel ninja pybind11
	@touch $@

$(VENV)/built.stamp: $(VENV)/torch.stamp $(NATIVE_SOURCES)
	PATH="$(abspath $(VENV))/bin:$$PATH" CTKERNELS_BUILD=$(BUILD) $(PY) -m pip install --quiet --disable-pip-version-check \
	    --no-build-isolation --editable ".[test,lint,recipes,jola,robust,search,report]"
	@touch $@

$(VENV)/demo.stamp: $(VENV)/built.stamp requirements-demo.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-demo.txt
	@touch $@

build: $(VENV)/built.stamp

demo: $(VENV)/demo.stamp
	$(PY) examples/demo_steering.py $(DEMO_ARGS)
	$(PY) examples/demo_jola.py $(DEMO_ARGS)

# The native kernels have to be there: a test run that skipped them would prove little.
test: $(VENV)/built.stamp
	CTKERNELS_TEST_REQUIRE=cpu $(PY) -m pytest $(PYTEST_ARGS)

# The same tests without native kernels, Triton, or any optional package.
test-pure:
	$(MAKE) VENV=.venv-pure TORCH="torch==2.13.0" BUILD=none pure-suite

pure-suite: $(VENV)/torch.stamp
	CTKERNELS_BUILD=none $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[test]"
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(VENV)/built.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/built.stamp
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(VENV)/built.stamp
	$(PY) -m benchmarks $(BENCH_ARGS)

clean:
	rm -rf $(VENV) .venv-pure build dist *.egg-info ctkernels/*.so out
