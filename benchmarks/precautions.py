"""What each precaution is worth on real weights: one factor changed, the same steps, seed and held-out turns.

    python tools/real.py                    # once: writes SmolLM2-135M-Instruct and the questions (`make real`)
    python benchmarks/precautions.py [--steps N] [--seeds N] [--turns N] [--asked N] [--only NAME …] [--record]

Each line of the table is a training by the public functions, in a process of its own; a finished one is not made
again, so an interrupted benchmark goes on. Variants that need other conversations than the questions (of several
turns, with control tokens as text, with calls that contradict their schema) have a reference on the very same
conversations. `--record` appends the table to benchmarks/RESULTS.md.

Losses and first places are measured behind a server's prompt, with the data's own answer, in one pass for each turn;
answers are generated for the first `--asked` of the turns. Intervals (95 %): Wilson's for shares, the bootstrap over
turns for losses and for their difference to the reference's, turn by turn. With several seeds the interval of a
difference is Student's over the seeds, and each seed's figure stands behind it. The model learns from questions of the
Berkeley leaderboard: none of this is a leaderboard figure.
"""
import argparse
import json
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "workspace" / "precautions"
LONGEST = 1500  # characters of a row
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % of Student's distribution, by the number of seeds
SHARES = {"first": "first token right", "call_begin": "`<tool_call>` likeliest", "stop": "stop token likeliest",
          "names": "right tools", "exact": "exact calls", "stops": "stops"}


@dataclass(frozen=True)
class Variant:
    "One training: what differs from its reference."
    what: str  # in words
    settings: dict = field(default_factory=dict)
    data: str = "plain"  # see `write_data`; the variant of that name is the reference
    change: str = ""  # see `CHANGES`: what no setting offers, because nobody should train so


VARIANTS = {
    "untrained": Variant("no training"),
    "plain": Variant("**the default**"),
    "full_sequence": Variant("loss on every token instead of assistant turns", {"full_sequence_loss": True}),
    "no_stop": Variant("stop token not trained", change="no_stop"),
    "unpacked": Variant("conversations one by one instead of packed", {"packing": False}),
    "call_weight": Variant("tokens of calls counted three times", {"call_weight": 3.0}),
    "dft": Variant("loss `dft`", {"loss": "dft"}),
    "turns": Variant("**several turns: the default**", data="turns"),
    "turns_stock": Variant("several turns: template `stock`", {"template": "stock", "parity": "warn"}, "turns"),
    "literals": Variant("**control tokens quoted in one row of five: the default**", data="literals"),
    "literals_as_control": Variant("the same, encoded as control tokens", data="literals", change="literals"),
    "contradict": Variant("**calls that contradict their schema in one row of three: the default**", data="contradict"),
    "contradict_kept": Variant("the same, kept", {"strictness": "lenient"}, "contradict"),
}


# the conversations

def names_of(row: dict) -> set[str]:
    "Which tools a row declares."
    return {tool["function"]["name"] for tool in json.loads(row["messages"][0]["functions"])}


