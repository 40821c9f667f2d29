"""custom2_tester.py: the trainer's figures again, the results' contract, bad input."""

import csv
import json
import math
import os
import pickle
import re
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import ROOT, classify, generate, run, train
from sklearn.metrics import accuracy_score, recall_score
from test_generator import bad_files

import custom2_tester as tester

COLUMNS = "file,predicted_class,predicted_code,confidence,Angry,Disgust,Fear,Happy,Neutral,Sad,duration_s,true_class,error,unheard_s,uncertain"
NAMES = COLUMNS.split(",")[4:10]


def results(folder):
    with open(folder / "classification_results.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def unheard(corpus, trained, tmp_path_factory):
    """The audio of the trainer's test clips."""
    folder = tmp_path_factory.mktemp("unheard")
    for stem in pd.read_csv(trained / "test_predictions.csv").stem:
        shutil.copy(corpus / f"{stem}.wav", folder)
    return folder


def assert_the_trainers_answers(output_dir, trained):
    """That the tester's probabilities are the trainer's, in a model whose answers differ from clip to clip."""
    ours = pd.DataFrame(results(output_dir)).set_index("file")
    theirs = pd.read_csv(trained / "test_predictions.csv").set_index("stem")
    theirs.index += ".wav"
    assert (theirs[NAMES].max() - theirs[NAMES].min()).max() > 0.05
    assert (ours.loc[theirs.index, NAMES].astype(float) - theirs[NAMES]).abs().max().max() < 1e-4
    assert (ours.loc[theirs.index].predicted_class == theirs.predicted_class).all()


def test_the_trainers_test_figures_again(trained, unheard, tmp_path):
    text = classify(unheard, trained / "best_model.pth", tmp_path, "--cpu", "--batch_size", 4)
    assert_the_trainers_answers(tmp_path, trained)
    test = json.loads((trained / "metrics.json").read_text())["test"]
    assert f"accuracy {100 * test['accuracy']:.1f} %, UAR {100 * test['uar']:.1f} %" in text
    assert f"accuracy {100 * test['accuracy']:.1f} %" in (tmp_path / "classification_report.txt").read_text()


def test_outputs_are_those_of_the_contract(trained, unheard, tmp_path):
    classify(unheard, trained / "best_model.pth", tmp_path, "--visualize", "--workers", 2)
    assert {p.name for p in tmp_path.iterdir()} == {"classification_results.csv", "summary.csv", "confidence_distribution.png", "confusion_matrix.png", "classification_report.txt", "mel_spectrograms", "run.json"}
    assert (tmp_path / "classification_results.csv").read_text().splitlines()[0] == COLUMNS
    rows = results(tmp_path)
    assert [r["file"] for r in rows] == sorted(p.name for p in unheard.iterdir())
    for row in rows:
        probabilities = [float(row[n]) for n in NAMES]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5) and float(row["confidence"]) == max(probabilities)
        assert row["predicted_class"] == NAMES[int(np.argmax(probabilities))] and row["predicted_class"][:3].upper() == row["predicted_code"]
        assert float(row["duration_s"]) == pytest.approx(soundfile.info(unheard / row["file"]).duration, abs=1e-3)
        assert row["true_class"][:3].upper() == row["file"].split("_")[2]
    summary = pd.read_csv(tmp_path / "summary.csv")
    assert summary["class"].tolist() == NAMES
    for line in summary.itertuples():
        confidence = [float(row["confidence"]) for row in rows if row["predicted_class"] == line._1]
        assert line.count == len(confidence) and line.percentage == pytest.approx(100 * len(confidence) / len(rows), abs=0.01)
        assert line.mean_confidence == pytest.approx(np.mean(confidence), abs=1e-4) if confidence else math.isnan(line.mean_confidence)
    assert {p.stem for p in (tmp_path / "mel_spectrograms").iterdir()} == {p.stem for p in unheard.iterdir()}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in tmp_path.rglob("*.png"))


def test_figures_where_some_emotions_are_rarer(corpus, trained, tmp_path):
    """Where every emotion is as frequent, UAR is accuracy."""
    (tmp_path / "in").mkdir()
    for i, path in enumerate(sorted(corpus.iterdir(), key=lambda path: path.name.split("_")[2])[:40]):
        if i % 3:
            shutil.copy(path, tmp_path / "in")
    text = classify(tmp_path / "in", trained / "best_model.pth", tmp_path / "out", "--cpu")
    rows = results(tmp_path / "out")
    true, predicted = ([row[column] for row in rows] for column in ("true_class", "predicted_class"))
    accuracy, uar = accuracy_score(true, predicted), recall_score(true, predicted, average="macro", labels=sorted(set(true)))
    assert abs(accuracy - uar) > 0.001 and f"accuracy {100 * accuracy:.1f} %, UAR {100 * uar:.1f} %" in text


