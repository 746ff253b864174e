"""The command `coppice`, also as `python -m kvcoppice`, beside whatever else is called pipeline."""

from kvcoppice.own_modules import load


def main() -> None:
    """Run the command."""
    load("pipeline")
    from pipeline.cli import main as command

    command()


if __name__ == "__main__":
    main()
