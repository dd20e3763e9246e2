# make demo: text -> tokens -> a trained model -> its loss curve and a sample. make test: the tests, in two to four minutes.
PYTHON ?= python3
BIN = .venv/bin
PYTEST = $(BIN)/python -m pytest -n logical

demo: .venv/core
	$(BIN)/python prepare.py pydoc
	$(BIN)/python train.py config/demo.toml
	$(BIN)/python -m experiments.plot NagMHA=out/demo "MHA, stored=results/demo_mha.jsonl" --out out/demo/loss.png
	$(BIN)/python sample.py --out_dir=out/demo --start="The following functions" --temperature=0.5 --max_new_tokens=400

test: .venv/dev
	$(PYTEST) -m "not slow"

# then also the slow tests: killed processes, two processes at once, compilers, the README's commands
test-all: test
	$(PYTEST) -m slow

# speed; for all of it give NANOGPT=DIR, a clone of github.com/karpathy/nanoGPT, and SOURCE=DIR, text in MiniPile's layout
bench: .venv/dev
	$(BIN)/python -m experiments.bars --compile $(if $(NANOGPT),--nanogpt $(NANOGPT)) $(if $(SOURCE),--source $(SOURCE))

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/core: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/core
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: demo test test-all bench lint
