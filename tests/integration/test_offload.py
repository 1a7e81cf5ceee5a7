"""Networks that are not all on the device: the same videos, and no more there than is said."""

import dataclasses
import re
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax import bundle, conditioning, packing
from framepack_jax.cli import decode, resume, sample
from framepack_jax.conditioning import load_encoders
from framepack_jax.conversion import arrays
from framepack_jax.diffusion.step_cache import StepCacheConfig
from framepack_jax.generation import offload_plan
from framepack_jax.generation.layout import fit_images, make_layout
from framepack_jax.generation.offload_plan import GB, Need, OffloadPlan, Work
from framepack_jax.generation.pipeline import FramePack, Settings, Video
from framepack_jax.generation.request import Request
from framepack_jax.jobs.run_dir import RunDir
from framepack_jax.models import offload, quantization, scan
from framepack_jax.models.hunyuan import transformer
from framepack_jax.models.hunyuan.blocks import DoubleBlock, SingleBlock
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.models.tiling import Tiling
from tests.fixtures.paths import ROOT
from tests.fixtures.random_networks import random_lora

RANDOM = bundle.BUILTIN_BUNDLES["random"]
WHOLE = Tiling()
LOW = OffloadPlan(encoders=False, layers=0, tiling=WHOLE, why="")
SCHEDULE = packing.parse("f1k1_x_f16k4f2k2f1k1_g2")
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
FLAGS = (
    "--bundle", "random", "--image", str(ROOT / "examples/sprites.png"),
    "--schedule", str(SCHEDULE), "--sections", "2", "--steps", "2",
    "--height", "64", "--width", "64",
)  # fmt: skip


def load(plan: OffloadPlan | None, path: Path = RANDOM) -> FramePack:
    return FramePack.open(path, dtype="float32", schedule=SCHEDULE).with_weights(path, plan=plan)


def video(pipe: FramePack, sections: int) -> Video:
    settings = Settings(steps=3)
    return pipe(IMAGE, "she waves", sections=sections, height=64, width=64, settings=settings)


def latents(pipe: FramePack, **options) -> np.ndarray:
    """Return the latents of a video of two sections, which is not decoded."""
    settings = Settings(steps=3, **options)
    request = Request("she waves", IMAGE)
    layout = make_layout(pipe.geometry, request, sections=2, height=64, width=64)
    inputs = pipe.encode([fit_images(pipe.geometry, request, layout)], layout, settings)
    *_, (_, timeline) = pipe.sample(layout.plan, inputs, settings)
    return timeline.latents


@pytest.fixture(scope="module")
def high() -> FramePack:
    return load(None)


@pytest.fixture(scope="module")
def low() -> FramePack:
    return load(LOW)


TEA, FIRST_BLOCK = StepCacheConfig("tea"), StepCacheConfig("first-block")


def test_the_same_video_bit_for_bit(high, low) -> None:
    assert offload.is_offloaded(low.transformer.params)
    assert not offload.is_offloaded(high.transformer.params)
    theirs, ours = video(high, sections=2), video(low, sections=2)
    np.testing.assert_array_equal(ours.latents, theirs.latents)
    np.testing.assert_array_equal(ours.frames, theirs.frames)


@pytest.mark.parametrize(
    "options", [{"cfg_scale": 2.0}, {"step_cache": TEA}, {"step_cache": FIRST_BLOCK}], ids=str
)
def test_the_same_latents_bit_for_bit(high, low, options) -> None:
    np.testing.assert_array_equal(latents(low, **options), latents(high, **options))


@pytest.mark.parametrize(("cfg_scale", "passes"), [(1.0, 1), (2.0, 2)])
def test_progress_is_told_block_by_block_and_step_by_step(
    low, cfg_scale: float, passes: int
) -> None:
    """And no step later: of four blocks, the step that they belong to is told before the next."""
    settings, told = Settings(steps=3, cfg_scale=cfg_scale), []
    request = Request("she waves", IMAGE)
    layout = make_layout(low.geometry, request, sections=2, height=64, width=64)
    inputs = low.encode([fit_images(low.geometry, request, layout)], layout, settings)
    made = low.sample(
        layout.plan, inputs, settings,
        on_step=lambda section, step, _: told.append((section, step)),
        on_block=lambda: told.append("block"),
    )  # fmt: skip
    *_, (_, timeline) = made
    blocks = ["block"] * (4 * passes)
    steps = [(section, step) for section in range(2) for step in range(3)]
    assert told == [event for step in steps for event in (*blocks, step)]
    np.testing.assert_array_equal(timeline.latents, latents(low, cfg_scale=cfg_scale))


