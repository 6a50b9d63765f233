# The first run makes .venv; compiling mmcv takes about 15 minutes of it on 2 cores.
.PHONY: env test lint demo soak docs

env:
	@tools/setup_env.sh

test: env lint
	.venv/bin/python -m pytest

lint: env
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

demo: env
	.venv/bin/python tools/demo/run_demo.py

# 2,000 drawn layers and networks, and 20 trainings that are killed, or cannot write; each of those
# takes a minute or two on 2 cores.
soak: env
	.venv/bin/python -m pytest tests/test_core/test_properties.py --hypothesis-profile soak
	.venv/bin/python -m tests.soak

docs: env
	.venv/bin/python -m sphinx -W -q -b html docs docs/_build/html
