"""Trains a speech-emotion classifier on the spectrograms of mel_generator.py.

Edit the constants below, then

    python cremad_custom2.py

On a laptop without a GPU, EPOCHS = 5 shows within minutes that all is well. Writes, in OUTPUT_DIR:

    best_model.pth           for custom2_tester.py: the epoch of best validation accuracy
    last_checkpoint.pth      after every epoch: set RESUME = True and run again to go on from it
    history.csv              losses, accuracies, learning rate, seconds of every epoch
    training_history.png, confusion_matrix.png, classification_report.txt
    metrics.json             accuracy, UAR, macro-F1, calibration error, on test and validation
    test_predictions.csv     a row for each test clip; split.csv: who trained, validated, tested

Exit status: 0 finished, 1 had to stop, 2 wrong arguments, 130 Ctrl-C.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

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
STRIDES = ((2, 2), (2, 2), (1, 2), (1, 2))  # (time, mel bands) of the four blocks
HIDDEN = 512  # LSTM units in each direction
HEADS = 8  # of the self-attention
DROPOUT = 0.3
# training
BATCH_SIZE = 64
EPOCHS = 20
LEARNING_RATE = 5e-4
WARMUP_EPOCHS = 1  # the learning rate rises linearly from 0; 0 = off
WEIGHT_DECAY = 0.01
LABEL_SMOOTHING = 0.1  # 0 = off
TIME_MASK = 16  # frames hidden in each training clip, at most; 0 = off
MEL_MASK = 16  # mel bands hidden, at most; 0 = off
GRADIENT_CLIP = 1.0  # norm
LR_FACTOR = 0.5  # of ReduceLROnPlateau
LR_PATIENCE = 2  # epochs without a better validation accuracy before the rate falls
PATIENCE = 8  # epochs without a better validation accuracy before training stops
# system
SEED = 42
RESUME = False  # True: go on from last_checkpoint.pth
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1"
AMP = "auto"  # mixed precision where the processor gains by it; "off": float32

EMOTIONS = {"ANG": "Angry", "DIS": "Disgust", "FEA": "Fear", "HAP": "Happy", "NEU": "Neutral", "SAD": "Sad"}
VARIANT_NAMES = ("original", "time_shift_pos", "time_shift_neg", "pitch_up", "pitch_down",
            "stretch_fast", "stretch_slow", "noise_low", "noise_medium")  # fmt: skip
MEL_SETTINGS = ("sample_rate", "n_fft", "hop_length", "n_mels", "fmin", "fmax")
FORMAT_VERSION = 1
FREE_TO_CHANGE = {"MEL_DIR", "OUTPUT_DIR", "EPOCHS", "PATIENCE", "RESUME", "DEVICE"}  # between a run and its resumption


# --------------------------------------------------------------------------------------
# Reading


def check_constants():
    """Ends the program with a sentence for each constant of the wrong type or range."""
    count = {n: (int, 1, math.inf) for n in ("MAX_WIDTH", "EPOCHS", "PATIENCE", "HIDDEN", "HEADS")}
    count |= {n: (int, 0, math.inf) for n in ("WARMUP_EPOCHS", "TIME_MASK", "MEL_MASK", "LR_PATIENCE", "SEED")}
    real = {n: ((int, float), 0, top) for n, top in (("WEIGHT_DECAY", 10), ("LABEL_SMOOTHING", 0.99), ("DROPOUT", 0.99))}
    real |= {n: ((int, float), 1e-12, top) for n, top in (("LEARNING_RATE", 10), ("GRADIENT_CLIP", math.inf), ("LR_FACTOR", 0.99))}
    wrong = []
    for name, (kind, low, high) in (count | real | {"BATCH_SIZE": (int, 2, math.inf)}).items():
        value = globals()[name]
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            wrong.append(f"{name} = {value!r}: take {'a whole number' if kind is int else 'a number'} from {low:g} to {high:g}")
    wrong += [f"{name} = {globals()[name]!r}: take True or False" for name in ("RESUME", "WEIGHTED_SAMPLING") if not isinstance(globals()[name], bool)]
    wrong += [f"{name} = {globals()[name]!r}: take a text in quotes" for name in ("MEL_DIR", "OUTPUT_DIR", "SPLIT", "DEVICE") if not (globals()[name] and isinstance(globals()[name], str))]
    if AMP not in ("auto", "off"):
        wrong.append(f'AMP = {AMP!r}: take "auto" or "off"')
    pair = lambda s: isinstance(s, tuple) and len(s) == 2 and all(isinstance(n, int) and n >= 1 for n in s)  # noqa: E731
    if not (isinstance(CHANNELS, tuple) and len(CHANNELS) == 4 and all(isinstance(c, int) and c >= 1 for c in CHANNELS)):
        wrong.append(f"CHANNELS = {CHANNELS!r}: take four whole numbers")
    if not (isinstance(STRIDES, tuple) and len(STRIDES) == 4 and all(map(pair, STRIDES))):
        wrong.append(f"STRIDES = {STRIDES!r}: take four pairs of whole numbers")
    if not wrong and 2 * HIDDEN % HEADS:
        wrong.append(f"HEADS = {HEADS}: take a divisor of 2 * HIDDEN, {2 * HIDDEN}")
    if wrong:
        sys.exit("Constants at the top of cremad_custom2.py: " + "; ".join(wrong) + ".")


def pick_device():
    """The device of DEVICE, and the number type of mixed precision (None: float32), by capability."""
    name = DEVICE if DEVICE != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"DEVICE = {DEVICE!r} cannot be used here ({str(error).splitlines()[0]}): take \"auto\" or \"cpu\".")
    if AMP == "off":
        return device, None
    if device.type == "cuda":
        return device, torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    able = torch.cpu.get_capabilities()
    return device, torch.bfloat16 if able.get("amx_bf16") or able.get("avx512_bf16") else None


def read_mel_config(mel_dir):
    """The mel settings that the spectrograms were made with, from mel_config.json."""
    path = mel_dir / "mel_config.json"
    if not mel_dir.is_dir():
        sys.exit(f"MEL_DIR = {MEL_DIR!r} is no folder: run mel_generator.py first, or name its --output_dir.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return {name: config[name] for name in MEL_SETTINGS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path} does not tell the mel settings ({type(error).__name__}: {error}): MEL_DIR takes the --output_dir of mel_generator.py.")


def list_clips(mel_dir):
    """A row for each spectrogram: path, stem, variant, actor, emotion; sorted by path."""
    rows = []
    for code in EMOTIONS:
        for path in sorted(mel_dir.glob(f"{code}/*.npy")):
            variant = next((v for v in VARIANT_NAMES if path.stem.endswith(f"_{v}")), None)
            if variant is None:
                sys.exit(f"{path}: the name does not end in a variant ({', '.join(VARIANT_NAMES)}): move the file out of MEL_DIR.")
            stem = path.stem.removesuffix(f"_{variant}")
            rows.append((str(path), stem, variant, stem.split("_")[0], code))
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
    """The sides that the CSV named by SPLIT gives to the stems; clips it does not name get none."""
    try:
        table = pd.read_csv(SPLIT, dtype=str)
        sides = dict(zip(table["stem"], table["split"], strict=True))
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f'SPLIT = {SPLIT!r} is neither "actor" nor "clip", nor a CSV with the columns stem,split ({error}).')
    unknown = sorted({str(s) for s in sides.values()} - {"train", "val", "test"})
    if unknown or len(sides) < len(table):
        sys.exit(f"SPLIT = {SPLIT!r}: " + (f"split is {unknown[0]!r}: take train, val or test." if unknown else "a stem stands there twice."))
    absent = len(sides.keys() - set(stems))
    print(f"Split {SPLIT}: {absent} of its {len(sides)} stems have no spectrogram; {len(set(stems) - sides.keys())} clips that it does not name are left out.")
    return [sides.get(stem) for stem in stems]


def assign_split(clips):
    """Adds the column `split`, drops what no side uses: variants other than the original only train."""
    originals = clips[clips.variant == "original"]
    n_actors = clips.actor.nunique()
    if SPLIT == "actor" and n_actors < 3:
        sys.exit(f"MEL_DIR = {MEL_DIR!r} holds {n_actors} actor(s): a split by actor takes at least three, one each to train, validate and test.")
    if SPLIT in ("actor", "clip"):
        side = split_evenly(originals.actor if SPLIT == "actor" else originals.stem, originals.emotion, SEED)
    else:
        side = split_from_csv(originals.stem)
    clips = clips.assign(split=clips.stem.map(dict(zip(originals.stem, side, strict=True))))
    clips = clips[clips.split.notna() & ((clips.variant == "original") | (clips.split == "train"))].reset_index(drop=True)
    for name in ("train", "val", "test"):
        if not (clips.split == name).any():
            sys.exit(f"SPLIT = {SPLIT!r} leaves no clip to {name}: train, val and test each need some.")
    n_train = (clips.split == "train").sum()
    if n_train < BATCH_SIZE:
        sys.exit(f"BATCH_SIZE = {BATCH_SIZE}, but there are {n_train} spectrograms to train on: lower BATCH_SIZE, or make more spectrograms.")
    return clips


def read_spectrogram(path, n_mels):
    """One .npy as float32 (frames, mel bands); ends the program if it is not what mel_generator.py writes."""
    try:
        mel = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        sys.exit(f"{path} is not a whole .npy file ({error}): delete it and run mel_generator.py again.")
    if mel.dtype != np.float32 or mel.ndim != 2 or len(mel) != n_mels or not mel.size or not np.isfinite(mel).all():
        sys.exit(f"{path} holds {mel.dtype} {mel.shape}, not finite float32 ({n_mels}, frames) as mel_config.json says: delete it and run mel_generator.py again.")
    return mel.T


class Spectrograms:
    """All spectrograms end to end in one tensor, so that a batch is one gather and no loader is needed.

    frames: float32 (all frames, mel bands); start, length, label: int64 (clips,), on the CPU.
    """

    def __init__(self, clips, n_mels):
        most = sum(os.path.getsize(path) for path in clips.path) // (4 * n_mels)
        frames, start, length = np.empty((most, n_mels), np.float32), [], []
        at = 0
        for path in tqdm(clips.path, desc="Reading", unit="file", leave=False):
            mel = read_spectrogram(path, n_mels)[:MAX_WIDTH]
            frames[at : at + len(mel)] = mel
            start.append(at)
            length.append(len(mel))
            at += len(mel)
        self.frames = torch.from_numpy(frames[:at])
        self.start, self.length = torch.tensor(start), torch.tensor(length)
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

    def clip(self, i):
        """One clip, (frames, mel bands)."""
        return self.frames[self.start[i] : self.start[i] + self.length[i]]

    def batch(self, index, device):
        """Clips padded with zeros to the longest: (clips, frames, mel bands), lengths on the CPU, labels."""
        length = self.length[index]
        step = torch.arange(int(length.max()))
        at = self.start[index, None] + step.minimum(length[:, None] - 1)
        x = self.frames[at.to(self.frames.device)].to(device)
        return x * (step < length[:, None]).to(device)[:, :, None], length, self.label[index].to(device)


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
        pooled = F.avg_pool2d(x, self.stride, ceil_mode=True, divisor_override=math.prod(self.stride))
        h = F.relu(self.norm1(self.conv1(x)))
        lengths = (lengths + self.stride[0] - 1).div(self.stride[0], rounding_mode="floor")
        mask = inside(lengths, h.shape[2])[:, None, :, None]
        h = self.norm2(self.conv2(h * mask))
        return F.relu(h + self.norm_shortcut(self.shortcut(pooled))) * mask, lengths


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
        self.lstm = nn.LSTM(channels[-1] * bands, hidden, 2, batch_first=True, bidirectional=True, dropout=dropout)
        self.attention = nn.MultiheadAttention(2 * hidden, heads, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(2 * hidden)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Sequential(
            nn.Linear(2 * hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden, hidden // 2), nn.BatchNorm1d(hidden // 2), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden // 2, n_classes))  # fmt: skip

    def forward(self, x, lengths):
        """Normalised log-mel (B, T, M), zero past each clip's frames, and lengths (B,) on the CPU, to logits (B, classes)."""
        x, steps = x.unsqueeze(1), lengths.to(x.device)  # (B, 1, T, M)
        x = x.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x, steps = block(x, steps)
        x = self.dropout(x.permute(0, 2, 3, 1).flatten(2))  # (B, T, M * C)
        for block in self.blocks:
            lengths = (lengths + block.stride[0] - 1).div(block.stride[0], rounding_mode="floor")
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        x, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)  # (B, T, 2 * hidden)
        mask = inside(steps, x.shape[1])
        attended, _ = self.attention(x, x, x, key_padding_mask=~mask, need_weights=False)
        x = self.norm(x + attended) * mask[:, :, None]
        return self.head(x.sum(1) / steps[:, None])


