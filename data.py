"""Data: the 2-D tree, image folders and archives, CIFAR-10, latents; batches that are a function of
(seed, step); coreset pruning, and class weights by distributionally robust optimization.

Pruning then reweighting: https://arxiv.org/abs/2409.19128. The tree: https://arxiv.org/abs/2406.02507.

    python data.py DATA --keep 0.1 --prune gaussian --out keep.npy --show coreset.png
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
import shutil
import stat
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

CACHE_VERSION = 1                               # raise it when what is cached changes
MAX_FILE, MAX_PIXELS, MAX_CLASSES = 2 ** 28, 2 ** 26, 100_000       # bytes of a file, pixels of an image
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
CIFAR_BATCHES = [f"data_batch_{i}{suffix}" for suffix in ("", ".bin") for i in range(1, 6)]
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
NUMPY_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")


# ------------------------------------------------------------------------------------------------------------
# What every loader raises for bad input: one line that names the file or flag, says why and what to do.

class DataError(ValueError):
    def __init__(self, message):
        super().__init__("".join(c if c.isprintable() else " " for c in str(message)))


# ------------------------------------------------------------------------------------------------------------
# The one line of long work: rewritten in place on a terminal, else a line every ten seconds and the last.

def progress(text, last=False, shown=[-math.inf]):
    """Show `text` on stderr, at most twice a second; `last` ends the line."""
    now, terminal = time.monotonic(), sys.stderr.isatty()
    if last or now - shown[0] > (0.5 if terminal else 10):
        shown[0] = now
        print(text.ljust(100) if terminal else text, end="\r" if terminal and not last else "\n",
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
    """Mixture of 1,016 Gaussians a class in the plane; classes = "A", "B" or "AB"."""
    kind, shape, classes, class_names = "tree", (2,), 0, ()

    def __init__(self, classes="A", device="cpu"):
        if classes not in ("A", "B", "AB"):
            raise DataError(f'tree classes must be "A", "B" or "AB", not {classes!r}')
        branches, random = [], np.random.RandomState(2)
        for name, angle in (("A", np.pi / 4), ("B", np.pi * 5 / 4)): # B continues A's random stream.
            grown = _grow(random, np.array([0.0030, 0.0325]), angle)
            branches += grown if name in classes else []
        weight, mean, cov = [np.concatenate(part) for part in zip(*branches)]
        lam, axes = np.linalg.eigh(cov)                         # cov = axes diag(lam) axes^T
        weight = weight / weight.sum()
        self.parameters = dict(                                 # float64; K components
            cumulative=np.cumsum(weight), log_weight=np.log(weight),
            mean=mean, root=axes * np.sqrt(lam)[:, None, :],    # [K, 2], [K, 2, 2]
            axes=axes.transpose(1, 2, 0).reshape(2, -1), lam=lam.T.ravel(),             # [dim, 2 K], [2 K]
            center=np.einsum("kda,kd->ak", axes, mean).ravel()) # [2 K] the mean in the component's own axes
        self.fingerprint = hashlib.sha256(np.concatenate([mean.ravel(), cov.ravel()]).tobytes()).hexdigest()
        self.report = [f"2-D tree, class {classes}: {len(weight):,} Gaussians, fresh points every step"]
        self.to(device)

    def to(self, device):
        """Computes on `device` from now on; returns self."""
        self.device, self._cast = torch.device(device), {}
        return self

    def _p(self, name, dtype):
        if (name, dtype) not in self._cast:
            self._cast[name, dtype] = torch.as_tensor(self.parameters[name]).to(dtype).to(self.device)
        return self._cast[name, dtype]

    def sample(self, n, sigma=0, generator=None):
        """n points of the density convolved with N(0, sigma^2 I): float32 [n, 2]. On the CPU the first m of n
        points are those of a draw of m (at sigma = 0): three uniforms a point, the normals by Box-Muller."""
        u = torch.rand(n, 3, generator=generator, device=self.device)                   # [n, 3]
        index = torch.searchsorted(self._p("cumulative", torch.float32), u[:, 0].contiguous(), right=True)
        index = index.clamp(max=len(self.parameters["mean"]) - 1)                       # rounding at u = 1
        radius, angle = (-2 * torch.log1p(-u[:, 1])).sqrt(), 2 * math.pi * u[:, 2]
        z = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)            # [n, 2] normal
        root, mean = self._p("root", torch.float32)[index], self._p("mean", torch.float32)[index]
        x = mean + (root * z[:, None, :]).sum(2)                                        # [n, 2]
        if not isinstance(sigma, (int, float)) or sigma != 0:
            noise = torch.randn(n, 2, generator=generator, device=self.device)
            x = x + torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1) * noise
        return x

    def draw(self, n, generator=None):
        """A batch in the form of `Batches`: (x0 float32 [n, 2], None, None)."""
        return self.sample(n, generator=generator), None, None

    def _evaluate(self, x, sigma, want_score):
        """log p and, if wanted, its gradient, in x's dtype. In each component's own axes the covariance plus
        sigma^2 I is diagonal, so that u = (axis . (x - mean)) / sqrt(lam + sigma^2) is standard normal."""
        names = "axes", "center", "lam", "log_weight"
        axes, center, lam, log_weight = [self._p(name, x.dtype) for name in names]
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1)   # [1 or n, 1]
        rate, single = torch.rsqrt(lam + sigma[:1] ** 2), len(sigma) == 1               # [1, 2 K]
        if single:                                              # whiten the axes once instead of every point
            axes, center = axes * rate, center * rate[0]
        rows, logps, scores = 1024 if x.device.type == "cpu" else 32768, [], []         # memory bounded
        for start in range(0, len(x), rows):
            u = torch.addmm(center, x[start:start + rows], axes, beta=-1)               # [n, 2 K]
            if not single:
                rate = torch.rsqrt(lam + sigma[start:start + rows] ** 2)                # [n, 2 K]
                u = u * rate
            (u1, u2), (rate1, rate2) = u.chunk(2, 1), rate.chunk(2, 1)
            quad = torch.addcmul(u1 * u1, u2, u2)
            logits = torch.sub(log_weight + torch.log(rate1 * rate2), quad, alpha=0.5)  # [n, K]
            most = logits.detach().amax(1, keepdim=True)
            share = (logits - most).clamp(min=-80).exp()        # [n, K]; exp is slow where it underflows
            total = share.sum(1, keepdim=True)
            logps.append(most + total.log() - math.log(2 * math.pi))
            if want_score:                                      # mean over the posterior share / total
                u.unflatten(1, (2, -1)).mul_(share[:, None])
                scores.append(-(u if single else u * rate) @ axes.T / total)
        return torch.cat(logps)[:, 0], torch.cat(scores) if want_score else None

    def logp(self, x, sigma=0):
        """Log-density [n] at x [n, 2] of the tree convolved with N(0, sigma^2 I); sigma a float or [n]."""
        return self._evaluate(x, sigma, want_score=False)[0]

    @torch.no_grad()
    def score(self, x, sigma=0):
        """Gradient of `logp` with respect to x: [n, 2]."""
        return self._evaluate(x, sigma, want_score=True)[1]

    def denoise(self, x, sigma, labels=None):
        """The exact denoiser E[x0 | x] = x + sigma^2 score(x; sigma): [n, 2]."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        return x + sigma.reshape(-1, 1) ** 2 * self.score(x, sigma)


