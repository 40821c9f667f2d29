"""A copy of the trainer with other constants, as people edit them, and its trainings."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent.parent


def edited_text(root: Path = ROOT, **constants: Any) -> str:
    """The text of root/cremad_custom2.py with other constants."""
    text = (root / "cremad_custom2.py").read_text(encoding="utf-8")
    for name, value in constants.items():
        line = f"{name} = {value!r}"
        text, n = re.subn(rf"^{name} = .*", lambda _, line=line: line, text, flags=re.M)
        if n != 1:
            sys.exit(f"{name} stands {n} times at the left margin of cremad_custom2.py, not once.")
    return text


def edited_trainer(folder: Path, root: Path = ROOT, **constants: Any) -> Path:
    """Writes folder/cremad_custom2.py, that of `root` with other constants; returns its path."""
    text = edited_text(root, **constants)
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "cremad_custom2.py"
    script.write_text(text, encoding="utf-8")
    return script


def train_once(
    folder: Path, mel_dir: Path, split: pd.DataFrame, constants: dict[str, Any]
) -> dict[str, Any]:
    """Trains in a folder, or goes on, or finds it done; returns what metrics.json holds.

    split: columns stem, split. Exits where a training with another split or other constants stands.
    """
    folder = folder.resolve()
    # Not split.csv: that is the trainer's own, which it would move out of its way.
    paths = {"MEL_DIR": mel_dir.resolve(), "OUTPUT_DIR": folder, "SPLIT": folder / "fold.csv"}
    texts = {name: str(path) for name, path in paths.items()}
    script = folder / "cremad_custom2.py"
    files = {
        script: edited_text(**texts | {"RESUME": True} | constants),
        folder / "fold.csv": split[["stem", "split"]].to_csv(index=False, lineterminator="\n"),
    }
    for path, text in files.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            sys.exit(
                f"{path} is of another training (trainer, constants or split differ): name another "
                "--output_dir."
            )
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    metrics = folder / "metrics.json"
    if not metrics.exists() and subprocess.run([sys.executable, script]).returncode:
        sys.exit(f"The training in {folder} stopped: see above. The same command goes on there.")
    return json.loads(metrics.read_text(encoding="utf-8"))
