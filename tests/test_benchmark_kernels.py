"""The kernel benchmark: rows, ratios, the roofline's counts, peers that cannot run, the page."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import kernels, kernels_contestants
from benchmarks.kernels import COLUMNS, Case, ask, main, measured, parse, peer_rows, row_of, with_ratio
from benchmarks.kernels_contestants import COMPILED, DENSE, OURS
from benchmarks.kernels_roofline import Roofline, cost
from benchmarks.peers.kernels_worker import Request, answer, made, nanoseconds

REQUEST = Request(8, 32, 4, 10, "float32", "cpu", 1, repeats=1, seconds=0.0, clock="wall")
TINY = Case(8, 32, 4, 10)


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch):
    request = Case.request
    monkeypatch.setattr(
        Case, "request", lambda *arguments: replace(request(*arguments), repeats=1, seconds=0.0)
    )


def test_rows_of_a_tiny_case(monkeypatch):
    monkeypatch.setattr(kernels_contestants, "compiler_problem", lambda device: "no compiler")
    options = parse(["--quick", "--threads", "1", "--peers", "nowhere"])
    rows = list(measured(replace(TINY, peers=True), "cpu", options, None))
    assert all(set(row) == set(COLUMNS) for row in rows)
    by = {(row["op"], row["impl"]): row for row in rows}
    for operation in ("encode-threshold", "encode-topk", "decode", "edit", "train"):
        mine, plain = by[operation, OURS], by[operation, DENSE]
        assert plain["ratio_to_dense"] == 1 and mine["ns_per_frame"] > 0
        assert mine["ratio_to_dense"] == pytest.approx(
            plain["ns_per_frame"] / mine["ns_per_frame"],
            rel=0.01,
            abs=0.001,  # rounded for the file
        )
        assert mine["ratio_to_roofline"] is None and mine["error"] is None
    assert by["edit", OURS]["k"] == 32 and by["decode", OURS]["k"] == 4  # 32: there are no 100 to edit
    assert by["decode", COMPILED]["error"] == "no compiler" and by["decode", COMPILED]["ns_per_frame"] is None
    assert by["decode", "sparsify"]["error"] == "no environment at nowhere/sparsify: run make bench-env"
    assert "CUDA" in by["decode", kernels.OPENAI]["error"]


def test_wrong_answers_are_not_timed(monkeypatch):
    right = kernels_contestants.kernels.encode
    monkeypatch.setattr(
        kernels_contestants.kernels, "encode", lambda x, W, b, **rule: right(1.01 * x, W, b, **rule)
    )
    with pytest.raises(RuntimeError, match="encode of whisper_steer differs from dense torch by"):
        kernels_contestants.check(REQUEST)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_right_answers_pass_in_every_dtype(dtype):
    """Dense torch itself, in bfloat16, would not: it rounds before it compares with the threshold."""
    request = replace(REQUEST, d=256, n=2048, k=20, dtype=dtype)
    kernels_contestants.check(request)
    size = made(request)
    exact = kernels_contestants.kernels.encode(size.x, size.W_enc, size.b_enc, theta=size.theta).dense()
    rounded = kernels_contestants.encode_threshold(size.x, size.W_enc, size.b_enc, size.theta).float()
    lost = float(((exact > 0) & (rounded == 0)).sum() / (exact > 0).sum())
    assert lost > 0.005 if dtype == "bfloat16" else lost < 0.005


def test_made_up_codes_are_as_sparse_as_asked():
    size = made(replace(REQUEST, d=64, n=1000, k=20, frames=600))
    passing = (size.x @ size.W_enc.T > size.theta).sum(dim=1).float().mean()
    assert 15 < float(passing) < 25
    assert size.indices.shape == (600, 20) and size.indices[0].unique().numel() == 20


def test_an_operation_that_fails_has_a_reason():
    def broken():
        raise RuntimeError("no such kernel\nand more")

    found = answer(REQUEST, {"decode": broken, "edit": lambda: None})
    assert found["decode"] == "RuntimeError: no such kernel"
    row = row_of("decode", OURS, REQUEST, found["decode"], None)
    assert row["ns_per_frame"] is None and row["error"] == "RuntimeError: no such kernel"
    assert found["edit"] >= 0
    assert nanoseconds(lambda: None, replace(REQUEST, clock="cpu")) >= 0


def test_the_roofline_counts_what_must_move():
    request = Request(768, 6144, 50, 24_000, "bfloat16", "cuda", 1, 1, 0.0, "wall")
    moved, flop = cost("encode-threshold", request)
    assert flop == 2 * 24_000 * 768 * 6144
    assert moved == 2 * (24_000 * 768 + 6144 * 768) + 24_000 * 50 * 8
    moved, flop = cost("edit", replace(request, k=100))
    assert moved == 2 * (2 * 24_000 * 768 + 2 * 100 * 768)
    assert cost("decode", replace(request, frames=1))[0] == 2 * (768 + 50 * 768) + 50 * 8
    assert cost("train", request) is None
    # 2 bytes per nanosecond, 1000 FLOP per nanosecond: encoding is bound by the products
    roofline = Roofline(bandwidth=2e9, rate=1e12)
    assert roofline.nanoseconds("encode-threshold", request) == pytest.approx(2 * 768 * 6144 / 1000)
    assert roofline.nanoseconds("train", request) is None
    row = row_of("encode-threshold", OURS, request, 2 * 2 * 768 * 6144 / 1000, roofline)
    assert row["ratio_to_roofline"] == 0.5
    assert with_ratio(row, {"encode-threshold": 3 * row["ns_per_frame"]})["ratio_to_dense"] == 3


def fake_environment(folder: Path, script: str) -> None:
    python = folder / "sparsify" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)


def test_a_peer_answers_from_its_own_environment(tmp_path):
    fake_environment(tmp_path, 'echo noise; echo \'{"decode": 12.5, "encode-topk": "RuntimeError: no"}\'')
    assert ask("sparsify", REQUEST, tmp_path) == {"decode": 12.5, "encode-topk": "RuntimeError: no"}
    rows = {(r["op"], r["impl"]): r for r in peer_rows(TINY.operations, REQUEST, tmp_path, None)}
    assert rows["decode", "sparsify"]["ns_per_frame"] == 12.5
    assert rows["encode-topk", "sparsify"]["error"] == "RuntimeError: no"
    assert ("encode-threshold", "sparsify") not in rows  # it has none


def test_only_what_is_asked_for_runs():
    options = parse(["--quick", "--threads", "1", "--ops", "decode", "--alone"])
    rows = list(measured(replace(TINY, peers=True), "cpu", options, None))
    assert [(row["op"], row["impl"]) for row in rows] == [("decode", DENSE), ("decode", OURS)]


@pytest.mark.parametrize(
    ("script", "message"),
    [("echo ImportError: no sparsify >&2; exit 3", "ImportError: no sparsify"), ("echo", "no figures")],
)
def test_a_peer_that_fails_says_why(tmp_path, script, message):
    fake_environment(tmp_path, script)
    assert message in ask("sparsify", REQUEST, tmp_path)


def test_the_command_writes_rows_and_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "CPU_QUICK", (replace(TINY, operations=("decode",)),))
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels_contestants, "compiler_problem", lambda device: "no compiler")
    page, rows = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text(f"before\n{kernels.BEGIN}\nold\n{kernels.END}\nafter\n")
    assert main(["--quick", "--threads", "1", "--json", str(rows), "--markdown", str(page)]) == 0
    found = json.loads(rows.read_text())
    assert [row["impl"] for row in found] == [DENSE, COMPILED, OURS]
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "No GPU was at hand" in text and "| decode | 4 | **whisper_steer** |" in text
    assert "not run: no compiler" in capsys.readouterr().out


def test_wrong_arguments_end_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: False)
    assert main(["--devices", "cuda"]) == 2
    assert "--devices cuda: there is no CUDA device; leave it out" in capsys.readouterr().err
    assert main(["--threads", "2", "--clock", "cpu"]) == 2
    assert "--clock cpu with --threads 2: processor time needs --threads 1" in capsys.readouterr().err
    assert main(["--markdown", str(tmp_path / "none.md")]) == 2
    assert "give a page with the mark" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected one"):
        kernels.replaced("no marks", "block")
