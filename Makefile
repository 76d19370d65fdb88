# SPDX-License-Identifier: Apache-2.0
# Needs Python 3.10 or later and make. Everything is installed into .venv, once per change of pyproject.toml.

PYTHON ?= python3
BIN := .venv/bin
# Two processes of one thread each (tests/conftest.py sees to that), a whole file at a time to share its fixtures.
PYTEST_FLAGS ?= -n 2 --dist loadfile

.PHONY: demo test quality style
.NOTPARALLEL:

demo: .venv/.core
	$(BIN)/hf-var generate --class-labels 3 1 4 1 5 --resize 128 --output digits.png
	@echo "The picture is $(CURDIR)/digits.png"

test: .venv/.test
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

quality: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/codespell

style: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One stamp per set of dependencies, each written after its installation succeeded. `dev` holds `test` holds the core.
.venv/.test: EXTRAS := [test]
.venv/.dev: EXTRAS := [dev]
.venv/.core .venv/.test .venv/.dev: pyproject.toml | .venv/.created
	$(BIN)/python -m pip install --editable ".$(EXTRAS)"
	@touch $@

.venv/.created:
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@touch $@
