"""The arms by name: what they are called in a table, and how each is started.

A peer is given no settings that its user would not get by default, except those named here.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.job import Job
from benchmarks.peers.environments import python_of

_PEERS = Path(__file__).with_name("peers")
_EXPORT_LIMIT_S = 1800


@dataclass(frozen=True)
class Arm:
    """`environment`: of a peer, None for ours; `ordered`: the order of rows may matter to it;
    `carries`: it is given all turns of conversations at once."""

    label: str
    environment: str | None = None
    ordered: bool = False
    all_cores: bool = False
    carries: bool = False

    def command(self, name: str) -> list[str]:
        """The start of the command line; the job and the answer follow."""
        if self.environment is None:
            return [sys.executable, "-m", "benchmarks.arm", name]
        script = _PEERS / f"{self.environment}_arm.py"
        return [str(python_of(self.environment)), str(script)]

    def variables(self) -> dict[str, str]:
        """Environment variables that it gets besides ours."""
        if not self.all_cores or self.environment is None:
            return {}
        openmp = python_of(self.environment).parents[1] / "lib" / "libiomp5.so"
        preload = {"LD_PRELOAD": str(openmp)} if openmp.exists() else {}
        return {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"} | preload

    def fit(self, job: Job) -> Job:
        """The job with the model in the form that this arm reads."""
        if self.carries:
            every = [prompt for prompts in job.batches for prompt in prompts]
            count = len(job.batches[0])
            return replace(job, batches=[every], conversations=count, is_conversation=False)
        return replace(job, model=_export(job.model)) if self.environment == "openvino" else job


ARMS = {
    "prefix": Arm("coppice", ordered=True),
    "carry": Arm("coppice, conversations carried", carries=True),
    "unshared": Arm("coppice, nothing shared"),
    "naive": Arm("transformers `generate`, one row at a time"),
    "generate": Arm("transformers `generate`, 32 rows of like length"),
    "generate_batch": Arm("transformers `generate_batch`"),
    "vllm": Arm("vLLM, as installed", "vllm", ordered=True),
    "vllm_all_cores": Arm("vLLM, no core reserved, libiomp", "vllm", ordered=True, all_cores=True),
    "openvino": Arm("OpenVINO GenAI", "openvino", ordered=True),
}


def _export(model: str) -> str:
    """The folder of the same weights as OpenVINO IR; converted when absent, in no arm's time."""
    folder = Path(f"{model}-openvino")
    if not (folder / "openvino_tokenizer.xml").exists():
        command = [str(python_of("openvino")), str(_PEERS / "openvino_export.py"), model]
        done = subprocess.run(
            [*command, str(folder)], capture_output=True, text=True, timeout=_EXPORT_LIMIT_S
        )
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["export failed"])[-1])
    return str(folder)
