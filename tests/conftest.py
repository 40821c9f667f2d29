"""What the tests share: the real command lines at toy size, on a corpus made on the spot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from editing import ROOT, edited_trainer

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Small, but learnt enough that its answers differ from clip to clip: one that says the same of all hides every mistake.
TOY = {"CHANNELS": (8, 8, 16, 16), "HIDDEN": 32, "HEADS": 4, "BATCH_SIZE": 16, "EPOCHS": 5, "LEARNING_RATE": 3e-3}


def run(script, *arguments, cwd=ROOT, code=0):
    """Runs a script; asserts its exit code and that nobody sees a traceback; returns stdout + stderr."""
    done = subprocess.run([sys.executable, str(script), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=600)
    text = done.stdout + done.stderr
    assert "Traceback" not in text, text
    assert done.returncode == code, f"exit {done.returncode}, not {code}:\n{text}"
    return text


def generate(input_dir, output_dir, *options, code=0):
    return run(ROOT / "mel_generator.py", "--input_dir", input_dir, "--output_dir", output_dir, *options, code=code)


def train(folder, mel_dir, code=0, toy=TOY, **constants):
    """Runs the trainer with other constants; results in folder/output."""
    paths = {"MEL_DIR": str(mel_dir), "OUTPUT_DIR": str(folder / "output")}
    return run(edited_trainer(folder, **toy | paths | constants), code=code)


def classify(input_dir, model, output_dir, *options, code=0):
    return run(ROOT / "custom2_tester.py", "--input_dir", input_dir, "--model_path", model, "--output_dir", output_dir, *options, code=code)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """48 synthetic clips of 8 actors, one of each emotion each."""
    from synthetic_corpus import make_corpus

    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, actors=8, takes=1)
    return folder


@pytest.fixture(scope="session")
def mels(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mels")
    generate(corpus, folder, "--n_augmentations", 2, "--workers", 2)
    return folder


@pytest.fixture(scope="session")
def trained(mels, tmp_path_factory):
    """The output folder of a toy training."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder, mels)
    return folder / "output"


@pytest.fixture(scope="session")
def crema_d():
    """The real corpus: CREMA_D_DIR names its folder."""
    folder = os.environ.get("CREMA_D_DIR")
    if not folder:
        pytest.skip("CREMA_D_DIR is unset: no real recordings here")
    return Path(folder)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long")
