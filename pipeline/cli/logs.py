"""Where the command's own words go: lines for a person, or one JSON object a line for a collector.

Both on stderr. Counts, rates, names of files and rows; never prompts or answers.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Any, TextIO

from pythonjsonlogger.json import JsonFormatter

from pipeline.cli.progress import BarObserver, PlainObserver, plain_line, planning_line
from pipeline.errors import CoppiceError
from pipeline.job.observer import Observer, Planning, SilentObserver, Snapshot
from pipeline.visible import visible, visible_json

_logger = logging.getLogger("coppice")
_OURS = ("coppice", "pipeline", "kvcoppice", "flows")


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what stderr is at the moment, not what it was at the start."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        """Keep none."""


def log_to_stderr(log_format: str = "text") -> str:
    """Send the log to stderr as `text` or `json`, and return which; the last call counts."""
    handler = _Stderr()
    handler.setFormatter(
        _json_formatter() if log_format == "json" else _TextFormatter("coppice: %(message)s")
    )
    for before in [own for own in _logger.handlers if isinstance(own, _Stderr)]:
        _logger.removeHandler(before)
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO if log_format == "json" else logging.WARNING)
    _logger.propagate = False
    logging.setLogRecordFactory(_record_of_others)
    return log_format


def _record_of_others(name: str, *args: Any, **fields: Any) -> logging.LogRecord:
    """What a library logs by a handler of its own may quote a file of anybody's."""
    record = logging.LogRecord(name, *args, **fields)
    if name.partition(".")[0] not in _OURS:
        with suppress(Exception):  # a message and arguments that do not fit are not ours to judge
            record.msg, record.args = visible(record.getMessage(), lines=True), None
    return record


def log_error(error: CoppiceError) -> None:
    """The last line of a command that failed."""
    fields = {"event": "error", "error": type(error).__name__, "exit_code": error.exit_code}
    _logger.error("%s", error, extra=fields)


class _TextFormatter(logging.Formatter):
    """One line a record."""

    def format(self, record: logging.LogRecord) -> str:
        """What others wrote acts on no terminal and begins no line."""
        return visible(super().format(record))


class _JsonFormatter(JsonFormatter):
    """The same as one object."""

    def format(self, record: logging.LogRecord) -> str:
        """What others wrote acts on no terminal."""
        return visible_json(super().format(record))


def _json_formatter() -> logging.Formatter:
    return _JsonFormatter(
        ["levelname", "event", "message"],
        rename_fields={"levelname": "level"},
        defaults={"event": "log"},
        timestamp="at",
        json_ensure_ascii=False,
    )


class JsonObserver(PlainObserver):
    """What is said, and every 30 s the state with all its numbers, as log records."""

    def say(self, line: str) -> None:
        _logger.info("%s", line, extra={"event": "say"})

    def note(self, line: str, is_warning: bool = False) -> None:
        level = logging.WARNING if is_warning else logging.INFO
        _logger.log(level, "%s", line, extra={"event": "note"})

    def show_planning(self, planning: Planning) -> None:
        if self.is_due():
            numbers = {**asdict(planning), "eta_s": planning.eta_s}
            _logger.info("%s", planning_line(planning), extra={"event": "planning", **numbers})

    def show(self, snapshot: Snapshot) -> None:
        if self.is_due():
            numbers = {**asdict(snapshot), **snapshot.rates(), "eta_s": snapshot.eta_s}
            _logger.info("%s", plain_line(snapshot), extra={"event": "progress", **numbers})


def make_observer(mode: str, log_format: str = "text") -> Observer:
    """`none`, `plain`, or `auto`: a bar on a terminal, plain lines elsewhere; records in a log."""
    if mode == "none":
        return SilentObserver()
    if log_format == "json":
        return JsonObserver()
    return BarObserver() if mode == "auto" and sys.stderr.isatty() else PlainObserver()
