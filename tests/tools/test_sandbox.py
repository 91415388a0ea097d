"""The sandbox under attack: every program here is contained, and the result is told truthfully.

An attack prints ESCAPED if it reached what it should not reach. Where that is harmless, the same
program also runs with only its guarding layers off and must then succeed: otherwise the attack, and
so its test, would prove nothing.
"""

import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanochat.errors import UserError
from nanochat.tools import sandbox, sandbox_child
from nanochat.tools.sandbox import LAYERS, ExecutionResult, layer_report, run_python

ACTIVE = {name: state == "active" for name, state in layer_report().items()}

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX system")


@pytest.fixture(autouse=True)
def sandboxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Puts the programs' folders where the test sees them; none may be left afterwards."""
    folder = tmp_path / "sandboxes"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def needs(*layers: str) -> None:
    for layer in layers:
        if not ACTIVE[layer]:
            pytest.skip(f"the layer {layer!r} is not active here: {layer_report()[layer]}")


def run(code: str, timeout: float = 30.0, **settings: int) -> ExecutionResult:
    return run_python(textwrap.dedent(code), timeout=timeout, **settings)  # type: ignore[arg-type]


class World:
    """Targets of the attacks: files, sockets, another process, an open descriptor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secret = folder / "secret.txt"
        self.secret.write_text("SECRET")
        self.library = folder / "library"  # a folder the program may read, like the stdlib
        self.library.mkdir()
        self.module = self.library / "module.txt"
        self.module.write_text("MODULE")
        self.module.chmod(0o644)
        os.utime(self.module, (1000, 1000))
        self.descriptor = os.open(self.secret, os.O_RDWR)
        os.set_inheritable(self.descriptor, True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    def names(self) -> dict[str, str | int]:
        return {
            "SECRET": str(self.secret),
            "OUTSIDE": str(self.folder),
            "MODULE": str(self.module),
            "FD": self.descriptor,
            "PORT": self.port,
            "VICTIM": self.victim.pid,
            "PARENT": os.getpid(),
        }

    def intact(self) -> bool:
        status = self.module.stat()
        return (
            self.secret.read_text() == "SECRET"
            and self.module.read_text() == "MODULE"
            and status.st_mode & 0o777 == 0o644
            and status.st_mtime == 1000
            and sorted(p.name for p in self.folder.iterdir()) == ["library", "secret.txt"]
            and self.victim.poll() is None
            and os.getpriority(os.PRIO_PROCESS, self.victim.pid)
            == os.getpriority(os.PRIO_PROCESS, 0)
        )

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        self.listener.close()
        os.close(self.descriptor)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.close()


@dataclass
class Attack:
    """layers: the one that stops it on every kernel, and others that (may) stop it too.

    control: whether it can succeed once, with these layers off: harmless, and possible for any user
    (or "root": for root only) on any machine.
    """

    name: str
    layers: tuple[str, ...]
    code: str
    control: bool | str = True


CTYPES = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"

ATTACKS = [
    # Reading what is not Python's.
    Attack("read_passwd", ("landlock",), "open('/etc/passwd').read()"),
    Attack("read_secret", ("landlock",), "open(SECRET).read()"),
    Attack("list_root", ("landlock",), "import os; os.listdir('/')"),
    Attack("list_home", ("landlock",), "import os; os.listdir(OUTSIDE)"),
    Attack("dot_dot", ("landlock",), "import os; open(os.path.relpath(SECRET)).read()"),
    Attack(
        "symlink_read", ("landlock",), "import os; os.symlink(SECRET, 'link'); open('link').read()"
    ),
    Attack(
        "hard_link_read", ("landlock",), "import os; os.link(SECRET, 'link'); open('link').read()"
    ),
    Attack(
        "symlink_folder",
        ("landlock",),
        "import os; os.symlink(OUTSIDE, 'link'); open('link/secret.txt').read()",
    ),
    Attack("proc_root", ("landlock",), "open('/proc/self/root/etc/passwd').read()"),
    Attack("proc_listing", ("landlock",), "import os; os.listdir('/proc')"),
    Attack("proc_cmdline", ("landlock",), "open(f'/proc/{PARENT}/cmdline').read()"),
    Attack("proc_environment", ("landlock",), "open(f'/proc/{VICTIM}/environ').read()"),
    Attack("proc_memory", ("landlock",), "open(f'/proc/{VICTIM}/mem', 'rb')", "root"),
    Attack(
        "proc_descriptor", ("landlock",), "import os; os.open(f'/proc/{PARENT}/fd/{FD}', os.O_RDWR)"
    ),
    Attack("proc_exe", ("landlock",), "import os; os.readlink(f'/proc/{VICTIM}/cwd')"),
    Attack("devices", ("landlock",), "import os; os.listdir('/dev')"),
    Attack(
        "file_handle",
        ("seccomp",),
        CTYPES
        + """
