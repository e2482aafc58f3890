# Everything on a fresh machine with Python 3.11 and make: `make demo` and `make test` set up what they need.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
# A packed copy of the public data may lie beside the clone; without it the demo asks the publisher.
PACKED ?= ../shared/data
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/residual-memory

.PHONY: install data browser demo test check bench bench-serve torture docs clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(shell command -v $(PYTHON) || command -v python3) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

data: $(READY)
	@if [ -f $(PACKED)/unpack.py ]; then $(BIN)/python $(PACKED)/unpack.py $(CACHE) cifar100 text tabular; fi

# The page is tested in a real browser: installed where that is allowed, else its tests are skipped by name.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && timeout 600 sh -c \
	  'apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium' >/dev/null 2>&1; } \
	  || echo "chromium is not there: the tests of the page are skipped"

demo: $(READY) data
	$(BIN)/resmem demo --out report.html

# One thread a worker: libraries that wait for each other's threads in a loop make small problems many times slower.
test: $(READY) data browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) data
	$(BIN)/python -m benchmarks core
	$(BIN)/python -m benchmarks language
	$(BIN)/python -m benchmarks tables
	$(BIN)/python -m benchmarks durability
	$(BIN)/python -m benchmarks ray

# Load, overload and clients that do harm, beside a plain server; then 10,000 malformed requests.
bench-serve: $(READY)
	$(BIN)/python -m benchmarks serve
	$(BIN)/python -m benchmarks fuzz

torture: $(READY)
	$(BIN)/python -m benchmarks torture

docs: $(READY)
	$(BIN)/sphinx-build -W -b html docs docs/_build/html

clean:
	rm -rf $(VENV) docs/_build report.html
