# The commands of the README. Each target sets up .venv first, if that is not done already.
PY := .venv/bin/python
# test processes at a time
JOBS := 2

.PHONY: help setup demo serve test proof slow gpu lint docker clean

help:
	@echo 'make demo               raw pictures -> shards -> training -> evaluation -> a page (about 3 minutes)'
	@echo 'make demo RAW=DIR       the same on at most 5,000 of your pictures (LIMIT=N for more)'
	@echo 'make serve              the dashboard, with drawn pictures to build from (PORT=N for another port)'
	@echo 'make test               the tests        make proof  kills, clusters, servers, full disks, damaged files'
	@echo 'make slow               the long proofs, hours on a small machine'
	@echo 'make gpu                the tests that need a CUDA device, and its speed (skipped without one)'
	@echo 'make lint               ruff and mypy    make setup  only set up .venv'
	@echo 'make docker             builds and tries the image without a Docker engine (root, Debian)'

setup: .venv/ready

.venv/ready: pyproject.toml setup.py constraints.txt tools/setup.sh
	@bash tools/setup.sh

demo: setup
	@$(PY) tools/demo.py $(if $(value RAW),'$(subst ','\'',$(value RAW))') $(if $(LIMIT),--limit $(LIMIT))

# the training pictures are written last: without them the drawing was interrupted
serve: setup
	@[ -e demo/serve/raw/ILSVRC2012_img_train.tar ] || { rm -rf demo/serve/raw && $(PY) tools/make_raw.py demo/serve/raw; }
	@$(PY) -m penstock serve --root demo/serve --raw-root demo/serve/raw $(if $(PORT),--port $(PORT))

test: setup
	@$(PY) -m pytest -q -n $(JOBS) --dist loadfile

proof: setup
	@$(PY) -m pytest -q -n $(JOBS) --dist loadfile -m 'proof and not slow'

slow: setup
	@$(PY) -m pytest -q -m slow

gpu: setup
	@$(PY) -m pytest -q -m gpu
	@$(PY) tools/bench gpu

lint: setup
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy pipeline trainer tools penstock penstock_imagenet.py setup.py

docker:
	@bash docker/prove.sh

clean:
	rm -rf demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache
