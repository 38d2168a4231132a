"""Scores of samples: feature networks, Fréchet distance, precision and recall, 2-D metrics; run comparison.

Fréchet Inception distance: "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
Equilibrium" (arXiv 1706.08500). Precision and recall: "Improved Precision and Recall Metric for Assessing
Generative Models" (arXiv 1904.06991). Images are always scored as uint8. Two image sets, or training runs:

    python fid.py REAL FAKE --features inception
    python fid.py --compare runs/uniform-s0 runs/uniform-s1 runs/ajest-s0 runs/ajest-s1
"""
import argparse
import hashlib
import itertools
import json
import os
import re
import sys
import time
import zipfile
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import guide
import model

WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")
WEIGHTS_SHA256 = "6726825d"  # first digits, as in the file's name
HIT_LOGP = -2.12  # a point of the tree is a hit where the exact log-density is at least this
BIASED_BELOW = 2048  # samples; fewer and the Fréchet distance is visibly too large


# ------------------------------------------------------------------------------------------------------------
# The FID Inception network (TensorFlow's graph of 2015-12-05). A block is lines of convolutions, each "name
# channels kernel". A line starts at the block's input x, at its pooled input or at an earlier convolution;
# the ends of all lines are concatenated. "3s2" is 3x3 with stride 2 and no padding, others keep the size.

MIXED_A = """x > branch1x1 64 1x1
             x > branch5x5_1 48 1x1 > branch5x5_2 64 5x5
             x > branch3x3dbl_1 64 1x1 > branch3x3dbl_2 96 3x3 > branch3x3dbl_3 96 3x3
             pool > branch_pool {n} 1x1"""
MIXED_B = """x > branch3x3 384 3s2
             x > branch3x3dbl_1 64 1x1 > branch3x3dbl_2 96 3x3 > branch3x3dbl_3 96 3s2
             pool"""
MIXED_C = """x > branch1x1 192 1x1
             x > branch7x7_1 {n} 1x1 > branch7x7_2 {n} 1x7 > branch7x7_3 192 7x1
             x > branch7x7dbl_1 {n} 1x1 > branch7x7dbl_2 {n} 7x1 > branch7x7dbl_3 {n} 1x7 \
               > branch7x7dbl_4 {n} 7x1 > branch7x7dbl_5 192 1x7
             pool > branch_pool 192 1x1"""
MIXED_D = """x > branch3x3_1 192 1x1 > branch3x3_2 320 3s2
             x > branch7x7x3_1 192 1x1 > branch7x7x3_2 192 1x7 > branch7x7x3_3 192 7x1 > branch7x7x3_4 192 3s2
             pool"""
MIXED_E = """x > branch1x1 320 1x1
             x > branch3x3_1 384 1x1 > branch3x3_2a 384 1x3
             branch3x3_1 > branch3x3_2b 384 3x1
             x > branch3x3dbl_1 448 1x1 > branch3x3dbl_2 384 3x3 > branch3x3dbl_3a 384 1x3
             branch3x3dbl_2 > branch3x3dbl_3b 384 3x1
             pool > branch_pool 192 1x1"""
INCEPTION = [  # block, lines, the {n} in them, pooling
    ("Mixed_5b", MIXED_A, 32, "mean"), ("Mixed_5c", MIXED_A, 64, "mean"), ("Mixed_5d", MIXED_A, 64, "mean"),
    ("Mixed_6a", MIXED_B, 0, "halve"),
    ("Mixed_6b", MIXED_C, 128, "mean"), ("Mixed_6c", MIXED_C, 160, "mean"),
    ("Mixed_6d", MIXED_C, 160, "mean"), ("Mixed_6e", MIXED_C, 192, "mean"),
    ("Mixed_7a", MIXED_D, 0, "halve"),
    ("Mixed_7b", MIXED_E, 0, "mean"), ("Mixed_7c", MIXED_E, 0, "max")]
POOLS = {"mean": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
         "max": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
         "halve": lambda x: F.max_pool2d(x, 3, stride=2)}


class Mixed(torch.nn.Module):
    """One block of lines as above; its output has `channels` channels."""

    def __init__(self, c_in, lines, n, pool):
        super().__init__()
        channels, self.lines, self.pool = {"x": c_in, "pool": c_in}, [], POOLS[pool]
        for line in lines.format(n=n).split("\n"):
            source, *convs = (part.split() for part in line.split(">"))
            names = source + [name for name, _, _ in convs]
            for before, (name, c_out, kernel) in zip(names, convs):
                size = (3, 3) if kernel == "3s2" else tuple(int(k) for k in kernel.split("x"))
                stride, padding = (2, 0) if kernel == "3s2" else (1, (size[0] // 2, size[1] // 2))
                channels[name] = int(c_out)
                setattr(self, name, torch.nn.Conv2d(channels[before], int(c_out), size, stride, padding))
            self.lines.append(names)
        self.channels = sum(channels[names[-1]] for names in self.lines)

    def forward(self, x):
        value = {"x": x, "pool": self.pool(x)}
        for names in self.lines:
            for before, name in zip(names, names[1:]):
                value[name] = getattr(self, name)(value[before]).relu_()
        return torch.cat([value[names[-1]] for names in self.lines], 1)


class Inception(torch.nn.Module):
    """uint8 [N, 3, H, W] -> float32 [N, 2048], with the weights of pt_inception-2015-12-05-6726825d.pth.

    Batch norms (eps 0.001) are folded into the convolutions while loading; the classifier on top is left out.
    Raises model.CheckpointError for a file without exactly those tensors.
    """

    def __init__(self, weights_path):
        super().__init__()
        self.Conv2d_1a_3x3 = torch.nn.Conv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = torch.nn.Conv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = torch.nn.Conv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = torch.nn.Conv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = torch.nn.Conv2d(80, 192, 3)
        channels = 192
        for name, lines, n, pool in INCEPTION:
            block = Mixed(channels, lines, n, pool)
            setattr(self, name, block)
            channels = block.channels
        try:
            state = torch.load(weights_path, map_location="cpu", weights_only=True)
            self.load_state_dict(_fold_batch_norms(state))
        except OSError as error:
            raise model.CheckpointError(f"{weights_path}: {error.strerror or error}") from None
        except Exception:  # torch's readers raise many kinds for a damaged or foreign file
            raise model.CheckpointError(f"{weights_path}: not the FID Inception weights "
                                        f"({os.path.basename(WEIGHTS_URL)})") from None
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images):
        """uint8 images [N, 3, H, W] -> pooled features, float32 [N, 2048]."""
        x = images.float() / 255  # [N, 3, H, W]
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x).relu_()).relu_()
        x = F.max_pool2d(self.Conv2d_2b_3x3(x).relu_(), 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x).relu_()).relu_()
        x = F.max_pool2d(x, 3, stride=2)
        for name, *_ in INCEPTION:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


