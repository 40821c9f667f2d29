"""Trains a speech-emotion classifier on the spectrograms of mel_generator.py.

Edit the constants below, then

    python cremad_custom2.py

On a laptop without a GPU, EPOCHS = 5 gives a first look. Writes, in OUTPUT_DIR:

    best_model.pth           for custom2_tester.py: the epoch of best validation accuracy
    last_checkpoint.pth      after every epoch: set RESUME = True and run again to go on from it
    history.csv              losses, accuracies, learning rate, seconds of every epoch
    training_history.png, confusion_matrix.png, classification_report.txt
    test_report.png          accuracy by actor and intensity; confidence against accuracy
    metrics.json             accuracy, UAR, macro-F1, calibration error, on test and validation
    test_predictions.csv     a row for each test clip; split.csv: who trained, validated, tested
    run.json                 constants, versions, platform: what it takes to repeat the run

Exit status: 0 finished, 1 had to stop, 2 wrong arguments, 130 Ctrl-C.
"""

import argparse
import contextlib
import datetime
import errno
import functools
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import textwrap
import time
from pathlib import Path


def stop(message, *_):
    """Ctrl-C: a sentence, and out at once. Every file that has its final name is whole, so nothing needs undoing."""
    for process in multiprocessing.active_children():
        process.kill()
    os.write(2, message)
    os._exit(130)  # no exception, which could break into a library's own code and end in its traceback


if __name__ == "__main__":
    message = b"\nStopped. The epochs that ended are in OUTPUT_DIR: set RESUME = True and run again.\n"
    signal.signal(signal.SIGINT, functools.partial(stop, message))  # before the imports that take seconds

# oneDNN keeps memory for every shape that it has met, 1,024 by default: gigabytes, and no faster.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

pd.set_option("mode.string_storage", "python")  # pyarrow, where it is installed, refuses names that are no UTF-8

# --------------------------------------------------------------------------------------
# Constants: the defaults are tuned for CREMA-D, on a laptop or one GPU

# data
MEL_DIR = "mel_spectrograms"  # --output_dir of mel_generator.py
OUTPUT_DIR = "output"
SPLIT = "actor"  # "actor": unseen voices; "clip": optimistic; or the path of a CSV: stem,split
MAX_WIDTH = 191  # frames; longer clips are cut (191 frames of hop 512 at 16 kHz: 6.1 s)
WEIGHTED_SAMPLING = True  # draw every emotion as often; False: each clip once
# model
CHANNELS = (32, 64, 128, 256)  # of the four residual blocks
STRIDES = ((2, 2), (2, 2), (1, 2), (1, 4))  # (time, mel bands) of the four blocks
HIDDEN = 512  # LSTM units in each direction
HEADS = 8  # of the self-attention
DROPOUT = 0.3
# training
BATCH_SIZE = 64  # of each process under torchrun
EPOCHS = 16
LEARNING_RATE = 2.5e-4  # under torchrun times the square root of the number of processes
WARMUP_EPOCHS = 1  # the learning rate rises linearly from 0; 0 = off
WEIGHT_DECAY = 0.01
LABEL_SMOOTHING = 0.1  # 0 = off
TIME_MASK = 16  # frames hidden in each training clip, at most; 0 = off
MEL_MASK = 16  # mel bands hidden, at most; 0 = off
TIME_WARP = 0.2  # training clips are slowed or quickened, at most by this share; 0 = off
MEL_SHIFT = 4  # moved up or down, at most by this many mel bands; 0 = off
TONE = 3.0  # dB, standard deviation of a random tone curve: other rooms and microphones; 0 = off
GAIN = 3.0  # dB, standard deviation of a random gain; 0 = off
NARROW_BAND = 0.1  # share of training clips that lose the lowest and highest bands, as on a telephone; 0 = off
AVERAGING = 0.997  # decay a step of the averaged weights, which are what is validated and saved; 0 = off
GRADIENT_CLIP = 1.0  # norm
DECAY_AFTER = 9  # epochs; after each later one the learning rate is multiplied
LR_DECAY = 0.65  # by this; 1 = off
LR_FACTOR = 0.5  # of ReduceLROnPlateau
LR_PATIENCE = 3  # epochs without a better validation accuracy that the rate survives
PATIENCE = 8  # epochs without as good a validation accuracy before training stops
# system
SEED = 42
RESUME = False  # True: go on from last_checkpoint.pth
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1"
AMP = "auto"  # mixed precision where the processor gains by it; "off": float32

SETTINGS = [name for name in list(globals()) if name.isupper() and name != "F"]  # all of the above
RANK = int(os.environ.get("RANK", 0))  # torchrun sets these: which of its processes this is,
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # of how many
EMOTIONS = {"ANG": "Angry", "DIS": "Disgust", "FEA": "Fear", "HAP": "Happy", "NEU": "Neutral", "SAD": "Sad"}
VARIANT_NAMES = ("original", "time_shift_pos", "time_shift_neg", "pitch_up", "pitch_down",
            "stretch_fast", "stretch_slow", "noise_low", "noise_medium")  # fmt: skip
MEL_SETTINGS = ("sample_rate", "n_fft", "hop_length", "n_mels", "fmin", "fmax")
SILENCE = -100.0  # dB, the least that mel_generator.py writes
FORMAT_VERSION = 1
FREE_TO_CHANGE = {"MEL_DIR", "OUTPUT_DIR", "EPOCHS", "PATIENCE", "RESUME", "DEVICE"}  # between a run and its resumption


# --------------------------------------------------------------------------------------
# Reading


def wholes(values, n):
    """Whether values are n whole numbers, each at least 1."""
    return len(values) == n and all(type(value) is int and value >= 1 for value in values)


