"""Data: the 2-D tree, sets of images or latents, batches, loading, pruning, class weights and pictures.

A batch is a function of (seed, step). Pruning and class weights: "Pruning then Reweighting: Towards
Data-Efficient Training of Diffusion Models" (arXiv 2409.19128). The tree: arXiv 2406.02507. Helpers for
files, flags and programs stand at the end. To see what a data set holds without training on it:

    python -c "import data; print(*data.load('data/cifar10', size=16).report, sep='\\n')"
"""
import argparse
import collections
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from PIL import features as pillow_features


# ------------------------------------------------------------------------------------------------------------
# The 2-D toy density of the autoguidance paper: a tree of branches with eight Gaussians along each, drawn by
# a recursion on one random stream. A Gaussian mixture has an exact density, score and denoiser at every noise
# level, so that a trained model can be compared with the right answer.

class Tree:
    """A mixture in the plane: 127 branches of eight Gaussians per class. classes = "A", "B" or "AB"."""
    kind = "tree"
    shape = (2,)
    classes = 0
    class_names = ()

    def __init__(self, classes="A", device="cpu"):
        random = np.random.RandomState(2)
        branches = []
        for name, angle in (("A", np.pi / 4), ("B", np.pi * 5 / 4)):
            grown = _grow(random, np.array([0.0030, 0.0325]), angle)
            if name in classes:                                 # B's draws follow A's, even without A
                branches += grown
        weight = np.array([branch.weight for branch in branches])                       # [K]
        mean = np.stack([branch.mean for branch in branches])                           # [K, 8, 2]
        cov = np.stack([branch.cov for branch in branches])                             # [K, 2, 2]
        weight = weight / (8 * weight.sum())                    # of each of a branch's eight Gaussians
        lam, axes = np.linalg.eigh(cov)                         # cov = axes diag(lam) axes^T
        middle = mean.mean(1)                                   # [K, 2]
        half = (mean[:, 7] - mean[:, 0]) / 2                    # [K, 2], from the middle to the last Gaussian
        self.parameters = dict(                                 # float64; K branches, 8 K Gaussians
            cumulative=np.cumsum(weight.repeat(8)),
            mean=mean.reshape(-1, 2),
            root=(axes * np.sqrt(lam)[:, None, :]).repeat(8, 0),                        # [8 K, 2, 2]
            axes=axes.transpose(2, 1, 0),                                               # [axis, dim, K]
            lam=lam.T[:, None],                                                         # [axis, 1, K]
            middle=np.einsum("kda,kd->ak", axes, middle)[:, None],                      # along the axes
            half=np.einsum("kda,kd->ak", axes, half)[:, None],
            log_weight=np.log(weight))
        self.fingerprint = hashlib.sha256(np.concatenate([mean.ravel(), cov.ravel()]).tobytes()).hexdigest()
        self.report = [f"2-D tree, class {classes}: {mean.size // 2:,} Gaussians, fresh points every step"]
        self.to(device)

    def to(self, device):
        """Compute on `device` from now on; returns self."""
        self.device = torch.device(device)
        self._tensors = {}
        return self

    def _tensor(self, name, dtype=torch.float32):
        """A parameter as a tensor on the device, made once."""
        key = (name, dtype)
        if key not in self._tensors:
            values = np.ascontiguousarray(self.parameters[name])
            self._tensors[key] = torch.from_numpy(values).to(dtype).to(self.device)
        return self._tensors[key]

    def sample(self, n, generator=None):
        """n points of the density: float32 [n, 2].

        Each point takes three uniforms: one picks the Gaussian, two give normals by Box-Muller. On the CPU a
        larger draw therefore begins with the points of a smaller one.
        """
        u = torch.rand(n, 3, generator=generator, device=self.device)                   # [n, 3]
        index = torch.searchsorted(self._tensor("cumulative"), u[:, 0].contiguous(), right=True)
        index = index.clamp(max=len(self.parameters["mean"]) - 1)                       # rounding at u = 1
        radius = (-2 * torch.log1p(-u[:, 1])).sqrt()
        angle = 2 * math.pi * u[:, 2]
        z = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)            # [n, 2] normal
        return self._tensor("mean")[index] + (self._tensor("root")[index] * z[:, None, :]).sum(2)

    def _evaluate(self, x, sigma):
        """Log-density [n] and its gradient [n, 2] at x [n, 2]; sigma is a number or [n]."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1)
        square = sigma.expand(len(x), 1) ** 2
        tau = torch.linspace(-1, 1, 8, dtype=x.dtype, device=x.device)
        powers = torch.stack([torch.ones_like(tau), tau, -tau.square() / 2], dim=1)     # [8, 3]
        rows = 128 if x.device.type == "cpu" else 32768         # 128 fit a CPU's cache
        logp = []
        score = []
        for x_rows, square_rows in zip(x.split(rows), square.split(rows)):
            logp_rows, score_rows = self._evaluate_rows(x_rows, square_rows, powers)
            logp.append(logp_rows)
            score.append(score_rows)
        return torch.cat(logp)[:, 0], torch.cat(score)

    def _evaluate_rows(self, x, square, powers):
        """Log-density [n, 1] and its gradient [n, 2] at x [n, 2] for squared noise levels [n, 1].

        Along a branch's own axes the covariance plus sigma^2 I is diagonal, and its eight Gaussians share it.
        They lie at middle + tau half, tau = -1 ... 1, so their exponents are base + B tau - C tau^2 / 2 with
        three coefficients per branch, and one matrix product with `powers` [8, 3] gives them all.
        """
        axes = self._tensor("axes", x.dtype)
        half = self._tensor("half", x.dtype)
        a = x @ axes - self._tensor("middle", x.dtype)                                  # [axis, n, K]
        precision = (self._tensor("lam", x.dtype) + square).reciprocal()                # [axis, n, K]
        pull = precision * a
        slope = precision * half
        base = self._tensor("log_weight", x.dtype) + 0.5 * (precision.prod(0).log() - (pull * a).sum(0))
        base_B_C = torch.stack([base, (pull * half).sum(0), (slope * half).sum(0)])
        exponent = (powers / math.log(2) @ base_B_C.flatten(1)).view(8, *base.shape)    # [8, n, K], base 2
        most = exponent.amax(0).amax(1, keepdim=True)                                   # [n, 1]
        share = exponent.sub_(most).clamp_(min=-115).exp2_()    # the clamp avoids underflow, which is slow
        S0, S1 = (powers[:, :2].T @ share.flatten(1)).view(2, *base.shape)      # sums of share, share tau
        total = S0.sum(1, keepdim=True)
        logp = (most + total.log2()) * math.log(2) - math.log(2 * math.pi)
        score = (axes @ (slope * S1 - pull * S0).mT).sum(0).mT / total
        return logp, score

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
# A branch of the tree and everything that grows from it: eight Gaussians along a line, then two child
# branches, each grown to its end before the next. The order of the random draws is part of the definition.

class _Branch(typing.NamedTuple):
    weight: float
    mean: np.ndarray                            # [8, 2]
    cov: np.ndarray                             # [2, 2], shared by the eight


def _grow(random, position, angle, depth=0):
    """The branch that starts at `position` [2] with this angle and all that grow from it, as one list."""
    scale = np.array([1.3136, 1.3844])
    u = np.array([np.cos(angle), np.sin(angle)])
    length = 0.292 * 0.8 ** depth * (0.2 * random.randn() + 1)
    h = 0.2 * 0.8 ** depth / length                             # thickness
    q = 0.06 * length * scale
    t = np.linspace(0.07, 0.93, 8)
    mean = (position + u * length * t[:, None]) * scale
    cov = (np.outer(u, u) + h ** 2 * (np.eye(2) - np.outer(u, u))) * np.outer(q, q)
    branches = [_Branch(length * 0.5 ** depth, mean, cov)]
    for sign in (1, -1):
        child_angle = angle + sign * 0.7 ** depth * (0.2 * random.randn() + 1)
        if depth + 1 < 7:
            branches += _grow(random, position + u * length, child_angle, depth + 1)
    return branches


# ------------------------------------------------------------------------------------------------------------
# A set of images or latents: one array, on the training device if it fits. A batch is an index into it.

@dataclass
class Dataset:
    x: torch.Tensor                             # uint8 images or float latents [N, C, H, W]
    labels: torch.Tensor = None                 # int64 [N] on the host; None = unlabelled
    class_names: tuple = ()
    kind: str = "image"                         # "image" | "latent"
    mean: tuple = (127.5,)                      # per channel, or one for all
    std: tuple = (63.75,)
    fingerprint: str = ""                       # hash of the content alone, wherever the data lies
    report: tuple = ()                          # lines that say what was loaded and what was left out

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
        rows = self.x[put(index, self.x.device)]
        return scale(put(rows, device), self.mean, self.std)

    def to(self, device):
        """Move the array to `device` (to a GPU only if it takes less than half of the free memory)."""
        if torch.device(device).type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self.x.nbytes >= free / 2:
                return self
        self.x = self.x.to(device)
        return self


def put(tensor, device):
    """The tensor on `device`; a copy from host memory to a GPU is not waited for."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def scale(x, mean, std):
    """Raw examples [n, C, H, W] -> float32 (x - mean) / std * 0.5: pixels in [-1, 1], latents of std 0.5."""
    center = torch.tensor(mean).view(-1, 1, 1)
    factor = 0.5 / torch.tensor(std).view(-1, 1, 1)
    return (x.float() - put(center, x.device)) * put(factor, x.device)


