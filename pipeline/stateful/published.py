"""What others report of keeping less KV, to stand beside our figures. Theirs, not measured here."""

from __future__ import annotations

REPORTED = [
    ("StreamingLLM (2309.17453)",
     "stable to 4 million tokens with four sinks; up to 22.2 times faster than recomputing the "
     "window"),
    ("H2O (2306.14048)",
     "a fifth of the cache on OPT; up to 29 times the throughput of two systems, 3 times that of "
     "FlexGen"),
    ("SnapKV (2404.14469)", "3.6 times faster decoding, 8.2 times less memory at 16k tokens"),
    ("KV-Fold (2605.12471)", "152 of 152 needles at 16k to 128k tokens, all KV carried"),
    ("llama.cpp pull request 27583", "perplexity 6.31 to 6.48 with a window of 1,024"),
]  # fmt: skip
"""(source, what it says)."""
