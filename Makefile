# GNU make, POSIX sh. `make` alone lists the targets.

PYTHON ?= python3
ARGS ?=
HOST ?= http://127.0.0.1:8000
DESTDIR ?=
PREFIX ?= /opt/pipeserve
SYSCONFDIR ?= /etc
LIBDIR ?= /usr/local/lib
DATADIR ?= /usr/local/share
PIP_FLAGS ?=
USERS ?= 8

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c .ci/constraints.txt
TRITON := triton==3.6.0
PINS := pyproject.toml .ci/constraints.txt

.PHONY: help serve test lint types kernels-aot loadtest lm-eval clean
.PHONY: install install-program install-service
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

serve: .venv/.base-stamp ## serve a model on http://127.0.0.1:8000/v1; ARGS="--port 8001 --model ..."
	$(BIN)/pipeserve serve $(ARGS)

test: .venv/.dev-stamp ## run the tests; ARGS="tests/engine -x" runs a part
	$(BIN)/pipeserve pull demo
	$(BIN)/pipeserve pull gemma3-270m
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/.dev-stamp ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/.dev-stamp ## mypy
	$(BIN)/mypy

kernels-aot: .venv/.dev-stamp ## compile every GPU kernel for every card, without a GPU; ARGS="--sample 24"
	$(BIN)/python -m pipeserve.bench.kernels_aot $(ARGS)

loadtest: .venv/.loadtest-stamp ## 30 s of Locust users against a running server; HOST=... USERS=8
	$(BIN)/locust -f loadtest/locustfile.py --headless --run-time 30s --stop-timeout 30s \
		--users $(USERS) --spawn-rate $(USERS) --host $(HOST) $(ARGS)

lm-eval: .venv-lm-eval/.stamp ## lm-evaluation-harness through the API and on transformers itself
	.venv-lm-eval/bin/python loadtest/lm_eval_agreement.py $(ARGS)

install: install-program install-service ## as a system service; DESTDIR, PREFIX=/opt/pipeserve

# The interpreter finds its packages by its own place, so the folder may be moved out of DESTDIR.
install-program:
	$(PYTHON) -m venv $(DESTDIR)$(PREFIX)
	$(DESTDIR)$(PREFIX)/bin/python -m pip --disable-pip-version-check install \
		-c .ci/constraints.txt --upgrade $(PIP_FLAGS) .

# What an administrator may have changed is not written over.
install-service:
	install -d $(DESTDIR)$(LIBDIR)/systemd/system $(DESTDIR)$(SYSCONFDIR)/pipeserve
	for unit in pipeserve.service pipeserve.socket; do \
		sed 's#/opt/pipeserve/#$(PREFIX)/#; s#/etc/pipeserve/#$(SYSCONFDIR)/pipeserve/#' \
			systemd/$$unit > $(DESTDIR)$(LIBDIR)/systemd/system/$$unit && \
		chmod 644 $(DESTDIR)$(LIBDIR)/systemd/system/$$unit || exit 1; \
	done
	install -D -m 644 systemd/pipeserve.sysusers $(DESTDIR)$(LIBDIR)/sysusers.d/pipeserve.conf
	install -D -m 644 systemd/pipeserve.tmpfiles $(DESTDIR)$(LIBDIR)/tmpfiles.d/pipeserve.conf
	install -D -m 644 -t $(DESTDIR)$(DATADIR)/pipeserve/monitoring systemd/monitoring/*
	test -e $(DESTDIR)$(SYSCONFDIR)/pipeserve/config.toml || install -m 640 \
		config.example.toml $(DESTDIR)$(SYSCONFDIR)/pipeserve/config.toml
	test -e $(DESTDIR)$(SYSCONFDIR)/pipeserve/pipeserve.env || install -m 640 \
		systemd/pipeserve.env $(DESTDIR)$(SYSCONFDIR)/pipeserve/pipeserve.env

clean: ## delete the virtual environments and the tools' caches
	rm -rf .venv .venv-lm-eval .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "$(PYTHON) is not there; install Python 3.11 or later, or run make PYTHON=..." >&2; \
		exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is `$(PYTHON) --version`; pipeserve needs 3.11 or later:" \
			"run make PYTHON=python3.11" >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# A stamp is newer than the pins when its packages are installed as pinned.
.venv/.base-stamp: $(PINS) | .venv/bin/python
	@echo "installing pipeserve and its pinned dependencies into .venv (minutes at first)"
	$(PIP) -e .
	@touch $@

.venv/.dev-stamp: $(PINS) | .venv/bin/python
	@echo "installing pipeserve and its development tools into .venv (minutes at first)"
	$(PIP) -e '.[dev]'
	@# torch's CUDA build brings the Triton that fits it; the CPU build comes without.
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) $(TRITON)
	@touch .venv/.base-stamp $@

# Apart from the others, since Locust brings gevent along.
.venv/.loadtest-stamp: $(PINS) | .venv/bin/python
	$(PIP) -e '.[loadtest]'
	@touch .venv/.base-stamp $@

# Apart from the others, since the harness brings half a gigabyte along.
.venv-lm-eval/.stamp: $(PINS) | .venv/bin/python
	.venv/bin/python -m venv .venv-lm-eval
	.venv-lm-eval/bin/python -m pip --disable-pip-version-check install -c .ci/constraints.txt \
		-e '.[lm-eval]'
	@touch $@
