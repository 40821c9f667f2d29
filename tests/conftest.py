"""What the tests share: the three scripts at toy size, on a corpus made on the spot.

`run` starts a real command line; `call` runs a script's main() in this process, which saves the
seconds that PyTorch's import takes. A real one stands for each script and each exit status.
"""

import contextlib
import csv
import importlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]
# Toy trainings are too small for threads: on a busy machine two would wait for each other.
os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg")

from editing import edited_trainer  # noqa: E402

SCRIPTS = ("mel_generator.py", "cremad_custom2.py", "custom2_tester.py")
# Small, but learnt enough that its answers differ from clip to clip: one that says the same of
# all would hide every mistake.
TOY = {
    "CHANNELS": (8, 8, 16, 16),
    "HIDDEN": 32,
    "HEADS": 4,
    "BATCH_SIZE": 16,
    "EPOCHS": 5,
    "LEARNING_RATE": 3e-3,
    "OTHER_FLOOR": 0.0,  # takes longer to learn
    "AUTOMATIC_GAIN": 0.0,
}
NO_AUGMENTATION = {
    "TIME_MASK": 0,
    "MEL_MASK": 0,
    "SPEED_PERTURB": 0.0,
    "MEL_SHIFT": 0,
    "RANDOM_EQ_DB": 0.0,
    "RANDOM_GAIN_DB": 0.0,
    "NARROW_BAND": 0.0,
    "OTHER_FLOOR": 0.0,
    "AUTOMATIC_GAIN": 0.0,
    "ADD_FLOOR": False,
}


def noise_floor(mel: np.ndarray) -> np.ndarray:
    """A clip's noise floor, dB (mel bands), of its log-mel (mel bands, frames): NumPy's way."""
    power = 10 ** (mel[:, (mel > -100).any(axis=0)].astype(float) / 10)
    n_quiet = max(1, power.shape[1] // 10)
    return 10 * np.log10(power[:, power.sum(axis=0).argsort()[:n_quiet]].mean(axis=1))


def filled(mel: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """A log-mel (mel bands, frames), dB, with the noise that its bands lack against a floor, dB.

    NumPy's way of what the scripts do; the noise is PyTorch's, of seed 0.
    """
    lacking = np.maximum(10 ** (floor / 10) - 10 ** (noise_floor(mel) / 10), 0)[:, None]
    added = np.where((mel <= -100).all(axis=0), 10 ** (floor[:, None] / 10), lacking)
    uniform = torch.rand(2, *mel.T.shape, generator=torch.Generator().manual_seed(0))
    noise = -np.log(1 - uniform.double().numpy()).mean(axis=0).T
    return 10 * np.log10(10 ** (mel.astype(float) / 10) + added * noise)


class Done(NamedTuple):
    """How a script ended."""

    code: int
    text: str  # standard output and error, in the order written


def check(done: Done, code: int) -> str:
    """Asserts the exit status, and that nobody sees a traceback; returns the text."""
    assert "Traceback" not in done.text, done.text
    assert done.code == code, f"exit {done.code}, not {code}:\n{done.text}"
    return done.text


def run(script, *arguments, cwd=ROOT, code=0, **options) -> str:
    """Runs a script's real command line; returns what it printed."""
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        **options,
    )
    return check(Done(done.returncode, done.stdout), code)


def call(module, *arguments, code=0) -> str:
    """Runs a script's main() in this process; returns what it printed."""
    text = io.StringIO()
    if isinstance(module, str):
        module = importlib.import_module(module)
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            status = module.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's
            status = end.code
    return check(Done(status, text.getvalue()), code)


def generate(input_dir, output_dir, *options, code=0) -> str:
    """Runs mel_generator.py in this process."""
    folders = ("--input_dir", input_dir, "--output_dir", output_dir)
    return call("mel_generator", *folders, *options, code=code)


def train(folder, mel_dir, code=0, toy=TOY, **constants) -> str:
    """Runs the trainer with other constants, in this process; results in folder/output."""
    import cremad_custom2

    paths = {"MEL_DIR": str(mel_dir), "OUTPUT_DIR": str(folder / "output")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (toy | paths | constants).items():
            patch.setattr(cremad_custom2, name, value)
        return call(cremad_custom2, code=code)


def train_by_command(folder, mel_dir, code=0, toy=TOY, **constants) -> str:
    """Runs an edited copy of the trainer by its real command line; results in folder/output."""
    paths = {"MEL_DIR": str(mel_dir), "OUTPUT_DIR": str(folder / "output")}
    return run(edited_trainer(folder, **toy | paths | constants), code=code)


def classify(input_dir, model, output_dir, *options, code=0) -> str:
    """Runs custom2_tester.py in this process."""
    paths = ("--input_dir", input_dir, "--model_path", model, "--output_dir", output_dir)
    return call("custom2_tester", *paths, *options, code=code)


def start(script, *arguments, cwd=ROOT, **options) -> subprocess.Popen:
    """A script at work, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=cwd,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def wait_until(condition, seconds=120):
    """Asks every 5 ms until the condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)


def read_table(path) -> list[dict[str, str]]:
    """The rows of a CSV, as text."""
    with Path(path).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """48 synthetic clips of 8 actors, one of each emotion each."""
    from synthetic_corpus import make_corpus

    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, actors=8, takes=1)
    return folder


@pytest.fixture(scope="session")
def mels(corpus, tmp_path_factory):
    """Their spectrograms, by the real command line."""
    folder = tmp_path_factory.mktemp("mels")
    options = ("--n_augmentations", 2, "--workers", 2)
    run(ROOT / "mel_generator.py", "--input_dir", corpus, "--output_dir", folder, *options)
    return folder


@pytest.fixture(scope="session")
def trained(mels, tmp_path_factory):
    """The output folder of a toy training, by the real command line."""
    folder = tmp_path_factory.mktemp("trained")
    train_by_command(folder, mels)
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
