"""cremad_custom2.py: sampling, model, augmentation, training, resuming, reports, bad input."""

import contextlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
import zipfile
from unittest import mock

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import NO_AUGMENTATION, ROOT, TOY, call, generate, read_table, run, train
from editing import edited_trainer
from sklearn.metrics import classification_report, f1_score, recall_score
from torch import nn

import cremad_custom2 as trainer

CPU = torch.device("cpu")
NAMES = list(trainer.EMOTIONS.values())
OUTPUTS = {
    "best_model.pth",
    "last_checkpoint.pth",
    "history.csv",
    "training_history.png",
    "confusion_matrix.png",
    "classification_report.txt",
    "test_report.png",
    "metrics.json",
    "test_predictions.csv",
    "split.csv",
    "run.json",
}


def no_pictures(figure, path, dpi=200):
    """In place of save_figure: a second less in each training."""


# One dtype wherever these run: whether bfloat16 is faster depends on what else the machine does.
PLAIN = TOY | {"AMP": "off"}
QUICK = PLAIN | {"EPOCHS": 1, "save_figure": no_pictures}


@pytest.fixture
def constants(monkeypatch):
    """Sets the trainer's constants, or replaces its functions, for one test."""

    def set_constants(**values):
        for name, value in values.items():
            monkeypatch.setattr(trainer, name, value)

    return set_constants


def seeded(seed):
    """A generator of its own for a test's random numbers."""
    return torch.Generator().manual_seed(seed)


def read_history(folder):
    """history.csv but for the times."""
    rows = read_table(folder / "history.csv")
    timed = ("seconds", "train_clips_per_s")
    return [{name: cell for name, cell in row.items() if name not in timed} for row in rows]


def load(path):
    """A checkpoint's dict."""
    return torch.load(path, weights_only=True)


def leaves(value, place=""):
    """Everything in a checkpoint but times and paths: place and value."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in pairs:
            if key not in ("seconds", "train_clips_per_s", "OUTPUT_DIR", "EPOCHS", "RESUME"):
                yield from leaves(part, f"{place}/{key}")
    else:
        yield place, value


def differences(ours, theirs):
    """Where two checkpoints differ, to the bit."""
    ours, theirs = dict(leaves(ours)), dict(leaves(theirs))
    found = list(ours.keys() ^ theirs.keys())
    for place in ours.keys() & theirs.keys():
        one, other = ours[place], theirs[place]
        is_equal = torch.equal(one, other) if torch.is_tensor(one) else one == other
        if not is_equal:
            found.append(place)
    return found


# --------------------------------------------------------------------------------------
# Sampling


def stand_in(length, label, **more):
    """Spectrograms without files: what drawing needs of them."""
    data = trainer.Spectrograms.__new__(trainer.Spectrograms)
    data.length = length
    data.label = label
    data.indices = {"train": torch.arange(len(label))}
    for name, value in more.items():
        setattr(data, name, value)
    return data


def test_sampling_draws_every_emotion_as_often(constants):
    n_clips = torch.tensor([1000, 500, 250, 100, 50, 2100])
    label = torch.repeat_interleave(torch.arange(6), n_clips)
    data = stand_in(torch.randint(10, 100, (4000,), generator=seeded(0)), label)
    constants(BATCH_SIZE=50, WEIGHTED_SAMPLING=True)
    batches, _ = trainer.draw_epoch(data, seeded(1))
    assert (label[batches.flatten()].bincount() / 4000 - 1 / 6).abs().max() < 0.03
    constants(WEIGHTED_SAMPLING=False)
    batches, _ = trainer.draw_epoch(data, seeded(1))
    assert torch.equal(batches.flatten().sort().values, torch.arange(4000)), "each clip once"


def test_an_absent_emotion_is_not_drawn(constants):
    constants(BATCH_SIZE=10, WEIGHTED_SAMPLING=True)
    data = stand_in(torch.full((600,), 50), torch.arange(600) % 5)
    batches, _ = trainer.draw_epoch(data, seeded(1))
    shares = data.label[batches.flatten()].bincount(minlength=6) / 600
    assert shares[5] == 0
    assert (shares[:5] - 0.2).abs().max() < 0.06


def test_batches_hold_clips_of_like_length(constants):
    """Of like length at the speeds drawn for them; but not the short ones first."""
    constants(BATCH_SIZE=10, SPEED_PERTURB=0.4)
    data = stand_in(torch.randint(10, 190, (600,), generator=seeded(0)), torch.arange(600) % 6)
    clip, rate = trainer.draw_epoch(data, seeded(1))
    assert clip.shape == rate.shape == (60, 10)
    assert 0.67 < rate.min() < 0.69
    assert 1.45 < rate.max() < 1.5
    length = data.length[clip] / rate
    assert (length.amax(1) - length.amin(1)).mean() < 10
    assert (length.mean(1).diff() < 0).any()


def test_an_epochs_draw_depends_on_its_seed_alone(constants):
    constants(BATCH_SIZE=10)
    data = stand_in(torch.randint(10, 190, (600,), generator=seeded(0)), torch.arange(600) % 6)
    one, _ = trainer.draw_epoch(data, seeded(1))
    torch.manual_seed(5)
    again, _ = trainer.draw_epoch(data, seeded(1))
    other, _ = trainer.draw_epoch(data, seeded(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# --------------------------------------------------------------------------------------
# Augmentation


def test_clips_are_whole_and_at_another_speed(constants):
    constants(MAX_WIDTH=90)
    data = stand_in(
        torch.tensor([100, 80]),
        torch.tensor([0, 1]),
        frames=torch.arange(1.0, 181.0)[:, None].expand(180, 3),
        start=torch.tensor([0, 100]),
    )
    random = seeded(0)
    seen = set()
    for _ in range(50):
        rate = 0.82 + 0.4 * torch.rand(3, generator=random)
        x, lengths, label = data.batch(torch.tensor([1, 0, 1]), rate, CPU)
        assert x.shape[1] % 8 == 0
        assert lengths.max() <= 90
        assert label.tolist() == [1, 0, 1]
        seen |= set(lengths[[0, 2]].tolist())
        for clip, n in zip(x[[0, 2], :, 0], lengths[[0, 2]], strict=True):
            assert clip[0] == 101
            assert (clip[:n].diff() >= 0).all()
            assert n == 90 or 178 <= clip[n - 1] <= 180
    assert min(seen) < 70
    assert max(seen) == 90
    assert len(seen) > 10


def test_bands_move_together_and_at_most_so_far(constants):
    constants(MEL_SHIFT=3)
    torch.manual_seed(0)
    x = torch.arange(32.0).expand(40, 9, 32)
    moved = (trainer.shift_bands(x) - x)[:, :, 3:-3]
    assert set(moved.unique().tolist()) == {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0}
    assert (moved == moved[:, :1, :1]).all(), "a clip's bands or frames move apart"
    shifted = trainer.shift_bands(x)
    assert (shifted.min(), shifted.max()) == (0, 31), "an edge is not the outermost band's"
    constants(MEL_SHIFT=0)
    assert torch.equal(trainer.shift_bands(x), x)


def test_tone_curves_are_smooth_and_gains_flat(constants):
    torch.manual_seed(0)
    constants(RANDOM_EQ_DB=2.0, RANDOM_GAIN_DB=0.0)
    curve = trainer.random_eq(2000, 32)
    assert curve.shape == (2000, 32)
    assert curve[:, 0].std() == pytest.approx(2, rel=0.1)
    assert curve[:, -1].std() == pytest.approx(2, rel=0.1)
    assert curve.diff(dim=1).abs().max() < 2.0
    assert torch.corrcoef(curve.T)[0, -1].abs() < 0.1, "a curve is the same at both ends"
    constants(RANDOM_EQ_DB=0.0, RANDOM_GAIN_DB=3.0)
    gain = trainer.random_eq(2000, 32)
    assert (gain == gain[:, :1]).all()
    assert gain[:, 0].std() == pytest.approx(3, rel=0.1)
    constants(RANDOM_GAIN_DB=0.0)
    assert not trainer.random_eq(20, 32).any()


def test_a_share_of_clips_loses_outer_bands(constants):
    torch.manual_seed(0)
    constants(NARROW_BAND=0.3)
    lost = trainer.random_outer_bands(2000, 50)
    assert lost[:, -1].float().mean() == pytest.approx(0.3, abs=0.05)
    assert not lost[:, 8:32].any(), "the middle of the band is lost"
    assert (lost[:, 32:-1] <= lost[:, 33:]).all()
    assert (lost[:, :7] >= lost[:, 1:8]).all()
    assert lost[:, 34].any()
    assert lost[:, 6].any()
    constants(NARROW_BAND=0.0)
    assert not trainer.random_outer_bands(200, 50).any()


def test_masks_lie_within_the_clip(constants):
    constants(TIME_MASK=8, MEL_MASK=4)
    torch.manual_seed(0)
    lengths = torch.tensor([40, 6] * 100)
    x = torch.ones(200, 40, 128) * trainer.length_mask(lengths, 40)[:, :, None]
    masked = trainer.spec_augment(x, lengths)
    frames = (masked[::2] == 0).all(2).sum(1)
    assert (frames.min(), frames.max()) == (0, 8)
    assert (masked[1::2, :6] == 0).all(2).sum(1).max() == 3, "more than half of a short clip"
    bands = (masked[::2] == 0).all(1).sum(1)
    assert (bands.min(), bands.max()) == (0, 4)
    constants(TIME_MASK=0, MEL_MASK=0)
    assert torch.equal(trainer.spec_augment(x, lengths), x)


def test_a_random_span_is_one_stretch_anywhere_in_its_own_size():
    torch.manual_seed(0)
    sizes = torch.tensor([20, 9, 1] * 500)
    span = trainer.random_span(sizes, 6, 24)
    assert span.shape == (1500, 24)
    edges = span.int().diff(dim=1, prepend=torch.zeros(1500, 1), append=torch.zeros(1500, 1))
    assert ((edges == 1).sum(1) <= 1).all(), "more than one stretch"
    width = span.sum(1)
    assert [set(width[i::3].tolist()) for i in range(3)] == [set(range(7)), set(range(5)), {0}]
    assert span[0::3, :20].any(0).all(), "a place is never masked"
    assert not span[0::3, 20:].any()
    assert not span[1::3, 9:].any()


def stand_in_data(n_mels):
    """What augment_batch needs of the spectrograms."""
    return types.SimpleNamespace(
        normalization={"mean": [-60.0] * n_mels, "std": [4.0] * n_mels},
        varies=torch.ones(n_mels, dtype=torch.bool),
        level={"median": -50.0},
        frame_rate=10.0,
    )


@pytest.mark.parametrize(
    "name, value",
    [
        ("MEL_SHIFT", 3),
        ("RANDOM_EQ_DB", 2.0),
        ("RANDOM_GAIN_DB", 2.0),
        ("NARROW_BAND", 0.9),
        ("OTHER_FLOOR", 0.5),
        ("AUTOMATIC_GAIN", 0.5),
        ("TIME_MASK", 4),
        ("MEL_MASK", 8),
    ],
)
def test_each_augmentation_reaches_the_batch_but_not_its_padding(constants, name, value):
    torch.manual_seed(0)
    lengths = torch.tensor([9, 5] * 20)
    x = -60 + 4 * torch.randn(40, 16, 32)
    clip = trainer.length_mask(lengths, 16)[:, :, None]
    data = stand_in_data(32)
    constants(**NO_AUGMENTATION)
    state = torch.get_rng_state()
    plain = trainer.augment_batch(x, lengths, data)
    drawn = torch.get_rng_state()
    assert torch.equal(plain, ((x + 60) / 4) * clip)
    constants(**{name: value})
    torch.set_rng_state(state)
    augmented = trainer.augment_batch(x, lengths, data)
    assert not torch.equal(augmented, plain)
    assert augmented.isfinite().all()
    assert not augmented.masked_fill(clip, 0.0).any()
    if name in ("OTHER_FLOOR", "AUTOMATIC_GAIN"):
        assert not torch.equal(torch.get_rng_state(), drawn), "off, it draws all the same"


def test_decibels_are_the_bands_deviations_and_lost_bands_silent(constants):
    torch.manual_seed(0)
    x = torch.full((1000, 8, 32), -60.0)
    lengths = torch.full((1000,), 8)
    constants(**NO_AUGMENTATION | {"RANDOM_GAIN_DB": 2.0})
    augmented = trainer.augment_batch(x, lengths, stand_in_data(32))
    assert augmented[:, 0, 0].std() == pytest.approx(0.5, abs=0.05)  # 2 dB where a unit is 4
    assert (augmented == augmented[:, :1, :1]).all()
    constants(**NO_AUGMENTATION | {"NARROW_BAND": 0.5})
    augmented = trainer.augment_batch(x, lengths, stand_in_data(32))
    assert set(augmented.unique().tolist()) == {0.0, -10.0}  # silence is -100 dB


def test_a_clips_floor_is_the_mean_of_its_quietest_tenth():
    """Against NumPy; neither padding nor digital silence counts, where there is anything else."""
    torch.manual_seed(0)
    lengths = torch.tensor([40, 7])
    x = -50 + 6 * torch.randn(2, 48, 12)
    x[0, 40:] = -99.0
    x[1, 7:] = 20.0
    expected = []
    for clip, n, n_quiet in zip(x.double().numpy(), (40, 7), (4, 1), strict=True):
        power = 10 ** (clip[:n] / 10)
        quietest = np.argsort(power.sum(1))[:n_quiet]
        expected.append(10 * np.log10(power[quietest].mean(0)))
    assert np.allclose(trainer.noise_floor(x, lengths), expected, atol=1e-3)
    x[0, :10] = -100.0  # now a tenth of 30
    power = 10 ** (x[0, 10:40].double().numpy() / 10)
    quietest = np.argsort(power.sum(1))[:3]
    floor = trainer.noise_floor(x, lengths)[0]
    assert np.allclose(floor, 10 * np.log10(power[quietest].mean(0)), atol=1e-3)
    silent = torch.full((1, 16, 12), -100.0)
    assert (trainer.noise_floor(silent, torch.tensor([9])) == -100).all()


def test_another_floor_takes_the_place_of_a_clips_own(constants):
    """Voice loses three times the floor; the floor comes back 60 dB lower to 20 dB higher."""
    torch.manual_seed(0)
    constants(OTHER_FLOOR=1.0)
    n_clips = 400
    lengths = torch.full((n_clips,), 40)
    x = torch.full((n_clips, 40, 16), -40.0)
    x[:, 20:30] = 0.0  # voice, 40 dB over the floor
    x[:, 30:, 8:] = -36.0  # under three times the floor, 4.8 dB over it: taken for noise
    y = trainer.other_floors(x, lengths)
    voice = 10 * math.log10(1 - 3e-4)
    assert (y[:, 20:30] >= voice - 1e-3).all()
    assert y[:, 20:30].median() == pytest.approx(voice, abs=0.05)
    offset = (y[:, :20] + 40).mean((1, 2))
    assert offset.min() == pytest.approx(-60, abs=2)
    assert offset.max() == pytest.approx(20, abs=2)
    assert (offset < -20).float().mean() == pytest.approx(0.5, abs=0.08)
    assert (y[:, :20] - y[:, :20].mean((1, 2), keepdim=True)).std() == pytest.approx(2, abs=0.1)
    taken = (y[:, 30:, 8:] + 40).mean((1, 2))
    assert (taken - offset).abs().max() < 2, "what lies just over the floor stays"
    deep = trainer.other_floors(x - 59, lengths)
    assert deep.min() == pytest.approx(-100, abs=1e-3)


def test_a_share_of_clips_gets_another_floor(constants):
    torch.manual_seed(0)
    constants(OTHER_FLOOR=0.3)
    x = -60 + 4 * torch.randn(1000, 8, 4)
    changed = (trainer.other_floors(x, torch.full((1000,), 8)) != x).any(2).any(1)
    assert changed.float().mean() == pytest.approx(0.3, abs=0.05)


def test_automatic_gain_evens_out_the_loudness(constants):
    """Towards the target, by at most 30 dB, all bands of a frame alike; in a share of clips."""
    torch.manual_seed(0)
    constants(AUTOMATIC_GAIN=0.4)
    n_clips = 1000
    lengths = torch.full((n_clips,), 60)
    x = torch.full((n_clips, 64, 4), -20.0)
    x[:, 30:] = -90.0
    y = trainer.automatic_gain(x, lengths, -10.0, 5)
    gain = y - x
    assert (gain == gain[:, :, :1]).all()
    changed = gain.any(2).any(1)
    assert changed.float().mean() == pytest.approx(0.4, abs=0.05)
    loud = gain[changed, :25, 0]
    assert (loud.min(), loud.max()) == (pytest.approx(5, abs=0.1), pytest.approx(10, abs=0.1))
    soft = gain[changed, 35:60, 0]
    assert (soft.min(), soft.max()) == (pytest.approx(15, abs=0.3), pytest.approx(30, abs=0.3))
    ramp = gain[changed, 25:35, 0].diff(dim=1)
    assert (ramp >= -1e-4).all(), "the gain jumps back and forth"


def test_the_floor_is_added_before_mean_and_deviation():
    """In power: equal to the floor is 3 dB above it, far under it is at it, far over it stays."""
    normalization = {"mean": [-60.0] * 3, "std": [2.0] * 3, "floor": [-70.0] * 3}
    mel = torch.tensor([[-70.0, -100.0, -10.0]])
    expected = (torch.tensor([[-70 + 10 * math.log10(2), -69.9957, -10.0]]) + 60) / 2
    assert torch.allclose(trainer.normalize(mel, normalization), expected, atol=1e-4)
    del normalization["floor"]
    assert torch.equal(trainer.normalize(mel, normalization), (mel + 60) / 2)


MEL_16 = {"sample_rate": 16000, "hop_length": 256, "n_mels": 16}
MEL_128 = {"sample_rate": 16000, "hop_length": 512, "n_mels": 128}


def write_mels(folder, mels, **settings):
    """A MEL_DIR of the test's own: {(actor, code, variant): (mel bands, frames)}."""
    for (actor, code, variant), mel in mels.items():
        path = folder / code / f"{actor}_DFA_{code}_XX_{variant}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, mel.astype(np.float32))
    config = {"sample_rate": 16000, "n_fft": 512, "hop_length": 256, "n_mels": 16}
    config |= {"fmin": 0.0, "fmax": 8000.0} | settings
    (folder / "mel_config.json").write_text(json.dumps(config))
    return folder


