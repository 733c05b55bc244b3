"""Profiles as a user meets them before anything is downloaded, and what the doctor counts beside what training allocates."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from proxy_sft import commands
from proxy_sft.settings import load_settings, profile_names, yaml_scalar

ROOT, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    "A workspace in which nothing was downloaded."
    return tmp_path_factory.mktemp("empty")


@pytest.mark.parametrize("profile", profile_names())
def test_every_profile_is_told_by_a_dry_run(profile, outside, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = load_settings(profile)
    ranks = 8 if "8gpu" in profile or profile == "upstream" else 1
    words = ["run", "nbs/02_train.ipynb", "--nproc", str(ranks), "-p", "profile", profile, "-p", "workspace", str(outside / profile), "--dry-run"]
    assert commands.main(words) == 0
    said, started = capsys.readouterr().out, list(outside.iterdir())
    assert not started, f"a dry run made {started}"
    for name in ("learning_rate", "max_length", "optimizer", "epochs"): assert f"| `{name}` | `{yaml_scalar(getattr(settings, name))}`" in said
    assert ("torch.distributed.run" in said) == (ranks > 1 or profile == "qwen3_8b_80gb")
    findings = [line for line in said.split("doctor:\n")[1].splitlines() if line]
    assert all(line[:4].strip() in ("ok", "warn", "fail") for line in findings), findings
    told = lambda about: next((line for line in findings if line[6:].startswith(f"{about}:")), "")
    if settings.is_demo: assert told("model").startswith("ok") and "when the run starts" in told("model")
    else:
        assert told("model").startswith("warn") and "not downloaded yet" in told("model") and "00_download" in told("model")
        assert "GiB on each device: weights" in told("memory") and "takes" in told("disk") and "tokens to train" in told("time") and "not converted yet" in told("data")
    assert told("versions") and told("devices") and told("open files") and told("terminal")


def test_big_profiles_fit_their_cards_by_the_doctors_count():
    from proxy_sft.cost import published_config
    from proxy_sft.doctor import look_at_memory
    shape = published_config("Qwen/Qwen3-8B")
    for profile, ranks, card in (("qwen3_8b", 1, 139.8), ("qwen3_8b_80gb", 1, 79.1), ("qwen3_8b_8gpu", 8, 79.1), ("upstream", 8, 79.1)):
        found = look_at_memory(load_settings(profile, workspace="nowhere"), ranks, shape, int(card * 2**30))
        assert found.level == "ok", (profile, found)
    small = look_at_memory(load_settings("qwen3_8b", workspace="nowhere"), 1, shape, int(79.1 * 2**30))
    assert small.level == "fail" and "ds_zero2_offload.json" in small.advice and "-p weights bfloat16" in small.advice


def test_tokens_per_step_are_those_of_the_public_recipe():
    for profile, ranks in (("qwen3_8b", 1), ("qwen3_8b_80gb", 1), ("qwen3_8b_8gpu", 8)):
        s = load_settings(profile)
        assert ranks * s.batch_size * s.gradient_accumulation * s.max_length == 2**20 and (s.learning_rate, s.adam_beta2, s.max_length) == (8e-5, 0.95, 32_768)
