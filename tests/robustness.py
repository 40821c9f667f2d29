"""How accuracy falls with recording conditions: the test actors' clips, distorted, through the tester.

    python tests/robustness.py --clips CREMA-D/AudioWAV --trained output --output_dir robustness

--trained is the trainer's OUTPUT_DIR: its split.csv names the test actors, its best_model.pth is tried.
Level, white noise at a ratio to the clip's own power, a telephone's band, a room's echo (noise that decays
exponentially by 60 dB in the time given). Writes robustness.csv and robustness.png. Run again, it goes on.
"""

import argparse
import subprocess
import sys
import zlib
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import soundfile
from editing import ROOT
from tabulate import tabulate
from tqdm import tqdm


def level(samples, rate, random, decibels):
    return samples * 10 ** (decibels / 20)


def noise(samples, rate, random, ratio):
    power = np.mean(samples**2) / 10 ** (ratio / 10)
    return samples + np.sqrt(power) * random.standard_normal(len(samples))


def band(samples, rate, random, low, high):
    spectrum, hertz = np.fft.rfft(samples), np.fft.rfftfreq(len(samples), 1 / rate)
    return np.fft.irfft(spectrum * ((hertz >= low) & (hertz <= high)), len(samples))


def room(samples, rate, random, seconds):
    """The clip and its echo, together as loud as the clip alone."""
    n = int(seconds * rate)
    echo = random.standard_normal(n) * 10 ** (-3 * np.arange(n) / n)
    response = np.concatenate([[1.0], echo / np.sqrt(np.sum(echo**2))])  # as much echo as direct sound
    size = len(samples) + n
    heard = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(response, size), size)
    return heard * np.sqrt(np.mean(samples**2) / np.mean(heard[: len(samples)] ** 2))


CONDITIONS = {  # name: (function, its arguments)
    "clean": (level, 0),
    "level -20 dB": (level, -20), "level -10 dB": (level, -10), "level +10 dB": (level, 10), "level +20 dB": (level, 20),
    "noise 20 dB": (noise, 20), "noise 10 dB": (noise, 10), "noise 0 dB": (noise, 0),
    "telephone 300-3400 Hz": (band, 300, 3400),
    "room 0.3 s": (room, 0.3), "room 0.6 s": (room, 0.6),
}  # fmt: skip


def distort(paths, folder, condition):
    """Writes every clip in a condition, as float32: louder ones are not clipped."""
    function, *arguments = CONDITIONS[condition]
    folder.mkdir(parents=True, exist_ok=True)
    for path in tqdm(paths, desc=condition, unit="clip", leave=False):
        samples, rate = soundfile.read(path)
        random = np.random.default_rng(zlib.crc32(f"{path.stem} {condition}".encode()))
        soundfile.write(folder / f"{path.stem}.wav", function(samples, rate, random, *arguments), rate, subtype="FLOAT")


def score(results):
    """Accuracy, UAR and mean confidence, in %."""
    table = pd.read_csv(results)
    table = table[table.error.isna()]
    right = table.true_class == table.predicted_class
    return {"accuracy": 100 * right.mean(), "UAR": 100 * right.groupby(table.true_class).mean().mean(), "confidence": 100 * table.confidence.mean(), "clips": len(table)}


def plot(table, path):
    figure, axes = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    axes.barh(table.condition, table.UAR, color=["#D55E00" if c == "clean" else "#0072B2" for c in table.condition])
    axes.axvline(table.UAR[0], color="#D55E00", linestyle="--", linewidth=1)
    axes.axvline(100 / 6, color="#555555", linestyle=":", linewidth=1, label="chance")
    axes.set(xlabel="UAR on unseen actors (%)", xlim=(0, 100))
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=200)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="folder of the original .wav or .flac files")
    parser.add_argument("--trained", type=Path, required=True, help="OUTPUT_DIR of cremad_custom2.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    split = pd.read_csv(args.trained / "split.csv")
    tested = set(split.stem[split.split == "test"])
    paths = sorted(p for p in args.clips.rglob("*") if p.stem in tested and p.suffix.lower() in (".wav", ".flac"))
    if not paths:
        sys.exit(f"--clips {args.clips} holds none of the test clips of {args.trained / 'split.csv'}.")
    rows = []
    for condition in CONDITIONS:
        folder = args.output_dir / condition.replace(" ", "_")
        results = folder / "results" / "classification_results.csv"
        if not results.exists():
            distort(paths, folder / "clips", condition)
            command = [sys.executable, ROOT / "custom2_tester.py", "--input_dir", folder / "clips", "--model_path", args.trained / "best_model.pth", "--output_dir", results.parent]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows.append({"condition": condition} | score(results))
    table = pd.DataFrame(rows)
    table.to_csv(args.output_dir / "robustness.csv", index=False)
    plot(table, args.output_dir / "robustness.png")
    print(tabulate(table.round(1), headers="keys", showindex=False))
    print(f"Files: {args.output_dir}")


if __name__ == "__main__":
    main()
