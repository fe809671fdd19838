"""The translate command as its users run it: pipes, terminals, Ctrl-C, broken text, every option."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest
import torch

from fused_transformer import cli_translate
from fused_transformer.checkpoint import save_checkpoint
from fused_transformer.translation import Translator
from tests.transformer.texts import parallel_lines
from tests.transformer.untrained import untrained

pytestmark = pytest.mark.usefixtures("one_thread")

LINES = parallel_lines(40, seed=3)[0]
TEXT = "".join(line + "\n" for line in LINES).encode()
SHORT = ["--max-length", "8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The path of a model that has learned nothing, but translates all the same."""
    translator = untrained()
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_checkpoint(path, translator.model, translator.tokenizer)
    return str(path)


def command(model, *arguments):
    return [sys.executable, "-m", "fused_transformer", "translate", "--model", model, "--threads", "1", *arguments]


def run(model, text, *arguments):
    done = subprocess.run(command(model, *SHORT, *arguments), input=text, capture_output=True, check=False, timeout=120)
    return done.returncode, done.stdout, done.stderr.decode()


def rows_of(text):
    return text.split("\n")[:-1]  # str.splitlines also splits at U+001E and others, which a translation may hold


def in_process(model, tmp_path, text, *arguments):
    """Standard error is not looked at; what was written is returned."""
    (tmp_path / "in").write_bytes(text)
    files = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    status = cli_translate.main(["--model", model, "--threads", "1", *SHORT, *files, *arguments])
    return status, (tmp_path / "out").read_text(encoding="utf-8")


def test_a_pipe_gets_a_line_for_a_line_and_nothing_else(model):
    status, out, err = run(model, TEXT + b"\n \nun chat", "--beam-size", "2")
    assert (status, err) == (0, "")
    lines = out.split(b"\n")
    assert len(lines) == 44 and lines[40:42] == [b"", b""] and lines[42] and not lines[43]


@pytest.mark.slow
def test_what_came_before_broken_text_is_translated(model):
    whole = run(model, TEXT)[1]
    status, out, err = run(model, TEXT + b"\xff\xfe\nun\n")
    assert status == 1 and out == whole and whole.count(b"\n") == 40
    assert err == "translate: standard input: line 41 is not valid UTF-8 (invalid start byte at byte 0)\n"
    status, out, err = run(model, TEXT + b"un \xff\xfe\nun\n", "--errors", "replace")
    assert (status, err) == (0, "") and out.startswith(whole) and out.count(b"\n") == 42


def test_an_empty_file_gives_an_empty_file(model, tmp_path):
    assert in_process(model, tmp_path, b"") == (0, "")
    assert run(model, b"") == (0, b"", "")


def test_the_input_is_not_written_over(model, tmp_path, capsys):
    (tmp_path / "out").write_text("un chat\n")
    assert cli_translate.main(["--model", model, "--input", str(tmp_path / "out"), "--output", f"{tmp_path}/out"]) == 1
    assert "which is to be read" in capsys.readouterr().err and (tmp_path / "out").read_text() == "un chat\n"


@pytest.mark.parametrize(
    ("shell", "says"),
    [
        ("--output {file} < {file}", "--output is {file}, which is read as standard input"),
        ("<&-", "standard input is closed: give a file with --input"),
        ("< {file} >&-", "standard output is closed: give a file with --output"),
    ],
)
def test_what_cannot_be_read_or_written_is_said(model, tmp_path, shell, says):
    file = tmp_path / "both"
    file.write_bytes(b"un chat\n")
    line = " ".join([*command(model), shell.format(file=file)])
    done = subprocess.run(line, shell=True, capture_output=True, check=False, timeout=120, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr.decode()) == (1, f"translate: {says.format(file=file)}\n")
    assert file.read_bytes() == b"un chat\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "cuda:99"], "there is no device 'cuda:99'"),
        (["--device", "abacus"], "there is no device 'abacus'"),
        (["--batch-tokens", "0"], "--batch-tokens must be positive, got 0"),
    ],
)
def test_options_out_of_range_are_named(model, tmp_path, capsys, arguments, says):
    (tmp_path / "in").write_bytes(b"un chat\n")
    files = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert cli_translate.main(["--model", model, *files, *arguments]) == 1
    assert capsys.readouterr().err.startswith(f"translate: {says}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("of the GPU"), RuntimeError("[enforce fail] can't allocate memory")]
)
def test_too_little_memory_is_said(model, tmp_path, capsys, monkeypatch, error):
    def fail(*_arguments, **_options):
        raise error

    monkeypatch.setattr(Translator, "translate", fail)
    status, _ = in_process(model, tmp_path, b"un chat\n")
    assert status == 1
    assert capsys.readouterr().err == "translate: not enough memory: try a smaller --batch-tokens or --beam-size\n"
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        in_process(model, tmp_path, b"un chat\n")


