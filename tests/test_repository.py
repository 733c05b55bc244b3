"""The repository: READMEs that tell the truth, links that lead somewhere, names that are listed, notebooks that execute
to what is committed, a wheel that is whole."""
import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from long_form import soak
from api_pages import contents, prose
from execute_notebooks import execute
from module_table import notebooks, PAGE, with_modules
from public_names import LIST, public_names

from proxy_sft.commands import command_parser, COMMANDS
from proxy_sft.launch.parameters import read_request, split_parameters

ROOT, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
READMES = ("README.md", "README.zh.md")
HEAVY = ("torch", "transformers", "tokenizers", "trl", "datasets", "pandas", "pyarrow", "deepspeed", "papermill",
         "nbformat", "IPython")
# modules whose notebooks execute in some seconds; numbers of notebooks change, names of modules do not
QUICK = ("core.atomic_folders", "core.display", "data.schema", "evaluation.serving", "tour")
EXECUTED = {notebook.module or notebook.name: notebook.path for notebook in notebooks()}


def commands(readme: str) -> list[str]:
    "Every line of every bash block, without comments."
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.S)
    return [line for block in blocks for raw in block.splitlines() if (line := re.sub(r"\s*#.*", "", raw).strip())]


def test_both_readmes_give_the_same_commands_and_tables():
    one, two = ((ROOT / name).read_text(encoding="utf-8") for name in READMES)
    mirrors = ("pip config set global.index-url https://", "export HF_ENDPOINT=https://")  # where the hub is far away
    same = [line for line in commands("README.zh.md") if not line.startswith(mirrors)]
    assert commands("README.md") == same and len(same) > 10 and len(commands("README.zh.md")) == len(same) + 2
    shape = lambda text: [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert shape(one) == shape(two) and one.count("\n## ") == two.count("\n## ")


@pytest.mark.parametrize("line", commands("README.md"))
def test_a_command_of_the_readme_names_what_exists(line):
    "Parsed as the program would parse it: targets, notebooks, options, settings."
    first, *rest = shlex.split(line)
    targets = re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"))
    if first == "make": assert rest[0] in targets
    elif first == "papermill":
        words, _, parameters = split_parameters(rest)
        assert (ROOT / words[0]).is_file() and len(words) == 2
        read_request(str(ROOT / words[0]), parameters)
    elif first == "proxy-sft":
        words, _, parameters = split_parameters(rest) if COMMANDS[rest[0]].parameters else (rest, [], {})
        args = command_parser(rest[0]).parse_args(words)
        read_request(str(ROOT / getattr(args, "notebook", "nbs/02_train.ipynb")), parameters)
    else: assert first in ("tmux", "source")


@soak
def test_a_dry_run_of_the_readme_s_longest_command():  # those that need a finished demo are in test_after_demo.py
    done = subprocess.run(
        [str(BIN / "proxy-sft"), *shlex.split("run nbs/02_train.ipynb --nproc 8 -p profile qwen3_8b_8gpu --dry-run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--nproc-per-node 8" in done.stdout, done.stderr[-2000:]


PAGES = (*READMES, "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md")))


@pytest.mark.parametrize("page", PAGES)
def test_links_between_files_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link and not link.startswith("#")]
    for link in links: assert ((ROOT / page).parent / link.partition("#")[0]).exists(), link
    for name in re.findall(r"`((?:nbs|docs|tests|tools|configs|benchmarks)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


def test_the_overview_lists_the_modules_that_there_are():
    text = PAGE.read_text(encoding="utf-8")
    assert with_modules(text) == text and "| `core/01_settings` |" in text, "run make tables"


def test_pages_of_the_documentation_hold_prose_examples_and_an_index():
    calls = next(notebook for notebook in notebooks() if notebook.module == "data.calls")
    page = prose(calls)
    assert page.startswith("# ") and "```python" in page and "```text" in page and "#| export" not in page
    listed = re.findall(r"\]\(proxy_sft/([\w/]+)\.html\): \S", contents())
    assert sorted(listed) == sorted(n.module.replace(".", "/") for n in notebooks() if n.module)
    assert "](calls.html)" not in contents("data.") and "](data/calls.html)" in contents("data.")


def test_public_names_are_those_that_are_listed():
    assert public_names() == LIST.read_text(encoding="utf-8"), (
        "names came or went: python tools/public_names.py, and a line in CHANGELOG.md"
    )


def test_every_command_has_examples_and_help_without_heavy_libraries():
    code = (
        "import sys, proxy_sft.commands as c\nfor words in (['--help'], *([n, '--help'] for n in c.COMMANDS)):\n"
        "  try: c.main(words)\n  except SystemExit: pass\nprint([m for m in " + repr(HEAVY) + " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and all(c.examples and c.examples[0] in done.stdout for c in COMMANDS.values()), (
        done.stderr
    )
    assert done.stdout.endswith("[]\n"), done.stdout[-200:]


@pytest.mark.parametrize("name", QUICK + tuple(pytest.param(n, marks=soak) for n in EXECUTED if n not in QUICK))
def test_executing_again_changes_nothing(name, tmp_path):
    committed, again = EXECUTED[name], tmp_path / EXECUTED[name].name
    shutil.copyfile(committed, again)
    execute(again)
    sources_and_outputs = lambda path: {
        c["id"]: (c["source"], c.get("outputs")) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
    }
    assert sources_and_outputs(again) == sources_and_outputs(committed)


def test_notebooks_keep_their_size():
    for path in sorted(ROOT.glob("nbs/**/*.ipynb")):
        code = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        assert len(code) <= 60 and path.stat().st_size < 200_000, path.name


def test_the_wheel_holds_templates_profiles_and_demo(tmp_path):
    copy = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file() and not name.startswith(("nbs/", "tests/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(copy)]
    subprocess.run([str(BIN / "python"), *build], check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for needed in (
        "proxy_sft/py.typed",
        "proxy_sft/configs/demo.yaml",
        "proxy_sft/configs/ds_config_zero2.json",
        "proxy_sft/demo/rows.py",
    ):
        assert needed in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"proxy_sft"}, "nothing but the package is installed"


def test_the_code_is_python_3_10():
    for path in ROOT.glob("proxy_sft/**/*.py"): ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
