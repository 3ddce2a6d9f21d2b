"""What the two papers report, as tables to be filled with what is measured here.

AudioSAE (arXiv 2602.05027v2, EACL 2026): Table 2, and the appendix's tables on the classifier and on
steering (6 to 13). The figures come from reading notes of the paper, which keep the appendix's figures but
not the number of every table, nor all of them; so the appendix is grouped here by what is measured, and three
groups cover tables 6 to 13 together: the classifier's F1, S-vectors, SAE steering. The follow-up (arXiv
2606.07473, Interspeech 2026): its table of hallucination rates, from secondary digests. A cell without a
figure at hand is measured all the same.

Rates are fractions (0.051 is a WER of 5.1 %).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

AUDIOSAE = "arXiv 2602.05027v2"
FOLLOW_UP = "arXiv 2606.07473, from secondary digests"
MUSAN, FSD50K, WHAM, US8K, ESC50, LIBRISPEECH = (
    "MUSAN", "FSD50K", "WHAM!", "UrbanSound8K", "ESC-50", "LibriSpeech",
)  # fmt: skip
ALL = "all"  # the follow-up's three test sets joined
VECTOR_SETS = (MUSAN, FSD50K, WHAM)  # where AudioSAE's vectors come from
FOLLOW_UP_SETS = (US8K, WHAM, FSD50K)
LATENTS = (1, 5, 10, 100)
ALPHAS = (0.5, 1.0, 3.0)
FEATURES = (0, 1000, 100, 10, 5, 1)  # the classifier's; 0 is all

# which layer, as `benchmarks.reproduce_fit.layers_of` reads it
LAST, EIGHTH, TWO = "last", "block 8 of 12", "blocks 26 and 32 of 32"


@dataclass(frozen=True)
class Condition:
    """One row: what is done to the model.

    method: "plain"; "reconstruction" (the SAE in the path, nothing steered); "s-vector" and "audiosae"
    (AudioSAE's mean difference and SAE steering); "activation" and "latents" (the follow-up's); "classifier"
    (AudioSAE's logistic regression, which steers nothing).
    vector: the data set that the vector is fitted on; "" for the follow-up's, fitted on all three.
    k: number of latents or features, 0: not asked or all. alpha: the paper's strength. where: the layer.
    """

    method: str
    vector: str = ""
    k: int = 0
    alpha: float = 0.0
    where: str = LAST

    @property
    def key(self) -> str:
        """Unlike any other condition's; stays the same from run to run."""
        return f"{self.method}|{self.vector}|{self.k}|{self.alpha:g}|{self.where}"

    @property
    def label(self) -> str:
        """As a row of a printed table is called."""
        if self.method == "classifier":
            return f"{self.k} features" if self.k > 1 else "1 feature" if self.k else "all features"
        names = {
            "plain": "plain",
            "reconstruction": "SAE in the path, no steering",
            "s-vector": "S-vector",
            "audiosae": "SAE",
            "activation": "activation vector",
            "latents": "SAE latents",
        }
        parts = [names[self.method]]
        parts += [self.vector] if self.vector else []
        parts += [f"k {self.k}"] if self.k else []
        parts += [f"α {self.alpha:g}"] if self.alpha else []
        parts += ["two layers"] if self.where == TWO else []
        return ", ".join(parts)


Cell = tuple[Condition, str, str]  # condition, data set, measure


@dataclass(frozen=True)
class Table:
    """A table of a paper.

    Attributes:
        id: short name, the "table" of a JSON row.
        columns: (data set, measure); measures: "nsp_fpr" (share of clips with no_speech_prob < 0.5), "hr"
            (the skip rule keeps the clip), "text_fpr", "tpr" (nsp_fpr's event on speech), "wer", "f1".
        figures: (lowest, highest) published, by cell; equal ends unless the paper gives a range.
        model: the model they were published for.
        note: what to know before comparing.
    """

    id: str
    title: str
    source: str
    model: str
    rows: tuple[Condition, ...]
    columns: tuple[tuple[str, str], ...]
    figures: Mapping[Cell, tuple[float, float]]
    note: str = ""

    def cells(self) -> Iterator[Cell]:
        """Every cell, row by row."""
        for row in self.rows:
            for column in self.columns:
                yield (row, column[0], column[1])


def _published(
    row: Condition, columns: tuple[tuple[str, str], ...], *values: float | tuple[float, float] | None
) -> dict[Cell, tuple[float, float]]:
    """Figures of one row, in the order of `columns`; a pair is a range."""
    found: dict[Cell, tuple[float, float]] = {}
    for column, value in zip(columns, values, strict=True):
        if value is not None:
            found[row, column[0], column[1]] = value if isinstance(value, tuple) else (value, value)
    return found


_APPENDIX = "AudioSAE, tables 6-13, those on"
_NUMBERS = "the notes at hand do not say which number each of the paper's tables 6-13 has"
_PLAIN = Condition("plain")
_IN_PATH = Condition("reconstruction")
_FPR = tuple((name, "nsp_fpr") for name in VECTOR_SETS)
_FPR_AND_WER = (*_FPR, (LIBRISPEECH, "wer"))


def _table_2() -> Table:
    vector = Condition("s-vector", MUSAN, alpha=3.0)
    gentle, strong = (Condition("audiosae", FSD50K, 100, alpha) for alpha in (1.0, 3.0))
    columns = _FPR_AND_WER
    return Table(
        "audiosae-2",
        "AudioSAE, Table 2: false positives and recognition",
        AUDIOSAE,
        "small",
        (_PLAIN, _IN_PATH, vector, gentle, strong),
        (*columns, (US8K, "nsp_fpr"), (ESC50, "nsp_fpr"), (LIBRISPEECH, "tpr")),
        _published(_PLAIN, columns, 0.33, 0.27, 0.51, 0.051)
        | _published(_IN_PATH, columns, 0.31, (0.24, 0.26), 0.36, 0.052)
        | _published(vector, columns, 0.20, 0.15, 0.32, 0.053)
        | _published(gentle, columns, 0.12, 0.09, 0.14, 0.055)
        | _published(strong, columns, 0.00, 0.01, 0.03, 0.984),
        "last layer, as the caption says",
    )


def _by_the_text() -> Table:
    """The rows of Table 2 by the rates that the paper does not report."""
    rates = [(name, rate) for rate in ("hr", "text_fpr") for name in VECTOR_SETS]
    return Table(
        "audiosae-2-text",
        "The rows of Table 2 by what is written: HR (the skip rule keeps it), text-FPR (words come out)",
        AUDIOSAE,
        "small",
        _table_2().rows,
        tuple(rates),
        {},
        "not in the paper, which looks at no_speech_prob alone; raising it need not stop words",
    )


def _classifier() -> Table:
    rows = tuple(Condition("classifier", k=count, where=EIGHTH) for count in FEATURES)
    columns = tuple((name, "f1") for name in VECTOR_SETS)
    by_set = (
        (0.72, 0.74, 0.67, 0.55, 0.42, 0.33),
        (0.72, 0.74, 0.73, 0.55, 0.51, 0.35),
        (0.82, 0.83, 0.82, 0.80, 0.73, 0.70),
    )
    figures: dict[Cell, tuple[float, float]] = {}
    for row, *values in zip(rows, *by_set, strict=True):
        figures |= _published(row, columns, *values)
    return Table(
        "audiosae-classifier",
        f"{_APPENDIX} the classifier: F1 by number of features",
        AUDIOSAE,
        "small",
        rows,
        columns,
        figures,
        f"{_NUMBERS}; here out of fold: features are chosen inside each of five folds",
    )


def _s_vectors() -> Table:
    rows = tuple(
        Condition("s-vector", vector, alpha=alpha, where=EIGHTH) for vector in VECTOR_SETS for alpha in ALPHAS
    )
    return Table(
        "audiosae-s-vector",
        f"{_APPENDIX} S-vectors (rows: fitted on; columns: measured on)",
        AUDIOSAE,
        "small",
        rows,
        _FPR_AND_WER,
        {},
        f"{_NUMBERS}; published figures at hand are those of Table 2",
    )


def _sae_steering() -> Table:
    def row(vector: str, k: int, alpha: float) -> Condition:
        return Condition("audiosae", vector, k, alpha, EIGHTH)

    fpr = {
        (100, 1.0): ((0.20, 0.16, 0.32), (0.12, 0.09, 0.13), (0.26, 0.20, 0.29)),
        (100, 3.0): ((0.01, 0.01, 0.04), (0.00, 0.00, 0.00), (0.00, 0.01, 0.00)),
        (10, 3.0): ((0.20, 0.16, 0.32), (0.19, 0.14, 0.24), (0.25, 0.19, 0.30)),
        (1, 3.0): ((0.28, 0.22, 0.44), (0.31, 0.24, 0.47), (0.34, 0.28, 0.54)),
    }
    wer = {MUSAN: (0.053, 0.054, 0.139), FSD50K: (0.053, 0.055, 0.984), WHAM: (0.054, 0.064, 0.975)}
    figures: dict[Cell, tuple[float, float]] = {}
    for (k, alpha), by_vector in fpr.items():
        for vector, values in zip(VECTOR_SETS, by_vector, strict=True):
            figures |= _published(row(vector, k, alpha), _FPR, *values)
    for vector in VECTOR_SETS:
        for alpha, value in zip(ALPHAS, wer[vector], strict=True):
            figures |= _published(row(vector, 100, alpha), _FPR_AND_WER[3:], value)
            for k in LATENTS[:-1]:
                figures |= _published(row(vector, k, alpha), _FPR_AND_WER[3:], (0.052, 0.055))
    return Table(
        "audiosae-sae",
        f"{_APPENDIX} SAE steering, k {', '.join(map(str, LATENTS))} (rows: fitted on; columns: measured on)",
        AUDIOSAE,
        "small",
        tuple(row(vector, k, alpha) for k in LATENTS for alpha in ALPHAS for vector in VECTOR_SETS),
        _FPR_AND_WER,
        figures,
        f"{_NUMBERS}; WER for k <= 10 is published as a range over all of them",
    )


def _follow_up(model: str) -> Table:
    hr = tuple((name, "hr") for name in (*FOLLOW_UP_SETS, ALL))
    columns = (*hr, (LIBRISPEECH, "wer"))
    rows: tuple[Condition, ...]
    if model == "large-v3":
        vector = Condition("activation", alpha=2.0)
        one, two = Condition("latents", k=10, alpha=5.0), Condition("latents", k=10, alpha=3.5, where=TWO)
        rows = (_PLAIN, vector, one, two)
        figures = (
            _published(_PLAIN, columns, 0.9598, 0.9204, 0.7508, 0.8688, 0.0211)
            | _published(vector, columns, 0.9021, 0.8946, 0.7012, 0.8237, 0.0411)
            | _published(one, columns, 0.3068, 0.2513, 0.3068, 0.2903, 0.0238)
            | _published(two, columns, 0.1988, 0.2705, 0.3392, 0.2733, 0.0370)
        )
        note = "latents per layer of the two-layer row: taken as in the one-layer row"
    else:
        vector, one = Condition("activation", alpha=8.0), Condition("latents", k=25, alpha=3.0)
        rows = (_PLAIN, vector, one)
        figures = _published(_PLAIN, columns, 0.6709, 0.6693, 0.8195, 0.7263, None) | _published(
            one, columns, 0.0868, 0.0468, 0.2612, 0.1411, None
        )
        note = "WER of small under steering is published as about unchanged"
    text = tuple((name, "text_fpr") for name in (*FOLLOW_UP_SETS, ALL))
    title = f"Follow-up: hallucination rate (HR) of {model}; text-FPR beside it is not in the paper"
    return Table("follow-up", title, FOLLOW_UP, model, rows, (*columns, *text), figures, note)


def tables_for(encoder_layers: int) -> tuple[Table, ...]:
    """All tables; the follow-up's with large-v3's rows and figures for an encoder of 32 blocks, else
    small's."""
    return (
        _table_2(),
        _by_the_text(),
        _classifier(),
        _s_vectors(),
        _sae_steering(),
        _follow_up("large-v3" if encoder_layers == 32 else "small"),
    )