def check_constants():
    """Ends the program with a sentence for each constant of the wrong type or range."""
    number, several = (int, float), (tuple, list)
    rules = [  # names, types, whether a value of such a type is good, in words
        ("MEL_DIR OUTPUT_DIR SPLIT DEVICE", (str,), bool, "a text in quotes"),
        ("AMP", (str,), lambda v: v in ("auto", "off"), '"auto" or "off"'),
        ("WEIGHTED_SAMPLING RESUME", (bool,), lambda v: True, "True or False"),
        ("MAX_WIDTH EPOCHS PATIENCE HIDDEN", (int,), lambda v: v >= 1, "a whole number, at least 1"),
        ("HEADS", (int,), lambda v: v >= 1 and 2 * HIDDEN % v == 0, "a divisor of 2 * HIDDEN"),
        ("WARMUP_EPOCHS DECAY_AFTER LR_PATIENCE", (int,), lambda v: v >= 0, "a whole number, at least 0"),
        ("SEED", (int,), lambda v: 0 <= v < 2**32, "a whole number from 0 to 4294967295"),
        ("TIME_MASK MEL_MASK MEL_SHIFT", (int,), lambda v: v >= 0, "a whole number, at least 0"),
        ("BATCH_SIZE", (int,), lambda v: v >= 2, "a whole number, at least 2: batch norm cannot train on one clip"),
        ("DROPOUT LABEL_SMOOTHING TIME_WARP NARROW_BAND", number, lambda v: 0 <= v <= 0.99, "a number from 0 to 0.99"),
        ("AVERAGING", number, lambda v: 0 <= v <= 0.99999, "a number from 0 to 0.99999"),
        ("WEIGHT_DECAY TONE GAIN", number, lambda v: 0 <= v <= 10, "a number from 0 to 10"),
        ("LEARNING_RATE GRADIENT_CLIP", number, lambda v: v > 0, "a number over 0"),
        ("LR_DECAY", number, lambda v: 0 < v <= 1, "a number over 0, at most 1"),
        ("LR_FACTOR", number, lambda v: 0 < v < 1, "a number between 0 and 1"),
        ("CHANNELS", several, lambda v: wholes(v, 4), "four whole numbers"),
        ("STRIDES", several, lambda v: len(v) == 4 and all(wholes(pair, 2) for pair in v), "four pairs"),
    ]
    for names, types, good, words in rules:
        for name in names.split():
            value = globals()[name]
            try:
                legal = type(value) in types and good(value)
            except TypeError:  # STRIDES of something other than pairs
                legal = False
            if not legal:
                sys.exit(f"{name} = {value!r} at the top of cremad_custom2.py: take {words}.")


def compute_on(device):
    """Raises RuntimeError where a device cannot compute: a GPU too old for this PyTorch still gives memory."""
    nn.LSTM(1, 1).to(device)(torch.zeros(1, 1, 1, device=device))[0].cpu()


def pick_device():
    """The device of DEVICE, and the number type of mixed precision (None: float32), by capability."""
    name = DEVICE if DEVICE != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and PROCESSES > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        compute_on(device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f'DEVICE = {DEVICE!r} ({name}) cannot be used here ({str(error).splitlines()[0]}): take "cpu".')
    if AMP == "off":
        return device, None
    if device.type == "cuda":
        return device, torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    able = torch.cpu.get_capabilities()
    bfloat16 = (able.get("amx_bf16") or able.get("avx512_bf16")) and gains_by_bfloat16()
    return device, torch.bfloat16 if bfloat16 else None


def gains_by_bfloat16():
    """Whether this processor multiplies quicker in bfloat16, by trying: Intel's without AMX can, at half the speed."""
    fastest = {}
    for number_type in (torch.float32, torch.bfloat16) * 5:  # the least of five: what else runs here costs time too
        x = torch.ones(512, 1024, dtype=number_type)
        started = time.perf_counter()
        F.linear(x, x)
        fastest[number_type] = min(time.perf_counter() - started, fastest.get(number_type, math.inf))
    return fastest[torch.bfloat16] < 0.8 * fastest[torch.float32]


def join_processes(device):
    """Under torchrun: brings its processes together, NCCL on GPUs, Gloo on CPUs; rank 0 alone speaks and writes."""
    if PROCESSES > 1:
        nccl = device.type == "cuda" and torch.distributed.is_nccl_available()  # Windows has none
        torch.distributed.init_process_group(
            "nccl" if nccl else "gloo",
            timeout=datetime.timedelta(days=1),  # the others wait while rank 0 validates and reports
            device_id=device if nccl else None,
        )
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w", encoding="utf-8", errors="replace")


def agreed(value):
    """Rank 0's value, on every rank."""
    box = [value]
    if PROCESSES > 1:
        torch.distributed.broadcast_object_list(box)
    return box[0]


def check_alike(run):
    """Under torchrun: ends every process if one has other constants, spectrograms or epochs behind it than rank 0."""
    own = {k: v for k, v in run.settings.items() if k not in ("MEL_DIR", "OUTPUT_DIR")} | {"epoch": len(run.history)}
    unlike = torch.tensor(float(agreed(own) != own), device=run.device)
    if PROCESSES > 1:
        torch.distributed.all_reduce(unlike)
    if unlike:
        sys.exit(
            "The processes differ in their constants, spectrograms or last_checkpoint.pth: give every machine the "
            "same script and spectrograms, and an OUTPUT_DIR that all of them share."
        )


def read_mel_config(mel_dir):
    """The mel settings that the spectrograms were made with, from mel_config.json."""
    path = mel_dir / "mel_config.json"
    if not mel_dir.is_dir():
        sys.exit(f"MEL_DIR = {MEL_DIR!r} is no folder: run mel_generator.py first, or name its --output_dir.")
    if not path.exists():
        sys.exit(f"MEL_DIR = {MEL_DIR!r} holds no mel_config.json: name the --output_dir of mel_generator.py.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return {name: config[name] for name in MEL_SETTINGS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(
            f"{path} does not tell the mel settings ({type(error).__name__}: {error}): "
            "MEL_DIR takes the --output_dir of mel_generator.py."
        )


def list_clips(mel_dir):
    """A row for each spectrogram: path, stem, variant, actor, emotion; sorted by path."""
    rows = []
    for path in (path for code in EMOTIONS for path in sorted(mel_dir.glob(f"{code}/*.npy"))):
        variant = next((v for v in VARIANT_NAMES if path.stem.endswith(f"_{v}")), None)
        if variant is None:
            sys.exit(f"{path}: the name ends in no variant ({', '.join(VARIANT_NAMES)}): move it out of MEL_DIR.")
        stem = path.stem.removesuffix(f"_{variant}")
        rows.append((str(path), stem, variant, stem.split("_")[0], path.parent.name))
    if not rows:
        sys.exit(f"MEL_DIR = {MEL_DIR!r} holds no EMO/*.npy: run mel_generator.py with --output_dir {MEL_DIR}")
    return pd.DataFrame(rows, columns=["path", "stem", "variant", "actor", "emotion"])


