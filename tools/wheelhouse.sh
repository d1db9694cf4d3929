#!/usr/bin/env bash
# Wheels for tools/gpu_check.py on a machine without network: Python 3.12, x86-64 Linux.
#
#     tools/wheelhouse.sh DIR
#
# Fetches what the checkout's pyproject.toml files depend on, in the versions that the root pins, except for what such a
# machine has already. Needs network and a Python with pip (`PIP="uvx pip"` names another). Fails above 60 MB.
set -euo pipefail

dir=${1:?usage: tools/wheelhouse.sh DIR}
root=$(cd "$(dirname "$0")/.." && pwd)
pip=${PIP:-python3 -m pip}
limit_mb=60
# On the machine already; and what only real data and opponents need: `datasets`, which brings pyarrow along, and more.
there="torch torchvision torchaudio transformers tokenizers timm numpy pluggy rich safetensors pillow datasets gensim open_spiel"
# What those that are fetched import, and the machine lacks.
needed="cffi pycparser rapidfuzz"

mkdir -p "$dir"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

printf '%s\n' $needed >"$work/wanted"
python3 - "$root" $there >>"$work/wanted" 3>"$work/pins" <<'PY'
import os, re, sys, tomllib
from pathlib import Path

root, there = Path(sys.argv[1]), set(sys.argv[2:])
projects = [tomllib.loads(p.read_text()) for p in [root / "pyproject.toml", *sorted(root.glob("plugins/*/*/pyproject.toml"))]]
wanted = {re.match(r"[\w.-]+", d).group().lower(): d for project in projects for d in project["project"].get("dependencies", [])}
print("\n".join(d for name, d in sorted(wanted.items()) if name not in there and not name.startswith("timetrial")))
os.write(3, "\n".join(projects[0]["tool"]["uv"]["constraint-dependencies"]).encode())
PY

# Without their own dependencies: those that are imported are listed above, or on the machine.
$pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_12_x86_64 \
    --constraint "$work/pins" --requirement "$work/wanted" --dest "$dir"
# hydra-core and omegaconf need exactly 4.9, of which there is the source alone; it is pure Python.
$pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$dir" "antlr4-python3-runtime==4.9.*"

size_mb=$(du -sm "$dir" | cut -f1)
ls -1 "$dir"
echo "$size_mb MB"
if ((size_mb > limit_mb)); then
    echo "more than $limit_mb MB" >&2
    exit 1
fi
