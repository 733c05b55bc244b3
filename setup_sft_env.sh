#!/usr/bin/env bash
# Make the environment sft-qwen3 in this folder: exact versions from requirements.lock, the package itself, a kernel.
# Running it again is quick and harmless. PYTHON=python3.12 ./setup_sft_env.sh chooses the interpreter (3.10 to 3.12).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
venv=sft-qwen3

# the output of a command is shown when it fails
quietly() {
    local output code; output=$(mktemp)
    "$@" >"$output" 2>&1 || {
        code=$?
        tail -n 60 "$output" >&2
        echo "failed with exit code $code: $*" >&2
        rm -f "$output"
        exit "$code"
    }
    rm -f "$output"
}

supported() { "$1" -c 'import sys; sys.exit(not ((3, 10) <= sys.version_info[:2] <= (3, 12)))' 2>/dev/null; }
choose_python() {
    if [ -n "${PYTHON:-}" ]; then
        supported "$PYTHON" && { echo "$PYTHON"; return; }
        echo "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1 || echo 'not an interpreter'); this project runs on Python 3.10, 3.11 and 3.12. Name one of these." >&2
        exit 1
    fi
    for candidate in python3 python3.11 python3.12 python3.10; do
        supported "$candidate" && { echo "$candidate"; return; }
    done
    echo "No Python 3.10, 3.11 or 3.12 was found ($(python3 --version 2>&1 || true)). Install one of them, or name it: PYTHON=/path/to/python3.11 $0" >&2
    exit 1
}

if [ ! -x "$venv/bin/python" ]; then
    python=$(choose_python)
    echo "Making the environment $venv with $("$python" --version)"
    "$python" -m venv "$venv"
elif ! supported "$venv/bin/python"; then
    echo "$venv holds $("$venv/bin/python" --version); this project runs on Python 3.10, 3.11 and 3.12. Delete the folder $venv and start again." >&2
    exit 1
fi

# a checksum of what is to be installed: unchanged since the last successful run means there is nothing to install
wanted=$(cat requirements.lock requirements.in settings.ini setup.py pyproject.toml | cksum)
if [ "$(cat "$venv/.installed" 2>/dev/null || true)" != "$wanted" ]; then
    echo "Installing the tested versions from requirements.lock (about 3 minutes on a fresh machine)"
    rm -f "$venv/.installed"
    quietly "$venv/bin/python" -m pip install --disable-pip-version-check -r requirements.lock
    quietly "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
    "$venv/bin/python" -m ipykernel install --sys-prefix --name sft-qwen3 --display-name sft-qwen3 >/dev/null
    echo "$wanted" > "$venv/.installed"
fi

"$venv/bin/python" - <<'PYTHON'
import platform, shutil
from importlib.metadata import version
import torch
cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(f"Python {platform.python_version()}, torch {torch.__version__}, DeepSpeed {version('deepspeed')}, "
      f"CUDA devices: {', '.join(cuda) if cuda else 'none, the demo and the tests run on the CPU'}, "
      f"free disk: {shutil.disk_usage('.').free / 2**30:.0f} GiB")
PYTHON
