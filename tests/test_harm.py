"""Harm done on purpose: kills, full disks, vanishing input, two runs at once, mutated files.

sh tests/run.sh -k harm               a few kills, 1,000 mutated files of each kind
sh tests/run.sh -m slow -k harm -s    30 kills a script, 10,000 mutated files of each kind,
                                      20,000 files through the tester, 30,000 spectrograms
                                      through the trainer; prints the counts
"""

import json
import multiprocessing.process
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
from conftest import ROOT, TOY, classify, generate, read_table, run, start, train, wait_until
from editing import edited_trainer

GENERATOR = ROOT / "mel_generator.py"
TESTER = ROOT / "custom2_tester.py"
BY_SIZE = [pytest.param(False, id="few"), pytest.param(True, id="many", marks=pytest.mark.slow)]
posix = pytest.mark.skipif(os.name == "nt", reason="needs signals to process groups")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def link_clips(corpus: Path, folder: Path, copies: int) -> Path:
    """Fills a folder with links to the 48 clips, `copies` each, and one empty file."""
    for path in corpus.iterdir():
        actor, rest = path.name.split("_", 1)
        for i in range(copies):
            (folder / f"{actor}_{i}{rest}").symlink_to(path)
    (folder / "1001_IEO_ANG_XX.wav").write_bytes(b"")  # for skipped.csv
    return folder


@pytest.fixture(scope="module")
def many(corpus, tmp_path_factory):
    """480 links and an empty file."""
    return link_clips(corpus, tmp_path_factory.mktemp("many"), 10)


@pytest.fixture(scope="module")
def very_many(corpus, tmp_path_factory):
    """1,920 links and an empty file."""
    return link_clips(corpus, tmp_path_factory.mktemp("very_many"), 40)


def is_alive(group: int) -> bool:
    """Whether a process of the group still runs; one that waits to be reaped does not."""
    if not sys.platform.startswith("linux"):
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(") ")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def finish(process: subprocess.Popen, code: int, seconds: float = 120) -> str:
    """Waits for a process that must end with the code and leave no process; returns its text."""
    text, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, text
    assert "Traceback" not in text, text
    wait_until(lambda: not is_alive(process.pid), 10)
    return text


def kill(process: subprocess.Popen) -> None:
    """Kills the main process alone; those that it started must end by themselves."""
    process.kill()
    process.communicate()
    wait_until(lambda: not is_alive(process.pid), 10)


def kill_at_random(command, kills, longest, progress, check) -> int:
    """Starts a command and kills its main process, over and over; returns how many kills struck.

    Two in three strike up to `longest` seconds after progress() has changed, so at work; the
    third that long after the start.
    """
    times = random.Random(1)
    struck = 0
    for i in range(kills):
        before = progress()
        process = start(*command)
        if i % 3 < 2:
            wait_until(lambda: process.poll() is not None or progress() != before)  # noqa: B023
        time.sleep(times.uniform(0, longest))
        if process.poll() is None:
            kill(process)
            struck += 1
        else:
            finish(process, 0)
        check()
    return struck


def tables_and_arrays(folder: Path) -> dict[Path, bytes]:
    """Every spectrogram and CSV below a folder."""
    paths = [*folder.rglob("*.npy"), *folder.rglob("*.csv")]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


# --------------------------------------------------------------------------------------
# Kills


@posix
@pytest.mark.parametrize("slow", BY_SIZE)
def test_harm_generator_killed(request, tmp_path, slow):
    folder = request.getfixturevalue("very_many" if slow else "many")
    whole, out = tmp_path / "whole", tmp_path / "out"
    generate(folder, whole)

    def check():
        for path in list(out.rglob("*.npy"))[::7]:
            assert np.load(path).shape[0] == 128

    command = (GENERATOR, "--input_dir", folder, "--output_dir", out)
    n_kills = 30 if slow else 3
    struck = kill_at_random(command, n_kills, 0.3, lambda: len([*out.rglob("*.npy")]), check)
    generate(folder, out)
    assert struck
    assert tables_and_arrays(out) == tables_and_arrays(whole)
    assert not [*out.rglob("*.tmp")], "a killed run's leftovers"
    print(f"\ngenerator: {struck} kills struck, folder byte for byte an unbroken run's")


