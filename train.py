"""Train a diffusion model while choosing its data: online (JEST, AJEST) or offline (coreset, class weights).

"Autoguided Online Data Curation for Diffusion Model Training" (arXiv 2509.15267) and "Pruning then
Reweighting: Towards Data-Efficient Training of Diffusion Models" (arXiv 2409.19128). One run is one folder;
the same command again resumes it. On the built-in 2-D tree, in a few minutes on a CPU:

    python train.py --selector ajest --early-steps 5000
"""
import argparse
import contextlib
import copy
import datetime
import fcntl
import functools
import importlib.util
import json
import math
import os
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
# Presets, chosen by the data; a flag that is given wins. The tree follows the toy of 2406.02507, images and
# latents EDM's and EDM2's noise levels. "cpu" replaces the sizes of images and latents where there is no GPU.

PRESETS = {
    "tree": dict(
        channels=64, batch=816, steps=8_000, lr_decay=512, warmup=0, dropout=0.0, ema=[0.02, 0.10],
        P_mean=-2.3, P_std=1.5, sigma_max=5.0, targets="exact", guidance=3.0, guide_channels=32,
        guide_batch=4096, eval_samples=163_840, log_every=100, flip=False),
    "32": dict(
        channels=64, batch=512, steps=20_000, lr_decay=2000, warmup=200, dropout=0.13, ema=[0.05, 0.10],
        P_mean=-1.2, P_std=1.2, guidance=1.6, flip=True),
    "64": dict(
        channels=64, batch=256, steps=20_000, lr_decay=4000, warmup=200, dropout=0.0, ema=[0.05, 0.10],
        P_mean=-0.8, P_std=1.6, guidance=1.8, flip=True),
    "latent": dict(
        channels=128, batch=256, steps=20_000, lr_decay=4000, warmup=200, dropout=0.0, ema=[0.05, 0.10],
        P_mean=-0.4, P_std=1.0, guidance=1.8, flip=False),
    "cpu": dict(
        channels=24, blocks=1, batch=64, steps=1000, lr_decay=400, warmup=50, dropout=0.0, sampling_steps=16,
        eval_samples=256, log_every=20)}


