"""mel_generator.py: features and augmentations against librosa, and the folder it leaves."""

import json
import math
import os
import shutil
import signal
import sys
import time
import unicodedata
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
from conftest import ROOT, generate, read_table, run, start, wait_until

import mel_generator as gen

MEL = {
    "sample_rate": 16000,
    "n_fft": 2048,
    "hop_length": 512,
    "n_mels": 128,
    "fmin": 0.0,
    "fmax": 8000.0,
}
TONE = (0.3 * np.sin(np.arange(16000) / 5)).astype(np.float32)
QUICK = ("--no_augment", "--n_mels", 16, "--workers", 1)  # small spectrograms of originals alone


def generate_here(input_dir, output_dir, *options, code=0) -> str:
    """Runs the generator without worker processes, which take a second to start."""

    def run_here(tasks, args):
        for task in tasks:
            yield task, gen.process_clip(task, args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gen, "run_in_workers", run_here)
        return generate(input_dir, output_dir, *QUICK, *options, code=code)


@pytest.fixture(scope="module")
def voice(corpus):
    samples, _ = gen.load_audio(sorted(corpus.iterdir())[0], 16000, 512)
    return samples


def write_clip(path, pitch=440.0, seconds=1.0):
    """A tone as a WAV; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.3 * np.sin(2 * np.pi * pitch * np.arange(int(16000 * seconds)) / 16000)
    soundfile.write(path, samples, 16000)
    return path


@pytest.fixture
def clips(tmp_path):
    """A folder of three clips."""
    for i, code in enumerate(("ANG", "HAP", "SAD")):
        write_clip(tmp_path / "clips" / f"1001_A_{code}_X.wav", 400 + 100 * i)
    return tmp_path / "clips"


def librosa_mel(samples, **settings):
    """The spectrogram as librosa makes it."""
    mel = MEL | settings
    power = librosa.feature.melspectrogram(
        y=samples,
        sr=mel["sample_rate"],
        n_fft=mel["n_fft"],
        hop_length=mel["hop_length"],
        n_mels=mel["n_mels"],
        fmin=mel["fmin"],
        fmax=mel["fmax"],
    )
    return librosa.power_to_db(power, ref=1.0, amin=1e-10, top_db=None)


def read_config(folder):
    return json.loads((folder / "mel_config.json").read_text(encoding="utf-8"))


def contents(folder):
    """All that a run leaves, but for the command that mel_config.json tells; dates too."""
    found = {}
    for path in folder.rglob("*"):
        if path.suffix == ".npy":
            found[path.relative_to(folder).as_posix()] = path.read_bytes(), path.stat().st_mtime_ns
        elif path.name == "mel_config.json":
            found[path.name] = {k: v for k, v in read_config(folder).items() if k != "command"}
        elif path.is_file():
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def spectrograms(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.npy")}


def skipped(folder):
    return {row["file"]: row["reason"] for row in read_table(folder / "skipped.csv")}


# --------------------------------------------------------------------------------------
# Features


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"n_mels": 64, "hop_length": 256},
        {"n_fft": 1024, "fmin": 50.0, "fmax": 7600.0},
        {"n_fft": 1001, "hop_length": 333},
    ],
)
def test_mel_is_librosas(voice, other):
    ours = gen.log_mel(voice, **MEL | other)
    theirs = librosa_mel(voice, **other)
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 0.05  # dB


@pytest.mark.parametrize(("n_fft", "hop_length"), [(2048, 512), (1001, 333), (64, 64)])
def test_the_transform_is_librosas_whatever_the_blocks(voice, n_fft, hop_length):
    long = np.tile(voice, 4)
    blocks = list(gen.stft_blocks(long, n_fft, hop_length))
    theirs = librosa.stft(long, n_fft=n_fft, hop_length=hop_length).T
    ours = np.concatenate(blocks)
    assert ours.dtype == np.complex64
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_an_hours_transform_comes_in_blocks():
    blocks = gen.stft_blocks(np.zeros(60 * 16000, np.float32), 2048, 512)
    sizes = [block.nbytes for block in blocks]
    assert len(sizes) > 1
    assert max(sizes) <= 32 * 2**20


@pytest.mark.parametrize("seconds", [1, 40])
def test_blocks_do_not_show_in_the_spectrogram(seconds):
    samples = np.random.default_rng(0).standard_normal(seconds * 16000).astype(np.float32)
    mel = gen.log_mel(samples, **MEL)
    assert mel.shape == (128, 1 + len(samples) // 512)
    assert np.abs(mel - librosa_mel(samples)).max() < 0.05


def test_level_survives(voice):
    plain = gen.log_mel(voice, **MEL)
    louder = gen.log_mel(10 * voice, **MEL)
    assert np.abs(louder - plain - 20)[plain > -60].max() < 0.01


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("sample_rate", 1000, 1_000_000), ("n_fft", 16, 65_536), ("n_mels", 1, 1024)],
)
def test_whole_mel_settings_have_bounds(name, least, most):
    # the others made wide enough for the extremes of this one
    wide = MEL | {"n_fft": 4096, "fmax": 400.0, "n_mels": 8, "hop_length": 16}
    for good in (least, most):
        assert gen.wrong_mel_settings(wide | {name: good}) == ""
    for bad in (least - 1, most + 1, float(most), str(least), True, None, [least]):
        assert name in gen.wrong_mel_settings(wide | {name: bad})


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"hop_length": 0}, "hop_length"),
        ({"hop_length": 2049}, "hop_length"),
        ({"hop_length": None}, "hop_length"),
        ({"hop_length": 512.0}, "hop_length"),
        ({"n_mels": 1024, "n_fft": 2046}, "n_mels"),
        ({"fmax": 8000.5}, "fmax"),
        ({"fmax": math.nan}, "fmax"),
        ({"fmax": "8000"}, "fmax"),
        ({"fmin": -1.0}, "fmin"),
        ({"fmin": 8000.0}, "fmin"),
        ({"fmin": math.nan}, "fmin"),
        ({"fmin": False}, "fmin"),
    ],
)
def test_impossible_mel_settings_are_told(settings, word):
    assert gen.wrong_mel_settings(MEL) == ""
    assert word in gen.wrong_mel_settings(MEL | settings)


# --------------------------------------------------------------------------------------
# Augmentation


def test_augmentations_are_those_documented():
    assert gen.VARIANTS == {
        "time_shift_pos": ("shift", 0.1),
        "time_shift_neg": ("shift", -0.1),
        "pitch_up": ("pitch", 2.0),
        "pitch_down": ("pitch", -2.0),
        "stretch_fast": ("stretch", 1.2),
        "stretch_slow": ("stretch", 0.8),
        "noise_low": ("noise", 0.005),
        "noise_medium": ("noise", 0.01),
    }


def test_shift_is_by_a_tenth_with_silence():
    samples = np.arange(1, 101, dtype=np.float32)
    assert gen.shift(samples, 0.1).tolist() == [0] * 10 + list(range(1, 91))
    assert gen.shift(samples, -0.1).tolist() == [*range(11, 101)] + [0] * 10


def test_noise_is_each_clips_own(voice):
    def noise(seed, stem):
        return gen.augment(voice, "noise_low", seed, stem) - voice

    assert np.array_equal(noise(1, "a"), noise(1, "a"))
    likeness = np.corrcoef([noise(1, "a"), noise(2, "a"), noise(1, "b")])
    assert np.abs(likeness - np.eye(3)).max() < 0.05


@pytest.mark.parametrize("variant", ["noise_low", "noise_medium"])
def test_noise_has_the_deviation_documented(voice, variant):
    _, amount = gen.VARIANTS[variant]
    noise = gen.augment(voice, variant, 1, "stem") - voice
    assert noise.std() == pytest.approx(amount, rel=0.05)
    assert abs(noise.mean()) < amount / 20


@pytest.mark.parametrize("variant", ["time_shift_pos", "time_shift_neg"])
def test_shifted_variants_are_shifts(voice, variant):
    _, amount = gen.VARIANTS[variant]
    shifted = gen.augment(voice, variant, 1, "stem")
    assert np.array_equal(shifted, gen.shift(voice, amount))


@pytest.mark.parametrize("variant", ["pitch_up", "pitch_down", "stretch_fast", "stretch_slow"])
def test_pitch_and_stretch_are_librosas(voice, variant):
    kind, amount = gen.VARIANTS[variant]
    ours = gen.augment(voice, variant, 1, "stem")
    if kind == "pitch":
        theirs = librosa.effects.pitch_shift(voice, sr=16000, n_steps=amount)
    else:
        theirs = librosa.effects.time_stretch(voice, rate=amount)
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    ours = librosa_mel(ours)
    theirs = librosa_mel(theirs)
    is_heard = theirs > theirs.max() - 60
    assert np.abs(ours - theirs)[is_heard].mean() < 0.02  # dB


def peak(samples):
    """The strongest frequency, in Hz."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return spectrum.argmax() * 16000 / len(samples)


