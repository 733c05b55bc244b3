"The picture of a run in its output notebook, while the run goes on."
import json
import time
from pathlib import Path

from test_launch import LAUNCH, notebook, started  # noqa: F401  (a fixture)

DRAWING = """
import time
from pathlib import Path
from types import SimpleNamespace
from proxy_sft.training.progress import LivePlot
plot, state = LivePlot(every=0), SimpleNamespace(is_world_process_zero=True, global_step=0)
while not Path(folder, "seen").exists():
    state.global_step += 1
    plot.on_log(None, state, None, {"loss": 1 / state.global_step, "eta_seconds": 1.0})
    time.sleep(3)
plot.on_train_end(None, state, None)
"""


def pictures(folder: Path, source: Path) -> list[str]:
    "The pictures in the executed notebook as it lies on the disk."
    found = []
    for path in folder.rglob("*.ipynb"):
        if path == source: continue
        try: cells = json.loads(path.read_text())["cells"]
        except ValueError: continue  # it is being written
        found += [
            o["data"]["image/png"] for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})
        ]
    return found


def test_one_picture_stands_in_the_notebook_on_disk_and_is_replaced_during_the_run(started, tmp_path):
    source = notebook(tmp_path / "ex.ipynb", DRAWING)
    run, until, seen = started(LAUNCH, source), time.monotonic() + 900, []
    while len(seen) < 2:  # one, and later another in its place
        assert run.process.poll() is None, run.process.communicate()
        assert time.monotonic() < until, f"{len(seen)} pictures came"
        now = pictures(tmp_path, source)
        assert len(now) < 2
        if now and now[0] not in seen: seen += now
        time.sleep(0.2)
    (tmp_path / "seen").touch()
    assert run.end() == 0, run.err[-2000:]
    assert len(pictures(tmp_path, source)) == 1
