# Everything happens in the checkout's own virtual environment; run it again at will, what is done is not done twice.
VENV ?= .venv
FITS := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do $$p $(FITS) 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
STAMPS := $(VENV)/stamps
NATIVE := $(wildcard $(addprefix */native/*.,c h py))
.DEFAULT_GOAL := help
.PHONY: help demo test check setup bench clean

help: ## show this
	@echo "make demo    watch a real model answer, part of it on a device process and part in a cloud process"
	@echo "make test    set up, then format, lint, types and every test (scripts/check)"
	@echo "make check   set up, then format, lint and types only"
	@echo "make setup   the virtual environment, the packages, the native engine, the model; no tools for tests"
	@echo "make bench   measure, and write the README's tables (TRACES=FOLDER: of the links that auto and windows replay)"
	@echo "make clean   remove what was built (not the model, which is in the user's cache folder)"

$(STAMPS)/venv:
	@echo "-- a virtual environment in $(VENV)"
	@"$(PYTHON)" $(FITS) 2>/dev/null || \
	    { echo "isthmus needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -m venv $(VENV) || { echo "no venv module (Debian: apt-get install python3-venv)" >&2; exit 2; }
	@$(PIP) --upgrade "pip>=25.1"
	@mkdir -p $(STAMPS) && touch $@

# The build's own needs first: the engine is then compiled without a second, isolated environment.
$(STAMPS)/install: pyproject.toml setup.py $(NATIVE) $(STAMPS)/venv
	@echo "-- packages, and the native engine (two to five minutes, in which nothing is printed)"
	@$(PIP) "setuptools>=77" "cffi>=1.17"
	@$(PIP) --no-build-isolation --group model -e ".[edge,plan]"
	@$(BIN)/python -c 'from isthmus.engine import cpu_names; print("-- kernels:", ", ".join(cpu_names()) or "NONE: \
	the native engine was not built (no C compiler?); ONNX Runtime computes, more slowly; see isthmus doctor")'
	@touch $@

$(STAMPS)/model: $(STAMPS)/install
	@$(BIN)/isthmus fetch smollm2
	@touch $@

# PyTorch by its exact version and before all else: a range would bring gigabytes for GPUs.
$(STAMPS)/tools: pyproject.toml $(STAMPS)/venv
	@echo "-- tools and what the tests compare with"
	@$(PIP) torch==2.13.0
	@$(PIP) --group test
	@touch $@

setup: $(STAMPS)/install $(STAMPS)/model

demo: setup
	@$(BIN)/isthmus demo

check: $(STAMPS)/tools $(STAMPS)/install
	@PYTHON=$(BIN)/python scripts/check --static

test: $(STAMPS)/tools setup
	@PYTHON=$(BIN)/python scripts/check

# auto replays the times that decode and feasibility measure.
FIRST := benchmarks/decode.py benchmarks/feasibility.py
BENCHMARKS = $(FIRST) $(filter-out $(FIRST),$(shell grep -l '^if __name__ ==' benchmarks/*.py))
bench: $(STAMPS)/tools setup
	@for script in $(BENCHMARKS); do \
	    case $$script in */auto.py|*/windows.py) traces="$(if $(TRACES),--traces $(TRACES))";; *) traces=;; esac; \
	    echo "== $$script"; $(BIN)/python $$script $$traces || exit 1; done
	@$(BIN)/python scripts/readme_tables.py

clean:
	rm -rf $(STAMPS)/install build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis engine/*.so protocol/*.so
