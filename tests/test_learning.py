"""That the whole learns what is there, and nothing where nothing is."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import robustness
from conftest import NO_AUGMENTATION, classify, generate, train
from synthetic_corpus import make_corpus

LAPTOP = {
    "CHANNELS": (16, 32, 48, 64),
    "HIDDEN": 64,
    "HEADS": 4,
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
    assert "it is incomplete" in text
    assert "8 actors of 91" in text
    train(tmp_path / "run", tmp_path / "mels", toy=LAPTOP)
    test = json.loads((tmp_path / "run/output/metrics.json").read_text())["test"]
    assert test["uar"] > 0.25


def uar_in_condition(paths: list[Path], model: Path, folder: Path, condition: str) -> float:
    """UAR, %, of the clips in a condition of tests/tools/robustness.py."""
    robustness.distort(paths, folder / "clips", condition)
    classify(folder / "clips", model, folder / "results", "--adapt", "off")
    return robustness.score(folder / "results/classification_results.csv", len(paths))["UAR"]


@pytest.mark.slow
def test_noise_suppression_costs_less_with_the_defaults(tmp_path):
    """Less than without augmentation, over three seeds of corpus and training together."""
    lost = {"defaults": [], "none": []}
    for seed in range(3):
        wavs, mels = (tmp_path / f"{name}{seed}" for name in ("wavs", "mels"))
        make_corpus(wavs, actors=16, takes=6, seed=seed)
        generate(wavs, mels, "--n_augmentations", 1, "--workers", 2)
        for name, constants in (("defaults", {}), ("none", NO_AUGMENTATION)):
            folder = tmp_path / f"{name}{seed}"
            toy = LAPTOP | constants | {"SEED": seed}
            train(folder, mels, toy=toy, save_figure=lambda *_, **__: None)
            paths = robustness.test_clips(wavs, folder / "output")
            uars = [
                uar_in_condition(paths, folder / "output/best_model.pth", folder / part, condition)
                for part, condition in (("a", "clean"), ("b", "noise suppressed by 60 dB"))
            ]
            lost[name].append(uars[0] - uars[1])
    print(lost)
    assert np.mean(lost["defaults"]) < np.mean(lost["none"])


def test_distortions_are_what_they_say():
    """Those of tests/tools/robustness.py: level, noise, a telephone's band, a room's echo."""
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


def test_suppression_takes_the_noise_and_leaves_the_voice():
    """Noise alone falls by nearly the decibels that are asked for; a tone 40 dB above it stays."""
    random = np.random.default_rng(0)
    rate = 16000
    hiss = 0.001 * random.standard_normal(2 * rate)
    tone = np.sin(2 * np.pi * 1000 * np.arange(2 * rate) / rate)
    tone[:rate] = 0
    for decibels, at_least in ((20, 14), (60, 15)):  # peaks over four times the mean stay
        quiet = robustness.suppressed(hiss + tone, rate, random, decibels)
        assert len(quiet) == 2 * rate
        fallen = 10 * np.log10(np.mean(hiss[:12000] ** 2) / np.mean(quiet[:12000] ** 2))
        assert at_least < fallen < decibels + 1
        assert np.mean(quiet[-12000:] ** 2) == pytest.approx(0.5, rel=0.02)


def test_automatic_gain_brings_each_stretch_to_its_target():
    random = np.random.default_rng(0)
    rate = 16000
    clip = random.standard_normal(3 * rate) * np.repeat([0.5, 0.01, 0.0001], rate)
    heard = robustness.automatic_gain(clip, rate, random, -20)
    middles = [heard[second * rate + 6400 : second * rate + 9600] for second in range(3)]
    levels = [10 * np.log10(np.mean(samples**2)) for samples in middles]
    assert levels[:2] == pytest.approx([-20, -20], abs=1.5)
    assert levels[2] == pytest.approx(-50, abs=1.5)  # 30 dB is all it has


def test_a_condition_in_which_a_clip_fails_has_failed(tmp_path):
    names = list(robustness.EMOTIONS.values())
    rows = [{"true_class": name, "predicted_class": name, "confidence": 1.0} for name in names]
    table = pd.DataFrame([row | {row["true_class"]: 1.0} for row in rows]).fillna(0.0)
    table.assign(error=None).to_csv(tmp_path / "whole.csv", index=False)
    found = robustness.score(tmp_path / "whole.csv", 6)
    assert (found["UAR"], found["calibration_error"], found["failed"]) == (100, 0, 0)
    table.assign(error=[None] * 5 + ["silent"]).to_csv(tmp_path / "one.csv", index=False)
    assert robustness.score(tmp_path / "one.csv", 6) == {"clips": 6, "failed": 1}
    assert robustness.score(tmp_path / "whole.csv", 7) == {"clips": 7, "failed": 1}
