# make reproduce: run every notebook and build the book. make test: run the tests. Both set up .venv first.
# Interrupt at any time and run again: what was finished is not done twice.
# TORCH=cpu: install the CPU build of PyTorch, without the CUDA libraries, if the user's package index has one.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.SILENT:
.DEFAULT_GOAL := help
.PHONY: help setup reproduce test check lock clean torch-build

VENV := .venv
# By another name: where a recipe names MAKE itself, `make -n` would run it, and install gigabytes.
SUBMAKE = $(MAKE)
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALL_LOG := $(VENV)/install.log
# Constraints for pip: empty, or the CPU builds that were found.
TORCH_BUILD := $(VENV)/torch-build.txt
TORCH :=
ifneq ($(filter-out cpu,$(TORCH)),)
$(error TORCH=$(TORCH) is unknown: give TORCH=cpu, or leave it out)
endif
# Tests run beside each other, each process on one thread; more than four processes gain little and take
# much memory. make test BESIDE= runs them one after the other. What takes longest starts first.
BESIDE := -n logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder
PYTEST := $(if $(BESIDE),OMP_NUM_THREADS=1) $(PYTHON) -m pytest $(BESIDE) --color=auto
LONG := tests/book/test_reproduce.py tests/test_project.py notebooks
TESTS := $(LONG) $(filter-out $(LONG),$(sort $(wildcard tests/test_*.py tests/*/test_*.py)))
STEPS := $(if $(filter reproduce,$(MAKECMDGOALS)),4,3)

# glibc gives freed memory back at once and asks for it again: without these, training on a CPU takes twice as long.
export MALLOC_MMAP_THRESHOLD_ := 4294967296
export MALLOC_TRIM_THRESHOLD_ := 4294967296
export MALLOC_TOP_PAD_ := 1073741824
# Text is UTF-8 whatever the locale.
export PYTHONUTF8 := 1

help:
	echo "make reproduce   run every notebook and build the book: _build/html/index.html"
	echo "make test        run the tests"
	echo "make check       the quick part of it, for a small change: format, types, imports, tests of the method"
	echo "make lock        write the installed versions to requirements.lock"
	echo "make clean       remove .venv, the built book and caches; data, checkpoints and the ledger stay"
	echo "With TORCH=cpu, as in make reproduce TORCH=cpu, a new .venv gets PyTorch without the CUDA libraries,"
	echo "if the package index that pip is set to has such a build."

reproduce: setup
	echo "3/4 Running the notebooks, profile published; the committed ones stay as they are"
	$(PYTHON) -m kdig_utils reproduce --profile published --resume
	echo "4/4 Building the book from the committed notebooks, which were executed in the same profile"
	$(VENV)/bin/jupyter-book build . -W --keep-going -n
	echo "Notebooks and book took $$SECONDS s; open $$PWD/_build/html/index.html"

test: setup
	echo "3/3 Testing: package, project, every notebook in profiles smoke and published, the book"
	$(PYTEST) $(TESTS) --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitise.cfg --durations=15
	echo "The tests took $$SECONDS s"

check: setup
	echo "3/3 Checking: format, types, imports, the quick tests of the method"
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check kdig_utils tests
	$(PYTHON) -m mypy
	$(VENV)/bin/lint-imports --no-logo
	$(PYTEST) tests/method -m "not slow"
	echo "The check took $$SECONDS s; make test runs all tests"

setup: $(INSTALLED)
	echo "The environment in $(VENV) is up to date with pyproject.toml and requirements.txt"

# The stamp is written last: an interrupted installation goes on at the next call.
$(INSTALLED): pyproject.toml requirements.txt setup.py
	trap 'echo "stopped; run make again to go on" >&2; exit 130' INT
	fail() { echo "error: $$*" >&2; exit 1; }
	works() { "$$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
	find_python() {
	  for candidate in python3.13 python3.12 python3.11 python3; do
	    if works $$candidate; then echo $$candidate; return; fi
	  done
	}
	need_gb() {
	  free_gb=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1000000) }')
	  [ $$free_gb -ge $$1 ] || fail "not enough space: installing takes $$1 GB, $$PWD has" \
	    "$$free_gb GB free; free some and run make again"
	}
	# While the environment is made, the downloaded packages lie beside it.
	size="6.8 GB" needed=10 fresh=
	[ -z "$(TORCH)" ] || size="2.2 GB" needed=4
	if ! works $(PYTHON) || ! $(PYTHON) -m pip --version >/dev/null 2>&1; then
	  need_gb $$needed
	  python=$$(find_python)
	  [ -n "$$python" ] || fail "no Python 3.11 or newer with venv was found (python3 is" \
	    "$$(python3 --version 2>&1 || echo missing)); install one, on Debian: apt install python3 python3-venv"
	  echo "1/$(STEPS) Making the virtual environment $(VENV) with $$($$python --version)"
	  $$python -m venv --clear $(VENV)
	  fresh=yes
	fi
	$(SUBMAKE) --no-print-directory torch-build
	if [ -n "$(TORCH)" ] && [ ! -s $(TORCH_BUILD) ]; then
	  size="6.8 GB" needed=10
	  [ -z "$$fresh" ] || need_gb $$needed
	fi
	echo "2/$(STEPS) Installing the requirements into $(VENV), $$size, some minutes; details in $(INSTALL_LOG)"
	mkdir -p $(VENV)/tmp
	if ! TMPDIR="$$PWD/$(VENV)/tmp" $(PYTHON) -m pip install --retries 2 --progress-bar off -r requirements.txt \
	  -c $(TORCH_BUILD) 2>&1 \
	  | tee $(INSTALL_LOG) | sed -u -n -e 's#^ *Downloading \([^ ]*/\)\?\([^ /]*whl\) (\(.*\)).*#  downloading \2, \3#p' \
	    -e 's#^Installing collected.*#  installing what was downloaded#p'
	then
	  rm -rf $(VENV)/tmp
	  if grep -q "No space left" $(INSTALL_LOG); then fail "the disk is full: free $$needed GB and run make again"; fi
	  if grep -Eq "NewConnectionError|NameResolution|Network is unreachable|Connection|ProxyError|timed out" $(INSTALL_LOG)
	  then fail "the package index cannot be reached: check the network and run make again"; fi
	  fail "the installation failed: $$(grep -m 1 '^ *ERROR' $(INSTALL_LOG) || tail -n 1 $(INSTALL_LOG))"
	fi
	rm -rf $(VENV)/tmp
	touch $(INSTALLED)

# The CPU builds, such as 2.14.1+cpu, are looked for where pip is set to look, and nowhere else. Both packages need one,
# and the two must fit together.
torch-build:
	mkdir -p $(VENV)
	: > $(TORCH_BUILD)
	[ -n "$(TORCH)" ] || exit 0
	newest() { $(PYTHON) -m pip index versions $$1 2>/dev/null | grep -o '[0-9][0-9.]*+cpu' | head -n 1 || true; }
	torch=$$(newest torch) torchvision=$$(newest torchvision)
	if [ -n "$$torch" ] && [ -n "$$torchvision" ]; then
	  printf '%s\n' torch==$$torch torchvision==$$torchvision > $(TORCH_BUILD)
	  $(PYTHON) -m pip install --dry-run -q -c $(TORCH_BUILD) $$(grep ^torch requirements.txt) >/dev/null 2>&1 \
	    || : > $(TORCH_BUILD)
	fi
	if [ -s $(TORCH_BUILD) ]; then echo "PyTorch for the CPU: torch $$torch, torchvision $$torchvision"; exit 0; fi
	echo "No CPU builds that fit together: the package index that pip is set to has torch $${torch:-none}, torchvision" \
	  "$${torchvision:-none}. The ordinary builds are installed. PIP_EXTRA_INDEX_URL adds an index that has them."

# What pip installed, without the project itself.
lock: setup
	$(PYTHON) -m pip freeze --exclude-editable --exclude kdig-utils > requirements.lock
	echo "requirements.lock: $$(wc -l < requirements.lock) packages"

clean:
	rm -rf $(VENV) _build build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find kdig_utils tests book -name __pycache__ -prune -exec rm -rf {} +
