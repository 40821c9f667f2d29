"""The three scripts against the plain way to do the same, in pairs, on this machine.

    python tests/benchmark.py --clips CREMA-D/AudioWAV
    python tests/benchmark.py --clips CREMA-D/AudioWAV --against PLAIN
    python tests/benchmark.py --clips CREMA-D/AudioWAV --against PLAIN --only generator tester --rounds 5

PLAIN is a folder with generate.py, train.py and classify.py, the same steps written with no thought
for speed; without it, ours alone are measured. Ours and the plain way take turns, and a ratio is of
neighbours in time: a machine's speed drifts. Prints a table, and writes it with every single figure
to --output. All groups take about half an hour on 2 cores; nothing else should run beside them.
"""

import argparse
import csv
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import soundfile
from editing import ROOT, edited_trainer
from tabulate import tabulate
from tqdm import tqdm

GROUPS = ("help", "generator", "trainer", "tester", "pictures", "memory", "growth")

# The plain trainer's own loop, around our model class.
PLAIN_LOOP = """
import sys, torch
against, root, model_path, *sys.argv = sys.argv[1:]
sys.path[:0] = [against, root]
import train, cremad_custom2
class Model(cremad_custom2.EmotionClassifier):
    def __init__(self):
        super().__init__(**torch.load(model_path, weights_only=True)["model_config"])
    def forward(self, x):  # (B, 1, mel bands, frames)
        return super().forward(x[:, 0].transpose(1, 2), torch.full((len(x),), x.shape[3]))
train.PlainModel = Model
train.main()
"""

# The pictures of --visualize as one writes them first: a new figure for each clip, in one process.
PLAIN_PICTURES = """
import glob, os, sys, time
root, wavs, output = sys.argv[1:]
sys.path.insert(0, root)
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt
import custom2_tester as tester
files = sorted(glob.glob(f"{wavs}/*.wav"))
mels = [tester.log_mel(tester.load_audio(f, 16000, 512), 16000, 2048, 512, 128, 0, 8000) for f in files]
start = time.perf_counter()
for file, mel in zip(files, mels):
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), width_ratios=(2.4, 1), layout="constrained")
    image = left.imshow(mel, origin="lower", aspect="auto", cmap="magma")
    figure.colorbar(image, ax=left, label="Level (dB)")
    left.set(xlabel="Time (s)", ylabel="Frequency (Hz)", title=os.path.basename(file))
    right.barh(["Angry", "Disgust", "Fear", "Happy", "Neutral", "Sad"], [30, 20, 20, 10, 10, 10])
    right.set(xlabel="Confidence (%)", xlim=(0, 100))
    figure.savefig(f"{output}/{os.path.basename(file)}.png", dpi=130)
    plt.close(figure)
seconds = time.perf_counter() - start
print(f"{len(files)} clips, {len(files) / seconds:.2f} clips/s")
"""


