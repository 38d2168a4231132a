"""Data: the 2-D tree, image and latent data sets, batches that are a function of (seed, step), coreset
pruning, class weights by distributionally robust optimization, and pictures.

Pruning then reweighting: https://arxiv.org/abs/2409.19128. The tree: https://arxiv.org/abs/2406.02507. First
come the helpers for files and flags that every program uses. What a data set holds, without training on it:

    python -c "import data; print(*data.load('data/cifar10', size=16).report, sep='\\n')"
"""
import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import pickle
import sys
import tempfile
import time
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError


# ------------------------------------------------------------------------------------------------------------
# Files. Whatever goes wrong while one is read becomes one DataError that names it; one that is written
# appears whole or not at all.

class DataError(ValueError):
    """What a program's user can mend: one printable line that names the file or flag and says why."""

    def __str__(self):
        return "".join(c if c.isprintable() else " " for c in super().__str__())


@contextlib.contextmanager
def reading(path, what):
    """Any exception inside becomes a DataError, "PATH: not WHAT, why"."""
    try:
        yield
    except (DataError, torch.OutOfMemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or path}: no such file") from None
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not {what}, {why[:200]}") from None


@contextlib.contextmanager
def writing(path):
    """A binary file that is renamed to `path` when the block ends well, and removed when it does not."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                    # torch.save: a full disk is a RuntimeError
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be written, {why[:80]}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def output(path):
    """Make the folder in which `path` is to be written; OSError where nothing can be. To be called before the
    work, not after it."""
    folder = Path(path).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    if os.path.isdir(path):
        raise DataError(f"{path}: is a folder, a file is to be written")


# ------------------------------------------------------------------------------------------------------------
# Flags and programs. A flag's range stands on the flag; argparse then names it.

def number(kind, interval):
    """An argparse type: int or float (`kind`) in an interval, as "[1, inf)" or "(0, 1]"; NaN is in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def parse(text):
        """The number that `text` says; ArgumentTypeError outside of the interval."""
        value = kind(text)
        above = value > low or value == low and interval[0] == "["
        below = value < high or value == high and interval[-1] == "]"
        if not (above and below and abs(value) < 2 ** 62):      # more than that fits no tensor
            raise argparse.ArgumentTypeError(f"{text} is not in {interval}")
        return value
    parse.__name__ = kind.__name__                              # "invalid int value: 'x'"
    return parse


def device(text):
    """An argparse type: the name of a torch device that is there. Of several processes each takes its own."""
    try:
        where = torch.device(text)
        if where.type == "cuda":
            where = torch.device("cuda", where.index or int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(where)                        # before the first call that would take cuda:0
        elif where.type != "cpu":
            raise RuntimeError("cpu and cuda are supported")
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {str(error).splitlines()[0][:80]}") from None
    return str(where)


def path(text):
    """An argparse type: a path in which ~ is the home folder."""
    return os.path.expanduser(text)


def parser(description, usage):
    """An ArgumentParser whose help shows every default; flags are not abbreviated."""
    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default in (None, False) else super()._get_help_string(action)
    return argparse.ArgumentParser(description=description.split("\n\n")[0], usage=f"%(prog)s {usage}",
                                   allow_abbrev=False, formatter_class=lambda prog: Help(prog, width=110))


def parse(parser, argv=None):
    """-> (the arguments in argv or the command line, {name: value} of those that were given)."""
    args = parser.parse_args(argv)
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args)))))
    return args, {name: value for name, value in given.items() if value is not None}


def refuse_unused(given, rows):
    """DataError for a flag that would do nothing; rows of (whether what it needs is there, what, flags)."""
    for there, what, flags in rows:
        for flag in flags.split():
            if given.get(flag) and not there:
                raise DataError(f"--{flag.replace('_', '-')} needs {what}")


def command(run):
    """Call run(); what the user can mend becomes one line on stderr and exit status 2, Ctrl-C status 130."""
    for terminal in (sys.stdout, sys.stderr):
        terminal.reconfigure(errors="backslashreplace")          # a path may hold what the terminal cannot show
    try:
        return run()
    except torch.OutOfMemoryError:
        why, status = "error: out of device memory: smaller --batch or --micro-batch, or --device cpu", 2
    except (DataError, OSError) as error:
        why, status = f"error: {error}", 2
    except KeyboardInterrupt:
        why, status = "stopped; a training run goes on with the same command", 130
    print(why, file=sys.stderr)
    raise SystemExit(status)


