"""A nightly job as tests have it: a file, a tiny model, prompts of some days."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.job.observer import SilentObserver
from pipeline.night.ending import Ending
from pipeline.night.night import run_nights
from pipeline.night.settings import Night, read_night
from tests.tiny_job import write_prompts

DAY = datetime.date(2026, 11, 22)
PROMPTS = [f"answer in one word: {word}" for word in ("why?", "who?", "why?", "me or you?")]


class NightlyJob:
    """Files below `folder`: nightly.yaml, in/DATE/, nights/reviews/DATE, published/DATE."""

    def __init__(self, folder: Path, model: Path, **keys: Any) -> None:
        self.folder = folder
        self.file = folder / "nightly.yaml"
        self.published = folder / "published"
        self._keys: dict[str, Any] = {
            "name": "reviews",
            "input": "in/{date}/*.parquet",
            "output": "nights",
            "publish": "published",
            "model": str(model),
            "engine": "naive",
            "dtype": "float32",
            "max-new-tokens": 4,
            "audit-free-running": 1,
        }
        self.say(**keys)

    def say(self, **keys: Any) -> None:
        """Change keys of the file; None takes one out."""
        self._keys |= {name.replace("_", "-"): value for name, value in keys.items()}
        said = {name: value for name, value in self._keys.items() if value is not None}
        self.file.write_text(yaml.safe_dump(said))

    def give_input(self, day: datetime.date = DAY, prompts: Sequence[str | None] = PROMPTS) -> None:
        """Prompts of that day."""
        folder = self.folder / "in" / day.isoformat()
        folder.mkdir(parents=True)
        write_prompts(folder / "p.parquet", list(prompts))

    def take_input(self, day: datetime.date = DAY) -> None:
        """There is none of that day any more."""
        shutil.rmtree(self.folder / "in" / day.isoformat())

    def night(self, day: datetime.date = DAY) -> Night:
        """As the file says it now."""
        return read_night(self.file, day)

    def run_directory(self, day: datetime.date = DAY) -> Path:
        """Of that night."""
        return self.night(day).run.local

    def sit(self, day: datetime.date = DAY) -> list[Ending]:
        """One sitting."""
        return run_nights(self.file, day, SilentObserver())

    def days_published(self) -> list[str]:
        """As a reader finds them."""
        return sorted({path.parts[-3] for path in self.published.glob("*/data/*.parquet")})


def before(days: int) -> datetime.date:
    """So many days before DAY."""
    return DAY - datetime.timedelta(days=days)
