"""`make notebooks`: execute every notebook in place with the demo, so that the committed outputs are those of the code
beside them."""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent


def joined(outputs: list[dict]) -> list[dict]: # a kernel's prints arrive in pieces, cut at random moments
    "Outputs with neighbouring pieces of one stream as one."
    found = []
    for out in outputs:
        if out["output_type"] == "stream" and found and found[-1].get("name") == out["name"]:
            found[-1]["text"] += out["text"]
        else: found.append(dict(out))
    for out in found:
        if out["output_type"] == "stream": out["text"] = "".join(out["text"]).splitlines(keepends=True)
    return found


def execute(notebook: Path, kernel_folder: Path = ROOT) -> None:
    "Execute in place, by papermill as a user would, and clean."
    before = {cell["id"]: cell["metadata"] for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]}
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tools" / "patient_papermill.py",
            notebook,
            notebook,
            "--no-progress-bar",
            "--cwd",
            kernel_folder,
        ],
        cwd=ROOT,
        env={**os.environ, "IN_TEST": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode: raise RuntimeError(f"{notebook} failed:\n{done.stderr[-3000:]}")
    found = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in found["cells"]:
        cell["metadata"] = before[cell["id"]]
        if "outputs" in cell: cell["outputs"] = joined(cell["outputs"])
    notebook.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    subprocess.run([BIN / "nbdev_clean", "--fname", notebook], cwd=ROOT, check=True)


if __name__ == "__main__":
    for notebook in sys.argv[1:] or sorted(str(n.relative_to(ROOT)) for n in ROOT.glob("nbs/**/*.ipynb")):
        print(notebook, flush=True)
        execute(ROOT / notebook)
