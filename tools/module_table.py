"""Write the table of modules into docs/overview.md, from each notebook's own title line."""
import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "overview.md"


@dataclass
class Notebook:
    "A notebook, the module that it exports, and what its title line says."
    path: Path
    cells: list[dict]

    @property
    def name(self) -> str:
        "Its place below `nbs`, without the suffix."
        return self.path.relative_to(ROOT / "nbs").with_suffix("").as_posix()

    @property
    def module(self) -> str:
        "The module that it exports, below `proxy_sft`; empty where it exports none."
        return next((m[1] for c in self.cells if (m := re.search(r"#\| default_exp ([\w.]+)", source(c)))), "")

    @property
    def quote(self) -> str:
        "The line below its title that says what the notebook is."
        return next((m[1].strip() for c in self.cells if (m := re.search(r"(?m)^> (.+)$", source(c)))), "")


def source(cell: dict) -> str:
    "A cell's text."
    return "".join(cell["source"])


def notebooks() -> list[Notebook]:
    "Every notebook: the pages first, then folder by folder."
    paths = sorted((ROOT / "nbs").rglob("*.ipynb"), key=lambda p: (p.parent != ROOT / "nbs", p))
    paths = [path for path in paths if ".ipynb_checkpoints" not in path.parts]
    return [Notebook(path, json.loads(path.read_text(encoding="utf-8"))["cells"]) for path in paths]


def modules() -> str:
    "One table: notebook, module, and the quote below its title."
    lines = ["| notebook | module | what it holds |", "|---|---|---|"]
    for notebook in notebooks():
        module = f"`{notebook.module}`" if notebook.module else "not exported"
        lines.append(f"| `{notebook.name}` | {module} | {notebook.quote} |")
    return "\n".join(lines)


def with_modules(text: str) -> str:
    "The page's text with the table that the notebooks give."
    return re.sub(r"(?s)(<!-- modules[^>]*-->\n).*?(<!-- /modules -->)", lambda m: f"{m[1]}{modules()}\n{m[2]}", text)


if __name__ == "__main__": PAGE.write_text(with_modules(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
