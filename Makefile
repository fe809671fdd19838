# make help lists the targets. test and bench need nothing but Python >= 3.10, a C++17 compiler and a package index.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP_QUIET := --quiet --disable-pip-version-check
SOURCES := $(shell find csrc _build -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' -o -name '*.py' -o -name '*.map')
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install test builds bench browser fuzz soak lint format gpu sanitize sanitize-cuda clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 16

install: $(VENV)/.native  ## a virtual environment in .venv with the package, compiled and editable

test: $(VENV)/.native  ## every test that needs no GPU
	$(RUN) -m pytest -m "not gpu" -n 2 --dist loadfile --no-loadscope-reorder

builds: $(VENV)/.native  ## the Triton kernels compiled for sm_80, sm_90 and sm_100, compared with what is on record
	FUSED_TRANSFORMER_BUILDS=1 $(RUN) -m pytest tests/kernels/test_triton_builds.py

bench: $(VENV)/.native  ## this package beside what one would use instead, on this machine; ARGS="--quick" and other options
	$(RUN) -m bench $(ARGS)

browser: $(VENV)/.native  ## what the test of the page of attention heads needs: playwright, and a Chromium if there is none
	$(RUN) -m pip install $(PIP_QUIET) -c constraints.txt "playwright>=1.50"
	$(RUN) -c 'import sys; from tests.browser import program; sys.exit(program() is None)' \
	  || apt-get install --yes chromium || $(RUN) -m playwright install chromium

fuzz: $(VENV)/.native  ## random calls of every op on the CPU, for half an hour (ARGS="--minutes 5 --backend triton" ...)
	$(RUN) -m tests.fuzz $(ARGS)

soak: $(VENV)/.native  ## 10,000 training steps of a tiny model, whose memory must not grow
	$(RUN) -m tests.soak $(ARGS)

lint: $(VENV)/.tools  ## style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(RUN) _build/typecheck.py

format: $(VENV)/.tools  ## rewrite what lint would complain of
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

# Triton compiles some kernels for each test: with pytest-xdist as many of them side by side as there are processors.
GPU_WORKERS = $(shell $(PYTHON) -c 'import importlib.util as u; print("-n auto" if u.find_spec("xdist") else "")')
GPU_RESULTS := $(if $(OUT),$(OUT),bench/results)
# A part of a run (ARGS) must not take the place of a whole one.
GPU_INTO = $(if $(ARGS),$(if $(OUT),--results $(OUT)),--results $(GPU_RESULTS))

gpu:  ## on a machine with a GPU, without network and into the current Python: GPU tests, then GPU benchmarks
	FUSED_TRANSFORMER_CUDA=1 $(PYTHON) -m pip install --no-index --no-build-isolation --no-deps -v -e .
	$(PYTHON) -m fused_transformer info
	@# The benchmarks run even if a test fails: a machine with a GPU may not be there tomorrow.
	status=0; mkdir -p $(GPU_RESULTS); \
	$(PYTHON) -m pytest -m gpu $(GPU_WORKERS) --benchmark-disable > $(GPU_RESULTS)/gpu_tests.log 2>&1 || status=$$?; \
	tail -n 40 $(GPU_RESULTS)/gpu_tests.log; \
	$(PYTHON) -m bench --device cuda $(GPU_INTO) $(ARGS) || status=$$?; exit $$status

sanitize: $(VENV)/.native  ## the CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	sh _build/sanitize.sh $(RUN) -n auto

sanitize-cuda: $(VENV)/.native  ## the CUDA kernels' tests in the emulator under those two, and under ThreadSanitizer
	$(RUN) -m tests.csrc.sanitized asan
	@# Four processes: what ThreadSanitizer keeps of all threads there ever were takes more memory maps than one may have.
	$(RUN) -m tests.csrc.sanitized tsan -n 4

clean:  ## all that make made
	rm -rf $(VENV) build dist *.egg-info kernels/_C.*.so kernels/_torch.*.so .pytest_cache .mypy_cache .ruff_cache

# Stamps: a second run does only what an edit made necessary.
$(VENV)/.tools: pyproject.toml constraints.txt _build/requirements.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=...")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install $(PIP_QUIET) -c constraints.txt torch "setuptools>=77" "pybind11>=2.13"
	@# Not the package itself, which no linter needs compiled: .native does that, once.
	$(RUN) _build/requirements.py dev > $(VENV)/requirements.txt
	$(RUN) -m pip install $(PIP_QUIET) -c constraints.txt -r $(VENV)/requirements.txt
	touch $@

$(VENV)/.native: $(VENV)/.tools setup.py $(SOURCES)
	$(RUN) -m pip install $(PIP_QUIET) --no-build-isolation --no-deps -e .
	$(RUN) -m fused_transformer info
	touch $@
