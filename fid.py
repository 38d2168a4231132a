"""Metrics of samples, the evaluation of a training run, and the comparison of runs.

    python fid.py --fit features.pt data/cifar10 --size 16                        once: features to score by
    python fid.py data/cifar10 samples.npz --size 16 --features own:features.pt   distance, precision, recall
    python fid.py --compare runs/uniform-s0 runs/uniform-s1 runs/ajest-s0         tables and compare.png

Fréchet Inception distance: https://arxiv.org/abs/1706.08500. Improved precision and recall:
https://arxiv.org/abs/1904.06991. Images are always scored as uint8. The feature networks and the command line
stand at the end of the file.
"""
import argparse
import functools
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import data
import guide
import model
from data import neighbour_distance


# ------------------------------------------------------------------------------------------------------------
# The Fréchet distance of two Gaussians: |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr sqrt(S1 S2). S1 S2 has the
# eigenvalues of the symmetric R^T S2 R for any R with R R^T = S1, so no general matrix square root is needed:
# R is the Cholesky factor of S1, or comes from its eigenvectors where S1 does not have full rank.

def moments(features):
    """(mu float64 [d], sigma float64 [d, d]) of features [n, d]. Raises DataError if n < 2."""
    if len(features) < 2:
        raise data.DataError("a Fréchet distance needs 2 or more examples on each side, and this is one")
    x = features.double()
    return x.mean(0), torch.atleast_2d(torch.cov(x.T))


def frechet(mu1, sigma1, mu2, sigma2):
    """Fréchet distance of N(mu1 [d], sigma1 [d, d]) and N(mu2, sigma2), all float64."""
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
    """(precision, recall) of features real float64 [n, d] and fake [m, d], n and m > k."""
    return _share_inside(fake, real, k, block), _share_inside(real, fake, k, block)


def _share_inside(points, centres, k, block):
    """Share of points [n, d] in any of the balls around centres [m, d] that reach to the k-th neighbour."""
    radius = neighbour_distance(centres, k)                                             # [m]
    inside = [(torch.cdist(rows, centres) <= radius).any(1) for rows in points.split(block)]
    return torch.cat(inside).float().mean().item()


# ------------------------------------------------------------------------------------------------------------
# All metrics of two image sets, from their features.

def image_metrics(real, fake, net_id, device="cpu", real_moments=None, most=10_000):
    """{distance, "precision", "recall"} of features real [n, d] and fake [m, d] of the network `net_id`.

    The distance is called FID for Inception's features alone. Precision and recall take at most `most`
    examples of each set, drawn at random, and are left out if a set has 3 or fewer. `real_moments` is
    moments(real); None = computed here. Raises DataError.
    """
    mu, sigma = real_moments or moments(real)
    name = "FID" if net_id.startswith("inception") else f"FD({net_id.partition(':')[0]})"
    metrics = {name: frechet(mu, sigma, *moments(fake))}
    drawn = []
    for features in (real, fake):
        order = torch.randperm(len(features), generator=data.stream(0, 0, "metrics"))
        drawn.append(features[order[:most]].to(device).double())
    if min(len(real), len(fake)) > 3:
        metrics["precision"], metrics["recall"] = precision_recall(*drawn)
    return metrics


def warn_of_few(n, source):
    """Warn on stderr if n images are few enough to bias a Fréchet distance visibly; `source` names them."""
    if n < 2048:
        data.say(f"warning: {source}: only {n} images; below 2048 the distance is biased upwards")


# ------------------------------------------------------------------------------------------------------------
# Metrics of the 2-D tree, whose density and denoiser are known. A point is a hit if its log-density is at
# least -2.12. The cells are those of a 101x101 grid around the origin, 3 wide.

HIT_LOGP = -2.12
CELLS = 101


