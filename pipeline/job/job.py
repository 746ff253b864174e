"""One job, opened: its input, its tokenizer and which model it is. Reads rows to order fields only.

It is opened once and passed on, and says whether its files are still those that were opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import CoppiceError
from pipeline.generation import PLAIN, RULES, resolve_sampling
from pipeline.inputs.input_files import InputFile, Stamps, stamp_input
from pipeline.inputs.parquet_copies import ParquetCopies
from pipeline.inputs.prompt_source import PromptSource, open_source
from pipeline.job.answer_texts import Said, decode_answers
from pipeline.job.asking import ask
from pipeline.job.eviction_budget import check_eviction, eviction_of
from pipeline.job.field_ordering import FieldSaving, order_fields
from pipeline.job.job_checks import (
    check_constraint,
    check_documents,
    check_generation,
    check_overlong,
)
from pipeline.job.prepare import Limits, Preparation, Preparing
from pipeline.job.prepare_scores import ScorePreparation
from pipeline.job.question_ordering import QuestionSaving, question_figures
from pipeline.job.request_limits import RequestLimits
from pipeline.location import Location
from pipeline.model.adapter import Adapter, adapter_of, reuse_of
from pipeline.model.folder import check_model_folder, find_model_folder
from pipeline.model.hub import check_model_exists
from pipeline.model.identity import describe_versions, fingerprint_fields, identify_model
from pipeline.model.machine import cache_folder
from pipeline.plan.conversations import Eviction
from pipeline.plan.documents import MOST_LINKED, Reuse
from pipeline.settings import JobSettings, ModelSettings
from pipeline.tokens.constraint_check import ConstraintChecker
from pipeline.tokens.reasoning import AnswerParts, ReasoningTags
from pipeline.tokens.tokenizer import PromptTokenizer
from pipeline.tokens.turns import LaterTurns

if TYPE_CHECKING:
    from pipeline.model.shape import ModelShape


@dataclass(frozen=True, eq=False)
class Job:
    """An opened job: input, tokenizer and the model's shape (None only for the echo engine).

    `input`: as a person named it. The clock in `settings` is the tokenizer's: None where nothing
    depends on it. `fields`: what the order of the template's fields saves, where it was asked for.
    `asking`: what the order of questions saves, where it was left to be chosen. `stamps`: of the
    files of model and templates, from before they were read. `reasoning`: the tags around what the
    model thinks before it answers, None where nobody tells it apart.
    """

    input: str
    settings: JobSettings
    source: PromptSource
    tokenizer: PromptTokenizer
    shape: ModelShape | None
    fields: FieldSaving | None
    stamps: Stamps
    asking: QuestionSaving | None = None
    reasoning: ReasoningTags | None = None

    def is_current(self) -> bool:
        """Whether opening it again would read the same files: none is new, gone or changed."""
        try:
            found = stamp_input(Location(self.input, self.settings.store))
            return found == self.source.stamps and _stamp_files(self.settings) == self.stamps
        except (CoppiceError, OSError):
            return False

    @cached_property
    def model_identity(self) -> dict[str, Any]:
        """Which model it is, as of `identify_model`, which reads its files: once for a job."""
        return identify_model(self.settings.model)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """All that decides the text of the answers; reads every byte of the input, once."""
        hashes = {"input": self.source.fingerprint(), "tokenizer": self.tokenizer.fingerprint}
        if self.adapter is not None:
            hashes["adapter"] = self.adapter.digest
        fields = fingerprint_fields(self.settings, self.model_identity, hashes, self.rules)
        tags = {} if self.reasoning is None else {"reasoning_tags": list(self.reasoning.names)}
        return fields | tags

    @cached_property
    def adapter(self) -> Adapter | None:
        """The trained tokens around documents, where the settings name some. Raises ModelError."""
        if self.shape is None:
            return None
        return adapter_of(self.settings.reuse, self.model_identity, self.shape.hidden_size)

    @property
    def generation_config(self) -> dict[str, Any]:
        """Generation defaults of the model's repository."""
        return {} if self.shape is None else self.shape.generation_config

    def describe_generation(self) -> str:
        """Those defaults in one line for a person, and the clock where prompts depend on it."""
        clock = self.settings.tokens.clock
        now = "" if clock is None else f"; its chat template takes {clock} for now"
        own = self.generation_config
        said = {name: own[name] for name in own if name in PLAIN}
        said |= {name: own[name] for name in RULES if own.get(name) is not None}
        shown = ", ".join(f"{name}={value}" for name, value in said.items())
        return f"generation defaults of the model: {shown or 'none'}{now}"

    def describe(self) -> list[str]:
        """What a person should know before it runs, a line each."""
        ordered = (
            "the documents of each row stand in the order in which rows share most, not as given"
        )
        is_ordered = self.settings.reuse.document_order == "best"
        lines = [self.describe_generation(), *self.source.columns.describe()]
        if said := self.question_figures.get("text"):
            lines.append(said)
        return [*lines, ordered] if is_ordered else lines

    @property
    def question_figures(self) -> dict[str, Any]:
        """What a plan says of questions; nothing where none are asked."""
        order = self.settings.scoring.question_order
        return question_figures(self.source.columns.questions, order, self.asking)

    @property
    def rules(self) -> str:
        """What the logits of rows without fields of their own go through."""
        return resolve_sampling(self.settings.sampling, self.generation_config, {}).rules

    def decode(self, said: Sequence[Said]) -> list[AnswerParts]:
        """The text of each answer as its row wants it, apart from what was thought before it."""
        eos = () if self.shape is None else self.shape.eos_token_ids
        return decode_answers(self.tokenizer.answers, self.reasoning, said, eos)

    def preparation(self) -> Preparing:
        """The rules by which this job's rows become token ids and parameters."""
        context = None if self.shape is None else self.shape.context_length
        reuse = self.reuse
        limits = Limits(
            context,
            self.settings.plan.on_overlong,
            self.settings.model.engine,
            MOST_LINKED if reuse is not None and reuse.mode == "kvlink" else None,
            0 if reuse is None else reuse.soft_tokens_per_document,
            self.source.columns.has_segments,
            self.source.turns is not None,
            RequestLimits.of(self.settings, self.shape, self.source.columns),
        )
        if self.source.columns.scored is not None:
            return ScorePreparation(self.tokenizer, limits)
        return Preparation(
            self.tokenizer,
            self.settings.sampling,
            self.generation_config,
            limits,
            self.checker,
        )

    @cached_property
    def checker(self) -> ConstraintChecker:
        """Of what answers must be; one process for all rows."""
        return ConstraintChecker(lambda: self.tokenizer.grammars)

    @property
    def reuse(self) -> Reuse | None:
        """How documents are reused at any position; None: whole prompts share their beginnings."""
        if self.shape is None:
            return None
        return reuse_of(self.settings.reuse, self.shape.vocabulary_size, self.adapter)

    @property
    def later_turns(self) -> LaterTurns | None:
        """How a template writes turns of conversations; None: each adds its text alone, if any."""
        return self.tokenizer.later_turns(self.source.columns.messages is not None)

    @property
    def eviction(self) -> Eviction | None:
        """What becomes of histories that do not fit; None: rows are no turns."""
        if self.source.columns.conversation is None:
            return None
        return eviction_of(self.settings, self.shape)

    def key(self) -> str:
        """Stands for all that the prepared rows depend on."""
        settings = self.settings
        template = settings.read.template
        parts = (
            self.source.fingerprint(), self.source.labels, self.tokenizer.fingerprint,
            settings.read, settings.tokens, settings.sampling, settings.plan.on_overlong,
            self.source.columns, self.reuse, settings.scoring,
            self.generation_config, None if self.shape is None else self.shape.context_length,
            None if template is None else template.read_bytes(), describe_versions(),
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def open_job(input: str, settings: JobSettings) -> Job:
    """Open input, tokenizer and model config.

    Raises InputError, ModelError, UsageError, and StorageError if JSON lines cannot be kept.
    """
    model = settings.model
    check_model_exists(model)
    stamps = _stamp_files(settings)
    copies = ParquetCopies(cache_folder() / "inputs")
    location, reuse = Location(input, settings.store), settings.reuse
    source = open_source(
        location,
        settings.read,
        copies,
        reuse.asks_for_documents,
        settings.conversations,
        settings.scoring,
    )
    check_overlong(source.columns, settings)
    check_model_folder(model)
    tokenizer = PromptTokenizer.load(model.model, model.revision, settings.tokens)
    tokenizer.check_fits(are_messages=source.columns.messages is not None)
    clocked = settings.tokens.model_copy(update={"clock": tokenizer.clock})
    settings = settings.model_copy(update={"tokens": clocked})
    reasoning, source = _find_parts_of_answers(tokenizer, source, settings)
    shape = _read_shape(model)
    if shape is not None:
        check_generation(settings, shape)
    fields = None
    if settings.read.reorder_fields:
        order, fields = order_fields(source, settings.plan.plan_memory, is_applied=True)
        source = source.with_field_order(order)
    asking = None
    if source.columns.questions:
        source, asking = ask(source, settings, tokenizer)
    if asking is not None:
        scoring = settings.scoring.model_copy(update={"question_order": asking.order})
        settings = settings.model_copy(update={"scoring": scoring})
    job = Job(input, settings, source, tokenizer, shape, fields, stamps, asking, reasoning)
    check_documents(settings, job.reuse, shape)  # reads the adapter, which may not fit
    check_constraint(settings, tokenizer, job.checker)
    if source.columns.conversation is None:
        return job
    if job.later_turns is not None:
        job.later_turns.check()
    check_eviction(settings, shape, tokenizer)
    return replace(job, source=source.with_turns())


def _find_parts_of_answers(
    tokenizer: PromptTokenizer, source: PromptSource, settings: JobSettings
) -> tuple[ReasoningTags | None, PromptSource]:
    """What answers say besides their text, and the source whose rows have columns of it."""
    columns = source.columns
    if columns.scored is not None:
        return None, source
    reasoning = tokenizer.find_reasoning(columns.messages is not None)
    is_chat = columns.messages is not None or settings.tokens.apply_chat_template
    calls = columns.names_tools and is_chat and tokenizer.tool_calls is not None
    return reasoning, source.with_answers(reasoning is not None, calls)


def _stamp_files(settings: JobSettings) -> Stamps:
    """Of the files of the model, of an adapter, of templates and questions, by path."""
    folder = find_model_folder(settings.model)
    named = (settings.read.template, settings.tokens.chat_template, settings.scoring.questions)
    folders = filter(None, (folder, settings.reuse.adapter))
    paths = [*filter(None, named), *(path for some in folders for path in some.rglob("*"))]
    return {str(path): InputFile.local(path).stamp() for path in paths if path.is_file()}


def _read_shape(settings: ModelSettings) -> ModelShape | None:
    folder = Path(settings.model)
    if settings.engine == "echo" and folder.is_dir() and not (folder / "config.json").exists():
        return None
    from pipeline.model.shape import read_shape

    return read_shape(settings.model, settings.revision)
