"""Disturb the golden data, one value at a time, and check that a test fails each time.

    python scripts/disturb_golden.py [--only REGEX] [--shard 1/2]

The folder (FRAMEPACK_GOLDEN, default tests/golden) is copied to a temporary place. There each
tensor, each JSON value, each part of a tokenizer and the image are disturbed in turn, the tests
that read it run, cheapest first, until one fails, and the file is restored:

- weights and inputs, which have no tolerance of their own: noise of 20 % of their rms on every
  number, then 5 times as much and so on, until what comes of it is more than an output's tolerance;
- reference outputs: one number, random among those that are compared, is off by 3 tolerances;
- whole numbers and masks: one entry changes; JSON: a number x becomes 2x + 1, a text gets a prefix.

The exit code is 1 where something is caught by no test and `SILENT` does not say why it cannot be,
or where something that `SILENT` names is caught after all. Everything runs in this one process, so
that compiled programs are kept; there are about 2700 runs of 0.1 to 10 seconds: a quarter of an
hour for two shards on two cores. Leave the repository alone meanwhile: tests are read from it again
and again.
"""

import argparse
import collections
import contextlib
import functools
import io
import itertools
import json
import operator
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
NOISES = (0.2, 1, 5, 25)  # of the rms of a weight or an input
EXCESS = 3  # tolerances by which an output is off

# An output of `file name` -> (how its tolerance is meant, its tolerance).
TOLERANCES = {
    r"^pipeline.* teacache.*/(section\d+|latents)$": ("relative", 5e-4),
    r"^pipeline.*_n\d.*/(section\d+|latents)$": ("relative", 2e-4),
    r"^pipeline.*/pixels$": ("absolute", 5e-3),
    r"^pipeline.* preview/rgb$": ("absolute", 1e-5),
    r"^pipeline.* blend/overlap5$": ("absolute", 1e-6),
    r"^unipc.*/(result|last_x)$": ("relative", 2e-5),
    r"^unipc.*/sigmas$": ("absolute", 1e-6),
    r"^flow_shift.* \d+/(mu|sigmas)$": ("absolute", 1e-6),
    r"^hunyuan_original/reference.* (output|vae_(mean|logvar|decoded))$": ("relative", 2e-4),
    r"^diffusers_pipeline/reference.* (prompt_emb|pooled|siglip|image_latents)": ("relative", 2e-4),
    r"^diffusers_pipeline/reference.*/frames": ("absolute", 1e-3),
    r"^helios/reference.* (vae/(mode|decoded)|prompt_embeds)$": ("relative", 2e-4),
    r"^helios/reference.* forward/(helios|helios_variant|wan)$": ("relative", 2e-4),
    r"^helios/reference.*/decoded_latents\d+$": ("relative", 5e-4),
    r"^helios/reference.*/frames_every_3rd$": ("absolute", 2e-3),
}

# Inputs whose answer is the same for many of them, so that a change need not show.
QUESTIONS = r"^(buckets.json \d+/(height|width)|sections.json \d+/(seconds|fps))$"

SECTIONS = "tests/integration/test_pipeline.py::test_sections_equal_the_release"
PIXELS = "tests/integration/test_pipeline.py::test_pixels_equal_the_release"
ALL_FRAMES = "tests/parity/test_diffusers_pipeline.py::test_frames"
FRAMES = (f"{ALL_FRAMES}[inverted_a_cfg2]", ALL_FRAMES)
START_LATENT = "tests/parity/test_conditioning.py::test_start_latent"
TEXT = (
    "tests/parity/test_conditioning.py::test_template",
    "tests/parity/test_conditioning.py::test_ids",
    "tests/parity/test_conditioning.py::test_text_embeddings",
    "tests/parity/test_diffusers_pipeline.py::test_prompts",
)
IMAGE = (
    "tests/parity/test_conditioning.py::test_images",
    "tests/parity/test_diffusers_pipeline.py::test_image",
)