def logits_of(model, spectrograms, batch_size, device):
    """Float32 logits (clips, classes) of normalised spectrograms, each (frames, mel bands), in batches of like length."""
    order = sorted(range(len(spectrograms)), key=lambda i: len(spectrograms[i]))
    rows = []
    model.eval()
    with torch.inference_mode():
        for at in range(0, len(order), batch_size):
            batch = [spectrograms[i] for i in order[at : at + batch_size]]
            lengths = torch.tensor([len(mel) for mel in batch])
            rows.append(model(nn.utils.rnn.pad_sequence(batch, batch_first=True).to(device), lengths).cpu())
    return torch.cat(rows)[torch.tensor(order).argsort()]


def draw_epoch(data, train, generator):
    """One epoch's batches of clip numbers: first the draw, each emotion as often, then like lengths together."""
    n = len(train) // BATCH_SIZE * BATCH_SIZE  # whole batches: batch norm cannot train on one clip
    if WEIGHTED_SAMPLING:
        class_weights = 1.0 / data.label[train].bincount(minlength=len(EMOTIONS)).clamp(min=1)
        drawn = torch.multinomial(class_weights[data.label[train]], n, replacement=True, generator=generator)
    else:
        drawn = torch.randperm(len(train), generator=generator)[:n]
    drawn = train[drawn]
    batches = drawn[data.length[drawn].argsort()].view(-1, BATCH_SIZE)
    return batches[torch.randperm(len(batches), generator=generator)]


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


