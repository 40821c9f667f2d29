"""cremad_custom2.py: split, sampling, padding, mixed precision, schedule, outputs, bad input."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TOY, generate, run, train
from editing import edited_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, recall_score
from torch import nn

import cremad_custom2 as trainer


@pytest.fixture
def constants(monkeypatch):
    return lambda **values: [monkeypatch.setattr(trainer, name, value) for name, value in values.items()]


def toy_model(n_mels=128):
    torch.manual_seed(0)
    model = trainer.EmotionClassifier(n_mels, 6, (8, 8, 16, 16), trainer.STRIDES, 32, 4, 0.3)
    for norm in model.modules():  # as after training: a fresh batch norm hides what padding does
        if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(norm.bias, 0.2, 1.0)
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    return model.eval()


def table(actors, emotions_of):
    rows = [(f"{a}_S{i}_{e}_XX", v, a, e) for a in actors for i, e in enumerate(emotions_of(a)) for v in ("original", "pitch_up", "noise_low")]
    return pd.DataFrame([("", *row) for row in rows], columns=["path", "stem", "variant", "actor", "emotion"])


# ---- no leakage


@settings(max_examples=40, deadline=None)
@given(n_actors=st.integers(3, 40), clips=st.integers(1, 12), seed=st.integers(0, 1000), by=st.sampled_from(["actor", "clip"]))
def test_no_voice_on_two_sides_and_no_copy_outside_training(n_actors, clips, seed, by):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SPLIT": by, "SEED": seed, "BATCH_SIZE": 1}.items():
            patch.setattr(trainer, name, value)
        random = np.random.default_rng(seed)
        split = trainer.assign_split(table([str(1000 + a) for a in range(n_actors)], lambda a: random.choice(list(trainer.EMOTIONS), clips + (n_actors < 4) * 4)))
    assert set(split.split) == {"train", "val", "test"}
    assert (split[split.split != "train"].variant == "original").all()
    assert split.groupby("stem").split.nunique().max() == 1
    if by == "actor":
        assert split.groupby("actor").split.nunique().max() == 1
    assert set(split[split.split == "train"].variant) == {"original", "pitch_up", "noise_low"}


@pytest.mark.parametrize("seed", range(8))
def test_split_is_as_even_as_actors_allow(constants, seed):
    """Of twenty actors half are always angry, half always sad: a single draw of three is of one kind in every fifth."""
    constants(SPLIT="actor", SEED=seed)
    split = trainer.assign_split(table([str(1000 + a) for a in range(20)], lambda a: ["ANG" if int(a) % 2 else "SAD"] * 12))
    assert (split.groupby("split").emotion.nunique() == 2).all()


def test_split_is_70_15_15_and_even_over_emotions(constants):
    constants(SPLIT="actor")
    codes = list(trainer.EMOTIONS)
    split = trainer.assign_split(table([str(1000 + a) for a in range(40)], lambda a: codes * 2 + codes[: int(a) % 6]))
    assert split.groupby("split").actor.nunique().to_dict() == {"train": 28, "val": 6, "test": 6}
    originals = split[split.variant == "original"]
    shares = pd.crosstab(originals.split, originals.emotion, normalize="index")
    assert (shares.max() - shares.min()).max() < 0.02


def test_augmented_files_of_held_out_actors_change_nothing(mels, trained, tmp_path):
    split = pd.read_csv(trained / "split.csv", dtype=str).set_index("stem").split
    shutil.copytree(mels, tmp_path / "mels")
    removed = [p for p in (tmp_path / "mels").rglob("*.npy") if not p.stem.endswith("_original") and split[re.sub(r"(_XX|_X\d+)_.*", r"\1", p.stem)] != "train"]
    assert len(removed) == 2 * (split != "train").sum()
    for path in removed:
        path.unlink()
    train(tmp_path / "run", tmp_path / "mels")
    assert (tmp_path / "run/output/test_predictions.csv").read_bytes() == (trained / "test_predictions.csv").read_bytes()
    assert history(tmp_path / "run/output") == history(trained)


@pytest.fixture
def first_epoch(mels, constants):
    """Trains a toy for an epoch, in this process, its clips changed before; returns loss and weights, plain and averaged."""
    clips, config = trainer.list_clips(mels), trainer.read_mel_config(mels)

    def go(change=lambda run: None, **values):
        constants(**TOY | values)
        run = trainer.Run(trainer.assign_split(clips), config, torch.device("cpu"), None)
        change(run)
        loss, _ = trainer.train_epoch(run, 1)
        return loss, *(torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (run.model, run.average.module))

    return go


def test_held_out_clips_never_train(first_epoch, mels):
    """Neither as examples nor by their statistics: whatever stands in them, the weights are the same."""

    def no_numbers(run):
        for side in ("val", "test"):
            for i in run.sides[side]:
                run.data.clip(i).fill_(torch.nan)

    loss, weights, averaged = first_epoch()
    other_loss, *others = first_epoch(no_numbers)
    assert other_loss == loss and torch.equal(others[0], weights) and torch.equal(others[1], averaged)
    clips = trainer.assign_split(trainer.list_clips(mels))
    data = np.concatenate([np.load(path) for path in clips.path[clips.split == "train"]], 1).astype(float)
    found = trainer.Run(clips, trainer.read_mel_config(mels), torch.device("cpu"), None).normalization
    assert np.allclose(found["mean"], data.mean(1)) and np.allclose(found["std"], data.std(1), atol=1e-3)


CHANGED = {"WEIGHTED_SAMPLING": False, "DROPOUT": 0.1, "LEARNING_RATE": 1e-3, "WARMUP_EPOCHS": 2, "WEIGHT_DECAY": 1.0, "LABEL_SMOOTHING": 0.3, "TIME_MASK": 0, "MEL_MASK": 0, "TIME_WARP": 0.0,
           "MEL_SHIFT": 0, "TONE": 0.0, "GAIN": 0.0, "NARROW_BAND": 0.9, "GRADIENT_CLIP": 1e-6, "SEED": 1}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_every_constant_of_training_is_used(first_epoch, name):
    _, plain, _ = first_epoch()
    _, changed, _ = first_epoch(**{name: CHANGED[name]})
    assert (changed - plain).abs().max() > 1e-6


def test_averaged_weights_and_schedule_are_those_of_the_constants(first_epoch, constants):
    seen = []
    _, weights, averaged = first_epoch(seen.append, AVERAGING=0.0)
    assert torch.equal(weights, averaged)
    _, weights, averaged = first_epoch(AVERAGING=0.9)
    assert (weights - averaged).abs().max() > 1e-3
    scheduler = seen[0].scheduler
    assert (scheduler.mode, scheduler.factor, scheduler.patience) == ("max", trainer.LR_FACTOR, trainer.LR_PATIENCE)


def test_published_split_as_csv(mels, tmp_path):
    stems = sorted(p.stem.removesuffix("_original") for p in mels.rglob("*_original.npy"))
    rows = [(s, "test" if s < "1003" else "val" if s < "1004" else "train") for s in stems if s < "1008"] + [("9999_no_ANG_X", "train")]
    (tmp_path / "split.csv").write_text("stem,split\n" + "".join(f"{s},{side}\n" for s, side in rows))
    text = train(tmp_path / "run", mels, SPLIT=str(tmp_path / "split.csv"), EPOCHS=1)
    assert "1 of its 43 stems have no spectrogram; 6 clips that it does not name are left out" in text
    used = pd.read_csv(tmp_path / "run/output/split.csv", dtype=str)
    assert dict(zip(used.stem, used.split, strict=True)) == dict(rows[:-1])


# ---- sampling


def test_sampler_draws_every_emotion_as_often(constants):
    constants(BATCH_SIZE=50)
    data = trainer.Spectrograms.__new__(trainer.Spectrograms)
    data.label = torch.repeat_interleave(torch.arange(6), torch.tensor([1000, 500, 250, 100, 50, 2100]))
    data.length = torch.randint(10, 100, (4000,))
    everyone = torch.arange(4000)
    shares = lambda weighted: (constants(WEIGHTED_SAMPLING=weighted), data.label[trainer.draw_epoch(data, everyone, torch.Generator().manual_seed(1))[0].flatten()].bincount() / 4000)[1]  # noqa: E731
    assert (shares(True) - 1 / 6).abs().max() < 0.03
    assert (shares(False) - data.label.bincount() / 4000).abs().max() < 1e-6


def test_batches_hold_clips_of_like_length(constants):
    """Of like length at the speeds drawn for them."""
    constants(BATCH_SIZE=10, TIME_WARP=0.4)
    data = trainer.Spectrograms.__new__(trainer.Spectrograms)
    data.label, data.length = torch.arange(600) % 6, torch.randint(10, 190, (600,), generator=torch.Generator().manual_seed(0))
    index, rate = trainer.draw_epoch(data, torch.arange(600), torch.Generator().manual_seed(1))
    assert 0.67 < rate.min() < 0.69 and 1.45 < rate.max() < 1.5
    length = data.length[index] / rate
    assert (length.amax(1) - length.amin(1)).float().mean() < 10
    assert (length.float().mean(1).diff() < 0).any()  # but not the short ones first


# ---- the model


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 16, 61, 190])
def test_padding_changes_no_logit(frames):
    model, clip = toy_model(), torch.randn(frames, 128, generator=torch.Generator().manual_seed(frames))
    other = torch.randn(191, 128)
    alone = model(clip[None], torch.tensor([frames]))
    together = model(nn.utils.rnn.pad_sequence([other, clip], batch_first=True), torch.tensor([191, frames]))
    assert (alone[0] - together[1]).abs().max() < 1e-4
    assert (model(other[None], torch.tensor([191]))[0] - together[0]).abs().max() < 1e-4


def test_order_of_frames_matters():
    model, clip = toy_model(), 10 * torch.randn(1, 80, 128)
    shuffled = clip[:, torch.randperm(80)]
    assert (model(clip, torch.tensor([80])) - model(shuffled, torch.tensor([80]))).abs().max() > 1e-3


def test_architecture_as_documented():
    model = trainer.EmotionClassifier(128, 6, trainer.CHANNELS, trainer.STRIDES, trainer.HIDDEN, trainer.HEADS, trainer.DROPOUT)
    assert len(model.blocks) == 4 and all(isinstance(b.norm1, nn.BatchNorm2d) for b in model.blocks)
    assert [lstm.hidden_size for way in (model.lstm.onward, model.lstm.back) for lstm in way] == [512] * 4
    assert isinstance(model.attention, nn.MultiheadAttention)
    kinds = [type(layer) for layer in model.head]
    assert (kinds.count(nn.Linear), kinds.count(nn.BatchNorm1d)) == (3, 2)
    assert sum(p.numel() for p in model.parameters()) * 4 < 100e6


def test_every_weight_has_its_say():
    """But the pooling scores' last bias: a softmax does not see it."""
    model = toy_model()
    model(torch.randn(2, 40, 128), torch.tensor([40, 40])).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert set(silent) <= {"pooling.score.2.bias"}


