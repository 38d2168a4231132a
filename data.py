"""Data: the 2-D tree, sets of images or latents, batches, loading, pruning, class weights and pictures.

A batch is a function of (seed, step). Pruning and class weights: "Pruning then Reweighting: Towards
Data-Efficient Training of Diffusion Models" (arXiv 2409.19128). The tree: arXiv 2406.02507. Helpers for
files, flags and programs stand at the end. To see what a data set holds without training on it:

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
import shutil
import signal
import sys
import time
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from model import SIGMA_DATA, per_example


# ------------------------------------------------------------------------------------------------------------
# The 2-D toy density of the autoguidance paper: a tree of branches with eight Gaussians along each, drawn by
# a recursion on one random stream. A Gaussian mixture has an exact density, score and denoiser at every noise
# level, so a trained model can be compared with the right answer.

class Tree:
    """A mixture in the plane: class A of the paper, 127 branches of eight Gaussians each."""
    kind = "tree"
    shape = (2,)
    class_names = ()
    mean = ()
    std = ()

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        branches = _grow(np.random.RandomState(2), np.array([0.0030, 0.0325]), np.pi / 4)
        length = np.array([branch[0] for branch in branches])   # [K], times 0.5^depth
        mean = np.array([branch[1] for branch in branches])     # [K, 8, 2]
        cov = np.array([branch[2] for branch in branches])      # [K, 2, 2]
        weight = length / (8 * length.sum())                    # of each of a branch's eight Gaussians
        lam, axes = np.linalg.eigh(cov)                         # cov = axes diag(lam) axes^T
        half = (mean[:, 7] - mean[:, 0]) / 2                    # [K, 2], from the middle to the last Gaussian
        parameters = dict(                                      # float64; K branches, 8 K Gaussians
            cumulative=np.cumsum(weight.repeat(8)),
            mean=mean.reshape(-1, 2),
            root=(axes * np.sqrt(lam)[:, None, :]).repeat(8, 0),                        # [8 K, 2, 2]
            axes=axes.transpose(2, 1, 0),                                               # [axis, dim, K]
            lam=lam.T[:, None],                                                         # [axis, 1, K]
            middle=np.einsum("kda,kd->ak", axes, mean.mean(1))[:, None],                # along the axes
            half=np.einsum("kda,kd->ak", axes, half)[:, None],
            log_weight=np.log(weight))
        self.fingerprint = hashlib.sha256(np.concatenate([mean.ravel(), cov.ravel()]).tobytes()).hexdigest()
        self.report = [f"2-D tree: {8 * len(weight):,} Gaussians, fresh points every step"]
        self.tensors = {}                                       # {dtype: {name: tensor}}
        for dtype in (torch.float32, torch.float64):
            self.tensors[dtype] = {
                name: torch.tensor(value, dtype=dtype, device=device).contiguous()
                for name, value in parameters.items()}

    def sample(self, n, generator=None):
        """n points of the density: float32 [n, 2].

        Each point takes three uniforms: one picks the Gaussian, two give normals by Box-Muller. On the CPU a
        larger draw therefore begins with the points of a smaller one.
        """
        tensors = self.tensors[torch.float32]
        u = torch.rand(n, 3, generator=generator, device=self.device)                   # [n, 3]
        index = torch.searchsorted(tensors["cumulative"], u[:, 0].contiguous(), right=True)
        index = index.clamp(max=len(tensors["mean"]) - 1)                               # rounding at u = 1
        radius = (-2 * torch.log1p(-u[:, 1])).sqrt()
        angle = 2 * math.pi * u[:, 2]
        z = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)            # [n, 2] normal
        return tensors["mean"][index] + (tensors["root"][index] * z[:, None, :]).sum(2)

    @torch.no_grad()
    def evaluate(self, x, sigma=0):
        """Log-density [n] and its gradient [n, 2] at x [n, 2] of the tree convolved with N(0, sigma^2 I);
        sigma is a number or [n].

        Along a branch's own axes the covariance plus sigma^2 I is diagonal, and its eight Gaussians share it.
        They lie at middle + tau half, tau = -1 ... 1, so their exponents are base + B tau - C tau^2 / 2 with
        three coefficients per branch, and one matrix product with `powers` [8, 3] gives them all.
        """
        tensors = self.tensors[x.dtype]
        axes = tensors["axes"]
        half = tensors["half"]
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1).expand(len(x), 1)
        tau = torch.linspace(-1, 1, 8, dtype=x.dtype, device=x.device)
        powers = torch.stack([torch.ones_like(tau), tau, -tau.square() / 2], dim=1)     # [8, 3]
        rows = 128 if x.device.type == "cpu" else 32768         # 128 fit a CPU's cache
        logp = []
        score = []
        for x_rows, sigma_rows in zip(x.split(rows), sigma.split(rows)):
            a = x_rows @ axes - tensors["middle"]                                       # [axis, n, K]
            precision = (tensors["lam"] + sigma_rows ** 2).reciprocal()                 # [axis, n, K]
            pull = precision * a
            slope = precision * half
            base = tensors["log_weight"] + 0.5 * (precision.prod(0).log() - (pull * a).sum(0))
            base_B_C = torch.stack([base, (pull * half).sum(0), (slope * half).sum(0)])
            exponent = (powers / math.log(2) @ base_B_C.flatten(1)).view(8, *base.shape)        # base 2
            most = exponent.amax(0).amax(1, keepdim=True)                               # [n, 1]
            share = exponent.sub_(most).clamp_(min=-115).exp2_()        # the clamp avoids slow underflow
            S0, S1 = (powers[:, :2].T @ share.flatten(1)).view(2, *base.shape)  # sums of share, share tau
            total = S0.sum(1, keepdim=True)
            logp.append((most + total.log2()) * math.log(2) - math.log(2 * math.pi))
            score.append((axes @ (slope * S1 - pull * S0).mT).sum(0).mT / total)
            del a, precision, pull, slope, base, base_B_C, exponent, share, S0, S1      # keeps the cache warm
        return torch.cat(logp)[:, 0], torch.cat(score)

    def logp(self, x, sigma=0):
        """Log-density [n] at x [n, 2]."""
        return self.evaluate(x, sigma)[0]

    def score(self, x, sigma=0):
        """Gradient of `logp` with respect to x: [n, 2]."""
        return self.evaluate(x, sigma)[1]

    def denoise(self, x, sigma, labels=None):
        """The exact denoiser E[x0 | x] = x + sigma^2 score(x; sigma) (EDM, eq. 3): [n, 2]."""
        square = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1) ** 2
        return x + square * self.score(x, sigma)


def _grow(random, position, angle, depth=0):
    """The branch that starts at `position` [2] with this angle and all that grow from it, as one list of
    (weight, mean [8, 2], covariance [2, 2] that the eight Gaussians share). Each of a branch's two children
    is grown to its end before the next: the order of the random draws is part of the definition."""
    scale = np.array([1.3136, 1.3844])
    u = np.array([np.cos(angle), np.sin(angle)])
    length = 0.292 * 0.8 ** depth * (0.2 * random.randn() + 1)
    h = 0.2 * 0.8 ** depth / length                             # thickness
    q = 0.06 * length * scale
    t = np.linspace(0.07, 0.93, 8)
    mean = (position + u * length * t[:, None]) * scale
    cov = (np.outer(u, u) + h ** 2 * (np.eye(2) - np.outer(u, u))) * np.outer(q, q)
    branches = [(length * 0.5 ** depth, mean, cov)]
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

    def take(self, index, device="cpu"):
        """The examples at `index` (on the host) as the network sees them: float32 [n, C, H, W]."""
        rows = self.x[put(index, self.x.device)]
        return scale(put(rows, device), self.mean, self.std)

    def to(self, device):
        """Move the array to `device` (to a GPU only if it takes less than half of the free memory)."""
        if torch.device(device).type == "cuda" and self.x.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.x = self.x.to(device)
        return self


def put(tensor, device):
    """The tensor on `device`; a copy from host memory to a GPU is not waited for."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def scale(x, mean, std):
    """Raw examples [n, C, H, W] -> float32 (x - mean) / std * SIGMA_DATA, so pixels are in [-1, 1]."""
    center = torch.tensor(mean).view(-1, 1, 1)
    factor = SIGMA_DATA / torch.tensor(std).view(-1, 1, 1)
    return (x.float() - put(center, x.device)) * put(factor, x.device)


