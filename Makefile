# Everything runs in .venv, which the first target sets up. PYTHON: 3.10 or newer.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
TEST := PYTHONDONTWRITEBYTECODE= OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(RUN) -m pytest -n 3

.PHONY: demo test test-thorough test-portable lint clean

$(VENV)/ready: requirements.txt requirements-dev.txt constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints-dev.txt torch
	$(RUN) -m pip install --quiet --constraint constraints-dev.txt -r requirements.txt -r requirements-dev.txt
	touch $@

demo: $(VENV)/ready
	$(RUN) -m fastusp_backend demo

test: $(VENV)/ready
	$(TEST) -m "not thorough" $(PYTEST_ARGS)

# All tests: rare faults, too, and further variants of what others cover.
test-thorough: $(VENV)/ready
	$(TEST) $(PYTEST_ARGS)

# The unit tests that compute as another processor would run them: without vector instructions, on one thread. Two at a
# time: they wait for nothing, and each process imports torch.
test-portable: $(VENV)/ready
	ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "unit and not any_processor and not thorough" tests/unit

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) demo_output
