"""What stands between a run and the world around it: signals that ask it to stop, and errors in the user's terms."""

import contextlib
import errno
import os
import signal
import threading
import time

import torch
import torch.distributed as dist

from configurator import UserError


@contextlib.contextmanager
def stop_signals():
    """
    While this lasts, SIGTERM, SIGINT and SIGUSR1 only add to the list that it yields, and a second one ends the process at
    once, whatever it is doing. What comes within a second is one signal: torchrun repeats those of a terminal.
    """
    numbers, caught, (reader, writer) = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), [], os.pipe()
    os.set_blocking(writer, False)

    def watch():  # a thread, since Python handles no signal while its main thread waits for others or for the device
        first = None
        while number := os.read(reader, 1):
            if number[0] not in numbers:
                continue
            if first is None:
                first = time.monotonic()
                os.write(2, b"\nstopping after this step; a second signal stops at once\n")
            elif time.monotonic() - first > 1:
                os._exit(128 + number[0])
        os.close(reader)

    before = {number: signal.signal(number, lambda *arguments: caught.append(arguments)) for number in numbers}
    wakeup = signal.set_wakeup_fd(writer)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield caught
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)


@contextlib.contextmanager
def plain_errors(cfg):
    """What a full disk, too little memory or a lost process make torch and Python raise, as a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        first = next(iter(str(error).splitlines()), "")
        disk = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in first:
            sizes = ", ".join(f"{k}={getattr(cfg, k)}" for k in ("gradient_accumulation_steps", "eval_iters"))
            text = (
                f"out of memory: lower batch_size={cfg.batch_size} and raise {sizes} by the same factor, which trains the same"
            )
        elif isinstance(error, OSError) and error.errno in disk:
            text = f"{first}: free some space or choose another --out_dir, and go on with --init_from=resume"
        elif isinstance(error, dist.DistError) or "gloo" in first or "NCCL" in first:
            text = (f"another process ended or did not answer within timeout={cfg.timeout} seconds ({first[:200]}): "
                    "go on with --init_from=resume")  # fmt: skip
        else:
            raise
        raise UserError(text) from None
