#!/usr/bin/env bash
# Bring what a bare GPU machine lacks (Python 3.12, x86-64, no network) into .whl: wheels by name, in the versions of requirements.lock, and the tokenizer.
#   bash benchmarks/gpu/fetch_wheels.sh            from the repository's root; PYTHON=… chooses the interpreter whose pip is used
#   TRANSFORMERS=1 bash …           the locked transformers too (13 MB), where the machine's own is not wanted
set -euo pipefail
[ -f requirements.lock ] && [ -d proxy_sft ] || { echo "Start this in the repository's root." >&2; exit 1; }
python=${PYTHON:-python3} wheels=${WHEELS:-.whl}
mkdir -p "$wheels"
if [ -d .git/info ] && ! grep -qsx "/$wheels/" .git/info/exclude; then echo "/$wheels/" >> .git/info/exclude; fi

# Imported by proxy_sft, or by what it imports; all else is expected on the machine (torch, transformers, accelerate, peft, safetensors, tokenizers, huggingface_hub, numpy, pandas, pyarrow, rich, psutil, pytest …).
needed="trl datasets dill multiprocess fastcore orjson msgspec blake3 zstandard minijinja gigatoken awkward awkward-cpp
pydantic pydantic-core annotated-types typing-inspection jsonschema jsonschema-specifications referencing rpds-py openai jiter sniffio httpx2 httpcore2 truststore shtab hjson
papermill nbformat nbclient jupyter-client jupyter-core traitlets fastjsonschema tenacity entrypoints pyzmq tornado ipykernel comm platformdirs
ipython matplotlib-inline jedi parso pexpect ptyprocess prompt-toolkit wcwidth stack-data executing asttokens pure-eval ipython-pygments-lexers ${TRANSFORMERS:+transformers}"
unlocked="liger-kernel==0.8.5 torchao==0.18.0"

pinned() { # names -> name==version, as the lock says for Python 3.12
    "$python" - "$@" <<'PYTHON'
import sys
from pathlib import Path
try: from packaging.requirements import Requirement
except ImportError: from pip._vendor.packaging.requirements import Requirement
there = {"python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
lock = [Requirement(line) for line in Path("requirements.lock").read_text().splitlines() if line.strip() and not line.startswith("#")]
found = {r.name: f"{r.name}{r.specifier}" for r in lock if r.marker is None or r.marker.evaluate(there)}
if missing := [name for name in sys.argv[1:] if name not in found]: raise SystemExit(f"not in requirements.lock: {', '.join(missing)}")
print(*(found[name] for name in sys.argv[1:]))
PYTHON
}
download() {
    "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        $(printf -- '--platform manylinux_2_%s_x86_64 ' 39 35 34 31 28 27 26 24 17) --platform manylinux2014_x86_64 --platform manylinux1_x86_64 "$@"
}

rm -f "$wheels"/*.whl
download -d "$wheels" $(pinned $needed) $unlocked

# DeepSpeed is published as source only; without its C++ parts it is a wheel for any machine
DS_BUILD_OPS=0 "$python" -m pip wheel -q --disable-pip-version-check --no-deps -w "$wheels" "$(pinned deepspeed)"

# bitsandbytes holds a library per CUDA version; the machine's torch is built for 13.0
whole=$(mktemp -d)
trap 'rm -rf "$whole"' EXIT
download -d "$whole" "$(pinned bitsandbytes)"
"$python" - "$whole"/bitsandbytes-*.whl "$wheels" "${BNB_CUDA:-130}" <<'PYTHON'
import sys
import zipfile
from pathlib import Path
source, target, cuda = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
kept = lambda name: not name.endswith(".so") or name.endswith((f"_cuda{cuda}.so", "_cpu.so"))
with zipfile.ZipFile(source) as old, zipfile.ZipFile(target / source.name, "w", zipfile.ZIP_DEFLATED) as new:
    assert any(name.endswith(f"_cuda{cuda}.so") for name in old.namelist()), f"no library for CUDA {cuda} in {source.name}"
    for name in filter(kept, old.namelist()):
        data = old.read(name)
        if name.endswith(".dist-info/RECORD"): data = b"".join(line for line in data.splitlines(True) if kept(line.split(b",")[0].decode()))
        new.writestr(old.getinfo(name), data)
PYTHON

tokenizer=${TOKENIZER:-../shared/qwen3-8b}
if [ -f "$tokenizer/tokenizer.json" ]; then tar -C "$tokenizer" -cJf "$wheels/qwen3-8b.tar.xz" --transform 's,^\./,,' .
else echo "No tokenizer in $tokenizer: lengths will be those of the demo's."; fi

bytes=$(cat "$wheels"/* | wc -c) tree=$(git ls-files -z 2>/dev/null | xargs -0 -r cat 2>/dev/null | wc -c)
ls -lS "$wheels" | awk 'NR > 1 {printf "%10.2f MiB  %s\n", $5 / 1048576, $NF}'
echo "$(ls "$wheels"/*.whl | wc -l) wheels and the tokenizer: $((bytes / 1048576)) MiB; with the repository $(((bytes + tree) / 1048576)) MiB of 64."
[ $(((bytes + tree) / 1048576)) -lt 62 ] || { echo "That is too much to bring along at once (64 MiB)." >&2; exit 1; }
