"""The time of a run by kind of work, over lives that end at any step."""

import time

import jax
import numpy as np
import pytest

from framepack_jax.training import goodput, host_times
from framepack_jax.training.goodput import KINDS, Life, summarize
from framepack_jax.training.host_times import HostTimes
from framepack_jax.training.host_times import summarize as summarize_hosts


def life(began: float, ended: float, first: int, last: int, **seconds: float) -> dict:
    return {
        "began": began, "ended": ended, "first": first, "last": last,
        "seconds": dict.fromkeys(KINDS, 0.0) | seconds,
    }  # fmt: skip


def test_steps_that_a_later_life_takes_again_are_lost() -> None:
    lives = [
        life(0, 100, 0, 10, load=10, compile=10, step=80),
        # From a checkpoint of step 5, after half a minute.
        life(130, 200, 5, 8, load=10, step=60),
        life(210, 300, 8, 20, load=30, step=60),
    ]
    found = summarize(lives)
    assert found["lost"] == 40 and found["step"] == 40 + 60 + 60
    assert found["down"] == 30 + 10 and found["load"] == 50
    assert goodput.goodput(found) == pytest.approx(160 / 300)


def test_steps_may_be_lost_over_several_lives() -> None:
    """The second life falls back further than the first has begun."""
    lives = [
        life(0, 10, 0, 10, step=10),
        life(10, 20, 10, 20, step=10),
        life(20, 30, 0, 10, step=10),
    ]
    assert summarize(lives)["lost"] == 20


def test_a_life_is_read_by_the_next(tmp_path) -> None:
    first = Life(tmp_path)
    time.sleep(0.02)
    first.switch("compile")
    first.begin(0)
    time.sleep(0.05)
    first.waited(0.02)
    assert first.switch("save") == "step"
    first.write(4, now=True)
    (record,) = goodput.read_lives(tmp_path)
    assert (record["first"], record["last"]) == (0, 4)
    assert record["seconds"]["load"] >= 0.02 and record["seconds"]["wait"] == 0.02
    assert record["seconds"]["step"] >= 0.03
    second = Life(tmp_path)
    second.begin(4)
    second.write(9, now=True)
    assert [each["last"] for each in goodput.read_lives(tmp_path)] == [4, 9]
    total = second.summary()
    assert total["step"] >= 0.03 and total["lost"] == 0
    line = goodput.line(total | {"load": 7300.0}, 2)
    assert line.startswith("goodput      0% of 2.0 h in 2 lives: loading and restoring 2.0 h")


def test_other_processes_write_nothing(tmp_path) -> None:
    other = Life(None)
    other.begin(0)
    other.write(3, now=True)
    assert not list(tmp_path.iterdir())


def test_the_slowest_host_waits_least() -> None:
    found = summarize_hosts(np.array([[0.1, 0.0], [0.9, 0.8], [0.2, 0.0]]))
    assert found["hosts/slowest"] == 1
    assert found["hosts/busy_seconds_max"] == pytest.approx(0.9)
    assert found["hosts/busy_seconds_median"] == pytest.approx(0.2)
    assert found["hosts/data_wait_seconds_max"] == pytest.approx(0.8)
    assert HostTimes().figures(3) == {}


def test_a_wait_for_other_hosts_is_no_work(monkeypatch) -> None:
    """Also the wait in the exchange of the figures."""

    def gather(mine: np.ndarray) -> np.ndarray:
        time.sleep(0.2)
        return np.stack([mine, mine])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(host_times.multihost_utils, "process_allgather", gather)
    hosts = HostTimes()
    assert hosts.figures(1)["hosts/busy_seconds_max"] < 0.1
    assert hosts.figures(1)["hosts/busy_seconds_max"] < 0.1
