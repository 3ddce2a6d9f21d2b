"""whisper-steer transcribe: openai-whisper's own command line, steered."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options, values
from .batch import run
from .values import number, optional_float, optional_int, str2bool


def transcribe(
    ctx: typer.Context,
    audio: Annotated[list[str], typer.Argument(metavar="FILES", help="Files, directories and globs.")],
    model: options.Model = "mini.en",
    alpha: options.Alpha = None,
    profile: options.Profile = None,
    steering: options.Steering = None,
    backend: options.Backend = None,
    vad: options.Vad = None,
    device: options.Device = None,
    keep_suppressed: Annotated[
        bool,
        typer.Option(
            "--keep-suppressed",
            help="Decode withheld windows, too; show their words, marked, and write them to files.",
        ),
    ] = False,
    explain: options.Explain = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per file and line on stdout, nothing else.")
    ] = False,
    output_dir: Annotated[
        str, typer.Option("--output-dir", "-o", help="Write files into this directory.")
    ] = ".",
    output_format: Annotated[
        Any,
        typer.Option(
            "--output-format",
            "-f",
            metavar="FORMAT",
            parser=values.output_format,
            help="Write files of this format: txt, vtt, srt, tsv, json or all.",
        ),
    ] = "all",
    verbose: Annotated[
        Any,
        typer.Option("--verbose", metavar="BOOL", parser=str2bool, help="Print times; False: words alone."),
    ] = True,
    model_dir: options.ModelDir = None,
    task: Annotated[
        Any,
        typer.Option(
            "--task", metavar="TASK", parser=values.task, help="transcribe, or translate (to English)."
        ),
    ] = "transcribe",
    language: options.Language = None,
    temperature: Annotated[
        Any, typer.Option("--temperature", metavar="NUMBER", parser=number, help="Temperature for sampling.")
    ] = 0.0,
    best_of: Annotated[
        Any,
        typer.Option("--best-of", metavar="INT", parser=optional_int, help="Candidates if temperature > 0."),
    ] = 5,
    beam_size: Annotated[
        Any,
        typer.Option("--beam-size", metavar="INT", parser=optional_int, help="Beams when temperature is 0."),
    ] = 5,
    patience: Annotated[
        Any,
        typer.Option(
            "--patience",
            metavar="NUMBER",
            parser=number,
            help="Beam search patience (arXiv 2204.05424); None is 1.",
        ),
    ] = None,
    length_penalty: Annotated[
        Any,
        typer.Option(
            "--length-penalty",
            metavar="NUMBER",
            parser=number,
            help="Token length penalty (arXiv 1609.08144); None: by length.",
        ),
    ] = None,
    suppress_tokens: Annotated[
        str, typer.Option("--suppress-tokens", help="Token ids never to write, by commas; -1: most symbols.")
    ] = "-1",
    initial_prompt: Annotated[
        str | None, typer.Option("--initial-prompt", help="Text to prompt the first window with.")
    ] = None,
    carry_initial_prompt: Annotated[
        Any,
        typer.Option(
            "--carry-initial-prompt",
            metavar="BOOL",
            parser=str2bool,
            help="Prompt every window with it, not only the first.",
        ),
    ] = False,
    condition_on_previous_text: Annotated[
        Any,
        typer.Option(
            "--condition-on-previous-text",
            metavar="BOOL",
            parser=str2bool,
            help="Prompt a window with the text of the one before.",
        ),
    ] = True,
    fp16: Annotated[
        Any, typer.Option("--fp16", metavar="BOOL", parser=str2bool, help="Half precision; not on the CPU.")
    ] = True,
    temperature_increment_on_fallback: Annotated[
        Any,
        typer.Option(
            "--temperature-increment-on-fallback",
            metavar="NUMBER",
            parser=optional_float,
            help="Step by which the temperature rises when decoding fails by the next two.",
        ),
    ] = 0.2,
    compression_ratio_threshold: Annotated[
        Any,
        typer.Option(
            "--compression-ratio-threshold",
            metavar="NUMBER",
            parser=optional_float,
            help="Decoding failed if the text's gzip ratio is above.",
        ),
    ] = 2.4,
    logprob_threshold: Annotated[
        Any,
        typer.Option(
            "--logprob-threshold",
            metavar="NUMBER",
            parser=optional_float,
            help="Decoding failed if the average log probability is below.",
        ),
    ] = -1.0,
    no_speech_threshold: Annotated[
        Any,
        typer.Option(
            "--no-speech-threshold",
            metavar="NUMBER",
            parser=optional_float,
            help="Silence if no_speech_prob is above and decoding failed by --logprob-threshold.",
        ),
    ] = 0.6,
    word_timestamps: Annotated[
        Any,
        typer.Option("--word-timestamps", metavar="BOOL", parser=str2bool, help="Times for every word."),
    ] = False,
    prepend_punctuations: Annotated[
        str, typer.Option("--prepend-punctuations", help="Merged with the next word.")
    ] = "\"'“¿([{-",
    append_punctuations: Annotated[
        str, typer.Option("--append-punctuations", help="Merged with the previous word.")
    ] = "\"'.。,，!！?？:：”)]}、",
    highlight_words: Annotated[
        Any,
        typer.Option(
            "--highlight-words",
            metavar="BOOL",
            parser=str2bool,
            help="Underline each word as it is spoken in srt and vtt (word timestamps).",
        ),
    ] = False,
    max_line_width: Annotated[
        Any,
        typer.Option(
            "--max-line-width",
            metavar="INT",
            parser=optional_int,
            help="Characters in a subtitle line (word timestamps).",
        ),
    ] = None,
    max_line_count: Annotated[
        Any,
        typer.Option(
            "--max-line-count",
            metavar="INT",
            parser=optional_int,
            help="Lines per subtitle (word timestamps).",
        ),
    ] = None,
    max_words_per_line: Annotated[
        Any,
        typer.Option(
            "--max-words-per-line",
            metavar="INT",
            parser=optional_int,
            help="Words in a subtitle (word timestamps).",
        ),
    ] = None,
    threads: Annotated[
        Any,
        typer.Option("--threads", metavar="INT", parser=optional_int, help="CPU threads; 0: torch's choice."),
    ] = 0,
    clip_timestamps: Annotated[
        str,
        typer.Option("--clip-timestamps", help="start,end,start,end,... in seconds: the parts to do."),
    ] = "0",
    hallucination_silence_threshold: Annotated[
        Any,
        typer.Option(
            "--hallucination-silence-threshold",
            metavar="NUMBER",
            parser=optional_float,
            help="Skip silence longer than this, in seconds, around doubtful words (word timestamps).",
        ),
    ] = None,
) -> None:
    """Print what is said in audio files, leaving out what Whisper would invent.

    The transcript goes to stdout, one line per segment. Files are written only when --output-dir or
    --output-format is given; the one not given is then "." or "all", as in openai-whisper, whose options are
    all accepted with the same meaning and defaults.

    Windows in which nobody speaks are withheld, not decoded, and counted on stderr; --keep-suppressed decodes
    them, too, and shows their words. So it is with the stretches that --vad gate leaves out.

    Exit code: 0 done, 1 a file failed (the others are still done), 2 wrong usage.
    """
    given = {
        name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    if run(dict(ctx.params), writes=bool(given & {"output_dir", "output_format"})):
        raise typer.Exit(1)
