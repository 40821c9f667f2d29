"""What holds over all three scripts."""

import ast
import itertools
import subprocess
import sys

import pytest
from conftest import ROOT, run

SCRIPTS = ("mel_generator.py", "cremad_custom2.py", "custom2_tester.py")
TWICE = {"load_audio", "mel_filters", "stft", "log_mel", "ResidualBlock", "EmotionClassifier"}


def definitions(script):
    """Source of each name that a script defines at its top level."""
    text = (ROOT / script).read_text()
    found = {}
    for node in ast.parse(text).body:
        names = [node.name] if hasattr(node, "name") else [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found |= dict.fromkeys(names, "\n".join(text.splitlines()[start - 1 : node.end_lineno]))
    return found


def test_a_name_in_two_scripts_has_one_body():
    generator, trainer, tester = map(definitions, SCRIPTS)
    assert TWICE <= {name for a, b in itertools.combinations((generator, trainer, tester), 2) for name in a.keys() & b.keys()}
    for a, b in itertools.combinations((generator, trainer, tester), 2):
        assert not [name for name in a.keys() & b.keys() if name not in ("main", "parse_args") and a[name] != b[name]]


def test_scripts_share_no_code_and_the_same_banners():
    banners = []
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        imported = {n.name.split(".")[0] for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for n in node.names}
        assert not imported & {s.removesuffix(".py") for s in SCRIPTS}
        lines = text.splitlines()
        banners.append([lines[i + 1].split(":")[0].split("(")[0].strip() for i, line in enumerate(lines) if line.startswith("# -----")])
    assert banners[0] == banners[1] == banners[2] == ["# Constants", "# Reading", "# Computing", "# Writing", "# Main"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_wrong_arguments(script):
    assert "python " + script in run(ROOT / script, "--help")
    assert "error: " in run(ROOT / script, "--nonsense", "1", code=2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_does_nothing(script, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script.removesuffix('.py')}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, "", [])
