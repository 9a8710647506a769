# The two commands of this project, and what they stand on. Each sets up first (instant when nothing changed).
PYTHON ?= /usr/bin/python3
export PYTHON
.PHONY: run test check setup clean bench crictl

run: setup ## registry, daemon, a pod with two containers, and a container without a daemon: for real, then cleaned up
	.venv/bin/python -m conformance.demo

test: setup ## the whole suite: unit, contract and integration tests
	hack/test

check: setup ## format, lint, types, import directions, unit tests: under a minute
	hack/check

setup: ## Debian packages, virtual environment, commands
	@hack/setup

bench: setup ## ocid and Debian's containerd in turn, as ratios
	.venv/bin/python -m conformance.bench

crictl: setup ## the scenario of conformance/crictl against ocid (builds crictl the first time)
	.venv/bin/python -m conformance.crictl

clean:
	rm -rf .venv .cache build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