def test_features_travel_in_the_checkpoint(corpus, tmp_path):
    generate(corpus, tmp_path / "mels", "--n_mels", 64, "--hop_length", 256, "--no_augment")
    train(tmp_path / "run", tmp_path / "mels", MAX_WIDTH=60, EPOCHS=15)
    model = tmp_path / "run/output/best_model.pth"
    (tmp_path / "alone").mkdir()
    shutil.copy(ROOT / "custom2_tester.py", tmp_path / "alone")
    text = run(tmp_path / "alone/custom2_tester.py", "--input_dir", corpus, "--model_path", model, "--output_dir", tmp_path / "out", cwd=tmp_path)
    assert_the_trainers_answers(tmp_path / "out", tmp_path / "run/output")
    assert re.search(r"files are longer than 60 frames: [\d.]+ s are unheard", text)
    assert "longer than" not in classify(corpus, model, tmp_path / "whole", "--max_width", 1000)


def test_awkward_names_one_file_and_failures(corpus, trained, tmp_path):
    source, folder = sorted(corpus.iterdir())[0], tmp_path / "in"
    (folder / "sub, folder").mkdir(parents=True)
    (folder / "x.wav").mkdir()
    names = [os.fsdecode(b"J\xfcrgen.wav"), "=1+1.wav", "-x.WAV", "+.wav", "@a.wav", "new\nline.wav", 'quo"te.wav', "sub, folder/b c.wav", "ünï😀.wav", "$x$.wav", "n" * 246 + ".wav"]
    for name in names:
        shutil.copy(source, folder / name)
    words = bad_files(folder)
    text = classify(folder, trained / "best_model.pth", tmp_path / "out", "--visualize")
    rows = {r["file"]: r for r in results(tmp_path / "out")}
    shown = [f"./{n}" if n[0] in "=+-@" else n for n in names]
    assert rows.keys() == {*shown, *words}
    assert len({rows[n]["confidence"] for n in shown}) == 1 and not any(rows[n]["error"] for n in shown)
    for name, word in words.items():
        assert word in rows[name]["error"] and rows[name]["confidence"] == rows[name]["predicted_class"] == ""
    assert f"{len(words)} of {len(rows)} files could not be classified" in text
    assert (tmp_path / "out/mel_spectrograms/sub, folder/b c.png").exists() and len(list(tmp_path.rglob("*.png"))) == len(names) + 1
    classify(folder, trained / "best_model.pth", tmp_path / "out", "--strict", code=1)
    text = classify(source, trained / "best_model.pth", tmp_path / "one")
    assert [r["file"] for r in results(tmp_path / "one")] == [source.name] and source.name in text


def test_runs_repeat_byte_for_byte_and_resume(corpus, trained, tmp_path):
    model = trained / "best_model.pth"
    for name in ("one", "two"):
        classify(corpus, model, tmp_path / name, "--cpu")
    whole = (tmp_path / "one/classification_results.csv").read_bytes()
    assert (tmp_path / "two/classification_results.csv").read_bytes() == whole
    partial = tmp_path / "two/classification_results.csv.partial"
    lines = whole.splitlines(keepends=True)
    marked = lines[1].replace(lines[1].split(b",")[3], b"0.123456", 1)  # rows that were written are kept, not made again
    partial.write_bytes(b"".join([lines[0], marked, *lines[2:20]]) + lines[20][:30])
    classify(corpus, model, tmp_path / "two", "--cpu", "--resume")
    (tmp_path / "three").mkdir()
    for name, word in (("classification_results.csv.partial", whole), ("classification_results.csv.run", b"another")):
        (tmp_path / "three" / name).write_bytes(word)
    assert "is of another model" in classify(corpus, model, tmp_path / "three", "--resume", code=1)
    again = (tmp_path / "two/classification_results.csv").read_bytes().splitlines(keepends=True)
    assert again[1] == marked and [row.split(b",")[0] for row in again] == [row.split(b",")[0] for row in lines] and not partial.exists()


