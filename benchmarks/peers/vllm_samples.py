"""vLLM's CPU build on the job of `benchmarks.row_features`: several samples of each prompt, sent as
`n`: `python vllm_samples.py JOB ANSWER`, by the interpreter that has vLLM."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm_arm import make_engine


def sample(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """How long it took, and how many tokens came and were computed."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    # No seed: vLLM 0.32 for CPUs ends with "CPU Generator does not use offset" where a row has one.
    params = SamplingParams(
        n=job["n"], temperature=1.0, max_tokens=job["new_tokens"], ignore_eos=True,
        detokenize=False,
    )  # fmt: skip
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    begin = time.perf_counter()
    outputs = engine.generate(prompts, params, use_tqdm=False)
    return {
        "seconds": time.perf_counter() - begin,
        "answers": sum(len(output.outputs) for output in outputs),
        "generated": sum(len(o.token_ids) for output in outputs for o in output.outputs),
        "computed": sum(
            len(output.prompt_token_ids) - (output.num_cached_tokens or 0) for output in outputs
        ),
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    engine = make_engine(job)
    import vllm

    sample(engine, job | {"prompts": [job["warm_up"]], "n": 2, "new_tokens": 2})
    engine.reset_prefix_cache()
    line = {"engine": f"vllm {vllm.__version__}", **sample(engine, job)}
    Path(sys.argv[2]).write_text(json.dumps(line))


if __name__ == "__main__":
    main()
