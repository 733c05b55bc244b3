"""Where the time of a micro-batch goes on this card, and whether the run's kernels are right on it.

    python benchmarks/gpu/measure.py kernels     the card's ceilings, each kernel beside a 32-bit reference and its
    time, the optimizers
    python benchmarks/gpu/measure.py layers      forward and backward of blocks of Qwen3-8B's shape with 2 and 6 layers,
    by variant; from the slope what 36 layers would do
    python benchmarks/gpu/measure.py profile     the kernels of one block, by kind and by name
    python benchmarks/gpu/measure.py demo        the project's own training on the demo, through a checkpoint and on
    from it

Run from the repository's root, with the project on PYTHONPATH. Without a GPU everything runs with small shapes, and its
times say nothing. `--seconds N` ends `layers` before a variant that would begin later. Lengths are drawn so that their
mean (864 tokens) and their mean context (about 1,800) are those of Dolci's published size; six tenths of the tokens
have a loss. Weights are random. """
import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.update(
    IN_TEST="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1"
)

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

warnings.filterwarnings("ignore")
GPU = torch.cuda.is_available()
DEVICE, GIB = torch.device("cuda" if GPU else "cpu"), 2**30
TOKENS, FEW, MORE, ALL = (32_768, 2, 6, 36) if GPU else (512, 2, 3, 4)
LOSS_SHARE = 0.6


def wait():
    if GPU: torch.cuda.synchronize()


def seconds(act, times=5, warm=2):
    "The median of some calls, each waited for."
    found = []
    for number in range(warm + times):
        wait()
        began = time.perf_counter()
        act()
        wait()
        if number >= warm: found.append(time.perf_counter() - began)
    return statistics.median(found)


def lengths(tokens, seed=0):
    "Lengths of conversations that fill a block."
    drawn, found = np.random.default_rng(seed), []
    while (left := tokens - sum(found)) > 0: found.append(int(min(left, max(16, np.exp(drawn.normal(6.4, 0.85))))))
    return found


def config(layers):
    from proxy_sft.training.cost import published_config
    made = published_config("Qwen/Qwen3-8B")
    smaller = (
        {}
        if GPU
        else dict(
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=512,
        )
    )
    return type(made)(
        **{**made.to_dict(), **smaller, "num_hidden_layers": layers, "layer_types": None, "use_cache": False}
    )


def show(*words): print(*words, flush=True)


# ---- kernels