HELIOS_RUN = "tests/parity/test_helios_sampling.py::test_a_run_of_diffusers[{}]"
WAN_FORWARD = "tests/parity/test_wan_transformer.py::test_golden_forward"
UMT5 = (
    "tests/parity/test_umt5.py::test_golden_ids",
    "tests/parity/test_umt5.py::test_golden_states",
)

# The first line whose pattern is in `file name` has the tests that read it, cheapest first; `{}` is
# what the pattern's first group holds.
READERS: dict[str, tuple[str, ...]] = {
    r"^buckets": ("tests/unit/packing/test_buckets.py::test_choices_equal_the_release",),
    r"^flow_shift": ("tests/unit/diffusion/test_flow.py::test_shift_equals_the_release",),
    r"^sections": ("tests/unit/packing/test_packing.py::test_sections_equal_the_release",),
    r"^resize": ("tests/unit/video/test_images.py::test_resize_and_crop_equal_the_release",),
    r"^unipc\S+ (bh\d)": (
        "tests/unit/diffusion/test_solver.py::test_unipc_equals_the_release[{}]",
    ),
    r"^pipeline\S+ preview/": ("tests/unit/video/test_mp4.py::test_preview_equals_the_release",),
    r"^pipeline\S+ blend/": (
        "tests/unit/generation/test_crossfade.py::test_cross_fade_equals_the_release",
    ),
    r"^pipeline\S+ teacache": (
        "tests/parity/test_step_cache.py::test_teacache_equals_the_release",
    ),
    r"^pipeline\S+ (.*)/pixels": (f"{PIXELS}[{{}}]",),
    r"^pipeline\S+ (.*)/": (f"{SECTIONS}[{{}}]",),
    r"^(pipeline|transformer/)": (SECTIONS,),
    r"^vae/": (PIXELS,),
    r"^hunyuan_original/(mp_rank|reference\S+ [^v])": (
        "tests/parity/conversion/test_tencent.py::test_original_transformer_agrees",
    ),
    r"^hunyuan_original/": ("tests/parity/conversion/test_tencent.py::test_original_vae_agrees",),
    r"^helios/pipeline/vae/config\.json latents_": (HELIOS_RUN.format("base_t2v"),),
    r"^helios/(pipeline/vae/|reference\S+ vae/)": (
        "tests/parity/test_wan_vae.py::test_golden_clip",
    ),
    r"^helios/(pipeline/(text_encoder|tokenizer)|reference\S+ (ids|mask|prompt))": UMT5,
    r"^helios/reference\S+ forward/": (WAN_FORWARD,),
    r"^helios/reference\S+ (?:runs/)?(\w+_\w2v)/": (HELIOS_RUN,),
    r"^helios/pipeline/transformer/": (f"{WAN_FORWARD}[pipeline/transformer-helios]",),
    r"^helios/transformer_variant/": (f"{WAN_FORWARD}[transformer_variant-helios_variant]",),
    r"^helios/wan_transformer/": (f"{WAN_FORWARD}[wan_transformer-wan]",),
    r"^helios/(?:scheduler|model_index)_(\w+)[/.]": (HELIOS_RUN.format("{}_t2v"),),
    r"^helios/image": (HELIOS_RUN.format("base_i2v"),),
    r"^helios/": (HELIOS_RUN.format("base_t2v"),),
    r"/pipeline/(text_encoder|tokenizer)": TEXT,
    r"/pipeline/(image_encoder|feature_extractor)": IMAGE,
    r"/pipeline/vae/": (START_LATENT, *FRAMES),
    r"/pipeline/": FRAMES,
    r"/image\.png": IMAGE,
    r"/reference\S+ siglip": IMAGE,
    r"/reference\S+ image_latents": (START_LATENT, IMAGE[1]),
    r"/reference\S+ (prompt_|pooled|clip|llama)": TEXT,
    r"/reference\S+ prompts/": (*TEXT, *FRAMES),
    r"/reference\.safetensors (\w+)/": (f"{ALL_FRAMES}[{{}}]",),
    r"/reference\.json ": FRAMES,
}

