"""custom2_tester.py: the trainer's figures again, the results' contract, resuming, bad input."""

import copy
import csv
import errno
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import ROOT, classify, generate, read_table, run, start, train, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, recall_score

import custom2_tester as tester

NAMES = ["Angry", "Disgust", "Fear", "Happy", "Neutral", "Sad"]
COLUMNS = ["file", "predicted_class", "predicted_code", "confidence", *NAMES]
COLUMNS += ["duration_s", "ignored_s", "level_db", "uncertain", "true_class", "error"]
TABLE, PARTIAL = "classification_results.csv", "classification_results.csv.partial"
RATE = 16000
TONE = (0.3 * np.sin(np.arange(RATE) / 5)).astype(np.float32)
HALF_SECONDS = ("--segments", "--window", 0.5, "--step", 0.5)


def results(folder):
    return read_table(folder / TABLE)


def by_file(folder):
    return {row["file"]: row for row in results(folder)}


def probabilities(row):
    return [float(row[name]) for name in NAMES]


def files_below(folder):
    """Every file's bytes by name, but for the note that tells the time."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name != "run.json"}


@contextmanager
def at_most(seconds):
    """Raises where the block waits for ever."""

    def stop(*_):
        raise AssertionError("waited in vain")  # a TimeoutError would be an OSError

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


@pytest.fixture(scope="module")
def model(trained):
    return trained / "best_model.pth"


@pytest.fixture(scope="module")
def unheard(corpus, trained, tmp_path_factory):
    """The audio of the trainer's test clips."""
    folder = tmp_path_factory.mktemp("unheard")
    for row in read_table(trained / "test_predictions.csv"):
        shutil.copy(corpus / f"{row['stem']}.wav", folder)
    return folder


@pytest.fixture
def few(corpus, tmp_path):
    """A folder of six clips that a test may change."""
    folder = tmp_path / "in"
    folder.mkdir()
    for path in sorted(corpus.iterdir())[::8]:
        shutil.copy(path, folder)
    return folder


# --------------------------------------------------------------------------------------
# The trainer's figures, the files' contract


def assert_the_trainers_answers(output_dir, trained):
    """That the tester's probabilities are the trainer's, of a model whose answers differ."""
    ours = pd.DataFrame(results(output_dir)).set_index("file")
    theirs = pd.read_csv(trained / "test_predictions.csv").set_index("stem")
    theirs.index += ".wav"
    assert (theirs[NAMES].max() - theirs[NAMES].min()).max() > 0.05
    difference = ours.loc[theirs.index, NAMES].astype(float) - theirs[NAMES]
    assert difference.abs().max().max() < 1e-4
    assert (ours.loc[theirs.index].predicted_class == theirs.predicted_class).all()


def test_the_trainers_test_figures_again(trained, model, unheard, tmp_path):
    text = classify(unheard, model, tmp_path, "--cpu", "--batch_size", 4)
    assert_the_trainers_answers(tmp_path, trained)
    test = json.loads((trained / "metrics.json").read_text())["test"]
    figures = f"accuracy {100 * test['accuracy']:.1f} %, UAR {100 * test['uar']:.1f} %"
    assert figures in text
    assert figures in (tmp_path / "classification_report.txt").read_text()


def test_outputs_are_those_of_the_contract(model, unheard, tmp_path):
    text = classify(unheard, model, tmp_path, "--visualize", "--workers", 1)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {
        *(TABLE, "summary.csv", "confidence_distribution.png", "confusion_matrix.png"),
        *("classification_report.txt", "mel_spectrograms", "report.html", "run.json"),
    }
    header = (tmp_path / TABLE).read_text().splitlines()[0]
    assert header == ",".join(COLUMNS)
    rows = results(tmp_path)
    assert [row["file"] for row in rows] == sorted(path.name for path in unheard.iterdir())
    for row in rows:
        assert sum(probabilities(row)) == pytest.approx(1, abs=1e-5)
        assert float(row["confidence"]) == max(probabilities(row))
        assert row["predicted_class"] == NAMES[int(np.argmax(probabilities(row)))]
        assert row["predicted_class"][:3].upper() == row["predicted_code"]
        seconds = soundfile.info(unheard / row["file"]).duration
        assert float(row["duration_s"]) == pytest.approx(seconds, abs=1e-3)
        assert row["true_class"][:3].upper() == row["file"].split("_")[2]
        assert row["error"] == row["uncertain"] == ""
        assert row["file"] in text
    pictures = {path.name for path in (tmp_path / "mel_spectrograms").iterdir()}
    assert pictures == {f"{path.name}.png" for path in unheard.iterdir()}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.rglob("*.png"))
    record = json.loads((tmp_path / "run.json").read_text())
    assert {"command", "versions", "platform", "model_sha256", "seconds"} <= record.keys()


def test_summary_counts_the_table(corpus, model, tmp_path):
    classify(corpus, model, tmp_path, "--cpu")
    rows = results(tmp_path)
    summary = pd.read_csv(tmp_path / "summary.csv")
    assert summary["class"].tolist() == NAMES
    for line in summary.itertuples():
        confidence = [float(row["confidence"]) for row in rows if row["predicted_class"] == line._1]
        assert line.count == len(confidence)
        assert line.percentage == pytest.approx(100 * len(confidence) / len(rows), abs=0.01)
        if confidence:
            assert line.mean_confidence == pytest.approx(np.mean(confidence), abs=1e-4)
        else:
            assert math.isnan(line.mean_confidence)


def test_figures_where_some_emotions_are_rarer(corpus, model, tmp_path):
    """Where every emotion is as frequent, UAR is accuracy."""
    (tmp_path / "in").mkdir()
    by_emotion = sorted(corpus.iterdir(), key=lambda path: path.name.split("_")[2])
    for i, path in enumerate(by_emotion[:40]):
        if i % 3:
            shutil.copy(path, tmp_path / "in")
    text = classify(tmp_path / "in", model, tmp_path / "out", "--cpu")
    rows = results(tmp_path / "out")
    true, predicted = ([row[name] for row in rows] for name in ("true_class", "predicted_class"))
    accuracy = accuracy_score(true, predicted)
    uar = recall_score(true, predicted, average="macro", labels=sorted(set(true)))
    assert abs(accuracy - uar) > 0.001
    assert f"accuracy {100 * accuracy:.1f} %, UAR {100 * uar:.1f} %" in text


def test_features_travel_in_the_checkpoint_and_the_tester_works_alone(corpus, tmp_path):
    generate(corpus, tmp_path / "mels", "--n_mels", 64, "--hop_length", 256, "--no_augment")
    train(tmp_path / "run", tmp_path / "mels", MAX_WIDTH=60, EPOCHS=15)
    model = tmp_path / "run/output/best_model.pth"
    (tmp_path / "alone").mkdir()
    script = shutil.copy(ROOT / "custom2_tester.py", tmp_path / "alone")
    paths = ("--input_dir", corpus, "--model_path", model, "--output_dir", tmp_path / "out")
    text = run(script, *paths, cwd=tmp_path)
    assert_the_trainers_answers(tmp_path / "out", tmp_path / "run/output")
    assert re.search(r"longer than 60 frames.*[\d.]+ s", text)
    assert "longer than" not in classify(corpus, model, tmp_path / "whole", "--max_width", 1000)


def test_voices_of_the_training_are_told(corpus, trained, model, unheard, tmp_path):
    text = classify(corpus, model, tmp_path)
    known = [row for row in read_table(trained / "split.csv") if row["split"] != "test"]
    assert re.search(rf"Not a fair test\D*{len(known)} ", text)
    assert "Not a fair test" in (tmp_path / "classification_report.txt").read_text()
    assert "Not a fair test" not in classify(unheard, model, tmp_path)
    checkpoint = torch.load(model, weights_only=True)
    folder = tmp_path / "case"
    folder.mkdir()
    shutil.copy(next(unheard.iterdir()), folder / "anna_DFA_ANG_XX.wav")
    torch.save(checkpoint | {"speakers": {"train": ["Anna"]}}, tmp_path / "anna.pth")
    assert "Not a fair test: 1 of" in classify(folder, tmp_path / "anna.pth", tmp_path / "out")
    for part in ("train", "val"):
        names = checkpoint["speakers"][part]
        only = {"train": [], "val": []} | {part: names}
        torch.save(checkpoint | {"speakers": only}, tmp_path / "other.pth")
        text = classify(corpus, tmp_path / "other.pth", tmp_path / "out")
        assert re.search(rf"Not a fair test\D*{6 * len(names)} ", text)


