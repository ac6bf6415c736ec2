# make demo   classify the example photographs with the embedded bundle (thin install, no torch)
# make test   run all tests but gpu, network and full ones
# make check  format, lint, types, layers
# make help   the rest
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BASE := $(VENV)/.edgeclip-base
DEV := $(VENV)/.edgeclip-dev
LINT := build/lint

# The first name of each photograph (edgeclip/assets/photos/photos.toml), and some that are in none of them.
DEMO_LABELS := baseball,bison,castle,cat,chicken,coffee,crab,dog,frying pan,jaguar,koala,lemur,panda,parrot,red panda,sheep,bicycle,car,guitar,teapot

.PHONY: help demo install dev fmt check layers test test-fast test-gpu test-lowest bench-smoke clean
help:
	@sed -n 's/^# \(make [a-z-]*  *.*\)/\1/p' Makefile

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "edgeclip needs Python 3.10 or newer as '$(PYTHON)': install python3 (Debian, Ubuntu: apt install python3 python3-venv), or say make PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "edgeclip needs Python 3.10 or newer, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1): install a newer one, or say make PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "'$(PYTHON)' cannot make virtual environments: install python3-venv (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(BASE): $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing the thin runtime into $(VENV) (numpy, onnxruntime, pillow, click …; no torch)"
	$(PIP) -e .
	@touch $@

$(DEV): $(BASE) pyproject.toml constraints.txt
	@echo "Installing torch (CPU), onnx, OpenVINO, TensorRT-RTX and the test tools into $(VENV)"
	$(PIP) -e ".[dev,export,train,peers,openvino,rtx]"
	$(PIP) --no-deps torchvision open-clip-torch timm
	@touch $@

# make install  the thin runtime into .venv
install: $(BASE)
# make dev  everything the tests and the build scripts need into .venv
dev: $(DEV)

demo: $(BASE)
	$(BIN)/edgeclip classify edgeclip/assets/photos --labels "$(DEMO_LABELS)" --top-k 2 --timing

# make fmt  format the code and repair what ruff can repair
fmt: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: $(DEV) layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# make layers  the direction of imports, on the installed wheel: the path mapping hides edgeclip -> export in the tree
layers: $(DEV)
	@rm -rf $(LINT) && mkdir -p $(LINT)
	$(PIP) --no-deps --no-build-isolation --target $(LINT)/site .
	cd $(LINT) && PYTHONPATH=site ../../$(BIN)/lint-imports --no-cache --config ../../.importlinter

test: $(DEV)
	$(BIN)/pytest
# make test-fast  the tests without the slow ones
test-fast: $(DEV)
	$(BIN)/pytest -m "not slow and not gpu and not network and not full"

# make test-lowest  the tests of the thin runtime with the oldest versions of its dependencies
test-lowest: $(DEV)
	@rm -rf build/lowest && mkdir -p build && $(PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install --quiet --disable-pip-version-check tomli
	build/lowest/bin/python tests/tools/lowest.py > build/lowest.txt
	build/lowest/bin/python -m pip install --quiet --disable-pip-version-check -c build/lowest.txt -e . \
	    pytest hypothesis jsonschema psutil scipy onnx
	build/lowest/bin/pytest -m "not slow and not gpu and not network and not full"

# make test-gpu  the tests that need an NVIDIA GPU and TensorRT
test-gpu: $(DEV)
	$(BIN)/pytest -m gpu

# make clean  remove .venv and what builds leave behind
clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
