"""Sharding rules of HunyuanVideo's networks: patterns of paths, and mesh axes by dimension."""

from framepack_jax.parallel.sharding import REPLICATED

# Megatron's pairs (columns over `tensor`, then rows), with `fsdp` on the remaining dimension. A
# modulation is divided by rows: its result is a few vectors a sample, which every device needs
# whole. Embeddings of patches and text have no second half to pair with; the layers of the
# embedding's MLPs have inputs too narrow for a large `fsdp`.
TRANSFORMER = (
    (r"(refiner|double|single)/(\w+_)?qkv/kernel", (None, "fsdp", None, "tensor", None)),
    (r"(refiner|double|single)/(\w+_)?qkv/bias", (None, None, "tensor", None)),
    (r"(refiner|double|single)/(\w+_)?mlp_in/kernel", (None, "fsdp", "tensor")),
    (r"(refiner|double|single)/(\w+_)?mlp_in/bias", (None, "tensor")),
    (r"(refiner|double|single)/(\w+_)?(out|mlp_out|mod|gate)/kernel", (None, "tensor", "fsdp")),
    (r"(refiner|double|single)/(\w+_)?(out|mlp_out|mod|gate)/bias", ()),
    (r"(refiner|double|single)/(\w+_)?norm\d?/(scale|bias)", ()),
    (r"embed/(patch|text_proj|context_\w+)/kernel", (None, "fsdp")),
    (r"embed/(patch|text_proj|context_\w+)/bias", ()),
    (r"embed/\w+_(in|up)/kernel", (None, ("tensor", "fsdp"))),
    (r"embed/\w+_(in|up)/bias", (("tensor", "fsdp"),)),
    (r"embed/\w+_(out|down)/kernel", ("tensor", "fsdp")),
    (r"embed/\w+_(out|down)/bias", ()),
    (r"head/mod/kernel", ("tensor", "fsdp")),
    (r"head/out/kernel", ("fsdp", None)),
    (r"head/(mod|out)/bias", ()),
)

# Small weights, large activations: every device has all weights and computes some rows of the
# picture. The compiler extends the constraint on the input to all activations.
VAE = REPLICATED
