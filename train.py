"""Train a diffusion model while choosing its data: online (JEST, AJEST) or offline (coreset, class weights).

    python train.py --selector ajest --early-steps 5000           the 2-D tree, minutes on a CPU
    python train.py --data photos/ --size 64                      images, labelled by folder or not
    python train.py --data photos/ --size 64 --keep 0.1           the most typical tenth of each class only

One run is one folder; the same command again resumes it. Defaults that the help does not show depend on the
data: see PRESETS in train.py, and config.json in the run folder. The papers: "Autoguided Online Data
Curation for Diffusion Model Training" (arXiv 2509.15267) and "Pruning then Reweighting: Towards
Data-Efficient Training of Diffusion Models" (arXiv 2409.19128).
"""
import argparse
import contextlib
import copy
import datetime
import functools
import hashlib
import importlib.util
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch

import data
import fid
import model

try:
    import fcntl
except ImportError:                                             # Windows has no fcntl: see `locked`
    fcntl = None

# select.py shares its name with a standard-library module, so it is loaded by path under another name.
# torch.compile finds it by that name.
_spec = importlib.util.spec_from_file_location("batch_select", Path(__file__).with_name("select.py"))
select = importlib.util.module_from_spec(_spec)
sys.modules["batch_select"] = select
_spec.loader.exec_module(select)


# ------------------------------------------------------------------------------------------------------------
# Several processes (torchrun): each works on its rows of the draw that (seed, step) defines, and process 0
# writes and evaluates. With one process these functions do nothing.

RANK = 0                                        # number of this process; `read_processes` sets both
WORLD = 1                                       # number of processes


def read_processes():
    """Set RANK and WORLD from torchrun's variables, where empty is unset. DataError if they do not fit."""
    global RANK, WORLD
    with data.reading("RANK and WORLD_SIZE", "those of torchrun: unset them"):
        RANK = int(os.environ.get("RANK") or 0)
        WORLD = int(os.environ.get("WORLD_SIZE") or 1)
        needed = ["WORLD_SIZE"] if os.environ.get("RANK") else []
        if WORLD > 1:
            needed = ["RANK", "MASTER_ADDR", "MASTER_PORT"]
        missing = [name for name in needed if not os.environ.get(name)]
        if missing or not 0 <= RANK < WORLD:
            raise ValueError(f"process {RANK} of {WORLD}, missing: {missing}")


def join(device):
    """Take part in the group of processes."""
    if WORLD > 1:
        timeout = datetime.timedelta(days=1)                    # process 0 evaluates alone
        torch.distributed.init_process_group("nccl" if "cuda" in device else "gloo", timeout=timeout)


def barrier():
    """Wait for the other processes. They can then read what process 0 has written before."""
    if WORLD > 1:
        torch.distributed.barrier()


def average(tensors):
    """Average a list of tensors over the processes, in place and in one message; -> the list."""
    if WORLD > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        means = (flat / WORLD).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [mean.view_as(tensor) for mean, tensor in zip(means, tensors)])
    return tensors


def process_stream(c, step, name, device="cpu"):
    """The random stream of (seed, step, name) for this process; each process has its own."""
    return data.stream(c.seed, step, name if RANK == 0 else f"{name}{RANK}", device)


# ------------------------------------------------------------------------------------------------------------
# Presets, chosen by the data, for what no flag sets: COMMON with the kind's own values over it, and CPU over
# those of images and latents without a GPU. The tree follows the toy of 2406.02507. Noise levels and dropout
# of images and latents are those of EDM and EDM2; learning rate (theirs: 0.017 for 64 channels) and warm-up
# (theirs: 10 million images) are not.

COMMON = dict(
    channels=64, blocks=3, batch=256, steps=20_000, lr_decay=4000, warmup=200, dropout=0.0, ema=[0.05, 0.10],
    targets="sample", flip=True, sampling_steps=32, sigma_max=80.0, eval_samples=10_000, log_every=50)
PRESETS = {
    "tree": dict(
        batch=816, steps=8_000, lr_decay=512, warmup=0, ema=[0.02, 0.10], P_mean=-2.3, P_std=1.5,
        targets="exact", flip=False, sigma_max=5.0, guidance=3.0, guide_channels=32, guide_batch=4096,
        eval_samples=163_840, log_every=100),
    "32": dict(batch=512, lr_decay=2000, dropout=0.13, P_mean=-1.2, P_std=1.2, guidance=1.6),
    "64": dict(P_mean=-0.8, P_std=1.6, guidance=1.8),
    "latent": dict(channels=128, flip=False, P_mean=-0.4, P_std=1.0, guidance=1.8)}
CPU = dict(
    channels=24, blocks=1, batch=64, steps=1000, lr_decay=400, warmup=50, dropout=0.0, sampling_steps=16,
    eval_samples=256, log_every=5)

MACHINE = {"data", "out", "device", "bf16", "compile", "micro_batch"}   # never taken over from a checkpoint


