"""
Train a GPT whose layers are optimizer steps. Knobs come from TOML files and --key=value; the later one wins:

    python train.py config/demo.toml
    python train.py config/demo.toml --variant=MHA --out_dir=out/mha
    torchrun --standalone --nproc_per_node=2 train.py config/demo.toml --batch_size=4 --eval_iters=40 \\
        --gradient_accumulation_steps=2

It reads data/DATASET (see prepare.py) and writes to out_dir: ckpt.pt (the latest state), best.pt (the state of least
validation loss) and metrics.jsonl (one JSON object per line). Batches and dropout depend only on the seed, the step and
the process, so a run that is stopped and resumed (--init_from=resume) ends as if it had never stopped.
SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP stop it after the step in progress, with a checkpoint.

The loop is train(), at the end of this file. log.py reports, checkpoint.py saves, guard.py handles errors and signals.
"""

import contextlib
import math
import os
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import guard
from configurator import PathName, parse
from data import ORDER, Split, fingerprint, verify
from device import keep_memory, pick_device, short_dtype
from guard import UserError, cli
from log import Log, say
from model import GPT, GPTConfig, Scalar, Stacked, outside


@dataclass
class Config(GPTConfig):
    vocab_size: int | None = None  # rows of the token table; None: as many as the tokenizer has
    # the run
    out_dir: PathName = "out"  # folder of the checkpoints and metrics
    any_tokenizer: bool = False  # allow weights made with another tokenizer than the data's: their tokens mean other things
    init_from: PathName = "scratch"  # scratch; resume: out_dir/ckpt.pt; X.pt: weights of another run; gpt2, gpt2-medium, ...
    overwrite: bool = False  # start anew even if out_dir holds a run of more steps
    dataset: str = "openwebtext"  # folder below data/
    data_dir: PathName = "data"  # folder that holds the data sets
    seed: int = 1337  # of the initial weights, the order of the data and dropout
    max_iters: int = 600000  # training steps
    eval_interval: int = 2000  # steps from one evaluation and checkpoint to the next
    eval_iters: int = 200  # batches in an evaluation
    eval_only: bool = False  # evaluate once and stop
    log_interval: int = 10  # steps from one line of the log to the next
    logger: Literal["", "wandb", "trackio"] = ""  # a tracker to log to as well; empty: none
    logger_project: str = "nanodescent"  # the project in the tracker
    logger_name: str = ""  # the run's name in the tracker; empty: out_dir
    on_spike: Literal["report", "stop"] = "report"  # what to do when the loss is over twice its running mean for 3 steps
    verify: bool = False  # check the sha256 of all shards before the first step; False: of some, up to 256 MB
    # the batch
    batch_size: int = 12  # sequences in a micro-batch
    gradient_accumulation_steps: int = 40  # micro-batches in a step, over all processes
    # the optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks, with AdamW for the rest
    learning_rate: float = 6e-4  # highest rate
    scalar_learning_rate: float | None = None  # highest rate of learned scalars; None: five times learning_rate, as in [Zimin]
    weight_decay: float = 0.1  # of matrices and embeddings
    beta1: float = 0.9  # AdamW's first moment
    beta2: float = 0.95  # AdamW's second moment
    grad_clip: float = 1.0  # largest norm of the gradient; 0: any
    decay_lr: bool = True  # warm up and then decay by a cosine; otherwise the rate is constant
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int | None = None  # step at which the rate is down to min_lr; None: max_iters
    min_lr: float = 6e-5  # rate at the end of the cosine
    # the machine
    device: str = "auto"  # cuda, cuda:1, cpu, mps; auto: cuda if there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 where the hardware has it
    compile: bool = True  # torch.compile the model
    deterministic: bool = False  # only algorithms that give the same bits every time
    timeout: int = 600  # seconds that a process waits for the others before it gives up

    def problems(self):
        rising = f"min_lr={self.min_lr} must not exceed learning_rate={self.learning_rate}: the rate would rise"
        early = f"lr_decay_iters={self.lr_decay_iters} must come after warmup_iters={self.warmup_iters}"
        wrong = {rising: self.min_lr > self.learning_rate, early: (self.lr_decay_iters or math.inf) <= self.warmup_iters}
        return [*super().problems(), *outside(self, RANGES), *(why for why, is_so in wrong.items() if self.decay_lr and is_so)]


