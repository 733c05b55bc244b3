"""Ways of training that must give the same losses: micro-batches on one rank or two, activations kept or computed anew."""
import json

import pytest

from proxy_sft.progress import FIELDS
from trainings import run_training

SMALL = dict(profile="demo", demo_rows=400, max_train_samples=200, max_eval_samples=4, max_length=640, logging_steps=1, save_steps=3, eval_steps=3, max_steps=3, num_proc=1)


def losses(folder, ranks=1, **settings):
    "Three logged losses of a small run of the demo, and its run folder."
    name = f"run-{len(list(folder.glob('runs/*')))}"
    done = run_training(ranks, **{**SMALL, "workspace": str(folder), "run_name": name, **settings})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    log = json.loads((folder / "runs" / name / "trainer_state.json").read_text())["log_history"]
    return [r["loss"] for r in log if "loss" in r], folder / "runs" / name


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "One rank, eight micro-batches per step, activations kept."
    folder = tmp_path_factory.mktemp("workspace")
    return folder, *losses(folder, gradient_accumulation=8)


def test_one_rank_with_eight_micro_batches_is_two_ranks_with_four(straight):
    folder, expected, _ = straight
    found, _ = losses(folder, ranks=2, gradient_accumulation=4, deepspeed="null")
    assert found == pytest.approx(expected, rel=2e-4), (found, expected)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_activations_computed_anew_change_nothing(straight, kind):
    folder, expected, _ = straight
    found, _ = losses(folder, gradient_accumulation=8, activation_checkpointing=kind)
    assert found == pytest.approx(expected, rel=1e-6), (found, expected)


def test_every_log_is_a_record_with_all_fields(straight):
    records = [json.loads(line) for line in (straight[2] / "logs" / "progress.jsonl").open()]
    assert all(set(FIELDS) <= set(r) for r in records)
    steps = [r for r in records if r["loss"] is not None]
    assert [r["step"] for r in steps] == [1, 2, 3] and all(r["tokens_per_second"] > r["supervised_tokens_per_second"] > 0 for r in steps)
    assert all(0 <= r["data_wait"] <= 1 and r["mfu"] is None for r in steps) and steps[-1]["eta_seconds"] == 0
