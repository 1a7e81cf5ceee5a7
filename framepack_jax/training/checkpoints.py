"""What is kept of a run, by orbax: written in the background, whole or not at all, and restored
onto any mesh and any number of processes.

    RUN/run.json                 the configuration, and the fingerprint of the data order
    RUN/checkpoints/STEP/state   trained parameters, optimizer, moving average
    RUN/checkpoints/STEP/data    where the stream of samples is
"""

import dataclasses
import json
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from framepack_jax.training.config import Checkpoints
from framepack_jax.training.state import State

FOLDER, RECORD = "checkpoints", "run.json"


class RunError(ValueError):
    """A run that is not there, or cannot be gone on with."""


def manager(run: epath.PathLike, cfg: Checkpoints) -> ocp.CheckpointManager:
    """The checkpoints of a run; to be closed."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=cfg.keep,
        keep_period=cfg.keep_every or None,
        enable_async_checkpointing=True,
        # A checkpoint is there when it was committed, on object stores too.
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(
        epath.Path(run) / FOLDER, options=options, item_names=("state", "data")
    )


def save(manager: ocp.CheckpointManager, step: int, state: State, data: dict[str, Any]) -> None:
    """Begin to write a checkpoint; an error of the one before is raised here. Raises OSError."""
    if step in manager.all_steps():
        return
    try:
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)
            ),
        )
    except ValueError as error:
        # What tensorstore says of a full disk.
        raise OSError(f"checkpoint of step {step} could not be written: {_line(error)}") from error


def wait(manager: ocp.CheckpointManager) -> None:
    """Until all is written. Raises OSError where it could not be."""
    try:
        manager.wait_until_finished()
    except ValueError as error:
        raise OSError(f"a checkpoint could not be written: {_line(error)}") from error


def restore(
    manager: ocp.CheckpointManager, step: int, abstract: State
) -> tuple[State, dict[str, Any]]:
    """State and stream position of a step, laid out as `abstract` says. Raises RunError."""
    try:
        found = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
            ),
        )
    except Exception as error:  # of many kinds, by what is damaged or differs
        raise RunError(
            f"checkpoint {step} in {manager.directory} cannot be restored ({_line(error)}); is it"
            " of the same network, trainable part and optimizer? --init-from begins anew from its"
            " parameters"
        ) from error
    return found["state"], found["data"]


def restore_params(folder: epath.PathLike, step: int, abstract: Any, part: str) -> Any:
    """`params` or `ema` of a checkpoint alone, laid out as `abstract` says. Raises RunError."""
    path = epath.Path(folder) / FOLDER / str(step) / "state"
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item={part: abstract},
                    restore_args=ocp.checkpoint_utils.construct_restore_args({part: abstract}),
                    partial_restore=True,
                ),
            )
    except Exception as error:  # of many kinds, by what is damaged or differs
        raise RunError(f"{part} of {path} cannot be restored ({_line(error)})") from error
    return found[part]


def write_record(run: epath.PathLike, record: dict[str, Any]) -> None:
    """Keep what a run is made of, whole or not at all."""
    folder = epath.Path(run)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{RECORD}.part"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(folder / RECORD)


def read_record(run: epath.PathLike) -> dict[str, Any]:
    """What a run is made of. Raises RunError where there is none."""
    file = epath.Path(run) / RECORD
    if not file.exists():
        raise RunError(f"{run} is no training run (it has no {RECORD})")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise RunError(f"{file} is damaged ({error}); restore it, or begin another run") from error


def steps_of(run: epath.PathLike) -> list[int]:
    """Steps that a run has checkpoints of, in order."""
    folder = epath.Path(run) / FOLDER
    if not folder.exists():
        return []
    return sorted(ocp.path.step.checkpoint_steps(folder))


def parse_run(text: str) -> tuple[str, int]:
    """RUN or RUN@STEP -> (folder, step), the newest by default. Raises RunError."""
    run, at, number = text.rpartition("@")
    if not (at and number.isdigit()):
        run, number = text, ""
    there = steps_of(run)
    if not there:
        raise RunError(
            f"{run} has no checkpoint; expected the folder of a training run, or RUN@STEP"
        )
    step = int(number) if number else there[-1]
    if step not in there:
        listed = ", ".join(map(str, there))
        raise RunError(f"{run} has no checkpoint of step {step}; there are {listed}")
    return run, step


def as_record(config: Any) -> dict[str, Any]:
    """A configuration as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0][:300]
