"""Training speed of this project's recipe and of the recipe that users come from, on the same conversations, in one
run.

    python benchmarks/train.py [--record] [--rows N] [--steps N] [--layers N] [--accumulation N] [--minutes N] [-p NAME
    VALUE] [--upstream NAME VALUE] [--alone]

On a GPU: Qwen3-8B's real shape with random weights, with as many of its 36 layers as the doctor's count lets fit
(`--layers` sets their number; the table says it). What is known is printed at once, and a side that fails or takes
longer than `--minutes` is told with its last words and does not lose the other (the exit code is then 1). Without one:
the same code from end to end with a tiny model, whose speeds say nothing about a GPU; what needs none, padding and
packing, is exact. Both sides are the project's own: `load_settings` on the profiles `qwen3_8b` and `upstream`,
`prepare`, `build_trainer`, each in a process of its own. `-p` changes a setting on both sides, `--upstream` on the
other side alone, `--alone` leaves the other side out: to fit a card, both sides get the optimizer and the precision of
weights of ours.

The conversations are drawn as in benchmarks/prepare.py: lengths as in Dolci-Instruct-SFT as far as its published size
tells (2,152,112 rows, 227,579 with tools, 3.3 KB each on average, a long tail), text of the installed packages, the
tokenizer Qwen3-8B's where `../shared/qwen3-8b` exists. They are no rows of Dolci.

- real tokens: tokens of conversations; padding is not counted, and a token that was cut off neither.
- MFU: real tokens per second x operations per real token (six per weight in a matrix, causal attention over the token's
  own conversation, nothing for recomputation) / the card's dense bfloat16 peak, named in the table. On a CPU no peak is
  known, so there is none.
- peak memory: `torch.cuda.max_memory_allocated`; on the CPU what the process held at most, beyond what it held before
  the model was loaded.
- the split of a step is measured in one further step, in which the device is waited for at each border; speeds come
  from steps without that.

`--record` appends the output with date, machine, versions and command to benchmarks/RESULTS.md.
"""
import os

os.environ.update(IN_TEST="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "qwen3-8b"


def arguments():
    "What the command line says."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="append to benchmarks/RESULTS.md")
    parser.add_argument("--rows", type=int, default=20_000, help="conversations")
    parser.add_argument(
        "--steps",
        type=int,
        default=3,
        help="measured optimizer steps of our side; the other side makes five times as many, its steps are smaller",
    )
    parser.add_argument("--layers", type=int, help="layers of the model; when not given, as many as fit")
    parser.add_argument(
        "--minutes", type=float, default=60, help="limit for each side, its preparation included (default: 60)"
    )
    parser.add_argument(
        "--accumulation",
        type=int,
        help="micro-batches per step on our side (default: 8 on a GPU, 2 without; the profile has 32, which makes the "
             "optimizer's share smaller)",
    )
    for name in ("-p", "--upstream"):
        parser.add_argument(
            name,
            nargs=2,
            action="append",
            default=[],
            metavar=("NAME", "VALUE"),
            help="a setting: both sides, the other side",
        )
    parser.add_argument("--alone", action="store_true", help="this project's side only")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # in a process of its own: a folder with side.json
    return parser.parse_args()


# ---- the conversations and the model

