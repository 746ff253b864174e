"""Generation arguments of a task as sampling parameters; what we cannot do is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from pipeline.errors import UsageError
from pipeline.forms import unknown_name
from pipeline.generation import REFUSED, ROW_RULES, resolve_sampling
from pipeline.records import SamplingParams
from pipeline.sampling_settings import SamplingSettings

_SAMPLED: Final = ("top_p", "top_k", "seed", "min_p", "typical_p", "top_h", "epsilon_cutoff",
                   "eta_cutoff")  # fmt: skip
"""They choose among tokens, and mean nothing to greedy decoding."""
_KNOWN: Final = {*_SAMPLED, *ROW_RULES}
_HARNESS: Final = ("until", "max_gen_toks", "do_sample", "temperature")


class GenerationReader:
    """`model`: fields of its generation_config. `eos`: the text that ends a text."""

    def __init__(
        self,
        model: Mapping[str, Any],
        eos: str | None,
        max_length: int,
        max_gen_toks: int,
        seed: int,
    ) -> None:
        self._model = dict(model)
        self._eos = eos
        self._max_length = max_length
        self._max_gen_toks = max_gen_toks
        self._settings = SamplingSettings(seed=seed)
        self._read: dict[str, tuple[SamplingParams, list[str]]] = {}

    def read(self, said: Mapping[str, Any]) -> tuple[SamplingParams, list[str]]:
        """The parameters, and the texts of which the first that comes ends the answer.

        Raises UsageError for what is unknown, out of range, or leaves no room for a context.
        """
        key = repr(said)
        if key not in self._read:
            self._read[key] = self._read_new(said)
        return self._read[key]

    def _read_new(self, said: Mapping[str, Any]) -> tuple[SamplingParams, list[str]]:
        given = dict(normalize_gen_kwargs(dict(said), self._max_gen_toks))
        until = handle_stop_sequences(given.pop("until"), self._eos)
        length = given.pop("max_gen_toks")
        is_sampled = given.pop("do_sample")
        temperature = given.pop("temperature", 0.0)
        rest = {name: v for name, v in given.items() if v not in REFUSED.get(name, ())}
        for name in rest.keys() - _KNOWN:
            raise UsageError(f"generation arguments: {say_unknown(name, {*_KNOWN, *_HARNESS})}")
        if length >= self._max_length:
            raise UsageError(
                f"max_gen_toks is {length}, and the model sees {self._max_length} tokens: no "
                "context would be left; say less"
            )
        if not is_sampled:
            rest = {name: value for name, value in rest.items() if name not in _SAMPLED}
        chosen = rest | {
            "max_new_tokens": length,
            "temperature": temperature if is_sampled else 0.0,
            "stop": until,
        }
        try:
            return resolve_sampling(self._settings, self._model, chosen), until
        except ValueError as error:
            raise UsageError(f"generation arguments: {error}") from error


def say_unknown(name: str, known: Iterable[str]) -> str:
    """What to say of an argument that nobody knows, in the harness's way of spelling."""
    return unknown_name(name, known, "docs/evaluation.md lists them").replace("-", "_")
