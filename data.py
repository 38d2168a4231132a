"""Data: the 2-D tree, image and latent data sets, batches that are a function of (seed, step), posterior-mean
targets, coreset pruning, class weights by distributionally robust optimization, and pictures.

Pruning then reweighting: https://arxiv.org/abs/2409.19128. The tree: https://arxiv.org/abs/2406.02507. Stable
targets: https://arxiv.org/abs/2302.00670. First come the helpers for files and flags that every program uses.

    python data.py DATA --keep 0.1 --prune gaussian --out keep.npy --show coreset.png
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
import tarfile
import time
import typing
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


# ------------------------------------------------------------------------------------------------------------
# Files. Whatever goes wrong while one is read becomes one DataError that names it; one that is written
# appears whole or not at all.

class DataError(ValueError):
    """What a program's user can mend: one printable line that names the file or flag and says why."""

    def __str__(self):
        return "".join(c if c.isprintable() else " " for c in super().__str__())


@contextlib.contextmanager
def reading(path, what):
    """Any exception inside becomes a DataError, "PATH: not WHAT, why"; archives are checked first."""
    try:
        if os.path.isfile(path) and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} is damaged")
        yield
    except (DataError, torch.OutOfMemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or path}: no such file") from None
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not {what}, {why[:80]}") from None


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
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {str(error).splitlines()[0][:80]}") from None
    return str(where)


def parser(description, usage):
    """An ArgumentParser whose help shows every default; flags are not abbreviated."""
    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default in (None, False) else super()._get_help_string(action)
    return argparse.ArgumentParser(description=description.split("\n\n")[0], usage=f"%(prog)s {usage}",
                                   allow_abbrev=False, formatter_class=lambda prog: Help(prog, width=110))


