# Two commands for a fresh machine with python3 (3.11 or newer) and make:  make test,  make demo

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?=
DEMO   ?= demo/
ARGS   ?=

PY := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help test demo lint clean

help:
	@echo "make test    set up $(VENV), then ruff, pyright and the tests     about 18 minutes on 2 cores"
	@echo "make demo    set up $(VENV), then fine-tune a small model          about 3 minutes on 2 cores"
	@echo "make lint    set up $(VENV), then ruff and pyright                 about 1 minute"
	@echo "make clean   remove what builds, tests and the demo left; keeps $(VENV)"
	@echo ""
	@echo "The first of them installs everything into $(VENV): about 3 minutes and 2 GB, no CUDA packages."
	@echo "  PYTHON=python3.12     the interpreter to make the environment with"
	@echo "  VENV=/path            the environment to make or use"
	@echo "  TORCH='torch==2.13.0' what to install where no torch is in range (so: the several GB with CUDA)"
	@echo "  ARGS='-k lora'        further arguments of pytest, or of rewrite finetune"

test: lint
	@echo "every kernel, compiled for sm_80 and sm_90: about 3 minutes on 2 cores"
	$(PY) -m pytest -m aot
	@echo "pytest: about 15 minutes on 2 cores"
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist loadfile $(ARGS)

lint: $(VENV)/.installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

# The environment of the tests can do all that the demo needs.  Its model is small: threads that wait by spinning slow
# it down thirtyfold where something else wants the cores.
demo: $(if $(wildcard $(VENV)/.installed-test),$(VENV)/.installed-test,$(VENV)/.installed-hf)
	@echo "rewrite finetune: about 3 minutes on 2 cores"
	OMP_WAIT_POLICY=passive $(PY) -m rewrite finetune --out $(DEMO) $(ARGS)

$(VENV)/.installed-%: pyproject.toml
	@echo "setting up $(VENV): about 3 minutes the first time"
	$(PYTHON) tools/environment.py $(VENV) $* $(if $(TORCH),--torch '$(TORCH)')
	@touch $@

clean:
	rm -rf build dist demo *.egg-info .pytest_cache .ruff_cache .hypothesis torch_compile_debug
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
