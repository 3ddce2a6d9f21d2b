"""whisper-steer calibrate: a steering file for any model, from recordings with and without speech."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options

if TYPE_CHECKING:
    from whisper.model import Whisper

    from ..sae import SparseAutoencoder

NonSpeech = Annotated[
    list[Path],
    typer.Option(
        "--nonspeech",
        metavar="DIR",
        help="Folder of recordings in which nobody speaks; every folder is a category. May be repeated.",
    ),
]
Speech = Annotated[
    Path,
    typer.Option(
        "--speech",
        metavar="MANIFEST",
        help="What is said in recordings of speech: a CSV, TSV or JSON-lines file with columns audio and "
        "text (and speaker, if known), or a folder of LibriSpeech.",
    ),
]
WerBudget = Annotated[
    float,
    typer.Option(
        "--wer-budget",
        metavar="FRACTION",
        help="By how much the word error rate may rise, 0.001 = 0.1 points, by its interval's upper end.",
    ),
]
Out = Annotated[
    Path, typer.Option("--out", metavar="FILE", help="The steering file to write (.safetensors).")
]
Saes = Annotated[
    Path | None,
    typer.Option(
        "--saes",
        metavar="DIR",
        help="SAEs of the model, layer_XX.safetensors (python -m calibration.train). By default those kept "
        "for the model; without any, activations alone are used.",
    ),
]
NoSaes = Annotated[bool, typer.Option("--no-saes", help="Use activations alone.")]
Work = Annotated[
    Path | None,
    typer.Option("--work", metavar="DIR", help="For labels and the fit, kept to go on. Default: FILE.work."),
]
Language = Annotated[
    str | None,
    typer.Option(
        "--language",
        metavar="LANGUAGE",
        help="What is spoken, a code or name as Whisper knows it (de, German). Default: English.",
    ),
]
GateKind = Annotated[
    str,
    typer.Option(
        "--gate-kind",
        metavar="KIND",
        help="Which gates may win: latents, raw (activations) or any; the one that leaves fewest words over "
        "non-speech does.",
    ),
]
Layers = Annotated[
    str | None,
    typer.Option("--layers", metavar="N,N,...", help="0-based layers, or 'all'. Default: at most 8, evenly."),
]
Seed = Annotated[int, typer.Option("--seed", help="Of the splits and all that is drawn.")]
Finalists = Annotated[
    int, typer.Option("--finalists", min=0, help="Edits that are heard before one is chosen.")
]
Screened = Annotated[
    int, typer.Option("--screened", min=1, help="Windows on which every edit is tried, of each kind.")
]
HeardClips = Annotated[
    int, typer.Option("--heard", min=1, help="Recordings of speech on which such an edit is heard.")
]
Measured = Annotated[
    int, typer.Option("--measured", min=0, help="Recordings on which the choice is measured; 0: all.")
]
Joined = Annotated[
    int,
    typer.Option(
        "--joined", min=0, help="Recordings joined from speech and other sounds, to compare edits on."
    ),
]
Frontier = Annotated[
    int, typer.Option("--frontier", min=1, help="Recordings that may be heard at every other alpha.")
]


def calibrate(
    nonspeech: NonSpeech,
    speech: Speech,
    out: Out,
    model: options.Model = "mini.en",
    wer_budget: WerBudget = 0.001,
    saes: Saes = None,
    no_saes: NoSaes = False,
    work: Work = None,
    layers: Layers = None,
    language: Language = None,
    gate_kind: GateKind = "any",
    seed: Seed = 0,
    finalists: Finalists = 4,
    screened: Screened = 24,
    heard: HeardClips = 240,
    measured: Measured = 0,
    joined: Joined = 60,
    frontier: Frontier = 400,
    as_json: options.Json = False,
    model_dir: options.ModelDir = None,
) -> None:
    """Make a steering file for a model from recordings: fit, choose within a budget of words, test.

    Written beside the file: its frontier as a picture and a report. A run that was stopped goes on when it is
    started again.
    """
    from calibration.calibrate import Settings, default_layers, summary
    from calibration.calibrate import calibrate as run
    from calibration.frame_source import parse_layers
    from calibration.hearing import Effort
    from calibration.selection import Budget
    from calibration.user_data import read_splits

    from ..errors import UsageError
    from ..zoo import load_model
    from . import decoding
    from .output import print_json

    if saes is not None and no_saes:
        raise UsageError("--saes and --no-saes contradict each other: give one")
    code = decoding.language(language)
    settings = Settings(
        Budget(wer_rise=wer_budget),
        Effort(
            screened=screened,
            finalists=finalists,
            heard=heard,
            measured=measured,
            joined=joined,
            frontier=frontier,
        ),
        seed=seed,
        gate_kind=gate_kind,
        language=code or "en",
    )
    loaded = load_model(model, download_root=model_dir)
    if not loaded.is_multilingual and settings.language != "en":
        raise UsageError(f"--language {language}: the model {model} knows English alone, leave it out")
    if loaded.is_multilingual and code is None:
        print(
            f"{model} knows many languages: English is taken (--language says what is spoken)",
            file=sys.stderr,
        )
    splits = read_splits(nonspeech, speech, seed=seed, language=settings.language)
    wanted = default_layers(loaded) if layers is None else parse_layers(layers)
    chosen = _saes(loaded, model, saes, no_saes, wanted)
    done = run(loaded, splits, chosen, out, work=work, settings=settings)
    found = summary(done, settings)
    if as_json:
        print_json(found)
        return
    for note in done.notes:
        print(note, file=sys.stderr)
    test = found["test"]
    if "text_fpr" in test:
        print(
            f"test split: non-speech recordings with words {test['text_fpr_plain']:.1%} -> "
            f"{test['text_fpr']:.1%} ({test['text_fpr_lo']:.1%} to {test['text_fpr_hi']:.1%})"
        )
    if "wer" in test:
        print(
            f"test split: word error rate {100 * test['wer_plain']:.2f} % -> {100 * test['wer']:.2f} %, "
            f"recordings of speech emptied wrongly {test['wrongly_emptied']:.2%} "
            f"({test['wrongly_emptied_lo']:.2%} to {test['wrongly_emptied_hi']:.2%})"
        )
        print(
            f"test split: change over the {test['counted_words']} words that the budget counts "
            f"{100 * test['wer_rise']:+.2f} points ({100 * test['wer_rise_lo']:+.2f} to "
            f"{100 * test['wer_rise_hi']:+.2f})"
        )
    print("profiles: " + ", ".join(f"{name} = alpha {alpha:g}" for name, alpha in found["profiles"].items()))
    for path in found["files"]:
        print(path)


def _saes(
    model: Whisper, name: str, folder: Path | None, none: bool, layers: Sequence[int] | None
) -> dict[int, SparseAutoencoder | None]:
    """By layer: its SAE or None."""
    from calibration.activations import check_layers
    from calibration.fit import load_saes

    from ..errors import ModelError
    from ..zoo import load_sae

    wanted = check_layers(model, layers)
    if none:
        return {layer: None for layer in wanted}
    if folder is not None:
        return {sae.layer: sae for sae in load_saes(folder, model, wanted)}
    found: dict[int, SparseAutoencoder | None] = {}
    for layer in wanted:
        try:
            found[layer] = load_sae(name, layer)
        except ModelError:
            found[layer] = None
    return found