handle = ctypes.create_string_buffer(136); handle[0] = 128
mount = ctypes.c_int()
assert libc.name_to_handle_at(-100, SECRET.encode(), handle, ctypes.byref(mount), 0) == 0
""",
        control=False,
    ),
    # Changing what is not the program's.
    Attack("write_outside", ("landlock",), "open(OUTSIDE + '/new', 'w').write('x')", control=False),
    Attack("append", ("landlock",), "open(SECRET, 'a')"),
    Attack("overwrite_library", ("landlock",), "open(MODULE, 'r+')"),
    Attack("write_shared_memory", ("landlock",), "open('/dev/shm', 'rb+').x", control=False),
    Attack("remove", ("landlock",), "import os; os.remove(SECRET)", control=False),
    Attack(
        "rename_over",
        ("landlock",),
        "import os; open('x', 'w'); os.rename('x', SECRET)",
        control=False,
    ),
    Attack("make_folder", ("landlock",), "import os; os.mkdir(OUTSIDE + '/folder')", control=False),
    Attack(
        "truncate_path",
        ("landlock", "seccomp"),
        "import os; os.truncate(SECRET, 6)",
    ),
    Attack(
        "truncating_reader",
        ("landlock", "seccomp"),
        "import os; os.open(MODULE, os.O_RDONLY | os.O_TRUNC)",
        control=False,
    ),
    Attack("chown", ("seccomp",), "import os; os.chown(MODULE, os.getuid(), -1)"),
    Attack(
        "chown_descriptor",
        ("seccomp",),
        "import os; os.fchown(os.open(MODULE, os.O_RDONLY), os.getuid(), -1)",
    ),
    Attack(
        "extended_attribute",
        ("seccomp",),
        "import os; os.setxattr(MODULE, 'user.x', b'y')",
        control=False,
    ),
    Attack("list_attributes", ("seccomp",), "import os; os.listxattr(SECRET)"),
    Attack(
        "watch",
        ("seccomp",),
        CTYPES
        + """
watch = libc.inotify_init1(0)
assert watch >= 0 and libc.inotify_add_watch(watch, OUTSIDE.encode(), 0xFFF) >= 0
""",
    ),
    Attack(
        "change_mode",  # told that it worked, but `World.intact` sees that it did not
        ("seccomp",),
        """
        import os
        os.chmod(MODULE, 0o777)
        os.fchmod(os.open(MODULE, os.O_RDONLY), 0o777)
        os.utime(MODULE, (5, 5))
        assert os.stat(MODULE).st_mode & 0o777 == 0o777 or os.stat(MODULE).st_mtime == 5
        """,
        control=False,
    ),
    Attack(
        "symlink_race",
        ("landlock",),
        """
        import os, threading, time
        stop = time.monotonic() + 0.3
        def swap():
            while time.monotonic() < stop:
                for target in ("program.py", SECRET):
                    os.symlink(target, "next")
                    os.rename("next", "link")
        threading.Thread(target=swap).start()
        seen = set()
        while "SECRET" not in seen and time.monotonic() < stop:
            try:
                seen.add(open("link").read())
            except OSError:
                pass
        assert "SECRET" in seen
        """,
        control=False,
    ),
    # The network.
    Attack(
        "tcp",
        ("seccomp", "landlock"),
        "import socket; socket.create_connection(('127.0.0.1', PORT))",
    ),
    Attack(
        "udp",
        ("seccomp",),
        "import socket as s; s.socket(s.AF_INET, s.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    ),
    Attack(
        "serve", ("seccomp", "landlock"), "import socket; socket.create_server(('127.0.0.1', 0))"
    ),
    Attack(
        "dns",
        ("seccomp",),
        "import socket; socket.getaddrinfo('example.com', 80)",
        control=False,
    ),
    Attack("netlink", ("seccomp",), "import socket as s; s.socket(s.AF_NETLINK, s.SOCK_RAW, 0)"),
    Attack(
        "unix_socket",
        ("seccomp",),
        "import socket as s; s.socket(s.AF_UNIX).bind('\\0nanochat-test-' + str(PORT))",
    ),
    Attack(
        "datagram_pair", ("seccomp",), "import socket as s; s.socketpair(s.AF_UNIX, s.SOCK_DGRAM)"
    ),
    Attack("socket_by_ctypes", ("seccomp",), CTYPES + "assert libc.socket(2, 1, 0) >= 0"),
    # Processes that would multiply or outlive this one.
    Attack(
        "subprocess",
        ("seccomp", "landlock"),
        "import subprocess; subprocess.run(['/bin/true'])",
        "root",
    ),
    Attack("shell", ("seccomp", "landlock"), "import os; assert os.system('true') == 0", "root"),
    Attack("fork", ("seccomp",), "import os; os.fork() or os._exit(0)", "root"),
    Attack(
        "fork_bomb",
        ("seccomp",),
        """
        import os, time
        stop, born = time.monotonic() + 0.2, 0
        while time.monotonic() < stop:
            try:
                born += 1 if os.fork() else os._exit(0)
            except OSError:
                pass
        assert born
        """,
        control=False,
    ),
    Attack(
        "double_fork_survivor",
        ("seccomp",),
        """
        import os, time
        if not os.fork():
            os.setsid()
            if not os.fork():
                time.sleep(60)
            os._exit(0)
        """,
        control=False,
    ),
    Attack(
        "posix_spawn_survivor",
        ("seccomp",),
        "import os; os.posix_spawn('/bin/sleep', ['sleep', '60'], {}, setsid=True)",
        control=False,
    ),
    Attack(
        "multiprocessing",
        ("seccomp",),
        "import multiprocessing as m; p = m.get_context('fork').Process(); p.start(); p.join()",
        "root",
    ),
    Attack(
        "exec", ("seccomp", "landlock"), "import os; os.execv('/bin/echo', ['echo', 'ESCAPED'])"
    ),
    Attack(
        "raw_clone",
        ("seccomp",),
        CTYPES
        + """
