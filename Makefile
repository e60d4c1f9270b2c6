# Everything runs in .venv, which the targets make for themselves. PYTHON picks the interpreter (3.10 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test check docs bench bench-inference faults attacks lock audit clean

help:
	@echo "make demo   install, get a model, fine-tune it on bundled data, show answers before and after"
	@echo "make test   install what tests need, check and test everything"
	@echo "make check  format, lint, types, import order, generated docs"
	@echo "make docs   write the generated docs anew"
	@echo "make bench  train beside TRL, LLaMA-Factory and ms-swift: about two hours on 2 cores (after a round it says how long), several GB of environments"
	@echo "make bench-inference  answer beside Transformers and llama.cpp: half an hour"
	@echo "make faults break things for real and write docs/faults.md: half an hour"
	@echo "make attacks attack the commands with strangers' files and settings: ten minutes"
	@echo "make lock   write requirements_lock.txt anew"
	@echo "make audit  look the locked packages up in the database of known weaknesses"
	@echo "make clean  remove .venv and caches"

.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "qingtune needs Python 3.10 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/stable: requirements_stable.txt pyproject.toml .venv/made
	$(BIN)/python -m pip install --quiet -r requirements_stable.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

.venv/dev: requirements_dev.txt .venv/stable
	$(BIN)/python -m pip install --quiet -r requirements_dev.txt
	@touch $@

# The demo ends within eight minutes, those of the installation included.
demo: STARTED := $(shell date +%s)
demo: .venv/stable
	@$(BIN)/python tools/demo.py --started $(STARTED)

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/generate_docs.py --check
	$(BIN)/python tools/check_samples.py

# Tiny models gain nothing by threads: two processes of one thread take 6 minutes, one takes 10.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

docs: .venv/dev
	$(BIN)/python tools/generate_docs.py

bench: .venv/stable
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/train.py --shape qwen3.5-0.8b gemma-3-1b olmo-2-1b --systems LoRA TRL LLaMA-Factory ms-swift

bench-inference: .venv/stable
	$(BIN)/python benchmarks/inference.py

faults: .venv/dev
	$(BIN)/python tools/faults

attacks: .venv/dev
	$(BIN)/python tools/attacks

lock: .venv/made
	$(BIN)/python -m pip install --quiet uv==0.13.9
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/lock.py

audit: .venv/made
	$(BIN)/python -m pip install --quiet pip-audit==2.10.1
	$(BIN)/python -m pip_audit --requirement requirements_lock.txt --no-deps --disable-pip

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
