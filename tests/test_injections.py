"""What an outsider injects: made-up pickles, renamed and foreign checkpoints, refused starts, broken weights, secrets,
garbage, full disks, long lines."""
import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainings import ROOT, run_training

from proxy_sft.core import atomic_folders, build_once, locks, stop_requests
from proxy_sft.core.settings import load_settings, SettingsError
from proxy_sft.launch import files, launcher, parameters, processes, ranks, worker
from proxy_sft.tokens import caches, preparation
from proxy_sft.training import checkpoint_writer, checkpoints, run

sys.path.insert(0, str(ROOT / "tools"))
from soak import digest  # noqa: E402

FACTS = checkpoints.checkpoint_facts(load_settings("demo"), "key", 1)
TINY = dict(profile="demo", demo_rows=200, max_train_samples=64, max_eval_samples=4, max_length=512, logging_steps=1,
            save_steps=2, eval_steps=3, max_steps=4, num_proc=1, report_to=[], preflight="warn",
            control_token_turns=2)


def torch_file(path: Path, pickled: bytes) -> None:
    "A file as `torch.save` writes it, with any pickle inside."
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive: kept = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in kept.items(): archive.writestr(name, pickled if name.endswith("data.pkl") else content)


def make(folder: Path, names=("rng_state.pth",), step=None, **facts) -> Path:
    aside = folder.with_name(".aside")
    aside.mkdir(parents=True)
    for name in names: torch.save({"cpu": torch.get_rng_state()}, aside / name)
    atomic_folders.publish(
        aside, folder, {**FACTS, **facts, "step": int(folder.name.rpartition("-")[2]) if step is None else step}
    )
    return folder


# ---- pickles

def act(module: str, name: str) -> bytes: # GLOBAL and REDUCE
    argument = b"touch CANARY"
    return f"\x80\x02c{module}\n{name}\n(".encode("latin-1") + b"X" + len(argument).to_bytes(4,
            "little") + argument + b"tR."


@pytest.mark.parametrize("module, name", [
    ("deepspeed.runtime.config", "os.system"), ("deepspeed.runtime.zero.config", "sys.exit"), ("torch", "os.system"),
    ("os", "system"),
    ("numpy", "os.system"), ("builtins", "eval"), ("deepspeed.runtime.config", "DeepSpeedConfig"), ("", "os.system")])
def test_no_name_outside_the_list_is_loaded(tmp_path, module, name):
    torch_file(tmp_path / "optimizer.pt", act(module, name))
    with pytest.raises(checkpoints.CheckpointError, match="would load|cannot be read without running it"):
        checkpoints.refuse_acting_pickles(tmp_path)
    with checkpoints.weights_only(), pytest.raises(Exception, match="[Ww]eights.only|Unsupported|GLOBAL"):
        torch.load(tmp_path / "optimizer.pt", weights_only=False)
    assert not Path("CANARY").exists()


class Acting:
    def __reduce__(self): return os.system, ("touch CANARY",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scaler.pt",
                                   "pytorch_model.bin", "odd.name", "global_step4/x.pt", "no-ending"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5]) # 4 and 5 write STACK_GLOBAL
def test_every_file_that_might_be_unpickled_is_looked_at_whatever_its_name(tmp_path, name, protocol):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for write in (lambda: path.write_bytes(pickle.dumps(Acting(), protocol)),
                  lambda: torch_file(path, pickle.dumps(Acting(), protocol))):
        write()
        with pytest.raises(checkpoints.CheckpointError): checkpoints.refuse_acting_pickles(tmp_path)
    assert not Path("CANARY").exists()


# ---- which checkpoint