def damaged(path, what):
    checkpoint = torch.load(path, weights_only=True)
    state, config = checkpoint["model_state_dict"], checkpoint["model_config"]
    changes = {"lacks": lambda: checkpoint.pop("mel_config"), "newer": lambda: checkpoint.update(format_version=99), "NaN": lambda: state["head.0.weight"].fill_(float("nan")), "infinite": lambda: state["head.8.bias"].__setitem__(0, -math.inf),
               "cold": lambda: checkpoint.update(temperature=-1.0), "narrow": lambda: checkpoint.update(max_width=0), "twins": lambda: checkpoint["classes"].__setitem__(0, checkpoint["classes"][1]),
               "deviation": lambda: checkpoint["normalization"]["std"].__setitem__(0, 0.0), "rate": lambda: checkpoint["mel_config"].update(sample_rate=0), "hop": lambda: checkpoint["mel_config"].update(hop_length=0),
               "heads": lambda: config.update(heads=5), "edges": lambda: checkpoint["mel_config"].pop("fmin"), "tensor": lambda: checkpoint.update(format_version=torch.ones(3)),
               "size": lambda: config.update(hidden=16), "bands": lambda: checkpoint["mel_config"].update(n_mels=64), "keys": lambda: state.pop("head.0.weight")}  # fmt: skip
    changes[what]()
    torch.save(checkpoint, path)


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


@pytest.mark.parametrize("make, word", [
    (lambda p: p.write_text("hello"), "is damaged, or no checkpoint"), (lambda p: p.write_bytes(p.read_bytes()[:5000]), "is damaged, or no checkpoint"), (lambda p: p.write_bytes(b""), "is damaged, or no checkpoint"),
    (lambda p: p.write_bytes(pickle.dumps(Bomb())), "is damaged, or no checkpoint"), (lambda p: torch.save(Bomb(), p), "is damaged, or no checkpoint"), (lambda p: p.unlink(), "No such file"),
    (lambda p: torch.save({"weight": torch.ones(2)}, p), "it lacks format_version"), (lambda p: torch.save([1], p), "is no best_model.pth"),
    (lambda p: damaged(p, "lacks"), "lacks mel_config"), (lambda p: damaged(p, "newer"), "format version 99"), (lambda p: damaged(p, "NaN"), "NaN or infinite"), (lambda p: damaged(p, "infinite"), "NaN or infinite"),
    (lambda p: damaged(p, "size"), "contradicts itself"), (lambda p: damaged(p, "bands"), "number of mel bands"), (lambda p: damaged(p, "keys"), "contradicts itself"),
    (lambda p: damaged(p, "cold"), "temperature is no number over 0"), (lambda p: damaged(p, "narrow"), "max_width is no whole number"), (lambda p: damaged(p, "twins"), "a code and a name for each"),
    (lambda p: damaged(p, "deviation"), "deviation of the normalization"), (lambda p: damaged(p, "rate"), "sample_rate is none"), (lambda p: damaged(p, "hop"), "contradicts itself"),
    (lambda p: damaged(p, "heads"), "contradicts itself"), (lambda p: damaged(p, "edges"), "contradicts itself"), (lambda p: damaged(p, "tensor"), "format version"),
])  # fmt: skip
def test_strangers_checkpoints(trained, tmp_path, monkeypatch, make, word):
    path = tmp_path / "model.pth"
    shutil.copy(trained / "best_model.pth", path)
    make(path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:  # in this process, because PyTorch's import takes seconds
        tester.load_checkpoint(path, torch.device("cpu"))
    assert word in end.value.code and "model.pth" in end.value.code and not (tmp_path / "exploded").exists()


def test_a_strangers_checkpoint_on_the_command_line(corpus, trained, tmp_path):
    (tmp_path / "model.pth").write_bytes(pickle.dumps(Bomb()))
    text = classify(corpus, tmp_path / "model.pth", tmp_path / "out", code=1)
    assert "is damaged, or no checkpoint" in text and not (ROOT / "exploded").exists() and not (tmp_path / "out").exists()


def test_a_gpu_that_cannot_compute_is_a_sentence(monkeypatch):
    def too_old(device):
        if device.type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tester, "compute_on", too_old)
    with pytest.raises(SystemExit, match=r"no kernel image is available\): give --cpu"):
        tester.gpu_or_cpu(cpu=False)
    assert tester.gpu_or_cpu(cpu=True).type == "cpu"


