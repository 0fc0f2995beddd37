"""Signals between steps."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from ricciq.system.distributed import World
from ricciq.system.interrupts import Stopped, stopping_between_steps


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_current_item_is_finished(number):
    finished = []

    def work(stopping):
        for item in stopping.watch(range(5)):
            if item == 2:
                os.kill(os.getpid(), number)
            finished.append(item)

    with stopping_between_steps(World()) as stopping, pytest.raises(Stopped):
        work(stopping)
    assert finished == [0, 1, 2]


def test_a_second_signal_stops_at_once():
    finished = []

    def work(stopping):
        for item in stopping.watch(range(5)):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            finished.append(item)

    with stopping_between_steps(World()) as stopping, pytest.raises(KeyboardInterrupt) as caught:
        work(stopping)
    assert caught.type is KeyboardInterrupt
    assert finished == []


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stopping_between_steps(World()):
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_other_threads_train_without_handlers():
    seen = []

    def work():
        with stopping_between_steps(World()) as stopping:
            seen.extend(stopping.watch(range(3)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0, 1, 2]
