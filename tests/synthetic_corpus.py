"""A small corpus of synthesised voices under CREMA-D's file names, to try the three scripts without any recording.

    python tests/synthetic_corpus.py --output_dir corpus --actors 12 --takes 5

Source and filter: glottal pulses and breath noise through the resonances of a vocal tract (Fant, "Acoustic
Theory of Speech Production", 1960). Actors differ in the tract's length and in pitch; emotions by what tells
them in people (Banse and Scherer, JPSP 70(3), 1996): pitch and its range, tempo, energy, spectral tilt,
jitter, breath; each take scatters, so that the emotions overlap. These are no recordings of anyone.
"""

import argparse
from pathlib import Path

import numpy as np
import soundfile

RATE = 16000  # Hz
SENTENCES = ("DFA", "IEO", "IOM", "ITH", "ITS", "IWL", "IWW", "MTI", "TAI", "TIE", "TSI", "WSI")
VOWELS = ((730, 1090, 2440), (530, 1840, 2480), (270, 2290, 3010), (570, 840, 2410), (300, 870, 2240))  # formants, Hz
#          pitch, pitch range, tempo, level in dB, tilt in dB per octave, jitter, breath
EMOTIONS = {
    "ANG": (1.30, 1.6, 1.15, 6, -7, 0.020, 0.05),
    "DIS": (0.90, 0.9, 0.85, 0, -10, 0.030, 0.15),
    "FEA": (1.50, 0.8, 1.25, -1, -11, 0.025, 0.35),
    "HAP": (1.30, 2.0, 1.10, 3, -10, 0.008, 0.08),
    "NEU": (1.00, 1.0, 1.00, 0, -13, 0.006, 0.08),
    "SAD": (0.95, 0.5, 0.78, -6, -16, 0.010, 0.30),
}
SCATTER = (0.12, 0.25, 0.10, 2.5, 1.6, 0.25, 0.25)  # standard deviation over takes: relative, but dB for level and tilt


def syllable(random, seconds, pitch, glide, formants, tilt, jitter, breath):
    """One voiced syllable, float64 (samples,): pulses and noise through three resonances."""
    n = int(seconds * RATE)
    f0 = pitch * 2 ** (glide * np.linspace(0.5, -0.5, n)) * (1 + jitter * np.interp(np.arange(n), np.arange(0, n + 80, 80), random.standard_normal(n // 80 + 2)[: len(np.arange(0, n + 80, 80))]))
    source = np.diff(np.floor(np.cumsum(f0) / RATE), prepend=0) + breath * 0.1 * random.standard_normal(n)
    hertz = np.fft.rfftfreq(n, 1 / RATE)
    filtered = 10 ** (tilt * np.log2(np.maximum(hertz, 100) / 100) / 20)
    for centre in formants:
        width = 60 + 0.05 * centre
        filtered = filtered * centre**2 / np.sqrt((centre**2 - hertz**2) ** 2 + (width * hertz) ** 2)
    return np.fft.irfft(np.fft.rfft(source) * filtered, n) * np.sin(np.linspace(0, np.pi, n)) ** 0.5


def utterance(random, actor, emotion):
    """A clip of four to six syllables in an actor's voice, float32 (samples,)."""
    pitch, span, tempo, level, tilt, jitter, breath = (
        value + s * random.standard_normal() if name in ("level", "tilt") else value * np.exp(s * random.standard_normal())
        for name, value, s in zip(("pitch", "span", "tempo", "level", "tilt", "jitter", "breath"), EMOTIONS[emotion], SCATTER, strict=True))
    parts = [np.zeros(int(0.1 * RATE))]
    for _ in range(random.integers(4, 7)):
        formants = np.array(VOWELS[random.integers(len(VOWELS))]) * actor["tract"]
        here = actor["pitch"] * pitch * 2 ** (0.2 * span * random.standard_normal())
        parts += [syllable(random, 0.16 / tempo * random.uniform(0.8, 1.3), here, 0.4 * span, formants, tilt, jitter, breath), np.zeros(int(0.03 / tempo * RATE))]
    clip = np.concatenate([*parts, np.zeros(int(0.1 * RATE))])
    clip *= 0.05 * 10 ** ((level + actor["level"]) / 20) / np.sqrt(np.mean(clip**2))
    return np.clip(clip + 0.0005 * random.standard_normal(len(clip)), -1, 1).astype(np.float32)


def make_corpus(output_dir, actors=12, takes=5, seed=0, shuffle_labels=False):
    """Writes actors x 6 emotions x takes WAVs; shuffle_labels names them at random: nothing left to learn."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for a in range(actors):
        random = np.random.default_rng([seed, a])
        actor = {"pitch": random.choice((115, 205)) * np.exp(0.12 * random.standard_normal()), "tract": np.exp(0.08 * random.standard_normal()), "level": 2 * random.standard_normal()}
        voiced = [(code, SENTENCES[t % len(SENTENCES)], t // len(SENTENCES)) for code in EMOTIONS for t in range(takes)]
        labels = [code for code, _, _ in voiced]
        if shuffle_labels:
            random.shuffle(labels)
        for i, ((code, _, _), label) in enumerate(zip(voiced, labels, strict=True)):
            name = f"{1001 + a}_{SENTENCES[i % 12]}_{label}_X{i // 12}.wav"
            soundfile.write(output_dir / name, utterance(random, actor, code), RATE, subtype="PCM_16")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--actors", type=int, default=12)
    parser.add_argument("--takes", type=int, default=5, help="clips of each emotion by each actor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shuffle_labels", action="store_true", help="emotions named at random: a control")
    args = parser.parse_args()
    make_corpus(args.output_dir, args.actors, args.takes, args.seed, args.shuffle_labels)
    print(f"{args.actors * 6 * args.takes} clips: {args.output_dir}")


if __name__ == "__main__":
    main()
