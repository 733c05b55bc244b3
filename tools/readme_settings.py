"""Write the table of settings into both READMEs, between their two marks."""
from pathlib import Path

from proxy_sft.core.settings import settings_table

ROOT = Path(__file__).resolve().parent.parent
READMES = (ROOT / "README.md", ROOT / "README.zh.md")


def with_table(text: str) -> str:
    "The README's text with the table that the code gives."
    head, _, rest = text.partition("<!-- settings:")
    mark, _, rest = rest.partition("-->")
    return (
        f"{head}<!-- settings:{mark}-->\n{settings_table()}\n<!-- /settings -->"
        + rest.partition("<!-- /settings -->")[2]
    )


if __name__ == "__main__":
    for readme in READMES: readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
