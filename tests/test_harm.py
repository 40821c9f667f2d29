"""Harm done on purpose: kills, full disks, vanishing input, two runs at once, mutated files.

    sh tests/run.sh -k harm               a few kills, 1,000 mutated files
    sh tests/run.sh -m slow -k harm -s    30 kills a script, 10,000 mutated files and spectrograms, 20,000 files through
                                          the tester, 30,000 spectrograms through the trainer; prints the counts
"""

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT, TOY, classify, generate, run, train
from editing import edited_trainer

import cremad_custom2
import mel_generator

BY_SIZE = [pytest.param(False, id="few"), pytest.param(True, id="many", marks=pytest.mark.slow)]


def start(script, *arguments, cwd=ROOT):
    """The script at work, in a process group of its own."""
    words = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, str(script), *map(str, arguments)], cwd=cwd, start_new_session=True, **words)


def wait_until(condition, seconds=60):
    """Asks every 5 ms until the condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)


def alive(group):
    """Whether a process of the group still runs (one that has ended and is not yet waited for does not)."""
    stats = [path.read_text(errors="replace").rpartition(") ")[2].split() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return any(int(fields[2]) == group and fields[0] != "Z" for fields in stats)


def kill_at_random(command, kills, longest, check, cwd=ROOT):
    """Starts the command and kills its main process after a random time, over and over; returns how many kills struck."""
    times, struck = random.Random(1), 0
    for _ in range(kills):
        process = start(*command, cwd=cwd)
        try:
            text, _ = process.communicate(timeout=times.uniform(0.3, longest))
            assert process.returncode == 0, text
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            struck += 1
        wait_until(lambda: not alive(process.pid), 5)  # noqa: B023
        check()
    return struck


def files_below(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.startswith("run.")}  # run.json tells the time


@pytest.fixture(scope="module")
def many(corpus, tmp_path_factory):
    """1,920 links to the 48 clips."""
    folder = tmp_path_factory.mktemp("many")
    for path in corpus.iterdir():
        for i in range(40):
            actor, rest = path.name.split("_", 1)
            (folder / f"{actor}_{i}{rest}").symlink_to(path)
    (folder / "1001_IEO_ANG_XX.wav").write_bytes(b"")  # for skipped.csv
    return folder


@pytest.mark.parametrize("slow", BY_SIZE)
def test_harm_generator_killed(many, tmp_path, slow):
    whole, out = tmp_path / "whole", tmp_path / "out"
    generate(many, whole)

    def check():
        for path in list(out.rglob("*.npy"))[::7]:
            assert np.load(path).shape[0] == 128

    command = (ROOT / "mel_generator.py", "--input_dir", many, "--output_dir", out)
    struck = kill_at_random(command, 30 if slow else 3, 1.5, check)
    generate(many, out)
    assert struck and files_below(out) == files_below(whole)
    print(f"\ngenerator: {struck} kills struck, folder byte for byte an unbroken run's")


def history(folder):
    with open(folder / "history.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "train_clips_per_s")} for row in csv.DictReader(file)]


@pytest.mark.parametrize("slow", BY_SIZE)
def test_harm_trainer_killed(mels, tmp_path, slow):
    import torch

    constants = {"EPOCHS": 60 if slow else 6, "PATIENCE": 99}
    train(tmp_path / "whole", mels, **constants)
    script = edited_trainer(tmp_path / "cut", **TOY | constants | {"MEL_DIR": str(mels), "OUTPUT_DIR": str(tmp_path / "cut/output"), "RESUME": True})
    out = tmp_path / "cut/output"

    def check():
        for path in out.glob("*.pth"):
            torch.load(path, weights_only=True)

    struck = kill_at_random((script,), 30 if slow else 3, 6.0, check)
    run(script)
    assert struck and history(out) == history(tmp_path / "whole/output")
    for name, key in (("last_checkpoint.pth", "model"), ("best_model.pth", "model_state_dict")):
        ours, unbroken = (torch.load(folder / name, weights_only=True)[key] for folder in (out, tmp_path / "whole/output"))
        assert all(torch.equal(ours[k], unbroken[k]) for k in unbroken)
    print(f"\ntrainer: {struck} kills struck, history and tensors an unbroken run's")


@pytest.mark.parametrize("slow", BY_SIZE)
def test_harm_tester_killed(many, trained, tmp_path, slow):
    model = trained / "best_model.pth"
    classify(many, model, tmp_path / "whole", "--cpu")
    partial, seen = tmp_path / "out/classification_results.csv.partial", []

    def check():
        rows = partial.read_text().splitlines()[1:-1] if partial.exists() else []
        rows = [row for row in rows if "0 bytes" not in row]  # a file that failed is tried again
        assert set(seen) <= set(rows) or not partial.exists(), "a written row was lost"
        seen[:] = rows

    options = ("--input_dir", many, "--model_path", model, "--output_dir", tmp_path / "out", "--cpu", "--resume", "--batch_size", 4)
    struck = kill_at_random((ROOT / "custom2_tester.py", *options), 30 if slow else 3, 4.0, check)
    run(ROOT / "custom2_tester.py", *options)
    ours, unbroken = (list(csv.DictReader(open(tmp_path / name / "classification_results.csv", newline=""))) for name in ("out", "whole"))
    assert struck and [row["file"] for row in ours] == [row["file"] for row in unbroken] and len(set(row["file"] for row in ours)) == 1921
    assert [row["predicted_class"] for row in ours] == [row["predicted_class"] for row in unbroken]
    print(f"\ntester: {struck} kills struck, 1,921 files once each, no written row lost")


def imports_begun(process):
    """Whether the process has come as far as its first slow import."""
    return "numpy" in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.parametrize("script", ["mel_generator.py", "custom2_tester.py", "cremad_custom2.py"])
@pytest.mark.parametrize("delay", [0, 0.4, 1.5])
def test_harm_ctrl_c_at_any_time(many, mels, trained, tmp_path, script, delay):
    """As a terminal sends it: to every process of the group."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    arguments = ["--input_dir", many, "--output_dir", tmp_path / "out"]
    if script == "cremad_custom2.py":
        path, arguments = edited_trainer(tmp_path, **TOY | {"MEL_DIR": str(mels), "OUTPUT_DIR": str(tmp_path / "output"), "EPOCHS": 500}), []
    else:
        path = ROOT / script
        arguments += ["--n_augmentations", 8] if script == "mel_generator.py" else ["--model_path", trained / "best_model.pth", "--visualize"]
    process = start(path, *arguments)
    wait_until(lambda: imports_begun(process))
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=5)
    assert process.returncode == 130 and "Stopped." in text and "Traceback" not in text, text
    wait_until(lambda: not alive(process.pid), 1)


