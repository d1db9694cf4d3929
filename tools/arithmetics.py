"""Runs the tests that compare numbers (`-m numbers`) under other arithmetics than this machine's own.

    uv run python tools/arithmetics.py [PYTEST ARGUMENTS]

Kernels for other instruction sets add up in another order. Torch, oneDNN and MKL each have a variable that forbids the
wider sets, so one machine can round as older ones do. The exit status is that of the first run that fails.
"""

from __future__ import annotations

import os
import subprocess
import sys

ARITHMETICS = {
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "SSE4": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
CHOSEN = "numbers and not convergence and not matrix"


def main() -> int:
    codes: list[int] = []
    for name, variables in ARITHMETICS.items():
        print(f"== numbers under {name}: {' '.join(f'{k}={v}' for k, v in variables.items())}", flush=True)
        command = [sys.executable, "-m", "pytest", "-m", CHOSEN, *sys.argv[1:]]
        codes.append(subprocess.run(command, env={**os.environ, **variables}).returncode)
        print(f"== numbers under {name}: exit status {codes[-1]}", flush=True)
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    sys.exit(main())
