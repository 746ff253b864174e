"""Damaged Parquet files, made by a seed, and what reading each of them comes to.

`python -m tests.storage.fuzz [files] [seed]` prints the counts; `make fuzz` runs 20,000. A file is
read by a child process with a limit on its memory and on its time, so that a crash of pyarrow or a
hang is counted and ends nothing. COPPICE_FUZZ_FAULT is code that the third file runs: proof that
both are seen.
"""

from __future__ import annotations

import json
import os
import random
import resource
import selectors
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MOST_SECONDS = 20.0  # for one file of a few kilobytes
MOST_BYTES = 3 << 30  # of address space, libraries and thread stacks included
_CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello there"}]


def valid_files() -> list[bytes]:
    """Whole files: every compression, the encodings, both page versions, nested and plain types."""
    rows = 500
    flat = {
        "id": [f"r{i}" for i in range(rows)],
        "prompt": [f"a shared beginning, and then number {i % 7} of {i}" for i in range(rows)],
        "tenant": pa.array([f"t{i % 3}" for i in range(rows)]).dictionary_encode(),
        "max_new_tokens": pa.array(
            [None if i % 5 == 0 else i + 1 for i in range(rows)], pa.int32()
        ),
        "score": [i / 7 for i in range(rows)],
        "flag": [None if i % 4 == 0 else i % 2 == 0 for i in range(rows)],
        "when": pa.array([i * 10**9 for i in range(rows)], pa.timestamp("ns")),
    }
    nested = {
        "messages": [_CHAT[i % 2 :] for i in range(rows)],
        "sampling_params": [{"temperature": i / rows, "stop": "end"} for i in range(rows)],
        "tags": [None if i % 6 == 0 else [[i], [], [i, None]][: i % 4] for i in range(rows)],
        "pairs": pa.array([[("k", i)] * (i % 3) for i in range(rows)], pa.map_("string", "int64")),
    }
    wide = flat | {"prompt": pa.array(flat["prompt"]).cast(pa.large_string())}
    delta = {
        "id": "DELTA_BYTE_ARRAY", "prompt": "DELTA_LENGTH_BYTE_ARRAY",
        "max_new_tokens": "DELTA_BINARY_PACKED", "score": "BYTE_STREAM_SPLIT", "flag": "RLE",
    }  # fmt: skip
    plain = {name: column for name, column in flat.items() if name != "tenant"}
    return [
        _file(flat, compression="none", use_dictionary=False),
        _file(flat, compression="snappy", write_page_checksum=True),
        _file(wide, compression="zstd", data_page_version="2.0", row_group_size=130,
              store_schema=True),
        _file(plain, compression="gzip", use_dictionary=False, column_encoding=delta),
        _file(plain, compression="none", use_dictionary=False, column_encoding=delta,
              data_page_version="2.0"),
        _file(nested, compression="lz4", row_group_size=200),
        _file(nested, compression="brotli", data_page_version="2.0", write_page_index=True),
        _file(nested, compression="none", data_page_size=512, write_page_checksum=True),
        _file(flat, compression="none", data_page_size=512, use_deprecated_int96_timestamps=True),
    ]  # fmt: skip


