# Each of `make demo` and `make test` works on its own from a fresh clone. A second run needs no network.
#
# Settings: PYTHON (python3) makes the virtual environment, VENV (.venv) is its folder, TORCH (torch==2.13.0) is
# installed where it has no torch yet, WERROR=ON makes warnings errors in our C++ files.
VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= torch==2.13.0
WERROR ?= OFF

PY      := $(abspath $(VENV))/bin/python
LOGICAL := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
export PYTHON TORCH WERROR
export PATH := $(abspath $(VENV))/bin:$(PATH)
unexport PYTHONPATH

# Stamps carry a checksum of what they were made from: installing again happens when that changes, not before.
sum       = $(firstword $(shell cat $(1) | cksum))
INSTALLED := $(VENV)/.installed-$(call sum,pyproject.toml scripts/bootstrap scripts/fetch-onnxruntime-headers scripts/python-environment tests/oracles.txt tests/formats.txt)
LINTERS   := $(VENV)/.linters-$(call sum,pyproject.toml scripts/bootstrap)

BUILD   := build/python
VECTORS := build/vectors/.made
# What the C++ tests want to know: where ONNX Runtime is, and the exported losses with their numbers.
RUNTIME  = "$$($(PY) -m pykd.config --onnxruntime-library)"
FACTS    = PYKD_TEST_VECTORS=$(abspath build/vectors) PYKD_TEST_MERGED=$(abspath build/merged) \
           PYKD_ONNXRUNTIME_LIBRARY=$(RUNTIME)
OURS     = $(shell find cpp tests -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name '*.c')
CTEST   := ctest --output-on-failure --no-tests=error --parallel $(LOGICAL)

.DEFAULT_GOAL := help
.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

# ---- Environment and build --------------------------------------------------------------------
$(INSTALLED):
	scripts/bootstrap
	scripts/python-environment $(VENV) test,demo
	@rm -f $(VENV)/.installed-* && touch $@

# What scikit-build-core says to CMake: a tree that was removed, or made by hand, would otherwise be one without the
# extension, which stayed as it was.
AS_WHEEL = $(if $(wildcard $(BUILD)/CMakeCache.txt),,-G Ninja) -DSKBUILD=2 -DPYKD_PYTHON=ON -DPython_EXECUTABLE=$(PY) \
           -Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)"

# After the first time this is CMake alone: it compiles what changed, and puts it where the editable install looks.
.PHONY: build
build: $(INSTALLED) ## the libraries and the extension, in .venv; after an edit, what changed
	@mkdir -p build
	@cmake -S . -B $(BUILD) $(AS_WHEEL) $(OPTIONS) -DPYKD_WERROR=$(WERROR) >build/configure.log 2>&1 || { cat build/configure.log; exit 1; }
	@cmake --build $(BUILD)
	@cmake --install $(BUILD) --prefix "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/pykd" >build/install.log

# ---- Running ----------------------------------------------------------------------------------
.PHONY: demo
demo: OPTIONS += -DPYKD_EXAMPLES=ON
demo: build ## train teacher and students on the digits, in Python and C++, and check every number
	$(PY) -m pykd demo

.PHONY: readme
readme: tested-build $(VECTORS) ## renew what is generated: parts of README.md and docs/losses.md, the stubs of the losses
	$(PY) scripts/generate
	$(PY) scripts/readme

.PHONY: bench
bench: OPTIONS += -DPYKD_BENCHMARKS=ON
bench: build ## the side-by-side comparisons
	$(PY) -m benchmarks

.PHONY: gpu-check
gpu-check: ## on a machine with CUDA: everything that needs it (docs/gpu.md)
	scripts/gpu-check

# ---- Testing ----------------------------------------------------------------------------------
.PHONY: test
test: ## every test: C++, with sanitizers, Python, installed package, machines without pykd
	@scripts/timed "environment"         $(MAKE) --no-print-directory $(INSTALLED)
	@scripts/timed "build"               $(MAKE) --no-print-directory tested-build
	@scripts/timed "exported losses"     $(MAKE) --no-print-directory $(VECTORS)
	@scripts/timed "C++ tests"           $(MAKE) --no-print-directory ctest
	@scripts/timed "sanitized C++ tests" $(MAKE) --no-print-directory sanitizers
	@scripts/timed "Python tests"        $(PY) -m pytest -n $(LOGICAL) --dist worksteal

