# Every target sets up what it needs, so a fresh machine needs no other preparation.
#
#   make train [ARGS="--bits W3A3"]   quantize a network on the embedded data
#   make test  [ARGS="-k name"]       run the tests on all cores
#   make lint                         check formatting, types and layer rules
#   make sanitize                     test the operators under AddressSanitizer and UBSan
#   make bench                        run the CPU benchmarks against peers
#   make cuda                         build with the CUDA kernels for every architecture
#   make gpu                          on a machine with a GPU: build, test, sanitize, measure
#   make clean                        delete the environment and everything built
#
# PYTHON     interpreter that creates the environment    (python3)
# TORCH      torch version to install                    (2.13.0)
# FDDA_CUDA  1 requires the CUDA kernels, 0 omits them   (unset: built if nvcc is found)

PYTHON ?= python3
TORCH ?= 2.13.0
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# torchvision 0.(n + 15) matches torch 2.n. Its dependencies could replace this torch.
TORCHVISION := 0.$(shell echo $$(( $(word 2,$(subst ., ,$(TORCH))) + 15 ))).*
CUDA_ARCHS := 7.5 8.0 8.6 8.9 9.0 12.0
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.NOTPARALLEL:
.PHONY: help train test lint sanitize bench cuda gpu clean

help:
	@sed -n '3,15s/^# \{0,1\}//p' Makefile

$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1" "setuptools>=77" wheel ninja pybind11
	$(BIN)/pip install --quiet torch==$(TORCH) numpy
	@touch $@

# The install is editable: the tests run the files of the working tree.
$(VENV)/package.stamp: $(VENV)/torch.stamp $(NATIVE)
	$(BIN)/pip install --quiet --no-build-isolation --editable .
	$(BIN)/pip install --quiet --no-deps torchvision==$(TORCHVISION) timm pytorchcv
	$(BIN)/pip install --quiet huggingface_hub requests
	@touch $@

$(VENV)/tools.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/pip install --quiet --group test --group lint --group bench
	@touch $@

train: $(VENV)/package.stamp
	$(BIN)/python -m fdda_ext.train $(ARGS)

# All tests of a file run in one process, because they share costly fixtures.
test: $(VENV)/package.stamp $(VENV)/tools.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist loadfile --no-loadscope-reorder \
	  $(ARGS)

lint: $(VENV)/package.stamp $(VENV)/tools.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/lint-imports

# A separate build at -O1. Address checks are function calls, because inlined checks take minutes to
# compile. Python itself is not built with the sanitizers, so LD_PRELOAD loads them.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZERS += --param asan-instrumentation-with-call-threshold=0
OP_TESTS := tests/test_fake_quantize.py tests/test_class_batch_stats.py tests/test_class_stats_loss.py \
  tests/test_int4_conv2d.py tests/test_deploy.py::test_hostile_records_are_refused_or_run \
  tests/test_deploy.py::test_every_algorithm_gives_the_same_bits
sanitize: $(VENV)/torch.stamp $(VENV)/package.stamp $(VENV)/tools.stamp
	FDDA_CUDA=0 FDDA_OPTIMIZE=1 CFLAGS="$(SANITIZERS) -fno-omit-frame-pointer" LDFLAGS="$(SANITIZERS)" \
	  $(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  OMP_NUM_THREADS=1 PYTHONPATH=build/sanitize/lib $(BIN)/pytest -q -n auto -p no:cacheprovider $(OP_TESTS) $(ARGS)

bench: $(VENV)/package.stamp $(VENV)/tools.stamp
	mkdir -p benchmarks/out
	$(BIN)/python -m pytest benchmarks --benchmark-json=benchmarks/out/cpu.json $(ARGS)

# Builds the package with its CUDA kernels. Needs nvcc, but neither a GPU nor a torch with CUDA.
cuda: $(VENV)/torch.stamp
	rm -f $(VENV)/package.stamp
	FDDA_CUDA=1 TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHS)" $(MAKE) $(VENV)/package.stamp
	$(BIN)/python -c \
	  "import fdda_ext; i = fdda_ext.build_info(); print(i); assert len(i.cuda_archs) == 6, i"

# Uses the machine's Python and its torch, which must have CUDA. Writes one JSON file to OUT.
OUT ?= benchmarks/results
gpu:
	$(PYTHON) benchmarks/gpu_report.py --out "$(OUT)"

clean:
	rm -rf $(VENV) build dist *.egg-info fdda_ext/*.so