@pytest.mark.parametrize("n_named, n_others", [(3, 2), (2, 2), (0, 3)])
def test_names_tell_labels_only_if_more_than_half_have_one(n_named, n_others, capsys):
    classes = [{"code": name[:3].upper(), "name": name} for name in NAMES]
    named = [f"sub/1001_x_sAd_{i}.wav" for i in range(n_named)]
    paths = [*named, *(f"OAF_back_happy_{i}.wav" for i in range(n_others))]
    labels = tester.find_labels(paths, classes, None)
    known = {path: {"true_class": "Sad"} for path in named}
    assert labels == (known if n_named > n_others else {})
    assert ("Note" in capsys.readouterr().out) == (0 < n_named <= n_others)


def test_too_few_labels_leave_no_figures(few, model, tmp_path):
    for path in sorted(few.iterdir())[:3]:
        path.rename(few / f"{path.stem[-2:]}{path.name[:4]}.wav")
    text = classify(few, model, tmp_path / "out")
    assert "accuracy" not in text
    assert not (tmp_path / "out/confusion_matrix.png").exists()
    assert {row["true_class"] for row in results(tmp_path / "out")} == {""}


def test_ignored_seconds_and_uncertain_rows(speech, model, tmp_path):
    text = classify(speech, model, tmp_path, "--min_confidence", 0.999)
    rows = by_file(tmp_path)
    ignored = soundfile.info(speech / "long.wav").duration - 191 * 512 / RATE
    assert float(rows["long.wav"]["ignored_s"]) == pytest.approx(ignored, abs=1e-3)
    assert rows["short.wav"]["ignored_s"] == "0.000"
    assert rows["broken.wav"]["ignored_s"] == rows["broken.wav"]["uncertain"] == ""
    assert rows["long.wav"]["uncertain"] == rows["short.wav"]["uncertain"] == "yes"
    assert re.search("2 files.*uncertain", text) and f"{ignored:,.1f} s" in text
    confidence = [float(rows[name]["confidence"]) for name in ("long.wav", "short.wav")]
    between = np.mean(confidence)
    text = classify(speech, model, tmp_path, "--min_confidence", between)
    assert re.search("1 file .*uncertain", text)
    for row in results(tmp_path):
        if not row["error"]:
            assert row["uncertain"] == ("yes" if float(row["confidence"]) < between else "no")


# --------------------------------------------------------------------------------------
# Names and bad files


def write_bad_files(folder):
    """A file of each kind that cannot be used, with words that its reason must hold."""
    at_7 = np.arange(RATE) == 7
    sounds = {
        "none": (TONE[:0], "without samples"),
        "short": (TONE[:511], "shorter than one hop"),
        "silent": (np.zeros(RATE), "silent"),
        "dc": (np.full(RATE, 0.5), "silent"),
        "nan": (np.where(at_7, np.nan, TONE), "not finite"),
        "inf": (np.where(at_7, np.inf, TONE), "not finite"),
        "integers": (32768 * TONE, "beyond full scale"),
    }
    for name, (samples, _) in sounds.items():
        soundfile.write(folder / f"{name}.wav", samples, RATE, subtype="FLOAT")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "lfs.wav").write_text(pointer)
    (folder / "zero.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is no sound\n" * 50)
    (folder / "link.wav").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.wav")
    words = {f"{name}.wav": word for name, (_, word) in sounds.items()}
    return words | {
        "lfs.wav": "git lfs pull",
        "zero.wav": "0 bytes",
        "text.wav": "unreadable",
        "link.wav": "unreadable: No such file",
        "pipe.wav": "regular file",
    }


def test_every_bad_file_has_its_row(few, model, tmp_path):
    words = write_bad_files(few)
    (few / "folder.wav").mkdir()
    text = classify(few, model, tmp_path / "out")
    rows = by_file(tmp_path / "out")
    assert len(rows) == 6 + len(words)
    for name, word in words.items():
        assert word in rows[name]["error"], name
        assert rows[name]["confidence"] == rows[name]["predicted_class"] == ""
    assert f"{len(words)} of {len(rows)} files could not be classified" in text
    assert sum(int(row["count"]) for row in read_table(tmp_path / "out/summary.csv")) == 6
    classify(few, model, tmp_path / "out", "--strict", code=1)


def test_where_no_file_can_be_classified_the_run_says_so(model, few, tmp_path):
    out = tmp_path / "out"
    classify(few, model, out)
    for path in few.iterdir():
        path.write_bytes(b"RIFF")
    text = classify(few, model, out, code=1)
    assert "No file could be classified" in text and "unreadable" in text
    # Nothing stands there that tells of the run before.
    assert sorted(path.name for path in out.iterdir()) == [TABLE, "run.json"]