def test_a_line_typed_gives_a_line_at_once(model):
    """The answer to a line comes though the input stays open; with --interactive for a pipe, as for a terminal."""
    for interactive in (True, False):
        if interactive:
            process = subprocess.Popen(
                command(model, *SHORT, "--interactive"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            keyboard = process.stdin.fileno()
        else:
            keyboard, terminal = pty.openpty()
            process = subprocess.Popen(command(model, *SHORT), stdin=terminal, stdout=subprocess.PIPE)
            os.close(terminal)
        alarm = threading.Timer(120, process.kill)
        alarm.start()
        answers = []
        for line in (b"un chat\n", b"\n", b"deux chats\n"):
            os.write(keyboard, line)
            answers.append(process.stdout.readline())
        assert answers[0].strip() and answers[1] == b"\n" and answers[2].strip()
        if interactive:
            process.stdin.close()
        else:
            os.write(keyboard, b"\x04")  # Ctrl-D
        assert process.wait(120) == 0 and process.stdout.read() == b""
        alarm.cancel()
        process.stdout.close()
        if not interactive:
            os.close(keyboard)


@pytest.fixture
def heeding_ctrl_c():
    """What a shell starts in the background is deaf to Ctrl-C, and so are its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("heeding_ctrl_c")
@pytest.mark.parametrize("to_file", [False, True], ids=["pipe", "file"])
def test_ctrl_c_leaves_complete_lines_only(model, tmp_path, to_file):
    """Interrupted in the middle, whoever reads: the lines that are there are whole, and the right ones."""
    expected = run(model, TEXT * 5)[1].splitlines(keepends=True)
    (tmp_path / "in").write_bytes(TEXT * 2000)
    arguments = [*SHORT, "--input", str(tmp_path / "in"), "--chunk", "40"]
    arguments += ["--output", str(tmp_path / "out")] if to_file else []
    # Without a buffer, of which communicate() would not know.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen(command(model, *arguments), **pipes) as process:
        if to_file:
            while not (tmp_path / "out").exists() or not (tmp_path / "out").stat().st_size:
                time.sleep(0.02)
                assert process.poll() is None
            first = b""
        else:
            first = process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=120)
    out = (tmp_path / "out").read_bytes() if to_file else first + rest
    assert process.returncode == 130 and err.decode().endswith("translate: interrupted\n")
    assert "Traceback" not in err.decode()
    lines = out.splitlines(keepends=True)
    assert out.endswith(b"\n") and 1 <= len(lines) < 80_000
    assert all(line == expected[i % 40] for i, line in enumerate(lines))


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_ctrl_c_while_writing_takes_effect_behind_the_line(monkeypatch):
    """The reader has stopped: the first Ctrl-C waits for it, the second does not."""

    class Stalled:
        def __init__(self, interrupts):
            self.interrupts, self.written = interrupts, []

        def write(self, data):
            for _ in range(self.interrupts):
                signal.raise_signal(signal.SIGINT)
            self.written.append(data)

        def flush(self):
            pass

    once, twice = Stalled(1), Stalled(2)
    with pytest.raises(KeyboardInterrupt), cli_translate._WholeLines(once) as writer:
        writer.write("whole\n")
    assert once.written == [b"whole\n"]
    with pytest.raises(KeyboardInterrupt), cli_translate._WholeLines(twice) as writer:
        writer.write("cut\n")
    assert twice.written == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_reader_who_has_enough_is_no_error(model):
    with subprocess.Popen(
        command(model, *SHORT, "--chunk", "1"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdin.write(TEXT)
        process.stdin.close()
        assert process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(120) == 0
    assert err == b""


def test_progress_is_shown_on_a_terminal_alone(model, tmp_path):
    (tmp_path / "in").write_bytes(TEXT)
    watched, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    arguments = [*SHORT, "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command(model, *arguments), stderr=terminal, stdout=subprocess.PIPE)
    os.close(terminal)
    shown = b""
    with pytest.raises(OSError, match="Input/output"):  # a pseudo-terminal that nobody writes to any more
        while True:
            shown += os.read(watched, 65536)
    assert process.wait(120) == 0 and process.stdout.read() == b""
    process.stdout.close()
    os.close(watched)
    assert b"40line" in shown.replace(b" ", b"")


def test_options_reach_the_search(model, tmp_path):
    translator = Translator.load(model)
    text = "".join(line + "\n" for line in LINES[:6]).encode()

    def translated(*arguments, **options):
        status, out = in_process(model, tmp_path, text, *arguments)
        found = translator.translate(LINES[:6], max_length=8, **options)
        assert status == 0 and rows_of(out) == [beams[0].text for beams in found]
        return out

    plain = translated()
    assert plain != translated("--beam-size", "1", beam_size=1)
    assert plain != translated("--alpha", "3", "--penalty", "power", length_penalty=3.0, penalty="power")
    assert plain != translated("--patience", "0.3", patience=0.3)
    assert plain != translated("--min-length", "6", min_length=6)
    assert plain != translated("--no-repeat-ngram-size", "1", "--min-length", "6", no_repeat_ngram_size=1, min_length=6)
    drawing = ["--samples", "1", "--temperature", "1.5", "--top-k", "9", "--top-p", "0.9", "--seed", "4"]
    drawn = {"num_samples": 1, "temperature": 1.5, "top_k": 9, "top_p": 0.9, "seed": 4}
    assert plain != translated(*drawing, "--format", "text", **drawn)
    assert plain == translated("--batch-tokens", "30", "--length-penalty", "0.6", max_tokens=30)


def test_prefixes_come_from_a_file(model, tmp_path):
    (tmp_path / "prefixes").write_text("one dog\n\nred\n", encoding="utf-8")
    arguments = ["--prefixes", str(tmp_path / "prefixes")]
    status, out = in_process(model, tmp_path, b"un chien\n\nrouge\n", *arguments)
    first, second, third = rows_of(out)
    assert status == 0 and first.startswith("one dog") and second == "" and third.startswith("red")


def test_a_line_without_its_prefix_ends_the_translation(model, tmp_path, capsys):
    (tmp_path / "prefixes").write_text("one\n", encoding="utf-8")
    status, out = in_process(model, tmp_path, b"un\ndeux\n", "--prefixes", str(tmp_path / "prefixes"))
    assert status == 1 and out.count("\n") == 1
    assert "there must be a prefix for each line, but there are only 1" in capsys.readouterr().err
    status, out = in_process(model, tmp_path, b"", "--prefixes", str(tmp_path / "prefixes"))
    assert status == 1 and "there must be a line for each prefix, but there are only 0" in capsys.readouterr().err


def test_what_came_before_a_prefix_without_room_is_translated(model, tmp_path, capsys):
    (tmp_path / "prefixes").write_text("one\n\none dog two dogs red black\none\n", encoding="utf-8")
    text = b"un\nun chien noir voit deux chats\nun\ndeux\n"
    for chunk in ("1", "3", "1000"):
        status, out = in_process(model, tmp_path, text, "--prefixes", str(tmp_path / "prefixes"), "--chunk", chunk)
        lines = rows_of(out)
        assert status == 1 and len(lines) == 2 and lines[0].startswith("one") and lines[1]
        assert "translate: the prefix of line 3 has " in capsys.readouterr().err


def test_json_has_everything(model, tmp_path):
    status, out = in_process(model, tmp_path, "un chat\n\n日本\n".encode(), "--format", "json", "--top-beams", "2")
    rows = [json.loads(line) for line in rows_of(out)]
    assert status == 0 and [row["line"] for row in rows] == [0, 1, 2]
    assert [len(row["translations"]) for row in rows] == [2, 1, 2]
    assert rows[1]["translations"] == [{"text": "", "score": 0.0, "tokens": [], "log_probs": []}]
    found = Translator.load(model).translate(["un chat"], top_beams=2, max_length=8)[0]
    for one, expected in zip(rows[0]["translations"], found, strict=True):
        assert one["text"] == expected.text and one["tokens"] == [*expected.tokens]
        assert one["log_probs"] == pytest.approx(expected.log_probs, rel=1e-4)


def test_samples_are_numbered(model, tmp_path):
    _, out = in_process(model, tmp_path, b"un chat\ndeux chats\n", "--samples", "3")
    rows = [line.split(" ||| ") for line in rows_of(out)]
    assert [row[0] for row in rows] == ["0"] * 3 + ["1"] * 3
    assert in_process(model, tmp_path, b"deux chats\n", "--samples", "3")[1].splitlines() == [
        "0" + line[1:] for line in rows_of(out)[3:]
    ]
    assert in_process(model, tmp_path, b"un chat\n", "--samples", "3", "--seed", "1")[1] not in out
