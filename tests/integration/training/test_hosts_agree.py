"""Two processes whose configurations or datasets differ end before the first step."""

from pathlib import Path

import pytest

from tests.fixtures.hosts import ended, launch
from tests.fixtures.paths import ROOT
from tests.fixtures.training_data import write_dataset
from tests.fixtures.training_runs import CONFIG


@pytest.fixture
def hosts(tmp_path) -> list[Path]:
    """A working folder for each of two processes, with a configuration and a dataset of its own."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        (folder / "config.py").write_text(CONFIG)
        write_dataset(folder / "dataset", {(32, 48): (7, 9, 5, 5, 7, 3)})
    return folders


def both(hosts: list[Path]) -> list[str]:
    """The errors of the training command in both."""
    flags = ["--config", "config.py", "--data.path", "dataset", "--output", "run"]
    where = ["--coordinator-address", "localhost:{port}", "--num-processes", "2"]
    found = ended(launch(hosts, str(ROOT / "train.py"), *flags, *where))
    for folder, (code, _, err) in zip(hosts, found, strict=True):
        assert code != 0 and "Traceback" not in err, err[-3000:]
        assert not (folder / "run" / "checkpoints").exists()
    return [err for *_, err in found]


def test_another_configuration_is_named(hosts) -> None:
    (hosts[1] / "config.py").write_text(
        CONFIG.replace("3e-3", "3e-1").replace("batch=4", "batch=8, seed=7")
    )
    for err in both(hosts):
        assert "error: processes differ: batch = 4 in process 0 on " in err
        assert "optimizer.learning_rate = 0.003 in process 0 on " in err
        assert ", 0.3 in process 1 on " in err
        assert "seed = 0 in process 0 on " in err and ", 7 in process 1 on " in err


def test_another_copy_of_the_dataset_is_named(hosts) -> None:
    """Its samples have the same lengths and names."""
    index = hosts[1] / "dataset" / "dataset.json"
    index.write_text(index.read_text().replace('"tokens"', ' "tokens"'))
    for err in both(hosts):
        assert "error: processes differ: dataset/dataset.json = " in err