def tree_metrics(points, tree, endpoints):
    """Metrics of points [n, 2] that were sampled to follow the tree's density.

    hit         share of the points that are hits
    coverage    cells with a hit over cells with any point (the AJEST authors' "mandala score" on a grid of
                our own; their cells are 0.03 wide around (0.0030, 0.0325), and on equal points the two differ
                by up to 0.02). It is a share of the visited cells: a sampler that has collapsed scores 1
    reached     cells with a hit over the cells that n points of the tree itself hit: about 1 for a perfect
                sampler, near 0 for a collapsed one. It depends on n
    l2          mean distance of the first m points from `endpoints` [m, 2], where the exact denoiser's ODE
                ends from the same noise
    """
    exact = tree.sample(len(points), data.stream(0, 0, "reached", tree.device))
    exact_cells = _cells(exact[tree.logp(exact) >= HIT_LOGP]).unique()
    hit = tree.logp(points) >= HIT_LOGP
    visited = _cells(points).unique()
    hit_cells = _cells(points[hit]).unique()
    l2 = (points[:len(endpoints)] - endpoints).norm(dim=1).mean()
    return dict(hit=hit.float().mean().item(), coverage=len(hit_cells) / max(len(visited), 1),
                reached=len(hit_cells) / max(len(exact_cells), 1), l2=l2.item())


def _cells(points):
    """The numbers int64 [<= n] of the grid cells of points [n, 2], without those outside of the grid."""
    cell = ((points.double() / 3 + 0.5) * CELLS).floor().long()                         # [n, 2]
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
    D_x = torch.cat([denoiser(x[rows], sigma[rows], None) for rows in data.micro_batches(n, 4096)])
    return model.per_example_loss(D_x, tree.denoise(x, sigma), sigma).mean().item()


# ------------------------------------------------------------------------------------------------------------
# A feature network by its name, and features of a set of images, computed batch by batch. Those of a data set
# are computed once and cached.

def features_name(text):
    """An argparse type: pixels, inception, none, or own:CKPT, whose path becomes absolute."""
    if text.startswith("own:"):
        return f"own:{os.path.abspath(data.path(text.removeprefix('own:')))}"
    if text not in ("pixels", "inception", "none"):
        raise argparse.ArgumentTypeError(f"{text}: give pixels, inception or own:CKPT (of fid.py --fit CKPT)")
    return text


def network(name, device="cpu", weights=None):
    """The module of "inception", "own:CKPT" (a file of fid.py --fit) or "pixels" on `device`.

    It maps uint8 [N, 3, H, W] ("pixels" also latents) to float32 [N, d]. Its `.id` is the same for the same
    weights, whatever their file is called; `.size` is the image size that it was fitted to, None for any.
    `weights` is for `load_inception`. Raises DataError.
    """
    if name == "pixels":
        net = Pixels()
    elif name == "inception":
        net = load_inception(weights)
    else:
        net = load_classifier(name.removeprefix("own:"))
    net.device = torch.device(device)
    return net.to(net.device, memory_format=torch.channels_last).eval().requires_grad_(False)


def extract(net, x, label="features", batch=128):
    """Features float32 [n, d], on the CPU, of x uint8 or float [n, C, H, W] on any device. The last batch is
    padded, so that the network sees one shape. Shows progress under `label`. Raises DataError."""
    if net.id != "pixels" and x.dtype != torch.uint8:
        raise data.DataError(f"{net.id} features are of images, and these are latents: give pixels")
    if net.size is not None and net.size != x.shape[-1]:
        raise data.DataError(f"{net.id} is for {net.size} pixels, not {x.shape[-1]}: give --size {net.size}")
    n = len(x)
    size = min(batch, n)
    padded = F.pad(torch.arange(n), (0, -n % size))
    batches = (net(data.put(x[data.put(rows, x.device)], net.device)) for rows in padded.split(size))
    with torch.backends.cudnn.flags(torch.backends.cudnn.enabled, allow_tf32=False):    # fp32, as on a CPU
        features = torch.cat(list(with_progress(batches, n, label)))[:n].cpu()
    if not features.isfinite().all():
        raise data.DataError(f"the features of {net.id} are not finite for these images")
    return features


def with_progress(batches, total, label):
    """Yield the batches, and show how many of `total` examples are done and the time left."""
    start = time.monotonic()
    done = 0
    for batch in batches:
        done = min(done + len(batch), total)
        left = (time.monotonic() - start) * (total - done) / done
        data.progress(f"{label}: {done:,}/{total:,}, {left:.0f} s left", last=done == total)
        yield batch


def data_features(net, dataset, label="features of the data"):
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
    with data.reading(path, "features of this program (delete it)"), np.load(path) as file:
        return torch.from_numpy(file["features"]), float(file["seconds"])


# ------------------------------------------------------------------------------------------------------------
# Evaluation of a run, unguided and guided, always from the same noise, so that runs and steps compare. Its
# records say by what protocol the metrics were taken; `--compare` joins only records of one protocol.

