"""Writes labels.csv for a corpus whose file names do not tell emotions in CREMA-D's manner.

    python tests/tools/label_corpora.py ravdess Audio_Speech_Actors_01-24
    python tests/tools/label_corpora.py folders my_recordings     # a folder for each emotion

Naming rules: RAVDESS, Emo-DB, TESS, SAVEE, or one folder an emotion. The table (file, emotion,
speaker) is for --labels of mel_generator.py and custom2_tester.py; speakers get the corpus's name
as a prefix, so that two corpora's numbers do not meet. Emotions that the scripts do not know
(calm, surprise, boredom) keep their names and are skipped there.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mel_generator import find_audio, write_csv

RAVDESS = {
    "01": "Neutral", "02": "calm", "03": "Happy", "04": "Sad",
    "05": "Angry", "06": "Fear", "07": "Disgust", "08": "surprise",
}  # fmt: skip
EMODB = {
    "W": "Angry", "L": "boredom", "E": "Disgust", "A": "Fear",
    "F": "Happy", "T": "Sad", "N": "Neutral",
}  # fmt: skip
TESS = {
    "angry": "Angry", "disgust": "Disgust", "fear": "Fear", "happy": "Happy",
    "neutral": "Neutral", "ps": "surprise", "sad": "Sad",
}  # fmt: skip
SAVEE = {
    "a": "Angry", "d": "Disgust", "f": "Fear", "h": "Happy",
    "n": "Neutral", "sa": "Sad", "su": "surprise",
}  # fmt: skip


def ravdess(path: PurePosixPath) -> tuple[str, str] | None:
    """Emotion and speaker of 03-01-06-01-02-01-12.wav: third and last number."""
    fields = path.stem.split("-")
    if len(fields) != 7 or fields[2] not in RAVDESS:
        return None
    return RAVDESS[fields[2]], f"ravdess-{fields[6]}"


def emodb(path: PurePosixPath) -> tuple[str, str] | None:
    """Emotion and speaker of 03a01Fa.wav: sixth letter (German), first two digits."""
    match = re.fullmatch(r"(\d\d)[a-z]\d\d([A-Z])[a-z]?", path.stem)
    if match is None or match[2] not in EMODB:
        return None
    return EMODB[match[2]], f"emodb-{match[1]}"


def tess(path: PurePosixPath) -> tuple[str, str] | None:
    """Emotion and speaker of OAF_back_angry.wav: last and first field."""
    fields = path.stem.split("_")
    if len(fields) < 3 or fields[-1].lower() not in TESS:
        return None
    speaker = "OAF" if fields[0] == "OA" else fields[0]  # OA_bite_neutral.wav, as released
    return TESS[fields[-1].lower()], f"tess-{speaker}"


def savee(path: PurePosixPath) -> tuple[str, str] | None:
    """Emotion and speaker of DC_a01.wav, or of DC/a01.wav."""
    speaker, _, code = path.stem.rpartition("_")
    match = re.fullmatch(r"([a-z]+)\d\d", code)
    if match is None or match[1] not in SAVEE:
        return None
    return SAVEE[match[1]], f"savee-{speaker or path.parent.name}"


def folders(path: PurePosixPath) -> tuple[str, str] | None:
    """The folder's name is the emotion; the speaker is not told."""
    return (path.parent.name, "") if path.parent.name else None


RULES = {"ravdess": ravdess, "emodb": emodb, "tess": tess, "savee": savee, "folders": folders}


def main() -> None:
    """Reads the names, writes the table, says how many there are of each emotion."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("corpus", choices=RULES)
    parser.add_argument("folder", type=Path, help="the --input_dir of the scripts")
    parser.add_argument("--output", type=Path, help="the table (default: labels.csv in the folder)")
    args = parser.parse_args()
    paths, _, _ = find_audio(args.folder)
    rows = []
    for path in paths:
        label = RULES[args.corpus](PurePosixPath(path))
        if label:
            rows.append({"file": path, "emotion": label[0], "speaker": label[1]})
    if not rows:
        sys.exit(f"{args.folder} holds no sound file that is named as {args.corpus} names them.")
    output = args.output or args.folder / "labels.csv"
    write_csv(output, ("file", "emotion", "speaker"), rows)
    for emotion, n in sorted(Counter(row["emotion"] for row in rows).items()):
        print(f"{n:6d}  {emotion}")
    print(f"{len(rows)} of {len(paths)} files: {output}")


if __name__ == "__main__":
    main()