def build_parser():
    """The parser of all flags. Help shows the defaults that no preset replaces."""
    parser = data.parser(__doc__, "[--data DATA] [flags]")
    number, on_off = data.number, argparse.BooleanOptionalAction
    whole, count = number(int, "[0, inf)"), number(int, "[1, inf)")
    amount, positive = number(float, "[0, inf)"), number(float, "(0, inf)")
    add = parser.add_argument_group("data").add_argument
    add("--data", help="folder, zip, CIFAR-10 or .npz; none = the 2-D tree")
    add("--out", help="run folder; none = runs/DATA-SELECTOR")
    add("--size", type=number(int, "[8, 4096]"), help="center-crop and resize images to this many pixels")
    add("--flip", action=on_off, help="mirror half of the images, as classes of their own (preset)")
    add("--holdout", type=whole, default=0, help="examples held out for the validation loss (0 = off)")
    add("--imbalance", type=number(float, "[1, inf)"), help="make classes long-tailed: head over tail")
    add = parser.add_argument_group("model and optimization").add_argument
    add("--channels", type=count, help="width of the network (preset)")
    add("--blocks", type=count, default=3, help="residual blocks a level of the UNet")
    add("--batch", type=count, help="examples trained on per step, whatever the selector (preset)")
    add("--micro-batch", type=count, help="compute a batch in parts of this size; none = at once")
    add("--steps", type=count, help="optimizer steps (preset)")
    add("--lr", type=positive, default=0.01, help="Adam learning rate")
    add("--lr-decay", type=count, help="steps after which it falls as 1/sqrt(step) (preset)")
    add("--warmup", type=whole, help="steps of linear warm-up, 0 = off (preset)")
    add("--dropout", type=number(float, "[0, 1)"), help="dropout inside the residual blocks (preset)")
    add("--ema", type=number(float, "(0, 0.28)"), nargs="+", help="EMA lengths; the first is used (preset)")
    add("--P-mean", type=number(float, "(-inf, inf)"), help="mean of ln sigma in training (preset)")
    add("--P-std", type=positive, help="standard deviation of ln sigma in training (preset)")
    add("--targets", choices=("sample", "exact"), default="sample",
        help="what D learns: x0 itself, or the exact denoiser's output, which the tree knows (its default)")
    add("--guided-targets", type=number(float, "[1, inf)"), default=1.0, metavar="W",
        help="move the targets by 1 - 1/W of learner - guide, so that the network itself becomes the "
        "autoguided denoiser of weight W (1 = off)")
    add = parser.add_argument_group("online selection (2509.15267)").add_argument
    add("--selector", choices=("uniform", "jest", "ajest"), default="uniform", help="how batches are made")
    add("--filter", type=number(float, "[0, 1)"), default=0.8, help="share of the super-batch left out")
    add("--joint", choices=select.FACTORS, help="what the chosen add to the scores of others: mean (the "
        "AJEST authors' code, default with ajest), independent (JEST without pairs, default with jest), sum")
    add("--chunks", type=count, default=16, help="at most this many chunks in which JEST fills the batch")
    add("--score", choices=select.SCORES, default="learnability", help="what makes an example worth it")
    add("--invert", action="store_true", help="prefer low scores")
    add("--gain", type=amount, default=0.0, help="multiply standardized scores (0 = raw scores)")
    add("--debias", action="store_true", help="weigh by inverse inclusion probability")
    add("--early-steps", type=whole, default=0, help="select during the first N steps (0 = throughout)")
    add("--until-better", action="store_true", help="select until a log line sees the reference beaten")
    add("--after", choices=("uniform", "full"), default="uniform", help="then batches of b, or all of B")
    add("--reference", help="checkpoint that jest scores against; none = the learner's EMA")
    add = parser.add_argument_group("guide, sampling and evaluation (2406.02507)").add_argument
    add("--guide", help="checkpoint; train = train one first; snapshot = the learner's own EMA after "
        "guide-steps; none; default: train where it is needed from the start, else snapshot")
    add("--guide-channels", type=count, help="width of a trained guide; none = half (tree: 32)")
    add("--guide-batch", type=count, help="its batch; none = the run's (tree: 4096)")
    add("--guide-steps", type=count,
        help="its steps, or the snapshot's; none = an eighth (tree: 1024, of a snapshot at most 512)")
    add("--guidance", type=amount, help="guidance weight of samples, 1 = off (preset)")
    add("--sampling-steps", type=count, default=32, help="Heun steps")
    add("--sigma-max", type=number(float, "(0.002, inf)"), default=80.0, help="noise level of the first step")
    add("--eval-every", type=count, help="steps between evaluations; none = only at the end")
    add("--eval-samples", type=whole, default=10_000, help="samples scored (0 = none)")
    add("--metrics", default="pixels", help="features that score images: pixels, own:CKPT, inception, none")
    add = parser.add_argument_group("coreset and class weights (2409.19128)").add_argument
    add("--keep", type=number(float, "(0, 1]"), help="fraction of each class to keep")
    add("--prune", choices=data.PRUNING, default="gaussian", help="what is kept first")
    add("--prune-features", default="pixels", help="what pruning sees: pixels, own:CKPT, inception")
    add("--class-weights", help="dro = find them by group DRO against the guide; inverse (of frequency); or "
        "the class_weights.json of another run")
    add("--eta", type=positive, default=1.0, help="step size of group DRO (DoReMi's)")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=number(int, "[0, 1e15]"), default=0, help="of weights, data, noise and selection")
    add("--device", type=data.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bf16", action=on_off, help="bf16 autocast; none = on a GPU, but for the tree")
    add("--compile", action=on_off, help="torch.compile; none = on a GPU")
    add("--log-every", type=count, default=50, help="steps between log lines")
    add("--save-every", type=amount, default=60.0, help="seconds between checkpoints, at log lines")
    return parser


# ------------------------------------------------------------------------------------------------------------
# The settings of a run: what the flags say, else the preset and the data. Where a run goes on, what no start
# has said stays as it was at first, whatever the presets say now.

MACHINE = {"data", "out", "device", "bf16", "compile", "micro_batch"}   # may differ where a run goes on
MAY_CHANGE = MACHINE | {"steps", "log_every", "save_every", "eval_every", "eval_samples", "sampling_steps",
                        "guidance", "metrics"}                          # also given anew
PATHS = {"guide", "reference", "class_weights", "prune_features"}       # files may have moved
RESUMED = "a checkpoint of this run (give another --out, or delete it)"    # what `reading` asks for
WORDS = {None, "train", "snapshot", "none", "dro", "inverse", "pixels", "inception"}


def settings(argv=None):
    """-> (c, a namespace of plain values; the data set). Prints what was found before anything is refused."""
    parser = build_parser()
    args, flags = data.parse(parser, argv)
    dataset = (data.load(args.data, args.size) if args.data else data.Tree("A")).to(args.device)
    name = Path(args.data).resolve().name.split(".")[0] if args.data else "tree"
    out = Path(args.out or f"runs/{name}-{args.selector}")
    if RANK == 0:
        print(*dataset.report, sep="\n", file=sys.stderr)

    # The preset's values become defaults, then those with which the run in this folder began.
    tree, cuda = dataset.kind == "tree", args.device.startswith("cuda")
    preset = dataset.kind if dataset.kind in PRESETS else "32" if dataset.shape[-1] <= 32 else "64"
    parser.set_defaults(**PRESETS[preset], bf16=cuda and not tree, compile=cuda)
    if not tree and not cuda:
        parser.set_defaults(**PRESETS["cpu"])
    old = {}
    if (out / "config.json").exists():
        with data.reading(out / "config.json", "the settings of a run"):
            old = json.loads((out / "config.json").read_text())
            never_given = set(vars(args)) - set(old["flags"]) - MACHINE
            parser.set_defaults(**{key: old[key] for key in never_given & set(old)})
    c = parser.parse_args(argv)
    c.out, c.flags = str(out), flags
    c.eval_levels = {key: PRESETS[preset][key] for key in ("P_mean", "P_std")}  # whatever is trained on
    c.fingerprint, c.found = dataset.fingerprint, ", ".join(dataset.report[:2])
    c.kind, c.shape, c.classes = dataset.kind, list(dataset.shape), dataset.classes
    c.class_names, c.net_classes = list(dataset.class_names), 2 * max(c.classes, 1) if c.flip else c.classes
    c.mean, c.std = (list(getattr(dataset, moment, ())) for moment in ("mean", "std"))
    c.class_shares = (class_counts(dataset).double() / len(dataset)).tolist() if c.classes else [1.0]
    for key in set(old.get("flags", ())) | set(flags) if old else ():
        was, now = old.get(key), getattr(c, key)
        if key in PATHS:
            was, now = (value if value in WORDS else "a file" for value in (was, now))
        if key not in MAY_CHANGE and was != now:
            raise data.DataError(f"{out} holds a run with --{key.replace('_', '-')} {was}, not {now}: "
                                 "give another --out, or delete it")
    if old and old["fingerprint"] != c.fingerprint:
        raise data.DataError(f"{out} holds a run on other data ({old['found']}; now: {c.found}): "
                             "the data has changed, give another --out")
    path = out / "checkpoint.pt"
    if path.exists():
        with data.reading(path, RESUMED):
            done = int(model.load_checkpoint(path)["progress"]["step"])
        if done > c.steps:
            raise data.DataError(f"--steps {c.steps}: the run in {out} has done {done}")

    # What follows from them.
    c.guide = c.guide or ("train" if c.selector == "ajest" or c.class_weights == "dro" else "snapshot")
    if tree and not c.guide_steps:
        c.guide_steps = min(512, math.ceil(c.steps / 8)) if c.guide == "snapshot" else 1024
    c.guide_steps = c.guide_steps or math.ceil(c.steps / 8)
    c.guide_channels, c.guide_batch = c.guide_channels or math.ceil(c.channels / 2), c.guide_batch or c.batch
    if c.guided_targets != 1 and "guidance" not in flags:
        c.guidance = 1.0                                        # the network itself is the guided denoiser
    c.bf16, c.compile = model.able(c.device, c.bf16, c.compile)
    c.joint = c.joint or ("mean" if c.selector == "ajest" else "independent")
    c.super_batch = round(c.batch / (1 - c.filter))             # B = b / (1 - filter ratio)
    c.compares = c.until_better or c.score in ("learnability", "easy")      # asks for the reference's losses
    refuse(c, len(dataset) if not tree else math.inf)
    return c, dataset


def refuse(c, examples):
    """DataError for what no flag can know alone."""
    tree, part = c.kind == "tree", (c.micro_batch or 1) * WORLD
    data.refuse_unused(c.flags, [
        (c.selector != "uniform", "--selector jest or ajest",
         "filter chunks joint score invert gain debias early_steps until_better after"),
        (c.selector == "jest", "--selector jest (the reference of ajest is the --guide)", "reference"),
        (c.compares, "--score learnability or easy, or --until-better", "reference"),
        (c.early_steps or c.until_better, "--early-steps or --until-better", "after"),
        (not c.debias, "a draw in parts, and --debias draws once", "chunks joint"),
        (c.keep, "--keep", "prune prune_features"),
        (c.prune != "random", "--prune gaussian, knn or moderate", "prune_features"),
        (c.class_weights == "dro", "--class-weights dro", "eta"),
        (c.guide == "train" or c.class_weights == "dro", "--guide train", "guide_channels guide_batch"),
        (not tree, "--data", "size blocks dropout keep class_weights holdout imbalance metrics"),
        (c.classes, f"labels: {c.data} has none", "class_weights imbalance"),
        (c.guide != "none" or c.guided_targets == 1, "a --guide", "guided_targets"),
        (c.guide != "none" or c.guidance == 1, "a --guide", "guidance")])
    for wrong, why in [
        ((c.selector == "ajest" or c.class_weights == "dro") and c.guide in ("none", "snapshot"),
         "--selector ajest and --class-weights dro need a --guide from the start: train, or a checkpoint"),
        (c.guide == "snapshot" and c.guide_steps > c.steps,
         f"--guide-steps {c.guide_steps}: the snapshot is to be taken within the {c.steps} --steps"),
        (not tree and (c.shape[1] != c.shape[2] or c.shape[1] % 8),
         f"--size: the UNet needs square images of a multiple of 8 pixels, not {c.shape}"),
        (c.kind != "image" and c.flip, "--flip is for images"),
        (not tree and c.targets == "exact", "--targets exact is for the tree"),
        (c.holdout >= examples, f"--holdout {c.holdout}: the data has no more examples"),
        (0 < c.eval_samples < max(c.classes, 2),
         f"--eval-samples {c.eval_samples}: give one for each class, and 2 or more"),
        (c.batch % part or c.guide_batch % WORLD or c.super_batch % part and c.selector != "uniform",
         f"--batch {c.batch}, --guide-batch {c.guide_batch} and the super-batch of {c.super_batch} must be "
         f"multiples of {part}, --micro-batch times the number of processes")]:
        if wrong:
            raise data.DataError(why)


def model_config(c, guide_path=None):
    """What a checkpoint needs to rebuild its denoiser, and to sample it as the run is evaluated: plain
    values. The guide's path is relative to the run folder."""
    return dict(kind=c.kind, shape=c.shape, channels=c.channels, blocks=c.blocks, classes=c.net_classes,
                class_names=c.class_names, class_shares=c.class_shares, dropout=c.dropout, sigma_data=0.5, bf16=c.bf16,
                mean=c.mean, std=c.std, sigma_max=c.sigma_max, sampling_steps=c.sampling_steps,
                guidance=c.guidance if guide_path else 1.0,
                guide=os.path.relpath(*map(os.path.realpath, (guide_path, c.out))) if guide_path else None)


# ------------------------------------------------------------------------------------------------------------
# Several processes (torchrun): each works on its rows of the one draw that (seed, step) defines, and process
# 0 writes. For one process these do nothing.

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device):
    """Take part in the group of processes."""
    if WORLD > 1:                                               # a long time-out: process 0 evaluates alone
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                                             timeout=datetime.timedelta(days=1))


