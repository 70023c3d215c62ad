.DEFAULT_GOAL := help
.PHONY: help install demo test bench results lint clean

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
LOG := .venv/install.log

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv with everything that the other targets need (once)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: saw Python %d.%d, expected 3.11 or newer; try: make PYTHON=python3.11" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (log: $(LOG))"
	@{ $(BIN)/python -m pip install -c constraints.txt torch && \
	   $(BIN)/python -m pip install -c constraints.txt -e '.[dev]'; } > $(LOG) 2>&1 || { tail -n 40 $(LOG); exit 1; }
	@touch $@

demo: $(INSTALLED) ## run the demonstration; results in build/demo
	$(BIN)/lazy-compile demo --output build/demo

# Two workers with one thread each: more threads than cores make small matrix products many times slower.
test: export OMP_NUM_THREADS := 1
test: export MKL_NUM_THREADS := 1
test: lint ## lint, check types, run the tests
	$(BIN)/mypy
	$(BIN)/pytest -n 2

bench: $(INSTALLED) ## measure speed; results in build/bench
	$(BIN)/lazy-compile bench speed --output build/bench

results: $(INSTALLED) ## measure quality; results in docs/results
	$(BIN)/lazy-compile bench quality --output docs/results

lint: $(INSTALLED) ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

clean: ## remove build products and caches, keep .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* coverage.xml htmlcov
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