def random_mels(n_actors=8, n_frames=24, n_mels=16, codes=tuple(trainer.EMOTIONS)):
    """Spectrograms in which an emotion is a level: one clip of each, of each actor."""
    random = np.random.default_rng(0)
    mels = {}
    for actor in range(1001, 1001 + n_actors):
        for i, code in enumerate(codes):
            noise = 5 * random.standard_normal((n_mels, n_frames + i))
            mels[str(actor), code, "original"] = -60 + 6 * i + noise
    return mels


def test_constant_mel_bands_have_deviation_one_and_are_left_alone(constants, tmp_path):
    """Bands without an STFT bin, -100 dB throughout: a deviation near 0 made noise of them."""
    mels = random_mels()
    for mel in mels.values():
        mel[[2, 5]] = -100.0
    write_mels(tmp_path, mels)
    constants(BATCH_SIZE=4, SPLIT="actor", MEL_SHIFT=0, ADD_FLOOR=False)
    data = trainer.Spectrograms(trainer.assign_split(trainer.list_clips(tmp_path)), MEL_16)
    assert [data.normalization["std"][i] for i in (2, 5)] == [1.0, 1.0]
    assert [data.normalization["mean"][i] for i in (2, 5)] == pytest.approx([-100.0, -100.0])
    assert (~data.varies).nonzero().flatten().tolist() == [2, 5]
    assert max(mel[:, [2, 5]].abs().max() for mel in data.part("val")) < 1e-3
    torch.manual_seed(0)
    constants(RANDOM_EQ_DB=10.0, RANDOM_GAIN_DB=10.0, NARROW_BAND=0.9)
    index = data.indices["train"]
    x, lengths, _ = data.batch(index, torch.ones(len(index)), CPU)
    augmented = trainer.augment_batch(x, lengths, data)
    assert not augmented[:, :, [2, 5]].any()
    assert augmented[:, :, [1, 3, 4, 6]].any(1).all(1).sum() > len(index) / 3


# --------------------------------------------------------------------------------------
# The model


def toy_model(n_mels=128):
    """In evaluation mode, as after training: a fresh batch norm would hide what padding does."""
    torch.manual_seed(0)
    model = trainer.EmotionClassifier(n_mels, 6, (8, 8, 16, 16), trainer.STRIDES, 32, 4, 0.3)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(norm.bias, 0.2, 1.0)
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    return model.eval()


@pytest.mark.parametrize("n_frames", [1, 2, 3, 5, 16, 61, 190])
def test_padding_changes_no_logit(n_frames):
    model = toy_model()
    clip = torch.randn(n_frames, 128, generator=seeded(n_frames))
    other = torch.randn(191, 128, generator=seeded(0))
    batch = nn.utils.rnn.pad_sequence([other, clip], batch_first=True)
    together = model(batch, torch.tensor([191, n_frames]))
    alone = model(clip[None], torch.tensor([n_frames]))
    assert (alone[0] - together[1]).abs().max() < 1e-4
    other_alone = model(other[None], torch.tensor([191]))
    assert (other_alone[0] - together[0]).abs().max() < 1e-4


