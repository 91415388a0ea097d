"""Dependencies are installed as they were tested: each stands in the lock, within its bounds."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent


def test_every_dependency_is_locked_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += extra
    locked: dict[str, list[Requirement]] = {}
    for line in (ROOT / "requirements.lock").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            locked.setdefault(re.sub("[-_.]+", "-", pin.name).lower(), []).append(pin)
    for text in wanted:
        requirement = Requirement(text)
        pins = locked[re.sub("[-_.]+", "-", requirement.name).lower()]
        for pin in pins:
            assert requirement.specifier.contains(str(pin.specifier).removeprefix("==")), text
        for version in ("3.10", "3.11", "3.12", "3.13"):
            environment = {"python_version": version, "python_full_version": f"{version}.0"}
            fitting = [p for p in pins if p.marker is None or p.marker.evaluate(environment)]
            assert len(fitting) == 1, f"{text} on Python {version}: {fitting}"


def test_printed_commands_install_this_folder() -> None:
    """The name on the package index is somebody else's."""
    sources = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    for folder in ("nanochat", "scripts", "tasks"):
        sources += (ROOT / folder).rglob("*.py")
    for path in sources:
        assert not re.search(r"pip install '?nanochat", path.read_text("utf-8")), path
