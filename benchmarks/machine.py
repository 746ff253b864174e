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


def describe_machine() -> dict[str, Any]:
    """One line of a study."""
    said = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    values = dict(line.partition(":")[::2] for line in said.replace("\t", "").splitlines())
    known = set(values.get("flags", "").split())
    head = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "kind": "machine",
        "date": datetime.date.today().isoformat(),
        "commit": head.stdout.strip() or None,
        "processor": values.get("model name", platform.machine()).strip(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": sorted(known & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