def unscale(x, config):
    """The inverse of `scale` for samples x [n, ...] of a denoiser with this configuration: uint8 images, raw
    latents, or the points themselves. Raises DataError for samples that are not finite."""
    if not x.isfinite().all():
        raise DataError("samples that are not finite: the network overflows, or its training has diverged")
    if config["kind"] == "tree":
        return x
    mean = torch.tensor(config["mean"]).reshape(-1, 1, 1).to(x.device)
    std = torch.tensor(config["std"]).reshape(-1, 1, 1).to(x.device)
    raw = x.float() / SIGMA_DATA * std + mean
    return raw.round().clip(0, 255).to(torch.uint8) if config["kind"] == "image" else raw


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


@dataclass
class Batches:
    """batches[step] is the Batch of a step; batches.of(index, step) is that of the examples at `index`."""
    dataset: Dataset | Tree
    n: int                                      # examples per batch
    seed: int
    device: str = "cpu"                         # where the batch is wanted
    examples: torch.Tensor = None               # indices [M] of the examples to draw from; None = all
    flip: bool = False                          # mirror half of the images, as classes of their own
    targets: str = "sample"                     # "sample" = x0; "exact" = E[x0 | x], which the tree knows
    P_mean: float = -1.2                        # of ln sigma
    P_std: float = 1.2
    rows: slice = ...                           # rows of the batch that this process works on; ... = all
    purpose: str = ""                           # prefix of the names of the random streams

    def __post_init__(self):
        if self.examples is None and self.dataset.kind != "tree":
            self.examples = torch.arange(len(self.dataset))

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
        labels = None if self.dataset.labels is None else self.dataset.labels[wanted]
        if self.flip:
            mirrored = torch.randint(2, (self.n,), generator=self._stream(step, "flip"))[self.rows]     # 0, 1
            labels = mirrored if labels is None else labels + mirrored * len(self.dataset.class_names)
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
# guessed: ambiguous data is refused, and the report says what was read and what was left out.