.PHONY: test-fast
test-fast: tested-build ## the inner loop: no slow tests, no exported losses, each loss in one case
	$(FACTS) $(CTEST) --test-dir $(BUILD) --label-exclude exports
	$(PY) -m pytest -n $(LOGICAL) --dist worksteal --fast

.PHONY: tested-build ctest sanitizers asan tsan
tested-build: OPTIONS += -DPYKD_TESTS=ON -DPYKD_EXAMPLES=ON -DPYKD_TEST_ONNXRUNTIME=$(RUNTIME)
tested-build: build

$(VECTORS): $(INSTALLED) $(shell find pykd export tests/make_vectors.py tests/make_merged.py -name '*.py' 2>/dev/null)
	$(PY) -m tests.make_vectors build/vectors
	$(PY) -m tests.make_merged build/merged
	@touch $@

ctest: tested-build $(VECTORS)
	$(FACTS) $(CTEST) --test-dir $(BUILD)

sanitizers: asan tsan
asan: $(VECTORS)
	cmake --preset asan -DPYKD_TEST_ONNXRUNTIME=$(RUNTIME) -DPYKD_WERROR=$(WERROR) >build/configure-asan.log 2>&1 || { cat build/configure-asan.log; exit 1; }
	cmake --build --preset asan
	$(FACTS) $(CTEST) --preset asan
tsan: $(VECTORS)
	cmake --preset tsan -DPYKD_TEST_ONNXRUNTIME=$(RUNTIME) -DPYKD_WERROR=$(WERROR) >build/configure-tsan.log 2>&1 || { cat build/configure-tsan.log; exit 1; }
	cmake --build --preset tsan
	$(FACTS) $(CTEST) --preset tsan

.PHONY: mutants
mutants: tested-build ## change one line at a time, and see a test fail (tests/mutants.toml)
	$(PY) scripts/mutants

# How long each target of `make fuzz` runs, and from which random numbers.
FUZZ_SECONDS ?= 600
FUZZ_SEED    ?= 1

.PHONY: fuzz
fuzz: $(VECTORS) ## mutants of files, metadata, kernel calls and recipes, with sanitizers; FUZZ_SECONDS=600 each
	cmake --preset asan -DPYKD_TEST_ONNXRUNTIME=$(RUNTIME) -DPYKD_WERROR=$(WERROR) >build/configure-asan.log 2>&1 || { cat build/configure-asan.log; exit 1; }
	cmake --build build/asan --target fuzz_onnx fuzz_metadata fuzz_kernels
	cd build && asan/cpp/fuzz/fuzz_onnx -seconds=$(FUZZ_SECONDS) -seed=$(FUZZ_SEED) vectors
	cd build && asan/cpp/fuzz/fuzz_metadata -seconds=$(FUZZ_SECONDS) -seed=$(FUZZ_SEED)
	cd build && asan/cpp/fuzz/fuzz_kernels -seconds=$(FUZZ_SECONDS) -seed=$(FUZZ_SEED)
	PYKD_FUZZ_SECONDS=$(FUZZ_SECONDS) $(PY) -m pytest -q tests/test_fuzz.py

# ---- Form -------------------------------------------------------------------------------------
$(LINTERS): $(INSTALLED)
	scripts/bootstrap --lint
	$(PY) -m pip install -q "ruff" "mypy"
	@rm -f $(VENV)/.linters-* && touch $@

.PHONY: lint
lint: OPTIONS += -DPYKD_BENCHMARKS=ON
lint: $(LINTERS) tested-build ## form and types: ruff, mypy, clang-format, clang-tidy
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $(OURS)
	@# Of Highway's instruction sets the linter reads one: the code is the same.
	run-clang-tidy -quiet -p $(BUILD) -extra-arg=-DHWY_COMPILE_ONLY_STATIC "$(CURDIR)/cpp/.*[.]c(pp)?$$"

.PHONY: format
format: $(LINTERS) ## rewrite our files in the common form
	ruff check --fix .
	ruff format .
	clang-format -i $(OURS)

.PHONY: clean
clean: ## remove what was built; .venv and .cache stay
	rm -rf build dist
