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
import functools
import hashlib
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

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def join(device):
    """Take part in the group of processes."""
    if WORLD > 1:
        backend = "nccl" if device.startswith("cuda") else "gloo"
        timeout = datetime.timedelta(days=1)                    # process 0 evaluates alone
        torch.distributed.init_process_group(backend, timeout=timeout)


def barrier():
    """Wait for the other processes. They can then read what process 0 has written before."""
    if WORLD > 1:
        torch.distributed.barrier()


def average(tensors):
    """Average a list of tensors over the processes, in place and in one message."""
    if WORLD > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        means = (flat / WORLD).split([tensor.numel() for tensor in tensors])
        shaped = [mean.view_as(tensor) for mean, tensor in zip(means, tensors)]
        torch._foreach_copy_(tensors, shaped)


def process_stream(c, step, name, device="cpu"):
    """The random stream of (seed, step, name) for this process; each process has its own."""
    if RANK > 0:
        name = f"{name}{RANK}"
    return data.stream(c.seed, step, name, device)


# ------------------------------------------------------------------------------------------------------------
# Presets, chosen by the data. The tree follows the toy of 2406.02507; images and latents have the noise
# levels of EDM and EDM2. "cpu" replaces these values for images and latents where there is no GPU.

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

# Values for what no preset sets. None: the value follows from others, see `settings`, or the feature is off.
DEFAULTS = dict(
    data=None, out=None, size=None, flip=None, holdout=0, imbalance=None,
    channels=None, blocks=3, batch=None, micro_batch=None, steps=None, lr=0.01, lr_decay=None, warmup=None,
    dropout=None, ema=None, P_mean=None, P_std=None, targets="sample", guided_targets=1.0,
    selector="uniform", early_steps=0, filter=0.8, joint=None, score="learnability", gain=0.0, invert=False,
    debias=False, chunks=16, until_better=False, after="uniform", reference=None,
    guide=None, guide_channels=None, guide_batch=None, guide_steps=None, guidance=None, sampling_steps=32,
    sigma_max=80.0, eval_every=None, eval_samples=10_000, metrics="pixels",
    keep=None, prune="gaussian", prune_features="pixels", class_weights=None, eta=1.0,
    seed=0, device="cuda" if torch.cuda.is_available() else "cpu", bf16=None, compile=None, log_every=50,
    save_every=60.0)

MACHINE = {"data", "out", "device", "bf16", "compile", "micro_batch"}   # belong to a machine, not to a run
MAY_CHANGE = MACHINE | {"steps", "log_every", "save_every", "eval_every", "eval_samples", "sampling_steps",
                        "guidance", "metrics"}                          # in a run that goes on
SELECTION = ("early_steps", "filter", "joint", "score", "gain", "invert", "debias", "chunks", "until_better",
             "after")                                                   # flags that need --selector
RESUMABLE = "a checkpoint of this run (give another --out, or delete it)"       # in errors: "PATH: not ..."
NEED_DATA = ("size", "flip", "holdout", "imbalance", "keep", "class_weights")       # flags that need --data

USAGE = """[--data DATA] [flags]

  python train.py --selector ajest --early-steps 5000           the 2-D tree, no data needed
  python train.py --data photos/ --size 64                      images, labelled by folder or not
  python train.py --data photos/ --size 64 --keep 0.1           the most typical tenth of each class only"""
DESCRIPTION = (
    "Train a diffusion model while choosing its data. The same command again resumes the run. Defaults stand "
    "in brackets. Where they depend on the data: tree, 32 (images of up to 32 pixels), 64 (larger images), "
    "latent, and CPU (images and latents without a GPU).")


# ------------------------------------------------------------------------------------------------------------
# The flags. Each default is None here: `settings` looks a value up, and help shows it from the same tables.

def shown(value):
    """A setting as it would be typed."""
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def default_text(name):
    """The default of a setting as help shows it: one value, or those of the presets; "" for none."""
    values = {}
    for kind, preset in PRESETS.items():
        if kind != "cpu":
            values[kind] = preset.get(name, DEFAULTS[name])
    if name in PRESETS["cpu"]:
        values["CPU"] = PRESETS["cpu"][name]
    words = {kind: shown(value) for kind, value in values.items() if value is not None}
    presets_differ = len(set(words.values())) > 1
    some_have_none = 0 < len(words) < len(values)
    if presets_differ or some_have_none:
        return "; ".join(f"{kind} {word}" for kind, word in words.items())
    if DEFAULTS[name] is None or DEFAULTS[name] is False:
        return ""
    return f"default {shown(DEFAULTS[name])}"


