"""`reverie sample`: what it makes, what it says, what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from reverie.cli import drawing
from reverie.models.builders import build
from reverie.models.card import Card, NetworkSpec
from reverie.models.load import load
from reverie.models.model import Model
from reverie.models.pictures import read_provenance


@pytest.fixture
def made(reverie, models):
    """Draw with the model of classes, and return the one JSON object."""

    def run(*words, model="classes", steps=3):
        given = [] if "--times" in words or "--steps" in words else ["--steps", steps]
        outcome = reverie("sample", models / model, *given, "--json", *words)
        assert outcome.exit_code == 0, outcome.stderr
        return json.loads(outcome.stdout)

    return run


def pixels(path):
    return np.asarray(Image.open(path))


# What it makes --------------------------------------------------------------------------------


def test_results_on_standard_output_and_words_on_standard_error(reverie, models, tmp_path):
    outcome = reverie("sample", models / "plain", "-n", 3, "--steps", 4, "--seed", 5)
    assert outcome.exit_code == 0
    files = [Path("outputs") / name for name in ("00000-seed5.png", "00001-seed6.png", "00002-seed7.png")]
    assert outcome.stdout.splitlines() == [*map(str, files), "outputs/00000-grid.png"]
    assert all(pixels(path).shape == (8, 8) for path in files)
    first, last = outcome.stderr.splitlines()
    assert first == "3 samples of 1x8x8: ddim (eta 0.0), 4 steps on trailing: 4 evaluations each; seed 5 to 7"
    assert last.startswith("3 pictures in ")


def test_who_watches_sees_a_bar(reverie, models, monkeypatch):
    monkeypatch.setattr(drawing, "interactive", lambda: True)
    outcome = reverie("sample", models / "plain", "-n", 3, "--steps", 9, "--batch-size", 1, "--no-grid-picture")
    bars = outcome.stderr.split("\r")[1:]
    assert len(bars) > 1
    assert "100%" in bars[-1]
    assert "3/3 pictures" in bars[-1]
    assert len(outcome.stdout.split()) == 3


def test_one_json_object_and_nothing_else(made):
    found = made("-n", 2, "--seed", 3, "--class", "dog", "--guidance", 2, "--out", "o")
    assert found["files"] == ["o/00000-seed3.png", "o/00001-seed4.png"]
    assert found["seeds"] == [3, 4]
    assert found["classes"] == ["dog", "dog"]
    assert found["evaluations"] == 6
    assert found["settings"]["guidance"] == 2.0
    assert (found["settings"]["sampler"], found["settings"]["steps"]) == ("ddim", 3)
    assert Path(found["grid_picture"]).is_file()
    assert found["animation"] is None


def test_nothing_is_overwritten(made):
    first, second = made("-n", 2, "--seed", 0), made("-n", 2, "--seed", 0)
    assert not set(first["files"]) & set(second["files"])
    assert first["grid_picture"] != second["grid_picture"]


def test_every_file_says_its_seed_and_all_of_its_settings(made):
    found = made(
        "-n", 2, "--seed", 9, "--class", "emu", "--sampler", "ddpm", "--variance", "large", "--grid", "leading"
    )
    for path, seed in zip(found["files"], (9, 10), strict=True):
        settings = read_provenance(path)["settings"]
        assert (settings["seeds"], settings["classes"]) == ([seed], ["emu"])
        assert (settings["sampler"], settings["options"]) == ("ddpm", {"variance": "large"})
        assert (settings["grid"], settings["steps"]) == ("leading", 3)


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["--class", "dog"], ["dog"] * 2),
        (["--class", "1"], ["dog"] * 2),
        (["--class", "emu,cat"], ["emu"] * 2 + ["cat"] * 2),
        (["--class", "emu", "--class", "0"], ["emu"] * 2 + ["cat"] * 2),
        (["--class", "all"], ["cat"] * 2 + ["dog"] * 2 + ["emu"] * 2),
        ([], [None] * 2),
    ],
)
def test_classes_by_name_and_number(made, words, want):
    assert made("-n", 2, "--seed", 0, *words)["classes"] == want


def test_without_a_class_the_classes_are_told(reverie, models):
    outcome = reverie("sample", models / "classes", "-n", 1, "--steps", 1)
    assert "drawn without a class; --class takes cat, dog, emu, or all" in outcome.stderr


def test_sixteen_if_nothing_is_said(made):
    assert len(made("--seed", 0, steps=1)["files"]) == 16


@pytest.mark.parametrize("words", [[], ["--seed", "-1"]])
def test_a_seed_of_its_own_that_is_told(made, words):
    first, second = made("-n", 1, *words)["seeds"], made("-n", 1, *words)["seeds"]
    assert first != second
    assert 0 <= first[0] < 2**32


def test_picture_i_of_a_seed_is_picture_0_of_the_seed_plus_i(made):
    """In any batch size, and alone: USERS gap 6, RELIABILITY 6, case 25."""
    among = made("-n", 5, "--seed", 10, "--sampler", "ddpm", "--class", "cat")["files"]
    halves = made("-n", 5, "--seed", 10, "--sampler", "ddpm", "--class", "cat", "--batch-size", 2)["files"]
    alone = made("-n", 1, "--seed", 13, "--sampler", "ddpm", "--class", "cat")["files"]
    assert [Path(a).read_bytes() for a in among] == [Path(a).read_bytes() for a in halves]
    assert (pixels(among[3]) == pixels(alone[0])).all()
    assert Path(among[3]).read_bytes() == Path(alone[0]).read_bytes()


def test_the_library_draws_the_same(made, models):
    files = made("-n", 3, "--seed", 2, "--class", "emu", "--sampler", "ddpm", "--guidance", 1.5)["files"]
    samples = load(models / "classes").sample(3, seed=2, classes="emu", sampler="ddpm", guidance=1.5, steps=3)
    assert [pixels(path).tolist() for path in files] == [image[0].tolist() for image in samples.uint8]


def test_a_class_of_many_is_the_same_as_alone(made):
    many, one = made("-n", 2, "--class", "all", "--seed", 0), made("-n", 1, "--class", "dog", "--seed", 3)
    assert Path(many["files"][3]).read_bytes() == Path(one["files"][0]).read_bytes()


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["--eta", "0.5"], {"options": {"eta": 0.5}}),
        (["--times", "0.9,0.5,0.1"], {"grid": [0.9, 0.5, 0.1], "steps": 3}),
        (["--times", "99,50,0"], {"steps": 3}),
        (["--spacing", "karras"], {"grid": "karras"}),
        (["--cfg-scale", "3", "--class", "cat"], {"guidance": 3.0}),
        (["--no-clip"], {"clip": False}),
        (["--threshold", "0.9"], {"threshold": 0.9, "clip": 1.0}),
        (["--dtype", "bfloat16"], {"dtype": "bfloat16"}),
        (["--speed", "fast", "-b", "2"], {"exact": False, "speed": "fast"}),
        (["--speed", "fast", "--weights", "int8"], {"weights": "int8"}),
        (["--speed", "fast", "--cache-every", "2"], {"cache_every": 2}),
        (["--num_inference_steps", "1"], {"steps": 1}),
    ],
)
def test_every_setting_arrives(made, words, want):
    settings = made("-n", 1, "--seed", 0, *words)["settings"]
    assert {name: settings[name] for name in want} == want


def test_the_number_of_threads_is_recorded(made):
    before = torch.get_num_threads()
    try:
        found = made("-n", 1, "-t", 1)
        assert read_provenance(found["files"][0])["settings"]["threads"] == 1
    finally:
        torch.set_num_threads(before)


def test_a_grid_picture_has_a_row_for_each_class(made, monkeypatch):
    seen = {}
    real = drawing.grid_picture
    monkeypatch.setattr(drawing, "grid_picture", lambda *args: seen.update(args=args) or real(*args))
    made("-n", 4, "--class", "cat,dog", "--seed", 0)
    images, columns, labels = seen["args"]
    assert (len(images), columns, labels) == (8, 4, ["cat"] * 4 + ["dog"] * 4)


def test_no_grid_picture_where_none_is_wanted(made):
    assert made("-n", 2, "--no-grid-picture")["grid_picture"] is None
    assert made("-n", 1)["grid_picture"] is None


def test_an_animation_of_the_denoising(made):
    found = made("-n", 2, "--animate", "--steps", 5)
    with Image.open(found["animation"]) as animation:
        assert animation.n_frames == 5


# Again ----------------------------------------------------------------------------------------


def test_again_is_the_same_to_the_last_bit(reverie, made):
    path = made("-n", 3, "--seed", 7, "--sampler", "ddpm", "--class", "emu", "--guidance", 1.5)["files"][1]
    outcome = reverie("sample", "--again", path, "--out", "repeated")
    assert outcome.exit_code == 0
    (repeated,) = outcome.stdout.split()
    assert repeated == "repeated/00000-seed8.png"
    assert Path(repeated).read_bytes() == Path(path).read_bytes()
    assert f"the same picture as {path}, to the last bit" in outcome.stderr


def test_again_as_json_with_a_model_that_moved(reverie, made, models, tmp_path):
    shutil.copytree(models / "plain", tmp_path / "here")
    found = made("-n", 1, "--seed", 7, model=tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert "which is not there" in reverie("sample", "--again", found["files"][0]).stderr
    outcome = reverie("sample", "--again", found["files"][0], tmp_path / "there", "--json")
    repeated = json.loads(outcome.stdout)
    assert (repeated["difference"], repeated["seeds"]) == (0, [7])


def test_again_says_how_far_it_is_off(reverie, made):
    path = made("-n", 1, "--seed", 7, model="plain")["files"][0]
    with Image.open(path) as image:
        from PIL.PngImagePlugin import PngInfo

        texts = PngInfo()
        texts.add_text("reverie", image.info["reverie"])
        touched = image.copy()
        value = touched.getpixel((2, 3))
        touched.putpixel((2, 3), value - 9 if value > 9 else value + 9)
        touched.save("touched.png", pnginfo=texts)
    outcome = reverie("sample", "--again", "touched.png", "--json")
    assert json.loads(outcome.stdout)["difference"] == 9
    assert "differs from touched.png, by 9 of 255 at most" in outcome.stderr


def test_again_with_another_model_is_refused(reverie, made, models):
    path = made("-n", 1, model="plain")["files"][0]
    outcome = reverie("sample", "--again", path, models / "other", "--out", "repeated")
    assert outcome.exit_code == 4
    assert "is not the model that made" in outcome.stderr
    assert not Path("repeated").exists()


def test_again_needs_a_record(refused, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    assert "holds no record" in refused(3, "sample", "--again", "plain.png")[0]
    assert "no PNG" in refused(3, "sample", "--again", "text.png")[0]
    assert "no picture none.png" in refused(2, "sample", "--again", "none.png")[0]


def test_again_takes_no_settings(refused):
    (line,) = refused(2, "sample", "--again", "a.png", "--steps", 3, "-n", 2, "--no-clip")
    assert "--clip, -n, --steps would have no effect" in line


# What it refuses ------------------------------------------------------------------------------

REFUSED = {
    "steps 0": (["--steps", 0], "--steps is 0; it must be a whole number, 1 <= x"),
    "steps -1": (["--steps", -1], "--steps is -1"),
    "steps 1e9": (["--steps", 10**9], "--steps is 1000000000"),
    "steps beyond the table": (["--steps", 101], "steps is 101; it must be a whole number in 1..100"),
    "steps as text": (["--steps", "1e1"], "--steps is 1e1"),
    "guidance NaN": (["--guidance", "nan"], "--guidance is nan; it must be a number"),
    "guidance infinite": (["--guidance", "inf"], "--guidance is inf; it must be a number"),
    "guidance without a class": (["--guidance", 2], "no class is asked for"),
    "eta 2": (["--eta", 2], "--eta is 2.0; it must be a number, 0 <= x <= 1"),
    "eta for ddpm": (["--sampler", "ddpm", "--eta", 1], "eta has no effect"),
    "variance for ddim": (["--variance", "small"], "variance has no effect"),
    "variance not learned": (["--sampler", "ddpm", "--variance", "learned"], "this model learned none"),
    "sampler": (["--sampler", "ddmi"], "there is no sampler 'ddmi', did you mean ddpm? (known: ddpm, ddim"),
    "grid": (["--grid", "trialing"], "did you mean trailing?"),
    "times and grid": (["--grid", "leading", "--times", "0.5"], "--times is a grid by itself; leave out --grid"),
    "times that rise": (["--times", "0.1,0.9"], "the next 0.9"),
    "times beyond 1": (["--times", "1.5,0.5"], "lie in (0, 1]"),
    "times of another number": (["--times", "0.9,0.5", "--steps", 3], "steps is 3, but the grid has 2"),
    "threshold": (["--threshold", 0], "--threshold is 0.0; it must be a number, 0 < x <= 1"),
    "threshold without clip": (["--threshold", 0.9, "--no-clip"], "clip is off"),
    "class": (["--class", "cta"], "there is no class 'cta', did you mean cat? (known: cat, dog, emu)"),
    "class number": (["--class", 3], "there is no class '3'"),
    "all and one": (["--class", "all,cat"], "all stands alone"),
    "n 0": (["-n", 0], "-n is 0; it must be a whole number, 1 <= x"),
    "n 1e9": (["-n", 10**9], "-n is 1000000000"),
    "seed": (["--seed", 2**63], "--seed is 9223372036854775808"),
    "seeds that run out": (["--seed", 2**63 - 1, "-n", 2], "seed"),
    "batch size": (["-b", 0], "--batch-size is 0"),
    "device": (["--device", "warp"], "device warp is not there"),
    "dtype": (["--dtype", "float8"], "--dtype is float8; it must be one of float32, bfloat16"),
    "averages": (["--ema", "0.5"], "0.5"),
    "a flag's name": (["--set", "seed=3"], "--set seed=3: that is --seed"),
    "a flag by another name": (["--set", "classes=cat"], "--set classes=cat: that is --class"),
    "Python's alone": (["--set", "strength=1"], "no sampler and no grid has an option of that name"),
    "text for a number": (["--sampler", "langevin", "--set", "step_size=abc"], "step_size is 'abc'; it must be"),
    "empty class": (["--class", ""], "--class is empty"),
    "empty folder": (["--out", ""], "--out is empty"),
    "vocabulary": (["--vocabulary", "nope"], "vocabulary nope has no effect"),
    "a device that computes nothing": (["--device", "meta"], "device meta is not there"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(refused, models, what):
    """RELIABILITY 6, case 23: the key, the value and what is allowed; nothing made."""
    words, line = REFUSED[what]
    lines = refused(2, "sample", models / "classes", *words)
    assert len(lines) == 1
    assert line in lines[0]


def test_a_model_without_classes_takes_none(refused, models):
    assert "has no classes" in refused(2, "sample", models / "plain", "--class", 1)[0]
    assert "has no classes" in refused(2, "sample", models / "plain", "--class", "all")[0]


def test_all_that_is_wrong_at_once(refused, models):
    lines = refused(2, "sample", models / "plain", "--steps", 0, "--eta", 2, "--sampler", "x", "-n", -1)
    assert len(lines) == 4


def test_a_model_is_needed(refused):
    assert "missing MODEL" in refused(2, "sample")[0]
    assert "there is no runs/none" in refused(2, "sample", "runs/none")[0]
    assert "fetches nothing" in refused(2, "sample", "google/ddpm-cat-256")[0]


def test_a_folder_that_is_none(refused, models, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "file is a file" in refused(2, "sample", models / "plain", "--out", "file")[0]
    assert "file is a file" in refused(2, "sample", models / "plain", "--out", "file/inside")[0]


def test_a_folder_that_cannot_be_written(refused, models, monkeypatch):
    monkeypatch.setattr("reverie.cli.sample.os.access", lambda path, mode: False)
    (line,) = refused(6, "sample", models / "plain")
    assert "can't be written to; choose another folder" in line


def test_what_is_no_model(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "web.safetensors").write_text("<html>")
    assert "is no model" in refused(4, "sample", "empty")[0]
    assert "web page" in refused(4, "sample", "web.safetensors")[0]


def test_weights_that_explode_make_no_picture(refused, models, tmp_path):
    """RELIABILITY 6, case 26."""
    shutil.copytree(models / "plain", tmp_path / "huge")
    (tmp_path / "huge" / "reverie.json").unlink()  # it has the checksums
    (file,) = (tmp_path / "huge").rglob("*.safetensors")
    save_file({name: 1e30 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    shutil.rmtree(tmp_path / "outputs", ignore_errors=True)
    before = sorted(tmp_path.rglob("*"))
    from click.testing import CliRunner

    from reverie.cli.main import cli

    outcome = CliRunner().invoke(cli, ["sample", "huge", "-n", "2", "--steps", "3", "--no-clip"])
    assert outcome.exit_code == 5, outcome.stderr
    assert outcome.stderr.splitlines()[-1].startswith("error: ")
    assert "step 1" in outcome.stderr
    assert outcome.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


# Interrupted, and short of memory -------------------------------------------------------------


@pytest.mark.parametrize(("signal", "code"), [(KeyboardInterrupt(), 130), ("terminated", 143)])
def test_what_was_drawn_before_a_signal_stays(reverie, models, monkeypatch, signal, code):
    from reverie.base.errors import Stopped

    real, calls = Model.execute, []

    def execute(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise Stopped("", 15) if signal == "terminated" else signal
        return real(self, *arguments)

    monkeypatch.setattr(Model, "execute", execute)
    outcome = reverie("sample", models / "plain", "-n", 5, "-b", 2, "--steps", 1, "--out", "o")
    assert outcome.exit_code == code
    assert outcome.stderr.splitlines()[-1] == "stopped; 2 of 5 pictures are in o"
    assert len(list(Path("o").iterdir())) == 2


def test_memory_that_is_short(reverie, models, monkeypatch):
    """RELIABILITY 6, case 19: the numbers, and what to lower."""
    monkeypatch.setattr("reverie.models.memory.free_memory", lambda device: 1000)
    outcome = reverie("sample", models / "plain", "--steps", 1)
    assert outcome.exit_code == 7
    last = outcome.stderr.splitlines()[-1]
    assert "are free; lower" in last
    assert not Path("outputs").exists()


def test_a_large_batch_is_announced(reverie, models, monkeypatch):
    monkeypatch.setattr(drawing, "LARGE", 1000)
    outcome = reverie("sample", models / "plain", "-n", 4, "--steps", 1)
    assert "a batch of 4 takes" in outcome.stderr


def test_a_model_of_points_is_sampled_from_python(refused, models, monkeypatch):
    card = Card(kind="points", shape=(2,), network=NetworkSpec(name="mlp", config={"in_channels": 2}))
    monkeypatch.setattr(drawing, "load", lambda path, **options: Model(build(card), card))
    assert "sample it from Python" in refused(2, "sample", models / "plain")[0]


# Kinds of guidance ----------------------------------------------------------------------------


def test_the_kinds_of_guidance_reach_the_record_and_the_picture_is_made_again(made, reverie):
    flags = [
        "--class",
        "cat",
        "--guidance",
        3,
        "--guidance-interval",
        "0.2,0.9",
        "--guidance-rescale",
        0.7,
        "--perturbed",
        2,
    ]
    made_of = made("-n", 1, "--seed", 3, *flags)
    settings = made_of["settings"]
    assert (settings["guidance_interval"], settings["guidance_rescale"], settings["perturbed"]) == (
        [0.2, 0.9],
        0.7,
        2.0,
    )
    assert made_of["evaluations"] == 3 + 2 * 2
    plain = made("-n", 1, "--seed", 3, *flags[:4])
    assert (pixels(made_of["files"][0]) != pixels(plain["files"][0])).any()
    outcome = reverie("sample", "--again", made_of["files"][0], "--json")
    assert json.loads(outcome.stdout)["difference"] == 0, outcome.stderr


def test_a_worse_model_guides_and_is_recorded(made, reverie, models):
    made_of = made("-n", 3, "-b", 2, "--seed", 3, "--class", "cat", "--bad", models / "classes", "--auto-guidance", 2)
    settings = made_of["settings"]
    assert settings["auto_guidance"] == 2.0
    assert settings["bad"] == {"source": str(models / "classes"), "sha256": load(models / "classes").digest}
    assert made_of["evaluations"] == 6
    assert json.loads(reverie("sample", "--again", made_of["files"][2], "--json").stdout)["difference"] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--guidance-interval", "0.2,0.8"], "guidance_interval has no effect at guidance None"),
        (["--guidance-interval", "0.2"], "guidance_interval is 0.2; it must be two times"),
        (["--guidance-interval", "0.1,0.2,0.3"], "2 at most"),
        (["--guidance-rescale", 2], "--guidance-rescale is 2.0; it must be a number, 0 <= x <= 1"),
        (["--perturbed", "nan"], "--perturbed is nan"),
        (["--auto-guidance", 2], "autoguidance needs both"),
        (["--bad", "x"], "autoguidance needs both"),
        (["--bad", "nowhere", "--auto-guidance", 2], "nowhere"),
    ],
)
def test_guidance_that_is_wrong_or_without_effect(refused, models, words, said):
    assert said in refused(2, "sample", models / "classes", *words)[0]


def test_a_setting_that_has_a_flag_is_refused_by_that_flag(refused, models):
    (line,) = refused(2, "sample", models / "plain", "--set", "size=16")
    assert line == "--set size=16: that is --size"


def test_langevins_step_size_is_not_the_pictures_size(reverie, models):
    words = ("sample", models / "plain", "-n", 1, "--seed", 0, "--steps", 2, "--sampler", "langevin", "--json")
    found = [json.loads(reverie(*words, "--set", f"step_size={size}").stdout) for size in (0.1, 0.4)]
    assert [one["settings"]["options"]["step_size"] for one in found] == [0.1, 0.4]
    one, other = (Path(made["files"][0]).read_bytes() for made in found)
    assert one != other
