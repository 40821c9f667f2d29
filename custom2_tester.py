"""Classifies sound files by emotion with the model of cremad_custom2.py.

    python custom2_tester.py --input_dir my_wavs --model_path output/best_model.pth --output_dir results
    python custom2_tester.py --input_dir one.wav --model_path output/best_model.pth --output_dir one --cpu --visualize

--input_dir is a folder of .wav and .flac files, searched through, or one such file. Everything that
features need (mel settings, normalisation, classes, sizes) comes from the checkpoint. Writes, in --output_dir:

    classification_results.csv    a row a file: predicted class, confidence, probability of each class, error
    summary.csv                   count, percentage and mean confidence of each class
    confidence_distribution.png   how sure the model was, by class
    confusion_matrix.png, classification_report.txt    where file names tell the emotion (1001_DFA_ANG_XX.wav)
    mel_spectrograms/*.png        --visualize: a picture a file
    segments.csv                  --segments: a row a window of 3 s
    run.json                      arguments, versions, platform: what it takes to repeat the run

Exit status: 0 finished, 1 had to stop or nothing could be classified (--strict: or a file failed),
2 wrong arguments, 130 Ctrl-C.
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
import multiprocessing
import os
import platform
import re
import signal
import sys
import threading
import time
import warnings
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path


def stop(message, *_):
    """Ctrl-C: a sentence, and out at once. Every file that has its final name is whole, so nothing needs undoing."""
    for process in multiprocessing.active_children():
        process.kill()
    os.write(2, message)
    os._exit(130)  # no exception, which could break into a library's own code and end in its traceback


if __name__ == "__main__":
    message = b"\nStopped. The rows that were written stay: the same command with --resume goes on from there.\n"
    signal.signal(signal.SIGINT, functools.partial(stop, message))  # before the imports that take seconds

# oneDNN keeps memory for every shape that it has met, 1,024 by default: gigabytes, and no faster.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

import matplotlib

matplotlib.use("Agg")
import librosa
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import soundfile
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

pd.set_option("mode.string_storage", "python")  # pyarrow, where it is installed, refuses names that are no UTF-8

# --------------------------------------------------------------------------------------
# Constants

AUDIO_SUFFIXES = (".wav", ".flac")
MOST_SAMPLES = 2**40  # a file that claims more does not know its own length
BATCHES_AT_ONCE = 4  # batches of files read ahead, sorted by length, and written together
SHOWN_FILES = 20  # at most this many rows on the screen
FORMAT_VERSION = 1
ROW_START = ("file", "predicted_class", "predicted_code", "confidence")  # the columns of the results, classes between
ROW_END = ("duration_s", "true_class", "error", "unheard_s", "uncertain")
ERROR = ROW_END.index("error") - len(ROW_END)
LINES = ("#D55E00", "#009E73", "#0072B2", "#E69F00", "#56B4E9", "#CC79A7")  # Okabe and Ito's colours
SEGMENT_START = ("file", "start_s", "end_s", "predicted_class", "confidence")
Answer = namedtuple("Answer", "path start mel seconds error probabilities")  # for a window of a file
RUN_OPTIONS = ("max_width", "segments", "window", "step", "min_confidence")  # rows depend on these, model and input


# --------------------------------------------------------------------------------------
# Reading


def native(path):
    """A path as libsndfile takes it: bytes, so that names that are no UTF-8 work too; on Windows text."""
    return os.fspath(path) if os.name == "nt" else os.fsencode(path)


def check_head(path):
    """Raises ValueError, with the reason in words, for a file whose first bytes tell that it is no sound."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("unreadable: no regular file")  # a pipe would be waited for for ever
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ValueError(f"unreadable: {error.strerror}") from error
    if head.startswith(b"version https://git-lfs"):
        raise ValueError("Git LFS pointer, not audio: run 'git lfs pull' in the corpus's folder")
    if not head:
        raise ValueError("empty: the file has 0 bytes")


