# Everything a person types in a checkout. `make help` lists it.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FIRMWARE ?= bios
WORKERS ?= 2
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo -E)
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: help setup demo test test-storage test-faults test-live fuzz matrix lint bench docs lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

setup: $(VENV)/.ready ## install the Debian packages and the Python environment (safe to repeat)

$(VENV)/.ready: requirements.lock requirements-dev.lock packages.txt pyproject.toml
	@echo "==> Debian packages (packages.txt)"
	@packages=$$(sed 's/#.*//' packages.txt); \
	if dpkg-query -W -f='$${Status}\n' $$packages 2>/dev/null | grep -c '^install ok installed$$' | grep -qx "$$(wc -w <<<"$$packages")"; \
	then echo "    all there"; \
	else $(SUDO) apt-get update -qq && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $$packages; fi
	@echo "==> Python environment ($(VENV))"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --require-hashes -r requirements.lock -r requirements-dev.lock
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup ## a real Debian machine dies and comes back (FIRMWARE=bios or uefi)
	@$(SUDO) $(BIN)/python -m lab.demo --firmware $(FIRMWARE)

lint: setup ## ruff, mypy strict, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

test: lint ## lint and every test ring, a full BIOS and a full UEFI recovery included, WORKERS (2) at once
	@$(SUDO) $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not matrix and not faults"

test-storage: setup ## every storage stack on every target (an hour); writes docs/reference/storage.md
	@$(SUDO) $(BIN)/python -m lab.stacks

test-faults: setup ## the fault campaigns in full (an hour), WORKERS at once, ending with a table of cases and losses
	@$(SUDO) $(BIN)/pytest -n $(WORKERS) --maxschedchunk 1 tests/faults

test-live: setup ## databases at work on every storage, backed up, lost and restored (two hours); writes docs/reference/live.md
	@$(SUDO) $(BIN)/python -m lab.live

fuzz: setup ## property tests with new examples; atheris on parsers of foreign bytes, FUZZ_SECONDS each, or only on FUZZ
	@$(SUDO) $(BIN)/pytest -q -n $(WORKERS) --hypothesis-profile search tests/property
	@$(BIN)/python -m tests.fuzz.run --seconds $(or $(FUZZ_SECONDS),60) $(FUZZ)

matrix: setup ## the combinations that make test leaves out, but for those of test-storage
	@$(SUDO) $(BIN)/pytest -m matrix --deselect tests/storage/test_stacks.py::test_stack

bench: setup ## capture and restore beside their peers, and the memory of it, in one run (two hours); writes docs/explanation
	@$(SUDO) $(BIN)/python -m bench

docs: setup ## the command reference, from the commands themselves
	@$(BIN)/python -m lab.reference

lock: ## resolve the Python requirements anew (needs uv)
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header pyproject.toml -o requirements.lock
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --group pyproject.toml:dev -c requirements.lock requirements-build.in -o requirements-dev.lock

clean: ## remove what was built in the checkout (not the cache)
	rm -rf out dist $(VENV)
