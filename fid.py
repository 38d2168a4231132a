"""Scores of samples: feature networks, Fréchet distance, precision and recall, 2-D metrics; run comparison.

Fréchet Inception distance: https://arxiv.org/abs/1706.08500. Improved precision and recall:
https://arxiv.org/abs/1904.06991. Images are always scored as uint8. Two image sets, or training runs:

    python fid.py REAL FAKE --features inception
    python fid.py --compare runs/uniform-s0 runs/uniform-s1 runs/ajest-s0 runs/ajest-s1
"""
import hashlib
import html
import io
import itertools
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import guide
import model

WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")            # ends in the first digits of its SHA-256
HIT_LOGP = -2.12                                # a point of the tree is a hit from this log-density on
BIASED_BELOW = 2048                             # samples; fewer and the Fréchet distance is visibly too large


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
    """uint8 [N, 3, H, W] -> float32 [N, 2048]. Batch norms (eps 0.001) are folded into the convolutions while
    the weights are loaded; the classifier on top is left out."""

    def __init__(self):
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
    folded, parts = {}, ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    for name in [key.removesuffix(".conv.weight") for key in state if key.endswith(".conv.weight")]:
        weight, gamma, beta, mean, var = (state[f"{name}.{part}"].double() for part in parts)
        scale = gamma / (var + 0.001).sqrt()
        folded[f"{name}.weight"] = (weight * scale[:, None, None, None]).float()
        folded[f"{name}.bias"] = (beta - mean * scale).float()
    return folded


# ------------------------------------------------------------------------------------------------------------
# Own features: a small residual classifier for any resolution from 8 pixels; its features are the averages
# over positions of the last activations.

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


class Pixels(torch.nn.Module):
    """[N, C, H, W], uint8 or float latents -> float32 [N, 64 C], 8x8 area averages: crude, but no network."""

    def forward(self, x):
        x = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()
        return F.adaptive_avg_pool2d(x, 8).flatten(1)


# ------------------------------------------------------------------------------------------------------------
# A feature network by its name. Files are not trusted: a network has no memory of its own before it takes
# over the tensors of the file, and these are no larger than the file.

def network(name, device="cpu", weights=None):
    """The module of "inception", "own:CKPT" (a file of fid.py --fit) or "pixels" on `device`.

    It maps uint8 [N, 3, H, W] ("pixels" also latents) to float32 [N, d]. Its `.id` tells features apart,
    wherever their file lies. `weights`: Inception's file; None = $FID_INCEPTION_WEIGHTS, else the one in
    torch's hub cache, else a download into it. Raises DataError.
    """
    kind, _, path = name.partition(":")
    if name == "pixels":
        net = Pixels()
    elif name == "inception":
        path = weights or os.environ.get("FID_INCEPTION_WEIGHTS")
        what = "the FID Inception weights (give them by --inception-weights, or use --features own:CKPT)"
        with data.reading(path or WEIGHTS_URL, what):
            state = (torch.load(path, map_location="cpu", weights_only=True) if path else
                     torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", progress=False,
                                                        check_hash=True, weights_only=True))
            with torch.device("meta"):
                net = Inception()
            net.load_state_dict(_fold_batch_norms(state), assign=True)
    elif kind == "own":
        with data.reading(path, "a classifier (fid.py --fit)"):
            content = Path(path).read_bytes()
            name = f"own:{hashlib.sha256(content).hexdigest()[:12]}"
            file = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            with torch.device("meta"):
                net = Classifier(len(file["class_names"]), file["width"])
            net.load_state_dict(file["model"], assign=True)
            tensors = file["model"].values()
            if sum(t.nbytes for t in tensors) > len(content) or not all(
                    t.dtype in (torch.float32, torch.int64) and t.isfinite().all() for t in tensors):
                raise ValueError("its tensors are not finite float32, or larger than the file")
    else:
        raise data.DataError(f"--features {name}: give inception, own:CKPT or pixels")
    net.id, net.device = name, torch.device(device)
    return net.to(net.device, memory_format=torch.channels_last).eval().requires_grad_(False)


