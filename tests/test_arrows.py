"""Who may import whom: arrows point down only (docs: the README's tree).

Imports for type checkers only are no arrows, and main() of a module that is run with `python -m`
may import what it likes. Imports inside other functions count.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "fourstage"

# unit (a file or a folder of the package) -> what it stands on; and so on down
ARROWS = {
    "train": {"lineage"},
    "lineage": {"plan", "ranks", "runs", "runner", "report"},
    "plan": {"runs", "stages", "data", "callbacks", "evaluation", "scaling"},
    "runner": {"resume", "cost", "prepare", "run_evaluation", "strategies"},
    "run_evaluation": {"evaluation", "prepare", "callbacks"},
    "prepare": {"stages", "data"},
    "chat": {"runs", "generate", "checkpoint"},
    "stages": {"rl", "checkpoint", "model", "muon", "strategies"},
    "muon": {"model"},
    "zero_muon": {"muon"},
    "strategies": {"zero_muon"},
    "evaluation": {"judges"},
    "eval_items": {"rl", "suite"},
    "judges": {"eval_items"},
    "suite": set(),
    "scaling": set(),
    "resume": {"callbacks"},
    "callbacks": {"loggers", "generate", "strategies"},
    "rl": {"generate"},
    "generate": {"model"},
    "checkpoint": {"model"},
    "dashboard": {"dashboard_spec", "loggers", "runs"},
    "dashboard_spec": {"suite"},
    "loggers": set(),
    "cost": set(),
    "ranks": set(),
    "runs": set(),
    "data": set(),
    "model": set(),
    "report": {"suite"},
}
SHARED = {
    "batch",
    "tokenizer",
    "errors",
    "interruptions",
    "settings",
    "job",
    "verify",
    "verifiers",
    "final_answer",
    "sandbox",
}  # everything may import them
# they import nothing else of ours
ALONE = {"report", "suite"}
# packages that only these units may import
FOREIGN = {
    "hydra": {"train"},
    "omegaconf": {"train"},
    "lightning": {
        *("stages", "strategies", "callbacks", "resume", "cost", "loggers", "prepare"),
        *("runner", "lineage"),
    },
    "deepspeed": {"strategies"},
    "wandb": {"loggers", "callbacks", "runner", "dashboard"},
    "wandb_workspaces": {"dashboard"},
    "matplotlib": {"report"},
    "reasoning_gym": {"data", "verifiers"},
    "datasets": {"data"},
}
STAGE_FILES = ("pretrain", "sft", "reward", "ppo", "grpo")


def modules() -> dict[str, Path]:
    """Dotted name -> file, of the package and train.py."""
    found = {"train": ROOT / "train.py"}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def unit(module: str) -> str:
    """fourstage.data.files -> data."""
    return module.removeprefix("fourstage").lstrip(".").split(".")[0]


def is_main(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == "main"


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def is_entry(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imports(source: str, is_a_command: bool = False) -> set[str]:
    """Dotted names that the source imports; `from a import b` gives a.b."""
    tree = ast.parse(source)
    is_a_command = is_a_command or any(is_entry(node) for node in tree.body)
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if is_for_types(node):
            waiting += node.orelse  # type: ignore[attr-defined]
            continue
        if is_a_command and node in tree.body and (is_main(node) or is_entry(node)):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return found


def reachable(name: str) -> set[str]:
    """Everything below a unit."""
    below: set[str] = set()
    waiting = list(ARROWS[name])
    while waiting:
        other = waiting.pop()
        if other not in below:
            below.add(other)
            waiting += ARROWS[other]
    return below


def imported(module: str, path: Path) -> set[str]:
    # `python -m fourstage.model` runs model/__main__.py, which is a command as a whole
    return imports(path.read_text(encoding="utf-8"), is_a_command=path.name == "__main__.py")


MODULES = modules()


def test_the_arrows_have_no_cycle() -> None:
    assert not [name for name in ARROWS if name in reachable(name)]


def test_every_module_has_its_place() -> None:
    units = {unit(module) for module in MODULES if module != "train"} - {""}
    assert units | {"train"} == set(ARROWS) | SHARED


@pytest.mark.parametrize("module", [m for m in MODULES if m != "fourstage"])
def test_arrows_point_down(module: str) -> None:
    own = "train" if module == "train" else unit(module)
    allowed = {own} | (reachable(own) if own in ARROWS else set())
    if own not in ALONE:
        allowed |= SHARED
    ours = {name for name in imported(module, MODULES[module]) if name.startswith("fourstage.")}
    ours = {unit(name) for name in ours}
    ours -= {"__version__"}
    assert ours <= allowed, f"{module} may not import {', '.join(sorted(ours - allowed))}"


def test_stages_do_not_import_each_other() -> None:
    for stage in STAGE_FILES:
        path = PACKAGE / "stages" / f"{stage}.py"
        names = imports(path.read_text(encoding="utf-8"))
        others = {f"fourstage.stages.{other}" for other in STAGE_FILES if other != stage}
        found = {name for name in names for o in others if name == o or name.startswith(o + ".")}
        assert not found, f"{stage} imports {found}"
        assert not any(name == f"fourstage.stages.{s}Module" for name in names for s in others)


@pytest.mark.parametrize("package", FOREIGN)
def test_packages_are_kept_to_their_place(package: str) -> None:
    users = set()
    for module, path in MODULES.items():
        if any(name.split(".")[0] == package for name in imported(module, path)):
            users.add("train" if module == "train" else unit(module))
    assert users <= FOREIGN[package], f"{package} is imported by {users - FOREIGN[package]}"


def test_deepspeed_is_imported_only_once_a_zero_trainer_is_chosen() -> None:
    """Its import takes seconds: functions that ZeRO alone calls do it."""
    tree = ast.parse(MODULES["fourstage.strategies"].read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not [n for n in imports(ast.unparse(node)) if n.split(".")[0] == "deepspeed"]


def test_imports_are_found_where_they_hide() -> None:
    source = """
from typing import TYPE_CHECKING
import fourstage.a, torch.nn
from fourstage import b
if TYPE_CHECKING:
    from fourstage import types_only
else:
    import fourstage.c
def function():
    from fourstage.d import name
def main():
    import fourstage.in_main
class C:
    def main(self):
        import fourstage.e
try:
    import fourstage.f
except ImportError:
    import fourstage.g
"""
    ours = {name for name in imports(source) if name.startswith("fourstage")}
    expected = {f"fourstage.{x}" for x in ("a", "b", "c", "d.name", "e", "f", "g")}
    assert ours == expected | {"fourstage.in_main"}  # no command: its main is a function
    command = source + "if __name__ == '__main__':\n    import fourstage.h\n    main()\n"
    assert {n for n in imports(command) if n.startswith("fourstage")} == expected
