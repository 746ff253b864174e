"""Output columns: ours first, the input's beside them, no name twice."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pipeline.errors import InputError
from pipeline.inputs.columns import ColumnMap
from pipeline.storage.schema import OUTPUT_FIELDS, carry_columns, output_schema
from tests.storage.tables import answers

NAMES = [field.name for field in OUTPUT_FIELDS]


def parts_of(id_column: str | None, conversation: str | None = None) -> ColumnMap:
    turn = None if conversation is None else "turn"
    return ColumnMap("prompt", None, id_column, None, None, conversation=conversation, turn=turn)


def test_input_columns_are_carried_and_renamed_only_where_taken() -> None:
    inputs = pa.table(
        {"id": ["r3", "r1"], "prompt": ["a", "b"], "status": ["x", "y"], "n": [1.5, None]}
    )
    table = carry_columns(answers([3, 1]), inputs, parts_of("id"))
    assert table.column_names == [*NAMES, "prompt", "input_status", "n"]
    assert table.column("id").to_pylist() == ["r3", "r1"]
    assert table.column("input_status").to_pylist() == ["x", "y"]
    assert table.schema.equals(output_schema(inputs.schema, parts_of("id")))


def test_an_id_column_of_another_name_is_carried_too() -> None:
    inputs = pa.schema([("id", pa.int64()), ("custom_id", pa.string())])
    assert output_schema(inputs, parts_of("custom_id")).names == [*NAMES, "input_id", "custom_id"]


@pytest.mark.parametrize("kind", [pa.int64(), pa.uuid(), pa.date32()])
def test_an_id_that_is_no_text_is_carried_with_its_type(kind: pa.DataType) -> None:
    """Seen red: whole numbers came back as text alone, so that joins found nothing."""
    inputs = pa.table({"id": pa.nulls(2, kind)})
    table = carry_columns(answers([3, 1]), inputs, parts_of("id"))
    assert table.column_names == [*NAMES, "input_id"]
    assert table.schema.field("input_id").type == kind


def test_two_columns_that_would_get_one_name_are_refused() -> None:
    inputs = pa.schema([("status", pa.string()), ("input_status", pa.string())])
    with pytest.raises(InputError, match="'status' and 'input_status'"):
        output_schema(inputs, parts_of(None))


def test_results_are_cast_to_the_documented_types() -> None:
    wide = answers([0]).set_column(4, "prompt_tokens", pa.array([5], pa.int64()))
    table = carry_columns(wide, pa.table({"prompt": ["a"]}), parts_of(None))
    assert table.schema.field("prompt_tokens").type == pa.int32()
