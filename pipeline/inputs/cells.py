"""One input cell becomes a conversation or sampling fields, or one sentence that says why not.

Knows nothing about files or columns. No message quotes what a cell holds: it may be private.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline import constraints
from pipeline.inputs.bad_cell import BadCell, check_unicode, read_json
from pipeline.inputs.chat_fields import CHAT_FIELDS, GIVEN, read_chat_fields, read_tool_calls
from pipeline.inputs.request_fields import (
    BESIDE,
    OBEYED,
    REFUSED,
    describe_unsupported,
    is_neutral,
)
from pipeline.inputs.request_values import read_value
from pipeline.prompts import Message, SegmentedPrompt
from pipeline.records import MOST_LOGPROBS


def read_text(cell: str) -> str:
    """The prompt as it is; white space counts. Raises BadCell if it is empty or not text."""
    if not cell:
        raise BadCell("the prompt is empty")
    check_unicode(cell)
    return cell


def read_messages(cell: object) -> list[Message]:
    """A list of {role, content} dicts, or that as JSON text, as plain messages.

    Content may be parts of text, which become its lines. Further fields of text are kept for the
    chat template, null ones dropped, and those of other types too, unless a template could mean
    them. Raises BadCell.
    """
    is_json = isinstance(cell, str)
    turns = read_json(cell) if isinstance(cell, str) else cell
    if not isinstance(turns, list):
        raise BadCell("messages is not a list of {role, content}")
    if not turns:
        raise BadCell("messages holds no message")
    messages = [_read_message(number, turn) for number, turn in enumerate(turns)]
    if is_json:  # a column of texts holds nothing but text
        check_unicode(*(text for message in messages for pair in message.items() for text in pair))
    return messages


def _read_message(number: int, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise BadCell(f"message {number} is not a {{role, content}} object")
    said = {str(field): value for field, value in turn.items() if value is not None}
    if said.get("tool_calls"):
        said.setdefault("content", "")
        said["tool_calls"] = _read_calls(number, said["tool_calls"])
    for field in ("role", "content"):
        if field not in said:
            raise BadCell(f"message {number} has no {field}")
    if isinstance(said["content"], list):
        said["content"] = _join_parts(number, said["content"])
    message = {field: value for field, value in said.items() if isinstance(value, str)}
    for field in ("role", "content"):
        if field not in message:
            kind = type(said[field]).__name__
            raise BadCell(f"message {number} has {field} of type {kind}, not text")
    if len(message) < len(said) and (meant := [f for f in _MEANT if _is_meant(said, f)]):
        raise BadCell(f"message {number} has {', '.join(meant)}, which coppice cannot use")
    return message


def _read_calls(number: int, calls: object) -> str:
    try:
        found = read_tool_calls(calls)
        check_unicode(found)  # their arguments may be JSON text, which can spell what is none
        return found
    except ValueError as error:
        raise BadCell(f"message {number}: {error}") from None


def _is_meant(said: Mapping[str, object], field: str) -> bool:
    return bool(said.get(field)) and not isinstance(said[field], str)


def _join_parts(number: int, parts: list[object]) -> str:
    """As vLLM does for templates that take text: a line for each part."""
    texts = []
    for part in parts:
        fields = part if isinstance(part, dict) else {}
        kind, text = fields.get("type", "text"), fields.get("text")
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            known = f" ({kind})" if kind in _OTHER_PARTS else ""
            raise BadCell(f"message {number} has a part that is no text{known}")
        texts.append(text)
    return "\n".join(texts)


_MEANT = ("tool_calls", "function_call", "audio", "images", "videos", "documents")
TURN_FIELDS = ("role", "content", *_MEANT)
"""Fields of a message that are used, or refused where they say something."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_OTHER_PARTS = (
    "image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url",
    "file", "input_file", "refusal", "thinking", "tool_use", "tool_result",
)  # fmt: skip


def read_segments(cell: object) -> SegmentedPrompt:
    """A list of {role, text} dicts, or that as JSON text; further fields are not looked at.

    First those of the role system, if any, then the documents, then the query; texts of system, and
    of query, are put together as they are. Raises BadCell.
    """
    parts = read_json(cell) if isinstance(cell, str) else cell
    if not isinstance(parts, list):
        raise BadCell("segments is not a list of {role, text}")
    texts: dict[str, list[str]] = {role: [] for role in SEGMENT_ROLES}
    before = SEGMENT_ROLES[0]
    for number, part in enumerate(parts):
        role, text = _read_segment(number, part)
        if SEGMENT_ROLES.index(role) < SEGMENT_ROLES.index(before):
            raise BadCell(
                f"segment {number} is of the role {role} and stands behind a {before}; the order "
                "is system, documents, query"
            )
        texts[role].append(text)
        before = role
    preamble, question = "".join(texts["system"]), "".join(texts["query"])
    return _segmented(preamble, texts["document"], question)


