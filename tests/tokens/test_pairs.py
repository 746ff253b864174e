"""Contexts and continuations as token ids: where they part, and what cannot be."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from pipeline.prompt_settings import TokenSettings
from pipeline.prompts import ScoredPrompt
from pipeline.tokens.pairs import EncodedPairs, PairEncoder, PairFault
from pipeline.tokens.tokenizer import PromptTokenizer

_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}<s>assistant{{ '\\n' }}"
)


def tokenizer_of(
    *, bos: bool = True, eos: bool = True, puts: str = "", settings: Any = None
) -> PromptTokenizer:
    """Merges: a b -> ab, ' ' b -> ' b', ab c -> abc, newline b. `puts`: "start" or "both"."""
    letters = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz\n ", "ab", " b", "abc", "\nb"]
    vocabulary = {word: number for number, word in enumerate(letters)}
    merges = [("a", "b"), (" ", "b"), ("ab", "c"), ("\n", "b")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>"])
    if puts:
        single = "<s> $A" if puts == "start" else "<s> $A </s>"
        specials = [("<s>", 0), ("</s>", 1)]
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=specials
        )
    named = {"bos_token": "<s>"} if bos else {}
    named |= {"eos_token": "</s>"} if eos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = _TEMPLATE
    return PromptTokenizer(tokenizer, settings or TokenSettings())


def pairs(
    tokenizer: PromptTokenizer, context: Any, *continuations: str
) -> list[tuple[list[str], list[str]]]:
    found = tokenizer.encode_pairs([ScoredPrompt(context, continuations)])
    assert not found.faults and not found.overlong, found
    return [
        (spelled(tokenizer, p.context), spelled(tokenizer, p.continuation)) for p in found.pairs[0]
    ]


def spelled(tokenizer: PromptTokenizer, ids: Any) -> list[str]:
    return [tokenizer._backend.id_to_token(int(number)) for number in ids]


def fault(tokenizer: PromptTokenizer, context: Any, *continuations: str) -> PairFault:
    found = tokenizer.encode_pairs([ScoredPrompt(context, continuations)])
    assert not found.pairs
    return found.faults[0]


def test_blanks_at_the_end_of_a_context_go_to_the_continuation() -> None:
    tokenizer = tokenizer_of()
    assert pairs(tokenizer, "ca ", "b", "c") == [
        (["c", "a"], [" b"]),
        (["c", "a"], [" ", "c"]),
    ]
    assert pairs(tokenizer, "ca", " b") == [(["c", "a"], [" b"])]


def test_both_are_tokenised_together_and_cut_behind_the_context() -> None:
    tokenizer = tokenizer_of()
    assert pairs(tokenizer, "ca", "bd") == [(["c", "a"], ["d"])]  # [c][ab][d], as lm-eval cuts it
    bad = fault(tokenizer, "ca", "b", "d")
    assert bad.error_type == "EmptyContinuation" and "choice 0 makes no token" in str(bad)


@pytest.mark.parametrize(("bos", "eos", "first"), [(True, True, "<s>"), (False, True, "</s>")])
def test_an_empty_context_is_the_first_token_of_texts(bos: bool, eos: bool, first: str) -> None:
    tokenizer = tokenizer_of(bos=bos, eos=eos)
    assert pairs(tokenizer, "", "ab") == [([first], ["ab"])]
    assert pairs(tokenizer, " ", "b") == [([first], [" b"])]


def test_a_model_that_has_no_such_token_needs_a_context() -> None:
    tokenizer = tokenizer_of(bos=False, eos=False)
    assert fault(tokenizer, "", "a").error_type == "NoFirstToken"
    assert pairs(tokenizer, "a", "c") == [(["a"], ["c"])]


@pytest.mark.parametrize("puts", ["start", "both"])
def test_what_the_tokenizer_puts_around_texts_is_at_the_start_alone(puts: str) -> None:
    tokenizer = tokenizer_of(puts=puts)
    assert pairs(tokenizer, "ca", " b") == [(["<s>", "c", "a"], [" b"])]
    assert pairs(tokenizer, "", "ab") == [(["<s>"], ["ab"])]
    assert pairs(tokenizer, "abd") == [(["<s>"], ["ab", "d"])]


def test_a_prompt_is_scored_behind_the_first_token() -> None:
    assert pairs(tokenizer_of(), "abd ") == [(["<s>"], ["ab", "d", " "])]


def test_control_tokens_in_rows_are_text_unless_somebody_says_so() -> None:
    plain = tokenizer_of()
    found = plain.encode_pairs([ScoredPrompt("a<s>", ("</s>",))])
    ids = found.pairs[0][0]
    assert not {0, 1} & {*ids.context.tolist(), *ids.continuation.tolist()}
    parsed = tokenizer_of(settings=TokenSettings(parse_special_tokens=True))
    assert pairs(parsed, "a<s>", "</s>") == [(["a", "<s>"], ["</s>"])]


def test_a_choice_follows_the_generation_prompt() -> None:
    tokenizer = tokenizer_of(settings=TokenSettings(apply_chat_template=True))
    ((context, tail),) = pairs(tokenizer, "c", "a")
    assert context[0] == "<s>" and context[-1] == "\n" and tail == ["a"]
    assert context == spelled(tokenizer, tokenizer.encode_batch(["c"]).flat)
    ((same, tail),) = pairs(tokenizer, [{"role": "user", "content": "c"}], "a")
    assert same == context and tail == ["a"]


def test_the_templates_control_tokens_are_parsed_and_those_of_rows_are_not() -> None:
    tokenizer = tokenizer_of(settings=TokenSettings(apply_chat_template=True))
    ((context, tail), (again, other)) = pairs(tokenizer, "c<s>", "a", "a</s>")
    assert context == again and context.count("<s>") == 2 and tail == ["a"]
    assert "</s>" not in other and other[0] == "a"
    ((_, tail),) = pairs(tokenizer, "c", "a</s>")
    assert "</s>" not in tail and tail[0] == "a"


def test_a_fault_of_one_row_is_none_of_the_others(tmp_path: Path) -> None:
    rows = [ScoredPrompt("ca", ("b",)), None, ScoredPrompt("ca", ("d", "e"))]
    found: EncodedPairs = tokenizer_of().encode_pairs(rows)
    assert found.faults.keys() == {0} and found.pairs.keys() == {2} and len(found.pairs[2]) == 2


_TEXTS = [
    "The quick brown fox jumps over the lazy dog. ", "def f(x):\n    return x ** 2  # why?\n",
    "1 + 1 = 2, and 10,000.5 % of it\n\n", "naïve café 日本語 テキスト ", "don't  you'll   see\t\t",
    "<|im_start|>user", "A. ", "(B)", "...", "\r\n", "e\u0301 a\u0300 ", "word",
]  # fmt: skip


@pytest.mark.parametrize("apply", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("parses", [False, True], ids=["text", "control"])
def test_the_end_of_a_long_context_stands_for_the_whole(
    monkeypatch: pytest.MonkeyPatch, apply: bool, parses: bool
) -> None:
    draw = random.Random(5)
    settings = TokenSettings(apply_chat_template=apply, parse_special_tokens=parses)
    tokenizer = PromptTokenizer.load("data/demo_model", None, settings)
    rows = [
        ScoredPrompt(
            "".join(draw.choices(_TEXTS, k=60)) + draw.choice(["", " ", "\n", "an", "Answer:"]),
            tuple(draw.choices([" yes", "no", "\n", " A", "swer", "s", ". B", "<|im_end|>"], k=5)),
        )
        for _ in range(40)
    ]
    quick = tokenizer.encode_pairs(rows)
    ends = [0, 0]

    def whole(encoder: PairEncoder, text: Any, context: Any) -> None:
        found = end_of(encoder, text, context)
        ends[found is not None] += 1

    end_of = PairEncoder._end_of
    monkeypatch.setattr(PairEncoder, "_end_of", whole)
    slow = tokenizer.encode_pairs(rows)
    assert ends[1] > 30, "hardly any context was cut"
    assert quick.faults.keys() == slow.faults.keys()
    for row, pairs_of_row in slow.pairs.items():
        for a, b in zip(quick.pairs[row], pairs_of_row, strict=True):
            assert a.context.tolist() == b.context.tolist()
            assert a.continuation.tolist() == b.continuation.tolist(), (row, rows[row])


def test_requests_are_those_of_lm_evaluation_harness() -> None:
    model = pytest.importorskip("lm_eval.api.model")
    instance = pytest.importorskip("lm_eval.api.instance")
    tokenizer = PromptTokenizer.load("data/demo_model", None, TokenSettings())
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer._tokenizer.eos_token_id
    seen: list[tuple[list[int], list[int]]] = []

    class Theirs(model.TemplateLM):  # type: ignore[misc, name-defined]
        eot_token_id = prefix_token_id = first

        def tok_encode(self, string: str, **ignored: Any) -> list[int]:
            ids: list[int] = tokenizer._tokenizer(string, add_special_tokens=False)["input_ids"]
            return ids

        def _loglikelihood_tokens(self, requests: Any, **ignored: Any) -> list[Any]:
            seen.extend((list(context), list(ids)) for _, context, ids in requests)
            return [(0.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return []

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return []

    draw = random.Random(2)
    texts = [text for text in _TEXTS if "<|" not in text]
    asked = [
        (
            "".join(draw.choices(texts, k=draw.choice([0, 1, 2, 40])))
            + draw.choice(["", " ", "\n"]),
            draw.choice([" yes", "no way", "Answer", " b c", "x\n"]),
        )
        for _ in range(300)
    ]
    asked = [(context, ids) for context, ids in asked if not context or context.strip()]
    Theirs().loglikelihood([instance.Instance("loglikelihood", {}, pair, 0) for pair in asked])
    found = tokenizer.encode_pairs([ScoredPrompt(context, (text,)) for context, text in asked])
    for row, (context, tail) in enumerate(seen):
        if not tail:
            assert found.faults[row].error_type == "EmptyContinuation"
            continue
        (pair,) = found.pairs[row]
        assert (pair.context.tolist(), pair.continuation.tolist()) == (context, tail), asked[row]