def barrier():
    """Wait for the others: the files that process 0 has written are there."""
    if WORLD > 1:
        torch.distributed.barrier()


def average(tensors):
    """Average a list of tensors over the processes, in place and in one message."""
    if WORLD > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        torch.distributed.all_reduce(flat)
        parts = (flat / WORLD).split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [part.view_as(t) for t, part in zip(tensors, parts)])


# ------------------------------------------------------------------------------------------------------------
# Seconds of training run from `began`, which moves on over what is not training. Looking at the clock waits
# for the device, so it is done at log lines, evaluations and the first step of a compiled graph.

def now(c):
    """Seconds on a clock, once the device has done what it was given."""
    if c.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.monotonic()


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: state_dicts and plain values, written by process 0. The log is in it, and written once more as
# log.jsonl before it: after a kill between the two, the steps since are done and logged again.

def save(path, c, parts, progress, log, guide_path=None):
    """Write a checkpoint of `parts`, {name: what has a state_dict}, and its log beside it."""
    if RANK == 0:
        content = {name: part.state_dict() for name, part in parts.items()}
        content |= dict(model_config=model_config(c, guide_path), progress=progress, log=log)
        with data.writing(path.with_name("log.jsonl")) as file:
            file.write("".join(json.dumps(record) + "\n" for record in log).encode())
        with data.writing(path) as file:
            torch.save(content, file)


