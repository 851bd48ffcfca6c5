# make demo      all stages on a synthetic devkit, with scores and report pages (5 to 8 minutes)
# make test      lint and the whole test suite
# make coverage  the test suite, with the lines and branches that it covers (at least 95 and 90 %)
# make setup     only the virtual environment, which the others make when needed

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := runs/demo
SEED ?= 0

.PHONY: demo test coverage lint setup clean

demo: setup
	$(RUN) -m voc12.toy $(DEMO)/VOC --images 160 --size 192 --seed $(SEED)
	$(RUN) -m tool.pipeline --voc12_root $(DEMO)/VOC --network tiny --weights none \
	    --out_dir $(DEMO) --seed $(SEED) --num_workers 1
	$(RUN) -m voc12.report --voc12_root $(DEMO)/VOC --list $(DEMO)/lists/train.txt --images 1 \
	    --cam $(DEMO)/cam --la $(DEMO)/la_crf --ha $(DEMO)/ha_crf --rw $(DEMO)/rw \
	    --out $(DEMO)/stages.png
	$(RUN) -m voc12.report --voc12_root $(DEMO)/VOC --list $(DEMO)/lists/val.txt \
	    --cam $(DEMO)/cam --rw $(DEMO)/rw --seg $(DEMO)/seg \
	    --log $(DEMO)/cls.csv $(DEMO)/aff.csv $(DEMO)/seg.csv --out $(DEMO)/report_val.html
	$(RUN) -m voc12.report --voc12_root $(DEMO)/VOC --list $(DEMO)/lists/train.txt \
	    --cam $(DEMO)/cam --la $(DEMO)/la_crf --ha $(DEMO)/ha_crf --rw $(DEMO)/rw \
	    --log $(DEMO)/cls.csv $(DEMO)/aff.csv --out $(DEMO)/report_train.html

test: setup lint
	$(RUN) -m pytest

coverage: export COVERAGE_FILE = $(CURDIR)/.coverage
coverage: setup
	$(RUN) -m coverage erase
	$(RUN) -m coverage run -m pytest
	$(RUN) -m coverage combine -q
	$(RUN) -m coverage json -q -o coverage.json
	$(RUN) tests/coverage_floor.py coverage.json

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

setup: $(VENV)/.installed

# Installed again whenever the requirements change.
$(VENV)/.installed: requirements.txt requirements-dev.txt requirements-crf.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	@$(RUN) -m pip install --quiet -r requirements-crf.txt 2> /dev/null || \
	    echo "without pydensecrf, which could not be compiled; only comparisons need it"
	touch $@

clean:
	rm -rf runs
