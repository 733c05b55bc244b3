"""What a plain papermill shows of a cell that works for hours: its bar, and the cell's own lines beside it."""
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

CELL = """from proxy_sft.core.display import PapermillTerminal
terminal = PapermillTerminal()
for step in (1, 2):
    print(f"step {step} loss 1.5")
    terminal.write(f"step {step} loss 1.5")
"""


def write_notebook(folder, source):
    "A notebook of one cell."
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
    kernel = {"name": "sft-qwen3", "display_name": "sft-qwen3", "language": "python"}
    notebook = {"cells": [cell], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "in.ipynb").write_text(json.dumps(notebook))


def papermill(folder, *words):
    "What papermill's terminal shows."
    write_notebook(folder, CELL)
    ours, theirs = pty.openpty()
    command = [str(Path(sys.executable).parent / "papermill"), "in.ipynb", "out.ipynb", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    environment.pop("PYTEST_CURRENT_TEST")  # a kernel that sees it leaves its descriptors alone
    with subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try: part = os.read(ours, 1 << 16)
            except OSError: break  # nobody holds the other end any more
            if not part: break
            shown += part
    os.close(ours)
    assert process.returncode == 0, shown.decode()
    return shown.decode()


@pytest.mark.parametrize("words", [(), ("--log-output",)], ids=["plain", "log output"])
def test_a_line_is_shown_once(tmp_path, words):
    "Beside the bar of a plain papermill; where papermill shows the output itself, nothing is said twice."
    shown = papermill(tmp_path, *words)
    assert [shown.count(f"step {step} loss 1.5") for step in (1, 2)] == [1, 1], shown
    assert ("\r\x1b[Kstep 1" in shown) == (not words)


def test_a_page_ends_with_the_program_that_started_it(tmp_path):
    "`make demo` and `make real` may be killed; no training goes on behind the next start's back."
    write_notebook(tmp_path, f"""import os, pathlib, time
pathlib.Path({str(tmp_path)!r}, "pid").write_text(str(os.getpid()))
time.sleep(600)""")
    words = ["papermill", str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), "--no-progress-bar"]
    program = [sys.executable, "-c", f"from demo import run; run(*{words!r})"]
    tools = Path(__file__).resolve().parents[1] / "tools"
    with subprocess.Popen(program, cwd=tools, stdout=subprocess.DEVNULL) as process:
        pid = tmp_path / "pid"
        while not pid.exists() or not pid.read_text():
            assert process.poll() is None
            time.sleep(0.1)
        kernel = psutil.Process(int(pid.read_text()))
        process.kill()
    kernel.wait(60)  # raises TimeoutExpired when it goes on


def test_real_hands_each_page_its_parameters(monkeypatch):
    "What the evaluation alone understands reaches it alone, and what is given comes before what is usual."
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "tools")
    import real
    given = real.given_parameters(["-p", "max_turns", "4", "-p", "seed", "1"])
    found = {page: real.page_parameters(page, given) for page in real.PAGES}
    assert all(parameters["seed"] == 1 and parameters["profile"] == "smollm2" for parameters in found.values())
    assert {page for page, parameters in found.items() if "max_turns" in parameters} == {"03_evaluate"}
    assert found["03_evaluate"] | real.FEW | {"max_turns": 4} == found["03_evaluate"]
    with pytest.raises(SystemExit, match="'--steps' is no parameter"): real.given_parameters(["--steps", "4"])
