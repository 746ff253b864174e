"""The flows, by a name that no folder of a person's has: for deployments, and to be run.

`python -m kvcoppice.flows generate|audit|nightly|schedule` does one; prefect.yaml names them here.
"""

from kvcoppice.own_modules import load

load("pipeline", "flows")  # before anything is imported from them

from flows.__main__ import main  # noqa: E402
from flows.audit import audit  # noqa: E402
from flows.credentials import S3Credentials  # noqa: E402
from flows.generate import generate  # noqa: E402
from flows.nightly import nightly  # noqa: E402

__all__ = ["S3Credentials", "audit", "generate", "nightly"]

if __name__ == "__main__":
    main()
