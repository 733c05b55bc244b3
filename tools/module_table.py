"""Write the table of modules into docs/architecture.md, from each notebook's own title line."""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"


def modules() -> str:
    "Notebook, module, and the quote below its title."
    lines = ["| notebook | module | what lives there |", "|---|---|---|"]
    for path in sorted(ROOT.glob("nbs/**/*.ipynb")):
        cells = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        module = next((m[1] for c in cells if (m := re.search(r"#\| default_exp ([\w.]+)", c))), "")
        quote = next((m[1].strip() for c in cells if (m := re.search(r"(?m)^> (.+)$", c))), "")
        lines.append(
            f"| `{path.relative_to(ROOT / 'nbs').with_suffix('')}` | {f'`{module}`' if module else 'not exported'} | "
            f"{quote} |"
        )
    return "\n".join(lines)


def with_modules(text: str) -> str:
    "The page's text with the table that the notebooks give."
    return re.sub(r"(?s)(<!-- modules[^>]*-->\n).*?(\n<!-- /modules -->)", lambda m: m[1] + modules() + m[2], text)


if __name__ == "__main__": PAGE.write_text(with_modules(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