def restore(path, c, parts):
    """-> (progress, log, model_config) of the checkpoint at `path`, whose state the parts take over."""
    with data.reading(path, RESUMED):
        checkpoint = model.load_checkpoint(path, c.device)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        return dict(checkpoint["progress"]), list(checkpoint["log"]), checkpoint["model_config"]


def cost_of(path):
    """-> [seconds, examples] of training the checkpoint at `path`, with those of what it needed itself."""
    with data.reading(path, "a checkpoint of this program"):
        p = model.load_checkpoint(path)["progress"]
        return [p["seconds"] + p["other_seconds"], p["examples_trained"] + p["other_examples"]]


def load_matching(path, c):
    """-> a trained denoiser for the same data, to guide by or to compare with; DataError where it is not."""
    with data.reading(path, "a denoiser for this data"):
        return model.load_denoiser(path, None, c.device, like=model_config(c))


# ------------------------------------------------------------------------------------------------------------
# The objective: EDM's loss, weighted by EDM2's learned uncertainty u(sigma). With guided targets the target
# moves by 1 - 1/W of D - D_guide, so that at the fixed point D = D_guide + W (target - D_guide): the network
# itself is the autoguided denoiser. u learns from the loss against x0, so that no target moves the weighting
# of the noise levels.

def make_objective(c, denoiser, guide_denoiser=None):
    """-> objective(x0, noise, sigma, labels, target, weight [b]) -> (weighted mean, losses [b])."""
    def objective(x0, noise, sigma, labels, target, weight):
        """Of the parts of a data.Batch [b, ...] and the weights [b]."""
        losses, D_x = denoiser.loss(x0, noise, sigma, labels, target)
        total, D = losses, D_x.detach()
        if guide_denoiser is not None:
            with torch.no_grad():
                D_guide = guide_denoiser(x0 + sigma.view(-1, *[1] * (x0.ndim - 1)) * noise, sigma, labels)
            total = model.per_example_loss(D_x, target + (1 - 1 / c.guided_targets) * (D - D_guide), sigma)
        if c.kind != "tree":
            u = denoiser.u(sigma)
            total = total / u.detach().exp() + model.per_example_loss(D, x0, sigma) / u.exp() + u
        return (weight * total).mean(), losses.detach()
    return model.accelerate(objective, c.device, c.bf16, c.compile)


def micro_batches(n, size):
    """Slices of n examples, of `size` each (None: one)."""
    return [slice(i, i + (size or n)) for i in range(0, n, size or n)]


def make_selectors(c, dataset, denoiser, ema, keep, guide_path):
    """-> (Uniform for steps that do not select, Jest for those that do or None)."""
    how = dict(device=c.device, pool=keep, flip=c.flip, P_mean=c.P_mean, P_std=c.P_std, targets=c.targets,
               rows=slice(RANK, None, WORLD))
    batches, super_batches = (data.Batches(dataset, n, c.seed, **how) for n in (c.batch, c.super_batch))
    if c.selector == "uniform":
        return select.Uniform(batches), None
    if not c.compares:
        reference = None
    elif c.selector == "ajest" or c.reference:
        reference = load_matching(guide_path if c.selector == "ajest" else c.reference, c)
    else:                                                       # the learner's EMA, whose tensors it shares
        reference = copy.deepcopy(denoiser).eval().requires_grad_(False)
        for parameter, average in zip(reference.parameters(), ema.averages[c.ema[0]]):
            parameter.data = average

    def losses_of(network):
        """A function of a data.Batch that returns the network's losses [n], without gradient and dropout."""
        loss = model.accelerate(lambda *batch: network.loss(*batch)[0], c.device, c.bf16, c.compile)

        @torch.no_grad()
        def losses(batch):
            denoiser.eval()
            parts = [loss(*batch.rows(rows)) for rows in micro_batches(len(batch.x0), c.micro_batch)]
            denoiser.train()
            return torch.cat(parts)
        return losses

    def make_generator(step):
        return data.stream(c.seed, step, f"select{RANK or ''}", c.device)

    uncertainty = None
    if c.kind != "tree" and c.score == "root-loss":
        uncertainty = torch.no_grad()(denoiser.u)
    jest = select.Jest(super_batches, losses_of(denoiser), losses_of(reference) if reference else None,
                       c.batch // WORLD, make_generator, c.chunks, c.joint, c.debias, uncertainty,
                       kind=c.score, invert=c.invert, gain=c.gain)
    return select.Uniform(super_batches if c.after == "full" else batches), jest


