"""The answers of chosen rows; of a row of several samples the one that is audited."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from pipeline.storage.run_directory import RunDirectory

_ANSWER = ("generated_text", "completion_token_ids", "finish_reason")
_OF_TOKEN = {"token_id", "logprob", "top"}


def read_answers(
    directory: RunDirectory, chosen: pl.DataFrame, further: tuple[tuple[str, ...], ...], seed: int
) -> pl.DataFrame:
    """`chosen` by `row_index`, with the answers of the committed parts, `logprobs` and the groups
    of columns `further` that are there, and `sample`: which one of the row's samples it is, drawn
    by `seed`."""
    wanted = pl.col("row_index").is_in(chosen["row_index"].to_list())
    rows = directory.scan_samples().filter(wanted)
    schema = rows.collect_schema()
    names = [*_ANSWER, *(["logprobs"] if _holds(schema.get("logprobs"), _OF_TOKEN) else [])]
    others = [n for group in further if {*group} <= {*schema.names()} for n in group]
    if directory.is_exploded:
        lines = rows.select("row_index", *names, *others, "sample_index").collect()
        answers = _drawn_lines(lines, seed)
    elif _holds(schema.get("samples"), {*_ANSWER}):
        answers = _drawn_entries(rows.select("row_index", *names, "samples").collect(), names, seed)
    else:
        answers = rows.select("row_index", *names, *others).collect()
        answers = answers.with_columns(sample=pl.lit(0, pl.Int32))
    return chosen.drop("finish_reason").join(answers, on="row_index").sort("row_index")


def _holds(kind: pl.DataType | None, fields: set[str]) -> bool:
    """Whether a column is a list of structs with these fields, as ours are; an input may have one
    of the same name."""
    if not isinstance(kind, pl.List) or not isinstance(kind.inner, pl.Struct):
        return False
    return fields <= {field.name for field in kind.inner.fields}


def _draw(seed: int, row: int, count: int) -> int:
    return int(np.random.default_rng([seed % 2**63, row]).integers(count))


def _drawn_lines(answers: pl.DataFrame, seed: int) -> pl.DataFrame:
    """One line of each row."""
    counts = answers.group_by("row_index").len()
    drawn = [_draw(seed, row, count) for row, count in counts.iter_rows()]
    wanted = counts.select("row_index").with_columns(sample_index=pl.Series(drawn, dtype=pl.Int32))
    found = answers.join(wanted, on=["row_index", "sample_index"])
    return found.rename({"sample_index": "sample"})


def _drawn_entries(answers: pl.DataFrame, names: list[str], seed: int) -> pl.DataFrame:
    """One entry of the column `samples` of each row."""
    rows: list[dict[str, Any]] = []
    for row in answers.iter_rows(named=True):
        samples = row["samples"] or [row]
        if samples[0]["completion_token_ids"] != row["completion_token_ids"]:
            samples = [row]  # a column of the input, which another run has written
        number = _draw(seed, row["row_index"], len(samples))
        said = {name: samples[number].get(name) for name in names}
        rows.append({"row_index": row["row_index"], **said, "sample": number})
    kinds = {name: answers.schema[name] for name in ("row_index", *names)} | {"sample": pl.Int32}
    return pl.DataFrame(rows, schema=kinds)
