"""Runs that are begun, and opened to be continued."""

import numpy as np
import pytest
from etils import epath

from framepack_jax import bundle
from framepack_jax.jobs.loading import open_pipe
from framepack_jax.jobs.run_dir import RunDir
from framepack_jax.jobs.spec import ComputeOptions, JobOptions, ModelOptions, VideoSpec
from framepack_jax.jobs.task_setup import TaskMaker, saved_task
from tests.fixtures.paths import ROOT


@pytest.mark.parametrize(
    ("given", "expected"), [(None, "bfloat16"), ("float32", "float32"), ("float16", "float16")]
)
def test_a_run_keeps_its_type_unless_another_is_given(tmp_path, given, expected) -> None:
    model, compute = ModelOptions(bundle="random", dtype="bfloat16"), ComputeOptions()
    pipe = open_pipe(bundle.resolve("random"), model.dtype, None, None)
    maker = TaskMaker(pipe, model, compute, JobOptions(), alone=True)
    spec = VideoSpec(image=ROOT / "examples" / "astronaut.jpg", sections=1, height=64, width=48)
    begun = maker.make(spec, epath.Path(tmp_path))
    request, beginning = begun.read()
    begun.run.begin(request, {0: np.zeros((8, 6, 16), np.float32)}, beginning)
    begun.run.unlock()
    pipe, task = saved_task(RunDir.open(epath.Path(tmp_path)), None, given, compute)
    assert pipe.dtype == expected and task.layout.sections == 1
