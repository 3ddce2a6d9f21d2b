"""The run of test_calibration_engine in a process of its own: OUT, seconds to wait after a step, split."""

import sys
import time
from pathlib import Path

from engine_frames import SyntheticFrames
from test_calibration_engine import GRID

from calibration.collectives import connected
from calibration.engine import TrainingRun


def main() -> None:
    out, pause, split = Path(sys.argv[1]), float(sys.argv[2]), [*sys.argv[3:], "gradients"][0]
    with connected() as collective:
        run = TrainingRun(SyntheticFrames(GRID.unit_frames), GRID, out, collective=collective, split=split)
        run.resume()
        print("training", flush=True)
        run.train(progress=False, after_step=lambda _: time.sleep(pause))


if __name__ == "__main__":
    main()
