"""What a run reports: metrics.jsonl, a tracker such as wandb, a progress bar, and lines on standard output."""

import contextlib
import importlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, fields

from tqdm import tqdm

import device
from files import replacing
from guard import UserError
from model import GPTConfig, Scalar


def say(text):
    """A line on standard output, beside a progress bar; of several processes only the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text)
        sys.stdout.flush()


def open_metrics(path, step):
    """metrics.jsonl, open to append to, without what a run that starts at `step` writes again: later steps, half a line."""
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
    The reports of a run from step run.step on; run is a checkpoint.Progress. Only the master process writes. Raises UserError
    if the folder cannot be written or the tracker is not installed.
    """

    def __init__(self, cfg, run, machine, model):
        self.cfg, self.run, self.machine, self.flops_per_token = cfg, run, machine, device.flops_per_token(model)
        self.tokens_per_step = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
        shown = machine.master and os.isatty(1)
        self.bar = tqdm(total=cfg.max_iters, initial=run.step, unit="step", disable=not shown, dynamic_ncols=True)
        self.metrics = self.tracker = None
        if machine.master:
            try:
                os.makedirs(cfg.out_dir, exist_ok=True)
                path = os.path.join(cfg.out_dir, "metrics.jsonl")
                self.metrics = open_metrics(path, math.inf if cfg.eval_only else run.step)
            except OSError as error:
                raise UserError(f"cannot write to out_dir={cfg.out_dir}: {error.strerror}; choose another --out_dir") from None
            if cfg.logger:
                try:
                    self.tracker = importlib.import_module(cfg.logger)
                except ImportError:
                    raise UserError(f"logger={cfg.logger} is not installed: pip install {cfg.logger}") from None
                self.tracker.init(project="nanodescent", name=cfg.out_dir, config=asdict(cfg))
        counts = model.count_parameters()
        parts = ", ".join(f"{name} {n:,}" for name, n in counts.items())
        say(f"{system(asdict(model.config))}: {sum(counts.values()):,} parameters ({parts}), "
            f"{self.tokens_per_step:,} tokens per step, {machine.device} {machine.dtype}, "
            f"{machine.world} process(es)")  # fmt: skip

    def begin(self):
        """The first step starts now."""
        self.began = time.time() - self.run.seconds
        self.restart_clock(self.run.step)

    def restart_clock(self, step):
        """Speed is that of the steps from `step` on: call this when something else than training took time."""
        self.clock = time.time(), step

    def seconds(self):
        """Since the run began, in all the parts of it that were resumed."""
        return time.time() - self.began

    def write(self, **record):
        """A line of metrics.jsonl, and the same to the tracker."""
        if self.metrics:
            record |= dict(seconds=self.seconds())
            self.metrics.write(json.dumps(record) + "\n")
            self.metrics.flush()
        if self.tracker:
            self.tracker.log(record, step=record["step"])

    def evaluated(self, step, loss, bits, model):
        """An evaluation of the model after `step` training steps; bits: its loss in bits per byte."""
        scalars = {n: m().mean().item() for n, m in model.named_modules() if isinstance(m, Scalar) and m.raw is not None}
        self.write(step=step, tokens=step * self.tokens_per_step, val_loss=loss, val_bits_per_byte=bits, scalars=scalars)
        say(f"step {step:6d}: validation loss {loss:.4f}, {bits:.4f} bits per byte")

    def trained(self, step, loss, rate, norm):
        """A training step: its loss, its rate and the norm of its gradient."""
        self.bar.update()
        if step % self.cfg.log_interval:
            return
        since, first = self.clock
        speed = (step + 1 - first) * self.tokens_per_step / (time.time() - since)
        self.restart_clock(step + 1)
        used = dict(tokens_per_second=speed, memory_gb=device.memory_gb(self.machine.kind))
        if self.machine.dtype != "float32" and (peak := device.peak_flops(self.machine.kind)):
            used |= dict(mfu=speed * self.flops_per_token / (peak * self.machine.world))
        self.write(step=step, tokens=(step + 1) * self.tokens_per_step, train_loss=loss, lr=rate, grad_norm=norm, **used)
        say(f"step {step:6d}: loss {loss:.4f}, {speed:,.0f} tokens/s")

    def sync(self):
        """Bring metrics.jsonl to the disk, so that it reaches as far as the checkpoint that is written next."""
        os.fsync(self.metrics)

    def close(self):
        self.bar.close()
        if self.metrics:
            self.metrics.close()
        if self.tracker:
            self.tracker.finish()
