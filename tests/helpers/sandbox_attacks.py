"""Attacks on the sandbox, for tests/sandbox/test_sandbox.py and, run as a program, for another user's Python.

QUIET attacks end with an error in their own process and share one by groups; LETHAL ones have one each.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nanochat.sandbox.process import Limits
from nanochat.sandbox.sandbox import Sandbox

# Each line is an expression; it got through if it raises nothing and gives neither -1 nor False.
QUIET: dict[str, str] = {
    "processes": """
os.fork()
os.forkpty()
pty.fork()
os.posix_spawn('/bin/true', ['true'], {})
os.posix_spawnp('true', ['true'], {})
os.spawnv(os.P_NOWAIT, '/bin/true', ['true'])
os.execv('/bin/true', ['true'])
os.execv(sys.executable, ['python', '-c', '1'])
os.system('true') == 0
os.popen('echo hi').read() == 'hi\\n'
subprocess.run(['/bin/true'])
subprocess.run('true', shell=True, check=True)
subprocess.Popen([sys.executable, '-c', '1'])
multiprocessing.Process(target=print).start()
multiprocessing.get_context('spawn').Process(target=print).start()
concurrent.futures.ProcessPoolExecutor(1).submit(print).result(2)
syscall(57)
syscall(58)
syscall(56, 17, 0, 0, 0, 0)
syscall(56, 0x4111, 0, 0, 0, 0)
syscall(435, ctypes.create_string_buffer(88), 88)
syscall(59, b'/bin/true', 0, 0)
syscall(322, -100, b'/bin/true', 0, 0, 0)
os.setsid()
os.setpgid(0, 0)
os.nice(-1)
os.sched_setaffinity(0, {0})
""",
    "files": """
open(SECRET).read()
open('/etc/passwd').read()
open('/etc/shadow').read()
open('/etc/hostname').read()
open(f'/proc/{PARENT}/environ').read()
open(f'/proc/{PARENT}/maps').read()
open(f'/proc/{PARENT}/mem', 'rb').read(1)
open(f'/proc/{PARENT}/cmdline').read()
open(f'/proc/{PARENT}/stat').read()
os.listdir(f'/proc/{PARENT}/fd')
os.readlink(f'/proc/{PARENT}/cwd')
os.readlink(f'/proc/{PARENT}/exe')
open('/proc/self/mem', 'r+b')
open('/proc/self/environ').read()
open('/proc/self/oom_score_adj', 'w')
open('/proc/sys/kernel/core_pattern').read()
os.listdir('/')
os.listdir(DIRECTORY)
os.listdir('/tmp')
os.listdir('/root')
os.listdir('/proc')
os.listdir('/sys')
os.listdir('/dev')
open('/dev/null', 'w')
open('/dev/tty')
open('/dev/mem', 'rb')
open('/dev/shm/x', 'w')
open('/tmp/nanochat-attack', 'w')
open(os.__file__, 'a')
open(os.path.dirname(os.__file__) + '/attack.py', 'w')
open(SECRET, 'a')
os.open(SECRET, os.O_RDWR)
os.open(DIRECTORY, os.O_TMPFILE | os.O_RDWR)
open(f'/proc/self/fd/{os.open(SECRET, os.O_PATH)}').read()
os.unlink(SECRET)
os.rename(SECRET, DIRECTORY + '/b')
os.replace(SECRET, DIRECTORY + '/b')
os.link(SECRET, DIRECTORY + '/b')
os.symlink('/etc/passwd', DIRECTORY + '/b')
os.mkdir(DIRECTORY + '/b')
os.rmdir(DIRECTORY)
os.mkfifo(DIRECTORY + '/b')
os.mknod(DIRECTORY + '/b')
os.chmod(SECRET, 0)
os.chmod(DIRECTORY, 0)
os.chown(SECRET, os.getuid(), os.getgid())
os.lchown(SECRET, os.getuid(), os.getgid())
os.utime(SECRET)
os.truncate(SECRET, 0)
os.setxattr(SECRET, 'user.a', b'b')
os.getxattr(SECRET, 'user.a')
os.chroot('/')
os.chdir('/tmp')
os.umask(0)
os.open(os.path.dirname(os.__file__) + '/../../../../../../../etc/passwd', os.O_RDONLY)
tempfile.mkstemp()
tempfile.TemporaryFile()
shutil.copy(SECRET, DIRECTORY + '/b')
rename_race()
""",
    "network": """