def train_epoch(run, data, train, epoch):
    """One pass over the training draw; returns mean loss and accuracy. Ends the program if the loss is no number."""
    torch.manual_seed(SEED * 100_003 + epoch)  # an epoch depends on its number alone: resuming repeats it
    batches = draw_epoch(data, train, torch.default_generator)
    total, right = torch.zeros((), device=run.device), torch.zeros((), device=run.device)
    run.model.train()
    for step, index in enumerate(tqdm(batches, desc=f"Epoch {epoch}", unit="batch", leave=False)):
        if epoch <= WARMUP_EPOCHS:
            done = (epoch - 1 + (step + 1) / len(batches)) / WARMUP_EPOCHS
            run.optimizer.param_groups[0]["lr"] = LEARNING_RATE * done
        x, lengths, label = data.batch(index, run.device)
        with torch.autocast(run.device.type, run.amp, enabled=run.amp is not None):
            logits = run.model(hide_parts(x, lengths), lengths)
        loss = F.cross_entropy(logits.float(), label, label_smoothing=LABEL_SMOOTHING)
        run.scaler.scale(loss).backward()
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), GRADIENT_CLIP)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        total += loss.detach()
        right += (logits.argmax(1) == label).sum()
    if not math.isfinite(total):
        sys.exit(f"The training loss is {float(total)} in epoch {epoch}: lower LEARNING_RATE ({LEARNING_RATE:g}), or set AMP = \"off\". best_model.pth and last_checkpoint.pth are those of the epochs before.")
    return float(total) / len(batches), float(right) / batches.numel()