def learning_rate(c, step):
    """Inverse square root after `lr_decay` steps, after a linear warm-up (EDM2 eq. 67)."""
    return c.lr / math.sqrt(max(step / c.lr_decay, 1)) * min(1, (step + 1) / (c.warmup + 1))


# ------------------------------------------------------------------------------------------------------------
# Training.

def train(
    c,                      # settings
    dataset,                # data.Dataset or data.Tree, on its device
    out,                    # run folder; where it holds a checkpoint, the run goes on
    keep=None,              # sorted indices to train on; None = all
    guide_path=None,        # checkpoint: AJEST's reference, the guide of guided targets
    class_weights=None,     # of the loss, [classes]; None = 1
    dro_reference=None,     # checkpoint: find the class weights by group DRO against it
    evaluate=None,          # Evaluate: called every eval_every steps and at the end
    costs=(0.0, 0),         # seconds and examples that were spent on what this training needs
):
    """Train until c.steps are done; writes checkpoint.pt and log.jsonl to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    path, device = out / "checkpoint.pt", torch.device(c.device)
    torch.manual_seed(data.stream(c.seed, 0, "init").initial_seed())
    denoiser = model.build(model_config(c)).to(device).to(memory_format=torch.channels_last)
    projected, project, make_finite = model.projected_weights(denoiser), model.project, model.make_finite
    if c.compile and projected:
        combine = functools.partial(torch.compile, options={"combo_kernels": True})
        project, make_finite = combine(project), combine(make_finite)
    project(projected)
    ema = model.PowerEMA(denoiser, c.ema)
    # EDM2 sums the loss over the D dimensions of an example and takes eps 1e-8. This loss averages over them,
    # so gradients and eps are D times smaller. The tree's official toy averages, too, and takes 1e-8.
    eps = 1e-8 if c.kind == "tree" else 1e-8 / math.prod(c.shape)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=c.lr, betas=(0.9, 0.99), eps=eps, fused=True)
    parts = dict(model=denoiser, ema=ema, optimizer=optimizer)
    if dro_reference:
        dro = parts["dro"] = data.GroupDRO(c.classes, c.eta).to(device)
        counts = class_counts(dataset, keep).to(device)
        reference_loss = model.accelerate(load_matching(dro_reference, c).loss, device, c.bf16, c.compile)
    p, log = dict(step=0, seconds=0.0, examples_trained=0, examples_drawn=0, selecting=True, snapshot=False,
                  other_seconds=costs[0], other_examples=costs[1]), []
    old = None
    if path.exists():
        p, log, old = restore(path, c, parts)
    if c.guide == "snapshot":
        guide_path = out / "guide.pt" if p["snapshot"] else None
    if old and old != model_config(c, guide_path):              # another --guidance, say
        save(path, c, parts, p, log, guide_path)
    guided_targets = bool(guide_path) and c.guided_targets != 1
    objective = make_objective(c, denoiser, load_matching(guide_path, c) if guided_targets else None)
    uniform, jest = make_selectors(c, dataset, denoiser, ema, keep, guide_path)
    began, saved = now(c) - p["seconds"], time.monotonic()
    losses_seen, graphs, not_finite = [], set(), 0

    for step in range(p["step"], c.steps + 1):

        # Evaluate what the steps so far have made, unless the log has it. Until then it is saved already.
        if evaluate and (step == c.steps or c.eval_every and step and step % c.eval_every == 0):
            p["seconds"] = now(c) - began
            if not not_finite and not evaluate.found(log, step, c.guidance if guide_path else 1.0):
                save(path, c, parts, p, log, guide_path)
                log += [dict(p, kind="eval") | record for record in evaluate(denoiser, ema, guide_path, p)]
                save(path, c, parts, p, log, guide_path)
            evaluate.show(log, step)
            began = now(c) - p["seconds"]
        if step == c.steps:
            break

        # A step that compiles its graphs is not timed.
        selecting = bool(jest and p["selecting"] and not 0 < c.early_steps <= step)
        selector, graph = jest if selecting else uniform, (selecting, guided_targets)
        first = c.compile and graph not in graphs
        if first:
            graphs.add(graph)
            p["seconds"] = now(c) - began

        # Draw b examples, or let JEST choose b of a super-batch.
        batch, weight = selector(step)

        # Their weights in the loss: of the selection, and of the classes, given or found so far by group DRO.
        if dro_reference:
            class_weights = dro.weights * counts.sum() / counts.clamp_min(1)
        if class_weights is not None:
            weight = weight * class_weights[batch.labels % c.classes]

        # Gradients, by micro-batches; what is not finite becomes 0.
        if c.dropout:
            torch.manual_seed(data.stream(c.seed, step, f"dropout{RANK or ''}").initial_seed())
        losses = []
        for rows in micro_batches(len(batch.x0), c.micro_batch):
            total, part = objective(*batch.rows(rows), weight[rows])
            (total * (len(part) / len(batch.x0))).backward()
            losses.append(part)
        losses = torch.cat(losses)
        gradients = [parameter.grad for parameter in denoiser.parameters() if parameter.grad is not None]
        average(gradients)
        make_finite(gradients)

        # Step, projection, averages; group DRO learns from the proxy's losses in excess of the reference's.
        optimizer.param_groups[0]["lr"] = learning_rate(c, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        project(projected)
        ema.update(step + 1)
        if dro_reference:
            with torch.no_grad():
                reference = [reference_loss(*batch.rows(rows))[0]
                             for rows in micro_batches(len(batch.x0), c.micro_batch)]
                totals = dro.totals(losses - torch.cat(reference), batch.labels % c.classes)
            average([totals])
            dro.update(WORLD * totals)
        losses_seen.append(losses.mean())
        p["step"], p["examples_trained"] = step + 1, p["examples_trained"] + len(batch.x0) * WORLD
        p["examples_drawn"] += selector.drawn
        if first:
            began = now(c) - p["seconds"]

        # The snapshot: the learner's own EMA becomes the guide.
        if c.guide == "snapshot" and step + 1 == c.guide_steps:
            p["seconds"], p["snapshot"], guide_path = now(c) - began, True, out / "guide.pt"
            save(guide_path, c, dict(model=denoiser, ema=ema), p, log)
            barrier()
            if c.guided_targets != 1:
                guided_targets, objective = True, make_objective(c, denoiser, load_matching(guide_path, c))
            began = now(c) - p["seconds"]

        # Log and save. The early rule: selection ends once the learner beats the reference.
        last = step + 1 == c.steps
        if last or any(every and (step + 1) % every == 0 for every in (c.log_every, c.eval_every)):
            if selecting and c.until_better and (last or (step + 1) % c.log_every == 0):
                excess = jest.mean_excess.clone()
                average([excess])
                p["selecting"] = excess.item() > 0
            average([loss := torch.stack(losses_seen).mean()])
            loss, losses_seen, p["seconds"] = loss.item(), [], now(c) - began
            log.append(dict(p, kind="train", selecting=selecting and p["selecting"], loss=loss,
                            lr=learning_rate(c, step),
                            ln_sigma=batch.sigma.log().mean().item()))
            not_finite = 0 if math.isfinite(loss) else not_finite + 1
            if not_finite == 2 or not_finite and last:
                raise data.DataError(f"{out.name}: the loss is {loss} at step {p['step']}: give a lower --lr "
                                     "or --no-bf16; the last checkpoint is kept")
            if RANK == 0:
                show_progress(out.name, c, p, loss)
            if not not_finite and (last or time.monotonic() - saved >= c.save_every):
                save(path, c, parts, p, log, guide_path)
                saved = time.monotonic()
            began = now(c) - p["seconds"]
    if dro_reference and RANK == 0:
        found = (dro.mean * counts.sum() / counts.clamp_min(1)).tolist()
        with data.writing(out / "class_weights.json") as file:
            reference_costs = cost_of(dro_reference)
            content = dict(weights=dict(zip(c.class_names, found)), seconds=p["seconds"] + reference_costs[0],
                           examples=p["examples_trained"] + reference_costs[1])
            file.write(json.dumps(content, indent=1).encode())
    barrier()


def show_progress(name, c, p, loss):
    """The progress line; the time that is left is that of the steps so far."""
    milliseconds = 1000 * p["seconds"] / p["step"]
    left = round(milliseconds * (c.steps - p["step"]) / 1000)
    memory = f"  {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB" if c.device.startswith("cuda") else ""
    data.progress(f"{name}: step {p['step']}/{c.steps}  loss {loss:.4f}  {milliseconds:.3g} ms/step{memory}  "
                  f"{left // 60}:{left % 60:02d} left", last=p["step"] == c.steps)


# ------------------------------------------------------------------------------------------------------------
# Evaluation: the same noise for every run and step, unguided and guided; metrics by name and a picture.

class Evaluate:
    """evaluate(denoiser, ema, guide_path, p) -> records of the EMA network, one unguided and, with a guide,
    one guided; draws samples.png."""

    def __init__(self, c, dataset, out, held_out=None):
        self.c, self.dataset, self.out, self.held_out = c, dataset, out, held_out
        self.main, self.guide, self.guide_costs = None, None, (0.0, 0)  # of a guide that p does not count
        if c.kind == "tree":
            self.noise = torch.randn(c.eval_samples, 2, generator=data.stream(0, 0, "eval"))
            self.real = guide.heun(dataset.denoise, self.noise[:4096].to(c.device),
                                   steps=c.sampling_steps, sigma_max=c.sigma_max)       # exact end points
            features = "tree"
        elif c.metrics == "none":
            features = "none"
        else:
            self.net = fid.network(c.metrics, c.device)
            self.real, features = fid.data_features(self.net, dataset, "features of the data")[0], self.net.id
            self.moments = fid.moments(self.real)
            fid.warn_of_few(c.eval_samples, "--eval-samples")
        self.how = dict(features=features, data=c.fingerprint[:8], samples=c.eval_samples,
                        sampling_steps=c.sampling_steps)

    def found(self, log, step, guidance):
        """The records of such an evaluation in the log: with these features, samples and Heun steps."""
        wanted = dict(self.how, step=step, kind="eval", guidance=guidance)
        return [record for record in log if wanted.items() <= record.items()]

    def show(self, log, step):
        """Print the metrics of a step, unguided and guided."""
        for w in dict.fromkeys((1.0, self.c.guidance)):
            for record in self.found(log, step, w)[-1:]:
                metrics = {key: value for key, value in record.items() if key not in fid.NOT_METRICS}
                print(f"step {step}, {'unguided' if w == 1 else f'guidance {w:g}'}:  "
                      + "  ".join(f"{key} {value:.4f}" for key, value in metrics.items()), flush=True)

    def __call__(self, denoiser, ema, guide_path, p):
        c, records, pictures = self.c, [], []
        if self.main is None:                                   # compiled once for all evaluations
            self.average = copy.deepcopy(denoiser).eval().requires_grad_(False)
            self.main = model.accelerate(self.average, c.device, c.bf16, c.compile)
        if self.guide is None and guide_path and c.guidance != 1:
            self.guide = model.accelerate(load_matching(guide_path, c), c.device, c.bf16, c.compile)
        ema.copy_to(self.average, c.ema[0])
        for w in [1.0] + [c.guidance] * (self.guide is not None):
            data.progress(f"evaluating, guidance {w:g}")
            x, metrics = self.draw(guide.autoguided(self.main, self.guide, w))
            if w == 1 and c.kind == "tree":
                metrics["score_error"] = fid.score_error(self.main, self.dataset, **c.eval_levels)
            if w == 1 and self.held_out is not None:
                metrics["validation_loss"] = self.validation_loss()
            seconds, examples = self.guide_costs if w != 1 else (0.0, 0)
            records.append(dict(self.how, guidance=w, other_seconds=p["other_seconds"] + seconds,
                                other_examples=p["other_examples"] + examples, **metrics))
            pictures.append(data.density_picture(x) if c.kind == "tree" else
                            data.image_grid(x[:80], min(c.classes or 10, 10)))
        titles = ["unguided samples", f"guided samples, w = {c.guidance:g}"][:len(pictures)]
        if c.kind == "tree":
            pictures, titles = [data.density_picture(self.dataset), *pictures], ["exact density", *titles]
        with data.writing(self.out / "samples.png") as file:
            data.panels(pictures, titles).save(file, format="PNG")
        return records

    def draw(self, denoiser):
        """Samples [n, ...] and their metrics."""
        c, how = self.c, dict(steps=self.c.sampling_steps, sigma_max=self.c.sigma_max)
        if c.kind == "tree":
            x = torch.cat([guide.heun(denoiser, part.to(c.device), **how) for part in self.noise.split(2048)])
            return x.cpu(), fid.tree_metrics(x, self.dataset, self.real)
        labels = data.classes_in_turn(c.class_shares, torch.arange(c.eval_samples)) if c.net_classes else None
        batch = min(c.micro_batch or c.batch, c.eval_samples)
        x = torch.cat([data.decode(x, model_config(c)).cpu() for x in guide.generate(
            denoiser, range(c.eval_samples), labels, batch, c.device, **how)])
        if c.metrics == "none":
            return x, {}
        fake = fid.extract(self.net, x)
        return x, fid.image_metrics(self.real, fake, self.net.id, c.device, self.moments)

    @torch.no_grad()
    def validation_loss(self):
        """Mean denoising loss on held-out examples, at noise that is the same for every run of this batch."""
        c, losses = self.c, []
        batches = data.Batches(self.dataset, c.batch, 0, c.device, flip=c.flip, purpose="validation-",
                               **c.eval_levels)
        for step, index in enumerate(self.held_out.split(c.batch)):
            padded = torch.cat([index, index[:1].expand(c.batch - len(index))])         # one shape
            batch = batches.of(padded, step)
            D_x = torch.cat([self.main(part.x, part.sigma, part.labels) for part in map(
                batch.rows, micro_batches(c.batch, c.micro_batch))])
            losses.append(model.per_example_loss(D_x, batch.x0, batch.sigma)[:len(index)])
        return torch.cat(losses).mean().item()


# ------------------------------------------------------------------------------------------------------------
# The stages of a run: coreset, guide, class weights, the model. One that is trained is `train` in a
# sub-folder: it resumes, is skipped when done, and its checkpoint says what it cost.

def stage(c, dataset, out, keep, **more):
    """Train a small model of the guide's size, without dropout; -> its checkpoint's path. The proxy's seed is
    not its reference's, so that the two are not compared on the draws that the reference was fitted to."""
    seed = c.seed + (2_000_003 if out.name == "proxy" else 1_000_003)
    small = dict(selector="uniform", guide="none", guided_targets=1.0, dropout=0.0, channels=c.guide_channels,
                 batch=c.guide_batch, steps=c.guide_steps, seed=seed)
    train(argparse.Namespace(**{**vars(c), **small}), dataset, out, keep, **more)
    return out / "checkpoint.pt"


