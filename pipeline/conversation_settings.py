"""What a person can choose about conversations: which rows are turns, and what is given up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, Self

from pydantic import Field, model_validator

from pipeline.forms import Section, Share, flag_of, refuse_beside

if TYPE_CHECKING:
    from pipeline.settings import JobSettings

_OF_GIST = ("gist", "gist-recent")
_BY_TURNS = ("window", "oldest", "gist-recent", "sink-recent")
"""Evictors that whole turns leave oldest first."""
_OF_EVICTION = (
    "budget_tokens", "evict_to", "sink_tokens", "gist_tokens", "evict_unit", "positions", "on_full",
)  # fmt: skip


class ConversationSettings(Section):
    """Rows are turns of conversations where a column of one of the two kinds is named; the other
    one is found by its usual name.

    `evict`: what goes where a history does not fit `budget_tokens` (None: 0.9 of the model's
    window), down to the share `evict_to` of it. `sink_tokens`, `gist_tokens`: the first of a
    conversation that stay (None: 4, 512). `on_full` "error": a turn that needs eviction fails.
    `max_degenerate`: the most turns that may repeat themselves.
    """

    conversation_column: str | None = None
    turn_column: str | None = None
    evict: Literal[
        "none", "window", "oldest", "gist", "gist-recent", "sink-recent", "attention-top", "h2o",
        "snapkv", "random",
    ] = "none"  # fmt: skip
    budget_tokens: int | None = Field(default=None, ge=1)
    evict_to: Share = 0.75
    sink_tokens: int | None = Field(default=None, ge=0)
    gist_tokens: int | None = Field(default=None, ge=1)
    evict_unit: Literal["token", "turn"] = "token"
    positions: Literal["auto", "gap", "rerotate"] = "auto"
    on_full: Literal["evict", "error"] = "evict"
    max_degenerate: Share | None = None

    @property
    def has_turns(self) -> bool:
        """Whether rows are turns of conversations."""
        return self.conversation_column is not None or self.turn_column is not None

    @property
    def evicts(self) -> bool:
        """Whether a history that does not fit gives up tokens."""
        return self.evict != "none"

    @property
    def num_sink_tokens(self) -> int:
        """Of the evictors that keep some beside what is recent."""
        return 4 if self.sink_tokens is None else self.sink_tokens

    @property
    def num_gist_tokens(self) -> int:
        return self.gist_tokens or 512

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        said = [name for name, field in type(self).model_fields.items()
                if getattr(self, name) != field.default]  # fmt: skip
        if not self.has_turns and said:
            raise ValueError(
                f"{flag_of(said[0])} is for conversations; name their --conversation-column"
            )
        idle = [name for name in said if name in _OF_EVICTION]
        if not self.evicts and idle:
            raise ValueError(
                f"{flag_of(idle[0])} says nothing with --evict none; choose an evictor"
            )
        self._check_evictor()
        if not 0 < self.evict_to < 1:
            raise ValueError("--evict-to must lie between 0 and 1, like 75%")
        return self

    def _check_evictor(self) -> None:
        """Raises ValueError for what another evictor is asked."""
        if self.sink_tokens is not None and self.evict != "sink-recent":
            raise ValueError(f"--sink-tokens is for --evict sink-recent, and not for {self.evict}")
        if self.gist_tokens is not None and self.evict not in _OF_GIST:
            raise ValueError(
                f"--gist-tokens is for --evict {' or '.join(_OF_GIST)}, and not for {self.evict}"
            )
        if self.evict_unit == "turn" and self.evict not in _BY_TURNS:
            raise ValueError(
                f"--evict-unit turn drops whole turns, oldest first, which --evict {self.evict} "
                "does not; leave one of the two out"
            )


NO_CONVERSATIONS: Final = ConversationSettings()


def check_conversations(job: JobSettings) -> None:
    """Raises ValueError where other settings contradict those of conversations."""
    asked = job.conversations
    if not asked.has_turns:
        if job.engine.spill_memory is not None:
            raise ValueError(
                "--spill-memory is for conversations; name their --conversation-column"
            )
        return
    never = {
        f"--reuse {job.reuse.reuse}": job.reuse.moves_documents,
        "--document-order best": job.reuse.document_order == "best",
        "--segments-column": job.read.segments_column is not None,
        "--documents-column": job.read.documents_column is not None,
        "--reorder-fields": job.read.reorder_fields,
        f"--on-overlong {job.plan.on_overlong}": job.plan.on_overlong != "error",
        f"--n {job.sampling.n}": (job.sampling.n or 1) > 1,
        "--explode": job.write.explode,
    }
    evicting = {
        f"--engine {job.model.engine}": job.model.engine != "prefix",
        "--fidelity strict": job.engine.fidelity == "strict",
    }
    column = "conversation_column" if asked.conversation_column is not None else "turn_column"
    refuse_beside(flag_of(column), never)
    if asked.evicts:
        refuse_beside(f"--evict {asked.evict}", evicting)
