"""Audio: every format, part of a file, channels, and the reasons for what holds no sound.

The section Audio is the same to the letter in generator and tester (test_contract.py): what is
tested here through mel_generator holds for both.
"""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT, generate, read_table, run

import mel_generator as gen

RATE = 16000  # Hz
HOP = 512
TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)).astype(np.float32)
# What libsndfile writes for each suffix that the scripts give to it.
CONTAINERS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".aiff": ("AIFF", "PCM_24"),
    ".aif": ("AIFF", "PCM_16"),
    ".aifc": ("AIFF", "FLOAT"),
    ".au": ("AU", "ULAW"),
    ".caf": ("CAF", "PCM_16"),
    ".w64": ("W64", "PCM_16"),
    ".rf64": ("RF64", "PCM_16"),
}
WAV_SUBTYPES = ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW", "IMA_ADPCM")
# How ffmpeg makes each of the formats that are left to it, where it has the encoder.
ENCODERS = {
    ".m4a": "aac",
    ".mp4": "aac",
    ".m4b": "aac",
    ".mov": "aac",
    ".3gp": "aac",
    ".aac": "aac",
    ".webm": "libopus",
    ".mkv": "flac",
    ".wma": "wmav2",
    ".amr": "libopencore_amrnb",
}

# Stands for ffmpeg: notes how it was called, and does what the file `plan` beside it says.
FFMPEG = """\
    #!{python}
    import json, struct, sys, wave
    plan = json.load(open({folder!r} + "/plan.json"))
    call = {{"arguments": sys.argv[1:], "stdin": sys.stdin.read()}}
    open({folder!r} + "/calls.jsonl", "a").write(json.dumps(call) + "\\n")
    sys.stderr.write(plan["text"])
    if plan["code"]:
        sys.exit(plan["code"])
    seconds = plan["seconds"]
    if "-t" in sys.argv:
        seconds = min(seconds, float(sys.argv[sys.argv.index("-t") + 1]))
    if seconds:
        n = int(8000 * seconds)
        samples = [0 if plan["silent"] else (i * i) % 9999 for i in range(n)]
        with wave.open(sys.argv[-1], "wb") as file:
            file.setparams((1, 2, 8000, n, "NONE", ""))
            file.writeframes(struct.pack(f"<{{n}}h", *samples))
    """


def load(path, **options):
    """load_audio at the usual settings."""
    return gen.load_audio(path, RATE, HOP, **options)


def reason(path, **options) -> str:
    """Why a file is refused."""
    with pytest.raises(gen.AudioError) as error:
        load(path, **options)
    return str(error.value)


def rms(samples) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def check_tone(samples, seconds=2.0, loudness=0.3 / 2**0.5, tolerance=0.1):
    """Asserts that samples are TONE, give or take what a lossy format does to it."""
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert len(samples) / RATE == pytest.approx(seconds, abs=0.2)
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    assert spectrum.argmax() * RATE / len(samples) == pytest.approx(440, abs=3)
    assert rms(samples) == pytest.approx(loudness, rel=tolerance)


@pytest.fixture
def impatient():
    """Ends a test that waits for a pipe: it would wait forever."""

    def give_up(*_):
        raise AssertionError("waited for a pipe")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# --------------------------------------------------------------------------------------
# What libsndfile reads


def test_every_suffix_is_tested_here():
    assert set(gen.SOUNDFILE_SUFFIXES) == CONTAINERS.keys()
    assert set(gen.FFMPEG_SUFFIXES) == ENCODERS.keys()


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_each_format_of_libsndfile_is_read(suffix, tmp_path):
    container, subtype = CONTAINERS[suffix]
    if not soundfile.check_format(container, subtype):
        pytest.skip(f"libsndfile writes no {subtype} here")
    soundfile.write(tmp_path / f"a{suffix}", TONE, RATE, subtype, format=container)
    samples, duration = load(tmp_path / f"a{suffix}")
    check_tone(samples)
    assert duration == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("subtype", WAV_SUBTYPES)
def test_each_kind_of_wav_is_read(subtype, tmp_path):
    soundfile.write(tmp_path / "a.WAV", TONE, RATE, subtype)
    check_tone(load(tmp_path / "a.WAV")[0])


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000, 96000])
def test_each_rate_is_resampled(rate, tmp_path):
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)
    soundfile.write(tmp_path / "a.wav", tone, rate)
    samples, duration = load(tmp_path / "a.wav")
    check_tone(samples)
    assert duration == 2
    assert len(samples) == 2 * RATE