def _fold_batch_norms(state):
    """{X.conv.weight, X.bn.*} -> {X.weight, X.bias}, such that conv(x) equals the original bn(conv(x))."""
    folded = {}
    for key in state:
        name, found, _ = key.partition(".conv.weight")
        if found:
            weight, gamma, beta, mean, var = (state[f"{name}.{part}"].double() for part in (
                "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"))
            scale = gamma / (var + 0.001).sqrt()
            folded[f"{name}.weight"] = (weight * scale[:, None, None, None]).float()
            folded[f"{name}.bias"] = (beta - mean * scale).float()
    return folded


def find_inception_weights(path=None):
    """The FID weights: `path`, $FID_INCEPTION_WEIGHTS, torch's hub cache, or a download into that cache."""
    given = path or os.environ.get("FID_INCEPTION_WEIGHTS")
    if given:
        return given
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(WEIGHTS_URL))
    if not os.path.exists(cached):
        try:
            os.makedirs(os.path.dirname(cached), exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, cached, hash_prefix=WEIGHTS_SHA256)
        except (OSError, RuntimeError) as error:
            reason = str(getattr(error, "reason", error)).splitlines()[0]
            raise data.DataError(f"cannot download the Inception weights ({reason}): give them with "
                                 f"--inception-weights, or use --features own:CKPT") from None
    if not _sha256(cached).startswith(WEIGHTS_SHA256):
        raise data.DataError(f"{cached}: wrong checksum, delete it to download it again")
    return cached


def _sha256(path):
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        raise data.DataError(f"{path}: {error.strerror or error}") from None


# ------------------------------------------------------------------------------------------------------------
# Sums of a stream of features, and the Fréchet distance between two Gaussians:
# |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr sqrt(S1 S2).

class Stats:
    """Mean and unbiased covariance from float64 sums of features, centred on the first batch's mean."""

    def __init__(self):
        self.n = 0

    def add(self, features):
        """Add float features [n, d]."""
        features = _double(features)
        if self.n == 0:
            self.centre = features.mean(0)
            self.sum, self.outer = torch.zeros_like(self.centre), features.new_zeros(2 * [features.shape[1]])
        centred = features - self.centre
        self.n += len(features)
        self.sum += centred.sum(0)
        self.outer.addmm_(centred.T, centred)

    def mean_cov(self):
        """(mu [d], sigma [d, d]) on the CPU, the covariance divided by n - 1."""
        mean = self.sum / self.n
        sigma = (self.outer - self.n * torch.outer(mean, mean)) / max(self.n - 1, 1)
        return (self.centre + mean).cpu(), sigma.cpu()


def frechet_from_stats(mu1, sigma1, mu2, sigma2):
    """Fréchet distance of N(mu1 [d], sigma1 [d, d]) and N(mu2, sigma2), arrays or tensors, in float64.

    S1 S2 has the eigenvalues of the symmetric R^T S2 R for any R with R R^T = S1, so no general matrix square
    root is needed: R is the Cholesky factor of S1, or comes from its eigenvectors where S1 has not full rank.
    """
    mu1, sigma1, mu2, sigma2 = (_double(torch.as_tensor(v)) for v in (mu1, sigma1, mu2, sigma2))
    R, failed = torch.linalg.cholesky_ex(sigma1)
    if failed:
        values, vectors = torch.linalg.eigh(sigma1)
        R = vectors * values.clamp_min(0).sqrt()
    product = R.T @ sigma2 @ R
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item()


def frechet_distance(features_a, features_b):
    """Fréchet distance of two feature sets [n_a, d], [n_b, d] (arrays or tensors), as a float.

    With fewer samples than dimensions, tr sqrt(S1 S2) is the sum of the singular values of A B^T, A and B
    being the centred features over sqrt(n - 1): exact at any rank and cheaper.
    """
    a, b = (_double(torch.as_tensor(f)) for f in (features_a, features_b))
    if max(len(a), len(b)) >= a.shape[1]:
        return frechet_from_stats(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    A, B = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (a, b))
    squares = A.square().sum() + B.square().sum() - 2 * torch.linalg.svdvals(A @ B.T).sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + squares).item()


def _double(x):
    return (x.cpu() if x.device.type == "mps" else x).double()  # MPS has no float64


# ------------------------------------------------------------------------------------------------------------
# Improved precision and recall: a sample lies on the other set's manifold when it is no farther from one of
# that set's points than that point's k-th neighbour within its set.

def precision_recall(real, fake, k=3, block=2048):
    """(precision, recall) of features real [n, d] and fake [m, d], n and m > k, on the features' device."""
    if min(len(real), len(fake)) <= k:
        raise data.DataError(f"precision and recall need more than {k} images on each side")
    centre = _double(real).mean(0)  # distances by matmul lose fewer digits around the mean
    real, fake = _double(real) - centre, _double(fake) - centre
    return _on_manifold(fake, real, k, block), _on_manifold(real, fake, k, block)