class Evaluation:
    """evaluation(denoiser, guide_denoiser, progress, log) adds its records to the log, unless they are in it,
    and prints them; -> whether it added any. Also draws samples.png.

    denoiser        model.Denoiser in evaluation mode, which holds the averaged weights
    guide_denoiser  the same for the guide; None = there is no guide
    progress        what the run has done so far; each record repeats it

    The first record is of unguided samples. With a guide and a weight other than 1, a second one is of guided
    samples. Samples that are not finite have no metrics.
    """

    def __init__(self, c, dataset, folder, held_out=None):
        """Settings of train.py; the data set on its device; where samples.png is drawn; the indices of the
        examples for the validation loss, None = it is not computed."""
        self.c = c
        self.dataset = dataset
        self.folder = Path(folder)
        self.held_out = held_out
        self.guide_cost = (0.0, 0)      # (seconds, examples) of a guide that is used only in sampling
        self.accelerate = functools.cache(              # once for each denoiser: it may be compiled
            functools.partial(model.accelerate, device=c.device, bf16=c.bf16, compiled=c.compile))
        self.sampler = dict(steps=c.sampling_steps, sigma_max=c.sigma_max)
        self.labels = data.classes_in_turn(c.class_shares, torch.arange(c.eval_samples))
        features = "tree" if c.kind == "tree" else "none"
        if c.kind == "tree":
            self.noise = torch.randn(c.eval_samples, 2, generator=data.stream(0, 0, "eval")).to(c.device)
            self.endpoints = guide.heun(dataset.denoise, self.noise[:4096], **self.sampler)
        elif c.metrics != "none":
            self.net = network(c.metrics, c.device)
            features = self.net.id
            self.real, _ = data_features(self.net, dataset)
            self.real_moments = moments(self.real)
            warn_of_few(c.eval_samples, "--eval-samples")
        self.protocol = dict(features=features, data=c.fingerprint[:8], samples=c.eval_samples,
                             sampling_steps=c.sampling_steps)

    def __call__(self, denoiser, guide_denoiser, progress, log):
        titles = {1.0: "unguided samples"}                      # {weight of guidance: title in samples.png}
        if guide_denoiser is not None and self.c.guidance != 1:
            titles[self.c.guidance] = f"guided samples, w = {self.c.guidance:g}"
        is_new = any(self.logged(log, progress["step"], w) is None for w in titles)
        if is_new:
            log += self.records(denoiser, guide_denoiser, progress, titles)
        for w in titles:
            record = self.logged(log, progress["step"], w)
            words = "  ".join(f"{name} {record[name]:.4f}" for name in record["metrics"])
            if words:
                way = "unguided" if w == 1 else f"guidance {w:g}"
                data.say(f"step {record['step']}, {way} ({record['samples']:,} samples):  {words}",
                         file=sys.stdout)
        return is_new

    def logged(self, log, step, guidance):
        """The last record in the log of this step, weight of guidance and protocol; None = there is none."""
        wanted = dict(self.protocol, kind="eval", step=step, guidance=guidance)
        records = [record for record in log if wanted.items() <= record.items()]
        return records[-1] if records else None

    def records(self, denoiser, guide_denoiser, progress, titles):
        """Records of new samples at each weight of guidance in `titles`; also draws samples.png."""
        main = self.accelerate(denoiser)
        guide_network = self.accelerate(guide_denoiser)         # not called at weight 1
        records = []
        samples = {}
        for w, title in titles.items():
            metrics = {}
            try:
                samples[title] = self.sample(guide.autoguided(main, guide_network, w), title)
                metrics = self.metrics(samples[title], title)
                if w == 1:
                    metrics |= self.losses(main)
            except data.DataError as error:                     # samples that are not finite
                data.say(f"step {progress['step']}, {title}: no metrics, {error}")
            record = dict(progress, kind="eval", guidance=w, metrics=list(metrics)) | self.protocol | metrics
            if w != 1:
                record["other_seconds"] += self.guide_cost[0]
                record["other_examples"] += self.guide_cost[1]
            records.append(record)
        self.write_picture(samples)
        return records

    def sample(self, denoiser, label="samples"):
        """Samples [n, ...] on the CPU: points, uint8 images or latents. DataError if they are not finite."""
        c = self.c
        if c.kind == "tree":
            batches = (guide.heun(denoiser, noise, **self.sampler) for noise in self.noise.split(2048))
        else:
            batch = min(c.micro_batch or c.batch, c.eval_samples)
            labels = self.labels if c.classes else None
            batches = guide.generate(denoiser, range(c.eval_samples), labels, batch, c.device, **self.sampler)
        batches = with_progress(batches, c.eval_samples, label)
        return torch.cat([data.unscale(x, vars(c)).cpu() for x in batches])

    def metrics(self, x, label="samples"):
        """The metrics of samples x [n, ...]."""
        if self.c.kind == "tree":
            return tree_metrics(x.to(self.c.device), self.dataset, self.endpoints)
        if self.c.metrics == "none":
            return {}
        fake = extract(self.net, x, f"features of {label}")
        return image_metrics(self.real, fake, self.net.id, self.c.device, self.real_moments)

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
        batches = data.Batches(
            self.dataset, c.batch, 0, c.device, flip=c.flip, purpose="validation-", **c.eval_levels)
        for step, index in enumerate(self.held_out.split(c.batch)):
            padding = index[:1].expand(c.batch - len(index))    # batches of one size: one compiled graph
            batch = batches.of(torch.cat([index, padding]), step)
            micro_batches = [batch.rows(rows) for rows in data.micro_batches(c.batch, c.micro_batch)]
            D_x = torch.cat([denoiser(micro.x, micro.sigma, micro.labels) for micro in micro_batches])
            losses.append(model.per_example_loss(D_x, batch.x0, batch.sigma)[:len(index)])
        return torch.cat(losses).mean().item()

    def write_picture(self, samples):
        """Write samples.png: the tree's density, or real examples, beside {title: samples [n, ...]}."""
        if self.c.kind == "tree":
            titles = ["exact density", *samples]
            pictures = [data.density_picture(density) for density in (self.dataset, *samples.values())]
        else:
            titles = ["real examples", *samples]
            labels = self.labels[:80]
            pictures = [data.class_picture(x[:80], labels, self.c.class_names)
                        for x in (self.real_examples(labels), *samples.values())]
        with data.writing(self.folder / "samples.png") as file:
            data.panels(pictures, titles).save(file, format="PNG")

    def real_examples(self, labels):
        """Examples of the data [n, C, H, W] of the classes `labels` [n]."""
        members = data.indices_by_class(self.dataset.labels, len(self.dataset))
        turns = [(labels[:i] == c).sum() for i, c in enumerate(labels)]         # each class by turns
        index = torch.stack([members[c][turn % len(members[c])] for c, turn in zip(labels, turns)])
        return self.dataset.x[data.put(index, self.dataset.x.device)].cpu()