def test_the_order_of_frames_matters():
    model = toy_model()
    clip = 10 * torch.randn(1, 80, 128, generator=seeded(0))
    shuffled = clip[:, torch.randperm(80, generator=seeded(1))]
    length = torch.tensor([80])
    assert (model(clip, length) - model(shuffled, length)).abs().max() > 1e-3


def test_the_architecture_is_the_documented_one():
    model = trainer.EmotionClassifier(**trainer.model_config(128))
    assert len(model.blocks) == 4
    assert all(isinstance(block.norm1, nn.BatchNorm2d) for block in model.blocks)
    ways = (model.lstm.forward_lstm, model.lstm.backward_lstm)
    assert [lstm.hidden_size for way in ways for lstm in way] == [trainer.HIDDEN] * 4
    assert isinstance(model.attention, nn.MultiheadAttention)
    kinds = [type(layer) for layer in model.head]
    assert (kinds.count(nn.Linear), kinds.count(nn.BatchNorm1d)) == (3, 2)
    assert sum(p.numel() for p in model.parameters()) * 4 < 100e6
    constructor = inspect.signature(trainer.EmotionClassifier).parameters
    assert list(constructor) == list(trainer.model_config(128))


def test_forward_is_the_head_of_the_embedding():
    model = toy_model()
    x = torch.randn(3, 40, 128, generator=seeded(0))
    lengths = torch.tensor([40, 17, 3])
    x = x * trainer.length_mask(lengths, 40)[:, :, None]
    embedding = model.encode(x, lengths)
    assert embedding.shape == (3, 4 * 32)
    assert torch.equal(model(x, lengths), model.head(embedding))


def test_every_weight_has_its_say():
    """But the pooling scores' last bias: a softmax does not see it."""
    model = toy_model()
    x = torch.randn(2, 40, 128, generator=seeded(0))
    model(x, torch.tensor([40, 40])).square().sum().backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent <= {"pooling.score.2.bias"}


def test_the_lstm_is_pytorchs_on_packed_clips():
    torch.manual_seed(0)
    ours = trainer.BidirectionalLSTM(12, 8, 0.0)
    theirs = nn.LSTM(12, 8, 2, batch_first=True, bidirectional=True)
    weights = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    for layer in (0, 1):
        for way, suffix in ((ours.forward_lstm, ""), (ours.backward_lstm, "_reverse")):
            state = {f"{w}_l0": getattr(theirs, f"{w}_l{layer}{suffix}") for w in weights}
            way[layer].load_state_dict(state)
    x = torch.randn(3, 9, 12)
    steps = torch.tensor([9, 4, 1])
    packed, _ = theirs(nn.utils.rnn.pack_padded_sequence(x, steps, batch_first=True))
    expected, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    mask = trainer.length_mask(steps, 9)[:, :, None]
    assert ((ours(x, steps) - expected) * mask).abs().max() < 1e-5


def test_pooling_is_a_weighted_mean_and_spread_of_a_clips_own_steps():
    torch.manual_seed(0)
    pooling = trainer.AttentivePooling(5)
    x = torch.randn(2, 6, 5)
    x[1, 3:] = 1e3  # past the second clip's own steps
    weight = pooling.score(x[1, :3]).softmax(0)
    assert weight.amax() - weight.amin() > 1e-3
    mean = (weight * x[1, :3]).sum(0)
    spread = ((weight * x[1, :3] ** 2).sum(0) - mean**2 + 1e-4).sqrt()
    pooled = pooling(x, trainer.length_mask(torch.tensor([6, 3]), 6))
    assert torch.allclose(pooled[1], torch.cat([mean, spread]), atol=1e-4)


def test_logits_do_not_depend_on_batch_size_or_order():
    model = toy_model()
    random = seeded(3)
    clips = [torch.randn(n, 128, generator=random) for n in (80, 3, 191, 55, 80, 21)]
    one = trainer.predict_logits(model, clips, 1, CPU)
    assert one.shape == (6, 6)
    assert one.dtype == torch.float32
    assert (trainer.predict_logits(model, clips, 4, CPU) - one).abs().max() < 1e-4
    reversed_order = trainer.predict_logits(model, clips[::-1], 4, CPU).flip(0)
    assert (reversed_order - one).abs().max() < 1e-4


# --------------------------------------------------------------------------------------
# Device and dtype


def test_mixed_precision_where_it_is_faster_and_its_switch(constants, monkeypatch):
    for capabilities, is_faster, amp, expected in [
        ({"avx512_bf16": True}, True, "auto", torch.bfloat16),
        ({"amx_bf16": True}, True, "auto", torch.bfloat16),
        ({"avx512_bf16": True}, False, "auto", torch.float32),
        ({"avx512_bf16": True}, True, "off", torch.float32),
        ({"avx2": True}, True, "auto", torch.float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        constants(AMP=amp, bfloat16_is_faster=lambda answer=is_faster: answer)
        assert trainer.pick_dtype(CPU) is expected, (capabilities, is_faster, amp)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_reaches_the_model(constants, dtype):
    constants(**TOY)
    state = trainer.TrainState(trainer.model_config(16), CPU, dtype)
    seen = []
    state.model.blocks[1].conv1.register_forward_hook(lambda m, i, output: seen.append(output))
    label = torch.arange(6)
    trainer.train_step(state, torch.randn(6, 16, 16), torch.full((6,), 16), label, label)
    assert [output.dtype for output in seen] == [dtype]


@pytest.mark.parametrize("seconds, answer", [((0.02, 0.01), True), ((0.01, 0.02), False)])
def test_bfloat16_is_used_only_where_it_is_faster(monkeypatch, seconds, answer):
    """Intel's Sapphire Rapids without AMX has bfloat16, at half the speed of float32."""
    clock = [0.0]
    cost = dict(zip((torch.float32, torch.bfloat16), seconds, strict=True))

    def multiply(x, _):
        clock[0] += cost[x.dtype]

    monkeypatch.setattr(trainer.F, "linear", multiply)
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: clock[0])
    assert trainer.bfloat16_is_faster() is answer


# --------------------------------------------------------------------------------------
# Schedule and best epoch


@pytest.fixture
def state(constants):
    """A training of a toy, before its first epoch."""
    constants(**TOY | {"EPOCHS": 30, "PATIENCE": 4, "LR_PATIENCE": 1, "LR_FACTOR": 0.5})
    constants(WARMUP_EPOCHS=0, LEARNING_RATE=0.1)
    return trainer.TrainState(trainer.model_config(16), CPU, torch.float32)


def play(state, accuracies, n_val=10**12):
    """Epochs with these validation accuracies on n_val clips, to the end of training.

    Returns the learning rate of each epoch, and which were kept.
    """
    rates = []
    best = []
    for epoch, accuracy in enumerate(accuracies, start=1):
        if state.is_finished():
            break
        rates.append(state.optimizer.param_groups[0]["lr"])
        if state.step({"epoch": epoch, "val_accuracy": accuracy}, n_val):
            best.append(epoch)
    return rates, best


def test_training_stops_early_and_of_equal_epochs_the_last_is_best(state):
    _, best = play(state, [0.2, 0.5, 0.4, 0.6, 0.55, 0.6, 0.5, 0.59, 0.55, 0.58, 0.9])
    assert len(state.history) == 10  # four epochs after the best
    assert best == [1, 2, 4, 6]
    assert state.best_epoch == 6


def test_the_latest_epoch_within_a_standard_error_of_the_best_is_kept(state, constants):
    """0.6 of 100 clips: 0.049. Training stops by the best alone."""
    constants(PATIENCE=5)
    _, kept = play(state, [0.2, 0.19, 0.6, 0.56, 0.54, 0.552, 0.55, 0.3], n_val=100)
    assert kept == [1, 2, 3, 4, 6]
    assert state.best_epoch == 6
    assert len(state.history) == 8


def test_training_ends_with_its_epochs(state, constants):
    constants(EPOCHS=3)
    play(state, [0.1, 0.2, 0.3, 0.4])
    assert len(state.history) == 3


def test_a_plateau_lowers_the_learning_rate(state):
    rates, _ = play(state, [0.5, 0.4, 0.4, 0.4, 0.4])
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.05])


def test_the_learning_rate_decays_after_so_many_epochs(state, constants):
    constants(DECAY_AFTER=2, LR_DECAY=0.5)
    rates, _ = play(state, [0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.025])


def test_the_learning_rate_warms_up_and_then_stays_to_the_schedule(state, constants):
    constants(WARMUP_EPOCHS=2)
    group = state.optimizer.param_groups[0]
    rates = []
    for epoch in (1, 2, 3):
        for share in (0.25, 1.0):
            state.warm_up(epoch, share)
            rates.append(group["lr"])
    assert rates == pytest.approx([0.0125, 0.05, 0.0625, 0.1, 0.1, 0.1])
    constants(LR_PATIENCE=0)
    state.scheduler.patience = 0
    for epoch, accuracy in enumerate((0.5, 0.1, 0.1), start=1):  # worse while it warms up
        state.step({"epoch": epoch, "val_accuracy": accuracy}, 100)
    assert group["lr"] == pytest.approx(0.1), "epochs of warm-up count as a plateau"


def test_the_schedule_is_that_of_the_constants(constants):
    constants(**TOY | {"LR_FACTOR": 0.3, "LR_PATIENCE": 7, "WEIGHT_DECAY": 0.2})
    state = trainer.TrainState(trainer.model_config(16), CPU, torch.float32)
    scheduler = state.scheduler
    assert (scheduler.mode, scheduler.factor, scheduler.patience) == ("max", 0.3, 7)
    group = state.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (TOY["LEARNING_RATE"], 0.2)


def test_averaged_weights_are_a_moving_average(constants):
    """Of weights and batch norm's statistics; the first steps forget faster."""
    constants(EMA_DECAY=0.5)
    model = nn.BatchNorm1d(1)
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=trainer.ema_update, use_buffers=True
    )
    expected = None
    for step, value in enumerate((1.0, 2.0, 5.0, 3.0, 7.0, 8.0, 9.0, 4.0, 6.0, 5.0, 2.0, 1.0)):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(10 * value)
            model.num_batches_tracked.fill_(step)
        ema.update_parameters(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = value if step == 0 else decay * expected + (1 - decay) * value
        assert ema.module.weight.item() == pytest.approx(expected)
        assert ema.module.running_mean.item() == pytest.approx(10 * expected)
        assert ema.module.num_batches_tracked.item() == step


# --------------------------------------------------------------------------------------
# An epoch


@pytest.fixture(scope="module")
def first_epoch(tmp_path_factory):
    """Trains a toy for an epoch with other constants.

    Returns the loss and all weights, those that trained and their average.
    """
    folder = write_mels(tmp_path_factory.mktemp("tiny"), random_mels(n_frames=40))

    def train_one(**values):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (PLAIN | {"BATCH_SIZE": 8, "SPLIT": "actor"} | values).items():
                patch.setattr(trainer, name, value)
            data = trainer.Spectrograms(trainer.assign_split(trainer.list_clips(folder)), MEL_16)
            state = trainer.TrainState(trainer.model_config(16), CPU, torch.float32)
            loss, _ = trainer.train_epoch(state, data, 1)
        models = (state.model, state.ema.module)
        flat = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models]
        return loss, *flat

    return train_one


