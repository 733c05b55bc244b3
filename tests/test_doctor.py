"""What the doctor says beforehand: every setting that the training would refuse later, and its first line at once."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from transformers import AutoTokenizer

from proxy_sft import commands
from proxy_sft.core.settings import load_settings
from proxy_sft.evaluation.predictions import prepare_questions
from proxy_sft.pipeline import ensure_inputs
from proxy_sft.train import train
from proxy_sft.training.cost import Shape
from proxy_sft.training.evaluation_time import Asked, evaluation_time, LAUNCHES, questions_of, usual_questions
from proxy_sft.training.step_model import Rates

PROGRAM = str(Path(sys.executable).parent / "proxy-sft")
WRONG = {  # what is given -> what the doctor has to name
    ("report_to", "tensorbord"): "tensorbord", ("report_to", "swanlab"): "not installed",
    ("lora_targets", "q_porj"): "q_porj", ("attention", "flash_attn_2"): "flash_attn_2",
    ("attention", "flash_attention_3"): "not installed", ("resume", "nowhere/checkpoint-3"): "does not exist",
    ("template", "nothnk"): "nothnk", ("template", "missing.jinja"): "missing.jinja",
    ("dataset", "/nowhere/other.jsonl"): "/nowhere/other.jsonl", ("optimizer", "adamw_bf16"): "torchao",
}


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory):
    from proxy_sft.demo.model import write_demo_model
    folder = tmp_path_factory.mktemp("demo") / "model"
    write_demo_model(folder, n=200)
    return folder


@pytest.mark.parametrize("given", WRONG)
def test_what_the_training_would_refuse_is_said_beforehand(given, demo_model, tmp_path, capsys):
    name, value = given
    if name == "optimizer" and commands_know("torchao"): pytest.skip("torchao is installed")
    if value == "swanlab" and commands_know("swanlab"): pytest.skip("swanlab is installed")
    words = ["doctor", "-p", "profile", "demo", "-p", "model", str(demo_model), "-p", "workspace", str(tmp_path),
             "-p", "lora_rank", "4", "-p", name, value]
    code, shown = commands.main(words), capsys.readouterr().out
    text = " ".join(shown.split())
    assert WRONG[given] in text and "Cannot start" in text, text
    assert code == 1
    assert not list(tmp_path.iterdir()), "the doctor writes nothing"


@pytest.mark.parametrize("name, value, said", [
    ("lora_targets", "q_porj", "lora_rank is null"), ("model", "/nowhere/model", "holds no model"),
    ("data", "[{dataset: demo, share: 0.5}, {dataset: /nowhere/other.jsonl, share: 0.5}]", "/nowhere/other.jsonl")])
def test_what_no_command_would_mend_is_no_warning(name, value, said, tmp_path, capsys):
    "A path that leads nowhere, and a setting that would do nothing."
    words = ["-p", "profile", "demo", "-p", "workspace", str(tmp_path), "-y", f"{name}: {value}"]
    code = commands.main(["doctor", *words])
    text = " ".join(capsys.readouterr().out.split())
    assert code == 1 and said in text and "Cannot start" in text, text


@pytest.mark.parametrize("place, said", [("/proc/nowhere", "no folder that can be written"), ("{}", "has space for")])
def test_where_saves_go_is_looked_at_before_the_model_is_there(place, said, tmp_path, capsys):
    words = ["-p", "profile", "demo", "-p", "workspace", str(tmp_path), "-p", "save_through", place.format(tmp_path)]
    commands.main(["doctor", *words])
    assert said in " ".join(capsys.readouterr().out.split())


def commands_know(package: str) -> bool:
    from importlib.util import find_spec
    return find_spec(package) is not None


def test_training_refuses_before_anything_is_prepared(demo_model, tmp_path):
    settings = load_settings("demo", model=str(demo_model), workspace=str(tmp_path), report_to=["tensorbord"])
    with pytest.raises(RuntimeError, match=r"Did you mean\s+'tensorboard'"): train(settings)
    assert not (tmp_path / "prepared").exists() and not (tmp_path / "converted").exists()


def test_a_rank_alone_says_its_errors_and_ranks_beside_it_do_not():
    beside = {"RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
    for environment, heard in (({"RANK": "1"}, True), ({"RANK": "x"}, True), (beside, False)):
        done = subprocess.run([PROGRAM, "doctor", "-p", "profil", "demo"], capture_output=True, text=True,
                              env={**os.environ, **environment})
        assert done.returncode == 2 and ("profil" in done.stderr) == heard, done.stderr


def test_the_first_line_comes_before_pytorch_is_loaded(tmp_path):
    script = ("import sys, proxy_sft.training.doctor_command as c\n"
              "assert 'torch' not in sys.modules and 'transformers' not in sys.modules")
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_hours_and_memory_on_a_named_card(capsys, tmp_path):
    words = ["doctor", "-p", "profile", "qwen3_8b_8gpu", "-p", "workspace", str(tmp_path)]
    assert commands.main([*words, "--gpu", "h200"]) in (0, 1)
    text = " ".join(capsys.readouterr().out.split())
    assert "8 processes" in text and "hours" in text and not re.search(r"e\+\d", text) and "8 x H200" in text
    assert "evaluation Base and tuned model on turns of Dolci's usual length" in text and "minutes (reading" in text
    assert commands.main([*words, "--gpu", "h300"]) == 1
    assert "Known: A100, H100" in capsys.readouterr().err


def test_minutes_of_an_evaluation_are_those_of_its_parts_by_hand():
    "One layer, numbers that can be multiplied by eye; a rate of one operation, or one byte, a second."
    shape = Shape(layers=1, hidden=2, inner=1, heads=1, key_heads=1, head_dim=2, vocabulary=5, tied=True)
    assert shape.layer_matrices == 22 and shape.matrices == 32
    rates, asked = Rates(1, 1, 1, 1e9), Asked([3, 3], 2, [4], "here")
    found = evaluation_time(shape, rates, asked, batch_size=2)
    read = 2 * 22 * 3 + 2 * 2 * 3 * 3 + 2 * 2 * 5  # weights, causal scores, the head of the last token
    assert found.reading == 2 * 2 * read
    write = 2 * (2 * 32 + 4 * 2 * (3 + 1))  # a token of both answers, in the middle of writing
    assert found.writing == 2 * 2 * write  # two models, two tokens
    assert found.losses == 2 * (2 * 22 * 4 + 2 * 2 * 4 * 4 + 2 * 2 * 5 * 4)
    slow = evaluation_time(shape, Rates(1e18, 1, 1, 1), asked, batch_size=2)
    assert slow.writing == 2 * 2 * (2 * 32 + 2 * 2 * 2 * 2 * (3 + 1))  # bytes: weights, and keys and values of both
    assert evaluation_time(shape, Rates(1e18, 1, 1, 1e18), asked).writing == pytest.approx(2 * 2 * LAUNCHES)
    assert found.minutes == sum((found.reading, found.writing, found.losses, found.loading)) / 60


def test_what_is_asked_is_what_page_03_would_choose(tmp_path):
    settings = load_settings("demo", workspace=str(tmp_path), demo_rows=200, num_proc=1)
    assert questions_of(settings) == usual_questions()
    ensure_inputs(settings)
    asked, tokenizer = questions_of(settings, 20, 5), AutoTokenizer.from_pretrained(settings.model_dir)
    chosen, *_ = prepare_questions(settings, tokenizer, 20, 5, 1024, batching={})
    assert asked.prompts == list(map(len, chosen.prompts)) and asked.limit == chosen.limit < 1024
    assert len(asked.losses) == len(asked.prompts) + len(chosen.chats)
