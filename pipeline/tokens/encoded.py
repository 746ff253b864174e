"""What becomes of a batch of prompts: token ids end to end, or why a row has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import is_row_fault
from pipeline.tokens.chat_template import TemplateFault


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """Row i holds `lengths[i]` ids of `flat`, end to end: [sum of lengths] uint32, [rows] int64.

    A row in `errors` (position in the batch -> reason, without its text) has no ids, nor has one
    in `overlong` (position -> tokens that it has at least), which was not tokenised. `segments`:
    of a prompt in segments, the tokens of each; `error_types`: of errors that have their own;
    `system_tokens`: of a first turn, as many of its first ids are its system message's.
    """

    flat: NDArray[np.uint32]
    lengths: NDArray[np.int64]
    errors: dict[int, str] = field(default_factory=dict)
    overlong: dict[int, int] = field(default_factory=dict)
    segments: dict[int, list[int]] = field(default_factory=dict)
    error_types: dict[int, str] = field(default_factory=dict)
    system_tokens: dict[int, int] = field(default_factory=dict)


@dataclass
class EncodedRows:
    """What becomes of the rows of a batch, by position."""

    ids: list[Sequence[int] | NDArray[np.uint32]]
    most_tokens: int | None
    errors: dict[int, str] = field(default_factory=dict)
    overlong: dict[int, int] = field(default_factory=dict)
    segments: dict[int, list[int]] = field(default_factory=dict)
    error_types: dict[int, str] = field(default_factory=dict)
    system_tokens: dict[int, int] = field(default_factory=dict)

    def fail(self, row: int, fault: TemplateFault) -> None:
        """The row has no ids."""
        self.ids[row], self.errors[row] = (), str(fault)
        if fault.error_type is not None:
            self.error_types[row] = fault.error_type

    def batch(self) -> EncodedBatch:
        """End to end."""
        lengths = np.array([len(ids) for ids in self.ids], np.int64)
        arrays = [np.zeros(0, np.uint32), *(np.array(ids, np.uint32) for ids in self.ids)]
        return EncodedBatch(
            np.concatenate(arrays),
            lengths,
            self.errors,
            self.overlong,
            self.segments,
            self.error_types,
            self.system_tokens,
        )


def encode_each(
    encode: Callable[[list[str]], list[list[int]]], texts: dict[int, str], rows: EncodedRows
) -> None:
    """Encode all texts in one call; only if that fails one by one, to find out which to blame."""
    if not texts:
        return
    try:
        rows_of_ids: Iterable[list[int]] = encode(list(texts.values()))
        for row, ids in zip(texts, rows_of_ids, strict=True):
            rows.ids[row] = ids
    except BaseException as error:
        if not is_row_fault(error):
            raise
        if len(texts) == 1:
            kind = type(error).__name__
            rows.errors[next(iter(texts))] = f"the text cannot be tokenised ({kind})"
            return
        for row, text in texts.items():
            encode_each(encode, {row: text}, rows)