def test_pitch_moves_by_two_semitones_and_stretch_changes_length_alone():
    tone = np.sin(2 * np.pi * 500 * np.arange(32000) / 16000).astype(np.float32)
    up = gen.shift_pitch(tone, 2)
    down = gen.shift_pitch(tone, -2)
    assert len(up) == len(down) == 32000
    assert peak(up) == pytest.approx(500 * 2 ** (2 / 12), rel=0.01)
    assert peak(down) == pytest.approx(500 * 2 ** (-2 / 12), rel=0.01)
    fast = gen.stretch(tone, 1.2)
    slow = gen.stretch(tone, 0.8)
    assert len(fast) == round(32000 / 1.2)
    assert len(slow) == 40000
    assert peak(fast) == pytest.approx(500, rel=0.01)
    assert peak(slow) == pytest.approx(500, rel=0.01)


@pytest.mark.parametrize("variant", gen.VARIANTS)
@pytest.mark.parametrize("length", [512, 2047, 2049])
def test_the_shortest_clips_are_augmented_too(variant, length):
    augmented = gen.augment(TONE[:length], variant, 1, "stem")
    assert augmented.dtype == np.float32
    assert len(augmented) > 0
    assert np.isfinite(augmented).all()


def test_variants_depend_on_seed_and_stem_alone():
    stem = "1001_DFA_ANG_XX"
    three = gen.choose_variants(42, stem, 3)
    eight = gen.choose_variants(42, stem, 8)
    assert three[0] == "original"
    assert eight[:4] == three
    assert sorted(eight[1:]) == sorted(gen.VARIANTS)
    assert gen.choose_variants(42, stem, 0) == ["original"]
    assert len({tuple(gen.choose_variants(seed, stem, 3)) for seed in range(5)}) > 1
    assert len({tuple(gen.choose_variants(42, f"{i}{stem}", 3)) for i in range(5)}) > 1


