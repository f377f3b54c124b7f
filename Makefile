# Every target does its own set-up. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help setup setup-dev setup-test demo test test-cloud test-faults simulate soak lint bench-idle bench-controller-loss bench-abort bench-disk-models bench-relay bench-volumes bench-network lock clean

PY := .venv/bin/python
SOURCES := src scripts tests $(wildcard bench)
# Two at a time, each with namespaces and labs of its own; a file stays together, as its tests share a lab. Three are no
# faster, as the guests' emulators slow each other down. The search takes all processors by itself.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder
AS_ROOT := $(PY) scripts/as_root.py "the lab makes network namespaces, taps and mounts"

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-22s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what the demo needs: packages, QEMU, Python environment, guest image
	@scripts/setup

setup-dev:
	@scripts/setup --dev

setup-test:
	@scripts/setup --dev --test

demo: setup ## Migrate a running EVM there and back, and show what happened
	@mkdir -p build
	@$(AS_ROOT) .venv/bin/emp lab demo --json build/demo.json

test: setup-test lint ## Run every check and every test
	@$(AS_ROOT) $(PY) -B -m pytest -p no:cacheprovider -q tests/search
	@$(AS_ROOT) $(PY) -B -m pytest -p no:cacheprovider $(SIDE_BY_SIDE) --ignore tests/search --durations=15

soak: setup-dev ## N migrations in a row (200), most with a random fault, write build/soak.json; SEED=n repeats one
	@$(AS_ROOT) $(PY) -B -m tests.fault.soak --runs $(or $(N),200) $(if $(SEED),--seed $(SEED))

test-cloud: setup-dev ## Run the cloud's contract suite: the simulator's rules, the EBS driver (docs/cloud.md)
	@$(PY) -B -m pytest -p no:cacheprovider $(SIDE_BY_SIDE) tests/cloud

test-faults: setup-dev ## Play every cell of the fault matrix, write build/faults.json (docs/faults.md)
	@$(AS_ROOT) $(PY) -B -m pytest -p no:cacheprovider -v -n 3 --dist worksteal tests/fault --faults all

lint: setup-dev ## Run the checks alone: ruff, mypy --strict, the architecture's contracts
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet .
	@$(PY) -m mypy $(SOURCES)
	@.venv/bin/lint-imports

simulate: setup-dev ## Simulate SEEDS=200 pools under faults, write build/simulate.json; SEED=N: that one, with its trace
	@mkdir -p build
	@$(PY) -B -m tests.simulation $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),200) --json build/simulate.json)

bench-idle: setup ## Measure ten idle migrations, write build/bench/idle.json
	@mkdir -p build/bench
	@$(AS_ROOT) $(PY) bench/idle.py

bench-controller-loss: setup ## Measure blackouts in which the controller dies, write build/bench/controller-loss.json
	@mkdir -p build/bench
	@$(AS_ROOT) $(PY) bench/controller_loss.py

bench-abort: setup ## Measure aborts in each stage before the commit, write build/bench/abort.json
	@mkdir -p build/bench
	@$(AS_ROOT) $(PY) bench/abort.py

bench-disk-models: setup ## Measure what volumes cost in the blackout by kind of disk, write build/bench/disk-models.json
	@mkdir -p build/bench
	@$(AS_ROOT) unshare --net --mount sh -c 'ip link set lo up && exec $(PY) bench/disk_models.py'

bench-relay: setup-dev ## Measure what a relay of a volume costs, write build/bench/relay.json
	@$(AS_ROOT) $(PY) -m bench.relay

bench-volumes: setup ## Measure what volumes of each kind cost, at most RUNS of a case, write build/bench/volumes.json
	@mkdir -p build/bench
	@$(AS_ROOT) $(PY) -m bench.volumes $(if $(RUNS),--runs $(RUNS))

bench-network: setup ## Measure what a network client sees, RUNS of each of CASES on DRIVERS, write build/bench/network.json
	@mkdir -p build/bench
	@$(AS_ROOT) $(PY) -m bench.network $(if $(RUNS),--runs $(RUNS)) $(if $(CASES),--cases $(CASES)) $(if $(DRIVERS),--drivers $(DRIVERS))

lock: ## Pin the requirements anew (needs uv)
	@uv --version >/dev/null || { echo "make lock needs uv: install it first" >&2; exit 1; }
	@uv pip compile -q --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock" \
		$(LOCK) pyproject.toml --group build -o requirements.txt
	@uv pip compile -q --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock" \
		$(LOCK) pyproject.toml --group build --group dev -c requirements.txt -o requirements-dev.txt

clean: ## Remove what was built here; packages, QEMU and apt sources stay (docs/setup.md says how to undo those)
	@rm -rf build .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache src/*.egg-info
	@find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