CACHE_VERSION = 7                               # to be raised when the cached content changes
IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "unlabeled", "unlabelled"}
CIFAR_BATCHES = {f"data_batch_{i}" for i in range(1, 6)}
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def load(source, size=None):
    """The images or latents at `source` as a Dataset. Raises DataError if they cannot be read.

    source  a folder or .zip of images (unlabelled) or with one sub-folder for each class, the same with EDM's
            dataset.json on top, the folder cifar-10-batches-py, or an .npz with `images` uint8 [N, 3, H, W]
            or [N, H, W, 3], or `latents` float [N, C, H, W] (with optional `mean`, `std` [C]), and optional
            `labels` [N] and `class_names` [K]
    size    center-crop to a square and resize (Lanczos) to this many pixels; None = as they are
    """
    source = Path(source)
    with reading(source, "a data set"):
        cached = cache_folder() / _cache_name(source.resolve(), size)
        if not cached.exists():
            require_writable(cached)
            dataset = _read(source, size)
            with writing(cached) as file:
                torch.save(vars(dataset), file)
    with reading(cached, "a cached data set (delete it)"):
        return Dataset(**torch.load(cached, mmap=True, weights_only=True))


def cache_folder():
    """The folder of cached data sets and features: $DATA_CACHE, else ~/.cache/data-curation."""
    return Path(os.environ.get("DATA_CACHE") or "~/.cache/data-curation").expanduser()


def _cache_name(source, size):
    """The name of the cached file: a hash of the paths, sizes and times of the source's files, and `size`."""
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in _files(source)]
    key = repr((CACHE_VERSION, str(source), size, stamps))
    return hashlib.sha256(key.encode()).hexdigest()[:32] + ".pt"


def _read(source, size):
    """The Dataset at `source`, read without the cache. Any exception means that it is not a data set."""
    if source.suffix.lower() == ".npz":
        return _read_npz(source, size)
    members = _members(source)
    base_names = [PurePosixPath(name).name for name in members]
    if "checkpoint.pt" in base_names:
        raise ValueError("it holds the folder of a run (checkpoint.pt): move the runs elsewhere")
    if CIFAR_BATCHES.intersection(base_names):
        return _read_cifar(members, size)
    return _read_images(members, size)


# ------------------------------------------------------------------------------------------------------------
# The files of a folder or a zip, as one dictionary {name with slashes: function that returns the bytes}.
# Hidden entries are left out.

