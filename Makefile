# make demo | test | test-lowest | gpu-check | gpu-wheels | notebooks | readme | clean
PYTHON ?= python3
VENV    = .venv
BIN     = $(VENV)/bin
SASFORMER_DATA ?= $(wildcard $(abspath ../shared/data))
export SASFORMER_DATA
# notebooks and tests run side by side with one thread each: two threads on two cores would only wait for each other
export OMP_NUM_THREADS ?= 1
export PYTHONDONTWRITEBYTECODE = 1

.PHONY: demo test test-lowest check chromium gpu-check gpu-wheels notebooks readme clean

$(VENV)/.installed: settings.ini setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=24"
	$(BIN)/pip install --quiet --prefer-binary -e ".[dev,tensorboard]"
	touch $@

# baseline and SASFormer on the built-in hearts, one core each, then both mIoUs and a picture
demo: $(VENV)/.installed
	$(BIN)/python -m sasformer.demo

check: $(VENV)/.installed
	$(BIN)/python -m pytest -q tests/test_repository.py

# the page of sasformer_annotate is tested in a real Chromium; where there is none, root of a Debian gets one
chromium:
	@which chromium chromium-browser google-chrome | grep -q . \
	|| { [ "$$(id -u)" = 0 ] && timeout 100 apt-get install -qq -y chromium >/dev/null 2>&1; } \
	|| echo "no Chromium: the tests of the page of sasformer_annotate are skipped"

test: $(VENV)/.installed chromium
	$(BIN)/nbdev_test --n_workers 2 --timing
	$(BIN)/python -m pytest -q --durations=10 -n 2 --dist loadfile --no-loadscope-reorder tests
	$(MAKE) test-lowest

# the notebooks that prove fast versions equal to plain ones, once more with the instructions of an old processor: sums are then made
# in another order, and a tolerance that fits one machine alone fails
test-lowest: $(VENV)/.installed
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/nbdev_test --file_re '^(07|1[238]|2[0124-9])_' --n_workers 2 --timing

# what only a GPU can show, in less than 8 minutes, into results/gpu; where the machine has a Python with PyTorch of its
# own, GPU_PYTHON=python3 uses that and installs nothing
gpu-check: $(if $(GPU_PYTHON),,$(VENV)/.installed)
	$(or $(GPU_PYTHON),$(BIN)/python) -m sasformer.gpu check --device cuda --out results/gpu

# the packages that a GPU's machine without a network lacks, some data, and the lines to type there
gpu-wheels: $(VENV)/.installed
	$(BIN)/python -m sasformer.gpu wheels --out gpu_wheels

# every notebook from top to bottom, then the export, clean metadata and the README
notebooks: $(VENV)/.installed
	cd nbs && for f in [0-9]*.ipynb quickstart.ipynb add_a_method.ipynb paper/*.ipynb index.ipynb; do ../$(BIN)/jupyter nbconvert --to notebook --execute --inplace $$f || exit 1; done
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(MAKE) readme

readme: $(VENV)/.installed
	$(BIN)/python tests/render_readme.py

# only what can be made again in minutes: trained models in demo/ and runs/ stay
clean:
	rm -rf $(VENV) *.egg-info .pytest_cache _proc
