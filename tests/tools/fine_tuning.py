"""What a trained model is worth to somebody with 160 clips: fine-tuned, or trained from nothing.

    python tests/tools/fine_tuning.py --mel_dir mel_spectrograms --output_dir fine_tuning
    python tests/tools/fine_tuning.py --mel_dir mels --output_dir quick --set HIDDEN=256

One model is trained on 20 fixed actors of CREMA-D (the first of a seeded order). Five times, four
of the other actors are drawn: two train, one validates, one tests; from that model at several
learning rates, and from nothing. Prints test UAR, mean and standard deviation over the draws.
Run again, it goes on where it stopped. --set: other constants; a recipe's own come first.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from cross_validate import original_clips, parse_constant
from editing import train_once
from tabulate import tabulate

N_BASE = 20
N_DRAWS = 5
RECIPES = {  # constants that differ from the defaults; START_FROM is added where LR says so
    "from nothing": {"LEARNING_RATE": 2.5e-4, "EPOCHS": 24, "DECAY_AFTER": 16, "PATIENCE": 24},
    "fine-tuned, 1e-4": {"LEARNING_RATE": 1e-4, "EPOCHS": 8, "DECAY_AFTER": 4},
    "fine-tuned, 3e-5": {"LEARNING_RATE": 3e-5, "EPOCHS": 8, "DECAY_AFTER": 4},
}


def make_split(clips: pd.DataFrame, parts: dict[str, list[str]]) -> pd.DataFrame:
    """The clips of the actors of each part, with the column split."""
    part_of = {actor: part for part, actors in parts.items() for actor in actors}
    return clips.assign(split=clips.actor.map(part_of)).dropna()


def main() -> None:
    """Trains the base, then each recipe on each draw; prints the table as it grows."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--mel_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--set", type=parse_constant, nargs="+", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    clips = original_clips(args.mel_dir)
    output_dir = args.output_dir.resolve()
    others = dict(args.set)
    order = np.random.default_rng(0).permutation(sorted(set(clips.actor))).tolist()
    base = {"test": order[:1], "val": order[1:3], "train": order[3:N_BASE]}
    table = make_split(clips, base)
    base_uar = train_once(output_dir / "base", args.mel_dir, table, others)["test"]["uar"]
    print(f"The base: UAR {100 * base_uar:.1f} % on its one test actor.")
    rows = []
    for draw in range(N_DRAWS):
        actors = np.random.default_rng([1, draw]).permutation(order[N_BASE:])[:4].tolist()
        parts = {"train": actors[:2], "val": actors[2:3], "test": actors[3:]}
        for recipe, constants in RECIPES.items():
            folder = output_dir / f"draw{draw}" / recipe.replace(", ", "_").replace(" ", "_")
            start = {"START_FROM": str(output_dir / "base" / "best_model.pth")}
            start = start if recipe.startswith("fine-tuned") else {}
            constants = others | {"BATCH_SIZE": 32} | constants | start
            metrics = train_once(folder, args.mel_dir, make_split(clips, parts), constants)
            rows.append({"draw": draw, "recipe": recipe, "uar": 100 * metrics["test"]["uar"]})
            pd.DataFrame(rows).to_csv(output_dir / "results.csv", index=False)
    table = pd.DataFrame(rows).pivot(index="draw", columns="recipe", values="uar")[[*RECIPES]]
    print(tabulate(table.round(1), headers="keys", tablefmt="github"))
    for recipe in RECIPES:
        print(f"{recipe}: UAR {table[recipe].mean():.1f} ± {table[recipe].std():.1f} %")


if __name__ == "__main__":
    main()
