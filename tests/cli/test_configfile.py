"""Configuration files: what is read, and what is refused at once and harmlessly."""

import contextlib
import os
import resource
import time

import pytest

from reverie.base.errors import UsageError
from reverie.cli.configfile import MOST_BYTES, read_config


def written(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_toml_and_json_say_the_same(tmp_path):
    toml = written(tmp_path, "a.toml", 'data = "digits"\nbatch-size = 8\nwidths = [8, 16]\nflip = true\nrate = 1e-3')
    json = written(
        tmp_path, "a.json", '{"data": "digits", "batch_size": 8, "widths": [8, 16], "flip": true, "rate": 1e-3}'
    )
    assert read_config(toml) == read_config(json)
    assert read_config(toml) == {"data": "digits", "batch_size": 8, "widths": [8, 16], "flip": True, "rate": 0.001}


def test_a_byte_order_mark_is_no_matter(tmp_path):
    assert read_config(written(tmp_path, "a.toml", b"\xef\xbb\xbfsteps = 3")) == {"steps": 3}


CANARY = "!!python/object/apply:os.system ['touch canary']"
REFUSED = {
    "a.yaml": (CANARY, "YAML is not read; write TOML"),
    "a.yml": ("x: &a [*a, *a]", "YAML is not read; write TOML"),
    "a.ini": ("x=1", "ends in .toml or .json"),
    "a": ("x=1", "ends in .toml or .json"),
    "broken.toml": ("x = ", "this is not TOML"),
    "broken.json": ("{", "this is not JSON"),
    "empty.json": ("", "this is not JSON"),
    "list.json": ("[1]", "holds a list"),
    "bytes.toml": (b"\xff\xfe\x00", "not UTF-8"),
    "deep.json": ("[" * 1000 + "]" * 1000, "nested too deeply|holds a list"),
    "deep2.json": ('{"a":' * 1000 + "1" + "}" * 1000, "nested too deeply"),
    "deeper.json": ("[" * 15_000, "nested too deeply|not JSON"),
    "deep.toml": ("a = " + "[" * 1000 + "]" * 1000, "nested too deeply"),
    "deeper.toml": ("a = " + "[" * 15_000, "nested too deeply|not TOML"),
    "tables.toml": ("a." * 100 + "b = 1", "nested too deeply"),
    "dots.toml": ("a." * 1000 + "b = 1", "more than 200 dots"),
    "digits.json": ('{"steps": ' + "9" * 5000 + "}", "not JSON"),
    "digits.toml": ("steps = 0x" + "f" * 15_000, "more than 512 bits"),
    "digits_in_list.toml": ("widths = [0x" + "f" * 15_000 + "]", "more than 512 bits"),
    "deeper2.json": ('{"a":' * 2_500, "nested too deeply|not JSON"),
    "large.toml": ("# " + "x" * 10_000_000, "a configuration file has"),
    "twice.toml": ("batch-size = 1\nbatch_size = 2", "there twice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_and_broken_files_are_refused_at_once(tmp_path, monkeypatch, name):
    """No second, no memory, no side effect: RELIABILITY 6, case 8."""
    monkeypatch.chdir(tmp_path)
    text, words = REFUSED[name]
    path = written(tmp_path, name, text)
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match=words) as caught:
        read_config(path)
    assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert time.process_time() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert [item.name for item in tmp_path.iterdir()] == [name]


def largest(part, start="", end=""):
    """Return a text of as many parts as a file may hold."""
    parts = [start]
    while sum(map(len, parts)) < MOST_BYTES - 1000:
        parts += [part(len(parts)) for _ in range(500 // len(part(0)) + 1)]
    return "".join(parts) + end


LARGEST = {
    "empty tables in a list": largest(lambda i: "{},", "a = [", "]"),
    "a list of lists": largest(lambda i: "[],", "a = [", "]"),
    "many tables": largest(lambda i: f"[t{i}]\n"),
    "tables in tables": largest(lambda i: f"[a.b.c.t{i}]\n"),
    "long names": largest(lambda i: f"x{i}." + "a." * 190 + "b = 1\n"),
    "many settings": largest(lambda i: f"k{i} = {i}\n"),
    "a long text": largest(lambda i: "x" * 100, "a = '''", "'''"),
}


@pytest.mark.parametrize("what", LARGEST)
def test_the_largest_files_take_no_second(tmp_path, what):
    """Up to the limit a file may be read or refused, but soon: TOML's reader takes longer than its text is long."""
    assert MOST_BYTES / 2 < len(LARGEST[what]) <= MOST_BYTES
    path = written(tmp_path, "a.toml", LARGEST[what])
    start = time.process_time()
    with contextlib.suppress(UsageError):
        read_config(path)
    assert time.process_time() - start < 1


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UsageError, match=r"none\.toml: there is no such file|ends in"):
            read_config(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.toml")
    with pytest.raises(UsageError, match="no such file"):
        read_config(tmp_path / "a.toml")
