"""What makes training fast must train the same: three seeded steps of the demo with and without, in figures that are
stated; what a checkpoint holds; what memory is counted."""
import os
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from long_form import soak
from proxy_sft.core.settings import load_settings
from proxy_sft.demo.model import write_demo_model
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
    eight = [("qwen3_8b_8gpu", 8, 79.1)] if os.environ.get("PROXY_SFT_SOAK") else []
    for profile, ranks, card in [("qwen3_8b", 1, 139.8), ("qwen3_8b", 1, 178.4), *eight]:
        settings = load_settings(profile, workspace="nowhere", kernels="liger")
        found = check_gpu_memory(settings, ranks, shape, int(card * 2**30))
        assert found.level == "ok" and "computed anew" in found.text and "of a step's operations" in found.text, found
        chosen = chosen_layers(settings, ranks, shape, int(card * 2**30))[0].activation_checkpointing
        counts[profile, card] = 36 if chosen == "full" else chosen
    assert 36 > counts["qwen3_8b", 139.8] > counts["qwen3_8b", 178.4] > 0
    assert all(counts[profile, card] < 36 for profile, ranks, card in eight)
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


# ---- products in 8 bits, compiled layers

FP8 = pytest.mark.skipif(not find_spec("torchao"), reason="torchao is not installed")


@pytest.fixture(scope="module")
def four_layers(folder):
    "The demo's model with two layers that are neither the first nor the last."
    return str(write_demo_model(folder / "four", n=200, num_hidden_layers=4))


def moves(run, last):
    "What the last step did to each weight's 32-bit copy."
    return [(a - b).flatten() for a, b in zip(masters(run, last), masters(run, last - 1)) if a.dim() == 2]


@FP8
@pytest.mark.parametrize("matmul", ["fp8", "fp8_tensorwise"])
def test_products_in_8_bits_train_nearly_the_same_and_leave_ordinary_weights(folder, four_layers, matmul):
    "Losses of three steps within 1 %. What is saved has the same names, shapes and precision; a resume is exact."
    recipe = dict(weights="bfloat16_master", model=four_layers)
    usual, run = (trained(folder, name, matmul=name, **recipe) for name in ("bf16", matmul))
    assert logged(run) == pytest.approx(logged(usual), rel=1e-2) and logged(run) != logged(usual)
    for name in ("model.safetensors", "checkpoint-2/model.safetensors"):
        one, other = (load_file(folder / name) for folder in (usual, run))
        assert {n: (t.shape, t.dtype) for n, t in one.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}
    assert (usual / "config.json").read_bytes() == (run / "config.json").read_bytes()
    losses, copies = logged(run), masters(run, 3)
    shutil.rmtree(run / "checkpoint-3")
    trained(folder, run.name, matmul=matmul, **recipe)
    assert logged(run) == losses and all(a.equal(b) for a, b in zip(masters(run, 3), copies, strict=True))


@FP8
@soak
@pytest.mark.parametrize("matmul", ["fp8", "fp8_tensorwise"])
@pytest.mark.parametrize("recipe", [
    dict(weights="float32"), dict(weights="bfloat16"), dict(activation_checkpointing="full"),
    dict(activation_checkpointing="selective"), dict(deepspeed="ds_config_zero2.json", ranks=2)],
    ids=["float32", "bfloat16", "full", "selective", "zero2"])
def test_products_in_8_bits_fit_every_recipe(folder, four_layers, matmul, recipe):
    ranks, given = recipe.get("ranks", 1), {n: v for n, v in recipe.items() if n != "ranks"}
    losses = []
    for name in ("bf16", matmul):
        run = f"{name}-{'-'.join(map(str, recipe.values()))}".replace(".json", "")
        done = run_training(ranks, **{**SMALL, "workspace": str(folder), "run_name": run, "model": four_layers,
                                      "matmul": name, **given})
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert ("Products in 8 bits" in done.stdout) == (name != "bf16")
        losses.append(logged(folder / "runs" / run))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and losses[0] != losses[1]


@FP8
@soak
@pytest.mark.parametrize("matmul", ["fp8", "fp8_tensorwise"])
def test_two_hundred_steps_in_8_bits_end_where_16_bits_end(folder, four_layers, matmul):
    "The mean of the last twenty losses, and the held-out loss, within 3 % of those in 16 bits."
    long = dict(model=four_layers, weights="bfloat16_master", max_steps=200, save_steps=200, eval_steps=200,
                demo_rows=2000, max_train_samples=1500, max_eval_samples=32, max_length=512, gradient_accumulation=1,
                learning_rate=1e-3)
    ends = {}
    for name in ("bf16", matmul):
        run = trained(folder, f"long-{name}", matmul=name, **long)
        losses, held = logged(run), logged(run, "eval_loss")
        ends[name] = (sum(losses[-20:]) / 20, held[-1])
        apart = max(abs(a / b - 1) for a, b in zip(losses, logged(folder / "runs" / "long-bf16")))
        print(f"{name}: first {losses[0]:.4f}, last twenty {ends[name][0]:.4f}, held out {held[0]:.4f} {held[-1]:.4f}; "
              f"furthest apart {apart:.3f}")
    assert ends[matmul] == pytest.approx(ends["bf16"], rel=3e-2) and ends["bf16"][1] < 0.5 * held[0]


