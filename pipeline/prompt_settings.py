"""What a person can choose about prompts: what is read, and how it becomes text and tokens."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from pipeline.forms import Section, named_values
from pipeline.template_arguments import read_template_arguments


class ReadSettings(Section):
    """Which rows and columns are read. A column left at None is found by its usual name.

    `template`: a Jinja file that makes the prompt of a row's columns, instead of a ready one.
    `reorder_fields`: list its `fields(...)` in each row in the order in which rows share most.
    `segments_column`: a prompt in parts; `documents_column`: what stands before the prompt.
    `json_schema_column`: what the answer of each row must be.
    """

    prompt_column: str | None = None
    messages_column: str | None = None
    segments_column: str | None = None
    documents_column: str | None = None
    template: Path | None = None
    json_schema_column: str | None = None
    reorder_fields: bool = False
    id_column: str | None = None
    limit: int | None = Field(default=None, ge=1)


class TokenSettings(Section):
    """How a row becomes text, and text token ids.

    `clock`: what a chat template that prints the date or time takes for now, on the wall; None:
    the beginning of the day on which the job begins. `chat_template_kwargs`: what a chat template
    is given besides messages, like `{"enable_thinking": false}`. `reasoning_tags`: around what a
    model thinks before it answers: "auto" (those of its chat template), "none", or two, with a
    comma between.
    """

    system_prompt: str | None = None
    chat_template: Path | None = None
    clock: datetime | None = None
    apply_chat_template: bool = False
    parse_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_tags: str = "auto"

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _arguments(cls, value: object) -> dict[str, Any]:
        return read_template_arguments(dict(named_values(value)))

    @field_validator("reasoning_tags")
    @classmethod
    def _tags(cls, value: str) -> str:
        begin, _, end = value.partition(",")
        if value not in ("auto", "none") and (not begin or not end or "," in end):
            raise ValueError("write it as auto, none, or two tags like <think>,</think>")
        return value

    @property
    def named_tags(self) -> tuple[str, str] | None:
        """The tags around reasoning, where a person names them."""
        begin, comma, end = self.reasoning_tags.partition(",")
        return (begin, end) if comma else None

    @field_validator("clock")
    @classmethod
    def _on_the_wall(cls, value: datetime | None) -> datetime | None:
        return None if value is None else value.replace(tzinfo=None)