def test_a_step_cache_spares_layers_that_are_streamed(low, monkeypatch) -> None:
    ran = []
    layer = offload._run_layer
    monkeypatch.setattr(offload, "_run_layer", lambda *args: ran.append(args[0]) or layer(*args))

    def count(**options) -> int:
        ran.clear()
        latents(low, **options)
        return sum(isinstance(b, DoubleBlock | SingleBlock) for b in ran)

    # Of two sections three steps; with the cache only the first and the last.
    assert count() == 2 * 3 * 4
    assert count(step_cache=StepCacheConfig("tea", threshold=1e9)) == 2 * 2 * 4


@pytest.mark.parametrize("resident", [0, 1, 3, 4])
def test_blocks_lie_where_the_plan_says(high, resident: int) -> None:
    pipe = load(LOW._replace(layers=resident))
    params = pipe.transformer.params
    kinds = [
        {leaf.sharding.memory_kind for leaf in jax.tree.leaves(layer)}
        for part in TRANSFORMER.offloadable
        for layer in params[part].layers
    ]
    assert kinds == [{"device"}] * resident + [{"pinned_host"}] * (4 - resident)
    if resident == 3:
        np.testing.assert_array_equal(latents(pipe), latents(high))


def test_blocks_that_the_host_has_no_room_for_are_read_from_the_disk(high) -> None:
    pipe = load(LOW._replace(layers=1, hosted=2))
    layers = [pipe.transformer.params[part].layers for part in TRANSFORMER.offloadable]
    kinds = [
        leaf.sharding.memory_kind if isinstance(leaf, jax.Array) else "disk"
        for part in layers
        for leaf in (jax.tree.leaves(layer)[0] for layer in part)
    ]
    assert kinds == ["device", "pinned_host", "pinned_host", "disk"]
    np.testing.assert_array_equal(latents(pipe), latents(high))


def test_what_the_host_has_room_for(monkeypatch) -> None:
    monkeypatch.setattr(offload_plan, "need", lambda *args, **options: RELEASED)
    block, work = RELEASED.blocks[-1], Work((608, 640), 1, "g9")

    def plan(limit: float | None) -> offload_plan.OffloadPlan:
        monkeypatch.setattr(offload_plan, "limit_of_host", lambda: limit)
        return offload_plan.choose("", "full", work, dtype="bfloat16", tiling=WHOLE)

    assert plan(None).hosted is None and "60 wait in" in plan(None).why
    doubles = sum(RELEASED.blocks[:20])
    few = plan((doubles + 3.5 * block) / offload_plan.HOSTED)
    assert few.hosted == 23 and "37 are read from the disk at every step" in few.why
    assert plan(0).hosted == 0 and "wait in" not in plan(0).why


