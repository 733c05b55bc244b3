#!/usr/bin/env bash
# One call on a borrowed GPU machine, from the repository's root:  bash benchmarks/gpu/run.sh first | speed | half | eight | adapters
# Each step has a limit, writes to a file in $OUT as it goes, and cannot take the others with it; a table of the steps ends the call.
# LIMIT: seconds of the whole call. WHEELS: what fetch_wheels.sh made. SITE: where the wheels are installed. Nothing is fetched, and no setting of the card is touched.
set -uo pipefail
call=${1:-first} here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) root=$PWD
[ -d proxy_sft ] && [ -f benchmarks/train.py ] || { echo "Start this in the repository's root." >&2; exit 1; }
LIMIT=${LIMIT:-565} WHEELS=${WHEELS:-.whl} SITE=${SITE:-$(mktemp -d)} PYTHON=${PYTHON:-python3}
export OUT=${OUT:-$root/out}
mkdir -p "$OUT"
export PYTHONPATH="$SITE:$root" PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore PYTORCH_ALLOC_CONF=expandable_segments:True HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
table=""

note() { table+=$(printf '%-10s %5s s  %s' "$1" "$2" "$3")$'\n'; }
step() { # name, seconds at most, lines to show, command
    local name=$1 most=$2 lines=$3 left=$((LIMIT - SECONDS)) began=$SECONDS code; shift 3
    [ "$left" -ge 20 ] || { note "$name" 0 "not begun, the call is nearly over"; return 1; }
    [ "$most" -le "$left" ] || most=$left
    printf '\n== %s\n' "$name"
    timeout -k 5 "$most" "$@" > "$OUT/$call-$name.txt" 2>&1; code=$?
    grep -v -e '^$' -e 'Warning' -e 'it/s\]' "$OUT/$call-$name.txt" | tail -n "$lines" | cut -c1-230
    case $code in 0) note "$name" $((SECONDS - began)) done ;; 124|137) note "$name" $((SECONDS - began)) "stopped at its limit of $most s" ;; *) note "$name" $((SECONDS - began)) "exit code $code" ;; esac
    return $code
}
end() { printf '\n== steps of the call "%s", %s s in all\n%s' "$call" "$SECONDS" "$table"; }
trap end EXIT

