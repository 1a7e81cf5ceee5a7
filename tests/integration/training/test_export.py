"""Bundles and LoRA files of a training run."""

import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from framepack_jax import FramePack, Settings, bundle, packing, video
from framepack_jax import __main__ as cli
from framepack_jax.cli import export_run, sample, train
from framepack_jax.conversion import lora as conversion_lora
from framepack_jax.conversion.export import Export
from framepack_jax.conversion.file_formats import ConversionError
from framepack_jax.data import fingerprint, loader
from framepack_jax.data.config import DataConfig
from framepack_jax.generation.options import VideoOptions
from framepack_jax.models import lora
from framepack_jax.models.lora_layers import scale_factors
from framepack_jax.models.params import merge_params
from framepack_jax.training import checkpoints, export, state
from framepack_jax.training.export import provenance
from tests.fixtures.torch_reference import relative_error
from tests.fixtures.training_runs import CONFIG, STEPS, flags, log_of


def test_the_bundle_of_a_run_samples(place, whole, tmp_path) -> None:
    """It points to the bundle that it was trained from; its weights are those of the average."""
    root = whole / "bundle"
    manifest = bundle.read_manifest(root)
    assert manifest.roles["vae"].path != "vae" and str(manifest.schedule).startswith("f1k1_x_g2")
    # It was trained from nothing at this size alone, which is what it samples by default.
    assert manifest.buckets == ((32, 48),)
    _, cfg = bundle.role_config(manifest, "transformer")
    assert (cfg.double_layers, cfg.single_layers) == (1, 1)
    leaves = dict(bundle.read_leaves(root, manifest, "transformer", ["head/out/kernel"]))
    average = checkpoints.restore_params(
        whole, STEPS, {"head": {"out": {"kernel": jax.ShapeDtypeStruct(
            leaves["head/out/kernel"].shape, np.float32)}}}, "ema",
    )  # fmt: skip
    expected = np.asarray(average["head"]["out"]["kernel"]).astype(leaves["head/out/kernel"].dtype)
    np.testing.assert_array_equal(leaves["head/out/kernel"], expected)
    sample.main([
        "--bundle", str(root), "--prompt", "waves", "--sections", "1", "--steps", "1",
        "--latents-only", "--output", str(tmp_path / "video"),
    ])  # fmt: skip
    copy = tmp_path / "copy"
    export_run.main([str(whole), "--output", str(copy), "--copy", "--dtype", "float32"])
    pipe = FramePack.load(copy)
    assert pipe.transformer.params["head"]["out"]["kernel"].dtype == np.float32
    assert not list(copy.rglob("*.part*"))
    # How it was trained stands beside the weights, and not in what is said of each video.
    source = bundle.read_manifest(copy).roles["transformer"].source
    story = source["training"]
    assert "base" not in source and story["began"] == "scratch"
    assert story == json.loads(json.dumps(provenance(str(whole), STEPS)))
    assert story["step"] == STEPS and story["config"]["batch"] == 4
    assert story["config"]["data"]["seed"] == 0 and story["fingerprint"]
    assert story["metrics"]["loss"] == log_of(whole)[STEPS]["loss"]
    assert story["code"]["jax"] == jax.__version__
    assert "training" not in (tmp_path / "video" / "run.json").read_text()
    assert provenance(str(whole), 9)["metrics"]["loss"] == log_of(whole)[9]["loss"]
    shutil.copy(whole / "run.json", tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert provenance(str(tmp_path), 9)["metrics"] == {"loss": 0.5}


def test_a_run_with_an_empty_start_makes_videos_of_text(place, tmp_path) -> None:
    """Its bundle says so, and sampling gives the network what training gave it: the noise of its
    history, and attention that is causal."""
    schedule = "f1k1_x_f16k4f2k2f1k1_g2"
    train.main(flags(
        place, tmp_path / "run", "--data.empty-start", "0.5", "--schedule", schedule,
        "--steps", "1", "--history.noisy", "0.25", "--causal",
    ))  # fmt: skip
    root = tmp_path / "run" / "bundle"
    assert bundle.read_manifest(root).sampling.empty_start
    assert not bundle.read_manifest(bundle.resolve("random")).sampling.empty_start
    manifest = bundle.read_manifest(root)
    assert bundle.role_config(manifest, "transformer")[1].causal
    with pytest.raises(ConversionError, match="reads a later one \\(causal\\)"):
        Export(root, manifest, "transformer")
    sample.main([
        "--bundle", str(root), "--prompt", "waves", "--sections", "2", "--steps", "1",
        "--output", str(tmp_path / "video"),
    ])  # fmt: skip
    flags_of = json.loads((tmp_path / "video" / "run.json").read_text())["flags"]
    assert flags_of["history_noise"] == 0.25
    # Four latent frames, the first of which is one frame of the video; no start image.
    assert len(video.read_mp4(tmp_path / "video" / "video.mp4")[0]) == 1 + 4 * 3
    pipe = FramePack.load(root, dtype="float32")
    request, layout = VideoOptions(sections=2).prepare(pipe.geometry, None, "waves")
    image = pipe.encode([request], layout, Settings()).of(0).image
    cfg = DataConfig(path=str(place / "dataset"), empty_start=1.0)
    batch = next(loader.open_loader(cfg, packing.parse(schedule), 1))
    np.testing.assert_array_equal(image, batch.conditions.image)


def test_a_bundle_is_replaced_when_told_to(place, whole, tmp_path) -> None:
    """The average by default, of a run that keeps one; the bundle says which it has."""
    target = tmp_path / "made"
    export_run.main([str(whole), "--output", str(target)])
    named = bundle.read_manifest(target).roles["transformer"].source["name"]
    assert named.endswith(f"at step {STEPS}, moving average")
    with pytest.raises(SystemExit, match="already is a bundle; choose another --output, or"):
        export_run.main([str(whole), "--output", str(target)])
    more = ["--weights", "last", "--overwrite"]
    export_run.main([f"{whole}@9", "--output", str(target), *more])
    named = bundle.read_manifest(target).roles["transformer"].source["name"]
    assert named.endswith("at step 9")


def check_lora_files(folder: Path, run: Path) -> None:
    """Both say the same of the network, and how they came about."""
    _, cfg = bundle.role_config(bundle.read_manifest(bundle.resolve("random")), "transformer")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["lora.safetensors", "lora_original.safetensors"]
    found = [conversion_lora.read(folder / name, cfg) for name in names]
    changes = [
        {path: np.tensordot(f.a, f.b, 1) * f.scale[0] for path, f in read.lora.items()}
        for read in found
    ]
    assert changes[0].keys() == changes[1].keys() and found[1].naming == "Tencent's"
    for path, change in changes[0].items():
        np.testing.assert_allclose(changes[1][path], change, atol=1e-6, err_msg=path)
    for name in names:
        about = conversion_lora.about(folder / name)
        assert about["modelspec.architecture"] == "framepack/lora"
        assert about["modelspec.title"] == run.name and about["ss_steps"] == "2"
        assert about["ss_sd_model_name"] == "configs/tiny_bundle.py, untrained"
        assert about["framepack.base"] == about["ss_sd_model_name"]
        samples = checkpoints.read_record(run)["fingerprint"]
        assert about["framepack.dataset"] == fingerprint.digest(samples)
        assert (about["framepack.rank"], about["framepack.alpha"]) == ("2", "4")
        assert "rank 2 and alpha 4" in about["modelspec.description"]
        ranks = {len(x) for key, x in load_file(folder / name).items() if "lora_A" in key}
        with safe_open(folder / name, "np") as file:
            header = file.metadata()
        # Alpha is multiplied into the factors.
        said = str(*ranks) if len(ranks) == 1 else "Dynamic"
        assert (header["ss_network_dim"], header["ss_network_alpha"]) == (said, said)
        assert about["framepack.schedule"] in about["modelspec.description"]


def check_velocities(run: Path, dataset: Path) -> None:
    """The velocity of a batch by the parameters as they are trained, and by the bundle with the
    LoRA file of the run."""
    record = checkpoints.read_record(run)
    cfg = export.read_config(record["config"])
    manifest = bundle.read_manifest(bundle.resolve("random"))
    model = state.model_of(cfg, manifest)
    abstract, _ = state.abstract_params(cfg, model)
    factors = checkpoints.restore_params(run, cfg.steps, abstract, "params")
    base = FramePack.load(bundle.resolve("random"), dtype=cfg.dtype)
    adapted = base.with_lora(conversion_lora.read(Path(lora.file_of(run)), model.cfg).lora)
    scaled = scale_factors(factors, state.factor_scale(cfg))
    trained = merge_params(scaled, base.transformer.params)
    batch = next(loader.open_loader(DataConfig(str(dataset)), packing.parse(cfg.schedule), 2))
    noise = np.random.default_rng(0).standard_normal(batch.target.shape).astype(np.float32)
    given = batch.conditions
    conditions = model.spec.conditions(
        given.text, given.text_valid, given.pooled, given.image, np.full(2, 1, np.float32)
    )
    velocity = jax.jit(functools.partial(model.spec.velocity, model.cfg))
    ours, theirs, before = (
        velocity(params, noise, np.full(2, 0.5, np.float32), batch.context, conditions)
        for params in (trained, adapted.transformer.params, base.transformer.params)
    )
    assert relative_error(np.asarray(theirs), np.asarray(ours)) < 1e-6
    assert relative_error(np.asarray(before), np.asarray(ours)) > 1e-4


def test_adapters_train_and_sample(place, tmp_path, capsys) -> None:
    """--trainable lora from the weights of a bundle, exported as a file that sample.py takes."""
    output = tmp_path / "lora"
    config = CONFIG.replace('init="scratch"', 'init="bundle"')
    config = "\n".join(line for line in config.splitlines() if "network=" not in line)
    (tmp_path / "config.py").write_text(config)
    train.main([
        "--config", str(tmp_path / "config.py"), "--data.path", str(place / "dataset"),
        "--output", str(output), "--trainable", "lora", "--steps", "2", "--ema", "0",
        "--distill.steps", "2", "--distill.teacher-steps", "4",
    ])  # fmt: skip
    file = output / "bundle" / "lora.safetensors"
    out = capsys.readouterr().out
    assert f"sample.py --lora {file} --steps 2 --sampler euler" in out
    about = conversion_lora.about(file)
    assert (about["framepack.sampling_steps"], about["framepack.sampler"]) == ("2", "euler")
    assert "in adapters of rank 2, alpha 4, beside" in out and "warning" not in out
    check_lora_files(file.parent, output)
    check_velocities(output, place / "dataset")
    for command, other in ((sample, ["--prompt", "waves"]), (train, flags(place, output))):
        with pytest.raises(SystemExit, match=rf"holds a LoRA .*--lora {file}.*--init RUN"):
            command.main([*other, "--bundle", str(output / "bundle")])
    with pytest.raises(SystemExit, match=r"is a training run and no bundle; .*for --lora"):
        sample.main(["--bundle", str(output)])
    cli.main([
        "export",
        str(tmp_path / "kohya.safetensors"), "--key-format", "kohya",
        "--lora", str(output), "--bundle", str(bundle.resolve("random")),
    ])  # fmt: skip
    assert (tmp_path / "kohya.safetensors").exists()
    sample.main([
        "--bundle", "random", "--prompt", "waves", "--schedule", "f1k1_x_g2_f1k1f2k2f16k4_td",
        "--lora", str(output),
        "--sections", "1", "--steps", "1", "--height", "32", "--width", "48", "--latents-only",
        "--output", str(tmp_path / "video"),
    ])  # fmt: skip
    size = sum(f.stat().st_size for f in (output / "checkpoints").rglob("*") if f.is_file())
    random = bundle.resolve("random")
    whole_network = bundle.stored_bytes(random, bundle.read_manifest(random), "transformer")
    assert size < 4 * whole_network  # bfloat16; adapters and two moments in float32