def error(found, wanted): return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def apart(query, key, value, ends):
    "Causal attention of each row alone, in the precision of its inputs."
    parts = [
        F.scaled_dot_product_attention(
            *(t[a:b].transpose(0, 1)[None] for t in (query, key, value)), is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        for a, b in zip(ends, ends[1:])
    ]
    return torch.cat(parts)


def attention_is_right(heads=32, keys=8, width=128):
    """PyTorch's kernel for packed rows through the project's interface, forwards and backwards, beside each row alone
    in 32 bits."""
    from proxy_sft.training.attention import varlen_attention
    some = [7, 130, 64, 257, 1, 500]
    ends = np.cumsum([0, *some]).tolist()
    tensors = [torch.randn(sum(some), n, width, device=DEVICE) for n in (heads, keys, keys)]
    exact = [t.bfloat16().float().requires_grad_() for t in tensors]
    low = [t.detach().bfloat16().requires_grad_() for t in exact]
    wanted = apart(*exact, ends)
    made, _ = varlen_attention(
        None,
        *(t.transpose(0, 1)[None] for t in low),
        None,
        scaling=width**-0.5,
        cu_seq_lens_q=torch.tensor(ends, dtype=torch.int32, device=DEVICE),
        max_length_q=max(some),
    )
    slope = torch.randn_like(wanted)
    wanted.backward(slope)
    made[0].backward(slope.bfloat16())
    return [error(made[0], wanted), *(error(a.grad, b.grad) for a, b in zip(low, exact))]


def attention_is_fast(heads=32, keys=8, width=128):
    "Seconds forwards, and forwards and backwards, of a block; operations that causal attention needs."
    from proxy_sft.training.attention import varlen_attention
    some = lengths(TOKENS)
    ends, longest = torch.tensor(np.cumsum([0, *some]), dtype=torch.int32, device=DEVICE), max(some)
    rows = [
        torch.randn(1, TOKENS, n, width, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for n in (heads, keys, keys)
    ]  # as the layers lay them
    ahead = lambda: varlen_attention(None, *rows, None, scaling=width**-0.5, cu_seq_lens_q=ends, max_length_q=longest)[
        0
    ]
    slope = torch.randn(1, TOKENS, heads, width, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad(): first = seconds(ahead)
    return (
        first,
        seconds(lambda: ahead().backward(slope)),
        2 * heads * width * sum(n * n for n in some),
        len(some),
        longest,
    )


def head_is_right(tokens=64, hidden=4096, words=70_000):
    "TRL's fused loss beside the plain one in 32 bits: loss, and the slopes of hidden states and of weights."
    from trl.trainer.utils import _ChunkedLogProbFunction
    if not GPU: hidden, words = 64, 700
    states, weights = (torch.randn(n, hidden, device=DEVICE) * s for n, s in ((tokens, 1), (words, hidden ** -0.5)))
    labels, low = (
        torch.randint(words, (tokens,), device=DEVICE),
        [t.bfloat16().requires_grad_() for t in (states, weights)],
    )
    exact = [t.detach().float().requires_grad_() for t in low]
    wanted = -F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="none")
    found = _ChunkedLogProbFunction.apply(
        *low, None, labels, 1.0, 32_768, None, 1.0, ("log_probs", "entropy", "is_top1")
    )[0]
    wanted.sum().backward()
    found.sum().backward()
    return [error(found, wanted), *(error(a.grad, b.grad) for a, b in zip(low, exact))]


def liger_is_right():
    "Liger's kernels on the model: logits and slopes with them beside those without."
    from transformers.integrations.liger import apply_liger_kernel
    from proxy_sft.training.cost import tiled_loss
    from proxy_sft.training.model import LIGER
    model, batch = model_of(FEW, torch.bfloat16, "none"), block(1024 if GPU else 64)
    def outcome():
        model.zero_grad()
        loss = tiled_loss(model, batch)
        loss.backward()
        return [float(loss), *(p.grad.clone() for p in model.parameters())]
    plain = outcome()
    apply_liger_kernel(model, LIGER)
    found = outcome()
    return abs(found[0] / plain[0] - 1), statistics.median(error(a, b) for a, b in zip(found[1:], plain[1:]))


def ceilings():
    "Lines: what copies and products reach."
    size = GIB if GPU else 2**22
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    yield f"copy: {2 * size / seconds(lambda: target.copy_(source)) / 1e12:.2f} TB/s, bytes read and written"
    shapes = (
        {
            "queries, outputs": (4096, 4096),
            "keys, values": (4096, 1024),
            "gate, up": (4096, 12_288),
            "down": (12_288, 4096),
        }
        if GPU
        else {"small": (64, 64)}
    )
    for name, (inner, outer) in shapes.items():
        a, b = (
            torch.randn(TOKENS, inner, device=DEVICE, dtype=torch.bfloat16),
            torch.randn(outer, inner, device=DEVICE, dtype=torch.bfloat16),
        )
        yield (f"product {name:18} {TOKENS:,} x {inner:,} x {outer:,}: "
               f"{2 * TOKENS * inner * outer / seconds(lambda: a @ b.T) / 1e12:,.0f} TFLOP/s")
    a = torch.randn(8192 if GPU else 128, 8192 if GPU else 128, device=DEVICE, dtype=torch.bfloat16)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < (5 if GPU else 0.1):
        for _ in range(20): a @ a
        wait()
        count += 20
    yield (f"product {len(a):,} cubed, for five seconds: "
           f"{count * 2 * len(a) ** 3 / (time.perf_counter() - began) / 1e12:,.0f} TFLOP/s")


def optimizers():
    "Lines: what one step costs per billion weights, clipping beside it."
    count = 2**28 if GPU else 2**16
    for name, dtype in (
        ("adamw_8bit", torch.float32),
        ("adamw_8bit", torch.bfloat16),
        ("adamw_torch_fused", torch.float32),
        ("adamw_torch_fused", torch.bfloat16),
    ):
        weights = [torch.nn.Parameter(torch.randn(count // 8, device=DEVICE, dtype=dtype)) for _ in range(8)]
        for w in weights: w.grad = torch.randn_like(w)
        try:
            if name == "adamw_8bit":
                import bitsandbytes
                optimizer = bitsandbytes.optim.AdamW(weights, lr=1e-6, optim_bits=8)
            else: optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)
            clip = lambda some=weights: torch.nn.utils.clip_grad_norm_(some, 1.0)
            yield (f"{name:18} {str(dtype)[6:]:9} {seconds(optimizer.step, 3) / count * 1e12:7.1f} ms per billion "
                   f"weights, clipping {seconds(clip, 3) / count * 1e12:.1f}")
        except Exception as problem: yield f"{name} {dtype}: {type(problem).__name__}: {str(problem)[:200]}"
        del weights
        free()


def kernels():
    for line in ceilings(): show(line)
    free()
    if GPU:
        attempt(
            "packed attention, relative error of output and of slopes of query, key, value (below 1e-2)",
            lambda: " ".join(f"{e:.1e}" for e in attention_is_right()),
        )
        def fast():
            ahead, both, needed, rows, longest = attention_is_fast()
            return (f"{ahead * 1e3:.2f} ms forwards ({needed / ahead / 1e12:.0f} TFLOP/s), {both * 1e3:.2f} ms with "
                    f"backwards ({3.5 * needed / both / 1e12:.0f}); {rows} rows, the longest {longest:,}")
        attempt("packed attention, one layer of one block", fast)
    attempt(
        "fused loss, relative error of log-probabilities and of both slopes (below 1e-2)",
        lambda: " ".join(f"{e:.1e}" for e in head_is_right()),
    )
    for line in optimizers(): show(line)
    if GPU:
        attempt(
            "Liger on two layers: change of the loss, median change of slopes (below 2e-2)",
            lambda: "{:.1e} {:.1e}".format(*liger_is_right()),
        )


def attempt(name, act):
    try: show(f"{name}: {act()}")
    except Exception as problem: show(f"{name}: FAILED {type(problem).__name__}: {str(problem)[:600]}")
    free()


def free():
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---- layers

def model_of(layers, dtype, checkpointing, attention="auto"):
    "As the trainer makes it: random weights, the fused loss, the attention for packed rows."
    from proxy_sft.training.attention import VARLEN
    from proxy_sft.training.cost import build_model
    every = int(checkpointing.split()[1]) if checkpointing.startswith("every") else 0
    if checkpointing == "half": checkpointing = layers // 2  # the first ones
    torch.manual_seed(0)
    with DEVICE: model = build_model(config(layers), layers, dtype, "none" if every else checkpointing)
    if every: model.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    model.set_attn_implementation((VARLEN if GPU else "sdpa") if attention == "auto" else attention)
    return model


def block(tokens, seed=0):
    "One packed block, as the collator gives it."
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    from proxy_sft.training.attention import block as packed
    drawn = np.random.default_rng(seed)
    batch = packed(
        [drawn.integers(0, 500, n) for n in lengths(tokens, seed)],
        DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True),
    )
    batch["labels"][
        torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(seed)) > LOSS_SHARE
    ] = -100
    return {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in batch.items()}


def round_once(model):
    "Each norm's output is rounded for all the layers that read it, not by each of them."
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(
                lambda module, given, made: (
                    made.to(torch.get_autocast_dtype(DEVICE.type)) if torch.is_autocast_enabled(DEVICE.type) else made
                )
            )


def change_layers(model, layers, words):
    "32-bit gradients as beside a master copy; 8-bit products where a layer is neither first nor last; compiled layers."
    from proxy_sft.training.compiled_layers import compile_layers
    from proxy_sft.training.fp8 import compute_in_fp8, RECIPES
    if "master" in words:
        for weights in model.parameters(): weights.grad_dtype = torch.float32
    for matmul in {*words} & {*RECIPES}:
        if layers > 2: compute_in_fp8(model, matmul)
    # without a GPU the recorded layer is played back: a C++ compiler takes minutes
    if "compiled" in words: compile_layers(model, "inductor" if GPU else "eager")


def cost_of(layers, dtype, tokens, checkpointing, liger, attention, change):
    "Seconds and peak bytes of a micro-batch after the first, and how much of it is forwards."
    from transformers.integrations.liger import apply_liger_kernel
    from proxy_sft.training.cost import tiled_loss
    from proxy_sft.training.model import LIGER
    model = model_of(layers, dtype, checkpointing, attention)
    if liger: apply_liger_kernel(model, LIGER)
    if change == "round once": round_once(model)
    change_layers(model, layers, change.split())
    batch, mixed = (
        block(tokens),
        (lambda: torch.autocast(DEVICE.type, torch.bfloat16, cache_enabled=change == "cache")),
    )
    def ahead():
        with mixed(): return tiled_loss(model, batch) / tokens
    ahead().backward()  # gradients exist from here on
    if GPU: torch.cuda.reset_peak_memory_stats()
    with torch.no_grad(): first = seconds(ahead, 2, 1)
    both = seconds(lambda: ahead().backward(), 3, 1)
    return both, torch.cuda.max_memory_allocated() if GPU else 0, first


VARIANTS = [  # weights, tokens per block, recomputed, Liger, attention, change
    (torch.float32, TOKENS, "full", False, "auto", ""),
    (torch.float32, TOKENS, "full", True, "auto", ""),  # the profile qwen3_8b
    (torch.bfloat16, TOKENS, "full", True, "auto", ""),
    (torch.bfloat16, TOKENS, "none", True, "auto", ""),
    (torch.bfloat16, TOKENS // 4, "none", True, "auto", ""),
    (torch.float32, TOKENS, "full", True, "auto", "round once"),
    (torch.float32, TOKENS, "full", True, "auto", "cache"),
    (torch.float32, TOKENS, "selective", True, "auto", ""),
    (torch.bfloat16, TOKENS // 2, "none", True, "auto", ""),
    (torch.bfloat16, TOKENS, "every 2", True, "auto", ""),
    (torch.float32, TOKENS // 4, "none", True, "auto", ""),
    (torch.bfloat16, TOKENS, "full", True, "flex_attention", ""),
    (torch.bfloat16, TOKENS, "full", False, "auto", "master compiled"),
    (torch.bfloat16, TOKENS, "full", False, "auto", "master compiled fp8"),
    (torch.bfloat16, TOKENS, "full", False, "auto", "master compiled fp8_tensorwise"),
    (torch.bfloat16, TOKENS, "half", True, "auto", "master"),
    (torch.bfloat16, TOKENS // 4, "none", False, "auto", "master compiled fp8"),
    (torch.bfloat16, TOKENS, "full", True, "auto", "master fp8"),
]


def layers_table(limit):
    from proxy_sft.training.cost import Shape, flops_per_token, mean_context, peak_flops
    peak, began, rows = (peak_flops(torch.cuda.get_device_name()) if GPU else None), time.monotonic(), []
    show(
        f"{'weights':9}{'block':>7} "
        f"{'recomputed':11}{'kernels':8}{'attention':15}{'':31}{'ms/layer':>9}{'rest, ms':>9}{'forward':>8}"
        f"{'tokens/s at ' + str(ALL):>15}{'MFU':>7}{'GiB at ' + str(ALL):>11}"
    )
    for dtype, tokens, checkpointing, liger, attention, change in VARIANTS:
        name = (f"{str(dtype)[6:]:9}{tokens:7,} "
                f"{checkpointing:11}{'liger' if liger else 'none':8}"
                f"{attention if attention != 'auto' else 'torch_varlen' if GPU else 'sdpa':15}{change:31}")
        if time.monotonic() - began > limit:
            show(f"{name} not begun: {limit:.0f} seconds are over")
            continue
        if "fp8" in change and not find_spec("torchao"):
            show(f"{name} left out: torchao is not installed")
            continue
        if not GPU and (liger or attention == "flex_attention"): liger, attention = False, "auto"
        try:
            few = cost_of(FEW, dtype, tokens, checkpointing, liger, attention, change)
            free()
            more = cost_of(MORE, dtype, tokens, checkpointing, liger, attention, change)
        except Exception as problem:
            show(f"{name} FAILED {type(problem).__name__}: {str(problem)[:300]}")
            free()
            continue
        free()
        each, share = (more[0] - few[0]) / (MORE - FEW), more[2] / more[0]
        at_all, shape = few[0] + (ALL - FEW) * each, Shape.of(config(ALL))
        speed, flops = tokens / at_all, flops_per_token(shape, mean_context(lengths(tokens)))
        states = 2 * shape.parameters + 6 * shape.vocabulary * shape.hidden  # 8 bits each, but 32 for the embedding
        memory = (few[1] + (ALL - FEW) * (more[1] - few[1]) / (MORE - FEW) + states) / GIB
        rows.append(
            dict(
                weights=str(dtype),
                tokens=tokens,
                recomputed=checkpointing,
                liger=liger,
                attention=attention,
                change=change,
                few=few,
                more=more,
                tokens_per_second=speed,
                mfu=speed * flops / peak if peak else None,
                gib=memory,
            )
        )
        show(
            f"{name}{each * 1e3:9.1f}{(few[0] - FEW * each) * 1e3:9.1f}{share:8.0%}{speed:15,.0f}"
            f"{f'{speed * flops / peak:7.1%}' if peak else '      -'}{memory:11.1f}"
        )
    if out := os.environ.get("OUT"): Path(out, "layers.json").write_text(json.dumps(rows))


# ---- profile

KINDS = (
    ("attention", ("flash", "fmha", "flex")),
    ("loss", ("_forward_kernel", "_backward_kernel")),
    ("norm", ("rms_norm",)),
    ("feed-forward", ("swiglu", "silu")),
    ("positions", ("rope",)),
    ("products", ("gemm", "nvjet", "cutlass", "cublas", "xmma")),
    ("copies and casts", ("copy", "memcpy", "memset", "fill")),
    ("element by element", ("elementwise", "vectorized", "reduce")),
)


def profile():
    "One block of the profile's recipe, and of 16-bit weights without recomputation."
    from torch.profiler import ProfilerActivity, profile as recording
    from transformers.integrations.liger import apply_liger_kernel
    from proxy_sft.training.cost import autocast, tiled_loss
    from proxy_sft.training.model import LIGER
    for dtype, checkpointing in ((torch.float32, "full"), (torch.bfloat16, "none")):
        model, batch = model_of(MORE, dtype, checkpointing), block(TOKENS)
        if GPU: apply_liger_kernel(model, LIGER)
        def step(model=model, batch=batch):
            with autocast(DEVICE.type): loss = tiled_loss(model, batch) / TOKENS
            loss.backward()
        step()
        wait()
        with recording(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]) as seen:
            step()
            wait()
        spent = {}
        for event in seen.events():
            if GPU and str(event.device_type).endswith("CUDA") and not getattr(event, "is_user_annotation", False):
                spent.setdefault(event.name, []).append(event.device_time_total)
            elif not GPU: spent.setdefault(event.name, []).append(event.self_cpu_time_total)
        total = sum(map(sum, spent.values())) or 1
        by_kind = {}
        for name, times in spent.items():
            # a Triton kernel of Liger's norm ends like the loss's: the longer name first
            kind = next(
                (
                    k
                    for k, words in (KINDS[2], KINDS[3], KINDS[0], KINDS[4], KINDS[1], *KINDS[5:])
                    if any(w in name.lower() for w in words)
                ),
                "other",
            )
            by_kind[kind] = by_kind.get(kind, 0) + sum(times)
        show(
            f"\n{str(dtype)[6:]} weights, {checkpointing} recomputed, {MORE} layers, {TOKENS:,} tokens: "
            f"{total / 1e3:,.1f} ms of kernels"
        )
        for kind, found in sorted(by_kind.items(), key=lambda pair: -pair[1]):
            show(f"  {kind:20}{found / total:7.1%}{found / 1e3:10.2f} ms")
        for name, times in sorted(spent.items(), key=lambda pair: -sum(pair[1]))[:14]:
            show(f"    {sum(times) / 1e3:9.2f} ms {len(times):5} x {name[:110]}")
        del model, batch, seen
        free()


# ---- the project's own training

def demo():
    "Some recipes on the demo: the losses, the speed record, and the same losses after a start from a checkpoint."
    from proxy_sft.core.settings import load_settings
    from proxy_sft.train import train
    small = dict(
        profile="demo",
        demo_rows=400,
        max_train_samples=200,
        max_eval_samples=4,
        max_length=1024,
        max_steps=6,
        save_steps=3,
        eval_steps=3,
        logging_steps=1,
        gradient_accumulation=2,
        num_proc=2,
        report_to=[],
        preflight="warn",
        gpu_hour_price=1.0,
        control_token_turns=2,
    )
    if GPU: small |= dict(device="auto", bf16=True, attention="auto", dataloader_workers=2)
    recipes = {"32-bit weights": dict(activation_checkpointing="selective", optimizer="adamw_torch_fused")}
    if GPU:
        recipes |= {
            "the profile's": dict(activation_checkpointing="full", optimizer="adamw_8bit"),
            "16-bit weights": dict(weights="bfloat16", optimizer="adamw_8bit", activation_checkpointing="full"),
            "a copy, compiled": dict(weights="bfloat16_master", optimizer="adamw_8bit", compile="layers",
                                     activation_checkpointing=1),
            "adapters": dict(lora_rank=8, optimizer="adamw_torch_fused"),
            "adapters on 4 bits": dict(lora_rank=8, quantize="nf4", optimizer="adamw_torch_fused"),
        }
    with tempfile.TemporaryDirectory() as folder:
        for name, more in recipes.items():
            began, settings = (
                time.monotonic(),
                load_settings(
                    **{**small, **more, "workspace": folder, "run_name": name.replace(" ", "-").replace("'", "")}
                ),
            )
            try:
                first, run = train(settings), settings.run_dir
                losses = [r["loss"] for r in first.log if "loss" in r]
                shutil.rmtree(run / "checkpoint-6")
                again = [r["loss"] for r in train(settings).log if "loss" in r]
                facts = (
                    json.loads((run / "checkpoint-6" / "manifest.json").read_text())
                    if (run / "checkpoint-6" / "manifest.json").is_file()
                    else {}
                )
                gap = max(abs(a - b) / abs(a) for a, b in zip(losses, again))
                show(
                    f"demo, {name}: losses {' '.join(f'{x:.3f}' for x in losses)}; after a start from step 3 they "
                    f"differ by {gap:.1e}; {facts.get('speed', {}).get('attention')}, kernels "
                    f"{facts.get('speed', {}).get('kernels')}; {time.monotonic() - began:.0f} s"
                )
                show(f"  why: {facts.get('speed', {}).get('attention_why')}")
            except BaseException as problem: show(f"demo, {name}: FAILED {type(problem).__name__}: "
                                                  f"{str(problem)[:1200]}")
            free()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["kernels", "layers", "profile", "demo"])
    parser.add_argument("--seconds", type=float, default=200)
    args = parser.parse_args()
    if args.what == "layers": layers_table(args.seconds)
    else: globals()[args.what]()


if __name__ == "__main__": main()