def test_a_checkpoint_is_known_by_its_manifest_and_not_by_its_name(tmp_path):
    settings = load_settings("demo", output_dir=str(tmp_path))
    for step in (2, 4): make(tmp_path / f"checkpoint-{step}")
    assert checkpoints.checkpoint_to_resume(settings, FACTS).name == "checkpoint-4"
    for name in ("checkpoint-8", "checkpoint-1", "checkpoint-04"):
        os.rename(tmp_path / "checkpoint-4", tmp_path / name)
        with pytest.raises(checkpoints.CheckpointError, match=f"{name} holds step 4"):
            checkpoints.checkpoint_to_resume(settings, FACTS)
        os.rename(tmp_path / name, tmp_path / "checkpoint-4")


@pytest.mark.parametrize("kind", ["checkpoint-8", "weights-8", "final"])
def test_what_is_complete_beyond_the_step_that_is_gone_on_from_is_refused(tmp_path, kind):
    run_dir, other = tmp_path / "oa", make(tmp_path / "ob" / "checkpoint-4")
    settings = load_settings("demo", output_dir=str(run_dir), resume=str(other))
    foreign = {"settings": {**FACTS["settings"], "learning_rate": 1e-5}}
    last = make(tmp_path / "elsewhere" / "checkpoint-8", **foreign)
    run_dir.mkdir()
    if kind == "final": checkpoint_writer.publish_final(last, run_dir)
    else: make(run_dir / kind, **foreign)
    with pytest.raises(checkpoints.CheckpointError, match="of step 8 and another training, and this start would go on "
                                                          "from step 4"):
        checkpoints.checkpoint_to_resume(settings, FACTS)


def contents(folder: Path) -> dict:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def test_a_refused_start_changes_nothing_and_a_renamed_checkpoint_is_not_published(tmp_path):
    first = run_training(**TINY, workspace=str(tmp_path), run_name="r")
    assert first.returncode == 0, first.stderr
    run_dir = tmp_path / "runs" / "r"
    before = contents(run_dir)
    assert atomic_folders.verify(run_dir / "checkpoint-4")["step"] == 4
    for more in (dict(learning_rate=1e-5), dict(learning_rate=1e-5, resume=str(run_dir / "checkpoint-2")),
                 dict(max_steps=8)):
        refused = run_training(**{**TINY, **more}, workspace=str(tmp_path), run_name="r")
        assert refused.returncode == 1 and "CheckpointError" in refused.stderr, refused.stderr
        assert contents(run_dir) == before
    os.rename(run_dir / "checkpoint-4", run_dir / "checkpoint-6")
    assert "holds step 4" in run_training(**TINY, workspace=str(tmp_path), run_name="r").stderr
    os.rename(run_dir / "checkpoint-6", run_dir / "checkpoint-4")
    # a card that somebody edits belongs to the final model alone, and stays when the model is published again
    for card in (run_dir / "README.md", run_dir / "checkpoint-4" / "README.md"):
        card.write_text(card.read_text() + "my notes\n")
    again = run_training(**TINY, workspace=str(tmp_path), run_name="r")
    assert again.returncode == 0 and "README.md has" in again.stderr, again.stderr
    assert "my notes" in (run_dir / "README.md").read_text() and atomic_folders.is_complete(run_dir)
    (run_dir / "config.json").write_text("{}")
    assert json.loads((run_dir / "checkpoint-4" / "config.json").read_text()) # nor does any other text share its bytes
    require_that_a_broken_checkpoint_is_named(run_dir, tmp_path)


def test_a_final_model_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    "Every file that is no link and every folder, however deep, before the marker."
    names = ("model.safetensors", "global_step4/a_optim_states.pt", "global_step4_universal/zero/x/fp32.pt",
             "config.json", "global_step4_universal/notes.json")
    aside, run_dir, flushed = tmp_path / "run" / ".saving", tmp_path / "run", []
    for name in names:
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).write_bytes(b"{}")
    atomic_folders.publish(aside, run_dir / "checkpoint-4", {**FACTS, "step": 4})
    usual = os.fsync
    def noted(handle):
        flushed.append(os.fstat(handle).st_ino)
        return usual(handle)
    monkeypatch.setattr(os, "fsync", noted)
    checkpoint_writer.publish_final(run_dir / "checkpoint-4", run_dir)
    before = set(flushed[:flushed.index((run_dir / "COMPLETE").stat().st_ino)])
    ours = [run_dir, *(p for top in names for p in [run_dir / top, *(run_dir / top).parents] if run_dir in p.parents)]
    linked = {p.stat().st_ino for p in (run_dir / "checkpoint-4").rglob("*") if p.is_file()} # flushed by its save
    assert not [p for p in ours if p.stat().st_ino not in before | linked]


