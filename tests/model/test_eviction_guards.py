"""Which models may outgrow their context, and by which evictors; from configs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from pipeline.errors import ModelError
from pipeline.job.job import open_job
from pipeline.model.families import has_sliding_layers, why_nothing_is_evicted
from pipeline.settings import JobSettings
from tests.tiny_job import write_prompts, write_tokenizer


@pytest.mark.parametrize(
    ("config", "slides"),
    [
        (LlamaConfig(), False),
        (MistralConfig(sliding_window=16), True),
        (MistralConfig(sliding_window=None), False),
        (MistralConfig(sliding_window=1 << 20), False),  # never shorter than the context
        (Qwen2Config(), False),
        (Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=0), True),
        (Gemma2Config(), True),
    ],
)
def test_layers_that_see_the_last_tokens_alone_are_known(config: Any, slides: bool) -> None:
    assert has_sliding_layers(config) == slides


def test_what_is_kept_must_lie_side_by_side_below_sliding_windows() -> None:
    assert why_nothing_is_evicted("mistral", True, "oldest") is None
    assert why_nothing_is_evicted("mistral", True, "window") is None
    assert why_nothing_is_evicted("mistral", False, "gist") is None
    assert "choose --evict none, oldest or window" in str(
        why_nothing_is_evicted("mistral", True, "sink-recent")
    )
    assert "choose --evict none" in str(why_nothing_is_evicted("gpt2", False, "window"))


@pytest.mark.fault(
    "conversations",
    injected="eviction with a model of learned positions, or sinks below sliding windows",
    outcome="refused by name before a row is read, exit code 2",
)
@pytest.mark.parametrize(
    ("config", "evictor", "says"),
    [
        (GPT2Config(n_positions=64), "oldest", "learns a vector for each position"),
        (MistralConfig(sliding_window=16, max_position_embeddings=64), "gist", "sliding-window"),
    ],
)
def test_a_model_that_cannot_is_refused(
    tmp_path: Path, config: Any, evictor: str, says: str
) -> None:
    folder = write_tokenizer(tmp_path / "model")
    config.save_pretrained(folder)
    source = write_prompts(tmp_path / "in.parquet", ["p"], conversation_id=["a"], turn=[0])
    flat = {"model": str(folder), "turn_column": "turn", "max_new_tokens": 4}
    settings = JobSettings.from_flat(flat | {"evict": evictor, "budget_tokens": 60})
    with pytest.raises(ModelError, match=says):
        open_job(str(source), settings)
    assert open_job(str(source), JobSettings.from_flat(flat)).eviction is not None
