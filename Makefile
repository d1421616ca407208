# The one door. `make replay` runs the main job, `make test` the tests; both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup extras replay test test-t models stops soak fuzz sanitize lint instructions bench bench-rust bench-alone bench-python \
	bench-report gpu-check clean

$(BIN)/kvpool: pyproject.toml Cargo.toml $(shell find rust kernels -name '*.rs' -o -name '*.cu' -o -name Cargo.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

setup: $(BIN)/kvpool

# What the integrations need besides: torch, some gigabytes. Only the tests want it.
$(BIN)/.extras: $(BIN)/kvpool
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,transformers]'
	touch $@

extras: $(BIN)/.extras

replay: setup
	$(BIN)/kvpool replay

# Without the extras pytest skips the tests of the integrations; here they are all run.
test: setup extras
	cargo test --workspace --quiet
	KVPOOL_REQUIRE_EXTRAS=1 $(BIN)/python -m pytest

# The tests on a free-threaded Python (docs/free-threading.md), in a wheel of its ABI, with the GIL off whatever they
# import. TESTS: some of them. Fat link-time optimisation takes minutes and finds no race.
PYTHON_T ?= python3.15t
TESTS ?=
test-t: setup
	$(PYTHON_T) -c 'import sysconfig; assert sysconfig.get_config_var("Py_GIL_DISABLED"), "this Python has a GIL"'
	test -x $(VENV)-t/bin/python || $(PYTHON_T) -m venv $(VENV)-t
	rm -rf dist/t
	CARGO_TARGET_DIR=target/t CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
		$(BIN)/maturin build --release --quiet --interpreter $(VENV)-t/bin/python --out dist/t
	$(VENV)-t/bin/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps dist/t/kvpool-*.whl
	$(VENV)-t/bin/pip install --quiet --disable-pip-version-check "$$(echo dist/t/kvpool-*.whl)[test]"
	PYTHON_GIL=0 $(VENV)-t/bin/python -m pytest $(TESTS)

# Every interleaving of small models (loom) with controls that must fail, deeper ones of the tree beside them (a run of models
# is one thread at a time), then random schedules (shuttle).
LOOM := RUSTFLAGS="--cfg kvpool_loom" cargo test --quiet --profile models --target-dir target/loom -p kvpool-core --lib
models:
	$(LOOM) --no-run
	$(LOOM) & all=$$!; KVPOOL_PREEMPTIONS=3 $(LOOM) tree:: && wait $$all
	RUSTFLAGS="--cfg kvpool_shuttle" cargo test --quiet --profile models --target-dir target/shuttle -p kvpool-core --test linearizable

# One thread stopped at each of its accesses in turn, everything else done meanwhile; --nocapture prints the counts.
stops:
	RUSTFLAGS="--cfg kvpool_stops" cargo test --quiet --profile models --target-dir target/stops -p kvpool-trials --test stops -- $(ARGS)

# Threads that do everything at once, all books recomputed whenever they stand still.
OPERATIONS ?= 100000000
SEED ?= 1
soak:
	cargo run --profile models -p kvpool-trials --bin soak -- --operations $(OPERATIONS) --threads 4 --seed $(SEED)

# Coverage-guided sequences of operations, from the corpus in the repository. Needs `cargo install cargo-fuzz` and a C++
# compiler; new cases go to target/fuzz, failing ones to rust/fuzz/artifacts; rust/fuzz/README.md has the rest.
SECONDS ?= 1800
FUZZ := RUSTC_BOOTSTRAP=1 cargo fuzz
fuzz:
	mkdir -p target/fuzz
	$(FUZZ) run --fuzz-dir rust/fuzz -s none operations target/fuzz rust/fuzz/corpus/operations -- -max_len=512 -max_total_time=$(SECONDS)

# The thread sanitizer (with a standard library of its own, else its locks look like races), and a race that it must report.
# Then Miri on the streams' threads. Needs `rustup component add --toolchain nightly rust-src miri`.
TSAN := RUSTFLAGS=-Zsanitizer=thread cargo +nightly
TSAN_TARGET := -Zbuild-std --profile models --target x86_64-unknown-linux-gnu --target-dir target/sanitize
sanitize:
	$(TSAN) test --quiet $(TSAN_TARGET) -p kvpool-mover --lib --tests
	! $(TSAN) test --quiet $(TSAN_TARGET) -p kvpool-mover --lib -- --ignored two_copies_into_one_slot_race >/dev/null 2>&1
	$(TSAN) run --quiet $(TSAN_TARGET) -p kvpool-trials --bin soak -- --operations 300000 --threads 4 --seed $(SEED)
	cargo +nightly miri test --quiet --target-dir target/miri -p kvpool-mover --test threads

lint: setup
	cargo fmt --all --check
	cargo fmt --check --manifest-path bench/rivals/Cargo.toml
	cargo check --quiet --manifest-path bench/rivals/Cargo.toml
	cargo fmt --check --manifest-path bench/instructions/Cargo.toml
	$(BIN)/python bench/report.py --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTFLAGS="--cfg kvpool_loom" cargo clippy --target-dir target/loom -p kvpool-core --all-targets -- -D warnings
	RUSTFLAGS="--cfg kvpool_shuttle" cargo clippy --target-dir target/shuttle -p kvpool-core --all-targets -- -D warnings
	RUSTFLAGS="--cfg kvpool_stops" cargo clippy --target-dir target/stops -p kvpool-trials --all-targets -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict python/kvpool
	$(BIN)/python -m mypy.stubtest kvpool._core

# Counts the instructions of the hot paths under valgrind and records them; CI fails when one grows by more than 5 %.
instructions:
	$(PYTHON) bench/instructions/count.py --record

# All benchmarks, their tables and pictures. bench-python makes the rivals' environment on its first run (9.7 GB).
bench: bench-rust bench-alone bench-python bench-report

# TRACE: a Mooncake trace for W3. PARTS: some of those that bench/rivals names; the others keep their figures.
TRACE ?= $(abspath $(wildcard ../shared/traces/mooncake_conversation.jsonl))
PARTS ?=
bench-rust:
	cargo run --quiet --release --manifest-path bench/rivals/Cargo.toml -- --json bench/results/rust.json $(if $(TRACE),--trace $(TRACE)) $(PARTS)

bench-alone: setup
	$(BIN)/python -m pytest bench/bench_w1_w2.py bench/bench_w4.py --benchmark-only --benchmark-columns=min,median --benchmark-json=target/alone.json
	$(BIN)/python bench/condense.py target/alone.json bench/results/alone.json
	$(BIN)/python bench/scale_waiting.py bench/results/waiting.json
	$(BIN)/python bench/scale_context.py bench/results/context.json
	$(BIN)/python -m pytest bench/bench_mover.py --benchmark-only --benchmark-columns=min,median
	$(BIN)/python bench/memory_short.py

bench-python: setup
	bench/rivals_py/run --json $(CURDIR)/bench/rivals_py/results.json $(if $(TRACE),--trace $(TRACE))

bench-report: setup
	$(BIN)/pip install --quiet --disable-pip-version-check 'matplotlib>=3.9'
	$(BIN)/python bench/report.py

# On a machine with a GPU: CuPy, the tests that need one, and the speed of every path. Exits 2 where there is none.
gpu-check: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[cuda]'
	$(BIN)/python bench/gpu_check --json gpu_check.json

clean:
	rm -rf $(VENV) $(VENV)-t target dist
