# What the README tells people to type. Every target makes the virtual environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: quickstart test check format bench docs clean

quickstart: $(VENV)/.user
	$(BIN)/tessella quickstart --out quickstart

test: $(VENV)/.developer
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

check: $(VENV)/.developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.developer
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.benchmarks
	for each in quantizers large_codebook train_step linear sampling; do $(BIN)/python benchmarks/$$each.py || exit 1; done

docs: $(VENV)/.documentation
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.user: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[eval,track]'
	touch $@

$(VENV)/.developer: $(VENV)/.user
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.benchmarks: $(VENV)/.developer
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	touch $@

$(VENV)/.documentation: $(VENV)/.user
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist quickstart site *.egg-info
