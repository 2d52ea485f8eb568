"""Signals are remembered, and not for ever."""

import os
import signal
import threading
from collections.abc import Callable

import pytest

from sward.training.interruption import Interruption


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered_and_handlers_come_back(sent: signal.Signals) -> None:
    before = signal.getsignal(sent)
    with Interruption() as interruption:
        assert interruption.agreed() is None
        os.kill(os.getpid(), sent)
        assert interruption.agreed() is sent
    assert signal.getsignal(sent) == before


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])  # a shell's background ignores it
def test_a_second_ctrl_c_ends_at_once(before: Callable | signal.Handlers) -> None:
    outside = signal.signal(signal.SIGINT, before)
    try:
        _second_ctrl_c()
    finally:
        signal.signal(signal.SIGINT, outside)


def _second_ctrl_c() -> None:
    with Interruption():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_under_torchrun_which_repeats_it_ctrl_c_is_still_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with Interruption() as interruption:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert interruption.agreed() is signal.SIGINT


def test_another_thread_than_the_main_one_may_train() -> None:
    seen: list[object] = []

    def work() -> None:
        with Interruption() as interruption:
            seen.append(interruption.agreed())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
