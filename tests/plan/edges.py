"""What the edges of a plan's tree spell."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.plan import Plan


def edge_token_ids(plan: Plan, node: int) -> NDArray[np.unsignedinteger]:
    """The ids on the edge into `node`: [end - start]."""
    row = plan.tree.row_of_prompt[plan.tree.prompt_lo[node]]
    return plan.table[int(row)][plan.tree.start[node] : plan.tree.end[node]]
