"""How accuracy falls with recording conditions: test actors' clips, distorted, through the tester.

    python tests/tools/robustness.py --clips CREMA-D/AudioWAV --trained output \\
        --output_dir robustness

--trained is the trainer's OUTPUT_DIR: its split.csv names the test actors, its best_model.pth is
tried, with --adapt off and with auto. The conditions: level; white noise at a ratio to the clip's
own power; a telephone's band; a room's echo, noise that decays exponentially by 60 dB in the time
given; noise suppression; automatic gain. A condition in which a clip fails has failed: it gets no
figures. Writes robustness.csv and robustness.png. Run again, it goes on where it stopped.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
from editing import ROOT
from matplotlib.figure import Figure
from scipy.signal import ShortTimeFFT
from scipy.signal.windows import hann
from tabulate import tabulate
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from cremad_custom2 import EMOTIONS, calibration_error

Random = np.random.Generator


def level(samples: np.ndarray, rate: int, random: Random, decibels: float) -> np.ndarray:
    """The clip, louder or softer."""
    return samples * 10 ** (decibels / 20)


def noise(samples: np.ndarray, rate: int, random: Random, ratio: float) -> np.ndarray:
    """The clip and white noise, `ratio` dB under it."""
    power = np.mean(samples**2) / 10 ** (ratio / 10)
    return samples + np.sqrt(power) * random.standard_normal(len(samples))


def band(samples: np.ndarray, rate: int, random: Random, low: float, high: float) -> np.ndarray:
    """The clip from `low` to `high` Hz."""
    spectrum = np.fft.rfft(samples)
    hertz = np.fft.rfftfreq(len(samples), 1 / rate)
    return np.fft.irfft(spectrum * ((hertz >= low) & (hertz <= high)), len(samples))


def room(samples: np.ndarray, rate: int, random: Random, seconds: float) -> np.ndarray:
    """The clip and its echo, together as loud as the clip alone."""
    n = int(seconds * rate)
    echo = random.standard_normal(n) * 10 ** (-3 * np.arange(n) / n)
    echo /= np.sqrt(np.sum(echo**2))  # as much echo as direct sound
    response = np.concatenate([[1.0], echo])
    size = len(samples) + n
    heard = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(response, size), size)
    return heard * np.sqrt(np.mean(samples**2) / np.mean(heard[: len(samples)] ** 2))


def suppressed(samples: np.ndarray, rate: int, random: Random, decibels: float) -> np.ndarray:
    """The clip, its own noise subtracted in the spectrum by at most `decibels`."""
    stft = ShortTimeFFT(hann(512, sym=False), 128, rate)
    spectrum = stft.stft(samples)  # (bins, frames)
    power = np.abs(spectrum) ** 2 + 1e-20
    n_quiet = max(1, power.shape[1] // 10)
    quiet = power.sum(axis=0).argsort()[:n_quiet]
    share = 4 * power[:, quiet].mean(axis=1, keepdims=True) / power
    gain = np.maximum(1 - share, 10 ** (-decibels / 10) * np.minimum(1, share))
    return stft.istft(spectrum * np.sqrt(gain), k1=len(samples))


def automatic_gain(samples: np.ndarray, rate: int, random: Random, target: float) -> np.ndarray:
    """The clip, every stretch of 0.4 s brought smoothly to `target` dBFS, by at most 30 dB."""
    n = int(0.4 * rate)
    starts = range(0, len(samples), n)
    power = np.array([np.mean(samples[start : start + n] ** 2) for start in starts])
    gain = np.clip(target - 10 * np.log10(power + 1e-12), -30, 30)
    middles = np.array(starts) + n / 2
    return samples * 10 ** (np.interp(np.arange(len(samples)), middles, gain) / 20)


CONDITIONS = {  # name: (function, its arguments)
    "clean": (level, 0),
    "level -20 dB": (level, -20),
    "level -10 dB": (level, -10),
    "level +10 dB": (level, 10),
    "level +20 dB": (level, 20),
    "noise 20 dB": (noise, 20),
    "noise 10 dB": (noise, 10),
    "noise 0 dB": (noise, 0),
    "telephone 300-3400 Hz": (band, 300, 3400),
    "room 0.3 s": (room, 0.3),
    "room 0.6 s": (room, 0.6),
    "noise suppressed by 20 dB": (suppressed, 20),
    "noise suppressed by 60 dB": (suppressed, 60),
    "automatic gain": (automatic_gain, -20),
}


def distort(paths: list[Path], folder: Path, condition: str) -> None:
    """Writes every clip in a condition, as float32: louder ones are not clipped."""
    function, *arguments = CONDITIONS[condition]
    shutil.rmtree(folder, ignore_errors=True)  # clips of another training's test actors
    folder.mkdir(parents=True)
    for path in tqdm(paths, desc=condition, unit="clip", leave=False):
        samples, rate = soundfile.read(path, always_2d=True)
        samples = samples.mean(axis=1)
        random = np.random.default_rng(zlib.crc32(f"{path.stem} {condition}".encode()))
        distorted = function(samples, rate, random, *arguments)
        soundfile.write(folder / f"{path.stem}.wav", distorted, rate, subtype="FLOAT")


def score(results: Path, n_clips: int) -> dict[str, float]:
    """Figures, in %, of a classification_results.csv; none where any of the clips failed."""
    table = pd.read_csv(results)
    n_failed = n_clips - table.error.isna().sum()
    if n_failed:
        return {"clips": n_clips, "failed": n_failed}
    is_right = table.true_class == table.predicted_class
    probabilities = torch.tensor(table[list(EMOTIONS.values())].to_numpy())
    label = torch.tensor(table.true_class.map(list(EMOTIONS.values()).index).to_numpy())
    return {
        "UAR": 100 * is_right.groupby(table.true_class).mean().mean(),
        "accuracy": 100 * is_right.mean(),
        "confidence": 100 * table.confidence.mean(),
        "calibration_error": 100 * calibration_error(probabilities, label),
        "clips": n_clips,
        "failed": 0,
    }


def plot(table: pd.DataFrame, path: Path) -> None:
    """UAR by condition, that of the clean clips dashed; --adapt auto beside off."""
    figure = Figure(figsize=(5.5, 4.8), layout="constrained")
    axes = figure.subplots()
    names = list(CONDITIONS)
    places = np.arange(len(names))
    for adapt, colour, shift in (("off", "#E69F00", -0.2), ("auto", "#0072B2", 0.2)):
        rows = table[table.adapt == adapt].set_index("condition").loc[names]
        axes.barh(places + shift, rows.UAR, 0.4, color=colour, label=f"--adapt {adapt}")
        axes.axvline(rows.UAR.iloc[0], color=colour, linestyle="--", linewidth=1)
    axes.axvline(100 / 6, color="#555555", linestyle=":", linewidth=1, label="chance")
    axes.set(xlabel="UAR on unseen actors (%)", xlim=(0, 100), yticks=places, yticklabels=names)
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=200)


def test_clips(clips: Path, trained: Path) -> list[Path]:
    """The recordings of the actors that the training held out to test on."""
    split = pd.read_csv(trained / "split.csv")
    stems = set(split.stem[split.split == "test"])
    paths = [p for p in clips.rglob("*") if p.suffix.lower() in (".wav", ".flac")]
    paths = sorted(p for p in paths if p.stem in stems)
    if not paths:
        sys.exit(f"--clips {clips} holds none of the test clips of {trained / 'split.csv'}.")
    return paths


def classify(clips: Path, model: Path, output_dir: Path, adapt: str) -> None:
    """Runs the tester on a folder; clips that fail stand in its table."""
    command = [sys.executable, ROOT / "custom2_tester.py", "--input_dir", clips]
    command += ["--model_path", model, "--output_dir", output_dir, "--adapt", adapt]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    if not is_by(model, output_dir / "classification_results.csv"):
        sys.exit(f"The tester left no table in {output_dir}: see above.")


def is_by(model: Path, results: Path) -> bool:
    """Whether a table is there, and of this model."""
    note = results.with_name("run.json")
    if not (results.exists() and note.exists()):
        return False
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    return json.loads(note.read_text(encoding="utf-8"))["model_sha256"] == digest


def main() -> None:
    """Runs the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--clips", type=Path, required=True, help="folder of the original .wav or .flac files")
    add("--trained", type=Path, required=True, help="OUTPUT_DIR of cremad_custom2.py")
    add("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    paths = test_clips(args.clips, args.trained)
    model = args.trained / "best_model.pth"
    rows = []
    for condition in CONDITIONS:
        folder = args.output_dir / condition.replace(" ", "_")
        results = {a: folder / f"adapt_{a}/classification_results.csv" for a in ("off", "auto")}
        if not all(is_by(model, path) for path in results.values()):
            distort(paths, folder / "clips", condition)
        for adapt, path in results.items():
            if not is_by(model, path):
                classify(folder / "clips", model, path.parent, adapt)
            rows.append({"condition": condition, "adapt": adapt} | score(path, len(paths)))
    table = pd.DataFrame(rows)
    table.to_csv(args.output_dir / "robustness.csv", index=False)
    plot(table, args.output_dir / "robustness.png")
    print(tabulate(table.round(1), headers="keys", showindex=False))
    print(f"Files: {args.output_dir}")


if __name__ == "__main__":
    main()
