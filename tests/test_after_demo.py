"""What `make demo` leaves behind in this checkout: CI runs these after it; without a demo they are skipped."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
RUN = ROOT / "workspace" / "runs" / "demo"
pytestmark = pytest.mark.skipif(not (RUN / "COMPLETE").is_file(), reason="make demo has not been run in this checkout")


def test_the_demo_kept_its_last_four_checkpoints_and_learnt():
    assert sorted(p.name for p in RUN.glob("checkpoint-*")) == [
        "checkpoint-500",
        "checkpoint-600",
        "checkpoint-700",
        "checkpoint-800",
    ]
    assert (RUN / "model.safetensors").read_bytes() == (RUN / "checkpoint-800" / "model.safetensors").read_bytes()
    held = [
        r["eval_loss"] for r in json.loads((RUN / "trainer_state.json").read_text())["log_history"] if "eval_loss" in r
    ]
    assert held[-1] < held[0] / 4


def test_the_demo_takes_values_from_the_question():
    metrics = json.loads((RUN / "evaluation.json").read_text())["metrics"]
    share = lambda model, metric: metrics[model][metric]["right"] / metrics[model][metric]["of"]
    assert share("base", "parseable") == share("base", "exact") == 0
    assert share("tuned", "names") > 0.75 and share("tuned", "exact") > 0.55


def test_two_ranks_went_on_from_nothing_and_wrote_a_notebook_each():
    two = RUN.with_name("demo-zero2")
    assert json.loads((two / "manifest.json").read_text())["world_size"] == 2
    assert {p.name for p in (two / "notebooks").glob("*.ipynb")} == {"rank-0.ipynb", "rank-1.ipynb"}


@pytest.mark.parametrize("words", [
    ("inspect", "-p", "profile", "demo", "--row", "3"), ("status", "demo"),
    ("report", "demo", "--output", "{}/demo.html"),
], ids=lambda w: w[0])
def test_the_commands_of_the_readme_show_it(words, tmp_path):
    done = subprocess.run(
        [str(BIN / "proxy-sft"), *(w.format(tmp_path) for w in words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]
    if words[0] == "report": assert "Can it" in (page := (tmp_path / "demo.html").read_text()) or "Evaluation" in page
