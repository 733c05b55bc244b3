"""Ways of training that must give the same losses, attention that must not leak, and what must be refused."""
import json
import shlex
import shutil
import subprocess
import time

from proxy_sft.training import attention
import pytest
from long_form import soak
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from proxy_sft.training.attention import AttentionError, block, log_probabilities, choose_attention, VARLEN
from proxy_sft.training.compiled_layers import compile_layers
from proxy_sft.training.cost import keep_attention, set_checkpointing, tiled_loss
from proxy_sft.training.progress import FIELDS
from proxy_sft.core.atomic_folders import file_hash, read_manifest
from proxy_sft.convert import convert
from proxy_sft.core.locks import RunLock
from proxy_sft.core.settings import load_settings
from proxy_sft.demo.model import write_demo_model
from proxy_sft.evaluate import evaluate
from proxy_sft.evaluation.answers import EvaluateError
from proxy_sft.evaluation.predictions import require_same_heldout
from proxy_sft.launch.parameters import split_parameters
from proxy_sft.tokens.keys import PrepareError
from proxy_sft.train import train
from proxy_sft.pipeline import ensure_inputs
from proxy_sft.tokens.preparation import prepare
from proxy_sft.training.arguments import TrainError
from proxy_sft.training.trainer import build_trainer
from proxy_sft.training.checkpoint_writer import StopOnRequest
from proxy_sft.training.run import begin_run
from trainings import logged, run_training, stopped_after_a_step

SMALL = dict(
    profile="demo",
    demo_rows=400,
    max_train_samples=200,
    max_eval_samples=4,
    max_length=640,
    logging_steps=1,
    save_steps=3,
    eval_steps=3,
    max_steps=3,
    num_proc=1,
    eval_tool_calls_seconds=3600.0,
    control_token_turns=2,
)
STRAIGHT = dict(gradient_accumulation=2)
SAME = {  # name: settings, how far the three losses may be from the straight run's (relative)
    "asked": (dict(eval_tool_calls_every=1, eval_tool_calls_turns=4), 0),  # twice the same, and questions on the way
    "workers": (dict(dataloader_workers=1), 0),
    "probe": (dict(memory_probe="always", dataloader_workers=1), 0),
    "samples": (dict(sample_steps=2), 0),
    "selective": (dict(activation_checkpointing="selective"), 1e-6),
    "full": (dict(activation_checkpointing="auto"), 1e-6),  # without a card to fit: all layers
    "the first layer": (dict(activation_checkpointing=1), 1e-6),
    "auto": (dict(attention="auto"), 1e-6),
    "eager": (dict(attention="eager"), 1e-5),
    "adamw_torch": (dict(optimizer="adamw_torch"), 1e-5),
    "adamw_8bit": (dict(optimizer="adamw_8bit"), 1e-2),  # changes numerics: optimizer states in 8 bits
    "bf16": (dict(bf16=True), 2e-2),  # changes numerics: products in 16 bits
    "bfloat16": (
        dict(bf16=True, weights="bfloat16"),
        5e-2,
    ),  # changes numerics: weights and optimizer states in 16 bits
}


def run(folder, name, ranks=1, ok=True, **given):
    "A small run of the demo: what it printed."
    done = run_training(ranks, **{**SMALL, "workspace": str(folder), "run_name": name, **given})
    assert (done.returncode == 0) == ok, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout if ok else done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A workspace with the straight run."
    made = tmp_path_factory.mktemp("workspace")
    run(made, "straight", **STRAIGHT)
    return made


LONG = ("workers", "samples", "full", "eager", "adamw_torch", "adamw_8bit")  # a training each


@pytest.mark.parametrize("name", [pytest.param(name, marks=soak) if name in LONG else name for name in SAME])
def test_ways_of_training_give_the_same_losses(folder, name):
    given, tolerance = SAME[name]
    said = run(folder, name, **{**STRAIGHT, **given})
    assert said.count("tool calls: decision") == 3 * (name == "asked")
    expected, found = logged(folder / "runs" / "straight"), logged(folder / "runs" / name)
    assert len(expected) == 3 and expected[2] < expected[0]
    if name == "samples":
        said = [json.loads(line) for line in (folder / "runs" / name / "logs" / "samples.jsonl").open()]
        assert [r["step"] for r in said] == [2, 2, 2, 3, 3, 3] and all(r["question"] and r["expected"] for r in said)
    assert found == (pytest.approx(expected, rel=tolerance, abs=0) if tolerance else expected)


def test_one_rank_with_eight_micro_batches_is_two_ranks_with_four(folder):
    run(folder, "eight", gradient_accumulation=8, max_steps=2)
    run(folder, "two", ranks=2, gradient_accumulation=4, max_steps=2, deepspeed="null")
    assert logged(folder / "runs" / "two") == pytest.approx(logged(folder / "runs" / "eight"), rel=2e-4)


