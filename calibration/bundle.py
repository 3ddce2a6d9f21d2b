"""Puts what was trained into sae_weights/<model>/: the model file, the demonstration clips and the card.

    python -m calibration.bundle model --checkpoint out/mini/checkpoint.pt   # whisper.safetensors and demo
    python -m calibration.bundle card --saes out/saes                         # card.json

The card holds the recipe, the training's size, the SAEs' report and the model's figures on the held-out test
split, measured here at alpha 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path

import av
import numpy as np

from calibration import augmentation, grammar, noises, synthesis
from whisper_steer.compact import pack_model
from whisper_steer.errors import FormatError
from whisper_steer.fileformat import encoder_sha256, load_metadata

RATE = 16_000
LICENCE = "MIT"
SOURCES = (
    "speech: espeak-ng 1.52; non-speech: formulas; and, where a folder of recordings was given, the "
    "training split (for the gate the calibration split, too; by speaker or source recording) of: "
    "LibriSpeech train-clean-100 and test-other "
    "(CC-BY-4.0), speechocean762 (Apache-2.0), VCTK (CC-BY-4.0), LJSpeech and LibriVox (public domain),"
    " Asterisk prompts (CC-BY-SA-3.0), Picovoice key words (Apache-2.0), MFA tests (MIT), Free Spoken "
    "Digit Dataset (CC-BY-SA-4.0), ESC-10 (CC-BY-3.0), EmoGator (Apache-2.0), Donate-a-cry (ODbL-1.0), "
    "and sounds and music of Blanket, IBM MAX, librosa, LinCity, OpenRCT2, OpenSFX, Sonic Pi, Unknown "
    "Horizons, GCompris, Open Surge, Singularity, TSC, Tuxemon and vocadito (CC0, CC-BY, CC-BY-SA, Free"
    " Art Licence or GPL-2.0, per file)"
)


def write_flac(path: Path, audio: np.ndarray) -> None:
    """audio float32 (n,), 16 kHz, as 16-bit FLAC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = (np.clip(audio, -1, 1) * 32767).astype(np.int16)
    temporary = path.with_name(f".{path.name}.tmp")
    with av.open(str(temporary), "w", format="flac") as container:
        stream = container.add_stream("flac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = RATE
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    os.replace(temporary, path)


def make_demo(folder: Path) -> dict[str, str]:
    """Three clips made by this project: noise (a fan), music (a small band) and speech (two sentences of the
    test split over a quiet fan); returns the words that are in each."""
    rng = np.random.default_rng(7)
    fan = noises.GENERATORS["noise"]["fan"](8 * RATE, rng)
    band = noises.GENERATORS["music"]["band"](10 * RATE, rng)
    sentences = [synthesis.draw_sentence(random.Random(seed), "test") for seed in (11, 15)]
    voices = (synthesis.Voice("en-us", "m3", 160, 45), synthesis.Voice("en-gb-x-rp", "f2", 165, 55))
    pause = np.zeros(int(0.6 * RATE), np.float32)
    parts = [
        part for text, voice in zip(sentences, voices, strict=True) for part in (pause, _say(text, voice))
    ]
    speech = augmentation.mix_at_snr(np.concatenate([*parts, pause]), fan, 15)
    for name, audio in (("noise", fan), ("music", band), ("speech", speech)):
        write_flac(folder / f"{name}.flac", augmentation.at_peak(np.asarray(audio, np.float32), 0.5))
    return {"noise": "", "music": "", "speech": " ".join(sentences)}


def _say(text: str, voice: synthesis.Voice) -> np.ndarray:
    return augmentation.at_peak(synthesis.speak(text, voice).audio, 0.6)


def write_json(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def bundle_model(checkpoint: Path, out: Path) -> None:
    """Writes out/whisper.safetensors and out/demo/."""
    from calibration.mini_whisper import full_whisper

    model, ids, recipe = full_whisper(checkpoint)
    for parameter in model.parameters():  # what the file holds: the hash must be of the model as loaded
        parameter.data = parameter.data.half().float()
    demo = make_demo(out / "demo")
    metadata = {
        "base_model": out.name,
        "licence": LICENCE,
        "sources": SOURCES,
        "recipe": recipe,
        "encoder_sha256": encoder_sha256(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "captions": [text for _, text in grammar.CAPTIONS],
        "demo": demo,
    }
    pack_model(model, out / "whisper.safetensors", ids, metadata)
    size = (out / "whisper.safetensors").stat().st_size / 2**20
    print(f"{out / 'whisper.safetensors'}: {size:.1f} MiB, {recipe['step']} steps")


def corpus_facts(corpus: Path) -> dict[str, object]:
    """Clips and hours of every kind of shard in a corpus folder."""
    facts: dict[str, object] = {}
    for kind in ("speech", "nonspeech", "realspeech", "realnonspeech"):
        if list(corpus.glob(f"{kind}_[0-9]*.jsonl")):
            records = synthesis.Shards.open(corpus, kind).records
            hours = sum(record["samples"] for record in records) / RATE / 3600
            facts[kind] = {"clips": len(records), "hours": round(hours, 2)}
    return facts


def measure(model_name: str, data_dir: Path | None, quick: bool = False) -> dict[str, dict[str, object]]:
    """set -> metrics of plain `whisper.transcribe` (default thresholds, greedy) on the test split."""
    from calibration.corpus import describe, eval_sets
    from calibration.decoding import iterate_transcripts
    from calibration.evaluate import nonspeech_metrics, speech_metrics
    from whisper_steer.zoo import load_model

    model = load_model(model_name, device="cpu")
    sets = eval_sets("test", data_dir, quick)
    facts = describe(sets)
    result: dict[str, dict[str, object]] = {}
    for name, clips in sets.items():
        transcripts = list(iterate_transcripts(model, (clip.load() for clip in clips)))
        if clips[0].kind != "nonspeech":
            texts = [transcript.text for transcript in transcripts]
            row = speech_metrics([clip.text or "" for clip in clips], texts).row()
        else:
            row = nonspeech_metrics([transcript.outcome() for transcript in transcripts]).row()
        rounded = {key: round(value, 4) if value == value else None for key, value in row.items()}
        result[name] = facts[name] | rounded
        print(
            name,
            {key: rounded[key] for key in ("wer", "text_fpr", "nsp_fpr", "hr") if key in rounded},
            flush=True,
        )
    return result


def bundle_card(out: Path, corpus: Path, saes: Path, data_dir: Path | None, quick: bool = False) -> None:
    """Writes out/card.json from the model file, the SAEs' report and a measurement on the test split."""
    metadata = load_metadata(out / "whisper.safetensors", "model")
    report = saes / "report.json"
    if not report.is_file():
        raise FormatError(f"{report} does not exist: run python -m calibration.train first")
    measured = saes.parent / f"test-{metadata['encoder_sha256'][:12]}.json"
    if not measured.is_file():  # ten minutes: kept, so that a new steering does not measure the model again
        write_json(measured, measure(out.name, data_dir, quick))
    card = {
        "name": out.name,
        "what": "a Whisper (openai-whisper architecture, .en tokenizer) trained on synthetic speech",
        "licence": LICENCE,
        "sources": SOURCES,
        "dims": metadata["dims"],
        "encoder_sha256": metadata["encoder_sha256"],
        "recipe": metadata["recipe"],
        "corpus": corpus_facts(corpus),
        "made_with": "make weights",
        "test_at_alpha_0": json.loads(measured.read_text()),
        "saes": json.loads(report.read_text()),
        "steering": {
            path.stem: load_metadata(path, "steering").get("rates")
            for path in sorted(out.glob("steering*.safetensors"))
        },
    }
    write_json(out / "card.json", card)
    print(out / "card.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="write the model file and the demonstration clips")
    model.add_argument("--checkpoint", type=Path, default=Path("out/mini/checkpoint.pt"))
    card = commands.add_parser("card", help="measure the model and write card.json")
    card.add_argument("--corpus", type=Path, default=Path("out/corpus"))
    card.add_argument("--saes", type=Path, default=Path("out/saes"))
    card.add_argument("--data", dest="data_dir", type=Path, help="folder with real recordings")
    card.add_argument("--quick", action="store_true", help="a third of the test clips")
    for command in (model, card):
        command.add_argument("--out", type=Path, default=Path("sae_weights/mini.en"))
    options = parser.parse_args()
    if options.command == "model":
        bundle_model(options.checkpoint, options.out)
    else:
        bundle_card(options.out, options.corpus, options.saes, options.data_dir, options.quick)


if __name__ == "__main__":
    main()
