"""Rows and tokens prepared per second and core: this, TRL's own preparation, and the tokenizers alone, in one run.

    python benchmarks/prepare.py [rows] [rows for the slow sides]

The rows are in Dolci-Instruct-SFT's proportions (227,579 of 2,152,112 have tools, about 6 KB each; the others about 3
KB, with a long tail). Their text is that of the packages and programs installed beside this one, no passage twice, so
that no cache of words is warmer than on real data; files that hold control tokens as text are left out, because such
rows take the reference path (some 10 ms each) and are rarer in the real data than in this code. The tokenizer is
Qwen3-8B's where `../shared/qwen3-8b` exists. One process and one thread each; seconds are those of the processor. The
sides are

- prepare, steady state: what each further row costs, from the converted file to the published folder (read, render,
  tokenise, mask, cut, facts, pack, write, hash, check);
- prepare, whole run: with what is done once, whatever the size (tokenizers loaded, a sample and the longest rows
  compared with the reference), measured on 128 rows;
- TRL: `SFTTrainer`'s own preparation with `assistant_only_loss`, some of the same conversations, after a first few that
  are not counted; it neither cuts nor packs here;
- gigatoken alone (other rows: its cache of words must not know them), and Hugging Face's tokenizers alone, on the
  rendered text: the two limits.

The parity check, which is measured before a folder is built, has a line of its own. Rows per second depend on the
machine; the ratios are what counts. """
import os

for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"): os.environ[name] = "1"
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_DATASETS_DISABLE_PROGRESS_BARS="1", IN_TEST="1")

import gc
import json
import random
import re
import site
import sys
import tempfile
import time
from pathlib import Path

import orjson

sys.path.insert(0, str(Path(__file__).parent))
from convert import draw_row
from proxy_sft.tokens import blocks, encoding, preparation
from proxy_sft.chat.encoder import ChatEncoder, Renderer
from proxy_sft.chat.templates import chat_template
from proxy_sft.data.conversion import hashes
from proxy_sft.data.rows import convert_row
from proxy_sft.core.settings import load_settings

ROWS, TOOL_SHARE, CORES = 2_152_112, 227_579 / 2_152_112, 16
CONTROLS = re.compile(r"<\|\w+\|>|</?(think|tool_call|tool_response)>")
MODEL = Path(__file__).resolve().parent.parent.parent / "shared" / "qwen3-8b"


class Text:
    "Passages of the installed packages' text, none twice; files that hold control tokens as text are left out."
    def __init__(self):
        packages = Path(site.getsitepackages()[0])
        self.files = [*sorted(packages.glob("*/METADATA")), *sorted(packages.rglob("*.py"))]
        random.Random(0).shuffle(self.files)
        self.left = ""

    def take(self, size):
        while len(self.left) < size:
            if not self.files: raise SystemExit("There is no more text on this machine: ask for fewer rows.")
            text = self.files.pop().read_text(encoding="utf-8", errors="ignore")
            if not CONTROLS.search(text): self.left += text
        taken, self.left = self.left[:size], self.left[size:]
        return taken.strip() or "empty"


def draw_converted(number, chance, text):
    "A converted row."
    if chance.random() < TOOL_SHARE:
        row = draw_row(number, chance)
        for message in row["messages"]:
            if message["content"] and message["role"] in ("user", "assistant"):
                message["content"] = text.take(len(message["content"]))
        return convert_row(row)
    turns, size = chance.choice((1, 1, 1, 1, 2, 3)), min(100_000, int(chance.lognormvariate(7.6, 0.9)))
    messages = [
        {"role": role, "content": text.take(max(10, int(size * share / turns)))}
        for _ in range(turns)
        for role, share in (("user", 0.25), ("assistant", 0.75))
    ]
    return {"messages_json": json.dumps(messages, ensure_ascii=False), "tools_json": "[]"}


def timed(work):
    "Seconds of this process's processors, its children's included, and the result."
    def spent():
        t = os.times()
        return t.user + t.system + t.children_user + t.children_system
    begun = spent()
    result = work()
    return spent() - begun, result