def _members(source):
    """{name: function that returns the bytes} of the files in a folder or a zip."""
    if source.is_dir():
        return {file.relative_to(source).as_posix(): file.read_bytes for file in _files(source)}
    members = {}
    archive = zipfile.ZipFile(source)
    for info in archive.infolist():
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if info.filename.endswith(("/", "\\")) or any(_is_hidden(step) for step in path.parts):
            continue
        if str(path) in members:
            raise ValueError(f"{path} is in it twice, as if it had been appended to: pack it anew")
        members[str(path)] = functools.partial(archive.read, info)
    return members


def _files(path):
    """Yield a file itself, or all files below a folder in the order of their names, following links. A link
    to a folder above ends in the system's error: too many levels of symbolic links."""
    if not path.is_dir():
        yield path
        return
    for entry in sorted(path.iterdir()):
        if not _is_hidden(entry.name):
            yield from _files(entry)


def _is_hidden(name):
    return name.startswith((".", "@")) or name == "__MACOSX"


# ------------------------------------------------------------------------------------------------------------
# Images in a folder or a zip. The folders that all images share are stripped. After that every image lies in
# a folder, and the first one is its class, or none does. EDM's dataset.json replaces these classes.

def _read_images(members, size):
    """The Dataset of the images among the members."""
    images = sorted(name for name in members if name.lower().endswith(IMAGES))
    others = sorted(set(members) - set(images))
    suffixes = sorted({PurePosixPath(name).suffix for name in others})
    report = [f"{len(others):,} other files left out ({', '.join(suffixes[:10])})"] if others else []
    if not images:
        raise ValueError(" ".join([f"it holds no images ({' '.join(IMAGES)})", *report]))
    listings = [name for name in others if PurePosixPath(name).name == "dataset.json"]
    if listings:
        label_of = _labels_by_listing(members, listings[0], images)
    else:
        label_of = _labels_by_folder(images, others)
    images.sort(key=lambda name: (label_of[name], name))
    labels = None if label_of[images[0]] is None else [label_of[name] for name in images]

    # Threads, since Pillow releases Python's lock; an error cancels the rest.
    with (ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
          contextlib.closing(pool.map(functools.partial(_decode, members, size), images)) as pictures):
        x = _stack(pictures, len(images))
    return _make_dataset(x, labels, report=report)


def _labels_by_folder(images, others):
    """{name: its class}: the first folder below those that all images share; None if there are no folders."""
    top = os.path.commonpath([os.path.dirname(name) for name in images])
    label_of = {}
    for name in images:
        folders = PurePosixPath(name).relative_to(top).parts[:-1]
        label_of[name] = folders[0] if folders else None
    unlabelled = [name for name in images if label_of[name] is None]
    if 0 < len(unlabelled) < len(images):
        raise ValueError(f"{unlabelled[0]} lies beside class folders: put all images into these, or none")
    splits = sorted({folder for folder in label_of.values() if str(folder).lower() in SPLITS})
    if len(splits) > 1:
        raise ValueError(f"{', '.join(splits)} look like splits, not like classes: give one of these folders")
    with_images = {folder for name in images for folder in PurePosixPath(name).parents}
    for name in others:
        if PurePosixPath(name).parent not in with_images:       # a class whose files have unknown suffixes
            raise ValueError(f"the folder of {name} holds no image: convert its files, or move it elsewhere")
    return label_of


def _labels_by_listing(members, listing, images):
    """{name: class number or None} by EDM's dataset.json, the member `listing`, which lists the names below
    its own folder: {"labels": [["00000/img00000000.png", 3], ...]}, or null for no labels."""
    labels = json.loads(members[listing]())["labels"]
    if labels is None:
        return dict.fromkeys(images)
    top = PurePosixPath(listing).parent
    label_of = {str(top / name.replace("\\", "/")): label for name, label in labels}
    different = sorted(label_of.keys() ^ set(images))
    if different:
        raise ValueError(f"{different[0]} is missing, or not listed in dataset.json")
    return label_of


def _decode(members, size, name):
    """One image file as uint8 [3, H, W], turned upright by EXIF, transparency on white."""
    with reading(name, "an image"):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(members[name]())))
        if image.mode[0] in "IF":                               # Pillow would clip them at 255
            raise ValueError("convert it to 8 bits a channel")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return _resize(image.convert("RGB"), size)


def _resize(image, size):
    """Center-crop a Pillow RGB image to a square and resize it to `size` pixels: uint8 [3, H, W]."""
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left = (image.width - side) // 2
        top = (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.LANCZOS)
    return np.asarray(image).transpose(2, 0, 1)


