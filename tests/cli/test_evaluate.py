"""`reverie evaluate`: one object on standard output, refusals with their codes, Ctrl-C that leaves nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

PIXELS = ("--features", "pixels", "--steps", 1, "-n", 60)


@pytest.fixture
def pictures(tmp_path, reverie, models):
    """A folder of 60 pictures that a model drew, without a sheet."""
    outcome = reverie(
        "sample", models / "plain", "-n", 60, "--steps", 1, "--no-grid-picture", "--seed", 0, "--out", "drawn"
    )
    assert outcome.exit_code == 0, outcome.output
    return tmp_path / "drawn"


def test_json_is_one_object_and_nothing_else(reverie, models):
    outcome = reverie("evaluate", models / "plain", "--against", "digits", *PIXELS, "--json")
    assert outcome.exit_code == 0, outcome.output
    found = json.loads(outcome.stdout)
    assert set(found["metrics"]) == {"frechet", "kid", "precision", "recall", "density", "coverage", "nearest"}
    assert found["metrics"]["frechet"]["seed"] == 0
    assert found["against"]["source"] == "digits"
    assert "60 samples of 1x8x8" in outcome.stderr


def test_the_same_samples_as_those_of_reverie_sample(reverie, models, pictures):
    """A model's figures are those of the folder that it drew: the same seeds, settings and number."""
    of_model = json.loads(reverie("evaluate", models / "plain", "--against", "digits", *PIXELS, "--json").stdout)
    of_folder = json.loads(
        reverie("evaluate", pictures, "--against", "digits", "--features", "pixels", "--json").stdout
    )
    for name in ("frechet", "precision", "coverage", "nearest"):
        one, other = (found["metrics"][name]["value"] for found in (of_model, of_folder))
        assert one == pytest.approx(other, rel=1e-6), name
    assert of_folder["subject"]["kind"] == "pictures"
    assert of_folder["samples"]["n"] == 60


def test_lines_for_reading_and_a_picture(reverie, models, tmp_path):
    words = ("--metrics", "frechet,nearest", "--picture", "near.png")
    outcome = reverie("evaluate", models / "plain", "--against", "digits", *PIXELS, *words)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout.startswith("frechet ")
    assert "fingerprint pixels-1x8x8" in outcome.stdout
    with Image.open(tmp_path / "near.png") as picture:
        assert picture.size[0] > 6 * 56


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("plain", "--against", "digits", "--metrics", "fid"), 2, "--metrics is"),
        (("plain",), 2, "--against is missing"),
        (("plain", "--against", "digits", "--images", "3"), 2, "--images: of metric likelihood"),
        (("plain", "--against", "digits", "--metrics", "gap"), 2, "gap needs images"),
        (("plain", "--against", "shapes:16,count=200"), 2, "the samples are 8x8"),
        (("nowhere", "--against", "digits"), 2, "there is no"),
        (("plain", "--against", "nowhere"), 2, "'nowhere' is no file or folder"),
        (("plain", "--against", "digits", "--picture", "no/such/x.png", "-n", "9"), 2, "50 of each"),
    ],
)
def test_refusals(refused, models, words, code, says):
    words = tuple(str(models / "plain") if word == "plain" else word for word in words)
    assert any(says in line for line in refused(code, "evaluate", *words))


def test_what_is_of_models_is_refused_for_pictures(reverie, pictures):
    for words, says in (
        (("--metrics", "likelihood"), "metric likelihood is of a model"),
        (("--sampler", "ddim"), "--sampler: of models"),
        (("--seed", "3"), "--seed: of models"),
    ):
        outcome = reverie("evaluate", pictures, "--against", "digits", *words)
        assert outcome.exit_code == 2
        assert says in outcome.stderr


def test_pictures_of_another_size_are_refused_by_both(reverie, pictures):
    outcome = reverie("evaluate", pictures, "--against", "shapes:16,count=200,groups=1", "--metrics", "nearest")
    assert outcome.exit_code == 2
    assert "8x8 (1 channel)" in outcome.stderr
    assert "16x16 (1 channel)" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_a_folder_of_nothing_is_no_subject(reverie, tmp_path):
    (tmp_path / "empty").mkdir()
    outcome = reverie("evaluate", tmp_path / "empty", "--against", "digits")
    assert outcome.exit_code in (3, 4)
    assert "Traceback" not in outcome.stderr


def test_ctrl_c_ends_with_130_and_leaves_nothing(tmp_path, models):
    words = ["--against", "digits", "-n", "200000", "--features", "pixels", "--picture", "near.png", "--steps", "100"]
    command = [sys.executable, "-m", "reverie", "evaluate", str(models / "plain"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr
        for line in child.stderr:
            if "200000 samples" in line:
                break
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        rest = child.stderr.read()
        assert child.wait(60) == 130
    assert "stopped; nothing was written" in rest
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_a_seed_that_is_random_is_none(reverie, models):
    """-1 is a random seed to sample; here it would leave the figure without one."""
    outcome = reverie("evaluate", models / "plain", "--against", "digits", "--seed", "-1")
    assert outcome.exit_code == 2
