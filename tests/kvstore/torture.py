"""A store whose disk fails, whose process is killed, whose power goes, at any operation.

`python -m tests.kvstore.torture` does all of them and prints one line; the tests do a share.
After each: no entry that is there is wrong, nothing half is left, and the store goes on.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import random
import tempfile
import time
from collections.abc import Iterable
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import pytest

from pipeline.errors import CoppiceError
from pipeline.kvstore.upkeep import describe_store, verify_store
from pipeline.storage.durable import is_temp
from tests.kvstore.oracle import Prefix, as_ids, check_prompt, kv_of, open_store
from tests.torture.disk import CODES, KILLED, DeadlyDisk, FailingDisk, When
from tests.torture.power_cut import RecordedDisk, cut
from tests.torture.victim import Server

PROMPTS: list[Prefix] = [
    (1, 2, 3, 4), (1, 2, 3, 9, 9), (7,) * 6, (1, 2, 3, 4, 5), (7, 7, 8), (2, 2), (3, 3, 3),
]  # fmt: skip
SMALL = 4000  # bytes: the last prompts push the first ones out
LARGE = 1 << 20
ALL = range(10_000)


def skip_flushes(patch: pytest.MonkeyPatch) -> None:
    """Watched disks still see each flush; the real one waits for the disk and changes nothing."""
    patch.setattr(os, "fsync", lambda file: None)


def work(folder: Path, budget: int, kept: list[Prefix] | None = None) -> None:
    """Open, put, load, close, and once more; `kept` takes what a put said was there for good."""
    for _ in range(2):
        with open_store(folder, budget=budget) as store:
            for prompt in PROMPTS:
                if store.put(as_ids(prompt), 0, kv_of(prompt)) and kept is not None:
                    kept.append(prompt)
                length = store.match(as_ids(prompt))
                if length:
                    store.load(as_ids(prompt), 0, length)
        if store.stats.quarantined and kept is not None:
            kept.clear()  # the disk would not give it back


def check(folder: Path, budget: int, kept: Iterable[Prefix] = ()) -> None:
    """What the next job finds: right or not there, `kept` certainly, within the budget."""
    with open_store(folder, budget=budget) as store:
        assert store.is_writer
        for prompt in PROMPTS:
            check_prompt(store, prompt, store.match(as_ids(prompt)))
        for prompt in kept:
            assert store.match(as_ids(prompt)) == len(prompt), prompt
        assert store.stats.quarantined == 0, "an entry was published that is not whole"
    assert not [path for path in folder.rglob("*") if is_temp(path)]
    assert verify_store(folder).bad == []
    assert describe_store(folder)["bytes"] <= budget


def sweep_errors(base: Path, code: int, lasts: bool, numbers: Iterable[int], budget: int) -> int:
    """The n-th operation fails; returns how many did."""
    for place, number in enumerate(numbers):
        folder = base / f"{code}-{lasts}-{number}-{budget}"
        kept: list[Prefix] = []
        with pytest.MonkeyPatch.context() as patch:
            disk = FailingDisk(patch, base, number, code, lasts)
            try:
                work(folder, budget, kept)
            except CoppiceError as error:
                assert str(folder) in str(error), error
        if number >= len(disk.operations):
            return place
        if folder.exists():
            check(folder, budget, kept if budget == LARGE else ())
    return len(list(numbers))


def die_at(folder: Path, budget: int, number: int, when: When, answered: Synchronized[int]) -> None:
    """The victim of `sweep_kills`."""
    logging.getLogger("coppice").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        skip_flushes(patch)
        DeadlyDisk(patch, folder.parent, number, when)
        work(folder, budget)


def sweep_kills(base: Path, server: Server, when: When, numbers: Iterable[int]) -> int:
    """The process is killed at the n-th operation; returns how many were."""
    kills = 0
    for number in numbers:
        folder = base / f"{when}-{number}"
        victim = server.start(die_at, folder, SMALL, number, when)
        victim.join()
        if victim.exitcode == 0:
            break
        assert victim.exitcode == KILLED
        if folder.exists():
            check(folder, SMALL)
        work(folder, SMALL)
        check(folder, SMALL)
        kills += 1
    return kills


def sweep_power_cuts(base: Path, budget: int, seeds: Iterable[int | None], by: int = 1) -> int:
    """The power goes after the n-th step; seed None: all that can be lost is lost."""
    live = base / "live"
    live.mkdir()
    done: list[tuple[int, Prefix]] = []
    with pytest.MonkeyPatch.context() as patch:
        disk = RecordedDisk(patch, live)

        class Noted(list[Prefix]):
            def append(self, prompt: Prefix) -> None:
                done.append((len(disk.steps), prompt))

        work(live / "kv", budget, Noted())
    cuts = 0
    for seed in seeds:
        for number in range(0, len(disk.steps) + 1, by):
            left = base / f"{seed}-{number}"
            luck = None if seed is None else random.Random(f"{seed} {number}")
            cut(disk.steps[:number], left, luck)
            certain = [p for after, p in done if after <= number] if budget == LARGE else []
            if (left / "kv").exists():
                check_after_cut(left / "kv", budget, certain)
            assert (left / "kv").exists() or not certain
            cuts += 1
    return cuts


def check_after_cut(folder: Path, budget: int, kept: Iterable[Prefix]) -> None:
    """As `check`; what was renamed and not flushed may be half, and is put aside."""
    with open_store(folder, budget=budget) as store:
        for prompt in PROMPTS:
            length = store.match(as_ids(prompt))
            if length and store.load(as_ids(prompt), 0, length) is None:
                length = store.match(as_ids(prompt))
            check_prompt(store, prompt, length)
        for prompt in kept:
            assert store.match(as_ids(prompt)) == len(prompt), prompt
        store.put(as_ids(PROMPTS[0]), 0, kv_of(PROMPTS[0]))
    assert verify_store(folder).bad == []


def toil(folder: Path, seed: int, answered: Synchronized[int]) -> None:
    """Put and load random prompts until killed; counts what was kept."""
    logging.getLogger("coppice").setLevel(logging.ERROR)
    skip_flushes(pytest.MonkeyPatch())
    luck = random.Random(seed)
    while True:
        with open_store(folder, budget=40_000) as store:
            for _ in range(luck.randint(1, 60)):
                prompt = tuple(luck.choices(range(3), k=luck.randint(1, 8)))
                if store.put(as_ids(prompt), 0, kv_of(prompt)):
                    answered.value += 1
                if length := store.match(as_ids(prompt)):
                    store.load(as_ids(prompt), 0, length)


def kill_at_random(base: Path, server: Server, kills: int, seed: int) -> int:
    """kill -9, over and over on one store; returns how many entries were put in all."""
    luck, puts = random.Random(seed), 0
    folder = base / "toiled"
    for number in range(kills):
        victim = server.start(toil, folder, seed + number)
        begun = time.monotonic()
        while not server.answered.value:
            assert victim.is_alive() and time.monotonic() - begun < 60
            time.sleep(0.002)
        victim.join(luck.uniform(0, 0.3))
        assert victim.is_alive()
        victim.kill()
        victim.join()
        puts += server.answered.value
        with open_store(folder, budget=40_000) as store:
            for _ in range(100):
                prompt = tuple(luck.choices(range(3), k=8))
                check_prompt(store, prompt, store.match(as_ids(prompt)))
            assert store.stats.quarantined == 0
        assert verify_store(folder).bad == []
        assert describe_store(folder)["bytes"] <= 40_000
        assert not [path for path in folder.rglob("*") if is_temp(path)]
    return puts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("coppice").setLevel(logging.ERROR)
    server, begin = Server(), time.monotonic()
    skip_flushes(pytest.MonkeyPatch())
    with tempfile.TemporaryDirectory(prefix="store-torture-") as name:
        base = Path(name)
        kinds = [(code, False) for code in CODES] + [(errno.ENOSPC, True)]
        errors = sum(
            sweep_errors(base, code, lasts, ALL, budget)
            for code, lasts in kinds
            for budget in (SMALL, LARGE)
        )
        swept = sum(sweep_kills(base, server, w, ALL) for w in ("before", "halfway", "after"))
        cuts = 0
        for budget in (SMALL, LARGE):
            (base / f"cuts-{budget}").mkdir()
            cuts += sweep_power_cuts(base / f"cuts-{budget}", budget, [None, 1, 2, 3])
        puts = kill_at_random(base, server, arguments.kills, arguments.seed)
    print(
        f"{errors} operations failed, {swept} killed, {cuts} power cuts; {arguments.kills} random "
        f"kill -9 of a store that took {puts} entries: 0 wrong, 0 half, 0 temporary files; "
        f"{time.monotonic() - begin:.0f} s"
    )


if __name__ == "__main__":
    main()
