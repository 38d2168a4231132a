"""Metrics of samples, the evaluation of a training run, and the comparison of runs.

Fréchet Inception distance: https://arxiv.org/abs/1706.08500. Improved precision and recall:
https://arxiv.org/abs/1904.06991. Images are always scored as uint8. The feature networks and the chart stand
at the end of the file. To score two image sets, or to compare training runs:

    python fid.py REAL FAKE --features inception
    python fid.py --compare runs/uniform-s0 runs/uniform-s1 runs/ajest-s0 runs/ajest-s1
"""
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import time
import typing
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import guide
import model

BIASED_BELOW = 2048                             # fewer images make the Fréchet distance visibly too large


# ------------------------------------------------------------------------------------------------------------
# The Fréchet distance of two Gaussians: |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr sqrt(S1 S2). S1 S2 has the
# eigenvalues of the symmetric R^T S2 R for any R with R R^T = S1, so no general matrix square root is needed:
# R is the Cholesky factor of S1, or comes from its eigenvectors where S1 does not have full rank.

def moments(features):
    """(mu float64 [d], sigma float64 [d, d]) of features [n, d]. Raises DataError if n < 2."""
    if len(features) < 2:
        raise data.DataError("only one example: a Fréchet distance needs 2 or more on each side")
    x = features.double()
    return x.mean(0), torch.atleast_2d(torch.cov(x.T))


def frechet(mu1, sigma1, mu2, sigma2):
    """Fréchet distance of N(mu1 [d], sigma1 [d, d]) and N(mu2, sigma2), arrays or tensors, in float64."""
    mu1 = torch.as_tensor(mu1).double()
    mu2 = torch.as_tensor(mu2).double()
    sigma1 = torch.as_tensor(sigma1).double()
    sigma2 = torch.as_tensor(sigma2).double()
    R, failed = torch.linalg.cholesky_ex(sigma1)
    if failed:
        values, vectors = torch.linalg.eigh(sigma1)
        R = vectors * values.clamp(min=0).sqrt()
    product = R.T @ sigma2 @ R
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace
    return distance.clamp(min=0).item()


# ------------------------------------------------------------------------------------------------------------
# Improved precision and recall (1904.06991): a sample lies on the other set's manifold when it is no farther
# from one of that set's points than that point's k-th neighbour within its set.

def precision_recall(real, fake, k=3, block=2048):
    """(precision, recall) of features real [n, d] and fake [m, d], n and m > k, on the features' device."""
    real = real.double()
    fake = fake.double()
    precision = _share_inside(fake, real, k, block)
    recall = _share_inside(real, fake, k, block)
    return precision, recall


def _share_inside(points, centres, k, block):
    """Share of points [n, d] in any of the balls around centres [m, d] that reach to the k-th neighbour."""
    radius = data.neighbour_distance(centres, k)                                        # [m]
    inside = [(torch.cdist(rows, centres) <= radius).any(1) for rows in points.split(block)]
    return torch.cat(inside).float().mean().item()


# ------------------------------------------------------------------------------------------------------------
# All metrics of two image sets, from their features.

def image_metrics(real, fake, net_id, device="cpu", real_moments=None, most=10_000):
    """{distance, "precision", "recall"} of features real [n, d] and fake [m, d] of the network `net_id`.

    Precision and recall take at most `most` examples of each set, drawn at random. They are left out if a set
    has 3 or fewer. `real_moments` is moments(real); None = computed here. Raises DataError.
    """
    if real_moments is None:
        real_moments = moments(real)
    metrics = {distance_name(net_id): frechet(*real_moments, *moments(fake))}
    real_drawn = _draw(real, most).to(device)
    fake_drawn = _draw(fake, most).to(device)
    if min(len(real_drawn), len(fake_drawn)) > 3:
        metrics["precision"], metrics["recall"] = precision_recall(real_drawn, fake_drawn)
    return metrics


def _draw(features, most):
    """At most `most` of the features [n, d], in random order."""
    order = torch.randperm(len(features), generator=data.stream(0, 0, "metrics"))
    return features[order[:most]]


def distance_name(net_id):
    """The name of the Fréchet distance of a network's features; only that of Inception's is the FID."""
    kind = net_id.partition(":")[0]
    if kind == "inception":
        return "FID"
    return f"FD({kind})"


def warn_of_few(n, source):
    """Warn on stderr if n images are few enough to bias a Fréchet distance visibly; `source` names them."""
    if n < BIASED_BELOW:
        data.say(f"warning: {source}: only {n} images; below {BIASED_BELOW} the distance is biased upwards, "
                 "so compare it only with figures from as many images")


# ------------------------------------------------------------------------------------------------------------
# Metrics of the 2-D tree, whose density and denoiser are known. A point is a hit if its log-density is at
# least -2.12. The cells are those of a 101x101 grid around the origin, 3 wide.

HIT_LOGP = -2.12
CELLS = 101
SIDE = 3.0


def tree_metrics(points, tree, endpoints, exact_cells=None):
    """Metrics of points [n, 2] that were sampled to follow the tree's density.

    hit         share of the points that are hits
    coverage    cells with a hit over cells with any point (the AJEST authors' "mandala score"). It is a share
                of the visited cells, so a sampler that has collapsed to a few good cells scores 1
    reached     cells with a hit over `exact_cells`, the cells that n exact points hit: about 1 for a perfect
                sampler, near 0 for a collapsed one. It depends on n
    l2          mean distance of the first m points from `endpoints` [m, 2], where the exact denoiser's ODE
                ends from the same noise

    `exact_cells` is exact_hit_cells(tree, n); None = computed here.
    """
    if exact_cells is None:
        exact_cells = exact_hit_cells(tree, len(points))
    hit = tree.logp(points) >= HIT_LOGP
    visited = _cells(points).unique()
    hit_cells = _cells(points[hit]).unique()
    l2 = (points[:len(endpoints)] - endpoints).norm(dim=1).mean()
    return dict(hit=hit.float().mean().item(), coverage=len(hit_cells) / max(len(visited), 1),
                reached=len(hit_cells) / max(exact_cells, 1), l2=l2.item())


