# Needs Python 3.11 or newer, git and make; sets up everything else in .venv and .venv-proto, once.

VENV := .venv
BIN := $(VENV)/bin
PROTO_VENV := .venv-proto
PROTO := common/wire/v1/ps.proto
GENERATED := common/wire/v1/ps_pb2.py common/wire/v1/ps_pb2.pyi
# Generated code needs a protobuf runtime at least as new as its generator, which pins its own: hence a venv apart.
GRPCIO_TOOLS := 1.76.0

STRICT := common ps/rounds.py ps/membership.py ps/reduce.py worker/session.py worker/attacks.py worker/objectives.py \
  worker/schedules.py worker/optimizers worker/certification.py worker/judging/requests.py worker/judging/restarts.py \
  worker/judging/verdicts.py bench/theory
PLAIN := ps worker deploy bench

# The first Python here that is new enough; `make PYTHON=/path/to/python ...` names another one.
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$python $(IS_NEW_ENOUGH) && echo $$python && break; done)
NEW_ENOUGH = test -n "$(PYTHON)" && $(PYTHON) $(IS_NEW_ENOUGH) || \
  { echo "expected Python 3.11 or newer, got PYTHON=$(PYTHON) (make PYTHON=/path/to/python)"; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help train test smoke check proto check-proto clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  ARGS="..." is passed on, e.g. make train ARGS="--set codec.bits=4", make test ARGS="-k codec"'

train: $(VENV)/.package  ## train the default recipe on this machine
	$(BIN)/datps train $(ARGS)

test: $(VENV)/.test $(PROTO_VENV)/.tools-$(GRPCIO_TOOLS)  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

smoke: $(VENV)/.package  ## run the smoke form of every recipe, about ten minutes
	$(BIN)/python -m bench.smoke $(ARGS)

check: $(VENV)/.check check-proto  ## lint, formatting, types, generated code is current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict --follow-imports=silent $(STRICT)
	$(BIN)/mypy --no-warn-unused-ignores $(PLAIN)

proto: $(PROTO_VENV)/.tools-$(GRPCIO_TOOLS)  ## regenerate common/wire/v1 from proto/
	$(PROTO_VENV)/bin/python -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. proto/$(PROTO)

check-proto: $(PROTO_VENV)/.tools-$(GRPCIO_TOOLS)
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	$(PROTO_VENV)/bin/python -m grpc_tools.protoc -I proto --python_out="$$fresh" --pyi_out="$$fresh" proto/$(PROTO) && \
	for file in $(GENERATED); do \
	  diff -q "$$fresh/$$file" "$$file" || { echo "expected current generated code, got another $$file (make proto)"; exit 1; }; \
	done

clean:  ## remove the virtual environments and caches, not the runs
	rm -rf $(VENV) $(PROTO_VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(NEW_ENOUGH)
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.package: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.package
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(VENV)/.check: pyproject.toml $(VENV)/.package
	$(BIN)/python -m pip install --quiet --editable '.[check]'
	@touch $@

$(PROTO_VENV)/.tools-$(GRPCIO_TOOLS):
	@$(NEW_ENOUGH)
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install --quiet 'grpcio-tools==$(GRPCIO_TOOLS)'
	@touch $@
