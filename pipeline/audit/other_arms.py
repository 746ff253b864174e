"""The audit's other arms on some of its rows: which rows, which positions, which planted faults.

A model whose run shared nothing (the naive engine) has no arms: there is nothing to compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from pipeline.audit.evidence import NO_EVIDENCE, ArmSummary, Evidence, PlantedFault
from pipeline.audit.replay import BARS, AuditInput, Tier, audit_row
from pipeline.engine.base import Baseline, Deviation
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.verify import arms
from pipeline.engine.verify.planted_faults import (
    FAULTS,
    Fault,
    write_segments_with_fault,
    write_with_fault,
)
from pipeline.engine.verify.segment_baseline import SegmentBaselines
from pipeline.engine.verify.segment_faults import SEGMENT_FAULTS
from pipeline.engine.verify.stateful_baseline import EvictionBaselines
from pipeline.engine.verify.stateful_faults import EVICTION_FAULTS
from pipeline.engine.verify.story import Story
from pipeline.engine.verify.told import answer_with_fault
from pipeline.model.model import LoadedModel
from pipeline.records import Completion, FinishReason, SamplingParams
from pipeline.settings import EngineSettings

_MOST_POSITIONS = 32  # of an answer that are compared
_MOST_LOGIT_BYTES = 512 << 20
_FAULT_ROWS = 4
_ROWS_A_FAULTY_GROUP = 8  # of those that are computed in other ways
_FAULT_TOKENS = 16
_GREEDY = SamplingParams(max_new_tokens=_FAULT_TOKENS)


class Arms:
    """Runs the arms on audited rows. Afterwards `kl` of each is known, and where documents were
    reused or tokens given up `attention`, how far that is from full attention."""

    def __init__(
        self,
        loaded: LoadedModel,
        baseline: Baseline,
        settings: EngineSettings,
        tier: Tier,
        unrounded: LoadedModel | None = None,
        modes: arms.ModeBaselines | None = None,
    ) -> None:
        """`unrounded`: the model as it was saved, where `loaded` holds its weights in int8;
        `modes`: baselines of the mode in which documents were reused, or of what was given up.

        Raises ModelError for a model whose KV cannot be shared.
        """
        self._engine = PrefixEngine(loaded, settings)
        self._baseline = baseline
        self._unrounded = unrounded
        self._modes = modes
        self._bars = BARS[tier]
        self.kl: dict[int, float] = {}
        self.attention: dict[int, Deviation] = {}

    def gather(
        self, rows: Sequence[AuditInput], groups: Sequence[int | None], some: Sequence[int]
    ) -> Evidence:
        """The arms on `some` of `rows`, faults in their largest `groups`. Raises EngineError."""
        vocabulary = self._engine.loaded.shape.vocabulary_size  # two arms' logits are in memory
        most_rows = max(1, _MOST_LOGIT_BYTES // (2 * 4 * _MOST_POSITIONS * vocabulary))
        fitting = [rows[i] for i in some if rows[i].output][:most_rows]
        if not fitting:
            return NO_EVIDENCE
        num_groups = max(1, len(some) // _ROWS_A_FAULTY_GROUP)
        faults = self._faults(rows, groups, num_groups)
        is_strict = self._engine.settings.fidelity == "strict"
        same_bits = arms.same_bits_alone(self._engine, _forced(fitting)) if is_strict else []
        weights, attention = self._weights(fitting), self._attention(fitting)
        by_age = self._by_age(fitting)
        return Evidence(self._arms(fitting), faults, same_bits, weights, attention, by_age)

    def _arms(self, rows: Sequence[AuditInput]) -> dict[str, ArmSummary]:
        found = {}
        for name, deviations in arms.compare_arms(self._engine, _forced(rows), self._modes):
            found[name] = ArmSummary.of(deviations)
            if name == "product":
                worst = [float(deviation.kl.max()) for deviation in deviations]
                self.kl = dict(zip((row.row_index for row in rows), worst, strict=True))
        return found

    def _weights(self, rows: Sequence[AuditInput]) -> ArmSummary | None:
        if self._unrounded is None:
            return None
        loaded = self._engine.loaded
        return ArmSummary.of(arms.compare_weights(loaded, self._unrounded, _forced(rows)))

    def _attention(self, rows: Sequence[AuditInput]) -> ArmSummary | None:
        """Of rows that full attention can see whole, and of which it sees more."""
        modes = self._modes
        if isinstance(modes, EvictionBaselines):
            window = modes.eviction.window
            rows = [
                row for row in rows
                if row.story is not None and row.story.log and len(row.story.ids) <= window
            ]  # fmt: skip
        if modes is None or not rows:
            return None
        deviations = arms.compare_attention(modes, _forced(rows))
        indices = (row.row_index for row in rows)
        self.attention = dict(zip(indices, deviations, strict=True))
        return ArmSummary.of(deviations)

    def _by_age(self, rows: Sequence[AuditInput]) -> dict[int, ArmSummary]:
        """What `_attention` found, by how many turns ago the newest token was that went."""
        found: dict[int, list[Deviation]] = {}
        for row in rows:
            age = None if row.story is None else row.story.turns_since_gone
            if age is not None and row.row_index in self.attention:
                found.setdefault(age, []).append(self.attention[row.row_index])
        return {age: ArmSummary.of(deviations) for age, deviations in found.items()}

    def _eviction_faults(
        self, rows: Sequence[AuditInput], modes: EvictionBaselines
    ) -> list[PlantedFault]:
        """Each fault in turns before which tokens were given up."""
        chosen = [row for row in rows if row.story is not None and row.story.log][: 2 * _FAULT_ROWS]
        stories = [row.story for row in chosen if row.story is not None]
        found, clean = [], list[AuditInput | None]()
        for fault in (None, *EVICTION_FAULTS):
            told = answer_with_fault(self._engine, stories, modes.eviction, _FAULT_TOKENS, fault)
            written = [self._told(*each) for each in zip(chosen, told, strict=True)]
            if fault is None:
                clean = written
                continue
            outputs = [[row and row.output for row in some] for some in (written, clean)]
            caught = not all(row is not None and self._passes(row) for row in written)
            found.append(PlantedFault(fault, 0, outputs[0] != outputs[1], caught))
        return found

    def _told(self, row: AuditInput, story: Story | None) -> AuditInput | None:
        """The row with the last answer of its story; None where the engine stopped by itself."""
        if story is None:
            return None
        answer, params = tuple(story.turns[-1].answer), _GREEDY
        eos = frozenset(self._engine.loaded.shape.eos_token_ids)
        reason: FinishReason = "stop" if answer[-1] in eos else "length"
        return AuditInput(
            row.row_index, row.prompt, answer, params, reason, eos_token_ids=eos, story=story
        )

    def _segment_faults(
        self, rows: Sequence[AuditInput], modes: SegmentBaselines
    ) -> list[PlantedFault]:
        """Each fault in rows with most documents."""
        chosen = sorted(rows, key=lambda row: -len(row.lengths))[: 2 * _FAULT_ROWS]
        given = [(row.prompt, row.lengths) for row in chosen]
        found, reuse, clean = [], modes.reuse, list[AuditInput]()
        for fault in (None, *SEGMENT_FAULTS):
            done = write_segments_with_fault(self._engine, given, reuse, _FAULT_TOKENS, fault)
            written = self._written(chosen, done)
            if fault is None:
                clean = written
                continue
            changed = any(a.output != b.output for a, b in zip(written, clean, strict=True))
            found.append(PlantedFault(fault, 0, changed, not all(map(self._passes, written))))
        return found

    def _faults(
        self, rows: Sequence[AuditInput], groups: Sequence[int | None], num_groups: int
    ) -> list[PlantedFault]:
        """Each fault at three places of the prefixes that rows of the largest groups share."""
        if isinstance(self._modes, SegmentBaselines):
            return self._segment_faults(rows, self._modes)
        if self._modes is not None:
            return self._eviction_faults(rows, self._modes)
        found = []
        for prompts in _prompts_by_group(rows, groups)[:num_groups]:
            shared = _common_prefix(prompts)
            clean = self._write(prompts, None, 0)
            for fault, at in product(FAULTS, sorted({shared // 3, 2 * shared // 3, shared - 1})):
                spoilt = self._write(prompts, fault, at)
                changed = any(a.output != b.output for a, b in zip(spoilt, clean, strict=True))
                caught = not all(map(self._passes, spoilt))
                found.append(PlantedFault(fault, at, changed, caught))
        return found

    def _write(
        self, prompts: Sequence[Sequence[int]], fault: Fault | None, at: int
    ) -> list[AuditInput]:
        """Answers as the audit would find them."""
        done = write_with_fault(self._engine, prompts, _FAULT_TOKENS, fault, at)
        rows = [AuditInput(i, prompt, (), _GREEDY, "length") for i, prompt in enumerate(prompts)]
        return self._written(rows, done)

    def _written(self, rows: Sequence[AuditInput], done: Sequence[Completion]) -> list[AuditInput]:
        """The rows with these answers; one that failed has no tokens."""
        eos = frozenset(self._engine.loaded.shape.eos_token_ids)
        return [
            AuditInput(
                row.row_index, row.prompt, answer.token_ids, _GREEDY, answer.finish_reason,
                eos_token_ids=eos, lengths=row.lengths,
            )
            for row, answer in zip(rows, done, strict=True)
        ]  # fmt: skip

    def _passes(self, row: AuditInput) -> bool:
        if not row.output:
            return False
        baseline = self._baseline if self._modes is None else self._modes.of_row(row)
        return audit_row(baseline, row, self._bars).row_class in ("identical", "near_tie")


def _forced(rows: Sequence[AuditInput]) -> list[arms.ForcedRow]:
    forced = []
    for row in rows:
        output = row.output[:_MOST_POSITIONS]
        story = None if row.story is None else row.story.answering(output)
        forced.append(
            arms.ForcedRow(row.prompt, output, row.params, row.noise_key, row.lengths, story)
        )
    return forced


def _prompts_by_group(
    rows: Sequence[AuditInput], groups: Sequence[int | None]
) -> list[list[Sequence[int]]]:
    """Distinct prompts of each group, those that share most tokens first; without one, one each."""
    prompts: dict[int, list[Sequence[int]]] = {}
    for index, (row, group) in enumerate(zip(rows, groups, strict=True)):
        known = prompts.setdefault(-1 - index if group is None else group, [])
        if len(known) < _FAULT_ROWS and row.prompt not in known and len(row.prompt) > 2:
            known.append(row.prompt)
    found = [known for known in prompts.values() if known and _common_prefix(known) > 0]
    return sorted(found, key=lambda known: -_common_prefix(known) * (len(known) - 1))


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens, but never all of the shortest prompt."""
    shortest = min(map(len, prompts)) - 1
    return next(
        (i for i in range(shortest) if len({prompt[i] for prompt in prompts}) > 1), shortest
    )
