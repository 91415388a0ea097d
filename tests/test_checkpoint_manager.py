"""Checkpoints: complete or absent, and every kind of damage is an error that names the file."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanochat import checkpoint_manager, paths, runtime
from nanochat.checkpoint_manager import (
    CheckpointManager,
    check_digests,
    find,
    latest,
    list_steps,
    load_model,
    load_weights,
    read_meta,
    read_meta_once,
    restore,
    saved_config,
    system_style,
)
from nanochat.config import Learning
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import Hypers, Optimizer, parameter_rules
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer

# The embedding is sharded on several ranks, the scalars are replicated.
CONFIG = GPTConfig(
    vocab_size=300,
    n_layer=2,
    n_head=2,
    n_kv_head=1,
    n_embd=16,
    head_dim=8,
    spelling_bytes=2,
    context_length=16,
    windows=(8, 0),
)
RUNTIME = runtime.single()


def restored(step: Path, model: Any, optimizer: Any, rank: Runtime) -> dict[str, Any]:
    """Read and restore as a stage does; the metadata."""
    meta = read_meta_once(step, rank)
    restore(step, meta, model, optimizer, rank)
    return meta


def load(step: Path, model: GPT) -> None:
    load_weights(step, read_meta(step), model, RUNTIME)


def make(seed: int = 0, config: GPTConfig = CONFIG, steps: int = 1) -> tuple[GPT, Optimizer]:
    model = GPT(config).init_weights(seed, [bytes([i % 256, seed]) for i in range(300)])
    optimizer = Optimizer(model, parameter_rules(model, Learning(), width=16))
    for step in range(steps):
        ids = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(step))
        model.nll(ids, ids.roll(-1, 1)).mean().backward()
        optimizer.step(Hypers())
        optimizer.zero_grad()
    return model, optimizer


META = {"stage": "base", "tag": "default", "tokenizer_hash": "abc", "num_steps": 9}


def save(folder: Path, step: int, seed: int = 0, **settings: Any) -> tuple[GPT, Optimizer]:
    manager = CheckpointManager(folder, RUNTIME, **settings)
    model, optimizer = make(seed)
    manager.save(step, model, optimizer, META)
    manager.wait()
    return model, optimizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "base" / "default"


def test_what_was_saved_is_restored(folder: Path) -> None:
    model, optimizer = save(folder, 5)
    other, other_optimizer = make(seed=9, steps=3)
    meta = restored(folder / "step_000005", other, other_optimizer, RUNTIME)
    assert meta["step"] == 5
    assert META.items() <= meta.items()
    assert other_optimizer.steps == optimizer.steps == 1
    restored_tensors = other.state_dict()
    for name, a in model.state_dict().items():
        assert torch.equal(a, restored_tensors[name]), name
    mine, theirs = optimizer.state_dict(), other_optimizer.state_dict()
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]), key
    # The loaded weights are in the optimizer's buffers: it goes on training them.
    before = other.embedding.weight.detach().clone()
    other.nll(torch.zeros(1, 4).long(), torch.ones(1, 4).long()).mean().backward()
    other_optimizer.step(Hypers())
    assert not torch.equal(other.embedding.weight, before)


def test_saving_does_not_see_what_training_does_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer starts only after the parameters have been overwritten."""
    import threading

    trained = threading.Event()
    write = CheckpointManager._write

    def late(self: CheckpointManager, *arguments: Any) -> None:
        trained.wait(30)
        write(self, *arguments)

    monkeypatch.setattr(CheckpointManager, "_write", late)
    manager = CheckpointManager(folder, RUNTIME)
    model, optimizer = make()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {k: v.clone() for k, v in optimizer.state_dict().items()}
    meta = {**META, "train_state": {"step": 1}}
    manager.save(1, model, optimizer, meta)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
        for value in optimizer.state_dict().values():
            value.fill_(7.0)
    trained.set()
    manager.wait()
    other, other_optimizer = make(seed=4)
    restored(folder / "step_000001", other, other_optimizer, RUNTIME)
    assert all(torch.equal(p, expected[name]) for name, p in other.named_parameters())
    assert all(torch.equal(v, state[k]) for k, v in other_optimizer.state_dict().items())


def test_older_checkpoints_have_no_token_shift_and_no_spelling(folder: Path) -> None:
    save(folder, 5)
    meta = read_meta(folder / "step_000005")
    assert saved_config(meta, "meta.json") == CONFIG
    for field in ("token_shift", "spelling_bytes"):
        del meta["model_config"][field]
    older = replace(CONFIG, token_shift=False, spelling_bytes=0)
    assert saved_config(meta, "meta.json") == older