def flag(name):
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def build_parser():
    """The parser of all flags, in groups by purpose."""
    parser = data.parser(DESCRIPTION, USAGE)
    whole = data.number(int, "[0, inf)")
    count = data.number(int, "[1, inf)")
    amount = data.number(float, "[0, inf)")
    positive = data.number(float, "(0, inf)")
    on_off = argparse.BooleanOptionalAction

    def group(title):
        """A function that adds a flag to a new group, with its default in its help."""
        arguments = parser.add_argument_group(title)

        def add(text, help, **options):
            values = default_text(text.lstrip("-").replace("-", "_"))
            if values:
                help = f"{help} [{values}]"
            arguments.add_argument(text, help=help, default=None, **options)
        return add

    add = group("data")
    add("--data", "folder or zip of images, CIFAR-10's python folder, or an .npz; without it the 2-D tree",
        type=data.path)
    add("--size", "crop images to their centre square and resize it to this many pixels",
        type=data.number(int, "[8, 4096]"))
    add("--flip", "mirror half of the images; mirrored images are classes of their own", action=on_off)
    add("--holdout", "examples held out for the validation loss, 0 = off", type=whole)
    add("--imbalance", "make the classes long-tailed: examples of the largest class over the smallest",
        type=data.number(float, "[1, inf)"))

    add = group("model and optimization")
    add("--channels", "width of the network", type=count)
    add("--blocks", "residual blocks on each level of the UNet", type=count)
    add("--batch", "examples trained on per step, whatever the selector", type=count)
    add("--micro-batch", "compute a batch in parts of this size, to save memory", type=count)
    add("--steps", "optimizer steps", type=count)
    add("--lr", "Adam's learning rate", type=positive)
    add("--lr-decay", "steps after which the learning rate falls as 1/sqrt(step)", type=count)
    add("--dropout", "dropout inside the residual blocks", type=data.number(float, "[0, 1)"))
    add("--ema", "lengths of the averages of the weights, as shares of the training; the first is sampled",
        type=data.number(float, "(0, 0.28)"), nargs="+")
    add("--targets", "what the network learns to predict: sample = the clean example;\n"
        "exact = the mean of all clean examples, which only the tree knows", choices=("sample", "exact"))
    add("--guided-targets", "train the network to be its own autoguided denoiser of weight W: the target "
        "moves by (1 - 1/W)(D - D_guide). 1 = off", type=data.number(float, "[1, inf)"), metavar="W")

    add = group("online selection (2509.15267)")
    add("--selector", "how a batch is made: uniform = at random;\n"
        "ajest = from a super-batch, by what the guide does better;\n"
        "jest = the same against --reference", choices=("uniform", "jest", "ajest"))
    add("--early-steps", "select during the first N steps only, 0 = throughout", type=whole, metavar="N")
    add("--filter", "share of the super-batch that is left out", type=data.number(float, "[0, 1)"))
    add("--score", "what is chosen more: learnability = loss of the learner less loss of the reference;\n"
        "hard = large loss of the learner; easy = small loss of the reference;\n"
        "root-loss = large gradient at the network's output", choices=select.SCORES)
    add("--joint", "what the chosen examples add to the scores of others:\n"
        "mean = as in the AJEST authors' code (default of ajest);\n"
        "independent = nothing, as in JEST for a loss without pairs (default of jest);\n"
        "sum = an early version of the AJEST authors' code, nearly top-k", choices=select.FACTORS)
    add("--gain", "standardize the scores and multiply them by this, 0 = raw scores", type=amount)
    add("--reference", "checkpoint that jest scores against; without it the average of the learner's weights",
        type=data.path)

    add = group("guide, sampling and evaluation (2406.02507)")
    add("--guide", "a smaller or less trained copy of the model.\nCHECKPOINT = a run folder or file;\n"
        "train = train one first (default of ajest and dro);\n"
        "snapshot = the model's own average after --guide-steps (default otherwise);\nnone", type=data.path)
    add("--guide-channels", "width of a trained guide; without it half of --channels", type=count)
    add("--guide-steps", "steps of a trained guide, or the step of the snapshot; without it an eighth of "
        "--steps (tree: 1024, of a snapshot at most 512)", type=count)
    add("--guidance", "weight of the guide in samples, 1 = off", type=amount)
    add("--sampling-steps", "steps of the Heun sampler", type=count)
    add("--eval-every", "steps between evaluations; without it at the end only", type=count)
    add("--eval-samples", "samples scored, 0 = no evaluation", type=whole)
    add("--metrics", "features that score images: pixels = 8x8 averages; inception = FID;\n"
        "own:CKPT = a classifier made by fid.py --fit CKPT; none")

    add = group("coreset and class weights (2409.19128)")
    add("--keep", "fraction of each class to train on", type=data.number(float, "(0, 1]"))
    add("--prune", "which examples of a class are kept: gaussian = the most likely under a Gaussian of its "
        "features;\nknn = those with the nearest neighbours;\n"
        "moderate = those nearest the median distance from the centre of the class; random",
        choices=data.PRUNING)
    add("--prune-features", "features that pruning sees: pixels, inception, or own:CKPT, a classifier made "
        "by fid.py --fit CKPT")
    add("--class-weights", "weights of the classes in the loss:\n"
        "dro = find them by group DRO against the guide;\ninverse = inverse frequency;\n"
        "FILE = the class_weights.json that a run with dro made", type=data.path)

    add = group("run")
    add("--out", "run folder; without it runs/DATA-SELECTOR", type=data.path)
    add("--seed", "of weights, data, noise and selection", type=data.number(int, "[0, 1e15]"))
    add("--device", "cpu or cuda", type=data.device)
    add("--bf16", "bf16 autocast; on for images on a GPU", action=on_off)
    add("--compile", "torch.compile; on for a GPU", action=on_off)
    add("--log-every", "steps between log lines", type=count)

    add = group("rarely changed")
    add("--chunks", "JEST fills the batch in at most this many chunks", type=count)
    add("--invert", "prefer low scores", action="store_true")
    add("--debias", "draw the batch once and weigh it by inverse inclusion probability", action="store_true")
    add("--until-better", "select until a log line finds the learner better than the reference",
        action="store_true")
    add("--after", "after early selection train on uniform batches, or on full super-batches",
        choices=("uniform", "full"))
    add("--eta", "step size of group DRO", type=positive)
    add("--P-mean", "mean of ln sigma in training", type=data.number(float, "(-inf, inf)"))
    add("--P-std", "standard deviation of ln sigma in training", type=positive)
    add("--warmup", "steps of linear warm-up of the learning rate, 0 = off", type=whole)
    add("--sigma-max", "noise level at which sampling begins", type=data.number(float, "(0.002, inf)"))
    add("--guide-batch", "batch of a trained guide; without it --batch (tree: 4096)", type=count)
    add("--save-every", "seconds between checkpoints, which are written at log lines", type=amount)
    return parser


def typed_flags(argv=None):
    """{name: value} of the flags on the command line (argv; None = the program's own)."""
    flags = vars(build_parser().parse_args(argv))
    return {name: value for name, value in flags.items() if value is not None}


# ------------------------------------------------------------------------------------------------------------
# The settings of a run. Each is looked up once, in defaults, preset, checkpoint and typed flags; the last one
# that has it wins.

def load_dataset(typed, device):
    """The data set that the flags name, on the device."""
    if "data" in typed:
        dataset = data.load(typed["data"], typed.get("size"))
    else:
        dataset = data.Tree("A")
    return dataset.to(device)


def run_folder(typed):
    """The folder of the run: --out, or runs/DATA-SELECTOR."""
    if "out" in typed:
        return Path(typed["out"])
    name = "tree"
    if "data" in typed:
        name = Path(typed["data"]).resolve().name.split(".")[0]
    return Path(f"runs/{name}-{typed.get('selector', DEFAULTS['selector'])}")


def preset_of(dataset):
    """The name of the preset for this data set."""
    if dataset.kind in PRESETS:
        return dataset.kind
    return "32" if dataset.shape[-1] <= 32 else "64"


