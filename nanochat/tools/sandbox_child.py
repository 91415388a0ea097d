"""Process inside the sandbox: restricts itself, then runs `program.py`.

`nanochat.tools.sandbox` starts this file as `python -I sandbox_child.py JOB` in the program's own
folder. It uses the standard library only, because `-I` hides the project from it. Each layer is
tried in turn. One line on stderr reports the result before the program starts, so that the program
cannot change the report.

Kernel interfaces are called through `ctypes`: see seccomp(2), landlock(7), capset(2), prctl(2) and
the syscall tables of x86_64 and of asm-generic (aarch64).
"""

import ctypes
import json
import os
import platform
import struct
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

PROGRAM = "program.py"

# Each entry: name, number on x86_64, number on aarch64.
FORBIDDEN = """
    socket 41 198; connect 42 203; accept 43 202; accept4 288 242; bind 49 200; listen 50 201;
    sendmsg 46 211; sendmmsg 307 269;

    fork 57 -; vfork 58 -; execve 59 221; execveat 322 281;

    tkill 200 130; rt_sigqueueinfo 129 138; rt_tgsigqueueinfo 297 240; pidfd_open 434 434;
    pidfd_getfd 438 438; pidfd_send_signal 424 424; ptrace 101 117; process_vm_readv 310 270;
    process_vm_writev 311 271; process_madvise 440 440; process_mrelease 448 448; kcmp 312 272;
    migrate_pages 256 238; move_pages 279 239; setpriority 141 140; ioprio_set 251 30;
    sched_setparam 142 118; sched_setscheduler 144 119; sched_setattr 314 274;
    sched_setaffinity 203 122; setrlimit 160 164;

    shmget 29 194; shmat 30 196; shmctl 31 195; msgget 68 186; msgsnd 69 189; msgrcv 70 188;
    msgctl 71 187; semget 64 190; semop 65 193; semtimedop 220 192; semctl 66 191;
    mq_open 240 180; mq_unlink 241 181; memfd_create 319 279; memfd_secret 447 447;
    io_setup 206 0;

    truncate 76 45; chown 92 -; lchown 94 -; fchown 93 55; fchownat 260 54; setxattr 188 5;
    lsetxattr 189 6; fsetxattr 190 7; removexattr 197 14; lremovexattr 198 15;
    fremovexattr 199 16; name_to_handle_at 303 264; open_by_handle_at 304 265;
    fanotify_init 300 262; fanotify_mark 301 263; inotify_init 253 -; inotify_init1 294 26;
    inotify_add_watch 254 27;

    mount 165 40; umount2 166 39; pivot_root 155 41; chroot 161 51; unshare 272 97; setns 308 268;
    open_tree 428 428; move_mount 429 429; fsopen 430 430; fsconfig 431 431; fsmount 432 432;
    fspick 433 433; mount_setattr 442 442; statmount 457 457; listmount 458 458; quotactl 179 60;
    quotactl_fd 443 443; acct 163 89; swapon 167 224; swapoff 168 225; reboot 169 142;
    kexec_load 246 104; kexec_file_load 320 294; init_module 175 105; finit_module 313 273;
    delete_module 176 106; settimeofday 164 170; clock_settime 227 112; adjtimex 159 171;
    clock_adjtime 305 266; sethostname 170 161; setdomainname 171 162; syslog 103 116;
    vhangup 153 58; nfsservctl 180 42; lookup_dcookie 212 18; iopl 172 -; ioperm 173 -;
    modify_ldt 154 -; personality 135 92; uselib 134 -; ustat 136 -; sysfs 139 -; _sysctl 156 -;
    bpf 321 280; perf_event_open 298 241; userfaultfd 323 282; seccomp 317 277; add_key 248 217;
    request_key 249 218; keyctl 250 219; lsm_set_self_attr 460 460
"""
"""System calls that are refused (EPERM), with numbers on x86_64 and aarch64. By paragraph: the
network, and sending open files through sockets, which `sandbox.py` cannot count; new processes;
other processes; memory and objects that no limit counts or that outlive the process; changes of
files that Landlock does not check; the system."""

