"""
Train a GPT whose layers are optimizer steps. Knobs come from TOML files and --key=value, the later winning:

    python train.py config/demo.toml
    python train.py config/demo.toml --variant=MHA --out_dir=out/mha
    torchrun --standalone --nproc_per_node=2 train.py config/demo.toml

It reads data/DATASET (see prepare.py) and writes out_dir/ckpt.pt, the latest state, out_dir/best.pt, the state of least
validation loss, and out_dir/metrics.jsonl, a JSON object a line. Batches and dropout are functions of the seed, the
step and the process alone, so a run that is stopped and resumed (--init_from=resume) becomes what it would have been.
SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 stop it after the step in progress, with a checkpoint.
"""

import contextlib
import ctypes
import importlib
import json
import math
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import guard
from configurator import UserError, cli, parse
from data import Split, fingerprint, replacing, verify
from model import GPT, GPTConfig, Scalar


@dataclass
class Config(GPTConfig):
    vocab_size: int | None = None  # rows of the token table; None: as many as the tokenizer has
    # the run
    out_dir: str = "out"  # folder of the checkpoints and metrics
    init_from: str = "scratch"  # scratch; resume: out_dir/ckpt.pt; X.pt: the weights of another run; gpt2, gpt2-medium, ...
    dataset: str = "openwebtext"  # folder below data/
    data_dir: str = "data"  # folder that holds the data sets
    seed: int = 1337  # of the initial weights, the order of the data and dropout
    max_iters: int = 600000  # training steps
    eval_interval: int = 2000  # steps from one evaluation and checkpoint to the next
    eval_iters: int = 200  # batches in an evaluation
    eval_only: bool = False  # evaluate once and stop
    log_interval: int = 10  # steps from one line of the log to the next
    logger: str = ""  # wandb or trackio, to log there as well
    on_spike: str = "report"  # when the loss is over twice its running mean 3 steps in a row: report, stop
    verify: bool = False  # check the sha256 of all shards before the first step, not of a sample
    # the batch
    batch_size: int = 12  # sequences in a micro-batch
    gradient_accumulation_steps: int = 40  # micro-batches in a step, over all processes
    # the optimizer
    optimizer: str = "adamw"  # adamw; muon: Muon for the matrices of the blocks, AdamW for the rest
    learning_rate: float = 6e-4  # highest rate
    scalar_learning_rate: float | None = None  # the same for learned scalars; None: learning_rate
    weight_decay: float = 0.1  # of matrices and embeddings
    beta1: float = 0.9  # AdamW's first moment
    beta2: float = 0.95  # AdamW's second moment
    grad_clip: float = 1.0  # largest norm of the gradient; 0: any
    decay_lr: bool = True  # warm up and then decay by a cosine; otherwise the rate is constant
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int | None = None  # step at which the rate is down to min_lr; None: max_iters
    min_lr: float = 6e-5  # lowest rate
    # the machine
    device: str = "auto"  # cuda, cuda:1, cpu, mps; auto: cuda if there is one
    dtype: str = "auto"  # float32, bfloat16, float16; auto: bfloat16 where the hardware has it
    compile: bool = True  # torch.compile the model
    deterministic: bool = False  # only algorithms that give the same bits every time
    timeout: int = 600  # seconds that a process waits for the others before it gives up

    def problems(self):
        one_of = dict(optimizer=("adamw", "muon"), logger=("", "wandb", "trackio"), on_spike=("report", "stop"),
                      dtype=("auto", "float32", "bfloat16", "float16"))  # fmt: skip
        at_least = dict.fromkeys(
            ("eval_interval", "eval_iters", "log_interval", "batch_size", "gradient_accumulation_steps", "timeout"), 1
        )
        at_least |= dict.fromkeys(("max_iters", "warmup_iters", "weight_decay", "grad_clip", "min_lr"), 0)
        return [
            *super().problems(),
            *(f"{k}={getattr(self, k)!r} is none of {', '.join(v)}" for k, v in one_of.items() if getattr(self, k) not in v),
            *(
                f"{k}={getattr(self, k)} must be at least {n}"
                for k, n in at_least.items()
                if not n <= getattr(self, k) < math.inf
            ),
            *(f"{k}={getattr(self, k)} must lie in [0, 1)" for k in ("beta1", "beta2") if not 0 <= getattr(self, k) < 1),
            *([] if 0 < self.learning_rate < math.inf else [f"learning_rate={self.learning_rate} must be positive"]),
            *([] if 0 <= self.seed < 1 << 32 else [f"seed={self.seed} must lie between 0 and {(1 << 32) - 1}"]),
        ]