def exact_hit_cells(tree, n):
    """How many cells n points of the tree itself hit; the points are the same every time."""
    points = tree.sample(n, data.stream(0, 0, "reached", tree.device))
    hit = tree.logp(points) >= HIT_LOGP
    return len(_cells(points[hit]).unique())


def _cells(points):
    """The numbers int64 [<= n] of the grid cells of points [n, 2], without those outside of the grid."""
    cell = ((points.double() / SIDE + 0.5) * CELLS).floor().long()                      # [n, 2]
    inside = ((cell >= 0) & (cell < CELLS)).all(1)
    return (cell[:, 0] * CELLS + cell[:, 1])[inside]


@torch.no_grad()
def score_error(denoiser, tree, n=16384, seed=0, P_mean=-2.3, P_std=1.5):
    """Excess loss over the exact denoiser's: the mean over n draws of (x0, sigma, eps) of lambda(sigma) times
    the mean over dimensions of (D - D_exact)^2. Calls denoiser(x [m, 2], sigma [m], None) on tree.device."""
    generator = data.stream(seed, 0, "score_error", tree.device)
    x0 = tree.sample(n, generator)                                                      # [n, 2]
    sigma = (P_mean + P_std * torch.randn(n, generator=generator, device=x0.device)).exp()
    x = x0 + sigma[:, None] * torch.randn(n, 2, generator=generator, device=x0.device)
    losses = []
    for rows in data.micro_batches(n, 4096):
        D_x = denoiser(x[rows], sigma[rows], None)
        D_exact = tree.denoise(x[rows], sigma[rows])
        losses.append(model.per_example_loss(D_x, D_exact, sigma[rows]))
    return torch.cat(losses).mean().item()


# ------------------------------------------------------------------------------------------------------------
# A feature network by its name. The networks themselves stand at the end of this file.

def network(name, device="cpu", weights=None):
    """The module of "inception", "own:CKPT" (a file of fid.py --fit) or "pixels" on `device`.

    It maps uint8 [N, 3, H, W] ("pixels" also latents) to float32 [N, d]. Its `.id` is the same for the same
    weights, whatever their file is called; `.size` is the image size that it was fitted to, None for any.
    `weights` is Inception's file; None = $FID_INCEPTION_WEIGHTS, else torch's hub cache, else a download into
    that cache. Raises DataError.
    """
    kind, _, path = name.partition(":")
    if name == "pixels":
        net = Pixels()
    elif name == "inception":
        net = load_inception(weights or os.environ.get("FID_INCEPTION_WEIGHTS"))
    elif kind == "own":
        net = load_classifier(data.path(path))
    else:
        raise data.DataError(f"features {name}: give inception, own:CKPT or pixels")
    net.device = torch.device(device)
    net = net.to(net.device, memory_format=torch.channels_last)
    return net.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------
# Features of a set of images, computed batch by batch. Those of a data set are computed once and cached.

@torch.no_grad()
def extract(net, x, label=None, batch=128):
    """Features float32 [n, d], on the CPU, of x uint8 or float [n, C, H, W] on any device. The last batch is
    padded, so that the network sees one shape. With a label it shows progress. Raises DataError."""
    _refuse_other_images(net, x)
    n = len(x)
    size = min(batch, n)
    padded = F.pad(torch.arange(n), (0, -n % size))
    batches = []
    with torch.backends.cudnn.flags(torch.backends.cudnn.enabled, allow_tf32=False):    # fp32, as on a CPU
        for rows in padded.split(size):
            images = data.put(x[data.put(rows, x.device)], net.device)
            batches.append(net(images))
            if label:
                done = min(len(batches) * size, n)
                data.progress(f"{label}: {done:,}/{n:,}", last=done == n)
    features = torch.cat(batches)[:n].cpu()
    if not features.isfinite().all():
        raise data.DataError(f"the features of {net.id} are not finite for these images")
    return features


def _refuse_other_images(net, x):
    """DataError if x [n, C, H, W] does not have the type and size that the network was made for."""
    is_image = x.dtype == torch.uint8 and x.shape[1] == 3 and min(x.shape[2:]) >= 8
    if net.id != "pixels" and not is_image:
        raise data.DataError(f"{net.id} features are of uint8 images [3, H, W], H and W from 8 on, not of "
                             f"{x.dtype} {list(x.shape[1:])}; --features pixels are of latents, too")
    if net.size is not None and net.size != x.shape[-1]:
        raise data.DataError(f"{net.id} was fitted to images of {net.size} pixels, these have {x.shape[-1]}: "
                             f"give --size {net.size}, or fit another")


def data_features(net, dataset, label=None):
    """-> (features float32 [n, d] of a whole Dataset, the seconds that computing them took).

    They are computed once for this content and network. The cache keeps them with their seconds, so that a
    run that reads them counts the same cost. Raises DataError.
    """
    path = data.cache_folder() / f"features-{dataset.fingerprint[:16]}-{net.id.replace(':', '-')}.npz"
    if not path.exists():
        data.require_writable(path)
        start = time.monotonic()
        features = extract(net, dataset.x, label)
        seconds = time.monotonic() - start
        with data.writing(path) as file:
            np.savez(file, features=features.numpy(), seconds=seconds)
    with data.reading(path, "features of this program (delete it)"):
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(file["features"]), float(file["seconds"])