def build_parser():
    """The parser of all flags, in groups by purpose."""
    parser = data.parser(__doc__, "[--data DATA] [flags]")
    whole = data.number(int, "[0, inf)")
    count = data.number(int, "[1, inf)")
    amount = data.number(float, "[0, inf)")
    positive = data.number(float, "(0, inf)")
    share = data.number(float, "[0, 1)")
    from_one = data.number(float, "[1, inf)")
    on_off = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data and run").add_argument
    add("--data", type=data.path, help="folder or zip of images, or an .npz (default: the 2-D tree)")
    add("--out", type=data.path, help="run folder (default: runs/DATA-SELECTOR)")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=data.device, default=best, help="cpu, cuda or cuda:N")
    add("--seed", type=data.number(int, "[0, 1e15]"), default=0, help="of weights, data, noise and selection")
    add("--size", type=data.number(int, "[8, 4096]"), help="crop and resize images to a multiple of 8 pixels")
    add("--flip", action=on_off, help="mirror half of the images, as classes of their own")
    add("--holdout", type=whole, default=0, help="examples held out for the validation loss")
    add("--imbalance", type=from_one, help="long-tailed classes: examples of the largest over the smallest")
    add("--log-every", type=count, help="steps between log lines")
    add("--save-every", type=amount, default=60.0, help="seconds between checkpoints, at log lines")
    add("--bf16", action=on_off, help="bf16 autocast (default: for images on a GPU)")
    add("--compile", action=on_off, help="torch.compile (default: on a GPU)")

    add = parser.add_argument_group("model and optimization").add_argument
    add("--channels", type=count, help="width of the network")
    add("--blocks", type=count, help="residual blocks on each level of the UNet")
    add("--batch", type=count, help="examples trained on per step, whatever the selector")
    add("--micro-batch", type=count, help="compute a batch in parts of this size, to save memory")
    add("--steps", type=count, help="optimizer steps")
    add("--lr", type=positive, default=0.01, help="Adam's learning rate")
    add("--lr-decay", type=count, help="steps after which the learning rate falls as 1/sqrt(step)")
    add("--warmup", type=whole, help="steps of linear warm-up, 0 = off")
    add("--dropout", type=share, help="dropout inside the residual blocks")
    add("--ema", type=data.number(float, "(0, 0.28)"), nargs="+", help="EMA lengths, the first is sampled")
    add("--targets", choices=("sample", "exact"), help="exact = the mean of all clean examples, on the tree")
    add("--P-mean", type=data.number(float, "(-inf, inf)"), help="mean of ln sigma in training")
    add("--P-std", type=positive, help="standard deviation of ln sigma in training")

    add = parser.add_argument_group("online selection (2509.15267)").add_argument
    add("--selector", choices=("uniform", "jest", "ajest"), default="uniform", help="at random, or of a "
        "super-batch what the --guide (ajest) or --reference (jest) does better")
    add("--early-steps", type=whole, default=0, help="select during the first N steps only, 0 = throughout")
    add("--until-better", action="store_true", help="select until the learner is better than the reference")
    add("--after", choices=("uniform", "full"), default="uniform", help="batches after early selection")
    add("--filter", type=share, default=0.8, help="share of the super-batch that is left out")
    add("--score", choices=select.SCORES, default="learnability", help="see select.example_scores")
    add("--joint", choices=select.FACTORS, help="see select.FACTORS (default: mean, of jest independent)")
    add("--gain", type=amount, default=0.0, help="standardize the scores and multiply them, 0 = raw scores")
    add("--chunks", type=count, default=16, help="JEST fills the batch in this many chunks")
    add("--invert", action="store_true", help="prefer low scores")
    add("--debias", action="store_true", help="draw the batch at once, weighted by 1 / inclusion probability")
    add("--reference", type=data.file_or(), help="checkpoint for jest (default: the learner's own average)")

    add = parser.add_argument_group("guide, sampling and evaluation (2406.02507)").add_argument
    add("--guide", type=data.file_or("train", "snapshot", "none"), help="a run or checkpoint; none; train = "
        "a smaller model first (default of ajest and dro); snapshot = its own average at --guide-steps")
    add("--guide-channels", type=count, help="width of a trained guide (default: half of --channels)")
    add("--guide-batch", type=count, help="batch of a trained guide (default: --batch; tree: 4096)")
    add("--guide-steps", type=count, help="steps of a trained guide, or the step of the snapshot")
    add("--guided-targets", type=from_one, default=1.0, help="train towards guidance of this weight, 1 = off")
    add("--guidance", type=amount, help="weight of the guide in samples, 1 = off")
    add("--sampling-steps", type=count, help="steps of the Heun sampler")
    add("--sigma-max", type=data.number(float, "(0.002, inf)"), help="noise level at which sampling begins")
    add("--eval-every", type=count, help="steps between evaluations (default: at the end only)")
    add("--eval-samples", type=whole, help="samples scored, 0 = no evaluation")
    add("--metrics", type=fid.features_name, default="pixels", help="features that score images: pixels = "
        "8x8 averages; inception (FID); own:CKPT = a classifier made by fid.py --fit CKPT; none")

    add = parser.add_argument_group("coreset and class weights (2409.19128)").add_argument
    add("--keep", type=data.number(float, "(0, 1]"), help="fraction of each class to train on")
    add("--prune", choices=data.PRUNING, default="gaussian", help="which are kept: see data.priorities")
    add("--prune-features", type=fid.features_name, default="pixels", help="what pruning sees, as --metrics")
    add("--class-weights", type=data.file_or("dro", "inverse"), help="in the loss: dro = found by group DRO "
        "against the guide; inverse = inverse frequency; or the class_weights.json of a run with dro")
    add("--eta", type=positive, default=1.0, help="step size of group DRO")
    return parser


def parse(argv=None):
    """-> ({setting: default} of all flags, {setting: value} of those that were typed)."""
    parser = build_parser()
    defaults = vars(parser.parse_args([]))
    nothing = argparse.Namespace(**dict.fromkeys(defaults))     # argparse sets no default over these
    values = vars(parser.parse_args(argv, nothing))
    return defaults, {name: value for name, value in values.items() if value is not None}


