"""Write the table of hardware into both READMEs: what the doctor counts for each profile, on cards that fit it."""
import re
from dataclasses import dataclass
from pathlib import Path

from proxy_sft.core.settings import load_settings, Settings
from proxy_sft.training.cost import published_config
from proxy_sft.training.doctor import check_duration, disk_needed, needed

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"en": ROOT / "README.md", "zh": ROOT / "README.zh.md"}
HEADS = {
    "en": "| GPUs | profile, parameters | memory per GPU | host memory | disk for checkpoints | hours, two epochs |",
    "zh": "| GPU | 配置方案与参数 | 每卡显存 | 主机内存 | 检查点磁盘 | 两个 epoch 的小时数 |",
}
DEMO = {  # seen with `make demo`: the size of its workspace, the time of the whole command
    "en": "| none, 2 CPU cores | `demo`, 800 steps | – | not measured | 0.1 GB *m* | 0.1 *m* |",
    "zh": "| 无，2 个 CPU 核 | `demo`，800 步 | – | 未测量 | 0.1 GB *m* | 0.1 *m* |",
}


@dataclass
class Row:
    "One way to train: cards by name and number, and the settings that fit them."
    cards: str
    name: str  # as the driver calls the card
    ranks: int
    profile: str
    changes: dict

    def settings(self) -> Settings: return load_settings(self.profile, **self.changes)

    def command(self) -> str:
        "The profile and what is given beside it."
        return f"`{self.profile}`" + (" " if self.changes else "") + " ".join(
            f"`-p {name} {value}`" for name, value in self.changes.items())


ADAPTER = {"lora_rank": 64, "optimizer": "adamw_torch_fused"}
ROWS = (
    Row("8 × H100 80 GB", "NVIDIA H100 80GB HBM3", 8, "qwen3_8b_8gpu", {}),
    Row("1 × H200 141 GB", "NVIDIA H200", 1, "qwen3_8b", {}),
    Row("1 × H100 80 GB", "NVIDIA H100 80GB HBM3", 1, "qwen3_8b_80gb", {}),
    Row("1 × L40S 48 GB", "NVIDIA L40S", 1, "qwen3_8b", ADAPTER),
    Row("1 × RTX 4090 24 GB", "NVIDIA GeForce RTX 4090", 1, "qwen3_8b",
        {**ADAPTER, "quantize": "nf4", "max_length": 8192}),
)


def cells(row: Row) -> str:
    "The doctor's figures for one row, each marked as computed."
    settings = row.settings()
    config = published_config(settings.model)
    _, device, host = needed(settings, row.ranks, config)
    disk = disk_needed(config, settings, row.ranks)
    hours = re.search(r"about ([\d.,]+) hours", check_duration(settings, row.ranks, config, row.name, None).text)[1]
    held = f"{host * row.ranks / 2**30:.0f} GiB *c*" if host else "–"
    return (f"| {row.cards} | {row.command()} | {device / 2**30:.0f} GiB *c* | {held} | {disk / 1e9:.0f} GB *c* "
            f"| {float(hours.replace(',', '')):.0f} *c* |")


def hardware_table(language: str = "en") -> str:
    "The whole table, with the demo's measured row last."
    return "\n".join([HEADS[language], "|---" * 6 + "|", *map(cells, ROWS), DEMO[language]])


def with_table(text: str, language: str) -> str:
    "A README's text with the table that the doctor's counts give."
    table = hardware_table(language)
    return re.sub(r"(?s)(<!-- hardware[^>]*-->\n).*?(<!-- /hardware -->)", lambda m: f"{m[1]}{table}\n{m[2]}", text)


if __name__ == "__main__":
    for language, page in PAGES.items():
        page.write_text(with_table(page.read_text(encoding="utf-8"), language), encoding="utf-8")