# --------------------------------------------------------------------------------------
# The folder


def test_contents_and_config(corpus, mels, voice):
    config = read_config(mels)
    assert {name: config[name] for name in MEL} == MEL
    assert config["seed"] == 42
    assert config["n_augmentations"] == 2
    assert config["augmentation"].keys() == gen.VARIANTS.keys()
    assert config["n_originals"] == 48
    assert "--n_augmentations" in config["command"]
    assert config["versions"]["numpy"] == np.__version__
    assert {"python", "soundfile", "soxr"} <= config["versions"].keys()
    assert {path.name for path in mels.iterdir()} == {
        "mel_config.json",
        "skipped.csv",
        *gen.EMOTIONS,
    }
    assert (mels / "skipped.csv").read_text() == "file,reason\n"
    stem = sorted(corpus.iterdir())[0].stem
    mel = np.load(mels / stem.split("_")[2] / f"{stem}_original.npy")
    assert mel.dtype == np.float32
    assert mel.shape == (128, 1 + len(voice) // 512)
    assert np.allclose(mel, gen.log_mel(voice, **MEL), rtol=0, atol=1e-3)


def test_the_variants_that_were_chosen_lie_there(corpus, mels):
    expected = set()
    for path in corpus.iterdir():
        for variant in gen.choose_variants(42, path.stem, 2):
            expected.add(f"{path.stem.split('_')[2]}/{path.stem}_{variant}.npy")
    assert spectrograms(mels) == expected


def test_the_folder_is_the_same_whatever_the_workers_or_interruptions(corpus, mels, tmp_path):
    options = ("--n_augmentations", 2)
    generate(corpus, tmp_path, *options, "--workers", 1)
    whole = contents(mels)
    assert contents(tmp_path) == whole
    assert len(whole) == 48 * 3 + 2
    for path in sorted(tmp_path.rglob("*.npy"))[::3]:
        path.unlink()
    (tmp_path / "ANG" / f".{'0f' * 8}.tmp").write_bytes(b"half, of a run that was killed")
    (tmp_path / f".{'0f' * 8}.tmp").write_bytes(b"half")
    (tmp_path / "ANG" / "my.tmp").write_bytes(b"not ours to delete")
    (tmp_path / ".mine.tmp").write_bytes(b"not ours to delete")
    generate(corpus, tmp_path, *options, "--workers", 3)
    (tmp_path / "ANG" / "my.tmp").unlink()
    (tmp_path / ".mine.tmp").unlink()
    assert contents(tmp_path) == whole


def test_a_second_run_does_nothing_that_is_done(clips, tmp_path, monkeypatch):
    generate_here(clips, tmp_path / "out")
    before = contents(tmp_path / "out")
    inodes = {path.stat().st_ino for path in (tmp_path / "out").rglob("*.npy")}
    monkeypatch.setattr(gen, "process_clip", None)  # a call would end the run
    text = generate_here(clips, tmp_path / "out")
    assert "3 clips" in text
    assert contents(tmp_path / "out") == before
    assert {path.stat().st_ino for path in (tmp_path / "out").rglob("*.npy")} == inodes


def test_files_have_the_umasks_permissions(clips, tmp_path):
    before = os.umask(0o027)
    try:
        generate(clips, tmp_path / "out", *QUICK)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_any_rate_channels_and_format(tmp_path):
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(48000) / 48000)
    stereo = np.stack([tone, 0 * tone], 1)  # a silent channel does not halve it
    (tmp_path / "sub").mkdir()
    soundfile.write(tmp_path / "1001_A_ANG_1.WAV", stereo, 48000, "PCM_24")
    soundfile.write(tmp_path / "1001_A_ang_2.flac", tone[::3], 16000)
    soundfile.write(tmp_path / "sub" / "1001_A_Ang_3.wav", tone[::6], 8000, "DOUBLE")
    soundfile.write(tmp_path / "1001_A_ANG_4.wav", tone[::3], 16000, "PCM_U8")
    generate(tmp_path, tmp_path / "out", "--no_augment", "--workers", 1)
    stems = ("1001_A_ang_2", "1001_A_ANG_1", "1001_A_Ang_3", "1001_A_ANG_4")
    first, *others = (np.load(tmp_path / f"out/ANG/{stem}_original.npy") for stem in stems)
    is_loud = first > first.max() - 30
    for mel in others:
        assert np.abs(mel - first)[is_loud].max() < 1.0  # dB


