PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
RANKS  := import torch; print(min(torch.cuda.device_count(), 2) or 2)
SAM2   := $(shell grep -o 'sam2==[0-9.]*' requirements.txt | head -1)

# prints this list
.PHONY: help
help:
	@awk '/^# / && !about { about = substr($$0, 3) } /^$$/ { about = "" } \
	      /^[a-z-]+:/ && about { sub(/:.*/, ""); printf "make %-10s %s\n", $$0, about }' Makefile

# makes the environment .venv with requirements.txt and requirements-extras.txt
.PHONY: setup
setup: $(VENV)/ready

$(VENV)/ready: requirements.txt requirements-extras.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	SAM2_BUILD_CUDA=0 $(RUN) -m pip install --quiet --no-deps --no-build-isolation $(SAM2)
	$(RUN) -m pip install --quiet -r requirements-extras.txt
	touch $@

# trains the embedded model with GRPO, evaluates before and after, and asks about a chest CT
.PHONY: demo
demo: setup
	rm -rf runs/demo out/demo
	$(VENV)/bin/torchrun --nproc-per-node $$($(RUN) -c "$(RANKS)") train_grpo.py
	$(RUN) infer.py --crm "$$(ls -d runs/demo/step_* | tail -1)" --out out/demo --completions 8 \
	    --image demo/images/chest_ct_patient_2.png \
	    --query "Show me the dark field on the left that takes up oxygen on this CT slice."
	$(RUN) -m extras.rollouts runs/demo
	@echo "the curve is runs/demo/curves.png and the overlay is out/demo/overlay.png"
	@echo "runs/demo/rollouts.html is a page of the groups that the model learned from"

# checks layout and lint of every Python file
.PHONY: check
check: setup
	$(RUN) -m ruff format --check --quiet .
	$(RUN) -m ruff check .

# runs every test, on a CPU
.PHONY: test
test: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist worksteal

# runs extras/engines.py under verl's own reward manager and data set, on a CPU
.PHONY: test-verl
test-verl: setup build/verl/ready
	rm -rf build/verl/data
	$(RUN) -m extras.engines --data demo/data --split test --out build/verl/data/test.parquet
	HF_HOME=build/verl/data build/verl/bin/python tests/check_verl.py build/verl/data/test.parquet

# verl asks for another torch and transformers. What is checked here runs with ours.
build/verl/ready: requirements.txt
	$(PYTHON) -m venv build/verl
	build/verl/bin/python -m pip install --quiet -r requirements.txt tensordict==0.10.0 ray==2.60.0 \
	    datasets==5.2.0 accelerate==1.15.0 codetiming==1.4.0 cachetools==8.0.2 aiohttp==3.14.5 \
	    qwen-vl-utils==0.0.14 torchvision==0.28.0
	build/verl/bin/python -m pip install --quiet --no-deps verl==0.9.1
	touch $@

# tries a hundred kills, signals and full disks; about six minutes on two cores
.PHONY: faults
faults: setup
	$(RUN) tests/test_faults.py

# measures the seconds of a step by phase, and with each optimization switched off
.PHONY: bench
bench: setup
	$(RUN) -m bench

# measures a step beside TRL's GRPOTrainer, which has an environment of its own
.PHONY: bench-trl
bench-trl: setup build/trl/ready
	$(RUN) -m bench --peer trl --micro 16 --steps 4
	$(RUN) -m bench --peer trl --micro 64 --steps 4
	$(RUN) -m bench --peer trl --growth

# measures 3B and 7B on one GPU of 80 GB: parity, TRL, the card's own speed, each optimization
# They have random weights and LoRA, images of 840 x 840 px, and 16 completions of 256 tokens.
.PHONY: bench-gpu
bench-gpu: setup build/trl/ready
	$(RUN) -m bench --parity
	for size in 3b 7b; do \
	    for graphs in "" --no-graphs; do \
	        $(RUN) -m bench --random-model $$size --peer trl --micro 16 64 $$graphs && \
	        $(RUN) -m bench --random-model $$size --roofline $$graphs || exit; done; \
	    $(RUN) -m bench --random-model $$size || exit; done

build/trl/ready: requirements.txt
	$(PYTHON) -m venv build/trl
	build/trl/bin/python -m pip install --quiet -r requirements.txt trl==1.16.0 \
	    torchvision==0.28.0 accelerate==1.15.0 datasets==5.2.0
	touch $@

# prints where the memory of a run goes, for the real sizes
# For one run: python -m bench.memory @recipes/lora_7b.args --gpus 8
.PHONY: memory
memory: setup
	$(RUN) -m bench.memory

# runs the paper's experiments at the embedded scale, three seeds each; goes on where it stopped
.PHONY: paper
paper: setup
	$(RUN) -m paper

# makes everything in demo/: the data and the tiny models; 90 minutes on two cores, as its parts add up
.PHONY: embedded
embedded: setup build/nilearn-0.14.1-py3-none-any.whl build/pyradiomics-3.0.1.tar.gz
	$(RUN) -m demo.make.data
	$(RUN) -m demo.make.histology
	$(RUN) -m extras.false_premise --count 60 --out demo/absent
	OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --nproc-per-node 2 -m demo.make.crm
	$(RUN) -m demo.make.asm
	$(VENV)/bin/torchrun --nproc-per-node 2 train_grpo.py --out runs/taught
	$(RUN) -m demo.make.taught "$$(ls -d runs/taught/step_* | tail -1)"

# The data have slices of a brain that is inside this wheel. It is read, not installed.
build/nilearn-0.14.1-py3-none-any.whl: | setup
	$(RUN) -m pip download --quiet --no-deps --dest build nilearn==0.14.1

# The data have patients that are inside this source package. pip asks its setup.py for its name,
# and setup.py imports numpy, which .venv has, and versioneer.
build/pyradiomics-3.0.1.tar.gz: | setup
	$(RUN) -m pip install --quiet --target build/versioneer versioneer==0.29
	PYTHONPATH=build/versioneer $(RUN) -m pip download --quiet --no-deps --no-build-isolation \
	    --no-binary :all: --dest build pyradiomics==3.0.1