def recalls(true, predicted):
    """The share found of each emotion that occurs; their mean is the UAR."""
    return [float((predicted[true == c] == c).float().mean()) for c in range(len(EMOTIONS)) if (true == c).any()]


def calibration_error(probabilities, label, bins=15):
    """Expected calibration error of the top label, equal bins (Guo et al., arXiv:1706.04599)."""
    confidence, predicted = probabilities.max(1)
    which = (confidence * bins).long().clamp(max=bins - 1)
    gaps = F.one_hot(which, bins).double().T @ ((predicted == label).double() - confidence)
    return float(gaps.abs().sum() / len(label))


def fit_temperature(logits, label):
    """The divisor of the logits that makes them most likely, of 401 from 0.1 to 10 (Guo et al., arXiv:1706.04599)."""
    return min(torch.logspace(-1, 1, 401).tolist(), key=lambda t: float(F.cross_entropy(logits / t, label)))


def measure(logits, label, actors, temperature):
    """The figures of metrics.json for one side of the split."""
    from sklearn.metrics import f1_score  # here, because it takes a second to import

    predicted, actors = logits.argmax(1), np.asarray(actors)
    names, uars, random = np.unique(actors), [], np.random.default_rng(SEED)
    rows = {name: torch.from_numpy(np.flatnonzero(actors == name)) for name in names}
    for _ in range(1000 if len(names) > 1 else 0):
        drawn = torch.cat([rows[name] for name in random.choice(names, len(names))])
        uars.append(np.mean(recalls(label[drawn], predicted[drawn])))
    return {
        "accuracy": float((predicted == label).float().mean()), "uar": float(np.mean(recalls(label, predicted))),
        "macro_f1": float(f1_score(label, predicted, average="macro", labels=label.unique())),
        "ece": calibration_error((logits / temperature).softmax(1), label), "ece_before": calibration_error(logits.softmax(1), label),
        "n_clips": len(label), "n_actors": len(names),
        "uar_ci95": np.percentile(uars, [2.5, 97.5]).tolist() if uars else None,
    }  # fmt: skip


