"""Write the products of LoHa and LoKr as low-rank factors, exactly.

LoHa (FedPara, arXiv 2108.06098) is an elementwise product, LoKr a Kronecker product of low-rank
matrices. Both are matrices of low rank themselves, so that they are attached and merged as a LoRA:

    (a1 b1) * (a2 b2)  =  rows of a1 x rows of a2, columns of b1 x columns of b2    rank r1 r2
    w1 (x) (a b)       =  (w1 (x) a) (1 (x) b)                                       rank i1 r

Tensors have the names of LyCORIS and PEFT. Shapes: torch modules (out, in), r rank.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.utils.messages import shorten

HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
# The first factor is whole or a product; the second is a product.
KRON = (("lokr_w1", "lokr_w2_a", "lokr_w2_b"), ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"))
NAMES = (*HADA, "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


class Product(NamedTuple):
    """Factors down (r, in) and up (out, r) in float32, and the rank that alpha is divided by."""

    down: np.ndarray
    up: np.ndarray
    rank: int


def product(tensors: Mapping[str, np.ndarray]) -> Product:
    """Return the factors of a module's LoHa or LoKr.

    Raises ConversionError for other tensors, for shapes that do not fit each other, and for a LoKr
    whose second factor is whole: its change has full rank.
    """
    parts = {name: np.asarray(x, np.float32) for name, x in tensors.items()}
    if odd := [f"{name} {x.shape}" for name, x in parts.items() if x.ndim != 2]:
        raise ConversionError(f"it has {shorten(odd)}, expected matrices")
    names = tuple(sorted(parts))
    if "lokr_w2" in parts:
        raise ConversionError(
            "it is a LoKr with a whole second factor (lokr_w2), which is not supported: its change"
            " has full rank; expected lokr_w2_a and lokr_w2_b: train it with a smaller rank"
        )
    if names != HADA and names not in KRON:
        raise ConversionError(
            f"it has {shorten(names)}; expected {shorten(HADA)} (LoHa), or {shorten(KRON[0])}"
            " (LoKr)"
        )
    for name, x in parts.items():
        if name.endswith("_a") and x.shape[1] != len(parts[f"{name[:-1]}b"]):
            raise ConversionError(f"{name} {x.shape} and {name[:-1]}b do not share a rank")
    if names == HADA:
        return _hadamard(*(parts[name] for name in HADA))
    first = parts["lokr_w1"] if names == KRON[0] else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    return _kronecker(first, parts["lokr_w2_a"], parts["lokr_w2_b"])


def _hadamard(a1: np.ndarray, b1: np.ndarray, a2: np.ndarray, b2: np.ndarray) -> Product:
    if a1.shape[0] != a2.shape[0] or b1.shape[1] != b2.shape[1]:
        raise ConversionError(
            f"its products are ({len(a1)}, {b1.shape[1]}) and ({len(a2)}, {b2.shape[1]}), which are"
            " to be equal"
        )
    up = np.einsum("or,os->ors", a1, a2).reshape(len(a1), -1)
    down = np.einsum("ri,si->rsi", b1, b2).reshape(-1, b1.shape[1])
    return Product(down, up, len(b1))


def _kronecker(first: np.ndarray, a: np.ndarray, b: np.ndarray) -> Product:
    outputs, inputs = first.shape
    if inputs <= outputs:
        factors = np.kron(np.eye(inputs, dtype=np.float32), b), np.kron(first, a)
    else:
        factors = np.kron(first, b), np.kron(np.eye(outputs, dtype=np.float32), a)
    return Product(*factors, len(b))
