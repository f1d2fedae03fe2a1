# Every target creates .venv from the lock first where it is missing or old; see requirements/install.py.
PYTHON ?= python3.11
ifeq (, $(shell command -v $(PYTHON) 2>/dev/null))
PYTHON := python3
endif
BIN := .venv/bin

REQUESTS ?= 100000
GPU_PYTHON ?= python3

.PHONY: help setup demo test test-long fuzz check fix bench bench-full serve gpu-smoke compat lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: ## make .venv from the locks, install hotshoe into it, prepare the embedded base
	@$(PYTHON) requirements/install.py

demo: setup ## train, publish, serve, ask, swap and export on the embedded base; about 18 minutes on two AVX2 cores
	@$(BIN)/python -m examples.agent_routing.demo

test: setup ## all tests that this machine can run, less the long ones
	@$(BIN)/python -m tests.lanes

test-long: setup ## every kill point, long fuzzing, many seeds
	@$(BIN)/python -m tests.lanes -m long

fuzz: setup ## atheris over the readers of adapters, where installed; schemathesis over the OpenAPI, REQUESTS=100000, an hour
	@if $(BIN)/python -c 'import atheris' 2>/dev/null; then $(BIN)/python -m tests.fuzz.parsers -max_total_time=300; \
	else echo 'atheris is not installed, so the readers of adapters are not fuzzed here (pip install atheris)'; fi
	@$(BIN)/python -m tests.surface.fuzz --requests $(REQUESTS)

check: setup ## lint, format check and strict types; the Dockerfile and the compose files too
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/hadolint Dockerfile
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec deploy/compose.yaml deploy/compose.gpu.yaml
	@$(BIN)/mypy

fix: setup ## format and apply the safe lint fixes
	@$(BIN)/ruff check --fix-only --quiet . ; $(BIN)/ruff format .

bench: setup ## serving many adapters beside stock vLLM and llama.cpp, ten minutes; prints tables, asserts nothing
	@$(BIN)/python -m bench many --preset short

bench-full: setup ## the same with every load and peer, about an hour and a half; goes on where it was stopped; DOCS=1 puts it into docs/
	@$(BIN)/python -m bench many --preset full $(if $(DOCS),--docs)

serve: setup ## serve the embedded base on http://127.0.0.1:8000
	@$(BIN)/hotshoe serve

gpu-smoke: ## on a GPU machine, with vLLM and hotshoe installed for GPU_PYTHON: the whole run, a report to paste; BASE=OWNER/NAME@COMMIT
	@$(GPU_PYTHON) -m deploy.gpu_smoke $(if $(BASE),--base $(BASE))

compat: setup ## whether the newest vLLM for GPUs (340 MB, downloaded, not installed) has what our plugins use
	@$(BIN)/python -m deploy.compat

lock: setup ## resolve requirements/*.in into the locks again, that of the GPU image too
	@$(BIN)/python requirements/lock.py

clean: ## remove the environment and what runs left here; the state and cache folders are the user's and stay
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build demo-out *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
