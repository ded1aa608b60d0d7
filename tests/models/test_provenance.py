"""How a picture was made: written, read, made again bit for bit; and files of strangers."""

import json
import warnings
from io import BytesIO

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from reverie.base.errors import DataError, ModelFileError, UsageError
from reverie.models.card import DataRecord, ScheduleSpec
from reverie.models.checkpoints import CheckpointStore
from reverie.models.formats import write_model
from reverie.models.load import load
from reverie.models.pictures import picture_bytes, write_pictures
from reverie.models.provenance import again, parameters_text, parse_parameters, read_provenance

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def saved(make, tmp_path):
    """Return a model of classes that came from a folder."""
    data = DataRecord(name="digits", fingerprint="abc", count=3)
    write_model(make({"num_class_embeds": 4}, classes=("zero", "one, two", "Ünë"), data=data), tmp_path / "model")
    return load(tmp_path / "model")


def text(path) -> dict[str, str]:
    """Return a picture's text chunks."""
    with Image.open(path) as image:
        return {name: value for name, value in image.info.items() if isinstance(value, str)}


# Written --------------------------------------------------------------------------------------------


def test_both_chunks_are_there(saved, tmp_path):
    path = write_pictures(saved.sample(3, seed=7, classes="Ünë", guidance=2, steps=3), tmp_path / "out")[1]
    chunks = text(path)
    assert chunks["parameters"] == (
        f"Ünë\nSteps: 3, Sampler: DDIM, Schedule type: Trailing, CFG scale: 2.0, Seed: 8, Size: 8x8, "
        f"Model hash: {saved.digest[:10]}, Model: model, Version: reverie 0.1.0"
    )
    record = json.loads(chunks["reverie"])
    assert record["seeds"] == [8]
    assert record["n"] == 1
    assert record["classes"] == ["Ünë"]
    assert record["model"] == {"source": str(tmp_path / "model"), "sha256": saved.digest}
    assert record["data"] == {"name": "digits", "fingerprint": "abc"}
    assert record["threads"] == torch.get_num_threads()


def test_the_common_text_is_read_as_that_program_reads_it(saved):
    record = saved.sample(1, classes="one, two", steps=1).record_of(0)
    record["model"]["source"] = "runs/a: b, c"
    found = parse_parameters(parameters_text(record, (8, 6)))
    assert found["prompt"] == "one, two"
    assert found["Model"] == "a: b, c"
    assert (found["Size"], found["Seed"], found["CFG scale"]) == ("8x6", "0", "1.0")


def test_without_a_class_there_is_no_prompt(saved):
    assert parameters_text(saved.sample(1, steps=1).record_of(0), (8, 8)).startswith("Steps: 1, Sampler: DDIM")


# Made again -----------------------------------------------------------------------------------------