def choose_examples(c, dataset, out):
    """-> (the pool of examples that exist, those of it to train on, those held out), sorted indices or None,
    and the seconds that pruning took. --keep draws coreset.png."""
    if c.kind == "tree":
        return None, None, None, 0.0
    order, began = torch.randperm(len(dataset), generator=data.stream(0, 0, "holdout")), time.monotonic()
    held_out, pool = (part.sort().values for part in order.tensor_split([c.holdout]))
    held_out = held_out if c.holdout else None
    if c.imbalance:
        pool = pool[data.long_tail(dataset.labels[pool], c.imbalance, c.seed)]
    if c.keep is None:
        return pool, pool, held_out, 0.0
    feature_seconds = 0.0
    if c.prune == "random":
        features = torch.empty(len(pool), 0)
    elif c.prune_features == "pixels":
        features = data.pixel_features(dataset, pool)
    else:
        net = fid.network(c.prune_features, c.device)
        features, feature_seconds = fid.data_features(net, dataset, "features of the data")
        features, began = features[pool], time.monotonic()      # a cache may have them: their own time counts
    labels = None if dataset.labels is None else dataset.labels[pool]
    priority = data.priorities(features, labels, c.prune, seed=c.seed)
    keep = data.prune(priority, labels, c.keep)
    seconds = feature_seconds + time.monotonic() - began
    if RANK == 0:
        with data.writing(out / "coreset.png") as file:
            data.coreset_picture(dataset, pool, priority, keep).save(file, format="PNG")
    return pool, pool[keep], held_out, seconds


