"""Turns of conversations from completions to parts, and how a job goes on in the middle of one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.conversation_settings import ConversationSettings
from pipeline.engine.echo_engine import EchoEngine
from pipeline.engine.resent import Turn
from pipeline.errors import AuditFailed, EngineError, StorageError, TooManyDegenerate
from pipeline.run import run_job
from pipeline.settings import JobSettings
from pipeline.storage.schema import CONVERSATION_FIELDS
from tests.conversation_job import AS_TURNS, TURNS, write_turns
from tests.job.carrying_engine import CarryingEngine, log_of, says
from tests.tiny_job import _ALPHABET, answers, echo_settings, on

CHAINS = {"a": [0, 2, 3, 7], "b": [1, 5], "c": [4, 6]}
COMPARED = [
    "id", "conversation_id", "turn", "generated_text", "completion_token_ids", "prompt_tokens",
    "status", "error_type", "history_tokens", "evictions", "eviction_log",
]  # fmt: skip

ANY_MAY_FAIL = {"max_new_tokens": 4, "rows_per_part": 1, "fail_on_error": "100%"}


def encode(text: str) -> list[int]:
    return [_ALPHABET.index(c) + 2 for c in text]


def expected(most: int = 4) -> dict[int, tuple[int, tuple[int, ...]]]:
    """By row: prompt tokens and answer, as one long text would give them."""
    found = {}
    for rows in CHAINS.values():
        ids: list[int] = []
        for row in rows:
            added = encode(TURNS[row][2] or "")
            if ids and added[0] == ids[-1]:
                ids.pop()
            ids += added
            answer = says(ids, most)
            found[row] = (len(ids), answer)
            ids += answer
    return found


def run(source: Path, output: Path, settings: JobSettings, engine: Any) -> pl.DataFrame:
    settings = settings.model_copy(
        update={"conversations": ConversationSettings.model_validate(AS_TURNS)}
    )
    run_job(str(source), output, settings, make_engine=on(engine))
    return answers(output)


def test_a_turn_is_answered_from_all_that_was_said_and_says_so(
    tmp_path: Path, settings: JobSettings
) -> None:
    source = write_turns(tmp_path / "turns.parquet")
    rows = run(source, tmp_path / "out", settings, CarryingEngine())
    wanted = expected()
    for row, (prompt_tokens, answer) in wanted.items():
        found = rows.row(row, named=True)
        assert (found["prompt_tokens"], found["completion_token_ids"]) == (
            prompt_tokens, list(answer)
        )  # fmt: skip
        assert found["generated_text"] == "".join(_ALPHABET[i - 2] for i in answer)
        assert (found["conversation_id"], found["turn"]) == TURNS[row][:2]
        log = [{"at": e.at, "kept": [list(r) for r in e.kept]} for e in log_of(answer)]
        assert found["eviction_log"] == log and found["evictions"] == len(log)
    names = [field.name for field in CONVERSATION_FIELDS]
    assert rows.columns[22 : 22 + len(names)] == names
    assert rows.columns[22 + len(names) :] == ["prompt"]  # the others are ours already
    history = {row: rows["history_tokens"][row] for row in wanted}
    for chain in CHAINS.values():
        assert history[chain[0]] == 0
        for before, row in zip(chain, chain[1:], strict=False):
            assert history[row] == wanted[before][0] + len(wanted[before][1])
    counters = json.loads((tmp_path / "out" / "run.json").read_text())["counters"]
    assert counters["prompt_tokens"] == sum(tokens for tokens, _ in wanted.values())


def test_a_token_that_ends_an_answer_and_begins_the_next_turn_is_counted_once() -> None:
    """The data above has such a turn, or the checks of counts here would show nothing."""
    wanted = expected()
    merged = [
        row for chain in CHAINS.values() for before, row in zip(chain, chain[1:], strict=False)
        if wanted[before][1][-1] == encode(TURNS[row][2] or "")[0]
    ]  # fmt: skip
    assert 0 < len(merged) < 5


@pytest.mark.parametrize("preserve_order", [False, True])
@pytest.mark.parametrize("number", range(9))
def test_a_job_that_is_cut_off_after_any_turn_goes_on_from_there(
    tmp_path: Path, tokenizer_folder: Path, number: int, preserve_order: bool
) -> None:
    settings = echo_settings(
        tokenizer_folder, max_new_tokens=4, rows_per_part=2, preserve_order=preserve_order
    )
    source = write_turns(tmp_path / "turns.parquet")
    whole = run(source, tmp_path / "whole", settings, CarryingEngine())

    def act(at: int) -> None:
        if at == number:
            raise EngineError("the device fell over")

    engine = CarryingEngine(act)
    if number < len(TURNS):
        with pytest.raises(EngineError, match="fell over"):
            run(source, tmp_path / "out", settings, engine)
    done = [*(tmp_path / "out" / "data").glob("part-*")]
    before = set(pl.read_parquet(done)["row_index"].to_list()) if done else set[int]()
    again = CarryingEngine()
    rows = run(source, tmp_path / "out", settings, again)
    assert rows.select(COMPARED).equals(whole.select(COMPARED))
    assert again.counters.generated_tokens == sum(
        len(answer) for row, (_, answer) in expected().items() if row not in before
    )
    for chain in CHAINS.values():
        committed = [row in before for row in chain]
        assert committed == sorted(committed, reverse=True), "a turn is done before its history"


def failing(sequence: int, number: int) -> Callable[[Turn], bool]:
    """Sequences are in the order of their first prompts: b, a, c."""
    return lambda turn: (turn.sequence, turn.number) == (sequence, number)


def test_a_turn_that_fails_takes_its_later_ones_with_it_and_no_other(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    settings = echo_settings(tokenizer_folder, **ANY_MAY_FAIL)
    source = write_turns(tmp_path / "turns.parquet")
    whole = run(source, tmp_path / "whole", settings, CarryingEngine())
    rows = run(source, tmp_path / "out", settings, CarryingEngine(fails=failing(1, 1)))
    rest = [row for row in range(len(TURNS)) if row not in (2, 3, 7)]
    assert rows[rest].select(COMPARED).equals(whole[rest].select(COMPARED))
    failed = {2: "OutOfMemory", 3: "PriorTurnFailed", 7: "PriorTurnFailed"}
    for row in range(len(TURNS)):
        assert rows["error_type"][row] == failed.get(row)
        assert (rows["generated_text"][row] is None) == (row in failed)
    assert rows["turn"].to_list() == [turn for _, turn, _ in TURNS]
    assert rows["prompt_tokens"][7] is None and rows["attempts"].to_list()[7] == 0


def test_what_follows_a_turn_that_has_failed_is_not_run_when_it_is_made_again(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    settings = echo_settings(tokenizer_folder, **ANY_MAY_FAIL)
    source = write_turns(tmp_path / "turns.parquet")

    run(source, tmp_path / "out", settings, CarryingEngine(fails=failing(1, 1)))
    for path in (tmp_path / "out" / "data").glob("part-*"):
        if pl.read_parquet(path)["error_type"].to_list() == ["PriorTurnFailed"]:
            path.unlink()
    again = CarryingEngine()
    rows = run(source, tmp_path / "out", settings, again)
    assert rows["error_type"].to_list() == [
        None, None, "OutOfMemory", "PriorTurnFailed", None, None, None, "PriorTurnFailed"
    ]  # fmt: skip
    assert again.asked == {}


def test_an_answer_without_text_fails_the_turns_after_it(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does in a job that was cut off there: its ids are not written."""
    from pipeline.tokens.answer_text import AnswerText

    decode = AnswerText.decode
    bad = (encode("why?"), list(expected()[2][1]))

    def decode_some(self: AnswerText, prompts: Any, given: Sequence[Any], stops: Any) -> list[str]:
        if bad in [(list(p), list(ids)) for p, ids in zip(prompts, given, strict=True)]:
            raise ValueError("no text")
        return decode(self, prompts, given, stops)

    monkeypatch.setattr(AnswerText, "decode", decode_some)
    settings = echo_settings(tokenizer_folder, **ANY_MAY_FAIL)
    source = write_turns(tmp_path / "turns.parquet")
    rows = run(source, tmp_path / "out", settings, CarryingEngine())
    assert rows["error_type"].to_list() == [
        None, None, "BadAnswer", "PriorTurnFailed", None, None, None, "PriorTurnFailed"
    ]  # fmt: skip


