# Two commands are all there is to know: `make train` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0

.PHONY: train test test-slow fuzz lint types bench lock clean

train: .venv/ready
	$(BIN)/shoal train --overwrite-output-dir

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" --numprocesses 2 --dist loadfile

# What takes long and rarely breaks: the tests of tests/slow.txt.
test-slow: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow --numprocesses 2 --dist loadfile

# 500 mutated recipes, command lines, files of data and checkpoints, and 30 whole launches.
fuzz: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/fuzz --mutations 500 --launches 30 --numprocesses 2

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python -m bench

# Torch comes first and alone: pip then takes a CPU build where one is at hand, and nothing replaces it later.
.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "shoal needs Python 3.11 or later, found $$($(PYTHON) --version): make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "Python's venv is missing: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

lock:
	$(BIN)/pip freeze --exclude-editable | grep -v '^torch==' > requirements.lock

clean:
	rm -rf .venv build dist *.egg-info runs