def load_audio(path, sample_rate, hop_length, start=0.0, seconds=None):
    """Decodes a sound file, or `seconds` of it from `start` on, to mono at sample_rate.

    Returns float32 (samples,), full scale 1. Channels are averaged; other rates are resampled
    with soxr's high-quality filter. Raises ValueError, with the reason in words, for whatever
    holds nothing to classify.
    """
    check_head(path)
    try:
        with soundfile.SoundFile(native(path)) as file:
            rate = file.samplerate
            if file.frames > MOST_SAMPLES:
                raise ValueError("unreadable: its header does not tell its length; convert it: ffmpeg -i this new.wav")
            file.seek(int(start * rate))
            samples = file.read(-1 if seconds is None else math.ceil(seconds * rate), "float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"unreadable: {getattr(error, 'error_string', error)}") from error
    if not len(samples):
        raise ValueError("empty: a sound file without samples")
    if rate < 1000:
        raise ValueError(f"unreadable: a sampling rate of {rate} Hz")
    if not np.abs(samples).max() < 1e15:  # the power of larger samples overflows float32
        raise ValueError("not finite: NaN, infinite or boundless samples")
    mono = samples.mean(axis=1)
    if np.ptp(mono) == 0:
        part = "" if seconds is None else f" in the {seconds:.1f} s from {start:.1f} s on"
        raise ValueError(f"silent: all samples are equal{part}")
    if rate != sample_rate:
        mono = librosa.resample(mono, orig_sr=rate, target_sr=sample_rate)
    if len(mono) < hop_length:
        raise ValueError(f"shorter than one hop: {len(mono)} samples of {hop_length} at {sample_rate} Hz")
    return mono


@functools.cache
def mel_filters(sample_rate, n_fft, n_mels, fmin, fmax):
    """Triangular mel filters of equal area, as librosa.filters.mel, which takes over a second to import.

    Mel as in Slaney's "Auditory Toolbox" (1998): linear up to 1 kHz, logarithmic above. For every 16 bands
    the slice of STFT bins that they use, and float32 weights (16, those bins): the rest is zeros.
    """
    linear, step = 200 / 3, math.log(6.4) / 27  # Hz a mel below 1 kHz = 15 mel; growth a mel above
    low, high = (15 + math.log(f / 1000) / step if f > 1000 else f / linear for f in (fmin, fmax))
    mel = np.linspace(low, high, n_mels + 2)
    corner = np.where(mel > 15, 1000 * np.exp(step * (mel - 15)), linear * mel)[:, None]  # Hz
    hertz, width = np.arange(n_fft // 2 + 1) * sample_rate / n_fft, np.diff(corner, axis=0)
    rise, fall = (hertz - corner[:-2]) / width[:-1], (corner[2:] - hertz) / width[1:]
    weights = (np.minimum(rise, fall).clip(0) * 2 / (corner[2:] - corner[:-2])).astype(np.float32)
    groups = [weights[at : at + 16] for at in range(0, n_mels, 16)]
    used = [np.flatnonzero(group.any(axis=0)) for group in groups]
    bins = [slice(u.min(initial=n_fft), u.max(initial=0) + 1) for u in used]
    return [(some, group[:, some]) for some, group in zip(bins, groups, strict=True)]


@functools.cache
def hann(size):
    """Periodic Hann window, float32 (size,)."""
    return np.hanning(size + 1)[:-1].astype(np.float32)


def stft(samples, n_fft, hop_length):
    """Short-time Fourier transform as librosa.stft: periodic Hann window, frames centred by zero padding.

    Returns complex64 (1 + samples // hop_length, n_fft // 2 + 1), a frame to a row.
    """
    window = n_fft * hann(n_fft)  # undoes the norm below, in which numpy stays in float32: six times as quick
    padded = np.pad(samples, n_fft // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop_length]
    blocks = range(0, len(frames), 1024)  # an hour's windowed frames at once would fill the memory
    return np.concatenate([np.fft.rfft(frames[at : at + 1024] * window, norm="forward") for at in blocks])


def log_mel(samples, sample_rate, n_fft, hop_length, n_mels, fmin, fmax):
    """Log-mel spectrogram in dB at absolute level, float32 (mel bands, frames).

    Equals librosa.power_to_db(librosa.feature.melspectrogram(...), ref=1.0, amin=1e-10,
    top_db=None): nothing is scaled to the clip's own maximum, so loudness survives.
    """
    spectrum = stft(samples, n_fft, hop_length)
    power = spectrum.real**2 + spectrum.imag**2
    filters = mel_filters(sample_rate, n_fft, n_mels, fmin, fmax)
    mel = np.vstack([weights @ power[:, bins].T for bins, weights in filters])
    return 10.0 * np.log10(np.maximum(mel, 1e-10))


def compute_on(device):
    """Raises RuntimeError where a device cannot compute: a GPU too old for this PyTorch still gives memory."""
    nn.LSTM(1, 1).to(device)(torch.zeros(1, 1, 1, device=device))[0].cpu()


def gpu_or_cpu(cpu):
    """The GPU where there is one, unless told to keep off it."""
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    try:
        compute_on(device)
    except RuntimeError as error:
        sys.exit(f"The GPU cannot be used ({str(error).splitlines()[0]}): give --cpu.")
    return device


def read_checkpoint(path):
    """The dict of best_model.pth, and its file's sha256; nothing in it is executed. Any other file ends the program."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        sys.exit(f"{path}: {error.strerror}. Name the best_model.pth that cremad_custom2.py wrote.")
    except Exception as error:  # bytes from anywhere make the unpickler raise anything
        sys.exit(
            f"{path} is damaged, or no checkpoint that can be read safely ({type(error).__name__}): "
            "take the best_model.pth that cremad_custom2.py wrote."
        )
    needed = "format_version model_state_dict model_config mel_config normalization max_width classes temperature"
    missing = [key for key in needed.split() if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        sys.exit(
            f"{path} is no best_model.pth of cremad_custom2.py (it lacks {', '.join(missing)}): "
            "name the file of that name in its OUTPUT_DIR."
        )
    if str(checkpoint["format_version"]) != str(FORMAT_VERSION):
        sys.exit(
            f"{path} has format version {checkpoint['format_version']}, this script reads {FORMAT_VERSION}: "
            "use the scripts of one release together."
        )
    return checkpoint | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def load_checkpoint(path, device):
    """The model of best_model.pth in evaluation mode, and the file's dict; ends the program if it is unusable."""
    checkpoint = read_checkpoint(path)
    try:
        model = EmotionClassifier(**checkpoint["model_config"])
        model.load_state_dict(checkpoint["model_state_dict"])
        check_contents(checkpoint)
        noise = np.random.default_rng(0).standard_normal(checkpoint["mel_config"]["sample_rate"], np.float32)
        mels = [log_mel(noise, **checkpoint["mel_config"])]
        probabilities = classify(mels, model, checkpoint, checkpoint["max_width"], 1, torch.device("cpu"))
    except Exception as error:  # contents from anywhere make anything of the above raise anything
        sys.exit(
            f"{path} contradicts itself ({' '.join(str(error).split())[:300] or type(error).__name__}): "
            "take a best_model.pth as cremad_custom2.py wrote it."
        )
    if not (np.isfinite(probabilities).all() and all(torch.isfinite(v).all() for v in model.state_dict().values())):
        sys.exit(f"{path} holds weights that are NaN or infinite: train again with a lower LEARNING_RATE.")
    return model.to(device).eval(), checkpoint


def check_contents(checkpoint):
    """Raises ValueError for what stands beside the weights in best_model.pth and cannot be what the trainer wrote."""
    mel, model, classes = (checkpoint[key] for key in ("mel_config", "model_config", "classes"))
    mean, std = (torch.tensor(checkpoint["normalization"][key]) for key in ("mean", "std"))
    temperature, width, rate = checkpoint["temperature"], checkpoint["max_width"], mel["sample_rate"]
    bands = {len(mean), len(std), mel["n_mels"], model["n_mels"]}
    counts = {len(classes), len({c["code"] for c in classes}), len({c["name"] for c in classes}), model["n_classes"]}
    rules = {
        "mel_config, model_config and normalization differ in their number of mel bands": len(bands) == 1,
        "a deviation of the normalization is not over 0": bool((std > 0).all()),
        "classes are not a code and a name for each of the model's outputs": len(counts) == 1,
        "temperature is no number over 0": type(temperature) is float and 0 < temperature < math.inf,
        "max_width is no whole number over 0": type(width) is int and width > 0,
        "training_config is no dict": isinstance(checkpoint.setdefault("training_config", {}), dict),
        "sample_rate is none of this world": type(rate) is int and 1000 <= rate <= 1_000_000,
    }
    if wrong := [words for words, good in rules.items() if not good]:
        raise ValueError("; ".join(wrong))


def in_shard(path, shard):
    """Whether a file is this shard's to do, by the SHA-1 of its stem; shard: (I, N), or None for every file."""
    return not shard or int(hashlib.sha1(os.fsencode(Path(path).stem)).hexdigest(), 16) % shard[1] == shard[0]


def find_files(input_dir):
    """Paths of the sound files below input_dir (or of that one file), relative to it, sorted; broken links too."""
    if not input_dir.is_dir():
        return [input_dir.name] if input_dir.suffix.lower() in AUDIO_SUFFIXES and os.path.lexists(input_dir) else []
    paths = (p for p in input_dir.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and not p.is_dir())
    return sorted(p.relative_to(input_dir).as_posix() for p in paths)


def cut_windows(paths, folder, window, step):
    """A (path, start in seconds) for each window to classify: one a file, at 0, if window is None."""
    windows = []
    for path in tqdm(paths, desc="Measuring", unit="file", leave=False, disable=window is None):
        rest = 0.0
        if window is not None:
            with contextlib.suppress(soundfile.SoundFileError, OSError):  # reading it will tell
                info = soundfile.info(native(os.path.join(folder, path)))
                rest = info.duration - window if info.frames <= MOST_SAMPLES else 0.0
        starts = [*np.arange(0.0, rest - 1e-6, step).tolist(), rest] if rest > 0 else [0.0]
        windows += [(path, start) for start in starts]
    return windows


def read_clip(window, folder, mel_config, seconds):
    """The log-mel spectrogram (mel bands, frames) of a file's `seconds` from a start on, or None; what is wrong, or "".

    Between the two the whole file's length in seconds, or None.
    """
    path, start = os.path.join(folder, window[0]), window[1]
    try:
        samples = load_audio(path, mel_config["sample_rate"], mel_config["hop_length"], start, seconds)
        heard = len(samples) / mel_config["sample_rate"]
        length = heard if start + heard < seconds else soundfile.info(native(path)).duration
        return log_mel(samples, **mel_config), length, ""
    except (ValueError, MemoryError, soundfile.SoundFileError) as error:
        return None, None, str(error) or "too long for this machine's memory"


def read_ahead(windows, read, workers, size):
    """Yields (windows, what read made of them), `size` at a time; threads prepare the next while these are used."""
    groups = (windows[at : at + size] for at in range(0, len(windows), size))
    with ThreadPoolExecutor(workers) as pool:
        try:
            begun = ((some, pool.map(read, some)) for some in groups)
            for (some, clips), _ in itertools.pairwise(itertools.chain(begun, [None])):  # begins the next one, too
                yield some, list(clips)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def read_rows(path, columns):
    """The whole rows of a CSV that may be of an interrupted run, as lists; a torn last line is dropped."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        text = file.read()
    rows = list(csv.reader(io.StringIO(text.split("\0")[0], newline="")))  # NUL: a power cut's mark
    if rows and not text.endswith("\n"):
        rows.pop()
    if rows and rows[0] != columns:
        sys.exit(f"{path} has other columns than this model's results: delete it, or name another --output_dir.")
    return [row for row in rows[1:] if len(row) == len(columns)]


# --------------------------------------------------------------------------------------
# Computing


def inside(lengths, n_frames):
    """True at each clip's own frames: (clips, n_frames)."""
    return torch.arange(n_frames, device=lengths.device) < lengths[:, None]


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm beside a shortcut; the first one strides.

    Source: He et al., "Deep Residual Learning", arXiv:1512.03385; pooled shortcut: arXiv:1812.01187.
    """

    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.stride = tuple(stride)
        self.conv1, self.norm1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.norm2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        self.shortcut, self.norm_shortcut = nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out)

    def forward(self, x, lengths):
        """(B, C, T, M), zero past each clip's frames, to the same, strided; and the lengths, strided."""
        # A fixed divisor: a clip's last, half-empty window means the same with and without padding.
        # Pooled, not strided: PyTorch 2.13's strided 1 x 1 convolution of one channel in bfloat16 crashes on some CPUs.
        pooled = F.avg_pool2d(x, self.stride, ceil_mode=True, divisor_override=math.prod(self.stride))
        h = F.relu(self.norm1(self.conv1(x)))
        lengths = (lengths + self.stride[0] - 1).div(self.stride[0], rounding_mode="floor")
        mask = inside(lengths, h.shape[2])[:, None, :, None]
        h = self.norm2(self.conv2(h * mask))
        return F.relu(h + self.norm_shortcut(self.shortcut(pooled))) * mask, lengths


class BidirectionalLSTM(nn.Module):
    """Two LSTM layers over time, both ways along each clip's own steps, as nn.LSTM(bidirectional=True) on packed clips.

    Clips turned about within their padding instead of packed: on a CPU in float32, training takes 0.7 of the time.
    """

    def __init__(self, n_in, hidden, dropout):
        super().__init__()
        self.onward = nn.ModuleList(nn.LSTM(n, hidden, batch_first=True) for n in (n_in, 2 * hidden))
        self.back = nn.ModuleList(nn.LSTM(n, hidden, batch_first=True) for n in (n_in, 2 * hidden))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, steps):
        """(B, T, C) and each clip's own steps (B,) to (B, T, 2 * hidden); what stands past those steps is undefined."""
        step, last = torch.arange(x.shape[1], device=x.device), steps[:, None] - 1
        turned = torch.where(step <= last, last - step, step)[:, :, None]  # (B, T, 1)
        for layer in (0, 1):
            x = self.dropout(x)
            back, _ = self.back[layer](x.gather(1, turned.expand_as(x)))
            x = torch.cat([self.onward[layer](x)[0], back.gather(1, turned.expand_as(back))], 2)
        return x


class AttentivePooling(nn.Module):
    """Mean and spread over time, weighted by a learnt score of each step.

    Source: Okabe et al., "Attentive Statistics Pooling", arXiv:1803.10963.
    """

    def __init__(self, n):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(n, 128), nn.Tanh(), nn.Linear(128, 1))

    def forward(self, x, mask):
        """(B, T, n) and True at each clip's own steps (B, T) to (B, 2 * n)."""
        weight = self.score(x).float().masked_fill(~mask[:, :, None], -torch.inf).softmax(1)  # (B, T, 1)
        mean = (weight * x).sum(1)
        variance = (weight * (x - mean[:, None]).square()).sum(1)
        return torch.cat([mean, (variance + 1e-4).sqrt()], 1)


class EmotionClassifier(nn.Module):
    """Four residual CNN blocks, bidirectional LSTM over time, self-attention, three fully connected layers.

    In evaluation a clip's logits do not depend on its batch's padding: nothing sees past a clip's own frames.
    """

    def __init__(self, n_mels, n_classes, channels, strides, hidden, heads, dropout):
        super().__init__()
        self.blocks = nn.ModuleList(map(ResidualBlock, (1, *channels[:-1]), channels, strides))
        bands = n_mels
        for _, stride in strides:
            bands = -(-bands // stride)
        self.lstm = BidirectionalLSTM(channels[-1] * bands, hidden, dropout)
        self.attention = nn.MultiheadAttention(2 * hidden, heads, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(2 * hidden)
        self.pooling = AttentivePooling(2 * hidden)
        self.head = nn.Sequential(
            nn.Linear(4 * hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden, hidden // 2), nn.BatchNorm1d(hidden // 2), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden // 2, n_classes))  # fmt: skip

    def forward(self, x, lengths):
        """Normalised log-mel (B, T, M), zero past each clip's frames, and lengths (B,), to logits (B, classes)."""
        x, steps = x.unsqueeze(1), lengths.to(x.device)  # (B, 1, T, M)
        x = x.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x, steps = block(x, steps)
        x = self.lstm(x.permute(0, 2, 3, 1).flatten(2), steps)  # (B, T, M * C) to (B, T, 2 * hidden)
        mask = inside(steps, x.shape[1])
        attended, _ = self.attention(x, x, x, key_padding_mask=~mask, need_weights=False)
        return self.head(self.pooling(self.norm(x + attended).float(), mask))


def logits_of(model, spectrograms, batch_size, device):
    """Float32 logits (clips, classes), on the CPU, of normalised spectrograms, each (frames, mel bands)."""
    order = sorted(range(len(spectrograms)), key=lambda i: len(spectrograms[i]))
    rows = []
    model.eval()
    with torch.inference_mode():
        for at in range(0, len(order), batch_size):
            batch = [spectrograms[i] for i in order[at : at + batch_size]]
            lengths = torch.tensor([len(mel) for mel in batch])
            x = nn.utils.rnn.pad_sequence(batch, batch_first=True)
            x = F.pad(x, (0, 0, 0, -x.shape[1] % 8))  # few different widths: oneDNN keeps memory for each
            rows.append(model(x.to(device), lengths).cpu())
    return torch.cat(rows)[torch.tensor(order).argsort()]


def true_class_of(path, classes):
    """The name of the emotion in the third field of a CREMA-D file name, or ""."""
    fields = Path(path).stem.upper().split("_")
    return next((c["name"] for c in classes if len(fields) > 2 and fields[2] == c["code"]), "")


def classify(clips, model, checkpoint, max_width, batch_size, device):
    """Probabilities (clips, classes) of spectrograms (mel bands, frames); None gets NaN."""
    mean, std = (torch.tensor(checkpoint["normalization"][key]) for key in ("mean", "std"))
    whole = [i for i, mel in enumerate(clips) if mel is not None]
    probabilities = torch.full((len(clips), len(checkpoint["classes"])), math.nan)
    if whole:
        normalised = [(torch.from_numpy(clips[i].T[:max_width]) - mean) / std for i in whole]
        logits = logits_of(model, normalised, batch_size, device)
        probabilities[whole] = (logits / checkpoint["temperature"]).softmax(1)
    return probabilities.numpy()


# --------------------------------------------------------------------------------------
# Writing


def lock(path):
    """Holds a folder or file until this process ends, in whatever way; ends the program if another process holds it.

    Source: flock(2), which Windows lacks: nothing is checked there.
    """
    try:
        import fcntl
    except ImportError:
        return
    held = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"{path} is in use: another run is writing there. Wait for its end, or name another folder.")
    except OSError as error:  # a file system without locks
        print(f"{path} cannot be locked ({error.strerror}): take care that no other run writes there.")


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary path beside `path` that takes its name once written: whole, or not there at all."""
    try:
        yield f"{path}.tmp"
        os.replace(f"{path}.tmp", path)
    except OSError as error:  # a full disk's own names no file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_text(path, text):
    """Writes a text, whole or not at all."""
    with whole_file(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def plot_confusion(path, true, predicted, names, title):
    """Confusion matrix as a picture: counts, and the row's percentages, which give the colour."""
    import seaborn  # here, because these two take a second to import
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(true, predicted, labels=names)
    percent = 100.0 * counts / counts.sum(1, keepdims=True).clip(min=1)
    text = [[f"{n}\n{p:.0f} %" for n, p in zip(*row, strict=True)] for row in zip(counts, percent, strict=True)]
    figure, axes = plt.subplots(figsize=(5.5, 4.8), layout="constrained")
    looks = {"cmap": "cividis", "vmin": 0, "vmax": 100, "square": True, "annot_kws": {"size": 9}, "fmt": ""}
    looks |= {"xticklabels": names, "yticklabels": names, "cbar_kws": {"label": "% of the true class"}}
    seaborn.heatmap(percent, annot=text, ax=axes, **looks)
    axes.set(xlabel="Predicted emotion", ylabel="True emotion", title=title)
    axes.tick_params(axis="x", rotation=45)
    axes.tick_params(axis="y", rotation=0)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=200)
    plt.close(figure)


def write_rows(path, mode, rows):
    """Writes ("w") or appends ("a") rows to a CSV; file names that are no UTF-8 keep their bytes."""
    try:
        with open(path, mode, newline="", encoding="utf-8", errors="surrogateescape") as file:
            for row in rows:  # Python before 3.13 does not see by itself that a carriage return needs quotes
                quoting = csv.QUOTE_ALL if "\r" in row[0] else csv.QUOTE_MINIMAL
                csv.writer(file, lineterminator="\n", quoting=quoting).writerow(row)
    except OSError as error:  # a full disk's own names no file
        raise OSError(error.errno, error.strerror, str(path)) from error


def cell(path):
    """A path as a CSV cell: one that a spreadsheet would run as a formula gets ./ before it."""
    return f"./{path}" if path[0] in "=+-@" else path


def table_path(args, kind, shard=None, end=""):
    """Where the results or the segments stand, of all files or of a shard; end: of the files beside them."""
    part = "" if shard is None else f".{shard[0]}-of-{shard[1]}"
    return args.output_dir / f"{kind}{part}.csv{end}"


def table_columns(args, checkpoint):
    """The columns of classification_results.csv and, with --segments, of segments.csv."""
    names = [c["name"] for c in checkpoint["classes"]]
    columns = {"classification_results": [*ROW_START, *names, *ROW_END]}
    return columns | ({"segments": [*SEGMENT_START, *names]} if args.segments else {})


def run_note(args, checkpoint):
    """What a run's rows depend on, as text: kept beside them, so that none of another run come among them."""
    options = "".join(f"{name} {getattr(args, name)}\n" for name in RUN_OPTIONS)
    return f"model {checkpoint['sha256']}\ninput_dir {args.input_dir.resolve()}\n{options}"


def is_noted(path, note):
    """Whether a run's note is there and says the same."""
    return path.exists() and path.read_text(encoding="utf-8", errors="surrogateescape") == note


class Results:
    """classification_results.csv and, with --segments, segments.csv in the making.

    Rows go to .partial files, some files' at a time, each file's picture before its row.
    """

    def __init__(self, args, checkpoint, paths, artists):
        self.args, self.checkpoint, self.artists = args, checkpoint, artists
        self.columns = table_columns(args, checkpoint)
        self.partial = {kind: table_path(args, kind, args.shard, ".partial") for kind in self.columns}
        self.order = {cell(path): i for i, path in enumerate(paths)}
        self.pictures = picture_paths(paths, args.output_dir) if artists else {}
        self.new, self.drawing = {kind: [] for kind in self.columns}, []
        lock(self.partial["classification_results"])
        self.done = self.take_up()

    def take_up(self):
        """Begins the partial files anew or, with --resume, goes on from the same run's; returns the files done."""
        note = table_path(self.args, "classification_results", self.args.shard, ".run")
        now = run_note(self.args, self.checkpoint)
        earlier, undrawn = {kind: [] for kind in self.columns}, set()
        if self.args.resume:
            if note.exists() and not is_noted(note, now):
                sys.exit(
                    f"--resume: {self.partial['classification_results']} is of another model, --input_dir or option "
                    f"({', '.join(RUN_OPTIONS)}): give the same ones again, or leave --resume out to start anew."
                )
            earlier = {kind: read_rows(self.partial[kind], columns) for kind, columns in self.columns.items()}
            undrawn = {cell(path) for path, picture in self.pictures.items() if not picture.exists()}
        done = {row[0] for row in earlier["classification_results"] if not row[ERROR]} & self.order.keys() - undrawn
        for kind, rows in earlier.items():
            with whole_file(self.partial[kind]) as temporary:
                write_rows(temporary, "w", [self.columns[kind], *(row for row in rows if row[0] in done)])
        lock(self.partial["classification_results"])  # the new file too
        write_text(note, now)
        return done

    def add(self, path, answers):
        """Takes the answers for a file's windows; returns how many."""
        answers = list(answers)
        good = [a for a in answers if not a.error]
        damage = [a.error for a in answers if a.error and not (good and a.error.startswith("silent"))]  # no pause
        mean = np.mean([a.probabilities for a in good], axis=0) if good else None
        length = good[0].seconds if good else None
        self.new["classification_results"].append(self.row(path, mean, length, damage[0] if damage else ""))
        if self.args.segments:
            self.new["segments"] += map(self.segment, answers)
        if self.artists and good:
            config, names = self.checkpoint["mel_config"], tuple(c["name"] for c in self.checkpoint["classes"])
            draw, what, shares = draw_clip, good[0].mel, mean
            if len(answers) > 1:
                draw, what = draw_timeline, [(a.start, self.args.window, a.mel) for a in answers]
                shares = np.array([a.probabilities for a in answers])
            picture = str(self.pictures[path])
            self.drawing.append(self.artists.submit(draw, picture, path, what, shares, names, config))
        return len(answers)

    def row(self, path, probabilities, seconds, error):
        """A row of classification_results.csv."""
        classes, true_class = self.checkpoint["classes"], true_class_of(path, self.checkpoint["classes"])
        if error:
            return [cell(path), "", "", "", *[""] * len(classes), "", true_class, error, "", ""]
        top = int(probabilities.argmax())
        shares = [f"{p:.6f}" for p in probabilities]
        config, least = self.checkpoint["mel_config"], self.args.min_confidence
        heard = math.inf if self.args.segments else self.args.max_width * config["hop_length"] / config["sample_rate"]
        uncertain = "" if least is None else "yes" if probabilities[top] < least else "no"
        named = [cell(path), classes[top]["name"], classes[top]["code"], shares[top], *shares]
        return [*named, f"{seconds:.3f}", true_class, "", f"{max(0.0, seconds - heard):.3f}", uncertain]

    def segment(self, answer):
        """A row of segments.csv; a window without sound has no class."""
        end = answer.start + self.args.window
        times = [cell(answer.path), f"{answer.start:.3f}", f"{min(end, answer.seconds or end):.3f}"]
        if answer.error:
            return times + [""] * (2 + len(answer.probabilities))
        top, shares = int(answer.probabilities.argmax()), [f"{p:.6f}" for p in answer.probabilities]
        return [*times, self.checkpoint["classes"][top]["name"], shares[top], *shares]

    def write(self):
        """Brings the partial files up to date."""
        for job in self.drawing:
            job.result()
        for kind in reversed(self.columns):  # the file's row last: it says that the others are there
            write_rows(self.partial[kind], "a", self.new[kind])
            self.new[kind] = []
        self.drawing = []

    def finish(self):
        """Writes the last rows, and sorts what a resumed run wrote in two goes."""
        self.write()
        for kind, partial in self.partial.items():
            if self.done:
                rows = sorted(read_rows(partial, self.columns[kind]), key=lambda row: self.order[row[0]])
                with whole_file(partial) as temporary:
                    write_rows(temporary, "w", [self.columns[kind], *rows])


@functools.cache
def clip_figure(names):
    """The figure that every clip is drawn into, made once a process: a new one costs most of the time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), width_ratios=(2.4, 1), layout="constrained")
    image = left.imshow(np.zeros((2, 2)), origin="lower", aspect="auto", cmap="magma")
    figure.colorbar(image, ax=left, label="Level (dB)")
    bars = right.barh(names, [0] * len(names), color="#0072B2")
    left.set(xlabel="Time (s)", ylabel="Frequency (Hz)")
    right.set(xlabel="Confidence (%)", xlim=(0, 100))
    right.invert_yaxis()
    return figure, left, right, image, bars


def draw_clip(path, title, mel, probabilities, names, mel_config):
    """Spectrogram with axes in s and Hz, and bars of confidence, as a PNG."""
    figure, left, right, image, bars = clip_figure(names)
    seconds = mel.shape[1] * mel_config["hop_length"] / mel_config["sample_rate"]
    image.set(data=mel, extent=(0, seconds, -0.5, len(mel) - 0.5), clim=(max(mel.max() - 80, mel.min()), mel.max()))
    left.set_xlim(0, seconds)
    mel_ticks(left, len(mel), mel_config)
    left.set_title(os.fsencode(title).decode("utf-8", "replace"), parse_math=False, fontsize=9)
    right.set_title(f"{names[int(np.argmax(probabilities))]}, {100 * max(probabilities):.0f} %", fontsize=9)
    for bar, p in zip(bars, probabilities, strict=True):
        bar.set(width=100 * p, color="#D55E00" if p == max(probabilities) else "#0072B2")
    save_picture(figure, path)
    figure.set_layout_engine("none")  # laid out once: every clip has the same places


def save_picture(figure, path):
    """Writes a figure as a PNG of a clip: whole, under names of any length and script."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = os.path.join(os.path.dirname(path), f".{os.urandom(8).hex()}.tmp")  # path.tmp may be too long a name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names may hold letters that the font lacks
            figure.savefig(temporary, format="png", dpi=130, pil_kwargs={"compress_level": 1})
        os.replace(temporary, path)
    except OSError as error:  # a full disk's own names no file
        raise OSError(error.errno, error.strerror or str(error), path) from error


def mel_ticks(axes, n_mels, mel_config):
    """Marks the mel bands of a vertical axis in Hz."""
    hertz = librosa.mel_frequencies(n_mels=n_mels + 2, fmin=mel_config["fmin"], fmax=mel_config["fmax"])[1:-1]
    marks = [f for f in (250, 500, 1000, 2000, 4000, 8000, 16000) if hertz[0] <= f <= hertz[-1]]
    axes.set_yticks(np.interp(marks, hertz, np.arange(n_mels)), marks)
    axes.set_ylim(-0.5, n_mels - 0.5)


def draw_timeline(path, title, parts, probabilities, names, mel_config):
    """The spectrogram of a long recording above the probabilities of its windows over time, as a PNG.

    parts: (start, seconds, spectrogram or None where there is no sound) a window; probabilities (windows, classes).
    """
    end = parts[-1][0] + parts[-1][1]
    heard = [part for part in parts if part[2] is not None]
    n = 3000  # columns, more than the picture has pixels
    image = np.full((len(heard[0][2]), n), np.nan, np.float32)  # not a number: blank in the picture
    for start, seconds, mel in heard:
        first = min(round(start / end * n), n - 1)
        last = max(round((start + seconds) / end * n), first + 1)
        columns = mel[:, np.linspace(0, mel.shape[1] - 1, last - first).astype(int)]
        image[:, first:last] = np.fmax(image[:, first:last], columns)  # a window's first and last frame are too faint
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True, layout="constrained")
    top = np.nanmax(image)
    limits = {"vmin": max(top - 80, np.nanmin(image)), "vmax": top}
    looks = {"origin": "lower", "aspect": "auto", "cmap": "magma", "extent": (0, end, -0.5, len(image) - 0.5)}
    figure.colorbar(above.imshow(image, **looks, **limits), ax=above, label="Level (dB)")
    mel_ticks(above, len(image), mel_config)
    above.set(ylabel="Frequency (Hz)", xlim=(0, end))
    above.set_title(os.fsencode(title).decode("utf-8", "replace"), parse_math=False, fontsize=9)
    middle = [start + seconds / 2 for start, seconds, _ in parts]
    for name, line, marker, shares in zip(names, LINES, "os^vDX", 100 * probabilities.T, strict=False):
        below.plot(middle, shares, color=line, marker=marker, markersize=4 if len(middle) < 100 else 0, label=name)
    below.set(xlabel="Time (s); a window stands at its middle", ylabel="Probability (%)", ylim=(0, 100))
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=8)
    save_picture(figure, path)
    plt.close(figure)


def plot_confidence(path, results, names):
    """How sure the model was, by predicted class: every clip a point; median, quartiles of five clips and more."""
    import seaborn  # here, because it takes a second to import

    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    counts = results.predicted_class.value_counts()
    shown = results.sample(min(len(results), 3000), random_state=0)
    np.random.seed(0)  # the points' jitter: the same picture for the same results
    places = {"x": "predicted_class", "y": "percent", "order": names, "ax": axes}
    seaborn.stripplot(shown, **places, color="#0072B2", size=2 if len(shown) > 200 else 4, alpha=0.5, jitter=0.3)
    if len(many := results[results.predicted_class.map(counts) >= 5]):
        seaborn.boxplot(many, **places, color="#D55E00", fill=False, showfliers=False, width=0.7)
    axes.axhline(100 / len(names), color="#555555", linestyle="--", linewidth=1)
    axes.set(xlabel="Predicted emotion (number of files)", ylabel="Confidence (%)", ylim=(0, 101))
    axes.set_title("Confidence by predicted emotion (dashed: chance)")
    axes.set_xticks(range(len(names)), [f"{name}\n({counts.get(name, 0)})" for name in names])
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=200)
    plt.close(figure)