# What no test can notice -> why.
SILENT: dict[str, str] = {
    r"^flow_shift\.json 1[2-9]/tokens$": "the shift of so many tokens is at its cap already",
    r"(_encoder/\S+|_encoder_2/\S+|mid_block|refiner_blocks).*\b(k_proj|to_k)\.bias$": (
        "a key bias adds the same to all logits of a query, which softmax removes; only attention"
        " that normalises its keys can tell"
    ),
    r"^helios/\S*model_index\S* _diffusers_version$": "it says who wrote the file",
    r"^helios/reference\.json (runs/\w+/(scheduler|video)|versions/\w+)$": (
        "it describes the run in words"
    ),
    r"^helios/(pipeline/model_index|model_index_wan)\.json _class_name$": (
        "a pipeline of another name has the settings of the release, which are these"
    ),
    r"^helios/pipeline/tokenizer/tokenizer_config\.json unk_token$": "no prompt has such a word",
    r"^helios/pipeline/transformer/config\.json history_scale_mode$": "no history is amplified",
    r"^helios/pipeline/vae/config\.json scale_factor_spatial$": "the blocks say so too",
    r"^helios/\S*/text_encoder/config\.json (is_gated_act|dense_act_fn)$": (
        "feed_forward_proj says so too"
    ),
    r"^helios/\S*/text_encoder/config\.json (is_decoder|is_encoder_decoder|\w*decoder_\w+s)$": (
        "it concerns a decoder, which is not used"
    ),
    r"^helios/\S*/tokenizer\.json normalizer$": "the recorded prompts are plain letters",
    r"^helios/\S*/tokenizer\.json (truncation|padding)$": (
        "the caller says where a prompt is cut and how it is padded"
    ),
    r"config\.json (_class_name|_diffusers_version|transformers_version|architectures)$": (
        "it says who wrote the file"
    ),
    r"config\.json (\w*dropout\w*|initializer_factor|pretraining_tp|use_cache)$": (
        "it concerns training and generation"
    ),
    r"/(image_encoder|text_encoder_2)/config\.json initializer_range$": "it concerns training",
    r"/config\.json sample_t?size$": "any size is decoded",
    r"/config\.json (tie_word_embeddings|projection_dim|vision_use_head)$": (
        "it concerns a head that is not used"
    ),
    r"/text_encoder/config.json (\w+_token_id|max_position_embeddings)$": (
        "the tokenizer's own are used, and no prompt is that long"
    ),
    r"/text_encoder_2/config.json (bos|pad)_token_id$": "the tokenizer's own are used",
    r"^diffusers\S+/model_index\.json ": "which folders there are is what counts",
    r"^diffusers\S+/scheduler_config\.json ": (
        "solver and shift are settings of the sampler, with one shift"
    ),
    r"^helios/\S*model_index\S* (scheduler|text_encoder|tokenizer|transformer(_2)?|vae)$": (
        "which folders there are is what counts"
    ),
    r"^helios/scheduler_wan/\S+ (beta_\w+|trained_betas|rescale_betas\w+|sigma_m\w+|steps_offset"
    r"|sample_max_value|timestep_spacing|\w+_ratio)$": (
        "it concerns schedules that are not taken from flow"
    ),
    r"/tokenizer\w*/tokenizer\.json decoder": "prompts are only encoded",
    r"/tokenizer_config\.json (backend|[be]os_token|model_max_length|tokenizer_class)$": (
        "tokenizer.json says what is added to a prompt, the caller where it is cut"
    ),
    r"preprocessor_config\.json (do_convert_rgb|image_processor_type)$": (
        "images are RGB, and their processor is known"
    ),
    r"/text_encoder/\S+ (layers\.[34]\.|norm\.)": (
        "the states of the third layer from the end are what is used"
    ),
    r"/image_encoder/\S+ head\.": "the tokens are used, not SigLIP's pooled vector",
    r"^vae/\S+ (encoder|quant_conv)\.": (
        "there is no output of this VAE's encoder; the pipeline's own VAE has one"
    ),
}

