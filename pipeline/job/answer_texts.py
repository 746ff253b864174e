"""The texts of answers, as their rows want them. Knows no plan and no output.

```
 ids  .. a  b  <end>     shown  a b        skip_special_tokens: false, include_stop..: a b <end>
 ids  .. a  STOP         shown  a          include_stop_str_in_output                  a STOP
```
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from pipeline.records import FinishReason, SamplingParams
from pipeline.request_rules import read_asked
from pipeline.tokens.answer_text import AnswerText, Ids, Shown
from pipeline.tokens.reasoning import AnswerParts, ReasoningTags, Split, decode_parts


class Said(NamedTuple):
    """An answer, what it follows and how it was asked for; `skipped` of its tokens were thought."""

    prompt: Ids
    token_ids: tuple[int, ...]
    reason: FinishReason
    params: SamplingParams
    skipped: int = 0


def decode_answers(
    text: AnswerText, tags: ReasoningTags | None, said: Sequence[Said], eos: Collection[int]
) -> list[AnswerParts]:
    """The text of each, apart from what was thought before it; `eos`: the model's ends."""

    def decode(prompts: Sequence[Ids], ids: Sequence[Ids]) -> list[str]:
        return _decode(text, [_rest(*one) for one in zip(said, prompts, ids, strict=True)], eos)

    splits = None if tags is None else [split_of(tags, *one[:2], one.params) for one in said]
    return decode_parts(
        text,
        tags,
        [one.prompt for one in said],
        [one.token_ids for one in said],
        [one.params.stop for one in said],
        decode,
        splits,
    )


def split_of(
    tags: ReasoningTags, prompt: Ids, token_ids: Ids, params: SamplingParams
) -> Split | None:
    """Where an answer was thought, as its guide had it; None: nowhere."""
    if not params.constraint:
        return tags.split(prompt, token_ids)
    return tags.split_form(prompt, token_ids, params.thinking_budget is not None)


def _rest(said: Said, prompt: Ids, token_ids: Ids) -> Said:
    """Of an answer what follows what was thought."""
    rest = tuple(int(token_id) for token_id in token_ids)
    return said._replace(prompt=prompt, token_ids=rest, skipped=len(said.token_ids) - len(rest))


def _decode(text: AnswerText, said: Sequence[Said], eos: Collection[int]) -> list[str]:
    texts = text.decode(
        [one.prompt for one in said],
        [one.token_ids for one in said],
        [one.params.stop for one in said],
    )
    for place, one in enumerate(said):
        if one.params.asked and read_asked(one.params.asked).shows_otherwise:
            texts[place] = _shown(text, one, eos)
    return texts


def _shown(text: AnswerText, said: Said, eos: Collection[int]) -> str:
    prompt, token_ids, reason, params, skipped = said
    rules = read_asked(params.asked)
    how = Shown(not rules.skip_special_tokens, rules.include_stop_str_in_output)
    ends = {*rules.stop_token_ids, *(() if params.ignore_eos else eos)}
    if reason == "stop" and token_ids and token_ids[-1] in ends:
        return text.decode_one(prompt, token_ids if how.stop else token_ids[:-1], how=how)
    least = max(0, rules.min_tokens - skipped)
    if not params.stop or not least:
        return text.decode_one(prompt, token_ids, params.stop, how)
    before, rest = [*prompt, *token_ids[:least]], token_ids[least:]
    if not text.is_stopped(rest, params.stop, before):
        return text.decode_one(prompt, token_ids, how=how)
    begun = text.decode_one(prompt, token_ids[:least], how=how)
    return begun + text.decode_one(before, rest, params.stop, how)
