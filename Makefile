# make demo   from nothing to a model that answers, in about five minutes on two CPU cores
# make test   the linter and every test
# make test-export   what needs more packages: the exports in transformers, llama.cpp and a browser,
#             BPE and TensorBoard
# make soak   kills, full disks and flipped bits, for minutes (docs/reliability.md)

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
EXPORT_TESTS := tests/test_export.py tests/test_web.py tests/test_bpe.py tests/test_reference_checkpoints.py \
	tests/test_tensorboard.py
ASK := $(PY) inference.py -i -m checkpoint/sft_best.pt -t 0 -r 1

.PHONY: install demo test test-export soak clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt torch
	$(PY) -m pip install -c constraints.txt -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PY) -m pip install -c constraints.txt pytest pytest-xdist ruff hypothesis "triton; sys_platform == 'linux'"
	touch $@

demo: $(VENV)/installed
	@date +%s > checkpoint/.demo_start
	$(PY) dataset/make_sample.py
	$(PY) data.py --pretrain dataset/sample_pretrain.txt --sft dataset/sample_sft.jsonl
	$(PY) train.py -t pretrain
	$(PY) train.py -t sft
	$(PY) plot_loss.py -n $$(ls train_*.log | tail -n 2) -o checkpoint/demo_loss.png
	@for q in 你是谁 字母Q怎么拼读 QTH是什么意思 20米波段的频率范围是多少 "How do you say the letter Q on the radio?"; do \
		echo "> $$q"; $(ASK) -p "$$q"; done
	$(PY) evaluate.py -m checkpoint/sft_best.pt --qa dataset/sample_heldout.jsonl
	@echo "demo: $$(( $$(date +%s) - $$(cat checkpoint/.demo_start) )) s in all;" \
		"talk to the model: $(PY) inference.py -i -m checkpoint/sft_best.pt"

test: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(PY) -m pytest -q -n auto --maxprocesses 8 tests $(addprefix --ignore=,$(EXPORT_TESTS))

$(VENV)/installed-export: $(VENV)/installed-dev
	$(PY) -m pip install -c constraints.txt transformers xllamacpp tensorboard
	touch $@

test-export: $(VENV)/installed-export
	@command -v node >/dev/null && command -v chromium >/dev/null || \
		{ echo "the tests of the page need node and chromium (Debian: apt-get install nodejs chromium)"; exit 1; }
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 8 $(EXPORT_TESTS)

soak: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(PY) tests/soak.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis __pycache__ */__pycache__
