.DEFAULT_GOAL := help
.PHONY: help setup demo up test test-browser check lint types fmt protos docs bench report clean

VENV := .venv
PY := $(VENV)/bin/python
BIN := $(abspath $(VENV)/bin)
export PATH := $(BIN):$(PATH)

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

# One process a part: gRPC allows one event loop a process for long, and each test has its own.
PARTS := unit component/worker component/simulator component/predictor component/router component/sdk \
  component/gateway cluster
# Children are always new programs, never forks that go on using gRPC; its fork handlers have crashed long test runs.
TEST := GRPC_ENABLE_FORK_SUPPORT=false $(PY) -m pytest -q

test: setup ## Everything: lint, types, unit, component and cluster tests with real vLLM on CPU
	$(MAKE) lint types
	set -e; for part in $(PARTS); do echo "tests/$$part"; $(TEST) tests/$$part; done
	@echo "Not run: tests/browser, the console in Chromium: make test-browser"

test-browser: setup ## The console in headless Chromium, under load (apt-get install chromium chromium-driver)
	@command -v chromium chromedriver || { echo "needs Chromium: apt-get install chromium chromium-driver"; exit 1; }
	$(TEST) tests/browser

check: setup ## Lint, types and fast tests, under a minute
	$(MAKE) lint types
	$(TEST) -m "not engine and not cluster"

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

bench: setup ## What the router adds per token (about ten minutes; wants a quiet machine)
	$(PY) -m demo.build_model --out .cache/demo-model
	$(PY) -m bench.overhead --model .cache/demo-model --workers 1 --out bench/results/overhead-one-engine.json
	$(PY) -m bench.overhead --model .cache/demo-model --workers 8 --routers 1 --out bench/results/overhead-eight-engines.json

report: setup ## Write docs/report.md from bench/results
	$(PY) -m bench.report

clean: ## Remove the environment, caches and run files
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis run
