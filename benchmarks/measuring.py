"""Which methods the trade-off benchmark runs, at which strengths, and what comes of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from benchmarks import reports
from benchmarks.hearing_cache import ClipRecord, HearingCache
from benchmarks.listening import listen
from benchmarks.methods import AT_ONCE, GATED, Heard, Method, Setup, Unavailable
from benchmarks.rows import Measured, paired, pools, summarise, understood
from whisper_steer.errors import UsageError

if TYPE_CHECKING:
    from calibration.corpus import Clip

PLAIN = ("plain", 0.0)
REFERENCE = ("whisper-steer", 1.0)
_GATE_BATCH = 8  # windows
Setting = tuple[str, float]
Sets = Mapping[str, Sequence[tuple["Clip", ClipRecord]]]


@dataclass
class Results:
    """heard: per setting the clips of every set. unavailable: reasons by method. fingerprints: by method."""

    heard: dict[Setting, dict[str, list[Measured]]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)


# -- choosing -------------------------------------------------------------------------------------------


def choose_methods(names: Sequence[str] | None, methods: Sequence[Method]) -> list[Method]:
    """Plain Whisper and those with one of the names, or whose name begins with one; None: all.

    Raises UsageError: a name that fits none.
    """
    if names is None:
        return list(methods)
    wanted = {"plain"}
    known = [method.name for method in methods]
    for name in names:
        found = [name] if name in known else [other for other in known if name and other.startswith(name)]
        if not found:
            raise UsageError(f"--methods {name}: expected some of {', '.join(known)}, or how they begin")
        wanted |= set(found)
    return [method for method in methods if method.name in wanted]


def choose_strengths(method: Method, alphas: Sequence[float] | None, quick: bool) -> tuple[float, ...]:
    """The method's range; for a quick run its quick_strengths; for those of our methods that decode `alphas`
    if given (> 0): a gate alone, GATED, is as cheap at many as at one."""
    decodes = getattr(method, "timed", AT_ONCE) != GATED
    if alphas is not None and decodes and method.name.startswith(reports.OURS):
        return tuple(sorted({alpha for alpha in alphas if alpha > 0}))
    return getattr(method, "quick_strengths", method.strengths) if quick else method.strengths


# -- measuring ------------------------------------------------------------------------------------------


def measure(
    cache: HearingCache,
    setup: Setup,
    methods: Sequence[Method],
    strengths: Mapping[str, Sequence[float]],
    sets: Sets,
    fingerprint: Callable[[Method], str],
) -> Results:
    """Every method at every strength; one that cannot run is listed, and the others go on."""
    from tqdm import tqdm

    clips = [pair for group in sets.values() for pair in group]
    results = Results()
    total = len(clips) * sum(len(strengths[method.name]) for method in methods)
    with tqdm(total=total, unit="clip", file=sys.stderr, disable=not setup.progress) as bar:
        for method in methods:
            bar.set_description(method.name)
            found: dict[Setting, dict[str, list[Measured]]] = {}
            try:
                method.prepare(setup)
                own = fingerprint(method)
                for strength in strengths[method.name]:
                    bar.set_description(f"{method.name}, {strength:g}")
                    heard = iter(listen(cache, setup, method, strength, own, clips, bar.update))
                    found[method.name, strength] = {
                        name: [Measured(record, next(heard)) for _, record in group]
                        for name, group in sets.items()
                    }
            except Unavailable as error:
                results.unavailable[method.name] = str(error)
                bar.write(f"cannot run: {method.name} ({error})", file=sys.stderr)
                continue
            results.heard |= found
            results.fingerprints[method.name] = own
    return results


def rows_of(results: Results, methods: Sequence[Method]) -> list[reports.Row]:
    """Rows of every setting in the order of the methods; plain Whisper's also as alpha 0 of every method that
    does not measure strength 0 itself."""
    right = understood(results.heard[PLAIN])
    plain = summarise(results.heard[PLAIN], "plain", 0.0, right)
    rows = list(plain)
    for method in methods:
        settings = sorted(strength for name, strength in results.heard if name == method.name)
        if method.name == "plain" or not settings:
            continue
        if 0.0 not in settings:
            rows += [{**row, "method": method.name} for row in plain]
        for strength in settings:
            rows += summarise(results.heard[method.name, strength], method.name, strength, right)
    return rows


def paired_rows(results: Results, methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Every other setting against ours at alpha 1, over the same clips; empty where ours was not measured."""
    if REFERENCE not in results.heard:
        return []
    order = [method.name for method in methods]
    settings = sorted(results.heard, key=lambda setting: (order.index(setting[0]), setting[1]))
    reference = results.heard[REFERENCE]
    return [
        row
        for setting in settings
        if setting != REFERENCE
        for row in paired(results.heard[setting], reference, setting, REFERENCE)
    ]