IGNORED = """
    chmod 90 -; fchmod 91 52; fchmodat 268 53; fchmodat2 452 452; utime 132 -; utimes 235 -;
    futimesat 261 -; utimensat 280 88; sync 162 81; syncfs 306 267
"""
"""System calls that report success but do nothing. Landlock does not check these calls either, and
shutil.copy, zipfile and tarfile make them by themselves."""

MISSING = """
    clone3 435 435; openat2 437 437; io_uring_setup 425 425; io_uring_enter 426 426;
    io_uring_register 427 427
"""
"""System calls that seem not to exist (ENOSYS). Their flags are in memory, which a filter cannot
read. C libraries fall back to clone and openat."""

UNSUPPORTED = """
    fallocate 285 47; getxattr 191 8; lgetxattr 192 9; fgetxattr 193 10; listxattr 194 11;
    llistxattr 195 12; flistxattr 196 13
"""
"""System calls that the file system seems not to support (EOPNOTSUPP). Programs are prepared for
that: posix_fallocate writes instead, and shutil.copy leaves attributes out. fallocate could take
disk space beyond a file's end, which RLIMIT_FSIZE does not count. Landlock does not check
attributes."""

LAST_KNOWN_CALL = 462
"""Highest call number that these tables cover. Calls above it fail with ENOSYS, and so do those of
the x32 ABI."""

CHECKED = """
    open 2 -; openat 257 56; clone 56 220; kill 62 129; tgkill 234 131; prlimit64 302 261;
    prctl 157 167; socketpair 53 199; fcntl 72 25; ioctl 16 29; close_range 436 436
"""
"""System calls that are allowed with certain arguments only; see `_argument_rules`."""

REFUSALS = ((FORBIDDEN, 1), (IGNORED, 0), (MISSING, 38), (UNSUPPORTED, 95))
"""Tables of calls that are never made, with the error that the program gets."""

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_*
_EPERM, _ENOTTY, _ENOSYS = 1, 25, 38
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _GREATER, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x54, 0x06

Instruction = tuple[int, int, int, int]
"""One instruction of classic BPF: code, jump if true, jump if false, constant."""


class Inactive(Exception):
    """Raised with the reason why a layer could not be switched on."""


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise Inactive(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _libc() -> ctypes.CDLL:
    if not sys.platform.startswith("linux"):
        raise Inactive("needs Linux")
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    _checked(_libc().prctl(option, *padded), f"prctl {option}")


def syscall_numbers(table: str, column: int) -> dict[str, int]:
    """Parse one of the tables above. Column 0 is x86_64, 1 is aarch64; `-` means no such call."""
    entries = (entry.split() for entry in table.split(";"))
    return {name: int(numbers[column]) for name, *numbers in entries if numbers[column] != "-"}


def _one_of(argument: int, values: Iterable[int], error: int) -> list[Instruction]:
    """Allow the call if its argument's low 32 bits are one of `values`, else fail with `error`."""
    rules: list[Instruction] = [(_LOAD, 0, 0, 16 + 8 * argument)]
    for value in values:
        rules += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return [*rules, (_RETURN, 0, 0, _ERRNO | error)]


def _argument_rules(pid: int) -> dict[str, list[Instruction]]:
    """Instructions that decide about each call of `CHECKED`; each list returns on every path."""

    def no_truncating_reader(flags: int) -> list[Instruction]:
        # O_RDONLY | O_TRUNC empties a file that was opened for reading, and Landlock before ABI 3
        # cannot see that. With write access it is an ordinary write, which Landlock checks.
        return [
            (_LOAD, 0, 0, 16 + 8 * flags),
            (_ANY_BIT, 1, 0, 0o1000),
            (_RETURN, 0, 0, _ALLOW),
            (_AND, 0, 0, 0o3),
            (_EQUAL, 1, 0, 1),
            (_EQUAL, 0, 1, 2),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _ERRNO | _EPERM),
        ]

    # clone may make threads but no processes, which could multiply and outlive this one. All
    # threads must share one table of open files, which `sandbox.py` counts.
    clone_thread_and_files = 0x10000 | 0x400
    return {
        "open": no_truncating_reader(1),
        "openat": no_truncating_reader(2),
        "clone": [
            (_LOAD, 0, 0, 16),
            (_AND, 0, 0, clone_thread_and_files),
            (_EQUAL, 0, 1, clone_thread_and_files),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _ERRNO | _EPERM),
        ],
        "kill": _one_of(0, [pid], _EPERM),
        "tgkill": _one_of(0, [pid], _EPERM),
        "prlimit64": [
            (_LOAD, 0, 0, 24),
            (_EQUAL, 0, 1, 4),  # RLIMIT_CORE: see `limits`
            (_RETURN, 0, 0, _ERRNO | _EPERM),
            *_one_of(0, [0, pid], _EPERM),
        ],
        "prctl": _one_of(0, [15, 16, 0x53564D41], _EPERM),  # thread names, names of mappings
        # asyncio wakes itself through a socket pair. Only stream sockets cannot be sent elsewhere.
        "socketpair": [
            (_LOAD, 0, 0, 16),
            (_EQUAL, 1, 0, 1),  # AF_UNIX
            (_RETURN, 0, 0, _ERRNO | _EPERM),
            (_LOAD, 0, 0, 24),
            (_AND, 0, 0, 0xF),
            (_EQUAL, 0, 1, 1),  # SOCK_STREAM
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _ERRNO | _EPERM),
        ],
        # F_SETOWN, F_SETSIG and F_SETOWN_EX are left out: they make the kernel signal other
        # processes. So are F_NOTIFY, F_SETLEASE and F_SETPIPE_SZ. Allowed are: duplicate, flags,
        # locks, sizes, seals.
        "fcntl": _one_of(1, [0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032, 1034], _EPERM),
        "close_range": _one_of(2, [0, 4], _EPERM),  # no CLOSE_RANGE_UNSHARE: it copies the table
        # For isatty, window size, bytes waiting, close-on-exec, non-blocking.
        "ioctl": _one_of(1, [0x5401, 0x802C542A, 0x5413, 0x541B, 0x5450, 0x5451, 0x5421], _ENOTTY),
    }


