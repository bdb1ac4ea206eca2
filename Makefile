PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv demo test mutants style

venv: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt -r requirements-dev.txt
	touch $@

demo: venv
	$(BIN)/python demo/run.py

test: venv
	$(BIN)/python -m pytest tests

mutants: venv
	$(BIN)/python tests/mutants.py

style: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
