# Development commands; README.md says how to use the product. Variables: PYTHON, DEV_BUILD, SFI_LLAMA_DIR.

PYTHON        ?= python3
DEV_BUILD     ?= build/dev
SFI_LLAMA_DIR ?=
CMAKE_FLAGS   ?=
PYTEST_FLAGS  ?=

.PHONY: build dev test check clean

# install into the environment of $(PYTHON)
build:
	CMAKE_ARGS=-DLLAMA_BUILD=OFF $(PYTHON) -m pip install '.[test]'

# incremental build, linked into sfi_local/ so that it runs from the source tree; with SFI_LLAMA_DIR that tree is
# built where it lies
dev:
	cmake -S native -B $(DEV_BUILD) $(if $(shell command -v ninja),-G Ninja) -DPython_EXECUTABLE="$$($(PYTHON) -c 'import sys; print(sys.executable)')" \
	    -DSFI_TESTS=ON -DSFI_LLAMA_TREE="$(SFI_LLAMA_DIR)" $(CMAKE_FLAGS)
	cmake --build $(DEV_BUILD) --parallel 2
	ln -sfn "$$(cd $(DEV_BUILD)/bin && pwd)" sfi_local/lib
	ln -sf "$$(cd $(DEV_BUILD)/package && pwd)"/_sfi*.so "$$(cd $(DEV_BUILD)/package && pwd)"/_build_info.py sfi_local/

test:
	$(PYTHON) -m pytest -q $(PYTEST_FLAGS) tests

check:
	$(PYTHON) patches/patchset.py check
	$(PYTHON) patches/security.py

clean:
	rm -rf build sfi_local/lib sfi_local/_sfi*.so sfi_local/_build_info.py