def unscale(x, config):
    """The inverse of `scale` for samples x [n, ...] of a denoiser with this configuration: uint8 images, raw
    latents, or the points themselves."""
    if config["kind"] == "tree":
        return x
    mean = torch.tensor(config["mean"]).reshape(-1, 1, 1).to(x.device)
    std = torch.tensor(config["std"]).reshape(-1, 1, 1).to(x.device)
    raw = x.float() * 2 * std + mean
    if config["kind"] == "image":
        return raw.round().clip(0, 255).to(torch.uint8)
    return raw


# ------------------------------------------------------------------------------------------------------------
# Random generators. All randomness is a function of (seed, step, name), so that a resumed run replays
# nothing, and two runs with one seed see the same data and noise.

def stream(seed, step, name, device="cpu"):
    """torch.Generator on `device`, seeded by a hash of (seed, step, name); name is e.g. "data" or "noise"."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


# ------------------------------------------------------------------------------------------------------------
# Batches by step: batches[step] depends on (seed, step) alone. On a CPU a uniform batch of b is the beginning
# of that step's super-batch of B (for multiples of 16). Indices, flips and noise levels are drawn on the host
# and copied without waiting; noise is drawn on the device. A mirrored image of class c has label c + classes,
# so that a model does not mirror its samples.

class Batch(typing.NamedTuple):
    x0: torch.Tensor                            # float32 [n, ...]
    noise: torch.Tensor                         # unit normal [n, ...]
    sigma: torch.Tensor                         # noise level [n]
    labels: torch.Tensor                        # int64 [n] or None
    target: torch.Tensor                        # the output that D(x; sigma) should have [n, ...]

    @property
    def x(self):
        """x0 + sigma noise [n, ...]."""
        return self.x0 + per_example(self.sigma, self.x0) * self.noise

    def rows(self, index):
        """The Batch of the examples at `index`, a slice or int64 [k]."""
        return Batch(*(None if tensor is None else tensor[index] for tensor in self))


class Batches:
    """batches[step] is the Batch of a step; batches.of(index, step) is that of the examples at `index`."""

    def __init__(
        self,
        dataset,                # Dataset or Tree, moved to its device beforehand
        n,                      # examples per batch
        seed,                   # integer
        device="cpu",           # on which the batch is wanted
        examples=None,          # indices [M] of the examples to draw from; None = all
        flip=False,             # mirror half of the images, as classes of their own
        targets="sample",       # "sample" = x0 itself; "exact" = E[x0 | x], which the tree knows
        P_mean=-1.2,            # of ln sigma
        P_std=1.2,
        rows=slice(None),       # rows of the batch that this process works on
        purpose="",             # starts the names of the streams: "validation-" shares no noise with training
    ):
        self.dataset = dataset
        self.n = n
        self.seed = seed
        self.device = torch.device(device)
        self.flip = flip
        self.targets = targets
        self.P_mean = P_mean
        self.P_std = P_std
        self.rows = rows
        self.purpose = purpose
        self.examples = examples
        if examples is None and dataset.kind != "tree":
            self.examples = torch.arange(len(dataset))

    def __getitem__(self, step):
        """The Batch of this step, drawn with replacement."""
        if self.dataset.kind == "tree":
            x0 = self.dataset.sample(self.n, self._stream(step, "data", self.dataset.device))
            return self._noised(x0[self.rows], None, step)
        drawn = torch.randint(len(self.examples), (self.n,), generator=self._stream(step, "data"))
        return self.of(self.examples[drawn], step)

    def of(self, index, step):
        """The Batch of the examples at `index` int64 [n], with flips, noise levels and noise of this step."""
        wanted = index[self.rows]
        x0 = self.dataset.take(wanted, self.device)
        labels = None
        if self.dataset.labels is not None:
            labels = self.dataset.labels[wanted]
        if self.flip:
            mirrored = torch.randint(2, (self.n,), generator=self._stream(step, "flip"))[self.rows]     # 0, 1
            labels = mirrored if labels is None else labels + mirrored * self.dataset.classes
            x0 = torch.where(per_example(put(mirrored, self.device), x0) == 1, x0.flip(3), x0)
        if labels is not None:
            labels = put(labels, self.device)
        return self._noised(x0, labels, step)

    def _noised(self, x0, labels, step):
        """The Batch of clean examples [n, ...] with the noise levels, noise and target of this step."""
        normal = torch.randn(self.n, generator=self._stream(step, "sigma"))[self.rows]
        sigma = put((self.P_mean + self.P_std * normal).exp(), self.device)
        shape = (self.n, *self.dataset.shape)
        noise = torch.randn(shape, generator=self._stream(step, "noise", self.device), device=self.device)
        batch = Batch(x0, noise[self.rows], sigma, labels, x0)
        if self.targets == "exact":
            batch = batch._replace(target=self.dataset.denoise(batch.x, sigma))
        return batch

    def _stream(self, step, name, device="cpu"):
        return stream(self.seed, step, self.purpose + name, device)


def per_example(v, like):
    """v [n] as [n, 1, ...] with as many dimensions as `like`, so that it multiplies whole examples."""
    ones = (1,) * (like.ndim - 1)
    return v.reshape(-1, *ones)


def micro_batches(n, size):
    """Slices that cover n examples, of `size` each; None = one slice."""
    step = n if size is None else size
    return [slice(start, start + step) for start in range(0, n, step)]


# ------------------------------------------------------------------------------------------------------------
# Classes of generated samples. The class of a sample follows from its number, so that sample i has the same
# class however many are drawn.

GOLDEN = 0x9E3779B97F4A7C15                     # 2 ** 64 over the golden ratio


def classes_in_turn(shares, index):
    """The classes int64 [n] of the samples with numbers `index` int64 [n], for class shares [K] of sum 1.

    With equal shares the classes come in turn. Other shares hold in every long stretch of numbers: a turn of
    K numbers takes K evenly spaced quantiles of the shares, and the golden ratio shifts them from turn to
    turn. The shift is computed in integers, since doubles cannot resolve it for numbers near 1e15.
    """
    K = len(shares)
    shift = [(2 * turn + 1) * GOLDEN % 2 ** 65 / 2 ** 65 for turn in (index // K).tolist()]
    shift = torch.tensor(shift, dtype=torch.float64)            # (turn + 1/2) / the golden ratio, modulo 1
    quantile = (index % K + shift) / K
    ends = torch.tensor(shares, dtype=torch.float64).cumsum(0)
    return torch.searchsorted(ends, quantile).clamp(max=K - 1)


# ------------------------------------------------------------------------------------------------------------
# Loading. Every source becomes one array in the cache folder, which later runs map into memory. Nothing is
# guessed: ambiguous data is refused.

CACHE_VERSION = 6                               # to be raised when the cached content changes
CACHE_ADVICE = "set DATA_CACHE to a folder that can be written"
IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
if "avif" in pillow_features.modules and pillow_features.check("avif"):
    IMAGES += (".avif",)
NOTES = {".txt", ".md", ".json", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".html", ".log", ".py", ".db",
         ".ini", ".sh", ".pdf"}                 # a folder that holds only these is not a class
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "unlabeled", "unlabelled"}
CIFAR_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def load(source, size=None):
    """The images or latents at `source` as a Dataset. Raises DataError if they cannot be read.

    source  a folder or .zip with one sub-folder a class (or none: unlabelled), the same with EDM's
            dataset.json on top, the folder cifar-10-batches-py, or an .npz with `images` uint8 [N, 3, H, W]
            or [N, H, W, 3], or `latents` float [N, C, H, W] (with optional `mean`, `std` [C]), and optional
            `labels` [N] and `class_names` [K]
    size    center-crop to a square and resize (Lanczos) to this many pixels; None = as they are
    """
    source = Path(source)
    folder = cache_folder()
    with reading(source, "a data set"):
        cached = folder / _cache_name(source, size)
    remove_leftovers(folder)
    if not os.path.exists(cached):
        require_writable(cached, CACHE_ADVICE)
        with reading(source, "a data set"):
            dataset = _read(source, size)
        with writing(cached) as file:
            torch.save(vars(dataset), file)
    with reading(cached, "a cached data set (delete it)"):
        return Dataset(**_load_mapped(cached))


def cache_folder():
    """The folder of cached data sets and features: $DATA_CACHE, else ~/.cache/data-curation."""
    with reading("~", "a home folder for the cache (set DATA_CACHE)"):
        if os.environ.get("DATA_CACHE"):
            return Path(os.environ["DATA_CACHE"]).expanduser()
        return Path.home() / ".cache" / "data-curation"


def _cache_name(source, size):
    """The name of the cached file: a hash of the source's path, its files' sizes and times, and `size`."""
    source = source.resolve()
    if source.is_dir():
        names, _ = _without_runs(list(_walk(source)))
        files = sorted(source / name for name in names)
    else:
        files = [source]
    stamps = []
    for file in files:
        status = file.stat()
        stamps.append((str(file), status.st_size, status.st_mtime_ns))
    key = repr((CACHE_VERSION, str(source), size, stamps))
    return hashlib.sha256(key.encode()).hexdigest()[:32] + ".pt"


def _load_mapped(cached):
    """The dictionary in a cached file, with its array mapped into memory. Changes do not reach the file."""
    try:
        str(cached).encode()
    except UnicodeEncodeError:                                  # torch maps only files with UTF-8 names
        with open(cached, "rb") as file:
            return torch.load(file, weights_only=True)
    return torch.load(cached, mmap=True, weights_only=True)


def _read(source, size):
    """The Dataset at `source`, read without the cache. Any exception means that it is not a data set."""
    if source.suffix.lower() == ".npz":
        return _read_npz(source, size)
    members, runs = _members(source)
    cifar_files = [name for name in sorted(members) if _base_name(name) in CIFAR_BATCHES]
    if cifar_files:
        dataset = _read_cifar(members, cifar_files, size)
    else:
        dataset = _read_images(members, size)
    if runs:
        dataset.report.append(f"{runs:,} folders of runs left out")
    return dataset


def _make_dataset(x, labels, class_names=None, report=(), **settings):
    """The Dataset of arrays x [N, C, H, W] and labels [N] or None. Its classes are the labels that occur, in
    order; `class_names` [K] are those of labels 0 ... K - 1 (None: their numbers)."""
    x = np.ascontiguousarray(x)
    dataset = Dataset(torch.from_numpy(x), **settings)
    classes = "no labels"
    if labels is not None:
        present, numbers, counts = _count_labels(np.asarray(labels), len(x), class_names)
        dataset.class_names = [class_names[label] if class_names else str(label) for label in present]
        dataset.labels = torch.from_numpy(numbers.astype(np.int64))
        first = ", ".join(dataset.class_names[:10])
        classes = f"{len(present):,} classes of {counts.min():,} to {counts.max():,}: {first}"
        if len(present) > 10:
            classes += ", ..."
    c, h, w = x.shape[1:]
    dataset.report = [f"{len(x):,} {dataset.kind}s of {c}x{h}x{w}", classes, *report]
    values = (x.shape, dataset.kind, dataset.class_names, dataset.mean, dataset.std)
    digest = hashlib.sha256(repr(values).encode())
    digest.update(x)
    if labels is not None:
        digest.update(dataset.labels.numpy())
    dataset.fingerprint = digest.hexdigest()
    return dataset


def _count_labels(labels, n, class_names):
    """-> (the labels that occur, the position of each example's label among them [n], their counts)."""
    if labels.shape != (n,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(f"`labels` is {labels.dtype} {list(labels.shape)}, wanted numbers from 0 on [{n}]")
    if class_names and labels.max() >= len(class_names):
        raise ValueError(f"label {labels.max()}, but there are {len(class_names)} class names")
    return np.unique(labels, return_inverse=True, return_counts=True)


# ------------------------------------------------------------------------------------------------------------
# The files of a folder or a zip, as one dictionary {name with slashes: function that returns the bytes}.
# Hidden entries and the folders of runs are left out.

def _members(source):
    """-> (the members, how many folders of runs were left out)."""
    if source.is_dir():
        members = {name: (source / name).read_bytes for name in _walk(source)}
    else:
        members = _zip_members(source)
    names, runs = _without_runs(members)
    return {name: members[name] for name in names}, runs


def _walk(folder, prefix="", above=()):
    """Yield the names of all files below a folder, following links. `above` identifies the folders on the way
    from the top, so that a link to one of them is an error and not an endless walk."""
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise ValueError(f"{prefix} leads back to a folder above it by symbolic links")
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not _is_hidden(entry.name)]
    visible.sort(key=lambda entry: entry.name)
    for entry in visible:
        if entry.is_dir():
            yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, identity))
        else:
            yield prefix + entry.name