def read_documents(documents: object, question: str) -> SegmentedPrompt:
    """A list of texts that stand before the prompt of the row. Raises BadCell."""
    if not isinstance(documents, list):
        raise BadCell("documents is null; a row without any has an empty list")
    for number, text in enumerate(documents):
        if not isinstance(text, str):
            raise BadCell(f"document {number} is {'null' if text is None else 'no text'}")
    return _segmented("", documents, question)


def _read_segment(number: int, part: object) -> tuple[str, str]:
    if not isinstance(part, dict):
        raise BadCell(f"segment {number} is not a {{role, text}} object")
    role, text = part.get("role"), part.get("text")
    if role not in SEGMENT_ROLES:
        said = "no role" if role is None else "a role that is not known"
        raise BadCell(f"segment {number} has {said}; each is system, document or query")
    if not isinstance(text, str):
        raise BadCell(f"segment {number} has no text")
    return str(role), text


def _segmented(preamble: str, documents: list[str], question: str) -> SegmentedPrompt:
    check_unicode(preamble, *documents, question)
    if "" in documents:
        raise BadCell(f"document {documents.index('')} is empty")
    if not question:
        raise BadCell("there is no query, the question that the answer follows")
    return SegmentedPrompt(preamble, tuple(documents), question)


SEGMENT_ROLES = ("system", "document", "query")
"""Of the segments of a prompt, in their order."""


def read_sampling(cell: object) -> dict[str, object]:
    """Sampling fields from a struct or a JSON object, as `read_fields` has them. Raises BadCell."""
    fields = read_json(cell) if isinstance(cell, str) else without_gaps(cell)
    if not isinstance(fields, dict):
        raise BadCell("sampling_params is not an object")
    return read_fields(fields)


def read_schema(cell: object) -> str:
    """What an answer must be, of a JSON schema as text or as a struct. Raises BadCell."""
    try:
        return constraints.of_schema(without_gaps(cell))
    except ValueError as error:
        raise BadCell(str(error)) from None


def without_gaps(cell: object) -> object:
    """A struct without the fields that are null: in a column all structs have all of them."""
    if not isinstance(cell, dict):
        return cell
    return {name: without_gaps(inner) for name, inner in cell.items() if inner is not None}


def read_fields(fields: Mapping[str, object]) -> dict[str, object]:
    """Fields of a request as those of `SamplingParams`, and `GIVEN`; null and neutral ones are left
    out.

    Names and types are checked here, ranges by `SamplingParams`. Raises BadCell, which names all
    fields that cannot be done and does not quote a name that is not a known one.
    """
    said = {name: value for name, value in fields.items() if value is not None}
    refused = [
        name for name in said
        if name in REFUSED and name not in CHAT_FIELDS and not is_neutral(name, said[name])
    ]  # fmt: skip
    unknown = said.keys() - OBEYED.keys() - REFUSED - BESIDE
    if refused or unknown:
        raise BadCell(f"the row {describe_unsupported(refused, unknown)}")
    chosen: dict[str, object] = {}
    for name in filter(OBEYED.__contains__, said):
        value = read_value(name, said[name])
        if value is None:
            continue
        before = chosen.setdefault(OBEYED[name], value)
        if before is not value and before != value:  # NaN differs from itself
            both = " and ".join(n for n in OBEYED if n in said and OBEYED[n] == OBEYED[name])
            raise BadCell(f"{both} mean the same and differ; leave one of them")
    _read_samples(chosen)
    _read_logprobs(chosen)
    try:
        given = read_chat_fields(said)
    except ValueError as error:
        raise BadCell(str(error)) from None
    check_unicode(given)
    return chosen | {GIVEN: given} if given else chosen


def _read_samples(chosen: dict[str, object]) -> None:
    """`best_of` would leave some out, the best of which nobody knows before all are there."""
    best_of, n = chosen.pop("best_of", None), chosen.get("n", 1)
    if best_of not in (None, n):
        raise BadCell(
            f"best_of is {best_of} and n {n}; coppice returns every sample, so leave best_of out, "
            "or ask for as many"
        )


def _read_logprobs(chosen: dict[str, object]) -> None:
    """Chat requests say `logprobs: true` and `top_logprobs`, others `logprobs` alone, a number."""
    top, asked = chosen.pop("top_logprobs", None), chosen.get("logprobs")
    if isinstance(top, int) and not 0 <= top <= MOST_LOGPROBS:
        raise BadCell(f"top_logprobs must lie in [0, {MOST_LOGPROBS}]")
    if asked is True:
        chosen["logprobs"] = top or 0
    elif isinstance(asked, bool) or asked is None:
        if top:
            raise BadCell("top_logprobs is nothing without logprobs; say logprobs: true as well")
    elif top not in (None, asked):
        raise BadCell("logprobs and top_logprobs differ; leave one of them")
