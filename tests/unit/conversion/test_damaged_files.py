"""Files with random damage are refused, or read as they stand."""

import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save

from framepack_jax import bundle
from framepack_jax.conversion import export, file_formats
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.conversion.weight_files import ConversionError, open_checkpoint
from tests.fixtures.checkpoints import small_state

NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "U64": np.uint64, "I32": np.int32, "U32": np.uint32, "I16": np.int16,
    "U16": np.uint16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
Mutation = tuple[bytes, int | None]


def flipped(data: bytes, random: np.random.Generator) -> Mutation:
    """(the data with one bit, or a few bytes, changed at a place; that place)."""
    place = int(random.integers(len(data)))
    if random.integers(4):
        changed = bytes([data[place] ^ (1 << int(random.integers(8)))])
    else:
        changed = random.bytes(int(random.integers(1, 9)))
    return data[:place] + changed + data[place + len(changed) :], place


def cut(data: bytes, random: np.random.Generator) -> Mutation:
    return data[: int(random.integers(len(data)))], None


def edited(data: bytes, random: np.random.Generator) -> Mutation:
    """A safetensors file with one part of its header replaced by another of the sort."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    names = list(header)
    name = names[random.integers(len(names))]
    numbers = [0, 1, 2, 5, -1, 2**31, 2**63, 10**30, 1.5, "7", None, []]
    number = numbers[random.integers(len(numbers))]
    match random.integers(7):
        case 0:
            header[name]["dtype"] = [*NUMPY, "F4", "F8_E8M0", "C64", "", 3][random.integers(20)]
        case 1:
            header[name]["shape"] = [number, *header[name]["shape"][1:]]
        case 2:
            header[name]["data_offsets"][random.integers(2)] = number
        case 3:
            header[str(number)] = header.pop(name)
        case 4:
            header[name]["data_offsets"] = header[names[0]]["data_offsets"]
        case 5:
            del header[name][["dtype", "shape", "data_offsets"][random.integers(3)]]
        case _:
            header["__metadata__"] = number
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :], None


def meant(data: bytes) -> dict[str, np.ndarray]:
    """Read a safetensors file by the format's description, without its library."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(data[8 + length + begin : 8 + length + end], NUMPY[entry["dtype"]])
        tensors[name] = array.reshape(entry["shape"])
    return tensors


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray, name: str) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
    assert ours.tobytes() == theirs.tobytes(), name


def read_all(file: Path) -> dict[str, np.ndarray] | None:
    """Every tensor of a file, None where it is refused."""
    try:
        checkpoint = open_checkpoint(file)
        return {name: checkpoint.read(name) for name in checkpoint.names()}
    except ConversionError as error:
        assert str(file) in str(error)
        return None


def test_damaged_safetensors_are_refused_or_read_as_they_stand(tmp_path) -> None:
    random, data, file = np.random.default_rng(1), save(small_state()), tmp_path / "x.safetensors"
    refused = 0
    for mutate, count in ((flipped, 350), (cut, 50), (edited, 200)):
        for _ in range(count):
            changed, _ = mutate(data, random)
            file.write_bytes(changed)
            found = read_all(file)
            if found is None:
                refused += 1
                continue
            expected = meant(changed)
            if all(array.dtype.itemsize > 1 for array in expected.values()):
                assert found.keys() == expected.keys()
                for name, array in expected.items():
                    assert_same_bits(found[name], array, name)
    assert 200 < refused < 550


def test_damaged_files_make_the_bundle_of_what_they_say_or_none(framepack, tmp_path) -> None:
    """Through the whole conversion: an error, or the tensors of the file."""
    random, file = np.random.default_rng(5), tmp_path / "x.safetensors"
    data, outcomes = save(framepack), []
    damage = [(flipped, 10), (edited, 10), (cut, 4)]
    for number, mutate in enumerate([mutate for mutate, count in damage for _ in range(count)]):
        # Every second time only the numbers are changed.
        begin = 0 if number % 2 else 8 + struct.unpack_from("<Q", data)[0]
        changed, _ = mutate(data[begin:], random) if mutate is flipped else mutate(data, random)
        file.write_bytes(data[:begin] + changed if mutate is flipped else changed)
        output = tmp_path / f"bundle_{number}"
        try:
            make_bundle(BundleRequest(output=str(output), transformer=file, rope_axes="4,6,6"))
        except ConversionError as error:
            assert "x.safetensors" in str(error)
            outcomes.append(False)
            continue
        outcomes.append(True)
        network = export.Export(output, bundle.read_manifest(output), "transformer")
        expected = meant(file.read_bytes())
        assert {tensor.name for tensor in network.tensors} == expected.keys()
        for tensor, array in zip(network.tensors, network.arrays(), strict=True):
            assert_same_bits(array, expected[tensor.name], tensor.name)
    assert 4 <= sum(outcomes) <= 20


def test_damaged_8_bit_files_are_refused_or_read(tmp_path) -> None:
    fp8, note = torch.float8_e4m3fn, json.dumps({"format": "float8_e4m3fn"}).encode()
    state = {
        "a.weight": torch.ones(4, 4).to(fp8), "a.scale_weight": torch.tensor(0.5),
        "b.weight": torch.ones(4, 4).to(fp8), "b.weight_scale": torch.ones(4, 1),
        "b.comfy_quant": torch.frombuffer(bytearray(note), dtype=torch.uint8),
        "c.weight": torch.ones(4, 4), "scaled_fp8": torch.zeros(2).to(fp8),
    }  # fmt: skip
    random, data, file = np.random.default_rng(4), save(state), tmp_path / "x.safetensors"
    file.write_bytes(data)
    assert read_all(file)["b.weight"].dtype == ml_dtypes.bfloat16
    refused = 0
    for mutate in (flipped, edited):
        for _ in range(100):
            file.write_bytes(mutate(data, random)[0])
            refused += read_all(file) is None
    assert 60 < refused < 190


def places(file: Path) -> Iterator[tuple[int, int]]:
    """Return the span of each tensor's data in a PyTorch file, in the order of saving."""
    data = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        for number in range(len(small_state())):
            (name,) = (n for n in archive.namelist() if n.endswith(f"/data/{number}"))
            stored = archive.read(name)
            begin = data.index(stored)
            yield begin, begin + len(stored)


def test_damaged_pytorch_files_are_refused_or_change_what_was_hit(tmp_path) -> None:
    """Damage outside of the numbers of a tensor never changes a number."""
    whole, file = tmp_path / "whole.pt", tmp_path / "x.pt"
    torch.save(small_state(), whole)
    data, random = whole.read_bytes(), np.random.default_rng(2)
    ranges = dict(zip(small_state(), places(whole), strict=True))
    expected = read_all(whole)
    refused = 0
    for mutate, count in ((flipped, 330), (cut, 70)):
        for _ in range(count):
            changed, place = mutate(data, random)
            file.write_bytes(changed)
            found = read_all(file)
            if found is None:
                refused += 1
                continue
            assert found.keys() == expected.keys()
            for name, (begin, end) in ranges.items():
                # A change is up to eight bytes long.
                if not begin - 8 < place < end:
                    assert_same_bits(found[name], expected[name], f"{name}, byte {place}")
    assert 150 < refused < 390


def test_dicts_are_followed_to_a_depth() -> None:
    """A file of dicts in dicts must not end the process."""
    nested: dict = {"weight": 1}
    for _ in range(5000):
        nested = {"module": nested}
    [(path, _)] = file_formats._leaves(nested)
    assert len(path) == file_formats.MAX_DEPTH
