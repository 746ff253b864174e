"""An adapter: the trained embeddings of link tokens or of packets, and the card that says of what.

```
DIR/rows.safetensors   "rows" [R, hidden] float32
DIR/card.json          the model they belong to, the mode, how they were trained, how good they are
```

Read without torch, so that a wrong one is refused before a device is used.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.errors import ModelError
from pipeline.plan.documents import Reuse
from pipeline.reuse_settings import ReuseSettings
from pipeline.storage.durable import replace_file

ROWS = "rows.safetensors"
CARD = "card.json"
TrainedMode = Literal["kvlink", "packet"]
_MOST_CARD_BYTES = 1 << 20
_SHORT = 256
"""Tokens of a document below which the two modes are known to gain little."""


class Card(BaseModel):
    """What `card.json` holds. No date: the same training gives the same bytes.

    `model`: as `model/identity.py` has it; `data_sha256`: of the rows' token ids; `agreement`,
    `kl`, `kl_untrained`: of answers on held-out rows with those of full attention;
    `document_tokens`: least, median and most of those seen; `drift`: of a wholly trained model, the
    share of answer tokens that it says otherwise than before with full attention.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    model: dict[str, Any]
    mode: TrainedMode
    soft_tokens: int = Field(ge=1)
    data_sha256: str
    agreement: float
    kl: float
    kl_untrained: float
    document_tokens: list[int] = Field(min_length=3, max_length=3)
    most_documents: int
    seed: int
    training: dict[str, Any]
    drift: float | None = None


@dataclass(frozen=True, eq=False)
class Adapter:
    """`rows` [R, hidden] float32; `digest`: of both files, of what identifies KV made by it."""

    card: Card
    rows: NDArray[np.float32]
    digest: str

    def warnings(self, document_tokens: NDArray[np.int64]) -> list[str]:
        """Sentences on documents of so many tokens each; empty where they are like the card's."""
        if not len(document_tokens):
            return []
        said, median = [], int(np.median(document_tokens))
        if median < _SHORT:
            said.append(
                f"the median document has {median} tokens; below {_SHORT} the soft tokens around "
                "it are a large share of what is computed and seen"
            )
        least, _, most = self.card.document_tokens
        if not least <= median <= most:
            said.append(
                f"the median document has {median} tokens, and the adapter was trained on "
                f"documents of {least} to {most}; train one on rows like these"
            )
        return said


def adapter_of(settings: ReuseSettings, model: dict[str, Any], hidden_size: int) -> Adapter | None:
    """The one that the settings name, if any, for what `identify_model` calls `model`.

    Raises ModelError, also for one that was trained for another mode.
    """
    if settings.adapter is None:
        return None
    adapter = load_adapter(settings.adapter, model, hidden_size)
    if adapter.card.mode != settings.reuse:
        raise ModelError(
            f"the adapter {settings.adapter} was trained for --reuse {adapter.card.mode}, not for "
            f"{settings.reuse}; choose that, or another adapter"
        )
    return adapter


def reuse_of(
    settings: ReuseSettings, vocabulary_size: int, adapter: Adapter | None
) -> Reuse | None:
    """How documents are reused at any position; None: whole prompts share their beginnings."""
    if settings.reuse == "prefix":
        return None
    return Reuse(
        settings.reuse,
        vocabulary_size,
        settings.context == "preamble",
        settings.num_epic_tokens,
        0 if adapter is None else adapter.card.soft_tokens,
        settings.share_to_blend,
    )


def save_adapter(folder: Path, card: Card, rows: NDArray[np.float32]) -> None:
    """Write both files, the card last. Raises StorageError."""
    replace_file(folder / ROWS, save({"rows": np.ascontiguousarray(rows, np.float32)}))
    replace_file(folder / CARD, (card.model_dump_json(indent=2) + "\n").encode())


def load_adapter(folder: Path, model: dict[str, Any], hidden_size: int) -> Adapter:
    """The adapter in `folder` for what `identify_model` calls `model`. Raises ModelError."""
    card_bytes, row_bytes = (_read(folder, name) for name in (CARD, ROWS))
    card = _parse_card(folder, card_bytes)
    if any(card.model.get(name) != model.get(name) for name in ("model", "revision")):
        raise ModelError(
            f"the adapter {folder} was trained for another model; name that one, or train an "
            "adapter for this one by coppice segments"
        )
    rows = _parse_rows(folder, row_bytes)
    wanted = Reuse(card.mode, 0, soft_tokens=card.soft_tokens).soft_rows, hidden_size
    if rows.shape != wanted:
        raise ModelError(
            f"{folder}/{ROWS} holds rows of shape {list(rows.shape)}, but its card and the model "
            f"ask for {list(wanted)}; train the adapter again"
        )
    if not np.isfinite(rows).all():
        raise ModelError(f"{folder}/{ROWS} holds numbers that are not finite; train it again")
    return Adapter(card, rows, hashlib.sha256(card_bytes + row_bytes).hexdigest())


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise ModelError(
            f"there is no {name} in {folder}, so it is no adapter; coppice segments trains one"
        ) from error
    except OSError as error:
        raise ModelError(f"cannot read {folder / name} ({error.strerror or error})") from error


def _parse_card(folder: Path, content: bytes) -> Card:
    try:
        if len(content) > _MOST_CARD_BYTES:
            raise ValueError("too long")
        return Card.model_validate(json.loads(content))
    except (ValueError, RecursionError) as error:  # pydantic's is a ValueError
        raise ModelError(f"{folder}/{CARD} is damaged; train the adapter again") from error


def _parse_rows(folder: Path, content: bytes) -> NDArray[np.float32]:
    try:
        tensors = load(content)
        rows: NDArray[Any] = tensors["rows"]
        if rows.ndim != 2 or rows.dtype != np.float32:
            raise ValueError("not a table of float32")
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ModelError(
            f"{folder}/{ROWS} is damaged or holds no float32 rows; train the adapter again"
        ) from error
    return rows