def command(run, parser, argv=None):
    """Parse argv and run(args); what the user can mend becomes one line on stderr and exit status 2."""
    args = parser.parse_args(argv)
    try:
        return run(args)
    except torch.OutOfMemoryError:
        why = "out of device memory: give a smaller --batch or --micro-batch"
    except (DataError, OSError) as error:
        why = str(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print("error:", why, file=sys.stderr)
    raise SystemExit(2)


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


def double(x):
    """x in float64; on the CPU where the device (MPS) has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


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
        """n points of the density: float32 [n, 2]. On the CPU the first m of n points are those of a draw of
        m: three uniforms a point, the normals by Box-Muller."""
        u = torch.rand(n, 3, generator=generator, device=self.device)                   # [n, 3]
        index = torch.searchsorted(self._p("cumulative"), u[:, 0].contiguous(), right=True)
        index = index.clamp(max=len(self.parameters["mean"]) - 1)                       # rounding at u = 1
        radius, angle = (-2 * torch.log1p(-u[:, 1])).sqrt(), 2 * math.pi * u[:, 2]
        z = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)            # [n, 2] normal
        return self._p("mean")[index] + (self._p("root")[index] * z[:, None, :]).sum(2)

    def _evaluate(self, x, sigma):
        """Log-density [n] and score [n, 2] at x [n, 2]. In a branch's own axes the covariance plus sigma^2 I
        is diagonal and shared by its Gaussians, which lie at middle + tau half, tau = -1 ... 1. So an
        exponent is base + B tau - C tau^2 / 2, by coefficients of the branch; a matrix product gives all."""
        axes, lam, middle, half, log_weight = (
            self._p(name, x.dtype) for name in ("axes", "lam", "middle", "half", "log_weight"))
        tau = torch.linspace(-1, 1, 8, dtype=x.dtype, device=x.device)
        powers = torch.stack([torch.ones_like(tau), tau, -tau.square() / 2], dim=1)     # [8, 3]
        square = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1) ** 2     # [1 or n, 1]
        rows = 128 if x.device.type == "cpu" else 32768         # a block fits the cache, and malloc keeps it
        squares = square.split(rows) if len(square) > 1 else [square] * (len(x) // rows + 1)
        logp, score = [], []

        def dot(u, v):                                          # over the two axes: [n, K]
            return torch.addcmul(u[0] * v[0], u[1], v[1])
        for x, square in zip(x.split(rows), squares):
            a = (x @ axes).sub_(middle)                                                 # [axis, n, K]
            rate = (lam + square).reciprocal_()                                         # [axis, 1 or n, K]
            rate_a, rate_half = rate * a, rate * half
            B, C = dot(rate_a, half), dot(rate_half, half)
            base = torch.sub(log_weight + 0.5 * (rate[0] * rate[1]).log(), dot(rate_a, a), alpha=0.5)
            peak = (B / C).clamp_(-1, 1)                        # at which tau it is highest: a close bound
            most = torch.addcmul(base, peak, torch.addcmul(B, C, peak, value=-0.5)).amax(1, keepdim=True)
            exponent = torch.stack(torch.broadcast_tensors(base - most, B, C)).flatten(1)       # [3, n K]
            share = (powers * math.log2(math.e) @ exponent).clamp_(min=-115).exp2_()   # slow if it underflows
            S0, S1 = (powers[:, :2].T @ share).view(2, *B.shape)                        # sum share, share tau
            total = S0.sum(1, keepdim=True)
            logp.append(most + total.log() - math.log(2 * math.pi))
            pull = torch.addcmul(rate_half * S1, rate_a, S0, value=-1)                  # [axis, n, K]
            score.append((axes @ pull.mT).sum(0).mT / total)    # on a CPU faster than pull @ axes.mT
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
    mean, std = (torch.tensor(config[name], device=x.device).reshape(-1, 1, 1) for name in ("mean", "std"))
    x = x.float() * 2 * std + mean
    return x.round().clip(0, 255).to(torch.uint8) if config["kind"] == "image" else x


# ------------------------------------------------------------------------------------------------------------
# Targets. The posterior mean of x0 given x = x0 + sigma noise, where x0 is one of a set of examples: the same
# minimizer as x0 itself, with less variance (stable target fields, https://arxiv.org/abs/2302.00670).

def posterior_mean(x, sigma, examples):
    """E[x0 | x] for x [n, ...] at noise levels sigma [n], with x0 one of `examples` [m, ...]: [n, ...].
    `examples` may be several such blocks, for more than memory holds; the result is that of all of them."""
    mean, evidence = 0.0, torch.full_like(sigma, -math.inf)
    for block in examples.split(4096) if torch.is_tensor(examples) else examples:
        y = block.flatten(1)
        logits = _posterior_logits(x.flatten(1), sigma, y)
        log_sum = logits.logsumexp(1)
        mean = mean + (logits.softmax(1) @ y - mean) * torch.sigmoid(log_sum - evidence)[:, None]
        evidence = torch.logaddexp(evidence, log_sum)
    return mean.view(x.shape)


def _posterior_logits(x, sigma, y):
    """x [..., n, d], sigma [..., n], y [..., m, d] -> logits [..., n, m] of x0 = y given x. The posterior
    mean is attention with queries (x, 1) / sigma^2, keys (y, -|y|^2 / 2) and values y. What all candidates
    share, |x|^2 / 2 sigma^2, is left out, and the softmax subtracts the largest logit: nothing overflows."""
    weight = 1 / sigma.square()[..., None]
    keys = torch.cat([y, y.square().sum(-1, keepdim=True) / -2], -1)
    return torch.cat([x * weight, weight], -1) @ keys.mT


def batch_posterior_mean(x, sigma, x0, labels=None, group=200):
    """The same with the batch's own examples x0 [n, ...] as candidates, those of the same label, in groups of
    about `group` (a divisor of n, so that the shapes are fixed): [n, ...]. Groups gather equal labels."""
    n = len(x)
    groups = next(g for g in range(max(1, n // group), 0, -1) if n % g == 0)
    order = torch.arange(n, device=x.device) if labels is None else labels.argsort(stable=True)
    parts = [t[order].reshape(groups, n // groups, -1) for t in (x, sigma, x0)]         # [groups, n / g, d]
    parts.append(torch.zeros_like(parts[1]) if labels is None else labels[order].view(groups, -1, 1))
    slab, means = 4 if x.device.type == "cpu" else groups, []                           # 4 fit the cache
    for x_, s, y, label in zip(*(part.split(slab) for part in parts)):
        logits = _posterior_logits(x_, s[..., 0], y)
        if labels is not None:
            logits.masked_fill_(label != label.mT, -math.inf)
        # On a CPU this order takes a fifth of the time of `share @ y` where y has two columns.
        means.append((y.mT.contiguous() @ logits.softmax(-1).mT).mT)
    return torch.empty_like(x).index_copy_(0, order, torch.cat(means).view(x.shape))


# ------------------------------------------------------------------------------------------------------------
# Batches by number: batches[step] depends on (seed, step) alone, and on the CPU the first examples of a
# larger batch are those of a smaller one (multiples of 16). What is small is drawn on the host and copied
# without waiting, the noise on the device. Flips are labelled, so that they do not leak into samples: a
# mirrored image of class c has label c + classes.

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
        pool=None,              # sorted indices [M] of the examples to draw from; None = all
        class_weights=None,     # an example is drawn in proportion to its class's weight [classes]; None = 1
        flip=False,             # mirror half of the images, as classes of their own
        targets="sample",       # x0 itself, or its posterior mean given the "batch" or "all" of the pool
        P_mean=-1.2,            # of ln sigma
        P_std=1.2,
        rows=slice(None),       # the rows of the n that are wanted here (several processes)
    ):
        self.dataset, self.n, self.seed, self.device = dataset, n, seed, torch.device(device)
        self.flip, self.targets, self.P_mean, self.P_std, self.rows = flip, targets, P_mean, P_std, rows
        self.cumulative = None
        if dataset.kind == "tree":
            return
        self.pool = torch.arange(len(dataset)) if pool is None else torch.as_tensor(pool)
        if class_weights is not None:
            weight = class_weights.double()[dataset.labels[self.pool]]                  # [M]
            self.cumulative = weight.cumsum(0) / weight.sum()
        if targets == "all":
            labels = torch.zeros(len(self.pool)) if dataset.labels is None else dataset.labels[self.pool]
            self.of_class = {int(c): self.pool[labels == c] for c in labels.unique()}

    def index(self, step):
        """Indices of the batch in the data set: int64 [n] on the host."""
        generator = stream(self.seed, step, "data")
        if self.cumulative is None:
            return self.pool[torch.randint(len(self.pool), (self.n,), generator=generator)]
        u = torch.rand(self.n, generator=generator, dtype=torch.float64)
        return self.pool[torch.searchsorted(self.cumulative, u, right=True).clamp(max=len(self.pool) - 1)]

    def __getitem__(self, step):
        """The Batch of this step."""
        def draw(name, device="cpu"):
            return stream(self.seed, step, name, device)
        data, labels, mirrored = self.dataset, None, None
        sigma = self.P_mean + self.P_std * torch.randn(self.n, generator=draw("sigma"))[self.rows]
        sigma = put(sigma.exp(), self.device)
        if data.kind == "tree":
            x0 = data.sample(self.n, draw("data", data.device))[self.rows]
        else:
            index = self.index(step)[self.rows]
            x0 = data.take(index, self.device)
            labels = None if data.labels is None else data.labels[index]
            if self.flip:
                mirrored = torch.randint(2, (self.n,), generator=draw("flip"))[self.rows]       # 0 or 1
                labels = mirrored if labels is None else labels + mirrored * data.classes
                x0 = _mirror(x0, mirrored)
        noise = torch.randn((self.n, *data.shape), generator=draw("noise", self.device), device=self.device)
        noise, on_device = noise[self.rows], None if labels is None else put(labels, self.device)
        batch = Batch(x0, noise, sigma, on_device, x0)
        if self.targets == "batch":
            return batch._replace(target=batch_posterior_mean(batch.x, sigma, x0, on_device))
        if self.targets == "all":
            return batch._replace(target=data.denoise(batch.x, sigma) if data.kind == "tree" else
                                  self._all(batch.x, sigma, labels, mirrored))
        return batch

    def _all(self, x, sigma, labels, mirrored):
        """The posterior mean given all examples of the pool with that label, mirrored where x is mirrored."""
        x, out = _mirror(x, mirrored), torch.empty_like(x)
        classes = torch.zeros(len(x)) if self.dataset.labels is None else labels % self.dataset.classes
        for c in classes.unique().tolist():
            rows = put((classes == c).nonzero()[:, 0], self.device)
            blocks = (self.dataset.take(index, self.device) for index in self.of_class[int(c)].split(4096))
            out[rows] = posterior_mean(x[rows], sigma[rows], blocks)
        return _mirror(out, mirrored)


def _mirror(x, mirrored):
    """Images x [n, C, H, W], flipped where `mirrored` [n] is 1; None flips none."""
    if mirrored is None:
        return x
    return torch.where(put(mirrored, x.device)[:, None, None, None] == 1, x.flip(3), x)


# ------------------------------------------------------------------------------------------------------------
# Loading. Whatever the source, it becomes one array in the cache folder ($DATA_CACHE, else
# ~/.cache/data-curation), which later runs map into memory.

CACHE_VERSION = 3                               # raise it when what is cached changes
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
CIFAR_BATCHES = [f"data_batch_{i}{suffix}" for suffix in ("", ".bin") for i in range(1, 6)]
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def load(path, size=None):
    """The images or latents at `path` as a Dataset.

    path    a folder, .zip or .tar of images (a folder a class; of train, val, test the train one; or as the
            dataset.json at its top says, which is EDM's format), CIFAR-10 as published (python or binary, in
            .tar.gz or unpacked), or an .npz with `images` uint8 [N, 3, H, W] or [N, H, W, 3], or `latents`
            float [N, C, H, W] (with optional `mean`, `std` [C]), and `labels` [N]
    size    center-crop to a square and resize (Lanczos) to this many pixels; None = as they are

    Raises DataError, one line, for anything unreadable, inconsistent or hostile; nothing is left behind."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    files = _files(path) if path.is_dir() else {"": path}
    stamp = [(name, file.stat().st_size, file.stat().st_mtime_ns) for name, file in files.items()]
    key = hashlib.sha256(repr((CACHE_VERSION, str(path.resolve()), size, stamp)).encode()).hexdigest()
    folder = cache_folder()
    cached = folder / f"{key[:32]}.pt"
    if not cached.exists():
        with reading(path, "a data set"), warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # Pillow's remarks on odd but readable files
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            found = _npz(path, size) if path.suffix.lower() == ".npz" else _images(path, files, size)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with writing(cached) as file:
                torch.save(vars(found), file)
        except (OSError, DataError) as error:
            raise DataError(f"{path}: the cache has no room for it, set DATA_CACHE ({error})") from None
    with reading(cached, "a cached data set (delete it)"):
        return Dataset(**torch.load(cached, mmap=True, weights_only=True))      # no change reaches the file


def cache_folder():
    """Where data sets and their features are kept: $DATA_CACHE, else ~/.cache/data-curation."""
    return Path(os.environ.get("DATA_CACHE") or Path.home() / ".cache" / "data-curation")


def _dataset(x, labels, class_names=None, report=(), **more):
    """Dataset of arrays x [N, C, H, W] and labels [N] or None; class_names None = the classes' numbers."""
    x, found = np.ascontiguousarray(x), Dataset(None, class_names=class_names or [], **more)
    n, c, h, w = x.shape
    size = f"{n:,} {found.kind}s of {c}x{h}x{w}, {x.nbytes / 2 ** 20:,.0f} MiB"
    found.report = [size, "no labels", *report]
    if labels is not None:
        labels, most = np.asarray(labels), len(found.class_names) or 100_000
        right = labels.dtype.kind in "iu" and labels.shape == (n,)
        right = right and 0 <= labels.min() and labels.max() < most
        _expect("`labels`", labels, right, f"class numbers below {most:,} [{n}]")
        labels = labels.astype(np.int64)
        count = np.bincount(labels)
        found.class_names = class_names or [str(c) for c in range(len(count))]
        found.report[1] = f"{len(count):,} classes of {count.min():,} to {count.max():,} examples"
        found.labels = torch.from_numpy(labels)
    about = repr((x.shape, found.kind, found.class_names, found.mean, found.std))
    digest = hashlib.sha256(about.encode())
    digest.update(x)
    digest.update(b"" if labels is None else labels)
    found.x, found.fingerprint = torch.from_numpy(x), digest.hexdigest()
    return found


def _expect(name, array, right, wanted):
    if not right:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, wanted {wanted}")


# ------------------------------------------------------------------------------------------------------------
# Images: one list of names and read functions, be they in a folder, a zip or a tar. Nothing is unpacked.

def _files(path):
    """{name with slashes: Path} of all files below a folder, sorted; links are followed, each folder once."""
    files, seen = {}, set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        paths = [Path(folder, name) for name in names]
        files |= {file.relative_to(path).as_posix(): file for file in paths if file.is_file()}
    return dict(sorted(files.items()))


def _members(path):
    """{name: function that returns the file's bytes} of a .zip or .tar, compressed or not."""
    found, is_zip = {}, path.suffix.lower() == ".zip"
    archive = zipfile.ZipFile(path) if is_zip else tarfile.open(path)
    for info in archive.infolist() if is_zip else archive:
        name, size = (info.filename, info.file_size) if is_zip else (info.name, info.size)
        name = name.removeprefix("./")                          # as `tar -C folder .` writes them
        if size > 2 ** 28:
            raise ValueError(f"{name} has {size:,} bytes, more than 256 MB")
        if is_zip and not info.is_dir():
            found[name] = functools.partial(archive.read, info)
        elif not is_zip and info.isfile():                      # at once: a .tar.gz is read in its own order
            found[name] = functools.partial(bytes, archive.extractfile(info).read())
    return found


def _images(path, files, size):
    """Dataset of the images among the files, labelled by dataset.json or by folder; or of CIFAR-10."""
    members = {name: file.read_bytes for name, file in files.items()} if path.is_dir() else _members(path)
    batches = {name.rpartition("/")[2]: read for name, read in members.items()}
    if batches := [(name, batches[name]) for name in CIFAR_BATCHES if name in batches]:
        return _cifar(batches, size)
    images = [name for name in members if name.lower().endswith(IMAGES)
              and not name.startswith("__MACOSX/") and not name.rpartition("/")[2].startswith(".")]
    if not images:
        raise ValueError(f"no images ({', '.join(IMAGES[:4])} ...) among its {len(members)} files")
    listing = members.get("dataset.json")
    label_of = _by_listing(json.loads(listing()), images) if listing else _by_folder(images)
    order = sorted(label_of, key=lambda name: (label_of[name], name))
    labels, names = [label_of[name] for name in order], None
    if labels[0] is None:
        labels = None
    elif not listing:
        names, labels = np.unique(labels, return_inverse=True)
        names = names.tolist()
    x = _decoded({name: members[name] for name in order}, size)
    others = len(members) - len(order)
    return _dataset(x, labels, names, [f"{others:,} other files left out"] * (others > 0))


def _by_folder(names):
    """{name: class}. A single folder on top is entered, and of train, val and test the train one; the next
    level is the class, and its images lie at any depth. The class of images without a folder is None."""
    below = {name: name.split("/") for name in names}           # the folders to go through, and the file
    while True:
        tops = {folders[0] if len(folders) > 1 else None for folders in below.values()}     # None: an image
        if "train" in tops and tops <= {"train", "val", "test"}:
            top = "train"
        elif len(tops) == 1 and None not in tops:
            top, = tops
        else:
            break
        below = {name: folders[1:] for name, folders in below.items() if folders[0] == top}
    if None in tops and len(tops) > 1:
        raise ValueError("images lie both beside and inside of class folders")
    return {name: None if None in tops else folders[0] for name, folders in below.items()}


def _by_listing(listing, names):
    """{name: class number or None} by EDM's dataset.json: {"labels": [["00000/img00000000.png", 3], ...]}, or
    null for no labels."""
    if listing["labels"] is None:
        return dict.fromkeys(names)
    label_of = dict(listing["labels"])
    for name in sorted(label_of.keys() ^ set(names)):
        raise ValueError(f"{name} is {'missing' if name in label_of else 'not listed'} (dataset.json)")
    return label_of


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
    """One image: uint8 [3, H, W]."""
    try:
        image = Image.open(io.BytesIO(read()))
        if image.mode.startswith("I"):                          # 16 bits a pixel
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        return _resize(image.convert("RGB"), size)
    except Exception as error:
        raise ValueError(f"{name}: {error}") from None


def _resize(image, size):
    """Center-crops a Pillow RGB image to a square and resizes it to `size` pixels: uint8 [3, H, W]."""
    if size and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.LANCZOS)
    return np.asarray(image).transpose(2, 0, 1)


