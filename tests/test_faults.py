"""Faults on whole trainings: the short form of tools/soak.py, a token in the environment, two machines in two network
namespaces."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from long_form import soak

from proxy_sft.core.atomic_folders import read_json

ROOT, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
TINY = dict(
    profile="demo",
    demo_rows=200,
    max_train_samples=64,
    max_eval_samples=4,
    max_length=512,
    logging_steps=1,
    save_steps=2,
    eval_steps="null",
    max_steps=8,
    num_proc=1,
    control_token_turns=2,
)


@pytest.mark.skipif("PROXY_SFT_SOAK" in os.environ, reason="make soak runs the long form itself")
def test_faults_in_short():  # one process: the libraries are imported, and the runs to compare with are made, once
    parts = ["broken", "odd", "full", "flips=8", "kills=1", "terms=1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "soak.py"), *parts],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0 and done.stdout.count("passed ") == len(parts), done.stdout + done.stderr[-3000:]


def words(**settings):
    return [w for k, v in {**TINY, **settings}.items() for w in ("-p", k, str(v))]


def kill_kernel(run_dir):
    "That of rank 1."
    worker = read_json(run_dir / "status" / "rank-1.json")["pid"]
    kernels = [
        int(p.parent.name)
        for p in Path("/proc").glob("[0-9]*/status")
        if f"PPid:\t{worker}\n" in p.read_text() and b"ipykernel" in (p.parent / "cmdline").read_bytes()
    ]
    os.kill(kernels[0], signal.SIGKILL)


@soak
def test_ranks_that_are_started_again_go_on_from_the_newest_checkpoint(tmp_path):
    command = [str(BIN / "proxy-sft"), "run", "nbs/02_train.ipynb", "--nproc", "2", "--max-restarts", "1"]
    def start(name):
        return subprocess.Popen(
            [*command, *words(workspace=tmp_path, run_name=name, max_steps=30)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    killed, run_dir = start("killed"), tmp_path / "runs" / "killed"
    while not (run_dir / "checkpoint-4" / "COMPLETE").exists():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    kill_kernel(run_dir)
    said = killed.communicate()[0]
    assert killed.returncode == 0 and read_json(run_dir / "status" / "rank-1.json")["attempt"] == 1, said
    straight = start("straight")
    assert straight.communicate()[0] and straight.returncode == 0
    log = lambda name: [
        (r["step"], r["loss"])
        for r in json.loads((tmp_path / "runs" / name / "trainer_state.json").read_text())["log_history"]
        if "loss" in r
    ]
    assert log("killed") == log("straight") and len(log("straight")) == 30
    assert (run_dir / "model.safetensors").read_bytes() == (
        tmp_path / "runs" / "straight" / "model.safetensors"
    ).read_bytes()
    lines = [json.loads(line) for line in (run_dir / "logs" / "progress.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line.get("loss")]
    assert 30 <= len(steps) < 50, steps # it did not begin anew


# ---- two machines: two network namespaces, joined by a pair of virtual cards

class Machines:
    def __init__(self):
        mark = uuid.uuid4().hex[:6]
        self.names = [f"sft{mark}{i}" for i in (0, 1)]
        for name in self.names: self.ip("netns", "add", name)
        self.ip("link", "add", self.names[0], "type", "veth", "peer", "name", self.names[1])
        for i, name in enumerate(self.names):
            self.ip("link", "set", name, "netns", name)
            self.ip("-n", name, "link", "set", "lo", "up")
            self.ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", name)
            self.ip("-n", name, "link", "set", name, "up")

    def ip(self, *words): subprocess.run(["ip", *words], check=True, capture_output=True)

    def close(self):
        for name in self.names: subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def start(self, i, *options, addresses=("--master-addr", "10.77.0.1", "--master-port", "29511")):
        command = [
            str(BIN / "proxy-sft"),
            "run",
            "nbs/02_train.ipynb",
            "--nproc",
            "1",
            "--nnodes",
            "2",
            "--node-rank",
            str(i),
            *addresses,
        ]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[i], *command, *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "GLOO_SOCKET_IFNAME": self.names[i],
                "TP_SOCKET_IFNAME": self.names[i],
                "OMP_NUM_THREADS": "1",
            },
        )


@pytest.fixture
def machines():
    if not shutil.which("ip"): pytest.skip("iproute2 is not installed")
    try: pair = Machines()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield pair
    pair.close()


@soak
@pytest.mark.parametrize("disks", ["one", "two"])
def test_two_machines_train_lose_one_and_go_on(machines, tmp_path, disks):
    places = [tmp_path / (f"disk-{i}" if disks == "two" else "disk") for i in (0, 1)]

    def both(run_name, kill_after=None):
        runs = [
            machines.start(
                i,
                *words(
                    workspace=places[i], run_name=run_name, deepspeed="ds_config_zero2.json", shared_file_system="auto"
                ),
            )
            for i in (0, 1)
        ]
        if kill_after:
            while not (places[0] / "runs" / run_name / kill_after / "COMPLETE").exists():
                assert all(r.poll() is None for r in runs), [r.communicate()[0] for r in runs if r.poll() is not None]
                time.sleep(0.02)
            os.kill(runs[1].pid, signal.SIGKILL)
        said = [r.communicate(timeout=3600)[0] for r in runs]
        return [r.returncode for r in runs], "\n".join(said)

    codes, said = both("straight")
    assert codes == [0, 0], said
    codes, said = both("killed", kill_after="checkpoint-2")
    assert codes == [1, -signal.SIGKILL], (codes, said)
    codes, said = both("killed")
    assert codes == [0, 0], said
    for place in places:
        weights = [(place / "runs" / n / "model.safetensors").read_bytes() for n in ("straight", "killed")]
        assert weights[0] == weights[1]
        parts = {
            p.name for p in (place / "runs" / "killed" / "checkpoint-8" / "global_step8").iterdir() if "optim" in p.name
        }
        assert len(parts) == (1 if disks == "two" else 2), parts
    if disks == "two": assert json.loads((places[1] / "runs" / "killed" / "manifest.json").read_text())["step"] == 8


@soak
def test_two_machines_that_meet_at_an_endpoint_start_again(machines, tmp_path):
    def both(run_name, kill_after=None):
        run_dir, runs = tmp_path / "runs" / run_name, []
        for i in (0, 1):
            meet = ("--rdzv-endpoint", "10.77.0.1:29511", "--local-addr", f"10.77.0.{i + 1}", "--max-restarts", "2")
            runs.append(
                machines.start(
                    i,
                    *words(workspace=tmp_path, run_name=run_name, deepspeed="ds_config_zero2.json", max_steps=30),
                    addresses=meet,
                )
            )
        if kill_after:
            while not (run_dir / kill_after / "COMPLETE").exists():
                assert all(r.poll() is None for r in runs), [r.communicate()[0] for r in runs if r.poll() is not None]
                time.sleep(0.02)
            kill_kernel(run_dir)
        said = "\n".join(r.communicate(timeout=3600)[0] for r in runs)
        assert [r.returncode for r in runs] == [0, 0], said
        return (run_dir / "model.safetensors").read_bytes(), {
            read_json(run_dir / "status" / f"rank-{i}.json")["attempt"] for i in (0, 1)
        }

    straight, attempts = both("straight")
    assert attempts == {0}
    weights, attempts = both("killed", kill_after="checkpoint-4")
    # the machine whose rank only lost its partner may count a failure of its own
    assert weights == straight and min(attempts) >= 1