def seccomp_filter(column: int, audit_architecture: int, pid: int) -> list[Instruction]:
    """Build the whole filter. It allows calls in no table, and kills a foreign instruction set."""
    rules: list[Instruction] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, audit_architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_GREATER, 0, 1, LAST_KNOWN_CALL),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
    ]
    for table, error in REFUSALS:
        for number in syscall_numbers(table, column).values():
            rules += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | error)]
    arguments = _argument_rules(pid)
    for name, number in syscall_numbers(CHECKED, column).items():
        rules += [(_EQUAL, 0, len(arguments[name]), number), *arguments[name]]
    return [*rules, (_RETURN, 0, 0, _ALLOW)]


def limits(job: dict[str, Any]) -> None:
    """Limit CPU seconds, size of a file and open files; forbid core dumps."""
    if resource is None:
        raise Inactive("needs a POSIX system")
    wanted = {
        resource.RLIMIT_CPU: job["cpu_seconds"],
        resource.RLIMIT_FSIZE: job["disk_bytes"],
        resource.RLIMIT_NOFILE: job["open_files"],
        # With a limit of 1 byte, Linux writes no dump and starts no handler; with 0 it would start
        # a handler.
        resource.RLIMIT_CORE: 1,
    }
    for kind, value in wanted.items():
        _lower_limit(kind, value)


def memory(job: dict[str, Any]) -> None:
    """Limit the address space; no other memory limit works without privileges."""
    if resource is None or not sys.platform.startswith("linux"):
        raise Inactive("the system does not enforce RLIMIT_AS")
    _lower_limit(resource.RLIMIT_AS, job["memory_bytes"])


def _lower_limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError) as error:
        raise Inactive(f"limit {kind}: {error}") from None


def privileges(job: dict[str, Any]) -> None:
    """Forbid new privileges, drop all capabilities (root keeps its user id), die with parent."""
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    _prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() != job["parent"]:
        os._exit(1)  # the parent died before the line above
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    _checked(_libc().capset(header, ctypes.create_string_buffer(24)), "capset")