def rest():
    "The benchmark's own rows are no garbage collector's work while a side is timed."
    gc.collect()
    gc.freeze()


def texts_of(rows, tokenizer):
    "The rendered texts."
    renderer = Renderer(tokenizer, chat_template("nothink"), {})
    return [renderer.text(json.loads(row["messages_json"]), json.loads(row["tools_json"])) for row in rows]


def trl_side(rows, tokenizer, folder):
    "Seconds and tokens of TRL's own preparation."
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, Qwen3Config
    from trl import SFTConfig, SFTTrainer
    def plain(row):
        messages = json.loads(row["messages_json"])
        for m in messages:
            for call in m.get("tool_calls") or []:
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return {"messages": messages, "tools": row["tools_json"]}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    rest()
    seconds, real = [], SFTTrainer._prepare_dataset
    def measured(*args, **kw):
        took, found = timed(lambda: real(*args, **kw))
        seconds.append(took)
        return found
    SFTTrainer._prepare_dataset = measured
    tokenizer.chat_template = chat_template("stock")
    for some in (rows[:16], rows):
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_config(config),
            SFTConfig(str(folder / "trl"), assistant_only_loss=True, max_length=None, use_cpu=True, report_to="none"),
            train_dataset=Dataset.from_list([plain(row) for row in some]),
            processing_class=tokenizer,
        )
    return seconds[1], sum(map(len, trainer.train_dataset["input_ids"]))


PARTS = {  # module and function -> what its seconds are called
    (preparation, "check_train_parity"): "parity",
    (encoding, "start_worker"): "load",
    (encoding, "guard"): "compare",
    (encoding, "encode_piece"): "encode",
    (blocks, "blocks_of"): "pack",
}


def our_side(rows, folder, model):
    "Seconds of a build, in all and by part; what was prepared; its bytes; seconds of a hit."
    rest()
    settings = load_settings(
        "demo",
        workspace=str(folder),
        model=str(model),
        dataset=str(folder / "rows.jsonl"),
        num_proc=1,
        max_length=32768,
    )
    settings.converted_dir.mkdir(parents=True)
    converted = settings.converted_dir / "train.jsonl"
    converted.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    report = {"rows": len(rows), "kept": len(rows), "heldout": 0, "rejected": {}, "repaired": {}, "flags": {},
              "by_source": {"generated": {"rows": len(rows)}}, "files": hashes([converted])}
    (converted.parent / "report.json").write_text(json.dumps(report))
    spent, real = dict.fromkeys(PARTS.values(), 0.0), {place: getattr(*place) for place in PARTS}
    def measure(place):
        def call(*args, **kw):
            took, found = timed(lambda: real[place](*args, **kw))
            spent[PARTS[place]] += took
            return found
        return call
    for place in real: setattr(*place, measure(place))
    whole, prepared = timed(lambda: preparation.prepare(settings, lambda settings: None))
    begun = time.perf_counter()
    preparation.prepare(settings, lambda settings: None)
    hit, size = time.perf_counter() - begun, sum(file.stat().st_size for file in prepared.folder.iterdir())
    for place, function in real.items(): setattr(*place, function)
    return {**spent, "whole": whole - spent["parity"]}, prepared, size, hit


