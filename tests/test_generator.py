"""mel_generator.py: features and augmentations against librosa and their definitions, and the folder it leaves."""

import csv
import json
import os
import shutil

import librosa
import numpy as np
import pytest
import soundfile
from conftest import ROOT, generate

import mel_generator as gen

MEL = {"sample_rate": 16000, "n_fft": 2048, "hop_length": 512, "n_mels": 128, "fmin": 0.0, "fmax": 8000.0}


@pytest.fixture(scope="module")
def voice(corpus):
    return gen.load_audio(str(sorted(corpus.iterdir())[0]), 16000, 512)


def librosa_mel(samples, **mel):
    mel = MEL | mel
    power = librosa.feature.melspectrogram(y=samples, sr=mel["sample_rate"], n_fft=mel["n_fft"], hop_length=mel["hop_length"], n_mels=mel["n_mels"], fmin=mel["fmin"], fmax=mel["fmax"])
    return librosa.power_to_db(power, ref=1.0, amin=1e-10, top_db=None)


def files_below(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.name.startswith("run.")}  # run.json tells the time


def skipped(folder):
    with open(folder / "skipped.csv", newline="", encoding="utf-8") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("other", [{}, {"n_mels": 64, "hop_length": 256}, {"n_fft": 1024, "fmin": 50.0, "fmax": 7600.0}, {"n_fft": 1001, "hop_length": 333}])
def test_mel_is_librosas(voice, other):
    ours = gen.log_mel(voice, **MEL | other)
    theirs = librosa_mel(voice, **other)
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 0.05  # dB


def test_level_survives(voice):
    louder, plain = gen.log_mel(10 * voice, **MEL), gen.log_mel(voice, **MEL)
    assert np.abs(louder - plain - 20)[plain > -60].max() < 0.01


def test_shift_is_by_a_tenth_with_silence():
    samples = np.arange(1, 101, dtype=np.float32)
    later, earlier = gen.shift(samples, 0.1), gen.shift(samples, -0.1)
    assert later.tolist() == [0] * 10 + list(range(1, 91))
    assert earlier.tolist() == list(range(11, 101)) + [0] * 10


def test_augmentations_are_those_documented():
    assert gen.VARIANTS == {
        "time_shift_pos": ("shift", 0.1), "time_shift_neg": ("shift", -0.1), "pitch_up": ("pitch", 2.0), "pitch_down": ("pitch", -2.0),
        "stretch_fast": ("stretch", 1.2), "stretch_slow": ("stretch", 0.8), "noise_low": ("noise", 0.005), "noise_medium": ("noise", 0.01),
    }  # fmt: skip


def test_noise_is_each_clips_own(voice):
    noise = {key: gen.augment(voice, *key) - voice for key in (("noise_low", 1, "a"), ("noise_low", 2, "a"), ("noise_low", 1, "b"))}
    assert np.array_equal(gen.augment(voice, "noise_low", 1, "a") - voice, noise["noise_low", 1, "a"])
    alike = np.corrcoef([*noise.values()])
    assert np.abs(alike - np.eye(3)).max() < 0.05


@pytest.mark.parametrize("variant", gen.VARIANTS)
def test_augmentation_is_librosas(voice, variant):
    kind, amount = gen.VARIANTS[variant]
    ours = gen.augment(voice, variant, 1, "stem")
    if kind == "noise":
        added = ours - voice
        assert abs(added.std() / amount - 1) < 0.05 and abs(added.mean()) < amount / 20
        return
    if kind == "shift":
        assert np.array_equal(ours, gen.shift(voice, amount))
        return
    theirs = librosa.effects.pitch_shift(voice, sr=16000, n_steps=amount) if kind == "pitch" else librosa.effects.time_stretch(voice, rate=amount)
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    ours, theirs = librosa_mel(ours), librosa_mel(theirs)
    heard = theirs > theirs.max() - 60
    assert np.abs(ours - theirs)[heard].mean() < 0.1  # dB


def test_pitch_moves_by_two_semitones_and_stretch_changes_length_alone():
    tone = np.sin(2 * np.pi * 500 * np.arange(32000) / 16000).astype(np.float32)
    peak = lambda y: np.abs(np.fft.rfft(y * np.hanning(len(y)))).argmax() * 16000 / len(y)  # noqa: E731
    assert peak(gen.shift_pitch(tone, 2)) == pytest.approx(500 * 2 ** (2 / 12), rel=0.01)
    assert peak(gen.shift_pitch(tone, -2)) == pytest.approx(500 * 2 ** (-2 / 12), rel=0.01)
    fast, slow = gen.stretch(tone, 1.2), gen.stretch(tone, 0.8)
    assert (len(fast), len(slow)) == (round(32000 / 1.2), 40000)
    assert peak(fast) == pytest.approx(500, rel=0.01) and peak(slow) == pytest.approx(500, rel=0.01)


