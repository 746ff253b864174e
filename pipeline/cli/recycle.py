"""The commands `coppice recycle ...`: what a person does with a KV store. Holds no logic."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli import paper
from pipeline.cli.arguments import Json
from pipeline.cli.progress import format_bytes
from pipeline.cli.streams import write_result
from pipeline.errors import StorageError, UsageError
from pipeline.forms import parse_size

app = typer.Typer(
    help="Look after a store of KV states that jobs share across runs.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(paper.app)
_SHOWN_BAD = 10
_COLUMNS = {
    "key": False, "tokens": True, "depth": True, "bytes": True, "last used": False,
    "identity": False,
}  # fmt: skip

Store = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the store.")]


@app.command("ls")
def list_entries(
    directory: Store,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Show so many.")] = 50,
    json: Json = False,
) -> None:
    """The entries, the last used first."""
    from pipeline.cli.tables import print_columns, print_json
    from pipeline.kvstore.upkeep import list_store

    entries = list_store(directory)
    if json:
        print_json({"entries": entries})
        return
    print_columns(str(directory), _COLUMNS, [_entry_row(entry) for entry in entries[:limit]])
    if len(entries) > limit:
        write_result(f"and {len(entries) - limit:,} more; --limit shows them, --json shows all")


@app.command()
def stats(directory: Store, json: Json = False) -> None:
    """How much is stored, for how many models and tenants."""
    from pipeline.cli.tables import print_json, print_table
    from pipeline.kvstore.upkeep import describe_store

    found = describe_store(directory)
    if json:
        print_json(found)
        return
    aside = f"{found['quarantined']:,}, {format_bytes(found['quarantined_bytes'])}"
    models = [f"{name[:8]}: {n:,} entries" for name, n in found["identities"].items()]
    rows = [
        ("entries", f"{found['entries']:,}"),
        ("tokens", f"{found['tokens']:,}, the deepest prefix {found['deepest']:,}"),
        ("bytes", format_bytes(found["bytes"])),
        ("identities", "\n".join(models) or "none"),
        ("tenants' trees", f"{found['trees']:,}"),
        ("in quarantine", aside),
    ]
    if found["entries"]:
        rows.append(("last used", f"{_moment(found['oldest'])} to {_moment(found['newest'])}"))
    print_table(str(directory), rows)


@app.command()
def verify(directory: Store, json: Json = False) -> None:
    """Check every entry; exit code 1 if any was bad. Bad ones are put aside."""
    from pipeline.cli.tables import print_json
    from pipeline.kvstore.upkeep import verify_store

    found = verify_store(directory)
    if json:
        print_json(found._asdict())
    else:
        write_result(f"{found.entries:,} entries checked, {format_bytes(found.bytes)}")
        for key, why in found.bad[:_SHOWN_BAD]:
            write_result(f"{key[:12]}  {why}")
    if found.bad:
        raise StorageError(
            f"{len(found.bad):,} entries of {directory} were bad and lie in its quarantine now; "
            "jobs compute them again"
        )


@app.command()
def gc(
    directory: Store,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Evict what was used the longest ago: 8GiB.")
    ] = None,
    quarantine_days: Annotated[
        float, typer.Option("--quarantine-days", min=0, help="Keep what was put aside so long.")
    ] = 7,
    json: Json = False,
) -> None:
    """Evict to a budget, remove what dead jobs left, write the index anew."""
    from pipeline.cli.tables import print_json
    from pipeline.kvstore.upkeep import clean_store

    try:
        budget_bytes = None if budget is None else parse_size(budget)
    except ValueError as error:
        raise UsageError(f"--budget: {error}") from error
    done = clean_store(directory, budget_bytes, quarantine_days)
    if json:
        print_json(done._asdict())
        return
    write_result(
        f"{done.evicted:,} entries evicted, {done.temps:,} temporary files and "
        f"{done.quarantined:,} from the quarantine removed; "
        f"{done.entries:,} entries left, {format_bytes(done.bytes)}"
    )


def _entry_row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        entry["key"][:12],
        f"{entry['tokens']:,}",
        f"{entry['depth']:,}",
        format_bytes(entry["bytes"]),
        _moment(entry["last_used"]),
        entry["identity"][:8],
    )


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
