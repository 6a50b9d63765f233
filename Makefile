# The first run makes .venv; compiling mmcv takes about 15 minutes of it on 2 cores.
.PHONY: env test core lint quality demo soak docs

# `make test STACK=onedl`: on the maintained forks of OpenMMLab, in an environment of its own.
STACK ?= openmmlab
VENV = $(if $(filter onedl,$(STACK)),.venv-onedl,.venv)

# A file's tests in one process, the files in the order that tests/conftest.py gives them.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

env:
	@STACK=$(STACK) tools/setup_env.sh $(VENV)

test: env lint
	$(PYTEST)

# The core's tests, which need no OpenMMLab, on another torch: `make core TORCH=2.5.0`.
core:
	test -n "$(TORCH)"
	python3 -m venv .venv-torch-$(TORCH)
	.venv-torch-$(TORCH)/bin/python -m pip install --quiet torch==$(TORCH) "numpy<3" Pillow \
	  $(shell grep -E '^(mmengine|pytest|pytest-timeout|pytest-xdist|hypothesis)==' requirements.txt)
	OMP_NUM_THREADS=1 .venv-torch-$(TORCH)/bin/python -m pytest -n 2 tests/test_core

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Lint, the docs, and all tests with the lines that none of them runs.
quality: lint docs
	$(PYTEST) --cov --cov-report=term

demo: env
	$(VENV)/bin/python tools/demo/run_demo.py

# 2,000 random layers and networks, and 20 trainings that are killed, or cannot write; each of those
# takes a minute or two on 2 cores.
soak: env
	$(VENV)/bin/python -m pytest tests/test_core/test_properties.py --hypothesis-profile soak
	$(VENV)/bin/python -m tests.soak

docs: env
	$(VENV)/bin/python -m sphinx -W -q -b html docs docs/_build/html
