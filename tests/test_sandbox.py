"""Programs that mean ill, and what becomes of them (posttrain/sandbox.py, sandbox_child.py)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from posttrain.sandbox import Limits, Ran, SandboxError, run_python
from posttrain.sandbox_child import descendants
from tests.namespaces import needs_namespaces

pytestmark = needs_namespaces

QUICK = Limits(seconds=20.0)


def run(code: str, limits: Limits = QUICK, stdin: str = "") -> Ran:
    before = set(descendants(os.getpid()))  # what other tests left, such as Python's own helpers
    ran = run_python(code, stdin, limits)
    assert not set(descendants(os.getpid())) - before, "nothing of it is left"
    return ran


def test_what_it_prints_and_how_it_ends():
    ran = run("import sys\nprint(input()[::-1])\nprint('oops', file=sys.stderr)", stdin="héllo\n")
    assert (ran.stdout, ran.stderr, ran.exit, ran.reason, ran.ok) == (
        *("olléh\n", "oops\n", 0, ""),
        True,
    )
    ran = run("x = 1\nraise ValueError(f'wrong {x}')")
    assert (ran.exit, ran.ok) == (1, False)
    assert 'File "main.py", line 2' in ran.stderr
    assert "ValueError: wrong 1" in ran.stderr
    assert run("exit(3)").exit == 3
    assert run("import os; os.kill(os.getpid(), 9)").exit == -9
    assert run("sys.exit()").exit == 1, "names of the runner are none of the program's"
    assert run("print({'a', 'b', 'c'})").stdout == run("print({'a', 'b', 'c'})").stdout


def test_endless_loops():
    assert run("while True: pass", Limits(seconds=0.3)).reason == "time"
    stubborn = "import signal, time\n" + "\n".join(
        f"signal.signal({n}, signal.SIG_IGN)" for n in (1, 2, 15, 24)
    )
    assert run(stubborn + "\ntime.sleep(60)", Limits(seconds=0.5)).reason == "time"
    ran = run("while True: pass", Limits(seconds=30, cpu_seconds=1))
    assert (ran.reason, ran.exit) == ("time", None)
    assert ran.seconds < 20


def test_a_fork_bomb():
    ran = run(
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", Limits(seconds=0.5)
    )
    assert ran.reason == "time"
    ran = run(
        "import os, time\nn = 0\ntry:\n  while n < 100:\n    if os.fork() == 0: time.sleep(9)\n"
        "    n += 1\nexcept OSError as e: print(n, e)",
        Limits(processes=8),
    )
    assert ran.stdout == "7 [Errno 11] Resource temporarily unavailable\n"
    ran = run(
        "import threading, time\nn = 0\ntry:\n  while n < 99:\n"
        "    threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); n += 1\n"
        "except RuntimeError as e: print(n, e)",
        Limits(processes=8),
    )
    assert ran.stdout == "7 can't start new thread\n"


def test_a_process_that_steps_aside_ends_too():
    ran = run(
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(60)\n"
        "  os._exit(0)\nprint('off')"
    )
    assert ran.ok, "the pipe that it holds does not keep us"


def test_filling_the_disk():
    ran = run(
        "try:\n  with open('big', 'wb') as f:\n    while True: f.write(bytes(1 << 20))\n"
        "except OSError as e: print(e)\nimport os; print(os.path.getsize('big') >> 20)",
        Limits(disk_mb=4),
    )
    assert ran.stdout.splitlines()[-1] in ("3", "4")
    ran = run(
        "n = 0\ntry:\n  while n < 99:\n"
        "    with open(str(n), 'wb') as f: f.write(bytes(1 << 20))\n    n += 1\n"
        "except OSError as e: print(n, e)",
        Limits(disk_mb=4),
    )
    assert ran.stdout == "3 [Errno 28] No space left on device\n", "the program's own text is there"
    ran = run(
        "n = 0\ntry:\n  while n < 99: open(str(n), 'w').close(); n += 1\n"
        "except OSError as e: print(n)",
        Limits(files=10),
    )
    assert ran.stdout == "10\n"
    for path in ("/usr/x", "/x", "/dev/shm/x", "/dev/x", f"{sys.base_prefix}/x"):
        ran = run(f"open({path!r}, 'w')")
        assert "Error: [Errno" in ran.stderr, path


def test_memory_bombs():
    ran = run("x = bytearray(1 << 30)", Limits(memory_mb=128))
    assert "MemoryError" in ran.stderr
    ran = run(
        "import os, time\nfor _ in range(3): os.fork()\nx = b'x' * (40 << 20)\ntime.sleep(9)",
        Limits(memory_mb=128, seconds=8),
    )
    assert ran.reason == "memory"


def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1).send(b'x')"
        ran = run(code)
        assert "Error" in ran.stderr
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()
        assert "Network is unreachable" in run(code.replace("127.0.0.1", "192.0.2.1")).stderr
        assert run_python(code, limits=QUICK, allow_network=True).ok, "and there is, where allowed"


def test_the_parent_is_out_of_sight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    ran = run("import os; print(dict(os.environ), os.listdir('/'), os.getppid())")
    assert "hunter2" not in ran.stdout
    assert "proc" not in ran.stdout
    assert ran.stdout.endswith(" 1\n"), "its parent is the init of its own namespace"
    for path in (secret, f"/proc/{os.getpid()}/environ", "/etc/passwd", __file__):
        assert "FileNotFoundError" in run(f"open({str(path)!r})").stderr
    assert run("import os; print(os.getuid(), os.geteuid())").stdout.split()[0] != "0"


def test_killing_the_parent():
    assert "PermissionError" in run("import os\nos.kill(os.getppid(), 9)").stderr
    ran = run(f"import os\nos.kill({os.getpid()}, 9)")
    assert "ProcessLookupError" in ran.stderr
    ran = run("import os\nos.kill(-1, 9)\nprint('here')")
    assert "Error" in ran.stderr or ran.stdout == "here\n"


def test_it_ends_with_its_parent():
    """Of a killed run nothing is left behind that computes."""
    for more in ("", ", allow_network=True, namespaces=False"):
        script = (
            "from posttrain.sandbox import run_python, Limits\n"
            f"run_python('while True: pass', limits=Limits(seconds=60, cpu_seconds=60){more})"
        )
        with subprocess.Popen([sys.executable, "-c", script]) as parent:
            below: list[psutil.Process] = []
            while len(below) < (2 if more else 3):
                time.sleep(0.05)
                below = psutil.Process(parent.pid).children(recursive=True)
            parent.kill()
        _, alive = psutil.wait_procs(below, timeout=20)
        assert not alive


def test_printing_for_ever():
    ran = run("while True: print('x' * 1000)", Limits(output_kb=16))
    assert (ran.reason, len(ran.stdout)) == ("output", 16 << 10)


def test_namespaces_within():
    """No way back to rights: no user namespace of its own, no mounts, no tracing of its init."""
    ran = run(
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
        "print(c.unshare(0x10000000), c.unshare(0x20000), c.chroot(b'/box'),"
        " c.mount(b'none', b'/box', b'tmpfs', 0, b''), c.ptrace(16, 1, 0, 0), c.setuid(0))"
    )
    assert ran.stdout == "-1 -1 -1 -1 -1 -1\n"


def test_many_at_once():
    with ThreadPoolExecutor(8) as pool:
        codes = [f"print({n} * 2)" for n in range(24)]
        assert [r.stdout for r in pool.map(run_python, codes)] == [f"{2 * n}\n" for n in range(24)]


def test_where_nothing_can_be_isolated_nothing_is_run():
    with pytest.raises(SandboxError, match="allow_network=true lets it run"):
        run_python("print(1)", namespaces=False)


def test_the_weak_form_has_limits_too():
    def weak(code: str, **limits: float) -> Ran:
        return run_python(code, limits=Limits(**limits), allow_network=True, namespaces=False)

    assert weak("import os; print(os.environ.get('PATH'))").stdout == "/usr/bin:/bin\n"
    assert weak("while True: pass", seconds=0.5).reason == "time"
    ran = weak(
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n"
        "    print(os.getpid(), flush=True); time.sleep(60)\n  os._exit(0)\ntime.sleep(0.3)"
    )
    assert not psutil.pid_exists(int(ran.stdout)), "it stepped aside, and ended all the same"
    assert "MemoryError" in weak("x = bytearray(1 << 30)", memory_mb=128).stderr


@pytest.mark.skipif(not shutil.which("unshare"), reason="util-linux is not there")
def test_a_user_without_rights_isolates_by_a_user_namespace():
    """As a user who is nobody but himself: his files are out of reach, and so is the network."""
    code = "import os; print(os.getuid(), os.listdir('/'))\nopen('/usr/x', 'w')"
    script = (
        "from posttrain.sandbox import run_python, Limits\n"
        f"ran = run_python({code!r})\nprint(ran.stdout, ran.stderr)\n"
        "forks = 'import os, time\\nfor _ in range(40):\\n  if not os.fork(): time.sleep(9)'\n"
        "print(run_python(forks, limits=Limits(seconds=2)))\n"
        "print(run_python('import socket; socket.create_connection((\"192.0.2.1\", 9))').stderr)\n"
    )
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1000 ['")
    assert "'home'" not in done.stdout.splitlines()[0]
    assert "Read-only file system" in done.stdout or "Permission denied" in done.stdout
    # rlimits bind no user that is root outside, but being watched does
    assert "BlockingIOError" in done.stdout or "reason='processes'" in done.stdout
    assert "Network is unreachable" in done.stdout
