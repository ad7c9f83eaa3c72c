# Everything runs in .venv, which the first target that needs it builds. An activated environment plays no part.
#   PYTHON       the interpreter that builds .venv            make test PYTHON=python3.12
#   WORKERS      processes that the tests run in              make test WORKERS=4
#   PYTEST_ARGS  more arguments for pytest                    make test PYTEST_ARGS="-k curvature -x"
PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
TORCH := $(shell sed -n 's/^\(torch==[^[:space:]]*\).*/\1/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format bench peers clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s%s\n", $$1, $$2 }'

# torch comes first and alone: whatever build the pin resolves to stays, nothing else can pull another.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hbmeta: needed Python 3.11 or newer; found " + sys.version.split()[0] + ". Name one: make PYTHON=python3.11")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(INSTALLED)  ## compare posterior approximations on the radon data, into results/radon
	$(BIN)/hbmeta compare radon --out results/radon

# One thread per worker; with worksteal a file's tests stay in one worker, which makes its fixtures once.
test: $(INSTALLED)  ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-all: $(INSTALLED)  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)  ## rewrite the files in the project's style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)  ## the benchmarks
	$(BIN)/python -m benchmarks.run

peers: $(INSTALLED)  ## the libraries that the benchmarks compare with
	$(BIN)/python -m pip install -c constraints.txt -e ".[peers]"

clean:  ## remove what the other targets made, .venv and results included
	rm -rf .venv results build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