@pytest.fixture(scope="module")
def plain_epoch(first_epoch):
    """The weights after an epoch with the constants as they are."""
    return first_epoch()


@pytest.mark.parametrize(
    "name, value",
    [
        ("WEIGHTED_SAMPLING", False),
        ("DROPOUT", 0.1),
        ("LEARNING_RATE", 1e-3),
        ("WARMUP_EPOCHS", 2),
        ("WEIGHT_DECAY", 1.0),
        ("LABEL_SMOOTHING", 0.3),
        ("TIME_MASK", 0),
        ("MEL_MASK", 0),
        ("SPEED_PERTURB", 0.0),
        ("MEL_SHIFT", 0),
        ("RANDOM_EQ_DB", 0.0),
        ("RANDOM_GAIN_DB", 0.0),
        ("NARROW_BAND", 0.9),
        ("OTHER_FLOOR", 0.5),
        ("AUTOMATIC_GAIN", 0.5),
        ("ADD_FLOOR", False),
        ("GRADIENT_CLIP", 1e-6),
        ("MAX_WIDTH", 20),
        ("SEED", 1),
    ],
)
def test_every_constant_of_training_is_used(first_epoch, plain_epoch, name, value):
    _, changed, _ = first_epoch(**{name: value})
    assert (changed - plain_epoch[1]).abs().max() > 1e-6


def test_an_epoch_repeats_itself_and_its_averaged_weights_follow(first_epoch, plain_epoch):
    loss, weights, averaged = first_epoch()
    assert loss == plain_epoch[0]
    assert torch.equal(weights, plain_epoch[1])
    assert torch.equal(averaged, plain_epoch[2])
    assert (weights - averaged).abs().max() > 1e-5
    _, weights, averaged = first_epoch(EMA_DECAY=0.0)
    assert torch.equal(weights, averaged)


# --------------------------------------------------------------------------------------
# The sentence head


def named(stems, n_train):
    """Clips of these names, the first ones to train."""
    table = pd.DataFrame({"stem": stems})
    table["actor"] = table.stem.str.split("_").str[0]
    table["split"] = ["train"] * n_train + ["val"] * (len(stems) - n_train)
    return table


def test_sentences_are_the_names_second_field_where_speakers_share_them():
    shared = [f"{actor}_{sentence}_ANG" for actor in "abc" for sentence in ("DFA", "TIE")]
    n, number = trainer.number_sentences(named([*shared, "d_TIE_ANG", "d_NEW_ANG", "e"], 6))
    assert n == 2
    assert number.tolist() == [0, 1, 0, 1, 0, 1, 1, -1, -1]
    for wrong in (
        [*shared, "a_ONE_ANG"],  # by one speaker alone
        [*shared, "b"],  # without a second field
        [f"{actor}_DFA_ANG" for actor in "abc"],
        [f"{actor}_{sentence}_ANG" for actor in "abc" for sentence in range(101)],
        [f"{actor}_{i}{actor}_ANG" for actor in "abc" for i in range(4)],
    ):
        assert trainer.number_sentences(named(wrong, len(wrong)))[0] == 0, wrong[-1]
    many = [f"{actor}_{sentence}_ANG" for actor in "abc" for sentence in range(100)]
    assert trainer.number_sentences(named(many, 300))[0] == 100


def test_the_sentence_head_learns_beside_the_emotions(constants):
    """By the embedding alone: its gradient reaches the convolutions; off, there is no head."""
    constants(**TOY | {"SENTENCE_WEIGHT": 0.5, "DROPOUT": 0.0, "LABEL_SMOOTHING": 0.0})
    torch.manual_seed(0)
    x = torch.randn(12, 24, 16)
    lengths = torch.full((12,), 24)
    label = torch.arange(12) % 6
    sentence = torch.arange(12) // 4
    state = trainer.TrainState(trainer.model_config(16), CPU, torch.float32, 3)
    for _ in range(40):
        loss, _ = trainer.train_step(state, x, lengths, label, sentence)
    emotion_logits, sentence_logits = state.trained(x, lengths)
    assert torch.equal(sentence_logits.argmax(1), sentence)
    expected = float(nn.functional.cross_entropy(emotion_logits.detach(), label))
    assert float(loss) == pytest.approx(expected, abs=0.2), "not the emotions' loss alone"
    state.model.zero_grad()
    nn.functional.cross_entropy(sentence_logits, sentence).backward()
    assert state.model.blocks[0].conv1.weight.grad.abs().max() > 0
    assert state.model.head[0].weight.grad is None
    constants(SENTENCE_WEIGHT=0.0)
    state = trainer.TrainState(trainer.model_config(16), CPU, torch.float32, 3)
    assert state.trained.sentence_head is None
    assert "sentence_head" not in state.state_dict()


def test_the_sentence_head_is_gone_after_training_and_back_when_resumed(mels, whole, tmp_path):
    """Resumed, history and weights are those of the unbroken run; the model file has no head."""
    toy = PLAIN | {"save_figure": no_pictures, "SENTENCE_WEIGHT": 0.2}
    train(tmp_path / "one", mels, toy=toy, EPOCHS=2)
    train(tmp_path / "two", mels, toy=toy, EPOCHS=1)
    train(tmp_path / "two", mels, toy=toy, EPOCHS=2, RESUME=True)
    one, two = (load(tmp_path / name / "output/last_checkpoint.pth") for name in ("one", "two"))
    assert not differences(one, two)
    assert one["sentence_head"]["weight"].shape == (6, 4 * TOY["HIDDEN"])
    best = load(tmp_path / "one/output/best_model.pth")
    theirs = load(whole / "best_model.pth")["model_state_dict"]
    assert best["model_state_dict"].keys() == theirs.keys()
    assert not any("sentence" in key for key in best)
    text = train(tmp_path / "two", mels, toy=toy, RESUME=True, SENTENCE_WEIGHT=0.0, code=1)
    assert "SENTENCE_WEIGHT was 0.2, now 0.0" in text


def test_names_without_sentences_are_told(tmp_path):
    """All clips say DFA: there is nothing to tell apart."""
    write_mels(tmp_path / "mels", random_mels())
    text = train(tmp_path, tmp_path / "mels", toy=QUICK | {"BATCH_SIZE": 8}, SENTENCE_WEIGHT=0.2)
    assert "Note: SENTENCE_WEIGHT does nothing" in text
    assert "SENTENCE_WEIGHT does" not in train(
        tmp_path / "off", tmp_path / "mels", toy=QUICK | {"BATCH_SIZE": 8}
    )


# --------------------------------------------------------------------------------------
# What a training leaves


@pytest.fixture(scope="module")
def whole(mels, tmp_path_factory):
    """The output folder of a toy training in float32, in this process, pictures and all."""
    folder = tmp_path_factory.mktemp("whole")
    text = train(folder, mels, toy=PLAIN)
    assert "epoch   5/5" in text
    return folder / "output"


def test_outputs_are_those_of_the_contract(trained):
    """By the real command line: exit status 0."""
    assert {path.name for path in trained.iterdir()} == OUTPUTS
    columns = {
        "history.csv": "epoch,train_loss,train_accuracy,val_loss,val_accuracy,val_uar,"
        "learning_rate,seconds,train_clips_per_s",
        "test_predictions.csv": "stem,actor,true_class,predicted_class," + ",".join(NAMES),
        "split.csv": "stem,actor,emotion,split",
    }
    for name, header in columns.items():
        assert (trained / name).read_text().splitlines()[0] == header
    rows = pd.read_csv(trained / "test_predictions.csv")
    assert np.allclose(rows[NAMES].sum(axis=1), 1, atol=1e-5)
    assert (rows[NAMES].idxmax(axis=1) == rows.predicted_class).all()
    metrics = json.loads((trained / "metrics.json").read_text())
    keys = {"accuracy", "uar", "macro_f1", "ece", "ece_before", "n_clips", "n_actors", "uar_ci95"}
    assert metrics["test"].keys() == metrics["val"].keys() == keys
    assert {"best_epoch", "split", "seed", "device", "amp"} <= metrics.keys()
    assert metrics["test"]["n_actors"] == 1
    assert metrics["test"]["uar_ci95"] is None
    record = json.loads((trained / "run.json").read_text())
    assert record["constants"]["SEED"] == 42
    assert len(record["constants"]["SPLIT_SHA256"]) == 64
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    assert record["threads"] == 1
    assert record["seconds"] > 0


def test_the_model_file_is_version_2_and_tells_no_path(whole):
    path = whole / "best_model.pth"
    checkpoint = load(path)
    keys = {"format_version", "model_state_dict", "model_config", "mel_config", "normalization"}
    keys |= {"max_width", "classes", "temperature", "epoch", "metrics", "training_config"}
    keys |= {"versions", "speakers", "level", "floor", "distance"}
    assert checkpoint.keys() == keys
    assert checkpoint["format_version"] == 2
    assert set(checkpoint["mel_config"]) == set(trainer.MEL_SETTINGS)
    assert checkpoint["level"].keys() == {"median", "low", "high"}
    split = read_table(whole / "split.csv")
    for part in ("train", "val"):
        actors = {row["actor"] for row in split if row["split"] == part}
        assert checkpoint["speakers"][part] == sorted(actors)
    assert set(checkpoint["speakers"]) == {"train", "val"}
    for folder in (whole.parent.parent, ROOT):
        assert os.fsencode(folder) not in path.read_bytes(), "a path of the training machine"
    codes = [(entry["code"], entry["name"]) for entry in checkpoint["classes"]]
    assert codes == list(trainer.EMOTIONS.items())


def read_clips(mels, folder, part, normalization):
    """A part's originals, normalised, and their labels, read without the trainer's help."""
    mean, std, floor = (np.array(normalization[name]) for name in ("mean", "std", "floor"))
    rows = [row for row in read_table(folder / "split.csv") if row["split"] == part]
    clips = []
    for row in rows:
        mel = np.load(mels / row["emotion"] / f"{row['stem']}_original.npy")
        power = 10 ** (mel.T.astype(float) / 10) + 10 ** (floor / 10)
        clips.append(torch.from_numpy((10 * np.log10(power) - mean) / std).float())
    label = torch.tensor([list(trainer.EMOTIONS).index(row["emotion"]) for row in rows])
    return rows, clips, label