def class_counts(dataset, keep=slice(None)):
    """How many examples of each class there are, of those to keep: float32 [classes]."""
    return torch.bincount(dataset.labels[keep], minlength=dataset.classes).float()


def read_class_weights(c, path, counts):
    """-> weights [classes] of mean 1 over the examples, from a class_weights.json or inverse to frequency."""
    seconds, examples = 0.0, 0
    if path == "inverse":
        weights = 1 / counts.clamp_min(1)
    else:
        with data.reading(path, "class weights for these classes"):
            content = json.loads(Path(path).read_text())
            named = dict(content["weights"])
            weights = torch.tensor([float(named.pop(name)) for name in c.class_names])
            seconds, examples = float(content.get("seconds", 0)), int(content.get("examples", 0))
            if named or not 0 <= weights.min() <= weights.max() < math.inf or not (weights * counts).sum():
                raise ValueError("there are others, or they are negative, not finite or all 0")
    return (weights * counts.sum() / (weights * counts).sum()).to(c.device), (seconds, examples)


@contextlib.contextmanager
def alone(out):
    """Hold the run folder while the block runs; DataError where another process trains in it."""
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)                          # locked until it is closed, by a kill, too
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise data.DataError(f"{out}: another process trains in this folder") from None
    finally:
        os.close(folder)


