"""Sandbox: runs a Python program that a model wrote, within limits, and returns its output.

The program runs in a separate `python -I` process, in a folder of its own that is removed
afterwards. `nanochat/tools/sandbox_child.py` switches on as many layers of protection as the system
offers. `docs/sandbox.md` says what they promise and what they do not.
"""

import codecs
import contextlib
import errno
import json
import math
import os
import secrets
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from nanochat.errors import UserError

LAYERS = ("limits", "memory", "privileges", "landlock", "seccomp")
"""Names of the layers that protect the rest of the system; see `docs/sandbox.md`."""

MAX_THREADS = 64
MAX_FILES = 1000
MAX_OPEN_FILES = 64
Limit: TypeAlias = Literal["time", "output", "threads", "disk"]
_STARTUP_SECONDS = 20.0  # limit for starting the interpreter; not part of the program's time
_POLL_SECONDS = 0.05
_REPORT_BYTES = 8192  # enough for the child's own lines on stderr
_CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class ExecutionResult:
    """Result of running a program.

    stdout, stderr: decoded output, each at most `output_limit` bytes.
    returncode: the exit status; −n if signal n ended the program (SIGKILL if a limit did).
    limit: the limit that the program broke, or None. "disk" may be found after the program ended.
    finished: True if the last statement was reached. A grader should require `ok and finished`: a
        program that calls `exit(0)` before the checks is ok but not finished.
    layers: the active ones of `LAYERS`; inactive: the others, each with the reason.
    seconds: wall time of the program, without the start of the interpreter.
    """

    stdout: str
    stderr: str
    returncode: int
    limit: Limit | None
    finished: bool
    layers: tuple[str, ...]
    inactive: dict[str, str]
    seconds: float

    @property
    def ok(self) -> bool:
        """True if the program ended by itself with exit status 0."""
        return self.returncode == 0 and self.limit is None

    @property
    def truncated(self) -> bool:
        """True if the output was cut at `output_limit` and the program killed."""
        return self.limit == "output"

    @property
    def signal(self) -> str | None:
        """Name of the signal that ended the program, or None."""
        try:
            return signal.Signals(-self.returncode).name if self.returncode < 0 else None
        except ValueError:
            return f"signal {-self.returncode}"


def run_python(
    code: str,
    *,
    stdin: str = "",
    timeout: float = 5.0,
    memory_bytes: int = 512 << 20,
    disk_bytes: int = 64 << 20,
    output_limit: int = 64 << 10,
    mode: Literal["strict", "best-effort"] = "best-effort",
) -> ExecutionResult:
    """Run `code` as a Python program and return when it and all it started have ended.

    timeout: seconds of wall time, counted from the program's first statement.
    memory_bytes: limit of the address space; an interpreter with numpy takes about 150 MiB.
    disk_bytes: limit of the files in its folder, for each and for all together. Deleted files that
        the program still has open count too.
    output_limit: limit of stdout and of stderr, in bytes each; this process never holds more.
    mode: "strict" raises UserError and runs nothing unless every layer is active. "best-effort"
        runs with the layers that the system offers; the result names them.

    Any thread may call this. Errors of the program are in the result; UserError means that the
    program was not run.

    >>> run_python("print(6 * 7)").stdout
    '42\\n'
    """
    if mode not in ("strict", "best-effort"):
        raise UserError(f"mode {mode!r} must be 'strict' or 'best-effort'")
    if not (timeout > 0 and memory_bytes > 0 and disk_bytes > 0 and output_limit > 0):
        raise UserError("timeout, memory_bytes, disk_bytes and output_limit must be positive")
    if not sys.executable:
        raise UserError("no Python interpreter to start: sys.executable is empty")
    folder = Path(tempfile.mkdtemp(prefix="nanochat-sandbox-"))
    try:
        (folder / "program.py").write_bytes(code.encode("utf-8", "replace"))
        standard_input = folder / "standard input"
        standard_input.write_bytes(stdin.encode("utf-8", "replace"))
        given_bytes = _disk_use(folder)
        job: dict[str, Any] = {
            "token": secrets.token_hex(16),
            "parent": os.getpid(),
            "layers": LAYERS,
            "strict": mode == "strict",
            "readable": _readable_paths(),
            "cpu_seconds": math.ceil(timeout) + 1,
            "memory_bytes": memory_bytes,
            "disk_bytes": disk_bytes,
            "open_files": MAX_OPEN_FILES,
        }
        # stdin is a file, since a pipe would need a thread that writes to it.
        with open(standard_input, "rb") as file:
            with contextlib.suppress(PermissionError):  # Windows cannot remove an open file
                standard_input.unlink()
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-X", "utf8", str(_CHILD), json.dumps(job)],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd=folder,
                env=_environment(folder),
                start_new_session=True,
            )
            return _supervise(process, job, folder, given_bytes, timeout, output_limit)
    finally:
        _remove(folder)


