# make demo | test | test-sse | neighbours | support | fuzz | opcheck | coverage | bench | gpu | gpu-more | rehearsal
# | report | guard | resources | lint | format | clean
#
# TORCH chooses the torch, by any pip requirement; torchvision follows it: make test TORCH=torch==2.13.0
# PYTHON is the interpreter that makes the virtual environment, and that `make gpu` uses as it is.

PYTHON ?= python3
TORCH ?= torch==2.11.0
NEWEST ?= torch~=2.15.0
FUZZ_CASES ?= 20000
WORKERS ?= 2
RESULTS ?= benchmarks/results
VENV = .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet install

# One architecture, to build fast: that of the GPU which is there, else Hopper.
GPU_ARCHITECTURES = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd';' -)
export TORCH_CUDA_ARCH_LIST ?= $(or $(GPU_ARCHITECTURES),9.0)

# In continuous integration a warning is an error; with a user's compiler it is not.
export GATED_PROMPT_WERROR ?= $(CI)

.PHONY: demo test test-sse neighbours support fuzz opcheck opcheck-newest coverage bench gpu gpu-more rehearsal report guard resources
.PHONY: lint format clean build
.DELETE_ON_ERROR:

# The environment: torch as chosen, then everything else held to it. Made anew where TORCH changes.
CHOSEN = $(VENV)/chosen-$(subst /,_,$(subst $() ,_,$(TORCH)))
$(CHOSEN): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) "$(TORCH)"
	$(BIN)/python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > $(VENV)/constraints.txt
	$(PIP) --constraint $(VENV)/constraints.txt "setuptools>=77,<82" wheel ninja pybind11 cmake \
	  timm torchmetrics tyro rich scikit-learn matplotlib tensorboard nvtx \
	  numpy pytest pytest-benchmark pytest-xdist pytest-timeout hypothesis ruff==0.17.6 clang-format==23.1.5
	touch $@

# In place, so that tests and demo run the source tree and a second build compiles what changed.
build: $(CHOSEN)
	$(PIP) --no-build-isolation --no-deps --editable .

demo: build
	$(BIN)/gated-prompt demo

test: build
	$(BIN)/python -m pytest tests -n $(WORKERS)
	$(BIN)/cmake -S . -B build/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DCMAKE_COMPILE_WARNING_AS_ERROR=$(if $(CI),ON,OFF)
	$(BIN)/cmake --build build/cmake
	$(BIN)/ctest --test-dir build/cmake --output-on-failure

# What is arithmetic, as on a CPU without AVX: rounding differs.
ARITHMETIC = $(addprefix tests/test_,attention.py attached.py divide_rows.py parity.py prompt_gate.py scaled_dot.py users.py)
test-sse: build
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 TORCHINDUCTOR_CACHE_DIR=$(abspath build/inductor-sse) \
	  $(BIN)/python -m pytest $(ARITHMETIC) -n $(WORKERS)

# The tests beside packages of others, which are not needed else: adapters, offloading, quantised weights, exports.
neighbours: build
	$(PIP) --constraint $(VENV)/constraints.txt peft accelerate torchao onnx onnxruntime onnxscript lightning
	$(BIN)/python -m pytest tests/test_neighbours.py tests/test_attached.py -k "neighbours or peft"

# The support matrix of README.md; REPORTS=... adds those of other versions of torch.
support: build
	rm -f build/tests.jsonl
	$(BIN)/python -m pytest tests --rows=build/tests.jsonl
	$(BIN)/python tests/support_matrix.py README.md build/tests.jsonl $(wildcard $(RESULTS)/gpu.jsonl) $(REPORTS)

# Random cases beside the reference, FUZZ_CASES of them.
fuzz: build
	FUZZ_CASES=$(FUZZ_CASES) $(BIN)/python -m pytest tests/test_fuzz.py

# torch's own checks of the raw ops, by the torch chosen and, with the same build, by the NEWEST.
opcheck: build
	$(BIN)/python -m pytest tests -k opcheck
	$(MAKE) opcheck-newest VENV=.venv-newest TORCH='$(NEWEST)'

opcheck-newest: $(CHOSEN)
	$(BIN)/python -m pytest tests -k opcheck

