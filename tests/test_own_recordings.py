"""Recordings of one's own: labels from a table, a folder's level, embeddings, fine-tuning.

The clips are the synthetic corpus's; their names tell nothing, as people's own do.
"""

import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import unicodedata

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import ROOT, TOY, call, classify, filled, generate, read_table, run, train
from hypothesis import example, given, settings
from hypothesis import strategies as st

import cremad_custom2 as trainer
import custom2_tester as tester
import mel_generator as generator

NAMES = list(trainer.EMOTIONS.values())
CPU = torch.device("cpu")


def clips_of(corpus):
    """The corpus's clips in order: path, actor, code of the emotion."""
    for path in sorted(corpus.iterdir()):
        actor, _, code, _ = path.stem.split("_")
        yield path, actor, code


def write_table(path, rows, columns=("file", "emotion", "speaker")):
    """A label table, as the scripts write one."""
    generator.write_csv(path, columns, rows)
    return path


def answers(output_dir):
    """Probabilities (files, classes) of a results table, in its order."""
    rows = read_table(output_dir / "classification_results.csv")
    return np.array([[float(row[name]) for name in NAMES] for row in rows])


def gain_of(output_dir):
    """The gain in dB that a run's record tells."""
    return json.loads((output_dir / "run.json").read_text())["options"]["gain_db"]


def copy_louder(folder, output_dir, gain_db):
    """Copies of sound files as float WAVs, louder by gain_db: nothing is clipped or rounded."""
    output_dir.mkdir()
    for path in sorted(folder.iterdir()):
        samples, rate = soundfile.read(path, dtype="float32")
        louder = samples * np.float32(10 ** (gain_db / 20))
        soundfile.write(output_dir / path.name, louder, rate, subtype="FLOAT")
    return output_dir


def copy_some(folder, output_dir, n):
    """The first n files of a folder."""
    output_dir.mkdir()
    for path in sorted(folder.iterdir())[:n]:
        shutil.copy(path, output_dir)
    return output_dir


@pytest.fixture(scope="module")
def model(trained):
    """The toy training's model."""
    return trained / "best_model.pth"


@pytest.fixture(scope="module")
def mine(corpus, tmp_path_factory):
    """The corpus under names that tell nothing: a folder a speaker, the same names in each."""
    folder = tmp_path_factory.mktemp("mine")
    rows = []
    for i, (path, actor, code) in enumerate(clips_of(corpus)):
        name = f"voice_{actor}/take {i % 6 + 1}.wav"
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / name)
        rows.append({"file": name, "emotion": code, "speaker": f"lab7_{actor}"})
    write_table(folder / "labels.csv", rows)
    return folder


@pytest.fixture(scope="module")
def louder(corpus, tmp_path_factory):
    """The corpus, 15 dB louder."""
    return copy_louder(corpus, tmp_path_factory.mktemp("level") / "louder", 15)


# --------------------------------------------------------------------------------------
# Labels from a table


def test_stems_tell_speaker_name_path_and_emotion(mine, tmp_path):
    """Two files of one name in different folders are two clips."""
    generate(mine, tmp_path, "--labels", mine / "labels.csv", "--no_augment", "--workers", 1)
    expected = set()
    for row in read_table(mine / "labels.csv"):
        digest = hashlib.sha1(row["file"].encode()).hexdigest()[:8]
        take = row["file"].split("/")[1].removesuffix(".wav")
        speaker = row["speaker"].replace("_", "-")
        code = row["emotion"]
        expected.add(f"{code}/{speaker}_{take}-{digest}_{code}_original.npy")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*.npy")}
    assert found == expected
    assert len(found) == 48


