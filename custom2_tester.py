"""Classifies sound files by emotion with the model of cremad_custom2.py.

    python custom2_tester.py --input_dir my_recordings --output_dir results
    python custom2_tester.py --input_dir my_recordings --output_dir results --visualize
    python custom2_tester.py --input_dir one.wav --model_path output/best_model.pth --output_dir one

--input_dir is a folder of sound files, searched through, or one such file. Without --model_path,
tests/pretrained/crema_d.pth beside this script answers. Everything that features need (mel
settings, normalisation, classes, sizes) comes from the model's file. Writes, in --output_dir:

    classification_results.csv    a row a file: class, confidence, probability of each class, error
    summary.csv                   count, percentage and mean confidence of each class
    confidence_distribution.png   how sure the model was, by class
    confusion_matrix.png, classification_report.txt    where names or --labels tell the emotion
    report.html                   --visualize: a page to look and listen through
    mel_spectrograms/*.png        --visualize: a picture a file
    embeddings.npy                --embeddings: float32 (rows of the results, features)
    segments.csv                  --segments: a row a window of 3 s
    run.json                      options, versions, platform: what it takes to repeat the run

Exit status: 0 finished, 1 had to stop or nothing could be classified (--strict: or a file
failed), 2 wrong arguments, 130 Ctrl-C.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import html
import importlib.metadata
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import platform
import posixpath
import re
import reprlib
import secrets
import shutil
import signal
import stat
import string
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.parse
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TextIO

import matplotlib
import numpy as np
import pandas as pd
import soundfile
import soxr
import threadpoolctl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

# --------------------------------------------------------------------------------------
# Constants

# fmt: off
SOUNDFILE_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".aifc", ".au",
                      ".caf", ".w64", ".rf64")
FFMPEG_SUFFIXES = (".m4a", ".mp4", ".m4b", ".webm", ".mkv", ".mov", ".wma", ".aac", ".amr", ".3gp")
# fmt: on
PLAYABLE_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".mp4", ".webm", ".aac")
MAX_DECODED = 2**27  # samples of all channels that are decoded at once: 512 MB
MAX_NAME_BYTES = 255  # of a file name, on every usual file system
MAX_PROCESSES = 61 if os.name == "nt" else 10_000  # Windows waits for no more
DEFAULT_MODEL = Path(__file__).resolve().parent / "tests" / "pretrained" / "crema_d.pth"
SILENCE_DB = -100.0  # the least that mel_generator.py writes
FORMAT_VERSION = 2  # of best_model.pth
RESULTS = "classification_results"  # the main table
LEVEL_FILES = 500  # at most so many files tell a folder's level
MIN_LEVEL_FILES = 20  # --adapt auto changes no folder with fewer readable files
LEVEL_WINDOWS = 8  # at most so many windows tell a file's level, with --segments
PAUSE_DB = 20  # a window this far under its recording's loudest is a pause
MAX_GAIN_DB = 40  # a folder farther than this from the training's level gets no gain
BATCHES_AHEAD = 4  # batches that are read, sorted by length and written together
MAX_ROWS_SHOWN = 20  # with more files, none is listed on the screen
DB_RANGE = (-60, 20)  # of all pictures: loudness is a cue
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"  # Okabe and Ito's, for the colour-blind
# of classes in a timeline: Okabe and Ito's, and again with other markers from the ninth on
COLOURS = ("#D55E00", "#009E73", "#0072B2", "#E69F00", "#56B4E9", "#CC79A7", "#000000", "#999999")
RESULT_COLUMNS = (  # the probabilities of the classes stand after the fourth
    "file", "predicted_class", "predicted_code", "confidence",
    "duration_s", "ignored_s", "level_db", "uncertain", "true_class", "error",
)  # fmt: skip
SEGMENT_COLUMNS = ("file", "start_s", "end_s", "predicted_class", "confidence")  # then the classes
IMAGE_STYLE = {"cmap": "magma", "origin": "lower", "aspect": "auto"}
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} files [{elapsed}<{remaining}]"
PACKAGES = (
    "matplotlib",
    "numpy",
    "pandas",
    "scikit-learn",
    "seaborn",
    "soundfile",
    "soxr",
    "torch",
)


class UserError(Exception):
    """Something that the user can fix, in words for the user."""


# --------------------------------------------------------------------------------------
# Audio


class AudioError(Exception):
    """Why a sound file cannot be used, in words for the user."""


def find_audio(folder: Path) -> tuple[list[str], dict[str, str], int]:
    """Sound files below a folder, by suffix: relative paths with "/", sorted.

    Besides, subfolders that cannot be entered, with the reason, and how many ._NAME files, which
    hold macOS's notes and no sound, were passed over. Links to folders are not followed.
    """
    paths = []
    closed = {}
    n_ignored = 0

    def note_closed(error: OSError) -> None:
        relative = Path(error.filename).relative_to(folder).as_posix()
        closed[f"{relative}/"] = f"unreadable: the folder cannot be entered ({error.strerror})"

    for parent, _, names in os.walk(folder, onerror=note_closed):
        for name in names:
            path = Path(parent, name)
            if path.suffix.lower() in SOUNDFILE_SUFFIXES + FFMPEG_SUFFIXES:
                if name.startswith("._"):
                    n_ignored += 1
                else:
                    paths.append(path.relative_to(folder).as_posix())
    return sorted(paths), closed, n_ignored


def encode_path(path: Path) -> str | bytes:
    """A path as libsndfile takes it: bytes, so that names that are no UTF-8 work too."""
    return os.fspath(path) if os.name == "nt" else os.fsencode(path)


def check_file(path: Path) -> None:
    """Raises AudioError for a file whose kind or first bytes tell that it is no sound."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for forever
            raise AudioError("unreadable: not a regular file")
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise AudioError(f"unreadable: {error.strerror}") from error
    if head.startswith(b"version https://git-lfs"):
        raise AudioError("Git LFS pointer, not audio: run 'git lfs pull' in the corpus's folder")
    if not head:
        raise AudioError("empty: the file has 0 bytes")


def decode_with_ffmpeg(path: Path, wav: Path, seconds: float | None = None) -> float | None:
    """Decodes a file's sound, or its first `seconds`, into a WAV that libsndfile reads.

    Returns the whole file's length in seconds, or None where ffmpeg tells none or but a guess.
    """
    if shutil.which("ffmpeg") is None:
        raise AudioError(
            "needs ffmpeg: install it (apt install ffmpeg, brew install ffmpeg), or convert the "
            f'folder elsewhere: for f in *{path.suffix}; do ffmpeg -i "$f" "$f.wav"; done'
        )
    command = ["ffmpeg", "-nostdin", "-hide_banner", "-nostats", "-loglevel", "level+info", "-y"]
    command += ["-protocol_whitelist", "file", "-i", path.absolute(), "-vn"]
    command += ["-af", "asetpts=N/SR/TB"]  # sound that starts later than its video counts from 0
    if seconds is not None:
        command += ["-t", f"{seconds:.3f}"]
    command += ["-c:a", "pcm_f32le", "-rf64", "auto", wav.absolute()]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    except OSError as error:
        raise AudioError(f"unreadable: ffmpeg could not be started ({error.strerror})") from error
    text = done.stderr.decode("utf-8", "replace")
    if done.returncode or not wav.exists():
        lines = re.findall(r"\[(?:error|fatal)\] (.+)", text) or text.split("\n")
        reason = next((line.strip() for line in lines if line.strip()), "no sound in it")
        raise AudioError(f"unreadable: ffmpeg says: {reason}")
    length = re.search(r"^(?:\[info\])? *Duration: (\d+):(\d+):([\d.]+)", text, re.MULTILINE)
    if length is None or "Estimating duration" in text:
        return None
    hours, minutes, rest = length.groups()
    return 3600 * int(hours) + 60 * int(minutes) + float(rest)


def repair_wav(path: Path) -> mmap.mmap | None:
    """A WAV that was written to a pipe, its sizes 0, with its real sizes; None for other files.

    The sizes are changed in memory; the file stays as it is.
    """
    with path.open("rb") as file:
        wav = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    chunk = 12
    while chunk < min(len(wav), 2**20) and wav[chunk : chunk + 4] != b"data":
        size = int.from_bytes(wav[chunk + 4 : chunk + 8], "little")
        chunk += 8 + size + size % 2
    first_sample = chunk + 8
    riff_end = int.from_bytes(wav[4:8], "little") + 8
    if wav[:4] != b"RIFF" or not riff_end <= first_sample < len(wav):
        return None
    for size_at in (4, chunk + 4):
        size = min(len(wav) - size_at - 4, 2**32 - 1)
        wav[size_at : size_at + 4] = size.to_bytes(4, "little")
    return wav


def open_sound(path: Path) -> soundfile.SoundFile:
    """Opens a sound file for reading."""
    file = soundfile.SoundFile(encode_path(path))
    if file.format == "RAW":  # libsndfile takes any bytes under the name .au for sound
        raise AudioError("unreadable: Format not recognised.")
    repaired = repair_wav(path) if file.frames == 0 else None
    return file if repaired is None else soundfile.SoundFile(repaired)


def check_header(file: soundfile.SoundFile) -> None:
    """Raises AudioError for a sampling rate or a length that no recording has."""
    if not 1000 <= file.samplerate <= 1_000_000:
        raise AudioError(f"unreadable: a sampling rate of {file.samplerate} Hz")
    if file.frames > 2**40:  # libsndfile's mark for a length that the header does not tell
        raise AudioError(
            "unreadable: its header does not tell its length; convert it: ffmpeg -i this new.wav"
        )


def check_duration(duration: float, max_duration: float) -> None:
    """Raises AudioError for a file that is longer than --max_duration, in seconds."""
    if duration > max_duration:
        raise AudioError(
            f"longer than --max_duration: {duration:,.1f} s of at most {max_duration:g}"
        )


def read_samples(
    file: soundfile.SoundFile, start: float, seconds: float | None, max_duration: float
) -> np.ndarray:
    """`seconds` of an open file from `start` on, or all the rest: float32 (frames, channels)."""
    check_header(file)
    rate = file.samplerate
    check_duration(file.frames / rate, max_duration)
    first = int(start * rate)
    n_frames = max(0, file.frames - first)
    if seconds is not None:
        n_frames = min(n_frames, math.ceil(seconds * rate))
    if n_frames * file.channels > MAX_DECODED:
        raise AudioError(
            f"too large: {n_frames / rate:.1f} s of {file.channels} channels at {rate} Hz; "
            "convert it: ffmpeg -i this -ac 1 -ar 16000 new.wav"
        )
    if file.seekable():
        file.seek(first)
    while not file.seekable() and first > 0:  # GSM 6.10: what comes before is read, too
        first -= max(1, len(file.read(min(first, 2**20), "float32")))
    return file.read(n_frames, "float32", always_2d=True)


def mix_to_mono(samples: np.ndarray) -> np.ndarray:
    """Mean of the channels, (frames, channels) to (frames,), without those that would spoil it.

    Channels over 30 dB under the loudest stay out (5.1 sound has most of its six all but empty).
    Where the mean is still over 10 dB under the loudest (antiphase), that channel is taken alone.
    """
    if samples.shape[1] == 1:
        return samples[:, 0]
    power = np.square(samples, dtype=np.float64).mean(axis=0)
    loudest = int(power.argmax())
    mono = samples[:, power >= power[loudest] / 1000].mean(axis=1)
    if np.square(mono, dtype=np.float64).mean() < power[loudest] / 10:
        return samples[:, loudest]
    return mono


def check_samples(samples: np.ndarray) -> None:
    """Raises AudioError for samples (frames, channels) that are none, not finite or no sound."""
    if not len(samples):
        raise AudioError("empty: a sound file without samples")
    peak = np.abs(samples).max()
    if not np.isfinite(peak):
        raise AudioError("not finite: NaN or infinite samples")
    if peak > 100:
        raise AudioError(
            f"beyond full scale: a sample is {peak:,.0f} times as large; integers saved as floats? "
            "Divide them by 32768"
        )


def decode(
    path: Path, start: float, seconds: float | None, max_duration: float
) -> tuple[np.ndarray, int, float]:
    """A file, or `seconds` of it from `start` on, as it is.

    Returns float32 (frames, channels), the sampling rate, and the whole file's length in seconds.
    """
    if path.suffix.lower() in FFMPEG_SUFFIXES:
        end = max_duration + 1 if seconds is None else start + seconds
        with tempfile.TemporaryDirectory() as folder:
            wav = Path(folder, "decoded.wav")
            length = decode_with_ffmpeg(path, wav, None if math.isinf(end) else end)
            if length is None and seconds is not None:
                decode_with_ffmpeg(path, wav)  # how long it lasts, only decoding all of it tells
            samples, rate, duration = decode(wav, start, seconds, math.inf)
        if duration > end - 0.1:  # else all was decoded: a video may last longer than its sound
            duration = max(duration, length or 0.0)
        check_duration(duration, max_duration)
        return samples, rate, duration
    try:
        with open_sound(path) as file:
            samples = read_samples(file, start, seconds, max_duration)
            return samples, file.samplerate, file.frames / file.samplerate
    except (soundfile.SoundFileError, RuntimeError, OverflowError, MemoryError) as error:
        raise AudioError(f"unreadable: {getattr(error, 'error_string', error)}") from error


