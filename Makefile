# make demo    install, then train dense and MoE models on this Python's own standard library and write the report
# make test    install with the test extra, then lint, type-check and run every test but those that train for minutes
# make test-long    those
# make test-gpu     the tests that need a CUDA device, eight at a time but for those that need all of its memory
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long test-gpu lint clean

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@

demo: .venv/.installed
	$(BIN)/moelab compare smoke --out runs/demo

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-long: .venv/.installed-test
	$(BIN)/python -m pytest -m long

test-gpu: .venv/.installed-test
	$(BIN)/python -m pytest -m gpu --numprocesses 8 --dist loadgroup

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
