"""What a request asks of its logits, its end and its text beside transformers' rules.

Names, ranges and meaning are those of vLLM's `SamplingParams`, which OpenAI's requests share. A row
carries all of it as one JSON text, `SamplingParams.asked`, so that rows that ask for nothing cost
nothing; the empty text is that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

MOST_LISTED: Final = 65_536
MOST_WORDS: Final = 1_000
"""Token ids, and words, in one field: more would take a row longer than its forward."""


def _no_bool(value: object) -> object:
    """JSON's true is no number, though Python takes it for 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Number = Annotated[float, BeforeValidator(_no_bool)]
TokenId = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, lt=2**31)]
Word = Annotated[str, Field(min_length=1, max_length=10_000)]


class RequestRules(BaseModel):
    """A default changes nothing. `bad_words_ids`: what a tokenizer makes of `bad_words`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    presence_penalty: Annotated[Number, Field(ge=-2.0, le=2.0, allow_inf_nan=False)] = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-2.0, le=2.0, allow_inf_nan=False)] = 0.0
    logit_bias: dict[TokenId, Annotated[Number, Field(ge=-100.0, le=100.0)]] = Field(
        default={}, max_length=MOST_LISTED
    )
    allowed_token_ids: tuple[TokenId, ...] = Field(default=(), max_length=MOST_LISTED)
    bad_words: tuple[Word, ...] = Field(default=(), max_length=MOST_WORDS)
    bad_words_ids: tuple[tuple[TokenId, ...], ...] = ()
    min_tokens: Annotated[int, BeforeValidator(_no_bool), Field(ge=0, lt=2**31)] = 0
    stop_token_ids: tuple[TokenId, ...] = Field(default=(), max_length=MOST_LISTED)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    @field_validator("allowed_token_ids")
    @classmethod
    def _allow_some(cls, ids: tuple[TokenId, ...]) -> tuple[TokenId, ...]:
        if not ids:
            raise ValueError("allows no token at all; leave it out")
        return ids

    @property
    def changes_logits(self) -> bool:
        """Whether another token may be chosen by it."""
        return bool(
            self.presence_penalty or self.frequency_penalty or self.logit_bias
            or self.allowed_token_ids or self.bad_words_ids or self.min_tokens
        )  # fmt: skip

    @property
    def counts_tokens(self) -> bool:
        """Whether it depends on how often tokens have occurred."""
        return bool(self.presence_penalty or self.frequency_penalty)

    @property
    def shows_otherwise(self) -> bool:
        """Whether its text is not that of any other answer with the same ids."""
        return bool(
            self.stop_token_ids or self.min_tokens
            or self.include_stop_str_in_output or not self.skip_special_tokens
        )  # fmt: skip

    def token_ids(self) -> dict[str, int]:
        """The largest token id of each field that names some."""
        named = {
            "logit_bias": self.logit_bias,
            "allowed_token_ids": self.allowed_token_ids,
            "stop_token_ids": self.stop_token_ids,
        }
        return {name: max(ids) for name, ids in named.items() if ids}


NOTHING: Final = RequestRules()
REQUEST_RULES: Final = tuple(name for name in RequestRules.model_fields if name != "bad_words_ids")
"""Fields of a request; the other one is made of them."""


def write_asked(fields: Mapping[str, Any]) -> str:
    """The canonical text of these fields; null is "not said". Raises ValueError in one sentence."""
    said = {name: value for name, value in fields.items() if value is not None}
    try:
        rules = RequestRules.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{first['loc'][0]}: {reason[:1].lower()}{reason[1:]}") from None
    told = rules.model_dump(mode="json", exclude_defaults=True)
    return json.dumps(told, sort_keys=True) if told else ""


@lru_cache(maxsize=4096)
def read_asked(asked: str) -> RequestRules:
    """The inverse of `write_asked`."""
    return RequestRules.model_validate_json(asked) if asked else NOTHING


def with_bad_words(asked: str, ids: tuple[tuple[int, ...], ...]) -> str:
    """The same, its bad words as token ids."""
    return write_asked(read_asked(asked).model_dump(exclude_defaults=True) | {"bad_words_ids": ids})
