# `make quickstart` and `make test` are all a newcomer needs; both make the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DOC ?=
QUESTIONS ?=
CONFIG ?=
# The environment is made anew for another Python, and updated when its pins change.
MADE := $(VENV)/.made-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

.PHONY: quickstart install browser test test-slow test-parity golden lint

quickstart: install
	$(BIN)/python -m cartridges_jax.quickstart $(if $(CONFIG),--config=$(CONFIG)) $(if $(DOC),--document=$(DOC)) $(if $(QUESTIONS),--questions=$(QUESTIONS))

install: $(MADE)

$(MADE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: PYTHON=python3.11 make"; exit 1; }
	@echo "making $(VENV) (about a minute) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The tests of synth.view look at it in Chromium; without one they are skipped, and say so.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing chromium ..."; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends chromium >/dev/null || \
	    echo "chromium could not be installed: its tests are skipped"; \
	else echo "no Chromium is installed, its tests are skipped: install the package chromium to run them"; fi

test: install browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/python -m pytest -n 2 -m 'not slow and not parity'

test-slow: install browser
	$(BIN)/python -m pytest -n 2 -m 'not parity'

# torch's CPU build is needed here and nowhere else
test-parity: install
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'accelerate==1.15.0'
	$(BIN)/python -m pytest -m parity

golden: install
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'accelerate==1.15.0'
	$(BIN)/python tests/make_golden.py

lint: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