def landlock(job: dict[str, Any]) -> None:
    """Allow reading of `job["readable"]` and writing in the current folder only; no TCP, no signals
    to other processes."""
    if platform.machine() not in _ARCHITECTURES:
        raise Inactive(f"not written for {platform.machine()}")
    syscall = _libc().syscall
    version = _checked(syscall(444, None, ctypes.c_size_t(0), 1), "landlock_create_ruleset")

    # Bits 0-12 are ABI 1: execute, write file, read file, read dir, remove dir, remove file, make
    # char, dir, reg, sock, fifo, block, sym. Later ones: refer (ABI 2), truncate (3), ioctl (5).
    read_file, read_dir = 1 << 2, 1 << 3
    write_file, refer, truncate, ioctl_device = 1 << 1, 1 << 13, 1 << 14, 1 << 15
    handled = (1 << 13) - 1
    handled |= (refer if version >= 2 else 0) | (truncate if version >= 3 else 0)
    handled |= ioctl_device if version >= 5 else 0
    attributes = struct.pack("=Q", handled)
    attributes += struct.pack("=Q", 3) if version >= 4 else b""  # bind and connect TCP
    attributes += struct.pack("=Q", 3) if version >= 6 else b""  # abstract sockets, signals
    ruleset = _checked(
        syscall(444, attributes, ctypes.c_size_t(len(attributes)), 0), "landlock_create_ruleset"
    )

    def allow(path: str, rights: int) -> None:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return  # this system does not have the path
        if not os.path.isdir(path):
            rights &= read_file | write_file | truncate
        rule = struct.pack("=Qi", rights & handled, descriptor)
        _checked(syscall(445, ruleset, 1, rule, 0), "landlock_add_rule")
        os.close(descriptor)

    for path in job["readable"]:
        allow(path, read_file | read_dir)
    allow("/dev/null", read_file | write_file | truncate)
    # All rights to make, read, change and remove files, folders and symbolic links.
    make_and_remove = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12
    allow(".", read_file | read_dir | write_file | make_and_remove | refer | truncate)
    _checked(syscall(446, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def seccomp(job: dict[str, Any]) -> None:
    """Refuse the system calls of the tables above."""
    column, audit_architecture = _ARCHITECTURES.get(platform.machine(), (0, 0))
    if not audit_architecture or sys.byteorder != "little" or sys.maxsize < 2**32:
        raise Inactive(f"not written for {platform.machine()}")
    rules = seccomp_filter(column, audit_architecture, os.getpid())
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(rules), ctypes.addressof(code)))
    _prctl(22, 2, ctypes.addressof(program))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


LAYERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "limits": limits,
    "memory": memory,
    "privileges": privileges,
    "landlock": landlock,
    "seccomp": seccomp,  # the last one, since it refuses calls that the others need
}


def lock_down(job: dict[str, Any]) -> dict[str, str]:
    """Switch on every layer that `job["layers"]` names; return why the missing ones are missing."""
    inactive = {}
    for name, switch_on in LAYERS.items():
        try:
            if name not in job["layers"]:
                raise Inactive("not asked for")
            switch_on(job)
        except Inactive as reason:
            inactive[name] = str(reason)
    if "seccomp" in inactive and resource is not None:
        # A simple way to forbid new processes without seccomp. On Linux it forbids threads too, and
        # it does not bind root.
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    return inactive


def main() -> None:
    job = json.loads(sys.argv[1])
    sys.argv, sys.orig_argv = [PROGRAM], [PROGRAM]
    report = os.dup(2)  # the program may close or redirect its stderr
    inactive = lock_down(job)
    os.write(report, f"{job['token']} {json.dumps(inactive)}\n".encode())
    if inactive and job["strict"]:
        os._exit(1)

    for stream in (sys.stdout, sys.stderr):
        # Lines are flushed at once, so that a killed program's output is kept.
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    module = types.ModuleType("__main__")
    module.__file__ = PROGRAM
    sys.modules["__main__"] = module
    try:
        with open(PROGRAM, encoding="utf-8") as file:
            source = file.read()
        exec(compile(source, PROGRAM, "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        # The traceback has the program's own frames only; none if it did not compile.
        frames = error.__traceback__.tb_next if error.__traceback__ else None
        sys.excepthook(type(error), error.with_traceback(frames), frames)
        raise SystemExit(1) from None
    else:  # here and not in a function: the program may have replaced any function
        os.write(report, f"{job['token']} end\n".encode())


if __name__ == "__main__":
    main()
