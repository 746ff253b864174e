"""The page of the study: the headline, tables of what was measured, and what was expected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.stateful.arms import LIMIT, TOP, Arm, headline_arms
from pipeline.stateful.expected import Measured, Verdict, expectations, headline
from pipeline.stateful.found import AGES, QUARTERS, Found
from pipeline.stateful.published import REPORTED
from pipeline.stateful.streams import KINDS, WINDOW

_POLICIES = ("stale", "gap", "rerotate", "auto")
_SHOWN_BUDGET = 128  # of the tables that show one


def render(settings: Mapping[str, str], measured: Measured, content: Mapping[str, Any]) -> str:
    """Markdown of what `run_study` found."""
    shown = min(measured.budgets, key=lambda budget: abs(budget - _SHOWN_BUDGET))
    some = _of_budget(measured, shown)
    parts = [
        "# Conversations that outgrow the window: the study",
        f"{settings['streams']} streams of {settings['windows']} windows of {WINDOW} tokens, "
        f"{content['turns']:,} turns; {content['seconds']:,} s. An answer is one value and an end: "
        "exact match, with its 90 % interval (Clopper and Pearson, 5 % on each side), of the turns "
        "beyond the first window. A budget is the tokens of history that stay before a turn; its "
        "own come on top. Evictions come before the question is known.",
        "## A gist against the 99 % with most attention",
        f"At most {LIMIT} tokens of history: the first {LIMIT // 4} alone whenever there are more, "
        f"the first {LIMIT}, or the {TOP} that got most attention of the last query before a turn. "
        "At each token: prompts are fed one by one, and the newest query decides at every step.",
        _kinds([measured.arms[arm.name] for arm in headline_arms()]),
        _verdicts(headline(measured)),
        "## Exact match by budget",
        _table(
            ("given up by", "positions", *(f"{budget} tokens" for budget in measured.budgets)),
            list(_by_budget(measured)),
        ),
        f"## By the kind of question, {shown} tokens",
        _kinds(some),
        f"## By the age of the fact, {shown} tokens",
        _table(
            ("arm", *_age_names()),
            [(one.arm, *(str(one.share(age=age)) for age in AGES)) for one in some],
        ),
        f"## By the window of the stream, {shown} tokens",
        "Questions of all kinds: later ones ask for older facts, so that every arm falls.",
        _table(
            ("arm", *(f"window {quarter + 1}" for quarter in QUARTERS), "recent, window 4"),
            [
                (one.arm, *(str(one.share(quarters=(quarter,))) for quarter in QUARTERS),
                 str(one.share(kind="recent", quarters=(3,))))
                for one in some
            ],
        ),
        f"## Coherence, {shown} tokens",
        "No answer: not a value and an end. Repeated: the same tokens as the answer before.",
        _table(
            ("arm", "no answer", "repeated", "NLL of the true value"),
            [
                (one.arm, str(one.share("malformed")), str(one.share("repeated")),
                 f"{one.nll():.2f}")
                for one in some
            ],
        ),
        "## Health of the cache, worst of all turns",
        _health(measured),
        "## Expectations",
        _verdicts(expectations(measured)),
        "## As reported by others, of other models and data",
        _table(("source", "reported"), REPORTED),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _of_budget(measured: Measured, budget: int) -> list[Found]:
    """What gives up nothing, and all of the grid within one budget."""
    arms = [one for one in measured.arms.values() if one.keep in (0, budget)]
    return [one for one in arms if not one.arm.startswith("gist ")]


def _kinds(arms: Iterable[Found]) -> str:
    rows = [
        (
            one.arm,
            str(one.share()),
            *(str(one.share(kind=kind)) for kind in KINDS),
            str(one.share("malformed")),
            f"{one.nll():.2f}",
            f"{one.skew}",
            f"{one.history:.0f}",
        )
        for one in arms
    ]
    return _table(("arm", "all", *KINDS, "no answer", "NLL", "skew", "history, mean"), rows)


def _by_budget(measured: Measured) -> Iterable[tuple[str, ...]]:
    none = measured.arms[Arm("none", "gap").name]
    yield "nothing", "gap", *[f"{none.share()}"] * len(measured.budgets)
    for evictor in measured.evictors:
        known = {one.positions for one in measured.arms.values() if one.evictor == evictor}
        for positions in _POLICIES:
            if positions in known:
                found = [measured.find(evictor, positions, keep) for keep in measured.budgets]
                yield evictor, positions, *(str(one.share()) for one in found)


def _health(measured: Measured) -> str:
    rows = [
        (
            one.arm,
            f"{one.span:,}",
            f"{one.span / WINDOW:.2f}",
            str(one.skew),
            str(one.duplicates),
            str(one.runs),
        )
        for one in measured.arms.values()
    ]
    return _table(("arm", "span", "ctx_frac", "skew", "duplicate positions", "runs"), rows)


def _age_names() -> list[str]:
    names = [f"{low}–{high - 1}" for low, high in zip(AGES, AGES[1:], strict=False)]
    return [*names, f"{AGES[-1]} and more"]


def _verdicts(verdicts: Iterable[Verdict]) -> str:
    return _table(("expected", "found"), list(verdicts))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(r)} |" for r in (head, ["---"] * len(head), *rows))
