"""Schemas of the root configuration, and the one way in which any configuration is checked against its schema.

YAML holds the values, a dataclass types, ranges and meaning: whichever way a value was given, `validate` sees it.
"""

import dataclasses
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from core.api.errors import UsageError, nearest

__all__ = ["EvalConfig", "LaunchConfig", "RunConfig", "checked", "require_root", "validate"]

T = TypeVar("T")
_BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le}


def checked(*, choices: tuple[str, ...] | None = None, keys: tuple[str, ...] | None = None, **bounds: float) -> Any:
    """A dataclass field that `validate` holds to `choices`, or to the bounds `at_least`, `above` and `at_most`. A
    dictionary must have exactly these `keys`, and each of its values is held to the bounds."""
    assert bounds.keys() <= _BOUNDS.keys()
    return dataclasses.field(metadata={"choices": choices, "keys": keys, "bounds": bounds})


@dataclass(kw_only=True)
class DataConfig:
    source: str = checked(choices=("real", "synthetic"))
    root: str | None
    max_bad: int = checked(at_least=0)
    workers: int | None = checked(at_least=0)


@dataclass(kw_only=True)
class LaunchConfig:
    """What every launcher's `Config` has."""

    nproc: int = checked(at_least=1)
    timeout_s: float = checked(above=0)
    environment: dict[str, str]


@dataclass(kw_only=True)
class StopConfig:
    steps: int | None = checked(at_least=1)
    seconds: float | None = checked(above=0)
    epochs: int | None = checked(at_least=1)


@dataclass(kw_only=True)
class CheckpointConfig:
    every_steps: int | None = checked(at_least=1)
    every_seconds: float | None = checked(above=0)
    keep: int = checked(at_least=2)
    at_end: bool


@dataclass(kw_only=True)
class SubmissionConfig:
    org: str
    platform: str
    division: str = checked(choices=("open", "closed"))
    status: str = checked(choices=("cloud", "onprem", "preview", "research"))
    system: dict[str, str]


@dataclass(kw_only=True)
class EvalConfig:
    """When and how a workload evaluates. null leaves a value to the workload."""

    every: int | None = checked(at_least=1)
    """Epochs or samples from one evaluation to the next."""
    first: int | None = checked(at_least=1)
    """Epochs or samples before the first evaluation; null: as many as `every`."""
    unit: str = checked(choices=("epochs", "samples"))
    """What `every` and `first` count."""
    batch_size: int | None = checked(at_least=1)
    """Examples in a batch of the evaluation, on each rank."""


@dataclass(kw_only=True)
class RunConfig:
    """The root configuration. Parts typed Any are checked against their plugin's own `Config`."""

    RENAMED: ClassVar[Mapping[str, str]] = {"warmup_steps": "prewarm_steps"}

    workload: Any
    backend: Any
    launch: Any
    opt: dict[str, Any]
    tracker: dict[str, Any]
    default_exchange: str | None
    default_trackers: list[str]
    data: DataConfig
    stop: StopConfig
    checkpoint: CheckpointConfig
    submission: SubmissionConfig
    seed: Any
    deterministic: bool
    run_dir: str | None
    resume: str
    resume_changed: bool
    score_restarts: bool
    record_hostname: bool
    prewarm_steps: int = checked(at_least=0)
    log_seconds: float = checked(above=0)


def validate(schema: type[T], node: Any, where: str) -> T:
    """`node` as an instance of the dataclass `schema`; `where` is its place in the configuration, such as "workload".
    UsageError, naming the key, for an unknown key, a wrong type, a missing value or one out of range."""
    try:
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), {} if node is None else node))
    except ConfigKeyError as error:
        raise UsageError(renamed(schema, error.full_key or "", where) or unknown_key(error, where)) from None
    except OmegaConfBaseException as error:
        message = str(error.msg or error).splitlines()[0]
        raise UsageError(f"{where}.{error.full_key or ''}".strip(".") + f": {message}") from None
    _check_ranges(config, where)
    return config


def renamed(schema: type[Any], key: str, where: str = "") -> str | None:
    """Words for a `key` that is, or holds, an old one of the dataclass `schema`; None for any other. Its `RENAMED:
    ClassVar[Mapping[str, str]]` (old key -> new dotted key; one that begins with "/" counts from the root) answers with
    the new name for one release."""
    for old, new in getattr(schema, "RENAMED", {}).items():
        if f"{old}.".startswith(f"{key}."):
            now = new[1:] if new.startswith("/") else f"{where}.{new}".strip(".")
            return f"unknown key '{f'{where}.{old}'.strip('.')}': it is called {now} now"
    return None


def unknown_key(error: OmegaConfBaseException, where: str = "") -> str:
    """Words for a key that the configuration does not have, with the nearest of those beside it."""
    name, beside = f"{where}.{error.full_key or error.key}".strip("."), [str(key) for key in error.parent_node or ()]
    return f"unknown key '{name}': {nearest(str(error.key), beside)}"


def require_root(data: DataConfig, embedded: str | None, remedy: str) -> None:
    """For a workload's hook `check`: UsageError where a run on real data has neither data.root nor embedded data."""
    if data.source == "real" and not data.root and embedded is None:
        raise UsageError(f"data.root is not set, and workload.embedded_data is null: {remedy}")


def _check_ranges(config: Any, where: str) -> None:
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), f"{where}.{item.name}".strip(".")
        if dataclasses.is_dataclass(value):
            _check_ranges(value, name)
        elif item.metadata.get("keys"):
            _check_keys(value, item.metadata["keys"], name)
            for key in item.metadata["keys"]:
                _check_value(value[key], item.metadata, f"{name}.{key}")
        else:
            _check_value(value, item.metadata, name)


def _check_keys(value: dict[str, Any], keys: tuple[str, ...], name: str) -> None:
    for key in sorted(value.keys() - set(keys)):
        raise UsageError(f"unknown key '{name}.{key}': {nearest(key, keys)}")
    for key in keys:
        if key not in value:
            raise UsageError(f"{name}.{key} is missing: {name} needs a value for {' and '.join(keys)}")


def _check_value(value: Any, expected: Mapping[str, Any], name: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} is {value}; a finite number is expected")
    if value is None or not expected:
        return
    if expected["choices"] and value not in expected["choices"]:
        raise UsageError(f"{name}={value}: {nearest(str(value), expected['choices'])}")
    for bound, limit in expected["bounds"].items():
        if not _BOUNDS[bound](value, limit):
            words = bound.replace("above", "a number above").replace("_", " ")
            raise UsageError(f"{name}={value} is out of range; {words} {limit:g} is expected")