# ------------------------------------------------------------------------------------------------------------
# Evaluation of a run, unguided and guided, always from the same noise, so that runs and steps compare. Its
# records say how the metrics were taken, and `--compare` joins only records of one protocol to a curve.

NOT_METRICS = {"kind", "step", "seconds", "examples_trained", "examples_drawn", "selecting", "snapshot",
               "data", "guidance", "samples", "sampling_steps", "features", "other_seconds", "other_examples"}


class Evaluation:
    """evaluation(denoiser, guide_denoiser, progress) -> records for the log; also draws samples.png.

    denoiser        model.Denoiser in evaluation mode, which holds the averaged weights
    guide_denoiser  the same for the guide; None = there is no guide
    progress        what the run has done so far, as of train.new_progress; each record repeats it

    The first record is of unguided samples. With a guide and a weight other than 1, a second one is of guided
    samples.
    """

    def __init__(
        self,
        c,                      # settings of train.py
        dataset,                # data.Dataset or data.Tree, on its device
        folder,                 # run folder in which samples.png is drawn
        held_out=None,          # indices of the examples for the validation loss; None = it is not computed
    ):
        self.c = c
        self.dataset = dataset
        self.folder = Path(folder)
        self.held_out = held_out
        self.guide_costs = (0.0, 0)     # (seconds, examples) of a guide that is used only in sampling
        self.accelerated = {}           # {denoiser: the same in the run's precision, compiled if the run is}
        features = "none"
        if c.kind == "tree":
            features = "tree"
            self.noise = torch.randn(c.eval_samples, 2, generator=data.stream(0, 0, "eval"))
            self.endpoints = guide.heun(dataset.denoise, self.noise[:4096].to(c.device),
                                        steps=c.sampling_steps, sigma_max=c.sigma_max)
            self.exact_cells = exact_hit_cells(dataset, c.eval_samples)
        elif c.metrics != "none":
            if len(dataset) < 2:
                raise data.DataError(f"{c.data}: only one example, and a Fréchet distance needs 2 or more: "
                                     "give --metrics none")
            self.net = network(c.metrics, c.device)
            features = self.net.id
            self.real, _ = data_features(self.net, dataset, "features of the data")
            self.real_moments = moments(self.real)
            warn_of_few(c.eval_samples, "--eval-samples")
        self.protocol = dict(features=features, data=c.fingerprint[:8], samples=c.eval_samples,
                             sampling_steps=c.sampling_steps)

    def records(self, log, step, guidance):
        """The evaluations in the log of this step, at this weight of guidance and by this protocol."""
        wanted = dict(self.protocol, step=step, kind="eval", guidance=guidance)
        return [record for record in log if wanted.items() <= record.items()]

    def is_logged(self, log, step, guidance):
        """Whether the log has this step's evaluation at this weight of guidance (1 = unguided)."""
        return bool(self.records(log, step, guidance))

    def print_metrics(self, log, step, guidance):
        """Print the metrics of a step, unguided and, if `guidance` is not 1, guided."""
        for w in dict.fromkeys((1.0, guidance)):
            records = self.records(log, step, w)
            if not records:
                continue
            record = records[-1]
            metrics = [f"{name} {value:.4f}" for name, value in record.items() if name not in NOT_METRICS]
            way = "unguided" if w == 1 else f"guidance {w:g}"
            if metrics:
                count = record["samples"]
                data.say(f"step {step}, {way} ({count:,} samples):  {'  '.join(metrics)}", file=sys.stdout)

    def __call__(self, denoiser, guide_denoiser, progress):
        c = self.c
        main = self.accelerate(denoiser)
        guide_network = None
        weights = [1.0]
        if guide_denoiser is not None and c.guidance != 1:
            guide_network = self.accelerate(guide_denoiser)
            weights.append(c.guidance)
        records = []
        samples = []
        for w in weights:
            guided = guide.autoguided(main, guide_network, w)
            x, metrics = self.sample(guided, f"evaluating, guidance {w:g}")
            record = dict(progress, kind="eval") | self.protocol | dict(guidance=w)
            if w == 1:
                metrics |= self.losses(main)
            else:
                seconds, examples = self.guide_costs
                record["other_seconds"] += seconds
                record["other_examples"] += examples
            records.append(record | metrics)
            samples.append(x)
        self.write_picture(samples)
        return records

    def accelerate(self, denoiser):
        """The denoiser in the run's precision, compiled where the run is; made once for each denoiser."""
        if denoiser not in self.accelerated:
            c = self.c
            self.accelerated[denoiser] = model.accelerate(denoiser, c.device, c.bf16, c.compile)
        return self.accelerated[denoiser]

    def sample(self, denoiser, label="evaluating"):
        """(samples [n, ...] on the CPU, their metrics) of a denoiser for `guide.heun`. Shows progress."""
        c = self.c
        batches = []
        drawn = 0
        for x in self.sample_batches(denoiser):
            batches.append(x)
            drawn += len(x)
            data.progress(f"{label}: {drawn:,}/{c.eval_samples:,} samples", last=drawn == c.eval_samples)
        x = torch.cat(batches)
        if c.kind == "tree":
            return x.cpu(), tree_metrics(x, self.dataset, self.endpoints, self.exact_cells)
        if c.metrics == "none":
            return x, {}
        fake = extract(self.net, x, f"{label}, features")
        return x, image_metrics(self.real, fake, self.net.id, c.device, self.real_moments)

    def sample_batches(self, denoiser):
        """Yield samples [<= batch, ...]: points on the run's device; uint8 images or latents on the CPU."""
        c = self.c
        sampler = dict(steps=c.sampling_steps, sigma_max=c.sigma_max)
        if c.kind == "tree":
            for noise in self.noise.split(2048):
                yield guide.heun(denoiser, noise.to(c.device), **sampler)
            return
        labels = None
        if c.net_classes:
            labels = data.classes_in_turn(c.class_shares, torch.arange(c.eval_samples))
        batch = min(c.micro_batch or c.batch, c.eval_samples)
        for x in guide.generate(denoiser, range(c.eval_samples), labels, batch, c.device, **sampler):
            yield data.unscale(x, vars(c)).cpu()

    def losses(self, denoiser):
        """{"score_error": ...} on the tree, {"validation_loss": ...} where examples are held out."""
        if self.c.kind == "tree":
            return dict(score_error=score_error(denoiser, self.dataset, **self.c.eval_levels))
        if self.held_out is not None:
            return dict(validation_loss=self.validation_loss(denoiser))
        return {}

    @torch.no_grad()
    def validation_loss(self, denoiser):
        """Mean loss on the held-out examples, at noise that depends on the batch size alone."""
        c = self.c
        losses = []
        batches = data.Batches(self.dataset, c.batch, 0, c.device, flip=c.flip, purpose="validation-",
                               **c.eval_levels)
        for step, index in enumerate(self.held_out.split(c.batch)):
            padding = index[:1].expand(c.batch - len(index))    # batches of one size: one compiled graph
            batch = batches.of(torch.cat([index, padding]), step)
            outputs = []
            for rows in data.micro_batches(c.batch, c.micro_batch):
                micro_batch = batch.rows(rows)
                outputs.append(denoiser(micro_batch.x, micro_batch.sigma, micro_batch.labels))
            loss = model.per_example_loss(torch.cat(outputs), batch.x0, batch.sigma)
            losses.append(loss[:len(index)])
        return torch.cat(losses).mean().item()

    def write_picture(self, samples):
        """Write samples.png: real examples, or the tree's density, beside unguided and guided samples."""
        c = self.c
        titles = ["unguided samples"]
        if len(samples) > 1:
            titles.append(f"guided samples, w = {c.guidance:g}")
        if c.kind == "tree":
            titles.insert(0, "exact density")
            pictures = [data.density_picture(density) for density in (self.dataset, *samples)]
        else:
            titles.insert(0, "real examples")
            columns = min(c.classes or 10, 10)
            real = self.real_examples(min(c.eval_samples, 80))
            pictures = [data.image_grid(x[:80], columns) for x in (real, *samples)]
        with data.writing(self.folder / "samples.png") as file:
            data.panels(pictures, titles).save(file, format="PNG")

    def real_examples(self, n):
        """n examples of the data [n, C, H, W], of the same classes as the first n samples."""
        labels = torch.zeros(n, dtype=torch.int64)
        if self.c.classes:
            labels = data.classes_in_turn(self.c.class_shares, torch.arange(n))
        members = data.indices_by_class(self.dataset.labels, len(self.dataset))
        examples_of_class = [itertools.cycle(index.tolist()) for index in members]
        index = torch.tensor([next(examples_of_class[label]) for label in labels.tolist()])
        return self.dataset.x[data.put(index, self.dataset.x.device)].cpu()


