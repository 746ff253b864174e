"""What a model's config says of it, read without its weights and without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.generation import UnsupportedGeneration, resolve_sampling
from pipeline.model.families import has_sliding_layers
from pipeline.sampling_settings import SamplingSettings

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_DEFAULTS: dict[str, tuple[type, ...]] = {
    "do_sample": (bool,),
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "max_new_tokens": (int,),
}


@dataclass(frozen=True)
class ModelShape:
    """What the plan needs to know of a model; read from its config alone."""

    family: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    context_length: int | None
    vocabulary_size: int
    dtype: str
    generation_config: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    hidden_size: int = 0
    slides: bool = False
    """Whether some layers see the last tokens alone."""

    def kv_bytes_per_token(self, dtype: str = "auto") -> int:
        """Bytes of K and V of one token over all layers, in `dtype` (auto: as the model is)."""
        size = _BYTES[self.dtype if dtype == "auto" else dtype]
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * size


def read_shape(model: str, revision: str | None = None) -> ModelShape:
    """Read the config of a folder or hub id, no weights. Raises ModelError."""
    config = read_config(model, revision)
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    heads = getattr(layers[0], "num_attention_heads", None)
    if not heads or not getattr(config, "vocab_size", None):
        raise ModelError(
            f"{model}: a {config.model_type!r} model is no plain decoder; "
            "name a causal language model such as a Llama, Qwen2, Mistral or GPT-2"
        )
    generation, eos = _read_generation(model, revision, config)
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return ModelShape(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        num_kv_heads=max(getattr(c, "num_key_value_heads", None) or heads for c in layers),
        head_dim=max(getattr(c, "head_dim", None) or c.hidden_size // heads for c in layers),
        hidden_size=layers[0].hidden_size,
        context_length=getattr(config, "max_position_embeddings", None),
        vocabulary_size=config.vocab_size,
        dtype=dtype if dtype in _BYTES else "float32",
        generation_config=generation,
        eos_token_ids=eos,
        slides=has_sliding_layers(config),
    )


def read_rope(model: str, revision: str | None = None) -> dict[str, Any]:
    """How positions enter the keys, as plain values of the config. Raises ModelError."""
    config = read_config(model, revision).to_dict()
    names = sorted(name for name in config if "rope" in name or "rotary" in name)
    return {name: config[name] for name in names}


def _read_generation(
    model: str, revision: str | None, config: Any
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Generation defaults, and the tokens that end an answer. Raises ModelError."""
    from transformers import GenerationConfig

    has_file = (Path(model) / "generation_config.json").exists()
    try:
        generation = GenerationConfig.from_pretrained(model, revision=revision)
    except Exception as error:  # of every kind, for values of wrong types
        if has_file or not isinstance(error, OSError):  # its stop tokens must not be lost
            raise ModelError(
                f"{model}: generation_config.json cannot be read; download it again or remove it"
            ) from error
        generation = GenerationConfig.from_model_config(config)
    eos = generation.eos_token_id
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    defaults: dict[str, Any] = generation.to_diff_dict()
    reason = _why_no_defaults(defaults)
    if not all(type(token_id) is int and token_id >= 0 for token_id in eos):
        reason = "eos_token_id is not a token id or a list of them"
    if reason:
        raise ModelError(f"{model}: generation_config.json: {reason}; correct or remove it")
    return defaults, tuple(eos)


def _why_no_defaults(defaults: dict[str, Any]) -> str | None:
    """Why no row could be generated with these, or None."""
    for name, wanted in _DEFAULTS.items():
        value = defaults.get(name)
        if value is not None and type(value) not in wanted:
            return f"{name} is of type {type(value).__name__}"
    try:
        resolve_sampling(SamplingSettings(), defaults, {})
    except UnsupportedGeneration:
        return None  # a flag can say otherwise, see `job/planning.py`
    except ValueError as error:
        return str(error)
    return None


def read_config(model: str, revision: str | None) -> Any:
    """The config of a folder or hub id, as transformers reads it. Raises ModelError."""
    from transformers import AutoConfig

    looks_local = Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local and not Path(model).is_dir():
        raise ModelError(f"{model}: no such model folder; give a folder or a hub id like org/name")
    if looks_local and not (Path(model) / "config.json").is_file():
        raise ModelError(f"{model}: no config.json in this folder, so it is not a model")
    try:
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as error:  # a missing repository, bad JSON, an unknown type, remote code
        reason = str(error).splitlines()[0]
        raise ModelError(f"{model}: the model's config cannot be read: {reason}") from error
