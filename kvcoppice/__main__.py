"""The command `coppice`, also as `python -m kvcoppice`, beside whatever else is called pipeline."""

from kvcoppice.own_modules import load

load("pipeline")  # before anything is imported from it, in a process that this one starts as well


def main() -> None:
    """Run the command."""
    from pipeline.cli.app import main as command

    command()


if __name__ == "__main__":
    main()
