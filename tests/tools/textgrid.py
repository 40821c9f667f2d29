"""Writes a Praat TextGrid for each recording of a results folder; ELAN reads them too.

    python custom2_tester.py --input_dir interviews --output_dir results --segments
    python tests/tools/textgrid.py results

From segments.csv to results/textgrids/NAME.EXT.TextGrid, tiers `emotion` and `confidence`: each
moment belongs to the window whose middle is nearest. None for a recording that failed.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from custom2_tester import UserError, atomic_write, read_rows


def intervals(windows: list[dict], duration: float) -> list[tuple[float, float, dict]]:
    """Start, end (s) and window of each stretch of a recording."""
    middles = [(float(w["start_s"]) + float(w["end_s"])) / 2 for w in windows]
    borders = [(a + b) / 2 for a, b in itertools.pairwise(middles)]
    starts = [0.0, *borders]
    ends = [*borders, duration]
    return list(zip(starts, ends, windows, strict=True))


def tier(number: int, name: str, spans: list[tuple[float, float, str]]) -> list[str]:
    """The lines of an interval tier; quotes in labels are doubled."""
    lines = [
        f"    item [{number}]:",
        '        class = "IntervalTier"',
        f'        name = "{name}"',
        f"        xmin = {spans[0][0]:.6f}",
        f"        xmax = {spans[-1][1]:.6f}",
        f"        intervals: size = {len(spans)}",
    ]
    for i, (start, end, text) in enumerate(spans, start=1):
        lines += [
            f"        intervals [{i}]:",
            f"            xmin = {start:.6f}",
            f"            xmax = {end:.6f}",
            '            text = "{}"'.format(text.replace('"', '""')),
        ]
    return lines


def textgrid(windows: list[dict], duration: float) -> str:
    """A recording's TextGrid, in Praat's long text format."""
    spans = intervals(windows, duration)
    emotion = [(start, end, window["predicted_class"]) for start, end, window in spans]
    confidence = [(start, end, window["confidence"]) for start, end, window in spans]
    lines = [
        'File type = "ooTextFile"',
        'Object class = "TextGrid"',
        "",
        "xmin = 0",
        f"xmax = {duration:.6f}",
        "tiers? <exists>",
        "size = 2",
        "item []:",
        *tier(1, "emotion", emotion),
        *tier(2, "confidence", confidence),
    ]
    return "\n".join(lines) + "\n"


def write_all(results: Path) -> int:
    """Writes the TextGrids of a results folder; returns how many."""
    segments = results / "segments.csv"
    if not segments.is_file():
        raise UserError(f"{results} holds no segments.csv: run custom2_tester.py with --segments.")
    rows = read_rows(results / "classification_results.csv")
    durations = {row["file"]: float(row["duration_s"]) for row in rows if not row["error"]}
    n_written = 0
    for path, windows in itertools.groupby(read_rows(segments), key=lambda row: row["file"]):
        if path not in durations:
            continue
        output = results / "textgrids" / f"{path}.TextGrid"
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output) as file:
            text = textgrid(list(windows), durations[path])
            file.write(text.encode("utf-8", "surrogateescape"))
        n_written += 1
    return n_written


def main() -> None:
    """Runs the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("results", type=Path, help="--output_dir of custom2_tester.py --segments")
    args = parser.parse_args()
    try:
        n_written = write_all(args.results)
    except UserError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}")
    print(f"{n_written} TextGrids: {args.results / 'textgrids'}")


if __name__ == "__main__":
    main()