# ------------------------------------------------------------------------------------------------------------
# Comparing runs. Runs whose folders differ only in -sSEED are one arm. A column is one metric at one weight
# of guidance, by one feature network, from one number of samples and of Heun steps. A run's curve is linear
# between its evaluations and ends with the last one.

AXES = {"examples": "examples trained on (other_examples: those of guides and proxies, not included)",
        "seconds": "seconds of training, those of guides and proxies included"}


class Column(typing.NamedTuple):
    metric: str                                 # "FD(own)" or "FD(own), guided 1.6"
    protocol: str                               # features, samples, Heun steps and data


def compare(paths, out="compare.svg", metric=None):
    """Compare run folders: two Markdown tables of mean ± std over an arm's runs, at equal examples and at
    equal seconds. Draws `metric` (None = the first) over seconds to the file `out`. Raises DataError."""
    arms = read_arms(paths)
    every_run = [run for runs in arms.values() for run in runs]
    columns = sorted(set().union(*every_run))
    drawn = column_to_draw(columns, metric)
    tables = [table(arms, columns, axis) for axis in AXES]
    lines = {}
    for arm, runs in arms.items():
        curves = [run[drawn]["seconds"] for run in runs if drawn in run]
        if curves:
            lines[arm] = mean_curve(curves)
    chart(out, f"{drawn.metric} ({drawn.protocol})", AXES["seconds"], lines)
    return "\n\n".join(tables)


def read_arms(paths):
    """{arm: [the curves of each run]} of run folders; a folder given twice counts once."""
    folders = list(dict.fromkeys(os.path.abspath(path) for path in paths))
    top = os.path.commonpath([os.path.dirname(folder) for folder in folders])
    arms = {}
    for folder in folders:
        arm = re.sub(r"-s\d+$", "", os.path.relpath(folder, top))
        arms.setdefault(arm, []).append(read_curves(folder))
    return arms