def test_variants_depend_on_seed_and_stem_alone():
    three, eight = gen.choose_variants(42, "1001_DFA_ANG_XX", 3), gen.choose_variants(42, "1001_DFA_ANG_XX", 8)
    assert eight[:4] == three and sorted(eight[1:]) == sorted(gen.VARIANTS)
    assert len({tuple(gen.choose_variants(seed, "1001_DFA_ANG_XX", 3)) for seed in range(5)}) > 1
    assert len({tuple(gen.choose_variants(42, f"100{i}_DFA_ANG_XX", 3)) for i in range(5)}) > 1


def test_folder_is_the_same_whatever_the_workers_or_interruptions(corpus, mels, tmp_path):
    generate(corpus, tmp_path / "one", "--n_augmentations", 2, "--workers", 1)
    whole = files_below(mels)
    assert files_below(tmp_path / "one") == whole
    assert len(whole) == 48 * 3 + 2
    for path in sorted((tmp_path / "one").rglob("*.npy"))[::3]:
        path.unlink()
    (tmp_path / "one" / "ANG" / "x_original.npy.99.tmp").write_bytes(b"half")
    (tmp_path / "one" / "my.tmp").write_bytes(b"not ours to delete")
    generate(corpus, tmp_path / "one", "--n_augmentations", 2)
    (tmp_path / "one" / "my.tmp").unlink()
    assert files_below(tmp_path / "one") == whole


def test_contents_and_config(corpus, mels, voice):
    config = json.loads((mels / "mel_config.json").read_text())
    assert {name: config[name] for name in MEL} == MEL and config["seed"] == 42
    stem = sorted(corpus.iterdir())[0].stem
    mel = np.load(mels / stem.split("_")[2] / f"{stem}_original.npy")
    assert mel.dtype == np.float32 and mel.shape == (128, 1 + len(voice) // 512)
    assert np.allclose(mel, gen.log_mel(voice, **MEL), rtol=0, atol=1e-3)


def test_any_rate_channels_and_format(tmp_path):
    time = np.arange(48000) / 48000
    tone = 0.3 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "1001_A_ANG_1.WAV", np.stack([2 * tone, 0 * tone], 1), 48000, subtype="PCM_24")
    soundfile.write(tmp_path / "1001_A_ang_2.flac", tone[::3], 16000)
    (tmp_path / "sub").mkdir()
    soundfile.write(tmp_path / "sub" / "1001_A_Ang_3.wav", tone[::6].astype(np.float64), 8000, subtype="DOUBLE")
    soundfile.write(tmp_path / "1001_A_ANG_4.wav", tone[::3], 16000, subtype="PCM_U8")
    generate(tmp_path, tmp_path / "out", "--no_augment")
    mel = {n: np.load(tmp_path / "out" / "ANG" / f"1001_A_{e}_{n}_original.npy") for n, e in ((1, "ANG"), (2, "ang"), (3, "Ang"), (4, "ANG"))}
    loud = mel[2] > mel[2].max() - 30
    assert all(np.abs(mel[n] - mel[2])[loud].max() < 1.0 for n in (1, 3, 4))


def bad_files(folder):
    """A file of each kind that cannot be used, with words that its reason must hold."""
    tone = (0.3 * np.sin(np.arange(16000) / 5)).astype(np.float32)
    write = lambda name, y, subtype="FLOAT": soundfile.write(folder / name, y, 16000, subtype=subtype)  # noqa: E731
    (folder / "1001_A_ANG_lfs.wav").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (folder / "1001_A_ANG_zero.wav").write_bytes(b"")
    (folder / "1001_A_ANG_text.wav").write_text("this is no sound\n" * 50)
    (folder / "1001_A_ANG_link.wav").symlink_to("nowhere")
    os.mkfifo(folder / "1001_A_ANG_pipe.wav")
    write("1001_A_ANG_none.wav", tone[:0])
    write("1001_A_ANG_short.wav", tone[:511])
    write("1001_A_ANG_silent.wav", np.zeros(16000))
    write("1001_A_ANG_dc.wav", np.full(16000, 0.5))
    write("1001_A_ANG_nan.wav", np.where(np.arange(16000) == 7, np.nan, tone))
    write("1001_A_ANG_inf.wav", np.where(np.arange(16000) == 7, np.inf, tone))
    words = {"lfs": "git lfs pull", "zero": "0 bytes", "text": "unreadable", "link": "unreadable: No such file", "pipe": "no regular file", "none": "without samples",
             "short": "shorter than one hop", "silent": "silent", "dc": "silent", "nan": "not finite", "inf": "not finite"}  # fmt: skip
    return {f"1001_A_ANG_{name}.wav": word for name, word in words.items()}