# ------------------------------------------------------------------------------------------------------------
# Comparing runs. Runs whose folders differ only in -sSEED are one arm. A row is one metric at one weight of
# guidance, and its protocol; a run has points [n, 3] of it: examples, seconds, values. Its curve is linear
# between its evaluations and ends with the last one.

AXES = ("examples trained on (other_examples: those of guides and proxies, not included)",
        "seconds of training, those of guides and proxies included")


def compare(folders, out="compare.png", metric=None):
    """Compare run folders: two Markdown tables of mean ± std over an arm's runs, at equal examples and at
    equal seconds. Draws `metric` (None = the first) over seconds to the file `out`. Raises DataError."""
    seeds, curves = read_arms(folders)
    drawn = [row for row in sorted(curves) if metric in (None, row[0])]
    if not drawn:
        raise data.DataError(f"--metric: the runs have {sorted({name for name, _ in curves})}")
    chart(out, ", ".join(drawn[0]), curves[drawn[0]])
    return "\n\n".join(table(seeds, curves, axis) for axis in range(2))


def read_arms(folders):
    """-> ({arm: the seeds of its runs}, {row: {arm: [points [n, 3] of each run]}}) of run folders; a folder
    given twice counts once. DataError where the runs of an arm do not differ in their seeds alone."""
    settings = {}                                               # {arm: {seed: settings}}
    curves = {}
    for folder in dict.fromkeys(map(os.path.relpath, folders)):
        arm = re.sub(r"-s\d+$", "", folder)
        config, points = read_run(folder)
        shared = shared_settings(config)
        seeds = settings.setdefault(arm, {})
        if config["seed"] in seeds:
            raise data.DataError(f"{arm}: two of its runs have --seed {config['seed']}")
        seeds[config["seed"]] = shared
        for name, value in next(iter(seeds.values())).items():
            if shared[name] != value:
                raise data.DataError(f"{arm}: its runs have {name} {value} and {shared[name]}: rename a run")
        for row, values in points.items():
            curves.setdefault(row, {}).setdefault(arm, []).append(values)
    return settings, curves