socket.socket(socket.AF_INET, socket.SOCK_STREAM)
socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
socket.socket(40, socket.SOCK_STREAM)
socket.socketpair()
socket.create_connection(('127.0.0.1', 80), 1)
socket.getaddrinfo('localhost', 80)
socket.gethostbyname('example.org')
urllib.request.urlopen('http://127.0.0.1')
http.client.HTTPConnection('127.0.0.1').request('GET', '/')
asyncio.run(asyncio.sleep(0))
syscall(41, 2, 1, 0)
syscall(42, 3, 0, 0)
syscall(49, 3, 0, 0)
syscall(53, 1, 1, 0, ctypes.create_string_buffer(8))
""",
    "control": """
os.kill(PARENT, 0)
os.kill(PARENT, 9)
os.kill(0, 0)
os.kill(-1, 0)
os.kill(1, 0)
os.killpg(os.getpgid(PARENT), 0)
signal.pidfd_send_signal(os.pidfd_open(PARENT), 0)
os.pidfd_open(os.getpid())
syscall(200, PARENT, 0)
syscall(234, PARENT, PARENT, 0)
syscall(129, PARENT, 9, 0)
libc.ptrace(0, 0, 0, 0)
libc.ptrace(16, PARENT, 0, 0)
syscall(310, PARENT, 0, 0, 0, 0, 0)
syscall(311, PARENT, 0, 0, 0, 0, 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
resource.setrlimit(resource.RLIMIT_CPU, (9, 9))
resource.prlimit(PARENT, resource.RLIMIT_CPU)
resource.prlimit(PARENT, resource.RLIMIT_CPU, (1, 1))
fcntl.ioctl(0, termios.TIOCSTI, b'x')
fcntl.ioctl(1, termios.TIOCSTI, b'x')
fcntl.ioctl(1, 0x541C, b'x')
fcntl.fcntl(1, fcntl.F_SETOWN, PARENT)
fcntl.fcntl(1, fcntl.F_SETFL, os.O_ASYNC)
fcntl.fcntl(1, 1031, 1 << 20)
fcntl.flock(1, fcntl.LOCK_EX)
libc.unshare(0x10000000)
libc.unshare(0x20000)
libc.setns(0, 0)
libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0)
libc.umount(b'/tmp')
libc.pivot_root(b'/', b'/')
syscall(425, 8, ctypes.create_string_buffer(120))
syscall(426, 0, 0, 0, 0, 0)
syscall(321, 0, ctypes.create_string_buffer(120), 120)
syscall(298, ctypes.create_string_buffer(120), 0, -1, -1, 0)
syscall(250, 0, 0, 0, 0, 0)
syscall(248, 0, 0, 0, 0, 0)
syscall(323, 0)
syscall(317, 0, 0, 0)
syscall(313, 0, b'', 0)
syscall(246, 0, 0, 0, 0)
libc.klogctl(3, ctypes.create_string_buffer(64), 64)
libc.reboot(0)
libc.sethostname(b'x', 1)
libc.personality(0)
libc.prctl(4, 1, 0, 0, 0)
libc.prctl(1, 0, 0, 0, 0)
libc.prctl(22, 2, 0, 0, 0)
libc.prctl(38, 0, 0, 0, 0)
os.setuid(0)
os.seteuid(0)
os.setresuid(0, 0, 0)
os.setgid(0)
os.setgroups([0])
syscall(126, ctypes.create_string_buffer(8), ctypes.create_string_buffer(24))
syscall(227, 0, 0)
syscall(164, 0, 0)
syscall(444, ctypes.create_string_buffer(8), 8, 0)
syscall(0x40000000 + 39) if False else -1
libc.swapon(b'/tmp/x', 0)
libc.acct(0)
syscall(222, 0, 0, 0)
""",
    "memory": """