def progress(text, last=False, shown=[-math.inf]):
    """Show `text` on stderr: rewritten in place on a terminal, else every ten seconds and the `last`."""
    now, terminal = time.monotonic(), sys.stderr.isatty()
    if last or now - shown[0] > (0.5 if terminal else 10):
        shown[0] = now
        print(text.ljust(110) if terminal else text, end="\r" if terminal and not last else "\n",
              file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------
# A random generator for one purpose at one step. Everything random is a function of (seed, step, name), so
# that resuming replays nothing and two runs with one seed see the same data and noise.

def stream(seed, step, name, device="cpu"):
    """torch.Generator on `device`, seeded by a hash of (seed, step, name); name is e.g. "data" or "noise"."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


# ------------------------------------------------------------------------------------------------------------
# The 2-D toy density of the autoguidance paper: a tree of branches, eight Gaussians along each, drawn by a
# recursion on one random stream. Being a Gaussian mixture, it has an exact density, score and denoiser at
# every noise level, so that what a model learns can be compared with what it should have learned.

class Tree:
    """Mixture of 127 branches of eight Gaussians a class in the plane; classes = "A", "B" or "AB"."""
    kind, shape, classes, class_names = "tree", (2,), 0, ()

    def __init__(self, classes="A", device="cpu"):
        branches, random = [], np.random.RandomState(2)
        for name, angle in (("A", np.pi / 4), ("B", np.pi * 5 / 4)):        # B continues A's random stream
            grown = _grow(random, np.array([0.0030, 0.0325]), angle)
            branches += grown if name in classes else []
        weight, mean, cov = (np.stack(part) for part in zip(*branches))     # [K], [K, 8, 2], [K, 2, 2]
        weight = weight / (8 * weight.sum())                                # of each Gaussian of the branch
        lam, axes = np.linalg.eigh(cov)                                     # cov = axes diag(lam) axes^T
        middle, half = mean.mean(1), (mean[:, 7] - mean[:, 0]) / 2          # [K, 2]
        self.parameters = dict(                                             # float64; K branches
            cumulative=np.cumsum(weight.repeat(8)), mean=mean.reshape(-1, 2),           # of 8 K Gaussians
            root=(axes * np.sqrt(lam)[:, None, :]).repeat(8, 0),            # [8 K, 2, 2]
            axes=axes.transpose(2, 1, 0), lam=lam.T[:, None],               # [axis, dim, K], [axis, 1, K]
            middle=np.einsum("kda,kd->ak", axes, middle)[:, None],          # in the branch's own axes
            half=np.einsum("kda,kd->ak", axes, half)[:, None], log_weight=np.log(weight))
        self.fingerprint = hashlib.sha256(np.concatenate([mean.ravel(), cov.ravel()]).tobytes()).hexdigest()
        self.report = [f"2-D tree, class {classes}: {mean.size // 2:,} Gaussians, fresh points every step"]
        self.to(device)

    def to(self, device):
        """Computes on `device` from now on; returns self."""
        self.device, self._cast = torch.device(device), {}
        return self

    def _p(self, name, dtype=torch.float32):
        if (name, dtype) not in self._cast:
            values = np.ascontiguousarray(self.parameters[name])
            self._cast[name, dtype] = torch.from_numpy(values).to(dtype).to(self.device)
        return self._cast[name, dtype]

    def sample(self, n, generator=None):
        """n points of the density: float32 [n, 2]. Three uniforms a point: which Gaussian, and by Box-Muller
        two normals. On the CPU a larger draw begins with the points of a smaller one."""
        u = torch.rand(n, 3, generator=generator, device=self.device)                   # [n, 3]
        index = torch.searchsorted(self._p("cumulative"), u[:, 0].contiguous(), right=True)
        index = index.clamp(max=len(self.parameters["mean"]) - 1)                       # rounding at u = 1
        radius, angle = (-2 * torch.log1p(-u[:, 1])).sqrt(), 2 * math.pi * u[:, 2]
        z = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)            # [n, 2] normal
        return self._p("mean")[index] + (self._p("root")[index] * z[:, None, :]).sum(2)

    def _evaluate(self, x, sigma):
        """Log-density [n] and its gradient [n, 2] at x [n, 2]. In a branch's own axes the covariance plus
        sigma^2 I is diagonal and shared by its Gaussians, which lie at middle + tau half, tau = -1 ... 1. So
        an exponent is base + B tau - C tau^2 / 2, with a branch's coefficients: one product gives all."""
        axes, lam, middle, half, log_weight = (
            self._p(name, x.dtype) for name in ("axes", "lam", "middle", "half", "log_weight"))
        tau = torch.linspace(-1, 1, 8, dtype=x.dtype, device=x.device)
        powers = torch.stack([torch.ones_like(tau), tau, -tau.square() / 2], dim=1)     # [8, 3]
        square = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1).expand(len(x), 1) ** 2
        rows, logp, score = 128 if x.device.type == "cpu" else 32768, [], []    # 128 fit a CPU's cache
        for x, square in zip(x.split(rows), square.split(rows)):
            a = x @ axes - middle                                                       # [axis, n, K]
            precision = (lam + square).reciprocal()                                     # [axis, n, K]
            pull, slope = precision * a, precision * half
            base = log_weight + 0.5 * (precision.prod(0).log() - (pull * a).sum(0))
            base_B_C = torch.stack([base, (pull * half).sum(0), (slope * half).sum(0)])
            exponent = (powers / math.log(2) @ base_B_C.flatten(1)).view(8, *base.shape)        # [8, n, K]
            most = exponent.amax(0).amax(1, keepdim=True)                               # [n, 1]
            share = exponent.sub_(most).clamp_(min=-115).exp2_()                # slow where it underflows
            S0, S1 = (powers[:, :2].T @ share.flatten(1)).view(2, *base.shape)          # sum share, share tau
            total = S0.sum(1, keepdim=True)
            logp.append((most + total.log2()) * math.log(2) - math.log(2 * math.pi))
            score.append((axes @ (slope * S1 - pull * S0).mT).sum(0).mT / total)
        return torch.cat(logp)[:, 0], torch.cat(score)

    @torch.no_grad()
    def logp(self, x, sigma=0):
        """Log-density [n] at x [n, 2] of the tree convolved with N(0, sigma^2 I); sigma a number or [n]."""
        return self._evaluate(x, sigma)[0]

    @torch.no_grad()
    def score(self, x, sigma=0):
        """Gradient of `logp` with respect to x: [n, 2]."""
        return self._evaluate(x, sigma)[1]

    def denoise(self, x, sigma, labels=None):
        """The exact denoiser E[x0 | x] = x + sigma^2 score(x; sigma) (EDM, eq. 3): [n, 2]."""
        square = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1) ** 2
        return x + square * self.score(x, sigma)


