"""The arithmetic of benchmarks.scaling on hand-computed cases, its traffic against the engine's, its page."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_frames import SyntheticFrames

from benchmarks import scaling, scaling_measure
from benchmarks.scaling_costs import (
    PAPER,
    Job,
    Speed,
    buffer_bytes,
    cache_bytes,
    checkpoint_bytes,
    encoder_flop,
    estimated_seconds,
    gradients_payload,
    gradients_traffic,
    job_flop,
    largest_share,
    sae_parameters,
    saes_traffic,
    seconds_alone,
    seconds_shared,
    training_bytes,
    training_flop,
)
from benchmarks.scaling_measure import RunPlan, Shape, Timing, small_run, timed
from benchmarks.scaling_rows import (
    BEGIN,
    END,
    disk_rows,
    duration,
    estimate_rows,
    job_rows,
    replaced,
    row,
    tables,
    traffic_rows,
    value_text,
)
from calibration.collectives import Collective
from calibration.engine import TrainingRun
from calibration.recipe import TrainConfig
from whisper_steer.errors import UsageError

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
JOB = Job(hours=2, layers=3, d_model=10, n_latents=20, k=4, batch=1000)
SPEED = Speed(audio=1.0, encode=9.0, train=0.5, part=0.2, filled=0.8)


# -- operations and sizes


def test_frames_and_steps_of_the_papers_run() -> None:
    assert PAPER.frames == 504_000_000
    assert PAPER.steps == 201_278  # 504,000,000 / 2504 = 201,277.96


def test_whisper_smalls_encoder_takes_338_gflop_a_window() -> None:
    # 12 blocks x (24 x 768^2 x 1500 + 4 x 1500^2 x 768) = 12 x (21.23 + 6.91) GFLOP
    assert encoder_flop(768, 12) == 12 * (21_233_664_000 + 6_912_000_000)
    assert encoder_flop(768, 12) / 1e9 == pytest.approx(338, abs=0.5)


def test_a_dense_step_takes_47_mflop_a_frame() -> None:
    assert training_flop(768, 6144) == 47_185_920


def test_operations_of_a_whole_job() -> None:
    encoding, training = job_flop(PAPER)
    assert encoding == 336_000 * 337_747_968_000
    assert training == 504_000_000 * 12 * 47_185_920


def test_bytes_of_an_sae() -> None:
    assert sae_parameters(10, 20) == 200 + 200 + 20 + 10
    assert training_bytes(10, 20) == 16 * 430
    assert checkpoint_bytes(10, 20) == 12 * 430 + 160


def test_caching_the_papers_run_takes_9_3_tb() -> None:
    assert cache_bytes(2800, 12, 768) == 504_000_000 * 12 * 768 * 2 == 9_289_728_000_000


def test_the_formulas_are_those_of_the_engine(tmp_path: Path) -> None:
    config = TrainConfig(k=(3,), expansion=(2,), batch=40, steps=20, buffer_batches=5)
    run = TrainingRun(SyntheticFrames(config.unit_frames), config, tmp_path)
    assert run.memory() == {
        "buffers": buffer_bytes(40, 5, layers=2, d_model=12),
        "saes": 2 * training_bytes(12, 24),
    }


# -- several processes


@pytest.mark.parametrize(
    ("saes", "processes", "most"), [(12, 1, 12), (12, 8, 2), (12, 4, 3), (3, 8, 1), (120, 8, 15), (10, 4, 3)]
)
def test_the_busiest_process(saes: int, processes: int, most: int) -> None:
    assert largest_share(saes, processes) == most


def test_the_busiest_process_is_the_engines(tmp_path: Path) -> None:
    config = TrainConfig(k=(2, 3, 4, 5, 6), expansion=(2,), batch=40, steps=4, shards=4)
    counts = [
        len(
            TrainingRun(
                SyntheticFrames(config.unit_frames),
                config,
                tmp_path,
                collective=Collective(rank, 4),
                split="saes",
            ).trainers
        )
        for rank in range(4)
    ]
    assert sum(counts) == 10
    assert max(counts) == largest_share(10, 4)


def test_traffic_of_gradients() -> None:
    # 3 SAEs x 430 parameters x 4 bytes; 3 x 4 x 1000 / 4 codes x 4 bytes; 3 x 20 flags
    assert gradients_payload(JOB, 4) == {"gradients": 5160, "candidates": 12_000, "flags": 60}
    assert gradients_traffic(JOB, 4) == 1.5 * 5220 + 3 * 12_000
    assert gradients_traffic(JOB, 1) == 0


def test_traffic_of_frames() -> None:
    # a layer's batch is 1000 x 10 x 2 bytes, of which three quarters travel
    assert saes_traffic(JOB, 4) == (3 * 15_000, 15_000)
    assert saes_traffic(JOB, 2) == (3 * 10_000, 2 * 10_000)
    assert saes_traffic(JOB, 1) == (0, 0)


@dataclass(frozen=True)
class Counting(Collective):
    """Two processes that are alike: counts the bytes this one hands over."""

    size: int = 2
    sent: dict[str, int] = field(default_factory=lambda: {"mean": 0, "any": 0, "joined": 0, "gathered": 0})

    def mean_(self, tensors):
        self.sent["mean"] += sum(tensor.nbytes for tensor in tensors)

    def sum(self, value):
        return 2 * value

    def any_(self, flags):
        self.sent["any"] += flags.numel()
        return flags

    def count(self, value):
        return 2 * value

    def joined(self, values):
        self.sent["joined"] += values.nbytes
        return np.concatenate([values, values])

    def gathered(self, value, owner):
        self.sent["gathered"] += value.nbytes * (owner != self.rank)
        return torch.cat([value, value]) if owner == self.rank else None


@pytest.mark.parametrize("split", ["gradients", "saes"])
def test_traffic_is_what_the_engine_hands_over(split: str, tmp_path: Path) -> None:
    steps, batch, k = 6, 40, 3
    config = TrainConfig(k=(k,), expansion=(2,), batch=batch, steps=steps, shards=2)
    counting = Counting()
    run = TrainingRun(SyntheticFrames(config.unit_frames), config, tmp_path, collective=counting, split=split)
    run.train(progress=False)
    job = Job(hours=1, layers=2, d_model=12, n_latents=24, k=k, batch=batch)
    if split == "gradients":
        payload = gradients_payload(job, 2)
        assert counting.sent["mean"] == steps * payload["gradients"]
        assert counting.sent["any"] == steps * payload["flags"]
        assert counting.sent["joined"] >= steps * payload["candidates"] * 0.99
        assert counting.sent["gathered"] == 0
    else:
        # this process owns one of the two layers and sends its half of the other's frames; with 20 domains
        # of a byte each it does so for the log
        total, busiest = saes_traffic(job, 2)
        assert total == 2 * busiest == 2 * 480
        assert counting.sent["gathered"] == steps * (busiest + batch // 2)
        assert counting.sent["mean"] == counting.sent["joined"] == 0


# -- time


def test_time_on_one_machine() -> None:
    # 2 h / 0.8 x (1 + 9) s; 360 steps x 3 SAEs x 0.5 s
    assert seconds_alone(JOB, SPEED) == (25.0, 540.0)


def test_time_on_several_machines() -> None:
    assert seconds_shared(JOB, SPEED, 2, "gradients") == (12.5, pytest.approx(360 * 3 * 0.2))
    assert seconds_shared(JOB, SPEED, 2, "saes") == (12.5, 360 * 2 * 0.5)


def test_estimates_from_operations() -> None:
    encoding, training = job_flop(PAPER)
    assert estimated_seconds(PAPER, 1e15, 0.1) == pytest.approx((encoding + training) / 1e14)
    # 8 processes: an eighth of the audio, 2 of 12 SAEs
    assert estimated_seconds(PAPER, 1e15, 0.1, 8) == pytest.approx((encoding / 8 + training / 6) / 1e14)


def test_gpus_are_estimated_and_say_so() -> None:
    rows = estimate_rows()
    gpus = [found for found in rows if found["basis"] == "estimated"]
    assert len(gpus) == 6
    assert all(found["high"] == pytest.approx(6 * found["value"]) for found in gpus)  # 5 to 30 %
    assert all("5% to 30%" in found["how"] for found in gpus)
    published = next(found for found in rows if found["basis"] == "published")
    assert published["value"] == pytest.approx(504e6 * 12 / 333_000)
    assert not any(found["basis"] == "measured" for found in rows)


def test_a_gpu_does_not_wait_for_the_audio() -> None:
    on_gpu = job_rows("a GPU", Speed(0.0, 9.0, 0.5, 0.2, 1.0), "cuda", JOB)
    assert [found["value"] for found in on_gpu[:3]] == [18.0, 540.0, 558.0]
    assert "1 GPU: encoding, one pass" in on_gpu[0]["name"]


# -- measuring


def test_timings_leave_the_first_calls_out() -> None:
    calls: list[int] = []
    found = timed(lambda: calls.append(1), repeats=3, untimed=2)
    assert (len(calls), len(found.values)) == (5, 3)
    assert Timing((1.0, 5.0, 2.0)).times(10).median == 20


def test_a_small_run_reports_its_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def frames(d_model, count):
        return torch.randn(count, d_model, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(scaling_measure, "made_up_frames", frames)
    found = small_run(RunPlan(Shape(8, 16, 2), 2, 3, 6, None, "cpu", 1, batch=20), tmp_path)
    assert found.planned == {"buffers": 2 * 60 * 2 * 8 * 2, "saes": 2 * training_bytes(8, 16)}
    assert found.unit_planned == 60 * (2 * 8 * 2 + 1)
    assert 0 < found.unit - found.unit_planned < 4000
    assert 0 < found.checkpoint - 2 * checkpoint_bytes(8, 16) < 8000  # names and settings
    assert (found.frames, found.saes, found.device_peak) == (120, 2, 0)


def test_made_up_recordings_fill_windows(tmp_path: Path) -> None:
    scaling_measure.write_recordings(tmp_path, count=2)
    window = scaling_measure.plan_of(tmp_path).window(0, 0, 0)
    assert 15 * 16_000 <= len(window.audio) <= 30 * 16_000
    assert {domain for _, _, domain in window.pieces} <= {"music", "sounds"}


# -- rows and page


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.3141, "0.314 s"), (119, "119 s"), (600, "10.0 min"), (18_162, "5.0 h"), (1_000_000, "11.6 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_row_shows_its_range_in_its_unit() -> None:
    assert value_text(row("s", "n", 9.3e12, "B", "derived")) == "9.3 TB"
    assert value_text(row("s", "n", 3600 * 3, "s", "estimated", high=3600 * 18)) == "3.0 h to 18.0 h"


def test_tables_have_a_heading_for_each_section() -> None:
    text = tables([row("A", "x", 1, "s", "measured", "how"), row("B", "y", 2, "B", "derived"),
                   row("A", "z", 3, "s", "measured")])  # fmt: skip
    assert text.count("### ") == 2
    assert "| x | 1 s | measured | how |\n| z | 3 s | measured |  |" in text


def test_every_derived_table_can_be_drawn() -> None:
    text = tables([*traffic_rows(), *disk_rows(), *estimate_rows()])
    assert "| cache of all frames | 9.3 TB | derived |" in text
    assert "| 12 SAEs in training | 1.8 GB | derived |" in text


def test_the_marked_block_is_replaced_and_nothing_else() -> None:
    page = f"above\n{BEGIN}\nold\n{END}\nbelow\n"
    once = replaced(page, "new")
    assert once == f"above\n{BEGIN}\nnew\n{END}\nbelow\n"
    assert replaced(once, "new") == once


def test_a_page_without_marks_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(UsageError, match="expected one <!-- begin"):
        scaling.run(scaling.parse(["--markdown", str(page)]))
    with pytest.raises(UsageError, match="No such file"):
        scaling.run(scaling.parse(["--markdown", str(tmp_path / "absent.md")]))


@pytest.mark.skipif(not PAGE.exists(), reason="docs/ is not part of this copy")
def test_the_commands_of_the_page_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    from calibration import frame_cache, train

    text = PAGE.read_text(encoding="utf-8")
    replaced(text, "")  # has its marks
    commands = [line for block in re.findall(r"```\n(.*?)```", text, re.S) for line in block.splitlines()]
    assert len(commands) >= 8
    seen = set()
    for line in commands:
        module, arguments = re.search(r"-m (calibration\.\w+) (.*)", line).groups()
        seen.add(module)
        if module == "calibration.train":
            options = train.parser().parse_args(shlex.split(arguments))
            if options.shards:
                assert (options.batch or 2500) % options.shards == 0
        elif module == "calibration.frame_cache":
            assert frame_cache.parse_args(shlex.split(arguments)).ray
    assert seen == {"calibration.train", "calibration.frame_cache", "calibration.hallucinations"}
