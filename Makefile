# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out/demo
LINK   ?= 1GB/s+20us
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup demo demo-results test lint bench gpu clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python scripts/demo.py --out $(OUT) --link $(LINK)

# The demo's results as shipped in traces/demo: made again when the model or a format changes.
demo-results: setup
	$(BIN)/python scripts/demo.py --out traces/demo --link $(LINK)

test: setup lint
	$(BIN)/python -m pytest -n auto

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: setup
	$(BIN)/python benchmarks/decision_cost.py
	$(BIN)/python benchmarks/forecast_accuracy.py
	$(BIN)/python benchmarks/oracle.py
	$(BIN)/python benchmarks/replay_speed.py
	$(BIN)/python benchmarks/sweep_gpt_oss.py
	$(BIN)/python benchmarks/trace_reading.py
	$(BIN)/python benchmarks/tracing_overhead.py
	$(BIN)/python benchmarks/path_predictor.py
	$(BIN)/python benchmarks/predictors.py
	$(BIN)/python benchmarks/switch_interval.py
	$(BIN)/python benchmarks/token_scheduler.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/des.py
	$(BIN)/python benchmarks/reproduction.py
	$(BIN)/python benchmarks/dashboard_speed.py
	$(BIN)/python benchmarks/runtime_bounds.py

# Runs from the tree with the machine's own Python: no install, no network.
gpu:
	PYTHONPATH=.typing $(PYTHON) scripts/gpu_evidence.py

clean:
	rm -rf $(VENV) out build *.egg-info
