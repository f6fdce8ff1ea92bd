"""SIGTERM to a program that saves before it ends: it is noted, and all processes hear of it."""

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

TERMINATED = 143  # exit status after SIGTERM, as shells have it: 128 + 15


class Terminated(SystemExit):
    """SIGTERM came: the checkpoint is saved, and the program ends with status 143."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


class Stop:
    """Whether SIGTERM came, to any process. Outside of it, as between two stages, SIGTERM does what it did before."""

    def __init__(self, accelerator: "Accelerator"):
        self.accelerator, self.signalled = accelerator, False

    def __enter__(self) -> "Stop":
        self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _note(self, *_: object) -> None:
        self.signalled = True

    def asked(self) -> bool:
        """The same answer in all processes."""
        if self.accelerator.num_processes == 1:
            return self.signalled
        import torch  # slow to import

        flag = torch.tensor(float(self.signalled), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)
