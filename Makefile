# make demo    the main job on the embedded mesh, line by line (KEEP=1: stays up)
# make test    everything: format, lints, unit, property, differential and end-to-end tests
# make test-consul CONSUL=/path/to/consul   contract and end-to-end tests against that Consul
# make bench-cnode our node and terms beside libei, eetf and BEAMs, likewise (ARGS="--rounds 3 --percent 20")
# make bench-mesh  distribution over two agents beside inet_tls_dist, Consul's proxies and Envoys, likewise
# make bench-dist  25 to 200 nodes in one mesh, boots, the agent beside epmd (ARGS="--nodes 25,50 --vms 20")
# make bench-rpc   MeshxRpc beside :erpc, tables and a plot in target/bench (ARGS="--rounds 3 --row 64")
# make build   the meshx program, the NIF and the Elixir application
# make fuzz    every fuzz target with libFuzzer, FUZZ_SECONDS each (docs/fuzzing.md)
# make clean   what the others made in this tree

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
export CARGO_TARGET_DIR ?= $(CURDIR)/target
# A VM started by a test must not find somebody's settings.
unexport ERL_FLAGS ERL_AFLAGS ERL_ZFLAGS ERL_LIBS MESHX_DIR $(filter CONSUL_%,$(.VARIABLES))

MIX := cd mix_project && mix
TEST_ENV := MIX_ENV=test MESHX_NIF=require
# Beside the machine's own; each is an Erlang with its Elixir out of a newer Debian (scripts/get-otp).
OTP_VERSIONS ?= 27 29
# In a rule whose stem is a version: its programs first, and a build directory of its own.
ON_OTP = PATH=$(CARGO_TARGET_DIR)/otp/$*/bin:$$PATH MIX_BUILD_ROOT=_build/otp-$*
# What a version of OTP may change.
OTP_TESTS := auto_cluster background c_node cluster command_line distribution epmd epmd_module hostile mix_run ownership refusals rpc sessions spoofing takeover ways
OTP_RUST_TESTS := beam libei node_calls node_connections node_exits node_hostile_beam node_links node_soak node_spawned

.PHONY: build demo test bench-cnode bench-dist bench-mesh bench-rpc preflight-demo preflight-test lint test-rust test-elixir built-for-end-to-end test-end-to-end test-consul test-otp fuzz clean

build: preflight-demo
	cargo build --release --locked -p meshx -p bridge -p search_node -p meshx-tests --bins
	cd examples/shop && MIX_ENV=prod MESHX_NIF=require mix do deps.get, compile

demo: build
	@exec $(CARGO_TARGET_DIR)/release/demo $(if $(KEEP),--keep)

test: preflight-test lint test-rust test-elixir test-end-to-end test-otp

bench-cnode: preflight-test build
	@exec $(CARGO_TARGET_DIR)/release/bench_cnode $(ARGS)

bench-dist: preflight-test build
	@exec $(CARGO_TARGET_DIR)/release/bench_dist $(ARGS)

# inet_tls_dist of the newest OTP is another one.
bench-mesh: preflight-test build $(addprefix shop-otp-,$(lastword $(OTP_VERSIONS)))
	@exec $(CARGO_TARGET_DIR)/release/bench_mesh $(ARGS)

shop-otp-%: build
	cd examples/shop && $(ON_OTP) MIX_ENV=prod MESHX_NIF=require mix do deps.get, compile

bench-rpc: preflight-test build
	@exec $(CARGO_TARGET_DIR)/release/bench_rpc $(ARGS)

preflight-demo:
	@scripts/preflight demo

preflight-test:
	@OTP_VERSIONS="$(OTP_VERSIONS)" scripts/preflight test

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet
	$(MIX) format --check-formatted
	cd examples/shop && mix format --check-formatted
	cd examples/rpc && mix format --check-formatted
	cd examples/adapter && mix format --check-formatted
	cd examples/release && mix format --check-formatted

# The crate meshx-tests holds the end-to-end tests, which need both halves built: they come last.
test-rust:
	cargo build --locked -p meshx -p bridge -p search_node
	if cargo nextest --version >/dev/null 2>&1; then \
	    cargo nextest run --workspace --exclude meshx-tests --exclude meshx_nif --locked --no-fail-fast; \
	else \
	    cargo test --workspace --exclude meshx-tests --exclude meshx_nif --locked --no-fail-fast --lib --bins --tests; \
	fi
	cargo test --doc --workspace --exclude meshx-tests --exclude meshx_nif --locked --quiet

test-elixir:
	$(MIX) deps.get
	cd mix_project && $(TEST_ENV) mix compile --warnings-as-errors
	cd mix_project && $(TEST_ENV) mix test --warnings-as-errors

built-for-end-to-end:
	cargo build --locked -p meshx -p bridge -p search_node
	cd examples/shop && MIX_ENV=prod MESHX_NIF=require mix do deps.get, compile --warnings-as-errors
	cd examples/release && MIX_ENV=prod MESHX_NIF=require mix do deps.get, compile --warnings-as-errors
	cd mix_project && $(TEST_ENV) mix do deps.get, compile --warnings-as-errors

test-end-to-end: built-for-end-to-end
	if cargo nextest --version >/dev/null 2>&1; then \
	    cargo nextest run -p meshx-tests --locked --no-fail-fast -E 'not binary(versions)'; \
	else \
	    cargo test -p meshx-tests --locked --no-fail-fast --tests -- --skip otp_; \
	fi

# The unit tests and the main end-to-end tests on each version, then neighbouring versions in one mesh.
test-otp: $(OTP_VERSIONS:%=test-otp-%)
	$(if $(OTP_VERSIONS),cargo test -p meshx-tests --locked --test versions)

test-otp-%: built-for-end-to-end
	cd mix_project && $(ON_OTP) $(TEST_ENV) mix do deps.get, compile --warnings-as-errors
	cd mix_project && $(ON_OTP) $(TEST_ENV) mix test --warnings-as-errors
	cd examples/shop && $(ON_OTP) MIX_ENV=prod MESHX_NIF=require mix do deps.get, compile --warnings-as-errors
	$(ON_OTP) cargo test -p meshx-tests --locked --no-fail-fast $(OTP_TESTS:%=--test %)
	$(ON_OTP) MESHX_LIBEI=$(CARGO_TARGET_DIR)/otp/$*/debian/usr/lib/erlang/usr \
	    cargo test --workspace --exclude meshx-tests --exclude meshx_nif --locked --no-fail-fast $(OTP_RUST_TESTS:%=--test %)

# Everything that knows Consul; without CONSUL on the one that the other tests use.
test-consul: export MESHX_CONSUL = $(abspath $(CONSUL))
test-consul: preflight-test built-for-end-to-end
	if cargo nextest --version >/dev/null 2>&1; then \
	    cargo nextest run -p meshx-tests --test 'consul*' --locked --no-fail-fast; \
	else \
	    cargo test -p meshx-tests --test 'consul*' --locked --no-fail-fast; \
	fi

FUZZ_TARGETS := $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))
FUZZ_SECONDS := 600

# A directory of its own: the sanitizer's objects fit no others.
fuzz:
	cd fuzz && for target in $(FUZZ_TARGETS); do \
	    mkdir -p corpus/$$target; \
	    CARGO_TARGET_DIR=$(CARGO_TARGET_DIR)/fuzz cargo +nightly fuzz run --fuzz-dir . $$target corpus/$$target seeds/$$target \
	        -- -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=2048 -print_final_stats=1; \
	done

clean:
	cargo clean
	rm -rf mix_project/_build mix_project/deps examples/{shop,rpc,adapter,release}/{_build,deps}
