"""What stands between a sandboxed program and the machine; sandbox.py runs this file as a script.

Three processes. The supervisor watches time and memory from outside. With namespaces of their own
(processes, network, mounts), under it: an init, whose end is the end of all in its namespace, and
the program, as a user without rights, in a root folder that holds the system's libraries and
Python, read-only, and one small writable folder. The standard library alone is imported, and
little of it: this is run for every program.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import signal
import sys
import time
from typing import Any, NoReturn

_NEWNS, _NEWUTS, _NEWIPC = 0x00020000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_MOUNT_SETATTR, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID = 442, 0x8000, 1, 2

BOX = "/box"
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache")
_FOR_NETWORK = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ssl")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_INNER_ID = 1000
# without `site`, which looks through all that is installed; exit and quit come from it
_RUN = """b = __import__("builtins"); b.exit = b.quit = __import__("sys").exit; del b
exec(compile(open("main.py", "rb").read(), "main.py", "exec"))"""
_LOOK = 0.02  # seconds between two looks at the memory in use


class Refused(Exception):
    """The system does not give what isolation takes."""


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise Refused(f"{what}: {os.strerror(error)}")


def _prctl(option: int, value: int) -> None:
    _libc().prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def _spare_id() -> int | None:
    """A user id of this run's own, as root may take; None where no such id is mapped here."""
    with open("/proc/self/uid_map") as file:
        rows = [[int(word) for word in line.split()] for line in file]
    for wanted in (1_000_000_000 + os.getpid(), 20_000 + os.getpid() % 40_000):
        if any(inner <= wanted < inner + count for inner, _, count in rows):
            return wanted
    return None


def isolate(network: bool) -> int:
    """Moves this process (and, of processes, its next child) into namespaces of its own.

    Returns the user id that the program is to run as. Refused: the system does not allow it.
    """
    spaces = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | (0 if network else _NEWNET)
    if os.geteuid() == 0 and (own := _spare_id()) is not None and _libc().unshare(spaces) == 0:
        return own
    user, group = os.geteuid(), os.getegid()
    _check(_libc().unshare(spaces | _NEWUSER), "unshare (user, network, process namespaces)")
    try:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{_INNER_ID} {user} 1"),
            ("gid_map", f"{_INNER_ID} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError as error:
        raise Refused(f"the map of users: {error}") from error
    return _INNER_ID


def _open_to_all(path: str) -> bool:
    """Whether any user may run this file."""
    above = [path]
    while above[-1] != "/":
        above.append(os.path.dirname(above[-1]))
    return all(os.stat(one).st_mode & 1 for one in above)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    done = _libc().mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()
    )
    _check(done, f"mount on {target}")


def enter_root(spec: dict[str, Any], own: int) -> None:
    """Makes the folder tree that the program sees, and goes into it. Runs in the init."""
    root = spec["folder"]
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=0755")
    given = [*_SYSTEM, *_DEVICES, *spec["python_folders"]]
    for path in given + (list(_FOR_NETWORK) if spec["allow_network"] else []):
        inside = root + path
        if not os.path.lexists(path) or os.path.lexists(inside):
            continue
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path) and path in _SYSTEM:
            os.symlink(os.readlink(path), inside)
            continue
        if os.path.isdir(path):
            os.mkdir(inside)
        else:
            os.close(os.open(inside, os.O_CREAT))
        _mount(path, inside, "", _MS_BIND | _MS_REC)
    os.mkdir(root + BOX)
    os.symlink(BOX, root + "/tmp")
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID, 0, 0, 0)
    done = _libc().syscall(
        _MOUNT_SETATTR, -100, root.encode(), _AT_RECURSIVE, ctypes.byref(attributes), 32
    )
    _check(done, "mount_setattr")
    size = f"size={spec['disk_mb']}m,nr_inodes={spec['files'] + 2}"
    owner = f"mode=0700,uid={own},gid={own}"
    _mount("tmpfs", root + BOX, "tmpfs", _MS_NOSUID | _MS_NODEV, f"{size},{owner}")
    os.chroot(root)  # from inside of which no new user namespace can be made
    os.chdir(BOX)


def _become(own: int | None) -> None:
    if own is not None and os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(own, own, own)
        os.setresuid(own, own, own)


def run_program(spec: dict[str, Any], own: int | None, folder: str, report: int) -> NoReturn:
    """In the last process: gives up what is left of its rights and becomes the program."""
    try:
        with open(os.path.join(folder, "main.py"), "wb") as file:
            file.write(spec["code"].encode("utf-8", "surrogatepass"))
        if own is not None and os.geteuid() == 0:
            os.chown(file.name, own, own)
        limit, mb = resource.setrlimit, 1 << 20
        _become(own)
        for name, value in (
            (resource.RLIMIT_AS, spec["memory_mb"] * mb),
            (resource.RLIMIT_FSIZE, spec["disk_mb"] * mb),
            (resource.RLIMIT_NPROC, spec["processes"]),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_CORE, 0),
        ):
            limit(name, (value, value))
        limit(resource.RLIMIT_CPU, (spec["cpu_seconds"], spec["cpu_seconds"] + 1))
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user has undone it
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.set_inheritable(report, False)
        # as -I, which would pass over the fixed hash seed too: the environment is ours anyway
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": folder,
            "TMPDIR": folder,
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",
        }
        command = [spec["python"], "-s", "-S", "-P", "-B", "-c", _RUN]
        os.execve(spec["python"], command, environment)
    except BaseException as error:
        _tell(report, error=f"{type(error).__name__}: {error}")
    os._exit(1)