# ------------------------------------------------------------------------------------------------------------
# One branch of the tree and all that grows from it: eight Gaussians along a line, then two child branches,
# each to its end. The order of the random draws is part of the definition.

def _grow(random, position, angle, depth=0):
    scale = np.array([1.3136, 1.3844])
    u = np.array([np.cos(angle), np.sin(angle)])
    length = 0.292 * 0.8 ** depth * (0.2 * random.randn() + 1)
    h, q, t = 0.2 * 0.8 ** depth / length, 0.06 * length * scale, np.linspace(0.07, 0.93, 8)
    cov = (np.outer(u, u) + h ** 2 * (np.eye(2) - np.outer(u, u))) * np.outer(q, q)
    mean = (position + u * length * t[:, None]) * scale
    branches = [(np.full(8, length * 0.5 ** depth), mean, np.tile(cov, (8, 1, 1)))]
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
    labels: torch.Tensor = None                 # int64 [N]; None = unlabelled
    class_names: list = field(default_factory=list)
    kind: str = "image"                         # "image" | "latent"
    mean: torch.Tensor = None                   # of latents, per channel [C]; None for images
    std: torch.Tensor = None
    fingerprint: str = ""                       # hash of the content, equal for equal data wherever it lies
    report: list = field(default_factory=list)  # what was found, lines of text

    def __len__(self):
        return len(self.x)

    @property
    def shape(self):
        return tuple(self.x.shape[1:])

    @property
    def classes(self):
        return len(self.class_names)

    def scale(self, x):
        """Raw examples [n, C, H, W] -> float32: pixels in [-1, 1], latents with standard deviation 0.5."""
        if self.kind == "image":
            return x.to(torch.float32) / 127.5 - 1
        mean, std = [s.to(x.device).reshape(-1, 1, 1) for s in (self.mean, self.std)]
        return (x.to(torch.float32) - mean) / std * 0.5

    def take(self, indices):
        """The examples at `indices` as the network sees them: float32 [n, C, H, W]."""
        return self.scale(self.x[indices])

    def to(self, device):
        """Moves the array to `device` (a GPU: if it takes less than half of what is free); returns self."""
        device = torch.device(device)
        if self.kind == "latent":
            self.mean, self.std = self.mean.to(device), self.std.to(device)
        if device.type != "cuda" or self.x.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.x = self.x.to(device)
            self.labels = None if self.labels is None else self.labels.to(device)
        return self


# ------------------------------------------------------------------------------------------------------------
# The way back from the network: `Dataset.scale` inverted.

def pixels(x):
    """float [n, C, H, W] in [-1, 1] -> uint8, rounded and clipped."""
    return (x.to(torch.float32) * 127.5 + 127.5).round().clip(0, 255).to(torch.uint8)


def unscale(x, mean, std):
    """Latents of standard deviation 0.5 [n, C, H, W] -> float32 in their own scale; mean and std [C]."""
    mean, std = [torch.as_tensor(s, device=x.device).to(torch.float32).reshape(-1, 1, 1) for s in (mean, std)]
    return x.to(torch.float32) * 2 * std + mean


def decode(x, config):
    """What a denoiser of this config samples -> uint8 images, latents in their own scale, or points."""
    if config["kind"] == "latent":
        return unscale(x, config["latent_mean"], config["latent_std"])
    return pixels(x) if config["kind"] == "image" else x


# ------------------------------------------------------------------------------------------------------------
# Batches by number: batches[step] depends on (seed, step) alone. Examples are drawn uniformly with
# replacement from the kept ones or, with class weights, each class in proportion to weight x frequency.
# Flips are labelled (they do not leak into samples): a mirrored image of class c has label c + classes.