def write_bad_files(folder):
    """A file of each kind that cannot be used, with words that its reason must hold."""

    def write(name, samples):
        soundfile.write(folder / f"1001_A_ANG_{name}.wav", samples, 16000, "FLOAT")

    at_7 = np.arange(16000) == 7
    write("none", TONE[:0])
    write("short", TONE[:511])
    write("silent", np.zeros(16000))
    write("dc", np.full(16000, 0.5))
    write("nan", np.where(at_7, np.nan, TONE))
    write("inf", np.where(at_7, np.inf, TONE))
    write("loud", np.round(TONE * 32767))
    write("long", np.tile(TONE, 3))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "1001_A_ANG_lfs.wav").write_text(pointer)
    (folder / "1001_A_ANG_zero.wav").write_bytes(b"")
    (folder / "1001_A_ANG_text.wav").write_text("this is no sound\n" * 50)
    (folder / "1001_A_ANG_link.wav").symlink_to("nowhere")
    os.mkfifo(folder / "1001_A_ANG_pipe.wav")
    reasons = {
        "none": "without samples",
        "short": "shorter than one hop",
        "silent": "silent",
        "dc": "silent",
        "nan": "not finite",
        "inf": "not finite",
        "loud": "beyond full scale",
        "long": "longer than --max_duration: 3.0 s",
        "lfs": "git lfs pull",
        "zero": "0 bytes",
        "text": "unreadable",
        "link": "unreadable: No such file",
        "pipe": "not a regular file",
    }
    return {f"1001_A_ANG_{name}.wav": word for name, word in reasons.items()}


def test_every_bad_file_is_told_apart(tmp_path):
    bad = write_bad_files(tmp_path)
    unnamed = {
        "hello.wav": "no emotion",
        "re\rturn\n.wav": "no emotion",
        "1001_A_XYZ_1.wav": "no emotion",
        f"1001_A_ANG_{'n' * 235}.wav": "name too long",
        "z/1001_A_ANG_good.wav": "same stem as another file: 1001_A_ANG_good.wav",
    }
    (tmp_path / "z").mkdir()
    (tmp_path / "1001_A_ANG_folder.wav").mkdir()  # no sound file, and not told as one
    good = write_clip(tmp_path / "1001_A_ANG_good.wav")
    no_utf8 = os.fsdecode(b"J\xfcrgen_A_ANG_1")
    for name in (*unnamed, f"{no_utf8}.wav"):
        shutil.copy(good, tmp_path / name)
    words = bad | unnamed
    options = ("--no_augment", "--workers", 1, "--max_duration", 2)
    text = generate(tmp_path, tmp_path / "out", *options)
    found = skipped(tmp_path / "out")
    assert found.keys() == words.keys()
    assert [path for path, word in words.items() if word not in found[path]] == []
    assert f"Skipped {len(words)} files" in text
    names = {path.name for path in (tmp_path / "out").rglob("*.npy")}
    assert names == {"1001_A_ANG_good_original.npy", f"{no_utf8}_original.npy"}
    assert read_config(tmp_path / "out")["n_originals"] == 2
    generate(tmp_path, tmp_path / "out", *options, "--strict", code=1)
    assert skipped(tmp_path / "out") == found


def test_skipped_csv_is_of_the_last_run(clips, tmp_path):
    write_clip(clips / "hello.wav")
    broken = clips / "1001_A_FEA_X.wav"
    broken.write_bytes(b"")
    out = tmp_path / "out"
    text = generate_here(clips, out)
    assert "1 no emotion in the name" in text
    assert "1 empty" in text
    assert skipped(out).keys() == {"hello.wav", "1001_A_FEA_X.wav"}
    write_clip(broken)
    generate_here(clips, out)
    assert skipped(out).keys() == {"hello.wav"}
    assert "FEA/1001_A_FEA_X_original.npy" in spectrograms(out)
    (clips / "hello.wav").unlink()
    with (out / "skipped.csv").open("ab") as file:
        file.write(b"\0\0\0")  # a power cut's
    text = generate_here(clips, out, "--strict")
    assert "Skipped" not in text
    assert (out / "skipped.csv").read_bytes() == b"file,reason\n"


def test_a_name_that_a_spreadsheet_would_run_is_harmless_in_skipped_csv(clips, tmp_path):
    for name in ("=cmd.wav", "+1.wav", "-1.wav", "@sum.wav", "\tx.wav"):
        write_clip(clips / name)
    generate_here(clips, tmp_path / "out")
    found = skipped(tmp_path / "out").keys()
    assert found == {"./=cmd.wav", "./+1.wav", "./-1.wav", "./@sum.wav", "./\tx.wav"}


def test_control_characters_are_printed_escaped(clips, tmp_path):
    out = tmp_path / "out"
    write_clip(clips / "1001_A_ANG_\x1b[31mred.wav")
    generate_here(clips, out)
    (clips / "1001_A_ANG_\x1b[31mred.wav").unlink()
    text = generate_here(clips, out)  # it names the clip that is gone
    assert r"\x1b[31mred" in text
    assert "\x1b[31m" not in text


def test_macos_notes_are_passed_over_and_counted(clips, tmp_path):
    for name in ("._1001_A_ANG_X.wav", "._hello.mp3"):
        (clips / name).write_bytes(b"\0\5\x16\7 no sound")
    text = generate_here(clips, tmp_path / "out", "--strict")
    assert "2 files named ._*" in text
    assert skipped(tmp_path / "out") == {}
    (clips / "._hello.mp3").unlink()
    assert "1 file named ._*" in generate_here(clips, tmp_path / "out")


