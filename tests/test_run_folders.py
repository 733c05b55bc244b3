"""Which folder a command takes for a run, and a reader that has seen enough."""
import subprocess
import sys

import pytest

from proxy_sft.core.settings import save_settings, load_settings
from proxy_sft.launch.parameters import LaunchError
from proxy_sft.launch.status import find_run


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A checkout with a run `demo`, and beside it a folder of that name that is none."
    (tmp_path / "settings.ini").touch()
    (tmp_path / "configs").mkdir()
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    save_settings(load_settings("demo"), tmp_path / "workspace" / "runs" / "demo")
    return tmp_path


def test_a_run_is_not_a_folder_of_the_same_name(place):
    run = place / "workspace" / "runs" / "demo"
    assert find_run("demo") == run == find_run(str(run)) == find_run("workspace/runs/demo").resolve()
    for name in ("./demo", str(place / "demo")):
        with pytest.raises(LaunchError, match="is a folder, and no run"): find_run(name)
    with pytest.raises(LaunchError, match="There is no run 'other'.*Runs: demo"): find_run("other")
    assert not list((place / "demo").iterdir())


@pytest.mark.parametrize("words", [("status", "demo"), ("report", "demo"), ("caches",), ("--help",)])
def test_a_reader_that_stops_gets_no_traceback(place, words):
    "The pipe's other end is closed before the command writes."
    code = "import sys; sys.stdin.read(); from proxy_sft.commands import main; sys.exit(main())"
    command = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    command.stdout.close()
    command.stdin.close()
    errors = command.stderr.read()
    assert "Traceback" not in errors and "BrokenPipe" not in errors, errors
    assert command.wait() in (0, 141)
