"""The tests of the engine on vLLM, where vLLM is: `python -m benchmarks.peers.vllm_tests`.

vLLM pins versions that this project's own environment has newer, so the tests run in the peer's
environment, with the few packages that coppice needs besides.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.peers.environments import python_of

ROOT = Path(__file__).resolve().parents[2]
_MISSING = (
    "pyarrow", "polars", "polars-runtime-32", "matplotlib", "contourpy", "cycler", "fonttools",
    "kiwisolver", "pillow", "pyparsing", "python-dateutil", "faiss-cpu", "sentence-transformers",
    "scikit-learn", "scipy", "joblib", "threadpoolctl", "narwhals", "pytest", "pytest-timeout",
    "iniconfig", "pluggy", "hypothesis", "sortedcontainers", "python-json-logger",
    "prometheus_client",
)  # fmt: skip


def main() -> None:
    python = python_of("vllm")
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = {_plain(name) for name in _MISSING}
    chosen = [line for line in pinned if _plain(line.split("==")[0]) in wanted]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", *chosen], check=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    tests = [str(python), "-m", "pytest", "-W", "default", "tests/engine/test_vllm.py"]
    sys.exit(subprocess.run(tests, cwd=ROOT, env=environment).returncode)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