def _zip_members(source):
    """{name: function that returns the bytes} of the files in a zip."""
    archive = zipfile.ZipFile(source)
    members = {}
    for info in archive.infolist():
        name = _zip_name(info)
        steps = [step for step in name.split("/") if step not in ("", ".")]
        if name.endswith("/") or any(_is_hidden(step) for step in steps):
            continue
        name = "/".join(steps)
        if name in members:
            raise ValueError(f"{name} is in it twice, as if it had been appended to: pack it anew")
        members[name] = functools.partial(archive.read, info)
    return members


def _zip_name(info):
    """The name of a zip's entry, with slashes. Finder and 7-Zip write UTF-8 without setting its flag, and
    Python then takes it for code page 437."""
    name = info.filename
    if not info.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):                 # it is not UTF-8
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _without_runs(names):
    """-> (the names outside of run folders, how many run folders there are). A run folder holds a
    checkpoint.pt, or has a guide or proxy folder that does, before the run's own first checkpoint."""
    runs = set()
    for name in names:
        folder, _, file = name.rpartition("/")
        if file == "checkpoint.pt":
            if _base_name(folder) in ("guide", "proxy"):
                folder = folder.rpartition("/")[0]
            runs.add(folder)
    if "" in runs:
        raise ValueError("it is the folder of a run (checkpoint.pt)")
    if runs:
        names = [name for name in names if runs.isdisjoint(_folders_of(name))]
    return list(names), len(runs)


