"""What can be found wrong with a job once its input, its tokenizer and its model's config are open.

Reads no row. What is wrong whatever the files say is found before, by `early_checks.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.constraint_settings import CONSTRAINTS
from pipeline.errors import ModelError, UsageError
from pipeline.forms import flag_of
from pipeline.generation import ids_of, resolve_sampling, why_not_by_vllm
from pipeline.inputs.columns import ColumnMap
from pipeline.job.request_limits import RequestLimits
from pipeline.model.families import why_documents_stay
from pipeline.plan.documents import Reuse
from pipeline.settings import JobSettings
from pipeline.tokens.constraint_check import ConstraintChecker
from pipeline.tokens.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from pipeline.model.shape import ModelShape


def check_overlong(columns: ColumnMap, settings: JobSettings) -> None:
    """Raises UsageError where prompts would be cut that are known by their parts."""
    if columns.has_segments and settings.plan.on_overlong == "truncate-left":
        raise UsageError(
            "--on-overlong truncate-left would cut preambles and documents away from prompts in "
            "segments; choose error, and shorten the rows that it names"
        )


def check_generation(settings: JobSettings, shape: ModelShape) -> None:
    """Raises UsageError where the model's defaults ask for what cannot be done."""
    sampling, own = settings.sampling, shape.generation_config
    try:
        params = resolve_sampling(sampling, own, {})
    except ValueError as error:
        raise UsageError(f"{settings.model.model}: {error}") from None
    reason = why_not_by_vllm(params) if settings.model.engine == "vllm" else None
    if reason:
        raise UsageError(f"{settings.model.model}: {reason}")
    try:
        RequestLimits.of(settings, shape).apply(params, lambda word: [0])  # words are rows' affair
    except ValueError as error:
        raise UsageError(str(error)) from None
    strange = ids_of(params.rules) - set(range(shape.vocabulary_size))
    if strange:
        raise UsageError(
            f"{settings.model.model}: generation_config.json (or --generation-options) names the "
            f"token id {min(strange)}, but the model knows {shape.vocabulary_size} ids"
        )


def check_documents(settings: JobSettings, reuse: Reuse | None, shape: ModelShape | None) -> None:
    """Raises ModelError where the model cannot do with documents what is asked."""
    reason = None if reuse is None or shape is None else why_documents_stay(shape.family)
    if reason is not None:
        raise ModelError(f"{settings.model.model}: {reason}")


def check_constraint(
    settings: JobSettings, tokenizer: PromptTokenizer, checker: ConstraintChecker
) -> None:
    """Raises UsageError where answers cannot be held to what the settings say."""
    asked = settings.sampling
    if asked.thinking_budget is not None and tokenizer.grammars.tags is None:
        raise UsageError(
            f"--thinking-budget: the tokenizer of {settings.model.model} has no tags between "
            "which the model thinks; leave it out"
        )
    if not asked.constraint:
        return
    checked = checker.check([asked.constraint])[asked.constraint]
    if checked.reason is not None:
        flag = next(flag_of(name) for name in CONSTRAINTS if getattr(asked, name) is not None)
        detail = f" ({checked.detail})" if checked.detail else ""
        raise UsageError(f"{flag}: {checked.reason}{detail}")
