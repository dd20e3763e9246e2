"""
What stands between the programs and the world around them: errors in the user's terms, signals that ask a run to stop, and
losses that jump.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
import time

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)  # a disk that takes nothing more


class UserError(Exception):
    """Something that the user can put right; its text says what is wrong and what to do."""


def cli(main):
    """Run main(arguments); a UserError ends the process with its text on standard error and exit code 1."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output is gone, as with | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def stop_signals():
    """
    In this context SIGTERM, SIGINT, SIGUSR1 and SIGHUP (a connection that dropped) only add to the list it yields. A signal
    that comes more than one second after the first ends the process at once, whatever it is doing. The time limit is there
    because torchrun repeats a terminal's signals within one second. SIGHUP stays ignored under nohup.
    """
    numbers, caught, (reader, writer) = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], [], os.pipe()
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    os.set_blocking(writer, False)

    def watch():  # a thread, since Python handles no signal while its main thread waits for others or for the device
        first = None
        while number := os.read(reader, 1):
            if number[0] not in numbers:
                continue
            if first is None:
                first = time.monotonic()
                with contextlib.suppress(OSError):  # the terminal may be what is gone
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
    """Turn errors of torch and Python for a full disk, too little memory or a lost process into a UserError."""
    import torch  # here, since prepare.py needs a UserError and no torch
    import torch.distributed as dist

    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        first = next(iter(str(error).splitlines()), "")
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in first:
            sizes = ", ".join(f"{k}={getattr(cfg, k)}" for k in ("gradient_accumulation_steps", "eval_iters"))
            text = (
                f"out of memory: lower batch_size={cfg.batch_size} and raise {sizes} by the same factor: the result is the same"
            )
        elif isinstance(error, OSError) and error.errno in DISK:
            text = f"{first}: free some space or choose another --out_dir, and go on with --init_from=resume"
        elif isinstance(error, dist.DistError) or "gloo" in first or "NCCL" in first:
            text = (f"another process ended or did not answer within timeout={cfg.timeout} seconds ({first[:200]}): "
                    "go on with --init_from=resume")  # fmt: skip
        else:
            raise
        raise UserError(text) from None


def note_loss(run, loss):
    """
    Note a step's training loss in run, a checkpoint.Progress. Returns a text when the loss is over twice its running mean for
    the third step in a row, otherwise None.
    """
    run.high = run.high + 1 if 0 < 2 * run.running_mean < loss else 0
    if run.high == 0:
        run.running_mean = run.running_mean + (loss - run.running_mean) / 100 if run.running_mean else loss
    if run.high == 3:
        return f"the loss, {loss:.4f}, has been over twice its running mean, {run.running_mean:.4f}, for 3 steps"
    return None