def close_folder(folder, monkeypatch):
    """Makes a folder that cannot be entered, also for root, whom no permission stops."""
    folder.chmod(0)
    scandir = os.scandir

    def refuse(path="."):
        if os.fspath(path) == os.fspath(folder):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


def test_a_folder_that_cannot_be_entered_is_a_row(clips, tmp_path, monkeypatch):
    write_clip(clips / "a/closed/1001_A_DIS_X.wav")
    with monkeypatch.context() as patch:
        close_folder(clips / "a/closed", patch)
        text = generate_here(clips, tmp_path / "out", "--strict", code=1)
    (clips / "a/closed").chmod(0o700)
    found = skipped(tmp_path / "out")
    assert found.keys() == {"a/closed/"}
    assert "Permission denied" in found["a/closed/"]
    assert "Skipped 1 file" in text
    assert len(spectrograms(tmp_path / "out")) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="no permission stops root")
def test_a_folder_without_permission_is_a_row(clips, tmp_path):
    write_clip(clips / "closed/1001_A_DIS_X.wav")
    (clips / "closed").chmod(0)
    try:
        generate_here(clips, tmp_path / "out", "--strict", code=1)
    finally:
        (clips / "closed").chmod(0o700)
    assert skipped(tmp_path / "out").keys() == {"closed/"}


def test_links_to_folders_are_not_followed(clips, tmp_path):
    (clips / "again").symlink_to(clips)
    generate_here(clips, tmp_path / "out")
    assert skipped(tmp_path / "out") == {}


def test_missing_and_empty_folders(tmp_path):
    out = tmp_path / "out"
    assert "is no folder" in generate(tmp_path / "absent", out, code=1)
    (tmp_path / "empty").mkdir()
    assert "holds no sound file" in generate(tmp_path / "empty", out, code=1)
    assert not out.exists()
    write_bad_files(tmp_path / "empty")
    text = generate_here(tmp_path / "empty", out, "--max_duration", 2, code=1)
    assert "No file could be used" in text
    assert len(skipped(out)) == 13
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in generate(tmp_path / "empty", tmp_path / "file/out", code=1)


def test_a_part_of_crema_d_is_told(clips, tmp_path):
    text = generate_here(clips, tmp_path / "out")
    assert "3 clips of 7,442, 1 actor of 91" in text
    for path in clips.iterdir():
        path.rename(path.with_name(f"mine{path.name}"))
    assert "CREMA-D" not in generate_here(clips, tmp_path / "other")


# --------------------------------------------------------------------------------------
# Clips that change


def mel_of(out, stem):
    return np.load(out / stem.split("_")[2] / f"{stem}_original.npy")


@pytest.mark.parametrize("years", [-20, 0, 20])
def test_a_spectrogram_bears_its_clips_date(years, clips, tmp_path):
    clip = clips / "1001_A_ANG_X.wav"
    seconds = int(time.time()) + years * 365 * 86400
    date = seconds * 10**9 + 123_456_700
    os.utime(clip, ns=(date, date))
    generate(clips, tmp_path / "out", "--n_augmentations", 1, "--n_mels", 16, "--workers", 1)
    paths = list((tmp_path / "out/ANG").iterdir())
    assert len(paths) == 2
    assert {path.stat().st_mtime_ns for path in paths} == {clip.stat().st_mtime_ns}


@pytest.mark.parametrize(
    ("found", "date", "answer"),
    [
        (1_700_000_000_123_456_700, 1_700_000_000_123_456_789, True),  # NTFS, SMB
        (1_700_000_000_123_456_700, 1_700_000_000_123_556_789, False),
        (1_700_000_000_000_000_000, 1_700_000_001_123_456_789, True),  # FAT
        (1_700_000_000_000_000_000, 1_700_000_003_123_456_789, False),
        (None, 1_700_000_000_000_000_000, False),
    ],
)
def test_dates_are_compared_as_fine_as_file_systems_keep_them(found, date, answer):
    assert gen.is_same_date(found, date) is answer


@pytest.mark.parametrize("age", [-86400, 86400])  # copies keep an old date, or bear a new one
def test_a_replaced_clip_is_done_again(age, clips, tmp_path):
    out = tmp_path / "out"
    generate_here(clips, out)
    clip = clips / "1001_A_ANG_X.wav"
    old_date = clip.stat().st_mtime_ns
    old = {stem: mel_of(out, stem) for stem in ("1001_A_ANG_X", "1001_A_HAP_X")}
    write_clip(clip, pitch=2000.0)
    os.utime(clip, ns=(old_date + age * 10**9,) * 2)
    text = generate_here(clips, out)
    assert mel_of(out, "1001_A_ANG_X").argmax() != old["1001_A_ANG_X"].argmax()
    assert np.array_equal(mel_of(out, "1001_A_HAP_X"), old["1001_A_HAP_X"])
    assert "any more" not in text
    assert len(spectrograms(out)) == 3


