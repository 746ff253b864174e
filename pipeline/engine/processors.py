"""Logits processors of ours that transformers' `generate()` runs behind its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from pipeline.engine.request_logits import Context, adjust
from pipeline.records import SamplingParams


class NoTokenError(Exception):
    """No token can be chosen behind what was `said` of an output."""

    error_type = "NonFiniteLogits"

    def __init__(self, said: Sequence[int], why: str = "the model gave no finite logits") -> None:
        super().__init__(f"{why} at output token {len(said) + 1}")
        self.said = tuple(said)


class ConstraintError(NoTokenError):
    """Since what the answer must be leaves none."""

    error_type = "ConstraintFault"


class FiniteLogits:
    """Ends `generate` where a token would mean nothing."""

    def __init__(self, prompt_length: int) -> None:
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores as they are. Raises NoTokenError."""
        if not scores.max().isfinite():
            raise NoTokenError(input_ids[0, self._prompt_length :].tolist())
        return scores


class AskedLogits:
    """Does what a request asks beside the rules of `generate`."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], eos: Collection[int]) -> None:
        self._params = params
        self._prompt = prompt
        self._eos = eos

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores after it."""
        output: list[int] = input_ids[0, len(self._prompt) :].tolist()
        adjusted = scores.clone()
        adjust(adjusted, [self._params], [Context(self._prompt, output)], self._eos)
        return adjusted