def test_wrong_arguments_and_folders(corpus, trained, tmp_path):
    model = trained / "best_model.pth"
    assert "--batch_size" in classify(corpus, model, tmp_path / "out", "--batch_size", 0, code=2)
    assert "does not exist" in classify(tmp_path / "absent", model, tmp_path / "out", code=1)
    (tmp_path / "empty").mkdir()
    assert "holds no .wav or .flac" in classify(tmp_path / "empty", model, tmp_path / "out", code=1)
    bad_files(tmp_path / "empty")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/summary.csv").write_text("of an earlier run")
    assert "No file could be classified" in classify(tmp_path / "empty", model, tmp_path / "out", code=1)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["classification_results.csv", "run.json"]
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in classify(corpus, model, tmp_path / "file/out", code=1)


@pytest.fixture(scope="module")
def speech(corpus, tmp_path_factory):
    """A folder with one long recording (synthetic clips end to end, silence within), one short clip, one broken file."""
    folder = tmp_path_factory.mktemp("speech")
    clips = [soundfile.read(path)[0] for path in sorted(corpus.iterdir())[:14]]
    soundfile.write(folder / "long.wav", np.concatenate([*clips[:7], np.zeros(80000), *clips[7:]]), 16000)
    shutil.copy(sorted(corpus.iterdir())[0], folder / "short.wav")
    (folder / "broken.wav").write_bytes(b"RIFF")
    return folder


def test_segments_are_the_windows_classified_alone(speech, trained, tmp_path):
    model = trained / "best_model.pth"
    classify(speech, model, tmp_path / "out", "--segments", "--visualize", "--cpu")
    segments = pd.read_csv(tmp_path / "out/segments.csv")
    rows = {row["file"]: row for row in results(tmp_path / "out")}
    seconds = soundfile.info(speech / "long.wav").duration
    long = segments[segments.file == "long.wav"]
    assert long.start_s.tolist() == pytest.approx([*np.arange(0, seconds - 3, 1.5), seconds - 3], abs=2e-3)
    assert (long.end_s - long.start_s).tolist() == pytest.approx([3.0] * len(long), abs=2e-3)
    silent = long.predicted_class.isna()
    assert 1 <= silent.sum() < 4 and (segments.file == "short.wav").sum() == 1
    assert [float(rows["long.wav"][name]) for name in NAMES] == pytest.approx(long[NAMES].mean().tolist(), abs=1e-5)
    assert float(rows["long.wav"]["duration_s"]) == pytest.approx(seconds, abs=1e-3) and float(rows["long.wav"]["unheard_s"]) == 0
    assert "unreadable" in rows["broken.wav"]["error"]
    samples, windows = soundfile.read(speech / "long.wav")[0], tmp_path / "windows"
    windows.mkdir()
    for i, start in zip(np.flatnonzero(~silent), long.start_s[~silent], strict=True):
        soundfile.write(windows / f"{i:03}.wav", samples[round(start * 16000) : round(start * 16000) + 48000], 16000)
    classify(windows, model, tmp_path / "alone", "--cpu")
    alone = np.array([[float(row[name]) for name in NAMES] for row in results(tmp_path / "alone")])
    assert np.abs(alone - long[NAMES][~silent].to_numpy()).max() < 1e-3
    assert {path.name for path in (tmp_path / "out/mel_spectrograms").iterdir()} == {"long.png", "short.png"}


def test_unheard_seconds_and_uncertain_rows(speech, trained, tmp_path):
    text = classify(speech, trained / "best_model.pth", tmp_path, "--min_confidence", 0.99)
    rows = {row["file"]: row for row in results(tmp_path)}
    seconds = soundfile.info(speech / "long.wav").duration
    assert float(rows["long.wav"]["unheard_s"]) == pytest.approx(seconds - 191 * 512 / 16000, abs=1e-3)
    assert rows["short.wav"]["unheard_s"] == "0.000" and rows["broken.wav"]["unheard_s"] == "" == rows["broken.wav"]["uncertain"]
    assert rows["long.wav"]["uncertain"] == "yes" and "2 files are uncertain" in text and "s are unheard" in text
    between = np.mean([float(rows[name]["confidence"]) for name in ("long.wav", "short.wav")])
    assert "1 files are uncertain" in classify(speech, trained / "best_model.pth", tmp_path, "--min_confidence", between)
    assert all((row["uncertain"] == "yes") == (float(row["confidence"]) < between) for row in results(tmp_path) if not row["error"])
    assert "would go unheard" in classify(speech, trained / "best_model.pth", tmp_path, "--segments", "--step", 4, code=2)
    assert "are for --segments" in classify(speech, trained / "best_model.pth", tmp_path, "--window", 5, code=2)
    assert "1.0 s are unheard" not in text and "longer than --max_width" in classify(speech, trained / "best_model.pth", tmp_path, "--segments", "--window", 10, code=1)