def main(count=40_000, slow=1000):
    from transformers import AutoTokenizer
    text, chance = Text(), random.Random(1)
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), MODEL
        if not (MODEL / "tokenizer.json").is_file():
            from proxy_sft.demo.tokenizer import build_demo_tokenizer
            model = folder / "model"
            build_demo_tokenizer([text.take(2_000_000)]).save_pretrained(model)
            print("The real tokenizer is not here (../shared/qwen3-8b); the demo's takes its place.")
        tokenizer = AutoTokenizer.from_pretrained(model)
        few, own, limit = ([draw_converted(i, chance, text) for i in range(n)] for n in (128, count, count))
        some = own[::max(1, count // slow)][:slow]
        our_side(few, folder / "first", model)  # libraries are imported, the processor is awake
        once = our_side(few, folder / "few", model)[0]
        spent, prepared, size, hit = our_side(own, folder / "own", model)
        once = once["whole"] - once["compare"] + spent["compare"]  # the longest of many rows are longer
        tokens = sum(prepared.facts("train")["tokens"].to_pylist())
        sides = [
            ("prepare, steady state", count, tokens, spent["whole"] - once),
            ("prepare, whole run", count, tokens, spent["whole"]),
        ]
        encoder = ChatEncoder(tokenizer)
        seconds, (ids, _) = timed_batches(
            lambda batch: encoder.renderer.ids(batch, False), texts_of(limit, tokenizer), 2000
        )
        sides.append(("gigatoken alone", count, ids, seconds))
        backend = tokenizer.backend_tokenizer
        seconds, (ids, _) = timed_batches(
            lambda batch: ([i for e in backend.encode_batch(batch, add_special_tokens=False) for i in e.ids],),
            texts_of(some, tokenizer),
            200,
        )
        sides.append(("Hugging Face tokenizers alone", len(some), ids, seconds))
        seconds, ids = trl_side(some, tokenizer, folder)
        sides.append(("TRL, assistant_only_loss", len(some), ids, seconds))
        tell(sides, spent, once, prepared.splits["train"], size, hit)


def timed_batches(encode, texts, at_once):
    "Seconds for all texts, and how many tokens they are."
    rest()
    def work(): return sum(len(encode(texts[at:at + at_once])[0]) for at in range(0, len(texts), at_once)), None
    return timed(work)


def tell(sides, spent, once, train, size, hit):
    "The table and what follows from it."
    print(f"{'side':32}{'rows':>8}{'rows/s/core':>13}{'tokens/s/core':>15}{'tokens/row':>12}{'us/row':>9}")
    speed = {}
    for name, rows, tokens, seconds in sides:
        speed[name] = tokens / seconds
        print(
            f"{name:32}{rows:8,}{rows / seconds:13,.0f}{tokens / seconds:15,.0f}"
            f"{tokens / rows:12,.0f}{1e6 * seconds / rows:9,.1f}"
        )
    rows, steady = sides[0][1], sides[0][3]
    for name in ("prepare, steady state", "prepare, whole run"):
        own = speed[name]
        print(
            f"{name}: {own / speed['TRL, assistant_only_loss']:.0f} times TRL's preparation by tokens, "
            f"{own / speed['gigatoken alone']:.0%} of gigatoken alone, "
            f"{own / speed['Hugging Face tokenizers alone']:.1f} times Hugging Face's tokenizers alone"
        )
    alone = steady - spent["encode"]
    print(
        f"of a row's {1e6 * steady / rows:.0f} us, {1e6 * spent['encode'] / rows:.0f} are read, rendered, tokenised, "
        "masked and counted, by all processes; "
        f"{1e6 * alone / rows:.0f} are packed, gathered, written and hashed, by one ({1e6 * spent['pack'] / rows:.0f} "
        "packed)"
    )
    print(
        f"once a run, whatever its size: {once:.1f} s, of which {spent['load']:.1f} s load the tokenizers and "
        f"{spent['compare']:.1f} s compare a sample and the longest rows with the reference"
    )
    print(f"parity: {spent['parity']:.1f} s for {rows:,} rows ({rows / spent['parity']:,.0f} rows/s/core)")
    scale = ROWS / rows
    print(
        f"{ROWS:,} rows on {CORES} cores, if the disk keeps up: "
        f"{(scale * spent['encode'] / CORES + scale * alone + once) / 60:.1f} min to prepare, "
        f"{scale * spent['parity'] / CORES / 60:.1f} min to check"
    )
    print(
        f"fill {train['fill']:.2%} of {train['blocks']:,} blocks; a hit (data hashed, {size / 1e9:.2f} GB of tokens "
        f"compared with their hashes) took {hit:.2f} s"
    )


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
