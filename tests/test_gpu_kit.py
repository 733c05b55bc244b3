"""The kit for a borrowed GPU machine, in its form for a machine without one, so that it fits the library of today."""
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from long_form import soak

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("part", [["kernels"], ["layers", "--seconds", "0"]], ids=lambda part: part[0])
def test_a_part_of_the_kit_runs_on_the_processor(part):
    done = subprocess.run([sys.executable, "benchmarks/gpu/measure.py", *part], cwd=ROOT, capture_output=True,
                          text=True, timeout=1800)
    fine = done.returncode == 0 and "FAILED" not in done.stdout and "Error" not in done.stdout
    assert fine, done.stdout + done.stderr[-2000:]
    assert ("fused loss" in done.stdout) if part[0] == "kernels" else ("tokens/s at" in done.stdout)


def test_its_scripts_are_sound_and_name_what_exists():
    for script in ("run.sh", "fetch_wheels.sh"):
        assert subprocess.run(["bash", "-n", str(ROOT / "benchmarks" / "gpu" / script)]).returncode == 0
    text = (ROOT / "benchmarks" / "gpu" / "run.sh").read_text(encoding="utf-8")
    assert all((ROOT / name).is_file() for name in ("benchmarks/train.py",
                                                    "tests/test_gpu.py")) and "proxy_sft.training.attention" in text


def test_an_attention_that_raises_what_nobody_expected_is_named_with_its_error():
    "As with PyTorch 2.11, whose packed attention lacked an argument: the slower choice must not be a quiet one."
    from proxy_sft.training.attention import UNEXPECTED, tried, warn_of

    def packed_attention(query): return query
    problem, found = tried(lambda: packed_attention(query=0, enable_gqa=True), "torch_varlen")
    assert found is None and UNEXPECTED in problem
    with pytest.warns(RuntimeWarning, match="torch_varlen is installed.*TypeError.*enable_gqa"):
        warn_of("torch_varlen", problem)


def test_the_training_benchmark_runs_and_counts_adapters_as_what_they_are(tmp_path):
    """Its CPU form, from conversations to table: the allocator's segments grow as in `train`, and weights that get no
    gradient are not counted as if they got one."""
    from proxy_sft.training.cost import Shape, flops_per_token
    words = ["--rows", "300", "--steps", "1", "--accumulation", "1", "--alone", "-p", "lora_rank", "4"]
    done = subprocess.run([sys.executable, "benchmarks/train.py", *words], cwd=ROOT, capture_output=True, text=True,
                          timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    value = lambda name: re.search(rf"^{name} +(\S+)$", done.stdout, re.M)[1].replace(",", "")
    assert value("allocator") == "expandable_segments:True"
    vocabulary = int(re.search(r"random weights, ([\d,]+) of them", done.stdout)[1].replace(",", ""))
    layers, hidden, inner, heads, keys, width = 2, 32, 64, 2, 1, 16  # the tiny shape of the CPU form
    other = Shape(layers, hidden, inner, heads, keys, width, 0, False)
    shape = Shape(layers, hidden, inner, heads, keys, width, (vocabulary - other.parameters) // (2 * hidden), False)
    wanted = flops_per_token(shape, float(value("mean context, tokens")), frozen=True)
    assert float(value("GFLOP per real token")) == pytest.approx(wanted / 1e9, rel=1e-4)


@soak
def test_a_side_without_figures_is_a_failure():
    "The benchmark once printed \"no figures\" for both sides and ended well."
    done = subprocess.run([sys.executable, "benchmarks/train.py", "--rows", "20", "--alone", "-p", "learning_rat", "1"],
                          cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and ("no figures" in done.stdout or "learning_rat" in done.stderr)


@pytest.mark.parametrize("package", ["gigatoken", "awkward", "minijinja"])
def test_without_a_package_of_the_fast_path_the_ids_and_their_types_are_the_same(package, monkeypatch):
    "A machine of one's own may lack any of them; `fallback` says which."
    from proxy_sft.chat.encoder import ChatEncoder
    from proxy_sft.demo.tokenizer import build_demo_tokenizer
    rows = [{"messages": [{"role": "user", "content": "What is the weather in Lisbon tomorrow? Ω"},
                          {"role": "assistant", "content": "Sunny, 24 degrees."}], "tools": []}] * 3
    tokenizer = lambda: build_demo_tokenizer(["What is the weather in Lisbon tomorrow? Sunny, 24 degrees. " * 20])
    fast = ChatEncoder(tokenizer())
    wanted = fast.encode(rows)
    for name in [n for n in sys.modules if n.partition(".")[0] in (package, "gigatoken")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    slow = ChatEncoder(tokenizer())
    found = slow.encode(rows)
    assert not fast.fallback and package in slow.fallback, slow.fallback
    for name in ("ids", "trained", "offsets"):
        one, other = getattr(wanted, name), getattr(found, name)
        assert type(one) is type(other) is np.ndarray and one.dtype == other.dtype and (one == other).all(), name
