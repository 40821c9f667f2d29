"""CREMA-D audio to log-mel spectrograms (.npy), with augmented copies to train on.

    python mel_generator.py --input_dir AudioWAV --output_dir mel_spectrograms
    python mel_generator.py --input_dir AudioWAV --output_dir mel_original --no_augment
    python mel_generator.py --input_dir AudioWAV --output_dir mel_all --n_augmentations 8

Reads every sound file below --input_dir whose name's third field is an emotion
(1001_DFA_ANG_XX.wav: actor 1001, ANG), or that a table names (--labels). Writes, in --output_dir:

    EMO/STEM_VARIANT.npy   float32 (mel bands, frames): log power in dB at absolute level
    mel_config.json        every setting that training and inference must repeat
    skipped.csv            file, reason: each file that has no spectrogram, and why

A second run does what is missing. Exit status: 0 finished, 1 had to stop or nothing could be
done (--strict: or a file was skipped), 2 wrong arguments, 130 Ctrl-C.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
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
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np
import soundfile
import soxr
from tabulate import tabulate
from tqdm import tqdm

# --------------------------------------------------------------------------------------
# Constants (the mel settings are options: see --help)

# fmt: off
EMOTIONS = {"ANG": "Angry", "DIS": "Disgust", "FEA": "Fear",
            "HAP": "Happy", "NEU": "Neutral", "SAD": "Sad"}
# fmt: on
VARIANTS = {  # name: (kind, amount)
    "time_shift_pos": ("shift", 0.1),  # fraction of the clip, later
    "time_shift_neg": ("shift", -0.1),
    "pitch_up": ("pitch", 2.0),  # semitones
    "pitch_down": ("pitch", -2.0),
    "stretch_fast": ("stretch", 1.2),  # rate: above 1 is faster and shorter
    "stretch_slow": ("stretch", 0.8),
    "noise_low": ("noise", 0.005),  # standard deviation, full scale = 1
    "noise_medium": ("noise", 0.01),
}
VOCODER_FFT = 2048  # librosa.effects' own, whatever the mel settings
VOCODER_HOP = 512
# fmt: off
SOUNDFILE_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".aifc", ".au",
                      ".caf", ".w64", ".rf64")
FFMPEG_SUFFIXES = (".m4a", ".mp4", ".m4b", ".webm", ".mkv", ".mov", ".wma", ".aac", ".amr", ".3gp")
# fmt: on
MAX_DECODED = 2**27  # samples of all channels that are decoded at once: 512 MB
CORPUS_CLIPS = 7442  # the whole of CREMA-D
CORPUS_ACTORS = 91
MAX_NAME_BYTES = 255  # of a file name, on every usual file system
MAX_PROCESSES = 61 if os.name == "nt" else 10_000  # Windows waits for no more
WORKER_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # each worker has a core to itself
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "67108864",  # glibc keeps freed memory: page faults cost more than
    "MALLOC_TRIM_THRESHOLD_": "134217728",  # the arithmetic
}


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
# Augmentation


def random_generator(*key: str | int) -> np.random.Generator:
    """A generator of random numbers that depends on the key alone, not on order or process."""
    text = "\0".join(str(part) for part in key)
    digest = hashlib.sha256(os.fsencode(text)).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def choose_variants(seed: int, stem: str, n_augmentations: int) -> list[str]:
    """The clip's variants: the original, and n of the augmentations (n hold those of n - 1)."""
    order = random_generator(seed, stem).permutation(list(VARIANTS))
    return ["original", *order[:n_augmentations].tolist()]


def shift(samples: np.ndarray, fraction: float) -> np.ndarray:
    """Moves a clip by a fraction of its length, later if positive; silence fills the gap."""
    n = int(len(samples) * fraction)
    return np.pad(samples, abs(n))[abs(n) - n :][: len(samples)]


