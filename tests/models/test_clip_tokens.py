"""Emphasis, chunks, and where the vocabulary comes from."""

import gzip

import pytest

from reverie.base.errors import ModelFileError, UsageError
from reverie.models.clip_tokens import Tokens, emphasised, find_vocabulary, read_tokenizer


def weights(prompt):
    return [(text, round(weight, 4)) for text, weight in emphasised(prompt)]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("", []),
        ("a cat", [("a cat", 1.0)]),
        ("a (cat)", [("a ", 1.0), ("cat", 1.1)]),
        ("((cat))", [("cat", 1.21)]),
        ("[cat]", [("cat", 0.9091)]),
        ("(cat:1.5) dog", [("cat", 1.5), (" dog", 1.0)]),
        ("(a (b:2) c)", [("a ", 1.1), ("b", 2.2), (" c", 1.1)]),
        ("(cat: 0.5 )", [("cat", 0.5)]),
        (r"\(cat\)", [("(cat)", 1.0)]),
        ("a) b (c", [("a) b (c", 1.0)]),
        ("[a (b]", [("[a (b]", 1.0)]),
        ("time 10:30", [("time 10:30", 1.0)]),
        ("(cat:x)", [("cat:x", 1.1)]),
        ("(猫:1.2)", [("猫", 1.2)]),
    ],
)
def test_emphasis(prompt, wanted):
    assert weights(prompt) == wanted


class Letters:
    """A tokenizer of one token a word."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __call__(self, text, **options):
        return {"input_ids": [10 + len(word) for word in text.split()]}


def test_a_chunk_is_between_a_beginning_and_an_end():
    (chunk,) = Tokens(Letters(), places=6).chunks("a (bb:2) c")
    assert chunk.tokens == (1, 11, 12, 11, 2, 0)
    assert chunk.weights == (1.0, 1.0, 2.0, 1.0, 1.0, 1.0)


def test_what_is_longer_goes_on_in_another_chunk():
    chunks = Tokens(Letters(), places=4).chunks("a bb ccc")
    assert [chunk.tokens for chunk in chunks] == [(1, 11, 12, 2), (1, 13, 2, 0)]
    assert Tokens(Letters(), places=4).count("a bb (ccc)") == 3


def test_break_fills_up_and_a_least_number_is_kept():
    tokens = Tokens(Letters(), places=5)
    assert [chunk.tokens for chunk in tokens.chunks("a BREAK bb")] == [(1, 11, 2, 0, 0), (1, 12, 2, 0, 0)]
    assert tokens.chunks("", least=2) == tokens.chunks("BREAK")


def test_a_missing_vocabulary_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.delenv("REVERIE_CLIP_VOCABULARY", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="REVERIE_CLIP_VOCABULARY"):
        find_vocabulary()
    cached = tmp_path / "hub/models--openai--clip-vit-large-patch14/snapshots/abc"
    cached.mkdir(parents=True)
    (cached / "vocab.json").write_text("{}")
    assert find_vocabulary() == cached
    monkeypatch.setenv("REVERIE_CLIP_VOCABULARY", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="none"):
        find_vocabulary()


def test_a_file_that_is_no_vocabulary(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": "b"}')
    (tmp_path / "merges.txt").write_text("#version\na b c\n")
    with pytest.raises(ModelFileError, match="vocab"):
        read_tokenizer(tmp_path)
    with gzip.open(tmp_path / "x.gz", "wt") as file:
        file.write("one\ntwo three")
    with pytest.raises(ModelFileError, match="merges"):
        read_tokenizer(tmp_path / "x.gz")
    (tmp_path / "y.gz").write_text("no gzip")
    with pytest.raises(ModelFileError, match="bpe_simple"):
        read_tokenizer(tmp_path / "y.gz")
