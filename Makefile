# Every verb makes .venv and installs what it needs on first use. CPU wheels of torch by default; a
# machine with an NVIDIA GPU wants e.g. `make demo TORCH_INDEX=https://download.pytorch.org/whl/cu130`.
PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# The interpreter that runs the Triton kernels on a CPU; a CUDA build of torch brings its own.
TRITON := $(if $(filter Linux,$(shell uname -s)),triton==3.9.0)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Threads that wait without spinning: on a busy machine of few cores this is many times faster.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0

.PHONY: demo test bench docs lint format clean

demo: $(READY)
	$(BIN)/errata run demo.toml

# One process per core and one thread per process.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses=8 --dist=worksteal --benchmark-disable

bench: $(READY)
	$(BIN)/pytest bench/perf -q --benchmark-columns=min,median,rounds --benchmark-group-by=group

docs: $(READY)
	PYTHONPATH=docs $(BIN)/mkdocs build --strict -d out/site

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pydoclint -q kernels functional adapters editors bench

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out build dist errata_vlm.egg-info

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "errata needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	    "Say which: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch alone first: where its CPU index can not be reached, pip takes the default one.
	$(BIN)/python -m pip install -q --retries 0 --no-deps \
	  --extra-index-url $(TORCH_INDEX) "$$(grep '^torch==' requirements.lock)"
	$(if $(TRITON),$(BIN)/python -m pip install -q --no-deps $(TRITON))
	$(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	# type checkers do not see setuptools' package map: links they can follow
	mkdir -p $(VENV)/types/errata
	for floor in kernels functional adapters editors bench; do \
	  ln -sfn ../../../$$floor $(VENV)/types/errata/$$floor; done
	touch $(READY)