# --------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary path beside `path` that takes its name once written: whole, or not there at all."""
    yield f"{path}.tmp"
    os.replace(f"{path}.tmp", path)


def plot_confusion(path, true, predicted, names, title):
    """Confusion matrix as a picture: counts, and the row's percentages, which give the colour."""
    import seaborn  # here, because it takes a second to import

    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (np.asarray(true), np.asarray(predicted)), 1)
    percent = 100.0 * counts / counts.sum(1, keepdims=True).clip(min=1)
    text = [[f"{n}\n{p:.0f} %" for n, p in zip(*row, strict=True)] for row in zip(counts, percent, strict=True)]
    figure, axes = plt.subplots(figsize=(5.5, 4.8), layout="constrained")
    seaborn.heatmap(percent, annot=text, fmt="", cmap="cividis", vmin=0, vmax=100, square=True, ax=axes, annot_kws={"size": 9},
                    xticklabels=names, yticklabels=names, cbar_kws={"label": "% of the true class"})  # fmt: skip
    axes.set(xlabel="Predicted emotion", ylabel="True emotion", title=title)
    axes.tick_params(axis="x", rotation=45)
    axes.tick_params(axis="y", rotation=0)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=200)
    plt.close(figure)


def plot_history(path, history, best_epoch):
    """Loss, accuracy and learning rate over the epochs, the best one marked."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    epochs = [row["epoch"] for row in history]
    panels = (("Cross-entropy (nats)", ("train_loss", "val_loss")), ("Accuracy, UAR (%)", ("train_accuracy", "val_accuracy", "val_uar")), ("Learning rate", ("learning_rate",)))
    labels = {"train_loss": "training", "val_loss": "validation", "train_accuracy": "training accuracy", "val_accuracy": "validation accuracy", "val_uar": "validation UAR", "learning_rate": "learning rate"}
    styles = {"train": ("#0072B2", "-"), "val": ("#D55E00", "-"), "val_uar": ("#D55E00", ":"), "learning": ("#0072B2", "-")}
    for ax, (title, columns) in zip(axes, panels, strict=True):
        for column in columns:
            colour, line = styles.get(column) or styles[column.split("_")[0]]
            scale = 100 if "%" in title else 1
            ax.plot(epochs, [scale * row[column] for row in history], color=colour, linestyle=line, marker=".", label=labels[column])
        ax.axvline(best_epoch, color="#555555", linestyle="--", linewidth=1, label=f"best epoch, {best_epoch}")
        ax.set(xlabel="Epoch", ylabel=title)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(fontsize=8)
    axes[2].set_yscale("log")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=200)
    plt.close(figure)


class Run:
    """A training in progress: model, optimiser, schedule, history; saved and resumed as one."""

    def __init__(self, model_config, device, amp):
        torch.manual_seed(SEED)
        self.device, self.amp, self.model_config = device, amp, model_config
        self.model = EmotionClassifier(**model_config).to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, "max", factor=LR_FACTOR, patience=LR_PATIENCE)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.history, self.best_epoch, self.best_accuracy = [], 0, -1.0
        self.parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}

    def save(self, path, settings):
        """Writes everything that the next epoch depends on."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"history": self.history, "best_epoch": self.best_epoch, "best_accuracy": self.best_accuracy, "settings": settings}
        with whole_file(path) as temporary:
            torch.save(state, temporary)

    def resume(self, path, settings):
        """Takes up the training of last_checkpoint.pth; refuses one of other settings."""
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            other = [f"{k} was {state['settings'].get(k)!r}, now {v!r}" for k, v in settings.items() if k not in FREE_TO_CHANGE and state["settings"].get(k) != v]
            if other:
                sys.exit(f"RESUME = True, but {path} was trained with other settings ({'; '.join(other)}): set them back, or name another OUTPUT_DIR.")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.history, self.best_epoch, self.best_accuracy = state["history"], state["best_epoch"], state["best_accuracy"]
        except Exception as error:  # bytes from anywhere make the unpickler raise anything
            sys.exit(f"RESUME = True, but {path} is no checkpoint of this script ({type(error).__name__}: {str(error).splitlines()[0]}): name another OUTPUT_DIR, or set RESUME = False.")
        print(f"Going on from {path}, after epoch {len(self.history)}.")


