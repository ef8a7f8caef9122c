# make setup | demo | serve | test | stress | train-default | calibrate-default | autoencoders | cluster | lock
# The first run installs into .venv; later runs start at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INPUT ?=
NATURAL ?= ../shared/data/natural
VARIED ?= ../shared/data/natural_varied
CALIBRATION := polyu_cameras coco_val_train azure_sample_photos mmpose_testdata trashnet_iphone
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
	nice $(BIN)/mypy & mypy=$$!; $(BIN)/python -m pytest tests/ray; tests=$$?; wait $$mypy && exit $$tests

# The long tests: chaos, listing, jobs on three nodes, two training workers, hostile input through the edge.
stress: setup
	$(BIN)/python -m pytest -m stress

# Write the generated sections of docs/formats.md.
docs: setup
	$(BIN)/python -m clipflow_ray.lab.formats

# Train the packaged checkpoint again, and with two other seeds; natural images only.
train-default: setup
	for seed in $(SEEDS); do \
	  $(BIN)/clipflow-ray train --config jobs/train_default.yaml --input "$(NATURAL)" --output $(WORK) --seed $$seed \
	  && rm -rf $(WORK)/seed-$$seed && mv $(WORK)/checkpoint $(WORK)/seed-$$seed || exit 1; \
	done
	cp $(WORK)/seed-0/* clipflow_ray/assets/default/

# Calibrate the packaged checkpoint again, for both precisions: on the sources of NATURAL that did not train it, and on
# those of VARIED. Each source weighs the same.
calibrate-default: setup
	$(BIN)/clipflow-ray calibrate $(foreach source,$(CALIBRATION),--input "$(NATURAL)/$(source)") --input "$(VARIED)" \
	  --output $(WORK)/calibrated
	cp $(WORK)/calibrated/checkpoint/* clipflow_ray/assets/default/

# Fit the auto-encoders of the learned proxy families, on the sources that train the packaged checkpoint.
autoencoders: setup
	$(BIN)/python jobs/autoencoders.py --config jobs/train_default.yaml --input "$(NATURAL)" \
	  --output clipflow_ray/assets/autoencoders

# Write the KubeRay files from cluster/base.yaml.
cluster: setup
	$(BIN)/python cluster/render.py

# Write the versions of the installed packages. torch pins its own CUDA packages, which differ by platform.
lock: setup
	$(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(nvidia-|cuda-|triton|-e |clipflow)' > requirements.lock
