"""No voice that is tested trains: the split, and what held-out clips can change (nothing)."""

import csv
import shutil
import unicodedata

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TOY, noise_floor, read_table, train
from hypothesis import given, settings
from hypothesis import strategies as st

import cremad_custom2 as trainer

CODES = list(trainer.EMOTIONS)
VARIANTS = ("original", "pitch_up", "noise_low")
# One dtype wherever these run: whether bfloat16 is faster depends on what else the machine does.
PLAIN = TOY | {"AMP": "off", "OTHER_FLOOR": 0.4, "AUTOMATIC_GAIN": 0.2}
MEL = {"sample_rate": 16000, "hop_length": 512, "n_mels": 128}


def no_pictures(figure, path, dpi=200):
    """In place of save_figure: a second less in each training."""


def make_table(actors, emotions_of) -> pd.DataFrame:
    """Clips as list_clips finds them: each actor's emotions, each clip in three variants."""
    rows = []
    for actor in actors:
        for i, code in enumerate(emotions_of(actor)):
            stem = f"{actor}_S{i}_{code}_XX"
            rows += [("", stem, variant, actor, code) for variant in VARIANTS]
    return pd.DataFrame(rows, columns=["path", "stem", "variant", "actor", "emotion"])


def names(n_actors):
    """Actors' names: 1001 and on."""
    return [str(1001 + i) for i in range(n_actors)]


@pytest.fixture
def constants(monkeypatch):
    """Sets the trainer's constants for one test."""

    def set_constants(**values):
        for name, value in values.items():
            monkeypatch.setattr(trainer, name, value)

    return set_constants


# --------------------------------------------------------------------------------------
# The split


@settings(max_examples=40, deadline=None)
@given(
    n_actors=st.integers(3, 40),
    n_clips=st.integers(1, 12),
    seed=st.integers(0, 1000),
    by=st.sampled_from(["actor", "clip"]),
)
def test_no_voice_is_in_two_parts_and_no_copy_outside_training(n_actors, n_clips, seed, by):
    random = np.random.default_rng(seed)
    if n_actors < 4:
        n_clips += 4  # a split by clip needs some
    table = make_table(names(n_actors), lambda actor: random.choice(CODES, n_clips))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SPLIT": by, "SEED": seed, "BATCH_SIZE": 1}.items():
            patch.setattr(trainer, name, value)
        split = trainer.assign_split(table)
    assert set(split.split) == {"train", "val", "test"}
    assert (split[split.split != "train"].variant == "original").all()
    assert split.groupby("stem").split.nunique().max() == 1
    if by == "actor":
        assert split.groupby("actor").split.nunique().max() == 1
    assert set(split[split.split == "train"].variant) == set(VARIANTS)
    assert set(split.stem) == set(table.stem), "a clip got lost"


UNEVEN = [(1001 + a, CODES[(a * a + i) % 6]) for a in range(12) for i in range(4 + a % 5)]
EVEN = [(1001 + a, code) for a in range(12) for code in CODES]  # of equal orders the first counts


@pytest.mark.parametrize(
    "rows, seed, val, test",
    [
        (UNEVEN, 0, {"1004", "1009"}, {"1003", "1010"}),
        (UNEVEN, 7, {"1008", "1009"}, {"1005", "1007"}),
        (UNEVEN, 42, {"1003", "1010"}, {"1005", "1007"}),
        (EVEN, 0, {"1005", "1008"}, {"1003", "1010"}),
        (EVEN, 42, {"1007", "1010"}, {"1001", "1008"}),
    ],
)
def test_a_seed_puts_the_same_actors_in_the_same_parts_as_ever(rows, seed, val, test):
    """As before the rebuild: figures of earlier trainings stay comparable."""
    actors = pd.Series([str(actor) for actor, _ in rows])
    part = trainer.split_evenly(actors, pd.Series([code for _, code in rows]), seed)
    assert set(actors[part == "val"]) == val
    assert set(actors[part == "test"]) == test
    assert set(actors[part == "train"]) == set(actors) - val - test


@pytest.mark.parametrize("seed", range(8))
def test_the_split_is_as_even_as_actors_allow(constants, seed):
    """Half of twenty actors are always angry, half always sad.

    A single draw of three of them is of one kind in every fifth.
    """
    constants(SPLIT="actor", SEED=seed)
    table = make_table(names(20), lambda actor: ["ANG" if int(actor) % 2 else "SAD"] * 12)
    split = trainer.assign_split(table)
    assert (split.groupby("split").emotion.nunique() == 2).all()


