# make demo           the main job, from nothing: output/demo/sheet.png and output/demo/report.json
# make serve          ComfyUI with PrefGen in it, in your browser
# make test           the tests (25 minutes on two cores)
# make check          lint and the fast half of the tests (within 2)
# make lint           style, types, limits of length and branches, and the registry's rules
# make test-numbers   the tests of numbers, rounded as on eleven other CPUs
# make train-atelier  the embedded models, from nothing to the files under prefgen/atelier/weights
# make clean          removes what make made (.venv and .comfyui as well)
#
# PYTHON=python3.12 picks the interpreter, COMFYUI_PATH=... runs in a ComfyUI that is already there.

PYTHON ?= python3
PY := .venv/bin/python
# Nothing is reported home and no model hub is asked.
export DO_NOT_TRACK := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Threads that wait for each other give up their core soon: beside other work the demo is 3 times faster, alone the same.
export GOMP_SPINCOUNT ?= 2000

# The engine, the world, the package, who is who in a model call, and what of the training answers at once.
CHECKED := $(wildcard tests/prefgen/test_*.py) tests/prefgen/atelier tests/scripts tests/nodes/test_histories.py \
	$(addprefix tests/prefgen/comfy/test_,items.py folders.py) \
	$(addprefix tests/training/common/test_,config.py statistics.py mmd.py) \
	$(addprefix tests/training/data/test_,agents.py questions.py)

.PHONY: help setup setup-tests demo serve test test-numbers check lint types train-atelier clean

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

setup:
	@$(PYTHON) scripts/setup_env.py

setup-tests:
	@$(PYTHON) scripts/setup_env.py --tests

demo: setup
	@$(PY) -m scripts.demo $(ARGS)

serve: setup
	@$(PY) -m scripts.serve $(ARGS)

test: setup-tests
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: lint
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(CHECKED) $(ARGS)

test-numbers: setup-tests
	@$(PY) scripts/any_cpu.py $(ARGS)

lint: setup-tests types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) scripts/code_figures.py --limits
	@HOME="$(CURDIR)/.cache" $(PY) -m comfy_cli --skip-prompt --no-enable-telemetry node validate </dev/null

# The nodes reach the engine by `..prefgen`, as inside ComfyUI: seen from a folder above, the repository is the package.
types: setup-tests
	@mkdir -p .cache/types
	@ln -sfn ../.. .cache/types/pack
	@$(PY) -m mypy
	@cd .cache/types && ../../$(PY) -m mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p pack.nodes

train-atelier: setup
	@PYTHON=$(PY) sh training/runs/atelier.sh $(ARGS)

clean:
	rm -rf .venv .comfyui .comfyui-* .setup.lock output runs .pytest_cache .ruff_cache .hypothesis .cache
