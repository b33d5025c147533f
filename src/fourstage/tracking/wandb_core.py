"""wandb-core, the process that W&B starts for this one and keeps until its end; it may be killed.

W&B never starts another one by itself: every later run of a multirun would fail.
"""

from __future__ import annotations

import atexit
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fourstage.tracking.wandb_settings import hidden

if TYPE_CHECKING:
    from wandb import Run


def begin_run(**options: Any) -> Run:
    """wandb.init, with a new wandb-core if the last one has ended since the run before."""
    import wandb

    with hidden():
        try:
            run = wandb.init(**options)
        except Exception as error:
            if isinstance(error, wandb.errors.Error) or not is_lost(error):
                raise
            end_core()
            run = wandb.init(**options)
    atexit.unregister(_end_core_at_exit)
    atexit.register(_end_core_at_exit)  # runs before W&B's own, which prints a traceback
    return run


def is_lost(error: BaseException) -> bool:
    """Whether an error of a call to W&B may mean that wandb-core has ended."""
    return isinstance(error, ConnectionError) or type(error).__module__.startswith("wandb.")


def end_core(code: int = 0) -> None:
    """End wandb-core, which may be gone, and forget it; `code` is for a run that is still open."""
    import wandb

    with suppress(Exception, SystemExit):
        wandb.teardown(exit_code=code)
    wandb.run = None  # or the next run would try to close it


def _end_core_at_exit() -> None:
    wandb = sys.modules["wandb"]
    if wandb.run is None:
        end_core()
