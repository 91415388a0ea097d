"""One writer at a time, whole folders or none, and names that stay inside the base folder."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat import paths
from nanochat.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from nanochat import paths
with paths.lock(Path(sys.argv[1]), "testing"), paths.atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of `artifact` and writes it for a minute."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "artifact")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_second_is_told_who_holds_it(
    tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = tmp_path / "artifact"
    who = f"artifact is in use by process {holder.pid} on {socket.gethostname()} (testing)"
    with pytest.raises(UserError) as refused, paths.lock(artifact, wait=False):
        pass
    assert who in str(refused.value)
    assert "\n" not in str(refused.value)
    threading.Timer(0.5, holder.send_signal, [signal.SIGKILL]).start()
    with paths.lock(artifact):
        assert names(tmp_path) == [".artifact.lock"], "what the killed one left is gone"
    assert who in capsys.readouterr().err
    assert names(tmp_path) == []


def test_waiting_can_be_given_up(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with (
        pytest.raises(UserError, match=f"waiting for process {holder.pid}"),
        paths.lock(tmp_path / "artifact", cancelled=lambda: True),
    ):
        pass


def test_a_thread_may_take_its_lock_again_and_others_may_not(tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(5):
            with paths.lock(artifact), paths.lock(artifact), paths.lock(artifact.parent / "other"):
                inside += 1
                most = max(most, inside)
                threading.Event().wait(0.001)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert names(tmp_path) == []


def test_leftovers_of_others_are_removed_unless_they_are_at_work(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    dead = tmp_path / ".dead.abcd1234.tmp"
    dead.mkdir()
    [alive] = [
        path
        for path in tmp_path.iterdir()
        if path.name.startswith(".artifact.") and path.suffix == ".tmp"
    ]
    with paths.lock(tmp_path / "mine"):
        pass
    assert not dead.exists()
    assert (alive / "half").read_text() == "x"
    assert holder.poll() is None


def test_what_was_replaced_comes_back_when_the_second_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "tokenizer"
    final.mkdir()
    (final / "old").write_text("precious")
    rename, calls = os.replace, 0

    def fails(*args: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(5, "Input/output error")
        rename(*args)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="Input/output"), paths.atomic_folder(final) as folder:
        (folder / "new").write_text("x")
    assert names(final) == ["old"]
    assert names(tmp_path) == ["tokenizer"]


def test_what_was_replaced_comes_back_after_a_kill_between_the_renames(tmp_path: Path) -> None:
    aside = tmp_path / ".tokenizer.abcd1234.tmp"
    (aside / "old").mkdir(parents=True)
    (aside / "old" / "file").write_text("precious")
    with paths.lock(tmp_path / "tokenizer"):
        assert (tmp_path / "tokenizer" / "file").read_text() == "precious"
    assert names(tmp_path) == ["tokenizer"]


@pytest.mark.parametrize(
    "tag",
    ["", ".", "..", "../esc", "a/b", "a\\b", ".hidden", "-flag", "step_000001", "x\n", "a" * 101],
)
def test_tags_that_are_no_folder_names_are_refused(tag: str) -> None:
    for folder in (paths.checkpoints_dir, paths.run_dir):
        with pytest.raises(UserError, match="--tag"):
            folder("base", tag)


@pytest.mark.parametrize("tag", ["default", "d4", "my run", "v1.2_x-y+z=3", "größer", "step_x"])
def test_other_tags_are_taken(tag: str) -> None:
    assert paths.checkpoints_dir("base", tag).name == tag


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~/artifacts")
    assert paths.base_dir() == tmp_path / "artifacts"
    monkeypatch.delenv("NANOCHAT_BASE_DIR")
    assert paths.base_dir() == tmp_path / ".cache" / "nanochat"
    (tmp_path / "hub" / "org" / "name").mkdir(parents=True)
    monkeypatch.setenv("NANOCHAT_HUB_DIR", "~/hub")
    assert paths.hub_source("org/name") == str(tmp_path / "hub" / "org" / "name")


def test_flags_with_a_home_in_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nanochat.cli import parse
    from scripts import chat_cli, export_hf

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for arguments in (["--out=~/model"], ["--out", "~/model"]):
        assert parse(export_hf.Config, arguments).out == tmp_path / "model"
    said = parse(chat_cli.Config, ["--prompt", "~/x is what?"])
    assert said.prompt == "~/x is what?"


@pytest.mark.parametrize("size", [0, 1, 3 << 20])
def test_a_hashed_file_knows_what_is_in_it(size: int, tmp_path: Path) -> None:
    content = os.urandom(size)
    with paths.HashedFile(tmp_path / "file") as file:
        for start in range(0, size, 1 << 20):
            file.write(memoryview(content)[start : start + (1 << 20)])
    assert (tmp_path / "file").read_bytes() == content
    digest = paths.file_sha256(tmp_path / "file")
    assert file.record == {"size": size, "sha256": digest}


def test_what_runs_in_the_background_tells_its_failure() -> None:
    assert paths.in_background(lambda: 3).result() == 3
    with pytest.raises(ZeroDivisionError):
        paths.in_background(lambda: 1 // 0).result()
