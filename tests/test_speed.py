"""What makes training fast must train the same: three seeded steps of the demo with and without, in figures that are
stated; what a checkpoint holds; what memory is counted."""
import shutil

import pytest
import torch
from safetensors.torch import load_file

from proxy_sft.core.settings import load_settings
from proxy_sft.training.checkpoints import checkpoint_facts  # noqa: F401 (loaded once, before the forks)
from trainings import logged, run_training, TINY

SMALL = dict(TINY, bf16=True, gradient_accumulation=2, control_token_turns=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A workspace for small trainings."
    return tmp_path_factory.mktemp("speed")


def trained(folder, name, **given):
    done = run_training(**{**SMALL, "workspace": str(folder), "run_name": name, **given})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder / "runs" / name


def masters(run, step):
    return torch.load(run / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["masters"]


@pytest.fixture(scope="module")
def beside(folder):
    "Trained with 16-bit weights beside a 32-bit copy."
    return trained(folder, "beside", weights="bfloat16_master")


# ---- 16-bit weights beside a 32-bit copy

def test_a_32_bit_copy_trains_as_32_bit_weights_do(folder, beside):
    """Losses within 1 %: products are the same, hidden states between layers have 16 bits instead of 32. The weights of
    both runs move together; those that are saved are the copies' rounding."""
    exact = trained(folder, "exact", weights="float32")
    assert logged(beside) == pytest.approx(logged(exact), rel=1e-2) and len(logged(beside)) == 3
    first, last = load_file(beside / "checkpoint-2" / "model.safetensors"), load_file(beside / "model.safetensors")
    assert {t.dtype for t in last.values()} == {torch.bfloat16}
    copies = {tuple(m.shape): m for m in masters(beside, 3)}
    assert {m.dtype for m in copies.values()} == {torch.float32}
    for name, weight in load_file(exact / "model.safetensors").items():
        moved, wanted = (last[name].float() - first[name].float()), weight - load_file(
            exact / "checkpoint-2" / "model.safetensors")[name]
        if weight.dim() == 2 and wanted.norm() > 0:
            assert torch.nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.8, name


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_8bit"])
def test_a_checkpoint_holds_the_copies_and_training_goes_on_to_the_same_bits(folder, beside, optimizer):
    run = beside if optimizer == "adamw_torch_fused" else trained(folder, optimizer, weights="bfloat16_master",
                                                                  optimizer=optimizer)
    whole, weights, copies = logged(run), load_file(run / "model.safetensors"), masters(run, 3)
    shutil.rmtree(run / "checkpoint-3")
    trained(folder, run.name, weights="bfloat16_master", optimizer=optimizer)
    assert logged(run) == whole
    for name, weight in load_file(run / "model.safetensors").items(): assert weight.equal(weights[name]), name
    assert all(a.equal(b) for a, b in zip(masters(run, 3), copies, strict=True))


@pytest.mark.parametrize("given, words", [
    (dict(optimizer="adamw_bf16"), "adamw_bf16, which rounds weights by chance"),
    (dict(ranks=2, deepspeed="null"), "2 ranks train without DeepSpeed"),
], ids=["chance", "ranks"])
def test_what_keeps_no_copy_is_refused(folder, given, words):
    ranks = given.pop("ranks", 1)
    done = run_training(ranks, **{**SMALL, "workspace": str(folder), "run_name": "refused", "preflight": "warn",
                                  "weights": "bfloat16_master", **given})
    assert done.returncode != 0 and words in done.stderr + done.stdout, done.stderr[-1500:]


def test_other_recipes_take_the_value_as_bfloat16():
    "One profile for all: under DeepSpeed the copy is DeepSpeed's, and adapters have 32 bits anyway."
    from proxy_sft.training.cost import keeps_master, weights_dtype
    settings = load_settings("demo", bf16=True, weights="bfloat16_master")
    adapters = settings.model_copy(update={"lora_rank": 4})
    assert keeps_master(settings, False)
    for one, divided in ((settings, True), (adapters, False)):
        assert weights_dtype(one, divided) == torch.bfloat16 and not keeps_master(one, divided)


# ---- recomputation

def test_as_few_layers_are_computed_anew_as_fit_the_card():
    "The doctor's finding says the choice, its price, and bytes that leave a tenth of the card."
    from proxy_sft.training.cost import published_config
    from proxy_sft.training.doctor import check_gpu_memory, chosen_layers
    shape, counts = published_config("Qwen/Qwen3-8B"), {}
    for profile, ranks, card in (("qwen3_8b", 1, 139.8), ("qwen3_8b", 1, 178.4), ("qwen3_8b_8gpu", 8, 79.1)):
        settings = load_settings(profile, workspace="nowhere", kernels="liger")
        found = check_gpu_memory(settings, ranks, shape, int(card * 2**30))
        assert found.level == "ok" and "computed anew" in found.text and "of a step's operations" in found.text, found
        chosen = chosen_layers(settings, ranks, shape, int(card * 2**30))[0].activation_checkpointing
        counts[profile, card] = 36 if chosen == "full" else chosen
    assert 36 > counts["qwen3_8b", 139.8] > counts["qwen3_8b", 178.4] > 0 and counts["qwen3_8b_8gpu", 79.1] < 36
    for one in (counts["qwen3_8b", 139.8] - 1,):  # one layer less would not fit
        less = load_settings("qwen3_8b", workspace="nowhere", kernels="liger", activation_checkpointing=one)
        assert check_gpu_memory(less, 1, shape, int(139.8 * 2**30)).level != "ok"


def test_only_the_first_layers_run_twice():
    from transformers import AutoModelForCausalLM, Qwen3Config
    from proxy_sft.training.cost import set_checkpointing
    model = AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=64,
                                                         num_hidden_layers=4, num_attention_heads=2,
                                                         num_key_value_heads=1, head_dim=16)).train()
    set_checkpointing(model, 3)
    runs = [0] * 4
    for place, layer in enumerate(model.model.layers):
        def count(*args, place=place): runs[place] += 1
        layer.mlp.register_forward_pre_hook(count)
    model(input_ids=torch.ones(1, 8, dtype=torch.long), use_cache=False).logits.sum().backward()
    assert runs == [2, 2, 2, 1]
