"""Scores of samples: feature networks, Fréchet distance, precision and recall, 2-D metrics; comparison of runs.

Fréchet Inception distance: "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium"
(arXiv 1706.08500). Precision and recall: "Improved Precision and Recall Metric for Assessing Generative Models"
(arXiv 1904.06991). Images are always scored as uint8. Score two image sets, or compare training runs:

    python fid.py REAL FAKE --features inception
    python fid.py --compare runs/uniform-s0 runs/uniform-s1 runs/ajest-s0 runs/ajest-s1
"""
import argparse
import hashlib
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
# The FID Inception network (TensorFlow's graph of 2015-12-05). A block is a list of lines of convolutions "name
# channels kernel". A line starts at the block's input x, at its pooled input, or at an earlier convolution; the
# ends of all lines are concatenated. "3s2" is a 3x3 kernel with stride 2 and no padding, the others keep the size.

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
    ("Mixed_6b", MIXED_C, 128, "mean"), ("Mixed_6c", MIXED_C, 160, "mean"), ("Mixed_6d", MIXED_C, 160, "mean"),
    ("Mixed_6e", MIXED_C, 192, "mean"),
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
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


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

    S1 S2 has the eigenvalues of the symmetric R^T S2 R for any R with R R^T = S1, so no general matrix square root
    is needed: R is the Cholesky factor of S1, or comes from its eigenvectors where S1 has not full rank.
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

    With fewer samples than dimensions, tr sqrt(S1 S2) is the sum of the singular values of A B^T, A and B being
    the centred features over sqrt(n - 1): exact at any rank and cheaper.
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
    """{"hit", "coverage"} of points [n, 2], and "l2" when the exact end points [n, 2] are given."""
    is_hit = tree.logp(points, 0) >= HIT_LOGP
    metrics = {"hit": is_hit.double().mean().item(), "coverage": coverage(points, tree, is_hit=is_hit)}
    return metrics if endpoints is None else metrics | {"l2": l2(points, endpoints)}


@torch.no_grad()
def score_error(denoiser, tree, n=16384, seed=0, P_mean=-2.3, P_std=1.5):
    """Excess loss over the exact denoiser's: the mean over n draws of (x0, sigma, eps) of lambda(sigma) times the
    mean over dimensions of (D - D_exact)^2. 0 = exact. Runs on the tree's device."""
    generator = data.stream(seed, 0, "score_error", tree.device)
    x0 = tree.sample(n, generator=generator)  # [n, 2]
    sigma = (P_mean + P_std * torch.randn(n, generator=generator, device=x0.device)).exp()
    x = x0 + sigma[:, None] * torch.randn(n, 2, generator=generator, device=x0.device)
    return model.per_example_loss(denoiser(x, sigma), tree.denoise(x, sigma), sigma).double().mean().item()


# ------------------------------------------------------------------------------------------------------------
# Own features: a small residual classifier for any resolution from 8 pixels; its features are the averages over
# positions of the last activations.

class Pixels(torch.nn.Module):
    """uint8 [N, 3, H, W] -> float32 [N, 192], 8x8 area averages: crude features that need no network."""

    def forward(self, images):
        return F.adaptive_avg_pool2d(images.float() / 127.5 - 1, 8).flatten(1)


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
        except Exception:  # whatever a foreign dictionary leads to
            raise model.CheckpointError(f"{path}: not a classifier; fit one with fid.py --fit CKPT DATA") from None
        return net.eval().requires_grad_(False)