def _folders_of(name):
    """["a", "a/b"] for "a/b/c.png"."""
    steps = name.split("/")
    return ["/".join(steps[:depth]) for depth in range(1, len(steps))]


def _base_name(name):
    return name.rpartition("/")[2]


def _is_hidden(name):
    return name.startswith((".", "@")) or name == "__MACOSX"


def _count_suffixes(names):
    """"3 .txt, 1 .md": the five most frequent suffixes among names of files."""
    suffixes = [os.path.splitext(name)[1].lower() or "without a suffix" for name in names]
    counts = collections.Counter(sorted(suffixes)).most_common()
    words = ", ".join(f"{count:,} {suffix}" for suffix, count in counts[:5])
    return words + ", ..." if len(counts) > 5 else words


# ------------------------------------------------------------------------------------------------------------
# Images in a folder or a zip, labelled by EDM's dataset.json or by their folders. Every file is read, or
# counted in the report, or causes an error.

def _read_images(members, size):
    """The Dataset of the images among the members."""
    images = sorted(name for name in members if name.lower().endswith(IMAGES))
    others = sorted(name for name in members if not name.lower().endswith(IMAGES))
    listings = [name for name in others if _base_name(name) == "dataset.json"]
    if not images:
        left_out = f", but {_count_suffixes(others)}" if others else ""
        raise ValueError(f"it holds 0 images ({', '.join(IMAGES)}){left_out}")
    if len(listings) > 1:
        raise ValueError(f"it holds {len(listings)} dataset.json: give a folder with one")
    top = os.path.commonpath([os.path.dirname(name) for name in images + listings])     # shared by all
    below = {name: name[len(top):].lstrip("/") for name in images}                      # paths below `top`
    if listings:
        if os.path.dirname(listings[0]) != top:
            raise ValueError(f"{listings[0]} does not lie on top of all images")
        label_of = _labels_by_listing(json.loads(members[listings[0]]()), below)
        class_names = None
    else:
        folder_of = _first_folders(below)
        _refuse_lost_folders(images, others, top, is_labelled=folder_of[images[0]] is not None)
        class_names = sorted(set(folder_of.values()) - {None})
        label_of = dict.fromkeys(images)
        for name, folder in folder_of.items():
            if folder is not None:
                label_of[name] = class_names.index(folder)
    order = sorted(images, key=lambda name: (label_of[name] or 0, name))
    labels = None
    if label_of[order[0]] is not None:
        labels = [label_of[name] for name in order]
    x, remarks = _decode_all({name: members[name] for name in order}, size)
    report = []
    if others:
        report.append(f"{len(others):,} other files left out ({_count_suffixes(others)})")
    return _make_dataset(x, labels, class_names, report + remarks)


def _first_folders(below):
    """{name: the first folder of its path below `top`, None if there is none}. ValueError for folders that
    look like splits and for images beside folders."""
    folders = {name: rest.split("/")[:-1] for name, rest in below.items()}
    splits = {}                                                 # {parent: split-like folders in it}
    for steps in folders.values():
        for depth, step in enumerate(steps):
            if step.lower() in SPLITS:
                splits.setdefault("/".join(steps[:depth]), set()).add(step)
    for parent, names in splits.items():
        if len(names) > 1:
            where = f" in {parent}" if parent else ""
            raise ValueError(f"{', '.join(sorted(names))}{where} look like splits, not like classes: "
                             "give one of these folders")
    if any(folders.values()) and not all(folders.values()):
        raise ValueError("images lie both beside and inside of class folders")
    return {name: steps[0] if steps else None for name, steps in folders.items()}


def _refuse_lost_folders(images, others, top, is_labelled):
    """ValueError for a class folder without an image that can be read.

    `top` is the folder that all images share. Labelled images lie in class folders in it. Otherwise they lie
    in `top` itself, which may be the only class folder that is left: lost ones would lie beside it.
    """
    if is_labelled:
        parent = top
    elif top:
        parent = os.path.dirname(top)
    else:
        return                                                  # images without any folder
    prefix = f"{parent}/" if parent else ""
    folders_read = {name[len(prefix):].partition("/")[0] for name in images}
    lost = {}                                                   # {folder: its files}
    for name in others:
        folder, slash, _ = name.removeprefix(prefix).partition("/")
        is_note = os.path.splitext(name)[1].lower() in NOTES
        if name.startswith(prefix) and slash and folder not in folders_read and not is_note:
            lost.setdefault(folder, []).append(name)
    if lost:
        folder = min(lost)
        raise ValueError(f"the folder {folder} holds no image that can be read "
                         f"({_count_suffixes(lost[folder])}): convert its files, or move it elsewhere")


