# Everything a person types. `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   ?= coppice-demo

.PHONY: demo test test-fast trust test-slow attacks test-vllm torture fuzz faults check format format-check lint types docs bench bench-peers gpu-rehearsal paper segments-study stateful-study demo-model segment-model stateful-model push-data wheel clean

demo: $(VENV)/.installed  ## run the main job on the embedded model and prompts, audit it, report
	$(BIN)/coppice demo -o $(DEMO)

# A file is one worker's: fixtures of a module (a Prefect server, a Ray cluster) start once. Files
# with few and long tests must not come last, where one worker would wait for the others, so that
# tests/conftest.py names them first; and since a third of the time they wait for processes, there is
# one worker more than the two cores of CI.
test: $(VENV)/.installed-dev  ## the whole test suite
	-$(BIN)/python -m pipeline.engine.kernels.native  # compiled once, and not by each worker
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# By measured CPU time: what is left out starts models, processes, servers or clusters, or compiles.
FAST ?= tests/test_settings.py tests/test_docs.py tests/test_imports.py tests/test_time_limit.py \
	tests/plan/test_radix_tree.py tests/plan/test_plan.py tests/plan/test_sorting.py \
	tests/plan/test_shards.py tests/plan/test_caching.py tests/tokens \
	tests/inputs/test_prompt_source.py tests/storage/test_schema.py tests/inputs/test_partitions.py \
	tests/inputs/test_prompt_template.py tests/inputs/test_conversion.py \
	tests/storage/test_part_file.py tests/storage/test_run_directory.py \
	tests/storage/test_targets.py tests/cli/test_tables.py \
	tests/executor/test_dispatch.py tests/audit/test_sample.py tests/audit/test_evidence.py \
	tests/audit/test_verdict.py tests/report/test_metrics.py tests/report/test_tree.py \
	tests/night/test_cron.py tests/night/test_dates.py tests/night/test_settings.py
test-fast: $(VENV)/.installed-dev  ## under a minute: most of what can break without a process being started
	$(BIN)/python -m pytest -n 2 --dist loadfile $(FAST)

trust: $(VENV)/.installed-dev  ## the figures of trust: audits, strict mode, tortures, fuzzing; half an hour
	$(BIN)/python -m benchmarks.trust

torture: $(VENV)/.installed-dev  ## every file operation fails or kills, and 220 kill -9; about 40 minutes
	$(BIN)/python -m tests.torture $(if $(JSON),--json $(JSON))

test-slow: $(VENV)/.installed-dev  ## what takes minutes: a million rows, thousands of damaged files
	$(BIN)/python -m pytest -m slow

attacks: $(VENV)/.installed-dev  ## hostile inputs, the slow ones as well
	$(BIN)/python -m pytest tests/attacks -m "slow or not slow"

fuzz: $(VENV)/.installed-dev  ## read 20,000 damaged Parquet files and count what comes of them
	$(BIN)/python -m tests.storage.fuzz 20000

# The environment of benchmarks/peers, and in it what coppice needs besides; gigabytes the first time.
test-vllm: $(VENV)/.installed-dev  ## the engine on vLLM, on its build for CPUs
	$(BIN)/python -m benchmarks.peers.vllm_tests

faults: $(VENV)/.installed-dev  ## write docs/faults.md from the tests
	$(BIN)/python -m tests.faults > docs/faults.md

check: $(VENV)/.installed-dev format-check lint types docs test  ## all that must be green before a commit

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .

format-check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev  ## of the product, its tests and its benchmarks
	$(BIN)/mypy

docs: $(VENV)/.installed-dev  ## the site into site/; fails on a link that leads nowhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(VENV)/.installed  ## the figures of docs/figures.md; about 20 minutes, nothing else running
	$(BIN)/python -m benchmarks.main_job

# Their environments are made below .bench, unless COPPICE_BENCH_VLLM / _OPENVINO name some.
bench-peers: $(VENV)/.installed  ## vLLM, OpenVINO, transformers; hours, nothing else running
	$(BIN)/python -m benchmarks.compare
	$(BIN)/python -m benchmarks.grid

