# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: bench bench-all test fuzz mutants lint tables docs wheel wheel-check release-check targets gpu-check build clean

# The main job: benchmarks and a short training on real text.
bench: build
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.layers
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.models --case llama
	$(BIN)/python examples/train_lm.py --steps 80

# The same with more shapes, torch.compile for all of them, and all models: about ten minutes on two cores.
bench-all: build
	$(BIN)/python -m benchmarks --full
	$(BIN)/python -m benchmarks.layers --full
	$(BIN)/python -m benchmarks.sweep --compile
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.convert --out out/benchmarks
	$(BIN)/python examples/train_lm.py

test: export TORCH_CUDA_ARCH_LIST ?= 9.0
test: build
	$(BIN)/python -m pytest -q -n 2 --durations=5 $(PYTEST_ARGS)

# torch comes first and by itself: asked for as a range it may bring another build than the one pinned here.
$(VENV)/ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "setuptools>=77" wheel ninja "$(TORCH)"
	CKPT_KERNELS_BUILD=none $(BIN)/pip install -q --no-build-isolation -e ".[triton,test,bench,docs,wheel,lint]"
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
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# Random calls for FUZZ_SECONDS, on a build of the CPU library that stops at the first bad access or undefined operation;
# then, as long, random programs, converted and not.
FUZZ_SECONDS ?= 600
fuzz: build
	CKPT_KERNELS_BUILD=cpu CKPT_KERNELS_SANITIZE=1 PATH="$(abspath $(BIN)):$$PATH" \
		$(BIN)/python setup.py -q build --build-base build/sanitized --build-lib build/sanitized/lib >build.log 2>&1 \
		|| { cat build.log; exit 1; }
	rm -rf build/sanitized/lib/tests && cp -r tests build/sanitized/lib/
	cd build/sanitized/lib && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		$(abspath $(BIN))/python -m tests.fuzz --seconds $(FUZZ_SECONDS)
	$(BIN)/python -m tests.programs --seconds $(FUZZ_SECONDS)

# Small faults, put into a copy of the sources one at a time, that the tests are to notice; MUTANTS=--list names them.
mutants: build
	$(BIN)/python -m tests.mutants $(MUTANTS)

# The tables of blocks in README.md and docs/floors.md, from the catalogue.
tables: build
	$(BIN)/python -m benchmarks.tables

# Into out/docs; a warning is an error.
docs: build
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs out/docs

# An sdist and one wheel in dist/; CKPT_KERNELS_VERSION_SUFFIX=+local gives both a local version.
wheel: $(VENV)/ready
	PATH="$(abspath $(BIN)):$$PATH" bash packaging/build_wheel.sh

# Tries the wheel of dist/ in a fresh environment: make wheel-check PYTHON=python3.12 TORCH=torch==2.11.0
wheel-check:
	bash packaging/check_wheel.sh $(PYTHON) $(TORCH)

# All that a release is held to, from an sdist and a wheel that are built anew; CHECKS="version places" for some alone.
release-check: wheel
	TORCH="$(TORCH)" PYTHON="$(PYTHON)" $(BIN)/python packaging/release_check.py $(CHECKS)

# The C++ sources for Linux, macOS and Windows by clang, which is a package of 100 MB.
targets: $(VENV)/ready
	test -d build/ziglang || $(BIN)/pip install -q --no-deps --target build/ziglang ziglang==0.17.1
	PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH=build/ziglang bash packaging/check_targets.sh

# On a machine with a GPU and no network: its own python, torch and nvcc.
gpu-check:
	bash benchmarks/gpu_check.sh $(PYTHON)

clean:
	rm -rf $(VENV) build dist build.log *.egg-info ckpt_kernels/*.so out