def _resized(x, size):
    """The same for an array uint8 [N, 3, H, W]."""
    if size and x.shape[2:] != (size, size):
        x = np.stack([_resize(Image.fromarray(image), size) for image in x.transpose(0, 2, 3, 1)])
    return x


# ------------------------------------------------------------------------------------------------------------
# CIFAR-10's training batches. The python version is a pickle, and a pickle can run code: the unpickler below
# knows four names, which only record what they are given (numpy's own trust it: forged, they corrupt memory).

class _Recorded:
    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        """The stand-in for a known name; an exception for any other, so that nothing of a pickle runs."""
        if (module, name) == ("_codecs", "encode"):
            return lambda text, _: text.encode("latin1")
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            return _Recorded
        raise ValueError(f"refused, it wants to run {module}.{name}")


def _cifar(batches, size):
    """Dataset of [(file name, read function)]; a binary batch is a label byte and 3,072 pixels an image."""
    images, labels = [], []
    for name, read in batches:
        if name.endswith(".bin"):
            rows = np.frombuffer(read(), np.uint8).reshape(-1, 3073)
            pixels, label, fortran = rows[:, 1:], rows[:, 0], False
        else:
            batch = _Unpickler(io.BytesIO(read()), encoding="bytes").load()
            _, _, _, fortran, raw = batch[b"data"].state        # of a numpy array: version, shape, dtype
            pixels, label = np.frombuffer(raw, np.uint8).reshape(-1, 3072), batch[b"labels"]
        _expect(name, pixels, len(pixels) == len(label) and not fortran, f"bytes [{len(label)}, 3072]")
        images.append(pixels.reshape(-1, 3, 32, 32))
        labels.append(label)
    return _dataset(_resized(np.concatenate(images), size), np.concatenate(labels), CIFAR_CLASSES,
                    [f"CIFAR-10, {len(batches)} of 5 training batches"])


