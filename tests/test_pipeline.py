"""The whole way of a row, in processes of their own: one rank, two ranks with ZeRO-2, stops, faults, real tokenizer,
bad input."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from long_form import soak

from trainings import run_training, stopped_after_a_step

ROOT, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
SHARED = ROOT.parent / "shared"
PAPERMILL = [sys.executable, str(ROOT / "tools" / "patient_papermill.py")]
SMALL = dict(
    demo_rows=400,
    max_train_samples=200,
    max_eval_samples=6,
    max_length=640,
    logging_steps=1,
    save_steps=2,
    eval_steps=4,
    max_steps=4,
    num_proc=1,
    control_token_turns=2,
)


def run(*command, ok=True, timeout=3600, **environment):
    "A command of the environment, from the root; output and exit code."
    program = PAPERMILL if command[0] == "papermill" else [str(BIN / command[0])]
    done = subprocess.run(
        [*program, *map(str, command[1:])],
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=timeout,
        capture_output=True,
        text=True,
    )
    if ok: assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def parameters(**settings):
    "As papermill's command line takes them."
    return [word for name, value in settings.items() for word in ("-p", name, str(value))]


def train(ok=True, ranks=1, **settings):
    "The exported library, without notebooks."
    done = run_training(ranks, **{"profile": "demo", **SMALL, **settings})
    if ok: assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def losses(run_dir):
    log = json.loads((run_dir / "trainer_state.json").read_text())["log_history"]
    return [(r["step"], r["loss"]) for r in log if "loss" in r]


def weights(run_dir):
    return (run_dir / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    "One workspace with the demo's model, data, conversion and a finished run of four steps."
    folder = tmp_path_factory.mktemp("workspace")
    train(workspace=str(folder), run_name="straight")
    return folder


def test_final_model_is_the_last_checkpoint_and_generates(workspace):
    run_dir = workspace / "runs" / "straight"
    assert weights(run_dir) == weights(run_dir / "checkpoint-4")
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "trainer_state.json",
        "optimizer.pt",
        "README.md",
        "settings.yaml",
        "COMPLETE",
    ):
        assert (run_dir / name).is_file(), name
    stops = json.loads((run_dir / "generation_config.json").read_text())["eos_token_id"]
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; m, t = "
        "(c.from_pretrained(sys.argv[1]) for c in (M, T));"
        "x = t.apply_chat_template([{'role': 'user', 'content': 'hello'}], add_generation_prompt=True, "
        "return_tensors='pt', return_dict=True);"
        "print(m.generate(**x, max_new_tokens=4).shape[1] > x['input_ids'].shape[1], "
        "t.convert_tokens_to_ids('<|im_end|>'), '<think>' in t.chat_template)"
    )
    answer = run("python", "-c", code, run_dir).stdout.split()
    assert answer[0] == "True" and int(answer[1]) in stops and answer[2] == "False"


def test_a_stopped_run_goes_on_with_bitwise_the_same_training(workspace):
    run_dir = workspace / "runs" / "stopped"
    done = train(ok=False, act=stopped_after_a_step, workspace=str(workspace), run_name="stopped")
    assert done.returncode != 0 and "StopRequested" in done.stderr, done.stderr[-2000:]
    steps = [int(f.parent.name.rpartition("-")[2]) for f in run_dir.glob("checkpoint-*/COMPLETE")]
    assert steps and max(steps) < SMALL["max_steps"] and not (run_dir / "COMPLETE").exists()
    (run_dir / "STOP").unlink()
    train(workspace=str(workspace), run_name="stopped")
    assert weights(run_dir) == weights(workspace / "runs" / "straight")
    assert losses(run_dir) == losses(workspace / "runs" / "straight")


def test_two_ranks_with_zero2_give_the_same_losses_with_and_without_notebooks(workspace):
    train(ranks=2, workspace=str(workspace), run_name="library")
    secrets = dict(HF_TOKEN="hf_canary0123456789", WANDB_API_KEY="canary0123456789abcdef")
    done = run("proxy-sft", "run", "nbs/02_train.ipynb", "--nproc", 2,
               *parameters(profile="demo", workspace=workspace, run_name="notebooks", **SMALL), OMP_NUM_THREADS="1",
               **secrets)
    library, notebooks = workspace / "runs" / "library", workspace / "runs" / "notebooks"
    written = {p: p.read_bytes() for p in notebooks.rglob("*") if p.is_file()}  # a token is written nowhere
    assert {"rank-0.ipynb", "rank-0.log", "manifest.json", "README.md"} <= {p.name for p in written}
    assert not [p for p, held in written.items() if b"canary0123456789" in held]
    assert "canary0123456789" not in done.stdout + done.stderr
    assert losses(library) == losses(notebooks) and len(losses(library)) == 4
    assert weights(library) == weights(notebooks)
    assert {p.name for p in (notebooks / "notebooks").glob("*.ipynb")} == {"rank-0.ipynb", "rank-1.ipynb"}
    for rank, pictures in ((0, 1), (1, 0)):  # the live plot: one, replaced in place, on rank 0
        cells = json.loads((notebooks / "notebooks" / f"rank-{rank}.ipynb").read_text())["cells"]
        drawn = [o for c in cells if c["id"] == "run" for o in c["outputs"] if "image/png" in o.get("data", {})]
        assert len(drawn) == pictures and all(len(json.dumps(o)) < 5000 for o in drawn)
    manifest = json.loads((notebooks / "manifest.json").read_text())
    assert manifest["world_size"] == 2 and any("zero" in name for name in manifest["files"])


def test_other_settings_are_refused_with_what_differs(workspace):
    done = train(ok=False, workspace=str(workspace), run_name="straight", learning_rate=1e-5)
    assert done.returncode != 0 and "learning_rate: 0.0" in done.stderr and "another training" in done.stderr


def test_a_flipped_bit_in_a_checkpoint_is_found_before_it_is_unpickled(workspace):
    run_dir = workspace / "runs" / "straight"
    victim = run_dir / "checkpoint-4" / "optimizer.pt"
    whole = victim.read_bytes()
    broken = bytearray(whole)
    broken[len(broken) // 2] ^= 1
    victim.unlink()  # the final model holds a hard link to the good bytes
    victim.write_bytes(bytes(broken))
    try: done = train(ok=False, workspace=str(workspace), run_name="straight")
    finally: victim.write_bytes(whole)
    assert done.returncode != 0 and "optimizer.pt" in done.stderr and "other bytes" in done.stderr


def test_a_flipped_bit_in_prepared_tokens_is_found_before_step_one(workspace):
    victim = next((workspace / "prepared").glob("*/train.arrow"))
    whole = victim.read_bytes()
    broken = bytearray(whole)
    broken[len(broken) // 3] ^= 4
    victim.write_bytes(bytes(broken))
    try: done = train(ok=False, workspace=str(workspace), run_name="flipped")
    finally: victim.write_bytes(whole)
    assert (
        done.returncode != 0
        and "train.arrow" in done.stderr
        and not list((workspace / "runs" / "flipped").glob("checkpoint-*"))
    )


# the demo runs all pages from the root; a finished run is not trained again
@pytest.mark.parametrize("page, there", [("00_download", "elsewhere"), pytest.param("02_train", "nbs", marks=soak)])
def test_papermill_from_anywhere_as_from_the_root(workspace, tmp_path, page, there):
    given = parameters(profile="demo", workspace=workspace, run_name="straight", **SMALL)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    done = subprocess.run(
        [*PAPERMILL, str(ROOT / "nbs" / f"{page}.ipynb"), str(tmp_path / "out.ipynb"), "--no-progress-bar", *given],
        cwd=ROOT / "nbs" if there == "nbs" else folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not [*folder.iterdir()]


# the launcher and the settings have more of them; here papermill itself is asked
@pytest.mark.parametrize("given, words", [
    (dict(profile="demo", max_train_smaples=10), "Did you mean 'max_train_samples'?"),
    pytest.param(dict(profile="qwen3_8b", workspace="/nonexistent-workspace-of-a-test"), "nbs/00_download.ipynb",
                 marks=soak),
])
def test_bad_parameters_end_with_one_clear_error(tmp_path, given, words):
    done = run(
        "papermill", "nbs/02_train.ipynb", tmp_path / "out.ipynb", "--no-progress-bar", *parameters(**given), ok=False
    )
    assert done.returncode != 0 and words in done.stderr


def test_an_output_folder_that_cannot_be_written_is_named(workspace, tmp_path):
    (tmp_path / "file").touch()
    done = train(ok=False, workspace=str(workspace), output_dir=str(tmp_path / "file" / "run"))
    assert done.returncode != 0 and "Not a directory" in done.stderr and str(tmp_path / "file" / "run") in done.stderr


@soak
def test_real_tokenizer_config_and_rows_end_to_end(tmp_path):
    if not (SHARED / "qwen3-8b" / "tokenizer.json").is_file():
        pytest.skip("the real tokenizer is not here: ../shared/qwen3-8b")
    make = """