def _on_manifold(points, centres, k, block):
    """Share of points [n, d] that lie in one of the balls around centres [m, d] up to the k-th neighbour."""
    radius = torch.cat([_squared_distances(rows, centres).kthvalue(k + 1).values  # itself is the nearest
                        for rows in centres.split(block)])  # [m]
    inside = [(_squared_distances(rows, centres) <= radius).any(1) for rows in points.split(block)]
    return torch.cat(inside).double().mean().item()


def _squared_distances(a, b):
    return a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T  # [n, m]


# ------------------------------------------------------------------------------------------------------------
# Metrics of the 2-D tree, whose density is known.

def hit(points, tree):
    """Share of the points [n, 2] where the tree's log-density is at least HIT_LOGP."""
    return (tree.logp(points, 0) >= HIT_LOGP).double().mean().item()


def coverage(points, tree, cells=101, side=3.0, is_hit=None):
    """"Mandala score" of points [n, 2]: on a cells x cells grid of that side around the origin, the number of
    cells with a hit over the number of cells with any point. `is_hit` [n] spares the density."""
    is_hit = tree.logp(points, 0) >= HIT_LOGP if is_hit is None else is_hit
    cell = ((points.double() / side + 0.5) * cells).floor().long()  # [n, 2]
    inside = ((cell >= 0) & (cell < cells)).all(1)
    index = cell[:, 0] * cells + cell[:, 1]
    return index[inside & is_hit].unique().numel() / max(index[inside].unique().numel(), 1)


def exact_endpoints(tree, noise, steps=32, sigma_max=5):
    """End points [n, 2] of the exact denoiser's ODE from unit normal noise [n, 2]."""
    return guide.heun(tree.denoise, noise, steps=steps, sigma_max=sigma_max)


def l2(points, endpoints):
    """Mean Euclidean distance between points [n, 2] and endpoints [n, 2]."""
    return (points.double() - endpoints.double()).norm(dim=1).mean().item()


def tree_metrics(points, tree, endpoints=None):
    """{"hit", "coverage"} of points [n, 2]; with the exact end points [m, 2] of the first m, also "l2"."""
    is_hit = tree.logp(points, 0) >= HIT_LOGP
    metrics = {"hit": is_hit.double().mean().item(), "coverage": coverage(points, tree, is_hit=is_hit)}
    return metrics if endpoints is None else metrics | {"l2": l2(points[:len(endpoints)], endpoints)}


@torch.no_grad()
def score_error(denoiser, tree, n=16384, seed=0, P_mean=-2.3, P_std=1.5):
    """Excess loss over the exact denoiser's: the mean over n draws of (x0, sigma, eps) of lambda(sigma) times
    the mean over dimensions of (D - D_exact)^2. 0 = exact. Runs on the tree's device."""
    generator = data.stream(seed, 0, "score_error", tree.device)
    x0 = tree.sample(n, generator=generator)  # [n, 2]
    sigma = (P_mean + P_std * torch.randn(n, generator=generator, device=x0.device)).exp()
    x = x0 + sigma[:, None] * torch.randn(n, 2, generator=generator, device=x0.device)
    return model.per_example_loss(denoiser(x, sigma), tree.denoise(x, sigma), sigma).double().mean().item()


# ------------------------------------------------------------------------------------------------------------
# Own features: a small residual classifier for any resolution from 8 pixels; its features are the averages
# over positions of the last activations.

class Pixels(torch.nn.Module):
    """[N, C, H, W], uint8 or float latents -> float32 [N, 64 C], 8x8 area averages: crude, but no network."""

    def forward(self, x):
        x = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()
        return F.adaptive_avg_pool2d(x, 8).flatten(1)


def _conv(c_in, c_out):
    return torch.nn.Sequential(torch.nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
                               torch.nn.BatchNorm2d(c_out), torch.nn.ReLU())


class Residual(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = torch.nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, x):
        return x + self.body(x)


class Classifier(torch.nn.Module):
    """uint8 [N, 3, H, W] -> float32 features [N, 8 width]; `logits(images)` [N, classes] for training."""

    def __init__(self, classes, width=64):
        super().__init__()
        w, halve = width, torch.nn.MaxPool2d(2)
        self.body = torch.nn.Sequential(
            _conv(3, w), _conv(w, 2 * w), halve, Residual(2 * w),
            _conv(2 * w, 4 * w), halve, _conv(4 * w, 8 * w), halve, Residual(8 * w))
        self.head = torch.nn.Linear(8 * w, classes)

    def forward(self, images):
        x = (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        return self.body(x).float().mean((2, 3))

    def logits(self, images):
        return self.head(self(images))

    @staticmethod
    def load(path):
        """The classifier that `fit` wrote at `path`; model.CheckpointError for anything else."""
        checkpoint = model.read(path)
        try:
            assert checkpoint["kind"] == "classifier"
            with torch.device("meta"):  # shapes only: a hostile file allocates nothing
                net = Classifier(len(checkpoint["class_names"]), checkpoint["width"])
            net.load_state_dict(checkpoint["model"], assign=True)
            assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
        except Exception:  # whatever a foreign dictionary leads to
            raise model.CheckpointError(f"{path}: not a classifier; fit one with --fit CKPT DATA") from None
        return net.eval().requires_grad_(False)


def fit(path,             # file to write
        dataset,          # data.Dataset of labelled images
        epochs=None,      # passes over nine tenths of it, None = 15 on CUDA, 3 elsewhere
        width=None,       # channels of the first layer, None = 64 on CUDA, 8 elsewhere
        device="cpu",
        batch=None,       # images a step, None = 512 on CUDA, 128 elsewhere
        seed=0):
    """Train a Classifier, write it to `path` and return its accuracy on the held-out tenth.

    SGD with Nesterov momentum under a one-cycle learning rate: up for a quarter of the steps, then down to 0.
    """
    if dataset.kind != "image" or dataset.labels is None or len(dataset) < 20:
        raise data.DataError("--fit needs 20 or more labelled images: one folder per class, or labels")
    device = torch.device(device)
    defaults = (15, 64, 512) if device.type == "cuda" else (3, 8, 128)
    epochs, width, batch = (value or default for value, default in zip((epochs, width, batch), defaults))
    torch.manual_seed(seed)
    order = torch.randperm(len(dataset))
    held_out, index = order[:len(order) // 10], order[len(order) // 10:]
    batch = min(batch, len(index))
    per_epoch = len(index) // batch
    steps = epochs * per_epoch
    dataset, generator = dataset.to(device), torch.Generator(device).manual_seed(seed)
    net = Classifier(dataset.classes, width).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.4 * batch / 512, momentum=0.9, weight_decay=5e-4,
                                nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.25 * steps), (steps - step) / (0.75 * steps)))
    cast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    start = time.monotonic()

    def take(rows):
        rows = rows.to(dataset.x.device)
        return dataset.x[rows].to(device), dataset.labels[rows].to(device)
    for step in range(steps):
        at = step % per_epoch * batch
        index = index[torch.randperm(len(index))] if at == 0 else index
        images, labels = take(index[at:at + batch])
        with cast:
            logits = net.logits(_augment(images, generator))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % per_epoch == 0:
            accuracy = _accuracy(net, map(take, held_out.split(1000)), cast)
            data.progress(f"epoch {(step + 1) // per_epoch}/{epochs}  loss {loss.item():.3f}  "
                          f"held-out accuracy {accuracy:.4f}  {time.monotonic() - start:.0f} s",
                          step + 1 == steps)
    model.save(path, dict(
        kind="classifier", width=width, class_names=list(dataset.class_names), size=dataset.shape[-1],
        data_fingerprint=dataset.fingerprint, epochs=epochs, accuracy=accuracy,
        model={key: value.cpu() for key, value in net.state_dict().items()}))
    return accuracy