def _tell(report: int, **fields: Any) -> None:
    for name, value in fields.items():
        os.write(report, f"{name} {value}".replace("\n", " ").encode() + b"\n")


def run_init(spec: dict[str, Any], own: int, report: int) -> NoReturn:
    """The first process of the namespace: waits for the program; all others end with it."""
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        enter_root(spec, own)
        _prctl(4, 0)  # PR_SET_DUMPABLE: nobody looks into it
        program = os.fork()
        if program == 0:
            run_program(spec, own, BOX, report)
        while True:
            ended, status = os.wait()
            if ended == program:
                _tell(report, exit=os.waitstatus_to_exitcode(status))
                os._exit(0)
    except Refused as error:
        _tell(report, refused=str(error))
    except BaseException as error:
        _tell(report, error=f"{type(error).__name__}: {error}")
    os._exit(1)


def descendants(pid: int, most: int = 1 << 20) -> list[int]:
    """Processes under one, as /proc tells, little more than `most`; [] where it does not."""
    found, todo = [], [pid]
    while todo and len(found) <= most:
        above = todo.pop()
        try:
            for task in os.listdir(f"/proc/{above}/task"):
                with open(f"/proc/{above}/task/{task}/children") as file:
                    below = [int(word) for word in file.read().split()]
                found += below
                todo += below
        except OSError:
            continue
    return found


def _resident(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm") as file:
                total += int(file.read().split()[1])
        except OSError:
            continue
    return total * resource.getpagesize()


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except OSError:
            continue


def _kill_all() -> None:
    """Everything below this process, which orphans come to as well; without a namespace."""
    stopped: list[int] = []
    for _ in range(50):  # first they stand still, so that no new ones come while others end
        below = descendants(os.getpid())
        if len(below) <= len(stopped):
            break
        _signal(below, signal.SIGSTOP)
        stopped = below
    for _ in range(1000):
        _signal(descendants(os.getpid()), signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _passed(spec: dict[str, Any], deadline: float) -> str:
    """The limit that is passed, "" for none."""
    if time.monotonic() > deadline:
        return "time"
    # the init is one; where rlimits bind no root, this is what ends a fork bomb
    below = descendants(os.getpid(), spec["processes"] + 1)
    if len(below) > spec["processes"] + 1:
        return "processes"
    return "memory" if _resident(below) > spec["memory_mb"] << 20 else ""


def supervise(spec: dict[str, Any], child: int, report: int, alone: bool) -> None:
    """Waits for the child; ends everything where a limit is passed, or the parent asks for it.

    alone: the child is the program itself, without namespaces; else their init.
    """
    deadline, reason = time.monotonic() + spec["seconds"], ""
    while not reason:
        got = signal.sigtimedwait([signal.SIGCHLD, signal.SIGTERM], _LOOK)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if alone:
                _tell(report, exit=os.waitstatus_to_exitcode(status))
            break
        asked = got is not None and got.si_signo == signal.SIGTERM
        reason = "asked" if asked else _passed(spec, deadline)
    if reason:
        _tell(report, reason=reason)
        os.kill(child, signal.SIGKILL)  # of an init: all in its namespace end with it
    if alone:
        _kill_all()
    elif reason:
        os.waitpid(child, 0)


def main() -> None:
    """The supervisor: reads what to do on its standard input, tells the end on the pipe given."""
    report = int(sys.argv[1])
    spec = marshal.load(sys.stdin.buffer)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != spec["parent"]:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD, signal.SIGTERM])
    data = os.memfd_create("stdin")
    text = memoryview(spec["stdin"].encode("utf-8", "surrogatepass"))
    while text:
        text = text[os.write(data, text) :]
    os.lseek(data, 0, os.SEEK_SET)
    os.dup2(data, 0)
    os.close(data)
    own: int | None
    try:
        own = isolate(spec["allow_network"]) if spec["namespaces"] else None
        refused = "" if own is not None else "namespaces are switched off"
    except Refused as error:
        own, refused = None, str(error)
    if own is None and not spec["allow_network"]:
        _tell(report, refused=refused)
        return
    if own is None:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    isolated = own is not None
    child = os.fork()
    if child == 0:
        os.nice(5)  # what watches it comes first, and so does a trainer
        if own is not None:
            run_init(spec, own, report)
        os.chdir(spec["folder"])
        if os.geteuid() == 0 and _open_to_all(spec["python"]):
            own = _spare_id()
        if own is not None:
            os.chown(spec["folder"], own, own)
        run_program(spec, own, spec["folder"], report)
    supervise(spec, child, report, alone=not isolated)


if __name__ == "__main__":
    main()
