"""Two processes, one of which has a slow store, may not write to it, or has a full disk.

Each test takes a minute or more, as two processes start up to five times."""

import json
import re
from socket import gethostname

import pytest
from etils import epath

from framepack_jax.cli.common import FAILED, HOPELESS
from framepack_jax.training import checkpoints
from tests.fixtures.hosts import changed, ended, limited
from tests.fixtures.training_data import write_dataset
from tests.fixtures.training_runs import close, two

pytestmark = pytest.mark.storage


def test_a_slow_host_is_named_and_both_skip_the_same_spike(place, bucket, faulty_store) -> None:
    """Each read of the second takes 0.3 s, a hundred times as long as those of the first."""
    data, output = f"{bucket}/dataset", place / "slow"
    write_dataset(epath.Path(data), {(32, 48): (5,) * 26}, huge=[22])
    faulty_store.delay = 0.3
    started = two(
        place, output, "--data.path", data, "--data.buffer", "1", "--data.threads", "1",
        "--checkpoints.every", "100", "--log-every", "4", "--no-export",
        "--skip-spikes.factor", "10", "--skip-spikes.window", "3",
        through={1: changed(faulty_store.environment)},
    )  # fmt: skip
    for code, _, err in ended(started):
        assert code == 0, err[-3000:]
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    # What was read ahead suffices for the last line.
    for line in lines[:2]:
        assert line["hosts/slowest"] == 1
        assert line["hosts/data_wait_seconds_max"] > 0.2
        # Process 0, which writes the log, waits for no data.
        assert line["data_wait_fraction"] < 0.05
    assert [line["skipped"] for line in lines] == [0, 1, 0]


def test_a_host_that_cannot_write_ends_the_run(place, whole, bucket, faulty_store) -> None:
    """The store denies the second host to write to checkpoints; or the disk is full to which the
    first writes its log before it copies that to the store."""
    output = f"{bucket}/run"
    more = "--mesh", "fsdp=2", "--heartbeat-seconds", "10", "--no-export"
    soon = "--checkpoints.wait-seconds", "10"
    denied = {1: changed(faulty_store.environment)}
    for code, _, err in ended(two(place, output, *more, "--steps", "5", through=denied)):
        assert code == 0, err[-3000:]
    faulty_store.refuses = "checkpoints"
    first, second = ended(two(place, output, *more, *soon, through=denied))
    assert faulty_store.refused
    for code, _, err in (first, second):
        assert code == FAILED and re.search(
            rf"error: a checkpoint in {output}/checkpoints could not be written by process 1 on"
            rf" {gethostname()}: permission denied \(.*denied by the test.*\); let the account of"
            r" this host write there, .* to resume; the newest complete checkpoint is step 5\n",
            err,
        ), err[-3000:]
    assert checkpoints.steps_of(output) == [3, 5]
    faulty_store.refuses = ""
    full = ended(two(place, output, *more, *soon, through={0: limited(1)}))
    assert re.search(
        rf"error: \S+\.jsonl? could not be written by {gethostname()}: no space left"
        r" \(\[Errno 27\] File too large\); free space",
        full[0][2],
    ), full[0][2][-3000:]
    assert checkpoints.steps_of(output)[-1] in (5, 6)
    # `framepack launch` starts all of them again.
    assert not {code for code, *_ in full} & {0, HOPELESS, 130, 143}
    for code, _, err in ended(two(place, output, *more)):
        assert code == 0, err[-3000:]
    close(epath.Path(output), whole)