def split_evenly(groups, emotions, seed):
    """Splits clips 70/15/15 so that a group (an actor) is on one side, as even over emotions as groups allow.

    Of 100 seeded orders of the groups, takes the one whose sides' emotion shares differ least
    from the whole's. Returns a side for each clip.
    """
    names, group = np.unique(groups, return_inverse=True)
    n_side = max(1, round(0.15 * len(names)))
    table = pd.crosstab(group, np.asarray(emotions)).to_numpy(float)  # (groups, emotions)
    whole = table.sum(0) / table.sum()
    best, best_gap = None, math.inf
    for order in (np.random.default_rng([seed, i]).permutation(len(names)) for i in range(100)):
        side = np.full(len(names), "train", object)
        side[order[:n_side]], side[order[n_side : 2 * n_side]] = "test", "val"
        counts = np.array([table[side == s].sum(0) for s in ("train", "val", "test")])
        gap = np.abs(counts / counts.sum(1, keepdims=True) - whole).max()
        if gap < best_gap:
            best, best_gap = side, gap
    return best[group]


def split_from_csv(stems):
    """The sides that the CSV named by SPLIT gives to the stems; clips it does not name get None."""
    try:
        table = pd.read_csv(SPLIT, dtype=str, encoding_errors="surrogateescape")
        sides = dict(zip(table["stem"], table["split"], strict=True))
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f'SPLIT = {SPLIT!r} is neither "actor" nor "clip", nor a CSV with the columns stem,split ({error}).')
    for side in set(sides.values()) - {"train", "val", "test"}:
        sys.exit(f"SPLIT = {SPLIT!r}: split is {side!r} somewhere: take train, val or test.")
    if len(sides) < len(table):
        sys.exit(f"SPLIT = {SPLIT!r}: {table['stem'][table['stem'].duplicated()].iloc[0]} stands there twice.")
    absent, unnamed = len(sides.keys() - set(stems)), len(set(stems) - sides.keys())
    print(
        f"Split {SPLIT}: {absent} of its {len(sides)} stems have no spectrogram; "
        f"{unnamed} clips that it does not name are left out."
    )
    return [sides.get(stem) for stem in stems]


def assign_split(clips):
    """Adds the column `split`, drops what no side uses: variants other than the original only train."""
    originals = clips[clips.variant == "original"]
    if SPLIT in ("actor", "clip"):
        groups = originals.actor if SPLIT == "actor" else originals.stem
        if (n := groups.nunique()) < 3:
            sys.exit(
                f"MEL_DIR = {MEL_DIR!r} holds originals of {n} {SPLIT}(s): a split by {SPLIT} takes at least "
                "three, one each to train, validate and test."
            )
        side = split_evenly(groups, originals.emotion, SEED)
    else:
        side = split_from_csv(originals.stem)
    clips = clips.assign(split=clips.stem.map(dict(zip(originals.stem, side, strict=True))))
    used = clips.split.notna() & ((clips.variant == "original") | (clips.split == "train"))
    clips = clips[used].reset_index(drop=True)
    for name in ("train", "val", "test"):
        if not (clips.split == name).any():
            sys.exit(f"SPLIT = {SPLIT!r} leaves no clip to {name}: train, val and test each need some.")
    if (n_train := (clips.split == "train").sum()) < BATCH_SIZE * PROCESSES:
        each = f" for each of {PROCESSES} processes" if PROCESSES > 1 else ""
        sys.exit(
            f"BATCH_SIZE = {BATCH_SIZE}{each}, but there are {n_train} spectrograms to train on: lower BATCH_SIZE."
        )
    return clips


def read_spectrogram(path, n_mels):
    """One .npy as float32 (frames, mel bands); ends the program if it is not what mel_generator.py writes."""
    mend = "delete it and run mel_generator.py again."
    try:
        with open(path, "rb") as file:
            mel = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # bytes from anywhere make the header's parser raise anything
        sys.exit(f"{path} is not a whole .npy file ({' '.join(str(error).split())[:200]}): {mend}")
    if mel.dtype != np.float32 or mel.ndim != 2 or len(mel) != n_mels or not mel.size:
        sys.exit(
            f"{path} holds {mel.dtype} {mel.shape}, not float32 ({n_mels}, frames) as mel_config.json says: {mend}"
        )
    if not np.isfinite(mel).all():
        sys.exit(f"{path} holds numbers that are not finite: {mend}")
    return mel.T


