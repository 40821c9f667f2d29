"""Tools for people's own corpora and results: labels by naming rules, TextGrids, groups."""

import importlib
import itertools
import re
import subprocess
import sys
from pathlib import PurePosixPath

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import classify, generate, read_table

import custom2_tester as tester

NAMES = ["Angry", "Disgust", "Fear", "Happy", "Neutral", "Sad"]


def main_of(monkeypatch, capsys, tool, *arguments):
    """Runs a tool's main() in this process; returns what it printed."""
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *map(str, arguments)])
    importlib.import_module(tool).main()
    return capsys.readouterr().out


# --------------------------------------------------------------------------------------
# label_corpora.py


@pytest.mark.parametrize(
    ("corpus", "path", "label"),
    [
        # the corpora's own examples: https://zenodo.org/records/1188976, http://emodb.bilderbar.info,
        # https://doi.org/10.5683/SP2/E8H2MF, http://kahlan.eps.surrey.ac.uk/savee
        ("ravdess", "Actor_12/03-01-06-01-02-01-12.wav", ("Fear", "ravdess-12")),
        ("ravdess", "03-01-01-01-01-02-24.wav", ("Neutral", "ravdess-24")),
        ("ravdess", "03-01-02-01-01-01-01.wav", ("calm", "ravdess-01")),
        ("ravdess", "03-01-05-01-01-01.wav", None),
        ("ravdess", "03-01-09-01-01-01-01.wav", None),
        ("emodb", "wav/03a01Fa.wav", ("Happy", "emodb-03")),
        ("emodb", "16b10Wb.wav", ("Angry", "emodb-16")),
        ("emodb", "08a07La.wav", ("boredom", "emodb-08")),
        ("emodb", "03a01Xa.wav", None),
        ("tess", "OAF_back_angry.wav", ("Angry", "tess-OAF")),
        ("tess", "TESS/YAF_ps/YAF_back_ps.wav", ("surprise", "tess-YAF")),
        ("tess", "OAF_neutral/OA_bite_neutral.wav", ("Neutral", "tess-OAF")),  # as released
        ("tess", "YAF_calm.wav", None),
        ("savee", "DC_a01.wav", ("Angry", "savee-DC")),
        ("savee", "AudioData/KL/sa15.wav", ("Sad", "savee-KL")),
        ("savee", "JE_su05.wav", ("surprise", "savee-JE")),
        ("savee", "DC_x01.wav", None),
        ("folders", "angry/anything at all.wav", ("angry", "")),
        ("folders", "loose.wav", None),
    ],
)
def test_names_are_read_by_each_corpus_rule(corpus, path, label):
    tool = importlib.import_module("label_corpora")
    assert tool.RULES[corpus](PurePosixPath(path)) == label


def test_its_table_is_what_generator_and_tester_take(
    corpus, trained, tmp_path, monkeypatch, capsys
):
    """Folders of one emotion each, with one that the scripts do not know."""
    folder = tmp_path / "in"
    for i, path in enumerate(sorted(corpus.iterdir())[:12]):
        words = {"ANG": "Angry", "SAD": "sad", "HAP": "boredom"}
        parent = folder / words.get(path.name.split("_")[2], "NEU")
        parent.mkdir(parents=True, exist_ok=True)
        (parent / f"{i}.wav").write_bytes(path.read_bytes())
    text = main_of(monkeypatch, capsys, "label_corpora", "folders", folder)
    assert f"12 of 12 files: {folder / 'labels.csv'}" in text
    assert re.search(r"2 +boredom", text)
    rows = read_table(folder / "labels.csv")
    assert len(rows) == 12
    assert {row["speaker"] for row in rows} == {""}
    options = ("--labels", folder / "labels.csv")
    generate(folder, tmp_path / "mels", *options, "--no_augment", "--workers", 1)
    assert len(list((tmp_path / "mels").glob("*/unknown_*.npy"))) == 10
    text = classify(folder, trained / "best_model.pth", tmp_path / "out", *options)
    assert "10 files with a known emotion" in text


