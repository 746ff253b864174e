"""Memory of scoring does not grow with the choices of a row: measured, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import re, sys, tempfile
from pathlib import Path
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from kvcoppice.evaluation.evaluator import Request, plan_requests
from pipeline.engine.base import RunControl
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.model.model import LoadedModel
from pipeline.model.shape import read_shape
from pipeline.settings import EngineSettings

VOCABULARY, ROWS, CONTEXT = 50_000, 2, 400
config = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
    bos_token_id=None, eos_token_id=1,
)
with tempfile.TemporaryDirectory() as folder:
    config.save_pretrained(folder)
    shape = read_shape(folder)
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval()
engine = PrefixEngine(LoadedModel(model, shape, "tiny"), EngineSettings(kernels=sys.argv[1]))


def resident(name):
    said = Path("/proc/self/status").read_text()
    return int(re.search(name + r":\\s+(\\d+) kB", said)[1]) / 1024


def score(choices):
    draw = np.random.default_rng(0)
    def ids(count):
        return draw.integers(0, VOCABULARY, count).astype(np.uint32)
    contexts = [ids(CONTEXT) for _ in range(ROWS)]
    requests = [Request(context, ids(3)) for context in contexts for _ in range(choices)]
    plan = plan_requests(requests, VOCABULARY)
    done = list(engine.generate(plan, np.arange(len(plan.sequences)), RunControl()))
    assert sum(len(one.scores) for one in done) == len(requests)


score(2)
before = resident("VmRSS")
for choices in map(int, sys.argv[2:]):
    Path("/proc/self/clear_refs").write_text("5")
    score(choices)
    print(resident("VmHWM") - before)
"""


def grown(kernels: str, *choices: int) -> list[float]:
    """MB at most, over what two choices a row left resident; in this order."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, kernels, *map(str, choices)],
        capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2], timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.splitlines()[-len(choices) :]]


@pytest.mark.parametrize("kernels", ["auto", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_thousand_choices_take_little_more_than_four(kernels: str) -> None:
    """Seen red: a thousand rows of logits at once took 250 MB more."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the kernel does not forget how much was resident")
    few, many = grown(kernels, 4, 1000)
    assert many - few < 190, (few, many)  # MB; a forward of torch's gives 128 MB of logits at once
