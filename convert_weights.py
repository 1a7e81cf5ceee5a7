"""Make a bundle of PyTorch checkpoints: python convert_weights.py --help."""

from framepack_jax.cli.convert import main

if __name__ == "__main__":
    main()