@contextlib.contextmanager
def as_another_user(): # where we are root; else nothing is to be seen
    if os.geteuid(): pytest.skip("only root can become another user")
    os.seteuid(65534)
    try: yield
    finally: os.seteuid(0)


def test_what_may_not_be_read_or_written_is_said_in_a_sentence(tmp_path):
    folder = make(tmp_path / "checkpoint-4")
    (tmp_path / "file").touch()
    with pytest.raises(build_once.BuildFailedError, match="file cannot be written"):
        with build_once.one_at_a_time(tmp_path / "file" / ".claim"): pass
    tmp_path.chmod(0)
    with as_another_user():
        with pytest.raises(atomic_folders.AtomicFolderError, match="checkpoint-4 cannot be read"):
            atomic_folders.is_complete(folder)
        assert stop_requests.stop_reason(tmp_path) == ""


def test_a_checkpoint_that_was_moved_away_and_linked_stays_whole_where_it_is(tmp_path):
    for step in (2, 4): make(tmp_path / f"checkpoint-{step}")
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(tmp_path / "checkpoint-2", tmp_path / "elsewhere" / "checkpoint-2")
    (tmp_path / "checkpoint-2").symlink_to(moved)
    assert checkpoints.prune(tmp_path, 1) == ["checkpoint-2"] and atomic_folders.verify(moved)["step"] == 2
    (tmp_path / ".saving").write_text("a file in the folder's place")
    (tmp_path / "checkpoint-6").symlink_to("nowhere")
    checkpoints.sweep(tmp_path)
    assert make(tmp_path / "checkpoint-6").is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6", "elsewhere"]


@pytest.mark.parametrize("state", ["NaN", "[" * 100_000, "{}", '{"global_step": "4", "max_steps": 8}',
                                   '{"global_step": 3, "max_steps": 8}', '{"global_step": 4, "max_steps": 4}'])
def test_a_trainer_state_that_does_not_fit_is_refused(tmp_path, state):
    aside = tmp_path / ".aside"
    aside.mkdir()
    (aside / "trainer_state.json").write_text(state)
    facts = {**FACTS, "settings": {**FACTS["settings"], "max_steps": 8}}
    atomic_folders.publish(aside, tmp_path / "checkpoint-4", {**facts, "step": 4})
    with pytest.raises(checkpoints.CheckpointError, match="trainer_state.json"):
        run.is_finished(tmp_path / "checkpoint-4")


# ---- broken weights

def spoil_weights(settings) -> None: # an `act`: NaN in a weight, none in any gradient
    from proxy_sft.train import train
    from proxy_sft.training.checkpoint_writer import StopOnRequest
    usual = StopOnRequest.on_step_end
    def on_step_end(self, args, state, control, model=None, **more):
        if state.global_step == 2:
            with torch.no_grad(): model.lm_head.weight[3, 3] = float("nan")
        return usual(self, args, state, control, **more)
    StopOnRequest.on_step_end = on_step_end
    train(settings)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    done = run_training(act=spoil_weights, **TINY, workspace=str(tmp_path), run_name="r")
    assert done.returncode == 1 and "checkpoint-2 would hold NaN or Inf in" in done.stderr, done.stderr
    assert not atomic_folders.complete_checkpoints(tmp_path / "runs" / "r")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_one_broken_number_anywhere_is_seen(value, kind):
    model = torch.nn.Linear(300, 200).to(kind)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters(): p.grad = torch.full_like(p, 0.01)
    optimizer.step()
    with torch.no_grad(): model.weight[0, :2] = torch.finfo(kind).max # a sum that overflows is no broken number
    assert checkpoint_writer.broken_tensor(model, optimizer) == ""
    for tensor, name in ((model.bias, "bias"), (optimizer.state[model.weight]["exp_avg_sq"],
                                                "the optimizer's exp_avg_sq of parameter 0")):
        with torch.no_grad(): before, tensor.view(-1)[-1] = tensor.view(-1)[-1].clone(), value
        assert checkpoint_writer.broken_tensor(model, optimizer) == name
        with torch.no_grad(): tensor.view(-1)[-1] = before


