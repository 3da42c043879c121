# `make run` runs the daemon and `make test` runs all checks. Both create the environments that they need.

PYTHON ?= python3
# The versions of Python to test on. Versions that are not installed are skipped with a message.
VERSIONS ?= 3.11 3.12 3.13
ARGUMENTS ?= --config config.example.toml

# The number of restarts of `make soak`.
RESTARTS ?= 200

.PHONY: run test soak docs evolution bench bench-quick clean

run: .venv/installed
	.venv/bin/echod $(ARGUMENTS)

test:
	PYTHON="$(PYTHON)" VERSIONS="$(VERSIONS)" sh tests/run.sh

# Restart the daemon on an inherited socket under 200 connects per second. Each of the two loops takes four minutes.
soak: .venv/installed
	.venv/bin/python -m pip install --quiet -r tests/requirements.txt
	SOAK_RESTARTS=$(RESTARTS) .venv/bin/python -m pytest tests/integration/test_sockets.py -k restarts_under_load -s

docs: .venv/installed
	.venv/bin/python docs/reference.py > docs/reference/configuration.md

# Measure the figures of docs/explanation/evolution.md. This takes more than two minutes and needs an otherwise idle machine.
evolution: .venv/installed
	PYTHONPATH=tests/support .venv/bin/python examples/evolution/measure.py

# Compare echod with its peers. `bench` runs all that can be built here and takes half an hour. `bench-quick` runs only
# those with targets and takes less than 90 seconds. benchmarks/servers.py lists the requirements of each peer.
bench: .venv/installed
	.venv/bin/python -m pip install --quiet -r benchmarks/requirements.txt
	.venv/bin/python benchmarks/run.py --output benchmarks/results/full.json
	.venv/bin/python benchmarks/report.py benchmarks/results/full.json

bench-quick: .venv/installed
	.venv/bin/python -m pip install --quiet -r benchmarks/requirements.txt
	.venv/bin/python benchmarks/run.py --quick --output build/bench/quick.json
	.venv/bin/python benchmarks/report.py build/bench/quick.json build/bench

.venv/installed: pyproject.toml $(shell find src -name '*.py')
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet .
	touch $@

clean:
	rm -rf .venv .venv-test-* build dist .coverage* .mypy_cache .pytest_cache .ruff_cache
