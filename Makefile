# make demo | test | test-sse | neighbours | bench | gpu | gpu-more | rehearsal | report | guard | lint | format | clean
#
# TORCH is any pip requirement: make test TORCH=torch==2.13.0 VENV=.venv-2.13. torchvision follows it.
# PYTHON makes the virtual environment, and `make gpu` uses it as it is.

PYTHON ?= python3
TORCH ?= torch==2.11.0
WORKERS ?= 2
RESULTS ?= benchmarks/results
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet install
HELD = --constraint $(VENV)/constraints.txt

# One architecture builds fast: the GPU's, or Hopper where there is none.
GPU_ARCHITECTURES = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd';' -)
export TORCH_CUDA_ARCH_LIST ?= $(or $(GPU_ARCHITECTURES),9.0)
# In continuous integration a warning is an error.
export GATED_PROMPT_WERROR ?= $(CI)

.PHONY: demo test test-sse neighbours bench gpu gpu-more rehearsal report guard lint format clean build
.DELETE_ON_ERROR:

# The environment: torch as chosen, then everything else with this torch. Made again if TORCH changes.
CHOSEN = $(VENV)/chosen-$(subst /,_,$(subst $() ,_,$(TORCH)))
$(CHOSEN):
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) "$(TORCH)"
	$(BIN)/python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > $(VENV)/constraints.txt
	$(PIP) $(HELD) "setuptools>=77,<82" wheel ninja pybind11 cmake timm tyro rich scikit-learn matplotlib nvtx \
	  numpy pytest pytest-benchmark pytest-xdist pytest-timeout hypothesis ruff==0.17.6 clang-format==23.1.5
	touch $@

build: $(CHOSEN)  # in place
	$(PIP) --no-build-isolation --no-deps --editable .

demo: build
	$(BIN)/gated-prompt demo

test: build
	rm -f build/tests.jsonl
	$(BIN)/python -m pytest tests -n $(WORKERS) --rows=build/tests.jsonl
	$(BIN)/cmake -S . -B build/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DCMAKE_COMPILE_WARNING_AS_ERROR=$(if $(CI),ON,OFF)
	$(BIN)/cmake --build build/cmake
	$(BIN)/ctest --test-dir build/cmake --output-on-failure

# The tests of arithmetic as on a CPU without AVX, where rounding differs.
ARITHMETIC = $(addprefix tests/test_,attach.py attention.py attached.py divide_rows.py parity.py prompt_gate.py scaled_dot.py users.py)
test-sse: build
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 TORCHINDUCTOR_CACHE_DIR=$(abspath build/inductor-sse) \
	  $(BIN)/python -m pytest $(ARITHMETIC) -n $(WORKERS)

# The tests that need packages of others.
neighbours: build
	$(PIP) $(HELD) transformers open_clip_torch peft accelerate lightning torchao onnx onnxruntime onnxscript
	rm -f build/neighbours.jsonl
	$(BIN)/python -m pytest -n $(WORKERS) --rows=build/neighbours.jsonl \
	  $(addprefix tests/test_,neighbours.py attach.py drop_in.py two_processes.py attached.py)

# BENCH=... are flags of the benchmarks. peft is for the rows of LoRA.
bench: build
	$(PIP) $(HELD) peft
	rm -f $(RESULTS)/cpu.jsonl
	$(BIN)/python -m pytest benchmarks --benchmark-only --device cpu --rows=$(RESULTS)/cpu.jsonl $(BENCH)

# docs/gpu.md. WHEELS=folder installs the wheels in it first; GPU=... are flags of benchmarks/gpu.py.
gpu gpu-more:
	$(if $(WHEELS),-$(PYTHON) -m pip install --quiet --no-index --no-deps $(WHEELS)/*.whl)
	$(PYTHON) benchmarks/gpu.py --results $(RESULTS) $(if $(filter gpu,$@),--seconds 530,--more --seconds 200) $(GPU)

rehearsal: build  # the parts of make gpu on the CPU, tiny
	$(BIN)/python benchmarks/gpu.py --rehearse --most 20 --workers 2 --tests tests/test_scaled_dot.py \
	  --results build/rehearsal $(GPU)

# Tables and plots from benchmarks/results, counted tables, and after `make test` docs/status.md.
report: build
	$(BIN)/python benchmarks/report.py benchmarks/README.md README.md docs/status.md
	$(BIN)/python benchmarks/counts.py docs/counts.md
	test ! -f build/tests.jsonl || $(BIN)/python tests/support_matrix.py docs/status.md build/tests.jsonl \
	  $(wildcard build/neighbours.jsonl $(RESULTS)/gpu.jsonl) $(REPORTS)

guard: build  # UPDATE=--update writes the baseline; needs valgrind and nvcc
	$(BIN)/python benchmarks/lab/guard.py $(UPDATE)

lint format: $(CHOSEN)
	$(BIN)/ruff check $(if $(filter format,$@),--fix) .
	$(BIN)/ruff format $(if $(filter lint,$@),--check) .
	$(BIN)/clang-format $(if $(filter lint,$@),--dry-run --Werror,-i) $(wildcard csrc/* tests/cpp/*.* tests/cpp/*/*)

clean:
	rm -rf .venv* build dist demo_output profile_output gated_prompt/*.so *.egg-info .benchmarks .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