def test_a_rate_of_no_sound_is_an_error(tmp_path):
    soundfile.write(tmp_path / "a.wav", TONE, 100)
    assert "sampling rate of 100 Hz" in reason(tmp_path / "a.wav")


@pytest.mark.parametrize("name", ["Zoë 😀.wav", "-y.wav", "re\rturn\n.wav", "a%d.wav"])
def test_any_name_is_read(name, tmp_path):
    soundfile.write(tmp_path / "a.wav", TONE, RATE)
    (tmp_path / "a.wav").rename(tmp_path / name)
    check_tone(load(tmp_path / name)[0])


@pytest.mark.skipif(sys.platform != "linux", reason="names are UTF-8 there")
def test_a_name_that_is_no_utf8_is_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", TONE, RATE)
    name = os.fsdecode(b"J\xfcrgen.wav")
    (tmp_path / "a.wav").rename(tmp_path / name)
    check_tone(load(tmp_path / name)[0])


# --------------------------------------------------------------------------------------
# Parts of files, and their length first


@pytest.fixture
def frames_read(monkeypatch):
    """The number of frames of each read of a sound file."""
    numbers = []
    original = soundfile.SoundFile.read

    def read(self, *arguments, **options):
        samples = original(self, *arguments, **options)
        numbers.append(len(samples))
        return samples

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    return numbers


def test_a_part_is_decoded_and_no_more(tmp_path, frames_read):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 10 * RATE).astype(np.float32)
    soundfile.write(tmp_path / "a.flac", noise, RATE, "PCM_24")
    samples, duration = load(tmp_path / "a.flac", start=4.0, seconds=2.0)
    assert frames_read == [2 * RATE]
    assert duration == 10
    assert np.abs(samples - noise[4 * RATE : 6 * RATE]).max() < 1e-4
    last, _ = load(tmp_path / "a.flac", start=9.5, seconds=2.0)
    assert len(last) == RATE // 2


def test_longer_than_max_duration_is_refused_before_decoding(tmp_path, frames_read):
    soundfile.write(tmp_path / "a.wav", np.tile(TONE, 5), RATE)
    text = reason(tmp_path / "a.wav", max_duration=9.5)
    assert "longer than --max_duration: 10.0 s" in text
    assert not frames_read
    assert load(tmp_path / "a.wav", max_duration=10)[1] == 10


def test_too_many_samples_at_once_are_refused(tmp_path, monkeypatch, frames_read):
    monkeypatch.setattr(gen, "MAX_DECODED", 6 * RATE)
    soundfile.write(tmp_path / "a.wav", np.stack([TONE, TONE, TONE, TONE], 1), RATE)
    assert "too large" in reason(tmp_path / "a.wav")
    assert not frames_read
    check_tone(load(tmp_path / "a.wav", seconds=1.0)[0], seconds=1)


def write_hours(path, hours=20, rate=2000):
    """A FLAC of silence but for one sample: it takes well under a megabyte."""
    with soundfile.SoundFile(path, "w", rate, 1, "PCM_16") as file:
        file.write(np.ones(1, np.int16))
        block = np.zeros(2**21, np.int16)
        missing = hours * 3600 * rate - 1
        while missing > 0:
            file.write(block[:missing])
            missing -= len(block)


def write_sparse(path, n_bytes=4 * 10**9):
    """A WAV of 4 GB of which the disk holds 44 bytes."""
    header = wav_header(riff_size=n_bytes + 36, data_size=n_bytes)
    path.write_bytes(header)
    os.truncate(path, len(header) + n_bytes)