def shared_settings(config):
    """The settings that the runs of an arm share: all but the seed and what may differ on resume; of those
    that may name a file, whether they do."""
    names = (config.keys() - data.MAY_DIFFER | set(data.FILES)) - {"seed"}
    is_path = {name: os.path.isabs(str(config[name]).removeprefix("own:")) for name in names}
    return {name: "a file" if is_path[name] else config[name] for name in sorted(names)}


def read_run(folder):
    """-> (settings, {row: points [n, 3]}) of a run folder, without values that are not finite."""
    points = {}
    with data.reading(folder, "a run folder of train.py"):
        config = json.loads(Path(folder, "config.json").read_bytes())
        model.check_format(config)
        log = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
        for record in [record for record in log if record["kind"] == "eval"]:
            guided = "" if record["guidance"] == 1 else f", guided {record['guidance']:g}"
            protocol = "{features}, {samples} samples, {sampling_steps} steps, data {data}".format(**record)
            seconds = record["seconds"] + record["other_seconds"]
            for name in [*record["metrics"], "other_examples"]:
                if np.isfinite(record[name]):
                    row = points.setdefault((name + guided, protocol), [])
                    row.append((record["examples_trained"], seconds, record[name]))
    return config, {row: np.array(sorted(values)) for row, values in points.items()}


def table(seeds, curves, axis):
    """The Markdown table at equal examples (axis 0) or seconds (1) of what `read_arms` returned. Each row is
    read where the shortest of its own curves ends."""
    head = ["metric", "protocol", "read at", *(f"{arm} ({len(seeds[arm])})" for arm in seeds)]
    lines = [head, ["---" for _ in head]]
    for row, arms in sorted(curves.items()):
        x = min(points[-1, axis] for runs in arms.values() for points in runs)
        cells = [mean_at(x, axis, arms.get(arm, []), len(seeds[arm])) for arm in seeds]
        lines.append([*row, f"{x:,.1f}".removesuffix(".0"), *cells])
    text = f"At equal {AXES[axis]}.\nEach row is read where its shortest run ends; (n) = n runs:\n"
    return "\n".join([text, *(f"| {' | '.join(cells)} |" for cells in lines)])


def mean_at(x, axis, curves, n):
    """Text: mean ± std at x over the curves that have begun there, and how many they are if fewer than n."""
    values = [np.interp(x, points[:, axis], points[:, 2]) for points in curves if points[0, axis] <= x]
    text = f"{np.mean(values):.4g}" if values else "none"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.2g}"
    if len(values) < n:
        text += f" ({len(values)} of {n})"
    return text


COLORS = "#1f5fa8 #d1495b #2e8b57 #e08e1b #7b4ea3 #159aa8 #8c5a3c #d35fa5 #555555 #9aa51f".split()


def chart(path, title, arms):
    """Draw {arm: [points [n, 3] of each run]} over seconds to a .png: a line for each run, a dot for each
    evaluation; the titles say what the axes span."""
    points = np.concatenate([run for runs in arms.values() for run in runs])
    low = points.min(0)
    span = np.maximum(points.max(0) - low, 1e-12)
    picture = Image.new("RGB", (1000, max(400, 60 + 18 * len(arms))), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((70, 10), f"{title}: {low[2]:.4g} to {low[2] + span[2]:.4g}", "black")
    draw.text((70, 375), f"{AXES[1]}: {low[1]:.4g} to {low[1] + span[1]:.4g}", "black")
    for i, (arm, runs) in enumerate(arms.items()):
        color = COLORS[i % len(COLORS)]
        draw.text((640, 40 + 18 * i), arm, color)
        for run in runs:
            pixels = [(70 + 550 * x, 340 - 300 * y) for _, x, y in (run - low) / span]
            draw.line(pixels, color, 2)
            for x, y in pixels:
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), color)
    with data.writing(path) as file:
        picture.save(file, format="PNG")


# ------------------------------------------------------------------------------------------------------------
# Features without a network.

class Pixels(torch.nn.Module):
    """[N, C, H, W], uint8 or float latents -> float32 [N, 64 C], 8x8 area averages: crude, but no network."""
    id = "pixels"
    size = None

    def forward(self, x):
        scaled = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()
        return F.adaptive_avg_pool2d(scaled, 8).flatten(1)


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
        net = model.with_weights(lambda: Classifier(len(file["class_names"]), file["width"]), file["model"])
        net.size = file["size"]
        net.id = _id_of_file("own", path)
    return net


