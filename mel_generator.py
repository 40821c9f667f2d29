"""CREMA-D audio to log-mel spectrograms (.npy), with augmented copies to train on.

    python mel_generator.py --input_dir AudioWAV --output_dir mel_spectrograms
    python mel_generator.py --input_dir AudioWAV --output_dir mel_original --no_augment
    python mel_generator.py --input_dir AudioWAV --output_dir mel_all --n_augmentations 8 --workers 2

Reads every .wav and .flac below --input_dir whose name's third field is an emotion
(1001_DFA_ANG_XX.wav: actor 1001, ANG). Writes, in --output_dir:

    EMO/STEM_VARIANT.npy   float32 (mel bands, frames): log power in dB at absolute level
    mel_config.json        every setting that training and inference must repeat
    skipped.csv            file, reason: each file that has no spectrogram, and why
    run.json               arguments, versions, platform: what it takes to repeat the run

A second run does what is missing. Exit status: 0 finished, 1 had to stop or nothing could be
done (--strict: or a file was skipped), 2 wrong arguments, 130 Ctrl-C.
"""

import os

# For the worker processes: one thread each, and glibc to keep freed memory (a page fault costs more than the sums).
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "67108864", "MALLOC_TRIM_THRESHOLD_": "134217728"}

import argparse
import contextlib
import csv
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import platform
import re
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from pathlib import Path


def stop(message, *_):
    """Ctrl-C: a sentence, and out at once. Every file that has its final name is whole, so nothing needs undoing."""
    for process in multiprocessing.active_children():
        process.kill()
    os.write(2, message)
    os._exit(130)  # no exception, which could break into a library's own code and end in its traceback


if __name__ == "__main__":
    message = b"\nStopped. What was written stays: the same command goes on from there.\n"
    signal.signal(signal.SIGINT, functools.partial(stop, message))  # before the imports that take seconds

import librosa
import numpy as np
import soundfile
from tabulate import tabulate
from tqdm import tqdm

# --------------------------------------------------------------------------------------
# Constants (the mel settings are options: see --help)

EMOTIONS = {"ANG": "Angry", "DIS": "Disgust", "FEA": "Fear", "HAP": "Happy", "NEU": "Neutral", "SAD": "Sad"}
AUDIO_SUFFIXES = (".wav", ".flac")
MOST_SAMPLES = 2**40  # a file that claims more does not know its own length
VARIANTS = {  # name: (kind, amount)
    "time_shift_pos": ("shift", 0.1),  # fraction of the clip, later
    "time_shift_neg": ("shift", -0.1),
    "pitch_up": ("pitch", 2.0),  # semitones
    "pitch_down": ("pitch", -2.0),
    "stretch_fast": ("stretch", 1.2),  # rate: over 1 is faster and shorter
    "stretch_slow": ("stretch", 0.8),
    "noise_low": ("noise", 0.005),  # standard deviation, full scale = 1
    "noise_medium": ("noise", 0.01),
}
VOCODER_FFT, VOCODER_HOP = 2048, 512  # librosa.effects' own, whatever the mel settings
CORPUS_CLIPS, CORPUS_ACTORS = 7442, 91  # the whole of CREMA-D
NAME_MAX = 255  # bytes in a file name on every usual file system


# --------------------------------------------------------------------------------------
# Reading


def native(path):
    """A path as libsndfile takes it: bytes, so that names that are no UTF-8 work too; on Windows text."""
    return os.fspath(path) if os.name == "nt" else os.fsencode(path)


