"""Launching: small notebooks under the real launcher, torchrun and kernels; every end of a rank, signals, and nothing
left behind."""
import argparse
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
import uuid
from pathlib import Path

from proxy_sft.core import build_once, stop_requests
from proxy_sft.launch import files, launcher, parameters, processes, ranks
import pytest
from long_form import soak
from ports import free_port

from proxy_sft import commands


LAUNCH = [sys.executable, "-c", "import sys; from proxy_sft.commands import main; sys.exit(main())", "run"]
BY_HAND = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--local-addr",
    "127.0.0.1",
    "--nproc_per_node=2",
    "-m",
    "proxy_sft.launch.worker",
]

ALL_REDUCE = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([float(os.environ["RANK"]) + 1])
dist.all_reduce(total)
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "sums to", int(total.item()))
dist.destroy_process_group()
"""
# Cells that only wait do so for an hour, longer than `Run.end` does: a run that nobody ends fails its test.
# Stands for the trainer: polls the request to stop, "saves" (rank 0 takes longer), and raises as proxy_sft.checkpoint
# does.
TRAINER = """
import os, time
from pathlib import Path
class StopRequested(RuntimeError): pass
rank, stop = os.environ.get("RANK", "0"), Path(os.environ["PROXY_SFT_STOP_FILE"])
Path(folder, f"kernel-{rank}").write_text(str(os.getpid()))
while True:
    if stop.exists():
        time.sleep(3 if rank == "0" else 0)
        Path(folder, f"saved-{rank}").touch()
        raise StopRequested("saved")
    time.sleep(0.02)
