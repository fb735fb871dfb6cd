# make demo     install and run the whole job on rendered images
# make test     install and run the tests
# make check    ruff and mypy
# make bench    the demo, then training with its loader over the same step on resident data
# make gpu-check   what the GPU of this machine does, and how fast (docs/gpu.md)
# make shards SRC=... OUT=...   images to WebDataset shards
VENV ?= .venv
PYTHON ?= python3.11
BIN := $(VENV)/bin
TORCH := torch==2.14.1 torchvision==0.29.1
# FAISS comes for CPU or GPU; a driver that answers decides.
EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
SHARDS_FLAGS ?=
GPU_CHECK_FLAGS ?=

.PHONY: install demo shards test check bench gpu-check clean

install: $(VENV)/.installed-$(EXTRA)

$(VENV)/.installed-$(EXTRA): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e '.[dev,$(EXTRA)]' $(TORCH)
	touch $@

demo: install
	$(BIN)/bowstore demo --out demo

shards: install
	@test -n "$(SRC)" -a -n "$(OUT)" || { echo "usage: make shards SRC=folder OUT=folder" >&2; exit 2; }
	$(BIN)/python tools/make_shards.py "$(SRC)" "$(OUT)" $(SHARDS_FLAGS)

# Most tests keep one core busy, so each core gets a process of them; processes take memory, 2 GB each.
test: install
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: demo
	$(BIN)/bowstore bench train --config configs/demo_bownet.yaml --set shards=demo/shards/train --store demo/seed-0/words.zarr

gpu-check: install
	$(BIN)/python tools/gpu_check.py --out gpu-check $(GPU_CHECK_FLAGS)

clean:
	rm -rf $(VENV) demo .mypy_cache .ruff_cache .pytest_cache
