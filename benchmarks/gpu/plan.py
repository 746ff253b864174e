"""The stages in their order: correctness, what the card can do, then figures. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """`name` is "what" or "what:model"; it is killed after `box_s`, and does not begin when less
    than `least_s` are left of the whole time."""

    name: str
    box_s: float
    least_s: float


GROUPS: tuple[tuple[Stage, ...], ...] = (
    (Stage("env", 60, 10),),
    (Stage("kernel", 90, 30), Stage("capture", 60, 20), Stage("engine:1B", 90, 30)),
    (Stage("demo", 110, 40),),
    (Stage("ceilings", 45, 15),),
    (Stage("layer:1B", 60, 20), Stage("step:1B", 60, 20), Stage("job:1B", 45, 15)),
    (Stage("layer:8B", 60, 20), Stage("step:8B", 60, 20), Stage("job:8B", 60, 20)),
    (Stage("host", 30, 10), Stage("sampled", 30, 10)),
    (Stage("peer:1B", 120, 40),),
)
"""The stages of a group share a process, and so a model; a group whose process died goes on in
another one."""

NOT_DRY = {"demo", "peer:1B", "layer:8B", "step:8B", "job:8B"}
"""What a rehearsal leaves out: commands of their own, and what a second model would repeat."""


def choose(names: Iterable[str] | None, *, dry: bool) -> list[list[Stage]]:
    """The groups of these stages, None: all. A rehearsal runs what it can in one process.

    Raises ValueError for a name that there is not.
    """
    known = {stage.name: stage for group in GROUPS for stage in group}
    wanted = set(known if names is None else names)
    if wanted - set(known):
        raise ValueError(f"no stage {sorted(wanted - set(known))}; there are {', '.join(known)}")
    groups = [[stage for stage in group if stage.name in wanted] for group in GROUPS]
    if dry:
        groups = [[s for group in groups for s in group if s.name not in NOT_DRY]]
    return [group for group in groups if group]
