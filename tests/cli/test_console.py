"""What a command says, and where."""

import io
import json
import os
import sys

import pytest

from reverie.cli import console


def test_results_and_notes_go_their_ways(capsys):
    console.result("a")
    console.note("b")
    assert capsys.readouterr() == ("a\n", "b\n")


def test_json_is_strict(capsys):
    console.emit({"a": float("nan"), "b": [float("inf"), 1.5], "c": (1, None, True), 4: "é"})
    out = capsys.readouterr().out
    assert json.loads(out, parse_constant=pytest.fail) == {"a": None, "b": [None, 1.5], "c": [1, None, True], "4": "é"}


def test_what_json_has_no_word_for_becomes_text():
    assert console.finite({"path": os.path}) == {"path": str(os.path)}


@pytest.mark.parametrize(
    ("count", "want"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**40, "5.0 TiB"), (2**60, "1048576.0 TiB")],
)
def test_sizes(count, want):
    assert console.size(count) == want


@pytest.mark.parametrize(("text", "want"), [("a\nb\tc", "a\nb\tc"), ("\r\x00\x7f", "\\x0d\\x00\\x7f"), ("日é", "日é")])
def test_what_a_terminal_may_be_shown(text, want):
    assert console.printable(text) == want


@pytest.fixture
def unread():
    """A stream whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as stream:
        yield stream


def test_a_note_that_nobody_can_read_is_no_error(monkeypatch, unread):
    monkeypatch.setattr(sys, "stderr", unread)
    console.note("is anyone there?")
    console.note("still no error")


def test_a_result_that_nobody_can_read_is(monkeypatch, unread):
    monkeypatch.setattr(sys, "stdout", unread)
    with pytest.raises(BrokenPipeError):
        console.result("is anyone there?")
    console.drop_unread(unread)
    console.result("dropped")


def test_an_abandoned_stream_takes_everything(tmp_path):
    with open(tmp_path / "a", "w") as stream:
        console.abandon(stream)
        print("lost", file=stream)
    assert (tmp_path / "a").read_text() == ""


def test_only_the_word_error_is_red():
    assert console.reddened("error: x") == "\x1b[31merror:\x1b[0m x"
    assert console.reddened("an error: x") == "an error: x"


def test_interactive_where_a_terminal_is(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not console.interactive()
