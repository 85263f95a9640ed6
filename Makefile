# Everything from nothing: python3 and make are enough. Each target builds .venv first, where it has to.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OUT ?= out/digits_cnn

# Holds the build environments of pip to the same pins as everything else.
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PIP := $(BIN)/python -m pip install --quiet
BASE := $(VENV)/.installed
EXAMPLES := $(VENV)/.installed-examples
TEST := $(VENV)/.installed-test

.PHONY: demo test bench zoo clean

demo: $(EXAMPLES)
	$(BIN)/fxopt run examples/digits_cnn.py --passes fuse,qat --out $(DEMO_OUT)

test: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

bench: $(TEST)
	$(BIN)/python benchmarks/main_job.py

zoo: $(TEST)
	$(BIN)/python benchmarks/zoo.py

# torch goes first: where a CPU build is offered it is taken, and nothing later replaces it.
$(BASE): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(EXAMPLES): $(BASE)
	$(PIP) --editable '.[examples]'
	touch $@

$(TEST): $(BASE)
	$(PIP) --editable '.[test,examples]'
	touch $@

clean:
	rm -rf $(VENV) out dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