def distance_name(id):
    """What the Fréchet distance of a network's features is called; only that of Inception's is the FID."""
    return "FID" if id == "inception" else f"FD({id.partition(':')[0]})"


# ------------------------------------------------------------------------------------------------------------
# Fitting a classifier: SGD with Nesterov momentum under a one-cycle learning rate, up for a quarter of the
# steps, then down to 0. A tenth of the examples is held out.

def fit(path, dataset, epochs=None, width=None, device="cpu", batch=None, seed=0):
    """Train a Classifier, write it to `path` and return its accuracy on the held-out tenth. Raises DataError.

    dataset     data.Dataset of labelled images
    epochs      passes over nine tenths of it; None = 15 on CUDA, 3 elsewhere
    width       channels of the first layer; None = 64 on CUDA, 8 elsewhere
    batch       images a step; None = 512 on CUDA, 128 elsewhere
    seed        of the held-out tenth, the weights and the order
    """
    if dataset.kind != "image" or dataset.classes < 2 or len(dataset) < 20 or min(dataset.shape[1:]) < 8:
        raise data.DataError("--fit needs 20 or more images of two or more classes, of at least 8x8 pixels")
    device = torch.device(device)
    defaults = (15, 64, 512) if device.type == "cuda" else (3, 8, 128)
    epochs, width, batch = (value or default for value, default in zip((epochs, width, batch), defaults))
    torch.manual_seed(seed)
    held_out, index = torch.randperm(len(dataset)).tensor_split([len(dataset) // 10])
    batch = min(max(batch, 2), len(index))
    per_epoch = len(index) // batch
    steps, dataset = epochs * per_epoch, dataset.to(device)
    generator = data.stream(seed, 0, "augment", device)
    net = Classifier(dataset.classes, width).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.4 * batch / 512, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.25 * steps), (steps - step) / (0.75 * steps)))
    cast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def take(rows):                             # host int64 [n] -> uint8 [n, 3, H, W], int64 [n]
        images = dataset.x[data.put(rows, dataset.x.device)]
        return data.put(images, device), data.put(dataset.labels[rows], device)

    for epoch in range(1, epochs + 1):
        net.train()
        for rows in index[torch.randperm(len(index))].split(batch)[:per_epoch]:
            images, labels = take(rows)
            with cast:
                logits = net.logits(_augment(images, generator))
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        net.eval()
        with torch.no_grad(), cast:
            right = torch.cat([net.logits(images).argmax(1) == labels
                               for images, labels in map(take, held_out.split(1000))])
        accuracy = right.float().mean().item()
        data.progress(f"epoch {epoch}/{epochs}  loss {loss.item():.3f}  held-out accuracy {accuracy:.4f}",
                      last=epoch == epochs)
    state = {key: value.cpu() for key, value in net.state_dict().items()}
    with data.writing(path) as file:
        torch.save(dict(kind="classifier", width=width, class_names=list(dataset.class_names),
                        size=dataset.shape[-1], accuracy=accuracy, model=state), file)
    return accuracy


