"""One small case of the training benchmark, shared by its tests."""

from __future__ import annotations

from pathlib import Path

from benchmarks.training_contestants import OURS, Case, Contestant, Setting
from benchmarks.training_frames import FrameFiles

CASE = Case("tiny", "synthetic", 4, 8, 2, steps=6, timing_steps=3, untimed=1, train=40, held_out=20, batch=10)
FILES = FrameFiles(Path("train.npy"), Path("tuning.npy"), Path("held_out.npy"), "synthetic")
SETTING = Setting(Path("nowhere"), "cpu", "float32", 1)
FAST = Contestant("sparsify", "adam", "topk")
SLOW = Contestant("sparsify", "signum", "topk")
MINE = Contestant(OURS, "batchtopk", "batchtopk")