def test_files_of_hours_are_skipped_in_little_memory(tmp_path):
    resource = pytest.importorskip("resource")
    soundfile.write(tmp_path / "1001_A_ANG_good.wav", TONE, RATE)
    write_hours(tmp_path / "1001_A_ANG_hours.flac")
    assert (tmp_path / "1001_A_ANG_hours.flac").stat().st_size < 10**6
    write_sparse(tmp_path / "1001_A_ANG_sparse.wav")

    def bound_memory():  # of each process; decoded, either file takes more
        resource.setrlimit(resource.RLIMIT_DATA, (600 * 10**6, 600 * 10**6))

    folders = ("--input_dir", tmp_path, "--output_dir", tmp_path / "out")
    options = ("--no_augment", "--workers", 1)
    run(ROOT / "mel_generator.py", *folders, *options, preexec_fn=bound_memory)
    rows = {row["file"]: row["reason"] for row in read_table(tmp_path / "out/skipped.csv")}
    assert rows.keys() == {"1001_A_ANG_hours.flac", "1001_A_ANG_sparse.wav"}
    assert "longer than --max_duration: 72,000.0 s" in rows["1001_A_ANG_hours.flac"]
    assert "longer than --max_duration" in rows["1001_A_ANG_sparse.wav"]
    assert (tmp_path / "out/ANG/1001_A_ANG_good_original.npy").exists()


# --------------------------------------------------------------------------------------
# WAVs that cannot be sought in, or whose sizes are not true


def test_gsm_is_read_without_seeking(tmp_path):
    time = np.arange(4 * 8000) / 8000
    sweep = 0.3 * np.sin(2 * np.pi * (300 + 100 * time) * time)
    soundfile.write(tmp_path / "a.wav", sweep, 8000, "GSM610")
    with soundfile.SoundFile(tmp_path / "a.wav") as file:
        assert not file.seekable()
    whole, duration = gen.load_audio(tmp_path / "a.wav", 8000, HOP)
    assert duration == pytest.approx(4, abs=0.1)
    later, length = gen.load_audio(tmp_path / "a.wav", 8000, HOP, start=2.5, seconds=1.0)
    assert length == duration
    assert np.array_equal(later, whole[20000:28000])


def wav_header(riff_size, data_size, before=b"", rate=RATE, tag=1):
    """The start of a 16-bit mono WAV, up to its first sample, with chunks before the data."""
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, tag, 1, rate, 2 * rate, 2, 16)
    head = struct.pack("<4sI4s", b"RIFF", riff_size, b"WAVE")
    return head + fmt + before + struct.pack("<4sI", b"data", data_size)


def chunk(name, content):
    """A chunk of a WAV, of even length."""
    return struct.pack("<4sI", name, len(content)) + content + b"\0" * (len(content) % 2)


PCM = (TONE * 32767).astype("<i2").tobytes()
LIST = chunk(b"LIST", b"INFOISFT\x0d\0\0\0Lavf58.29.100\0")
ODD = chunk(b"note", b"a byte of padding follows")
BIG = 2**32 - 1


@pytest.mark.parametrize(
    ("riff_size", "data_size", "before"),
    [
        (0, 0, b""),
        (36, 0, b""),
        (0, 0, LIST),
        (0, 0, ODD),
        (36 + len(LIST), 0, LIST),
        (BIG, BIG, b""),  # ffmpeg's, into a pipe
        (BIG, BIG, LIST),
        (0x7FFFF024, 0x7FFFF000, b""),  # SoX's
    ],
)
def test_a_wav_from_a_pipe_is_read_to_its_end(riff_size, data_size, before, tmp_path):
    content = wav_header(riff_size, data_size, before) + PCM
    (tmp_path / "a.wav").write_bytes(content)
    samples, duration = load(tmp_path / "a.wav")
    assert np.abs(samples - TONE).max() < 1e-4
    assert duration == 2
    part, _ = load(tmp_path / "a.wav", start=1.0, seconds=0.5)
    assert len(part) == RATE // 2
    assert (tmp_path / "a.wav").read_bytes() == content


def test_a_wav_from_a_pipe_keeps_to_max_duration(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav_header(0, 0) + PCM)
    assert "longer than --max_duration: 2.0 s" in reason(tmp_path / "a.wav", max_duration=1.5)


def test_an_honest_empty_wav_stays_empty(tmp_path):
    after = chunk(b"LIST", b"INFOICMT" + struct.pack("<I", 4000) + bytes(range(1, 201)) * 20)
    (tmp_path / "a.wav").write_bytes(wav_header(36 + len(after), 0) + after)
    assert "without samples" in reason(tmp_path / "a.wav")
    (tmp_path / "b.wav").write_bytes(wav_header(36, 0))
    assert "without samples" in reason(tmp_path / "b.wav")