class Batches:
    def __init__(self,
        dataset,                # Dataset or Tree, moved to its device beforehand
        n,                      # examples a batch
        seed,                   # integer
        device="cpu",           # where the batch is wanted
        keep=None,              # sorted indices [M] of the examples to draw from; None = all
        class_weights=None,     # [classes]; None = as frequent as in the data
        flip=False,             # mirror half of the images, as classes of their own
    ):
        if dataset.kind != "image" and flip:
            raise DataError("flips are for images: switch them off for the tree and for latents")
        self.dataset, self.n, self.seed, self.flip = dataset, n, seed, flip
        self.device = torch.empty(0, device=device).device      # "cuda" -> "cuda:0"
        self.net_classes = max(dataset.classes, 1) * 2 if flip else dataset.classes
        self.tree = dataset.kind == "tree"
        self.home = self.device if self.tree else dataset.x.device
        self.resident = self.home == self.device
        self.keep = None if keep is None or self.tree else torch.as_tensor(keep).to(self.home)
        self.mass = None
        if class_weights is not None and not self.tree:
            self._group(torch.as_tensor(class_weights, dtype=torch.float64, device="cpu"))
        self.ahead, self.worker = (None, None), None            # (step, future) of the batch being prefetched

    def _group(self, weights):
        """Sorts the kept examples by class: a weighted draw is a class, then a uniform example of it."""
        labels = self.dataset.labels
        if labels is None or len(weights) != self.dataset.classes:
            raise DataError(f"{len(weights)} class weights for data of {self.dataset.classes} classes")
        labels = labels if self.keep is None else labels[self.keep]
        order = torch.argsort(labels, stable=True)
        self.keep = order if self.keep is None else self.keep[order]
        count = torch.bincount(labels, minlength=len(weights)).cpu()
        mass = (weights * count).cumsum(0) / (weights * count).sum()
        if not torch.isfinite(mass).all() or (weights < 0).any():
            raise DataError("class weights must be finite, not negative, and not all zero")
        self.mass = mass.to(torch.float32).to(self.home)                                # [classes] cumulative
        self.count, self.start = count.to(self.home), (count.cumsum(0) - count).to(self.home)

    def index(self, step):
        """Indices of the batch: int64 [n], where the dataset lives."""
        generator = stream(self.seed, step, "data", self.home)
        if self.mass is None:
            high = len(self.dataset) if self.keep is None else len(self.keep)
            position = torch.randint(high, (self.n,), generator=generator, device=self.home)
        else:
            u = torch.rand(self.n, generator=stream(self.seed, step, "class", self.home), device=self.home)
            c = torch.searchsorted(self.mass, u, right=True).clamp(max=len(self.mass) - 1)      # [n]
            r = torch.randint(2 ** 62, (self.n,), generator=generator, device=self.home)
            position = self.start[c] + r % self.count[c]
        return position if self.keep is None else self.keep[position]

    def _host(self, step):
        """The raw batch in pinned host memory, for a dataset too large for the device."""
        index, data = self.index(step), self.dataset
        pin = self.device.type == "cuda"
        x = torch.empty((self.n, *data.shape), dtype=data.x.dtype, pin_memory=pin)
        torch.index_select(data.x, 0, index, out=x)
        rest = [None if data.labels is None else data.labels[index], index]
        return x, *[part.pin_memory() if pin and part is not None else part for part in rest]

    def _raw(self, step):
        data = self.dataset
        if self.resident:
            index = self.index(step)
            return data.x[index], None if data.labels is None else data.labels[index], index
        self.worker = self.worker or ThreadPoolExecutor(1)
        batch = self.ahead[1].result() if self.ahead[0] == step else self._host(step)
        self.ahead = step + 1, self.worker.submit(self._host, step + 1)
        return [None if part is None else part.to(self.device, non_blocking=True) for part in batch]

    def __getitem__(self, step):
        """(x0 float32 [n, ...], labels int64 [n] or None, index int64 [n] or None), all on the device."""
        if self.tree:
            return self.dataset.draw(self.n, stream(self.seed, step, "data", self.device))
        x, labels, index = self._raw(step)
        x0 = self.dataset.scale(x)
        if self.flip:
            generator = stream(self.seed, step, "flip", self.device)
            mirrored = torch.randint(2, (self.n,), generator=generator, device=self.device)     # [n] 0 or 1
            x0 = torch.where(mirrored[:, None, None, None] == 1, x0.flip(3), x0)
            labels = mirrored if labels is None else labels + mirrored * self.dataset.classes
        return x0, labels, index


# ------------------------------------------------------------------------------------------------------------
# Loading. Whatever the source, it becomes one array in the cache folder ($DATA_CACHE, else
# ~/.cache/data-curation), which later runs map into memory; the array's hash is checked every time.

