"""What a person can choose about scores: which continuations, and how they are compared."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self

from pydantic import field_validator, model_validator

from pipeline.forms import Section, flag_of, refuse_beside

if TYPE_CHECKING:
    from pipeline.settings import JobSettings

CHOICES_COLUMN: Final = "choices"
"""Where choices are found unless something else is said."""
_ENGINES = ("prefix", "naive")


class ScoringSettings(Section):
    """Rows are scored, and no answer is generated, where one of five is said.

    `choices_column`: a list of texts; `choices`: the same for every row, in one text with commas or
    as several; `continuation_column`: one text; `prompt_logprobs`: the prompts themselves;
    `questions`: a file of them, see `questions.py`, which stand before or behind a row's text by
    `question_order`, "auto": whichever shares more.
    `normalize`: what the log-probability of a choice is divided by before choices are compared.
    """

    choices_column: str | None = None
    choices: tuple[str, ...] = ()
    continuation_column: str | None = None
    prompt_logprobs: bool = False
    questions: Path | None = None
    question_order: Literal["auto", "first", "last"] = "auto"
    normalize: Literal["none", "tokens", "bytes"] = "none"

    @field_validator("choices", mode="before")
    @classmethod
    def _texts(cls, value: object) -> object:
        texts = value.split(",") if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
            raise ValueError("write it as yes,no or as a list of texts")
        if not all(texts):
            raise ValueError("a choice is empty; write it as yes,no")
        twice = next((text for text, count in Counter(texts).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"the choice {twice!r} is there twice; drop one")
        return tuple(texts)

    @property
    def scores(self) -> bool:
        """Whether rows are scored."""
        return bool(self.sources)

    @property
    def sources(self) -> list[str]:
        """The flags that say what is scored."""
        said = {
            "--choices-column": self.choices_column is not None,
            "--choices": bool(self.choices),
            "--continuation-column": self.continuation_column is not None,
            "--prompt-logprobs": self.prompt_logprobs,
            "--questions": self.questions is not None,
        }
        return [flag for flag, is_there in said.items() if is_there]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(self.sources) > 1:
            first, second = self.sources[:2]
            raise ValueError(f"{first} and {second} exclude each other; leave one of the two out")
        if self.normalize != "none" and not (self.choices or self.choices_column or self.questions):
            raise ValueError(
                f"normalize {self.normalize} compares choices; give --choices, --choices-column or "
                "--questions"
            )
        if self.question_order != "auto" and self.questions is None:
            raise ValueError(
                f"question-order {self.question_order} is about --questions; give these too"
            )
        return self


NO_SCORES: Final = ScoringSettings()


def check_scoring(job: JobSettings) -> None:
    """Raises ValueError where other settings contradict those of scores."""
    asked = job.scoring
    if not asked.scores:
        return
    sampling = job.sampling
    said = [name for name, field in type(sampling).model_fields.items()
            if getattr(sampling, name) != field.default]  # fmt: skip
    never = {
        **{flag_of(name): True for name in said},
        f"--reuse {job.reuse.reuse}": job.reuse.moves_documents,
        "--document-order best": job.reuse.document_order == "best",
        "--segments-column": job.read.segments_column is not None,
        "--json-schema-column": job.read.json_schema_column is not None,
        "--documents-column": job.read.documents_column is not None,
        "--conversation-column": job.conversations.conversation_column is not None,
        "--turn-column": job.conversations.turn_column is not None,
        "--explode": job.write.explode,
        f"--engine {job.model.engine}": job.model.engine not in _ENGINES,
    }
    refuse_beside(asked.sources[0], never)