def write_summary(output_dir, results, checkpoint):
    """summary.csv, the pictures and, where true classes are known, the report; all on the screen too."""
    names = [c["name"] for c in checkpoint["classes"]]
    good = results[results.error == ""].assign(percent=lambda r: 100 * r.confidence.astype(float))
    rows = []
    for name in names:
        sure = good.percent[good.predicted_class == name]
        mean = round(float(sure.mean()) / 100, 4) if len(sure) else ""
        rows.append([name, len(sure), round(100 * len(sure) / len(good), 2), mean])
    headers = ["class", "count", "percentage", "mean_confidence"]
    with whole_file(output_dir / "summary.csv") as temporary:
        pd.DataFrame(rows, columns=headers).to_csv(temporary, index=False)
    if len(results) <= SHOWN_FILES:
        confidence = results.confidence.map(lambda text: text and f"{100 * float(text):.1f} %")
        shown = zip(results.file, results.predicted_class, confidence, results.error, strict=True)
        print(tabulate(shown, headers=["file", "emotion", "confidence", "error"], disable_numparse=True), end="\n\n")
    print(tabulate(rows, headers=headers))
    plot_confidence(output_dir / "confidence_distribution.png", good, names)
    labelled = good[good.true_class != ""]
    if len(labelled):
        write_report(output_dir, labelled, names, checkpoint["training_config"].get("TRAINING_ACTORS", []))