def istft(spectrum: np.ndarray, length: int) -> np.ndarray:
    """Samples (length,) of a spectrum (frames, bins) at the vocoder's sizes, as librosa.istft."""
    overlap = VOCODER_FFT // VOCODER_HOP
    window = hann(VOCODER_FFT).reshape(overlap, VOCODER_HOP)
    frames = np.fft.irfft(spectrum).reshape(-1, overlap, VOCODER_HOP) * window
    n_hops = len(frames) + overlap - 1
    samples = np.zeros((n_hops, VOCODER_HOP), np.float32)
    weight = np.zeros((n_hops, VOCODER_HOP), np.float32)
    for i in range(overlap):
        samples[i : i + len(frames)] += frames[:, i]
        weight[i : i + len(frames)] += window[i] ** 2
    samples /= np.maximum(weight, np.finfo(np.float32).tiny)
    centred = samples.ravel()[VOCODER_FFT // 2 :][:length]
    return np.pad(centred, (0, length - len(centred)))


def stretch(samples: np.ndarray, rate: float) -> np.ndarray:
    """Changes tempo, not pitch: librosa.effects.time_stretch's phase vocoder, without its angles.

    Source: Flanagan and Golden, "Phase Vocoder", Bell System Technical Journal 45(9), 1966.
    Accumulating wrapped phase differences equals multiplying the unit phasors' ratios
    U[t + 1] conj(U[t]), because the expected phase advance cancels modulo 2 pi.
    """
    spectrum = np.concatenate(list(stft_blocks(samples, VOCODER_FFT, VOCODER_HOP)))
    spectrum = np.pad(spectrum, ((0, 2), (0, 0)))  # (frames + 2, bins)
    magnitude = np.abs(spectrum)
    unit = np.divide(spectrum, magnitude, out=np.ones_like(spectrum), where=magnitude > 0)
    steps = np.arange(0, len(spectrum) - 2, rate)
    start = steps.astype(int)
    fraction = (steps % 1.0).astype(np.float32)[:, None]
    advance = unit[1:] * unit[:-1].conj()
    phasor = np.vstack([unit[:1], advance[start[:-1]]])
    for previous, current in itertools.pairwise(phasor):  # ten times as fast as cumprod(axis=0)
        current *= previous
    phasor *= magnitude[start] + fraction * np.diff(magnitude, axis=0)[start]
    return istft(phasor, round(len(samples) / rate))


def shift_pitch(samples: np.ndarray, semitones: float) -> np.ndarray:
    """Changes pitch, not length: stretched, then resampled, as librosa.effects.pitch_shift."""
    rate = 2.0 ** (-semitones / 12)
    shifted = soxr.resample(stretch(samples, rate), 1 / rate, 1.0)
    missing = max(0, len(samples) - len(shifted))
    return np.pad(shifted, (0, missing))[: len(samples)]


def augment(samples: np.ndarray, variant: str, seed: int, stem: str) -> np.ndarray:
    """One variant of a clip, float32 (samples,); the noise depends on seed and stem alone."""
    if variant == "original":
        return samples
    kind, amount = VARIANTS[variant]
    if kind == "noise":
        random = random_generator(seed, stem, variant)
        return samples + amount * random.standard_normal(len(samples), dtype=np.float32)
    functions = {"shift": shift, "pitch": shift_pitch, "stretch": stretch}
    return functions[kind](samples, amount)


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


class LabelError(Exception):
    """Why the emotion of a file is not known, in words for the user."""


class Clip(NamedTuple):
    """A sound file with a known emotion."""

    path: str  # relative to --input_dir, "/" between
    stem: str  # of its spectrograms' names
    emotion: str  # a key of EMOTIONS


def find_clips(input_dir: Path, table: Path | None) -> tuple[list[Clip], dict[str, str]]:
    """The sound files with a known emotion, and the paths of the others with the reason."""
    if not input_dir.is_dir():
        raise UserError(f"--input_dir {input_dir} is no folder: name the one with the sound files.")
    paths, skipped, n_ignored = find_audio(input_dir)
    if not paths and not skipped:
        suffixes = " ".join(SOUNDFILE_SUFFIXES + FFMPEG_SUFFIXES)
        raise UserError(
            f"--input_dir {input_dir} holds no sound file ({suffixes}), nor does any folder below."
        )
    if n_ignored:
        print(f"Ignored {count(n_ignored, 'file')} named ._*: macOS's notes, not sound.")
    labels = read_label_table(table) if table else None
    max_stem = MAX_NAME_BYTES - max(len(f"_{variant}.npy") for variant in VARIANTS)
    clips: dict[str, Clip] = {}  # by stem
    for path in paths:
        try:
            clip = clip_by_name(path) if labels is None else clip_by_table(path, labels)
        except LabelError as error:
            skipped[path] = str(error)
            continue
        if clip.stem in clips:
            skipped[path] = f"same stem as another file: {clips[clip.stem].path}"
        elif len(os.fsencode(clip.stem)) > max_stem:
            skipped[path] = f"name too long: at most {max_stem} bytes before the suffix"
        else:
            clips[clip.stem] = clip
    return list(clips.values()), skipped


def clip_by_name(path: str) -> Clip:
    """A clip with the emotion that its name's third field tells; raises LabelError."""
    stem = PurePosixPath(path).stem
    fields = stem.upper().split("_")
    if len(fields) < 3 or fields[2] not in EMOTIONS:
        raise LabelError(f"no emotion in the name: its third field is none of {' '.join(EMOTIONS)}")
    return Clip(path, stem, fields[2])


def clip_by_table(path: str, labels: dict[str, dict[str, str]]) -> Clip:
    """A clip with the emotion of --labels and the stem SPEAKER_NAME-HASH_EMO; raises LabelError.

    HASH tells files of one name in different folders apart; `_` would end a field.
    """
    composed = unicodedata.normalize("NFC", path)
    row = labels.get(composed)
    if row is None:
        raise LabelError("not in --labels")
    word = row["emotion"].strip()
    by_word = {name.lower(): code for code, name in EMOTIONS.items()}
    emotion = by_word.get(word.lower(), word.upper())
    if emotion not in EMOTIONS:
        raise LabelError(f"other emotion: {word!r} is none of {' '.join(EMOTIONS)}")
    speaker = clean(row.get("speaker", "").strip()) or "unknown"
    digest = hashlib.sha1(os.fsencode(composed)).hexdigest()[:8]
    end = f"-{digest}_{emotion}"
    room = 200 - len(os.fsencode(f"{speaker}_{end}"))
    name = os.fsencode(clean(PurePosixPath(path).stem))[: max(room, 0)].decode("utf-8", "ignore")
    return Clip(path, f"{speaker}_{name}{end}", emotion)


def clean(text: str) -> str:
    """Text for a field of a file name: `_` and what a name cannot hold become `-`."""
    return re.sub(r'[_/\\:*?"<>|\x00-\x1f]', "-", unicodedata.normalize("NFC", text))[:45]


def read_label_table(table: Path) -> dict[str, dict[str, str]]:
    """The rows of --labels by path; raises UserError."""
    try:
        rows = read_csv(table)
    except OSError as error:
        raise UserError(f"--labels {table}: {error.strerror}.") from error
    if not rows or not rows[0].keys() >= {"file", "emotion"}:
        found = ", ".join(rows[0]) if rows else "nothing"
        raise UserError(
            f"--labels {table} must be a CSV with the columns file,emotion; found: {found}"
        )
    rows = [row for row in rows if row["file"].strip()]  # spreadsheets hold notes and totals
    if not rows:
        raise UserError(f"--labels {table} names no file.")
    paths = [posixpath.normpath(row["file"].replace("\\", "/")) for row in rows]
    paths = [unicodedata.normalize("NFC", path) for path in paths]
    [(path, n)] = Counter(paths).most_common(1)
    if n > 1:
        raise UserError(f"--labels {table}: {path} is listed {n} times.")
    return dict(zip(paths, rows, strict=True))


def mel_settings(args: argparse.Namespace) -> dict:
    """The six mel settings: what log_mel takes besides the samples."""
    names = ("sample_rate", "n_fft", "hop_length", "n_mels", "fmin", "fmax")
    return {name: getattr(args, name) for name in names}


def make_config(args: argparse.Namespace) -> dict:
    """mel_config.json: mel settings, augmentation, and what made them."""
    packages = ("numpy", "soundfile", "soxr")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return mel_settings(args) | {
        "seed": args.seed,
        "n_augmentations": 0 if args.no_augment else args.n_augmentations,
        "augmentation": {name: list(variant) for name, variant in VARIANTS.items()},
        "versions": {"python": platform.python_version()} | versions,
        "command": sys.argv,
    }


def check_or_write_config(output_dir: Path, config: dict) -> None:
    """Writes mel_config.json; raises UserError if spectrograms there have different settings."""
    path = output_dir / "mel_config.json"
    if not path.exists():
        if spectrogram := next(iter(list_spectrograms(output_dir)), None):
            raise UserError(
                f"{output_dir} holds spectrograms ({spectrogram}) but no mel_config.json to tell "
                "their settings: name another --output_dir, or delete them."
            )
        write_config(output_dir, config)
        return
    try:
        if not path.is_file():
            raise ValueError("not a regular file")
        found = json.loads(path.read_text(encoding="utf-8"))
        compared = config.keys() - {"versions", "command"}
        changed = [
            f"{name} is {found[name]}, now {config[name]}"
            for name in sorted(compared)
            if found[name] != config[name]
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error)[:60]
        raise UserError(f"{path} cannot be read ({reason}): --overwrite starts anew.") from error
    if changed:
        raise UserError(
            f"{output_dir} holds spectrograms with different settings ({'; '.join(changed)}): name "
            "another --output_dir, or start this one anew with --overwrite."
        )


def write_config(output_dir: Path, config: dict) -> None:
    """Writes mel_config.json."""
    with atomic_write(output_dir / "mel_config.json") as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())