def layer_report() -> dict[str, str]:
    """Run an empty program and report for each of `LAYERS` "active", or why it is not active."""
    result = run_python("", timeout=30)
    return {name: result.inactive.get(name, "active") for name in LAYERS}


def _supervise(
    process: "subprocess.Popen[bytes]",
    job: dict[str, Any],
    folder: Path,
    given_bytes: float,
    timeout: float,
    output_limit: int,
) -> ExecutionResult:
    """Watch the process until it ends or breaks a limit, kill what is left of it, read its report.

    given_bytes: `_disk_use` of the folder before the program began.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    mark = str(job["token"]).encode()
    stdout = _Reader(process.stdout, output_limit)
    stderr = _Reader(process.stderr, output_limit + _REPORT_BYTES, mark)
    began = time.monotonic()
    limit: Limit | None = None
    allowed_bytes = given_bytes + job["disk_bytes"]
    try:
        while limit is None and not _ended(process):
            started = stderr.marked_at
            deadline = began + _STARTUP_SECONDS if started is None else started + timeout
            remaining = deadline - time.monotonic()
            if stdout.overflowed or stderr.overflowed:
                limit = "output"
            elif remaining <= 0:
                limit = "time"
            elif _threads(process.pid) > MAX_THREADS:
                limit = "threads"
            elif (
                _disk_use(folder) + _held_bytes(process.pid, folder, job["disk_bytes"])
                > allowed_bytes
            ):
                limit = "disk"
            else:
                # A program that ends its output nearly always ends itself, too.
                reader = stdout if stdout.is_alive() else stderr
                if reader.is_alive():
                    reader.join(min(_POLL_SECONDS, remaining))
                else:
                    time.sleep(min(0.002, remaining))
    finally:
        _kill(process)
    seconds = time.monotonic() - (stderr.marked_at or began)
    for reader in (stdout, stderr):
        # If new processes could not be forbidden, one that is still alive may hold the pipe open.
        reader.join(1.0)

    before, started_mark, rest = bytes(stderr.data).partition(mark)
    if not started_mark:
        message = before[-500:].decode("utf-8", "replace").strip() or "no message"
        raise UserError(
            f"the sandbox's interpreter did not start (exit status {process.returncode}, "
            f"memory_bytes {job['memory_bytes']}): {message}"
        )
    report, _, errors = rest.partition(b"\n")
    inactive: dict[str, str] = json.loads(report)
    if inactive and job["strict"]:
        missing = "; ".join(f"{name}: {reason}" for name, reason in inactive.items())
        raise UserError(
            f"the strict sandbox needs all of {', '.join(LAYERS)}; this system lacks {missing}. "
            "Use Linux 5.13 or later on x86_64 or aarch64, or mode 'best-effort'"
        )
    errors, finished, late = errors.partition(mark + b" end\n")
    errors += late
    if limit is None and (stdout.overflowed or len(errors) > output_limit):
        limit = "output"
    if limit is None and _disk_use(folder) > allowed_bytes:
        limit = "disk"
    return ExecutionResult(
        stdout=_text(bytes(stdout.data), output_limit),
        stderr=_text(errors, output_limit),
        returncode=process.returncode,
        limit=limit,
        finished=bool(finished),
        layers=tuple(name for name in LAYERS if name not in inactive),
        inactive=inactive,
        seconds=seconds,
    )


class _Reader(threading.Thread):
    """Reads a pipe to its end or until more than `limit` bytes came; never holds more.

    It is a thread because Windows cannot wait for pipes. `marked_at` is the time at which `mark`
    had arrived.
    """

    def __init__(self, pipe: IO[bytes], limit: int, mark: bytes = b"") -> None:
        super().__init__(daemon=True)
        self.data = bytearray()
        self.overflowed = False
        self.marked_at: float | None = None
        self._pipe, self._limit, self._mark = pipe, limit, mark
        self.start()

    def run(self) -> None:
        with self._pipe, contextlib.suppress(OSError):
            while chunk := self._pipe.read(65536):
                if len(self.data) + len(chunk) > self._limit:
                    self.overflowed = True
                    chunk = chunk[: self._limit - len(self.data)]
                self.data += chunk
                if self.marked_at is None and self._mark in self.data:
                    self.marked_at = time.monotonic()
                if self.overflowed:
                    return


def _text(data: bytes, limit: int) -> str:
    """Decode at most `limit` bytes of UTF-8; a character that is cut in two is left out."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(data[:limit], final=len(data) < limit)


