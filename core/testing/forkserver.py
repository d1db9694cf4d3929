"""A process that has imported torch and core once, and forks itself for each command: half a second instead of six.

The child runs `core.run.main` with the command's arguments, environment and folder, as `python -m core.run` would; what
it does not repeat is the import, also of libraries that an earlier command imported. Several children are the ranks of
one run, as under an outer launcher, or those of a test's own program. Tests whose subject is start-up itself use a
fresh interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path


class ForkServer:
    """Started on first use. What runs gives (exit status, stdout, stderr), with a negative status for a signal, and for
    commands the kind of the error that ended them before they had a run folder."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, arguments: list[str], cwd: Path, env: dict[str, str], ranks: int = 1) -> tuple[int, str, str, str]:
        """`python -m core.run ARGUMENTS`. Several ranks share their output; the exit status is that of the first."""
        with tempfile.TemporaryDirectory() as folder:
            children = [{"env": {**env, **place}, "folder": folder} for place in rank_places(ranks)]
            code, *_ = self._ask({"program": "", "arguments": arguments, "cwd": str(cwd)}, children)
            kind = Path(folder, "refusal")  # a killed command leaves none
            return code, *_printed(folder), kind.read_text() if kind.exists() else ""

    def run_program(
        self, program: Path, arguments: Sequence[str], environments: Sequence[Mapping[str, str]]
    ) -> list[tuple[int, str, str]]:
        """`python PROGRAM ARGUMENTS` once in each environment, all at the same time."""
        with contextlib.ExitStack() as stack:
            folders = [stack.enter_context(tempfile.TemporaryDirectory()) for _ in environments]
            request = {"program": str(program), "arguments": list(arguments), "cwd": folders[0]}
            children = [{"env": env, "folder": folder} for env, folder in zip(environments, folders, strict=True)]
            codes = self._ask(request, children)
            return [(code, *_printed(folder)) for code, folder in zip(codes, folders, strict=True)]

    def _ask(self, request: Mapping[str, object], children: Sequence[Mapping[str, object]]) -> list[int]:
        """Their exit statuses."""
        if self._process is None:
            command = [sys.executable, "-m", "core.testing.forkserver"]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
            atexit.register(self._process.kill)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([{**request, **child} for child in children]), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def _printed(folder: str) -> tuple[str, str]:
    return Path(folder, "stdout").read_text(), Path(folder, "stderr").read_text()


def _serve() -> None:
    for module in ("hydra", "torch._dynamo", "core.run", "core.launch.start", "core.engine.worker"):
        importlib.import_module(module)  # torch._dynamo since an optimizer's first step would import it

    for line in sys.stdin:
        requests = json.loads(line)
        children = [_fork(request) for request in requests]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        listing = Path(requests[0]["folder"], "modules")  # a killed command leaves none
        libraries = listing.read_text().split() if listing.exists() else []
        print(json.dumps(codes), flush=True)  # from here on the folder may be gone
        for name in libraries:
            if name not in sys.modules:
                with contextlib.suppress(Exception):  # what does not import outside a command stays out
                    importlib.import_module(name)


def _libraries() -> list[str]:
    """Modules from installed distributions, without plugins: a test may replace those."""
    installed = sysconfig.get_paths()["purelib"]
    return [
        name
        for name, module in list(sys.modules.items())
        if (getattr(module, "__file__", None) or "").startswith(installed) and not name.startswith("timetrial")
    ]


def rank_places(count: int) -> list[dict[str, str]]:
    """The environment that a launcher would set for each rank; nothing for a single one."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _fork(request: dict[str, object]) -> int:
    """The child's number; the child itself does not return."""
    child = os.fork()
    if child == 0:
        _become(request)
    return child


def _become(request: dict[str, object]) -> None:
    """Turns this process into the command; does not return."""
    from core.run import main

    os.setsid()
    os.chdir(str(request["cwd"]))
    os.environ.clear()
    os.environ.update(request["env"])  # pyright: ignore[reportArgumentType, reportCallIssue]
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # plugins made up for a test
    for name, number in (("stdout", 1), ("stderr", 2)):
        descriptor = os.open(os.path.join(str(request["folder"]), name), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    program = str(request["program"])
    sys.argv = [program or "core.run", *request["arguments"]]  # pyright: ignore[reportGeneralTypeIssues]
    code = 1
    try:
        if program:
            sys.path.insert(0, str(Path(program).parent))
            runpy.run_path(program, run_name="__main__")
            code = 0
        else:
            code = main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        refusal = getattr(getattr(sys, "last_value", None), "kind", "")
        Path(str(request["folder"]), "refusal").write_text(refusal)
        Path(str(request["folder"]), "modules").write_text(" ".join(_libraries()))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