def write_inputs(folder, args, gpu):
    "Conversations and a model of random weights; what they are, in a line."
    sys.path.insert(0, str(Path(__file__).parent))
    from prepare import Text, draw_converted, hashes
    import orjson
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from proxy_sft.training.cost import published_config
    from proxy_sft.demo.tokenizer import build_demo_tokenizer
    text, chance = Text(), random.Random(1)
    converted = converted_folder(folder)
    converted.mkdir(parents=True)
    for split, count in (("heldout", 2), ("train", args.rows)):
        with (converted / f"{split}.jsonl").open("wb") as file:
            for number in range(count): file.write(orjson.dumps(draw_converted(number, chance, text)) + b"\n")
    report = {"rows": args.rows + 2, "kept": args.rows + 2, "heldout": 2, "rejected": {}, "repaired": {}, "flags": {},
              "by_source": {"generated": {"rows": args.rows + 2}}, "files": hashes([*converted.glob("*.jsonl")])}
    (converted / "report.json").write_text(json.dumps(report))  # as a conversion that had written these files
    real = (SHARED / "tokenizer.json").is_file()
    small = build_demo_tokenizer([text.take(2_000_000)])
    counting = AutoTokenizer.from_pretrained(SHARED) if real else small
    tokenizer = counting if gpu else small  # a vocabulary of 151,936 would be all that a CPU does
    config = published_config("Qwen/Qwen3-8B")
    smaller = (
        {}
        if gpu
        else dict(
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            vocab_size=len(tokenizer),
        )
    )
    layers = args.layers or (layers_that_fit(args) if gpu else 2)
    config = AutoConfig.for_model(**{**config.to_dict(), **smaller, "num_hidden_layers": layers, "layer_types": None})
    torch.manual_seed(0)
    with torch.device("cuda" if gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if gpu else torch.float32)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    shape = f"Qwen3-8B's shape, {layers} of 36 layers" if gpu else f"a tiny shape ({layers} layers of width 32)"
    counting.save_pretrained(folder / "counting")
    return (
        f"{args.rows:,} generated conversations in Dolci's length mix, lengths in tokens of "
        f"{'Qwen3-8B' if real else 'the demo'}'s tokenizer; "
        f"{shape}, random weights, {sum(p.numel() for p in model.parameters()):,} of "
        f"them{'' if gpu else ', trained on 500 of the conversations with a small tokenizer'}"
    )


def converted_folder(folder):
    "Where a conversion of `rows.jsonl` would lie."
    from proxy_sft.core.settings import load_settings
    return load_settings("qwen3_8b", workspace=str(folder), dataset=str(folder / "rows.jsonl")).converted_dir


def layers_that_fit(args):
    """The most layers of Qwen3-8B of which a step of our side fits the card with a tenth to spare, by the doctor's
    count."""
    import torch
    from proxy_sft.training.cost import memory_parts, published_config
    from proxy_sft.core.settings import load_settings
    settings, card = (
        load_settings("qwen3_8b", deepspeed="null", **{name: parsed(value) for name, value in args.p}),
        torch.cuda.get_device_properties(0).total_memory,
    )
    for layers in (36, 32, 28, 24, 20, 16, 12, 8, 4):
        config = published_config("Qwen/Qwen3-8B")
        config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
        if sum(memory_parts(config, settings).values()) < 0.9 * card: return layers
    return 2


def lengths_of(folder):
    "Tokens of each conversation."
    import numpy as np
    import orjson
    from transformers import AutoTokenizer
    from proxy_sft.chat.encoder import ChatEncoder
    encoder, found = ChatEncoder(AutoTokenizer.from_pretrained(folder / "counting")), []
    with (converted_folder(folder) / "train.jsonl").open("rb") as file:
        rows = [orjson.loads(line) for line in file]
    for at in range(0, len(rows), 1000): found.append(np.diff(encoder.encode(rows[at:at + 1000]).offsets))
    return np.concatenate(found)


def sides(folder, args, gpu):
    "Settings of both sides by name, as load_settings takes them."
    accumulation = args.accumulation or (8 if gpu else 2)
    both = dict(
        workspace=str(folder),
        model=str(folder / "model"),
        dataset=str(folder / "rows.jsonl"),
        deepspeed="null",
        max_eval_samples=1,
        eval_steps="null",
        report_to=[],
        save_steps=10**9,
        dataloader_workers=2 if gpu else 0,
        preflight="warn",
        learning_rate=1e-6,
    )
    if not gpu:
        both |= dict(
            device="cpu",
            bf16=False,
            max_length=1024,
            num_proc=1,
            max_train_samples=500,
            activation_checkpointing="none",
            attention="sdpa",
            optimizer="adamw_torch_fused",
        )
    else: both |= dict(optimizer=load("qwen3_8b").optimizer, weights=load("qwen3_8b").weights)
    both |= {name: parsed(value) for name, value in args.p}
    ours = {
        **both,
        "profile": "qwen3_8b",
        "run_name": "ours",
        "gradient_accumulation": accumulation,
        "max_steps": args.steps + 2,
    }
    ours |= {name: parsed(value) for name, value in args.p}
    other = {
        **both,
        "profile": "upstream",
        "run_name": "upstream",
        "max_steps": 5 * args.steps + 2,
        **{name: parsed(value) for name, value in args.upstream},
    }
    return {"this project": ours} if args.alone else {"this project": ours, "upstream": other}


