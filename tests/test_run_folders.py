"""Which folder a command takes for a run, and a reader that has seen enough."""
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch

from proxy_sft.core.atomic_folders import publish
from proxy_sft.core.settings import save_settings, load_settings
from proxy_sft.commands import main
from proxy_sft.launch.parameters import (
    chosen_settings, LaunchError, notebook_defaults, read_request, split_parameters
)
from proxy_sft.launch.status import find_run
from proxy_sft.training.checkpoints import checkpoint_facts, checkpoint_to_resume, CheckpointError


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


def test_a_misspelt_run_or_path_is_answered_with_the_nearest(place):
    with pytest.raises(LaunchError, match="Did you mean 'demo'"): find_run("dmeo")
    with pytest.raises(LaunchError, match="Did you mean '.*workspace/runs/demo'"):
        find_run(str(place / "workspace/rusn/demo"))
    with pytest.raises(LaunchError, match="Did you mean '.*02_train.ipynb'"):
        (place / "nbs").mkdir()
        (place / "nbs" / "02_train.ipynb").touch()
        notebook_defaults(place / "nbs" / "02_trian.ipynb")


@pytest.mark.parametrize(
    "words, near",
    [(["statsu"], "status"), (["doctor", "--profle", "demo"], "--profile"), (["caches", "--prun"], "--prune")],
)
def test_a_misspelt_command_or_option_is_answered_with_the_nearest(place, words, near, capsys):
    try: code = main(words)
    except SystemExit as end: code = end.code
    assert code == 2 and f"Did you mean '{near}'?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--profile", "demo"], ["--profile=demo"], ["-p", "profile", "demo"]])
def test_a_profile_has_two_spellings(words):
    rest, taken, parameters = split_parameters(["nb", *words])
    assert rest == ["nb"] and parameters == {"profile": "demo"} and split_parameters(taken)[2] == parameters


def test_two_profiles_are_refused():
    with pytest.raises(LaunchError, match="Two profiles.*'demo'.*'qwen3_8b'"):
        split_parameters(["-p", "profile", "demo", "--profile", "qwen3_8b"])


def test_version_status_and_caches_answer_without_a_run(place, capsys):
    with pytest.raises(SystemExit, match="0"): main(["--version"])
    assert capsys.readouterr().out.startswith("proxy-sft ")
    assert main(["status"]) == 0 and "demo" in capsys.readouterr().out
    assert main(["caches"]) == 0 and "There are no prepared data" in capsys.readouterr().out


def test_runs_beside_each_other_show_the_settings_that_differ(place, capsys):
    runs = place / "workspace" / "runs"
    save_settings(load_settings("demo", learning_rate=3e-4), runs / "second")
    assert main(["status", "demo", "second"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"learning_rate +\S+ +0.0003", said) and "run_name" not in said and "max_length" not in said


def test_a_dry_run_says_where_a_setting_comes_from(tmp_path):
    page = tmp_path / "page.ipynb"
    source = "profile = 'demo'\nseed = 7\n"
    page.write_text(json.dumps({"cells": [
        {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source}
    ]}))
    rows = {row[0]: row[1:] for row in chosen_settings(read_request(str(page), {"max_steps": 3}))}
    assert rows["seed"] == ("7", "42", "page.ipynb") and rows["max_steps"][2] == "command line"
    assert rows["model"][2] == "profile demo" and "optimizer" not in rows


# A start that is refused

@pytest.mark.parametrize("first, second", [
    (dict(max_train_samples=1000), dict(max_train_samples=2000, run_name="qwen3_8b-1000")),
    (dict(), dict(max_steps=20)),
    (dict(), dict(max_train_samples=200, max_steps=20, run_name="demo")),
    (dict(run_name="mine"), dict(run_name="mine", learning_rate=1e-3, max_hours=2.5)),
    (dict(), dict(seed=7, exclude_sources=["a b", "c'd"])),
    (dict(output_dir="out dir"), dict(output_dir="out dir", max_steps=20)),
], ids=str)
@pytest.mark.parametrize("resume", ["auto", "path"])
def test_the_command_that_a_refusal_prints_trains_the_same_in_its_own_folder(tmp_path, first, second, resume):
    "Two settings meet in one folder: what is printed gives the second start's settings, and another folder."
    given = dict(profile="demo", workspace=str(tmp_path))
    for one in (first, second):
        if "output_dir" in one: one["output_dir"] = str(tmp_path / "out dir")
    facts = [checkpoint_facts(load_settings(**given, **more), "0" * 20, 2) for more in (first, second)]
    run_dir = load_settings(**given, **first).run_dir
    made(run_dir, facts[0])
    more = dict(resume=str(run_dir / "checkpoint-4")) if resume == "path" else {}
    settings = load_settings(**given, **second, **more)
    if settings.run_dir != run_dir: settings = settings.model_copy(update={"run_name": run_dir.name})
    with pytest.raises(CheckpointError, match="belongs to another training|another training, and this") as refused:
        checkpoint_to_resume(settings, facts[1])
    [line] = [line for line in str(refused.value).splitlines() if "proxy-sft run" in line]
    rest, _, parameters = split_parameters(shlex.split(line)[2:])
    assert "--nproc" in rest and rest[rest.index("--nproc") + 1] == "2"
    own = load_settings(**parameters)
    assert own.run_dir != run_dir and own.workspace_dir == tmp_path and own.resume == "auto"
    assert checkpoint_facts(own, "0" * 20, 2) == facts[1]
    assert checkpoint_to_resume(own, facts[1]) is None


def made(run_dir, facts):
    "A checkpoint of a training with these facts."
    (run_dir / "aside").mkdir(parents=True)
    for rank in range(2): torch.save({"cpu": torch.get_rng_state()}, run_dir / "aside" / f"rng_state_{rank}.pth")
    publish(run_dir / "aside", run_dir / "checkpoint-4", {**facts, "step": 4})