def test_every_bad_file_is_told_apart(tmp_path):
    words = bad_files(tmp_path)
    tone = (0.3 * np.sin(np.arange(16000) / 5)).astype(np.float32)
    for name in ("1001_A_ANG_good.wav", "hello.wav", "re\rturn\n.wav", "1001_A_XYZ_1.wav", f"1001_A_ANG_{'n' * 235}.wav"):
        soundfile.write(tmp_path / name, tone, 16000)
    (tmp_path / "z").mkdir()
    (tmp_path / "1001_A_ANG_folder.wav").mkdir()
    soundfile.write(tmp_path / "z" / "1001_A_ANG_good.wav", tone, 16000)
    no_utf8 = os.fsdecode(b"J\xfcrgen_A_ANG_1")
    shutil.copy(tmp_path / "1001_A_ANG_good.wav", tmp_path / f"{no_utf8}.wav")
    text = generate(tmp_path, tmp_path / "out", "--no_augment")
    words |= {"hello.wav": "no emotion", "re\rturn\n.wav": "no emotion", "1001_A_XYZ_1.wav": "no emotion", f"1001_A_ANG_{'n' * 235}.wav": "name too long", "z/1001_A_ANG_good.wav": "same stem as another file: 1001_A_ANG_good.wav"}
    found = skipped(tmp_path / "out")
    assert found.keys() == words.keys()
    assert not [(f, found[f]) for f, word in words.items() if word not in found[f]]
    assert f"Skipped {len(words)} files" in text
    assert {p.name for p in (tmp_path / "out").rglob("*.npy")} == {"1001_A_ANG_good_original.npy", f"{no_utf8}_original.npy"}
    before = (tmp_path / "out" / "skipped.csv").read_bytes()
    generate(tmp_path, tmp_path / "out", "--no_augment", "--strict", code=1)
    assert (tmp_path / "out" / "skipped.csv").read_bytes() == before  # the folder's, not the last run's
    soundfile.write(tmp_path / "1001_A_ANG_zero.wav", tone, 16000)
    generate(tmp_path, tmp_path / "out", "--no_augment")
    assert "1001_A_ANG_zero.wav" not in skipped(tmp_path / "out")
    with open(tmp_path / "out" / "skipped.csv", "ab") as file:
        file.write(b"\0\0\0")  # a power cut's
    generate(tmp_path / "z", tmp_path / "out", "--no_augment")
    assert skipped(tmp_path / "out").keys() == words.keys() - {"1001_A_ANG_zero.wav"}  # files of another folder stay told


def test_other_settings_are_refused_and_overwrite_starts_anew(corpus, mels, tmp_path):
    shutil.copytree(mels, tmp_path / "mels")
    for option, word in ((("--n_augmentations", 2, "--n_mels", 64), "n_mels is 128, now 64"), (("--n_augmentations", 2, "--seed", 1), "seed is 42, now 1")):
        text = generate(corpus, tmp_path / "mels", *option, code=1)
        assert word in text and "--overwrite" in text
    assert files_below(tmp_path / "mels") == files_below(mels)
    generate(corpus, tmp_path / "mels", "--no_augment", "--n_mels", 64, "--overwrite")
    assert {np.load(p).shape[0] for p in (tmp_path / "mels").rglob("*.npy")} == {64}
    assert len(list((tmp_path / "mels").rglob("*.npy"))) == 48
    (tmp_path / "mels" / "mel_config.json").unlink()
    assert "no mel_config.json" in generate(corpus, tmp_path / "mels", code=1)


@pytest.mark.parametrize("option", [("--n_augmentations", "9"), ("--workers", "0"), ("--hop_length", "0"), ("--fmax", "9000"), ("--n_mels", "5000"), ("--colour", "red")])
def test_wrong_arguments_end_with_2(corpus, tmp_path, option):
    text = generate(corpus, tmp_path / "out", *option, code=2)
    assert option[0] in text and not (tmp_path / "out").exists()


def test_missing_and_empty_folders(tmp_path):
    assert "is no folder" in generate(tmp_path / "absent", tmp_path / "out", code=1)
    (tmp_path / "empty").mkdir()
    assert "holds no .wav or .flac" in generate(tmp_path / "empty", tmp_path / "out", code=1)
    bad_files(tmp_path / "empty")
    assert "No file could be used" in generate(tmp_path / "empty", tmp_path / "out", code=1)
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in generate(tmp_path / "empty", tmp_path / "file" / "out", code=1)


def test_shards_then_a_plain_run_are_one_run(corpus, mels, tmp_path):
    from test_harm import start

    both = ["--input_dir", corpus, "--output_dir", tmp_path, "--n_augmentations", 2, "--workers", 1]
    shards = [start(ROOT / "mel_generator.py", *both, "--shard", f"{i}/3") for i in range(3)]
    assert [shard.wait(120) for shard in shards] == [0, 0, 0]
    assert all(sum(gen.in_shard(path, (i, 3)) for i in range(3)) == 1 for path in corpus.iterdir())
    parts = [len((tmp_path / f"skipped.{i}-of-3.csv").read_text().splitlines()) for i in range(3)]
    assert parts == [1, 1, 1] and len(list(tmp_path.rglob("*.npy"))) == 48 * 3
    generate(corpus, tmp_path, "--n_augmentations", 2)
    assert files_below(tmp_path) == files_below(mels)
    assert "take I/N" in generate(corpus, tmp_path, "--shard", "3/3", code=2)
    assert "for all shards" in generate(corpus, tmp_path, "--shard", "1/3", "--overwrite", code=2)
