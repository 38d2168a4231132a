"""Train a diffusion model while choosing its data: online (JEST, AJEST) or offline (coreset, class weights).

"Autoguided Online Data Curation for Diffusion Model Training" (arXiv 2509.15267) and "Pruning then
Reweighting: Towards Data-Efficient Training of Diffusion Models" (arXiv 2409.19128). One run is one folder;
the same command again resumes it. On the built-in 2-D tree, in a minute or two on a CPU:

    python train.py --selector ajest --early-steps 5000
"""
import argparse
import contextlib
import copy
import datetime
import importlib.util
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch

import data
import fid
import guide
import model

# select.py shares its name with a standard-library module, so it is loaded by path, under another name, by
# which torch.compile finds it again.
_spec = importlib.util.spec_from_file_location("batch_select", Path(__file__).with_name("select.py"))
select = sys.modules["batch_select"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(select)


# ------------------------------------------------------------------------------------------------------------
# Flags: name, type, default, help. A tuple of five is the default by preset, chosen by the data: the 2-D
# tree, images up to 32 pixels, larger ones, latents; the fifth replaces it for images and latents on a CPU.
# The tree follows the toy of 2406.02507, images EDM's and EDM2's noise levels; the decay suits short runs.

def share_or_file(text):
    """An argparse type: a fraction in (0, 1], else the name of a file."""
    try:
        return data.number(float, "(0, 1]")(text)
    except ValueError:
        return text


PRESETS = ("tree", "32", "64", "latent", "cpu")
N, X = lambda interval: data.number(int, interval), lambda interval: data.number(float, interval)
SOME, ANY, SHARE = "[1, inf)", "[0, inf)", "[0, 1)"
FLAGS = {
    "data": [
        ("--data", str, None, "folder, zip, tar, CIFAR-10 or .npz; none = the 2-D tree"),
        ("--out", str, None, "run folder; none = runs/DATA-SELECTOR"),
        ("--size", N("[8, 4096]"), None, "center-crop and resize images to this many pixels"),
        ("--flip", bool, (False, True, True, False, None), "horizontal flips, labelled so as not to leak"),
        ("--holdout", N(ANY), 0, "examples held out for the validation loss (0 = off)"),
        ("--imbalance", X(SOME), None, "make classes long-tailed: head over tail, e.g. 100"),
    ],
    "model and optimization": [
        ("--channels", N(SOME), (64, 64, 64, 128, 16), "width of the network"),
        ("--batch", N(SOME), (816, 512, 256, 256, 64), "examples trained on per step, whatever the selector"),
        ("--micro-batch", N(ANY), 0, "compute a batch in parts of this size (0 = off)"),
        ("--steps", N(SOME), (8_000, 20_000, 20_000, 20_000, 1000), "optimizer steps"),
        ("--minutes", X(ANY), 0, "stop after this much training time (0 = no limit)"),
        ("--lr", X("(0, inf)"), (0.01, 0.01, 0.01, 0.01, None), "Adam learning rate"),
        ("--lr-decay", N(SOME), (512, 2000, 4000, 4000, 400), "steps after which it falls as 1/sqrt(step)"),
        ("--warmup", N(ANY), (0, 200, 200, 200, 50), "steps of linear warm-up (0 = off)"),
        ("--dropout", X(SHARE), (0, 0.13, 0, 0, 0), "dropout inside the residual blocks"),
        ("--ema", [X("(0, 0.28)")], ([0.02, 0.10], [0.05, 0.10], [0.05, 0.10], [0.05, 0.10], None),
         "EMA lengths relative to training; the first is evaluated"),
        ("--P-mean", X("(-inf, inf)"), (-2.3, -1.2, -0.8, -0.4, None), "mean of ln sigma in training"),
        ("--P-std", X("(0, inf)"), (1.5, 1.2, 1.6, 1.0, None), "standard deviation of ln sigma in training"),
        ("--targets", ("sample", "batch", "all"), ("all", "sample", "sample", "sample", None),
         "what D learns: x0 itself, or its posterior mean given the batch's or all examples (2302.00670)"),
        ("--guided-targets", X(SOME), 1, "move the targets by 1 - 1/W of learner - guide, so that the "
         "network itself becomes the autoguided denoiser of weight W (1 = off)"),
    ],
    "online selection (2509.15267)": [
        ("--selector", ("uniform", "jest", "ajest"), "uniform", "how batches are made"),
        ("--filter", X(SHARE), 0.8, "share of the super-batch that is left out"),
        ("--chunks", N(SOME), 16, "chunks in which JEST fills the batch"),
        ("--score", select.SCORES, "learnability", "what makes an example worth it"),
        ("--invert", True, False, "prefer low scores"),
        ("--gain", X(ANY), 0, "multiply standardized scores (0 = raw scores)"),
        ("--debias", True, False, "weight by inverse inclusion probability"),
        ("--early-steps", N(ANY), 0, "select during the first N steps (0 = throughout)"),
        ("--until-better", True, False, "select until the learner beats the reference"),
        ("--once-better", True, False, "select once the learner beats the reference"),
        ("--after", ("uniform", "full"), "uniform", "where selection is over: batches of b, or all of B"),
        ("--interpolate", X(ANY), 0, "score the autoguided denoiser of weight X (0 = off)"),
        ("--reference", str, None, "checkpoint that jest scores against; none = the learner's EMA"),
    ],
    "guide, sampling and evaluation (2406.02507)": [
        ("--guide", str, "auto", "checkpoint; train = train one first; snapshot = the learner's own EMA "
         "after guide-steps; none; auto = train where selection needs it from the start, else snapshot"),
        ("--guide-channels", N(SOME), (32, None, None, None, None), "width of a trained guide; none = half"),
        ("--guide-batch", N(SOME), (4096, None, None, None, None), "its batch; none = the run's"),
        ("--guide-steps", N(SOME), None,
         "its steps, or the snapshot's; none = an eighth (tree: 1024, at most 512)"),
        ("--guidance", X(ANY), (3.0, 1.6, 1.8, 1.8, None), "guidance weight of samples (1 = off)"),
        ("--sampling-steps", N(SOME), (32, 32, 32, 32, 16), "Heun steps"),
        ("--sigma-max", X("(0.002, inf)"), (5.0, 80.0, 80.0, 80.0, None), "noise level sampling starts at"),
        ("--eval-every", N(ANY), 0, "steps between evaluations (0 = only at the end)"),
        ("--eval-samples", N(ANY), (163_840, 10_000, 10_000, 10_000, 256), "samples scored (0 = none)"),
        ("--metrics", str, "auto", "own:CKPT, inception, pixels, none; auto = own, fitted first"),
    ],
    "coreset and class weights (2409.19128)": [
        ("--keep", share_or_file, None, "fraction of each class to keep, or a .npy file of indices"),
        ("--prune", data.PRUNE_SCORES, "gaussian", "what is kept first"),
        ("--features", str, "pixels", "what it sees: pixels, own:CKPT, inception, or a .npy file"),
        ("--dro", str, None, "train a proxy that finds class weights against this reference; auto = all"),
        ("--eta", X("(0, inf)"), 0.01, "step size of the class weights"),
        ("--class-weights", str, None, "class_weights.json to train with, or inverse (of frequency)"),
        ("--reweight", ("loss", "sampling"), "loss", "how the weights act"),
    ],
    "run": [
        ("--seed", N("[0, 1e15]"), 0, "of initialization, data, noise and selection"),
        ("--device", data.device, "cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1 or mps"),
        ("--bf16", bool, None, "bf16 autocast (none = on CUDA, but for the tree)"),
        ("--compile", bool, None, "torch.compile (none = on CUDA)"),
        ("--log-every", N(SOME), (100, 50, 50, 50, 20), "steps between log lines"),
        ("--save-every", X(ANY), 60, "seconds between checkpoints"),
    ]}


def build_parser():
    """The parser of all flags; a preset's flag that is not given is left out of what it returns."""
    parser = data.parser(__doc__, "[--data DATA] [flags]")
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, text in rows:
            how = dict(help=text, default=default)
            if isinstance(default, tuple):
                shown = ", ".join(str(value) for value in default if value is not None)
                how = dict(help=f"{text} (presets: {shown})", default=argparse.SUPPRESS)
            if kind in (True, bool):
                how["action"] = "store_true" if kind is True else argparse.BooleanOptionalAction
            elif isinstance(kind, tuple):
                how["choices"] = kind
            else:
                how.update(dict(type=kind[0], nargs="+") if isinstance(kind, list) else dict(type=kind))
            group.add_argument(name, **how)
    return parser


# ------------------------------------------------------------------------------------------------------------
# The resolved settings: a namespace of plain values, written to config.json before the first step.

def resolve(args, dataset):
    """Fill in the preset and what follows from the data, and check what no single flag can."""
    name = dataset.kind if dataset.kind in PRESETS else "32" if dataset.shape[-1] <= 32 else "64"
    small = torch.device(args.device).type == "cpu" and name != "tree"
    preset = {}
    for flag, _, default, _ in sum(FLAGS.values(), []):
        if isinstance(default, tuple):
            own = default[-1] if small else None
            preset[flag[2:].replace("-", "_")] = default[PRESETS.index(name)] if own is None else own
    c = argparse.Namespace(**{**preset, **vars(args)})
    c.preset, c.small, c.kind, c.shape = name, small, dataset.kind, list(dataset.shape)
    c.classes, c.class_names, c.data_fingerprint = (
        dataset.classes, list(dataset.class_names), dataset.fingerprint)
    c.net_classes = 2 * max(c.classes, 1) if c.flip else c.classes
    c.mean, c.std = (list(getattr(dataset, moment, ())) for moment in ("mean", "std"))
    c.bf16, c.compile = model.able(c.device, c.bf16 if name != "tree" else bool(c.bf16), c.compile)
    if c.guide == "auto":
        c.guide = "train" if c.selector == "ajest" or c.dro == "auto" else "snapshot"
    eighth = math.ceil(c.steps / 8)
    if not c.guide_steps and c.guide == "snapshot":
        c.guide_steps = min(eighth, 512) if name == "tree" else eighth
    elif not c.guide_steps:
        c.guide_steps = 1024 if name == "tree" else 100 * math.ceil(eighth / 100)
    c.guide_channels, c.guide_batch = c.guide_channels or math.ceil(c.channels / 2), c.guide_batch or c.batch
    if c.guided_targets != 1 and "guidance" not in args:
        c.guidance = 1.0                                        # the network itself is the guided denoiser
    B, part = super_batch_size(c), c.micro_batch or 1
    for wrong, why in [
        (c.selector == "ajest" and c.guide in ("none", "snapshot"),
         "--selector ajest needs a --guide from the start: train, or a checkpoint"),
        (c.guided_targets != 1 and c.guide == "none", "--guided-targets needs a --guide"),
        (c.dro == "auto" and c.class_weights, "--dro auto and --class-weights exclude each other"),
        (c.until_better and c.once_better, "--until-better and --once-better exclude each other"),
        (name != "tree" and (c.shape[1] != c.shape[2] or c.shape[1] % 8),
         f"--size: the UNet needs square images of a multiple of 8 pixels, not {c.shape}"),
        (name == "tree" and (c.keep or c.dro or c.class_weights or c.holdout or c.imbalance),
         "--keep, --dro, --class-weights, --holdout and --imbalance need --data: the tree is drawn afresh"),
        (not c.classes and (c.dro or c.class_weights or c.imbalance),
         f"--dro, --class-weights and --imbalance need labels: {c.data} has none"),
        (c.flip and name in ("tree", "latent"), "--flip is for images"),
        (name != "tree" and 0 < c.holdout >= len(dataset),
         f"--holdout {c.holdout}: the data has fewer examples"),
        (any(n % (WORLD * part) for n in (c.batch, B if c.selector != "uniform" else c.batch)),
         f"--batch {c.batch} and the super-batch of {B} (--filter) must be multiples of --micro-batch "
         f"times the number of processes, {WORLD * part}"),
        (c.guide_batch % WORLD, f"--guide-batch must be a multiple of the {WORLD} processes")]:
        if wrong:
            raise data.DataError(why)
    return c


def super_batch_size(c):
    """B = b / (1 - filter ratio), the number of examples scored to train on b."""
    return round(c.batch / (1 - c.filter))


def model_config(c):
    """What a checkpoint needs to rebuild and sample its denoiser: plain values only."""
    return dict(net="mlp" if c.kind == "tree" else "unet", kind=c.kind, shape=c.shape, channels=c.channels,
                classes=c.net_classes, class_names=c.class_names, dropout=c.dropout, sigma_data=0.5,
                mean=c.mean, std=c.std, sigma_max=c.sigma_max, guidance=c.guidance,
                guided_targets=c.guided_targets)


# ------------------------------------------------------------------------------------------------------------
# Several processes (torchrun): each works on its rows of the one draw that (seed, step) defines. For one
# process these are the identity.

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
ROWS = slice(RANK, None, WORLD)


def join(device):
    """Take part in the group of processes; a long timeout, for the others wait for evaluations."""
    if WORLD > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                                             timeout=datetime.timedelta(days=1))


