"""Train a diffusion model while choosing its data:
online (JEST, AJEST) or offline (coreset and class weights).

"Autoguided Online Data Curation for Diffusion Model Training" (arXiv 2509.15267) and "Pruning then
Reweighting: Towards Data-Efficient Training of Diffusion Models" (arXiv 2409.19128). One run is one folder;
the same command again resumes it. On the built-in 2-D tree, in a few minutes on a CPU:

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

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
import torch.utils.flop_counter

import data
import fid
import guide
import model


# ------------------------------------------------------------------------------------------------------------
# select.py shares its name with a standard-library module, so it is loaded by path.

def load_select():
    spec = importlib.util.spec_from_file_location("batch_select", Path(__file__).with_name("select.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


select = load_select()

# ------------------------------------------------------------------------------------------------------------
# Presets by kind and resolution; every value has a flag. The tree follows the toy example of 2406.02507, the
# images EDM's and EDM2's noise distributions, with a learning-rate decay for short runs.

IMAGES = dict(channels=64, batch=256, steps=20_000, lr=0.01, lr_decay=4000, warmup=200, dropout=0.0,
              flip=True, P_mean=-0.8, P_std=1.6, sigma_max=80.0, guidance=1.8, ema=[0.05, 0.10],
              guide_channels=32, guide_batch=256, guide_steps=2500, eval_samples=10_000, log_every=50)
PRESETS = {
    "tree": dict(channels=64, batch=816, steps=20_000, lr=0.01, lr_decay=512, warmup=0, dropout=0.0,
                 flip=False, P_mean=-2.3, P_std=1.5, sigma_max=5.0, guidance=3.0, ema=[0.02, 0.10],
                 guide_channels=32, guide_batch=4096, guide_steps=1024, eval_samples=163_840, log_every=100),
    "32": dict(IMAGES, batch=512, guide_batch=512, lr_decay=2000, dropout=0.13, P_mean=-1.2, P_std=1.2,
               guidance=1.6),
    "64": IMAGES,
    "latent": dict(IMAGES, channels=128, guide_channels=64, flip=False, P_mean=-0.4, P_std=1.0),
}


def preset_name(dataset):
    return dataset.kind if dataset.kind in PRESETS else "32" if dataset.shape[-1] <= 32 else "64"


# ------------------------------------------------------------------------------------------------------------
# The command line. None stands for "the preset's value".

def _add_data_choices(parser):
    """The groups of flags for online selection, guide and evaluation, coreset and class weights."""
    g = parser.add_argument_group("online selection (2509.15267)")
    g.add_argument("--selector", choices=["uniform", "jest", "ajest"], default="uniform",
                   help="how batches are made")
    g.add_argument("--filter", type=float, default=0.8, help="share of the super-batch that is left out")
    g.add_argument("--chunks", type=int, default=16, help="chunks in which JEST fills the batch")
    g.add_argument("--score", choices=select.SCORES, default="learnability",
                   help="what makes an example worth it")
    g.add_argument("--invert", action="store_true", help="prefer low scores")
    g.add_argument("--gain", type=float, default=0, help="multiply standardized scores (0 = raw scores)")
    g.add_argument("--debias", action="store_true", help="weight by inverse inclusion probability")
    g.add_argument("--early-steps", type=int, default=0,
                   help="select during the first N steps (0 = throughout)")
    g.add_argument("--until-better", action="store_true", help="select until the learner beats the reference")
    g.add_argument("--once-better", action="store_true", help="select once the learner beats the reference")
    g.add_argument("--interpolate", type=float, default=0,
                   help="score the autoguided denoiser of weight X (0 = off)")
    g.add_argument("--reference",
                   help="checkpoint that --selector jest scores against (default: the learner's EMA)")

    g = parser.add_argument_group("guide, sampling and evaluation (2406.02507)")
    g.add_argument("--guide", default="auto",
                   help="checkpoint, auto = train one first, self = drop the label, none")
    g.add_argument("--guide-channels", type=int, help="width of the trained guide")
    g.add_argument("--guide-batch", type=int, help="its batch")
    g.add_argument("--guide-steps", type=int, help="its steps")
    g.add_argument("--guidance", type=float, help="guidance weight of samples (1 = off)")
    g.add_argument("--sampling-steps", type=int, default=32, help="Heun steps")
    g.add_argument("--sigma-max", type=float, help="noise level at which sampling starts")
    g.add_argument("--eval-every", type=int, default=0,
                   help="steps between evaluations (0 = only at the end)")
    g.add_argument("--eval-samples", type=int, help="samples per evaluation (0 = no evaluation)")
    g.add_argument("--metrics", default="auto",
                   help="own:CKPT, inception, pixels, or auto = own, fitted first")

    g = parser.add_argument_group("coreset and class weights (2409.19128)")
    g.add_argument("--keep", help="fraction of each class to keep, or a file of indices")
    g.add_argument("--prune", choices=["gaussian", "knn", "moderate", "random"], default="gaussian",
                   help="what is kept first")
    g.add_argument("--features", default="pixels", help="pixels, own:CKPT, inception, or a file of features")
    g.add_argument("--dro",
                   help="train a proxy that finds class weights against this reference; auto = all stages")
    g.add_argument("--dro-steps", type=int, help="steps of the proxy under --dro auto (default: the guide's)")
    g.add_argument("--eta", type=float, default=0.01, help="step size of the class weights")
    g.add_argument("--smoothing", type=float, default=1e-3, help="share of uniform weights mixed in")
    g.add_argument("--min-count", type=int, default=2,
                   help="a class with fewer examples in a batch counts as absent")
    g.add_argument("--class-weights", help="class_weights.json to train with, or inverse (of frequency)")
    g.add_argument("--reweight", choices=["loss", "sampling"], default="loss", help="how the weights act")


def build_parser():
    """The parser of all flags; a flag that is not given takes the preset's value."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False, usage="%(prog)s [--data DATA] [flags]",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110))
    on_off = argparse.BooleanOptionalAction

    g = parser.add_argument_group("data")
    g.add_argument("--data", help="folder, zip, CIFAR-10 archive or .npz; none = the 2-D tree")
    g.add_argument("--out", help="run folder (default runs/DATA-SELECTOR)")
    g.add_argument("--size", type=int, help="center-crop and resize images to this many pixels")
    g.add_argument("--flip", action=on_off, help="horizontal flips, labelled so that they do not leak")
    g.add_argument("--holdout", type=int, default=0,
                   help="examples held out for the validation loss (0 = off)")
    g.add_argument("--imbalance", type=float, help="make classes long-tailed: head over tail, e.g. 100")

    g = parser.add_argument_group("model and optimization")
    g.add_argument("--channels", type=int, help="width of the network")
    g.add_argument("--batch", type=int, help="examples trained on per step, whatever the selector")
    g.add_argument("--micro-batch", type=int, default=0,
                   help="split the batch into parts of this size (0 = off)")
    g.add_argument("--steps", type=int, help="optimizer steps")
    g.add_argument("--minutes", type=float, default=0,
                   help="stop after this much training time (0 = no limit)")
    g.add_argument("--lr", type=float, help="Adam learning rate")
    g.add_argument("--lr-decay", type=int, help="steps after which it falls as 1/sqrt(step)")
    g.add_argument("--warmup", type=int, help="steps of linear warm-up (0 = off)")
    g.add_argument("--dropout", type=float, help="dropout inside the residual blocks")
    g.add_argument("--label-dropout", type=float, default=0,
                   help="share trained without label, for --guide self")
    g.add_argument("--ema", type=float, nargs="+",
                   help="EMA lengths relative to training; the first is evaluated")
    g.add_argument("--P-mean", type=float, help="mean of ln sigma in training")
    g.add_argument("--P-std", type=float, help="standard deviation of ln sigma in training")

    _add_data_choices(parser)

    g = parser.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, help="of initialization, data, noise and selection")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda or mps")
    g.add_argument("--bf16", action=on_off, help="bf16 autocast (default: on CUDA)")
    g.add_argument("--compile", action=on_off, help="torch.compile (default: on CUDA)")
    g.add_argument("--log-every", type=int, help="steps between log lines")
    g.add_argument("--save-every", default="60s", help="between checkpoints: seconds (60s) or steps (5000)")
    g.add_argument("--dry-run", action="store_true", help="report data, plan and memory, then end")

    for action in parser._actions:  # every flag's help ends with its default
        if action.nargs != 0 and not isinstance(action, on_off):
            action.metavar = None if action.choices else {int: "N", float: "X"}.get(action.type, "VALUE")
        if action.dest in PRESETS["tree"]:
            action.help += " [preset]"
        elif action.default not in (None, False, argparse.SUPPRESS):
            action.help = f"{action.help or ''} [{action.default}]".strip()
    return parser