def load_audio(
    path: Path,
    sample_rate: int,
    hop_length: int,
    start: float = 0.0,
    seconds: float | None = None,
    max_duration: float = math.inf,
) -> tuple[np.ndarray, float]:
    """Decodes a sound file, or `seconds` of it from `start` on, to mono at sample_rate.

    Returns float32 (samples,), full scale 1, and the whole file's length in seconds. Resampled
    by soxr at high quality, as librosa.resample does. Raises AudioError, with the reason in
    words, for whatever holds nothing to classify.
    """
    check_file(path)
    samples, rate, duration = decode(path, start, seconds, max_duration)
    check_samples(samples)
    mono = mix_to_mono(samples)
    if np.ptp(mono) == 0:
        end = start + len(mono) / rate
        part = f" from {start:.1f} to {end:.1f} s" if end - start < duration - 0.01 else ""
        raise AudioError(f"silent: all samples are equal{part}")
    if rate != sample_rate:
        mono = soxr.resample(mono, rate, sample_rate)
    if len(mono) < hop_length:
        raise AudioError(
            f"shorter than one hop: {len(mono)} samples of {hop_length} at {sample_rate} Hz"
        )
    return mono, duration


# --------------------------------------------------------------------------------------
# Features


def wrong_mel_settings(settings: dict) -> str:
    """What is wrong with mel settings, in words; "" if nothing is."""
    shown = {name: reprlib.repr(value) for name, value in settings.items()}
    ranges = {"sample_rate": (1000, 1_000_000), "n_fft": (16, 65_536), "n_mels": (1, 1024)}
    for name, (low, high) in ranges.items():
        if type(settings[name]) is not int or not low <= settings[name] <= high:
            return f"{name} is {shown[name]}: must be a whole number, {low:,} to {high:,}"
    n_fft = settings["n_fft"]
    if settings["n_mels"] > n_fft // 2:
        return f"n_mels is {shown['n_mels']}: must be at most half of n_fft, {n_fft // 2}"
    if type(settings["hop_length"]) is not int or not 1 <= settings["hop_length"] <= n_fft:
        return f"hop_length is {shown['hop_length']}: must be 1 to n_fft, {n_fft}"
    fmin = settings["fmin"]
    fmax = settings["fmax"]
    nyquist = settings["sample_rate"] / 2
    are_numbers = type(fmin) in (int, float) and type(fmax) in (int, float)
    if not are_numbers or not 0 <= fmin < fmax <= nyquist:
        return (
            f"fmin is {shown['fmin']}, fmax {shown['fmax']}: must be 0 <= fmin < fmax <= "
            f"{nyquist:g} Hz, half of sample_rate"
        )
    return ""


