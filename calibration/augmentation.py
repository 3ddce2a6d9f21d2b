"""What happens to a recording on its way to a microphone: rooms, distance, cheap lines, other sounds."""

from __future__ import annotations

import numpy as np
from scipy.signal import butter, fftconvolve, resample_poly, sosfilt

RATE = 16_000


def active_rms(x: np.ndarray) -> float:
    """Root mean square over the louder half of 20 ms frames, so that pauses do not count."""
    frames = x[: len(x) // 320 * 320].reshape(-1, 320)
    if not len(frames):
        return float(np.sqrt(np.mean(x**2) + 1e-20))
    power = np.sort((frames.astype(np.float64) ** 2).mean(1))
    return float(np.sqrt(power[len(power) // 2 :].mean() + 1e-20))


def mix_at_snr(speech: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """speech + noise at `snr_db` decibels between their active parts; noise is looped or cut to speech's
    length."""
    if not len(noise) or not np.any(noise):
        return speech
    if len(noise) < len(speech):
        noise = np.tile(noise, -(-len(speech) // len(noise)))
    noise = noise[: len(speech)]
    gain = active_rms(speech) / max(active_rms(noise), 1e-7) * 10 ** (-snr_db / 20)
    return (speech + gain * noise).astype(np.float32)


def reverberate(
    x: np.ndarray, rng: np.random.Generator, rt60: tuple[float, float] = (0.2, 0.9)
) -> np.ndarray:
    """A room: direct sound plus exponentially decaying noise. rt60 in seconds; same length as x."""
    seconds = rng.uniform(*rt60)
    n = int(seconds * RATE)
    tail = rng.standard_normal(n) * 10 ** (-3 * np.arange(n) / n)
    impulse = tail * rng.uniform(0.05, 0.25) / np.sqrt((tail**2).sum()) * rng.uniform(1, 4)
    impulse[0] = 1.0
    return fftconvolve(x, impulse)[: len(x)].astype(np.float32)


def at_speed(x: np.ndarray, percent: int) -> np.ndarray:
    """x played at `percent` of its speed: pitch and tempo change together."""
    return np.asarray(resample_poly(x, 100, percent), dtype=np.float32)


def limit_band(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A telephone or a cheap microphone: 80-400 Hz to 2.8-6 kHz."""
    sos = butter(3, [rng.uniform(80, 400), rng.uniform(2800, 6000)], "band", fs=RATE, output="sos")
    return np.asarray(sosfilt(sos, x), dtype=np.float32)


def telephone(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """x (n,) over a telephone line: 200-400 Hz to 3.0-3.7 kHz, 8 kHz sampling, 8-bit mu-law (ITU-T G.711,
    mu = 255) at full scale for its peak; same length and peak."""
    top = float(np.abs(x).max(initial=0.0))
    if top == 0:
        return x
    sos = butter(4, [rng.uniform(200, 400), rng.uniform(3000, 3700)], "band", fs=RATE // 2, output="sos")
    narrow = sosfilt(sos, resample_poly(x.astype(np.float64), 1, 2))
    narrow /= np.abs(narrow).max(initial=1e-9)
    code = np.round(127 * np.sign(narrow) * np.log1p(255 * np.abs(narrow)) / np.log(256)) / 127
    line = np.sign(code) * np.expm1(np.abs(code) * np.log(256)) / 255
    return at_peak(resample_poly(line, 2, 1)[: len(x)].astype(np.float32), top)


def at_peak(x: np.ndarray, peak: float) -> np.ndarray:
    """x scaled to a peak of `peak` (0..1); silence stays as it is."""
    top = np.abs(x).max() if len(x) else 0.0
    return (x * (peak / top)).astype(np.float32) if top > 0 else x
