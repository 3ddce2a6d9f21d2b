"""Non-speech from formulas: five categories, each a handful of generators of (n,) float32 at 16 kHz.

Every generator takes (number of samples, numpy Generator) and returns a signal of any level; `non_speech`
normalises it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.signal import butter as _butter
from scipy.signal import lfilter, sosfilt

RATE = 16_000
Generator = Callable[[int, np.random.Generator], np.ndarray]


def _time(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.float64) / RATE


def _band(x: np.ndarray, low: float, high: float, order: int = 2) -> np.ndarray:
    nyquist = RATE / 2 * 0.99
    low, high = max(low, 15.0), min(high, nyquist)
    return np.asarray(sosfilt(_butter(order, [low, high], "band", fs=RATE, output="sos"), x))


def _slow(n: int, rng: np.random.Generator, hertz: float) -> np.ndarray:
    """A random curve in 0..1 that changes about `hertz` times a second."""
    points = rng.random(max(2, int(n / RATE * hertz) + 2))
    return np.interp(np.linspace(0, len(points) - 1, n), np.arange(len(points)), points)


def _decay(n: int, seconds: float) -> np.ndarray:
    return np.exp(-_time(n) / seconds)


def _place(n: int, events: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """Adds each (start in seconds, signal) to a silent clip of n samples."""
    out = np.zeros(n)
    for start, signal in events:
        first = int(start * RATE)
        if 0 <= first < n:
            out[first : first + len(signal)] += signal[: n - first]
    return out


def _starts(n: int, rng: np.random.Generator, per_second: float) -> np.ndarray:
    count = max(1, rng.poisson(n / RATE * per_second))
    return np.sort(rng.uniform(0, n / RATE, count))


# -- noise
# ------------------------------------------------------------------------------------------------------------


def _coloured(exponent: float) -> Generator:
    def make(n: int, rng: np.random.Generator) -> np.ndarray:
        spectrum = np.fft.rfft(rng.standard_normal(n))
        frequency = np.maximum(np.fft.rfftfreq(n, 1 / RATE), 20)
        return np.fft.irfft(spectrum * frequency ** (-exponent / 2), n)

    return make


def _fan(n: int, rng: np.random.Generator) -> np.ndarray:
    blades = 1 + 0.3 * np.sin(2 * np.pi * rng.uniform(5, 40) * _time(n))
    return _band(_coloured(1)(n, rng), 60, rng.uniform(800, 5000)) * blades + 0.05 * _hum(n, rng)


def _hum(n: int, rng: np.random.Generator) -> np.ndarray:
    base = rng.choice([50.0, 60.0, 100.0, 120.0])
    harmonics = rng.integers(2, 9)
    return sum(
        rng.uniform(0.1, 1) / k * np.sin(2 * np.pi * base * k * _time(n) + rng.uniform(0, 6.28))
        for k in range(1, harmonics)
    ) + 0.01 * rng.standard_normal(n)


def _wind(n: int, rng: np.random.Generator) -> np.ndarray:
    return _band(rng.standard_normal(n), 40, rng.uniform(300, 1500)) * (0.1 + _slow(n, rng, 1.5) ** 2)


def _crackle(n: int, rng: np.random.Generator) -> np.ndarray:
    clicks = (rng.random(n) < rng.uniform(2, 60) / RATE) * rng.standard_normal(n)
    return lfilter([1], [1, -rng.uniform(0.3, 0.95)], clicks) + 0.003 * rng.standard_normal(n)


def _silence(n: int, rng: np.random.Generator) -> np.ndarray:
    """Dither, or nothing at all."""
    return rng.choice([0.0, 1e-5, 1e-4]) * rng.standard_normal(n)


def _static(n: int, rng: np.random.Generator) -> np.ndarray:
    return _band(rng.standard_normal(n), 200, rng.uniform(2500, 7500)) * (
        _slow(n, rng, rng.uniform(2, 12)) > rng.uniform(0.1, 0.6)
    )


# -- tones
# ------------------------------------------------------------------------------------------------------------


def _sine(n: int, rng: np.random.Generator) -> np.ndarray:
    return np.sin(2 * np.pi * rng.uniform(80, 5000) * _time(n))


def _chirp(n: int, rng: np.random.Generator) -> np.ndarray:
    low, high = sorted(rng.uniform(80, 6000, 2))
    period = rng.uniform(0.3, 5)
    sweep = low + (high - low) * np.abs(((_time(n) / period) % 2) - 1)
    return np.sin(2 * np.pi * np.cumsum(sweep) / RATE)


def _beeps(n: int, rng: np.random.Generator) -> np.ndarray:
    period, duty = rng.uniform(0.15, 1.5), rng.uniform(0.2, 0.7)
    return _sine(n, rng) * ((_time(n) / period) % 1 < duty)


def _dial(n: int, rng: np.random.Generator) -> np.ndarray:
    pairs = [(rng.choice([697, 770, 852, 941]), rng.choice([1209, 1336, 1477])) for _ in range(n // 3200 + 1)]
    tone = [np.sin(2 * np.pi * a * _time(2200)) + np.sin(2 * np.pi * b * _time(2200)) for a, b in pairs]
    return _place(n, [(0.2 * i, t) for i, t in enumerate(tone)])


def _siren(n: int, rng: np.random.Generator) -> np.ndarray:
    middle, rate = rng.uniform(500, 1500), rng.uniform(0.2, 5)
    sweep = middle * (1 + 0.35 * np.sin(2 * np.pi * rate * _time(n)))
    phase = 2 * np.pi * np.cumsum(sweep) / RATE
    return np.sin(phase) + 0.4 * np.sin(2 * phase) + 0.2 * np.sin(3 * phase)


def _ring(n: int, rng: np.random.Generator) -> np.ndarray:
    base, trill = rng.uniform(400, 2200), rng.uniform(10, 25)
    on = (_time(n) / rng.uniform(1.5, 4)) % 1 < 0.5
    return np.sin(2 * np.pi * base * _time(n)) * (np.sin(2 * np.pi * trill * _time(n)) > 0) * on


# -- music
# ------------------------------------------------------------------------------------------------------------


def _note(n: int, hertz: float, rng: np.random.Generator, decay: float, partials: int) -> np.ndarray:
    bright = rng.uniform(0.5, 1.6)
    t = _time(n)
    return sum(
        np.sin(2 * np.pi * hertz * k * t) / k**bright * np.exp(-t * k**0.5 / decay)
        for k in range(1, partials + 1)
        if hertz * k < RATE / 2
    ) * np.minimum(1, t / 0.005)


def _scale(rng: np.random.Generator) -> np.ndarray:
    steps = np.array([0, 2, 4, 5, 7, 9, 11] if rng.random() < 0.5 else [0, 3, 5, 7, 10])
    root = rng.uniform(98, 260)
    return np.concatenate([root * 2 ** ((steps + 12 * octave) / 12) for octave in range(3)])


def _melody(n: int, rng: np.random.Generator) -> np.ndarray:
    scale, beat = _scale(rng), rng.uniform(0.12, 0.5)
    decay, partials, index = rng.uniform(0.1, 1.2), int(rng.integers(1, 10)), int(rng.integers(0, len(scale)))
    events = []
    for step in range(int(n / RATE / beat) + 1):
        index = int(np.clip(index + rng.integers(-3, 4), 0, len(scale) - 1))
        if rng.random() < 0.85:
            events.append(
                (step * beat, _note(int(RATE * min(2.0, beat * 4)), scale[index], rng, decay, partials))
            )
    return _place(n, events)


def _chords(n: int, rng: np.random.Generator) -> np.ndarray:
    scale, length = _scale(rng), rng.uniform(0.5, 2.5)
    partials, events = int(rng.integers(2, 8)), []
    for step in range(int(n / RATE / length) + 1):
        first = int(rng.integers(0, len(scale) - 5))
        size = int(RATE * length)
        pad = sum(_note(size, scale[first + k], rng, 3 * length, partials) for k in (0, 2, 4))
        events.append((step * length, pad * np.minimum(1, (size - np.arange(size)) / 800)))
    return _place(n, events)


def _drums(n: int, rng: np.random.Generator) -> np.ndarray:
    beat, events = rng.uniform(0.1, 0.3), []
    kick = np.sin(2 * np.pi * np.cumsum(50 + 120 * _decay(4000, 0.03)) / RATE) * _decay(4000, 0.08)
    snare = _band(rng.standard_normal(3200), 300, 6000) * _decay(3200, 0.06)
    hat = _band(rng.standard_normal(1200), 5000, 7800) * _decay(1200, 0.02)
    pattern = rng.random((3, 8)) < np.array([[0.4], [0.25], [0.7]])
    pattern[0, 0] = True
    for step in range(int(n / RATE / beat) + 1):
        for on, hit, level in zip(pattern[:, step % 8], (kick, snare, hat), (1.0, 0.7, 0.3), strict=True):
            if on:
                events.append((step * beat, hit * level))
    return _place(n, events)


def _band_playing(n: int, rng: np.random.Generator) -> np.ndarray:
    parts = [make(n, rng) for make in (_melody, _chords, _drums)]
    return sum(rng.uniform(0.3, 1) * part / (np.abs(part).max() + 1e-9) for part in parts)


# -- sounds of things and animals
# -------------------------------------------------------------------------------------


def _knocks(n: int, rng: np.random.Generator) -> np.ndarray:
    centre = rng.uniform(100, 900)
    return _place(
        n,
        [
            (
                s,
                _band(rng.standard_normal(3000), centre * 0.6, centre * 1.6)
                * _decay(3000, rng.uniform(0.01, 0.05)),
            )
            for s in _starts(n, rng, rng.uniform(1, 5))
        ],
    )


def _engine(n: int, rng: np.random.Generator) -> np.ndarray:
    speed = rng.uniform(20, 90) * (1 + 0.3 * _slow(n, rng, 0.5))
    phase = np.cumsum(speed) / RATE
    firing = np.exp(-8 * (phase % 1)) * (0.6 + 0.4 * rng.random(int(phase[-1]) + 2)[phase.astype(int)])
    return _band(firing * (1 + 0.3 * rng.standard_normal(n)), 30, rng.uniform(700, 3000))


def _drips(n: int, rng: np.random.Generator) -> np.ndarray:
    def drip() -> np.ndarray:
        return np.sin(
            2 * np.pi * np.cumsum(rng.uniform(600, 1800) * (1 + 2 * _time(1600) * 8)) / RATE
        ) * _decay(1600, 0.015)

    return _place(n, [(s, drip()) for s in _starts(n, rng, rng.uniform(1, 12))])


def _birds(n: int, rng: np.random.Generator) -> np.ndarray:
    def call() -> np.ndarray:
        size = int(rng.uniform(0.05, 0.3) * RATE)
        sweep = rng.uniform(2000, 5000) * (1 + 0.25 * np.sin(2 * np.pi * rng.uniform(5, 40) * _time(size)))
        return np.sin(2 * np.pi * np.cumsum(sweep) / RATE) * np.hanning(size)

    return _place(n, [(s, call()) for s in _starts(n, rng, rng.uniform(1, 6))]) + 0.01 * _wind(n, rng)


def _bell(n: int, rng: np.random.Generator) -> np.ndarray:
    base = rng.uniform(200, 1500)
    ratios = np.array([1, 2.0, 2.76, 3.0, 5.4]) * rng.uniform(0.98, 1.02, 5)

    def strike() -> np.ndarray:
        size = int(RATE * 1.5)
        return sum(np.sin(2 * np.pi * base * r * _time(size)) * _decay(size, 0.9 / r) for r in ratios)

    return _place(n, [(s, strike()) for s in _starts(n, rng, rng.uniform(0.4, 2))])


def _typing(n: int, rng: np.random.Generator) -> np.ndarray:
    return _place(
        n,
        [
            (s, rng.uniform(0.3, 1) * _band(rng.standard_normal(600), 1500, 7000) * _decay(600, 0.006))
            for s in _starts(n, rng, rng.uniform(4, 12))
        ],
    )


def _rain(n: int, rng: np.random.Generator) -> np.ndarray:
    drops = (rng.random(n) < rng.uniform(50, 900) / RATE) * rng.standard_normal(n)
    return _band(lfilter([1], [1, -0.7], drops), 400, 7500) + 0.02 * rng.standard_normal(n)


def _animal(n: int, rng: np.random.Generator) -> np.ndarray:
    """Barks, moos and crows: a falling harmonic tone through one wide resonance."""

    def cry() -> np.ndarray:
        size = int(rng.uniform(0.1, 0.9) * RATE)
        pitch = rng.uniform(120, 700) * (1 + rng.uniform(-0.4, 0.3) * np.linspace(0, 1, size))
        source = np.sign(np.sin(2 * np.pi * np.cumsum(pitch) / RATE)) + rng.uniform(
            0, 1
        ) * rng.standard_normal(size)
        centre = rng.uniform(500, 1800)
        return _band(source, centre * 0.5, centre * 2) * np.hanning(size)

    return _place(n, [(s, cry()) for s in _starts(n, rng, rng.uniform(0.5, 2))])


# -- sounds people make without words
# ---------------------------------------------------------------------------------


def _glottal(pitch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    phase = np.cumsum(pitch * (1 + 0.01 * rng.standard_normal(len(pitch)))) / RATE
    return np.exp(-6 * (phase % 1)) - 0.16


def _vowel(source: np.ndarray, formants: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    bands = [_band(source, f * 0.88, f * 1.12) / (k + 1) for k, f in enumerate(formants)]
    return sum(bands, start=np.zeros(len(source)))


def _hum_voice(n: int, rng: np.random.Generator) -> np.ndarray:
    """Humming: a closed mouth, a wandering pitch, no words."""
    pitch = rng.uniform(90, 300) * 2 ** ((_slow(n, rng, 1.5) - 0.5) * 0.8)
    return _vowel(_glottal(pitch, rng), (250.0, rng.uniform(900, 1300)), rng) * (0.2 + _slow(n, rng, 1))


def _laugh(n: int, rng: np.random.Generator) -> np.ndarray:
    base, beat = rng.uniform(130, 380), rng.uniform(0.14, 0.25)

    def ha(k: int) -> np.ndarray:
        size = int(beat * RATE * 0.9)
        voiced = _glottal(np.full(size, base * (1 - 0.03 * k)), rng) + 0.3 * rng.standard_normal(size)
        return _vowel(voiced, (rng.uniform(600, 900), rng.uniform(1100, 1700), 2600.0), rng) * np.hanning(
            size
        )

    return _place(
        n, [(s + k * beat, ha(k)) for s in _starts(n, rng, 0.4) for k in range(int(rng.integers(3, 9)))]
    )


def _cough(n: int, rng: np.random.Generator) -> np.ndarray:
    def one() -> np.ndarray:
        size = int(rng.uniform(0.15, 0.4) * RATE)
        return _band(rng.standard_normal(size), rng.uniform(200, 500), rng.uniform(1500, 4500)) * _decay(
            size, 0.07
        )

    return _place(n, [(s, one()) for s in _starts(n, rng, rng.uniform(0.5, 2))])


def _breath(n: int, rng: np.random.Generator) -> np.ndarray:
    period = rng.uniform(1.2, 4)
    shape = np.maximum(0, np.sin(2 * np.pi * _time(n) / period)) ** 2
    return _band(rng.standard_normal(n), rng.uniform(300, 900), rng.uniform(2500, 6000)) * shape


def _cry(n: int, rng: np.random.Generator) -> np.ndarray:
    """Crying and moaning: one open vowel that rises and falls."""

    def wail() -> np.ndarray:
        size = int(rng.uniform(0.5, 1.4) * RATE)
        pitch = rng.uniform(180, 550) * (1 + 0.3 * np.sin(np.pi * np.linspace(0, 1, size)))
        return _vowel(
            _glottal(pitch, rng), (rng.uniform(700, 1100), rng.uniform(1300, 1900), 2900.0), rng
        ) * np.hanning(size)

    return _place(n, [(s, wail()) for s in _starts(n, rng, 0.7)])


def _applause(n: int, rng: np.random.Generator) -> np.ndarray:
    claps = (rng.random(n) < rng.uniform(10, 200) / RATE) * rng.standard_normal(n)
    return _band(lfilter([1], [1, -0.97], claps), 500, 4500)


GENERATORS: dict[str, dict[str, Generator]] = {
    "noise": {
        "white": _coloured(0),
        "pink": _coloured(1),
        "brown": _coloured(2),
        "fan": _fan,
        "hum": _hum,
        "wind": _wind,
        "crackle": _crackle,
        "silence": _silence,
        "static": _static,
    },
    "tones": {"sine": _sine, "chirp": _chirp, "beeps": _beeps, "dial": _dial, "siren": _siren, "ring": _ring},
    "music": {"melody": _melody, "chords": _chords, "drums": _drums, "band": _band_playing},
    "sounds": {
        "knocks": _knocks,
        "engine": _engine,
        "drips": _drips,
        "birds": _birds,
        "bell": _bell,
        "typing": _typing,
        "rain": _rain,
        "animal": _animal,
    },
    "human": {
        "humming": _hum_voice,
        "laugh": _laugh,
        "cough": _cough,
        "breath": _breath,
        "cry": _cry,
        "applause": _applause,
    },
}
CATEGORIES = tuple(GENERATORS)  # noise, tones, music, sounds, human


def non_speech(category: str, seconds: float, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """(generator's name, clip): `seconds` of `category`, float32 (n,), peak between 0.03 and 0.9 (silence
    stays silent)."""
    name = str(rng.choice(list(GENERATORS[category])))
    n = int(seconds * RATE)
    clip = np.asarray(GENERATORS[category][name](n, rng), dtype=np.float64)
    if rng.random() < 0.3 and name != "silence":  # a faint room behind it
        clip = clip + np.abs(clip).max() * 10 ** rng.uniform(-3, -1.5) * rng.standard_normal(n)
    peak = np.abs(clip).max()
    if name != "silence" and peak > 0:
        clip = clip * (10 ** rng.uniform(-1.5, -0.05) / peak)
    return name, clip.astype(np.float32)