def run_record(seconds, packages, **details):
    """run.json, as text: what it takes to repeat the run."""
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    run = {"command": sys.argv} | details | {"platform": platform.platform(), "versions": versions}
    return json.dumps(run | {"seconds": round(seconds, 1)}, indent=2, default=str) + "\n"


def remove_earlier(output_dir):
    """Deletes an earlier run's summary, so that none stands beside results it is not of, and killed runs' leftovers."""
    names = "summary.csv segments.csv confidence_distribution.png confusion_matrix.png classification_report.txt"
    for name in names.split():
        (output_dir / name).unlink(missing_ok=True)
    for leftover in (output_dir / "mel_spectrograms").rglob(".*.tmp"):
        leftover.unlink()


def write_report(output_dir, labelled, names, training_actors):
    """Accuracy, UAR, confusion matrix and report of the files whose names tell the emotion; says which are no test."""
    from sklearn.metrics import classification_report  # here, because it takes a second to import

    true, predicted = labelled.true_class, labelled.predicted_class
    accuracy = (true == predicted).mean()
    uar = (true == predicted).groupby(true).mean().mean()
    figures = f"{len(labelled):,} files with a known emotion: accuracy {100 * accuracy:.1f} %, UAR {100 * uar:.1f} %"
    known = labelled.file.map(lambda path: Path(path).stem.split("_")[0]).isin(training_actors).sum()
    if known:
        figures += f"\nToo good to be true: {known:,} of them are by actors that the model was trained on."
    print(figures)
    report = classification_report(true, predicted, labels=names, zero_division=0, digits=3)
    write_text(output_dir / "classification_report.txt", f"{figures}\n\n{report}")
    title = f"{len(labelled):,} files with a known emotion"
    plot_confusion(output_dir / "confusion_matrix.png", true, predicted, names, title)


