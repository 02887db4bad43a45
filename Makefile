# legato: `make demo` shows it working, `make test` proves it. Both build .venv first and need only Python 3.11+ with venv.
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# Kernel sources are compiled by numba and triton, which cannot read decorated functions: they are not shape-checked.
CHECKED := legato.legendre,legato.layers,legato.models,legato_papers,legato.ops.recurrence,legato.ops.gated,legato.ops.time_invariant,legato.ops.matrix,legato.ops.kernels.reference,legato.ops.kernels.torch_scan,beartype.beartype
SUBJECT ?= all
MINUTES ?= 60

SETTINGS := default avx2 libraries numba two-threads seed-1 seed-2 seed-3

.PHONY: help demo test test-portable $(SETTINGS:%=test-portable-%) settings fuzz lint bench bench-peers gpu wheel clean
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch is installed by its exact version first: a range may select a build with gigabytes of CUDA libraries.
.venv/.torch: constraints.txt | .venv/bin/python
	$(PIP_INSTALL) $$(grep '^torch==' constraints.txt)
	@touch $@

.venv/.papers: pyproject.toml papers/pyproject.toml constraints.txt .venv/.torch
	$(PIP_INSTALL) -e . -e papers
	@touch $@

.venv/.dev: pyproject.toml papers/pyproject.toml constraints.txt .venv/.torch
	$(PIP_INSTALL) -e '.[dev]' -e papers
	@touch $@

demo: .venv/.papers  ## train on Mackey-Glass, stream the network, compare with the paper
	$(BIN)/legato-papers demo

# The first run checks every shape annotation (jaxtyping + beartype). torch.compile cannot trace through that checker,
# and it would stop bad input before our own messages, so those tests run on their own.
test: .venv/.dev  ## run all tests
	$(BIN)/pytest -n auto --maxprocesses 8 -m "not compiled and not bad_input" --jaxtyping-packages=$(CHECKED)
	$(BIN)/pytest -n auto --maxprocesses 8 -m "compiled or bad_input"

# The tests of ops, layers, models and the contract as another machine would run them: with the instructions of older
# processors in PyTorch, oneDNN, MKL and Numba (whose cache tells processors apart), with two threads for each operation
# (one elsewhere), and with other random numbers.
PORTABLE := tests/ops tests/layers $(patsubst %,tests/test_%.py,contract models language_model legendre bounds mutations fuzz)
ENV_default := ATEN_CPU_CAPABILITY=default
ENV_avx2 := ATEN_CPU_CAPABILITY=avx2
ENV_libraries := ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE
ENV_numba := NUMBA_CPU_NAME=generic
ENV_two-threads := OMP_NUM_THREADS=2
OPTIONS_two-threads := --threads 2 -n 0
OPTIONS_seed-1 := --seed 1
OPTIONS_seed-2 := --seed 2
OPTIONS_seed-3 := --seed 3

test-portable: $(SETTINGS:%=test-portable-%)  ## run the numerical tests as other machines would, in an hour on two cores
$(SETTINGS:%=test-portable-%): test-portable-%: .venv/.dev
	OMP_NUM_THREADS=1 $(ENV_$*) $(BIN)/pytest -n auto --maxprocesses 8 -m "not compiled and not bad_input" $(OPTIONS_$*) $(PORTABLE)

settings:
	@echo $(SETTINGS)

# Each round draws other cases; a failing one is printed with all that it drew, and drawn first in the next run.
fuzz: .venv/.dev  ## random cases against float64 oracles, for an hour; MINUTES=5 for less
	end=$$(($$(date +%s) + 60 * $(MINUTES))); \
	while [ $$(date +%s) -lt $$end ]; do $(BIN)/pytest -n auto --maxprocesses 8 --hypothesis-profile=fuzz tests/test_fuzz.py || exit 1; done

lint: .venv/.dev  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/.dev  ## measure this machine in 15 minutes, results under benchmarks/results; SUBJECT="recurrence lti" for some
	$(BIN)/python benchmarks/run.py $(SUBJECT)
	$(BIN)/python benchmarks/report.py

gpu:  ## check and measure on a CUDA machine, within 9 minutes; OUT=file or folder
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py $(OUT)

# Two environments: TensorFlow and the others do not agree on what they need.
bench-peers: .venv-peers/.built .venv-peers-keras/.built  ## install the libraries that are measured beside this one

.venv-%/.built: benchmarks/environments/%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

wheel: .venv/.dev  ## build the wheels of both packages in dist
	$(BIN)/pip wheel --quiet --no-deps -w dist . ./papers

clean:
	rm -rf .venv build dist
