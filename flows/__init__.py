"""Thin Prefect adapters around `pipeline`. A task is a piece of many minutes, never a row.

Tasks pass paths and small dicts only, so that no prompt and no answer ever reaches Prefect's
database. Nothing imports this package, and `pipeline` does not know Prefect.
"""

import os

from kvcoppice.own_modules import load

load("pipeline")  # ours, also beside a pipeline.py of a person's

# Before the first import of prefect, which reads them once.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
