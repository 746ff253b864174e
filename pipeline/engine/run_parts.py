"""What prefill and decoding of one run share."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.engine.forwards import Forwards
from pipeline.engine.outcomes import Outcomes
from pipeline.engine.packing import Packer
from pipeline.engine.rotary import Rotary
from pipeline.engine.scheduler import Scheduler
from pipeline.engine.turns import Turns


@dataclass(frozen=True, eq=False, slots=True)
class RunParts:
    """`turns`: where there are conversations; `rotary`: where keys or queries are turned."""

    scheduler: Scheduler
    forwards: Forwards
    outcomes: Outcomes
    packer: Packer
    turns: Turns | None
    rotary: Rotary | None
