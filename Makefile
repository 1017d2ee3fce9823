# make demo | test | lint | docs | wheel-test | bench: each installs what it needs and is cheap to repeat.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo
SOURCES := $(shell find csrc r2f_ext -type f -not -name '*.so' -not -name '_build_info.json' -not -path '*/__pycache__/*') setup.py pyproject.toml

EXTRA = $(BIN)/python -c "import sys, tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies'][sys.argv[1]])"

.PHONY: demo test test-kernels lint docs wheel-test bench clean

demo: $(VENV)/installed
	$(BIN)/r2f demo --out $(OUT)

# Two processes of one thread each, a file as a whole in one of them, in the order of the folders. The operators' loops
# are tested with several threads, in one process; pytest-benchmark asks for one process too.
ONE_PROCESS := python_tests/ops python_tests/test_benchmarks.py
TWO_PROCESSES := -n 2 --dist loadfile --no-loadscope-reorder -p no:benchmark $(ONE_PROCESS:%=--ignore=%)
test: $(VENV)/installed test-kernels
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "" $(TWO_PROCESSES)
	$(BIN)/pytest -m "" $(ONE_PROCESS)

# The kernels and their ctests, built without torch.
test-kernels: $(VENV)/installed
	$(BIN)/cmake -S . -B build/cmake -DCMAKE_BUILD_TYPE=Release
	$(BIN)/cmake --build build/cmake --parallel 2
	$(BIN)/ctest --test-dir build/cmake --output-on-failure

# The site in build/docs; a broken link or a name that does not exist stops it.
docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict

# Builds the wheel, installs it in a new environment that borrows the other packages, and tests it away from the sources.
wheel-test: $(VENV)/packages
	PYTHON=$(BIN)/python python_tests/wheel.sh

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
	$(BIN)/mypy

# The record goes to benchmarks/results/<version>/<processor>-ops.json, the tables of all records beside it.
bench: $(VENV)/peers
	record=$$($(BIN)/python benchmarks/measure.py) && $(BIN)/pytest benchmarks --benchmark-json=$$record && \
	  $(BIN)/python benchmarks/tables.py --write $$(dirname $$record)/README.md

# The packages first: the extension is compiled against the torch that will load it.
$(VENV)/packages: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet $$($(BIN)/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['dev'])")
	touch $@

# build/lib goes first: setuptools would install files that the sources no longer have.
$(VENV)/installed: $(VENV)/packages $(SOURCES)
	rm -rf build/lib*
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps .
	touch $@

# The peers that benchmarks compare with.
$(VENV)/peers: $(VENV)/installed
	$(BIN)/python -m pip install --quiet $$($(EXTRA) bench)
	touch $@

$(VENV)/docs: $(VENV)/packages
	$(BIN)/python -m pip install --quiet $$($(EXTRA) docs)
	touch $@

clean:
	rm -rf build $(OUT)
