"""How a benchmark's command ends."""

from __future__ import annotations

import pytest

from benchmarks.command import exit_code
from whisper_steer.errors import ModelError, UsageError


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_code_of_the_work(result: int | None, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: result) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("no such set"), 2, "error: no such set\n"),
        (ModelError("not there"), 1, "error: not there\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_errors_are_one_line(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise error

    assert exit_code(work) == code
    assert capsys.readouterr() == ("", said)


def test_other_errors_go_through() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0)
