"""Rotary embedding as integer turns: what moves a query or a key to another position.

RoPE turns pair i of a head at position t by t * inv_freq[i], and scores depend on the difference of
two positions alone. So a key made at position j becomes that of position j + D when it is turned by
D, and a query looks at it unturned when it is turned by -D. What a model says with its rotary
module is read here once: the frequencies of each type of layer, which numbers make a pair, and
which layers have no rotary at all. A turn has length one: YaRN's scaling is in queries and keys
already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import ModelError

Turn = tuple[Tensor, Tensor]
"""Cosines and sines [n, pairs], float32."""


@dataclass(frozen=True, eq=False)
class Rotary:
    """How one model turns. `keys`: by layer the name of its frequencies, None without rotary;
    `frequencies`: by that name [pairs], float64; `is_interleaved`: pairs are neighbours, and not
    half of the turned numbers apart."""

    keys: tuple[str | None, ...]
    frequencies: dict[str, Tensor]
    is_interleaved: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> Rotary:
        """Raises ModelError for a model whose positions are learned or none."""
        named = model.named_modules()
        module: Any = next((m for name, m in named if name.endswith("rotary_emb")), None)
        attentions = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
        by_layer = {int(m.layer_idx): m for m in attentions if hasattr(m, "scaling")}
        count = model.config.num_hidden_layers
        if module is None or sorted(by_layer) != list(range(count)):
            raise ModelError(
                f"a {model.config.model_type!r} model has no rotary positions, so documents cannot "
                "be moved in it; choose --reuse prefix"
            )
        keys = tuple(_key(model.config, module, by_layer[layer]) for layer in range(count))
        buffers = {key: getattr(module, key) for key in sorted({k for k in keys if k is not None})}
        frequencies = {key: buffer.detach().double() for key, buffer in buffers.items()}
        return cls(keys, frequencies, _is_interleaved(module, model.config))

    def angles(self, key: str, shifts: Tensor) -> Turn:
        """Of the frequencies `key`, for turns by `shifts` [n] positions."""
        turned = shifts.double()[:, None] * self.frequencies[key].to(shifts.device)
        return turned.cos().float(), turned.sin().float()

    def cos_sin(self, layer: int, shifts: Tensor) -> Turn | None:
        """As `angles`; None where the layer has no rotary."""
        key = self.keys[layer]
        return None if key is None else self.angles(key, shifts)

    def turn(self, layer: int, heads: Tensor, shifts: Tensor) -> Tensor:
        """heads [n, H, d] of a layer, token i turned by `shifts[i]` positions; same dtype."""
        turn = self.cos_sin(layer, shifts)
        return heads if turn is None else self.apply(heads, turn)

    def apply(self, heads: Tensor, turn: Turn) -> Tensor:
        """heads [n, H, d] turned in float32; same dtype. Numbers beyond the pairs stay."""
        cos, sin = (x[:, None] for x in turn)
        pairs = cos.shape[-1]
        turned = heads[..., : 2 * pairs].float()
        if self.is_interleaved:
            a, b = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = turned[..., :pairs], turned[..., pairs:]
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([turned.to(heads.dtype), heads[..., 2 * pairs :]], -1)


def _key(config: Any, module: nn.Module, attention: Any) -> str | None:
    """The name of the module's buffer that a layer is turned by."""
    if not getattr(attention, "use_rope", True):  # SmolLM3
        return None
    if config.model_type == "cohere2" and attention.sliding_window is None:
        return None
    layer_type = (getattr(config, "layer_types", None) or {attention.layer_idx: ""})[
        attention.layer_idx
    ]
    own = f"{layer_type}_inv_freq"
    return own if hasattr(module, own) else "inv_freq"


@torch.no_grad()
def _is_interleaved(module: Any, config: Any) -> bool:
    """Whether neighbours share an angle in what the module makes for a position."""
    frequency = next(buffer for name, buffer in module.named_buffers() if "inv_freq" in name)
    x = torch.zeros(1, 1, 1, device=frequency.device)
    at = torch.ones(1, 1, dtype=torch.int64, device=frequency.device)
    layer_types = getattr(module, "layer_types", None)
    cos = (
        module(x, at, *layer_types[:1])[0].flatten() if layer_types else module(x, at)[0].flatten()
    )
    if len(cos) < 2 * len(frequency):  # each angle once: gpt-oss, in halves
        return False
    return bool(torch.equal(cos[::2], cos[1::2]) and not torch.equal(*cos.chunk(2)))