def test_a_folder_without_such_names_is_a_sentence(corpus, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="no sound file that is named as emodb names them"):
        main_of(monkeypatch, capsys, "label_corpora", "emodb", corpus)
    assert not (corpus / "labels.csv").exists()


# --------------------------------------------------------------------------------------
# textgrid.py


def parse_textgrid(text):
    """Praat's long text format: {tier: [(start, end, label)]}, and the end of all."""
    lines = [line.strip() for line in text.splitlines()]
    assert lines[:2] == ['File type = "ooTextFile"', 'Object class = "TextGrid"']
    end = float(lines[4].removeprefix("xmax = "))
    tiers = {}
    for part in text.split('class = "IntervalTier"')[1:]:
        name = re.search(r'name = "(.+)"', part)[1]
        n = int(re.search(r"intervals: size = (\d+)", part)[1])
        spans = re.findall(r'xmin = (\S+)\s+xmax = (\S+)\s+text = "((?:[^"]|"")*)"', part)
        tiers[name] = [(float(a), float(b), label.replace('""', '"')) for a, b, label in spans]
        assert len(spans) == n
        assert re.findall(r"intervals \[(\d+)\]", part) == [str(i + 1) for i in range(n)]
    return tiers, end


def test_each_moment_belongs_to_the_window_whose_middle_is_nearest():
    tool = importlib.import_module("textgrid")
    windows = [
        {"start_s": a, "end_s": b, "predicted_class": name, "confidence": "0.5"}
        for a, b, name in [("0", "3", "Sad"), ("1.5", "4.5", "Fear"), ("2.2", "5.2", "Angry")]
    ]
    tiers, end = parse_textgrid(tool.textgrid(windows, 5.2))
    assert end == 5.2
    middles = [(float(w["start_s"]) + float(w["end_s"])) / 2 for w in windows]
    spans = tiers["emotion"]
    assert spans[0][0] == 0
    assert spans[-1][1] == 5.2
    for before, after in itertools.pairwise(spans):
        assert before[1] == after[0], "a gap between two windows"
    for moment in np.linspace(0.001, 5.199, 97):
        nearest = windows[int(np.argmin([abs(m - moment) for m in middles]))]
        [label] = [text for a, b, text in spans if a <= moment < b]
        assert label == nearest["predicted_class"], moment


def test_quotes_in_labels_are_doubled():
    """A model's class may be called anything."""
    tool = importlib.import_module("textgrid")
    row = {"start_s": "0", "end_s": "1", "predicted_class": 'a "so-so" one', "confidence": "1"}
    text = tool.textgrid([row], 1.0)
    assert '"a ""so-so"" one"' in text
    tiers, _ = parse_textgrid(text)
    assert tiers["emotion"] == [(0.0, 1.0, 'a "so-so" one')]


def test_textgrids_are_written_for_what_was_classified(
    corpus, trained, tmp_path, monkeypatch, capsys
):
    """A pause has no label; a file that failed has no TextGrid."""
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    clips = [soundfile.read(path)[0] for path in sorted(corpus.iterdir())[:6]]
    long = np.concatenate([*clips[:3], np.zeros(48000), *clips[3:]])
    soundfile.write(folder / "sub/=a.wav", long, 16000)
    soundfile.write(folder / "b.wav", clips[0], 16000)
    (folder / "broken.wav").write_bytes(b"RIFF")
    options = ("--segments", "--window", 1, "--step", 0.5)
    classify(folder, trained / "best_model.pth", out, *options)
    assert "2 TextGrids" in main_of(monkeypatch, capsys, "textgrid", out)
    written = {p.relative_to(out / "textgrids").as_posix() for p in out.rglob("*.TextGrid")}
    assert written == {"sub/=a.wav.TextGrid", "b.wav.TextGrid"}
    text = (out / "textgrids/sub/=a.wav.TextGrid").read_text(encoding="utf-8")
    tiers, end = parse_textgrid(text)
    assert end == pytest.approx(len(long) / 16000, abs=1e-3)
    rows = [r for r in tester.read_csv(out / "segments.csv") if r["file"] == "sub/=a.wav"]
    assert [label for _, _, label in tiers["emotion"]] == [r["predicted_class"] for r in rows]
    assert [label for _, _, label in tiers["confidence"]] == [r["confidence"] for r in rows]
    assert "" in [label for _, _, label in tiers["emotion"]]


