"""Loading models: what is refused, and how."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.errors import ModelError
from pipeline.model.families import why_unsupported
from pipeline.model.model import load_model
from pipeline.model.shape import read_shape
from pipeline.settings import ModelSettings
from tests.engine import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.build_model("llama").save_pretrained(tmp_path)
    return tmp_path


def test_shape_is_read_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shape = read_shape(str(folder))
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim) == (2, 2, 16)
    assert shape.kv_bytes_per_token() == 2 * 2 * 2 * 16 * 4
    assert shape.kv_bytes_per_token("bfloat16") == 2 * 2 * 2 * 16 * 2
    assert shape.eos_token_ids == (tiny.EOS,)


def test_model_loads_in_the_asked_dtype(folder: Path) -> None:
    loaded = load_model(ModelSettings(model=str(folder), dtype="bfloat16", device="cpu"))
    assert loaded.model.dtype == torch.bfloat16 and not loaded.model.training


def test_threads_that_load_models_leave_tied_weights_tied(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: of two threads in transformers' `no_tie_weights` the last one out left it on."""
    tie, inside, most = PreTrainedModel.tie_weights, 0, 0
    build = LlamaForCausalLM.__init__

    def slowly(*args: Any, **kwargs: Any) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        build(*args, **kwargs)
        inside -= 1

    monkeypatch.setattr(LlamaForCausalLM, "__init__", slowly)
    settings = ModelSettings(model=str(folder), device="cpu")
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(load_model, [settings] * 4))
    assert PreTrainedModel.tie_weights is tie and most == 1


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        read_shape(str(tmp_path / "absent"))


def test_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_shape(str(tmp_path))


def test_broken_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config cannot be read"):
        read_shape(str(tmp_path))


def test_pickled_weights_are_refused_unopened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights.*safetensors"):
        load_model(ModelSettings(model=str(folder)))


def test_absent_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load_model(ModelSettings(model=str(folder)))


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="model-00001-of-00002"):
        load_model(ModelSettings(model=str(folder)))


def test_truncated_weights_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="weights cannot be loaded"):
        load_model(ModelSettings(model=str(folder)))


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match="weights are missing"):
        load_model(ModelSettings(model=str(folder)))


def test_absent_device_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match="device 'cuda:99'"):
        load_model(ModelSettings(model=str(folder), device="cuda:99"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "bloom"}, "bloom"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "longest position"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longest position"),
    ],
)
def test_reasons_against_reuse_are_said(changes: dict[str, object], reason: str) -> None:
    config = LlamaConfig()
    assert why_unsupported(config) is None
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    said = why_unsupported(config)
    assert said is not None and reason in said and "--engine naive" in said


def test_broken_generation_defaults_are_no_missing_ones(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
        read_shape(str(folder))


def test_what_transformers_says_is_cut_to_a_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ValueError("x" * 500 + "\nsecond line")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match="weights cannot be loaded") as refused:
        load_model(ModelSettings(model=str(folder)))
    assert len(str(refused.value)) < 400 and "second" not in str(refused.value)


def test_a_family_that_the_engine_lacks_is_named_before_it_is_loaded(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(ModelError, match="carry a state.*--engine naive"):
        load_model(ModelSettings(model=str(folder)))
