# make demo    the main job in miniature: install, train a nano model, talk to it (about two minutes after installing)
# make test    the whole test suite
# make lint    ruff and mypy
# make soak    kill -9 at 200 random moments and at every write of a save, 100,000 odd requests (over an hour)
PYTHON ?= python3
BIN := .venv/bin
GPU := $(shell command -v nvidia-smi)
# Named alone and first: a range would take a newer build, with gigabytes of CUDA packages on a machine without a GPU.
TORCH := torch==2.13.0
comma := ,
EXTRAS := dev$(if $(GPU),$(comma)gpu)

.PHONY: demo test test-fast lint bench soak clean

demo: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo.sh

test: .venv/installed
	$(BIN)/python -m pytest -q -n logical --dist loadfile -m "not alone"
	$(BIN)/python -m pytest -q -m alone

test-fast: .venv/installed
	$(BIN)/python -m pytest -q -m "not slow"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/comm.py
	$(BIN)/python benchmarks/scaling.py
	@echo "with data of your own: benchmarks/data.py and benchmarks/packing.py, see their --help"

soak: .venv/installed
	$(BIN)/python benchmarks/crash.py --trials 200
	BAICHUAN_SFT_SOAK=1 $(BIN)/python -m pytest -q tests/test_saving.py tests/test_server_fuzz.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH) -e ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf .venv out build *.egg-info
