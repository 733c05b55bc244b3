"""The kit for a borrowed GPU machine, in its form for a machine without one, so that it fits the library of today."""
import subprocess
import sys
from pathlib import Path

import pytest

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
