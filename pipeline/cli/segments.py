"""The commands `coppice segments ...`: flags in, a call of the library. Holds no logic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.arguments import Config, Input, LogFormat, Progress
from pipeline.cli.layers import merge
from pipeline.cli.logs import make_observer
from pipeline.cli.options import takes_settings
from pipeline.cli.streams import write_result

if TYPE_CHECKING:
    from pipeline.model.adapter import Card

app = typer.Typer(
    help="Documents that are reused at any position: train adapters, and the study of all modes.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
_READ = ("model", "read", "tokens", "store")

Folder = Annotated[Path, typer.Option("-o", "--output", help="Folder of the adapter.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Rows of a step.")]
HeldOut = Annotated[int, typer.Option("--held-out", min=1, help="Rows that are not learned.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of an answer.")]
AtOnce = Annotated[int, typer.Option("--most-tokens", min=1, help="In one forward.")]
Seed = Annotated[int, typer.Option("--seed", help="Of all that is drawn.")]


@app.command("train-packet")
@takes_settings(*_READ)
def train_packet(
    input: Input,
    output: Folder,
    soft_tokens: Annotated[
        int, typer.Option("--soft-tokens", min=1, help="Before a document, and behind it.")
    ] = 8,
    rows: Annotated[int, typer.Option("--rows", min=1, help="To learn from.")] = 512,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="At most.")] = 30,
    batch: Batch = 64,
    held_out: HeldOut = 64,
    learning_rate: Annotated[float, typer.Option("--learning-rate")] = 1e-3,
    max_new_tokens: NewTokens = 64,
    most_tokens: AtOnce = 16_384,
    seed: Seed = 0,
    config: Config = None,
    progress: Progress = "auto",
    log_format: LogFormat = "text",
    *,
    flags: dict[str, Any],
) -> None:
    """Train soft tokens around documents, for --reuse packet; the model stays as it is."""
    from pipeline.segment_training import train_packet_adapter
    from pipeline.segments.train_packet import PacketSettings

    settings = PacketSettings(
        soft_tokens, rows, held_out, epochs, batch, learning_rate, max_new_tokens, most_tokens, seed
    )
    job = merge(flags | {"reuse": "concat"}, config)
    say = make_observer(progress, log_format).say
    _report(output, train_packet_adapter(input, output, job, settings, say))


@app.command("train-links")
@takes_settings(*_READ)
def train_links(
    input: Input,
    output: Folder,
    soft_tokens: Annotated[
        int, typer.Option("--soft-tokens", min=1, help="Link tokens behind a document.")
    ] = 5,
    frozen: Annotated[bool, typer.Option("--frozen", help="Train the link tokens alone.")] = False,
    plain_share: Annotated[
        float, typer.Option("--plain-share", min=0, max=1, help="Of steps without documents apart.")
    ] = 0.6,
    steps: Annotated[int, typer.Option("--steps", min=1)] = 6000,
    batch: Batch = 64,
    held_out: HeldOut = 64,
    learning_rate: Annotated[float, typer.Option("--learning-rate")] = 5e-6,
    max_new_tokens: NewTokens = 64,
    most_tokens: AtOnce = 16_384,
    seed: Seed = 0,
    config: Config = None,
    progress: Progress = "auto",
    log_format: LogFormat = "text",
    *,
    flags: dict[str, Any],
) -> None:
    """Train link tokens between documents, and the model with them, for --reuse kvlink."""
    from pipeline.segment_training import train_link_adapter
    from pipeline.segments.train_links import LinkSettings

    settings = LinkSettings(
        soft_tokens, frozen, plain_share, steps, held_out, batch, learning_rate, max_new_tokens,
        most_tokens, seed,
    )  # fmt: skip
    job = merge(flags | {"reuse": "concat"}, config)
    say = make_observer(progress, log_format).say
    _report(output, train_link_adapter(input, output, job, settings, say))


@app.command()
def study(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the results.")],
    model: Annotated[
        Path | None, typer.Option("--model", help="Of data/train_segment_model.py (else ours).")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=2, help="Of each task and seed.")] = 667,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Each with its adapters.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A few rows; quote nothing.")] = False,
    progress: Progress = "auto",
    log_format: LogFormat = "text",
) -> None:
    """Measure every mode on rows whose documents need each other."""
    from pipeline.cli.demo import demo_folder
    from pipeline.segments.study import StudySettings, run_study

    settings = StudySettings(model or demo_folder() / "segment_model", output, rows, seeds)
    page = run_study(
        settings.quick() if quick else settings, make_observer(progress, log_format).say
    )
    write_result(page.read_text("utf-8").rstrip("\n"))


def _report(output: Path, card: Card) -> None:
    write_result(
        f"{output}: held-out KL from full attention {card.kl_untrained:.4f} before, {card.kl:.4f} "
        f"now; {card.agreement:.0%} of held-out rows get the same answer"
    )
