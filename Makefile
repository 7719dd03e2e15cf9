# `make help` lists the targets. Needed: python3 (3.11 – 3.14), make and a package index.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory
.PHONY: help up test test-all images-test book bench setup export check requirements clean

UV_VERSION := 0.13.9
export UV_PYTHON_DOWNLOADS := never
export MLFLOW_DISABLE_TELEMETRY := true
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# OpenMP's threads shall not spin while others need the core; nbs/38_tracking.ipynb has the figures.
export GOMP_SPINCOUNT ?= 1000
# An activated environment of another project must not be filled by ours.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME
# Without byte code every process compiles what it imports: 7 s instead of 2 s for MLflow, with every kernel.
unexport PYTHONDONTWRITEBYTECODE

# Caches and kernels need a home that can be written; a container's user may have none.
ifeq ($(shell test -n "$${HOME:-}" && mkdir -p "$$HOME" 2>/dev/null && test -w "$$HOME" && echo yes),)
export HOME := $(CURDIR)/.tools/home
endif
# The Python that makes the environment is looked for outside of it.
FIND_PYTHON := PATH='$(PATH)' tools/find-python
PYTHON ?= $(shell $(FIND_PYTHON))
export PATH := $(CURDIR)/.venv/bin:$(PATH)

UV := .tools/bin/uv
SOURCES := $(wildcard nbs tests tools benchmarks book)
# Notebooks that are used in JupyterLab: run cell by cell in a real kernel.
KERNEL_NOTEBOOKS := $(sort $(wildcard nbs/index.ipynb nbs/explore/*.ipynb))

help:  ## Show this list
	@echo "usage: make TARGET"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS=$$'\t' read -r name text; do \
	    printf '  %-13s %s\n' "$$name" "$$text"; done

up: setup  ## Set up, train a first model if there is none, start all services; Ctrl-C stops them
	@exec income-mlops up

test: setup check  ## Set up and run the checks and the tests
	@$(call run-tests,not full)

test-all: setup check  ## The same with faults, load, stores and containers
	@$(call run-tests,full or not full)

images-test: setup  ## Build the images and run both Compose files with podman; as root
	@echo "── images"; PODMAN_COMPOSE="$(CURDIR)/$(UV) tool run --quiet --from podman-compose==1.6.0 podman-compose" \
	    python tools/images_test.py

book: setup  ## Build the book into book/_build/html; `make up` serves it
	@echo "── the book; the first time every notebook is executed: some minutes"
	@jupyter-book build . --config book/_config.yml --toc book/_toc.yml --path-output book \
	    --all --warningiserror --nitpick --keep-going --quiet
	@echo "── book/_build/html/index.html"

bench: .venv/.stamp-bench  ## Run the benchmarks one after another
	@status=0; for file in benchmarks/[a-z]*.py; do echo "── $$file"; python "$$file" || status=1; done; exit $$status

setup: .venv/.stamp  ## Create the environment in .venv from uv.lock

export:  ## Write the modules and the README from the notebooks and clean the notebooks
	@nbdev-export && nbdev-clean && python tools/readme.py

check: setup  ## Notebooks and modules in sync, lint, types
	@echo "── notebooks and modules in sync"; python tools/check_sync.py; python tools/readme.py --check
	@echo "── ruff"; ruff check --quiet $(SOURCES)
	@echo "── mypy"; mypy --no-error-summary

requirements: $(UV_STAMP)  ## Export requirements.txt from uv.lock
	@{ sed '/^[^#]/,$$d' requirements.txt; \
	   $(UV) export --quiet --frozen --no-header --no-annotate --no-hashes --no-emit-project \
	       --extra training --extra serving --extra tracking --extra dashboard --extra docs; } > .tools/requirements
	@mv .tools/requirements requirements.txt

clean:  ## Remove the environment and the caches; data and var/ stay
	rm -rf .venv .tools .mypy_cache .ruff_cache *.egg-info

# Cells first, then modules: pytest's summary is the last line. What notebooks write is thrown away.
# Files are shared out among two processes, as much of a test is waiting for a service; so what a test promises in
# seconds holds on a busy machine.
AT_ONCE := -n 2 --dist loadfile --no-loadscope-reorder
define run-tests
state=$$(mktemp -d); trap 'rm -rf "$$state"' EXIT; \
echo "── notebooks"; DYNACONF_PATHS__STATE="$$state" nbdev-test nbs --skip-folder-re '^([_.]|pipelines|explore)' --skip-file-re '^([_.]|dashboard|index)'; \
$(if $(KERNEL_NOTEBOOKS),echo "── notebooks in a kernel"; DYNACONF_PATHS__STATE="$$state" pytest -q $(AT_ONCE) --nbval-lax $(KERNEL_NOTEBOOKS);) \
echo "── tests"; pytest -q $(AT_ONCE) -m '$(1)'
endef

UV_STAMP := .tools/uv-$(UV_VERSION)
$(UV_STAMP):
	@if [ -z "$(PYTHON)" ]; then $(FIND_PYTHON) --explain; exit 1; fi
	@echo "── uv $(UV_VERSION)"
	@rm -rf .tools; $(PYTHON) -m venv .tools; mkdir -p "$$HOME"
	@.tools/bin/python -m pip install --quiet "uv==$(UV_VERSION)"
	@touch $@

.venv/.stamp: $(UV_STAMP) uv.lock pyproject.toml
	@echo "── environment from uv.lock"
	@$(UV) sync --quiet --frozen --extra dev --python .tools/bin/python
	@touch $@

.venv/.stamp-bench: .venv/.stamp
	@$(UV) sync --quiet --frozen --extra dev --extra bench --python .tools/bin/python
	@touch $@