# ------------------------------------------------------------------------------------------------------------
# The settings of a run: flags, preset, what follows from these, and facts about the data, all plain values in
# one namespace, which every checkpoint holds. What was not typed comes from the checkpoint.

def settings(argv=None):
    """-> (c, the settings; the data set). Says what was loaded before it refuses anything."""
    read_processes()
    defaults, typed = parse(argv)
    c = argparse.Namespace(**(defaults | typed))
    if c.out is None:
        name = "tree" if c.data is None else Path(c.data).resolve().name.split(".")[0]
        c.out = f"runs/{name}-{c.selector}"
    fresh = copy.copy(c)                                        # what a new run would be
    join(c.device)
    if RANK > 0:
        barrier()                                               # until process 0 has filled the caches
    path = Path(c.out, "checkpoint.pt")
    checkpoint = load_run(path) if path.exists() else dict(model_config={})
    saved = checkpoint["model_config"]
    for name in defaults:
        if name in saved and name not in typed and name not in MACHINE:
            setattr(c, name, saved[name])
    dataset = data.load(c.data, c.size).to(c.device) if c.data else data.Tree(c.device)
    if RANK == 0:
        data.say("\n".join(dataset.report))
    for values in c, fresh:
        add_facts_of_data(values, dataset)
        add_preset(values)
    refuse(c, typed, dataset)
    c.files = contents_of_files(c)
    if saved:
        refuse_other_run(c, checkpoint)
    taken = [shown(vars(c), name) for name in defaults if vars(c)[name] != vars(fresh)[name]]
    if taken and RANK == 0:
        data.say(f"{path}: not typed, taken from there: {' '.join(taken)}")
    return c, dataset


def add_facts_of_data(c, dataset):
    """Add what the network and the checkpoint must know about the data."""
    names = list(dataset.class_names)
    shares = (data.class_counts(dataset).double() / len(dataset)).tolist() if names else [1.0]
    vars(c).update(
        format=model.FORMAT, kind=dataset.kind, shape=list(dataset.shape), fingerprint=dataset.fingerprint,
        class_names=names, class_shares=shares, mean=list(dataset.mean), std=list(dataset.std),
        guide_path=None)


def add_preset(c):
    """Set what is not set yet, by the kind of data, by the device and from other settings."""
    cuda = c.device.startswith("cuda")
    kind = c.kind
    if kind == "image":
        kind = "32" if c.shape[-1] <= 32 else "64"
    preset = COMMON | PRESETS[kind]
    if kind != "tree" and not cuda:
        preset |= CPU
    if c.guide is None:
        c.guide = "train" if c.selector == "ajest" or c.class_weights == "dro" else "snapshot"
    if c.guidance is None and (c.guide == "none" or c.guided_targets != 1):
        c.guidance = 1.0                                        # the network is its own guided denoiser
    fill(c, preset)
    eighth = math.ceil(c.steps / 8)
    if kind == "tree":
        eighth = min(512, eighth) if c.guide == "snapshot" else 1024
    has_compiler = importlib.util.find_spec("triton") is not None and shutil.which("cc") is not None
    fill(c, dict(
        bf16=kind != "tree" and cuda and torch.cuda.is_bf16_supported(including_emulation=False),
        compile=cuda and has_compiler, joint="mean" if c.selector == "ajest" else "independent",
        guide_steps=eighth, guide_channels=math.ceil(c.channels / 2), guide_batch=c.batch))
    c.super_batch = round(c.batch / (1 - c.filter))             # B = b / (1 - filter ratio)

    # Labels that the network knows: mirrored images are classes of their own.
    c.classes = 2 * max(len(c.class_names), 1) if c.flip else len(c.class_names)

    # Evaluations take the preset's noise levels, so that runs with another --P-mean compare.
    c.eval_levels = dict(P_mean=preset["P_mean"], P_std=preset["P_std"])


def fill(c, values):
    """Set those of the values that are not set."""
    for name, value in values.items():
        if getattr(c, name, None) is None:
            setattr(c, name, value)


def guide_is_needed_to_train(c):
    """Whether the guide takes part in training, not only in sampling."""
    return (c.selector == "ajest" and needs_reference(c)) or c.class_weights == "dro" or c.guided_targets != 1


def guide_is_needed(c):
    """Whether the guide takes part in training or in sampling."""
    return guide_is_needed_to_train(c) or c.guidance != 1


def needs_reference(c):
    """Whether the selector compares the learner with a reference."""
    return c.until_better or c.score in ("learnability", "easy")


def is_file(value):
    """Whether the value of a setting in data.FILES is a file, not a word."""
    return value is not None and os.path.isabs(value.removeprefix("own:"))


