"""What is measured once of a model on a device, and kept in a file for later runs."""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import TypeAdapter

from pipeline.engine.backend import Backend
from pipeline.model.machine import cpu_description, private_cache
from pipeline.model.model import LoadedModel
from pipeline.private_folder import private_folder

Value = TypeVar("Value")
_REPEATS = 5


def measured_once(
    kind: str,
    name: str,
    measure: Callable[[], Value],
    schema: TypeAdapter[Value],
    cache: Path | None = None,
) -> Value:
    """What `measure` finds: from the cache, else measured and kept under `name`.

    `cache` is a folder; by default that of this `kind` in the user's. One that cannot be written is
    no error.
    """
    try:
        folder = private_folder(cache) if cache else private_cache(kind)
    except OSError:
        return measure()
    path = folder / f"{name}.json"
    with suppress(OSError, ValueError):  # absent, or written by another version
        return schema.validate_json(path.read_bytes(), strict=True)
    measured = measure()
    with (
        suppress(OSError),
        tempfile.NamedTemporaryFile("wb", dir=folder, delete=False) as file,
    ):
        file.write(schema.dump_json(measured))
        os.replace(file.name, path)
    return measured


def median_seconds(act: Callable[[], None], device: torch.device, long_s: float) -> float:
    """Of `act`, until the device is through with it. The first time does not count, and a second
    one is enough once `long_s` have passed."""
    times: list[float] = []
    while len(times) < 2 or (len(times) <= _REPEATS and sum(times) < long_s):
        begin = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def fingerprint(loaded: LoadedModel, backend: Backend) -> str:
    """Of all that the measured times depend on."""
    shape, device = loaded.shape, loaded.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_description()
    size = sum(p.numel() for p in loaded.model.parameters())
    kernels = sorted(Path(__file__).with_name("kernels").glob("*.[cph]*"))
    parts = (
        shape.family, shape.num_layers, shape.num_kv_heads, shape.head_dim, size,
        loaded.model.dtype, machine, torch.get_num_threads(), torch.__version__,
        backend.kernel.name, backend.forward.name,
        *(path.read_bytes() for path in kernels),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