# ------------------------------------------------------------------------------------------------------------
# One branch of the tree and all that grows from it: eight Gaussians along a line, then two child branches,
# each to its end. The order of the random draws is part of the definition.

def _grow(random, position, angle, depth=0):
    scale = np.array([1.3136, 1.3844])
    u = np.array([np.cos(angle), np.sin(angle)])
    length = 0.292 * 0.8 ** depth * (0.2 * random.randn() + 1)
    h, q, t = 0.2 * 0.8 ** depth / length, 0.06 * length * scale, np.linspace(0.07, 0.93, 8)
    cov = (np.outer(u, u) + h ** 2 * (np.eye(2) - np.outer(u, u))) * np.outer(q, q)
    branches = [(length * 0.5 ** depth, (position + u * length * t[:, None]) * scale, cov)]
    for sign in (1, -1):
        child = angle + sign * 0.7 ** depth * (0.2 * random.randn() + 1)
        if depth + 1 < 7:
            branches += _grow(random, position + u * length, child, depth + 1)
    return branches


# ------------------------------------------------------------------------------------------------------------
# A set of images or latents: one array, on the training device where it fits. A batch of it is an index.

@dataclass
class Dataset:
    x: torch.Tensor                             # uint8 images or float latents [N, C, H, W]
    labels: torch.Tensor = None                 # int64 [N] on the host; None = unlabelled
    class_names: tuple = ()
    kind: str = "image"                         # "image" | "latent"
    mean: tuple = (127.5,)                      # per channel, or one for all
    std: tuple = (63.75,)
    fingerprint: str = ""                       # hash of the content, equal for equal data wherever it lies
    report: tuple = ()                          # what was found, lines of text

    def __len__(self):
        return len(self.x)

    @property
    def shape(self):
        return tuple(self.x.shape[1:])

    @property
    def classes(self):
        return len(self.class_names)

    def take(self, index, device="cpu"):
        """The examples at `index` (on the host) as the network sees them: float32 [n, C, H, W]."""
        return scale(put(self.x[put(index, self.x.device)], device), self.mean, self.std)

    def to(self, device):
        """Moves the array to `device` (a GPU: if it takes less than half of what is free); returns self."""
        if torch.device(device).type != "cuda" or self.x.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.x = self.x.to(device)
        return self