def contents_of_files(c):
    """{setting: SHA-256 of its file, or the word that stands there}. A file may move before a run resumes,
    but not change; a guide that is not needed may be missing."""
    contents = {name: getattr(c, name) for name in data.FILES}
    for name, value in contents.items():
        if is_file(value):
            path = model.checkpoint_of(value.removeprefix("own:"))
            if os.path.exists(path) or name != "guide" or guide_is_needed(c):
                contents[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return contents


def refuse(c, typed, dataset):
    """DataError for settings that contradict each other or would train something else than was meant."""
    tree = c.kind == "tree"
    jest = c.selector != "uniform"
    from_start = c.selector == "ajest" or c.class_weights == "dro"
    networks = {c.metrics, c.prune_features}
    fewest = max(2, len(c.class_names))
    needs = [                                                   # flags, what they need, whether it is there
        ("early_steps until_better after filter score joint gain chunks invert debias",
         "--selector jest or ajest", jest),
        ("size holdout imbalance keep class_weights metrics", "--data", not tree),
        ("flip", "images", c.kind == "image" or not c.flip),
        ("class_weights imbalance", "labels, which the data does not have", c.class_names),
        ("targets", "to be sample: exact ones are known for the tree only", tree or c.targets == "sample"),
        ("metrics prune_features", "images, or pixels", c.kind != "latent" or networks <= {"pixels", "none"}),
        ("holdout", "more examples than that", tree or c.holdout < len(dataset)),
        ("eval_samples", "2 or more, and one for each class", c.eval_samples not in range(1, fewest)),
        ("after", "--early-steps or --until-better", c.early_steps or c.until_better),
        ("chunks", "a draw in chunks, not --debias", not c.debias),
        ("reference", "--selector jest; the reference of ajest is the --guide", c.selector == "jest"),
        ("prune prune_features", "--keep", c.keep is not None),
        ("eta", "--class-weights dro", c.class_weights == "dro"),
        ("guidance guided_targets", "a --guide", c.guide != "none" or c.guidance == c.guided_targets == 1),
        ("guide", "a checkpoint or train", c.guide not in ("none", "snapshot") or not from_start),
        ("guide_steps", "at least as many --steps", c.guide != "snapshot" or c.guide_steps <= c.steps)]
    for names, what, is_there in needs:
        for name in names.split():
            if name in typed and not is_there:
                raise data.DataError(f"--{name.replace('_', '-')} needs {what}")
    if not tree and (c.shape[1] != c.shape[2] or c.shape[1] % 8):
        raise data.DataError(f"{c.data}: {c.kind}s of {c.shape} are no squares of a multiple of 8 (--size)")
    divisor = (c.micro_batch or 1) * WORLD
    sizes = [c.batch, c.super_batch if jest else c.batch]
    if any(n % divisor for n in sizes) or c.guide_batch % WORLD:
        raise data.DataError(f"--batch, super-batch {sizes} and --guide-batch {c.guide_batch} must be "
                             f"multiples of --micro-batch times processes, {divisor}")
    if is_file(c.class_weights):                                # before anything is trained
        data.read_class_weights(c.class_weights, c.class_names)


def refuse_other_run(c, checkpoint):
    """DataError where the checkpoint in c.out has other settings, other data, other files or more steps."""
    saved = checkpoint["model_config"]
    steps_done = checkpoint["progress"]["step"]
    advice = "give another --out, or delete the folder"
    if saved["fingerprint"] != c.fingerprint:
        raise data.DataError(f"{c.out} holds a run on other data: {advice}")
    compared = set(saved) - data.MAY_DIFFER | set(data.FILES)
    if c.until_better:
        compared.add("log_every")                               # log lines look who is better
    if not guide_is_needed(c):
        compared.remove("guide")
    before = saved | saved["files"]
    now = vars(c) | c.files
    for name in now:                                            # flags before what follows from them
        if name in compared and before[name] != now[name]:
            raise data.DataError(f"{c.out} holds a run with {shown(saved, name)}, not "
                                 f"{shown(vars(c), name)}: {advice}")
    if c.steps < steps_done:
        raise data.DataError(f"--steps {c.steps}: the run in {c.out} has done {steps_done}")


def shown(settings, name):
    """A setting as people type it; a file with the first digits of its hash."""
    value = settings[name]
    if name in data.FILES and is_file(value):
        value = f"{value} ({settings['files'][name][:8]})"
    flag = name.replace("_", "-")
    return f"no --{flag}" if value is None else f"--{flag} {value}"


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: state_dicts and plain values, written by process 0. They hold the log, which log.jsonl repeats
# for people, and the settings, so that a checkpoint knows which run it belongs to.

def new_progress(costs):
    """What a run has done so far, plain values for its checkpoint and its log.

    seconds         of training
    examples_drawn  trained on, or only scored
    ahead           True once --until-better has ended the selection
    other_...       the sums of `costs`, a list of (seconds, examples): pruning, guide, proxy, reference
    """
    return dict(step=0, seconds=0.0, examples_trained=0, examples_drawn=0, ahead=False,
                other_seconds=sum(seconds for seconds, _ in costs), other_examples=sum(n for _, n in costs))


def save(c, state, progress, log, path):
    """Write a checkpoint of `state`, {name: object with a state_dict}, and its log beside it."""
    if RANK > 0:
        return
    content = {name: holder.state_dict() for name, holder in state.items()}
    content |= dict(model_config=vars(c), progress=progress, log=log)
    lines = [json.dumps(record) + "\n" for record in log]
    with data.writing(path.with_name("log.jsonl")) as file:
        file.write("".join(lines).encode())
    with data.writing(path) as file:
        torch.save(content, file)


def load_run(path, device="cpu"):
    """The checkpoint at `path` of a run of this program. DataError if it is none."""
    with data.reading(path, "a checkpoint of this program (give another --out, or delete it)"):
        checkpoint = model.load_checkpoint(path, device)
        model.check_format(checkpoint["model_config"])
        return checkpoint


def restore(path, c, state, costs):
    """Fill `state` from the checkpoint at `path`, if there is one; -> (progress, log, settings when saved).
    DataError if it is of another run."""
    if not path.exists():
        return new_progress(costs), [], vars(c)
    checkpoint = load_run(path, c.device)
    refuse_other_run(c, checkpoint)
    with data.reading(path, "a checkpoint of this run"):
        for name, holder in state.items():
            holder.load_state_dict(checkpoint[name])
        return dict(checkpoint["progress"]), list(checkpoint["log"]), checkpoint["model_config"]


def load_matching(path, c):
    """The trained denoiser at `path`; DataError unless it is for the same data as this run."""
    with data.reading(path, "a denoiser for this data"):
        return model.load_denoiser(path, None, c.device, like=vars(c))


def cost_of(path):
    """-> (seconds, examples) of training the checkpoint at `path` and everything that it needed in turn."""
    done = load_run(path)["progress"]
    return done["seconds"] + done["other_seconds"], done["examples_trained"] + done["other_examples"]


# ------------------------------------------------------------------------------------------------------------
# The objective: EDM's loss, weighted by EDM2's learned uncertainty u(sigma) as loss / e^u + u. With guided
# targets the target moves by 1 - 1/W of D - D_guide. At the fixed point D = D_guide + W (target - D_guide):
# the network itself is the ideal denoiser, autoguided. Before the snapshot is taken targets are not guided.

def make_objective(c, denoiser, guide=None):
    """The function to train on. Its targets are guided where there is a guide and a weight for it."""
    is_guided = guide is not None and c.guided_targets != 1

    def objective(x0, noise, sigma, labels, target, weight):
        """-> (weighted mean, losses [b]) of the tensors of a data.Batch and weights [b]."""
        losses, D_x = denoiser.loss(x0, noise, sigma, labels, target)
        D = D_x.detach()                                        # no gradient through a target
        network_term = losses
        if is_guided:
            with torch.no_grad():
                D_guide = guide(x0 + model.per_example(sigma, x0) * noise, sigma, labels)
            guided_target = target + (1 - 1 / c.guided_targets) * (D - D_guide)
            network_term = model.per_example_loss(D_x, guided_target, sigma)
        if c.kind == "tree":
            return (weight * network_term).mean(), losses.detach()

        # loss / e^u + u, as loss(D; target) / e^sg(u) + (loss(sg(D); x0) / e^u + u): u learns from the loss
        # against x0, so that no target moves the weighting of the noise levels.
        u = denoiser.u(sigma)
        network_term = network_term / u.detach().exp()
        uncertainty_term = model.per_example_loss(D, x0, sigma) / u.exp() + u
        return (weight * (network_term + uncertainty_term)).mean(), losses.detach()
    return model.accelerate(objective, c.device, c.bf16, c.compile)


def backward(objective, batch, weight, micro_batch=None):
    """Add the gradients of the weighted mean loss of a data.Batch, in micro-batches; -> losses [b]."""
    losses = []
    for rows in data.micro_batches(len(batch.x0), micro_batch):
        mean, micro_losses = objective(*batch.rows(rows), weight[rows])
        (mean * (len(micro_losses) / len(batch.x0))).backward()
        losses.append(micro_losses)
    return torch.cat(losses)


def make_losses(c, network):
    """A function of a data.Batch that returns the network's losses, without gradient or dropout."""
    loss = model.accelerate(lambda *tensors: network.loss(*tensors)[0], c.device, c.bf16, c.compile)

    @torch.no_grad()
    def losses(batch):
        """The losses [n], computed in micro-batches."""
        training = network.training
        network.eval()
        slices = data.micro_batches(len(batch.x0), c.micro_batch)
        values = torch.cat([loss(*batch.rows(rows)) for rows in slices])
        network.train(training)
        return values
    return losses


def frozen_copy(denoiser):
    """A copy in evaluation mode that takes no gradients."""
    return copy.deepcopy(denoiser).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------
# The selectors: uniform batches of b, and JEST on super-batches of B. AJEST's reference is the guide.

def make_selectors(c, dataset, denoiser, ema, examples, guide):
    """-> (data.Batches for steps that do not select; select.Jest for steps that do, None if none does)."""
    make_batches = functools.partial(
        data.Batches, dataset, seed=c.seed, device=c.device, examples=examples, flip=c.flip, P_mean=c.P_mean,
        P_std=c.P_std, targets=c.targets, rows=slice(RANK, None, WORLD))
    batches = make_batches(n=c.batch)
    if c.selector == "uniform":
        return batches, None
    super_batches = make_batches(n=c.super_batch)

    reference = guide
    if c.reference:
        reference = load_matching(c.reference, c)
    elif c.selector == "jest":
        reference = frozen_copy(denoiser)
        for parameter, mean in zip(reference.parameters(), ema.averages[c.ema[0]]):
            parameter.data = mean                               # shares storage with the average
    reference_loss = make_losses(c, reference) if needs_reference(c) else None
    uncertainty = torch.no_grad()(denoiser.u) if c.kind != "tree" and c.score == "root-loss" else None
    jest = select.Jest(
        super_batches, make_losses(c, denoiser), reference_loss, c.batch // WORLD,
        lambda step: process_stream(c, step, "select", c.device), chunks=c.chunks, joint=c.joint,
        debias=c.debias, uncertainty=uncertainty, score=c.score, invert=c.invert, gain=c.gain)
    return super_batches if c.after == "full" else batches, jest


# ------------------------------------------------------------------------------------------------------------
# What a training step updates: the network and its averages.

def learning_rate(c, step):
    """Inverse square root after `lr_decay` steps, after a linear warm-up (EDM2 eq. 67)."""
    warmup = min(1, (step + 1) / (c.warmup + 1))
    return c.lr / math.sqrt(max(step / c.lr_decay, 1)) * warmup


class Learner:
    """The network that is trained, its optimizer and its averages."""

    def __init__(self, c):
        self.c = c
        torch.manual_seed(data.stream(c.seed, 0, "init").initial_seed())
        self.denoiser = model.build(vars(c)).to(c.device).to(memory_format=torch.channels_last)
        self.parameters = list(self.denoiser.parameters())

        # EDM2 projects its weights to unit norm after each step. Compiled, this takes few launches on a GPU.
        self.project = model.project
        self.make_finite = model.make_finite
        self.projected_weights = model.projected_weights(self.denoiser)
        if c.compile and self.projected_weights:
            options = {"combo_kernels": True}
            self.project = torch.compile(model.project, options=options)
            self.make_finite = torch.compile(model.make_finite, options=options)
        self.project(self.projected_weights)
        self.ema = model.PowerEMA(self.denoiser, c.ema)
        self.average_network = frozen_copy(self.denoiser)       # one object, which is compiled once

        # EDM2 sums the loss over the D dimensions of an example, with eps 1e-8. This loss averages over them,
        # so its gradients are D times smaller, and so is eps. The tree's official toy averages, with 1e-8.
        dimensions = 1 if c.kind == "tree" else math.prod(c.shape)
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=c.lr, betas=(0.9, 0.99), eps=1e-8 / dimensions, fused=True)

    def averaged(self):
        """The network with its averaged weights; the same object each time."""
        self.ema.copy_to(self.average_network, self.c.ema[0])
        return self.average_network

    def update(self, step):
        """Take one optimizer step with the accumulated gradients. Entries that are not finite become 0."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        average(gradients)
        self.make_finite(gradients)
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.c, step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.project(self.projected_weights)
        self.ema.update(step + 1)


# ------------------------------------------------------------------------------------------------------------
# Time and log lines.

class Stopwatch:
    """Keeps progress["seconds"], those of training. Reading it waits for the device, so it is read at log
    lines only."""

    def __init__(self, progress):
        self.progress = progress
        self.start = time.monotonic() - progress["seconds"]

    def read(self):
        """The seconds, after the device has finished its work."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.monotonic() - self.start

    @contextlib.contextmanager
    def paused(self):
        """Leave out what happens inside: evaluating, logging, saving, compiling."""
        seconds = self.read()
        self.progress["seconds"] = seconds
        yield
        self.start += self.read() - seconds


