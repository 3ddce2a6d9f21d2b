"""The kernel benchmark's page: rows with one thread and two, and nothing on it that is not a row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import kernels, kernels_break_even, kernels_contestants, kernels_page
from benchmarks.kernels import COLUMNS, Case, parse
from benchmarks.kernels_contestants import DENSE, OURS
from benchmarks.kernels_page import BEGIN, COMMAND, END, HEADER, foreign, replaced, table
from whisper_steer.kernels import choice

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
BAR = "cpu, d 768, n 6144, k 50, float32:  33%|███▎      | 1/3 [01:59<03:58, 119.26s/size]"


def row(**given):
    usual = dict.fromkeys(COLUMNS) | {
        "op": "decode", "impl": OURS, "device": "cpu", "dtype": "float32", "d": 8, "n": 32, "k": 4,
        "frames": 10, "threads": 1, "ns_per_frame": 3000.0,
    }  # fmt: skip
    return usual | given


def test_two_threads_beside_one():
    rows = [
        row(ratio_to_dense=2.0),
        row(op="encode-topk", k=4, impl=DENSE),
        row(threads=2, ns_per_frame=2000.0),
        row(impl="sparsify", ns_per_frame=None, error="ImportError: a|b\n 50%|██ | 1/2\r"),
    ]
    assert table(rows).splitlines() == [
        "### cpu, float32: d 8, 32 latents, 10 frames", "", HEADER, "|---|---|---|---|---|---|---|---|",
        f"| encode-topk | 4 | {DENSE} | 1 | 3 |  |  |  |",
        f"| decode | 4 | **{OURS}** | 1 | 3 | 2.00 |  |  |",
        "| decode | 4 | sparsify | 1 | not run: ImportError: a/b 50%/██ / 1/2 |  |  |  |",
        f"| decode | 4 | **{OURS}** | 2 | 2 |  | 1.50 |  |",
    ]  # fmt: skip


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_a_progress_bar_does_not_get_onto_a_page(end):
    text, block = f"{BEGIN}\n{END}\n", f"{COMMAND}` on it\n\n{table([row()])}"
    assert foreign(block) == [] and table([row()]) in replaced(text, block)
    with pytest.raises(ValueError, match="the block has a line that is no row of a table: 'cpu, d 768"):
        replaced(text, f"{BAR}{end}{block}")


def test_the_page_of_this_repository_holds_rows_alone():
    text = PAGE.read_text(encoding="utf-8")
    assert replaced(text, "") != text
    assert foreign(text[text.index(BEGIN) + len(BEGIN) : text.index(END)]) == []


def test_progress_goes_to_stderr_and_rows_are_kept_as_they_come(tmp_path, monkeypatch, capsys):
    cases = tuple(Case(8, 32, k, 10, operations=("decode",)) for k in (4, 2))
    request = Case.request
    monkeypatch.setattr(Case, "request", lambda *a: replace(request(*a), repeats=1, seconds=0.0))
    monkeypatch.setattr(kernels, "CPU_QUICK", cases)
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: False)
    kept = []
    write = kernels.write_whole
    monkeypatch.setattr(
        kernels, "write_whole", lambda path, text: kept.append((path.name, text)) or write(path, text)
    )
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{BAR}\n{END}\n")
    arguments = ["--quick", "--alone", "--threads", "1", "2", "--json", str(tmp_path / "rows.json")]
    assert kernels.main([*arguments, "--markdown", str(page)]) == 0
    printed = capsys.readouterr()
    assert page.read_text() == f"{BEGIN}\n{printed.out.strip()}\n{END}\n"
    assert "size" not in printed.out and foreign(printed.out) == []
    assert "cpu float32, d 8, n 32, 2 threads: decode, whisper_steer: " in printed.err
    assert [name for name, _ in kept] == ["rows.json", "rows.json", "page.md"]
    assert [len(json.loads(text)) for name, text in kept[:2]] == [4, 8]
    assert [r["threads"] for r in json.loads(kept[1][1])] == [1, 1, 2, 2] * 2


def test_a_limit_ends_it(monkeypatch):
    options = parse(["--quick", "--threads", "1", "--peers", "nowhere"])
    assert options.limit == kernels.QUICK_SECONDS < 300 and parse(["--threads", "1"]).limit == float("inf")
    monkeypatch.setattr(kernels_contestants, "compiler_problem", lambda device: "no compiler")
    options.deadline = 0.0
    rows = list(kernels.measured(Case(8, 32, 4, 10, peers=True), "cpu", options, None))
    assert {r["impl"] for r in rows} >= {DENSE, OURS, "sparsify", "sae_lens", kernels.OPENAI}
    assert {r["error"] for r in rows} == {kernels.LATE}


def test_the_default_is_one_thread_and_two(monkeypatch):
    monkeypatch.setattr(kernels.os, "cpu_count", lambda: 8)
    assert parse([]).threads == [1, 2]
    assert parse(["--clock", "cpu"]).threads == [1]
    assert parse(["--threads", "3"]).threads == [3]


def test_a_checkout_of_openais_path_answers(tmp_path):
    package = tmp_path / "openai" / "sparse_autoencoder"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "model.py").write_text("raise RuntimeError('a checkout of something else')")
    request = Case(8, 32, 4, 10).request("cpu", parse(["--quick"]))
    assert kernels.ask("openai", request, tmp_path) == "RuntimeError: a checkout of something else"
    assert kernels.ask("openai", request, tmp_path, 0.0) == kernels.LATE
    assert "git clone https://github.com/openai/" in kernels.ask("openai", request, tmp_path / "none")


def test_break_even_is_printed_beside_the_constant(monkeypatch, capsys):
    monkeypatch.setattr(choice, "BREAK_EVEN", dict(choice.BREAK_EVEN))
    found = iter([0.213, 0.5, 0.0])
    monkeypatch.setattr(choice, "measure_break_even", lambda *a, **k: next(found))
    assert kernels_break_even.main(["--dtypes", "float32", "--n", "1000"]) == 0
    limits = [100 * choice.BREAK_EVEN[name, "cpu", kernels.torch.float32] for name in choice.BY_DENSITY]
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"| decode | float32 | 21 % | {limits[0]:.3g} % |",
        f"| products | float32 | above 50 % | {limits[1]:.3g} % |",
        f"| weight_gradient | float32 | 0 % | {limits[2]:.3g} % |",
    ]
    assert kernels_break_even.main(["--clock", "cpu", "--threads", "2"]) == 2
    assert "--clock cpu measures one thread" in capsys.readouterr().err
    assert kernels_page.cell("a\n b") == "a b"