def _stack(pictures, n):
    """uint8 [n, 3, H, W] of n pictures [3, H, W], in one array that is allocated once."""
    x = None
    for i, picture in enumerate(pictures):
        if x is None:
            x = np.empty((n, *picture.shape), np.uint8)
        if picture.shape != x.shape[1:]:
            raise ValueError(f"images of {list(x.shape[1:])} and {list(picture.shape)}: give --size")
        x[i] = picture
        if n > 10_000:
            progress(f"reading images: {i + 1:,} of {n:,}", last=i + 1 == n)
    return x


# ------------------------------------------------------------------------------------------------------------
# CIFAR-10's python batches are pickles, and a pickle can run code. This unpickler resolves only the four
# names that numpy's arrays of 2009 and of today need, and runs nothing else.

class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        """The object that a name in the pickle stands for; ValueError for all names but four."""
        if (module, name) == ("_codecs", "encode"):
            return lambda text, _: text.encode("latin1")
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            return getattr(np._core.multiarray, name)
        raise ValueError(f"refused, it wants to run {module}.{name}")


def _read_cifar(members, size):
    """The Dataset of the five training batches among the members."""
    names = [name for name in sorted(members) if PurePosixPath(name).name in CIFAR_BATCHES]
    if len(names) != 5:
        raise ValueError(f"{len(names)} of CIFAR-10's 5 training batches: give a folder with each once")
    batches = [_Unpickler(io.BytesIO(members[name]()), encoding="bytes").load() for name in names]
    x = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([batch[b"labels"] for batch in batches])
    report = [f"CIFAR-10's 5 training batches, {len(members) - 5} other files left out"]
    return _make_dataset(_resize_all(x, size), labels, CIFAR_CLASSES, report)


# ------------------------------------------------------------------------------------------------------------
# An .npz file of images or latents.

def _read_npz(source, size):
    """The Dataset of its `images` or `latents`, with its `labels`, `class_names`, `mean` and `std` if any."""
    with np.load(source, allow_pickle=False) as file:
        arrays = dict(file)
    if "images" not in arrays and "latents" not in arrays:
        raise ValueError("it has neither `images` nor `latents`")
    labels = arrays.get("labels")
    class_names = arrays.get("class_names")
    if "images" in arrays:
        x = arrays["images"]
        if x.ndim == 4 and x.shape[1] != 3:
            x = x.transpose(0, 3, 1, 2)
        return _make_dataset(_resize_all(x, size), labels, class_names)

    x = arrays["latents"]
    if size is not None:
        raise ValueError("--size is for images, and these are latents")
    x = x.astype(np.float16 if x.dtype.itemsize == 2 else np.float32)
    mean = arrays.get("mean", x.mean((0, 2, 3), np.float64))
    std = arrays.get("std", x.std((0, 2, 3), np.float64).clip(1e-6))
    is_per_channel = mean.shape == std.shape == x.shape[1:2]
    if not is_per_channel or not np.isfinite([mean, std]).all() or std.min() <= 0:
        raise ValueError("`latents` must be finite, `mean` and `std` [C], and `std` above 0")
    return _make_dataset(x, labels, class_names, kind="latent", mean=mean.tolist(), std=std.tolist())


def _resize_all(x, size):
    """`_resize` of images [N, 3, H, W]."""
    if size is None or x.shape[2:] == (size, size):
        return x
    pictures = (_resize(Image.fromarray(image), size) for image in x.transpose(0, 2, 3, 1))
    return _stack(pictures, len(x))


# ------------------------------------------------------------------------------------------------------------
# What every source ends in: one place that checks sizes, labels and names.

