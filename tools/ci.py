"""`make test`: what must hold on a clean checkout. Clean and export change nothing, ruff, the import contract,
the demo, the notebooks' own tests, pytest. The demo and the notebooks run while pytest does; the first part that fails
ends everything, and pytest's closing line comes last."""
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
PYTEST = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rsfE", "--durations=25")
BESIDE_THE_DEMO = ("tests", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder",
                   "--ignore=tests/test_after_demo.py")
# at its end IPython collects garbage once for each notebook; what is frozen is not looked at again
NBDEV_TEST = """import atexit, gc
from nbdev.test import nbdev_test
try: nbdev_test(n_workers=0)
finally: atexit.register(gc.freeze)
"""
LIGHT = {**os.environ, "OMP_NUM_THREADS": "1"}  # three processes share the cores


def sources() -> dict[str, str]:
    "Hash of each notebook and each exported module."
    modules = [file for file in ROOT.glob("proxy_sft/**/*.py") if file.name != "_modidx.py"]
    files = sorted([*ROOT.glob("nbs/**/*.ipynb"), *modules])
    return {str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def start(*command: str, **more) -> subprocess.Popen:
    """A command of the environment, from the repository's root; it leads a group of its own, so that all it started can
    be ended."""
    return subprocess.Popen([str(BIN / command[0]), *command[1:]], cwd=ROOT, env=LIGHT, start_new_session=True, **more)


def finish(title: str, process: subprocess.Popen, began: float, *others: subprocess.Popen) -> None:
    "Wait for a part; its failure, and Ctrl-C, end the others too."
    try: code = process.wait()
    except BaseException:
        end(process, *others)
        raise
    if code:
        end(*others)
        sys.exit(f"== {title}: FAILED with exit code {code}")
    print(f"== {title}: passed in {time.monotonic() - began:.0f} s", flush=True)


def end(*processes: subprocess.Popen) -> None:
    for process in processes:
        if process.poll() is None: os.killpg(process.pid, signal.SIGTERM)


def part(title: str, *command: str, beside: tuple = ()) -> None:
    "One part of the check, seen as it runs."
    print(f"\n== {title}", flush=True)
    finish(title, start(*command), time.monotonic(), *beside)


def follow(path: Path, process: subprocess.Popen) -> None:
    "Show what a process has written and writes, to its end."
    with path.open(errors="replace") as file:
        while True:
            ended = process.poll() is not None
            if text := file.read(): print(text, end="", flush=True)
            elif ended: return
            else: time.sleep(0.2)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what runs beside is ended on the way out
    before = sources()
    part("nbdev_clean", "nbdev_clean")
    part("nbdev_export", "nbdev_export")
    changed = sorted(n for n in {*before, *sources()} if before.get(n) != sources().get(n))
    if changed:
        sys.exit(f"== nbdev_clean or nbdev_export changed {', '.join(changed)}; run both and commit the result.")
    print("== notebooks and library are in step")
    part("ruff: line length, pyflakes, bugbear", "ruff", "check")
    part("the import contract", "lint-imports")
    with tempfile.TemporaryDirectory() as folder:
        log, began = Path(folder) / "pytest.txt", time.monotonic()
        with log.open("w") as out:
            tests = start(*PYTEST, *BESIDE_THE_DEMO, stdout=out, stderr=subprocess.STDOUT)
        print("\n== pytest, two files at a time, runs beside what follows; its lines come after it", flush=True)
        demo = "the demo through papermill, then two ranks with ZeRO-2"
        part(demo, "python", "tools/demo.py", "workspace", beside=(tests,))
        part("what the demo left behind", *PYTEST, "tests/test_after_demo.py", beside=(tests,))
        part("nbdev_test", "python", "-c", NBDEV_TEST, beside=(tests,))
        print("\n== pytest", flush=True)
        try: follow(log, tests)
        finally: end(tests)
        finish("pytest", tests, began)


if __name__ == "__main__":
    main()
