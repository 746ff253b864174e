"""A Hugging Face folder as OpenVINO IR: `python openvino_export.py MODEL OUTPUT`.

Imports nothing of this repository. Weights keep the dtype that they have: no compression.
"""

from __future__ import annotations

import sys

from optimum.exporters.openvino import main_export


def main() -> None:
    model, output = sys.argv[1:]
    main_export(
        model, output, task="text-generation-with-past", local_files_only=True,
        convert_tokenizer=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