def room_for(n_frames, n_mels):
    """Float32 (n_frames, n_mels): in memory or, if that would take half of it, in a nameless file in OUTPUT_DIR."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # Windows does not tell
        memory = math.inf
    if 4 * n_frames * n_mels < memory / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        return np.empty((n_frames, n_mels), np.float32)
    file = tempfile.TemporaryFile(dir=OUTPUT_DIR)
    if hasattr(os, "posix_fallocate"):  # a disk that fills up later would end the program without a word
        os.posix_fallocate(file.fileno(), 0, 4 * n_frames * n_mels)
    return np.memmap(file, np.float32, "r+", shape=(n_frames, n_mels))


class Spectrograms:
    """All spectrograms end to end in one tensor, so that a batch is one gather and no loader is needed.

    frames: float32 (all frames, mel bands); start, length, label: int64 (clips,), on the CPU.
    """

    def __init__(self, clips, n_mels):
        most = sum(os.path.getsize(path) for path in clips.path) // (4 * n_mels)
        frames, length, at = room_for(most, n_mels), [], 0
        for path in tqdm(clips.path, desc="Reading", unit="file", leave=False, disable=RANK > 0):
            mel = read_spectrogram(path, n_mels)[:MAX_WIDTH]
            frames[at : at + len(mel)] = mel
            length.append(len(mel))
            at += len(mel)
        self.frames, self.length = torch.from_numpy(frames[:at]), torch.tensor(length)
        self.start = self.length.cumsum(0) - self.length
        self.label = torch.tensor([list(EMOTIONS).index(code) for code in clips.emotion])

    def normalize(self, train):
        """Brings each mel band to mean 0, deviation 1 over the training clips; returns those figures."""
        total, squares, n = 0.0, 0.0, 0
        for i in train.tolist():
            mel = self.clip(i).double()
            total, squares, n = total + mel.sum(0), squares + mel.square().sum(0), n + len(mel)
        mean = total / n
        std = (squares / n - mean.square()).clamp(min=1e-4).sqrt()
        self.frames.sub_(mean.float()).div_(std.float())
        return {"mean": mean.tolist(), "std": std.tolist()}

    def to_gpu_if_it_fits(self, device):
        """Moves all frames to a GPU of which they take less than half; else batches go there one by one."""
        if device.type == "cuda" and self.frames.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.frames = self.frames.to(device)

    def clip(self, i):
        """One clip, (frames, mel bands)."""
        return self.frames[self.start[i] : self.start[i] + self.length[i]]

    def batch(self, index, rate, device):
        """Training clips, each at its own rate of speed, padded with zeros to a multiple of 8 frames.

        Returns (clips, frames, mel bands), lengths on the CPU, labels.
        """
        length = (self.length[index] / rate).ceil().long().clamp(max=MAX_WIDTH)
        step = torch.arange(-(-int(length.max()) // 8) * 8)  # few different widths: oneDNN keeps memory for each
        at = (step * rate[:, None]).long().minimum(self.length[index, None] - 1) + self.start[index, None]
        x = self.frames[at.to(self.frames.device)].to(device)
        return x * inside(length, len(step)).to(device)[:, :, None], length, self.label[index].to(device)


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


def draw_epoch(data, train, generator):
    """One epoch's batches: clip numbers and a random rate of speed by TIME_WARP for each, (batches, clips) both.

    First the draw, each emotion as often; then clips of like length at their rates come together.
    Under torchrun a batch is of all processes together: each takes every PROCESSES-th clip of it.
    """
    batch = BATCH_SIZE * PROCESSES
    n = len(train) // batch * batch  # whole batches: batch norm cannot train on one clip
    if WEIGHTED_SAMPLING:
        class_weights = 1.0 / data.label[train].bincount(minlength=len(EMOTIONS)).clamp(min=1)
        drawn = torch.multinomial(class_weights[data.label[train]], n, replacement=True, generator=generator)
    else:
        drawn = torch.randperm(len(train), generator=generator)[:n]
    drawn = train[drawn]
    rate = torch.exp(TIME_WARP * (2 * torch.rand(n, generator=generator) - 1))
    order = (data.length[drawn] / rate).argsort().view(-1, batch)
    order = order[torch.randperm(len(order), generator=generator)]
    return drawn[order], rate[order]


def vary(x, lengths, mean, std):
    """Moves each clip by MEL_SHIFT, adds TONE and GAIN, empties outer bands: another voice, room, microphone, line.

    x: normalised (B, T, M); mean, std: dB, of each mel band (M,). Still zero past each clip's frames.
    """
    n, n_mels = len(x), x.shape[2]
    curve = F.interpolate(TONE * torch.randn(n, 1, 5), size=n_mels, mode="linear", align_corners=True)
    curve += GAIN * torch.randn(n, 1, 1)
    band = torch.arange(n_mels)
    low, high = 0.1 * torch.rand(n, 1), 0.7 + 0.3 * torch.rand(n, 1)  # shares of the mel axis
    lost = ((band < low * n_mels) | (band >= high * n_mels)) & (torch.rand(n, 1) < NARROW_BAND)
    shifted = (band + torch.randint(-MEL_SHIFT, MEL_SHIFT + 1, (n, 1))).clamp(0, n_mels - 1)
    x = x.gather(2, shifted[:, None].to(x.device).expand_as(x)) + (curve / std).to(x.device)
    x = torch.where(lost[:, None].to(x.device), ((SILENCE - mean) / std).to(x.device), x)
    return x * inside(lengths, x.shape[1]).to(x.device)[:, :, None]


def hide_parts(x, lengths):
    """Sets a random stretch of time and one of mel bands to the mean, in each clip (in place).

    Source: Park et al., "SpecAugment", arXiv:1904.08779; lighter here, one mask each way.
    """
    for axis, most, size in ((1, TIME_MASK, lengths), (2, MEL_MASK, torch.full_like(lengths, x.shape[2]))):
        width = (torch.rand(len(x)) * (torch.minimum(size // 2, torch.tensor(most)) + 1)).floor()
        first = (torch.rand(len(x)) * (size - width + 1)).floor()
        at = torch.arange(x.shape[axis])
        hidden = ((at >= first[:, None]) & (at < (first + width)[:, None])).to(x.device)
        x.masked_fill_(hidden.unsqueeze(3 - axis), 0.0)
    return x


@torch.no_grad()
def average_weights(average, weights, n):
    """One step of the moving average of the weights; its first steps forget faster, to lose the random start."""
    share = 1 - ((1 + n) / (10 + n)).clamp(max=AVERAGING)
    for mean, value in zip(average, weights, strict=True):
        mean.lerp_(value, share) if mean.is_floating_point() else mean.copy_(value)


def train_epoch(run, epoch):
    """One pass over the training draw; returns mean loss and accuracy."""
    seed = SEED * 100_003 + epoch  # an epoch depends on its number alone: resuming repeats it
    batches, rates = draw_epoch(run.data, run.sides["train"], torch.Generator().manual_seed(seed))
    torch.manual_seed(seed + 15_485_863 * RANK)  # a prime; of the seed, a CPU's generator takes the lowest 32 bits
    total = torch.zeros(2, device=run.device)  # loss, right answers
    mean, std = (torch.tensor(run.normalization[name]) for name in ("mean", "std"))
    run.model.train()
    own = list(zip(batches[:, RANK::PROCESSES], rates[:, RANK::PROCESSES], strict=True))
    bar = tqdm(own, desc=f"Epoch {epoch}", unit="batch", leave=False, disable=RANK > 0)
    for step, (index, rate) in enumerate(bar, start=1):
        if epoch <= WARMUP_EPOCHS:
            run.optimizer.param_groups[0]["lr"] = run.highest_rate * (epoch - 1 + step / len(batches)) / WARMUP_EPOCHS
        x, lengths, label = run.data.batch(index, rate, run.device)
        x = hide_parts(vary(x, lengths, mean, std), lengths)
        with torch.autocast(run.device.type, run.amp, enabled=run.amp is not None):
            logits = run.parallel(x, lengths)
        loss = F.cross_entropy(logits.float(), label, label_smoothing=LABEL_SMOOTHING)
        run.scaler.scale(loss).backward()
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), GRADIENT_CLIP)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        total += torch.stack([loss.detach(), (logits.argmax(1) == label).sum()])  # .item() would wait for the GPU
        run.average.update_parameters(run.model)
    if PROCESSES > 1:
        torch.distributed.all_reduce(total)
    loss, accuracy = float(total[0]) / len(batches) / PROCESSES, float(total[1]) / batches.numel()
    return loss, accuracy


def validate(run, epoch, loss, accuracy, seconds):
    """The history's row for an epoch that took `seconds` to train, and the validation logits and labels."""
    logits, label = run.logits("val", run.average.module)
    n_drawn = len(run.sides["train"]) // (BATCH_SIZE * PROCESSES) * BATCH_SIZE * PROCESSES
    row = {
        "epoch": epoch,
        "train_loss": loss,
        "train_accuracy": accuracy,
        "val_loss": float(F.cross_entropy(logits, label)),
        "val_accuracy": float((logits.argmax(1) == label).float().mean()),
        "val_uar": uar(label, logits.argmax(1)),
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "seconds": round(seconds, 2),
        "train_clips_per_s": round(n_drawn / seconds, 1),
    }
    return row, logits, label


