"""The rows of a job as they are asked its questions: checked, and in the order that shares most.

Knows neither texts nor tokens: `question_labels.py` and `question_ordering.py` look at these.
"""

from __future__ import annotations

from pipeline.errors import UsageError
from pipeline.inputs.prompt_source import PromptSource
from pipeline.job.question_labels import check_labels
from pipeline.job.question_ordering import QuestionSaving, order_questions
from pipeline.settings import JobSettings
from pipeline.tokens.tokenizer import PromptTokenizer


def ask(
    source: PromptSource, settings: JobSettings, tokenizer: PromptTokenizer
) -> tuple[PromptSource, QuestionSaving | None]:
    """The same rows, asked as the settings say; what the order saves, where these leave it open.

    Raises UsageError.
    """
    sheet = None if source.columns.scored is None else source.columns.scored.sheet
    assert sheet is not None
    are_messages, is_chat = source.columns.messages is not None, settings.tokens.apply_chat_template
    if sheet.answer is not None and (are_messages or is_chat):
        raise UsageError(
            f"{settings.scoring.questions}: 'answer' stands before the label of a plain text, and "
            "here the chat template's generation prompt does; leave it out"
        )
    sheet = sheet.model_copy(update={"is_chat": is_chat})
    check_labels(sheet, tokenizer, are_messages)
    source = source.with_sheet(sheet)
    if settings.scoring.question_order != "auto":
        return source, None
    asking = order_questions(source)
    return source.with_sheet(sheet.ordered(asking.order)), asking