def due(step, every, last=None):
    """Whether something that happens every so many steps (None: never), and after the last, happens now."""
    return step == last or (every is not None and step > 0 and step % every == 0)


def log_line(c, progress, log, losses, batch, jest=None):
    """Add a record to the log, and show it as the progress line: the `losses`, tensors [], of the steps since
    the last one, and the last data.Batch; `jest` is None if it chose nothing. A loss that is not finite does
    not count. DataError if there is no other."""
    step = progress["step"]
    before = log[-1] if log else new_progress([])
    losses = torch.stack(losses)
    loss = average([losses.where(losses.isfinite(), math.nan).nanmean()])[0].item()
    if math.isnan(loss):
        raise data.DataError(f"{c.out}: no finite loss from step {before['step']} to {step}: --no-bf16 may "
                             "help, or a lower --lr with another --out")
    ln_sigma = batch.sigma.log().mean().item()
    record = dict(progress, kind="train", loss=loss, lr=learning_rate(c, step - 1), ln_sigma=ln_sigma)
    milliseconds = 1000 * (progress["seconds"] - before["seconds"]) / (step - before["step"])
    words = f"{Path(c.out).name}: step {step}/{c.steps}  loss {loss:.4f}  {milliseconds:.3g} ms/step"
    end = c.steps
    if jest is not None:
        statistics = average([jest.statistics()])[0].tolist()
        record |= zip(("score_mean", "score_std", "score_chosen", "excess"), statistics)
        words += f"  chosen {record['score_chosen'] - record['score_mean']:+.3g}"
        end = c.early_steps or c.steps
    log.append(record)
    if c.device.startswith("cuda"):
        words += f"  {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB"
    left = round(milliseconds * (end - step) / 1000)
    words += f"  {left // 60}:{left % 60:02d} left"
    if end < c.steps:
        words += " of the selection"
    if RANK == 0:
        data.progress(words, last=step == c.steps)