def test_lstm_is_pytorchs_on_packed_clips():
    ours, theirs = trainer.BidirectionalLSTM(12, 8, 0.0), nn.LSTM(12, 8, 2, batch_first=True, bidirectional=True)
    for layer in (0, 1):
        for way, suffix in ((ours.onward, ""), (ours.back, "_reverse")):
            way[layer].load_state_dict({f"{name}_l0": getattr(theirs, f"{name}_l{layer}{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")})
    x, steps = torch.randn(3, 9, 12), torch.tensor([9, 4, 1])
    packed, _ = theirs(nn.utils.rnn.pack_padded_sequence(x, steps, batch_first=True))
    packed, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    assert ((ours(x, steps) - packed) * trainer.inside(steps, 9)[:, :, None]).abs().max() < 1e-5


def test_pooling_is_a_weighted_mean_and_spread_of_own_steps():
    torch.manual_seed(0)
    pooling, x, mask = trainer.AttentivePooling(5), torch.randn(2, 6, 5), trainer.inside(torch.tensor([6, 3]), 6)
    x[1, 3:] = 1e3  # past the second clip's own steps
    weight = pooling.score(x[1, :3]).softmax(0)
    mean = (weight * x[1, :3]).sum(0)
    spread = ((weight * x[1, :3] ** 2).sum(0) - mean**2 + 1e-4).sqrt()
    assert weight.amax() - weight.amin() > 1e-3
    assert torch.allclose(pooling(x, mask)[1], torch.cat([mean, spread]), atol=1e-4)


