"""Write docs/public_names.txt: every public name of every module, as the exported files list them. The test
compares."""
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "docs" / "public_names.txt"


def names_of(path: Path) -> list[str]:
    "The names in a module's `__all__`, without importing it."
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return sorted(ast.literal_eval(node.value))
    return []


def module_of(path: Path) -> str:
    "The module's name below `proxy_sft`."
    return ".".join(path.relative_to(ROOT / "proxy_sft").with_suffix("").parts)


def public_names() -> str:
    "One line per name: module.name."
    modules = sorted(p for p in (ROOT / "proxy_sft").rglob("*.py") if not p.name.startswith("_"))
    return "".join(
        f"{module_of(path)}.{name}\n" for path in modules for name in names_of(path) if not name.startswith("_")
    )


if __name__ == "__main__": LIST.write_text(public_names(), encoding="utf-8")
