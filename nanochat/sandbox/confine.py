"""The walls, put up by the child around itself before it runs foreign code. Standard library alone.

In order: resource limits, another user (if root), no new privileges, Landlock, seccomp. Needs no root, no
namespaces, no packages. Left out, and open: kernel bugs, side channels of the CPU, whether a file exists.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from typing import Any

READ_FILE, READ_DIR = 1 << 2, 1 << 3
NUM_ACCESS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # kinds of file access by Landlock's version; later as 5
CAP_DAC_READ_SEARCH, LAST_CAP = 2, 63
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS = 1, 4, 8
PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 22, 24, 38
THREAD_FLAGS = 0x10100  # CLONE_THREAD | CLONE_VM: what every thread has and no process
KILL, ALLOW, ERRNO, EPERM, ENOSYS = 0x80000000, 0x7FFF0000, 0x00050000, 1, 38
X32_BIT = 0x40000000

# Syscalls that are allowed whatever their arguments, by number: (x86-64, aarch64); None where there is none.
PLAIN: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None),
    "fstat": (5, 80), "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67), "readv": (19, 65),
    "writev": (20, 66), "access": (21, None), "select": (23, None), "sched_yield": (24, 124),
    "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None), "pause": (34, None),
    "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103),
    "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160), "getcwd": (79, 17), "readlink": (89, None),
    "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "getpgrp": (111, None), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150), "getpgid": (121, 155), "getsid": (124, 156),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132), "sched_getparam": (143, 121), "sched_getscheduler": (145, 120),
    "arch_prctl": (158, None), "gettid": (186, 178), "time": (201, None), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "set_tid_address": (218, 96),
    "restart_syscall": (219, 128), "fadvise64": (221, 223), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94),
    "openat": (257, 56), "newfstatat": (262, 79), "readlinkat": (267, 78), "faccessat": (269, 48),
    "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99), "get_robust_list": (274, 100),
    "dup3": (292, 24), "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291),
    "rseq": (334, 293), "faccessat2": (439, 439),
}  # fmt: skip
CHECKED = {  # allowed only with certain arguments
    "clone": (56, 220), "ioctl": (16, 29), "fcntl": (72, 25), "kill": (62, 129), "tgkill": (234, 131),
    "prlimit64": (302, 261), "prctl": (157, 167), "clone3": (435, 435),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH
IOCTLS = (0x5401, 0x5451, 0x5450)  # TCGETS (isatty), FIOCLEX, FIONCLEX
FCNTLS = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
PRCTLS = (15, 16)  # a thread's name


class Gap(Exception):
    """A layer that this machine does not have, or that could not be put up; the text names it."""


def landlock_version() -> int:
    """The version of Landlock's interface, 0 for none."""
    return max(0, _syscall(444, None, 0, 1))


def confine(limits: dict[str, Any], readable: list[str], skip: frozenset[str] = frozenset()) -> list[str]:
    """Put up every wall around this process. Raises Gap for the first that cannot be, unless it is in `skip`.

    limits: memory_bytes, cpu_seconds, parent (its process id), uid. readable: files and directories to be
    read. Returns what was skipped and why.
    """
    gaps: list[str] = []
    steps = [
        ("rlimits", lambda: _rlimits(limits["memory_bytes"], limits["cpu_seconds"])),
        ("user", lambda: _other_user(limits["uid"], readable)),
        ("prctl", lambda: _prctls(limits["parent"])),
        ("landlock", lambda: _landlock(readable)),
        ("seccomp", _seccomp),
    ]
    for name, step in steps:
        try:
            step()
        except (Gap, OSError, ValueError) as error:
            if name not in skip:
                raise Gap(f"{name}: {error}") from error
            gaps.append(f"{name}: {error}")
    return gaps


def _rlimits(memory_bytes: int, cpu_seconds: int) -> None:
    for kind, value in (
        (resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CPU, cpu_seconds), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):  # fmt: skip
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _other_user(uid: int, readable: list[str]) -> None:
    """If root: an unused user without capabilities.

    Where that user could not read Python itself (an interpreter in a private directory), one capability
    stays, that of reading; Landlock says what.
    """
    if os.geteuid() != 0:
        return
    needs_reading = not all(map(_is_public, readable))
    for cap in range(LAST_CAP + 1):
        _prctl(PR_CAPBSET_DROP, cap, check=False)  # the last ones do not exist on every kernel
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    _prctl(PR_SET_KEEPCAPS, 1)
    os.setresuid(uid, uid, uid)
    kept = 1 << CAP_DAC_READ_SEARCH if needs_reading else 0
    header = struct.pack("Ii", 0x20080522, 0)
    sets = struct.pack("6I", kept, kept, 0, 0, 0, 0)
    if _libc().capset(header, sets) != 0:
        raise Gap(f"capset failed with error {ctypes.get_errno()}")
    _prctl(PR_SET_KEEPCAPS, 0)