def test_the_split_is_70_15_15_and_even_over_emotions(constants):
    constants(SPLIT="actor")
    split = trainer.assign_split(make_table(names(40), lambda a: CODES * 2 + CODES[: int(a) % 6]))
    counts = split.groupby("split").actor.nunique().to_dict()
    assert counts == {"train": 28, "val": 6, "test": 6}
    originals = split[split.variant == "original"]
    shares = pd.crosstab(originals.split, originals.emotion, normalize="index")
    assert (shares.max() - shares.min()).max() < 0.02


def rename_actor(mels, folder, before, after):
    """A copy of a folder of spectrograms in which an actor's stems begin with another name."""
    shutil.copytree(mels, folder)
    for path in sorted(folder.glob(f"*/{before}_*.npy")):
        path.rename(path.with_name(after + path.name.removeprefix(before)))
    return folder


def test_one_voice_in_two_spellings_is_one_actor(mels, constants, tmp_path):
    """macOS writes an accent as a letter of its own: André, composed and decomposed."""
    composed, decomposed = (unicodedata.normalize(form, "André") for form in ("NFC", "NFD"))
    rename_actor(mels, tmp_path / "half", "1001", composed)
    rename_actor(tmp_path / "half", tmp_path / "mels", "1002", decomposed)
    clips = trainer.list_clips(tmp_path / "mels")
    assert sorted(clips.actor.unique()) == [*map(str, range(1003, 1009)), composed]
    assert clips.stem.str.startswith(decomposed).sum() == 18, "a stem is not the file's name"
    for seed in range(5):
        constants(SPLIT="actor", SEED=seed, BATCH_SIZE=1)
        split = trainer.assign_split(clips)
        assert split[split.actor == composed].split.nunique() == 1
    constants(SPLIT="actor", SEED=0)
    case = clips.assign(actor=clips.actor.replace("1003", composed.upper()))
    with pytest.raises(trainer.UserError, match="one voice must not be two"):
        trainer.assign_split(case)


# --------------------------------------------------------------------------------------
# Published splits


def write_split(path, rows):
    """A CSV as SPLIT names it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("stem", "split"), *rows])
    return str(path)


def stems_of(mels):
    """The originals' stems."""
    return sorted(path.stem.removesuffix("_original") for path in mels.rglob("*_original.npy"))


def part_of(stem):
    """A published protocol: two actors test, one validates."""
    parts = {"1001": "test", "=1+1": "test", "1002": "test", "1003": "val"}
    return parts.get(stem.split("_")[0], "train")


def test_a_published_split_is_obeyed(mels, tmp_path):
    named = [(stem, part_of(stem)) for stem in stems_of(mels) if stem < "1008"]
    path = write_split(tmp_path / "split.csv", [*named, ("9999_no_ANG_X", "train")])
    text = train(tmp_path / "run", mels, toy=PLAIN, SPLIT=path, EPOCHS=1, save_figure=no_pictures)
    assert "1 of its 43 stems have no spectrogram; 6 clips" in text
    used = read_table(tmp_path / "run/output/split.csv")
    assert {row["stem"]: row["split"] for row in used} == dict(named)
    tested = {row["stem"] for row in read_table(tmp_path / "run/output/test_predictions.csv")}
    assert tested == {stem for stem, part in named if part == "test"}


def test_stems_that_look_like_formulas_are_harmless_and_read_back(mels, tmp_path):
    """What a training wrote is a published split for the next, formulas and accents and all."""
    folder = rename_actor(mels, tmp_path / "half", "1001", "=1+1")
    folder = rename_actor(folder, tmp_path / "mels", "1005", unicodedata.normalize("NFD", "André"))
    named = [(stem, part_of(stem)) for stem in stems_of(folder)]
    composed = [(unicodedata.normalize("NFC", stem), part) for stem, part in named]
    path = write_split(tmp_path / "split.csv", composed)
    quick = {"EPOCHS": 1, "save_figure": no_pictures, "toy": PLAIN}
    text = train(tmp_path / "first", folder, SPLIT=path, **quick)
    assert "0 of its 48 stems have no spectrogram; 0 clips" in text
    for name, n in (("split.csv", 6), ("test_predictions.csv", 6)):
        rows = read_table(tmp_path / "first/output" / name)
        assert sum(row["stem"].startswith("'=1+1_") for row in rows) == n, name
        assert not [row for row in rows if row["stem"].startswith("=")], name
        assert {"'=1+1"} == {row["actor"] for row in rows if "=1+1" in row["stem"]}, name
    written = tmp_path / "first/output/split.csv"
    text = train(tmp_path / "second", folder, SPLIT=str(written), **quick)
    assert "0 of its 48 stems have no spectrogram; 0 clips" in text
    assert (tmp_path / "second/output/split.csv").read_bytes() == written.read_bytes()
    found = {row["stem"]: row["split"] for row in trainer.read_csv(written)}
    assert found == dict(named)


