# `make demo` and `make test` do all set-up on a fresh machine with Python >= 3.11.

PYTHON ?= python3
VENV ?= .venv
CHROMIUM ?= /usr/bin/chromium
RUN = $(VENV)/bin/python

.PHONY: demo test test-all lint

demo: $(VENV)/.runtime
	$(RUN) -m mllama_jax.demo

test: $(VENV)/.test lint
	$(RUN) -m pytest -n auto

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

# What `make test` leaves out: what takes long, the page in a browser, and Meta's code and two versions of transformers on
# the same weights.
test-all: $(CHROMIUM) $(VENV)-oracle/.done $(VENV)-transformers-4.54/.done $(VENV)-lmms/.done
	MLLAMA_TRANSFORMERS_4_54_PYTHON=$(VENV)-transformers-4.54/bin/python \
	MLLAMA_CHROMIUM=$(CHROMIUM) \
	MLLAMA_LMMS_PYTHON=$(VENV)-lmms/bin/python \
	MLLAMA_TRANSFORMERS_4_45_WHEEL=$(VENV)-transformers-4.54/transformers-4.45.2-py3-none-any.whl \
		$(VENV)-oracle/bin/python -m pytest -n 2 --dist loadfile tests/oracle tests/long tests/browser

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip

$(VENV)/.runtime: pyproject.toml $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable .
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable ".[test]"
	touch $(VENV)/.runtime $@

# torch 2.13.0 is pinned because a later one may drag in CUDA; torchvision always would, and is stubbed.
$(VENV)-oracle/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)-oracle
	$(VENV)-oracle/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-oracle/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-oracle/bin/python -m pip install --quiet --editable ".[test,plan]" llama-models==0.3.0 fairscale tiktoken "transformers>=5.17" peft playwright
	touch $@

$(VENV)-transformers-4.54/.done:
	$(PYTHON) -m venv $(VENV)-transformers-4.54
	$(VENV)-transformers-4.54/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-transformers-4.54/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-transformers-4.54/bin/python -m pip install --quiet transformers==4.54.1 pillow safetensors numpy
	$(VENV)-transformers-4.54/bin/python -m pip download --quiet --no-deps --dest $(VENV)-transformers-4.54 transformers==4.45.2
	touch $@

# lmms-eval asks for dozens of packages that its tasks want, among them torchvision: these are what it imports.
$(VENV)-lmms/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)-lmms
	$(VENV)-lmms/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-lmms/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-lmms/bin/python -m pip install --quiet --editable ".[eval]" "transformers>=5.17" accelerate "filelock<4.3" loguru openai python-dotenv tenacity
	$(VENV)-lmms/bin/python -m pip install --quiet --no-deps lmms-eval==0.7.3
	touch $@

/usr/bin/chromium:
	apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends chromium || \
	{ echo "The page is tested in Chromium. On Debian, install it as root: apt-get install chromium. Elsewhere, say where" \
	"it is: make test-all CHROMIUM=/path/to/chromium" >&2; exit 1; }
