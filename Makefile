PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv demo test test-modes test-teachers test-runs mutants style fix-copies

venv: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt -r requirements-dev.txt -e .
	touch $@

demo: venv
	$(BIN)/python demo/run.py

SLOW := test_modes.py test_teachers_train.py test_runs.py

# Two at a time, each on one core.
test: venv
	$(BIN)/python -m pytest tests -n 2 $(addprefix --ignore tests/,$(SLOW))

# Every configuration of accelerate_configs/, two processes each. DeepSpeed compiles an operator at its first launch.
test-modes: venv
	$(BIN)/python -m pytest tests/test_modes.py

# Every file of teachers/, in one process and in two.
test-teachers: venv
	$(BIN)/python -m pytest tests/test_teachers_train.py -n 2

# The files of runs/, whole, with tiny networks.
test-runs: venv
	$(BIN)/python -m pytest tests/test_runs.py -n 2

mutants: venv
	$(BIN)/python tests/mutants.py

style: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Writes the blocks under "# Copied from" in the training scripts.
fix-copies: venv
	$(BIN)/python tests/copies.py