Tensors = dict[str, np.ndarray]


class Thing(NamedTuple):
    """Names in a file that are disturbed together, and the function that writes the file so.

    It is one name, but for names that `SILENT` has one reason for, which go together.
    """

    file: str
    names: list[str]
    write: Callable[[list[str], Path, float], None]
    reason: str | None = None

    @property
    def label(self) -> str:
        return f"{self.file} {self.names[0]}"


def first_match(table: dict[str, Any], label: str) -> tuple[re.Match, Any] | None:
    """Return (match, value) of the first pattern of a table that is in `label`."""
    found = ((re.search(pattern, label), value) for pattern, value in table.items())
    return next(((match, value) for match, value in found if match), None)


def seeded(label: str) -> np.random.Generator:
    """Return a generator that is the same for a thing in every run."""
    return np.random.default_rng(list(label.encode()))


# Tensors


def read_tensors(path: Path) -> Tensors:
    """Read the arrays of a file; an image is one array."""
    if path.suffix == ".npz":
        return dict(np.load(path))
    if path.suffix == ".png":
        return {"pixels": np.asarray(Image.open(path))}
    if path.suffix == ".pt":
        return {name: tensor.numpy() for name, tensor in _state(path)[1].items()}
    return load_file(path)


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write a file anew in the format that it has."""
    if path.suffix == ".npz":
        np.savez(path, **tensors)
    elif path.suffix == ".png":
        Image.fromarray(tensors["pixels"]).save(path)
    elif path.suffix == ".pt":
        torch.save({_state(path)[0]: {k: torch.tensor(v) for k, v in tensors.items()}}, path)
    else:
        save_file(tensors, path)


def _state(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """(the one key of a Tencent checkpoint, the state dict under it)."""
    return next(iter(torch.load(path, weights_only=True).items()))


def disturb_tensor(label: str, tensors: Tensors, name: str, noise: float) -> np.ndarray:
    """Return a copy of a tensor with an error above the tolerance of the tests."""
    rng, array = seeded(label), tensors[name].copy()
    tolerance = first_match(TOLERANCES, label)
    if tolerance:
        kind, amount = tolerance[1]
        amount *= np.abs(array).max() if kind == "relative" else 1
        at = np.unravel_index(rng.choice(compared(tensors, name)), array.shape)
        array[at] += EXCESS * amount
    elif np.issubdtype(array.dtype, np.floating) or name.endswith(("image", "pixels")):
        rms = np.sqrt(np.mean(array.astype(np.float64) ** 2))
        noisy = array + rng.normal(scale=noise * rms, size=array.shape)
        whole = array.dtype == np.uint8
        array = (noisy.round().clip(0, 255) if whole else noisy).astype(array.dtype)
    else:
        at = tuple(rng.integers(array.shape))
        two_values = array.dtype == bool or "mask" in name or array.dtype == np.uint8
        array[at] = array[at] ^ 1 if two_values else array[at] + 1
    return array


def compared(tensors: Tensors, name: str) -> np.ndarray:
    """Flat indices of the numbers of an output that count: rows of a masked prompt do not."""
    array = tensors[name]
    mask = tensors.get(name.replace("prompt_embeds", "prompt_mask"), array)
    valid = np.ones_like(array) if mask is array else np.ones_like(array) * mask[..., None]
    return np.flatnonzero(valid)


def tensors_of(root: Path, file: str) -> tuple[list[str], Callable]:
    """(names of a file's tensors, what writes it with some of them disturbed)."""
    tensors = read_tensors(root / file)

    def write(names: list[str], path: Path, noise: float) -> None:
        changed = {n: disturb_tensor(f"{file} {n}", tensors, n, noise) for n in names}
        write_tensors(path, tensors | changed)

    return list(tensors), write


# JSON


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the paths of all values; a list of plain values is one value."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(x, dict | list) for x in value):
        items = enumerate(value)
    else:
        yield path
        return
    for key, child in items:
        yield from leaves(child, (*path, key))


def disturb_value(label: str, value: Any) -> Any:
    """Another value of the same type, off by more than may pass; of a list, one entry. An empty
    list gets one."""
    tolerance = first_match(TOLERANCES, label)
    if value == []:
        return [1]
    if isinstance(value, list):
        at = seeded(label).integers(len(value))
        return [disturb_value(label, x) if i == at else x for i, x in enumerate(value)]
    if tolerance:
        return value + EXCESS * tolerance[1][1]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return "x" + value
    return 1 if value is None else 2 * abs(value) + 1


def disturb_tokenizer(part: str, value: Any) -> Any:
    """Give vocabulary and merges the opposite order; take other parts away."""
    if part == "vocab" and isinstance(value, dict):
        return dict(zip(value, reversed(value.values()), strict=True))
    return value[::-1] if part in ("vocab", "merges") else None


def values_of(root: Path, file: str) -> tuple[list[str], Callable]:
    """(paths of a JSON file's values, what writes it with some of them disturbed)."""
    text = (root / file).read_text()
    whole = json.loads(text)
    if tokenizer := file.endswith("tokenizer.json"):
        paths = [(name,) for name in whole if name != "model" and whole[name]]
        paths += [("model", name) for name in ("vocab", "merges") if whole["model"].get(name)]
    else:
        paths = list(leaves(whole))
    named = {"/".join(map(str, path)): path for path in paths}

    def write(names: list[str], target: Path, _: float) -> None:
        changed = json.loads(text)
        for name in names:
            *parents, last = named[name]
            holder = functools.reduce(operator.getitem, parents, changed)
            if tokenizer:
                holder[last] = disturb_tokenizer(last, holder[last])
            else:
                holder[last] = disturb_value(f"{file} {name}", holder[last])
        target.write_text(json.dumps(changed, ensure_ascii=False))

    return [name for name in named if not re.search(QUESTIONS, f"{file} {name}")], write


def things(root: Path, only: str) -> Iterator[Thing]:
    """Yield everything to disturb, in the order of files."""
    for path in sorted(path for path in root.rglob("*.*") if path.suffix != ".md"):
        file = path.relative_to(root).as_posix()
        names, write = (values_of if path.suffix == ".json" else tensors_of)(root, file)
        together = collections.defaultdict(list)
        for name in names:
            if not re.search(only, label := f"{file} {name}"):
                continue
            if silent := first_match(SILENT, label):
                together[silent[1]].append(name)
            else:
                yield Thing(file, [name], write)
        for reason, group in together.items():
            yield Thing(file, group, write, reason)


# Tests


def readers(label: str) -> list[str]:
    """Return the ids of the tests that read a thing."""
    match, tests = first_match(READERS, label)
    return [test.format(*match.groups()) for test in tests]


def passes(tests: list[str], folder: Path) -> bool:
    """Run tests in this process. Raises RuntimeError if they cannot run at all."""
    # Some modules read the folder when they are imported.
    for name in [name for name in sys.modules if re.search(r"(^|\.)test_\w+$", name)]:
        if str(ROOT / "tests") in str(sys.modules[name].__file__):
            del sys.modules[name]
    # Garbage is collected after each run by these plugins, for longer than most tests take.
    quick = [f"-pno:{name}" for name in ("cacheprovider", "unraisableexception", "threadexception")]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = pytest.main(["-x", "-q", "--tb=short", *quick, f"--basetemp={folder}", *tests])
    shutil.rmtree(folder, ignore_errors=True)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r} for {tests}:\n{said.getvalue()}")
    return code == pytest.ExitCode.OK