def load(path, size=None, progress=True, cache=None):
    """The images or latents at `path` as a Dataset.

    path    a folder or .zip of images (a folder a class; of train, val, test the train one), CIFAR-10 as
            published (python or binary, .tar.gz or unpacked), or an .npz with `images` uint8 [N, 3, H, W] or
            [N, H, W, 3], or `latents` float [N, C, H, W] (with optional `mean`, `std` [C]), and `labels` [N]
    size    center-crop to a square and resize (Lanczos) to this many pixels; None = as they are
    cache   folder; None = $DATA_CACHE or ~/.cache/data-curation

    Raises DataError, one line, for anything unreadable, inconsistent or hostile; nothing is left behind."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if size is not None and not 1 <= size <= 4096:
        raise DataError(f"--size {size}: must be between 1 and 4096 pixels")
    cache = Path(cache or os.environ.get("DATA_CACHE") or Path.home() / ".cache" / "data-curation")
    try:
        files = _listing(path) if path.is_dir() else [("", path.stat())]
        stamp = [(name, info.st_size, info.st_mtime_ns) for name, info in files]
        key = hashlib.sha256(repr((CACHE_VERSION, str(path.resolve()), size, stamp)).encode()).hexdigest()
        found = _read_cache(cache / key[:32])
        if found:
            return found
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # Pillow's remarks on odd but readable files
            return _build(_open(path, files, size), cache, cache / key[:32], path if progress else None)
    except DataError:
        raise
    except Exception as error:                                  # a damaged file may raise anything
        raise DataError(f"{path}: cannot be read ({_reason(error)})") from error


# ------------------------------------------------------------------------------------------------------------
# What a reader gives: its blocks [n, ...] in order are the examples. `report` may grow while they are read.

@dataclass
class Source:
    count: int
    blocks: object                      # iterator of arrays
    kind: str = "image"
    labels: np.ndarray = None
    class_names: list = field(default_factory=list)
    moments: list = None                # stored [mean [C], std [C]] of latents
    report: list = field(default_factory=list)


def _open(path, files, size):
    """Chooses the reader by what the path is."""
    if path.is_dir():
        names = {name.rpartition("/")[2]: name for name, _ in files if name.count("/") <= 1}
        batches = [names[name] for name in CIFAR_BATCHES if name in names]
        if batches:
            return _cifar(path, [(f"{path}/{name}", (path / name).read_bytes) for name in batches], size)
        members = [(name, (path / name).read_bytes, info.st_size) for name, info in files]
        return _images(path, members, size)
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar")):
        return _cifar(path, _tar_members(path), size)
    if path.suffix.lower() == ".zip":
        return _images(path, _zip_members(path), size)
    if path.suffix.lower() == ".npz":
        return _npz(path, size)
    raise DataError(f"{path}: not a data set of a known kind (a folder or .zip of images, CIFAR-10 as "
                    ".tar.gz or unpacked, .npz with images or latents)")


def _reason(error):
    """An exception as part of one line."""
    kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:200]


# ------------------------------------------------------------------------------------------------------------
# Files in a folder and in a zip: (name, read function, size). An archive is read in place, never unpacked;
# one with a link or with a path that leads out of it was not made for this and is refused.

def _listing(path):
    """[(relative name with slashes, stat)] of all files below a folder, sorted; follows links once."""
    files, seen = [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else folders
        for name in [] if real in seen else names:
            full = os.path.join(folder, name)
            if os.path.isfile(full):                            # no dead links, no pipes
                files.append((os.path.relpath(full, path).replace(os.sep, "/"), os.stat(full)))
        seen.add(real)
    return sorted(files)


def _zip_members(path):
    archive, members = zipfile.ZipFile(path), []
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")
        if name.startswith("/") or ".." in name.split("/") or name[1:2] == ":":
            raise DataError(f"{path}: refused, member {name!r} leads outside of the archive")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(f"{path}: refused, member {name!r} is a link")
        if not info.is_dir():
            members.append((name, functools.partial(archive.read, info), info.file_size))
    return sorted(members, key=lambda member: member[0])


def _tar_members(path):
    """The CIFAR-10 batches in a tar archive, as (name, read function)."""
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.size > MAX_FILE:
                raise DataError(f"{path}: refused, member {member.name!r} has {member.size:,} bytes; "
                                "of tar archives only CIFAR-10's are read, unpack others first")
            name = member.name.rpartition("/")[2]
            if member.isfile() and name in CIFAR_BATCHES:
                data = archive.extractfile(member).read()
                found[name] = (f"{path}:{member.name}", lambda data=data: data)
    if not found:
        raise DataError(f"{path}: holds no CIFAR-10 batches; of tar archives only CIFAR-10's are read, "
                        "unpack others first")
    return [found[name] for name in CIFAR_BATCHES if name in found]


# ------------------------------------------------------------------------------------------------------------
# Images in folders. A single folder on top is entered; of train, val, test the train one is; the next level
# is the class, and the images may lie any depth below it. Images without a folder are unlabelled.

def _layout(path, names):
    """names -> {name: class or None} of the images to use, and the number that lie in val or test."""
    parts, total = {name: name.split("/") for name in names}, len(names)
    def enter(folder):
        return {name: part[1:] for name, part in parts.items() if part[0] == folder}
    def tops():
        return {part[0] if len(part) > 1 else None for part in parts.values()}      # None: not in a folder
    if len(tops()) == 1 and not tops() & {None, "train"}:
        parts = enter(*tops())
    if "train" in tops() and tops() <= {"train", "val", "test"}:
        parts = enter("train")
    if None in tops() and len(tops()) > 1:
        raise DataError(f"{path}: images lie both beside and inside of class folders; "
                        "move all of them into class folders, or all of them out")
    return {name: part[0] if len(part) > 1 else None for name, part in parts.items()}, total - len(parts)


def _images(path, members, size):
    """Source of the images among members [(name, read, bytes)]."""
    skipped, images = collections.Counter(), {}
    for name, read, length in members:
        base, suffix = name.rpartition("/")[2], os.path.splitext(name)[1].lower()
        if suffix not in IMAGE_SUFFIXES or base.startswith(".") or name.startswith("__MACOSX/"):
            skipped[suffix or base] += 1
        else:
            images[name] = read, length
    if not images:
        raise DataError(f"{path}: no images found ({', '.join(IMAGE_SUFFIXES)}), {len(members)} other files")
    classes, elsewhere = _layout(path, images)
    class_names = sorted({name for name in classes.values() if name is not None})
    order = sorted(classes, key=lambda name: (classes[name] or "", name))
    number = {name: c for c, name in enumerate(class_names)}
    labels = np.array([number[classes[name]] for name in order]) if class_names else None
    report = [f"skipped {n:,} files that are not images: {suffix}" for suffix, n in sorted(skipped.items())]
    report += [f"skipped {elsewhere:,} images in val or test"] if elsewhere else []
    blocks = _decode(path, [(name, *images[name]) for name in order], size, report)
    return Source(len(order), blocks, labels=labels, class_names=class_names, report=report)


def _decode(path, members, size, report):
    """Yields uint8 blocks [n, 3, H, W], decoded by threads (Pillow lets go of Python's lock)."""
    sizes, gray, first = collections.Counter(), 0, None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(members), 512):
            part = members[start:start + 512]
            block = list(pool.map(lambda member: _decode_one(path, *member, size), part))
            for (name, _, _), (pixel, found, was_gray) in zip(part, block):
                sizes[found] += 1
                gray += was_gray
                first = first or (name, pixel.shape)
                if pixel.shape != first[1]:
                    (_, h, w), (_, h2, w2) = first[1], pixel.shape
                    raise DataError(f"{path}: images differ in size ({first[0]} {w}x{h}, {name} {w2}x{h2}); "
                                    "give --size to crop and resize them")
            yield np.stack([pixel for pixel, _, _ in block])
    most = ", ".join(f"{w}x{h} ({count:,})" for (w, h), count in sizes.most_common(5))
    report.append(f"{len(sizes)} sizes seen (width x height): {most}" + (", ..." if len(sizes) > 5 else ""))
    report += [f"{gray:,} grayscale or palette images converted to RGB"] if gray else []


def _decode_one(path, name, read, length, size):
    """One image: (uint8 [3, H, W], (width, height) as found, whether it was grayscale or palette)."""
    if length > MAX_FILE:
        raise DataError(f"{path}: refused, {name} has {length:,} bytes (limit {MAX_FILE:,})")
    try:
        image = Image.open(io.BytesIO(read()))
        if image.width * image.height > MAX_PIXELS:             # known from the header, before decoding
            raise DataError(f"{path}: refused, {name} has {image.width}x{image.height} pixels "
                            f"(limit {MAX_PIXELS:,}); shrink or remove it")
        found, gray = image.size, image.mode not in ("RGB", "RGBA", "CMYK", "YCbCr")
        if image.mode.startswith("I"):                          # 16 bits a pixel
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        return _resize(image.convert("RGB"), size), found, gray
    except DataError:
        raise
    except Exception as error:                                  # Pillow's readers raise many kinds
        raise DataError(f"{path}: {name} is not a readable image ({_reason(error)}); remove it") from error


def _resize(image, size):
    """Center-crops a Pillow RGB image to a square of `size` pixels: uint8 [3, H, W]."""
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.LANCZOS)
    return np.asarray(image).transpose(2, 0, 1)


