# make demo | test | lint | bench: each does all set-up on its own and is cheap to repeat.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo
SOURCES := $(shell find csrc r2f_ext -type f -not -name '*.so' -not -name '_build_info.json' -not -path '*/__pycache__/*') setup.py pyproject.toml

.PHONY: demo test test-kernels lint bench clean

demo: $(VENV)/installed
	$(BIN)/r2f demo --out $(OUT)

test: $(VENV)/installed test-kernels
	$(BIN)/pytest -m ""

# The kernels and their ctests, built without torch.
test-kernels: $(VENV)/installed
	$(BIN)/cmake -S . -B build/cmake -DCMAKE_BUILD_TYPE=Release
	$(BIN)/cmake --build build/cmake --parallel 2
	$(BIN)/ctest --test-dir build/cmake --output-on-failure

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

$(VENV)/installed: $(VENV)/packages $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps .
	touch $@

# The peers that benchmarks compare with.
$(VENV)/peers: $(VENV)/installed
	$(BIN)/python -m pip install --quiet $$($(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['bench'])")
	touch $@

clean:
	rm -rf build $(OUT)