REQUESTS = {
    "plain": {},
    "guided": {"classes": "one, two", "guidance": 2.5, "steps": 3},
    "stochastic": {"sampler": "ddpm", "variance": "large", "steps": 3},
    "eta": {"eta": 0.3, "steps": 4},
    "grid": {"grid": "karras", "rho": 3.0, "steps": 3},
    "times": {"grid": [1.0, 0.7, 1 / 3], "clip": False},
    "bf16": {"dtype": "bfloat16", "steps": 3},
    "threshold": {"threshold": 0.9, "steps": 3, "clip": 1.5},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_again_is_the_same_bit_for_bit(saved, tmp_path, name):
    """From the file alone; and the file that is written of it is the same to the byte."""
    request = {"steps": 3, **REQUESTS[name]}
    if name == "times":
        del request["steps"]
    samples = saved.sample(3, seed=11, **request)
    path = write_pictures(samples, tmp_path / "out")[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = again(path)
    assert torch.equal(made.images[0], samples.images[2])
    assert write_pictures(made, tmp_path / "again")[0].read_bytes() == path.read_bytes()


def test_again_at_the_recorded_number_of_threads(saved, tmp_path):
    """The last bits may depend on it; afterwards it is as before."""
    samples = saved.sample(1, steps=2)
    samples.record["threads"] = 2
    path = write_pictures(samples, tmp_path / "out")[0]
    seen = []
    made = again(path, callback=lambda progress: seen.append(torch.get_num_threads()))
    assert seen == [2, 2]
    assert torch.get_num_threads() == 1
    assert made.record["threads"] == 2


def test_again_with_another_model_is_refused(saved, make, tmp_path):
    path = write_pictures(saved.sample(1, steps=1), tmp_path / "out")[0]
    other = make({"num_class_embeds": 4}, seed=5, classes=("zero", "one, two", "Ünë"))
    with pytest.raises(ModelFileError, match=f"not the model that made .* the record says {saved.digest[:10]}"):
        again(path, other)
    write_model(other, tmp_path / "model", overwrite=True)
    with pytest.raises(ModelFileError, match="is not the model that made") as caught:
        again(path)
    assert caught.value.exit_code == 4


def test_again_where_the_model_has_moved(saved, tmp_path):
    samples = saved.sample(1, steps=2)
    path = write_pictures(samples, tmp_path / "out")[0]
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="is not there; give the path of the model"):
        again(path)
    made = again(path, tmp_path / "moved")
    assert torch.equal(made.images, samples.images)
    assert write_pictures(made, tmp_path / "again")[0].read_bytes() == path.read_bytes()


def test_again_of_a_model_that_came_from_no_file(model, tmp_path):
    samples = model.sample(1, steps=1)
    path = write_pictures(samples, tmp_path)[0]
    with pytest.raises(UsageError, match="came from no file; give the model"):
        again(path)
    assert torch.equal(again(path, model).images, samples.images)


def test_again_of_a_run_that_went_on(make, tmp_path):
    """The checkpoint that made it is found, while it is there."""
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=2)
    store.prepare()
    (tmp_path / "run" / "card.json").write_text(make().card.model_dump_json())

    def save(step: int) -> None:
        state = make(seed=step).denoiser.network.state_dict()
        store.save(step, {"model": make(seed=99).denoiser.network.state_dict(), "ema-0.9": state}, {})

    save(1)
    samples = load(tmp_path / "run").sample(1, steps=2)
    raw = load(tmp_path / "run", ema="none").sample(1, steps=2)
    first, second = (write_pictures(s, tmp_path / "out")[0] for s in (samples, raw))
    save(2)
    assert torch.equal(again(first).images, samples.images)
    assert torch.equal(again(second).images, raw.images)
    assert write_pictures(again(first), tmp_path / "again")[0].read_bytes() == first.read_bytes()
    save(3)
    with pytest.raises(ModelFileError, match="is not the model that made"):
        again(first)


def test_what_is_otherwise_here_is_said(saved, tmp_path):
    samples = saved.sample(1, steps=1, exact=False)
    samples.record.update({"torch": "1.0", "reverie": "0.0.1", "device": "cuda", "threads": 100_000})
    path = write_pictures(samples, tmp_path / "out")[0]
    with pytest.warns(RuntimeWarning) as said:
        again(path, device="cpu")
    texts = " ".join(str(warning.message) for warning in said)
    assert all(word in texts for word in ("torch 1.0", "reverie 0.0.1", "free batches", "100000 threads"))
    assert torch.cuda.is_available() or "made on cuda" in texts


# Read -----------------------------------------------------------------------------------------------


def test_ours_is_read(saved, tmp_path):
    path = write_pictures(saved.sample(1, seed=3, steps=1), tmp_path / "out")[0]
    found = read_provenance(path)
    assert (found["program"], found["size"], found["settings"]["seeds"]) == ("reverie", [8, 8], [3])


def png(path, **texts: str):
    """Write a PNG with text chunks."""
    info = PngInfo()
    for name, value in texts.items():
        info.add_text(name, value)
    Image.new("L", (4, 6)).save(path, pnginfo=info)
    return path


def test_others_are_read_as_far_as_they_say(tmp_path):
    common = (
        "a cat,\nsitting\nNegative prompt: dog, ugly\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 7, "
        'Schedule type: Karras, Seed: 1234, Size: 512x768, Model: sd, Lora hashes: "x: 1, y: 2", Version: v1.10.1'
    )
    found = read_provenance(png(tmp_path / "a.png", parameters=common))
    assert found["program"].startswith("AUTOMATIC1111")
    assert found["size"] == [4, 6]
    settings = found["settings"]
    assert settings["prompt"] == "a cat,\nsitting"
    assert settings["negative prompt"] == "dog, ugly"
    assert (settings["Steps"], settings["Sampler"], settings["Lora hashes"]) == ("20", "DPM++ 2M", "x: 1, y: 2")

    comfy = read_provenance(png(tmp_path / "b.png", prompt='{"3": {"class_type": "KSampler"}}', workflow="{broken"))
    assert comfy["program"] == "ComfyUI"
    assert comfy["settings"]["prompt"]["3"]["class_type"] == "KSampler"
    assert comfy["settings"]["workflow"] == "{broken"
    invoke = read_provenance(png(tmp_path / "c.png", invokeai_metadata='{"seed": 5}'))
    assert (invoke["program"], invoke["settings"]["invokeai_metadata"]["seed"]) == ("InvokeAI", 5)
    assert read_provenance(png(tmp_path / "d.png", Comment="hello"))["program"] is None


