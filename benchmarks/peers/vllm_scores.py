"""vLLM's CPU build on the requests of `benchmarks.scoring`, asked as the harness's `vllm` model
asks it (0.4.13, `VLLM._loglikelihood_tokens`): `python vllm_scores.py JOB ANSWER`, by the
interpreter that has vLLM. The harness itself is not installed there, and nothing of it but these
few lines would run: longest first, `prompt_logprobs=1`, one new token that nobody reads, and the
log-probabilities summed out of a list of dictionaries.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm_arm import make_engine


def score(engine: Any, requests: list[list[list[int]]]) -> dict[str, Any]:
    """(log-probability, is greedy) of each (context, continuation), and what it took."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)
    order = sorted(range(len(requests)), key=lambda i: (-len(sum(requests[i], [])), requests[i]))
    prompts = [TokensPrompt(prompt_token_ids=sum(requests[i], [])) for i in order]
    begin = time.perf_counter()
    outputs = engine.generate(prompts, params, use_tqdm=False)
    scores: list[Any] = [None] * len(requests)
    for i, output in zip(order, outputs, strict=True):
        context, continuation = requests[i]
        read = output.prompt_logprobs[len(context) :]
        total = sum(of[token].logprob for of, token in zip(read, continuation, strict=True))
        best = [max(of.items(), key=lambda item: item[1].logprob)[0] for of in read]
        scores[i] = total, best == continuation
    return {
        "seconds": time.perf_counter() - begin,
        "computed": sum(
            len(output.prompt_token_ids) - (output.num_cached_tokens or 0) for output in outputs
        ),
        "scores": scores,
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    engine = make_engine(job)
    import vllm

    score(engine, [[job["warm_up"], [1]]])
    with Path(sys.argv[2]).open("a") as answer:
        for name, requests in job["tasks"].items():
            engine.reset_prefix_cache()
            line = {"task": name, "engine": f"vllm {vllm.__version__}", **score(engine, requests)}
            print(json.dumps(line), file=answer, flush=True)


if __name__ == "__main__":
    main()