def _labels_by_listing(listing, below):
    """{name: class number or None} by EDM's dataset.json: {"labels": [["00000/img00000000.png", 3], ...]}, or
    null for no labels."""
    if listing["labels"] is None:
        return dict.fromkeys(below)
    listed = {name.replace("\\", "/"): label for name, label in listing["labels"]}
    not_listed = sorted(set(below.values()) - set(listed))
    missing = sorted(set(listed) - set(below.values()))
    if not_listed:
        raise ValueError(f"{not_listed[0]} is not listed (dataset.json)")
    if missing:
        raise ValueError(f"{missing[0]} is missing (dataset.json)")
    for name, label in listed.items():
        if type(label) is not int or label < 0:
            raise ValueError(f"{name} has the label {label}, wanted a class number (dataset.json)")
    return {name: listed[rest] for name, rest in below.items()}


# ------------------------------------------------------------------------------------------------------------
# Decoding. Pillow refuses PNG files with more than 1 MiB of compressed text, though their pixels are whole.
# The limits are raised but not lifted, since a hostile file can expand to any size.

PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 27
PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 28


class _Picture(typing.NamedTuple):
    pixels: np.ndarray                          # uint8 [3, H, W]
    frames_left_out: int                        # of a TIFF, GIF, WebP or PNG with several
    is_enlarged: bool


def _decode_all(readers, size):
    """-> (uint8 [N, 3, H, W], remarks for the report) of the members `readers`, decoded by threads, since
    Pillow releases Python's lock."""
    names = list(readers)
    x = None
    frames = []                                                 # left out, of each file that has several
    enlarged = 0

    def decode_name(name):
        return _decode(name, readers[name], size)

    with (ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
          contextlib.closing(pool.map(decode_name, names)) as pictures):        # an error cancels the rest
        for i, picture in enumerate(pictures):
            if x is None:
                x = np.empty((len(names), *picture.pixels.shape), np.uint8)
            if picture.pixels.shape != x.shape[1:]:
                raise ValueError(f"sizes differ, give --size: {names[0]}, {names[i]}")
            x[i] = picture.pixels
            if picture.frames_left_out > 0:
                frames.append(picture.frames_left_out)
            if picture.is_enlarged:
                enlarged += 1
            if len(names) > 10_000:
                progress(f"reading images: {i + 1:,} of {len(names):,}", last=i + 1 == len(names))
    remarks = []
    if frames:
        remarks.append(f"{sum(frames):,} frames left out: only the first is read of {len(frames):,} files "
                       "with several")
    if enlarged:
        remarks.append(_enlarged(enlarged, size))
    return x, remarks


def _enlarged(count, size):
    return f"{count:,} images smaller than {size} pixels were enlarged"


def _decode(name, read, size):
    """One file as a _Picture: turned upright by EXIF, transparency on white, 16-bit gray to 8 bits."""
    try:
        image = Image.open(io.BytesIO(read()))
        frames = getattr(image, "n_frames", 1)
        if image.format == "MPO":                               # a phone's photo with its preview or depth
            frames = 1
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {image.mode} have no known range, give 8 or 16 bits")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        is_enlarged = size is not None and min(image.size) < size
        return _Picture(_resize(image.convert("RGB"), size), frames - 1, is_enlarged)
    except UnidentifiedImageError:
        raise ValueError(f"{name}: cannot identify image file") from None
    except (NameError, ImportError):                            # no file causes these
        raise
    except Exception as error:                                  # Pillow's decoders raise all kinds
        raise ValueError(f"{name}: {error}") from None


def _resize(image, size):
    """Center-crop a Pillow RGB image to a square and resize it to `size` pixels: uint8 [3, H, W]."""
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left = (image.width - side) // 2
        top = (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.LANCZOS)
    return np.asarray(image).transpose(2, 0, 1)


def _resize_all(x, size):
    """-> (`_resize` of an array uint8 [N, 3, H, W], remarks for the report)."""
    if size is None or x.shape[2:] == (size, size):
        return x, []
    resized = np.stack([_resize(Image.fromarray(image), size) for image in x.transpose(0, 2, 3, 1)])
    if min(x.shape[2:]) < size:
        return resized, [_enlarged(len(x), size)]
    return resized, []


# ------------------------------------------------------------------------------------------------------------
# CIFAR-10's python batches are pickles, and a pickle can run code. This unpickler resolves only the four
# names that numpy's arrays of 2009 and of today need, and runs nothing else.

class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        """The object that a name in the pickle stands for; ValueError for all names but four."""
        if (module, name) == ("_codecs", "encode"):
            return lambda text, _: text.encode("latin1")
        if module.startswith("numpy") and name == "_reconstruct":
            return np._core.multiarray._reconstruct
        if module.startswith("numpy") and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise ValueError(f"refused, it wants to run {module}.{name}")


def _read_cifar(members, names, size):
    """The Dataset of the five training batches, the members with these names."""
    if len(names) != 5:
        raise ValueError(f"{len(names)} of CIFAR-10's 5 training batches: give a folder with each once")
    images = []
    labels = []
    for name in names:
        batch = _Unpickler(io.BytesIO(members[name]()), encoding="bytes").load()
        images.append(batch[b"data"])
        labels.append(batch[b"labels"])
    x = np.concatenate(images)
    if x.dtype != np.uint8:
        raise ValueError(f"CIFAR-10's data is {x.dtype}, wanted uint8")
    x, remarks = _resize_all(x.reshape(-1, 3, 32, 32), size)
    report = [f"CIFAR-10's 5 training batches, {len(members) - 5} other files left out", *remarks]
    return _make_dataset(x, np.concatenate(labels), CIFAR_CLASSES, report)


# ------------------------------------------------------------------------------------------------------------
# An .npz file of images or latents.

def _read_npz(source, size):
    """The Dataset of its `images` or `latents`, with its `labels`, `class_names`, `mean` and `std` if any."""
    with np.load(source, allow_pickle=False) as file:
        names = {"images", "latents", "labels", "class_names", "mean", "std"}.intersection(file.files)
        arrays = {name: file[name] for name in names}
    if "images" not in arrays and "latents" not in arrays:
        raise ValueError("it has neither `images` nor `latents`")
    labels = arrays.get("labels")
    class_names = arrays.get("class_names")
    if class_names is not None:
        is_text = class_names.ndim == 1 and class_names.dtype.kind == "U"
        if not is_text or len(set(class_names.tolist())) < len(class_names):
            raise ValueError(f"`class_names` is {class_names.dtype} {list(class_names.shape)}, "
                             "wanted K different texts")
        class_names = class_names.tolist()
    if "latents" in arrays:
        if size is not None:
            raise ValueError("--size is for images, and these are latents")
        x, mean, std = _check_latents(arrays)
        return _make_dataset(x, labels, class_names, kind="latent", mean=mean.tolist(), std=std.tolist())
    x, remarks = _resize_all(_check_images(arrays["images"]), size)
    return _make_dataset(x, labels, class_names, remarks)