def test_clips_that_are_gone_are_counted_and_named(clips, tmp_path):
    out = tmp_path / "out"
    write_clip(clips / "1002_A_NEU_X.wav")
    generate_here(clips, out)
    (clips / "1001_A_ANG_X.wav").rename(clips / "1001_A_FEA_X.wav")  # another label
    (clips / "1002_A_NEU_X.wav").unlink()
    text = generate_here(clips, out)
    assert "2 clips with spectrograms but no file" in text
    assert "1001_A_ANG_X" in text
    assert "1002_A_NEU_X" in text
    assert "--overwrite" in text
    assert len(spectrograms(out)) == 5
    text = generate_here(clips, out, "--overwrite")
    assert "any more" not in text
    assert spectrograms(out) == {
        "FEA/1001_A_FEA_X_original.npy",
        "HAP/1001_A_HAP_X_original.npy",
        "SAD/1001_A_SAD_X_original.npy",
    }


def test_a_clip_that_can_no_longer_be_used_does_not_train_on_in_silence(clips, tmp_path):
    """Its file holds silence now: the spectrogram of its old sound is gone, or told."""
    out = tmp_path / "out"
    generate_here(clips, out)
    soundfile.write(clips / "1001_A_ANG_X.wav", np.zeros(16000), 16000)
    text = generate_here(clips, out)
    assert skipped(out).keys() == {"1001_A_ANG_X.wav"}
    is_gone = "ANG/1001_A_ANG_X_original.npy" not in spectrograms(out)
    assert is_gone or "1001_A_ANG_X" in text


def test_finished_runs_note_the_number_of_originals(clips, tmp_path):
    out = tmp_path / "out"
    for i in range(2):
        generate_here(clips, out, "--shard", f"{i}/2")
        assert "n_originals" not in read_config(out)
    generate_here(clips, out)
    assert read_config(out)["n_originals"] == 3
    write_clip(clips / "1001_A_NEU_X.wav")
    generate_here(clips, out, "--shard", "0/1")
    assert read_config(out)["n_originals"] == 3  # shards leave a finished run's note
    generate_here(clips, out)
    assert read_config(out)["n_originals"] == 4


# --------------------------------------------------------------------------------------
# Settings, --overwrite, shards


def test_other_settings_are_refused_and_overwrite_starts_anew(corpus, mels, tmp_path):
    out = tmp_path / "mels"
    shutil.copytree(mels, out)
    before = contents(out)
    for options, words in (
        (("--n_augmentations", 2, "--n_mels", 64), "n_mels is 128, now 64"),
        (("--n_augmentations", 2, "--seed", 1), "seed is 42, now 1"),
        (("--no_augment",), "n_augmentations is 2, now 0"),
    ):
        text = generate(corpus, out, *options, code=1)
        assert words in text
        assert "--overwrite" in text
    assert contents(out) == before
    generate_here(corpus, out, "--overwrite")
    assert {np.load(path).shape[0] for path in out.rglob("*.npy")} == {16}
    assert len(spectrograms(out)) == 48
    assert read_config(out)["n_mels"] == 16


def test_what_made_the_folder_is_not_compared(clips, tmp_path):
    out = tmp_path / "out"
    generate_here(clips, out)
    config = read_config(out) | {"versions": {"python": "3.0"}, "command": ["another"]}
    (out / "mel_config.json").write_text(json.dumps(config))
    generate_here(clips, out)
    assert len(spectrograms(out)) == 3


def test_overwrite_deletes_only_what_the_generator_writes(clips, tmp_path):
    out = tmp_path / "out"
    generate_here(clips, out)
    mine = (
        "notes.txt",
        "ANG/mine.npy",
        "ANG/1001_original.txt",
        "skipped_by_me.csv",
        "sub/ANG/1001_A_ANG_X_original.npy",
        "XYZ/1001_A_XYZ_X_original.npy",
        "1001_A_ANG_X_original.npy",
    )
    for name in mine:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"mine")
    (clips / "1001_A_ANG_X.wav").unlink()
    generate_here(clips, out, "--overwrite")
    assert [name for name in mine if not (out / name).exists()] == []
    assert not (out / "ANG/1001_A_ANG_X_original.npy").exists()


def test_overwrite_deletes_nothing_for_a_table_that_fits_no_file(clips, tmp_path):
    out = tmp_path / "out"
    generate_here(clips, out)
    before = contents(out)
    gen.write_csv(tmp_path / "labels.csv", ("file", "emotion"), [{"file": "x", "emotion": "SAD"}])
    options = ("--overwrite", "--labels", tmp_path / "labels.csv")
    assert "No file could be used" in generate_here(clips, out, *options, code=1)
    after = contents(out)
    assert all(after[name] == data for name, data in before.items() if name.endswith(".npy"))


def test_a_stop_of_overwrite_does_not_advise_to_overwrite_again(clips, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gen, "process_clip", stop)
    for options, words in (
        ((), "run again."),
        (("--overwrite",), "run again without --overwrite."),
    ):
        text = generate_here(clips, tmp_path / "out", *options, code=130)
        assert f"Stopped. To go on, {words}" in text


def test_a_shard_leaves_other_machines_temporary_files(clips, tmp_path):
    """A network disk's locks hold for one machine alone."""
    (tmp_path / "ANG").mkdir()
    half = tmp_path / "ANG" / f".{'0f' * 8}.tmp"
    half.write_bytes(b"another shard's")
    generate_here(clips, tmp_path, "--shard", "0/2")
    assert half.exists()
    generate_here(clips, tmp_path)
    assert not half.exists()


