"""Edits the constants of a copy of the trainer, as people do: for the tests, the benchmark, the cross-validation."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def edited_trainer(folder, **constants):
    """Writes folder/cremad_custom2.py with the constants replaced; returns its path."""
    text = (ROOT / "cremad_custom2.py").read_text()
    for name, value in constants.items():
        text, n = re.subn(rf"^{name} = .*", lambda _: f"{name} = {value!r}", text, flags=re.M)  # noqa: B023
        assert n == 1, f"{name} stands {n} times at the left margin of cremad_custom2.py"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cremad_custom2.py").write_text(text)
    return folder / "cremad_custom2.py"