def split_name(spectrogram: str) -> tuple[str, str]:
    """Stem and variant of a spectrogram's name; ("", "") of a name that is none of ours."""
    for variant in ("original", *VARIANTS):
        if spectrogram.endswith(f"_{variant}.npy"):
            return spectrogram.removesuffix(f"_{variant}.npy"), variant
    return "", ""


def remove_spectrograms(output_dir: Path) -> None:
    """Deletes what earlier runs wrote, and nothing else; mel_config.json last."""
    for path in list_spectrograms(output_dir):
        (output_dir / path).unlink()
    for path in output_dir.glob("skipped*.csv"):
        if re.fullmatch(r"skipped(\.\d+-of-\d+)?\.csv", path.name):
            path.unlink()
    (output_dir / "mel_config.json").unlink()


def list_spectrograms(output_dir: Path) -> dict[str, int]:
    """The spectrograms in the folder: path below it, and date in ns."""
    dates = {}
    for code in EMOTIONS:
        for entry in os.scandir(output_dir / code):
            if any(split_name(entry.name)):
                with contextlib.suppress(FileNotFoundError):  # a dangling link
                    dates[f"{code}/{entry.name}"] = entry.stat().st_mtime_ns
    return dates


class Task(NamedTuple):
    """A clip, which of its variants to make, and its file's date (ns), which they get."""

    clip: Clip
    variants: list[str]
    date: int | None


