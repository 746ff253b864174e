"""Put this folder on the Hugging Face hub as a data set, with its card: README.md.

    python data/publish.py owner/name --dry-run     says what would go there, and asks nobody
    python data/publish.py owner/name               needs `hf auth login`, or HF_TOKEN

Everything goes in one commit: who reads the data set meanwhile sees the old one or the new one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, DatasetCard, HfApi

DATA = Path(__file__).resolve().parent
_ENDINGS = {".parquet", ".csv", ".py", ".md", ".json", ".jinja", ".safetensors"}


def files_of(folder: Path = DATA) -> list[Path]:
    """What goes to the hub, the card first."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix in _ENDINGS)
    shown = (p for p in found if not any(part[0] in "._" for part in p.relative_to(folder).parts))
    return sorted(shown, key=lambda path: (path.name != "README.md", path))


def check_card(folder: Path = DATA) -> None:
    """Raises SystemExit if a file that the card names is not there."""
    for name in named_files(folder):
        if not (folder / name).is_file():
            raise SystemExit(f"README.md names {name}, which is not there; make it first")


def named_files(folder: Path = DATA) -> Iterator[str]:
    """The files of the card's configurations."""
    card = DatasetCard.load(folder / "README.md")
    for config in card.data.to_dict()["configs"]:
        yield config["data_files"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Publish, or say what would be published."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("repo", help="owner/name on the hub; made if it is not there")
    parser.add_argument("--dry-run", action="store_true", help="say what would go there")
    parser.add_argument("--private", action="store_true", help="where it is made, for you alone")
    args = parser.parse_args(arguments)
    if args.repo.count("/") != 1:
        parser.error(f"{args.repo} is no owner/name")
    check_card()
    files = files_of()
    total = sum(path.stat().st_size for path in files)
    if args.dry_run:
        for path in files:
            print(f"{path.stat().st_size:>12,}  {path.relative_to(DATA).as_posix()}")
        print(f"{total:>12,}  in {len(files)} files would go to datasets/{args.repo}")
        return
    api = HfApi()
    api.create_repo(args.repo, repo_type="dataset", private=args.private or None, exist_ok=True)
    operations = [
        CommitOperationAdd(path.relative_to(DATA).as_posix(), path_or_fileobj=path)
        for path in files
    ]
    done = api.create_commit(
        args.repo, operations, commit_message="Prompts, models and how they are made",
        repo_type="dataset",
    )  # fmt: skip
    print(done.commit_url)


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Leaves the examples above as they are."""


if __name__ == "__main__":
    main()
