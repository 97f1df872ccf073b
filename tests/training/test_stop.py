import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tinyllm.training import stop
from tinyllm.training.stop import Watch, watch


def test_a_signal_is_noted_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with watch() as watching:
        assert not watching.should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert watching.should_stop()
        assert (watching.code, watching.reason) == (143, "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_signal_leaves_at_once():
    child = os.fork()
    if child == 0:
        with watch():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def test_the_death_of_the_starter_is_noticed_even_before_it_is_reaped(monkeypatch):
    monkeypatch.setattr(stop, "CHECK_INTERVAL_S", 0.0)
    starter = subprocess.Popen(["sleep", "60"])
    watching = Watch({"dvc": psutil.Process(starter.pid)})
    assert not watching.should_stop()
    starter.kill()
    deadline = time.monotonic() + 60
    while not watching.should_stop() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (watching.code, watching.reason) == (143, "dvc is gone")
    starter.wait()


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_dvc_is_found_behind_a_shell_and_missed_when_killed(tmp_path, shell):
    """A program called dvc starts a shell that starts us; only dvc is killed."""
    (tmp_path / "dvc").write_text(
        "import subprocess, sys\nsubprocess.run([sys.argv[1], '-c', sys.argv[2] + '; true'])\n"
    )
    (tmp_path / "stage.py").write_text(
        "import sys, time\n"
        "from tinyllm.training.stop import watch\n"
        "with watch() as watching:\n"
        "    print('up', flush=True)\n"
        "    end = time.monotonic() + 60\n"
        "    while not watching.should_stop() and time.monotonic() < end: time.sleep(0.05)\n"
        "    print(watching.code, watching.reason, flush=True)\n"
    )
    command = f"exec 3>&1; {sys.executable} {tmp_path / 'stage.py'}"
    dvc = subprocess.Popen(
        [sys.executable, str(tmp_path / "dvc"), shell, command],
        env={**os.environ, "DVC_STAGE": "x"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert dvc.stdout.readline() == "up\n"
    dvc.kill()
    assert dvc.stdout.readline() == "143 dvc is gone\n"
    dvc.wait()


def test_without_dvc_nobody_is_watched(monkeypatch):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    with watch() as watching:
        assert not watching._starters