def test_a_turn_that_cannot_run_stands_in_its_row_and_ends_its_conversation(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    settings = echo_settings(tokenizer_folder, max_new_tokens=4, fail_on_error="100%")
    turns = [*TURNS]
    turns[3] = ("a", 5, None)
    source = write_turns(tmp_path / "turns.parquet", turns)
    rows = run(source, tmp_path / "out", settings, CarryingEngine())
    errors = rows["error_type"].to_list()
    assert errors[:3] + errors[4:7] == [None] * 6 and errors[3] == "NullPrompt"
    assert errors[7] == "PriorTurnFailed"
    assert rows["conversation_id"].to_list() == [name for name, *_ in turns]


def test_an_engine_that_computes_a_history_again_is_found_out(
    tmp_path: Path, settings: JobSettings
) -> None:
    class Wasteful(EchoEngine):
        name = "wasteful"
        capabilities = CarryingEngine.capabilities

    source = write_turns(tmp_path / "turns.parquet")
    with pytest.raises(EngineError, match="prompt tokens were prefilled where the plan says"):
        run(source, tmp_path / "out", settings, Wasteful())


def lost_part(tmp_path: Path, row: int) -> None:
    """The part that holds `row` is gone, as after a crash of the disk."""
    for path in (tmp_path / "out" / "data").glob("part-*"):
        if row in pl.read_parquet(path)["row_index"].to_list():
            path.unlink()


def test_a_turn_whose_part_is_lost_is_made_again(tmp_path: Path, tokenizer_folder: Path) -> None:
    settings = echo_settings(tokenizer_folder, max_new_tokens=4, rows_per_part=1)
    source = write_turns(tmp_path / "turns.parquet")
    whole = run(source, tmp_path / "out", settings, CarryingEngine())
    lost_part(tmp_path, 2)
    again = CarryingEngine()
    rows = run(source, tmp_path / "out", settings, again)
    assert rows.select(COMPARED).equals(whole.select(COMPARED))
    assert list(again.asked) == [1] and len(again.asked[1]) == 1


def test_an_answer_that_follows_from_a_lost_one_is_not_kept_beside_another(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the output holds a conversation that nobody has had."""
    settings = echo_settings(tokenizer_folder, max_new_tokens=4, rows_per_part=1)
    source = write_turns(tmp_path / "turns.parquet")
    run(source, tmp_path / "out", settings, CarryingEngine())
    lost_part(tmp_path, 2)
    monkeypatch.setattr(
        "tests.job.carrying_engine.says", lambda prompt, most: says([*prompt, 1], most)
    )
    with pytest.raises(StorageError, match="row 3 .* delete the part"):
        run(source, tmp_path / "out", settings, CarryingEngine())
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_echo_sends_the_history_again_and_so_its_answers_are_known(
    tmp_path: Path, settings: JobSettings
) -> None:
    source = write_turns(tmp_path / "turns.parquet")
    echo = EchoEngine()
    rows = run(source, tmp_path / "out", settings, echo)
    assert rows["generated_text"].to_list() == [
        "olle", "yad ", "?yhw", "?neh", "olle", "?ohw", "?tah", "eybh"
    ]  # fmt: skip
    assert rows["history_tokens"].to_list() == [0, 0, 9, 17, 0, 12, 9, 30]
    assert echo.counters.prefilled_tokens == rows["prompt_tokens"].sum()


@pytest.mark.parametrize("allowed", ["50%", "20%", None])
def test_more_turns_that_repeat_themselves_than_are_allowed_fail_the_job(
    tmp_path: Path, settings: JobSettings, monkeypatch: pytest.MonkeyPatch, allowed: str | None
) -> None:
    """As an audit does, with the run complete; the same command says so again."""
    monkeypatch.setattr(
        "tests.job.carrying_engine.says", lambda prompt, most: (2,) * (7 if len(prompt) < 9 else 3)
    )
    source = write_turns(tmp_path / "turns.parquet")
    asked = ConversationSettings.model_validate(AS_TURNS | {"max_degenerate": allowed})
    settings = settings.model_copy(update={"conversations": asked})
    for _ in range(2):
        if allowed == "20%":
            with pytest.raises(TooManyDegenerate, match="3 of 8 turns .* allows 1") as found:
                run_job(str(source), tmp_path / "out", settings, make_engine=on(CarryingEngine()))
            assert found.value.exit_code == AuditFailed.exit_code
        else:
            run_job(str(source), tmp_path / "out", settings, make_engine=on(CarryingEngine()))
    manifest = json.loads((tmp_path / "out" / "run.json").read_text())
    assert manifest["status"] == "complete" and manifest["counters"]["rows_degenerate"] == 3
    assert len(manifest["sessions"]) == 1
    assert answers(tmp_path / "out")["degenerate"].to_list() == [
        True, True, False, False, True, False, False, False
    ]  # fmt: skip
