"""Channels hold producers back and the first error ends everything."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.job.channel import Channel, Stages


def test_items_arrive_in_order_and_the_end_is_seen() -> None:
    with Stages() as stages:
        channel: Channel[int] = stages.channel(2)

        def produce() -> None:
            for number in range(50):
                channel.put(number)
            channel.finish()

        stages.start("producer", produce)
        assert list(channel) == list(range(50))


def test_a_full_channel_holds_its_producer_back() -> None:
    put: list[int] = []
    with Stages() as stages:
        channel: Channel[int] = stages.channel(3)

        def produce() -> None:
            for number in range(10):
                channel.put(number)
                put.append(number)
            channel.finish()

        stages.start("producer", produce)
        time.sleep(0.1)
        assert len(put) == 3
        assert len(list(channel)) == 10


def test_an_error_in_a_thread_reaches_the_caller_who_waits_for_items() -> None:
    def fail() -> None:
        raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"), Stages() as stages:
        channel: Channel[int] = stages.channel(1)
        stages.start("producer", fail)
        for _ in channel:
            pass


def test_an_error_in_the_caller_releases_a_blocked_producer() -> None:
    ended = threading.Event()

    with pytest.raises(KeyError), Stages() as stages:
        channel: Channel[int] = stages.channel(1)

        def produce() -> None:
            try:
                while True:
                    channel.put(1)
            finally:
                ended.set()

        stages.start("producer", produce)
        raise KeyError("caller")
    assert ended.is_set()


def test_the_first_of_two_errors_is_raised() -> None:
    first_failed = threading.Event()

    def fail_first() -> None:
        try:
            raise ValueError("first")
        finally:
            first_failed.set()

    with pytest.raises(ValueError, match="first"), Stages() as stages:
        channel: Channel[int] = stages.channel(1)

        def fail_later() -> None:
            stages.ended.wait(5)
            raise RuntimeError("second")

        stages.start("later", fail_later)
        stages.start("first", fail_first)
        first_failed.wait(5)
        for _ in channel:
            pass
