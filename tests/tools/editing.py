"""Edits the constants of a copy of the trainer, as people do: tests and tools use it."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


def edited_trainer(folder: Path, root: Path = ROOT, **constants: Any) -> Path:
    """Writes folder/cremad_custom2.py, that of `root` with other constants; returns its path."""
    text = (root / "cremad_custom2.py").read_text(encoding="utf-8")
    for name, value in constants.items():
        line = f"{name} = {value!r}"
        text, n = re.subn(rf"^{name} = .*", lambda _, line=line: line, text, flags=re.M)
        assert n == 1, f"{name} stands {n} times at the left margin of cremad_custom2.py"
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "cremad_custom2.py"
    script.write_text(text, encoding="utf-8")
    return script