def test_what_is_saved_is_what_was_validated(mels, tmp_path):
    """The averaged weights, in evaluation mode, on the validation actors' originals."""
    train(tmp_path, mels, toy=QUICK, WARMUP_EPOCHS=2)
    output = tmp_path / "output"
    best, last = (load(output / name) for name in ("best_model.pth", "last_checkpoint.pth"))
    weights = best["model_state_dict"]
    assert all(torch.equal(value, last["ema"][f"module.{key}"]) for key, value in weights.items())
    assert not all(torch.equal(value, last["model"][key]) for key, value in weights.items())
    model = trainer.EmotionClassifier(**best["model_config"])
    model.load_state_dict(weights)
    _, clips, label = read_clips(mels, output, "val", best["normalization"])
    logits = trainer.predict_logits(model, clips, 4, CPU)
    [row] = read_history(output)
    loss = float(nn.functional.cross_entropy(logits, label))
    assert float(row["val_loss"]) == pytest.approx(loss, rel=1e-4)
    assert best["temperature"] == pytest.approx(trainer.fit_temperature(logits, label), rel=0.03)
    # The end of the first of two epochs of warm-up.
    assert float(row["learning_rate"]) == pytest.approx(TOY["LEARNING_RATE"] / 2)


def test_figures_of_the_test_are_the_tests_and_of_validation_validations(mels, tmp_path):
    """Parts of different sizes and difficulty, so that none can pass for the other.

    From the saved model and the files alone; the report's figures are scikit-learn's.
    """
    stems = sorted(path.stem.removesuffix("_original") for path in mels.rglob("*_original.npy"))
    parts = {"1001": "test", "1002": "test", "1003": "val"}
    lines = [f"{s},{parts.get(s[:4], 'train')}\n" for s in stems if s[:4] != "1002" or "SAD" in s]
    (tmp_path / "split.csv").write_text("stem,split\n" + "".join(lines))
    train(tmp_path, mels, toy=PLAIN, SPLIT=str(tmp_path / "split.csv"), save_figure=no_pictures)
    output = tmp_path / "output"
    metrics = json.loads((output / "metrics.json").read_text())
    best = load(output / "best_model.pth")
    model = trainer.EmotionClassifier(**best["model_config"])
    model.load_state_dict(best["model_state_dict"])
    found = {}
    for part, n_clips, n_actors in (("test", 7, 2), ("val", 6, 1)):
        rows, clips, label = read_clips(mels, output, part, best["normalization"])
        logits = trainer.predict_logits(model, clips, 16, CPU)
        found[part] = metrics[part]
        assert (metrics[part]["n_clips"], metrics[part]["n_actors"]) == (n_clips, n_actors)
        answer = logits.argmax(1)
        assert metrics[part]["accuracy"] == pytest.approx(float((answer == label).float().mean()))
        assert metrics[part]["uar"] == pytest.approx(recall_score(label, answer, average="macro"))
        before = trainer.calibration_error(logits.softmax(1), label)
        assert metrics[part]["ece_before"] == pytest.approx(before, abs=1e-4)
        if part == "test":
            tested = rows, logits, label
    assert found["test"]["ece_before"] != found["val"]["ece_before"]
    rows, logits, label = tested
    table = pd.read_csv(output / "test_predictions.csv", dtype={"actor": str})
    assert table.stem.tolist() == [row["stem"] for row in rows]
    assert table.actor.tolist() == [row["actor"] for row in rows]
    assert table.true_class.tolist() == [NAMES[i] for i in label]
    expected = (logits / best["temperature"]).softmax(1).numpy()
    assert np.allclose(table[NAMES], expected, atol=1e-4)
    report = (output / "classification_report.txt").read_text()
    theirs = classification_report(
        table.true_class, table.predicted_class, digits=3, labels=NAMES, zero_division=0
    )
    assert report.split() == theirs.split()
    history = read_history(output)
    best_row = history[metrics["best_epoch"] - 1]
    assert float(best_row["val_accuracy"]) == pytest.approx(metrics["val"]["accuracy"])
    assert metrics["best_epoch"] == best["epoch"]
    model_file = (output / "best_model.pth").read_bytes()
    assert os.fsencode(tmp_path) not in model_file, "the path of the split is in the model"


def test_an_emotion_absent_from_the_test_counts_nowhere(mels, tmp_path):
    """UAR on the screen, in metrics.json and in the report are one figure; its row is a dash."""
    shutil.copytree(mels, tmp_path / "mels")
    for path in (tmp_path / "mels").glob("SAD/*"):
        if int(path.name[:4]) < 1003:
            path.unlink()
    stems = {path.stem.split("_pitch")[0] for path in (tmp_path / "mels").rglob("*.npy")}
    parts = {"1001": "test", "1002": "test", "1003": "val"}
    lines = [f"{s},{parts.get(s[:4], 'train')}\n" for s in sorted(stems) if "original" in s]
    text = "".join(lines).replace("_original", "")
    (tmp_path / "split.csv").write_text("stem,split\n" + text)
    figures = {}

    def keep_figure(figure, path, dpi=200):
        figures[path.name] = figure

    toy = PLAIN | {"save_figure": keep_figure, "SPLIT": str(tmp_path / "split.csv")}
    text = train(tmp_path, tmp_path / "mels", toy=toy)
    assert "no clip of SAD to test" in text
    metrics = json.loads((tmp_path / "output/metrics.json").read_text())["test"]
    report = (tmp_path / "output/classification_report.txt").read_text()
    average = re.search(r"macro avg +(\S+) +(\S+) +(\S+)", report)
    assert float(average[2]) == pytest.approx(metrics["uar"], abs=5e-4)
    assert float(average[3]) == pytest.approx(metrics["macro_f1"], abs=5e-4)
    assert "Sad" not in report
    [shown] = re.findall(r"^test +\S+ % +(\S+) %", text, flags=re.M)
    assert float(shown) == pytest.approx(100 * metrics["uar"], abs=0.05)
    cells = cells_of(figures["confusion_matrix.png"])
    assert cells[-6:] == ["\u2013"] * 6
    assert "\u2013" not in cells[:-6]


def cells_of(figure):
    """The texts of a confusion matrix, row by row."""
    texts = figure.axes[0].texts
    ordered = sorted(texts, key=lambda text: text.get_position()[::-1])
    return [text.get_text() for text in ordered]


def test_the_confusion_matrix_has_a_row_for_each_true_class(constants, tmp_path):
    figures = []
    constants(save_figure=lambda figure, path, dpi=200: figures.append(figure))
    true, predicted = ["a", "a", "b", "b"], ["a", "b", "b", "b"]
    trainer.plot_confusion(tmp_path / "a.png", true, predicted, ["a", "b"], "title")
    assert cells_of(figures[0]) == ["1\n50 %", "1\n50 %", "0\n0 %", "2\n100 %"]
    axes = figures[0].axes[0]
    assert ("True" in axes.get_ylabel(), "Predicted" in axes.get_xlabel()) == (True, True)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


# --------------------------------------------------------------------------------------
# Figures


def test_figures_against_scikit_learn():
    """Where emotions differ in frequency and one is absent."""
    random = np.random.default_rng(0)
    label = torch.from_numpy(random.choice(5, 600, p=[0.4, 0.3, 0.1, 0.1, 0.1]))
    is_right = torch.from_numpy(random.random(600)) < 0.2 + 0.1 * label
    answer = torch.where(is_right, label, (label + 1) % 6)
    logits = 3.0 * nn.functional.one_hot(answer, 6)
    actors = np.repeat([f"a{i}" for i in range(30)], 20)
    found = trainer.compute_metrics(logits, label, actors, 2.0)
    occurring = {"average": "macro", "labels": range(5)}
    assert (found["n_clips"], found["n_actors"]) == (600, 30)
    assert found["accuracy"] == pytest.approx(float((answer == label).float().mean()))
    assert found["uar"] == pytest.approx(recall_score(label, answer, **occurring))
    assert abs(found["uar"] - found["accuracy"]) > 0.02
    assert found["macro_f1"] == pytest.approx(f1_score(label, answer, **occurring))
    after = trainer.calibration_error((logits / 2).softmax(1), label)
    assert found["ece"] == pytest.approx(after)
    assert found["ece"] != found["ece_before"]
    low, high = found["uar_ci95"]
    assert low < found["uar"] < high
    assert 0.03 < high - low < 0.2
    assert found["uar_ci95"] == trainer.uar_interval(label, answer, actors)


def test_the_interval_is_over_actors():
    """People who differ widen it; one alone has none."""
    label = torch.arange(600) % 6
    actors = np.repeat([f"a{i}" for i in range(30)], 20)
    is_good = torch.from_numpy(np.isin(actors, [f"a{i}" for i in range(15)]))
    answer = torch.where(is_good, label, (label + 1) % 6)
    low, high = trainer.uar_interval(label, answer, actors)
    assert low < 0.4
    assert high > 0.6
    mixed = torch.where(torch.arange(600) // 6 % 2 == 0, label, (label + 1) % 6)
    narrow = trainer.uar_interval(label, mixed, actors)
    assert narrow[1] - narrow[0] < (high - low) / 2
    assert trainer.uar_interval(label, answer, np.repeat("a0", 600)) is None


def test_calibration_error_and_temperature():
    label = torch.tensor([0] * 6 + [1] * 4)
    sure = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
    assert trainer.calibration_error(sure, label) == pytest.approx(0.3)
    logits = torch.tensor([[0.6, 0.4]]).log().repeat(10, 1)
    assert trainer.fit_temperature(5 * logits, label) == pytest.approx(5, rel=0.02)


def test_reliability_and_the_most_confident_mistakes():
    probabilities = torch.zeros(4, 6)
    probabilities[:, :2] = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.05, 0.95], [0.7, 0.3]])
    label = torch.tensor([0, 1, 0, 2])
    bins = trainer.reliability(probabilities, label, 2)[["confidence", "accuracy", "share"]]
    assert bins.to_numpy().tolist() == [pytest.approx([(0.9 + 0.8 + 0.95 + 0.7) / 4, 0.25, 1.0])]
    table = pd.DataFrame(probabilities.numpy(), columns=NAMES)
    table["stem"] = list("abcd")
    table["true_class"] = [NAMES[i] for i in label]
    table["predicted_class"] = [NAMES[i] for i in probabilities.argmax(1)]
    worst = trainer.most_confident_mistakes(table, n=2)
    found = [(row["stem"], row["true_class"], row["predicted_class"]) for row in worst]
    assert found == [("c", "Angry", "Disgust"), ("b", "Disgust", "Angry")]
    assert worst[0]["confidence"] == pytest.approx(0.95)


