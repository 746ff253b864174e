"""One sitting at a job: the engine answers the rows that are left, the writer commits them.

```
 engine (this thread) ──► channel ──► writer thread ──► parts       ticker thread ──► metrics.jsonl
```

The calling thread owns the engine. The first error in any stage stops all of them and is the one
raised; a slow writer holds the engine back through the channel. Knows nothing about text.
"""

from __future__ import annotations

import gc
import time
from concurrent.futures import Future
from dataclasses import asdict, astuple
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.base import Engine, EngineHooks, RunControl
from pipeline.errors import (
    CoppiceError,
    Interrupted,
    StorageError,
    TimeBudgetReached,
    TooManyDegenerate,
    TooManyFailedRows,
)
from pipeline.job.answers import AnswerWriter, grammars_of, stop_check
from pipeline.job.calibration import as_decided, calibrate
from pipeline.job.channel import Stages
from pipeline.job.committed_turns import CommittedTurns
from pipeline.job.notes import RunNotes, headline
from pipeline.job.observer import Observer, Snapshot
from pipeline.job.outcome import RunOutcome, count_job, count_reasons
from pipeline.job.planning import PlannedJob
from pipeline.job.recorded_plan import check_plan, write_plan
from pipeline.job.recycling import recycling
from pipeline.job.stopping import StopRequest
from pipeline.job.token_accounts import check_prefilled, check_tokens
from pipeline.job.watchdog import Watchdog
from pipeline.model.rates import remember_rates
from pipeline.storage.run_directory import RunDirectory

_COMPLETIONS_AHEAD = 256
_SHOW_EVERY_S = 0.5
_METRICS_EVERY_S = 5.0