# ------------------------------------------------------------------------------------------------------------
# An .npz file of images or latents.

def _npz(path, size):
    """Dataset of its `images` or `latents`, with its `labels`, and `mean` and `std` of latents, if there."""
    with np.load(path, allow_pickle=False) as file:
        kind = "latent" if "latents" in file else "image"
        x, labels = file[f"{kind}s"], file["labels"] if "labels" in file else None
        moments = np.stack([file["mean"], file["std"]]) if "mean" in file and "std" in file else None
    right = x.ndim == 4 and x.size and (x.dtype.kind == "f" if kind == "latent" else x.dtype == np.uint8)
    _expect(f"`{kind}s`", x, right, "uint8 images or float latents [N, C, H, W]")
    if kind == "image":
        x = x if x.shape[1] == 3 else x.transpose(0, 3, 1, 2)
        _expect("`images`", x, x.shape[1] == 3, "three channels")
        return _dataset(_resized(x, size), labels)
    if size or not np.isfinite(x).all():
        raise ValueError("--size is for images" if size else "`latents` holds NaN or infinite values")
    x = x.astype(np.float16 if x.dtype.itemsize == 2 else np.float32)
    if moments is None:
        channels = [x[:, c].astype(np.float64) for c in range(x.shape[1])]
        moments = np.array([[c.mean() for c in channels], [max(c.std(), 1e-6) for c in channels]])
    right = moments.shape[1:] == x.shape[1:2] and np.isfinite(moments).all() and moments[1].min() > 0
    _expect("`mean`, `std`", moments, right, f"finite [2, {x.shape[1]}], std above 0")
    return _dataset(x, labels, kind=kind, mean=moments[0].tolist(), std=moments[1].tolist())