def _check_images(x):
    """x as uint8 [N, 3, H, W]."""
    if x.ndim != 4 or not x.size or x.dtype != np.uint8:
        raise ValueError(f"`images` is {x.dtype} {list(x.shape)}, wanted uint8 [N, 3, H, W]")
    if x.shape[1] == 3:
        return x
    if x.shape[3] == 3:
        return x.transpose(0, 3, 1, 2)
    raise ValueError(f"`images` is {list(x.shape)}, wanted three channels")


def _check_latents(arrays):
    """-> (latents float16 or float32 [N, C, H, W], mean [C], std [C]), the last two computed if not given."""
    x = arrays["latents"]
    if x.ndim != 4 or not x.size or x.dtype.kind != "f":
        raise ValueError(f"`latents` is {x.dtype} {list(x.shape)}, wanted floats [N, C, H, W]")
    if not np.isfinite(x).all():
        raise ValueError("`latents` holds NaN or infinite values")
    x = x.astype(np.float16 if x.dtype.itemsize == 2 else np.float32)
    if "mean" in arrays and "std" in arrays:
        mean = arrays["mean"]
        std = arrays["std"]
    else:
        mean = x.mean((0, 2, 3), np.float64)
        std = x.std((0, 2, 3), np.float64).clip(1e-6)
    channels = x.shape[1:2]
    if mean.shape != channels or std.shape != channels:
        raise ValueError(f"`mean`, `std` are {list(mean.shape)}, {list(std.shape)}, wanted {list(channels)}")
    if not np.isfinite([mean, std]).all() or std.min() <= 0:
        raise ValueError("`mean` and `std` must be finite, and `std` above 0")
    return x, mean, std


# ------------------------------------------------------------------------------------------------------------
# The pool: the examples that exist for a run. Guide, proxy, pruning and model see nothing else.

def split_pool(dataset, holdout=0, imbalance=None, seed=0):
    """-> (pool, held_out), sorted int64 indices; held_out is None for holdout 0.

    holdout     examples that are held out for the validation loss, the same ones for every seed
    imbalance   make the classes of the pool long-tailed, with this ratio of head to tail; None = as they are
    seed        of the long tail
    """
    order = torch.randperm(len(dataset), generator=stream(0, 0, "holdout"))
    held_out = order[:holdout].sort().values
    pool = order[holdout:].sort().values
    if imbalance is not None:
        pool = pool[long_tail(dataset.labels[pool], imbalance, seed)]
    if holdout == 0:
        return pool, None
    return pool, held_out


def long_tail(labels, ratio, seed=0):
    """Sorted int64 indices of a long-tailed subset of labels [N], random within a class.

    Of K classes, class c keeps n_max R^(-c / (K - 1)) examples, where R >= 1 is the ratio of head to tail.
    n_max is the largest number for which every class that occurs has enough examples.
    """
    counts = torch.bincount(labels).tolist()
    exponents = [c / max(len(counts) - 1, 1) for c in range(len(counts))]
    most = min(count * ratio ** exponent for count, exponent in zip(counts, exponents) if count > 0)
    kept = []
    for c, exponent in enumerate(exponents):
        members = torch.nonzero(labels == c)[:, 0]
        order = torch.randperm(len(members), generator=stream(seed, c, "long tail"))
        n = max(1, round(most * ratio ** -exponent))
        kept.append(members[order[:n]])
    return torch.cat(kept).sort().values


# ------------------------------------------------------------------------------------------------------------
# Coreset pruning: each example gets a priority within its class, and the best fraction of each class is kept.
#   gaussian    log-density under the class's Gaussian (instance selection, https://arxiv.org/abs/2007.15255)
#   knn         minus the distance to the k-th nearest neighbour of the class
#   moderate    closeness of the distance from the class's median feature to the median of these distances
#               (moderate coresets, ICLR 2023). The official code takes one window of ranks over all classes,
#               so that a class may lose everything; this ranks within a class, as the pruning paper prunes.
#   random      a random number

PRUNING = ("gaussian", "knn", "moderate", "random")


def prune(priority, labels, keep):
    """Sorted int64 indices of the examples to keep, by priority [N] and labels [N] (None: one class). `keep`
    in (0, 1] is the fraction of each class, but at least one example is kept; ties go to the earlier one."""
    kept = [members[:max(1, round(keep * len(members)))] for members in ranked(priority, labels)]
    return torch.cat(kept).sort().values


def ranked(priority, labels):
    """The indices of each class that has examples, the best first."""
    classes = []
    for members in indices_by_class(labels, len(priority)):
        order = torch.sort(priority[members], descending=True, stable=True).indices
        classes.append(members[order])
    return classes


def priorities(features, labels, method="gaussian", k=5, seed=0):
    """The priority of each example: float64 [N], comparable within a class only. Features are [N, d], labels
    [N] or None; `method` is one of PRUNING; k is for knn, the seed for random."""
    if method == "random":
        return torch.rand(len(features), generator=stream(seed, 0, "prune"), dtype=torch.float64)
    function = dict(gaussian=_gaussian, knn=_knn, moderate=_moderate)[method]
    priority = torch.empty(len(features), dtype=torch.float64)
    for members in indices_by_class(labels, len(features)):
        x = features[members].double()
        priority[members] = function(x - x.mean(0), k).cpu()
    return priority


def indices_by_class(labels, n):
    """The indices of each class that has examples, sorted; labels [n], or None for one class."""
    if labels is None:
        return (torch.arange(n),)
    counts = [count for count in torch.bincount(labels).tolist() if count]
    return torch.split(labels.argsort(stable=True), counts)


def _gaussian(x, k):
    """Log-density of centered x [n, d]; the covariance is shrunk towards a multiple of the identity by OAS
    (https://arxiv.org/abs/0907.4698), which keeps it invertible for n < d."""
    n, d = x.shape
    S = x.T @ x / n                                                                     # [d, d]
    trace = S.trace()                                                                   # tr S
    square = S.square().sum()                                                           # tr S^2
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
    averages = []
    for rows in index.split(1024):
        images = dataset.take(rows)
        averages.append(torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1))
    x = torch.cat(averages)                                                             # [n, 64 C]
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T.double() @ x.double()).eigenvectors.flip(1)[:, :dims]  # largest first
    return x @ axes.float()


# ------------------------------------------------------------------------------------------------------------
# Class weights: they multiply the loss of a class's examples, and their mean over all examples is 1.

def class_counts(dataset, index=None):
    """How many examples each class has among those at `index` (None: all): float32 [classes]."""
    labels = dataset.labels if index is None else dataset.labels[index]
    return torch.bincount(labels, minlength=dataset.classes).float()


def class_weights_of_mean_one(weights, counts):
    """Weights [classes], scaled so that their mean over `counts` [classes] examples is 1."""
    return weights * counts.sum() / (weights * counts).sum()