def main(argv=None):
    """All stages: coreset, guide, class weights, the model and its evaluation."""
    args = build_parser().parse_args(argv)
    join(args.device)
    if RANK > 0:
        barrier()                                               # process 0 fills the caches
    c, dataset = settings(argv)
    if c.kind == "tree" and c.device == "cpu":
        torch.set_num_threads(1)                                # its matrices are too small for two
    out = Path(c.out)
    with alone(out) if RANK == 0 else contextlib.nullcontext():
        pool, keep, held_out, seconds = choose_examples(c, dataset, out)
        evaluate = Evaluate(c, dataset, out, held_out) if c.eval_samples and RANK == 0 else None
        if RANK == 0:
            barrier()

        # Files that are given, before anything is trained.
        guide_path, weights, needs, weight_costs = None, None, set(), (0.0, 0)
        if c.guide not in ("train", "snapshot", "none"):
            guide_path = Path(model.checkpoint_of(c.guide))
            load_matching(guide_path, c)
        if c.reference:
            needs.add(reference := Path(model.checkpoint_of(c.reference)))
            load_matching(reference, c)
        if c.class_weights not in (None, "dro"):
            weights, weight_costs = read_class_weights(c, c.class_weights, class_counts(dataset, keep))
        if RANK == 0:
            with data.writing(out / "config.json") as file:
                file.write(json.dumps(vars(c), indent=1).encode())
            print(f"{out}: {c.channels} channels, {c.steps:,} steps of {c.batch}, {c.selector} batches, "
                  f"guide {c.guide}, {c.eval_samples:,} samples scored", file=sys.stderr)

        # The guide; with DRO it is also the reference, and then sees the whole pool. A proxy finds the class
        # weights against it.
        if c.guide == "train":
            guide_path = stage(c, dataset, out / "guide", pool if c.class_weights == "dro" else keep)
        chosen_by = c.selector == "ajest" and c.compares
        if guide_path and (chosen_by or c.class_weights == "dro" or c.guided_targets != 1):
            needs.add(guide_path)                               # else only guided samples need it
        if c.class_weights == "dro":
            proxy = stage(c, dataset, out / "proxy", keep, dro_reference=guide_path)
            needs.add(proxy)
            path = proxy.with_name("class_weights.json")
            weights, _ = read_class_weights(c, path, class_counts(dataset, keep))     # needs has their cost

        # The model. What it needed counts, and a guide that it did not need counts for guided samples.
        costs = [sum(cost) for cost in zip((seconds, 0), weight_costs, *map(cost_of, needs))]
        if evaluate and guide_path and guide_path not in needs:
            evaluate.guide_costs = cost_of(guide_path)
        train(c, dataset, out, keep, guide_path, weights, evaluate=evaluate, costs=costs)
        if RANK == 0:
            print(f"wrote {out}/: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if WORLD > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    data.command(main)
