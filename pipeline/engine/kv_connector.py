"""KV of earlier runs and for later ones, as an engine sees it. Knows no store and no device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.plan.token_table import Ids

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KVFormat:
    """The form of the KV that an engine hands out and takes back; `dtype` as torch names it."""

    dtype: str
    bytes_per_token: int


class KVConnector(Protocol):
    """KV states that outlive a run, as an engine sees them. What is stored is named by its ids
    from position 0 on; `sequence` is one that sees it.

    KV is [layers, 2, kv_heads, tokens, head_dim], in the type of the engine's own, on the CPU.
    """

    def stored_end(self, sequence: int, ids: Ids) -> int:
        """Up to where `ids` are stored and worth loading; 0: nowhere."""

    def load(self, sequence: int, ids: Ids, low: int, high: int) -> Tensor | None:
        """The KV of positions `[low, high)` of `ids`; None where it cannot be had after all."""

    def wants(self, key: int) -> bool:
        """Whether the KV of a shared part of the layout shall be kept."""

    def keep(self, sequence: int, ids: Ids, low: int, high: int, kv: Tensor) -> None:
        """Take the KV of positions `[low, high)` of `ids`; it is the caller's no more."""
