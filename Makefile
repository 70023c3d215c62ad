.DEFAULT_GOAL := help
.PHONY: help docs install demo test test-slow test-torchao test-openvino test-pruna test-olive test-zoo fuzz zoo-golden coverage-page hosts-page bench peers results lint clean

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
LOG := .venv/install.log

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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

# Two workers with one thread each: more threads than cores make small matrix products many times slower. In the order of
# their names, since by their number of tests the longest files would come last, and one worker would wait for the other.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
test test-slow: export OMP_NUM_THREADS := 1
test test-slow: export MKL_NUM_THREADS := 1
test: lint ## lint, check types, run the tests
	$(BIN)/mypy
	$(BIN)/pytest $(WORKERS)

test-slow: $(INSTALLED) ## the longer cases of what make test runs a few of, and what takes minutes
	$(BIN)/pytest $(WORKERS) -m slow

TORCHAO := build/torchao
test-torchao: $(INSTALLED) ## integer weights of torchao, installed beside .venv (28 MB)
	@test -d $(TORCHAO) || $(BIN)/python -m pip install -q --no-deps --target $(TORCHAO) -c constraints.txt torchao
	PYTHONPATH=$(TORCHAO) $(BIN)/pytest -m torchao tests/integrations/test_torchao.py tests/integrations/test_four_questions.py tests/examples/test_gallery.py

OPENVINO := build/openvino
test-openvino: $(INSTALLED) ## exported models in OpenVINO, installed beside .venv (180 MB)
	@test -d $(OPENVINO) || $(BIN)/python -m pip install -q --no-deps --target $(OPENVINO) -c constraints.txt openvino
	PYTHONPATH=$(OPENVINO) $(BIN)/pytest -m openvino tests/backends/test_openvino.py tests/integrations/test_four_questions.py

PRUNA := build/pruna
test-pruna: $(INSTALLED) ## the cacher of examples/pruna, with Pruna installed beside .venv (300 MB)
	@test -d $(PRUNA) || $(BIN)/python -m pip install -q --no-deps --target $(PRUNA) -r examples/pruna/requirements.txt
	PYTHONPATH=$(PRUNA) $(BIN)/pytest -m pruna tests/integrations/test_pruna.py

OLIVE := build/olive
test-olive: $(INSTALLED) ## the passes of examples/olive, with Microsoft Olive installed beside .venv (150 MB)
	@test -d $(OLIVE) || $(BIN)/python -m pip install -q --no-deps --target $(OLIVE) -r examples/olive/requirements.txt
	PYTHONPATH=$(OLIVE) $(BIN)/pytest -m olive tests/integrations/test_olive.py

fuzz: export OMP_NUM_THREADS := 1
fuzz: $(INSTALLED) ## read 2,000 damaged files and aimed ones; end every writer at every point, and 100 by kill -9
	$(BIN)/pytest -m "fuzz or not fuzz" tests/fuzz

test-zoo zoo-golden coverage-page: export OMP_NUM_THREADS := 1
test-zoo: $(INSTALLED) ## every model of the zoo: all diffusers transformers
	$(BIN)/pytest -n 2 --dist loadfile -m "zoo or not zoo" tests/zoo

zoo-golden: $(INSTALLED) ## write what discovery finds in the zoo to tests/zoo/golden (MODELS="A B" for some)
	PYTHONPATH=tests $(BIN)/python -m zoo.golden $(MODELS)

coverage-page: $(INSTALLED) ## ask the zoo every question; answers in docs/coverage.md (MODELS="A B" renews some)
	PYTHONPATH=tests $(BIN)/python -m zoo.coverage $(MODELS)

hosts-page: export OMP_NUM_THREADS := 1
hosts-page: $(INSTALLED) ## run the tests of every host; the table in docs/integrations.md (HOSTS="A B" renews some)
	PYTHONPATH=tests:$(OPENVINO):$(TORCHAO):$(OLIVE) $(BIN)/python -m project.hosts $(HOSTS)

bench: $(INSTALLED) ## measure speed; results in build/bench
	$(BIN)/lazy-compile bench speed --output build/bench

# Rows are kept in build/results as they are measured: what was stopped goes on where it was, and nothing is measured twice.
RESULTS := build/results
PEERS := build/cache-dit
peers results: export OMP_NUM_THREADS := 1
peers results: export MKL_NUM_THREADS := 1
peers: $(INSTALLED) ## peers' own caches against plans, T=20 (hours; resumes); cache-dit beside .venv (4 MB)
	@test -d $(PEERS) || $(BIN)/python -m pip install -q --no-deps --target $(PEERS) -c constraints.txt cache-dit
	PYTHONPATH=$(PEERS) $(BIN)/lazy-compile bench peers --output $(RESULTS)
	cp $(addprefix $(RESULTS)/,peers.json peers.md peers.png) docs/results

results: peers ## every table and plot of README and docs: many hours of one core; goes on where it was stopped
	$(BIN)/lazy-compile bench quality --output $(RESULTS)
	$(BIN)/lazy-compile bench questions --output $(RESULTS)
	$(BIN)/lazy-compile bench pictures --output $(RESULTS)
	$(BIN)/lazy-compile bench full-size --output $(RESULTS)
	$(BIN)/lazy-compile bench identity --output $(RESULTS)
	$(BIN)/lazy-compile bench overhead --output $(RESULTS)
	$(BIN)/lazy-compile bench speed --output $(RESULTS)
	$(BIN)/lazy-compile bench compile --output $(RESULTS)
	$(BIN)/lazy-compile demo --output $(RESULTS)/demo
	cp $(addprefix $(RESULTS)/,$(MEASURED)) docs/results
	cp $(RESULTS)/questions/*.png docs/results/questions
	cp $(RESULTS)/bench.json docs/results/speed.json
	cp $(RESULTS)/compile.json docs/results/compiled.json
	cp $(RESULTS)/demo/summary.json docs/results/digits.json
	$(BIN)/python docs/images/draw.py
MEASURED := $(addprefix quality,.json .md) $(addprefix questions,.json .md) $(addprefix full_size,.json .md) \
  $(addprefix identity,.json .md) $(addprefix emoji,.json .md .png) emoji_50.png overhead.json

docs: $(INSTALLED) ## the site, in build/site; its tools (110 MB) are installed when first needed
	@$(BIN)/python -c 'import material, mkdocstrings' 2> /dev/null || \
	  $(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean

lint: $(INSTALLED) ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

clean: ## remove build products and caches, keep .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* coverage.xml htmlcov
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