def _augment(images, generator, shift=4):
    """Move each image [N, C, H, W] by up to `shift` pixels (mirrored border), flip half of them; floats."""
    (n, c, h, w), device = images.shape, images.device
    padded = F.pad(images.float(), 4 * [shift], mode="reflect")
    y, x = torch.randint(2 * shift + 1, (2, n, 1), generator=generator, device=device)
    flip = torch.rand(n, 1, generator=generator, device=device) < 0.5
    column = torch.arange(w, device=device)
    rows = y + torch.arange(h, device=device)  # [n, h]
    columns = x + torch.where(flip, column.flip(0), column)  # [n, w]
    example, channel = torch.arange(n, device=device), torch.arange(c, device=device)
    return padded[example[:, None, None, None], channel[:, None, None], rows[:, None, :, None],
                  columns[:, None, None, :]]


@torch.no_grad()
def _accuracy(net, batches, cast):
    net.eval()
    with cast:
        right = torch.cat([net.logits(images).argmax(1) == labels for images, labels in batches])
    net.train()
    return right.double().mean().item()


# ------------------------------------------------------------------------------------------------------------
# Scoring image sets: one pass over the images gives the statistics for the distance and, of at most `keep`
# evenly spaced images, the features for precision and recall.

@dataclass
class Summary:
    features_id: str  # scores with different features are never compared
    n: int | None  # samples, None = unknown (a statistics file without a count)
    mu: torch.Tensor  # float64 [d]
    sigma: torch.Tensor  # float64 [d, d]
    features: torch.Tensor | None = None  # float32 [at most keep, d], None = statistics only

    def save(self, path):
        """Write an .npz of mu and sigma as pytorch-fid does, with features_id and n beside them."""
        n = -1 if self.n is None else self.n
        _write(path, lambda file: np.savez(file, mu=self.mu.numpy(), sigma=self.sigma.numpy(), n=n,
                                           features_id=self.features_id))

    @staticmethod
    def load(path):
        """Statistics that `save` or pytorch-fid wrote; data.DataError for anything else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                mu, sigma = (torch.from_numpy(file[key].astype(np.float64)) for key in ("mu", "sigma"))
                features_id = str(file["features_id"]) if "features_id" in file else "inception"
                n = int(file["n"]) if "n" in file else -1
        except Exception:  # numpy's and zipfile's readers raise many kinds for a damaged file
            raise data.DataError(f"{path}: damaged statistics file") from None
        if (mu.ndim != 1 or not len(mu) or sigma.shape != 2 * mu.shape
                or not (mu.sum() + sigma.sum()).isfinite()):
            raise data.DataError(f"{path}: mu must be [d] and sigma [d, d], all finite")
        return Summary(features_id, n if n >= 0 else None, mu, sigma)


class Scorer:
    """Scores images with one kind of features: "inception", "own:CKPT" (a file of fid.py --fit) or "pixels".

    `.id` says which features these are, `.name` what their Fréchet distance is called; only the one with
    Inception features is the FID. "pixels" also scores latents, as they are. Raises data.DataError and
    model.CheckpointError.
    """

    def __init__(self, features="inception", device="cpu", weights=None):
        make = {"inception": lambda _: Inception(find_inception_weights(weights)),
                "pixels": lambda _: Pixels(), "own": Classifier.load}
        kind, _, path = features.partition(":")
        if kind not in make or (kind == "own") != bool(path):
            raise data.DataError(f"features {features}: give --features inception, own:CKPT or pixels")
        self.net, self.device = make[kind](path).to(device), torch.device(device)
        self.id = features_id(features)
        self.name = distance_name(self.id)

    @torch.no_grad()
    def batches(self, images, batch=128, index=None, label=None):
        """Float32 features [at most batch, d] of images[index] (a data.Dataset or uint8 [N, 3, H, W])."""
        x = getattr(images, "x", images)
        if not isinstance(self.net, Pixels) and (x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3):
            raise data.DataError("only uint8 images with 3 channels are scored (decode latents first)")
        index = torch.arange(len(x)) if index is None else index
        for i in range(0, len(index), batch):
            yield self.net(x[index[i:i + batch].to(x.device)].to(self.device))
            if label:
                data.progress(f"{label}: {min(i + batch, len(index))}/{len(index)}", i + batch >= len(index))

    def features(self, images, batch=128, index=None, label=None):
        """Float32 features [N, d] on the CPU; a label shows progress on stderr, here and in `summary`."""
        return torch.cat([f.cpu() for f in self.batches(images, batch, index, label)])

    def summary(self, images, batch=128, index=None, keep=10000, label=None):
        """The Summary of images[index]; make that of the real images once and score against it."""
        n = len(images) if index is None else len(index)
        if n < 2:
            raise data.DataError(f"{label or 'images'}: only {n}, a distance needs at least 2 on each side")
        kept, stats, parts = torch.zeros(n, dtype=torch.bool), Stats(), []
        kept[evenly_spaced(n, keep)] = True
        for f in self.batches(images, batch, index, label):
            parts.append(f.cpu()[kept[stats.n:stats.n + len(f)]])
            stats.add(f)
        return Summary(self.id, n, *stats.mean_cov(), torch.cat(parts))

    def noise_floor(self, images, batch=128):
        """The metrics of the even against the odd images: what two sets of one distribution score."""
        index = torch.arange(len(images))
        return self.score(*(self.summary(images, batch, index[i::2]) for i in (0, 1)))

    def score(self, real, fake, batch=128):
        """{distance name, "precision", "recall"}; real and fake: Summary, data.Dataset or uint8 images."""
        real, fake = (s if isinstance(s, Summary) else self.summary(s, batch) for s in (real, fake))
        return score(real, fake, self.device)


def features_id(features):
    """What tells features apart, wherever their file lies: own:CKPT -> own:(first digits of its SHA-256)."""
    kind, _, path = features.partition(":")
    return f"own:{_sha256(path)[:12]}" if kind == "own" else features


def distance_name(features_id):
    return "FID" if features_id == "inception" else f"FD({features_id.partition(':')[0]})"


def cached_features(scorer, dataset):
    """Float32 features [N, d] of a data.Dataset, computed once and kept in the dataset cache's folder."""
    folder = os.environ.get("DATA_CACHE") or os.path.expanduser("~/.cache/data-curation")
    path = os.path.join(folder, f"features-{dataset.fingerprint[:32]}-{scorer.id.replace(':', '-')}.npy")
    try:
        features = np.load(path, allow_pickle=False)
        if len(features) == len(dataset) and features.dtype == np.float32 and features.ndim == 2:
            return torch.from_numpy(features)
    except (OSError, ValueError, EOFError):
        pass  # not there, or damaged: computed (again)
    features = scorer.features(dataset, label="features")
    os.makedirs(folder, exist_ok=True)
    _write(path, lambda file: np.save(file, features.numpy()))
    return features