def test_a_prompt_alone(tmp_path):
    assert parse_parameters("just a prompt") == {"prompt": "just a prompt"}
    assert parse_parameters("") == {}


# Strangers' files -----------------------------------------------------------------------------------


def test_a_picture_without_a_record_is_not_made_again(tmp_path):
    with pytest.raises(DataError, match="holds no record of reverie's"):
        again(png(tmp_path / "a.png", parameters="x"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 10**9}, "steps"),
        ({"seeds": [2**70]}, "seeds"),
        ({"seeds": [1, 2]}, "record is of 1 pictures"),
        ({"n": 2}, "record is of 2 pictures"),
        ({"format": 2}, "format"),
        ({"sampler": "x" * 300}, "sampler"),
        ({"guidance": "NaN"}, "guidance"),
        ({"model": {"source": "m", "sha256": "zz"}}, "sha256"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_record_that_is_not_sound(saved, tmp_path, change, words):
    record = saved.sample(1, steps=1).record | change
    with pytest.raises(DataError, match=words) as caught:
        again(png(tmp_path / "a.png", reverie=json.dumps(record)))
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampler": "os.system"}, "no sampler 'os.system'"),
        ({"options": {"warp": 9}}, "warp has no effect"),
        ({"grid": "../../x"}, "no grid"),
        ({"steps": 41}, "steps is 41"),
        ({"classes": ["nine"]}, "no class 'nine'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_a_record_of_what_there_is_not(saved, tmp_path, change, words):
    record = saved.sample(1, steps=1).record | change
    with pytest.raises(UsageError, match=words):
        again(png(tmp_path / "a.png", reverie=json.dumps(record)))


@pytest.mark.parametrize("source", ["https://evil.example/model", "../../../etc/passwd", "/etc/passwd", "owner/name"])
def test_a_record_leads_nowhere_but_to_a_model(saved, tmp_path, source):
    """Nothing is fetched; what is there and no model is refused."""
    record = saved.sample(1, steps=1).record | {"model": {"source": source, "sha256": saved.digest}}
    with pytest.raises((UsageError, ModelFileError)):
        again(png(tmp_path / "a.png", reverie=json.dumps(record)))


def test_a_checkpoint_name_leads_nowhere(saved, tmp_path):
    path = str(tmp_path / "model")
    for name in ("../../../etc", "step-1/../../x", "/etc"):
        record = saved.sample(1, steps=1).record | {
            "model": {"source": path, "sha256": saved.digest, "checkpoint": name}
        }
        assert again(png(tmp_path / "a.png", reverie=json.dumps(record))).record["model"]["source"] == path


@pytest.mark.parametrize("content", [b"", PNG, PNG + bytes(30), b"GIF89a" + bytes(20)])
def test_what_is_no_png(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_provenance(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


@given(st.data())
def test_no_change_of_bytes_is_a_traceback(tmp_path_factory, data):
    """A few bytes of a sound picture changed anywhere: read, or refused on one line."""
    record = {"seeds": [1], "n": 1}
    content = bytearray(
        picture_bytes(torch.zeros(1, 4, 4, dtype=torch.uint8), {"reverie": json.dumps(record), "a": "ü"})
    )
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "a.png"
    path.write_bytes(content)
    for look in (read_provenance, again):
        said = ""
        try:
            look(path)
        except (DataError, UsageError) as error:
            said = str(error)
        assert "\n" not in said


def test_a_path_where_nothing_is(tmp_path):
    with pytest.raises(UsageError, match="no picture"):
        read_provenance(tmp_path / "none.png")


def test_no_pixel_of_a_bomb_is_decoded(tmp_path):
    """A small file that would unpack to 400 million pixels is looked at in no time."""
    buffer = BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="decompression bomb"):
        read_provenance(tmp_path / "a.png")


def test_a_text_that_unpacks_to_gigabytes(tmp_path):
    info = PngInfo()
    info.add_text("reverie", "x" * 50_000_000, zip=True)
    Image.new("L", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(DataError):
        again(tmp_path / "a.png")


def test_plain_pictures_carry_what_they_are_given(tmp_path):
    (tmp_path / "a.png").write_bytes(picture_bytes(torch.zeros(1, 2, 2, dtype=torch.uint8), {"a": "b"}))
    assert text(tmp_path / "a.png") == {"a": "b"}


def test_schedules_without_a_table(make, tmp_path):
    write_model(make(schedule=ScheduleSpec(name="flow"), prediction="velocity"), tmp_path / "m")
    samples = load(tmp_path / "m").sample(1, steps=3)
    assert torch.equal(again(write_pictures(samples, tmp_path / "out")[0]).images, samples.images)
