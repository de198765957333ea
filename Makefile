# Two commands for users: `make demo` and `make test`. The others are for those who work on the code.

.DEFAULT_GOAL := help
.PHONY: help demo test check unit integration device vm crds bench clean setup

SCRIPTS := tests/e2e/scripts

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: setup ## A three-node cluster on this machine: replicate, hand over, fail over, come back (about 2 minutes)
	@echo 'building (the first time: some minutes)' >&2
	@cargo build --quiet -p mars-local -p mars-node-agent -p mars-operator -p mars-e2e --bins
	@exec $${CARGO_TARGET_DIR:-target}/debug/mars-demo

test: setup ## All that CI runs: check, integration, real devices, ublk in a VM; ends with "N passed, N failed"
	@$(SCRIPTS)/run-tests check unit integration device vm

check: setup ## fmt, clippy, unit tests, CRD diff, docs, licences (under 2 minutes when warm)
	@$(SCRIPTS)/run-tests check unit

unit: ## Unit tests only
	@$(SCRIPTS)/run-tests unit

integration: setup ## Tests that start processes and use the network, without block devices
	@$(SCRIPTS)/run-tests integration

device: setup ## Scenarios on real block devices of this machine (root)
	@$(SCRIPTS)/run-tests device

vm: setup ## The same data path over ublk, in a VM with a kernel that has it (root)
	@$(SCRIPTS)/run-tests vm

crds: ## Write crds/*.yaml from the Rust types
	cargo run --quiet -p mars-crds --bin crdgen

bench: ## Three figures that decide the threading of the engine
	cargo bench -p mars-engine --bench three_figures

setup: ## Install what is needed (as root), else say what is missing
	@$(SCRIPTS)/setup

clean: ## Remove what cargo built
	cargo clean
