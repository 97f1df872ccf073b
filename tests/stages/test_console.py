from stages import console
from stages.console import ConsoleProgress


def test_lines_tell_the_time_left_once_it_can_be_known(capsys, monkeypatch):
    clock = iter([100.0, 120.0, 160.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    progress = ConsoleProgress()
    progress.step("sft", 30, 100, loss=2.0)  # a resumed run: 30 steps are not of this process
    progress.step("sft", 50, 100, loss=1.5)
    progress.step("sft", 100, 100, loss=1.0)
    assert capsys.readouterr().err.splitlines() == [
        "sft 30/100  loss 2",
        "sft 50/100  loss 1.5  50 s left",
        "sft 100/100  loss 1",
    ]
