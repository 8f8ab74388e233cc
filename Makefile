# make demo | test | test-integration | fuzz | lint | format | check-cuda | sanitize | gpu | clean
#
# TORCH   the torch that the virtual environment gets, as pip names it: make demo TORCH='torch==2.11.0'
# PYTHON  an interpreter that has torch already, used as it is, without a virtual environment: make demo PYTHON=python
SHELL := /bin/bash
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.14.1
SYSTEM_PYTHON ?= python3
VENV ?= .venv
CUDA_VENV ?= .venv-cuda

ifdef PYTHON
READY :=
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready-$(TORCH)
endif
INSTALL = -m pip install --quiet --disable-pip-version-check
TOOLS := setuptools>=70.1

.PHONY: install demo test test-integration fuzz lint format check-cuda sanitize gpu clean

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
	$(PYTHON) -m dlkit lab fashion_mnist

test: install
	$(PYTHON) setup.py -q build_cuda_on_cpu
	$(PYTHON) -m pytest -q -n auto --dist worksteal --ignore=tests/integration

# Inside transformers, Accelerate, Lightning and torchvision. pip is told of the torch that is there, so that it stays.
test-integration: $(READY)
	$(PYTHON) $(INSTALL) --no-build-isolation -e '.[test,test-integration]' \
	  -c <($(PYTHON) -c 'import torch; print(f"torch=={torch.__version__}")')
	$(PYTHON) -m pytest -q tests/integration

# Random sequences of what users do on the optimizers, for SECONDS, from SEED on (else from the time of day).
SECONDS := 600
SEED ?= $(shell date +%s)
fuzz: install
	cd tests && PYTHONPATH=$(CURDIR):. $(abspath $(PYTHON)) -m fuzz.optimizer_machine --seconds $(SECONDS) --seed $(SEED)

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

# The whole CUDA build with a CUDA build of torch, without a GPU: compile, link, import, and what the kernels look like.
CUDA_ARCHS ?= 8.0;9.0;10.0;12.0+PTX
CUDA_PYTHON := $(abspath $(CUDA_VENV))/bin/python
check-cuda: $(CUDA_VENV)/ready-$(CUDA_TORCH)
	DLKIT_BUILD=cuda TORCH_CUDA_ARCH_LIST='$(CUDA_ARCHS)' $(CUDA_PYTHON) setup.py -q build --build-lib build/check-cuda
	cd build/check-cuda && $(CUDA_PYTHON) -m dlkit info
	$(CUDA_PYTHON) tests/support/check_sass.py build/check-cuda/dlkit/_C*.so --quiet \
	  --arch $$(echo '$(CUDA_ARCHS)' | sed 's/+PTX//; s/[.]//g; s/;/\n/g' | sed 's/^/sm_/') \
	  --ptx $$(echo '$(CUDA_ARCHS)' | tr ';' '\n' | sed -n 's/[.]//; s/+PTX//p')

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
	  ../../tests/test_layer_norm.py ../../tests/test_batch_norm.py ../../tests/test_dropout.py \
	  ../../tests/test_dropout_variants.py ../../tests/test_dropblock2d.py ../../tests/test_bias_act_dropout.py \
	  ../../tests/test_optim.py ../../tests/test_optim_launches.py ../../tests/test_optim_use.py ../../tests/fuzz \
	  ../../tests/test_arguments.py ../../tests/test_numbers.py ../../tests/test_saved_tensors.py \
	  -k '(cpu or optim_use or fuzz) and not triton and not compile and not (very_long and cuda)'

# On a machine with a GPU, in the environment that has its torch: build for that GPU, every test that is not of the CPU's
# kernels (side by side with pytest-xdist), the quick benchmark of every op with the peers that are installed, JSON and
# (with matplotlib) PNG in bench/results; downloads nothing.
GPU_PYTHON ?= python3
gpu:
	arch=$$($(GPU_PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') && \
	  TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-$$arch} DLKIT_BUILD=cuda \
	  $(GPU_PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	$(GPU_PYTHON) -m dlkit info
	$(GPU_PYTHON) -m pytest -q -k 'not cpu-' $$($(GPU_PYTHON) -c 'import xdist; print("-n 8")' 2> /dev/null) \
	  tests/test_layer_norm.py tests/test_batch_norm.py tests/test_dropout.py tests/test_dropout_variants.py \
	  tests/test_dropblock2d.py tests/test_bias_act_dropout.py tests/test_optim.py tests/test_optim_launches.py \
	  tests/test_surgery.py
	$(GPU_PYTHON) -m dlkit bench --quick --device cuda --json bench/results
	for file in bench/results/*-quick.json; do $(GPU_PYTHON) -m dlkit bench plot $$file || true; done

clean:
	rm -rf build dist *.egg-info $(VENV) $(CUDA_VENV) dlkit/_C*.so dlkit/_build_facts.py
