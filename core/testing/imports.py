"""What importing a module brings with it, asked for many modules in one fresh interpreter, which forks for each."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Sequence

_ASK = """
import importlib, json, os, sys

def brought(module, watched):
    ours, theirs = os.pipe()
    if os.fork() == 0:
        for name in module.split():
            importlib.import_module(name)
        os.write(theirs, json.dumps([name for name in watched if name in sys.modules]).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as answer:
        text = answer.read()
    os.wait()
    return json.loads(text) if text else ["it cannot be imported"]

modules, watched = json.load(sys.stdin)
print(json.dumps({module: brought(module, watched) for module in modules}))
"""


@functools.cache
def brought_along(modules: tuple[str, ...], watched: tuple[str, ...] = ("torch",)) -> dict[str, Sequence[str]]:
    """For each module, imported alone, those of `watched` that are imported with it. A module may be several, with
    spaces between them."""
    request = json.dumps([modules, watched])
    done = subprocess.run([sys.executable, "-c", _ASK], input=request, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