def saved_run(folder):
    """The settings and the progress in the checkpoint of this folder, both {} where it has none."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return dict(settings={}, progress={})
    with data.reading(path, RESUMABLE):
        checkpoint = model.load_checkpoint(path)
        return dict(settings=dict(checkpoint["settings"]), progress=dict(checkpoint["progress"]))


def add_facts_of_data(c, dataset):
    """Add the facts about the data set to the settings."""
    c.kind = dataset.kind
    c.shape = list(dataset.shape)
    c.classes = dataset.classes
    c.class_names = list(dataset.class_names)
    c.mean = list(getattr(dataset, "mean", ()))
    c.std = list(getattr(dataset, "std", ()))
    c.net_classes = c.classes                                   # labels that the network knows
    if c.flip:                                                  # mirrored images are classes of their own
        c.net_classes = 2 * max(c.classes, 1)
    c.class_shares = [1.0]
    if c.classes:
        shares = data.class_counts(dataset).double() / len(dataset)
        c.class_shares = shares.tolist()
    c.fingerprint = dataset.fingerprint
    c.data_summary = ", ".join(dataset.report[:2])


def file_named_by(c, name):
    """The path of the file that a setting names, or None where it names no file."""
    value = getattr(c, name)
    if name == "class_weights":
        return None if value in ("dro", "inverse") else value
    if name == "prune_features":
        return value.removeprefix("own:") if value.startswith("own:") else None
    if name == "guide" and value in ("train", "snapshot", "none"):
        return None
    if value is None:
        return None
    return model.checkpoint_of(value)


def make_paths_absolute(c):
    """Paths are saved with the run, and a later start may have another working directory."""
    for name in ("guide", "reference", "class_weights"):
        if file_named_by(c, name) is not None:
            setattr(c, name, os.path.abspath(getattr(c, name)))
    for name in ("metrics", "prune_features"):
        value = getattr(c, name)
        if value.startswith("own:"):
            path = os.path.expanduser(value.removeprefix("own:"))
            setattr(c, name, "own:" + os.path.abspath(path))


def add_derived_settings(c, typed, saved):
    """Add the settings that follow from others, unless they were typed or saved."""
    cuda = c.device.startswith("cuda")
    if c.bf16 is None:
        c.bf16 = cuda and c.kind != "tree"
    if c.compile is None:
        c.compile = cuda
    if c.joint is None:
        c.joint = "mean" if c.selector == "ajest" else "independent"
    if c.guide is None:
        c.guide = "train" if c.selector == "ajest" or c.class_weights == "dro" else "snapshot"
    if c.guide_steps is None:
        c.guide_steps = math.ceil(c.steps / 8)
        if c.kind == "tree":
            c.guide_steps = min(512, c.guide_steps) if c.guide == "snapshot" else 1024
    if c.guide_channels is None:
        c.guide_channels = math.ceil(c.channels / 2)
    if c.guide_batch is None:
        c.guide_batch = c.batch
    if c.guide == "none" or c.guided_targets != 1:              # the network is its own guided denoiser
        if "guidance" not in typed and "guidance" not in saved:
            c.guidance = 1.0
    c.super_batch = round(c.batch / (1 - c.filter))             # B = b / (1 - filter ratio)
    c.selects_by_reference = c.until_better or c.score in ("learnability", "easy")
    make_paths_absolute(c)


def needs_guide_to_train(c):
    """Whether the guide takes part in training, not only in sampling."""
    ajest = c.selector == "ajest" and c.selects_by_reference
    return ajest or c.class_weights == "dro" or c.guided_targets != 1


def needs_guide(c):
    """Whether the guide takes part in training or in sampling."""
    return needs_guide_to_train(c) or c.guidance != 1


def without_guide(c):
    """What messages advise where the guide is gone."""
    if needs_guide_to_train(c):
        return "another --out starts anew"
    return "--guidance 1 goes on without a guide"


def hashes_of_files(c):
    """{flag: SHA-256} of the files that the run needs; files may have moved when it goes on."""
    names = ["reference", "class_weights"]
    if needs_guide(c):
        names.append("guide")
    if c.keep is not None and c.prune != "random":
        names.append("prune_features")
    hashes = {}
    for name in names:
        path = file_named_by(c, name)
        if path is not None:
            if name == "guide" and not os.path.exists(path):
                raise data.DataError(f"{path}: no such file: give --guide its place ({without_guide(c)})")
            with data.reading(path, f"a file for {flag(name)}"):
                hashes[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return hashes


def refuse_other_run(c, checkpoint, folder):
    """DataError where the checkpoint in this folder has other settings or other data, or has done more steps.
    Of the checkpoint only its settings and progress are read, as `saved_run` returns them."""
    saved = checkpoint["settings"]
    if not saved:
        return
    if saved["fingerprint"] != c.fingerprint:
        raise data.DataError(f"{folder} holds a run on other data ({saved['data_summary']}; now: "
                             f"{c.data_summary}): the data has changed, give another --out")
    for name in DEFAULTS:
        if name in MAY_CHANGE:
            continue
        now = getattr(c, name)
        differs = saved[name] != now
        if name in c.file_hashes and name in saved["file_hashes"]:      # the file may have moved
            differs = saved["file_hashes"][name] != c.file_hashes[name]
        if differs and saved[name] == now:
            raise data.DataError(f"{folder} holds a run with {flag(name)} {now}, and that file has changed: "
                                 "give another --out, or delete the folder")
        if differs:
            raise data.DataError(f"{folder} holds a run with {flag(name)} {shown(saved[name])}, not "
                                 f"{shown(now)}: give another --out, or delete the folder")
    steps_done = checkpoint["progress"]["step"]
    if c.steps < steps_done:
        raise data.DataError(f"--steps {c.steps}: the run in {folder} has done {steps_done}")


def refuse_guides(c, typed):
    """DataError for a guide that is needed but not given, or given but not usable."""
    if c.selector == "ajest" or c.class_weights == "dro":
        if c.guide in ("none", "snapshot"):
            raise data.DataError("--selector ajest and --class-weights dro need a --guide from the start: "
                                 "train, or a checkpoint")
    if c.guide == "none":
        if c.guided_targets != 1:
            raise data.DataError("--guided-targets needs a --guide")
        if typed.get("guidance", 1) != 1:
            raise data.DataError("--guidance needs a --guide")
    if c.guide == "snapshot" and c.guide_steps > c.steps:
        raise data.DataError(f"--guide-steps {c.guide_steps}: the snapshot must be taken within the "
                             f"{c.steps} --steps")


def refuse_data(c, typed, dataset):
    """DataError for settings that do not fit the data."""
    if c.kind == "tree":
        return
    side = c.shape[-1]
    if c.shape[1] != side or side % 8:
        if c.kind == "latent":
            raise data.DataError(f"{c.data}: the latents are {c.shape}, and the UNet needs square latents "
                                 "whose side is a multiple of 8: encode images of another size")
        raise data.DataError(f"--size: the UNet needs square images of a multiple of 8 pixels, not {c.shape}")
    if c.kind == "latent":
        if c.flip:
            raise data.DataError("--flip is for images")
        for name in ("metrics", "prune_features"):
            if getattr(c, name) not in ("pixels", "none"):
                raise data.DataError(f"{flag(name)} {getattr(c, name)}: {c.data} holds latents, and this "
                                     "network sees images only: give pixels")
    if c.targets == "exact":
        raise data.DataError("--targets exact is for the tree")
    if not c.classes:
        for name in ("class_weights", "imbalance"):
            if typed.get(name):
                raise data.DataError(f"{flag(name)} needs labels: {c.data} has none")
    if c.holdout >= len(dataset):
        raise data.DataError(f"--holdout {c.holdout}: the data has no more examples")


def refuse_sizes(c):
    """DataError for numbers of examples that cannot be divided, or are too few to score."""
    if 0 < c.eval_samples < max(c.classes, 2):
        raise data.DataError(f"--eval-samples {c.eval_samples}: give one for each class, and 2 or more")
    divisor = (c.micro_batch or 1) * WORLD
    words = f"must be a multiple of {divisor}, --micro-batch times the number of processes"
    if c.batch % divisor:
        raise data.DataError(f"--batch {c.batch} {words}")
    if c.selector != "uniform" and c.super_batch % divisor:
        raise data.DataError(f"the super-batch of {c.super_batch}, --batch / (1 - --filter), {words}")
    if c.guide_batch % WORLD:
        raise data.DataError(f"--guide-batch {c.guide_batch} must be a multiple of {WORLD}, the number of "
                             "processes")


def refuse(c, typed, dataset):
    """DataError for settings that contradict each other or would train something else than was meant."""
    tree = c.kind == "tree"
    if tree:
        for name in NEED_DATA:
            if typed.get(name):                                 # --no-flip and --holdout 0 are no demands
                raise data.DataError(f"{flag(name)} needs --data")
    if c.selector == "uniform":
        for name in SELECTION:
            if name in typed:
                raise data.DataError(f"{flag(name)} needs --selector jest or ajest")
    if "after" in typed and not (c.early_steps or c.until_better):
        raise data.DataError("--after needs --early-steps or --until-better")
    if "chunks" in typed and c.debias:
        raise data.DataError("--chunks has no effect with --debias, which draws the batch at once")
    if c.reference and c.selector != "jest":
        raise data.DataError("--reference needs --selector jest; the reference of ajest is the --guide")
    for name in ("prune", "prune_features"):
        if name in typed and c.keep is None:
            raise data.DataError(f"{flag(name)} needs --keep")
    if "eta" in typed and c.class_weights != "dro":
        raise data.DataError("--eta needs --class-weights dro")
    refuse_guides(c, typed)
    refuse_data(c, typed, dataset)
    refuse_sizes(c)


def settings(typed):
    """-> (c, a namespace of plain values; the data set). Says what was loaded before it refuses anything."""
    device = typed.get("device", DEFAULTS["device"])
    dataset = load_dataset(typed, device)
    folder = run_folder(typed)
    if RANK == 0:
        data.say("\n".join(dataset.report))

    kind = preset_of(dataset)
    preset = PRESETS[kind]
    if kind != "tree" and not device.startswith("cuda"):
        preset = preset | PRESETS["cpu"]
    saved = saved_run(folder)
    c = argparse.Namespace(**(DEFAULTS | preset | saved["settings"] | typed))

    # Evaluations take the preset's noise levels, so that runs with another --P-mean compare.
    c.eval_levels = dict(P_mean=PRESETS[kind]["P_mean"], P_std=PRESETS[kind]["P_std"])
    c.out = str(folder)
    add_facts_of_data(c, dataset)
    add_derived_settings(c, typed, saved["settings"])
    refuse(c, typed, dataset)
    c.file_hashes = hashes_of_files(c)
    refuse_other_run(c, saved, folder)
    c.bf16, c.compile = model.supported(c.device, c.bf16, c.compile)
    return c, dataset


# ------------------------------------------------------------------------------------------------------------
# Seconds of training. Reading the stopwatch waits for the device, so it is read at log lines only.

class Stopwatch:
    """Seconds of training since it was made."""

    def __init__(self, device, seconds=0.0, compiled=False):
        self.device = device
        self.compiled = compiled
        self.graphs = set()                                     # graphs that have run, and are compiled
        self.before_step = None                                 # the reading before a step that compiles
        self.set(seconds)

    def set(self, seconds):
        """Go on from this many seconds."""
        self.start = time.monotonic() - seconds

    def read(self):
        """The seconds, after the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - self.start

    @contextlib.contextmanager
    def paused(self):
        """Leave out what happens inside: evaluation, saving."""
        seconds = self.read()
        yield
        self.read()                                             # the device has finished what was inside
        self.set(seconds)

    def begin_step(self, graph):
        """The first step that runs a graph compiles it, and is not timed."""
        if self.compiled and graph not in self.graphs:
            self.graphs.add(graph)
            self.before_step = self.read()

    def end_step(self):
        """Forget the seconds of a step that compiled."""
        if self.before_step is not None:
            self.read()
            self.set(self.before_step)
            self.before_step = None


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: state_dicts and plain values, written by process 0. They hold the log, which log.jsonl repeats
# for people, and the settings, so that a checkpoint knows which run it belongs to.

