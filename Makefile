# What developers do. `make install` first, in a virtual environment.
.PHONY: install lint types test test-slow test-python docs bench

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

# What the default suite leaves out: long tests, and cases of tests of which it runs a sample.
test-slow:
	python -m pytest -n 2 -q -m slow $(ARGS)

# The model against its oracle, generation, and the main job's first steps under another Python, with the
# newest versions of jax and flax that setup.py allows; `make test-python PYTHON=python3.13`. Other
# versions: VERSIONS="jax==0.11.2"; the whole suite: TESTS=tests EXTRAS=test,parity.
PYTHON = python3.13
EXTRAS = test-model
VERSIONS =
TESTS = tests/modules/test_oracle.py tests/modules/test_causality.py tests/modules/test_order.py \
	tests/decoding/test_generation.py
MAIN = tests/test_train_main.py::test_the_main_job_whole_and_interrupted
ENVIRONMENT = build/test-python
test-python:
	$(PYTHON) -m venv --clear $(ENVIRONMENT)
	$(ENVIRONMENT)/bin/pip install --quiet -e ".[$(EXTRAS)]" $(VERSIONS)
	$(ENVIRONMENT)/bin/python -c "import sys, flax, jax; print('Python', sys.version.split()[0], 'jax', jax.__version__, 'flax', flax.__version__)"
	$(ENVIRONMENT)/bin/python -m pytest -n 2 -q $(TESTS)
	$(ENVIRONMENT)/bin/python -m pytest -q -m "" $(MAIN)

docs:
	zensical build --strict

# To see that benchmarks run; the figures of tiny sizes mean nothing. See docs/benchmarks.md.
bench:
	python -m benchmarks.train_step --quick