COUNTS = "eval_interval eval_iters log_interval batch_size gradient_accumulation_steps timeout lr_decay_iters"
RANGES = {
    "must be at least 1": (lambda n: 1 <= n < math.inf, COUNTS),
    "must be at least 0": (lambda n: 0 <= n < math.inf, "max_iters warmup_iters weight_decay grad_clip min_lr"),
    "must lie in [0, 1)": (lambda n: 0 <= n < 1, "beta1 beta2"),
    "must be positive and finite": (lambda n: 0 < n < math.inf, "learning_rate scalar_learning_rate"),
    "must lie between 0 and 4294967295": (lambda n: 0 <= n < 1 << 32, "seed"),
}


def model_config(cfg, **others):
    """The part of a run's configuration that makes its model, with some of its choices replaced. Raises ValueError."""
    return GPTConfig(**{f.name: getattr(cfg, f.name) for f in fields(GPTConfig)} | others)


class Muon(torch.optim.Muon):
    """
    torch.optim.Muon with another step. A parameter may stack n matrices, as c_attn stacks q, k and v: each gets its own
    update (a group's `stacked` lists the n of its parameters). torch's step multiplies in bfloat16; where a processor has no
    instructions for it, this step multiplies in float32, which is fifteen times as fast there. In all else it is torch's with
    nesterov=True and adjust_lr_fn="match_rms_adamw".
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            a, b, c = group["ns_coefficients"]
            for p, n in zip(group["params"], group["stacked"], strict=True):
                if p.grad is None:
                    continue
                if not (state := self.state[p]):
                    state["momentum_buffer"] = torch.zeros_like(p)
                m = state["momentum_buffer"]
                m.lerp_(p.grad, 1 - group["momentum"])
                short = torch.bfloat16 if short_dtype(p.device.type) == "bfloat16" else torch.float32
                x = p.grad.lerp(m, group["momentum"]).to(short).unflatten(0, (n, -1))
                rows, columns = x.shape[1:]
                x = x if rows <= columns else x.mT
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
                for _ in range(group["ns_steps"]):  # Newton-Schulz: all singular values go towards 1
                    xx = x @ x.mT
                    x = torch.baddbmm(x, torch.baddbmm(xx, xx, xx, beta=b, alpha=c), x, beta=a)
                x = x if rows <= columns else x.mT
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # as large as AdamW's updates, so that one learning rate serves both
                p.add_(x.flatten(0, 1), alpha=-0.2 * math.sqrt(max(rows, columns)) * group["lr"])


def optimizers(model, cfg, device):
    """
    The optimizers of a model: AdamW and, if cfg.optimizer is muon, Muon for the matrices of the blocks. A group's rate is its
    `peak` times the schedule's. AdamW's groups: other matrices and embeddings, with weight decay; biases and norms, without;
    learned scalars, at a rate of their own.
    """
    scalars = {p for m in model.modules() if isinstance(m, Scalar) for p in m.parameters()}
    hidden = {p for p in model.transformer.h.parameters() if p.dim() == 2 and cfg.optimizer == "muon"}
    rest = [p for p in model.parameters() if p not in scalars | hidden]
    groups = [
        dict(params=[p for p in rest if p.dim() == 2], weight_decay=cfg.weight_decay, peak=1.0),
        dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0, peak=1.0),
        dict(params=[p for p in model.parameters() if p in scalars], weight_decay=0.0,
             peak=5.0 if cfg.scalar_learning_rate is None else cfg.scalar_learning_rate / cfg.learning_rate),
    ]  # fmt: skip
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], betas=(cfg.beta1, cfg.beta2), fused=device != "mps")
    if not hidden:
        return [adamw]
    hidden = [p for p in model.parameters() if p in hidden]
    numbers = {m.weight: m.n for m in model.modules() if isinstance(m, Stacked)}
    group = dict(params=hidden, stacked=[numbers.get(p, 1) for p in hidden], peak=1.0)
    muon = Muon([group], weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def learning_rate(step, cfg):
    """Linear warm-up to learning_rate, then half a cosine down to min_lr at lr_decay_iters."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    decay_iters = cfg.max_iters if cfg.lr_decay_iters is None else cfg.lr_decay_iters
    done = min(1, (step - cfg.warmup_iters) / max(1, decay_iters - cfg.warmup_iters))
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (cfg.learning_rate - cfg.min_lr)


def set_rate(opts, rate):
    """Give every parameter group its `peak` times this rate."""
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = rate * group["peak"]