def gather(tensor):
    """The rows of all processes, [n] -> [world * n]."""
    if WORLD == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(WORLD)]
    torch.distributed.all_gather(parts, tensor)
    return torch.cat(parts)


def average(tensors):
    """Average a list of tensors over the processes, in place and in one message."""
    if WORLD > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        torch.distributed.all_reduce(flat)
        parts = (flat / WORLD).split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors)])


@contextlib.contextmanager
def first():
    """Process 0 runs the block first; the others follow, and find the files that it wrote."""
    if RANK:
        torch.distributed.barrier()
    try:
        yield
    finally:
        if not RANK and WORLD > 1:
            torch.distributed.barrier()


# ------------------------------------------------------------------------------------------------------------
# Seconds of training. Pauses (evaluation, compilation, saving) are left out and booked apart; selection is
# part of training and also summed up for itself, on CUDA by events, so that nothing waits until a log line.

class Clock:
    def __init__(self, device, progress):
        self.cuda, self.progress, self.marks = device.type == "cuda", progress, []
        self.began = time.monotonic() - progress["seconds"]

    def seconds(self):
        return time.monotonic() - self.began

    @contextlib.contextmanager
    def pause(self, name=None):
        """Leave the block out of the seconds, and add it to progress[name]."""
        self.read()
        yield
        if self.cuda:
            torch.cuda.synchronize()
        spent = self.seconds() - self.progress["seconds"]
        self.began += spent
        if name:
            self.progress[name] += spent

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def selection(self):
        began = self.mark()
        yield
        self.marks.append((began, self.mark()))

    def read(self):
        """Bring the seconds in `progress` up to date; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        self.progress["seconds"] = self.seconds()
        spent = (a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in self.marks)
        self.progress["select_seconds"] += sum(spent)
        self.progress["select_steps"] += len(self.marks)
        self.marks = []


# ------------------------------------------------------------------------------------------------------------
# What a checkpoint holds: network, optimizer, EMAs, class weights, counters, the log. `learn` is one step.
# What is RESUMABLE may change when a run goes on.

RESUMABLE = {"out", "data", "steps", "minutes", "device", "bf16", "compile", "micro_batch", "save_every",
             "eval_every", "eval_samples", "sampling_steps", "guidance", "metrics", "features_id"}
OF_RUN = "a checkpoint of this run (give another --out, or delete it)"


class State:
    def __init__(self, c, path):
        self.c, self.path, self.device, self.guide = c, path, torch.device(c.device), None
        torch.manual_seed(data.stream(c.seed, 0, "init").initial_seed())
        self.denoiser = model.build(model_config(c)).to(self.device).to(memory_format=torch.channels_last)
        self.projected = model.projected_weights(self.denoiser)
        self.project = torch.compile(model.project) if c.compile and self.projected else model.project
        self.project(self.projected)
        self.params, self.ema = list(self.denoiser.parameters()), model.PowerEMA(self.denoiser, c.ema)
        self.optimizer = torch.optim.Adam(self.params, lr=c.lr, betas=(0.9, 0.99), eps=1e-8, fused=True)
        self.dro = data.GroupDRO(c.classes, c.eta).to(self.device) if c.dro else torch.nn.Identity()
        self.parts = dict(model=self.denoiser, ema=self.ema, optimizer=self.optimizer, dro=self.dro)
        self.objective = self.accelerate(self._objective)
        self.records, self.progress = [], dict(
            step=0, seconds=0.0, select_seconds=0.0, eval_seconds=0.0, compile_seconds=0.0,
            examples_trained=0, examples_seen=0, select_steps=0, selecting=not c.once_better, snapshot=0)
        # The loss sum and the steps since the log line; the non-finite steps, and those in a row.
        self.tally = torch.zeros(4, device=self.device)
        if path.exists():
            self.restore()
        self.clock, self.rated = Clock(self.device, self.progress), (0, 0.0)
        if not RANK:                                            # the log is what the checkpoint says
            with data.writing(path.with_name("log.jsonl")) as file:
                file.write("".join(json.dumps(record) + "\n" for record in self.records).encode())

    def accelerate(self, function):
        return model.accelerate(function, self.device, self.c.bf16, self.c.compile)

    def _objective(self, x0, noise, sigma, labels, target, weight, D_guide):
        """Mean weighted objective and the losses [b] against the target. With a guide the target moves by
        1 - 1/W of D - D_guide: at the fixed point D = D_guide + W (target - D_guide). EDM2's uncertainty u
        learns from the loss against x0, so that no target moves the weighting of the noise levels."""
        total, D_x = self.denoiser.loss(x0, noise, sigma, labels, target)
        losses, D = total.detach(), D_x.detach()
        if D_guide is not None:
            moved = target + (1 - 1 / self.c.guided_targets) * (D - D_guide)
            total = model.per_example_loss(D_x, moved, sigma)
        if self.c.kind != "tree":
            u = self.denoiser.u(sigma)
            total = total / u.detach().exp() + model.per_example_loss(D, x0, sigma) / u.exp() + u
        return (total if weight is None else weight * total).mean(), losses

    def rate(self):
        """Learning rate: inverse square root after `lr_decay` steps, after a linear warm-up (EDM2 eq. 67)."""
        c, step = self.c, self.progress["step"]
        return c.lr / math.sqrt(max(step / c.lr_decay, 1)) * min(1, (step + 1) / (c.warmup + 1))

    def gradients(self, batch, weight=None):
        """Backward pass by micro-batches; returns the losses [b]."""
        n, losses = len(batch.x0), []
        size = self.c.micro_batch or n
        for rows in (slice(i, i + size) for i in range(0, n, size)):
            part, D_guide = batch.rows(rows), None
            if self.guide:
                with torch.no_grad():
                    D_guide = self.guide(part.x, part.sigma, part.labels)
            objective, loss = self.objective(*part, None if weight is None else weight[rows], D_guide)
            (objective * (size / n)).backward()
            losses.append(loss)
        return torch.cat(losses)

    def learn(self, batch, weight=None):
        """One optimizer step on b examples; returns their losses [b]. Non-finite gradients become 0."""
        c, p = self.c, self.progress
        if c.dropout:
            torch.manual_seed(data.stream(c.seed, p["step"], "dropout").initial_seed())
        losses = self.gradients(batch, weight)
        grads = [parameter.grad for parameter in self.params if parameter.grad is not None]
        average(grads)
        bad = 1 - torch.stack(torch._foreach_norm(grads)).sum().isfinite().float()
        for grad in grads:
            torch.nan_to_num(grad, 0, 0, 0, out=grad)
        self.optimizer.param_groups[0]["lr"] = self.rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.project(self.projected)
        p["step"] += 1
        p["examples_trained"] += len(batch.x0) * WORLD
        self.ema.update(p["step"])
        self.tally += torch.stack([(1 - bad) * torch.nan_to_num(losses.mean(), 0, 0, 0), 1 - bad, bad, bad])
        self.tally[3] *= bad
        return losses

    def take_guide(self, guide_path, draw, reweight):
        """Guided targets begin; whatever a step compiles is compiled before the clock goes on."""
        c, step = self.c, self.progress["step"]
        if guide_path and c.guided_targets != 1:
            self.guide = self.accelerate(matching(guide_path, "--guide", c))
        if c.compile and step < c.steps:
            full = draw.curator and c.after == "full"           # a second shape
            for batches in (draw.batches, draw.super_batches) if full else (draw.batches,):
                batch = batches[step]
                weight = torch.ones_like(batch.sigma) if c.debias and draw.curator else None
                self.gradients(batch, reweight(batch, weight))
                self.optimizer.zero_grad(set_to_none=True)
            if draw.curator:
                draw.curator.measure(draw.super_batches[step])

    def evaluation(self, evaluate, guide_path):
        """Write the records of evaluate(state, guide_path), with the counters of this step."""
        with self.clock.pause("eval_seconds"):
            records = evaluate(self, guide_path)
        for record in records:
            counters = {key: value for key, value in self.progress.items() if key in fid.NOT_METRICS}
            self.write({"kind": "eval", **counters, **record})

    def write(self, record):
        """One line more in the log, which lives in the checkpoint; log.jsonl follows it."""
        self.records.append(record)
        if not RANK:
            with open(self.path.with_name("log.jsonl"), "a") as file:
                file.write(json.dumps(record) + "\n")

    def log(self, title, stats):
        """The interval's record and progress line; the one place of the loop that waits for the device."""
        self.clock.read()
        c, p = self.c, self.progress
        total, steps, bad, in_a_row = self.tally.tolist()
        self.tally[:2] = 0
        rate = (p["examples_trained"] - self.rated[0]) / max(p["seconds"] - self.rated[1], 1e-9)
        self.rated, loss = (p["examples_trained"], p["seconds"]), total / max(steps, 1)
        self.write(dict(kind="train", **p, loss=loss, lr=self.rate(), examples_per_second=rate,
                        non_finite=int(bad), **stats))
        memory = f"  {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB" if self.clock.cuda else ""
        left = round(self.seconds_left())
        if not RANK:
            share = p["select_seconds"] / max(p["seconds"], 1e-9)
            data.progress(f"{title}: step {p['step']}/{c.steps}  loss {loss:.4f}  {rate:,.0f} examples/s  "
                          f"selection {share:.0%}{memory}  {left // 60}:{left % 60:02d} left",
                          last=p["step"] >= c.steps)
        if in_a_row >= 100:
            raise data.DataError("100 steps in a row had a non-finite loss or gradient: lower --lr, "
                                 "or try --no-bf16")

    def seconds_left(self):
        """From the seconds a step took so far; steps that select cost more, and end at `early_steps`."""
        c, p = self.c, self.progress
        steps = c.steps - p["step"]
        selecting = steps if p["select_steps"] and p["selecting"] else 0
        if c.early_steps:
            selecting = min(selecting, max(c.early_steps - p["step"], 0))
        left = (steps * (p["seconds"] - p["select_seconds"]) / max(p["step"], 1)
                + selecting * p["select_seconds"] / max(p["select_steps"], 1))
        return max(0, min(left, 60 * c.minutes - p["seconds"]) if c.minutes else left)

    def save(self, path=None, averages=None):
        """Write the checkpoint; with a path and averages only what a denoiser needs (the snapshot)."""
        if not RANK:
            parts = {name: part.state_dict() for name, part in self.parts.items()}
            content = dict(parts, records=self.records, config=vars(self.c), tally=self.tally,
                           progress=self.progress)
            content = dict(model=parts["model"], ema=averages) if path else content
            with data.writing(path or self.path) as file:
                torch.save(dict(content, model_config=model_config(self.c)), file)

    def restore(self):
        """Take over what the checkpoint holds; DataError where it is another run's, or none."""
        with data.reading(self.path, OF_RUN):
            checkpoint = torch.load(self.path, map_location=self.device, weights_only=True)
            same_settings(self.c, checkpoint["config"], self.path)
            for name, part in self.parts.items():
                part.load_state_dict(checkpoint[name])
            self.tally.copy_(checkpoint["tally"])
            self.records = list(checkpoint["records"])
            self.progress = {key: type(value)(checkpoint["progress"][key])
                             for key, value in self.progress.items()}


