# make demo       sample a video with the tiny bundle and print its metrics; no downloads
# make tiny-bundle  train the models of the demo world, in outputs/world: hours on a CPU; run it again
#                 to continue after an interruption
# make test       the test suite
# make test-fast  the tests of single modules
# make test-all   the test suite with what is marked slow
# make test-storage  what runs in object stores and on their mounts, with an emulator
# make test-browser  the page of framepack serve in Chromium
# make dry-runs   compile 13B for TPUs and GPUs (needs the extra cuda13), write docs/measurements/memory.md
# make lint       ruff, mypy and codespell
# make docs       the site, in site/
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo tiny-bundle test test-fast test-all test-storage test-browser dry-runs lint docs clean

demo: .venv/installed
	$(BIN)/python sample.py --bundle tiny --image examples/sprites.png \
	    --prompt "the small cyan ring orbits the small yellow triangle; the small yellow triangle stays; the camera pans down." \
	    --seconds 8 --steps 10 --gif --output outputs/demo --overwrite
	$(BIN)/framepack evaluate --video outputs/demo/video.mp4

WORLD := outputs/world
# Sprites stay, and start images are plain: nothing of the demo world is to be left out.
ALL := --scene-threshold 1 --min-motion 0 --min-sharpness 0 --max-still 1 --min-seconds 1 --keep-duplicates
tiny-bundle: .venv/installed
	$(BIN)/framepack synthetic --output $(WORLD)/footage --clips 400 --seconds 8
	$(BIN)/framepack synthetic --output $(WORLD)/videos --clips 700 --seconds 5 --seed 1
	$(BIN)/framepack synthetic --output $(WORLD)/sketches --clips 6000 --seconds 1.3 --seed 2 --size 64x64
	test -e $(WORLD)/encoders/bundle.json || $(BIN)/python scripts/make_toy_bundle.py $(WORLD)/encoders --world
	$(BIN)/framepack train-vae --config configs/tiny_vae.py
	$(BIN)/framepack train-vae --config configs/tiny_vae.py --init $(WORLD)/stills --output $(WORLD)/vae \
	    --frames 17 --batch 4 --steps 350 --optimizer.learning-rate 2e-4
	$(BIN)/framepack prepare --videos $(WORLD)/sketches --bundle $(WORLD)/vae/bundle \
	    --output $(WORLD)/sketches_dataset --buckets 64x64 $(ALL)
	$(BIN)/framepack prepare --videos $(WORLD)/videos --bundle $(WORLD)/vae/bundle \
	    --output $(WORLD)/dataset --buckets 128x128 $(ALL)
	$(BIN)/python train.py --config configs/tiny_framepack.py --init scratch --steps 4500 \
	    --data.path $(WORLD)/sketches_dataset --output $(WORLD)/sketch
	$(BIN)/python train.py --config configs/tiny_framepack.py
	$(BIN)/python train.py --config configs/tiny_framepack.py --init $(WORLD)/f1 --steps 3000 \
	    --output $(WORLD)/f1_more
	$(BIN)/python train.py --config configs/tiny_framepack.py --init $(WORLD)/f1_more --steps 600 \
	    --schedule f1k1_x_g9_f1k1f2k2f16k4_td --output $(WORLD)/inverted

PYTEST := $(BIN)/python -m pytest -q -n auto --dist loadfile --durations=10

test: .venv/installed-test
	$(PYTEST)

test-fast: .venv/installed-test
	$(PYTEST) tests/unit

test-all: .venv/installed-test
	$(PYTEST) -m ""

test-storage: .venv/installed-test-storage
	$(PYTEST) -m storage

test-browser: .venv/installed-test-browser
	$(PYTEST) -m browser

dry-runs: .venv/installed-test
	$(BIN)/python scripts/dry_runs.py

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m codespell_lib

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[eval]"
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

.venv/installed-test-storage: .venv/installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[test-storage]"
	touch $@

.venv/installed-test-browser: .venv/installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[test-browser]"
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv outputs site
