"""The next token of rows whose logits go through rules first (`pipeline/generation.py`).

What a request asks beside them comes first (`request_logits.py`). The rules are applied by
transformers' own logits processors, built by the very function that `generate()` builds them with,
so that their meaning and their order are its own. Rows without either are chosen from the logits as
they are, whatever runs beside them.

Most rules look at the tokens so far in their order and run row by row. Those that only ask which
tokens have occurred run for many rows at once; shorter rows are filled up with a token that they
hold anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from pipeline.engine.request_logits import Context, adjust, asks, without_repetition
from pipeline.engine.sampling import Sampled, likeliest_token, sample_next_token
from pipeline.generation import active_rules, read_rules
from pipeline.model.model import LoadedModel
from pipeline.records import SamplingParams
from pipeline.request_rules import read_asked

_ORDER_FREE: Final = {
    "repetition_penalty", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "suppress_tokens", "remove_invalid_values",
}  # fmt: skip
_OF_PROMPT: Final = {"encoder_repetition_penalty", "encoder_no_repeat_ngram_size"}
_MOST_IDS: Final = 1 << 22  # of a rectangle of token ids: 32 MiB

_PLAIN: Final = SamplingParams()


class Sampler:
    """Chooses next tokens for one model."""

    def __init__(
        self, loaded: LoadedModel, likeliest: Callable[[Tensor], Sampled] = likeliest_token
    ) -> None:
        self._model: Any = loaded.model
        self.eos: Final = frozenset(loaded.shape.eos_token_ids)
        self.likeliest: Final = likeliest
        self._processors = lru_cache(maxsize=4096)(self._build)

    def sample(
        self,
        logits: Tensor,
        params: Sequence[SamplingParams],
        keys: NDArray[np.uint64],
        positions: NDArray[np.int64],
        context_of: Callable[[int], Context],
        greedy: Sampled | None = None,
    ) -> Sampled:
        """As `sample_next_token`; `context_of(i)` is asked for the rows i that have rules.

        The others are chosen as if they were alone.
        """
        greedy = greedy or self.likeliest(logits)
        ruled = [row for row, p in enumerate(params) if has_rules(p)]
        if not ruled:
            return sample_next_token(logits, params, keys, positions, greedy)
        scores = logits[ruled].float()  # a copy
        left = self._follow(
            scores, [params[row] for row in ruled], [context_of(row) for row in ruled]
        )
        theirs = sample_next_token(
            scores, left, keys[ruled], positions[ruled], self.likeliest(scores)
        )
        others = list(params)
        for row in ruled:
            others[row] = _PLAIN
        chosen = sample_next_token(logits, others, keys, positions, greedy)
        token_ids, is_finite = chosen.token_ids.copy(), chosen.is_finite.copy()
        token_ids[ruled], is_finite[ruled] = theirs
        return Sampled(token_ids, is_finite)

    def apply_rules(
        self, logits: Tensor, params: Sequence[SamplingParams], context_of: Callable[[int], Context]
    ) -> tuple[Tensor, list[SamplingParams]]:
        """Logits after the rules, and the parameters that are left to be applied.

        logits [rows, V] stay as they are; returns float32 [rows, V], as `generate()` computes.
        """
        ruled = [row for row, p in enumerate(params) if has_rules(p)]
        scores, left = logits.to(torch.float32, copy=True), list(params)
        if ruled:
            some = scores[ruled]
            followed = self._follow(
                some, [params[row] for row in ruled], [context_of(row) for row in ruled]
            )
            scores[ruled] = some
            for row, row_params in zip(ruled, followed, strict=True):
                left[row] = row_params
        return scores, left

    def _follow(
        self, scores: Tensor, params: Sequence[SamplingParams], contexts: Sequence[Context]
    ) -> list[SamplingParams]:
        """Apply the rules of rows that all have some, in place; what is left to be applied."""
        left = []
        if any(map(asks, params)):
            adjust(scores, params, contexts, self.eos)
        together: dict[SamplingParams, list[int]] = {}
        for row, row_params in enumerate(params):
            if asks(row_params):
                row_params = without_repetition(row_params)
            left.append(_without_rules(row_params))
            if not active_rules(row_params.rules):
                continue
            if _is_order_free(row_params):
                together.setdefault(row_params, []).append(row)
            else:
                self._apply([row], row_params, [contexts[row]], scores)
        for row_params, rows in together.items():
            theirs = [contexts[row] for row in rows]
            for few in _rectangles(theirs):
                self._apply([rows[i] for i in few], row_params, [theirs[i] for i in few], scores)
        return left

    def _apply(
        self, rows: list[int], params: SamplingParams, contexts: list[Context], scores: Tensor
    ) -> None:
        prompt = np.asarray(contexts[0][0], np.int64)
        of_prompt = prompt.tobytes() if active_rules(params.rules) & _OF_PROMPT else None
        length = 1 if _is_order_free(params) else len(prompt)  # any number: they do not look
        processors = self._processors(params, length, of_prompt)
        ids = torch.from_numpy(_rectangle(contexts)).to(scores.device)
        indices = torch.tensor(rows, device=scores.device)
        scores[indices] = processors(ids, scores[indices])

    def _build(
        self, params: SamplingParams, prompt_length: int, prompt: bytes | None
    ) -> LogitsProcessorList:
        """The processors of a row; those of `prompt` are built with its ids."""
        device = self._model.device
        config = configured(GenerationConfig(), params, sorted(self.eos))
        config.max_length = prompt_length + params.max_new_tokens
        eos = config.eos_token_id
        config._eos_token_tensor = None if eos is None else torch.tensor(eos, device=device)
        ids = None
        if prompt is not None:
            known = np.frombuffer(prompt, np.int64).copy()
            ids = torch.from_numpy(known).to(device).unsqueeze(0)
        processors: LogitsProcessorList = self._model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=prompt_length,
            encoder_input_ids=ids,
            device=device,
            model_kwargs={},
        )
        return processors


def configured(
    config: GenerationConfig, params: SamplingParams, eos: Sequence[int] | int | None
) -> GenerationConfig:
    """A copy of `config` that asks `generate()` for these parameters; all else stays as it is."""
    ends = [eos] if isinstance(eos, int) else list(eos or ())
    ends = [*([] if params.ignore_eos else ends), *read_asked(params.asked).stop_token_ids]
    config = deepcopy(config)
    config._from_model_config = False
    said: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens,
        "max_length": None,
        "do_sample": not params.is_greedy,
        "temperature": None if params.is_greedy else params.temperature,
        "top_p": None if params.is_greedy else params.top_p,
        "top_k": None if params.is_greedy else params.top_k or 0,
        "eos_token_id": ends or None,
    }
    said |= read_rules(params.rules)
    if said["eos_token_id"] is None:
        said["exponential_decay_length_penalty"] = None  # it favours the end, and there is none
    for name, value in said.items():
        setattr(config, name, value)
    return config


def has_rules(params: SamplingParams) -> bool:
    """Whether a row is chosen from other logits than the model's."""
    return bool(params.rules) and bool(active_rules(params.rules)) or asks(params)


