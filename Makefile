# Two commands matter: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3.11
CONFIG ?= conf/flights.yaml
PORT ?= 5000
BIN := .venv/bin
# The lock file also pins uv, which installs the rest.
UV := $(shell sed -n 's/^\(uv==[0-9.]*\).*/\1/p' requirements.lock)

.PHONY: help env airflow-env airflow-demo demo demo-by-day ui wheel cluster-demo test \
	test-fast bench check format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: .venv/.done ## make .venv from the lock file

.venv/.done: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "Error: Python 3.11 is needed: install it, or name it as make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Making .venv (about 6 GB, a minute or two)"
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV)
	$(BIN)/uv pip install --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-build-isolation --no-deps -e .
	@touch $@

airflow-env: .airflow-venv/.done ## make .airflow-venv: Airflow, apart from .venv

.airflow-venv/.done: requirements-airflow.lock | env
	@echo "Making .airflow-venv (about 0.5 GB)"
	$(PYTHON) -m venv --clear .airflow-venv
	$(BIN)/uv pip install --python .airflow-venv/bin/python --require-hashes -r requirements-airflow.lock
	@touch $@

airflow-demo: airflow-env ## three days of the flights through Airflow, on a cluster of this machine
	rm -rf workspace/airflow_demo
	$(BIN)/python tests/standalone_cluster.py workspace/airflow_demo/cluster -- \
		$(BIN)/python tests/local_airflow.py workspace/airflow_demo/airflow 2013-03-01 2013-03-03

demo: env ## flights of 2013: the whole pipeline, result table, report
	$(BIN)/lc-spark run conf/flights.yaml
	@echo "Next: 'make ui' opens MLflow; 'make demo-by-day' runs the same flights split by time"

demo-by-day: env ## the same flights, split by time
	$(BIN)/lc-spark run conf/flights_by_day.yaml

ui: env ## open MLflow on the runs of CONFIG (make ui CONFIG=... PORT=...)
	$(BIN)/lc-spark ui $(CONFIG) --port $(PORT)

wheel: env ## the library as dist/*.whl, and as dist/lc_spark.zip for spark-submit --py-files
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation --wheel-dir dist .
	cp dist/lc_spark-*.whl dist/lc_spark.zip
	rm -rf build

cluster-demo: wheel ## two days of the daily pipeline by spark-submit, on a cluster of processes
	rm -rf workspace/cluster_demo
	$(BIN)/python tests/standalone_cluster.py workspace/cluster_demo/cluster -- tests/cluster_days.sh

# Two processes: a test that waits for a job's start leaves a core idle. A file's tests share what
# they run on; in the order of their names, the longest file is among the first.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: check airflow-env ## everything that CI checks
	$(PYTEST) --durations=15

test-fast: env ## the tests that take seconds
	$(PYTEST) -m "not slow"

bench: demo ## the benchmarks of scale and speed, one after the other: hours on a quiet machine
	$(BIN)/python tests/benchmarks/bench.py

check: env ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: env ## resolve the dependencies again into the two lock files
	$(BIN)/uv pip compile --quiet pyproject.toml --extra dev --universal --python-version 3.11 \
		--generate-hashes --no-header --no-annotate -o requirements.lock
	$(BIN)/uv pip compile --quiet requirements-airflow.in --universal --python-version 3.11 \
		--generate-hashes --no-header --no-annotate -o requirements-airflow.lock

clean: ## remove what the demo made
	rm -rf workspace