def describe_methods(
    methods: Sequence[Method], strengths: Mapping[str, Sequence[float]], results: Results
) -> dict[str, Any]:
    """What run.json says of the methods that were chosen."""
    return {
        "methods": {
            method.name: {
                "about": method.about,
                "strengths": list(strengths[method.name]),
                "timed": getattr(method, "timed", AT_ONCE),
                "fingerprint": results.fingerprints[method.name],
            }
            for method in methods
            if method.name in results.fingerprints
        },
        "unavailable": results.unavailable,
        "not_in_quick": [method.name for method in methods if not strengths[method.name]],
        "reference": list(REFERENCE),
    }


def gate_threshold(setup: Setup) -> float | None:
    """The probability that nobody speaks from which the measured steering withholds a window at alpha 1; None
    if it has no gate."""
    from benchmarks.peers.ours import steering_of

    try:
        gate = steering_of(setup).gate
    except Unavailable:
        return None
    return None if gate is None else 1 / (1 + math.exp(-gate.window_threshold(1.0)))


def gate_scores(setup: Setup, sets: Sets) -> dict[str, float]:
    """By clip id the probability that nobody speaks, of the window most like speech, by the gate of the
    measured steering; empty if it has none."""
    import torch
    from tqdm import tqdm

    from benchmarks.peers.ours import steering_of
    from calibration.activations import encode_windows, window_mels
    from whisper_steer.passing import padding_frames

    try:
        gate = steering_of(setup).gate
    except Unavailable:
        return {}
    if gate is None:
        return {}
    scores: dict[str, float] = {}
    waiting: list[tuple[str, torch.Tensor]] = []

    def flush() -> None:
        mels = torch.stack([mel for _, mel in waiting])
        encoded = encode_windows(setup.model, mels, gate.layers).cpu()
        streams = dict(zip(gate.layers, encoded, strict=True))
        logits = gate.window_logit(gate.frame_logits(streams), streams, padding_frames(mels.cpu()))
        found = torch.sigmoid(logits).tolist()
        for (name, _), score in zip(waiting, found, strict=True):
            scores[name] = min(score, scores.get(name, 1.0))
        waiting.clear()

    clips = [clip for group in sets.values() for clip, _ in group]
    for clip in tqdm(clips, desc="gate's scores", unit="clip", file=sys.stderr, disable=not setup.progress):
        waiting += [(clip.id, mel) for mel in window_mels(clip.load(), setup.model.dims.n_mels)]
        if len(waiting) >= _GATE_BATCH:
            flush()
    if waiting:
        flush()
    return scores


def scored_records(setup: Setup, sets: Sets) -> list[ClipRecord]:
    """The clips' records with plain Whisper's scores and the gate's."""
    pairs = [pair for group in sets.values() for pair in group]
    gates = gate_scores(setup, sets)
    windows = setup.plain_windows([clip for clip, _ in pairs])
    return [
        replace(
            record,
            no_speech_prob=heard.no_speech_prob,
            avg_logprob=heard.avg_logprob,
            gate=gates.get(record.id),
        )
        for (_, record), heard in zip(pairs, windows, strict=True)
    ]


def minutes_of(records: Sequence[ClipRecord]) -> dict[str, float]:
    """Minutes of audio by set and pool."""
    groups: dict[str, list[Measured]] = {}
    for record in records:
        groups.setdefault(record.set, []).append(Measured(record, Heard("", (), None, None, 0.0)))
    return {name: sum(item.clip.seconds for item in items) / 60 for name, items in pools(groups).items()}