@pytest.mark.parametrize("given, words", [
    (dict(matmul="fp8", lora_rank=8), "frozen weights"), (dict(matmul="fp8", bf16=False), "bf16 is false"),
    (dict(matmul="fp8", deepspeed="ds_zero3.json"), "divides weights (ZeRO-3)"),
    (dict(compile="layers", activation_checkpointing="selective"), "needs single operators"),
    (dict(compile="layers", kernels="liger"), "kernels is liger"),
    (dict(compile="layers", deepspeed="ds_zero3.json"), "gathers weights inside a layer"),
    (dict(compile="layers", lora_rank=8), "not compiled"),
], ids=str)
def test_what_8_bits_and_compiled_layers_cannot_do_is_refused_by_doctor_and_trainer(given, words):
    "All at once, in one error, before a model is loaded."
    from proxy_sft.training.compiled_layers import require_layers
    from proxy_sft.training.model import ModelError
    from proxy_sft.training.settings_checks import check_layers
    settings = load_settings("demo", **{"bf16": True, "device": "cpu", **given})
    with pytest.raises(ModelError) as raised: require_layers(settings)
    assert words in str(raised.value)
    assert [f.text for f in check_layers(settings) if f.level == "fail"] == [str(raised.value)]


@pytest.mark.parametrize("matmul, capability, fine", [
    ("fp8", (9, 0), True), ("fp8", (8, 9), False), ("fp8_tensorwise", (8, 9), True), ("fp8_tensorwise", (8, 0), False)])
def test_8_bits_need_a_card_that_has_them(matmul, capability, fine):
    from proxy_sft.training.fp8 import fp8_problem
    problem = fp8_problem(load_settings("qwen3_8b", matmul=matmul), capability)
    assert ("capability" in problem) != fine and ("torchao" in problem) == (not find_spec("torchao"))


@FP8
@pytest.mark.parametrize("matmul", ["fp8", "fp8_tensorwise"])
def test_rounding_to_8_bits_is_counted(matmul):
    "On tensors without content, through the very operators of a GPU: the count is a bound, and not a loose one."
    from contextlib import nullcontext
    from torch._subclasses import FakeTensorMode
    from torchao.float8 import convert_to_float8_training
    from transformers import Qwen3Config
    from proxy_sft.training.cost import AllocationMeter, build_model, one_pass, rounding_parts, Shape
    from proxy_sft.training.fp8 import inner_linears, recipe
    config = Qwen3Config(vocab_size=256, hidden_size=256, intermediate_size=8192, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    def peak(low):
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = build_model(config, 4, torch.bfloat16, "full")
            names = inner_linears(model) if low else set()
            convert_to_float8_training(model, config=recipe(matmul, emulate=False),
                                       module_filter_fn=lambda part, name: name in names)
            for weights in model.parameters(): weights.grad = torch.zeros_like(weights)
            with AllocationMeter([t for p in model.parameters() for t in (p.data, p.grad)]) as meter:
                static = meter.live
                one_pass(model, 512, nullcontext())
        return meter.peak - static
    settings = load_settings("demo", bf16=True, matmul=matmul, max_length=512, batch_size=1)
    counted = rounding_parts(Shape.of(config), settings)["8-bit rounding"]
    assert 0.7 * counted < peak(True) - peak(False) <= counted


def gradients_in_8_bits(compiled, lengths, between):
    "32-bit gradients of a small model with 16-bit weights after some blocks."
    from transformers import AutoModelForCausalLM, Qwen3Config
    from proxy_sft.training.compiled_layers import compile_layers
    from proxy_sft.training.fp8 import compute_in_fp8
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16), dtype=torch.bfloat16).train()
    for weight in model.parameters(): weight.grad_dtype = torch.float32
    compute_in_fp8(model, "fp8")
    if compiled: compile_layers(model, "eager")
    for length in lengths:
        ids = torch.arange(length)[None]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if between: # another form of the layers, while gradients are there
            with torch.no_grad(): model(input_ids=ids, use_cache=False)
    return [weight.grad for weight in model.parameters()]


@FP8
@pytest.mark.parametrize("lengths, between", [((41, 9, 16, 50), False), pytest.param((16, 9), True, marks=soak)],
                         ids=["lengths", "forms"])
def test_layers_in_8_bits_are_compiled_whatever_the_lengths_and_give_the_same(lengths, between):
    """One form for layers in 8 bits, one for the others. PyTorch 2.13's compiler raises where it sees a 16-bit weight
    with a 32-bit gradient through a view: a form that was compiled late would have ended the run."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    pairs = zip(*(gradients_in_8_bits(compiled, lengths, between) for compiled in (True, False)))
    assert all(one.equal(other) and one.dtype == torch.float32 for one, other in pairs)
    assert between or counters["stats"]["unique_graphs"] == 2


@soak
@pytest.mark.parametrize("kind", ["none", "full", 2])
def test_compiled_layers_train_the_same(folder, four_layers, kind):
    "Losses of three steps within 0.1 % in bfloat16, where a fused chain is rounded once instead of at each operation."
    recipe = dict(model=four_layers, weights="bfloat16_master", activation_checkpointing=kind)
    usual, run = (trained(folder, f"compile-{name}-{kind}", compile=name, **recipe) for name in ("false", "layers"))
    assert logged(run) == pytest.approx(logged(usual), rel=1e-3)
    assert set(load_file(run / "model.safetensors")) == set(load_file(usual / "model.safetensors"))
