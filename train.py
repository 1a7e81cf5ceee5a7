"""Train a FramePack model: python train.py --help."""

from framepack_jax.commands.train import main

if __name__ == "__main__":
    main()
