PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STAMP_TEST := $(VENV)/.installed-test

.PHONY: install demo test test-fast check clean
install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(STAMP_TEST): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test,openvino]'
	touch $@ $(STAMP)

DEMO := demo
PDD := PDD_HOME=$(DEMO)/home $(BIN)/pdd

demo: $(STAMP)  ## from nothing to an adapted model, an upscaled folder and its scores
	$(PDD) fetch-weights realesrgan
	$(PDD) adapt --real-dir samples --config configs/quick.yaml --features efficientnet-lite0 --name demo \
	  --runs-dir $(DEMO)/runs --steps 20 --overwrite
	$(PDD) upscale samples $(DEMO)/upscaled --weights demo --overwrite
	$(PDD) evaluate $(DEMO)/upscaled --metrics niqe --output $(DEMO)/scores.csv
	@echo
	@echo "Look at:"
	@ls $(DEMO)/runs/demo/report.html $(DEMO)/upscaled/*.jpg $(DEMO)/scores.csv $(DEMO)/home/weights/demo.safetensors

# Two at once, a thread each: most tests wait for programs that they start.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(STAMP_TEST)  ## the whole suite
	$(PYTEST)

test-fast: $(STAMP_TEST)  ## the tests that take a second or so each
	$(PYTEST) -m 'not slow'

check: $(STAMP_TEST)  ## style, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf $(VENV) demo
