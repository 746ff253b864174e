"""Prompts as the input has them, and rows that have none. Knows nothing of files and token ids."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.questions import Questionnaire

Message = dict[str, str]
"""One turn of a conversation: `{"role": ..., "content": ...}`; `tool_calls` of it are JSON text."""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, or the one message of a user, and what its template is given besides, as a
    JSON object: `tools`, `enable_thinking`, and the like."""

    content: str | list[Message]
    given: str


@dataclass(frozen=True, slots=True)
class SegmentedPrompt:
    """A prompt in segments: what stands before documents, these, and the question. Texts."""

    preamble: str
    documents: tuple[str, ...]
    question: str


@dataclass(frozen=True, slots=True)
class TurnPrompt:
    """What a turn of a conversation asks: a text or new messages alone, without what was said
    before. `is_first`: nothing was."""

    content: str | list[Message]
    is_first: bool


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """A context, and the texts that are scored as what follows it; none: it is scored itself."""

    context: str | list[Message]
    continuations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AskedPrompt:
    """A row's text, and each question of the `sheet` as it is asked about it."""

    content: str | list[Message]
    questions: tuple[str, ...]
    sheet: Questionnaire

    @property
    def prompts(self) -> list[ScoredPrompt]:
        """A context with its labels for each question."""
        pairs = zip(self.questions, self.sheet.questions, strict=True)
        return [
            ScoredPrompt(self.sheet.compose(self.content, text), question.labels)
            for text, question in pairs
        ]


Content = (
    str | list[Message] | ChatPrompt | SegmentedPrompt | TurnPrompt | ScoredPrompt | AskedPrompt
)
"""A prompt as the input has it."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that cannot be run; it is written with `status = error`, never dropped."""

    row_index: int
    error_type: str
    message: str


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Consecutive input rows `[row_start, row_start + len(ids))`, column by column.

    `contents[i]` is the prompt, or None where the row is in `rejected`.
    `overrides[i]` holds the row's own sampling fields (names of `SamplingParams`), empty if none.
    """

    row_start: int
    ids: list[str]
    contents: list[Content | None]
    overrides: list[dict[str, object]]
    tenants: list[str | None]
    rejected: tuple[Rejected, ...] = ()