def history(folder: Path) -> list[dict[str, str]]:
    """history.csv without what depends on the clock."""
    rows = read_table(folder / "history.csv")
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "train_clips_per_s")} for row in rows
    ]


@posix
@pytest.mark.parametrize("slow", BY_SIZE)
def test_harm_trainer_killed(mels, tmp_path, slow):
    import torch

    # float32: the trial that chooses bfloat16 may end otherwise in the other run
    constants = TOY | {"EPOCHS": 60 if slow else 4, "PATIENCE": 99, "AMP": "off"}
    train(tmp_path, mels, **constants)
    whole, out = tmp_path / "output", tmp_path / "cut" / "output"
    paths = {"MEL_DIR": str(mels), "OUTPUT_DIR": str(out), "RESUME": True}
    script = edited_trainer(out.parent, **constants | paths)
    checkpoint = out / "last_checkpoint.pth"

    def check():
        for path in out.glob("*.pth"):
            torch.load(path, weights_only=True)

    def progress():
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    struck = kill_at_random((script,), 30 if slow else 2, 0.3, progress, check)
    run(script)
    assert struck
    assert history(out) == history(whole)
    for name, key in (("last_checkpoint.pth", "model"), ("best_model.pth", "model_state_dict")):
        ours = torch.load(out / name, weights_only=True)[key]
        unbroken = torch.load(whole / name, weights_only=True)[key]
        assert ours.keys() == unbroken.keys()
        assert all(torch.equal(ours[k], unbroken[k]) for k in unbroken), name
    print(f"\ntrainer: {struck} kills struck, history and tensors an unbroken run's")


@posix
@pytest.mark.parametrize("slow", BY_SIZE)
def test_harm_tester_killed(request, trained, tmp_path, slow):
    folder = request.getfixturevalue("very_many" if slow else "many")
    model = trained / "best_model.pth"
    classify(folder, model, tmp_path / "whole", "--cpu")
    partial = tmp_path / "out" / "classification_results.csv.partial"
    seen = set()

    def check():
        lines = partial.read_text().splitlines()[1:-1] if partial.exists() else []
        kept = [line for line in lines if "0 bytes" not in line]  # what failed is tried again
        rows = {line.rsplit(",", 2)[0] for line in kept}  # true_class: filled in at a run's end
        assert seen <= rows or not partial.exists(), "a written row was lost"
        seen.update(rows)

    def progress():
        return partial.stat().st_size if partial.exists() else 0

    options = ("--input_dir", folder, "--model_path", model, "--output_dir", partial.parent)
    command = (TESTER, *options, "--cpu", "--resume", "--batch_size", 4)
    struck = kill_at_random(command, 30 if slow else 2, 0.5, progress, check)
    run(*command)
    ours = read_table(partial.parent / "classification_results.csv")
    unbroken = read_table(tmp_path / "whole" / "classification_results.csv")
    assert struck
    assert [row["file"] for row in ours] == [row["file"] for row in unbroken]
    assert len({row["file"] for row in ours}) == len(ours) == (1921 if slow else 481)
    angry = [[float(row["Angry"] or "nan") for row in rows] for rows in (ours, unbroken)]
    np.testing.assert_allclose(*angry, atol=1e-4)  # another batch rounds another last digit
    print(f"\ntester: {struck} kills struck, {len(ours):,} files once each, no written row lost")