# ------------------------------------------------------------------------------------------------------------
# Training.

def train(c, dataset, folder, examples=None, guide_path=None, class_weights=None, dro_reference=None,
          evaluation=None, costs=()):
    """Train until c.steps are done, from the checkpoint in `folder` if it has one; writes it and log.jsonl.

    examples        sorted indices to train on; None = all
    guide_path      the guide's checkpoint; None = there is none, or it is the snapshot
    class_weights   of the loss [classes]; None = 1
    dro_reference   checkpoint: find class weights by group DRO against it, and return them, not normalized
    evaluation      fid.Evaluation: called every c.eval_every steps and at the end
    costs           (seconds, examples) of each thing that this run needs
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.pt"
    learner = Learner(c)
    denoiser, ema = learner.denoiser, learner.ema
    state = dict(model=denoiser, ema=ema, optimizer=learner.optimizer)
    if dro_reference is not None:
        dro = data.GroupDRO(len(c.class_names), c.eta).to(c.device)
        counts = data.class_counts(dataset, examples).to(c.device).clamp(min=1)
        reference_loss = make_losses(c, load_matching(dro_reference, c))
        state["dro"] = dro

    # Resume where the folder holds a checkpoint.
    progress, log, saved = restore(path, c, state, costs)
    if path.exists():
        what = "trained before" if progress["step"] == c.steps else "resumed"
        data.say(f"{folder.name}: {what} at step {progress['step']:,}")
    if c.guide == "snapshot" and progress["step"] >= c.guide_steps:
        guide_path = folder / "guide.pt"
    guide = None                                                # until there is one
    if guide_path is not None:
        c.guide_path = os.path.relpath(os.path.realpath(guide_path), os.path.realpath(c.out))
        if guide_is_needed(c):
            guide = load_matching(guide_path, c)
    save_to = functools.partial(save, c, state, progress, log)
    if (saved["guidance"], saved["guide_path"]) != (c.guidance, c.guide_path):
        save_to(path)                                           # sample.py reads them

    # Objective, selectors, clock.
    objective = make_objective(c, denoiser, guide)
    uniform, jest = make_selectors(c, dataset, denoiser, ema, examples, guide)
    clock = Stopwatch(progress)
    last_save = time.monotonic()
    compiled = set()                                            # graphs that have run
    losses_to_log = []

    for step in range(progress["step"], c.steps + 1):

        # Evaluate what the steps so far have made, unless the log has it: so this is redone after a stop.
        if evaluation is not None and due(step, c.eval_every, c.steps):
            with clock.paused():
                if evaluation(learner.averaged(), guide, progress, log):
                    save_to(path)
        if step == c.steps:
            break
        data.signals.held = WORLD == 1                          # a signal waits for the end of the step

        # The batch: drawn at random, or chosen by JEST from a super-batch. A step that compiles is not timed.
        selecting = jest is not None and not progress["ahead"] and not 0 < c.early_steps <= step
        compiles = c.compile and (selecting, objective) not in compiled
        compiled.add((selecting, objective))
        with clock.paused() if compiles else contextlib.nullcontext():
            if selecting:
                batch, weight = jest(step)
            else:
                batch = uniform[step]
                weight = torch.ones_like(batch.sigma)

            # Class weights, given or found so far by group DRO: alpha is a class's share of the loss.
            if dro_reference is not None:
                class_weights = data.class_weights_of_mean_one(dro.alpha / counts, counts)
            if class_weights is not None:
                weight = weight * class_weights[batch.labels % len(c.class_names)]

            # Gradients, then optimizer step, projection of the weights, moving averages, group DRO.
            if c.dropout > 0:                                   # a function of (seed, step), too
                torch.manual_seed(process_stream(c, step, "dropout").initial_seed())
            losses = backward(objective, batch, weight, c.micro_batch)
            learner.update(step)
            if dro_reference is not None:
                totals = dro.totals(losses - reference_loss(batch), batch.labels % len(c.class_names))
                dro.update(WORLD * average([totals])[0])        # the sum over the processes
        losses_to_log.append(losses.mean())
        progress["step"] = step + 1
        progress["examples_trained"] += len(batch.x0) * WORLD
        progress["examples_drawn"] += c.super_batch if selecting else uniform.n

        # The snapshot: from now on the guide is a copy of the learner's average.
        if c.guide == "snapshot" and step + 1 == c.guide_steps:
            with clock.paused():
                save_to(folder / "guide.pt")
            c.guide_path = "guide.pt"
            guide = frozen_copy(learner.averaged())
            if c.guided_targets != 1:
                objective = make_objective(c, denoiser, guide)

        # Log and save. With --until-better a regular log line ends selection if the learner is ahead.
        evaluates = due(step + 1, c.eval_every, c.steps)
        if evaluates or due(step + 1, c.log_every):
            with clock.paused():
                log_line(c, progress, log, losses_to_log, batch, jest if selecting else None)
                if selecting and c.until_better and due(step + 1, c.log_every):
                    progress["ahead"] = log[-1]["excess"] <= 0  # False if no loss was finite
                if evaluates or time.monotonic() - last_save >= c.save_every:
                    save_to(path)
                    last_save = time.monotonic()
            losses_to_log = []

        # A signal that came during the step.
        data.signals.held = False
        if data.signals.received is not None:
            with clock.paused():
                save_to(path)
            words = f"stopped at step {step + 1}, saved: the same command resumes"
            raise data.Stopped(data.signals.received, words)

    barrier()
    if dro_reference is not None:
        return (dro.mean_alpha / counts).cpu()


# ------------------------------------------------------------------------------------------------------------
# The stages of a run: coreset, guide, class weights, the model. `train` also trains the guide and the proxy
# of group DRO, each in a sub-folder. Such a stage resumes, is skipped when done, and its checkpoint says what
# it cost. It has its own seed: the proxy is not compared on the draws that its reference was fitted to.

SEED_OF_STAGE = {"guide": 1_000_003, "proxy": 2_000_003}        # added to --seed


def stage_settings(c, name):
    """The settings of a stage: a model of the guide's size on uniform batches, without guide and dropout."""
    values = dict(
        seed=c.seed + SEED_OF_STAGE[name], channels=c.guide_channels, batch=c.guide_batch,
        steps=c.guide_steps, dropout=0.0, selector="uniform", reference=None, guide="none",
        guided_targets=1.0, guidance=1.0, class_weights=None, out=os.path.join(c.out, name))
    files = dict(c.files, guide="none", reference=None, class_weights=None)
    return argparse.Namespace(**(vars(c) | values | dict(files=files)))


