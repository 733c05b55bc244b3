"""A process that prepares, as a rank of so many: `python tests/builder.py '{"workspace": …}'`, or `started`, which does
not import everything again."""
import datetime
import gc
import json
import os
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import torch.distributed as dist
from proxy_sft.tokens import encoding, preparation
from proxy_sft.core.settings import load_settings

from trainings import IMPORTED

FORKS = get_context("forkserver")
# the same as in trainings.py: a process has one server; a module of this folder would not be found by it (Python 3.11)
FORKS.set_forkserver_preload(IMPORTED)


def build(workspace, seconds=0.0, run="run", shared="true", processes=1, answer=None, meet=None, hold=0):
    """Prepare; seconds are waited before building, and held after each piece that the processes encode; `answer` is the
    probe's patience, `meet` a default for the timeout of collectives, of which there is one afterwards."""
    real = preparation.build_splits
    def slow(*args, **kw):
        print("building", flush=True)
        time.sleep(seconds)
        return real(*args, **kw)
    pieces = encoding.encoded_by_processes
    def held(*args):
        for piece in pieces(*args):
            print("a piece", flush=True)
            time.sleep(hold)
            yield piece
    preparation.build_splits, encoding.encoded_by_processes = slow, held
    usual, preparation.ANSWER = preparation.waiting_line, answer or preparation.ANSWER
    preparation.waiting_line = lambda rank, **given: usual(rank, every=0, **given)  # what is heard is seen at once
    if meet:
        dist.distributed_c10d.default_pg_timeout = dist.constants.default_pg_timeout = datetime.timedelta(seconds=meet)
    if processes > 1: encoding.PIECE_BYTES, encoding.WORTH_BYTES = 10_000, (0, 0)
    found = preparation.prepare(
        load_settings("demo", workspace=workspace, run_name=run, shared_file_system=shared, num_proc=processes),
        lambda settings: None,
    )
    print("prepared", found.key, sum(map(len, found.dataset("train")["input_ids"])), flush=True)
    if meet: meet_others(workspace)


def meet_others(workspace):
    "A collective; it has time, because the other rank may be slow to come."
    assert not dist.is_initialized(), "a process group was there while data were prepared"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{workspace}/meet",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=600),
    )
    dist.barrier()
    print("met", flush=True)


def run(env, out, err, given):
    "In the new process."
    gc.freeze()
    os.environ.update(env)
    for number, path in ((1, out), (2, err)): os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    build(**given)


class started:
    "A process from a server that has imported everything once; used like `subprocess.Popen`."
    def __init__(self, env, folder, given):
        self.out, self.err = (Path(folder) / f"{time.monotonic_ns()}.{name}" for name in ("out", "err"))
        for path in (self.out, self.err): path.touch()
        self.process = FORKS.Process(target=run, args=(env, str(self.out), str(self.err), given), daemon=True)
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    def communicate(self, timeout=None):
        self.process.join(timeout)
        return self.out.read_text(), self.err.read_text()

    def wait(self):
        self.process.join()
        return self.process.exitcode

    @property
    def returncode(self): return self.process.exitcode


if __name__ == "__main__": build(**json.loads(sys.argv[1]))