def new_progress(cost):
    """What a run has done so far: plain values for its checkpoint and its log."""
    seconds, examples = cost
    return dict(
        step=0,
        seconds=0.0,                # of training
        examples_trained=0,
        examples_drawn=0,           # trained on, or only scored
        selecting=True,             # False after --until-better has ended the selection
        snapshot=False,             # True after the snapshot has been taken
        other_seconds=seconds,      # spent on what this run needed: pruning, guide, proxy
        other_examples=examples)


def model_config(c, guide_path=None):
    """The plain values that rebuild a checkpoint's denoiser and sample it as the run is evaluated. The
    guide's path is relative to the run folder."""
    config = dict(
        kind=c.kind, shape=c.shape, channels=c.channels, blocks=c.blocks, classes=c.net_classes,
        class_names=c.class_names, class_shares=c.class_shares, dropout=c.dropout, sigma_data=0.5,
        mean=c.mean, std=c.std, sigma_max=c.sigma_max, sampling_steps=c.sampling_steps, bf16=c.bf16,
        guidance=1.0, guide=None)
    if guide_path is not None:
        config["guidance"] = c.guidance
        config["guide"] = os.path.relpath(os.path.realpath(guide_path), os.path.realpath(c.out))
    return config


def settings_to_save(c):
    """The settings that a later start takes over and compares."""
    names = [name for name in DEFAULTS if name not in MACHINE]
    names += ["fingerprint", "data_summary", "file_hashes"]
    return {name: getattr(c, name) for name in names}


