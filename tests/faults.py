"""The table of faults: what was done to a job, and what a test has seen come of it.

`python -m tests.faults > docs/faults.md` collects the markers of the tests, which say what they
assert: `@pytest.mark.fault(case, injected=..., outcome=...)`. The tests are read, not run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CASES = (
    "truncated file", "bad magic", "flipped byte", "fuzzed Parquet",
    "wrong or missing columns", "wrong types", "dictionary, large_string, view", "nested columns",
    "zero rows", "null, empty, whitespace prompts", "duplicate ids", "duplicate prompts",
    "invalid UTF-8", "NUL", "lone surrogates", "emoji", "bidi characters", "control-token strings",
    "prompt at the limit", "prompt one above the limit", "prompt of ten times the limit",
    "one 100 MB row", "a million rows under one prefix", "input that changes during a run",
    "NaN logits in one row", "out of memory in prefill", "out of memory in decode",
    "out of memory where KV grows", "KV bit flip in a shared prefix",
    "disk full or EIO", "SIGTERM", "SIGKILL", "two writers", "stale lock",
    "committed part altered", "input changed between runs", "model changed between runs",
    "pickle-only weights", "code in a model's repository", "../ names in a model",
    "links out of a model's folder", "absurd sizes in a model", "missing or partial model",
    "wrong types in generation defaults", "vocabulary mismatch", "no end-of-sequence token",
    "adapter damaged or of another model",
    "templates that reach outside", "templates without end", "two tenants, one prefix",
    "canary strings", "audit failed", "night without input", "night still going",
    "machine slept through the start", "time budget spent", "clock set back or forward",
    "summer time", "damaged night file", "disk full at publish", "SIGKILL at publish",
    "publish target of somebody else", "store that fails at publish", "a damaged earlier night",
    "the device is busy", "monitoring", "no Prefect server", "Prefect server restarts",
    "Prefect database locked", "a machine of the cluster dies", "a row that kills every machine",
    "the cluster's head dies", "KV of an earlier run",
    "CSV of prompts to keep: empty, no such column, torn row, not UTF-8, ids twice",
    "embeddings beside a KV store altered, cut or not safetensors",
    "recycled KV that is another prompt's, in the experiment",
    "recycling experiment called with what cannot work",
    "bombs",
    "inputs in very many pieces",
    "a file in the way",
    "output inside the input folder",
    "a row that cannot run, at any stage", "types that polars cannot read back",
    "columns and fields named like those of a request",
    "prompts in segments",
    "conversations",
    "answers of a form",
)  # fmt: skip
"""Every row of the list of faults that the product promises to survive, in the table's order."""
PENDING: dict[str, str] = {}
"""Cases without a test so far, and what it will come with. A case with a test must not be here."""


@dataclass(frozen=True)
class Fault:
    """A marker: one line of the table. `test`: path and name."""

    case: str
    injected: str
    outcome: str
    test: str


def faults() -> list[Fault]:
    """Of all tests, in the order of `CASES`; those of one case as the files have them."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [fault for path in files for fault in _faults_of(path)]
    return sorted(found, key=lambda fault: CASES.index(fault.case))


def _faults_of(path: Path) -> Iterator[Fault]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            test = f"{path.relative_to(ROOT / 'tests')}: {node.name}"
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith(
                    "mark.fault"
                ):
                    yield _fault(decorator, test)


def _fault(decorator: ast.Call, test: str) -> Fault:
    (case,) = map(ast.literal_eval, decorator.args)
    said: dict[str, Any] = {
        str(word.arg): ast.literal_eval(word.value) for word in decorator.keywords
    }
    return Fault(case, test=test, **said)


def page() -> str:
    """The text of docs/faults.md."""
    found, lines = faults(), []
    for case in CASES:
        lines += [(f.case, f.injected, f.outcome, f"`{f.test}`") for f in found if f.case == case]
        if case in PENDING:
            lines.append((case, "", f"not tested yet; comes with {PENDING[case]}", ""))
    head = ("Case", "Injected", "Outcome", "Test (below `tests/`)")
    return _PAGE.format(table="\n".join(f"| {' | '.join(r)} |" for r in (head, _RULE, *lines)))


_RULE = ("---",) * 4
_PAGE = """# Faults

Made by `make faults` from the markers of the tests; do not edit. Each line is asserted by the test
that it names. Exit code 2 means a refusal before anything ran; a failed row never stops a job.

{table}
"""


if __name__ == "__main__":
    print(page(), end="")