def test_the_same_rows_packed_or_one_by_one_train_the_same(folder):
    "Every row in every step: packing decides which rows meet in a step, and about nothing else."
    rows = dict(max_train_samples=6, max_eval_samples=1, max_length=8192, max_steps=2, control_token_turns=0)
    run(folder, "one block", **rows)
    run(folder, "one by one", packing=False, gradient_accumulation=6, **rows)
    for field in ("loss", "grad_norm"):
        one_block, one_by_one = (logged(folder / "runs" / name, field) for name in ("one block", "one by one"))
        assert len(one_block) == 2 and one_by_one == pytest.approx(one_block, rel=1e-5)


def test_training_without_heldout_rows(tmp_path):
    said = run(
        tmp_path, "alone", demo_rows=200, max_train_samples=20, max_steps=1, heldout_fraction=0.0, heldout_tools=0.0
    )
    assert "held-out" not in said and len(logged(tmp_path / "runs" / "alone")) == 1


# Means over tokens: the same rows and the same model, however they are batched

FLAT = dict(
    demo_rows=200, max_train_samples=12, max_eval_samples=7, max_steps=1, learning_rate=1e-30, save_steps=100,
    control_token_turns=0, report_to=[],
)
BATCHINGS = [
    dict(packing=False),
    dict(packing=False, batch_size=3),
    dict(packing=False, padding_free=True, batch_size=4),
    dict(max_length=640),
    dict(max_length=1024, batch_size=2),
]


def true_means(settings):
    "Loss and accuracy of the held-out rows, each alone in a batch: sums over all supervised tokens, divided once."
    model = AutoModelForCausalLM.from_pretrained(settings.model_dir, dtype=torch.float32)
    sums = torch.zeros(3, dtype=torch.float64)
    for row in prepare(settings).dataset("heldout"):
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad(): logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        kept = labels != -100
        sums += torch.stack([
            F.cross_entropy(logits[kept], labels[kept], reduction="sum"),
            (logits[kept].argmax(-1) == labels[kept]).sum(),
            kept.sum(),
        ])
    return (sums[:2] / sums[2]).tolist()


@pytest.fixture(scope="module")
def truth(folder):
    settings = load_settings(**{**SMALL, **FLAT, "workspace": str(folder), "packing": False})
    ensure_inputs(settings)
    return true_means(settings)


@pytest.mark.parametrize("given", BATCHINGS, ids=str)
def test_the_heldout_loss_is_the_mean_over_all_tokens(folder, truth, given, tmp_path):
    given = {**SMALL, **FLAT, "workspace": str(folder), "output_dir": str(tmp_path), **given}
    settings = load_settings(**given)
    prepared = prepare(settings)
    found = build_trainer(settings, prepared, {}, resumed=False).evaluate()
    assert [found["eval_loss"], found["eval_mean_token_accuracy"]] == pytest.approx(truth, abs=1e-5)


@pytest.mark.parametrize("given", [dict(packing=False, batch_size=3), dict(deepspeed="null")], ids=str)
def test_means_do_not_depend_on_the_number_of_ranks(folder, truth, given):
    "Seven rows on two ranks: the last batches have too few, and no row counts twice."
    name = f"ranks-{given.get('batch_size', 1)}"
    run(folder, name, ranks=2, **{**FLAT, **given})
    for field, value in zip(("eval_loss", "eval_mean_token_accuracy"), truth):
        assert logged(folder / "runs" / name, field) == pytest.approx([value] * 2, abs=1e-5)


def test_a_training_loss_over_several_steps_is_the_mean_over_their_tokens(folder):
    "Without packing answers differ in length. Weights stay as they are, and the same six rows are trained two by two."
    flat = {**FLAT, "packing": False, "eval_steps": None, "max_steps": 3}
    run(folder, "by-accumulation", **{**flat, "gradient_accumulation": 2})
    run(folder, "by-logging", **{**flat, "max_steps": 6, "logging_steps": 2})  # records of steps 1, 2, 3 to 4, 5 to 6
    run(folder, "by-ranks", ranks=2, **{**flat, "deepspeed": "null"})
    for field in ("loss", "mean_token_accuracy"):
        expected = logged(folder / "runs" / "by-accumulation", field)
        assert len(expected) == 3
        assert logged(folder / "runs" / "by-logging", field)[2:] == pytest.approx(expected[1:], abs=1e-5)
        assert logged(folder / "runs" / "by-ranks", field) == pytest.approx(expected, abs=1e-5)