def test_logits_do_not_depend_on_batch_size_or_order():
    model, random = toy_model(), torch.Generator().manual_seed(3)
    clips = [torch.randn(n, 128, generator=random) for n in (80, 3, 191, 55, 80, 21)]
    one = trainer.logits_of(model, clips, 1, torch.device("cpu"))
    assert (trainer.logits_of(model, clips, 4, torch.device("cpu")) - one).abs().max() < 1e-4
    assert (trainer.logits_of(model, clips[::-1], 4, torch.device("cpu")).flip(0) - one).abs().max() < 1e-4


def test_mixed_precision_reaches_the_model_and_can_be_switched_off(constants, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    constants(DEVICE="cpu", AMP="auto", gains_by_bfloat16=lambda: True)
    device, amp = trainer.pick_device()
    assert amp is torch.bfloat16
    seen, model = [], toy_model()
    model.blocks[1].conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for number_type in (amp, None):
        with torch.autocast(device.type, number_type, enabled=number_type is not None):
            model(torch.randn(2, 20, 128), torch.tensor([20, 20]))
    assert seen == [torch.bfloat16, torch.float32]
    constants(AMP="off")
    assert trainer.pick_device()[1] is None
    constants(AMP="auto", gains_by_bfloat16=lambda: False)
    assert trainer.pick_device()[1] is None
    constants(gains_by_bfloat16=lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert trainer.pick_device()[1] is None


@pytest.mark.parametrize("seconds, gains", [({torch.float32: 0.02, torch.bfloat16: 0.01}, True), ({torch.float32: 0.01, torch.bfloat16: 0.02}, False)])
def test_mixed_precision_only_where_it_is_quicker(monkeypatch, seconds, gains):
    """Intel's Sapphire Rapids without AMX has bfloat16, at half the speed of float32."""
    clock = [0.0]

    def multiply(x, _):
        clock[0] += seconds[x.dtype]

    monkeypatch.setattr(trainer.F, "linear", multiply)
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: clock[0])
    assert trainer.gains_by_bfloat16() is gains


# ---- the loop


@pytest.fixture
def stubbed(constants, monkeypatch, tmp_path):
    """train() on validation accuracies given beforehand; returns the run."""
    constants(EPOCHS=30, PATIENCE=4, LR_PATIENCE=1, LR_FACTOR=0.5, WARMUP_EPOCHS=0, LEARNING_RATE=0.1, BATCH_SIZE=10)

    def go(accuracies):
        queue, label = iter(accuracies), torch.arange(100) % 6
        monkeypatch.setattr(trainer, "train_epoch", lambda *_: (1.0, 0.5))
        run = trainer.Run.__new__(trainer.Run)
        run.model = nn.Linear(2, 2)
        run.average = torch.optim.swa_utils.AveragedModel(run.model)
        run.optimizer = torch.optim.AdamW(run.model.parameters(), trainer.LEARNING_RATE)
        run.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(run.optimizer, "max", factor=trainer.LR_FACTOR, patience=trainer.LR_PATIENCE)
        run.parts, run.output_dir, run.sides = {"optimizer": run.optimizer}, tmp_path, {"train": range(100)}
        run.history, run.best_epoch, run.best_accuracy, run.amp = [], 0, -1.0, None
        run.settings, run.model_config, run.mel_config, run.normalization = {}, {}, {}, {}
        run.clips = pd.DataFrame({"actor": ["a"], "split": ["train"]})

        def logits(side, model):
            right = round(100 * next(queue))
            answer = torch.where(torch.arange(100) < right, label, (label + 1) % 6)
            return nn.functional.one_hot(answer, 6).float(), label

        run.logits = logits
        trainer.train(run)
        return run

    return go


def test_early_stopping_and_best_model(stubbed, tmp_path):
    run = stubbed([0.2, 0.5, 0.4, 0.6, 0.55, 0.6, 0.5, 0.59, 0.55, 0.58, 0.9])
    assert len(run.history) == 10 and run.best_epoch == 6  # 4 epochs after the best, of equal ones the last
    best = torch.load(tmp_path / "best_model.pth", weights_only=True)
    assert best["epoch"] == 6 and best["metrics"]["val_accuracy"] == pytest.approx(0.6)


def test_plateau_lowers_the_learning_rate(stubbed):
    run = stubbed([0.5, 0.4, 0.4, 0.4, 0.4])
    assert [row["learning_rate"] for row in run.history] == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.05])


