"""Checkpoints of 8 and 4 bits, written number by number as their formats say, read back exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.errors import ModelError
from pipeline.model.int8 import Int8Linear
from pipeline.model.model import load_model
from pipeline.model.quantized import _compressed
from pipeline.settings import ModelSettings
from tests.engine import tiny

GROUP = 32
_AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # the i-th place of a word holds this output (AutoAWQ)

Layer = tuple[dict[str, Tensor], Tensor]
"""What a layer is saved as, and the weight [out, in] that it stands for."""


def pack(rows: Tensor, bits: int, places: tuple[int, ...] | None = None) -> Tensor:
    """Whole numbers from 0 on, [rows, columns] -> int32 words, one number at a time."""
    count = 32 // bits
    words = torch.zeros(len(rows), rows.shape[1] // count, dtype=torch.int64)
    for i, row in enumerate(rows.tolist()):
        for j in range(len(row)):
            place = j % count if places is None else places.index(j % count)
            words[i, j // count] |= row[j] << (bits * place)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def draw(weight: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random q [out, in], zeros and scales [out, groups], all from 0 on."""
    size, most = len(weight), 1 << bits
    q = torch.randint(0, most, weight.shape)
    zeros = torch.randint(most // 2 - 1, most // 2 + 2, (size, groups))
    return q, zeros, torch.rand(size, groups) * 0.2 / most + 0.01


def spread(x: Tensor, group: Tensor) -> Tensor:
    return x[:, group]


def gptq(weight: Tensor, bits: int, order: Tensor | None = None, less: int = 1) -> Layer:
    groups = weight.shape[1] // GROUP
    q, zeros, scales = draw(weight, bits, groups)
    scales = scales.half()
    group = torch.arange(weight.shape[1]) // GROUP if order is None else order // GROUP
    saved = {
        "qweight": pack(q, bits).T.contiguous(),
        "qzeros": pack((zeros.T - less) % (1 << bits), bits),
        "scales": scales.T.contiguous(),
        "g_idx": group.int(),
    }
    return saved, (q - spread(zeros, group)) * spread(scales.float(), group)


def awq(weight: Tensor) -> Layer:
    groups = weight.shape[1] // GROUP
    q, zeros, scales = draw(weight, 4, groups)
    scales = scales.half()
    saved = {
        "qweight": pack(q.T, 4, _AWQ_PLACES),
        "qzeros": pack(zeros.T, 4, _AWQ_PLACES),
        "scales": scales.T.contiguous(),
    }
    group = torch.arange(weight.shape[1]) // GROUP
    return saved, (q - spread(zeros, group)) * spread(scales.float(), group)


def packed(weight: Tensor, bits: int, has_zeros: bool) -> Layer:
    groups = weight.shape[1] // GROUP
    q, zeros, scales = draw(weight, bits, groups)
    half = 1 << (bits - 1)
    saved = {
        "weight_packed": pack(q, bits),
        "weight_scale": scales.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }
    if has_zeros:
        saved["weight_zero_point"] = pack(zeros.T, bits).T.contiguous()
    else:
        zeros = torch.full_like(zeros, half)
    group = torch.arange(weight.shape[1]) // GROUP
    return saved, (q - spread(zeros, group)) * spread(scales.bfloat16().float(), group)


def whole(weight: Tensor) -> Layer:
    """W8A8 of compressed-tensors: one scale for each output."""
    q = torch.randint(-128, 128, weight.shape, dtype=torch.int8)
    scale = (torch.rand(len(weight), 1) * 0.002 + 0.0005).bfloat16()
    return {"weight": q, "weight_scale": scale}, q * scale.float()


LAYOUTS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Layer]]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP},
        lambda weight: gptq(weight, 4),
    ),
    "gptq, 8 bits": (
        {"quant_method": "gptq", "bits": 8, "group_size": GROUP},
        lambda weight: gptq(weight, 8),
    ),
    "gptq, by activation": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
        lambda weight: gptq(weight, 4, torch.randperm(weight.shape[1])),
    ),
    "gptq, version 2": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        lambda weight: gptq(weight, 4, less=0),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
    "pack-quantized": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        lambda weight: packed(weight, 4, has_zeros=False),
    ),
    "pack-quantized, zeros": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        lambda weight: packed(weight, 4, has_zeros=True),
    ),
    "pack-quantized, 8 bits": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        lambda weight: packed(weight, 8, has_zeros=True),
    ),
    "int-quantized": ({"quant_method": "compressed-tensors", "format": "int-quantized"}, whole),
}