# ------------------------------------------------------------------------------------------------------------
# A long-tailed subset: with K classes, class c keeps n_max R^(-c / (K - 1)) examples, R = head over tail.

def long_tail(labels, ratio, seed=0):
    """Sorted indices (LongTensor) of such a subset of labels [N], random within a class; ratio R >= 1."""
    K, most, kept = int(labels.max()) + 1, int(torch.bincount(labels).max()), []
    for c in range(K):
        members = torch.nonzero(labels == c)[:, 0]
        n = max(1, round(most * ratio ** (-c / max(K - 1, 1))))
        kept.append(members[torch.randperm(len(members), generator=stream(seed, c, "long tail"))[:n]])
    return torch.cat(kept).sort().values


# ------------------------------------------------------------------------------------------------------------
# Coreset pruning: a score within each class, and the best fraction of each class is kept.
#   gaussian    log-density under the class's Gaussian (instance selection, https://arxiv.org/abs/2007.15255)
#   knn         minus the distance to the k-th nearest neighbour of the class
#   moderate    closeness of the distance from the class's median feature to the median of these distances
#   random      a random number

PRUNE_SCORES = ("gaussian", "knn", "moderate", "random")


def prune(features, labels, keep, score="gaussian", k=5, seed=0):
    """Sorted kept indices (LongTensor) of features [N, d] with labels [N] (None: one class). `keep` in (0, 1]
    is the fraction that is kept of each class, at least one example."""
    return prune_by(prune_scores(features, labels, score, k, seed), labels, keep)