def test_results_without_segments_are_a_sentence(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"holds no segments.csv: run custom2_tester.py"):
        main_of(monkeypatch, capsys, "textgrid", tmp_path)


# --------------------------------------------------------------------------------------
# groups.py


@pytest.fixture
def tables(tmp_path):
    """Eight actors: five women who are always understood, three men of whom Sad never is."""
    people = [(1001 + i, 20 + 5 * i, "Female" if i < 5 else "Male") for i in range(8)]
    speakers = pd.DataFrame(people, columns=["ActorID", "Age", "Sex"])
    speakers["Race"] = ["Asian"] * 2 + ["Caucasian"] * 6
    speakers["Ethnicity"] = "Not Hispanic"
    rows = []
    for actor, _, sex in people:
        for name in NAMES:
            for _ in range(3 if name == "Sad" else 1):  # UAR is not accuracy
                missed = sex == "Male" and name == "Sad"
                rows.append((str(actor), name, "Angry" if missed else name))
    predictions = pd.DataFrame(rows, columns=["actor", "true_class", "predicted_class"])
    predictions.to_csv(tmp_path / "predictions.csv", index=False)
    speakers.to_csv(tmp_path / "speakers.csv", index=False)
    return tmp_path


def group_lines(text):
    """The printed table: {(kind, group): the other cells}."""
    found = {}
    for line in text.splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        found[cells[0], cells[1]] = cells[2:]
    return found


def test_uar_by_group_is_right_and_nothing_stands_under_three_actors(tables, monkeypatch, capsys):
    paths = ("--predictions", tables / "predictions.csv", "--speakers", tables / "speakers.csv")
    lines = group_lines(main_of(monkeypatch, capsys, "groups", *paths))
    assert lines["sex", "Female"] == ["100.0", "100.0 to 100.0", "5", "40"]
    assert lines["sex", "Male"] == ["83.3", "83.3 to 83.3", "3", "24"]
    assert lines["race", "Asian"] == ["", "", "2", "16"]
    sad = 5 / 8  # of all actors' sad clips, those by women
    uar = 100 * (5 + sad) / 6
    figure, interval, n_actors, n_clips = lines["all", ""]
    assert float(figure) == pytest.approx(uar, abs=0.051)
    low, high = map(float, interval.split(" to "))
    assert 83.3 <= low < uar < high <= 100
    assert (n_actors, n_clips) == ("8", "64")
    ages = {group: cells for (kind, group), cells in lines.items() if kind == "age"}
    assert {group: cells[2] for group, cells in ages.items()} == {
        "20 to 29": "2",
        "30 to 44": "3",
        "45 and older": "3",
    }
    assert ages["20 to 29"][:2] == ["", ""]
    assert ages["30 to 44"][0] == "100.0"
    assert ages["45 and older"][0] == "83.3"


def test_actors_that_the_table_does_not_know_are_a_group_of_their_own(tables, monkeypatch, capsys):
    speakers = pd.read_csv(tables / "speakers.csv")
    speakers[speakers.ActorID < 1005].to_csv(tables / "some.csv", index=False)
    paths = ("--predictions", tables / "predictions.csv", "--speakers", tables / "some.csv")
    lines = group_lines(main_of(monkeypatch, capsys, "groups", *paths))
    assert lines["sex", "unknown"][2:] == ["4", "32"]
    assert lines["all", ""][2:] == ["8", "64"]