def test_an_hour_in_windows_takes_no_more_memory(trained, tmp_path):
    """Peak memory of an hour against five minutes of noise: under 100 MB more, where an hour decoded is 230 MB."""
    import resource
    import subprocess
    import sys

    peaks = []
    for name, minutes in (("short", 5), ("hour", 60)):
        (tmp_path / name).mkdir()
        with soundfile.SoundFile(tmp_path / name / "noise.wav", "w", 16000, 1) as file:
            for seed in range(minutes):
                file.write(0.1 * np.random.default_rng(seed).standard_normal(960_000))
        code = f"import resource, subprocess, sys; subprocess.run([sys.executable, *{['custom2_tester.py', '--input_dir', str(tmp_path / name), '--model_path', str(trained / 'best_model.pth'), '--output_dir', str(tmp_path / ('out' + name)), '--segments', '--cpu', '--workers', '2']}], check=True); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
        rows = pd.read_csv(tmp_path / f"out{name}" / "segments.csv")
        assert len(rows) == minutes * 40 - 1
    assert resource and peaks[1] - peaks[0] < 100, peaks


def test_shards_joined_are_one_run(corpus, trained, tmp_path):
    model, options = trained / "best_model.pth", ("--segments", "--window", 0.5, "--step", 0.5, "--cpu", "--batch_size", 4)
    classify(corpus, model, tmp_path / "one", *options)
    from test_harm import start

    parts = [start(ROOT / "custom2_tester.py", "--input_dir", corpus, "--model_path", model, "--output_dir", tmp_path / "three", *options, "--shard", f"{i}/3") for i in range(3)]
    assert [part.wait(120) for part in parts] == [0, 0, 0]
    classify(corpus, model, tmp_path / "three", *options, "--merge")
    whole, joined = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if not path.name.startswith("run")} for name in ("one", "three"))
    assert {name: len(data) for name, data in joined.items()} == {name: len(data) for name, data in whole.items()} and joined == whole
    assert "not one of each" in classify(corpus, model, tmp_path / "three", "--merge", code=1)
    classify(corpus, model, tmp_path / "three", "--shard", "1/3")
    assert "run --shard 0/3, --shard 2/3" in classify(corpus, model, tmp_path / "three", "--merge", code=1)
    for i in range(3):
        classify(corpus, model, tmp_path / "three", "--shard", f"{i}/3", "--cpu")
    assert "another model, --input_dir or option" in classify(corpus, model, tmp_path / "three", "--merge", "--max_width", 50, code=1)
    other = tmp_path / "other.pth"
    torch.save(torch.load(model, weights_only=True) | {"epoch": 99}, other)
    assert "another model, --input_dir or option" in classify(corpus, other, tmp_path / "three", "--merge", code=1)
    again = tmp_path / "three/classification_results.0-of-3.csv.partial"
    (stray := tmp_path / "three/classification_results.one-of-mine.csv").touch()
    again.write_bytes(b"")  # a shard that was begun again, of whatever model, and killed
    assert "run --shard 0/3" in classify(corpus, model, tmp_path / "three", "--merge", code=1)
    again.unlink()
    classify(corpus, model, tmp_path / "three", "--merge")  # what was refused is all there
    assert list((tmp_path / "three").glob("*-of-*.csv*")) == [stray]
    assert "take I/N" in classify(corpus, model, tmp_path / "three", "--shard", "3/3", code=2)


def test_shards_of_a_folder_that_changed_are_not_joined(corpus, trained, tmp_path):
    shutil.copytree(corpus, tmp_path / "in")
    model = trained / "best_model.pth"
    for i in range(2):
        classify(tmp_path / "in", model, tmp_path / "out", "--shard", f"{i}/2", "--cpu")
    shutil.copy(sorted(corpus.iterdir())[0], tmp_path / "in/new.wav")
    assert "new.wav came or went" in classify(tmp_path / "in", model, tmp_path / "out", "--merge", code=1)


