"""Files that take longest begin first, so that two workers end at about the same time."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

LONGEST = (
    "test_faults",
    "test_launch",
    "test_pipeline",
    "test_prepare",
    "test_train",
    "test_repository",
    "test_browser",
    "test_serving",
    "test_evaluate",
    "test_download",
    "test_chat",
)


def pytest_collection_modifyitems(items: list) -> None:
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(Path(item.fspath).stem, len(LONGEST)))
