# What developers do. `make install` first, in a virtual environment.
.PHONY: install lint types test docs bench

install:
	pip install -e ".[test,docs,dev]"
	pre-commit install

lint:
	ruff check .

types:
	mypy

# As in the README, less the models that are compared with; `make test ARGS="tests/modules -x"`.
test:
	python -m pytest -n 2 -q $(ARGS)

docs:
	zensical build --strict

# To see that benchmarks run; the figures of tiny sizes mean nothing. See docs/benchmarks.md.
bench:
	python -m benchmarks.train_step --quick
