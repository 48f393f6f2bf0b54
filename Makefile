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

TEST := samples/test
# A small network: enough steps for a visible gain fit into two minutes on two cores of any kind.
demo: $(STAMP)  ## adapt a model to one camera, and show the gain on two photographs with ground truth
	$(PDD) fetch-weights realesr-animevideo
	$(PDD) adapt --real-dir samples/train --base realesr-animevideo --features efficientnet-lite0 --minutes 2 \
	  --set crop=32 --set losses.adversarial=0.3 --name demo --runs-dir $(DEMO)/runs --overwrite
	$(PDD) upscale $(TEST)/lr $(DEMO)/base --weights realesr-animevideo --scale 2 --format png
	$(PDD) upscale $(TEST)/lr $(DEMO)/adapted --weights demo --scale 2 --format png
	$(PDD) evaluate $(DEMO)/adapted --baseline $(DEMO)/base --gt-dir $(TEST)/hr --lr-dir $(TEST)/lr \
	  --metrics psnr,ssim --output $(DEMO)/demo.html
	@echo
	@echo "Before and after, with sliders: $(CURDIR)/$(DEMO)/demo.html"

# Two at once, a thread each: most tests wait for programs that they start.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

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
