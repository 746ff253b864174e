"""A backend of lm-evaluation-harness: see docs/evaluation.md. `model` imports the harness."""

from kvcoppice.own_modules import check

check()  # before anything is imported from it