class Loss(nn.Module):
    """
    A model as it is trained: it maps inputs and targets, (B, T) each, to the loss alone. If a compiled step returned its
    logits too, its backward pass would fill a gradient of the same size with zeros.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets):
        return self.model(idx, targets)[1]


class Machine:
    """
    Where a run computes: one of `world` processes, its device, and the precision of its matrix products. Raises UserError if
    the processes cannot share a step, if there is no such device, or if it lacks the float64 that reversible=True needs.
    """

    def __init__(self, cfg):
        # processes: one, or several under torchrun
        environment = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1) | os.environ
        self.rank, local_rank, self.world = (int(environment[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        self.distributed, self.master, steps = "RANK" in os.environ, self.rank == 0, cfg.gradient_accumulation_steps
        self.micro_steps = steps // self.world
        if steps % self.world:
            raise UserError(f"gradient_accumulation_steps={steps} must be a multiple of the {self.world} processes")
        if self.world > 1 and cfg.device.startswith("cuda:"):
            raise UserError(f"device={cfg.device} would put all {self.world} processes on one card: take --device=cuda")
        self.device = pick_device(cfg.device, say)
        if self.device == "cuda":
            if local_rank >= (cards := torch.cuda.device_count()):
                raise UserError(f"process {local_rank} needs card {local_rank}, and this machine has {cards}: "
                                f"take --nproc_per_node={cards}, or --device=cpu")  # fmt: skip
            self.device = f"cuda:{local_rank}"
        self.kind = torch.device(self.device).type
        if self.kind == "mps" and cfg.reversible:
            raise UserError(
                "reversible=True computes in float64, which mps does not have: take --device=cpu or reversible=False"
            )
        if self.distributed:
            dist.init_process_group("nccl" if self.kind == "cuda" else "gloo", timeout=timedelta(seconds=cfg.timeout))

        # precision: matrix products in a short dtype if the hardware has one, float32 for the weights and the residual stream
        if self.kind == "cpu":
            keep_memory()
        if self.kind == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32
        short = short_dtype(self.kind)
        self.dtype = short if cfg.dtype == "auto" else cfg.dtype
        if self.dtype == "bfloat16" and short != "bfloat16":
            say(f"dtype=bfloat16, but this {self.kind} has no instructions for it: going on with {short}")
            self.dtype = short
        self.autocast = torch.autocast(self.kind, getattr(torch, self.dtype), enabled=self.dtype != "float32")
        self.scaler = torch.amp.GradScaler(self.kind, enabled=self.dtype == "float16")
        if cfg.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS needs for it
        torch.use_deterministic_algorithms(cfg.deterministic)

    def tensors(self, arrays):
        """Arrays as tensors on the device."""
        tensors = [torch.from_numpy(array) for array in arrays]
        if self.kind == "cuda":  # pinned memory lets the copy run beside the computation
            tensors = [t.pin_memory() for t in tensors]
        return [t.to(self.device, non_blocking=True) for t in tensors]

    def sums(self, *numbers):
        """The sums of these numbers over all processes."""
        precise = torch.float32 if self.kind == "mps" else torch.float64
        total = torch.stack([torch.as_tensor(number, dtype=precise, device=self.device) for number in numbers])
        if self.distributed:
            dist.all_reduce(total)
        return total.tolist()

    def prepare(self, model, data, compile):
        """
        The model's Loss, ready to run on this Data: with gradients averaged over the processes, and compiled if asked for and
        possible. The compiler cuts its graph where gradients are exchanged: so the exchange begins during the backward pass.
        """
        running = Loss(model)
        if self.distributed:
            card = [torch.device(self.device)] if self.kind == "cuda" else None
            running = DistributedDataParallel(running, card, gradient_as_bucket_view=True)
        if not compile:
            return running
        failures = [""] * self.world  # on each process
        try:
            compiled = torch.compile(running)
            with self.alone(running):
                with self.autocast:
                    loss = compiled(*data.batch(0))
                loss.backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a missing or broken compiler raises, the model runs without it
            failures[self.rank] = (str(error).strip() or type(error).__name__).splitlines()[0]
        if self.distributed:  # a process that went on alone would slow the others
            dist.all_gather_object(failures, failures[self.rank])
        model.zero_grad(set_to_none=True)
        if reason := next(filter(None, failures), None):
            say(f"torch.compile failed on {sum(map(bool, failures))} of {self.world} processes ({reason}): going on without it")
            return running
        return compiled

    def alone(self, running):
        """A context in which a backward pass exchanges no gradients."""
        return running.no_sync() if self.distributed else contextlib.nullcontext()


class Data:
    """This process's share of a data set's batches. Raises UserError for broken shards, or text shorter than a window."""

    def __init__(self, cfg, machine):
        folder = os.path.join(cfg.data_dir, cfg.dataset)
        self.meta, self.machine, self.batch_size = verify(folder, cfg.verify), machine, cfg.batch_size
        self.training = Split(folder, "train", cfg.block_size, cfg.seed)
        self.validation = Split(folder, "val", cfg.block_size)
        self.windows = self.validation.fixed(cfg.eval_iters * cfg.batch_size)[machine.rank :: machine.world]

    def batch(self, micro_step):
        """Inputs and targets of a micro-step, counted from the start of the run: (batch_size, block_size) each."""
        first = (micro_step * self.machine.world + self.machine.rank) * self.batch_size
        return self.machine.tensors(self.training.batch(range(first, first + self.batch_size)))

    def evaluation(self):
        """Inputs and targets of an evaluation, batch by batch, the same each time: (at most batch_size, block_size) each."""
        for i in range(0, len(self.windows), self.batch_size):
            yield self.machine.tensors(self.validation.windows(self.windows[i : i + self.batch_size]))

    def bits_per_byte(self, loss):
        """A validation loss in nats per token as bits per byte of text."""
        return loss / math.log(2) * sum(s["tokens"] for s in self.meta["shards"]["val"]) / self.meta["bytes"]["val"]


def start(cfg, machine, meta, made_with):
    """
    The model, its optimizers and the Progress of a run: new ones, those of its checkpoint, or new ones with the weights of
    another model. Raises UserError if a checkpoint does not fit, or max_iters or vocab_size is too small.
    """
    latest = os.path.join(cfg.out_dir, "ckpt.pt")
    config = model_config(cfg, vocab_size=cfg.vocab_size or meta["vocab_size"])
    run, state, weights = checkpoint.Progress(), None, None
    if cfg.decay_lr and 0 < cfg.max_iters <= cfg.warmup_iters:
        say(f"warmup_iters={cfg.warmup_iters} does not end before max_iters={cfg.max_iters}: the rate only rises")
    if cfg.init_from == "resume":
        state, config, run = checkpoint.resumed(latest, cfg, fingerprint(meta), made_with)
        weights = state["model"]
    elif cfg.init_from != "scratch":
        config, weights = checkpoint.donated(cfg, config, meta["tokenizer"])
    if config.vocab_size < meta["vocab_size"]:
        raise UserError(f"vocab_size={config.vocab_size} is less than the {meta['vocab_size']} of {cfg.dataset}'s tokenizer")
    torch.manual_seed(cfg.seed)
    model = GPT(config).to(machine.device)
    opts = optimizers(model, cfg, machine.kind)
    with checkpoint.fitting(latest if state else cfg.init_from):
        if weights:  # scalars that a donor doesn't have stay as they are
            model.load_state_dict({n: p for n, p in model.state_dict().items() if n.endswith(".raw")} | weights)
        if state:
            for opt, saved in zip(opts, state["optimizers"], strict=True):
                checkpoint.restore(opt, saved)
            if state["scaler"]:
                machine.scaler.load_state_dict(state["scaler"])
    return model, opts, run


@torch.no_grad()
def evaluate(model, data, machine, signals):
    """Mean loss over the validation windows of all processes, in nats per token, and how many signals they got in all."""
    model.eval()
    total, count = 0.0, 0
    for x, y in data.evaluation():
        with machine.autocast:
            total += float(model(x, y)[1]) * len(x)
        count += len(x)
    model.train()
    total, count, stopping = machine.sums(total, count, len(signals))
    return total / count, stopping


def train(cfg, signals, until_end):
    """
    One run, from its configuration to its last checkpoint. Once the list `signals` is not empty, it stops after the step in
    progress. The run's Log goes into until_end, an ExitStack: closing until_end closes the log.
    """
    machine = Machine(cfg)
    data = Data(cfg, machine)
    made_with = checkpoint.made_with(machine.device)
    model, opts, run = start(cfg, machine, data.meta, made_with)
    log, latest = until_end.enter_context(Log(cfg, run, machine, model)), os.path.join(cfg.out_dir, "ckpt.pt")
    steps_to_do = run.step < cfg.max_iters and not cfg.eval_only
    running = machine.prepare(model, data, cfg.compile and steps_to_do)
    resumed_at = saved = run.step or None

    def save(best):
        run.seconds = log.seconds()
        state = dict(
            model=model.state_dict(),  # of the module that is neither compiled nor wrapped
            optimizers=[opt.state_dict() for opt in opts],
            scaler=machine.scaler.state_dict(),
            **asdict(run),
            model_config=asdict(model.config),
            config=asdict(cfg),
            tokenizer=data.meta["tokenizer"],
            data=fingerprint(data.meta),
            order=ORDER,
            made_with=made_with,
        )
        checkpoint.save(cfg.out_dir, state, best, log.sync)

    def give_up(what):
        log.stopped(what)
        again = f"{latest} is as it was after {saved} steps: go on with --init_from=resume,"
        if saved is None:
            again = "There is no checkpoint yet: start again with"
        raise UserError(f"step {run.step}: {what}: stopped. {again} a lower learning_rate and a longer warmup_iters")

    model.train()
    log.begin()
    stopping, batch = False, data.batch(run.step * machine.micro_steps)
    for step in range(run.step, cfg.max_iters + 1):
        # evaluate and save
        run.step, best = step, False
        due = step % cfg.eval_interval == 0 or step == cfg.max_iters
        evaluating = cfg.eval_only or (due and step != resumed_at)  # a resumed run has evaluated where it starts
        if evaluating:
            loss, stopping = evaluate(model, data, machine, signals)
            if not (math.isfinite(loss) or cfg.eval_only):
                give_up(f"the validation loss is {loss}")
            log.evaluated(step, loss, data.bits_per_byte(loss), model)
            best, run.best_loss = loss < run.best_loss, min(loss, run.best_loss)
        if machine.master and (evaluating or stopping) and not cfg.eval_only:
            save(best)
        if evaluating:
            saved = step
            log.restart_clock(step)
        if stopping and step < cfg.max_iters and not cfg.eval_only:
            say(f"stopped by a signal after {step} steps: go on with --init_from=resume")
        if stopping or step == cfg.max_iters or cfg.eval_only:
            break

        # forward and backward; all randomness of a step is a function of seed, step and process: it has no state to save
        torch.manual_seed((cfg.seed * 1_000_003 + step) * machine.world + machine.rank)
        rate = learning_rate(step, cfg)
        set_rate(opts, rate)
        mean_loss = 0.0
        for i in range(machine.micro_steps):
            last = i == machine.micro_steps - 1  # the only backward pass in which the processes exchange gradients
            with contextlib.nullcontext() if last else machine.alone(running):
                with machine.autocast:
                    loss = running(*batch)
                machine.scaler.scale(loss / machine.micro_steps).backward()
            batch = data.batch(step * machine.micro_steps + i + 1)  # while a card is still busy with this one
            mean_loss += loss.detach() / machine.micro_steps
        for opt in opts:
            machine.scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)

        # the one exchange beside the gradients', so that all processes agree before the update: is all finite? time to stop?
        loss, norm, stopping = machine.sums(mean_loss / machine.world, norm / machine.world, len(signals))
        if not math.isfinite(loss) or not (math.isfinite(norm) or machine.scaler.get_scale() > 1):
            give_up(f"the loss is {loss:.4g} and the norm of the gradient {norm:.4g} at rate {rate:.3g}")
        if spike := guard.note_loss(run, loss):
            if cfg.on_spike == "stop":
                give_up(spike)
            say(f"step {step:6d}: {spike}")

        # the update
        if math.isfinite(norm):  # float16 overflows now and then; the scaler alone would let one of two optimizers step
            for opt in opts:
                machine.scaler.step(opt)
        machine.scaler.update()
        model.zero_grad(set_to_none=True)
        log.trained(step, loss, rate, norm)

    log.finish()
    if machine.distributed:
        del running  # before the group: its last owner waits for gloo's threads, and these may wait for Python
        dist.destroy_process_group()


def main(arguments):
    cfg = parse(Config, arguments)
    with guard.plain_errors(cfg), guard.stop_signals() as signals, contextlib.ExitStack() as until_end:
        train(cfg, signals, until_end)


if __name__ == "__main__":
    cli(main)