# ------------------------------------------------------------------------------------------------------------
# The resolved configuration: a flat dictionary of plain values, written to config.json before the first step.

def resolve(args, dataset):
    """Fill in the preset and check sizes; DataError names the flag to change."""
    config = {k: v for k, v in vars(args).items() if k not in ("out", "dry_run")}
    name = preset_name(dataset)
    for key, value in PRESETS[name].items():
        config[key] = value if config.get(key) is None else config[key]
    cuda = torch.device(args.device).type == "cuda"
    config["bf16"] = cuda and name != "tree" if args.bf16 is None else args.bf16
    config["compile"] = cuda if args.compile is None else args.compile
    config.update(preset=name, kind=dataset.kind, data_fingerprint=dataset.fingerprint,
                  shape=list(dataset.shape))
    config.update(classes=dataset.classes, class_names=list(dataset.class_names), net_classes=dataset.classes)
    if config["flip"]:
        config["net_classes"] = 2 * max(dataset.classes, 1)
    if dataset.kind == "latent":
        config.update(latent_mean=[float(v) for v in dataset.mean],
                      latent_std=[float(v) for v in dataset.std])
    checks = [
        (0 <= config["filter"] < 1, "--filter must be at least 0 and less than 1"),
        (config["early_steps"] >= 0, "--early-steps must not be negative (0 = throughout)"),
        (min(config["batch"], config["steps"], config["channels"], config["guide_batch"],
             config["guide_steps"], config["guide_channels"], config["log_every"],
             config["sampling_steps"]) > 0,
         "--batch, --steps, --channels, --log-every, --sampling-steps and the --guide-... sizes "
         "must be positive"),
        (min(config["micro_batch"], config["minutes"], config["warmup"], config["eval_every"],
             config["eval_samples"]) >= 0,
         "--micro-batch, --minutes, --warmup, --eval-every and --eval-samples "
         "must not be negative (0 = off)"),
        (config["lr"] > 0 and config["P_std"] > 0 and config["sigma_max"] > 0.002,
         "--lr, --P-std, --sigma-max: positive"),
        (0 < config["chunks"], "--chunks must be positive"),
        (0 <= config["dropout"] < 1 and 0 <= config["label_dropout"] < 1,
         "--dropout and --label-dropout: in [0, 1)"),
        (all(0 < std < 0.28 for std in config["ema"]), "--ema lengths must lie between 0 and 0.28"),
        (config["score"] != "target-norm"
         or not (config["interpolate"] or config["until_better"] or config["once_better"]),
         "--score target-norm runs no network: without --interpolate, --until-better and --once-better"),
        (not (config["until_better"] and config["once_better"]),
         "--until-better and --once-better exclude each other"),
        (dataset.kind == "tree" or dataset.shape[-1] == dataset.shape[-2] and dataset.shape[-1] % 8 == 0,
         f"--size: the UNet needs square images of a multiple of 8 pixels, not {list(dataset.shape)}"),
        (config["kind"] != "tree"
         or not (config["keep"] or config["dro"] or config["class_weights"] or config["holdout"]),
         "--keep, --dro, --class-weights and --holdout need --data: the tree is drawn afresh at every step"),
        (dataset.classes or not (config["dro"] or config["class_weights"] or config["imbalance"]),
         f"--dro, --class-weights and --imbalance need labels: {config['data']} has none"),
        (config["selector"] != "ajest" or config["guide"] not in ("none", "self"),
         "--selector ajest needs a --guide"),
        (config["guide"] != "self" or config["label_dropout"] > 0 or config["net_classes"] == 0,
         "--guide self needs training with --label-dropout, e.g. 0.1"),
        (config["eta"] > 0 and 0 <= config["smoothing"] < 1 and config["min_count"] > 0,
         "--min-count and --eta must be positive, --smoothing in [0, 1)"),
    ]
    for passed, message in checks:
        if not passed:
            raise data.DataError(message)
    parse_save_every(config["save_every"])
    B, world = super_batch_size(config), int(os.environ.get("WORLD_SIZE", 1))
    if any(n % world for n in (config["batch"], config["guide_batch"],
                               B if config["selector"] != "uniform" else world)):
        raise data.DataError(f"--batch {config['batch']}, --guide-batch {config['guide_batch']} and "
                             f"the super-batch of {B} (--filter) must be divisible by the {world} processes")
    return config


def parse_save_every(text):
    """"60s" -> (seconds, None), "5000" -> (None, steps)."""
    try:
        seconds, steps = (float(text[:-1]), None) if text.endswith("s") else (None, int(text))
        if 0 < (seconds or steps) < math.inf:
            return seconds, steps
    except ValueError:
        pass
    raise data.DataError(f"--save-every: {text} is neither seconds (60s) nor steps (5000)")


def model_config(config):
    """What a checkpoint needs to rebuild and sample its denoiser: plain values only."""
    return dict(net="mlp" if config["kind"] == "tree" else "unet", kind=config["kind"], shape=config["shape"],
                channels=config["channels"], classes=config["net_classes"], dropout=config["dropout"],
                sigma_data=0.5, class_names=config["class_names"], sigma_max=config["sigma_max"],
                guidance=config["guidance"], latent_mean=config.get("latent_mean"),
                latent_std=config.get("latent_std"))


# ------------------------------------------------------------------------------------------------------------
# Several processes (torchrun): each works on its rows of the one draw that (seed, step) defines.

class Ranks:
    def __init__(self, device):
        self.device = device
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world > 1 and not torch.distributed.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            # A long timeout, for the others wait for evaluations.
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                                 timeout=datetime.timedelta(days=1))

    def rows(self, *tensors):
        """This process's rows of tensors that every process holds alike; None stays None."""
        return [t if t is None or self.world == 1 else t[self.rank::self.world].contiguous() for t in tensors]

    def gather(self, tensor):
        """The rows of all processes, [n] -> [world * n]."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        torch.distributed.all_gather(parts, tensor)
        return torch.cat(parts)

    def agree(self, *values):
        """Rank 0's values, so that all stop at the same step; the others wait for it here."""
        if self.world > 1:
            tensor = torch.tensor(values, dtype=torch.float32, device=self.device)
            torch.distributed.broadcast(tensor, 0)
            return tensor.tolist()
        return values

    @contextlib.contextmanager
    def in_turn(self):
        """Rank 0 runs the block first; the others follow, and find the files that it wrote."""
        if self.rank:
            self.agree(0)
        try:
            yield
        finally:
            if not self.rank:
                self.agree(0)

    def average_(self, tensors):
        """Average a list of tensors over the processes, in place and in one message."""
        if self.world > 1:
            flat = torch.cat([t.flatten() for t in tensors])
            torch.distributed.all_reduce(flat)
            parts = (flat / self.world).split([t.numel() for t in tensors])
            torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors)])