def _is_order_free(params: SamplingParams) -> bool:
    return active_rules(params.rules) <= _ORDER_FREE


@lru_cache(maxsize=4096)
def _without_rules(params: SamplingParams) -> SamplingParams:
    """What is left to do for a row whose rules were applied, and by transformers' own, where it has
    some, temperature, top-k and top-p as well."""
    if params.is_greedy or not active_rules(params.rules):
        return replace(params, rules="", asked="")
    return replace(params, rules="", asked="", temperature=1.0, top_p=1.0, top_k=None)


def _rectangles(contexts: list[Context]) -> list[list[int]]:
    """Places of `contexts`, cut so that no rectangle of their ids grows beyond `_MOST_IDS`."""
    longest = max(len(prompt) + len(output) for prompt, output, _ in contexts)
    most = max(1, _MOST_IDS // longest)
    return [
        list(range(low, min(low + most, len(contexts)))) for low in range(0, len(contexts), most)
    ]


def _rectangle(contexts: list[Context]) -> NDArray[np.int64]:
    """[rows, longest] ids; rows that are shorter begin with their first token again and again."""
    lengths = [len(prompt) + len(output) for prompt, output, _ in contexts]
    ids = np.empty((len(contexts), max(lengths)), np.int64)
    for row, length, (prompt, output, _) in zip(ids, lengths, contexts, strict=True):
        begin = len(row) - length
        row[begin : begin + len(prompt)] = prompt
        row[begin + len(prompt) :] = output
        row[:begin] = row[begin]
    return ids