def _ended(process: "subprocess.Popen[bytes]") -> bool:
    """True if the process has ended; if possible, its number is not released yet.

    Until the process is waited for, no other process group can get its number. Killing the group
    afterwards therefore cannot hit another program.
    """
    if sys.platform == "linux":
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, process.pid, options) is not None
    return process.poll() is not None


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.returncode is None:
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.wait()


def _threads(pid: int) -> int:
    """Number of threads of a process; 0 if /proc does not tell."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def _disk_use(folder: Path) -> float:
    """Bytes of the files in a folder; infinite for more than `MAX_FILES` files.

    The result is infinite too if a folder cannot be read, because of its mode or because it is
    nested so deeply that its path would be too long.
    """
    size = count = 0
    pending = [str(folder)]
    while pending:
        # The program is still running, so any file may disappear.
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    count += 1
                    if count > MAX_FILES:
                        return math.inf
                    with contextlib.suppress(FileNotFoundError):
                        size += _bytes(entry.stat(follow_symlinks=False))
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.ENAMETOOLONG):
                return math.inf
    return size


def _bytes(status: os.stat_result) -> int:
    """Length of a file, or the space it takes on the disk if that is more, in bytes."""
    return max(status.st_size, 512 * getattr(status, "st_blocks", 0))


def _held_bytes(pid: int, folder: Path, file_bytes: int) -> int:
    """Bytes of deleted files that a process has open or mapped; 0 if /proc does not tell.

    The size of a file that is mapped but not open is not known, so it counts as `file_bytes`.
    """
    inside = os.fsencode(os.path.realpath(folder)) + b"/"
    held: dict[int, int] = {}  # by inode
    with contextlib.suppress(OSError):
        # All threads share their memory and open files. A thread that has ended shows neither, and
        # the first thread may have ended.
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                for entry in os.scandir(f"/proc/{pid}/task/{thread}/fd"):
                    with contextlib.suppress(OSError):
                        status = os.stat(entry.path)
                        if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                            held[status.st_ino] = _bytes(status)
                alive = False
                with open(f"/proc/{pid}/task/{thread}/maps", "rb") as mappings:
                    for line in mappings:
                        alive = True
                        if line.endswith(b" (deleted)\n"):
                            inode, path = line.split(maxsplit=5)[4:]
                            if path.startswith(inside):
                                held.setdefault(int(inode), file_bytes)
                if alive:
                    break
    return sum(held.values())


def _remove(folder: Path) -> None:
    """Remove a folder with everything in it.

    Folders may be nested too deeply for the longest path and for the recursion of `shutil.rmtree`,
    so each is first moved up to the top.
    """
    pending = [str(folder)]
    moved = 0
    token = secrets.token_hex(8)
    while pending:
        current = pending.pop()
        with contextlib.suppress(OSError):
            with os.scandir(current) as scan:
                entries = list(scan)
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                os.chmod(entry.path, 0o700)
                path, moved = str(folder / f"{token}-{moved}"), moved + 1
                os.rename(entry.path, path)
                pending.insert(0, path)
            if current != str(folder):
                os.rmdir(current)
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def _environment(folder: Path) -> dict[str, str]:
    """Environment with only what an interpreter needs to start; this process's may hold keys."""
    needed = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    kept = {name: os.environ[name] for name in needed if name in os.environ}
    # One thread per numerical library, since the buffers of more would use up the memory limit.
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    home = dict.fromkeys(("HOME", "TMPDIR", "TEMP", "TMP"), str(folder))
    return {**kept, **home, **dict.fromkeys(threads, "1"), "LANG": "C.UTF-8"}


def _readable_paths() -> list[str]:
    """List the paths that Python and its installed packages need to read."""
    interpreter = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    packages = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    # Shared libraries of the interpreter: libpython, and those that conda installs beside it.
    prefixes = {sys.prefix, sys.base_prefix, sys.base_exec_prefix}
    libraries = [os.path.join(prefix, name) for prefix in prefixes for name in ("lib", "lib64")]
    libraries += [p for p in os.environ.get("LD_LIBRARY_PATH", "").split(":") if os.path.isabs(p)]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store"]
    files = ["/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo"]
    devices = ["/dev/urandom", "/dev/random", "/dev/zero"]
    return [*interpreter, *packages, *libraries, *system, *files, *devices]
