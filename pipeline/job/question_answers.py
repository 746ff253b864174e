"""What a row's scores answer to each question that it was asked. Knows no files and no engine.

| kind | answer | probability |
|---|---|---|
| choice | the likeliest label | that label's among the labels |
| boolean | whether that is the first label | the first label's: that it is true |
| scale | the mean of the numbers, each by its probability | that of the likeliest number |
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

from pipeline.job.row_scores import Compared, NoLikelyChoice, RowScores, compare
from pipeline.questions import Question


def split_scores(scores: RowScores, questions: Sequence[Question]) -> Iterator[RowScores]:
    """Those of each question's labels."""
    ends = list(accumulate(len(question.labels) for question in questions))
    for low, high in zip([0, *ends], ends, strict=False):
        yield RowScores(
            scores.loglikelihoods[low:high],
            scores.greedy[low:high],
            scores.token_counts[low:high],
            scores.byte_counts[low:high],
            scores.last_ids[low:high],
        )


def question_columns(
    scores: RowScores, questions: Sequence[Question], cut: int, normalize: str
) -> dict[str, object]:
    """The columns of questions of a row, and its `SCORE_FIELDS`: lists over all labels, question
    after question. Raises NoLikelyChoice."""
    columns: dict[str, object] = {}
    probabilities: list[float] = []
    for question, own in zip(questions, split_scores(scores, questions), strict=True):
        found = compare(own, normalize)
        if found is None:
            raise NoLikelyChoice(
                f"the model gives every label of the question {question.name!r} the probability 0, "
                "so none of them is the likeliest"
            )
        columns |= answer_columns(question, found)
        probabilities += found.probabilities
    return columns | {
        "cut_tokens": cut,
        "loglikelihoods": scores.loglikelihoods,
        "probabilities": probabilities,
        "token_counts": scores.token_counts,
        "byte_counts": scores.byte_counts,
        "greedy": scores.greedy,
    }


def answer_columns(question: Question, found: Compared) -> dict[str, object]:
    """The columns of one question."""
    best, shares = found.best, found.probabilities
    values: tuple[object, ...]
    match question.kind:
        case "choice":
            values = (question.labels[best], shares[best])
        case "boolean":
            values = (best == 0, shares[0])
        case "scale":
            numbers = question.values
            mean = math.fsum(a * b for a, b in zip(numbers, shares, strict=True))
            values = (mean, numbers[best], shares[best])
    return dict(zip(question.columns, (*values, found.label_mass), strict=True))
