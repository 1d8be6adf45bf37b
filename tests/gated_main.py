"""main.py that stops before the steps of its GATES ("3,6") until the folder GATE has a file of that name, or it is told
to stop: so a test decides what happens during which step. Each process leaves ``at-STEP-RANK`` there, with its pid."""

import os
import sys
import time
from pathlib import Path

import main
from training import session

original = session.Session.after_step
folder, steps = Path(os.environ["GATE"]), set(map(int, os.environ["GATES"].split(",")))


def after_step(self, lr, images):
    step = self.training.step
    if step in steps:
        (folder / f"at-{step}-{self.topology.rank}").write_text(str(os.getpid()))
        while not (folder / str(step)).exists() and not self.agreement.stop_requested:
            time.sleep(0.02)
    return original(self, lr, images)


if __name__ == "__main__":
    session.Session.after_step = after_step
    sys.exit(main.main(sys.argv[1:]))