@posix
@pytest.mark.parametrize("name", ["mel_generator", "cremad_custom2", "custom2_tester"])
def test_harm_ctrl_c_at_work(many, mels, trained, tmp_path, name):
    """As a terminal sends it: to every process of the group."""
    out = tmp_path / "output"
    folders = ("--input_dir", many, "--output_dir", out)
    options = ("--model_path", trained / "best_model.pth", "--batch_size", 2, "--visualize")
    if name == "mel_generator":
        process = start(GENERATOR, *folders, "--n_augmentations", 8)
    elif name == "custom2_tester":
        process = start(TESTER, *folders, *options)
    else:
        constants = TOY | {"MEL_DIR": str(mels), "OUTPUT_DIR": str(out)}
        process = start(edited_trainer(tmp_path, **constants | {"EPOCHS": 500, "PATIENCE": 500}))
    signs = {"mel_generator": "*/*.npy", "cremad_custom2": "history.csv"}
    wait_until(lambda: any(out.glob(signs.get(name, "mel_spectrograms/*.png"))))
    time.sleep(0.1)  # past the start of tqdm's next bar: in there, its own __del__ fails
    os.killpg(process.pid, signal.SIGINT)
    text = finish(process, 130)
    assert "Stopped." in text


@linux
def test_harm_worker_killed(many, tmp_path):
    folders = ("--input_dir", many, "--output_dir", tmp_path / "out")
    process = start(GENERATOR, *folders, "--n_augmentations", 8)
    wait_until(lambda: any((tmp_path / "out").rglob("*.npy")))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [
        pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(int(workers[0]), signal.SIGKILL)
    text = finish(process, 1)
    assert "A worker process was killed" in text


def test_harm_processes_that_cannot_start(corpus, trained, tmp_path, monkeypatch):
    def refuse(self):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    text = generate(corpus, tmp_path / "mels", code=1)
    assert "could not be started" in text
    assert "--workers" in text
    text = classify(corpus, trained / "best_model.pth", tmp_path / "out", "--visualize", code=1)
    assert "could not be started" in text
    assert "--workers" in text


# --------------------------------------------------------------------------------------
# Disks and folders


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder]
    is_linux = sys.platform.startswith("linux")
    if not is_linux or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes Linux and root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_harm_full_disk(corpus, many, mels, trained, small_disk):
    text = generate(corpus, small_disk, code=1)
    # numpy's own words for a file of which a part still fitted
    assert "No space left on device" in text or "requested and" in text
    assert str(small_disk) in text
    done = list(small_disk.rglob("*.npy"))
    assert done
    assert all(np.load(path).size for path in done)
    shutil.rmtree(small_disk / done[0].parent.name)
    model = trained / "best_model.pth"
    options = ("--visualize", "--batch_size", 4)
    text = classify(many, model, small_disk / "results", *options, code=1)
    assert "No space left on device" in text
    text = train(small_disk, mels, code=1)
    assert "is the disk full?" in text or "No space left" in text


