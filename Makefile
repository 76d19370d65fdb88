# SPDX-License-Identifier: Apache-2.0
# Needs Python 3.11 or later and make. Everything is installed into .venv, in the versions of requirements/lock.txt and once
# per change of it or of pyproject.toml; the runs with other versions have environments of their own.

PYTHON ?= python3
BIN := .venv/bin
LOCK := requirements/lock.txt
# Two processes of one thread each (tests/conftest.py sees to that), a whole file at a time to share its fixtures.
PYTEST_FLAGS ?= -n 2 --dist loadfile
DRAW := generate --prompt "a red heart" "a green heart" "a blue heart" "smiling face with sunglasses" \
	"winking face with tongue" "a purple cat face" "a blue apple" "a green book" --columns 4 --resize 128 --output
# The lower bounds of pyproject.toml, one a line.
LOWER_BOUNDS := grep -oE '"[A-Za-z0-9-]+>=[0-9.]+' pyproject.toml | tr -d '"'

.PHONY: demo test quality style docs lock test-oldest test-newest test-upstream smoke-newest newest
.NOTPARALLEL:

demo: .venv/.core
	$(BIN)/hf-var $(DRAW) emoji.png
	@echo "The picture is $(CURDIR)/emoji.png"

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

# Sphinx warns of links inside the site that lead nowhere, and warnings are errors. `make docs LINKS=external` also asks the servers
# that the other links name.
docs: .venv/.docs
	rm -rf build/docs
	$(BIN)/python -m sphinx -E -W --keep-going -q -c docs -d build/doctrees . build/docs
	$(if $(filter external,$(LINKS)),$(BIN)/python -m sphinx -q -b linkcheck -c docs -d build/doctrees . build/links)
	@echo "The site is $(CURDIR)/build/docs/index.html"

# One stamp per set of dependencies, each written after its installation succeeded. `dev` holds `test` holds the core.
.venv/.test: EXTRAS := [test]
.venv/.dev: EXTRAS := [dev]
.venv/.docs: EXTRAS := [docs]
.venv/.core .venv/.test .venv/.dev .venv/.docs: pyproject.toml $(LOCK) | .venv/.created
	$(BIN)/python -m pip install --constraint $(LOCK) --editable ".$(EXTRAS)"
	@touch $@

.venv/.created .venv-oldest/.created .venv-newest/.created .venv-lock/.created:
	@$(@D)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(@D)
	@touch $@

# The newest releases that pyproject.toml lets in, for all systems and Pythons. torch and torchvision stay ranges, so the
# packages that each torch pins for itself are left out as well.
lock: .venv-lock/.created
	.venv-lock/bin/python -m pip install --quiet --upgrade uv
	.venv-lock/bin/uv pip compile pyproject.toml --extra dev --universal --upgrade --quiet --no-header --no-annotate \
		--output-file .venv-lock/lock.txt
	@echo "# SPDX-License-Identifier: Apache-2.0" > $(LOCK)
	@echo "# What \`make demo\` and \`make test\` install. Made by \`make lock\`, not by hand." >> $(LOCK)
	grep -vE '^(torch|torchvision|triton|(cuda|nvidia)-[a-z0-9-]+)==' .venv-lock/lock.txt >> $(LOCK)

# The tests with the oldest releases that pyproject.toml lets in.
test-oldest: .venv-oldest/.created
	$(LOWER_BOUNDS) | sed 's/>=/==/' > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --constraint .venv-oldest/constraints.txt --editable ".[test]"
	.venv-oldest/bin/python -m pytest $(PYTEST_FLAGS)

# The tests with the newest releases there are, whether pyproject.toml lets them in or not.
test-newest: newest
	.venv-newest/bin/python -m pytest $(PYTEST_FLAGS)

# The tests with what the next releases of transformers and diffusers will be.
test-upstream: newest
	.venv-newest/bin/python -m pip install --upgrade \
		git+https://github.com/huggingface/transformers git+https://github.com/huggingface/diffusers
	.venv-newest/bin/python -m pytest $(PYTEST_FLAGS)

# The part of the newest releases' tests that takes a few minutes.
smoke-newest: newest
	.venv-newest/bin/hf-var $(DRAW) .venv-newest/emoji.png
	.venv-newest/bin/python -m pytest $(PYTEST_FLAGS) -m contract

newest: .venv-newest/.created
	$(LOWER_BOUNDS) > .venv-newest/requirements.txt
	.venv-newest/bin/python -m pip install --upgrade --requirement .venv-newest/requirements.txt
	.venv-newest/bin/python -m pip install --no-deps --editable .