@pytest.mark.parametrize(
    "rows, word",
    [
        ([("a_b_ANG", "train"), ("a_b_ANG", "test")], "twice"),
        (
            [("André_b_ANG", "train"), (unicodedata.normalize("NFD", "André_b_ANG"), "test")],
            "twice",
        ),
        ([("a_b_ANG", "training")], "'training'"),
        ([], "no clip to train"),
    ],
)
def test_a_split_that_contradicts_itself_is_a_sentence(mels, tmp_path, rows, word):
    path = write_split(tmp_path / "split.csv", rows)
    assert word in train(tmp_path, mels, SPLIT=path, code=1)


# --------------------------------------------------------------------------------------
# What held-out clips can change


def read_history(folder):
    """history.csv but for the times."""
    rows = read_table(folder / "history.csv")
    timed = ("seconds", "train_clips_per_s")
    return [{name: cell for name, cell in row.items() if name not in timed} for row in rows]


def test_augmented_files_of_held_out_actors_change_nothing(mels, tmp_path):
    """To the bit: predictions, history and weights."""
    quick = {"EPOCHS": 2, "save_figure": no_pictures, "toy": PLAIN}
    train(tmp_path / "with", mels, **quick)
    output = tmp_path / "with/output"
    part = {row["stem"]: row["split"] for row in read_table(output / "split.csv")}
    shutil.copytree(mels, tmp_path / "mels")
    clips = trainer.list_clips(tmp_path / "mels")
    removed = clips[(clips.variant != "original") & (clips.stem.map(part) != "train")]
    assert len(removed) == 2 * sum(name != "train" for name in part.values()) > 0
    for path in removed.path:
        path.unlink()
    train(tmp_path / "without", tmp_path / "mels", **quick)
    other = tmp_path / "without/output"
    predictions = (folder / "test_predictions.csv" for folder in (output, other))
    assert next(predictions).read_bytes() == next(predictions).read_bytes()
    assert read_history(other) == read_history(output)
    ours, theirs = (
        torch.load(folder / "best_model.pth", weights_only=True)["model_state_dict"]
        for folder in (output, other)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def flat(model):
    """All weights and running statistics of a model in one tensor."""
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


@pytest.mark.parametrize("by", ["actor", "clip"])
def test_held_out_clips_never_train(mels, constants, by):
    """Neither as examples nor by their statistics: whatever they hold, the weights are equal."""
    constants(**PLAIN | {"SPLIT": by})
    clips = trainer.assign_split(trainer.list_clips(mels))
    found = []
    for spoilt in (False, True):
        data = trainer.Spectrograms(clips, MEL)
        if spoilt:
            for part in ("val", "test"):
                for i in data.indices[part]:
                    data.clip(i).fill_(torch.nan)
            assert data.frames.isnan().any(), "nothing was spoilt"
        state = trainer.TrainState(trainer.model_config(128), torch.device("cpu"), torch.float32)
        loss, _ = trainer.train_epoch(state, data, 1)
        found.append((loss, flat(state.model), flat(state.ema.module)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])


def test_statistics_are_of_the_training_clips_alone(mels, constants):
    """Floor, mean and deviation of each band, and the level, against NumPy on the files."""
    constants(**PLAIN | {"SPLIT": "actor"})
    clips = trainer.assign_split(trainer.list_clips(mels))
    data = trainer.Spectrograms(clips, MEL)
    trained = clips[clips.split == "train"]
    mels = [np.load(path).astype(float) for path in trained.path]
    originals = [m for m, v in zip(mels, trained.variant, strict=True) if v == "original"]
    floors = np.median([noise_floor(mel) for mel in originals], axis=0)
    assert np.allclose(data.floor, floors, atol=1e-3)
    assert data.normalization["floor"] == data.floor
    values = 10 * np.log10(10 ** (np.concatenate(mels, 1) / 10) + 10 ** (floors[:, None] / 10))
    assert np.allclose(data.normalization["mean"], values.mean(1))
    assert np.allclose(data.normalization["std"], values.std(1), atol=1e-3)
    levels = {}
    for path, actor in zip(trained.path, trained.actor, strict=True):
        if path.stem.endswith("_original"):
            power = (10 ** (np.load(path).astype(float) / 10)).mean(0)
            levels.setdefault(actor, []).append(10 * np.log10(np.percentile(power, 95)))
    median = np.median(np.concatenate(list(levels.values())))
    speakers = [np.median(values) for values in levels.values()]
    expected = (median, min(median - 8, *speakers), max(median + 8, *speakers))
    found = [data.level[name] for name in ("median", "low", "high")]
    assert found == pytest.approx(expected, abs=0.01)