"""
# A pool that ignores its parent's death, one of its processes in a session of its own.
POOL = """
import os, subprocess, sys, time
from pathlib import Path
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"
pool = [subprocess.Popen([sys.executable, "-c", code], start_new_session=new) for new in (False, True)]
Path(folder, f"kernel-{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
time.sleep(3600)
"""


def notebook(path: Path, *sources, parameters="folder: str = ''  # where the cells leave their files\nhow: str = ''",
             kernel="sft-qwen3") -> Path:
    cells = [
        dict(
            id=f"cell-{i}",
            cell_type="code",
            source=s,
            metadata={"tags": ["parameters"]} if i == 0 else {},
            outputs=[],
            execution_count=None,
        )
        for i, s in enumerate([parameters, *sources])
    ]
    spec = dict(name=kernel, display_name=kernel, language="python")
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=spec), nbformat=4, nbformat_minor=5)))
    return path


def text_of(nb: Path) -> str:
    return "".join(
        "".join(o.get("text", "")) for c in json.loads(nb.read_text())["cells"] for o in c.get("outputs", [])
    )


def hear_signals() -> None:
    "Whoever runs the tests may ignore some signals (`nohup`, a shell's background), and processes inherit that."
    for number in stop_requests.STOP_SIGNALS: signal.signal(number, signal.SIG_DFL)


class Run:
    "A command on a notebook in a folder of its own; all its processes can be found by a mark in their environment."

    def __init__(self, folder: Path, command: list, nb: Path, *options, out: str = "run", **env):
        self.folder, self.root, self.mark = folder, folder / out, f"PROXY_SFT_TEST={uuid.uuid4().hex}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PROXY_SFT", "JPY_", "PYTEST"))}
        self.process = subprocess.Popen(
            [*command, str(nb), *options, "-p", "folder", str(folder), "-p", "output_dir", str(self.root)],
            env={**clean, **dict([self.mark.split("=")]), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=hear_signals,
        )

    def end(self, seconds: float = 900):
        "Wait for the end; the exit code."
        self.out, self.err = self.process.communicate(timeout=seconds)
        return self.process.returncode

    def survivors(self, seconds: float = 120) -> list[int]: # guards may still be at work for a moment
        end = time.monotonic() + seconds
        while (left := processes.marked_processes(self.mark)) and time.monotonic() < end: time.sleep(0.05)
        return left

    def wait_for(
        self, *names: str, seconds: float = 900
    ): # a start takes 3 s; on a machine with a load of 10 it took 60
        end = time.monotonic() + seconds
        while not all((p := self.folder / n).exists() and (p.stat().st_size or "saved" in n) for n in names):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, f"{names} did not appear"
            time.sleep(0.05)

    def torchrun(self) -> int:
        return next(
            p
            for p in processes.marked_processes(self.mark)
            if "torch.distributed.run" in processes.read_text(Path(f"/proc/{p}/cmdline"))
        )


@pytest.fixture
def started(tmp_path):
    "Start runs; whatever they leave is killed at the end of the test."
    runs = []

    def start(*args, **kwargs):
        runs.append(Run(tmp_path, *args, **kwargs))
        return runs[-1]
    yield start
    for run in runs:
        processes.kill_marked(run.mark)
        run.process.wait()


# ---- refused before anything starts

def test_values_are_read_as_papermill_reads_them():
    from papermill.cli import _resolve_type
    for text in (
        "True",
        "False",
        "None",
        "7",
        "-7",
        "1e-5",
        "-.5",
        "inf",
        "1_0",
        " 1",
        "true",
        "null",
        "",
        "0x1",
        "01",
        "a b",
        "[1]",
    ):
        assert repr(parameters.parameter_value(text)) == repr(_resolve_type(text)), text


def test_all_spellings_of_parameters(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text("a: 1\nb: file\nday: 2024-02-30\n")
    rest, words, values = parameters.split_parameters(
        [
            "-f",
            str(file),
            "nb.ipynb",
            "-p",
            "a",
            "-2",
            "--p",
            "c",
            "--nproc",
            "--nproc",
            "2",
            "--parameters",
            "d",
            "None",
            "-y",
            "{b: yaml}",
            "-r",
            "e",
            "05",
        ]
    )
    assert rest == ["nb.ipynb", "--nproc", "2"]
    assert values == {"a": -2, "b": "yaml", "day": "2024-02-30", "c": "--nproc", "d": None, "e": "05"}
    assert parameters.split_parameters(words)[2] == values  # what is handed on to the workers means the same


@pytest.mark.parametrize("options, words", [
    (["-p", "max_train_sample", "3"], "Did you mean 'max_train_samples'?"),
    (["-p", "foldr", "x"], "Did you mean 'folder'?"),
    (["-p", "max_steps", "many"], "max_steps"), (["-p", "profile", "demmo"], "demo"),
    (["-p", "seed"], "needs a name and a value"),
    (["-y", "[1]"], "name: value"), (["-f", "nowhere.yaml"], "nowhere.yaml")])
def test_bad_requests_start_nothing(tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.setattr(launcher.Launcher, "start", lambda *a: pytest.fail("started"))
    nb = notebook(tmp_path / "a.ipynb", "1")
    before = sorted(tmp_path.rglob("*"))
    assert commands.main(["run", str(nb), "-p", "output_dir", str(tmp_path / "run"), *options]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and len(said.splitlines()) <= 3
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_or_broken_notebook_and_unwritable_folder(tmp_path, capsys):
    broken = tmp_path / "broken.ipynb"
    (tmp_path / "file").write_text("")
    (tmp_path / "odd.yaml").write_bytes(b"\xff: 1")
    nb = notebook(tmp_path / "a.ipynb", "1")
    bad = ["{", "null", "[" * 100_000, '{"cells": [1]}', '{"cells": [{"source": "1", "metadata": 3}]}',
           '{"cells": [], "metadata": {"kernelspec": 3}}', '{"cells": [], "nbformat": 3, "metadata": {}}']
    for text in bad:
        broken.write_text(text)
        with pytest.raises(parameters.LaunchError, match="is not a notebook|is a damaged notebook"):
            parameters.notebook_defaults(broken)
    os.mkfifo(tmp_path / "fifo.ipynb")  # nobody would ever write into it
    for argv in (["nowhere.ipynb"], [str(broken)], [str(tmp_path / "fifo.ipynb")],
                 [str(nb), "-f", str(tmp_path / "odd.yaml")],
                 [str(nb), "-p", "output_dir", str(tmp_path / "file" / "run")]):
        assert commands.main(["run", *argv]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


STREAMS = """
import json, os, sys
from proxy_sft.core.stop_requests import mend_streams
mend_streams()
found = os.open(os.devnull, os.O_RDONLY), *(os.get_inheritable(number) for number in (0, 1, 2))
print("\\u2192 a character that the terminal does not know")
with open(sys.argv[1], "w") as file: json.dump(found, file)
"""


def test_closed_streams_are_given_to_no_other_file_and_odd_characters_end_nothing(tmp_path):
    for command in ("exec {} >&-", "exec {} <&- >&- 2>&-", "PYTHONIOENCODING=ascii exec {}"):
        told = tmp_path / "told"
        words = command.format('"$0" -c "$1" "$2"')
        done = subprocess.run(["sh", "-c", words, sys.executable, STREAMS, str(told)], capture_output=True, text=True)
        number, *inherited = json.loads(told.read_text())
        assert done.returncode == 0 and not done.stderr and number > 2 and inherited == [True] * 3, done.stderr
    assert done.stdout.startswith("\\u2192")


def test_a_command_in_a_deleted_folder_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for words in (["status"], ["run", "nbs/02_train.ipynb"]):
        assert commands.main(words) == 2 and "not there any more" in capsys.readouterr().err


def test_launches_that_are_refused(tmp_path):
    parser = argparse.ArgumentParser()
    launcher.add_run_arguments(parser)
    for fixed in (["--nnodes", "2", "--master-addr", "node-0"], ["--master-port", "29511"]):
        with pytest.raises(parameters.LaunchError, match="--max-restarts needs --rdzv-endpoint"):
            launcher.torchrun_command(parser.parse_args(["nb", "--max-restarts", "1", *fixed]), [])
    assert "--rdzv-endpoint" in launcher.torchrun_command(
        parser.parse_args(["nb", "--max-restarts", "1", "--nnodes", "2", "--rdzv-endpoint", "node-0:29511"]), []
    )
    with pytest.raises(parameters.LaunchError, match="--local-addr is used with --rdzv-endpoint only"):
        launcher.torchrun_command(parser.parse_args(["nb", "--local-addr", "10.0.0.2"]), [])
    with pytest.raises(parameters.LaunchError, match="The parameters in -y are not valid YAML"):
        parameters.yaml_mapping("{", "-y")
    with pytest.raises(SystemExit): parser.parse_args(["nb", "--nproc", "0"])
    broken = tmp_path / "broken.ipynb"
    broken.write_text('{"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "a ="}]}')
    with pytest.raises(parameters.LaunchError, match="is not valid Python"): parameters.notebook_defaults(broken)
    (tmp_path / "status" / "launcher-0.lock").mkdir(parents=True)
    with pytest.raises(parameters.LaunchError, match="cannot be written: Is a directory"):
        launcher.refuse_second_run(parser.parse_args(["nb"]), parameters.RunFolder(tmp_path))


def test_dry_run_shows_settings_and_command(tmp_path, capsys):
    nb = notebook(tmp_path / "a.ipynb", "1")
    assert (
        commands.main(
            [
                "run",
                str(nb),
                "--nproc",
                "8",
                "--max-restarts",
                "2",
                "-p",
                "max_steps",
                "7",
                "-p",
                "output_dir",
                str(tmp_path / "run"),
                "--dry-run",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "| `max_steps` | `7` |" in said
        and "--nproc-per-node 8" in said
        and "--max-restarts 2" in said
        and "-p max_steps 7" in said
    )
    assert not (tmp_path / "run").exists()


def test_help_imports_nothing_heavy():
    code = ("import sys; from proxy_sft.commands import main\ntry: main(['run', '--help'])\nexcept SystemExit: pass\n"
            "print([m for m in ('torch', 'transformers', 'papermill', 'datasets', 'nbformat') if m in sys.modules])")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--nproc" in said and "--parameters_yaml" in said and said.endswith("[]\n")


# ---- every way a kernel can end

ENDS = {
    "exception": ("raise ValueError('boom')", "ValueError: boom"),
    "sys-exit": ("import sys; sys.exit(0)", "SystemExit"),
    "exit": ("exit()", "exit()"),
    "os-exit": ("import os; os._exit(0)", "exit code 0"),
    "kill": ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    "One run for every end, all at once."
    runs = {}
    for name, (source, _) in ENDS.items():
        folder = tmp_path_factory.mktemp(name)
        runs[name] = Run(
            folder,
            LAUNCH,
            notebook(folder / "nb.ipynb", source, "pass") if name != "exit" else notebook(folder / "nb.ipynb", source),
        )
    for run in runs.values(): run.end()
    return runs


@pytest.mark.parametrize("name", ENDS)
def test_every_end_of_a_kernel_fails_the_command(ends, name):
    run = ends[name]
    assert run.process.returncode == 1, run.err
    last = run.err.strip().splitlines()[-1]
    assert ENDS[name][1] in last and str(run.root / "notebooks" / "rank-0.ipynb") in run.err and "cell 3" in run.err
    assert json.loads((run.root / "status" / "rank-0.json").read_text())["state"] == "failed"
    json.loads((run.root / "notebooks" / "rank-0.ipynb").read_text())
    assert not run.survivors()


# The kernel joins a control group with little memory and asks for much: the system kills it, as it does on a full
# machine.
TOO_MUCH = """
import os
from pathlib import Path
group = Path(folder_of_group)
(group / ("memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes")).write_text("300000000")
(group / "cgroup.procs").write_text(str(os.getpid()))
taken = b"x" * 1_000_000_000
"""


@pytest.fixture
def memory_group():
    root = next((p for p in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")) if p.is_dir()), Path("/nowhere"))
    group = root / f"sft-{uuid.uuid4().hex[:8]}"
    try: group.mkdir()
    except OSError as error: pytest.skip(f"no control groups for memory here: {error}")
    if not [f for f in ("memory.max", "memory.limit_in_bytes") if (group / f).exists()]:
        group.rmdir()
        pytest.skip("no control groups for memory here")
    yield group
    group.rmdir()


def test_out_of_memory_is_the_cause_that_is_shown_last(started, tmp_path, memory_group):
    run = started(LAUNCH, notebook(tmp_path / "nb.ipynb", f"folder_of_group = {str(memory_group)!r}", TOO_MUCH, "pass"))
    assert run.end() == 1, run.err
    assert (
        "killed by SIGKILL; the system kills a process that uses too much memory this way"
        in run.err.strip().splitlines()[-1]
    )
    assert not run.survivors()


def test_status_tells_what_became_of_the_ranks(ends, capsys):
    assert commands.main(["status", str(ends["exception"].root)]) == 0
    assert "failed" in capsys.readouterr().out
    assert commands.main(["status", str(ends["kill"].root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"][0]["failure"]["ename"] == "DeadKernel"


# ---- what is written

def test_notebook_is_whole_bounded_and_without_secrets_at_every_instant(started, tmp_path):
    noisy = ("import os, sys, time\nfrom pathlib import Path\nprint(dict(os.environ))\nfor i in range(8000): "
             "print(f'line {i:06d}', 'x' * 100)")
    bar = "for i in range(20000): print(f'\\rstep {i}', end='', file=sys.stderr)"
    long_folder = tmp_path / ("t" * 120)
    long_folder.mkdir()
    # as many bytes as it was read; cells wait for it, so that there is much to read between any two of them
    (tmp_path / "read").touch()
    nb = notebook(
        tmp_path / "nb.ipynb",
        noisy,
        bar,
        *[f"while Path(folder, 'read').stat().st_size < {count}: time.sleep(0.05)" for count in range(5, 105, 5)],
        "raise ValueError(os.environ['HF_TOKEN'])",
        kernel="no-such-kernel",
    )
    run = started(LAUNCH, nb, HF_TOKEN="hf_canary0123456789", TMPDIR=str(long_folder))
    path, seen, broken, ended = run.root / "notebooks" / "rank-0.ipynb", [], [], threading.Event()

    def read():
        while not ended.is_set():
            try:
                seen.append(len(json.loads(path.read_text())["cells"]))
                with open(tmp_path / "read", "ab") as count: count.write(b".")
            except FileNotFoundError: time.sleep(0.01)  # before the first write
            except ValueError as error: broken.append(error)
    reader = threading.Thread(target=read)
    reader.start()
    code = run.end()
    ended.set()
    reader.join()
    assert not broken and code == 1 and len(seen) >= 100 and len(set(seen)) <= 2  # an error marker is added at the end
    assert (
        path.stat().st_size < 400_000
        and "line 000000" in text_of(path)
        and "line 007999" in text_of(path)
        and "step 19999" in text_of(path)
    )
    log = (run.root / "logs" / "rank-0.log").read_text()
    assert "line 004000" in log and log.count("step ") < 10
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert (
        written
        and not [p for p in written if b"hf_canary" in p.read_bytes()]
        and "hf_canary" not in run.out + run.err
        and "***" in run.err
    )
    assert not run.survivors() and not list(long_folder.iterdir())


# ---- two ranks

def test_two_ranks_write_a_notebook_each_and_only_rank_0_speaks(started, tmp_path):
    nb = notebook(tmp_path / "nb.ipynb", "import os\nprint('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])")
    run = started(LAUNCH, nb, str(tmp_path / "out.ipynb"), "--nproc", "2", "--log-dir", str(tmp_path / "elsewhere"))
    assert run.end() == 0, run.err
    assert (
        "rank 0 of 2\n" in run.out and "rank 1 of 2" not in run.out and "2 of 2 ranks done" in run.out and not run.err
    )
    assert (
        text_of(tmp_path / "out.ipynb") == "rank 0 of 2\n" and text_of(tmp_path / "out.rank-1.ipynb") == "rank 1 of 2\n"
    )
    assert "rank 1 of 2" in (tmp_path / "elsewhere" / "rank-1.log").read_text()
    assert not run.survivors()


@pytest.mark.parametrize("ending", ["one fails", pytest.param("both done", marks=soak)])
def test_two_agents_on_loopback_are_one_run(started, tmp_path, ending):
    port = str(free_port())
    last = (
        "if os.environ['RANK'] == '1': raise ValueError('boom')\nimport time; time.sleep(3600)"
        if ending == "one fails"
        else "pass"
    )
    nb = notebook(tmp_path / "nb.ipynb", ALL_REDUCE, last)
    options = ["--nproc", "1", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port]
    second, first = (started(LAUNCH, nb, *options, "--node-rank", str(i)) for i in (1, 0))
    codes = [first.end(), second.end()]
    assert (
        "rank 0 of 2 sums to 3" in first.out
        and text_of(first.root / "notebooks" / "rank-1.ipynb") == "rank 1 of 2 sums to 3\n"
    )
    if ending == "both done": assert codes == [0, 0], first.err + second.err
    else:
        assert codes == [1, 1] and [r.err.strip().splitlines()[-1] for r in (first, second)] == ["ValueError: boom"] * 2
    assert not first.survivors() + second.survivors()


@pytest.mark.parametrize("command", [
    pytest.param([*LAUNCH, "--nproc", "2"], id="launcher"), pytest.param(BY_HAND, id="by-hand", marks=soak)])
def test_a_failed_rank_stops_the_others_and_is_shown_last(started, tmp_path, command):
    nb = notebook(
        tmp_path / "nb.ipynb",
        "import os, time",
        "if os.environ['RANK'] == '1': raise ValueError('boom')",
        "time.sleep(3600)",
    )
    run = started(command, nb)
    assert run.end() == 1  # long before the other rank is ready
    if command is BY_HAND: assert run.err.rindex("ValueError: boom") > run.err.rindex("Root Cause")
    else:
        assert run.err.strip().splitlines()[-1] == "ValueError: boom" and len(run.err.splitlines()) < 25, run.err
        assert "rank-1.ipynb" in run.err and "cell 4" in run.err
    json.loads((run.root / "notebooks" / "rank-0.ipynb").read_text())
    assert not run.survivors()


# ---- nothing survives

@pytest.mark.parametrize("victim, nproc", [("torchrun", 2), ("launcher", 1), pytest.param("launcher", 2, marks=soak)])
def test_killing_torchrun_or_the_launcher_leaves_no_process(started, tmp_path, victim, nproc):
    run = started(LAUNCH, notebook(tmp_path / "nb.ipynb", POOL), "--nproc", str(nproc))
    run.wait_for(*(f"kernel-{r}" for r in range(nproc)))
    # launcher and its guard; a worker, a guard, a kernel and a pool of 2 per rank
    assert len(processes.marked_processes(run.mark)) >= 2 + 5 * nproc
    os.kill(run.torchrun() if victim == "torchrun" else run.process.pid, signal.SIGKILL)
    assert run.end() == (1 if victim == "torchrun" else -signal.SIGKILL)
    if victim == "torchrun": assert "SIGKILL" in run.err.strip().splitlines()[-1]
    assert not run.survivors()


def test_a_killed_worker_stops_the_others(started, tmp_path):
    run = started(LAUNCH, notebook(tmp_path / "nb.ipynb", POOL), "--nproc", "2")
    run.wait_for("kernel-0", "kernel-1")
    os.kill(json.loads((run.root / "status" / "rank-1.json").read_text())["pid"], signal.SIGKILL)
    assert run.end() == 1  # long before the other rank is ready
    assert "Rank 1" in run.err and "was killed" in run.err.strip().splitlines()[-1]
    assert not run.survivors()


def test_ranks_are_started_again_after_one_was_killed(started, tmp_path):
    come = ("import os, time\nfrom pathlib import Path\nmine = Path(folder, 'was-' + os.environ['RANK'])\nagain = "
            "mine.exists()\nmine.touch()")
    # rank 0 asks for the address of rank 1 and must not be given the dead one's
    late = "if again and os.environ['RANK'] == '1': time.sleep(3)"
    nb = notebook(
        tmp_path / "nb.ipynb",
        come,
        late,
        ALL_REDUCE.replace("dist.destroy_process_group()", ""),
        "if not again: (os.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(3600))",
        "print('done', again)",
    )
    run = started(LAUNCH, nb, "--nproc", "2", "--max-restarts", "1")
    assert run.end() == 0, run.err
    assert (
        "2 of 2 ranks done" in run.out
        and text_of(run.root / "notebooks" / "rank-1.ipynb") == "rank 1 of 2 sums to 3\ndone True\n"
        and not run.survivors()
    )


# ---- stops

@pytest.mark.parametrize("target, number, nproc", [
    ("launcher", signal.SIGTERM, 1), ("torchrun", signal.SIGUSR1, 2), ("kernel", signal.SIGUSR1, 1),
    pytest.param("launcher", signal.SIGTERM, 2, marks=soak), pytest.param("worker", signal.SIGINT, 2, marks=soak),
    pytest.param("torchrun", signal.SIGTERM, 2, marks=soak), pytest.param("kernel", signal.SIGTERM, 2, marks=soak)])
def test_a_signal_to_anybody_is_a_request_to_stop(started, tmp_path, target, number, nproc):
    run = started(
        LAUNCH, notebook(tmp_path / "nb.ipynb", TRAINER, "raise ValueError('went on')"), "--nproc", str(nproc)
    )
    ranks = range(nproc)
    run.wait_for(*(f"kernel-{r}" for r in ranks))
    worker = json.loads((run.root / "status" / f"rank-{ranks[-1]}.json").read_text())["pid"]
    pid = {
        "launcher": run.process.pid,
        "torchrun": nproc > 1 and run.torchrun(),
        "worker": worker,
        "kernel": int((tmp_path / f"kernel-{ranks[-1]}").read_text()),
    }[target]
    os.kill(pid, number)
    assert run.end() == 75, run.err
    assert all((tmp_path / f"saved-{r}").exists() for r in ranks)  # nobody was killed while another was still saving
    assert not (run.root / "STOP").exists() and not run.survivors()
    assert "Traceback" not in run.err and {s["state"] for s in parameters.RunFolder(run.root).statuses()} == {"stopped"}


@pytest.mark.parametrize("how", ["hang-up", "tee", "done"])
def test_a_terminal_that_goes_away_loses_nothing(
    tmp_path, how
): # a closed tmux; Ctrl-C that ends `tee` first; a reader that has seen enough
    nb = notebook(
        tmp_path / "nb.ipynb",
        TRAINER.replace("raise StopRequested", "if how == 'done': break\n        raise StopRequested").replace(
            "if stop.exists()", "print('working', flush=True)\n    if stop.exists() or Path(folder, 'enough').exists()"
        ),
        "pass",
    )
    words = [
        *LAUNCH,
        str(nb),
        "-p",
        "folder",
        str(tmp_path),
        "-p",
        "output_dir",
        str(tmp_path / "run"),
        "-p",
        "how",
        how,
    ]
    mine, theirs = pty.openpty() if how == "hang-up" else os.pipe()
    become = (
        (lambda: (hear_signals(), os.setsid(), fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)))
        if how == "hang-up"
        else hear_signals
    )
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, preexec_fn=become)
    os.close(theirs)
    until = time.monotonic() + 900
    while (
        not ((tmp_path / "kernel-0").exists() and (tmp_path / "kernel-0").stat().st_size)
        and process.poll() is None
        and time.monotonic() < until
    ):
        time.sleep(0.05)
    os.close(mine)
    if how == "tee": process.send_signal(signal.SIGINT)
    if how == "done": (tmp_path / "enough").touch()
    assert process.wait(900) == (0 if how == "done" else 75)
    assert (tmp_path / "saved-0").exists() and json.loads((tmp_path / "run" / "status" / "rank-0.json").read_text())[
        "state"
    ] == ("done" if how == "done" else "stopped")


def test_of_two_starts_at_once_one_is_refused(started, tmp_path):
    nb = notebook(
        tmp_path / "nb.ipynb",
        "from pathlib import Path\nimport time\nPath(folder, 'kernel-0').write_text('here')\nwhile not Path(folder, "
        "'enough').exists(): time.sleep(0.05)",
    )
    runs = [started(LAUNCH, nb) for _ in (0, 1)]
    until = time.monotonic() + 900
    while all(r.process.poll() is None for r in runs) and time.monotonic() < until: time.sleep(0.05)
    refused, other = sorted(runs, key=lambda r: r.process.poll() is None)
    assert (
        refused.end() == 2
        and f"is in use by process {other.process.pid} on " in refused.err
        and "Traceback" not in refused.err
    )
    other.wait_for("kernel-0")
    (tmp_path / "enough").touch()
    assert other.end() == 0, other.err
    assert "1 of 1 ranks done" in other.out and not refused.survivors() + other.survivors()


def test_a_number_that_is_used_again_and_a_host_of_the_same_name_hold_nobody_up(tmp_path):
    folder = parameters.RunFolder(tmp_path)
    folder.make()
    host, machine, pid, began = build_once.Process.mine()
    state = dict(
        rank=0,
        state="running",
        host=host,
        pid=pid,
        started=time.time(),
        heartbeat=time.time(),
        process=[host, machine, pid, began],
    )
    parser = argparse.ArgumentParser()
    launcher.add_run_arguments(parser)
    put = lambda **more: files.write_atomically(folder.status(0), json.dumps({**state, **more}))
    put()
    with pytest.raises(parameters.LaunchError, match=f"in use by process {pid} on"):
        launcher.refuse_second_run(parser.parse_args(["nb"]), folder)
    put(process=[host, machine, pid, "1"])  # our number, which was a dead worker's
    launcher.refuse_second_run(parser.parse_args(["nb"]), folder).release()
    elsewhere = {**state, "process": [host, "another machine of this name", pid, began]}
    assert ranks.is_alive(state) and not ranks.works_here(elsewhere)
    put(process=elsewhere["process"]) # its launcher would hold a lease
    launcher.refuse_second_run(parser.parse_args(["nb"]), folder).release()


def test_a_clock_that_is_put_back_hides_no_failure(tmp_path, monkeypatch):
    folder = parameters.RunFolder(tmp_path)
    folder.make()
    failure = dict(
        rank=1, attempt=0, run="this", time=time.time() - 3600, ename="ValueError", evalue="boom", traceback=""
    )
    monkeypatch.setenv("PROXY_SFT_RUN", "this")
    assert ranks.claim_failure(folder, failure, time.time())["evalue"] == failure["evalue"]
    assert ranks.read_failure(folder, 0, time.time())["evalue"] == failure["evalue"]
    monkeypatch.setenv("PROXY_SFT_RUN", "another")
    assert ranks.read_failure(folder, 0, time.time()) is None
    nb = notebook(tmp_path / "nb.ipynb", "1")
    begun = launcher.Launcher(parameters.read_request(str(nb), {"output_dir": str(tmp_path)}))
    monkeypatch.setenv("PROXY_SFT_RUN", begun.run)
    monkeypatch.setenv("PROXY_SFT_REPORTS", begun.reports.path)
    status = ranks.RankStatus(folder.status(0), rank=0, cell=0, attempt=0, run=begun.run, notebook="n", world_size=1)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    status.update(state="done")
    assert [s["state"] for s in begun.states()] == ["done"] # and not the older state with the later time
    begun.private.rmdir()


def test_second_run_is_refused_and_second_signal_kills(started, tmp_path, capsys):
    nb = notebook(tmp_path / "nb.ipynb", POOL)
    run = started(LAUNCH, nb)
    run.wait_for("kernel-0")
    assert (
        commands.main(["run", str(nb), "-p", "output_dir", str(run.root)]) == 2 and "in use" in capsys.readouterr().err
    )
    run.process.terminate()
    while run.process.poll() is None and not (run.root / "STOP").exists(): time.sleep(0.05)
    time.sleep(1.5)  # two signals within a second count as one
    assert run.process.poll() is None  # the cell does not look for the request, so it goes on
    run.process.terminate()
    assert run.end() == 128 + signal.SIGTERM and not run.survivors()


SLOW_TO_GO = """
import atexit, os, time
from pathlib import Path
kernel = Path(folder, "kernel-0")
if os.environ["RANK"] == "0":
    kernel.write_text(str(os.getpid()))
    atexit.register(time.sleep, 3600)
else:
    while not kernel.exists() or Path(f"/proc/{kernel.read_text()}").exists(): time.sleep(0.05)
"""


def test_a_kernel_that_is_slow_to_go_stops_nobody(tmp_path, started):
    "Its own client sends it SIGTERM then, which is no request to stop: another rank has still cells to run."
    run = started(LAUNCH, notebook(tmp_path / "a.ipynb", SLOW_TO_GO, "print('the last cell')"), "--nproc", "2")
    assert run.end() == 0, run.err[-2000:]
    assert all("the last cell" in text_of(run.root / "notebooks" / f"rank-{rank}.ipynb") for rank in (0, 1))


# ---- a start that is stopped at any of its moments

# The console script's own way, held still where it begins to import a module, forks its guard, or starts its ranks.
HELD = """
import sys, time
from pathlib import Path
place, folder = sys.argv[1], Path(sys.argv[2])
sys.argv = ["proxy-sft", "run", *sys.argv[3:]]
def look(event, given):
    if place not in (event, f"{event} {str(given[0]) if given else ''}") or (folder / "kernel-0").exists(): return
    (folder / "kernel-0").write_text("here")
    while not (folder / "go").exists(): time.sleep(0.02)
sys.addaudithook(look)
from proxy_sft.commands import main
sys.exit(main())
"""


@pytest.mark.parametrize("place, number", [
    ("import argparse", signal.SIGTERM), ("import filelock", signal.SIGINT),
    ("import psutil", signal.SIGHUP), ("os.fork", signal.SIGTERM), ("subprocess.Popen", signal.SIGTERM)])
def test_a_signal_to_a_launcher_that_is_just_starting(started, tmp_path, place, number):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    run = started([sys.executable, "-c", HELD, place, str(tmp_path)], notebook(tmp_path / "nb.ipynb", "print('cell')"),
                  TMPDIR=str(temporary))
    run.wait_for("kernel-0")
    run.process.send_signal(number)
    (tmp_path / "go").touch()
    assert run.end() == 75, run.err
    assert "Traceback" not in run.err and "cell\n" not in run.out and not run.survivors()
    assert not [*temporary.glob("sft-*")] and not (run.root / "STOP").exists()


# Every Python reads a sitecustomize; that of a kernel says that it is there, and begins to import when it may.
SLOW_KERNEL = """
import os, sys, time
from pathlib import Path
folder = Path(__file__).parent
if any("ipykernel" in word for word in sys.orig_argv):
    (folder / "kernel-0").write_text(str(os.getpid()))
    while not (folder / "go").exists(): time.sleep(0.02)
"""


@pytest.mark.parametrize("numbers", [
    [signal.SIGINT], [signal.SIGTERM], pytest.param([signal.SIGHUP, signal.SIGUSR1], marks=soak)])
def test_a_signal_to_a_kernel_that_is_still_importing(started, tmp_path, numbers):
    (tmp_path / "sitecustomize.py").write_text(SLOW_KERNEL)
    run = started(LAUNCH, notebook(tmp_path / "nb.ipynb", "print('cell')"), PYTHONPATH=str(tmp_path))
    run.wait_for("kernel-0")
    for number in numbers: os.kill(int((tmp_path / "kernel-0").read_text()), number)
    (tmp_path / "go").touch()
    assert run.end() == 75, run.err
    assert "Traceback" not in run.err and "cell\n" not in run.out and not run.survivors()


# ---- a rank that stands still

# Each rank does a step when the other has done the one before, as in a collective.
TOGETHER = """
import os, time
from pathlib import Path
from proxy_sft.core.stop_requests import working
rank = int(os.environ["RANK"])
mine, other = Path(folder, f"step-{rank}"), Path(folder, f"step-{1 - rank}")
for step in range(1, 10**9):
    while rank and not (other.exists() and int(other.read_text() or 0) >= step): time.sleep(0.02)
    while not rank and step > 1 and not (other.exists() and int(other.read_text() or 0) >= step - 1): time.sleep(0.02)
    mine.write_text(str(step))
    working(step)
    if step == 1: Path(folder, f"kernel-{rank}").write_text(str(os.getpid()))
"""


@pytest.mark.parametrize("still", ["kernel", pytest.param("worker and kernel", marks=soak)])
def test_a_rank_that_stands_still_ends_the_run_with_its_name(started, tmp_path, still):
    run = started(LAUNCH, notebook(tmp_path / "nb.ipynb", TOGETHER), "--nproc", "2", "-p", "stall_minutes", "0.1")
    run.wait_for("kernel-0", "kernel-1")
    if still != "kernel": os.kill(json.loads((run.root / "status" / "rank-1.json").read_text())["pid"], signal.SIGSTOP)
    os.kill(int((tmp_path / "kernel-1").read_text()), signal.SIGSTOP)
    assert run.end() == 1, run.err
    last = run.err.strip().splitlines()[-1]
    assert last.startswith("RankStalled: no step was done for 0.1 minutes (stall_minutes): rank 1 on "), run.err
    assert not run.survivors()


# ---- disks that are full, or gone

@pytest.fixture
def small_disks(tmp_path):
    "Full file systems at some folders."
    def mount(*folders):
        for folder in folders:
            folder.mkdir(parents=True)
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True)
            if done.returncode: pytest.skip("no file system can be mounted here")
            fill(folder)
    yield mount
    for line in Path("/proc/mounts").read_text().splitlines(): # a cell may have mounted one as well
        if line.split()[1].startswith(f"{tmp_path}/"): subprocess.run(["umount", "-l", line.split()[1]], check=True)


def fill(folder: Path) -> None:
    with open(folder / "ballast", "wb", buffering=0) as file:
        try:
            while True: file.write(b"x" * 4096)
        except OSError: return


FILL = """
from pathlib import Path
import os, shutil, subprocess
root = Path(os.environ["PROXY_SFT_STOP_FILE"]).parent
if how == "deleted": shutil.rmtree(root)
else:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(root)], check=True)
    with open(root / "ballast", "wb", buffering=0) as file:
        try:
            while True: file.write(b"x" * 4096)
        except OSError: pass
