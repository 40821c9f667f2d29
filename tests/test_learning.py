"""That the whole learns what is there, and nothing where nothing is."""

import json

import numpy as np
import pytest
from conftest import TOY, generate, train
from synthetic_corpus import make_corpus

LAPTOP = TOY | {
    "CHANNELS": (16, 32, 48, 64),
    "HIDDEN": 64,
    "EPOCHS": 8,
    "BATCH_SIZE": 32,
    "LEARNING_RATE": 1e-3,
}


@pytest.mark.parametrize("shuffled, low, high", [(False, 0.5, 0.95), (True, 0.0, 0.3)])
def test_unseen_synthetic_actors(tmp_path, shuffled, low, high):
    """In this process: however long it takes on a busy machine, no time limit ends it."""
    make_corpus(tmp_path / "wavs", actors=16, takes=6, shuffle_labels=shuffled)
    generate(tmp_path / "wavs", tmp_path / "mels", "--n_augmentations", 1, "--workers", 2)
    train(tmp_path / "run", tmp_path / "mels", toy=LAPTOP, save_figure=lambda *_, **__: None)
    test = json.loads((tmp_path / "run/output/metrics.json").read_text())["test"]
    assert test["n_actors"] == 2
    assert low < test["uar"] < high


def test_real_recordings(crema_d, tmp_path):
    """Eight actors, a laptop's constants: well above chance (0.167) on a voice never heard."""
    (tmp_path / "wavs").mkdir()
    clips = [path for path in crema_d.iterdir() if path.suffix.lower() in (".wav", ".flac")]
    actors = sorted({path.name[:4] for path in clips})[:8]
    for path in clips:
        if path.name[:4] in actors:
            (tmp_path / "wavs" / path.name).symlink_to(path)
    text = generate(tmp_path / "wavs", tmp_path / "mels", "--n_augmentations", 1)
    assert "not all of it" in text
    assert "8 actors of 91" in text
    train(tmp_path / "run", tmp_path / "mels", toy=LAPTOP)
    test = json.loads((tmp_path / "run/output/metrics.json").read_text())["test"]
    assert test["uar"] > 0.25


def test_distortions_are_what_they_say():
    """Those of tests/tools/robustness.py: level, noise, a telephone's band, a room's echo."""
    import robustness

    random = np.random.default_rng(0)
    rate = 16000
    time = np.arange(rate) / rate
    voice = np.sin(2 * np.pi * 200 * time) + np.sin(2 * np.pi * 1000 * time)
    assert np.allclose(robustness.level(voice, rate, random, 20), 10 * voice)
    added = robustness.noise(voice, rate, random, 10) - voice
    ratio = 10 * np.log10(np.mean(voice**2) / np.mean(added**2))
    assert ratio == pytest.approx(10, abs=0.2)
    heard = np.abs(np.fft.rfft(robustness.band(voice, rate, random, 300, 3400)))
    assert heard[1000] > 1000
    assert heard[200] < 1
    echo = robustness.room(np.eye(1, rate)[0], rate, random, 0.5)
    early = np.mean(echo[800:1600] ** 2)
    late = np.mean(echo[5600:6400] ** 2)
    # 60 dB in 0.5 s are 36 dB in 0.3 s.
    assert 10 * np.log10(early / late) == pytest.approx(36, abs=3)
