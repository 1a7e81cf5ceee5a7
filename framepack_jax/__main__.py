"""`framepack COMMAND`, also `python -m framepack_jax COMMAND`."""

import importlib
import sys

COMMANDS = {
    "sample": "image + prompt -> video",
    "resume": "continue an interrupted run",
    "decode": "decode the saved latents of a run",
    "serve": "HTTP API: one loaded bundle and a queue of videos",
    "convert": "PyTorch checkpoints -> bundle",
    "export": "bundle or LoRA -> PyTorch checkpoint",
    "verify": "compare a checkpoint with a bundle",
    "inspect": "describe a checkpoint, LoRA or bundle",
    "push-to-hub": "bundle, LoRA or exported network -> Hugging Face hub",
    "pull": "what was pushed -> a folder here",
    "doctor": "what is wrong with this machine, and what to do",
    "bench": "measure a bundle on this machine -> one Markdown row",
    "explain": "draw what a packing schedule puts into the context",
    "synthetic": "make videos with captions to try training with",
    "prepare": "videos + captions -> dataset",
    "train-vae": "videos -> VAE in a bundle",
    "fit-codebook": "dataset -> codebook of discretized history",
    "train": "dataset + bundle -> trained model",
    "launch": "run a training command until it finishes",
    "evaluate": "drift and forgetting of bundles, or of a video file",
    "ablation": "train and evaluate a list of methods -> one table",
    "elo": "runs of several methods -> page for blind votes",
    "elo-ratings": "votes -> ELO ratings",
    "export-run": "training run -> bundle or LoRA file",
}


def main(args: list[str] | None = None) -> None:
    """Run a command; without one, or with --help, list the commands."""
    args = sys.argv[1:] if args is None else args
    if args and args[0] in COMMANDS:
        command = importlib.import_module(f"framepack_jax.cli.{args[0].replace('-', '_')}")
        return command.main(args[1:], prog=f"framepack {args[0]}")
    lines = [f"  {name:12}{what}" for name, what in COMMANDS.items()]
    usage = "\n".join(["usage: framepack COMMAND [--help]", "", *lines])
    if not args or args[0] in ("-h", "--help"):
        print(usage)
        return None
    raise SystemExit(f"error: unknown command {args[0]!r}\n{usage}")


if __name__ == "__main__":
    main()
