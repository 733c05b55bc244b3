"""Write docs/licences.md: what the packages of requirements.lock say about their licence."""
import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def licence(package: str) -> str:
    "The licence expression, the classifiers, or the first line of the licence field; in this order."
    try: found = metadata(package)
    except PackageNotFoundError: return "not installed here"
    if found["License-Expression"]: return found["License-Expression"]
    classes = [
        c.rpartition(" :: ")[2]
        for c in found.get_all("Classifier") or []
        if c.startswith("License ::") and " :: " in c[11:]
    ]
    return ", ".join(classes) or (found["License"] or "not stated in its metadata").strip().splitlines()[0][:80]


def page() -> str:
    "A table of all packages of the lock file."
    names = sorted(
        {
            re.split(r"[=<>\[; ]", line)[0].lower()
            for line in (ROOT / "requirements.lock").read_text().splitlines()
            if re.match(r"[A-Za-z]", line)
        }
    )
    rows = "\n".join(f"| {name} | {licence(name).replace('|', '/')} |" for name in names)
    return (
        "# Licences of the dependencies\n\nWhat each package of `requirements.lock` states in its own metadata; "
        "written by `python tools/licences.py`.\n\n"
        f"| package | licence |\n|---|---|\n{rows}\n"
    )


if __name__ == "__main__": (ROOT / "docs" / "licences.md").write_text(page(), encoding="utf-8")
