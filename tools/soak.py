"""`make soak`: the long form of every fault test. `python tools/soak.py [PART … | PART=COUNT …]` runs some of it;
figures are printed and written to soak.json.

One life of a training takes a second or two here: a parent imports the libraries once and forks a child for each life,
with one or two ranks over gloo. What kills, stops or spoils a life is real: signals, bits on the disk, a full file
system. The launcher, kernels and torchrun are killed in tests/test_launch.py and tests/test_faults.py, which `make
soak` runs in their long form afterwards. """
import argparse
import contextlib
import gc
import hashlib
import importlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from ports import free_port  # noqa: E402
from trainings import IMPORTED  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
TINY = dict(
    profile="demo",
    demo_rows=200,
    max_train_samples=64,
    max_eval_samples=4,
    max_length=512,
    logging_steps=1,
    save_steps=2,
    eval_steps=3,
    max_steps=8,
    report_to=[],
    num_proc=1,
    save_total_limit=2,
    control_token_turns=2,
)


# ---- one life, in a forked process

def settings_of(**given):
    from proxy_sft.core.settings import load_settings
    return load_settings(**{k: "null" if v is None else v for k, v in {**TINY, **given}.items()})


def life(log: Path, ranks: int, hook, **given) -> list[int]: # process ids by rank; the first one leads the group
    "Start a training in processes of their own; `hook(rank)` runs in each before it begins."
    pids, port = [], free_port()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0: be_a_rank(log, rank, ranks, port, hook, given)
        pids.append(pid)
    for pid in pids: os.setpgid(pid, pids[0])
    return pids


