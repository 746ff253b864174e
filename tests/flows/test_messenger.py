"""Calls in their order, that keep nobody waiting and whose faults cost nothing."""

from __future__ import annotations

import contextvars
import threading
import time

from flows.messenger import Messenger

_name = contextvars.ContextVar("_name", default="nobody")


def test_calls_are_made_in_order_in_the_context_of_who_made_it() -> None:
    _name.set("the night")
    seen: list[object] = []
    messenger = Messenger(seen.append)
    messenger.send(lambda: seen.append(_name.get()))
    messenger.send(lambda: seen.append(2))
    messenger.finish(10.0)
    assert seen == ["the night", 2]


def test_a_slow_call_keeps_nobody_waiting() -> None:
    """Seen red: with calls made by `send` itself."""
    end, seen = threading.Event(), list[int]()
    messenger = Messenger(lambda error: None)
    started = time.monotonic()
    messenger.send(end.wait)
    messenger.send(lambda: seen.append(1))
    assert not messenger.is_free
    messenger.finish(0.05)
    assert time.monotonic() - started < 5 and not seen
    end.set()


def test_the_first_fault_is_told_and_the_next_calls_are_made() -> None:
    """Seen red: with the loop outside of `try`."""
    told: list[Exception] = []
    messenger, seen = Messenger(told.append), list[int]()
    messenger.send(lambda: 1 / 0)
    messenger.send(lambda: 1 / 0)
    messenger.send(lambda: seen.append(3))
    messenger.finish(10.0)
    assert [type(error) for error in told] == [ZeroDivisionError] and seen == [3]
