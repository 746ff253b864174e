"""What is asked at load of conversations that give up tokens: passed, and not by anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.engine.conversation import Conversation, KeptRun
from pipeline.engine.spans import Placement
from pipeline.engine.verify.self_test import eviction_self_test
from pipeline.errors import EngineError
from pipeline.plan.conversations import Eviction, Evictor
from tests.engine.test_documents import engine_of
from tests.engine.test_evicting import EVICTORS


@pytest.mark.parametrize("evictor", EVICTORS)
def test_every_evictor_passes(evictor: Evictor) -> None:
    assert eviction_self_test(engine_of(), Eviction(evictor)) < 1e-5


def test_whole_turns_pass() -> None:
    assert eviction_self_test(engine_of(), Eviction("sink-recent", unit="turn")) < 1e-5


def test_a_shift_that_is_one_off_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[[Conversation, Placement], list[KeptRun]] = Conversation.runs

    def wrong(conversation: Conversation, place: Placement) -> list[KeptRun]:
        runs = right(conversation, place)
        return [replace_shift(run, 1) if run.shift else run for run in runs]

    monkeypatch.setattr(Conversation, "runs", wrong)
    with pytest.raises(EngineError, match="differs from the model's own|stand where others do"):
        eviction_self_test(engine_of(), Eviction("sink-recent"))


def replace_shift(run: KeptRun, by: int) -> KeptRun:
    return run._replace(shift=run.shift + by)