def save(path, c, state, progress, log, guide_path=None):
    """Write a checkpoint of `state`, {name: object with a state_dict}, and its log beside it."""
    if RANK > 0:
        return
    content = {name: holder.state_dict() for name, holder in state.items()}
    content["model_config"] = model_config(c, guide_path)
    content["settings"] = settings_to_save(c)
    content["progress"] = progress
    content["log"] = log
    lines = [json.dumps(record) + "\n" for record in log]
    with data.writing(path.with_name("log.jsonl")) as file:
        file.write("".join(lines).encode())
    with data.writing(path) as file:
        torch.save(content, file)


def restore(path, c, state):
    """Fill `state` from the checkpoint at `path`; -> (progress, log, model configuration). DataError if it is
    of another run, or no checkpoint."""
    with data.reading(path, RESUMABLE):
        checkpoint = model.load_checkpoint(path, c.device)
        refuse_other_run(c, checkpoint, path.parent)
        for name, holder in state.items():
            holder.load_state_dict(checkpoint[name])
        return dict(checkpoint["progress"]), list(checkpoint["log"]), checkpoint["model_config"]


def load_matching(path, c):
    """The trained denoiser at `path`; DataError unless it is for the same data as this run."""
    with data.reading(path, "a denoiser for this data"):
        return model.load_denoiser(path, None, c.device, like=model_config(c))


def cost_of(path):
    """-> (seconds, examples) of training the checkpoint at `path` and everything that it needed in turn."""
    with data.reading(path, "a checkpoint of this program"):
        progress = model.load_checkpoint(path)["progress"]
        seconds = progress["seconds"] + progress["other_seconds"]
        examples = progress["examples_trained"] + progress["other_examples"]
        return seconds, examples


def add_costs(costs):
    """The sum of a list of (seconds, examples)."""
    return sum(seconds for seconds, _ in costs), sum(examples for _, examples in costs)


# ------------------------------------------------------------------------------------------------------------
# The objective: EDM's loss, weighted by EDM2's learned uncertainty u(sigma) as loss / e^u + u. With guided
# targets the target moves by 1 - 1/W of D - D_guide. At the fixed point D = D_guide + W (target - D_guide):
# the network itself is the autoguided denoiser.

def make_objective(c, denoiser, guide=None):
    """The function to train on; with a guide its targets are guided."""
    def objective(x0, noise, sigma, labels, target, weight):
        """-> (weighted mean, losses [b]) of the tensors of a data.Batch and weights [b]."""
        losses, D_x = denoiser.loss(x0, noise, sigma, labels, target)
        D = D_x.detach()                                        # no gradient through a target
        network_loss = losses
        if guide is not None:
            with torch.no_grad():
                D_guide = guide(x0 + model.per_example(sigma, x0) * noise, sigma, labels)
            guided_target = target + (1 - 1 / c.guided_targets) * (D - D_guide)
            network_loss = model.per_example_loss(D_x, guided_target, sigma)
        if c.kind != "tree":
            # The loss stands twice: the network learns from its target with u fixed, u learns from the loss
            # against x0 with the network fixed, so that no target moves the weighting of the noise levels.
            u = denoiser.u(sigma)
            loss_against_x0 = model.per_example_loss(D, x0, sigma)
            network_loss = network_loss / u.detach().exp() + loss_against_x0 / u.exp() + u
        return (weight * network_loss).mean(), losses.detach()
    return model.accelerate(objective, c.device, c.bf16, c.compile)


def backward(objective, batch, weight, micro_batch=None):
    """Add the gradients of the weighted mean loss of a data.Batch, in micro-batches; -> losses [b]."""
    losses = []
    for rows in data.micro_batches(len(batch.x0), micro_batch):
        mean, micro_losses = objective(*batch.rows(rows), weight[rows])
        share = len(micro_losses) / len(batch.x0)
        (mean * share).backward()
        losses.append(micro_losses)
    return torch.cat(losses)


def seed_dropout(c, step):
    """Make dropout a function of (seed, step), too."""
    if c.dropout > 0:
        torch.manual_seed(process_stream(c, step, "dropout").initial_seed())


def make_losses(c, network):
    """A function of a data.Batch that returns the network's losses, without gradient or dropout."""
    loss = model.accelerate(lambda *tensors: network.loss(*tensors)[0], c.device, c.bf16, c.compile)

    @torch.no_grad()
    def losses(batch):
        """The losses [n], computed in micro-batches."""
        training = network.training
        network.eval()
        micro_losses = []
        for rows in data.micro_batches(len(batch.x0), c.micro_batch):
            micro_losses.append(loss(*batch.rows(rows)))
        network.train(training)
        return torch.cat(micro_losses)
    return losses


def frozen_copy(denoiser):
    """A copy in evaluation mode that takes no gradients."""
    return copy.deepcopy(denoiser).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------
# The selectors: uniform batches of b, and JEST on super-batches of B. AJEST's reference is the guide.

def reference_of(c, denoiser, ema, guide):
    """The network that scores are taken against: the guide, a checkpoint, or the learner's average."""
    if c.selector == "ajest":
        return guide
    if c.reference:
        return load_matching(c.reference, c)
    reference = frozen_copy(denoiser)
    for parameter, mean in zip(reference.parameters(), ema.averages[c.ema[0]]):
        parameter.data = mean                                   # shared: it moves with the average
    return reference


def make_selectors(c, dataset, denoiser, ema, examples, guide):
    """-> (select.Uniform for steps that do not select; select.Jest for steps that do, None if none does)."""
    make_batches = functools.partial(
        data.Batches, dataset, seed=c.seed, device=c.device, examples=examples, flip=c.flip, P_mean=c.P_mean,
        P_std=c.P_std, targets=c.targets, rows=slice(RANK, None, WORLD))
    batches = make_batches(n=c.batch)
    if c.selector == "uniform":
        return select.Uniform(batches), None
    super_batches = make_batches(n=c.super_batch)

    reference_loss = None
    if c.selects_by_reference:
        reference_loss = make_losses(c, reference_of(c, denoiser, ema, guide))
    uncertainty = None
    if c.kind != "tree" and c.score == "root-loss":
        uncertainty = torch.no_grad()(denoiser.u)

    def make_generator(step):
        """Each process chooses from its own super-batch, so it has a stream of its own."""
        return process_stream(c, step, "select", c.device)

    jest = select.Jest(
        super_batches, make_losses(c, denoiser), reference_loss, c.batch // WORLD, make_generator,
        chunks=c.chunks, joint=c.joint, debias=c.debias, uncertainty=uncertainty,
        score=c.score, invert=c.invert, gain=c.gain)
    after = super_batches if c.after == "full" else batches
    return select.Uniform(after), jest


