"""`framepack convert`: bundles from checkpoints, pipelines and other bundles."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers
from safetensors.torch import save_file

from framepack_jax import __main__ as cli
from framepack_jax import bundle
from framepack_jax.cli.convert import main
from framepack_jax.conditioning import PROMPT_TEMPLATE
from framepack_jax.conversion import engine, inspect
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.conversion.weight_files import ConversionError
from tests.fixtures.checkpoints import SIGLIP, write_folder


@pytest.mark.golden
def test_a_whole_pipeline_becomes_a_bundle(golden, tmp_path, capsys) -> None:
    folder = golden / "diffusers_pipeline" / "pipeline"
    output = tmp_path / "bundle"
    main(["--pipeline", str(folder), "--output", str(output), "--dtype", "bf16"])
    said = capsys.readouterr().out
    manifest = bundle.read_manifest(output)
    assert tuple(manifest.roles) == bundle.ROLES
    assert manifest.prompt_template == PROMPT_TEMPLATE and manifest.schedule.order == "inverted"
    for role in bundle.ROLES:
        leaves = jax.tree.leaves(bundle.load_params(output, manifest, role))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
        size = sum(leaf.nbytes for leaf in leaves)
        assert manifest.roles[role].source["bytes"] == size
        assert f"{size / 1e6:,.1f} MB from {role}" in said
    for name in ("tokenizer", "tokenizer_2"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (output / name / file).read_bytes() == (folder / name / file).read_bytes()
    assert (output / "image_processor" / "preprocessor_config.json").exists()
    assert not (output / "unfinished").exists()


@pytest.mark.golden
def test_a_fine_tune_points_to_the_encoders(golden, framepack, tmp_path) -> None:
    pipeline = golden / "diffusers_pipeline" / "pipeline"
    first, second = tmp_path / "first", tmp_path / "sub" / "second"
    make_bundle(BundleRequest(output=str(first), pipeline=pipeline, prompt_template="say {}"))
    f1 = "f1k1_x_f16k4f2k2f1k1_g3"
    flags = BundleRequest(
        output=str(second), transformer=pipeline / "transformer", encoders_from=str(first),
        schedule=f1,
    )  # fmt: skip
    manifest = make_bundle(flags)
    assert manifest == bundle.read_manifest(second)
    assert (manifest.schedule.order, manifest.prompt_template) == ("forward", "say {}")
    assert manifest.roles["vae"].path == "../../first/vae"
    for role in bundle.ROLES:
        bundle.load_params(second, manifest, role)
    assert not (second / "vae").exists() and (second / "tokenizer" / "tokenizer.json").exists()
    with pytest.raises(ConversionError, match="do not belong together"):
        path = write_folder(framepack, tmp_path / "other")
        make_bundle(dataclasses.replace(flags, transformer=path, output=f"{tmp_path}/third"))
    with pytest.raises(ConversionError, match="would be replaced"):
        make_bundle(dataclasses.replace(flags, output=str(first), overwrite=True))
    bundle.load_params(first, bundle.read_manifest(first), "vae")


def test_output_is_never_lost_by_accident(base, framepack, tmp_path) -> None:
    path = write_folder(framepack, tmp_path / "model")
    flags = BundleRequest(output=str(tmp_path / "out"), transformer=path)
    with pytest.raises(ConversionError, match="not empty"):
        make_bundle(dataclasses.replace(flags, output=str(tmp_path)))
    make_bundle(flags)
    with pytest.raises(ConversionError, match="--overwrite"):
        make_bundle(flags)
    with pytest.raises(ConversionError, match="lies in"):
        inside = write_folder(base, tmp_path / "out" / "vae")
        make_bundle(dataclasses.replace(flags, transformer=inside, overwrite=True))
    save_file({"x": torch.zeros(1)}, tmp_path / "bad.safetensors")
    with pytest.raises(ConversionError):
        bad = tmp_path / "bad.safetensors"
        make_bundle(dataclasses.replace(flags, transformer=bad, overwrite=True))
    assert bundle.read_manifest(tmp_path / "out").roles["transformer"].config["image_dim"] == 10
    plain = write_folder(base, tmp_path / "base")
    make_bundle(dataclasses.replace(flags, transformer=plain, overwrite=True))
    assert bundle.read_manifest(tmp_path / "out").roles["transformer"].config["image_dim"] is None


def test_an_interrupted_conversion_is_no_bundle_and_runs_again(
    framepack, tmp_path, monkeypatch
) -> None:
    flags = BundleRequest(
        output=str(tmp_path / "out"), transformer=write_folder(framepack, tmp_path / "model")
    )

    def power_cut(*_) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(bundle, "write_params", power_cut)
        make_bundle(flags)
    with pytest.raises(bundle.BundleError, match="is not a bundle"):
        bundle.read_manifest(tmp_path / "out")
    assert make_bundle(flags) == bundle.read_manifest(tmp_path / "out")


def test_leftovers_of_a_killed_run_make_room_and_go(framepack, tmp_path, monkeypatch) -> None:
    output = tmp_path / "out"
    flags = BundleRequest(
        output=str(output), transformer=write_folder(framepack, tmp_path / "model")
    )
    made = make_bundle(flags)
    left = output / "vae.partial_save.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "data").write_bytes(bytes(1000))
    (output / "notes").mkdir()
    # Killed before the manifest of the bundle there was taken away.
    (output / bundle.UNFINISHED).touch()
    held = sum(f.stat().st_size for f in (output / "transformer").rglob("*") if f.is_file())
    freed = []
    check = engine.check_space
    monkeypatch.setattr(engine, "check_space", lambda *args: freed.append(args[2]) or check(*args))
    assert "bundle, unfinished" in inspect.describe(output)
    assert make_bundle(flags) == made
    assert freed == [held + 1000]
    assert not left.exists() and (output / "notes").exists()
    assert not (output / bundle.UNFINISHED).exists()


@pytest.mark.golden
def test_a_transformer_that_stays_keeps_its_schedule(golden, tmp_path, capsys) -> None:
    pipeline = golden / "diffusers_pipeline" / "pipeline"
    first, second = tmp_path / "first", tmp_path / "second"
    f1 = "f1k1_x_f16k4f2k2f1k1_g3"
    main(["--transformer", str(pipeline / "transformer"), "--output", str(first),
          "--schedule", f1])  # fmt: skip
    assert "assumed" not in capsys.readouterr().out
    small = dataclasses.replace(bundle.read_manifest(first), buckets=((64, 96),))
    bundle.write_manifest(first, small)
    args = ["--vae", str(pipeline / "vae"), "--encoders-from", str(first)]
    main([*args, "--output", str(second)])
    assert "assumed" not in capsys.readouterr().out
    made = bundle.read_manifest(second)
    assert (str(made.schedule), made.schedule.order, made.buckets) == (f1, "forward", ((64, 96),))
    main(["--transformer", str(pipeline / "transformer"), "--output", str(tmp_path / "third")])
    assert "(schedule assumed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "nothing to convert"),
        (
            ["--framepack", "f1", "--pipeline", "."],
            "--framepack f1 and --pipeline . each bring all networks",
        ),
        (["--transformer", "{model}", "--image-dim", "4"], "--image-dim 4 is of"),
        (["--pipeline", "."], "no model_index.json"),
        (["--transformer", "{model}", "--rope-axes", "a"], "--rope-axes a"),
        (["--transformer", "{model}", "--rope-axes", "4,4,4"], "do not add up"),
        (["--transformer", "{model}", "--schedule", "f1k1_x_y"], "item 'y'"),
        (["--transformer", "{model}", "--schedule", "td_f1k8f1k1_g9"], "needs kernels k8"),
        (["--transformer", "{model}", "--prompt-template", "x"], "--prompt-template"),
        (["--image-encoder", "{siglip}"], "--image-processor"),
        (["--image-encoder", "{siglip}"], "is lllyasviel/flux_redux_bfl/feature_extractor"),
    ],
)
def test_user_errors_are_one_message(args, said, framepack, tmp_path) -> None:
    paths = {"model": tmp_path / "model", "siglip": tmp_path / "siglip"}
    write_folder(framepack, paths["model"])
    config = transformers.SiglipVisionConfig(**SIGLIP)
    write_folder(transformers.SiglipVisionModel(config), paths["siglip"])
    args = [arg.format(**paths) for arg in args]
    with pytest.raises(SystemExit) as stopped:
        main([*args, "--output", str(tmp_path / "out")])
    assert stopped.value.code.startswith("error: ") and said in stopped.value.code
    assert not (tmp_path / "out").exists()


def test_a_base_model_is_said_to_be_no_framepack_model(base, tmp_path, capsys) -> None:
    path = write_folder(base, tmp_path / "base")
    main(["--transformer", str(path), "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "is a base model" in said and "still without vae, text_encoder" in said


@pytest.mark.golden
def test_bundles_of_the_package_go_by_their_names(golden, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(["inspect", "random"])
    assert "hunyuan_vae, 0.2 M, bf16" in capsys.readouterr().out
    cli.main(["export", "vae.safetensors", "--bundle", "random", "--role", "vae"])
    # Its config is the bundle's: the file is one of its widths.
    cli.main(["verify", "vae.safetensors", "random"])
    assert "differs" not in capsys.readouterr().out
    flags = ["--transformer", str(golden / "transformer"), "--output", "out", "--encoders-from"]
    main([*flags, "random"])
    manifest = bundle.read_manifest("out")
    bundle.check_present("out")
    assert (
        manifest.roles["vae"].source
        == bundle.read_manifest(bundle.resolve("random")).roles["vae"].source
    )
    with pytest.raises(SystemExit, match="framepack_f1: the parameters of vae are missing"):
        main([*flags, "framepack_f1", "--overwrite"])
    assert bundle.read_manifest("out") == manifest


def test_help_explains_every_flag(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for field in dataclasses.fields(BundleRequest):
        assert f"--{field.name.replace('_', '-')}" in text
    for words in ("diffusers pipeline folder", "Tencent", "f1k1_x_f16k4f2k2f1k1_g9", "16,56,56"):
        assert words in text
