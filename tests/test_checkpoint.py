"""Model files: what the tester and RESUME accept, what they refuse, and what it costs them.

A best_model.pth travels: it may be cut, flipped, of another program, or made to do harm.
"""

import copy
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, classify, noise_floor, read_table, run, train

import cremad_custom2 as trainer
import custom2_tester as tester

CPU = torch.device("cpu")
MB = 2**20


@contextmanager
def at_most(seconds):
    """Raises where the block waits for ever."""

    def stop(*_):
        raise AssertionError("waited in vain")  # a TimeoutError would be an OSError

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


@pytest.fixture
def model_file(trained, tmp_path):
    """A copy of the toy's best_model.pth."""
    return shutil.copy(trained / "best_model.pth", tmp_path / "model.pth")


@pytest.fixture(scope="module")
def checkpoint(trained):
    """What the toy's best_model.pth holds; tests change copies."""
    return torch.load(trained / "best_model.pth", weights_only=True)


@pytest.fixture(scope="module")
def clips():
    """Five normalised spectrograms of noise, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 128, generator=generator) for n in (40, 55, 70, 96, 120)]


def logits_of(path, clips):
    model, _ = tester.load_model(path, CPU)
    return trainer.predict_logits(model, clips, 8, CPU)


def refusal(path):
    """The sentence with which a file is refused."""
    with pytest.raises(tester.UserError) as end:
        tester.load_model(path, CPU)
    text = str(end.value)
    assert path.name in text
    assert len(text) < 1000, "a sentence, not a book"
    return text


def changed(checkpoint, where, value):
    """A copy of a checkpoint with another value at a path of keys: "mel_config.n_mels"."""
    other = copy.deepcopy(checkpoint)
    *parents, last = where.split(".") if isinstance(where, str) else where
    part = other
    for name in parents:
        part = part[name]
    part[last] = value
    return other


# --------------------------------------------------------------------------------------
# Damage


class Bomb:
    """Pickled, it opens a file for writing where it is unpickled."""

    def __reduce__(self):
        return (open, ("exploded", "w"))


DAMAGES = {
    "a text": lambda path: path.write_text("hello"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "cut near the end": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "a pickled bomb": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    "a bomb by torch.save": lambda path: torch.save(Bomb(), path),
    "a bomb in a dict": lambda path: torch.save({"format_version": 2, "epoch": Bomb()}, path),
    "an old format of torch": lambda path: torch.save(
        {"format_version": 2}, path, _use_new_zipfile_serialization=False
    ),
    "a zip of something else": lambda path: zipfile.ZipFile(path, "w").writestr("a", "b"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_and_nothing_in_them_runs(model_file, damage, monkeypatch):
    monkeypatch.chdir(model_file.parent)
    DAMAGES[damage](model_file)
    assert "damaged" in refusal(model_file)
    with pytest.raises(trainer.UserError, match="damaged"):
        trainer.read_checkpoint(model_file)
    assert not (model_file.parent / "exploded").exists()


def test_what_is_no_file_is_refused_at_once(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.pth")
    (tmp_path / "folder.pth").mkdir()
    assert "not a regular file" in refusal(tmp_path / "folder.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "device.pth").symlink_to("/dev/zero")
    with at_most(30):
        assert "not a regular file" in refusal(tmp_path / "pipe.pth")
        assert "not a regular file" in refusal(tmp_path / "device.pth")


@pytest.mark.parametrize("content", [[1], torch.ones(2), "text", None], ids=repr)
def test_what_is_no_dict_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    assert "no checkpoint" in refusal(tmp_path / "model.pth")


def test_a_strangers_checkpoint_on_the_command_line(corpus, tmp_path):
    model = tmp_path / "model.pth"
    model.write_bytes(pickle.dumps(Bomb()))
    options = ("--input_dir", corpus, "--model_path", model, "--output_dir", tmp_path / "out")
    text = run(ROOT / "custom2_tester.py", *options, cwd=tmp_path, code=1)
    assert "damaged" in text and str(model) in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth"]


def test_a_checkpoint_of_the_wrong_version_is_refused_before_any_folder(
    checkpoint, corpus, tmp_path
):
    model = tmp_path / "model.pth"
    torch.save(changed(checkpoint, "format_version", 1), model)
    assert "version 1" in classify(corpus, model, tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------
# Contents


@pytest.mark.parametrize("version", [1, 99, 0, -2])
def test_other_format_versions_are_a_sentence(checkpoint, tmp_path, version):
    path = tmp_path / "model.pth"
    torch.save(changed(checkpoint, "format_version", version), path)
    text = refusal(path)
    assert f"version {version}," in text and "reads 2" in text


@pytest.mark.parametrize(
    "version", [2.0, "2", None, True, torch.tensor(2), torch.ones(3)], ids=lambda v: repr(v)[:12]
)
def test_a_format_version_that_is_no_number_is_refused(checkpoint, tmp_path, version):
    path = tmp_path / "model.pth"
    torch.save(changed(checkpoint, "format_version", version), path)
    assert "version" in refusal(path)


@pytest.mark.parametrize(
    "name",
    [
        "format_version",
        "model_state_dict",
        "model_config",
        "mel_config",
        "normalization",
        "max_width",
        "classes",
        "temperature",
    ],
)
def test_a_checkpoint_that_lacks_a_key_is_told_which(checkpoint, tmp_path, name):
    path = tmp_path / "model.pth"
    torch.save({key: value for key, value in checkpoint.items() if key != name}, path)
    text = refusal(path)
    assert "lacks" in text and name in text


@pytest.mark.parametrize(
    "where",
    [
        "model_config.n_mels",
        "model_config.heads",
        "model_config.strides",
        "mel_config.n_mels",
        "mel_config.fmin",
        "normalization.std",
    ],
)
def test_a_setting_that_is_missing_is_told(checkpoint, tmp_path, where):
    part, name = where.split(".")
    other = copy.deepcopy(checkpoint)
    del other[part][name]
    torch.save(other, tmp_path / "model.pth")
    assert part in refusal(tmp_path / "model.pth")


SIZES = ("model_config.n_mels", "model_config.n_classes", "model_config.hidden")
SIZES += ("model_config.heads", "max_width")
MEL_SIZES = tuple(f"mel_config.{name}" for name in ("sample_rate", "n_fft", "hop_length", "n_mels"))
PARTS = ("model_state_dict", "model_config", "mel_config", "normalization", "classes")


@pytest.mark.parametrize("where", SIZES + MEL_SIZES)
def test_sizes_are_whole_numbers_above_0(checkpoint, tmp_path, where):
    path = tmp_path / "model.pth"
    for value in (True, "128", None, 0, -1, 64.0, math.nan, [128], torch.tensor(128), 2**70):
        torch.save(changed(checkpoint, where, value), path)
        text = refusal(path)
        names = ("size in model_config", where.split(".")[-1])
        assert any(name in text for name in names), (value, text)


@pytest.mark.parametrize("where", PARTS)
def test_parts_are_dicts_and_lists(checkpoint, tmp_path, where):
    path = tmp_path / "model.pth"
    for value in (None, 0, "text", (1, 2), torch.ones(2)):
        torch.save(changed(checkpoint, where, value), path)
        assert where in refusal(path), value


def twins(checkpoint):
    return [checkpoint["classes"][1], *checkpoint["classes"][1:]]


OTHER = {
    "dropout of 1": ("model_config.dropout", lambda c: 1.0, "dropout"),
    "dropout as text": ("model_config.dropout", lambda c: "0", "dropout"),
    "dropout NaN": ("model_config.dropout", lambda c: math.nan, "dropout"),
    "heads that do not divide": ("model_config.heads", lambda c: 5, "heads"),
    "channels as text": ("model_config.channels", lambda c: "8888", "channels"),
    "a channel of 0": ("model_config.channels", lambda c: [8, 0, 16, 16], "channels"),
    "a channel that is True": ("model_config.channels", lambda c: [True] * 4, "channels"),
    "no channels": ("model_config.channels", lambda c: [], "channels"),
    "too few strides": ("model_config.strides", lambda c: [[2, 2]], "strides"),
    "strides of one": ("model_config.strides", lambda c: [[2]] * 4, "strides"),
    "a stride of 0": ("model_config.strides", lambda c: [[0, 2]] * 4, "strides"),
    "an argument too many": ("model_config.colour", lambda c: 1, "model_config"),
    "a mel setting too many": ("mel_config.colour", lambda c: 1, "mel_config"),
    "fmin above fmax": ("mel_config.fmin", lambda c: 8000.0, "fmin"),
    "fmin NaN": ("mel_config.fmin", lambda c: math.nan, "fmin"),
    "fmax as text": ("mel_config.fmax", lambda c: "8000", "fmax"),
    "fmax above half the rate": ("mel_config.fmax", lambda c: 9000.0, "fmax"),
    "an FFT of a minute": ("mel_config.n_fft", lambda c: 10**6, "n_fft"),
    "a hop longer than the FFT": ("mel_config.hop_length", lambda c: 4096, "hop_length"),
    "other mel bands": ("mel_config.n_mels", lambda c: 64, "mel bands"),
    "temperature below 0": ("temperature", lambda c: -1.0, "temperature"),
    "temperature NaN": ("temperature", lambda c: math.nan, "temperature"),
    "temperature infinite": ("temperature", lambda c: math.inf, "temperature"),
    "temperature as text": ("temperature", lambda c: "1", "temperature"),
    "a width of years": ("max_width", lambda c: 10**9, "max_width"),
    "two classes alike": ("classes", twins, "classes"),
    "a class too few": ("classes", lambda c: c["classes"][1:], "classes"),
    "classes as names": ("classes", lambda c: ["Angry"] * 6, "classes"),
    "a class named 5": ("classes", lambda c: [{"code": 5, "name": 5}, *c["classes"][1:]], "class"),
    # float32 makes these 0 or infinite, and the answers NaN
    "a temperature next to 0": ("temperature", lambda c: 1e-300, "temperature"),
    "a deviation next to 0": ("normalization.std", lambda c: [1e-300] * 128, "deviation"),
    "a mean without end": ("normalization.mean", lambda c: [1e300] * 128, "mean"),
    "no mean": ("normalization", lambda c: {"std": c["normalization"]["std"]}, "mean"),
    "a deviation of 0": ("normalization.std", lambda c: [0.0] * 128, "deviation"),
    "a mean that is NaN": ("normalization.mean", lambda c: [math.nan] * 128, "mean"),
    "a mean as text": ("normalization.mean", lambda c: ["0"] * 128, "mean"),
    "means of 64 bands": ("normalization.mean", lambda c: [0.0] * 64, "mean"),
    "an added floor that is None": ("normalization.floor", lambda c: None, "floor"),
    "an added floor without end": ("normalization.floor", lambda c: [-math.inf] * 128, "floor"),
    "a floor that is None": ("floor", lambda c: None, "floor"),
    "a floor without end": ("floor", lambda c: [-math.inf] * 128, "floor"),
    "floors of 64 bands": ("floor", lambda c: [-70.0] * 64, "floor"),
    "a distance without end": ("distance", lambda c: math.inf, "distance"),
    "a distance as text": ("distance", lambda c: "30", "distance"),
    "means as a tensor": ("normalization.mean", lambda c: torch.zeros(128), "mean"),
}


@pytest.mark.parametrize("what", OTHER)
def test_values_that_cannot_be_are_named(checkpoint, tmp_path, what):
    where, value, word = OTHER[what]
    torch.save(changed(checkpoint, where, value(checkpoint)), tmp_path / "model.pth")
    assert word in refusal(tmp_path / "model.pth")


def bias(checkpoint, value):
    """The last layer's bias with its first number replaced."""
    tensor = checkpoint["model_state_dict"]["head.8.bias"].clone()
    tensor[0] = value
    return tensor


