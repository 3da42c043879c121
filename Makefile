# `make run` runs the daemon and `make test` runs all checks. Both create the environments that they need.

PYTHON ?= python3
# The versions of Python to test on. Versions that are not installed are skipped with a message.
VERSIONS ?= 3.11 3.12 3.13
ARGUMENTS ?= --config config.example.toml

# Helm, and the version of Kubernetes for which `make manifests` renders the chart.
HELM ?= helm
KUBERNETES = 1.35

# The number of restarts of `make restarts`.
RESTARTS ?= 200

# `make simulate`: the first seed and the number of seeds. KEEP=0,3 runs these steps of the first seed only. MUTANT=NAME
# breaks echod on purpose.
SEED ?= 0
COUNT ?= 200
KEEP ?=
MUTANT ?=

# The duration of `make soak` in seconds.
DURATION ?= 1800

.PHONY: help run install test simulate soak soak-workers restarts syscalls suites docs picture evolution bench bench-quick clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1 /p' $(MAKEFILE_LIST) | while read -r target text; do printf '%-12s %s\n' "$$target" "$$text"; done

run: .venv/installed ## install echod with all extras in .venv, and run it; ARGUMENTS="--listen :7000" replaces the example settings
	.venv/bin/echod $(ARGUMENTS)

install: .venv/installed ## install echod with all extras in .venv only

test: ## check lint and types, and test the wheel on each version of Python; VERSIONS=3.12 selects one
	PYTHON="$(PYTHON)" VERSIONS="$(VERSIONS)" sh tests/run.sh

SIMULATION = PYTHONPATH=tests/support .venv/bin/python tests/simulation

simulate: .venv/installed ## run random scenarios from seeds: SEED=17 COUNT=1, or SEED=0 COUNT=5000 before a release
	.venv/bin/python -m pip install --quiet -r tests/requirements.txt
	$(SIMULATION)/simulate.py --seed $(SEED) --count $(COUNT) $(if $(KEEP),--keep $(KEEP)) $(if $(MUTANT),--mutant '$(MUTANT)')

soak: .venv/installed ## keep a daemon on each loop under a mixed load for 30 minutes
	.venv/bin/python -m pip install --quiet -r tests/requirements.txt
	$(SIMULATION)/soak.py --seconds $(DURATION)

# Each of the two loops takes four minutes.
restarts: .venv/installed ## restart the daemon 200 times on an inherited socket under load
	.venv/bin/python -m pip install --quiet -r tests/requirements.txt
	SOAK_RESTARTS=$(RESTARTS) .venv/bin/python -m pytest tests/integration/test_sockets.py -k restarts_under_load -s

syscalls: .venv/installed ## make each system call of a table fail in the running daemon, in four minutes; needs strace
	.venv/bin/python -m pip install --quiet -r tests/requirements.txt
	SYSCALLS=all .venv/bin/python -m pytest tests/integration/test_system_calls.py

# Each of the two loops takes three minutes.
soak-workers: .venv/installed ## kill workers, reload and restart 60 times under load
	.venv/bin/python -m pip install --quiet -r tests/requirements.txt
	SOAK_ROUNDS=60 .venv/bin/python -m pytest tests/integration/test_workers_soak.py -s

docs: .venv/installed ## generate the settings reference and the chart's tables of values
	.venv/bin/python docs/reference.py > docs/reference/configuration.md
	.venv/bin/python docs/values.py

# tlsfuzzer is fetched with git. testssl.sh is a package of the distribution.
suites: .venv/installed ## run the scripts of tlsfuzzer and testssl.sh against the daemon; needs git, openssl and testssl.sh
	PYTHONPATH=tests/support .venv/bin/python tests/foreign/suites.py build/suites

.PHONY: site manifests

site: ## build the documentation site in build/docs/site (needs npm, which provides Mermaid)
	[ -x build/docs/venv/bin/python ] || $(PYTHON) -m venv build/docs/venv
	build/docs/venv/bin/python -m pip install --quiet -r docs/requirements.txt
	build/docs/venv/bin/python docs/make_site.py build/docs

manifests: ## render the Helm chart to packaging/kubernetes, for clusters without Helm
	mkdir -p build
	{ echo "# Written by \`make manifests\` from packaging/helm/echod: change that."; $(HELM) template echod packaging/helm/echod \
		--skip-tests --kube-version $(KUBERNETES); } > build/echod.yaml
	mv build/echod.yaml packaging/kubernetes/echod.yaml

picture: .venv/installed ## draw the terminal picture of the README; needs the ports 8000 and 8001
	PYTHONPATH=tests/support .venv/bin/python docs/images/picture.py

# Measure the figures of docs/explanation/evolution.md. This takes more than two minutes and needs an otherwise idle machine.
evolution: .venv/installed ## measure the servers in examples/evolution
	PYTHONPATH=tests/support .venv/bin/python examples/evolution/measure.py

# Compare echod with its peers. `bench` runs all that can be built here and takes half an hour. `bench-quick` runs only
# those with targets and takes less than 90 seconds. benchmarks/servers.py lists the requirements of each peer.
bench: .venv/installed ## compare echod with every peer that can be built here, in half an hour
	.venv/bin/python -m pip install --quiet -r benchmarks/requirements.txt
	.venv/bin/python benchmarks/run.py --output benchmarks/results/full.json
	.venv/bin/python benchmarks/report.py benchmarks/results/full.json

bench-quick: .venv/installed ## compare echod with the peers that have targets, in 90 seconds
	.venv/bin/python -m pip install --quiet -r benchmarks/requirements.txt
	.venv/bin/python benchmarks/run.py --quick --output build/bench/quick.json
	.venv/bin/python benchmarks/report.py build/bench/quick.json build/bench

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"echod needs Python 3.11 or later, and $(PYTHON) is %d.%d: use make PYTHON=python3.12" % sys.version_info[:2])'
	@echo 'Installing echod in .venv. This may take a minute.'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[all]'
	@echo 'Installed in .venv. To have the command echod in a terminal, type there: . .venv/bin/activate'
	@touch $@

clean: ## remove all environments and build results
	rm -rf .venv .venv-test-* build dist .coverage* .mypy_cache .pytest_cache .ruff_cache