# ------------------------------------------------------------------------------------------------------------
# Seconds spent inside of `with stopwatch:`; on CUDA by events, so that nothing waits until `seconds` is read.

class Stopwatch:
    def __init__(self, device):
        self.cuda, self.total, self.pending = device.type == "cuda", 0.0, []

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self):
        self.began = self.mark()

    def __exit__(self, *_):
        self.pending.append((self.began, self.mark()))

    def seconds(self):
        """The total so far; waits for the device."""
        if self.cuda and self.pending:
            torch.cuda.synchronize()
        self.total += sum(a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in self.pending)
        self.pending = []
        return self.total


# ------------------------------------------------------------------------------------------------------------
# What a checkpoint holds: network, optimizer, EMAs, counters. `learn` is one optimizer step.

class State:
    def __init__(self, config, device, ranks):
        self.config, self.device, self.ranks = config, device, ranks
        torch.manual_seed(data.stream(config["seed"], 0, "init").initial_seed())
        self.denoiser = model.build(model_config(config)).to(device).to(memory_format=torch.channels_last)
        self.projected = model.projected_weights(self.denoiser)
        self.project = torch.compile(model.project) if config["compile"] and self.projected else model.project
        self.project(self.projected)
        self.params = [p for p in self.denoiser.parameters()]
        self.ema = model.PowerEMA(self.denoiser, config["ema"])
        self.optimizer = torch.optim.Adam(self.params, lr=config["lr"], betas=(0.9, 0.99), eps=1e-8,
                                          fused=True)
        self.objective = model.accelerate(self._objective, device, config["bf16"], config["compile"])
        self.progress = dict(step=0, seconds=0.0, select_seconds=0.0, eval_seconds=0.0, examples_trained=0,
                             examples_seen=0, selecting=not config["once_better"])
        self.watch = Stopwatch(device)
        self.flops_per_example = 3 * forward_flops(config) if config["kind"] != "tree" else 0
        # The loss sum and the steps since the log line; the steps skipped, and those in a row.
        self.tally = torch.zeros(4, device=device)
        self.previous = None  # indices [b] that the last step selected

    def _objective(self, x0, noise, sigma, labels, weight):
        """Mean weighted objective (with EDM2's uncertainty for the UNet: loss / e^u + u) and losses [b]."""
        loss, _ = self.denoiser.loss(x0, noise, sigma, labels)
        total = loss
        if self.config["kind"] != "tree":
            u = self.denoiser.u(sigma)
            total = loss / u.exp() + u
        return (total if weight is None else weight * total).mean(), loss.detach()

    def learning_rate(self):
        """Inverse square root after `lr_decay` steps, after a linear warm-up (EDM2 eq. 67)."""
        c, step = self.config, self.progress["step"]
        return c["lr"] / math.sqrt(max(step / c["lr_decay"], 1)) * min(1, (step + 1) / (c["warmup"] + 1))

    def drop_labels(self, labels):
        """Labels [n] of which a share of `label_dropout` is -1, no label."""
        if labels is None or not self.config["label_dropout"]:
            return labels
        generator = data.stream(self.config["seed"], self.progress["step"], "label", self.device)
        drop, = self.ranks.rows(torch.rand(self.config["batch"], generator=generator, device=self.device))
        return torch.where(drop < self.config["label_dropout"], -1, labels)

    def learn(self, x0, noise, sigma, labels, weight):
        """One optimizer step on b examples; returns their losses [b]. A non-finite gradient skips it
        on the device."""
        if self.config["dropout"]:
            generator = data.stream(self.config["seed"], self.progress["step"], "dropout")
            torch.manual_seed(generator.initial_seed())
        part, losses = self.config["micro_batch"] or len(x0), []
        tensors = (x0, noise, sigma, labels, weight)
        for rows in zip(*[[None] * len(x0) if t is None else t.split(part) for t in tensors]):
            objective, loss = self.objective(*rows)
            (objective * (len(loss) / len(x0))).backward()
            losses.append(loss)
        losses = losses[0] if len(losses) == 1 else torch.cat(losses)
        grads = [p.grad for p in self.params if p.grad is not None]
        self.ranks.average_(grads)
        skip = 1 - torch.stack(torch._foreach_norm(grads)).sum().isfinite().float()
        self.optimizer.found_inf, self.optimizer.grad_scale = skip, None  # as torch.amp.GradScaler does
        self.optimizer.param_groups[0]["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.project(self.projected)
        self.progress["step"] += 1
        self.ema.update(self.progress["step"])
        self.tally += torch.stack([torch.nan_to_num(losses.mean(), 0, 0, 0), 1 - skip, skip, skip])
        self.tally[3] *= skip
        return losses

    def count(self):
        """The progress so far, with the seconds of selection; waits for the device."""
        self.progress["select_seconds"] = self.watch.seconds()
        return self.progress

    def checkpoint(self):
        return dict(kind="run", config=self.config, model_config=model_config(self.config),
                    progress=self.count(), model=self.denoiser.state_dict(), ema=self.ema.state_dict(),
                    optimizer=self.optimizer.state_dict(), tally=self.tally, previous=self.previous)

    def restore(self, checkpoint, path, dro=None):
        """Take over what `checkpoint` holds; CheckpointError where it is another run's, or not a run's."""
        try:
            self.denoiser.load_state_dict(checkpoint["model"])
            self.ema.load_state_dict(checkpoint["ema"])
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict(dict(state=checkpoint["optimizer"]["state"], param_groups=groups))
            self.progress.update({k: type(v)(checkpoint["progress"][k]) for k, v in self.progress.items()})
            self.watch.total = self.progress["select_seconds"]
            self.tally.copy_(checkpoint["tally"])
            self.previous = checkpoint.get("previous")
            if dro:
                dro.load_state_dict(checkpoint["dro"])
            for p, s in self.optimizer.state.items():
                if [tuple(s[k].shape) for k in ("step", "exp_avg", "exp_avg_sq")] != [(), p.shape, p.shape]:
                    raise ValueError
            if not all(p.isfinite().all() for p in self.params):
                raise ValueError
        except Exception:  # whatever a foreign dictionary leads to
            raise model.CheckpointError(f"{path}: does not fit this run; "
                                        "give another --out, or delete it") from None


def forward_flops(config):
    """FLOPs of one example's forward pass, counted without computing it (2 per multiply-add)."""
    counter = torch.utils.flop_counter.FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), counter:
        denoiser = model.build(model_config(config))
        denoiser(torch.empty(1, *config["shape"]), torch.ones(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------------------
# One draw: data, noise level and noise, each a function of (seed, step). On the CPU the first examples of a
# larger draw are those of a smaller one, so that all arms of a comparison see the same.

class Draw:
    def __init__(self, config, dataset, n, device, ranks, keep=None, class_weights=None):
        self.config, self.device, self.ranks, self.n = config, device, ranks, n
        weights = class_weights if config["reweight"] == "sampling" else None
        self.batches = data.Batches(dataset, n, config["seed"], device, keep, weights, config["flip"])

    def __getitem__(self, step):
        """x0 [n, ...], noise [n, ...], sigma [n], labels [n] or None, index [n] or None."""
        seed, device = self.config["seed"], self.device
        x0, labels, index = self.batches[step]
        ln_sigma = torch.randn(self.n, generator=data.stream(seed, step, "sigma", device), device=device)
        sigma = (self.config["P_mean"] + self.config["P_std"] * ln_sigma).exp()
        noise = torch.randn(x0.shape, generator=data.stream(seed, step, "noise", device), device=device)
        return self.ranks.rows(x0, noise, sigma, labels, index)


# ------------------------------------------------------------------------------------------------------------
# Online selection: score a super-batch with learner and reference on the same sigma and noise, keep b of B.
# `active` also keeps the early and late rules.

class Curator:
    def __init__(self, config, state, reference, device):
        self.config, self.state, self.reference, self.device = config, state, reference, device
        self.losses = model.accelerate(self._losses, device, config["bf16"], config["compile"])
        self.stats = {}

    def _losses(self, x0, noise, sigma, labels):
        """Per-example losses [B] of learner (or the autoguided pair, "interpolated AJEST") and reference."""
        if self.config["score"] == "target-norm":
            return self.state.denoiser.loss_of_zero(x0, noise, sigma), None
        learner, D_x = self.state.denoiser.loss(x0, noise, sigma, labels)
        if self.reference is None:
            return learner, None
        reference, D_reference = self.reference.loss(x0, noise, sigma, labels)
        if self.config["interpolate"]:
            D_x = torch.lerp(D_reference, D_x, self.config["interpolate"])
            learner = model.per_example_loss(D_x, x0, sigma)
        return learner, reference

    def active(self, step, super_batch):
        """Whether this step selects. The early and late rules compare the two mean losses once
        per log interval."""
        c, progress = self.config, self.state.progress
        undecided = (c["until_better"] and progress["selecting"]
                     or c["once_better"] and not progress["selecting"])
        if undecided and step % c["log_every"] == 0:
            losses = self.measure(*super_batch[step][:4])
            learner, reference = (self.state.ranks.gather(t).mean() for t in losses)
            progress["selecting"] = progress["selecting"] != bool(learner < reference)
        over = (c["early_steps"] and step >= c["early_steps"]
                or c["until_better"] and not progress["selecting"])
        if over:
            self.reference = None  # nothing scores any more: give its memory back
        return progress["selecting"] and not over

    @torch.no_grad()
    def measure(self, x0, noise, sigma, labels):
        """Losses [B] of learner and reference (or None) as by `_losses`, with dropout turned off."""
        if not self.config["dropout"]:
            return self.losses(x0, noise, sigma, labels)
        self.state.denoiser.eval()
        losses = self.losses(x0, noise, sigma, labels)
        self.state.denoiser.train()
        return losses

    @torch.no_grad()
    def choose(self, x0, noise, sigma, labels, index, step, detail=False):
        """Select from a super-batch: -> the chosen rows of the five tensors, and weights [b] or None."""
        c, ranks = self.config, self.state.ranks
        learner, reference = self.measure(x0, noise, sigma, labels)
        whole = select.score(ranks.gather(learner), None if reference is None else ranks.gather(reference),
                             c["score"], c["invert"], c["gain"])
        score = whole.view(ranks.world, -1)[ranks.rank]
        name = f"select{ranks.rank}" if ranks.rank else "select"
        generator = data.stream(c["seed"], step, name, self.device)
        k, weight = c["batch"] // ranks.world, None
        if c["debias"]:
            chosen, weight = select.gumbel_top_k(score, k, generator)
        else:
            chosen = select.jest(score, k, c["chunks"], generator)
        rows = [None if t is None else t[chosen] for t in (x0, noise, sigma, labels, index)]
        if detail:
            self.describe(sigma, rows, weight)
        self.state.previous = rows[4]
        return rows, weight

    def describe(self, sigma, rows, weight):
        """Selection statistics for the log line, as device tensors."""
        _, _, chosen_sigma, labels, index = rows
        self.stats = dict(ln_sigma_drawn=sigma.log().mean(), ln_sigma_selected=chosen_sigma.log().mean())
        if weight is not None:
            self.stats["effective_samples"] = weight.sum().square() / weight.square().sum()
        if labels is not None:
            share = torch.bincount(labels.clamp_min(0) % self.config["classes"],
                                   minlength=self.config["classes"])
            self.stats["class_share"] = share / len(labels)
        if index is not None and self.state.previous is not None:
            self.stats["overlap"] = torch.isin(index, self.state.previous).float().mean()


# ------------------------------------------------------------------------------------------------------------
# Class weights by group DRO (2409.19128; the update is DoReMi's, 2305.10429): the proxy minimizes
# sum_c alpha_c L_c, where alpha grows for classes whose excess loss over the reference is large. The result
# is the running mean of alpha.

class Dro:
    def __init__(self, config, reference, counts, device):
        self.config, self.counts = config, counts.to(device)  # [classes] examples trained from
        self.losses = model.accelerate(lambda *rows: reference.loss(*rows)[0], device, config["bf16"],
                                       config["compile"])
        self.log_alpha = torch.full((len(counts),), -math.log(len(counts)), device=device)
        self.sum_alpha, self.steps = torch.zeros(len(counts), device=device), 0

    def class_weights(self, alpha):
        """alpha_c / p_c: weights whose mean over the examples is 1. [classes] -> [classes]."""
        return alpha * self.counts.sum() / self.counts.clamp_min(1)

    def weight(self, labels):
        return self.class_weights(self.log_alpha.exp())[labels % len(self.counts)]

    @torch.no_grad()
    def update(self, loss, x0, noise, sigma, labels, ranks):
        """One step of alpha, from the proxy's losses [b] over the reference's on the same rows."""
        excess = loss - self.losses(x0, noise, sigma, labels)
        excess, labels = ranks.gather(excess), ranks.gather(labels % len(self.counts))
        count = torch.zeros_like(self.counts).index_add_(0, labels, torch.ones_like(excess))
        excess = torch.where(count[labels] >= self.config["min_count"], excess, 0.0)
        self.log_alpha = data.dro_update(self.log_alpha, excess, labels, self.config["eta"],
                                         self.config["smoothing"])
        self.sum_alpha += self.log_alpha.exp()
        self.steps += 1

    def state_dict(self):
        return dict(log_alpha=self.log_alpha, sum_alpha=self.sum_alpha, steps=self.steps)

    def load_state_dict(self, state):
        if not state["log_alpha"].shape == state["sum_alpha"].shape == self.counts.shape:
            raise ValueError("made for other classes")
        self.steps = int(state["steps"])
        self.log_alpha, self.sum_alpha = state["log_alpha"], state["sum_alpha"]

    def write(self, out, records):
        """class_weights.json, and class_weights.png: the path of the weights over the steps."""
        c, names = self.config, self.config["class_names"]
        mean = self.class_weights(self.sum_alpha / max(self.steps, 1)).tolist()
        write_json(out / "class_weights.json", dict(
            format=1, classes=dict(zip(names, mean)), eta=c["eta"], smoothing=c["smoothing"],
            steps=self.steps, reference=str(c["dro"]), data=c["data"], fingerprint=c["data_fingerprint"]))
        path = [(r["step"], r["class_weights"]) for r in records if "class_weights" in r]
        if path and len(names) <= 20:
            steps, weights = np.array([p[0] for p in path]), np.array([p[1] for p in path])
            lines = [dict(name=name, x=steps, y=weights[:, i], color=i) for i, name in enumerate(names)]
            panel = dict(title="class weights", x="steps of the proxy", lines=lines)
            fid.line_chart([panel], out / "class_weights.png")


def read_class_weights(path, names):
    """class_weights.json -> float32 [classes] in the order of `names`; DataError where it is
    for other classes."""
    try:
        content = read_json(path)
        version, weights = int(content.get("format", 1)), content["classes"]
        values = torch.tensor([float(weights[name]) for name in names] if set(weights) == set(names) else [])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        reason = error if isinstance(error, data.DataError) else f"{path}: not a class-weights file"
        raise data.DataError(f"--class-weights: {reason}") from None
    if version > 1:
        raise data.DataError(f"--class-weights {path}: written by a later version "
                             f"(format {version}, this is 1)")
    if not len(values):
        raise data.DataError(f"--class-weights {path}: its classes are not those of the data")
    if not (values.isfinite().all() and values.min() >= 0 and values.sum() > 0):
        raise data.DataError(f"--class-weights {path}: weights must be finite, not negative, "
                             "and not all zero")
    return values


# ------------------------------------------------------------------------------------------------------------
# Files of a run. Everything is written beside its place and renamed, but for the log, which grows
# by whole lines.

def write_json(path, value):
    if int(os.environ.get("RANK", 0)) == 0:
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(temporary, path)


def read_json(path):
    """The dictionary in a JSON file; DataError for anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise data.DataError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise data.DataError(f"{path}: damaged, or not a file of this program; delete it or give another")
    return value


def read_log(path):
    """The whole records of a log.jsonl; a torn line is left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [r for r in records if isinstance(r, dict) and isinstance(r.get("step"), int) and "kind" in r]


class Journal:
    """log.jsonl and the progress line. Lines after `step` (a torn one too) are dropped, for a run
    that resumes there."""

    def __init__(self, path, step, title, quiet=False):
        self.path, self.title, self.quiet = path, title, quiet
        self.records = read_log(path)
        self.keep(lambda r: r["step"] <= step)

    def keep(self, wanted):
        """Drop the records that are not wanted, and with them any torn line."""
        self.records = [r for r in self.records if wanted(r)]
        if not self.quiet:
            Path(f"{self.path}.tmp").write_text("".join(json.dumps(r) + "\n" for r in self.records))
            os.replace(f"{self.path}.tmp", self.path)

    def write(self, record):
        self.records.append(record)
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def show(self, text, last=False):
        if not self.quiet:
            data.progress(f"{self.title}: {text}", last)


class Interrupt:
    """Notes SIGINT and SIGTERM, so that the loop can save before it ends; `caught` is the signal
    number or None."""

    def __enter__(self):
        self.caught = None
        self.old = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, _):
        self.caught = number

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------
# The training loop.

def fit(config, dataset, out, guide_path=None, keep=None, class_weights=None, evaluate=None, title="train"):
    """Train the model that `config` describes into the folder `out`, or go on where its checkpoint stands.
    keep: sorted indices to train on, None = all. class_weights: [classes] or None.
    evaluate(state, show) -> records is called every `eval_every` steps and at the end. Returns the log."""
    device, path, dro = torch.device(config["device"]), out / "checkpoint.pt", None
    ranks = Ranks(device)
    state = State(config, device, ranks)
    if config["dro"]:
        reference = load_matching(config["dro"], "--dro", config, device)
        dro = Dro(config, reference, class_counts(dataset, keep), device)
    if path.exists():
        state.restore(model.read(path, device), path, dro)
    progress = state.progress
    journal = Journal(out / "log.jsonl", progress["step"], title, quiet=ranks.rank > 0)
    journal.rated = progress["examples_trained"], progress["seconds"]
    curator = make_curator(config, state, guide_path, device)
    batch = Draw(config, dataset, config["batch"], device, ranks, keep, class_weights)
    super_batch = Draw(config, dataset, super_batch_size(config), device, ranks, keep, class_weights)
    on_loss = class_weights is not None and config["reweight"] == "loss"
    class_weights = class_weights.to(device) if on_loss else None
    saver, began = Saver(config), time.monotonic() - progress["seconds"]
    limit = 60 * config["minutes"] or math.inf

    def finished():
        return progress["step"] >= config["steps"] or progress["seconds"] >= limit

    def save():
        if ranks.rank == 0:
            model.save(path, state.checkpoint() | (dict(dro=dro.state_dict()) if dro else {}))

    with Interrupt() as interrupt:
        while not finished():
            step, weight, caught = progress["step"], None, 0
            log_line = (step + 1) % config["log_every"] == 0
            if curator and curator.active(step, super_batch):
                with state.watch:  # score B examples, keep b of them with their sigma and noise
                    rows, weight = curator.choose(*super_batch[step], step, detail=log_line)
                progress["examples_seen"] += super_batch.n
            else:
                rows = batch[step]
                progress["examples_seen"] += batch.n
            x0, noise, sigma, labels, _ = rows
            if on_loss:
                weight = class_weights[labels % dataset.classes] * (1 if weight is None else weight)
            if dro:
                weight = dro.weight(labels)
            loss = state.learn(x0, noise, sigma, state.drop_labels(labels), weight)
            if dro:
                dro.update(loss, x0, noise, sigma, labels, ranks)
            progress["examples_trained"] += batch.n
            if log_line:
                log(state, journal, curator, dro, time.monotonic() - began)
            if ranks.world == 1 or log_line or step + 1 == config["steps"]:  # else no message, no wait
                progress["seconds"], caught = ranks.agree(time.monotonic() - began, interrupt.caught or 0)
            pause = time.monotonic()
            if evaluate and config["eval_every"] and not (step + 1) % config["eval_every"] and not finished():
                run_evaluation(state, journal, evaluate)
            if caught or finished() or saver.due(progress["step"]):
                save()
            began += time.monotonic() - pause
            if caught:
                raise SystemExit(128 + int(caught))
    if dro and ranks.rank == 0:
        dro.write(out, journal.records)
    if evaluate and len(evaluations(journal.records, progress["step"])) < len(evaluate.weights):
        run_evaluation(state, journal, evaluate)
    if ranks.world > 1:
        torch.distributed.barrier()  # the files of this stage are there
    return journal.records


def evaluations(records, step):
    """The evaluation records of one step."""
    return [r for r in records if r["kind"] == "eval" and r["step"] == step]


def super_batch_size(config):
    """B = b / (1 - filter ratio), the number of examples scored to train on b."""
    return round(config["batch"] / (1 - config["filter"]))


def load_matching(path, flag, config, device):
    """A trained denoiser to compare with; DataError, naming the flag, where it is for other data."""
    other = model.load_denoiser(path, device=device)
    if other.shape != tuple(config["shape"]) or other.classes != config["net_classes"]:
        raise data.DataError(f"{flag} {path}: denoises {list(other.shape)} with {other.classes} labels, "
                             f"this run {config['shape']} with {config['net_classes']} (--size, --flip)")
    return other


def make_curator(config, state, guide_path, device):
    """The Curator of a run, None for uniform batches. The reference is the guide, a checkpoint or
    the learner's EMA."""
    if config["selector"] == "uniform":
        return None
    rules = config["interpolate"] or config["until_better"] or config["once_better"]
    if config["score"] not in select.NEEDS_REFERENCE and not rules:
        return Curator(config, state, None, device)
    if config["selector"] == "ajest":
        return Curator(config, state, load_matching(guide_path, "--guide", config, device), device)
    if config["reference"]:
        reference = load_matching(config["reference"], "--reference", config, device)
        return Curator(config, state, reference, device)
    # The copy shares the EMA's tensors, and so is always current.
    average = copy.deepcopy(state.denoiser).eval().requires_grad_(False)
    for parameter, value in zip(average.parameters(), state.ema.averages[config["ema"][0]]):
        parameter.data = value
    return Curator(config, state, average, device)


class Saver:
    """When the next checkpoint is due: `save_every` seconds or steps."""

    def __init__(self, config):
        self.seconds, self.steps = parse_save_every(config["save_every"])
        self.last = time.monotonic()

    def due(self, step):
        due = step % self.steps == 0 if self.steps else time.monotonic() - self.last >= self.seconds
        if due:
            self.last = time.monotonic()
        return due


def log(state, journal, curator, dro, seconds):
    """The log interval's JSON line and progress line; the one place of the loop that waits for the device."""
    c, p = state.config, state.count()
    total, steps, skipped, in_a_row = state.tally.tolist()
    state.tally[:2] = 0
    rate = (p["examples_trained"] - journal.rated[0]) / max(seconds - journal.rated[1], 1e-9)
    journal.rated = p["examples_trained"], seconds
    record = dict(kind="train", step=p["step"], loss=total / max(steps, 1), lr=state.learning_rate(),
                  seconds=seconds, select_seconds=p["select_seconds"], eval_seconds=p["eval_seconds"],
                  examples_per_second=rate, examples_trained=p["examples_trained"],
                  examples_seen=p["examples_seen"], skipped=int(skipped))
    if curator and curator.stats:
        record |= {key: value.tolist() for key, value in curator.stats.items()}
        curator.stats = {}
    if dro:
        record["class_weights"] = dro.class_weights(dro.log_alpha.exp()).tolist()
    if state.ranks.rank == 0:
        journal.write(record)
    left = (c["steps"] - p["step"]) * seconds / p["step"]
    left = min(left, 60 * c["minutes"] - seconds) if c["minutes"] else left
    flops = state.flops_per_example * rate / 1e12
    journal.show(f"step {p['step']}/{c['steps']}  loss {record['loss']:.4f}  {rate:,.0f} examples/s"
                 + (f"  {flops:.2f} TFLOP/s" if flops else "")
                 + f"  selection {100 * p['select_seconds'] / max(seconds, 1e-9):.0f}%"
                 + f"  {max(left, 0) // 60:.0f}:{max(left, 0) % 60:02.0f} left", last=p["step"] >= c["steps"])
    if in_a_row >= 100:
        raise data.DataError("100 steps in a row had a non-finite loss or gradient: "
                             "lower --lr, or try --no-bf16")


def run_evaluation(state, journal, evaluate):
    """Write the evaluation's records, in place of any that an interrupted one left at this step."""
    began, p = time.monotonic(), state.count()
    if state.ranks.rank == 0:
        records = list(evaluate(state, journal.show))
        p["eval_seconds"] += time.monotonic() - began
        same = {k: p[k] for k in ("step", "seconds", "select_seconds", "eval_seconds",
                                  "examples_trained", "examples_seen")}
        stale = evaluations(journal.records, p["step"])
        journal.keep(lambda r: r not in stale)
        for record in records:
            journal.write({"kind": "eval", **same, **record})


# ------------------------------------------------------------------------------------------------------------
# Evaluation: the same noise for every run and step, unguided and guided; metrics by name and a picture.

class Evaluator:
    """Called with a State, yields one record unguided and one guided;
    `dataset` is what the metrics compare with."""

    def __init__(self, config, dataset, out, guide_path, guide_seconds, other_seconds, held_out=None):
        self.config, self.dataset, self.out, self.guide_path = config, dataset, out, guide_path
        self.guide_seconds, self.other_seconds, self.held_out = guide_seconds, other_seconds, held_out
        self.device, self.real, self.main = torch.device(config["device"]), None, None
        guided = config["guidance"] != 1 and (guide_path is not None or config["guide"] == "self")
        self.weights = [1.0, config["guidance"]] if guided else [1.0]

    def __call__(self, state, show):
        c, pictures = self.config, []
        if self.main is None:  # compiled once, for all evaluations
            self.main = copy.deepcopy(state.denoiser).eval().requires_grad_(False)
            self.denoisers = self.prepare()
        state.ema.copy_to(self.main, c["ema"][0])
        for w, denoiser in zip(self.weights, self.denoisers):
            show(f"evaluating, guidance {w:g}")
            metrics, picture = (self.tree if c["kind"] == "tree" else self.images)(denoiser, w == 1)
            pictures.append(picture)
            needs_guide = w != 1 or c["selector"] == "ajest"
            seconds = self.other_seconds + (self.guide_seconds if needs_guide else 0)
            yield dict(guidance=w, reference_seconds=seconds, **metrics)
        draw = draw_tree if c["kind"] == "tree" else draw_images
        draw(pictures, self.dataset, self.out / "samples.png")

    def prepare(self):
        """The denoisers, unguided and guided, under autocast and, on CUDA, compiled."""
        c = self.config
        unguided = model.accelerate(self.main, self.device, c["bf16"], c["compile"])
        if len(self.weights) == 1:
            return [unguided]
        weak = guide.Unlabelled(self.main) if c["guide"] == "self" else load_matching(
            self.guide_path, "--guide", c, self.device)
        weak = model.accelerate(weak, self.device, c["bf16"], c["compile"])
        return [unguided, guide.Autoguided(unguided, weak, self.weights[1])]

    @torch.no_grad()
    def tree(self, denoiser, unguided):
        """The metrics of n sampled points (unguided: with the score error), and the points [n, 2]."""
        c, n = self.config, self.config["eval_samples"]
        sampler = dict(steps=c["sampling_steps"], sigma_max=c["sigma_max"])
        noise = torch.randn(n, 2, generator=data.stream(0, 0, "eval"))
        if self.real is None:  # where the exact denoiser's ODE takes the first 4,096
            self.real = fid.exact_endpoints(self.dataset, noise[:4096].to(self.device))
        points = torch.cat([guide.heun(denoiser, part.to(self.device), **sampler)
                            for part in noise.split(2048)])
        metrics = fid.tree_metrics(points, self.dataset, self.real)
        if unguided:
            metrics["score_error"] = fid.score_error(denoiser, self.dataset)
        return metrics, points.cpu()

    @torch.no_grad()
    def images(self, denoiser, unguided):
        """The metrics of n sampled images or latents, and the first [<= 80, C, H, W] of them."""
        c, n = self.config, self.config["eval_samples"]
        labels = torch.arange(n) % c["classes"] if c["classes"] else torch.zeros(n, dtype=torch.long)
        labels = labels if c["net_classes"] else None
        batches = guide.generate(denoiser, range(n), labels, min(n, c["batch"]), self.device,
                                 steps=c["sampling_steps"], sigma_max=c["sigma_max"])
        x = torch.cat([data.decode(x, c).cpu() for x in batches])
        metrics = {}
        if c["metrics"] != "none":
            scorer = fid.Scorer(c["metrics"], self.device)
            if self.real is None:
                self.real = scorer.summary(self.dataset, label="features of the data")
                write_json(self.out / "noise_floor.json", scorer.noise_floor(self.dataset))
            metrics = scorer.score(self.real, x)
        if unguided and self.held_out is not None:
            metrics["validation_loss"] = validation_loss(denoiser, self.dataset, self.held_out, c,
                                                         self.device)
        return metrics, x[:80]


def validation_loss(denoiser, dataset, held_out, config, device, batch=256):
    """Mean denoising loss on held-out examples, at noise that is the same for every run."""
    total = 0.0
    for i, index in enumerate(held_out.split(batch)):
        x0 = dataset.take(index.to(dataset.x.device)).to(device)
        generator = data.stream(0, i, "validation")
        ln_sigma = config["P_mean"] + config["P_std"] * torch.randn(len(x0), generator=generator)
        sigma = ln_sigma.exp().to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        labels = dataset.labels[index.to(dataset.x.device)].to(device) if config["classes"] else None
        D_x = denoiser(x0 + sigma[:, None, None, None] * noise, sigma, labels)
        total += model.per_example_loss(D_x, x0, sigma).sum().item()
    return total / len(held_out)


# ------------------------------------------------------------------------------------------------------------
# Pictures: the tree's exact density beside samples; a grid of images, unguided above guided.

def draw_tree(samples, tree, path, size=400, side=3.0):
    """samples: list of point sets [N, 2].
    Panels of `size` pixels that show the square of this side around the origin."""
    ticks = (torch.arange(size) + 0.5) / size * side - side / 2
    cells = torch.stack(torch.meshgrid(ticks, -ticks, indexing="xy"), dim=-1).reshape(-1, 2)
    panels = [data.log_density_picture(tree.logp(cells.to(tree.device)).cpu().reshape(size, size))]
    panels += [data.density_picture(points, size, side) for points in samples]
    titles = ["exact density", "unguided samples", "guided samples"]
    image = Image.new("RGB", (len(panels) * (size + 8) - 8, size + 24), "white")
    for i, (panel, title) in enumerate(zip(panels, titles)):
        image.paste(panel, (i * (size + 8), 24))
        ImageDraw.Draw(image).text((i * (size + 8) + 4, 2), title, fill="black",
                                   font=ImageFont.load_default(16))
    save_image(image, path)


def draw_images(samples, dataset, path):
    """samples: list of uint8 [<= 80, 3, H, W] image sets (latents: their first three channels, scaled)."""
    columns = min(dataset.classes or 10, 10)
    rows = []
    for images in samples:
        if images.dtype != torch.uint8:
            images = images.float()[:, :3]
            images = ((images / images.std().clamp_min(1e-6)) * 50 + 128).clamp(0, 255).to(torch.uint8)
        images = images.expand(-1, 3, -1, -1)
        rows.append(data.image_grid(images, columns))
    width, gap = rows[0].width, 8
    image = Image.new("RGB", (width, sum(r.height + gap for r in rows) - gap), "white")
    for i, row in enumerate(rows):
        image.paste(row, (0, i * (row.height + gap)))
    save_image(image, path)


def save_image(image, path):
    image.save(f"{path}.tmp", format="PNG")
    os.replace(f"{path}.tmp", path)


# ------------------------------------------------------------------------------------------------------------
# The stages of a run, each in a folder of its own with its own checkpoint, so that each resumes
# or is skipped.

RESUMABLE = {"steps", "minutes", "device", "bf16", "compile", "save_every", "eval_every", "eval_samples",
             "metrics", "sampling_steps", "guidance", "micro_batch"}  # may change when a run goes on


def begin(out, config):
    """Create the run folder and write config.json; DataError where it holds a run with other settings."""
    path = out / "config.json"
    if (out / "checkpoint.pt").exists() and path.exists():
        old = read_json(path)
        for key in sorted(config.keys() - RESUMABLE):
            if old.get(key) != config[key]:
                raise data.DataError(f"{out} holds a run with --{key.replace('_', '-')} {old.get(key)}, "
                                     f"not {config[key]}: give another --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, config)


def helper_model(config, dataset, out, keep, title, **changes):
    """Train the guide, reference or proxy of a run in the folder `out`, or find it there;
    -> (checkpoint path, seconds)."""
    plain = dict(selector="uniform", early_steps=0, until_better=False, once_better=False, interpolate=0,
                 debias=False, guide="none", reference=None, dro=None, class_weights=None, minutes=0,
                 metrics="none", eval_samples=0, channels=config["guide_channels"],
                 batch=config["guide_batch"], steps=config["guide_steps"], micro_batch=0,
                 seed=config["seed"] + 1_000_003)
    config = {**config, **plain, **changes}
    begin(out, config)
    fit(config, dataset, out, keep=keep, title=title)
    return out / "checkpoint.pt", training_seconds(out / "checkpoint.pt")


def training_seconds(path):
    """How long the model in a checkpoint was trained; 0 where it does not say."""
    progress = model.read(path).get("progress")
    seconds = progress.get("seconds") if isinstance(progress, dict) else None
    return seconds if isinstance(seconds, float) else 0.0


def coreset(config, dataset, out):
    """The sorted indices to train on (None = all) and the seconds that choosing them took."""
    n, began = len(dataset), time.monotonic()
    keep = (data.long_tail(dataset.labels.cpu(), config["imbalance"], config["seed"])
            if config["imbalance"] else None)
    if config["keep"] is None:
        return keep, 0.0
    try:
        fraction = float(config["keep"])
    except ValueError:
        chosen = data.load_keep(config["keep"], n)
        return (chosen if keep is None else chosen[torch.isin(chosen, keep)]), 0.0
    if not 0 < fraction <= 1:
        raise data.DataError(f"--keep {config['keep']}: a fraction must lie in (0, 1]")
    names = ("data_fingerprint", "keep", "prune", "features", "imbalance", "seed")
    made = {"of": n, **{name: config[name] for name in names}}
    stored = read_json(out / "keep.json") if (out / "keep.json").exists() else {}
    if stored.items() >= made.items() and isinstance(stored.get("seconds"), float):
        return data.load_keep(out / "keep.npy", n), stored["seconds"]
    features, labels = features_of(dataset, config), dataset.labels
    if keep is not None:
        features, labels = features[keep], labels.cpu()[keep]
    kept = data.prune(features, labels, fraction, config["prune"], seed=config["seed"])
    keep = kept if keep is None else keep[kept]
    data.save_keep(out / "keep.npy", keep)
    write_json(out / "keep.json", dict(seconds=time.monotonic() - began, kept=len(keep), **made))
    return keep, time.monotonic() - began


def features_of(dataset, config):
    """Features [N, d] for pruning: pixels, a feature network's (computed once per file), or a file's."""
    name = config["features"]
    if config["prune"] == "random" or name == "pixels":
        return data.pixel_features(dataset)
    if name == "inception" or name.startswith("own:"):
        return fid.cached_features(fid.Scorer(name, config["device"]), dataset)
    return data.load_features(name, len(dataset))


def choose_metrics(config, dataset, out, say):
    """The features that images are scored with: as asked for, or "auto":
    a classifier fitted once to labelled data."""
    if config["kind"] == "tree" or not config["eval_samples"]:
        return "none"
    if config["metrics"] != "auto":
        return config["metrics"]
    if config["kind"] == "latent" or not dataset.classes:
        return "pixels"
    path = out.parent / f"features-{dataset.fingerprint[:12]}.pt"
    if not path.exists():
        say(f"fitting the classifier whose features score the samples: {path}")
        fid.fit(path, dataset, device=config["device"])
    return f"own:{path}"


def prepare_guide(config, dataset, out, keep):
    """-> (checkpoint path or None, training seconds) of the guide: given, or trained first."""
    if config["guide"] in ("none", "self") or config["dro"] not in (None, "auto"):
        return None, 0.0
    if config["guide"] == "auto":
        return helper_model(config, dataset, out / "guide", keep, "guide")
    path = Path(config["guide"])
    path = path / "checkpoint.pt" if path.is_dir() else path
    load_matching(path, "--guide", config, "cpu")
    return path, training_seconds(path)


def prepare_weights(config, dataset, out, keep, guide_path):
    """-> (class weights or None, seconds): from a file, or by a DRO proxy trained against the reference."""
    if config["dro"] == "auto":
        reference, seconds = guide_path, 0.0
        if reference is None:
            reference, seconds = helper_model(config, dataset, out / "reference", None, "reference")
        steps = config["dro_steps"] or config["guide_steps"]
        proxy, more = helper_model(config, dataset, out / "proxy", keep, "proxy", dro=str(reference),
                                   steps=steps)
        return read_class_weights(proxy.parent / "class_weights.json", config["class_names"]), seconds + more
    if config["class_weights"] == "inverse":
        counts = class_counts(dataset, keep)
        return counts.sum() / (len(counts) * counts.clamp_min(1)), 0.0
    if config["class_weights"]:
        weights = read_class_weights(config["class_weights"], config["class_names"])
        counts = class_counts(dataset, keep)
        return weights * counts.sum() / (weights * counts).sum(), 0.0  # mean 1 over the examples
    return None, 0.0


def class_counts(dataset, keep):
    """How many examples of each class there are to train on: float32 [classes]."""
    labels = dataset.labels if keep is None else dataset.labels[keep.to(dataset.labels.device)]
    return torch.bincount(labels, minlength=dataset.classes).float().cpu()


def run(args):
    """All stages: coreset, guide, class weights, the model itself, its evaluation. Returns the run folder."""
    ranks = Ranks(torch.device(args.device))
    with ranks.in_turn():
        dataset = (data.load(args.data, args.size) if args.data else data.Tree("A")).to(args.device)
    config = resolve(args, dataset)
    if config["kind"] == "tree" and args.device == "cpu":
        torch.set_num_threads(1)  # the tree's small matrices gain nothing from a second thread
    stem = Path(args.data).name.split(".")[0] if args.data else "tree"
    out = Path(args.out or f"runs/{stem}-{args.selector}")
    if args.dry_run:
        return dry_run(config, dataset, out)
    quiet = ranks.rank > 0
    say = (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))
    with ranks.in_turn():
        begin(out, config)
        say("\n".join(dataset.report))
        keep, prune_seconds = coreset(config, dataset, out) if config["kind"] != "tree" else (None, 0.0)
        keep, held_out = hold_out(config, dataset, keep)
        config["metrics"] = choose_metrics(config, dataset, out, say)
        config["features_id"] = fid.features_id(config["metrics"]) if config["kind"] != "tree" else "tree"
        write_json(out / "config.json", config)

    # Under --dro auto one small model, trained on all data, is the reference of the class weights
    # and the guide.
    on_all = config["dro"] == "auto" and config["guide"] == "auto"
    guide_path, guide_seconds = prepare_guide(config, dataset, out, None if on_all else keep)
    weights, dro_seconds = prepare_weights(config, dataset, out, keep, guide_path)
    stages = dict(prune=prune_seconds, guide=guide_seconds, class_weights=dro_seconds)
    write_json(out / "stages.json", stages)

    proxy = config["dro"] not in (None, "auto")
    other = prune_seconds + dro_seconds + (guide_seconds if on_all else 0)
    evaluate = None
    if config["eval_samples"] and not proxy:
        evaluate = Evaluator(config, dataset, out, guide_path, 0 if on_all else guide_seconds, other,
                             held_out)
    records = fit({**config, "dro": config["dro"] if proxy else None}, dataset, out, guide_path, keep,
                  weights, evaluate)
    report(records, out, quiet)
    return out


def hold_out(config, dataset, keep):
    """-> (indices to train on or None = all, held-out indices or None), drawn by the seed alone."""
    n = config["holdout"]
    if not n:
        return keep, None
    if not 0 < n < len(dataset):
        raise data.DataError(f"--holdout {n}: the data has {len(dataset)} examples")
    held_out = torch.randperm(len(dataset), generator=data.stream(0, 0, "holdout"))[:n].sort().values
    keep = torch.arange(len(dataset)) if keep is None else keep
    return keep[~torch.isin(keep, held_out)], held_out


def report(records, out, quiet):
    """Print the last evaluation, one line each for unguided and guided samples."""
    last = [r for r in records if r["kind"] == "eval" and r["step"] == records[-1]["step"]]
    for r in [] if quiet else last:
        skip = {"kind", "step", "seconds", "select_seconds", "eval_seconds", "reference_seconds",
                "examples_trained", "examples_seen", "guidance"}
        words = "  ".join(f"{name} {value:.4f}" for name, value in r.items() if name not in skip)
        guidance = "unguided" if r["guidance"] == 1 else "guidance %g" % r["guidance"]
        print(f"step {r['step']}, {guidance}:  {words}")
    if not quiet:
        print(f"wrote {out}/: config.json, log.jsonl, checkpoint.pt" + (", samples.png" if last else ""))


# ------------------------------------------------------------------------------------------------------------
# --dry-run: what was found, what would be done, and what it needs.

def dry_run(config, dataset, out):
    """Print data, stages and sizes; write nothing."""
    b, B = config["batch"], super_batch_size(config)
    denoiser = model.build(model_config(config))
    count = sum(p.numel() for p in denoiser.parameters())
    print("\n".join(dataset.report))
    print(f"run     {out}: {config['steps']:,} steps of {b} examples" +
          (f", chosen from {B} by {config['selector']}" if config["selector"] != "uniform" else ""))
    auto, own_guide = config["dro"] == "auto", config["guide"] == "auto"
    stages = [f"coreset ({config['keep']} by {config['prune']})"] * bool(config["keep"])
    stages += [f"guide ({config['guide_steps']:,} steps of {config['guide_batch']})"] * own_guide
    stages += [f"class weights ({config['dro_steps'] or config['guide_steps']:,} steps)"] * auto
    print(f"before  {', '.join(stages) or 'nothing'}")
    print(f"model   {count / 1e6:.2f} M parameters, "
          f"{forward_flops(config) / 1e9:.3g} GFLOP a forward pass and example")
    sizes = {"data": 0 if config["kind"] == "tree" else dataset.x.nbytes, "model and gradients": 8 * count,
             "optimizer": 8 * count, "EMA": 4 * count * len(config["ema"])}
    cuda = torch.device(config["device"]).type == "cuda"
    sizes["activations"] = (peak_memory(config, dataset) - sum(sizes.values()) if cuda else
                            activation_bytes(denoiser, config, config["micro_batch"] or b))
    words = ", ".join(f"{name} {size / 2 ** 20:,.0f}" for name, size in sizes.items())
    total = f"{sum(sizes.values()) / 2 ** 20:,.0f} MiB"
    how = f"{total} at the peak of a step, measured" if cuda else f"about {total}, not compiled"
    print(f"memory  {how}: {words}")


def peak_memory(config, dataset):
    """Bytes allocated at the peak of one step on CUDA, data included: it is taken, as `fit` takes it, by an
    untrained model (compiled, so that the run itself finds its graphs in the compiler's cache)."""
    device = torch.device(config["device"])
    ranks = Ranks(device)
    state = State(config, device, ranks)
    torch.cuda.reset_peak_memory_stats(device)
    if config["selector"] != "uniform":
        guide_config = model_config({**config, "channels": config["guide_channels"]})
        reference = model.build(guide_config).eval().requires_grad_(False).to(device)
        curator = Curator(config, state, reference, device)
        rows, weight = curator.choose(*Draw(config, dataset, super_batch_size(config), device, ranks)[0], 0)
    else:
        rows, weight = Draw(config, dataset, config["batch"], device, ranks)[0], None
    for _ in range(2):  # the optimizer's state is there from the second on
        state.learn(*rows[:4], weight)
    return torch.cuda.max_memory_allocated(device)


def activation_bytes(denoiser, config, n):
    """Bytes that the forward pass of n examples keeps for the backward pass, without compilation: those of
    the normalized weights and those of each example, told apart by batches of two and of four."""
    def kept_by(batch):
        """Bytes, each storage counted once; parameters are not counted."""
        kept, own = {}, {p.data_ptr() for p in denoiser.parameters()}

        def note(tensor):
            if tensor.data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x, labels = torch.randn(batch, *config["shape"]), torch.zeros(batch, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss, _ = model.accelerate(denoiser.loss, "cpu", config["bf16"])(x, x, torch.ones(batch), labels)
        return sum(kept.values())

    two, four = kept_by(2), kept_by(4)
    return two + (four - two) // 2 * (n - 2)


def main(argv=None):
    """Parse the flags and run; an error that its user can mend becomes one line and exit status 2."""
    args = build_parser().parse_args(argv)
    try:
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise data.DataError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
        run(args)
    except (data.DataError, model.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except torch.cuda.OutOfMemoryError:
        print(f"error: --device {args.device} has too little memory for this run: give a --micro-batch or a "
              "smaller --batch", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.filename or args.out or 'runs/'}: {error.strerror or error}; "
              "free some space or give another --out; the same command goes on from the last checkpoint",
              file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # outside of the training loop, which saves first
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
