"""What a container allows, and settings that leave mel bands empty."""

from pathlib import Path

import numpy as np
import pytest
from conftest import classify, generate, read_table

import cremad_custom2 as trainer
import custom2_tester as tester
import mel_generator as generator


@pytest.fixture
def cgroup(monkeypatch):
    """Gives files below /sys/fs/cgroup other contents."""

    def change(**contents):
        read_text = Path.read_text

        def fake(path, *arguments, **options):
            name = path.as_posix().removeprefix("/sys/fs/cgroup/").replace(".", "_")
            if path.as_posix().startswith("/sys/fs/cgroup/"):
                if name not in contents:
                    raise FileNotFoundError(name)
                return contents[name]
            return read_text(path, *arguments, **options)

        monkeypatch.setattr(Path, "read_text", fake)

    return change


@pytest.mark.parametrize("module", [generator, trainer, tester])
def test_a_containers_share_of_the_cores_counts(module, cgroup, monkeypatch):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    cgroup(cpu_max="max 100000\n")
    assert module.usable_cores() == 16
    cgroup(cpu_max="350000 100000\n")
    assert module.usable_cores() == 4
    cgroup(cpu_max="20000 100000\n")
    assert module.usable_cores() == 1
    cgroup()
    assert module.usable_cores() == 16


@pytest.mark.parametrize("module", [generator, trainer, tester])
def test_spaces_of_all_scripts_are_shown_and_control_characters_are_not(module):
    assert all(map(module.is_shown, "a é\u00a0\u202f\u3000\n"))
    assert not any(map(module.is_shown, "\x1b\x00\x7f\u202e"))


def test_windows_gets_no_more_processes_than_it_can_wait_for(corpus, tmp_path, monkeypatch):
    asked = []

    def refuse(n_processes):
        asked.append(n_processes)
        raise generator.UserError("no processes")

    monkeypatch.setattr(generator, "MAX_PROCESSES", 3)
    monkeypatch.setattr(generator, "start_pool", refuse)
    generate(corpus, tmp_path / "mels", "--workers", 64, code=1)
    monkeypatch.setattr(tester, "MAX_PROCESSES", 2)
    monkeypatch.setattr(tester, "UserError", generator.UserError)
    monkeypatch.setattr(tester, "drawing_pool", refuse)
    classify(corpus, "no.pth", tmp_path / "out", "--workers", 64, "--visualize", code=1)
    assert asked == [3, 2]


def test_a_containers_memory_counts(cgroup, monkeypatch):
    """v2 and v1; where it is not told, the machine's."""
    cgroup(memory_max=f"{2**30}\n")
    assert trainer.memory_limit() == 2**30
    cgroup(**{"memory/memory_limit_in_bytes": f"{2**29}\n"})
    assert trainer.memory_limit() == 2**29
    cgroup(memory_max="max\n")
    whole = trainer.memory_limit()
    assert whole > 2**29


def test_spectrograms_that_would_take_half_of_the_memory_go_to_a_file(
    cgroup, monkeypatch, tmp_path
):
    monkeypatch.setattr(trainer, "OUTPUT_DIR", str(tmp_path))
    cgroup(memory_max=f"{2**20}\n")
    assert isinstance(trainer.allocate_frames(2000, 128), np.memmap)  # 1 MB
    assert not isinstance(trainer.allocate_frames(900, 128), np.memmap)
    assert not list(tmp_path.iterdir()), "the file has no name"


@pytest.mark.parametrize(
    "settings, words",
    [
        ((16000, 256, 128, 8000.0), "13 of 128 .*--n_mels 80 or --n_fft 512"),
        ((16000, 512, 256, 8000.0), "24 of 256 .*--n_mels 128 or --n_fft 1024"),
        ((48000, 1024, 128, 8000.0), "of 128 .*--n_fft 2048"),
    ],
)
def test_empty_mel_bands_are_told_with_what_ends_it(corpus, tmp_path, settings, words, capsys):
    rate, n_fft, n_mels, fmax = settings
    values = {"sample_rate": rate, "n_fft": n_fft, "hop_length": n_fft // 2, "n_mels": n_mels}
    generator.print_empty_bands(values | {"fmin": 0.0, "fmax": fmax})
    text = capsys.readouterr().out
    assert generator.re.search(words, text)
    for remedy in generator.re.findall(r"--(n_mels|n_fft) (\d+)", text):
        changed = values | {remedy[0]: int(remedy[1]), "fmin": 0.0, "fmax": fmax}
        generator.print_empty_bands(changed)
    assert capsys.readouterr().out == "", "the remedies end it"


def test_where_nothing_ends_empty_mel_bands_nothing_is_advised(capsys):
    values = {"sample_rate": 16000, "n_fft": 2048, "hop_length": 512, "n_mels": 128}
    generator.print_empty_bands(values | {"fmin": 1000.0, "fmax": 1000.1})
    text = capsys.readouterr().out
    assert text.startswith("Note: 12") and text.endswith("falls into them.\n")


def test_the_generator_warns_of_empty_mel_bands_and_the_defaults_have_none(corpus, tmp_path):
    options = ("--no_augment", "--n_fft", 256, "--hop_length", 128)
    assert "no STFT bin falls into them" in generate(corpus, tmp_path / "short", *options)
    assert "no STFT bin falls into them" not in generate(corpus, tmp_path / "usual", "--no_augment")


def test_no_more_drawing_processes_than_files(corpus, trained, tmp_path, monkeypatch):
    """300 were started for 3 files once."""
    asked = []
    drawing_pool = tester.drawing_pool

    def spy(workers):
        asked.append(workers)
        return drawing_pool(workers)

    monkeypatch.setattr(tester, "drawing_pool", spy)
    (tmp_path / "in").mkdir()
    for path in sorted(corpus.iterdir())[:2]:
        (tmp_path / "in" / path.name).symlink_to(path)
    model = trained / "best_model.pth"
    classify(tmp_path / "in", model, tmp_path / "out", "--visualize", "--workers", 300)
    assert asked == [2] and len(read_table(tmp_path / "out/classification_results.csv")) == 2
