"""Reports of sweeps that never ran: figures that behave as real ones do, a little wobble included."""

from __future__ import annotations

import math

import numpy as np

DOMAINS = {"speech": 1.0, "music": 1.25, "sounds": 1.1}


def make_record(layer, expansion, k, *, seed=0, d_model=768, activation="batchtopk", recognition=True):
    rng = np.random.default_rng([layer, int(expansion), k, seed])

    def wobble():
        return 1 + 0.02 * rng.standard_normal()

    l2 = 1.15 * k**-0.22 * expansion**-0.09 * (1 + 0.25 * math.sin(0.45 * layer)) * wobble() * 0.6
    alive = min(1.0, (0.99 - 0.012 * layer - 0.004 * expansion * (1 - k / 260)) * wobble())
    domains = {
        name: {
            "frames": 40_000,
            "l0": k * (0.85 + 0.12 * factor),
            "l2": l2 * factor,
            "fvu": 1.4 * (l2 * factor) ** 2,
            "alive": alive * 0.9 / factor,
        }
        for name, factor in DOMAINS.items()
    }
    record = {
        "name": f"{activation}_x{expansion}_k{k}_s{seed}",
        "file": f"{activation}_x{expansion}_k{k}_s{seed}/layer_{layer:02d}.safetensors",
        "layer": layer,
        "activation": activation,
        "d_model": d_model,
        "n_latents": expansion * d_model,
        "expansion": float(expansion),
        "k": k,
        "theta": 0.1,
        "theta_calibration": None,
        "recipe": {"seed": seed, "k": k},
        **{key: sum(row[key] for row in domains.values()) / 3 for key in ("l0", "l2", "fvu")},
        "input_scale": 30.0,
        "alive": alive,
        "dead": round((1 - alive) * expansion * d_model),
        "duplicates": 40 + 10 * layer,
        "duplicate_frames": 60_000,
        "domains": domains,
        "skipped": {},
    }
    if recognition:
        rise = 0.3 * l2**3

        def wer(value):
            return {"value": value, "lo": value - 0.01, "hi": value + 0.01}

        cells = {
            "clips": 60, "words": 900, "wer_plain": wer(0.05), "wer_spliced": wer(0.05 + rise),
            "wer_rise": rise, "tokens": 1200, "ce_plain": 0.2, "ce_spliced": 0.2 + rise, "ce_delta": rise,
        }  # fmt: skip
        record["recognition"] = {
            "speech": {"all": cells, "clean": cells, "noisy": {**cells, "wer_rise": 2 * rise}},
            "nonspeech": {"clips": 60, "text_fpr_plain": wer(0.3), "text_fpr_spliced": wer(0.28)},
        }
    return record


def make_report(layers=12, expansions=(8, 32), ks=(25, 50, 75, 100, 200), seeds=(0,), **options):
    return {
        "base_model": "small",
        "encoder_sha256": "ab" * 32,
        "d_model": options.get("d_model", 768),
        "n_layers": layers,
        "held_out": {"speech": 412, "music": 260, "sounds": 198},
        "skipped": {},
        "saes": [
            make_record(layer, expansion, k, seed=seed, **options)
            for layer in range(layers)
            for expansion in expansions
            for k in ks
            for seed in seeds
        ],
    }