# --------------------------------------------------------------------------------------
# Main


def parse_shard(text):
    """I/N of --shard, as a pair."""
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise argparse.ArgumentTypeError(f"{text}: take I/N, I from 0 to N - 1")
    return int(i), int(n)


def usable_cores():
    """Cores that this process may use, of a cluster's machine its share; at most 61 on Windows, its limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 61) if os.name == "nt" else cores


def parse_args():
    """The command line, checked; a wrong one ends the program with exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, cores = parser.add_argument, usable_cores()
    add("--input_dir", type=Path, required=True, help="folder of .wav and .flac files, searched through, or one file")
    add("--model_path", type=Path, required=True, help="best_model.pth of cremad_custom2.py")
    add("--output_dir", type=Path, required=True, help="folder for the results")
    add("--max_width", type=int, help="frames; longer clips are cut (default: the checkpoint's, usually 191)")
    add("--cpu", action="store_true", help="do not use the GPU")
    add("--visualize", action="store_true", help="a picture for each file")
    add("--segments", action="store_true", help="classify longer files in windows, instead of cutting them")
    add("--window", type=float, default=3.0, help="--segments: seconds a window (default 3)")
    add("--step", type=float, default=1.5, help="--segments: seconds between starts (default 1.5)")
    add("--min_confidence", type=float, metavar="P", help="0 to 1: below it, the column `uncertain` is yes")
    add("--shard", type=parse_shard, metavar="I/N", help="do the Ith of N parts, I from 0; then --merge")
    add("--merge", action="store_true", help="join all shards' results, then sum up as one run does")
    add("--batch_size", type=int, default=64, help="files classified together (default 64)")
    add("--workers", type=int, default=cores, help="threads that read, processes that draw (default: all cores)")
    add("--resume", action="store_true", help="go on from an interrupted run's partial results")
    add("--strict", action="store_true", help="exit status 1 if any file failed")
    args = parser.parse_args()
    check_args(parser, args)
    return args