def fit(path,             # file to write
        dataset,          # data.Dataset of labelled images
        epochs=15,        # passes over nine tenths of it
        width=64,         # channels of the first layer
        device="cpu",
        batch=None,       # images a step, None = 512 on CUDA, 128 elsewhere
        seed=0):
    """Train a Classifier, write it to `path` and return its accuracy on the held-out tenth.

    SGD with Nesterov momentum under a one-cycle learning rate: up for a quarter of the steps, then down to zero.
    """
    if dataset.kind != "image" or dataset.labels is None or len(dataset) < 20:
        raise data.DataError("--fit needs at least 20 labelled images: a folder per class, or an .npz with labels")
    device = torch.device(device)
    torch.manual_seed(seed)
    order = torch.randperm(len(dataset))
    held_out, index = order[:len(order) // 10], order[len(order) // 10:]
    batch = min(batch or (512 if device.type == "cuda" else 128), len(index))
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
            _progress(f"epoch {(step + 1) // per_epoch}/{epochs}  loss {loss.item():.3f}  held-out accuracy "
                      f"{accuracy:.4f}  {time.monotonic() - start:.0f} s", step + 1 == steps)
    model.save(path, dict(
        kind="classifier", width=width, class_names=list(dataset.class_names), size=dataset.shape[-1], epochs=epochs,
        data_fingerprint=dataset.fingerprint, accuracy=accuracy,
        model={key: value.cpu() for key, value in net.state_dict().items()}))
    return accuracy


def _augment(images, generator, shift=4):
    """Move every image [N, C, H, W] by up to `shift` pixels (mirrored border), flip half of them: one gather."""
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
        """Write the statistics as pytorch-fid does (.npz with mu and sigma), with features_id and n beside them."""
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
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not torch.cat([mu, sigma.flatten()]).isfinite().all():
            raise data.DataError(f"{path}: mu must be [d] and sigma [d, d], all finite")
        return Summary(features_id, n if n >= 0 else None, mu, sigma)


class Scorer:
    """Scores images with one kind of features: "inception", "own:CKPT" (a file of fid.py --fit) or "pixels".

    `.id` says which features these are, `.name` what their Fréchet distance is called; only the one with Inception
    features is the FID. Raises data.DataError and model.CheckpointError.
    """

    def __init__(self, features="inception", device="cpu", weights=None):
        kind, _, path = features.partition(":")
        if features == "inception":
            self.id, net = features, Inception(find_inception_weights(weights))
        elif features == "pixels":
            self.id, net = features, Pixels()
        elif kind == "own" and path:
            net = Classifier.load(path)
            self.id = f"own:{_sha256(path)[:12]}"
        else:
            raise data.DataError(f"--features {features}: give inception, own:CKPT or pixels")
        self.name, self.net, self.device = distance_name(self.id), net.to(device), torch.device(device)

    @torch.no_grad()
    def batches(self, images, batch=128, index=None, label="features"):
        """Float32 features [at most batch, d] on the device, of images[index] (data.Dataset or uint8 [N, 3, H, W])."""
        x = getattr(images, "x", images)
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
            raise data.DataError("only uint8 images with 3 channels are scored (decode latents first)")
        index = torch.arange(len(x)) if index is None else index
        for i in range(0, len(index), batch):
            yield self.net(x[index[i:i + batch].to(x.device)].to(self.device))
            _progress(f"{label}: {min(i + batch, len(index))}/{len(index)}", i + batch >= len(index))

    def features(self, images, batch=128, index=None, label="features"):
        """Float32 features [N, d] on the CPU."""
        return torch.cat([f.cpu() for f in self.batches(images, batch, index, label)])

    def summary(self, images, batch=128, index=None, keep=10000, label="features"):
        """The Summary of images[index]; make that of the real images once and score against it."""
        n = len(images) if index is None else len(index)
        if n < 2:
            raise data.DataError(f"{label}: {n} images, a Fréchet distance needs at least 2")
        kept, stats, parts = torch.zeros(n, dtype=torch.bool), Stats(), []
        kept[evenly_spaced(n, keep)] = True
        for f in self.batches(images, batch, index, label):
            parts.append(f.cpu()[kept[stats.n:stats.n + len(f)]])
            stats.add(f)
        return Summary(self.id, n, *stats.mean_cov(), torch.cat(parts))

    def score(self, real, fake, batch=128):
        """{"FID", "FD(own)" or "FD(pixels)", "precision", "recall"} of Summaries, data.Datasets or uint8 images."""
        real, fake = (s if isinstance(s, Summary) else self.summary(s, batch) for s in (real, fake))
        return score(real, fake, self.device)


def distance_name(features_id):
    return "FID" if features_id == "inception" else f"FD({features_id.partition(':')[0]})"


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
            print(f"warning: only {n} {side} images: below {BIASED_BELOW} the distance is biased upwards, compare it "
                  "only with figures from as many images", file=sys.stderr)
    words = [f"{name} {distance:.4f}"] + [f"{key} {value:.2f}" for key, value in rest]
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


def _progress(text, last):
    print(f"\r{text}", end="\n" if last else "", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------
# Comparing runs: an arm is a set of runs that differ in nothing but the seed.

COMPARABLE = ("data_fingerprint", "kind", "features_id", "size", "channels")  # must agree between all runs
SEED_SUFFIX = re.compile(r"-(s|seed)\d+(?=/|$)")
AXES = {"examples": ("examples trained", lambda r: r["examples_trained"]),
        "seconds": ("seconds of training", lambda r: r["seconds"] + r.get("reference_seconds", 0))}
NOT_METRICS = {"kind", "step", "seconds", "select_seconds", "reference_seconds", "eval_seconds", "examples_trained",
               "examples_seen", "guidance"}


@dataclass
class Run:
    path: str
    config: dict
    records: dict  # {guided: eval records by step}

    @staticmethod
    def load(path):
        """The run folder at `path`; data.DataError where it has no configuration or no evaluations."""
        try:
            with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
                config = json.load(file)
            with open(os.path.join(path, "log.jsonl"), encoding="utf-8") as file:
                lines = [line for line in file if line.endswith("\n")]  # a torn last line is not counted
            records = [record for record in map(json.loads, lines) if record["kind"] == "eval"]
            weights = sorted({record["guidance"] for record in records} - {1})
            if len(weights) > 1:
                raise data.DataError(f"{path}: evaluated with several guidance weights {weights}, compare takes one")
            by_step = {guided: {r["step"]: r for r in sorted(records, key=lambda r: r["step"])
                                if (r["guidance"] != 1) == guided} for guided in (False, True)}
        except OSError as error:
            raise data.DataError(f"{error.filename}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, data.DataError):
                raise
            raise data.DataError(f"{path}: damaged config.json or log.jsonl") from None
        if not records:
            raise data.DataError(f"{path}: no evaluations in log.jsonl (train.py --eval-every)")
        return Run(path, config, {guided: list(steps.values()) for guided, steps in by_step.items() if steps})

    def curve(self, guided, axis, value):
        """(x, y) arrays of the evaluations that have the metric, or of the function, `value`."""
        value = value if callable(value) else (lambda r, key=value: r.get(key))
        points = [(AXES[axis][1](r), value(r)) for r in self.records.get(guided, []) if value(r) is not None]
        return np.array(points, dtype=np.float64).reshape(-1, 2).T

    def at(self, guided, axis, value, x):
        """The curve's linear interpolation at x, never beyond its ends."""
        xs, ys = self.curve(guided, axis, value)
        assert xs[0] <= np.min(x) and np.max(x) <= xs[-1]
        return np.interp(x, xs, ys)


def group(paths):
    """{arm name: [Run]} of run folders; data.DataError where runs cannot be compared with the first one."""
    runs, arms, names = [Run.load(path) for path in dict.fromkeys(map(os.path.normpath, paths))], {}, {}
    for run in runs:
        for key in COMPARABLE:
            a, b = runs[0].config.get(key), run.config.get(key)
            if a != b:
                raise data.DataError(f"{run.path}: {key} is {b}, but {a} in {runs[0].path}: not comparable")
        same = {key: SEED_SUFFIX.sub("", v) if isinstance(v, str) else v for key, v in run.config.items()
                if key not in ("seed", "out")}
        arms.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    for runs in arms.values():
        name = SEED_SUFFIX.sub("", os.path.basename(os.path.abspath(runs[0].path)))
        while name in names:
            name += "'"  # another configuration under the same name
        names[name] = runs
    return names


def common_range(runs, axis, metrics):
    """The interval of `axis` that all curves of these runs cover."""
    ends = [(xs[0], xs[-1]) for run in runs for guided in run.records for metric in metrics
            for xs, _ in [run.curve(guided, axis, metric)] if len(xs)]
    low, high = max(first for first, _ in ends), min(last for _, last in ends)
    if high < low:
        raise data.DataError(f"the runs' evaluations have no {AXES[axis][0]} in common: train the shortest run longer")
    return low, high


def comparison_table(arms, axis, metrics):
    """Markdown: one row per arm at the largest common point of `axis`, mean ± std over its runs."""
    runs = [run for arm in arms.values() for run in arm]
    x = common_range(runs, axis, metrics)[1]
    columns = [(metric, guided) for metric in metrics for guided in (False, True)
               if any(len(run.curve(guided, axis, metric)[0]) for run in runs)]
    head = ["arm", "runs"] + [metric + (", guided" if guided else "") for metric, guided in columns]
    rows = [head + ["selection", "ms/step"], ["---"] + ["---:"] * (len(head) + 1)]
    for name, arm in arms.items():
        row = [name, str(len(arm))]
        for metric, guided in columns:
            have = [run for run in arm if len(run.curve(guided, axis, metric)[0])]
            row.append(_mean_std([run.at(guided, axis, metric, x) for run in have]) if have else "")
        seconds, selecting, steps = (np.array([run.at(min(run.records), axis, lambda r, key=key: r[key], x)
                                               for run in arm]) for key in ("seconds", "select_seconds", "step"))
        row.append(f"{100 * np.mean(selecting / np.maximum(seconds, 1e-9)):.0f}%")
        rows.append(row + [f"{1000 * np.mean(seconds / np.maximum(steps, 1)):.3g}"])
    note = "" if axis == "examples" else " (guide and reference training counted, evaluation not)"
    return "\n".join([f"At {round(x, 1):,g} {AXES[axis][0]}{note}, mean ± std over runs:", ""]
                     + [f"| {' | '.join(row)} |" for row in rows])


def _mean_std(values):
    mean, std = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else None
    digits = 3 if abs(mean) < 10 else 2
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def compare(paths, out="compare.png", metric=None):
    """Compare run folders: returns the two tables as Markdown and draws `metric` (None = the first) to `out`."""
    arms = group(paths)
    runs = [run for arm in arms.values() for run in arm]
    metrics = [key for key in dict.fromkeys(key for run in runs for records in run.records.values()
                                            for r in records for key in r) if key not in NOT_METRICS]
    metric = metric or next(iter(metrics), None)
    if metric not in metrics:
        raise data.DataError(f"--metric {metric}: the runs have {', '.join(metrics) or 'no metrics'}")
    tables = "\n\n".join(comparison_table(arms, axis, metrics) for axis in AXES)
    panels = [{"title": f"{metric} against {AXES[axis][0]}", "x": AXES[axis][0], "y": metric,
               "lines": _arm_lines(arms, axis, metric)} for axis in ("seconds", "examples")]
    line_chart(panels, out)
    return tables


def _arm_lines(arms, axis, metric):
    """The chart's lines: each arm's mean over its runs, with a band of one standard deviation."""
    lines = []
    for color, (name, arm) in enumerate(arms.items()):
        guided_too = any(len(run.curve(True, axis, metric)[0]) for run in arm)
        for guided in (True, False) if guided_too else (False,):
            have = [run for run in arm if len(run.curve(guided, axis, metric)[0])]
            if not have:
                continue
            ends = [run.curve(guided, axis, metric)[0][[0, -1]] for run in have]
            x = np.linspace(max(e[0] for e in ends), min(e[1] for e in ends), 200)
            y = np.stack([run.at(guided, axis, metric, x) for run in have])  # [runs, 200]
            lines.append({"name": name + (", guided" if guided else ", unguided" if guided_too else ""), "x": x,
                          "y": y.mean(0), "std": y.std(0, ddof=1) if len(have) > 1 else None, "color": color,
                          "thin": guided_too and not guided})
    return lines


# ------------------------------------------------------------------------------------------------------------
# A line chart drawn with Pillow at twice its size, then reduced for smooth lines.

COLORS = ["#1f5fa8", "#d1495b", "#2e8b57", "#e08e1b", "#7b4ea3", "#159aa8", "#8c5a3c", "#d35fa5", "#555555", "#9aa51f"]


def line_chart(panels, path, width=1240, height=420):
    """Draw panels side by side and a legend with final values below them.

    panels: dicts of "title", "x", "y" (axis names) and "lines": dicts of "name", "x", "y" (arrays), and optionally
    "std" (band around y), "color" (index into COLORS), "thin" (thin and dashed). The legend lists the first panel's.
    """
    legend, columns = panels[0]["lines"], 3
    for panel in panels:
        for i, line in enumerate(panel["lines"]):
            line.setdefault("color", i)
    rows = -(-len(legend) // columns)
    image = Image.new("RGB", (2 * width, 2 * (height + 22 * rows + 14)), "white")
    for i, panel in enumerate(panels):
        left = i * width // len(panels)
        _draw_panel(image, panel, 2 * np.array([left + 66, 34, left + width // len(panels) - 22, height - 48]))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(26)
    for i, line in enumerate(legend):
        x, y = 2 * (66 + i // rows * (width - 66) // columns), 2 * (height + 6 + 22 * (i % rows))
        _draw_line(draw, [(x, y + 16), (x + 56, y + 16)], line)
        draw.text((x + 70, y), f"{line['name']}  {_number(line['y'][-1])}", "black", font)
    buffer = image.resize((image.width // 2, image.height // 2), Image.LANCZOS)
    _write(path, lambda file: buffer.save(file, "PNG"))


def _draw_panel(image, panel, box):
    """Axes, ticks, bands and lines of one panel within box = (left, top, right, bottom) of the doubled picture."""
    left, top, right, bottom = (int(v) for v in box)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(24)
    std = [np.zeros(1) if line.get("std") is None else line["std"] for line in panel["lines"]]
    xs = np.concatenate([line["x"] for line in panel["lines"]])
    ys = np.concatenate([np.concatenate([line["y"] - s, line["y"] + s]) for line, s in zip(panel["lines"], std)])
    x_ticks, y_ticks = _ticks(xs.min(), xs.max()), _ticks(ys.min(), ys.max())
    x0, x1, y0, y1 = min(xs.min(), x_ticks[0]), xs.max(), min(ys.min(), y_ticks[0]), max(ys.max(), y_ticks[-1])

    def place(x, y):
        return list(zip(left + (np.asarray(x) - x0) / (x1 - x0 or 1) * (right - left),
                        bottom - (np.asarray(y) - y0) / (y1 - y0 or 1) * (bottom - top)))
    for tick in x_ticks:
        (x, _), = place([tick], [y0])
        draw.line([(x, top), (x, bottom)], "#e8e8e8", 2)
        draw.text((x, bottom + 10), _number(tick), "black", font, anchor="ma")
    for tick in y_ticks:
        (_, y), = place([x0], [tick])
        draw.line([(left, y), (right, y)], "#e8e8e8", 2)
        draw.text((left - 12, y), _number(tick), "black", font, anchor="rm")
    for line, s in zip(panel["lines"], std):
        if line.get("std") is not None:  # a translucent band needs its own layer
            mask = Image.new("L", image.size)
            edge = place(line["x"], line["y"] + s) + place(line["x"], line["y"] - s)[::-1]
            ImageDraw.Draw(mask).polygon(edge, fill=24 if line.get("thin") else 48)
            image.paste(Image.new("RGB", image.size, COLORS[line["color"] % len(COLORS)]), mask=mask)
    draw.line([(left, top), (left, bottom), (right, bottom)], "#444444", 3)
    for line in sorted(panel["lines"], key=lambda line: not line.get("thin")):
        _draw_line(draw, place(line["x"], line["y"]), line)
    bold = ImageFont.load_default(28)
    draw.text(((left + right) / 2, top - 50), panel["title"], "black", bold, anchor="ma")
    draw.text(((left + right) / 2, bottom + 48), panel["x"], "black", font, anchor="ma")


def _draw_line(draw, points, line):
    color = COLORS[line["color"] % len(COLORS)]
    if not line.get("thin"):
        return draw.line(points, color, 6, joint="curve")
    points = np.array(points)  # [n, 2]
    length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    for start in np.arange(0, length[-1], 22):  # dashes of 14 pixels, gaps of 8
        at = np.linspace(start, min(start + 14, length[-1]), 8)
        draw.line([(np.interp(s, length, points[:, 0]), np.interp(s, length, points[:, 1])) for s in at], color, 3)


def _ticks(low, high, count=6):
    """About `count` round numbers (1, 2 or 5 times a power of ten) that cover low to high from below."""
    rough = (high - low or abs(high) or 1) / count
    power = 10 ** np.floor(np.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    return np.arange(np.floor(low / step + 1e-9), np.floor(high / step + 1e-9) + 1) * step


def _number(value):
    """A short label: 0.931, 12.3, 4,500, 60k, 16.5M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / min(unit, 1e3 if letter == 'k' else unit):.4g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if value else "0"


# ------------------------------------------------------------------------------------------------------------
# Command line.

def build_parser():
    parser = argparse.ArgumentParser(
        description="Score two image sets, compare training runs, or fit a feature network.",
        epilog="REAL, FAKE, DATA: an image folder, a zip, a dataset as data.py reads it, an .npz of images, or (REAL "
               "and FAKE) an .npz of statistics (mu, sigma).")
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="REAL FAKE, or one DATA for the options that take one")
    group = parser.add_argument_group("features")
    add = group.add_argument
    add("--features", default="inception", metavar="NAME", help="inception, or own:CKPT (default inception)")
    add("--inception-weights", metavar="FILE", help="FID weights (default $FID_INCEPTION_WEIGHTS, else torch's hub "
        "cache, else a download)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or mps (default %(default)s)")
    add("--batch", type=int, default=128, help="images a pass (default %(default)s)")
    add("--size", type=int, help="center-crop and resize to this many pixels (default: keep)")
    add("--num", type=int, help="use this many evenly spaced images of each side (default: all)")
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--save-stats", metavar="FILE.npz", help="write the statistics of the first path")
    add("--save-features", metavar="FILE.npy", help="write the float32 features of DATA, for data.py --features")
    add("--noise-floor", action="store_true", help="score the even against the odd images of DATA")
    group = parser.add_argument_group("own features")
    add = group.add_argument
    add("--fit", metavar="CKPT", help="train a small classifier on labelled DATA, keep a tenth out, write it to CKPT")
    add("--epochs", type=int, default=15, help="passes over the data (default %(default)s; on a CPU try 4)")
    add("--width", type=int, default=64, help="channels of the first layer; features are 8 times as many "
        "(default %(default)s; on a CPU try 12)")
    group = parser.add_argument_group("comparison")
    add = group.add_argument
    add("--compare", nargs="+", metavar="RUN", help="run folders; those that differ only in the seed form an arm")
    add("--metric", help="the metric to draw (default: the first logged)")
    add("--out", default="compare.png", metavar="FILE", help="the chart (default %(default)s)")
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
    one = [flag for flag in ("fit", "noise-floor", "save-features", "compare") if getattr(args, flag.replace("-", "_"))]
    if len(one) > 1:
        raise data.DataError(f"--{one[0]} and --{one[1]} are separate commands")
    wanted = [0] if args.compare else [1] if one else [1, 2] if args.save_stats else [2]
    if one and one[0] != "fit" and any(map(is_statistics, args.paths)):
        raise data.DataError(f"{args.paths[0]}: statistics, but --{one[0]} needs images")
    if len(args.paths) not in wanted:
        raise data.DataError(f"{len(args.paths)} paths given: two (REAL FAKE) are scored, one (DATA) goes with --fit, "
                             "--noise-floor, --save-stats or --save-features, none with --compare")


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
            raise data.DataError(f"{path}: statistics of {stored.features_id}, but --features gives {scorer.id}")
    index = {path: evenly_spaced(len(dataset), args.num) for path, dataset in datasets.items()}
    if args.save_features:
        (path, dataset), = datasets.items()
        features = scorer.features(dataset, args.batch, index[path], path).numpy()
        return _write(args.save_features, lambda file: np.save(file, features))
    if args.noise_floor:
        (path, dataset), = datasets.items()
        halves = [scorer.summary(dataset, args.batch, index[path][i::2], label=f"half {i + 1}") for i in (0, 1)]
        return print("noise floor: " + score_line(*halves, args.device))
    for path, dataset in datasets.items():
        summaries[path] = scorer.summary(dataset, args.batch, index[path], label=path)
    if args.save_stats:
        summaries[args.paths[0]].save(args.save_stats)
    if len(args.paths) == 2:
        print(score_line(*(summaries[path] for path in args.paths), args.device))


def main(argv=None):
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