@functools.cache
def mel_filters(sample_rate: int, n_fft: int, n_mels: int, fmin: float, fmax: float) -> np.ndarray:
    """Triangular mel filters of equal area, float32 (STFT bins, mel bands).

    As librosa.filters.mel, which takes over a second to import. Mel as in Slaney's "Auditory
    Toolbox" (1998): linear up to 1 kHz = 15 mel, logarithmic above.
    """
    linear = 200 / 3  # Hz a mel below 1 kHz
    growth = math.log(6.4) / 27  # of the logarithm, a mel above

    def to_mel(hertz: float) -> float:
        return 15 + math.log(hertz / 1000) / growth if hertz > 1000 else hertz / linear

    mel = np.linspace(to_mel(fmin), to_mel(fmax), n_mels + 2)
    corners = np.where(mel > 15, 1000 * np.exp(growth * (mel - 15)), linear * mel)[:, None]  # Hz
    bins = np.arange(n_fft // 2 + 1) * sample_rate / n_fft  # Hz
    widths = np.diff(corners, axis=0)
    rise = (bins - corners[:-2]) / widths[:-1]
    fall = (corners[2:] - bins) / widths[1:]
    triangles = np.minimum(rise, fall).clip(0)  # (n_mels, bins)
    filters = triangles * 2 / (corners[2:] - corners[:-2])
    return np.ascontiguousarray(filters.T, np.float32)  # the product is twice as fast this way


@functools.cache
def hann(size: int) -> np.ndarray:
    """Periodic Hann window, float32 (size,)."""
    return np.hanning(size + 1)[:-1].astype(np.float32)


def stft_blocks(samples: np.ndarray, n_fft: int, hop_length: int) -> Iterator[np.ndarray]:
    """Short-time Fourier transform as librosa.stft: Hann window, frames centred by zero padding.

    Yields complex64 (frames, n_fft // 2 + 1), all 1 + samples // hop_length frames in a few
    blocks: those of an hour at once would fill the memory.
    """
    # norm="forward" keeps numpy in float32, six times as fast; the window undoes that norm.
    window = n_fft * hann(n_fft)
    padded = np.pad(samples, n_fft // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop_length]
    size = max(1, 2**21 // n_fft)
    for start in range(0, len(frames), size):
        yield np.fft.rfft(frames[start : start + size] * window, norm="forward")


def log_mel(
    samples: np.ndarray,
    sample_rate: int,
    n_fft: int,
    hop_length: int,
    n_mels: int,
    fmin: float,
    fmax: float,
) -> np.ndarray:
    """Log-mel spectrogram in dB at absolute level, float32 (mel bands, frames).

    Equals librosa.power_to_db(librosa.feature.melspectrogram(...), ref=1.0, amin=1e-10,
    top_db=None): nothing is scaled to the clip's own maximum, so loudness survives.
    """
    filters = mel_filters(sample_rate, n_fft, n_mels, fmin, fmax)
    blocks = []
    for spectrum in stft_blocks(samples, n_fft, hop_length):
        power = spectrum.real**2 + spectrum.imag**2  # (frames, bins)
        blocks.append(power @ filters)
    mel = np.concatenate(blocks).T
    return 10.0 * np.log10(np.maximum(np.ascontiguousarray(mel), 1e-10))


# --------------------------------------------------------------------------------------
# Model


def length_mask(lengths: Tensor, n_frames: int) -> Tensor:
    """True at each clip's own frames: (clips, n_frames)."""
    return torch.arange(n_frames, device=lengths.device) < lengths[:, None]


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm beside a shortcut; the first one strides.

    Source: He et al., "Deep Residual Learning", arXiv:1512.03385; pooled shortcut: He et al.,
    "Bag of Tricks", arXiv:1812.01187.
    """

    def __init__(self, n_in: int, n_out: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Conv2d(n_in, n_out, 1, bias=False)
        self.norm_shortcut = nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T, M), zero past each clip's frames, to the same, strided; and the lengths."""
        # A fixed divisor: a clip's last, half-empty window is the same with and without padding.
        # Pooled, then 1 x 1: PyTorch 2.13's strided 1 x 1 convolution of one channel crashes in
        # bfloat16 on some CPUs.
        area = math.prod(self.stride)
        pooled = F.avg_pool2d(x, self.stride, ceil_mode=True, divisor_override=area)
        lengths = (lengths + self.stride[0] - 1).div(self.stride[0], rounding_mode="floor")
        h = F.relu(self.norm1(self.conv1(x)))
        mask = length_mask(lengths, h.shape[2])[:, None, :, None]
        h = self.norm2(self.conv2(h * mask))
        return F.relu(h + self.norm_shortcut(self.shortcut(pooled))) * mask, lengths


class BidirectionalLSTM(nn.Module):
    """Two LSTM layers over time, both ways along each clip's own steps.

    As nn.LSTM(bidirectional=True) on packed clips; but clips are reversed within their padding
    instead of packed, which on a CPU in float32 takes 0.7 of the time of a training step.
    """

    def __init__(self, n_in: int, hidden: int, dropout: float) -> None:
        super().__init__()
        sizes = (n_in, 2 * hidden)
        self.forward_lstm = nn.ModuleList(nn.LSTM(n, hidden, batch_first=True) for n in sizes)
        self.backward_lstm = nn.ModuleList(nn.LSTM(n, hidden, batch_first=True) for n in sizes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, C) and each clip's own steps (B,) to (B, T, 2 * hidden), undefined past those."""
        step = torch.arange(x.shape[1], device=x.device)
        last = lengths[:, None] - 1
        reverse = torch.where(step <= last, last - step, step)[:, :, None]  # (B, T, 1)
        for forward_lstm, backward_lstm in zip(self.forward_lstm, self.backward_lstm, strict=True):
            x = self.dropout(x)
            ahead, _ = forward_lstm(x)
            back, _ = backward_lstm(x.gather(1, reverse.expand_as(x)))
            x = torch.cat([ahead, back.gather(1, reverse.expand_as(back))], 2)
        return x


class AttentivePooling(nn.Module):
    """Mean and spread over time, weighted by a learnt score of each step.

    Source: Okabe et al., "Attentive Statistics Pooling", arXiv:1803.10963.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(n, 128), nn.Tanh(), nn.Linear(128, 1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, n) and True at each clip's own steps (B, T) to (B, 2 * n)."""
        score = self.score(x).float().masked_fill(~mask[:, :, None], -torch.inf)
        weight = score.softmax(1)  # (B, T, 1)
        mean = (weight * x).sum(1)
        variance = (weight * (x - mean[:, None]).square()).sum(1)
        return torch.cat([mean, (variance + 1e-4).sqrt()], 1)


class EmotionClassifier(nn.Module):
    """Four residual CNN blocks, bidirectional LSTM, self-attention, three fully connected layers.

    In evaluation a clip's logits do not depend on its batch's padding: nothing sees past a
    clip's own frames.
    """

    def __init__(
        self,
        n_mels: int,
        n_classes: int,
        channels: Sequence[int],
        strides: Sequence[Sequence[int]],
        hidden: int,
        heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        inputs = (1, *channels[:-1])
        self.blocks = nn.ModuleList(map(ResidualBlock, inputs, channels, strides))
        bands = n_mels
        for _, stride in strides:
            bands = -(-bands // stride)
        self.lstm = BidirectionalLSTM(channels[-1] * bands, hidden, dropout)
        self.attention = nn.MultiheadAttention(2 * hidden, heads, dropout, batch_first=True)
        self.norm = nn.LayerNorm(2 * hidden)
        self.pooling = AttentivePooling(2 * hidden)
        self.head = nn.Sequential(
            nn.Linear(4 * hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden // 2),
            nn.BatchNorm1d(hidden // 2),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden // 2, n_classes),
        )

    def encode(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Normalised log-mel (B, T, M), zero past each clip, to embeddings (B, 4 * hidden)."""
        lengths = lengths.to(x.device)
        x = x.unsqueeze(1).contiguous(memory_format=torch.channels_last)  # (B, 1, T, M)
        for block in self.blocks:
            x, lengths = block(x, lengths)
        x = x.permute(0, 2, 3, 1).flatten(2)  # (B, C, T, M) to (B, T, M * C)
        x = self.lstm(x, lengths)  # (B, T, 2 * hidden)
        mask = length_mask(lengths, x.shape[1])
        attended, _ = self.attention(x, x, x, key_padding_mask=~mask, need_weights=False)
        return self.pooling(self.norm(x + attended).float(), mask)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Normalised log-mel (B, T, M), zero past each clip, to logits (B, classes)."""
        return self.head(self.encode(x, lengths))


def encode_clips(
    model: EmotionClassifier, mels: list[Tensor], batch_size: int, device: torch.device
) -> Tensor:
    """Float32 embeddings (clips, features), on the CPU, of normalised log-mels (frames, bands)."""
    order = sorted(range(len(mels)), key=lambda i: len(mels[i]))
    embeddings = []
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = [mels[i] for i in order[start : start + batch_size]]
            lengths = torch.tensor([len(mel) for mel in batch])
            x = nn.utils.rnn.pad_sequence(batch, batch_first=True)
            x = F.pad(x, (0, 0, 0, -x.shape[1] % 8))  # few widths: oneDNN keeps memory for each
            embeddings.append(model.encode(x.to(device), lengths).cpu())
    return torch.cat(embeddings)[torch.tensor(order).argsort()]


def head_logits(model: EmotionClassifier, embeddings: Tensor, device: torch.device) -> Tensor:
    """Float32 logits (clips, classes), on the CPU, of embeddings (clips, features)."""
    with torch.inference_mode():
        return model.head(embeddings.to(device)).cpu()


def clip_level(mel: np.ndarray) -> float:
    """Level of a clip's louder parts, dB: 95th percentile over time of the mean power of the bands.

    mel: log-mel spectrogram in dB, (frames, mel bands), not normalised.
    """
    power = (10 ** (mel / 10)).mean(axis=1)
    return float(10 * np.log10(np.percentile(power, 95)))


def clip_distance(mel: np.ndarray) -> float:
    """How far a clip's level lies over its noise, dB: the median cell of its quieter half.

    mel: as clip_level's.
    """
    power = (10 ** (mel / 10)).mean(axis=1)
    quieter = mel[power.argsort()[: (len(mel) + 1) // 2]]
    return clip_level(mel) - float(np.median(quieter))


def normalize(mel: Tensor, normalization: dict) -> Tensor:
    """A log-mel in dB (..., mel bands) as the model takes it: over a noise floor, centred, scaled.

    normalization: mean, std and, where the model has one, floor, of each mel band in dB. The floor
    is added in power, so that what lies far under it (a noise suppressor's silence) is not seen.
    """
    mean = torch.tensor(normalization["mean"]).to(mel.device)
    std = torch.tensor(normalization["std"]).to(mel.device)
    if "floor" in normalization:
        nepers = math.log(10) / 10  # in a decibel of power
        floor = torch.tensor(normalization["floor"]).to(mel.device)
        mel = torch.logaddexp(nepers * mel, nepers * floor) / nepers
    return (mel - mean) / std


def noise_floor(x: Tensor, lengths: Tensor) -> Tensor:
    """Mean over the tenth of a clip's frames with the least energy: dB (B, T, M) to dB (B, M).

    Digital silence is no noise: its frames are left out while there are others.
    """
    power = 10 ** (x / 10)
    is_clip = length_mask(lengths.to(x.device), x.shape[1])
    is_silent = (x <= SILENCE_DB).all(2)
    energy = power.sum(2).masked_fill(is_silent, 1e30).masked_fill(~is_clip, math.inf)
    n_quiet = ((is_clip & ~is_silent).sum(1, keepdim=True) // 10).clamp(min=1)
    rank = energy.argsort(1).argsort(1)
    is_quiet = rank < n_quiet
    mean = (power * is_quiet[:, :, None]).sum(1) / n_quiet
    return 10 * mean.log10().clamp(min=SILENCE_DB / 10)


def try_device(device: torch.device) -> None:
    """Raises RuntimeError where a device cannot compute: a GPU too old for this PyTorch."""
    nn.LSTM(1, 1).to(device)(torch.zeros(1, 1, 1, device=device))[0].cpu()


# --------------------------------------------------------------------------------------
# Checkpoint


def load_model(path: Path, device: torch.device) -> tuple[EmotionClassifier, dict]:
    """The model of best_model.pth in evaluation mode, and the file's dict; raises UserError."""
    path = Path(path)  # a notebook may give a text
    checkpoint = read_checkpoint(path)
    wrong = wrong_checkpoint(checkpoint)
    if not wrong:
        model, wrong = build_model(checkpoint, path.stat().st_size)
    if wrong:
        raise UserError(f"{path} {wrong}: take a best_model.pth as cremad_custom2.py wrote it.")
    return model.to(device).eval(), checkpoint


def build_model(checkpoint: dict, n_bytes: int) -> tuple[EmotionClassifier | None, str]:
    """The model with a checkpoint's weights, or None and what is wrong with these, in words.

    No memory is taken for a model of other sizes than the file's n_bytes: it is built on the meta
    device first. float16 weights compute as float32.
    """
    weights = checkpoint["model_state_dict"]
    if not all(isinstance(key, str) for key in weights):
        return None, "holds weights without a name"
    with torch.device("meta"):
        model = EmotionClassifier(**checkpoint["model_config"])
    n_elements = sum(tensor.numel() for tensor in model.state_dict().values())
    if 2 * n_elements > n_bytes:  # of float16
        return None, "holds fewer weights than its model_config asks for"
    try:
        model.to_empty(device="cpu").load_state_dict(weights)
    except RuntimeError as error:
        return None, f"holds other weights than its model_config asks for ({str(error)[:200]})"
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        return None, "holds weights that are NaN or infinite"
    return model, ""


def wrong_checkpoint(checkpoint: dict) -> str:
    """What is wrong with the values beside the weights, in words; "" if nothing is."""
    types = {
        "format_version": int, "model_state_dict": dict, "model_config": dict, "mel_config": dict,
        "normalization": dict, "max_width": int, "classes": list, "temperature": float,
    }  # fmt: skip
    if missing := [name for name in types if name not in checkpoint]:
        return f"is no best_model.pth of cremad_custom2.py (it lacks {', '.join(missing)})"
    if type(checkpoint["format_version"]) is not int:
        return "contradicts itself (format_version is no whole number)"
    if checkpoint["format_version"] != FORMAT_VERSION:
        return (
            f"has format version {checkpoint['format_version']}, this script reads {FORMAT_VERSION}"
        )
    for name, kind in types.items():
        if type(checkpoint[name]) is not kind:
            return f"contradicts itself ({name} is no {kind.__name__})"
    wrong = wrong_model_config(checkpoint) or wrong_values(checkpoint)
    return f"contradicts itself ({wrong})" if wrong else ""


def wrong_model_config(checkpoint: dict) -> str:
    """What is wrong with the model's and the mel settings, in words; "" if nothing is."""
    config = checkpoint["model_config"]
    mel = checkpoint["mel_config"]
    names = {"n_mels", "n_classes", "channels", "strides", "hidden", "heads", "dropout"}
    if config.keys() != names:
        return f"model_config has not the keys {', '.join(sorted(names))}"
    if mel.keys() != {"sample_rate", "n_fft", "hop_length", "n_mels", "fmin", "fmax"}:
        return "mel_config has not the six mel settings"
    if wrong := wrong_mel_settings(mel):
        return wrong
    sizes = [config[name] for name in ("n_mels", "n_classes", "hidden", "heads")]
    n_blocks = len(config["channels"]) if isinstance(config["channels"], tuple | list) else 0
    if not all_positive_ints(sizes, 4) or max(sizes) > 10**5:
        return "a size in model_config is no whole number from 1 to 100000"
    if not 1 <= n_blocks <= 16 or not all_positive_ints(config["channels"], n_blocks):
        return "channels are not a whole number for each block"
    if max(config["channels"]) > 10**5:
        return "channels are over 100000"
    strides = config["strides"]
    if not isinstance(strides, tuple | list) or len(strides) != n_blocks:
        return "strides are not a pair for each block"
    if not all(all_positive_ints(pair, 2) and max(pair) <= 64 for pair in strides):
        return "strides are not pairs of whole numbers from 1 to 64"
    if config["hidden"] < 2 or 2 * config["hidden"] % config["heads"]:
        return "heads is no divisor of 2 * hidden"
    if type(config["dropout"]) not in (int, float) or not 0 <= config["dropout"] < 1:
        return "dropout is no number from 0 to 1"
    return ""


def all_positive_ints(values: Any, n: int) -> bool:
    """Whether values are a tuple or list of n whole numbers, each at least 1."""
    if not isinstance(values, tuple | list) or len(values) != n:
        return False
    return all(type(value) is int and value >= 1 for value in values)


def wrong_values(checkpoint: dict) -> str:
    """What is wrong with normalisation, classes and the rest, in words; "" if nothing is."""
    n_mels = checkpoint["model_config"]["n_mels"]
    if n_mels != checkpoint["mel_config"]["n_mels"]:
        return "mel_config and model_config differ in their number of mel bands"
    no_floor = [0.0] * n_mels
    normalization = {"mean": None, "std": None, "floor": no_floor} | checkpoint["normalization"]
    bands = {f"normalization.{name}": normalization[name] for name in ("mean", "std", "floor")}
    bands["floor"] = checkpoint.get("floor", no_floor)
    for name, values in bands.items():
        if not isinstance(values, list) or len(values) != n_mels:
            return f"there is no {name} of {n_mels} mel bands"
        if not all(type(value) is float and abs(value) < 1e6 for value in values):
            return f"{name} is not of finite numbers under 1000000"
    if min(checkpoint["normalization"]["std"]) < 1e-6:
        return "a deviation of the normalization is not above 0"
    classes = checkpoint["classes"]
    codes = [c.get("code") for c in classes if isinstance(c, dict)]
    names = [c.get("name") for c in classes if isinstance(c, dict)]
    if not all(isinstance(text, str) for text in codes + names):
        return "classes are not codes and names"
    n_classes = checkpoint["model_config"]["n_classes"]
    if not len(classes) == len(set(codes)) == len(set(names)) == n_classes:
        return "classes are not a code and a name for each of the model's outputs"
    level = checkpoint.get("level", {"median": 0.0, "low": -8.0, "high": 8.0})
    if not isinstance(level, dict) or not level.keys() >= {"median", "low", "high"}:
        return "level has no median, low and high"
    numbers = [*level.values(), checkpoint.get("distance", 0.0)]
    if not all(type(v) in (int, float) and abs(v) < 1e6 for v in numbers):
        return "level and distance are not of finite numbers"
    if not 1e-3 <= checkpoint["temperature"] <= 1e3:
        return "temperature is no number above 0, from 0.001 to 1000"
    if not 1 <= checkpoint["max_width"] <= 10**6:
        return "max_width is no whole number from 1 to 1000000"
    return ""


def known_speakers(checkpoint: dict) -> set[str]:
    """The speakers that trained or validated the model, in lower case."""
    speakers = checkpoint.get("speakers")
    lists = speakers.values() if isinstance(speakers, dict) else []
    names = [name for part in lists if isinstance(part, list) for name in part]
    return {name.casefold() for name in names if isinstance(name, str)}


def gpu_or_cpu(cpu: bool) -> torch.device:
    """The GPU if there is one, else or with --cpu the CPU; raises UserError if it fails."""
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    try:
        try_device(device)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"The GPU cannot be used ({reason}): add --cpu.") from error
    return device


# --------------------------------------------------------------------------------------
# Classification


class Window(NamedTuple):
    """A part of a recording to classify."""

    path: str  # of the recording, below --input_dir
    source: Path  # of the file to read: its own, or what ffmpeg decoded
    start: float  # seconds
    n_windows: int  # of the recording
    error: str = ""  # why it cannot be read, where that is known already


class WindowPrediction(NamedTuple):
    """The model's answer for a window."""

    window: Window
    mel: np.ndarray | None  # float32 (mel bands, frames) to draw, or None
    duration: float  # of the recording, seconds; NaN where it failed
    level: float  # before any gain, dB; NaN where it failed
    error: str
    probabilities: np.ndarray  # (classes,); NaN where it failed
    embedding: np.ndarray | None  # (features,); None without --embeddings


class RunOptions(NamedTuple):
    """What the rows of a run depend on, besides the model."""

    input_dir: str
    max_width: int  # frames
    segments: bool
    window: float  # seconds
    step: float  # seconds
    min_confidence: float | None
    gain_db: float = 0.0  # added to every recording
    fill_db: float | None = None  # the floor to fill to, over the training's; None: no filling

    def max_seconds(self, mel_config: dict) -> float:
        """The longest sound that is not cut."""
        return self.max_width * mel_config["hop_length"] / mel_config["sample_rate"]

    def seconds(self, mel_config: dict) -> float:
        """How much of a window is decoded: what the model hears, and half a frame's padding."""
        if self.segments:
            return self.window
        samples = self.max_width * mel_config["hop_length"] + mel_config["n_fft"]
        return samples / mel_config["sample_rate"]


def find_input(input_dir: Path) -> tuple[Path, list[str], dict[str, str]]:
    """The folder of --input_dir, its sound files and subfolders that cannot be entered."""
    suffixes = SOUNDFILE_SUFFIXES + FFMPEG_SUFFIXES
    if not input_dir.is_dir():
        if not os.path.lexists(input_dir):
            raise UserError(f"--input_dir {input_dir} does not exist.")
        if input_dir.suffix.lower() not in suffixes:
            raise UserError(
                f"--input_dir {input_dir} is no folder and no sound file ({' '.join(suffixes)})."
            )
        return input_dir.parent, [input_dir.name], {}
    paths, closed, n_ignored = find_audio(input_dir)
    if not paths and not closed:
        raise UserError(
            f"--input_dir {input_dir} holds no sound file ({' '.join(suffixes)}), nor does any "
            "folder below it."
        )
    if n_ignored:
        print(f"Ignored {count(n_ignored, 'file')} named ._*: macOS's notes, not sound.")
    return input_dir, paths, closed


def sound_length(path: Path) -> float:
    """Seconds that a file lasts, by its header; raises AudioError."""
    check_file(path)
    try:
        with open_sound(path) as file:
            check_header(file)
            return file.frames / file.samplerate
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise AudioError(f"unreadable: {getattr(error, 'error_string', error)}") from error


def window_starts(duration: float, window: float, step: float) -> list[float]:
    """Seconds at which the windows of a recording start; the last one ends with it."""
    rest = duration - window
    if rest < 1e-6:  # less than a sample
        return [0.0]
    return [*np.arange(0.0, rest - 1e-6, step).tolist(), rest]


def list_windows(
    paths: list[str], folder: Path, options: RunOptions, temporary: Path
) -> Iterator[Window]:
    """The windows of all recordings, file by file: one a file without --segments.

    With it, what only ffmpeg reads is decoded once a file into `temporary`.
    """
    for i, path in enumerate(paths):
        source = folder / path
        starts = [0.0]
        error = ""
        if options.segments:
            try:
                if source.suffix.lower() in FFMPEG_SUFFIXES:
                    check_file(source)
                    source = temporary / f"{i}.wav"
                    decode_with_ffmpeg(folder / path, source)
                starts = window_starts(sound_length(source), options.window, options.step)
            except AudioError as reason:
                error = str(reason)
        for start in starts:
            yield Window(path, source, start, len(starts), error)


class WindowSpectrogram(NamedTuple):
    """The spectrogram of a window, and what was measured on the way."""

    mel: np.ndarray | None  # float32 (mel bands, frames), with the gain; None where it failed
    duration: float  # of the recording, seconds
    level: float  # before the gain, dB
    error: str


def read_window(window: Window, mel_config: dict, options: RunOptions) -> WindowSpectrogram:
    """Log-mel spectrogram of a window, or what is wrong with it."""
    if window.error:
        return WindowSpectrogram(None, math.nan, math.nan, window.error)
    rate = mel_config["sample_rate"]
    hop_length = mel_config["hop_length"]
    seconds = options.seconds(mel_config)
    try:
        samples, duration = load_audio(window.source, rate, hop_length, window.start, seconds)
        if options.gain_db:
            samples = samples * np.float32(10 ** (options.gain_db / 20))
        mel = log_mel(samples, **mel_config)[:, : options.max_width]
        return WindowSpectrogram(mel, duration, clip_level(mel.T) - options.gain_db, "")
    except AudioError as error:
        return WindowSpectrogram(None, math.nan, math.nan, str(error))
    except MemoryError:
        return WindowSpectrogram(None, math.nan, math.nan, "too long for this machine's memory")


def prefetch(
    items: Iterable[Any], read: Callable[[Any], Any], workers: int, size: int
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yields items and what read makes of them, `size` at a time; threads prepare the next ones."""
    items = iter(items)
    pending: deque[tuple[list[Any], Iterator[Any]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        while batch := list(itertools.islice(items, size)):
            pending.append((batch, pool.map(read, batch)))
            if len(pending) == 2:
                ready, results = pending.popleft()
                yield ready, list(results)
        for ready, results in pending:
            yield ready, list(results)
    finally:
        pool.shutdown(cancel_futures=True)


def fill_floor(mel: Tensor, floor: Tensor) -> Tensor:
    """Adds the noise that a clip's bands lack against a floor, evenly over its frames.

    This hides the silence that noise suppression or a studio leaves; frames of digital silence
    get the whole floor. mel: dB (frames, mel bands); floor: dB (mel bands). The noise's power is
    the mean of two exponential draws, in dB as uneven as CREMA-D's pauses, and the same at every
    call.
    """
    target = 10 ** (floor / 10)
    lacking = target - 10 ** (noise_floor(mel[None], torch.tensor([len(mel)])) / 10)
    is_silent = (mel <= SILENCE_DB).all(1, keepdim=True)
    added = torch.where(is_silent, target, lacking.clamp(min=0))
    generator = torch.Generator().manual_seed(0)
    noise = -torch.log1p(-torch.rand(2, *mel.shape, generator=generator)).mean(0)
    power = 10 ** (mel / 10) + added * noise
    return 10 * power.log10()


def predict_windows(
    mels: list[np.ndarray | None],
    model: EmotionClassifier,
    checkpoint: dict,
    batch_size: int,
    fill_db: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (clips, classes) and embeddings (clips, features) of log-mels; NaN for None.

    mels: (mel bands, frames) in dB, not normalised; fill_db: see RunOptions.
    """
    device = next(model.parameters()).device
    normalization = checkpoint["normalization"]
    good = [i for i, mel in enumerate(mels) if mel is not None]
    probabilities = np.full((len(mels), len(checkpoint["classes"])), np.nan, np.float32)
    embeddings = np.full((len(mels), model.head[0].in_features), np.nan, np.float32)
    if good:
        heard = [torch.from_numpy(mels[i].T) for i in good]
        if fill_db is not None:
            floor = torch.tensor(checkpoint["floor"])
            floor += fill_db * (floor > SILENCE_DB)  # a band without an STFT bin stays empty
            heard = [fill_floor(mel, floor) for mel in heard]
        normalised = [normalize(mel, normalization) for mel in heard]
        encoded = encode_clips(model, normalised, batch_size, device)
        embeddings[good] = encoded
        logits = head_logits(model, encoded, device)
        probabilities[good] = (logits / checkpoint["temperature"]).softmax(1)
    return probabilities, embeddings


def predict(
    model: EmotionClassifier, checkpoint: dict, samples: np.ndarray, sample_rate: int
) -> dict[str, float]:
    """The probability of each emotion, for a recording in memory; for notebooks.

    samples: (frames,) or (frames, channels), full scale 1. Raises AudioError, with the reason in
    words, for samples that hold nothing to classify. Hears the first max_width frames.
    """
    samples = np.asarray(samples, np.float32)
    samples = samples[:, None] if samples.ndim == 1 else samples
    if samples.shape[1] > len(samples) > 0:
        raise AudioError(f"samples {samples.shape} must be (frames, channels): transpose them")
    check_samples(samples)
    mel_config = checkpoint["mel_config"]
    mono = mix_to_mono(samples)
    if np.ptp(mono) == 0:
        raise AudioError("silent: all samples are equal")
    mono = soxr.resample(mono, sample_rate, mel_config["sample_rate"])
    if len(mono) < mel_config["hop_length"]:
        raise AudioError(f"shorter than one hop: {len(mono)} samples at the model's rate")
    mel = log_mel(mono, **mel_config)[:, : checkpoint["max_width"]]
    probabilities, _ = predict_windows([mel], model, checkpoint, 1)
    names = [c["name"] for c in checkpoint["classes"]]
    return dict(zip(names, probabilities[0].tolist(), strict=True))


def run_options(args: argparse.Namespace, checkpoint: dict) -> RunOptions:
    """The options before any adaptation; raises UserError if --window is over --max_width."""
    options = RunOptions(
        input_dir=str(args.input_dir.resolve()),
        max_width=args.max_width or checkpoint["max_width"],
        segments=args.segments,
        window=args.window,
        step=args.step,
        min_confidence=args.min_confidence,
    )
    longest = options.max_seconds(checkpoint["mel_config"])
    if options.segments and options.window > longest:
        raise UserError(
            f"--window {options.window:g} s is longer than --max_width, {options.max_width} frames "
            f"({math.floor(100 * longest) / 100:g} s)."
        )
    return options


def spread_evenly(items: list[Any], n: int) -> list[Any]:
    """At most n of the items, evenly spread over the list."""
    index = np.linspace(0, len(items) - 1, min(len(items), n)).round().astype(int)
    return [items[i] for i in index]


def sample_windows(
    path: str, folder: Path, mel_config: dict, options: RunOptions
) -> list[WindowSpectrogram]:
    """Up to LEVEL_WINDOWS of a file's windows, evenly spread, that can be read."""
    with tempfile.TemporaryDirectory() as temporary:
        windows = list(list_windows([path], folder, options, Path(temporary)))
        sample = spread_evenly(windows, LEVEL_WINDOWS)
        heard = [read_window(window, mel_config, options) for window in sample]
    return [clip for clip in heard if not clip.error]


def are_loud(levels: Sequence[float]) -> np.ndarray:
    """Which windows of a recording, by their levels in dB, are no pauses: bool (windows,)."""
    return np.array(levels) > max(levels) - PAUSE_DB


def measure_folder(
    paths: list[str], folder: Path, mel_config: dict, options: RunOptions, workers: int
) -> tuple[list[float], list[float]]:
    """Levels of up to LEVEL_FILES files, and how far each lies over its noise, in dB.

    The files are spread evenly; those that cannot be read are left out. Of a file in windows, the
    median over those that are no pauses.
    """
    sample = spread_evenly(paths, LEVEL_FILES)
    if options.segments and any(path.lower().endswith(FFMPEG_SUFFIXES) for path in sample):
        workers = 1  # each is decoded as a whole: hours of several at once would fill the disk
    hear = functools.partial(sample_windows, folder=folder, mel_config=mel_config, options=options)
    levels = []
    distances = []
    with tqdm(total=len(sample), desc="Measuring the level", unit="file", leave=False) as bar:
        for batch, files in prefetch(sample, hear, workers, 64):
            bar.update(len(batch))
            for clips in filter(None, files):
                is_loud = are_loud([clip.level for clip in clips])
                loud = list(itertools.compress(clips, is_loud))
                levels.append(float(np.median([clip.level for clip in loud])))
                distances.append(float(np.median([clip_distance(clip.mel.T) for clip in loud])))
    return levels, distances


def adapt_to_training(
    paths: list[str], folder: Path, checkpoint: dict, options: RunOptions, args: argparse.Namespace
) -> tuple[RunOptions, str]:
    """The options with gain_db and fill_db for all of --input_dir, and what to say of them."""
    if args.adapt == "on" and "level" not in checkpoint:
        raise UserError("--adapt on: this model's file does not tell its training's level.")
    if args.adapt == "off" or "level" not in checkpoint:
        return options, ""
    mel_config = checkpoint["mel_config"]
    levels, distances = measure_folder(paths, folder, mel_config, options, args.workers)
    gain_db, note = choose_gain(levels, checkpoint["level"], args.adapt)
    options = options._replace(gain_db=gain_db)
    if not levels or not checkpoint.keys() >= {"floor", "distance"}:
        return options, note
    is_filled, fill_note = choose_filling(distances, checkpoint["distance"], args.adapt)
    if is_filled:
        above = float(np.median(levels)) + gain_db - checkpoint["level"]["median"]
        options = options._replace(fill_db=round(above, 3))
    return options, f"{note} {fill_note}".strip()


def choose_gain(levels: list[float], level: dict, adapt: str) -> tuple[float, str]:
    """The gain, dB, that brings a folder's median level to the training's, and what to say of it.

    One for the whole folder: what is loud among its files stays loud. "auto" gives one only where
    the median lies outside the training speakers' range, and from MIN_LEVEL_FILES files on.
    """
    if not levels:
        return 0.0, ""
    median = float(np.median(levels))
    above = median - level["median"]
    is_usual = level["low"] <= median <= level["high"]
    is_few = len(levels) < MIN_LEVEL_FILES
    found = f"These recordings are {abs(above):.1f} dB {'louder' if above > 0 else 'quieter'} "
    found += "than the training's (median level)"
    if abs(above) > MAX_GAIN_DB:
        return 0.0, f"{found}: too far for a gain, none is applied. Do they begin with silence?"
    if adapt == "on" or not (is_usual or is_few):
        return round(-above, 3), f"{found}: all are changed by {-above:+.1f} dB (--adapt {adapt})."
    if is_usual:
        return 0.0, f"{found}: within the training speakers' range, left as they are."
    return 0.0, (
        f"{found}, outside the training speakers' range, so answers may lean to one emotion. No "
        f"gain is applied: {count(len(levels), 'file')}, fewer than {MIN_LEVEL_FILES}, may be of "
        f"one mood. If the moods are mixed, give --adapt on ({-above:+.1f} dB)."
    )


def choose_filling(distances: list[float], usual: float, adapt: str) -> tuple[bool, str]:
    """Whether a folder's recordings get the noise that they lack, and what to say of it.

    distances: dB, each file's clip_distance; usual: the training's at most. "auto" fills from
    MIN_LEVEL_FILES files on.
    """
    distance = float(np.median(distances))
    if distance <= usual:
        return False, ""
    found = f"Their noise is {distance:.0f} dB below them, the training's {usual:.0f} dB at most"
    if adapt == "on" or len(distances) >= MIN_LEVEL_FILES:
        return True, f"{found}: the missing noise is added to each (--adapt {adapt})."
    return False, f"{found}, as in a studio or after suppression: --adapt on adds what is missing."


def classify(
    windows: Iterable[Window],
    model: EmotionClassifier,
    checkpoint: dict,
    options: RunOptions,
    args: argparse.Namespace,
) -> Iterator[list[WindowPrediction]]:
    """Yields the predictions of BATCHES_AHEAD batches of windows at a time, in order."""
    read = functools.partial(read_window, mel_config=checkpoint["mel_config"], options=options)
    for batch, clips in prefetch(windows, read, args.workers, BATCHES_AHEAD * args.batch_size):
        mels = [clip.mel for clip in clips]
        probabilities, embeddings = predict_windows(
            mels, model, checkpoint, args.batch_size, options.fill_db
        )
        predictions = []
        for window, clip, p, e in zip(batch, clips, probabilities, embeddings, strict=True):
            shown = None
            if args.visualize and clip.mel is not None:
                every = 1 + window.n_windows // 40  # no picture has room for an hour's frames
                shown = clip.mel[:, ::every] - np.float32(options.gain_db)  # as recorded
            embedding = e if args.embeddings else None
            about = (clip.duration, clip.level, clip.error, p, embedding)
            predictions.append(WindowPrediction(window, shown, *about))
        yield predictions


def classify_files(
    paths: list[str],
    folder: Path,
    model: EmotionClassifier,
    checkpoint: dict,
    options: RunOptions,
    args: argparse.Namespace,
) -> Iterator[list[WindowPrediction]]:
    """Yields the predictions of each file's windows, file by file, under a bar."""
    bar = tqdm(desc="Classifying", total=len(paths), unit="file", bar_format=BAR_FORMAT)
    with tempfile.TemporaryDirectory() as temporary, bar:
        windows = list_windows(paths, folder, options, Path(temporary))
        batches = classify(windows, model, checkpoint, options, args)
        stream = itertools.chain.from_iterable(batches)
        for _, group in itertools.groupby(stream, key=lambda p: p.window.path):
            predictions = []
            for prediction in group:
                predictions.append(prediction)
                bar.update(min(1 / prediction.window.n_windows, len(paths) - bar.n))
            yield predictions
            source = predictions[0].window.source
            if source.parent == Path(temporary):
                source.unlink(missing_ok=True)  # ffmpeg may have failed


def result_row(predictions: list[WindowPrediction], checkpoint: dict, options: RunOptions) -> dict:
    """A file's row of classification_results.csv: the mean over its windows.

    Of a recording with sound, a window of silence is a pause, and one with no or too few samples
    lies at an end that the header told wrongly (some MP3); other damage is the file's error.
    """
    row: dict = {"file": predictions[0].window.path}
    good = [p for p in predictions if not p.error]
    errors = [p.error for p in predictions if p.error]
    is_silent = not good and all(error.startswith("silent") for error in errors)
    if is_silent and options.segments:  # else the first seconds alone
        return row | {"error": "silent: all samples are equal"}
    harmless = ("silent", "empty", "shorter") if good else ()
    if damage := [error for error in errors if not error.startswith(harmless)]:
        return row | {"error": damage[0]}
    probabilities = np.mean([p.probabilities for p in good], axis=0)
    top = int(probabilities.argmax())
    names = [c["name"] for c in checkpoint["classes"]]
    longest = options.max_seconds(checkpoint["mel_config"])
    ignored = 0.0 if options.segments else max(0.0, good[0].duration - longest)
    row |= {"predicted_class": names[top], "predicted_code": checkpoint["classes"][top]["code"]}
    row |= {"confidence": f"{probabilities[top]:.6f}"}
    row |= {name: f"{p:.6f}" for name, p in zip(names, probabilities, strict=True)}
    row |= {"duration_s": f"{good[0].duration:.3f}", "ignored_s": f"{ignored:.3f}"}
    if "level" in checkpoint:
        levels = np.array([p.level for p in good])
        level = np.median(levels[are_loud(levels)]) - checkpoint["level"]["median"]
        row["level_db"] = f"{level:.2f}"
    if options.min_confidence is not None:
        row["uncertain"] = "yes" if probabilities[top] < options.min_confidence else "no"
    return row


def segment_row(prediction: WindowPrediction, checkpoint: dict, options: RunOptions) -> dict:
    """A window's row of segments.csv; a window without sound has no class."""
    start = prediction.window.start
    end = start + options.window
    if prediction.duration < end:
        end = prediction.duration
    row = {"file": prediction.window.path, "start_s": f"{start:.3f}", "end_s": f"{end:.3f}"}
    if prediction.error:
        return row
    names = [c["name"] for c in checkpoint["classes"]]
    top = int(prediction.probabilities.argmax())
    row |= {"predicted_class": names[top], "confidence": f"{prediction.probabilities[top]:.6f}"}
    return row | {name: f"{p:.6f}" for name, p in zip(names, prediction.probabilities, strict=True)}


# --------------------------------------------------------------------------------------
# Pictures


def picture_path(path: str) -> str:
    """Where a file's picture goes below --output_dir; no two files share one."""
    *folders, name = path.split("/")
    # No folder ends like a picture, or a.wav and a.wav.png/b.wav would be in each other's way.
    folders = [re.sub(r"(\.png_*)$", r"\1_", folder) for folder in folders]
    encoded = os.fsencode(name)
    if len(encoded) > MAX_NAME_BYTES - len(".png"):
        digest = hashlib.sha1(encoded).hexdigest()
        name = os.fsdecode(encoded[:200]) + f"-{digest}"
    return "/".join(["mel_spectrograms", *folders, f"{name}.png"])


@functools.cache
def clip_figure(names: tuple[str, ...]) -> tuple[Figure, Any, Any, Any, Any]:
    """The figure that every clip is drawn into: a new one costs most of the time."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2.4, 1))
    image = left.imshow(np.zeros((2, 2)), clim=DB_RANGE, **IMAGE_STYLE)
    figure.colorbar(image, ax=left, label="Level (dB)", extend="both")
    bars = right.barh(names, [0] * len(names), color=BLUE)
    left.set(xlabel="Time (s)", ylabel="Frequency (Hz)", facecolor="#CCCCCC")
    right.set(xlabel="Confidence (%)", xlim=(0, 100))
    right.invert_yaxis()
    return figure, left, right, image, bars


def draw_clip(
    path: Path, title: str, prediction: WindowPrediction, mel_config: dict, names: tuple[str, ...]
) -> None:
    """Spectrogram with axes in s and Hz, what was ignored in grey, and bars of confidence."""
    figure, left, right, image, bars = clip_figure(names)
    mel = prediction.mel
    probabilities = prediction.probabilities
    heard = mel.shape[1] * mel_config["hop_length"] / mel_config["sample_rate"]
    image.set(data=mel, extent=(0, heard, -0.5, len(mel) - 0.5))
    left.set_xlim(0, min(max(heard, prediction.duration), 1.2 * heard))
    mark_hertz(left, len(mel), mel_config)
    left.set_title(readable(title), parse_math=False, fontsize=9)
    top = int(probabilities.argmax())
    right.set_title(f"{names[top]}, {100 * probabilities[top]:.0f} %", fontsize=9)
    for bar, p in zip(bars, probabilities, strict=True):
        bar.set(width=100 * p, color=ORANGE if p == probabilities[top] else BLUE)
    save_figure(figure, path, dpi=130)
    figure.set_layout_engine("none")  # laid out once: every clip has the same places


def draw_timeline(
    path: Path,
    title: str,
    predictions: list[WindowPrediction],
    window: float,
    mel_config: dict,
    names: tuple[str, ...],
) -> None:
    """The spectrogram of a long recording above the probabilities of its windows over time."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    end = predictions[-1].window.start + window
    image = join_windows(predictions, window, end)
    extent = (0, end, -0.5, len(image) - 0.5)
    shown = above.imshow(image, clim=DB_RANGE, extent=extent, **IMAGE_STYLE)
    figure.colorbar(shown, ax=above, label="Level (dB)", extend="both")
    mark_hertz(above, len(image), mel_config)
    above.set(ylabel="Frequency (Hz)", xlim=(0, end))
    above.set_title(readable(title), parse_math=False, fontsize=9)
    middle = [p.window.start + window / 2 for p in predictions]
    shares = 100 * np.array([p.probabilities for p in predictions])
    size = 4 if len(middle) < 100 else 0
    for i, name in enumerate(names):
        marker = "os^vDXP*"[(i + i // 8) % 8]
        style = {"color": f"C{i}", "marker": marker, "markersize": size}
        below.plot(middle, shares[:, i], label=name, **style)
    below.set(xlabel="Time (s); a window stands at its middle", ylabel="Probability (%)")
    below.set_ylim(0, 100)
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=8)
    save_figure(figure, path, dpi=130)


def join_windows(predictions: list[WindowPrediction], window: float, end: float) -> np.ndarray:
    """The windows' log-mels side by side, (mel bands, 3000): NaN, blank, where there is none."""
    n_columns = 3000  # more than the picture has pixels
    good = [p for p in predictions if p.mel is not None]
    image = np.full((len(good[0].mel), n_columns), np.nan, np.float32)
    for p in good:
        first = min(round(p.window.start / end * n_columns), n_columns - 1)
        last = max(round((p.window.start + window) / end * n_columns), first + 1)
        source = np.linspace(0, p.mel.shape[1] - 1, min(last, n_columns) - first).astype(int)
        part = image[:, first:last]
        part[:] = np.fmax(part, p.mel[:, source])  # a window's first and last frame are too faint
    return image


def mark_hertz(axes: Any, n_mels: int, mel_config: dict) -> None:
    """Marks the mel bands of a vertical axis in Hz."""
    import librosa  # here, so that only what draws needs numba (see start_drawing)

    fmin, fmax = mel_config["fmin"], mel_config["fmax"]
    hertz = librosa.mel_frequencies(n_mels=n_mels + 2, fmin=fmin, fmax=fmax)[1:-1]
    marks = [f for f in (250, 500, 1000, 2000, 4000, 8000, 16000) if hertz[0] <= f <= hertz[-1]]
    axes.set_yticks(np.interp(marks, hertz, np.arange(n_mels)), marks)
    axes.set_ylim(-0.5, n_mels - 0.5)


def readable(name: str) -> str:
    """A name for a picture: bytes that are no UTF-8 as a question mark."""
    return os.fsencode(name).decode("utf-8", "replace")


def save_figure(figure: Figure, path: Path, dpi: int = 200) -> None:
    """Writes a figure as a PNG, atomically."""
    with warnings.catch_warnings(), atomic_write(path) as file:
        warnings.simplefilter("ignore")  # names may hold letters that the font lacks
        figure.savefig(file, format="png", dpi=dpi, pil_kwargs={"compress_level": 1})


def start_drawing() -> None:
    """Runs first in each drawing process."""
    os.environ["NUMBA_DISABLE_JIT"] = "1"  # its cache fails where no folder can be written
    matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=COLOURS)
    exit_with_parent()


@contextlib.contextmanager
def drawing_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that draw, started before the first thread is, so that forking is safe."""
    if not workers:
        yield None
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for main alone
    try:
        pool = ProcessPoolExecutor(workers, context, start_drawing)
        pool.submit(int).result()
    except (OSError, BrokenProcessPool) as error:
        raise UserError(
            f"Drawing processes could not be started ({error}): look at 'ulimit -u' and the space "
            "in /dev/shm, or run with fewer --workers."
        ) from error
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def submit_picture(
    pool: ProcessPoolExecutor,
    output_dir: Path,
    predictions: list[WindowPrediction],
    checkpoint: dict,
    options: RunOptions,
    note: str,
) -> Future[None]:
    """Starts drawing a file's picture; note: the end of its title, after the name."""
    path = predictions[0].window.path
    title = path + note
    picture = output_dir / picture_path(path)
    picture.parent.mkdir(parents=True, exist_ok=True)
    names = tuple(c["name"] for c in checkpoint["classes"])
    mel_config = checkpoint["mel_config"]
    if len(predictions) == 1:
        return pool.submit(draw_clip, picture, title, predictions[0], mel_config, names)
    window = options.window
    return pool.submit(draw_timeline, picture, title, predictions, window, mel_config, names)


# --------------------------------------------------------------------------------------
# Reports


def plot_confusion(
    path: Path, true: Iterable[str], predicted: Iterable[str], names: list[str], title: str
) -> None:
    """Confusion matrix as a picture: counts, and the row's percentages, which give the colour."""
    import seaborn  # here, because these two take a second to import
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(list(true), list(predicted), labels=names)
    totals = counts.sum(1, keepdims=True)
    percent = 100.0 * counts / totals.clip(min=1)
    text = [f"{n}\n{p:.0f} %" for n, p in zip(counts.flat, percent.flat, strict=True)]
    text = np.where(totals > 0, np.reshape(text, counts.shape), "\u2013")  # a dash: absent
    figure = Figure(figsize=(5.5, 4.8), layout="constrained")
    axes = figure.subplots()
    style = {"vmin": 0, "vmax": 100, "cmap": "cividis", "square": True, "annot_kws": {"size": 9}}
    ticks = {"xticklabels": names, "yticklabels": names, "cbar_kws": {"label": "% of true class"}}
    seaborn.heatmap(percent, annot=text, fmt="", ax=axes, **style, **ticks)
    axes.set(xlabel="Predicted emotion", ylabel="True emotion", title=title)
    axes.tick_params(axis="x", rotation=45)
    axes.tick_params(axis="y", rotation=0)
    save_figure(figure, path)


def plot_confidence(path: Path, good: pd.DataFrame, names: list[str]) -> None:
    """How sure the model was, by predicted class: every file a point; quartiles of five and more.

    good: a row a file, with predicted_class and percent.
    """
    import seaborn  # here, because it takes a second to import

    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    n_files = good.predicted_class.value_counts()
    shown = good.sample(min(len(good), 3000), random_state=0)
    columns = {"x": "predicted_class", "y": "percent", "order": names, "ax": axes}
    size = 2 if len(shown) > 200 else 4
    np.random.seed(0)  # noqa: NPY002  seaborn's jitter: the same picture for the same results
    seaborn.stripplot(shown, **columns, color=BLUE, size=size, alpha=0.5, jitter=0.3)
    percents = {name: good.percent[good.predicted_class == name] for name in names}
    many = {i: percents[name] for i, name in enumerate(names) if len(percents[name]) >= 5}
    if many:
        line = {"color": ORANGE, "linewidth": 1.5}
        styles = {f"{part}props": line for part in ("box", "median", "whisker", "cap")}
        axes.boxplot(
            list(many.values()), positions=list(many), widths=0.7, showfliers=False, **styles
        )
    axes.axhline(100 / len(names), color=GREY, linestyle="--", linewidth=1)
    axes.set(xlabel="Predicted emotion (number of files)", ylabel="Confidence (%)", ylim=(0, 101))
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_title("Confidence by predicted emotion (dashed: chance)")
    axes.set_xticks(range(len(names)), [f"{name}\n({n_files.get(name, 0)})" for name in names])
    save_figure(figure, path)


def write_summary(output_dir: Path, good: pd.DataFrame, names: list[str]) -> None:
    """summary.csv, on the screen too: count, percentage and mean confidence of each class."""
    rows = []
    for name in names:
        percent = good.percent[good.predicted_class == name]
        row = {"class": name, "count": len(percent)}
        row["percentage"] = f"{100 * len(percent) / len(good):.2f}"
        row["mean_confidence"] = f"{percent.mean() / 100:.4f}" if len(percent) else ""
        rows.append(row)
    write_csv(output_dir / "summary.csv", list(rows[0]), rows)
    print(tabulate(rows, headers="keys"))


def write_report(
    output_dir: Path, labelled: pd.DataFrame, names: list[str], speakers: set[str]
) -> None:
    """Accuracy, UAR, confusion matrix and report of the files with a known emotion."""
    from sklearn.metrics import classification_report  # here, because it takes a second to import

    true, predicted = labelled.true_class, labelled.predicted_class
    is_right = true == predicted
    accuracy = 100 * is_right.mean()
    recall = 100 * is_right.groupby(true).mean().mean()
    title = f"{count(len(labelled), 'file')} with a known emotion"
    figures = f"{title}: accuracy {accuracy:.1f} %, UAR {recall:.1f} %"
    if "speaker" not in labelled:  # of a label table; else the names' first field
        stems = labelled.file.map(lambda path: PurePosixPath(path).stem)
        labelled = labelled.assign(speaker=stems.str.split("_").str[0])
    is_known = labelled.speaker.map(lambda name: clean(name.strip()).casefold()).isin(speakers)
    if is_known.any():
        figures += f"\nNot a fair test: {is_known.sum():,} of them "
        figures += "by speakers that trained or validated this model."
    print(figures)
    occurring = [name for name in names if name in set(true)]
    report = classification_report(true, predicted, labels=occurring, zero_division=0, digits=3)
    write_text(output_dir / "classification_report.txt", f"{figures}\n\n{report}")
    plot_confusion(output_dir / "confusion_matrix.png", true, predicted, names, title)


def print_files(rows: list[dict]) -> None:
    """The answers, if they are few."""
    if len(rows) > MAX_ROWS_SHOWN:
        return
    shown = []
    for row in rows:
        confidence = f"{100 * float(row['confidence']):.1f} %" if row["confidence"] else ""
        shown.append([row["file"], row["predicted_class"], confidence, row["error"]])
    headers = ["file", "emotion", "confidence", "error"]
    print(tabulate(shown, headers=headers, disable_numparse=True), end="\n\n")


def find_notes(rows: list[dict], options: RunOptions, max_window: float) -> list[str]:
    """What was ignored, is uncertain or failed, a sentence each."""
    notes = []
    ignored = [float(row["ignored_s"]) for row in rows if float(row["ignored_s"] or 0) > 0]
    if ignored:
        verb = "is" if len(ignored) == 1 else "are"
        window = min(3.0, math.floor(100 * max_window) / 100)
        notes.append(
            f"{count(len(ignored), 'file')} {verb} longer than {options.max_width} frames: "
            f"{sum(ignored):,.1f} s are ignored (column ignored_s). --segments --window "
            f"{window:g} --step {window / 2:g} hears them all."
        )
    if options.min_confidence is not None:
        n_uncertain = sum(row["uncertain"] == "yes" for row in rows)
        verb = "is" if n_uncertain == 1 else "are"
        limit = f"confidence under {options.min_confidence:g}"
        notes.append(f"{count(n_uncertain, 'file')} {verb} uncertain: {limit}.")
    if n_failed := sum(bool(row["error"]) for row in rows):
        files = count(len(rows), "file")
        notes.append(f"{n_failed} of {files} could not be classified: the column `error` says why.")
    return notes


def report_results(
    output_dir: Path, rows: list[dict], checkpoint: dict, options: RunOptions
) -> list[str]:
    """Summary, pictures and, where true classes are known, figures; returns what to note."""
    names = [c["name"] for c in checkpoint["classes"]]
    good = pd.DataFrame([row for row in rows if not row["error"]])
    print_files(rows)
    if len(good):
        good["percent"] = 100 * good.confidence.astype(float)
        write_summary(output_dir, good, names)
        plot_confidence(output_dir / "confidence_distribution.png", good, names)
        labelled = good[good.true_class != ""]
        if len(labelled):
            write_report(output_dir, labelled, names, known_speakers(checkpoint))
    notes = find_notes(rows, options, options.max_seconds(checkpoint["mel_config"]))
    for note in notes:
        print(note)
    return notes


def write_page(
    output_dir: Path, folder: Path, rows: list[dict], checkpoint: dict, notes: list[str]
) -> None:
    """report.html: a row a file, mistakes first where labels are known, all on the disk."""
    names = [c["name"] for c in checkpoint["classes"]]
    n_labelled = sum(bool(row["true_class"] and row["predicted_class"]) for row in rows)
    n_right = n_labelled - sum(map(is_mistake, rows))
    summary = count(len(rows), "file")
    if n_labelled:
        summary += f", {n_right} of {n_labelled} labelled files right"
    mistakes_first = sorted(rows, key=is_mistake, reverse=True)
    options = "".join(f"<option>{html.escape(name)}</option>" for name in names)
    page = PAGE.substitute(
        title=html.escape(readable(str(output_dir.resolve().name))),
        summary=summary,
        notes="".join(f"<p class=note>{html.escape(note)}</p>" for note in notes if note),
        options=options,
        rows="\n".join(page_row(row, names, folder, output_dir) for row in mistakes_first),
    )
    with atomic_write(output_dir / "report.html") as file:
        file.write(page.encode("utf-8", "replace"))


def is_mistake(row: dict) -> bool:
    """Whether a file has a label and an answer, and they differ."""
    return bool(row["predicted_class"]) and row["true_class"] not in ("", row["predicted_class"])


def page_row(row: dict, names: list[str], folder: Path, output_dir: Path) -> str:
    """A file's row of report.html: names escaped, links percent-encoded."""
    try:
        recording = link(os.path.relpath(folder / row["file"], output_dir))
    except ValueError:  # Windows: on another drive
        recording = (folder / row["file"]).absolute().as_uri()
    suffix = PurePosixPath(row["file"]).suffix.lower()
    play = "data-play " if suffix in PLAYABLE_SUFFIXES and not row["error"] else ""
    name = html.escape(readable(row["file"]))
    predicted = html.escape(row["predicted_class"])
    true = html.escape(row["true_class"])
    heard = ""
    if float(row.get("ignored_s") or 0) > 0:
        duration = float(row["duration_s"])
        first = duration - float(row["ignored_s"])
        heard = f"<br><small>the first {first:.1f} of {duration:.1f} s were heard</small>"
    cells = [(name, f'<a {play}href="{recording}">{name}</a>{heard}')]  # (to sort by, to show)
    if row["error"]:
        cells += [("", ""), ("", html.escape(row["error"])), ("", ""), ("", "")]
    else:
        picture = link(picture_path(row["file"]))
        confidence = f"{100 * float(row['confidence']):.0f} %"
        answer = f"{predicted}<br><small>{confidence}</small>"
        note = "<br><small>uncertain</small>" if row.get("uncertain") == "yes" else ""
        bars = "".join(page_bar(n, row[n], n == row["predicted_class"]) for n in names)
        image = f'<a href="{picture}"><img loading="lazy" alt="spectrogram" src="{picture}"></a>'
        level = f"{float(row['level_db']):+.1f}" if row["level_db"] else ""
        cells += [("", image), (predicted, answer + note)]
        cells += [(row["confidence"], bars), (row["level_db"], level)]
    cells.append((true, true))
    tags = "".join(f'<td data-v="{value}">{text}</td>' for value, text in cells)
    mark = " class=wrong" if is_mistake(row) else ""
    return f'<tr data-class="{predicted or "failed"}"{mark}>{tags}</tr>'


def page_bar(name: str, probability: str, is_top: bool) -> str:
    """A class's probability as a bar of report.html."""
    percent = 100 * float(probability)
    style = f'class="bar{" top" if is_top else ""}" style="--p:{percent:.1f}%"'
    return f"<div {style}>{html.escape(name)}<span>{percent:.0f}</span></div>"


def link(path: str) -> str:
    """A relative path as a link, percent-encoded; bytes that are no UTF-8, too."""
    return urllib.parse.quote(os.fsencode(path.replace(os.sep, "/")))


def report_folder(
    args: argparse.Namespace,
    folder: Path,
    rows: list[dict],
    checkpoint: dict,
    options: RunOptions,
    embeddings: dict[str, np.ndarray],
    level_note: str,
) -> None:
    """What stands beside the table: summary, figures, embeddings, page."""
    notes = report_results(args.output_dir, rows, checkpoint, options)
    if args.embeddings:
        write_embeddings(args.output_dir, rows, embeddings)
    if args.visualize:
        notes = [f"Model: {args.model_path.name}.", level_note, *notes]
        write_page(args.output_dir, folder, rows, checkpoint, notes)


def print_closing(args: argparse.Namespace, table: Path, seconds: float) -> None:
    """Where the results are, and whether shards wait to be joined."""
    if not args.shard and (shards := find_shards(args.output_dir)):
        print(f"Note: {args.output_dir} holds {count(len(shards), 'shard')}: --resume joins them.")
    print(f"{seconds} s. Results: {table}")
    if args.visualize and not args.shard:
        print(f"To look and listen: {args.output_dir / 'report.html'}")


PAGE = string.Template(r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --bar: #56b4e988; --top: #e69f00aa; --line: #8886; }
body { font: 15px/1.35 system-ui, sans-serif; margin: 1rem; }
[hidden] { display: none !important; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .4rem; }
th, td { border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: Canvas; }
th button { font: inherit; font-weight: bold; background: none; border: 0; padding: 0; }
th button { cursor: pointer; color: inherit; }
th[aria-sort=ascending] button::after { content: " \25B2"; }
th[aria-sort=descending] button::after { content: " \25BC"; }
td:first-child { overflow-wrap: anywhere; min-width: 12rem; }
img { width: 20rem; max-width: 100%; aspect-ratio: auto 8 / 3; background: #fff; }
audio { display: block; width: 100%; min-width: 11rem; height: 2.2rem; margin-top: .3rem; }
.bar { display: flex; justify-content: space-between; gap: 1rem; font-size: 13px; }
.bar { padding: 0 .3rem; min-width: 9rem; }
.bar { background: linear-gradient(var(--bar), var(--bar)) no-repeat 0 / var(--p) 100%; }
.bar.top { background-image: linear-gradient(var(--top), var(--top)); }
.note { border-left: 4px solid var(--top); padding-left: .6rem; }
.wrong td:first-child { box-shadow: inset 4px 0 #d55e00; padding-left: .8rem; }
@media (max-width: 48rem) {
  thead { display: none; }
  table, tbody, tr, td { display: block; border: 0; padding: .15rem 0; }
  tr { border-bottom: 1px solid var(--line); padding: .6rem 0; }
  .wrong td:first-child { padding-left: .8rem; }
  img { width: 100%; }
  td[data-label]:not([data-label=""], :empty)::before {
    content: attr(data-label) ": "; color: GrayText; }
}
</style>
</head>
<body>
<h1>$title</h1>
<p>$summary. The model names an emotion for every file, also for one that holds none.</p>
$notes
<p><label>Show <select id="filter"><option value="">all</option>$options
<option value="wrong">mistakes</option><option value="failed">failed</option></select></label>
<label>Sort by <select id="sort"></select></label>
<span id="count" role="status"></span></p>
<table>
<thead><tr><th>Recording</th><th>Picture</th><th>Answer</th><th>Confidence (%)</th>
<th title="of the louder parts, above the training's median">Level (dB)</th>
<th>True</th></tr></thead>
<tbody>
$rows
</tbody>
</table>
<script>
const body = document.querySelector("tbody");
const rows = [...body.rows];
const heads = [...document.querySelectorAll("th")];
const filter = document.getElementById("filter");
const sort = document.getElementById("sort");

function compare(a, b) {
  const x = +a, y = +b;  // NaN for a name that begins with a digit
  if (a && b && !isNaN(x) && !isNaN(y)) return x - y;
  return a.localeCompare(b, undefined, { numeric: true });
}
function sortBy(column, descending) {
  const value = row => row.cells[column].dataset.v;
  const sorted = [...rows];
  if (column >= 0) sorted.sort((a, b) => compare(value(a), value(b)) * (descending ? -1 : 1));
  heads.forEach((head, i) => {
    if (i === column) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
  sort.value = column;
  body.append(...sorted);
}
function show() {
  const wanted = filter.value;
  let n = 0;
  for (const row of rows) {
    const fits = !wanted || row.dataset.class === wanted || row.classList.contains(wanted);
    row.hidden = !fits;
    n += fits;
  }
  document.getElementById("count").textContent = n + " shown";
}
sort.add(new Option("as listed", -1));
heads.forEach((head, i) => {
  if (i === 1) return;
  const button = document.createElement("button");
  button.textContent = head.textContent;
  head.replaceChildren(button);
  button.onclick = () => sortBy(i, head.getAttribute("aria-sort") === "ascending");
  sort.add(new Option(button.textContent, i));
  for (const row of rows) row.cells[i].dataset.label = i > 3 ? button.textContent : "";
});
sort.onchange = () => sortBy(+sort.value, sort.value == 3);
filter.onchange = show;
show();

// Players are made as their rows are scrolled to: thousands at once would stall the page.
const watcher = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    watcher.unobserve(target);
    const player = new Audio(target.href);
    player.controls = true;
    player.preload = "none";
    target.after(player);
  }
}, { rootMargin: "200px" });
document.querySelectorAll("a[data-play]").forEach(link => watcher.observe(link));
</script>
</body>
</html>
""")


# --------------------------------------------------------------------------------------
# Files


def count(n: int, noun: str) -> str:
    """A number and its noun: "1 file", "1,200 files"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def is_shown(character: str) -> bool:
    """Whether a character can stand on the screen: letters, spaces of all scripts, line ends."""
    is_space = character in "\n\r\t" or unicodedata.category(character) == "Zs"
    return is_space or character.isprintable()


class SteadyStream:
    """Standard output or error, of which a closed pipe ends the printing and not the run.

    Control characters, which file names may hold, are escaped.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        """Writes what can be shown."""
        shown = "".join(c if is_shown(c) else repr(c)[1:-1] for c in text)
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self.stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        """Flushes; a pipe that is closed becomes the null device, or Python would fail at exit."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except (AttributeError, OSError, ValueError):
            pass


@contextlib.contextmanager
def steady_streams() -> Iterator[None]:
    """Standard output and error as SteadyStreams; without an error stream, both are the output."""
    output = SteadyStream(sys.stdout)
    error = SteadyStream(sys.stderr or sys.stdout)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        try:
            yield
        finally:
            output.flush()
            error.flush()


def escape_formula(value: Any, column: str) -> Any:
    """A cell that a spreadsheet would run as a formula, made harmless; numbers stay.

    A path gets ./ before it, other text an apostrophe. Source: OWASP, "CSV Injection".
    """
    if not isinstance(value, str) or not re.match(r"'*[=+\-@\t\r]", value):
        return value
    try:
        float(value)
    except ValueError:
        return f"./{value}" if column == "file" else f"'{value}"
    return value


def csv_lines(columns: Sequence[str], rows: Iterable[dict]) -> bytes:
    """Rows as lines of CSV in UTF-8; names that are no UTF-8 keep their bytes."""
    text = io.StringIO(newline="")
    for row in rows:
        cells = [escape_formula(row.get(column, ""), column) for column in columns]
        # Python before 3.13 does not see by itself that a carriage return needs quotes.
        quoting = csv.QUOTE_ALL if any("\r" in str(cell) for cell in cells) else csv.QUOTE_MINIMAL
        csv.writer(text, lineterminator="\n", quoting=quoting).writerow(cells)
    return text.getvalue().encode("utf-8", "surrogateescape")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Writes a table as CSV, atomically."""
    header = dict(zip(columns, columns, strict=True))
    with atomic_write(path) as file:
        file.write(csv_lines(columns, [header, *rows]))


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file that takes the name `path` once it is written: whole, or not there.

    Until then its name cannot be guessed, so that nobody can plant a link there.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:  # a full disk's own names no file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files that killed runs left in a folder."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_lock(
    folder: Path, exclusive: bool = True
) -> Iterator[tuple[bool, Callable[[], object]]]:
    """Holds a folder until the block or the process ends.

    If `exclusive`, raises UserError where another process holds it; else waits until those that
    hold it share it. Yields whether this process has it alone, and a function that shares it.
    Source: flock(2). Windows lacks it: nothing is checked there.
    """
    try:
        import fcntl
    except ImportError:
        yield False, int
        return
    descriptor = os.open(folder, os.O_RDONLY)
    alone = False
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            if exclusive:
                raise UserError(
                    f"{folder} is in use: another run is writing there. Wait until it ends, or "
                    "name another folder."
                ) from None
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError as error:  # a file system without locks
            print(f"Note: {folder} cannot be locked ({error.strerror}): start one run at a time.")
        yield alone, functools.partial(fcntl.flock, descriptor, fcntl.LOCK_SH) if alone else int
    finally:
        os.close(descriptor)


def in_shard(path: str, shard: tuple[int, int] | None) -> bool:
    """Whether a file is this shard's, by the SHA-1 of its stem; shard: (I, N), None for all."""
    if shard is None:
        return True
    index, n_shards = shard
    digest = hashlib.sha1(os.fsencode(PurePosixPath(path).stem)).hexdigest()
    return int(digest, 16) % n_shards == index


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table, as write_csv or a spreadsheet writes it, up to the first NUL.

    A NUL is a power cut's mark; blank rows are a spreadsheet's. Raises OSError; an empty table
    has no rows.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for forever
        raise OSError(None, "not a regular file", str(path))
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read().split("\0")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="")
    try:
        filled = [row for row in reader if any(row.values())]
    except csv.Error as error:
        raise OSError(None, f"no readable CSV ({error})", str(path)) from error
    rows = [{k: v for k, v in row.items() if k is not None} for row in filled]
    return [
        {unescape_formula(k, ""): unescape_formula(v, k) for k, v in row.items()} for row in rows
    ]


def unescape_formula(cell: str, column: str) -> str:
    """What escape_formula was given."""
    if column == "file":
        return re.sub(r"^\./(?='*[=+\-@\t\r])", "", cell)
    return re.sub(r"^'(?='*[=+\-@\t\r])", "", cell)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, atomically."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def write_run_record(path: Path, packages: Iterable[str], details: dict) -> None:
    """Writes run.json: what it takes to repeat the run."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    record = {"command": sys.argv, "platform": platform.platform()} | details
    record["threads"] = torch.get_num_threads()  # the last digits depend on it
    record["versions"] = {"python": platform.python_version()} | versions
    write_text(path, json.dumps(record, indent=2, default=str) + "\n")


def read_checkpoint(path: Path) -> dict:
    """The dict that torch.save wrote; nothing in the file is executed. Raises UserError.

    torch.load checks no CRC, so that a flipped bit would load: the zip's own are checked first.
    Ours are stored, not compressed: what unpacks to more than the file is a bomb.
    """
    try:
        if not path.is_file():
            raise OSError(None, "no such file" if not path.exists() else "not a regular file")
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise ValueError("it is compressed")
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise ValueError("it unpacks to more than its size")
            if record := archive.testzip():
                raise ValueError(f"the checksum of its record {record} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from error
    except Exception as error:  # bytes from anywhere make the unpickler raise anything
        raise UserError(
            f"{path} is damaged, or no checkpoint to be read safely ({str(error)[:100]}): take "
            "the file that cremad_custom2.py wrote."
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is no checkpoint of cremad_custom2.py.")
    return checkpoint


def exit_with_parent() -> None:
    """In a worker process: ignores Ctrl-C, and ends when the main process is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it is not inherited

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def find_labels(
    paths: list[str], classes: list[dict[str, str]], table: Path | None
) -> dict[str, dict[str, str]]:
    """The labels of the files: {path: {"true_class": ..., further columns of --labels}}."""
    names = {c["code"]: c["name"] for c in classes}
    labels = {}
    if table:
        by_path = read_labels(table, names)
        labels = {path: by_path[nfc(path)] for path in paths if nfc(path) in by_path}
        if unknown := sorted(by_path.keys() - set(map(nfc, paths))):
            shown = ", ".join(unknown[:3]) + (" …" if len(unknown) > 3 else "")
            print(f"Note: {count(len(unknown), 'row')} of {table} match no file: {shown}")
        return labels
    for path in paths:
        fields = PurePosixPath(path).stem.split("_")
        if len(fields) > 2 and fields[2].upper() in names:
            labels[path] = {"true_class": names[fields[2].upper()]}
    if labels and 2 * len(labels) <= len(paths):  # of TESS's names `*_sad` alone looks like it
        print(
            f"Note: {len(labels)} of {count(len(paths), 'name')} look as if their third field told "
            "an emotion: too few, so none is taken as a label."
        )
        return {}
    return labels


def read_labels(table: Path, names: dict[str, str]) -> dict[str, dict[str, str]]:
    """The rows of --labels by path; emotions by code or name, any case; names by code.

    Emotions that are none of `names` give an empty true_class. Raises UserError.
    """
    try:
        rows = read_csv(table)
    except OSError as error:
        raise UserError(f"--labels {table}: {error.strerror}.") from error
    if not rows or not rows[0].keys() >= {"file", "emotion"}:
        found = ", ".join(rows[0]) if rows else "nothing"
        raise UserError(
            f"--labels {table} must be a CSV with the columns file,emotion; found: {found}"
        )
    by_word = {code.lower(): name for code, name in names.items()}
    by_word |= {name.lower(): name for name in names.values()}
    taken = {*RESULT_COLUMNS, *names.values()}
    labels = {}
    unknown = set()
    for row in rows:
        if not row["file"].strip():  # a spreadsheet's notes and totals
            continue
        word = row.pop("emotion").strip()
        true_class = by_word.get(word.lower(), "")
        if word and not true_class:
            unknown.add(word)
        path = nfc(posixpath.normpath(row.pop("file").replace("\\", "/")))
        if path in labels:
            raise UserError(f"--labels {table}: {path} is listed twice.")
        rest = {f"label_{k}" if k in taken else k: v for k, v in row.items()}
        labels[path] = {"true_class": true_class} | rest
    if unknown:
        known = ", ".join(names.values())
        print(f"Note: {table} has emotions that are none of {known}: {', '.join(sorted(unknown))}")
    return labels


def clean(text: str) -> str:
    """Text for a field of a file name: `_` and what a name cannot hold become `-`."""
    return re.sub(r'[_/\\:*?"<>|\x00-\x1f]', "-", unicodedata.normalize("NFC", text))[:45]


def nfc(text: str) -> str:
    """Text in Unicode's composed form: macOS writes an accent as a letter of its own."""
    return unicodedata.normalize("NFC", text)


class Results:
    """The tables of a run: rows go to .partial files as their batch is done, in `folder`."""

    def __init__(
        self,
        folder: Path,
        checkpoint: dict,
        options: RunOptions,
        model_sha256: str,
        visualize: bool,
    ) -> None:
        names = [c["name"] for c in checkpoint["classes"]]
        self.folder = folder
        self.columns: dict[str, list[str]] = {}
        if options.segments:  # first, so that a file's own row is written last
            self.columns["segments"] = [*SEGMENT_COLUMNS, *names]
        self.columns[RESULTS] = [*RESULT_COLUMNS[:4], *names, *RESULT_COLUMNS[4:]]
        self.note = {"model_sha256": model_sha256, "visualize": visualize}
        self.note["options"] = options._asdict()

    def path(self, kind: str, ending: str = "") -> Path:
        """Where a table, or with ".partial" its beginning, stands."""
        return self.folder / f"{kind}.csv{ending}"

    def resume(self, folder: Path, paths: set[str]) -> dict[str, list[dict[str, str]]]:
        """The rows of classified files that earlier runs of this model and options left there.

        An interrupted run's come first. Raises UserError if all that is there is of other options.
        """
        resumed: dict[str, list[dict[str, str]]] = {kind: [] for kind in self.columns}
        refused = ""
        is_ours = False
        for ending in (".partial", ""):
            rows = {row["file"]: row for row in read_rows(folder / f"{RESULTS}.csv{ending}")}
            changed = self.changes(folder / f"run.json{ending}")
            message = "; ".join(f"{name} was {text}" for name, text in changed.items())
            is_other = bool(changed.keys() - {"gain_db", "fill_db", "visualize"})
            is_ours = is_ours or not is_other  # also a run that was stopped before its first row
            if not rows:
                continue
            if is_other:
                refused = refused or f"{folder / RESULTS}.csv{ending}: {message}"
            elif changed:
                print(f"All are classified anew: {message}.")
            else:
                done = {path for path, row in rows.items() if row["predicted_class"]} & paths
                paths = paths - done
                resumed[RESULTS] += [rows[path] for path in sorted(done)]
                if "segments" in self.columns:
                    segments = read_rows(folder / f"segments.csv{ending}")
                    resumed["segments"] += [row for row in segments if row["file"] in done]
        if refused and not is_ours:
            raise UserError(
                f"--resume: another model or other options made {refused}. Give the same again, "
                "delete that table, or leave --resume out to start anew."
            )
        return resumed

    def changes(self, path: Path) -> dict[str, str]:
        """What differs from the model and options that a run.json tells: "OLD, now NEW" by name."""
        check_regular(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            before = {"model": found["model_sha256"], "visualize": found["visualize"]}
            before |= found["options"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {"run.json": "missing or unreadable"}
        now = {"model": self.note["model_sha256"]} | self.note["options"]
        if self.note["visualize"]:  # rows without pictures will not do
            now["visualize"] = True
        for name in ("gain_db", "fill_db"):
            both = (before.get(name), now[name])
            is_number = all(type(value) in (int, float) for value in both)
            if is_number and abs(both[0] - both[1]) <= 0.1:
                before[name] = now[name]
        differ = [name for name in now if before.get(name) != now[name]]
        return {name: f"{before.get(name)}, now {now[name]}" for name in differ}

    def begin(self, resumed: dict[str, list[dict[str, str]]]) -> None:
        """Begins the .partial files with the rows of --resume."""
        for folder in (self.folder, *self.folder.glob("mel_spectrograms/**/")):
            remove_leftovers(folder)
        if not resumed or self.changes(self.folder / "run.json.partial"):
            for kind in (RESULTS, "segments"):
                self.path(kind, ".partial").unlink(missing_ok=True)
        note = json.dumps(self.note, indent=2) + "\n"
        write_text(self.folder / "run.json.partial", note)
        for kind, columns in self.columns.items():
            write_csv(self.path(kind, ".partial"), columns, resumed.get(kind, []))

    def append(self, rows: dict[str, list[dict]]) -> None:
        """Adds rows to the .partial files: on disk as each batch is done."""
        for kind, columns in self.columns.items():
            path = self.path(kind, ".partial")
            flags = os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            try:
                with os.fdopen(os.open(path, flags), "ab") as file:
                    file.write(csv_lines(columns, rows.get(kind, [])))
            except OSError as error:  # a full disk's own names no file
                raise OSError(error.errno, error.strerror, str(path)) from error

    def publish(self, paths: list[str], labels: dict[str, dict[str, str]]) -> list[dict]:
        """Writes the final tables, sorted by path; returns the rows of the files.

        true_class and a label table's columns are filled in afresh.
        """
        order = {path: i for i, path in enumerate(paths)}
        published = {}
        for kind in self.columns:
            rows = read_rows(self.path(kind, ".partial"))
            published[kind] = sorted(rows, key=lambda row: order[row["file"]])
        unknown = {"true_class": ""} | {name: "" for label in labels.values() for name in label}
        for row in published[RESULTS]:
            row.update(unknown | labels.get(row["file"], {}))
        further = [name for name in unknown if name not in self.columns[RESULTS]]
        columns = self.columns | {RESULTS: [*self.columns[RESULTS], *further]}
        (self.folder / "run.json").unlink(missing_ok=True)  # no table stands beside another's note
        for kind in columns:
            write_csv(self.path(kind), columns[kind], published[kind])
        (self.folder / "run.json.partial").replace(self.folder / "run.json")
        for kind in self.columns:
            self.path(kind, ".partial").unlink()
        return published[RESULTS]


def check_regular(path: Path) -> None:
    """Raises UserError for a pipe or device, which would be waited for forever, or a folder."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file: delete it, or name another --output_dir.")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a table that may be an interrupted run's: a torn last line is dropped.

    What is no table of files has none. Raises UserError for what is no regular file.
    """
    check_regular(path)
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1))
        is_whole = file.read(1) == b"\n"
    rows = read_csv(path)
    rows = rows if is_whole else rows[:-1]
    return rows if rows and "file" in rows[0] else []


def shard_folder(output_dir: Path, shard: tuple[int, int] | None) -> Path:
    """Where a run's tables go: a shard's into a folder of their own, until --resume joins them."""
    return output_dir if shard is None else output_dir / "shard_{}_of_{}".format(*shard)


def find_shards(output_dir: Path) -> list[Path]:
    """The folders in which runs with --shard left their tables."""
    folders = sorted(output_dir.glob("shard_*_of_*"))
    return [path for path in folders if re.fullmatch(r"shard_\d+_of_\d+", path.name)]


def resume_all(
    results: Results, paths: list[str], args: argparse.Namespace
) -> dict[str, list[dict[str, str]]]:
    """The finished rows of earlier runs: of this folder and, unless it is a shard's, of shards."""
    wanted = set(paths)
    if args.visualize:  # a file without its picture is done again
        wanted = {path for path in paths if (args.output_dir / picture_path(path)).exists()}
    resumed = results.resume(results.folder, wanted)
    if args.shard:
        return resumed
    for folder in find_shards(args.output_dir):
        with folder_lock(folder):  # UserError if that shard is still at work
            left = wanted - {row["file"] for row in resumed[RESULTS]}
            for kind, rows in results.resume(folder, left).items():
                resumed[kind] += rows
    return resumed


def begin_results(
    results: Results, paths: list[str], closed: dict[str, str], args: argparse.Namespace
) -> set[str]:
    """Begins the tables with --resume's rows and the folders that cannot be entered.

    Returns the paths that have their row.
    """
    resumed = resume_all(results, paths, args) if args.resume else {}
    results.begin(resumed)
    closed_rows = [{"file": path, "error": closed[path]} for path in paths if path in closed]
    results.append({RESULTS: closed_rows})
    return {row["file"] for row in [*resumed.get(RESULTS, []), *closed_rows]}


def classify_all(
    files: Iterable[list[WindowPrediction]],
    results: Results,
    checkpoint: dict,
    options: RunOptions,
    args: argparse.Namespace,
    pool: ProcessPoolExecutor | None,
) -> dict[str, np.ndarray]:
    """Brings rows and pictures to disk as each batch is done; returns each file's embedding."""
    embeddings = {}
    rows: dict[str, list[dict]] = {kind: [] for kind in results.columns}
    pictures: list[Future[None]] = []
    for predictions in files:
        row = result_row(predictions, checkpoint, options)
        rows[RESULTS].append(row)
        is_good = not row.get("error")
        if args.embeddings and is_good:
            good = [p.embedding for p in predictions if not p.error]
            embeddings[row["file"]] = np.mean(good, axis=0)
        if options.segments and is_good:
            rows["segments"] += [segment_row(p, checkpoint, options) for p in predictions]
        if any(p.mel is not None for p in predictions):
            note = " (uncertain)" if row.get("uncertain") == "yes" else ""
            picture = submit_picture(pool, args.output_dir, predictions, checkpoint, options, note)
            pictures.append(picture)
        if max(map(len, rows.values())) >= BATCHES_AHEAD * args.batch_size:
            write_batch(results, rows, pictures)
            rows = {kind: [] for kind in results.columns}
            pictures = []
    write_batch(results, rows, pictures)
    if not os.path.lexists(args.input_dir):
        raise OSError(None, "--input_dir disappeared during the run", str(args.input_dir))
    return embeddings


def write_batch(
    results: Results, rows: dict[str, list[dict]], pictures: list[Future[None]]
) -> None:
    """Writes rows once their pictures are drawn."""
    for picture in pictures:
        picture.result()
    results.append(rows)


def write_embeddings(output_dir: Path, rows: list[dict], embeddings: dict[str, np.ndarray]) -> None:
    """embeddings.npy: float32 (rows of the table, features), NaN where a row failed."""
    n_features = len(next(iter(embeddings.values()), []))
    empty = np.full(n_features, np.nan, np.float32)
    table = np.stack([embeddings.get(row["file"], empty) for row in rows])
    with atomic_write(output_dir / "embeddings.npy") as file:
        np.save(file, table.astype(np.float32))


def remove_earlier(
    args: argparse.Namespace, earlier: set[str], resumed: set[str], rows: list[dict]
) -> None:
    """Deletes what earlier runs left in --output_dir that is not of the new table.

    earlier: files that may have a picture; resumed: those that were not classified again.
    """
    names = ["summary.csv", "confidence_distribution.png", "confusion_matrix.png"]
    names += ["classification_report.txt", "report.html", "embeddings.npy"]
    if not args.segments:
        names.append("segments.csv")
    for name in names:
        (args.output_dir / name).unlink(missing_ok=True)
    answered = {row["file"] for row in rows if row["predicted_class"]}
    pictured = answered if args.visualize else answered & resumed
    for path in earlier - pictured:
        (args.output_dir / picture_path(path)).unlink(missing_ok=True)
    if args.resume:
        remove_shards(args.output_dir)


def remove_shards(output_dir: Path) -> None:
    """Deletes the tables of the shards that a run with --resume has joined."""
    for folder in find_shards(output_dir):
        for name in (f"{RESULTS}.csv", "segments.csv", "run.json"):
            (folder / name).unlink(missing_ok=True)
            (folder / f"{name}.partial").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a folder that holds anything else stays
            folder.rmdir()


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_output_dir(output_dir: Path) -> None:
    """Raises UserError if a training is kept there: its pictures and run.json would be lost."""
    for name in ("best_model.pth", "last_checkpoint.pth"):
        if (output_dir / name).exists():
            raise UserError(
                f"--output_dir {output_dir} holds a training ({name}): name another folder."
            )


# --------------------------------------------------------------------------------------
# Main


def parse_shard(text: str) -> tuple[int, int]:
    """I/N of --shard, as a pair."""
    index, _, n_shards = text.partition("/")
    if not (index.isdigit() and n_shards.isdigit() and int(index) < int(n_shards)):
        raise argparse.ArgumentTypeError(f"{text}: must be I/N, I from 0 to N - 1")
    return int(index), int(n_shards)


def usable_cores() -> int:
    """Cores that this process may use, by its affinity and its container's quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # cgroup v2: "max", or a quota and its period
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked; exits with status 2 if it is wrong."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--input_dir", type=Path, required=True, help="folder of sound files, or one file")
    model_help = "best_model.pth of cremad_custom2.py (tests/pretrained/crema_d.pth)"
    add("--model_path", type=Path, default=DEFAULT_MODEL, help=model_help)
    add("--output_dir", type=Path, required=True, help="folder for the results")
    add("--max_width", type=int, help="frames; longer clips are cut (the checkpoint's, often 191)")
    add("--cpu", action="store_true", help="do not use the GPU")
    add("--visualize", action="store_true", help="report.html, with a picture for each file")
    add("--segments", action="store_true", help="classify longer files in windows, not cut")
    add("--window", type=float, default=3.0, help="--segments: length of a window, s (3)")
    add("--step", type=float, default=1.5, help="--segments: s between their starts (1.5)")
    add("--labels", type=Path, help="CSV file,emotion,...: the true emotions, instead of names")
    adapt_help = "level and noise to the training's: on, off, or auto, from 20 files on (auto)"
    add("--adapt", choices=("auto", "on", "off"), default="auto", help=adapt_help)
    add("--embeddings", action="store_true", help="embeddings.npy: what the model's head reads")
    add("--min_confidence", type=float, metavar="P", help="0 to 1: below it, `uncertain` is yes")
    add("--shard", type=parse_shard, metavar="I/N", help="do the Ith of N parts, I from 0")
    add("--batch_size", type=int, default=64, help="files classified together (64)")
    add("--workers", type=int, default=usable_cores(), help="to read and to draw (all cores)")
    add("--resume", action="store_true", help="keep earlier runs' and shards' rows, do the rest")
    add("--strict", action="store_true", help="exit status 1 if any file failed")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with status 2 for values out of range and options that exclude each other."""
    for name in ("max_width", "batch_size", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}: must be at least 1")
    for name in ("window", "step"):
        if not 0.1 <= getattr(args, name) <= 3600:
            parser.error(f"--{name} is {getattr(args, name)}: must be 0.1 to 3600 seconds")
    if args.min_confidence is not None and not 0 <= args.min_confidence <= 1:
        parser.error(f"--min_confidence is {args.min_confidence}: must be 0 to 1")
    if args.model_path == DEFAULT_MODEL and not DEFAULT_MODEL.is_file():
        parser.error(f"--model_path is needed: there is no {DEFAULT_MODEL}")
    if args.embeddings and (args.shard or args.resume):
        parser.error("--embeddings needs all files in one run: leave out --shard and --resume")
    if not args.segments and (args.window, args.step) != (3.0, 1.5):
        parser.error("--window and --step are for --segments: give that too")
    if args.step > args.window:
        parser.error(
            f"--step {args.step:g} is longer than --window {args.window:g}, which would leave "
            f"gaps: give --step, at most {args.window:g}"
        )


def fail(message: str, status: int = 1) -> int:
    """Tells why the run ends; returns the exit status."""
    print(message, file=sys.stderr)
    return status


def classify_folder(args: argparse.Namespace) -> int:
    """Loads the model, classifies, draws, sums up; returns the exit status."""
    started = time.perf_counter()
    folder, found, closed = find_input(args.input_dir)
    n_drawing = min(args.workers, len(found), MAX_PROCESSES) if args.visualize else 0
    with drawing_pool(n_drawing) as pool:
        device = gpu_or_cpu(args.cpu)
        model, checkpoint = load_model(args.model_path, device)
        options = run_options(args, checkpoint)
        check_output_dir(args.output_dir)
        labels = find_labels(found, checkpoint["classes"], args.labels)
        paths = sorted(path for path in [*found, *closed] if in_shard(path, args.shard))
        n_files = count(len(paths), "file")
        print(f"{args.model_path}: epoch {checkpoint.get('epoch', '?')}, on {device}. {n_files}.")
        options, level_note = adapt_to_training(found, folder, checkpoint, options, args)
        if level_note:
            print(level_note)
        tables = shard_folder(args.output_dir, args.shard)
        tables.mkdir(parents=True, exist_ok=True)
        with folder_lock(tables):
            digest = hash_file(args.model_path)
            results = Results(tables, checkpoint, options, digest, args.visualize)
            tables_before = [results.path(RESULTS), results.path(RESULTS, ".partial")]
            earlier = {row["file"] for path in tables_before for row in read_rows(path)}
            done = begin_results(results, paths, closed, args)
            todo = [path for path in paths if path not in done]
            files = classify_files(todo, folder, model, checkpoint, options, args)
            embeddings = classify_all(files, results, checkpoint, options, args, pool)
            rows = results.publish(paths, labels)
            if not args.shard:
                remove_earlier(args, earlier | set(paths), done, rows)
                report_folder(args, folder, rows, checkpoint, options, embeddings, level_note)
            seconds = round(time.perf_counter() - started, 1)
            details = results.note | {"device": str(device), "seconds": seconds}
            write_run_record(tables / "run.json", PACKAGES, details)
    print_closing(args, results.path(RESULTS), seconds)
    failed = [row for row in rows if row["error"]]
    if rows and len(failed) == len(rows):
        raise UserError(f"No file could be classified. The first error: {failed[0]['error']}")
    return 1 if args.strict and failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, and tells errors as sentences; returns the exit status."""
    with steady_streams():
        args = parse_args(argv)
        # oneDNN keeps memory for every shape that it has met, 1,024 by default: gigabytes.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
        torch.backends.cudnn.allow_tf32 = False  # one answer on CPU and GPU
        again = "run again" if args.embeddings else "run again with --resume"
        try:
            # Threads read: numpy's own, beside them and torch's, would take a quarter of the speed.
            numpy_blas = threadpoolctl.ThreadpoolController().select(prefix="libscipy_openblas")
            # pyarrow, where it is installed, refuses names that are no UTF-8.
            with numpy_blas.limit(limits=1), pd.option_context("mode.string_storage", "python"):
                return classify_folder(args)
        except UserError as error:
            return fail(str(error))
        except torch.OutOfMemoryError:
            return fail(f"The GPU's memory is full: {again} and a lower --batch_size, or --cpu.")
        except BrokenProcessPool:
            why = "A drawing process was killed, most often because memory ran out"
            return fail(f"{why}: {again} and fewer --workers.")
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
                raise
            remedy = f"{again} and a lower --batch_size, or start anew with a lower --max_width"
            return fail(f"Memory is full: {remedy}.")
        except OSError as error:
            what = f"{error.filename or 'A file'}: {error.strerror or error}"
            return fail(f"{what}. Fix this and {again}.")
        except KeyboardInterrupt:
            return fail(f"\nStopped. To go on, {again}.", 130)


if __name__ == "__main__":
    sys.exit(main())
