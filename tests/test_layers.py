"""Imports go down only: scripts -> tasks -> nanochat, and inside nanochat four layers.

A new module has to be entered here: that is the moment to think about where it belongs.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = [
    {"errors"},
    # Leaves: import errors and each other.
    {
        "calculator",
        "config",
        "conversation",
        "execution",
        "help_page",
        "kv_cache",
        "paths",
        "progress",
        "runtime",
        "sandbox_child",
        "schedule",
    },
    # Parts.
    {
        "adamw",
        "attention",
        "conversation_store",
        "corpus",
        "corpus_files",
        "dataloader",
        "dataset",
        "download",
        "functional",
        "gpt",
        "loss",
        "memory",
        "muon",
        "optim",
        "packing",
        "rope",
        "token_store",
        "tokenizer",
    },
    # Assemblies.
    {
        "batch_view",
        "checkpoint_manager",
        "completion",
        "core_eval",
        "decoder",
        "engine",
        "export",
        "fp8",
        "guard",
        "hf_tokenizer",
        "launch",
        "log",
        "loss_eval",
        "model_card",
        "modeling_nanochat_full",
        "plan",
        "preferences",
        "prefill",
        "protocol",
        "report",
        "report_blocks",
        "report_material",
        "report_plots",
        "report_render",
        "report_stage",
        "rl",
        "rl_rows",
        "rl_stage",
        "scoring",
        "sampling",
        "server",
        "slots",
        "service",
        "stage",
        "tools",
        "train",
        "transcript",
    },
]
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    """Dotted name -> file of everything in the three packages."""
    return {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
        for package in ("nanochat", "tasks", "scripts")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Modules of the project that a file imports, inside functions too, __main__ excepted."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not is_main_guard(node)]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layers"
            base = node.module or ""
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found & set(MODULES)


def is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def test_every_module_has_a_layer() -> None:
    names = {name.removeprefix("nanochat.") for name in MODULES if name.startswith("nanochat.")}
    entered = [name for layer in LAYERS for name in layer]
    assert names <= set(entered), f"say where these belong: {sorted(names - set(entered))}"
    assert set(entered) <= names, f"these are gone: {sorted(set(entered) - names)}"
    assert len(entered) == len(set(entered)), "a module is in one layer"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_only(module: str) -> None:
    package = module.split(".")[0]
    for other in imports(MODULES[module]):
        where = f"{module} imports {other}"
        allowed = {"nanochat": {"nanochat"}, "tasks": {"nanochat", "tasks"}}.get(package)
        assert allowed is None or other.split(".")[0] in allowed, where
        if package == "nanochat":
            mine, theirs = (LAYER_OF[m.removeprefix("nanochat.")] for m in (module, other))
            assert theirs <= mine, where


def test_no_cycles() -> None:
    try:
        list(TopologicalSorter({m: imports(path) for m, path in MODULES.items()}).static_order())
    except CycleError as error:
        pytest.fail(f"cycle: {' -> '.join(error.args[1])}")


def test_the_model_knows_no_optimizer_no_environment_and_no_collective() -> None:
    for name in ("gpt", "attention", "rope", "kv_cache"):
        tree = ast.parse(MODULES[f"nanochat.{name}"].read_text(encoding="utf-8"))
        words = {
            ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)
        }
        text = " ".join(words)
        for word in ("optim", "distributed", "import os", "runtime"):
            assert word not in text, f"{name} imports {word}"


def test_only_runtime_reads_the_ranks() -> None:
    for module, path in MODULES.items():
        if module == "nanochat.runtime":
            continue
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        read = strings & {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
        assert not read, f"{module} reads {read}"


@pytest.mark.parametrize("script", sorted(m for m in MODULES if m.startswith("scripts.")))
def test_scripts_are_a_main_under_a_guard(script: str) -> None:
    """Importing is free: a module defines things and does nothing."""
    tree = ast.parse(MODULES[script].read_text(encoding="utf-8"))
    assert any(isinstance(n, ast.FunctionDef) and n.name == "main" for n in tree.body)
    assert is_main_guard(tree.body[-1])
    for node in tree.body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{script}: {ast.unparse(node)}"
        assert not isinstance(node, ast.For | ast.While | ast.With)
