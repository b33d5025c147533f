"""pyproject.toml, constraints.txt and the Makefile agree."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(name): version for name, version in pairs}


def test_every_requirement_is_pinned_within_its_range() -> None:
    pinned = pins()
    texts = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    for requirement in map(Requirement, texts):
        if requirement.name != PROJECT["name"]:
            version = pinned.get(normal(requirement.name))
            assert version is not None, f"{requirement.name} is not in constraints.txt"
            assert requirement.specifier.contains(version), requirement


def test_the_pins_install_anywhere() -> None:
    """No local builds such as 2.13.0+cpu, which only one index has."""
    assert pins()["torch"] == "2.13.0"
    assert not [version for version in pins().values() if "+" in version]


def test_what_the_makefile_does_without_asking_works() -> None:
    """Its `-` hides an error of what compiles the kernels."""
    (code,) = re.findall(r'-@\$\(PY\) -c "(.*?)"', (ROOT / "Makefile").read_text())
    exec(code, {})


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """make as from a shell: not as a part of the `make test` that may be running this."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_make_help_lists_every_target() -> None:
    listed = re.findall(r"^  make ([a-z-]+)", make(ROOT, "help").stdout, re.M)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert set(listed) == set(phony) - {"no-interpreter"}


@pytest.mark.parametrize("python", ["/no/such/python", "false"])
def test_make_says_which_python_it_needs(tmp_path: Path, python: str) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = make(tmp_path, "test", f"PYTHON={python}")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("make: no Python 3.11, 3.12 or 3.13 found as '")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["TORCH_INDEX=http://nowhere"],
            "make: PyTorch could not be installed from TORCH_INDEX=http:",
        ),
        ([], "make: the install failed: pip's reason is above. (It needs a network, and pycosat "),
    ],
)
def test_an_install_that_fails_says_why(tmp_path: Path, arguments: list[str], line: str) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\ncase "$*" in *"pip --version") exit 0;; esac\necho no >&2; exit 1\n'
    )
    python.chmod(0o755)
    done = make(tmp_path, "setup", *arguments)
    assert done.returncode == 2 and not (tmp_path / ".venv" / ".ready").exists()
    said = done.stderr.splitlines()
    assert said[0] == "no" and said[1].startswith(line) and len(said) == 3  # and make's own
