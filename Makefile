# make demo       a video from the example image with the random bundle, no downloads but packages
# make test       the test suite
# make test-all   the test suite with what is marked large
# make dry-runs   compile 13B for TPUs and GPUs (needs the extra cuda13), write docs/scale.md
# make lint       style
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all dry-runs lint clean

demo: .venv/installed
	$(BIN)/python sample.py --bundle random --image examples/astronaut.jpg \
	    --prompt "The astronaut smiles and slowly turns her head" \
	    --seconds 4 --steps 8 --height 256 --width 256 --output outputs/demo --overwrite

test: .venv/installed-test
	$(BIN)/python -m pytest -q -n auto --dist loadfile --durations=10

test-all: .venv/installed-test
	$(BIN)/python -m pytest -q -n auto --dist loadfile --durations=10 -m ""

dry-runs: .venv/installed-test
	$(BIN)/python scripts/dry_runs.py

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

clean:
	rm -rf .venv outputs