# ------------------------------------------------------------------------------------------------------------
# The guide: one network serves as AJEST's reference, in guided targets and in guided samples. A snapshot is a
# copy of the learner, into which the learner's average is copied at the snapshot's step.

def guide_is_ready(c, progress):
    """Whether there is a guide at this point of the run: before its step, the snapshot is none."""
    return c.guide != "none" and (c.guide != "snapshot" or progress["snapshot"])


def load_guide(c, folder, guide_path, denoiser, progress):
    """-> (the guide, None where the run needs none; the path of its checkpoint, None before the snapshot)."""
    if c.guide == "snapshot" and not progress["snapshot"]:
        return frozen_copy(denoiser), None                      # the average is copied into it later
    if c.guide == "snapshot":
        guide_path = folder / "guide.pt"
    if c.guide == "none" or not needs_guide(c):
        return None, guide_path
    try:
        return load_matching(guide_path, c), guide_path
    except data.DataError as error:
        raise data.DataError(f"{error} ({without_guide(c)})") from None


# ------------------------------------------------------------------------------------------------------------
# What a training step updates: the network, its averages, and for the proxy the class weights.

def learning_rate(c, step):
    """Inverse square root after `lr_decay` steps, after a linear warm-up (EDM2 eq. 67)."""
    warmup = min(1, (step + 1) / (c.warmup + 1))
    return c.lr / math.sqrt(max(step / c.lr_decay, 1)) * warmup


class Learner:
    """The network that is trained, its optimizer and its averages."""

    def __init__(self, c):
        self.c = c
        torch.manual_seed(data.stream(c.seed, 0, "init").initial_seed())
        denoiser = model.build(model_config(c)).to(c.device)
        self.denoiser = denoiser.to(memory_format=torch.channels_last)
        self.parameters = list(denoiser.parameters())

        # EDM2 projects its weights to unit norm after each step. Compiled, this takes few launches on a GPU.
        self.project = model.project
        self.make_finite = model.make_finite
        self.projected_weights = model.projected_weights(denoiser)
        if c.compile and self.projected_weights:
            options = {"combo_kernels": True}
            self.project = torch.compile(model.project, options=options)
            self.make_finite = torch.compile(model.make_finite, options=options)
        self.project(self.projected_weights)
        self.ema = model.PowerEMA(denoiser, c.ema)
        self.average_network = None

        # EDM2 sums the loss over the D dimensions of an example, with eps 1e-8. This loss averages over them,
        # so its gradients are D times smaller, and so is eps. The tree's official toy averages, with 1e-8.
        eps = 1e-8
        if c.kind != "tree":
            eps = 1e-8 / math.prod(c.shape)
        self.optimizer = torch.optim.Adam(self.parameters, lr=c.lr, betas=(0.9, 0.99), eps=eps, fused=True)

    def averaged(self):
        """The network with its averaged weights; the same object each time, which is compiled once."""
        if self.average_network is None:
            self.average_network = frozen_copy(self.denoiser)
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


class ClassWeightSearch:
    """Group DRO over the classes. The learner is the proxy: its losses are compared with a reference's."""

    def __init__(self, c, dataset, examples, reference_path):
        self.c = c
        self.reference_path = reference_path
        self.dro = data.GroupDRO(c.classes, c.eta).to(c.device)
        self.counts = data.class_counts(dataset, examples).to(c.device).clamp(min=1)
        self.reference_loss = make_losses(c, load_matching(reference_path, c))

    def weights(self):
        """The weights [classes] of this step's loss, with mean 1 over the examples. A class's alpha is its
        share of the loss, so it is divided by the number of its examples."""
        return data.class_weights_of_mean_one(self.dro.alpha / self.counts, self.counts)

    def update(self, losses, batch):
        """Learn from the proxy's losses [b] on this batch."""
        excess = losses - self.reference_loss(batch)
        totals = self.dro.totals(excess, batch.labels % self.c.classes)
        average([totals])
        self.dro.update(WORLD * totals)                         # the sum over the processes

    def write(self, folder):
        """Write class_weights.json: the weights of the mean alpha, and what finding them cost."""
        weights = data.class_weights_of_mean_one(self.dro.mean_alpha / self.counts, self.counts)
        costs = [cost_of(folder / "checkpoint.pt"), cost_of(self.reference_path)]
        seconds, examples = add_costs(costs)
        path = folder / "class_weights.json"
        data.write_class_weights(path, self.c.class_names, weights, seconds, examples)


# ------------------------------------------------------------------------------------------------------------
# Log lines.

def is_multiple(step, every):
    """Whether this step is a multiple of `every`; never for None or step 0."""
    return every is not None and step > 0 and step % every == 0


def is_log_step(c, step):
    """Whether a log line is written after this step. Every evaluation has one before it."""
    return step == c.steps or is_multiple(step, c.log_every) or is_multiple(step, c.eval_every)


def is_eval_step(c, step):
    """Whether the network is evaluated after this step."""
    return step == c.steps or is_multiple(step, c.eval_every)


class LossMonitor:
    """The mean loss since the last log line. Ends the run if it is not finite at two lines in a row."""

    def __init__(self, folder):
        self.folder = folder
        self.losses = []
        self.bad_lines = 0                                      # the latest lines whose loss was not finite

    def add(self, losses):
        """Take in the losses [b] of a step, without waiting for the device."""
        self.losses.append(losses.mean())

    def mean(self, step, last):
        """The mean over steps and processes, a number. DataError where training has diverged."""
        loss = torch.stack(self.losses).mean()
        self.losses = []
        average([loss])
        loss = loss.item()
        self.bad_lines = 0 if math.isfinite(loss) else self.bad_lines + 1
        if self.bad_lines == 2 or (self.bad_lines == 1 and last):
            kept = ""
            if (self.folder / "checkpoint.pt").exists():
                kept = "; the checkpoint of the last finite loss is kept"
            raise data.DataError(f"{self.folder}: the loss is {loss} at step {step}: give --no-bf16, or a "
                                 f"lower --lr with another --out{kept}")
        return loss


def learner_is_behind(jest):
    """Whether the learner's mean loss on the last super-batch exceeds the reference's."""
    excess = jest.mean_excess.clone()
    average([excess])
    return excess.item() > 0


def show_progress(name, c, progress, loss):
    """Show the progress line, with the time left as estimated from the steps so far."""
    if RANK > 0:
        return
    step = progress["step"]
    milliseconds = 1000 * progress["seconds"] / step
    left = round(milliseconds * (c.steps - step) / 1000)
    memory = ""
    if c.device.startswith("cuda"):
        memory = f"  {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB"
    data.progress(f"{name}: step {step}/{c.steps}  loss {loss:.4f}  {milliseconds:.3g} ms/step{memory}  "
                  f"{left // 60}:{left % 60:02d} left", last=step == c.steps)


