"""Train a FramePack model: python train.py --help."""

from framepack_jax.cli.train import main

if __name__ == "__main__":
    main()
