# Every target sets up what it needs: a fresh machine needs make and Python 3.11 or newer, nothing else.
#
#   make demo PYTHON=python3.12                    another interpreter for the virtual environment
#   make demo TORCH=torch                          another PyTorch build: any pip requirement, or the path of a wheel
#   make test PYTEST_ARGS="-m 'not slow'"          what pytest runs

PYTHON ?= python3
# Named exactly, so that a build of this version that pip finds on the machine, such as a CPU-only wheel in a folder of
# pip's find-links, wins over the newest release with its gigabytes of GPU libraries.
TORCH ?= torch==2.13.0
VENV := .venv
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO := out/emoji-w4a4

# A stamp is newer than the pyproject.toml that it installed, so a second run installs nothing.
DEMO_STAMP := $(VENV)/.installed-demo
TEST_STAMP := $(VENV)/.installed-test

# Tests run in $(WORKERS) processes: one thread each, none spinning while it waits, and nothing from a model hub.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint clean

help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' Makefile

demo: $(DEMO_STAMP) ## quantize the bundled text-to-image model to 4 bits, validate it, write a report
	"$(VENV)/bin/dmqexport" build -m emoji --bits w4a4 --target ort-cpu -o "$(DEMO)"
	@for file in dmqexport/report.html dmqexport/grid.png; do \
		test -s "$(DEMO)/$$file" || { echo "make demo: the build ended well but left no $(DEMO)/$$file" >&2; exit 1; }; \
	done
	@echo
	@echo "report:  $(DEMO)/dmqexport/report.html"
	@echo "picture: $(DEMO)/dmqexport/grid.png"

test: lint ## lint, type-check, and run every test
	$(TEST_ENV) "$(VENV)/bin/python" -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(TEST_STAMP) ## check style, format and types
	"$(VENV)/bin/python" -m ruff check .
	"$(VENV)/bin/python" -m ruff format --check .
	"$(VENV)/bin/python" -m mypy

clean: ## remove the virtual environment, the caches, and what the demo built
	rm -rf "$(VENV)" "$(DEMO)" "$(DEMO).work" build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find dmqexport calib passes engines tests -type d -name __pycache__ -prune -exec rm -rf {} +

$(DEMO_STAMP): pyproject.toml | $(VENV)/bin/pip
	"$(VENV)/bin/python" -m pip install "$(TORCH)" -e ".[cpu]"
	@touch "$@"

$(TEST_STAMP): pyproject.toml | $(VENV)/bin/pip
	"$(VENV)/bin/python" -m pip install "$(TORCH)" -e ".[cpu,rtx,openvino,lora,serving,serving-test,dev]"
	@touch "$@" "$(DEMO_STAMP)"

# Debian and Ubuntu split venv and ensurepip from Python; the interpreter imports venv all the same, so ask ensurepip.
$(VENV)/bin/pip:
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "make: dmqexport needs Python 3.11 or newer, and there is no $(PYTHON);" \
			"name one that is installed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: dmqexport needs Python 3.11 or newer, and $(PYTHON) is $$("$(PYTHON)" -V 2>&1);" \
			"name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		package=$$("$(PYTHON)" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "make: $(PYTHON) lacks venv; installing Debian's $$package" && \
			apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q "$$package"; \
		else \
			echo "make: $(PYTHON) cannot make virtual environments; install the package that adds that" \
				"(Debian and Ubuntu: apt-get install $$package) and run make again" >&2; exit 1; \
		fi; }
	"$(PYTHON)" -m venv "$(VENV)"