def _make_dataset(x, labels, class_names=None, report=(), kind="image", **scaling):
    """The Dataset of arrays x [N, C, H, W] and labels [N], numbers or names, or None. Its classes are the
    labels that occur, in order; `class_names` [K] are those of the labels 0 ... K - 1 (None: their own)."""
    if kind == "image" and (x.dtype != np.uint8 or x.shape[1] != 3):
        raise ValueError(f"`images` is {x.dtype} {list(x.shape)}, wanted uint8 [N, 3, H, W] or [N, H, W, 3]")
    x = np.ascontiguousarray(x)
    dataset = Dataset(torch.from_numpy(x), kind=kind, **scaling)
    classes = "no labels"
    if labels is not None:
        labels = np.asarray(labels)
        is_number = labels.dtype.kind in "iu" and labels.min() >= 0
        if labels.shape != (len(x),) or not (is_number or labels.dtype.kind == "U"):
            raise ValueError(f"labels {labels.dtype} {list(labels.shape)}, wanted numbers >= 0 [{len(x)}]")
        names, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
        if class_names is not None:
            if names[-1] >= len(class_names) or len(set(class_names)) < len(class_names):
                raise ValueError(f"wanted a different class name for each label up to {names[-1]}")
            names = [class_names[label] for label in names]
        dataset.class_names = [str(name) for name in names]
        dataset.labels = torch.from_numpy(numbers.astype(np.int64))
        first = ", ".join(dataset.class_names[:10])
        classes = f"{len(names):,} classes of {counts.min():,} to {counts.max():,}: {first}"
    dataset.report = [f"{len(x):,} {kind}s of {'x'.join(map(str, dataset.shape))}", classes, *report]
    values = (x.shape, kind, dataset.class_names, dataset.mean, dataset.std)
    digest = hashlib.sha256(repr(values).encode())
    digest.update(x)
    if labels is not None:
        digest.update(dataset.labels.numpy())
    dataset.fingerprint = digest.hexdigest()
    return dataset


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
    return pool, held_out if holdout > 0 else None


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
    return [members[priority[members].argsort(descending=True, stable=True)]
            for members in indices_by_class(labels, len(priority))]


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
# Class weights: they multiply the loss of a class's examples, and their mean over all examples is 1.

def class_counts(dataset, index=None):
    """How many examples each class has among those at `index` (None: all): float32 [classes]."""
    labels = dataset.labels if index is None else dataset.labels[index]
    return torch.bincount(labels, minlength=len(dataset.class_names)).float()


def class_weights_of_mean_one(weights, counts):
    """Weights [classes], scaled so that their mean over `counts` [classes] examples is 1."""
    return weights * counts.sum() / (weights * counts).sum()


def read_class_weights(source, class_names):
    """-> (weights float32 [classes], (seconds, examples) that finding them took) from a file of
    `write_class_weights`. Raises DataError."""
    with reading(source, "class weights for these classes"):
        content = json.loads(Path(source).read_bytes())
        weight_of = content["weights"]
        if set(weight_of) != set(class_names):
            raise ValueError(f"it is for the classes {list(weight_of)[:5]}, wanted {list(class_names)[:5]}")
        weights = torch.tensor([float(weight_of[name]) for name in class_names])
        if not weights.isfinite().all() or weights.min() < 0 or not weights.any():
            raise ValueError("the weights must be finite, from 0 on, and not all 0")
        return weights, (float(content["seconds"]), int(content["examples"]))


def write_class_weights(target, class_names, weights, cost):
    """Write weights [classes] as JSON, with the (seconds, examples) that finding them took."""
    content = dict(weights=dict(zip(class_names, weights.tolist())), seconds=cost[0], examples=cost[1])
    with writing(target) as file:
        file.write(json.dumps(content, indent=1).encode())


# ------------------------------------------------------------------------------------------------------------
# Class weights by group DRO, in DoReMi's form (https://arxiv.org/abs/2305.10429, algorithm 1): with e_c the
# mean over class c of max(loss(proxy) - loss(reference), 0), alpha_c <- alpha_c exp(eta e_c), normalized, and
# mixed with the uniform weights. The result is the running mean of alpha.

