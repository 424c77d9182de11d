# Every target sets up what it needs: on a fresh clone `make test` is enough. Only Python 3.11 or later and make have to be there.
#   make demo [DEMO=FOLDER]     make test [ARGS="-k delta -x"]     PYTHON=python3.13 make test

PYTHON ?= python3
DEMO ?=
ARGS ?=
SECONDS ?= 60
TARGET ?=
LLAVA ?= $(PEERS)/LLaVA

VENV := .venv
PEERS := .peers
BIN := $(VENV)/bin
READY := $(VENV)/.stamp
TRANSFORMERS := $(addprefix $(PEERS)/transformers-,4.37.2 4.45.2 4.47.1 4.57.6 5.24.0)
INSTALL := -m pip install -qq --prefer-binary --no-input --disable-pip-version-check --retries 10

.PHONY: demo test check peer llamacpp consumers bench faults fuzz oldest docs site picture clean

demo: $(READY)
	@$(BIN)/llava-weights demo $(DEMO)

test: $(READY)
	@$(BIN)/python -m pytest -n 2 $(ARGS)

check: $(READY)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_layering.py

peer: $(READY) $(PEERS)/fschat/.stamp $(PEERS)/bitsandbytes/.stamp $(PEERS)/mlx/.stamp $(PEERS)/llama-cpp/.stamp $(TRANSFORMERS:=/.stamp)
	@$(BIN)/python -m pytest -m peer tests/peers $(ARGS)

llamacpp: $(READY) $(PEERS)/llama-cpp-python/.stamp
	@$(BIN)/python -m pytest -m peer tests/peers/llama_cpp_runs.py $(ARGS)

# LLAVA=FOLDER names a clone of LLaVA's repository where github.com can't be reached.
CONSUMERS := $(addprefix $(PEERS)/,vllm mlx-vlm openvino serve llama-cpp-python transformers-4.37.2)
consumers: $(READY) $(CONSUMERS:=/.stamp) $(LLAVA)/llava
	@LLAVA="$(abspath $(LLAVA))" $(BIN)/python -m pytest -m consumer tests/consumers $(ARGS)

bench: $(READY) $(PEERS)/fschat/.stamp $(PEERS)/mergekit/.stamp
	@$(BIN)/python -m benchmarks.run $(ARGS)

faults: $(VENV)/.fuzz
	@$(BIN)/python -m pytest -m faults $(ARGS)

fuzz: $(VENV)/.fuzz
	@$(BIN)/python tests/fuzz/run.py $(TARGET) --seconds $(SECONDS)

oldest: $(PEERS)/oldest/.stamp
	@$(PEERS)/oldest/bin/python -m pytest -n 2 $(ARGS)

docs: $(READY)
	@mkdir -p docs
	@$(BIN)/python -m typer llava_weights.cli.main utils docs --name llava-weights --output docs/cli.md
	@$(BIN)/python -c 'from llava_weights.cli.main import write_man_page; write_man_page("docs/llava-weights.1")'

