"""Signals to a run of one process."""

import os
import signal
import threading

import pytest

from framepack_jax.parallel.multihost import Terminated
from framepack_jax.training import stop_signal
from framepack_jax.training.stop_signal import Stopped, StopSignal

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def not_ignored():
    """SIGHUP as in a terminal, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_signal_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop, stop.unsaved():
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.called()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
)
def test_a_signal_waits_for_what_is_not_saved(number, code) -> None:
    before = [signal.getsignal(each) for each in NUMBERS]
    with StopSignal() as stop:
        with stop.unsaved():
            stop.check()
            assert not stop.called()
            os.kill(os.getpid(), number)
            assert stop.called() and stop.exit_code == code
            with pytest.raises(Stopped):
                stop.check()
            # A second one changes nothing.
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.exit_code == code
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Terminated):
            os.kill(os.getpid(), number)
    assert [signal.getsignal(each) for each in NUMBERS] == before


def test_a_run_can_be_asked_to_stop() -> None:
    with StopSignal() as stop:
        stop.request()
        assert stop.called() and stop.received is None and stop.exit_code == 143


@pytest.mark.parametrize(("unsaved", "seconds"), [(True, 0.05), (False, 600)])
def test_a_process_leaves_in_time(monkeypatch, capsys, unsaved, seconds) -> None:
    """While something is not saved, after the seconds that were given; else soon, whatever was."""
    left, codes = threading.Event(), []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), left.set()))
    monkeypatch.setattr(stop_signal, "LEAVE_SECONDS", 600 if unsaved else 0.05)
    with StopSignal(seconds) as stop:
        if unsaved:
            with stop.unsaved():
                os.kill(os.getpid(), signal.SIGTERM)
                assert left.wait(60)
        else:
            with pytest.raises(Terminated):
                os.kill(os.getpid(), signal.SIGTERM)
            assert left.wait(60)
    assert codes == [143] and stop_signal.INTERRUPTED in capsys.readouterr().err


def test_without_a_limit_saving_takes_what_it_takes(monkeypatch) -> None:
    left = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: left.set())
    monkeypatch.setattr(stop_signal, "LEAVE_SECONDS", 0.01)
    with StopSignal(0) as stop, stop.unsaved():
        os.kill(os.getpid(), signal.SIGTERM)
        assert not left.wait(0.2) and stop.called()