def is_same_date(found: int | None, date: int | None) -> bool:
    """Whether a spectrogram's date (ns) is the sound file's, as fine as a file system keeps it."""
    if found is None or date is None:
        return False
    is_coarse = found % 10**7 == 0  # FAT and exFAT keep 2 s; NTFS and SMB 100 ns
    return abs(found - date) <= (2 * 10**9 if is_coarse else 1000)


def find_tasks(clips: list[Clip], config: dict, args: argparse.Namespace) -> list[Task]:
    """The variants without a spectrogram, or with one of a file of another date, by clip."""
    dates = list_spectrograms(args.output_dir)
    tasks = []
    for clip in clips:
        date = None
        with contextlib.suppress(OSError):  # reading it will tell
            date = (args.input_dir / clip.path).stat().st_mtime_ns
        variants = choose_variants(config["seed"], clip.stem, config["n_augmentations"])
        names = {v: f"{clip.emotion}/{clip.stem}_{v}.npy" for v in variants}
        missing = [v for v in variants if not is_same_date(dates.get(names[v]), date)]
        if missing:
            tasks.append(Task(clip, missing, date))
    return tasks


def process_clip(task: Task, args: argparse.Namespace) -> str | None:
    """Writes the spectrograms of a task; returns why the clip is skipped, or None."""
    clip = task.clip
    path = args.input_dir / clip.path
    try:
        samples, _ = load_audio(
            path, args.sample_rate, args.hop_length, max_duration=args.max_duration
        )
        for variant in task.variants:
            augmented = augment(samples, variant, args.seed, clip.stem)
            output = args.output_dir / clip.emotion / f"{clip.stem}_{variant}.npy"
            npy = io.BytesIO()  # numpy tells a full disk in words of its own
            np.save(npy, log_mel(augmented, **mel_settings(args)))
            with atomic_write(output) as file:
                file.write(npy.getbuffer())
            if task.date is not None:
                with contextlib.suppress(OSError):  # a share may refuse: the next run repeats it
                    os.utime(output, ns=(task.date, task.date))
    except AudioError as error:
        return str(error)
    except MemoryError:
        return "too long for this machine's memory"
    return None


