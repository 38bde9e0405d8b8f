# One command sets up and does the job: `make demo` or `make test`. `make` alone lists the others.

PYTHON ?= python3
VENV ?= .venv
# Where to look for torch beside the usual index; see CONTRIBUTING.md, "Which build of torch".
TORCH_INDEX ?=
# Handed to the command that runs, as in: make test ARGS="-k dora -x"
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
KERNELS := $(VENV)/.kernels

# transformers and the Hub must not phone home while tests and documentation run.
export HF_HUB_DISABLE_TELEMETRY := 1
# mkdocs-material prints a notice about its successor on every build.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format docs bench kernels clean distclean

help:  ## this list
	@printf 'lorakit: each command sets up %s by itself the first time.\n\n' '$(VENV)'
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\nVariables: PYTHON=%s  VENV=%s  TORCH_INDEX=%s  ARGS=%s\n' '$(PYTHON)' '$(VENV)' '$(TORCH_INDEX)' '$(ARGS)'
	@printf 'On Linux without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves gigabytes.\n'

setup: $(READY) $(KERNELS)  ## make the virtual environment with the pinned packages

# Pins and extras decide what is installed, so they decide when to install again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  printf 'The pinned set-up needs Python 3.11 or newer; "%s" is not. Try: make PYTHON=python3.12 ...\n' '$(PYTHON)'; exit 1; }
	@printf 'Setting up %s: about 350 MB to fetch the first time, from the cache after that.\n' '$(VENV)'
	$(PYTHON) -m venv --prompt lorakit $(VENV)
	@# --no-compile: Python compiles what is imported, when it is; compiling all of torch first costs half a minute.
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[demo,dev]'
	@touch $@

# Quicker adapters on the CPU, where there is a compiler; kept in the user's cache. Without one, all works as well.
$(KERNELS): $(READY) $(wildcard $(addprefix src/lorakit/ops/native/*.,cpp h py))
	@$(BIN)/python -m lorakit kernels build || printf 'Going on without the compiled product.\n'
	@touch $@

kernels: $(READY)  ## build the compiled low-rank product again
	$(BIN)/python -m lorakit kernels build --force

demo: $(READY) $(KERNELS)  ## fine-tune a real 135M model on text-to-SQL, merge, save and reload it
	$(BIN)/python -m lorakit demo $(ARGS)

test: $(READY) $(KERNELS)  ## run the tests (without those marked slow or gpu)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

check: $(READY)  ## format, lint, types, import directions, documentation build
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports
	$(BIN)/python -m mkdocs build --strict --quiet

format: $(READY)  ## rewrite the source in the house format and mend what lint can
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(READY)  ## build the documentation into site/
	$(BIN)/python -m mkdocs build --strict
	@printf 'Open site/index.html, or see it live: %s -m mkdocs serve\n' '$(BIN)/python'

bench: $(READY) $(KERNELS)  ## measure lorakit beside PEFT; writes benchmarks/results/ and the table in docs/benchmarks.md
	$(BIN)/python -m benchmarks.run_all $(ARGS)

clean:  ## remove what builds, tests and checks wrote; keep the virtual environment
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## clean, and remove the virtual environment too
	rm -rf $(VENV)
