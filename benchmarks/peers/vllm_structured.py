"""vLLM's CPU build on the job of `benchmarks.structured`: an answer under a schema for each prompt:
`python vllm_structured.py JOB ANSWER`, by the interpreter that has vLLM.

Compact JSON, by llguidance: the same answers are allowed as to our engine. Free white space, which
is how vLLM comes, would only give it more tokens to say.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm_arm import make_engine


def answer(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """How long it took, how many tokens came and were computed, and what each row says."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import StructuredOutputsParams

    params = [
        SamplingParams(
            temperature=0.0, max_tokens=job["new_tokens"], detokenize=False,
            structured_outputs=StructuredOutputsParams(json=schema),
        )
        for schema in job["schemas"]
    ]  # fmt: skip
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    begin = time.perf_counter()
    outputs = engine.generate(prompts, params, use_tqdm=False)
    return {
        "seconds": time.perf_counter() - begin,
        "computed": sum(
            len(output.prompt_token_ids) - (output.num_cached_tokens or 0) for output in outputs
        ),
        "answers": [
            [list(output.outputs[0].token_ids), output.outputs[0].finish_reason]
            for output in outputs
        ],
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    engine = make_engine(
        job, structured_outputs_config={"backend": "guidance", "disable_any_whitespace": True}
    )
    import vllm

    answer(engine, job | {"prompts": [job["warm_up"]], "schemas": job["schemas"][:1]})
    engine.reset_prefix_cache()
    line = {"engine": f"vllm {vllm.__version__}", **answer(engine, job)}
    Path(sys.argv[2]).write_text(json.dumps(line))


if __name__ == "__main__":
    main()