def test_dft_weighs_each_token_by_its_probability_and_leaves_the_heldout_loss_alone(folder):
    "Dynamic fine-tuning (arXiv 2508.05629): the sum of -p log p over the supervised tokens, p without a gradient."
    given = {**SMALL, **FLAT, "workspace": str(folder), "packing": False}
    model, sums = None, torch.zeros(2, dtype=torch.float64)
    settings = load_settings(**given)
    ensure_inputs(settings)
    for row in prepare(settings).dataset("train"):
        model = model or AutoModelForCausalLM.from_pretrained(settings.model_dir, dtype=torch.float32)
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad(): logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        kept = labels != -100
        log_p = logits[kept].log_softmax(-1).gather(1, labels[kept][:, None]).double()
        sums += torch.tensor([-(log_p * log_p.exp()).sum(), kept.sum()])
    run(folder, "nll", **FLAT, packing=False, batch_size=12)
    for name, batching in (("dft", dict(batch_size=12)), ("dft-4", dict(batch_size=3, gradient_accumulation=4))):
        run(folder, name, **FLAT, packing=False, loss="dft", **batching)
        assert logged(folder / "runs" / name, "loss")[0] == pytest.approx(float(sums[0] / sums[1]), rel=1e-4)
        plain = logged(folder / "runs" / "nll", "eval_loss")
        assert logged(folder / "runs" / name, "eval_loss") == pytest.approx(plain, rel=1e-6)


def weighted_means(folder, weigh, dft=False):
    "The first loss that training must log: the weighted mean over the supervised tokens, each row alone in a batch."
    settings = load_settings(**{**SMALL, **FLAT, "workspace": str(folder), "packing": False})
    ensure_inputs(settings)
    model, sums = AutoModelForCausalLM.from_pretrained(settings.model_dir, dtype=torch.float32), [0.0, 0.0]
    for row in prepare(settings).dataset("train"):
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad(): logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        kept = labels != -100
        log_p = logits[kept].log_softmax(-1).gather(1, labels[kept][:, None])[:, 0].double()
        weights = torch.tensor(weigh(labels[kept].tolist()))
        sums[0] -= float((weights * log_p * (log_p.exp() if dft else 1)).sum())
        sums[1] += float(weights.sum())
    return sums[0] / sums[1]


def times_in_calls(settings, times):
    "The weight of each trained token, one after the other: calls stand between their two control tokens."
    known = AutoTokenizer.from_pretrained(settings.model_dir).get_added_vocab()
    def weigh(tokens):
        inside, found = False, []
        for token in tokens:
            inside = inside or token == known["<tool_call>"]
            found.append(times if inside else 1.0)
            inside = inside and token != known["</tool_call>"]
        return found
    return weigh


WEIGHTED = dict(**FLAT, call_weight=3.0, deepspeed="null")


@pytest.mark.parametrize("name, loss, ranks, given", [
    ("one", "nll", 1, dict(packing=False, batch_size=12)),
    ("accumulated", "nll", 1, dict(packing=False, batch_size=3, gradient_accumulation=4)),
    ("ranks", "nll", 2, dict(packing=False, batch_size=2, gradient_accumulation=3)),
    ("packed", "nll", 1, dict(packing=True, gradient_accumulation=50)),
    ("dft", "dft", 1, dict(packing=False, batch_size=4, gradient_accumulation=3))])
def test_a_token_of_a_call_counts_so_many_times_however_rows_are_batched(folder, name, loss, ranks, given):
    settings = load_settings(**{**SMALL, **FLAT, "workspace": str(folder)})
    ensure_inputs(settings)
    expected = weighted_means(folder, times_in_calls(settings, 3.0), loss == "dft")
    plain = weighted_means(folder, lambda tokens: [1.0] * len(tokens), loss == "dft")
    assert expected != pytest.approx(plain, rel=1e-3)
    run(folder, f"calls-{name}", ranks, **{**WEIGHTED, "loss": loss, **given})
    assert logged(folder / "runs" / f"calls-{name}", "loss")[0] == pytest.approx(expected, rel=1e-4)