class GroupDRO(torch.nn.Module):
    """`alpha` [classes], the classes' shares of the loss, and its running mean `mean_alpha`; both sum to 1.
    The weights of the classes in the loss are `class_weights_of_mean_one(alpha / counts, counts)`.

    eta         step size; 1 in DoReMi's paper and in the arguments of its official code
    smoothing   share of the uniform weights; 1e-3 in the paper, 1e-4 in its code

    Algorithm 1 weighs the loss of a step by the alpha of the same step. Here alpha weighs the loss of the
    next step, because the gradients of the first micro-batches are taken before the excess of the last is
    known. A class that is absent from a batch keeps its last e_c: with 0 instead, a class would lose weight
    for being rare. The loss's weights have mean 1 over the pool; DoReMi's code normalizes within each batch.
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
# Pictures: rows of images, a density, panels side by side.

def image_rows(rows, names=()):
    """Pillow image of rows of uint8 images [n, C, H, W] or latents, each at least 48 pixels wide, with the
    `names` of the rows at their left."""
    side = max(48, rows[0].shape[-1])
    left = 100 if names else 0
    picture = Image.new("RGB", (left + side * max(map(len, rows)), side * len(rows)), "white")
    spread = torch.cat(rows).float().std().clamp_min(1e-6)      # of latents
    for y, row in enumerate(rows):
        if y < len(names):
            corner = (2, y * side + 14)
            ImageDraw.Draw(picture).text(corner, names[y][:14], fill="black", font=ImageFont.load_default(14))
        if row.dtype != torch.uint8:
            row = (row.float() / spread * 50 + 128).clamp(0, 255).to(torch.uint8)
        if row.shape[1] < 3:
            row = row[:, :1].expand(-1, 3, -1, -1)
        for x, pixels in enumerate(row[:, :3].permute(0, 2, 3, 1).contiguous().cpu().numpy()):
            image = Image.fromarray(pixels).resize((side, side), Image.BICUBIC)
            picture.paste(image, (left + x * side, y * side))
    return picture


def class_picture(images, labels=None, class_names=()):
    """Pillow image of images [n, C, H, W]. With labels [n] of two to ten classes a row for each, else
    near-square in the order of the labels."""
    if labels is not None:
        present = labels.unique().tolist()
        if 2 <= len(present) <= 10:
            names = [class_names[label] for label in present]
            return image_rows([images[labels == label] for label in present], names)
        images = images[labels.argsort(stable=True)]
    return image_rows(images.split(math.ceil(len(images) ** 0.5)))


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


def panels(pictures, titles):
    """Pillow image of pictures side by side, with a title each."""
    width = sum(picture.width + 8 for picture in pictures)
    canvas = Image.new("RGB", (width, max(picture.height for picture in pictures) + 24), "white")
    x = 0
    for picture, title in zip(pictures, titles):
        canvas.paste(picture, (x, 24))
        ImageDraw.Draw(canvas).text((x + 4, 2), title, fill="black", font=ImageFont.load_default(16))
        x += picture.width + 8
    return canvas


def coreset_picture(dataset, pool, priority, kept, columns=8):
    """Pillow image of what `prune` kept of the examples at `pool` [n]: for each of the first ten classes a
    row of best-kept, last-kept and first-dropped images. priority [n]; `kept` are positions in the pool."""
    labels = None if dataset.labels is None else dataset.labels[pool]
    names = dataset.class_names[:10] or ["all"]
    rows = {"best kept": [], "last kept, nearest the border first": [], "first dropped": []}
    for members in ranked(priority, labels)[:10]:
        n = int(torch.isin(members, kept).sum())
        for title, chosen in zip(rows, (members[:n], members[:n].flip(0), members[n:])):
            rows[title].append(dataset.x[pool[chosen[:columns]]])
    return panels([image_rows(of_title, names) for of_title in rows.values()], rows)


# ------------------------------------------------------------------------------------------------------------
# Files. What cannot be read becomes one DataError that names the file. Files are written atomically.

class DataError(ValueError):
    """An error that the user can fix: one line that names the file or flag and says why."""


@contextlib.contextmanager
def reading(source, what):
    """Exceptions inside become a DataError, "SOURCE: not WHAT, why": a damaged file can raise almost any. The
    block holds the call that reads and the checks of its result, nothing else."""
    try:
        yield
    except (DataError, NameError, ImportError, torch.OutOfMemoryError):         # not caused by a file
        raise
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or source}: no such file") from None
    except Exception as error:
        why = str(error)
        if not isinstance(error, ValueError):                   # str(KeyError) is only the key
            why = f"{type(error).__name__}: {why}"
        raise DataError(f"{source}: not {what}, {' '.join(why.split())[:200]}") from None


@contextlib.contextmanager
def writing(target):
    """Open a binary file that becomes `target` if the block, which only writes, succeeds. Else DataError."""
    temporary = f"{target}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:                    # torch.save raises the latter
        raise DataError(f"{target}: cannot be written, {error}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def require_writable(target):
    """Make the folder of `target`. DataError if `target` cannot be written: before the work, not after it."""
    folder = Path(target).absolute().parent
    with reading(target, "a file that can be written"):
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.isdir(target) or not os.access(folder, os.W_OK):
            raise ValueError(f"it is a folder, or {folder} is read-only")


# ------------------------------------------------------------------------------------------------------------
# Flags: argparse types, and what resuming and comparing must know about settings.

FILES = ("guide", "reference", "class_weights", "prune_features")       # may name a file: compared by content
MAY_DIFFER = {                                  # settings that may differ when a run resumes
    "data", "out", "device", "bf16", "compile", "micro_batch", "steps", "log_every", "save_every",
    "eval_every", "eval_samples", "sampling_steps", "guidance", "metrics", "guide_path", "files", *FILES}


def path(text):
    """An argparse type: a path, with ~ for the home folder."""
    return os.path.expanduser(text)


def file_or(*words):
    """Make an argparse type: one of the words, or else a path, which becomes absolute."""
    def parse(text):
        """The word or the absolute path."""
        return text if text in words else os.path.abspath(path(text))
    return parse


def number(kind, interval):
    """Make an argparse type: int or float (`kind`) in an interval such as "[1, inf)", and never NaN."""
    low, high = map(float, interval[1:-1].split(","))

    def parse(text):
        """The number in `text`; ArgumentTypeError outside of the interval."""
        value = kind(text)
        is_open_end = (value == low and interval[0] == "(") or (value == high and interval[-1] == ")")
        if not low <= value <= high or is_open_end:
            raise argparse.ArgumentTypeError(f"{text} is not in {interval}")
        return value
    parse.__name__ = kind.__name__                              # "invalid int value: 'x'"
    return parse


def device(text):
    """An argparse type: "cpu", "cuda" or "cuda:N". A process of several takes the GPU of its LOCAL_RANK."""
    if text == "cpu":
        return text
    try:
        if torch.device(text).type != "cuda":
            raise RuntimeError("give cpu or cuda")
        index = torch.device(text).index or 0
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            index = int(os.environ.get("LOCAL_RANK") or 0)
        torch.cuda.set_device(index)                            # before the first call that would take cuda:0
    except (RuntimeError, AssertionError, AttributeError) as error:             # the last: torch without CUDA
        raise argparse.ArgumentTypeError(f"{text} cannot be used: {error}") from None
    return f"cuda:{index}"


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """argparse's help with the text as it stands and the defaults, but for None and False."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def parser(description, usage):
    """An ArgumentParser without abbreviated flags."""
    return argparse.ArgumentParser(usage=f"%(prog)s {usage}", description=description,
                                   allow_abbrev=False, formatter_class=Help)