def _id_of_file(kind, path):
    """The id of a network from a file, "KIND:HASH": other weights share no cache of features."""
    return f"{kind}:{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]}"


# ------------------------------------------------------------------------------------------------------------
# Fitting a classifier: SGD with Nesterov momentum under a one-cycle learning rate, up for a quarter of the
# steps, then down to 0. A tenth of the examples is held out.

def fit(path, dataset, epochs=None, width=None, device="cpu", seed=0):
    """Train a Classifier on a data.Dataset and write it to `path`; -> its accuracy on the held-out tenth.

    epochs are passes over the other nine tenths (None: 15 on CUDA, else 3), width is the number of channels
    of the first layer (None: 64 on CUDA, else 8), and the seed is that of the weights, the held-out tenth and
    the order. Raises DataError.
    """
    is_small = len(dataset) < 20 or len(dataset.class_names) < 2 or min(dataset.shape[1:]) < 8
    if dataset.kind != "image" or is_small:
        raise data.DataError("--fit needs 20 or more images of two or more classes, from 8x8 pixels on")
    on_cuda = torch.device(device).type == "cuda"
    epochs = epochs or (15 if on_cuda else 3)
    width = width or (64 if on_cuda else 8)
    torch.manual_seed(seed)
    held_out, index = torch.randperm(len(dataset)).tensor_split([len(dataset) // 10])
    batch = min(512 if on_cuda else 128, len(index))
    steps_per_epoch = len(index) // batch
    steps = epochs * steps_per_epoch
    dataset = dataset.to(device)
    generator = data.stream(seed, 0, "augment", device)
    net = Classifier(len(dataset.class_names), width).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.4 * batch / 512, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.25 * steps), (steps - step) / (0.75 * steps)))
    cast = torch.autocast("cuda" if on_cuda else "cpu", torch.bfloat16, enabled=on_cuda)
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
        right = []
        with torch.no_grad(), cast:
            for rows in held_out.split(1000):
                images, labels = _images_and_labels(dataset, rows, device)
                right.append(net.logits(images).argmax(1) == labels)
        accuracy = torch.cat(right).float().mean().item()
        data.progress(f"epoch {epoch}/{epochs}  loss {loss.item():.3f}  held-out accuracy {accuracy:.4f}",
                      last=epoch == epochs)
    with data.writing(path) as file:
        torch.save(dict(width=width, size=dataset.shape[-1], class_names=dataset.class_names,
                        model=net.cpu().state_dict()), file)
    return accuracy


def _images_and_labels(dataset, rows, device):
    """(uint8 [n, 3, H, W], int64 [n]) on `device` of the examples at `rows`, int64 [n] on the host."""
    images = dataset.x[data.put(rows, dataset.x.device)]
    return data.put(images, device), data.put(dataset.labels[rows], device)


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
# The FID Inception network (TensorFlow's graph of 2015-12-05) as a function of its weights, which know the
# channels and kernels. A row is blocks of one form: lines of convolutions and pools that start at the block's
# input, whose ends are concatenated. Lines may begin alike. "/" is stride 2; "/" and "-" are not padded.

WEIGHTS_HASH = "6726825d"                       # the first digits of the SHA-256 of the published file
WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               f"pt_inception-2015-12-05-{WEIGHTS_HASH}.pth")
INCEPTION = [
    ("1a", "3x3/"), ("2a", "3x3-"), ("2b", "3x3 halve"), ("3b", "1x1"), ("4a", "3x3- halve"),
    ("5b 5c 5d", "1x1 | 5x5_1 5x5_2 | 3x3dbl_1 3x3dbl_2 3x3dbl_3 | mean _pool"),
    ("6a", "3x3/ | 3x3dbl_1 3x3dbl_2 3x3dbl_3/ | halve"),
    ("6b 6c 6d 6e", "1x1 | 7x7_1 7x7_2 7x7_3 | 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 | mean _pool"),
    ("7a", "3x3_1 3x3_2/ | 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4/ | halve"),
    ("7b", "1x1 | 3x3_1 3x3_2a | 3x3_1 3x3_2b | "
     "3x3dbl_1 3x3dbl_2 3x3dbl_3a | 3x3dbl_1 3x3dbl_2 3x3dbl_3b | mean _pool"),
    ("7c", "1x1 | 3x3_1 3x3_2a | 3x3_1 3x3_2b | "
     "3x3dbl_1 3x3dbl_2 3x3dbl_3a | 3x3dbl_1 3x3dbl_2 3x3dbl_3b | max _pool")]