def train(run):
    """Epochs until EPOCHS or PATIENCE ends them, or a loss that is no number; after each, all to go on is on disk."""
    while len(run.history) < EPOCHS and len(run.history) - run.best_epoch < PATIENCE:
        epoch, started = len(run.history) + 1, time.perf_counter()
        loss, accuracy = train_epoch(run, epoch)
        if not math.isfinite(loss):
            sys.exit(
                f"The training loss is {loss} in epoch {epoch}: lower LEARNING_RATE ({LEARNING_RATE:g}), or set "
                f'AMP = "off". What is in {OUTPUT_DIR} is from the epochs before.'
            )
        row = None
        if RANK == 0:
            row, logits, label = validate(run, epoch, loss, accuracy, time.perf_counter() - started)
        row = agreed(row)
        run.history.append(row)
        if epoch > WARMUP_EPOCHS:
            run.scheduler.step(row["val_accuracy"])
        if epoch > DECAY_AFTER:
            run.optimizer.param_groups[0]["lr"] *= LR_DECAY
        if best := row["val_accuracy"] >= run.best_accuracy:  # of equal ones the last, with a lower learning rate
            run.best_accuracy, run.best_epoch = row["val_accuracy"], epoch
        if RANK == 0:
            if best:
                run.save_best(fit_temperature(logits, label))
            run.save()
            print_epoch(row, best)


def print_epoch(row, best):
    """The epoch's line."""
    print(
        f"epoch {row['epoch']:3d}/{EPOCHS}  loss {row['train_loss']:.3f} {row['val_loss']:.3f}  "
        f"accuracy {100 * row['train_accuracy']:4.1f} {100 * row['val_accuracy']:4.1f} %  "
        f"UAR {100 * row['val_uar']:4.1f} %  lr {row['learning_rate']:.1e}  {row['seconds']:.0f} s  "
        f"at most {(EPOCHS - row['epoch']) * row['seconds'] / 60:.0f} min left{'  *' if best else ''}",
        flush=True,
    )


def uar(true, predicted):
    """Unweighted average recall of classes (N,): the mean over the emotions that occur of the share found."""
    return float(np.mean([float((predicted[true == c] == c).float().mean()) for c in true.unique()]))


def reliability(probabilities, label, bins):
    """Mean confidence, accuracy and share of all clips: a row for each of so many equal bins of confidence with clips.

    `probabilities` is (N, classes), `label` (N,).
    """
    confidence, predicted = (values.numpy() for values in probabilities.max(1))
    table = pd.DataFrame({"confidence": confidence, "accuracy": predicted == label.numpy()}, dtype=float)
    bin_of = table.groupby((table.confidence * bins).astype(int).clip(upper=bins - 1).to_numpy())
    return bin_of.mean().assign(share=bin_of.size() / len(label))


def calibration_error(probabilities, label):
    """Expected calibration error, 0 to 1, of the top label, 15 equal bins (Guo et al., arXiv:1706.04599)."""
    table = reliability(probabilities, label, 15)
    return float((table.share * (table.accuracy - table.confidence).abs()).sum())


def fit_temperature(logits, label):
    """The divisor of logits (N, classes) that makes `label` (N,) most likely, of 401 from 0.1 to 10 (Guo et al.)."""
    return min(torch.logspace(-1, 1, 401).tolist(), key=lambda t: float(F.cross_entropy(logits / t, label)))


def uar_interval(true, predicted, actors):
    """95 % interval of the UAR, low and high, by 1,000 bootstrap draws of actors; None where there is one actor."""
    names, random = np.unique(actors), np.random.default_rng(SEED)
    if len(names) == 1:
        return None
    rows = {name: torch.from_numpy(np.flatnonzero(actors == name)) for name in names}
    draws = (torch.cat([rows[name] for name in random.choice(names, len(names))]) for _ in range(1000))
    return np.percentile([uar(true[drawn], predicted[drawn]) for drawn in draws], [2.5, 97.5]).tolist()


def measure(logits, label, actors, temperature):
    """The figures of metrics.json for one side of the split."""
    from sklearn.metrics import f1_score  # here, because it takes a second to import

    predicted = logits.argmax(1)
    return {
        "accuracy": float((predicted == label).float().mean()),
        "uar": uar(label, predicted),
        "macro_f1": float(f1_score(label, predicted, average="macro", labels=label.unique())),
        "ece": calibration_error((logits / temperature).softmax(1), label),
        "ece_before": calibration_error(logits.softmax(1), label),
        "n_clips": len(label),
        "n_actors": len(np.unique(actors)),
        "uar_ci95": uar_interval(label, predicted, actors),
    }


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