# README and the pages beside it go into one folder, the README as its first page; links between them lose `docs/` and `../`.
site: $(PEERS)/site/.stamp
	@rm -rf build/docs && mkdir -p build/docs
	@cp docs/* CONTRIBUTING.md SECURITY.md CHANGELOG.md LICENSE build/docs
	@cp README.md build/docs/index.md
	@sed -i -E 's#\]\((docs/|\.\./)#](#g; s#\]\(README\.md#](index.md#g' build/docs/*.md
	@NO_MKDOCS_2_WARNING=1 $(PEERS)/site/bin/mkdocs build --quiet
	@echo "build/site/index.html"

$(PEERS)/site/.stamp: Makefile
	@echo "setting up $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(INSTALL) mkdocs-material==9.8.2
	@touch $@

picture: $(READY)
	@$(BIN)/python -m benchmarks.recording docs/run.svg

clean:
	rm -rf $(VENV) $(PEERS) demo bench build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch goes first and alone: its build (CPU or CUDA) is chosen by pip's own configuration, the rest then fits it.
define install
	@echo "setting up $(1): a few minutes the first time"
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python $(INSTALL) "$$(grep '^torch==' $(2))"
	@$(1)/bin/python $(INSTALL) --constraint $(2) --editable '.[test]'
	@touch $(1)/.stamp
endef

$(READY): pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)

$(VENV)/.fuzz: $(READY)
	@$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[fuzz,sign]'
	@touch $@

$(PEERS)/oldest/.stamp: pyproject.toml constraints-oldest.txt
	$(call install,$(PEERS)/oldest,constraints-oldest.txt)

# fschat comes without its dependencies: its weight scripts import none of the web server and API clients that it asks for.
$(PEERS)/fschat/.stamp: tests/peers/fschat.txt
	@echo "setting up $(PEERS)/fschat"
	@$(PYTHON) -m venv $(PEERS)/fschat
	@$(PEERS)/fschat/bin/python $(INSTALL) --requirement tests/peers/fschat.txt
	@$(PEERS)/fschat/bin/python $(INSTALL) --no-deps fschat==0.2.36
	@touch $@

# torch and whatever transformers can do without are the main environment's: a .pth file puts that behind what lies here.
SITE := python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(PEERS)/transformers-%/.stamp: | $(READY)
	@echo "setting up $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(INSTALL) transformers==$*
	@$(BIN)/$(SITE) > "$$($(@D)/bin/$(SITE))/main.pth"
	@touch $@

# torch and transformers are the main environment's here too.
$(PEERS)/bitsandbytes/.stamp $(PEERS)/mlx/.stamp: $(PEERS)/%/.stamp: tests/peers/%.txt | $(READY)
	@echo "setting up $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(INSTALL) --no-deps --requirement tests/peers/$*.txt
	@$(BIN)/$(SITE) > "$$($(@D)/bin/$(SITE))/main.pth"
	@touch $@

# The programs of `make consumers`. Those on a torch of their own come whole, the others as above.
$(PEERS)/vllm/.stamp $(PEERS)/mlx-vlm/.stamp: tests/consumers/torchvision_nms.py tests/consumers/vllm.txt tests/consumers/mlx_vlm.txt
	@echo "setting up $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(INSTALL) --requirement tests/consumers/$(subst -,_,$(notdir $(@D))).txt
	@$(@D)/bin/python -m pip uninstall -qq --yes torchaudio
	@cp tests/consumers/torchvision_nms.py "$$($(@D)/bin/$(SITE))"
	@echo "import torchvision_nms" > "$$($(@D)/bin/$(SITE))/torchvision_nms.pth"
	@touch $@

$(PEERS)/openvino/.stamp $(PEERS)/serve/.stamp: $(PEERS)/%/.stamp: tests/consumers/%.txt | $(READY)
	@echo "setting up $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(INSTALL) --no-deps --requirement tests/consumers/$*.txt
	@$(BIN)/$(SITE) > "$$($(@D)/bin/$(SITE))/main.pth"
	@touch $@

$(PEERS)/LLaVA/llava:
	@git clone --quiet https://github.com/haotian-liu/LLaVA $(@D)
	@git -C $(@D) checkout --quiet c121f04

# llama.cpp's converters are Python in the source of llama-cpp-python, which is taken apart and not built.
LLAMA_CPP := llama_cpp_python-0.3.36
$(PEERS)/llama-cpp/.stamp: tests/peers/llama_cpp.txt | $(READY)
	@echo "setting up $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(INSTALL) --requirement tests/peers/llama_cpp.txt
	@$(BIN)/$(SITE) > "$$($(@D)/bin/$(SITE))/main.pth"
	@$(@D)/bin/python -m pip download -qq --no-input --no-deps --no-binary :all: --dest $(@D) llama-cpp-python==0.3.36
	@cd $(@D) && tar xzf $(LLAMA_CPP).tar.gz $(addprefix $(LLAMA_CPP)/vendor/llama.cpp/,convert_hf_to_gguf.py conversion gguf-py tools/mtmd/legacy-models models)
	@rm $(@D)/$(LLAMA_CPP).tar.gz
	@touch $@

# llama.cpp itself under its Python binding: the two libraries that this needs, in few files and with little optimisation, which takes five
# minutes on two processors in place of twelve; and with its fault #25814 mended, the class token behind the patches.
MENDED := ggml_concat(ctx0, model.class_embedding, inp, 1)
PARTS := COMMON TESTS TOOLS EXAMPLES SERVER APP
BUILD := -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DCMAKE_UNITY_BUILD=ON -DCMAKE_UNITY_BUILD_BATCH_SIZE=12 \
	-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON -DGGML_NATIVE=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_MTMD=ON $(PARTS:%=-DLLAMA_BUILD_%=OFF)
$(PEERS)/llama-cpp-python/.stamp: tests/peers/llama_cpp_python.txt
	@echo "building llama.cpp in $(@D): five minutes on two processors"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(INSTALL) --requirement tests/peers/llama_cpp_python.txt
	@$(@D)/bin/python -m pip download -qq --no-input --no-deps --no-binary :all: --dest $(@D) llama-cpp-python==0.3.36
	@cd $(@D) && tar xzf $(LLAMA_CPP).tar.gz && rm $(LLAMA_CPP).tar.gz
	@cd $(@D)/$(LLAMA_CPP)/vendor/llama.cpp/tools/mtmd && echo 'set_target_properties(mtmd PROPERTIES UNITY_BUILD OFF)' >>CMakeLists.txt && \
		sed -i 's/ggml_concat(ctx0, inp, model.class_embedding, 1)/$(MENDED)/' models/llava.cpp && grep -qF '$(MENDED)' models/llava.cpp
	@cd $(@D) && export PATH="$$PWD/bin:$$PATH" && cmake -S $(LLAMA_CPP)/vendor/llama.cpp -B build -G Ninja $(BUILD) >build.log && \
		cmake --build build --target mtmd >>build.log && packages="$$($(SITE))" && \
		cp -r $(LLAMA_CPP)/llama_cpp "$$packages/" && mv build/bin "$$packages/llama_cpp/lib"
	@rm -r $(@D)/$(LLAMA_CPP) $(@D)/build
	@touch $@

# mergekit too. Of what it asks for, scipy and datasets are imported by none of its modules.
$(PEERS)/mergekit/.stamp: benchmarks/mergekit.txt | $(READY)
	@echo "setting up $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(INSTALL) --requirement benchmarks/mergekit.txt
	@$(@D)/bin/python $(INSTALL) --no-deps mergekit==0.1.5
	@$(BIN)/$(SITE) > "$$($(@D)/bin/$(SITE))/main.pth"
	@touch $@