def test_saving_reads_nothing_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are hashed while they are written."""
    with monkeypatch.context() as patch:
        patch.setattr(paths, "file_sha256", None)
        patch.setattr(checkpoint_manager, "file_sha256", None)
        save(folder, 5)
    step = folder / "step_000005"
    files = {p.relative_to(step).as_posix() for p in step.rglob("*.safetensors")}
    assert read_meta(step)["files"].keys() == files
    check_digests(step, read_meta(step), files)


def test_a_file_shorter_than_what_was_written_is_no_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint_manager.save_file

    def torn(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
        record = write(tensors, path)
        os.truncate(path, 100)
        return record

    monkeypatch.setattr(checkpoint_manager, "save_file", torn)
    with pytest.raises(OSError, match=r"model.safetensors has 100 bytes instead of [\d,]+"):
        save(folder, 5)
    assert latest(folder) is None


def test_files_are_safetensors_and_json_only(folder: Path) -> None:
    """Nothing in a checkpoint can be unpickled, and names are the parameters'."""
    model, _ = save(folder, 5)
    step = folder / "step_000005"
    files = [path for path in step.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        head = path.read_bytes()[:16]
        assert head[:2] not in (b"\x80\x02", b"\x80\x04", b"PK"), f"{path} looks like a pickle"
    from safetensors import safe_open

    with safe_open(step / "model.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        assert set(file.keys()) == set(model.state_dict())
    meta = json.loads((step / "meta.json").read_text())
    assert set(meta["files"]) == {p.relative_to(step).as_posix() for p in files} - {"meta.json"}


def test_no_pickle_is_ever_loaded() -> None:
    source = Path(checkpoint_manager.__file__).read_text()
    for word in ("torch.load", "torch.save", "import pickle", "FileSystemReader"):
        assert word not in source


# Finding


def test_keep_last(folder: Path) -> None:
    manager = CheckpointManager(folder, RUNTIME, keep_last=2)
    model, optimizer = make()
    for step in (1, 2, 30, 4000000):
        manager.save(step, model, optimizer, META)
    manager.wait()
    assert list_steps(folder) == [30, 4000000]
    assert latest(folder) == folder / "step_4000000"
    assert not list(folder.glob(".*")), "nothing is left behind"


def test_zero_keeps_all(folder: Path) -> None:
    for step in (3, 1, 2):
        save(folder, step, keep_last=0)
    assert list_steps(folder) == [1, 2, 3]


def test_leftovers_of_a_killed_run_are_no_checkpoints_and_are_removed(folder: Path) -> None:
    save(folder, 1)
    torn = folder / ".step_000002.tmp"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    (folder / "step_000003").write_text("a file, not a folder")
    (folder / "step_x").mkdir()
    assert list_steps(folder) == [1]
    paths.remove_leftovers(folder)
    assert not torn.exists()
    assert list_steps(folder) == [1]


def test_saving_a_step_again_replaces_it(folder: Path) -> None:
    save(folder, 5, seed=0)
    model, _ = save(folder, 5, seed=1)
    other, optimizer = make(seed=3)
    restored(folder / "step_000005", other, optimizer, RUNTIME)
    assert torch.equal(other.embedding.weight, model.embedding.weight)
    assert list(folder.iterdir()) == [folder / "step_000005"]


def test_a_replaced_step_comes_back_when_the_second_rename_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = save(folder, 5, seed=0)
    rename = os.replace

    def fails(source: Path, target: Path) -> None:
        if Path(source).name == ".step_000005.tmp":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match=r"rank 0: OSError: .*Input/output error"):
        save(folder, 5, seed=1)
    assert list(folder.iterdir()) == [folder / "step_000005"]
    other, optimizer = make(seed=3)
    restored(folder / "step_000005", other, optimizer, RUNTIME)
    assert torch.equal(other.embedding.weight, model.embedding.weight)


def test_find(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of base in"):
        find("base")
    save(folder, 5)
    save(folder, 7)
    newest = folder / "step_000007"
    for source in ("base", "base/default", str(folder), str(newest)):
        assert find(source) == newest, source
    assert find("base", 5) == folder / "step_000005"
    with pytest.raises(UserError, match=r"has no step 6; it has 5, 7"):
        find("base", 6)
    with pytest.raises(UserError, match="no checkpoint of mid in"):
        find("mid")
    with pytest.raises(UserError, match="no checkpoint of base/other"):
        find("base/other")
    (tmp_path / "base").mkdir()
    assert find("base") == newest, "a folder that happens to be called like a stage"


def test_find_takes_the_only_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    save(tmp_path / "checkpoints" / "sft" / "mine", 3)
    assert find("sft").parent.name == "mine"
    save(tmp_path / "checkpoints" / "sft" / "other", 3)
    with pytest.raises(UserError, match=r"several tags \(mine, other\)"):
        find("sft")


# Damage


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save(folder, 5)
    return folder / "step_000005"


def optim_file(step: Path) -> Path:
    return next(iter(sorted((step / "optim").iterdir())))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rewrite_meta(
    change: Callable[[dict[str, Any]], None], digest: bool = False
) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        meta = json.loads(path.read_text())
        change(meta)
        if digest:
            meta["digest"] = paths.meta_digest(meta)
        path.write_text(json.dumps(meta))

    return apply


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated weights": ("model.safetensors", truncate, "instead of"),
    "flipped bit in the weights": ("model.safetensors", flip, "damaged"),
    "missing weights": ("model.safetensors", Path.unlink, "missing"),
    "truncated optimizer shard": ("optim", truncate, "instead of"),
    "flipped bit in an optimizer shard": ("optim", flip, "damaged"),
    "missing optimizer shard": ("optim", Path.unlink, "missing"),
    "truncated meta": ("meta.json", truncate, "not valid JSON"),
    "missing meta": ("meta.json", Path.unlink, "missing"),
    "empty meta": ("meta.json", lambda p: p.write_text(""), "not valid JSON"),
    "meta of another kind": ("meta.json", lambda p: p.write_text("[]"), "not"),
    "meta with undecodable bytes": ("meta.json", lambda p: p.write_bytes(b"\xff{}"), "not valid"),
    "edited meta": (
        "meta.json",
        rewrite_meta(lambda m: m["model_config"].update(softcap=30.0)),
        "changed after",
    ),
    "other format": (
        "meta.json",
        rewrite_meta(lambda m: m.update(format=0), digest=True),
        r"format 0, this version reads 1",
    ),
    "newer format": ("meta.json", rewrite_meta(lambda m: m.update(format=99)), "format 99"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_a_user_error_that_names_the_file(
    damage: str, saved: Path, tmp_path: Path
) -> None:
    name, apply, message = DAMAGE[damage]
    step = tmp_path / "step_000005"
    shutil.copytree(saved, step)
    path = optim_file(step) if name == "optim" else step / name
    apply(path)
    before = make(seed=3)
    weights = before[0].head.weight.detach().clone()
    with pytest.raises(UserError, match=message) as caught:
        restored(step, *before, RUNTIME)
    assert str(path) in str(caught.value)
    assert torch.equal(before[0].head.weight, weights), "nothing was loaded"
    if damage == "flipped bit in an optimizer shard":
        load(step, before[0])  # what is not read is not hashed
    else:
        with pytest.raises(UserError, match=message):
            load(step, before[0])


def test_another_model_is_a_user_error(saved: Path) -> None:
    from dataclasses import replace

    deeper = replace(CONFIG, n_layer=3, windows=(8, 8, 0))
    with pytest.raises(UserError, match=r"another model: it has .*n_layer.*2"):
        restored(saved, *make(config=deeper), RUNTIME)


def test_weights_of_another_model_are_a_user_error(saved: Path, tmp_path: Path) -> None:
    """Even where the metadata agrees with itself."""
    from dataclasses import replace

    save(tmp_path, 5)
    step = tmp_path / "step_000005"
    other = GPT(replace(CONFIG, n_embd=32, n_head=4)).init_weights(0, ())
    with pytest.raises(UserError, match=r"model\.safetensors is of another model.*other shape"):
        load(step, other)


def test_a_configuration_field_that_came_later_takes_its_default(
    saved: Path, tmp_path: Path
) -> None:
    """A checkpoint written before GPTConfig had `trained_context_length`."""
    step = tmp_path / "step_000005"
    shutil.copytree(saved, step)
    rewrite_meta(lambda m: m["model_config"].pop("trained_context_length"), digest=True)(
        step / "meta.json"
    )
    restored(step, *make(seed=3), RUNTIME)


def test_another_tokenizer_is_a_user_error(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="no tokenizer in"):
        load_model(str(saved), RUNTIME)
    Tokenizer.train(["some text"], 267).save()
    with pytest.raises(UserError, match=r"trained with tokenizer abc and vocabulary 300.*with 267"):
        load_model(str(saved), RUNTIME)


def test_load_model_gives_the_same_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tokenizer = Tokenizer.train(["some text"], 267)
    tokenizer.save()
    folder = tmp_path / "checkpoints" / "base" / "default"
    manager = CheckpointManager(folder, RUNTIME)
    model, optimizer = make()
    manager.save(3, model, optimizer, {**META, "tokenizer_hash": tokenizer.hash})
    manager.wait()
    loaded, same, meta = load_model("base", RUNTIME)
    assert same.hash == tokenizer.hash
    assert meta["step"] == 3
    ids = torch.arange(16)[None]
    assert torch.equal(loaded(ids), model(ids))


# Full disks and other failures of a save


@pytest.mark.parametrize("what", ["weights", "optimizer", "meta", "rename"])
def test_a_failed_save_leaves_the_one_before_as_the_newest(
    what: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(folder, 1)
    full = OSError(28, "No space left on device")

    def fail(*_: Any, **__: Any) -> None:
        raise full

    if what == "weights":
        monkeypatch.setattr(checkpoint_manager, "save_file", fail)
    elif what == "optimizer":
        from torch.distributed.checkpoint.filesystem import FileSystemWriter

        monkeypatch.setattr(FileSystemWriter, "_write_data", fail)
    elif what == "meta":
        monkeypatch.setattr(Path, "write_text", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
    manager = CheckpointManager(folder, RUNTIME, keep_last=1)
    model, optimizer = make()
    manager.save(2, model, optimizer, META)
    with pytest.raises(OSError, match=r"saving to .* failed on rank 0.*No space left.*--resume"):
        manager.wait()
    monkeypatch.undo()
    assert latest(folder) == folder / "step_000001"
    assert not list(folder.glob(".*")), "the space is given back"
    restored(folder / "step_000001", model, optimizer, RUNTIME)
    manager.save(3, model, optimizer, META)
    manager.wait()
    assert list_steps(folder) == [3], "the next save works again"


def test_a_failed_save_is_noticed_after_the_next_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next save may be hours away."""

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_manager, "save_file", fail)
    manager = CheckpointManager(folder, RUNTIME)
    manager.check()
    manager.save(2, *make(), META)
    while manager.busy:
        time.sleep(0.001)
    with pytest.raises(OSError, match=r"saving to .* failed on rank 0.*No space left"):
        manager.check()
    manager.check()


def test_weights_are_what_the_library_reads(tmp_path: Path) -> None:
    """Written without it, for speed."""
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a": torch.randn(7, generator=torch.Generator().manual_seed(0)),
        "ünï": torch.randn(2, 1, 4),
        "scalar": torch.tensor(2.5),
    }
    checkpoint_manager.save_file(tensors, tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    assert all(loaded[name].dtype == torch.float32 for name in tensors)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 768 KiB."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting needs root on Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=768k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_really_full_disk(tiny_disk: Path) -> None:
    """Two checkpoints do not fit, wherever in the save the space runs out."""
    manager = CheckpointManager(tiny_disk, RUNTIME)
    model, optimizer = make()
    manager.save(1, model, optimizer, META)
    manager.wait()
    ballast = tiny_disk / "ballast"
    free = os.statvfs(tiny_disk).f_bavail * os.statvfs(tiny_disk).f_frsize
    failures = 0
    for size in range(free, 0, -8192):
        ballast.write_bytes(bytes(size))
        manager.save(2, model, optimizer, META)
        try:
            manager.wait()
        except OSError:
            failures += 1
            assert latest(tiny_disk) == tiny_disk / "step_000001"
            read_meta(tiny_disk / "step_000001")
        else:
            load(tiny_disk / "step_000002", model)
            break
    assert failures >= 5
    assert list_steps(tiny_disk) == [1, 2]


@pytest.mark.parametrize(
    ("meta", "style"),
    [
        ({}, "tokens"),
        ({"run_config": None}, "tokens"),
        ({"run_config": {"depth": 4}}, "tokens"),
        ({"run_config": {"system": "merge"}}, "merge"),
    ],
)
def test_the_style_of_system_messages(meta: dict[str, Any], style: str) -> None:
    assert system_style(meta) == style
