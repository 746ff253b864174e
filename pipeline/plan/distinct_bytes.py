"""How many bytes of many texts are distinct, where equal beginnings count once. Knows no text.

Bytes are sorted and compared as token ids are: what a tree of them would hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.sorting import sort_rows
from pipeline.plan.token_table import TokenTable, narrowest_dtype

_BYTES = 256


def count_distinct_bytes(texts: Sequence[bytes], owner: NDArray[np.int64]) -> int:
    """`owner`: [texts] 0 or more; texts of two owners share nothing."""
    lengths = np.array([len(text) for text in texts], np.int64)
    flat = np.frombuffer(b"".join(texts), np.uint8).astype(np.uint16)
    table = TokenTable.from_batches([(flat, lengths)], narrowest_dtype(_BYTES))
    rows = sort_rows(table, owner)
    return int((lengths[rows.order] - rows.shared).sum())
