"""What a person can choose about documents: how they are reused, and when that is good enough."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from pipeline.forms import Section, Share, refuse_beside

if TYPE_CHECKING:
    from pipeline.settings import JobSettings

TRAINED = ("kvlink", "packet")
"""Modes with tokens of their own, which an adapter brings."""
_EPIC_TOKENS = 8
_BLEND_SHARE = 0.15


class ReuseSettings(Section):
    """`reuse`: "prefix" computes whole prompts, exactly; the other modes take documents from
    wherever they stood, see docs/segments.md. None: the default of `context`, `num_epic_tokens` and
    `share_to_blend`.

    `document_order`: "best" lists the documents of each row in the order in which rows share most.
    `calibration_rows` are computed in both ways before the run; where a lower bound of how many get
    the same answer is below `min_agreement`, or the divergence in nats above `max_kl`,
    `on_disagreement` says what to do.
    """

    reuse: Literal["prefix", "concat", "epic", "cacheblend", "kvlink", "packet"] = "prefix"
    epic_tokens: int | None = Field(default=None, ge=1)
    blend_share: Share | None = None
    adapter: Path | None = None
    document_context: Literal["preamble", "alone"] | None = None
    document_order: Literal["given", "best"] = "given"
    calibration_rows: int = Field(default=64, ge=0)
    min_agreement: Share = 0.9
    max_kl: float = Field(default=0.05, ge=0.0, allow_inf_nan=False)
    on_disagreement: Literal["fallback", "abort", "warn"] = "fallback"

    @property
    def moves_documents(self) -> bool:
        """Whether documents are reused at any position, not only where whole prompts agree."""
        return self.reuse != "prefix"

    @property
    def asks_for_documents(self) -> bool:
        """Whether the prompts must come in segments."""
        return self.moves_documents or self.document_order == "best"

    @property
    def context(self) -> Literal["preamble", "alone"]:
        """What stands before a document while it is encoded."""
        return self.document_context or ("alone" if self.reuse in TRAINED else "preamble")

    @property
    def num_epic_tokens(self) -> int:
        """Of each document, how many from its first on a row computes itself; 0 in other modes."""
        return (self.epic_tokens or _EPIC_TOKENS) if self.reuse == "epic" else 0

    @property
    def share_to_blend(self) -> float:
        """Of the tokens of its documents, how many a row computes itself; 0 in other modes."""
        if self.reuse != "cacheblend":
            return 0.0
        return _BLEND_SHARE if self.blend_share is None else self.blend_share

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        owners = {"epic_tokens": ("epic",), "blend_share": ("cacheblend",), "adapter": TRAINED}
        for name, modes in owners.items():
            if getattr(self, name) is not None and self.reuse not in modes:
                asked = " or ".join(modes)
                raise ValueError(
                    f"{name.replace('_', '-')} is for --reuse {asked}, and not for {self.reuse}"
                )
        if self.reuse in TRAINED and self.adapter is None:
            raise ValueError(
                f"--reuse {self.reuse} needs an --adapter; coppice segments trains one"
            )
        if self.document_context is not None and not self.moves_documents:
            raise ValueError("document-context says nothing with --reuse prefix; leave it out")
        return self


def check_reuse(job: JobSettings) -> None:
    """Raises ValueError where other settings contradict those of documents."""
    reuse, flag = job.reuse, f"--reuse {job.reuse.reuse}"
    if not reuse.moves_documents:
        if reuse.document_order == "best" and job.read.reorder_fields:
            raise ValueError("--document-order best and --reorder-fields exclude each other")
        return
    contradictions = {
        f"--engine {job.model.engine}": job.model.engine != "prefix",
        "--fidelity strict": job.engine.fidelity == "strict",
        "--executor ray": job.fleet.executor == "ray",
        "--num-shards": job.plan.num_shards > 1,
        "--template": job.read.template is not None,
        "--reorder-fields": job.read.reorder_fields,
        "--messages-column": job.read.messages_column is not None,
    }
    refuse_beside(flag, contradictions)
