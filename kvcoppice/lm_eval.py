"""lm-evaluation-harness and our model: `python -m kvcoppice.lm_eval --model coppice ...`.

The arguments are those of `lm_eval`, whose own command this is. The harness knows the models of its
own package and reads no entry points of others, so somebody has to register ours before it starts.
"""

from __future__ import annotations

import sys

from kvcoppice.own_modules import load

load("pipeline")  # before anything is imported from it

from pipeline.errors import CoppiceError, install_extra  # noqa: E402


def main() -> None:
    """Run the command. What coppice refuses is one sentence and its exit code."""
    try:
        import lm_eval.models  # noqa: F401  # which registers its own first
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        sys.exit(f"coppice: lm-evaluation-harness is not installed; {install_extra('eval')}")
    model_registry.register("coppice", target="kvcoppice.evaluation.model:CoppiceLM")
    try:
        cli_evaluate()
    except CoppiceError as error:
        print(f"coppice: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