ready() { # the wheels, the tokenizer, and what the machine is
    if ls "$WHEELS"/*.whl >/dev/null 2>&1; then
        "$PYTHON" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$WHEELS"/*.whl || return 1
    fi
    if [ -f "$WHEELS/qwen3-8b.tar.xz" ] && [ ! -f ../shared/qwen3-8b/tokenizer.json ]; then mkdir -p ../shared/qwen3-8b && "$PYTHON" -m tarfile -e "$WHEELS/qwen3-8b.tar.xz" ../shared/qwen3-8b; fi
    nvidia-smi --query-gpu=name,memory.total,memory.used,driver_version,clocks.sm,power.limit,temperature.gpu --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
    df -h . "$SITE" | tail -n 2
    look && return 0
    for name in deepspeed torchao liger_kernel; do # a package that does not like this machine must not cost the call
        rm -rf "$SITE/$name" "$SITE/$name"-*.dist-info
        echo "-- once more, without $name"
        look && return 0
    done
    return 1
}
look() { # versions, and whether the project can be imported
    "$PYTHON" - <<'CODE'
import os, platform, shutil, sys, sysconfig
from importlib.metadata import version
from pathlib import Path
print("Python", platform.python_version(), "|", len(os.sched_getaffinity(0)), "cores |", open("/proc/meminfo").readline().split()[1][:-6], "GB | compiler", shutil.which("gcc") or shutil.which("cc"),
      "| Python.h", (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file())
import torch
print("torch", torch.__version__, "CUDA", torch.version.cuda, "|", torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
      *([f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f} GiB, capability", torch.cuda.get_device_capability()] if torch.cuda.is_available() else []))
import proxy_sft.train
for name in ("transformers", "trl", "accelerate", "datasets", "peft", "triton", "deepspeed", "liger-kernel", "bitsandbytes", "torchao", "gigatoken", "huggingface_hub", "numpy"):
    try: print(name, version(name), end="; ")
    except Exception as problem: print(name, "MISSING", end="; ")
print()
from proxy_sft.training.attention import ORDER, is_installed
print("attention that is installed:", ", ".join(name for name in ORDER if is_installed(name)))
CODE
}
export -f ready look
export WHEELS SITE PYTHON

bench() { # name, seconds, minutes for a side, more words
    local name=$1 most=$2 minutes=$3; shift 3
    step "$name" "$most" 34 "$PYTHON" benchmarks/train.py --rows "${ROWS:-5000}" --minutes "$minutes" "$@"
}
gib() { "$PYTHON" -c 'import torch; print(int(torch.cuda.get_device_properties(0).total_memory / 2**30) if torch.cuda.is_available() else 0)'; }

step ready 120 14 bash -c ready || exit 1
case $call in
first)
    # the processor's part of the checks goes on beside the GPU's
    ( CUDA_VISIBLE_DEVICES= timeout 240 "$PYTHON" -m pytest tests/test_gpu.py -q -p no:cacheprovider
      timeout 200 "$PYTHON" -c 'import sys; from proxy_sft.commands import main; sys.exit(main(["doctor", "-p", "profile", "qwen3_8b"]))' ) > "$OUT/first-tests.txt" 2>&1 &
    beside=$!
    step kernels 90 24 "$PYTHON" "$here/measure.py" kernels
    step demo 170 24 "$PYTHON" "$here/measure.py" demo
    step layers 200 16 "$PYTHON" "$here/measure.py" layers --seconds 170
    step profile 60 56 "$PYTHON" "$here/measure.py" profile
    bench small 130 1 --layers 4 --steps 2 --accumulation 2
    while kill -0 $beside 2>/dev/null && [ $SECONDS -lt $((LIMIT - 5)) ]; do sleep 1; done
    printf '\n== tests and doctor\n'; grep -v -e '^$' -e Warning "$OUT/first-tests.txt" | tail -n 24 | cut -c1-300 ;;
speed)
    if [ "$(gib)" -ge 130 ]; then
        bench profile 330 4 --steps 2 --accumulation 4
        bench casts 240 3 --steps 2 --accumulation 2 --alone -p weights float32 -p activation_checkpointing full
    else
        bench half 330 4 --steps 2 --accumulation 4 -p weights bfloat16
        bench fewer 240 3 --steps 2 --accumulation 2
    fi ;;
half)   # 16-bit weights, shorter blocks, nothing computed anew
    bench blocks8k 330 4 --steps 2 --accumulation 16 -p weights bfloat16 -p max_length 8192 -p activation_checkpointing none --upstream max_length 4096 --upstream activation_checkpointing selective \
        $([ "$(gib)" -ge 130 ] || echo --layers 16)
    bench selective 240 3 --steps 2 --accumulation 2 -p weights bfloat16 -p activation_checkpointing selective ;;
eight)  # 8-bit products and compiled layers, and compiled layers alone: the first step compiles
    bench fp8 330 4 --steps 2 --accumulation 4 --alone -p weights bfloat16_master -p matmul fp8 -p compile layers $([ "$(gib)" -ge 130 ] || echo --layers 16)
    bench compiled 240 3 --steps 2 --accumulation 2 --alone -p weights bfloat16_master -p compile layers $([ "$(gib)" -ge 130 ] || echo --layers 16) ;;
adapters)
    bench lora 300 4 --steps 2 --accumulation 4 -p lora_rank 64 -p optimizer adamw_torch_fused
    bench qlora 260 3 --steps 2 --accumulation 2 -p lora_rank 64 -p quantize nf4 -p optimizer adamw_torch_fused ;;
*)  echo "Unknown call: $call. There are first, speed, half, eight and adapters." >&2; exit 2 ;;
esac
