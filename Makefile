# Two commands do all the set-up: `make run` runs the daemon, `make test` passes the tests.

PYTHON ?= python3
# The interpreters that the tests run on; those that are not installed are left out, with a word.
VERSIONS ?= 3.11 3.12 3.13
ARGUMENTS ?= --config config.example.toml

# The restarts of `make soak`.
RESTARTS ?= 200

.PHONY: run test soak docs evolution bench bench-quick clean

run: .venv/installed
	.venv/bin/echod $(ARGUMENTS)

test:
	PYTHON="$(PYTHON)" VERSIONS="$(VERSIONS)" sh tests/run.sh

# A daemon after the other on one inherited socket, under 200 connects a second, on both loops: four minutes each.
soak: .venv/installed
	.venv/bin/python -m pip install --quiet -r tests/requirements.txt
	SOAK_RESTARTS=$(RESTARTS) .venv/bin/python -m pytest tests/test_sockets.py -k restarts_under_load -s

docs: .venv/installed
	.venv/bin/python docs/reference.py > docs/configuration.md

# The figures of docs/evolution.md; two minutes and more, on a machine that has nothing else to do.
evolution: .venv/installed
	PYTHONPATH=tests .venv/bin/python examples/evolution/measure.py

# echod beside its peers: all that can be built here, half an hour; and who is in the targets, under 90 seconds.
# benchmarks/servers.py says what each peer needs.
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