def _resize_block(block, size):
    """uint8 [n, 3, H, W] -> the same, cropped and resized."""
    if size is None or block.shape[2:] == (size, size):
        return block
    return np.stack([_resize(Image.fromarray(x), size) for x in block.transpose(0, 2, 3, 1)])


# ------------------------------------------------------------------------------------------------------------
# CIFAR-10's training batches. The python version is a pickle, and a pickle can run code: the unpickler below
# knows three names, all of which only record what they are given.

class _Recorded:
    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        """The stand-in for a known name; DataError for any other, so that nothing in the pickle runs."""
        known = {("numpy", "ndarray"): _Recorded, ("numpy", "dtype"): _Recorded,
                 ("multiarray", "_reconstruct"): _Recorded,
                 ("_codecs", "encode"): lambda text, coding: text.encode("latin1")}
        module = module.rpartition(".")[2] if module in NUMPY_MULTIARRAY else module
        if (module, name) not in known:
            raise DataError(f"refused, it wants to run {module}.{name}")
        return known[module, name]


def _cifar_python(data):
    """One pickled batch -> (bytes of the images, list of labels)."""
    batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    shape, dtype, fortran, raw = batch["data"].state[1:]
    if dtype.args[0] not in ("u1", b"u1") or fortran or shape[1] != 3072 or len(raw) != shape[0] * 3072:
        raise DataError("images are not bytes [n, 3072]")
    return raw, batch["labels"]


def _cifar_binary(data):
    """One binary batch: a label byte and 3,072 pixel bytes an image."""
    if len(data) % 3073:
        raise DataError(f"{len(data):,} bytes are not a multiple of 3,073")
    rows = np.frombuffer(data, np.uint8).reshape(-1, 3073)
    return rows[:, 1:].tobytes(), rows[:, 0].tolist()


def _cifar(path, members, size):
    """Source of CIFAR-10 from members [(name, read)]."""
    images, labels = [], []
    for name, read in members:
        try:
            data = read()
            raw, label = (_cifar_binary if name.endswith(".bin") else _cifar_python)(data)
            block = np.frombuffer(raw, np.uint8).reshape(-1, 3, 32, 32)
            if len(block) == 0 or len(label) != len(block):
                raise DataError(f"{len(block)} images, {len(label)} labels")
            if not all(type(c) is int and 0 <= c <= 9 for c in label):
                raise DataError("labels outside of 0 to 9")
        except Exception as error:                              # unpickling a damaged file may raise anything
            raise DataError(f"{name}: not a CIFAR-10 batch ({_reason(error)})") from error
        images.append(block)
        labels += label
    blocks = (_resize_block(block, size) for block in images)
    return Source(len(labels), blocks, labels=np.array(labels), class_names=CIFAR_CLASSES.split(),
                  report=[f"CIFAR-10, {len(members)} of 5 training batches"])


# ------------------------------------------------------------------------------------------------------------
# .npz files: the header of every array is held against the length of its data before anything is read.

def _npy_header(file, length, where):
    """Shape, Fortran order and dtype of an open .npy file of `length` bytes."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read[np.lib.format.read_magic(file)](file)
    if dtype.hasobject or dtype.itemsize == 0 or dtype.kind not in "biuf":
        raise DataError(f"{where}: refused, it holds Python objects or text, not numbers")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != length - file.tell():
        raise DataError(f"{where}: says {dtype} {list(shape)} but has {length - file.tell():,} bytes")
    return shape, fortran, dtype


def _npz_array(path, name, block_bytes=2 ** 26):
    """Array `name` of an .npz: (shape, dtype, iterator of blocks of rows)."""
    archive = zipfile.ZipFile(path)
    info = archive.getinfo(f"{name}.npy")
    file = archive.open(info)
    shape, fortran, dtype = _npy_header(file, info.file_size, f"{path}: `{name}`")
    def blocks():
        n, row = (shape or (1,))[0], math.prod(shape[1:]) * dtype.itemsize
        rows = n if fortran else max(1, block_bytes // max(row, 1))
        for start in range(0, n, max(rows, 1)):
            block = np.frombuffer(file.read(min(rows, n - start) * row), dtype)
            yield block.reshape(shape[::-1]).T if fortran else block.reshape(-1, *shape[1:])
    return shape, dtype, blocks()


def _npz(path, size):
    """Source of an .npz with `images` or `latents`."""
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    kind = "latent" if "latents" in names else "image"
    if f"{kind}s" not in names:
        raise DataError(f"{path}: no `images` or `latents` in it but {', '.join(names)[:200] or 'nothing'}")
    shape, dtype, blocks = _npz_array(path, f"{kind}s")
    right = dtype == np.uint8 if kind == "image" else dtype.kind == "f"
    if not right or len(shape) != 4 or min(shape) < 1 or (kind == "image" and 3 not in (shape[1], shape[3])):
        wanted = "uint8 [N, 3, H, W] or [N, H, W, 3]" if kind == "image" else "float [N, C, H, W]"
        raise DataError(f"{path}: `{kind}s` is {dtype} {list(shape)}, wanted {wanted}")
    if kind == "latent" and size is not None:
        raise DataError(f"{path}: --size is for images, these are latents")
    labels = _npz_vector(path, "labels", shape[0], "iu") if "labels" in names else None
    if labels is not None and not 0 <= labels.min() <= labels.max() <= MAX_CLASSES:
        raise DataError(f"{path}: `labels` are {labels.min()} to {labels.max()}, not 0 to {MAX_CLASSES}")
    classes = [] if labels is None else [str(c) for c in range(labels.max() + 1)]
    if kind == "image":
        blocks = (block if shape[1] == 3 else block.transpose(0, 3, 1, 2) for block in blocks)
        return Source(shape[0], (_resize_block(block, size) for block in blocks), kind, labels, classes)
    moments = None
    if "mean" in names and "std" in names:
        moments = [_npz_vector(path, name, shape[1], "f") for name in ("mean", "std")]
        if not np.isfinite(moments).all() or not (moments[1] > 0).all():
            raise DataError(f"{path}: `mean` and `std` must be finite, std above 0")
    return Source(shape[0], (_finite(path, block) for block in blocks), kind, labels, classes, moments)


def _npz_vector(path, name, length, kinds):
    shape, dtype, blocks = _npz_array(path, name)
    if dtype.kind not in kinds or shape != (length,):
        wanted = "integers" if kinds == "iu" else "floats"
        raise DataError(f"{path}: `{name}` is {dtype} {list(shape)}, wanted {wanted} [{length}]")
    return np.concatenate(list(blocks))


def _finite(path, latents):
    if not np.isfinite(latents).all():
        raise DataError(f"{path}: `latents` holds NaN or infinite values; encode the images again")
    return latents.astype(np.float16 if latents.dtype.itemsize == 2 else np.float32)


# ------------------------------------------------------------------------------------------------------------
# The cache: a folder a data set, made under a temporary name and renamed when it is complete.

def _build(source, cache, target, path):
    """Writes a source into the cache and returns the Dataset; `path` names it on the progress line."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="unfinished-", dir=cache))
    except OSError as error:
        raise DataError(f"{cache}: cannot write the cache ({_reason(error)}); set DATA_CACHE") from error
    try:
        moments = _write(source, folder / "x.npy", cache, path)
        labels = np.zeros(0) if source.labels is None else source.labels
        np.save(folder / "labels.npy", labels.astype(np.int64))
        meta = dict(kind=source.kind, class_names=source.class_names, report=source.report)
        meta["moments"] = [m.astype(float).tolist() for m in source.moments or moments or []]
        meta["fingerprint"] = _fingerprint(folder, meta)
        (folder / "meta.json").write_text(json.dumps(meta))
        shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(OSError):                      # another process may have just made it
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = _read_cache(target)
    if found is None:
        raise DataError(f"{target}: the cache reads back wrong; check the disk or set DATA_CACHE")
    return found


