"""Questions that are asked of every row, and how they stand around its text. Knows no files.

```
 order  first   instructions │ question │ row's text │ cue       the cue ends in a blank, which
        last    instructions │ row's text │ question │ cue       goes to the label: "Answer:" " yes"
```

In a conversation they stand in its first and last user messages, and the label follows the
generation prompt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

Kind = Literal["choice", "scale", "boolean"]
Order = Literal["first", "last"]
Text = str | list[dict[str, str]]
"""Of a row: a text, or messages."""

MOST_QUESTIONS: Final = 1000
MOST_NAME: Final = 100
_NAME: Final = re.compile(rf"[^\W\d]\w{{0,{MOST_NAME - 1}}}")
_MOST_LABELS: Final = 10_000
_CUE: Final = "Answer: "
_GAP: Final = "\n\n"
_LABELS: Final[dict[Kind, tuple[str, ...]]] = {
    "choice": (),
    "scale": ("1", "2", "3", "4", "5"),
    "boolean": ("yes", "no"),
}


class Question(BaseModel):
    """`text`: what is asked, a template over the row's columns. `labels`: its answers as they are
    scored; of a boolean the first one is true, of a scale each is a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str
    text: str
    kind: Kind
    labels: tuple[str, ...] = ()

    @property
    def values(self) -> tuple[float, ...]:
        """The numbers of a scale."""
        return tuple(map(float, self.labels))

    @property
    def columns(self) -> tuple[str, ...]:
        """What is written of it: the answer first."""
        likeliest = (f"{self.name}_likeliest",) if self.kind == "scale" else ()
        return (self.name, *likeliest, f"{self.name}_probability", f"{self.name}_label_mass")

    def record(self) -> dict[str, Any]:
        """What run.json says of it: no text of a prompt."""
        return {"name": self.name, "kind": self.kind, "labels": list(self.labels)}

    @classmethod
    def recorded(cls, said: Mapping[str, Any]) -> Question:
        """That of a `record`, which was checked; without its text."""
        labels = tuple(said["labels"])
        return cls.model_construct(name=said["name"], text="", kind=said["kind"], labels=labels)

    @field_validator("name")
    @classmethod
    def _names_a_column(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"write letters, digits and _ alone, at most {MOST_NAME}: it is a column's name"
            )
        return name

    @field_validator("text")
    @classmethod
    def _asks_something(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("is empty; say what is asked")
        return check_text(text)

    @field_validator("labels", mode="before")
    @classmethod
    def _are_listed(cls, labels: object) -> object:
        if labels in ("", None):
            return ()
        if not isinstance(labels, list | tuple) or not all(isinstance(t, str) for t in labels):
            raise ValueError("write a list of texts, like [good, bad]")
        return tuple(labels)

    @model_validator(mode="after")
    def _has_answers(self) -> Self:
        labels = self.labels or _LABELS[self.kind]
        object.__setattr__(self, "labels", labels)
        for label in labels:
            check_text(label)
            if not label or label != label.strip():
                raise ValueError(f"the label {label!r} is empty, or begins or ends with a blank")
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"the label {twice!r} is there twice; drop one")
        if self.kind == "boolean" and len(labels) != 2:
            raise ValueError("a boolean has two labels, that of true first, like [yes, no]")
        if len(labels) < 2:
            raise ValueError("give it labels, two at least, like [good, bad]")
        if self.kind == "scale":
            _check_numbers(labels)
        return self


def check_text(text: str) -> str:
    """The text itself. Raises ValueError for half a surrogate pair, which YAML can spell."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half a surrogate pair, which is not text")
    return text


def _check_numbers(labels: tuple[str, ...]) -> None:
    numbers = []
    for label in labels:
        try:
            numbers.append(float(label))
        except ValueError:
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            raise ValueError(f"the label {label!r} of a scale is no number")
    if len(set(numbers)) < len(numbers):
        raise ValueError("two labels of a scale are the same number; drop one")


class Questionnaire(BaseModel):
    """All questions, and what stands around them. `answer`: the cue before a label; None: the usual
    one. `order`: whether a question comes before a row's text. `is_chat`: a row's text becomes a
    user message."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    questions: tuple[Question, ...]
    instructions: str = ""
    answer: str | None = None
    order: Order = "last"
    is_chat: bool = False

    @field_validator("questions", mode="before")
    @classmethod
    def _are_listed(cls, questions: object) -> object:
        if not questions:
            raise ValueError("there are none; list one at least")
        if not isinstance(questions, list | tuple):
            raise ValueError("write a list of questions, each with name, text and kind")
        if len(questions) > MOST_QUESTIONS:
            raise ValueError(f"there are {len(questions):,}; at most {MOST_QUESTIONS:,} work")
        return questions

    @field_validator("instructions", "answer")
    @classmethod
    def _is_text(cls, text: str | None) -> str | None:
        return None if text is None else check_text(text)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        labels = sum(len(question.labels) for question in self.questions)
        if labels > _MOST_LABELS:
            raise ValueError(f"they have {labels:,} labels together; at most {_MOST_LABELS:,} work")
        owner: dict[str, str] = {}
        for question in self.questions:
            if any(question.name == other for other in owner.values()):
                raise ValueError(f"the name {question.name!r} is there twice; change one")
            for column in question.columns:
                other = owner.setdefault(column, question.name)
                if other != question.name:
                    raise ValueError(
                        f"{other!r} and {question.name!r} would both write the column {column!r}; "
                        "change one name"
                    )
        return self

    @property
    def cue(self) -> str:
        """What stands before a label, where no template puts something there."""
        return _CUE if self.answer is None else self.answer

    @property
    def columns(self) -> tuple[str, ...]:
        """What is written of all of them."""
        return tuple(column for question in self.questions for column in question.columns)

    def ordered(self, order: Order) -> Questionnaire:
        """The same, with questions before or behind the row's text."""
        return self.model_copy(update={"order": order})

    def compose(self, content: Text, question: str) -> Text:
        """A row's text with one of the questions, as the model is to see it."""
        if not isinstance(content, str):
            return self._within(content, question)
        parts = (question, content) if self.order == "first" else (content, question)
        text = _GAP.join(part for part in (self.instructions, *parts) if part)
        return text if self.is_chat else f"{text}{_GAP}{self.cue}"

    def _within(self, messages: list[dict[str, str]], question: str) -> list[dict[str, str]]:
        found = [dict(message) for message in messages]
        if self.order == "first":
            _put_first(found, question)
        elif found and found[-1].get("role") == "user":
            found[-1]["content"] = f"{found[-1]['content']}{_GAP}{question}"
        else:
            found.append({"role": "user", "content": question})
        if self.instructions:
            _put_first(found, self.instructions)
        return found


def _put_first(messages: list[dict[str, str]], text: str) -> None:
    """At the beginning of the first message that is not the system's, if that is the user's."""
    at = next((i for i, m in enumerate(messages) if m.get("role") != "system"), len(messages))
    if at < len(messages) and messages[at].get("role") == "user":
        messages[at]["content"] = f"{text}{_GAP}{messages[at]['content']}"
    else:
        messages.insert(at, {"role": "user", "content": text})
