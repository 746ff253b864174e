"""The honest baseline: full prefill, batch of one, plain `generate`, nothing shared.

Slow on purpose. It answers for the audit and stands beside the prefix engine in every benchmark.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from pipeline.engine import guides
from pipeline.engine.base import (
    EngineCapabilities,
    EngineHooks,
    Grammars,
    Indices,
    LocalEngine,
    Replay,
    RunControl,
)
from pipeline.engine.completions import with_scores
from pipeline.engine.ends import ends_by_text, ends_by_token
from pipeline.engine.greedy_writer import GreedyWriter
from pipeline.engine.guides import NO_TOKEN, mask_answer
from pipeline.engine.logprobs import read_logprobs
from pipeline.engine.naive_replay import greedy_replay, sampled_replay
from pipeline.engine.naive_scores import score_sequence
from pipeline.engine.processors import (
    AskedLogits,
    ConstraintError,
    FiniteLogits,
    NoTokenError,
)
from pipeline.engine.request_logits import Context, TokenCounts, asks, without_repetition
from pipeline.engine.resent import RESENT_NOTE, Turn, answer_in_order
from pipeline.engine.sampler import Sampler, configured
from pipeline.engine.threads import Threads
from pipeline.model.model import LoadedModel, use_own_attention
from pipeline.plan.plan import Plan
from pipeline.records import Completion, FinishReason, SamplingParams, Timing, TokenLogprobs
from pipeline.settings import EngineSettings


class NaiveEngine(LocalEngine):
    """`Engine` and `Baseline` at once, with transformers' own attention and cache."""

    name = "naive"
    capabilities = EngineCapabilities(
        carries_conversations=True, reads_scores=True, guides=True, gives_logprobs=True
    )

    def __init__(
        self,
        loaded: LoadedModel,
        notes: Sequence[str] = (),
        settings: EngineSettings | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """`notes`: why this engine runs, where another one was asked for. `settings` None: with as
        many threads as there are. `grammars`: for what is asked of it as a baseline."""
        super().__init__(notes)
        self._threads = None if settings is None else Threads.chosen(settings, loaded.device)
        self.loaded: Final = loaded
        self._eos = frozenset(loaded.shape.eos_token_ids)
        self._sampler = Sampler(loaded)
        self._grammars = grammars

    def _completions(
        self, plan: Plan, sequences: Indices, control: RunControl, hooks: EngineHooks
    ) -> Iterator[Completion]:
        """One turn after the other; each prompt is computed in full, with all that was said."""
        start = time.perf_counter()
        if plan.scores is not None:
            return answer_in_order(
                plan, sequences, control, hooks, lambda turn: self._score(plan, turn, start)
            )
        if plan.conversations is not None and RESENT_NOTE not in self.notes:
            self.notes.append(RESENT_NOTE)
        return answer_in_order(
            plan, sequences, control, hooks, lambda turn: self._complete(turn, control, start)
        )

    def _complete(self, turn: Turn, control: RunControl, start: float) -> Completion:
        counters, prompt, begin = self.counters, turn.prompt, time.perf_counter()
        error_type = message = None
        logprobs: tuple[TokenLogprobs, ...] = ()
        try:
            token_ids, reason = self._answer(prompt, turn.params, turn.noise_key, control)
            logprobs = self._logprobs(prompt, token_ids, turn.params)
        except NoTokenError as error:
            token_ids, reason = (), "error"
            error_type, message = error.error_type, str(error)
        end = time.perf_counter()
        counters.prefilled_tokens += len(prompt)
        counters.generated_tokens += len(token_ids)
        counters.num_forwards += len(token_ids)
        counters.decode_s += end - begin
        counters.busy_s += end - begin
        counters.span_s = end - start
        kv_tokens = len(prompt) + len(token_ids)
        kv_bytes = kv_tokens * self.loaded.shape.kv_bytes_per_token(self._dtype)
        counters.peak_kv_bytes = max(counters.peak_kv_bytes, kv_bytes)
        timing = Timing(
            queue_s=begin - start, decode_s=end - begin, ttft_s=end - start, latency_s=end - start
        )
        return Completion(
            turn.sequence, token_ids, reason, 0, timing, error_type, message, logprobs=logprobs
        )

    def _logprobs(
        self, prompt: list[int], token_ids: Sequence[int], params: SamplingParams
    ) -> tuple[TokenLogprobs, ...]:
        """Of an answer, by one more prefill of all of it."""
        if params.logprobs is None:
            return ()
        logits = self.forced_logits(prompt, token_ids)
        return tuple(read_logprobs(logits, token_ids, [params.logprobs] * len(token_ids)))

    def _score(self, plan: Plan, turn: Turn, start: float) -> Completion:
        begin = time.perf_counter()
        scores = score_sequence(self.forced_logits, plan, turn.sequence, turn.prompt)
        end, counters = time.perf_counter(), self.counters
        counters.prefilled_tokens += len(turn.prompt)
        counters.num_forwards += 1
        counters.prefill_s += end - begin
        counters.busy_s += end - begin
        counters.span_s = end - start
        timing = Timing(
            queue_s=begin - start, prefill_s=end - begin, ttft_s=end - start, latency_s=end - start
        )
        return with_scores(Completion(turn.sequence, (), "length", 0, timing), scores)

    def generate_one(self, prompt: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        control, blind = RunControl(grammars=self._grammars), replace(params, stop=())
        try:
            if params.is_guided:
                return self._step_by_step([*prompt], blind, 0, control)[0]
            return self._generate(prompt, params, [])
        except NoTokenError as error:  # after another token than ours, perhaps
            return error.said

    def writer(self, prompt: Sequence[int], params: SamplingParams) -> GreedyWriter:
        """Of a baseline that makes its logits otherwise."""
        return GreedyWriter(self._sampler, self._grammars, params, prompt)

    def _generate(
        self, prompt: Sequence[int], params: SamplingParams, processors: Sequence[Any]
    ) -> tuple[int, ...]:
        self._make_ready()
        if asks(params):
            processors = [AskedLogits(params, prompt, self._eos), *processors]
            params = without_repetition(params)
        model, ids = self.loaded.model, torch.tensor([prompt], device=self.loaded.device)
        own = model.generation_config
        # Whatever the parameters do not speak of stays the model's own: a field of it that we
        # know nothing of shall be seen here.
        model.generation_config = configured(own, params, own.eos_token_id)
        model.generation_config.stop_strings = None
        model.generation_config.pad_token_id = 0
        try:
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a least length beyond the most, and the like
                output: Tensor = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    logits_processor=LogitsProcessorList(processors),
                )
        finally:
            model.generation_config = own
        return tuple(output[0, len(prompt) :].tolist())

    def replay(
        self, prompt: Sequence[int], output: Sequence[int], params: SamplingParams, noise_key: int
    ) -> Replay:
        return self.judge(self.forced_logits(prompt, output), prompt, output, params, noise_key)

    def judge(
        self,
        logits: Tensor,
        prompt: Sequence[int],
        output: Sequence[int],
        params: SamplingParams,
        noise_key: int,
    ) -> Replay:
        """As `replay`, of logits [n, V] that choose each of `output`."""
        positions = np.arange(len(output))
        keys = np.full(len(output), noise_key, np.uint64)
        rows = [params] * len(output)
        logits = mask_answer(logits, self._grammars, params, (prompt, output), self._eos)
        logits, rows = self._sampler.apply_rules(
            logits, rows, lambda i: Context(prompt, output[:i])
        )
        predicted = self._sampler.sample(
            logits, rows, keys, positions, lambda i: Context(prompt, ())
        )
        params = rows[0] if rows else params
        if params.is_greedy:
            return greedy_replay(logits.double(), output, predicted.token_ids)
        return sampled_replay(logits.double(), output, params, keys, predicted.token_ids)

    def forced_logits(self, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
        """One full prefill: the logits that choose each of `output`, [n, V], model's dtype."""
        self._make_ready()
        ids = torch.tensor([[*prompt, *output[:-1]]], device=self.loaded.device)
        keep = torch.arange(len(prompt) - 1, ids.shape[1], device=ids.device)
        with torch.inference_mode():
            logits: Tensor = self.loaded.model(ids, use_cache=False, logits_to_keep=keep).logits[0]
        return logits

    def _answer(
        self, prompt: list[int], params: SamplingParams, noise_key: int, control: RunControl
    ) -> tuple[tuple[int, ...], FinishReason]:
        is_over = False
        if params.is_greedy and not params.stop and not params.is_guided:
            token_ids = self._generate(prompt, params, [FiniteLogits(len(prompt))])
        else:
            token_ids, is_over = self._step_by_step(prompt, params, noise_key, control)
        ended = is_over or ends_by_token(token_ids[-1], params, self._eos)
        stopped = ended or ends_by_text(control.is_stopped, token_ids, params, prompt)
        return token_ids, "stop" if stopped else "length"

    @torch.inference_mode()
    def _step_by_step(
        self, prompt: list[int], params: SamplingParams, noise_key: int, control: RunControl
    ) -> tuple[tuple[int, ...], bool]:
        """Sampling with our noise, stop strings or constraints: `generate`'s loop with its own
        cache. The tokens, and whether they are a complete answer by their constraint."""
        key, opening = np.array([noise_key], np.uint64), params.opening
        token_ids: list[int] = []
        fed, cache, counts = prompt, None, TokenCounts()
        own = prompt[: len(prompt) - len(opening)]
        guide = guides.open(control.grammars, params, prompt, self._eos)

        def context(_: int) -> Context:
            return Context(own, [*opening, *token_ids], counts)

        while len(token_ids) < params.max_new_tokens:
            self._make_ready()
            ids = torch.tensor([fed], device=self.loaded.device)
            step = self.loaded.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, position = step.past_key_values, np.array([len(opening) + len(token_ids)])
            logits = step.logits[0].float()
            is_sound = bool(logits.max().isfinite())
            guides.rule_out(logits, guide)
            chosen = self._sampler.sample(logits, [params], key, position, context)
            if not chosen.is_finite[0]:
                is_form = guide is not None and is_sound
                raise ConstraintError(token_ids, NO_TOKEN) if is_form else NoTokenError(token_ids)
            token_ids.append(int(chosen.token_ids[0]))
            fed = token_ids[-1:]
            if guide is not None:
                guides.advance(control.grammars, guide, fed[0])
                if guide.fault is not None:
                    raise ConstraintError(token_ids[:-1], guide.fault)
            if ends_by_token(token_ids[-1], params, self._eos):
                break
            if guide is not None and guide.is_over:
                return tuple(token_ids), True
            if ends_by_text(control.is_stopped, token_ids, params, prompt):
                break
        return tuple(token_ids), False

    def _make_ready(self) -> None:
        """Before a forward: the model object may have served the prefix engine before."""
        if self._threads is not None:
            self._threads.adapt()
        use_own_attention(self.loaded.model)

    @property
    def _dtype(self) -> str:
        return str(self.loaded.model.dtype).removeprefix("torch.")