def _write(source, file_name, cache, path):
    """Writes x.npy block by block; returns the per-channel [mean, std] of latents."""
    done, began, total, square = 0, time.monotonic(), 0, 0
    with open(file_name, "wb") as file:
        for block in source.blocks:
            block = np.ascontiguousarray(block)
            if done == 0:
                shape, need = (source.count, *block.shape[1:]), source.count * block[0].nbytes
                if need > shutil.disk_usage(cache).free:
                    raise DataError(f"{cache}: needs {need:,} bytes, more than are free; set DATA_CACHE")
                header = dict(descr=block.dtype.str, fortran_order=False, shape=shape)
                np.lib.format.write_array_header_2_0(file, header)
            file.write(block)
            done += len(block)
            if source.kind == "latent":
                total = total + block.sum((0, 2, 3), dtype=np.float64)
                square = square + np.square(block, dtype=np.float64).sum((0, 2, 3))
            if path and time.monotonic() - began > 1:
                progress(f"reading {path}: {done:,} of {source.count:,}", last=done == source.count)
    if source.kind == "latent":
        mean = total / (done * block[0, 0].size)
        return mean, np.sqrt(np.maximum(square / (done * block[0, 0].size) - mean ** 2, 1e-12))


def _fingerprint(folder, meta):
    """Hash of the content: array, labels, class names, and the moments of latents."""
    digest = hashlib.sha256(json.dumps([meta[name] for name in ("kind", "class_names", "moments")]).encode())
    for name in ("x.npy", "labels.npy"):
        with open(folder / name, "rb") as file:
            while part := file.read(2 ** 20):
                digest.update(part)
    return digest.hexdigest()


