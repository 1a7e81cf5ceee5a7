"""Facts that hosts compare."""

from framepack_jax import bundle
from framepack_jax.data.config import DataConfig
from framepack_jax.training.host_facts import command_facts, data_facts
from tests.fixtures.training_data import write_dataset
from tests.fixtures.training_steps import changed


def test_every_dataset_is_among_the_facts(tmp_path) -> None:
    """Another copy of one of them changes its facts alone."""
    paths = str(tmp_path / "a"), str(tmp_path / "b")
    for path in paths:
        write_dataset(tmp_path / path, {(32, 48): (3,)})
    cfg = changed(data=DataConfig(path=paths, weights=(1.0, 2.0)))
    assert command_facts(cfg)["data.weights"] == (1.0, 2.0)

    def facts() -> dict[str, object]:
        return data_facts(cfg, bundle.resolve("random"), {"batch": 4})

    before = facts()
    write_dataset(tmp_path / "b", {(32, 48): (4,)})
    differing = {name for name, value in facts().items() if before[name] != value}
    assert differing == {f"{paths[1]}/dataset.json", f"sizes in {paths[1]}/shards"}
    assert f"{paths[0]}/dataset.json" in before and before["samples: batch"] == 4
