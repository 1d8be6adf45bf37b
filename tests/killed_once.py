"""main.py under torchrun, in whose first try something happens to rank 1 at step 8: killed, or told to stop (FAULT)."""

import os
import signal
import sys

import main
from training import session

original = session.Session.after_step


def after_step(self, lr, images):
    if self.training.step == 8 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if os.environ.get("FAULT") == "stop":
            os.kill(os.getpid(), signal.SIGUSR1)
        else:
            print("killing rank 1", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    return original(self, lr, images)


if __name__ == "__main__":
    session.Session.after_step = after_step
    sys.exit(main.main(sys.argv[1:]))