def plot_history(path, history, best_epoch):
    """Loss, accuracy and learning rate over the epochs, the best one marked."""
    table, blue, orange = pd.DataFrame(history).set_index("epoch"), "#0072B2", "#D55E00"
    panels = {
        "Cross-entropy (nats)": {"train_loss": (1, "training", blue, "-"), "val_loss": (1, "validation", orange, "-")},
        "Accuracy, UAR (%)": {
            "train_accuracy": (100, "training accuracy", blue, "-"),
            "val_accuracy": (100, "validation accuracy", orange, "-"),
            "val_uar": (100, "validation UAR", "#000000", ":"),
        },
        "Learning rate": {"learning_rate": (1, "learning rate", blue, "-")},
    }
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        for column, (scale, label, colour, style) in lines.items():
            ax.plot(scale * table[column], color=colour, linestyle=style, marker=".", label=label)
        if title.startswith("Accuracy"):
            ax.axhline(100 / len(EMOTIONS), color="#555555", linestyle="-.", linewidth=1, label="chance")
        ax.axvline(best_epoch, color="#555555", linestyle="--", linewidth=1, label=f"best epoch, {best_epoch}")
        ax.set(xlabel="Epoch", ylabel=title)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=200)
    plt.close(figure)


def plot_intensity(axes, stems, right):
    """Accuracy (%) by intensity, where file names tell it in their fourth field."""
    names = {"LO": "low", "MD": "medium", "HI": "high"}
    level = [names.get((stem.upper().split("_") + [""] * 4)[3], "not told") for stem in stems]
    table = right.groupby(level).agg(["mean", "size"]).reindex([*names.values(), "not told"]).dropna()
    bars = [f"{name}\n({n:.0f})" for name, n in table["size"].items()]
    axes.bar(bars, table["mean"], color="#0072B2", width=min(0.8, len(bars) / 4))
    axes.set(xlabel="Intensity (clips)", ylabel="Accuracy (%)", ylim=(0, 100))