def test_damage_within_a_recording_is_an_error_with_segments_too(trained, tmp_path):
    samples = 0.1 * np.random.default_rng(0).standard_normal(160_000).astype(np.float32)
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in/cut.flac", samples, 16000)
    data = (tmp_path / "in/cut.flac").read_bytes()
    (tmp_path / "in/cut.flac").write_bytes(data[: len(data) // 2])
    samples[80_000] = np.nan
    soundfile.write(tmp_path / "in/nan.wav", samples, 16000, subtype="FLOAT")
    unknown = bytearray(data)
    unknown[21:26] = bytes([unknown[21] & 0xF0, 0, 0, 0, 0])  # STREAMINFO's 36 bits: how many samples
    (tmp_path / "in/unknown.flac").write_bytes(unknown)
    for options in (("--segments",), ()):
        classify(tmp_path / "in", trained / "best_model.pth", tmp_path / "out", "--cpu", "--max_width", 400, *options, code=1)
        errors = [row["error"] for row in results(tmp_path / "out")]
        assert "unreadable" in errors[0] or "empty" in errors[0], errors
        assert "not finite" in errors[1] and "does not tell its length" in errors[2]


def test_windows_never_repeat_one(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(48_000), 16000)
    starts = [start for _, start in tester.cut_windows(["a.wav"], tmp_path, 0.9, 0.7)]
    assert starts == pytest.approx([0.0, 0.7, 1.4, 2.1])


def test_resuming_never_leaves_fewer_rows(corpus, trained, tmp_path):
    """A disk that is full when a resumed run takes up the rows: they stay. Names may hold a carriage return."""
    shutil.copytree(corpus, tmp_path / "in")
    for name in ("a\rb.wav", "c\nd.wav"):
        shutil.copy(sorted(corpus.iterdir())[0], tmp_path / "in" / name)
    (tmp_path / "in/mended.wav").write_bytes(b"RIFF")
    classify(tmp_path / "in", trained / "best_model.pth", tmp_path / "out", "--cpu")
    table, partial = tmp_path / "out/classification_results.csv", tmp_path / "out/classification_results.csv.partial"
    assert {"a\rb.wav", "c\nd.wav"} <= {row["file"] for row in results(tmp_path / "out")}
    table.rename(partial)
    rows = partial.read_bytes()
    (tmp_path / "out/classification_results.csv.partial.tmp").mkdir()  # cannot be opened for writing
    classify(tmp_path / "in", trained / "best_model.pth", tmp_path / "out", "--cpu", "--resume", code=1)
    assert partial.read_bytes() == rows
    (tmp_path / "out/classification_results.csv.partial.tmp").rmdir()
    classify(tmp_path / "in", trained / "best_model.pth", tmp_path / "out", "--cpu", "--resume")
    assert table.read_bytes() == rows
    table.rename(partial)  # pictures that an earlier run did not draw are drawn
    classify(tmp_path / "in", trained / "best_model.pth", tmp_path / "out", "--cpu", "--resume", "--visualize")
    assert len(list((tmp_path / "out/mel_spectrograms").iterdir())) == 50
    table.rename(partial)
    shutil.copy(sorted(corpus.iterdir())[0], tmp_path / "in/mended.wav")  # a file that failed is tried again
    classify(tmp_path / "in", trained / "best_model.pth", tmp_path / "out", "--cpu", "--resume", "--strict")
    assert {row["file"]: row["predicted_class"] for row in results(tmp_path / "out")}["mended.wav"]


def test_a_failure_after_classifying_loses_no_row(corpus, trained, tmp_path):
    (tmp_path / "summary.csv.tmp").mkdir()
    text = classify(corpus, trained / "best_model.pth", tmp_path, "--cpu", code=1)
    assert "summary.csv" in text and "--resume" in text
    (tmp_path / "summary.csv.tmp").rmdir()
    text = classify(corpus, trained / "best_model.pth", tmp_path, "--cpu", "--resume")
    assert "Classifying: 0" in text and len(results(tmp_path)) == 48, "classified again"


def test_voices_of_the_training_are_told(corpus, unheard, trained, tmp_path):
    assert "the model was trained on" in classify(corpus, trained / "best_model.pth", tmp_path)
    assert "the model was trained on" in (tmp_path / "classification_report.txt").read_text()
    assert "the model was trained on" not in classify(unheard, trained / "best_model.pth", tmp_path)


def test_a_moment_of_sound_in_an_hour_is_in_the_picture(tmp_path):
    parts = [(0.0, 0.5, None), (3599.5, 0.5, np.zeros((128, 16), np.float32))]
    config = {"fmin": 0.0, "fmax": 8000.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tester.draw_timeline(str(tmp_path / "a.png"), "a", parts, np.full((2, 6), 1 / 6), NAMES, config)
    assert (tmp_path / "a.png").exists()
