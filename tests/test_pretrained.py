"""The model that comes with the project: its file, its answers, what its card says of it."""

import csv
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, call, classify, read_table

import custom2_tester as tester

FOLDER = ROOT / "tests" / "pretrained"
MODEL = FOLDER / "crema_d.pth"
NAMES = ["Angry", "Disgust", "Fear", "Happy", "Neutral", "Sad"]
needs_model = pytest.mark.skipif(not MODEL.is_file(), reason=f"{MODEL} is not there")


@pytest.fixture(scope="module")
def dozen(tmp_path_factory):
    """The dozen synthetic clips of which expected.csv tells the answers."""
    from synthetic_corpus import make_corpus

    folder = tmp_path_factory.mktemp("dozen")
    make_corpus(folder, actors=2, takes=1, seed=0)
    return folder


@pytest.fixture(scope="module")
def checkpoint():
    """What the shipped file holds."""
    if not MODEL.is_file():
        pytest.skip(f"{MODEL} is not there")
    return torch.load(MODEL, map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def card():
    """The model card."""
    if not (FOLDER / "README.md").is_file():
        pytest.skip("there is no model card")
    return (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def predictions():
    """The answers on the test clips."""
    if not (FOLDER / "test_predictions.csv").is_file():
        pytest.skip("there is no test_predictions.csv")
    return read_table(FOLDER / "test_predictions.csv")


@pytest.fixture(scope="module")
def split():
    """Who trained, validated and tested."""
    if not (FOLDER / "split.csv").is_file():
        pytest.skip("there is no split.csv")
    return read_table(FOLDER / "split.csv")


# --------------------------------------------------------------------------------------
# Its answers


@needs_model
def test_a_tester_without_model_path_answers_as_expected(dozen, tmp_path):
    """And says which model it used. The answers hold for other machines' rounding, too."""
    paths = ("--input_dir", dozen, "--output_dir", tmp_path)
    text = call("custom2_tester", *paths)
    assert str(MODEL) in text
    found = read_table(tmp_path / "classification_results.csv")
    expected = read_table(FOLDER / "expected.csv")
    assert [row["file"] for row in found] == [row["file"] for row in expected]
    assert len(expected) == 12
    ours, theirs = (np.array([[float(r[n]) for n in NAMES] for r in t]) for t in (found, expected))
    assert np.abs(ours - theirs).max() < 0.02
    assert np.ptp(theirs, axis=0).max() > 0.3, "answers that hardly differ would show nothing"


@needs_model
def test_the_model_by_path_gives_the_same_answers(dozen, tmp_path):
    call("custom2_tester", "--input_dir", dozen, "--output_dir", tmp_path / "default")
    classify(dozen, MODEL, tmp_path / "named")
    tables = [tmp_path / name / "classification_results.csv" for name in ("default", "named")]
    assert tables[0].read_bytes() == tables[1].read_bytes()


def test_without_the_file_the_tester_asks_for_model_path(dozen, tmp_path, monkeypatch):
    monkeypatch.setattr(tester, "DEFAULT_MODEL", tmp_path / "absent.pth")
    paths = ("--input_dir", dozen, "--output_dir", tmp_path / "out")
    text = call("custom2_tester", *paths, code=2)
    assert "--model_path is needed" in text
    assert "absent.pth" in text


@needs_model
def test_clips_by_its_speakers_are_no_fair_test(dozen, split, tmp_path):
    """The synthetic actors bear the names of two that trained it."""
    known = {row["actor"] for row in split if row["split"] != "test"}
    n_known = sum(path.name.split("_")[0] in known for path in dozen.iterdir())
    assert n_known
    text = call("custom2_tester", "--input_dir", dozen, "--output_dir", tmp_path)
    assert f"Not a fair test: {n_known} of them" in text


# --------------------------------------------------------------------------------------
# Its file


def texts_of(value):
    """All texts in a checkpoint, keys and values."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from texts_of(key)
            yield from texts_of(inner)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from texts_of(inner)
    elif isinstance(value, str):
        yield value


def test_the_file_is_of_this_format_and_made_to_be_given_away(checkpoint):
    """No path: nothing of the machine on which it was trained."""
    assert checkpoint["format_version"] == tester.FORMAT_VERSION
    six = {"sample_rate", "n_fft", "hop_length", "n_mels", "fmin", "fmax"}
    assert checkpoint["mel_config"].keys() == six
    paths = [text for text in texts_of(checkpoint) if re.search(r"[/\\]", text)]
    assert not paths
    private = {"MEL_DIR", "OUTPUT_DIR", "START_FROM"}
    assert not checkpoint.get("training_config", {}).keys() & private
    data = MODEL.read_bytes()
    assert not re.search(rb"/(work|home|root|tmp|Users)/", data)


def test_the_file_knows_its_speakers_and_its_level(checkpoint, split):
    for part in ("train", "val"):
        actors = sorted({row["actor"] for row in split if row["split"] == part})
        assert sorted(checkpoint["speakers"][part]) == actors
    level = checkpoint["level"]
    assert level["low"] <= level["median"] - 8
    assert level["high"] >= level["median"] + 8
    assert len(checkpoint["floor"]) == 128
    assert checkpoint["distance"] > 0


def test_the_file_is_of_half_precision_and_computes_in_single(checkpoint):
    weights = checkpoint["model_state_dict"].values()
    kinds = {value.dtype for value in weights if value.is_floating_point()}
    assert kinds == {torch.float16}
    model, _ = tester.load_model(MODEL, torch.device("cpu"))
    assert {value.dtype for value in model.parameters()} == {torch.float32}


# --------------------------------------------------------------------------------------
# Its card


def test_the_card_names_source_and_licence(card):
    for words in ("CREMA-D", "Open Database License 1.0", "Database Contents License 1.0"):
        assert words in card
    assert "attribute CREMA-D" in card
    assert "10.1109/TAFFC.2014.2336244" in card
    assert "not for" in card


def recalls(predictions):
    """By emotion, the share that was found."""
    found = {}
    for name in NAMES:
        of_class = [row for row in predictions if row["true_class"] == name]
        found[name] = np.mean([row["predicted_class"] == name for row in of_class])
    return found


def test_the_cards_figures_are_those_of_the_predictions(card, predictions):
    uar = 100 * np.mean(list(recalls(predictions).values()))
    is_right = [row["predicted_class"] == row["true_class"] for row in predictions]
    accuracy = 100 * np.mean(is_right)
    line = re.search(r"^\| (\d+) unseen actors, ([\d,]+) clips \|(.+)$", card, re.M)
    n_actors = len({row["actor"] for row in predictions})
    assert int(line[1]) == n_actors
    assert int(line[2].replace(",", "")) == len(predictions)
    told = re.findall(r"([\d.]+) %", line[3])
    assert float(told[0]) == pytest.approx(uar, abs=0.051)
    interval = re.search(r"([\d.]+) to ([\d.]+)", line[3])
    assert float(interval[1]) < uar < float(interval[2])
    assert re.search(rf"\| {accuracy:.1f} % \|", line[3]), f"accuracy is {accuracy:.2f}"


def test_the_cards_figures_by_emotion_are_those_of_the_predictions(card, predictions):
    for name, recall in recalls(predictions).items():
        predicted = [row for row in predictions if row["predicted_class"] == name]
        precision = np.mean([row["true_class"] == name for row in predicted])
        n_clips = sum(row["true_class"] == name for row in predictions)
        [line] = re.findall(rf"^\| {name} \|.*$", card, re.M)
        cells = [cell.strip(" %") for cell in line.strip("|").split("|")]
        told = [float(cell.replace(",", "")) for cell in cells[1:]]
        assert told == pytest.approx([100 * recall, 100 * precision, n_clips], abs=0.051)


def test_the_card_and_the_predictions_are_of_the_split(card, predictions, split):
    tested = {row["stem"] for row in split if row["split"] == "test"}
    assert {row["stem"] for row in predictions} == tested
    parts = {part: [r for r in split if r["split"] == part] for part in ("train", "val", "test")}
    actors = {part: {row["actor"] for row in rows} for part, rows in parts.items()}
    assert not actors["train"] & (actors["val"] | actors["test"])
    assert not actors["val"] & actors["test"]
    line = re.search(r"^\| split \|(.+)$", card, re.M)[1]
    told = re.findall(r"(\d+)(?: actors)? (?:train|validate|test) \(([\d,]+) clips", line)
    expected = [(str(len(actors[part])), f"{len(parts[part]):,}") for part in parts]
    assert told == expected


def test_the_expected_answers_are_probabilities():
    if not (FOLDER / "expected.csv").is_file():
        pytest.skip("there is no expected.csv")
    with (FOLDER / "expected.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", *NAMES]
    for row in rows:
        assert sum(float(row[name]) for name in NAMES) == pytest.approx(1, abs=1e-5)