def _read_cache(folder):
    """The Dataset in a cache folder; None if there is none or it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["fingerprint"] != _fingerprint(folder, meta):
            return None
        x = torch.from_numpy(np.load(folder / "x.npy", mmap_mode="c"))          # changes never reach the file
        labels = torch.from_numpy(np.load(folder / "labels.npy", allow_pickle=False))
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    n, c, h, w = x.shape
    report = [f"{n:,} {meta['kind']}s of {c}x{h}x{w}, {x.nbytes / 2 ** 20:,.0f} MiB", "no labels"]
    if meta["class_names"]:
        count = torch.bincount(labels)
        report[1] = f"{len(count):,} classes of {count.min():,} to {count.max():,} examples"
    return Dataset(x, labels if meta["class_names"] else None, meta["class_names"], meta["kind"],
                   *([torch.tensor(m) for m in meta["moments"]] or [None, None]),
                   meta["fingerprint"], report + meta["report"])


# ------------------------------------------------------------------------------------------------------------
# A long-tailed subset: with K classes, class c keeps n_max R^(-c / (K - 1)) examples, R = head over tail.

def long_tail(labels, ratio, seed=0):
    """Sorted indices (LongTensor) of such a subset of labels [N], random within a class; ratio R >= 1."""
    if not 1 <= ratio < math.inf:
        raise DataError(f"--imbalance {ratio}: must be at least 1")
    labels = torch.as_tensor(labels).cpu()
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

def prune(features, labels, keep, score="gaussian", k=5, seed=0):
    """Sorted kept indices (LongTensor) of features [N, d] with labels [N] (None: one class). `keep` in (0, 1]
    is the kept fraction; class counts are exact by largest remainder, but at least one a class."""
    return prune_by(prune_scores(features, labels, score, k, seed), labels, keep)


def prune_by(scores, labels, keep):
    """As `prune`, for scores [N] at hand; equal scores are kept in the order of their indices."""
    if not 0 < keep <= 1:
        raise DataError(f"--keep {keep}: a fraction must be above 0 and at most 1")
    kept, groups = [], _classes(labels, len(scores))
    for members, n in zip(groups, _quotas([len(members) for members in groups], keep)):
        kept.append(members[torch.sort(scores[members], descending=True, stable=True).indices[:n]])
    return torch.cat(kept).sort().values


def prune_scores(features, labels, score="gaussian", k=5, seed=0):
    """The score of every example, float32 [N], higher = kept first; comparable within a class only."""
    features = torch.as_tensor(features)
    if score not in PRUNE_SCORES:
        raise DataError(f"--prune {score}: must be one of {', '.join(PRUNE_SCORES)}")
    if features.ndim != 2 or (labels is not None and len(labels) != len(features)):
        raise DataError(f"features {list(features.shape)} do not fit the labels, wanted [N, d]")
    if not torch.isfinite(features).all():
        raise DataError("features hold NaN or infinite values; compute them again")
    if score == "random":
        return torch.rand(len(features), generator=stream(seed, 0, "prune"))
    scores = torch.empty(len(features))
    for members in _classes(labels, len(features)):
        x = features[members.to(features.device)].to(torch.float32)
        scores[members] = PRUNE_SCORES[score](x - x.mean(0), k).to(torch.float32).cpu()
    return scores


def _classes(labels, n):
    """The indices of each class that has examples, sorted."""
    labels = torch.zeros(n, dtype=torch.int64) if labels is None else torch.as_tensor(labels).cpu()
    order = torch.argsort(labels, stable=True)
    return torch.split(order, [count for count in torch.bincount(labels).tolist() if count])


def _quotas(counts, keep):
    """Kept examples a class: largest remainder, the total round(keep N), every class at least one."""
    exact = np.array(counts) * keep
    total = max(round(sum(counts) * keep), len(counts))
    quota = np.maximum(np.floor(exact + 1e-9), 1)
    while quota.sum() < total:
        quota[np.argmax(exact - quota)] += 1
    while quota.sum() > total:                                  # the classes raised to one took too many
        quota[np.argmin(np.where(quota > 1, exact - quota, np.inf))] -= 1
    return quota.astype(int).tolist()


# ------------------------------------------------------------------------------------------------------------
# The scores, for the centered features x [n, d] of one class. The Gaussian's covariance is shrunk towards
# a multiple of the identity by OAS (https://arxiv.org/abs/0907.4698), which keeps it invertible for n < d.

def _score_gaussian(x, k):
    n, d = x.shape
    S = sum(part.T @ part for part in (chunk.double() for chunk in x.split(4096))) / n  # [d, d]
    trace, square = S.trace(), S.square().sum()                                         # tr S, tr S^2
    if trace <= 0:                                                                      # all alike
        return torch.zeros(n)
    rho = ((1 - 2 / d) * square + trace ** 2) / ((n + 1 - 2 / d) * (square - trace ** 2 / d).clamp(min=1e-30))
    rho = rho.clamp(1e-6, 1)
    S = (1 - rho) * S + rho * trace / d * torch.eye(d, dtype=S.dtype, device=S.device)
    L = torch.linalg.cholesky(S)
    quad = [torch.linalg.solve_triangular(L, part.T.double(), upper=False).square().sum(0)
            for part in x.split(4096)]
    return -0.5 * (torch.cat(quad) + d * math.log(2 * math.pi)) - L.diagonal().log().sum()


def _score_knn(x, k):
    n, square = len(x), x.square().sum(1)                                               # [n]
    if n == 1:
        return torch.zeros(1)
    scores = []
    for start in range(0, n, 1024):
        part = x[start:start + 1024]
        distance2 = square + square[start:start + 1024, None] - 2 * part @ x.T          # [1024, n]
        distance2.diagonal(start).fill_(math.inf)                                       # but not itself
        scores.append(-distance2.topk(min(k, n - 1), largest=False).values[:, -1].clamp(min=0).sqrt())
    return torch.cat(scores)


def _score_moderate(x, k):
    distance = (x - x.median(0).values).norm(dim=1)
    return -(distance - distance.median()).abs()


PRUNE_SCORES = dict(gaussian=_score_gaussian, knn=_score_knn, moderate=_score_moderate, random=None)


# ------------------------------------------------------------------------------------------------------------
# Features that need no network: principal components of the images averaged down to 8x8.

def pixel_features(dataset, dims=64):
    """float32 [N, min(dims, 64 C)] of a Dataset of images or latents, on the CPU."""
    small = [torch.nn.functional.adaptive_avg_pool2d(dataset.take(index), 8).flatten(1).cpu()
             for index in torch.arange(len(dataset), device=dataset.x.device).split(1024)]
    x = torch.cat(small)                                                                # [N, 64 C]
    x = x - x.mean(0)
    covariance = sum(part.T @ part for part in (chunk.double() for chunk in x.split(4096)))
    axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :dims]                 # largest first
    return x @ axes.to(x.dtype)


# ------------------------------------------------------------------------------------------------------------
# Class weights by group DRO, DoReMi's update (https://arxiv.org/abs/2305.10429): with e_c the mean over class
# c of max(loss(proxy) - loss(reference), 0),  alpha_c <- alpha_c exp(eta e_c), normalized, and mixed with the
# uniform weights.

def dro_update(log_weights, excess, labels, eta, smoothing=1e-3):
    """One step: log_weights [K], excess losses [B], labels int64 [B] -> log_weights [K], whose exp sums to 1.
    A class without examples in the batch has e_c = 0, and so counts an excess that is not finite."""
    K = len(log_weights)
    excess = excess.detach().to(log_weights.dtype).clamp(min=0).nan_to_num(nan=0, posinf=0)
    total = torch.zeros_like(log_weights).index_add(0, labels, excess)                  # [K]
    count = torch.zeros_like(log_weights).index_add(0, labels, torch.ones_like(excess))
    log_alpha = torch.log_softmax(log_weights + eta * total / count.clamp(min=1), 0)
    if smoothing == 0:
        return log_alpha
    uniform = torch.full_like(log_alpha, math.log(smoothing) - math.log(K))
    return torch.logaddexp(log_alpha + math.log1p(-smoothing), uniform)


# ------------------------------------------------------------------------------------------------------------
# Files of kept indices and of features.

def save_keep(path, index):
    """Writes kept indices as int64 .npy, complete or not at all."""
    with open(f"{path}.unfinished", "wb") as file:
        np.save(file, np.asarray(index, dtype=np.int64))
    os.replace(f"{path}.unfinished", path)


def load_keep(path, n):
    """Kept indices (sorted LongTensor) from a .npy file, for a data set of n examples."""
    index = _load_npy(path)
    if index.ndim != 1 or index.dtype.kind not in "iu" or len(index) == 0:
        raise DataError(f"{path}: is {index.dtype} {list(index.shape)}, wanted kept indices, integers [M]")
    index = np.unique(index)
    if index[0] < 0 or index[-1] >= n:
        raise DataError(f"{path}: keeps {index[0]} to {index[-1]} of 0 to {n - 1}: made for other data")
    return torch.from_numpy(index.astype(np.int64))


def load_features(path, n):
    """float32 [n, d] from a .npy file, for a data set of n examples."""
    features = _load_npy(path)
    if features.ndim != 2 or len(features) != n:
        raise DataError(f"{path}: is {features.dtype} {list(features.shape)}, wanted features [{n}, d]")
    features = torch.from_numpy(features.astype(np.float32))
    if not features.isfinite().all():
        raise DataError(f"{path}: holds NaN, or values that float32 cannot hold; compute the features again")
    return features


def _load_npy(path):
    try:
        with open(path, "rb") as file:
            shape, fortran, dtype = _npy_header(file, os.path.getsize(path), path)
            array = np.frombuffer(file.read(), dtype)
        return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: not a readable .npy file ({_reason(error)})") from error


# ------------------------------------------------------------------------------------------------------------
# Pictures: a grid, and what a pruning score means.

def image_grid(images, columns, side=None):
    """Pillow image of uint8 [n, 3, H, W], row by row, each drawn `side` pixels wide (None: as it is)."""
    images = [Image.fromarray(x.permute(1, 2, 0).contiguous().numpy()) for x in images.cpu()]
    w, h = (side, side) if side else images[0].size
    grid = Image.new("RGB", (columns * w, -(-len(images) // columns) * h), "white")
    for i, image in enumerate(images):
        grid.paste(image.resize((w, h), Image.BICUBIC), (i % columns * w, i // columns * h))
    return grid


def density_picture(points, size=400, side=3.0):
    """Pillow image of points [n, 2] in a square of this side: log-density from -4 (white) to 3 (black)."""
    rows, columns = ((-points[:, 1] / side + 0.5) * size).long(), ((points[:, 0] / side + 0.5) * size).long()
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    counts = torch.bincount((rows * size + columns)[inside], minlength=size * size)
    return log_density_picture((counts * (size / side) ** 2 / len(points)).log().reshape(size, size))


def log_density_picture(logp):
    """Pillow image of a log-density [size, size], from -4 (white) to 3 (black)."""
    return Image.fromarray((255 - ((logp + 4) / 7).clamp(0, 1) * 255).to(torch.uint8).numpy())


def coreset_picture(dataset, scores, keep, columns=8, side=48):
    """Pillow image: of each of the first ten classes the best-kept, last-kept and first-dropped images."""
    groups, left, top, part = _classes(dataset.labels, len(dataset))[:10], 96, 20, columns * side + 12
    canvas = Image.new("RGB", (left + 3 * part, top + len(groups) * (side + 4)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, title in enumerate(("best kept", "last kept (nearest the border first)", "first dropped")):
        draw.text((left + i * part, 4), title, fill="black")
    for row, members in enumerate(groups):
        y, n = top + row * (side + 4), int(torch.isin(members, keep).sum())
        draw.text((4, y + side // 2 - 6), _class_name(dataset, members)[:15], fill="black")
        ranked = members[torch.sort(scores[members], descending=True, stable=True).indices]
        for i, chosen in enumerate((ranked[:n], ranked[:n].flip(0), ranked[n:])):
            if len(chosen):
                images = dataset.x[chosen[:columns].to(dataset.x.device)]
                canvas.paste(image_grid(images, columns, side), (left + i * part, y))
    return canvas


def _class_name(dataset, members):
    return dataset.class_names[dataset.labels[members[0]]] if dataset.classes else "all"


# ------------------------------------------------------------------------------------------------------------
# Command line: what a data set holds, and pruning without training.

def parser():
    p = argparse.ArgumentParser(description="Report what a data set holds; prune it to a coreset.")
    p.add_argument("data", metavar="DATA", help="folder, .zip, .tar.gz (CIFAR-10) or .npz")
    p.add_argument("--size", type=int, metavar="PIXELS", help="center-crop and resize (default: as they are)")
    p.add_argument("--keep", type=float, metavar="FRACTION", help="fraction to keep, above 0, at most 1 "
                   "(default: report only)")
    p.add_argument("--prune", choices=PRUNE_SCORES, default="gaussian", help="score (default: gaussian)")
    p.add_argument("--features", default="pixels", metavar="pixels|FILE.npy", help="what the score sees: "
                   "principal components of the images at 8x8 (default: pixels), or an array [N, d]")
    p.add_argument("--k", type=int, default=5, help="the neighbour that knn looks at (default: 5)")
    p.add_argument("--out", default="keep.npy", metavar="FILE.npy", help="kept indices (default: keep.npy)")
    p.add_argument("--show", metavar="FILE.png", help="picture of best-kept, last-kept, first-dropped images")
    p.add_argument("--seed", type=int, default=0, help="of --prune random (default: 0)")
    return p


def run(args):
    """Carry out the command: print the report and, with --keep, write the kept indices and the picture."""
    if args.keep is not None and not 0 < args.keep <= 1:
        raise DataError(f"--keep {args.keep}: a fraction must be above 0 and at most 1")
    if args.k < 1:
        raise DataError(f"--k {args.k}: must be at least 1")
    dataset = load(args.data, args.size)
    print("\n".join(dataset.report))
    if args.keep is None:
        return
    if args.show and dataset.kind != "image":
        raise DataError("--show: latents cannot be drawn, leave it out")
    pixel = args.features == "pixels"
    features = pixel_features(dataset) if pixel else load_features(args.features, len(dataset))
    scores = prune_scores(features, dataset.labels, args.prune, args.k, args.seed)
    keep = prune_by(scores, dataset.labels, args.keep)
    print(f"\n{'class':<20} {'kept':>8} {'of':>8} {'lowest':>12} {'lowest kept':>12} {'highest':>12}")
    for members in _classes(dataset.labels, len(dataset)):
        kept, every = scores[members[torch.isin(members, keep)]], scores[members]
        print(f"{_class_name(dataset, members):<20.20} {len(kept):>8,} {len(every):>8,} "
              f"{every.min():>12.4g} {kept.min():>12.4g} {every.max():>12.4g}")
    for path, write in ((args.out, lambda: save_keep(args.out, keep)),
                        (args.show, lambda: coreset_picture(dataset, scores, keep).save(args.show))):
        try:
            if path:
                write()
                print(f"wrote {path}")
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be written ({_reason(error)})") from error


def main(argv=None):
    """The command line; exits with status 2 and one line on stderr for a DataError."""
    args = parser().parse_args(argv)
    try:
        run(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