def caught(thing: Thing, root: Path, scratch: Path) -> float:
    """Return the first of `NOISES` that makes a test fail; 0 if none does."""
    path = root / thing.file
    original = path.read_bytes()
    fixed = path.suffix == ".json" or first_match(TOLERANCES, thing.label)
    try:
        for noise in NOISES[:1] if fixed or thing.reason else NOISES:
            thing.write(thing.names, path, noise)
            if not passes(readers(thing.label), scratch):
                return noise
        return 0
    finally:
        path.write_bytes(original)


def prepare(work: Path) -> Path:
    """Copy the golden folder, point the tests to it, and keep compiled programs."""
    root = work / "golden"
    shutil.copytree(os.environ.get("FRAMEPACK_GOLDEN", ROOT / "tests" / "golden"), root)
    os.environ["FRAMEPACK_GOLDEN"] = str(root)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(work / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    from framepack_jax.bundle import contexts, loader, writer
    from framepack_jax.models import registry
    from tests.fixtures import memory

    memory.release = lambda: None
    registry.abstract_leaves = functools.cache(registry.abstract_leaves)
    loader.ocp = writer.ocp = saved = Memory()
    contexts.metadata = saved.load
    return root


class Memory:
    """Checkpoints of bundles in memory; a disk takes longer than the tests."""

    def __init__(self) -> None:
        self.trees, self.partial = {}, self

    def save(self, path: Path, tree: Any) -> None:
        path.mkdir()
        self.trees[str(path)] = tree

    def finalize(self, path: Path) -> None:
        pass

    def load(self, path: Path, wanted: Any = None) -> Any:
        tree = self.trees[str(path)]
        return tree if wanted is None else {name: tree[name] for name in wanted}


def report(results: list[tuple[Thing, float]]) -> bool:
    """Print the table and what no test can notice. Return True if all is as expected."""
    rows = collections.defaultdict(lambda: np.zeros(3, int))
    wrong, silent = [], collections.defaultdict(list)
    for thing, was_caught in results:
        column = 2 if thing.reason else 0 if was_caught else 1
        rows[thing.file][column] += len(thing.names)
        names = f"{thing.file}: {', '.join(thing.names)}"
        if thing.reason:
            silent[thing.reason].append(names)
        if bool(was_caught) == bool(thing.reason):
            wrong.append(f"{'one is caught after all' if was_caught else 'NOT CAUGHT'}: {names}")
    print(f"\n{'disturbed':>9} {'caught':>6} {'missed':>6} {'silent':>6}  file")
    for file, row in [*rows.items(), ("total", sum(rows.values()))]:
        print(f"{row.sum():9} {row[0]:6} {row[1]:6} {row[2]:6}  {file}")
    for reason, names in silent.items():
        print(f"\nsilent, because {reason}:", *names, sep="\n  ")
    print("", *wrong or ["all is caught that can be"], sep="\n")
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="regular expression in 'FILE NAME'")
    parser.add_argument("--shard", default="1/1", help="I/N: every Nth thing, from the Ith on")
    flags = parser.parse_args()
    start, step = map(int, flags.shard.split("/"))
    with tempfile.TemporaryDirectory(prefix="disturb_golden_") as work:
        root, scratch = prepare(Path(work)), Path(work) / "run"
        chosen = list(itertools.islice(things(root, flags.only), start - 1, None, step))
        # Files are written anew once with nothing disturbed, so that it is no writing that fails.
        for thing in {thing.file: thing for thing in chosen}.values():
            thing.write([], root / thing.file, 0)
        tests = sorted({test for thing in chosen for test in readers(thing.label)})
        if not passes(tests, scratch):
            sys.exit("tests fail before anything is disturbed; run: make test")
        results = []
        for i, thing in enumerate(chosen):
            began = time.monotonic()
            results.append((thing, caught(thing, root, scratch)))
            word = f"caught at {results[-1][1]}" if results[-1][1] else "not caught"
            took = time.monotonic() - began
            more = f" and {len(thing.names) - 1} more" if thing.reason else ""
            print(f"{i + 1}/{len(chosen)} {thing.label}{more}: {word} ({took:.1f} s)", flush=True)
        if not passes(tests, scratch):
            sys.exit("tests fail although everything is restored: what they read has changed")
    return 0 if report(results) else 1


if __name__ == "__main__":
    sys.exit(main())
