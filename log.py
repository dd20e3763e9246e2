"""What a run reports: metrics.jsonl, a tracker such as wandb, a progress bar, and lines on standard output."""

import contextlib
import importlib
import json
import os
import sys
import time
import uuid
from dataclasses import asdict, fields

from tqdm import tqdm

import device
from files import lock, replacing
from guard import UserError
from model import GPTConfig, Scalar


def say(text):
    """A line on standard output, beside a progress bar; of several processes only the first speaks."""
    if os.environ.get("RANK", "0") == "0" and sys.stdout:  # which a daemon may not have
        with going_on():
            tqdm.write(text)
            sys.stdout.flush()


@contextlib.contextmanager
def going_on():
    """If a terminal or a pipe that this block writes to is gone, go on without output."""
    try:
        yield
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in (1, 2):
            os.dup2(nowhere, output)


def last_step(path):
    """The last step that a metrics.jsonl tells of; -1 if it tells of none."""
    step = -1
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                step = max(step, json.loads(line)["step"])
    return step


def open_metrics(path, step):
    """metrics.jsonl, open to append to. It first drops what a run from `step` on writes again, and lines that are cut short."""
    kept = []
    if step and os.path.exists(path):
        with open(path, "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if json.loads(line)["step"] < step + (b"val_loss" in line):
                        kept.append(line)
    with replacing(path) as file:
        file.writelines(kept)
    return open(path, "a")


def system(config):
    """A model's variant, and the choices that are not the variant's own, as on the command line. config: a dict."""
    own = GPTConfig(variant=config["variant"])
    choices = [f.name for f in fields(GPTConfig) if f.default is None]
    return " ".join([own.variant, *(f"--{c}={config[c]}" for c in choices if config[c] != getattr(own, c))])


class Log:
    """
    The reports of a run from step run.step on; run is a checkpoint.Progress. Only the master process writes, and with
    eval_only it writes nothing. To be used in a with statement, during which no other run may write to the same out_dir. Raises
    UserError if one does, if the folder cannot be written, if it holds a longer run, or if the tracker is not installed.
    """

    def __init__(self, cfg, run, machine, model):
        self.cfg, self.run, self.machine, self.flops_per_token = cfg, run, machine, device.flops_per_token(model)
        self.tokens_per_step = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
        self.path, self.start, self.began = os.path.join(cfg.out_dir, "metrics.jsonl"), run.step, time.time()
        self.writing = machine.master and not cfg.eval_only
        self.lines, self.metrics, self.tracker, self.held = [], None, None, contextlib.ExitStack()
        shown = machine.master and os.isatty(1)
        self.bar = tqdm(total=cfg.max_iters, initial=run.step, unit="step", disable=not shown, dynamic_ncols=True)
        if self.writing:
            with contextlib.ExitStack() as held:  # let go of the folder if one of these fails
                self.begin_writing(held)
                self.held = held.pop_all()
        counts = model.count_parameters()
        parts = ", ".join(f"{name} {n:,}" for name, n in counts.items())
        say(f"{system(asdict(model.config))}: {sum(counts.values()):,} parameters ({parts}), "
            f"{self.tokens_per_step:,} tokens per step, {machine.device} {machine.dtype}, "
            f"{machine.world} process(es)")  # fmt: skip

    def begin_writing(self, held):
        """Take the folder, and look at what it holds."""
        cfg = self.cfg
        try:
            os.makedirs(cfg.out_dir, exist_ok=True)
            held.enter_context(lock(cfg.out_dir, "wait for its end, or choose another --out_dir"))
            there = last_step(self.path)
        except OSError as error:
            raise UserError(f"cannot write to out_dir={cfg.out_dir}: {error.strerror}; choose another --out_dir") from None
        if cfg.init_from != "resume" and there > cfg.max_iters and not cfg.overwrite:
            raise UserError(
                f"out_dir={cfg.out_dir} holds a run of {there} steps, this one has {cfg.max_iters}: go on with it by "
                "--init_from=resume, choose another --out_dir, or replace it with --overwrite"
            )
        if cfg.logger:
            try:
                self.tracker = importlib.import_module(cfg.logger)
            except ImportError:
                raise UserError(f"logger={cfg.logger} is not installed: pip install {cfg.logger}") from None
            self.logger_id = uuid.uuid4().hex  # a run that is resumed goes on as one run there as well
            if cfg.init_from == "resume" and os.path.exists(os.path.join(cfg.out_dir, "logger_id")):
                with open(os.path.join(cfg.out_dir, "logger_id")) as file:
                    self.logger_id = file.read()
            same = dict(id=self.logger_id) if cfg.logger == "wandb" else {}
            about = dict(project=cfg.logger_project, name=cfg.logger_name or cfg.out_dir, config=asdict(cfg))
            try:
                self.tracker.init(**about, **same, resume="allow")
            except Exception as error:  # whatever the tracker raises: no key, no network
                raise UserError(f"logger={cfg.logger} does not start ({error}): log in, or leave --logger out") from None

    def begin(self):
        """The first step starts now."""
        self.began = time.time() - self.run.seconds
        self.restart_clock(self.run.step)

    def restart_clock(self, step):
        """Speed is that of the steps from `step` on: call this when something other than training took time."""
        self.clock = time.time(), step

    def seconds(self):
        """Seconds since the run began, over all the times that it was resumed."""
        return time.time() - self.began

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.metrics:
            self.metrics.close()
        self.held.close()
        with going_on():
            self.bar.close()

    def write(self, **record):
        """A line of metrics.jsonl, and the same to the tracker."""
        if self.writing:
            record |= dict(seconds=self.seconds())
            self.lines.append(json.dumps(record) + "\n")
            if self.metrics:
                self.flush()
        if self.tracker:
            self.tracker.log(record, step=record["step"])

    def flush(self):
        """
        Bring the lines so far into metrics.jsonl. The first call replaces the file of an earlier run, or cuts it to where this
        run begins. So a run that ends before its first step and its first checkpoint leaves that file alone.
        """
        if not self.metrics:
            self.metrics = open_metrics(self.path, self.start)
            if self.tracker:
                with replacing(os.path.join(self.cfg.out_dir, "logger_id")) as file:
                    file.write(self.logger_id.encode())
        self.metrics.writelines(self.lines)
        self.metrics.flush()
        self.lines.clear()

    def evaluated(self, step, loss, bits, model):
        """An evaluation of the model after `step` training steps; bits: its loss in bits per byte."""
        scalars = {n: m().mean().item() for n, m in model.named_modules() if isinstance(m, Scalar) and m.raw is not None}
        self.write(step=step, tokens=step * self.tokens_per_step, val_loss=loss, val_bits_per_byte=bits, scalars=scalars)
        say(f"step {step:6d}: validation loss {loss:.4f}, {bits:.4f} bits per byte")

    def trained(self, step, loss, rate, norm):
        """A training step: its loss, its rate and the norm of its gradient."""
        with going_on():
            self.bar.update()
        if step % self.cfg.log_interval == 0:
            since, first = self.clock
            speed = (step + 1 - first) * self.tokens_per_step / (time.time() - since)
            self.restart_clock(step + 1)
            used = dict(tokens_per_second=speed, memory_gb=device.memory_gb(self.machine.kind))
            if self.machine.dtype != "float32" and (peak := device.peak_flops(self.machine.kind)):
                used |= dict(mfu=speed * self.flops_per_token / (peak * self.machine.world))
            self.write(step=step, tokens=(step + 1) * self.tokens_per_step, train_loss=loss, lr=rate, grad_norm=norm, **used)
            say(f"step {step:6d}: loss {loss:.4f}, {speed:,.0f} tokens/s")
        if self.writing and self.lines:
            self.flush()

    def stopped(self, what):
        """Note that the run was given up before an update. A run that has no checkpoint leaves nothing."""
        self.write(step=self.run.step, stopped=what)
        if self.writing and (self.metrics or self.run.step):
            self.flush()

    def sync(self):
        """Bring metrics.jsonl to the disk, so that it reaches as far as the checkpoint that is written next."""
        self.flush()
        os.fsync(self.metrics)

    def finish(self):
        """The run has come to its end."""
        if self.tracker:
            self.tracker.finish()
