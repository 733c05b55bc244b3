"""`make notebooks`: execute every notebook in place with the demo, so that the committed outputs are those of the code beside them."""
import os
import subprocess
import sys
from pathlib import Path

ROOT, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent

if __name__ == "__main__":
    for notebook in sys.argv[1:] or sorted(str(n.relative_to(ROOT)) for n in ROOT.glob("nbs/*.ipynb")):
        print(notebook, flush=True)
        subprocess.run([BIN / "papermill", notebook, notebook, "--no-progress-bar"], cwd=ROOT, env={**os.environ, "IN_TEST": "1"}, check=True,
                       stderr=subprocess.DEVNULL)
        subprocess.run([BIN / "nbdev_clean", "--fname", notebook], cwd=ROOT, check=True)
