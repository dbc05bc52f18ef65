# make serve [MODEL=openai/gpt-oss-20b] [ARGS="further arguments of vllm serve"]
# make test  [ARGS="further arguments of pytest"]
PYTHON ?= python3
VENV := .venv
TINY := .tiny/gpt-oss-tiny
MODEL ?= $(TINY)
READY := $(VENV)/.ready

.PHONY: serve test
serve: $(READY) $(if $(filter $(TINY),$(MODEL)),$(TINY)/config.json)
	@$(VENV)/bin/mxfp4-sm120 serve $(MODEL) -- $(if $(filter $(TINY),$(MODEL)),--config configs/serve/tiny.yaml,--quantization mxfp4_sm120) $(ARGS)

test: $(READY)
	@echo "==> ruff, clang-format, mypy, pytest"
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/clang-format --dry-run --Werror $$(find kernels/csrc -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp')
	@$(VENV)/bin/mypy
	@$(VENV)/bin/pytest $(ARGS)

# Made anew only when one of these has changed; pip then finds most of it in place.
$(READY): setup.py pyproject.toml kernels/setup.py scripts/build_backend.py scripts/environment.py
	@$(PYTHON) scripts/environment.py $(VENV)
	@touch $@

$(TINY)/config.json: $(READY) configs/tiny/config.json vllm_mxfp4_sm120/cli/make_tiny.py
	@echo "==> making the tiny checkpoint $(TINY)"
	@rm -rf $(TINY)
	@$(VENV)/bin/mxfp4-sm120 make-tiny $(TINY)
