"""Make a video from an image and a prompt: python sample.py --help."""

from framepack_jax.cli.sample import main

if __name__ == "__main__":
    main()
