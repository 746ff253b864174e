"""Files of text that are rows: JSON lines, JSON lists and CSV, by their names, as Parquet.

Knows neither what a line means (`json_lines`, `csv_file`) nor where a copy is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import BinaryIO, Final

import pyarrow.parquet as pq

from pipeline.conversation_settings import ConversationSettings
from pipeline.errors import InputError
from pipeline.inputs.csv_file import CSV_ENDINGS, read_csv
from pipeline.inputs.input_files import InputFile, damage_named
from pipeline.inputs.json_lines import read_json
from pipeline.inputs.refused_lines import RefusedLines
from pipeline.prompt_settings import ReadSettings
from pipeline.scoring_settings import ScoringSettings

_JSON_ENDINGS: Final = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz")


def is_text_file(name: str) -> bool:
    """Whether a file of this name is read as lines of text, and not as Parquet."""
    return name.endswith((*_JSON_ENDINGS, *CSV_ENDINGS))


def is_csv(name: str) -> bool:
    """Whether its rows are lines of cells."""
    return name.endswith(CSV_ENDINGS)


def named_texts(
    settings: ReadSettings, conversations: ConversationSettings, scoring: ScoringSettings
) -> Iterator[str]:
    """The columns that a person names and that are text where a file says no types."""
    named = (
        settings.prompt_column, settings.messages_column, settings.segments_column,
        settings.documents_column, settings.id_column, conversations.conversation_column,
        scoring.choices_column, scoring.continuation_column,
    )  # fmt: skip
    return filter(None, named)


def write_rows(
    source: InputFile,
    sink: BinaryIO,
    metadata: Mapping[str, str] | None = None,
    keeps_refused: bool = False,
    as_text: Collection[str] = (),
) -> int:
    """Write a row for each line of `source` as Parquet, and `metadata` into its footer.

    `keeps_refused`: whether lines that no row can say are rows with a reason, unless all of them
    are so. `as_text`: columns of CSV that are text whatever they hold, besides those that always
    are. Returns the rows. Raises InputError naming line or field, and where the file changes
    meanwhile.
    """
    with damage_named(source.name):
        stamp = source.stamp()
    if is_csv(source.base_name):
        schema, tables = read_csv(source, keeps_refused, as_text)
    else:
        schema, tables = read_json(source, keeps_refused)
    rows, refused = 0, RefusedLines()
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        for table in tables:
            writer.write_table(table)
            rows += table.num_rows
            refused.count(table)
        writer.add_key_value_metadata(metadata or {})
    with damage_named(source.name):
        if source.stamp() != stamp:
            raise InputError(f"{source.name} changed while it was being read; start again")
    refused.check(rows)
    return rows
