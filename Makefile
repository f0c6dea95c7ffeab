.DEFAULT_GOAL := help
.PHONY: help setup test fast long fuzz lint format lowest audit

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install everything into the current environment
	python -m pip install -r requirements-dev.txt -r requirements-extras.txt

test: ## the tests, as CI runs them
	python -m pytest -q

fast: ## the tests that take seconds
	python -m pytest -q -m "not slow and not long"

long: ## the tests that CI leaves out, above all every benchmark in a tiny setting
	python -m pytest -q -m long

fuzz: ## the property tests with fresh seeds and 2,000 examples each; what they find becomes an @example
	FUZZ=1 python -m pytest -q -m hypothesis

lint: ## style and types
	ruff check . && ruff format --check . && mypy .

format: ## put the code into shape
	ruff check --fix . && ruff format .

lowest: ## the tests with the lowest versions that requirements.txt admits, in an environment of their own
	bash .ci/lowest

audit: ## known vulnerabilities among the installed packages (asks the package index)
	python -m pip install -q pip-audit && python -m pip_audit -r requirements.txt