def test_learning_rate_decays_after_so_many_epochs(stubbed, constants):
    constants(DECAY_AFTER=2, LR_DECAY=0.5)
    run = stubbed([0.1, 0.2, 0.3, 0.4, 0.5, 0.4, 0.4, 0.4, 0.4])
    assert [row["learning_rate"] for row in run.history][:5] == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.025])


def test_varied_clips_move_by_bands_and_by_a_smooth_curve(constants):
    constants(MEL_SHIFT=3, TONE=0.0, GAIN=0.0, NARROW_BAND=0.0)
    torch.manual_seed(0)
    mean, std = torch.full((32,), -60.0), torch.full((32,), 4.0)
    lengths = torch.tensor([9, 5] * 20)
    x = torch.arange(32.0).expand(40, 9, 32) * trainer.inside(lengths, 9)[:, :, None]
    moved = trainer.vary(x, lengths, mean, std)[:, 0, 3:-3] - x[:, 0, 3:-3]
    assert set(moved.unique().tolist()) == {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0} and (moved == moved[:, :1]).all()
    constants(MEL_SHIFT=0, TONE=2.0)
    lengths = torch.tensor([9, 5] * 500)
    varied = trainer.vary(torch.zeros(1000, 9, 32), lengths, mean, std)
    assert (varied[1::2, 5:] == 0).all() and torch.equal(varied[:, 0], varied[:, 4])
    assert varied[:, 0, 0].std() == pytest.approx(0.5, abs=0.05)  # 2 dB where a unit is 4
    assert varied[:, 0].diff(dim=1).abs().max() < 0.5


def test_varied_clips_are_louder_or_lose_outer_bands(constants):
    constants(MEL_SHIFT=0, TONE=0.0, GAIN=3.0, NARROW_BAND=0.0)
    torch.manual_seed(0)
    mean, std = torch.full((50,), -60.0), torch.full((50,), 4.0)
    x, lengths = torch.zeros(1000, 9, 50), torch.tensor([9, 5] * 500)
    louder = trainer.vary(x, lengths, mean, std)
    assert (louder[:, :5] == louder[:, :1, :1]).all() and (louder[1::2, 5:] == 0).all()
    assert louder[:, 0, 0].std() == pytest.approx(0.75, abs=0.05)  # 3 dB where a unit is 4
    constants(GAIN=0.0, NARROW_BAND=0.3)
    varied = trainer.vary(x, lengths, mean, std)
    assert set(varied[:, :5].unique().tolist()) == {0.0, -10.0}  # silence is -100 dB
    lost = varied[:, 0] < 0
    assert lost[:, -1].float().mean() == pytest.approx(0.3, abs=0.05) and (lost[:, 5:35] == 0).all()
    assert (lost[:, 35:-1] <= lost[:, 36:]).all() and lost[:, 37].any() and lost[:, 0].any()


def test_warped_clips_are_whole_and_at_another_speed(constants):
    constants(MAX_WIDTH=90)
    data = trainer.Spectrograms.__new__(trainer.Spectrograms)
    data.frames = torch.arange(1.0, 181.0)[:, None].expand(180, 3)
    data.start, data.length, data.label = torch.tensor([0, 100]), torch.tensor([100, 80]), torch.tensor([0, 1])
    torch.manual_seed(0)
    seen = set()
    for _ in range(50):
        x, lengths, label = data.batch(torch.tensor([1, 0, 1]), torch.empty(3).uniform_(0.82, 1.22), torch.device("cpu"))
        assert x.shape[1] % 8 == 0 and lengths.max() <= 90 and label.tolist() == [1, 0, 1]
        seen |= set(lengths[[0, 2]].tolist())
        for clip, n in zip(x[[0, 2], :, 0], lengths[[0, 2]], strict=True):
            assert (clip[n:] == 0).all() and clip[0] == 101 and (clip[:n].diff() >= 0).all()
            assert n == 90 or 178 <= clip[n - 1] <= 180
    assert min(seen) < 70 and max(seen) == 90 and len(seen) > 10