def heldout_tools(rows: list) -> list[str]:
    "A tenth of all tools, which no training row declares: the same for every variant."
    names = sorted(set().union(*map(names_of, rows)))
    return sorted(random.Random(0).sample(names, len(names) // 10))


def write_data(kind: str, rows: list, kept_apart: set[str], target: Path) -> None:
    "The questions, or training questions changed so that a precaution has something to do."
    chance = random.Random(0)
    def changed(change, share):
        return [change(row) if chance.random() < share and not names_of(row) & kept_apart else row for row in rows]
    if kind == "turns": rows = joined_turns(rows, chance)
    if kind == "literals": rows = changed(with_literals, 0.2)
    if kind == "contradict": rows = changed(contradicting, 0.34)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def joined_turns(rows: list, chance: random.Random) -> list:
    "Pairs of rows as one conversation: its tools are those of both, and a result stands after each call."
    rows, blank = chance.sample(rows, len(rows)), {"functions": None, "function_calls": None}
    after = [{"role": "environment", "content": '{"ok": true}', **blank},
             {"role": "assistant", "content": "Done.", **blank}]
    joined = []
    for first, second in zip(rows[::2], rows[1::2]):
        if names_of(first) & names_of(second): continue
        tools = sum((json.loads(row["messages"][0]["functions"]) for row in (first, second)), [])
        parts = [row["messages"][1:] + (after if row["messages"][-1]["function_calls"] else [])
                 for row in (first, second)]
        system = {**first["messages"][0], "functions": json.dumps(tools)}
        joined.append({**first, "id": f"{first['id']}+{second['id']}", "messages": [system, *parts[0], *parts[1]]})
    return joined


def with_literals(row: dict) -> dict:
    "Question and answer in words quote control tokens, as they do where chat formats are the subject."
    quoted = "<|im_end|> and <tool_call>"
    *before, question, answer = row["messages"]
    question = {**question, "content": f"(My log says {quoted} here.) {question['content']}"}
    if answer["content"]: answer = {**answer, "content": f"You quoted {quoted}. {answer['content']}"}
    return {**row, "messages": [*before, question, answer]}


def contradicting(row: dict) -> dict:
    "The call gets an argument that its tool does not declare."
    *before, answer = row["messages"]
    head, bracket, rest = (answer["function_calls"] or "").rpartition(")")
    if not bracket: return row
    more = "verbose=True" if head.endswith("(") else ", verbose=True"
    return {**row, "messages": [*before, {**answer, "function_calls": head + more + bracket + rest}]}


# what no setting offers

def drop_stop_labels() -> None:
    "The stop token's label is taken out of every block."
    from proxy_sft.training import trainer
    columns = trainer.trainer_columns
    def without_stops(data, settings):
        from transformers import AutoTokenizer
        stop = AutoTokenizer.from_pretrained(settings.model_dir).convert_tokens_to_ids("<|im_end|>")
        def masked(batch):
            return {"labels": [np.where(np.asarray(labels) == stop, -100, labels) for labels in batch["labels"]]}
        return columns(data.map(masked, batched=True, keep_in_memory=True), settings)
    trainer.trainer_columns = without_stops


def encode_literals() -> None:
    "Quoted control tokens are left unmarked, so that the tokenizer makes control tokens of them."
    from proxy_sft.chat import templates
    templates._mark_controls = lambda messages, tools, pattern, left: (messages, tools or [], "")


CHANGES = {"": lambda: None, "no_stop": drop_stop_labels, "literals": encode_literals}


# one training

def settings_of(name: str, given: argparse.Namespace, rows: list, seed: int, **more: Any) -> Any:
    "The reference's settings with the variant's one difference."
    from proxy_sft.core.settings import load_settings
    variant, kept_apart = VARIANTS[name], heldout_tools(rows)
    # rows encoded in another way are prepared in a folder of their own
    workspace = FOLDER / (name if variant.change == "literals" else variant.data)
    data = workspace / "questions.jsonl"
    if not data.exists(): write_data(variant.data, rows, set(kept_apart), data)
    values = {"workspace": str(workspace), "dataset": str(data), "heldout_tools": kept_apart,
              "run_name": f"{name}-{seed}", "max_steps": given.steps, "save_steps": given.steps,
              "eval_steps": given.steps, "max_length": 640, "max_eval_samples": 4, "control_token_turns": 0,
              "gradient_accumulation": 1,
              "num_proc": 1, "seed": seed, "parity": "warn" if variant.change else "require",
              **dict(given.p), **variant.settings}
    return load_settings("smollm2", **{**values, **more})


def prepared_data(settings: Any) -> Any:
    "Convert and prepare, unless it was done by this code."
    from proxy_sft.convert import convert
    from proxy_sft.pipeline import ensure_prepared
    from proxy_sft.tokens.inputs import differences_of
    if differences_of(settings): convert(settings)
    return ensure_prepared(settings)


def rows_per_block(settings: Any) -> int:
    "So many conversations one by one are as many tokens as a packed block, on average."
    train = prepared_data(settings).splits["train"]
    return round((train["whole"] + train["cut"]) / train["blocks"])


def measure(name: str, given: argparse.Namespace, rows: list, seed: int) -> dict:
    "Train, read the held-out turns, ask some of them, and forget the weights."
    from proxy_sft.train import train
    CHANGES[VARIANTS[name].change]()
    settings = settings_of(name, given, rows, seed)
    if not settings.packing:
        packed = settings_of(name, given, rows, seed, packing=True)
        many = packed.gradient_accumulation * rows_per_block(packed)
        settings = settings_of(name, given, rows, seed, gradient_accumulation=many)
    prepared_data(settings)
    if name != "untrained": train(settings)
    found = measured_turns(settings, settings.model_dir if name == "untrained" else settings.run_dir, given)
    shutil.rmtree(settings.run_dir, ignore_errors=True)
    return found


def measured_turns(settings: Any, folder: Path, given: argparse.Namespace) -> dict:
    "Loss and places of every turn's answer; what the model answers to the first of them."
    from transformers import AutoTokenizer
    from proxy_sft.chat.saving import stop_token_ids
    from proxy_sft.evaluation.answers import choose_turns, read_reply, score_turn
    from proxy_sft.evaluation.generation import answer_limit, generate_replies, load_model, questions_that_fit
    model, generation = load_model(folder, settings.device, settings.attention, settings.bf16)
    tokenizer = AutoTokenizer.from_pretrained(settings.model_dir)
    chosen = choose_turns(settings.converted_dir / "heldout.jsonl", 2 * given.turns, 0)[0]
    plain = settings.model_copy(update={"template": "nothink", "max_length": 600})  # the same turns for every template
    turns = questions_that_fit(chosen, tokenizer, plain)[0][:given.turns]
    prompts = questions_that_fit(turns, tokenizer, settings)[1]
    read = [read_turn(model, tokenizer, settings, *pair) for pair in zip(turns, prompts, strict=True)]
    asked = turns[:given.asked]
    replies = generate_replies(model, tokenizer, prompts[:given.asked], stop_token_ids(tokenizer, generation),
                               answer_limit(asked, tokenizer, 96), batch_size=8)
    scores = [score_turn(t.expected, read_reply(r), t.tools) for t, r in zip(asked, replies, strict=True)]
    for one, score in zip(read, scores):
        one["shares"] |= {metric: [int(score[metric]), 1] for metric in SHARES if metric in score}
    return {"turns": read}


def read_turn(model: Any, tokenizer: Any, settings: Any, turn: Any, prompt: list[int]) -> dict:
    "The data's answer behind a server's prompt: its loss without the stop token, and which tokens are likeliest."
    from proxy_sft.evaluation.control_tokens import control_token_ranks, measured_ids
    from proxy_sft.evaluation.generation import answer_rows
    answer = [label for label in answer_rows([turn], tokenizer, settings.template)[0]["labels"] if label != -100]
    row = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
    places = control_token_ranks(model, row, {i: "" for i in range(len(tokenizer))} | measured_ids(tokenizer))
    shares = {"first": [int(places[0][2] == 1), 1]}
    for name in ("call_begin", "stop"):
        found = [rank == 1 for other, _, rank in places if other == name]
        if found: shares[name] = [sum(found), len(found)]
    losses = [loss for name, loss, _ in places if name != "stop"]
    return {"call": bool(turn.expected), "loss": sum(losses), "tokens": len(losses), "shares": shares}


# the table

def share(seeds: list[list[dict]], metric: str) -> str:
    "A share with its Wilson interval; of several seeds, which read the same turns, each one's."
    from proxy_sft.evaluation.answers import wilson
    counts = [[sum(turn["shares"].get(metric, (0, 0))[k] for turn in turns) for k in (0, 1)] for turns in seeds]
    right, of = map(sum, zip(*counts))
    if not of: return "none"
    if len(seeds) > 1: return f"{right}/{of} ({', '.join(str(count) for count, _ in counts)})"
    low, high = wilson(right, of)
    return f"{right}/{of} [{100 * low:.0f}, {100 * high:.0f}] %"


def call_losses(turns: list[dict]) -> np.ndarray:
    "Loss and tokens of each turn with a call."
    return np.array([(turn["loss"], turn["tokens"]) for turn in turns if turn["call"]])


def interval(values: Any, digits: int = 3, sign: str = "") -> str:
    "The figure and where 95 % of the drawn ones lie; the first value is the figure."
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return f"{values[0]:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def drawn_means(losses: np.ndarray, draws: int = 4000) -> np.ndarray:
    "Loss per token, of all turns and of turns drawn with replacement; the same draws for every variant."
    chance = np.random.default_rng(0)
    picks = np.vstack([np.arange(len(losses)), chance.integers(len(losses), size=(draws, len(losses)))])
    sums = losses[picks].sum(1)
    return sums[:, 0] / sums[:, 1]


def seed_means(seeds: list[list[dict]]) -> np.ndarray: # a row for each seed
    "`drawn_means` of the seeds, which read the same turns."
    return np.stack([drawn_means(call_losses(turns)) for turns in seeds])


def over_seeds(values: np.ndarray) -> str: # a value for each seed
    "Mean with Student's interval, and each value."
    mean, half = values.mean(), STUDENT[len(values)] * values.std(ddof=1) / len(values) ** 0.5
    each = ", ".join(f"{value:+.3f}" for value in values)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}] over seeds ({each})"


