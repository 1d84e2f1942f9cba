"""Attacks that a sandbox is tried with before it runs anything: a program that prints what got through.

The names SECRET (a file), DIRECTORY and PARENT (a process) stand above it. tests/sandbox/test_sandbox.py
tries more.
"""

PROBE = r"""
import ctypes, json, os, signal, socket, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
through = []
def attack(name, do):
    try:
        value = do()
    except BaseException:
        return
    if value is not False and value != -1:
        through.append(name)
def new(path):
    return os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
def child():
    if os.fork() == 0:
        os._exit(0)
attack("read a file", lambda: open(SECRET).read())
attack("write a file", lambda: open(SECRET, "r+").write("x"))
attack("make a file", lambda: new(DIRECTORY + "/made"))
attack("delete a file", lambda: os.unlink(SECRET))
attack("rename a file", lambda: os.rename(SECRET, DIRECTORY + "/moved"))
attack("link a file", lambda: os.link(SECRET, DIRECTORY + "/linked"))
attack("link to a file", lambda: os.symlink(SECRET, DIRECTORY + "/linked"))
attack("make a directory", lambda: os.mkdir(DIRECTORY + "/made"))
attack("change a mode", lambda: os.chmod(SECRET, 0o600))
attack("change a time", lambda: os.utime(SECRET, (0, 0)))
attack("truncate a file", lambda: os.truncate(SECRET, 0))
attack("set an attribute", lambda: os.setxattr(SECRET, "user.x", b"x"))
attack("list a directory", lambda: os.listdir(DIRECTORY))
attack("read the parent's memory map", lambda: open(f"/proc/{PARENT}/maps").read())
attack("fork", child)
attack("run a program", lambda: subprocess.run(["/bin/true"]))
attack("exec", lambda: libc.execve(b"/nonexistent", None, None) if ctypes.get_errno() == 2 else -1)
attack("open a TCP socket", lambda: socket.socket())
attack("open a UNIX socket", lambda: socket.socket(socket.AF_UNIX))
attack("signal the parent", lambda: os.kill(PARENT, 0))
attack("raise a limit", lambda: __import__("resource").setrlimit(7, (16, 16)))
attack("trace", lambda: libc.ptrace(0, 0, 0, 0))
attack("new namespace", lambda: libc.unshare(0x10000000))
attack("memory file", lambda: os.memfd_create("x"))
print(json.dumps(through))
"""