class Session:
    """One call of `run_job` on a planned job and its open directory."""

    def __init__(
        self,
        planned: PlannedJob,
        directory: RunDirectory,
        observer: Observer,
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        planned = as_decided(planned, directory)
        self._planned = planned
        self._directory = directory
        self._observer = observer
        self._notes = RunNotes(planned, observer)
        self._stop = stop
        self._watchdog = watchdog
        self._started = time.monotonic()
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")
        done = np.ones(len(planned.ids), bool)
        done[planned.rows] = False
        self._sessions = directory.read_manifest()["sessions"]
        before = directory.done_rows()
        done[before] = True
        self._rows_before = len(before)
        self._sequences = planned.samples.sequences(planned.table_rows(np.flatnonzero(~done)))
        self._done = done
        self._committed = self._find_committed(done)
        self._writer = AnswerWriter(planned, directory, done, self._committed)

    def run(self, loading: Future[Engine]) -> RunOutcome:
        """Answer the rows that are left, then seal. The session is recorded however it ends."""
        engine: Engine | None = None
        try:
            is_written = check_plan(self._planned, self._directory)
            self._directory.update_manifest(status="running", notes=self._notes.kept)
            with self._watchdog.excused():
                loaded = loading.result()
            gc.freeze()  # the model's objects live on; a full collection over them costs a step
            with self._stop.listening():
                self._calibrate(loaded)
            engine = loaded
            if not is_written:
                write_plan(self._planned, self._directory)
            self._observer.say(headline(self._planned, self._rows_before, self._tokens_left))
            self._notes.tell(engine.notes)
            recycled = recycling(engine, self._planned, self._sequences, self._notes)
            with self._stop.listening(), recycled as connector:
                earlier = None if self._committed is None else self._committed.earlier
                hooks = EngineHooks(kv_connector=connector, earlier_turns=earlier)
                self._answer_rows(engine, hooks)
            self._check_tokens(engine)
            return self._complete(engine)
        except (TooManyFailedRows, TooManyDegenerate):
            raise  # the job is complete and recorded
        except BaseException as error:
            self._record_failure(engine, error)
            raise
        finally:
            gc.unfreeze()  # or nothing of it is ever freed, and libraries complain of it at exit
            self._observer.close()

    def _find_committed(self, done: NDArray[np.bool_]) -> CommittedTurns | None:
        """Of conversations that have begun; those that have failed are not run."""
        self._ended = np.zeros(0, np.int64)
        if self._planned.plan.conversations is None:
            return None
        committed = CommittedTurns(self._planned.plan, self._directory, done)
        has_ended = committed.ended(self._sequences)
        self._ended, self._sequences = self._sequences[has_ended], self._sequences[~has_ended]
        return committed

    def _calibrate(self, engine: Engine) -> None:
        """Decide whether documents are reused; what that takes is not of the session's counters."""
        stalled: list[BaseException] = []
        with self._watchdog.following(lambda: astuple(engine.counters), stalled.append):
            directory, control = self._directory, self._control()
            decided = calibrate(engine, self._planned, directory, control, self._observer)
        if stalled:
            raise stalled[0]
        if decided is None:
            raise self._stop.reason(self._rows_left)
        if decided is not self._planned:
            self._planned = decided
            self._writer = AnswerWriter(decided, directory, self._done)

    def _control(self) -> RunControl:
        return RunControl(
            self._stop.should_drain,
            lambda: self._stop.should_abort() or self._watchdog.has_fired,
            stop_check(self._planned.job.tokenizer.answers),
            grammars_of(self._planned),
        )

    def _answer_rows(self, engine: Engine, hooks: EngineHooks) -> None:
        """Returns when every answer is committed.

        Raises Interrupted, TimeBudgetReached or Stalled.
        """
        control, stages = self._control(), Stages()
        with self._watchdog.following(lambda: self._pulse(engine), stages.cancel), stages:
            per_part = self._planned.job.settings.write.rows_per_part
            completions = stages.channel(min(_COMPLETIONS_AHEAD, per_part))

            def write() -> None:
                self._writer.add_rejected()
                self._writer.add_ended(self._ended)
                for completion in completions:
                    self._writer.add(completion)
                self._writer.flush()

            stages.start("writer", write)
            stages.start("ticker", lambda: self._tick(stages, engine))
            plan, sequences = self._planned.plan, self._sequences
            for completion in engine.generate(plan, sequences, control, hooks):
                completions.put(completion)
            if self._stop.should_abort():
                raise self._stop.reason(self._rows_left)
            completions.finish()
        self._observer.show(self._snapshot(engine))
        if self._rows_left and self._stop.should_drain():
            raise self._stop.reason(self._rows_left)

    def _pulse(self, engine: Engine) -> object:
        """Steps of the device, answers, parts: what moves while rows are answered."""
        return astuple(engine.counters), astuple(self._writer.counts)

    @property
    def _tokens_left(self) -> int:
        """Unique tokens of the sequences that this session runs."""
        return self._planned.plan.tokens_to_compute(self._sequences)

    @property
    def _rows_done(self) -> int:
        return self._rows_before + self._writer.counts.ok + self._writer.counts.failed

    @property
    def _rows_left(self) -> int:
        return len(self._planned.rows) - self._rows_done

    def _tick(self, stages: Stages, engine: Engine) -> None:
        """Show the state twice a second and note it in metrics.jsonl now and then."""
        noted_at = self._started
        while not stages.ended.wait(_SHOW_EVERY_S):
            snapshot = self._snapshot(engine)
            self._observer.show(snapshot)
            if time.monotonic() - noted_at >= _METRICS_EVERY_S:
                noted_at = time.monotonic()
                self._note(snapshot)

    def _note(self, snapshot: Snapshot) -> None:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self._directory.append_metrics({"at": at, **asdict(snapshot), **snapshot.rates()})

    def _snapshot(self, engine: Engine) -> Snapshot:
        counters = engine.counters
        return Snapshot(
            rows_total=len(self._planned.rows),
            rows_done=self._rows_done,
            rows_failed=self._writer.counts.failed,
            rows_before=self._rows_before,
            prefilled_tokens=counters.prefilled_tokens,
            saved_tokens=self._writer.counts.cached_tokens,
            generated_tokens=counters.generated_tokens,
            prefill_s=counters.prefill_s,
            decode_s=counters.decode_s,
            elapsed_s=time.monotonic() - self._started,
            evictions=self._writer.counts.evictions,
            degenerate=self._writer.counts.degenerate,
            scored_requests=self._writer.counts.scored_requests,
            scored_tokens=self._writer.counts.scored_tokens,
        )

    def _check_tokens(self, engine: Engine) -> None:
        """Where no row failed: what was computed, of a job that was there in part what was left."""
        rejected = np.count_nonzero(~self._done[list(self._planned.rejected)])
        has_failed = self._writer.counts.failed > rejected
        if not engine.capabilities.computes_once or has_failed:
            return
        if not self._rows_before:
            check_tokens(self._planned, self._writer.counts, engine.counters)
        elif self._planned.plan.conversations is None:  # turns before are computed again
            check_prefilled(self._tokens_left, engine.counters)

    def _complete(self, engine: Engine) -> RunOutcome:
        """Count, record and seal. Raises StorageError, TooManyFailedRows, TooManyDegenerate."""
        rows, settings = len(self._planned.rows), self._planned.job.settings
        counters = self._record(engine, "complete")
        if counters["rows_ok"] + counters["rows_error"] != rows:
            raise StorageError(
                f"{rows} rows went in, but {counters['rows_ok']} answers and "
                f"{counters['rows_error']} errors are committed"
            )
        self._note(self._snapshot(engine))
        self._directory.seal(self._planned.rows)
        if engine.capabilities.measures_rates:
            identity = self._directory.read_manifest()["fingerprint"]
            saves_from = engine.capabilities.saves_from
            remember_rates(settings.model, identity, asdict(engine.counters), saves_from)
        reasons = count_reasons(self._directory) if counters["rows_error"] else {}
        told = (*self._notes.kept, *engine.notes)
        outcome = RunOutcome(self._directory.name, counters, False, reasons, settings.cost, told)
        outcome.check(settings)
        return outcome

    def _record_failure(self, engine: Engine | None, error: BaseException) -> None:
        """Note how the session ended; the disk that broke it may refuse that too.

        What breaks after the seal changes nothing about a job that is complete and says so.
        """
        if self._directory.is_sealed:
            return
        stopped = isinstance(error, KeyboardInterrupt | Interrupted | TimeBudgetReached)
        try:
            if engine is not None:
                self._record(engine, type(error).__name__)
            self._directory.update_manifest(status="stopped" if stopped else "failed")
        except (OSError, CoppiceError) as second:
            error.add_note(f"nor could the end of the session be recorded: {second}")

    def _record(self, engine: Engine, end: str) -> dict[str, float]:
        """Write this session into run.json, with the sums over all of them; returns the sums.

        A session that fails while it seals is recorded again, in the place of its first record.
        """
        counters = asdict(engine.counters)
        session = counters | {
            "started_at": self._started_at,
            "wall_s": time.monotonic() - self._started,
            "unique_tokens": self._tokens_left,
            "rows_ok": self._writer.counts.ok,
            "rows_error": self._writer.counts.failed,
            "end": end,
        }
        sessions = [*self._sessions, session]
        sums = count_job(self._planned, self._directory, sessions)
        capabilities = asdict(engine.capabilities)
        named = {"name": engine.name, "notes": engine.notes, "capabilities": capabilities}
        ended = {"sessions": sessions, "counters": sums, "engine": named}
        self._directory.update_manifest(**ended, notes=self._notes.kept)
        return sums