def evenly_spaced(n, m):
    """At most m sorted indices below n."""
    return torch.arange(n) if m is None or m >= n else torch.arange(m) * n // m


def score(real, fake, device="cpu"):
    """The metrics by name of two Summaries; without precision and recall where one is statistics only."""
    if real.features_id != fake.features_id or real.mu.shape != fake.mu.shape:
        raise data.DataError(f"features differ: {real.features_id} [{len(real.mu)}] and "
                             f"{fake.features_id} [{len(fake.mu)}] cannot be compared")
    metrics = {distance_name(real.features_id): frechet_from_stats(real.mu, real.sigma, fake.mu, fake.sigma)}
    if real.features is not None and fake.features is not None:
        precision, recall = precision_recall(real.features.to(device), fake.features.to(device))
        metrics |= {"precision": precision, "recall": recall}
    return metrics


def score_line(real, fake, device="cpu"):
    """The metrics of two Summaries in one line; warns on stderr where few samples bias the distance."""
    (name, distance), *rest = score(real, fake, device).items()
    counts = []
    for side, n in ("real", real.n), ("fake", fake.n):
        counts.append(f"{n if n is not None else 'unknown number of'} {side}")
        if n is not None and n < BIASED_BELOW:
            print(f"warning: only {n} {side} images: below {BIASED_BELOW} the distance is biased upwards, "
                  "compare it only with figures from as many images", file=sys.stderr)
    digits = f"{distance:.4f}" if distance > 1 else f"{distance:.4g}"
    words = [f"{name} {digits}"] + [f"{key} {value:.2f}" for key, value in rest]
    return "  ".join(words + [f"({', '.join(counts)}, features {real.features_id})"])