def test_averaged_weights_are_a_moving_average(constants):
    constants(AVERAGING=0.5)
    model = nn.BatchNorm1d(1)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=trainer.average_weights, use_buffers=True)
    expected = None
    for step, value in enumerate((1.0, 2.0, 5.0, 3.0, 7.0, 8.0, 9.0, 4.0, 6.0, 5.0, 2.0, 1.0)):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(10 * value)
        average.update_parameters(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = value if step == 0 else decay * expected + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(expected) and average.module.running_mean.item() == pytest.approx(10 * expected)


def history(folder):
    with open(folder / "history.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "train_clips_per_s")} for row in csv.DictReader(file)]


def leaves(value, at=""):
    """Everything in a checkpoint but times: place and value."""
    if isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in ("seconds", "train_clips_per_s", "OUTPUT_DIR", "EPOCHS", "RESUME"):
                yield from leaves(part, f"{at}/{key}")
    else:
        yield at, value


def test_resumed_run_is_the_unbroken_run(mels, trained, tmp_path):
    train(tmp_path, mels, EPOCHS=3)
    text = train(tmp_path, mels, RESUME=True)
    assert "after epoch 3" in text
    assert history(tmp_path / "output") == history(trained)
    for name in ("last_checkpoint.pth", "best_model.pth"):
        ours, theirs = (dict(leaves(torch.load(folder / name, weights_only=True))) for folder in (tmp_path / "output", trained))
        assert ours.keys() == theirs.keys()
        assert not [at for at in ours if not (torch.equal(ours[at], theirs[at]) if torch.is_tensor(ours[at]) else ours[at] == theirs[at])]
    assert {"model", "average", "optimizer", "scheduler", "best_accuracy", "best_epoch"} <= torch.load(trained / "last_checkpoint.pth", weights_only=True).keys()
    text = train(tmp_path, mels, RESUME=True, DROPOUT=0.5, code=1)
    assert "DROPOUT was 0.3, now 0.5" in text
    shutil.copytree(mels, tmp_path / "mels")
    for path in (tmp_path / "mels").rglob("*.npy"):
        np.save(path, np.load(path) + 1)
    assert "DATA_SHA256 was" in train(tmp_path, tmp_path / "mels", RESUME=True, EPOCHS=3, code=1)


def test_resume_without_checkpoint_says_so_and_damage_is_told(mels, tmp_path):
    assert "starting with epoch 1" in train(tmp_path, mels, RESUME=True, EPOCHS=1)
    (tmp_path / "output" / "last_checkpoint.pth").write_bytes(b"junk")
    assert "no checkpoint of this script" in train(tmp_path, mels, RESUME=True, code=1)
    best = (tmp_path / "output" / "best_model.pth").read_bytes()
    earlier = {path.name for path in (tmp_path / "output").iterdir()}
    assert "earlier training's files are kept in" in train(tmp_path, mels, EPOCHS=1, LEARNING_RATE=1e6, GRADIENT_CLIP=1e30, code=1)
    (kept,) = (tmp_path / "output").glob("earlier_*")
    assert (kept / "best_model.pth").read_bytes() == best and {path.name for path in kept.iterdir()} == earlier
    assert not (tmp_path / "output/metrics.json").exists(), "an earlier training's figures stand beside the new split"
    train(tmp_path, mels, EPOCHS=1)
    (tmp_path / "output" / "best_model.pth").unlink()
    assert "best_model.pth is gone" in train(tmp_path, mels, RESUME=True, code=1)


def test_full_disk_is_a_sentence(mels, tmp_path):
    train(tmp_path, mels, EPOCHS=1)
    size = (tmp_path / "output" / "best_model.pth").stat().st_size
    (tmp_path / "output" / "last_checkpoint.pth").unlink()
    limit = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2},) * 2); runpy.run_path('cremad_custom2.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", limit], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "is the disk full?" in done.stderr and "best_model.pth" in done.stderr and "Traceback" not in done.stderr


def test_not_a_number_stops_with_a_sentence(mels, tmp_path):
    text = train(tmp_path, mels, LEARNING_RATE=10.0, GRADIENT_CLIP=1e30, WARMUP_EPOCHS=0, EPOCHS=30, PATIENCE=30, AMP="off", LABEL_SMOOTHING=0.0, WEIGHT_DECAY=10.0, code=1)
    assert "loss is" in text and "lower LEARNING_RATE" in text


def test_outputs_are_those_of_the_contract(trained):
    assert {p.name for p in trained.iterdir()} == {"best_model.pth", "last_checkpoint.pth", "history.csv", "training_history.png", "confusion_matrix.png",
                                                   "classification_report.txt", "metrics.json", "test_predictions.csv", "split.csv", "run.json", "test_report.png"}  # fmt: skip
    header = lambda name: (trained / name).read_text().splitlines()[0]  # noqa: E731
    assert header("history.csv") == "epoch,train_loss,train_accuracy,val_loss,val_accuracy,val_uar,learning_rate,seconds,train_clips_per_s"
    assert header("test_predictions.csv") == "stem,actor,true_class,predicted_class,Angry,Disgust,Fear,Happy,Neutral,Sad"
    assert header("split.csv") == "stem,actor,emotion,split"
    metrics, rows = json.loads((trained / "metrics.json").read_text()), pd.read_csv(trained / "test_predictions.csv")
    assert metrics["test"]["accuracy"] == pytest.approx((rows.true_class == rows.predicted_class).mean())
    assert metrics["test"]["uar"] == pytest.approx((rows.true_class == rows.predicted_class).groupby(rows.true_class).mean().mean())
    assert metrics["test"].keys() == metrics["val"].keys() == {"accuracy", "uar", "macro_f1", "ece", "ece_before", "n_clips", "n_actors", "uar_ci95"}
    assert metrics["test"]["n_actors"] == 1 and metrics["test"]["uar_ci95"] is None
    assert np.allclose(rows[list(trainer.EMOTIONS.values())].sum(axis=1), 1, atol=1e-5)
    checkpoint = torch.load(trained / "best_model.pth", weights_only=True)
    assert {"format_version", "model_state_dict", "model_config", "mel_config", "normalization", "max_width", "classes", "temperature", "epoch", "metrics", "training_config", "versions"} == checkpoint.keys()


def test_what_is_saved_is_what_was_validated(mels, tmp_path):
    """The averaged weights, in evaluation mode, on the validation actors' originals; the temperature is theirs."""
    train(tmp_path, mels, EPOCHS=1, WARMUP_EPOCHS=2)
    best, last = (torch.load(tmp_path / "output" / name, weights_only=True) for name in ("best_model.pth", "last_checkpoint.pth"))
    assert all(torch.equal(value, last["average"][f"module.{name}"]) for name, value in best["model_state_dict"].items())
    assert not all(torch.equal(value, last["model"][name]) for name, value in best["model_state_dict"].items())
    model, _ = trainer.read_best(tmp_path / "output/best_model.pth", torch.device("cpu"))
    split = pd.read_csv(tmp_path / "output/split.csv")
    split = split[split.split == "val"]
    mean, std = (torch.tensor(best["normalization"][name]) for name in ("mean", "std"))
    clips = [(torch.from_numpy(np.load(mels / emotion / f"{stem}_original.npy").T) - mean) / std for stem, emotion in zip(split.stem, split.emotion, strict=True)]
    label = torch.tensor([list(trainer.EMOTIONS).index(code) for code in split.emotion])
    logits = trainer.logits_of(model, clips, 4, torch.device("cpu"))
    (row,) = history(tmp_path / "output")
    assert float(row["val_loss"]) == pytest.approx(float(nn.functional.cross_entropy(logits, label)), rel=1e-5)
    assert best["temperature"] == pytest.approx(trainer.fit_temperature(logits, label))
    assert float(row["learning_rate"]) == pytest.approx(TOY["LEARNING_RATE"] / 2)  # at the end of the first of two epochs of warm-up


def test_figures_of_a_side():
    """Where emotions differ in frequency, against scikit-learn; the interval narrows with actors who are alike."""
    random = np.random.default_rng(0)
    label = torch.from_numpy(random.choice(6, 600, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05]))
    answer = torch.where(torch.from_numpy(random.random(600)) < 0.2 + 0.1 * label, label, (label + 1) % 6)
    logits = 3.0 * nn.functional.one_hot(answer, 6)
    actors = np.repeat([f"a{i}" for i in range(30)], 20)
    found = trainer.measure(logits, label, actors, 2.0)
    assert found["accuracy"] == pytest.approx(float((answer == label).float().mean()))
    assert found["uar"] == pytest.approx(recall_score(label, answer, average="macro")) and abs(found["uar"] - found["accuracy"]) > 0.02
    assert found["macro_f1"] == pytest.approx(f1_score(label, answer, average="macro"))
    assert found["ece"] == pytest.approx(trainer.calibration_error((logits / 2).softmax(1), label)) != found["ece_before"]
    low, high = found["uar_ci95"]
    assert low < found["uar"] < high and 0.03 < high - low < 0.2
    bad = np.isin(actors, [f"a{i}" for i in range(15)])
    low, high = trainer.uar_interval(label, torch.where(torch.from_numpy(bad), label, (label + 1) % 6), actors)
    assert low < 0.4 and high > 0.6  # people who differ widen it


