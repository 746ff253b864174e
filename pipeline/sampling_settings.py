"""What a person can choose about answers: how each token is drawn, how many, and of which form."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from pipeline import constraints
from pipeline.constraint_settings import read_grammar, read_schema
from pipeline.forms import Section, named_values
from pipeline.generation_options import read_generation_options
from pipeline.records import MOST_LOGPROBS, MOST_NEW_TOKENS, MOST_SAMPLES


class SamplingSettings(Section):
    """Defaults for rows without sampling fields; None means: as the model's repository says.

    `top_k` 0 or -1: all tokens. `generation_options`: fields of transformers' `GenerationConfig`
    instead of the model's own, like `{"repetition_penalty": 1.0}`, or of `RequestRules`.
    `json_schema`, `regex`, `grammar`: what each answer must be, as text; the first and the last may
    be files. `thinking_budget`: most tokens of thinking. `logprobs`: of each chosen token and so
    many likeliest ones. `n`: samples of each row.
    """

    max_new_tokens: int | None = Field(default=None, ge=1, le=MOST_NEW_TOKENS)
    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1, le=MOST_NEW_TOKENS)
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    n: int | None = Field(default=None, ge=1, le=MOST_SAMPLES)
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    generation_options: dict[str, Any] = {}
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    thinking_budget: int | None = Field(default=None, ge=0, le=MOST_NEW_TOKENS)

    @field_validator("stop", mode="before")
    @classmethod
    def _texts(cls, value: object) -> object:
        texts = (value,) if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(t, str) and t for t in texts):
            raise ValueError("give a text that is not empty, or a list of them")
        return tuple(texts)

    @field_validator("generation_options", mode="before")
    @classmethod
    def _options(cls, value: object) -> dict[str, Any]:
        return read_generation_options(dict(named_values(value)))

    @field_validator("json_schema", mode="before")
    @classmethod
    def _schema(cls, value: object) -> str | None:
        return None if value is None else read_schema(value)

    @field_validator("grammar", mode="before")
    @classmethod
    def _grammar(cls, value: object) -> str | None:
        return None if value is None else read_grammar(value)

    @field_validator("regex")
    @classmethod
    def _regex(cls, value: str | None) -> str | None:
        return value if value is None or constraints.of_regex(value) else None

    @property
    def constraint(self) -> str:
        """What each answer must be, as one text; empty: anything."""
        if self.json_schema is not None:
            return constraints.of_schema(self.json_schema)
        if self.regex is not None:
            return constraints.of_regex(self.regex)
        return "" if self.grammar is None else constraints.of_grammar(self.grammar)
