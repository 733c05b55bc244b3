"""What hashing and publishing a checkpoint costs beside writing it, and how long training stands still for a save with
and without `save_through`: `python benchmarks/checkpoint.py [GiB] [folder] [folder to save through]`. Both sides in one
run, best of three."""
import shutil
import sys
import time
from pathlib import Path
from typing import Optional

import torch
from datasets import Dataset
from transformers import PrinterCallback, Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

from proxy_sft.core.atomic_folders import file_hash, files_in, flush, publish
from proxy_sft.core.settings import load_settings
from proxy_sft.training.background_saves import folder_on_machine, make_folder_on_machine
from proxy_sft.training.checkpoint_writer import CompleteCheckpoints
from proxy_sft.training.checkpoints import checkpoint_facts


def write(folder: Path, gib: float) -> float:
    "Two files as DeepSpeed and safetensors leave them; seconds."
    began = time.monotonic()
    folder.mkdir(parents=True)
    tensors = [torch.full((int(gib * 2**28 / 8),), float(i)) for i in range(4)]
    torch.save({"state": tensors}, folder / "optimizer.pt")
    torch.save({"model": tensors}, folder / "weights.pt")
    return time.monotonic() - began


def timed(act) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def standing_still(gib: float, run_dir: Path, through: Optional[Path]) -> list[float]: # seconds, a save each
    "A training of a model whose checkpoint has so many GiB, three saves with work between them."
    times, shape = [], dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=8)
    config = Qwen3Config(vocab_size=int(gib * 2**30 / 12 / 1024), num_hidden_layers=2, head_dim=64, **shape)

    class Timed(CompleteCheckpoints, Trainer):
        def _save_checkpoint(self, *args):
            began = time.monotonic()
            super()._save_checkpoint(*args)
            times.append(time.monotonic() - began)

    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 60)
    arguments = TrainingArguments(str(run_dir), max_steps=60, save_steps=20, per_device_train_batch_size=1,
                                  report_to=[], use_cpu=True, disable_tqdm=True, save_total_limit=None,
                                  logging_strategy="no")
    trainer = Timed(Qwen3ForCausalLM(config), arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.run_dir, trainer.keep, trainer.through = run_dir, 1, through
    trainer.facts = checkpoint_facts(load_settings("demo"), "0", 1)
    if through: make_folder_on_machine(through)
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer.train()
    trainer.finish_save()
    trainer.end_saves()
    shutil.rmtree(run_dir)
    return times


def main() -> None:
    gib, root = (
        float(sys.argv[1]) if len(sys.argv) > 1 else 2.0,
        Path(sys.argv[2] if len(sys.argv) > 2 else "workspace") / "benchmark",
    )
    shutil.rmtree(root, ignore_errors=True)
    rows = []
    for _ in range(3):
        plain, aside = root / "plain", root / "aside"
        written = write(plain, gib)
        flushed = timed(lambda: [flush(f) for f in files_in(plain)])
        hashed = timed(lambda: [file_hash(f) for f in files_in(plain)])
        shutil.rmtree(plain)
        whole = write(aside, gib) + timed(lambda: publish(aside, root / "checkpoint-1", {"step": 1}))
        shutil.rmtree(root / "checkpoint-1")
        rows.append((written, flushed, hashed, whole))
    shutil.rmtree(root)
    written, flushed, hashed, whole = (min(c) for c in zip(*rows))
    print(
        f"{gib:g} GiB: written {written:.2f} s; then on the disk {flushed:.2f} s; hashed alone {hashed:.2f} s; "
        f"written, hashed, flushed and published {whole:.2f} s"
    )
    print(
        f"beside a plain save into memory: {100 * (whole / written - 1):.0f} % more; beside a save that is on the "
        f"disk: {100 * (whole / (written + flushed) - 1):.0f} % more"
    )
    through = folder_on_machine(Path(sys.argv[3] if len(sys.argv) > 3 else "/dev/shm"), root)
    straight, beside = (min(standing_still(gib, root / "run", place)) for place in (None, through))
    print(f"training stands still for a save: {straight:.2f} s straight to the run's folder, {beside:.2f} s through "
          f"{through.parent}: {straight / beside:.1f} times as long")


if __name__ == "__main__":
    main()
