"""Sharding rules of Wan's networks: patterns of paths, and mesh axes by dimension."""

from framepack_jax.parallel.sharding import REPLICATED

# Megatron's pairs (columns over `tensor`, then rows), with `fsdp` on the remaining dimension, as
# HunyuanVideo's. Norms of q and k span all heads, which `tensor` divides.
TRANSFORMER = (
    (r"blocks/qkv/kernel", (None, "fsdp", None, "tensor", None)),
    (r"blocks/cross_q/kernel", (None, "fsdp", "tensor", None)),
    (r"blocks/cross_kv/kernel", (None, "fsdp", None, "tensor", None)),
    (r"blocks/(qkv|cross_kv)/bias", (None, None, "tensor", None)),
    (r"blocks/cross_q/bias", (None, "tensor", None)),
    (r"blocks/(cross_)?[qk]_norm/scale", (None, "tensor", None)),
    (r"blocks/mlp_in/kernel", (None, "fsdp", "tensor")),
    (r"blocks/mlp_in/bias", (None, "tensor")),
    (r"blocks/(out|cross_out|mlp_out)/kernel", (None, "tensor", "fsdp")),
    (r"blocks/(out|cross_out|mlp_out)/bias", ()),
    (r"blocks/cross_norm/(scale|bias)", ()),
    (r"blocks/(modulation|context_key_scale)", ()),
    (r"embed/(patch|context_\w+)/kernel", (None, "fsdp")),
    (r"embed/(patch|context_\w+)/bias", ()),
    (r"embed/(time|text)_in/kernel", (None, ("tensor", "fsdp"))),
    (r"embed/(time|text)_in/bias", (("tensor", "fsdp"),)),
    (r"embed/(time|text)_out/kernel", ("tensor", "fsdp")),
    (r"embed/(time|text)_out/bias", ()),
    (r"embed/time_mod/kernel", ("tensor", "fsdp")),
    (r"embed/time_mod/bias", ()),
    (r"head/modulation", ()),
    (r"head/out/kernel", ("fsdp", None)),
    (r"head/out/bias", ()),
)

# As for HunyuanVideo's: every device has all weights and computes some rows of the picture.
VAE = REPLICATED
