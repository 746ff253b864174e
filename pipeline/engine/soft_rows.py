"""Tokens that no tokenizer knows: ids from the vocabulary's size on, with trained embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import ModelError


class SoftRows(nn.Module):
    """A model's input embedding, and `rows` [R, hidden] for the ids from `first` on."""

    def __init__(self, plain: nn.Module, rows: Tensor, first: int) -> None:
        super().__init__()
        self.plain = plain
        self.first = first
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [..., N] int64 -> [..., N, hidden]."""
        is_soft = ids >= self.first
        embedded: Tensor = self.plain(ids.masked_fill(is_soft, 0))
        rows: Any = self.rows
        return torch.where(
            is_soft[..., None], rows[(ids - self.first).clamp_min(0)].to(embedded), embedded
        )


def add_soft_rows(model: PreTrainedModel, rows: NDArray[np.float32], first: int) -> None:
    """Let the model know the ids `first` .. `first + R - 1`, by `rows` [R, hidden]. Raises
    ModelError for rows of another width."""
    plain: Any = model.get_input_embeddings()
    width = plain.weight.shape[1]
    if rows.shape[1] != width:
        raise ModelError(f"the adapter's rows have {rows.shape[1]} numbers, the model's {width}")
    weight = plain.weight
    model.set_input_embeddings(SoftRows(plain, torch.from_numpy(rows).to(weight.device), first))