POOLS = {"mean": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
         "max": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
         "halve": lambda x: F.max_pool2d(x, 3, stride=2)}


class Inception(torch.nn.Module):
    """uint8 [N, 3, H, W] -> float32 [N, 2048], from the published weights {X.conv.weight, X.bn.*}.

    Batch norms (eps 0.001) are folded into the convolutions, such that conv(x) equals the original
    bn(conv(x)): as layers of their own they would take a quarter more time.
    """
    size = None

    def __init__(self, weights):
        super().__init__()
        state = {re.sub("Conv2d_|Mixed_|branch", "", key): weight.double() for key, weight in weights.items()}
        for name in [key.removesuffix(".conv.weight") for key in state if key.endswith(".conv.weight")]:
            scale = state[f"{name}.bn.weight"] / (state[f"{name}.bn.running_var"] + 0.001).sqrt()
            weight = state[f"{name}.conv.weight"] * scale[:, None, None, None]
            bias = state[f"{name}.bn.bias"] - state[f"{name}.bn.running_mean"] * scale
            self.register_buffer(f"{name}_weight".replace(".", "_"), weight.float())
            self.register_buffer(f"{name}_bias".replace(".", "_"), bias.float())

    def conv(self, x, name):
        """Convolution with its batch norm, and ReLU."""
        weight = self.get_buffer(name.rstrip("/-") + "_weight")
        bias = self.get_buffer(name.rstrip("/-") + "_bias")
        stride = 2 if name[-1] == "/" else 1
        padding = [0 if name[-1] in "/-" else size // 2 for size in weight.shape[2:]]
        return F.conv2d(x, weight, bias, stride, padding).relu_()

    def block(self, x, name, lines):
        """The concatenated ends of the lines of a block."""
        done = {}                                               # {step: its output}
        ends = []
        for line in lines.split("|"):
            y = x
            for step in line.split():
                if step not in done:
                    done[step] = POOLS[step](y) if step in POOLS else self.conv(y, f"{name}_{step}")
                y = done[step]
            ends.append(y)
        return torch.cat(ends, 1)

    def forward(self, images):
        """uint8 images [N, 3, H, W] -> pooled features, float32 [N, 2048]."""
        x = images.float() / 255                                # [N, 3, H, W]
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        x = x.contiguous(memory_format=torch.channels_last)
        for names, lines in INCEPTION:
            for name in names.split():
                x = self.block(x, name, lines)
        return x.mean((2, 3))


def load_inception(path=None):
    """Inception with the weights in the file `path`; None = the file $FID_INCEPTION_WEIGHTS, else the one in
    torch's hub cache, which is downloaded first if it does not exist. Raises DataError."""
    advice = "give own:CKPT, pixels, or the file of the weights in $FID_INCEPTION_WEIGHTS"
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(WEIGHTS_URL))
    path = data.path(path or os.environ.get("FID_INCEPTION_WEIGHTS") or cached)
    if path == cached and not os.path.exists(path):
        with data.reading(f"features inception ({advice})", f"downloaded from {WEIGHTS_URL}"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, path, WEIGHTS_HASH, progress=False)
    with data.reading(path, f"the FID Inception weights (delete it if its download broke off, or {advice})"):
        net = Inception(model.load_checkpoint(path))
        if len(list(net.buffers())) != 2 * 94:                  # torchvision's Inception v3 has more
            raise ValueError("it does not have 94 convolutions")
        net(torch.zeros(0, 3, 8, 8, dtype=torch.uint8))         # raises where layers are missing or misfit
        net.id = _id_of_file("inception", path)
    return net


# ------------------------------------------------------------------------------------------------------------
# Scoring two image sets. Either may be an .npz of published FID statistics (mu, sigma) instead of images.

