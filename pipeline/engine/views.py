"""Queries as they stand in the frames of documents. Knows tokens and positions, no slots.

A document is encoded once, at positions of its own. In a row it begins elsewhere, and scores depend
on distances alone: so a token's query is turned back to where it stands in the document's frame,
and no key is ever turned or copied (ARCHITECTURE.md, Documents at any position).

```
 queries   0 .. N - 1                 one token each, as it stands in its row
           N .. V - 1   by document   of token `owner`, turned back by `shift` positions
```
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.engine.rotary import Rotary, Turn


@dataclass(frozen=True, slots=True)
class Views:
    """Of one forward of N tokens: `owner`, `shift` [V - N] int64."""

    owner: Tensor
    shift: Tensor
    rotary: Rotary
    _turns: dict[str, Turn] = field(default_factory=dict)

    def of(self, layer: int, query: Tensor) -> Tensor:
        """[N, Hq, d], rotated as they stand in their rows -> [V, Hq, d]: these, and then views."""
        viewing, turn = query[self.owner], self.turn_in(layer)
        return torch.cat([query, viewing if turn is None else self.rotary.apply(viewing, turn)])

    def turn_in(self, layer: int) -> Turn | None:
        """By what a layer's views are turned; None in layers without rotary."""
        key = self.rotary.keys[layer]
        if key is None:
            return None
        if key not in self._turns:
            self._turns[key] = self.rotary.angles(key, -self.shift)
        return self._turns[key]
