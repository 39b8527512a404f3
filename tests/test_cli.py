"""cli.py: the command line as a shell sees it (few subprocesses), and its codes (in-process)."""

from __future__ import annotations

import resource
import subprocess
import sys
import types

import pytest

from posttrain import cli
from posttrain.config import Config, ConfigError, load, runtime, semantic

HEAVY = ("jax", "flax", "orbax", "grain", "torch", "transformers", "pyarrow", "tensorstore")


class ToyConfig(Config):
    job: str = semantic("toy", help="the job")
    steps: int = semantic(3, help="how many steps", gt=0)
    where: str = runtime("here", help="a folder")


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A job named toy; a test puts `run`, ACTIONS or ACCEPTS on it."""
    module = types.ModuleType("toy_job", "What the toy does.")
    module.__dict__.update(Config=ToyConfig, run=lambda config: None)
    monkeypatch.setitem(sys.modules, "toy_job", module)
    monkeypatch.setitem(cli.JOBS, "toy", ("toy_job", "a toy"))
    return module


@pytest.fixture
def yaml(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text("job: toy\nsteps: 5\n")
    return str(path)


def posttrain(*arguments: str, code: str = "") -> tuple[subprocess.CompletedProcess[str], float]:
    """The finished process, and the seconds it computed.

    Not those on the clock: what else the machine does must not decide. Start-up waits for nothing.
    """
    program = ["-c", code] if code else ["-m", "posttrain.cli"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *program, *arguments], capture_output=True, text=True, timeout=120
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def imported_by(*arguments: str) -> tuple[set[str], float, str]:
    """Which of HEAVY a command line imports, how long it takes, and what it prints."""
    code = (
        "import sys\nfrom posttrain.cli import main\ncode = main(sys.argv[1:])\n"
        f"print(*[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\nsys.exit(code)"
    )
    done, seconds = posttrain(*arguments, code=code)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split()), seconds, done.stdout


def fastest(*arguments: str) -> float:
    """Seconds of the quickest of three runs: other work on the machine only ever adds."""
    return min(posttrain(*arguments)[1] for _ in range(3))


def test_help_is_quick_and_imports_nothing_heavy():
    heavy, _, text = imported_by("--help")
    assert not heavy
    assert all(name in text for name in cli.JOBS)
    assert "75" in text
    assert fastest("--help") < 0.5


@pytest.mark.parametrize("name", list(cli.JOBS))
def test_a_jobs_help_lists_its_config_without_the_training_libraries(name):
    heavy, seconds, text = imported_by(name, "--help")
    assert not heavy - {"jax"}
    assert "config keys" in text
    assert "(no help)" not in text
    if seconds >= 2:  # a busy machine: the quickest of three decides
        assert fastest(name, "--help") < 2


def test_a_wrong_config_exits_2_without_a_traceback(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("job: sft\nbatsh: {rows: 3}\nseed: soon\n")
    done, _ = posttrain("sft", str(path), "optim.lrr=1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for said in (f"({path}:2)", "did you mean 'batch'?", f"({path}:3)", "'soon'", "optim.lrr"):
        assert said in done.stderr
    assert done.stdout == ""


def test_output_may_be_cut_short():
    program = f"{sys.executable} -m posttrain.cli sft --help | head -n 1"
    done = subprocess.run(program, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("usage: posttrain sft")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stf"], "did you mean sft?"),
        (["sft", "--shwo"], "did you mean --show?"),
        (["toy", "config.json"], "'config.json' is neither"),
        (["toy", "none.yaml"], "no such file"),
        (["toy", "steps=0"], "greater than 0"),
        ([], "usage: posttrain"),
    ],
)
def test_a_wrong_command_line_exits_2(job, capsys, arguments, said):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_actions_are_required_and_passed_on(job, yaml, capsys):
    seen = []
    job.ACTIONS = {"check": "look", "prepare": "do"}
    job.run = lambda config, action: seen.append((config.steps, action))
    assert cli.main(["toy", yaml]) == 2
    assert "needs an action: check, prepare" in capsys.readouterr().err
    assert cli.main(["toy", "chek", yaml]) == 2
    assert "did you mean check?" in capsys.readouterr().err
    assert cli.main(["toy", "check", yaml, "steps=7"]) == 0
    assert seen == [(7, "check")]
    assert cli.main(["toy", "--help"]) == 0
    assert "toy {check|prepare}" in capsys.readouterr().out


def test_show_prints_what_load_reads_back_and_runs_nothing(job, yaml, tmp_path, capsys):
    job.run = lambda config: pytest.fail("--show must not run")
    assert cli.main(["toy", yaml, "where=/x", "--show"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert load(ToyConfig, [shown]) == ToyConfig(steps=5, where="/x")


def test_a_job_takes_the_configs_it_accepts(job, tmp_path, capsys):
    path = tmp_path / "other.yaml"
    path.write_text("job: sft\nsteps: 4\nbatch: {rows: 2}\n")
    assert cli.main(["toy", str(path)]) == 2
    assert "posttrain sft" in capsys.readouterr().err
    seen = []
    job.ACCEPTS = {"sft": {}}
    job.run = seen.append
    assert cli.main(["toy", str(path)]) == 0
    assert seen == [ToyConfig(steps=4)]


def raising(error: BaseException):
    def run(config):
        raise error

    return run


def test_exit_codes_tell_what_went_wrong(job, yaml, capsys):
    job.run = lambda config: 75
    assert cli.main(["toy", yaml]) == 75
    job.run = raising(ValueError("row 3 has no answer"))
    assert cli.main(["toy", yaml]) == 1
    captured = capsys.readouterr()
    assert "row 3 has no answer" in captured.err
    assert "Traceback" not in captured.err
    assert cli.main(["toy", yaml, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    job.run = raising(ConfigError("another run lies there"))
    assert cli.main(["toy", yaml]) == 2
    for error in (OSError(28, "No space left on device", "/runs/a"), FloatingPointError("nan")):
        job.run = raising(error)
        assert cli.main(["toy", yaml]) == 1
        captured = capsys.readouterr()
        assert str(error) in captured.err
        assert ("checks=[disk]" in captured.err) == isinstance(error, OSError)
        assert "Traceback" not in captured.err
    job.run = raising(KeyboardInterrupt())
    assert cli.main(["toy", yaml]) == 130
    job.run = raising(RuntimeError("ours"))
    with pytest.raises(RuntimeError):
        cli.main(["toy", yaml])


def test_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip()[0].isdigit()


def test_packages_that_do_not_fit_are_told_in_a_line(tmp_path, monkeypatch):
    """`posttrain doctor` too, which is asked just then, cannot load without jax."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").write_text("raise RuntimeError('jaxlib 0.1 is too old')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    done, _ = posttrain("doctor")
    assert done.returncode == cli.DATA_ERROR
    first = done.stderr.splitlines()[0]
    assert "posttrain doctor cannot be loaded: RuntimeError: jaxlib 0.1 is too old" in first
    assert "pip install -e . -c constraints.txt" in first
    assert "Traceback" not in done.stderr
