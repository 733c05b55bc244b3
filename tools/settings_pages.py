"""Write docs/settings.md and docs/settings.zh.md: every setting, with the value that each profile really uses."""
from pathlib import Path

import yaml

from proxy_sft.core.settings import (
    Conversion, Hardware, load_settings, Places, Record, Rendering, Training, yaml_scalar
)

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"en": ROOT / "docs" / "settings.md", "zh": ROOT / "docs" / "settings.zh.md"}
CHINESE = Path(__file__).with_name("settings_zh.yaml")  # name: the English meaning that was translated, the translation
GROUPS = (Places, Conversion, Rendering, Training, Hardware, Record)
PROFILES = ("qwen3_8b", "qwen3_8b_80gb", "qwen3_8b_8gpu", "own_data", "upstream", "smollm2", "demo")
HEADS = {
    "en": "| setting | " + " | ".join(f"`{name}`" for name in PROFILES) + " | meaning |",
    "zh": "| 设置项 | " + " | ".join(f"`{name}`" for name in PROFILES) + " | 含义 |",
}


def values(name: str) -> list[str]:
    "What each profile uses: the first one's value, and those of the others where they differ from it."
    spelled = [yaml_scalar(getattr(load_settings(profile), name)).strip("'") for profile in PROFILES]
    return [f"`{spelled[0]}`", *("" if value == spelled[0] else f"`{value}`" for value in spelled[1:])]


def meaning(name: str, english: str, language: str, chinese: dict) -> str:
    "The description in the language; the English one where its translation is of older words."
    known = chinese.get(name, {})
    return known["zh"] if language == "zh" and known.get("en") == english else english


def settings_table(language: str = "en") -> str:
    "One Markdown table for each group of settings."
    chinese, lines = yaml.safe_load(CHINESE.read_text(encoding="utf-8")), []
    for group in GROUPS:
        title = meaning(group.__name__, group.__doc__, language, chinese)
        lines += [f"\n## {title.rstrip('.。')}\n", HEADS[language], "|---" * (len(PROFILES) + 2) + "|"]
        for name in group.__annotations__:
            words = meaning(name, group.model_fields[name].description, language, chinese)
            lines.append(f"| `{name}` | {' | '.join(values(name))} | {words} |")
    return "\n".join(lines).strip()


def untranslated() -> list[str]:
    "Settings and groups whose Chinese words are missing, or of an older English description."
    chinese = yaml.safe_load(CHINESE.read_text(encoding="utf-8"))
    english = {g.__name__: g.__doc__ for g in GROUPS}
    english |= {name: g.model_fields[name].description for g in GROUPS for name in g.__annotations__}
    return [name for name, words in english.items() if chinese.get(name, {}).get("en") != words]


def with_table(text: str, language: str) -> str:
    "The page's text with the table that the code gives, between its two marks."
    head, _, rest = text.partition("<!-- settings:")
    mark, _, rest = rest.partition("-->")
    tail = rest.partition("<!-- /settings -->")[2]
    return f"{head}<!-- settings:{mark}-->\n{settings_table(language)}\n<!-- /settings -->{tail}"


if __name__ == "__main__":
    for language, page in PAGES.items():
        page.write_text(with_table(page.read_text(encoding="utf-8"), language), encoding="utf-8")
    if missing := untranslated(): print(f"without a Chinese meaning in {CHINESE.name}: {', '.join(missing)}")