def save_best(path, run, normalization, mel_config, settings, logits, label):
    """best_model.pth: all that the tester needs. Plain Python values beside the tensors: weights_only=True takes them."""
    checkpoint = {
        "format_version": FORMAT_VERSION,
        "model_state_dict": {name: value.cpu() for name, value in run.model.state_dict().items()},
        "model_config": run.model_config, "mel_config": mel_config, "normalization": normalization,
        "max_width": MAX_WIDTH, "classes": [{"code": code, "name": name} for code, name in EMOTIONS.items()],
        "temperature": fit_temperature(logits, label),
        "epoch": run.best_epoch, "metrics": run.history[-1], "training_config": settings,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
    }  # fmt: skip
    with whole_file(path) as temporary:
        torch.save(checkpoint, temporary)


def load_checkpoint(path, device):
    """The model of best_model.pth in evaluation mode, and the rest of the file; nothing in it is executed.

    Ends the program with a sentence if the file is not a usable checkpoint of cremad_custom2.py.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        sys.exit(f"{path}: {error.strerror}. Name the best_model.pth that cremad_custom2.py wrote.")
    except Exception as error:  # bytes from anywhere make the unpickler raise anything
        sys.exit(
            f"{path} is damaged, or no checkpoint that can be read safely ({type(error).__name__}): "
            "take the best_model.pth that cremad_custom2.py wrote."
        )
    needed = ("format_version", "model_state_dict", "model_config", "mel_config", "normalization", "max_width", "classes", "temperature")
    missing = [key for key in needed if key not in checkpoint] if isinstance(checkpoint, dict) else ["a dict"]
    if missing:
        sys.exit(f"{path} is no checkpoint of cremad_custom2.py: it lacks {', '.join(missing)}.")
    if checkpoint["format_version"] != FORMAT_VERSION:
        sys.exit(f"{path} has format version {checkpoint['format_version']}, this script reads {FORMAT_VERSION}: use the scripts of one release together.")
    try:
        model = EmotionClassifier(**checkpoint["model_config"])
        model.load_state_dict(checkpoint["model_state_dict"])
        mean, std = (torch.tensor(checkpoint["normalization"][key]) for key in ("mean", "std"))
        if not len(mean) == len(std) == checkpoint["mel_config"]["n_mels"] == checkpoint["model_config"]["n_mels"]:
            raise ValueError("mel_config, model_config and normalization differ in their number of mel bands")
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        sys.exit(f"{path} contradicts itself ({' '.join(str(error).split())[:300]}): take a best_model.pth as cremad_custom2.py wrote it.")
    if not all(torch.isfinite(value).all() for value in [mean, std, *model.state_dict().values()]):
        sys.exit(f"{path} holds weights that are NaN or infinite: the training failed; train again with a lower LEARNING_RATE.")
    return model.to(device).eval(), checkpoint


def finish(output_dir, run, data, sides, clips, settings, seconds):
    """Figures, pictures and predictions of best_model.pth, read back as the tester reads it."""
    from sklearn.metrics import classification_report  # here, because it takes a second to import

    model, checkpoint = load_checkpoint(output_dir / "best_model.pth", run.device)
    names, temperature = list(EMOTIONS.values()), checkpoint["temperature"]
    metrics = {}
    for side in ("val", "test"):
        logits, label = logits_of(model, [data.clip(i) for i in sides[side]], BATCH_SIZE, run.device), data.label[sides[side]]
        metrics[side] = measure(logits, label, clips.actor[sides[side].numpy()], temperature)
    rest = {"best_epoch": checkpoint["epoch"], "epochs": len(run.history), "split": SPLIT, "seed": SEED, "device": str(run.device), "amp": str(run.amp),
            "temperature": temperature, "n_parameters": sum(p.numel() for p in model.parameters()), "training_clips": len(sides["train"]), "seconds": round(seconds, 1)}  # fmt: skip
    with whole_file(output_dir / "metrics.json") as temporary:
        Path(temporary).write_text(json.dumps(metrics | rest, indent=2) + "\n", encoding="utf-8")
    predicted, rows = logits.argmax(1), clips.loc[sides["test"].numpy(), ["stem", "actor"]]
    rows = rows.assign(true_class=[names[i] for i in label], predicted_class=[names[i] for i in predicted])
    rows[names] = (logits / temperature).softmax(1).numpy()
    with whole_file(output_dir / "test_predictions.csv") as temporary:
        rows.to_csv(temporary, index=False)
    report = classification_report(label, predicted, labels=range(len(names)), target_names=names, zero_division=0, digits=3)
    with whole_file(output_dir / "classification_report.txt") as temporary:
        Path(temporary).write_text(report, encoding="utf-8")
    plot_confusion(output_dir / "confusion_matrix.png", label, predicted, names, f"Test: {metrics['test']['n_clips']:,} clips, {metrics['test']['n_actors']} actors")
    plot_history(output_dir / "training_history.png", run.history, checkpoint["epoch"])
    print_summary(output_dir, metrics, rest)


def print_summary(output_dir, metrics, rest):
    """The closing lines: figures of best_model.pth, and where everything is."""
    print(f"\nBest epoch {rest['best_epoch']} of {rest['epochs']}, {rest['seconds'] / 60:.1f} minutes. best_model.pth on clips it did not train on:")
    rows = [[side, *(f"{100 * m[key]:.1f} %" for key in ("accuracy", "uar", "macro_f1", "ece")), f"{m['n_clips']:,}", m["n_actors"]] for side, m in metrics.items()]
    print(tabulate(rows, headers=["", "accuracy", "UAR", "macro-F1", "ECE", "clips", "actors"]))
    if metrics["test"]["uar_ci95"]:
        print("Test UAR, 95 % interval over actors: {:.1f} to {:.1f} %".format(*(100 * v for v in metrics["test"]["uar_ci95"])))
    if SPLIT == "clip":
        print('SPLIT = "clip" has the same voices in training and test: these figures are optimistic for new voices.')
    print(f"Files: {output_dir}\nNext:  python custom2_tester.py --input_dir WAVS --model_path {output_dir / 'best_model.pth'} --output_dir results")


# --------------------------------------------------------------------------------------
# Main


def parse_args():
    """No arguments but --help; another one ends the program with exit status 2."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="python cremad_custom2.py").parse_args()