def score(args):
    """One line of text: the metrics of FAKE against REAL, how many images there are, and the features."""
    sides = [read_side(path, args.size) for path in args.paths]
    datasets = [side for side in sides if isinstance(side, data.Dataset)]
    if len(datasets) < 2 and args.features != "inception":
        raise data.DataError(f"--features {args.features}: statistics (mu, sigma) are those of inception")
    if len({dataset.shape for dataset in datasets}) > 1:
        raise data.DataError(f"the images are {sides[0].shape} and {sides[1].shape}: give --size")
    net_id = "inception"
    features = []
    if datasets:
        net = network(args.features, args.device, args.inception_weights)
        net_id = net.id
        features = [data_features(net, dataset, "features")[0] for dataset in datasets]
    if len(features) == 2:
        metrics = image_metrics(*features, net_id, args.device)
    else:
        gaussians = [moments(*features) if isinstance(side, data.Dataset) else side for side in sides]
        metrics = {"FID": frechet(*gaussians[0], *gaussians[1])}
    values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    counts = [f"{len(side)} {name}, " for name, side in (("real", sides[0]), ("fake", sides[1]))
              if isinstance(side, data.Dataset)]
    return f"{values}  ({''.join(counts)}features {net_id})"


def read_side(path, size):
    """The Dataset at `path`, or (mu float64 [2048], sigma [2048, 2048]) from an .npz of pytorch-fid. Raises
    DataError."""
    if path.endswith(".npz"):
        with data.reading(path, "a data set, nor finite FID statistics (mu, sigma)"), np.load(path) as file:
            if "mu" in file and "sigma" in file:
                mu = torch.from_numpy(file["mu"]).double()
                sigma = torch.from_numpy(file["sigma"]).double()
                if mu.shape != (2048,) or sigma.shape != (2048, 2048) or not (mu + sigma).isfinite().all():
                    raise ValueError(f"mu is {list(mu.shape)}, sigma {list(sigma.shape)}")
                return mu, sigma
    dataset = data.load(path, size)
    data.say(f"{path}: {', '.join(dataset.report)}")
    warn_of_few(len(dataset), path)
    return dataset


# ------------------------------------------------------------------------------------------------------------
# Command line.

def build_parser():
    """The parser of all flags."""
    usage = "REAL FAKE [flags], or: --fit CKPT DATA [flags], or: --compare RUN ... [flags]"
    parser = data.parser(__doc__, usage)
    count = data.number(int, "[1, inf)")
    add = parser.add_argument
    add("paths", nargs="+", type=data.path, metavar="PATH", help="REAL FAKE: each a folder, zip or .npz of "
        "images or an .npz of FID statistics (mu, sigma); with --fit one data set; with --compare runs")
    add("--device", type=data.device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N")
    add("--seed", type=data.number(int, "[0, 1e15]"), default=0, help="of --fit (weights, held-out tenth)")
    add("--size", type=data.number(int, "[8, 4096]"), help="center-crop images and resize them to this size")
    add("--features", type=features_name, default="inception", help="network that scores: inception (its "
        "distance is the FID), own:CKPT (made by --fit; for small images), or pixels (8x8 averages)")
    add("--inception-weights", type=data.path, help="file (default: $FID_INCEPTION_WEIGHTS, else a download)")
    add("--epochs", type=count, help="of --fit, passes over the data (default: 15 on CUDA, else 3)")
    add("--width", type=count, help="of --fit, an eighth of the features (default: 64 on CUDA, else 8)")
    add("--metric", help="of --compare, the metric to draw (default: the first)")
    add("--out", type=data.path, default="compare.png", help="of --compare, the chart, a PNG")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--fit", type=data.path, metavar="CKPT", help="fit a small classifier to labelled images")
    add("--compare", action="store_true", help="compare run folders; -s0 -s1 ... are one arm")
    return parser


def main(argv=None):
    """Carry out the command: compare runs, fit a classifier, or score FAKE against REAL."""
    args = build_parser().parse_args(argv)
    if args.compare:
        data.require_writable(args.out)
        data.say(compare(args.paths, args.out, args.metric), file=sys.stdout)
        return
    if len(args.paths) != (1 if args.fit else 2):
        raise data.DataError(f"{len(args.paths)} paths: give REAL and FAKE, or one data set with --fit")
    if args.fit:
        data.require_writable(args.fit)
        dataset = data.load(args.paths[0], args.size)
        accuracy = fit(args.fit, dataset, args.epochs, args.width, args.device, args.seed)
        data.say(f"held-out accuracy {accuracy:.4f}, use --features own:{args.fit}", file=sys.stdout)
    else:
        data.say(score(args), file=sys.stdout)


if __name__ == "__main__":
    data.command(main, "stopped, nothing was written")
