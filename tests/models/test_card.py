"""Cards: plain data, checked and bounded."""

import json

import pytest
from pydantic import ValidationError

from reverie.base.errors import ModelFileError, UsageError
from reverie.models.builders import build, build_schedule
from reverie.models.card import Card, DataRecord, NetworkSpec, SamplingDefaults, ScheduleSpec, parse_card, read_card


def card(**values) -> Card:
    """Return a card of an 8x8 model."""
    return Card(**{"shape": (1, 8, 8), "network": NetworkSpec(config={"in_channels": 1, "channels": [8, 8]})} | values)


def test_a_card_comes_back_from_json():
    whole = card(
        classes=("a", "ü"), schedule=ScheduleSpec(name="table", betas=(0.1, 0.2)), data=DataRecord(name="x", count=3),
        sampling=SamplingDefaults(clip=False, options={"eta": 0.5, "variance": "small", "n": 3}),
    )  # fmt: skip
    assert parse_card(whole.model_dump_json(), "here") == whole
    assert parse_card(whole.model_dump(mode="json"), "here") == whole
    back = parse_card(whole.model_dump_json(), "here").sampling
    assert (back.clip is False, type(back.options["n"]), type(back.options["eta"])) == (True, int, float)


def test_labels():
    assert card().labels is None
    assert (card(classes=("a", "b")).labels, card(classes=("a", "b")).null_label) == (3, 2)
    assert card(classes=("a", "b"), unconditional=False).labels == 2


@pytest.mark.parametrize(
    "values",
    [
        {"shape": ()},
        {"shape": (0, 8, 8)},
        {"shape": (1, 10**6, 8)},
        {"kind": "film"},
        {"sigma_data": float("inf")},
        {"sampling": {"guidance": float("nan")}},
        {"sampling": {"threshold": 1.5}},
        {"sampling": {"steps": 0}},
        {"schedule": {"options": {"timesteps": 100_001}}},
        {"schedule": {"options": {"timesteps": True}}},
        {"schedule": {"options": {"first": float("nan")}}},
        {"classes": ["a" * 201]},
        {"format": 0},
        {"module": "os"},
    ],
)
def test_what_is_out_of_bounds(values):
    with pytest.raises(ValidationError):
        card(**values)
    text = json.dumps(card().model_dump(mode="json") | values)
    with pytest.raises(ModelFileError, match="a test is no card of a model") as caught:
        parse_card(text, "a test")
    assert "\n" not in str(caught.value)


def test_a_file(tmp_path):
    path = tmp_path / "card.json"
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_card(path)
    path.write_text(card().model_dump_json())
    assert read_card(path) == card()
    with path.open("r+b") as file:
        file.truncate(17 << 20)
    with pytest.raises(ModelFileError, match="larger than"):
        read_card(path)


# From a card to objects -----------------------------------------------------------------------------


def test_on_meta_a_network_takes_no_memory():
    wide = {"in_channels": 1, "channels": [4096, 8192, 8192], "layers": 3}
    network = build(card(network=NetworkSpec(config=wide)), "meta").network
    assert sum(p.nbytes for p in network.parameters()) > 10**10
    assert all(p.is_meta for p in network.parameters())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"shape": (3, 8, 8)}, "in_channels is 1, the card wants 3; out_channels is 1, the card wants 3"),
        ({"learned_variance": True}, "out_channels is 1, the card wants 2"),
        ({"classes": ("a",)}, "num_class_embeds is None, the card wants 2"),
        ({"shape": (8,)}, r"an image has the shape \(C, H, W\), not \(8,\)"),
        ({"network": NetworkSpec(config={"chanels": 3})}, "its network is no unet: chanels"),
    ],
)
def test_a_network_that_does_not_fit_its_card(values, words):
    with pytest.raises(ModelFileError, match=words):
        build(card(**values))


def test_a_schedule_that_is_none():
    with pytest.raises(UsageError, match="schedule 'vp' does not take the options"):
        build_schedule(ScheduleSpec(name="vp", options={"timesteps": 10}))
    with pytest.raises(UsageError, match="did you mean linear"):
        build_schedule(ScheduleSpec(name="linaer"))
