# make quickstart | test | numerics | slow | lowest | transformers-suite | grad-cam | test-baselines | style | quality
# make bench | bench-cifar10 | bench-check
#
# Every target first makes sure of an environment in .venv (a few minutes once, instant afterwards).
#   make test PYTHON=python3.12        another Python
#   make test ARGS="-k position"       more arguments for the command behind the target
#   make test PROCESSES=0              in one process, as a debugger needs it (2 unless told)
#   make test VENV=path/to/venv        another place for the environment

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PROCESSES ?= 2
# a file stays in one process: its tests share what they made
PYTEST := -m pytest -q -n $(PROCESSES) --dist loadfile
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
BASELINES := $(VENV)-baselines
LOWEST := $(VENV)-lowest

.PHONY: help environment quickstart test numerics slow lowest transformers-suite grad-cam test-baselines style quality bench bench-cifar10 bench-check
.DEFAULT_GOAL := help

help:
	@sed -n '1,9s/^# \{0,1\}//p' Makefile

environment: $(READY)

$(READY): pyproject.toml constraints.txt .ci/environment
	@bash .ci/environment "$(PYTHON)" "$(VENV)"
	@touch $@

quickstart: $(READY)
	@$(RUN) -m training.quickstart $(ARGS)

test: $(READY)
	@$(RUN) $(PYTEST) -m "not slow and not gpu" $(ARGS)

# what compares numbers, as on a processor without AVX (docs/platforms.md)
numerics: $(READY)
	@ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default \
	    $(RUN) $(PYTEST) -m "numerics and not slow and not gpu" tests/hf_vit tests/training/engine $(ARGS)

slow: $(READY)
	@$(RUN) -m pytest -q $(ARGS)

# the tests of `make test` with the lowest versions that pyproject.toml allows
$(LOWEST)/.ready: pyproject.toml .ci/lowest .ci/constraints-lowest.txt
	@bash .ci/lowest "$(PYTHON)" "$(LOWEST)"
	@touch $@

lowest: $(LOWEST)/.ready
	@$(LOWEST)/bin/python $(PYTEST) -m "not slow and not gpu" $(ARGS)

# transformers' own common model tests, which are in its source distribution only, against our classes
transformers-suite: $(READY)
	@bash .ci/transformers-suite "$(RUN)"
	@$(RUN) -m pytest -q tests/hf_vit/modeling/test_transformers_suite.py $(ARGS)

# pytorch-grad-cam needs torchvision, which the other environment is kept free of: it gets one of its own
grad-cam:
	@bash .ci/grad-cam "$(PYTHON)" "$(VENV)-grad-cam"
	@$(VENV)-grad-cam/bin/python -m pytest -q tests/hf_vit/interpretability/test_adapters.py $(ARGS)

style: $(READY)
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

quality: $(READY)
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy hf_vit

# other people's libraries, and the torchvision that they need, stay out of the other environment
$(BASELINES)/.ready: $(READY) benchmarks/baselines.txt .ci/baselines
	@bash .ci/baselines "$(VENV)" "$(BASELINES)"
	@touch $@

bench: $(BASELINES)/.ready
	@$(BASELINES)/bin/python -m benchmarks.run $(ARGS)

# CIFAR-10 from scratch by our recipe, transformers' example and timm's train.py: make bench-cifar10 ARGS="--scale cpu ..."
bench-cifar10: $(BASELINES)/.ready
	@$(BASELINES)/bin/python -m benchmarks.cifar10_baselines $(ARGS)

# the tests that need those libraries
test-baselines: $(BASELINES)/.ready
	@$(BASELINES)/bin/python -m pytest -q tests/benchmarks/test_cifar10_baselines.py \
	    tests/benchmarks/test_benchmarks.py $(ARGS)

# operations, bytes and Python calls against the recorded ones: no clock
bench-check: $(READY)
	@$(RUN) -m benchmarks.check $(ARGS)
