"""Imports go down only: scripts, tasks, nanochat; there, wings stand on the hall and few others,
and the hall on none of them."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDS_ON: dict[str, set[str]] = {
    "": set(),  # the hall
    "data": set(),
    "tools": set(),
    "infer": {"data", "tools"},
    "eval": {"data"},
    "rl": {"data", "infer", "eval"},
    "serve": {"infer"},
    "export": {"infer", "eval"},
    "report": {"data", "eval"},
}
FILES = [
    path.relative_to(ROOT)
    for folder in ("nanochat", "tasks", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def room(parts: tuple[str, ...]) -> tuple[str, str]:
    """("nanochat", "data", "store") -> ("nanochat", "data"); of the hall: ("nanochat", "")."""
    inside = parts[0] == "nanochat" and len(parts) > 1 and parts[1] in STANDS_ON
    return parts[0], parts[1] if inside else ""


def imported(path: Path) -> set[tuple[str, ...]]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {(*node.module.split("."), alias.name) for alias in node.names}
    return {name for name in found if name[0] in ("nanochat", "tasks", "scripts")}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down(path: Path) -> None:
    package, wing = room(path.with_suffix("").parts)
    for name in imported(path):
        other, stood_on = room(name)
        if package == other == "nanochat":
            allowed = {wing, "", *STANDS_ON[wing]}
            assert stood_on in allowed, f"{path} imports {'.'.join(name)}"
        else:
            order = ["scripts", "tasks", "nanochat"]
            assert order.index(package) <= order.index(other), f"{path} imports {'.'.join(name)}"


def test_every_wing_is_known() -> None:
    folders = {p.parent.name for p in (ROOT / "nanochat").glob("*/__init__.py")}
    assert folders == set(STANDS_ON) - {""}


def module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def test_no_cycles() -> None:
    modules = {module(path): path for path in FILES}
    graph = {
        name: {
            ".".join(parts[:n])
            for parts in imported(path)
            for n in (len(parts), len(parts) - 1)
            if ".".join(parts[:n]) in modules and ".".join(parts[:n]) != name
        }
        for name, path in modules.items()
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"cycle: {' -> '.join(error.args[1])}")


def test_the_model_knows_no_optimizer_no_environment_and_no_collective() -> None:
    for name in ("gpt", "attention", "rope", "kv_cache"):
        text = (ROOT / "nanochat" / f"{name}.py").read_text("utf-8")
        lines = [line for line in text.splitlines() if line.lstrip().startswith(("import", "from"))]
        for word in ("optim", "distributed", "import os", "runtime"):
            assert word not in "\n".join(lines), f"{name} imports {word}"


def test_only_runtime_reads_the_ranks() -> None:
    for path in FILES:
        if path == Path("nanochat/runtime.py"):
            continue
        strings = {
            node.value
            for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        read = strings & {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
        assert not read, f"{path} reads {read}"


def test_a_public_class_has_a_name_of_its_own() -> None:
    """Each script has a Config; the exported modelling file is a world of its own, read alone."""
    homes: dict[str, list[str]] = {}
    for path in FILES:
        if path == Path("nanochat/export/modeling_nanochat_full.py"):
            continue
        for node in ast.parse((ROOT / path).read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(str(path))
    for name, paths in homes.items():
        if name == "Config":
            paths = [path for path in paths if not path.startswith("scripts/")]
        assert len(paths) <= 1, f"{name} is a class in each of {', '.join(paths)}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent == Path("scripts") and p.stem != "__init__"], ids=str
)
def test_scripts_are_a_main_under_a_guard(path: Path) -> None:
    """Importing is free: a module defines things and does nothing."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    assert any(isinstance(n, ast.FunctionDef) and n.name == "main" for n in tree.body)
    guard = tree.body[-1]
    assert isinstance(guard, ast.If)
    assert "__name__" in ast.unparse(guard.test)
    for node in tree.body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{path}: {ast.unparse(node)}"
        assert not isinstance(node, ast.For | ast.While | ast.With)