def _is_public(path: str) -> bool:
    """Whether any user may read it."""
    parts = os.path.realpath(path).split("/")
    above = ["/".join(parts[:i]) or "/" for i in range(1, len(parts))]
    return all(os.stat(each).st_mode & 1 for each in above) and bool(os.stat(path).st_mode & 4)


def _prctls(parent: int) -> None:
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_DUMPABLE, 0)
    _prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))  # after the change of user, which clears it
    if os.getppid() != parent:
        raise Gap("the parent has gone")


def _landlock(readable: list[str]) -> None:
    version = landlock_version()
    if version < 1:
        raise Gap("the kernel has no Landlock (5.13 and later, enabled at boot)")
    handled = (1 << NUM_ACCESS[min(version, 5)]) - 1
    network = 3 if version >= 4 else 0  # bind and connect of TCP
    scopes = 3 if version >= 6 else 0  # abstract sockets and signals outside
    attributes = struct.pack("QQQ", handled, network, scopes)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _syscall(444, attributes, size, 0)
    if rules < 0:
        raise Gap(f"no Landlock rules could be made, error {ctypes.get_errno()}")
    try:
        for path in readable:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                access = READ_FILE | (READ_DIR if os.path.isdir(path) else 0)
                if _syscall(445, rules, 1, struct.pack("=Qi", access, fd), 0) != 0:
                    raise Gap(f"Landlock refuses a rule for {path}, error {ctypes.get_errno()}")
            finally:
                os.close(fd)
        if _syscall(446, rules, 0) != 0:
            raise Gap(f"Landlock cannot be switched on, error {ctypes.get_errno()}")
    finally:
        os.close(rules)


def _seccomp() -> None:
    machine = os.uname().machine
    if machine not in MACHINES or struct.calcsize("P") != 8:
        raise Gap(f"there is no list of system calls for {machine}")
    program = ctypes.create_string_buffer(filter_program(machine, os.getpid()))
    size = (len(program) - 1) // 8
    header = struct.pack("HxxxxxxQ", size, ctypes.addressof(program))
    if _libc().prctl(PR_SET_SECCOMP, 2, header, 0, 0) != 0:
        raise Gap(f"the kernel takes no seccomp filter, error {ctypes.get_errno()}")


def filter_program(machine: str, pid: int) -> bytes:
    """The BPF program: another architecture is killed; what is not listed gets EPERM."""
    column, arch = MACHINES[machine]
    load = lambda offset: struct.pack("HBBI", 0x20, 0, 0, offset)  # noqa: E731
    jump = lambda value, yes, no, kind=0x15: struct.pack("HBBI", kind, yes, no, value)  # noqa: E731
    give = lambda value: struct.pack("HBBI", 0x06, 0, 0, value)  # noqa: E731
    low = lambda i: load(16 + 8 * i)  # noqa: E731  (little-endian)
    high = lambda i: load(20 + 8 * i)  # noqa: E731
    refuse = give(ERRNO | EPERM)

    def one_of(argument: int, values: tuple[int, ...]) -> list[bytes]:
        tests = [low(argument)]
        for value in values:
            tests += [jump(value & 0xFFFFFFFF, 0, 1), give(ALLOW)]
        return [*tests, refuse]

    def all_bits(argument: int, bits: int) -> list[bytes]:
        keep = struct.pack("HBBI", 0x54, 0, 0, bits)  # A &= bits
        return [low(argument), keep, jump(bits, 0, 1), give(ALLOW), refuse]

    rules = {
        "clone": all_bits(0, THREAD_FLAGS),
        "ioctl": one_of(1, IOCTLS),
        "fcntl": one_of(1, FCNTLS),
        "kill": one_of(0, (pid,)),
        "tgkill": one_of(0, (pid,)),
        "prctl": one_of(0, PRCTLS),
        "clone3": [give(ERRNO | ENOSYS)],
        # reading one's own limits: pid 0 and no new ones
        "prlimit64": [low(0), jump(0, 0, 5), low(2), jump(0, 0, 3), high(2), jump(0, 0, 1), give(ALLOW),
                      refuse],
    }  # fmt: skip
    code = [load(4), jump(arch, 1, 0), give(KILL), load(0)]
    if machine == "x86_64":
        code += [jump(X32_BIT, 0, 1, 0x35), give(KILL)]  # number >= bit
    for numbers in PLAIN.values():
        if numbers[column] is not None:
            code += [jump(int(numbers[column] or 0), 0, 1), give(ALLOW)]
    for name, checks in rules.items():
        code += [jump(CHECKED[name][column], 0, len(checks)), *checks]
    return b"".join([*code, refuse])


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int, check: bool = True) -> None:
    word = ctypes.c_ulong
    if _libc().prctl(option, word(value), word(0), word(0), word(0)) != 0 and check:
        raise Gap(f"prctl {option} failed with error {ctypes.get_errno()}")


def _syscall(number: int, *arguments: Any) -> int:
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return int(_libc().syscall(ctypes.c_long(number), *words))
