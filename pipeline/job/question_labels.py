"""Whether labels of questions can be told apart by their tokens, before the first row is read."""

from __future__ import annotations

from pipeline.errors import UsageError
from pipeline.prompts import ScoredPrompt
from pipeline.questions import Questionnaire, Text
from pipeline.tokens.tokenizer import PromptTokenizer

_TEXT = "a"  # of a row, and of a question: what stands right before a label is the same for all


def check_labels(sheet: Questionnaire, tokenizer: PromptTokenizer, are_messages: bool) -> None:
    """Raises UsageError for a label without tokens, and for two that have the same."""
    content: Text = [{"role": "user", "content": _TEXT}] if are_messages else _TEXT
    for question in sheet.questions:
        prompt = ScoredPrompt(sheet.compose(content, _TEXT), question.labels)
        found = tokenizer.encode_pairs([prompt])
        fault = found.faults.get(0)
        if fault is not None and fault.error_type == "EmptyContinuation":
            raise UsageError(f"the question {question.name!r}: {fault}")
        known: dict[tuple[int, ...], str] = {}
        pairs = found.pairs.get(0, ())
        for label, pair in zip(question.labels[: len(pairs)], pairs, strict=True):
            other = known.setdefault(tuple(pair.continuation.tolist()), label)
            if other != label:
                raise UsageError(
                    f"the labels {other!r} and {label!r} of the question {question.name!r} are the "
                    "same tokens to this model; change one"
                )
