# make setup | demo | serve | test | stress | train-default | calibrate-default | autoencoders | cluster | lock
# The first run installs into .venv; later runs start at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INPUT ?=
NATURAL ?= ../shared/data/natural
VARIED ?= ../shared/data/natural_varied
# The folders of the calibration sources of the packaged training.
SOURCES = $(shell $(BIN)/python -c "import yaml; print(*yaml.safe_load(open('jobs/train_default.yaml'))['split']['calibration'])")
CALIBRATION = $(foreach source,$(SOURCES),$(wildcard $(NATURAL)/$(source) $(VARIED)/$(source)))
WORK ?= runs/default
SEEDS := 0 1 2

# Many processes start in each run. Without cached bytecode, each would compile its imports again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo serve test stress docs train-default calibrate-default autoencoders cluster lock

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	# pip would compile all of it on one core. This compiles what an audit imports, and later runs add what they import.
	$(BIN)/python -c "import clipflow_ray.audit.run"
	touch $@

demo: setup
	$(BIN)/clipflow-ray demo $(if $(INPUT),--input "$(INPUT)")

# The page and the API on http://127.0.0.1:8000, until Ctrl-C.
serve: setup
	$(BIN)/clipflow-ray serve

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/e2e tests/unit --numprocesses 2 --dist loadfile
	# These tests wait much of the time for processes to start, so mypy runs beside them.
	nice $(BIN)/mypy & mypy=$$!; $(BIN)/python -m pytest tests/ray --numprocesses 2 --dist loadfile; tests=$$?; \
	  wait $$mypy && exit $$tests

# The long tests: chaos, listing, jobs on three nodes, two training workers, hostile input through the edge.
stress: setup
	$(BIN)/python -m pytest -m stress

# Write the generated sections of docs/formats.md.
docs: setup
	$(BIN)/python -m clipflow_ray.lab.formats

# Train the packaged checkpoints `default` and `fast` again, and with two other seeds; natural images only. `fast` is
# `default` without its largest view.
train-default: setup
	mkdir -p $(WORK)
	cp jobs/train_default.yaml $(WORK)/default.yaml
	sed '/size: 448/d' jobs/train_default.yaml > $(WORK)/fast.yaml
	for name in default fast; do for seed in $(SEEDS); do \
	  $(BIN)/clipflow-ray train --config $(WORK)/$$name.yaml --input "$(NATURAL)" --input "$(VARIED)" --output $(WORK) \
	    --seed $$seed && rm -rf $(WORK)/$$name-$$seed && mv $(WORK)/checkpoint $(WORK)/$$name-$$seed || exit 1; \
	done; done

# Calibrate both for both precisions, on the calibration sources of their training.
calibrate-default: setup
	for name in default fast; do \
	  $(BIN)/clipflow-ray calibrate --checkpoint $(WORK)/$$name-0 --output $(WORK)/$$name $(addprefix --input=,$(CALIBRATION)) \
	  && cp $(WORK)/$$name/checkpoint/* clipflow_ray/assets/$$name/ || exit 1; \
	done

# Fit the auto-encoders of the learned proxy families, on the sources that train the packaged checkpoint.
autoencoders: setup
	$(BIN)/python jobs/autoencoders.py --config jobs/train_default.yaml --input "$(NATURAL)" --input "$(VARIED)" \
	  --output clipflow_ray/assets/autoencoders

# Write the KubeRay files from cluster/base.yaml.
cluster: setup
	$(BIN)/python cluster/render.py

# Write the versions of the installed packages. torch pins its own CUDA packages, which differ by platform.
lock: setup
	$(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(nvidia-|cuda-|triton|-e |clipflow)' > requirements.lock
