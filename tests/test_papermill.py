"""What a plain papermill shows of a cell that works for hours: its bar, and the cell's own lines beside it."""
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

CELL = """from proxy_sft.core.display import PapermillTerminal
terminal = PapermillTerminal()
for step in (1, 2):
    print(f"step {step} loss 1.5")
    terminal.write(f"step {step} loss 1.5")
"""


def papermill(folder, *words):
    "What papermill's terminal shows."
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": CELL, "outputs": [], "execution_count": None}
    kernel = {"name": "sft-qwen3", "display_name": "sft-qwen3", "language": "python"}
    notebook = {"cells": [cell], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "in.ipynb").write_text(json.dumps(notebook))
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
