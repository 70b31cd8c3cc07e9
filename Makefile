# `make demo` and `make test` do all set-up themselves; the first call takes minutes, later ones none.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# The oldest Python that has all versions of constraints.txt; pyproject.toml states what the code needs.
PYTHON_NEEDED := 3.11

INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo demo-text test lint format docs package schema toy drill fuzz audit clean

help:
	@echo "make demo    fine-tune the miniature model and write a report"
	@echo "make demo-text  the same with prompts: all that they name"
	@echo "make test    run the tests"
	@echo "make lint    ruff and pyright"
	@echo "make format  let ruff format and sort"
	@echo "make docs    the documentation as a site, in build/site"
	@echo "make package  a wheel and a source distribution in dist/, installed and run in a clean environment"
	@echo "make drill   do harm to runs at two hundred moments and resume them; takes hours"
	@echo "make fuzz    10,000 cases of damaged and hostile input, then half an hour guided by coverage"
	@echo "make audit   licences and known faults of the pinned packages (asks a server)"
	@echo "make toy     rebuild the miniature world's models in build/toy"
	@echo "make schema  write recipe.schema.json anew, after a change of a configuration record"
	@echo "make clean   remove build products and caches (not runs/, not $(VENV)/)"

demo: $(VENV)/.installed
	$(VENV)/bin/nextscale train src/nextscale/recipes/toy-painting.yaml \
	  --run.output_dir runs/demo --run.overwrite
	$(VENV)/bin/nextscale report runs/demo

demo-text: $(VENV)/.installed
	$(VENV)/bin/nextscale train src/nextscale/recipes/toy-text-attributes.yaml \
	  --run.output_dir runs/demo-text --run.overwrite
	$(VENV)/bin/nextscale report runs/demo-text

# Two workers with one thread each: two threads each would only fight over a small machine's cores.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --select I --fix
	$(VENV)/bin/ruff format

# Its links are checked as well.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet --site-dir build/site

package: $(VENV)/.installed-dev
	rm -rf dist build/clean
	$(VENV)/bin/hatchling build
	$(RUN) -m venv build/clean
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build/clean && bin/nextscale train toy-painting --run.max_steps 1
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps dist/*.tar.gz
	cd build/clean && bin/nextscale report runs/toy-painting

# What --help, completion and overrides read in place of the records, whose import takes seconds.
schema: $(VENV)/.installed
	$(RUN) -c 'from nextscale.config.recipe import write_schema; write_schema()'

toy: $(VENV)/.installed
	$(VENV)/bin/nextscale toy train --output build/toy

fuzz: $(VENV)/.installed-dev
	NEXTSCALE_FUZZ=10000 OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 tests/test_fuzz.py
	$(INSTALL) -e '.[fuzz]'
	for reader in recipe prompts table metrics manifest model; do \
	  $(RUN) drills/fuzz_files.py $$reader --seconds 300 || exit 1; done

# None of what a user installs may be under a licence that asks for more than a notice. One package of the tests
# names its licence in a file alone: MIT, with axe-core, which is MPL 2.0.
audit: $(VENV)/.installed-dev
	$(INSTALL) pip-licenses pip-audit
	$(VENV)/bin/pip-licenses --from=mixed --partial-match --fail-on "GPL;General Public;UNKNOWN" \
	  --ignore-packages axe-playwright-python --summary
	$(VENV)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

# Slow: what it found is committed, and docs/reliability.md tells of it.
DRILL := $(RUN) drills/kill.py --output docs/drills
drill: $(VENV)/.installed-dev
	$(DRILL)/kill-1.json --trials 50
	$(DRILL)/kill-2.json --trials 50 --processes 2
	$(DRILL)/kill-fsdp.json --trials 20 --processes 2 --fsdp
	$(DRILL)/launcher-2.json --trials 20 --processes 2 --fault launcher
	$(DRILL)/signal-2.json --trials 20 --processes 2 --fault signal
	$(DRILL)/disk-1.json --trials 20 --fault disk

clean:
	rm -rf build dist .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: set-up runs again only when what it depends on has changed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(RUN)
	@echo "Installing nextscale into $(VENV) ..."
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(RUN)
	@echo "Installing nextscale and its development tools into $(VENV) ..."
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(RUN):
	@command -v $(PYTHON) >/dev/null || { \
	  echo "nextscale needs Python $(PYTHON_NEEDED) or newer, but '$(PYTHON)' was not found: name one with 'make PYTHON=/path/to/python3'." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(PYTHON_NEEDED)".split("."))))' || { \
	  echo "nextscale needs Python $(PYTHON_NEEDED) or newer, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1): name a newer one with 'make PYTHON=/path/to/python3'." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
