"""Random weights of published shapes, kept as model folders that every engine can open.

Random weights measure speed and exactness only: nothing that they generate means anything. Of the
published models only the sizes are taken (SmolLM2-135M and -360M, Llama-3.2-1B), not their rotary
settings, which cost nothing to compute; the context is 16,384 tokens for all.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.scratch import scratch
from pipeline.model.int8 import hold_in_int8
from pipeline.model.model import LoadedModel, load_model
from pipeline.settings import ModelSettings

SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "360M": {
        "vocab_size": 49152, "hidden_size": 960, "intermediate_size": 2560,
        "num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5,
        "tie_word_embeddings": True,
    },
    "1B": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 32768, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
_CONTEXT = 16_384
_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|pad|>",
    "clean_up_tokenization_spaces": False,
}
_W8A8 = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
    "quantization_status": "compressed",
    "config_groups": {"group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel",
                    "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True,
                              "strategy": "token", "dynamic": True},
    }},
}  # fmt: skip


def model_folder(shape: str, dtype: str, tokenizer: Path | None = None) -> Path:
    """A folder with config, weights (seed 0) and, if given, tokenizer; written when absent.

    The weights are drawn in float32 and rounded, so that all dtypes hold the same model.
    """
    return _kept(f"{shape}-{dtype}", lambda path: write_model(path, shape, dtype), tokenizer)


def int8_folder(shape: str, tokenizer: Path | None = None) -> Path:
    """As `model_folder`, rounded to int8 as compressed-tensors keeps it: a scale for each output,
    those of tokens as they come (W8A8)."""
    return _kept(f"{shape}-int8", lambda path: _write_int8(path, shape), tokenizer)


def _kept(name: str, write: Callable[[Path], None], tokenizer: Path | None) -> Path:
    """The folder of that name, which is whole or not there."""
    folder = scratch("models") / name
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            write(Path(unfinished) / "model")
            shutil.rmtree(folder, ignore_errors=True)
            (Path(unfinished) / "model").rename(folder)
    if tokenizer is not None and not (folder / "tokenizer.json").exists():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        (folder / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG))
    return folder


def write_model(folder: Path, shape: str, dtype: str, seed: int = 0) -> None:
    """Save a Llama of that shape with seeded random weights that never ends by itself."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=_CONTEXT, bos_token_id=None, eos_token_id=None
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


def _write_int8(folder: Path, shape: str) -> None:
    model = load_random(shape, "bfloat16").model
    hold_in_int8(model)
    tensors = model.state_dict()
    del tensors["lm_head.weight"]  # which is the embedding's
    for name in [name for name in tensors if name.endswith(".scale")]:
        scale = tensors.pop(name)
        tensors[f"{name.removesuffix('.scale')}.weight_scale"] = scale[:, None]
    model.config.quantization_config = _W8A8
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def load_random(shape: str, dtype: str) -> LoadedModel:
    """The model of `model_folder`, as the product loads it, on the CPU."""
    settings = {"model": str(model_folder(shape, dtype)), "dtype": dtype, "device": "cpu"}
    return load_model(ModelSettings.model_validate(settings))
