"""Write docs/public_names.txt: every public name of every module, as the exported files list them. The test compares."""
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "docs" / "public_names.txt"


def names_of(path: Path) -> list[str]:
    "The names in a module's `__all__`, without importing it."
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets): return sorted(ast.literal_eval(node.value))
    return []


def public_names() -> str:
    "One line per name: module.name."
    modules = sorted(p for p in (ROOT / "proxy_sft").glob("*.py") if not p.name.startswith("_"))
    return "".join(f"{path.stem}.{name}\n" for path in modules for name in names_of(path) if not name.startswith("_"))


if __name__ == "__main__": LIST.write_text(public_names(), encoding="utf-8")