import os, platform
number = {"x86_64": 56, "aarch64": 220}[platform.machine()]
pid = libc.syscall(number, 17, None, None, None, None)
if pid == 0:
    os._exit(0)
assert pid > 0
""",
        "root",
    ),
    # Other processes.
    Attack("signal_parent", ("seccomp", "landlock"), "import os; os.kill(PARENT, 0)"),
    Attack("kill", ("seccomp", "landlock"), "import os; os.kill(VICTIM, 9)", control=False),
    Attack(
        "kill_by_descriptor",
        ("seccomp",),
        "import os, signal; signal.pidfd_send_signal(os.pidfd_open(VICTIM), 9)",
        control=False,
    ),
    Attack(
        "kill_by_owner",
        ("seccomp",),
        """
        import fcntl, os, struct
        reader, writer = os.pipe()
        fcntl.fcntl(reader, 10, 9)  # F_SETSIG: which signal, to whom and when
        fcntl.fcntl(reader, fcntl.F_SETOWN, VICTIM)
        fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC)
        os.write(writer, b"x")
        """,
        control=False,
    ),
    Attack(
        "ptrace",
        ("seccomp", "landlock"),
        CTYPES + "assert libc.ptrace(0x4206, VICTIM, 0, 0) == 0",
        "root",
    ),
    Attack(
        "read_memory",
        ("seccomp", "landlock"),
        CTYPES
        + """
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
here = ctypes.create_string_buffer(8)
local, remote = Vector(ctypes.addressof(here), 8), Vector(4096, 8)
libc.process_vm_readv(VICTIM, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
assert ctypes.get_errno() == 14  # EFAULT: it would have been allowed, there is just nothing there
""",
        control="root",
    ),
    Attack("lower_priority", ("seccomp",), "import os; os.setpriority(0, VICTIM, 5)", False),
    Attack("pin", ("seccomp",), "import os; os.sched_setaffinity(VICTIM, os.sched_getaffinity(0))"),
    Attack(
        "limit_other",
        ("seccomp",),
        "import resource as r; r.prlimit(VICTIM, r.RLIMIT_CORE, (0, 0))",
    ),
    # Objects that outlive the process or that no limit counts.
    Attack("memory_file", ("seccomp",), "import os; os.memfd_create('x')"),
    Attack(
        "shared_memory",
        ("landlock", "seccomp"),
        "from multiprocessing.shared_memory import *; SharedMemory(create=True, size=9).unlink()",
        "root",
    ),
    Attack(
        "system_v_message_queue",
        ("seccomp",),
        CTYPES + "q = libc.msgget(0, 0o1600); assert q >= 0; libc.msgctl(q, 0, None)",
    ),
    Attack(
        "asynchronous_io",
        ("seccomp",),
        CTYPES
        + """
import platform
number = {"x86_64": 206, "aarch64": 0}[platform.machine()]
assert libc.syscall(number, 1, ctypes.byref(ctypes.c_ulong())) == 0
""",
    ),
    # Files that no limit counts.
    Attack(
        "space_beyond_the_end",
        ("seccomp",),
        CTYPES
        + """
file, keep_size = open("x", "wb"), 1
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
assert libc.fallocate(file.fileno(), keep_size, 0, 1 << 20) == 0
""",
    ),
    Attack(
        "files_in_flight",
        ("seccomp",),
        """
        import socket
        a, b = socket.socketpair()
        file = open("x", "wb")
        socket.send_fds(a, [b"x"], [file.fileno()])
        """,
    ),
    Attack(
        "table_of_files_of_its_own",
        ("seccomp",),
        CTYPES + "unshare = 2; assert libc.close_range(60, 61, unshare) == 0",
    ),
    Attack(
        "core_handler",  # which would be started for a limit of 0
        ("seccomp", "limits"),
        "import resource as r; r.setrlimit(r.RLIMIT_CORE, (0, 0))",
    ),
    Attack(
        "capabilities",
        ("privileges",),
        CTYPES
        + """
sets = (ctypes.c_uint32 * 6)()
libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), sets)
assert any(sets)
""",
        "root",
    ),
    # Undoing the layers.
    Attack(
        "raise_limit", ("limits",), "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (99, 99))"
    ),
    Attack("become_dumpable", ("seccomp",), CTYPES + "assert libc.prctl(4, 1, 0, 0, 0) == 0"),
    Attack("survive_parent", ("seccomp",), CTYPES + "assert libc.prctl(1, 0, 0, 0, 0) == 0"),
    Attack(
        "new_user_namespace", ("seccomp",), CTYPES + "assert libc.unshare(0x10000000) == 0", "root"
    ),
    Attack(
        "io_uring",
        ("seccomp",),
        CTYPES + "libc.syscall(425, 1, None); assert ctypes.get_errno() == 14  # EFAULT",
        control=False,
    ),
    Attack(
        "unknown_call",
        ("seccomp",),
        CTYPES + "libc.syscall(0x40000000 + 39); assert ctypes.get_errno() != 38",
        control=False,
    ),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_attack_is_contained(attack: Attack, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(attack.layers[0])
    readable = [*sandbox._readable_paths(), str(world.library)]
    monkeypatch.setattr(sandbox, "_readable_paths", lambda: readable)
    given = "".join(f"{name} = {value!r}\n" for name, value in world.names().items())
    code = given + textwrap.dedent(attack.code) + "\nprint('ESCAPED')\n"

    result = run_python(code, timeout=30)
    assert "ESCAPED" not in result.stdout
    assert not result.ok, "an attack that failed ends in an error"
    assert "rror" in result.stderr
    assert world.intact()

    if attack.control is True or (attack.control == "root" and os.geteuid() == 0):
        # A user's seccomp filter needs no_new_privs; root's does not, and root without capabilities
        # is refused some of this anyway.
        off = (*attack.layers, "privileges") if os.geteuid() == 0 else attack.layers
        others = tuple(layer for layer in LAYERS if layer not in off)
        monkeypatch.setattr(sandbox, "LAYERS", others)
        result = run_python(code, timeout=30)
        assert "ESCAPED" in result.stdout, result.stderr
        assert world.intact()


# What a program may do to itself only, or to nobody.

MISCHIEF = {
    "ctypes_crash": "import ctypes; ctypes.string_at(0)",
    "abort": "import os; os.abort()",
    "kill_itself": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "deep_recursion": """
        import sys
        sys.setrecursionlimit(10**9)
        f = lambda n: f(n + 1) + sorted([0, 1], key=lambda _: f(n + 1))[0]
        f(0)
        """,
    "huge_allocation": "x = bytearray(10**12)",
    "mapping_bomb": "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 10**7))",
    "compiler_bomb": "compile('(' * 10**6 + ')' * 10**6, '', 'eval')",
    "huge_file": """
        with open('x', 'wb') as f:
            f.truncate(10**6)
            f.seek(10**12)
            f.write(b'x')
        """,
    "many_descriptors": "import os\nwhile True: os.pipe()",
    "not_utf8_or_python": "\0\ud800",
    "no_builtins": "import builtins; builtins.__dict__.clear(); undefined",
    "broken_hook": "import sys; sys.excepthook = None; sys.stdout = sys.stderr = None; 1 / 0",
    "import_hook": """
        import sys
        class Finder:
            def find_spec(self, *_):
                raise SystemError("no import works any more")
        sys.meta_path.insert(0, Finder()); sys.path[:] = []; sys.modules.clear()
        import json
        """,
    "trace_everything": """
        import sys
        def trace(*_):
            raise RuntimeError
        sys.settrace(trace)
        (lambda: 0)()
        """,
    "no_stack_left_for_the_traceback": """
        def f():
            try:
                f()
            finally:
                f()
        f()
        """,
}


@posix
@pytest.mark.parametrize("name", MISCHIEF)
def test_mischief_ends_in_an_error(name: str) -> None:
    needs("memory", "limits")
    result = run(MISCHIEF[name], timeout=1, memory_bytes=300 << 20)
    assert not result.ok
    assert not result.finished


@pytest.mark.parametrize(
    "code",
    ["bytearray(10**9)", "x = []\nwhile True: x.append(bytearray(10**7))"],
    ids=["at_once", "bit_by_bit"],
)
def test_memory_is_limited(code: str) -> None:
    needs("memory")
    result = run(code, memory_bytes=300 << 20)
    assert result.returncode == 1
    assert result.stderr.endswith("MemoryError\n")


ENDLESS = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "signals_ignored": """
        import signal
        for n in range(1, 65):
            try:
                signal.signal(n, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        while True: pass
        """,
    "exceptions_caught": """
        while True:
            try:
                while True: pass
            except BaseException:
                pass
        """,
    "at_exit": "import atexit, time; atexit.register(time.sleep, 60)",
    "thread": "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()",
    "stopped": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "descriptors_closed": "import os, time; os.closerange(0, 256); time.sleep(60)",
    "new_session": "import os, time\ntry: os.setsid()\nexcept OSError: pass\ntime.sleep(60)",
    "long_number": "10 ** 10 ** 8",
    "slow_pattern": "import re; re.match('(a+)+b', 'a' * 60)",
}


@posix
@pytest.mark.parametrize("name", ENDLESS)
def test_endless_program_is_ended(name: str) -> None:
    began = time.monotonic()
    result = run("import os; print(os.getpid())\n" + textwrap.dedent(ENDLESS[name]), timeout=0.3)
    assert result.limit == "time"
    assert not result.ok
    assert 0.3 <= result.seconds <= time.monotonic() - began
    assert result.signal == "SIGKILL"
    if result.stdout:  # on a busy machine it may not have come to that
        with pytest.raises(ProcessLookupError):
            os.kill(int(result.stdout.split()[0]), 0)


def test_output_before_the_end_is_kept() -> None:
    result = run("import time; print('first'); time.sleep(60)", timeout=2)
    assert result.limit == "time"
    assert result.stdout.split() == ["first"]


FLOODS = {
    "lines": "while True: print('x' * 1000)",
    "one_write": "import os; os.write(1, b'x' * (1 << 24))",
    "errors": "import sys\nwhile True: sys.stderr.write('x' * 4096)",
    "both": "import os\nwhile True: os.write(1, b'x' * 9999); os.write(2, b'x' * 9999)",
    "deaf": """
        import os
        while True:
            try:
                os.write(1, b"x" * 9999)
            except OSError:
                pass
        """,
    "huge_result": "print('x' * (1 << 24))",
    "at_the_end": "print('x' * 20000)",
    "divided_character": "while True: print('é' * 999, end='')",
}


@pytest.mark.parametrize("name", FLOODS)
def test_flood_is_cut_and_this_process_stays_small(name: str) -> None:
    limit = 10001
    run("")
    tracemalloc.start()
    result = run(FLOODS[name], timeout=10, output_limit=limit)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.truncated
    assert not result.ok
    sizes = [len(text.encode()) for text in (result.stdout, result.stderr)]
    assert limit - 1 <= max(sizes) <= limit  # one byte less when the cut divides a character
    assert "\ufffd" not in result.stdout
    # A chunk of each pipe, the kept bytes, their text, and copies of them.
    assert peak < 400_000


def test_output_up_to_the_limit_is_kept_whole() -> None:
    code = "import os, sys; sys.stdout.write('x' * 5000); os.write(2, b'y' * 5000)"
    result = run(code, output_limit=5000)
    assert result.ok
    assert (result.stdout, result.stderr) == ("x" * 5000, "y" * 5000)


def test_thread_bomb_is_ended() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("threads are counted on Linux only")
    code = """
        import threading, time
        threading.stack_size(65536)
        while True:
            try:
                threading.Thread(target=time.sleep, args=(9,)).start()
            except RuntimeError:
                time.sleep(0.01)
        """
    result = run(code)
    assert result.limit == "threads"


DISK_BOMBS = {
    "files": "for i in range(10**9): open(str(i), 'w').close()",
    "bytes": "for i in range(10**9): open(str(i), 'wb').write(bytes(10**5))",
    "bytes_at_the_end": "for i in range(20): open(str(i), 'wb').write(bytes(10**5))",
    "flickering": """
        import threading
        def flicker():
            while True:
                open("a", "w").close(); os.unlink("a")
        threading.Thread(target=flicker, daemon=True).start()
        for i in range(20): open(str(i), "wb").write(bytes(10**5))
        """,
    "nested": """
        for _ in range(300):
            os.mkdir("n" * 20); os.chdir("n" * 20)
        for i in range(20): open(str(i), "wb").write(bytes(10**5))
        time.sleep(60)
        """,
}

LINUX_DISK_BOMBS = {
    "unlinked": """
        files = []
        for i in range(20):
            files.append(open("x", "wb", 0)); files[-1].write(bytes(10**5)); os.unlink("x")
        time.sleep(60)
        """,
    "unlinked_at_once": """
        files = [os.open(".", os.O_TMPFILE | os.O_RDWR) for i in range(20)]
        for file in files: os.write(file, bytes(10**5))
        time.sleep(60)
        """,
    "mapped": """
        import ctypes
        libc = ctypes.CDLL(None)
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        for i in range(20):
            file = os.open("x", os.O_CREAT | os.O_RDWR)
            os.write(file, bytes(10**5))
            libc.mmap(None, 4096, 1, 2, file, 0)
            os.close(file); os.unlink("x")
        time.sleep(60)
        """,
    "of_a_thread_that_outlives_the_first": """
        import ctypes, platform, threading
        def fill():
            time.sleep(0.1)
            files = [os.open(".", os.O_TMPFILE | os.O_RDWR) for i in range(20)]
            for file in files: os.write(file, bytes(10**5))
            time.sleep(60)
        threading.Thread(target=fill).start()
        ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)
        """,
    "closed": """
        os.mkdir("closed", 0o300)
        for i in range(20): open(f"closed/{i}", "wb").write(bytes(10**5))
        time.sleep(60)
        """,
}


@pytest.mark.parametrize("name", DISK_BOMBS)
def test_disk_bomb_is_ended_and_cleared(name: str) -> None:
    result = run("import os, time\n" + textwrap.dedent(DISK_BOMBS[name]), disk_bytes=10**6)
    assert result.limit == "disk"
    assert not result.ok


@pytest.mark.parametrize("name", LINUX_DISK_BOMBS)
def test_disk_bomb_out_of_sight_is_ended_and_cleared(name: str, sandboxes: Path) -> None:
    """Limits hold for an ordinary user too, who cannot look into every folder."""
    if not sys.platform.startswith("linux"):
        pytest.skip("unlinked files are looked for on Linux only")
    code = "import os, time\n" + textwrap.dedent(LINUX_DISK_BOMBS[name])
    if name != "closed":
        assert run(code, disk_bytes=10**6).limit == "disk"
    caller = f"""if True:
        import ctypes, struct
        from nanochat.tools.sandbox import run_python
        libc, header = ctypes.CDLL(None), struct.pack("=Ii", 0x20080522, 0)
        assert libc.prctl(38, 1, 0, 0, 0) == 0  # so that they do not come back
        assert libc.capset(header, ctypes.create_string_buffer(24)) == 0
        print(run_python({code!r}, timeout=30, disk_bytes=10**6).limit)
        """
    environment = {
        **os.environ,
        "TMPDIR": str(sandboxes),
        "PYTHONPATH": str(Path(sandbox.__file__).parents[2]),
    }
    assert (
        subprocess.check_output([sys.executable, "-c", caller], env=environment, text=True)
        == "disk\n"
    )


@posix
def test_any_folder_can_be_removed() -> None:
    """Nested deeper than a path can be long, unreadable, full of links; the fixture looks."""
    code = """
        import os
        os.symlink("/", "root"); os.symlink("loop", "loop"); os.link("program.py", "other")
        os.mkdir("closed", 0)
        for _ in range(300):
            os.mkdir("n" * 20)
            os.chdir("n" * 20)
        open("file", "w").close()
        """
    result = run(code)
    assert result.limit in (None, "disk")


def test_exit_before_the_checks_is_not_finished() -> None:
    for leave in ("import os; os._exit(0)", "exit()", "raise SystemExit"):
        result = run(f"print('a')\n{leave}\nassert False")
        assert not result.finished
    result = run("import sys; sys.stderr.write('abc end\\n'); sys.exit(0)")
    assert result.ok
    assert not result.finished
    assert run("import os; os.close(2); print(1)").finished
    assert run("exit(3)").returncode == 3


@pytest.mark.parametrize(
    "replaced",
    [
        "sys.exit = print",
        "sys.excepthook = print",
        "builtins.SystemExit = builtins.BaseException = ZeroDivisionError",
        "builtins.exit = builtins.quit = os._exit = print",
        "sys.excepthook = lambda *_: os._exit(0)",
    ],
)
def test_failed_check_is_not_finished_whatever_was_replaced(replaced: str) -> None:
    result = run(f"import builtins, os, sys\n{replaced}\nassert 1 == 2")
    assert not (result.ok and result.finished)


def test_nothing_of_this_process_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "SECRET")
    code = """
        import os, sys
        print(os.environ, sys.argv, sys.orig_argv, sys.flags.isolated)
        for descriptor in range(3, 64):
            try:
                os.fstat(descriptor)
            except OSError:
                continue
            print("open", descriptor)
        """
    with tempfile.TemporaryFile() as file:
        if sys.platform != "win32":
            os.set_inheritable(file.fileno(), True)
        result = run(code)
    assert result.ok, result.stderr
    assert "SECRET" not in result.stdout
    assert str(Path.cwd()) not in result.stdout
    # Its own report, a copy of stderr.
    assert sum(line.startswith("open ") for line in result.stdout.splitlines()) == 1


def test_foreign_instruction_set_is_killed() -> None:
    """32-bit system calls have other numbers: `int 0x80` from 64-bit code must not slip through."""
    needs("seccomp")
    if sandbox_child.platform.machine() != "x86_64":
        pytest.skip("the system call is numbered as on x86_64")
    code = """
        import ctypes, mmap
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(b"\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3")  # mov eax, 20 (getpid); int 0x80; ret
        print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
        """
    result = run(code)
    assert result.returncode < 0
    assert result.stdout == ""


ORDINARY = {
    "standard_input": """
        import os, sys
        assert sys.stdin.read() == "hé" * 50_000
        assert os.listdir() == ["program.py"]
        try:
            os.write(0, b"x")
        except OSError:
            pass
        else:
            assert False
        """,
    "numpy": "import numpy as np; assert (np.linalg.inv(np.eye(50)) @ np.ones(50)).sum() == 50",
    "random": "import random, secrets, uuid, os; uuid.uuid4(); secrets.token_hex(); os.urandom(4)",
    "time_zone": "import zoneinfo, time; zoneinfo.available_timezones(); time.localtime()",
    "threads": """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(abs, range(100))) == 4950
        """,
    "asyncio": "import asyncio; asyncio.run(asyncio.sleep(0.01))",
    "files": """
        import mmap, os, pathlib, shutil, sqlite3, tempfile, time, zipfile
        pathlib.Path("a/b").mkdir(parents=True)
        pathlib.Path("a/b/c.txt").write_text("x")
        shutil.copy2("a/b/c.txt", "d.txt"); shutil.copytree("a", "e"); shutil.rmtree("a")
        os.replace("d.txt", "e/d.txt")
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as file:
            file.write(b"x")
            os.posix_fallocate(file.fileno(), 0, 5000)
            mmap.mmap(file.fileno(), 4096)[0] = 0; time.sleep(0.2)
        with zipfile.ZipFile("z.zip", "w") as archive:
            archive.writestr("y", "x")
        zipfile.ZipFile("z.zip").extractall("out")
        with sqlite3.connect("base") as base:
            base.execute("create table t (x)"); base.execute("insert into t values (1)")
        open(os.devnull, "w").write("x")
        """,
    "own_signals": """
        import signal
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        signal.pause()
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.raise_signal(signal.SIGUSR1)
        """,
    "main_module": """
        import dataclasses, pickle
        @dataclasses.dataclass
        class Point:
            x: int
        assert pickle.loads(pickle.dumps(Point(1))) == Point(1)
        assert __name__ == "__main__"
        """,
}


@posix
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_program_works(name: str) -> None:
    result = run_python(textwrap.dedent(ORDINARY[name]), stdin="hé" * 50_000, timeout=30)
    assert result.ok, result.stderr
    assert result.finished


def test_traceback_shows_the_program_only() -> None:
    result = run("def f():\n    1 / 0\nf()")
    assert 'File "program.py", line 2, in f\n    1 / 0' in result.stderr
    assert "sandbox_child" not in result.stderr
    assert "sandbox_child" not in run("x = (").stderr


def test_any_thread_may_call() -> None:
    results: dict[int, str] = {}

    def work(number: int) -> None:
        results[number] = run(f"print({number})").stdout

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: f"{n}\n" for n in range(6)}


def test_strict_runs_with_all_layers_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w')"
    for missing in LAYERS:
        others = tuple(layer for layer in LAYERS if layer != missing)
        with monkeypatch.context() as patch:
            patch.setattr(sandbox, "LAYERS", others)
            with pytest.raises(UserError, match=f"{missing}: not asked for"):
                run_python(code, mode="strict")
            result = run_python("print(1)")
            assert missing not in result.layers
            assert "not asked for" in result.inactive[missing]
    assert not trace.exists()
    if all(ACTIVE.values()):
        assert run_python("print(1)", mode="strict").layers == LAYERS


def test_without_the_seccomp_layer_children_die_with_their_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weaker promise: new processes fail, or (root on Linux) die when the program ends."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs /proc, which Linux has")
    monkeypatch.setattr(sandbox, "LAYERS", ("limits", "memory", "privileges", "landlock"))
    result = run("import os, time; pid = os.fork(); print(pid) if pid else time.sleep(60)")
    if result.ok:
        assert wait_until_dead(int(result.stdout))


def wait_until_dead(pid: int) -> bool:
    """True if a process that is no child of ours ends within seconds (a zombie is dead)."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_program_dies_with_the_process_that_runs_it(sandboxes: Path) -> None:
    needs("privileges")
    program = "import os, time; print(os.getpid(), file=open('pid', 'w')); time.sleep(60)"
    code = f"import nanochat.tools.sandbox as e; e.run_python({program!r}, timeout=60)"
    root = Path(sandbox.__file__).parents[2]
    environment = {**os.environ, "TMPDIR": str(sandboxes), "PYTHONPATH": str(root)}
    caller = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        text = ""
        for _ in range(3000):
            text = "".join(p.read_text() for p in sandboxes.glob("*/pid"))
            if text.endswith("\n"):
                break
            time.sleep(0.01)
        caller.kill()
        assert wait_until_dead(int(text))
    finally:
        caller.kill()
        caller.wait()
        for folder in sandboxes.iterdir():
            sandbox._remove(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "safe"}, "mode 'safe'"),
        ({"timeout": 0.0}, "must be positive"),
        ({"output_limit": -1}, "must be positive"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_python("print(1)", **settings)  # type: ignore[arg-type]


# The filter as a law: an interpreter of its 40 lines of language decides for every call.


def _decide(rules: list[tuple[int, int, int, int]], call: bytes) -> int:
    """Value that the kernel would return for one `struct seccomp_data`."""
    accumulator = position = 0
    while True:
        code, if_true, if_false, constant = rules[position]
        position += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", call, constant)
        elif code == 0x54:
            accumulator &= constant
        elif code == 0x06:
            return constant
        else:
            holds = {
                0x15: accumulator == constant,
                0x25: accumulator > constant,
                0x45: accumulator & constant != 0,
            }[code]
            position += if_true if holds else if_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_decides_as_the_tables_say(machine: str) -> None:
    column, audit = sandbox_child._ARCHITECTURES[machine]
    rules = sandbox_child.seccomp_filter(column, audit, pid=4321)
    allowed = 0x7FFF0000

    def decide(number: int, *arguments: int, architecture: int = audit) -> int:
        padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
        return _decide(rules, struct.pack("<IIQ6Q", number, architecture, 0, *padded))

    def numbers(table: str) -> dict[str, int]:
        return sandbox_child.syscall_numbers(table, column)

    tables = [table for table, _ in sandbox_child.REFUSALS]
    for table, error in sandbox_child.REFUSALS:
        for number in numbers(table).values():
            assert decide(number) == 0x50000 | error
    listed = {n for table in (*tables, sandbox_child.CHECKED) for n in numbers(table).values()}
    assert len(listed) == sum(len(numbers(t)) for t in (*tables, sandbox_child.CHECKED))
    for number in range(sandbox_child.LAST_KNOWN_CALL + 1):
        if number not in listed:
            assert decide(number) == allowed
    assert decide(463) == decide(0x40000000) == 0x50000 | 38
    assert decide(0, architecture=0x40000003) == 0x80000000

    call = numbers(sandbox_child.CHECKED)
    for name, arguments, expected in [
        ("clone", (0x3D0F00,), True),  # as pthread_create does
        ("clone", (0x3D0B00,), False),  # with open files of its own
        ("clone", (17,), False),  # as fork does
        ("clone", (0x4111,), False),  # as vfork does
        ("kill", (4321, 9), True),
        ("kill", (1, 9), False),
        ("kill", (0, 9), False),
        ("kill", (0xFFFFFFFF, 9), False),
        ("tgkill", (4321, 4322, 6), True),
        ("tgkill", (1, 1, 9), False),
        ("prlimit64", (0, 7), True),
        ("prlimit64", (4321, 7), True),
        ("prlimit64", (1, 7), False),
        ("prlimit64", (0, 4), False),
        ("close_range", (3, 9, 0), True),
        ("close_range", (3, 9, 4), True),
        ("close_range", (3, 9, 2), False),
        ("prctl", (15,), True),
        ("prctl", (1, 0), False),
        ("socketpair", (1, 1 | 0o2000000), True),
        ("socketpair", (1, 2), False),
        ("socketpair", (2, 1), False),
        ("fcntl", (3, 4), True),
        ("fcntl", (3, 8), False),
        ("fcntl", (3, 10), False),
        ("fcntl", (3, 15), False),
        ("ioctl", (1, 0x5401), True),
        ("ioctl", (1, 0x5412), False),
        ("openat", (0, 0, 0), True),
        ("openat", (0, 0, 0o1101), True),  # write, create, truncate
        ("openat", (0, 0, 0o1002), True),
        ("openat", (0, 0, 0o1000), False),  # read, truncate
        ("openat", (0, 0, 0o1003), False),
        ("openat", (0, 0, 0o2000003), True),
    ]:
        assert (decide(call[name], *arguments) == allowed) is expected, (name, arguments)
    if machine == "x86_64":
        assert decide(call["open"], 0, 0o1101) == allowed
        assert decide(call["open"], 0, 0o1000) == 0x50001


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")],
)
def test_numbers_agree_with_the_system_headers(machine: str, header: str) -> None:
    path = Path("/usr/include") / header
    if not path.exists():
        pytest.skip(f"no {path}")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())
    official = {name: int(number) for name, number in found}
    column, _ = sandbox_child._ARCHITECTURES[machine]
    for table in (*(table for table, _ in sandbox_child.REFUSALS), sandbox_child.CHECKED):
        for name, number in sandbox_child.syscall_numbers(table, column).items():
            assert official.get(name, number) == number


@posix
def test_interpreter_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    with pytest.raises(UserError, match=r"did not start .*memory_bytes"):
        run_python("print(1)")