WEIGHTS = {
    "NaN": ("head.8.bias", lambda c: bias(c, math.nan), "NaN"),
    "infinite": ("head.8.bias", lambda c: bias(c, -math.inf), "infinite"),
    "of another size": ("head.8.bias", lambda c: torch.zeros(7), "other weights"),
    "a text": ("head.8.bias", lambda c: "zero", "other weights"),
    "one too many": ("more", lambda c: torch.zeros(1), "other weights"),
    "under a number": (5, lambda c: torch.zeros(1), "weights"),
    "on no device": ("head.8.bias", lambda c: torch.zeros(6, device="meta"), ""),
    "sparse": ("head.8.bias", lambda c: torch.zeros(6).to_sparse(), ""),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_that_cannot_be_are_refused(checkpoint, tmp_path, what):
    key, value, word = WEIGHTS[what]
    torch.save(
        changed(checkpoint, ("model_state_dict", key), value(checkpoint)), tmp_path / "m.pth"
    )
    assert word in refusal(tmp_path / "m.pth")


def test_missing_weights_are_refused(checkpoint, tmp_path):
    other = copy.deepcopy(checkpoint)
    other["model_state_dict"].pop("head.0.weight")
    torch.save(other, tmp_path / "model.pth")
    assert "weights" in refusal(tmp_path / "model.pth")


def test_odd_speakers_do_not_end_a_run(checkpoint, tmp_path):
    """What is not needed to classify is not worth a refusal, still less a traceback."""
    for i, speakers in enumerate((None, ["1001"], {"train": [["1001"]], "val": [5, None]})):
        path = tmp_path / f"{i}.pth"
        torch.save(checkpoint | {"speakers": speakers}, path)
        _, loaded = tester.load_model(path, CPU)
        assert not tester.known_speakers(loaded) & {"1001"}


# --------------------------------------------------------------------------------------
# Flipped bits


def same(one, two):
    """Whether two nests of plain values and tensors are equal."""
    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two or (one != one and two != two)


def flip_bits(path, target, n):
    """Copies a file n times, each time with another single bit flipped; yields which byte."""
    data = path.read_bytes()
    draw = random.Random(0)
    for _ in range(n):
        position = draw.randrange(len(data))
        flipped = bytearray(data)
        flipped[position] ^= 1 << draw.randrange(8)
        target.write_bytes(flipped)
        yield position


def test_a_flipped_bit_is_refused_or_changes_nothing(trained, tmp_path, clips):
    path = tmp_path / "model.pth"
    _, whole = tester.load_model(trained / "best_model.pth", CPU)
    expected = logits_of(trained / "best_model.pth", clips[:2])
    n_refused = 0
    for position in flip_bits(trained / "best_model.pth", path, 200):
        try:
            model, found = tester.load_model(path, CPU)
        except tester.UserError:
            n_refused += 1
            continue
        assert same(found, whole), position
        logits = trainer.predict_logits(model, clips[:2], 8, CPU)
        assert torch.equal(logits, expected), position
    assert n_refused > 150


def test_a_flipped_bit_in_resumes_checkpoint_is_refused_or_changes_nothing(trained, tmp_path):
    path = tmp_path / "last_checkpoint.pth"
    whole = trainer.read_checkpoint(trained / "last_checkpoint.pth")
    n_refused = 0
    for position in flip_bits(trained / "last_checkpoint.pth", path, 200):
        try:
            found = trainer.read_checkpoint(path)
        except trainer.UserError:
            n_refused += 1
            continue
        assert same(found, whole), position
    assert n_refused > 150


# --------------------------------------------------------------------------------------
# Small files that take all memory


def nested(depth):
    """[[[...]]]"""
    value = []
    for _ in range(depth):
        value = [value]
    return value


def laughs():
    """A list of ten lists of ten lists ...: 10**8 items in a file of a few bytes."""
    value = ["ha"] * 10
    for _ in range(7):
        value = [value] * 10
    return value


def deep_pickle(path, checkpoint, where, depth):
    """A checkpoint with a deep list in one place: pickle itself cannot write one that deep."""
    mark = "to be replaced"
    torch.save(changed(checkpoint, where, mark), path)
    with zipfile.ZipFile(path) as archive:
        records = {record: archive.read(record) for record in archive.namelist()}
    (name,) = [name for name in records if name.endswith("/data.pkl")]
    marked = b"X" + len(mark).to_bytes(4, "little") + mark.encode()
    before, after = records[name].split(marked, 1)
    if after[:1] == b"q":  # its place in the memo
        after = after[2:]
    deep = b"]" * (depth + 1) + b"a" * depth
    records[name] = before + deep + after
    with zipfile.ZipFile(path, "w") as archive:
        for record, data in records.items():
            archive.writestr(record, data)


def huge_expanded(checkpoint):
    """Weights of 500 MB that are one number each: views with a stride of 0."""
    other = changed(checkpoint, "model_config.hidden", 1500)
    with torch.device("meta"):
        model = tester.EmotionClassifier(**other["model_config"])
    one = torch.zeros(())
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    other["model_state_dict"] = {key: one.expand(shape) for key, shape in shapes.items()}
    return other


def save_changed(*changes):
    """A recipe: saves the checkpoint with these values changed."""

    def save(path, checkpoint):
        for where, value in changes:
            checkpoint = changed(checkpoint, where, value)
        torch.save(checkpoint, path)

    return save


def zip_bomb(path, checkpoint):
    """A whole checkpoint with 400 MB of zeros in it, compressed."""
    torch.save(checkpoint | {"epoch": torch.zeros(400 * MB, dtype=torch.uint8)}, path)
    stored = path.rename(path.with_suffix(".stored"))
    with (
        zipfile.ZipFile(stored) as whole,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        for record in whole.namelist():
            archive.writestr(record, whole.read(record))
    stored.unlink()


def lying_zip_bomb(path, checkpoint):
    """A record of 200 MB whose directory says that it holds 100 bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2, compresslevel=1) as archive:
        archive.writestr("archive/data/0", bytes(200 * MB))
    data = path.read_bytes()
    path.write_bytes(data.replace((200 * MB).to_bytes(4, "little"), (100).to_bytes(4, "little")))


MODEL_BOMBS = {
    "hidden of 8,000": save_changed(("model_config.hidden", 8000)),
    "hidden of 100,000": save_changed(("model_config.hidden", 100_000)),
    "channels of 10,000": save_changed(("model_config.channels", (10**4,) * 4)),
    "channels of 10**12": save_changed(("model_config.channels", (10**12,) * 4)),
    "channels of 2**62": save_changed(("model_config.channels", (2**62,) * 4)),
    "channels of 2**70": save_changed(("model_config.channels", (2**70,) * 4)),
    "100,000 blocks": save_changed(
        ("model_config.channels", [1] * 10**5), ("model_config.strides", [[1, 1]] * 10**5)
    ),
    "strides of 2**40": save_changed(("model_config.strides", ((2**40, 2**40),) * 4)),
    "strides of time without end": save_changed(
        ("model_config.strides", ((2**40, 2), (2, 2), (1, 2), (1, 4)))
    ),
    "classes without end": save_changed(("model_config.n_classes", 10**5)),
    "weights of stride 0": lambda path, c: torch.save(huge_expanded(c), path),
    "a zip bomb": zip_bomb,
    "a zip bomb that lies": lying_zip_bomb,
    "a deep version": lambda path, c: deep_pickle(path, c, "format_version", 10**5),
    "a deep mel setting": lambda path, c: deep_pickle(path, c, "mel_config.n_fft", 10**5),
    "a deep list of classes": lambda path, c: deep_pickle(path, c, "classes", 10**5),
    "laughs for a version": save_changed(("format_version", laughs())),
    "laughs for a mel setting": save_changed(("mel_config.n_fft", laughs())),
    "laughs for channels": save_changed(("model_config.channels", laughs())),
}
# Each in a process of its own, with a limit, so that a bomb ends that and not the machine.
JUDGE = """
import json, os, resource, sys, torch, custom2_tester as tester
def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def judge(path):
    start = megabytes()
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**30,) * 2)
    try:
        tester.load_model(tester.Path(path), torch.device("cpu"))
        end = "taken"
    except BaseException as error:
        end = type(error).__name__
    print(json.dumps([path, end, megabytes() - start]), flush=True)
    os._exit(0)