def read_curves(folder):
    """{Column: {axis: float64 [2, n], x above y}} of the evaluations in a run folder. Raises DataError."""
    points = {}
    with data.reading(folder, "a run folder of train.py"):
        for line in Path(folder, "log.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["kind"] == "eval":
                _add_points(points, record)
        if not points:
            raise ValueError("it has no evaluations")
    curves = {}
    for column, axes in points.items():
        curves[column] = {axis: np.array(sorted(axes[axis].items())).T for axis in AXES}
    return curves


def _add_points(points, record):
    """Add the metrics of one evaluation's record to `points`, {Column: {axis: {x: y}}}."""
    protocol = (f"{record['features']}, {record['samples']} samples, {record['sampling_steps']} steps, "
                f"data {record['data']}")
    suffix = ""
    if record["guidance"] != 1:
        suffix = f", guided {record['guidance']:g}"
    metrics = [name for name in record if name not in NOT_METRICS]
    for name in [*metrics, "other_examples"]:                   # what guides and proxies cost is a column
        if not np.isfinite(record[name]):
            continue
        column = points.setdefault(Column(name + suffix, protocol), {axis: {} for axis in AXES})
        column["examples"][record["examples_trained"]] = record[name]
        column["seconds"][record["seconds"] + record["other_seconds"]] = record[name]


def column_to_draw(columns, metric):
    """The first column of `metric`, or the first of all for None. Raises DataError where no run has it."""
    for column in columns:
        if metric in (None, column.metric):
            return column
    metrics = dict.fromkeys(column.metric for column in columns)
    raise data.DataError(f"--metric {metric}: the runs have {', '.join(metrics)}")


def table(arms, columns, axis):
    """The Markdown table of all arms at equal examples or seconds. Each column is read where the shortest of
    its own curves ends; the row "read at" says where that is."""
    names = [column.metric for column in columns]
    protocols = {column.protocol for column in columns}
    heading = f"At equal {AXES[axis]}."
    if len(protocols) == 1:                                     # say it once, not in every column
        heading += f"\nAll metrics are from {columns[0].protocol}."
    else:
        names = [f"{column.metric} ({column.protocol})" for column in columns]
    heading += "\nEach column is read where the shortest of its runs ends:"
    every_run = [run for runs in arms.values() for run in runs]
    counts = [str(len(runs)) for runs in arms.values()]
    cells_by_column = [["arm", "---", "read at", *arms], ["runs", "---", "", *counts]]
    for column, name in zip(columns, names):
        x = min(run[column][axis][0, -1] for run in every_run if column in run)
        cells = [name, "---", _number(x)]
        for runs in arms.values():
            curves = [run[column][axis] for run in runs if column in run]
            cells.append(_mean_at(x, curves))
        cells_by_column.append(cells)
    lines = [f"| {' | '.join(row)} |" for row in zip(*cells_by_column)]
    return heading + "\n\n" + "\n".join(lines)


def _mean_at(x, curves):
    """Text: mean ± std at x of the curves [2, n] that have begun there; "" for no curves."""
    if not curves:
        return ""
    values = [np.interp(x, *curve) for curve in curves if curve[0, 0] <= x]
    if not values:
        return f"from {_number(min(curve[0, 0] for curve in curves))} on"
    text = f"{np.mean(values):.4g}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.2g}"
    if len(values) < len(curves):
        text += f" ({len(values)} of {len(curves)})"
    return text


def _number(x):
    return f"{x:,.1f}".removesuffix(".0")


def mean_curve(curves):
    """(x [50], y [50]): the mean of curves [2, n] over the x that all of them reach."""
    low = max(curve[0, 0] for curve in curves)
    high = max(low, min(curve[0, -1] for curve in curves))
    x = np.linspace(low, high, 50)
    return x, np.mean([np.interp(x, *curve) for curve in curves], axis=0)


# ------------------------------------------------------------------------------------------------------------
# Command line.

USAGE = """REAL FAKE [flags]

examples:
  python fid.py --fit features.pt data/cifar10 --size 16                        # once: features to score by
  python fid.py data/cifar10 samples.npz --size 16 --features own:features.pt   # distance, precision, recall
  python fid.py --compare runs/uniform-s0 runs/uniform-s1 runs/ajest-s0         # tables and compare.svg"""
DESCRIPTION = "Score one set of images against another, or compare training runs."


def build_parser():
    """The parser of all flags."""
    parser = data.parser(DESCRIPTION, USAGE)
    number = data.number
    add = parser.add_argument
    add("paths", nargs="*", type=data.path, metavar="PATH",
        help="REAL FAKE: each a folder, zip or .npz of images, or an .npz of FID statistics (mu, sigma); "
        "with --fit one data set; with --compare run folders")
    add = parser.add_argument_group("what to do").add_mutually_exclusive_group().add_argument
    add("--fit", type=data.path, metavar="CKPT",
        help="fit a small classifier to labelled images and write it to CKPT")
    add("--compare", action="store_true",
        help="compare run folders at equal examples and at equal seconds; -s0 -s1 ... are one arm")
    add = parser.add_argument_group("images").add_argument
    add("--size", type=number(int, "[8, 4096]"), help="center-crop and resize to this many pixels")
    add("--features", default="inception",
        help="network that scores: inception (its distance is the FID), own:CKPT (made by --fit; for small "
        "images), or pixels (8x8 averages, no network)")
    add = parser.add_argument_group("with --compare").add_argument
    add("--metric", help="metric to draw, as the tables name it; none = the first")
    add("--out", type=data.path, default="compare.svg", metavar="FILE.svg", help="the chart")
    add = parser.add_argument_group("rarely changed").add_argument
    add("--epochs", type=number(int, "[1, 10000]"),
        help="of --fit, passes over the data; none = 15 on CUDA, else 3")
    add("--width", type=number(int, "[1, 512]"),
        help="of --fit, channels of the first layer, an eighth of the features; none = 64 on CUDA, else 8")
    add("--seed", type=number(int, "[0, 1e15]"), default=0, help="of --fit, for weights and held-out tenth")
    add("--inception-weights", type=data.path, metavar="FILE",
        help="weights of inception; none = the file $FID_INCEPTION_WEIGHTS, else a download, which is kept")
    add("--device", type=data.device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda")
    return parser


def main(argv=None):
    """Carry out the command: compare runs, fit a classifier, or score FAKE against REAL."""
    args = build_parser().parse_args(argv)
    if not args.out.endswith(".svg"):
        raise data.DataError(f"--out {args.out}: the chart is an .svg")
    if args.compare:
        if not args.paths:
            raise data.DataError("--compare needs one or more run folders")
        data.require_writable(args.out)
        data.say(compare(args.paths, args.out, args.metric), file=sys.stdout)
    elif args.fit:
        if len(args.paths) != 1:
            raise data.DataError(f"--fit needs one data set, not {len(args.paths)}")
        data.require_writable(args.fit)
        dataset = data.load(args.paths[0], args.size)
        accuracy = fit(args.fit, dataset, args.epochs, args.width, args.device, args.seed)
        data.say(f"{args.fit}: held-out accuracy {accuracy:.4f}, use it with --features own:{args.fit}",
                 file=sys.stdout)
    else:
        if len(args.paths) != 2:
            raise data.DataError(f"two paths are needed, REAL and FAKE, not {len(args.paths)} "
                                 "(or give --fit or --compare)")
        if args.inception_weights and args.features != "inception":
            raise data.DataError(f"--inception-weights has no effect with --features {args.features}")
        data.say(score(args), file=sys.stdout)


def score(args):
    """One line of text: the metrics of FAKE against REAL, how many images there are, and the features."""
    published = []                                              # of REAL and FAKE: (mu, sigma) or None
    datasets = []                                               # the others: data.Dataset or None
    for path in args.paths:
        mu_sigma = statistics(path)
        dataset = None
        if mu_sigma is None:
            dataset = load_images(path, args.size)
        published.append(mu_sigma)
        datasets.append(dataset)
    if published[0] is None and published[1] is None:
        metrics, net_id = score_images(args, *datasets)
    else:
        metrics, net_id = score_statistics(args, published, datasets)
    values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    counts = []
    for side, dataset in zip(("real", "fake"), datasets):
        count = "unknown number of" if dataset is None else len(dataset)
        counts.append(f"{count} {side}")
    return f"{values}  ({', '.join(counts)}, features {net_id})"


def load_images(path, size):
    """The Dataset at `path`; its report and a warning of few images go to stderr. Raises DataError."""
    dataset = data.load(path, size)
    data.say(f"{path}: {', '.join(dataset.report)}")
    if len(dataset) < 2:
        raise data.DataError(f"{path}: only one image, and a Fréchet distance needs 2 or more on each side")
    warn_of_few(len(dataset), path)
    return dataset


def score_images(args, real, fake):
    """(metrics, id of the features) of two Datasets."""
    real_path, fake_path = args.paths
    if real.shape != fake.shape:
        raise data.DataError(f"{real_path} is {list(real.shape)}, {fake_path} {list(fake.shape)}: "
                             "give --size")
    net = network(args.features, args.device, args.inception_weights)
    real_features, _ = data_features(net, real, real_path)
    fake_features, _ = data_features(net, fake, fake_path)
    return image_metrics(real_features, fake_features, net.id, args.device), net.id


def score_statistics(args, published, datasets):
    """(the FID alone, id of the features) if one or both sides are given as (mu, sigma)."""
    if args.features != "inception":
        raise data.DataError(f"--features {args.features}: statistics (mu, sigma) are those of inception")
    net_id = "inception"
    sides = []
    for path, mu_sigma, dataset in zip(args.paths, published, datasets):
        if dataset is None:
            sides.append(mu_sigma)
        else:
            net = network("inception", args.device, args.inception_weights)
            net_id = net.id
            features, _ = data_features(net, dataset, path)
            sides.append(moments(features))
    (mu1, sigma1), (mu2, sigma2) = sides
    if mu1.shape != mu2.shape:
        raise data.DataError(f"{len(mu1)} and {len(mu2)} features cannot be compared")
    return {"FID": frechet(mu1, sigma1, mu2, sigma2)}, net_id


def statistics(path):
    """(mu [d], sigma [d, d]) float64 from an .npz of pytorch-fid. None for all other files. Raises DataError
    for a damaged .npz."""
    if not path.endswith(".npz"):
        return None
    with data.reading(path, "statistics (mu [d], sigma [d, d], finite), nor a data set"):
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                return None
            mu = torch.from_numpy(file["mu"].astype(np.float64))
            sigma = torch.from_numpy(file["sigma"].astype(np.float64))
        finite = (mu.norm() + sigma.norm()).isfinite()
        if mu.ndim != 1 or len(mu) < 1 or sigma.shape != (len(mu), len(mu)) or not finite:
            raise ValueError(f"mu is {list(mu.shape)}, sigma {list(sigma.shape)}")
    return mu, sigma


# ------------------------------------------------------------------------------------------------------------
# Features without a network.

class Pixels(torch.nn.Module):
    """[N, C, H, W], uint8 or float latents -> float32 [N, 64 C], 8x8 area averages: crude, but no network."""
    id = "pixels"
    size = None

    def forward(self, x):
        floats = x.float()
        if x.dtype == torch.uint8:
            floats = floats / 127.5 - 1
        return F.adaptive_avg_pool2d(floats, 8).flatten(1)


# ------------------------------------------------------------------------------------------------------------
# Own features: a small residual classifier for any resolution from 8 pixels up. Its features are the last
# activations, averaged over positions.

class Classifier(torch.nn.Module):
    """uint8 [N, 3, H, W] -> float32 features [N, 8 width]; `logits(images)` [N, classes] for training."""

    def __init__(self, classes, width=64):
        super().__init__()
        w = width
        halve = torch.nn.MaxPool2d(2)
        self.body = torch.nn.Sequential(
            _conv(3, w), _conv(w, 2 * w), halve, Residual(2 * w),
            _conv(2 * w, 4 * w), halve, _conv(4 * w, 8 * w), halve, Residual(8 * w))
        self.head = torch.nn.Linear(8 * w, classes)

    def forward(self, images):
        x = (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        return self.body(x).float().mean((2, 3))

    def logits(self, images):
        return self.head(self(images))


class Residual(torch.nn.Module):
    """x + two convolutions of x."""

    def __init__(self, channels):
        super().__init__()
        self.body = torch.nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, x):
        return x + self.body(x)


def _conv(c_in, c_out):
    return torch.nn.Sequential(torch.nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
                               torch.nn.BatchNorm2d(c_out), torch.nn.ReLU())


def load_classifier(path):
    """The Classifier in a file of `fit`, with its `id` and `size`. Raises DataError."""
    with data.reading(path, "a classifier (fid.py --fit)"):
        file = model.load_checkpoint(path)
        make = functools.partial(Classifier, len(file["class_names"]), file["width"])
        net = model.with_weights(make, file["model"])
        net.size = file["size"]
        net.id = _id_of_file("own", path)
    return net


def _id_of_file(kind, path):
    """The id of a network from a file: "KIND:HASH", or "inception" for the published weights."""
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if digest.startswith(WEIGHTS_HASH):
        return kind
    return f"{kind}:{digest[:12]}"


# ------------------------------------------------------------------------------------------------------------
# Fitting a classifier: SGD with Nesterov momentum under a one-cycle learning rate, up for a quarter of the
# steps, then down to 0. A tenth of the examples is held out.

def fit(
    path,                   # file to write
    dataset,                # data.Dataset of labelled images
    epochs=None,            # passes over nine tenths of it; None = 15 on CUDA, 3 elsewhere
    width=None,             # channels of the first layer; None = 64 on CUDA, 8 elsewhere
    device="cpu",
    seed=0,                 # of the held-out tenth, the weights and the order
):
    """Train a Classifier and write it to `path`; -> its accuracy on the held-out tenth. Raises DataError."""
    if dataset.kind != "image" or dataset.classes < 2 or len(dataset) < 20 or min(dataset.shape[1:]) < 8:
        raise data.DataError("--fit needs 20 or more images of two or more classes, of at least 8x8 pixels")
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    if epochs is None:
        epochs = 15 if on_cuda else 3
    if width is None:
        width = 64 if on_cuda else 8
    torch.manual_seed(seed)
    held_out, index = torch.randperm(len(dataset)).tensor_split([len(dataset) // 10])
    batch = min(512 if on_cuda else 128, len(index))
    steps_per_epoch = len(index) // batch
    steps = epochs * steps_per_epoch
    dataset = dataset.to(device)
    generator = data.stream(seed, 0, "augment", device)
    net = Classifier(dataset.classes, width).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.4 * batch / 512, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.25 * steps), (steps - step) / (0.75 * steps)))
    cast = torch.autocast(device.type, torch.bfloat16, enabled=on_cuda)
    for epoch in range(1, epochs + 1):
        net.train()
        for rows in index[torch.randperm(len(index))].split(batch)[:steps_per_epoch]:
            images, labels = _images_and_labels(dataset, rows, device)
            with cast:
                logits = net.logits(_augment(images, generator))
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        net.eval()
        with torch.no_grad(), cast:
            accuracy = _accuracy(net, dataset, held_out, device)
        data.progress(f"epoch {epoch}/{epochs}  loss {loss.item():.3f}  held-out accuracy {accuracy:.4f}",
                      last=epoch == epochs)
    state = {key: value.cpu() for key, value in net.state_dict().items()}
    with data.writing(path) as file:
        torch.save(dict(kind="classifier", width=width, class_names=list(dataset.class_names),
                        size=dataset.shape[-1], accuracy=accuracy, model=state), file)
    return accuracy


def _images_and_labels(dataset, rows, device):
    """(uint8 [n, 3, H, W], int64 [n]) on `device` of the examples at `rows`, int64 [n] on the host."""
    images = dataset.x[data.put(rows, dataset.x.device)]
    return data.put(images, device), data.put(dataset.labels[rows], device)


def _accuracy(net, dataset, index, device):
    """Share of the examples at `index` whose class the network predicts."""
    right = []
    for rows in index.split(1000):
        images, labels = _images_and_labels(dataset, rows, device)
        right.append(net.logits(images).argmax(1) == labels)
    return torch.cat(right).float().mean().item()


def _augment(images, generator, shift=4):
    """Move each image [N, C, H, W] by up to `shift` pixels (mirrored border), flip half of them; floats."""
    n, _, h, w = images.shape
    device = images.device
    padded = F.pad(images.float(), (shift, shift, shift, shift), mode="reflect")
    y, x = torch.randint(2 * shift + 1, (2, n, 1), generator=generator, device=device)
    flip = torch.rand(n, 1, generator=generator, device=device) < 0.5
    column = torch.arange(w, device=device)
    rows = y + torch.arange(h, device=device)                                           # [n, h]
    columns = x + torch.where(flip, column.flip(0), column)                             # [n, w]
    example = torch.arange(n, device=device)[:, None, None]
    return padded[example, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------------------
# The FID Inception network (TensorFlow's graph of 2015-12-05). A block is lines of convolutions, each "name
# channels kernel". A line starts at the block's input x, at its pooled input, or at a convolution of an
# earlier line. The ends of all lines are concatenated. "3s2" is 3x3 with stride 2, no padding; others keep
# the size.

WEIGHTS_HASH = "6726825d"                       # the first digits of the SHA-256 of the published file
WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               f"pt_inception-2015-12-05-{WEIGHTS_HASH}.pth")
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
        self.pool = POOLS[pool]
        self.lines = []                                         # of each line: [source, convolution, ...]
        channels = {"x": c_in, "pool": c_in}
        for line in lines.format(n=n).split("\n"):
            source, *convolutions = line.split(">")
            names = [source.strip()]
            for convolution in convolutions:
                name, c_out, kernel = convolution.split()
                channels[name] = int(c_out)
                setattr(self, name, _inception_conv(channels[names[-1]], int(c_out), kernel))
                names.append(name)
            self.lines.append(names)
        self.channels = sum(channels[names[-1]] for names in self.lines)

    def forward(self, x):
        value = {"x": x, "pool": self.pool(x)}
        for names in self.lines:
            for before, name in zip(names, names[1:]):
                value[name] = getattr(self, name)(value[before]).relu_()
        return torch.cat([value[names[-1]] for names in self.lines], 1)


def _inception_conv(c_in, c_out, kernel):
    """The convolution of a kernel such as "1x7", or "3s2"."""
    if kernel == "3s2":
        return torch.nn.Conv2d(c_in, c_out, 3, stride=2)
    height = int(kernel[0])
    width = int(kernel[2])
    return torch.nn.Conv2d(c_in, c_out, (height, width), padding=(height // 2, width // 2))


class Inception(torch.nn.Module):
    """uint8 [N, 3, H, W] -> float32 [N, 2048]. Batch norms (eps 0.001) are folded into the convolutions while
    the weights are loaded; the classifier on top is left out."""
    size = None

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


def load_inception(path=None):
    """Inception with the weights in the file `path`; None = the file in torch's hub cache, which is
    downloaded first if it does not exist. Raises DataError."""
    advice = "give them in $FID_INCEPTION_WEIGHTS or by fid.py --inception-weights, or use own:CKPT"
    if path is None:
        path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(WEIGHTS_URL))
        if not os.path.exists(path):
            with data.reading(WEIGHTS_URL, f"downloaded ({advice})"):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                torch.hub.download_url_to_file(WEIGHTS_URL, path, WEIGHTS_HASH, progress=False)
        advice = f"delete this file, its download broke off; or {advice}"
    else:
        path = data.path(path)
    with data.reading(path, f"the FID Inception weights ({advice})"):
        state = model.load_checkpoint(path)
        net = model.with_weights(Inception, _fold_batch_norms(state))
        net.id = _id_of_file("inception", path)
    return net


def _fold_batch_norms(state):
    """{X.conv.weight, X.bn.*} -> {X.weight, X.bias}, such that conv(x) equals the original bn(conv(x))."""
    folded = {}
    for key, weight in state.items():
        if not key.endswith(".conv.weight"):
            continue
        name = key.removesuffix(".conv.weight")
        gamma = state[f"{name}.bn.weight"].double()
        beta = state[f"{name}.bn.bias"].double()
        mean = state[f"{name}.bn.running_mean"].double()
        scale = gamma / (state[f"{name}.bn.running_var"].double() + 0.001).sqrt()
        folded[f"{name}.weight"] = (weight.double() * scale[:, None, None, None]).float()
        folded[f"{name}.bias"] = (beta - mean * scale).float()
    return folded


# ------------------------------------------------------------------------------------------------------------
# A chart as SVG: polylines, five ticks an axis, a legend.

COLORS = "#1f5fa8 #d1495b #2e8b57 #e08e1b #7b4ea3 #159aa8 #8c5a3c #d35fa5 #555555 #9aa51f".split()


def chart(path, title, x_name, lines):
    """Draw `lines`, {name: (x [n], y [n])} of arrays, to an .svg."""
    x_low, x_high = _limits([x for x, _ in lines.values()])
    y_low, y_high = _limits([y for _, y in lines.values()])

    def right(x):                                               # pixels from the left edge
        return 60 + (x - x_low) / (x_high - x_low) * 560

    def down(y):                                                # pixels from the upper edge
        return 340 - (y - y_low) / (y_high - y_low) * 300
    shapes = [_svg_text(60, 20, title), _svg_text(60, 390, x_name)]
    for x in np.linspace(x_low, x_high, 5):
        shapes.append(_svg_text(right(x), 362, f"{x:.4g}", 'text-anchor="middle"'))
    for y in np.linspace(y_low, y_high, 5):
        shapes.append(_svg_text(2, down(y) + 4, f"{y:.3g}"))
        shapes.append(f'<path d="M60 {down(y):.0f}h560" stroke="#ddd"/>')
    legend = 50
    for (name, (x, y)), color in zip(lines.items(), itertools.cycle(COLORS)):
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(right(x), down(y)))
        shapes.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        shapes.append(_svg_text(635, legend, name, f'fill="{color}"'))
        legend += 18
    with data.writing(path) as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {max(400, legend)}" '
                   'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>'
                   f'{"".join(shapes)}</svg>'.encode(errors="replace"))


def _limits(arrays):
    """(lowest, highest) of some arrays, never equal."""
    values = np.concatenate(arrays)
    low = values.min()
    high = values.max()
    if low == high:
        high = low + 1
    return low, high


def _svg_text(x, y, words, attributes=""):
    return f'<text x="{x:.0f}" y="{y:.0f}" {attributes}>{escape(words)}</text>'


if __name__ == "__main__":
    data.command(main)
