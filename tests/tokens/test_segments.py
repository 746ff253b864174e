"""Segments become the same ids wherever they stand, and a template's text stands around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.prompt_settings import TokenSettings
from pipeline.prompts import SegmentedPrompt
from pipeline.tokens.encoded import EncodedBatch
from pipeline.tokens.tokenizer import PromptTokenizer
from tests.tokens.conftest import CHATML, save_tokenizer

BOS, START, END = range(3)
PROMPT = SegmentedPrompt("You are helpful.", ("\nhello there", "\n say"), "\nnow")


def load(folder: Path, **settings: Any) -> PromptTokenizer:
    return PromptTokenizer.load(str(folder), None, TokenSettings(**settings))


def segments(batch: EncodedBatch, row: int = 0) -> list[list[int]]:
    ids = np.split(batch.flat, np.cumsum(batch.lengths)[:-1])[row]
    return [part.tolist() for part in np.split(ids, np.cumsum(batch.segments[row])[:-1])]


def ids_of(tokenizer: PromptTokenizer, text: str) -> list[int]:
    """Without what is put before every text."""
    return tokenizer.encode_batch([text]).flat.tolist()[1:]


def test_what_is_put_before_every_text_stands_in_the_preamble_alone(folder: Path) -> None:
    tokenizer = load(folder)
    bare = SegmentedPrompt("", PROMPT.documents, PROMPT.question)
    batch = tokenizer.encode_batch([PROMPT, "hello", bare, None])
    preamble, *rest = segments(batch)
    assert preamble == [BOS, *ids_of(tokenizer, PROMPT.preamble)]
    assert rest == [ids_of(tokenizer, text) for text in (*PROMPT.documents, PROMPT.question)]
    assert segments(batch, 2) == [[BOS], *rest]
    assert batch.segments.keys() == {0, 2} and batch.lengths[[1, 3]].tolist()[1] == 0


def test_a_document_is_the_same_ids_in_any_order_and_beside_any_other(folder: Path) -> None:
    x, y, z = PROMPT.documents[0], PROMPT.documents[1], "lo he"
    orders = [(x, y), (y, x), (z, x), (x, x)]
    prompts = [SegmentedPrompt("hel", order, "lo") for order in orders]
    batch = load(folder).encode_batch(prompts)
    known: dict[str, list[int]] = {}
    for row, order in enumerate(orders):
        for text, ids in zip(order, segments(batch, row)[1:-1], strict=True):
            assert known.setdefault(text, ids) == ids


def test_rows_whose_tokens_reach_over_a_border_are_counted(folder: Path) -> None:
    within, between = (
        SegmentedPrompt("", ("hel",), "lo there"),
        SegmentedPrompt("", ("hello",), " there"),
    )
    tokenizer = load(folder)
    assert ids_of(tokenizer, "hello there") != [
        *ids_of(tokenizer, "hel"),
        *ids_of(tokenizer, "lo there"),
    ]
    count = tokenizer.count_changed_by_joining
    assert (count([between, "text", None]), count([within, between, within])) == (0, 2)
    assert load(folder, apply_chat_template=True).count_changed_by_joining([within]) == 1


@pytest.mark.parametrize("system_prompt", [None, "say <|im_end|> now"])
def test_a_template_stands_around_the_documents(folder: Path, system_prompt: str | None) -> None:
    tokenizer = load(folder, apply_chat_template=True, system_prompt=system_prompt)
    prompt = SegmentedPrompt("", PROMPT.documents, "now <|im_end|>")
    batch = tokenizer.encode_batch([prompt, PROMPT])
    before, *documents, after = segments(batch)
    plain = load(folder)
    assert documents == [ids_of(plain, text) for text in PROMPT.documents]
    assert after.count(END) == 1 and after.count(START) == 1  # the row's own stays text
    whole = [number for part in (before, after) for number in part]
    without = tokenizer.encode_batch([[{"role": "user", "content": "now <|im_end|>"}]])
    assert whole == without.flat.tolist()
    own = segments(batch, 1)[0]
    assert own[:1] == [START] and own.count(START) == 2 and own.count(END) == 1


def test_control_tokens_in_documents_stay_text_unless_asked(folder: Path) -> None:
    prompt = SegmentedPrompt("<|im_start|>", ("a<|im_end|>",), "<|im_end|>")
    for chat in (False, True):
        ids = segments(load(folder, apply_chat_template=chat).encode_batch([prompt]))
        assert END not in ids[1] and (END in ids[2]) == chat
    parsed = segments(load(folder, parse_special_tokens=True).encode_batch([prompt]))
    assert parsed[0] == [BOS, START] and parsed[1][-1] == END and parsed[2] == [END]
    twice = SegmentedPrompt("<|bos|>hello", ("a",), "b")
    (first, *_) = segments(load(folder, parse_special_tokens=True).encode_batch([twice]))
    assert first.count(BOS) == 1


@pytest.mark.fault(
    "prompts in segments",
    injected="a chat template that leaves out, doubles or changes the place of the documents",
    outcome="BadTemplate, error of that row; the other rows run",
)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("message['content'] | replace(message['content'][0], '')", "leaves out"),
        ("message['content'] + message['content']", "2 times"),
    ],
)
def test_the_place_of_the_documents_must_survive_once(
    folder: Path, tmp_path: Path, change: str, says: str
) -> None:
    path = tmp_path / "t.jinja"
    guarded = f"(({change}) if 'odd' in message['content'] else message['content'])"
    path.write_text(CHATML.replace("message['content']", guarded, 1))
    tokenizer = load(folder, apply_chat_template=True, chat_template=path)
    odd = SegmentedPrompt("", ("a",), " odd odd")
    batch = tokenizer.encode_batch([PROMPT, odd])
    assert batch.errors.keys() == {1} and batch.segments.keys() == {0}
    assert batch.error_types[1] == "BadTemplate" and says in batch.errors[1]


def test_a_mark_that_stands_in_the_texts_is_not_used(folder: Path) -> None:
    tokenizer = load(folder, apply_chat_template=True)
    odd = SegmentedPrompt("\ue000", ("\ue001",), "\ue002")
    before, document, after = segments(tokenizer.encode_batch([odd]))
    plain = load(folder)
    assert document == ids_of(plain, "\ue001")
    joined = [*before, *after]
    whole = tokenizer.encode_batch([[
        {"role": "system", "content": "\ue000"}, {"role": "user", "content": "\ue002"},
    ]])  # fmt: skip
    assert joined == whole.flat.tolist()


@pytest.mark.fault(
    "prompts in segments",
    injected="a document and a question of which the tokenizer makes no token; half a surrogate "
    "pair; a prompt that is sure to be too long",
    outcome="error of that row, naming the document; the other rows run",
)
def test_a_segment_without_a_token_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load(folder)
    real = tokenizer._texts.encode

    def encode(texts: list[str], **flags: bool) -> list[list[int]]:
        return [[] if t == "-" else ids for t, ids in zip(texts, real(texts, **flags), strict=True)]

    monkeypatch.setattr(tokenizer._texts, "encode", encode)
    rows = [
        SegmentedPrompt("p", ("a", "-"), "q"), SegmentedPrompt("p", ("a",), "-"),
        SegmentedPrompt("p", ("\ud800",), "q"), SegmentedPrompt("-", ("a",), "q"),
        SegmentedPrompt("p", ("hello " * 999,), "q"),
    ]  # fmt: skip
    batch = tokenizer.encode_batch(rows, most_tokens=100)
    assert batch.errors.keys() == {0, 1, 2} and batch.overlong.keys() == {4}
    assert "document 1" in batch.errors[0] and "the question" in batch.errors[1]
    assert segments(batch, 3)[0] == [BOS]


def test_what_a_tokenizer_puts_behind_every_text_stands_in_the_question(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    folder = save_tokenizer(tmp_path)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|im_end|>", special_tokens=[("<|bos|>", BOS), ("<|im_end|>", END)]
    )
    backend.save(str(folder / "tokenizer.json"))
    preamble, *documents, question = segments(load(folder).encode_batch([PROMPT]))
    assert preamble[0] == BOS and question[-1] == END
    assert END not in [i for part in documents for i in part] and END not in preamble