# Lines and branches of csrc that the op's tests reach on the CPU, and those that they miss; in a
# copy, since this build is slow.
COVERAGE = build/coverage
GCOV = --coverage -fprofile-update=atomic
OP_TESTS = $(addprefix tests/test_,prompt_gate.py scaled_dot.py bad_inputs.py fuzz.py gradient_ownership.py cli.py)
coverage: $(CHOSEN)
	$(PIP) gcovr
	rm -rf $(COVERAGE)
	mkdir -p $(COVERAGE)
	cp -r csrc tests gated_prompt examples build_backend setup.py pyproject.toml README.md LICENSE CMakeLists.txt $(COVERAGE)
	rm -f $(COVERAGE)/gated_prompt/*.so
	sed -i s/-O3/-O1/ $(COVERAGE)/setup.py
	cd $(COVERAGE) && GATED_PROMPT_CPU_ONLY=1 CFLAGS="$(GCOV)" LDFLAGS=--coverage \
	  $(abspath $(BIN)/python) setup.py --quiet build_ext --inplace
	cd $(COVERAGE) && $(abspath $(BIN)/python) -m pytest $(OP_TESTS)
	$(BIN)/cmake -S $(COVERAGE) -B $(COVERAGE)/build/cmake -G Ninja -DCMAKE_BUILD_TYPE=None \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCMAKE_CXX_FLAGS="-O1 $(GCOV)" -DCMAKE_CUDA_COMPILER=NOTFOUND
	$(BIN)/cmake --build $(COVERAGE)/build/cmake
	$(BIN)/ctest --test-dir $(COVERAGE)/build/cmake --output-on-failure
	cd $(COVERAGE) && $(abspath $(BIN)/gcovr) $(GCOVR) --txt - --txt-metric line
	cd $(COVERAGE) && $(abspath $(BIN)/gcovr) $(GCOVR) --txt - --txt-metric branch
GCOVR = --root . --filter csrc/ --merge-lines --exclude-throw-branches --exclude-unreachable-branches \
  --gcov-ignore-parse-errors=negative_hits.warn_once_per_file

# The quick form, on the CPU; BENCH=... are flags of the benchmarks. peft: for the rows of LoRA.
bench: build
	$(PIP) --constraint $(VENV)/constraints.txt peft
	mkdir -p $(RESULTS)
	rm -f $(RESULTS)/cpu.jsonl
	$(BIN)/python -m pytest benchmarks --benchmark-only --device cpu --rows=$(RESULTS)/cpu.jsonl $(BENCH)

# On a machine with a GPU, with the packages that are there and those of the folder WHEELS: build, tests, sanitizers,
# goals (docs/gpu.md). GPU=... are flags of benchmarks/gpu.py; gpu-more goes on where gpu stopped.
gpu gpu-more:
	$(if $(WHEELS),-$(PYTHON) -m pip install --quiet --no-index --no-deps $(WHEELS)/*.whl)
	$(PYTHON) benchmarks/gpu.py --results $(RESULTS) $(if $(filter gpu,$@),--seconds 530,--more --seconds 200) $(GPU)

# The same parts without a GPU: on the CPU, tiny.
rehearsal: build
	$(BIN)/python benchmarks/gpu.py --rehearse --most 20 --workers 2 --tests tests/test_scaled_dot.py \
	  --results build/rehearsal $(GPU)

# Tables and plots of benchmarks/README.md and README.md from benchmarks/results, and docs/counts.md.
report: build
	$(BIN)/python benchmarks/report.py benchmarks/README.md README.md
	$(BIN)/python benchmarks/counts.py docs/counts.md

# Instructions and registers beside benchmarks/lab/baseline.json; UPDATE=--update writes it. Needs valgrind and nvcc.
guard: build
	$(BIN)/python benchmarks/lab/guard.py $(UPDATE)

# Registers, spills and memory instructions of the CUDA kernels; needs nvcc, no GPU.
resources: $(CHOSEN)
	$(BIN)/python benchmarks/lab/kernel_resources.py

SOURCES = $(wildcard csrc/* tests/cpp/*.* tests/cpp/*/*)
lint: $(CHOSEN)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(CHOSEN)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf $(VENV) .venv-newest build dist demo_output profile_output gated_prompt/*.so *.egg-info .benchmarks .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
