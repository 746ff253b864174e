"""The model `coppice` of lm-evaluation-harness: its three kinds of request by our engine.

What a request becomes is decided by the harness's own rules, those of its `hf` model: they are
called, not written again. Every call is one plan over all its requests, whatever their tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import postprocess_generated_text, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from kvcoppice.evaluation.evaluator import Evaluator, Prompt, Request, number_draws
from kvcoppice.evaluation.generation import GenerationReader, say_unknown
from kvcoppice.evaluation.kept_results import KeptResults
from kvcoppice.evaluation.texts import Texts, portions
from pipeline.engine.base import TokenIds
from pipeline.errors import UsageError
from pipeline.job.answers import stop_check
from pipeline.job.observer import Observer
from pipeline.model.device import choose_device
from pipeline.model.identity import describe_versions, identify_model
from pipeline.model.shape import read_config, read_shape
from pipeline.settings import EngineSettings, JobSettings, ModelSettings
from pipeline.tokens.answer_text import AnswerText
from pipeline.tokens.loading import load_tokenizer

_logger = logging.getLogger("lm_eval.coppice")
_SETTINGS: Final = {*ModelSettings.model_fields, *EngineSettings.model_fields} - {
    "model", "engine", "engine_options",
}  # fmt: skip
Result = TypeVar("Result")


@register_model("coppice")
class CoppiceLM(TemplateLM):  # type: ignore[misc]
    """See docs/evaluation.md. Raises UsageError and its kin for what cannot be evaluated."""

    backend = "causal"

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        *,
        batch_size: object = None,
        max_batch_size: object = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
        **settings: Any,
    ) -> None:
        """`pretrained`: a folder or a hub id. `cache_dir`: a folder in which results are kept, so
        that an evaluation that was killed goes on. `settings`: of model and engine, as of
        `coppice run`, with `_` for `-`."""
        super().__init__()
        own = ("max_length", "max_gen_toks", "cache_dir", "seed", "add_bos_token")
        for name in settings.keys() - _SETTINGS:
            raise UsageError(f"model_args: {say_unknown(name, {*_SETTINGS, *own})}")
        if batch_size is not None or max_batch_size is not None:
            _logger.info("batch_size changes nothing: all requests of a call are one plan")
        job = JobSettings.from_flat({**settings, "model": str(pretrained), "revision": revision})
        self.tokenizer = load_tokenizer(job.model.model, revision)
        self._texts = Texts(self.tokenizer, add_bos_token, prefix_token_id)
        self._shape = read_shape(job.model.model, revision)
        config = read_config(job.model.model, revision)
        self.max_length: Final = int(max_length or resolve_max_length(config, self.tokenizer))
        eos = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        self._generation = GenerationReader(
            self._shape.generation_config, eos, self.max_length, int(max_gen_toks), seed
        )
        self._template_args = chat_template_args or {}
        self._has_stopped = stop_check(AnswerText(self.tokenizer.backend_tokenizer))
        self._known: dict[str, Any] = {}
        self._job = job
        kept = None if cache_dir is None else KeptResults(Path(cache_dir), self._identity())
        self.evaluator: Final = Evaluator(job, _Log(), kept)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding says it) of each continuation."""
        asked = []
        for some in portions([request.args for request in requests]):
            # What `_encode_pair` asks for one by one: blanks go over to the continuation.
            texts = [text for pair in some for text in (pair[0].rstrip(), "".join(pair))]
            with self._knowing(texts):
                asked += [(pair, *self._encode_request(*pair)) for pair in some]
        for request, (_, _, continuation) in zip(requests, asked, strict=True):
            if not 0 < len(continuation) <= self.max_length:
                raise UsageError(
                    f"task {request.task_name}, document {request.doc_id}: a continuation of "
                    f"{len(continuation)} tokens cannot be scored; it must have 1 to max_length, "
                    f"which is {self.max_length}"
                )
        return self._loglikelihood_tokens(asked, disable_tqdm)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text, in windows of `max_length`, each token scored once."""
        windows: list[tuple[int, Any]] = []
        texts = [request.args[0] for request in requests]
        known = self._texts.encode(texts)
        for number, text in enumerate(texts):
            ids, prefix = known[text].tolist(), self._texts.prefix.tolist()[0]
            cut = get_rolling_token_windows(ids, prefix, self.max_length, 1)
            windows += [(number, (None, *make_disjoint_window(pair))) for pair in cut]
        scored = self._loglikelihood_tokens([window for _, window in windows], disable_tqdm)
        totals = [0.0] * len(texts)
        for (number, _), (logprob, _) in zip(windows, scored, strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of its stop strings."""
        prompts, stops = [], []
        for some in portions([request.args for request in requests]):
            known = self._texts.encode_prompts(context for context, _ in some)
            for context, said in some:
                params, until = self._generation.read(said)
                ids = known[context] if len(known[context]) else self._texts.prefix
                prompts.append(Prompt(ids[params.max_new_tokens - self.max_length :], params))
                stops.append(until)
        texts = [""] * len(requests)
        size = self._shape.vocabulary_size
        found = self.evaluator.answers(number_draws(prompts), size, self._is_stopped)
        for number, answer in self._watch(found, len(requests), disable_tqdm):
            text = self.tok_decode(answer)
            texts[number] = postprocess_generated_text(text, stops[number], None)
            self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
        return texts

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Any:
        """Ids of a text; None: with what the tokenizer adds, unless that stands there already."""
        if add_special_tokens is None and string in self._known:
            return self._known[string]
        return self._texts.encode([string], add_special_tokens)[string].tolist()

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the text that the model sees; without its system message where the
        template refuses that."""
        arguments = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            **self._template_args,
        }
        render = self.tokenizer.apply_chat_template
        try:
            text: str = render(chat_history, **arguments)
        except TemplateError:
            _logger.warning("the chat template refuses the system message; it is left out")
            others = [message for message in chat_history if message["role"] != "system"]
            text = render(others, **arguments)
        return text

    @property
    def eot_token_id(self) -> Any:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> Any:
        """The token that stands for a missing context."""
        return self._texts.prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        """Names the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results beside the scores."""
        return {
            "model_dtype": self._job.model.dtype,
            "model_revision": self._job.model.revision,
            "coppice": describe_versions(),
            "coppice_notes": self.evaluator.engine.notes,
        }

    @contextmanager
    def _knowing(self, texts: Iterable[str]) -> Iterator[None]:
        """What `tok_encode` is asked for meanwhile, all at once."""
        self._known = self._texts.encode(texts)
        try:
            yield
        finally:
            self._known = {}

    def _encode_request(self, context: str, continuation: str) -> tuple[Any, Any]:
        """Ids of context and continuation, as `TemplateLM.loglikelihood` has it; a context of
        blanks, which it refuses, is none."""
        if context == "":
            ids = self.tok_encode(continuation, add_special_tokens=False)
            if ids and ids[0] == self.prefix_token_id:
                return ids[:1], ids[1:]
            return self._texts.prefix, ids
        before, after = self._encode_pair(context, continuation)
        return (before if len(before) else self._texts.prefix), after

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Of (texts or None, ids of the context, of the continuation), as any model of the harness
        has it: what is too long loses the beginning of its context."""
        asked, num_cut = [], 0
        for _texts, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            num_cut += len(context) > room
            asked.append(Request(_tokens(context[-room:]), _tokens(continuation)))
        if num_cut:
            _logger.warning(
                "%d of %d requests are longer than max_length, which is %d, and lose the beginning "
                "of their contexts; they share less then",
                num_cut, len(requests), self.max_length,
            )  # fmt: skip
        results = [(0.0, False)] * len(asked)
        found = self.evaluator.scores(asked, self._shape.vocabulary_size)
        for number, scored in self._watch(found, len(asked), disable_tqdm):
            results[number] = sum(scored.logprobs), scored.is_greedy
            texts = requests[number][0]
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, results[number])
        return results

    def _watch(self, found: Iterator[Result], total: int, is_silent: bool) -> Iterator[Result]:
        yield from tqdm(found, total=total, disable=is_silent, desc="coppice")
        _logger.info("%s", self.evaluator.counts)

    def _is_stopped(
        self, token_ids: Sequence[int], stop: tuple[str, ...], prompt: TokenIds
    ) -> bool:
        """A stop string begins in what is generated: the harness knows no other."""
        return self._has_stopped(token_ids, stop, ())

    def _identity(self) -> dict[str, Any]:
        """What decides a result besides its ids and how they are continued."""
        model, engine = self._job.model, self._job.engine
        return {
            **identify_model(model),
            **model.model_dump(include={"dtype", "weights"}),
            "device": choose_device(model.device).type,
            **engine.model_dump(include={"fidelity", "kernels"}),
            **describe_versions(),
        }


def _tokens(ids: Any) -> Any:
    return np.asarray(ids, np.uint32)


class _Log(Observer):
    """Hears of waiting for the device, and what the engine notes."""

    def say(self, line: str) -> None:
        _logger.info("%s", line)