def test_a_shard_that_has_only_other_files_is_no_failure(clips, tmp_path):
    (clips / "notes.wav").write_bytes(b"RIFF")
    paths = [path.name for path in clips.iterdir()]
    alone = next(
        (i, n)
        for n in range(2, 100)
        for i in range(n)
        if [path for path in paths if gen.in_shard(path, (i, n))] == ["notes.wav"]
    )
    generate_here(clips, tmp_path / "out", "--shard", "{}/{}".format(*alone))


def test_a_share_that_refuses_dates_stops_nothing(clips, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(gen.os, "utime", refuse)
    generate_here(clips, tmp_path / "out")
    assert read_config(tmp_path / "out")["n_originals"] == 3


def test_a_stem_is_the_same_however_a_system_writes_accents():
    forms = [unicodedata.normalize(form, "José/é.wav") for form in ("NFC", "NFD")]
    labels = {forms[0]: {"emotion": "sad", "speaker": "a"}}
    assert forms[0] != forms[1]
    assert len({gen.clip_by_table(path, labels).stem for path in forms}) == 1


def test_overwrite_deletes_nothing_where_no_mel_config_stands(clips, tmp_path):
    out = tmp_path / "out"
    generate_here(clips, out)
    (out / "mel_config.json").unlink()
    before = contents(out)
    for options in ((), ("--overwrite",)):
        assert "no mel_config.json" in generate_here(clips, out, *options, code=1)
        assert contents(out) == before


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{}", b'"n_mels"', b"\xff\xfe", b"[" * 100_000]
)
def test_a_mel_config_that_is_none_is_refused(content, clips, tmp_path):
    out = tmp_path / "out"
    generate_here(clips, out)
    (out / "mel_config.json").write_bytes(content)
    text = generate_here(clips, out, code=1)
    assert "mel_config.json cannot be read" in text
    assert "--overwrite" in text
    generate_here(clips, out, "--overwrite")
    assert read_config(out)["n_originals"] == 3


def test_a_mel_config_that_is_a_pipe_is_refused_at_once(clips, tmp_path):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out/mel_config.json")
    assert "not a regular file" in generate_here(clips, tmp_path / "out", code=1)


def test_overwrite_needs_the_folder_alone(clips, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "out"
    generate_here(clips, out)
    before = contents(out)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # as another run that writes there
        assert "in use" in generate_here(clips, out, "--overwrite", code=1)
        assert contents(out) == before
        (out / "SAD/1001_A_SAD_X_original.npy").unlink()
        (out / f".{'0f' * 8}.tmp").write_bytes(b"the other run's")
        generate_here(clips, out)  # several share a folder
        assert contents(out) == before | {f".{'0f' * 8}.tmp": b"the other run's"}
    finally:
        os.close(descriptor)
    generate_here(clips, out, "--overwrite")
    assert contents(out) == before


def test_shards_at_once_then_a_plain_run_are_one_run(corpus, mels, tmp_path):
    both = ("--input_dir", corpus, "--output_dir", tmp_path, "--n_augmentations", 2)
    script = ROOT / "mel_generator.py"
    shards = [start(script, *both, "--workers", 1, "--shard", f"{i}/3") for i in range(3)]
    for shard in shards:
        text, _ = shard.communicate(timeout=300)
        assert shard.returncode == 0, text
    for path in corpus.iterdir():
        assert sum(gen.in_shard(path.name, (i, 3)) for i in range(3)) == 1
    for i in range(3):
        assert read_table(tmp_path / f"skipped.{i}-of-3.csv") == []
    assert not (tmp_path / "skipped.csv").exists()
    assert len(spectrograms(tmp_path)) == 48 * 3
    generate(corpus, tmp_path, "--n_augmentations", 2)
    assert contents(tmp_path) == contents(mels)


def test_each_shard_tells_its_own_bad_files(clips, tmp_path):
    out = tmp_path / "out"
    bad = {f"{i}.wav" for i in range(8)}
    for name in bad:
        write_clip(clips / name, seconds=0.1)
    found = []
    for i in range(2):
        generate_here(clips, out, "--shard", f"{i}/2")
        found += [row["file"] for row in read_table(out / f"skipped.{i}-of-2.csv")]
    assert sorted(found) == sorted(bad)


def test_two_runs_at_once_end_right(corpus, mels, tmp_path):
    both = ("--input_dir", corpus, "--output_dir", tmp_path, "--n_augmentations", 2)
    runs = [start(ROOT / "mel_generator.py", *both, "--workers", 1) for _ in range(2)]
    for process in runs:
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text
    assert contents(tmp_path) == contents(mels)


# --------------------------------------------------------------------------------------
# Arguments, and how runs end


@pytest.mark.parametrize(
    "option",
    [
        ("--n_augmentations", 9),
        ("--n_augmentations", -1),
        ("--workers", 0),
        ("--hop_length", 0),
        ("--hop_length", 2049),
        ("--fmax", 9000),
        ("--fmin", "nan"),
        ("--n_mels", 5000),
        ("--n_fft", 65537),
        ("--n_fft", 8),
        ("--sample_rate", 10),
        ("--max_duration", 0),
        ("--max_duration", "nan"),
        ("--shard", "3/3"),
        ("--shard", "1"),
        ("--shard", "-1/3"),
        ("--seed", "x"),
        ("--colour", "red"),
    ],
)
def test_wrong_arguments_end_with_2(option, clips, tmp_path):
    text = generate(clips, tmp_path / "out", *option, code=2)
    assert option[0] in text
    assert not (tmp_path / "out").exists()


def test_overwrite_is_for_all_shards(clips, tmp_path):
    text = generate(clips, tmp_path / "out", "--shard", "1/3", "--overwrite", code=2)
    assert "all shards" in text


def test_each_exit_status_by_the_real_command_line(clips, tmp_path):
    script = ROOT / "mel_generator.py"
    both = ("--input_dir", clips, "--output_dir", tmp_path / "out", *QUICK)
    assert "3 clips" in run(script, *both)
    (clips / "bad.wav").write_bytes(b"")
    assert "Skipped 1 file" in run(script, *both, "--strict", code=1)
    assert "--workers" in run(script, *both, "--workers", 0, code=2)


@pytest.fixture
def deadly_clip(clips, tmp_path, monkeypatch):
    """A clip that kills the worker that reads it, as lack of memory does, while `armed` stands."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "armed").touch()
    stand_in = tmp_path / "bin/ffmpeg"
    stand_in.write_text(
        f"#!{sys.executable}\n"
        "import os, signal\n"
        f"if os.path.exists({str(tmp_path / 'armed')!r}):\n"
        "    os.kill(os.getppid(), signal.SIGKILL)\n"
        "raise SystemExit('no sound')\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    path = clips / "1009_A_SAD_deadly.m4a"
    path.write_bytes(b"\0\0\0\x1cftypM4A ")
    return path


def test_a_killed_worker_is_told_with_the_files_in_flight(clips, deadly_clip, tmp_path):
    out = tmp_path / "out"
    for i in range(20):
        write_clip(clips / f"1000_A_NEU_{i}.wav")
    text = generate(clips, out, *QUICK, code=1)
    assert deadly_clip.name in text
    assert "killed" in text
    assert "1000_A_NEU_0.wav" not in text  # it was done
    assert "NEU/1000_A_NEU_0_original.npy" in spectrograms(out)
    assert "n_originals" not in read_config(out)
    (tmp_path / "armed").unlink()
    text = generate(clips, out, *QUICK)
    assert skipped(out).keys() == {deadly_clip.name}
    assert len(spectrograms(out)) == 23


def test_there_are_no_more_workers_than_clips(clips, tmp_path, monkeypatch):
    asked = []
    start_pool = gen.start_pool

    def note(n_workers):
        asked.append(n_workers)
        return start_pool(n_workers)

    monkeypatch.setattr(gen, "start_pool", note)
    generate(clips, tmp_path / "out", "--no_augment", "--workers", 300)
    assert asked == [3]


def test_workers_that_cannot_be_started_are_told(clips, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(gen, "ProcessPoolExecutor", refuse)
    text = generate(clips, tmp_path / "out", *QUICK, code=1)
    assert "could not be started (Resource temporarily unavailable)" in text
    assert "--workers" in text


def test_starting_workers_changes_nothing_in_this_process(clips, tmp_path, monkeypatch):
    for name in gen.WORKER_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    handler = signal.getsignal(signal.SIGINT)
    generate(clips, tmp_path / "out", *QUICK)
    assert dict(os.environ) == before
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_full_disk_is_told(clips, tmp_path, monkeypatch):
    open_path = Path.open

    def refuse(path, mode="r", *arguments, **options):
        if mode == "xb" and (tmp_path / "out/mel_config.json").exists():
            raise OSError(28, "No space left on device")
        return open_path(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    text = generate_here(clips, tmp_path / "out", code=1)
    assert "1001_A_ANG_X_original.npy: No space left on device" in text
    assert "run again" in text
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {"mel_config.json"}


def test_an_input_folder_that_goes_away_is_told(clips, tmp_path, monkeypatch):
    def take_away(tasks, args):
        shutil.move(clips, tmp_path / "elsewhere")
        for task in tasks:
            yield task, "unreadable: No such file or directory"

    monkeypatch.setattr(gen, "run_in_workers", take_away)
    text = generate(clips, tmp_path / "out", *QUICK, code=1)
    assert "disappeared" in text
    assert not (tmp_path / "out/skipped.csv").exists()


def test_workers_end_when_their_parent_is_killed(corpus, tmp_path):
    """kill -9, or a terminal that closes: no worker goes on alone."""
    both = ("--input_dir", corpus, "--output_dir", tmp_path, "--n_augmentations", 8)
    process = start(ROOT / "mel_generator.py", *both, "--workers", 2)
    wait_until(lambda: list(tmp_path.glob("*/*.npy")))
    process.kill()
    process.communicate(timeout=60)  # their output ends with the last of them
    generate(corpus, tmp_path, "--n_augmentations", 8)
    assert len(spectrograms(tmp_path)) == 48 * 9
    for path in tmp_path.rglob("*.npy"):
        assert np.load(path).shape[0] == 128
    assert not list(tmp_path.rglob("*.tmp"))
