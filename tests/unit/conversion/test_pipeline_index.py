"""Settings of a Helios pipeline that would be sampled wrongly are refused by name."""

import json
import shutil
from pathlib import Path

import pytest

from framepack_jax.conversion.pipeline_index import settings_of
from framepack_jax.conversion.weight_files import ConversionError
from tests.fixtures.paths import GOLDEN

HELIOS = GOLDEN / "helios"


def pipeline(folder: Path, **changed: object) -> Path:
    """The pipeline of a pyramid of three stages, with other settings of its scheduler."""
    shutil.copy(HELIOS / "model_index_mid.json", folder / "model_index.json")
    scheduler = json.loads((HELIOS / "scheduler_mid" / "scheduler_config.json").read_text())
    (folder / "scheduler").mkdir()
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(scheduler | changed))
    return folder


def test_the_released_scheduler_is_taken(tmp_path) -> None:
    recipe = settings_of(pipeline(tmp_path)).sampling.recipe
    assert (recipe.stages, recipe.solver) == (3, "unipc-flow")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stage_range": [0, 0.5, 0.75, 1]}, r"stage_range = \[0, 0\.5, .*only equal stages"),
        ({"stage_range": [0, 0.5, 1]}, r"only equal stages are supported: \[0\.0, 0\.33"),
        ({"stages": 2}, r"only equal stages are supported: \[0\.0, 0\.5, 1\.0\]"),
        ({"scheduler_type": "heun"}, "scheduler_type = 'heun'; only unipc, euler, dmd are"),
        ({"time_shift_type": "cosine"}, "time_shift_type = 'cosine'; only exponential, linear are"),
        ({"solver_p": {}}, r"solver_p = {}; only None is supported"),
    ],
)
def test_a_scheduler_that_would_be_sampled_wrongly_is_refused(tmp_path, changed, message) -> None:
    with pytest.raises(ConversionError, match=message):
        settings_of(pipeline(tmp_path, **changed))
