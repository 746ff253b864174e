"""The command `coppice convert`: flags in, a call of the library."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.cli.arguments import Json
from pipeline.cli.layers import merge_section
from pipeline.cli.options import takes_settings
from pipeline.location import Location
from pipeline.store_settings import ObjectStoreSettings

app = typer.Typer()


@app.command("convert")
@takes_settings("store")
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="JSONL, Parquet or run directory.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="Parquet or JSONL.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    json: Json = False,
    *,
    flags: dict[str, Any],
) -> None:
    """OpenAI batch files or plain JSON lines to Parquet, and back."""
    from pipeline.cli.outcome import show_done
    from pipeline.inputs.conversion import convert as convert_file

    store = merge_section(ObjectStoreSettings, flags)
    rows = convert_file(Location(source, store), Location(target), overwrite)
    show_done(target, json, {"target": target, "rows": rows}, f"{rows:,} rows in {target}")
