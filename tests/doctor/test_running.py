"""A script ends, talks and looks around itself under the doctor as it does alone."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doctor.table import environment

TRAINING = """
import os, signal, sys, torch
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
opt = torch.optim.SGD(net.parameters(), lr=0.1)

def steps(n):
    for _ in range(n):
        opt.zero_grad()
        net(torch.randn(8, 6)).square().mean().backward()
        opt.step()

steps(30)
print(repr(net[0].weight.sum().item()), flush=True)
"""

AROUND = """
import os, pickle, sys
class Own:
    pass
print(__name__, __file__, __package__, __spec__ and __spec__.name, sys.argv, sys.path[:1])
print(os.getcwd(), sys.modules["__main__"].Own is Own, pickle.dumps(Own()))
print(sorted(set(globals())), "torch" in sys.modules, sys.orig_argv[1:])
"""


def python(*command: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**environment(), **more},
        capture_output=True,
        text=True,
        timeout=300,
        # A shell's background jobs ignore Ctrl-C, and so would theirs.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def compared(
    folder: Path, *command: str
) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
    """Alone and under the doctor: same exit code and output, and the same errors at first."""
    own = python(*command, folder=folder)
    seen = python("-m", "densitylr", *command, folder=folder)
    assert seen.returncode == own.returncode
    assert seen.stdout == own.stdout
    assert seen.stderr.startswith(own.stderr)
    return own, seen


@pytest.mark.parametrize("module", [False, True])
def test_what_a_script_sees_around_itself(tmp_path: Path, module: bool) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "around.py").write_text(AROUND)
    target = ["-m", "inner.around"] if module else ["inner/around.py"]
    own, seen = compared(tmp_path, *target, "--lr", "1", "--live", "-m")
    assert own.stdout
    assert "never imported torch" in seen.stderr


@pytest.mark.parametrize(
    "ending",
    [
        "raise SystemExit",
        "raise SystemExit(3)",
        "raise SystemExit('a reason')",
        "raise KeyboardInterrupt",
        "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
        "import os; os._exit(5)",
        "def f():\n    1 / 0\ntry:\n    f()\nexcept ZeroDivisionError:\n    raise ValueError('x')",
        "import sys; sys.excepthook = lambda *e: print('mine', e[0], file=sys.stderr); 1 / 0",
        "import atexit; atexit.register(print, 'at the end')",
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), print('late'))).start()",
        "x = (",
    ],
)
def test_how_a_script_ends(tmp_path: Path, ending: str) -> None:
    (tmp_path / "script.py").write_text("print('begins')\n" + ending + "\n")
    compared(tmp_path, "script.py")


@pytest.mark.parametrize(
    "command", [["nothing.py"], ["folder"], ["-m", "nothing"], ["-m", "folder"], ["full"]]
)
def test_what_cannot_be_run_is_refused_as_by_python(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "__main__.py").write_text("import sys; print(sys.argv, sys.path[0])")
    own, seen = compared(tmp_path, *command)
    runs = command == ["full"]
    assert (own.returncode == 0) == runs
    assert runs or seen.stderr == own.stderr


@pytest.mark.parametrize(
    ("options", "because"),
    [
        (["--output", "script.py/folder"], "script.py is no folder to write to"),
        (["--compare", "--live"], "--compare compares two that have ended"),
    ],
)
def test_options_that_cannot_be_kept_are_refused_before_the_run(
    tmp_path: Path, options: list[str], because: str
) -> None:
    (tmp_path / "script.py").write_text("open('began', 'w')")
    seen = python("-m", "densitylr", *options, "script.py", folder=tmp_path)
    assert seen.returncode == 2
    assert because in seen.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["script.py"]


@pytest.mark.parametrize("ending", ["raise ValueError('in the middle')", "INTERRUPT"])
def test_a_run_that_breaks_off_is_diagnosed(tmp_path: Path, ending: str) -> None:
    code = "os.kill(os.getpid(), signal.SIGINT)" if ending == "INTERRUPT" else ending
    (tmp_path / "script.py").write_text(TRAINING + code + "\n")
    own, seen = compared(tmp_path, "script.py")
    assert own.returncode
    said = seen.stderr.removeprefix(own.stderr)
    assert ("interrupted" if ending == "INTERRUPT" else "failed with ValueError") in said
    assert re.search(r"net \(Sequential\), 30 steps of SGD: ", said)
    assert (tmp_path / "densitylr-doctor" / "script-1" / "index.html").exists()


def test_a_script_that_trains_nothing_leaves_a_sentence_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import torch\nprint(torch.nn.Linear(2, 2).in_features)\n")
    _, seen = compared(tmp_path, "script.py")
    assert "no diagnosis, as it made no torch optimizer in this process" in seen.stderr
    assert not (tmp_path / "densitylr-doctor").exists()


def test_children_are_not_run_under_the_doctor(tmp_path: Path) -> None:
    child = (
        "import multiprocessing, os, sys\n"
        "def work(_):\n"
        "    print('child', __name__, 'densitylr' in sys.modules)\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    process = context.Process(target=work, args=(1,))\n"
        "    process.start(); process.join()\n"
        "    print('parent', process.exitcode, flush=True)\n"
        "    if not os.fork():\n"
        "        raise SystemExit(0)\n"
        "    os.wait()\n"
    )
    (tmp_path / "script.py").write_text(child)
    own, seen = compared(tmp_path, "script.py")
    assert "child __mp_main__ False" in own.stdout
    assert seen.stderr.count("densitylr:") == 1


def test_threads_that_a_script_asks_for_before_torch_are_given_to_it(tmp_path: Path) -> None:
    code = "import os\nos.environ['OMP_NUM_THREADS'] = '2'\nimport torch\n"
    (tmp_path / "script.py").write_text(code + "print(torch.get_num_threads())\n")
    _, seen = compared(tmp_path, "script.py")
    assert seen.stdout == "2\n"


def test_a_second_rank_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("print('rank')\n")
    seen = python("-m", "densitylr", "script.py", folder=tmp_path, RANK="1")
    assert (seen.stdout, seen.stderr) == ("rank\n", "")


def test_a_live_table_needs_a_terminal_and_leaves_the_output_alone(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    pty = pytest.importorskip("pty")
    (tmp_path / "script.py").write_text(TRAINING)
    own, seen = compared(tmp_path, "script.py")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "densitylr", "--live", "script.py"],
        cwd=tmp_path,
        env={**environment(), "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    ) as live:
        os.close(theirs)
        drawn = b""
        with contextlib.suppress(OSError):  # which is how a terminal says that nobody is left
            while part := os.read(ours, 4096):
                drawn += part
        assert live.stdout is not None
        assert live.stdout.read() == own.stdout
    os.close(ours)
    assert b"density" in drawn.split(b"densitylr: python")[0]
    assert "model" not in seen.stderr.split("densitylr: python")[0]


def test_help_has_examples() -> None:
    seen = python("-m", "densitylr", "--help", folder=Path.cwd())
    assert seen.returncode == 0
    assert "python -m densitylr train.py" in seen.stdout
    assert "--record" not in seen.stdout


FASTAI = """
import torch
from fastai.optimizer import Adam, SGD, Lookahead
from densitylr.integrations.fastai import DensityOptimizer

def train(net, opt, steps):
    for _ in range(steps):
        net(torch.randn(8, 6)).square().mean().backward()
        opt.step()
        opt.zero_grad()

def net():
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))

first, second, third, fourth = net(), net(), net(), net()
train(first, torch.optim.SGD(first.parameters(), lr=0.1), 4)
train(second, Adam(second.parameters(), lr=0.01), 5)
train(third, Lookahead(SGD(third.parameters(), lr=0.01)), 2)
train(fourth, DensityOptimizer(SGD(fourth.parameters(), lr=0.01), fourth), 3)
"""


def test_steps_of_fastais_own_optimizers_are_said_to_be_unwatched(tmp_path: Path) -> None:
    pytest.importorskip("fastai")
    (tmp_path / "train.py").write_text(FASTAI)
    done = python("-m", "densitylr", "train.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "2 models trained" in said  # by the torch optimizer and the DensityOptimizer
    assert "what 7 steps of fastai's own optimizers trained" in said
    assert "DensityCallback(observe_only=True)" in said