def _augment(images, generator, shift=4):
    """Move each image [N, C, H, W] by up to `shift` pixels (mirrored border), flip half of them; floats."""
    (n, _, h, w), device = images.shape, images.device
    padded = F.pad(images.float(), 4 * [shift], mode="reflect")
    y, x = torch.randint(2 * shift + 1, (2, n, 1), generator=generator, device=device)
    flip = torch.rand(n, 1, generator=generator, device=device) < 0.5
    column = torch.arange(w, device=device)
    rows = y + torch.arange(h, device=device)                                           # [n, h]
    columns = x + torch.where(flip, column.flip(0), column)                             # [n, w]
    example = torch.arange(n, device=device)[:, None, None]
    return padded[example, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------------------
# Features of a set of images, computed batch by batch; those of a data set once, then they lie in its cache.

@torch.no_grad()
def extract(net, x, index=None, batch=128, label=None):
    """Features float32 [n, d], on the CPU, of x[index] (None = all); x uint8 or float [N, C, H, W], anywhere.
    The last batch is padded, so that the network sees one shape. A label shows progress. Raises DataError."""
    if net.id != "pixels" and (x.dtype != torch.uint8 or x.shape[1] != 3 or min(x.shape[2:]) < 8):
        raise data.DataError(f"{net.id} features are of uint8 images [3, H, W], H and W from 8 on, not of "
                             f"{x.dtype} {list(x.shape[1:])}; --features pixels are of latents, too")
    index = torch.arange(len(x)) if index is None else index
    n, batch, parts = len(index), min(batch, len(index)), []
    for rows in F.pad(index, (0, -n % batch)).split(batch):
        parts.append(net(data.put(x[data.put(rows, x.device)], net.device)).cpu())
        if label:
            done = min(len(parts) * batch, n)
            data.progress(f"{label}: {done:,}/{n:,}", last=done == n)
    features = torch.cat(parts)[:n]
    if not features.isfinite().all():
        raise data.DataError(f"the features of {net.id} are not finite for these images")
    return features


def data_features(net, dataset, label=None, batch=128):
    """`extract` of a whole Dataset, computed once for this content and network, then read from the folder of
    cached data. Raises DataError."""
    folder = data.cache_folder()
    path = folder / f"features-{dataset.fingerprint[:16]}-{net.id.replace(':', '-')}.npy"
    if not path.exists():
        features = extract(net, dataset.x, batch=batch, label=label)
        folder.mkdir(parents=True, exist_ok=True)
        with data.writing(path) as file:
            np.save(file, features.numpy())
    with data.reading(path, "features of this program (delete it)"):
        return torch.from_numpy(np.load(path, allow_pickle=False))


# ------------------------------------------------------------------------------------------------------------
# The Fréchet distance of two Gaussians: |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr sqrt(S1 S2). S1 S2 has the
# eigenvalues of the symmetric R^T S2 R for any R with R R^T = S1, so no general matrix square root is needed:
# R is the Cholesky factor of S1, or comes from its eigenvectors where S1 has not full rank.

def frechet(mu1, sigma1, mu2, sigma2):
    """Fréchet distance of N(mu1 [d], sigma1 [d, d]) and N(mu2, sigma2), arrays or tensors, in float64."""
    mu1, sigma1, mu2, sigma2 = (data.double(torch.as_tensor(v)) for v in (mu1, sigma1, mu2, sigma2))
    R, failed = torch.linalg.cholesky_ex(sigma1)
    if failed:
        values, vectors = torch.linalg.eigh(sigma1)
        R = vectors * values.clamp(min=0).sqrt()
    product = R.T @ sigma2 @ R
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item()


# ------------------------------------------------------------------------------------------------------------
# Improved precision and recall: a sample lies on the other set's manifold when it is no farther from one of
# that set's points than that point's k-th neighbour within its set.

def precision_recall(real, fake, k=3, block=2048):
    """(precision, recall) of features real [n, d] and fake [m, d], n and m > k, on the features' device."""
    real, fake = data.double(real), data.double(fake)
    return _share_inside(fake, real, k, block), _share_inside(real, fake, k, block)


def _share_inside(points, centres, k, block):
    """Share of points [n, d] that lie in one of the balls around centres [m, d] up to the k-th neighbour."""
    radius = data.neighbour_distance(centres, k)                                        # [m]
    inside = [(torch.cdist(rows, centres) <= radius).any(1) for rows in points.split(block)]
    return torch.cat(inside).float().mean().item()


# ------------------------------------------------------------------------------------------------------------
# What is kept of a set's features to score it: their number, mean and covariance, and of at most 10,000 the
# features themselves, for precision and recall.

def summary(features):
    """dict(n, mu float64 [d], sigma float64 [d, d], features float32 [at most 10,000, d], evenly spaced) of
    features [n, d]. Raises DataError for fewer than two."""
    n = len(features)
    if n < 2:
        raise data.DataError("only one image: a distance needs at least 2 on each side")
    x, kept = data.double(features), min(n, 10_000)
    some = features[torch.arange(kept) * n // kept].float()
    return dict(n=n, mu=x.mean(0), sigma=torch.atleast_2d(torch.cov(x.T)), features=some)


def score(real, fake, name, device="cpu"):
    """The metrics of two summaries: {name: distance, "precision", "recall"}, the last two where both have
    features of more than 3 samples, computed on `device`. `name`: see `distance_name`. Raises DataError."""
    if real["mu"].shape != fake["mu"].shape:
        raise data.DataError(f"{len(real['mu'])} and {len(fake['mu'])} features cannot be compared")
    metrics = {name: frechet(real["mu"], real["sigma"], fake["mu"], fake["sigma"])}
    a, b = real["features"], fake["features"]
    if a is not None and b is not None and min(len(a), len(b)) > 3:
        metrics["precision"], metrics["recall"] = precision_recall(a.to(device), b.to(device))
    return metrics


def score_line(real, fake, id, device="cpu"):
    """The metrics of two summaries in one line; warns on stderr where few samples bias the distance."""
    (name, distance), *rest = score(real, fake, distance_name(id), device).items()
    counts = []
    for side, n in ("real", real["n"]), ("fake", fake["n"]):
        counts.append(f"{n if n >= 0 else 'unknown number of'} {side}")
        if 0 <= n < BIASED_BELOW:
            print(f"warning: only {n} {side} images: below {BIASED_BELOW} the distance is biased upwards, "
                  "compare it only with figures from as many images", file=sys.stderr)
    digits = f"{distance:.4f}" if distance > 1 else f"{distance:.4g}"
    words = [f"{name} {digits}"] + [f"{key} {value:.2f}" for key, value in rest]
    return "  ".join(words + [f"({', '.join(counts)}, features {id})"])


def statistics(path):
    """The summary in an .npz of mu and sigma, as pytorch-fid writes it: no features, but the network's `id`.
    None for an .npz of other things; raises DataError for a damaged one."""
    with data.reading(path, "statistics (mu [d], sigma [d, d], finite), nor a data set"):
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                return None
            mu, sigma = (torch.from_numpy(file[key].astype(np.float64)) for key in ("mu", "sigma"))
            n = int(file["n"]) if "n" in file else -1
            id = str(file["features_id"]) if "features_id" in file else "inception"
        finite = (mu.norm() + sigma.norm()).float().isfinite()  # squares and products, too
        if mu.ndim != 1 or len(mu) < 1 or sigma.shape != 2 * mu.shape or not finite:
            raise ValueError(f"mu is {list(mu.shape)}, sigma {list(sigma.shape)}")
        return dict(n=n, mu=mu, sigma=sigma, features=None, id=id)


# ------------------------------------------------------------------------------------------------------------
# Metrics of the 2-D tree, whose density and denoiser are known.

def hit(points, tree):
    """Share of the points [n, 2] where the tree's log-density is at least HIT_LOGP."""
    return (tree.logp(points) >= HIT_LOGP).float().mean().item()


def coverage(points, tree, is_hit=None, cells=101, side=3.0):
    """"Mandala score" of points [n, 2]: on a cells x cells grid of that side around the origin, the number of
    cells with a hit over the number of cells with any point. `is_hit` bool [n] spares the density."""
    is_hit = tree.logp(points) >= HIT_LOGP if is_hit is None else is_hit
    cell = ((data.double(points) / side + 0.5) * cells).floor().long()                  # [n, 2]
    inside = ((cell >= 0) & (cell < cells)).all(1)
    index = cell[:, 0] * cells + cell[:, 1]
    reached, cells_hit = index[inside].unique(), index[inside & is_hit.to(index.device)].unique()
    return len(cells_hit) / max(len(reached), 1)


def tree_metrics(points, tree, endpoints=None):
    """{"hit", "coverage"} of points [n, 2]; with the exact end points [m, 2] of the first m also "l2", their
    mean distance."""
    is_hit = tree.logp(points) >= HIT_LOGP
    metrics = dict(hit=is_hit.float().mean().item(), coverage=coverage(points, tree, is_hit))
    if endpoints is not None:
        metrics["l2"] = (points[:len(endpoints)] - endpoints).norm(dim=1).mean().item()
    return metrics


def exact_endpoints(tree, noise, steps=32, sigma_max=5):
    """End points [n, 2] of the exact denoiser's ODE from unit normal noise [n, 2]."""
    return guide.heun(tree.denoise, noise, steps=steps, sigma_max=sigma_max)


@torch.no_grad()
def score_error(denoiser, tree, n=16384, seed=0, P_mean=-2.3, P_std=1.5):
    """Excess loss over the exact denoiser's: the mean over n draws of (x0, sigma, eps) of lambda(sigma) times
    the mean over dimensions of (D - D_exact)^2. Calls denoiser(x [m, 2], sigma [m], None) on tree.device."""
    generator, losses = data.stream(seed, 0, "score_error", tree.device), []
    x0 = tree.sample(n, generator)                                                      # [n, 2]
    sigma = (P_mean + P_std * torch.randn(n, generator=generator, device=x0.device)).exp()
    x = x0 + sigma[:, None] * torch.randn(n, 2, generator=generator, device=x0.device)
    for x, sigma in zip(x.split(4096), sigma.split(4096)):
        losses.append(model.per_example_loss(denoiser(x, sigma, None), tree.denoise(x, sigma), sigma))
    return torch.cat(losses).mean().item()


# ------------------------------------------------------------------------------------------------------------
# Comparing runs: an arm is a set of runs that differ in nothing but the seed. A run's curve is one metric of
# its evaluations over examples or seconds, linear in between, never beyond its ends.

COMPARABLE = ("data_fingerprint", "kind", "size", "shape", "channels", "features_id", "eval_samples",
              "sampling_steps")                 # configuration that must agree between all runs
SEED_SUFFIX = re.compile(r"-(s|seed)\d+(?=/|$)")
AXES = {"examples_trained": "examples trained", "training_seconds": "seconds of training"}
NOT_METRICS = {"kind", "step", "seconds", "select_seconds", "reference_seconds", "training_seconds",
               "eval_seconds", "compile_seconds", "examples_trained", "examples_seen", "guidance"}


class Run:
    """A run folder: `config`, and `curves[axis, metric, guided]`, arrays x [n] and y [n], by rising x, of the
    evaluations in its log that have the metric. Raises DataError."""

    def __init__(self, path):
        self.path, self.curves = path, {}
        with data.reading(path, "a run folder of train.py"):
            self.config = dict(json.loads(Path(path, "config.json").read_text()))
            lines = Path(path, "log.jsonl").read_text().split("\n")[:-1]                # not a torn last line
            evals = [r for r in map(json.loads, lines) if r["kind"] == "eval"]
            weights = {r["guidance"] for r in evals}
            if not weights or len(weights - {1}) > 1:
                raise ValueError(f"it has {'several guidance weights' if weights else 'no evaluations'}")
            for r in evals:
                r["training_seconds"] = r["seconds"] + r.get("reference_seconds", 0)
            metrics = dict.fromkeys(key for r in evals for key in r if key != "kind")
            for axis, metric, guided in itertools.product(AXES, metrics, (False, True)):
                points = sorted((r[axis], r[metric]) for r in evals
                                if metric in r and (r["guidance"] != 1) == guided)
                points = np.array(points, np.float64).reshape(-1, 2)
                points = points[np.isfinite(points).all(1)]
                if len(points):
                    self.curves[axis, metric, guided] = points.T

    def at(self, x, axis, metric, guided):
        """The metric where the axis is x, a number or [n]."""
        xs, ys = self.curves[axis, metric, guided]
        assert xs[0] <= np.min(x) and np.max(x) <= xs[-1], "extrapolation"
        return np.interp(x, xs, ys)


def group_runs(paths):
    """{arm name: [Run]} of run folders; DataError where runs cannot be compared with the first one."""
    runs = [Run(path) for path in dict.fromkeys(map(os.path.normpath, paths))]
    by_config, arms = {}, {}
    for run in runs:
        for key in COMPARABLE:
            first, here = runs[0].config.get(key), run.config.get(key)
            if first != here:
                raise data.DataError(f"{run.path}, {runs[0].path}: not comparable, {key} {here} and {first}")
        same = {key: SEED_SUFFIX.sub("", value) if isinstance(value, str) else value
                for key, value in run.config.items() if key not in ("seed", "out")}     # a guide has a seed
        by_config.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    for arm in by_config.values():
        name = SEED_SUFFIX.sub("", os.path.basename(os.path.abspath(arm[0].path)))
        while name in arms:
            name += "'"                         # another configuration under the same name
        arms[name] = arm
    return arms


def compare(paths, out="compare.svg", metric=None):
    """Compare run folders: draws `metric` (None = the first in the logs) to `out` and returns text, a table
    at the most examples and one at the most seconds that all runs reach. Raises DataError."""
    arms = group_runs(paths)
    runs = sum(arms.values(), [])
    columns = list(dict.fromkeys(key[1:] for run in runs for key in run.curves if key[1] not in NOT_METRICS))
    metrics = list(dict(columns))               # a column is (metric, guided)
    if not metrics or metric and metric not in metrics:
        raise data.DataError(f"--metric {metric}: the runs have {', '.join(metrics) or 'no metrics'}")
    tables, missing = [], []
    for axis, words in AXES.items():
        ends = [(xs[0], xs[-1], run.path) for run in runs
                for key, (xs, _) in run.curves.items() if key[0] == axis and key[1] in metrics]
        (low, _, late), (_, high, early) = max(ends), min(ends, key=lambda end: end[1])
        if low <= high:
            tables.append(_table(arms, axis, columns, high))
        else:
            missing.append(f"The runs have no {words} in common: {early} ends at {high:,.6g}, {late} begins "
                           f"at {low:,.6g}; train longer, or evaluate earlier.")
    if not tables:
        raise data.DataError(" ".join(missing))
    metric = metric or metrics[0]
    _chart([(metric, AXES[axis], _lines(arms, axis, metric)) for axis in reversed(AXES)], out)
    return "\n\n".join(tables + missing)


def _table(arms, axis, columns, x):
    """Markdown: one row per arm where the axis is x, mean ± std over its runs."""
    head = [metric + (", guided" if guided else "") for metric, guided in columns]
    rows = [["arm", "runs", *head, "selection", "ms/step"], ["---"] + ["---:"] * (len(head) + 3)]
    for name, arm in arms.items():
        cells = [_mean_std([run.at(x, axis, *key) for run in arm if (axis, *key) in run.curves])
                 for key in columns]
        seconds, selecting, steps = (
            np.array([run.at(x, axis, key, (axis, key, False) not in run.curves) for run in arm])
            for key in ("seconds", "select_seconds", "step"))
        share, speed = selecting / np.maximum(seconds, 1e-9), 1000 * seconds / np.maximum(steps, 1)
        rows.append([name, str(len(arm)), *cells, f"{100 * share.mean():.0f}%", f"{speed.mean():.3g}"])
    note = " (guide and reference training counted, evaluation not)" if axis == "training_seconds" else ""
    title = f"At {f'{x:,.1f}'.removesuffix('.0')} {AXES[axis]}{note}, mean ± std over runs:"
    return "\n".join([title, ""] + [f"| {' | '.join(row)} |" for row in rows])


def _mean_std(values):
    std = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
    return f"{np.mean(values):.4g}{std}" if values else ""


def _lines(arms, axis, metric):
    """Lines for `_chart`: each arm's mean and standard deviation over its runs, on their common range."""
    lines = []
    for color, (name, arm) in enumerate(arms.items()):
        guides = any((axis, metric, True) in run.curves for run in arm)
        for key in (axis, metric, True), (axis, metric, False):
            runs = [run for run in arm if key in run.curves]
            xs = [run.curves[key][0] for run in runs]
            if runs and max(x[0] for x in xs) <= min(x[-1] for x in xs):
                x = np.unique(np.concatenate(xs).clip(max(x[0] for x in xs), min(x[-1] for x in xs)))
                y = np.stack([run.at(x, *key) for run in runs])                         # [runs, n]
                std = y.std(0, ddof=1) if len(runs) > 1 else 0 * x
                suffix = ", guided" if key[2] else ", unguided" if guides else ""
                lines.append(dict(name=name + suffix, x=x, y=y.mean(0), std=std, color=COLORS[color % 10],
                                  dashed=guides and not key[2]))
    return lines


# ------------------------------------------------------------------------------------------------------------
# A chart as SVG text: panels side by side, and below them the lines by name with their last values.

COLORS = ("#1f5fa8", "#d1495b", "#2e8b57", "#e08e1b", "#7b4ea3", "#159aa8", "#8c5a3c", "#d35fa5", "#555555",
          "#9aa51f")


def _chart(panels, path, width=620, height=400):
    """Write panels, tuples (name of y, name of x, lines), to an .svg. A line is a dict(name, x [n], y [n],
    std [n] (a band around y), color, dashed)."""
    panels = [panel for panel in panels if panel[2]]
    legend = {line["name"]: line for *_, lines in panels for line in lines}
    column = 8 * max(map(len, legend)) + 130
    columns = max(1, (len(panels) * width - 80) // column)
    total = height + 24 * -(-len(legend) // columns)
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * len(panels)} {total}" '
           'font-family="sans-serif" font-size="14">', '<rect width="100%" height="100%" fill="white"/>']
    for i, panel in enumerate(panels):
        svg += _panel(*panel, i * width + 80, 44, (i + 1) * width - 45, height - 70)
    for i, (name, line) in enumerate(legend.items()):
        x, y = 80 + i % columns * column, height + i // columns * 24
        label = _text(x + 46, y + 5, f"{name}  {line['y'][-1]:.4g}")
        svg.append(f'<path d="M{x} {y}h36" {_stroke(line)}/>{label}')
    with data.writing(path) as file:
        file.write("\n".join([*svg, "</svg>", ""]).encode())


def _panel(y_name, x_name, lines, left, top, right, bottom):
    """The SVG elements of one panel whose axes span these pixels."""
    edges = [line["y"] + sign * line["std"] for line in lines for sign in (-1, 1)]
    x_ticks, y_ticks = _ticks(np.concatenate([line["x"] for line in lines])), _ticks(np.concatenate(edges))

    def across(x):                              # data to pixels
        return np.interp(x, [x_ticks[0][0], x_ticks[-1][0]], [left, right])

    def up(y):
        return np.interp(y, [y_ticks[0][0], y_ticks[-1][0]], [bottom, top])

    def points(x, y):
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across(x), up(y)))
    svg = [_text((left + right) / 2, bottom + 46, x_name, "middle"), _text(left, top - 18, y_name)]
    for x, label in x_ticks:
        svg += [f'<path d="M{across(x):.1f} {top}V{bottom}" stroke="#e4e4e4"/>',
                _text(across(x), bottom + 22, label, "middle")]
    for y, label in y_ticks:
        svg += [f'<path d="M{left} {up(y):.1f}H{right}" stroke="#e4e4e4"/>',
                _text(left - 8, up(y) + 5, label, "end")]
    for line in lines:
        x, y, std = line["x"], line["y"], line["std"]
        band = points(np.append(x, x[::-1]), np.append(y - std, (y + std)[::-1]))
        svg.append(f'<polygon points="{band}" fill="{line["color"]}" fill-opacity="0.12"/>')
    return svg + [f'<polyline points="{points(line["x"], line["y"])}" {_stroke(line)}/>' for line in lines]