def weighted_data(folder, name, weights):
    "Settings of a training on own rows whose two answers have these weights; None leaves the field out."
    path, model = folder / name / "rows.jsonl", folder / "weighed-model"
    if not model.exists(): write_demo_model(model, seed=1, n=200)
    path.parent.mkdir(parents=True)
    given = [{} if weight is None else {"weight": weight} for weight in weights]
    lines = [{"messages": [
        {"role": "user", "content": f"How many is {i} and {i}?"},
        {"role": "assistant", "content": f"It is {i + i}, as far as I know.", **given[0]},
        {"role": "user", "content": "Are you sure?"},
        {"role": "assistant", "content": "Yes. " * (i + 1), **given[1]}]} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = dict(workspace=str(folder / name), dataset=str(path), model=str(model),
                heldout_fraction=0.0, heldout_tools=[], demo_rows=None, max_train_samples=None, max_eval_samples=None,
                packing=False)
    given = {**SMALL, **FLAT, **more}
    settings = load_settings(**given)
    convert(settings, progress=False)
    return given, settings


def test_weights_of_messages_count_in_the_loss_however_rows_are_batched(folder):
    given, settings = weighted_data(folder, "weighed", [0.5, 4.0])
    rows, sums = prepare(settings).dataset("train"), [0.0, 0.0]
    model = AutoModelForCausalLM.from_pretrained(settings.model_dir, dtype=torch.float32)
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad(): logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        kept = torch.nonzero(labels != -100).flatten()
        second = (kept - torch.arange(len(kept))) > kept[0]  # behind the gap between the answers
        weights = torch.where(second, 4.0, 0.5)
        sums[0] += float((weights * F.cross_entropy(logits[kept], labels[kept], reduction="none")).sum())
        sums[1] += float(weights.sum())
    for name, ranks, batching in (("w12", 1, dict(batch_size=12)),
                                  ("w3", 1, dict(batch_size=3, gradient_accumulation=4)),
                                  ("w2", 2, dict(batch_size=2, gradient_accumulation=3, deepspeed="null")),
                                  ("wp", 1, dict(packing=True, gradient_accumulation=50))):
        run(settings.workspace_dir, name, ranks, **{**given, **batching})
        assert logged(settings.workspace_dir / "runs" / name)[0] == pytest.approx(sums[0] / sums[1], rel=1e-4), name


def test_weights_of_one_are_no_weights(folder):
    hashes = {}
    for name, weights in (("plain", [None, None]), ("ones", [1, 1.0]), ("halves", [1, 0.5])):
        prepared = prepare(weighted_data(folder, name, weights)[1])
        hashes[name] = file_hash(prepared.folder / "train.arrow")
        assert ("weights" in prepared.dataset("train").column_names) == (name == "halves")
    assert hashes["plain"] == hashes["ones"] != hashes["halves"]


def test_weights_of_one_and_no_noise_leave_the_run_as_it_is_and_weights_move_the_gradient(folder):
    given = dict(packing=False, batch_size=2, gradient_accumulation=2, max_steps=2, learning_rate=1e-3)
    for name, more in (("w-none", {}), ("w-one", dict(call_weight=1.0, neftune_alpha=None)),
                       ("w-three", dict(call_weight=3.0)), ("w-noise", dict(neftune_alpha=5.0))):
        run(folder, name, **{**FLAT, **given, **more})
    weights = {name: file_hash(folder / "runs" / name / "model.safetensors")
               for name in ("w-none", "w-one", "w-three", "w-noise")}
    assert weights["w-none"] == weights["w-one"]
    assert logged(folder / "runs" / "w-none") == logged(folder / "runs" / "w-one")
    assert len({*weights.values()}) == 3
    first = {name: logged(folder / "runs" / name, "eval_loss")[0] for name in weights}
    assert len({*first.values()}) == 1  # neither weights nor noise touch the held-out loss
    assert logged(folder / "runs" / "w-noise", "loss")[0] != logged(folder / "runs" / "w-none", "loss")[0]


def test_every_log_is_a_record_with_all_fields(folder):
    records = [json.loads(line) for line in (folder / "runs" / "straight" / "logs" / "progress.jsonl").open()]
    assert all(set(FIELDS) <= set(r) and r["attention"] == "sdpa" and r["kernels"] == "none" for r in records)
    steps = [r for r in records if r["loss"] is not None]
    assert [r["step"] for r in steps] == [1, 2, 3] and all(
        r["tokens_per_second"] > r["supervised_tokens_per_second"] > 0 for r in steps
    )
    assert all(0 <= r["data_wait"] <= 1 and r["mfu"] is None for r in steps) and steps[-1]["eta_seconds"] == 0


def test_an_attention_that_leaks_is_refused_before_the_first_step(folder):
    "Registered without a mask function, as transformers allows it."
    AttentionInterface.register(
        "leaking", lambda *args, cu_seq_lens_q=None, position_ids=None, **more: sdpa_attention_forward(*args, **more)
    )
    with pytest.raises(
        AttentionError, match="leaking lets packed conversations see each other.*Set attention to auto"
    ) as raised:
        train(load_settings(**{**SMALL, "workspace": str(folder), "run_name": "leaking", "attention": "leaking"}))
    packed, separate = (
        float(str(raised.value).partition(word)[2].split()[0]) for word in ("rows lose ", "rows alone ")
    )
    assert abs(packed - separate) > 1e-3 and not list((folder / "runs" / "leaking").glob("checkpoint-*"))


def test_a_taste_and_the_whole_are_two_runs_and_evaluation_asks_what_was_held_out(tmp_path):
    "The README's commands: some conversations, then all. Then other rows are held out, and evaluation refuses."
    given = dict(profile="demo", workspace=str(tmp_path), demo_rows=200, max_length=1024, num_proc=1,
                 max_eval_samples=2,
                 control_token_turns=0)
    for more in (dict(max_train_samples=20, max_steps=1), dict(max_steps=2), dict(max_steps=2)):
        done = run_training(**given, **more)
        assert done.returncode == 0, done.stderr[-3000:]
    runs = {f.name: json.loads((f / "manifest.json").read_text()) for f in (tmp_path / "runs").iterdir()}
    assert {name: manifest["step"] for name, manifest in runs.items()} == {"demo-20": 1, "demo": 2}
    settings = load_settings(**given)
    heldout = {file_hash(settings.converted_dir / "heldout.jsonl")}
    assert {manifest["made_from"]["data/heldout.jsonl"] for manifest in runs.values()} == heldout
    require_same_heldout(settings, settings.run_dir)
    require_same_heldout(settings, settings.run_dir / "checkpoint-2")
    ensure_inputs(load_settings(**given, heldout_fraction=0.4))
    with pytest.raises(EvaluateError, match="(?s)is not the held-out file of the training.*01_convert") as raised:
        evaluate(settings, max_turns=1)
    # the printed commands mend it: the run's own settings, read again
    command = shlex.split(str(raised.value).splitlines()[1].partition("first: ")[2])
    _, _, words = split_parameters(command[1:])
    ensure_inputs(load_settings(words.pop("profile"), **words))
    require_same_heldout(settings, settings.run_dir)
    with pytest.raises(EvaluateError, match="Finished runs: demo, demo-20"):
        evaluate(load_settings(**given, run_name="other"), max_turns=1)


def test_prepared_data_of_other_settings_are_not_trained(folder):
    settings = load_settings(**{**SMALL, "workspace": str(folder)})
    prepared = prepare(settings)
    other = settings.model_copy(update={"max_length": 512, "run_name": "other"})
    with pytest.raises(PrepareError, match="made from something else: settings/max_length"): train(other, prepared)
    assert not (other.run_dir / "checkpoint-3").exists()


def test_published_files_have_the_usual_rights(folder):
    "A server that runs as another user reads them: 0666 and 0777 without the umask's bits, as any program writes."
    (folder / "usual").write_text("")
    usual = (folder / "usual").stat().st_mode & 0o777
    run = folder / "runs" / "straight"
    published = [*run.glob("*.*"), *(run / "checkpoint-3").iterdir(),
                 *(folder / "prepared").rglob("*"), *(folder / "converted").rglob("*"), *(folder / "models").rglob("*")]
    assert any(path.name == "model.safetensors" for path in published)
    odd = {str(path): oct(path.stat().st_mode & 0o777) for path in published if path.is_file()
           and path.stat().st_mode & 0o777 != usual}
    assert not odd
    folders = {path.stat().st_mode & 0o777 for path in published if path.is_dir()}
    assert folders == {usual | (usual & 0o444) >> 2}


def saved(checkpoint):
    "Hashes of what a checkpoint holds, without what names times, speeds or this very setting."
    files = read_manifest(checkpoint)["files"]
    return {name: entry["blake3"] for name, entry in files.items()
            if name.endswith((".safetensors", ".pt", ".pth", ".jinja")) or name.startswith("tokenizer")}


@pytest.mark.parametrize("ranks, given", [
    (1, STRAIGHT), pytest.param(2, dict(deepspeed="ds_config_zero2.json"), marks=soak)])
def test_saves_beside_the_training_are_the_same(folder, tmp_path, ranks, given):
    "Files, what is kept, and weights alone in between; a stop and a second start change nothing."
    given = {**given, "save_steps": 1, "save_weights_steps": 2, "save_total_limit": 2}
    run(folder, f"waits {ranks}", ranks, **given)
    beside = run_training(ranks, act=stopped_after_a_step if ranks == 1 else None, **{
        **SMALL, **given, "workspace": str(folder), "run_name": f"beside {ranks}", "save_through": str(tmp_path)})
    if ranks == 1:
        assert beside.returncode and (folder / "runs" / "beside 1" / "checkpoint-1" / "COMPLETE").exists()
        assert not list(tmp_path.iterdir())
        (folder / "runs" / "beside 1" / "STOP").unlink()
        run(folder, "beside 1", **given, save_through=str(tmp_path))
    else: assert beside.returncode == 0, beside.stderr
    one, other = folder / "runs" / f"waits {ranks}", folder / "runs" / f"beside {ranks}"
    names, found = (sorted(path.name for kind in ("checkpoint", "weights") for path in folder.glob(f"{kind}-*"))
                    for folder in (one, other))
    assert names == found and {"checkpoint-2", "checkpoint-3"} <= {*names}
    assert all(saved(one / name) == saved(other / name) for name in names) and saved(one) == saved(other)
    assert logged(one) == logged(other) and not list(tmp_path.iterdir())


def in_the_way_of_a_save(settings) -> None: # an `act`
    "A file where the second save is to be copied."
    usual = StopOnRequest.on_step_end
    def on_step_end(self, args, state, control, **more):
        if state.global_step == 2:
            while not (settings.run_dir / "checkpoint-1" / "COMPLETE").exists(): time.sleep(.01)
            (settings.run_dir / ".saving").write_text("")
        return usual(self, args, state, control, **more)
    StopOnRequest.on_step_end = on_step_end
    train(settings)


def test_a_save_that_fails_beside_the_training_ends_it(folder, tmp_path):
    done = run_training(1, act=in_the_way_of_a_save, **{
        **SMALL, **STRAIGHT, "workspace": str(folder), "run_name": "in the way", "save_steps": 1,
        "save_through": str(tmp_path)})
    assert done.returncode == 1 and "checkpoint-2 could not be completed" in done.stderr, done.stderr
    run_dir = folder / "runs" / "in the way"
    assert [path.name for path in run_dir.glob("checkpoint-*")] == ["checkpoint-1"] and not list(tmp_path.iterdir())
    assert not (run_dir / "model.safetensors").exists()


def test_without_space_on_the_machine_a_save_goes_straight_to_the_run(folder, tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode: pytest.skip("no small file system can be mounted here")
    try: said = run(folder, "no space", **STRAIGHT, save_through=str(tmp_path))
    finally: subprocess.run(["umount", str(tmp_path)], check=True)
    assert "it is written straight to the run's folder" in said
    assert saved(folder / "runs" / "no space" / "checkpoint-3") == saved(folder / "runs" / "straight" / "checkpoint-3")


def test_saves_beside_the_training_need_one_machine_and_a_folder(folder, tmp_path, monkeypatch):
    settings = load_settings(**{**SMALL, "workspace": str(folder), "save_through": str(tmp_path / "nowhere")})
    done = run_training(1, **{**SMALL, **STRAIGHT, "workspace": str(folder), "run_name": "nowhere",
                              "save_through": str(tmp_path / "nowhere")})
    assert "is no folder that can be written" in done.stderr and done.returncode == 1
    assert not (folder / "runs" / "nowhere" / "settings.yaml").exists()
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 1)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(TrainError, match="save_through works on one machine"):
        begin_run(settings, prepare(settings), RunLock(folder / "lock"))


def test_what_was_chosen_stands_in_the_log_and_in_the_manifest(folder):
    said = run(folder, "chosen", attention="auto", max_steps=1)
    assert "Attention: sdpa, the fastest without a GPU. Checked: packed rows lose" in said
    kept = json.loads((folder / "runs" / "chosen" / "manifest.json").read_text())["speed"]
    assert (
        kept["attention"] == "sdpa" and kept["attention_check"]["difference"] < 1e-4 < kept["attention_check"]["leak"]
    )


def test_adapters_stop_and_go_on_and_become_a_whole_model(folder):
    """Every weight but the adapters' stays; the final model is the base model and the adapter; going on from step 2
    gives the same."""
    given = dict(lora_rank=8, save_steps=2)
    run(folder, "lora", **given)
    run_dir = folder / "runs" / "lora"
    saved = {f.name for f in (run_dir / "checkpoint-2").iterdir()}
    assert (
        "adapter_model.safetensors" in saved
        and not any(n.startswith("model") for n in saved)
        and (run_dir / "adapter" / "adapter_config.json").is_file()
    )
    final, base = (
        AutoModelForCausalLM.from_pretrained(p, local_files_only=True) for p in (run_dir, folder / "models" / "demo")
    )
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "models" / "demo", local_files_only=True),
        str(run_dir / "checkpoint-3"),
    )
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(final(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(final(ids).logits, base(ids).logits, atol=1e-2)
    assert torch.equal(final.model.embed_tokens.weight, base.model.embed_tokens.weight)
    expected, whole = logged(folder / "runs" / "lora"), (run_dir / "model.safetensors").read_bytes()
    shutil.rmtree(run_dir / "checkpoint-3")
    run(folder, "lora", **given)
    assert logged(folder / "runs" / "lora") == expected and (run_dir / "model.safetensors").read_bytes() == whole


def test_adapters_under_zero2_train_as_one_rank_does(folder):
    run(folder, "one", lora_rank=8, gradient_accumulation=2)
    run(folder, "zero", ranks=2, lora_rank=8)
    assert "Memory: the longest micro-batch" in run(
        folder, "probed", ranks=2, lora_rank=8, memory_probe="always", sample_steps=3
    )
    assert len((folder / "runs" / "probed" / "logs" / "samples.jsonl").read_text().splitlines()) == 3
    assert logged(folder / "runs" / "probed") == logged(folder / "runs" / "zero")
    assert logged(folder / "runs" / "zero") == pytest.approx(logged(folder / "runs" / "one"), rel=2e-4)
    assert (folder / "runs" / "zero" / "model.safetensors").is_file()


@pytest.mark.parametrize("after", [0, 17])
def test_out_of_memory_names_three_settings(folder, after):
    "A real error of PyTorch's kind, from a layer: in the proof before the first step, and in a step."
    seen = []
    def full(module, args):
        if type(module).__name__ == "Qwen3MLP": seen.append(1)
        if len(seen) > after: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    hook = torch.nn.modules.module.register_module_forward_pre_hook(full)
    try:
        with pytest.raises(TrainError) as raised:
            train(load_settings(**{**SMALL, "workspace": str(folder), "run_name": f"full-{after}", "max_length": 2048}))
    finally: hook.remove()
    said = str(raised.value)
    assert said == (
        "The device is out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. Set activation_checkpointing to "
        "full (now none); or optimizer to adamw_8bit "
        "(now adamw_torch_fused); or max_length to 1,024 (now 2,048). The complete checkpoints stay."
    )


def test_kernels_that_cannot_run_are_refused(folder):
    assert "kernels is liger, and there is no GPU. Set kernels to auto or none." in run(
        folder, "liger", ok=False, kernels="liger"
    )


def rows_apart(query, key, value, ends, scale):
    "What the kernel computes, in plain PyTorch: tokens, heads, width in and out."
    parts = [
        F.scaled_dot_product_attention(
            *(t[a:b].transpose(0, 1)[None] for t in (query, key, value)), is_causal=True, scale=scale, enable_gqa=True
        )
        for a, b in zip(ends.tolist(), ends.tolist()[1:])
    ]
    return torch.cat([part[0].transpose(0, 1) for part in parts])


def slopes_apart(slope, query, key, value, scale):
    """The gradients of one row's attention, written out: heads, tokens, width; several heads of queries share one of
    keys."""
    groups = len(query) // len(key)
    keys, values = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    weights = (
        (query @ keys.mT * scale)
        .masked_fill(torch.ones(query.shape[1], query.shape[1]).triu(1).bool(), -torch.inf)
        .softmax(-1)
    )
    inner = slope @ values.mT
    inner = weights * (inner - (inner * weights).sum(-1, keepdim=True)) * scale
    share = lambda t: t.unflatten(0, (len(key), groups)).sum(1)
    return inner @ keys, share(inner.mT @ query), share(weights.mT @ slope)


@pytest.fixture(scope="module")
def kernel():
    "PyTorch's flash-attention for rows of different lengths has no CPU version; this is one."
    def forward(
        query,
        key,
        value,
        ends,
        ends_k,
        longest,
        longest_k,
        dropout,
        causal,
        debug,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
        **more,
    ):
        calls.append(longest)
        assert causal and dropout == 0 and int(ends.diff().max()) == longest and torch.equal(ends, ends_k)
        empty = torch.empty(0)
        return rows_apart(query, key, value, ends, scale), torch.zeros(query.shape[1], len(query)), empty, empty, empty

    def backward(
        slope,
        query,
        key,
        value,
        out,
        sums,
        ends,
        ends_k,
        longest,
        longest_k,
        dropout,
        causal,
        state,
        unused,
        *,
        scale=None,
        **more,
    ):
        made = [
            slopes_apart(*(t[a:b].transpose(0, 1) for t in (slope, query, key, value)), scale)
            for a, b in zip(ends.tolist(), ends.tolist()[1:])
        ]
        return tuple(torch.cat([part[i].transpose(0, 1) for part in made]) for i in range(3))

    calls = []
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield calls
    library._destroy()


def fresh_model():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.5,
    )
    made = Qwen3ForCausalLM(config)
    add_fused_lm_head(made, outputs=("log_probs",))
    return made


@pytest.fixture(scope="module")
def model(): return fresh_model()


COLLATE = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
ROWS = [[(7 * i + n) % 256 for i in range(n)] for n in (24, 31, 17)]


def test_pytorchs_kernel_for_packed_rows_gets_what_it_needs(model, kernel):
    def slopes(name):
        model.set_attn_implementation(name)
        return torch.autograd.grad(log_probabilities(model, block(ROWS, COLLATE)).sum(), list(model.parameters()))
    found = choose_attention(model, VARLEN, True, COLLATE, ROWS)
    assert found.name == VARLEN and found.check.difference < 1e-5 < 0.1 < found.check.leak
    for ours, theirs in zip(slopes(VARLEN), slopes("sdpa")):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keep, times", [(True, 2), (False, 4)])
def test_selective_checkpointing_keeps_what_pytorchs_kernel_gave(kernel, keep, times):
    made = fresh_model().train()
    made.set_attn_implementation(VARLEN)
    if keep: keep_attention(made)
    made.gradient_checkpointing_enable({"use_reentrant": False})
    kernel.clear()
    batch = block(ROWS, COLLATE)
    made(
        **{n: batch[n] for n in ("input_ids", "position_ids", "cu_seq_lens_q", "max_length_q")}, use_cache=False
    ).logits.sum().backward()
    assert len(kernel) == times, kernel


@pytest.mark.parametrize("recomputed", [pytest.param("none", marks=soak), "full"])
def test_layers_are_compiled_once_whatever_the_lengths_and_give_the_same(kernel, recomputed):
    """Packed attention stays an operator that the compiler does not look into. Recorded is once, for all layers, blocks
    and longest rows; losses and gradients are those without, to the bit, since nothing is joined here: with joined
    kernels see the long form of tests/test_speed.py."""
    counters, plain, compiled = torch._dynamo.utils.counters, fresh_model().train(), fresh_model().train()
    torch._dynamo.reset()
    counters.clear()
    compile_layers(compiled, backend="eager")
    for made in (plain, compiled):
        made.set_attn_implementation(VARLEN)
        set_checkpointing(made, recomputed)
    kernel.clear()
    for rows in (ROWS, ROWS[:2], [list(range(n)) for n in (9, 1, 50, 3, 12)], [list(range(2))] * 20):
        batch, found = block(rows, COLLATE), []
        for made in (plain, compiled):
            loss = tiled_loss(made, batch)
            found.append([loss, *torch.autograd.grad(loss, list(made.parameters()))])
        assert all(torch.equal(a, b) for a, b in zip(*found))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], counters
    assert len(kernel) == 4 * 2 * 2 * (1 if recomputed == "none" else 2)
    with torch.no_grad(): compiled.eval().generate(torch.tensor([ROWS[0]]), max_new_tokens=2, do_sample=False)
    assert counters["stats"]["unique_graphs"] == 1  # answers are computed by the layers as they are


