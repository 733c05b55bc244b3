"""`make demo`: the four notebooks through papermill on the embedded demo, then training again on two ranks with
ZeRO-2."""
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
NOTEBOOKS = ("00_download", "01_convert", "02_train", "03_evaluate")
NOISE = re.compile(
    r"(Executing|Ending) Cell |(In|Out)put Notebook: |Executing notebook with|.*Kernel is running over TCP"
    r"|<(IPython[.]core[.]display[.]|Figure size )|.*KeyboardInterrupt caught in kernel[.]$"
    r"|Passed unknown parameter: |\s*$"  # the pages themselves refuse what is no setting
)  # papermill's own words, and those of a kernel that it ends
# threads of a model this small wait for each other where other programs work too
ENVIRONMENT = {"OMP_NUM_THREADS": "1", **os.environ}


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def run(*command: str, environment: Mapping[str, str] = ENVIRONMENT) -> None:
    "Run a command of the environment from the repository's root; its failure is ours."
    noisy = command[0] == "papermill"
    program = [sys.executable, str(ROOT / "tools" / "patient_papermill.py")] if noisy else [str(BIN / command[0])]
    with subprocess.Popen(
        [*program, *command[1:]],
        cwd=ROOT,
        env=environment,
        text=True,
        **(dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT) if noisy else {}),
    ) as process:
        for line in process.stdout if noisy else ():
            if not NOISE.match(line): print(line, end="", flush=True)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}; its own message stands above.")


def main(workspace: Path) -> None:
    began, executed = time.monotonic(), workspace / "notebooks"
    executed.mkdir(parents=True, exist_ok=True)
    common = ["-p", "profile", "demo", "-p", "workspace", str(workspace)]
    for name in NOTEBOOKS:
        say(f"{name}: papermill nbs/{name}.ipynb …")
        output = ["--log-output", "--no-progress-bar"] if name == "02_train" else ["--no-progress-bar"]
        run("papermill", f"nbs/{name}.ipynb", str(executed / f"{name}.ipynb"), *common, *output)
    say("02_train on two ranks with DeepSpeed ZeRO-2: proxy-sft run nbs/02_train.ipynb --nproc 2 …")
    few = {"run_name": "demo-zero2", "max_steps": 25, "save_steps": 5, "eval_steps": 25, "max_eval_samples": 16}
    changes = [word for name, value in few.items() for word in ("-p", name, str(value))]
    run("proxy-sft", "run", "nbs/02_train.ipynb", "--nproc", "2", *common, *changes)
    summary(workspace, executed, time.monotonic() - began)


def summary(workspace: Path, executed: Path, seconds: float) -> None:
    "What was made, and where it lies."
    from proxy_sft.core.atomic_folders import complete_checkpoints
    from proxy_sft.evaluation.answers import METRICS
    from proxy_sft.training.run import TrainResult
    for name in ("demo", "demo-zero2"):
        run_dir = workspace / "runs" / name
        say(f"Run {name}, in {os.path.relpath(run_dir, ROOT)}")
        print(TrainResult(run_dir))
        print("checkpoints on disk:", ", ".join(f.name for f in complete_checkpoints(run_dir)))
    print("\nHeld-out turns, right of all, before and after training:")
    metrics = json.loads((workspace / "runs" / "demo" / "evaluation.json").read_text(encoding="utf-8"))["metrics"]
    for name, meaning in METRICS.items():
        before, after = (f"{metrics[m][name]['right']}/{metrics[m][name]['of']}" for m in ("base", "tuned"))
        print(f"  {meaning:46} {before:>9} -> {after:>9}")
    say(f"Done in {seconds / 60:.1f} minutes. The executed notebooks lie in {os.path.relpath(executed, ROOT)}, "
        f"those of the two ranks in {os.path.relpath(workspace, ROOT)}/runs/demo-zero2/notebooks.")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "workspace").resolve())
