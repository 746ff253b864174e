"""Where and when a study ran; no host names and no folders."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.scratch import ROOT


def _cpu() -> dict[str, str]:
    """What Linux says of the last core; nothing elsewhere."""
    said = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = (line.partition(":") for line in said.replace("\t", "").splitlines())
    return {name: value.strip() for name, _, value in lines}


def cpu_kind() -> str:
    """A folder's name: figures of other kinds of CPU say nothing of this one."""
    cpu = _cpu()
    vendor = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}.get(cpu.get("vendor_id", ""))
    if vendor is None:
        return platform.machine()
    amx = "-amx" if "amx_bf16" in cpu["flags"].split() else ""
    return f"{vendor}-{cpu['cpu family']}-{cpu['model']}{amx}"


def describe_machine() -> dict[str, Any]:
    """One line of a study."""
    values = _cpu()
    known = set(values.get("flags", "").split())
    head = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "kind": "machine",
        "date": datetime.date.today().isoformat(),
        "commit": head.stdout.strip() or None,
        "processor": values.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_kind": cpu_kind(),
        "instructions": sorted(known & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
