"""--results: a folder that can't be written to is refused ahead of the run; a disk that is full then is told of."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import conftest, report

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
RESULTS = {
    "machine": {"device": "cpu", "processor": "P", "threads": 2, "isa": "avx2", "torch": "2", "commit": "c"},
    "date": "2026-11-30",
    "rooflines": {"copy_gb_per_s": 25.0, "matmul_gflop_per_s": {}},
    "rows": [],
}


@pytest.mark.parametrize("under", ["", "deeper"])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_runs(under, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    code = pytest.main(command.pytest_arguments(["--quick", "--results", str(file / under)]))
    out, said = capsys.readouterr()
    assert code == pytest.ExitCode.USAGE_ERROR and "passed" not in out
    assert f"--results: {file}" in said and len(said.strip().splitlines()) == 1


@pytest.mark.filterwarnings("ignore:Benchmarks are automatically disabled")  # under xdist; nothing is timed here
def test_what_is_checked_alone_needs_no_folder(tmp_path):
    (tmp_path / "file").touch()
    options = ["--quick", "--op", "layer_norm", "--collect-only", "-qq", "--results", str(tmp_path / "file")]
    assert pytest.main(command.pytest_arguments(options)) == 0


def test_the_refusal_says_which_folder_and_why(tmp_path, monkeypatch):
    assert report.refusal_of_folder(tmp_path / "new" / "deeper") is None
    assert list((tmp_path / "new" / "deeper").iterdir()) == []
    (tmp_path / "file").touch()
    assert report.refusal_of_folder(tmp_path / "file") == f"{tmp_path / 'file'} is a file and no folder"

    def refuses(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(report, "TemporaryFile", refuses)  # root may write everywhere
    assert report.refusal_of_folder(tmp_path) == f"{tmp_path} can't be written to: Permission denied"


class Session:
    """Of pytest's session and its config, what the end of a run asks."""

    def __init__(self, folder: Path):
        self.config, self.exitstatus, self.folder, self.stash = self, 0, folder, pytest.Stash()
        self.lines: list[str] = []

    def getoption(self, name: str):
        return {"--results": self.folder, "--device": "cpu", "--peers": ["naive"]}[name]

    def section(self, title: str) -> None:
        self.lines.append(title)

    write_line = section

    def end(self) -> str:
        conftest.pytest_sessionfinish(self, pytest.ExitCode.OK)
        conftest.pytest_terminal_summary(self, self.config)
        return "\n".join(self.lines)


@pytest.fixture
def session(tmp_path, monkeypatch) -> Session:
    monkeypatch.setattr(conftest, "measured", lambda config: RESULTS)
    return Session(tmp_path)


def test_results_that_cannot_be_written_are_told_of_beside_the_table(session, monkeypatch):
    def full(self, text):
        self.touch()  # a part of it fits
        raise FULL

    monkeypatch.setattr(Path, "write_text", full)
    said = session.end()
    assert "copy 25.0 GB/s" in said  # the table
    assert "ERROR: the results can't be written: [Errno 28] No space left on device; the tables above are all" in said
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED
    assert list(session.folder.iterdir()) == []  # no half of a result


def test_pictures_that_cannot_be_written_leave_the_results(session, monkeypatch):
    def full(results, path):
        raise FULL

    monkeypatch.setattr(conftest.plots, "write", full)
    said = session.end()
    assert f"written: {session.folder / 'p_2026-11-30.json'}" in said
    assert "ERROR: the pictures can't be written" in said and session.exitstatus == pytest.ExitCode.TESTS_FAILED


def test_a_run_that_wrote_all_says_where(session, monkeypatch):
    monkeypatch.setattr(conftest.plots, "write", lambda results, path: [])
    assert "ERROR" not in session.end() and session.exitstatus == 0
