"""`make test`: everything that must hold on a clean checkout. Stops at the first part that fails; pytest's closing line comes last."""
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent


def sources() -> dict[str, str]:
    "Hash of each notebook and each exported module."
    files = sorted([*ROOT.glob("nbs/*.ipynb"), *(f for f in ROOT.glob("proxy_sft/*.py") if f.name != "_modidx.py")])
    return {str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def part(title: str, *command: str, **more) -> None:
    "One part of the check; its failure ends everything."
    print(f"\n== {title}", flush=True)
    began = time.monotonic()
    done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=ROOT, env={**os.environ, **more})
    if done.returncode: sys.exit(f"== {title}: FAILED with exit code {done.returncode}")
    print(f"== {title}: passed in {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    before = sources()
    part("nbdev_clean", "nbdev_clean")
    part("nbdev_export", "nbdev_export")
    changed = sorted(n for n in {*before, *sources()} if before.get(n) != sources().get(n))
    if changed: sys.exit(f"== nbdev_clean or nbdev_export changed {', '.join(changed)}; run both and commit the result.")
    print("== notebooks and library are in step")
    part("the demo through papermill, then two ranks with ZeRO-2", "python", "tests/demo.py", "workspace")
    part("nbdev_test", "nbdev_test", "--n_workers", "0")
    part("pytest, two files at a time", "python", "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider", "-rsfE", "-n", "2", "--dist", "loadfile", OMP_NUM_THREADS="1")


if __name__ == "__main__":
    main()