def test_a_cut_wav_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav_header(36 + len(PCM), len(PCM)) + PCM[: len(PCM) // 2])
    samples, duration = load(tmp_path / "a.wav")
    assert duration == 1
    assert np.abs(samples - TONE[:RATE]).max() < 1e-4


# --------------------------------------------------------------------------------------
# Channels


def mono_of(tmp_path, *channels):
    """What load_audio makes of channels."""
    soundfile.write(tmp_path / "a.wav", np.stack(channels, 1), RATE, "FLOAT")
    return load(tmp_path / "a.wav")[0]


def test_the_mean_of_channels_is_taken(tmp_path):
    assert np.allclose(mono_of(tmp_path, TONE, TONE), TONE, atol=1e-6)
    other = 0.1 * np.random.default_rng(0).standard_normal(len(TONE)).astype(np.float32)
    assert np.allclose(mono_of(tmp_path, TONE, other), (TONE + other) / 2, atol=1e-6)


def test_empty_channels_do_not_make_a_clip_quieter(tmp_path):
    random = np.random.default_rng(0)
    hiss = 1e-4 * random.standard_normal((4, len(TONE))).astype(np.float32)
    silence = np.zeros_like(TONE)
    surround = mono_of(tmp_path, hiss[0], hiss[1], TONE, silence, hiss[2], hiss[3])
    assert np.array_equal(surround, TONE)
    assert np.array_equal(mono_of(tmp_path, silence, TONE), TONE)


def test_a_quiet_channel_that_is_no_empty_one_counts(tmp_path):
    assert np.allclose(mono_of(tmp_path, TONE, TONE / 10), 0.55 * TONE, atol=1e-6)


def test_antiphase_is_not_silence(tmp_path):
    assert np.array_equal(mono_of(tmp_path, TONE, -TONE), TONE)
    assert np.allclose(mono_of(tmp_path, -0.9 * TONE, TONE), TONE, atol=1e-6)


# --------------------------------------------------------------------------------------
# What holds no sound


def write_samples(path, samples, subtype="FLOAT"):
    soundfile.write(path, samples, RATE, subtype)
    return path


def test_samples_far_beyond_full_scale_are_an_error(tmp_path):
    integers = np.round(TONE * 32767)
    text = reason(write_samples(tmp_path / "a.wav", integers))
    assert "beyond full scale" in text
    assert "32768" in text
    louder = TONE * 300  # a peak of 90: a clip that somebody amplified
    assert np.array_equal(load(write_samples(tmp_path / "b.wav", louder))[0], louder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_an_error(value, tmp_path):
    samples = TONE.copy()
    samples[7] = value
    assert "not finite" in reason(write_samples(tmp_path / "a.wav", samples))
    both = np.stack([TONE, samples], 1)
    assert "not finite" in reason(write_samples(tmp_path / "b.wav", both))
    huge = TONE.astype(np.float64)
    huge[7] = 1e300
    assert "not finite" in reason(write_samples(tmp_path / "c.wav", huge, "DOUBLE"))


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_silence_is_told_of_the_file_or_of_the_part(value, tmp_path):
    path = write_samples(tmp_path / "a.wav", np.full(4 * RATE, value))
    assert reason(path) == "silent: all samples are equal"
    assert reason(path, seconds=9) == "silent: all samples are equal"
    assert "from 1.0 to 3.0 s" in reason(path, start=1.0, seconds=2.0)
    assert "from 3.0 to 4.0 s" in reason(path, start=3.0, seconds=2.0)
    assert "from 0.0 to 2.0 s" in reason(path, seconds=2.0)


def test_a_silent_part_does_not_make_the_file_silent(tmp_path):
    path = write_samples(tmp_path / "a.wav", np.concatenate([0 * TONE, TONE]))
    assert "silent" in reason(path, seconds=2.0)
    check_tone(load(path, start=2.0, seconds=2.0)[0])
    assert len(load(path)[0]) == 4 * RATE


def test_shorter_than_one_hop_is_an_error(tmp_path):
    assert "shorter than one hop: 511" in reason(write_samples(tmp_path / "a.wav", TONE[:511]))
    assert len(load(write_samples(tmp_path / "b.wav", TONE[:512]))[0]) == 512
    assert "without samples" in reason(write_samples(tmp_path / "c.wav", TONE[:0]))


@pytest.mark.parametrize("suffix", [".wav", ".m4a"])
def test_what_is_no_file_is_refused_at_once(suffix, tmp_path, impatient):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    (tmp_path / f"folder{suffix}").mkdir()
    for name in ("pipe", "device", "folder"):
        assert "not a regular file" in reason(tmp_path / f"{name}{suffix}")
    (tmp_path / f"link{suffix}").symlink_to("nowhere")
    assert "No such file" in reason(tmp_path / f"link{suffix}")


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".m4a"])
def test_what_the_first_bytes_tell_is_said(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in reason(path)
    path.write_bytes(b"")
    assert "0 bytes" in reason(path)


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_text_under_a_sound_files_name_is_unreadable(suffix, tmp_path):
    (tmp_path / f"a{suffix}").write_text("this is no sound\n" * 50)
    assert "unreadable" in reason(tmp_path / f"a{suffix}")


# --------------------------------------------------------------------------------------
# What ffmpeg reads


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """Puts a stand-in for ffmpeg on the PATH; returns a function that sets what it does."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = textwrap.dedent(FFMPEG).format(python=sys.executable, folder=str(folder))
    (folder / "ffmpeg").write_text(script)
    (folder / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))

    def plan(seconds=3.0, text="", code=0, silent=False):
        values = {"seconds": seconds, "text": text, "code": code, "silent": silent}
        (folder / "plan.json").write_text(json.dumps(values))
        (folder / "calls.jsonl").write_text("")
        return lambda: [
            json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()
        ]

    return plan


@pytest.fixture
def video_call(tmp_path):
    """A file that ffmpeg is asked to decode."""
    path = tmp_path / "1001_A_ANG_call.m4a"
    path.write_bytes(b"\0\0\0\x1cftypM4A ")
    return path


@pytest.fixture
def typed_text():
    """Standard input holds text, as in `while read f; do …; done`; returns what is left of it."""
    reader, writer = os.pipe()
    os.write(writer, b"the next line")
    os.close(writer)
    kept = os.dup(0)
    os.dup2(reader, 0)
    yield lambda: os.read(reader, 100)
    os.dup2(kept, 0)
    os.close(kept)
    os.close(reader)


def seconds_asked(call):
    """The value of -t; None without it."""
    arguments = call["arguments"]
    return float(arguments[arguments.index("-t") + 1]) if "-t" in arguments else None


@pytest.mark.parametrize("suffix", [*ENCODERS, ".M4A"])
def test_each_format_of_ffmpeg_is_given_to_it(suffix, ffmpeg, video_call):
    calls = ffmpeg()
    path = video_call.rename(video_call.with_suffix(suffix))
    samples, duration = load(path)
    assert (len(samples), duration) == (3 * RATE, 3)
    assert len(calls()) == 1
    assert str(path) in calls()[0]["arguments"]


def test_ffmpeg_does_not_read_standard_input(ffmpeg, video_call, typed_text):
    calls = ffmpeg()
    load(video_call)
    assert calls()[0]["stdin"] == ""
    assert typed_text() == b"the next line"


def test_ffmpeg_decodes_at_most_the_seconds_asked_for(ffmpeg, video_call):
    calls = ffmpeg(seconds=20.0)
    samples, _ = load(video_call, start=2.0, seconds=3.0)
    assert len(samples) == 3 * RATE
    assert seconds_asked(calls()[0]) == pytest.approx(5)
    load(video_call)
    assert seconds_asked(calls()[1]) is None


def test_ffmpeg_decodes_little_more_than_max_duration(ffmpeg, video_call):
    calls = ffmpeg(seconds=100.0)
    assert "longer than --max_duration" in reason(video_call, max_duration=10)
    assert 10 < seconds_asked(calls()[0]) <= 12
    ffmpeg(seconds=9.0)
    assert load(video_call, max_duration=10)[1] == 9


def test_the_length_is_what_ffmpeg_tells_or_what_it_decodes(ffmpeg, video_call):
    ffmpeg(seconds=20.0, text="Input #0, mov\n  Duration: 01:02:03.50, start: 0.0, bitrate: 9 kb/s")
    assert load(video_call, seconds=3.0)[1] == pytest.approx(3723.5)
    for text in ("", "  Duration: N/A, start: 0.0\n"):
        ffmpeg(seconds=2.5, text=text)
        assert load(video_call, seconds=3.0)[1] == pytest.approx(2.5)


@pytest.mark.parametrize(
    "text",
    [
        "  Duration: N/A, start: 0.0\n",
        "[aac @ 0x5] [warning] Estimating duration from bitrate\n[info]   Duration: 00:00:04.18\n",
    ],
)
def test_a_length_that_ffmpeg_does_not_know_is_measured(text, ffmpeg, video_call):
    calls = ffmpeg(seconds=20.0, text=text)
    samples, duration = load(video_call, seconds=3.0)
    assert len(samples) == 3 * RATE
    assert duration == pytest.approx(20)
    assert [seconds_asked(call) for call in calls()] == [pytest.approx(3), None]
    ffmpeg(seconds=20.0, text=text)
    assert load(video_call, max_duration=30)[1] == pytest.approx(20)


def test_a_video_that_lasts_longer_than_its_sound_is_as_long_as_its_sound(ffmpeg, video_call):
    ffmpeg(seconds=2.0, text="[info]   Duration: 00:00:20.00, start: 0.0\n")
    assert load(video_call, seconds=3.0)[1] == pytest.approx(2)
    assert load(video_call, max_duration=10)[1] == pytest.approx(2)


def test_a_title_is_no_length(ffmpeg, video_call):
    title = "[info]     title           : Duration: 00:00:00.50\n"
    ffmpeg(seconds=20.0, text=f"{title}[info]   Duration: 00:00:20.00, start: 0.0\n")
    assert load(video_call, seconds=3.0)[1] == pytest.approx(20)


def test_a_file_of_hours_is_told_with_the_length_that_ffmpeg_tells(ffmpeg, video_call):
    ffmpeg(seconds=3600.0, text="  Duration: 01:00:00.00, start: 0.0\n")
    assert "longer than --max_duration: 3,600.0 s" in reason(video_call, max_duration=10)


def test_ffmpegs_error_is_the_reason(ffmpeg, video_call):
    ffmpeg(code=1, text="[info] Input #0\n[mov @ 0x5] [error] moov atom not found\n")
    assert "moov atom not found" in reason(video_call)
    ffmpeg(code=187, text="")
    assert "unreadable: ffmpeg" in reason(video_call)
    ffmpeg(seconds=0)  # it ends well, and writes nothing
    assert "ffmpeg" in reason(video_call)


def test_a_silent_part_that_ffmpeg_decodes_is_told_as_a_part(ffmpeg, video_call):
    ffmpeg(seconds=20.0, silent=True, text="  Duration: 00:00:20.00, start: 0.0\n")
    assert reason(video_call) == "silent: all samples are equal"
    assert "from 4.0 to 7.0 s" in reason(video_call, start=4.0, seconds=3.0)
    assert "from 0.0 to 3.0 s" in reason(video_call, seconds=3.0)


def test_ffmpeg_leaves_no_temporary_file(ffmpeg, video_call, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    ffmpeg()
    load(video_call)
    ffmpeg(code=1)
    reason(video_call)
    assert not list((tmp_path / "temporary").iterdir())


def test_a_program_that_cannot_start_is_told(video_call, tmp_path, monkeypatch):
    (tmp_path / "ffmpeg").write_bytes(b"\x7fELF of another machine")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "unreadable: ffmpeg could not be started" in reason(video_call)


def test_without_ffmpeg_the_reason_says_what_to_install(video_call, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "1001_A_ANG_good.wav", TONE, RATE)
    monkeypatch.setenv("PATH", "")
    text = generate(tmp_path, tmp_path / "out", "--no_augment", "--workers", 1)
    assert "1 needs ffmpeg" in text
    rows = read_table(tmp_path / "out/skipped.csv")
    assert [row["file"] for row in rows] == [video_call.name]
    assert "install" in rows[0]["reason"]
    assert "for f in *.m4a; do ffmpeg -i" in rows[0]["reason"]


def test_the_line_that_converts_a_folder_works(ffmpeg, video_call, tmp_path, monkeypatch):
    ffmpeg()
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", "")
    line = reason(video_call).partition("folder elsewhere: ")[2]
    subprocess.run(["/bin/sh", "-c", line], cwd=tmp_path, env={"PATH": path}, check=True)
    assert load(tmp_path / f"{video_call.name}.wav")[1] == 3


# --------------------------------------------------------------------------------------
# The real ffmpeg, where it is installed

REAL_FFMPEG = shutil.which("ffmpeg")
needs_ffmpeg = pytest.mark.skipif(REAL_FFMPEG is None, reason="ffmpeg is not installed here")


def encode(tmp_path, name, encoder, *options):
    """TONE, 2 s long, as ffmpeg encodes it; skips the test where it has no such encoder."""
    soundfile.write(tmp_path / "tone.wav", TONE, RATE)
    encoders = subprocess.run(
        [REAL_FFMPEG, "-v", "error", "-encoders"], capture_output=True, text=True
    ).stdout
    if f" {encoder} " not in encoders:
        pytest.skip(f"ffmpeg has no encoder {encoder} here")
    path = tmp_path / name
    command = [REAL_FFMPEG, "-v", "error", "-y", "-i", tmp_path / "tone.wav", *options]
    subprocess.run([*command, "-c:a", encoder, path], check=True, stdin=subprocess.DEVNULL)
    (tmp_path / "tone.wav").unlink()
    return path


@needs_ffmpeg
@pytest.mark.parametrize("suffix", ENCODERS)
def test_each_format_of_the_real_ffmpeg_is_read(suffix, tmp_path):
    options = ("-ar", "8000") if suffix == ".amr" else ()
    path = encode(tmp_path, f"a{suffix}", ENCODERS[suffix], *options)
    samples, duration = load(path)
    check_tone(samples, tolerance=0.3 if suffix == ".amr" else 0.1)  # made for voices, not tones
    assert duration == pytest.approx(2, abs=0.2)


@needs_ffmpeg
def test_the_real_ffmpeg_decodes_a_part(tmp_path):
    path = encode(tmp_path, "-y %03d.m4a", "aac")
    samples, duration = load(path, start=0.5, seconds=1.0)
    check_tone(samples, seconds=1)
    assert len(samples) == RATE
    assert duration == pytest.approx(2, abs=0.2)
    assert "longer than --max_duration" in reason(path, max_duration=0.5)


@needs_ffmpeg
def test_sound_that_starts_later_than_its_video_is_heard_whole(tmp_path):
    path = encode(tmp_path, "a.mkv", "flac")
    picture = ("-f", "lavfi", "-i", "color=size=32x32:duration=8", "-c:v", "mpeg4", "-c:a", "copy")
    command = [REAL_FFMPEG, "-v", "error", "-itsoffset", "5", "-i", path, *picture]
    late = tmp_path / "late.mkv"
    subprocess.run([*command, late], check=True, stdin=subprocess.DEVNULL)
    samples, duration = load(late, seconds=6.0)
    check_tone(samples)
    assert duration == pytest.approx(2, abs=0.1)


@needs_ffmpeg
def test_the_real_ffmpeg_keeps_the_level_of_empty_channels(tmp_path):
    path = encode(tmp_path, "a.mkv", "flac", "-af", "pan=5.1|FC=c0")
    check_tone(load(path)[0])


@needs_ffmpeg
def test_the_real_ffmpegs_error_is_the_reason(tmp_path):
    (tmp_path / "a.m4a").write_text("this is no sound\n" * 50)
    text = reason(tmp_path / "a.m4a")
    assert re.match(r"unreadable: ffmpeg.*: .*(moov atom|Invalid data)", text)
    picture = tmp_path / "silent film.mp4"
    source = ("-f", "lavfi", "-i", "color=size=32x32:duration=1")
    command = [REAL_FFMPEG, "-v", "error", *source, "-c:v", "mpeg4", picture]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    assert "unreadable: ffmpeg" in reason(picture)


@needs_ffmpeg
def test_a_wav_that_the_real_ffmpeg_writes_to_a_pipe_is_read(tmp_path):
    path = encode(tmp_path, "a.m4a", "aac")
    command = [REAL_FFMPEG, "-v", "error", "-i", path, "-f", "wav", "-"]
    with Path(tmp_path, "a.wav").open("wb") as file:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=file)
    check_tone(load(tmp_path / "a.wav")[0])
