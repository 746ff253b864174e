"""What a model thought before it answered, told from its answer by the tags around it, on ids.

```
 prompt  ...<|im_start|>assistant\\n<think>\\n          a template may open the tag itself
 answer  Two and two ... </think>\\n\\nFour.<|im_end|>
         [---- reasoning ----]       [answer]          without an end tag all of it is reasoning
```

Text that only looks like a tag is none: a tag is tokens of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from pipeline.errors import UsageError
from pipeline.tokens.answer_text import AnswerText, Ids

Decode = Callable[[Sequence[Ids], Sequence[Ids]], list[str]]
"""The texts of answers behind what stands before them."""
_BLANKS = ("\n", "\n\n", "\n\n\n", " ", "  ", "\t")
_TAIL_TOKENS = 64
_FIELDS = ("thinking", "reasoning_content", "reasoning")  # names of it in a response template


class TagNames(NamedTuple):
    """How reasoning is marked; `answer`: what stands before an answer that nothing was thought
    for, where that is marked too."""

    begin: str
    end: str
    answer: str = ""


_KNOWN = (
    TagNames("<think>", "</think>"),
    TagNames(
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|channel|>final<|message|>",
    ),
    TagNames("[THINK]", "[/THINK]"),
    TagNames("<seed:think>", "</seed:think>"),
    TagNames("<|START_THINKING|>", "<|END_THINKING|>"),
    TagNames("◁think▷", "◁/think▷"),
    TagNames("<|think|>", "<|/think|>"),
    TagNames("<thinking>", "</thinking>"),
)
"""Those that chat templates of published models write."""


@dataclass(frozen=True)
class ReasoningTags:
    """The tags of a tokenizer. `blank_ids`: tokens of white space, which may stand around them."""

    names: TagNames
    begin_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    blank_ids: frozenset[int]

    def is_open(self, prompt: Ids) -> bool:
        """Whether the prompt ends with the begin tag, so that the answer begins inside of it."""
        tail = [int(token) for token in prompt[max(0, len(prompt) - _TAIL_TOKENS) :]]
        while tail and tail[-1] in self.blank_ids:
            tail.pop()
        return tuple(tail[-len(self.begin_ids) :]) == self.begin_ids

    def split(self, prompt: Ids, answer: Ids) -> Split | None:
        """Where the reasoning of an answer is; None: there is none."""
        ids = tuple(int(token) for token in answer)
        first = next((i for i, token in enumerate(ids) if token not in self.blank_ids), len(ids))
        behind = first + len(self.begin_ids)
        if ids[first:behind] == self.begin_ids:
            start = behind
        elif self.is_open(prompt) or self._lacks_begin(ids):
            start = 0
        else:
            return None
        return self._split_at(ids, start)

    def split_form(self, prompt: Ids, answer: Ids, may_begin: bool) -> Split | None:
        """The same of an answer that is held to a form: what looks like a tag within it is none.
        `may_begin`: its first token may open the thinking, where the prompt does not."""
        ids = tuple(int(token) for token in answer)
        begins = may_begin and ids[: len(self.begin_ids)] == self.begin_ids
        if not begins and not self.is_open(prompt):
            return None
        return self._split_at(ids, len(self.begin_ids) if begins else 0)

    def _split_at(self, ids: tuple[int, ...], start: int) -> Split:
        stop = find(ids, self.end_ids, start)
        if stop is None:
            return Split(start, len(ids), len(ids))
        return Split(start, stop, stop + len(self.end_ids))

    def _lacks_begin(self, ids: tuple[int, ...]) -> bool:
        """Whether something ends that has not begun: a model may leave the tag out."""
        end = find(ids, self.end_ids)
        return end is not None and find(ids[:end], self.begin_ids) is None


class Split(NamedTuple):
    """`[start, stop)` of an answer's tokens are reasoning; from `rest` on it is the answer."""

    start: int
    stop: int
    rest: int


class AnswerParts(NamedTuple):
    """What an answer says. `reasoning`: None where nothing was thought; `reasoning_tokens`: those
    that were generated before the answer itself began, tags included."""

    text: str
    reasoning: str | None = None
    reasoning_tokens: int = 0


def decode_parts(
    answers: AnswerText,
    tags: ReasoningTags | None,
    prompts: Sequence[Ids],
    ids: Sequence[Ids],
    stops: Sequence[tuple[str, ...]],
    decode: Decode | None = None,
    splits: Sequence[Split | None] | None = None,
) -> list[AnswerParts]:
    """The text of each answer up to its first stop string, apart from its reasoning; by `decode`,
    and cut at `splits`, where that shall be otherwise."""
    decode = decode or partial(_decode, answers, stops)
    if tags is None:
        return [AnswerParts(text) for text in decode(prompts, ids)]
    if splits is None:
        splits = [tags.split(*pair) for pair in zip(prompts, ids, strict=True)]
    rests = [
        _unmarked(answer, tags) if split is None else split.rest
        for answer, split in zip(ids, splits, strict=True)
    ]
    texts = decode(
        [_before(*row) for row in zip(prompts, ids, rests, strict=True)],
        [answer[rest:] for answer, rest in zip(ids, rests, strict=True)],
    )
    thought = [row for row, split in enumerate(splits) if split is not None]
    said = _decode_thoughts(answers, splits, prompts, ids, stops, thought)
    thoughts = dict(zip(thought, said, strict=True))
    return [
        AnswerParts(text) if split is None
        else AnswerParts(text.lstrip("\n"), thoughts[row].strip(), split.rest)
        for row, (text, split) in enumerate(zip(texts, splits, strict=True))
    ]  # fmt: skip