# ------------------------------------------------------------------------------------------------------------
# Training.

def train(
    c,                      # settings
    dataset,                # data.Dataset or data.Tree, on its device
    folder,                 # run folder; where it holds a checkpoint, the run goes on
    examples=None,          # sorted indices to train on; None = all
    guide_path=None,        # the guide's checkpoint; None = there is none, or it is the snapshot
    class_weights=None,     # of the loss [classes]; None = 1
    dro_reference=None,     # checkpoint: find class weights by group DRO against it
    evaluation=None,        # fid.Evaluation: called every eval_every steps and at the end
    cost=(0.0, 0),          # seconds and examples spent on what this run needs
):
    """Train until c.steps are done; writes checkpoint.pt and log.jsonl to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.pt"
    learner = Learner(c)
    denoiser, ema = learner.denoiser, learner.ema
    state = dict(model=denoiser, ema=ema, optimizer=learner.optimizer)
    search = None                                               # of class weights, where this is the proxy
    if dro_reference is not None:
        search = ClassWeightSearch(c, dataset, examples, dro_reference)
        state["dro"] = search.dro

    # Resume where the folder holds a checkpoint.
    progress = new_progress(cost)
    log = []
    saved_config = None
    if path.exists():
        progress, log, saved_config = restore(path, c, state)
    guide, guide_path = load_guide(c, folder, guide_path, denoiser, progress)
    if saved_config is not None and saved_config != model_config(c, guide_path):
        save(path, c, state, progress, log, guide_path)         # sample.py reads a changed --guidance

    # Objectives, selectors, clock.
    objective = make_objective(c, denoiser)
    guided_objective = make_objective(c, denoiser, guide)       # used once there is a guide, with W > 1
    uniform, jest = make_selectors(c, dataset, denoiser, ema, examples, guide)
    monitor = LossMonitor(folder)
    clock = Stopwatch(torch.device(c.device), progress["seconds"], c.compile)
    last_save = time.monotonic()

    for step in range(progress["step"], c.steps + 1):

        # Evaluate what the steps so far have made, unless the log has it (from a start that was interrupted).
        has_guide = guide_is_ready(c, progress)
        if evaluation is not None and is_eval_step(c, step) and monitor.bad_lines == 0:
            guidance = c.guidance if has_guide else 1.0
            if not evaluation.is_logged(log, step, guidance):
                with clock.paused():
                    save(path, c, state, progress, log, guide_path)
                    log += evaluation(learner.averaged(), guide if guidance != 1 else None, progress)
                    save(path, c, state, progress, log, guide_path)
            evaluation.print_metrics(log, step, guidance)
        if step == c.steps:
            break

        # The batch: drawn at random, or chosen by JEST from a super-batch.
        selecting = jest is not None and progress["selecting"] and not 0 < c.early_steps <= step
        guided = c.guided_targets != 1 and has_guide
        clock.begin_step((selecting, guided))
        selector = jest if selecting else uniform
        batch, weight = selector(step)

        # Class weights, fixed or found so far by group DRO.
        if search is not None:
            class_weights = search.weights()
        if class_weights is not None:
            weight = weight * class_weights[batch.labels % c.classes]

        # Gradients, then optimizer step, projection of the weights, moving averages, group DRO.
        seed_dropout(c, step)
        losses = backward(guided_objective if guided else objective, batch, weight, c.micro_batch)
        learner.update(step)
        if search is not None:
            search.update(losses, batch)
        monitor.add(losses)
        progress["step"] = step + 1
        progress["examples_trained"] += len(batch.x0) * WORLD
        progress["examples_drawn"] += selector.drawn
        clock.end_step()

        # The snapshot: copy the learner's average into the guide.
        if c.guide == "snapshot" and step + 1 == c.guide_steps:
            progress["snapshot"] = True
            progress["seconds"] = clock.read()
            with clock.paused():
                ema.copy_to(guide, c.ema[0])
                guide_path = folder / "guide.pt"
                save(guide_path, c, dict(model=denoiser, ema=ema), progress, log)

        # Log and save. With --until-better a regular log line ends selection if the learner is ahead.
        if is_log_step(c, step + 1):
            last = step + 1 == c.steps
            if selecting and c.until_better and (last or is_multiple(step + 1, c.log_every)):
                progress["selecting"] = learner_is_behind(jest)
            progress["seconds"] = clock.read()
            loss = monitor.mean(step + 1, last)
            log.append(dict(progress, kind="train", selecting=selecting and progress["selecting"], loss=loss,
                            lr=learning_rate(c, step), ln_sigma=batch.sigma.log().mean().item()))
            show_progress(folder.name, c, progress, loss)
            if monitor.bad_lines == 0 and (last or time.monotonic() - last_save >= c.save_every):
                with clock.paused():
                    save(path, c, state, progress, log, guide_path)
                last_save = time.monotonic()

    if search is not None and RANK == 0:
        search.write(folder)
    barrier()


# ------------------------------------------------------------------------------------------------------------
# The stages of a run: coreset, guide, class weights, the model. `train` also trains the guide and the proxy
# of group DRO, each in a sub-folder. Such a stage resumes, is skipped when done, and its checkpoint says what
# it cost. It has its own seed: the proxy is not compared on the draws that its reference was fitted to.

SEED_OF_STAGE = {"guide": 1_000_003, "proxy": 2_000_003}        # added to --seed


def stage_settings(c, name, **changes):
    """The settings of a stage: a model of the guide's size on uniform batches, without guide and dropout."""
    values = vars(c) | {setting: DEFAULTS[setting] for setting in SELECTION}
    values |= dict(
        seed=c.seed + SEED_OF_STAGE[name], channels=c.guide_channels, batch=c.guide_batch,
        steps=c.guide_steps, dropout=0.0, selector="uniform", reference=None, guide="none",
        guided_targets=1.0, guidance=1.0, class_weights=None, eta=DEFAULTS["eta"])
    values["file_hashes"] = {}
    if "prune_features" in c.file_hashes:
        values["file_hashes"] = dict(prune_features=c.file_hashes["prune_features"])
    return argparse.Namespace(**(values | changes))


def features_to_prune(c, dataset, pool):
    """-> (features [n, d] of the examples at `pool`, seconds). Cached features keep the seconds they took."""
    if c.prune == "random":                                     # needs no features
        return torch.empty(len(pool), 0), 0.0
    if c.prune_features == "pixels":
        start = time.monotonic()
        features = data.pixel_features(dataset, pool)
        return features, time.monotonic() - start
    network = fid.network(c.prune_features, c.device)
    features, seconds = fid.data_features(network, dataset, "features of the data")
    return features[pool], seconds


