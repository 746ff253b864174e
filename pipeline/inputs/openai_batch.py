"""Lines of OpenAI's batch files: a request becomes a row, a row a request, an answer a response.

Knows the format and no files. The fields of a request's body that mean something here are kept
under their own names in `sampling_params`; those that mean "as usual" are dropped; any other is
refused, since an answer without it would be another answer. What a row says wrongly (no message, a
temperature of text) is the run's to reject: one row shall not keep a file from being converted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pipeline.constraints import as_request
from pipeline.inputs.chat_fields import CHAT_FIELDS, calls_of_request, read_chat_fields
from pipeline.inputs.openai_choices import choices_of, count_tokens
from pipeline.inputs.request_fields import (
    BESIDE,
    LIMITS,
    OBEYED,
    REFUSED,
    describe_unsupported,
    is_neutral,
)

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
_CHAT = (*CHAT_FIELDS, "parallel_tool_calls")
_API_NAME = re.compile(r"[a-z][a-z_]{0,39}")
ANSWER_COLUMNS = (
    "id", "row_index", "status", "error_type", "error_message", "generated_text", "finish_reason",
    "prompt_tokens", "completion_tokens", "cached_tokens",
)  # fmt: skip
"""What a response is made of, besides `model`."""


class BadRequest(ValueError):
    """The line is no request that can be run; the message does not quote it."""


def is_request(line: Mapping[str, Any]) -> bool:
    """Whether a JSON object looks like a line of a batch file and not like a plain row."""
    return "custom_id" in line and "body" in line


def row_of_request(line: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of one request: `prompt` or `messages` (JSON text), the other is absent.

    Raises BadRequest.
    """
    custom_id, body = line.get("custom_id"), line.get("body")
    url = line.get("url", CHAT_URL)
    if not isinstance(custom_id, str) or not isinstance(body, dict):
        raise BadRequest("custom_id must be text and body an object")
    if url not in (CHAT_URL, TEXT_URL):
        raise BadRequest(f"url must be {CHAT_URL} or {TEXT_URL}")
    said = {name: value for name, value in body.items() if value is not None}
    content = "messages" if url == CHAT_URL else "prompt"
    if content not in said:
        raise BadRequest(f"body has no {content}")
    if content == "prompt" and _is_one_text(said["prompt"]):
        said["prompt"] = said["prompt"][0]
    if content == "prompt" and not isinstance(said["prompt"], str):
        raise BadRequest("prompt must be one text, not several or token ids")
    if not isinstance(said.get("model", ""), str):
        raise BadRequest("model must be text")
    _check_supported(said, content)
    limits = [said[name] for name in LIMITS if name in said]
    if any(type(limit) is not int or abs(limit) >= 2**31 for limit in limits):
        raise BadRequest("max_tokens must be a whole number")
    if len(set(limits)) > 1:
        raise BadRequest("max_tokens and max_completion_tokens differ")
    obeyed = (*OBEYED, *(_CHAT if content == "messages" else ()))
    sampling = {name: said[name] for name in obeyed if name in said and name not in LIMITS}
    try:
        read_chat_fields(sampling)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    text = said[content] if content == "prompt" else _json(said[content])
    try:
        f"{custom_id}{text}{said.get('model')}{_json(sampling)}".encode()
    except UnicodeEncodeError:
        raise BadRequest("a text holds half a surrogate pair, which is not text") from None
    return {
        "custom_id": custom_id,
        content: text,
        "max_new_tokens": limits[0] if limits else None,
        "sampling_params": _json(sampling) if sampling else None,
        "model": said.get("model"),
    }


def _is_one_text(prompt: object) -> bool:
    return isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str)


def _check_supported(said: Mapping[str, Any], content: str) -> None:
    """Raises BadRequest with all fields that would change the answer, or that nobody knows."""
    chat = _CHAT if content == "messages" else ()
    known = {content, "model", *OBEYED, *BESIDE, *chat}
    bad = [
        name
        for name, value in said.items()
        if name not in known and not (name in REFUSED and is_neutral(name, value))
    ]
    named = [name for name in bad if _API_NAME.fullmatch(name)]
    if bad:
        raise BadRequest(f"body {describe_unsupported(named, set(bad) - set(named))}")


def request_of_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `row_of_request`; `sampling_params` and `messages` may be values or JSON text.

    Keys that are absent or None are left out.
    """
    said = {name: value for name, value in row.items() if value is not None}
    is_chat = "messages" in said
    content = "messages" if is_chat else "prompt"
    body: dict[str, Any] = {}
    if isinstance(said.get("model"), str):  # any table may have a column of that name
        body["model"] = said["model"]
    body[content] = _messages(_value(said[content])) if is_chat else said[content]
    if "max_new_tokens" in said:
        body["max_completion_tokens" if is_chat else "max_tokens"] = said["max_new_tokens"]
    sampling: dict[str, Any] = dict(_value(said.get("sampling_params", {})))
    constraint = sampling.pop("constraint", None)
    body |= {} if constraint is None else as_request(constraint)
    body |= {name: value for name, value in sampling.items() if value is not None}
    asked = body.get("logprobs")
    if is_chat and isinstance(asked, int) and not isinstance(asked, bool):
        body |= {"logprobs": True, "top_logprobs": asked}
    url = CHAT_URL if is_chat else TEXT_URL
    return {"custom_id": said["custom_id"], "method": "POST", "url": url, "body": body}


def response_of_answer(row: Mapping[str, Any], run_id: str, is_chat: bool) -> dict[str, Any]:
    """A line of a batch's output file from the `ANSWER_COLUMNS` of a row of a run's output, and
    those of its choices."""
    name = f"{run_id}-{row['row_index']}"
    line = {"id": f"batch_req_{name}", "custom_id": row["id"], "response": None, "error": None}
    if row["status"] != "ok":
        error = {"code": row["error_type"], "message": row["error_message"]}
        return line | {"error": error}
    completion_tokens = count_tokens(row)
    model = row.get("model")
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{name}",
        "object": "chat.completion" if is_chat else "text_completion",
        "model": model if isinstance(model, str) else None,
        "choices": choices_of(row, is_chat, name),
        "usage": {
            "prompt_tokens": row["prompt_tokens"],
            "completion_tokens": completion_tokens,
            "total_tokens": row["prompt_tokens"] + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": row["cached_tokens"]},
            **_thought_tokens(row),
        },
    }
    return line | {"response": {"status_code": 200, "request_id": name, "body": body}}


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a row, whose calls of tools are text."""
    return [
        message | {"tool_calls": calls_of_request(message["tool_calls"])}
        if isinstance(message.get("tool_calls"), str)
        else message
        for message in messages
    ]


def _thought_tokens(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of all choices together."""
    if row.get("reasoning_tokens") is None:
        return {}
    tokens = sum(sample["reasoning_tokens"] for sample in row.get("samples") or [row])
    return {"completion_tokens_details": {"reasoning_tokens": tokens}}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _value(cell: Any) -> Any:
    return json.loads(cell) if isinstance(cell, str) else cell
