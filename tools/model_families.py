"""Which model families go through prepare, training, adapters, merge, reload and answers: a tiny one of each is tried,
and docs/models.md is written."""
import json
import shutil
import sys
import tempfile
from pathlib import Path

import transformers
from transformers import AutoTokenizer

from proxy_sft.core.atomic_folders import COMPLETE, file_hash
from proxy_sft.core.settings import Settings, load_settings
from proxy_sft.demo.model import write_demo_model
from proxy_sft.evaluation.generation import generate_batch, load_model
from proxy_sft.pipeline import ensure_prepared
from proxy_sft.train import train
from proxy_sft.training.doctor import diagnose
from proxy_sft.training.new_tokens import add_control_tokens

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
SIZE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=4096, head_dim=16)
FAMILIES = { # name -> class of its configuration, further values
    "Qwen3": ("Qwen3Config", {}), "Qwen3, tied embeddings": ("Qwen3Config", {"tie_word_embeddings": True}),
    "Qwen2.5": ("Qwen2Config", {}), "Llama": ("LlamaConfig", {}),
    "Llama, tied embeddings": ("LlamaConfig", {"tie_word_embeddings": True}),
    "SmolLM3": ("SmolLM3Config", {}), "Mistral": ("MistralConfig", {"sliding_window": None}),
    "Gemma 3": ("Gemma3TextConfig", {}),
    "Phi-3": ("Phi3Config", {"pad_token_id": 0}), "OLMo 2": ("Olmo2Config", {}), "OLMo 3": ("Olmo3Config", {}),
    "Granite": ("GraniteConfig", {})}
STEPS = ("prepare and parity check", "doctor", "two steps", "resume", "adapter, merged", "reload and answer")


def write_model(folder: Path, family: str) -> None:
    "A tiny model of this family with the demo's tokenizer."
    name, more = FAMILIES[family]
    tokenizer = AutoTokenizer.from_pretrained(write_demo_model(folder, n=200) or folder)
    ids = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    config = getattr(transformers, name)(**{**SIZE, **ids, "pad_token_id": tokenizer.pad_token_id, **more})
    model = transformers.AutoModelForCausalLM.from_config(config)
    add_control_tokens(model, tokenizer)
    for old in folder.glob("model*.safetensors*"): old.unlink()
    model.save_pretrained(folder)


def answers(settings: Settings) -> None:
    "Load the final model and let it write a few tokens."
    model, _ = load_model(settings.run_dir, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(settings.run_dir)
    reply, = generate_batch(model, tokenizer, [tokenizer("Hello")["input_ids"]], [tokenizer.eos_token_id], 3)
    assert reply.tokens >= 1


def resume(settings: Settings) -> None:
    "Lose the last checkpoint, go on from the one before, and arrive at the same weights."
    weights = file_hash(settings.run_dir / "model.safetensors")
    shutil.rmtree(settings.run_dir / "checkpoint-2")
    (settings.run_dir / COMPLETE).unlink()
    train(settings)
    assert file_hash(settings.run_dir / "model.safetensors") == weights, "the resumed run ends in other weights"


def try_family(family: str, workspace: Path) -> dict[str, str]: # step -> "" or what went wrong
    "Every step in order; what fails ends the family's row."
    model = workspace / "tiny"
    write_model(model, family)
    given = dict(workspace=str(workspace), model=str(model), demo_rows=200, num_proc=1, max_eval_samples=4,
                 memory_probe="never",
                 control_token_turns=4, save_steps=1, logging_steps=1)
    def settings(run, steps, **more): return load_settings("demo", run_name=run, max_steps=steps, **{**given, **more})
    full, adapter = settings("full", 2), settings("adapter", 2, lora_rank=4)
    acts = (lambda: ensure_prepared(full), lambda: diagnose(full), lambda: train(full),
            lambda: resume(full),
            lambda: train(adapter), lambda: (answers(full), answers(adapter)))
    found = {}
    for step, act in zip(STEPS, acts, strict=True):
        try: act()
        except Exception as error:  # whatever it is, it belongs into the table
            found[step] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            break
        found[step] = ""
    return found


def main(names: list[str]) -> int: # exit code
    "Try the families and write the page."
    rows = {}
    for family in names or FAMILIES:
        with tempfile.TemporaryDirectory() as folder: rows[family] = try_family(family, Path(folder))
        print(family, json.dumps(rows[family]), flush=True)
    if not names: PAGE.write_text(page(rows), encoding="utf-8")
    return int(any(problem for row in rows.values() for problem in row.values()))


def page(rows: dict[str, dict[str, str]]) -> str: # Markdown
    "The table of what was tried."
    word = lambda row, step: "not reached" if step not in row else "no" if row[step] else "yes"
    cells = lambda row: " | ".join(word(row, step) for step in STEPS)
    lines = ["# Model families", "", ("Qwen3-8B is what this project is made for. A tiny model of each family below, "
                                      "with random weights and a tokenizer that has"),
             ("Qwen's control tokens, was put through the whole chain on the CPU; `python tools/model_families.py` "
              "writes this page"),
             f"(transformers {transformers.__version__}). A model whose tokenizer lacks the tool tokens gets them from",
             "`proxy_sft.training.new_tokens.add_control_tokens`.", "", f"| family | {' | '.join(STEPS)} |",
             "|---" * (len(STEPS) + 1) + "|"]
    lines += [f"| {family} | {cells(row)} |" for family, row in rows.items()]
    wrong = [f"- **{family}**, {step}: {problem}" for family, row in rows.items() for step,
             problem in row.items() if problem]
    return "\n".join([*lines, *(["", "What went wrong:", "", *wrong] if wrong else [])]) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