def process_clips(tasks: list[Task], args: argparse.Namespace) -> list[str | None]:
    """process_clip for a few tasks: one by one they would cost a tenth of the time to hand over."""
    return [process_clip(task, args) for task in tasks]


def exit_with_parent() -> None:
    """In a worker process: ignores Ctrl-C, and ends when the main process is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it is not inherited

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def again(args: argparse.Namespace) -> str:
    """How to go on after a stop, in words: --overwrite would delete what was made."""
    return "run again without --overwrite" if args.overwrite else "run again"


def start_pool(n_workers: int) -> ProcessPoolExecutor:
    """Worker processes that ignore Ctrl-C and have WORKER_ENVIRONMENT."""
    environment = dict(os.environ)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(WORKER_ENVIRONMENT)
    try:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(n_workers, context, exit_with_parent)
        for _ in range(n_workers):
            pool.submit(int)
    except OSError as error:
        raise UserError(
            f"Worker processes could not be started ({error.strerror}): look at 'ulimit -u' and "
            "the space in /dev/shm, or run with fewer --workers."
        ) from error
    finally:
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGINT, handler)
    return pool


def run_in_workers(
    tasks: list[Task], args: argparse.Namespace
) -> Iterator[tuple[Task, str | None]]:
    """Runs process_clips in worker processes; yields each task with its reason, as it is done."""
    n_workers = min(args.workers, len(tasks), MAX_PROCESSES)
    queue = iter(tasks)
    pending: dict[Any, list[Task]] = {}
    pool = start_pool(n_workers)
    try:
        while True:
            while len(pending) < 2 * n_workers and (batch := list(itertools.islice(queue, 4))):
                pending[pool.submit(process_clips, batch, args)] = batch
            if not pending:
                return
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                reasons = future.result()
                yield from zip(pending.pop(future), reasons, strict=True)
    except BrokenProcessPool:
        names = ", ".join(task.clip.path for batch in pending.values() for task in batch)
        raise UserError(
            "A worker process was killed, most often because memory ran out, at one of these: "
            f"{names}. What was written stays: {again(args)} with fewer --workers."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def make_spectrograms(tasks: list[Task], args: argparse.Namespace) -> dict[str, str]:
    """Runs the tasks under a bar; returns the paths of clips that are skipped, and why."""
    if not tasks:
        return {}
    skipped = {}
    for task, reason in tqdm(run_in_workers(tasks, args), "Spectrograms", len(tasks), unit="clip"):
        if reason:
            skipped[task.clip.path] = reason
    if not args.input_dir.is_dir():
        raise OSError(None, "--input_dir disappeared during the run", str(args.input_dir))
    return skipped


def write_skipped(args: argparse.Namespace, skipped: dict[str, str]) -> Path:
    """Writes skipped.csv, of a shard under a name of its own; returns its path."""
    shard = "{}-of-{}.".format(*args.shard) if args.shard else ""
    log = args.output_dir / f"skipped.{shard}csv"
    rows = [{"file": path, "reason": reason} for path, reason in sorted(skipped.items())]
    write_csv(log, ("file", "reason"), rows)
    if not args.shard:
        for path in args.output_dir.glob("skipped.*-of-*.csv"):
            path.unlink()
    return log


def print_corpus_note(clips: list[Clip]) -> None:
    """Says so if the clips are named as CREMA-D's but are not all of it."""
    actors = {clip.stem.split("_")[0] for clip in clips}
    is_whole = (len(clips), len(actors)) == (CORPUS_CLIPS, CORPUS_ACTORS)
    if not is_whole and any(re.fullmatch(r"10\d\d", actor) for actor in actors):
        print(
            f"Note: if this is CREMA-D, it is incomplete: {len(clips):,} clips of "
            f"{CORPUS_CLIPS:,}, {count(len(actors), 'actor')} of {CORPUS_ACTORS}."
        )


