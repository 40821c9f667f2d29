"""The three scripts' speed and memory, in pairs with another checkout or with the plain way.

    python tests/tools/benchmark.py --clips CREMA-D/AudioWAV
    python tests/tools/benchmark.py --clips CREMA-D/AudioWAV --pair OTHER_CHECKOUT
    python tests/tools/benchmark.py --clips CREMA-D/AudioWAV --against PLAIN --only tester

--root is the checkout that is measured (this one), --pair another one. PLAIN is a folder with
generate.py, train.py and classify.py, the same steps written with no thought for speed. What is
compared takes turns, and a ratio is of neighbours in time: a machine's speed drifts. Prints a
table, and writes it with every single figure to --output. With 1,000 clips all groups take about
half an hour on 2 cores, with --pair twice as long; nothing else should run beside them.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import soundfile
from editing import ROOT, edited_trainer
from tabulate import tabulate
from tqdm import tqdm

SCRIPTS = ("mel_generator.py", "cremad_custom2.py", "custom2_tester.py")

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

# The pictures of --visualize as one writes them first: a new figure a clip, in one process.
PLAIN_PICTURES = """
import glob, os, sys, time
root, wavs, output = sys.argv[1:]
sys.path.insert(0, root)
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt
import soundfile
from custom2_tester import log_mel
files = sorted(glob.glob(f"{wavs}/*.wav"))
clips = [soundfile.read(f, dtype="float32")[0] for f in files]
mels = [log_mel(clip, 16000, 2048, 512, 128, 0.0, 8000.0) for clip in clips]
start = time.perf_counter()
for file, mel in zip(files, mels):
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8, 3), width_ratios=(2.4, 1), layout="constrained"
    )
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


def run(*command: Any, cwd: Path | None = None) -> tuple[float, str]:
    """Runs a Python command; returns its seconds and what it printed."""
    words = [sys.executable, *map(str, command)]
    started = time.perf_counter()
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        shown = " ".join(words)[:200]
        sys.exit(f"{shown} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - started, done.stdout


def printed_rate(output: str) -> float:
    """The clips per second that a plain script prints of itself, start-up not counted."""
    return float(re.search(r"([\d.]+) (?:training )?clips/s", output)[1])


def find_clips(folder: Path) -> list[Path]:
    """The recordings below a folder."""
    clips = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".wav", ".flac"))
    if not clips:
        sys.exit(f"--clips {folder}: no .wav or .flac file there.")
    return clips


