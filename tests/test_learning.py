"""That the whole learns what is there, and nothing where nothing is."""

import json

import pytest
from conftest import TOY, generate, train
from synthetic_corpus import make_corpus

LAPTOP = TOY | {"CHANNELS": (16, 32, 48, 64), "HIDDEN": 64, "EPOCHS": 8, "BATCH_SIZE": 32, "LEARNING_RATE": 1e-3}


@pytest.mark.parametrize("shuffled, low, high", [(False, 0.5, 0.95), (True, 0.0, 0.3)])
def test_unseen_synthetic_actors(tmp_path, shuffled, low, high):
    make_corpus(tmp_path / "wavs", actors=16, takes=6, shuffle_labels=shuffled)
    generate(tmp_path / "wavs", tmp_path / "mels", "--n_augmentations", 1)
    train(tmp_path / "run", tmp_path / "mels", toy=LAPTOP)
    test = json.loads((tmp_path / "run/output/metrics.json").read_text())["test"]
    assert test["n_actors"] == 2 and low < test["uar"] < high


def test_real_recordings(crema_d, tmp_path):
    """Eight actors, a laptop's constants: well above chance (0.167) on two voices never heard."""
    (tmp_path / "wavs").mkdir()
    actors = sorted({p.name[:4] for p in crema_d.glob("*.flac")})[:8]
    for path in (p for a in actors for p in crema_d.glob(f"{a}_*.flac")):
        (tmp_path / "wavs" / path.name).symlink_to(path)
    text = generate(tmp_path / "wavs", tmp_path / "mels", "--n_augmentations", 1)
    assert "not all of it" in text and "8 actors of 91" in text
    text = train(tmp_path / "run", tmp_path / "mels", toy=LAPTOP)
    test = json.loads((tmp_path / "run/output/metrics.json").read_text())["test"]
    assert test["uar"] > 0.25