def broken_copy(checkpoint: Path, target: Path, file: str) -> None:
    "The same checkpoint, whole and with its manifest, with one number that is none."
    aside = target.with_name(".aside")
    shutil.copytree(checkpoint, aside)
    facts = {k: v for k, v in json.loads((aside / "manifest.json").read_text()).items() if k != "files"}
    for name in ("manifest.json", "COMPLETE"): (aside / name).unlink()
    if file == "model.safetensors":
        tensors = load_file(aside / file)
        tensors["model.norm.weight"][0] = float("nan")
        save_file(tensors, aside / file, metadata={"format": "pt"})
    else:
        states = torch.load(aside / file, weights_only=True)
        states["state"][0]["exp_avg"].view(-1)[0] = float("inf")
        torch.save(states, aside / file)
    atomic_folders.publish(aside, target, facts)


def require_that_a_broken_checkpoint_is_named(run_dir: Path, workspace: Path) -> None:
    "Of a finished run: an older version may have saved it, or somebody else."
    for file, what in (("model.safetensors", r"model\.norm\.weight"), ("optimizer.pt", "the optimizer's exp_avg")):
        other = run_dir.with_name(file)
        other.mkdir()
        broken_copy(run_dir / "checkpoint-2", other / "checkpoint-2", file)
        refused = run_training(**TINY, workspace=str(workspace), run_name=other.name)
        assert refused.returncode == 1, refused.stderr
        assert re.search(f"checkpoint-2 is broken: it holds NaN or Inf in {what}.* Move it away", refused.stderr)


# ---- a stop at an evaluation

def stop_at_an_evaluation(settings, hook: str) -> None:
    "The training hears SIGUSR1 at step 3, where an evaluation is due: before it begins, or at its first batch."
    from proxy_sft.train import train
    from proxy_sft.training.checkpoint_writer import StopOnRequest
    usual = getattr(StopOnRequest, hook)
    def heard(self, args, state, control, **more):
        if state.global_step == 3: os.kill(os.getpid(), signal.SIGUSR1)
        return usual(self, args, state, control, **more)
    setattr(StopOnRequest, hook, heard)
    train(settings)


def stop_before_it(settings): stop_at_an_evaluation(settings, "on_step_end")  # an `act`


def stop_in_it(settings): stop_at_an_evaluation(settings, "on_prediction_step")  # an `act`


def last_state(run_dir: Path) -> tuple: # weights, optimizer, random states; every loss of training and evaluation
    folder = run_dir / "checkpoint-4"
    names = ("loss", "grad_norm", "eval_loss", "eval_mean_token_accuracy")
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return digest(folder), sorted((r["step"], n, r[n]) for r in log for n in names if n in r)


def test_a_stop_at_an_evaluation_loses_nothing(tmp_path):
    assert run_training(**TINY, workspace=str(tmp_path), run_name="straight").returncode == 0
    straight = last_state(tmp_path / "runs" / "straight")
    assert {step for step, name, _ in straight[1] if name == "eval_loss"} >= {3}, straight[1]
    for act in (stop_before_it, stop_in_it):
        given = dict(**TINY, workspace=str(tmp_path), run_name=act.__name__)
        stopped = run_training(act=act, **given)
        run_dir = tmp_path / "runs" / act.__name__
        assert "Stopped" in stopped.stderr and atomic_folders.complete_checkpoints(run_dir)[-1].name == "checkpoint-3"
        went_on = run_training(**given)
        assert went_on.returncode == 0, went_on.stderr
        assert last_state(run_dir) == straight