def put(tensor, device):
    """A tensor on `device`; from host memory to a GPU without waiting."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def scale(x, mean, std):
    """Raw examples [n, C, H, W] -> float32 (x - mean) / std * 0.5: pixels in [-1, 1], latents of std 0.5."""
    mean, factor = torch.tensor(mean).view(-1, 1, 1), 0.5 / torch.tensor(std).view(-1, 1, 1)
    return (x.float() - put(mean, x.device)) * put(factor, x.device)


def decode(x, config):
    """`scale` inverted for what a denoiser of this config samples: uint8 images, raw latents, or points."""
    if config["kind"] == "tree":
        return x
    mean, std = (torch.tensor(config[name]).reshape(-1, 1, 1).to(x.device) for name in ("mean", "std"))
    x = x.float() * 2 * std + mean
    return x.round().clip(0, 255).to(torch.uint8) if config["kind"] == "image" else x


def classes_in_turn(shares, index):
    """The class of the samples with these numbers, int64 [n]: of K equal `shares` each in turn, of others in
    their proportions in any long stretch. A turn asks for K quantiles, moved from turn to turn."""
    turn, place = (index // len(shares)).double(), index % len(shares)
    quantile = (place + (turn + 0.5) * 0.6180339887498949 % 1) / len(shares)            # the golden ratio
    ends = torch.tensor(shares, dtype=torch.float64).cumsum(0)
    return torch.searchsorted(ends, quantile).clamp(max=len(shares) - 1)


# ------------------------------------------------------------------------------------------------------------
# Batches by number: batches[step] depends on (seed, step) alone, and on a CPU a uniform batch of b is the
# beginning of that step's super-batch of B (for multiples of 16). What is small is drawn on the host and
# copied without waiting, the noise on the device. A mirrored image of class c has label c + classes, so that
# flips do not leak.

class Batch(typing.NamedTuple):
    x0: torch.Tensor                            # float32 [n, ...]
    noise: torch.Tensor                         # unit normal [n, ...]
    sigma: torch.Tensor                         # noise level [n]
    labels: torch.Tensor                        # int64 [n] or None
    target: torch.Tensor                        # what D(x; sigma) is to be [n, ...]

    @property
    def x(self):
        """x0 + sigma noise [n, ...]."""
        return self.x0 + self.sigma.view(-1, *[1] * (self.x0.ndim - 1)) * self.noise

    def rows(self, index):
        """The batch of some of its examples; `index` is a slice or int64 [k]."""
        return Batch(*(None if part is None else part[index] for part in self))


class Batches:
    def __init__(self,
        dataset,                # Dataset or Tree, moved to its device beforehand
        n,                      # examples a batch
        seed,                   # integer
        device="cpu",           # where the batch is wanted
        pool=None,              # indices [M] of the examples to draw from; None = all
        flip=False,             # mirror half of the images, as classes of their own
        targets="sample",       # "sample" = x0 itself; "exact" = E[x0 | x], which the tree knows
        P_mean=-1.2,            # of ln sigma
        P_std=1.2,
        rows=slice(None),       # the rows of the n that are wanted here (several processes)
    ):
        self.dataset, self.n, self.seed, self.device = dataset, n, seed, torch.device(device)
        self.flip, self.targets, self.P_mean, self.P_std, self.rows = flip, targets, P_mean, P_std, rows
        if dataset.kind != "tree":
            self.pool = torch.arange(len(dataset)) if pool is None else pool

    def __getitem__(self, step):
        """The Batch of this step, drawn with replacement."""
        if self.dataset.kind == "tree":
            x0 = self.dataset.sample(self.n, self._draw(step, "data", self.dataset.device))
            return self._noised(x0[self.rows], None, step)
        drawn = torch.randint(len(self.pool), (self.n,), generator=self._draw(step, "data"))
        return self.of(self.pool[drawn], step)

    def of(self, index, step):
        """The Batch of the examples at `index` int64 [n], with flips, noise levels and noise of this step."""
        data, labels, index = self.dataset, None, index[self.rows]
        x0 = data.take(index, self.device)
        if data.labels is not None:
            labels = data.labels[index]
        if self.flip:
            mirrored = torch.randint(2, (self.n,), generator=self._draw(step, "flip"))[self.rows]   # 0 or 1
            labels = mirrored if labels is None else labels + mirrored * data.classes
            x0 = torch.where(put(mirrored, self.device)[:, None, None, None] == 1, x0.flip(3), x0)
        return self._noised(x0, None if labels is None else put(labels, self.device), step)

    def _noised(self, x0, labels, step):
        sigma = self.P_mean + self.P_std * torch.randn(self.n, generator=self._draw(step, "sigma"))[self.rows]
        sigma, shape = put(sigma.exp(), self.device), (self.n, *self.dataset.shape)
        noise = torch.randn(shape, generator=self._draw(step, "noise", self.device), device=self.device)
        batch = Batch(x0, noise[self.rows], sigma, labels, x0)
        if self.targets == "exact":
            batch = batch._replace(target=self.dataset.denoise(batch.x, sigma))
        return batch

    def _draw(self, step, name, device="cpu"):
        return stream(self.seed, step, name, device)


# ------------------------------------------------------------------------------------------------------------
# Loading. Whatever the source, it becomes one array in the cache folder ($DATA_CACHE, else
# ~/.cache/data-curation), which later runs map into memory. Nothing is guessed: what is ambiguous is refused.

CACHE_VERSION = 5                               # raise it when what is cached changes
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "unlabeled", "unlabelled"}
CIFAR_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def load(path, size=None):
    """The images or latents at `path` as a Dataset. Raises DataError, one line, for what cannot be read.

    path    a folder or .zip with one sub-folder a class (or none: unlabelled), the same with EDM's
            dataset.json on top, the folder cifar-10-batches-py, or an .npz with `images` uint8 [N, 3, H, W]
            or [N, H, W, 3], or `latents` float [N, C, H, W] (with optional `mean`, `std` [C]), and optional
            `labels` [N] and `class_names` [K]
    size    center-crop to a square and resize (Lanczos) to this many pixels; None = as they are
    """
    path, cache = Path(path), cache_folder()
    with reading(path, "a data set"):
        files = [path] if path.is_file() else sorted(_walk(path))
        stamp = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = hashlib.sha256(repr((CACHE_VERSION, str(path.resolve()), size, stamp)).encode()).hexdigest()
        cached = cache / f"{key[:32]}.pt"
        if not cached.exists():
            output(cached)
            is_npz = path.suffix.lower() == ".npz"
            found = _npz(path, size) if is_npz else _images(_members(path, files), size)
            with writing(cached) as file:
                torch.save(vars(found), file)
    with reading(cached, "a cached data set (delete it)"):
        return Dataset(**torch.load(cached, mmap=True, weights_only=True))      # no change reaches the file


def cache_folder():
    """Where data sets and their features are kept: $DATA_CACHE, else ~/.cache/data-curation."""
    with reading("~", "a home folder for the cache (set DATA_CACHE)"):
        return Path(os.environ.get("DATA_CACHE") or Path.home() / ".cache" / "data-curation")


def _dataset(x, labels, names=None, report=(), **more):
    """Dataset of arrays x [N, C, H, W] and labels [N] or None. The classes are the labels that occur, in
    order; `names` [K] calls them (None: by their numbers)."""
    x, count = np.ascontiguousarray(x), "no labels"
    found = Dataset(torch.from_numpy(x), **more)
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (len(x),) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError(f"`labels` is {labels.dtype} {list(labels.shape)}, "
                             f"wanted numbers from 0 on [{len(x)}]")
        if names and labels.max() >= len(names):
            raise ValueError(f"label {labels.max()} is none of {len(names)} class names")
        present, labels, counts = np.unique(labels, return_inverse=True, return_counts=True)
        found.class_names = [names[c] if names else str(c) for c in present]
        found.labels = torch.from_numpy(labels.astype(np.int64))
        count = (f"{len(present):,} classes of {counts.min():,} to {counts.max():,}: "
                 + ", ".join(found.class_names[:10]) + ", ..." * (len(present) > 10))
    c, h, w = x.shape[1:]
    found.report = [f"{len(x):,} {found.kind}s of {c}x{h}x{w}", count, *report]
    digest = hashlib.sha256(repr((x.shape, found.kind, found.class_names, found.mean, found.std)).encode())
    digest.update(x)
    digest.update(b"" if labels is None else found.labels.numpy())
    found.fingerprint = digest.hexdigest()
    return found


# ------------------------------------------------------------------------------------------------------------
# Images: one list of names and read functions, be they in a folder or a zip. What is found is read, counted
# in the report, or an error; only hidden entries are not there.

def _hidden(part):
    return part.startswith((".", "@")) or part == "__MACOSX"


def _walk(path):
    """All files below a folder but hidden ones; links are followed, a folder that cannot be read raises."""
    def stop(error):
        raise error
    for folder, folders, names in os.walk(path, followlinks=True, onerror=stop):
        folders[:] = [name for name in folders if not _hidden(name)]
        yield from (Path(folder, name) for name in names if not _hidden(name))


def _members(path, files):
    """{name with slashes: function that returns the file's bytes} of a folder's files or of a zip."""
    if path.is_dir():
        return {file.relative_to(path).as_posix(): file.read_bytes for file in files}
    archive = zipfile.ZipFile(path)
    found = {info.filename.replace("\\", "/"): functools.partial(archive.read, info)
             for info in archive.infolist() if not info.filename.endswith(("/", "\\"))}
    return {name: read for name, read in found.items() if not any(map(_hidden, name.split("/")))}


def _images(members, size):
    """Dataset of the images among the members, labelled by dataset.json or by folder; or of CIFAR-10."""
    if batches := [name for name in sorted(members) if name.rpartition("/")[2] in CIFAR_BATCHES]:
        return _cifar([members[name] for name in batches], size, len(members) - len(batches))
    images = sorted(name for name in members if name.lower().endswith(IMAGES))
    listings = [name for name in members if name.rpartition("/")[2] == "dataset.json"]
    if not images or len(listings) > 1:
        raise ValueError(f"it holds {len(images)} images ({', '.join(IMAGES[:4])} ...) and {len(listings)} "
                         "dataset.json: give a folder with images and one at most")
    top = os.path.commonpath([os.path.dirname(name) for name in images + listings])
    below = {name: name[len(top):].lstrip("/") for name in images}      # without what all share on top
    if listings and os.path.dirname(listings[0]) != top:
        raise ValueError(f"{listings[0]} does not lie on top of all images")
    if listings:
        label_of, names = _by_listing(json.loads(members[listings[0]]()), below), None
    else:
        label_of = _by_folder(below)
        names = sorted(set(label_of.values()) - {None})
        label_of = {name: None if c is None else names.index(c) for name, c in label_of.items()}
    order = sorted(images, key=lambda name: (label_of[name] or 0, name))
    labels = None if label_of[order[0]] is None else [label_of[name] for name in order]
    others = len(members) - len(images)
    return _dataset(_decoded({name: members[name] for name in order}, size), labels, names,
                    [f"{others:,} other files left out"] * (others > 0))


def _by_folder(below):
    """{name: class}: the first folder; None for images without one."""
    folders, splits = {name: rest.split("/")[:-1] for name, rest in below.items()}, {}
    for parts in folders.values():
        for depth, part in enumerate(parts):
            if part.lower() in SPLITS:
                splits.setdefault("/".join(parts[:depth]), set()).add(part)
    for parent, names in splits.items():
        if len(names) > 1:
            raise ValueError(f"{', '.join(sorted(names))} {'in ' * bool(parent)}{parent} look like splits, "
                             "not like classes: give one of these folders")
    if len({bool(parts) for parts in folders.values()}) > 1:
        raise ValueError("images lie both beside and inside of class folders")
    return {name: parts[0] if parts else None for name, parts in folders.items()}


def _by_listing(listing, below):
    """{name: class number or None} by EDM's dataset.json: {"labels": [["00000/img00000000.png", 3], ...]}, or
    null for no labels."""
    if listing["labels"] is None:
        return dict.fromkeys(below)
    listed = {name.replace("\\", "/"): label for name, label in listing["labels"]}
    for name in sorted(listed.keys() ^ set(below.values())):
        raise ValueError(f"{name} is {'missing' if name in listed else 'not listed'} (dataset.json)")
    for name, label in listed.items():
        if type(label) is not int or label < 0:
            raise ValueError(f"{name} has the label {label}, wanted a class number (dataset.json)")
    return {name: listed[rest] for name, rest in below.items()}


def _decoded(images, size):
    """uint8 [N, 3, H, W] of {name: read function}, decoded by threads (Pillow lets go of Python's lock)."""
    names, x = list(images), None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for i, pixels in enumerate(pool.map(lambda name: _decode(name, images[name], size), names)):
            x = np.empty((len(names), *pixels.shape), np.uint8) if x is None else x
            if pixels.shape != x.shape[1:]:
                raise ValueError(f"sizes differ, give --size: {names[0]}, {names[i]}")
            x[i] = pixels
            if len(names) > 10_000:
                progress(f"reading images: {i + 1:,} of {len(names):,}", last=i + 1 == len(names))
    return x


def _decode(name, read, size):
    """One image, turned as its camera was held, on white where it is transparent: uint8 [3, H, W]."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(read())))
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {image.mode} have no known range, give 8 or 16 bits")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return _resize(image.convert("RGB"), size)
    except Exception as error:
        why = "cannot identify image file" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{name}: {why}") from None


def _resize(image, size):
    """Center-crops a Pillow RGB image to a square and resizes it to `size` pixels: uint8 [3, H, W]."""
    if size and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.LANCZOS)
    return np.asarray(image).transpose(2, 0, 1)


def _resized(x, size):
    """`_resize` of an array uint8 [N, 3, H, W]."""
    if size and x.shape[2:] != (size, size):
        x = np.stack([_resize(Image.fromarray(image), size) for image in x.transpose(0, 2, 3, 1)])
    return x


# ------------------------------------------------------------------------------------------------------------
# CIFAR-10's python batches are pickles, and a pickle can run code. This unpickler knows the four names that
# numpy arrays of old need, and runs nothing else.

class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        """What a name in the pickle stands for; ValueError for all names but four."""
        if (module, name) == ("_codecs", "encode"):
            return lambda text, _: text.encode("latin1")
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            return getattr(np._core.multiarray if name == "_reconstruct" else np, name)
        raise ValueError(f"refused, it wants to run {module}.{name}")


def _cifar(batches, size, others):
    """Dataset of the five training batches, a list of read functions."""
    if len(batches) != 5:
        raise ValueError(f"{len(batches)} of CIFAR-10's 5 training batches: give a folder with each once")
    parts = [_Unpickler(io.BytesIO(read()), encoding="bytes").load() for read in batches]
    x = np.concatenate([part[b"data"] for part in parts])
    if x.dtype != np.uint8:
        raise ValueError(f"CIFAR-10's data is {x.dtype}, wanted uint8")
    labels = np.concatenate([part[b"labels"] for part in parts])
    return _dataset(_resized(x.reshape(-1, 3, 32, 32), size), labels, CIFAR_CLASSES,
                    [f"CIFAR-10's 5 training batches, {others} other files left out"])


# ------------------------------------------------------------------------------------------------------------
# An .npz file of images or latents.

def _npz(path, size):
    """Dataset of its `images` or `latents`, with `labels`, `class_names`, `mean` and `std`, where there."""
    with np.load(path, allow_pickle=False) as file:
        kind = "latent" if "latents" in file else "image"
        x, labels = file[f"{kind}s"], file["labels"] if "labels" in file else None
        names = file["class_names"] if "class_names" in file else None
        moments = np.stack([file["mean"], file["std"]]) if "mean" in file and "std" in file else None
    if x.ndim != 4 or not x.size or not (x.dtype.kind == "f" if kind == "latent" else x.dtype == np.uint8):
        raise ValueError(f"`{kind}s` is {x.dtype} {list(x.shape)}, "
                         "wanted uint8 images or float latents [N, C, H, W]")
    if names is not None:
        if names.ndim != 1 or names.dtype.kind != "U" or len(set(names.tolist())) < len(names):
            raise ValueError(f"`class_names` is {names.dtype} {list(names.shape)}, wanted K different texts")
        names = names.tolist()
    if kind == "image":
        if 3 not in (x.shape[1], x.shape[3]):
            raise ValueError(f"`images` is {list(x.shape)}, wanted three channels")
        x = x if x.shape[1] == 3 else x.transpose(0, 3, 1, 2)
        return _dataset(_resized(x, size), labels, names)
    if size or not np.isfinite(x).all():
        raise ValueError("--size is for images" if size else "`latents` holds NaN or infinite values")
    x = x.astype(np.float16 if x.dtype.itemsize == 2 else np.float32)
    if moments is None:
        moments = np.stack([x.mean((0, 2, 3), np.float64), x.std((0, 2, 3), np.float64).clip(1e-6)])
    if moments.shape[1:] != x.shape[1:2] or not np.isfinite(moments).all() or moments[1].min() <= 0:
        raise ValueError(f"`mean`, `std` are {list(moments.shape)}, wanted [{x.shape[1]}], std above 0")
    return _dataset(x, labels, names, kind=kind, mean=moments[0].tolist(), std=moments[1].tolist())


# ------------------------------------------------------------------------------------------------------------
# A long-tailed subset: with K classes, class c keeps n_max R^(-c / (K - 1)) examples, R = head over tail.

def long_tail(labels, ratio, seed=0):
    """Sorted indices (LongTensor) of such a subset of labels [N], random within a class; ratio R >= 1. n_max
    is the most for which every class that there is has enough."""
    counts, kept = torch.bincount(labels).tolist(), []
    K = len(counts)
    most = min(n * ratio ** (c / max(K - 1, 1)) for c, n in enumerate(counts) if n)
    for c in range(K):
        members = torch.nonzero(labels == c)[:, 0]
        n = max(1, round(most * ratio ** (-c / max(K - 1, 1))))
        kept.append(members[torch.randperm(len(members), generator=stream(seed, c, "long tail"))[:n]])
    return torch.cat(kept).sort().values


# ------------------------------------------------------------------------------------------------------------
# Coreset pruning: priorities within each class, and the best fraction of each class is kept.
#   gaussian    log-density under the class's Gaussian (instance selection, https://arxiv.org/abs/2007.15255)
#   knn         minus the distance to the k-th nearest neighbour of the class
#   moderate    closeness of the distance from the class's median feature to the median of these distances
#   random      a random number

PRUNING = ("gaussian", "knn", "moderate", "random")


def prune(priority, labels, keep):
    """Sorted kept indices (LongTensor) by priority [N] and labels [N] (None: one class). `keep` in (0, 1] is
    the fraction that is kept of each class, at least one example; of equals the first."""
    kept = [members[:max(1, round(keep * len(members)))] for members in ranked(priority, labels)]
    return torch.cat(kept).sort().values


def ranked(priority, labels):
    """The indices of each class that has examples, the best first."""
    return [members[torch.sort(priority[members], descending=True, stable=True).indices]
            for members in of_classes(labels, len(priority))]


def priorities(features, labels, how="gaussian", k=5, seed=0):
    """What is kept first: float64 [N], comparable within a class only, of features [N, d] and labels [N] or
    None. `how` is one of PRUNING; k is for knn, the seed for random."""
    if how == "random":
        return torch.rand(len(features), generator=stream(seed, 0, "prune"), dtype=torch.float64)
    function = dict(gaussian=_gaussian, knn=_knn, moderate=_moderate)[how]
    priority = torch.empty(len(features), dtype=torch.float64)
    for members in of_classes(labels, len(features)):
        x = features[members].double()
        priority[members] = function(x - x.mean(0), k).cpu()
    return priority


def of_classes(labels, n):
    """The indices of each class that has examples, sorted."""
    labels = torch.zeros(n, dtype=torch.int64) if labels is None else labels
    counts = [count for count in torch.bincount(labels).tolist() if count]
    return torch.split(labels.argsort(stable=True), counts)


def _gaussian(x, k):
    """Log-density of centered x [n, d]; the covariance is shrunk towards a multiple of the identity by OAS
    (https://arxiv.org/abs/0907.4698), which keeps it invertible for n < d."""
    (n, d), S = x.shape, x.T @ x / len(x)                                               # S [d, d]
    trace, square = S.trace(), S.square().sum()                                         # tr S, tr S^2
    spread = ((n + 1 - 2 / d) * (square - trace ** 2 / d)).clamp(min=1e-300)            # 0 if S ~ I
    rho = (((1 - 2 / d) * square + trace ** 2) / spread).clamp(1e-6, 1)
    floor = rho * (trace / d).clamp(min=1e-300)                 # above 0 even if all are alike
    S = (1 - rho) * S + floor * torch.eye(d, dtype=S.dtype, device=S.device)
    return torch.distributions.MultivariateNormal(torch.zeros_like(S[0]), S).log_prob(x)


def _knn(x, k):
    return -neighbour_distance(x, min(k, len(x) - 1))


def _moderate(x, k):
    distance = (x - x.median(0).values).norm(dim=1)
    return -(distance - distance.median()).abs()


def neighbour_distance(x, k, block=2048):
    """The distance [n] from each of x float64 [n, d] to its k-th nearest neighbour in x; 0 = to itself."""
    return torch.cat([torch.cdist(rows, x).kthvalue(k + 1).values for rows in x.split(block)])


# ------------------------------------------------------------------------------------------------------------
# Features that need no network: principal components of the images averaged down to 8x8.

def pixel_features(dataset, index, dims=64):
    """float32 [n, min(dims, 64 C)], on the CPU, of the examples at `index` [n] of a Dataset."""
    x = torch.cat([torch.nn.functional.adaptive_avg_pool2d(dataset.take(rows), 8).flatten(1)
                   for rows in index.split(1024)])                                      # [n, 64 C]
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T.double() @ x.double()).eigenvectors.flip(1)[:, :dims]  # largest first
    return x @ axes.float()


# ------------------------------------------------------------------------------------------------------------
# Class weights by group DRO, in DoReMi's form (https://arxiv.org/abs/2305.10429, algorithm 1): with e_c the
# mean over class c of max(loss(proxy) - loss(reference), 0), alpha_c <- alpha_c exp(eta e_c), normalized, and
# mixed with the uniform weights. The result is the running mean of alpha.

class GroupDRO(torch.nn.Module):
    """`weights` [classes] and `mean` [classes], their running mean, both of sum 1. A class with fewer than
    `min_count` examples in a batch keeps its last e_c: with 0 instead, it would sink for being rare."""

    def __init__(self, classes, eta=0.01, smoothing=1e-3, min_count=2):
        super().__init__()
        self.eta, self.smoothing, self.min_count = eta, smoothing, min_count
        self.register_buffer("log_weights", torch.full((classes,), -math.log(classes)))
        self.register_buffer("excess", torch.zeros(classes))
        self.register_buffer("total", torch.zeros(classes))
        self.register_buffer("steps", torch.zeros([]))

    def totals(self, excess, labels):
        """[2, classes]: sums of the clipped excess losses [B] of examples with labels int64 [B]; counts."""
        excess = excess.float().clamp(min=0).nan_to_num(nan=0, posinf=0)
        totals = excess.new_zeros(2, len(self.excess))
        return totals.index_add(1, labels, torch.stack([excess, torch.ones_like(excess)]))

    @torch.no_grad()
    def update(self, totals):
        """One step from the `totals` of a batch."""
        total, count = totals
        self.excess = torch.where(count >= self.min_count, total / count.clamp(min=1), self.excess)
        alpha = torch.softmax(self.log_weights + self.eta * self.excess, 0)
        alpha = (1 - self.smoothing) * alpha + self.smoothing / len(alpha)
        self.log_weights = alpha.log()
        self.total, self.steps = self.total + alpha, self.steps + 1

    @property
    def weights(self):
        return self.log_weights.exp()

    @property
    def mean(self):
        return torch.where(self.steps > 0, self.total / self.steps.clamp(min=1), self.weights)


# ------------------------------------------------------------------------------------------------------------
# Pictures: a grid of images, a density, panels beside or below one another.

def image_grid(images, columns, side=None):
    """Pillow image of uint8 [n, C, H, W] or latents, row by row, each `side` pixels wide (None: >= 48)."""
    if images.dtype != torch.uint8:                             # of latents the first three channels
        images = images.float() / images.float().std().clamp_min(1e-6) * 50 + 128
        images = images.clamp(0, 255).to(torch.uint8)
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    side = side or max(48, images.shape[-1])
    grid = Image.new("RGB", (columns * side, max(1, -(-len(images) // columns)) * side), "white")
    for i, image in enumerate(images.permute(0, 2, 3, 1).contiguous().cpu().numpy()):
        image = Image.fromarray(image).resize((side, side), Image.BICUBIC)
        grid.paste(image, (i % columns * side, i // columns * side))
    return grid


def density_picture(density, size=400, center=0.4, side=2.2):
    """Pillow image of a square around (center, center), where class A lies: the log-density of points [n, 2]
    or of a Tree, from -4 (white) to 3 (black)."""
    if isinstance(density, Tree):
        ticks = (torch.arange(size) + 0.5) / size * side - side / 2
        cells = torch.stack(torch.meshgrid(ticks, -ticks, indexing="xy"), dim=-1).reshape(-1, 2) + center
        logp = density.logp(cells.to(density.device)).cpu()
    else:
        cell = (((density.cpu() - center) * torch.tensor([1, -1]) / side + 0.5) * size).floor().long()
        cell = cell[((cell >= 0) & (cell < size)).all(1)]                               # column, row
        counts = torch.bincount(cell[:, 1] * size + cell[:, 0], minlength=size * size)
        logp = (counts * (size / side) ** 2 / len(density)).log()
    gray = 255 - ((logp + 4) / 7).clamp(0, 1) * 255
    return Image.fromarray(gray.to(torch.uint8).view(size, size).numpy())


def panels(pictures, titles, across=True):
    """Pillow image of pictures with a title each, side by side or below one another."""
    width = sum(p.width + 8 for p in pictures) if across else max(p.width for p in pictures)
    height = max(p.height for p in pictures) + 24 if across else sum(p.height + 32 for p in pictures)
    canvas, x, y = Image.new("RGB", (width, height), "white"), 0, 0
    for picture, title in zip(pictures, titles):
        canvas.paste(picture, (x, y + 24))
        ImageDraw.Draw(canvas).text((x + 4, y + 2), title, fill="black", font=ImageFont.load_default(16))
        x, y = (x + picture.width + 8, 0) if across else (0, y + picture.height + 32)
    return canvas


def coreset_picture(dataset, pool, priority, keep, columns=8):
    """Pillow image of what `prune` kept of the examples at `pool` [n]: of each of the first ten classes a row
    of best-kept, last-kept and first-dropped images. priority [n]; `keep` are positions in the pool."""
    parts, names = [[], [], []], []
    labels = None if dataset.labels is None else dataset.labels[pool]
    for members in ranked(priority, labels)[:10]:
        names.append("all" if labels is None else dataset.class_names[labels[members[0]]])
        n = int(torch.isin(members, keep).sum())
        for part, chosen in zip(parts, (members[:n], members[:n].flip(0), members[n:])):
            part.append(image_grid(dataset.x[pool[chosen[:columns]]], columns))
    return panels([panels(part, names, across=False) for part in parts],
                  ["best kept", "last kept, nearest the border first", "first dropped"])