def be_a_rank(log, rank, ranks, port, hook, given):
    code = 1
    try:
        out = os.open(log.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for n in (1, 2): os.dup2(out, n)
        if given.pop("torchrun", ranks > 1):
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(ranks),
                LOCAL_WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        from proxy_sft.core.stop_requests import StopRequested
        from proxy_sft.train import train
        if hook: hook(rank)
        try:
            train(settings_of(**given))
            code = 0
        except StopRequested as error:
            print(error)
            code = 75
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def end(
    pids: list[int],
    seconds: float = 3600,
    grace: float = 60,
) -> list[int]: # exit codes by rank, negative for a signal; the first failure ends the others, as the launcher has it
    "Wait for all ranks of a life."
    codes, until, failed = {}, time.monotonic() + seconds, None
    while len(codes) < len(pids):
        for pid in pids:
            if pid in codes: continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done: codes[pid] = os.waitstatus_to_exitcode(status)
        if failed is None and any(c not in (0, 75) for c in codes.values()): failed = time.monotonic()
        if (failed and time.monotonic() - failed > grace) or time.monotonic() > until:
            for pid in set(pids) - set(codes): os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def in_child(act): # what it gave, as JSON can carry it
    """Do something in a forked process: hashing and preparing start threads, after which this one could not fork safely
    any more."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try: os.write(writer, json.dumps(act()).encode())
        except BaseException: traceback.print_exc()
        finally: os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file: text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def words(log: Path, ranks: int = 1) -> str:
    return "\n".join(log.with_suffix(f".{r}.log").read_text(errors="replace") for r in range(ranks))


def digest(run_dir: Path) -> str:
    "Weights, optimizer states and schedule of a finished run, tensor by tensor, as one hash."
    import torch
    from safetensors.torch import load_file
    h = hashlib.sha256()
    def feed(value):
        if torch.is_tensor(value):
            h.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        elif isinstance(value, dict):
            for k in sorted(value, key=str):
                if k not in ("ds_config", "ds_version"): h.update(str(k).encode()); feed(value[k])
        elif isinstance(value, (list, tuple)):
            for v in value: feed(v)
        elif isinstance(value, (int, float, str, bool)): h.update(repr(value).encode())
    feed(load_file(run_dir / "model.safetensors"))
    for path in sorted(
        [
            *run_dir.glob("optimizer.pt"),
            *run_dir.glob("scheduler.pt"),
            *run_dir.glob("rng_state*.pth"),
            *run_dir.glob("global_step*/*optim_states.pt"),
        ]
    ):
        feed(torch.load(path, weights_only=False, map_location="cpu"))
    log = json.loads((run_dir / "trainer_state.json").read_text())["log_history"]
    names = ("loss", "grad_norm", "eval_loss")
    feed(sorted([r["step"], name, r[name]] for r in log for name in names if name in r))
    return h.hexdigest()[:16]


# ---- the parts

class Soak:
    def __init__(self, folder: Path, seed: int):
        self.folder, self.dice, self.lives, self.found = folder, random.Random(seed), 0, {}
        self.straight = {}

    def run(self, name, ranks=1, hook=None, seconds=3600, grace=60, **given):
        self.lives += 1
        return end(
            life(self.folder / name, ranks, hook, workspace=str(self.folder / "ws"), run_name=name, **given),
            seconds,
            grace,
        )

    def dir(self, name): return self.folder / "ws" / "runs" / name

    def reference(self, ranks=1, **given) -> str:
        key = json.dumps([ranks, given], sort_keys=True)
        if key not in self.straight:
            name = f"straight-{len(self.straight)}"
            assert self.run(name, ranks, **given) == [0] * ranks, words(self.folder / name, ranks)
            self.straight[key] = digest(self.dir(name))
        return self.straight[key]

    def finish(self, name, ranks=1, tries=3, **given) -> str:
        "Start again until it is done; the final hash."
        for _ in range(tries):
            codes = self.run(name, ranks, **given)
            if codes == [0] * ranks: return digest(Path(given.get("output_dir") or self.dir(name)))
        raise AssertionError(f"{name} did not finish: {codes}\n{words(self.folder / name, ranks)[-3000:]}")

    # exact resume, tolerance zero
    def exact(self, ranks=(1, 2)):
        rows, right = [], 0
        epoch = self.blocks()
        for n in ranks:
            for packing in (True, False):
                for accumulation in (1, 2):
                    given = dict(packing=packing, gradient_accumulation=accumulation)
                    whole = self.reference(n, **given)
                    border = max(2, -(-epoch[packing] // (accumulation * n)))
                    for at, place in ((3, "mid-epoch"), (border, "epoch border")):
                        if at >= (given.get("max_steps") or TINY["max_steps"]):
                            given = {**given, "max_steps": border + 3}
                            whole = self.reference(n, **given)
                        name = f"exact-{n}-{packing}-{accumulation}-{at}"
                        codes = self.run(name, n, stop_at(self.dir(name), at), **given)
                        assert codes == [75] * n, (codes, words(self.folder / name, n)[-2000:])
                        same = self.finish(name, n, **given) == whole
                        right += same
                        rows.append((n, packing, accumulation, place, at, same))
        return (
            f"{right} of {len(rows)} resumed runs end with the same hash (ranks, packing, accumulation, where, step): "
            f"{rows}",
            right == len(rows),
        )

    def blocks(self):
        from proxy_sft.pipeline import ensure_prepared
        return in_child(
            lambda: [
                len(
                    ensure_prepared(settings_of(workspace=str(self.folder / "ws"), packing=p,
                                                run_name="blocks")).dataset(
                        "train"
                    )
                )
                for p in (False, True)
            ]
        )

    # another number of ranks
    def worlds(self):
        "Losses after a conversion beside those of the ranks that began: 2 to 1, and 2 to 4."
        losses = lambda name: {
            r["step"]: (r["loss"], r["grad_norm"])
            for r in json.loads((self.dir(name) / "trainer_state.json").read_text())["log_history"]
            if "loss" in r
        }
        self.reference(2, gradient_accumulation=2)
        whole, lines = losses(f"straight-{len(self.straight) - 1}"), []
        assert self.run("worlds", 2, stop_at(self.dir("worlds"), 5), gradient_accumulation=2) == [75, 75], words(
            self.folder / "worlds", 2
        )[-2000:]
        for ranks, more, says in (
            (4, {}, "2 then, 4 now"),
            (4, dict(resume_world="convert", gradient_accumulation=2), "4 then, 8 now"),
            (1, dict(resume_world="convert", gradient_accumulation=4, torchrun=False), "world_size: 2 then, 1 now"),
        ):
            codes, text = (
                self.run("worlds", ranks, **{"gradient_accumulation": 1, **more}),
                words(self.folder / "worlds", ranks),
            )
            lines.append(("refused", ranks, all(codes) and says in text and "resume_world" in text))
        for ranks in (1, 4):
            name = f"worlds-{ranks}"
            shutil.copytree(self.dir("worlds"), self.dir(name))
            codes = self.run(name, ranks, torchrun=True, resume_world="convert", gradient_accumulation=4 // ranks)
            assert codes == [0] * ranks and "it is converted for" in words(self.folder / name, ranks), (
                codes,
                words(self.folder / name, ranks)[-3000:],
            )
            found = losses(name)
            far = max(abs(a - b) / b for step in whole for a, b in zip(found[step], whole[step]))
            lines.append(
                (
                    "2 ranks to",
                    ranks,
                    f"largest relative difference in loss and gradient norm {far:.1e}",
                    far < 1e-4 and found.keys() == whole.keys(),
                )
            )
        return f"another number of ranks: {lines}", all(l[-1] for l in lines)

    # kill -9 of the whole tree
    def kills(self, count=50, **given):
        right = inside = 0
        for i in range(count):
            ranks, saving = 1 + i % 2, i % 4 < 2 # half of them in a save, with one and with two ranks
            whole, name = self.reference(ranks), f"kill-{i}"
            for _ in range(1 + i % 3): # up to three deaths in a row
                inside += self.killed(name, ranks, saving, **given)[0]
            right += self.finish(name, ranks, **given) == whole
            self.check_window(name)
            shutil.rmtree(self.dir(name))
        return (
            f"{right} of {count} runs that were killed with -9 (all ranks at once, 1 to 3 times each; {inside} kills "
            "inside a save) end with the same hash",
            right == count and inside >= count // 2,
        )

    def killed(self, name, ranks, saving, **given) -> tuple[bool, list[int]]: # whether it was in a save; exit codes
        "A life whose group is killed: where it holds still inside a save, or at a random moment."
        mark, wait = self.folder / f"{name}.held", self.dice.uniform(0.2, 3)
        mark.unlink(missing_ok=True)
        pids = life(
            self.folder / name,
            ranks,
            hold_inside_save(mark, self.dice.randrange(60)) if saving else None,
            workspace=str(self.folder / "ws"),
            run_name=name,
            **given,
        )
        self.lives += 1
        while not os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT): # else it ended by itself
            if mark.exists() or not saving and (wait := wait - 0.01) < 0: break
            time.sleep(0.01)
        try: os.killpg(pids[0], signal.SIGKILL)
        except ProcessLookupError: pass # ended by itself
        return mark.exists(), end(pids)

    # the same with saves beside the training
    def beside(self, count=30):
        machine = self.folder / "machine"
        machine.mkdir()
        text, good = self.kills(count, save_through=str(machine))
        left = len(list(machine.iterdir()))
        return f"saves beside the training: {text}; {left} folders are left on the machine", good and not left

    def check_window(self, name):
        from proxy_sft.core.atomic_folders import checkpoint_step, complete_checkpoints
        kept = in_child(lambda: [checkpoint_step(f) for f in complete_checkpoints(self.dir(name))])
        assert kept == [6, 8] and not (self.dir(name) / ".saving").exists(), (name, kept)

    # SIGTERM at random moments
    def terms(self, count=20):
        right, agreed, early = 0, 0, 0
        for i in range(count):
            ranks, name = 1 + (i % 4 > 0), f"term-{i}"
            whole = self.reference(ranks)
            pids = life(self.folder / name, ranks, None, workspace=str(self.folder / "ws"), run_name=name)
            self.lives += 1
            while not (self.dir(name) / "settings.yaml").exists() and not os.waitid(
                os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT
            ):
                time.sleep(0.01)
            time.sleep(self.dice.uniform(0, 2.5))
            only = [pids, pids[:1], pids[-1:]][i % 3]
            for pid in only:
                try: os.kill(pid, signal.SIGTERM)
                except ProcessLookupError: pass # done before
            codes = end(pids)
            if codes == [0] * ranks: early += 1
            elif codes == [75] * ranks:
                from proxy_sft.core.atomic_folders import complete_checkpoints
                from proxy_sft.core.atomic_folders import verify
                steps = in_child(lambda: [verify(f)["step"] for f in complete_checkpoints(self.dir(name))[-1:]])
                agreed += len(steps) == 1 or "before the first step" in words(self.folder / name, ranks)
            else: print(name, codes, words(self.folder / name, ranks)[-1500:])
            right += self.finish(name, ranks) == whole
            shutil.rmtree(self.dir(name))
        return (
            f"{count} SIGTERMs (all ranks, the first only, the last only): {agreed} ended with 75 and one complete "
            f"checkpoint, {early} had ended before; {right} finish with the same hash",
            right == count and agreed + early == count,
        )

    # bit flips
    def flips(self, count=100):
        name, found, quiet = "flips", 0, []
        assert self.run(name, 2, stop_at(self.dir(name), 5)) == [75, 75], words(self.folder / name, 2)[-2000:]
        newest = self.dir(name) / "checkpoint-5"
        files = sorted(p for p in newest.rglob("*") if p.is_file())
        from proxy_sft.training.checkpoints import checkpoint_to_resume, CheckpointError
        given = settings_of(workspace=str(self.folder / "ws"), run_name=name)
        facts = {k: v for k, v in json.loads((newest / "manifest.json").read_text()).items() if k != "files"}
        real, copy = 0, self.folder / "whole"
        shutil.copytree(newest, copy)
        before = set(self.dir(name).glob("checkpoint-*"))
        older = max(before - {newest}, key=lambda f: int(f.name[11:]))
        for victim in ("COMPLETE", "manifest.json"): # the run goes on from an older one, and says so whatever is set
            path = newest / victim
            path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
            codes, text = (
                self.run(name, 2, stop_at(self.dir(name), 5), logging_steps=1000, preflight="warn"),
                words(self.folder / name, 2),
            )
            assert (
                codes == [75, 75]
                and (
                    "WARNING: checkpoint-5 is DAMAGED: its marker COMPLETE does not fit its manifest.json, though it "
                    f"was complete once. It is set aside as {self.dir(name)}"
                    f"/damaged-checkpoint-5. The run goes on from {older.name}; {5 - int(older.name[11:])} steps, up "
                    "to step 5, are lost and trained again."
                )
                in text
            ), (codes, text[-2000:])
            shutil.rmtree(newest)
            shutil.rmtree(self.dir(name) / "damaged-checkpoint-5")
            shutil.copytree(copy, newest)
        for i in range(count):
            path = files[i % len(files)]
            whole = path.read_bytes()
            at, bit = self.dice.randrange(len(whole)), self.dice.randrange(8)
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1:])
            if i % 12 == 0: # a whole start, as a person would do it
                codes, text = self.run(name, 2, max_steps=5), words(self.folder / name, 2)
                real += 1
                detected = (
                    "loss" not in text
                    if path.name in ("COMPLETE", "manifest.json")
                    else path.name in text
                    and (all(codes) and "learning rate" not in text or "The work does not need it" in text)
                )
                if path.name in ("COMPLETE", "manifest.json") and not newest.exists(): detected = True
            else:
                def check(): # a page or a script that training does not need is a warning that names the file
                    said = io.StringIO()
                    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                        try: taken = checkpoint_to_resume(given, facts)
                        except CheckpointError as error: return path.name in str(error)
                    return taken != newest or f"{path} has the right size and other bytes" in said.getvalue()
                detected = in_child(check)
            found += detected
            if not detected: quiet.append(str(path.relative_to(newest)))
            if newest.exists(): path.write_bytes(whole)
            else:
                # swept away as incomplete: the flipped bit was in the marker or the manifest
                shutil.copytree(copy, newest)
            for later in set(self.dir(name).glob("checkpoint-*")) - before: shutil.rmtree(later)
        assert in_child(lambda: checkpoint_to_resume(given, facts) == newest)
        return (
            f"{found} of {count} bit flips over {len(files)} files found before step 1 ({real} by whole starts, the "
            f"others by the same check in process); not found: {quiet}",
            found == count,
        )

    # NaN and Inf
    def broken(self):
        lines = []
        for ranks, value, where in (
            (1, "nan", "loss"),
            (1, "inf", "loss"),
            (2, "nan", "loss"),
            (1, "nan", "gradient"),
            (2, "inf", "gradient"),
        ):
            name = f"broken-{ranks}-{value}-{where}"
            codes, text = (
                self.run(name, ranks, spoil(value, where, at=4), save_steps=1),
                words(self.folder / name, ranks),
            )
            from proxy_sft.core.atomic_folders import complete_checkpoints
            kept = in_child(lambda: [f.name for f in complete_checkpoints(self.dir(name))])
            good = (
                all(c == 1 for c in codes)
                and "at step 4" in text
                and "Blocks [" in text
                and kept[-1:] == ["checkpoint-3"]
            )
            lines.append(
                (ranks, value, where, good, next((l for l in text.splitlines() if "at step 4" in l), text[-600:])[:220])
            )
        return (
            f"{sum(l[3] for l in lines)} of {len(lines)} non-finite steps stopped before the next save: {lines}",
            all(l[3] for l in lines),
        )

    # spikes
    def spikes(self):
        lines = []
        for ranks in (1, 2):
            name, more = f"spike-{ranks}", dict(max_steps=16, skip_loss_spikes=5, save_steps=4)
            codes = self.run(name, ranks, spoil("spike", "loss", at=13), **more)
            log = json.loads((self.dir(name) / "trainer_state.json").read_text())["log_history"]
            skipped = max(r.get("skipped_steps", 0) for r in log)
            lines.append((ranks, codes, skipped))
        return f"loss spikes (ranks, codes, skipped): {lines}", all(c == [0] * n and s == 1 for n, c, s in lines)

    # a full disk
    def full(self):
        small, _ = self.folder / "small", self.reference()
        size = sum(f.stat().st_size for f in (self.dir("straight-0") / "checkpoint-8").rglob("*"))
        small.mkdir()
        if (
            os.geteuid()
            or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * size}", "none", str(small)]).returncode
        ):
            return "full disk: skipped, a tmpfs cannot be mounted here", True
        lines = []
        try:
            from proxy_sft.core.atomic_folders import complete_checkpoints
            codes = self.run("full-start", output_dir=str(small / "run"), save_total_limit=100)
            lines.append(
                ("refused before it starts", codes == [1] and "The run would fail" in words(self.folder / "full-start"))
            )
            for mode in ("stop", "go_on", "race"):
                run_dir = small / mode
                ballast = small / "ballast"
                def fill(space):
                    free = shutil.disk_usage(small).free
                    ballast.write_bytes(b"x" * max(0, int(free - space)))
                hook = at_step(run_dir, 3, lambda: fill(0 if mode == "go_on" else size * 0.5))
                if mode == "race": hook = fill_inside_save(run_dir, small, ballast)
                codes = self.run(
                    f"full-{mode}",
                    1,
                    hook,
                    output_dir=str(run_dir),
                    on_full_disk="go_on" if mode == "go_on" else "stop",
                    max_steps=8,
                )
                text, kept = (
                    words(self.folder / f"full-{mode}"),
                    in_child(lambda: [f.name for f in complete_checkpoints(run_dir)]),
                )
                ballast.unlink(missing_ok=True)
                plain = ("There is no space" in text or "could not be" in text) and kept[:1] == ["checkpoint-2"]
                again = (
                    self.finish(f"full-{mode}", 1, output_dir=str(run_dir)) == self.reference()
                    if mode != "go_on"
                    else True
                )
                if mode == "go_on":
                    plain = "going on without it" in text and codes == [1]  # no space for the last one either
                lines.append(
                    (mode, codes, kept, plain, in_child(lambda: hashes(run_dir)) if mode == "go_on" else again)
                )
                shutil.rmtree(run_dir)
        finally: subprocess.run(["umount", "-l", str(small)], check=True)
        return f"full disk: {lines}", all(l[-1] and (len(l) == 2 or l[3]) for l in lines)

    def full_two(self):
        "The disk fills while one rank writes; the other must come to its end by itself, not wait for ever."
        whole, small = self.reference(2), self.folder / "small-two"
        size = sum(
            f.stat().st_size for f in (self.dir(f"straight-{len(self.straight) - 1}") / "checkpoint-8").rglob("*")
        )
        small.mkdir()
        if (
            os.geteuid()
            or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * size}", "none", str(small)]).returncode
        ):
            return "full disk with two ranks: skipped, a tmpfs cannot be mounted here", True
        try:
            run_dir, ballast = small / "two", small / "ballast"
            codes = self.run(
                "full-two", 2, fill_inside_save(run_dir, small, ballast), grace=120, output_dir=str(run_dir)
            )
            text, kept = words(self.folder / "full-two", 2), in_child(lambda: [f.name for f in complete(run_dir)])
            ballast.unlink(missing_ok=True)
            plain = codes == [1, 1] and "checkpoint-4 could not be written" in text and kept == ["checkpoint-2"]
            return f"full disk with two ranks: {codes}, {kept} kept", plain and self.finish(
                "full-two", 2, output_dir=str(run_dir)
            ) == whole
        finally: subprocess.run(["umount", "-l", str(small)], check=True)

    # what people and schedulers do to a run's folder
    def odd(self):
        """Two starts at once, `resume: never` that is put back into the queue, another run's checkpoint, files deleted
        by hand, old checkpoints that cannot be deleted."""
        whole, lines = self.reference(), []
        lines.append(("two at once", self.two_at_once(whole)))
        env = dict(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
        first = self.run(
            "odd", 1, with_environment(dict(SLURM_JOB_ID="7"), stop_at(self.dir("odd"), 5)), resume="never"
        )
        again, text = self.run("odd", 1, with_environment(env), resume="never"), words(self.folder / "odd")
        steps = [
            r["step"]
            for r in map(json.loads, (self.dir("odd") / "logs" / "progress.jsonl").read_text().splitlines())
            if r.get("loss") is not None
        ]
        lines.append(
            (
                "never, repeated",
                first == [75] and again == [0] and steps == list(range(1, 9)) and digest(self.dir("odd")) == whole,
            )
        )
        other = (
            self.run("odd-2", 1, stop_at(self.dir("odd-2"), 3)),
            self.run("odd-2", resume=str(self.dir("odd") / "checkpoint-8")),
        )
        lines.append(("another run's last checkpoint", other == ([75], [0]) and digest(self.dir("odd-2")) == whole))
        for file in ("optimizer.pt", "model.safetensors"):
            (self.dir("odd-2") / "checkpoint-3" / file).unlink()
            codes, text = self.run("odd-2"), words(self.folder / "odd-2")
            lines.append(
                (
                    f"{file} deleted by hand",
                    codes == [1]
                    and "lacks model.safetensors"
                    in text + "lacks model.safetensors" * (file == "optimizer.pt" and "lacks optimizer.pt" in text)
                    and "Move it away, and the run goes on from checkpoint-2, 1 steps earlier" in text,
                )
            )
        shutil.rmtree(self.dir("odd-2") / "checkpoint-3")
        lines.append(("moved away", self.finish("odd-2") == whole))
        lines.append(("an old checkpoint is in use", self.in_use(whole)))
        return f"odd things: {lines}", all(l[-1] for l in lines)

    def two_at_once(self, whole) -> bool:
        "The first waits in a step until the second has been refused."
        run_dir, go = self.dir("twice"), self.folder / "go"
        def wait():
            (self.folder / "there").touch()
            while not go.exists(): time.sleep(0.02)
        pids = life(
            self.folder / "twice", 1, at_step(run_dir, 3, wait), workspace=str(self.folder / "ws"), run_name="twice"
        )
        while not (self.folder / "there").exists() and not os.waitid(
            os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            time.sleep(0.02)
        second = life(self.folder / "twice-second", 1, None, workspace=str(self.folder / "ws"), run_name="twice")
        codes, text = end(second), words(self.folder / "twice-second")
        go.touch()
        self.lives += 2
        return (
            end(pids) == [0]
            and codes == [1]
            and f"is in use by process {pids[0]} on " in text
            and digest(run_dir) == whole
        )

    def in_use(self, whole) -> bool:
        """A file of the checkpoint that goes next cannot be deleted, as one that is read on NFS cannot: a mount on it
        when we are root, a folder without rights otherwise."""
        run_dir = self.dir("busy")
        def hold():
            held = run_dir / "checkpoint-2" / "scheduler.pt"
            if os.geteuid(): held.parent.chmod(0o500)
            elif subprocess.run(["mount", "--bind", str(held), str(held)], capture_output=True).returncode:
                subprocess.run(["chattr", "+i", str(held)], capture_output=True)
        codes, text = self.run("busy", 1, at_step(run_dir, 3, hold)), words(self.folder / "busy")
        for left in run_dir.glob(".gone-*"):
            left.chmod(0o700)
            subprocess.run(
                ["umount", "-l", str(left / "scheduler.pt")], capture_output=True
            ) if not os.geteuid() else None
            subprocess.run(["chattr", "-i", str(left / "scheduler.pt")], capture_output=True)
        if "checkpoint-2 is not needed any more and cannot be deleted now" not in text:
            return "nothing can be made undeletable here" if codes == [0] else False
        return (
            codes == [0]
            and digest(run_dir) == whole
            and self.finish("busy") == whole
            and not [*run_dir.glob(".gone-*")]
        )

    # a mixed soak
    def mixed(self, count=200):
        kinds, right, silent, faults = {}, 0, 0, 0
        run = 0
        while faults < count:
            ranks, name = 1 + run % 2, f"mixed-{run}"
            run += 1
            whole = self.reference(ranks)
            for _ in range(self.dice.randint(2, 6)):
                kind = self.dice.choice(
                    [
                        "kill",
                        "kill in a save",
                        "kill one rank",
                        "SIGTERM",
                        "SIGINT to one",
                        "STOP",
                        "bit flip",
                        "lost file",
                        "half a checkpoint",
                    ]
                )
                faults += self.fault(kind, name, ranks)
                kinds[kind] = kinds.get(kind, 0) + 1
            same = self.finish(name, ranks) == whole
            right += same
            silent += not same
            shutil.rmtree(self.dir(name), ignore_errors=True)
        return (
            f"{faults} faults in {run} runs ({kinds}): {right} runs end with the same hash, {silent} diverged silently",
            silent == 0,
        )

    def fault(self, kind, name, ranks) -> int:
        from proxy_sft.core.atomic_folders import complete_checkpoints
        run_dir, found = (
            self.dir(name),
            [self.dir(name) / f for f in in_child(lambda: [f.name for f in complete_checkpoints(self.dir(name))])],
        )
        if kind in ("bit flip", "lost file", "half a checkpoint"):
            if not found: return 0
            victim = self.dice.choice([p for p in sorted(found[-1].rglob("*")) if p.is_file()])
            if kind == "half a checkpoint":
                (found[-1] / "COMPLETE").unlink()
                for p in [p for p in found[-1].rglob("*") if p.is_file() and p.name != "manifest.json"][::2]: p.unlink()
                return 1
            whole = victim.read_bytes()
            victim.unlink()
            if kind == "bit flip": victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            codes, text = self.run(name, ranks), words(self.folder / name, ranks)
            refused = all(codes) and "Cannot go on" in text
            # a page or a script that training does not need is a warning that names the file
            warned = victim.name in text and "The work does not need it" in text and not refused
            skipped = victim.name in ("COMPLETE", "manifest.json") or warned
            assert refused or skipped, (kind, victim, codes, text[-1500:])
            if refused: # a person deletes the broken one
                shutil.rmtree(found[-1])
            return 1
        if kind == "STOP":
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "STOP").touch()
            codes = self.run(name, ranks)
            (run_dir / "STOP").unlink()
            return int(any(codes))
        if kind in ("kill", "kill in a save"): return int(any(self.killed(name, ranks, kind == "kill in a save")[1]))
        pids = life(self.folder / name, ranks, None, workspace=str(self.folder / "ws"), run_name=name)
        self.lives += 1
        time.sleep(self.dice.uniform(0.3, 3))
        number = {"kill one rank": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT to one": signal.SIGINT}[kind]
        for pid in [self.dice.choice(pids)] if "one" in kind else pids:
            try: os.kill(pid, number)
            except ProcessLookupError: pass # done before
        return int(any(end(pids)))


# ---- hooks, in the child before it trains

def stop_at(run_dir, step):
    def hook(rank):
        from proxy_sft.training.checkpoint_writer import StopOnRequest
        usual = StopOnRequest.on_step_end
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step and rank == 0: os.kill(os.getpid(), signal.SIGUSR1)
            return usual(self, args, state, control, **kwargs)
        StopOnRequest.on_step_end = on_step_end
    return hook


def with_environment(values, then=None):
    def hook(rank):
        os.environ.update(values)
        if then: then(rank)
    return hook


def at_step(run_dir, step, act):
    def hook(rank):
        from proxy_sft.training.checkpoint_writer import StopOnRequest
        usual = StopOnRequest.on_step_end
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step and rank == 0: act()
            return usual(self, args, state, control, **kwargs)
        StopOnRequest.on_step_end = on_step_end
    return hook


def hold_inside_save(mark, left):
    """The first rank does so much more with files inside a save, says so by a mark, and holds still for whoever kills
    it."""
    done = itertools.count() # one step even where several threads count
    def hook(rank):
        def look(event, given):
            if (
                rank
                or event not in ("open", "os.rename", "os.remove", "os.link", "os.mkdir")
                or ".saving" not in str(given[0])
            ):
                return
            place = next(done)
            if place == left: mark.touch()
            while place >= left: time.sleep(60)
        sys.addaudithook(look)
    return hook


def fill_inside_save(run_dir, small, ballast):
    "The disk is filled by somebody else between the look and the write."
    def hook(rank):
        from proxy_sft.training.checkpoint_writer import CompleteCheckpoints
        usual = CompleteCheckpoints._has_room_for
        def _has_room_for(self, target):
            answer = usual(self, target)
            if self.state.global_step == 4 and rank == 0:
                ballast.write_bytes(b"x" * (shutil.disk_usage(small).free - 300_000))
            return answer
        CompleteCheckpoints._has_room_for = _has_room_for
    return hook


def spoil(value, where, at):
    def hook(rank):
        from trl import SFTTrainer
        usual = SFTTrainer.compute_loss
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = usual(self, model, inputs, *args, **kwargs)
            if not model.training or self.state.global_step + 1 != at or rank != self.args.world_size - 1: return loss
            if value == "spike": return loss * 100
            if where == "gradient": loss.register_hook(lambda g: g * float(value)); return loss
            return loss * float(value)
        SFTTrainer.compute_loss = compute_loss
    return hook


def complete(run_dir):
    from proxy_sft.core.atomic_folders import complete_checkpoints
    return complete_checkpoints(run_dir)


def hashes(run_dir) -> bool:
    from proxy_sft.core.atomic_folders import complete_checkpoints
    from proxy_sft.core.atomic_folders import verify
    return all(bool(verify(f)) for f in complete_checkpoints(run_dir))


PARTS = ("exact", "worlds", "broken", "spikes", "odd", "full", "full_two", "flips", "terms", "kills", "beside",
         "mixed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[], metavar="PART[=COUNT]",
                        help=f"of {', '.join(PARTS)}; all when not given, then the pytest files in their long form")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--count", type=int, help="faults of a part, instead of 50, 20, 30, 100 and 200")
    args = parser.parse_args()
    for name in IMPORTED: importlib.import_module(name)  # once, for all lives
    gc.freeze()  # lives collect garbage; what was imported is not looked at
    bad = 0
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder), args.seed)
        for part, _, count in (p.partition("=") for p in args.parts or PARTS):
            began, count = time.monotonic(), int(count or args.count or 0)
            text, good = getattr(soak, part)(
                *([count] if count and part in ("flips", "terms", "kills", "beside", "mixed") else [])
            )
            bad += not good
            print(
                f"{'passed' if good else 'FAILED'} {part} in {time.monotonic() - began:.0f} s, {soak.lives} lives so "
                f"far: {text}",
                flush=True,
            )
    if not args.parts:
        bad += subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "tests/test_launch.py",
                "tests/test_faults.py",
                "tests/test_repository.py",
                "tests/test_train.py",
                "tests/test_pipeline.py",
            ],
            cwd=ROOT,
            env={**os.environ, "PROXY_SFT_SOAK": "1"},
        ).returncode
    return int(bool(bad))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