def count_empty_bands(settings: dict) -> int:
    """How many mel bands hold no STFT bin."""
    names = ("sample_rate", "n_fft", "n_mels", "fmin", "fmax")
    filters = mel_filters(*(settings[name] for name in names))
    return int((filters.max(axis=0) == 0).sum())


def print_empty_bands(settings: dict) -> None:
    """Warns of mel bands that hold no STFT bin: they are constant and tell nothing."""
    n_empty = count_empty_bands(settings)
    if not n_empty:
        return
    n_fft = settings["n_fft"]
    n_mels = settings["n_mels"]
    fewer = [n for n in (128, 96, 80, 64, 48, 40, 32, 24, 16, 8, 4, 2, 1) if n < n_mels]
    longer = [n_fft * 2**k for k in range(1, 8) if n_fft * 2**k <= 65_536]
    remedies = []
    for name, values in (("n_mels", fewer), ("n_fft", longer)):
        for value in values:
            if not count_empty_bands(settings | {name: value}):
                remedies.append(f"--{name} {value}")
                break
    advice = f": take {' or '.join(remedies)}" if remedies else ""
    bands = count(n_mels, "mel band")
    print(f"Note: {n_empty} of {bands} are empty, as no STFT bin falls into them{advice}.")


def print_table(spectrograms: Iterable[str]) -> None:
    """How many spectrograms there are, by variant and emotion."""
    counts: Counter[tuple[str, str]] = Counter()
    for path in spectrograms:
        code, name = path.split("/")
        _, variant = split_name(name)
        counts.update(itertools.product((variant, "all"), (code, "all")))
    columns = [*EMOTIONS, "all"]
    variants = [v for v in ("original", *VARIANTS, "all") if counts[v, "all"]]
    rows = [[variant, *(counts[variant, column] for column in columns)] for variant in variants]
    print(tabulate(rows, headers=["spectrograms", *columns]))


def print_unknown(spectrograms: Iterable[str], clips: list[Clip]) -> None:
    """Names the clips that have spectrograms but no usable sound file (any more)."""
    stems = {split_name(path)[0].split("/")[1] for path in spectrograms}
    if unknown := sorted(stems - {clip.stem for clip in clips}):
        names = ", ".join(unknown[:5]) + (" …" if len(unknown) > 5 else "")
        print(
            f"Note: {count(len(unknown), 'clip')} with spectrograms but no file in --input_dir "
            f"(any more), none that can be used, or another emotion or speaker now: {names}. The "
            "trainer will use them, too; --overwrite starts anew."
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
    add("--input_dir", type=Path, required=True, help="folder of sound files, searched through")
    add("--output_dir", type=Path, required=True, help="folder for the spectrograms")
    add("--labels", type=Path, help="CSV file,emotion,speaker: the emotions, instead of names")
    add("--no_augment", action="store_true", help="originals alone")
    add("--n_augmentations", type=int, default=3, help="augmented copies of each clip, 0 to 8 (3)")
    add("--seed", type=int, default=42, help="chooses variants and noise, with the name (42)")
    add("--max_duration", type=float, default=60.0, help="seconds; skip longer new files (60)")
    add("--workers", type=int, default=usable_cores(), help="processes (default: all cores)")
    add("--overwrite", action="store_true", help="first delete the spectrograms that are there")
    add("--shard", type=parse_shard, metavar="I/N", help="do the Ith of N parts, I from 0")
    add("--strict", action="store_true", help="exit status 1 if any file was skipped")
    add("--sample_rate", type=int, default=16000, help="Hz (16000)")
    add("--n_fft", type=int, default=2048, help="samples (2048)")
    add("--hop_length", type=int, default=512, help="samples (512)")
    add("--n_mels", type=int, default=128, help="mel bands (128)")
    add("--fmin", type=float, default=0.0, help="Hz, lower edge of the lowest band (0)")
    add("--fmax", type=float, default=8000.0, help="Hz, upper edge of the highest band (8000)")
    args = parser.parse_args(argv)
    if wrong := wrong_mel_settings(mel_settings(args)):
        parser.error(f"--{wrong}")
    if not 0 <= args.n_augmentations <= len(VARIANTS):
        parser.error(f"--n_augmentations is {args.n_augmentations}: must be 0 to {len(VARIANTS)}")
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}: must be at least 1")
    if not args.max_duration > 0:
        parser.error(f"--max_duration is {args.max_duration}: must be above 0 seconds")
    if args.shard and args.overwrite:
        parser.error("--overwrite starts the folder anew for all shards: run it without --shard")
    return args