def _write(path, write):
    """Call write(file) on a temporary file and rename it to `path`, so that nothing half-written stays."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise data.DataError(f"cannot write {path}: {error.strerror or error}") from None


# ------------------------------------------------------------------------------------------------------------
# Comparing runs: an arm is a set of runs that differ in nothing but the seed. A run's curve is one metric of
# its evaluations over examples or seconds, linear in between, never beyond its ends.

COMPARABLE = ("data_fingerprint", "kind", "size", "shape", "channels", "features_id", "eval_samples",
              "sampling_steps")  # configuration that must agree between all runs
SEED_SUFFIX = re.compile(r"-(s|seed)\d+(?=/|$)")
AXES = {"examples": ("examples trained", lambda r: r["examples_trained"]),
        "seconds": ("seconds of training", lambda r: r["seconds"] + r.get("reference_seconds", 0))}
NOT_METRICS = {"kind", "step", "seconds", "select_seconds", "reference_seconds", "eval_seconds",
               "examples_trained", "examples_seen", "guidance"}


@dataclass
class Run:
    path: str
    config: dict
    records: dict  # guided (bool) -> its evaluations by rising step

    @staticmethod
    def load(path):
        """The run folder at `path`; data.DataError where it has no configuration or no evaluations."""
        try:
            with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
                config = json.load(file)
            with open(os.path.join(path, "log.jsonl"), encoding="utf-8") as file:
                lines = [json.loads(line) for line in file if line.endswith("\n")]  # not a torn last line
            records = {False: {}, True: {}}
            for r in lines:
                if r["kind"] == "eval":
                    records[r["guidance"] != 1][r["step"]] = r
                    [float(value) for key, value in r.items() if key != "kind"]
            for by_step in records.values():
                points = [(step, r["select_seconds"], *(place(r) for _, place in AXES.values()))
                          for step, r in sorted(by_step.items())]
                if not (np.diff(np.array(points).reshape(-1, 4), axis=0) >= 0).all():
                    raise ValueError
        except OSError as error:
            raise data.DataError(f"{error.filename}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise data.DataError(f"{path}: damaged config.json or log.jsonl") from None
        records = {guided: [by_step[step] for step in sorted(by_step)]
                   for guided, by_step in records.items() if by_step}
        if not records:
            raise data.DataError(f"{path}: no evaluations in log.jsonl (train.py --eval-every)")
        if len({r["guidance"] for r in records.get(True, [])}) > 1:
            raise data.DataError(f"{path}: evaluated with several guidance weights, --compare takes one")
        return Run(path, config, records)

    def curve(self, guided, axis, metric):
        """Arrays x [n] and y [n]: the evaluations that have the metric; n = 0 where there are none."""
        points = [(AXES[axis][1](r), r[metric]) for r in self.records.get(guided, []) if metric in r]
        return np.array(points, dtype=np.float64).reshape(-1, 2).T

    def has(self, guided, axis, metric):
        return self.curve(guided, axis, metric).size > 0

    def at(self, guided, axis, metric, x):
        xs, ys = self.curve(guided, axis, metric)
        assert xs[0] <= np.min(x) and np.max(x) <= xs[-1], "extrapolation"
        return np.interp(x, xs, ys)


def group_runs(paths):
    """{arm name: [Run]} of run folders; data.DataError where runs cannot be compared with the first one."""
    runs = [Run.load(path) for path in dict.fromkeys(map(os.path.normpath, paths))]
    by_config, arms = {}, {}
    for run in runs:
        for key in COMPARABLE:
            first, here = runs[0].config.get(key), run.config.get(key)
            if first != here:
                raise data.DataError(f"{run.path} and {runs[0].path} cannot be compared: {key} is {here} "
                                     f"and {first}")
        same = {key: SEED_SUFFIX.sub("", value) if isinstance(value, str) else value  # also in a guide's path
                for key, value in run.config.items() if key not in ("seed", "out")}
        by_config.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    for arm in by_config.values():
        name = SEED_SUFFIX.sub("", os.path.basename(os.path.abspath(arm[0].path)))
        while name in arms:
            name += "'"  # another configuration under the same name
        arms[name] = arm
    return arms


def comparison_table(arms, axis, metrics):
    """Markdown: one row per arm at the largest `axis` that all curves reach, mean ± std over its runs."""
    runs = [run for arm in arms.values() for run in arm]
    curves = [(key, xs) for key in itertools.product(metrics, (False, True)) for run in runs
              for xs, _ in [run.curve(key[1], axis, key[0])] if len(xs)]
    low, x = max(xs[0] for _, xs in curves), min(xs[-1] for _, xs in curves)
    if x < low:
        raise data.DataError(f"the runs have no {AXES[axis][0]} in common: train longer, or evaluate earlier")
    columns = list(dict.fromkeys(key for key, _ in curves))
    head = [metric + (", guided" if guided else "") for metric, guided in columns]
    rows = [["arm", "runs", *head, "selection", "ms/step"], ["---"] + ["---:"] * (len(head) + 3)]
    for name, arm in arms.items():
        cells = [_mean_std([run.at(guided, axis, metric, x) for run in arm if run.has(guided, axis, metric)])
                 for metric, guided in columns]
        seconds, selecting, steps = (np.array([run.at(min(run.records), axis, key, x) for run in arm])
                                     for key in ("seconds", "select_seconds", "step"))
        share = np.mean(selecting / np.maximum(seconds, 1e-9))
        speed = 1000 * np.mean(seconds / np.maximum(steps, 1))
        rows.append([name, str(len(arm)), *cells, f"{100 * share:.0f}%", f"{speed:.3g}"])
    note = "" if axis == "examples" else " (guide and reference training counted, evaluation not)"
    return "\n".join([f"At {f'{x:,.1f}'.removesuffix('.0')} {AXES[axis][0]}{note}, mean ± std over runs:", ""]
                     + [f"| {' | '.join(row)} |" for row in rows])


def _mean_std(values):
    if not values:
        return ""
    digits = int(np.clip(2 - np.floor(np.log10(max(abs(np.mean(values)), 1e-9))), 2, 6))
    std = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{std}"


def compare(paths, out="compare.png", metric=None):
    """Compare run folders: returns both tables as Markdown and draws `metric` (None = the first) to `out`."""
    arms = group_runs(paths)
    records = [r for arm in arms.values() for run in arm for records in run.records.values() for r in records]
    metrics = list(dict.fromkeys(key for r in records for key in r if key not in NOT_METRICS))
    if not metrics or metric and metric not in metrics:
        raise data.DataError(f"--metric {metric}: the runs have {', '.join(metrics) or 'no metrics'}")
    metric = metric or metrics[0]
    tables = "\n\n".join(comparison_table(arms, axis, metrics) for axis in AXES) + _floor_line(arms)
    line_chart([{"title": f"{metric} against {AXES[axis][0]}", "x": AXES[axis][0],
                 "lines": _arm_lines(arms, axis, metric)} for axis in ("seconds", "examples")], out)
    return tables


def _floor_line(arms):
    """What half of the data scores against the other half, from the first run that has it."""
    for run in (run for arm in arms.values() for run in arm):
        try:
            with open(os.path.join(run.path, "noise_floor.json"), encoding="utf-8") as file:
                words = ", ".join(f"{name} {float(value):.4g}" for name, value in json.load(file).items())
                return f"\n\nNoise floor, half of the data against the other half: {words}"
        except (OSError, ValueError, AttributeError, TypeError):
            continue
    return ""


def _arm_lines(arms, axis, metric):
    """Lines for line_chart: each arm's mean and standard deviation over its runs, on their common range."""
    lines = []
    for color, (name, arm) in enumerate(arms.items()):
        curves = {guided: [run for run in arm if run.has(guided, axis, metric)] for guided in (True, False)}
        for guided, runs in curves.items():
            if not runs:
                continue
            ends = np.array([run.curve(guided, axis, metric)[0][[0, -1]] for run in runs])  # [runs, 2]
            x = np.linspace(ends[:, 0].max(), ends[:, 1].min(), 200)
            y = np.stack([run.at(guided, axis, metric, x) for run in runs])  # [runs, 200]
            suffix = ", guided" if guided else ", unguided" if curves[True] else ""
            lines.append({"name": name + suffix, "x": x, "y": y.mean(0), "color": color,
                          "std": y.std(0, ddof=1) if len(runs) > 1 else None,
                          "thin": bool(curves[True]) and not guided})
    return lines