# ---- secrets and terminals

@pytest.mark.parametrize("name, value, shown", [
    ("GITHUB_PAT", "a1b2c3d4e5f6", "a1b2c3d4e5f6"), ("DATABASE_URL", "postgres://me:s3cr3t-pw@db/x", "s3cr3t-pw"),
    ("SSH_PRIVATE_KEY", "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n-----END OPENSSH PRIVATE "
                        "KEY-----", "b3BlbnNzaC1rZXktdjEAAAAA"),
    ("MODE", "ghp_0123456789abcdefghijABCDEFGHIJ012345", "ghp_0123456789abcdefghijABCDEFGHIJ012345"),
    ("DB_PASSWORD", 'quo"te\\d-pw', 'quo"te\\d-pw'),
    ("BROKER", "amqp://u:longpassword@h", "longpassword"), ("PASSWORD", "metadata", "metadata"),
    ("API_TOKEN", "no\udcffutf\udcfe8-1", "no\udcffutf\udcfe8-1"), ("API_TOKEN", "a<b&c d/e+f", "a%3Cb%26c+d%2Fe%2Bf"),
    ("API_TOKEN", "a<b&c d/e+f", "a%3Cb%26c%20d/e%2Bf"),
    ("API_TOKEN", "a<b&c d/e+f", "a&lt;b&amp;c d/e+f")])
def test_secrets_are_hidden_in_outputs_and_nowhere_else(tmp_path, name, value, shown):
    outputs = [{"output_type": "stream", "name": "stdout", "text": [f"it is {shown}\n", "and more"]},
               {"output_type": "error", "ename": "E", "evalue": shown, "traceback": [f"E: {shown}"]},
               {"output_type": "display_data", "metadata": {},
                "data": {"text/html": f"<b>{shown}</b>", "application/json": {"metadata": [shown]}}}]
    notebook = {"cells": [{"cell_type": "code", "metadata": {"tags": []}, "source": ["metadata = {}"],
                           "outputs": outputs}], "metadata": {}}
    files.AtomicNotebooks(files.secrets_of({name: value})).write(json.dumps(notebook), str(tmp_path / "a.ipynb"))
    found = json.loads((tmp_path / "a.ipynb").read_text())
    assert shown not in json.dumps(found["cells"][0]["outputs"]).replace('"metadata": ',
            "") and json.dumps(shown)[1:-1] not in str(found["cells"][0]["outputs"][0])
    assert (
        found["cells"][0]["source"] == ["metadata = {}"] and set(found) == set(notebook) and "***" in json.dumps(found)
    )
    log = files.LiveLog(tmp_path / "log", secrets=files.secrets_of({name: value}))
    for piece in ("x" * 20_000, shown[:5], shown[5:], "\x1b[2Jy" * 20_000, "\n"): log.write(piece)
    log.close()
    text = (tmp_path / "log").read_text()
    assert shown not in text and "\x1b" not in text


def test_a_secret_by_its_shape_is_hidden_in_keys_and_metadata_too():
    token = "hf_" + "a" * 20
    output = {"output_type": "display_data", "metadata": {"text/plain": {"of": token}},
              "data": {"application/json": {token: 1, "metadata": {"of": token}}}}
    assert token not in json.dumps(files.redact_outputs({"cells": [{"outputs": [output]}]}, [token]))


def test_no_escape_reaches_the_terminal(capsys):
    stop_requests.log_line("a\x1b[2Jb\x9b1mc\x07\x1b]0;t\x07\rd")
    failure = dict(rank=0, host="h\x1b[31m", cell=1, notebook="n", ename="E", evalue="\x1b[2J", traceback="")
    stop_requests.log_line(worker.failure_words(failure))
    said = capsys.readouterr().err
    assert not set(said) & {"\x1b", "\x9b", "\x07", "\r"} and said.startswith("ab1mc]0;td\n")


