"""A key that has been renamed is refused with its new name, wherever it was given, on the real command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import pytest

from core.api.config import RunConfig
from core.compose.discovery import discover
from core.testing.cli import run_cli

OPT = """
from collections.abc import Mapping
from typing import ClassVar
from core.api.config import checked

@dataclass(kw_only=True)
class Inner:
    every: int = checked(at_least=1)

@dataclass(kw_only=True)
class Renamed:
    RENAMED: ClassVar[Mapping[str, str]] = {"interval": "inner.every", "outer.pace": "inner.every"}
    inner: Inner

class P(Plugin):
    spec = OptSpec(interface=2, summary="made up", numerics="bitwise")
    Config = Renamed
"""


def refused(*arguments: str, tmp_path: Path, **env: str) -> str:
    outcome = run_cli(*arguments, run_dir=tmp_path / "run", **env).expect(2)
    (line,) = outcome.stderr.strip().splitlines()
    assert not (tmp_path / "run").exists()
    return line


@pytest.mark.parametrize("sign", ["", "+", "++", "~"])
@pytest.mark.parametrize("old", ["interval", "outer.pace"])
def test_an_old_key_of_an_opt_is_answered_with_its_new_name(sign: str, old: str, tmp_path: Path, fake_plugin) -> None:
    site = fake_plugin("opt", "paced", OPT)
    (site / "fake_paced_paced/conf/opt/paced.yaml").write_text("# @package opt.paced\ninner: {every: 1}\n")
    key = f"opt.paced.{old}" if sign == "~" else f"opt.paced.{old}=3"
    line = refused("workload=toy", "+opt=paced", f"{sign}{key}", tmp_path=tmp_path, PYTHONPATH=str(site))
    assert line.endswith(f"unknown key 'opt.paced.{old}': it is called opt.paced.inner.every now")


def test_an_old_key_in_a_file_is_answered_with_its_new_name(tmp_path: Path, fake_plugin) -> None:
    site = fake_plugin("opt", "paced", OPT)
    (site / "fake_paced_paced/conf/opt/paced.yaml").write_text("# @package opt.paced\ninterval: 3\n")
    line = refused("workload=toy", "+opt=paced", tmp_path=tmp_path, PYTHONPATH=str(site))
    assert line.endswith("unknown key 'opt.paced.interval': it is called opt.paced.inner.every now")


def test_an_unknown_key_that_nothing_replaces_is_answered_with_the_nearest_one(tmp_path: Path, fake_plugin) -> None:
    site = fake_plugin("opt", "paced", OPT)
    (site / "fake_paced_paced/conf/opt/paced.yaml").write_text("# @package opt.paced\ninner: {every: 1}\n")
    line = refused("workload=toy", "+opt=paced", "opt.paced.iner=3", tmp_path=tmp_path, PYTHONPATH=str(site))
    assert "did you mean 'inner'?" in line


def test_every_new_name_is_a_key_and_no_old_one_is() -> None:
    """In the configuration of core and of every plugin that is installed."""
    configs = {getattr(installed.load(), "Config", None) for installed in discover().plugins}
    renaming = [schema for schema in (RunConfig, *configs) if hasattr(schema, "RENAMED")]
    assert len(renaming) > 5
    for schema in renaming:
        names = dict.fromkeys(schema.RENAMED.values(), True) | dict.fromkeys(schema.RENAMED, False)
        found = {name: has_anywhere(name) if name[0] == "/" else has(schema, name) for name in names}
        assert found == names, schema


def has_anywhere(dotted: str) -> bool:
    """For a key from the root: whether the opt that it belongs to has it."""
    group, _, rest = dotted.removeprefix("/").partition(".")
    name, _, key = rest.partition(".")
    return group == "opt" and (not key or has(discover().find("opt", name).load().Config, key))


def has(schema: Any, dotted: str) -> bool:
    """Whether a dataclass, or one within it, has this field."""
    name, _, rest = dotted.partition(".")
    field = get_type_hints(schema).get(name) if name in {field.name for field in dataclasses.fields(schema)} else None
    if not rest:
        return field is not None
    return field is not None and (has(field, rest) if dataclasses.is_dataclass(field) else get_origin(field) is dict)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("warmup_steps=3",), "'warmup_steps': it is called prewarm_steps now"),
        (("+warmup_steps=3",), "'warmup_steps': it is called prewarm_steps now"),
        (("+opt=cuda_graphs", "opt.cuda_graphs.warmup=3"), "it is called opt.cuda_graphs.eager_steps now"),
        (("workload.eval_every_epochs=3",), "'workload.eval_every_epochs': it is called workload.eval.every now"),
        (("workload=maskrcnn", "workload.box_target=0.1"), "it is called workload.targets.box_ap now"),
        (
            ("-m", "workload=bert,rnnt", "workload.start_warmup_step=0"),
            "called workload.lr_warmup_start_step now",
        ),
        (("experiment=resnet_fast", "+workload.data_set=idx"), "it is called workload.data_format now"),
        (("+opt=sharp", "opt.sharp.chunk_mb=1"), "it is called opt.sharp.chunk_mib now"),
        (("backend=gloo", "backend.bucket_cap_mb=1"), "it is called opt.ddp.bucket_cap_mib now"),
    ],
)
def test_an_old_key_of_this_repository_is_answered_with_its_new_name(
    arguments: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    assert refused(*arguments, tmp_path=tmp_path).endswith(expected)
