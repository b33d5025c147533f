"""Who may import whom: arrows point down only (docs/code.md has the tree).

A room is a folder of the package, or a file on its top floor. Imports for type checkers and those
inside functions count; but main() of a command may import what it likes.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from fourstage.ladder import LADDER

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "fourstage"

# room -> what it stands on; and so on down
ARROWS = {
    "train": {"lineage"},
    "lineage": {"tracking", "report"},
    "tracking": {"evaluation"},
    "arena": {"evaluation", "sampling"},
    "evaluation": {"stages"},
    "report": set(),  # but for evaluation.suite
    "chat": {"sampling"},
    "search": {"report"},
    "stages": {"rl", "parallel", "exchange"},
    "rl": {"sampling", "data"},
    "parallel": {"optim", "job"},
    "job": {"model", "data"},
    "sampling": {"model"},
    "optim": {"model"},
    "exchange": {"model"},
    "model": {"kernels"},
    "data": set(),
    "kernels": set(),
}
# everything may import them, in this order
GROUND = (
    *("runs", "tokenizer", "settings", "interruptions", "files", "batch"),
    *("ladder", "errors"),
)
EXTRA = {
    "report": {"fourstage.evaluation.suite"},
    "search": {"fourstage.evaluation.suite"},
}
# packages that only these rooms may import
FOREIGN = {
    "hydra": {"train", "lineage", "search"},
    "omegaconf": {"train", "lineage"},
    "lightning": {"lineage", "tracking", "stages", "parallel"},
    "deepspeed": {"parallel"},
    "wandb": {"lineage", "tracking"},
    "wandb_workspaces": {"tracking"},
    "matplotlib": {"report"},
    "reasoning_gym": {"data"},
    "datasets": {"data"},
    "lm_eval": {"evaluation"},
    "huggingface_hub": {"data", "exchange"},
    "gradio": {"arena"},
    "gguf": {"exchange"},
    "optuna": {"search"},
}
MAY_BE_DELETED = {"fourstage.kernels"}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of the package and train.py."""
    found = {"train": ROOT / "train.py"}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def room(module: str) -> str:
    """fourstage.data.files -> data."""
    return module.removeprefix("fourstage").lstrip(".").split(".")[0]


def is_main(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == "main"


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
    """Dotted names, of which ours are cut to the module."""
    # `python -m fourstage.model` runs model/__main__.py, which is a command as a whole
    names = imports(path.read_text(encoding="utf-8"), is_a_command=path.name == "__main__.py")
    ours = {*MODULES, *MAY_BE_DELETED}
    return {name if name in ours else name.rpartition(".")[0] or name for name in names}


MODULES = modules()


def test_no_circle() -> None:
    for graph in (ARROWS, {m: imported(m, path) & set(MODULES) for m, path in MODULES.items()}):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(" -> ".join(error.args[1]))


def test_every_module_has_its_place() -> None:
    there = {*MODULES, *MAY_BE_DELETED} - {"train"}
    assert {room(module) for module in there} - {"", "__main__"} | {"train"} == {*ARROWS, *GROUND}


def test_the_top_floor_is_small() -> None:
    there = [path for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "__init__.py")]
    assert len([path for path in there if path.is_dir()]) <= 17
    assert len([path for path in there if path.suffix == ".py"]) <= 9


@pytest.mark.parametrize("module", [m for m in MODULES if m not in ("fourstage", "train")])
def test_arrows_point_down(module: str) -> None:
    own = room(module)
    below = reachable(own) if own in ARROWS else set()
    ground = GROUND[GROUND.index(own) :] if own in GROUND else GROUND
    names = {name for name in imported(module, MODULES[module]) if name.startswith("fourstage.")}
    found = {room(name) for name in names - EXTRA.get(own, set())} - {"__version__"}
    wrong = found - below - {own, *ground}
    assert not wrong, f"{module} may not import {', '.join(sorted(wrong))}"


def test_stages_do_not_import_each_other() -> None:
    for stage in LADDER:
        path = PACKAGE / "stages" / f"{stage}.py"
        names = imports(path.read_text(encoding="utf-8"))
        others = {f"fourstage.stages.{other}" for other in LADDER if other != stage}
        found = {name for name in names for o in others if name == o or name.startswith(o + ".")}
        assert not found, f"{stage} imports {found}"
        assert not any(name == f"fourstage.stages.{s}Module" for name in names for s in others)


@pytest.mark.parametrize("package", FOREIGN)
def test_packages_are_kept_to_their_place(package: str) -> None:
    users = set()
    for module, path in MODULES.items():
        if any(name.split(".")[0] == package for name in imported(module, path)):
            users.add(room(module) if module != "train" else module)
    assert users <= FOREIGN[package], f"{package} is imported by {users - FOREIGN[package]}"


def test_deepspeed_is_imported_only_once_a_zero_trainer_is_chosen() -> None:
    """Its import takes seconds: functions that ZeRO alone calls do it."""
    tree = ast.parse(MODULES["fourstage.parallel.strategies"].read_text(encoding="utf-8"))
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
    letters = ("a", "b", "c", "d.name", "e", "f", "g", "types_only")
    expected = {f"fourstage.{x}" for x in letters}
    assert ours == expected | {"fourstage.in_main"}  # no command: its main is a function
    command = source + "if __name__ == '__main__':\n    import fourstage.h\n    main()\n"
    assert {n for n in imports(command) if n.startswith("fourstage")} == expected