def same_settings(c, old, path):
    """DataError where the run whose checkpoint lies at `path` has other settings than `c`."""
    for key, value in vars(c).items():
        if key not in RESUMABLE and old.get(key) != value:
            raise data.DataError(f"{path.parent} holds a run with --{key.replace('_', '-')} {old.get(key)}, "
                                 f"not {value}: give another --out, or delete it")


# ------------------------------------------------------------------------------------------------------------
# SIGINT and SIGTERM are noted, so that the loop can save before it ends.

@contextlib.contextmanager
def signals():
    """The list of the numbers of those that came."""
    caught, kinds = [], (signal.SIGINT, signal.SIGTERM)
    old = {kind: signal.signal(kind, lambda number, _: caught.append(number)) for kind in kinds}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------
# The training loop: draw and select, learn, take the snapshot, log, evaluate, save.

def fit(c, dataset, out, keep=None, guide_path=None, class_weights=None, evaluate=None, title="train"):
    """Train the model that `c` describes into the folder `out`, or go on where its checkpoint stands.
    keep: sorted indices to train on, None = all. class_weights: [classes] or None.
    evaluate(state, guide_path) -> records is called every `eval_every` steps and at the end.
    Returns the log, a list of records."""
    out.mkdir(parents=True, exist_ok=True)
    state = State(c, out / "checkpoint.pt")
    p, clock, saved = state.progress, state.clock, time.monotonic()
    guide_path = out / "guide.pt" if p["snapshot"] else guide_path
    draw = Draw(state, dataset, keep, class_weights, guide_path)
    reweight = Reweighting(state, dataset, keep, class_weights)
    agreed = p["seconds"]                                       # the same in all processes

    def finished():
        return p["step"] >= c.steps or agreed >= (60 * c.minutes or math.inf)

    with clock.pause("compile_seconds"):
        state.take_guide(guide_path, draw, reweight)
    with signals() as caught:
        while not finished():
            # Draw b examples, or select them; learn; then the class weights learn from the same losses.
            step = p["step"]
            log_line = (step + 1) % c.log_every == 0
            batch, weight, stats = draw(step, log_line)
            losses = state.learn(batch, reweight(batch, weight))
            reweight.update(batch, losses)

            # The snapshot: the learner's own EMA becomes the guide.
            if c.guide == "snapshot" and not p["snapshot"] and step + 1 >= c.guide_steps:
                p["snapshot"], guide_path = step + 1, out / "guide.pt"
                with clock.pause("compile_seconds"), first():
                    state.save(guide_path, state.ema.state_dict())
                    state.take_guide(guide_path, draw, reweight)

            # Log, evaluate, save.
            stop = 0
            if WORLD == 1 or log_line or step + 1 == c.steps:   # else no message between the processes
                agreed, stop = agree(clock.seconds(), caught[0] if caught else 0)
            if log_line or finished():
                state.log(title, stats)
            if evaluate and c.eval_every and (step + 1) % c.eval_every == 0 and not finished():
                state.evaluation(evaluate, guide_path)
            if stop or finished() or time.monotonic() - saved >= c.save_every:
                with clock.pause():
                    state.save()
                saved = time.monotonic()
            if stop:
                raise SystemExit(128 + stop)
    if evaluate and not any(r["kind"] == "eval" and r["step"] == p["step"] for r in state.records):
        state.evaluation(evaluate, guide_path)
        state.save()
    if c.dro and not RANK:
        reweight.write(out / "class_weights.json")
    if WORLD > 1:
        torch.distributed.barrier()                             # the files of this stage are there
    return state.records