def load(profile):
    from proxy_sft.core.settings import load_settings
    return load_settings(profile)


def parsed(value):
    "As papermill reads a value of -p."
    import yaml
    return yaml.safe_load(value)


# ---- one side, in a process of its own

class Clock:
    "Seconds of the parts of a step; the device is waited for at each border while `on`."
    def __init__(self, cuda): self.cuda, self.on, self.spent = cuda, False, {}

    def wait(self):
        if self.cuda:
            import torch
            torch.cuda.synchronize()

    def around(self, name, call):
        "The same call, measured under a name."
        def measured(*args, **kwargs):
            if not self.on: return call(*args, **kwargs)
            self.wait()
            began = time.perf_counter()
            found = call(*args, **kwargs)
            self.wait()
            self.spent[name] = self.spent.get(name, 0) + time.perf_counter() - began
            return found
        return measured


def run_side(folder):
    "Train one side, and leave what was measured in `result.json`."
    import torch
    from transformers import TrainerCallback
    from proxy_sft.training.checkpoints import checkpoint_facts
    from proxy_sft.training.cost import flops_per_token, peak_flops, Shape, utilisation
    from proxy_sft.training.doctor import device_name
    from proxy_sft.tokens.preparation import prepare
    from proxy_sft.core.settings import load_settings
    from proxy_sft.training.run import keep_memory_whole, start_processes
    from proxy_sft.training.trainer import build_trainer
    settings = load_settings(**json.loads((folder / "side.json").read_text()))
    keep_memory_whole()  # as `train` does, before the first use of a GPU
    prepared = prepare(settings, lambda settings: None)  # the conversations are generated as converted rows
    start_processes(settings)
    before = resident("VmRSS")
    trainer = build_trainer(settings, prepared, checkpoint_facts(settings, prepared.key, 1), resumed=True)
    trainer.args.save_strategy = trainer.args.eval_strategy = "no"
    cuda, counted = (
        trainer.args.device.type == "cuda",
        dict(tokens=0, squares=0, computed=0, began=0.0, seconds=0.0, steps=0),
    )
    clock = Clock(cuda)

    class Measure(TrainerCallback):
        "The first step warms up, the last is split; those between are measured whole."
        def on_step_begin(self, args, state, control, **kw):
            if state.global_step == 1:
                clock.wait()
                if cuda: torch.cuda.reset_peak_memory_stats()
                counted["began"] = time.perf_counter()
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == state.max_steps - 1:
                clock.wait()
                counted["seconds"], counted["steps"] = time.perf_counter() - counted["began"], state.global_step - 1
                counted["peak"] = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - before
                clock.on, counted["began"] = True, time.perf_counter()
            if state.global_step == state.max_steps:
                clock.on, clock.spent["step"] = False, time.perf_counter() - counted["began"]

    def count(model, inputs, *args, **kwargs):
        if 1 <= trainer.state.global_step and not clock.on:
            ends, mask = inputs.get("cu_seq_lens_q"), inputs.get("attention_mask")
            lengths = (ends.diff() if ends is not None else mask.sum(-1)).double()
            counted["tokens"] += float(lengths.sum())
            counted["squares"] += float((lengths ** 2).sum())
            counted["computed"] += inputs["input_ids"].numel()
        return stepped(model, inputs, *args, **kwargs)

    stepped = trainer.training_step
    trainer.training_step = count
    trainer.get_batch_samples = clock.around("data", trainer.get_batch_samples)
    trainer.compute_loss = clock.around("forward", trainer.compute_loss)
    trainer.accelerator.backward = clock.around("backward", trainer.accelerator.backward)
    trainer.create_optimizer_and_scheduler(trainer.args.max_steps)
    trainer.optimizer.step = clock.around("optimizer", trainer.optimizer.step)
    trainer.add_callback(Measure())
    trainer.train()
    shape, device = Shape.of(trainer.model.config), device_name(settings)
    speed = counted["tokens"] / counted["seconds"]
    flops = flops_per_token(shape, counted["squares"] / counted["tokens"], frozen=settings.lora_rank is not None)
    result = {
        **counted,
        "speed": speed,
        "device": device,
        "peak_flops": peak_flops(device),
        "mfu": utilisation(speed, flops, peak_flops(device)),
        "flops": flops,
        "context": counted["squares"] / counted["tokens"],
        "predicted": prediction(settings, shape, counted["squares"] / counted["tokens"], device, trainer),
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "as it comes"),
        "split": clock.spent,
        "settings": {
            n: getattr(settings, n)
            for n in (
                "max_length",
                "batch_size",
                "gradient_accumulation",
                "optimizer",
                "weights",
                "activation_checkpointing",
                "packing",
            )
        },
        "attention": trainer.model.config._attn_implementation,
        "dtype": str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
        "parity": prepared.parity["passed"],
        "loss": [r["loss"] for r in trainer.state.log_history if "loss" in r],
    }
    (folder / "result.json").write_text(json.dumps(result))