@pytest.fixture
def closed(few, monkeypatch):
    """`few` with a subfolder that cannot be entered, even by root."""
    (few / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if isinstance(path, str) and path.endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    return few


def test_a_closed_subfolder_has_its_row(closed, model, tmp_path):
    for options in ((), ("--resume",)):
        text = classify(closed, model, tmp_path / "out", *options)
        rows = by_file(tmp_path / "out")
        assert len(rows) == 7 and "cannot be entered" in rows["closed/"]["error"]
        assert "1 of 7 files could not be classified" in text


AWKWARD = (
    *("=1+1.wav", "-x.WAV", "+.wav", "@a.wav", "'plain.wav", "new\nline.wav"),
    *("a\rb.wav", "\tt.wav", 'quo"te.wav', "sub, folder/b c.wav", "=sub/x.wav", "ünï😀.wav"),
    *("$x$.wav", "\x1b[31mred.wav", os.fsdecode(b"J\xfcrgen.wav"), "n" * 251 + ".wav"),
    *("a.wav", "a.flac", "a.wav.wav", "a.png/b.wav", "a.wav.png/b.wav"),
)


@pytest.fixture
def awkward(corpus, tmp_path):
    """One clip under names that tables, spreadsheets, terminals and pictures choke on."""
    folder = tmp_path / "awkward"
    for name in AWKWARD:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(min(corpus.iterdir()), folder / name)
    return folder


def shown_path(name):
    """A path as the table shows it."""
    return f"./{name}" if name[0] in "=+-@\t\r" else name


def test_awkward_names_get_rows_and_pictures(awkward, model, tmp_path):
    out = tmp_path / "out"
    text = classify(awkward, model, out, "--visualize", "--workers", 1)
    rows = by_file(out)
    assert rows.keys() == set(map(shown_path, AWKWARD))
    assert not any(row["error"] for row in rows.values())
    answers = np.array([probabilities(row) for row in rows.values()])
    assert np.ptp(answers, axis=0).max() < 1e-5
    assert "\x1b" not in text and "a\rb" not in text
    pictures = [path for path in (out / "mel_spectrograms").rglob("*") if path.is_file()]
    assert len(pictures) == len(AWKWARD)
    for name in ("a.wav.png", "a.flac.png", "a.wav.wav.png", "sub, folder/b c.wav.png"):
        assert (out / "mel_spectrograms" / name).is_file()


def test_control_characters_are_printed_escaped(corpus, model, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(min(corpus.iterdir()), tmp_path / "in/\x1b[31mred\x07.wav")
    text = classify(tmp_path / "in", model, tmp_path / "out")
    assert "\x1b" not in text and "\x07" not in text
    assert "\\x1b[31mred\\x07.wav" in text


def test_awkward_names_are_read_back_by_resume(awkward, model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    classify(awkward, model, out, "--cpu")
    whole = (out / TABLE).read_bytes()
    forbid_classifying(monkeypatch)
    for ending in ("", ".partial"):
        if ending:
            interrupt(out)
        classify(awkward, model, out, "--cpu", "--resume")
        assert (out / TABLE).read_bytes() == whole


@pytest.mark.parametrize("name", ["'=1.wav", "''=1.wav", "'+a.wav", "'=sub/a.wav"])
def test_a_name_that_begins_with_an_apostrophe_is_read_back(
    corpus, model, tmp_path, monkeypatch, name
):
    (tmp_path / "in" / name).parent.mkdir(parents=True)
    shutil.copy(min(corpus.iterdir()), tmp_path / "in" / name)
    classify(tmp_path / "in", model, tmp_path / "out")
    assert [row["file"] for row in tester.read_csv(tmp_path / "out" / TABLE)] == [name]
    forbid_classifying(monkeypatch)
    classify(tmp_path / "in", model, tmp_path / "out", "--resume")


def test_a_table_is_as_spreadsheets_may_open_it(awkward, model, tmp_path):
    classify(awkward, model, tmp_path, *HALF_SECONDS)
    for name in (TABLE, "segments.csv", "summary.csv"):
        data = (tmp_path / name).read_bytes()
        assert not data.startswith(b"\xef\xbb\xbf") and b"\r\n" not in data
        with (tmp_path / name).open(newline="", errors="surrogateescape") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert cells and not [cell for cell in cells if re.match(r"[=+\-@\t\r]", cell)]


def is_number(text):
    """Numbers stay as they are: a level of "-0.25"."""
    return re.fullmatch(r"-?\d+\.\d+", text)


def test_classes_that_a_spreadsheet_would_run_are_made_harmless(few, model, tmp_path):
    """A stranger's model names its classes; their probabilities are there all the same."""
    checkpoint = torch.load(model, weights_only=True)
    names = ["=1+1", "+A1", "@SUM(A1)", "-cmd", "Neutral", "Sad"]
    classes = [{"code": name, "name": name} for name in names]
    torch.save(checkpoint | {"classes": classes}, tmp_path / "other.pth")
    classify(few, tmp_path / "other.pth", tmp_path / "out", *HALF_SECONDS)
    for name in (TABLE, "segments.csv", "summary.csv"):
        with (tmp_path / "out" / name).open(newline="") as file:
            header, *rows = csv.reader(file)
        cells = [cell for row in [header, *rows] for cell in row]
        assert not [c for c in cells if re.match(r"[=+\-@\t\r]", c) and not is_number(c)]
        if name != "summary.csv":
            first = header.index("confidence") + (name == TABLE or 1)
            for row in rows:
                assert sum(map(float, row[first : first + 6])) == pytest.approx(1, abs=1e-4)


def file_names():
    """What a file may be called, as Python tells it: any bytes but NUL and the slash."""
    special = st.text("=+-@'\t\r\n./ \",0a", max_size=6).map(str.encode)
    raw = (
        st.binary(max_size=12)
        | special
        | st.text(max_size=6).map(lambda text: text.encode("utf-8", "surrogatepass"))
    )
    return raw.map(lambda b: os.fsdecode(b.replace(b"\0", b"")))


NUMBERS = ("-0.5", "+1", "-inf", "-1e-5", "0.5", "-7")


@settings(deadline=None, max_examples=300)
@given(rows=st.lists(st.tuples(file_names(), file_names() | st.sampled_from(NUMBERS)), max_size=5))
def test_read_csv_undoes_what_write_csv_did(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "property.csv"
    # No path below a folder begins with "./".
    rows = [{"file": re.sub(r"^(\./+)+", "", f) or "x", "error": e} for f, e in rows]
    tester.write_csv(path, ["file", "error"], rows)
    assert tester.read_csv(path) == rows
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        for cell in [cell for row in csv.reader(file) for cell in row]:
            if cell.startswith(("=", "+", "-", "@", "\t", "\r")):
                float(cell)


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_stay_as_they_are_in_a_table(number):
    assert tester.csv_lines(["score"], [{"score": number}]) == f"{number}\n".encode()


def audio_paths():
    """Paths of sound files below a folder, many of them alike."""
    part = st.sampled_from(("a", "a.wav", "a.png", "a.wav.png", "a.png_", "ü" * 120, "n" * 240))
    names = st.builds(lambda stem, ending: stem + ending, part, st.sampled_from((".wav", ".flac")))
    return st.builds(lambda folders, name: "/".join([*folders, name]), st.lists(part), names)


@given(paths=st.sets(audio_paths(), max_size=6))
def test_no_two_files_share_a_picture(paths):
    pictures = {path: tester.picture_path(path) for path in paths}
    assert len(set(pictures.values())) == len(paths)
    folders = {str(p) for name in pictures.values() for p in Path(name).parents}
    assert not folders & set(pictures.values()), "a picture is in a folder's way"
    for name in pictures.values():
        assert all(len(os.fsencode(part)) <= 255 for part in name.split("/"))


def test_names_of_255_bytes_that_begin_alike_have_pictures_of_their_own():
    names = ["n" * 250 + f"{i}.wav" for i in range(3)]
    names += ["n" * (251 - i) + ".wav" for i in range(6)]
    assert len({tester.picture_path(name) for name in names}) == len(set(names))
    assert all(len(tester.picture_path(name).split("/")[-1]) <= 255 for name in names)


def test_one_file_as_input(corpus, model, tmp_path):
    source = min(corpus.iterdir())
    text = classify(source, model, tmp_path)
    assert [row["file"] for row in results(tmp_path)] == [source.name]
    assert source.name in text


def test_a_pipe_as_input_is_refused_at_once(model, tmp_path):
    os.mkfifo(tmp_path / "sound.wav")
    out = tmp_path / "out"
    with at_most(60):
        assert "regular file" in classify(tmp_path / "sound.wav", model, out, code=1)


@pytest.mark.parametrize("name", [TABLE, PARTIAL, "run.json", "run.json.partial"])
def test_pipes_among_the_results_are_refused_at_once(corpus, model, tmp_path, name):
    out = tmp_path / "out"
    classify(min(corpus.iterdir()), model, out)
    if name.endswith(".partial"):
        interrupt(out)
    (out / name).unlink()
    os.mkfifo(out / name)
    with at_most(20):
        assert name in classify(min(corpus.iterdir()), model, out, "--resume", code=1)


# --------------------------------------------------------------------------------------
# Arguments and folders


WRONG = {
    "batch_size": ("--batch_size", 0),
    "workers": ("--workers", -1),
    "max_width": ("--max_width", 0),
    "min_confidence": ("--min_confidence", 1.5),
    "give --step, at most 1": ("--segments", "--window", 1),
    "for --segments": ("--window", 1),
    "step": ("--segments", "--step", 4),
    "window": ("--window", 5),
    "window ": ("--segments", "--window", "nan"),
    "I/N": ("--shard", "3/3"),
    "I/N ": ("--shard", "x"),
    "merge": ("--merge",),
}


@pytest.mark.parametrize("word", WRONG)
def test_wrong_arguments_exit_with_2(few, model, tmp_path, word):
    assert word.strip() in classify(few, model, tmp_path / "out", *WRONG[word], code=2)
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_on_the_command_line(tmp_path):
    assert "--model_path" in run(ROOT / "custom2_tester.py", "--input_dir", tmp_path, code=2)


def test_folders_that_cannot_be_used_are_told(corpus, model, tmp_path):
    assert "does not exist" in classify(tmp_path / "absent", model, tmp_path / "out", code=1)
    (tmp_path / "empty").mkdir()
    assert "no sound file" in classify(tmp_path / "empty", model, tmp_path / "out", code=1)
    (tmp_path / "file").write_text("x")
    assert "no sound file" in classify(tmp_path / "file", model, tmp_path / "out", code=1)
    source = min(corpus.iterdir())
    assert str(tmp_path / "file") in classify(source, model, tmp_path / "file/out", code=1)
    long_window = ("--segments", "--window", 10, "--step", 5)
    text = classify(source, model, tmp_path / "out", *long_window, code=1)
    assert "longer than --max_width" in text


@pytest.mark.parametrize("name", ["best_model.pth", "last_checkpoint.pth"])
def test_an_output_dir_that_holds_a_training_is_refused(few, model, tmp_path, name):
    (tmp_path / "out").mkdir()
    shutil.copy(model, tmp_path / "out" / name)
    for options in ((), ("--resume",), ("--shard", "0/2")):
        text = classify(few, model, tmp_path / "out", *options, code=1)
        assert "holds a training" in text and str(tmp_path / "out") in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_a_table_of_another_program_is_replaced(few, model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for options in ((), ("--resume",)):
        (out / TABLE).write_text("name;answer\nx;1\ny;2\n")
        classify(few, model, out, *options)
        assert len(results(out)) == 6


def test_a_second_run_replaces_what_the_last_one_wrote(few, model, tmp_path):
    """Pictures of files that are gone go, too; what is not the tester's stays."""
    out = tmp_path / "out"
    classify(few, model, out, *HALF_SECONDS)
    gone, stays = sorted(few.iterdir())[:2]
    for path in (gone, stays):
        picture = out / tester.picture_path(path.name)
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(b"\x89PNG")
    (out / "mel_spectrograms/mine.png").write_bytes(b"mine")
    (out / "notes.txt").write_text("mine")
    gone.unlink()
    classify(few, model, out, "--resume", *HALF_SECONDS)
    assert not (out / tester.picture_path(gone.name)).exists()
    assert (out / tester.picture_path(stays.name)).exists(), "its row was taken up"
    assert (out / "segments.csv").exists()
    classify(few, model, out)
    assert not (out / "segments.csv").exists()
    assert (out / "notes.txt").exists() and (out / "mel_spectrograms/mine.png").exists()


def test_a_picture_of_an_earlier_answer_does_not_stand_beside_a_new_one(few, model, tmp_path):
    out = tmp_path / "out"
    classify(few, model, out)
    picture = out / tester.picture_path(min(few.iterdir()).name)
    picture.parent.mkdir()
    picture.write_bytes(b"\x89PNG")
    min(few.iterdir()).write_bytes(b"RIFF")
    classify(few, model, out)
    assert not picture.exists(), "of a file that failed this time"


def test_one_run_writes_in_a_folder_at_a_time(few, model, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert "in use" in classify(few, model, tmp_path / "out", code=1)
    finally:
        os.close(descriptor)
    classify(few, model, tmp_path / "out")


# --------------------------------------------------------------------------------------
# Resuming, shards


def forbid_classifying(monkeypatch):
    def refuse(*_):
        raise AssertionError("classified again")

    monkeypatch.setattr(tester, "encode_clips", refuse)


def interrupt(folder, n_rows=None, torn=0):
    """Makes a finished folder one of a run that was killed after n_rows and `torn` bytes."""
    data = (folder / TABLE).read_bytes()
    if n_rows is not None:
        lines = data.splitlines(keepends=True)
        data = b"".join(lines[: 1 + n_rows]) + lines[1 + n_rows][:torn]
    (folder / PARTIAL).write_bytes(data)
    (folder / TABLE).unlink()
    (folder / "run.json").rename(folder / "run.json.partial")


def mark(table, n_rows=1):
    """Changes the confidence of the first rows, to see whether they are kept; returns files."""
    lines = table.read_text().splitlines(keepends=True)
    for i in range(1, 1 + n_rows):
        lines[i] = lines[i].replace(lines[i].split(",")[3], "0.123456", 1)
    table.write_text("".join(lines))
    return {line.split(",")[0] for line in lines[1 : 1 + n_rows]}


def marked(folder):
    return {row["file"] for row in results(folder) if row["confidence"] == "0.123456"}


def test_runs_repeat_byte_for_byte(few, model, tmp_path):
    for name in ("one", "two"):
        classify(few, model, tmp_path / name, "--cpu")
    one, two = (files_below(tmp_path / name) for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("torn", [0, 3, 40])
def test_resume_takes_up_an_interrupted_run(few, model, tmp_path, torn):
    out = tmp_path / "out"
    classify(few, model, out, "--cpu")
    whole = by_file(out)
    kept = mark(out / TABLE, 3)
    interrupt(out, n_rows=3, torn=torn)
    classify(few, model, out, "--cpu", "--resume")
    found = by_file(out)
    assert marked(out) == kept and list(found) == list(whole)
    for name in found.keys() - kept:
        assert probabilities(found[name]) == pytest.approx(probabilities(whole[name]), abs=1e-5)
    assert not list(out.glob("*.partial"))


def test_a_table_is_read_up_to_a_power_cuts_mark(few, model, tmp_path):
    out = tmp_path / "out"
    classify(few, model, out, "--cpu")
    kept = mark(out / TABLE, 2)
    interrupt(out, n_rows=2, torn=30)
    with (out / PARTIAL).open("ab") as file:
        file.write(bytes(4096))
    classify(few, model, out, "--cpu", "--resume")
    assert marked(out) == kept and len(results(out)) == 6


def test_resume_of_a_finished_table_does_what_is_missing(few, corpus, model, tmp_path):
    out = tmp_path / "out"
    (few / "mended_x_SAD.wav").write_bytes(b"RIFF")
    classify(few, model, out)
    kept = mark(out / TABLE, 2)
    text = (out / TABLE).read_text().replace(",Angry,\n", ",Happy,\n")  # true_class
    (out / TABLE).write_text(text)
    shutil.copy(min(corpus.iterdir()), few / "mended_x_SAD.wav")
    shutil.copy(min(corpus.iterdir()), few / "new_x_FEA.wav")
    gone = max(path for path in few.iterdir() if path.name.startswith("1"))
    gone.unlink()
    classify(few, model, out, "--resume", "--strict")
    rows = by_file(out)
    assert marked(out) == kept
    assert rows.keys() == {path.name for path in few.iterdir()}
    for name, row in rows.items():
        assert row["predicted_class"]
        assert row["true_class"][:3].upper() == name.removesuffix(".wav").split("_")[2]


def test_labels_are_filled_afresh_by_resume(few, model, tmp_path, monkeypatch):
    classify(few, model, tmp_path / "out")
    assert all(row["true_class"] for row in results(tmp_path / "out"))
    for i in range(7):
        shutil.copy(min(few.iterdir()), few / f"z{i}.wav")
    classify(few, model, tmp_path / "out", "--resume")
    assert {row["true_class"] for row in results(tmp_path / "out")} == {""}, "fewer than half"


def test_resume_with_another_model_or_option_is_refused(few, model, tmp_path):
    out = tmp_path / "out"
    other = tmp_path / "other.pth"
    torch.save(torch.load(model, weights_only=True) | {"epoch": 99}, other)
    classify(few, model, out)
    for is_whole in (True, False):
        before = files_below(out)
        text = classify(few, model, out, "--resume", "--max_width", 50, code=1)
        assert re.search("max_width.*191.*50", text)
        text = classify(few, model, out, "--resume", "--min_confidence", 0.5, code=1)
        assert re.search("min_confidence.*None.*0.5", text)
        text = classify(few, model, out, "--resume", "--segments", code=1)
        assert re.search("segments.*False.*True", text)
        assert re.search("model was", classify(few, other, out, "--resume", code=1))
        assert files_below(out) == before
        if is_whole:
            interrupt(out)


def test_an_interrupted_run_goes_on_beside_a_finished_table_of_other_options(few, model, tmp_path):
    """As its last words promise: the same command with --resume."""
    out = tmp_path / "out"
    classify(few, model, out, "--cpu")
    kept = mark(out / TABLE, 3)
    interrupt(out, n_rows=3)
    classify(few, model, tmp_path / "earlier", "--cpu", "--max_width", 20)
    for name in (TABLE, "run.json"):
        (tmp_path / "earlier" / name).rename(out / name)
    classify(few, model, out, "--cpu", "--resume")
    assert marked(out) == kept and len(results(out)) == 6


def full_disk_at(monkeypatch, ending):
    """write_csv finds the disk full at tables whose path ends like this."""
    write_csv = tester.write_csv

    def write(path, *arguments):
        if str(path).endswith(ending):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_csv(path, *arguments)

    monkeypatch.setattr(tester, "write_csv", write)


@pytest.mark.parametrize("ending", ["summary.csv", f"/{TABLE}", "segments.csv"])
@pytest.mark.parametrize("is_first", [True, False], ids=["first run", "second run"])
def test_a_failure_after_classifying_loses_no_row(few, model, tmp_path, ending, is_first):
    out = tmp_path / "out"
    options = ("--cpu", *HALF_SECONDS)
    if not is_first:
        classify(few, model, out, *options)
    with pytest.MonkeyPatch.context() as patch:
        full_disk_at(patch, ending)
        text = classify(few, model, out, *options, code=1)
    assert ending.strip("/") in text and "--resume" in text
    with pytest.MonkeyPatch.context() as patch:
        forbid_classifying(patch)
        classify(few, model, out, *options, "--resume")
    assert len(results(out)) == 6 and (out / "summary.csv").exists()


def test_resuming_never_leaves_fewer_rows(few, model, tmp_path):
    """Where the disk is full when a resumed run takes up the rows, they stay."""
    out = tmp_path / "out"
    classify(few, model, out)
    interrupt(out, n_rows=4)
    before = (out / PARTIAL).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        full_disk_at(patch, PARTIAL)
        classify(few, model, out, "--resume", code=1)
    assert (out / PARTIAL).read_bytes() == before


def test_resume_draws_the_pictures_that_are_missing(few, model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    classify(few, model, out, "--visualize", "--workers", 1)
    first, *others = sorted(path.name for path in few.iterdir())
    pictures = [out / tester.picture_path(name) for name in others]
    for path in pictures:
        path.unlink()
    picture = out / tester.picture_path(first)
    picture.write_bytes(b"drawn")
    kept = mark(out / TABLE, 2)
    classify(few, model, out, "--resume", "--visualize", "--workers", 1)
    assert picture.read_bytes() == b"drawn" and marked(out) == kept - set(others)
    assert all(path.exists() for path in pictures)


def test_resume_does_not_take_an_earlier_answers_pictures_for_its_own(few, model, tmp_path):
    """Those of the run before, which drew; the interrupted one did not."""
    out = tmp_path / "out"
    classify(few, model, out, "--visualize", "--workers", 1)
    pictures = [out / tester.picture_path(path.name) for path in few.iterdir()]
    for path in pictures:
        path.write_bytes(b"of other options")
    options = ("--max_width", 60)
    classify(few, model, out, *options)
    for path in pictures:  # as if it had been interrupted: they go at a run's end
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of other options")
    interrupt(out, 2)
    text = classify(few, model, out, *options, "--resume", "--visualize", "--workers", 1)
    assert "All are classified anew: visualize was False, now True" in text
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_a_table_without_its_options_is_refused(few, model, tmp_path):
    out = tmp_path / "out"
    classify(few, model, out)
    (out / "run.json").unlink()
    text = classify(few, model, out, "--resume", code=1)
    assert f"{out / TABLE}: run.json was missing or unreadable." in text


def test_a_run_that_was_stopped_before_its_first_row_goes_on_as_it_promised(few, model, tmp_path):
    """Beside a finished table of other options."""
    out = tmp_path / "out"
    classify(few, model, out, "--max_width", 60)
    interrupt(out, n_rows=0)
    classify(few, model, tmp_path / "earlier")
    for name in (TABLE, "run.json"):
        (tmp_path / "earlier" / name).rename(out / name)
    classify(few, model, out, "--max_width", 60, "--resume")
    assert len(results(out)) == 6


def test_what_an_interrupted_run_left_goes_with_a_new_one(few, model, tmp_path):
    out = tmp_path / "out"
    classify(few, model, out, "--visualize", "--workers", 1)
    interrupt(out, n_rows=3)
    min(few.iterdir()).unlink()  # the table that was begun alone names it
    classify(few, model, out)
    assert not list(out.glob("mel_spectrograms/*"))
    classify(few, model, out, *HALF_SECONDS)
    interrupt(out, n_rows=0)
    (out / "segments.csv").rename(out / "segments.csv.partial")
    (out / "run.json.partial").unlink()
    classify(few, model, out, "--resume")
    assert not list(out.glob("*.partial"))


def test_a_stop_of_a_run_with_embeddings_advises_no_resume(few, model, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tester, "encode_clips", stop)
    text = classify(few, model, tmp_path / "out", code=130)
    assert "Stopped. To go on, run again with --resume." in text
    text = classify(few, model, tmp_path / "out", "--embeddings", code=130)
    assert "Stopped. To go on, run again." in text


def test_full_memory_is_a_sentence_and_a_fault_of_ours_is_not(few, model, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError(words)

    monkeypatch.setattr(tester, "encode_clips", fail)
    words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    text = classify(few, model, tmp_path / "out", "--cpu", code=1)
    assert "Memory is full: run again with --resume and a lower --batch_size" in text
    words = "shapes cannot be multiplied"
    with pytest.raises(RuntimeError, match="multiplied"):
        classify(few, model, tmp_path / "other", "--cpu", code=1)


def test_the_window_that_is_told_to_be_the_longest_is_taken(model, few, tmp_path):
    """At 44.1 kHz 191 frames are 2.2175 s, which must not be rounded up."""
    checkpoint = torch.load(model, weights_only=True)
    checkpoint["mel_config"] |= {"sample_rate": 44100}
    torch.save(checkpoint, tmp_path / "other.pth")
    options = ("--segments", "--step", 1, "--window")
    text = classify(few, tmp_path / "other.pth", tmp_path / "out", *options, 3, code=1)
    [longest] = re.findall(r"191 frames \(([\d.]+) s\)", text)
    assert longest == "2.21"
    classify(few, tmp_path / "other.pth", tmp_path / "out", *options, longest)


def test_ctrl_c_keeps_the_rows_and_resume_goes_on(corpus, model, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for path in corpus.iterdir():
        for i in range(25):
            (folder / f"{i}{path.name}").symlink_to(path)
    options = ("--batch_size", 4, "--workers", 1, "--cpu")
    paths = ("--input_dir", folder, "--model_path", model, "--output_dir", out)
    process = start(ROOT / "custom2_tester.py", *paths, *options)
    partial = out / PARTIAL
    wait_until(lambda: partial.exists() and partial.read_bytes().count(b"\n") > 20)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130, text
    assert "--resume" in text and "Traceback" not in text
    kept = mark(partial, 10)
    classify(folder, model, out, "--batch_size", 64, "--cpu", "--resume")
    assert marked(out) == kept and len(results(out)) == 48 * 25


def assert_alike(one, two):
    """Two tables within rounding: two batchings may round a last digit differently."""
    one, two = read_table(one), read_table(two)
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        for name in left:
            try:
                assert float(left[name]) == pytest.approx(float(right[name]), abs=1e-5)
            except ValueError:
                assert left[name] == right[name]


def test_shards_joined_are_one_run(corpus, model, tmp_path, monkeypatch):
    options = (*HALF_SECONDS, "--cpu", "--batch_size", 4)
    out = tmp_path / "three"
    classify(corpus, model, tmp_path / "one", *options)
    for i in range(3):
        text = classify(corpus, model, out, *options, "--shard", f"{i}/3")
        assert f"shard_{i}_of_3" in text
    assert sorted(path.name for path in out.iterdir()) == [f"shard_{i}_of_3" for i in range(3)]
    sizes = [len(results(out / f"shard_{i}_of_3")) for i in range(3)]
    assert sum(sizes) == 48 and min(sizes) > 5
    (out / "shard_of_mine").mkdir()
    (out / "shard_1_of_3/mine.txt").write_text("mine")
    forbid_classifying(monkeypatch)
    classify(corpus, model, out, *options, "--resume")
    for name in (TABLE, "segments.csv", "summary.csv"):
        assert_alike(out / name, tmp_path / "one" / name)
    left = sorted(str(path.relative_to(out)) for path in out.glob("shard*/**/*"))
    assert left == ["shard_1_of_3/mine.txt"] and (out / "shard_of_mine").exists()


def test_shards_are_joined_with_what_is_missing(corpus, model, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(corpus, tmp_path / "in")
    for i in (0, 2):
        classify(tmp_path / "in", model, out, "--shard", f"{i}/3", "--cpu")
    kept = mark(out / "shard_0_of_3" / TABLE, 2)
    interrupt(out / "shard_2_of_3", n_rows=4, torn=20)
    kept |= mark(out / "shard_2_of_3" / PARTIAL, 3)
    shutil.copy(min(corpus.iterdir()), tmp_path / "in/new_x_ANG.wav")
    classify(tmp_path / "in", model, out, "--resume", "--cpu")
    assert marked(out) == kept and len(results(out)) == 49


def test_a_run_without_resume_leaves_shards_and_says_so(few, model, tmp_path):
    out = tmp_path / "out"
    for i in range(2):
        classify(few, model, out, "--shard", f"{i}/2")
    shards = {name: data for name, data in files_below(out).items() if "shard" in name}
    text = classify(few, model, out)
    assert "2 shards" in text and "--resume" in text
    assert shards.items() <= files_below(out).items()
    assert "2 shards" not in classify(few, model, out, "--resume")
    assert not list(out.glob("shard*"))


def test_a_shard_of_other_options_or_at_work_is_not_joined(few, model, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "out"
    classify(few, model, out, "--shard", "0/2")
    before = files_below(out)
    text = classify(few, model, out, "--resume", "--max_width", 50, code=1)
    assert re.search("max_width.*191.*50", text) and "shard_0_of_2" in text
    descriptor = os.open(out / "shard_0_of_2", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert "in use" in classify(few, model, out, "--resume", code=1)
    finally:
        os.close(descriptor)
    assert before.items() <= files_below(out).items()
    classify(few, model, out, "--resume")


# --------------------------------------------------------------------------------------
# Segments


@pytest.fixture(scope="module")
def speech(corpus, tmp_path_factory):
    """One long recording (clips end to end, silence within), a short clip, a broken file."""
    folder = tmp_path_factory.mktemp("speech")
    clips = [soundfile.read(path)[0] for path in sorted(corpus.iterdir())[:14]]
    samples = np.concatenate([*clips[:7], np.zeros(80_000), *clips[7:]])
    soundfile.write(folder / "long.wav", samples, RATE)
    shutil.copy(min(corpus.iterdir()), folder / "short.wav")
    (folder / "broken.wav").write_bytes(b"RIFF")
    return folder


@pytest.mark.parametrize(
    "pause",
    [
        "empty: a sound file without samples",
        "shorter than one hop: 320 samples of 512 at 16000 Hz",
        "silent: all samples are equal",
    ],
)
def test_a_window_at_the_end_that_a_header_told_wrongly_does_not_fail_its_file(model, pause):
    _, checkpoint = tester.load_model(model, torch.device("cpu"))
    options = tester.RunOptions("in", 191, True, 3.0, 1.5, None, 0.0, None)
    shares = np.array([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    predictions = []
    for start_s, error in ((0.0, ""), (1.5, pause)):
        window = tester.Window("a.mp3", Path("a.mp3"), start_s, 2)
        about = (4.5, 0.0, error, shares if not error else np.full(6, np.nan), np.zeros(8))
        predictions.append(tester.WindowPrediction(window, None, *about))
    row = tester.result_row(predictions, checkpoint, options)
    assert row["predicted_code"] == "ANG"
    assert tester.result_row(predictions[1:], checkpoint, options)["error"] == pause
    predictions[1] = predictions[1]._replace(error="unreadable: damaged")
    assert tester.result_row(predictions, checkpoint, options)["error"] == "unreadable: damaged"


def test_segments_are_the_windows_classified_alone(speech, model, tmp_path):
    options = ("--segments", "--visualize", "--cpu", "--workers", 1)
    classify(speech, model, tmp_path / "out", *options)
    segments = pd.read_csv(tmp_path / "out/segments.csv")
    rows = by_file(tmp_path / "out")
    seconds = soundfile.info(speech / "long.wav").duration
    long = segments[segments.file == "long.wav"]
    starts = [*np.arange(0, seconds - 3, 1.5), seconds - 3]
    assert long.start_s.tolist() == pytest.approx(starts, abs=2e-3)
    assert (long.end_s - long.start_s).tolist() == pytest.approx([3.0] * len(long), abs=2e-3)
    silent = long.predicted_class.isna().to_numpy()
    assert 1 <= silent.sum() < 4 and (segments.file == "short.wav").sum() == 1
    mean = long[NAMES].mean().tolist()
    assert probabilities(rows["long.wav"]) == pytest.approx(mean, abs=1e-5)
    assert float(rows["long.wav"]["duration_s"]) == pytest.approx(seconds, abs=1e-3)
    assert float(rows["long.wav"]["ignored_s"]) == 0
    assert "unreadable" in rows["broken.wav"]["error"]
    (tmp_path / "windows").mkdir()
    samples = soundfile.read(speech / "long.wav")[0]
    for i, start_s in zip(np.flatnonzero(~silent), long.start_s[~silent], strict=True):
        first = round(start_s * RATE)
        window = samples[first : first + 3 * RATE]
        soundfile.write(tmp_path / f"windows/{i:03}.wav", window, RATE)
    classify(tmp_path / "windows", model, tmp_path / "alone", "--cpu")
    alone = np.array([probabilities(row) for row in results(tmp_path / "alone")])
    assert np.abs(alone - long[NAMES][~silent].to_numpy()).max() < 1e-3
    pictures = {path.name for path in (tmp_path / "out/mel_spectrograms").iterdir()}
    assert pictures == {"long.wav.png", "short.wav.png"}


@pytest.mark.parametrize(
    "duration, window, step, starts",
    [
        (3.0, 0.9, 0.7, [0.0, 0.7, 1.4, 2.1]),
        (3.0, 3.0, 1.5, [0.0]),
        (0.2, 3.0, 1.5, [0.0]),
        (3.1, 3.0, 1.5, [0.0, 0.1]),
        (6.0, 3.0, 1.5, [0.0, 1.5, 3.0]),
        (6.0, 3.0, 3.0, [0.0, 3.0]),
    ],
)
def test_no_window_repeats_and_the_last_ends_with_the_recording(duration, window, step, starts):
    assert tester.window_starts(duration, window, step) == pytest.approx(starts)


@given(duration=st.floats(0.01, 500), window=st.floats(0.1, 10), step=st.floats(0.1, 10))
def test_windows_leave_no_gap(duration, window, step):
    step = min(step, window)
    starts = tester.window_starts(duration, window, step)
    gaps = np.diff(starts)
    assert starts[0] == 0 and (gaps > 0).all() and (gaps <= step + 1e-5).all()
    assert duration <= window or starts[-1] + window == pytest.approx(duration)


def test_damage_within_a_recording_is_an_error_with_segments_too(model, tmp_path):
    samples = 0.1 * np.random.default_rng(0).standard_normal(160_000).astype(np.float32)
    folder = tmp_path / "in"
    folder.mkdir()
    soundfile.write(folder / "cut.flac", samples, RATE)
    data = (folder / "cut.flac").read_bytes()
    (folder / "cut.flac").write_bytes(data[: len(data) // 2])
    samples[80_000] = np.nan
    soundfile.write(folder / "nan.wav", samples, RATE, subtype="FLOAT")
    unknown = bytearray(data)
    # STREAMINFO's 36 bits that tell how many samples there are
    unknown[21:26] = bytes([unknown[21] & 0xF0, 0, 0, 0, 0])
    (folder / "unknown.flac").write_bytes(unknown)
    for options in (("--segments",), ()):
        classify(folder, model, tmp_path / "out", "--cpu", "--max_width", 400, *options, code=1)
        cut, nan, unknown_length = (row["error"] for row in results(tmp_path / "out"))
        assert "unreadable" in cut or "empty" in cut, cut
        assert "not finite" in nan and "does not tell its length" in unknown_length


def test_a_broken_link_as_input_has_its_row(model, tmp_path):
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    classify(tmp_path / "gone.wav", model, tmp_path / "out", code=1)
    assert "No such file" in results(tmp_path / "out")[0]["error"]


def test_embeddings_are_kept_only_where_asked_for(few, model, tmp_path, monkeypatch):
    """Those of a day's windows would take gigabytes."""
    kept = []
    result_row = tester.result_row
    monkeypatch.setattr(tester, "result_row", lambda p, *a: kept.extend(p) or result_row(p, *a))
    classify(few, model, tmp_path / "out")
    assert len(kept) == 6 and all(p.embedding is None for p in kept)


def test_recordings_that_ffmpeg_decodes_as_a_whole_are_measured_one_by_one(model, monkeypatch):
    _, checkpoint = tester.load_model(model, torch.device("cpu"))
    asked = []

    def read_none(_items, _read, workers, _size):
        asked.append(workers)
        return []

    monkeypatch.setattr(tester, "prefetch", read_none)
    for is_long in (True, False):
        options = tester.RunOptions("in", 191, is_long, 3.0, 1.5, None)
        tester.measure_folder(["a.wav", "b.M4A"], Path(), checkpoint["mel_config"], options, 8)
    assert asked == [1, 8]


def test_a_silent_recording_is_told_as_silent_in_all_windows(model, tmp_path):
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in/a.wav", np.zeros(10 * RATE), RATE)
    classify(tmp_path / "in", model, tmp_path / "out", "--segments", code=1)
    assert results(tmp_path / "out")[0]["error"] == "silent: all samples are equal"
    soundfile.write(tmp_path / "in/a.wav", np.concatenate([np.zeros(10 * RATE), TONE]), RATE)
    classify(tmp_path / "in", model, tmp_path / "out", code=1)
    assert "equal from 0.0 to 6.2 s" in results(tmp_path / "out")[0]["error"]


def test_a_damaged_sampling_rate_makes_no_windows(tmp_path):
    """At 1 Hz a minute of samples would be 640,000 windows of 3 s."""
    soundfile.write(tmp_path / "a.wav", np.tile(TONE, 60), 1)
    options = tester.RunOptions("in", 191, True, 3.0, 1.5, None)
    [window] = tester.list_windows(["a.wav"], tmp_path, options, tmp_path)
    assert "a sampling rate of 1 Hz" in window.error


PEAK = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], check=True, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_megabytes(*command):
    """Peak memory of a Python process, MB."""
    command = [sys.executable, "-c", PEAK, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / (2**20 if sys.platform == "darwin" else 2**10)


def test_an_hour_in_windows_takes_little_more_memory_than_five_minutes(model, tmp_path):
    """An hour decoded is 230 MB."""
    peaks = {}
    minute = 0.1 * np.random.default_rng(0).standard_normal(60 * RATE)
    for minutes in (5, 60):
        folder, out = tmp_path / str(minutes), tmp_path / f"out{minutes}"
        folder.mkdir()
        with soundfile.SoundFile(folder / "noise.wav", "w", RATE, 1) as file:
            for _ in range(minutes):
                file.write(minute)
        paths = ("--input_dir", folder, "--model_path", model, "--output_dir", out)
        options = ("--segments", "--step", 3, "--cpu", "--workers", 2)
        peaks[minutes] = peak_megabytes("custom2_tester.py", *paths, *options)
        assert len(read_table(out / "segments.csv")) == minutes * 20
    assert peaks[60] - peaks[5] < 100, peaks


@pytest.fixture
def stand_in_ffmpeg(tmp_path, monkeypatch):
    """An ffmpeg that copies: what it is given is a WAV. Returns the log of its calls."""
    log = tmp_path / "calls.txt"
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/ffmpeg"
    script.write_text(
        "#!/bin/sh\n"
        f'echo "$*" >> "{log}"\n'
        'while [ "$1" != -i ]; do shift; done\n'
        "from=$2\n"
        "for to; do :; done\n"
        'echo "[info]   Duration: 00:10:00.00, start: 0.0" >&2\n'
        'cp "$from" "$to"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return log


@pytest.fixture
def phones(speech, tmp_path):
    """Recordings under names that only ffmpeg reads."""
    folder = tmp_path / "phones"
    folder.mkdir()
    for name in ("a.m4a", "b.MP4"):
        shutil.copy(speech / "long.wav", folder / name)
    return folder


def test_a_phones_recording_is_decoded_once_a_file_under_segments(
    phones, speech, model, stand_in_ffmpeg, tmp_path, monkeypatch
):
    left = []
    write_batch = tester.write_batch

    def spy(*arguments):
        left.append(list((tmp_path / "temporary").rglob("*.wav")))
        write_batch(*arguments)

    monkeypatch.setattr(tester, "write_batch", spy)
    classify(phones, model, tmp_path / "out", "--segments", "--cpu", "--adapt", "off")
    assert len(stand_in_ffmpeg.read_text().splitlines()) == 2
    assert left[-1] == [], "a file's WAV goes when the file is done"
    assert not list((tmp_path / "temporary").iterdir())
    classify(speech, model, tmp_path / "wav", "--segments", "--cpu")
    expected = by_file(tmp_path / "wav")["long.wav"]
    for row in results(tmp_path / "out"):
        assert probabilities(row) == pytest.approx(probabilities(expected), abs=1e-5)
    n_windows = [row["file"] for row in read_table(tmp_path / "wav/segments.csv")]
    segments = [row["file"] for row in read_table(tmp_path / "out/segments.csv")]
    assert segments.count("a.m4a") == segments.count("b.MP4") == n_windows.count("long.wav")


def test_what_ffmpeg_makes_that_is_no_sound_fails_its_file_alone(
    phones, model, stand_in_ffmpeg, tmp_path
):
    (phones / "b.MP4").write_text("copied, this is no WAV\n" * 9)
    classify(phones, model, tmp_path / "out", "--segments", "--cpu")
    good, bad = results(tmp_path / "out")
    assert good["predicted_class"] and not bad["predicted_class"]
    assert "unreadable" in bad["error"]
    assert not list((tmp_path / "temporary").iterdir())


def test_a_phones_recording_is_decoded_as_far_as_it_is_heard(
    phones, model, stand_in_ffmpeg, tmp_path
):
    classify(phones, model, tmp_path / "out", "--cpu", "--adapt", "off")
    calls = stand_in_ffmpeg.read_text().splitlines()
    assert len(calls) == 2
    seconds = [float(re.search(r"-t (\S+)", call)[1]) for call in calls]
    assert max(seconds) < 191 * 512 / RATE + 1
    assert {row["duration_s"] for row in results(tmp_path / "out")} == {"600.000"}
    assert not list((tmp_path / "temporary").iterdir())


def test_without_ffmpeg_the_row_says_what_to_install(phones, speech, model, tmp_path, monkeypatch):
    shutil.copy(speech / "short.wav", phones)
    monkeypatch.setenv("PATH", str(tmp_path))
    for options in ((), ("--segments",)):
        classify(phones, model, tmp_path / "out", *options)
        rows = by_file(tmp_path / "out")
        assert "needs ffmpeg" in rows["a.m4a"]["error"] and "install" in rows["b.MP4"]["error"]
        assert rows["short.wav"]["predicted_class"]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize("options", [(), ("--segments",)], ids=["whole", "segments"])
def test_the_real_ffmpeg_decodes_what_a_phone_leaves(speech, model, tmp_path, options):
    (tmp_path / "in").mkdir()
    shutil.copy(speech / "long.wav", tmp_path / "in")
    command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-i", speech / "long.wav"]
    made = subprocess.run([*command, "-b:a", "128k", tmp_path / "in/long.m4a"])
    if made.returncode:
        pytest.skip("this ffmpeg writes no .m4a")
    (tmp_path / "in/broken.m4a").write_bytes(b"no sound" * 100)
    classify(tmp_path / "in", model, tmp_path / "out", "--cpu", *options)
    rows = by_file(tmp_path / "out")
    phone, wav = rows["long.m4a"], rows["long.wav"]
    assert float(phone["duration_s"]) == pytest.approx(float(wav["duration_s"]), abs=0.2)
    assert probabilities(phone) == pytest.approx(probabilities(wav), abs=0.2)
    assert "ffmpeg says" in rows["broken.m4a"]["error"]


# --------------------------------------------------------------------------------------
# Links, permissions, state, pictures


PLANTED = (TABLE, "segments.csv", "summary.csv", "run.json", "confusion_matrix.png")
PLANTED += ("confidence_distribution.png", "classification_report.txt", PARTIAL)
PLANTED += ("run.json.partial", "segments.csv.partial")


def test_links_planted_in_the_folder_are_not_followed(few, model, tmp_path):
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious")
    out.mkdir()
    for name in PLANTED:
        (out / name).symlink_to(victim)
    classify(few, model, out, *HALF_SECONDS)
    assert victim.read_text() == "precious"
    assert not any(path.is_symlink() for path in out.iterdir())
    assert len(results(out)) == 6


def test_a_link_planted_at_partial_during_the_run_is_not_followed(
    few, model, tmp_path, monkeypatch
):
    victim, partial = tmp_path / "victim", tmp_path / "out" / PARTIAL
    victim.write_text("precious")
    encode_clips = tester.encode_clips

    def plant(*arguments):
        partial.unlink()
        partial.symlink_to(victim)
        return encode_clips(*arguments)

    monkeypatch.setattr(tester, "encode_clips", plant)
    assert PARTIAL in classify(few, model, tmp_path / "out", code=1)
    assert victim.read_text() == "precious"


def test_a_link_at_a_temporary_name_is_not_followed(few, model, tmp_path, monkeypatch):
    """Were the name guessed all the same, the run would stop."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.guessed.tmp").symlink_to(victim)
    monkeypatch.setattr(tester.secrets, "token_hex", lambda n: "guessed")
    classify(few, model, tmp_path / "out", code=1)
    assert victim.read_text() == "precious"


def test_temporary_names_cannot_be_guessed_and_leftovers_go(few, model, tmp_path):
    names = []
    for _ in range(2):
        with tester.atomic_write(tmp_path / "a") as file:
            names.append(Path(file.name).name)
    assert names[0] != names[1] and not {"a", "a.tmp"} & set(names)
    (tmp_path / "out").mkdir()
    for name in (*names, "my.tmp", ".my.tmp"):
        (tmp_path / "out" / name).touch()
    classify(few, model, tmp_path / "out")
    left = {path.name for path in (tmp_path / "out").glob("*.tmp")}
    left |= {path.name for path in (tmp_path / "out").glob(".*.tmp")}
    assert left == {"my.tmp", ".my.tmp"}


def test_files_have_the_umasks_permissions(few, model, tmp_path):
    before = os.umask(0o027)
    try:
        classify(few, model, tmp_path / "out")
    finally:
        os.umask(before)
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path


def test_two_runs_in_one_process_change_neither_arguments_nor_checkpoint(
    few, model, tmp_path, monkeypatch
):
    loaded = []
    load_model = tester.load_model

    def spy(*arguments):
        network, checkpoint = load_model(*arguments)
        loaded.append((checkpoint, copy.deepcopy(checkpoint)))
        return network, checkpoint

    monkeypatch.setattr(tester, "load_model", spy)
    paths = ("--input_dir", few, "--model_path", model, "--output_dir", tmp_path / "out")
    args = tester.parse_args([*map(str, paths), "--cpu", "--segments"])
    before = copy.deepcopy(vars(args))
    tables = []
    for _ in range(2):
        assert tester.classify_folder(args) == 0
        assert vars(args) == before
        tables.append(files_below(tmp_path / "out"))
    assert tables[0] == tables[1]
    for checkpoint, as_read in loaded:
        state, state_as_read = (c.pop("model_state_dict") for c in (checkpoint, as_read))
        assert checkpoint == as_read and state.keys() == state_as_read.keys()
        assert all(torch.equal(state[key], state_as_read[key]) for key in state)


LOOK = """
import os, signal, sys
import matplotlib, pandas
before = dict(os.environ), matplotlib.get_backend(), pandas.get_option("mode.string_storage")
before += signal.getsignal(signal.SIGINT), sys.stdout
import custom2_tester as tester
after = dict(os.environ), matplotlib.get_backend(), pandas.get_option("mode.string_storage")
assert before == after + (signal.getsignal(signal.SIGINT), sys.stdout), (before, after)
assert "librosa" not in sys.modules and "numba" not in sys.modules

def look():
    assert "librosa" not in sys.modules and "numba" not in sys.modules
    import librosa, numba
    return bool(numba.config.DISABLE_JIT)

if __name__ == "__main__":
    with tester.drawing_pool(1) as pool:
        print("without compiler:", pool.submit(look).result())
    assert "NUMBA_DISABLE_JIT" not in os.environ
"""


def test_importing_changes_nothing_and_drawing_needs_no_compiler(tmp_path):
    """numba's cache fails where no folder can be written, so drawing does without numba."""
    (tmp_path / "look.py").write_text(LOOK)
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_DISABLE_JIT"}
    environment["PYTHONPATH"] = str(ROOT)
    assert "without compiler: True" in run(tmp_path / "look.py", env=environment)


DRAW = """
import sys
from pathlib import Path
import numpy as np
import custom2_tester as tester
if __name__ == "__main__":
    window = tester.Window("a.wav", Path("a.wav"), 0.0, 1)
    shares = np.array([0.3, 0.7])
    shown = tester.WindowPrediction(window, np.zeros((64, 50)), 1.6, 0.0, "", shares, shares)
    mel_config = {"sample_rate": 16000, "hop_length": 512, "fmin": 0.0, "fmax": 8000.0}
    arguments = (Path(sys.argv[1]), "a", shown, mel_config, ("Angry", "Sad"))
    with tester.drawing_pool(1) as pool:
        pool.submit(tester.draw_clip, *arguments).result()
"""


@pytest.fixture
def as_nobody():
    """The beginning of a command that runs as a user who may read, and write nowhere."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can become another user")
    reads = "+dac_read_search"  # where Python lies below /root
    command = ["setpriv", "--reuid=nobody", "--clear-groups", "--no-new-privs"]
    for options in ([f"--inh-caps={reads}", f"--ambient-caps={reads}"], []):
        try:
            trial = [*command, *options, sys.executable, "-c", "import librosa"]
            if subprocess.run(trial, capture_output=True, cwd="/").returncode == 0:
                return [*command, *options, sys.executable]
        except OSError:
            break
    pytest.skip("nobody may read Python's packages here")
    return []


def test_a_picture_is_drawn_where_no_folder_can_be_written(as_nobody, tmp_path):
    """As in a container under another user: neither HOME nor the packages' folder."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "MPLCONFIGDIR": folder}
        environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [*as_nobody, "-c", DRAW, f"{folder}/a.png"]
        done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert Path(folder, "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_a_recording_that_is_cut_shows_all_that_was_heard(model, tmp_path):
    """Not every second frame of it, as if the whole minute had to fit."""
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, 130 * 16000)
    soundfile.write(tmp_path / "a.wav", noise, 16000)
    network, checkpoint = tester.load_model(model, torch.device("cpu"))
    paths = ("--input_dir", str(tmp_path), "--output_dir", "x", "--model_path", str(model))
    args = tester.parse_args([*paths, "--visualize"])
    options = tester.run_options(args, checkpoint)
    windows = tester.list_windows(["a.wav"], tmp_path, options, tmp_path)
    [[prediction]] = tester.classify(windows, network, checkpoint, options, args)
    assert prediction.mel.shape[1] == checkpoint["max_width"]


def test_a_moment_of_sound_in_an_hour_is_in_the_picture(tmp_path):
    config = {"sample_rate": RATE, "hop_length": 512, "fmin": 0.0, "fmax": 8000.0}
    parts = []
    for start_s, mel in ((0.0, None), (3599.5, np.zeros((128, 16), np.float32))):
        window = tester.Window("a.wav", Path("a.wav"), start_s, 2)
        shares = np.full(6, 1 / 6)
        parts.append(tester.WindowPrediction(window, mel, 3600.0, 0.0, "", shares, np.zeros(8)))
    image = tester.join_windows(parts, 0.5, 3600.0)
    assert np.isfinite(image[:, -1]).all() and np.isnan(image[:, :-2]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tester.draw_timeline(tmp_path / "a.png", "a", parts, 0.5, config, tuple(NAMES))
    assert (tmp_path / "a.png").exists()