def stage_folder(c, name):
    """The folder of a stage. DataError where the stage was finished and its checkpoint is missing now."""
    folder = Path(c.out, name)
    if Path(c.out, "checkpoint.pt").exists() and not (folder / "checkpoint.pt").exists():
        raise data.DataError(f"{folder / 'checkpoint.pt'}: missing, and this run needs it (a guide only in "
                             "samples: --guidance 1 does without); another --out begins again")
    return folder


def choose_examples(c, dataset, folder):
    """-> (pool, examples to train on, held-out examples, seconds that pruning took). The first three are
    sorted indices, or None. Pruning chooses the examples inside the pool and draws coreset.png."""
    if c.kind == "tree":
        return None, None, None, 0.0
    pool, held_out = data.split_pool(dataset, c.holdout, c.imbalance, c.seed)
    if c.keep is None:
        return pool, pool, held_out, 0.0
    start = time.monotonic()
    features = pool                                             # of which random pruning takes the length
    if c.prune != "random" and c.prune_features == "pixels":
        features = data.pixel_features(dataset, pool)
    elif c.prune != "random":                                   # cached with the seconds that they took
        features, seconds = fid.data_features(fid.network(c.prune_features, c.device), dataset)
        features = features[pool]
        start = time.monotonic() - seconds
    labels = None if dataset.labels is None else dataset.labels[pool]
    priority = data.priorities(features, labels, c.prune, seed=c.seed)
    kept = data.prune(priority, labels, c.keep)                 # positions in the pool
    seconds = time.monotonic() - start
    if RANK == 0:
        data.say(f"{c.prune}: {len(kept):,} of {len(pool):,} examples are kept, see coreset.png")
        picture = data.coreset_picture(dataset, pool, priority, kept)
        with data.writing(folder / "coreset.png") as file:
            picture.save(file, format="PNG")
    return pool, pool[kept], held_out, seconds