def test_the_mistakes_told_are_those_of_the_table(whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    rows = pd.read_csv(whole / "test_predictions.csv").set_index("stem")
    assert metrics["most_confident_mistakes"]
    for mistake in metrics["most_confident_mistakes"]:
        row = rows.loc[mistake["stem"]]
        assert row.true_class == mistake["true_class"] != mistake["predicted_class"]
        assert row.predicted_class == mistake["predicted_class"]
        assert row[row.predicted_class] == pytest.approx(mistake["confidence"], abs=1e-6)


def test_the_pictures_of_odd_names(tmp_path):
    """Actors whose names are no UTF-8 or look like formulas, no intensities in the names."""
    path = tmp_path / "report.png"
    actors = ["\udcff", "$a^$", "${$", "$%$", "e", "f"]
    table = pd.DataFrame({"stem": ["a_b_ANG"] * 6, "actor": actors})
    table["true_class"] = table["predicted_class"] = NAMES
    trainer.plot_report(path, table, torch.eye(6), torch.arange(6), 1.0)
    assert path.stat().st_size > 10_000


# --------------------------------------------------------------------------------------
# Resuming


def test_a_resumed_run_is_the_unbroken_run(mels, whole, tmp_path):
    """History and weights to the bit; with different settings it says which."""
    toy = PLAIN | {"save_figure": no_pictures}
    train(tmp_path, mels, toy=toy, EPOCHS=3)
    text = train(tmp_path, mels, toy=toy, RESUME=True)
    assert "after epoch 3" in text
    assert "epoch   3/5" not in text
    output = tmp_path / "output"
    assert read_history(output) == read_history(whole)
    for name in ("last_checkpoint.pth", "best_model.pth"):
        assert not differences(load(output / name), load(whole / name))
    seconds = [float(row["seconds"]) for row in read_table(output / "history.csv")]
    told = json.loads((output / "metrics.json").read_text())["seconds"]
    assert told == pytest.approx(sum(seconds), abs=0.06), "the epochs before the stop count too"
    assert not list(output.glob("earlier_*"))
    text = train(tmp_path, mels, toy=toy, RESUME=True, DROPOUT=0.5, SEED=1, code=1)
    assert "DROPOUT was 0.3, now 0.5" in text
    assert "SEED was 42, now 1" in text
    shutil.copytree(mels, tmp_path / "mels")
    for path in (tmp_path / "mels").rglob("*.npy"):
        np.save(path, np.load(path) + 1)
    text = train(tmp_path, tmp_path / "mels", toy=toy, RESUME=True, EPOCHS=6, code=1)
    assert "the spectrograms in MEL_DIR, or their split, were others" in text
    assert read_history(output) == read_history(whole)


def test_what_the_network_sees_must_not_change_in_a_resumed_run(constants):
    """The training clips, and the normalisation, which START_FROM's file may bring."""
    clips = pd.DataFrame({"stem": ["a"], "variant": ["original"], "split": ["train"], "actor": "x"})
    bands = {"mean": [1.0, 2.0], "std": [3.0, 4.0]}

    def digest(measured=bands, normalization=bands):
        data = types.SimpleNamespace(measured=measured, normalization=normalization)
        return trainer.training_config(clips, {}, data, None)["DATA_SHA256"]

    other = bands | {"mean": [1.0, 2.1]}
    assert len({digest(), digest(measured=other), digest(normalization=other)}) == 3
    assert digest() != digest(normalization=bands | {"floor": [0.0, 0.0]})
    assert digest() == digest(bands | {"mean": [1.0 + 4e-9, 2.0]}), "another machine's last digits"


def edit_checkpoint(path, **values):
    """Changes what a checkpoint says of itself."""
    torch.save(load(path) | values, path)


def test_a_resumed_run_keeps_its_dtype_on_the_same_type_of_device(mels, tmp_path):
    """A second trial of bfloat16 could end otherwise; on another device it is chosen anew."""

    def no_choice(device):
        raise AssertionError("chosen anew")

    toy = QUICK | {"AMP": "auto"}
    train(tmp_path, mels, toy=toy, pick_dtype=lambda device: torch.float32)
    path = tmp_path / "output/last_checkpoint.pth"
    metrics = tmp_path / "output/metrics.json"
    assert (load(path)["dtype"], load(path)["device_type"]) == ("float32", "cpu")
    edit_checkpoint(path, dtype="bfloat16")
    train(tmp_path, mels, toy=toy, RESUME=True, EPOCHS=2, pick_dtype=no_choice)
    assert json.loads(metrics.read_text())["amp"] == "bfloat16"
    edit_checkpoint(path, dtype="float16", device_type="cuda", scaler={"scale": 2.0})
    choice = {"pick_dtype": lambda device: torch.float32}
    text = train(tmp_path, mels, toy=toy, RESUME=True, EPOCHS=3, **choice)
    assert re.search("Note: .*float16 on cuda.*float32 on cpu", text)
    assert json.loads(metrics.read_text())["amp"] == "float32"
    assert len(read_history(tmp_path / "output")) == 3


def test_a_damaged_checkpoint_is_told_and_earlier_files_are_kept(mels, tmp_path):
    assert "starting with epoch 1" in train(tmp_path, mels, toy=QUICK, RESUME=True)
    output = tmp_path / "output"
    path = output / "last_checkpoint.pth"
    sound = path.read_bytes()
    old = {"model": {}, "average": {}, "history": []}  # as before format_version 2
    for damage in (b"junk", b"", sound[: len(sound) // 2], old, [1], {"model": 1}):
        if isinstance(damage, bytes):
            path.write_bytes(damage)
        else:
            torch.save(damage, path)
        text = train(tmp_path, mels, toy=QUICK, RESUME=True, EPOCHS=2, code=1)
        assert "last_checkpoint.pth" in text
        assert "checkpoint" in text
    path.unlink()
    os.mkfifo(path)  # opened, it would be waited for
    text = train(tmp_path, mels, toy=QUICK, RESUME=True, code=1)
    assert "not a regular file" in text
    path.unlink()
    path.write_bytes(sound)
    (output / "best_model.pth").unlink()
    assert "best_model.pth is gone" in train(tmp_path, mels, toy=QUICK, RESUME=True, code=1)


def test_flipped_bits_are_refused_or_change_nothing(whole, tmp_path):
    """torch.load checks no CRC: of 12 single flipped bits 9 loaded."""
    path = tmp_path / "last_checkpoint.pth"
    sound = (whole / "best_model.pth").read_bytes()
    path.write_bytes(sound)
    expected = trainer.read_checkpoint(path)
    random = np.random.default_rng(0)
    n_refused = 0
    for bit in random.integers(8 * len(sound), size=200):
        flipped = bytearray(sound)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert not differences(trainer.read_checkpoint(path), expected)
        except trainer.UserError:
            n_refused += 1
    assert n_refused > 150, "a flipped weight is not seen"


def test_a_checkpoint_that_unpacks_to_more_than_its_size_is_refused(whole, tmp_path, monkeypatch):
    """Before anything in it is unpacked."""
    bomb = tmp_path / "bomb.pth"
    with (
        zipfile.ZipFile(whole / "best_model.pth") as sound,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for record in sound.infolist():
            packed.writestr(record.filename, sound.read(record))
        packed.writestr("best_model/data/999", bytes(10**7))
    unpacked = []
    monkeypatch.setattr(trainer.torch, "load", lambda *_, **__: unpacked.append("load"))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: unpacked.append("testzip"))
    with pytest.raises(trainer.UserError, match="bomb"):
        trainer.read_checkpoint(bomb)
    assert not unpacked


def test_a_mistake_of_ours_is_not_told_as_the_users_files_fault(mels, tmp_path):
    """A bug must be seen as one: a traceback, not "your file is damaged"."""
    train(tmp_path, mels, toy=QUICK)

    def buggy(*_):
        raise TypeError("a bug of ours")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError, match="a bug of ours"):
        patch.setattr(trainer.TrainState, "load_state_dict", buggy)
        train(tmp_path, mels, toy=QUICK, RESUME=True, EPOCHS=2)
    with pytest.raises(TypeError, match="a bug of ours"):
        train(tmp_path, mels, toy=QUICK, clip_level=buggy)


def test_earlier_trainings_are_never_overwritten(mels, tmp_path, monkeypatch):
    """Also when the clock stands still or goes back; a training that failed is one too."""
    monkeypatch.setattr(trainer.time, "strftime", lambda *_: "20200101-000000")
    output = tmp_path / "output"
    train(tmp_path, mels, toy=QUICK)
    bests = []
    for seed, code in ((1, 0), (2, 1), (3, 0)):
        bests.append((output / "best_model.pth").read_bytes())
        names = {path.name for path in output.iterdir() if path.is_file()}
        broken = {"LEARNING_RATE": 1e30, "GRADIENT_CLIP": 1e30, "WARMUP_EPOCHS": 0}
        more = broken if code else {}
        text = train(tmp_path, mels, toy=QUICK, SEED=seed, code=code, **more)
        kept = output / f"earlier_20200101-000000{f'-{seed}' if seed > 1 else ''}"
        assert kept.name in text
        assert {path.name for path in kept.iterdir()} == names
        if code:
            assert not (output / "metrics.json").exists(), "old figures beside the new split"
            train(tmp_path, mels, toy=QUICK, move_earlier=lambda folder: None)
    folders = sorted(output.glob("earlier_*"))
    assert len(folders) == 3
    assert [(folder / "best_model.pth").read_bytes() for folder in folders] == bests


def test_two_trainings_in_one_process_and_the_lock_between(mels, tmp_path):
    """As a notebook's %run: the folder is let go at the end, also after an error."""
    train(tmp_path, mels, toy=QUICK)
    train(tmp_path, mels, toy=QUICK)
    assert "now 1" in train(tmp_path, mels, toy=QUICK, RESUME=True, SEED=1, code=1)
    with trainer.folder_lock(tmp_path / "output"):
        assert "in use" in train(tmp_path, mels, toy=QUICK, code=1)
    train(tmp_path, mels, toy=QUICK)


# --------------------------------------------------------------------------------------
# Trouble on the way


def test_a_full_disk_is_a_sentence(mels, tmp_path):
    """By the real command line: exit status 1. A limit on a file's size stands for the disk."""
    train(tmp_path, mels, toy=QUICK)
    size = (tmp_path / "output/best_model.pth").stat().st_size
    paths = {"MEL_DIR": str(mels), "OUTPUT_DIR": str(tmp_path / "full")}
    script = edited_trainer(tmp_path, **PLAIN | {"EPOCHS": 1} | paths)
    limited = tmp_path / "limited.py"
    limited.write_text(
        "import resource, runpy\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2},) * 2)\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    text = run(limited, cwd=tmp_path, code=1)
    assert "best_model.pth" in text
    assert "RESUME = True" in text
    assert not list((tmp_path / "full").glob(".*.tmp")), "half a file is left"


def test_a_loss_that_is_no_number_stops_with_a_sentence(mels, tmp_path):
    toy = QUICK | {"LEARNING_RATE": 1e30, "GRADIENT_CLIP": 1e30, "WARMUP_EPOCHS": 0}
    text = train(tmp_path, mels, toy=toy, EPOCHS=30, code=1)
    assert re.search("loss is (nan|inf)", text)
    assert "lower LEARNING_RATE" in text


def test_full_memory_is_a_sentence_and_a_fault_of_ours_is_not(mels, tmp_path, monkeypatch):
    words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    raised = [RuntimeError(words), MemoryError(), RuntimeError("shapes cannot be multiplied")]

    def fail(*_):
        raise raised.pop(0)

    monkeypatch.setattr(trainer, "train_epoch", fail)
    for _ in range(2):
        text = train(tmp_path, mels, code=1)
        assert "This machine's memory is full" in text and "lower BATCH_SIZE (" in text
    with pytest.raises(RuntimeError, match="multiplied"):
        train(tmp_path, mels, code=1)


def test_more_spectrograms_than_memory_holds(mels, constants, monkeypatch, tmp_path):
    """Past half of the memory they stand in a nameless file: the same numbers, no file left."""
    constants(OUTPUT_DIR=str(tmp_path), **PLAIN)
    clips = trainer.assign_split(trainer.list_clips(mels))
    inside = trainer.Spectrograms(clips, MEL_128)
    monkeypatch.setattr(trainer, "memory_limit", lambda: 1e6)
    seen = []
    memmap = np.memmap

    def noted(*arguments, **options):
        seen.append(1)
        return memmap(*arguments, **options)

    monkeypatch.setattr(trainer.np, "memmap", noted)
    outside = trainer.Spectrograms(clips, MEL_128)
    assert seen
    assert inside.normalization == outside.normalization
    assert torch.equal(inside.frames, outside.frames)
    assert not list(tmp_path.iterdir())


def test_the_memory_is_the_machines_or_less(monkeypatch):
    monkeypatch.setattr(trainer.os, "sysconf", lambda name: 1000)
    assert trainer.memory_limit() == 10**6


# --------------------------------------------------------------------------------------
# Notes


def test_what_makes_figures_worth_less_is_told(mels, tmp_path):
    stems = sorted(path.stem.removesuffix("_original") for path in mels.glob("*/*_original.npy"))
    parts = {"1001": "val", "1002": "test"}
    lines = [f"{s},{parts.get(s[:4], 'train')}\n" for s in stems if "_SAD_" not in s]
    (tmp_path / "split.csv").write_text("stem,split\n" + "".join(lines))
    text = train(tmp_path, mels, toy=QUICK, SPLIT=str(tmp_path / "split.csv"))
    assert "no clip of SAD to train" in text
    assert "1 actor to test" in text
    assert re.search("5 steps of BATCH_SIZE 16", text)
    assert "keeps all" not in text, "nothing was cut"
    assert "original" not in text, "a finished corpus is called unfinished"
    assert "optimistic" not in text


def test_voices_on_both_sides_are_told(mels, tmp_path):
    """By clip, and where that split is given back as a table."""
    text = train(tmp_path, mels, toy=QUICK, SPLIT="clip")
    assert "the same voices in more than one of training, validation and test: optimistic" in text
    shutil.copy(tmp_path / "output/split.csv", tmp_path / "given.csv")
    text = train(tmp_path / "again", mels, toy=QUICK, SPLIT=str(tmp_path / "given.csv"))
    assert re.search(r"Note: \d speakers with clips in more than one of training, valid", text)
    assert "given.csv' has the same voices in more than one of training, validation" in text
    clips = pd.DataFrame(
        {"actor": ["a", "a", "b", "c"], "split": ["train", "val", "train", "test"]}
    )
    assert trainer.shared_speakers(clips) == ["a"]
    assert trainer.shared_speakers(clips.assign(actor="unknown")) == []
    two_spellings = clips.assign(actor=["b", "c", "Anna", "anna"])
    assert trainer.shared_speakers(two_spellings) == ["anna"]
    in_val_and_test = clips.assign(split=["val", "test", "train", "train"])
    assert trainer.shared_speakers(in_val_and_test) == ["a"]


def test_a_disks_fault_is_not_the_files(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    with pytest.raises(FileNotFoundError):
        trainer.read_spectrogram(tmp_path / "gone.npy", 2)
    monkeypatch.setattr(trainer.Path, "open", refuse)
    with pytest.raises(PermissionError):
        trainer.read_spectrogram(tmp_path / "a.npy", 2)


def test_other_emotions_are_other_settings(constants):
    clips = pd.DataFrame({"stem": ["a"], "variant": ["original"], "split": ["train"], "actor": "x"})
    data = types.SimpleNamespace(measured={}, normalization={})
    config = trainer.training_config(clips, {}, data, None)
    before = config | {"EMOTIONS": {"ANG": "Angry"}}
    assert [text.split()[0] for text in trainer.changed_settings(before, config)] == ["EMOTIONS"]


def test_more_data_is_told_without_lists_of_speakers_and_hashes():
    before = {"SEED": 1, "SPEAKERS": ["a"], "DATA_SHA256": "0", "EPOCHS": 2}
    now = {"SEED": 2, "SPEAKERS": ["a", "b"], "DATA_SHA256": "1", "EPOCHS": 3}
    told = trainer.changed_settings(before, now)
    assert told[0] == "SEED was 1, now 2" and len(told) == 2 and "MEL_DIR" in told[1]


def test_clips_over_max_width_are_told_with_the_width_that_hears_all(mels, tmp_path):
    text = train(tmp_path, mels, toy=QUICK, MAX_WIDTH=30)
    [(n_cut, n_clips, share, longest)] = re.findall(
        r"(\d+) of (\d+) spectrograms.* ([\d.]+) % .*MAX_WIDTH = (\d+)", text
    )
    split = {row["stem"]: row["split"] for row in read_table(tmp_path / "output/split.csv")}
    lengths = []
    for path in mels.rglob("*.npy"):
        stem = re.sub("(_X0)_.*", r"\1", path.stem)
        if split[stem] == "train" or path.stem.endswith("_original"):
            lengths.append(np.load(path).shape[1])
    lengths = np.array(lengths)
    assert (int(n_cut), int(n_clips)) == ((lengths > 30).sum(), len(lengths))
    lost = 100 * (lengths - 30).clip(min=0).sum() / lengths.sum()
    assert float(share) == pytest.approx(lost, abs=0.06)
    assert int(longest) == lengths.max()
    assert "keeps all" not in train(tmp_path, mels, toy=QUICK, MAX_WIDTH=int(longest))


def test_an_unfinished_corpus_is_told(mels, tmp_path):
    shutil.copytree(mels, tmp_path / "mels")
    sorted((tmp_path / "mels").glob("ANG/*_original.npy"))[0].unlink()
    text = train(tmp_path, tmp_path / "mels", toy=QUICK | {"EPOCHS": 1})
    assert re.search("47 originals.*48", text, flags=re.S)
    config = json.loads((mels / "mel_config.json").read_text())
    del config["n_originals"]
    (tmp_path / "mels/mel_config.json").write_text(json.dumps(config))
    text = train(tmp_path, tmp_path / "mels", toy=QUICK)
    assert re.search("47 originals.*no run.*finished", text, flags=re.S)


# --------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "name, value, word",
    [
        ("EPOCHS", "many", "whole number"),
        ("EPOCHS", 0, "EPOCHS = 0"),
        ("SEED", 10**15, "4294967295"),
        ("BATCH_SIZE", 1, "BATCH_SIZE = 1"),
        ("BATCH_SIZE", 5000, "lower BATCH_SIZE"),
        ("HIDDEN", 1, "HIDDEN = 1"),
        ("HEADS", 5, "divisor"),
        ("DROPOUT", 1.5, "DROPOUT = 1.5"),
        ("DROPOUT", float("nan"), "DROPOUT = nan"),
        ("LEARNING_RATE", True, "LEARNING_RATE = True"),
        ("MAX_WIDTH", 191.0, "whole number"),
        ("AMP", "fp8", "AMP"),
        ("DEVICE", "gpu", "cuda"),
        ("DEVICE", "toaster", "toaster"),
        ("DEVICE", "cuda:99", "cuda:99"),
        ("DEVICE", 0, "DEVICE = 0"),
        ("SPLIT", "by mood", "by mood"),
        ("SPLIT", "", "SPLIT"),
        ("SPLIT", None, "SPLIT"),
        ("MEL_DIR", "nowhere", "no folder"),
        ("RESUME", 1, "True or False"),
        ("WEIGHTED_SAMPLING", "yes", "True or False"),
        ("CHANNELS", (1, 2), "four"),
        ("CHANNELS", (8, 8, 8, 0), "four"),
        ("STRIDES", 2, "four pairs"),
        ("STRIDES", ((2, 2), (2, 2), (1, 2), (1, 0)), "four pairs"),
    ],
)
def test_a_wrong_constant_is_a_sentence(mels, tmp_path, name, value, word):
    assert word in train(tmp_path, mels, toy=QUICK, code=1, **{name: value})
    assert not list(tmp_path.glob("output/*.pth"))


@pytest.mark.parametrize("name", trainer.CONSTANTS)
def test_a_missing_constant_is_a_sentence(mels, tmp_path, name):
    """EPOCH = 2 in place of EPOCHS."""
    values = QUICK | {"MEL_DIR": str(mels), "OUTPUT_DIR": str(tmp_path / "output")}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in values.items():
            patch.setattr(trainer, key, value)
        patch.delattr(trainer, name)
        text = call(trainer, code=1)
    assert f"{name} is missing" in text


def test_any_argument_is_an_error_that_says_where_the_constants_are():
    """By the real command line once: exit status 2."""
    text = run(ROOT / "cremad_custom2.py", "--epochs", 2, code=2)
    assert "onstants" in text
    assert "--epochs" in text
    for arguments in (("5",), ("-x",), ("--resume",), ("--epochs=2", "output")):
        assert "onstants" in call(trainer, *arguments, code=2)
    assert "best_model.pth" in call(trainer, "--help")


def test_a_device_that_cannot_compute_is_a_sentence(mels, tmp_path):
    def too_old(device):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    text = train(tmp_path, mels, toy=QUICK, try_device=too_old, code=1)
    assert "no kernel image is available" in text
    assert '"cpu"' in text


def test_output_in_the_spectrograms_folder_is_refused(mels, tmp_path):
    shutil.copytree(mels, tmp_path / "output")
    before = sorted(tmp_path.rglob("*"))
    for folder in (tmp_path / "output", tmp_path / "output/../output", f"{tmp_path}/output/"):
        assert "OUTPUT_DIR" in train(tmp_path, folder, toy=QUICK, code=1)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_editor_without_a_terminal(monkeypatch, constants):
    """As IDLE's and a notebook's output: it cannot be reconfigured, and may be none at all."""
    constants(MEL_DIR="nowhere")
    error = io.StringIO()
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", error)
    assert trainer.main([]) == 1
    assert "no folder" in error.getvalue()
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", None)
    assert trainer.main([]) == 1
    assert "no folder" in output.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        {"n_mels": "128"},
        {"n_mels": 0},
        {"n_mels": None},
        {"n_mels": 128.0},
        {"n_mels": True},
        {"n_mels": 2000},
        {"hop_length": 0},
        {"hop_length": 4096},
        {"hop_length": None},
        {"sample_rate": "x"},
        {"sample_rate": 0},
        {"n_fft": 2**17},
        {"n_fft": "2048"},
        {"fmin": -1},
        {"fmin": "0"},
        {"fmax": 9000},
        {"fmax": None},
        {"fmax": float("nan")},
        {"n_originals": "48"},
        {"n_originals": []},
    ],
    ids=str,
)
def test_wrong_mel_settings_are_a_sentence(mels, tmp_path, change):
    shutil.copytree(mels, tmp_path / "mels")
    path = tmp_path / "mels/mel_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    text = train(tmp_path, tmp_path / "mels", toy=QUICK, code=1)
    assert "mel_config.json" in text
    assert next(iter(change)) in text
    assert not list(tmp_path.glob("output/*.pth"))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"n_mels": 128}', "\xff\xfe"])
