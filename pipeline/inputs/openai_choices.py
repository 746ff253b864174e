"""The choices of a response, with their log-probabilities, from a row of a run's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product, starmap
from typing import Any

import pyarrow as pa

from pipeline.storage.schema import LOGPROBS, sample_type

CHOICE_TYPES: Mapping[str, tuple[pa.DataType, ...]] = {
    "completion_token_ids": (pa.list_(pa.int32()),),
    "logprobs": (LOGPROBS,),
    "samples": tuple(starmap(sample_type, product((False, True), repeat=2))),
}
"""Columns that choices are made of. One of another type is the input's own."""


def is_ours(field: pa.Field) -> bool:
    """Whether a column of the output says something of its choices."""
    return any(field.type == kind for kind in CHOICE_TYPES.get(field.name, ()))


def choices_of(row: Mapping[str, Any], is_chat: bool, name: str) -> list[dict[str, Any]]:
    """One for each sample, or the only one; `name`: of the response, which calls of tools are named
    by, those of the first sample alone."""
    samples: Sequence[Mapping[str, Any]] = row.get("samples") or [row]
    choices = [_choice(index, sample, is_chat) for index, sample in enumerate(samples)]
    if is_chat:
        _add_calls(choices[0], row, name)
    return choices


def _add_calls(choice: dict[str, Any], row: Mapping[str, Any], name: str) -> None:
    """The calls of tools, in the message of a choice."""
    message, calls = choice["message"], row.get("tool_calls")
    if not calls:
        return
    message["tool_calls"] = [
        {"id": f"call_{name}-{number}", "type": "function", "function": dict(call)}
        for number, call in enumerate(calls)
    ]
    if choice["finish_reason"] == "stop":
        choice["finish_reason"], message["content"] = "tool_calls", message["content"] or None


def count_tokens(row: Mapping[str, Any]) -> int:
    """Of all choices together, as a response's usage has it."""
    samples = row.get("samples")
    if not samples:
        return int(row["completion_tokens"])
    return sum(len(sample["completion_token_ids"]) for sample in samples)


def _choice(index: int, answer: Mapping[str, Any], is_chat: bool) -> dict[str, Any]:
    text, logprobs = answer["generated_text"], answer.get("logprobs")
    message = {"role": "assistant", "content": text}
    if answer.get("reasoning") is not None:
        message["reasoning_content"] = answer["reasoning"]
    said = {"message": message} if is_chat else {"text": text}
    described = None
    if logprobs is not None:
        described = _of_chat(logprobs) if is_chat else _of_text(logprobs)
    choice = {"index": index, "logprobs": described, "finish_reason": answer["finish_reason"]}
    return choice | said


def _of_chat(logprobs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    content = [
        _token(position) | {"top_logprobs": [_token(top) for top in position["top"]]}
        for position in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(said: Mapping[str, Any]) -> dict[str, Any]:
    token = said["token"]
    is_whole = "\ufffd" not in token  # else a piece of a character, whose bytes nobody kept
    said_bytes = list(token.encode()) if is_whole else None
    return {"token": token, "logprob": said["logprob"], "bytes": said_bytes}


def _of_text(logprobs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tokens = [position["token"] for position in logprobs]
    offsets = [0]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [position["logprob"] for position in logprobs],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in position["top"]} for position in logprobs
        ],
        "text_offset": offsets[: len(tokens)],
    }
