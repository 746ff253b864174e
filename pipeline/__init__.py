"""Bulk text generation from Parquet prompt files that computes shared prompt prefixes once.

```
 Parquet ─► reader ─► tokenizer ─► radix tree ─► plan ─► engine ─► writer ─► audit ─► report
            storage/   tokens/      plan/         plan/   engine/   storage/  audit/   report/
```

`pipeline.run` is the only module that knows this order; `pipeline.cli` wraps it for people, and
the package `flows` for Prefect. Importing this package imports nothing heavy.
"""

from pipeline.errors import CoppiceError
from pipeline.records import Completion, SamplingParams
from pipeline.settings import JobSettings

__all__ = ["Completion", "CoppiceError", "JobSettings", "SamplingParams"]