# ------------------------------------------------------------------------------------------------------------
# A line chart drawn with Pillow at twice its size, then reduced for smooth lines.

COLORS = ["#1f5fa8", "#d1495b", "#2e8b57", "#e08e1b", "#7b4ea3", "#159aa8", "#8c5a3c", "#d35fa5", "#555555",
          "#9aa51f"]


def line_chart(panels, path, width=1240, height=420):
    """Write panels side by side to a PNG, and below them the first panel's lines by name with final values.

    panels: dicts of "title", "x" (the axis' name) and "lines": dicts of "name", "x" [n], "y" [n], optionally
    "std" [n] (a band around y), "color" (index into COLORS), "thin" (thin and dashed).
    """
    panels = [{**panel, "lines": [{"color": i, "std": None, "thin": False, **line}
                                  for i, line in enumerate(panel["lines"])]} for panel in panels]
    legend, columns = panels[0]["lines"], 3
    rows = -(-len(legend) // columns)
    image = Image.new("RGB", (2 * width, 2 * (height + 22 * rows + 14)), "white")
    for i, panel in enumerate(panels):
        left, right = i * width // len(panels), (i + 1) * width // len(panels)
        _draw_panel(image, panel, (2 * left + 132, 68, 2 * right - 44, 2 * height - 96))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(26)
    for i, line in enumerate(legend):
        x, y = 132 + i // rows * 2 * (width - 66) // columns, 2 * (height + 6 + 22 * (i % rows))
        _draw_line(draw, [(x, y + 16), (x + 56, y + 16)], line)
        draw.text((x + 70, y), f"{line['name']}  {_number(line['y'][-1])}", "black", font)
    small = image.resize((image.width // 2, image.height // 2), Image.LANCZOS)
    _write(path, lambda file: small.save(file, "PNG"))


def _draw_panel(image, panel, box):
    """Axes, ticks, bands and lines of one panel; its axes span box = (left, top, right, bottom) in pixels."""
    left, top, right, bottom = box
    lines, draw, font = panel["lines"], ImageDraw.Draw(image), ImageFont.load_default(24)
    xs = np.concatenate([line["x"] for line in lines])
    ys = np.concatenate([line["y"] + sign * (0 if line["std"] is None else line["std"])
                         for line in lines for sign in (-1, 1)])
    x_ticks, y_ticks = _ticks(xs.min(), xs.max()), _ticks(ys.min(), ys.max())
    x0, x1 = min(xs.min(), x_ticks[0]), max(xs.max(), x_ticks[-1])
    y0, y1 = min(ys.min(), y_ticks[0]), max(ys.max(), y_ticks[-1])

    def place(x, y):
        return list(zip(left + (np.asarray(x) - x0) / (x1 - x0) * (right - left),
                        bottom - (np.asarray(y) - y0) / (y1 - y0) * (bottom - top)))
    for tick in x_ticks:
        x = place([tick], [y0])[0][0]
        draw.line([(x, top), (x, bottom)], "#e8e8e8", 2)
        draw.text((x, bottom + 10), _number(tick), "black", font, anchor="ma")
    for tick in y_ticks:
        y = place([x0], [tick])[0][1]
        draw.line([(left, y), (right, y)], "#e8e8e8", 2)
        draw.text((left - 12, y), _number(tick), "black", font, anchor="rm")
    for line in lines:
        if line["std"] is not None:  # a translucent band is pasted through a mask
            mask = Image.new("L", image.size)
            edge = place(line["x"], line["y"] + line["std"]) + place(line["x"], line["y"] - line["std"])[::-1]
            ImageDraw.Draw(mask).polygon(edge, fill=24 if line["thin"] else 48)
            image.paste(COLORS[line["color"] % len(COLORS)], (0, 0, *image.size), mask)
    draw.line([(left, top), (left, bottom), (right, bottom)], "#444444", 3)
    for line in sorted(lines, key=lambda line: not line["thin"]):
        _draw_line(draw, place(line["x"], line["y"]), line)
    middle = (left + right) / 2
    draw.text((middle, top - 50), panel["title"], "black", ImageFont.load_default(28), anchor="ma")
    draw.text((middle, bottom + 48), panel["x"], "black", font, anchor="ma")


def _draw_line(draw, points, line):
    color, points = COLORS[line["color"] % len(COLORS)], np.array(points, dtype=np.float64)  # [n, 2]
    if not line["thin"]:
        return draw.line([tuple(p) for p in points], color, 6, joint="curve")
    length = np.concatenate([[0], np.hypot(*np.diff(points, axis=0).T).cumsum()])
    for start in np.arange(0, length[-1], 22):  # dashes of 14 pixels, gaps of 8
        at = np.linspace(start, min(start + 14, length[-1]), 8)
        dash = zip(np.interp(at, length, points[:, 0]), np.interp(at, length, points[:, 1]))
        draw.line(list(dash), color, 3)


def _ticks(low, high, count=6):
    """About `count` multiples of 1, 2 or 5 times a power of ten, from at most low up to at most high."""
    if high - low < 1e-9 * max(abs(high), 1e-9):
        high = low + (abs(low) or 1)
    rough = (high - low) / count
    power = 10.0 ** np.floor(np.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    return np.arange(np.floor(low / step + 1e-9), np.floor(high / step + 1e-9) + 1) * step


def _number(value):
    """A short label: 0.931, 12.3, 4,500, 60k, 16.5M."""
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:.4g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# ------------------------------------------------------------------------------------------------------------
# Command line.

def build_parser():
    parser = argparse.ArgumentParser(
        description="Score two image sets, compare training runs, or fit a feature network.",
        epilog="REAL, FAKE, DATA: a folder or zip of images, any dataset that data.py reads, an .npz of "
               "images; REAL and FAKE also an .npz of statistics (mu, sigma).", allow_abbrev=False)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="REAL FAKE, or DATA for flags that take one")
    g = parser.add_argument_group("features")
    g.add_argument("--features", default="inception", help="inception (default), own:CKPT or pixels")
    g.add_argument("--inception-weights", metavar="FILE", help="FID weights (default: the file "
                   "$FID_INCEPTION_WEIGHTS, else the one in torch's hub cache, else a download)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda or mps (default %(default)s)")
    g.add_argument("--batch", type=int, default=128, help="images a pass (default %(default)s)")
    g.add_argument("--size", type=int, help="center-crop and resize to this many pixels (default: as is)")
    g.add_argument("--num", type=int, help="evenly spaced images to use of each set (default: all)")
    g = parser.add_argument_group("output")
    g.add_argument("--save-stats", metavar="FILE.npz", help="write the statistics of the first set")
    g.add_argument("--save-features", metavar="FILE.npy", help="write DATA's features [N, d], for data.py")
    g.add_argument("--noise-floor", action="store_true", help="score the even against the odd images of DATA")
    g = parser.add_argument_group("own features")
    g.add_argument("--fit", metavar="CKPT", help="fit a small classifier to nine tenths of labelled DATA")
    g.add_argument("--epochs", type=int, help="passes over DATA (default 15 on CUDA, else 3)")
    g.add_argument("--width", type=int, help="channels of the first layer, an eighth of the number of "
                   "features (default 64 on CUDA, else 8)")
    g = parser.add_argument_group("comparison")
    g.add_argument("--compare", nargs="+", metavar="RUN", help="run folders; seeds of one arm are averaged")
    g.add_argument("--metric", help="metric to draw (default: the first in the log)")
    g.add_argument("--out", default="compare.png", metavar="FILE", help="the chart (default %(default)s)")
    return parser


def check(args):
    """Raise data.DataError for flags that do not fit together, before anything is read."""
    for flag, least in ("batch", 1), ("epochs", 1), ("width", 1), ("num", 2), ("size", 8):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise data.DataError(f"--{flag} {value}: give at least {least}")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError):
        raise data.DataError(f"--device {args.device}: not available here, use --device cpu") from None
    for flag in "save_stats", "save_features", "fit", "out":
        folder = os.path.dirname(getattr(args, flag) or "") or "."
        if not os.path.isdir(folder):
            raise data.DataError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: no folder {folder}")
    one = [flag for flag in ("fit", "noise-floor", "save-features", "compare")
           if getattr(args, flag.replace("-", "_"))]
    if len(one) > 1:
        raise data.DataError(f"--{one[0]} and --{one[1]} are separate commands")
    wanted = [0] if args.compare else [1] if one else [1, 2] if args.save_stats else [2]
    if one and one[0] != "fit" and any(map(is_statistics, args.paths)):
        raise data.DataError(f"{args.paths[0]}: statistics, but --{one[0]} needs images")
    if len(args.paths) not in wanted:
        raise data.DataError(f"{len(args.paths)} paths given: two (REAL FAKE) are scored, one (DATA) goes "
                             "with --fit, --noise-floor, --save-stats, --save-features, none with --compare")


def is_statistics(path):
    """Whether `path` is an .npz with mu and sigma."""
    if not (path.endswith(".npz") and zipfile.is_zipfile(path)):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"mu.npy", "sigma.npy"} <= set(archive.namelist())


def run(args):
    """Carry out the command. The feature network is loaded only when there are images to score."""
    if args.compare:
        return print(compare(args.compare, args.out, args.metric))
    if args.fit:
        dataset = data.load(args.paths[0], size=args.size)
        accuracy = fit(args.fit, dataset, args.epochs, args.width, args.device)
        return print(f"{args.fit}: held-out accuracy {accuracy:.4f}, use it with --features own:{args.fit}")
    summaries = {path: Summary.load(path) for path in args.paths if is_statistics(path)}
    datasets = {path: data.load(path, size=args.size) for path in args.paths if path not in summaries}
    scorer = Scorer(args.features, args.device, args.inception_weights) if datasets else None
    for path, stored in summaries.items() if scorer else ():
        if stored.features_id != scorer.id:
            raise data.DataError(f"{path}: statistics of {stored.features_id}, --features gives {scorer.id}")
    index = {path: evenly_spaced(len(dataset), args.num) for path, dataset in datasets.items()}
    if args.save_features:
        (path, dataset), = datasets.items()
        features = scorer.features(dataset, args.batch, index[path], path).numpy()
        return _write(args.save_features, lambda file: np.save(file, features))
    if args.noise_floor:
        (path, dataset), = datasets.items()
        halves = [scorer.summary(dataset, args.batch, index[path][i::2], label=path) for i in (0, 1)]
        return print("noise floor: " + score_line(*halves, args.device))
    for path, dataset in datasets.items():
        summaries[path] = scorer.summary(dataset, args.batch, index[path], label=path)
    if args.save_stats:
        summaries[args.paths[0]].save(args.save_stats)
    if len(args.paths) == 2:
        print(score_line(*(summaries[path] for path in args.paths), args.device))


def main(argv=None):
    """The command line -> exit status: 0, or 2 after one line on stderr."""
    try:
        args = build_parser().parse_args(argv)
        check(args)
        run(args)
    except (data.DataError, model.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