def run(*command, cwd=None):
    """Runs a Python command; returns its seconds and what it printed."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))[:200]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - started, done.stdout


def printed_rate(output):
    """The clips per second that a plain script prints of itself, start-up not counted."""
    return float(re.search(r"([\d.]+) (?:training )?clips/s", output)[1])


def make_wavs(clips, folder, n):
    """Fills a folder with n WAV files of 16 bits: clips from all over the corpus, again under other names if few."""
    folder.mkdir()
    chosen = [clips[i * len(clips) // n] for i in range(n)] if n <= len(clips) else clips
    for i in tqdm(range(n), desc=f"{n} WAV files", leave=False):
        source, again = chosen[i % len(chosen)], i // len(chosen)
        first = folder / f"{source.stem}.wav"
        if again:
            os.link(first, folder / f"{source.stem}_{again}.wav")
        else:
            samples, rate = soundfile.read(source, dtype="int16")
            soundfile.write(first, samples, rate, subtype="PCM_16")
    return folder


class Bench:
    """Measures, and keeps what it measured as rows of the table."""

    def __init__(self, args, work):
        self.args, self.work, self.rows, self.made = args, work, [], {}
        self.clips = sorted(p for p in args.clips.rglob("*") if p.suffix.lower() in (".wav", ".flac"))
        if not self.clips:
            sys.exit(f"--clips {args.clips}: no .wav or .flac file there.")

    def fresh(self):
        """A path in the work folder that nothing has yet."""
        return Path(tempfile.mkdtemp(dir=self.work)) / "new"

    def wavs(self, n):
        """A folder of n WAV files, made once."""
        if n not in self.made:
            self.made[n] = make_wavs(self.clips, self.fresh(), n)
        return self.made[n]

    def mels(self, n):
        """The spectrograms of n clips with 3 augmentations each, made once."""
        if ("mels", n) not in self.made:
            output = self.made["mels", n] = self.fresh()
            run(ROOT / "mel_generator.py", "--input_dir", self.wavs(n), "--output_dir", output)
        return self.made["mels", n]

    def add(self, step, unit, ours, plain=()):
        """A row: all figures of ours, and of the plain way measured in turn with them."""
        self.rows.append({"step": step, "unit": unit, "ours": ours, "plain": list(plain)})
        self.rows[-1]["ratio"] = [a / b for a, b in zip(ours, plain, strict=False)]
        self.show([self.rows[-1]])
        report = {"machine": machine(), "rounds": self.args.rounds, "rows": self.rows}
        self.args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    def show(self, rows):
        """The rows as a table: medians, and the ratios' least and most."""
        lines = []
        for row in rows:
            ours, plain, ratio = row["ours"], row["plain"], row["ratio"]
            middle = f"{statistics.median(plain):.2f}" if plain else ""
            ratios = [f"{f(ratio):.2f}" for f in (statistics.median, min, max)] if ratio else ["", "", ""]
            lines.append([row["step"], row["unit"], f"{statistics.median(ours):.2f}", middle, *ratios])
        print(tabulate(lines, headers=["step", "unit", "ours", "plain", "ratio", "min", "max"], disable_numparse=True), flush=True)

    def in_turn(self, ours, plain):
        """Rounds of ours and plain, one after the other; plain is left out without --against."""
        pairs = [(ours(), plain() if self.args.against else None) for _ in range(self.args.rounds)]
        return [a for a, _ in pairs], [b for _, b in pairs if b is not None]

    def plain(self, script, *arguments):
        return run(self.args.against / script, *arguments, cwd=self.args.against)

    def generate(self, n):
        """Whole-process seconds of the generator on n clips."""
        return run(ROOT / "mel_generator.py", "--input_dir", self.wavs(n), "--output_dir", self.fresh())[0]

    def train(self, mels, **constants):
        """Trains two epochs; returns the second one's clips per second, and the output folder."""
        output = self.fresh()
        constants = {"MEL_DIR": str(mels), "OUTPUT_DIR": str(output), "EPOCHS": 2} | constants
        run(edited_trainer(output.parent, **constants))
        with open(output / "history.csv", newline="") as file:
            return float(list(csv.DictReader(file))[-1]["train_clips_per_s"]), output

    def model(self):
        """The path of a best_model.pth at the trainer's defaults, made once."""
        if "model" not in self.made:
            self.made["model"] = self.train(self.mels(200), EPOCHS=1)[1] / "best_model.pth"
        return self.made["model"]

    def classify(self, n, *options):
        """Whole-process seconds of the tester on n clips."""
        command = ("--input_dir", self.wavs(n), "--model_path", self.model(), "--output_dir", self.fresh())
        return run(ROOT / "custom2_tester.py", *command, *options)[0]

    def help(self):
        for script in ("mel_generator.py", "cremad_custom2.py", "custom2_tester.py"):
            self.add(f"{script} --help", "s", [run(ROOT / script, "--help")[0] for _ in range(self.args.rounds)])

    def generator(self):
        pairs = self.in_turn(
            lambda: 1000 / self.generate(1000),
            lambda: 1000 / self.plain("generate.py", self.wavs(1000), self.fresh(), 3)[0],
        )
        self.add("generator, 1,000 clips, 3 augmentations, whole process", "clips/s", *pairs)

    def trainer(self):
        mels, model = self.mels(500), self.model()
        loop = ("-c", PLAIN_LOOP, self.args.against, ROOT, model, "train.py", mels, "--batches", 4)
        measures = {
            "ours": lambda: self.train(mels)[0],
            "ours, float32": lambda: self.train(mels, AMP="off")[0],
        }
        if self.args.against:
            measures["plain loop"] = lambda: printed_rate(run(*loop)[1])
            measures["plain"] = lambda: printed_rate(self.plain("train.py", mels, "--batches", 4)[1])
        rounds = [{name: measure() for name, measure in measures.items()} for _ in range(self.args.rounds)]
        for ours, words in (("ours", ""), ("ours, float32", ', AMP = "off"')):
            for plain, against in (("plain loop", "same model in the plain loop"), ("plain", "the plain trainer")):
                theirs = [r[plain] for r in rounds if plain in r]
                self.add(f"trainer{words}, against {against}", "clips/s", [r[ours] for r in rounds], theirs)

    def classify_rate(self, n, *options):
        """Clips per second of the tester, start-up taken off."""
        start_up = self.classify(1, *options)
        return (n - 1) / (self.classify(n, *options) - start_up)

    def tester(self):
        pairs = self.in_turn(
            lambda: self.classify_rate(2000), lambda: printed_rate(self.plain("classify.py", self.wavs(300), self.fresh())[1])
        )
        self.add("tester, 2,000 clips (plain: 300), start-up taken off", "clips/s", *pairs)

    def pictures(self):
        pictures = self.fresh()
        pictures.mkdir()
        command = ("-c", PLAIN_PICTURES, ROOT, self.wavs(300), pictures)
        pairs = self.in_turn(lambda: self.classify_rate(300, "--visualize"), lambda: printed_rate(run(*command)[1]))
        self.add("tester --visualize, 300 clips, against pictures alone", "clips/s", *pairs)

    def memory(self):
        generator = ("--input_dir", self.wavs(3000), "--output_dir", self.fresh())
        self.add("generator, 3,000 clips, memory", "GB", [peak_memory(ROOT / "mel_generator.py", *generator)])
        mels = self.mels(7500)
        trainer = edited_trainer(self.fresh(), MEL_DIR=str(mels), OUTPUT_DIR=str(self.fresh()), EPOCHS=1)
        self.add("trainer, 30,000 spectrograms, memory", "GB", [peak_memory(trainer)])
        tester = ("--input_dir", self.wavs(10_000), "--model_path", self.model(), "--output_dir", self.fresh())
        self.add("tester, 10,000 clips, memory", "GB", [peak_memory(ROOT / "custom2_tester.py", *tester)])

    def growth(self):
        """Time for 2 N over time for N, start-up taken off."""

        def ratios(seconds, n):
            times = [(seconds(1), seconds(n), seconds(2 * n)) for _ in range(self.args.rounds)]
            return [(double - start) / (once - start) for start, once, double in times]

        self.add("generator, 2,000 clips over 1,000", "times", ratios(self.generate, 1000))
        rates = [[self.train(self.mels(n))[0] for n in (500, 1000)] for _ in range(self.args.rounds)]
        self.add("trainer, an epoch of 4,000 spectrograms over one of 2,000", "times", [2 * a / b for a, b in rates])
        self.add("tester, 2,000 clips over 1,000", "times", ratios(self.classify, 1000))


def process_tree(pid):
    """A process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended
        return []
    return [pid, *(p for child in children for p in process_tree(int(child)))]


def peak_memory(*command):
    """The most memory that a command and its children held, GB: proportional set size, looked at ten times a second."""
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        now = 0
        for pid in process_tree(process.pid):
            try:
                now += int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1])
            except (OSError, TypeError):  # it has just ended
                continue
        peak = max(peak, now)
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))[:200]} failed.")
    return peak * 1024 / 1e9


def machine():
    """What ran it."""
    import torch

    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    able = torch.cpu.get_capabilities()
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "bfloat16": [name for name in ("amx_bf16", "avx512_bf16") if able.get(name)],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "date": time.strftime("%Y-%m-%d"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="folder of CREMA-D recordings")
    parser.add_argument("--against", type=lambda text: Path(text).resolve(), help="folder of the plain scripts")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP", help=" ".join(GROUPS))
    parser.add_argument("--rounds", type=int, default=3, help="pairs of each kind (default 3)")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"), help="where the figures go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(args, Path(work))
        for group in args.only:
            getattr(bench, group)()
        print()
        bench.show(bench.rows)
    print(f"\n{json.dumps(machine())}\nEvery figure: {args.output}")


if __name__ == "__main__":
    main()