def _ticks(values):
    """[(value, label)]: up to eight round numbers around all values, 1, 2 or 5 times a power of ten apart."""
    low, high = values.min(), values.max()
    high = high if high - low > 1e-9 * abs(high) else low + (abs(low) or 1)
    rough = (high - low) / 6
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    unit, letter = (1e6, "M") if step >= 1e5 else (1e3, "k") if step >= 1e3 else (1, "")
    digits = max(0, -int(np.floor(np.log10(step / unit) + 1e-9)))
    first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
    return [(i * step, f"{i * step / unit:.{digits}f}{letter}") for i in np.arange(first, last + 1)]


def _text(x, y, text, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _stroke(line):
    """The attributes of a line's stroke."""
    dash = ' stroke-width="1.5" stroke-dasharray="6 5"' if line["dashed"] else ' stroke-width="2.5"'
    return f'fill="none" stroke="{line["color"]}" stroke-linecap="round"{dash}'


# ------------------------------------------------------------------------------------------------------------
# Command line.

def build_parser():
    N = data.number
    p = data.parser(__doc__, "REAL FAKE [flags]")
    p.add_argument("paths", nargs="*", metavar="PATH", help="REAL FAKE, or the DATA of a command below: "
                   "all that data.py reads, REAL and FAKE also an .npz of statistics (mu, sigma)")
    g = p.add_argument_group("features")
    g.add_argument("--features", default="inception", help="inception, own:CKPT or pixels")
    g.add_argument("--inception-weights", metavar="FILE", help="FID weights (default: the file "
                   "$FID_INCEPTION_WEIGHTS, else the one in torch's hub cache, else a download)")
    g.add_argument("--device", type=data.device, default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda or mps")
    g.add_argument("--batch", type=N(int, "[1, 65536]"), help="images a pass (default: 128; --fit: CUDA 512)")
    g.add_argument("--size", type=N(int, "[8, 4096]"), help="center-crop and resize to this many pixels")
    g = p.add_argument_group("other commands").add_mutually_exclusive_group()
    g.add_argument("--save-stats", metavar="FILE.npz", help="write the statistics of REAL")
    g.add_argument("--save-features", metavar="FILE.npy", help="write DATA's features [N, d]")
    g.add_argument("--noise-floor", action="store_true", help="score the even against the odd images of DATA")
    g.add_argument("--fit", metavar="CKPT", help="fit a small classifier to labelled DATA")
    g.add_argument("--compare", nargs="+", metavar="RUN", help="run folders; seeds of one arm are averaged")
    g = p.add_argument_group("with --fit")
    g.add_argument("--epochs", type=N(int, "[1, 10000]"), help="passes over DATA (default: CUDA 15, else 3)")
    g.add_argument("--width", type=N(int, "[1, 512]"), help="channels of the first layer, an eighth of the "
                   "features (default: CUDA 64, else 8)")
    g.add_argument("--seed", type=N(int, "[0, inf)"), default=0, help="of the weights and the held-out tenth")
    g = p.add_argument_group("with --compare")
    g.add_argument("--metric", help="metric to draw (default: the first in the log)")
    g.add_argument("--out", default="compare.svg", metavar="FILE.svg", help="the chart")
    return p


def run(args):
    """Carry out the command. All data sets are loaded before a feature network is."""
    alone = args.fit or args.save_features or args.noise_floor
    wanted = [0] if args.compare else [1] if alone else [1, 2] if args.save_stats else [2]
    if len(args.paths) not in wanted:
        raise data.DataError(f"{len(args.paths)} paths given: two (REAL FAKE) are scored, one goes with "
                             "--fit, --noise-floor, --save-stats, --save-features, none with --compare")
    if args.compare:
        return print(compare(args.compare, args.out, args.metric))
    stored = [None if alone or not path.endswith(".npz") else statistics(path) for path in args.paths]
    sets = [known or data.load(path, args.size) for path, known in zip(args.paths, stored)]
    if args.fit:
        accuracy = fit(args.fit, sets[0], args.epochs, args.width, args.device, args.batch, args.seed)
        return print(f"{args.fit}: held-out accuracy {accuracy:.4f}, use it with --features own:{args.fit}")
    net = None if all(stored) else network(args.features, args.device, args.inception_weights)
    id, *others = {known["id"] for known in stored if known} | ({net.id} if net else set())
    if others:
        raise data.DataError(f"these features cannot be compared: {', '.join([id, *others])}")
    features = [None if known else data_features(net, dataset, path, args.batch or 128)
                for path, known, dataset in zip(args.paths, stored, sets)]
    if args.save_features:
        with data.writing(args.save_features) as file:
            return np.save(file, features[0].numpy())
    if args.noise_floor:
        halves = [summary(features[0][i::2]) for i in (0, 1)]
        return print("noise floor: " + score_line(*halves, id, args.device))
    summaries = [known or summary(f) for known, f in zip(stored, features)]
    if args.save_stats:
        with data.writing(args.save_stats) as file:
            np.savez(file, features_id=id, **{key: summaries[0][key] for key in ("n", "mu", "sigma")})
    if len(summaries) == 2:
        print(score_line(*summaries, id, args.device))


if __name__ == "__main__":
    data.command(run, build_parser())
