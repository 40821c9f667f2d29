"""Trains a speech-emotion classifier on the spectrograms of mel_generator.py.

Edit the constants below, then

    python cremad_custom2.py

On a laptop without a GPU, EPOCHS = 5 gives a first look. Writes, in OUTPUT_DIR:

    best_model.pth           for custom2_tester.py: the latest epoch whose validation accuracy is
                             within one standard error of the best
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
import csv
import datetime
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import reprlib
import secrets
import sys
import tempfile
import textwrap
import time
import unicodedata
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

# --------------------------------------------------------------------------------------
# Constants: the defaults are tuned for CREMA-D, on a laptop or one GPU

# data
MEL_DIR = "mel_spectrograms"  # --output_dir of mel_generator.py
OUTPUT_DIR = "output"
SPLIT = "actor"  # "actor": unseen voices; "clip": optimistic; or the path of a CSV: stem,split
MAX_WIDTH = 191  # frames; longer clips are cut (191 frames of hop 512 at 16 kHz: 6.1 s)
WEIGHTED_SAMPLING = True  # draw every emotion equally often; False: each clip once
START_FROM = ""  # the path of a best_model.pth to fine-tune, of the same model; "" = from nothing
# model
CHANNELS = (32, 64, 128, 256)  # of the four residual blocks
STRIDES = ((2, 2), (2, 2), (1, 2), (1, 4))  # (time, mel bands) of the four blocks
HIDDEN = 512  # LSTM units in each direction
HEADS = 8  # of the self-attention
DROPOUT = 0.3
# training
BATCH_SIZE = 64  # of each process under torchrun
EPOCHS = 22
LEARNING_RATE = 2.5e-4  # under torchrun times the square root of the number of processes
WARMUP_EPOCHS = 1  # the learning rate rises linearly from 0; 0 = off
WEIGHT_DECAY = 0.01
LABEL_SMOOTHING = 0.1  # 0 = off
TIME_MASK = 16  # frames masked in each training clip, at most; 0 = off
MEL_MASK = 16  # mel bands masked, at most; 0 = off
SPEED_PERTURB = 0.2  # training clips are slower or faster, at most by this share; 0 = off
MEL_SHIFT = 4  # moved up or down, at most by this many mel bands; 0 = off
RANDOM_EQ_DB = 3.0  # standard deviation of a random tone curve: other rooms, microphones; 0 = off
RANDOM_GAIN_DB = 4.0  # standard deviation of a random gain; 0 = off
NARROW_BAND = 0.1  # share of training clips without outer bands, as on a telephone; 0 = off
OTHER_FLOOR = 0.4  # share with another noise floor, as rooms and suppressors make it; 0 = off
AUTOMATIC_GAIN = 0.2  # share whose loudness is evened out, as by phones; 0 = off
ADD_FLOOR = True  # the training's noise floor is added to every clip, in training and in use
EMA_DECAY = 0.997  # a step, of the averaged weights that are validated and saved; 0 = off
GRADIENT_CLIP = 1.0  # norm
SENTENCE_WEIGHT = 0.0  # 0.2: better on CREMA-D's own sentences, worse on others: see README
DECAY_AFTER = 14  # epochs; after each later one the learning rate is multiplied
LR_DECAY = 0.65  # by this; 1 = off
LR_FACTOR = 0.5  # of ReduceLROnPlateau
LR_PATIENCE = 3  # of ReduceLROnPlateau: epochs without a better validation accuracy
PATIENCE = 10  # epochs without as good a validation accuracy before training stops
# system
SEED = 42
RESUME = False  # True: go on from last_checkpoint.pth
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1"
AMP = "auto"  # mixed precision where it is faster; "off": float32

CONSTANTS = [name for name in list(globals()) if name.isupper() and name != "F"]  # those above
MAY_CHANGE = {"MEL_DIR", "OUTPUT_DIR", "EPOCHS", "PATIENCE", "RESUME", "DEVICE"}  # to resume
# fmt: off
EMOTIONS = {"ANG": "Angry", "DIS": "Disgust", "FEA": "Fear",
            "HAP": "Happy", "NEU": "Neutral", "SAD": "Sad"}
VARIANT_NAMES = ("original", "time_shift_pos", "time_shift_neg", "pitch_up", "pitch_down",
                 "stretch_fast", "stretch_slow", "noise_low", "noise_medium")
# fmt: on
MEL_SETTINGS = ("sample_rate", "n_fft", "hop_length", "n_mels", "fmin", "fmax")
SILENCE_DB = -100.0  # the least that mel_generator.py writes
FORMAT_VERSION = 2  # of best_model.pth
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"  # Okabe and Ito's, for the colour-blind
# torchrun tells a process its rank, of how many; left over from another job they mean nothing.
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if UNDER_TORCHRUN else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if UNDER_TORCHRUN else 1
LOCAL_WORLD_SIZE = int(os.environ["LOCAL_WORLD_SIZE"]) if UNDER_TORCHRUN else 1  # on this machine


class UserError(Exception):
    """Something that the user can fix, in words for the user."""


# --------------------------------------------------------------------------------------
# Data


def check_numbers() -> None:
    """Raises UserError for a constant that is no number of the right type and range."""
    rules = [  # names, type, smallest and largest value
        ("MAX_WIDTH EPOCHS PATIENCE HEADS", int, 1, 10**6),
        ("WARMUP_EPOCHS DECAY_AFTER LR_PATIENCE TIME_MASK MEL_MASK MEL_SHIFT", int, 0, 10**6),
        ("BATCH_SIZE HIDDEN", int, 2, 10**6),  # batch norm cannot train on one clip
        ("SEED", int, 0, 2**32 - 1),
        ("DROPOUT LABEL_SMOOTHING SPEED_PERTURB NARROW_BAND", float, 0, 0.99),
        ("OTHER_FLOOR AUTOMATIC_GAIN SENTENCE_WEIGHT", float, 0, 1),
        ("EMA_DECAY", float, 0, 0.99999),
        ("WEIGHT_DECAY RANDOM_EQ_DB RANDOM_GAIN_DB", float, 0, 30),
        ("LEARNING_RATE GRADIENT_CLIP", float, 1e-12, 1e30),
        ("LR_DECAY", float, 0.001, 1),
        ("LR_FACTOR", float, 0.001, 0.999),
    ]
    for names, kind, least, most in rules:
        for name in names.split():
            value = globals().get(name)
            if type(value) not in (int, kind) or not least <= value <= most:
                number = "a whole number" if kind is int else "a number"
                raise_wrong_constant(name, f"{number} from {least} to {most}")


def check_constants() -> None:
    """Raises UserError for a constant that is missing, or of the wrong type or range."""
    check_numbers()
    for name in ("MEL_DIR", "OUTPUT_DIR", "SPLIT", "DEVICE", "START_FROM"):
        may_be_empty = name == "START_FROM"
        if type(globals().get(name)) is not str or not (globals()[name] or may_be_empty):
            raise_wrong_constant(name, "a text in quotes")
    for name in ("WEIGHTED_SAMPLING", "ADD_FLOOR", "RESUME"):
        if type(globals().get(name)) is not bool:
            raise_wrong_constant(name, "True or False")
    if globals().get("AMP") not in ("auto", "off"):
        raise_wrong_constant("AMP", '"auto" or "off"')
    if 2 * HIDDEN % HEADS:
        raise_wrong_constant("HEADS", f"a divisor of 2 * HIDDEN, {2 * HIDDEN}")
    if not all_positive_ints(globals().get("CHANNELS"), 4):
        raise_wrong_constant("CHANNELS", "four whole numbers, one for each block")
    strides = globals().get("STRIDES")
    is_list = isinstance(strides, tuple | list) and len(strides) == 4
    if not is_list or not all(all_positive_ints(pair, 2) for pair in strides):
        raise_wrong_constant("STRIDES", "four pairs of whole numbers, one for each block")
    if Path(MEL_DIR).resolve() == Path(OUTPUT_DIR).resolve():
        raise_wrong_constant("OUTPUT_DIR", "another folder than MEL_DIR")
    if START_FROM and Path(START_FROM).resolve().parent == Path(OUTPUT_DIR).resolve():
        raise_wrong_constant("START_FROM", "outside OUTPUT_DIR, where new files take its place")


def raise_wrong_constant(name: str, words: str) -> None:
    """Raises UserError for a constant, or one that is missing, with what it must be."""
    value = f"= {globals()[name]!r}" if name in globals() else "is missing"
    raise UserError(f"{name} {value} at the top of cremad_custom2.py: must be {words}.")


def all_positive_ints(values: Any, n: int) -> bool:
    """Whether values are a tuple or list of n whole numbers, each at least 1."""
    if not isinstance(values, tuple | list) or len(values) != n:
        return False
    return all(type(value) is int and value >= 1 for value in values)


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


def read_mel_config(mel_dir: Path) -> tuple[dict, int | None]:
    """mel_config.json: the six mel settings, and how many originals a finished run left."""
    path = mel_dir / "mel_config.json"
    if not mel_dir.is_dir():
        raise UserError(
            f"MEL_DIR = {MEL_DIR!r} is no folder: run mel_generator.py first, or name its "
            "--output_dir."
        )
    if not path.is_file():
        raise UserError(
            f"MEL_DIR = {MEL_DIR!r} holds no mel_config.json: name mel_generator.py's --output_dir."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        settings = {name: config[name] for name in MEL_SETTINGS}
        wrong = wrong_mel_settings(settings)
        n_originals = config.get("n_originals")
        if type(n_originals) not in (int, type(None)):
            wrong = f"n_originals is {n_originals!r}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        raise UserError(
            f"{path} does not tell the mel settings ({wrong}): MEL_DIR must be the --output_dir of "
            "mel_generator.py."
        )
    return settings, n_originals


def list_clips(mel_dir: Path) -> pd.DataFrame:
    """A row for each spectrogram: path, stem, variant, actor, emotion; sorted by path."""
    rows = []
    paths = [path for code in EMOTIONS for path in sorted(mel_dir.glob(f"{code}/*.npy"))]
    for path in paths:
        if path.name.startswith("._"):  # macOS's notes
            continue
        variant = next((v for v in VARIANT_NAMES if path.stem.endswith(f"_{v}")), None)
        if variant is None:
            raise UserError(
                f"{path}: the name ends in no variant ({', '.join(VARIANT_NAMES)}): move it out of "
                "MEL_DIR."
            )
        stem = path.stem.removesuffix(f"_{variant}")
        # macOS writes an accent as a letter of its own: one voice must not be two actors.
        actor = unicodedata.normalize("NFC", stem.split("_")[0])
        rows.append((path, stem, variant, actor, path.parent.name))
    if not rows:
        raise UserError(
            f"MEL_DIR = {MEL_DIR!r} holds no EMO/*.npy: run mel_generator.py with --output_dir "
            f'"{MEL_DIR}"'
        )
    return pd.DataFrame(rows, columns=["path", "stem", "variant", "actor", "emotion"])


def print_unfinished_note(clips: pd.DataFrame, n_originals: int | None) -> None:
    """Says so if MEL_DIR is not what a finished run of mel_generator.py left."""
    n_found = int((clips.variant == "original").sum())
    if n_originals is None:
        print(
            f"Note: {MEL_DIR} has {count(n_found, 'original')}, and no run of mel_generator.py has "
            "finished there: if one was interrupted, run it again."
        )
    elif n_found != n_originals:
        print(
            f"Note: {MEL_DIR} has {count(n_found, 'original')}, mel_generator.py left "
            f"{n_originals:,}: run it again, or go on if that is intended."
        )


def split_evenly(groups: pd.Series, emotions: pd.Series, seed: int) -> np.ndarray:
    """Splits clips 70/15/15 by whole groups (actors), with emotion shares as equal as possible.

    Of 100 seeded orders of the groups, takes the one whose parts' emotion shares differ least
    from the whole's. Returns "train", "val" or "test" for each clip.
    """
    names, group = np.unique(groups, return_inverse=True)
    n_held_out = max(1, round(0.15 * len(names)))
    table = pd.crosstab(group, np.asarray(emotions)).to_numpy(float)  # (groups, emotions)
    whole = table.sum(0) / table.sum()
    best = None
    best_gap = math.inf
    for i in range(100):
        order = np.random.default_rng([seed, i]).permutation(len(names))
        part = np.full(len(names), "train", object)
        part[order[:n_held_out]] = "test"
        part[order[n_held_out : 2 * n_held_out]] = "val"
        counts = np.array([table[part == name].sum(0) for name in ("train", "val", "test")])
        gap = np.abs(counts / counts.sum(1, keepdims=True) - whole).max()
        if gap < best_gap:
            best = part
            best_gap = gap
    return best[group]


def split_from_csv(stems: pd.Series) -> list[str | None]:
    """What the CSV named by SPLIT says of the stems; None for clips that it does not name."""
    try:
        rows = read_csv(Path(SPLIT))
        named = [(unicodedata.normalize("NFC", row["stem"]), row["split"]) for row in rows]
    except (OSError, KeyError) as error:
        raise UserError(
            f'SPLIT = {SPLIT!r} is neither "actor" nor "clip", nor a CSV with the columns '
            f"stem,split ({error})."
        ) from error
    parts = dict(named)
    if wrong := sorted(set(parts.values()) - {"train", "val", "test"}):
        raise UserError(f"SPLIT = {SPLIT!r}: split is {wrong[0]!r}: must be train, val or test.")
    if len(parts) < len(named):
        [(stem, _)] = Counter(stem for stem, _ in named).most_common(1)
        raise UserError(f"SPLIT = {SPLIT!r}: {stem} is listed twice.")
    stems = [unicodedata.normalize("NFC", stem) for stem in stems]
    absent = len(parts.keys() - set(stems))
    unnamed = len(set(stems) - parts.keys())
    print(
        f"Split {SPLIT}: {absent} of its {count(len(parts), 'stem')} have no spectrogram; "
        f"{count(unnamed, 'clip')} that it does not name are left out."
    )
    return [parts.get(stem) for stem in stems]


def check_speakers(actors: pd.Series) -> None:
    """Raises UserError where clips of one speaker might come to different parts."""
    n_unknown = (actors == "unknown").sum()
    if n_unknown:
        raise UserError(
            f'SPLIT = "actor", but of {count(n_unknown, "clip")} the speaker is unknown: add a '
            'column speaker to the table of --labels, or set SPLIT = "clip", which is optimistic.'
        )
    names = actors.drop_duplicates()
    alike = names[names.str.casefold().duplicated(keep=False)]
    if len(alike):
        raise UserError(
            f"MEL_DIR = {MEL_DIR!r} has the speakers {', '.join(alike)}: one voice must not be "
            "two, so write each in one way and run mel_generator.py again."
        )


def assign_split(clips: pd.DataFrame) -> pd.DataFrame:
    """Adds the column `split`, drops what no part uses: variants but the original only train."""
    originals = clips[clips.variant == "original"]
    if SPLIT == "actor":
        check_speakers(originals.actor)
    if SPLIT in ("actor", "clip"):
        groups = originals.actor if SPLIT == "actor" else originals.stem
        if groups.nunique() < 3:
            raise UserError(
                f"MEL_DIR = {MEL_DIR!r} holds {count(groups.nunique(), SPLIT)}: a split by {SPLIT} "
                "needs at least three, one each to train, validate and test."
            )
        part = split_evenly(groups, originals.emotion, SEED)
    else:
        part = split_from_csv(originals.stem)
    clips = clips.assign(split=clips.stem.map(dict(zip(originals.stem, part, strict=True))))
    is_used = clips.split.notna() & ((clips.variant == "original") | (clips.split == "train"))
    clips = clips[is_used].reset_index(drop=True)
    for name in ("train", "val", "test"):
        if not (clips.split == name).any():
            raise UserError(f"SPLIT = {SPLIT!r} leaves no clip to {name}: each part needs some.")
    n_train = (clips.split == "train").sum()
    if n_train < BATCH_SIZE * WORLD_SIZE:
        each = f" in each of {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""
        raise UserError(
            f"BATCH_SIZE = {BATCH_SIZE}{each}, but there are {n_train} spectrograms to train on: "
            "lower BATCH_SIZE."
        )
    return clips


def read_spectrogram(path: Path, n_mels: int) -> np.ndarray:
    """One .npy, float32 (frames, mel bands); UserError for what the generator never made."""
    fix = "delete it and run mel_generator.py again."
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")
        with path.open("rb") as file:
            mel = np.lib.format.read_array(file, allow_pickle=False)
    except OSError:  # the disk's fault, not the file's
        raise
    except Exception as error:  # bytes from anywhere make the header's parser raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a complete .npy file ({reason}): {fix}") from error
    if mel.dtype != np.float32 or mel.ndim != 2 or len(mel) != n_mels or not mel.size:
        raise UserError(
            f"{path} holds {mel.dtype} {mel.shape}, not float32 ({n_mels}, frames) as "
            f"mel_config.json says: {fix}"
        )
    if not np.isfinite(mel).all():
        raise UserError(f"{path} holds numbers that are not finite: {fix}")
    return mel.T


def memory_limit() -> float:
    """Bytes of memory that this process may use: the machine's or, if less, its container's."""
    limits = [math.inf]
    with contextlib.suppress(AttributeError, ValueError):  # Windows does not tell
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(limits)


def allocate_frames(n_frames: int, n_mels: int) -> np.ndarray:
    """Float32 (n_frames, n_mels): in memory or, if that took half of it, in a file without name."""
    n_bytes = 4 * n_frames * n_mels
    if n_bytes < memory_limit() / 2 / LOCAL_WORLD_SIZE:
        return np.empty((n_frames, n_mels), np.float32)
    file = tempfile.TemporaryFile(dir=OUTPUT_DIR)  # noqa: SIM115  the array keeps it open
    if hasattr(os, "posix_fallocate"):  # a disk that fills up later would end the process at once
        os.posix_fallocate(file.fileno(), 0, n_bytes)
    return np.memmap(file, np.float32, "r+", shape=(n_frames, n_mels))


class Spectrograms:
    """All spectrograms end to end in one tensor: a batch is one gather, no loader is needed.

    frames: float32 (all frames, mel bands), dB; start, length, label: int64 (clips,), on the CPU.
    indices: {"train", "val", "test"}: the numbers of a part's clips. varies: bool (mel bands,),
    False for bands that are constant. n_cut: frames past MAX_WIDTH, (clips,). frame_rate: frames
    a second.
    """

    def __init__(
        self, clips: pd.DataFrame, mel_config: dict, normalization: dict | None = None
    ) -> None:
        n_mels = mel_config["n_mels"]
        self.frame_rate = mel_config["sample_rate"] / mel_config["hop_length"]
        self.indices = {
            part: torch.from_numpy(np.flatnonzero(clips.split == part))
            for part in ("train", "val", "test")
        }
        self.label = torch.tensor([list(EMOTIONS).index(code) for code in clips.emotion])
        self.n_sentences, self.sentence = number_sentences(clips)
        capacity = sum(path.stat().st_size for path in clips.path) // (4 * n_mels)
        frames = allocate_frames(capacity, n_mels)
        lengths = []
        n_cut = []
        n_frames = 0
        for path in tqdm(clips.path, "Reading", unit="file", leave=False, disable=RANK > 0):
            mel = read_spectrogram(path, n_mels)
            kept = mel[:MAX_WIDTH]
            frames[n_frames : n_frames + len(kept)] = kept
            n_frames += len(kept)
            lengths.append(len(kept))
            n_cut.append(len(mel) - len(kept))
        self.frames = torch.from_numpy(frames[:n_frames])
        self.length = torch.tensor(lengths)
        self.start = self.length.cumsum(0) - self.length
        self.n_cut = torch.tensor(n_cut)
        originals = np.flatnonzero((clips.split == "train") & (clips.variant == "original"))
        mels = [self.clip(i) for i in originals]
        actors = clips.actor.to_numpy()[originals]
        self.level = usual_range([clip_level(mel.numpy()) for mel in mels], actors)
        self.distance = usual_range([clip_distance(mel.numpy()) for mel in mels], actors)["high"]
        self.floor = usual_floor(mels)
        self.measured, self.varies = self.measure_bands()
        # A model to fine-tune expects its own normalisation.
        self.normalization = self.measured if normalization is None else normalization

    def clip(self, i: int) -> Tensor:
        """One clip, dB (frames, mel bands)."""
        return self.frames[self.start[i] : self.start[i] + self.length[i]]

    def part(self, name: str) -> list[Tensor]:
        """The clips of "train", "val" or "test", normalised."""
        return [normalize(self.clip(i), self.normalization) for i in self.indices[name]]

    def labels(self, name: str) -> Tensor:
        """The emotions of a part's clips: int64 (clips,), in the order of EMOTIONS."""
        return self.label[self.indices[name]]

    def measure_bands(self) -> tuple[dict[str, list[float]], Tensor]:
        """The checkpoint's `normalization`, of the training clips, and which mel bands vary.

        With ADD_FLOOR, mean and deviation are those of the clips over the floor. A band without an
        STFT bin is constant: it gets deviation 1.
        """
        train = self.indices["train"]
        n_mels = self.frames.shape[1]
        measured = {"mean": [0.0] * n_mels, "std": [1.0] * n_mels}
        if ADD_FLOOR:
            measured["floor"] = self.floor
        total = torch.zeros(n_mels, dtype=torch.float64)
        squares = torch.zeros_like(total)
        for i in tqdm(train, "Measuring", unit="clip", leave=False, disable=RANK > 0):
            mel = normalize(self.clip(i), measured).double()
            total += mel.sum(0)
            squares += mel.square().sum(0)
        n_frames = self.length[train].sum()
        mean = total / n_frames
        variance = squares / n_frames - mean.square()
        varies = variance > 1e-4
        std = torch.where(varies, variance.sqrt(), 1.0)
        return measured | {"mean": mean.tolist(), "std": std.tolist()}, varies

    def to_gpu_if_it_fits(self, device: torch.device) -> None:
        """Moves all frames to a GPU of which they take less than half; else batch by batch."""
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self.frames.nbytes < free / 2:
                self.frames = self.frames.to(device)

    def batch(
        self, index: Tensor, rate: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Training clips, each at its own speed, padded to a multiple of 8 frames.

        Returns dB (clips, frames, mel bands), lengths on the CPU, labels.
        """
        length = (self.length[index] / rate).ceil().long().clamp(max=MAX_WIDTH)
        # A multiple of 8, so that there are few different widths: oneDNN keeps memory for each.
        step = torch.arange(-(-int(length.max()) // 8) * 8)
        source = (step * rate[:, None]).long().minimum(self.length[index, None] - 1)
        source += self.start[index, None]
        x = self.frames[source.to(self.frames.device)].to(device)
        return x, length, self.label[index].to(device)


def number_sentences(clips: pd.DataFrame) -> tuple[int, Tensor]:
    """How many sentences the training clips' names tell, and each clip's, int64 (clips,); else -1.

    The sentence is a name's second field, as in 1001_DFA_ANG_XX. 0 sentences if a training clip
    has none, or unless 2 to 100 of them are spoken by at least three speakers each.
    """
    sentence = clips.stem.str.split("_").str.get(1)
    is_train = clips.split == "train"
    speakers = clips[is_train].groupby(sentence[is_train]).actor.nunique()
    number = speakers.index.get_indexer(sentence)
    is_shared = 2 <= len(speakers) <= 100 and speakers.min() >= 3 and (number[is_train] >= 0).all()
    return len(speakers) if is_shared else 0, torch.from_numpy(number)


def usual_range(values: list[float], actors: np.ndarray) -> dict[str, float]:
    """Median of the training originals' values in dB, and the range that is usual.

    `low` and `high` are the lowest and highest speaker's median, at least 8 dB from the median.
    The checkpoint's `level` is of clip_level; its `distance` is the `high` of clip_distance.
    """
    median = float(np.median(values))
    by_speaker = pd.Series(values).groupby(actors).median()
    low = min(float(by_speaker.min()), median - 8)
    high = max(float(by_speaker.max()), median + 8)
    return {"median": round(median, 2), "low": round(low, 2), "high": round(high, 2)}


def usual_floor(mels: list[Tensor]) -> list[float]:
    """The checkpoint's `floor`: each mel band's median noise floor, dB, of (frames, mel bands)."""
    floors = [noise_floor(mel[None], torch.tensor([len(mel)])) for mel in mels]
    return np.median(torch.cat(floors).numpy(), axis=0).tolist()


# --------------------------------------------------------------------------------------
# Augmentation


def draw_epoch(data: Spectrograms, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One epoch's batches: clip numbers and a random rate of speed for each, (batches, clips) both.

    First the weighted draw, each emotion as often; then clips of like length at their rates come
    together. Under torchrun a batch is of all processes: each takes every WORLD_SIZEth clip.
    """
    train = data.indices["train"]
    label = data.label[train]
    batch_size = BATCH_SIZE * WORLD_SIZE
    n_drawn = len(train) // batch_size * batch_size  # whole batches: batch norm needs several clips
    if WEIGHTED_SAMPLING:
        class_weight = 1.0 / label.bincount(minlength=len(EMOTIONS)).clamp(min=1)
        drawn = torch.multinomial(class_weight[label], n_drawn, True, generator=generator)
    else:
        drawn = torch.randperm(len(train), generator=generator)[:n_drawn]
    clip = train[drawn]
    rate = torch.exp(SPEED_PERTURB * (2 * torch.rand(n_drawn, generator=generator) - 1))
    order = (data.length[clip] / rate).argsort().view(-1, batch_size)
    order = order[torch.randperm(len(order), generator=generator)]
    return clip[order], rate[order]


def augment_batch(x: Tensor, lengths: Tensor, data: Spectrograms) -> Tensor:
    """Another voice, room, microphone and line for each clip of a batch, and parts of it masked.

    x: dB (B, T, M), anything past each clip's frames. Returns it normalised, zero past them.
    """
    n_clips, n_frames, n_mels = x.shape
    eq = random_eq(n_clips, n_mels)
    is_outer = random_outer_bands(n_clips, n_mels)
    if OTHER_FLOOR:
        x = other_floors(x, lengths)
    x = shift_bands(x)
    if AUTOMATIC_GAIN:
        x = automatic_gain(x, lengths, data.level["median"], round(0.4 * data.frame_rate))
    x = x + eq.to(x.device)[:, None]
    x = x.masked_fill(is_outer.to(x.device)[:, None], SILENCE_DB)
    mask = length_mask(lengths, n_frames)[:, :, None].to(x.device) & data.varies.to(x.device)
    x = normalize(x, data.normalization).masked_fill(~mask, 0.0)
    return spec_augment(x, lengths)


def other_floors(x: Tensor, lengths: Tensor) -> Tensor:
    """Another noise floor, from 60 dB lower to 20 dB higher, for a share of the clips of (B, T, M).

    Three times the clip's own floor is subtracted first, as a noise suppressor does; soft speech
    near the floor is lost with it.
    """
    size = (len(x), 1, 1)
    offset = torch.empty(size).uniform_(-60, 20)
    wobble = 2 * torch.randn(x.shape)
    is_other = torch.rand(size) < OTHER_FLOOR
    floor = noise_floor(x, lengths)[:, None]
    voice = 10 ** (x / 10) - 3 * 10 ** (floor / 10)
    noise = 10 ** ((floor + (offset + wobble).to(x.device)) / 10)
    power = voice.clamp(min=0) + noise
    mixed = 10 * power.log10().clamp(min=SILENCE_DB / 10)
    return torch.where(is_other.to(x.device), mixed, x)


def automatic_gain(x: Tensor, lengths: Tensor, target: float, n_frames: int) -> Tensor:
    """Evens out the level, dB over n_frames, of a share of the clips of (B, T, M), as phones do."""
    size = (len(x), 1)
    strength = torch.empty(size).uniform_(0.5, 1) * (torch.rand(size) < AUTOMATIC_GAIN)
    is_clip = length_mask(lengths.to(x.device), x.shape[1])
    power = (10 ** (x / 10)).mean(2) * is_clip
    window = {"kernel_size": 2 * (n_frames // 2) + 1, "stride": 1, "padding": n_frames // 2}
    mean = F.avg_pool1d(power, **window) / F.avg_pool1d(is_clip.float(), **window).clamp(min=1e-6)
    level = 10 * mean.log10().clamp(min=SILENCE_DB / 10)
    gain = (target - level).clamp(-30, 30) * strength.to(x.device)
    return x + gain[:, :, None]


def shift_bands(x: Tensor) -> Tensor:
    """Moves each clip of (B, T, M) up or down by at most MEL_SHIFT mel bands: another voice."""
    n_mels = x.shape[2]
    shift = torch.randint(-MEL_SHIFT, MEL_SHIFT + 1, (len(x), 1))
    source = (torch.arange(n_mels) + shift).clamp(0, n_mels - 1)  # (B, M)
    return x.gather(2, source[:, None].to(x.device).expand_as(x))


def random_eq(n_clips: int, n_mels: int) -> Tensor:
    """A smooth tone curve and a gain for each clip, dB (clips, mel bands): room and microphone."""
    points = RANDOM_EQ_DB * torch.randn(n_clips, 1, 5)
    curve = F.interpolate(points, size=n_mels, mode="linear", align_corners=True)
    return (curve + RANDOM_GAIN_DB * torch.randn(n_clips, 1, 1))[:, 0]


def random_outer_bands(n_clips: int, n_mels: int) -> Tensor:
    """True at the outer bands of a share NARROW_BAND of the clips: a telephone line."""
    low = 0.15 * torch.rand(n_clips, 1) * n_mels
    high = (0.65 + 0.35 * torch.rand(n_clips, 1)) * n_mels
    band = torch.arange(n_mels)
    is_narrow = torch.rand(n_clips, 1) < NARROW_BAND
    return ((band < low) | (band >= high)) & is_narrow


def spec_augment(x: Tensor, lengths: Tensor) -> Tensor:
    """Sets a random stretch of time and one of mel bands to the mean, in each clip of (B, T, M).

    Source: Park et al., "SpecAugment", arXiv:1904.08779; lighter here, one mask each way.
    """
    n_frames, n_mels = x.shape[1:]
    time_mask = random_span(lengths, TIME_MASK, n_frames).to(x.device)
    mel_mask = random_span(torch.full_like(lengths, n_mels), MEL_MASK, n_mels).to(x.device)
    x = x.masked_fill(time_mask[:, :, None], 0.0)
    return x.masked_fill(mel_mask[:, None, :], 0.0)


def random_span(sizes: Tensor, widest: int, n: int) -> Tensor:
    """True at a random stretch of each clip's own size, at most half of it: (clips, n)."""
    limit = (sizes // 2).clamp(max=widest)
    width = (torch.rand(len(sizes)) * (limit + 1)).floor()
    first = (torch.rand(len(sizes)) * (sizes - width + 1)).floor()
    place = torch.arange(n)
    return (place >= first[:, None]) & (place < (first + width)[:, None])


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
# Training


class TrainedModel(nn.Module):
    """The classifier and, where there are sentences to tell apart, a linear head that names them.

    The head is of use in training alone: it makes the embedding tell what is said from how.
    """

    def __init__(self, classifier: EmotionClassifier, n_sentences: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.sentence_head = None
        if n_sentences:
            self.sentence_head = nn.Linear(classifier.head[0].in_features, n_sentences)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of emotions and, with a head for them, of sentences: (B, classes) each."""
        embedding = self.classifier.encode(x, lengths)
        sentence = None if self.sentence_head is None else self.sentence_head(embedding)
        return self.classifier.head(embedding), sentence


class TrainState:
    """What an epoch changes and last_checkpoint.pth keeps: weights, schedules, history."""

    def __init__(
        self, model_config: dict, device: torch.device, dtype: torch.dtype, n_sentences: int = 0
    ) -> None:
        torch.manual_seed(SEED)
        self.device = device
        self.dtype = dtype
        self.model = EmotionClassifier(**model_config)
        self.trained = TrainedModel(self.model, n_sentences if SENTENCE_WEIGHT else 0)
        self.trained.to(device, memory_format=torch.channels_last)
        self.parallel = self.trained
        if WORLD_SIZE > 1:
            self.parallel = nn.parallel.DistributedDataParallel(self.trained)
        self.ema = torch.optim.swa_utils.AveragedModel(
            self.model, multi_avg_fn=ema_update, use_buffers=True
        )
        for module in self.ema.modules():
            if isinstance(module, nn.LSTM):
                module.flatten_parameters()  # copied one by one: cuDNN would gather them each time
        self.peak_lr = LEARNING_RATE * math.sqrt(WORLD_SIZE)  # Malladi et al., arXiv:2205.10287
        self.optimizer = torch.optim.AdamW(
            self.trained.parameters(), self.peak_lr, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, "max", factor=LR_FACTOR, patience=LR_PATIENCE
        )
        # On a GPU always: autocast copies the LSTM's weights to float16 (pytorch/pytorch#42385).
        is_scaled = device.type == "cuda" and dtype != torch.float32
        self.scaler = torch.amp.GradScaler(device.type, enabled=is_scaled)
        self.history: list[dict] = []
        self.best_epoch = 0

    def parts(self) -> dict:
        """The objects whose state dicts last_checkpoint.pth keeps, by name."""
        names = ("model", "ema", "optimizer", "scheduler", "scaler")
        parts = {name: getattr(self, name) for name in names}
        if self.trained.sentence_head is not None:
            parts["sentence_head"] = self.trained.sentence_head
        return parts

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Loads the weights of a best_model.pth, to fine-tune them."""
        self.model.load_state_dict(weights)
        self.ema.module.load_state_dict(weights)

    def state_dict(self) -> dict:
        """Everything that the next epoch depends on."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {"history": self.history, "best_epoch": self.best_epoch}
        return state | {"dtype": dtype_name(self.dtype), "device_type": self.device.type}

    def load_state_dict(self, state: dict) -> None:
        """Restores what state_dict returned."""
        for name, part in self.parts().items():
            if state[name]:  # a gradient scaler that is off has nothing to tell
                part.load_state_dict(state[name])
        self.history = state["history"]
        self.best_epoch = state["best_epoch"]

    def is_finished(self) -> bool:
        """Whether EPOCHS or PATIENCE ends the training."""
        accuracies = [row["val_accuracy"] for row in self.history]
        n_since_best = accuracies[::-1].index(max(accuracies)) if accuracies else 0
        return len(accuracies) >= EPOCHS or n_since_best >= PATIENCE

    def warm_up(self, epoch: int, share: float) -> None:
        """Sets the learning rate after a share of an epoch, in the first ones."""
        if epoch <= WARMUP_EPOCHS:
            progress = (epoch - 1 + share) / WARMUP_EPOCHS
            self.optimizer.param_groups[0]["lr"] = self.peak_lr * progress

    def step(self, row: dict, n_val: int) -> bool:
        """Takes an epoch's row of the history; lowers the learning rate; whether to keep its model.

        Kept is the latest epoch within one standard error of the best accuracy on n_val clips:
        a few validating speakers cannot tell these apart, and the learning rate has fallen since.
        """
        self.history.append(row)
        if row["epoch"] > WARMUP_EPOCHS:
            self.scheduler.step(row["val_accuracy"])
        if row["epoch"] > DECAY_AFTER:
            self.optimizer.param_groups[0]["lr"] *= LR_DECAY
        best = max(row["val_accuracy"] for row in self.history)
        error = math.sqrt(best * (1 - best) / n_val)
        is_kept = row["val_accuracy"] >= best - error
        if is_kept:
            self.best_epoch = row["epoch"]
        return is_kept


@torch.no_grad()
def ema_update(ema: list[Tensor], weights: list[Tensor], n: Tensor) -> None:
    """One step of the moving average; the first ones forget faster, to lose the random start."""
    share = 1 - ((1 + n) / (10 + n)).clamp(max=EMA_DECAY)
    for mean, value in zip(ema, weights, strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, share)
        else:
            mean.copy_(value)


def pick_device() -> torch.device:
    """The device of DEVICE; raises UserError where it cannot compute."""
    name = DEVICE
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and WORLD_SIZE > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no GPU")
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        try_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f'DEVICE = {DEVICE!r} cannot be used here ({reason}): must be "auto", "cpu", "cuda" '
            'or, with several GPUs, "cuda:1".'
        ) from error
    return device


def pick_dtype(device: torch.device) -> torch.dtype:
    """What training multiplies in: by AMP and what the device does faster."""
    if AMP == "off":
        return torch.float32
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    features = torch.cpu.get_capabilities()
    has_bfloat16 = features.get("amx_bf16") or features.get("avx512_bf16")
    return torch.bfloat16 if has_bfloat16 and bfloat16_is_faster() else torch.float32


def bfloat16_is_faster() -> bool:
    """Tries a product on this CPU: Intel's without AMX have bfloat16 at half of float32's speed."""
    fastest = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(5):  # the fastest of five: what else runs here costs time too
        for dtype in fastest:
            x = torch.ones(512, 1024, dtype=dtype)
            started = time.perf_counter()
            F.linear(x, x)
            fastest[dtype] = min(time.perf_counter() - started, fastest[dtype])
    return fastest[torch.bfloat16] < 0.8 * fastest[torch.float32]


def choose_dtype(device: torch.device, progress: dict | None) -> torch.dtype:
    """The dtype of the training that is resumed, on the same type of device; else pick_dtype's."""
    if progress and progress["device_type"] == device.type:
        return getattr(torch, progress["dtype"])
    dtype = pick_dtype(device)
    if progress:
        before = f"{progress['dtype']} on {progress['device_type']}"
        print(f"Note: so far in {before}, now in {dtype_name(dtype)} on {device.type}.")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without "torch.": float32, bfloat16 or float16."""
    return str(dtype).removeprefix("torch.")


def join_processes(device: torch.device) -> None:
    """Under torchrun: brings its processes together; all but rank 0 are silent."""
    if WORLD_SIZE == 1:
        return
    has_nccl = device.type == "cuda" and torch.distributed.is_nccl_available()  # Windows has none
    torch.distributed.init_process_group(
        "nccl" if has_nccl else "gloo",
        timeout=datetime.timedelta(days=1),  # the others wait while rank 0 validates and reports
        device_id=device if has_nccl else None,
    )
    if RANK > 0:
        sys.stdout = SteadyStream(None)


def on_rank_0(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function on rank 0 alone; every rank gets what it returns."""
    value = [function(*arguments) if RANK == 0 else None]
    if WORLD_SIZE > 1:
        torch.distributed.broadcast_object_list(value)
    return value[0]


def leave_processes() -> None:
    """Under torchrun: ends this process once all have come here."""
    if WORLD_SIZE > 1:
        torch.distributed.barrier()  # a process that left while rank 0 writes would end them all
        sys.stdout.flush()
        os._exit(0)  # with nothing taken down: there Gloo's threads abort now and then


def train_epoch(state: TrainState, data: Spectrograms, epoch: int) -> tuple[float, float]:
    """One pass over the training draw; returns mean loss and accuracy."""
    seed = SEED * 100_003 + epoch  # an epoch depends on its number alone: resuming repeats it
    batches, rates = draw_epoch(data, torch.Generator().manual_seed(seed))
    own = list(zip(batches[:, RANK::WORLD_SIZE], rates[:, RANK::WORLD_SIZE], strict=True))
    torch.manual_seed(seed + 15_485_863 * RANK)  # each rank augments in its own way
    total = torch.zeros(2, device=state.device)  # loss, right answers
    state.model.train()
    bar = tqdm(own, f"Epoch {epoch}", unit="batch", leave=False, disable=RANK > 0)
    for step, (index, rate) in enumerate(bar, start=1):
        state.warm_up(epoch, step / len(own))
        x, lengths, label = data.batch(index, rate, state.device)
        x = augment_batch(x, lengths, data)
        sentence = data.sentence[index].to(state.device)
        total += train_step(state, x, lengths, label, sentence)
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(total)
    loss, n_right = total.tolist()
    return loss / len(own) / WORLD_SIZE, n_right / batches.numel()


def train_step(
    state: TrainState, x: Tensor, lengths: Tensor, label: Tensor, sentence: Tensor
) -> Tensor:
    """One step of the optimizer; returns loss and number of right answers, (2,), on the device."""
    is_mixed = state.dtype != torch.float32
    with torch.autocast(state.device.type, state.dtype if is_mixed else None, enabled=is_mixed):
        logits, sentence_logits = state.parallel(x, lengths)
    loss = F.cross_entropy(logits.float(), label, label_smoothing=LABEL_SMOOTHING)
    total = loss
    if sentence_logits is not None:
        total = loss + SENTENCE_WEIGHT * F.cross_entropy(sentence_logits.float(), sentence)
    state.scaler.scale(total).backward()
    state.scaler.unscale_(state.optimizer)
    nn.utils.clip_grad_norm_(state.trained.parameters(), GRADIENT_CLIP)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    state.ema.update_parameters(state.model)
    n_right = (logits.argmax(1) == label).sum()
    return torch.stack([loss.detach(), n_right])  # .item() would wait for the GPU


def fit(state: TrainState, data: Spectrograms, config: dict) -> None:
    """Trains epoch by epoch until the end; after each, all that it takes to go on is on disk."""
    while not state.is_finished():
        epoch = len(state.history) + 1
        started = time.perf_counter()
        loss, accuracy = train_epoch(state, data, epoch)
        if not math.isfinite(loss):
            raise UserError(
                f"The training loss is {loss} in epoch {epoch}: lower LEARNING_RATE "
                f'({LEARNING_RATE:g}), or set AMP = "off", and start anew. What is in {OUTPUT_DIR} '
                "is from the epochs before."
            )
        seconds = time.perf_counter() - started
        row, temperature = on_rank_0(validate, state, data, loss, accuracy, seconds)
        is_kept = state.step(row, len(data.indices["val"]))
        if RANK == 0:
            if is_kept:
                save_best_model(state, data, config, temperature)
            save_progress(state, config)
            print_epoch(row, is_kept, time.perf_counter() - started)


# --------------------------------------------------------------------------------------
# Evaluation


def predict_logits(
    model: EmotionClassifier, mels: list[Tensor], batch_size: int, device: torch.device
) -> Tensor:
    """Float32 logits (clips, classes), on the CPU, of normalised log-mels (frames, mel bands)."""
    return head_logits(model, encode_clips(model, mels, batch_size, device), device)


def validate(
    state: TrainState, data: Spectrograms, loss: float, accuracy: float, seconds: float
) -> tuple[dict, float]:
    """The history's row for an epoch that took `seconds` to train, and the temperature."""
    model = state.ema.module
    logits = predict_logits(model, data.part("val"), BATCH_SIZE, state.device)
    label = data.labels("val")
    batch_size = BATCH_SIZE * WORLD_SIZE
    n_drawn = len(data.indices["train"]) // batch_size * batch_size
    row = {
        "epoch": len(state.history) + 1,
        "train_loss": loss,
        "train_accuracy": accuracy,
        "val_loss": float(F.cross_entropy(logits, label)),
        "val_accuracy": float((logits.argmax(1) == label).float().mean()),
        "val_uar": uar(label, logits.argmax(1)),
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "seconds": round(seconds, 2),
        "train_clips_per_s": round(n_drawn / seconds, 1),
    }
    return row, fit_temperature(logits, label)


def uar(true: Tensor, predicted: Tensor) -> float:
    """Unweighted average recall: the mean over the classes that occur of the share found."""
    recalls = [(predicted[true == c] == c).float().mean().item() for c in true.unique()]
    return float(np.mean(recalls))


def reliability(probabilities: Tensor, label: Tensor, n_bins: int) -> pd.DataFrame:
    """Mean confidence, accuracy and share of all clips, for each bin of confidence with clips.

    probabilities: (clips, classes); label: (clips,); bins of equal width.
    """
    confidence, predicted = (values.numpy() for values in probabilities.max(1))
    is_right = predicted == label.numpy()
    table = pd.DataFrame({"confidence": confidence, "accuracy": is_right}, dtype=float)
    bin_number = (table.confidence * n_bins).astype(int).clip(upper=n_bins - 1)
    groups = table.groupby(bin_number.to_numpy())
    return groups.mean().assign(share=groups.size() / len(label))


def calibration_error(probabilities: Tensor, label: Tensor) -> float:
    """Expected calibration error, 0 to 1, of the top label, 15 equal bins.

    Source: Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599.
    """
    table = reliability(probabilities, label, 15)
    return float((table.share * (table.accuracy - table.confidence).abs()).sum())


def fit_temperature(logits: Tensor, label: Tensor) -> float:
    """The divisor of the logits that makes the labels most likely, of 401 from 0.1 to 10 (Guo)."""
    candidates = torch.logspace(-1, 1, 401).tolist()
    return min(candidates, key=lambda t: float(F.cross_entropy(logits / t, label)))


def uar_interval(true: Tensor, predicted: Tensor, actors: np.ndarray) -> list[float] | None:
    """95 % interval of the UAR, low and high, by 1,000 bootstrap draws of actors; None for one."""
    names = np.unique(actors)
    if len(names) == 1:
        return None
    random = np.random.default_rng(SEED)
    rows = {name: torch.from_numpy(np.flatnonzero(actors == name)) for name in names}
    values = []
    for _ in range(1000):
        drawn = torch.cat([rows[name] for name in random.choice(names, len(names))])
        values.append(uar(true[drawn], predicted[drawn]))
    return np.percentile(values, [2.5, 97.5]).tolist()


def compute_metrics(logits: Tensor, label: Tensor, actors: np.ndarray, temperature: float) -> dict:
    """The figures of metrics.json for validation or test."""
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


def save_figure(figure: Figure, path: Path, dpi: int = 200) -> None:
    """Writes a figure as a PNG, atomically."""
    with warnings.catch_warnings(), atomic_write(path) as file:
        warnings.simplefilter("ignore")  # names may hold letters that the font lacks
        figure.savefig(file, format="png", dpi=dpi, pil_kwargs={"compress_level": 1})


def plot_history(path: Path, history: list[dict], best_epoch: int) -> None:
    """Loss, accuracy and learning rate over the epochs, the one that was kept marked."""
    table = pd.DataFrame(history).set_index("epoch")
    figure = Figure(figsize=(3.5, 6.5), layout="constrained")
    loss, accuracy, rate = figure.subplots(3, 1, sharex=True)
    loss.plot(table.train_loss, ".-", color=BLUE, label="training (smoothed labels)")
    loss.plot(table.val_loss, ".-", color=ORANGE, label="validation")
    loss.set_ylabel("Cross-entropy (nats)")
    accuracy.plot(100 * table.train_accuracy, ".-", color=BLUE, label="training accuracy")
    accuracy.plot(100 * table.val_accuracy, ".-", color=ORANGE, label="validation accuracy")
    accuracy.plot(100 * table.val_uar, ".:", color="black", label="validation UAR")
    accuracy.set_ylabel("Accuracy, UAR (%)")
    rate.plot(1e4 * table.learning_rate, ".-", color=BLUE, label="learning rate")
    rate.set(xlabel="Epoch", ylabel="Learning rate ($10^{-4}$)")
    for axes in (loss, accuracy, rate):
        axes.axvline(best_epoch, color=GREY, linestyle="--", linewidth=1, label="epoch kept")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=7)
    save_figure(figure, path)


def plot_bars(
    axes: Any, groups: Iterable[str], is_right: pd.Series, order: list[str] | None
) -> None:
    """Accuracy (%) by group, with 95 % intervals; order: the groups' order, or None: sorted.

    Source of the intervals: Wilson, JASA 22(158), 1927; clips taken as independent.
    """
    table = is_right.astype(float).groupby(np.asarray(groups)).agg(["mean", "size"])
    table = table.sort_values("mean") if order is None else table.reindex(order).dropna()
    share = table["mean"]
    n = table["size"]
    z = 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    below = (share - middle + reach).clip(lower=0)
    above = (middle + reach - share).clip(lower=0)
    place = np.arange(len(table))
    style = {"color": BLUE, "ecolor": GREY, "width": min(0.8, len(table) / 8)}
    axes.bar(place, 100 * share, yerr=100 * np.array([below, above]), **style)
    names = [os.fsencode(name).decode("utf-8", "replace") for name in table.index]
    counts = [f"\n({size:.0f})" if order else "" for size in n]
    labels = [name + text for name, text in zip(names, counts, strict=True)]
    axes.set_xticks(place, labels, parse_math=False)
    axes.set(ylabel="Accuracy (%)", ylim=(0, 100))


def intensities(stems: pd.Series) -> list[str]:
    """What file names tell of the intensity in their fourth field."""
    names = {"LO": "low", "MD": "medium", "HI": "high"}
    fields = stems.str.upper().str.split("_").str.get(3)  # NaN where there is none
    return [names.get(field, "unspecified") for field in fields]


def plot_reliability(axes: Any, logits: Tensor, label: Tensor, temperature: float) -> None:
    """Confidence against accuracy, before and after the temperature."""
    before = 100 * reliability(logits.softmax(1), label, 10)
    after = 100 * reliability((logits / temperature).softmax(1), label, 10)
    axes.plot(before.confidence, before.accuracy, "o:", color="#E69F00", label="before temperature")
    axes.plot(after.confidence, after.accuracy, "o-", color=BLUE, label="after temperature")
    axes.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1)
    axes.set(xlabel="Confidence (%)", ylabel="Accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    axes.legend(fontsize=8, loc="lower right")


def plot_report(
    path: Path, table: pd.DataFrame, logits: Tensor, label: Tensor, temperature: float
) -> None:
    """test_report.png: accuracy by actor and by intensity; confidence against accuracy."""
    is_right = table.true_class == table.predicted_class
    accuracy = 100 * is_right.mean()
    intensity = intensities(table.stem)
    below = ["reliability"] if set(intensity) == {"unspecified"} else ["intensity", "reliability"]
    figure = Figure(figsize=(7, 5.6), layout="constrained")
    panels = figure.subplot_mosaic([["actor"] * len(below), below])
    plot_bars(panels["actor"], table.actor, is_right, None)
    panels["actor"].axhline(accuracy, color=ORANGE, linestyle="--")
    panels["actor"].tick_params(axis="x", rotation=90 if table.actor.nunique() > 12 else 0)
    panels["actor"].set_xlabel("Test actor")
    panels["actor"].set_title(f"Dashed: all test clips, {accuracy:.1f} %", fontsize=9)
    if "intensity" in panels:
        order = ["low", "medium", "high", "unspecified"]
        plot_bars(panels["intensity"], intensity, is_right, order)
        panels["intensity"].set_xlabel("Intensity (clips)")
    plot_reliability(panels["reliability"], logits, label, temperature)
    for letter, axes in zip("abc", panels.values(), strict=False):
        axes.set_title(letter, loc="left", fontweight="bold")
    save_figure(figure, path)


def most_confident_mistakes(table: pd.DataFrame, n: int = 10) -> list[dict]:
    """The wrong answers given with most confidence: stem, true and predicted class, confidence."""
    table = table.assign(confidence=table[list(EMOTIONS.values())].max(axis=1))
    wrong = table[table.true_class != table.predicted_class].nlargest(n, "confidence")
    return wrong[["stem", "true_class", "predicted_class", "confidence"]].to_dict("records")


def predictions_table(
    clips: pd.DataFrame, data: Spectrograms, logits: Tensor, temperature: float
) -> pd.DataFrame:
    """test_predictions.csv: stem, actor, true and predicted class, probabilities."""
    names = list(EMOTIONS.values())
    index = data.indices["test"]
    table = clips.loc[index.numpy(), ["stem", "actor"]]
    table["true_class"] = [names[i] for i in data.label[index]]
    table["predicted_class"] = [names[i] for i in logits.argmax(1)]
    table[names] = (logits.double() / temperature).softmax(1).numpy().round(6)
    return table


def write_test_report(output_dir: Path, table: pd.DataFrame, metrics: dict) -> None:
    """Writes metrics.json, test_predictions.csv, report and confusion matrix."""
    from sklearn.metrics import classification_report  # here, because it takes a second to import

    write_text(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_csv(output_dir / "test_predictions.csv", list(table.columns), table.to_dict("records"))
    true, predicted = table.true_class, table.predicted_class
    names = list(EMOTIONS.values())
    occurring = [name for name in names if name in set(true)]
    text = classification_report(true, predicted, labels=occurring, zero_division=0, digits=3)
    write_text(output_dir / "classification_report.txt", text)
    title = f"Test: {count(len(table), 'clip')}, {count(table.actor.nunique(), 'actor')}"
    plot_confusion(output_dir / "confusion_matrix.png", true, predicted, names, title)


def report_training(
    output_dir: Path, data: Spectrograms, clips: pd.DataFrame, state: TrainState, config: dict
) -> None:
    """Figures, predictions and pictures of best_model.pth, read back from its file."""
    model, checkpoint = read_best_model(output_dir / "best_model.pth", state.device)
    temperature = checkpoint["temperature"]
    logits = {}
    metrics: dict[str, Any] = {}
    for part in ("test", "val"):
        logits[part] = predict_logits(model, data.part(part), BATCH_SIZE, state.device)
        actors = clips.actor[clips.split == part].to_numpy()
        metrics[part] = compute_metrics(logits[part], data.labels(part), actors, temperature)
    table = predictions_table(clips, data, logits["test"], temperature)
    path = output_dir / "test_report.png"
    plot_report(path, table, logits["test"], data.labels("test"), temperature)
    metrics |= {
        "best_epoch": checkpoint["epoch"],
        "epochs": len(state.history),
        "split": SPLIT,
        "seed": SEED,
        "device": str(state.device),
        "amp": dtype_name(state.dtype),
        "temperature": temperature,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_training_spectrograms": len(data.indices["train"]),
        "seconds": round(sum(row["seconds"] for row in state.history), 1),
        "most_confident_mistakes": most_confident_mistakes(table),
    }
    write_test_report(output_dir, table, metrics)
    plot_history(output_dir / "training_history.png", state.history, checkpoint["epoch"])
    packages = ("matplotlib", "numpy", "pandas", "scikit-learn", "seaborn", "torch")
    details = {"constants": config, "device": str(state.device), "seconds": metrics["seconds"]}
    write_run_record(output_dir / "run.json", packages, details)
    print_summary(output_dir, metrics, shared_speakers(clips))


def shared_speakers(clips: pd.DataFrame) -> list[str]:
    """Speakers with clips in more than one of train, val and test, in lower case."""
    speaker = clips.actor.str.casefold()
    n_parts = clips.split.groupby(speaker).transform("nunique")
    return sorted(set(speaker[n_parts > 1]) - {"unknown"})


def training_notes(clips: pd.DataFrame, data: Spectrograms) -> list[str]:
    """What makes the figures worth less: few people, absent emotions, few steps, cut clips."""
    notes = []
    if shared := shared_speakers(clips):
        speakers = count(len(shared), "speaker")
        parts = "more than one of training, validation and test"
        notes.append(f"{speakers} with clips in {parts}: optimistic.")
    for part, index in data.indices.items():
        counts = data.label[index].bincount(minlength=len(EMOTIONS))
        if absent := [code for code, n in zip(EMOTIONS, counts, strict=True) if not n]:
            notes.append(f"no clip of {', '.join(absent)} to {part}.")
        n_actors = clips.actor[clips.split == part].nunique()
        if n_actors < 3 and part != "train":
            few = count(n_actors, "actor")
            notes.append(f"{few} to {part}: figures of so few people say little about others.")
    n_steps = len(data.indices["train"]) // (BATCH_SIZE * WORLD_SIZE)
    if n_steps < 20:
        steps = count(n_steps, "step")
        notes.append(f"an epoch has {steps} of BATCH_SIZE {BATCH_SIZE}: lower it, or raise EPOCHS.")
    has_floor = "floor" in data.normalization
    if has_floor != ADD_FLOOR:
        has = "a" if has_floor else "no"
        notes.append(f"ADD_FLOOR does nothing: START_FROM's model was trained with {has} floor.")
    if SENTENCE_WEIGHT and not data.n_sentences:
        notes.append(
            "SENTENCE_WEIGHT does nothing: the names' second field must tell 2 to 100 sentences, "
            "each by at least three of the training speakers."
        )
    if data.n_cut.any():
        share = 100 * data.n_cut.sum() / (data.n_cut + data.length).sum()
        longest = (data.n_cut + data.length).max()
        notes.append(
            f"{(data.n_cut > 0).sum():,} of {count(len(data.length), 'spectrogram')} longer than "
            f"MAX_WIDTH: {share:.1f} % of the frames are cut off; MAX_WIDTH = {longest} keeps all."
        )
    return notes


def print_setup(clips: pd.DataFrame, data: Spectrograms, state: TrainState, config: dict) -> None:
    """Constants, split and device, before the first epoch; and what makes figures worth less."""
    constants = [f"{name} = {config[name]!r}" for name in (*CONSTANTS, "MEL_CONFIG")]
    print(textwrap.fill("  ".join(constants), 100))
    rows = []
    for part in data.indices:
        counts = data.labels(part).bincount(minlength=len(EMOTIONS)).tolist()
        rows.append([part, sum(counts), clips.actor[clips.split == part].nunique(), *counts])
    print(tabulate(rows, headers=["", "spectrograms", "actors", *EMOTIONS]))
    for note in training_notes(clips, data):
        print(f"Note: {note}")
    millions = sum(p.numel() for p in state.model.parameters()) / 1e6
    print(f"{state.device}, {dtype_name(state.dtype)}, {millions:.1f} M parameters.")
    print(
        "Pairs: training, validation. *: saved, as within one standard error of the best.",
        flush=True,
    )


def print_epoch(row: dict, is_kept: bool, seconds: float) -> None:
    """The epoch's line; seconds: what it took with validation and saving."""
    n_left = EPOCHS - row["epoch"]
    left = f"  at most {math.ceil(n_left * seconds / 60)} min left" if n_left else ""
    print(
        f"epoch {row['epoch']:3d}/{EPOCHS}  loss {row['train_loss']:.3f} {row['val_loss']:.3f}  "
        f"accuracy {100 * row['train_accuracy']:4.1f} {100 * row['val_accuracy']:4.1f} %  "
        f"UAR {100 * row['val_uar']:4.1f} %  lr {row['learning_rate']:.1e}  "
        f"{row['seconds']:.0f} s{left}{'  *' if is_kept else ''}",
        flush=True,
    )


def print_summary(output_dir: Path, metrics: dict, shared: list[str]) -> None:
    """The closing lines: figures of best_model.pth, and where everything is."""
    minutes = metrics["seconds"] / 60
    print(
        f"\nEpoch {metrics['best_epoch']} of {metrics['epochs']} kept, {minutes:.1f} minutes of "
        "training. Clips that were not trained on:"
    )
    rows = []
    for part in ("val", "test"):
        figures = metrics[part]
        percent = [f"{100 * figures[key]:.1f} %" for key in ("accuracy", "uar", "macro_f1", "ece")]
        rows.append([part, *percent, figures["n_clips"], figures["n_actors"]])
    print(tabulate(rows, headers=["", "accuracy", "UAR", "macro-F1", "ECE", "clips", "actors"]))
    if metrics["test"]["uar_ci95"]:
        low, high = metrics["test"]["uar_ci95"]
        print(f"Test UAR, 95 % interval over actors: {100 * low:.1f} to {100 * high:.1f} %")
    if SPLIT == "clip" or shared:
        print(
            f"SPLIT = {SPLIT!r} has the same voices in more than one of training, validation and "
            "test: optimistic for others."
        )
    print(f"Files: {output_dir}")
    print(
        "Next:  python custom2_tester.py --input_dir RECORDINGS --output_dir results "
        f'--model_path "{output_dir}/best_model.pth"'
    )


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


def write_run_record(path: Path, packages: Iterable[str], details: dict) -> None:
    """Writes run.json: what it takes to repeat the run."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    record = {"command": sys.argv, "platform": platform.platform()} | details
    record["threads"] = torch.get_num_threads()  # the last digits depend on it
    record["versions"] = {"python": platform.python_version()} | versions
    write_text(path, json.dumps(record, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, atomically."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


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


def read_best_model(path: Path, device: torch.device) -> tuple[EmotionClassifier, dict]:
    """The model of our own best_model.pth in evaluation mode, and the file's dict."""
    checkpoint = read_checkpoint(path)
    model = EmotionClassifier(**checkpoint["model_config"])
    model.load_state_dict(checkpoint["model_state_dict"])
    return model.to(device).eval(), checkpoint


def read_start(clips: pd.DataFrame, mel_config: dict) -> dict | None:
    """The checkpoint that START_FROM names, or None; raises UserError if it does not fit.

    A voice that trained or validated it must not validate or test here.
    """
    if not START_FROM:
        return None
    start = read_checkpoint(Path(START_FROM))
    now = {"format_version": FORMAT_VERSION, "mel_config": mel_config}
    now["model_config"] = model_config(mel_config["n_mels"])
    for name, value in now.items():
        if json.dumps(start.get(name)) != json.dumps(value):  # tuples and lists are alike
            found = str(start.get(name))[:300]
            raise UserError(
                f"START_FROM = {START_FROM!r}: its {name} is {found}, but here {value}: set the "
                "constants, or mel_generator.py's options, to the file's."
            )
    try:
        EmotionClassifier(**now["model_config"]).load_state_dict(start["model_state_dict"])
        speakers = {name for names in start["speakers"].values() for name in names}
        codes = [c["code"] for c in start["classes"]]
        normalize(torch.zeros(1, mel_config["n_mels"]), start["normalization"])  # does it fit?
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"START_FROM = {START_FROM!r} is not a complete model ({error})."
        ) from error
    if codes != list(EMOTIONS):
        raise UserError(f"START_FROM = {START_FROM!r}: its classes are {codes}.")
    folded = {name.casefold() for name in speakers} - {"unknown"}
    actors = set(clips.actor[clips.split != "train"])
    if known := sorted(name for name in actors if name.casefold() in folded):
        raise UserError(
            f"START_FROM = {START_FROM!r} was trained on {', '.join(known)}, who would now "
            "validate or test: let them train, or rename them if they are other people."
        )
    return start


def training_config(
    clips: pd.DataFrame, mel_config: dict, data: Spectrograms, start: dict | None
) -> dict:
    """Constants, mel settings, speakers, hashes of split and data: what a resumed run shares."""
    split = clips[["stem", "variant", "split"]].to_csv(index=False, lineterminator="\n")
    split_bytes = split.encode("utf-8", "surrogateescape")
    bands = [*data.measured.values(), *data.normalization.values()]
    # Rounded: machines differ in the ninth digit.
    rounded = [[round(x, 3) for x in values] for values in bands]
    speakers = {}
    for part in ("train", "val"):
        earlier = start["speakers"].get(part, []) if start else []
        speakers[part] = sorted({*clips.actor[clips.split == part], *earlier})
    return {name: globals()[name] for name in (*CONSTANTS, "EMOTIONS", "WORLD_SIZE")} | {
        "MEL_CONFIG": mel_config,
        "SPEAKERS": speakers,
        "SPLIT_SHA256": hashlib.sha256(split_bytes).hexdigest(),
        "DATA_SHA256": hashlib.sha256(json.dumps(rounded).encode()).hexdigest(),
    }


def model_config(n_mels: int) -> dict:
    """All that the model's constructor takes."""
    return {
        "n_mels": n_mels,
        "n_classes": len(EMOTIONS),
        "channels": CHANNELS,
        "strides": STRIDES,
        "hidden": HIDDEN,
        "heads": HEADS,
        "dropout": DROPOUT,
    }


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """torch.save, atomically, with a full disk told as the OSError that it is."""
    with atomic_write(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            raise OSError(None, f"could not be written (is the disk full?): {error}") from error


def save_progress(state: TrainState, config: dict) -> None:
    """Writes last_checkpoint.pth and history.csv."""
    output_dir = Path(OUTPUT_DIR)
    save_checkpoint(output_dir / "last_checkpoint.pth", state.state_dict() | {"config": config})
    write_csv(output_dir / "history.csv", list(state.history[0]), state.history)


def save_best_model(
    state: TrainState, data: Spectrograms, config: dict, temperature: float
) -> None:
    """Writes best_model.pth: tensors and plain Python values, so that weights_only=True loads it.

    It is made to be given away: no path of this machine, but the speakers, so that nobody tests
    on a voice that trained it.
    """
    split = SPLIT if SPLIT in ("actor", "clip") else "csv"
    left_out = ("MEL_DIR", "OUTPUT_DIR", "START_FROM", "SPEAKERS")
    public = {name: value for name, value in config.items() if name not in left_out}
    checkpoint = {
        "format_version": FORMAT_VERSION,
        "model_state_dict": {k: v.cpu() for k, v in state.ema.module.state_dict().items()},
        "model_config": model_config(config["MEL_CONFIG"]["n_mels"]),
        "mel_config": config["MEL_CONFIG"],
        "normalization": data.normalization,
        "max_width": MAX_WIDTH,
        "classes": [{"code": code, "name": name} for code, name in EMOTIONS.items()],
        "temperature": temperature,
        "level": data.level,
        "floor": data.floor,
        "distance": data.distance,
        "speakers": config["SPEAKERS"],
        "epoch": state.best_epoch,
        "metrics": state.history[-1],
        "training_config": public | {"SPLIT": split},
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
    }
    save_checkpoint(Path(OUTPUT_DIR) / "best_model.pth", checkpoint)


def read_progress(output_dir: Path, config: dict) -> dict | None:
    """What last_checkpoint.pth holds; None if there is none; UserError for different settings."""
    path = output_dir / "last_checkpoint.pth"
    if not path.exists():
        print(f"RESUME = True, but there is no {path} yet: starting with epoch 1.")
        return None
    if not (output_dir / "best_model.pth").exists():
        raise UserError(
            f"RESUME = True, but {output_dir}/best_model.pth is gone: put it back, or set "
            "RESUME = False to start anew."
        )
    progress = read_checkpoint(path)
    before = progress.get("config")
    is_ours = {"model", "ema", "optimizer", "scheduler", "scaler", "history"} <= progress.keys()
    has_dtype = progress.get("dtype") in ("float32", "bfloat16", "float16")
    if not is_ours or not has_dtype or not isinstance(before, dict):
        raise UserError(f"RESUME = True, but {path} is no checkpoint of this script.")
    if changed := changed_settings(before, config):
        raise UserError(
            f"RESUME = True, but {path} is of a training with different settings "
            f"({'; '.join(changed)}): set them back, or name another OUTPUT_DIR."
        )
    print(f"Resuming from {path}, after epoch {len(progress['history'])}.")
    return progress


def changed_settings(before: dict, config: dict) -> list[str]:
    """What of a training's config differs, in words."""
    names = config.keys() - MAY_CHANGE
    changed = sorted(name for name in names if before.get(name) != config[name])
    data = {"SPEAKERS", "SPLIT_SHA256", "DATA_SHA256"}
    told = [f"{n} was {before.get(n)!r}, now {config[n]!r}" for n in changed if n not in data]
    if data & set(changed):
        told.append("the spectrograms in MEL_DIR, or their split, were others")
    return told


def prepare_folder(output_dir: Path, clips: pd.DataFrame, is_resumed: bool) -> None:
    """Clears OUTPUT_DIR of what earlier runs left, and writes split.csv."""
    remove_leftovers(output_dir)
    if not is_resumed:
        move_earlier(output_dir)
    columns = ["stem", "actor", "emotion", "split"]
    rows = clips.drop_duplicates("stem")[columns].to_dict("records")
    write_csv(output_dir / "split.csv", columns, rows)


def move_earlier(output_dir: Path) -> None:
    """Moves an earlier training's files to a new folder, so that nothing destroys them."""
    # fmt: off
    names = ("best_model.pth", "last_checkpoint.pth", "history.csv", "training_history.png",
             "confusion_matrix.png", "classification_report.txt", "test_report.png", "metrics.json",
             "test_predictions.csv", "split.csv", "run.json")
    # fmt: on
    found = [output_dir / name for name in names if (output_dir / name).exists()]
    if not found:
        return
    date = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        folder = output_dir / f"earlier_{date}{suffix}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
    for path in found:
        path.rename(folder / path.name)
    print(f"An earlier training's files are kept in {folder}.")


# --------------------------------------------------------------------------------------
# Main


def usable_cores() -> int:
    """Cores that this process may use, by its affinity and its container's quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # cgroup v2: "max", or a quota and its period
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def parse_args(argv: Sequence[str] | None = None) -> None:
    """No arguments but --help; exits with status 2 for any other."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python cremad_custom2.py", description=__doc__, formatter_class=formatter
    )
    _, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(
            f"{' '.join(unknown)}: there are no arguments. Edit the constants at the top of "
            f"{Path(__file__).name}, from the line '# Constants' on."
        )


def fail(message: str, status: int = 1) -> int:
    """Tells why the run ends; returns the exit status."""
    print(message, file=sys.stderr)
    return status


def train_model() -> int:
    """Reads, splits, trains, reports."""
    check_constants()
    device = pick_device()
    join_processes(device)
    mel_config, n_originals = read_mel_config(Path(MEL_DIR))
    spectrograms = list_clips(Path(MEL_DIR))
    print_unfinished_note(spectrograms, n_originals)
    clips = assign_split(spectrograms)
    output_dir = Path(OUTPUT_DIR)
    output_dir.mkdir(parents=True, exist_ok=True)
    with folder_lock(output_dir) if RANK == 0 else contextlib.nullcontext():
        start = read_start(clips, mel_config)
        data = Spectrograms(clips, mel_config, start["normalization"] if start else None)
        data.to_gpu_if_it_fits(device)
        config = training_config(clips, mel_config, data, start)
        progress = on_rank_0(read_progress, output_dir, config) if RESUME else None
        dtype = on_rank_0(choose_dtype, device, progress)
        state = TrainState(model_config(mel_config["n_mels"]), device, dtype, data.n_sentences)
        if progress:
            state.load_state_dict(progress)
        elif start:
            state.start_from(start["model_state_dict"])
        if RANK == 0:
            prepare_folder(output_dir, clips, is_resumed=bool(progress))
        print_setup(clips, data, state, config)
        fit(state, data, config)
        if RANK == 0:
            report_training(output_dir, data, clips, state, config)
    leave_processes()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the training, and tells errors as sentences; returns the exit status."""
    with steady_streams():
        parse_args(argv)
        # oneDNN keeps memory for every shape that it has met, 1,024 by default: gigabytes.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
        torch.backends.cudnn.allow_tf32 = False  # one answer on CPU and GPU
        try:
            # pyarrow, where it is installed, refuses names that are no UTF-8.
            with pd.option_context("mode.string_storage", "python"):
                return train_model()
        except UserError as error:
            return fail(str(error))
        except (MemoryError, RuntimeError) as error:
            is_gpu = isinstance(error, torch.OutOfMemoryError)
            is_cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
            if not is_gpu and not is_cpu:
                raise
            return fail(
                f"{'The GPU' if is_gpu else 'This machine'}'s memory is full: free some, set "
                f"RESUME = True and run again; or lower BATCH_SIZE ({BATCH_SIZE}), start anew."
            )
        except OSError as error:
            what = f"{error.filename or OUTPUT_DIR}: {error.strerror or error}"
            return fail(f"{what}. Fix this, set RESUME = True and run again.")
        except KeyboardInterrupt:
            return fail("\nStopped. To go on, set RESUME = True and run again.", 130)


if __name__ == "__main__":
    sys.exit(main())
