"""OpenVINO GenAI's continuous batching on one job: `python openvino_arm.py JOB ANSWER`.

Imports nothing of this repository. The job's `model` is a folder made by `openvino_export`. Prefix
caching on, inference and KV cache in the job's dtype (by default OpenVINO would round the KV cache
to 8 bits), everything else as a user gets it. See `job` for the two files.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

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


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    engine = make_engine(job)
    generate(engine, [job["warm_up"]], 2)
    startup_s = time.time() - job["asked_at"]
    with open(sys.argv[2], "a") as answer:
        for number, prompts in enumerate(job["batches"]):
            begin = time.perf_counter()
            token_ids = generate(engine, prompts, job["new_tokens"])
            line = {
                "batch": number,
                "engine": f"openvino-genai {openvino_genai.__version__}",
                "seconds": time.perf_counter() - begin,
                "startup_s": startup_s,
                "token_ids": token_ids,
                "counters": None,
            }
            print(json.dumps(line), file=answer, flush=True)


if __name__ == "__main__":
    main()
