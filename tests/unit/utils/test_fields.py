import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from framepack_jax.utils import fields
from framepack_jax.utils.fields import FieldError, Range


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: Literal["adamw", "muon"] = "adamw"
    b1: Annotated[float, Range(at_least=0, below=1)] = 0.9


@dataclasses.dataclass(frozen=True)
class Config:
    path: Path
    steps: Annotated[int, Range(at_least=1, at_most=10_000)] = 25
    axes: tuple[int, int] = (1, 2)
    sigmas: Annotated[tuple[float, ...], Range(above=0, at_most=1)] = (0.5,)
    scale: Annotated[float, Range(at_least=0)] | None = None
    names: tuple[str, ...] = ()
    is_on: bool = False
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: Optimizer = Optimizer()


CONFIG = Config(Path("x"))


@dataclasses.dataclass(frozen=True)
class Optional:
    optimizer: Optimizer | None = None


def test_an_optional_dataclass_takes_an_object() -> None:
    found = fields.load(Optional, {"optimizer": {"name": "muon"}})
    assert found == Optional(Optimizer("muon")) and fields.load(Optional, {}) == Optional()
    with pytest.raises(FieldError, match=r"optimizer\.name = 'sgd': expected one of adamw, muon"):
        fields.load(Optional, {"optimizer": {"name": "sgd"}})


def test_a_json_object_becomes_the_types_of_the_fields() -> None:
    values = {
        "path": "a/b", "axes": [3, 4], "sigmas": [1, 0.5], "scale": 2, "names": ["one"],
        "is_on": True, "notes": {"a": [1]}, "optimizer": {"name": "muon", "b1": 0},
    }  # fmt: skip
    config = fields.load(Config, values)
    assert config == Config(
        Path("a/b"), 25, (3, 4), (1.0, 0.5), 2.0, ("one",), True, {"a": [1]}, Optimizer("muon", 0.0)
    )
    assert [type(config.scale), type(config.sigmas[0])] == [float, float]
    fields.check(config)
    assert fields.convert(Config, {"axes": [3, 4]}) == {"axes": (3, 4)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "3"}, "steps = '3': expected a whole number from 1 to 10,000"),
        ({"steps": True}, "steps = True: expected a whole number from 1 to 10,000"),
        ({"steps": 1.0}, "steps = 1.0: expected a whole number"),
        ({"axes": [1]}, r"axes = \[1\]: expected a list of 2, each a whole number"),
        ({"axes": 1}, "axes = 1: expected a list of 2"),
        ({"sigmas": [0.5, 0]}, "sigmas.*: expected a list, each a number above 0, at most 1"),
        ({"scale": math.nan}, "scale = nan: expected a number of 0 or more or none"),
        ({"scale": math.inf}, "scale = inf: expected"),
        ({"scale": 10**400}, "scale = 1000.*: expected"),
        ({"is_on": 1}, "is_on = 1: expected true or false"),
        ({"names": "one"}, "names = 'one': expected a list, each a text"),
        ({"notes": 1}, "notes = 1: expected an object"),
        ({"path": 1}, "path = 1: expected a path"),
        ({"optimizer": {"b1": 1}}, "optimizer.b1 = 1: expected a number from 0 to below 1"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.name = 'sgd': expected one of adamw, muon"),
        ({"optimizer": 1}, "optimizer = 1: expected an object"),
        ({"widht": 1}, r"unknown fields \['widht'\]; known are path, steps"),
        ([], r"Config = \[\]: expected an object"),
    ],
)
def test_an_error_names_field_value_and_expectation(values, message) -> None:
    given = {"path": "x", **values} if isinstance(values, dict) else values
    with pytest.raises(FieldError, match=f"^{message}"):
        fields.load(Config, given)


def test_absent_and_unknown_fields() -> None:
    with pytest.raises(FieldError, match="path is missing"):
        fields.load(Config, {})
    given = {"path": "x", "old": 1, "optimizer": {"older": 2}}
    assert fields.load(Config, given, ignore_unknown=True) == CONFIG


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps 0: expected a whole number from 1 to 10,000"),
        ({"is_on": None}, "--is-on None: expected true or false"),
        ({"optimizer": Optimizer(b1=1.0)}, "--optimizer.b1 1.0: expected a number from 0 to below"),
    ],
)
def test_fields_of_an_instance_are_checked_as_flags(changes, message) -> None:
    fields.check(CONFIG)
    with pytest.raises(FieldError, match=f"^{message}"):
        fields.check(dataclasses.replace(CONFIG, **changes))