def test_confusion_matrix_has_a_row_for_each_true_class(monkeypatch, tmp_path):
    import seaborn

    seen, heatmap = [], seaborn.heatmap
    monkeypatch.setattr(seaborn, "heatmap", lambda percent, **looks: seen.append((percent, looks["annot"])) or heatmap(percent, **looks))
    trainer.plot_confusion(tmp_path / "a.png", ["a", "a", "b", "b"], ["a", "b", "b", "b"], ["a", "b"], "title")
    assert seen[0][0].tolist() == [[50, 50], [0, 100]] and seen[0][1] == [["1\n50 %", "1\n50 %"], ["0\n0 %", "2\n100 %"]]


def test_calibration_error_and_temperature():
    label = torch.tensor([0] * 6 + [1] * 4)
    sure = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
    assert trainer.calibration_error(sure, label) == pytest.approx(0.3)
    logits = torch.tensor([[0.6, 0.4]]).log().repeat(10, 1)
    assert trainer.fit_temperature(5 * logits, label) == pytest.approx(5, rel=0.02)


def test_hidden_parts_are_within_the_clip(constants):
    constants(TIME_MASK=8, MEL_MASK=4)
    torch.manual_seed(0)
    lengths = torch.tensor([40, 6] * 100)
    x = torch.ones(200, 40, 128) * trainer.inside(lengths, 40)[:, :, None]
    hidden = trainer.hide_parts(x.clone(), lengths)
    rows = (hidden[::2] == 0).all(2).sum(1)
    assert rows.max() == 8 and rows.min() == 0
    assert (hidden[1::2, :6] == 0).all(2).sum(1).max() == 3  # at most half of a short clip
    assert (hidden[::2] == 0).all(1).sum(1).max() == 4


# ---- bad input


@pytest.fixture
def refused(constants, monkeypatch, tmp_path, capfd):
    """What main() says when it refuses these constants: in this process, because PyTorch's import takes seconds."""

    def go(**values):
        constants(**TOY | {"OUTPUT_DIR": str(tmp_path / "output")} | values)
        monkeypatch.setattr(sys, "argv", ["cremad_custom2.py"])
        with pytest.raises(SystemExit) as end:
            trainer.main()
        assert isinstance(end.value.code, str), end.value.code  # Python prints it and exits with 1
        return end.value.code

    return go


