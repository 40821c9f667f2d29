"""A small corpus of synthesised voices under CREMA-D's file names: no recording is needed.

    python tests/tools/synthetic_corpus.py --output_dir corpus --actors 12 --takes 5

Source and filter: glottal pulses and breath noise through the resonances of a vocal tract (Fant,
"Acoustic Theory of Speech Production", 1960). Actors differ in the tract's length and in pitch;
emotions by what tells them in people (Banse and Scherer, JPSP 70(3), 1996): pitch and its range,
tempo, energy, spectral tilt, jitter, breath. Each take scatters, so that the emotions overlap.
These are no recordings of anyone.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

RATE = 16000  # Hz
SENTENCES = ("DFA", "IEO", "IOM", "ITH", "ITS", "IWL", "IWW", "MTI", "TAI", "TIE", "TSI", "WSI")
VOWELS = (  # formants, Hz
    (730, 1090, 2440),
    (530, 1840, 2480),
    (270, 2290, 3010),
    (570, 840, 2410),
    (300, 870, 2240),
)


class Style(NamedTuple):
    """How an emotion sounds."""

    pitch: float  # times the actor's own
    span: float  # of pitch, 1 = neutral
    tempo: float
    level: float  # dB
    tilt: float  # dB per octave
    jitter: float  # share of the pitch
    breath: float  # share of the pulses


EMOTIONS = {
    "ANG": Style(1.30, 1.6, 1.15, 6, -7, 0.020, 0.05),
    "DIS": Style(0.90, 0.9, 0.85, 0, -10, 0.030, 0.15),
    "FEA": Style(1.50, 0.8, 1.25, -1, -11, 0.025, 0.35),
    "HAP": Style(1.30, 2.0, 1.10, 3, -10, 0.008, 0.08),
    "NEU": Style(1.00, 1.0, 1.00, 0, -13, 0.006, 0.08),
    "SAD": Style(0.95, 0.5, 0.78, -6, -16, 0.010, 0.30),
}
# standard deviation over takes: relative, but dB for level and tilt
SCATTER = Style(0.12, 0.25, 0.10, 2.5, 1.6, 0.25, 0.25)


class Actor(NamedTuple):
    """A voice."""

    pitch: float  # Hz
    tract: float  # factor of the formants
    level: float  # dB


def draw_actor(random: np.random.Generator) -> Actor:
    """A low or a high voice, somewhat off the usual."""
    pitch = random.choice((115, 205)) * np.exp(0.12 * random.standard_normal())
    tract = np.exp(0.08 * random.standard_normal())
    return Actor(pitch, tract, 2 * random.standard_normal())


def draw_style(random: np.random.Generator, emotion: str) -> Style:
    """How one take of an emotion sounds."""
    values = {}
    for name, value in EMOTIONS[emotion]._asdict().items():
        offset = getattr(SCATTER, name) * random.standard_normal()
        values[name] = value + offset if name in ("level", "tilt") else value * np.exp(offset)
    return Style(**values)


def syllable(
    random: np.random.Generator,
    seconds: float,
    pitch: float,
    glide: float,
    formants: np.ndarray,
    style: Style,
) -> np.ndarray:
    """One voiced syllable, float64 (samples,): pulses and noise through three resonances.

    pitch: Hz at its middle; glide: octaves from its start down to its end.
    """
    n = int(seconds * RATE)
    knots = np.arange(0, n + 80, 80)
    wobble = np.interp(np.arange(n), knots, random.standard_normal(n // 80 + 2)[: len(knots)])
    f0 = pitch * 2 ** (glide * np.linspace(0.5, -0.5, n)) * (1 + style.jitter * wobble)
    pulses = np.diff(np.floor(np.cumsum(f0) / RATE), prepend=0)
    source = pulses + style.breath * 0.1 * random.standard_normal(n)
    hertz = np.fft.rfftfreq(n, 1 / RATE)
    response = 10 ** (style.tilt * np.log2(np.maximum(hertz, 100) / 100) / 20)
    for centre in formants:
        width = 60 + 0.05 * centre
        distance = np.sqrt((centre**2 - hertz**2) ** 2 + (width * hertz) ** 2)
        response = response * centre**2 / distance
    envelope = np.sin(np.linspace(0, np.pi, n)) ** 0.5
    return np.fft.irfft(np.fft.rfft(source) * response, n) * envelope


def utterance(random: np.random.Generator, actor: Actor, emotion: str) -> np.ndarray:
    """A clip of four to six syllables in an actor's voice, float32 (samples,), full scale 1."""
    style = draw_style(random, emotion)
    margin = np.zeros(int(0.1 * RATE))
    gap = np.zeros(int(0.03 / style.tempo * RATE))
    parts = [margin]
    for _ in range(random.integers(4, 7)):
        formants = np.array(VOWELS[random.integers(len(VOWELS))]) * actor.tract
        pitch = actor.pitch * style.pitch * 2 ** (0.2 * style.span * random.standard_normal())
        seconds = 0.16 / style.tempo * random.uniform(0.8, 1.3)
        parts += [syllable(random, seconds, pitch, 0.4 * style.span, formants, style), gap]
    clip = np.concatenate([*parts, margin])
    loudness = 10 ** ((style.level + actor.level) / 20)
    clip *= 0.05 * loudness / np.sqrt(np.mean(clip**2))
    hiss = 0.0005 * random.standard_normal(len(clip))
    return np.clip(clip + hiss, -1, 1).astype(np.float32)


def make_corpus(
    output_dir: Path, actors: int = 12, takes: int = 5, seed: int = 0, shuffle_labels: bool = False
) -> None:
    """Writes actors x 6 emotions x takes WAVs.

    shuffle_labels names them at random: nothing is left to learn.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    for a in range(actors):
        random = np.random.default_rng([seed, a])
        actor = draw_actor(random)
        voiced = [code for code in EMOTIONS for _ in range(takes)]
        labels = list(voiced)
        if shuffle_labels:
            random.shuffle(labels)
        for i, (code, label) in enumerate(zip(voiced, labels, strict=True)):
            name = f"{1001 + a}_{SENTENCES[i % 12]}_{label}_X{i // 12}.wav"
            samples = utterance(random, actor, code)
            soundfile.write(output_dir / name, samples, RATE, subtype="PCM_16")


def main() -> None:
    """Runs the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True)
    add("--actors", type=int, default=12)
    add("--takes", type=int, default=5, help="clips of each emotion by each actor")
    add("--seed", type=int, default=0)
    add("--shuffle_labels", action="store_true", help="emotions named at random: a control")
    args = parser.parse_args()
    make_corpus(args.output_dir, args.actors, args.takes, args.seed, args.shuffle_labels)
    print(f"{args.actors * 6 * args.takes} clips: {args.output_dir}")


if __name__ == "__main__":
    main()
