"""What was measured of a model on this device, and decides how a run computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pipeline.engine.backend import Backend
from pipeline.engine.sharing_cost import break_even_tokens
from pipeline.engine.spill_cost import SpillCost, spill_cost
from pipeline.model.model import LoadedModel
from pipeline.plan.conversation_figures import gives_way


@dataclass(frozen=True)
class DeviceCosts:
    """`break_even`: of shared spans in decode, see `sharing_cost`; where it is known it decides
    which spans rows share, not the plan's rule. `spill`: of conversations that give way; where it
    is not known, all that there is room for are saved."""

    break_even: float | None = None
    spill: SpillCost | None = None

    def saves_from(self, bytes_per_token: int) -> int | None:
        """Depth from which on a conversation that gives way is saved; None: not measured."""
        return None if self.spill is None else self.spill.break_even_tokens(bytes_per_token)

    def notes(self, bytes_per_token: int) -> list[str]:
        """What a person should know of it."""
        saves_from = self.saves_from(bytes_per_token)
        if saves_from is None:
            return []
        return [f"a conversation that gives way to others is {gives_way(saves_from)} (measured)"]


NO_DEVICE_COSTS: Final = DeviceCosts()


def device_costs(loaded: LoadedModel, backend: Backend, has_turns: bool) -> DeviceCosts:
    """Measured now, or remembered. `has_turns`: rows are turns of conversations."""
    spill = spill_cost(loaded, backend) if has_turns else None
    return DeviceCosts(break_even_tokens(loaded, backend), spill)