@pytest.mark.parametrize("name, value, word", [("EPOCHS", "many", "whole number"), ("SEED", 10**15, "to 4294967295"), ("BATCH_SIZE", 1, "BATCH_SIZE = 1"), ("DROPOUT", 1.5, "DROPOUT = 1.5"), ("AMP", "fp8", "AMP"), ("DEVICE", "toaster", "toaster"),
                                               ("SPLIT", "by mood", "by mood"), ("MEL_DIR", "nowhere", "no folder"), ("RESUME", 1, "True or False"), ("CHANNELS", (1, 2), "four"), ("STRIDES", 2, "four pairs"), ("HEADS", 5, "divisor"),
                                               ("BATCH_SIZE", 5000, "lower BATCH_SIZE")])  # fmt: skip
def test_wrong_constants_are_a_sentence(mels, tmp_path, refused, name, value, word):
    assert word in refused(**{"MEL_DIR": str(mels), name: value})
    assert not list(tmp_path.glob("output/*.pth"))


def test_a_device_that_cannot_compute_is_a_sentence(mels, refused, monkeypatch):
    def too_old(device):
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(trainer, "compute_on", too_old)
    assert 'no kernel image is available): take "cpu"' in refused(MEL_DIR=str(mels))


def test_an_editor_without_a_terminal(refused, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as IDLE's and a notebook's, it cannot be reconfigured
    assert "is no folder" in refused(MEL_DIR="nowhere")


def test_wrong_spectrogram_folders_are_a_sentence(corpus, mels, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "mel_config.json" in train(tmp_path / "run", tmp_path / "empty", code=1)
    shutil.copy(mels / "mel_config.json", tmp_path / "empty")
    assert "holds no EMO/*.npy" in refused(MEL_DIR=str(tmp_path / "empty"))
    (tmp_path / "two").mkdir()
    for path in (p for p in corpus.iterdir() if p.name < "1003"):
        shutil.copy(path, tmp_path / "two")
    generate(tmp_path / "two", tmp_path / "two_mels")
    assert "at least three" in refused(MEL_DIR=str(tmp_path / "two_mels"))


@pytest.mark.parametrize("damage, word", [(lambda p: p.write_bytes(p.read_bytes()[:-100]), "no whole|not a whole"), (lambda p: p.write_bytes(b""), "not a whole"), (lambda p: np.save(p, np.array([{}]), allow_pickle=True), "not a whole"),
                                          (lambda p: np.save(p, np.zeros((64, 9), np.float32)), "64, 9"), (lambda p: np.save(p, np.full((128, 9), np.nan, np.float32)), "not finite"),
                                          (lambda p: p.rename(p.with_name("1001_DFA_ANG_X0.npy")), "variant")])  # fmt: skip
def test_damaged_spectrograms_are_named(mels, tmp_path, refused, damage, word):
    shutil.copytree(mels, tmp_path / "mels")
    path = sorted((tmp_path / "mels").glob("ANG/*_original.npy"))[0]
    damage(path)
    text = refused(MEL_DIR=str(tmp_path / "mels"))
    assert re.search(word, text) and path.name[:10] in text


# ---- torchrun


def torchrun(script, code=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    return done.stdout + done.stderr


def test_two_processes_train_as_one_and_resume(mels, tmp_path):
    def script(name, **constants):
        return edited_trainer(tmp_path / name, **TOY | {"MEL_DIR": str(mels), "OUTPUT_DIR": str(tmp_path / name / "output"), "BATCH_SIZE": 8, "AMP": "off", "EPOCHS": 2} | constants)

    whole = script("whole")
    code = whole.read_text()
    whole.write_text(code.replace("    train(run)\n", '    train(run)\n    torch.save(list(run.model.parameters()), f"rank{RANK}.pth")\n'))
    text = torchrun(whole)
    whole.write_text(code)
    ours, theirs = (torch.load(tmp_path / f"whole/rank{rank}.pth", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True)), "the processes' weights went apart"
    assert text.count("epoch   1/2") == 1, "one process speaks"
    rows = history(tmp_path / "whole/output")
    metrics = json.loads((tmp_path / "whole/output/metrics.json").read_text())
    best = rows[metrics["best_epoch"] - 1]
    assert float(rows[0]["learning_rate"]) == pytest.approx(TOY["LEARNING_RATE"] * 2**0.5)
    assert len(rows) == 2 and float(best["val_accuracy"]) == pytest.approx(metrics["val"]["accuracy"])  # read back by one process
    torchrun(script("cut", EPOCHS=1))
    torchrun(script("cut", RESUME=True))
    assert history(tmp_path / "cut/output") == rows
    text = run(script("cut", RESUME=True, EPOCHS=3), code=1)
    assert "PROCESSES was 2, now 1" in text
    text = torchrun(script("nan", LEARNING_RATE=1e6, GRADIENT_CLIP=1e30, WARMUP_EPOCHS=0, EPOCHS=50, PATIENCE=50), code=1)
    assert "loss is" in text


def test_processes_share_one_draw(constants):
    """Both ranks' clips together are the draw of a batch twice the size, and each rank's have like lengths."""
    constants(BATCH_SIZE=8, PROCESSES=2)
    data = trainer.Spectrograms.__new__(trainer.Spectrograms)
    data.label, data.length = torch.arange(96) % 6, torch.arange(96) + 10
    batches, _ = trainer.draw_epoch(data, torch.arange(96), torch.Generator().manual_seed(0))
    assert batches.shape == (6, 16)
    shares = [batches[:, rank::2] for rank in (0, 1)]
    assert torch.equal(torch.cat(shares, 1).sort(1).values, batches.sort(1).values)
    assert (data.length[shares[0]].float().mean(1) - data.length[shares[1]].float().mean(1)).abs().max() < 8


def test_processes_vary_their_clips_each_in_its_own_way(constants, monkeypatch):
    """A CPU's generator takes the lowest 32 bits of a seed."""
    seeds, shares, run = set(), [], types.SimpleNamespace(data=None, sides={"train": None}, device="cpu", normalization={"mean": [0.0], "std": [1.0]}, model=nn.Linear(1, 1))
    monkeypatch.setattr(trainer, "draw_epoch", lambda *_: (torch.arange(6)[None], torch.zeros(1, 6)))
    monkeypatch.setattr(trainer, "tqdm", lambda own, **_: shares.append(own[0][0].tolist()) or seeds.add(torch.initial_seed() % 2**32) or 1 / 0)
    for rank, epoch in ((0, 1), (1, 1), (2, 1), (0, 2), (1, 2)):
        constants(RANK=rank, PROCESSES=3)
        with pytest.raises(ZeroDivisionError):
            trainer.train_epoch(run, epoch)
    assert len(seeds) == 5 and shares[:3] == [[0, 3], [1, 4], [2, 5]]


def test_processes_that_differ_end_together(mels, tmp_path):
    script = edited_trainer(tmp_path, **TOY | {"MEL_DIR": str(mels), "OUTPUT_DIR": str(tmp_path / "output"), "BATCH_SIZE": 8})
    script.write_text(script.read_text().replace("\nDROPOUT = 0.3", '\nDROPOUT = 0.3 - 0.1 * int(os.environ["RANK"])'))
    assert torchrun(script, code=1).count("The processes differ in their constants") == 2


# ---- reports


def test_report_tells_confidence_and_the_worst_mistakes(trained):
    probabilities = torch.tensor([[0.9, 0.1, 0, 0, 0, 0], [0.8, 0.2, 0, 0, 0, 0], [0.05, 0.95, 0, 0, 0, 0], [0.7, 0.3, 0, 0, 0, 0]])
    label = torch.tensor([0, 1, 0, 2])
    names = list(trainer.EMOTIONS.values())
    table = pd.DataFrame({"stem": list("abcd"), "true_class": [names[i] for i in label], "predicted_class": [names[i] for i in probabilities.argmax(1)]})
    worst = trainer.worst_mistakes(table.join(pd.DataFrame(probabilities.numpy(), columns=names)), n=2)
    assert [(w["stem"], w["true_class"], w["predicted_class"]) for w in worst] == [("c", "Angry", "Disgust"), ("b", "Disgust", "Angry")]
    assert worst[0]["confidence"] == pytest.approx(0.95)
    bins = trainer.reliability(probabilities, label, 2)
    assert bins.to_numpy().tolist() == [pytest.approx([(0.9 + 0.8 + 0.95 + 0.7) / 4, 0.25, 1.0])]
    metrics, rows = json.loads((trained / "metrics.json").read_text()), pd.read_csv(trained / "test_predictions.csv").set_index("stem")
    for mistake in metrics["most_confident_mistakes"]:
        row = rows.loc[mistake["stem"]]
        assert row.true_class == mistake["true_class"] != mistake["predicted_class"] == row.predicted_class
        assert row[row.predicted_class] == pytest.approx(mistake["confidence"], abs=1e-6)
    record = json.loads((trained / "run.json").read_text())
    assert record["constants"]["SEED"] == 42 and len(record["constants"]["SPLIT_SHA256"]) == 64 and record["versions"]["torch"].startswith("2.13") and record["seconds"] > 0


def test_more_spectrograms_than_memory_holds(mels, constants, monkeypatch, tmp_path):
    """Past half of the memory they stand in a nameless file: the same numbers, and no file left."""
    constants(OUTPUT_DIR=str(tmp_path))
    clips = trainer.list_clips(mels)
    inside, seen = trainer.Spectrograms(clips, 128), []
    monkeypatch.setattr(trainer.os, "sysconf", lambda name: 1000)
    memmap = np.memmap
    monkeypatch.setattr(trainer.np, "memmap", lambda *a, **k: seen.append(1) or memmap(*a, **k))
    outside = trainer.Spectrograms(clips, 128)
    train_side = torch.arange(100)
    assert inside.normalize(train_side) == outside.normalize(train_side) and torch.equal(inside.frames, outside.frames)
    assert seen and not list(tmp_path.iterdir())


def test_report_of_odd_names(tmp_path):
    """Actors whose names are no UTF-8 or look like formulas, no intensities in the names."""
    path = tmp_path / "report.png"
    names = list(trainer.EMOTIONS.values())
    table = pd.DataFrame({"stem": ["a_b_ANG"] * 6, "actor": ["\udcff", "$a^$", "${$", "$%$", "e", "f"], "true_class": names, "predicted_class": names})
    trainer.plot_report(path, table, torch.eye(6), torch.arange(6), 1.0)
    assert path.stat().st_size > 10_000


def test_what_makes_figures_worth_less_is_told(mels, tmp_path):
    stems = sorted(path.stem.removesuffix("_original") for path in mels.glob("*/*_original.npy"))
    sides = {"1001": "val", "1002": "test"}
    rows = [f"{stem},{sides.get(stem[:4], 'train')}\n" for stem in stems if "_SAD_" not in stem]
    (tmp_path / "split.csv").write_text("stem,split\n" + "".join(rows))
    text = train(tmp_path, mels, SPLIT=str(tmp_path / "split.csv"), EPOCHS=1)
    for words in ("no clip of SAD to train", "1 actor(s) to test", "step(s) of BATCH_SIZE 16: lower it"):
        assert words in text
