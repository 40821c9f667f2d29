"""Folds by actor: trains the trainer as it stands on each, and prints the table of the figures.

    python tests/tools/cross_validate.py --mel_dir mel_spectrograms --output_dir folds
    python tests/tools/cross_validate.py --mel_dir mel_spectrograms --output_dir quick \\
        --only 0 2 --set EPOCHS=5 RANDOM_EQ_DB=0.0

The folds are those of scikit-learn's GroupKFold over the actors; of the actors that a fold does
not test, one in eight validates, the others train. Writes, in --output_dir:

    foldF_seedS/            the trainer as it ran, its split (fold.csv) and its outputs
    results.csv             the figures of every fold
    confusion_matrix.png    all test clips together

Run again, it goes on where it stopped.
"""

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from editing import ROOT, train_once
from sklearn.model_selection import GroupKFold
from tabulate import tabulate

sys.path.insert(0, str(ROOT))
FIGURES = ("uar", "accuracy", "macro_f1", "ece")


def original_clips(mel_dir: Path) -> pd.DataFrame:
    """A row for each clip: stem, actor; sorted by stem."""
    stems = sorted(p.stem.removesuffix("_original") for p in mel_dir.glob("*/*_original.npy"))
    if not stems:
        sys.exit(f"--mel_dir {mel_dir} holds no EMO/*_original.npy: run mel_generator.py first.")
    return pd.DataFrame({"stem": stems, "actor": [stem.split("_")[0] for stem in stems]})


def assign(clips: pd.DataFrame, n_folds: int, fold: int) -> pd.DataFrame:
    """Adds the column split: the fold's actors test, an eighth of the others validates."""
    folds = list(GroupKFold(n_folds).split(clips, groups=clips.actor))
    test_actors = set(clips.actor.iloc[folds[fold][1]])
    others = sorted(set(clips.actor) - test_actors)
    n_val = max(1, round(len(others) / 8))
    val_actors = set(np.random.default_rng(fold).permutation(others)[:n_val])
    parts = dict.fromkeys(others, "train")
    parts |= dict.fromkeys(val_actors, "val") | dict.fromkeys(test_actors, "test")
    return clips.assign(split=clips.actor.map(parts))


def parse_constant(text: str) -> tuple[str, Any]:
    """NAME=value of --set, as a pair."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise argparse.ArgumentTypeError(
            f"{text}: must be NAME=value, the value as Python writes it"
        ) from error


def figures_row(fold: int, seed: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """A training's row of results.csv."""
    row = {"fold": fold, "seed": seed}
    row |= {name: metrics["test"][name] for name in FIGURES}
    row |= {"val_uar": metrics["val"]["uar"], "best_epoch": metrics["best_epoch"]}
    return row | {"minutes": metrics["seconds"] / 60}


def summarize(rows: list[dict[str, Any]], output_dir: Path) -> None:
    """Writes results.csv; prints every fold, and mean and standard deviation over the folds."""
    table = pd.DataFrame(rows)
    table.to_csv(output_dir / "results.csv", index=False)
    percent = table.assign(**{name: 100 * table[name] for name in (*FIGURES, "val_uar")})
    print(tabulate(percent.round(1), headers="keys", showindex=False))
    folds = percent.groupby("fold")[list(FIGURES)].mean()
    if len(folds) == 1:  # no spread to tell
        return
    for name in FIGURES:
        print(f"{name}: {folds[name].mean():.1f} ± {folds[name].std():.1f} % of {len(folds)} folds")


def plot_all(folders: list[Path], path: Path) -> None:
    """The confusion matrix of all test clips of the folders together."""
    from cremad_custom2 import EMOTIONS, plot_confusion

    names = list(EMOTIONS.values())
    tests = pd.concat(pd.read_csv(folder / "test_predictions.csv") for folder in folders)
    title = f"Unseen actors: {len(tests):,} clips, {tests.actor.nunique()} actors"
    plot_confusion(path, tests.true_class, tests.predicted_class, names, title)


def main() -> None:
    """Runs the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--mel_dir", type=Path, required=True, help="--output_dir of mel_generator.py")
    add("--output_dir", type=Path, required=True, help="folder for the trainings and the table")
    add("--folds", type=int, default=5)
    add("--only", type=int, nargs="+", help="numbers of the folds to run (all)")
    add("--seeds", type=int, nargs="+", default=[42])
    add("--set", type=parse_constant, nargs="+", default=[], metavar="NAME=VALUE", help="constants")
    args = parser.parse_args()
    clips = original_clips(args.mel_dir)
    rows = []
    folders = []
    for seed in args.seeds:
        for fold in args.only or range(args.folds):
            folder = args.output_dir / f"fold{fold}_seed{seed}"
            folders.append(folder)
            print(f"\nFold {fold}, seed {seed}: {folder}", flush=True)
            table = assign(clips, args.folds, fold)
            metrics = train_once(folder, args.mel_dir, table, {"SEED": seed} | dict(args.set))
            rows.append(figures_row(fold, seed, metrics))
            summarize(rows, args.output_dir)
    plot_all(folders, args.output_dir / "confusion_matrix.png")
    print(f"Files: {args.output_dir}")


if __name__ == "__main__":
    main()