class Draw:
    """What a step trains on, drawn by (seed, step) or selected: called with (step, log_line), returns a Batch
    of b, weights [b] or None, and statistics for the log."""

    def __init__(self, state, dataset, keep, class_weights, guide_path):
        self.state, c = state, state.c
        how = dict(device=state.device, pool=keep, flip=c.flip, targets=c.targets, P_mean=c.P_mean,
                   P_std=c.P_std, rows=ROWS,
                   class_weights=class_weights if c.reweight == "sampling" else None)
        self.batches, self.super_batches = (
            data.Batches(dataset, n, c.seed, **how) for n in (c.batch, super_batch_size(c)))
        self.curator = make_curator(state, guide_path)

    def __call__(self, step, log_line):
        c, p, curator, super_batches = self.state.c, self.state.progress, self.curator, self.super_batches
        if curator and curator.active(step, p, super_batches, average):
            # Draw B examples and keep b of them, with their noise levels, noise and targets.
            with self.state.clock.selection():
                candidates = super_batches[step]
                generator = data.stream(c.seed, step, f"select{RANK or ''}", self.state.device)
                batch, weight = curator.choose(candidates, c.batch // WORLD, generator)
            p["examples_seen"] += super_batches.n
            return batch, weight, curator.statistics(candidates, batch) if log_line else {}
        source = super_batches if curator and c.after == "full" and not c.once_better else self.batches
        p["examples_seen"] += source.n
        return source[step], None, {}


def agree(seconds, caught):
    """The seconds and the signal of all processes, so that they stop at the same step."""
    if WORLD > 1:
        both = torch.tensor([seconds, caught > 0], device=f"cuda:{torch.cuda.current_device()}"
                            if torch.distributed.get_backend() == "nccl" else "cpu")
        average([both])
        seconds, caught = both[0].item(), signal.SIGTERM if both[1] > 0 else 0
    return seconds, caught


def matching(path, flag, c):
    """The denoiser at `path`, to compare with or to guide by; DataError where it is for other data."""
    path = model.checkpoint_of(path)
    with data.reading(path, "a denoiser of this program"):
        other = model.load_denoiser(path, device=c.device)
    if other.shape != tuple(c.shape) or other.classes != c.net_classes:
        raise data.DataError(f"{flag} {path}: denoises {list(other.shape)} with {other.classes} labels, "
                             f"this run {c.shape} with {c.net_classes} (--size, --flip)")
    return other


def make_curator(state, guide_path):
    """The Curator of a run, None for uniform batches. The reference is the guide, a checkpoint, or the
    learner's EMA, whose tensors the copy shares, so that it is always current."""
    c, reference = state.c, None
    rules = c.interpolate or c.until_better or c.once_better
    if c.selector == "uniform":
        return None
    if c.selector == "ajest":
        reference = matching(guide_path, "--guide", c)
    elif c.reference:
        reference = matching(c.reference, "--reference", c)
    elif rules or c.score in select.NEEDS_REFERENCE:
        reference = copy.deepcopy(state.denoiser).eval().requires_grad_(False)
        for parameter, value in zip(reference.parameters(), state.ema.averages[c.ema[0]]):
            parameter.data = value
    return select.Curator(c, state.denoiser, reference, state.accelerate)


# ------------------------------------------------------------------------------------------------------------
# Class weights in the loss, whose mean over the examples is 1: given ones, or those that group DRO is finding
# (2409.19128). The proxy minimizes sum_c alpha_c L_c; alpha follows its losses in excess of the reference's.

class Reweighting:
    """Called with a Batch and weights [b] or None -> weights [b] or None."""

    def __init__(self, state, dataset, keep, class_weights):
        self.c, self.dro, self.given = state.c, state.dro, None
        if class_weights is not None and self.c.reweight == "loss":
            self.given = class_weights.to(state.device)
        if self.c.dro:
            self.counts = class_counts(dataset, keep).to(state.device)
            self.reference = state.accelerate(matching(self.c.dro, "--dro", self.c).loss)

    def per_class(self, alpha):
        return alpha * self.counts.sum() / self.counts.clamp_min(1)

    def __call__(self, batch, weight=None):
        per_class = self.per_class(self.dro.weights) if self.c.dro else self.given
        if per_class is None:
            return weight
        return per_class[batch.labels % self.c.classes] * (1 if weight is None else weight)

    @torch.no_grad()
    def update(self, batch, losses):
        """One step of group DRO, from the proxy's losses [b] and the reference's on the same rows."""
        if self.c.dro:
            excess = losses - self.reference(*batch)[0]
            self.dro.update(gather(excess), gather(batch.labels % self.c.classes))

    def write(self, path):
        c, weights = self.c, self.per_class(self.dro.mean).tolist()
        with data.writing(path) as file:
            classes = dict(zip(c.class_names, weights))
            content = dict(classes=classes, eta=c.eta, steps=c.steps, reference=c.dro)
            file.write(json.dumps(content, indent=1).encode())


def class_counts(dataset, keep):
    """How many examples of each class there are to train on: float32 [classes]."""
    labels = dataset.labels if keep is None else dataset.labels[keep]
    return torch.bincount(labels, minlength=dataset.classes).float()


def read_class_weights(path, c):
    """class_weights.json -> float32 [classes]; DataError where it is for other classes."""
    with data.reading(path, "class weights for these classes"):
        weights = json.loads(Path(path).read_text())["classes"]
        values = torch.tensor([float(weights.pop(name)) for name in c.class_names])
        if weights or not values.isfinite().all() or values.min() < 0 or values.sum() <= 0:
            raise ValueError("they must be finite, not negative, not all zero")
        return values


# ------------------------------------------------------------------------------------------------------------
# Evaluation: the same noise for every run and step, unguided and guided; metrics by name and a picture.

class Evaluator:
    """Called with (state, guide_path or None): a record unguided and one guided, and samples.png."""

    def __init__(self, c, dataset, out, held_out, guide_seconds, other_seconds):
        self.c, self.dataset, self.out, self.held_out = c, dataset, out, held_out
        self.guide_seconds, self.other_seconds = guide_seconds, other_seconds
        self.main, self.guide, self.real = None, None, None

    def __call__(self, state, guide_path):
        if RANK:
            return []
        c, records, pictures, titles = self.c, [], [], []
        if self.main is None:                                   # compiled once, for all evaluations
            self.main = copy.deepcopy(state.denoiser).eval().requires_grad_(False)
            self.denoise = state.accelerate(self.main)
        if self.guide is None and guide_path and c.guidance != 1:
            self.guide = state.accelerate(matching(guide_path, "--guide", c))
        state.ema.copy_to(self.main, c.ema[0])
        for w in [1.0] + [c.guidance] * (self.guide is not None):
            data.progress(f"evaluating, guidance {w:g}")
            needs_guide = w != 1 or c.selector == "ajest" or c.guided_targets != 1
            score = self.tree if c.kind == "tree" else self.images
            metrics, x = score(guide.autoguided(self.denoise, self.guide, w))
            if w == 1 and c.kind == "tree":
                metrics["score_error"] = fid.score_error(self.denoise, self.dataset)
            if w == 1 and self.held_out is not None:
                metrics["validation_loss"] = self.validation_loss()
            seconds = self.other_seconds + needs_guide * self.guide_seconds
            records.append(dict(guidance=w, reference_seconds=seconds, **metrics))
            pictures.append(data.density_picture(x) if c.kind == "tree" else
                            data.image_grid(x[:80], min(c.classes or 10, 10)))
            titles.append("unguided samples" if w == 1 else f"guided samples, w = {w:g}")
        if c.kind == "tree":
            pictures, titles = [data.density_picture(self.dataset), *pictures], ["exact density", *titles]
        with data.writing(self.out / "samples.png") as file:
            data.panels(pictures, titles).save(file, format="PNG")
        return records

    def tree(self, denoiser):
        """The metrics of n sampled points, and the points [n, 2]."""
        c = self.c
        noise = torch.randn(c.eval_samples, 2, generator=data.stream(0, 0, "eval"))
        if self.real is None:                                   # where the exact denoiser takes the first
            self.real = fid.exact_endpoints(self.dataset, noise[:4096].to(c.device))
        how = dict(steps=c.sampling_steps, sigma_max=c.sigma_max)
        points = torch.cat([guide.heun(denoiser, part.to(c.device), **how) for part in noise.split(2048)])
        return fid.tree_metrics(points, self.dataset, self.real), points.cpu()

    def images(self, denoiser):
        """The metrics of n sampled images or latents, and these [n, C, H, W]."""
        c, n = self.c, self.c.eval_samples
        labels = torch.arange(n) % c.classes if c.classes else torch.zeros(n, dtype=torch.long)
        x = torch.cat([data.decode(x, model_config(c)).cpu() for x in guide.generate(
            denoiser, range(n), labels if c.net_classes else None, min(n, c.batch), c.device,
            steps=c.sampling_steps, sigma_max=c.sigma_max)])
        if c.metrics == "none":
            return {}, x
        if self.real is None:                                   # once, for all evaluations
            self.net = fid.network(c.metrics, c.device)
            self.real = fid.summary(fid.data_features(self.net, self.dataset, "features of the data"))
        name = fid.distance_name(self.net.id)
        return fid.score(self.real, fid.summary(fid.extract(self.net, x)), name, c.device), x

    @torch.no_grad()
    def validation_loss(self, size=256):
        """Mean denoising loss on held-out examples, at noise that is the same for every run."""
        c, losses = self.c, []
        for i, index in enumerate(self.held_out.split(size)):
            index = torch.cat([index, index[-1:].expand(size - len(index))])            # one shape
            generator = data.stream(0, i, "validation")
            x0 = self.dataset.take(index, c.device)
            sigma = (c.P_mean + c.P_std * torch.randn(size, generator=generator)).exp().to(c.device)
            noise = torch.randn(x0.shape, generator=generator).to(c.device)
            labels = self.dataset.labels[index] if c.classes else torch.zeros(size, dtype=torch.long)
            D_x = self.denoise(x0 + sigma[:, None, None, None] * noise, sigma, labels.to(c.device))
            losses.append(model.per_example_loss(D_x, x0, sigma))
        return torch.cat(losses)[:len(self.held_out)].mean().item()


# ------------------------------------------------------------------------------------------------------------
# The stages of a run: coreset, guide, reference and proxy, the model itself. A stage that is trained is `fit`
# in a sub-folder: it resumes, is skipped when done, and its seconds are its last record's.

def stage(c, dataset, out, keep, **changes):
    """-> (checkpoint path, seconds) of the small model that `changes` describe."""
    plain = dict(selector="uniform", early_steps=0, until_better=False, once_better=False, interpolate=0.0,
                 debias=False, guide="none", guided_targets=1.0, reference=None, dro=None, class_weights=None,
                 minutes=0.0, eval_samples=0, channels=c.guide_channels, batch=c.guide_batch,
                 steps=c.guide_steps, micro_batch=math.gcd(c.micro_batch, c.guide_batch),
                 seed=c.seed + 1_000_003)
    records = fit(argparse.Namespace(**{**vars(c), **plain, **changes}), dataset, out, keep, title=out.name)
    return out / "checkpoint.pt", records[-1]["seconds"]


def coreset(c, dataset):
    """-> (the pool, those of it to train on, those held out): sorted indices, or None. --holdout and
    --imbalance define the pool of examples that exist, for every stage; --keep prunes inside it."""
    if c.kind == "tree":
        return None, None, None
    pool, held_out = torch.arange(len(dataset)), None
    if c.holdout:
        order = torch.randperm(len(dataset), generator=data.stream(0, 0, "holdout"))
        held_out, pool = order[:c.holdout].sort().values, order[c.holdout:].sort().values
    if c.imbalance:
        pool = pool[data.long_tail(dataset.labels[pool], c.imbalance, c.seed)]
    if c.keep is None:
        return pool, pool, held_out
    if isinstance(c.keep, str):
        keep = data.load_npy(c.keep, "kept indices", len(dataset))
        return pool, keep[torch.isin(keep, pool)], held_out
    if c.features == "pixels" or c.prune == "random":
        features = data.pixel_features(dataset)
    elif c.features == "inception" or c.features.startswith("own:"):
        features = fid.data_features(fid.network(c.features, c.device), dataset, "features of the data")
    else:
        features = data.load_npy(c.features, "features", len(dataset))
    labels = None if dataset.labels is None else dataset.labels[pool]
    return pool, pool[data.prune(features[pool], labels, c.keep, c.prune, seed=c.seed)], held_out


def choose_metrics(c, dataset, out):
    """The features that score images, and their id; "auto" fits a classifier to labelled data once."""
    metrics = c.metrics
    if c.kind == "tree" or not c.eval_samples:
        return "none", c.kind
    if metrics == "auto" and (c.kind == "latent" or not c.classes):
        metrics = "pixels"
    elif metrics == "auto":
        path = out.parent / f"features-{c.data_fingerprint[:12]}.pt"
        if not path.exists():
            print(f"fitting the classifier whose features score the samples: {path}", file=sys.stderr)
            path.parent.mkdir(parents=True, exist_ok=True)
            fid.fit(path, dataset, device=c.device)
        metrics = f"own:{path}"
    return metrics, "none" if metrics == "none" else fid.network(metrics).id


def run(args):
    """All stages: coreset, guide, class weights, the model itself, its evaluation. Returns the run folder."""
    join(args.device)
    with first():
        dataset = (data.load(args.data, args.size) if args.data else data.Tree("A")).to(args.device)
    c = resolve(args, dataset)
    if c.kind == "tree" and c.device == "cpu":
        torch.set_num_threads(1)                                # its matrices are too small for two
    stem = Path(c.data).name.split(".")[0] if c.data else "tree"
    out = Path(c.out or f"runs/{stem}-{c.selector}")
    out.mkdir(parents=True, exist_ok=True)
    if not RANK:
        describe(c, dataset)
    with first():
        began = time.monotonic()
        pool, keep, held_out = coreset(c, dataset)
        prune_seconds = time.monotonic() - began if c.keep else 0.0
        c.metrics, c.features_id = choose_metrics(c, dataset, out)
    proxy, on_pool = c.dro not in (None, "auto"), c.dro == "auto"
    settings = argparse.Namespace(**{**vars(c), "dro": c.dro if proxy else None})
    if (out / "checkpoint.pt").exists():                        # another run is refused, and not touched
        with data.reading(out / "checkpoint.pt", OF_RUN):
            old = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)["config"]
            c.guide_steps = settings.guide_steps = args.guide_steps or old["guide_steps"]
            same_settings(settings, old, out / "checkpoint.pt")
    if not RANK:
        with data.writing(out / "config.json") as file:
            file.write(json.dumps(vars(c), indent=1).encode())

    # The guide. Under --dro auto it is also the reference of the class weights, and sees the whole pool.
    guide_path, guide_seconds, weight_seconds = None, 0.0, 0.0
    if c.guide == "train":
        guide_path, guide_seconds = stage(c, dataset, out / "guide", pool if on_pool else keep)
    elif c.guide not in ("train", "snapshot", "none"):
        guide_path = model.checkpoint_of(c.guide)
        matching(guide_path, "--guide", c)
        trained = torch.load(guide_path, map_location="cpu", weights_only=True).get("progress", {})
        guide_seconds = trained.get("seconds", 0.0)             # a snapshot's training was the learner's

    # Class weights: by a DRO proxy trained against the reference, inverse to frequency, or from a file.
    weights, counts = None, class_counts(dataset, keep) if c.classes else None
    if on_pool:
        reference, seconds = (guide_path, 0.0) if guide_path else stage(c, dataset, out / "reference", pool)
        proxy_path, weight_seconds = stage(c, dataset, out / "proxy", keep, dro=str(reference))
        weights = read_class_weights(proxy_path.parent / "class_weights.json", c)
        weight_seconds += seconds
    elif c.class_weights:
        inverse = c.class_weights == "inverse"
        weights = 1 / counts.clamp_min(1) if inverse else read_class_weights(c.class_weights, c)
        weights = weights * counts.sum() / (weights * counts).sum()     # mean 1 over the examples

    # The model.
    evaluate = None
    if c.eval_samples and not proxy:
        shared = on_pool and guide_path is not None             # the guide's seconds are the weights' too
        evaluate = Evaluator(c, dataset, out, held_out, 0.0 if shared else guide_seconds,
                             prune_seconds + weight_seconds + shared * guide_seconds)
    records = fit(settings, dataset, out, keep, guide_path, weights, evaluate)
    if not RANK:
        report(records, out)
    return out


def describe(c, dataset):
    """The first lines printed: which sizes are the preset's, and what was found."""
    small = ", small for a CPU" if c.small else ""
    sizes = (f"preset {c.preset}{small}: {c.channels} channels, {c.steps:,} steps of {c.batch}, "
             f"targets {c.targets}, {c.eval_samples:,} samples scored")
    print(sizes, *dataset.report, sep="\n", file=sys.stderr)


def report(records, out):
    """Print the last evaluation, one line each for unguided and guided samples."""
    last = [r for r in records if r["kind"] == "eval" and r["step"] == records[-1]["step"]]
    for r in last:
        words = "  ".join(f"{name} {value:.4f}" for name, value in r.items() if name not in fid.NOT_METRICS)
        guidance = "unguided" if r["guidance"] == 1 else f"guidance {r['guidance']:g}"
        print(f"step {r['step']}, {guidance}:  {words}")
    print(f"wrote {out}/: config.json, log.jsonl, checkpoint.pt" + (", samples.png" if last else ""))


def main(argv=None):
    """Parse the flags and run; what the user can mend becomes one line and exit status 2."""
    try:
        data.command(run, build_parser(), argv)
    finally:
        if WORLD > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