def check_args(parser, args):
    """Ends the program with exit status 2 and a sentence if an option's value makes no sense."""
    for name in ("max_width", "batch_size", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: take at least 1")
    for name in ("window", "step"):
        if not 0.1 <= getattr(args, name) <= 3600:
            parser.error(f"--{name} is {getattr(args, name)}: take 0.1 to 3600 seconds")
    if args.min_confidence is not None and not 0 <= args.min_confidence <= 1:
        parser.error(f"--min_confidence is {args.min_confidence}: take 0 to 1")
    if args.step > args.window:
        parser.error(f"--step {args.step:g} is longer than --window {args.window:g}: seconds between would go unheard")
    if not args.segments and (args.window, args.step) != (3.0, 1.5):
        parser.error("--window and --step are for --segments: give that too")
    if args.shard and args.merge:
        parser.error("--merge joins what --shard made: give one of the two")


def picture_paths(paths, output_dir):
    """Where each file's picture goes: its stem .png; a.wav beside a.flac: a.wav.png, a.flac.png."""
    stems = {path: os.path.splitext(path)[0] for path in paths}
    counts = Counter(stems.values())
    folder = output_dir / "mel_spectrograms"
    return {path: folder / f"{stem if counts[stem] == 1 else path}.png" for path, stem in stems.items()}


def classify_windows(windows, args, model, checkpoint, device):
    """Yields an Answer for each window: the spectrogram is None unless it is to be drawn."""
    config = checkpoint["mel_config"]
    seconds = (args.max_width * config["hop_length"] + config["n_fft"]) / config["sample_rate"]
    read = functools.partial(
        read_clip, folder=args.folder, mel_config=config, seconds=args.window if args.segments else seconds
    )
    for some, clips in read_ahead(windows, read, args.workers, BATCHES_AT_ONCE * args.batch_size):
        mels = [mel for mel, _, _ in clips]
        probabilities = classify(mels, model, checkpoint, args.max_width, args.batch_size, device)
        for (path, start), (mel, length, error), p in zip(some, clips, probabilities, strict=True):
            shown = None
            if args.visualize and mel is not None:
                shown = mel[:, : args.max_width]
                if length > args.window and args.segments:  # of an hour not every frame: a picture has no room for them
                    shown = shown[:, :: 1 + int(length / 60)]
            yield Answer(path, start, shown, length, error, p)


def classify_all(args, paths, model, checkpoint, device, artists):
    """Classifies the paths, file by file, into the tables of Results."""
    results = Results(args, checkpoint, paths, artists)
    left = [path for path in paths if cell(path) not in results.done]
    windows = cut_windows(left, args.folder, args.window if args.segments else None, args.step)
    with tqdm(total=len(windows), desc="Classifying", unit="window" if args.segments else "file") as bar:
        answers = classify_windows(windows, args, model, checkpoint, device)
        for path, some in itertools.groupby(answers, key=lambda answer: answer.path):
            bar.update(results.add(path, some))
            if max(map(len, results.new.values())) >= BATCHES_AT_ONCE * args.batch_size:
                results.write()
        if not args.input_dir.exists():
            sys.exit(f"--input_dir {args.input_dir} went away during the run: bring it back and run it with --resume.")
        results.finish()


def follow_parent():
    """In a worker process: ends it when the main process is killed, which a pool never notices by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it is not inherited
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def deaf_to_ctrl_c():
    """Worker processes that start in it never hear of Ctrl-C, which is for the main process and not lost there."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextlib.contextmanager
def drawing_processes(workers):
    """Processes that draw, started before the first thread is, so that forking is safe."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    artists = ProcessPoolExecutor(workers, context, follow_parent)
    try:
        with deaf_to_ctrl_c():
            artists.submit(int).result()
        yield artists
    except BrokenProcessPool:
        sys.exit("A drawing process was killed, most often for want of memory: run again with fewer --workers.")
    finally:
        artists.shutdown(cancel_futures=True)


def merge(args, checkpoint, paths):
    """Joins the shards' tables into partial ones, sorted as one run would have them; returns the shards' files."""
    order, shards, note = {cell(path): i for i, path in enumerate(paths)}, [], run_note(args, checkpoint)
    for kind, columns in table_columns(args, checkpoint).items():
        found = {path.name: path for path in args.output_dir.glob(f"{kind}.[0-9]*-of-[0-9]*.csv")}
        n = next((int(re.search(r"-of-(\d+)", name)[1]) for name in found), 0)
        parts = {i: table_path(args, kind, (i, n)) for i in range(n)}
        begun = {path for path in parts.values() if Path(f"{path}.partial").exists()}  # again: the note is that run's
        lost = [f"--shard {i}/{n}" for i, path in parts.items() if path.name not in found or path in begun]
        if lost or len(found) != n or not n:
            words = f": run {', '.join(lost)}" if lost else f": delete those of another N than {n}" if n else ""
            sys.exit(f"--merge: {args.output_dir} holds {len(found)} shards' {kind}, not one of each{words}.")
        for i in parts if kind == "classification_results" else ():
            if not is_noted(shard_note := table_path(args, kind, (i, n), ".run"), note):
                sys.exit(
                    f"--merge: shard {i}/{n} was run with another model, --input_dir or option "
                    f"({', '.join(RUN_OPTIONS)}): give the same ones to all shards and to --merge."
                )
            shards.append(shard_note)
        rows = [row for path in parts.values() for row in read_rows(path, columns)]
        rows.sort(key=lambda row: order.get(row[0], len(order)))
        changed = order.keys() ^ {row[0] for row in rows}
        if changed and kind == "classification_results":
            words = f"{min(changed)} came or went since the shards ran ({len(changed)} files did): run them again."
            sys.exit(f"--merge: {words}")
        with whole_file(table_path(args, kind, end=".partial")) as temporary:
            write_rows(temporary, "w", [columns, *rows])
        shards += parts.values()
    return shards


def name_tables(args, kinds, shards):
    """Gives the finished tables their names; deletes what led to them: the shards' files, and the run's note."""
    for kind in kinds:
        os.replace(table_path(args, kind, args.shard, ".partial"), table_path(args, kind, args.shard))
    for path in shards:
        path.unlink()
    if not args.shard:  # --merge will hold a shard's against the others'
        table_path(args, "classification_results", end=".run").unlink(missing_ok=True)


def sum_up(args, checkpoint):
    """Summary, pictures and closing lines of the finished partial table; returns the exit status."""
    path = table_path(args, "classification_results", args.shard, ".partial")
    results = pd.read_csv(path, dtype=str, keep_default_na=False, encoding_errors="surrogateescape")
    failed, unheard = int((results.error != "").sum()), results.unheard_s[results.error == ""].astype(float)
    if not args.shard:
        remove_earlier(args.output_dir)
    if failed < len(results) and not args.shard:
        write_summary(args.output_dir, results, checkpoint)
    if (unheard > 0).any():
        print(
            f"{(unheard > 0).sum()} files are longer than {args.max_width} frames: {unheard.sum():,.1f} s are unheard "
            "(column unheard_s). --segments hears them all."
        )
    if args.min_confidence is not None:
        print(f"{(results.uncertain == 'yes').sum()} files are uncertain: confidence under {args.min_confidence:g}.")
    if failed:
        print(f"{failed} of {len(results)} files could not be classified: the column `error` says why.")
    if failed == len(results) and failed:
        print(f"No file could be classified, the first because it is {results.error[0]}", file=sys.stderr)
    return 1 if failed and (args.strict or failed == len(results)) else 0


def check_window(args, mel_config):
    """Ends the program if --window is longer than what the model hears at once."""
    most = args.max_width * mel_config["hop_length"] / mel_config["sample_rate"]
    if args.segments and args.window > most:
        sys.exit(f"--window {args.window:g} s is longer than --max_width, {args.max_width} frames ({most:.2f} s).")


def main():
    """Loads the model, classifies, draws, sums up; returns the exit status."""
    args, started = parse_args(), time.perf_counter()
    with contextlib.suppress(AttributeError):  # IDLE and notebooks have outputs of their own
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no UTF-8
    torch.backends.cudnn.allow_tf32 = False  # one answer on CPU and GPU
    with drawing_processes(args.workers) if args.visualize else contextlib.nullcontext() as artists:
        device = gpu_or_cpu(args.cpu)
        model, checkpoint = load_checkpoint(args.model_path, device)
        args.max_width = args.max_width or checkpoint["max_width"]
        check_window(args, checkpoint["mel_config"])
        args.folder = args.input_dir if args.input_dir.is_dir() else args.input_dir.parent
        paths = find_files(args.input_dir)
        if not paths:
            words = "is no folder, and no .wav or .flac file" if args.input_dir.exists() else "does not exist"
            empty = "holds no .wav or .flac file, nor does any folder below it; convert others: ffmpeg -i a.mp3 a.wav"
            sys.exit(f"--input_dir {args.input_dir} {empty if args.input_dir.is_dir() else words}.")
        args.output_dir.mkdir(parents=True, exist_ok=True)
        shards = merge(args, checkpoint, paths) if args.merge else []
        if not args.merge:
            paths = [path for path in paths if in_shard(path, args.shard)]
            print(f"{args.model_path}: epoch {checkpoint.get('epoch', '?')}, on {device}. {len(paths):,} files.")
            classify_all(args, paths, model, checkpoint, device, artists)
    status, seconds = sum_up(args, checkpoint), time.perf_counter() - started
    name_tables(args, table_columns(args, checkpoint), shards)
    packages = "librosa matplotlib numpy pandas scikit-learn soundfile torch".split()
    record = run_record(seconds, packages, arguments=vars(args), model_sha256=checkpoint["sha256"], device=device)
    write_text(table_path(args, "run", args.shard).with_suffix(".json"), record)
    print(f"{seconds:.1f} s. Results: {table_path(args, 'classification_results', args.shard)}")
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except torch.OutOfMemoryError:
        sys.exit("The GPU's memory is full: run again with --resume and a lower --batch_size, or with --cpu.")
    except OSError as error:
        sys.exit(
            f"{error.filename or 'A file'}: {error.strerror or error}. What was written before stays: "
            "mend this and run again with --resume."
        )