def prune_by(scores, labels, keep):
    """As `prune`, for scores [N] at hand; equal scores are kept in the order of their indices."""
    kept = [members[torch.sort(scores[members], descending=True, stable=True).indices]
            [:max(1, round(keep * len(members)))] for members in of_classes(labels, len(scores))]
    return torch.cat(kept).sort().values


def prune_scores(features, labels, score="gaussian", k=5, seed=0):
    """The score of every example, float64 [N], higher = kept first; comparable within a class only."""
    if score == "random":
        return torch.rand(len(features), generator=stream(seed, 0, "prune"), dtype=torch.float64)
    function = dict(gaussian=_gaussian, knn=_knn, moderate=_moderate)[score]
    scores = torch.empty(len(features), dtype=torch.float64)
    for members in of_classes(labels, len(features)):
        x = double(features[members])
        scores[members] = function(x - x.mean(0), k).cpu()
    return scores


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

def pixel_features(dataset, dims=64):
    """float32 [N, min(dims, 64 C)] of a Dataset of images or latents, on the CPU."""
    x = torch.cat([torch.nn.functional.adaptive_avg_pool2d(dataset.take(index), 8).flatten(1)
                   for index in torch.arange(len(dataset)).split(1024)])                # [N, 64 C]
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T.double() @ x.double()).eigenvectors.flip(1)[:, :dims]  # largest first
    return x @ axes.float()