def choose_examples(c, dataset, folder):
    """-> (pool, examples to train on, held-out examples, seconds that pruning took). The first three are
    sorted indices, or None. Pruning chooses the examples inside the pool and draws coreset.png."""
    if c.kind == "tree":
        return None, None, None, 0.0
    pool, held_out = data.split_pool(dataset, c.holdout, c.imbalance, c.seed)
    if c.keep is None:
        return pool, pool, held_out, 0.0
    features, feature_seconds = features_to_prune(c, dataset, pool)
    start = time.monotonic()
    labels = None
    if dataset.labels is not None:
        labels = dataset.labels[pool]
    priority = data.priorities(features, labels, c.prune, seed=c.seed)
    kept = data.prune(priority, labels, c.keep)                 # positions in the pool
    seconds = feature_seconds + time.monotonic() - start
    if RANK == 0:
        picture = data.coreset_picture(dataset, pool, priority, kept)
        with data.writing(folder / "coreset.png") as file:
            picture.save(file, format="PNG")
    return pool, pool[kept], held_out, seconds


@contextlib.contextmanager
def locked(folder):
    """Lock the run folder while the block runs; DataError where another process trains in it. The lock ends
    with the process, even if that is killed. Without fcntl (Windows) nothing is locked."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None or RANK > 0:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise data.DataError(f"{folder}: another process trains in this folder") from None
        yield
    finally:
        os.close(handle)


def open_given_files(c):
    """Open the files that were given, so that a bad one is refused before anything is trained."""
    if c.reference:
        load_matching(file_named_by(c, "reference"), c)
    guide_path = file_named_by(c, "guide")
    if guide_path is not None and needs_guide(c):
        load_matching(guide_path, c)
    weights_path = file_named_by(c, "class_weights")
    if weights_path is not None:
        data.read_class_weights(weights_path, c.class_names)


def is_lost(folder, stage):
    """Whether a stage is gone that was there before the model of this run folder was trained."""
    return (folder / "checkpoint.pt").exists() and not (folder / stage / "checkpoint.pt").exists()


def train_guide(c, dataset, folder, pool, examples):
    """-> the checkpoint of a guide that is trained on the run's examples; None where it is gone and not
    needed. With group DRO it is the reference, too, and sees the whole pool."""
    path = folder / "guide" / "checkpoint.pt"
    if is_lost(folder, "guide"):
        if needs_guide(c):
            raise data.DataError(f"{path}: the guide of this run is gone ({without_guide(c)})")
        return None
    if c.class_weights == "dro":
        train(stage_settings(c, "guide", keep=None), dataset, folder / "guide", pool)
    else:
        train(stage_settings(c, "guide"), dataset, folder / "guide", examples)
    return path


def find_class_weights(c, dataset, folder, examples, reference_path):
    """-> (weights of the loss [classes], of mean 1 over the examples; what finding them cost). With dro a
    proxy is trained, which finds them against the reference."""
    if c.class_weights is None:
        return None, (0.0, 0)
    counts = data.class_counts(dataset, examples)
    if c.class_weights == "inverse":
        weights = data.inverse_frequency(counts)
        cost = (0.0, 0)
    else:
        path = c.class_weights
        if path == "dro":
            if is_lost(folder, "proxy"):
                raise data.DataError(f"{folder}/proxy: the proxy of this run is gone (another --out starts "
                                     "anew)")
            proxy_settings = stage_settings(c, "proxy", eta=c.eta)
            train(proxy_settings, dataset, folder / "proxy", examples, dro_reference=reference_path)
            path = folder / "proxy" / "class_weights.json"
        weights, seconds, examples_trained = data.read_class_weights(path, c.class_names)
        cost = (seconds, examples_trained)                      # of the proxy and of its reference
    return data.class_weights_of_mean_one(weights, counts).to(c.device), cost


def write_config(c, folder):
    """Write the settings for people: all to config.json, some to stderr."""
    with data.writing(folder / "config.json") as file:
        file.write(json.dumps(vars(c), indent=1).encode())
    data.say(f"{folder}: {c.channels} channels, {c.steps:,} steps of {c.batch}, {c.selector} batches, "
             f"guide {c.guide}, {c.eval_samples:,} samples scored")


def run_stages(c, dataset, folder):
    """Coreset, guide, class weights, and the model with its evaluation."""
    pool, examples, held_out, prune_seconds = choose_examples(c, dataset, folder)
    evaluation = None
    if c.eval_samples > 0 and RANK == 0:
        evaluation = fid.Evaluation(c, dataset, folder, held_out)
    if RANK == 0:
        barrier()                                               # the others read the caches that it filled
    open_given_files(c)
    if RANK == 0:
        write_config(c, folder)

    # What else is trained for the model.
    guide_path = file_named_by(c, "guide")
    if c.guide == "train":
        guide_path = train_guide(c, dataset, folder, pool, examples)
    class_weights, weights_cost = find_class_weights(c, dataset, folder, examples, guide_path)

    # What it cost. A guide that is used only in sampling counts only for guided samples. With dro the guide's
    # cost is in that of the class weights.
    costs = [(prune_seconds, 0), weights_cost]
    trained_with = set()
    if c.reference:
        trained_with.add(file_named_by(c, "reference"))
    if c.class_weights != "dro" and guide_path is not None:
        if needs_guide_to_train(c):
            trained_with.add(guide_path)
        elif evaluation is not None and c.guidance != 1:
            evaluation.guide_costs = cost_of(guide_path)
    costs += [cost_of(path) for path in trained_with]

    train(c, dataset, folder, examples, guide_path, class_weights,
          evaluation=evaluation, cost=add_costs(costs))
    if RANK == 0:
        names = sorted(path.name for path in folder.iterdir())
        data.say(f"wrote {folder}/: {', '.join(names)}", file=sys.stdout)


def main(argv=None):
    """Train as the flags say, and resume where the run folder holds a checkpoint."""
    typed = typed_flags(argv)
    join(typed.get("device", DEFAULTS["device"]))
    if RANK > 0:
        barrier()                                               # until process 0 has filled the caches
    c, dataset = settings(typed)
    if c.kind == "tree" and c.device == "cpu":
        torch.set_num_threads(1)                                # its matrices are too small for two
    folder = Path(c.out)
    with locked(folder):
        if RANK == 0:
            data.remove_leftovers(folder)
        run_stages(c, dataset, folder)
    if WORLD > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    data.command(main, "give --micro-batch, else a smaller --batch with another --out, or --device cpu")
