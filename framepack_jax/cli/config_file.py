"""Read the configuration of a run from a Python file: a path, or a name in configs/."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
C = TypeVar("C")
PACKAGE = Path(__file__).parents[1]


def defaults(flags: Callable[..., T], kind: type[Any], args: list[str]) -> T:
    """Return default flags with the values of the file after --config, a configuration of type
    `kind`. Raises ValueError."""
    file = next(
        (a.partition("=")[2] or (args[i + 1] if i + 1 < len(args) else "")
         for i, a in enumerate(args) if a == "--config" or a.startswith("--config=")),
        None,
    )  # fmt: skip
    if file is None:
        return flags()
    path = find(file)
    cfg = read_config(path, kind)
    names = [field.name for field in dataclasses.fields(kind)]
    values = {name: getattr(cfg, name) for name in names}
    return flags(**values, config=path)


def folder() -> Path:
    """Return configs/: inside the package if it was installed from a wheel, beside it in a clone
    and in an editable installation."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def names() -> list[str]:
    """Return the names of the configurations that come with the package."""
    return sorted(file.stem for file in folder().glob("*.py"))


def find(text: str) -> Path:
    """Return the file of a configuration: a path, or a name without folder and suffix. Raises
    ValueError with the known names if there is none of this name."""
    path = Path(text).expanduser()
    if path.suffix or "/" in text:
        return path
    if text not in names():
        raise ValueError(
            f"--config {text}: no configuration has this name; expected {', '.join(names())}, or"
            " the path of a Python file"
        )
    return folder() / f"{text}.py"


def read_config(file: Path, kind: type[C]) -> C:
    """Return `get_config()` of a Python file. Raises ValueError with the file and the fault."""
    if not file.is_file():
        raise ValueError(
            f"--config {file} does not exist; give the path of a Python file, or a name:"
            f" {', '.join(names())}"
        )
    spec = importlib.util.spec_from_file_location("config", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config {file}: expected a Python file that defines get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        cfg = module.get_config()
    except Exception as error:  # a Python file can raise any error
        line = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"--config {file} cannot be read: {line}") from error
    if not isinstance(cfg, kind):
        raise ValueError(
            f"--config {file}: get_config() returns a {type(cfg).__name__}, expected"
            f" {kind.__module__}.{kind.__name__}"
        )
    return cfg