os.memfd_create('x')
libc.shmget(0, 4096, 0o1777)
libc.semget(0, 1, 0o1777)
libc.msgget(0, 0o1777)
multiprocessing.shared_memory.SharedMemory(create=True, size=4096)
bytearray(1 << 30)
mmap.mmap(-1, 1 << 30)
[0] * (1 << 28)
'x' * (1 << 30)
b''.join([b'x' * (1 << 24)] * 64)
libc.mlock(ctypes.create_string_buffer(1 << 20), 1 << 20)
libc.mlockall(3)
open(SECRET, 'r+b') and mmap.mmap(os.open(SECRET, os.O_RDWR), 1)
""",
    "descriptors": """
[fd for fd in range(3, 1024) if readable(fd)] or -1
os.write(0, b'x')
os.dup2(1, 40)
[os.dup(1) for _ in range(64)]
os.pipe()
os.openpty()
os.eventfd(0)
select.epoll()
os.inotify_init() if hasattr(os, 'inotify_init') else libc.inotify_init()
os.timerfd_create(0) if hasattr(os, 'timerfd_create') else -1
os.sendfile(1, 0, None, 1)
os.splice(0, 1, 1) if hasattr(os, 'splice') else -1
os.copy_file_range(0, 1, 1) if hasattr(os, 'copy_file_range') else -1
""",
}
MODULES = (
    "asyncio, concurrent.futures, ctypes, fcntl, http.client, json, mmap, multiprocessing, os, pty, "
    "resource, select, shutil, signal, socket, subprocess, sys, tempfile, termios, threading, urllib.request"
)
FRAME = f"""
import {MODULES}
import multiprocessing.shared_memory
import platform
libc = ctypes.CDLL(None, use_errno=True)
def syscall(*a):
    if platform.machine() != 'x86_64': return -1
    return libc.syscall(*[ctypes.c_long(x) if isinstance(x, int) else x for x in a])
def readable(fd):
    try: return os.fstat(fd) is not None
    except OSError: return False
def rename_race():
    for i in range(200):
        try: os.rename(SECRET, DIRECTORY + '/r'); return True
        except OSError: pass
        try: open(DIRECTORY + '/r').read(); return True
        except OSError: pass
    return False
through = []
for line in LINES:
    try: value = eval(line)
    except BaseException: continue
    if value is not False and value != -1: through.append(line)
