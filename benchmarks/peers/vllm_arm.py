"""vLLM's CPU build on one job: `python vllm_arm.py JOB ANSWER`, by the interpreter that has it.

Imports of this repository only `answering`, beside it. Prefix caching on, everything else as a
user gets it. By default vLLM keeps one core for its scheduler, half of a machine of two: `arms` has
a second arm without that, by environment variables. See `job` for the two files.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from answering import answer_batches

COUNTERS: dict[str, int] = {}
"""Of the last call."""


def make_engine(job: dict[str, Any], **options: Any) -> Any:
    """An `LLM` with the job's weights, and settings that a study names."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(job["cache_gib"]))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM

    return LLM(
        model=job["model"], dtype=job["dtype"], enable_prefix_caching=True, seed=0, **options
    )


def generate(engine: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Token ids by row."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    greedy = SamplingParams(
        temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
    )
    outputs = engine.generate(
        [TokensPrompt(prompt_token_ids=p) for p in prompts], greedy, use_tqdm=False
    )
    COUNTERS["prompt_tokens"] = sum(map(len, prompts))
    COUNTERS["cached_tokens"] = sum(output.num_cached_tokens or 0 for output in outputs)
    return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    engine = make_engine(job)
    import vllm

    generate(engine, [job["warm_up"]], 2)
    answer_batches(
        Path(sys.argv[2]),
        f"vllm {vllm.__version__}",
        job,
        lambda prompts: generate(engine, prompts, job["new_tokens"]),
        forget=engine.reset_prefix_cache,
        counters=lambda: dict(COUNTERS),
    )


if __name__ == "__main__":
    main()
