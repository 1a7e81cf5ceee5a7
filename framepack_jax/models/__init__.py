"""The networks: Flax Linen blocks and pure functions over their parameters."""