@pytest.mark.parametrize("name", ["..", ".", "../../x", "a/../../b", "/abs", "./", "a\x1b[2Jb", "a\nb"])
def test_a_run_s_name_stays_in_runs(name):
    with pytest.raises(SettingsError, match="run_name"): load_settings("demo", run_name=name)


# ---- garbage

GARBAGE = [b"", b"null", b"[1]", b'"x"', b"\xff\xfe\x00", b"[" * 100_000, b"{}", b'{"rank": 0}',
           b'{"rank": "0", "state": [], "host": 1}',
           b'{"rank": 0, "state": "running", "host": "h", "pid": 1, "heartbeat": 1e400}', b"<html>"]


@pytest.mark.parametrize("garbage", [*GARBAGE, None], ids=range(len(GARBAGE) + 1)) # None: a folder in the file's place
def test_garbage_in_states_and_failures_blocks_no_start_and_hides_no_cause(tmp_path, garbage):
    folder = parameters.RunFolder(tmp_path)
    folder.make()
    for path in (folder.status(0), folder.failure_file, tmp_path / "prepare-0.json"):
        path.mkdir() if garbage is None else path.write_bytes(garbage)
    assert folder.statuses() == [] and build_once.read_record(tmp_path / "prepare-0.json") == {}
    failure = dict(rank=1, attempt=0, time=2e9, ename="ValueError", evalue="boom", traceback="")
    assert ranks.claim_failure(folder, failure, 1.0)["evalue"] == "boom" == ranks.read_failure(folder, 0, 1.0)["evalue"]
    import argparse
    parser = argparse.ArgumentParser()
    launcher.add_run_arguments(parser)
    launcher.refuse_second_run(parser.parse_args(["nb"]), folder).release()
    assert not folder.status(0).exists() and not folder.failure_file.exists()


def in_a_fork(act) -> int: # exit code; an audit hook stays for the rest of a process
    pid = os.fork()
    if pid == 0:
        code = 1
        try: code = int(not act())
        finally: os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("sweep", ["prune_caches", "remove_abandoned"])
@pytest.mark.parametrize("ended", [False, True]) # whether its claim was given up at the same moment
def test_a_sweep_that_meets_a_builder_between_rename_and_release(tmp_path, sweep, ended):
    "The builder marks its folder at the moment in which the sweep begins to look whether somebody holds it."
    settings = load_settings("demo", workspace=str(tmp_path))
    folder = settings.prepared_dir / ("a" * 20)
    folder.mkdir(parents=True)
    atomic_folders.write_manifest(folder, {})
    claim = preparation.claim_of(folder)
    claim.write_text("process 1 on elsewhere\n")
    def act():
        def finish(event, given):
            if event != "open" or str(given[0]) != str(claim) or atomic_folders.is_complete(folder): return
            atomic_folders.mark_complete(folder)
            if ended: claim.unlink()
        sys.addaudithook(finish)
        found = caches.prune_caches(settings) if sweep == "prune_caches" else preparation.remove_abandoned(
            settings.prepared_dir)
        return found == [] and atomic_folders.is_complete(folder)
    assert in_a_fork(act) == 0


# ---- long lines, full disks, ranks that stand still

LINES = """
from proxy_sft.launch.files import join_stream, LiveLog
import sys
for pieces in (["y" * 50_000_000], ["y" * 8192] * 6000, ["short line\\n" * 800] * 6000,
                   ["\\rstep"] * 20_000, ["\\x1b[0" * 4000] * 2000):
    log, text = LiveLog(__import__("pathlib").Path(sys.argv[1])), ""
    for piece in pieces:
        log.write(piece)
        text = join_stream(text, piece)
    assert len(text) < 210_000
    log.close()
"""


def test_fifty_megabytes_in_long_and_short_lines_are_copied_and_no_more(tmp_path):
    "What is quadratic in a line's length takes hours for this; the limit is only an end for that."
    subprocess.run([sys.executable, "-c", LINES, str(tmp_path / "log")], check=True, timeout=600)


