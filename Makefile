# Two commands do everything on a fresh machine with Python 3.11 or newer: `make demo` and `make test`; `make docs` builds the
# documentation as a site, `make dist` what a package index takes.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
OUT ?= demo-out

.PHONY: demo test lint sanitize emulate docs dist install install-test clean

demo: install
	-$(VENV)/bin/sparity fetch smollm2
	$(VENV)/bin/sparity demo --output $(OUT)

# One thread per worker: more would wait for each other. Compiled modules are kept, for the processes that tests start.
# Tests of the real model are skipped where it cannot be fetched; the last line of pytest says how many.
test: install-test lint
	-$(VENV)/bin/sparity fetch smollm2
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto

lint: install-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The kernels' tests with a library that watches every read, write and overflow; needs cmake and gcc.
sanitize: install-test
	cmake -S csrc -B build/sanitized -DSPARITY_SANITIZE=ON
	cmake --build build/sanitized --parallel
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	SPARITY_LIBRARY=build/sanitized/libsparity_kernels.so OMP_NUM_THREADS=1 \
	$(VENV)/bin/python -m pytest -q -n auto tests/engine tests/attacks/test_fast_path_inputs.py

# The kernels for 64-bit ARM, as they are shipped, under emulation; Debian: g++-aarch64-linux-gnu qemu-user-static cmake.
emulate: install-test
	cmake -S csrc -B build/aarch64 --toolchain toolchains/aarch64-linux-gnu.cmake -DSPARITY_REPLAY=ON
	cmake --build build/aarch64 --parallel
	SPARITY_AARCH64=build/aarch64 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q tests/engine/kernels/test_neon.py

# To build/site, which needs no network then or later; a broken link or a page outside the navigation is an error.
docs: install-test
	$(VENV)/bin/python -m sphinx -W --keep-going -E -a -q -b html -c docs/site -d build/site-doctrees . build/site
	@echo "open build/site/index.html"

# To dist: the source archive, and one wheel for this kind of processor, built from that archive and tried in an environment of
# its own. libgomp is not put into it: PyTorch brings one, and a process should have one.
dist: install-test
	rm -rf build/wheels dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(VENV)/bin/python -m build --outdir build/wheels .
	PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheels/*.whl
	cp build/wheels/*.tar.gz dist/
	$(VENV)/bin/python tools/try_wheel.py dist/*.whl

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

# torch comes first and pinned, so that nothing that follows can ask for another build of it.
$(VENV)/.torch: constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(wildcard csrc/*)
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

# What is installed is not built again: only what else the tests need is added.
$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt 'sparity[test]'
	-$(PIP) install --constraint constraints.txt 'sparity[eval]'  # without it, tests of task suites are skipped
	touch $@

clean:
	rm -rf $(VENV) $(OUT) build dist