def plot_report(path, table, logits, label, temperature):
    """Accuracy by actor, sorted, and by intensity where names tell it; confidence against accuracy."""
    right = 100.0 * (table.true_class == table.predicted_class)
    figure, places = plt.subplot_mosaic(
        [["actor", "actor"], ["intensity", "sure"]], figsize=(7, 5.6), layout="constrained"
    )
    by_actor = right.groupby(table.actor).mean().sort_values()
    names = [os.fsencode(actor).decode("utf-8", "replace").replace("$", r"\$") for actor in by_actor.index]
    places["actor"].bar(names, by_actor, color="#0072B2", width=min(0.8, len(names) / 8))
    places["actor"].axhline(right.mean(), color="#D55E00", linestyle="--")
    places["actor"].set(xlabel="Test actor", ylabel="Accuracy (%)", ylim=(0, 100))
    places["actor"].tick_params(axis="x", rotation=90 if len(names) > 12 else 0)
    places["actor"].set_title(f"Dashed: all test clips, {right.mean():.1f} %", fontsize=9)
    plot_intensity(places["intensity"], table.stem, right)
    for divisor, words, colour, style in ((1.0, "before", "#E69F00", ":"), (temperature, "after", "#0072B2", "-")):
        bins = 100 * reliability((logits / divisor).softmax(1), label, 10)
        looks = {"color": colour, "marker": "o", "label": f"{words} temperature"}
        places["sure"].plot(bins.confidence, bins.accuracy, style, **looks)
    places["sure"].plot([0, 100], [0, 100], color="#555555", linestyle="--", linewidth=1)
    places["sure"].set(xlabel="Confidence (%)", ylabel="Accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    places["sure"].legend(fontsize=8, loc="lower right")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=200)
    plt.close(figure)


def worst_mistakes(table, n=10):
    """The wrong answers given with most confidence: stem, true and predicted class, confidence."""
    table = table.assign(confidence=table[list(EMOTIONS.values())].max(axis=1))
    worst = table[table.true_class != table.predicted_class].nlargest(n, "confidence")
    return worst[["stem", "true_class", "predicted_class", "confidence"]].to_dict("records")


def save_tensors(state, path):
    """torch.save, with a full disk told as the OSError that it is."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError(errno.EIO, f"could not be written whole (is the disk full?): {str(error)[:80]}", path) from error


class Run:
    """A training in progress: data, model, optimiser, schedule, history; saved and resumed as one."""

    def __init__(self, clips, mel_config, device, amp):
        self.clips, self.mel_config, self.device, self.amp = clips, mel_config, device, amp
        self.output_dir = Path(OUTPUT_DIR)
        self.sides = {side: torch.from_numpy(np.flatnonzero(clips.split == side)) for side in ("train", "val", "test")}
        self.data = Spectrograms(clips, mel_config["n_mels"])
        self.normalization = self.data.normalize(self.sides["train"])
        self.data.to_gpu_if_it_fits(device)
        self.settings = configuration(clips, mel_config, self.normalization)
        self.model_config = {
            "n_mels": mel_config["n_mels"], "n_classes": len(EMOTIONS), "channels": CHANNELS, "strides": STRIDES,
            "hidden": HIDDEN, "heads": HEADS, "dropout": DROPOUT,
        }  # fmt: skip
        torch.manual_seed(SEED)
        self.model = EmotionClassifier(**self.model_config).to(device, memory_format=torch.channels_last)
        self.parallel = nn.parallel.DistributedDataParallel(self.model) if PROCESSES > 1 else self.model
        self.average = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=average_weights, use_buffers=True)
        for module in self.average.modules():
            if isinstance(module, nn.LSTM):
                module.flatten_parameters()  # copied one by one: on a GPU cuDNN would gather them at every call
        self.highest_rate = LEARNING_RATE * math.sqrt(PROCESSES)  # Malladi et al., arXiv:2205.10287
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), self.highest_rate, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, "max", factor=LR_FACTOR, patience=LR_PATIENCE
        )
        # On a GPU always: autocast copies the LSTM's weights to float16 (pytorch/pytorch#42385; not tried here).
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is not None and device.type == "cuda")
        self.parts = {name: getattr(self, name) for name in "model average optimizer scheduler scaler".split()}
        self.history, self.best_epoch, self.best_accuracy = [], 0, -1.0

    def logits(self, side, model):
        """A model's logits for one side of the split, and the labels, on the CPU."""
        spectrograms = [self.data.clip(i) for i in self.sides[side]]
        return logits_of(model, spectrograms, BATCH_SIZE, self.device), self.data.label[self.sides[side]]

    def save(self):
        """Writes everything that the next epoch depends on."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {name: getattr(self, name) for name in ("history", "best_epoch", "best_accuracy", "settings")}
        state["amp"] = str(self.amp)
        with whole_file(self.output_dir / "last_checkpoint.pth") as temporary:
            save_tensors(state, temporary)
        with whole_file(self.output_dir / "history.csv") as temporary:
            pd.DataFrame(self.history).to_csv(temporary, index=False)

    def save_best(self, temperature):
        """Writes best_model.pth: plain Python values beside the tensors, so that weights_only=True takes them."""
        actors = sorted(set(self.clips.actor[self.clips.split == "train"]))
        checkpoint = {
            "format_version": FORMAT_VERSION,
            "model_state_dict": {name: value.cpu() for name, value in self.average.module.state_dict().items()},
            "model_config": self.model_config,
            "mel_config": self.mel_config,
            "normalization": self.normalization,
            "max_width": MAX_WIDTH,
            "classes": [{"code": code, "name": name} for code, name in EMOTIONS.items()],
            "temperature": temperature,
            "epoch": self.best_epoch,
            "metrics": self.history[-1],
            "training_config": self.settings | {"TRAINING_ACTORS": actors},  # so that no one tests on their voices
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
        }
        with whole_file(self.output_dir / "best_model.pth") as temporary:
            save_tensors(checkpoint, temporary)

    def resume(self):
        """Takes up the training of last_checkpoint.pth; refuses one of other settings."""
        path = self.output_dir / "last_checkpoint.pth"
        best = self.output_dir / "best_model.pth"
        if not path.exists():
            print(f"RESUME = True, but there is no {path} yet: starting with epoch 1.")
            return keep_previous(self.output_dir) if RANK == 0 else None
        if not best.exists():
            sys.exit(f"RESUME = True, but {best} is gone: put it back, or set RESUME = False to start anew.")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            was, now = state["settings"], self.settings
            if changed := [k for k in now if k not in FREE_TO_CHANGE and was.get(k) != now[k]]:
                words = "; ".join(f"{k} was {was.get(k)!r}, now {now[k]!r}" for k in changed)
                sys.exit(f"RESUME = True, but {path} is of other settings ({words}): set them back, or OUTPUT_DIR.")
            for name, part in self.parts.items():
                if state[name]:  # a gradient scaler that is off has nothing to tell
                    part.load_state_dict(state[name])
            for name in ("history", "best_epoch", "best_accuracy"):
                setattr(self, name, state[name])
        except Exception as error:  # bytes from anywhere make the unpickler raise anything
            sys.exit(
                f"RESUME = True, but {path} is no checkpoint of this script ({type(error).__name__}): "
                "name another OUTPUT_DIR, or set RESUME = False."
            )
        print(f"Going on from {path}, after epoch {len(self.history)}.")
        if state.get("amp") != str(self.amp):
            print(f"Note: so far in {state.get('amp')}, now in {self.amp} (None: float32).")


def keep_previous(output_dir):
    """Moves an earlier training's files to a folder of their own: a new one must not destroy or mix with them."""
    names = "best_model.pth history.csv training_history.png confusion_matrix.png classification_report.txt"
    names += " test_report.png metrics.json test_predictions.csv split.csv run.json last_checkpoint.pth"
    found = [path for path in (output_dir / name for name in names.split()) if path.exists()]
    models = [path for path in found if path.suffix == ".pth" or path.name == "metrics.json"]
    if models:  # the checkpoint goes last and names the folder: a move that was cut short goes on into the same one
        ended = time.strftime("%Y%m%d-%H%M%S", time.localtime(models[-1].stat().st_mtime))
        folder = output_dir / f"earlier_{ended}"
        folder.mkdir(exist_ok=True)
        for path in found:
            os.replace(path, folder / path.name)
        print(f"An earlier training's files are kept in {folder}.")


def read_best(path, device):
    """The model of best_model.pth in evaluation mode, and the file's dict; nothing in the file is executed."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = EmotionClassifier(**checkpoint["model_config"])
        model.load_state_dict(checkpoint["model_state_dict"])
    except Exception as error:  # bytes from anywhere make the unpickler raise anything
        sys.exit(
            f"{path} was damaged since it was written ({type(error).__name__}): train again in another OUTPUT_DIR."
        )
    return model.to(device).eval(), checkpoint


def finish(run, seconds):
    """Figures, pictures and predictions of best_model.pth, read back from its file."""
    model, checkpoint = read_best(run.output_dir / "best_model.pth", run.device)
    temperature, metrics = checkpoint["temperature"], {}
    for side in ("val", "test"):
        logits, label = run.logits(side, model)
        actors = run.clips.actor[run.sides[side].numpy()].to_numpy()
        metrics[side] = measure(logits, label, actors, temperature)
    table = write_test(run, logits, label, temperature)
    metrics["most_confident_mistakes"] = worst_mistakes(table)
    metrics |= {
        "best_epoch": checkpoint["epoch"],
        "epochs": len(run.history),
        "split": SPLIT,
        "seed": SEED,
        "device": str(run.device),
        "amp": str(run.amp),
        "temperature": temperature,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_training_spectrograms": len(run.sides["train"]),
        "seconds": round(seconds, 1),
    }
    write_text(run.output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    packages = "matplotlib numpy pandas scikit-learn seaborn torch".split()
    record = run_record(seconds, packages, constants=run.settings, device=run.device, number_type=run.amp)
    write_text(run.output_dir / "run.json", record)
    plot_report(run.output_dir / "test_report.png", table, logits, label, temperature)
    plot_history(run.output_dir / "training_history.png", run.history, checkpoint["epoch"])
    print_summary(run.output_dir, metrics)


def write_test(run, logits, label, temperature):
    """Writes predictions, report and confusion matrix of the test clips; returns the predictions."""
    from sklearn.metrics import classification_report  # here, because it takes a second to import

    names = list(EMOTIONS.values())
    true, predicted = ([names[i] for i in classes] for classes in (label, logits.argmax(1)))
    table = run.clips.loc[run.sides["test"].numpy(), ["stem", "actor"]]
    table = table.assign(true_class=true, predicted_class=predicted)
    table[names] = (logits / temperature).softmax(1).numpy()
    write_text(run.output_dir / "test_predictions.csv", table.to_csv(index=False, lineterminator="\n"))
    report = classification_report(true, predicted, labels=names, zero_division=0, digits=3)
    write_text(run.output_dir / "classification_report.txt", report)
    title = f"Test: {len(table):,} clips, {table.actor.nunique()} actors"
    plot_confusion(run.output_dir / "confusion_matrix.png", true, predicted, names, title)
    return table


def run_record(seconds, packages, **details):
    """run.json, as text: what it takes to repeat the run."""
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    run = {"command": sys.argv} | details | {"platform": platform.platform(), "versions": versions}
    return json.dumps(run | {"seconds": round(seconds, 1)}, indent=2, default=str) + "\n"


def print_setup(run):
    """Constants, split and device, before the first epoch; and what makes the figures worth less."""
    constants = {name: run.settings[name] for name in (*SETTINGS, "MEL_CONFIG")}
    print(textwrap.fill("  ".join(f"{name} = {value!r}" for name, value in constants.items()), 118))
    rows = []
    for side, index in run.sides.items():
        counts = run.data.label[index].bincount(minlength=len(EMOTIONS)).tolist()
        rows.append([side, len(index), run.clips.actor[index.numpy()].nunique(), *counts])
    print(tabulate(rows, headers=["", "spectrograms", "actors", *EMOTIONS]))
    for side, _, n_actors, *counts in rows:
        absent = ", ".join(name for name, n in zip(EMOTIONS, counts, strict=True) if not n)
        if absent:
            print(f"Note: no clip of {absent} to {side}.")
        if n_actors < 3 and side != "train":
            print(f"Note: {n_actors} actor(s) to {side}: figures of so few people say little about others.")
    if (n := len(run.sides["train"]) // (BATCH_SIZE * PROCESSES)) < 20:
        print(f"Note: an epoch has {n} step(s) of BATCH_SIZE {BATCH_SIZE}: lower it, or raise EPOCHS.")
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    number_type = str(run.amp or torch.float32).removeprefix("torch.")
    print(f"{run.device}, {number_type}, {millions:.1f} M parameters.")
    print("Columns of two: training, validation. * best so far.", flush=True)


def print_summary(output_dir, metrics):
    """The closing lines: figures of best_model.pth, and where everything is."""
    minutes = metrics["seconds"] / 60
    print(f"\nBest epoch {metrics['best_epoch']} of {metrics['epochs']}, {minutes:.1f} minutes. Clips not trained on:")
    rows = []
    for side in ("val", "test"):
        m = metrics[side]
        percent = [f"{100 * m[key]:.1f} %" for key in ("accuracy", "uar", "macro_f1", "ece")]
        rows.append([side, *percent, m["n_clips"], m["n_actors"]])
    print(tabulate(rows, headers=["", "accuracy", "UAR", "macro-F1", "ECE", "clips", "actors"]))
    if metrics["test"]["uar_ci95"]:
        low, high = metrics["test"]["uar_ci95"]
        print(f"Test UAR, 95 % interval over actors: {100 * low:.1f} to {100 * high:.1f} %")
    if SPLIT == "clip":
        print('SPLIT = "clip" has the same voices in training and test: optimistic for new voices.')
    print(f"Files: {output_dir}")
    print(
        f"Next:  python custom2_tester.py --input_dir WAVS --model_path {output_dir}/best_model.pth "
        "--output_dir results"
    )


# --------------------------------------------------------------------------------------
# Main


def parse_args():
    """No arguments but --help; another one ends the program with exit status 2."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser("python cremad_custom2.py", description=__doc__, formatter_class=formatter).parse_args()


def configuration(clips, mel_config, normalization):
    """The constants, mel settings, fingerprints of split and data: what a resumed run must share with the first."""
    split = clips[["stem", "variant", "split"]].to_csv(index=False, lineterminator="\n")
    split = split.encode("utf-8", "surrogateescape")
    data = json.dumps({k: [round(x, 6) for x in v] for k, v in normalization.items()}).encode()  # last bits differ
    prints = {"SPLIT_SHA256": hashlib.sha256(split).hexdigest(), "DATA_SHA256": hashlib.sha256(data).hexdigest()}
    return {name: globals()[name] for name in (*SETTINGS, "PROCESSES")} | {"MEL_CONFIG": mel_config} | prints


def main():
    """Reads, splits, trains, reports."""
    parse_args()
    with contextlib.suppress(AttributeError):  # IDLE and notebooks have outputs of their own
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no UTF-8
    check_constants()
    started, (device, amp), output_dir = time.perf_counter(), pick_device(), Path(OUTPUT_DIR)
    join_processes(device)
    amp = agreed(amp)
    torch.backends.cudnn.allow_tf32 = False  # one answer on CPU and GPU
    mel_config = read_mel_config(Path(MEL_DIR))
    clips = assign_split(list_clips(Path(MEL_DIR)))
    output_dir.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        lock(output_dir)
    run = Run(clips, mel_config, device, amp)
    print_setup(run)
    if RESUME:
        run.resume()
    elif RANK == 0:
        keep_previous(output_dir)
    if RANK == 0:
        who = clips.drop_duplicates("stem")[["stem", "actor", "emotion", "split"]]
        write_text(output_dir / "split.csv", who.to_csv(index=False, lineterminator="\n"))
    check_alike(run)
    train(run)
    if RANK == 0:
        finish(run, time.perf_counter() - started)
    if PROCESSES > 1:
        torch.distributed.barrier()  # a process that leaves while rank 0 still writes would end them all
        sys.stdout.flush()
        os._exit(0)  # with nothing taken down: there Gloo's threads abort now and then
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except torch.OutOfMemoryError:
        words = f'lower BATCH_SIZE ({BATCH_SIZE}), or set DEVICE = "cpu" and RESUME = True.'
        sys.exit(f"The GPU has too little memory: {words}")
    except OSError as error:
        sys.exit(
            f"{error.filename or OUTPUT_DIR}: {error.strerror or error}. The epochs that ended are in {OUTPUT_DIR}: "
            "mend this, set RESUME = True and run again."
        )
