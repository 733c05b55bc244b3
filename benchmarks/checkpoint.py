"""What hashing and publishing a checkpoint costs beside writing it: `python benchmarks/checkpoint.py [GiB] [folder]`.
Both sides in one run, best of three."""
import shutil
import sys
import time
from pathlib import Path

import torch

from proxy_sft.core.atomic_folders import file_hash, files_in, flush, publish


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


if __name__ == "__main__":
    main()