def fail(message: str, status: int = 1) -> int:
    """Tells why the run ends; returns the exit status."""
    print(message, file=sys.stderr)
    return status


def generate_folder(args: argparse.Namespace) -> int:
    """Lists the clips, makes the spectrograms that are missing, prints a summary."""
    started = time.perf_counter()
    config = make_config(args)
    clips, skipped = find_clips(args.input_dir, args.labels)
    print_corpus_note(clips)
    print_empty_bands(mel_settings(args))
    clips = [clip for clip in clips if in_shard(clip.path, args.shard)]
    skipped = {path: reason for path, reason in skipped.items() if in_shard(path, args.shard)}
    for code in EMOTIONS:
        (args.output_dir / code).mkdir(parents=True, exist_ok=True)
    with folder_lock(args.output_dir, exclusive=args.overwrite) as (alone, share):
        if alone and not args.shard:  # other machines' locks are not seen on a network disk
            for folder in (".", *EMOTIONS):
                remove_leftovers(args.output_dir / folder)
        if args.overwrite and clips and (args.output_dir / "mel_config.json").exists():
            remove_spectrograms(args.output_dir)
        check_or_write_config(args.output_dir, config)
        share()
        skipped |= make_spectrograms(find_tasks(clips, config, args), args)
        log = write_skipped(args, skipped)
        spectrograms = list_spectrograms(args.output_dir)
        if not args.shard:
            n_originals = sum(path.endswith("_original.npy") for path in spectrograms)
            write_config(args.output_dir, config | {"n_originals": n_originals})
    print_table(spectrograms)
    if not args.shard:
        print_unknown(spectrograms, [clip for clip in clips if clip.path not in skipped])
    if skipped:
        kinds = Counter(reason.split(":")[0] for reason in skipped.values())
        reasons = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        print(f"Skipped {count(len(skipped), 'file')} ({reasons}): see {log}")
    seconds = time.perf_counter() - started
    print(f"{count(len(clips), 'clip')} in {seconds:.1f} s. Spectrograms: {args.output_dir}")
    is_empty_shard = args.shard and not clips
    if skipped and not is_empty_shard and skipped.keys() >= {clip.path for clip in clips}:
        raise UserError(f"No file could be used: {log} says why.")
    return 1 if args.strict and skipped else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, and tells errors as sentences; returns the exit status."""
    with steady_streams():
        args = parse_args(argv)
        try:
            return generate_folder(args)
        except UserError as error:
            return fail(str(error))
        except OSError as error:
            what = f"{error.filename or 'A file'}: {error.strerror or error}"
            return fail(f"{what}. What was written stays: fix this and {again(args)}.")
        except KeyboardInterrupt:
            return fail(f"\nStopped. To go on, {again(args)}.", 130)


if __name__ == "__main__":
    sys.exit(main())