def find_class_weights(c, dataset, folder, examples, reference_path):
    """-> (weights of the loss [classes], of mean 1 over the examples, or None; what finding them cost). With
    dro a proxy is trained, which finds them against the reference."""
    if c.class_weights is None:
        return None, (0.0, 0)
    counts = data.class_counts(dataset, examples)
    weights = 1 / counts.clamp(min=1)
    cost = (0.0, 0)
    if c.class_weights == "dro":
        proxy = stage_folder(c, "proxy")
        weights = train(stage_settings(c, "proxy"), dataset, proxy, examples, dro_reference=reference_path,
                        costs=[cost_of(reference_path)])
        cost = cost_of(proxy / "checkpoint.pt")
    elif c.class_weights != "inverse":
        weights, cost = data.read_class_weights(c.class_weights, c.class_names)
    weights = data.class_weights_of_mean_one(weights, counts)
    if c.class_weights == "dro" and RANK == 0:                  # for people, and for --class-weights FILE
        data.write_class_weights(folder / "class_weights.json", c.class_names, weights, cost)
    return weights.to(c.device), cost


def run_stages(c, dataset, folder):
    """Coreset, guide, class weights, and the model with its evaluation."""
    pool, examples, held_out, prune_seconds = choose_examples(c, dataset, folder)
    evaluation = None
    if c.eval_samples > 0 and RANK == 0:
        evaluation = fid.Evaluation(c, dataset, folder, held_out)
    if RANK == 0:
        barrier()                                               # the others read the caches that it filled
        with data.writing(folder / "config.json") as file:
            file.write(json.dumps(vars(c), indent=1).encode())
        data.say(f"{folder}: {c.steps:,} steps of {c.batch}, {c.selector} batches, guide {c.guide}")

    # What else is trained for the model. With group DRO the guide is the reference, too: it sees the pool.
    guide_path = None
    if is_file(c.guide):
        guide_path = model.checkpoint_of(c.guide)
    elif c.guide == "train" and guide_is_needed(c):
        guide = stage_folder(c, "guide")
        guide_path = guide / "checkpoint.pt"
        train(stage_settings(c, "guide"), dataset, guide, pool if c.class_weights == "dro" else examples)
    class_weights, weights_cost = find_class_weights(c, dataset, folder, examples, guide_path)

    # What it cost. A guide that is used only in sampling counts only for guided samples. With dro the guide's
    # cost is in that of the class weights.
    costs = [(prune_seconds, 0), weights_cost]
    if c.reference:
        costs.append(cost_of(c.reference))
    if guide_path is not None and c.class_weights != "dro":
        if guide_is_needed_to_train(c):
            costs.append(cost_of(guide_path))
        elif evaluation is not None and c.guidance != 1:
            evaluation.guide_cost = cost_of(guide_path)
    train(c, dataset, folder, examples, guide_path, class_weights, evaluation=evaluation, costs=costs)
    if RANK == 0:
        data.say(f"wrote {folder}", file=sys.stdout)


def locked(folder):
    """A file that is locked while it is open, until the process ends; DataError where another process trains
    in this folder. Without fcntl (Windows) nothing is locked."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        if fcntl is not None and RANK == 0:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise data.DataError(f"{folder}: another process trains in this folder") from None
    return file


def main(argv=None):
    """Train as the flags say, and resume where the run folder holds a checkpoint."""
    c, dataset = settings(argv)
    if c.kind == "tree" and c.device == "cpu":
        torch.set_num_threads(1)                                # one thread is faster for matrices this small
    folder = Path(c.out)
    with locked(folder):
        if RANK == 0:
            for leftover in folder.rglob("*.tmp"):              # of a process that was killed
                leftover.unlink()
        run_stages(c, dataset, folder)
    if WORLD > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    data.command(main, "stopped: the same command resumes")
