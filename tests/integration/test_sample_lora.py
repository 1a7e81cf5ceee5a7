"""`sample.py --lora`: adapters from files, beside the weights or in them; and on eight devices.

As a script: prints how far a velocity with adapters on eight devices is from one device's.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from framepack_jax import bundle
from framepack_jax.cli import export, resume, sample
from framepack_jax.conversion.lora import write
from framepack_jax.jobs import provenance
from framepack_jax.jobs.loading import read_loras
from framepack_jax.jobs.run_dir import RunDir
from framepack_jax.models import lora
from framepack_jax.models.hunyuan import transformer
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.parallel import sharding
from tests.fixtures.compiling import quick_flags
from tests.fixtures.paths import ROOT
from tests.fixtures.random_networks import difference, example, on_devices, random_lora
from tests.fixtures.torch_reference import relative_error

FLAGS = (
    "--bundle", "random", "--image", str(ROOT / "examples" / "astronaut.jpg"),
    "--schedule", "f1k1_x_f16k4f2k2f1k1_g2", "--sections", "1", "--steps", "2",
    "--height", "64", "--width", "64", "--latents-only",
)  # fmt: skip


def make_lora(path: Path, seed: int) -> None:
    """Random factors for some kernels of the random transformer."""
    _, cfg = bundle.role_config(
        bundle.read_manifest(bundle.BUILTIN_BUNDLES["random"]), "transformer"
    )
    write(path, random_lora(cfg, seed, ("/img_qkv/kernel", "mlp_out/kernel")), cfg, "kohya")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("loras")
    paths = folder / "style.safetensors", folder / "motion.safetensors"
    for seed, path in enumerate(paths):
        make_lora(path, seed)
    return paths


def latents(folder: Path, *flags: str) -> np.ndarray:
    sample.main([*FLAGS, "--output", str(folder), *flags])
    return np.stack(list(RunDir.open(folder).latents().values()))


def test_beside_the_weights_or_in_them(files, tmp_path, capsys) -> None:
    both = "--lora", f"{files[0]}:0.5", str(files[1])
    beside = latents(tmp_path / "beside", *both)
    printed = capsys.readouterr().out
    assert f"{files[0]}: " in printed and "weight 0.5" in printed and "rank 3" in printed
    merged = latents(tmp_path / "merged", *both, "--merge-lora")
    assert relative_error(merged, beside) < 1e-4
    one = latents(tmp_path / "one", "--lora", f"{files[0]}:0.5")
    assert relative_error(one, beside) > 1e-2


def test_a_run_goes_on_with_its_own(files, tmp_path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes(files[0].read_bytes())
    folder = tmp_path / "run"
    latents(folder, "--lora", f"{file}:0.5")
    assert RunDir.open(folder).record["flags"]["lora"] == [f"{file}:0.5"]
    with pytest.raises(SystemExit, match="lora = "):
        latents(folder)
    RunDir.open(folder).write_record(status="interrupted")
    make_lora(file, 7)
    with pytest.raises(SystemExit, match=r"started with another LoRA than .*mine.safetensors"):
        resume.main([str(folder)])


def test_a_lora_that_applies_in_part_is_warned_of(files, tmp_path, capsys) -> None:
    _, cfg = bundle.role_config(
        bundle.read_manifest(bundle.BUILTIN_BUNDLES["random"]), "transformer"
    )
    pipe = SimpleNamespace(transformer=SimpleNamespace(cfg=cfg))
    tensors = load_file(files[0])
    extra = {f"lora_te_{name}": x for name, x in list(tensors.items())[: len(tensors) // 2]}
    save_file(tensors | extra, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match=r"x\.safetensors: 3\d% of the LoRA does not apply"):
        read_loras(pipe, [str(tmp_path / "x.safetensors")])
    with warnings.catch_warnings(action="error"):
        read_loras(pipe, [str(files[0])])
    export.main([
        "--lora", str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors"),
        "--bundle", str(bundle.BUILTIN_BUNDLES["random"]), "--key-format", "original",
    ])  # fmt: skip
    assert "\nwarning: " in capsys.readouterr().out


def test_what_a_lora_is_read_from_is_hashed(files, tmp_path) -> None:
    """Weights and settings of PEFT's folder, and the settings beside a lone file."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"

    def begin(path: Path) -> SimpleNamespace:
        weights.write_bytes(files[0].read_bytes())
        settings.write_text(json.dumps({"lora_alpha": 4}))
        hashes = {str(path): provenance._lora_sha256(path)}
        record = {"flags": {"lora": [f"{path}:0.5"]}, "files_sha256": hashes}
        return SimpleNamespace(folder=tmp_path, record=record)

    for path in (folder, weights):
        run = begin(path)
        (folder / "README.md").write_text("not read")
        provenance.check_loras(run)
        changes = (
            lambda: settings.write_text(json.dumps({"lora_alpha": 8})),
            lambda: weights.write_bytes(files[1].read_bytes()),
            weights.unlink,
            settings.unlink,
        )
        for change in changes:
            begin(path)
            change()
            with pytest.raises(ValueError, match=r"started with another LoRA than .*adapter"):
                provenance.check_loras(run)
    # What could never be read is not taken for what it was.
    missing = str(tmp_path / "missing.safetensors")
    run.record |= {"flags": {"lora": [missing]}, "files_sha256": {missing: None}}
    with pytest.raises(ValueError, match="or the file is missing"):
        provenance.check_loras(run)


def test_a_file_of_another_kind_is_named_before_weights_are_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bundle, "load_params", lambda *_, **__: pytest.fail("weights were read"))
    missing = str(tmp_path / "missing.safetensors")
    with pytest.raises(SystemExit, match=r"error: .*missing.safetensors does not exist"):
        latents(tmp_path / "run", "--lora", missing)


def test_on_eight_devices_as_on_one() -> None:
    environment = {
        **os.environ,
        "XLA_FLAGS": quick_flags(8),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8 and found["without"] > 1e-2
    assert found["velocity"] < 5e-6


def main() -> None:
    """Print how far the velocity of adapters on all kernels, unmerged, is from one device's."""
    cfg = TransformerConfig(
        in_channels=4, out_channels=4, heads=4, head_dim=6, double_layers=1, single_layers=1,
        refiner_layers=1, mlp_ratio=2.0, text_dim=16, pooled_dim=8, image_dim=8,
        rope_axes=(2, 2, 2), context_kernels=("k1",),
    )  # fmt: skip
    params, arrays, _ = example(cfg)
    adapters = random_lora(cfg, 0, ("/kernel",))
    velocity = jax.jit(transformer.velocity, static_argnums=0)
    expected = jax.device_get(velocity(cfg, lora.attach(params, adapters), *arrays))
    mesh = sharding.make_mesh(**sharding.parse_mesh("fsdp=2,context=2,tensor=2"))
    placed = lora.attach(on_devices(params, mesh), adapters, mesh=mesh)
    with jax.set_mesh(mesh):
        found = velocity(cfg, placed, *arrays)
    print(
        json.dumps(
            {
                "devices": len(found.sharding.device_set),
                "velocity": difference(found, expected),
                "without": difference(velocity(cfg, params, *arrays), expected),
            }
        )
    )


if __name__ == "__main__":
    main()
