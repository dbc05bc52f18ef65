# make serve [MODEL=openai/gpt-oss-20b] [ARGS="further arguments of vllm serve"]
# make test  [ARGS="further arguments of pytest, such as -m 'not slow'"]  [JOBS=1: tests one after the other]
# make coverage  the same tests, and how much of the package they run
# make lint
PYTHON ?= python3
VENV := .venv
SMALL := models/gpt-oss-small/checkpoint
MODEL ?= $(SMALL)
READY := $(VENV)/.ready
# Two files of tests at a time, each with a core or more and up to 4 GB. conftest.py orders them.
JOBS ?= 2
SIDE_BY_SIDE := $(if $(filter-out 1,$(JOBS)),--numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder)

.PHONY: serve test lint coverage
serve: $(READY)
	@$(VENV)/bin/mxfp4-sm120 serve $(MODEL) -- $(if $(filter $(SMALL),$(MODEL)),--config configs/serve/gpt-oss-small.yaml,--quantization mxfp4_sm120) $(ARGS)

test: lint
	@echo "==> pytest"
	@$(VENV)/bin/pytest $(SIDE_BY_SIDE) $(ARGS)

coverage: lint
	@$(VENV)/bin/coverage erase
	@$(VENV)/bin/coverage run -m pytest $(SIDE_BY_SIDE) $(ARGS)
	@$(VENV)/bin/coverage combine --quiet
	@$(VENV)/bin/coverage report --show-missing --skip-covered

lint: $(READY)
	@echo "==> ruff, clang-format, mypy"
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/clang-format --dry-run --Werror $$(find kernels/csrc -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp')
	@$(VENV)/bin/mypy

# Made anew only when one of these has changed; pip then finds most of it in place.
$(READY): setup.py pyproject.toml kernels/setup.py scripts/build_backend.py scripts/environment.py
	@$(PYTHON) scripts/environment.py $(VENV)
	@touch $@
