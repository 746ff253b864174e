"""Which device a model runs on."""

from __future__ import annotations

import torch

from pipeline.errors import ModelError


def choose_device(device: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU. Raises ModelError for an absent one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"device {device!r} cannot be used: {reason}") from None
    return chosen


def name_device(device: str) -> str:
    """What the chosen device is called on this machine, whatever numbers a process sees it by.

    Raises ModelError for an absent one.
    """
    chosen = choose_device(device)
    if chosen.type != "cuda":
        return chosen.type
    return f"cuda {torch.cuda.get_device_properties(chosen).uuid}"
