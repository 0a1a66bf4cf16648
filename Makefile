# One word for each thing a developer does; CI calls the same words.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help serve test check fix model prove-probabilities prove bench bench-peers profile bench-request-path lock sbom clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: .venv/.serve ## Start the service, with its own PostgreSQL and demo CRM unless DATABASE_URL is set
	@$(BIN)/leadscore serve

# Tests wait as much as they compute: one process more than there are processors.
test: check ## Everything that must pass
	$(BIN)/python -m pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist loadfile --no-loadscope-reorder

check: .venv/.dev ## Read-only checks: format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

fix: .venv/.dev ## Format and repair what can be repaired
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

model: .venv/.training ## Train the shipped model again from the demo CRM (same seed, same predictions)
	$(BIN)/python -m app.training.shipped_model

# A public teaching data set that may not be redistributed, and its columns that were filled in after the outcome.
REAL_LEADS ?= ../shared/data/x_education_leads.csv
TRAPS := tags,lead_quality,lead_profile,asymmetrique_activity_index,asymmetrique_profile_index,\
	asymmetrique_activity_score,asymmetrique_profile_score,last_activity,last_notable_activity
TARGETS := roc_auc=0.880 pr_auc=0.829 brier=0.134 log_loss=0.420 calibration_error=0.012 ranking=0 intervals=14 \
	later_roc_auc=0.900 later_brier=0.121

prove-probabilities: .venv/.dev ## Measure the probabilities on real leads (REAL_LEADS=file, ONLY=row)
	@test -f "$(REAL_LEADS)" || { echo "The real leads are not at $(REAL_LEADS); set REAL_LEADS=/path/to/the.csv" >&2; exit 1; }
	@$(BIN)/python -m bench.prove_probabilities --csv "$(REAL_LEADS)" --id "Prospect ID" --label Converted \
		--missing Select --exclude "$(TRAPS)" --order-by lead_number $(addprefix --target ,$(TARGETS)) $(if $(ONLY),--only $(ONLY))

# Each is a module bench.prove_NAME, with a self-test of its own. LONG=1 does much more, SEED=n draws the same again.
# Those that measure time have the machine to themselves; of the others, three run at a time, the longest first.
PROOFS := restarts memory kill artifacts core hostile-input personal-data batching log-failures power-loss
TIMED_PROOFS := overload slow-clients database-faults cost

prove: .venv/.dev ## Prove every promise of reliability and security (short runs; WITHOUT="name ...")
	@$(BIN)/python -m bench.all_proofs $(if $(LONG),--long) $(if $(SEED),--seed $(SEED)) $(filter-out $(WITHOUT),$(PROOFS)) \
		$(addprefix --alone ,$(filter-out $(WITHOUT),$(TIMED_PROOFS)))

prove-%: .venv/.dev
	@$(BIN)/python -m bench.prove_$(subst -,_,$*) $(if $(LONG),--long) $(if $(SEED),--seed $(SEED))

bench: .venv/.dev ## Time the service beside its floor and the usual ways (SHORT=1: are the answers right?)
	@$(BIN)/python -m bench.suite $(if $(SHORT),--short) --json var/bench.json

bench-peers: .venv/.dev ## Time the service beside MLServer, BentoML, LitServe, Ray Serve and MLflow (installs 3 GB once)
	@$(BIN)/python -m bench.peers --json var/bench-peers.json

profile: .venv/.dev ## Show where a request's time goes, stage by stage
	@$(BIN)/python -m bench.profile

bench-request-path: .venv/.serve ## Time scoring against an older commit, side by side (BASELINE=ref)
	@$(BIN)/python -m bench.request_path $(if $(BASELINE),--baseline $(BASELINE))

lock: .venv/.dev ## Renew the hash-pinned locks from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
		--no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
		--extra build -o requirements.lock
	$(BIN)/uv pip compile pyproject.toml --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
		--no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
		--extra build --extra training --constraint requirements.lock -o requirements-training.lock
	$(BIN)/uv pip compile pyproject.toml --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
		--no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
		--extra build --extra training --extra dev --constraint requirements-training.lock -o requirements-dev.lock

SBOM ?= var/sbom.cdx.json

sbom: .venv/.dev ## Write the bill of materials of what serves (CycloneDX, out of requirements.lock; SBOM=file)
	@mkdir -p $(dir $(SBOM))
	@$(BIN)/python -W ignore::UserWarning -m cyclonedx_py requirements requirements.lock --pyproject pyproject.toml \
		--output-reproducible --output-file $(SBOM)

clean: ## Remove the virtual environment, caches and everything the service wrote
	rm -rf .venv var build *.egg-info app/ai/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.serve: requirements.lock pyproject.toml setup.py app/ai/_score_kernels.c | .venv/bin/python
	$(PIP) install --require-hashes -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.training: requirements-training.lock .venv/.serve
	$(PIP) install --require-hashes -r requirements-training.lock
	@touch $@

.venv/.dev: requirements-dev.lock .venv/.serve
	$(PIP) install --require-hashes -r requirements-dev.lock
	@touch $@