# An environment like the card's machine (benchmarks/gpu/card.txt; Python 3.12), in it the script for
# the card and the engine's tests on a CPU, then what is to be carried there. There:
#   python3 -m pip install --no-index --no-deps --target /tmp/site gpu-carried/wheels/*.whl
#   tar -xf gpu-carried/triton.tar.xz -C /tmp
#   TRITON_CACHE_DIR=/tmp/coppice-triton PYTHONPATH=/tmp/site python3 -m benchmarks.gpu --out FOLDER
# Triton keeps absolute paths in its cache, so that its folder must be the same here and there.
GPU_VENV   ?= .venv-gpu
GPU_PYTHON ?= python3.12
CARRIED    ?= gpu-carried
gpu-rehearsal: $(GPU_VENV)/.installed  ## rehearse the script for a card on its versions, on a CPU; gather what it needs
	$(GPU_VENV)/bin/python -m benchmarks.gpu --dry --out $(CARRIED)/rehearsal
	$(GPU_VENV)/bin/python -m pytest tests/engine/test_parts.py tests/engine/test_families.py tests/engine/test_cuda_graphs.py tests/engine/test_triton_kernel.py \
		tests/engine/test_layer_programs.py tests/engine/test_triton_forward.py
	rm -rf /tmp/coppice-triton
	TRITON_CACHE_DIR=/tmp/coppice-triton $(GPU_VENV)/bin/python -m benchmarks.gpu.prewarm
	tar -cJf $(CARRIED)/triton.tar.xz -C /tmp coppice-triton
	$(GPU_VENV)/bin/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		--dest $(CARRIED)/wheels -r benchmarks/gpu/brought.txt
	$(GPU_VENV)/bin/python -m benchmarks.gpu.carried $(CARRIED)

$(GPU_VENV)/.installed: benchmarks/gpu/card.txt benchmarks/gpu/brought.txt
	$(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/gpu/card.txt -r benchmarks/gpu/brought.txt
	touch $@

WORKLOADS ?= ../shared/workloads
PAPER     ?= results
paper: $(VENV)/.installed  ## the paper's experiment, tables and plots into results/; 45 minutes, nothing else running
	$(BIN)/python data/make_paper_prompts.py
	$(BIN)/coppice recycle experiment -o $(PAPER) $(if $(wildcard $(WORKLOADS)),--workloads $(WORKLOADS)) $(FLAGS)

STUDY ?= segments-study
segments-study: $(VENV)/.installed  ## every mode of reused documents on the study's model; an hour, nothing else running
	$(BIN)/coppice segments study -o $(STUDY) $(FLAGS)

STREAMS ?= stateful-study
stateful-study: $(VENV)/.installed  ## every evictor under every policy of positions; half an hour, nothing else running
	$(BIN)/coppice stateful study -o $(STREAMS) $(FLAGS)

segment-model: $(VENV)/.installed  ## train the study's model again, from scratch; half an hour
	$(BIN)/python data/train_segment_model.py

stateful-model: $(VENV)/.installed  ## train the model of the study of conversations again; half an hour
	$(BIN)/python data/train_stateful_model.py

demo-model: $(VENV)/.installed  ## train the embedded model again, from scratch
	$(BIN)/python data/train_tokenizer.py
	$(BIN)/python data/train_model.py
	$(BIN)/python data/evaluate_model.py
	$(BIN)/python data/make_prompts.py

push-data: $(VENV)/.installed  ## put data/ on the Hugging Face hub: REPO=owner/name [FLAGS=--dry-run]
	$(BIN)/python data/publish.py $(REPO) $(FLAGS)

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist site *.egg-info $(DEMO)

# constraints.txt pins versions that were installed together from scratch. A torch that fits and is
# already there is kept; otherwise pip's own configuration decides between a CPU and a CUDA build.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[encoder]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[encoder,dev,docs]'
	touch $@