def inverse_frequency(counts):
    """Weights [classes] that give each class the same total, from counts [classes]."""
    return 1 / counts.clamp(min=1)


def read_class_weights(source, class_names):
    """-> (weights float32 [classes], seconds, examples) from a file of `write_class_weights`. Seconds and
    examples are what finding the weights took. Raises DataError."""
    with reading(source, "class weights for these classes"):
        content = json.loads(Path(source).read_bytes())
        weight_of = content["weights"]
        if set(weight_of) != set(class_names):
            raise ValueError(f"it is for the classes {', '.join(list(weight_of)[:5])}, "
                             f"wanted {', '.join(class_names[:5])}")
        values = [weight_of[name] for name in class_names]
        seconds = content.get("seconds", 0)
        examples = content.get("examples", 0)
        for value in (*values, seconds, examples):
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ValueError(f"it holds {value}, wanted a number from 0 on")
        weights = torch.tensor(values, dtype=torch.float32)
        if not weights.isfinite().all() or not weights.any():
            raise ValueError("the weights are all 0, or too large")
    return weights, seconds, examples


def write_class_weights(target, class_names, weights, seconds, examples):
    """Write weights [classes] as JSON, with the seconds and examples that finding them took."""
    weight_of = dict(zip(class_names, weights.tolist()))
    content = dict(weights=weight_of, seconds=seconds, examples=examples)
    with writing(target) as file:
        file.write(json.dumps(content, indent=1).encode())


# ------------------------------------------------------------------------------------------------------------
# Class weights by group DRO, in DoReMi's form (https://arxiv.org/abs/2305.10429, algorithm 1): with e_c the
# mean over class c of max(loss(proxy) - loss(reference), 0), alpha_c <- alpha_c exp(eta e_c), normalized, and
# mixed with the uniform weights. The result is the running mean of alpha.

class GroupDRO(torch.nn.Module):
    """`alpha` [classes] and its running mean, `mean_alpha` [classes]; both sum to 1.

    eta         step size; 1 in DoReMi's paper and in the arguments of its official code
    smoothing   share of the uniform weights; 1e-3 in the paper, 1e-4 in its code

    Algorithm 1 weighs the loss of a step by the alpha of the same step. Here alpha weighs the loss of the
    next step, because the gradients of the first micro-batches are taken before the excess of the last is
    known. A class that is absent from a batch keeps its last e_c: with 0 instead, a class would lose weight
    for being rare.
    """

    def __init__(self, classes, eta=1.0, smoothing=1e-3):
        super().__init__()
        self.eta = eta
        self.smoothing = smoothing
        self.register_buffer("log_alpha", torch.full((classes,), -math.log(classes)))
        self.register_buffer("excess", torch.zeros(classes))
        self.register_buffer("total", torch.zeros(classes))
        self.register_buffer("steps", torch.zeros([]))

    def totals(self, excess, labels):
        """[2, classes]: the sum of max(excess, 0) and the number of examples of each class, from excess
        losses [B] and labels int64 [B]. An excess that is not finite counts as 0."""
        clipped = excess.float().clamp(min=0).nan_to_num(nan=0, posinf=0)
        totals = clipped.new_zeros(2, len(self.excess))
        return totals.index_add(1, labels, torch.stack([clipped, torch.ones_like(clipped)]))

    @torch.no_grad()
    def update(self, totals):
        """One step of alpha from the `totals` of a batch."""
        total, count = totals
        self.excess = torch.where(count > 0, total / count.clamp(min=1), self.excess)
        alpha = torch.softmax(self.log_alpha + self.eta * self.excess, 0)
        alpha = (1 - self.smoothing) * alpha + self.smoothing / len(alpha)
        self.log_alpha = alpha.log()
        self.total = self.total + alpha
        self.steps = self.steps + 1

    @property
    def alpha(self):
        return self.log_alpha.exp()

    @property
    def mean_alpha(self):
        return torch.where(self.steps > 0, self.total / self.steps.clamp(min=1), self.alpha)


# ------------------------------------------------------------------------------------------------------------
# Pictures: a grid of images, a density, panels beside or below one another.

def image_grid(images, columns, side=None):
    """Pillow image of uint8 [n, C, H, W] or latents, row by row, each `side` pixels wide (None: >= 48)."""
    if images.dtype != torch.uint8:
        latents = images.float()
        images = (latents / latents.std().clamp_min(1e-6) * 50 + 128).clamp(0, 255).to(torch.uint8)
    if images.shape[1] >= 3:
        images = images[:, :3]                                  # of latents the first three channels
    else:
        images = images[:, :1].expand(-1, 3, -1, -1)
    if side is None:
        side = max(48, images.shape[-1])
    rows = max(1, math.ceil(len(images) / columns))
    grid = Image.new("RGB", (columns * side, rows * side), "white")
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).contiguous().cpu().numpy()):
        image = Image.fromarray(pixels).resize((side, side), Image.BICUBIC)
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
    widths = [picture.width for picture in pictures]
    heights = [picture.height for picture in pictures]
    if across:
        size = (sum(widths) + 8 * len(pictures), max(heights) + 24)
    else:
        size = (max(widths), sum(heights) + 32 * len(pictures))
    canvas = Image.new("RGB", size, "white")
    x = 0
    y = 0
    for picture, title in zip(pictures, titles):
        canvas.paste(picture, (x, y + 24))
        ImageDraw.Draw(canvas).text((x + 4, y + 2), title, fill="black", font=ImageFont.load_default(16))
        if across:
            x += picture.width + 8
        else:
            y += picture.height + 32
    return canvas


def coreset_picture(dataset, pool, priority, kept, columns=8):
    """Pillow image of what `prune` kept of the examples at `pool` [n]: for each of the first ten classes a
    row of best-kept, last-kept and first-dropped images. priority [n]; `kept` are positions in the pool."""
    labels = None if dataset.labels is None else dataset.labels[pool]
    names = []
    best_kept = []
    last_kept = []
    dropped = []
    for members in ranked(priority, labels)[:10]:
        names.append("all" if labels is None else dataset.class_names[labels[members[0]]])
        n = int(torch.isin(members, kept).sum())
        best_kept.append(dataset.x[pool[members[:n][:columns]]])
        last_kept.append(dataset.x[pool[members[:n].flip(0)[:columns]]])
        dropped.append(dataset.x[pool[members[n:][:columns]]])
    sides = []
    for rows in (best_kept, last_kept, dropped):
        grids = [image_grid(images, columns) for images in rows]
        sides.append(panels(grids, names, across=False))
    return panels(sides, ["best kept", "last kept, nearest the border first", "first dropped"])


# ------------------------------------------------------------------------------------------------------------
# Files. What cannot be read becomes one DataError that names the file. A file that is written appears whole
# or not at all.

class DataError(ValueError):
    """An error that the user can fix: one printable line that names the file or flag and says why."""

    def __str__(self):
        return "".join(c if c.isprintable() else " " for c in super().__str__())