def test_a_cpu_has_one_memory_for_all(monkeypatch) -> None:
    """Blocks wait in what the rest of the process leaves, and the sum is told."""
    needed = dataclasses.replace(RELEASED, process=int(GB))
    monkeypatch.setattr(offload_plan, "need", lambda *args, **options: needed)
    blocks, rest = sum(needed.blocks), needed.streamed(0, offload_plan.TILES)
    work = Work((608, 640), 1, "g9")

    def plan(limit: float | None) -> offload_plan.OffloadPlan:
        monkeypatch.setattr(offload_plan, "limit_of_host", lambda: limit)
        return offload_plan.choose("", "full", work, dtype="float32", tiling=WHOLE)

    said = f"{(blocks + rest) / GB:.3g} GB are needed in all, with those blocks"
    assert plan(None).why.endswith(said)
    assert plan(blocks / offload_plan.HOSTED).hosted < 60
    enough = plan(2 * (blocks + rest))
    assert enough.hosted is None and enough.why.endswith(said)
    few = plan(rest + sum(needed.blocks[:3]))
    assert few.hosted == 3
    assert few.why.endswith(f"{(rest + sum(needed.blocks[:3])) / GB:.3g} GB are needed in all,"
                            " with those blocks")  # fmt: skip
    assert plan(rest / 2).why.endswith(f"{rest / GB:.3g} GB are needed")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_cpu_converts_what_is_not_float32(dtype: str) -> None:
    """Blocks one by one, and an encoder that is one program as a whole."""
    manifest = bundle.read_manifest(RANDOM)
    sizes = {
        role: bundle.device_bytes(RANDOM, manifest, role, dtype=jnp.dtype(dtype))
        for role in ("text_encoder", "text_encoder_2", "image_encoder")
    }
    base = sum(each.base for each in sizes.values())
    layers = sizes["text_encoder"].layers
    most = max(each.largest for each in sizes.values())
    assert (
        sizes["image_encoder"].largest == sizes["image_encoder"].base // jnp.dtype(dtype).itemsize
    )
    needed = offload_plan.need(RANDOM, Work((64, 64), 1, SCHEDULE), dtype=dtype)
    converted = 4 * most if dtype == "bfloat16" else 0
    # And once more what has just been read, which is little here.
    assert needed.reading == base + sum(sorted(layers)[-2:]) + converted + base
    assert needed.process == offload_plan.PROCESS


def test_clips_that_are_encoded_count() -> None:
    """Whole, however the VAE decodes, but for long ones, which it takes apart in time."""

    def encoding(frames: int) -> int:
        return offload_plan.need(
            RANDOM, Work((64, 64), 1, SCHEDULE, frames), dtype="float32"
        ).encoding

    assert encoding(17) == encoding(81) and encoding(17) == pytest.approx(
        17 * encoding(1), rel=0.01
    )
    needed = dataclasses.replace(RELEASED, encoding=int(50 * GB))
    assert needed.streamed(60, WHOLE) - RELEASED.streamed(60, WHOLE) == pytest.approx(
        needed.encoding - max(RELEASED.step, RELEASED.decode(WHOLE), RELEASED.reading)
    )


def test_the_memory_of_the_host(monkeypatch) -> None:
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    5 kB\n"}
    monkeypatch.setattr(offload_plan, "_read", lambda file: files.get(file, ""))
    assert offload_plan.limit_of_host() == 5120
    for said, limit in (("max\n", 5120), ("4096\n", 4096), ("8192\n", 5120)):
        files["/sys/fs/cgroup/memory.max"] = said
        assert offload_plan.limit_of_host() == limit
    files.clear()
    assert offload_plan.limit_of_host() is None


def test_the_next_copy_begins_when_the_layer_before_is_done(low, monkeypatch) -> None:
    """So that two blocks are on the device at most. And it is asked for before this one starts, as
    GPUs copy to fresh memory when all that was started has ended."""
    events, alive, placed = [], [], []
    put, layer, wait = offload.on_device, offload._run_layer, jax.block_until_ready

    def copied(params):
        here = put(params)
        events.append("copy")
        placed.append(weakref.ref(jax.tree.leaves(here)[0]))
        alive.append(sum(ref() is not None for ref in placed))
        return here

    def started(*args):
        events.append("start")
        return layer(*args)

    def waited(x):
        events.append("wait")
        return wait(x)

    monkeypatch.setattr(offload, "on_device", copied)
    monkeypatch.setattr(offload, "_run_layer", started)
    monkeypatch.setattr(offload.jax, "block_until_ready", waited)
    double = low.transformer.params["double"]
    scan.run(DoubleBlock(low.transformer.cfg), double, *double_inputs(low))
    assert events == ["copy", "wait", "copy", "start", "wait", "start"]
    assert max(alive) == 2