def test_pytorchs_kernel_for_packed_rows_leaves_the_rest_to_sdpa(model, kernel):
    ids = torch.tensor(ROWS[0])[None]
    padded = {"input_ids": F.pad(ids, (5, 0)), "attention_mask": F.pad(torch.ones_like(ids), (5, 0))}
    by_positions = {
        "input_ids": torch.tensor(sum(ROWS, []))[None],
        "position_ids": torch.cat([torch.arange(len(r)) for r in ROWS])[None],
    }
    for inputs in (padded, by_positions, {"input_ids": ids}):
        made = []
        for name in (VARLEN, "sdpa"):
            model.set_attn_implementation(name)
            with torch.no_grad():
                # with a cache, transformers does not look for restarts
                made.append(model(**inputs, use_cache=False).logits[:, 5:])
        torch.testing.assert_close(*made, rtol=1e-4, atol=1e-4)
    generated = []
    for name in (VARLEN, "sdpa"):
        model.set_attn_implementation(name)
        generated.append(model.generate(**padded, max_new_tokens=4, do_sample=False).tolist())
    assert generated[0] == generated[1]


def test_auto_passes_over_what_leaks_and_says_so(model, monkeypatch):
    "A kernel that is installed and wrong: the list is ours, the check finds it, the next is taken."
    AttentionInterface.register(
        "blind",
        lambda *args, cu_seq_lens_q=None, position_ids=None, **more: attention.sdpa_attention_forward(*args, **more),
    )
    monkeypatch.setattr(attention, "ORDER", ("blind", "flash_attention_2", "eager"))
    monkeypatch.setattr(attention, "unavailable_reason", lambda *args: "")
    found = choose_attention(model, "auto", True, COLLATE, ROWS)
    assert found.name == "eager" and found.check.passed
    monkeypatch.setattr(attention, "ORDER", ("blind",))
    with pytest.raises(AttentionError, match="blind lets packed conversations see each other"):
        choose_attention(model, "auto", True, COLLATE, ROWS)
