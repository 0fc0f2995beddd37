"""Signals between steps."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from ricciq.system.distributed import World
from ricciq.system.interrupts import (
    SIGNALS,
    Stopped,
    interrupt_on_signals,
    stopping_between_steps,
)


@pytest.fixture(autouse=True)
def _as_from_a_terminal():
    """Handlers as at first, and restored: the tests may run under nohup."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
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
    before = [signal.getsignal(number) for number in SIGNALS]
    with stopping_between_steps(World()):
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_signals_interrupt_but_for_those_that_are_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does with a job in its background
    interrupt_on_signals()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    with stopping_between_steps(World()) as stopping:
        os.kill(os.getpid(), signal.SIGHUP)
        assert list(stopping.watch(range(2))) == [0, 1]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    interrupt_on_signals()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGHUP)


def test_other_threads_train_without_handlers():
    seen = []

    def work():
        with stopping_between_steps(World()) as stopping:
            seen.extend(stopping.watch(range(3)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0, 1, 2]