def _decode(
    answers: AnswerText,
    stops: Sequence[tuple[str, ...]],
    prompts: Sequence[Ids],
    ids: Sequence[Ids],
) -> list[str]:
    return answers.decode(prompts, ids, stops)


def _decode_thoughts(
    answers: AnswerText,
    splits: Sequence[Split | None],
    prompts: Sequence[Ids],
    ids: Sequence[Ids],
    stops: Sequence[tuple[str, ...]],
    rows: Sequence[int],
) -> list[str]:
    """Of these rows. A stop string that cut an answer may stand in its reasoning."""
    pieces = [(row, split) for row in rows if (split := splits[row]) is not None]
    return answers.decode(
        [_before(prompts[row], ids[row], split.start) for row, split in pieces],
        [ids[row][split.start : split.stop] for row, split in pieces],
        [stops[row] for row, _ in pieces],
    )


def _before(prompt: Ids, answer: Ids, rest: int) -> Ids:
    """What stands before the token `rest` of an answer, as much as decides how text goes on."""
    if not rest:
        return prompt
    return [*prompt[max(0, len(prompt) - _TAIL_TOKENS) :], *answer[:rest]][-_TAIL_TOKENS:]


def _unmarked(answer: Ids, tags: ReasoningTags) -> int:
    """How many first tokens only say that the answer begins."""
    own = tags.answer_ids
    return len(own) if own and tuple(int(t) for t in answer[: len(own)]) == own else 0


def find(ids: Sequence[int], wanted: tuple[int, ...], start: int = 0) -> int | None:
    """Where `wanted` begins in `ids`, from `start` on."""
    last = len(ids) - len(wanted)
    return next((i for i in range(start, last + 1) if ids[i] == wanted[0]
                 and tuple(ids[i : i + len(wanted)]) == wanted), None)  # fmt: skip


def named_tags(tokenizer: Any, begin: str, end: str) -> ReasoningTags:
    """The tags that a person names. Raises UsageError for one that the tokenizer lacks."""
    for tag in (begin, end):
        if not _ids_of(tokenizer.backend_tokenizer, tag):
            raise UsageError(
                f"the tokenizer has no token {tag!r}, so nothing marks where reasoning begins or "
                "ends; correct --reasoning-tags BEGIN,END"
            )
    return _make(tokenizer.backend_tokenizer, TagNames(begin, end))


def find_tags(tokenizer: Any, template: str | None = None) -> ReasoningTags | None:
    """The tags that the model's response template declares, or its chat template writes and the
    tokenizer has; without a template those that the tokenizer has. None: there are none."""
    backend = tokenizer.backend_tokenizer
    declared = _declared(getattr(tokenizer, "response_template", None))
    written = [names for names in _KNOWN if template is None or _is_written(names, template)]
    for names in (*declared, *written):
        if _ids_of(backend, names.begin) and _ids_of(backend, names.end):
            return _make(backend, names)
    return None


def _is_written(names: TagNames, template: str) -> bool:
    if names.answer:  # of channels a template writes the pieces
        return "<|channel|>" in template and "analysis" in template
    return names.end in template


def _declared(template: object) -> list[TagNames]:
    """What a response template of transformers says of it."""
    fields = template.get("fields") if isinstance(template, Mapping) else None
    if not isinstance(fields, Mapping):
        return []
    said = [fields[name] for name in _FIELDS if isinstance(fields.get(name), Mapping)]
    pairs = [(field.get("open"), field.get("close")) for field in said]
    return [
        TagNames(begin, end) for begin, end in pairs
        if isinstance(begin, str) and isinstance(end, str) and begin.strip() and end.strip()
    ]  # fmt: skip


def _make(backend: Any, names: TagNames) -> ReasoningTags:
    blanks = [backend.encode(text, add_special_tokens=False).ids for text in _BLANKS]
    return ReasoningTags(
        names,
        _ids_of(backend, names.begin),
        _ids_of(backend, names.end),
        _ids_of(backend, names.answer),
        frozenset(ids[0] for ids in blanks if len(ids) == 1),
    )


def _ids_of(backend: Any, tag: str) -> tuple[int, ...]:
    """The tokens of a tag; none where text around it could make others of them: it is one token,
    or one of the tokenizer's added tokens is at each end."""
    ids = tuple(backend.encode(tag.strip(), add_special_tokens=False).ids) if tag.strip() else ()
    added = backend.get_added_tokens_decoder()
    if len(ids) == 1 and backend.token_to_id(tag.strip()) == ids[0]:
        return ids
    return ids if ids and ids[0] in added and ids[-1] in added else ()