def optimizers(model, cfg, device):
    """
    The optimizers of a model. Each parameter group has a `peak`, its share of the schedule: matrices and embeddings with
    weight decay, biases and norms without, learned scalars at their own rate.
    """
    scalars = {p for m in model.modules() if isinstance(m, Scalar) for p in m.parameters()}
    hidden = {p for p in model.transformer.h.parameters() if p.dim() == 2 and cfg.optimizer == "muon"}
    rest = [p for p in model.parameters() if p not in scalars | hidden]
    groups = [
        dict(params=[p for p in rest if p.dim() == 2], weight_decay=cfg.weight_decay, peak=1.0),
        dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0, peak=1.0),
        dict(params=[p for p in model.parameters() if p in scalars], weight_decay=0.0,
             peak=1.0 if cfg.scalar_learning_rate is None else cfg.scalar_learning_rate / cfg.learning_rate),
    ]  # fmt: skip
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], betas=(cfg.beta1, cfg.beta2), fused=device != "mps")
    if not hidden:
        return [adamw]
    hidden = [p for p in model.parameters() if p in hidden]
    # matched in size to AdamW's updates, so that one learning rate serves both
    muon = torch.optim.Muon(hidden, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw")
    muon.param_groups[0]["peak"] = 1.0
    return [adamw, muon]


def learning_rate(step, cfg):
    """Linear warm-up to learning_rate, then half a cosine down to min_lr at lr_decay_iters."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    decay_iters = cfg.lr_decay_iters or cfg.max_iters
    done = min(1, (step - cfg.warmup_iters) / max(1, decay_iters - cfg.warmup_iters))
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (cfg.learning_rate - cfg.min_lr)


def short_dtype(kind):
    """The name of the shortest dtype that this kind of device (cuda, cpu, mps) multiplies matrices of faster."""
    if kind == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    cpu = torch.cpu.get_capabilities() if kind == "cpu" else {}
    return "bfloat16" if cpu.get("amx_bf16") or cpu.get("avx512_bf16") or cpu.get("bf16") else "float32"


def keep_memory():
    """
    Have glibc's malloc keep what a step frees for the next step, up to the end of the process. By default it returns large
    blocks to the system, and a step on a CPU spends a fifth of its time on having them back, page by page.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


# bf16 matrix products without sparsity, FLOP/s, by a part of the card's name (the makers' data sheets)
PEAK_FLOPS = {"A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12,
              "RTX 4090": 165e12, "RTX 3090": 71e12}  # fmt: skip


def train(cfg, signals=()):
    """One run, from its configuration to its last checkpoint. Once there is something in signals, it stops after the step."""
    # processes: one, or several under torchrun
    rank, local_rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    master = rank == 0
    if cfg.gradient_accumulation_steps % world:
        raise UserError(
            f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} must be a multiple of the {world} processes"
        )
    micro_steps = cfg.gradient_accumulation_steps // world

    def say(text):
        if master:
            tqdm.write(text)  # beside the progress bar
            sys.stdout.flush()

    device = checkpoint.pick_device(cfg.device, say)
    if device == "cuda":
        device = f"cuda:{local_rank}"
    if world > 1:
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=cfg.timeout))

    # precision: short matrix products where the hardware has them, float32 for the weights and the residual stream
    kind = torch.device(device).type
    if kind == "cpu":
        keep_memory()
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32
    short = short_dtype(kind)
    dtype = cfg.dtype if cfg.dtype != "auto" else short
    if dtype == "bfloat16" != short:
        say(f"dtype=bfloat16, but this {kind} has no instructions for it: going on with {short}")
        dtype = short
    if cfg.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS needs for it
    torch.use_deterministic_algorithms(cfg.deterministic)
    autocast = torch.autocast(kind, getattr(torch, dtype), enabled=dtype != "float32")
    scaler = torch.amp.GradScaler(kind, enabled=dtype == "float16")

    # data
    folder = os.path.join(cfg.data_dir, cfg.dataset)
    meta = verify(folder, cfg.verify)
    training = Split(folder, "train", cfg.block_size, cfg.seed)
    validation = Split(folder, "val", cfg.block_size)
    windows = validation.fixed(cfg.eval_iters * cfg.batch_size)[rank::world]

    def to_device(arrays):
        x, y = map(torch.from_numpy, arrays)
        if kind == "cuda":  # pinned memory lets the copy run beside the computation
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(device, non_blocking=True), y.to(device, non_blocking=True)

    def batch(micro_step):
        """The process's inputs and targets of a micro-step, counted from the start of the run: (batch_size, block_size)."""
        first = (micro_step * world + rank) * cfg.batch_size
        return to_device(training.batch(range(first, first + cfg.batch_size)))

    # model
    vocab_size = cfg.vocab_size or meta["vocab_size"]
    latest = os.path.join(cfg.out_dir, "ckpt.pt")
    config = GPTConfig(**{f.name: getattr(cfg, f.name) for f in fields(GPTConfig)} | dict(vocab_size=vocab_size))
    start, seconds, best_loss, running_mean, high = 0, 0.0, math.inf, 0.0, 0
    made_with, state, weights = checkpoint.made_with(device), None, None
    if cfg.init_from == "resume":
        state = checkpoint.load(latest)
        with checkpoint.fitting(latest):
            then = state["config"]
            here, there = asdict(cfg) | dict(data=fingerprint(meta)), dict(data=state["data"])
            for k in ("gradient_accumulation_steps", "eval_iters"):  # what a step, and an evaluation, are made of
                here[f"batch_size * {k}"], there[f"batch_size * {k}"] = (c["batch_size"] * c[k] for c in (here, then))
            there |= {k: then[k] for k in ("optimizer", "seed")} | state["model_config"]
            # surgery may have made another model than the configuration says: either is right
            differs = [f"{k}={v}, not {here[k]}" for k, v in there.items() if here[k] not in (v, then.get(k, v))]
            config, weights = GPTConfig(**state["model_config"]), state["model"]
            start, high = (int(state[k]) for k in ("step", "high"))
            seconds, best_loss, running_mean = (float(state[k]) for k in ("seconds", "best_loss", "running_mean"))
            changed = [f"{k} {v}, now {made_with[k]}" for k, v in state["made_with"].items() if v != made_with[k]]
        if differs:
            raise UserError(f"{latest} has {'; '.join(differs)}: resume with the run's own configuration and data")
        if not 0 <= start <= cfg.max_iters:
            raise UserError(f"{latest} is of step {start}, max_iters={cfg.max_iters} ends before: raise max_iters")
        say(f"resuming at step {start}" + (f"; begun with {'; '.join(changed)}" if changed else ""))
    elif cfg.init_from.endswith(".pt"):
        donor = checkpoint.load(cfg.init_from)
        config, weights = checkpoint.surgery(config, donor["model_config"], donor["model"])
        del donor
    elif cfg.init_from != "scratch":
        config, weights = checkpoint.surgery(config, *checkpoint.gpt2(cfg.init_from))
    if config.vocab_size < meta["vocab_size"]:
        raise UserError(f"vocab_size={config.vocab_size} is less than the {meta['vocab_size']} of {folder}'s tokenizer")
    torch.manual_seed(cfg.seed)
    model = GPT(config).to(device)
    opts = optimizers(model, cfg, kind)
    with checkpoint.fitting(latest if state else cfg.init_from):
        if weights:  # all of them, but for scalars that a donor doesn't have
            model.load_state_dict({n: p for n, p in model.state_dict().items() if n.endswith(".raw")} | weights)
        if state:
            for opt, saved in zip(opts, state["optimizers"], strict=True):
                checkpoint.restore(opt, saved)
            if state["scaler"]:
                scaler.load_state_dict(state["scaler"])
    state = weights = None  # they are as large as the model and its optimizer
    counts, tokens_per_step = model.count_parameters(), cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    flops_per_token = model.flops_per_token()

    # output
    bar = tqdm(total=cfg.max_iters, initial=start, unit="step", disable=not (master and os.isatty(1)), dynamic_ncols=True)

    def log(**record):
        if master:
            record |= dict(seconds=time.time() - began)
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            if cfg.logger:
                tracker.log(record, step=record["step"])

    if master:
        try:
            os.makedirs(cfg.out_dir, exist_ok=True)
            metrics = open_metrics(os.path.join(cfg.out_dir, "metrics.jsonl"), math.inf if cfg.eval_only else start)
        except OSError as error:
            raise UserError(f"cannot write to out_dir={cfg.out_dir}: {error.strerror}; choose another --out_dir") from None
        if cfg.logger:
            try:
                tracker = importlib.import_module(cfg.logger)
            except ImportError:
                raise UserError(f"logger={cfg.logger} is not installed: pip install {cfg.logger}") from None
            tracker.init(project="nanodescent", name=cfg.out_dir, config=asdict(cfg))
    say(
        f"{config.variant}: {sum(counts.values()):,} parameters ("
        + ", ".join(f"{name} {n:,}" for name, n in counts.items())
        + f"), {tokens_per_step:,} tokens a step, {device} {dtype}, {world} process(es)"
    )

    # the model as it runs: compiled if that works here, and with gradients averaged over the processes
    running = model
    if cfg.compile:
        try:
            running = torch.compile(model)
            with autocast:
                loss = running(*batch(0))[1]
            loss.backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a missing or broken compiler raises, the model runs without it
            say(f"torch.compile failed ({(str(error) or type(error).__name__).splitlines()[0]}): going on without it")
            running = model
        model.zero_grad(set_to_none=True)
    if world > 1:
        running = DistributedDataParallel(running, device_ids=[local_rank] if kind == "cuda" else None)

    def over_processes(*sums):
        """The sums of these numbers over all processes."""
        precise = torch.float32 if kind == "mps" else torch.float64
        total = torch.stack([torch.as_tensor(number, dtype=precise, device=device) for number in sums])
        if world > 1:
            dist.all_reduce(total)
        return total.tolist()

    @torch.no_grad()
    def evaluate():
        """Mean loss over the validation windows, in nats per token, and whether a signal came."""
        model.eval()
        total, count = 0.0, 0
        for i in range(0, len(windows), cfg.batch_size):
            x, y = to_device(validation.windows(windows[i : i + cfg.batch_size]))
            with autocast:
                total += float(model(x, y)[1]) * len(x)
            count += len(x)
        model.train()
        total, count, stopping = over_processes(total, count, len(signals))
        return total / count, stopping

    # the loop
    def stop(step, what):
        bar.close()
        log(step=step, stopped=what)
        kept = "there is no checkpoint yet" if saved is None else f"{latest} is as it was after {saved} steps"
        raise UserError(
            f"step {step}: {what}: stopped before the update. {kept}: "
            "go on with --init_from=resume, a lower learning_rate and a longer warmup_iters"
        )

    model.train()
    began, clock, clock_step = time.time() - seconds, time.time(), start
    saved, stopping = start or None, False
    for step in range(start, cfg.max_iters + 1):
        due = step % cfg.eval_interval == 0 or step == cfg.max_iters
        evaluating = cfg.eval_only or (due and not step == start > 0)  # a resumed run has evaluated where it starts
        best = False
        if evaluating:
            loss, stopping = evaluate()
            if not (math.isfinite(loss) or cfg.eval_only):
                stop(step, f"the validation loss is {loss}")
            bits = loss / math.log(2) * sum(s["tokens"] for s in meta["shards"]["val"]) / meta["bytes"]["val"]
            scalars = {n: m().mean().item() for n, m in model.named_modules() if isinstance(m, Scalar) and m.raw is not None}
            log(step=step, tokens=step * tokens_per_step, val_loss=loss, val_bits_per_byte=bits, scalars=scalars)
            say(f"step {step:6d}: validation loss {loss:.4f}, {bits:.4f} bits per byte")
            best, best_loss = loss < best_loss, min(loss, best_loss)
        if master and (evaluating or stopping) and not cfg.eval_only:
            os.fsync(metrics)  # so that they reach as far as the checkpoint
            state = dict(
                model=model.state_dict(),  # of the module that is neither compiled nor wrapped
                optimizers=[opt.state_dict() for opt in opts],
                scaler=scaler.state_dict(),
                step=step,
                seconds=time.time() - began,
                best_loss=best_loss,
                running_mean=running_mean,
                high=high,
                model_config=asdict(config),
                config=asdict(cfg),
                tokenizer=meta["tokenizer"],
                data=fingerprint(meta),
                made_with=made_with,
            )
            checkpoint.save(cfg.out_dir, state, best)
        if evaluating:
            saved, clock, clock_step = step, time.time(), step
        if stopping and step < cfg.max_iters:
            say(f"stopped by a signal after {step} steps: go on with --init_from=resume")
        if step == cfg.max_iters or stopping or cfg.eval_only:
            break

        # all randomness of a step is a function of seed, step and process: there is no random state to save
        torch.manual_seed((cfg.seed * 1_000_003 + step) * world + rank)
        rate = learning_rate(step, cfg)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = rate * group["peak"]
        mean_loss = 0.0
        for micro_step in range(micro_steps):
            last = micro_step == micro_steps - 1  # the only backward pass in which the processes exchange gradients
            with contextlib.nullcontext() if last or world == 1 else running.no_sync():
                with autocast:
                    loss = running(*batch(step * micro_steps + micro_step))[1]  # the logits are not kept
                scaler.scale(loss / micro_steps).backward()
            mean_loss += loss.detach() / micro_steps
        for opt in opts:
            scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)

        # the one exchange of a step, so that all processes agree before the update: is all finite, and is it time to stop?
        loss, norm, stopping = over_processes(mean_loss / world, norm / world, len(signals))
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.get_scale() > 1):
            stop(step, f"the loss is {loss:.4g} and the norm of the gradient {norm:.4g} at rate {rate:.3g}")
        high = high + 1 if 0 < 2 * running_mean < loss else 0
        if not high:
            running_mean = running_mean + (loss - running_mean) / 100 if running_mean else loss
        if high == 3:
            spike = f"the loss, {loss:.4f}, is over twice its running mean, {running_mean:.4f}, for 3 steps"
            if cfg.on_spike == "stop":
                stop(step, spike)
            say(f"step {step:6d}: {spike}")

        if math.isfinite(norm):  # float16 overflows now and then; the scaler alone would let one of two optimizers step
            for opt in opts:
                scaler.step(opt)
        scaler.update()
        model.zero_grad(set_to_none=True)

        bar.update()
        if step % cfg.log_interval == 0:
            now = time.time()
            speed = (step + 1 - clock_step) * tokens_per_step / (now - clock)
            clock, clock_step = now, step + 1
            record = dict(train_loss=loss, lr=rate, grad_norm=norm, tokens_per_second=speed)
            if kind == "cuda":
                record |= dict(memory_gb=torch.cuda.max_memory_allocated() / 1e9)
                peak = next((f for card, f in PEAK_FLOPS.items() if card in torch.cuda.get_device_name()), None)
                record |= dict(mfu=speed * flops_per_token / (peak * world)) if peak and dtype != "float32" else {}
            else:
                record |= dict(memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
            log(step=step, tokens=(step + 1) * tokens_per_step, **record)
            say(f"step {step:6d}: loss {loss:.4f}, {speed:,.0f} tokens/s")

    bar.close()
    if master and cfg.logger:
        tracker.finish()
    if world > 1:
        dist.destroy_process_group()


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


def main(arguments):
    cfg = parse(Config, arguments)
    with guard.plain_errors(cfg), guard.stop_signals() as signals:
        train(cfg, signals)


if __name__ == "__main__":
    cli(main)
