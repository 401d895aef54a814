# make story PROMPT="Once upon a time, there was a brave little mouse"    make test    make lab    (and: make help)
#
# Each sets up .venv from requirements.lock the first time, and again when the lock changes; .ci/set_up.py does it. What
# tests or builds the site adds requirements-test.lock, which a learner need not have.

BIN := .venv/bin
READY := .venv/share/neox/ready
TEST_READY := .venv/share/neox/ready-test
TOKENIZER := .venv/share/neox/20B_tokenizer.json

# The prompt goes to the command through the environment, as it was typed: make and the shell must not read it, or
# quotes and dollar signs in a story would be commands.
PROMPT ?= Once upon a time
unexport PROMPT
export NEOX_PROMPT := $(value PROMPT)
export NEOX_20B_TOKENIZER := $(CURDIR)/$(TOKENIZER)

NBVAL ?= --nbval

# Small models gain nothing from threads that wait for each other: one thread a process, and files side by side.
SIDE_BY_SIDE ?= -n auto --maxprocesses 4 --dist loadfile
pytest notebooks: export OMP_NUM_THREADS = 1

.PHONY: help story test lint pytest notebooks outputs lab lab-refresh playground slides site clean
.NOTPARALLEL:

help:
	@echo 'make story PROMPT="..."   a story from the shipped model (STORY_ARGS="--temperature 0.8 --seed 3" varies it)'
	@echo 'make lab                  JupyterLab on your own copy of the notebooks, notebooks/mine (LAB_ARGS=...)'
	@echo 'make lab EDITION=student  the same without answers, in notebooks/student'
	@echo 'make lab-refresh          put newer originals beside your copies, as NAME.new.ipynb'
	@echo 'make slides LESSON=16     a lesson as live slides from your copy; NOTEBOOK=02 for a notebook (SLIDES_ARGS=...)'
	@echo 'make playground           the prompt playground as a page of its own, on this machine (PLAYGROUND_ARGS=...)'
	@echo 'make site                 the notebooks as a web site to read anywhere: build/site/index.html'
	@echo 'make site FROM=OUT        the same without answers, from a student edition: build/student-site/index.html'
	@echo 'make test                 lint, pytest (TEST_ARGS=...) and notebooks, each of which is a target of its own'
	@echo 'make notebooks            run every notebook and compare its outputs with the stored ones'
	@echo 'make outputs              for authors: run the notebooks and store their outputs (NOTEBOOKS=...)'
	@echo 'make clean                remove .venv; the next command sets it up anew'

story: $(READY)
	@$(BIN)/python -m neox_lib generate $(STORY_ARGS) -- "$$NEOX_PROMPT"

test: lint pytest notebooks

lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

pytest: $(TEST_READY) $(TOKENIZER)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(TEST_ARGS)

# Every notebook is run from top to bottom and its outputs are compared with the stored ones. NBVAL=--nbval-lax runs
# them without comparing, for systems where the last digits differ. Nobody's earlier answers may show in the outputs.
notebooks: $(TEST_READY) $(TOKENIZER)
	@progress=$$(mktemp -d) && trap 'rm -rf "$$progress"' EXIT && NEOX_PROGRESS="$$progress/progress.json" \
		$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) $(NBVAL) --nbval-current-env --nbval-cell-timeout=120 \
		--nbval-sanitize-with=tests/nbval_sanitize.cfg notebooks/[0-9]*.ipynb

# For authors: run the notebooks and keep their outputs, after a piece of the library was pulled into them, say.
outputs: $(TEST_READY) $(TOKENIZER)
	@progress=$$(mktemp -d) && trap 'rm -rf "$$progress"' EXIT && NEOX_PROGRESS="$$progress/progress.json" \
		$(BIN)/python -m neox_lib store-outputs $(or $(NOTEBOOKS),$(wildcard notebooks/[0-9]*.ipynb))

COPY = learner-copy $(if $(EDITION),--edition $(EDITION))

lab: $(READY)
	@$(BIN)/python -m neox_lib $(COPY)
	$(BIN)/python -m jupyterlab $(LAB_ARGS) notebooks/$(or $(EDITION),mine)

# What slides lack for widgets, also behind the RISE button of a notebook in JupyterLab; and no news of Jupyter's.
lab: export JUPYTER_PATH := $(CURDIR)/neox_lib/assets/slides$(if $(JUPYTER_PATH),:$(JUPYTER_PATH))
lab: export JUPYTER_CONFIG_PATH := $(CURDIR)/neox_lib/assets/lab$(if $(JUPYTER_CONFIG_PATH),:$(JUPYTER_CONFIG_PATH))

slides: $(READY)
	@$(BIN)/python -m neox_lib learner-copy
	$(BIN)/python -m neox_lib slides $(if $(LESSON),--lesson $(LESSON),$(or $(NOTEBOOK),"")) $(SLIDES_ARGS)

lab-refresh: $(READY)
	@$(BIN)/python -m neox_lib $(COPY) --refresh

playground: $(READY)
	$(BIN)/python -m neox_lib playground $(PLAYGROUND_ARGS)

# From a student edition, FROM, it has a folder of its own: nothing of the whole series may be left in it.
SITE := build/$(if $(FROM),student-site,site)

site: $(TEST_READY)
	@$(BIN)/python -m sphinx -q -W --keep-going $(if $(FROM),-E -D 'edition=$(FROM)') -d $(SITE)-parts notebooks $(SITE)
	@echo 'Open $(CURDIR)/$(SITE)/index.html'

clean:
	rm -rf .venv

# The first Python that is new enough; PYTHON=... comes before the others.
$(READY): requirements.lock pyproject.toml .ci/set_up.py
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
		if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then \
			exec $$python .ci/set_up.py; \
		fi; \
	done; \
	echo 'No Python 3.11 to 3.14 found. Install one, or name it: make PYTHON=/path/to/python3.12 ...' >&2; exit 1

$(TEST_READY): requirements-test.lock $(READY)
	@$(BIN)/python .ci/set_up.py test

$(TOKENIZER): | $(READY)
	@$(BIN)/python .ci/set_up.py tokenizer
