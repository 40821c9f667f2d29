"""What holds over all three scripts."""

import ast
import importlib
import itertools
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run, train

SCRIPTS = ("mel_generator.py", "cremad_custom2.py", "custom2_tester.py")
TWICE = {"load_audio", "mel_filters", "hann", "stft", "log_mel", "ResidualBlock", "BidirectionalLSTM", "AttentivePooling", "EmotionClassifier"}


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


def interrupt(command, wait_for, cwd):
    """Sends SIGINT once the program has printed `wait_for`; returns its exit code, seconds to end, and words."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    text = ""
    while wait_for not in text:
        piece = process.stdout.read(1)
        assert piece, f"ended before it said {wait_for!r}: {text}"
        text += piece
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    rest, _ = process.communicate(timeout=60)
    return process.returncode, time.monotonic() - started, text + rest


@pytest.mark.parametrize("script", ["mel_generator", "custom2_tester"])
def test_ctrl_c_while_workers_start_is_not_lost(script):
    """Workers inherit the starting thread's mask; another thread of this process may take the signal meanwhile."""
    seen, module = [], importlib.import_module(script)
    answer = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with module.deaf_to_ctrl_c():
            assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        assert seen == [1] and signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.signal(signal.SIGINT, answer)


def test_ctrl_c_in_the_trainer_says_how_to_go_on(mels, tmp_path):
    train(tmp_path, mels, EPOCHS=1)
    path = tmp_path / "cremad_custom2.py"
    path.write_text(path.read_text().replace("\nEPOCHS = 1\n", "\nEPOCHS = 500\n").replace("\nRESUME = False\n", "\nRESUME = True\n").replace("\nPATIENCE = 8", "\nPATIENCE = 500"))
    code, seconds, text = interrupt([path], "epoch   2/500", tmp_path)
    assert code == 130 and seconds < 5 and "RESUME = True" in text.splitlines()[-1] and "Traceback" not in text
    done = (tmp_path / "output/history.csv").read_text().count("\n") - 1
    assert done >= 2 and f"after epoch {done}." in train(tmp_path, mels, EPOCHS=done + 1, RESUME=True)


def test_ctrl_c_in_the_generator_and_the_tester(corpus, trained, tmp_path):
    for path in corpus.iterdir():
        for i in range(40):
            (tmp_path / "many").mkdir(exist_ok=True)
            (tmp_path / "many" / f"{i}{path.name}").symlink_to(path)
    both = ["--input_dir", tmp_path / "many", "--output_dir", tmp_path / "out"]
    code, seconds, text = interrupt([ROOT / "mel_generator.py", *both, "--n_augmentations", 8], "clip/s]", tmp_path)
    assert code == 130 and seconds < 5 and "goes on from there" in text and "Traceback" not in text
    code, seconds, text = interrupt([ROOT / "custom2_tester.py", *both, "--model_path", trained / "best_model.pth", "--batch_size", 2, "--visualize"], "16/1920", tmp_path)
    assert code == 130 and seconds < 5 and "--resume" in text and "Traceback" not in text
    kept = (tmp_path / "out/classification_results.csv.partial").read_text().count("\n")
    assert kept >= 9  # a header and a group of 8 at least
