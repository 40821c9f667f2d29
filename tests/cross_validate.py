"""Folds by actor: trains the trainer as it stands on each, and prints the table of README.md.

    python tests/cross_validate.py --mel_dir mel_spectrograms --output_dir folds
    python tests/cross_validate.py --mel_dir mel_spectrograms --output_dir quick --only 0 2 --set EPOCHS=5 TONE=0.0

The folds are those of scikit-learn's GroupKFold over the actors; of the actors that a fold does not test,
one in eight validates, the others train. Writes, in --output_dir, a folder for each fold and seed with the
trainer as it ran, its split and its outputs; results.csv; confusion_matrix.png of all test clips together.
Run again, it goes on where it stopped.
"""

import argparse
import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from editing import ROOT, edited_trainer
from sklearn.model_selection import GroupKFold
from tabulate import tabulate

sys.path.insert(0, str(ROOT))
FIGURES = ("uar", "accuracy", "macro_f1", "ece")


def original_clips(mel_dir):
    """A row for each clip: stem, actor; sorted by stem."""
    stems = sorted(p.stem.removesuffix("_original") for p in mel_dir.glob("*/*_original.npy"))
    if not stems:
        sys.exit(f"--mel_dir {mel_dir} holds no EMO/*_original.npy: run mel_generator.py first.")
    return pd.DataFrame({"stem": stems, "actor": [stem.split("_")[0] for stem in stems]})


def assign(clips, n_folds, fold):
    """The clips with the column split: the fold's actors test, one in eight of the others validates."""
    test = list(GroupKFold(n_folds).split(clips, groups=clips.actor))[fold][1]
    testers = set(clips.actor[test])
    others = sorted(set(clips.actor) - testers)
    n_val = max(1, round(len(others) / 8))
    validators = set(np.random.default_rng(fold).permutation(others)[:n_val])
    split = ["test" if a in testers else "val" if a in validators else "train" for a in clips.actor]
    return clips.assign(split=split)


def train(folder, mel_dir, table, seed, constants):
    """Trains in a folder, or goes on, or finds it done; returns the test figures."""
    folder.mkdir(parents=True, exist_ok=True)
    table[["stem", "split"]].to_csv(folder / "split.csv", index=False)
    paths = {"MEL_DIR": str(mel_dir.resolve()), "OUTPUT_DIR": str(folder.resolve()), "SPLIT": str(folder.resolve() / "split.csv")}
    script, metrics = folder / "cremad_custom2.py", folder / "metrics.json"
    before = script.read_text() if script.exists() else None
    edited_trainer(folder, **paths | {"SEED": seed, "RESUME": True} | constants)
    if before not in (None, script.read_text()):
        script.write_text(before)
        sys.exit(f"{script} is not the trainer as it stands, with these constants: name another --output_dir.")
    if not metrics.exists() and subprocess.run([sys.executable, script]).returncode:
        sys.exit(f"The training in {folder} stopped: see above. The same command goes on from there.")
    return json.loads(metrics.read_text())


def parse_constant(text):
    """NAME=value of --set, as a pair."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise argparse.ArgumentTypeError(f"{text}: take NAME=value, the value as Python writes it") from error


def summarize(rows, output_dir):
    """Writes results.csv; prints every fold, and over the folds the mean and the standard deviation."""
    table = pd.DataFrame(rows)
    table.to_csv(output_dir / "results.csv", index=False)
    percent = table.assign(**{name: 100 * table[name] for name in (*FIGURES, "val_uar")})
    print(tabulate(percent.round(1), headers="keys", showindex=False))
    folds = percent.groupby("fold")[list(FIGURES)].mean()
    for name in FIGURES:
        print(f"{name}: {folds[name].mean():.1f} ± {folds[name].std():.1f} % over {len(folds)} folds")


def plot_all(folders, path):
    """The confusion matrix of all test clips of the folders together."""
    from cremad_custom2 import EMOTIONS, plot_confusion

    names = list(EMOTIONS.values())
    tests = pd.concat(pd.read_csv(folder / "test_predictions.csv") for folder in folders)
    title = f"Unseen actors: {len(tests):,} clips, {tests.actor.nunique()} actors"
    plot_confusion(path, tests.true_class, tests.predicted_class, names, title)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mel_dir", type=Path, required=True, help="--output_dir of mel_generator.py")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the trainings and the table")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the folds to run (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--set", type=parse_constant, nargs="+", default=[], metavar="NAME=VALUE", help="other constants")
    args = parser.parse_args()
    clips, rows, folders = original_clips(args.mel_dir), [], []
    for seed in args.seeds:
        for fold in args.only or range(args.folds):
            folders.append(args.output_dir / f"fold{fold}_seed{seed}")
            print(f"\nFold {fold}, seed {seed}: {folders[-1]}", flush=True)
            table = assign(clips, args.folds, fold)
            metrics = train(folders[-1], args.mel_dir, table, seed, dict(args.set))
            figures = {name: metrics["test"][name] for name in FIGURES}
            more = {"val_uar": metrics["val"]["uar"], "best_epoch": metrics["best_epoch"], "minutes": metrics["seconds"] / 60}
            rows.append({"fold": fold, "seed": seed} | figures | more)
            summarize(rows, args.output_dir)
    plot_all(folders, args.output_dir / "confusion_matrix.png")
    print(f"Files: {args.output_dir}")


if __name__ == "__main__":
    main()
