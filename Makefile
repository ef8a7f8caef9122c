# make setup | demo | serve | test | stress | train-default | autoencoders | cluster | lock
# The first run installs into .venv; later runs start at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INPUT ?=
NATURAL ?= ../shared/data/natural
VARIED ?= ../shared/data/natural_varied
WORK ?= runs/default
SEEDS := 0 1 2

.PHONY: setup demo serve test stress docs train-default autoencoders cluster lock

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/clipflow-ray demo $(if $(INPUT),--input "$(INPUT)")

# The page and the API on http://127.0.0.1:8000, until Ctrl-C.
serve: setup
	$(BIN)/clipflow-ray serve

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# The long tests: chaos, listing, jobs on three nodes, two training workers, hostile input through the edge.
stress: setup
	$(BIN)/python -m pytest -m stress

# Write the generated sections of docs/formats.md.
docs: setup
	$(BIN)/python -m clipflow_ray.lab.formats

# Train the packaged checkpoints again, and with two other seeds, and calibrate them; natural images only.
# The photographs of VARIED get 79 of 84 parts of the weight, so that each source weighs the same.
train-default: setup
	for name in default fast; do \
	  for seed in $(SEEDS); do \
	    $(BIN)/clipflow-ray train --config jobs/recipes/$$name.yaml --input "$(NATURAL)" --output $(WORK)/$$name \
	      --seed $$seed && $(BIN)/clipflow-ray calibrate --input "$(VARIED)" --keep-shipped 0.0595238 \
	      --checkpoint $(WORK)/$$name/checkpoint --output $(WORK)/$$name/seed-$$seed || exit 1; \
	  done; \
	  cp $(WORK)/$$name/seed-0/checkpoint/* clipflow_ray/assets/$$name/; \
	done

# Fit the auto-encoders of the learned proxy families, on the sources that train the packaged checkpoint.
autoencoders: setup
	$(BIN)/python jobs/autoencoders.py --config jobs/recipes/default.yaml --input "$(NATURAL)" \
	  --output clipflow_ray/assets/autoencoders

# Write the KubeRay files from cluster/base.yaml.
cluster: setup
	$(BIN)/python cluster/render.py

# Write the versions of the installed packages. torch pins its own CUDA packages, which differ by platform.
lock: setup
	$(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(nvidia-|cuda-|triton|-e |clipflow)' > requirements.lock