def test_a_mel_config_that_is_none_is_a_sentence(mels, tmp_path, text):
    shutil.copytree(mels, tmp_path / "mels")
    (tmp_path / "mels/mel_config.json").write_text(text, encoding="latin-1")
    assert "mel_config.json" in train(tmp_path, tmp_path / "mels", toy=QUICK, code=1)


def test_wrong_spectrogram_folders_are_a_sentence(corpus, mels, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "mel_config.json" in train(tmp_path, empty, toy=QUICK, code=1)
    shutil.copy(mels / "mel_config.json", empty)
    assert "mel_generator.py" in train(tmp_path, empty, toy=QUICK, code=1)
    (tmp_path / "two").mkdir()
    for path in corpus.iterdir():
        if path.name < "1003":
            shutil.copy(path, tmp_path / "two")
    generate(tmp_path / "two", tmp_path / "two_mels", "--workers", 1)
    assert "at least three" in train(tmp_path, tmp_path / "two_mels", toy=QUICK, code=1)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


def make_folder(path):
    path.unlink()
    path.mkdir()


def bad_header(path):
    path.write_bytes(path.read_bytes().replace(b"'shape': (", b"'shape': )"))


def save(array):
    return lambda path: np.save(path, array, allow_pickle=True)


@pytest.mark.parametrize(
    "damage, word",
    [
        (cut_short, "not a complete"),
        (lambda path: path.write_bytes(b""), "not a complete"),
        (bad_header, "not a complete"),
        (save(np.array([{}])), "not a complete"),
        (make_pipe, "regular file"),
        (make_folder, "regular file"),
        (save(np.zeros((64, 9), np.float32)), "64, 9"),
        (save(np.zeros((128, 9))), "float64"),
        (save(np.zeros((128, 0), np.float32)), "128, 0"),
        (save(np.full((128, 9), np.nan, np.float32)), "not finite"),
        (lambda path: path.rename(path.with_name("1001_DFA_ANG_X0.npy")), "variant"),
    ],
)
def test_damaged_spectrograms_are_named(mels, tmp_path, damage, word):
    shutil.copytree(mels, tmp_path / "mels")
    path = sorted((tmp_path / "mels").glob("ANG/*_original.npy"))[0]
    damage(path)
    text = train(tmp_path, tmp_path / "mels", toy=QUICK, code=1)
    assert word in text
    assert path.name[:10] in text


def test_pipes_are_refused_at_once(mels, tmp_path):
    """Opened, each would be waited for without end."""
    shutil.copytree(mels, tmp_path / "mels")
    make_pipe(tmp_path / "mels/mel_config.json")
    assert "mel_config.json" in train(tmp_path, tmp_path / "mels", toy=QUICK, code=1)
    os.mkfifo(tmp_path / "split")
    text = train(tmp_path, mels, toy=QUICK, SPLIT=str(tmp_path / "split"), code=1)
    assert "not a regular file" in text
    text = train(tmp_path, mels, toy=QUICK, OUTPUT_DIR=str(tmp_path / "split"), code=1)
    assert "split" in text


# --------------------------------------------------------------------------------------
# The environment


def load_afresh(environment):
    """The trainer as another module, read in this environment; returns both afterwards."""
    spec = importlib.util.spec_from_file_location("afresh", ROOT / "cremad_custom2.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(os.environ, environment, clear=True):
        spec.loader.exec_module(module)
        return module, dict(os.environ)


def test_what_another_job_left_in_the_environment_is_ignored(mels, tmp_path, monkeypatch):
    """RANK and WORLD_SIZE mean something under torchrun alone, which sets them all."""
    left = {"RANK": "1", "WORLD_SIZE": "", "LOCAL_RANK": "x"}
    for one in ({"RANK": "1"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "4"}, left):
        module, _ = load_afresh(one)
        assert (module.RANK, module.WORLD_SIZE) == (0, 1)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    train(tmp_path, mels, toy=QUICK)


@pytest.mark.parametrize("value", ["", "0", "x"])
def test_a_local_world_size_left_over_is_ignored(mels, constants, monkeypatch, value):
    constants(**PLAIN)
    clips = trainer.assign_split(trainer.list_clips(mels))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    trainer.Spectrograms(clips, MEL_128)


def test_importing_changes_nothing(tmp_path, monkeypatch):
    """Environment, matplotlib's backend, pandas' options, PyTorch's switches, signals, files."""
    monkeypatch.chdir(tmp_path)

    def look():
        switches = (torch.backends.cudnn.allow_tf32, torch.get_num_threads())
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        streams = (sys.stdout, sys.stderr, sys.excepthook)
        options = pd.get_option("mode.string_storage")
        return matplotlib.rcParams["backend"], switches, handlers, streams, options

    with matplotlib.rc_context():
        matplotlib.rcParams["backend"] = "svg"
        before = look()
        _, environment = load_afresh({"HOME": str(tmp_path)})
        assert look() == before
    assert environment == {"HOME": str(tmp_path)}
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------
# torchrun


def torchrun(script, code=0):
    """Two processes by the real torchrun; returns what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc_per_node=2", str(script)],
        cwd=script.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert (done.returncode == 0) == (code == 0), done.stdout
    return done.stdout


OBSERVER = """import shutil, sys
import torch
import cremad_custom2 as trainer

fit, save_progress = trainer.fit, trainer.save_progress

def fit_and_keep_weights(state, *arguments):
    fit(state, *arguments)
    torch.save(list(state.model.parameters()), f"rank{trainer.RANK}.pth")

def save_and_keep_first_epoch(state, *arguments):
    save_progress(state, *arguments)
    if len(state.history) == 1:
        shutil.copytree("output", "../cut/output")

trainer.fit, trainer.save_progress = fit_and_keep_weights, save_and_keep_first_epoch
sys.exit(trainer.main([]))
"""


def test_two_processes_train_as_one_and_resume(mels, tmp_path):
    toy = PLAIN | {"MEL_DIR": str(mels), "BATCH_SIZE": 8, "EPOCHS": 2}
    whole, cut = (tmp_path / name / "output" for name in ("whole", "cut"))
    script = edited_trainer(whole.parent, **toy | {"OUTPUT_DIR": str(whole)})
    script.with_name("observer.py").write_text(OBSERVER)
    text = torchrun(script.with_name("observer.py"))
    ours, theirs = (load(tmp_path / f"whole/rank{rank}.pth") for rank in (0, 1))
    equal = [torch.equal(one, other) for one, other in zip(ours, theirs, strict=True)]
    assert all(equal), "the processes' weights went apart"
    assert text.count("epoch   1/2") == 1, "one process speaks"
    rows = read_history(whole)
    metrics = json.loads((whole / "metrics.json").read_text())
    assert float(rows[0]["learning_rate"]) == pytest.approx(TOY["LEARNING_RATE"] * 2**0.5)
    assert len(rows) == 2
    best = rows[metrics["best_epoch"] - 1]
    assert float(best["val_accuracy"]) == pytest.approx(metrics["val"]["accuracy"])
    assert {path.name for path in whole.iterdir()} == OUTPUTS
    assert len(read_history(cut)) == 1, "nothing is left to resume"
    torchrun(edited_trainer(cut.parent, **toy | {"OUTPUT_DIR": str(cut), "RESUME": True}))
    assert read_history(cut) == rows
    text = train(cut.parent, mels, toy=PLAIN | {"BATCH_SIZE": 8}, RESUME=True, code=1)
    assert "WORLD_SIZE was 2, now 1" in text


def test_processes_end_together_when_one_fails(mels, tmp_path):
    """A folder in use, which one process alone finds out: the other must not wait for it."""
    paths = {"MEL_DIR": str(mels), "OUTPUT_DIR": str(tmp_path / "output"), "BATCH_SIZE": 8}
    script = edited_trainer(tmp_path, **PLAIN | paths)
    (tmp_path / "output").mkdir()
    with trainer.folder_lock(tmp_path / "output"):
        assert "in use" in torchrun(script, code=1)


def test_processes_share_one_draw(constants):
    """Together their clips are one draw, and each process's have like lengths."""
    constants(BATCH_SIZE=8, WORLD_SIZE=2)
    data = stand_in(torch.arange(96) + 10, torch.arange(96) % 6)
    batches, rates = trainer.draw_epoch(data, seeded(0))
    assert batches.shape == rates.shape == (6, 16)
    lengths = [data.length[batches[:, rank::2]].float().mean(1) for rank in (0, 1)]
    assert (lengths[0] - lengths[1]).abs().max() < 8


def test_processes_augment_their_clips_each_in_its_own_way(constants):
    """A CPU's generator takes the lowest 32 bits of a seed."""
    seeds = set()
    shares = []
    model = nn.Linear(1, 1)
    state = types.SimpleNamespace(device=CPU, model=model, warm_up=lambda *_: None)

    def note(own, *_, **__):
        shares.append(own[0][0].tolist())
        seeds.add(torch.initial_seed() % 2**32)
        raise ZeroDivisionError  # seen enough

    constants(draw_epoch=lambda *_: (torch.arange(6)[None], torch.ones(1, 6)), tqdm=note)
    for rank, epoch in ((0, 1), (1, 1), (2, 1), (0, 2), (1, 2)):
        constants(RANK=rank, WORLD_SIZE=3)
        with contextlib.suppress(ZeroDivisionError):
            trainer.train_epoch(state, None, epoch)
    assert len(seeds) == 5
    assert shares[:3] == [[0, 3], [1, 4], [2, 5]]
