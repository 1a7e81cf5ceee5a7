"""Training by two processes, which one process goes on with or has begun."""

import signal

from framepack_jax import bundle, video
from framepack_jax.cli.common import TERMINATED
from framepack_jax.training import checkpoints
from tests.fixtures.hosts import ended
from tests.fixtures.torch_reference import relative_error
from tests.fixtures.training_runs import STEPS, close, finish, log_of, start, two, wait_for


def test_two_processes_train_as_one_and_one_goes_on(place, whole) -> None:
    """Stopped by SIGTERM to one of them: both save the same step and say that they were stopped."""
    output = place / "two"
    looking = ("--validation.every", "2", "--validation.samples", "4", "--validation.sections", "1",
               "--validation.steps", "1", "--validation.sigmas", "0.5")  # fmt: skip
    started = two(place, output, "--mesh", "fsdp=2", "--checkpoints.every", "100", *looking)
    wait_for(started[0], output, 4)
    started[1].send_signal(signal.SIGTERM)
    results = ended(started)
    for code, _, err in results:
        assert code == TERMINATED, err[-3000:]
    assert "after step 12, validation after step 2\n" in results[0][1]
    (step,) = checkpoints.steps_of(output)
    assert 4 <= step < STEPS
    close(output, whole, range(1, step + 1))
    found = log_of(output)[2]
    assert 0 < found["validation/loss"] < 10 and "context/k4_other" in found
    frames, _ = video.read_mp4(output / "validation" / "step_0000002" / "0.mp4")
    # A start image and one section of two latent frames, above the truth.
    assert frames.shape[0] == 9 and frames.shape[1] == 2 * (32 + 16 * (frames.shape[2] == 32))
    assert "no validation (--validation.every 0)" in finish(start(place, output))
    close(output, whole)


def test_one_process_begins_and_two_go_on_fsdp_and_tensor(place, whole) -> None:
    """Four devices each; to the end, so that one of them makes the bundle."""
    output = place / "one"
    finish(start(place, output, "--steps", "3", "--no-export"))
    started = two(place, output, "--mesh", "fsdp=4,tensor=2", devices=4)
    for code, _, err in ended(started):
        assert code == 0, err[-3000:]
    manifest = bundle.read_manifest(output / "bundle")
    name = ["head/out/kernel"]
    (ours, theirs) = (
        dict(bundle.read_leaves(run / "bundle", manifest, "transformer", name))[name[0]]
        for run in (output, whole)
    )
    assert relative_error(ours, theirs) < 1e-2  # bfloat16
    # The learning rate of a constant schedule does not depend on the number of steps.
    close(output, whole)
