# Set-up needs Python 3.11 to 3.13 and make, nothing else. `make` alone lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOCK_OPTIONS := --universal --python-version 3.11 --upgrade --no-header --no-annotate --no-emit-index-url --no-emit-find-links
export DO_NOT_TRACK = 1
export MLFLOW_DISABLE_TELEMETRY = true
export TF_CPP_MIN_LOG_LEVEL ?= 2

.DEFAULT_GOAL := help
.PHONY: help run test lint format bench ui serve image viz lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.12 run")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -c 'from htr_pipeline.core.ctc.decoding import warm_up; warm_up()' # compiled now, no search waits for it
	@touch $@

run: $(INSTALLED) ## the main job on the demo data: from rendered handwriting to a registered recogniser and a report
	$(BIN)/kedro run

test: $(INSTALLED) ## all tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED) ## ruff, import contracts, mypy on core and io
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(INSTALLED) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## benchmarks beside what else is installed
	$(BIN)/python benchmarks/ctc_loss.py
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/validation.py
	$(BIN)/python benchmarks/features.py --synthetic 20000
	$(BIN)/python benchmarks/features.py --synthetic 5000
	$(BIN)/python benchmarks/training.py --minutes 5

ui: $(INSTALLED) ## MLflow's pages on http://127.0.0.1:5000: runs, models, reports
	$(BIN)/mlflow server --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

serve: MLFLOW_TRACKING_URI ?= sqlite:///mlflow.db
serve: MODEL ?= models:/htr@champion
serve: $(INSTALLED) ## the champion on http://127.0.0.1:5001/invocations: line images in, texts out (README)
	@test "$(MLFLOW_TRACKING_URI)" != sqlite:///mlflow.db || test -f mlflow.db || { echo "There is no model yet: make run trains and registers one."; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" MLFLOW_TRACKING_URI="$(MLFLOW_TRACKING_URI)" $(BIN)/mlflow models serve -m "$(MODEL)" --env-manager local --host 127.0.0.1 --port 5001

image: ## the project as a container image, for Kubeflow (docs/deployment.md); with GPU=1 for GPUs
	docker build --tag htr_pipeline --build-arg GPU="$(GPU)" \
		--build-arg COMMIT="$$(git rev-parse HEAD)$$(test -z "$$(git status --porcelain)" || echo -dirty)" .

viz: $(INSTALLED) ## the pipelines drawn by kedro-viz on http://127.0.0.1:4141
	$(BIN)/kedro viz run --host 127.0.0.1 --port 4141

lock: $(INSTALLED) ## resolve the newest releases into the lock files
	$(BIN)/uv pip compile pyproject.toml --all-extras $(LOCK_OPTIONS) -o requirements.lock
	$(BIN)/uv pip compile benchmarks/requirements.in -c requirements.lock $(LOCK_OPTIONS) -o benchmarks/requirements.lock

clean: ## remove results, runs and models (not the sources in data/01_raw)
	rm -rf data/0[2-8]* data/01_raw/demo data/01_raw/unpacked data/.lock data/.mlflow_run.json data/.retrained.json mlflow.db mlartifacts
