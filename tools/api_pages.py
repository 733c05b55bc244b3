"""`make docs`: plain HTML pages of the library's public names, by pdoc, docments shown with their parameters."""
import sys
from pathlib import Path

import pdoc

ROOT = Path(__file__).resolve().parent.parent


def build(target: Path) -> list[Path]:
    "One page per module and an index."
    sys.path.insert(0, str(ROOT))
    modules = ["proxy_sft"]  # its modules follow by themselves
    pdoc.render.configure(docformat="markdown", show_source=True)
    pdoc.pdoc(*modules, output_directory=target)
    return sorted(target.rglob("*.html"))


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "_docs").resolve()
    pages = build(target)
    print(f"{len(pages)} pages; open {target / 'index.html'}")