def double_inputs(pipe: FramePack) -> tuple:
    """Inputs of a double block: streams of 8 and 4 tokens, modulation, RoPE, valid tokens."""
    cfg = pipe.transformer.cfg
    tables = jnp.ones((1, 8, cfg.head_dim // 2)), jnp.zeros((1, 8, cfg.head_dim // 2))
    streams = jnp.ones((1, 8, cfg.width)), jnp.ones((1, 4, cfg.width))
    return streams, jnp.ones((1, cfg.width)), tables, jnp.ones((1, 12), bool)


def test_every_kind_of_block_is_one_program(low) -> None:
    offload._run_layer.clear_cache()
    transformer.jit_embed.clear_cache()
    latents(low)
    # Of the text encoder, and of double and single blocks.
    assert offload._run_layer._cache_size() == 3
    assert transformer.jit_embed._cache_size() == 1


def test_encoders_are_let_go_of(low, monkeypatch) -> None:
    """And the layers of the text encoder are read from the disk, one after the other."""
    kept = []
    read = low.encoders

    def watched():
        encoders = read()
        kept.append(weakref.ref(encoders.text_encoder[1]["embed"]["embedding"]))
        return encoders

    spans = dataclasses.replace(low, encoders=watched).stream(
        IMAGE, "she waves", sections=1, height=64, width=64, settings=Settings(steps=1)
    )
    next(spans)
    assert [ref() for ref in kept] == [None]


def test_text_is_read_the_same_from_the_disk(monkeypatch) -> None:
    """And every layer once, for all prompts."""
    read, get = [], offload.LazyLayers.__getitem__

    def noted(self, layer):
        read.append(layer)
        return get(self, layer)

    monkeypatch.setattr(offload.LazyLayers, "__getitem__", noted)
    manifest = bundle.read_manifest(RANDOM)
    whole = load_encoders(RANDOM, manifest, jnp.float32)
    streamed = load_encoders(RANDOM, manifest, jnp.float32, streamed=True)
    assert offload.is_offloaded(streamed.text_encoder[1])
    prompts = ["", "the red circle moves left"]
    ours = conditioning.encode_each(streamed, [[prompt] for prompt in prompts])
    assert read == list(range(manifest.roles["text_encoder"].config["layers"]))
    for prompt, given in zip(prompts, ours, strict=True):
        for mine, theirs in zip(given, conditioning.encode_prompt(whole, [prompt]), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("dtype", quantization.QUANTIZED)
def test_eight_bits_stay_so_in_host_memory(dtype, tmp_path) -> None:
    path = quantized(tmp_path, dtype)
    ours, theirs = load(LOW, path), load(None, path)
    layer = ours.transformer.params["single"].layers[1]
    assert layer["qkv"]["kernel"].dtype == jnp.dtype(dtype)
    assert layer["qkv"]["kernel_scale"].dtype == jnp.float32
    # A block is multiplied out as it runs.
    work = Work((64, 64), 1, SCHEDULE)
    steps = [offload_plan.need(where, work, dtype="float32").step for where in (path, RANDOM)]
    sizes = bundle.device_bytes(path, bundle.read_manifest(path), "transformer", dtype=jnp.float32)
    assert steps[0] - steps[1] == 4 * sizes.largest > 0
    np.testing.assert_array_equal(latents(ours), latents(theirs))


def quantized(folder: Path, dtype: str) -> Path:
    """The random bundle with the kernels of its transformer's blocks in 8 bits."""
    manifest = bundle.read_manifest(RANDOM)
    names = bundle.stored_dtypes(RANDOM, manifest, "transformer")
    leaves = {}
    for name, leaf in bundle.read_leaves(RANDOM, manifest, "transformer", names):
        leaves[name] = leaf
        if name.startswith(TRANSFORMER.offloadable) and name.endswith("/kernel"):
            leaves[name], scale = arrays.quantize(name, leaf, dtype)
            leaves[name.replace("/kernel", "/kernel_scale")] = scale
    bundle.write_params(folder / "transformer", leaves.items())
    roles = {
        role: dataclasses.replace(there, path=f"{RANDOM}/{there.path}")
        for role, there in manifest.roles.items()
    } | {"transformer": manifest.roles["transformer"]}
    for name in ("tokenizer", "tokenizer_2", "image_processor"):
        (folder / name).symlink_to(RANDOM / name)
    bundle.write_manifest(folder, dataclasses.replace(manifest, roles=roles))
    return folder


def test_adapters_go_along(high, low) -> None:
    adapter = random_lora(high.transformer.cfg, 0, ("/img_qkv/kernel", "mlp_out/kernel"))
    ours, theirs = low.with_lora(adapter), high.with_lora(adapter)
    layer = ours.transformer.params["double"].layers[0]["img_qkv"]
    assert layer["lora_a"].sharding.memory_kind == layer["kernel"].sharding.memory_kind
    np.testing.assert_array_equal(latents(ours), latents(theirs))
    assert np.abs(latents(ours) - latents(low)).max() > 1e-3
    some = load(LOW._replace(layers=1, hosted=1)).with_lora(adapter)
    np.testing.assert_array_equal(latents(some), latents(theirs))
    merged = low.with_lora(adapter, merge=True)
    assert set(merged.transformer.params["double"].layers[0]["img_qkv"]) == {"kernel", "bias"}
    theirs = load(None).with_lora(adapter, merge=True)
    np.testing.assert_array_equal(latents(merged), latents(theirs))
    some = load(LOW._replace(layers=1, hosted=1)).with_lora(adapter, merge=True)
    np.testing.assert_array_equal(latents(some), latents(theirs))


def test_bytes_are_those_that_are_loaded(high, low) -> None:
    manifest = bundle.read_manifest(RANDOM)
    sizes = bundle.device_bytes(RANDOM, manifest, "transformer", dtype=jnp.float32)
    assert sum(x.nbytes for x in jax.tree.leaves(high.transformer.params)) == (
        sizes.base + sum(sizes.layers)
    )
    for part, first in (("double", 0), ("single", 2)):
        for i, layer in enumerate(low.transformer.params[part].layers):
            assert sum(x.nbytes for x in jax.tree.leaves(layer)) == sizes.layers[first + i]
    half = bundle.device_bytes(RANDOM, manifest, "transformer", dtype=jnp.bfloat16)
    assert 2 * half.base == sizes.base


def test_what_is_there_at_the_same_time_is_added_up() -> None:
    made = Need(
        encoders=100, reading=30, vae=10, base=5, blocks=(8, 8, 3, 3), step=20, pixel=2.0,
        canvas=(4, 4),
    )  # fmt: skip
    # Beside VAE and base: a step and two blocks of 8, or decoding 32, or reading text 30.
    assert made.streamed(0, WHOLE) == 15 + 36
    # Two blocks stay: a step and two of 3, or decoding, or a tile and reading.
    assert made.streamed(2, WHOLE) == 15 + 16 + 32
    assert made.streamed(2, Tiling(size=2, stride=1)) == 15 + 16 + 30
    assert made.streamed(4, WHOLE) == 15 + 22 + 32
    assert made.everything(WHOLE) == 100 + 15 + 22 + 32


# The released model in bfloat16 at 608 x 640: parameters by hand, 20 blocks of 36 and 40 of 15 D^2.
RELEASED = Need(
    encoders=int(15.9 * GB), reading=int(3 * GB), vae=int(0.98 * GB), base=int(0.7 * GB),
    blocks=(int(0.68 * GB),) * 20 + (int(0.283 * GB),) * 40, step=int(1.9 * GB),
    pixel=17.8 * GB / (608 * 640), canvas=(608, 640),
)  # fmt: skip


def test_tiles_are_for_decoding_alone(high) -> None:
    """Pictures are encoded whole, so that latents are the same."""
    tiles = Tiling(size=32, stride=24)
    cut = load(LOW._replace(tiling=tiles))
    ours, theirs = video(cut, sections=1), video(high, sections=1)
    np.testing.assert_array_equal(ours.latents, theirs.latents)
    assert (ours.frames != theirs.frames).any()


@pytest.mark.parametrize(
    ("limit", "encoders", "whole", "tiled", "least", "most"),
    [
        # GB of the device; whether encoders stay, all blocks do as one, frames are cut; blocks.
        (140, True, True, False, 60, 60),
        (79, True, True, False, 60, 60),
        (60, False, True, False, 60, 60),
        (40, False, False, False, 20, 45),
        (24, False, False, False, 1, 6),
        (12, False, False, True, 5, 15),
        (6, False, False, True, 0, 1),
        # Too small in any case: it is tried.
        (3, False, False, True, 0, 0),
    ],
)
def test_what_stays_is_what_fits(monkeypatch, limit, encoders, whole, tiled, least, most) -> None:
    monkeypatch.setattr(offload_plan, "need", lambda *args, **options: RELEASED)
    work = Work((608, 640), 1, "g9")
    made = offload_plan.choose("", "auto", work, dtype="bfloat16", tiling=WHOLE, limit=limit * GB)
    assert made.encoders == encoders
    assert (made.layers is None) == whole
    assert (made.tiling.size is not None) == tiled
    assert least <= (60 if made.layers is None else made.layers) <= most
    if limit > 3 and not made.encoders:
        layers = 60 if made.layers is None else made.layers
        assert RELEASED.streamed(layers, made.tiling) <= offload_plan.USABLE * limit * GB
        assert f"{limit:.1f} GB" in made.why


def test_levels(monkeypatch) -> None:
    work = Work((64, 64), 1, SCHEDULE)
    options = {"dtype": "float32", "tiling": WHOLE}
    assert offload_plan.choose(RANDOM, "none", work, **options)[:3] == (True, None, WHOLE)
    # A CPU does not count its memory, and everything is there.
    assert offload_plan.choose(RANDOM, "auto", work, **options)[:3] == (True, None, WHOLE)
    made = offload_plan.choose(RANDOM, "full", work, **options)
    assert made.layers == 0 and not made.encoders and made.tiling == offload_plan.TILES
    own = Tiling(size=128, stride=96)
    assert offload_plan.choose(RANDOM, "full", work, dtype="float32", tiling=own).tiling == own
    with pytest.raises(ValueError, match="offload 'medium': expected one of auto, none, full"):
        offload_plan.choose(RANDOM, "medium", work, **options)


def test_from_the_command_line(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # where progress is bars
    flags = (*FLAGS, "--latents-only")
    sample.main([*flags, "--output", str(tmp_path / "high"), "--offload", "none"])
    assert "offload none: all networks stay on the device" in capsys.readouterr().out
    sample.main([*flags, "--output", str(tmp_path / "low"), "--offload", "full"])
    out, err = capsys.readouterr()
    assert re.search(r"offload full: 0 of 4 blocks stay on the device", out) and "blocks: " in err
    high, low = (RunDir.open(tmp_path / name).latents() for name in ("high", "low"))
    for position, z in low.items():
        np.testing.assert_array_equal(z, high[position])


def test_decoding_needs_the_vae_alone(tmp_path, monkeypatch, capsys) -> None:
    """Also where memory is counted, and other networks are missing."""
    sample.main([*FLAGS, "--output", str(tmp_path / "run"), "--latents-only"])
    manifest = bundle.read_manifest(RANDOM)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "vae").symlink_to(RANDOM / "vae")
    bundle.write_manifest(tmp_path / "bundle", manifest)
    monkeypatch.setattr(offload_plan, "limit_of_device", lambda: 1000)
    decode.main([str(tmp_path / "run"), "--bundle", str(tmp_path / "bundle")])
    assert "offload auto, as all would be" in capsys.readouterr().out
    assert (tmp_path / "run" / "video.mp4").exists()


def test_auto_takes_what_there_is(tmp_path, monkeypatch, capsys) -> None:
    needed = offload_plan.need(RANDOM, Work((64, 64), 1, SCHEDULE), dtype="float32")
    for limit, said in ((3e9, "all networks stay"), (needed.streamed(1, WHOLE) / 0.95, "1 of 4 b")):
        monkeypatch.setattr(offload_plan, "limit_of_device", lambda limit=limit: limit)
        sample.main([*FLAGS, "--output", str(tmp_path / said[0]), "--latents-only"])
        assert said in capsys.readouterr().out
    assert RunDir.open(tmp_path / "1").record["offload"] == "auto"


def test_in_python() -> None:
    pipe = FramePack.load(RANDOM, offload="full")
    assert offload.is_offloaded(pipe.transformer.params) and callable(pipe.encoders)
    with pytest.raises(ValueError, match="offload 'medium'"):
        FramePack.load(RANDOM, offload="medium")


def test_a_run_goes_on_with_less_memory(tmp_path) -> None:
    sample.main([*FLAGS, "--output", str(tmp_path / "whole"), "--latents-only"])
    folder = tmp_path / "stopped"
    sample.main([*FLAGS, "--output", str(folder), "--latents-only"])
    whole = RunDir.open(tmp_path / "whole").latents()
    last = sorted((folder / "latents").glob("section_*"))[-1]
    last.unlink()
    resume.main([str(folder), "--offload", "full", "--latents-only"])
    for position, z in RunDir.open(folder).latents().items():
        np.testing.assert_array_equal(z, whole[position])
