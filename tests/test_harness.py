"""Tasks of lm-eval on two planted models: one always says A, the other always B, so every score is known beforehand."""
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from proxy_sft.chat.saving import save_chat_files
from proxy_sft.core.settings import load_settings
from proxy_sft.demo.model import write_demo_model
from proxy_sft.evaluation import harness
from proxy_sft.evaluation.answers import EvaluateError
from proxy_sft.evaluation.harness import evaluate_harness, require_harness

lm_eval = pytest.importorskip("lm_eval", reason="the optional package lm-eval is not installed")
RIGHT = "AAAAAABBBB" # what is right: base, which says A, has six of ten; tuned, which says B, four
TASK = """task: letters
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}} Answer A or B."
doc_to_choice: ["A", "B"]
doc_to_target: "{{{{right}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def always_says(folder, letter):
    """Make the model in `folder` say one letter, whatever is asked: all tokens look alike, and one row of the output
    layer fits."""
    model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "o_proj" in name or "down_proj" in name: weights.zero_()
        model.get_input_embeddings().weight[:] = torch.ones(model.config.hidden_size)
        head = torch.nn.Linear(model.config.hidden_size, len(model.get_input_embeddings().weight), bias=False)
        head.weight.zero_()
        head.weight[tokenizer(letter)["input_ids"][0]] = 1.0
        model.set_output_embeddings(head)
    model.config.tie_word_embeddings = False
    for old in folder.glob("model*.safetensors*"): old.unlink()
    model.save_pretrained(folder)
    save_chat_files(folder, tokenizer)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A workspace with two planted models and a task of one's own."
    root = tmp_path_factory.mktemp("harness")
    settings = load_settings("demo", workspace=str(root))
    for folder, letter in ((settings.model_dir, "A"), (settings.run_dir, "B")):
        write_demo_model(folder, n=200)
        always_says(folder, letter)
    data = root / "letters.jsonl"
    data.write_text("".join(json.dumps({"question": f"Number {i}?", "right": "AB".index(letter)}) + "\n" for i,
                            letter in enumerate(RIGHT)))
    (root / "tasks").mkdir()
    (root / "tasks" / "letters.yaml").write_text(TASK.format(data=data))
    return settings, root / "tasks"


def test_planted_models_get_exactly_their_scores(world):
    settings, tasks = world
    found = evaluate_harness(settings, ["letters"], more_tasks=tasks)
    score, = [s for s in found.scores if s.metric == "acc"]
    assert (score.mean("base"), score.mean("tuned")) == (0.6, 0.4) and math.isclose(score.difference()[0], -0.2)
    assert score.values["base"]["0"] == 1 and score.values["tuned"]["0"] == 0
    kept = json.loads((settings.run_dir / "harness.json").read_text())
    assert kept["scores"][0]["means"]["base"][0] == 0.6 and kept["about"]["lm-eval"]


def test_a_killed_evaluation_goes_on_with_what_is_missing(world, monkeypatch):
    settings, tasks = world
    evaluate_harness(settings, ["letters"], more_tasks=tasks)
    measured = []
    usual = harness.run_task
    monkeypatch.setattr(harness, "run_task", lambda *args, **more: measured.append(args[0]) or usual(*args, **more))
    evaluate_harness(settings, ["letters"], more_tasks=tasks)
    assert measured == []
    evaluate_harness(settings, ["letters"], more_tasks=tasks, limit=5)  # another limit is another measurement
    assert measured == ["letters", "letters"]


def test_what_is_missing_is_said(world, monkeypatch):
    settings, tasks = world
    with pytest.raises(EvaluateError, match="'lettres' is no task .* Did you mean 'letters'"):
        evaluate_harness(settings, ["lettres"], more_tasks=tasks)
    with pytest.raises(EvaluateError, match="There is no folder"): evaluate_harness(settings, ["letters"],
            more_tasks=tasks / "nowhere")
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(EvaluateError, match="pip install lm-eval"): require_harness()