def _file(columns: dict[str, Any], **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    # Without the copy of the schema that Arrow adds, or most damage would end in that.
    pq.write_table(pa.table(columns), sink, **{"store_schema": False} | options)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def damaged_files(seed: int, count: int) -> Iterator[bytes]:
    """`count` files, each a valid one with one to three kinds of damage; the same for a seed."""
    whole, chance = valid_files(), random.Random(seed)
    for _ in range(count):
        content = bytearray(chance.choice(whole))
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            chance.choice(DAMAGES)(content, chance, chance.choice(whole))
        yield bytes(content)


Damage = Callable[[bytearray, random.Random, bytes], None]


def _flip_bits(content: bytearray, chance: random.Random, other: bytes) -> None:
    for _ in range(chance.randint(1, 8)):
        content[_inside(content, chance)] ^= 1 << chance.randrange(8)


def _set_bytes(content: bytearray, chance: random.Random, other: bytes) -> None:
    for _ in range(chance.randint(1, 8)):
        content[_inside(content, chance)] = chance.choice(
            [0, 1, 127, 128, 255, chance.randrange(256)]
        )


def _damage_footer(content: bytearray, chance: random.Random, other: bytes) -> None:
    """Lengths, offsets, counts and types of the whole file stand there."""
    length = int.from_bytes(content[-8:-4], "little")
    low = max(4, len(content) - 8 - length)
    for _ in range(chance.randint(1, 4) if low < len(content) - 8 else 0):
        place = chance.randrange(low, len(content) - 8)
        # Mostly near to what was there, so that it still parses and says something else.
        near = (content[place] + chance.choice([-2, -1, 1, 2])) % 256
        content[place] = chance.choice([near, near, near, 0, 127, 255, chance.randrange(256)])


def _damage_page_header(content: bytearray, chance: random.Random, other: bytes) -> None:
    """The first bytes of the first page: its type and sizes, as variable-length integers."""
    for _ in range(chance.randint(1, 3)):
        place = min(len(content) - 1, chance.randrange(4, 40))
        content[place] = chance.choice([content[place] ^ 2, chance.randrange(256)])


def _cut_end(content: bytearray, chance: random.Random, other: bytes) -> None:
    del content[chance.randrange(len(content)) :]


def _cut_middle(content: bytearray, chance: random.Random, other: bytes) -> None:
    start = _inside(content, chance)
    del content[start : start + chance.randint(1, 200)]


def _splice(content: bytearray, chance: random.Random, other: bytes) -> None:
    """The beginning of one file and the end of another one."""
    content[chance.randrange(len(content)) :] = other[chance.randrange(len(other)) :]


def _set_footer_length(content: bytearray, chance: random.Random, other: bytes) -> None:
    length = chance.choice([0, 1, 2**31 - 1, 2**32 - 1, chance.randrange(2 * len(content) + 1)])
    content[-8:-4] = length.to_bytes(4, "little")


def _swap_pages(content: bytearray, chance: random.Random, other: bytes) -> None:
    """Two stretches of equal length change places."""
    size = chance.choice([16, 64, 256])
    if len(content) > 2 * size + 12:
        first, second = (chance.randrange(4, len(content) - size - 8) for _ in range(2))
        one, two = content[first : first + size], content[second : second + size]
        content[first : first + size], content[second : second + size] = two, one


def _set_word(content: bytearray, chance: random.Random, other: bytes) -> None:
    """A length of 32 bits, as levels and plain strings have, becomes a huge or negative one."""
    place = _inside(content, chance)
    word = chance.choice([0, 2**31 - 1, 2**31, 2**32 - 1, 2**30, len(content)])
    content[place : place + 4] = word.to_bytes(4, "little")


def _blank(content: bytearray, chance: random.Random, other: bytes) -> None:
    start = _inside(content, chance)
    stop = min(len(content), start + chance.randint(1, 300))
    content[start:stop] = bytes(stop - start)


DAMAGES: tuple[Damage, ...] = (
    _flip_bits, _set_bytes, _damage_footer, _damage_page_header, _cut_end, _cut_middle, _splice,
    _set_footer_length, _swap_pages, _set_word, _blank,
)  # fmt: skip


def _inside(content: bytearray, chance: random.Random) -> int:
    """A place between the two magic numbers, where there is one."""
    return chance.randrange(4, len(content) - 4) if len(content) > 8 else 0


@dataclass
class Counts:
    """What became of the files. `surprises`: (number of the file, what came instead)."""

    outcomes: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    surprises: list[tuple[int, str]] = field(default_factory=list)

    def __str__(self) -> str:
        named = ("read", "InputError", "crash", "hang", "other")
        counted = ", ".join(f"{self.outcomes[name]} {name}" for name in named)
        return f"{sum(self.outcomes.values())} files: {counted}; {self.rows:,} rows"


def read_damaged(
    seed: int, count: int, most_bytes: int = MOST_BYTES, most_seconds: float = MOST_SECONDS
) -> Counts:
    """Read the files of a seed in children, a new one after each crash or hang."""
    counts, number = Counts(), 0
    while number < count:
        number = _follow_child((seed, number, count, most_bytes), counts, most_seconds)
    return counts


def _follow_child(task: tuple[int, int, int, int], counts: Counts, most_seconds: float) -> int:
    """Let one child read files of `task`; returns the number of the next one to read."""
    _, first, count, _ = task
    command = [sys.executable, "-m", "tests.storage.fuzz", *map(str, task)]
    number = first - 1  # the child says that it is ready before its first file
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as child:
        assert child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while number < count:
                # Starting takes longer than a file does.
                waits = selector.select(120.0 if number < first else most_seconds)
                line = child.stdout.readline() if waits else b""
                if not line:
                    child.kill()
                    end = "crash" if waits else "hang"
                    assert number >= first, f"the child did not start ({end})"
                    counts.outcomes[end] += 1
                    counts.surprises.append((number, f"{end}, exit status {child.wait()}"))
                    return number + 1
                if number >= first:
                    _count(counts, number, json.loads(line))
                number += 1
    return number


def _count(counts: Counts, number: int, said: list[Any]) -> None:
    outcome, rows, detail = said
    counts.outcomes[outcome] += 1
    counts.rows += rows
    if outcome == "other":
        counts.surprises.append((number, detail))


def _read_files(seed: int, first: int, count: int, most_bytes: int) -> None:
    """The child: a line for each file."""
    from pipeline.inputs import prompt_source  # noqa: F401  (loaded before memory is limited)

    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print('"ready"', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.parquet"
        for number, content in enumerate(damaged_files(seed, count)):
            if number >= first:
                path.write_bytes(content)
                fault = os.environ.get("COPPICE_FUZZ_FAULT", "") if number == 2 else ""
                print(json.dumps(_read_file(path, fault)), flush=True)


def _read_file(path: Path, fault: str = "") -> tuple[str, int, str]:
    """All that a job does with its input, and how it ended: (outcome, rows, what came instead)."""
    from pipeline.errors import InputError
    from pipeline.inputs.prompt_source import open_source
    from pipeline.location import Location
    from pipeline.prompt_settings import ReadSettings

    try:
        exec(fault)
        source = open_source(Location(path), ReadSettings())
        source.fingerprint()
        rows = sum(len(batch.ids) for batch in source.iter_prompts())
        source.check_carried_columns()
        source.take(np.arange(source.num_rows)[:10_000])
        return ("read", rows, "")
    except InputError as error:
        assert "\n" not in str(error), str(error)
        return ("InputError", 0, "")
    except BaseException as error:  # what a person would not understand
        return ("other", 0, f"{type(error).__name__}: {str(error)[:200]}")


if __name__ == "__main__":
    if len(sys.argv) == 5:
        _read_files(*map(int, sys.argv[1:]))
    else:
        asked = [int(argument) for argument in sys.argv[1:]]
        found = read_damaged(asked[1] if len(asked) > 1 else 0, asked[0] if asked else 2000)
        print(found)
        for surprise in found.surprises:
            print("file", *surprise)
        sys.exit(bool(found.surprises))