print(json.dumps(through))
"""

# Programs that must be ended, and how that may look.
LETHAL: dict[str, tuple[str, tuple[str, ...]]] = {
    "loop": ("while True: pass", ("timeout",)),
    "sleep": ("import time; time.sleep(60)", ("timeout",)),
    "huge power": ("print(len(str(9 ** 9 ** 9)))", ("timeout", "failed", "killed")),
    "regex": ("import re; re.match('(a+)+$', 'a' * 64 + 'b')", ("timeout",)),
    "blocked signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))\nwhile True: pass",
        ("timeout",),
    ),
    "atexit": ("import atexit\n@atexit.register\ndef f():\n    while True: pass", ("timeout",)),
    "del": ("class A:\n    def __del__(self):\n        while True: pass\na = A()\ndel a", ("timeout",)),
    "finally": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        ("timeout",),
    ),
    "alarm": ("import signal, time\nsignal.alarm(1)\ntime.sleep(60)", ("killed", "timeout")),
    "thread that stays": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
        ("timeout",),
    ),
    "lock": ("import threading; a = threading.Lock(); a.acquire(); a.acquire()", ("timeout",)),
    "closed streams": ("import os\nos.close(1)\nos.close(2)\nwhile True: pass", ("timeout",)),
    "growing list": ("a = [0]\nwhile True: a += a", ("failed", "killed")),
    "growing bytes": ("a = []\nwhile True: a.append(bytearray(1 << 20))", ("failed", "killed")),
    "many threads": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
        ("failed", "killed", "timeout"),
    ),
    "recursion": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
        ("failed", "killed", "timeout"),
    ),
    "stack": ("def f():\n    f()\nf()", ("failed", "killed")),
    "deep code": ("eval('(' * 100000 + ')' * 100000)", ("failed", "killed", "flood")),
    "flood of output": ("while True: print('x' * 1000)", ("flood",)),
    "flood of errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", ("flood",)),
    "NUL": ("print('\\0' * 10)", ("done",)),
    "no UTF-8": ("import os; os.write(1, b'\\xff\\xfe\\x80')", ("done",)),
    "segfault": ("import ctypes; ctypes.string_at(0)", ("killed",)),
    "abort": ("import os; os.abort()", ("killed",)),
    "kill itself": ("import os; os.kill(os.getpid(), 9)", ("killed",)),
    "stop itself": ("import os; os.kill(os.getpid(), 19)", ("timeout",)),
    "bus error": ("import os; os.kill(os.getpid(), 7)", ("killed",)),
    "fork bomb": ("import os\nwhile True: os.fork()", ("failed",)),
    "double fork": ("import os\nif os.fork() == 0:\n    if os.fork() == 0: pass", ("failed",)),
    "zip of zeros": ("import zlib\nzlib.decompress(zlib.compress(b'0' * (1 << 26)) * 1, bufsize=1 << 31)",
                     ("failed", "killed", "timeout")),
    "32-bit calls": (
        "import ctypes, mmap, platform, sys\n"
        "if platform.machine() != 'x86_64': sys.exit(1)\n"
        "m = mmap.mmap(-1, 4096, prot=7)\n"
        "m.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')\n"
        "a = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
        "print(ctypes.CFUNCTYPE(ctypes.c_int)(a)())",
        ("killed", "failed"),
    ),
    "x32 calls": (
        "import ctypes, platform, sys\nif platform.machine() != 'x86_64': sys.exit(1)\n"
        "ctypes.CDLL(None).syscall(ctypes.c_long(0x40000000 + 39))\nprint('through')",
        ("killed", "failed"),
    ),
}  # fmt: skip


def count() -> int:
    return len(LETHAL) + sum(len(lines(group)) for group in QUIET)


def lines(group: str) -> list[str]:
    return [line.replace("\\\\n", "\\n") for line in QUIET[group].strip().splitlines()]


def attack_all(wall_seconds: float = 4.0) -> dict[str, Any]:
    """{name of what went wrong: how}; empty if the sandbox held. Also looks at the files and the parent."""
    wrong: dict[str, Any] = {}
    sandbox = Sandbox(Limits(wall_seconds))
    with tempfile.TemporaryDirectory(prefix="nanochat-attack-") as directory:
        os.chmod(directory, 0o777)
        secret = os.path.join(directory, "secret")
        with open(secret, "w") as file:
            file.write("the secret")
        os.chmod(secret, 0o666)
        before = os.stat(secret)
        names = f"SECRET = {secret!r}\nDIRECTORY = {directory!r}\nPARENT = {os.getpid()}\n"
        with ThreadPoolExecutor(2) as pool:
            quiet = {
                group: pool.submit(
                    sandbox.run, f"{names}LINES = {lines(group)!r}\n{FRAME}", Limits(60.0)
                )
                for group in QUIET
            }  # fmt: skip
            lethal = {name: pool.submit(sandbox.run, code) for name, (code, _) in LETHAL.items()}
            for group, future in quiet.items():
                found = future.result()
                try:
                    wrong |= {f"{group}: {line}": "through" for line in json.loads(found.out)}
                except ValueError:
                    wrong[group] = [found.how, found.code, found.out[-300:], found.err[-900:]]
            for name, future_ in lethal.items():
                found = future_.result()
                if found.how not in LETHAL[name][1] or "through" in found.out:
                    wrong[name] = [found.how, found.code, found.out[-200:], found.err[-400:]]
                if found.seconds > wall_seconds + 30:
                    wrong[f"{name}: time"] = found.seconds
        after = os.stat(secret)
        same = all(
            getattr(before, f) == getattr(after, f) for f in ("st_mode", "st_uid", "st_size", "st_ino")
        )
        if not same or before.st_mtime_ns != after.st_mtime_ns or os.listdir(directory) != ["secret"]:
            wrong["files"] = [stat.filemode(after.st_mode), os.listdir(directory)]
    return wrong


if __name__ == "__main__":
    begun = time.time()
    print(json.dumps({"wrong": attack_all(), "count": count(), "uid": os.getuid()}))
    print(f"{time.time() - begun:.1f} s", file=sys.stderr)