def save(folder: Path, layout: str, is_tied: bool = False) -> dict[str, Tensor]:
    """A checkpoint of this layout; returns the weights that it stands for, by name."""
    torch.manual_seed(0)
    said, saved_as = LAYOUTS[layout]
    model = tiny.build_model("llama")
    model.config.tie_word_embeddings = is_tied
    model.save_pretrained(folder)
    tensors, plain = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if "proj" in name]:
        parts, plain[name] = saved_as(tensors.pop(name))
        tensors |= {f"{name.removesuffix('weight')}{last}": part for last, part in parts.items()}
    if is_tied:
        tensors.pop("lm_head.weight", None)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return plain


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rounded_checkpoint_is_read_as_the_weights_that_it_stands_for(
    tmp_path: Path, layout: str
) -> None:
    plain = save(tmp_path, layout)
    loaded = load_model(ModelSettings(model=str(tmp_path), dtype="float32"))
    found = dict(loaded.model.named_parameters())
    for name, weight in plain.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=0)
    assert "were saved by" in loaded.notes[0] and "unpacked" in loaded.notes[0]


def test_what_was_saved_in_int8_is_used_as_it_is(tmp_path: Path) -> None:
    plain = save(tmp_path, "int-quantized")
    loaded = load_model(ModelSettings(model=str(tmp_path), weights="int8", dtype="bfloat16"))
    layers = {n: m for n, m in loaded.model.named_modules() if isinstance(m, Int8Linear)}
    assert len(layers) == len(plain)
    for name, layer in layers.items():
        expected = plain[f"{name}.weight"]
        assert torch.equal(layer.weight * layer.scale[:, None], expected)
    assert f"{len(plain)} of {len(plain)} layers are used as they are" in loaded.notes[0]


def test_a_checkpoint_of_4_bits_is_rounded_to_int8_and_says_so(tmp_path: Path) -> None:
    plain = save(tmp_path, "gptq")
    loaded = load_model(ModelSettings(model=str(tmp_path), weights="int8", dtype="float32"))
    layers = {n: m for n, m in loaded.model.named_modules() if isinstance(m, Int8Linear)}
    for name, layer in layers.items():
        difference = layer.weight * layer.scale[:, None] - plain[f"{name}.weight"]
        assert (difference.abs() <= layer.scale[:, None] * 0.5001).all()
    assert f"0 of {len(plain)} layers are used as they are" in loaded.notes[0]


@pytest.mark.parametrize("layout", ["gptq", "int-quantized"])
def test_an_output_layer_that_is_the_embedding_stays_it(tmp_path: Path, layout: str) -> None:
    save(tmp_path, layout, is_tied=True)
    model = load_model(ModelSettings(model=str(tmp_path))).model
    assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("layout", "lost"),
    [
        ("gptq", "scales"), ("gptq", "qzeros"), ("gptq", "qweight"),
        ("int-quantized", "weight_scale"), ("pack-quantized", "weight_packed"),
    ],
)  # fmt: skip
def test_a_layer_of_which_a_part_is_missing_is_named(
    tmp_path: Path, layout: str, lost: str
) -> None:
    save(tmp_path, layout)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.0.mlp.up_proj.{lost}"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="up_proj"):
        load_model(ModelSettings(model=str(tmp_path)))


@pytest.mark.parametrize(
    "more", ["model.layers.0.mlp.act.scales", "model.layers.0.mlp.up_proj.bias"]
)
def test_what_would_change_an_answer_and_has_no_place_is_refused(tmp_path: Path, more: str) -> None:
    """AutoAWQ divides what some activations give, by scales that it saves; a bias as it comes."""
    save(tmp_path, "awq")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {more: torch.zeros(64)}, tmp_path / "model.safetensors")
    if more.endswith("bias"):
        load_model(ModelSettings(model=str(tmp_path)))  # zeros say nothing
    save_file(tensors | {more: torch.full((64,), 5.0)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=more.rpartition(".")[0]):
        load_model(ModelSettings(model=str(tmp_path)))


def test_groups_that_cannot_be_told_and_scales_without_groups() -> None:
    q, scale = torch.randint(-8, 8, (4, 301)), torch.rand(4, 3)
    parts = {"weight": q.to(torch.int8), "weight_scale": scale}
    with pytest.raises(KeyError, match="group"):
        _compressed(parts)
    flat = _compressed(parts | {"weight_scale": scale[:, 0]})
    assert torch.equal(flat.to_float(), q * scale[:, :1])
    one = _compressed(parts | {"weight_scale": scale[0, :1]})
    assert torch.equal(one.to_float(), q * scale[0, 0])


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "gptq", "bits": 3},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "transform_config": {"a": 1},
        },
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "of next year"},
    ],
    ids=str,
)
def test_a_layout_that_we_do_not_know_is_refused_for_int8_by_name(
    tmp_path: Path, said: dict[str, Any]
) -> None:
    model = tiny.build_model("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(ModelError, match=said["quant_method"]):
        load_model(ModelSettings(model=str(tmp_path), weights="int8"))


def test_a_checkpoint_without_any_rounding_is_left_to_transformers(tmp_path: Path) -> None:
    tiny.build_model("llama").save_pretrained(tmp_path)
    assert load_model(ModelSettings(model=str(tmp_path))).notes == ()
    assert AutoModelForCausalLM.from_pretrained(tmp_path) is not None
