"""OpenVINO GenAI's continuous batching on one job: `python openvino_arm.py JOB ANSWER`.

Imports of this repository only `answering`, beside it. The job's `model` is a folder made by
`openvino_export`. Prefix caching on, inference and KV cache in the job's dtype (by default OpenVINO
would round the KV cache to 8 bits), everything else as a user gets it. See `job` for the two files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from answering import answer_batches

_PRECISION = {"float32": "f32", "bfloat16": "bf16"}


def make_engine(job: dict[str, Any]) -> Any:
    """A pipeline with the job's weights."""
    schedule = openvino_genai.SchedulerConfig()
    schedule.enable_prefix_caching = True
    schedule.cache_size = job["cache_gib"]
    precision = _PRECISION[job["dtype"]]
    properties = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
    return openvino_genai.ContinuousBatchingPipeline(job["model"], schedule, "CPU", properties)


def generate(engine: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Token ids by row."""
    greedy = openvino_genai.GenerationConfig()
    greedy.max_new_tokens = new_tokens
    greedy.ignore_eos = True
    greedy.do_sample = False
    ids = [openvino.Tensor(np.array([p], np.int64)) for p in prompts]
    return [list(r.m_generation_ids[0]) for r in engine.generate(ids, [greedy] * len(ids))]


class Pipelines:
    """A new one for each batch: its prefix cache has no way to be emptied."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        self._pipeline: Any = None
        self.renew()

    def renew(self) -> None:
        """Forget all that was computed. Compiles and warms up again."""
        self._pipeline = None  # before the next one takes as much memory
        self._pipeline = make_engine(self._job)
        generate(self._pipeline, [self._job["warm_up"]], 2)

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        return generate(self._pipeline, prompts, self._job["new_tokens"])


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    pipelines = Pipelines(job)
    answer_batches(
        Path(sys.argv[2]),
        f"openvino-genai {openvino_genai.__version__}",
        job,
        pipelines.generate,
        forget=pipelines.renew,
    )


if __name__ == "__main__":
    main()
