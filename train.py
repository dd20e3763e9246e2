"""
Train a GPT whose layers are optimizer steps. Knobs come from TOML files and --key=value, the later winning:

    python train.py config/demo.toml
    python train.py config/demo.toml --variant=MHA --out_dir=out/mha
    torchrun --standalone --nproc_per_node=2 train.py config/demo.toml

It reads data/DATASET (see prepare.py) and writes out_dir/ckpt.pt, the latest state, out_dir/best.pt, the state of least
validation loss, and out_dir/metrics.jsonl, a JSON object a line. Batches and dropout are functions of the seed, the
step and the process alone, so a run that is stopped and resumed (--init_from=resume) becomes what it would have been.
"""

import contextlib
import importlib
import json
import math
import os
import resource
import time
from dataclasses import asdict, dataclass, fields

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
from configurator import UserError, cli, parse
from data import Split, read_meta
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

    def problems(self):
        one_of = dict(
            optimizer=("adamw", "muon"), logger=("", "wandb", "trackio"), dtype=("auto", "float32", "bfloat16", "float16")
        )
        positive = ("eval_interval", "eval_iters", "log_interval", "batch_size", "gradient_accumulation_steps")
        return [
            *super().problems(),
            *(f"{k}={getattr(self, k)!r} is none of {', '.join(v)}" for k, v in one_of.items() if getattr(self, k) not in v),
            *(f"{k}={getattr(self, k)} must be at least 1" for k in positive if getattr(self, k) < 1),
            *([] if self.learning_rate > 0 else [f"learning_rate={self.learning_rate} must be positive"]),
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


# bf16 matrix products without sparsity, FLOP/s, by a part of the card's name (the makers' data sheets)
PEAK_FLOPS = {"A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12,
              "RTX 4090": 165e12, "RTX 3090": 71e12}  # fmt: skip


def train(cfg):
    # processes: one, or several under torchrun
    rank, local_rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device}, but torch {torch.__version__} sees no CUDA card: take --device=cpu")
    if device == "cuda":
        device = f"cuda:{local_rank}"
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if cfg.gradient_accumulation_steps % world:
        raise UserError(
            f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} must be a multiple of the {world} processes"
        )
    micro_steps = cfg.gradient_accumulation_steps // world
    master = rank == 0

    # precision: short matrix products where the hardware has them, float32 for the weights and the residual stream
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32
        short = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif kind == "cpu":
        cpu = torch.cpu.get_capabilities()
        short = "bfloat16" if cpu.get("amx_bf16") or cpu.get("avx512_bf16") or cpu.get("bf16") else "float32"
    else:
        short = "float32"
    dtype = cfg.dtype if cfg.dtype != "auto" else short
    autocast = torch.autocast(kind, getattr(torch, dtype), enabled=dtype != "float32")
    scaler = torch.amp.GradScaler(kind, enabled=dtype == "float16")

    # data
    folder = os.path.join(cfg.data_dir, cfg.dataset)
    meta = read_meta(folder)
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
    latest, best = (os.path.join(cfg.out_dir, name) for name in ("ckpt.pt", "best.pt"))
    config = GPTConfig(**{f.name: getattr(cfg, f.name) for f in fields(GPTConfig)} | dict(vocab_size=vocab_size))
    start, seconds, best_loss, state, weights = 0, 0.0, math.inf, None, None
    if cfg.init_from == "resume":
        state = checkpoint.load(latest)
        there = state["model_config"] | dict(optimizer=state["config"]["optimizer"])
        here = asdict(config) | dict(optimizer=cfg.optimizer)
        differs = [f"{k}={there[k]}, not {here[k]}" for k in there if k not in checkpoint.SCALARS and there[k] != here[k]]
        if differs:
            raise UserError(f"{latest} has {'; '.join(differs)}: resume with the run's own configuration")
        config, weights = GPTConfig(**state["model_config"]), state["model"]
        start, seconds, best_loss = state["step"], state["seconds"], state["best_loss"]
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
    if weights:  # all of them, but for scalars that a donor doesn't have
        model.load_state_dict({n: p for n, p in model.state_dict().items() if n.endswith(".raw")} | weights)
    opts = optimizers(model, cfg, kind)
    if state:
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    state = weights = None  # they are as large as the model and its optimizer
    counts, tokens_per_step = model.count_parameters(), cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    flops_per_token = model.flops_per_token()

    # output
    tty = os.isatty(1)
    bar = tqdm(total=cfg.max_iters, initial=start, unit="step", disable=not (master and tty), dynamic_ncols=True)

    def say(text):
        if master:
            bar.write(text) if tty else print(text, flush=True)

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
            metrics = open_metrics(os.path.join(cfg.out_dir, "metrics.jsonl"), start)
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
                _, loss = running(*batch(0))
            loss.backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a missing or broken compiler raises, the model runs without it
            say(f"torch.compile failed ({str(error).splitlines()[0]}): going on without it")
            running = model
        model.zero_grad(set_to_none=True)
    if world > 1:
        running = DistributedDataParallel(running, device_ids=[local_rank] if kind == "cuda" else None)

    def over_processes(*sums):
        """The sums of these numbers over all processes."""
        total = torch.tensor(sums, dtype=torch.float64).to(device, torch.float32 if kind == "mps" else torch.float64)
        if world > 1:
            dist.all_reduce(total)
        return total.tolist()

    @torch.no_grad()
    def evaluate():
        """Mean loss over the validation windows, in nats per token."""
        model.eval()
        total, count = 0.0, 0
        for i in range(0, len(windows), cfg.batch_size):
            x, y = to_device(validation.windows(windows[i : i + cfg.batch_size]))
            with autocast:
                total += float(model(x, y)[1]) * len(x)
            count += len(x)
        model.train()
        total, count = over_processes(total, count)
        return total / count

    # the loop
    model.train()
    began, clock, clock_step = time.time() - seconds, time.time(), start
    for step in range(start, cfg.max_iters + 1):
        due = step % cfg.eval_interval == 0 or step == cfg.max_iters
        if cfg.eval_only or (due and not step == start > 0):  # a resumed run has evaluated where it starts
            loss = evaluate()
            bits = loss / math.log(2) * sum(s["tokens"] for s in meta["shards"]["val"]) / meta["bytes"]["val"]
            scalars = {n: m().mean().item() for n, m in model.named_modules() if isinstance(m, Scalar) and m.raw is not None}
            log(step=step, tokens=step * tokens_per_step, val_loss=loss, val_bits_per_byte=bits, scalars=scalars)
            say(f"step {step:6d}: validation loss {loss:.4f}, {bits:.4f} bits per byte")
            if master and not cfg.eval_only:
                state = dict(
                    model=model.state_dict(),
                    optimizers=[opt.state_dict() for opt in opts],
                    scaler=scaler.state_dict(),
                    step=step,
                    seconds=time.time() - began,
                    best_loss=min(loss, best_loss),
                    model_config=asdict(config),
                    config=asdict(cfg),
                    tokenizer=meta["tokenizer"],
                )
                checkpoint.save(latest, state)
                if loss < best_loss:
                    checkpoint.save(best, state)
            best_loss = min(loss, best_loss)
            clock, clock_step = time.time(), step
        if step == cfg.max_iters or cfg.eval_only:
            break

        # dropout is a function of seed, step and process, as the batches are
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
                    _, loss = running(*batch(step * micro_steps + micro_step))
                scaler.scale(loss / micro_steps).backward()
            mean_loss += loss.detach() / micro_steps
        for opt in opts:
            scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        if not scaler.is_enabled() or norm.isfinite():  # the scaler alone would let one of two optimizers step
            for opt in opts:
                scaler.step(opt)
        scaler.update()
        model.zero_grad(set_to_none=True)

        bar.update()
        if step % cfg.log_interval == 0:
            loss = over_processes(float(mean_loss))[0] / world
            now = time.time()
            speed = (step + 1 - clock_step) * tokens_per_step / (now - clock)
            clock, clock_step = now, step + 1
            record = dict(train_loss=loss, lr=rate, grad_norm=norm.item(), tokens_per_second=speed)
            if kind == "cuda":
                record |= dict(memory_gb=torch.cuda.max_memory_allocated() / 1e9)
                peak = next((f for card, f in PEAK_FLOPS.items() if card in torch.cuda.get_device_name()), None)
                record |= dict(mfu=speed * flops_per_token / (peak * world)) if peak and dtype != "float32" else {}
            else:
                record |= dict(memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
            log(step=step, tokens=(step + 1) * tokens_per_step, **record)
            say(f"step {step:6d}: loss {loss:.4f}, {speed:,.0f} tokens/s")

    bar.close()
    if master and cfg.logger:
        tracker.finish()
    if world > 1:
        dist.destroy_process_group()


def open_metrics(path, step):
    """metrics.jsonl, open to append to, without the lines of steps that a run resumed at `step` takes again."""
    kept = []
    if step and os.path.exists(path):
        with open(path) as file:
            kept = [line for line in file if json.loads(line)["step"] < step + ("val_loss" in line)]
    file = open(path, "w")
    file.writelines(kept)
    return file


def main(arguments):
    train(parse(Config, arguments))


if __name__ == "__main__":
    cli(main)