def make_wavs(clips: list[Path], folder: Path, n: int) -> None:
    """Fills a folder with n WAV files of 16 bits from all over the corpus.

    If it has fewer, they come again under other names.
    """
    folder.mkdir()
    chosen = [clips[i * len(clips) // n] for i in range(n)] if n <= len(clips) else clips
    for i in tqdm(range(n), desc=f"{n} WAV files", leave=False, disable=None):
        source = chosen[i % len(chosen)]
        again = i // len(chosen)
        first = folder / f"{source.stem}.wav"
        if again:
            os.link(first, folder / f"{source.stem}_{again}.wav")
        else:
            samples, rate = soundfile.read(source, dtype="int16")
            soundfile.write(first, samples, rate, subtype="PCM_16")


class Workshop:
    """The folder of everything that is made on the way."""

    def __init__(self, folder: Path, clips: list[Path]) -> None:
        self.folder = folder
        self.clips = clips
        self.made: dict[int, Path] = {}

    def fresh(self) -> Path:
        """A path that nothing has yet."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "new"

    def wavs(self, n: int) -> Path:
        """A folder of n WAV files, made once."""
        if n not in self.made:
            self.made[n] = self.fresh()
            make_wavs(self.clips, self.made[n], n)
        return self.made[n]


class Checkout:
    """The three scripts of a folder, run with what they themselves made."""

    def __init__(self, root: Path, workshop: Workshop, n_model_clips: int) -> None:
        for name in SCRIPTS:
            if not (root / name).exists():
                sys.exit(f"{root} holds no {name}: name the folder of the three scripts.")
        self.root = root
        self.workshop = workshop
        self.n_model_clips = n_model_clips
        self.made: dict[Any, Path] = {}
        self.dtype = ""  # that AMP = "auto" chose last

    def generator(self, n: int) -> tuple[Any, ...]:
        """The generator's command line for n clips."""
        folders = ("--input_dir", self.workshop.wavs(n), "--output_dir", self.workshop.fresh())
        return (self.root / "mel_generator.py", *folders)

    def tester(self, n: int, *options: str) -> tuple[Any, ...]:
        """The tester's command line for n clips."""
        folders = ("--input_dir", self.workshop.wavs(n), "--output_dir", self.workshop.fresh())
        return (self.root / "custom2_tester.py", *folders, "--model_path", self.model(), *options)

    def mels(self, n: int) -> Path:
        """The spectrograms of n clips with 3 augmentations each, made once."""
        if n not in self.made:
            command = self.generator(n)
            run(*command)
            self.made[n] = command[-1]
        return self.made[n]

    def trainer(self, n: int, **constants: Any) -> tuple[Path, Path]:
        """The trainer for n clips as a script of its own, and its output folder."""
        output = self.workshop.fresh()
        paths = {"MEL_DIR": str(self.mels(n)), "OUTPUT_DIR": str(output)}
        return edited_trainer(output.parent, self.root, **paths | constants), output

    def model(self) -> Path:
        """A best_model.pth at the trainer's defaults, made once: formats differ."""
        if "model" not in self.made:
            script, output = self.trainer(self.n_model_clips, EPOCHS=1)
            run(script)
            self.made["model"] = output / "best_model.pth"
        return self.made["model"]

    def generator_rate(self, n: int) -> float:
        """Clips per second of the generator, whole process."""
        return n / run(*self.generator(n))[0]

    def training_rate(self, n: int, **constants: Any) -> float:
        """Clips per second of a training's second epoch."""
        script, output = self.trainer(n, EPOCHS=2, **constants)
        run(script)
        if not constants:
            self.dtype = json.loads((output / "metrics.json").read_text())["amp"]
        with (output / "history.csv").open(newline="") as file:
            return float(list(csv.DictReader(file))[-1]["train_clips_per_s"])

    def tester_rate(self, n: int, *options: str) -> float:
        """Clips per second of the tester, start-up taken off."""
        start_up, _ = run(*self.tester(1, *options))
        seconds, _ = run(*self.tester(n, *options))
        return (n - 1) / (seconds - start_up)


Measures = dict[str, Callable[[], float]]


class Bench:
    """Measures, and keeps what it measured as rows of the table."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.n = args.n_clips
        self.workshop = Workshop(folder, find_clips(args.clips))
        self.rows: list[dict[str, Any]] = []
        roots = {"ours": args.root} | ({"pair": args.pair} if args.pair else {})
        n_model = max(self.n // 5, 40)
        self.checkouts = {
            name: Checkout(root, self.workshop, n_model) for name, root in roots.items()
        }
        self.ours = self.checkouts["ours"]

    def each(self, measure: Callable[[Checkout], float]) -> Measures:
        """A measure of each checkout."""
        return {name: lambda c=c: measure(c) for name, c in self.checkouts.items()}

    def plain(self, script: str, *arguments: Any) -> tuple[float, str]:
        """Runs a plain script."""
        return run(self.args.against / script, *arguments, cwd=self.args.against)

    def in_turn(self, measures: Measures, rounds: int | None = None) -> dict[str, list[float]]:
        """Rounds of all measures, one after the other, every second round backwards."""
        figures: dict[str, list[float]] = {name: [] for name in measures}
        for i in range(rounds or self.args.rounds):
            order = list(measures)[:: -1 if i % 2 else 1]
            for name in order:
                figures[name].append(measures[name]())
        return figures

    def add(self, step: str, unit: str, figures: dict[str, list[float]]) -> None:
        """Rows of the table: ours against each of the others that were measured in turn."""
        ours = figures.pop("ours")
        rows = []
        for name, theirs in figures.items() or [("", [])]:
            ratio = [a / b for a, b in zip(ours, theirs, strict=False)]
            row = {"step": step, "unit": unit, "ours": ours, "against": name}
            rows.append(row | {"theirs": theirs, "ratio": ratio})
        self.rows += rows
        self.show(rows)
        roots = {name: str(checkout.root) for name, checkout in self.checkouts.items()}
        report = {"machine": machine(), "checkouts": roots, "n_clips": self.n, "rows": self.rows}
        self.args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    def show(self, rows: list[dict[str, Any]]) -> None:
        """The rows as a table: medians, and the ratios' least and most."""
        lines = []
        for row in rows:
            line = [row["step"], row["unit"], f"{statistics.median(row['ours']):.2f}"]
            if row["ratio"]:
                ratios = [f(row["ratio"]) for f in (statistics.median, min, max)]
                line += [row["against"], f"{statistics.median(row['theirs']):.2f}"]
                line += [f"{ratio:.2f}" for ratio in ratios]
            lines.append(line)
        headers = ["step", "unit", "ours", "against", "theirs", "ratio", "min", "max"]
        print(tabulate(lines, headers=headers, disable_numparse=True), flush=True)

    def help(self) -> None:
        """How long --help takes."""
        for script in SCRIPTS:
            figures = self.in_turn(self.each(lambda c, s=script: run(c.root / s, "--help")[0]))
            self.add(f"{script} --help", "s", figures)

    def generator(self) -> None:
        """Spectrograms of n clips with their copies."""
        measures = self.each(lambda c: c.generator_rate(self.n))
        if self.args.against:
            wavs = self.workshop.wavs(self.n)
            measures["plain"] = lambda: (
                self.n / self.plain("generate.py", wavs, self.workshop.fresh(), 3)[0]
            )
        step = f"generator, {self.n:,} clips, 3 augmentations, whole process"
        self.add(step, "clips/s", self.in_turn(measures))

    def trainer(self) -> None:
        """An epoch, in the dtype that AMP = "auto" chooses and in float32."""
        n = self.n // 2
        measures = self.each(lambda c: c.training_rate(n))
        off = self.each(lambda c: c.training_rate(n, AMP="off"))
        measures |= {f"{name}, off": measure for name, measure in off.items()}
        if self.args.against:
            mels = self.ours.mels(n)
            loop = ("-c", PLAIN_LOOP, self.args.against, self.ours.root, self.ours.model())
            batches = ("train.py", mels, "--batches", 4)
            measures["our model, plain loop"] = lambda: printed_rate(run(*loop, *batches)[1])
            measures["plain"] = lambda: printed_rate(self.plain(*batches)[1])
        figures = self.in_turn(measures)
        plain = {name: figures[name] for name in measures if "plain" in name}
        dtypes = " and ".join(c.dtype for c in self.checkouts.values())
        for ending, words in (("", f'"auto": {dtypes}'), (", off", '"off"')):
            own = {name: figures[name + ending] for name in self.checkouts}
            self.add(f"trainer, {n:,} clips, AMP = {words}", "clips/s", own | plain)

    def tester(self) -> None:
        """Answers for 2 n clips."""
        n = 2 * self.n
        measures = self.each(lambda c: c.tester_rate(n))
        if self.args.against:
            wavs = self.workshop.wavs(min(n, 300))
            measures["plain"] = lambda: printed_rate(
                self.plain("classify.py", wavs, self.workshop.fresh())[1]
            )
        self.add(f"tester, {n:,} clips, start-up taken off", "clips/s", self.in_turn(measures))

    def pictures(self) -> None:
        """Answers and a picture for each clip; the plain way draws alone."""
        n = max(2, 3 * self.n // 10)
        measures = self.each(lambda c: c.tester_rate(n, "--visualize"))
        if self.args.against:
            pictures = self.workshop.fresh()
            pictures.mkdir()
            command = ("-c", PLAIN_PICTURES, self.ours.root, self.workshop.wavs(n), pictures)
            measures["plain, pictures alone"] = lambda: printed_rate(run(*command)[1])
        self.add(f"tester --visualize, {n:,} clips", "clips/s", self.in_turn(measures))

    def memory(self) -> None:
        """The most memory that each script holds, with its children."""
        n = 3 * self.n
        figures = self.in_turn(self.each(lambda c: peak_memory(*c.generator(n))), rounds=1)
        self.add(f"generator, {n:,} clips, memory", "GB", figures)
        n = 15 * self.n // 2
        measures = self.each(lambda c: peak_memory(c.trainer(n, EPOCHS=1)[0]))
        figures = self.in_turn(measures, rounds=1)
        self.add(f"trainer, {4 * n:,} spectrograms, memory", "GB", figures)
        n = 10 * self.n
        figures = self.in_turn(self.each(lambda c: peak_memory(*c.tester(n))), rounds=1)
        self.add(f"tester, {n:,} clips, memory", "GB", figures)

    def growth(self) -> None:
        """Time for 2 n over time for n, start-up taken off."""
        n = self.n

        def ratio(command: Callable[[int], tuple[Any, ...]]) -> float:
            start_up, once, double = (run(*command(size))[0] for size in (1, n, 2 * n))
            return (double - start_up) / (once - start_up)

        figures = self.in_turn({"ours": lambda: ratio(self.ours.generator)})
        self.add(f"generator, {2 * n:,} clips over {n:,}", "times", figures)
        rate = self.ours.training_rate
        figures = self.in_turn({"ours": lambda: 2 * rate(n // 2) / rate(n)})
        self.add(f"trainer, epochs of {n:,} clips over {n // 2:,}", "times", figures)
        figures = self.in_turn({"ours": lambda: ratio(self.ours.tester)})
        self.add(f"tester, {2 * n:,} clips over {n:,}", "times", figures)


GROUPS = ("help", "generator", "trainer", "tester", "pictures", "memory", "growth")


def process_tree(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended
        return []
    return [pid, *(p for child in children for p in process_tree(int(child)))]


def proportional_memory(pid: int) -> int:
    """Proportional set size of a process, kB; 0 if it has just ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+)", text, re.M)
    return int(found[1]) if found else 0


def peak_memory(*command: Any) -> float:
    """The most memory that a command and its children held, GB, looked at ten times a second."""
    words = [sys.executable, *map(str, command)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(proportional_memory, process_tree(process.pid))))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{' '.join(words)[:200]} failed.")
    return peak * 1024 / 1e9


def cpu_name() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    return found[1] if found else platform.processor()


def machine() -> dict[str, Any]:
    """What ran it."""
    import torch

    able = torch.cpu.get_capabilities()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "bfloat16": [name for name in ("amx_bf16", "avx512_bf16") if able.get(name)],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "date": time.strftime("%Y-%m-%d"),
    }


def parse_args() -> argparse.Namespace:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument

    def folder(text: str) -> Path:
        return Path(text).resolve()

    add("--clips", type=Path, required=True, help="folder of CREMA-D recordings")
    add("--root", type=folder, default=ROOT, help="checkout to measure (this one)")
    add("--pair", type=folder, help="another checkout, measured in turn with --root")
    add("--against", type=folder, help="folder of the plain scripts, in turn too")
    add("--only", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP", help=" ".join(GROUPS))
    add("--n_clips", type=int, default=1000, help="the generator's; others in proportion (1000)")
    add("--rounds", type=int, default=3, help="times that each is measured (3)")
    add("--output", type=Path, default=Path("benchmark.json"), help="where the figures go")
    args = parser.parse_args()
    if args.n_clips < 50:
        parser.error(f"--n_clips is {args.n_clips}: must be at least 50, or no batch is full")
    return args


def main() -> None:
    """Runs the command line."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        for group in args.only:
            getattr(bench, group)()
        print()
        bench.show(bench.rows)
    print(f"\n{json.dumps(machine())}\nEvery figure: {args.output}")


if __name__ == "__main__":
    main()
