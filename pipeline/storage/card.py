"""The dataset card (README.md) of a finished run. Knows nothing about how the run was made.

It holds counts, names and hashes, so that it can be published beside the data.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipeline.questions import Question
from pipeline.storage.schema import fields_among, question_fields

_CARD = """---
configs:
- config_name: default
  data_files: data/*.parquet
---

# Generated text

Made by coppice, run `{run_id}` on {created_at}: {num_rows} rows, {num_error} of them failed.

```python
polars.scan_parquet("data/*.parquet")            # or pandas, DuckDB
datasets.load_dataset("path/to/this/folder")
```

Rows come in the order in which they were computed; `row_index` restores the order of the input.
Failed rows have `status = "error"` and the reason in `error_type` and `error_message`;
`failed.parquet` holds them alone. `run.json` says what exactly was run.

| column | type |
|---|---|
{columns}
| every column of the input | as it was; `input_<name>` where the name is taken |
"""


def render_card(manifest: dict[str, Any], num_rows: int, num_error: int, schema: pa.Schema) -> str:
    """Markdown with the front matter that `datasets` reads. `schema`: of the parts."""
    asked = [Question.recorded(said) for said in manifest.get("questions", ())]
    fields = (*fields_among(schema.names), *question_fields(asked))
    names = [field.name for field in fields if field.name in schema.names]
    if {"forced_tokens", "parsed"} <= {*schema.names}:
        names.append("parsed")  # of a type of its own
    kinds = {name: str(schema.field(name).type).replace("|", "\\|") for name in names}
    columns = "\n".join(f"| `{name}` | {kind} |" for name, kind in kinds.items())
    return _CARD.format(
        run_id=manifest["run_id"],
        created_at=manifest["created_at"],
        num_rows=num_rows,
        num_error=num_error,
        columns=columns,
    )
