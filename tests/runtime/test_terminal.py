import io
import re

import pytest

from gptjax.runtime import progress


def test_plain_lines_have_count_text_and_time_left(capsys):
    with progress.progress("tokenizing", total=2000, start=1000, plain_seconds=0) as bar:
        bar.update(1500, "loss 3.1")
        bar.print("above [bar]")
        bar.update(2000)
    first, above, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"tokenizing 1,500/2,000 · loss 3.1 · \d+:\d\d left", first)
    assert (above, last) == ("above [bar]", "tokenizing 2,000/2,000")


def test_plain_lines_are_held_back_but_the_last_one_is_printed(capsys):
    with pytest.raises(KeyError), progress.progress("reading", total=None, plain_seconds=60) as bar:
        for count in range(1, 8):
            bar.update(count, f"{count} MB")
        raise KeyError
    assert capsys.readouterr().out == "reading 7 · 7 MB\n"


def test_time_left_counts_from_the_start(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress("training", total=1000, start=900, plain_seconds=0) as bar:
        now[0] = 60.0
        bar.update(910)
    assert capsys.readouterr().out == "training 910/1,000 · 9:00 left\n"


def test_durations():
    assert [progress.duration(s) for s in (0.4, 59.6, 725, 10800)] == ["0:00", "1:00", "12:05", "3:00:00"]


def test_a_terminal_gets_a_bar_with_the_same_words(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.progress("training", total=10, start=3):
        pass
    assert "3/10" in screen.getvalue()
    with progress.progress("training", total=10, start=3) as bar:
        bar.update(4, "loss 2.5")
        bar.print("a [line] above")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "a [line] above" in shown
    assert re.search(r"training .* 4/10 +loss 2.5 ", shown)