def difference(seeds: list[list[dict]], reference: list[list[dict]]) -> str:
    "Of the loss of calls, turn by turn."
    between = seed_means(seeds) - seed_means(reference)
    return over_seeds(between[:, 0]) if len(seeds) > 1 else interval(between[0], sign="+")


def table(found: dict[str, list[list[dict]]]) -> str: # Markdown; found: the turns of each seed
    "A line for each variant."
    lines = ["| one factor changed | loss of calls | difference | " + " | ".join(SHARES.values()) + " |",
             "|---" * (len(SHARES) + 3) + "|"]
    for name, variant in VARIANTS.items():
        if name not in found: continue
        seeds, reference = found[name], found.get(variant.data, [])
        same = name != variant.data and len(reference) == len(seeds)
        cells = [interval(seed_means(seeds).mean(0)), difference(seeds, reference) if same else "–"]
        cells += [share(seeds, metric) for metric in SHARES]
        lines.append(f"| {' | '.join([variant.what, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    "Every variant in a process of its own; then the table."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a block of 640 tokens")
    parser.add_argument("--seeds", type=int, default=1, choices=range(1, 6), help="trainings per variant")
    parser.add_argument("--turns", type=int, default=40, help="held-out turns to read")
    parser.add_argument("--asked", type=int, default=16, help="held-out turns to answer")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="these variants")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a setting of all")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/RESULTS.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # variant-seed, in a process of its own
    given = parser.parse_args()
    questions = ROOT / "workspace" / "data" / "bfcl-questions" / "train.jsonl"
    if not questions.exists(): sys.exit(f"{questions.relative_to(ROOT)} is missing; run `python tools/real.py` first.")
    results = FOLDER / "-".join(["results", *map(str, (given.steps, given.turns, given.asked)), *sum(given.p, [])])
    if given.one:
        name, seed = given.one.rsplit("-", 1)
        rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
        # short ones, which are read and trained on quickly, and few: a few dozen are trained on
        rows = random.Random(0).sample([row for row in rows if len(json.dumps(row)) < LONGEST], 1000)
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{given.one}.json").write_text(json.dumps(measure(name, given, rows, int(seed))))
        return
    found: dict[str, list[list[dict]]] = {}
    for name in given.only:
        for seed in range(given.seeds):
            path = results / f"{name}-{seed}.json"
            if not path.exists():
                subprocess.run([sys.executable, *sys.argv, "--one", path.stem], cwd=ROOT)
            if path.exists(): found.setdefault(name, []).append(json.loads(path.read_text())["turns"])
            else: print(f"{path.stem}: failed; its own message stands above.")
    if not found: return
    print(table(found), flush=True)
    if given.record: record(table(found), given, len(next(iter(found.values()))[0]))


def record(text: str, given: argparse.Namespace, turns: int) -> None:
    "Append to benchmarks/RESULTS.md."
    about = (f"\n## {date.today()}: precautions on real weights\n\n- command: `python benchmarks/precautions.py "
             f"--steps {given.steps} --seeds {given.seeds} --turns {given.turns} --asked {given.asked}`\n"
             f"- versions: torch {version('torch')}, transformers {version('transformers')}\n"
             f"- {turns} held-out turns\n\n")
    with (ROOT / "benchmarks" / "RESULTS.md").open("a", encoding="utf-8") as file: file.write(about + text + "\n")


if __name__ == "__main__":
    main()
