# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: bench test lint wheel gpu-check build clean

# The main job: benchmarks and a short training on real text.
bench: build
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.layers
	$(BIN)/python examples/train_lm.py

test: export TORCH_CUDA_ARCH_LIST ?= 9.0
test: build
	$(BIN)/python -m pytest -q -n 2 --durations=5 $(PYTEST_ARGS)

# torch comes first and by itself: asked for as a range it may bring another build than the one pinned here.
$(VENV)/ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "setuptools>=77" wheel ninja "$(TORCH)"
	CKPT_KERNELS_BUILD=none $(BIN)/pip install -q --no-build-isolation -e ".[triton,test,bench,lint]" build
	touch $@

# ninja sees to it that only what has changed is compiled.
build: export TORCH_CUDA_ARCH_LIST ?= $(shell $(BIN)/python -c "import torch; print('' if torch.cuda.is_available() else '9.0')" 2>/dev/null)
build: $(VENV)/ready
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py -q build_ext --inplace >build.log 2>&1 \
		|| { cat build.log; exit 1; }
	@grep -i "going on without" build.log || true

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# The wheel is built from the sdist, which proves that the sdist is complete.
wheel: $(VENV)/ready
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m build --no-isolation --outdir dist .

# On a machine with a GPU and no network: its own python, torch and nvcc.
gpu-check:
	bash benchmarks/gpu_check.sh $(PYTHON)

clean:
	rm -rf $(VENV) build dist build.log *.egg-info ckpt_kernels/*.so out