def check_head(path):
    """Raises ValueError, with the reason in words, for a file whose first bytes tell that it is no sound."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("unreadable: no regular file")  # a pipe would be waited for for ever
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ValueError(f"unreadable: {error.strerror}") from error
    if head.startswith(b"version https://git-lfs"):
        raise ValueError("Git LFS pointer, not audio: run 'git lfs pull' in the corpus's folder")
    if not head:
        raise ValueError("empty: the file has 0 bytes")


def load_audio(path, sample_rate, hop_length, start=0.0, seconds=None):
    """Decodes a sound file, or `seconds` of it from `start` on, to mono at sample_rate.

    Returns float32 (samples,), full scale 1. Channels are averaged; other rates are resampled
    with soxr's high-quality filter. Raises ValueError, with the reason in words, for whatever
    holds nothing to classify.
    """
    check_head(path)
    try:
        with soundfile.SoundFile(native(path)) as file:
            rate = file.samplerate
            if file.frames > MOST_SAMPLES:
                raise ValueError("unreadable: its header does not tell its length; convert it: ffmpeg -i this new.wav")
            file.seek(int(start * rate))
            samples = file.read(-1 if seconds is None else math.ceil(seconds * rate), "float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"unreadable: {getattr(error, 'error_string', error)}") from error
    if not len(samples):
        raise ValueError("empty: a sound file without samples")
    if rate < 1000:
        raise ValueError(f"unreadable: a sampling rate of {rate} Hz")
    if not np.abs(samples).max() < 1e15:  # the power of larger samples overflows float32
        raise ValueError("not finite: NaN, infinite or boundless samples")
    mono = samples.mean(axis=1)
    if np.ptp(mono) == 0:
        part = "" if seconds is None else f" in the {seconds:.1f} s from {start:.1f} s on"
        raise ValueError(f"silent: all samples are equal{part}")
    if rate != sample_rate:
        mono = librosa.resample(mono, orig_sr=rate, target_sr=sample_rate)
    if len(mono) < hop_length:
        raise ValueError(f"shorter than one hop: {len(mono)} samples of {hop_length} at {sample_rate} Hz")
    return mono


@functools.cache
def mel_filters(sample_rate, n_fft, n_mels, fmin, fmax):
    """Triangular mel filters of equal area, as librosa.filters.mel, which takes over a second to import.

    Mel as in Slaney's "Auditory Toolbox" (1998): linear up to 1 kHz, logarithmic above. For every 16 bands
    the slice of STFT bins that they use, and float32 weights (16, those bins): the rest is zeros.
    """
    linear, step = 200 / 3, math.log(6.4) / 27  # Hz a mel below 1 kHz = 15 mel; growth a mel above
    low, high = (15 + math.log(f / 1000) / step if f > 1000 else f / linear for f in (fmin, fmax))
    mel = np.linspace(low, high, n_mels + 2)
    corner = np.where(mel > 15, 1000 * np.exp(step * (mel - 15)), linear * mel)[:, None]  # Hz
    hertz, width = np.arange(n_fft // 2 + 1) * sample_rate / n_fft, np.diff(corner, axis=0)
    rise, fall = (hertz - corner[:-2]) / width[:-1], (corner[2:] - hertz) / width[1:]
    weights = (np.minimum(rise, fall).clip(0) * 2 / (corner[2:] - corner[:-2])).astype(np.float32)
    groups = [weights[at : at + 16] for at in range(0, n_mels, 16)]
    used = [np.flatnonzero(group.any(axis=0)) for group in groups]
    bins = [slice(u.min(initial=n_fft), u.max(initial=0) + 1) for u in used]
    return [(some, group[:, some]) for some, group in zip(bins, groups, strict=True)]


@functools.cache
def hann(size):
    """Periodic Hann window, float32 (size,)."""
    return np.hanning(size + 1)[:-1].astype(np.float32)


def stft(samples, n_fft, hop_length):
    """Short-time Fourier transform as librosa.stft: periodic Hann window, frames centred by zero padding.

    Returns complex64 (1 + samples // hop_length, n_fft // 2 + 1), a frame to a row.
    """
    window = n_fft * hann(n_fft)  # undoes the norm below, in which numpy stays in float32: six times as quick
    padded = np.pad(samples, n_fft // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop_length]
    blocks = range(0, len(frames), 1024)  # an hour's windowed frames at once would fill the memory
    return np.concatenate([np.fft.rfft(frames[at : at + 1024] * window, norm="forward") for at in blocks])


def log_mel(samples, sample_rate, n_fft, hop_length, n_mels, fmin, fmax):
    """Log-mel spectrogram in dB at absolute level, float32 (mel bands, frames).

    Equals librosa.power_to_db(librosa.feature.melspectrogram(...), ref=1.0, amin=1e-10,
    top_db=None): nothing is scaled to the clip's own maximum, so loudness survives.
    """
    spectrum = stft(samples, n_fft, hop_length)
    power = spectrum.real**2 + spectrum.imag**2
    filters = mel_filters(sample_rate, n_fft, n_mels, fmin, fmax)
    mel = np.vstack([weights @ power[:, bins].T for bins, weights in filters])
    return 10.0 * np.log10(np.maximum(mel, 1e-10))


def emotion_of(stem):
    """The emotion's code in the third field of a CREMA-D name, or None."""
    fields = stem.upper().split("_")
    return fields[2] if len(fields) > 2 and fields[2] in EMOTIONS else None


def in_shard(path, shard):
    """Whether a file is this shard's to do, by the SHA-1 of its stem; shard: (I, N), or None for every file."""
    return not shard or int(hashlib.sha1(os.fsencode(Path(path).stem)).hexdigest(), 16) % shard[1] == shard[0]


def find_clips(input_dir, skipped):
    """Sound files below input_dir, as {stem: relative path}; the others' reasons go into `skipped`."""
    clips = {}
    longest = max(len(f"_{name}.npy.{2**31}.tmp") for name in VARIANTS)
    paths = (p for p in input_dir.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and not p.is_dir())
    for path in sorted(p.relative_to(input_dir).as_posix() for p in paths):
        stem = Path(path).stem
        if emotion_of(stem) is None:
            skipped[path] = f"no emotion in the name: its third field is none of {' '.join(EMOTIONS)}"
        elif stem in clips:
            skipped[path] = f"same stem as another file: {clips[stem]}"
        elif len(os.fsencode(stem)) + longest > NAME_MAX:
            skipped[path] = f"name too long: at most {NAME_MAX - longest} bytes before the suffix"
        else:
            clips[stem] = path
    return clips


# --------------------------------------------------------------------------------------
# Computing


def random_generator(*key):
    """A generator of random numbers that depends on the key alone, not on order or process."""
    text = "\0".join(str(part) for part in key)
    return np.random.default_rng(int.from_bytes(hashlib.sha256(os.fsencode(text)).digest()[:16], "little"))


def choose_variants(seed, stem, n_augmentations):
    """The clip's variants: the original, and n of the augmentations (n of them hold those of n - 1)."""
    order = random_generator(seed, stem).permutation(list(VARIANTS))
    return ["original", *order[:n_augmentations].tolist()]


def shift(samples, fraction):
    """Moves a clip by a fraction of its length, later if positive; silence fills the gap."""
    n = int(len(samples) * fraction)
    return np.pad(samples, abs(n))[abs(n) - n :][: len(samples)]


def istft(spectrum, length):
    """Samples (length,) of a spectrum (frames, bins) at the vocoder's sizes, as librosa.istft."""
    overlap = VOCODER_FFT // VOCODER_HOP
    window = hann(VOCODER_FFT).reshape(overlap, VOCODER_HOP)
    frames = np.fft.irfft(spectrum).reshape(-1, overlap, VOCODER_HOP) * window
    samples, weight = np.zeros((2, len(frames) + overlap - 1, VOCODER_HOP), np.float32)
    for i in range(overlap):
        samples[i : i + len(frames)] += frames[:, i]
        weight[i : i + len(frames)] += window[i] ** 2
    samples /= np.maximum(weight, np.finfo(np.float32).tiny)
    samples = samples.ravel()[VOCODER_FFT // 2 :][:length]
    return np.pad(samples, (0, length - len(samples)))


def stretch(samples, rate):
    """Changes tempo, not pitch: the phase vocoder of librosa.effects.time_stretch, without its angles.

    Source: Flanagan and Golden, "Phase Vocoder", Bell System Technical Journal 45(9), 1966.
    Accumulating wrapped phase differences equals multiplying the unit phasors' ratios
    U[t + 1] conj(U[t]), because the expected phase advance cancels modulo 2 pi.
    """
    spectrum = np.pad(stft(samples, VOCODER_FFT, VOCODER_HOP), ((0, 2), (0, 0)))
    magnitude = np.abs(spectrum)
    unit = np.divide(spectrum, magnitude, out=np.ones_like(spectrum), where=magnitude > 0)
    steps = np.arange(0, len(spectrum) - 2, rate)
    at, weight = steps.astype(int), (steps % 1.0).astype(np.float32)[:, None]
    phasor = np.vstack([unit[:1], (unit[1:] * unit[:-1].conj())[at[:-1]]])
    for before, now in itertools.pairwise(phasor):  # ten times as quick as cumprod(axis=0)
        now *= before
    phasor *= magnitude[at] + weight * np.diff(magnitude, axis=0)[at]
    return istft(phasor, round(len(samples) / rate))


def resample(samples, ratio):
    """Samples at `ratio` times the sampling rate (a Fraction), by windowed-sinc interpolation.

    Source: Smith, "Digital Audio Resampling", ccrma.stanford.edu/~jos/resample. Of a rational
    ratio, every `denominator` samples give `numerator` new ones in the same way: a matrix product.
    """
    up, down = ratio.numerator, ratio.denominator
    cutoff = min(1.0, up / down)  # of the Nyquist frequency, so that nothing folds back
    half = math.ceil(48 / cutoff)  # samples that the sinc reaches to each side
    distance = np.arange(-half, down + half)[:, None] - np.arange(up) * down / up  # (reach, up)
    # Zero past the sinc's reach, not 4e-33: sums of such products are denormal, which on Intel take nine times as long.
    window = np.where(abs(distance) < half, np.cos(np.pi / 2 * distance / half) ** 2, 0)
    kernel = (0.96 * cutoff * np.sinc(0.96 * cutoff * distance) * window).astype(np.float32)
    padded = np.pad(samples, (half, half + down))
    return (np.lib.stride_tricks.sliding_window_view(padded, len(kernel))[::down] @ kernel).ravel()


def shift_pitch(samples, semitones):
    """Changes pitch, not length: stretched, then resampled back, as librosa.effects.pitch_shift."""
    rate = 2.0 ** (-semitones / 12)
    shifted = resample(stretch(samples, rate), Fraction(rate).limit_denominator(100))  # 2 semitones: 55 / 49
    return np.pad(shifted, (0, max(0, len(samples) - len(shifted))))[: len(samples)]


def augment(samples, variant, seed, stem):
    """One variant of a clip, float32 (samples,); the noise depends on seed and stem alone."""
    if variant == "original":
        return samples
    kind, amount = VARIANTS[variant]
    if kind == "noise":
        return samples + amount * random_generator(seed, stem, variant).standard_normal(len(samples), dtype=np.float32)
    return {"shift": shift, "pitch": shift_pitch, "stretch": stretch}[kind](samples, amount)


def process_clip(task):
    """Writes the missing variants of one clip; returns (relative path, why it was skipped or None)."""
    path, stem, missing, input_dir, output_dir, mel, seed = task
    try:
        samples = load_audio(os.path.join(input_dir, path), mel["sample_rate"], mel["hop_length"])
        for variant in missing:
            varied = augment(samples, variant, seed, stem)
            spectrogram = io.BytesIO()
            np.save(spectrogram, log_mel(varied, **mel))
            write_whole(os.path.join(output_dir, emotion_of(stem), f"{stem}_{variant}.npy"), spectrogram.getvalue())
    except (ValueError, MemoryError) as error:
        return path, str(error) or "too long for this machine's memory"
    return path, None


def follow_parent():
    """In a worker process: ends it when the main process is killed, which a pool never notices by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it is not inherited
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def deaf_to_ctrl_c():
    """Worker processes that start in it never hear of Ctrl-C, which is for the main process and not lost there."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def process_all(tasks, workers):
    """Runs process_clip over the tasks in worker processes; returns {path: why it was skipped}."""
    if not tasks:
        return {}
    context = multiprocessing.get_context("spawn")  # started anew, so that the environment above counts
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, follow_parent)
    try:
        with deaf_to_ctrl_c():
            results = pool.map(process_clip, tasks, chunksize=min(16, -(-len(tasks) // workers)))
        bar = tqdm(results, total=len(tasks), unit="clip", desc="Spectrograms")
        return {path: reason for path, reason in bar if reason}
    except BrokenProcessPool:
        sys.exit(
            "A worker process was killed, most often for want of memory: run again with fewer --workers. "
            "What was written stays, and is not done again."
        )
    finally:
        pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------
# Writing


def write_whole(path, data):
    """Writes bytes under a name that no other process has, then renames: path is whole or not there."""
    temporary = f"{path}.{int.from_bytes(os.urandom(4), 'big')}.tmp"  # two containers' process numbers may be equal
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk's own names no file


def settle_config(output_dir, config, overwrite):
    """Writes mel_config.json; ends the program if the folder holds spectrograms of other settings."""
    path = output_dir / "mel_config.json"
    present = (f for code in EMOTIONS for f in output_dir.glob(f"{code}/*.npy"))
    if overwrite:
        for file in [*present, path, output_dir / "skipped.csv"]:
            file.unlink(missing_ok=True)
    elif path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            other = [
                f"{k} is {found.get(k)}, now {v}" for k, v in config.items() if k != "versions" and found.get(k) != v
            ]
        except (ValueError, AttributeError):
            sys.exit(f"{path} cannot be read as JSON settings: --overwrite starts the folder anew.")
        if other:
            sys.exit(
                f"{output_dir} holds spectrograms of other settings ({'; '.join(other)}): "
                "name another --output_dir, or start this one anew with --overwrite."
            )
        return
    elif file := next(present, None):
        sys.exit(
            f"{output_dir} holds spectrograms ({file.name}) but no mel_config.json to tell their settings: "
            "name another --output_dir, or start this one anew with --overwrite."
        )
    write_whole(path, (json.dumps(config, indent=2) + "\n").encode())


def write_skipped(path, skipped, clips):
    """Brings skipped.csv up to date: this run's rows, and earlier rows of files that it did not see."""
    if path.exists():
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = (line.replace("\0", "") for line in file)  # a power cut's, which Python 3.10 refuses
            earlier = dict(row for row in csv.reader(lines) if len(row) == 2 and row != ["file", "reason"])
        seen = set(clips.values())
        skipped = {name: reason for name, reason in earlier.items() if name not in seen} | skipped
    text = io.StringIO(newline="")
    for row in [("file", "reason"), *sorted(skipped.items())]:
        quoting = csv.QUOTE_ALL if "\r" in row[0] else csv.QUOTE_MINIMAL  # Python before 3.13 does not see that itself
        csv.writer(text, lineterminator="\n", quoting=quoting).writerow(row)
    write_whole(path, text.getvalue().encode("utf-8", "surrogateescape"))


def run_record(seconds, packages, **details):
    """run.json, as text: what it takes to repeat the run."""
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    run = {"command": sys.argv} | details | {"platform": platform.platform(), "versions": versions}
    return json.dumps(run | {"seconds": round(seconds, 1)}, indent=2, default=str) + "\n"


def remove_leftovers(output_dir, started):
    """Deletes temporary files of killed runs: those of ours that were last touched before this run began."""
    ours = re.compile(r".+\.(npy|json|csv)\.\d+\.tmp")
    for file in (file for folder in ("", *EMOTIONS) for file in (output_dir / folder).glob("*.tmp")):
        with contextlib.suppress(FileNotFoundError):  # another run at work here may be just renaming it
            if ours.fullmatch(file.name) and file.stat().st_mtime < started:
                file.unlink()


def note_partial_corpus(clips):
    """Says so if the clips are named as CREMA-D's but are not all of it."""
    actors = {stem.split("_")[0] for stem in clips}
    named_so = any(re.fullmatch(r"10\d\d", actor) for actor in actors)
    if named_so and (len(clips), len(actors)) != (CORPUS_CLIPS, CORPUS_ACTORS):
        print(
            f"Note: if this is CREMA-D, it is not all of it: "
            f"{len(clips):,} clips of {CORPUS_CLIPS:,}, {len(actors)} actors of {CORPUS_ACTORS}."
        )


def print_counts(output_dir, clips, skipped, log, seconds):
    """Spectrograms in the folder by emotion and variant, what was skipped, where things are."""
    counts = Counter(
        (f.parent.name, v)
        for c in EMOTIONS
        for f in output_dir.glob(f"{c}/*.npy")
        for v in ["original", *VARIANTS]
        if f.stem.endswith(f"_{v}")
    )
    variants = [v for v in ["original", *VARIANTS] if any(counts[c, v] for c in EMOTIONS)]
    rows = [[v, *(counts[c, v] for c in EMOTIONS), sum(counts[c, v] for c in EMOTIONS)] for v in variants]
    rows.append(["all", *(sum(counts[c, v] for v in variants) for c in EMOTIONS), counts.total()])
    print(tabulate(rows, headers=["spectrograms", *EMOTIONS, "all"]))
    if skipped:
        kinds = Counter(reason.split(":")[0] for reason in skipped.values())
        words = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        print(f"Skipped {len(skipped)} files ({words}): see {log}")
    print(f"{len(clips):,} clips in {seconds:.1f} s. Spectrograms: {output_dir}")


# --------------------------------------------------------------------------------------
# Main


def parse_shard(text):
    """I/N of --shard, as a pair."""
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise argparse.ArgumentTypeError(f"{text}: take I/N, I from 0 to N - 1")
    return int(i), int(n)


def usable_cores():
    """Cores that this process may use, of a cluster's machine its share; at most 61 on Windows, its limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 61) if os.name == "nt" else cores


def parse_args():
    """The command line, checked; a wrong one ends the program with exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, cores = parser.add_argument, usable_cores()
    add("--input_dir", type=Path, required=True, help="folder of .wav and .flac files, searched through")
    add("--output_dir", type=Path, required=True, help="folder for the spectrograms")
    add("--no_augment", action="store_true", help="originals alone")
    add("--n_augmentations", type=int, default=3, help="augmented copies of each clip, 0 to 8 (default 3)")
    add("--seed", type=int, default=42, help="chooses variants and noise, with the file's name (default 42)")
    add("--workers", type=int, default=cores, help="processes (default: all cores)")
    add("--overwrite", action="store_true", help="delete the spectrograms that are there and start anew")
    add("--shard", type=parse_shard, metavar="I/N", help="do the Ith of N parts, I from 0; then once without --shard")
    add("--strict", action="store_true", help="exit status 1 if any file was skipped")
    add("--sample_rate", type=int, default=16000, help="Hz (default 16000)")
    add("--n_fft", type=int, default=2048, help="samples (default 2048)")
    add("--hop_length", type=int, default=512, help="samples (default 512)")
    add("--n_mels", type=int, default=128, help="mel bands (default 128)")
    add("--fmin", type=float, default=0.0, help="Hz, lower edge of the lowest band (default 0)")
    add("--fmax", type=float, default=8000.0, help="Hz, upper edge of the highest band (default 8000)")
    args = parser.parse_args()
    if args.shard and args.overwrite:
        parser.error("--overwrite starts the folder anew for all shards: run it once, with --shard left out")
    if wrong := wrong_values(args):
        parser.error("; ".join(wrong))
    return args


def wrong_values(args):
    """A sentence for each option whose value makes no sense."""
    half = args.sample_rate / 2
    checks = [
        ("n_augmentations", 0 <= args.n_augmentations <= len(VARIANTS), f"0 to {len(VARIANTS)}"),
        ("workers", args.workers >= 1, "at least 1"),
        ("sample_rate", args.sample_rate >= 1000, "at least 1000 Hz"),
        ("n_fft", args.n_fft >= 16, "at least 16 samples"),
        ("hop_length", 1 <= args.hop_length <= args.n_fft, f"1 to --n_fft, {args.n_fft}"),
        ("n_mels", 1 <= args.n_mels <= args.n_fft // 2, f"1 to half of --n_fft, {args.n_fft // 2}"),
        ("fmin", 0 <= args.fmin < args.fmax, f"0 to less than --fmax, {args.fmax:g} Hz"),
        ("fmax", args.fmax <= half, f"at most half of --sample_rate, {half:g} Hz"),
    ]
    return [f"--{name} is {getattr(args, name)}: take {words}" for name, good, words in checks if not good]


def settings_of(args):
    """The mel settings, and mel_config.json: those, the augmentation and the versions that made them."""
    mel = {name: getattr(args, name) for name in ("sample_rate", "n_fft", "hop_length", "n_mels", "fmin", "fmax")}
    versions = {m.__name__: m.__version__ for m in (np, librosa, soundfile)}
    return mel, mel | {
        "seed": args.seed,
        "n_augmentations": 0 if args.no_augment else args.n_augmentations,
        "augmentation": {name: list(kind) for name, kind in VARIANTS.items()},
        "versions": {"python": platform.python_version()} | versions,
    }


def find_tasks(args, clips, mel, n_augmentations):
    """What process_clip takes, for each clip of which a variant is missing in --output_dir."""
    present = {f.name for code in EMOTIONS for f in os.scandir(args.output_dir / code)}
    tasks = []
    for stem, path in clips.items():
        missing = [v for v in choose_variants(args.seed, stem, n_augmentations) if f"{stem}_{v}.npy" not in present]
        if missing:
            tasks.append((path, stem, missing, str(args.input_dir), str(args.output_dir), mel, args.seed))
    return tasks


def find_input(args):
    """This shard's clips, as {stem: relative path}, and its files that are none, as {relative path: why}."""
    if not args.input_dir.is_dir():
        sys.exit(f"--input_dir {args.input_dir} is no folder: name the one that holds the .wav or .flac files.")
    skipped = {}
    clips = find_clips(args.input_dir, skipped)
    if not clips and not skipped:
        sys.exit(f"--input_dir {args.input_dir} holds no .wav or .flac file, nor does any folder below it.")
    note_partial_corpus(clips)
    clips = {stem: path for stem, path in clips.items() if in_shard(path, args.shard)}
    return clips, {path: reason for path, reason in skipped.items() if in_shard(path, args.shard)}


def main():
    """Lists the clips, makes what is missing, says what came of it; returns the exit status."""
    args, started = parse_args(), time.time()
    with contextlib.suppress(AttributeError):  # IDLE and notebooks have outputs of their own
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no UTF-8
    mel, config = settings_of(args)
    clips, skipped = find_input(args)
    for code in EMOTIONS:
        (args.output_dir / code).mkdir(parents=True, exist_ok=True)
    settle_config(args.output_dir, config, args.overwrite)
    skipped |= process_all(find_tasks(args, clips, mel, config["n_augmentations"]), args.workers)
    if not args.input_dir.is_dir():
        sys.exit(f"--input_dir {args.input_dir} went away during the run: bring it back, run the same command again.")
    log = args.output_dir / ("skipped.{}-of-{}.csv".format(*args.shard) if args.shard else "skipped.csv")
    write_skipped(log, skipped, clips)
    for file in args.output_dir.glob("skipped.*-of-*.csv") if not args.shard else []:
        file.unlink()  # the shards' are in skipped.csv now
    remove_leftovers(args.output_dir, started)
    record = run_record(time.time() - started, "librosa numpy soundfile tabulate tqdm".split(), arguments=vars(args))
    write_whole(log.with_name(log.name.replace("skipped", "run")).with_suffix(".json"), record.encode())
    print_counts(args.output_dir, clips, skipped, log, time.time() - started)
    if skipped and skipped.keys() >= set(clips.values()):
        sys.exit(f"No file could be used: {log} says why.")
    return 1 if args.strict and skipped else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        sys.exit(
            f"{error.filename or 'A file'}: {error.strerror}. What was written before stays: "
            "mend this and run the same command again."
        )
