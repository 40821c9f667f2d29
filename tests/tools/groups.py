"""UAR by group of speakers: for whom does a model fail?

    python tests/tools/groups.py --predictions output/test_predictions.csv \\
        --speakers CREMA-D/VideoDemographics.csv

--predictions is test_predictions.csv of the trainer; --speakers is CREMA-D's own table of its
actors (ActorID, Age, Sex, Race, Ethnicity). Prints, by sex, age band, race and ethnicity, the UAR
with a 95 % interval by bootstrap over actors, the number of actors and clips; no figure for fewer
than three actors, who say nothing about a group. With few actors the intervals are wide: groups
whose intervals overlap are not shown to differ.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cremad_custom2 import EMOTIONS, uar, uar_interval

MIN_ACTORS = 3
AGES = {"20 to 29": (20, 30), "30 to 44": (30, 45), "45 and older": (45, 200)}


def age_band(age: int) -> str:
    """The name of the band that an age lies in."""
    return next((name for name, (low, high) in AGES.items() if low <= age < high), "unknown")


def group_row(name: str, value: str, clips: pd.DataFrame) -> list[str]:
    """A group's row: UAR, interval, actors, clips."""
    names = list(EMOTIONS.values())
    true = torch.tensor([names.index(emotion) for emotion in clips.true_class])
    predicted = torch.tensor([names.index(emotion) for emotion in clips.predicted_class])
    n_actors = clips.actor.nunique()
    if n_actors < MIN_ACTORS:
        return [name, value, "", "", str(n_actors), str(len(clips))]
    low, high = uar_interval(true, predicted, clips.actor.to_numpy())
    interval = f"{100 * low:.1f} to {100 * high:.1f}"
    return [
        name,
        value,
        f"{100 * uar(true, predicted):.1f}",
        interval,
        str(n_actors),
        str(len(clips)),
    ]


def group_table(predictions: pd.DataFrame, speakers: pd.DataFrame) -> list[list[str]]:
    """A row for all, and one for each group of actors."""
    speakers = speakers.assign(actor=speakers.ActorID.astype(str), Age=speakers.Age.map(age_band))
    clips = predictions.merge(speakers, on="actor", how="left", validate="many_to_one")
    rows = [group_row("all", "", clips)]
    for column in ("Sex", "Age", "Race", "Ethnicity"):
        for value, group in clips.groupby(clips[column].fillna("unknown")):
            rows.append(group_row(column.lower(), value, group))
    return rows


def main() -> None:
    """Reads both tables, prints the third."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--predictions", type=Path, required=True)
    parser.add_argument("--speakers", type=Path, required=True)
    args = parser.parse_args()
    predictions = pd.read_csv(args.predictions, dtype={"actor": str})
    rows = group_table(predictions, pd.read_csv(args.speakers))
    headers = ["", "group", "UAR (%)", "95 % interval", "actors", "clips"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
