"""Package metadata comes from settings.ini; the profiles and the DeepSpeed configuration travel inside the wheel."""
from configparser import ConfigParser
from pathlib import Path
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
about = ini["DEFAULT"]


class BuildWithConfigs(build_py):
    "Copy `configs/` and the DeepSpeed files beside the modules, where an installed package looks for them."

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "proxy_sft" / "configs"
        target.mkdir(parents=True, exist_ok=True)
        for source in [*here.glob("configs/*"), *here.glob("ds_config_*.json")]:
            shutil.copy2(source, target / source.name)


def requirements():
    "What running needs, and what the checks need beside it, from requirements.in; exact versions are in the lock file."
    running, _, checks = (here / "requirements.in").read_text(encoding="utf-8").partition("# checks and API pages")
    return [[line for line in part.splitlines()[skip:] if line.strip() and not line.startswith("#")]
            for skip, part in ((0, running), (1, checks))]


setup(
    name=about["lib_name"],
    version=about["version"],
    description=about["description"],
    author=about["author"],
    author_email=about["author_email"],
    url=about["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=f">={about['min_python']},<3.13",
    packages=find_packages(include=["proxy_sft", "proxy_sft.*"]),
    package_data={"proxy_sft": ["py.typed", "templates/*"]},
    install_requires=requirements()[0],
    extras_require={"dev": requirements()[1]},
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": [about["console_scripts"]]},
)
