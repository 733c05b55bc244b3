"""`make docs`: HTML pages by pdoc. Each module's page begins with its notebook: prose, examples and what they print."""
import importlib
import re
import sys
from pathlib import Path

import pdoc
from module_table import Notebook, notebooks, ROOT, source

LONGEST = 2_000  # characters of an output; a page is read, not searched


def shown(cell: dict) -> str:
    "A code cell that exports nothing, as Markdown, with the text that it printed."
    outputs = ["".join(o.get("text") or o.get("data", {}).get("text/plain") or "") for o in cell["outputs"]]
    printed = "".join(outputs).strip("\n")[:LONGEST]
    return f"```python\n{source(cell).strip()}\n```" + (f"\n\n```text\n{printed}\n```" if printed else "")


def is_example(cell: dict) -> bool:
    "Code that a reader wants to see: no export, no hidden set-up, no imports alone."
    text = source(cell).strip()
    lines = [line for line in text.splitlines() if line.strip()]
    return (cell["cell_type"] == "code" and not text.startswith(("#| export", "#| default_exp", "#| hide"))
            and not all(re.match(r"(from|import) |\s|[)#]", line) for line in lines))


def prose(notebook: Notebook) -> str:
    "A notebook as Markdown, without what it exports: that stands below, with its parameters."
    parts = []
    for cell in notebook.cells:
        if cell["cell_type"] == "markdown": parts.append(source(cell).strip())
        elif is_example(cell): parts.append(shown(cell))
    return "\n\n".join(parts) + f"\n\n*Notebook: `nbs/{notebook.name}.ipynb`*"


def contents(package: str = "") -> str:
    "Links to the modules of a package, or to all, each with the line below its notebook's title."
    lines = []
    for notebook in notebooks():
        if not notebook.module or not notebook.module.startswith(package): continue
        # a package's page lies beside the folder that holds its modules' pages, and so does the page of all
        place = "/".join(["proxy_sft", *notebook.module.split(".")][package.count("."):])
        lines.append(f"- [`{notebook.module}`]({place}.html): {notebook.quote}")
    return "\n".join(lines)


def build(target: Path) -> list[Path]:
    "One page per module, an index of all of them, and a page per package."
    sys.path.insert(0, str(ROOT))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    root = importlib.import_module("proxy_sft")
    about = re.search(r"(?s)\n\n(\S[^\n]*?\*\*.*?)\n\n", readme)
    root.__doc__ = f"{about[1] if about else ''}\n\n{contents('')}"
    for notebook in notebooks():
        if notebook.module: importlib.import_module(f"proxy_sft.{notebook.module}").__doc__ = prose(notebook)
    for package in {n.module.rpartition(".")[0] for n in notebooks()} - {""}:
        importlib.import_module(f"proxy_sft.{package}").__doc__ = contents(package + ".")
    pdoc.render.configure(docformat="markdown", show_source=True)
    pdoc.pdoc("proxy_sft", "!proxy_sft._modidx", output_directory=target)  # its modules follow by themselves
    (target / "index.html").write_bytes((target / "proxy_sft.html").read_bytes())  # pdoc's own only leads there
    return sorted(target.rglob("*.html"))


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "_docs").resolve()
    pages = build(target)
    print(f"{len(pages)} pages; open {target / 'index.html'}")