def prediction(settings, shape, context, device, trainer):
    "Tokens per second by the model of the step, with the layers that this card recomputes; None: no rates are known."
    from proxy_sft.training.recomputation import resolved
    from proxy_sft.training.step_model import predicted, rates_of
    if (rates := rates_of(device)) is None: return None
    if settings.activation_checkpointing == "auto":
        from transformers.modeling_layers import GradientCheckpointingLayer
        layers = [m for m in trainer.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        settings = resolved(settings, sum(layer.gradient_checkpointing for layer in layers), len(layers))
    return predicted(shape, settings, rates, context).tokens_per_second


def resident(name):
    "Bytes of this process by a name of /proc/self/status."
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


# ---- what needs no GPU

def padding_figures(lengths, seed=0):
    "Lines: which share of what is computed is padding, by way of making batches."
    import numpy as np
    from proxy_sft.tokens.lengths import pack
    lengths = np.asarray(lengths)
    cut, packed = np.minimum(lengths, 4096), np.minimum(lengths, 32_768)
    shuffled = np.random.default_rng(seed).permutation(cut)[:len(cut) // 4 * 4].reshape(-1, 4)
    ordered = np.sort(cut)[:len(cut) // 4 * 4].reshape(-1, 4)
    padded = lambda batches, width: (
        1 - batches.sum() / (4 * (width if np.isscalar(width) else width.sum() / len(batches)) * len(batches))
    )
    blocks = pack(packed, 32_768)
    yield (f"{len(lengths):,} conversations: {lengths.mean():,.0f} tokens on average, median "
           f"{np.median(lengths):,.0f}, longest {lengths.max():,}; mean context "
           f"{(lengths.astype(float) ** 2).sum() / lengths.sum():,.0f} tokens")
    yield f"{'way of making batches':58}{'padding':>10}{'computed per real token':>26}"
    for name, waste in (("whole conversations packed into blocks of 32,768", 1 - packed.sum() / (len(blocks) * 32_768)),
                        ("4 at a time, padded to the longest, as upstream", padded(shuffled, shuffled.max(1))),
                        ("4 at a time, of similar length, padded to the longest", padded(ordered, ordered.max(1))),
                        ("4 at a time, padded to 4,096", padded(shuffled, 4096))):
        yield f"{name:58}{waste:>10.1%}{1 / (1 - waste):>26.2f}"
    yield (f"beyond 4,096 tokens, and lost to a side that cuts there: {1 - cut.sum() / lengths.sum():.1%} of all "
           f"tokens, in {(lengths > 4096).mean():.1%} of the conversations")


# ---- both sides

def compare(args):
    "Everything that is printed, line by line."
    import torch
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as name:
        folder, results = Path(name), {}
        yield f"inputs: {write_inputs(folder, args, gpu)}"
        torch.cuda.empty_cache()
        yield ""
        yield from padding_figures(lengths_of(folder))
        for side, given in sides(folder, args, gpu).items():
            place = folder / side.replace(" ", "-")
            place.mkdir()
            (place / "side.json").write_text(json.dumps(given))
            if problem := run_apart(place, args.minutes):
                yield f"{side}: no figures ({problem})"
                continue
            found = results[side] = json.loads((place / "result.json").read_text())
            yield f"{side}: {found['speed']:,.0f} real tokens per second" + (
                "" if found["mfu"] is None else f", MFU {found['mfu']:.1%}"
            )
        yield ""
        if results: yield from table(results, gpu)
        args.failed = len(results) < len(sides(folder, args, gpu))


def run_apart(place, minutes):
    "One side in a process of its own, with a limit; what went wrong, in a line."
    with (place / "said.txt").open("w") as said:
        try:
            done = subprocess.run(
                [sys.executable, __file__, "--side", str(place)],
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=60 * minutes,
            )
        except subprocess.TimeoutExpired: return f"it took longer than {minutes:g} minutes"
    words = [line for line in (place / "said.txt").read_text(errors="replace").splitlines() if line.strip()]
    return (
        ""
        if done.returncode == 0
        else f"exit code {done.returncode}: {words[-1][:400] if words else 'it said nothing'}"
    )


def table(results, gpu):
    "Both sides in columns."
    line = lambda name, say: f"{name:42}" + "".join(f"{say(r):>30}" for r in results.values())
    yield f"{'':42}" + "".join(f"{side:>30}" for side in results)
    yield line(
        "tokens per block, blocks, micro-batches",
        lambda r: "{max_length:,} x {batch_size} x {gradient_accumulation}".format(**r["settings"]),
    )
    yield line("weights, optimizer", lambda r: f"{r['dtype']}, {r['settings']['optimizer']}")
    yield line("attention, checkpointing", lambda r: f"{r['attention']}, {r['settings']['activation_checkpointing']}")
    yield line("measured: steps, real tokens", lambda r: f"{r['steps']}, {r['tokens']:,.0f}")
    yield line("padding computed", lambda r: f"{1 - r['tokens'] / r['computed']:.1%}")
    yield line("real tokens per second", lambda r: f"{r['speed']:,.0f}")
    yield line("predicted by the model of the step",
               lambda r: f"{r['predicted']:,.0f}" if r["predicted"] else "no rates are known")
    yield line("mean context, tokens", lambda r: f"{r['context']:,.1f}")
    yield line("GFLOP per real token", lambda r: f"{r['flops'] / 1e9:,.6g}")
    yield line(
        "MFU",
        lambda r: "no peak is known" if r["mfu"] is None else f"{r['mfu']:.1%} of {r['peak_flops'] / 1e12:.1f} TFLOP/s",
    )
    yield line("peak memory, GiB" if gpu else "most memory of the process, GiB", lambda r: f"{r['peak'] / 2**30:.2f}")
    yield line("allocator", lambda r: r["allocator"])
    for part in ("data", "forward", "backward", "optimizer"):
        yield line(f"share of a step: {part}", lambda r: f"{r['split'].get(part, 0) / r['split']['step']:.1%}")
    yield line(
        "share of a step: the rest",
        lambda r: f"{1 - sum(v for n, v in r['split'].items() if n != 'step') / r['split']['step']:.1%}",
    )
    if len(results) < 2: return
    ours, other = results.values()
    yield f"real tokens per second, this project / upstream: {ours['speed'] / other['speed']:.2f}" + (
        "" if gpu else " (a tiny model on a CPU: no claim about a GPU)"
    )


def record(text):
    "Append the output to RESULTS.md."
    import torch
    target = Path(__file__).parent / "RESULTS.md"
    processor = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = int(next(line.split()[1] for line in open("/proc/meminfo"))) / 2**20
    cards = (
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        if torch.cuda.is_available()
        else "no GPU"
    )
    commit = (
        subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        or "unknown"
    )
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "trl", "accelerate"))
    head = "" if target.exists() else "# Results\n\nAs measured, newest last; `--record` writes an entry.\n"
    command = " ".join(["python benchmarks/train.py", *sys.argv[1:]])
    with target.open("a", encoding="utf-8") as file:
        file.write(
            f"{head}\n## {date.today()}: training, {cards}\n\n- machine: {cards}; {os.cpu_count()} cores of "
            f"{processor}, {memory:.0f} GiB\n"
            f"- versions: Python {platform.python_version()}, {versions}; commit {commit}\n- command: `{command}`\n\n"
            f"```text\n{text}\n```\n"
        )


def main():
    args = arguments()
    if args.side: return run_side(Path(args.side))
    lines = []
    for line in compare(args):
        print(line, flush=True)
        lines.append(line)
    if args.record: record("\n".join(lines))
    return 1 if args.failed else 0


if __name__ == "__main__": sys.exit(main())