def load_npy(path, what, n):
    """The array in a .npy file of numbers: `what` = "kept indices" int64 [M], sorted, of `n` examples, or
    "features" float32 [n, d]. DataError for anything else."""
    with reading(path, f"{what} for {n:,} examples (.npy)"):
        array = np.load(path, allow_pickle=False)
        if what == "features":
            right = array.ndim == 2 and len(array) == n and np.isfinite(array).all()
            _expect("it", array, right, f"finite [{n}, d]")
            return torch.from_numpy(array.astype(np.float32))
        right = array.ndim == 1 and array.dtype.kind in "iu" and 0 <= array.min() <= array.max() < n
        _expect("it", array, right, f"indices below {n}")
        return torch.from_numpy(array.astype(np.int64)).unique()


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

    @torch.no_grad()
    def update(self, excess, labels):
        """One step from the excess losses [B] of examples with labels int64 [B]."""
        excess = excess.to(self.excess.dtype).clamp(min=0).nan_to_num(nan=0, posinf=0)
        total = torch.zeros_like(self.excess).index_add(0, labels, excess)              # [classes]
        count = torch.zeros_like(self.excess).index_add(0, labels, torch.ones_like(excess))
        self.excess = torch.where(count >= self.min_count, total / count.clamp(min=1), self.excess)
        alpha = torch.softmax(self.log_weights + self.eta * self.excess, 0)
        alpha = (1 - self.smoothing) * alpha + self.smoothing / len(alpha)
        self.log_weights = alpha.log()
        self.total = self.total + alpha
        self.steps = self.steps + 1

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


