"""Types of the numbers in network configs, with ranges that hold every network."""

from typing import Annotated

from framepack_jax.utils.fields import Range

# Text tokens that the released transformers are conditioned on.
MAX_PROMPT_TOKENS = 256
MAX_SIZE, MAX_LAYERS = 10**9, 1000
Size = Annotated[int, Range(above=0, at_most=MAX_SIZE)]
Layers = Annotated[int, Range(above=0, at_most=MAX_LAYERS)]
Positive = Annotated[float, Range(above=0, at_most=MAX_SIZE)]
