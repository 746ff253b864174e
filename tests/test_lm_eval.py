"""The three methods of our model of lm-evaluation-harness, beside those of its own `hf` model.

The tests are those that the harness has for its models (`test_huggingface.py` there), with what
`hf` says in place of numbers of a model that would be downloaded.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.engine.scorer import Scorer
from pipeline.errors import EngineError, UsageError
from tests.harness_models import (
    CONTEXTS,
    CONTINUATIONS,
    PAIRS,
    CoppiceLM,
    load,
    load_theirs,
    requests_of,
)
from tests.lm_eval_tasks.make import FOLDER

pytestmark = pytest.mark.filterwarnings("default")  # the harness and its packages warn of much


@pytest.fixture(scope="module")
def ours() -> CoppiceLM:
    return load()


@pytest.fixture(scope="module")
def theirs() -> Any:
    return load_theirs()


def test_scores_are_those_of_the_harness(ours: CoppiceLM, theirs: Any) -> None:
    found, expected = ours.loglikelihood(PAIRS), theirs.loglikelihood(PAIRS, disable_tqdm=True)
    for request, (logprob, is_greedy), (other, other_greedy) in zip(
        PAIRS, found, expected, strict=True
    ):
        tokens = max(1, len(request.args[1]) // 100)  # of a thousand tokens the sums differ
        assert abs(logprob - other) <= 1e-4 * tokens, request.args[1][:20]
        assert is_greedy is other_greedy
    assert ours.evaluator.counts.computed_tokens == ours.evaluator.counts.unique_tokens


def test_every_request_is_answered_in_its_place_and_equal_ones_are_computed_once(
    ours: CoppiceLM,
) -> None:
    once = ours.loglikelihood(PAIRS[:20])
    counts = ours.evaluator.counts
    computed, read = counts.computed_tokens, counts.positions_read
    doubled = [*PAIRS[:20][::-1], *PAIRS[:20]]
    assert ours.loglikelihood(doubled) == [*once[::-1], *once]
    counts = ours.evaluator.counts
    assert (counts.computed_tokens, counts.positions_read) == (computed, read)
    for method in (ours.loglikelihood, ours.loglikelihood_rolling, ours.generate_until):
        assert not method([])


def test_in_strict_mode_the_order_of_requests_changes_no_bit() -> None:
    strict, asked = load(fidelity="strict"), PAIRS[:24]
    once = strict.loglikelihood(asked)
    assert strict.loglikelihood(asked[::-1]) == once[::-1]
    assert strict.loglikelihood(asked[7:9]) == once[7:9]


@pytest.mark.parametrize("max_length", [1024, 16])
def test_whole_texts_are_scored_in_the_windows_of_the_harness(
    ours: CoppiceLM, theirs: Any, monkeypatch: pytest.MonkeyPatch, max_length: int
) -> None:
    monkeypatch.setattr(ours, "max_length", max_length)
    monkeypatch.setattr(theirs, "_max_length", max_length)
    lines = (FOLDER / "wikitext_test.jsonl").read_text(encoding="utf-8").splitlines()
    pages = [json.loads(line)["page"] for line in lines]
    asked = requests_of("loglikelihood_rolling", *((p,) for p in [*pages, "", "a", pages[0]]))
    found = ours.loglikelihood_rolling(asked)
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert all(isinstance(total, float) for total in found)
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)


@pytest.mark.parametrize(
    "said",
    [
        {"until": ["\n"], "max_gen_toks": 24},
        {"until": ["e", "\n\n"], "do_sample": False, "temperature": 0.7},
        {"until": "\n", "max_new_tokens": 12, "top_p": 0.3},
        {"until": [], "max_gen_toks": 8, "num_beams": 1},
        {"until": [" "], "max_gen_toks": 1000},
        {"max_gen_toks": 12, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_texts_are_those_of_the_harness(ours: CoppiceLM, theirs: Any, said: dict[str, Any]) -> None:
    texts = [c for c in CONTEXTS if c] + ["word " * 300]
    asked = requests_of("generate_until", *((text, dict(said)) for text in texts))
    found = ours.generate_until(asked)
    # One at a time: `hf` pads a batch on the left without telling the model its positions.
    for request, text in zip(asked, found, strict=True):
        assert [text] == theirs.generate_until([request], disable_tqdm=True)


def test_sampled_texts_follow_from_their_seed_and_repeats_differ(ours: CoppiceLM) -> None:
    said = {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 1.5}
    one = ("The harbour of Corran exports", said)
    first = ours.generate_until(requests_of("generate_until", *[one] * 4))
    assert len(set(first)) == 4
    again = ours.generate_until(requests_of("generate_until", ("A", said), *[one] * 3))
    assert again[1:] == first[:3]
    seeded = ours.generate_until(requests_of("generate_until", (one[0], said | {"seed": 7})))
    assert seeded[0] != first[0]


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"until": [], "max_length": 20}, "unknown setting 'max_length'"),
        ({"until": [], "num_beams": 4}, "unknown setting 'num_beams'"),
        ({"until": [], "max_gen_toks": 1024}, "no context would be left"),
        ({"until": [""]}, "empty string"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 7}, "top_p must lie in"),
    ],
)
def test_generation_arguments_that_mean_nothing_here_are_refused_by_name(
    ours: CoppiceLM, said: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        ours.generate_until(requests_of("generate_until", ("a", said)))


@pytest.mark.parametrize(
    ("pair", "sentence"),
    [
        (("a", ""), "task small, document 0: a continuation of 0 tokens"),
        (("", ""), "a continuation of 0 tokens"),
        (("", "<|endoftext|>"), "a continuation of 0 tokens"),
        (("a", " of" * 1025), "1025 tokens cannot be scored"),
    ],
)
def test_what_cannot_be_scored_is_said_before_anything_is_computed(
    ours: CoppiceLM, monkeypatch: pytest.MonkeyPatch, pair: tuple[str, str], sentence: str
) -> None:
    monkeypatch.setattr(ours.evaluator, "scores", lambda *_: pytest.fail("was computed"))
    with pytest.raises(UsageError, match=sentence):
        ours.loglikelihood(requests_of("loglikelihood", pair))


def test_a_context_of_blanks_is_none(ours: CoppiceLM) -> None:
    (found,) = ours.loglikelihood(requests_of("loglikelihood", (" \n ", "salt")))
    assert ours.loglikelihood(requests_of("loglikelihood", ("", " \n salt"))) == [found]


def test_without_bos_and_eos_a_missing_context_is_refused(
    ours: CoppiceLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours._texts, "prefix_token_id", None)
    with pytest.raises(UsageError, match="neither BOS nor EOS"):
        ours.loglikelihood(requests_of("loglikelihood", ("", "salt")))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_legnth": 7}, "unknown setting 'max_legnth'; did you mean max_length"),
        ({"kv_store": "x"}, "unknown setting 'kv_store'"),
        ({"dtype": "float16"}, "dtype"),
        ({"add_bos_token": True}, "puts no BOS before a text"),
        ({"threads": 0}, "threads"),
    ],
)
def test_model_arguments_are_checked_by_name(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        load(**options)


def test_encoding_and_chat_templates_are_those_of_the_harness(ours: CoppiceLM, theirs: Any) -> None:
    for text in (*CONTEXTS, *CONTINUATIONS):
        for adds in (None, True, False):
            assert ours.tok_encode(text, adds) == theirs.tok_encode(text, adds)
    assert ours.tok_decode(ours.tok_encode("foo bar")) == "foo bar"
    chat = [{"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    begun = [*chat, {"role": "assistant", "content": "The answer is"}]
    assert ours.apply_chat_template(begun, False) == theirs.apply_chat_template(begun, False)
    assert ours.chat_template(True) == theirs.chat_template(True) != ""
    assert ours.tokenizer_name == theirs.tokenizer_name
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.max_length == theirs.max_length


def test_a_logit_that_is_no_number_ends_the_evaluation(
    ours: CoppiceLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = Scorer.note
    monkeypatch.setattr(Scorer, "note", lambda s, at, logits: note(s, at, logits * float("nan")))
    with pytest.raises(EngineError, match="no finite logits at a token that is scored"):
        ours.loglikelihood(PAIRS[:3])