def configuration(clips):
    """The constants, and the split's fingerprint: what a resumed run must share with the first."""
    constants = {name: value for name, value in globals().items() if name.isupper() and isinstance(value, (str, int, float, tuple)) and name not in ("VARIANT_NAMES", "MEL_SETTINGS")}
    split = clips[["stem", "variant", "split"]].to_csv(index=False)
    return constants | {"split_sha256": hashlib.sha256(split.encode("utf-8", "surrogateescape")).hexdigest()}


def train(run, data, sides, output_dir, normalization, mel_config, settings):
    """Epochs until EPOCHS or PATIENCE ends them; after each, everything needed to go on is on disk."""
    spectrograms, label = [data.clip(i) for i in sides["val"]], data.label[sides["val"]]
    while len(run.history) < EPOCHS and len(run.history) - run.best_epoch < PATIENCE:
        epoch, started = len(run.history) + 1, time.perf_counter()
        train_loss, train_accuracy = train_epoch(run, data, sides["train"], epoch)
        seconds = time.perf_counter() - started
        logits = logits_of(run.model, spectrograms, BATCH_SIZE, run.device)
        val_loss, val_accuracy = float(F.cross_entropy(logits, label)), float((logits.argmax(1) == label).float().mean())
        run.history.append({"epoch": epoch, "train_loss": train_loss, "train_accuracy": train_accuracy, "val_loss": val_loss, "val_accuracy": val_accuracy,
                            "val_uar": float(np.mean(recalls(label, logits.argmax(1)))), "learning_rate": run.optimizer.param_groups[0]["lr"],
                            "seconds": round(time.perf_counter() - started, 2), "train_clips_per_s": round(len(sides["train"]) // BATCH_SIZE * BATCH_SIZE / seconds, 1)})  # fmt: skip
        if epoch > WARMUP_EPOCHS:
            run.scheduler.step(val_accuracy)
        if val_accuracy > run.best_accuracy:
            run.best_accuracy, run.best_epoch = val_accuracy, epoch
            save_best(output_dir / "best_model.pth", run, normalization, mel_config, settings, logits, label)
        run.save(output_dir / "last_checkpoint.pth", settings)
        with whole_file(output_dir / "history.csv") as temporary:
            pd.DataFrame(run.history).to_csv(temporary, index=False)
        row, left = run.history[-1], (EPOCHS - epoch) * run.history[-1]["seconds"] / 60
        print(f"epoch {epoch:3d}/{EPOCHS}  loss {train_loss:.3f} {val_loss:.3f}  accuracy {100 * train_accuracy:4.1f} {100 * val_accuracy:4.1f} %  UAR {100 * row['val_uar']:4.1f} %  "
              f"lr {row['learning_rate']:.1e}  {row['seconds']:.0f} s  at most {left:.0f} min left{'  *' if run.best_epoch == epoch else ''}", flush=True)  # fmt: skip


def main():
    """Reads, splits, trains, reports."""
    parse_args()
    check_constants()
    started, (device, amp) = time.perf_counter(), pick_device()
    mel_dir, output_dir = Path(MEL_DIR), Path(OUTPUT_DIR)
    mel_config = read_mel_config(mel_dir)
    clips = assign_split(list_clips(mel_dir))
    output_dir.mkdir(parents=True, exist_ok=True)
    with whole_file(output_dir / "split.csv") as temporary:
        clips.drop_duplicates("stem")[["stem", "actor", "emotion", "split"]].to_csv(temporary, index=False)
    data = Spectrograms(clips, mel_config["n_mels"])
    sides = {side: torch.from_numpy(np.flatnonzero(clips.split == side)) for side in ("train", "val", "test")}
    normalization = data.normalize(sides["train"])
    if device.type == "cuda" and data.frames.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        data.frames = data.frames.to(device)
    model_config = {"n_mels": mel_config["n_mels"], "n_classes": len(EMOTIONS), "channels": CHANNELS, "strides": STRIDES, "hidden": HIDDEN, "heads": HEADS, "dropout": DROPOUT}
    settings, run = configuration(clips), Run(model_config, device, amp)
    print("  ".join(f"{name} = {value!r}" for name, value in settings.items()))
    print(tabulate([[side, len(i), clips.actor[i.numpy()].nunique(), *(data.label[i].bincount(minlength=len(EMOTIONS)).tolist())] for side, i in sides.items()],
                   headers=["", "spectrograms", "actors", *EMOTIONS]))  # fmt: skip
    print(f"{device}, {str(amp or torch.float32).removeprefix('torch.')}, {sum(p.numel() for p in run.model.parameters()) / 1e6:.1f} M parameters. Columns of two: training, validation. * best so far.", flush=True)
    last = output_dir / "last_checkpoint.pth"
    if RESUME and last.exists():
        run.resume(last, settings)
    elif RESUME:
        print(f"RESUME = True, but there is no {last} yet: starting with epoch 1.")
    elif (output_dir / "best_model.pth").exists():
        os.replace(output_dir / "best_model.pth", output_dir / "best_model_previous.pth")
        print(f"An earlier training's model is kept as {output_dir / 'best_model_previous.pth'}.")
    train(run, data, sides, output_dir, normalization, mel_config, settings)
    finish(output_dir, run, data, sides, clips, settings, time.perf_counter() - started)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"\nStopped. The epochs that ended are in {OUTPUT_DIR}: set RESUME = True and run again to go on.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(f"{error.filename or OUTPUT_DIR}: {error.strerror or error}. The epochs that ended are in {OUTPUT_DIR}: mend this, set RESUME = True and run again.")
