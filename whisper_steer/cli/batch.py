"""The work of `whisper-steer transcribe`: many files, one model; a failure does not stop the others."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AudioError, UsageError, WhisperSteerError
from .decoding import check_word_options, fitting_language, known_options, language, temperatures
from .explain import print_explanation
from .output import print_error, print_json, print_transcript, transcript_record
from .progress import progress_bar
from .strength import announce, check_one

if TYPE_CHECKING:
    from ..transcribe import Transcript

logger = logging.getLogger("whisper_steer")

_WORD_OPTIONS = ("highlight_words", "max_line_count", "max_line_width", "max_words_per_line")


def run(args: dict[str, Any], writes: bool) -> int:
    """Transcribe everything; returns how many files failed. args: as parsed. Raises UsageError and the like
    only for what no file could be transcribed with."""
    check_one(args["alpha"], args["profile"])
    word_options = {name: args.pop(name) for name in _WORD_OPTIONS}
    check_word_options(word_options, args["word_timestamps"])
    fallback = temperatures(args.pop("temperature"), args.pop("temperature_increment_on_fallback"))
    output_dir, output_format = args.pop("output_dir"), args.pop("output_format")
    if writes:
        try:
            os.makedirs(output_dir, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output-dir {output_dir}: {error.strerror or error}") from error
    files, failures = _find(args.pop("audio"))
    if not files:
        return failures
    code = language(args.pop("language"))
    as_json, timestamps, keep = args.pop("as_json"), args.pop("verbose"), args.pop("keep_suppressed")
    explain, vad = args.pop("explain"), _vad(args)
    backend, reason = _backend(args)

    from whisper.utils import get_writer

    from ..attach import handles_of
    from ..transcribe import transcribe as transcribe_one

    model = _load(args, backend, keep, lends_gate=vad is not None)
    print(f"backend: {backend} ({reason})", file=sys.stderr)
    for handle in handles_of(model):
        announce(handle.profile, handle.alpha, handle.steering.measured(handle.alpha))

    writer = get_writer(output_format, output_dir) if writes else None
    written: dict[str, Path] = {}
    whisper_options = {
        **known_options(args),
        "backend": backend,
        "alpha": None if handles_of(model) else 0.0,  # None: as the model is steered
        "vad": vad,
        "language": fitting_language(model, code, args["task"]),
        "temperature": fallback,
    }
    for number, file in enumerate(files, start=1):
        counter = f"{number}/{len(files)} " if len(files) > 1 else ""
        try:
            if writes and written.setdefault(file.stem, file) != file:
                raise WhisperSteerError(
                    f"{file}: not transcribed, it would overwrite what {written[file.stem]} gave: "
                    "use another --output-dir"
                )
            with progress_bar(f"{counter}{file.name}") as progress:
                transcript = transcribe_one(file, model, progress=progress, **whisper_options)
            shown = transcript.with_suppressed() if keep else transcript
            if writer is not None:
                writer(shown.to_dict(), str(file), word_options)  # type: ignore[arg-type]
        except UsageError:
            raise
        except Exception as error:  # whatever it is, the other files go on
            failures += 1
            message = str(error) if isinstance(error, WhisperSteerError) else _unforeseen(file, error)
            logger.debug("%s", message, exc_info=True)
            print_error(message)
            if as_json:
                print_json({"file": str(file), "error": message}, indent=None)
            continue
        if as_json:
            print_json(transcript_record(str(file), shown), indent=None)
        elif timestamps or not writes:
            if len(files) > 1:
                print(f"==> {file} <==")
            print_transcript(transcript, timestamps=timestamps, keep_suppressed=keep)
        sys.stdout.flush()
        if explain:
            print_explanation(str(file), transcript)
        else:
            _note_suppressed(file, transcript, keep)
    return failures


def _find(given: list[str]) -> tuple[list[Path], int]:
    """(files, number of arguments that named none), each failure already reported."""
    from ..audio import find_audio

    files: dict[Path, None] = {}
    failures = 0
    for argument in given:
        try:
            files.update(dict.fromkeys(find_audio([argument])))
        except AudioError as error:
            print_error(str(error))
            failures += 1
    return list(files), failures


def _backend(args: dict[str, Any]) -> tuple[str, str]:
    """(the backend's name, why it and no other)."""
    from ..backends import BACKENDS, backend_for

    given = args.pop("backend")
    if given is not None and given not in BACKENDS:
        raise UsageError(f"--backend {given}: expected one of {', '.join(BACKENDS)}")
    if given is not None:
        return given, "asked for"
    return backend_for(args["model"], args["model_dir"])


def _vad(args: dict[str, Any]) -> str | None:
    from ..backends import VADS

    vad: str | None = args.pop("vad")
    if vad not in (None, *VADS):
        raise UsageError(f"--vad {vad}: expected {' or '.join(VADS)}")
    return vad


def _load(args: dict[str, Any], backend: str, keep: bool, lends_gate: bool) -> Any:
    """The backend's model, steered unless alpha is 0; takes the options that are about it out of `args`.
    keep: withheld windows are decoded, too. lends_gate: the steering's gate is needed at alpha 0, too."""
    import torch

    from ..attach import handles_of, steer
    from ..backends import make_backend
    from ..zoo import load_model

    threads = args.pop("threads")
    if threads:
        if threads < 0:
            raise UsageError(f"--threads {threads}: expected 0 (torch decides) or more")
        torch.set_num_threads(threads)
    strength = {name: args.pop(name) for name in ("alpha", "profile", "steering")}
    strength["decode_withheld"] = keep
    name = args.pop("model")
    place = {"device": args.pop("device"), "download_root": args.pop("model_dir")}
    if backend == "openai":
        model: Any = load_model(name, **place)
    else:
        model = make_backend(backend, name, **strength, **place, threads=threads or 0).load()
    needed = strength["alpha"] != 0 or strength["steering"] is not None or lends_gate
    if needed and not handles_of(model):
        steer(model, **strength)
    return model


def _note_suppressed(file: Path, transcript: Transcript, keep: bool) -> None:
    from ..withholding import LeftOut

    hint = "" if keep else "; --keep-suppressed decodes and shows them"
    left_out = [window for window in transcript.suppressed if isinstance(window, LeftOut)]
    withheld = [window for window in transcript.suppressed if not isinstance(window, LeftOut)]
    for windows, names, done in (
        (left_out, ("stretch", "stretches"), "left out"),
        (withheld, ("window", "windows"), "withheld"),
    ):
        if windows:
            seconds = sum((window.end or 0.0) - (window.start or 0.0) for window in windows)
            print(
                f"{file}: {len(windows)} {names[len(windows) > 1]} {done}, nobody speaks "
                f"({seconds:.1f} s){hint}",
                file=sys.stderr,
            )


def _unforeseen(file: Path, error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return f"{file}: {type(error).__name__}: {first_line}"