import json, shutil, sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
source, target = map(Path, sys.argv[1:])
target.mkdir()
for f in source.iterdir(): shutil.copyfile(f, target / f.name)
config = AutoConfig.from_pretrained(target)
config.num_hidden_layers, config.hidden_size, config.intermediate_size = 2, 64, 64
config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
config.layer_types = ["full_attention"] * 2
torch.manual_seed(0)
AutoModelForCausalLM.from_config(config).save_pretrained(target)
for f in ("tokenizer_config.json", "generation_config.json"): shutil.copyfile(source / f, target / f)
"""
    run("python", "-c", make, SHARED / "qwen3-8b", tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(
        b"".join((SHARED / "dolci" / f"{n}_rows.jsonl").read_bytes().rstrip(b"\n") + b"\n" for n in ("real", "bfcl"))
    )
    given = parameters(profile="demo", workspace=tmp_path / "ws", model=tmp_path / "model", dataset=rows)
    run("papermill", "nbs/01_convert.ipynb", tmp_path / "01.ipynb", "--no-progress-bar", *given)
    run(
        "papermill",
        "nbs/02_train.ipynb",
        tmp_path / "02.ipynb",
        "--no-progress-bar",
        *given,
        *parameters(
            **{
                **SMALL,
                "run_name": "real",
                "max_length": 768,
                "max_steps": 2,
                "max_train_samples": 12,
                "max_eval_samples": 1,
                "control_token_turns": 1,
            }
        ),
    )
    run_dir = tmp_path / "ws" / "runs" / "real"
    assert (run_dir / "COMPLETE").is_file() and len(losses(run_dir)) == 2
    parity = json.loads(next((tmp_path / "ws" / "prepared").glob("*/parity.json")).read_text())
    assert parity["passed"], parity["verdict"]