def density_picture(density, size=400, side=3.0):
    """Pillow image of a square of this side around 0: the log-density of points [n, 2] or of a Tree, from -4
    (white) to 3 (black)."""
    if isinstance(density, Tree):
        ticks = (torch.arange(size) + 0.5) / size * side - side / 2
        cells = torch.stack(torch.meshgrid(ticks, -ticks, indexing="xy"), dim=-1).reshape(-1, 2)
        logp = density.logp(cells.to(density.device)).cpu()
    else:
        cell = ((density.cpu() * torch.tensor([1, -1]) / side + 0.5) * size).floor().long()     # column, row
        cell = cell[((cell >= 0) & (cell < size)).all(1)]
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


def coreset_picture(dataset, scores, keep, columns=8):
    """Pillow image: of each of the first ten classes, a row of best-kept, last-kept, first-dropped images."""
    parts, names = [[], [], []], dataset.class_names or ["all"]
    for members in of_classes(dataset.labels, len(dataset))[:10]:
        ranked = members[torch.sort(scores[members], descending=True, stable=True).indices]
        n = int(torch.isin(members, keep).sum())
        for part, chosen in zip(parts, (ranked[:n], ranked[:n].flip(0), ranked[n:])):
            part.append(image_grid(dataset.x[chosen[:columns]], columns))
    return panels([panels(part, names, across=False) for part in parts],
                  ["best kept", "last kept, nearest the border first", "first dropped"])


# ------------------------------------------------------------------------------------------------------------
# Command line: what a data set holds, and pruning without training.

def build_parser():
    p = parser("Report what a data set holds; prune it to a coreset.", "DATA [flags]")
    p.add_argument("data", metavar="DATA", help="folder, .zip, .tar, CIFAR-10 or .npz")
    p.add_argument("--size", type=number(int, "[1, 4096]"), help="center-crop and resize to this many pixels")
    p.add_argument("--keep", type=number(float, "(0, 1]"), help="fraction kept of each class (else: report)")
    p.add_argument("--prune", choices=PRUNE_SCORES, default="gaussian", help="score")
    p.add_argument("--features", default="pixels", help="what the score sees: pixels (principal components "
                   "at 8x8), or a .npy file [N, d] such as fid.py --save-features writes")
    p.add_argument("--k", type=number(int, "[1, inf)"), default=5, help="the neighbour that knn looks at")
    p.add_argument("--out", default="keep.npy", help="kept indices")
    p.add_argument("--show", help="picture (PNG) of best-kept, last-kept and first-dropped images")
    p.add_argument("--seed", type=number(int, "[0, inf)"), default=0, help="of --prune random")
    return p


def run(args):
    """Carry out the command: print the report and, with --keep, write the kept indices and the picture."""
    dataset = load(args.data, args.size)
    print("\n".join(dataset.report))
    if args.keep is None:
        return
    pixels = args.features == "pixels"
    features = pixel_features(dataset) if pixels else load_npy(args.features, "features", len(dataset))
    scores = prune_scores(features, dataset.labels, args.prune, args.k, args.seed)
    keep = prune_by(scores, dataset.labels, args.keep)
    print(f"kept {len(keep):,} of {len(dataset):,}")
    with writing(args.out) as file:
        np.save(file, keep.numpy())
    if args.show:
        with writing(args.show) as file:
            coreset_picture(dataset, scores, keep).save(file, format="PNG")


if __name__ == "__main__":
    command(run, build_parser())
