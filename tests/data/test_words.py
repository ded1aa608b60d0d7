"""Vocabularies: whole words, letters for the rest, nothing lost in silence."""

import torch

from reverie.data.words import LONGEST, Vocabulary, make_vocabulary


def test_words_that_were_seen_twice_are_whole_and_others_are_spelt():
    words = make_vocabulary(["red star", "red cat"])
    assert words.entries[0] == "red"
    assert [words.entries[i - 1] for i in words.spell("red cat").numbers] == ["red", "#c", "#a", "#t"]


def test_what_no_caption_had_is_named():
    words = make_vocabulary(["red star", "red star"])
    assert words.spell("red z").unknown == ("z",)
    assert words.spell("red z").numbers == words.spell("red").numbers


def test_capitals_and_spaces_say_nothing():
    words = make_vocabulary(["a red star", "a red star"])
    assert torch.equal(words(["  A RED\tstar "]), words(["a red star"]))


def test_signs_are_words():
    words = make_vocabulary(["keycap #", "keycap *"])
    assert not torch.equal(words(["keycap #"]), words(["keycap *"]))


def test_every_caption_fits_the_length_and_none_is_zero_within():
    captions = ["a", "two small red circles at the top left", "xyz"]
    words = make_vocabulary(captions)
    table = words(captions)
    assert table.shape == (3, words.length)
    assert [len(words.spell(caption).numbers) for caption in captions] == (table > 0).sum(1).tolist()


def test_a_long_prompt_is_cut_at_the_length():
    words = Vocabulary(["a"], 4)
    assert words(["a " * 9]).tolist() == [[1, 1, 1, 1]]
    assert len(words.spell("a " * 9).numbers) == 9


def test_the_length_is_bounded():
    assert make_vocabulary(["long " * 1000] * 2).length == LONGEST