def test_harm_worker_killed(many, tmp_path):
    process = start(ROOT / "mel_generator.py", "--input_dir", many, "--output_dir", tmp_path / "out", "--n_augmentations", 8)
    wait_until(lambda: any((tmp_path / "out").rglob("*.npy")))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "A worker process was killed" in text and "Traceback" not in text, text
    wait_until(lambda: not alive(process.pid), 5)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_harm_full_disk(corpus, many, mels, trained, small_disk, tmp_path):
    text = generate(corpus, small_disk, code=1)
    assert "No space left on device" in text and str(small_disk) in text
    done = list(small_disk.rglob("*.npy"))
    assert done and all(np.load(path).size for path in done)
    shutil.rmtree(small_disk / "ANG")
    assert "No space left on device" in classify(many, trained / "best_model.pth", small_disk / "results", "--visualize", "--batch_size", 4, code=1)
    text = run(edited_trainer(tmp_path, **TOY | {"MEL_DIR": str(mels), "OUTPUT_DIR": str(small_disk / "output")}), code=1)
    assert "is the disk full?" in text or "No space left" in text


def test_harm_output_that_cannot_be_written(corpus, mels, trained, tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    for text in (generate(corpus, out, code=1), classify(corpus, trained / "best_model.pth", out, code=1), run(edited_trainer(tmp_path, **TOY | {"MEL_DIR": str(mels), "OUTPUT_DIR": str(out)}), code=1)):
        assert "Not a directory" in text and str(out) in text


def test_harm_input_vanishes(many, trained, tmp_path):
    shutil.copytree(many, tmp_path / "in", symlinks=True)
    for script, more, word in (("mel_generator.py", ["--n_augmentations", "8"], "went away"), ("custom2_tester.py", ["--model_path", trained / "best_model.pth", "--batch_size", "2", "--resume"], "went away")):
        process = start(ROOT / script, "--input_dir", tmp_path / "in", "--output_dir", tmp_path / script, *more)
        wait_until(lambda: any((tmp_path / script).rglob("*.npy")) or any(len(p.read_bytes()) > 999 for p in (tmp_path / script).glob("*.partial")))  # noqa: B023
        (tmp_path / "in").rename(tmp_path / "gone")
        text, _ = process.communicate(timeout=60)
        assert process.returncode == 1 and word in text and "Traceback" not in text, text
        (tmp_path / "gone").rename(tmp_path / "in")
    text = run(ROOT / "custom2_tester.py", "--input_dir", tmp_path / "in", "--output_dir", tmp_path / "custom2_tester.py", *more)
    assert "1 of 1921 files could not be classified" in text  # the empty one alone


def test_harm_two_at_once(many, corpus, mels, trained, tmp_path):
    both = [start(ROOT / "mel_generator.py", "--input_dir", corpus, "--output_dir", tmp_path / "out", "--n_augmentations", 2) for _ in range(2)]
    texts = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert files_below(tmp_path / "out") == files_below(mels)
    model = trained / "best_model.pth"
    first = start(ROOT / "custom2_tester.py", "--input_dir", many, "--model_path", model, "--output_dir", tmp_path / "results", "--batch_size", 1)
    wait_until((tmp_path / "results/classification_results.csv.partial").exists)
    assert "is in use" in classify(corpus, model, tmp_path / "results", code=1)
    first.kill()
    first.communicate()
    classify(corpus, model, tmp_path / "results")
    script = edited_trainer(tmp_path / "t", **TOY | {"MEL_DIR": str(mels), "OUTPUT_DIR": str(tmp_path / "t/output"), "EPOCHS": 500, "PATIENCE": 500})
    first = start(script)
    wait_until((tmp_path / "t/output/history.csv").exists)
    assert "is in use" in run(script, code=1)
    first.kill()
    first.communicate()


def test_harm_corners_of_training(mels, tmp_path):
    """One actor to validate and one to test, each without an emotion; 49 clips to train on in batches of 16; long warm-up."""
    stems = sorted(path.stem.removesuffix("_original") for path in mels.glob("*/*_original.npy"))
    sides = {"1001": "val", "1002": "test"}
    rows = [(stem, sides.get(stem[:4], "train")) for stem in stems if stem[:4] not in sides or "_ANG_" not in stem]
    (tmp_path / "split.csv").write_text("stem,split\n" + "".join(f"{stem},{side}\n" for stem, side in rows))
    train(tmp_path, mels, SPLIT=str(tmp_path / "split.csv"), WARMUP_EPOCHS=5, EPOCHS=2)
    metrics = (tmp_path / "output/metrics.json").read_text()
    assert '"uar_ci95": null' in metrics and '"n_clips": 5' in metrics
    report = (tmp_path / "output/classification_report.txt").read_text()
    assert re.search(r"Angry +0\.000 +0\.000 +0\.000 +0", report)
    assert "lower BATCH_SIZE" in train(tmp_path / "big", mels, BATCH_SIZE=4096, code=1)


def sound_files(folder):
    """Whole files in the formats people have, bytes by name."""
    rng, made = np.random.default_rng(0), {}
    for name, (fmt, subtype, rate, channels) in {
        "a.wav": ("WAV", "PCM_16", 16000, 1), "b.wav": ("WAV", "PCM_24", 44100, 2), "c.wav": ("WAV", "FLOAT", 48000, 1), "d.wav": ("WAV", "PCM_U8", 8000, 1),
        "e.flac": ("FLAC", "PCM_16", 16000, 1), "f.wav": ("WAV", "DOUBLE", 22050, 1), "g.wav": ("WAVEX", "PCM_16", 16000, 2), "h.wav": ("WAV", "ULAW", 8000, 1),
    }.items():  # fmt: skip
        soundfile.write(folder / name, 0.1 * rng.standard_normal((rate // 4, channels)), rate, format=fmt, subtype=subtype)
        made[name] = (folder / name).read_bytes()
    return made


def mutate(data, rng):
    """Bytes flipped (most in the header), cut, doubled, replaced or glued."""
    data, kind = bytearray(data), rng.integers(6)
    if kind <= 1:
        for at in rng.integers(min(len(data), 80), size=rng.integers(1, 8)):
            data[at] = rng.integers(256)
    elif kind == 2:
        for at in rng.integers(len(data), size=50):
            data[at] = rng.integers(256)
    elif kind == 3:
        del data[rng.integers(len(data)) :]
    elif kind == 4:
        at = rng.integers(min(len(data), 80))
        data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
    else:
        at = rng.integers(len(data))
        data[at:at] = rng.bytes(rng.integers(1, 100))
    return bytes(data)


@pytest.mark.parametrize("slow", BY_SIZE)
def test_harm_mutated_sound_files(tmp_path, slow):
    """Each gives a finite spectrogram or a ValueError in words; whole files, one in ten, always a spectrogram."""
    rng, whole, outcomes = np.random.default_rng(7), sound_files(tmp_path), Counter()
    for i in range(10_000 if slow else 1000):
        name = rng.choice(list(whole))
        path = tmp_path / f"x{Path(name).suffix}"
        path.write_bytes(whole[name] if i % 10 == 0 else mutate(whole[name], rng))
        try:
            mel = mel_generator.log_mel(mel_generator.load_audio(path, 16000, 512), 16000, 2048, 512, 128, 0.0, 8000.0)
            assert np.isfinite(mel).all() and mel.shape[0] == 128
            outcomes["a spectrogram"] += 1
        except ValueError as error:
            assert i % 10, f"{name} is whole: {error}"
            outcomes[str(error).split(":")[0]] += 1
    assert {"a spectrogram", "unreadable"} <= set(outcomes)
    print(f"\nsound files: {dict(outcomes)}")


@pytest.mark.parametrize("slow", BY_SIZE)
def test_harm_mutated_spectrograms(tmp_path, slow):
    """Each is read as finite float32 or ends the program with a sentence that names the file."""
    rng, outcomes, path = np.random.default_rng(8), Counter(), tmp_path / "x.npy"
    np.save(path, rng.standard_normal((128, 40), dtype=np.float32))
    whole = path.read_bytes()
    for i in range(10_000 if slow else 1000):
        path.write_bytes(whole if i % 10 == 0 else mutate(whole, rng))
        try:
            mel = cremad_custom2.read_spectrogram(path, 128)
            assert np.isfinite(mel).all() and mel.dtype == np.float32 and mel.shape[1] == 128
            outcomes["read"] += 1
        except SystemExit as end:
            assert i % 10 and str(path) in str(end) and "run mel_generator.py again" in str(end)
            outcomes[re.sub(r"[(\d].*", "", str(end).replace(str(path), "")).strip()] += 1
    assert len(outcomes) > 1
    print(f"\nspectrograms: {dict(outcomes)}")


def memory_between(log, command, begun, ended):
    """Resident memory (MB) of a command from the moment that begun() holds until ended() does, ten times a second."""
    with open(log, "w") as output:
        process = subprocess.Popen([sys.executable, *map(str, command)], stdout=output, stderr=subprocess.STDOUT)
    samples = []
    while process.poll() is None and not ended():
        if begun():
            status = Path(f"/proc/{process.pid}/status").read_text()
            samples += [int(kilobytes) / 1000 for kilobytes in re.findall(r"^VmRSS:\s+(\d+)", status, re.M)]
        time.sleep(0.1)
    assert process.wait() == 0, log.read_text()
    return samples


def assert_flat(what, samples):
    """The last tenth of the time needs no more memory than the second: at most 5 % or 30 MB."""
    n = len(samples) // 10
    assert n >= 3, f"too few looks: {len(samples)}"
    early, late = np.mean(samples[n : 2 * n]), np.mean(samples[-n:])
    print(f"\n{what}: {early:.0f} MB in the second tenth of the time, {late:.0f} MB in the last")
    assert late < max(1.05 * early, early + 30)


@pytest.mark.slow
def test_harm_20_000_files_in_flat_memory(corpus, trained, tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    (tmp_path / "in").mkdir()
    clips = sorted(corpus.iterdir())
    for i in range(20_000):
        (tmp_path / f"in/{i}.wav").symlink_to(clips[i % len(clips)])
    results = tmp_path / "out/classification_results.csv"
    options = ("--input_dir", tmp_path / "in", "--model_path", trained / "best_model.pth", "--output_dir", results.parent, "--cpu")
    partial = results.with_name(f"{results.name}.partial")
    samples = memory_between(tmp_path / "log", (ROOT / "custom2_tester.py", *options), partial.exists, results.exists)
    assert len(results.read_text().splitlines()) == 20_001
    assert_flat("tester, 20,000 files", samples)


@pytest.mark.slow
def test_harm_30_000_spectrograms_in_flat_memory(mels, tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    for path in mels.glob("*/*.npy"):
        actor, rest = path.name.split("_", 1)
        (tmp_path / "mels" / path.parent.name).mkdir(parents=True, exist_ok=True)
        for i in range(209):  # times 144 spectrograms
            os.link(path, tmp_path / "mels" / path.parent.name / f"{actor}_{i}{rest}")
    shutil.copy(mels / "mel_config.json", tmp_path / "mels")
    out = tmp_path / "output"
    script = edited_trainer(tmp_path, **TOY | {"MEL_DIR": str(tmp_path / "mels"), "OUTPUT_DIR": str(out), "EPOCHS": 1})
    # split.csv is written when all spectrograms have been read
    samples = memory_between(tmp_path / "log", (script,), (out / "split.csv").exists, (out / "last_checkpoint.pth").exists)
    assert_flat("trainer, 30,000 spectrograms", samples)