def test_what_cannot_be_written_is_reported_in_memory(tmp_path, monkeypatch):
    reports = processes.Reports()
    monkeypatch.setenv("PROXY_SFT_REPORTS", reports.path)
    status = ranks.RankStatus(tmp_path / "gone" / "rank-0.json", rank=0, cell=0, attempt=0, run="r", notebook="n",
                              world_size=1)
    status.update(
        state="failed",
        failure=dict(rank=0, attempt=0, time=1.0, ename="OSError", evalue="No space left on device", traceback=""),
    )
    found = [files.checked_record(one, files.STATE) for one in reports.read()]
    assert [s["state"] for s in found] == ["starting", "failed"] and found[-1]["failure"][
        "evalue"
    ] == "No space left on device"
    folder = parameters.RunFolder(tmp_path / "deleted")
    ranks.claim_failure(folder, dict(rank=0, attempt=0, time=1.0, ename="E", evalue="the first cause", traceback=""),
                        0.0)
    assert reports.read()[-1]["evalue"] == "the first cause"
    stop_requests.append_log(Path("/dev/full/logs/x"), "lost")
    log = files.LiveLog(Path("/dev/full"))
    log.write("lost\n")
    log.close()


def test_the_rank_that_holds_up_the_others_is_named():
    import time
    state = dict(rank=0, state="running", host="elsewhere", pid=7, heartbeat=time.time(), step=40, unmoved=3600.0,
                 kernel_quiet=0.4)
    assert worker.who_stalls([state, {**state, "rank": 1, "kernel_quiet": 3601.0}], time.time())[0]["rank"] == 1
    assert worker.who_stalls([state, {**state, "rank": 2, "step": 39}], time.time())[0]["rank"] == 2


# ---- disks whose locks end at each machine

def test_a_builder_on_another_machine_is_waited_for_while_it_lives(tmp_path, monkeypatch):
    "The lock's file has lost its name: a second process locks another file, as on a disk without common locks."
    monkeypatch.setattr(locks, "SILENCE", 2.0)
    path, done = tmp_path / ".claim-x", tmp_path / "x"
    code = ("from pathlib import Path; from proxy_sft.core import locks; locks.SILENCE = 2.0; "
            "from proxy_sft.core.build_once import Claim; claim = Claim(Path({path!r})); assert claim.acquire(); "
            "print('builds', flush=True); input(); claim.release()").format(path=str(path))
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "builds\n"
    path.unlink()
    looks = []
    def is_done():
        looks.append(done.exists())
        if len(looks) == 20: done.touch() # far beyond the silence after which a dead owner's lease would end
        return looks[-1]
    assert build_once.claim_or_wait(path, is_done, every=0.2) is None and len(looks) == 21
    owner.communicate("\n")
    assert not [*tmp_path.glob(".claim-*")]


LEASE = "filelock/2\npid=7\nhost=node-7\nmode=lease\ntoken=d42f8b42588a9def5a78e7bc76be61c8\nduration=2.0\nstart=1\n"


@pytest.mark.parametrize("left", [LEASE, "", "\x00garbage", LEASE[:40], LEASE.replace("node-7", "")])
def test_what_a_dead_owner_on_another_machine_left_holds_nobody_up_for_long(tmp_path, monkeypatch, left):
    monkeypatch.setattr(locks, "SILENCE", 2.0)
    path = tmp_path / ".claim-x"
    path.with_name(".claim-x.lease").write_text(left)
    path.write_text("process 7 on node-7, since yesterday\n")
    claim = build_once.claim_or_wait(path, lambda: False)
    assert not build_once.Claim(path).acquire()
    claim.release()
    path.with_name(".claim-x.lease").write_text(left)
    with locks.RunLock(path).take(patience=0): assert not locks.Lock(path).acquire()