torch.set_num_threads(1)
tester.load_model(tester.Path(sys.argv[1]), torch.device("cpu"))
for path in sys.argv[2:]:
    if not os.fork():
        judge(path)
    _, status = os.wait()
    if status:
        print(json.dumps([path, f"status {status}", 0]), flush=True)
"""


@pytest.fixture(scope="module")
def verdicts(checkpoint, trained, tmp_path_factory):
    """What loading each bomb ended in, and the megabytes that it took."""
    folder = tmp_path_factory.mktemp("bombs")
    paths = {str(folder / f"{i}.pth"): what for i, what in enumerate(MODEL_BOMBS)}
    for path, what in paths.items():
        MODEL_BOMBS[what](Path(path), checkpoint)
        assert Path(path).stat().st_size < 20 * MB
    command = [sys.executable, "-c", JUDGE, trained / "best_model.pth", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = map(json.loads, done.stdout.splitlines())
    return {paths[path]: (end, megabytes) for path, end, megabytes in answers}


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux tells it")
@pytest.mark.parametrize("what", MODEL_BOMBS)
def test_small_files_that_would_take_all_memory_are_refused(verdicts, what):
    end, megabytes = verdicts[what]
    assert end == "UserError", (end, megabytes)
    assert megabytes < 300


# --------------------------------------------------------------------------------------
# Number types, the split, our own faults, the GPU


def test_float16_files_load_and_compute_as_float32(checkpoint, trained, tmp_path, clips):
    path = tmp_path / "half.pth"
    state = checkpoint["model_state_dict"]
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    torch.save(checkpoint | {"model_state_dict": half}, path)
    assert path.stat().st_size < 0.6 * (trained / "best_model.pth").stat().st_size
    model, _ = tester.load_model(path, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    found = trainer.predict_logits(model, clips, 8, CPU)
    model.load_state_dict({k: v.float() for k, v in half.items()})
    assert torch.equal(found, trainer.predict_logits(model, clips, 8, CPU))
    expected = logits_of(trained / "best_model.pth", clips)
    assert (found - expected).abs().max() < 0.02 * expected.abs().max() + 0.01
    assert (expected.max(0).values - expected.min(0).values).max() > 0.01, "a model of one answer"


def test_the_file_as_it_lies_there_is_not_changed_by_loading(trained, clips):
    before = (trained / "best_model.pth").read_bytes()
    logits_of(trained / "best_model.pth", clips)
    assert (trained / "best_model.pth").read_bytes() == before


def test_a_model_file_tells_no_path_of_the_training_machine(mels, trained, tmp_path):
    """Its records are stored, not compressed: a path would stand there as it is."""
    stems = sorted({path.stem.removesuffix("_original") for path in mels.rglob("*_original.npy")})
    split = tmp_path / "my split.csv"
    parts = ["val" if i % 6 < 1 else "test" if i % 6 < 2 else "train" for i in range(len(stems))]
    rows = [f"{stem},{part}\n" for stem, part in zip(stems, parts, strict=True)]
    split.write_text("stem,split\n" + "".join(rows))
    train(tmp_path, mels, SPLIT=str(split), EPOCHS=1)
    ours = tmp_path / "output/best_model.pth"
    for path in (trained / "best_model.pth", ours):
        data = path.read_bytes()
        assert b"format_version" in data, "compressed?"
        for word in (mels, trained, trained.parent, tmp_path, split.name, os.environ["HOME"]):
            assert str(word).encode() not in data, word
    checkpoint = torch.load(ours, weights_only=True)
    assert checkpoint["training_config"]["SPLIT"] == "csv"
    assert checkpoint["mel_config"].keys() == {name.split(".")[1] for name in MEL_SIZES} | {
        "fmin",
        "fmax",
    }
    for part in ("train", "val"):
        speakers = {s.split("_")[0] for s, p in zip(stems, parts, strict=True) if p == part}
        assert checkpoint["speakers"][part] == sorted(speakers)


def test_speakers_are_the_splits(checkpoint, trained):
    rows = read_table(trained / "split.csv")
    for part in ("train", "val"):
        actors = sorted({row["actor"] for row in rows if row["split"] == part})
        assert actors and checkpoint["speakers"][part] == actors
    assert checkpoint["speakers"].keys() == {"train", "val"}


def test_level_is_the_training_originals_median_and_range(checkpoint, trained, mels):
    levels = {}
    for row in read_table(trained / "split.csv"):
        if row["split"] == "train":
            mel = np.load(mels / row["emotion"] / f"{row['stem']}_original.npy")
            power = (10 ** (mel.T[: checkpoint["max_width"]].astype(float) / 10)).mean(1)
            level = 10 * np.log10(np.percentile(power, 95))
            levels.setdefault(row["actor"], []).append(level)
    median = np.median(np.concatenate([*levels.values()]))
    speakers = [np.median(values) for values in levels.values()]
    level = checkpoint["level"]
    assert level["median"] == pytest.approx(median, abs=0.02)
    assert level["low"] == pytest.approx(min(*speakers, median - 8), abs=0.02)
    assert level["high"] == pytest.approx(max(*speakers, median + 8), abs=0.02)
    assert level["low"] <= level["median"] - 7.98 and level["high"] >= level["median"] + 7.98


def test_floor_and_distance_are_of_the_training_originals(checkpoint, trained, mels):
    """A band's median floor; the highest speaker's median of level less noise, or 8 dB over all."""
    floors = []
    distances = {}
    for row in read_table(trained / "split.csv"):
        if row["split"] == "train":
            mel = np.load(mels / row["emotion"] / f"{row['stem']}_original.npy")[:, :191]
            floors.append(noise_floor(mel))
            power = (10 ** (mel.astype(float) / 10)).mean(axis=0)
            cells = mel[:, np.argsort(power)[: (len(power) + 1) // 2]]
            distance = 10 * np.log10(np.percentile(power, 95)) - np.median(cells)
            distances.setdefault(row["actor"], []).append(distance)
    assert checkpoint["floor"] == pytest.approx(np.median(floors, axis=0), abs=0.01)
    speakers = [np.median(values) for values in distances.values()]
    median = np.median(np.concatenate([*distances.values()]))
    assert checkpoint["distance"] == pytest.approx(max(*speakers, median + 8), abs=0.02)


@pytest.mark.parametrize(
    "function, error",
    [
        ("encode_clips", ZeroDivisionError("ours")),
        ("encode_clips", RuntimeError("ours")),
        ("log_mel", ValueError("ours")),
        ("log_mel", RuntimeError("ours")),
        ("wrong_checkpoint", KeyError("ours")),
        ("EmotionClassifier", TypeError("ours")),
    ],
)
def test_a_bug_of_ours_is_not_told_as_the_users_fault(
    corpus, trained, tmp_path, monkeypatch, function, error
):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(tester, function, broken)
    source = min(corpus.iterdir())
    with pytest.raises(type(error), match="ours"):
        classify(source, trained / "best_model.pth", tmp_path / "out")


def test_a_bug_of_ours_in_resuming_is_not_told_as_the_checkpoints(
    mels, trained, tmp_path, monkeypatch
):
    def broken(*_):
        raise KeyError("ours")

    shutil.copytree(trained, tmp_path / "output")
    monkeypatch.setattr(trainer.TrainState, "load_state_dict", broken)
    with pytest.raises(KeyError, match="ours"):
        train(tmp_path, mels, RESUME=True)


def test_resume_takes_no_damaged_checkpoint(mels, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "output")
    path = tmp_path / "output/last_checkpoint.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = {p.name: p.read_bytes() for p in (tmp_path / "output").iterdir()}
    text = train(tmp_path, mels, RESUME=True, code=1)
    assert "last_checkpoint.pth is damaged" in text
    assert {p.name: p.read_bytes() for p in (tmp_path / "output").iterdir()} == before


def test_a_gpu_that_cannot_compute_is_a_sentence(corpus, trained, tmp_path, monkeypatch):
    def too_old(device):
        if device.type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available\nand much more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tester, "try_device", too_old)
    text = classify(corpus, trained / "best_model.pth", tmp_path / "out", code=1)
    assert "no kernel image" in text and "--cpu" in text and "much more" not in text
    assert tester.gpu_or_cpu(cpu=True).type == "cpu"
