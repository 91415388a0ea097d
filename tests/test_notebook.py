"""The examples run: the notebook, at a smaller size, and the task that docs/customize.md shows."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nanochat.conversation import validate
from nanochat.errors import UserError
from tasks import registry
from tasks.common import Task

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
SMALL = {"vocab_size": 400, "total_batch_size": 256, "eval_tokens": 256, "num_steps": 2}


def corpus(folder: Path) -> Path:
    """Some English: the identity conversations as text."""
    path = folder / "text.jsonl"
    with (ROOT / "tasks/data/identity_conversations.jsonl").open("rb") as file:
        rows = [json.loads(line) for line in file]
    texts = [" ".join(str(m["content"]) for m in row["messages"]) for row in rows]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    return path


@pytest.mark.timeout(600)
def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat: Any = pytest.importorskip("nbformat")
    nbclient: Any = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs, "outputs are not kept in the file"
            text = cell.source.replace('corpus = "bbe"', f"corpus = {str(corpus(tmp_path))!r}")
            for name, value in SMALL.items():
                text = re.sub(rf"{name}=[\d_]+", f"{name}={value}", text)
            cell.source = text
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    nbclient.NotebookClient(notebook, timeout=200, kernel_name="python3").execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = "".join(output.get("text", "") for output in code[-2].outputs)
    assert printed.startswith("Who are you?")
    shown = "".join(output.get("data", {}).get("text/html", "") for output in code[-1].outputs)
    assert "&lt;polyline" in shown, "the report with its curves"
    assert {path.name for path in (tmp_path / "base" / "checkpoints").iterdir()} == {
        "base", "mid", "sft",
    }  # fmt: skip


def test_a_weight_where_none_belongs_is_named() -> None:
    with pytest.raises(UserError, match=r"path is given twice.*a weight belongs to --mix only"):
        registry.build("customjson:identity.jsonl:20", "train")
    with pytest.raises(UserError, match="20 is not a file"):
        registry.build("customjson:20", "train")


def test_the_task_of_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "customize.md").read_text("utf-8")
    [source] = re.findall(r"```python\n(\"\"\"Reversing words.*?)```", page, re.DOTALL)
    [entry] = re.findall(r"```python\n    \"reverse\": Entry\((\w+), \"(\w+)\"\),\n```", page)
    assert len([line for line in source.splitlines() if line]) <= 30
    names: dict[str, Any] = {}
    exec(source, names)
    monkeypatch.setitem(registry.TASKS, "reverse", registry.Entry(names[entry[0]], entry[1]))
    train, test = (registry.build("reverse:200", split) for split in ("train", "test"))
    assert isinstance(train, Task)
    assert len(train) == 200
    for task in (train, test):
        for i, row in enumerate(task):
            validate(row, task.where(i))
            assert task.evaluate(row, f" {row['answer']}\n")
            assert not task.evaluate(row, row["answer"] + "x")
    words: set[str] = set()
    for split in ("train", "val", "test"):
        answers = {row["answer"] for row in registry.build("reverse:2000", split)}
        assert not answers & words
        words |= answers
    assert train.fingerprint() != test.fingerprint()