def test_a_killed_owner_holds_nobody_up_though_its_parent_has_not_looked_yet(tmp_path):
    path = tmp_path / "lock"
    code = f"from proxy_sft.core.locks import Lock; from pathlib import Path; lock = Lock(Path({str(path)!r})); " \
           "assert lock.acquire(); print('held', flush=True); input()"
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n" and not locks.Lock(path).acquire()
    owner.kill()
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT) # it is dead, and stays what the system calls a zombie
    assert locks.Lock(path).acquire(patience=60)
    owner.communicate()


def test_a_lock_on_a_full_disk_is_held_without_words_and_without_a_lease(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with open(tmp_path / "ballast", "wb", buffering=0) as file, pytest.raises(OSError):
            while True: file.write(b"x" * 4096)
        claim = build_once.claim_or_wait(tmp_path / ".claim-x", lambda: False)
        claim.update("rows")
        assert not build_once.Claim(tmp_path / ".claim-x").acquire()
        claim.release()
        assert not [*tmp_path.glob(".claim-*")]
    finally: subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_of_two_that_built_the_same_the_second_takes_what_the_first_published(tmp_path):
    "A machine whose lease ended while it stood still finds the folder complete when it comes to publish its own."
    done = run_training(act=publish_after_another, profile="demo", workspace=str(tmp_path), demo_rows=200, num_proc=1,
                        max_train_samples=64, max_eval_samples=4, max_length=512, control_token_turns=2)
    assert done.returncode == 0, done.stderr
    assert len([*(tmp_path / "prepared").rglob("COMPLETE")]) == 1 and not [*(tmp_path / "prepared").glob(".*")]


def publish_after_another(settings) -> None: # an `act`
    from proxy_sft.pipeline import ensure_prepared
    usual, began = preparation.build_splits, []
    def build_splits(given, sources, aside, *more, **named):
        splits = usual(given, sources, aside, *more, **named)
        began.append(aside)
        if len(began) == 1: # the other machine does all of it meanwhile; its claim is another file
            preparation.claim_of(settings.prepared_dir / aside.name.split("-")[1]).unlink()
            next(settings.prepared_dir.glob(".claim-*.lease")).unlink()
            preparation.build(given)
        return splits
    preparation.build_splits = build_splits
    assert ensure_prepared(settings).folder.is_dir() and len(began) == 2


# ---- manifests that somebody edited, with markers that fit

def places(value, path=()): # of every value in a JSON value
    for key in value if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def test_an_edited_manifest_is_refused_in_plain_words_or_changes_nothing(tmp_path):
    settings = load_settings("demo", output_dir=str(tmp_path))
    for step in (2, 4): make(tmp_path / f"checkpoint-{step}")
    newest, tried = tmp_path / "checkpoint-4", 0
    whole = json.loads((newest / "manifest.json").read_text())
    # shown at most, compared nowhere
    free = [p for p in places(whole) if p[0] in ("python", "versions", "machine", "commit")]
    where = [p for p in places(whole) if p not in free and (p[0] != "settings" or p[-1] in ("batch_size", "settings"))]
    for place in where:
        for value in (None, [], {}, "", "x", -1, 1.5, True, 10**400, float("nan"), "left out"):
            edited = inner = json.loads(json.dumps(whole))
            for key in place[:-1]: inner = inner[key]
            inner[place[-1]] = value
            if value == "left out": del inner[place[-1]]
            if edited == whole: continue # True for 1
            (newest / "manifest.json").write_text(json.dumps(edited))
            atomic_folders.mark_complete(newest)
            with pytest.raises((checkpoints.CheckpointError, atomic_folders.AtomicFolderError)):
                checkpoints.checkpoint_to_resume(settings, FACTS)
            try: checkpoints.lost_checkpoints_message({"checkpoint-9": ""}, settings)
            except atomic_folders.AtomicFolderError: pass
            try: checkpoints.expected_bytes(tmp_path, 5, "adamw", False, 4)
            except atomic_folders.AtomicFolderError: pass
            tried += 1
    assert tried > 90
