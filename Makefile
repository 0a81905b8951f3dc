# make demo: from a fresh clone to a verdict.  make test: the whole test suite.
# Variables: PYTHON (3.11 or newer), TORCH_INDEX (a package index for torch alone, for example
# https://download.pytorch.org/whl/cpu for a small download without CUDA), SEED.
PYTHON ?= python3
TORCH_INDEX ?=
SEED ?= 0
BIN := .venv/bin

.PHONY: demo test install clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/python -m hcrlhf demo --seed $(SEED)

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

install: .venv/installed

# The stamp is written last: an installation that was broken off is begun again.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hcrlhf needs Python 3.11 or newer; give one with: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "this Python has no venv module; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt \
	  $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[nf4]'
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[nf4,dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