@contextlib.contextmanager
def reading(source, what):
    """Exceptions inside become a DataError, "SOURCE: not WHAT, why". The block holds the call that reads and
    the checks of its result, nothing else.

    A damaged or hostile file can raise almost any exception in the libraries that read it. Only errors that
    no file can cause pass: a name or module that does not exist, and the device's memory.
    """
    try:
        yield
    except (DataError, NameError, ImportError, torch.OutOfMemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or source}: no such file") from None
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):                         # of which the text is the key alone
            why = f"it has no {why}"
        raise DataError(f"{source}: not {what}, {why[:200]}") from None


@contextlib.contextmanager
def writing(target):
    """Open a binary file that becomes `target` if the block succeeds, and is removed if it fails. DataError
    if the file cannot be written; other exceptions of the block pass."""
    temporary = f"{target}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if error.filename not in (None, temporary):             # of another file, which the block reads
            raise
        raise _cannot_be_written(target, error) from None
    except RuntimeError as error:                               # torch.save raises it over the first error
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        if isinstance(error.__context__, OSError):
            raise _cannot_be_written(target, error.__context__) from None
        if "PytorchStreamWriter" in str(error):
            raise _cannot_be_written(target, OSError(error)) from None
        raise
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def _cannot_be_written(target, error, advice=""):
    """The DataError for an OSError of writing."""
    why = error.strerror or str(error) or type(error).__name__
    return DataError(f"{target}: cannot be written, {why[:80]}{advice}")


def require_writable(target, advice=None):
    """Make the folder of `target`. DataError, which ends in the advice, if `target` could not be written.
    Call it before the work, not after it."""
    folder = Path(target).absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _cannot_be_written(folder, error, f": {advice}" if advice else "") from None
    if os.path.isdir(target):
        raise DataError(f"{target}: is a folder, give the name of a file")


def remove_leftovers(folder):
    """Remove the temporary files of `writing` that killed programs left below a folder, a day old or more."""
    yesterday = time.time() - 24 * 3600
    with contextlib.suppress(OSError):
        for file in sorted(Path(folder).rglob("*.tmp")):
            with contextlib.suppress(OSError):                  # another user's, or gone by now
                if re.search(r"\.[0-9]+\.tmp$", file.name) and file.lstat().st_mtime < yesterday:
                    file.unlink()


# ------------------------------------------------------------------------------------------------------------
# Flags. Each function is an argparse type or makes one; argparse names the flag in its error.

def path(text):
    """An argparse type: a path, with ~ for the home folder."""
    return os.path.expanduser(text)


def number(kind, interval):
    """An argparse type: int or float (`kind`) in an interval, as "[1, inf)" or "(0, 1]", and never NaN."""
    ends = interval[1:-1].split(",")
    low = float(ends[0])
    high = float(ends[1])

    def parse(text):
        """The number in `text`; ArgumentTypeError outside of the interval."""
        value = kind(text)
        is_above = value > low or (value == low and interval[0] == "[")
        is_below = value < high or (value == high and interval[-1] == "]")
        fits_a_tensor = abs(value) < 2 ** 62
        if not (is_above and is_below and fits_a_tensor):
            raise argparse.ArgumentTypeError(f"{text} is not in {interval}")
        return value
    parse.__name__ = kind.__name__                              # "invalid int value: 'x'"
    return parse


def device(text):
    """An argparse type: the name of a torch device of this machine. Several processes take one each."""
    try:
        wanted = torch.device(text)
        if wanted.type == "cuda":
            if not torch.backends.cuda.is_built():
                raise RuntimeError("this torch is built without CUDA")
            index = wanted.index
            if not index:                                       # "cuda" and "cuda:0": the process's own
                index = int(os.environ.get("LOCAL_RANK", 0))
            wanted = torch.device("cuda", index)
            torch.cuda.set_device(wanted)                       # before the first call that would take cuda:0
        elif wanted.type != "cpu":
            raise RuntimeError("cpu and cuda are supported")
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text}: {first_line[:80]}") from None
    return str(wanted)


def parser(description, usage):
    """An ArgumentParser whose help shows every default; flags cannot be abbreviated."""
    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            if action.default is None or action.default is False:
                return action.help
            return super()._get_help_string(action)

        def _split_lines(self, text, width):
            lines = []
            for line in text.split("\n"):                       # a choice of a flag may have its own line
                lines += super()._split_lines(line, width)
            return lines
    return argparse.ArgumentParser(
        description=description, usage=f"%(prog)s {usage}", allow_abbrev=False,
        formatter_class=lambda prog: Help(prog, width=110))


# ------------------------------------------------------------------------------------------------------------
# Programs: one line on stderr for every error that the user can fix, and a progress line.

class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send: it stops a program as Ctrl-C does, so that cleaning up runs."""


def _raise_terminated(signal_number, frame):
    raise Terminated


def command(run, memory_advice="give --device cpu"):
    """Call run(). An error that the user can fix becomes one line on stderr and exit status 2; Ctrl-C and
    SIGTERM end with status 130 and 143. Characters that the output's encoding lacks appear as escapes."""
    for terminal in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):   # None, replaced or closed
            terminal.reconfigure(errors="backslashreplace")
    is_main_thread = threading.current_thread() is threading.main_thread()
    handles_sigterm = is_main_thread and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if handles_sigterm:
        signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        return run()
    except torch.OutOfMemoryError:
        message = f"error: out of device memory: {memory_advice}"
        status = 2
    except (DataError, OSError) as error:
        message = f"error: {error}"
        status = 2
    except KeyboardInterrupt as stop:
        message = "stopped; a training run goes on with the same command"
        status = 143 if isinstance(stop, Terminated) else 130
    finally:
        if handles_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    say(message)
    raise SystemExit(status)


def say(text, end="\n", file=None):
    """Print to `file` (None: stderr). If the terminal is closed, the text is lost and the program goes on."""
    file = sys.stderr if file is None else file
    if file is not None:                                        # pythonw, python >&-
        with contextlib.suppress(OSError, ValueError):
            print(text, end=end, file=file, flush=True)


_progress_shown = -math.inf                     # when the last progress line was shown


def progress(text, last=False):
    """Show `text` on stderr: rewritten in place on a terminal, else every ten seconds and the `last`."""
    global _progress_shown
    columns = _terminal_columns()
    seconds = 10 if columns is None else 0.5
    now = time.monotonic()
    if not last and now - _progress_shown <= seconds:
        return
    _progress_shown = now
    if columns is None:
        say(text)
    else:
        row = text[:columns - 1].ljust(columns - 1)             # a full row would move the cursor on
        say(row, end="\n" if last else "\r")


def _terminal_columns():
    """The width of the terminal behind stderr; None if stderr is not a terminal, or is a closed one."""
    try:
        if not sys.stderr.isatty():
            return None
    except (AttributeError, OSError, ValueError):               # stderr is None or closed
        return None
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (AttributeError, OSError, ValueError):
        columns = shutil.get_terminal_size().columns
    return columns or 80                                        # some terminals say 0
