"""Trainings in processes of their own that share one import: a server loads the libraries once and forks for each run,
because a fresh start takes seven seconds of processor time.

What a fresh start does is seen by the demo, the launcher's tests and the notebooks; here the trainings are what is
looked at."""
import gc
import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Callable, Optional

from ports import free_port

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the server is started
TINY = dict( # a training of seconds
    profile="demo", demo_rows=200, max_train_samples=60, max_eval_samples=2, max_length=320, num_proc=1,
    max_steps=3, logging_steps=1, save_steps=2, eval_steps=3, report_to=[],
    control_token_turns=2,
)
SERVER = multiprocessing.get_context("forkserver")
IMPORTED = ["proxy_sft.train", "trl.trainer.sft_trainer", "deepspeed", "awkward"]  # what each training would import
SERVER.set_forkserver_preload(IMPORTED)


def logged(run: Path, field: str = "loss") -> list: # run: a folder with a trainer_state.json
    "What a training logged under a name, in order."
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [record[field] for record in log if field in record]


def be_a_rank(given: dict, environment: dict, said: str, act: Optional[Callable]) -> None:
    "One rank of a training; what it says goes into files, and its exception ends the process as in a script."
    gc.freeze()  # trainings collect garbage; what was imported is not looked at
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    from proxy_sft.core.settings import load_settings
    from proxy_sft.train import train
    (act or train)(load_settings(**given))


def stopped_after_a_step(settings) -> None: # an `act`
    "A training that finds the file STOP after its first step."
    from proxy_sft.training.checkpoint_writer import StopOnRequest
    from proxy_sft.train import train
    usual = StopOnRequest.on_step_end
    def on_step_end(self, args, state, control, **more):
        if state.global_step == 1: (settings.run_dir / "STOP").touch()
        return usual(self, args, state, control, **more)
    StopOnRequest.on_step_end = on_step_end
    train(settings)


def run_training(
    ranks: int = 1,
    seconds: float = 3600,
    act: Optional[Callable] = None,
    **given,
) -> subprocess.CompletedProcess: # exit code (the first that is not 0), outputs of all ranks
    """Train by the exported library, as one process or several; `act`, a function of a module, takes the settings in
    place of `train`."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            env.update(
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(free_port()),
                WORLD_SIZE=str(ranks),
                LOCAL_WORLD_SIZE=str(ranks),
            )
        at = lambda rank: {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else env
        processes = [
            SERVER.Process(target=be_a_rank, args=(given, at(rank), f"{folder}/{rank}", act)) for rank in range(ranks)
        ]
        for process in processes: process.start()
        until = time.monotonic() + seconds
        while (
            any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes) and time.monotonic() < until
        ):
            time.sleep(0.02)
        for process in processes:
            process.join(60 if any(p.exitcode for p in processes) or time.monotonic() > until else None)
            if process.is_alive(): process.kill(); process.join()
        said = [
            "".join(f"{p.read_text(errors='replace')}" for p in sorted(Path(folder).glob(f"*.{name}")))
            for name in ("out", "err")
        ]
        return subprocess.CompletedProcess(given, next((p.exitcode for p in processes if p.exitcode), 0), *said)
