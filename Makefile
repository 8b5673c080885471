# Everything starts from a bare Python >= 3.11: each target installs what it needs into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= default
OUT ?= demo-out
EXTRAS := cpu,training,timm,tensorboard,parquet,remote,ray,milvus,otel,demo,dev

.PHONY: help venv demo test crash-test soak check format protos bench-peers clean
help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@
venv: $(BIN)/.installed ## a virtual environment with everything

demo: venv ## pretrain, export, serve, index and search (DATA=folder|tar|cifar10, OUT=folder)
	$(BIN)/byol demo --data '$(DATA)' --out '$(OUT)'

test: venv ## all tests
	$(BIN)/python -m pytest

crash-test: venv ## kill a writer 200 times, and see that no acknowledged write is lost
	$(BIN)/python tests/serving/collections/crash/run.py --kills 200

soak: venv ## five minutes of twice the load a server can take, of every unkind sort
	cd tests && ../$(BIN)/python -m soak.run --seconds 300

check: venv ## lint, types, import boundaries, generated code up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_boundaries.py
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python protos/generate.py --check

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: venv ## regenerate serving/byol_serving/pb
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python protos/generate.py

bench-peers: ## an environment of their own for the systems that benchmarks compare with
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --upgrade pip
	.venv-peers/bin/python -m pip install --quiet -r benchmarks/peers.txt

clean:
	rm -rf $(VENV) .venv-peers demo-out .mypy_cache .ruff_cache .pytest_cache