def test_the_blank_rows_and_notes_of_a_spreadsheet_are_passed_over(mine, model, tmp_path):
    text = (mine / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text(text + ",,\n,,\n,,48 clips\n,,checked\n")
    table = ("--labels", tmp_path / "labels.csv")
    generate(mine, tmp_path / "mels", *table, "--no_augment", "--workers", 1)
    assert len(list((tmp_path / "mels").glob("*/*.npy"))) == 48
    folder = mine / min(path.name for path in mine.iterdir() if path.is_dir())
    text = classify(folder, model, tmp_path / "out", *table)
    assert "emotions that are none of" not in text


@pytest.fixture(scope="module")
def trained_by_table(mine, tmp_path_factory):
    """The output folder of a training on the clips that the table labels."""
    folder = tmp_path_factory.mktemp("by_table")
    options = ("--labels", mine / "labels.csv", "--no_augment", "--workers", 1)
    generate(mine, folder / "mels", *options)
    train(folder, folder / "mels", EPOCHS=1)
    return folder / "output"


def test_the_trainer_trains_on_clips_that_a_table_labels(trained_by_table):
    split = read_table(trained_by_table / "split.csv")
    assert {row["actor"] for row in split} == {f"lab7-{1001 + i}" for i in range(8)}
    checkpoint = torch.load(trained_by_table / "best_model.pth", weights_only=True)
    by_part = {part: {r["actor"] for r in split if r["split"] == part} for part in ("train", "val")}
    assert {part: set(names) for part, names in checkpoint["speakers"].items()} == by_part


def test_the_tester_takes_true_classes_and_speakers_from_the_table(
    mine, trained_by_table, tmp_path
):
    """And says which speakers the model knows, though a stem has no `_` in their names."""
    labels = mine / "labels.csv"
    model = trained_by_table / "best_model.pth"
    text = classify(mine, model, tmp_path, "--labels", labels)
    rows = read_table(tmp_path / "classification_results.csv")
    table = {row["file"]: row for row in read_table(labels)}
    assert len(rows) == 48
    for row in rows:
        assert row["true_class"] == trainer.EMOTIONS[table[row["file"]]["emotion"]]
        assert row["speaker"] == table[row["file"]]["speaker"]
    assert (tmp_path / "confusion_matrix.png").exists()
    split = read_table(trained_by_table / "split.csv")
    n_known = sum(row["split"] != "test" for row in split)
    assert f"Not a fair test: {n_known} of them" in text


def test_codes_names_cases_backslashes_and_accents_are_understood(corpus, tmp_path):
    """A table from Windows, from a Mac, or written by hand."""
    composed = unicodedata.normalize("NFC", "Zoë/é.wav")
    decomposed = unicodedata.normalize("NFD", composed)
    source = next(iter(clips_of(corpus)))[0]
    for name in (composed, "a/b.wav", "a/c.wav", "d.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(source, tmp_path / name)
    rows = [
        {"file": "a\\b.wav", "emotion": "sad"},
        {"file": "./a//c.wav", "emotion": "HAPPY"},
        {"file": "d.wav", "emotion": " Neu "},
        {"file": decomposed, "emotion": "fea"},
    ]
    table = write_table(tmp_path / "labels.csv", rows)
    clips, skipped = generator.find_clips(tmp_path, table)
    wanted = {"a/b.wav": "SAD", "a/c.wav": "HAP", "d.wav": "NEU", composed: "FEA"}
    assert {clip.path: clip.emotion for clip in clips} == wanted
    assert not skipped
    classes = [{"code": code, "name": name} for code, name in trainer.EMOTIONS.items()]
    labels = tester.find_labels(list(wanted), classes, table)
    assert {path: label["true_class"][:3].upper() for path, label in labels.items()} == wanted


def test_other_emotions_and_files_outside_the_table_are_left_out(mine, model, tmp_path):
    """The generator skips them with the reason; the tester answers, and counts them nowhere."""
    rows = read_table(mine / "labels.csv")
    other, absent = rows[0]["file"], rows[1]["file"]
    rows[0]["emotion"] = "surprise"
    rows[1]["file"] = "gone.wav"
    table = write_table(tmp_path / "labels.csv", rows)
    generate(mine, tmp_path / "mels", "--labels", table, "--no_augment", "--workers", 1)
    skipped = {r["file"]: r["reason"] for r in read_table(tmp_path / "mels/skipped.csv")}
    assert skipped.keys() == {other, absent}
    assert skipped[other].startswith("other emotion: 'surprise'")
    assert skipped[absent] == "not in --labels"
    text = classify(mine, model, tmp_path / "results", "--labels", table)
    assert "46 files with a known emotion" in text
    assert "1 row" in text, "a row without a file is not told"
    found = {r["file"]: r for r in read_table(tmp_path / "results/classification_results.csv")}
    assert len(found) == 48
    for path, row in found.items():
        assert row["predicted_class"]
        assert bool(row["true_class"]) == (path not in (other, absent))


def test_further_columns_are_kept_and_cover_none_of_the_testers(mine, model, tmp_path):
    """Also those of a results table that somebody added the column emotion to."""
    columns = ("file", "emotion", "room", "Angry", "confidence")
    rows = read_table(mine / "labels.csv")
    more = {"room": "kitchen, 2nd", "Angry": "7", "confidence": "8"}
    table = write_table(tmp_path / "labels.csv", [row | more for row in rows], columns)
    classify(mine, model, tmp_path / "results", "--labels", table)
    found = read_table(tmp_path / "results/classification_results.csv")
    assert {row["room"] for row in found} == {"kitchen, 2nd"}
    assert answers(tmp_path / "results").sum(1) == pytest.approx(np.ones(48), abs=1e-5)
    assert all(float(row["confidence"]) <= 1 for row in found)
    plain = ",".join(columns[:1] + tester.RESULT_COLUMNS[1:4])
    header = (tmp_path / "results/classification_results.csv").read_text().splitlines()[0]
    assert header.startswith(plain)


any_name = st.text(st.characters(exclude_categories=["Cs"]), max_size=120)


@settings(max_examples=200, deadline=None)
@given(name=any_name, speaker=any_name)
@example(name="a" * 300, speaker="\U0001f600" * 60)  # four bytes each
def test_a_stem_has_three_fields_and_at_most_200_bytes(name, speaker):
    path = f"{name.replace('/', '')}.wav"
    row = {"emotion": "Angry", "speaker": speaker}
    labels = {unicodedata.normalize("NFC", path): row}
    clip = generator.clip_by_table(path, labels)
    stem = clip.stem
    assert clip.emotion == "ANG"
    assert len(os.fsencode(stem)) <= 200
    first, _, third = stem.split("_")
    assert first and third == "ANG"
    assert not re.search(r'[/\\:*?"<>|\x00-\x1f]', stem)


def test_clips_without_a_speaker_are_by_unknown_and_not_split_by_actor(mine, tmp_path):
    rows = read_table(mine / "labels.csv")
    for row in rows[:3]:
        row["speaker"] = " "
    table = write_table(tmp_path / "labels.csv", rows)
    generate(mine, tmp_path / "mels", "--labels", table, "--no_augment", "--workers", 1)
    assert len(list((tmp_path / "mels").glob("*/unknown_*.npy"))) == 3
    text = train(tmp_path, tmp_path / "mels", code=1)
    assert "of 3 clips the speaker is unknown" in text
    assert 'SPLIT = "clip"' in text
    assert not list(tmp_path.rglob("*.pth"))
    train(tmp_path, tmp_path / "mels", SPLIT="clip", EPOCHS=1)


def test_a_speaker_that_is_written_in_two_ways_does_not_train(mels, tmp_path):
    """Anna and anna: half of her would train, half test."""
    shutil.copytree(mels, tmp_path / "mels")
    for path in list(tmp_path.glob("mels/SAD/1001_*")):
        path.rename(path.with_name(path.name.replace("1001_", "Anna_")))
    for path in list(tmp_path.glob("mels/HAP/1001_*")):
        path.rename(path.with_name(path.name.replace("1001_", "anna_")))
    text = train(tmp_path, tmp_path / "mels", code=1)
    assert "has the speakers anna, Anna: one voice must not be two" in text  # as the paths sort
    assert not list(tmp_path.rglob("*.pth"))


def test_cells_that_a_spreadsheet_would_run_are_read_back(corpus, model, tmp_path):
    """The scripts write `./=a.wav` and `'+49`; the names are `=a.wav` and `+49`."""
    folder = tmp_path / "in"
    folder.mkdir()
    names = ["=a.wav", "-b.wav", "@c.wav", "'=d.wav", "+e.wav"]
    for name, (path, _, _) in zip(names, clips_of(corpus), strict=False):
        shutil.copy(path, folder / name)
    rows = [{"file": name, "emotion": "SAD", "speaker": "+49 bob"} for name in names]
    table = write_table(tmp_path / "labels.csv", rows)
    assert {row["speaker"] for row in read_table(table)} == {"'+49 bob"}
    clips, skipped = generator.find_clips(folder, table)
    assert {clip.path for clip in clips} == set(names)
    assert not skipped
    assert all(clip.stem.startswith("+49 bob_") for clip in clips)
    classify(folder, model, tmp_path / "out", "--labels", table)
    found = tester.read_csv(tmp_path / "out/classification_results.csv")
    assert [row["file"] for row in found] == sorted(names)
    assert {(row["true_class"], row["speaker"]) for row in found} == {("Sad", "+49 bob")}


def test_a_table_that_is_none_is_a_sentence(mine, model, tmp_path):
    (tmp_path / "labels.csv").write_text("path,label\na.wav,sad\n")
    (tmp_path / "empty.csv").write_text("")
    for name in ("labels.csv", "empty.csv"):
        options = ("--labels", tmp_path / name)
        word = "must be a CSV with the columns file,emotion"
        assert word in generate(mine, tmp_path / "mels", *options, code=1)
        assert word in classify(mine, model, tmp_path / "out", *options, code=1)
    options = ("--labels", tmp_path / "absent.csv")
    assert "absent.csv" in generate(mine, tmp_path / "mels", *options, code=1)
    assert "absent.csv" in classify(mine, model, tmp_path / "out", *options, code=1)


def load_copy(script, monkeypatch):
    """A copy of a script as a module of this process."""
    spec = importlib.util.spec_from_file_location(f"copy_of_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_a_seventh_emotion_needs_one_more_entry_in_two_scripts(corpus, tmp_path, monkeypatch):
    """EMOTIONS edited in copies of generator and trainer; the tester takes it from the model."""
    for name in ("mel_generator.py", "cremad_custom2.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        entry = '"SAD": "Sad"}'
        assert text.count(entry) == 1
        text = text.replace(entry, '"SAD": "Sad",\n            "SUR": "Surprise"}')
        for constant, value in (TOY | {"EPOCHS": 1}).items():
            text = re.sub(rf"^{constant} = .*", f"{constant} = {value!r}", text, flags=re.M)
        (tmp_path / name).write_text(text, encoding="utf-8")
    rows = []
    for i, (path, actor, code) in enumerate(clips_of(corpus)):
        emotion = "surprise" if i % 6 == i // 6 % 6 else code
        rows.append({"file": path.name, "emotion": emotion, "speaker": actor})
    table = write_table(tmp_path / "labels.csv", rows)
    mels = tmp_path / "mel_spectrograms"
    options = ("--labels", table, "--no_augment", "--workers", 1)
    paths = ("--input_dir", corpus, "--output_dir", mels)
    run(tmp_path / "mel_generator.py", *paths, *options, cwd=tmp_path)
    assert len(list(mels.glob("SUR/*_SUR_original.npy"))) == 8
    monkeypatch.chdir(tmp_path)
    call(load_copy(tmp_path / "cremad_custom2.py", monkeypatch))
    model = tmp_path / "output/best_model.pth"
    some = copy_some(corpus, tmp_path / "some", 12)
    classify(some, model, tmp_path / "out", "--labels", table, "--visualize", "--workers", 1)
    found = read_table(tmp_path / "out/classification_results.csv")
    names = [*NAMES, "Surprise"]
    assert list(found[0])[4:11] == names
    total = [sum(float(row[name]) for name in names) for row in found]
    assert total == pytest.approx([1.0] * 12, abs=1e-5)
    assert sum(row["true_class"] == "Surprise" for row in found) == 2
    page = (tmp_path / "out/report.html").read_text()
    assert "<option>Surprise</option>" in page
    assert page.count(">Surprise<span>") == 12, "a row has no bar of the seventh"
    assert len(list((tmp_path / "out/mel_spectrograms").iterdir())) == 12


# --------------------------------------------------------------------------------------
# Labels by names


def test_names_tell_labels_only_if_more_than_half_do(corpus, model, tmp_path):
    """Of TESS's seven emotions `*_sad` alone looks like a label: 4 files of 28."""
    folder = tmp_path / "in"
    folder.mkdir()
    source = next(iter(clips_of(corpus)))[0]
    for word in ("back", "bar", "base", "bath"):
        for emotion in ("angry", "disgust", "fear", "happy", "neutral", "ps", "sad"):
            shutil.copy(source, folder / f"OAF_{word}_{emotion}.wav")
    text = classify(folder, model, tmp_path / "out")
    assert "4 of 28 names look as if" in text
    assert "accuracy" not in text
    rows = read_table(tmp_path / "out/classification_results.csv")
    assert {row["true_class"] for row in rows} == {""}
    assert not (tmp_path / "out/confusion_matrix.png").exists()


def test_a_shard_asks_all_names_whether_they_tell_labels(corpus, model, tmp_path):
    """Else a shard of the few labelled ones would find that all of its names have one."""
    folder = tmp_path / "in"
    folder.mkdir()
    source = next(iter(clips_of(corpus)))[0]
    names = [f"{i}_x_sad.wav" for i in range(4)] + [f"{i}.wav" for i in range(5)]
    for name in names:
        shutil.copy(source, folder / name)
    n_shards = 30
    alone = next(
        i
        for i in range(n_shards)
        if {name.count("_") for name in names if tester.in_shard(name, (i, n_shards))} == {2}
    )
    classify(folder, model, tmp_path / "out", "--shard", f"{alone}/{n_shards}")
    table = next((tmp_path / "out").glob("shard_*/classification_results.csv"))
    assert {row["true_class"] for row in read_table(table)} == {""}


# --------------------------------------------------------------------------------------
# A folder's level


def level_by_hand(mel):
    """design.md: 10 log10 of the 95th percentile over frames of the mean power over bands."""
    power = 10 ** (mel.astype(np.float64)[:, :191] / 10)
    return 10 * math.log10(np.percentile(power.mean(axis=0), 95))


def test_the_checkpoints_level_is_that_of_the_training_originals(mels, trained):
    split = pd.DataFrame(read_table(trained / "split.csv"))
    train_rows = split[split.split == "train"]
    levels = [
        level_by_hand(np.load(mels / row.emotion / f"{row.stem}_original.npy"))
        for row in train_rows.itertuples()
    ]
    by_actor = pd.Series(levels).groupby(train_rows.actor.to_numpy()).median()
    median = np.median(levels)
    level = torch.load(trained / "best_model.pth", weights_only=True)["level"]
    assert level["median"] == pytest.approx(median, abs=0.02)
    assert level["low"] == pytest.approx(min(by_actor.min(), median - 8), abs=0.02)
    assert level["high"] == pytest.approx(max(by_actor.max(), median + 8), abs=0.02)


def test_the_usual_range_reaches_to_the_lowest_and_highest_speaker():
    """But 8 dB at least."""
    rows = [("a", 0.0), ("a", 1.0), ("a", 2.0), ("b", -20.0), ("b", -21.0), ("c", 4.0), ("c", 3.0)]
    rows += [("c", 3.5)]
    actors, levels = zip(*rows, strict=True)
    level = trainer.usual_range(levels, np.array(actors))
    assert level == {"median": 1.5, "low": -20.5, "high": 9.5}


def test_a_folder_like_the_trainings_is_left_untouched(corpus, model, tmp_path):
    """To the byte: else the tester would not give the trainer's figures."""
    text = classify(corpus, model, tmp_path / "auto")
    assert "within the training speakers' range, left as they are" in text
    classify(corpus, model, tmp_path / "off", "--adapt", "off")
    tables = [tmp_path / name / "classification_results.csv" for name in ("auto", "off")]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    assert gain_of(tmp_path / "auto") == 0


def test_a_louder_copy_gets_the_originals_answers(corpus, louder, model, tmp_path):
    """Both under `on`; under `off` it does not, or the test would say nothing."""
    classify(corpus, model, tmp_path / "before", "--adapt", "on")
    text = classify(louder, model, tmp_path / "after", "--adapt", "on")
    gain = gain_of(tmp_path / "after")
    assert f"all are changed by {gain:+.1f} dB" in text
    assert gain == pytest.approx(gain_of(tmp_path / "before") - 15, abs=0.01)
    difference = np.abs(answers(tmp_path / "before") - answers(tmp_path / "after"))
    assert difference.max() < 1e-3
    classify(louder, model, tmp_path / "off", "--adapt", "off")
    assert np.abs(answers(tmp_path / "off") - answers(tmp_path / "before")).max() > 0.01


def test_level_db_is_before_any_gain_and_above_the_trainings_median(
    corpus, louder, mels, model, tmp_path
):
    median = torch.load(model, weights_only=True)["level"]["median"]
    levels = {}
    for name, folder in (("corpus", corpus), ("louder", louder)):
        for adapt in ("on", "off"):
            classify(folder, model, tmp_path / name / adapt, "--adapt", adapt)
            rows = read_table(tmp_path / name / adapt / "classification_results.csv")
            levels[name, adapt] = np.array([float(row["level_db"]) for row in rows])
    assert levels["louder", "on"] == pytest.approx(levels["louder", "off"], abs=0.02)
    assert levels["louder", "on"] - 15 == pytest.approx(levels["corpus", "off"], abs=0.02)
    expected = [
        level_by_hand(np.load(mels / code / f"{path.stem}_original.npy")) - median
        for path, _, code in clips_of(corpus)
    ]
    assert levels["corpus", "off"] == pytest.approx(expected, abs=0.02)


def test_auto_acts_outside_the_range_from_20_files_on(louder, model, tmp_path):
    """With fewer it changes nothing, and says what `on` would do."""
    twenty = copy_some(louder, tmp_path / "20", 20)
    text = classify(twenty, model, tmp_path / "out20")
    assert "(--adapt auto)" in text
    assert gain_of(tmp_path / "out20") < -8
    (twenty / "broken.wav").write_bytes(b"RIFF")  # what cannot be read does not count
    next(path for path in sorted(twenty.iterdir()) if path.name != "broken.wav").unlink()
    text = classify(twenty, model, tmp_path / "out19")
    assert gain_of(tmp_path / "out19") == 0
    would = re.search(r"No gain is applied: 19 files, .* --adapt on \(([+-][\d.]+) dB\)", text)
    classify(twenty, model, tmp_path / "on", "--adapt", "on")
    assert float(would[1]) == pytest.approx(gain_of(tmp_path / "on"), abs=0.06)


def test_a_gain_keeps_loud_files_louder_than_quiet_ones():
    """One for the whole folder, from the median: what is loud among its files stays loud."""
    level = {"median": -10.0, "low": -18.0, "high": -2.0}
    levels = [-2.5] * 9 + [5.0] * 11 + [30.0]
    assert tester.choose_gain(levels, level, "auto")[0] == -15.0
    assert tester.choose_gain([-2.5] * 20, level, "auto")[0] == 0.0
    assert tester.choose_gain([-2.5] * 20, level, "on")[0] == -7.5
    assert tester.choose_gain([-18.5] * 20, level, "auto")[0] == 8.5
    assert tester.choose_gain([], level, "on")[0] == 0.0
    assert tester.choose_gain([29.0] * 20, level, "on")[0] == -39.0
    for adapt in ("auto", "on"):  # so far is no gain: silence, say
        gain, note = tester.choose_gain([-51.0] * 20, level, adapt)
        assert gain == 0
        assert "too far for a gain" in note


def test_pauses_of_a_long_recording_do_not_raise_its_gain(corpus, model, tmp_path):
    """Faint noise for the first 8 of 20 s: the level is that of the windows with a voice."""
    voice = [soundfile.read(path, dtype="float32")[0] for path, _, _ in clips_of(corpus)]
    voice = np.concatenate(voice)[: 12 * 16000]
    noise = np.float32(1e-5) * np.random.default_rng(0).standard_normal(8 * 16000, np.float32)
    rows = {}
    for name, parts in (("alone", [voice]), ("late", [noise, voice])):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "a.wav", np.concatenate(parts), 16000, "FLOAT")
        options = ("--segments", "--adapt", "on")
        classify(tmp_path / name, model, tmp_path / f"{name}_out", *options)
        rows[name] = read_table(tmp_path / f"{name}_out/classification_results.csv")[0]
    assert gain_of(tmp_path / "late_out") == pytest.approx(gain_of(tmp_path / "alone_out"), abs=1)
    levels = [float(rows[name]["level_db"]) for name in ("alone", "late")]
    assert levels[1] == pytest.approx(levels[0], abs=1)


def test_the_level_is_that_of_files_spread_evenly_over_the_folder(monkeypatch, corpus):
    """Of many files a part is measured: not the first ones, which may be of one speaker."""
    monkeypatch.setattr(tester, "LEVEL_FILES", 5)
    read = []

    def note(window, mel_config, options):
        read.append(window.path)
        return tester.WindowSpectrogram(np.full((4, 9), -30.0, np.float32), 1.0, 1.0, "")

    monkeypatch.setattr(tester, "read_window", note)
    paths = sorted(path.name for path in corpus.iterdir())
    options = tester.RunOptions("", 191, False, 3.0, 1.5, None)
    levels, distances = tester.measure_folder(paths, corpus, {}, options, workers=1)
    assert levels == [1.0] * 5
    assert distances == pytest.approx([0.0] * 5, abs=1e-4)  # alike throughout
    assert sorted(read) == [paths[i] for i in (0, 12, 24, 35, 47)]


def test_shards_come_to_the_gain_of_the_whole_folder(louder, model, tmp_path):
    classify(louder, model, tmp_path / "whole")
    for i in range(2):
        classify(louder, model, tmp_path / "parts", "--shard", f"{i}/2")
        shard = tmp_path / f"parts/shard_{i}_of_2"
        assert gain_of(shard) == gain_of(tmp_path / "whole") != 0
    text = classify(louder, model, tmp_path / "parts", "--resume")
    assert "classified anew" not in text
    assert answers(tmp_path / "parts") == pytest.approx(answers(tmp_path / "whole"), abs=1e-4)


def mark_first_row(output_dir):
    """Changes a confidence in the table, to see whether a resumed run takes up the row."""
    table = output_dir / "classification_results.csv"
    lines = table.read_text().splitlines(keepends=True)
    cells = lines[1].split(",")
    cells[3] = "0.123456"
    table.write_text("".join([lines[0], ",".join(cells), *lines[2:]]))


def test_a_gain_that_moved_classifies_all_anew(louder, model, tmp_path):
    """By over 0.1 dB; by less, rows that are there are taken up."""
    folder = copy_some(louder, tmp_path / "in", 24)
    out = tmp_path / "out"
    classify(folder, model, out)
    record = json.loads((out / "run.json").read_text())
    for moved, is_kept in ((0.05, True), (0.2, False)):
        record["options"]["gain_db"] = gain_of(out) + moved
        (out / "run.json").write_text(json.dumps(record))
        mark_first_row(out)
        text = classify(folder, model, out, "--resume")
        first = read_table(out / "classification_results.csv")[0]
        assert (first["confidence"] == "0.123456") == is_kept
        assert ("classified anew" in text) != is_kept
    mark_first_row(out)
    for path in sorted(folder.iterdir())[:10]:  # files came, as people's do
        samples, rate = soundfile.read(path)
        soundfile.write(folder / f"z{path.name}", 2 * samples, rate, subtype="FLOAT")
    before = gain_of(out)
    text = classify(folder, model, out, "--resume")
    assert abs(gain_of(out) - before) > 0.1
    assert re.search(r"All are classified anew: gain_db was -\d.*, now -\d", text)
    rows = read_table(out / "classification_results.csv")
    assert len(rows) == 34
    assert rows[0]["confidence"] != "0.123456"


def test_a_model_that_tells_no_level_adapts_nothing(corpus, model, tmp_path):
    checkpoint = torch.load(model, weights_only=True)
    del checkpoint["level"]
    torch.save(checkpoint, tmp_path / "old.pth")
    text = classify(corpus, tmp_path / "old.pth", tmp_path / "on", "--adapt", "on", code=1)
    assert "does not tell its training's level" in text
    classify(corpus, tmp_path / "old.pth", tmp_path / "auto")
    rows = read_table(tmp_path / "auto/classification_results.csv")
    assert {row["level_db"] for row in rows} == {""}
    assert gain_of(tmp_path / "auto") == 0


def test_a_clip_is_filled_with_the_noise_that_it_lacks():
    """A band's pauses come to the floor, as uneven as noise; a band that lacks nothing stays."""
    mel = torch.full((350, 3), -30.0)  # voice
    mel[:200] = torch.tensor([-90.0, -63.0, -50.0])  # pauses
    mel[250:] = -100.0  # digital silence
    heard = tester.fill_floor(mel, torch.tensor([-60.0, -60.0, -60.0]))
    pauses = 10 * (10 ** (heard[:200] / 10)).mean(0).log10()
    assert pauses.tolist() == pytest.approx([-60, -60, -50], abs=0.6)
    assert heard[:200, 0].std() == pytest.approx(3.5, abs=0.5)
    assert torch.allclose(heard[:250, 2], mel[:250, 2], atol=1e-4)
    assert heard[200:250].numpy() == pytest.approx(-30, abs=0.03)
    silence = 10 * (10 ** (heard[250:] / 10)).mean(0).log10()
    assert silence.tolist() == pytest.approx([-60, -60, -60], abs=0.6)
    state = torch.get_rng_state()
    assert torch.equal(tester.fill_floor(mel, torch.full((3,), -60.0)), heard)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_band_that_is_always_empty_is_not_filled(model):
    """A mel band without an STFT bin holds no noise, whatever the folder's level."""
    network, checkpoint = tester.load_model(model, CPU)
    n_mels = checkpoint["mel_config"]["n_mels"]
    checkpoint["floor"] = [-100.0] + [-40.0] * (n_mels - 1)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tester, "normalize", lambda mel, _: seen.append(mel) or mel)
        mel = np.full((n_mels, 50), -100.0, np.float32)
        mel[:, :25] = -30.0
        mel[0] = -100.0
        tester.predict_windows([mel], network, checkpoint, 1, fill_db=15.0)
    empty = 10 * (10 ** (seen[0][:, 0] / 10)).mean().log10()
    assert empty == pytest.approx(-98.2, abs=1)  # in half of the frames twice -100 dB
    silence = 10 * (10 ** (seen[0][25:, 1:] / 10)).mean().log10()
    assert silence == pytest.approx(-25, abs=1)


def test_what_lies_too_far_over_its_noise_is_filled():
    """If the median is above the training's highest speaker; auto: from 20 files on."""
    far, usual = [29.0] * 9 + [31.0] * 11, [29.0] * 11 + [31.0] * 9
    assert tester.choose_filling(far, 30.0, "auto")[0]
    assert tester.choose_filling(usual, 30.0, "auto") == (False, "")
    is_filled, note = tester.choose_filling(far[1:], 30.0, "auto")
    assert not is_filled
    assert "31 dB below them, the training's 30 dB at most" in note
    assert "--adapt on" in note
    assert tester.choose_filling(far[-1:], 30.0, "on")[0]
    assert not tester.choose_filling(usual, 30.0, "on")[0]


@pytest.fixture(scope="module")
def cleaned(corpus, tmp_path_factory):
    """The corpus, each clip with a pause as long as itself, and next to nothing in the pauses."""
    folder = tmp_path_factory.mktemp("cleaned") / "in"
    folder.mkdir()
    for path in sorted(corpus.iterdir()):
        samples, rate = soundfile.read(path)
        pause = 1e-5 * np.random.default_rng(0).standard_normal(len(samples))
        soundfile.write(folder / path.name, np.append(samples, pause), rate, subtype="FLOAT")
    return folder


def test_suppressed_noise_is_filled_as_numpy_would(cleaned, model, tmp_path):
    """auto does so; off and a model without a floor do not; pictures show the recording."""
    checkpoint = torch.load(model, weights_only=True)
    text = classify(cleaned, model, tmp_path / "auto")
    assert re.search(r"dB below them, .* missing noise is added to each \(--adapt auto\)", text)
    options = json.loads((tmp_path / "auto/run.json").read_text())["options"]
    floor = np.array(checkpoint["floor"]) + options["fill_db"]
    gain = np.float32(10 ** (options["gain_db"] / 20))
    normalization = checkpoint["normalization"]
    mean, std, added = (np.array(normalization[name]) for name in ("mean", "std", "floor"))
    clips = []
    levels = []
    for path in sorted(cleaned.iterdir()):
        samples, _ = tester.load_audio(path, 16000, 512)
        mel = tester.log_mel(samples * gain, **checkpoint["mel_config"])[:, :191]
        levels.append(tester.clip_level(mel.T))
        heard = 10 * np.log10(10 ** (filled(mel, floor).T / 10) + 10 ** (added / 10))
        clips.append(torch.from_numpy((heard - mean) / std).float())
    above = np.median(levels) - checkpoint["level"]["median"]
    assert options["fill_db"] == pytest.approx(above, abs=0.01)
    network, _ = tester.load_model(model, CPU)
    logits = trainer.predict_logits(network, clips, 8, CPU) / checkpoint["temperature"]
    expected = logits.softmax(1).numpy()
    assert answers(tmp_path / "auto") == pytest.approx(expected, abs=1e-3)
    classify(cleaned, model, tmp_path / "off", "--adapt", "off")
    assert np.abs(answers(tmp_path / "off") - expected).max() > 0.01
    del checkpoint["floor"]
    torch.save(checkpoint, tmp_path / "old.pth")
    assert "lacks" not in classify(cleaned, tmp_path / "old.pth", tmp_path / "old")


def test_another_filling_classifies_all_anew(cleaned, model, tmp_path):
    out = tmp_path / "out"
    classify(cleaned, model, out)
    record = json.loads((out / "run.json").read_text())
    filled_db = record["options"]["fill_db"]
    for before, is_kept in ((filled_db + 0.05, True), (filled_db - 0.2, False), (None, False)):
        record["options"]["fill_db"] = before
        (out / "run.json").write_text(json.dumps(record))
        mark_first_row(out)
        text = classify(cleaned, model, out, "--resume")
        assert ("classified anew" in text) != is_kept
        first = read_table(out / "classification_results.csv")[0]
        assert (first["confidence"] == "0.123456") == is_kept


def test_pictures_show_the_recording_as_it_is(louder, model):
    """Whatever gain the model got: the dB scale is the same for all pictures."""
    network, checkpoint = tester.load_model(model, CPU)
    path = sorted(louder.iterdir())[0].name
    window = tester.Window(path, louder / path, 0.0, 1)
    paths = ["--input_dir", "x", "--output_dir", "y", "--model_path", str(model)]
    args = tester.parse_args([*paths, "--visualize"])
    shown = []
    for gain_db in (0.0, -15.0):
        options = tester.RunOptions("", 191, False, 3.0, 1.5, None, gain_db, None)
        [[prediction]] = tester.classify([window], network, checkpoint, options, args)
        shown.append(prediction.mel)
    heard = shown[0] > -60  # far below, the floor of -100 dB shows
    assert heard.mean() > 0.5
    assert shown[1][heard] == pytest.approx(shown[0][heard], abs=0.01)


# --------------------------------------------------------------------------------------
# Embeddings


@pytest.fixture(scope="module")
def awkward(corpus, tmp_path_factory):
    """A few clips, one of a name that is escaped in tables, and two files that fail."""
    folder = tmp_path_factory.mktemp("awkward")
    for i, (path, _, _) in zip(range(5), clips_of(corpus), strict=False):
        shutil.copy(path, folder / f"{i}.wav")
    shutil.copy(path, folder / "=sum.wav")
    (folder / "2a.wav").write_bytes(b"RIFF")
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    return folder


def answers_of_head(model, embeddings):
    """What the model's head makes of embeddings: probabilities (clips, classes)."""
    network, checkpoint = tester.load_model(model, CPU)
    with torch.inference_mode():
        logits = network.head(torch.from_numpy(embeddings))
    return (logits / checkpoint["temperature"]).softmax(1).numpy()


def test_embeddings_are_what_the_head_reads(awkward, model, tmp_path):
    classify(awkward, model, tmp_path, "--embeddings", "--cpu", "--batch_size", 2)
    embeddings = np.load(tmp_path / "embeddings.npy")
    rows = tester.read_csv(tmp_path / "classification_results.csv")
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (len(rows), 4 * TOY["HIDDEN"]) == (8, 128)
    failed = np.array([bool(row["error"]) for row in rows])
    assert failed.sum() == 2
    assert np.isnan(embeddings[failed]).all()
    expected = [[float(row[name]) for name in NAMES] for row in rows if not row["error"]]
    assert answers_of_head(model, embeddings[~failed]) == pytest.approx(
        np.array(expected), abs=1e-5
    )
    assert np.array(expected).std(axis=0).max() > 0.01, "all rows are alike: any order would do"


def test_a_long_recordings_embedding_is_the_mean_over_its_windows(corpus, model, tmp_path):
    (tmp_path / "in").mkdir()
    parts = [soundfile.read(path)[0][4000:12000] for path, _, _ in clips_of(corpus)][:4]
    soundfile.write(tmp_path / "in/long.wav", np.concatenate(parts), 16000)
    options = ("--segments", "--window", 0.5, "--step", 0.5)
    classify(tmp_path / "in", model, tmp_path / "out", "--embeddings", *options)
    (tmp_path / "parts").mkdir()
    for i, part in enumerate(parts):
        soundfile.write(tmp_path / f"parts/{i}.wav", part, 16000)
    classify(tmp_path / "parts", model, tmp_path / "alone", "--embeddings")
    whole = np.load(tmp_path / "out/embeddings.npy")
    alone = np.load(tmp_path / "alone/embeddings.npy")
    assert whole.shape == (1, 128)
    assert whole[0] == pytest.approx(alone.mean(axis=0), abs=1e-3)


@pytest.mark.parametrize("option", [("--shard", "0/2"), ("--resume",)])
def test_embeddings_need_all_files_in_one_run(corpus, model, tmp_path, option):
    text = classify(corpus, model, tmp_path / "out", "--embeddings", *option, code=2)
    assert "--embeddings needs all files in one run" in text
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------
# In Python


def test_an_array_gets_the_command_lines_answer(corpus, model, tmp_path):
    """Mono, and a stereo recording of another rate."""
    source, _, _ = next(iter(clips_of(corpus)))
    samples, rate = soundfile.read(source)
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in/a.wav", samples, rate)
    stereo = np.stack([samples, 0.5 * samples], axis=1)
    soundfile.write(tmp_path / "in/b.wav", stereo, 22050, subtype="FLOAT")
    classify(tmp_path / "in", model, tmp_path / "out", "--cpu")
    network, checkpoint = tester.load_model(model, CPU)
    found = [
        tester.predict(network, checkpoint, samples, rate),
        tester.predict(network, checkpoint, stereo, 22050),
    ]
    assert all(list(answer) == NAMES for answer in found)
    given = np.array([list(answer.values()) for answer in found])
    assert given == pytest.approx(answers(tmp_path / "out"), abs=1e-5)
    assert np.abs(given[0] - given[1]).max() > 1e-4


@pytest.mark.parametrize(
    ("samples", "rate", "reason"),
    [
        (np.zeros(16000), 16000, "silent"),
        (np.full(44100, 0.3), 44100, "silent"),  # resampled it rings
        (np.zeros(0), 16000, "empty"),
        (np.linspace(-1, 1, 100), 16000, "shorter than one hop"),
        (np.full(16000, np.nan), 16000, "not finite"),
        (np.arange(16000), 16000, "beyond full scale"),
    ],
)
def test_an_array_that_holds_nothing_to_classify_is_refused_in_words(model, samples, rate, reason):
    network, checkpoint = tester.load_model(model, CPU)
    with pytest.raises(tester.AudioError, match=reason):
        tester.predict(network, checkpoint, samples, rate)


def test_predict_says_which_way_round_samples_are(model):
    network, checkpoint = tester.load_model(str(model), CPU)  # a path as a text
    samples = np.random.default_rng(0).standard_normal((16000, 2)).astype(np.float32) / 10
    assert sum(tester.predict(network, checkpoint, samples, 16000).values()) == pytest.approx(1)
    with pytest.raises(tester.AudioError, match="transpose"):
        tester.predict(network, checkpoint, samples.T, 16000)


def test_readmes_python_lines_run(corpus, model, tmp_path, monkeypatch):
    """In a folder that holds what they name: a model and a recording."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:python|py)\n(.*?)```", readme, re.DOTALL)
    if not blocks:
        pytest.skip("README.md has no ```python block yet")
    assert any("predict(" in block for block in blocks)
    for block in blocks:
        for name in re.findall(r"[\"']([^\"'\n]+\.(?:pth|wav|flac|mp3))[\"']", block):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            source = model if name.endswith(".pth") else next(iter(clips_of(corpus)))[0]
            shutil.copy(source, path)
        monkeypatch.chdir(tmp_path)
        exec(compile(block, "README.md", "exec"), {})


# --------------------------------------------------------------------------------------
# Fine-tuning


FINE = {"BATCH_SIZE": 8, "EPOCHS": 1, "AMP": "off", "WARMUP_EPOCHS": 0}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Spectrograms of five speakers that the toy model does not know."""
    from synthetic_corpus import make_corpus

    folder = tmp_path_factory.mktemp("others")
    make_corpus(folder / "wavs", actors=5, takes=1, seed=9)
    for path in (folder / "wavs").iterdir():
        path.rename(path.with_name(f"lab7-{path.name}"))
    generate(folder / "wavs", folder / "mels", "--no_augment", "--workers", 1)
    return folder / "mels"


@pytest.fixture(scope="module")
def tuned(others, model, tmp_path_factory):
    """The output folder of a fine-tuning whose learning rate moves nothing."""
    folder = tmp_path_factory.mktemp("tuned")
    constants = TOY | FINE | {"START_FROM": str(model), "LEARNING_RATE": 1e-12, "EMA_DECAY": 0.0}
    train(folder, others, toy=constants)
    return folder / "output"


def test_fine_tuning_starts_from_the_models_weights_and_normalisation(tuned, model):
    """Statistics of batch norm move by themselves; with the start's, the logits are the start's."""
    start = torch.load(model, weights_only=True)
    checkpoint = torch.load(tuned / "best_model.pth", weights_only=True)
    assert checkpoint["normalization"] == start["normalization"]
    before, after = start["model_state_dict"], checkpoint["model_state_dict"]
    buffers = {name for name in before if "running_" in name or "num_batches" in name}
    for name in before.keys() - buffers:
        assert torch.allclose(before[name], after[name], atol=1e-7), name
    network, _ = tester.load_model(tuned / "best_model.pth", CPU)
    network.load_state_dict(after | {name: before[name] for name in buffers})
    first, _ = tester.load_model(model, CPU)
    clips = [torch.randn(n, 128, generator=torch.Generator().manual_seed(n)) for n in (40, 90)]
    old, new = (trainer.predict_logits(m, clips, 2, CPU) for m in (first, network))
    assert new == pytest.approx(old, abs=1e-5)


def test_the_validation_of_a_fine_tuning_begins_where_the_model_stood(others, tuned, model):
    """The tuned model's answers on the validation clips are near those of the start.

    A training from nothing, of one epoch, is far from them.
    """
    split = [row for row in read_table(tuned / "split.csv") if row["split"] == "val"]
    start = torch.load(model, weights_only=True)
    paths = [others / row["emotion"] / f"{row['stem']}_original.npy" for row in split]
    mels = [torch.from_numpy(np.load(path).T) for path in paths]
    clips = [tester.normalize(mel, start["normalization"]) for mel in mels]
    networks = [tester.load_model(path, CPU)[0] for path in (model, tuned / "best_model.pth")]
    old, new = (trainer.predict_logits(network, clips, 4, CPU) for network in networks)
    torch.manual_seed(0)
    fresh = trainer.EmotionClassifier(**start["model_config"]).eval()
    nothing = trainer.predict_logits(fresh, clips, 4, CPU)
    assert (new - old).abs().mean() < 0.5 * (nothing - old).abs().mean()


def test_a_tuned_model_names_the_old_speakers_and_no_path(tuned, model):
    start = torch.load(model, weights_only=True)
    checkpoint = torch.load(tuned / "best_model.pth", weights_only=True)
    split = read_table(tuned / "split.csv")
    for part in ("train", "val"):
        new = {row["actor"] for row in split if row["split"] == part}
        assert set(checkpoint["speakers"][part]) == new | set(start["speakers"][part])
    assert not checkpoint["training_config"].keys() & {"START_FROM", "MEL_DIR", "OUTPUT_DIR"}
    data = (tuned / "best_model.pth").read_bytes()
    for secret in (str(model), str(tuned), model.parent.parent.name, tuned.parent.name):
        assert os.fsencode(secret) not in data, f"the file tells {secret}"


def test_speakers_that_the_model_knows_do_not_validate_or_test(mels, trained, model, tmp_path):
    """The same split again: those who validated would validate."""
    text = train(tmp_path, mels, START_FROM=str(model), code=1)
    split = read_table(trained / "split.csv")
    known = sorted({row["actor"] for row in split if row["split"] == "val"})
    assert f"was trained on {', '.join(known)}, who would now validate or test" in text
    assert not list(tmp_path.rglob("*.pth"))
    table = [{"stem": r["stem"], "split": r["split"]} for r in split]
    for row in table:  # let them train, as the sentence says, and all is well
        actor = row["stem"].split("_")[0]
        new = {"val": "train", "test": "val" if actor == table[-1]["stem"][:4] else "test"}
        row["split"] = new.get(row["split"], row["split"])
    tests = sorted({r["stem"][:4] for r in table if r["split"] in ("test", "val")})
    if len(tests) > 1:
        for row in table:
            if row["stem"][:4] in tests:
                row["split"] = "val" if row["stem"].startswith(tests[0]) else "test"
    else:
        for i, row in enumerate(r for r in table if r["split"] == "test"):
            row["split"] = ("val", "test")[i % 2]
    trainer.write_csv(tmp_path / "split.csv", ("stem", "split"), table)
    constants = TOY | FINE | {"START_FROM": str(model), "SPLIT": str(tmp_path / "split.csv")}
    train(tmp_path, mels, toy=constants)


def test_add_floor_that_the_model_to_fine_tune_decides_is_told(model, mels, tmp_path):
    checkpoint = torch.load(model, weights_only=True)
    checkpoint["speakers"] = {"train": [], "val": []}
    constants = TOY | FINE | {"START_FROM": str(tmp_path / "start.pth"), "EPOCHS": 1}
    told = {}
    for name in ("with", "without"):
        torch.save(checkpoint, tmp_path / "start.pth")
        told[name] = train(tmp_path / name, mels, toy=constants)
        checkpoint["normalization"].pop("floor", None)
    assert "ADD_FLOOR does nothing" not in told["with"]
    assert "ADD_FLOOR does nothing: START_FROM's model was trained with no floor" in told["without"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model_config", lambda c: c["model_config"].update(hidden=64)),
        ("mel_config", lambda c: c["mel_config"].update(fmax=7000.0)),
        ("format_version", lambda c: c.update(format_version=1)),
        ("classes", lambda c: c["classes"].reverse()),
        ("not a complete model", lambda c: c["model_state_dict"].popitem()),
        ("not a complete model", lambda c: c.pop("speakers")),
        ("not a complete model", lambda c: c.pop("normalization")),
        ("not a complete model", lambda c: c["normalization"]["mean"].pop()),
    ],
)
def test_a_model_that_does_not_fit_is_no_start(others, model, tmp_path, name, change):
    checkpoint = torch.load(model, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "start.pth")
    constants = TOY | FINE | {"START_FROM": str(tmp_path / "start.pth")}
    text = train(tmp_path, others, toy=constants, code=1)
    assert "START_FROM = " in text
    assert name in text
    assert not (tmp_path / "output/best_model.pth").exists()


def test_a_start_that_is_no_file_or_no_checkpoint_is_a_sentence(others, tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"PK\3\4 nothing")
    for name, word in (("absent.pth", "no such file"), ("broken.pth", "damaged")):
        constants = TOY | FINE | {"START_FROM": str(tmp_path / name)}
        text = train(tmp_path, others, toy=constants, code=1)
        assert name in text
        assert word in text


def test_weights_in_half_precision_are_a_start_too(others, model, tmp_path):
    """The shipped model's file is of that kind."""
    checkpoint = torch.load(model, weights_only=True)
    state = checkpoint["model_state_dict"]
    checkpoint["model_state_dict"] = {
        k: v.half() if v.is_floating_point() else v for k, v in state.items()
    }
    torch.save(checkpoint, tmp_path / "half.pth")
    constants = TOY | FINE | {"START_FROM": str(tmp_path / "half.pth")}
    train(tmp_path, others, toy=constants)
    tuned = torch.load(tmp_path / "output/best_model.pth", weights_only=True)
    assert all(v.dtype != torch.float16 for v in tuned["model_state_dict"].values())


# --------------------------------------------------------------------------------------
# A second run into the same folder


def test_pictures_of_files_that_are_gone_go(corpus, model, tmp_path):
    folder = copy_some(corpus, tmp_path / "in", 3)
    out = tmp_path / "out"
    options = ("--visualize", "--workers", 1)
    classify(folder, model, out, *options)
    pictures = {path.name for path in (out / "mel_spectrograms").iterdir()}
    assert pictures == {f"{path.name}.png" for path in folder.iterdir()}
    (out / "mel_spectrograms/mine.png").write_bytes(b"a picture of somebody's own")
    (out / "notes.txt").write_text("somebody's own")
    gone = sorted(folder.iterdir())[0]
    gone.unlink()
    classify(folder, model, out, *options)
    left = {path.name for path in (out / "mel_spectrograms").iterdir()}
    assert left == pictures - {f"{gone.name}.png"} | {"mine.png"}
    assert (out / "notes.txt").exists()
    assert gone.name not in (out / "report.html").read_text()


def test_what_a_second_run_does_not_make_anew_is_not_left(corpus, model, tmp_path):
    folder = copy_some(corpus, tmp_path / "in", 6)
    out = tmp_path / "out"
    classify(folder, model, out, "--segments", "--embeddings", "--visualize", "--workers", 1)
    made = {"segments.csv", "embeddings.npy", "report.html", "confusion_matrix.png"}
    assert made <= {path.name for path in out.iterdir()}
    for path in sorted(folder.iterdir()):  # no name tells an emotion any more
        path.rename(path.with_name(path.name.replace("_", "-")))
    classify(folder, model, out)
    assert not made & {path.name for path in out.iterdir()}


def test_a_run_that_fails_leaves_what_the_last_one_wrote(corpus, model, tmp_path, monkeypatch):
    folder = copy_some(corpus, tmp_path / "in", 3)
    out = tmp_path / "out"
    classify(folder, model, out, "--visualize", "--workers", 1)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail(*arguments):
        raise tester.UserError("the disk went away")

    monkeypatch.setattr(tester, "classify_all", fail)
    sorted(folder.iterdir())[0].unlink()
    classify(folder, model, out, code=1)
    for path, data in before.items():
        assert path.read_bytes() == data, path


def test_spectrograms_and_a_training_do_not_share_a_folder(mels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output in (str(mels), f"{mels}/../{mels.name}", os.path.relpath(mels)):
        text = train(tmp_path, mels, OUTPUT_DIR=output, code=1)
        assert "OUTPUT_DIR" in text
        assert "another folder than MEL_DIR" in text
    assert not (mels / "split.csv").exists()
