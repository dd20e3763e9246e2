# make demo: text -> tokens -> a trained model -> its loss curve and a sample. make test: everything that is checked.
PYTHON ?= python3
BIN = .venv/bin

demo: .venv/core
	$(BIN)/python prepare.py pydoc
	$(BIN)/python train.py config/demo.toml
	$(BIN)/python -m experiments.plot out/demo --out out/demo/loss.png
	$(BIN)/python sample.py --out_dir=out/demo --start="The following functions" --max_new_tokens=400

test: .venv/dev
	$(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/core: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/core
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: demo test lint
