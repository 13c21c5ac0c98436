# vmm: two commands matter. `make demo` runs the main job, `make test` passes
# every test. Each installs what this machine lacks (Debian packages, as root;
# Go where it is older than go.mod asks for).

.DEFAULT_GOAL := help
SHELL := /bin/bash -o pipefail

# What each job needs of the machine, as PACKAGE:PROOF.
BUILD_NEEDS := ca-certificates:/etc/ssl/certs/ca-certificates.crt git:git
LAB_NEEDS   := qemu-system-x86:qemu-system-x86_64 busybox-static:busybox kmod:depmod xz-utils:xz sg3-utils:sg_persist curl:curl
TEST_NEEDS  := gcc:gcc libc6-dev:/usr/include/stdio.h linux-libc-dev:/usr/include/linux/kvm.h acpica-tools:iasl protobuf-compiler:protoc mandoc:mandoc systemd:systemd-analyze openssl:openssl

# setup is the directory of a Go that is new enough, everything else installed.
define setup
$(eval GOBIN_ := $(shell ./scripts/setup $(1)))$(if $(GOBIN_),,$(error setup failed; its reason stands above))$(eval export PATH := $(GOBIN_):$(PATH))
endef

export CGO_ENABLED := 0
export VMM_BUILD := $(CURDIR)/.build

.PHONY: help build man demo test check unit lab e2e bench fuzz soak generate clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' Makefile

build: ## the vmm command, in .build/vmm
	$(call setup,$(BUILD_NEEDS))
	@mkdir -p .build
	go build -trimpath -o .build/vmm ./cmd/vmm

man: build ## the manual pages, in .build/man
	@.build/vmm man .build/man/man1
	@echo "man -M $(CURDIR)/.build/man vmm"

demo: ## boot a stock guest on a real LUN, reserve it, migrate both
	$(call setup,$(BUILD_NEEDS) $(LAB_NEEDS))
	@./scripts/demo

test: check ## every test: check, fuzzers for 10 s each, the search, the lab, guests
	$(call setup,$(BUILD_NEEDS) $(LAB_NEEDS) $(TEST_NEEDS))
	@./scripts/fuzz 10s
	go test ./scsi/pr -run 'TestSearch$$|TestKill' -timeout 20m -args -search ci
	VMM_TEST_LAB=1 go test -short -timeout 20m ./tests/lab ./tests/guest
	@./scripts/guests test
	@echo "make test: all passed"

check: ## format, vet, lint, generated code, unit tests with -race
	$(call setup,$(BUILD_NEEDS) $(LAB_NEEDS) $(TEST_NEEDS))
	@./scripts/check

e2e: ## the tests that boot guests
	$(call setup,$(BUILD_NEEDS) $(LAB_NEEDS))
	@./scripts/guests test

lab: ## a shell in a lab host: nested KVM, LIO, the tools
	$(call setup,$(BUILD_NEEDS) $(LAB_NEEDS))
	@./scripts/lab shell

bench: build ## side by side with QEMU, and the controller's own benchmarks
	$(call setup,$(BUILD_NEEDS) $(LAB_NEEDS))
	go test -run '^$$' -bench 'SCSI|Queue|RoundTrip' ./virtio
	@if [ -w /dev/kvm ]; then go run ./tests/bench; else echo "bench: no /dev/kvm here: how fast a guest moves is not measured"; fi
	@./scripts/guests bench

fuzz: ## every fuzzer for 10 minutes (FUZZTIME=...)
	$(call setup,$(BUILD_NEEDS) $(TEST_NEEDS))
	@./scripts/fuzz $(or $(FUZZTIME),10m)

soak: ## the full product of kernels, vCPU counts and memory sizes, and 50 migrations
	$(call setup,$(BUILD_NEEDS) $(LAB_NEEDS))
	@./scripts/guests soak

generate: ## all generated code
	$(call setup,$(BUILD_NEEDS) $(TEST_NEEDS))
	go generate ./...

clean: ## remove what make built
	rm -rf .build