# --------------------------------------------------------------------------------------
# cross_validate.py, fine_tuning.py, robustness.py


def test_each_actor_is_tested_once_and_stands_in_one_part():
    tool = importlib.import_module("cross_validate")
    actors = [f"10{i:02}" for i in range(20) for _ in range(1 + i % 3)]
    clips = pd.DataFrame({"stem": [f"{a}_{i}" for i, a in enumerate(actors)], "actor": actors})
    tested = []
    for fold in range(5):
        table = tool.assign(clips, 5, fold)
        parts = {name: set(part.actor) for name, part in table.groupby("split")}
        assert sum(map(len, parts.values())) == 20
        assert len(parts["val"]) == 2
        tested += sorted(parts["test"])
    assert sorted(tested) == sorted(set(actors))


@pytest.fixture
def training(monkeypatch, tmp_path):
    """train_once with a stand-in for the trainer: a list of the scripts that ran."""
    tool = importlib.import_module("editing")
    ran = []

    def run(command):
        ran.append(command[1])
        (command[1].parent / "metrics.json").write_text(f'{{"run": {len(ran)}}}')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(tool.subprocess, "run", run)

    def train(split="train", **constants):
        table = pd.DataFrame({"stem": ["a"], "split": [split]})
        return tool.train_once(tmp_path / "fold", tmp_path / "mels", table, constants)["run"]

    return train, ran


def test_a_finished_training_is_found_again(training, tmp_path):
    train, ran = training
    assert train(EPOCHS=3) == train(EPOCHS=3) == 1
    text = ran[0].read_text(encoding="utf-8")
    for line in ("EPOCHS = 3", "RESUME = True", f"SPLIT = {str(tmp_path / 'fold/fold.csv')!r}"):
        assert re.search(f"^{re.escape(line)}", text, re.MULTILINE), line
    assert (tmp_path / "fold/fold.csv").read_text() == "stem,split\na,train\n"


def test_another_training_in_the_folder_is_refused_and_stays(training, tmp_path):
    train, ran = training
    train(EPOCHS=3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "fold").iterdir()}
    with pytest.raises(SystemExit, match=r"cremad_custom2.py is of another training"):
        train(EPOCHS=4)
    with pytest.raises(SystemExit, match=r"fold.csv is of another training"):
        train("test", EPOCHS=3)
    assert {path.name: path.read_bytes() for path in (tmp_path / "fold").iterdir()} == before
    assert len(ran) == 1


def test_a_condition_holds_this_trainings_clips_alone_in_one_channel(corpus, tmp_path):
    tool = importlib.import_module("robustness")
    folder = tmp_path / "clips"
    first, second = sorted(corpus.iterdir())[:2]
    tool.distort([first], folder, "noise 10 dB")
    samples, rate = soundfile.read(second)
    soundfile.write(tmp_path / "stereo.wav", np.stack([samples, samples], 1), rate)
    tool.distort([tmp_path / "stereo.wav"], folder, "noise 10 dB")
    assert [path.name for path in folder.iterdir()] == ["stereo.wav"]
    assert soundfile.info(folder / "stereo.wav").channels == 1


def test_a_constant_that_is_none_is_a_sentence():
    with pytest.raises(SystemExit, match="EPOCH stands 0 times"):
        importlib.import_module("editing").edited_text(EPOCH=5)


def test_a_table_of_another_model_is_not_taken_for_this_ones(corpus, trained, tmp_path):
    tool = importlib.import_module("robustness")
    model = trained / "best_model.pth"
    results = tmp_path / "out/classification_results.csv"
    assert not tool.is_by(model, results)
    [clip] = sorted(corpus.iterdir())[:1]
    classify(clip, model, tmp_path / "out")
    assert tool.is_by(model, results)
    (tmp_path / "other.pth").write_bytes(model.read_bytes() + b"\0")
    assert not tool.is_by(tmp_path / "other.pth", results)
