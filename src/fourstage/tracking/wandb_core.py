"""wandb-core, the process that W&B starts for this one and keeps until its end; it may be killed.

W&B never starts another one by itself: every later run of a multirun would fail.
"""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourstage.errors import UserError
from fourstage.interruptions import AGAIN, disk_full
from fourstage.tracking.wandb_log import mended
from fourstage.tracking.wandb_settings import hidden

if TYPE_CHECKING:
    from wandb import Run


def begin_run(**options: Any) -> Run:
    """wandb.init, with a new wandb-core if the last one has ended since the run before, or doesn't
    start; the options have an id, and a folder `dir`. Raises UserError if the new one ends too;
    wandb.errors.Error is the server's."""
    import wandb

    try:
        with hidden():
            run = wandb.init(**options)
    except Exception as error:
        if not is_of_core(error):
            raise
        end_core()
        mended(Path(options["dir"]) / "wandb", options["id"])  # it may have made a folder
        try:
            with hidden():
                run = wandb.init(**options)
        except Exception as again:
            if not is_of_core(again):
                raise
            end_core()
            raise UserError(disk_full(again) or what_ended(again)) from again
    atexit.unregister(_end_core_at_exit)
    atexit.register(_end_core_at_exit)  # runs before W&B's own, which prints a traceback
    return run


def is_of_core(error: BaseException) -> bool:
    """Whether an error of wandb.init is wandb-core's, and not the server's or a setting's."""
    return isinstance(error, ConnectionError) or type(error).__module__.startswith("wandb.sdk.")


def what_ended(error: BaseException) -> str:
    """The line for an error of wandb-core."""
    from wandb.sdk.lib.service.service_port_file import ServicePollForTokenError

    began = not isinstance(error, ServicePollForTokenError)  # it ended, or took too long
    reason = (str(error) or type(error).__name__).splitlines()[0]
    what = "has ended" if began else "does not start"
    return f"W&B's process wandb-core {what} ({reason}): {AGAIN}; or take logger=none"


def is_lost(error: BaseException) -> bool:
    """Whether an error of a call to W&B may mean that wandb-core has ended."""
    return isinstance(error, ConnectionError) or type(error).__module__.startswith("wandb.")


def end_core(code: int = 0) -> None:
    """End wandb-core, which may be gone, and forget it; `code` is for a run that is still open."""
    import wandb

    with suppress(Exception, SystemExit):
        wandb.teardown(exit_code=code)
    os.environ.pop("WANDB_SERVICE", None)  # or the next run would look for it there
    wandb.run = None  # or the next run would try to close it


def _end_core_at_exit() -> None:
    wandb = sys.modules["wandb"]
    if wandb.run is None:
        end_core()
