# `make generate` and `make test` work on a fresh machine with Python >= 3.11, g++ and make.
PYTHON ?= python3
# What to install as JAX; `make generate JAX="jax[cuda13]"` brings a GPU backend.
JAX ?= jax

VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(wildcard cmake/*) $(shell find cpp -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.in')
SHELL_FILES = $(shell git grep -l '^\#!/usr/bin/env bash' -- .ci tools)
MARKDOWN_FILES = $(shell git ls-files '*.md')
CXX_FILES = $(shell git ls-files 'cpp/*.cc' 'cpp/*.h' 'cpp/*.cu' 'cpp/*.cuh' 'tests/cpp/*.cc' 'tests/cpp/*.h' 'examples/downstream/*.cc')

.PHONY: generate serve test fuzz soak train bench docs lint format stubs sanitize wheel sdist gpu-test clean

generate: $(VENV)/examples.stamp
	$(BIN)/python examples/generate.py

# OpenAI's interface at http://127.0.0.1:8000/v1; `make serve SERVE="--model DIR --port 9000"` passes options on.
serve: $(VENV)/examples.stamp
	$(BIN)/python examples/serve.py $(SERVE)

# Most of the time goes to XLA's compilations, so code for CPUs is compiled with little optimisation, in one piece. JAX 0.10
# also has an older and faster way to emit it, which later releases pass over. The tests of wheels compile as users do.
QUICK_COMPILATION := --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 \
  --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters
PYTEST = XLA_FLAGS="$(QUICK_COMPILATION) $$XLA_FLAGS" $(BIN)/python -m pytest -n auto --dist worksteal

test: $(VENV)/test.stamp
	$(PYTEST) -m "not slow"

# The long tail, which `make test` leaves out; CI runs it, too.
.PHONY: test-slow test-all
test-slow: $(VENV)/test.stamp
	$(PYTEST) -m slow

test-all: test test-slow

# Random calls against the oracle until one fails or Ctrl-C; FUZZ_SECONDS=300 stops by itself.
fuzz: $(VENV)/test.stamp
	tools/fuzz $(BIN)/python "$(FUZZ_SECONDS)" -n auto

# The serving loop over 10,000 random requests.
soak: $(VENV)/test.stamp
	JPA_SOAK=10000 $(BIN)/python -m pytest -q -s tests/test_soak.py

train: $(VENV)/examples.stamp
	$(BIN)/python examples/train.py

bench: $(VENV)/test.stamp
	$(BIN)/python -m benchmarks.cpu

# The site, in build/docs; warnings are errors.
docs: $(VENV)/test.stamp $(VENV)/docs.stamp
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

lint: $(VENV)/test.stamp $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck $(SHELL_FILES)
	$(BIN)/rumdl check $(MARKDOWN_FILES)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python tools/check_sizes.py --cpp
	$(BIN)/python tools/check_words.py

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)
	$(BIN)/rumdl fmt $(MARKDOWN_FILES)

# Checks what a commit changes, with the tools and versions of `make lint`.
.PHONY: hooks
hooks: $(VENV)/dev.stamp
	$(BIN)/pre-commit install

# The C++ tests, then the conformance suite on the CPU engine, all under the address and undefined-behaviour sanitizers.
sanitize: $(VENV)/test.stamp $(VENV)/dev.stamp
	XLA_FLAGS="$(QUICK_COMPILATION) $$XLA_FLAGS" tools/test_sanitized $(VENV)

stubs: $(VENV)/test.stamp $(VENV)/dev.stamp
	$(BIN)/python -m nanobind.stubgen -m jax_paged_attn._cpu -o jax_paged_attn/_cpu.pyi

# dist/jax_paged_attn-…manylinux….whl with the CPU and CUDA modules: one for Python 3.12 and later; 3.11 has its own. Where there
# is no CUDA toolkit, NVIDIA's packages bring nvcc and headers for the build. CUDA=OFF CUDA12=OFF leaves the CUDA modules out.
CUDA ?= ON
CUDA12 ?= ON
CUDA_ARCHITECTURES ?= 80;89;90a;100;120;120-virtual
CUDA_MODULES = $(if $(filter ON,$(CUDA)),_cuda) $(if $(filter ON,$(CUDA12)),_cuda12)
# The architectures that ptxas compiles; it says nothing of PTX.
MACHINE_CODE = $(if $(strip $(CUDA_MODULES)),$(filter-out %-virtual,$(subst ;, ,$(CUDA_ARCHITECTURES))))
# What to build: the checkout, or an sdist.
FROM ?= .
wheel: $(VENV)/wheel.stamp
	rm -rf build/wheel && mkdir -p build/wheel
	$(PYTHON) -m pip wheel --verbose --no-deps --wheel-dir build/wheel --config-settings=cmake.define.JPA_CUDA=$(CUDA) \
	  --config-settings=cmake.define.JPA_CUDA12=$(CUDA12) \
	  --config-settings=cmake.define.JPA_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)" $(FROM) > build/wheel/build.log 2>&1 \
	  || { tail -n 50 build/wheel/build.log; exit 1; }
	$(if $(MACHINE_CODE),$(PYTHON) tools/check_ptxas.py build/wheel/build.log)
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --wheel-dir build/wheel/repaired build/wheel/*.whl
	$(BIN)/python tools/check_wheel.py build/wheel/repaired/*.whl --modules $(CUDA_MODULES) --architectures "$(CUDA_ARCHITECTURES)"
	mkdir -p dist && mv build/wheel/repaired/*.whl dist/

sdist: $(VENV)/wheel.stamp
	$(BIN)/python -m build --sdist --outdir dist .

# On a machine with a GPU and JAX, no network needed: make gpu-test WHEEL=dist/jax_paged_attn-….whl
gpu-test:
	PYTHON=$(PYTHON) tools/gpu_test $(WHEEL)

clean:
	rm -rf $(VENV) build dist

$(VENV)/python.stamp:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/dev.stamp: $(VENV)/python.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

$(VENV)/docs.stamp: $(VENV)/python.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

$(VENV)/wheel.stamp: $(VENV)/python.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --group wheel
	touch $@

$(VENV)/%.stamp: $(VENV)/python.stamp $(SOURCES)
	$(BIN)/python -m pip install --quiet "$(JAX)" --editable ".[$*]"
	touch $@