def test_harm_output_that_cannot_be_written(corpus, mels, trained, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for text in (
        generate(corpus, blocked / "output", code=1),
        classify(corpus, trained / "best_model.pth", blocked / "output", code=1),
        train(blocked, mels, code=1),
    ):
        assert str(blocked) in text


@posix
@pytest.mark.parametrize("name", ["mel_generator", "custom2_tester"])
def test_harm_input_vanishes(many, trained, tmp_path, name):
    folder, out, gone = tmp_path / "in", tmp_path / "out", tmp_path / "gone"
    shutil.copytree(many, folder, symlinks=True)
    model = trained / "best_model.pth"
    folders = ("--input_dir", folder, "--output_dir", out)
    if name == "mel_generator":
        process = start(GENERATOR, *folders, "--n_augmentations", 8)
    else:
        process = start(TESTER, *folders, "--model_path", model, "--batch_size", 2)
    partial = out / "classification_results.csv.partial"
    wait_until(
        lambda: any(out.rglob("*.npy")) or (partial.exists() and partial.stat().st_size > 999)
    )
    folder.rename(gone)
    assert "disappeared" in finish(process, 1)
    gone.rename(folder)
    if name == "custom2_tester":
        text = classify(folder, model, out, "--resume")
        assert "1 of 481 files could not be classified" in text  # the empty one alone


def test_harm_two_generators_share_a_folder(corpus, mels, tmp_path):
    out = tmp_path / "out"
    command = (GENERATOR, "--input_dir", corpus, "--output_dir", out, "--n_augmentations", 2)
    both = [start(*command, "--workers", 2) for _ in range(2)]
    for process in both:
        finish(process, 0)
    assert tables_and_arrays(out) == tables_and_arrays(mels)


@posix
def test_harm_two_at_once(many, corpus, mels, trained, tmp_path):
    mel_dir = tmp_path / "mels"
    first = start(GENERATOR, "--input_dir", many, "--output_dir", mel_dir, "--n_augmentations", 8)
    wait_until(lambda: any(mel_dir.rglob("*.npy")))
    assert "is in use" in generate(corpus, mel_dir, "--overwrite", code=1)
    kill(first)
    results = tmp_path / "results"
    model = trained / "best_model.pth"
    options = ("--output_dir", results, "--model_path", model, "--batch_size", 1)
    first = start(TESTER, "--input_dir", many, *options)
    wait_until((results / "classification_results.csv.partial").exists)
    assert "is in use" in classify(corpus, model, results, code=1)
    kill(first)
    classify(corpus, model, results)
    out = tmp_path / "output"
    constants = TOY | {"MEL_DIR": str(mels), "OUTPUT_DIR": str(out)}
    first = start(edited_trainer(tmp_path, **constants | {"EPOCHS": 500, "PATIENCE": 500}))
    wait_until((out / "history.csv").exists)
    assert "is in use" in train(tmp_path, mels, code=1)
    kill(first)


def plant_links(folder: Path, names: list[str], victim: Path) -> None:
    """Links to `victim` under 12 names."""
    assert len(names) == 12
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(victim)


@posix
@pytest.mark.parametrize("exists", [True, False], ids=["file", "dangling"])
def test_harm_planted_links_are_not_followed(corpus, mels, trained, tmp_path, exists):
    """At every name that a run writes to, or that one could guess that it writes to first."""
    victim = tmp_path / "victim"
    if exists:
        victim.write_text("precious")
    stem = sorted(path.stem for path in corpus.glob("*_ANG_*.wav"))[0]
    wav = f"{stem}.wav"
    generate(corpus, tmp_path / "mels", "--n_augmentations", 0)  # or a stray .npy is refused
    # A dangling link in a spectrogram's place stops the run, with a sentence.
    spectrogram = f"ANG/{stem}_original.npy" if exists else f"ANG/{stem}_original.npy.new"
    names = [spectrogram, f"ANG/.{stem}_original.npy.tmp", ".lock", "lock"]
    names += [f"ANG/{stem}_original.npy.tmp", f"ANG/{stem}_original.npy.partial", ".mel.lock"]
    names += ["mel_config.json.tmp", ".mel_config.json.tmp", "skipped.csv", "skipped.csv.tmp"]
    plant_links(tmp_path / "mels", [*names, ".skipped.csv.tmp"], victim)
    generate(corpus, tmp_path / "mels", "--n_augmentations", 0)

    names = [f"{name}{ending}" for name in ("best_model.pth", "last_checkpoint.pth", "split.csv")
             for ending in ("", ".tmp", ".partial")]  # fmt: skip
    plant_links(tmp_path / "output", [*names, ".lock", "history.csv", "run.json"], victim)
    train(tmp_path, mels, EPOCHS=1)

    names = [f"{name}{ending}" for name in ("classification_results.csv", "run.json")
             for ending in ("", ".tmp", ".partial")]  # fmt: skip
    names += ["summary.csv", ".summary.csv.tmp", "confusion_matrix.png", ".lock"]
    names += [f"mel_spectrograms/{wav}.png", f"mel_spectrograms/.{wav}.png.tmp"]
    plant_links(tmp_path / "results", names, victim)
    options = ("--visualize", "--cpu")
    classify(corpus / wav, trained / "best_model.pth", tmp_path / "results", *options)

    assert victim.exists() == exists
    assert not exists or victim.read_text() == "precious"
    written = [tmp_path / "mels" / "ANG" / f"{stem}_original.npy"]
    written += [tmp_path / "output" / "best_model.pth"]
    written += [tmp_path / "results" / "classification_results.csv"]
    assert not any(path.is_symlink() for path in written)


# --------------------------------------------------------------------------------------
# Training


def test_harm_corners_of_training(mels, tmp_path):
    """One actor each validates and tests, without anger; 3 full batches; a long warm-up."""
    stems = sorted(path.stem.removesuffix("_original") for path in mels.glob("*/*_original.npy"))
    held_out = {"1001": "val", "1002": "test"}
    lines = ["stem,split"]
    for stem in stems:
        part = held_out.get(stem[:4], "train")
        if part == "train" or "_ANG_" not in stem:
            lines.append(f"{stem},{part}")
    split = tmp_path / "split.csv"
    split.write_text("\n".join(lines) + "\n")
    train(tmp_path, mels, SPLIT=str(split), WARMUP_EPOCHS=5, EPOCHS=2)
    metrics = json.loads((tmp_path / "output" / "metrics.json").read_text())
    assert metrics["test"]["uar_ci95"] is None
    assert metrics["test"]["n_clips"] == 5
    report = (tmp_path / "output" / "classification_report.txt").read_text()
    assert "Angry" not in report or re.search(r"Angry +0\.000 +0\.000 +0\.000 +0", report)
    assert "lower BATCH_SIZE" in train(tmp_path / "big", mels, BATCH_SIZE=4096, code=1)


# --------------------------------------------------------------------------------------
# Mutated files

SOUNDS = {  # name: format, subtype, Hz, channels
    "a.wav": ("WAV", "PCM_16", 16000, 1),
    "b.wav": ("WAV", "PCM_24", 44100, 2),
    "c.wav": ("WAV", "FLOAT", 48000, 1),
    "d.wav": ("WAV", "PCM_U8", 8000, 1),
    "e.flac": ("FLAC", "PCM_16", 16000, 1),
    "f.wav": ("WAV", "DOUBLE", 22050, 1),
    "g.wav": ("WAVEX", "PCM_16", 16000, 2),
    "h.wav": ("WAV", "ULAW", 8000, 1),
    "i.wav": ("WAV", "GSM610", 8000, 1),
    "j.mp3": ("MP3", "MPEG_LAYER_III", 44100, 2),
    "k.ogg": ("OGG", "VORBIS", 16000, 1),
    "l.opus": ("OGG", "OPUS", 48000, 1),
    "m.aiff": ("AIFF", "PCM_16", 16000, 1),
    "n.au": ("AU", "PCM_16", 16000, 1),
    "o.caf": ("CAF", "PCM_16", 16000, 2),
    "p.w64": ("W64", "PCM_16", 16000, 1),
}


def sound_files(folder: Path) -> dict[str, bytes]:
    """Whole files of a quarter of a second in the formats people have, bytes by name."""
    rng = np.random.default_rng(0)
    made = {}
    for name, (kind, subtype, rate, channels) in SOUNDS.items():
        samples = 0.1 * rng.standard_normal((rate // 4, channels))
        soundfile.write(folder / name, samples, rate, format=kind, subtype=subtype)
        made[name] = (folder / name).read_bytes()
    return made


def mutate(whole: bytes, rng: np.random.Generator) -> bytes:
    """Bytes flipped (most in the header), replaced, cut off or put in."""
    data = bytearray(whole)
    kind = rng.integers(6)
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
        extremes = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"]
        data[at : at + 4] = rng.choice(extremes)
    else:
        at = rng.integers(len(data))
        data[at:at] = rng.bytes(rng.integers(1, 100))
    return bytes(data)


@pytest.mark.parametrize("slow", BY_SIZE)
def test_harm_mutated_sound_files(tmp_path, slow):
    """Each is a finite spectrogram or an AudioError; whole ones, one in ten, a spectrogram."""
    import mel_generator

    rng = np.random.default_rng(7)
    whole = sound_files(tmp_path)
    settings = {"sample_rate": 16000, "n_fft": 2048, "hop_length": 512, "n_mels": 128}
    parts = ({"max_duration": 60.0}, {"seconds": 6.2})  # the generator's, the tester's
    outcomes = Counter()
    for i in range(10_000 if slow else 1000):
        name = rng.choice(list(whole))
        path = tmp_path / f"x{Path(name).suffix}"
        path.write_bytes(whole[name] if i % 10 == 0 else mutate(whole[name], rng))
        try:
            samples, duration = mel_generator.load_audio(path, 16000, 512, **parts[i % 2])
            mel = mel_generator.log_mel(samples, **settings, fmin=0.0, fmax=8000.0)
            assert np.isfinite(mel).all()
            assert mel.shape[0] == 128
            assert duration >= 0
            outcomes["a spectrogram"] += 1
        except mel_generator.AudioError as error:
            assert i % 10, f"{name} is whole: {error}"
            outcomes[str(error).split(":")[0]] += 1
    assert {"a spectrogram", "unreadable"} <= outcomes.keys()
    print(f"\nsound files: {dict(outcomes)}")


@pytest.mark.parametrize("slow", BY_SIZE)
def test_harm_mutated_spectrograms(tmp_path, slow):
    """Each is read as finite float32, or a UserError names the file and what to do."""
    import cremad_custom2

    rng = np.random.default_rng(8)
    outcomes = Counter()
    path = tmp_path / "x.npy"
    np.save(path, rng.standard_normal((128, 40), dtype=np.float32))
    whole = path.read_bytes()
    for i in range(10_000 if slow else 1000):
        path.write_bytes(whole if i % 10 == 0 else mutate(whole, rng))
        try:
            mel = cremad_custom2.read_spectrogram(path, 128)
            assert np.isfinite(mel).all()
            assert mel.dtype == np.float32
            assert mel.shape[1] == 128
            outcomes["read"] += 1
        except cremad_custom2.UserError as error:
            message = str(error)
            assert i % 10, message
            assert str(path) in message
            assert "mel_generator.py" in message
            outcomes[re.sub(r"[(\d].*", "", message.replace(str(path), "")).strip()] += 1
    assert len(outcomes) > 1
    print(f"\nspectrograms: {dict(outcomes)}")


# --------------------------------------------------------------------------------------
# Memory


def write_long_flac(path: Path, hours: int) -> None:
    """Near-silence: it takes a few bytes a second."""
    rate = 8000
    block = np.zeros(600 * rate, np.int16)
    block[:: rate // 2] = 1
    with soundfile.SoundFile(path, "w", rate, 1, "PCM_16", compression_level=0.0) as file:
        for _ in range(6 * hours):
            file.write(block)


def write_sparse_wav(path: Path, is_piped: bool = False) -> None:
    """4 GB of 16 kHz sound, nearly all of it a hole; is_piped: with the sizes left 0."""
    random = np.random.default_rng(0)
    soundfile.write(path, 0.1 * random.standard_normal(10 * 16000), 16000, subtype="PCM_16")
    with path.open("r+b") as file:
        file.seek(4)
        file.write((0 if is_piped else 2**32 - 10).to_bytes(4, "little"))
        file.seek(40)
        file.write((0 if is_piped else 2**32 - 46).to_bytes(4, "little"))
        file.truncate(2**32 - 2)


# In a small process between: a child is charged with the memory of the process that starts it.
PEAK_MEMORY = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def peak_memory(*command) -> float:
    """The most memory that a command or one of its processes held, MB; it must end with 0."""
    words = [sys.executable, *map(str, command)]
    launcher = [sys.executable, "-c", PEAK_MEMORY]
    done = subprocess.run([*launcher, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.split()[-1]) / 1024


@linux
def test_harm_huge_files_in_little_memory(corpus, trained, tmp_path):
    """Each would be gigabytes if it were decoded as a whole."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_long_flac(folder / "1001_DFA_ANG_XX.flac", hours=20)
    write_sparse_wav(folder / "1001_DFA_HAP_XX.wav")
    write_sparse_wav(folder / "1001_DFA_SAD_XX.wav", is_piped=True)
    shutil.copy(next(corpus.glob("*_NEU_*.wav")), folder)
    folders = ("--input_dir", folder, "--output_dir")
    peak = peak_memory(GENERATOR, *folders, tmp_path / "mels")
    assert peak < 500, "a worker imports numpy, and holds a clip: some 100 MB"
    reasons = [row["reason"] for row in read_table(tmp_path / "mels" / "skipped.csv")]
    assert len(reasons) == 3
    assert all("longer than --max_duration" in reason for reason in reasons), reasons
    options = ("--model_path", trained / "best_model.pth", "--workers", 2, "--cpu")
    peak = peak_memory(TESTER, *folders, tmp_path / "out", *options)
    assert peak < 1500, "PyTorch and what it imports are some 500 MB"
    rows = read_table(tmp_path / "out" / "classification_results.csv")
    assert [row["error"] for row in rows] == [""] * 4
    assert max(float(row["duration_s"]) for row in rows) > 100_000


def memory_between(log, command, begun, ended) -> list[float]:
    """Resident memory, MB, ten times a second from the time that begun() holds until ended()."""
    with log.open("w") as output:
        words = [sys.executable, *map(str, command)]
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
    samples = []
    while process.poll() is None and not ended():
        if begun():
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = re.search(r"^VmRSS:\s+(\d+)", status, re.M)
            samples += [int(found[1]) / 1000] if found else []
        time.sleep(0.1)
    assert process.wait() == 0, log.read_text()
    return samples


def assert_flat(what: str, samples: list[float]) -> None:
    """The last tenth of the time needs no more than the second: at most 5 % or 30 MB."""
    n = len(samples) // 10
    assert n >= 3, f"too few looks: {len(samples)}"
    early = np.mean(samples[n : 2 * n])
    late = np.mean(samples[-n:])
    print(f"\n{what}: {early:.0f} MB in the second tenth of the time, {late:.0f} MB in the last")
    assert late < max(1.05 * early, early + 30)


@linux
@pytest.mark.slow
def test_harm_20_000_files_in_flat_memory(corpus, trained, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    clips = sorted(corpus.iterdir())
    for i in range(20_000):
        (folder / f"{i}.wav").symlink_to(clips[i % len(clips)])
    results = tmp_path / "out" / "classification_results.csv"
    partial = results.with_name(f"{results.name}.partial")
    options = ("--model_path", trained / "best_model.pth", "--cpu")
    command = (TESTER, "--input_dir", folder, "--output_dir", results.parent, *options)
    samples = memory_between(tmp_path / "log", command, partial.exists, results.exists)
    assert len(read_table(results)) == 20_000
    assert_flat("tester, 20,000 files", samples)


@linux
@pytest.mark.slow
def test_harm_30_000_spectrograms_in_flat_memory(mels, tmp_path):
    mel_dir, out = tmp_path / "mels", tmp_path / "output"
    for path in mels.glob("*/*.npy"):
        actor, rest = path.name.split("_", 1)
        folder = mel_dir / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(209):  # times 144 spectrograms
            os.link(path, folder / f"{actor}_{i}{rest}")
    shutil.copy(mels / "mel_config.json", mel_dir)
    paths = {"MEL_DIR": str(mel_dir), "OUTPUT_DIR": str(out)}
    script = edited_trainer(tmp_path, **TOY | paths | {"EPOCHS": 1})
    # split.csv is written when all spectrograms have been read
    begun, ended = out / "split.csv", out / "last_checkpoint.pth"
    samples = memory_between(tmp_path / "log", (script,), begun.exists, ended.exists)
    assert_flat("trainer, 30,000 spectrograms", samples)