print("a long text " * 100_000)
if how == "full": raise ValueError("boom")
"""


SINGLY = (("logs", ["logs"]), ("status", ["status"])) if "PROXY_SFT_SOAK" in os.environ else ()


def test_full_disks_end_no_run_and_hide_no_cause(started, tmp_path, small_disks):
    print_much = notebook(tmp_path / "nb.ipynb", "print('a long text ' * 100_000)")
    runs = {}
    for name, folders in (("both", ["logs", "status"]), *SINGLY):
        small_disks(*(tmp_path / name / folder for folder in folders))
        runs[name] = started(LAUNCH, print_much, out=name)
    for how in ("full", "deleted"):
        (tmp_path / how).mkdir()
        runs[how] = started(LAUNCH, notebook(tmp_path / f"{how}.ipynb", FILL), "-p", "how", how, out=how)
    for name, run in runs.items():
        code = run.end()
        lines = run.err.strip().splitlines()
        if name in ("full", "deleted"):
            last = "ValueError: boom" if name == "full" else "LaunchError: The executed notebook cannot be written"
            assert code == 1 and lines[-1].startswith(last) and "no rank had started" not in run.err, run.err
            assert name == "full" or "Traceback" not in run.err, run.err
        else: assert code == 0 and "1 of 1 ranks done" in run.out and "Traceback" not in run.err, (name, run.err)
        assert not run.survivors()
