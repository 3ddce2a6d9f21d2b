"""Fits the parts of steerings: gates on training clips, edits on the hallucination labels of calibration
clips.

    python -m calibration.fit --model mini.en --saes out/saes --labels out/labels.jsonl \\
        --corpus out/corpus --data ../shared/data --out out/fit

For every layer: gates on 16 to 256 SAE latents and one on raw activations, and both on two and on four
layers jointly; edits from a logistic regression on pooled latents (both published forms, several k), from
the causal effect of latents, from both, and from mean differences; and the silence that frames are replaced
by where nobody speaks. Every part is a steering file of its own in --out; windows.npz holds what each gate
says about every window of the calibration clips, fit.json the record. `python -m calibration.sweep` chooses
among them.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from calibration import edit_fit, gate_fit
from calibration.activations import check_layers
from calibration.causal import CausalEffects, both_edit, candidates, causal_edit, causal_effects
from calibration.command import run
from calibration.evaluate import evenly
from calibration.fit_files import Fit, write_fit
from calibration.hallucinations import Labels, label_clips
from calibration.hearing import first_windows
from calibration.silence import fit_silence
from calibration.training_clips import TrainingClip
from calibration.window_table import measure_windows, named
from whisper_steer.errors import FormatError, MismatchError, UsageError
from whisper_steer.fileformat import encoder_sha256
from whisper_steer.sae import SparseAutoencoder
from whisper_steer.steering import Edit, Gate

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip

logger = logging.getLogger("whisper_steer")

TOP_K = (10, 50)
CAUSAL_K = (4, 16)
AUDIOSAE_K = (10, 100)
PARTNERS = 3  # layers that the best one is paired with
_SILENCE_CLIPS = 64
_CAUSAL_WINDOWS = 16  # of speech, and of non-speech
_CAUSAL_LATENTS = 24  # tried per layer


def load_saes(folder: Path, model: Whisper, layers: Sequence[int] | None = None) -> list[SparseAutoencoder]:
    """The SAEs layer_XX.safetensors of a folder, checked against the model.

    Raises:
        FormatError: one is missing. MismatchError: one was trained on another encoder.
    """
    sha = encoder_sha256(model)
    saes = []
    for layer in check_layers(model, layers):
        path = folder / f"layer_{layer:02d}.safetensors"
        if not path.is_file():
            raise FormatError(f"{path} does not exist: train the SAEs first, python -m calibration.train")
        sae = SparseAutoencoder.load(path)
        if sae.metadata.get("encoder_sha256") != sha:
            raise MismatchError(
                f"{path} is for {sae.metadata.get('base_model')} with another encoder: train it again"
            )
        saes.append(sae)
    return saes


def fit_edits(
    saes: Mapping[int, SparseAutoencoder | None],
    pooled: Mapping[int, edit_fit.PooledClips],
    labels: Sequence[Labels],
    nonspeech: np.ndarray,
    effects_of: Callable[[SparseAutoencoder, np.ndarray], CausalEffects] | None = None,
) -> dict[str, tuple[Edit, dict[str, Any]]]:
    """Edits of every layer with their records, by name; a layer without an SAE has directions only.

    labels, nonspeech: of the clips in the order of `pooled`.
    effects_of: (SAE, candidate latents) -> what ablating each of them does; None: latents
        are chosen by regression only.
    """
    # ours aims at words that come out; AudioSAE's recipe is fitted as published, on no_speech_prob
    ours = edit_fit.choose_contrast(labels, nonspeech, ("text", "hr", "nsp"))
    theirs = edit_fit.choose_contrast(labels, nonspeech, ("nsp", "hr", "text"))
    edits: dict[str, tuple[Edit, dict[str, Any]]] = {}
    for layer, sae in saes.items():
        clips = pooled[layer]
        for normalised, name in ((True, "svector"), (False, "meandiff")):
            shift = edit_fit.mean_difference(
                layer, clips.mean[ours.used], ours.positive[ours.used], normalised=normalised
            )
            edits[f"{name}_l{layer}"] = shift, {"form": name, **edit_fit.contrast_record(ours)}
        if sae is None or sae.activation == "topk":
            continue  # without codes, or with codes that have no threshold form to edit by
        regression = edit_fit.regress(clips.latents[ours.used], ours.positive[ours.used])
        record = dict(edit_fit.record_of(ours, regression))
        for k in TOP_K:
            edit = edit_fit.additive_edit(sae, regression.beta, clips.mean_activation, k)
            edits[f"additive_l{layer}_k{k}"] = edit, {"form": "additive", "k": k, **record}
        if effects_of is not None:
            edits |= _causal_edits(sae, regression, clips, effects_of, ours, record)
        if theirs.name != ours.name:
            regression = edit_fit.regress(clips.latents[theirs.used], theirs.positive[theirs.used])
        record = dict(edit_fit.record_of(theirs, regression))
        for k in AUDIOSAE_K:
            edit = edit_fit.audiosae_edit(sae, regression.beta, k)
            edits[f"audiosae_l{layer}_k{k}"] = edit, {"form": "audiosae", "k": k, **record}
    return edits


def fit_gates(
    saes: Mapping[int, SparseAutoencoder | None],
    sample: gate_fit.FrameSample,
    *,
    progress: bool = True,
) -> dict[str, Gate]:
    """Gates by name: latents_l<layer>_m<size> and raw_l<layer> of every layer, and of the layer that tells
    the classes apart best together with up to three others, latents_l<a>+l<b>_m<size> and raw_l<a>+l<b>; and
    of all these at once.
    """
    gates: dict[str, Gate] = {}
    losses: dict[int, float] = {}
    frames = (sample.x, sample.nobody, sample.weight)

    def add(layers: Sequence[int]) -> None:
        name = "+".join(f"l{layer}" for layer in layers)
        chosen = [sae for layer in layers if (sae := saes[layer]) is not None and sae.activation != "topk"]
        if len(chosen) == len(layers):
            fitted = gate_fit.fit_latent_gates(chosen, *frames)
            gates.update({f"latents_{name}_m{size}": gate for size, gate in sorted(fitted.items())})
        gates[f"raw_{name}"] = gate_fit.fit_raw_gate(layers, *frames)
        if len(layers) == 1:
            losses[layers[0]] = gate_fit.frame_loss(gates[f"raw_{name}"], *frames)

    for layer in tqdm(saes, desc="fitting gates", unit="layer", disable=not progress):
        add((layer,))
    best = min(losses, key=lambda layer: losses[layer])
    others = evenly([layer for layer in saes if layer != best], PARTNERS)
    for other in tqdm(others, desc="fitting gates of two layers", unit="pair", disable=not progress):
        add(tuple(sorted((best, other))))
    if len(others) > 1:
        add(tuple(sorted((best, *others))))
    return gates


def _causal_edits(
    sae: SparseAutoencoder,
    regression: edit_fit.Regression,
    clips: edit_fit.PooledClips,
    effects_of: Callable[[SparseAutoencoder, np.ndarray], CausalEffects],
    contrast: edit_fit.Contrast,
    record: Mapping[str, Any],
) -> dict[str, tuple[Edit, dict[str, Any]]]:
    """Edits on latents chosen by what ablating them does, and by that and the regression."""
    hallucinated = clips.latents[contrast.positive & contrast.used].mean(axis=0)
    tried = candidates(regression.beta, hallucinated, _CAUSAL_LATENTS)
    if not len(tried):
        logger.warning("layer %d: no latent fires over non-speech, none can be chosen by effect", sae.layer)
        return {}
    effects = effects_of(sae, tried)
    edits: dict[str, tuple[Edit, dict[str, Any]]] = {}
    for k in CAUSAL_K:
        try:
            edit = causal_edit(sae, effects, clips.mean_activation, k)
        except UsageError as error:
            logger.warning("%s", error)  # the other edits of the layer remain
            break
        edits[f"causal_l{sae.layer}_k{k}"] = edit, {"form": "causal", "k": k, **record}
        both = both_edit(sae, regression.beta, effects, clips.mean_activation, k)
        if both is not None:
            edits[f"both_l{sae.layer}_k{k}"] = both, {"form": "both", "k": k, **record}
    return edits


def fit_parts(
    model: Whisper,
    saes: Mapping[int, SparseAutoencoder | None],
    training: Sequence[TrainingClip],
    sets: Mapping[str, Sequence[Clip]],
    labels: Mapping[str, Labels],
    *,
    seed: int = 0,
    causal: bool = True,
    language: str = "en",
    progress: bool = True,
) -> Fit:
    """Gates from the training clips; edits, and what the gates say, from the labelled calibration clips.

    saes: the layers to fit on, each with its SAE or None. language: code of what is spoken.
    Raises UsageError where one kind of clip is missing.
    """
    sample = gate_fit.collect_gate_frames(model, training, layers=sorted(saes), seed=seed, progress=progress)
    gates = fit_gates(saes, sample, progress=progress)
    table, pooled = measure_windows(model, saes, gates, sets, labels, language=language, progress=progress)
    nonspeech = np.array([not clip.is_speech for clip in table.clips])
    clip_labels = [labels[clip.id] for clip in table.clips]
    effects_of = None
    if causal:
        sources = {(name, clip.id): clip for name, clip in named(sets)}
        spoken = [c for c in table.clips if c.is_speech and c.has_words(c.transcript.text)]
        others = [c for c in table.clips if not c.is_speech]
        mels = [
            first_windows(model, [sources[c.set, c.id] for c in evenly(chosen, _CAUSAL_WINDOWS)])
            for chosen in (spoken, others)
            if chosen
        ]
        if len(mels) == 2:

            def effects_of(sae: SparseAutoencoder, latents: np.ndarray) -> CausalEffects:
                return causal_effects(
                    model, sae, latents, mels[0], mels[1], language=language, progress=progress
                )

    edits = fit_edits(saes, pooled, clip_labels, nonspeech, effects_of)
    spoken_clips = [clip for clip in training if clip.kind != "nonspeech"]
    clean = [clip for clip in spoken_clips if clip.condition == "clean"] or spoken_clips
    silence = fit_silence(
        model,
        [clip.load() for clip in evenly(clean, _SILENCE_CLIPS)],
        sorted(saes),
        seed=seed,
        progress=progress,
    )
    record = {"form": "silence", "clips": min(len(clean), _SILENCE_CLIPS)}
    edits |= {f"silence_l{layer}": (edit, dict(record)) for layer, edit in silence.items()}
    return Fit(
        gates=gates,
        edits={name: edit for name, (edit, _) in edits.items()},
        recipes={name: recipe for name, (_, recipe) in edits.items()},
        table=table,
        record={
            "seed": seed,
            "gate_frames": sample.counts,
            "saes": [sae.metadata.get("recipe", {}) for sae in saes.values() if sae is not None],
        },
        sample=sample,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m calibration.fit", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--model", default="mini.en", help="name or path (default: mini.en)")
    parser.add_argument("--saes", type=Path, default=Path("out/saes"), help="folder of calibration.train")
    parser.add_argument(
        "--labels", type=Path, default=Path("out/labels.jsonl"), help="labels, made if missing"
    )
    parser.add_argument(
        "--corpus", type=Path, default=Path("out/corpus"), help="folder of calibration.synthesis"
    )
    parser.add_argument("--data", dest="data_dir", type=Path, default=None, help="folder of real recordings")
    parser.add_argument("--out", type=Path, default=Path("out/fit"))
    parser.add_argument("--clips", type=int, default=1600, help="synthetic training clips of speech")
    parser.add_argument(
        "--real", type=int, default=700, help="real training clips of speech, and of the rest"
    )
    parser.add_argument("--layers", default="all", help="'all' or 0-based numbers: 0,3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-causal", dest="causal", action="store_false", help="choose latents by regression only"
    )
    parser.add_argument("--quick", action="store_true", help="the small calibration sets")
    args = parser.parse_args(argv)

    from calibration.corpus import describe, eval_sets
    from calibration.frame_source import parse_layers
    from calibration.training_clips import training_clips
    from whisper_steer.zoo import load_model

    started = time.monotonic()
    model = load_model(args.model)
    loaded = load_saes(args.saes, model, parse_layers(args.layers))
    sets = eval_sets("calibration", data_dir=args.data_dir, quick=args.quick)
    labels = label_clips(model, [clip for _, clip in named(sets)], cache=args.labels)
    drawn = {
        "speech": args.clips,
        "nonspeech": args.clips * 3 // 4,
        "real": args.real,
        "seed": args.seed + 1,
        "telephone": True,
    }
    training = training_clips(args.corpus, args.data_dir, **drawn)
    saes = {sae.layer: sae for sae in loaded}
    fitted = fit_parts(model, saes, training, sets, labels, seed=args.seed, causal=args.causal)
    fitted.record.update(calibrated_on=describe(sets), training=drawn)
    write_fit(args.out, model, fitted)
    for name, recipe in fitted.recipes.items():
        if "balanced_accuracy" in recipe:
            print(f"{name:<20} balanced accuracy {recipe['balanced_accuracy']:.3f}, F1 {recipe['f1']:.3f}")
    print(f"contrast: {next(iter(fitted.recipes.values()))['contrast_reason']}")
    print(
        f"{len(fitted.gates)} gates, {len(fitted.edits)} edits in {args.out}, "
        f"{time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    run(main)