# ------------------------------------------------------------------------------------------------------------
# Programs: one line on stderr for every error that the user can fix, signals, and a progress line.

class Stopped(KeyboardInterrupt):
    """Ctrl-C, or SIGTERM, which schedulers send: `number` is the signal."""

    def __init__(self, number, text=""):
        super().__init__(text)
        self.number = number


class Signals:
    """The handler of Ctrl-C and SIGTERM. They raise Stopped, but while `held` is True, the first one is only
    noted in `received`, and the program stops by itself."""
    held = False
    received = None

    def __call__(self, number, frame):
        if not self.held or self.received is not None:
            raise Stopped(number)
        self.received = number
        say("stopping after this step; again = now")


signals = Signals()


def command(run, stopped="stopped"):
    """Call run(). An error that the user can fix becomes one line on stderr and exit status 2. Ctrl-C and
    SIGTERM end with the line `stopped`, or with that of the exception, and status 130 and 143."""
    for terminal in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):   # None, replaced or closed
            terminal.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGINT, signals)
    signal.signal(signal.SIGTERM, signals)
    try:
        return run()
    except (DataError, OSError, torch.OutOfMemoryError) as error:
        say("error: " + str(error).partition("\n")[0])
        raise SystemExit(2) from None
    except Stopped as stop:
        say(str(stop) or stopped)
        raise SystemExit(128 + stop.number) from None


def say(text, end="\n", file=None):
    """Print to `file` (None: stderr). If the terminal is closed, the text is lost and the program goes on."""
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=file or sys.stderr, flush=True)


_progress_shown = -math.inf                     # when the last progress line was shown


def progress(text, last=False):
    """Show `text` on stderr: rewritten in place on a terminal, else every ten seconds and the `last`."""
    global _progress_shown
    on_terminal = os.isatty(2)
    now = time.monotonic()
    if not last and now - _progress_shown <= (0.5 if on_terminal else 10):
        return
    _progress_shown = now
    if on_terminal:
        width = shutil.get_terminal_size().columns - 1          # a full-width line would wrap
        say(text[:width].ljust(width), end="\n" if last else "\r")
    else:
        say(text)
