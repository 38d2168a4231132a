"""Every test: pytest test_all.py. No network, no data, two CPU cores.

Each holds the code against an independent reference: a naive version, a closed form, a published layout. The
long ones (many kills, the compiled UNet) run with SLOW_TESTS=1; those that take a device also run on CUDA
where there is one.
"""
import argparse
import contextlib
import copy
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import pty
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
import types
import xml.etree.ElementTree
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.flop_counter
from PIL import Image, PngImagePlugin
from scipy.stats import multivariate_normal

import data
import fid
import guide
import model
import sample
import train

select = train.select
HERE = Path(train.__file__).resolve().parent
SLOW = bool(os.environ.get("SLOW_TESTS"))                       # long tests, off by default
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
TEMP = tempfile.TemporaryDirectory(prefix="tests-")             # deleted at the end
os.environ["DATA_CACHE"] = os.path.join(TEMP.name, "cache")     # never the user's own
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"               # no pool of processes for a small graph
signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell's background jobs ignore Ctrl-C


# ------------------------------------------------------------------------------------------------------------
# Small runs: settings, batches, images, what a run has written.

FEW = "--device cpu --eval-samples 0 --sampling-steps 2 "
TINY = FEW + "--steps 24 --batch 64 --guide-steps 8 --log-every 6 "                         # on the tree
SMALL = FEW + "--channels 8 --blocks 1 --batch 4 --guide-steps 2 --steps 6 --log-every 2 "  # on images
TREE = data.Tree("A")
flatten = torch.utils._pytree.tree_flatten_with_path
leaves = torch.utils._pytree.tree_leaves


def _images(path=None, n=60, size=8):
    """Smooth random images of three classes, each of its own colour: an .npz, or a Dataset without a path."""
    labels = torch.arange(n) % 3
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 120
    coarse += labels[:, None, None, None] * 40
    images = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear").to(torch.uint8)
    if path:
        np.savez(path, images=images.numpy(), labels=labels.numpy())
    return path or data.Dataset(images, labels, list("abc"))


@functools.cache
def _folder():
    """A folder with images, labelled and not, and models trained on them, with labels of mirrors or not."""
    folder = Path(tempfile.mkdtemp(dir=TEMP.name))
    with np.load(_images(folder / "d.npz")) as file:
        np.savez(folder / "plain.npz", images=file["images"])
        np.savez(folder / "named.npz", **file, class_names=np.array(["ant", "bee", "cat"]))
    shutil.copy(folder / "d.npz", folder / "moved.npz")
    _images(folder / "large.npz", size=32)
    for name, flag in ("reference", "--flip"), ("other", "--no-flip"):
        _train(SMALL, flag, "--guide none --steps 2 --data", folder / "d.npz", out=folder / name)
    return folder


def _settings(*flags):
    """What `settings` makes of the flags, in no run's folder."""
    argv = " ".join(map(str, flags)).split()
    typed = train.typed_flags(["--device", "cpu", "--out", f"{TEMP.name}/none", *argv])
    return train.settings(typed)[0]


def _denoiser(c):
    torch.manual_seed(0)
    return model.build(train.model_config(c))


def _batches(c, dataset=TREE, n=64, **more):
    settings = dict(device=c.device, flip=c.flip, targets=c.targets, P_mean=c.P_mean, P_std=c.P_std)
    return data.Batches(dataset, n, c.seed, **settings | more)


def _train(*flags, out=None):
    out = Path(out or tempfile.mkdtemp(dir=TEMP.name))
    train.main([*" ".join(map(str, flags)).split(), "--out", str(out)])
    return out


def _load(run, name="checkpoint.pt"):
    return torch.load(Path(run) / name, weights_only=True)


def _records(run, kind="train"):
    lines = (Path(run) / "log.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind or not kind]


def _same_run(a, b):
    """Two run folders hold the same stages: weights, EMAs, optimizer, class weights, counts and log."""
    stages = [sorted(path.relative_to(run) for path in run.rglob("*.pt")) for run in (a, b)]
    assert stages[0] == stages[1] != []
    for stage in stages[0]:
        one = flatten(_load(a, stage))[0]
        two = flatten(_load(b, stage))[0]
        assert len(one) == len(two)
        for (where, x), (_, y) in zip(one, two):
            same = torch.equal(x, y) if torch.is_tensor(x) else x == y
            name = str(where[-1]).split("'")[1] if "'" in str(where[-1]) else ""
            assert same or "second" in name or name in train.MAY_CHANGE, (stage, where, x, y)
    assert all(_load(run)["log"] == _records(run, None) for run in (a, b))


def _one_line(capsys, program, flags, *words):
    """The program ends with status 2 and one printable error line that holds `words`; returns all lines."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        data.command(lambda: program.main(flags.split()))
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    assert stop.value.code == 2 and err.count("error: ") == 1 and "error: " in last and "Traceback" not in err
    assert last.isprintable() and all(str(word) in last for word in words), err
    return err


def _interrupt(monkeypatch, *calls):
    """Ctrl-C in the middle of these steps, counted from now on over all stages and runs."""
    count, update = itertools.count(1), model.PowerEMA.update

    def interrupted(self, t):
        if next(count) in calls:
            raise KeyboardInterrupt
        update(self, t)
    monkeypatch.setattr(model.PowerEMA, "update", interrupted)


# ------------------------------------------------------------------------------------------------------------
# select.py

PYTHONS = {sys.executable, shutil.which("python3", path="/usr/bin") or sys.executable}


@pytest.mark.parametrize("python", PYTHONS)
def test_standard_library_finds_its_own_select(python):
    code = "import sys, subprocess, asyncio, select; assert select.select and 'torch' not in sys.modules"
    copy = shutil.copy(HERE / "select.py", tempfile.mkdtemp(dir=TEMP.name))     # a second clone on the path
    env = {**os.environ, "PYTHONPATH": os.path.dirname(copy)}
    assert subprocess.run([python, "-c", code], cwd=HERE, env=env).returncode == 0


def _naive_jest(S, joint, k, chunks, generator):
    """The matrix form, draw by draw: what the chosen add to i is the sum of S_ij + S_ji over them."""
    chosen = []
    while len(chosen) < k:
        pairs = S[:, chosen].sum(1) + S[chosen].sum(0)
        logits = S.diagonal() + pairs
        if joint == "mean":
            logits = logits / (2 * len(chosen) + 1)
            if not chosen:
                logits = torch.zeros_like(logits)               # the authors' first chunk is uniform
        probability = (logits - logits.max()).exp()
        probability[chosen] = 0
        size = min(math.ceil(k / chunks), k - len(chosen))
        chosen += torch.multinomial(probability, size, generator=generator).tolist()
    return chosen


@pytest.mark.parametrize("joint, scale", [("independent", 3.0), ("mean", 4.0), ("sum", 0.6)])
def test_jest_includes_as_often_as_the_matrix_form(joint, scale):
    generator = torch.Generator().manual_seed(0)
    runs, k, chunks = 1500, 8, 3                                # two chunks of three, one of two
    learner, reference = torch.rand(2, 24, generator=generator, dtype=torch.float64)
    learner = learner * scale
    reference = reference * scale / 3
    scores = learner - reference
    S = torch.diag(scores)                                      # JEST's own pairs: none
    if joint != "independent":
        S = learner[:, None] - reference
    counts = torch.zeros(2, 24)
    for _ in range(runs):
        counts[0, select.jest(scores.float(), k, chunks, joint, generator)] += 1
        counts[1, _naive_jest(S, joint, k, chunks, generator)] += 1
    share = counts / runs
    assert torch.allclose(share.sum(1), torch.full((2,), float(k)))     # no index twice
    mean = share.mean(0)
    error = (share[0] - share[1]) / (mean * (1 - mean) * 2 / runs).sqrt()
    assert error.abs().max() < 4
    assert share.std(1).min() > 0.1                             # selection is far from uniform
    other = select.FACTORS["mean" if joint != "mean" else "sum"]
    assert other(3) != select.FACTORS[joint](3)


@pytest.mark.parametrize("joint", select.FACTORS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e37, -3e38])
def test_no_score_makes_jest_choose_an_example_twice_or_always(joint, value):
    generator = torch.Generator().manual_seed(0)
    scores = torch.linspace(-1, 1, 20)
    scores[10] = value                                          # between the others, where it is finite
    count, runs = torch.zeros(20), 400
    for _ in range(runs):
        chosen = select.jest(scores, 10, 4, joint, generator)
        assert chosen.unique().numel() == 10
        count[chosen] += 1
    assert select.jest(scores, 20, 3, joint, generator).unique().numel() == 20
    if not math.isfinite(value):                                # as the mean score would
        assert abs(count[10] - count[9]) < 4 * (runs / 2) ** 0.5
        index, weight = select.gumbel_top_k(scores, 10, generator)
        assert weight.isfinite().all() and index.unique().numel() == 10
        assert not torch.equal(index, select.gumbel_top_k(scores, 10, generator)[0])


def test_scores_that_are_not_finite_become_the_mean_of_the_others():
    scores = torch.tensor([1.0, math.inf, math.nan, 6.0, -math.inf, 8.0])
    assert select.finite(scores).tolist() == [1, 5, 5, 6, 5, 8]


def test_jest_draws_at_most_so_many_chunks_and_the_sum_selects_hardest(monkeypatch):
    draws, gumbel = [], select.gumbel
    monkeypatch.setattr(select, "gumbel", lambda *args: draws.append(1) or gumbel(*args))
    for B, k, chunks, expected in (62, 31, 16, 16), (48, 24, 16, 12), (200, 100, 16, 15), (5, 3, 16, 3):
        draws.clear()
        assert select.jest(torch.randn(B) * 1e4, k, chunks).unique().numel() == k
        assert len(draws) == expected
    torch.manual_seed(0)
    scores = 0.1 * torch.randn(4080)
    best = scores.topk(816).indices
    for joint, low, high in ("sum", 0.90, 0.98), ("independent", 0.21, 0.26), ("mean", 0.20, 0.24):
        chosen = [select.jest(scores, 816, 16, joint) for _ in range(20)]
        share = torch.isin(torch.cat(chosen), best).float().mean()
        assert low < share < high, (joint, share)


def test_the_lines_to_paste_work_in_a_foreign_loop():
    """The indented lines of select.py's docstring, on plain layers that none of ours knows."""
    code = "\n".join(line[4:] for line in select.__doc__.splitlines() if line.startswith("    "))
    torch.manual_seed(0)
    learner, weak = torch.nn.Linear(6, 1), torch.nn.Linear(6, 1)

    def draw(n):
        x0 = torch.randn(n, 6)
        return x0, x0[:, 0].exp(), x0.flip(1)                   # both say which example they belong to

    def loss(network, x0, sigma, noise):
        return (network(x0 + 0.1 * noise) - sigma[:, None]).square().mean(1)
    space = dict(torch=torch, draw=draw, loss=loss, learner=learner, guide=weak, jest=select.jest, k=200)
    exec(code, space)
    x0, sigma, noise, chosen = (space[name] for name in ("x0", "sigma", "noise", "index"))
    assert x0.shape == (200, 6) and chosen.unique().numel() == 200 and len(space["scores"]) == 1000
    assert torch.equal(sigma, x0[:, 0].exp()) and torch.equal(noise, x0.flip(1))
    advantage = loss(learner, x0, sigma, noise) - loss(weak, x0, sigma, noise)
    assert torch.allclose(advantage, space["scores"][chosen]) and not space["scores"].requires_grad
    assert advantage.mean() > space["scores"].mean() + 0.3 * space["scores"].std()


def test_what_the_readme_says_to_copy_runs_alone():
    text = (HERE / "select.py").read_text()
    copied = text[text.index("FACTORS = {"):text.index("# ---", text.index("def jest("))]
    for name in ("FACTORS", "gumbel", "finite", "jest"):        # what README and the docstring name
        assert f"`{name}`" in select.__doc__ and f"`{name}`" in (HERE / "README.md").read_text()
    space = dict(math=math, torch=torch)
    exec(copied, space)
    assert set(space) - {"math", "torch", "__builtins__"} == {"FACTORS", "gumbel", "finite", "jest"}
    scores = torch.linspace(-50, 50, 40)
    assert set(space["jest"](scores, 8, joint="sum").tolist()) == set(range(32, 40))


def test_gumbel_top_k_weights_make_any_mean_unbiased():
    generator = torch.Generator().manual_seed(1)
    logits, f = torch.randn(40, generator=generator), torch.randn(40, generator=generator) + 1
    f = f + logits                      # what is selected more often is larger: ignoring the weights shows
    draws = [select.gumbel_top_k(logits, 8, generator) for _ in range(5000)]
    means = [torch.stack([(w * f[i]).mean(), f[i].mean()]) for i, w in draws]
    weighted, plain = torch.stack(means, 1).double()
    assert (weighted.mean() - f.mean()).abs() < 4 * weighted.std() / len(draws) ** 0.5
    assert (plain.mean() - f.mean()).abs() > 40 * plain.std() / len(draws) ** 0.5
    assert (select.gumbel_top_k(logits, 40, generator)[1] == 1).all()


def test_scores():
    learner, reference = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 2.0])
    assert select.example_scores(learner, reference).tolist() == [2, -1, 0]
    assert select.example_scores(learner, score="hard").tolist() == [3, 1, 2]
    assert select.example_scores(learner, reference, score="easy", invert=True).tolist() == [1, 2, 2]
    standardized = select.example_scores(learner, reference, gain=4.0)
    assert abs(standardized.mean()) < 1e-5 and abs(standardized.std() - 4) < 1e-5
    assert torch.allclose(select.example_scores(learner, score="root-loss").exp() ** 2, learner + 0.1)


def test_root_loss_is_the_gradient_norm_at_the_output_of_the_network():
    """With EDM2's uncertainty it is sqrt(loss) / e^u, up to a constant."""
    c = _settings("--data", _folder() / "d.npz", "--channels 8 --blocks 1 --batch 40 --guide none")
    denoiser = _randomized(_denoiser(c))
    with torch.no_grad():
        denoiser.u_out.weight *= 3
    outputs = []
    denoiser.net.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    batch = _batches(c, data.load(c.data), 40)[0]
    total, losses = train.make_objective(c, denoiser)(*batch, torch.ones(40))
    gradient, = torch.autograd.grad(total, outputs[0])
    norms = gradient.flatten(1).norm(dim=1)
    with torch.no_grad():
        u = denoiser.u(batch.sigma)
    assert u.std() > 0.2
    ratio = norms.log() - (losses.log() / 2 - u)
    assert ratio.std() < 1e-3
    scores = select.example_scores(losses, u=u, score="root-loss")
    assert torch.allclose(scores, (losses + 0.1).log() / 2 - u)
    c = _settings("--data", _folder() / "d.npz", "--channels 8 --blocks 1 --batch 40 --guide none "
                  "--selector jest --score root-loss --filter 0.5")
    ema = model.PowerEMA(denoiser, c.ema)
    jest = train.make_selectors(c, data.load(c.data), denoiser, ema, None, None)[1]
    assert torch.equal(jest.uncertainty(batch.sigma), u)


def test_a_score_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="root-loss"):
        select.example_scores(torch.ones(3), score="beauty")


@pytest.mark.parametrize("flags", [
    "--selector ajest --guided-targets 2", "--data IMAGES --selector jest --score root-loss --debias",
    "--data IMAGES --selector ajest --gain 1 --micro-batch 4 --guided-targets 1.5 --dropout 0.1"])
def test_a_training_step_reads_nothing_from_the_device(monkeypatch, tmp_path, flags):
    """A step on the meta device, whose tensors hold no values: whatever would wait for a device raises,
    and so does an operation on tensors of two devices."""
    meta, stream = torch.device("meta"), data.stream
    flags = flags.replace("IMAGES", f"{_folder()}/d.npz --blocks 1")
    c = _settings(flags, "--channels 8 --batch 8 --filter 0.5 --guide", _folder() / "reference")
    dataset = data.load(c.data).to(meta) if c.data else data.Tree("A", meta)
    for name in getattr(dataset, "parameters", ()):
        dataset._tensor(name)                                   # constants are copied there once
    c.device = "meta"                                           # no fused Adam, autocast or generators there
    monkeypatch.setattr(torch.optim, "Adam", lambda params, lr, **_: torch.optim.SGD(params, lr))
    monkeypatch.setattr(model, "accelerate", lambda function, *options: function)
    monkeypatch.setattr(train, "load_matching", lambda *_: model.build(train.model_config(c)).to(meta))
    monkeypatch.setattr(data, "stream", lambda seed, step, name, device="cpu": (
        None if torch.device(device) == meta else stream(seed, step, name)))
    draw = data.Batches.__getitem__

    def stopping(self, step):
        if step:
            raise KeyboardInterrupt
        return draw(self, step)
    monkeypatch.setattr(data.Batches, "__getitem__", stopping)
    more = {}
    if c.data:
        more = dict(examples=torch.arange(50), dro_reference="guide.pt")
    with pytest.raises(KeyboardInterrupt):                      # after one step
        train.train(c, dataset, tmp_path, guide_path="guide.pt", **more)
    with pytest.raises(RuntimeError):
        torch.ones(1, device=meta).item()


def _jest(c, guide=None):
    """(the learner of a run on the tree, its Jest, its EMA)."""
    learner = _denoiser(c)
    torch.nn.init.normal_(learner.net.out.weight)
    ema = model.PowerEMA(learner, c.ema)
    return learner, train.make_selectors(c, TREE, learner, ema, None, guide)[1], ema


def test_scores_are_the_losses_on_exactly_what_is_chosen(monkeypatch):
    c = _settings("--selector ajest --batch 64 --micro-batch 64 --targets exact")
    weak = _denoiser(c)
    learner, jest, _ = _jest(c, weak)
    monkeypatch.setattr(select, "jest", lambda scores, k, *_: scores.topk(k).indices)
    batch, expected = _batches(c, n=320)[3], []
    for denoiser in learner, weak:
        D_x = denoiser(batch.x0 + batch.sigma[:, None] * batch.noise, batch.sigma)
        weight = (batch.sigma ** 2 + 0.25) / (0.5 * batch.sigma) ** 2
        expected.append(weight * ((D_x - batch.target) ** 2).mean(1))
    assert torch.allclose(jest.learner_loss(batch), expected[0], rtol=1e-4)
    assert torch.allclose(jest.reference_loss(batch), expected[1], rtol=1e-4)
    (chosen, weights), index = jest(3), (expected[0] - expected[1]).topk(64).indices
    assert all(torch.equal(a, b[index]) for a, b in zip(chosen, batch) if b is not None)
    assert (weights == 1).all() and len(weights) == 64 and not torch.equal(batch.target, batch.x0)


def test_the_reference_of_jest_is_the_current_ema_of_the_learner():
    learner, jest, ema = _jest(_settings("--selector jest --batch 64"))
    batch = jest.super_batches[0]
    learner.net.out.weight.data *= 2
    ema.update(1)                                               # after one step the EMA is the learner
    assert torch.equal(jest.learner_loss(batch), jest.reference_loss(batch))
    learner.net.out.weight.data *= 2
    other = copy.deepcopy(learner)
    other.net.out.weight.data /= 2
    of_reference = jest.reference_loss(batch)
    assert torch.allclose(of_reference, other.loss(*batch)[0])
    assert not torch.allclose(of_reference, jest.learner_loss(batch))
    for flags, computed in ("", False), ("--until-better", True):       # else no score needs the reference
        hard = _jest(_settings("--selector ajest --score hard --batch 64", flags), other)[1]
        assert (hard.reference_loss is not None) == computed


def test_each_step_selects_with_random_numbers_of_its_own():
    _, jest, _ = _jest(_settings("--selector jest --batch 64"))
    seeds = [jest.make_generator(step).initial_seed() for step in (3, 4, 3)]
    assert seeds[0] == seeds[2] != seeds[1]


def test_until_better_selects_until_the_learner_wins_at_a_log_line(monkeypatch):
    means = {3: 0.9, 6: 1.1, 7: 0.5, 9: 1.2, 12: 0.9}           # learner's, by step; the reference's is 1

    def seen(self, step):
        self.mean_excess = torch.tensor(means.get(step + 1, 2.0) - 1)
        return self.super_batches[step].rows(slice(64)), torch.ones(64)
    monkeypatch.setattr(select.Jest, "__call__", seen)
    run = _train(TINY, "--selector jest --until-better --log-every 6")
    counts = [(r["selecting"], r["examples_drawn"]) for r in _records(run)]      # nobody looks at 3 and 7
    assert counts == [(True, 6 * 320), (False, 12 * 320), (False, 12 * 320 + 6 * 64), (False, 15 * 320 - 192)]


def test_after_early_selection_whole_super_batches_or_uniform_batches(monkeypatch):
    make, seen = train.make_objective, []

    def recording(*args):
        objective = make(*args)
        return lambda *batch: (seen.append(batch), objective(*batch))[1]
    monkeypatch.setattr(train, "make_objective", recording)
    for after, size in ("full", 320), ("uniform", 64):
        run = _train(TINY, "--selector jest --seed 3 --early-steps 6 --after", after)
        assert [len(batch[0]) for batch in seen] == [64] * 6 + [size] * 18
        drawn = _batches(_settings("--seed 3"), n=size)[23]     # the same whatever the arm
        assert all(torch.equal(a, b) for a, b in zip(seen[-1], drawn) if a is not None) and not seen.clear()
        counts = [(r["examples_drawn"], r["examples_trained"]) for r in _records(run)]
        assert (counts[0], counts[-1]) == ((6 * 320, 6 * 64), (6 * 320 + 18 * size, 6 * 64 + 18 * size))


def test_the_choice_moves_sampled_targets_towards_the_guide():
    """The weighted regression coefficient of target - D* on D - D_guide, over the chosen examples."""
    size, found = FEW + "--guide none --batch 816 --targets sample", {}
    learner = model.load_denoiser(_train(size, "--steps 400"), 0)
    weak = model.load_denoiser(_train(size, "--steps 200 --channels 32"), 0)
    for targets in "sample", "exact":
        c = _settings("--selector ajest --batch 816 --targets", targets)
        jest, sums = _jest(c, weak)[1], torch.zeros(2)
        jest.learner_loss = lambda batch: learner.loss(*batch)[0]
        for step in range(1000, 1005):
            batch, _ = jest(step)
            x, w = batch.x0 + batch.sigma[:, None] * batch.noise, model.loss_weight(batch.sigma)[:, None]
            towards = learner(x, batch.sigma) - weak(x, batch.sigma)
            shift = batch.target - TREE.denoise(x, batch.sigma)
            sums += torch.stack([(w * shift * towards).sum(), (w * towards ** 2).sum()])
        found[targets] = (sums[0] / sums[1]).item()
    assert found["sample"] < -0.1 and abs(found["exact"]) < 1e-4, found


# ------------------------------------------------------------------------------------------------------------
# model.py

def _config(kind="image", **changes):
    base = dict(kind=kind, shape=[3, 16, 16], channels=8, blocks=1, classes=3, class_names=list("abc"),
                dropout=0.0, sigma_data=0.5, mean=[127.5] * 3, std=[63.75] * 3)
    if kind == "tree":
        base |= dict(shape=[2], classes=0, class_names=[], mean=[], std=[])
    return base | changes


def _randomized(denoiser):
    """Parameters that begin as zero (the gains) become 0.5, so that every path of the network matters."""
    for parameter in denoiser.parameters():
        if not parameter.any():
            parameter.data += 0.5
    return denoiser


PUBLISHED_SIZES = [(64, 1000, 128, 124.7, 89.9), (32, 10, 64, 29.7, 6.0)]
if SLOW:
    PUBLISHED_SIZES.append((64, 1000, 64, 31.3, 22.7))


@pytest.mark.parametrize("resolution, classes, channels, parameters, gflop", PUBLISHED_SIZES)
def test_unet_has_the_published_size(resolution, classes, channels, parameters, gflop):
    counter = torch.utils.flop_counter.FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), counter:
        net = model.UNet(resolution, 3, channels, classes)
        net(torch.empty(1, 3, resolution, resolution), torch.empty(1), torch.zeros(1, dtype=torch.long))
    count = sum(parameter.numel() for parameter in net.parameters())
    assert round(count / 1e6, 1) == parameters
    assert round(counter.get_total_flops() / 1e9, 1) == gflop


def test_unet_keeps_magnitudes_near_one():
    torch.manual_seed(0)
    net = model.UNet(32, 3, 32, 10, blocks=3)
    activations = []

    def remember(block, inputs, output):
        output.retain_grad()
        activations.append(output)

    for block in [*net.encoder, *net.decoder]:
        block.register_forward_hook(remember)
    net.out_gain.data.fill_(1.0)
    output = net(torch.randn(4, 3, 32, 32), torch.randn(4), torch.arange(4))
    output.backward(torch.randn(4, 3, 32, 32))
    assert len(activations) == 15 + 21                          # encoder, decoder
    assert all(0.6 < x.square().mean().sqrt() < 1.6 for x in activations)
    grads = [x.grad.square().mean().sqrt() for x in activations]        # they neither vanish nor explode
    assert all(0.4 < a / b < 2.5 for a, b in zip(grads, grads[1:])), grads


def test_a_block_clamps_its_output_and_passes_gradients_of_what_it_clamps():
    torch.manual_seed(0)
    block = model.Block(8, 8, 4, decoder=True)
    x = (1000 * torch.randn(2, 8, 4, 4)).requires_grad_()
    y = block(x, torch.randn(2, 4))
    assert y.abs().max() == 256
    gradient = torch.autograd.grad(y.sum(), x)[0]
    main_path = 0.7 / math.hypot(0.7, 0.3)                      # the residual branch is added to it
    assert (gradient[y.abs() == 256] - main_path).abs().mean() < 0.3


def test_projection_changes_no_output_and_labels_do():
    torch.manual_seed(0)
    denoiser = _randomized(model.build(_config()))
    labels = torch.tensor([0, 1, 2, 2])
    weights = model.projected_weights(denoiser)
    x = torch.randn(1, 3, 16, 16).expand(4, -1, -1, -1)
    for w in weights:
        w.data *= model.per_example(1 + torch.rand(len(w)), w)
    before = denoiser(x, torch.ones(4), labels)
    model.project(weights)
    for w in weights:
        assert torch.allclose(w.square().flatten(1).mean(1), torch.ones(len(w)), atol=1e-5)
    assert torch.allclose(denoiser(x, 1.0, labels), before, atol=1e-5)
    assert (before[0] - before[1]).abs().max() > 1e-3
    assert torch.allclose(before[2], before[3], atol=1e-5)
    with pytest.raises(ValueError, match="3 classes: give it labels"):
        denoiser(x, 1.0)


def test_doubling_is_nearest_and_halving_is_the_mean():
    x = torch.randn(2, 3, 4, 6).requires_grad_()
    resampled = dict(
        up=F.interpolate(x, scale_factor=2, mode="nearest"),
        down=x.view(2, 3, 2, 2, 3, 2).mean((3, 5)),
        keep=x)
    for mode, expected in resampled.items():
        y = model.resample(x, mode)
        assert torch.allclose(y, expected)
        v = torch.randn_like(expected)
        expected_gradient = torch.autograd.grad(expected, x, v, retain_graph=True)[0]
        assert torch.allclose(torch.autograd.grad(y, x, v)[0], expected_gradient)


@pytest.mark.parametrize("channels, heads", [(24, 1), (128, 2), (192, 3), (200, 2)])
def test_attention_is_the_naive_one(channels, heads):
    torch.manual_seed(0)
    block = model.Block(channels, channels, 8, attention=True)
    x = torch.randn(2, channels, 4, 3)

    def unit_rows(weight):                                      # [out, in, 1, 1] -> [out, in], rows of norm 1
        weight = weight[:, :, 0, 0].double()
        return weight / weight.square().sum(1, keepdim=True).sqrt()

    qkv = torch.einsum("oc,nchw->nhwo", unit_rows(block.qkv.weight), x.double())
    qkv = qkv.reshape(2, 12, heads, 3, channels // heads)       # [n, pixel, head, 3, d]
    qkv = qkv / qkv.square().mean(-1, keepdim=True).sqrt()
    q, k, v = qkv.unbind(3)
    logits = torch.einsum("nihd,njhd->nhij", q, k) / (channels // heads) ** 0.5
    y = torch.einsum("nhij,njhd->nihd", logits.softmax(3), v).reshape(2, 12, -1)
    expected = torch.einsum("oc,npc->nop", unit_rows(block.proj.weight), y).view(2, -1, 4, 3)
    assert block.heads == heads
    assert torch.allclose(block.attend(x).double(), expected, atol=1e-5)


def test_attention_runs_in_bf16():
    torch.manual_seed(0)
    block = model.Block(128, 128, 8, attention=True)
    x = torch.randn(2, 128, 4, 3)
    exact = block.attend(model.resample(x, "up"))
    with torch.autocast("cpu", torch.bfloat16):
        half = block.attend(model.resample(x.bfloat16(), "up"))
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() < 0.03 * half.norm()


def test_preconditioning_and_loss_in_closed_form():
    denoiser = model.build(_config("tree"))                     # F = 0: D = c_skip x
    torch.nn.init.zeros_(denoiser.net.out.bias)
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 100_000, 2) * torch.tensor([0.5, 1]).view(2, 1, 1)
    for s in (0.05, 0.5, 5.0):
        weight, level = (s * s + 0.25) / (s * 0.5) ** 2, torch.full((100_000,), s)
        loss, D_x = denoiser.loss(x0, noise, level)
        assert torch.allclose(D_x, 0.25 / (s * s + 0.25) * (x0 + s * noise), atol=1e-6)
        assert abs(loss.mean() - 1) < 0.015                     # on data of variance sigma_data^2
        _, c_out, c_in, c_noise = model.preconditioning(torch.tensor(s))
        for product in weight * c_out ** 2, c_in ** 2 * (s * s + 0.25), 4 * c_noise / math.log(s):
            assert torch.isclose(product, torch.ones(()))
        other, _ = denoiser.loss(x0, noise, level, None, x0 + 1)
        assert torch.allclose(other, weight * ((D_x - x0 - 1) ** 2).mean(1), rtol=1e-5)


def test_power_function_ema_in_closed_form():
    torch.manual_seed(0)
    layer, history = torch.nn.Linear(3, 2), torch.randn(200, 2, 3)
    ema = model.PowerEMA(layer, (0.05, 0.10))
    for t, value in enumerate(history, 1):
        layer.weight.data.copy_(value)
        ema.update(t)
    for std in (0.05, 0.10):
        gamma, t = model.ema_gamma(std), torch.arange(0, 201, dtype=torch.float64)
        assert math.isclose((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5), std, rel_tol=1e-9)
        weights = (t[1:] / 200) ** (gamma + 1) - (t[:-1] / 200) ** (gamma + 1)  # none for the initialization
        expected = (weights[:, None, None] * history).sum(0)
        assert torch.allclose(ema.averages[std][0].double(), expected, atol=1e-5)


WAYS = [("cpu", "image", True, False), ("cpu", "tree", False, True)]
if SLOW:
    WAYS.append(("cpu", "image", False, True))
if "cuda" in DEVICES:
    WAYS += [("cuda", "image", bf16, compiled) for bf16 in (False, True) for compiled in (False, True)]


def _loss_and_gradients(kind, device, bf16, compiled):
    """The losses of a small denoiser and the gradients of their mean, both on the CPU."""
    torch.manual_seed(0)
    denoiser = _randomized(model.build(_config(kind))).to(device)
    x0 = torch.randn(4, *denoiser.shape)
    noise = torch.randn(4, *denoiser.shape)
    sigma = torch.rand(4) + 0.1
    labels = torch.tensor([0, 1, 2, 0])
    rows = [values.to(device) for values in (x0, noise, sigma, labels)]
    losses, _ = model.accelerate(denoiser.loss, device, bf16, compiled)(*rows)
    gradients = torch.autograd.grad(losses.mean(), list(denoiser.net.parameters()))
    return losses.detach().cpu(), torch.cat([gradient.flatten().cpu() for gradient in gradients])


@pytest.mark.parametrize("device, kind, bf16, compiled", WAYS)
def test_forward_and_backward_are_those_of_the_cpu_in_fp32(device, kind, bf16, compiled):
    if compiled and not any(map(shutil.which, ("c++", "g++", "clang"))):
        pytest.skip("needs a C++ compiler")
    exact = _loss_and_gradients(kind, "cpu", False, False)
    computed = _loss_and_gradients(kind, device, bf16, compiled)
    for a, b in zip(computed, exact):
        error = (a - b).norm() / b.norm()
        assert error < (2e-2 if bf16 else 1e-3)
        assert error > 1e-6 or not bf16                         # it was computed in bf16


def test_many_accelerated_functions_stay_compiled(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compiled)
    functions = [model.accelerate(functools.partial(torch.mul, i), "cpu", compiled=True) for i in range(20)]
    for _ in range(2):                                          # the second round compiles nothing
        products = [function(torch.tensor(3)).item() for function in functions]
        assert products == list(range(0, 60, 3))
        assert len(graphs) == 20


@pytest.mark.parametrize("device, missing, supported, words", [
    ("cpu", "", (True, True), ""), ("cuda", "bf16", (False, True), "bf16"),
    ("cuda", "triton", (True, False), "triton"), ("cpu", "compiler", (True, False), "a C")])
def test_a_machine_says_what_it_cannot_do(monkeypatch, capsys, device, missing, supported, words):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: "bf16" not in missing)
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None if name in missing else name)
    monkeypatch.setattr(shutil, "which", lambda name: None if "compiler" in missing else name)
    assert model.supported(device, True, True) == supported
    err = capsys.readouterr().err
    assert words in err
    assert len(err.splitlines()) == (1 if words else 0)
    assert model.supported(device, False, False) == (False, False)
    assert capsys.readouterr().err == ""


def _save_denoiser(folder, denoiser, ema):
    content = dict(model_config=denoiser.config, model=denoiser.state_dict(), ema=ema.state_dict())
    torch.save(content, folder / "checkpoint.pt")


def test_checkpoint_round_trip(tmp_path):
    denoiser = _randomized(model.build(_config())).to(memory_format=torch.channels_last)
    ema = model.PowerEMA(denoiser, (0.05, 0.10))
    rows = torch.randn(2, 3, 16, 16), 0.7, torch.tensor([0, 1])
    outputs = []
    for length in (0.05, 0.10, 0):                              # the averages and the weights all differ
        denoiser.net.out_gain.data *= 2
        outputs.append(denoiser(*rows))
        if length != 0:
            ema.averages[length] = [parameter.detach().clone() for parameter in denoiser.parameters()]
    _save_denoiser(tmp_path, denoiser, ema)
    for length, output in zip((0.05, 0.10, 0), outputs):
        assert torch.equal(model.load_denoiser(tmp_path, length)(*rows), output)
    assert torch.equal(model.load_denoiser(tmp_path)(*rows), outputs[0])        # the first average


def test_a_checkpoint_with_a_wrong_byte_is_refused(tmp_path):
    denoiser = model.build(_config())
    _save_denoiser(tmp_path, denoiser, model.PowerEMA(denoiser, (0.05,)))
    path = tmp_path / "checkpoint.pt"
    weight = denoiser.net.first.weight.detach().numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(weight, bytes(len(weight))))
    with pytest.raises(ValueError, match="data/.* is damaged"):         # its checksum
        model.load_denoiser(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    denoiser = model.build(_config())
    ema = model.PowerEMA(denoiser, (0.05,))
    ema.averages[0.05][0].fill_(math.nan)
    _save_denoiser(tmp_path, denoiser, ema)
    assert model.load_denoiser(tmp_path, 0)                     # the raw weights are
    with pytest.raises(ValueError, match="its weights are not finite"):
        model.load_denoiser(tmp_path)


@pytest.mark.parametrize("name, value, says", [
    ("kind", "latent", "kind image instead of latent"),
    ("shape", (3, 24, 24), "shape [3, 16, 16] instead of [3, 24, 24]"),
    ("classes", 6, "number of labels 3 instead of 6"),
    ("class_names", ("a", "b", "d"), "class c instead of d"),
    ("class_names", ["a", "b"], "class c instead of none"),
    ("mean", [127.5, 127.5, 0.0], "mean 127.5 instead of 0.0"),
    ("std", [1.0, 1.0, 1.0], "standard deviation 63.75 instead of 1.0")])
def test_a_denoiser_for_other_data_is_refused(tmp_path, name, value, says):
    denoiser = model.build(_config())
    _save_denoiser(tmp_path, denoiser, model.PowerEMA(denoiser, (0.05,)))
    same = _config(dropout=0.3, channels=64, class_names=("a", "b", "c"))       # a tuple is as good as a list
    assert model.load_denoiser(tmp_path, like=same).config == denoiser.config
    with pytest.raises(ValueError) as error:
        model.load_denoiser(tmp_path, like=_config(**{name: value}))
    assert str(error.value) == f"it has {says}"


# ------------------------------------------------------------------------------------------------------------
# guide.py

def _gaussian_denoiser(std, shape=(2,), classes=0):
    """The exact denoiser of N(0, std^2 I); sigma is a number or [N]. It lists the levels of its calls."""
    def denoise(x, sigma, labels=None):
        denoise.levels.append(sigma)
        variance = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1) ** 2
        return x * (std ** 2 / (std ** 2 + variance))

    denoise.shape = shape
    denoise.classes = classes
    denoise.levels = []
    return denoise


def test_heun_converges_at_second_order():
    noise = torch.randn(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = noise * 5 * 0.5 / math.sqrt(25 + 0.25)              # x(sigma) ~ sqrt(std^2 + sigma^2)
    errors = []
    for steps in (32, 64, 128):
        denoiser = _gaussian_denoiser(0.5)
        x = guide.heun(denoiser, noise, steps=steps, sigma_min=0.002, sigma_max=5.0)
        errors.append((x - exact).norm() / exact.norm())
        assert len(denoiser.levels) == 2 * steps - 1
        assert all(type(level) is float for level in denoiser.levels)
    assert errors[-1] < 4e-4
    assert 3.3 < errors[0] / errors[1] < 4.7, errors
    assert 3.3 < errors[1] / errors[2] < 4.7, errors
    one_step = guide.heun(denoiser, noise, steps=1, sigma_max=5.0)
    assert torch.allclose(one_step, denoiser(5.0 * noise, 5.0))


def test_autoguidance_weights_and_interval():
    main = _gaussian_denoiser(0.5)
    weak = _gaussian_denoiser(1.0)
    x = torch.randn(5, 2)
    D_main = x * 0.25 / 0.34
    D_weak = x / 1.09
    for w, expected in (1, D_main), (0, D_weak), (2.5, D_weak + 2.5 * (D_main - D_weak)):
        guided = guide.autoguided(main, weak, w, (0.1, 1.0))
        assert torch.allclose(guided(x, 0.3), expected, atol=1e-6)
    for level in main.levels + weak.levels:
        assert level.tolist() == pytest.approx([0.3] * 5)
    for sigma in (0.09, 2.0):                                   # outside of the interval the guide is not run
        assert torch.equal(guided(x, sigma), main(x, sigma))
    assert len(weak.levels) == 2
    for other in _gaussian_denoiser(1.0, (3,)), _gaussian_denoiser(1.0, classes=2):
        with pytest.raises(ValueError, match="denoises"):
            guide.autoguided(main, other, 2.0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_depends_on_its_seed_alone(device):
    denoiser = guide.autoguided(_randomized(model.build(_config(shape=[3, 8, 8]))).eval().to(device))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])

    def draw(batch, seeds=range(7), labels=labels):
        batches = guide.generate(denoiser, seeds, labels, batch, device, steps=3, sigma_max=5.0)
        return torch.cat(list(batches)).cpu()
    backwards = draw(2, range(7)[::-1], labels.flip(0)).flip(0)
    for other in draw(1), draw(20), backwards:
        assert torch.allclose(other, draw(7), rtol=0, atol=0 if device == "cpu" else 1e-3)


# ------------------------------------------------------------------------------------------------------------
# train.py: gradients and targets

@pytest.mark.parametrize("W", [1, 1.6])
def test_gradients_by_hand_for_every_target(W):
    """EDM2's loss / e^u + u, but the network learns from the target, u from x0, each with the other fixed."""
    c = _settings("--data", _folder() / "d.npz", "--channels 8 --blocks 1 --batch 8 --guided-targets", W)
    denoiser = _randomized(_denoiser(c))
    weak = _randomized(model.build(train.model_config(c) | dict(channels=4)))
    batch, weight = _batches(c, data.load(c.data), 8)[0], torch.linspace(0.5, 1.5, 8)
    total, losses = train.make_objective(c, denoiser, weak if W != 1 else None)(*batch, weight)
    gradients = torch.autograd.grad(total, list(denoiser.parameters()))
    x, u = batch.x0 + batch.sigma.view(-1, 1, 1, 1) * batch.noise, denoiser.u(batch.sigma)
    D, target = denoiser(x, batch.sigma, batch.labels), batch.x0
    if W != 1:
        target = target + (1 - 1 / W) * (D - weak(x, batch.sigma, batch.labels)).detach()
    plain = model.per_example_loss(D.detach(), batch.x0, batch.sigma)
    by_hand = model.per_example_loss(D, target, batch.sigma) / u.detach().exp() + plain / u.exp() + u
    by_hand = torch.autograd.grad((weight * by_hand).mean(), list(denoiser.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-3) for a, b in zip(gradients, by_hand))
    assert torch.allclose(losses, plain, rtol=1e-5) and all(g.any() for g in gradients)


@pytest.mark.parametrize("W", [1.6, 3.0])
def test_the_fixed_point_of_guided_targets_is_the_guided_denoiser(W):
    c, (x0, noise) = _settings("--guided-targets", W), 0.7 * torch.randn(2, 999, 2)
    x, a = x0 + 0.4 * noise, torch.tensor(0.1, requires_grad=True)      # D(x) = a x, the guide x / 2
    learner = types.SimpleNamespace(loss=lambda *batch: (x0[:, 0], a * x))
    objective = train.make_objective(c, learner, lambda x, *_: 0.5 * x)
    for _ in range(300):
        total, _ = objective(x0, noise, torch.full((999,), 0.4), None, x0, torch.ones(999))
        a.data -= 0.05 * torch.autograd.grad(total, a)[0]
    best = (x * x0).sum() / (x * x).sum()                       # least squares: D* = best x
    assert torch.isclose(a, 0.5 + W * (best - 0.5), atol=1e-4) and abs(best - 0.5) > 0.1


def test_adam_is_that_of_a_loss_summed_over_dimensions():
    """EDM2 sums where this loss averages: D times larger gradients against the same eps."""
    for flags, D in (f"--data {_folder()}/d.npz --channels 8 --blocks 1 --warmup 0", 3 * 8 * 8), ("", 1):
        c = _settings(flags)
        learner = train.Learner(c)
        learner.project = lambda weights: None
        copies = [parameter.detach().clone().requires_grad_() for parameter in learner.parameters]
        adam = torch.optim.Adam(copies, lr=c.lr, betas=(0.9, 0.99), eps=1e-8)
        generator = torch.Generator().manual_seed(0)
        for step in range(3):
            for parameter, other in zip(learner.parameters, copies):
                parameter.grad = torch.empty_like(parameter).normal_(0, 1e-9, generator=generator)
                other.grad = D * parameter.grad
            learner.update(step)
            adam.step()
        for parameter, other in zip(learner.parameters, copies):
            assert torch.allclose(parameter, other, rtol=0, atol=1e-6)


def test_the_learning_rate_in_closed_form():
    c = argparse.Namespace(lr=0.5, lr_decay=100, warmup=4)
    rates = [train.learning_rate(c, step) for step in (0, 1, 4, 99, 100, 400)]
    assert np.allclose(rates, [0.1, 0.2, 0.5, 0.5, 0.5, 0.25])


def test_an_update_keeps_the_rows_of_all_weights_at_unit_rms():
    learner = train.Learner(_settings("--channels 8 --blocks 1 --lr 0.1 --data", _folder() / "d.npz"))
    weights = [layer.weight for layer in learner.denoiser.modules() if isinstance(layer, model.MPLayer)]
    before = [weight.detach().clone() for weight in weights]
    for parameter in learner.parameters:
        parameter.grad = torch.randn_like(parameter)
    learner.update(60)
    for weight, old in zip(weights, before):
        mean_square = weight.flatten(1).square().mean(1)
        assert torch.allclose(mean_square, torch.ones_like(mean_square), rtol=1e-5)
        assert not torch.equal(weight, old)


def test_the_stopwatch_counts_training_and_no_graph_that_is_compiled(monkeypatch):
    now = 100.0
    monkeypatch.setattr(train.time, "monotonic", lambda: now)
    for compiled, seconds in (True, [0, 2, 0, 2]), (False, [2, 2, 2, 2]):
        clock = train.Stopwatch(torch.device("cpu"), 5.0, compiled)
        with clock.paused():
            now += 50
        assert clock.read() == 5
        for graph, counted in zip("aaba", seconds):
            before = clock.read()
            clock.begin_step(graph)
            now += 2
            clock.end_step()
            assert clock.read() - before == counted


def test_a_non_finite_gradient_element_becomes_zero(monkeypatch):
    runs, build = [], model.build
    for value in 0.0, math.inf, -math.inf, math.nan:
        def hooked(config):
            denoiser = build(config)
            denoiser.net.out.weight.register_hook(
                lambda g: g.index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(value)))
            return denoiser
        monkeypatch.setattr(model, "build", hooked)
        run = _load(_train(TINY, "--guide none --steps 5"))
        runs.append(leaves([run["model"], run["optimizer"]["state"]]))
    assert all(all(map(torch.equal, run, runs[0])) for run in runs)
    assert all(weight.isfinite().all() for weight in runs[0])


def test_a_loss_that_is_not_finite_at_two_log_lines_ends_the_run(capsys, tmp_path, monkeypatch):
    noised, bad = data.Batches._noised, {12, 13, 14, 15, 16, 17}        # the steps before one log line
    monkeypatch.setattr(data.Batches, "_noised", lambda self, x0, labels, step: (
        noised(self, x0 * (math.nan if step in bad else 1), labels, step)))
    assert len(_records(_train(TINY, "--guide none --steps 30"))) == 5
    bad |= set(range(24, 48))
    for steps in 48, 30:                                        # two log lines; the last one
        flags = f"{TINY} --guide none --steps {steps} --save-every 0 --eval-every 6 --out {tmp_path}/{steps}"
        _one_line(capsys, train, flags, "--lr", "another --out", "kept", steps)
        assert _load(tmp_path / f"{steps}")["progress"]["step"] == 24   # of the last line that was finite


def test_a_run_that_diverges_before_its_first_checkpoint_holds_nothing(capsys, tmp_path, monkeypatch):
    flags = f"{TINY} --guide none --out {tmp_path}/run"
    with monkeypatch.context() as patch:
        noised = data.Batches._noised
        patch.setattr(data.Batches, "_noised", lambda self, x0, labels, step: (
            noised(self, x0 * math.nan, labels, step)))
        err = _one_line(capsys, train, flags, "--lr", "step 12")
    assert "kept" not in err and not (tmp_path / "run/checkpoint.pt").exists()
    assert len(_records(_train(flags, "--lr 0.001", out=tmp_path / "run"))) == 4


def test_micro_batches_change_no_gradient(monkeypatch):
    flags = f"{SMALL} --steps 1 --batch 16 --data {_folder()}/d.npz --selector jest --debias --guide none"
    gradients = []
    monkeypatch.setattr(model, "make_finite", lambda grads: gradients.append(torch.cat(
        [g.flatten() for g in grads])))
    for part in "", "--micro-batch 4":
        _train(flags, "--score root-loss", part)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6) and gradients[0].norm() > 0.1


# ------------------------------------------------------------------------------------------------------------
# train.py: runs that stop and go on

@pytest.mark.parametrize("flags", [
    "--selector uniform", "--selector ajest --early-steps 17", "--selector jest --debias --targets sample",
    "--selector ajest --until-better --after full", "--guided-targets 1.6 --guide-steps 9",
    "--data d.npz --selector ajest --class-weights dro --guide-steps 6 --dropout 0.2"])
@pytest.mark.parametrize("device", DEVICES)
def test_resuming_is_bit_identical(tmp_path, monkeypatch, flags, device):
    monkeypatch.chdir(_folder())
    stops = (11, 18) if "--data" in flags else (5, 20, 30)      # in the proxy and the model
    flags = (SMALL if "--data" in flags else TINY) + f"{flags} --device {device} --no-compile --no-bf16"
    whole, interrupted = _train(flags), tmp_path / "parts"
    _interrupt(monkeypatch, *stops)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            _train(flags, "--save-every 0", out=interrupted)
    _train(flags.replace("d.npz", "moved.npz"), out=interrupted)    # the same examples, wherever they lie
    if device == "cpu":
        return _same_run(whole, interrupted)
    pairs = zip(*(leaves(_load(run)["ema"]) for run in (whole, interrupted)))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in pairs)


def test_a_stop_in_an_evaluation_leaves_the_last_step(tmp_path, monkeypatch, capsys):
    flags, run = f"{TINY} --eval-samples 8 --eval-every 20", tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(fid.Evaluation, "sample", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        data.command(lambda: _train(flags, out=run))
    assert "the same command" in capsys.readouterr().err and _load(run)["progress"]["step"] == 20
    _train(flags, out=run)
    _same_run(_train(flags), run)                               # the loss at step 24, too


def test_the_same_command_goes_on_and_another_is_refused(tmp_path, capsys, monkeypatch):
    images, run = shutil.copy(_folder() / "d.npz", tmp_path / "d.npz"), tmp_path / "run"
    flags = f"{FEW} --channels 8 --blocks 1 --batch 4 --log-every 4 --data {images} --out {run} --steps"
    longer = _train(flags, "32 --guide-steps 2")
    _train(flags, 16, out=run)
    before = {path: path.read_bytes() for path in run.iterdir()}
    for flag in "--lr 0.02", "--seed 3", "--guided-targets 1.5", "--no-flip":
        _one_line(capsys, train, f"{flags} 16 {flag}", flag.split()[0].replace("--no-", "--"), run)
    _one_line(capsys, train, f"{flags} 15", "--steps 15", run)
    with train.locked(run):
        _one_line(capsys, train, f"{flags} 32", run, "another process")
    _images(images, n=59)
    assert "59 images" in _one_line(capsys, train, f"{flags} 32", run, "the data has changed")
    assert before == {path: path.read_bytes() for path in run.iterdir()}
    shutil.copy(_folder() / "d.npz", images)
    monkeypatch.setitem(train.PRESETS, "cpu", train.PRESETS["cpu"] | dict(warmup=9, lr_decay=5))
    _train(flags, 32, out=run)                                  # what is not given is as the run began
    _same_run(longer, run)


def test_a_checkpoint_in_a_new_folder_knows_its_settings_and_data(tmp_path, capsys):
    flags = f"{SMALL} --guide none --out {tmp_path}/new --data {_folder()}"
    run = _train(SMALL, f"--guide none --data {_folder()}/d.npz")
    (tmp_path / "new").mkdir()
    shutil.copy(run / "checkpoint.pt", tmp_path / "new")
    _one_line(capsys, train, f"{flags}/named.npz", "other data", "ant", tmp_path / "new")
    _one_line(capsys, train, f"{flags}/d.npz --seed 9 --lr 0.5 --keep 0.5 --batch 8", "--batch 4, not 8")
    _train(f"{flags}/d.npz --steps 8", out=tmp_path / "new")    # the same run, longer
    assert [r["step"] for r in _records(tmp_path / "new")] == [2, 4, 6, 8]


def test_what_is_not_typed_again_is_as_the_run_began(tmp_path):
    run = tmp_path / "run"
    _train(TINY, "--lr 0.003 --seed 5 --guided-targets 1.6 --steps 12", out=run)
    (run / "config.json").write_text("{}")                      # for people, nothing reads it
    _train(FEW, "--log-every 6 --steps 24", out=run)
    whole = _train(TINY, "--lr 0.003 --seed 5 --guided-targets 1.6")
    for one, two in zip(leaves(_load(whole)["model"]), leaves(_load(run)["model"])):
        assert torch.equal(one, two)


def test_a_run_goes_on_from_another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _fid_classifier("own.pt")
    shutil.copytree(_folder() / "reference", "guide")
    flags = f"{SMALL} --data {_folder()}/d.npz --keep 0.5 --prune-features own:own.pt --guide guide"
    _train(flags, "--metrics own:own.pt --eval-samples 8 --guidance 1.5 --steps 2", out=tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    _train(f"--device cpu --data {_folder()}/d.npz --steps 4", out=tmp_path / "run")
    assert [r["guidance"] for r in _records(tmp_path / "run", "eval")] == [1, 1.5, 1, 1.5]


@pytest.mark.parametrize("damage", [os.remove, lambda path: path.write_bytes(path.read_bytes()[:-900])])
def test_a_snapshot_that_is_gone_is_found_before_the_first_step(tmp_path, capsys, damage):
    flags = TINY.replace("--eval-samples 0", "--eval-samples 8")
    guided, distilled = _train(flags, "--guidance 2"), _train(flags, "--guided-targets 2")
    for run, more, words in (guided, "", "--guidance 1"), (distilled, "--guided-targets 2", "another --out"):
        damage(run / "guide.pt")
        _one_line(capsys, train, f"{flags} {more} --steps 40 --out {run}", run / "guide.pt", words)
        assert _load(run)["progress"]["step"] == 24
    _train(flags, "--steps 40 --guidance 1", out=guided)
    assert _load(guided)["progress"]["step"] == 40


@pytest.mark.parametrize("flags, stage, way_out", [
    (TINY + "--guide train --guidance 2 --guide-batch 64", "guide", "--guidance 1"),
    (TINY + "--selector ajest --guide-batch 64", "guide", "another --out"),
    (SMALL + "--data d.npz --class-weights dro", "proxy", "another --out")])
def test_a_stage_that_is_gone_is_not_trained_again(tmp_path, monkeypatch, capsys, flags, stage, way_out):
    monkeypatch.chdir(_folder())
    run = _train(flags, out=tmp_path / "run")
    shutil.rmtree(run / stage)
    for more in "", "--steps 40":
        _one_line(capsys, train, f"{flags} {more} --out {run}", run / stage, "gone", way_out)
    assert not (run / stage).exists()
    if way_out == "--guidance 1":
        _train(flags, "--steps 40 --guidance 1", out=run)
        assert _load(run)["progress"]["step"] == 40 and not (run / stage).exists()


@pytest.mark.parametrize("flags, way_out", [
    ("--selector ajest", "another --out"), ("--eval-samples 4 --metrics none", "--guidance 1")])
def test_the_guide_of_a_run_may_move_but_not_change(tmp_path, monkeypatch, capsys, flags, way_out):
    guide_run = shutil.copytree(_folder() / "reference", tmp_path / "guide")
    flags = f"{SMALL} {flags} --data {_folder()}/d.npz --out {tmp_path}/run"
    _train(flags, "--guide", guide_run, out=tmp_path / "run")
    guide_run.rename(tmp_path / "moved")
    _one_line(capsys, train, f"{flags} --steps 8", guide_run, "no such file", "--guide", way_out)
    monkeypatch.chdir(tmp_path)
    _train(flags, "--steps 8 --guide moved", out=tmp_path / "run")
    assert _load(tmp_path / "run")["progress"]["step"] == 8
    torch.save(_load("moved") | dict(log=[]), "moved/checkpoint.pt")
    _one_line(capsys, train, f"{flags} --steps 9", tmp_path / "moved", "changed", "another --out")
    torch.save(_load("moved") | dict(log=[]), _folder() / "changed.pt")
    _one_line(capsys, train, f"{flags} --steps 9 --guide {_folder()}/changed.pt", "moved, not", "changed.pt")


def test_own_features_are_found_from_another_folder(tmp_path, monkeypatch):
    _fid_classifier(tmp_path / "own.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    flags = f"{SMALL} --guide none --eval-samples 4 --data {_folder()}/d.npz"
    _train(flags, "--keep 0.5 --prune-features own:~/own.pt --metrics own:own.pt", out=tmp_path / "run")
    monkeypatch.chdir(_folder())
    _train(flags, "--steps 8", out=tmp_path / "run")
    assert "FD(own)" in _records(tmp_path / "run", "eval")[-1]


def test_another_guidance_reaches_the_checkpoint_of_a_finished_run():
    flags = f"{SMALL} --data {_folder()}/d.npz"
    run = _train(flags)
    _train(flags, "--guidance 2.5", out=run)
    assert _load(run)["model_config"]["guidance"] == 2.5


def test_a_checkpoint_of_another_version_is_refused_in_one_line(tmp_path, capsys):
    run = _train(TINY, "--guide none", out=tmp_path / "run")
    content = _load(run)
    del content["settings"]
    torch.save(content, run / "checkpoint.pt")
    before = (run / "checkpoint.pt").read_bytes()
    flags = f"{TINY} --guide none --out {run}"
    _one_line(capsys, train, flags, run / "checkpoint.pt", "it has no 'settings'")
    assert (run / "checkpoint.pt").read_bytes() == before


def test_a_start_that_is_refused_or_stopped_early_holds_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _interrupt(patch, 3)
        _train(TINY, "--guide none", out=tmp_path / "run")
    _train(TINY, "--guide none --batch 32 --lr 0.02", out=tmp_path / "run")
    assert _load(tmp_path / "run")["settings"]["batch"] == 32


def test_a_trained_guide_is_held_to_its_settings(tmp_path, capsys, monkeypatch):
    flags = f"{TINY} --selector ajest --guide-batch 64 --out {tmp_path}/run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _interrupt(patch, 10)                                   # the guide has 8 steps
        _train(flags, out=tmp_path / "run")
    _one_line(capsys, train, f"{flags} --lr 0.02", tmp_path / "run/guide", "--lr 0.01, not 0.02")
    _train(flags, "--gain 1", out=tmp_path / "run")             # which no guide knows


def test_an_error_of_training_is_not_taken_for_another_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model.PowerEMA, "update", mock.Mock(side_effect=BlockingIOError("not now")))
    err = _one_line(capsys, train, f"{TINY} --guide none --out {tmp_path}/run", "not now")
    assert "another process" not in err


def test_without_fcntl_there_is_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fcntl", None)
    with train.locked(tmp_path), train.locked(tmp_path):
        assert _records(_train(TINY, "--guide none"))


def test_help_shows_the_values_of_the_presets():
    actions = {action.dest: action.help for action in train.build_parser()._actions}
    for name, values in [
            ("batch", "[tree 816; 32 512; 64 256; latent 256; CPU 64]"), ("sampling_steps", "CPU 16]"),
            ("targets", "[tree exact; 32 sample;"), ("sigma_max", "[tree 5.0; 32 80.0;"),
            ("eval_samples", "[tree 163840; 32 10000; 64 10000; latent 10000; CPU 256]"),
            ("blocks", "CPU 1]"), ("log_every", "[tree 100; 32 50;"), ("ema", "[tree 0.02 0.1;"),
            ("lr", "[default 0.01]"), ("eta", "[default 1.0]")]:
        assert values in actions[name], actions[name]
    assert "[" not in actions["keep"] + actions["debias"] + actions["data"]
    assert set(train.DEFAULTS) == set(actions) - {"help"}


@pytest.mark.skipif(not SLOW, reason="SLOW_TESTS=1")
@pytest.mark.parametrize("flags", [
    TINY + "--selector ajest --after full --early-steps 6 --guided-targets 2",
    SMALL + "--data d.npz --selector ajest --class-weights dro --guided-targets 2 --steps 3"])
def test_a_compiled_run_is_the_eager_one(monkeypatch, flags):
    monkeypatch.chdir(_folder())
    compiled, calls = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda function, options=None, **how: (
        calls.append(function) or compiled(function, backend="eager", **how)))  # traced, but not lowered
    runs = [leaves(_load(_train(flags, way))["ema"]) for way in ("--compile", "--no-compile")]
    assert all(map(lambda a, b: torch.allclose(a, b, rtol=0, atol=1e-5), *runs)) and len(calls) > 2


@pytest.mark.parametrize("W", [1, 1.6])
def test_the_snapshot_is_the_ema_of_its_step(W):
    whole = _train(TINY, "--guide-steps 9 --guided-targets", W)
    snapshot, stopped = _load(whole, "guide.pt"), _load(_train(TINY, "--guide none --steps 9"))
    for kind in "ema", "model":
        snapshots = leaves(snapshot[kind]), leaves(stopped[kind])
        assert all(map(torch.equal, *snapshots)) and len(snapshots[0]) == len(snapshots[1]) > 0
    same = all(map(torch.equal, leaves(_load(whole)["model"]), leaves(_load(_train(TINY))["model"])))
    assert same == (W == 1)                                     # a snapshot alone changes nothing


def test_defaults_follow_the_run_and_the_machine(monkeypatch):
    images = f"--data {_folder()}/large.npz"
    c = _settings(images, "--selector ajest --steps 40 --batch 16 --channels 16")
    assert (c.guide, c.guide_channels, c.guide_batch, c.guide_steps) == ("train", 8, 16, 5)
    c = _settings("--selector ajest")
    assert (c.guide_channels, c.guide_batch, c.guide_steps, c.guidance) == (32, 4096, 1024, 3.0)
    c = _settings("--guided-targets 1.6 --steps 900")
    assert (c.guide, c.guide_steps, c.guidance, c.targets) == ("snapshot", 113, 1.0, "exact")
    c = _settings(images)
    assert (c.channels, c.blocks, c.steps, c.batch, c.flip, c.bf16, c.P_std) == (24, 1, 1000, 64, 1, 0, 1.2)
    monkeypatch.setattr(train, "WORLD", 3)
    for flags in "--batch 64", "--guide-batch 64", "--micro-batch 4", "--filter 0.67", "":
        with pytest.raises(data.DataError, match="multiple") if flags else contextlib.nullcontext():
            _settings("--selector ajest --batch 66 --guide-batch 66 --filter 0.5", flags)


BAD_FLAGS = [                                                   # the message names the last flag or file
    "--selector ajest --guide snapshot", "--guide none --guided-targets 2", "--keep 0.5", "--holdout 5",
    "--class-weights dro", "--flip", "--micro-batch 7", "--early-steps 5", "--data d.npz --holdout 60",
    "--data d.npz --size 12", "--data plain.npz --class-weights inverse", "--data /no/such/place",
    "--score hard", "--data d.npz --prune knn", "--data d.npz --eta 1", "--size 8",
    "--guide other --selector ajest --reference reference", "--guide none --guidance 0",
    "--selector jest --debias --chunks 4",
    "--steps 9 --guide-steps 10",
    "--filter 1", "--steps 1.5", "--device abacus", "--guided-targets 0.5", "--no-such-flag",
    "--data d.npz --guide large.npz", "--data d.npz --size 16 --guide other", "--data d.npz --guide other",
    "--data named.npz --selector jest --reference reference",
    "--data d.npz --selector ajest --class-weights plain.npz", "--guide none --guidance 2",
    "--data d.npz --eval-samples 2",
    "--data d.npz --selector ajest --eval-samples 3 --metrics own:/absent.pt"]
BAD_WEIGHTS = ["[1]", "[" * 100_000, '{"0": 1, "1": 1, "2": 1}', '{"weights": {"0": 1, "1": 1}}',
               '{"weights": {"0": NaN, "1": 1, "2": 1}}']


@pytest.mark.parametrize("flags, content", [*((flags, "") for flags in BAD_FLAGS), *(
    ("--data d.npz --class-weights w.json", content) for content in BAD_WEIGHTS)])
def test_bad_flags_and_class_weights_end_in_one_line(tmp_path, monkeypatch, capsys, flags, content):
    monkeypatch.chdir(_folder())
    Path("w.json").write_text(content)
    words = [word for word in flags.replace("own:", " ").split()
             if word[:2] == "--" or word[0] == "/" or Path(word).exists()]
    sizes = SMALL if ".npz" in flags else TINY
    err = _one_line(capsys, train, f"{sizes} {flags} --out {tmp_path}/run", words[-1])
    assert ("60 images of 3x" in err) == (".npz" in flags)      # what was found is said before
    assert not list(tmp_path.rglob("*.pt"))                     # and nothing trained


@pytest.mark.parametrize("flags, stages", [
    ("--class-weights dro", ["guide", "proxy", "run"]), ("--selector ajest", ["guide", "run"]),
    ("--class-weights inverse", ["run"])])
def test_every_stage_sees_the_pool_only(monkeypatch, tmp_path, flags, stages):
    calls, images = [], _folder() / "d.npz"

    def fit(c, dataset, out, keep, guide_path=None, class_weights=None, dro_reference=None, **_):
        calls.append((out.name, keep, c, class_weights))
        out.mkdir(exist_ok=True)
        costs = dict(seconds=0, other_seconds=0, examples_trained=0, other_examples=0)
        torch.save(dict(progress=costs), out / "checkpoint.pt")
        (out / "class_weights.json").write_text('{"weights": {"0": 0.5, "1": 1.0, "2": 3.0}}')
    monkeypatch.setattr(train, "train", fit)
    monkeypatch.setattr(data, "pixel_features", functools.partial(data.pixel_features, dims=4))
    pool = f"--data {images} --holdout 6 --imbalance 3 --keep 0.5"
    _train(SMALL, flags, pool, "--dropout 0.2", out=tmp_path / "run")
    (names, keeps, settings, weights), dataset = zip(*calls), data.load(images)
    pool, kept, held_out, _ = train.choose_examples(settings[-1], dataset, tmp_path)
    assert list(names) == stages and len(held_out) == 6 and not torch.isin(held_out, pool).any()
    assert len(pool) < 54 and torch.isin(kept, pool).all() and abs(2 * len(kept) - len(pool)) < 4
    assert all(map(torch.equal, keeps, [pool if "dro" in flags else kept, kept, kept][-len(stages):]))
    assert len({c.seed for c in settings}) == len(stages)       # a stage draws for itself
    assert [(c.channels, c.dropout) for c in settings] == [(4, 0), (4, 0), (8, 0.2)][-len(stages):]
    n, w = torch.bincount(torch.arange(60)[kept] % 3), torch.tensor([0.5, 1, 3])
    w = 1 / n if "inverse" in flags else w if "dro" in flags else None
    assert weights[-1] is w or torch.allclose(weights[-1], w * n.sum() / (w * n).sum())
    for changed, same in (held_out, True), (pool[::2], False):  # pruning, too, sees the pool only
        dataset.x[changed] = 255 - dataset.x[changed]
        other = train.choose_examples(settings[-1], dataset, tmp_path)[1]
        assert torch.equal(other, kept) == same


class _Losses(torch.nn.Module):
    """A reference whose loss is 0.1 on class 0, and huge on others."""

    def loss(self, x0, noise, sigma, labels, target):
        return torch.where(labels % 3 == 0, 0.1, 1e9), None


def test_the_proxy_finds_the_class_weights_of_doremi(monkeypatch, tmp_path):
    labels = torch.arange(60).sqrt().long() // 3
    counts = np.array([9, 27, 24])
    dataset = data.Dataset(torch.zeros(60, 3, 8, 8).byte(), labels, list("abc"))
    c = _settings(SMALL, "--class-weights dro --eta 0.5 --data", _folder() / "d.npz")
    c = train.stage_settings(c, "proxy", eta=c.eta, batch=64)
    make = train.make_objective
    seen = []

    def recording(*args):
        objective = make(*args)

        def record(*batch):
            total, losses = objective(*batch)
            seen.append((batch[3] % 3, batch[5], losses))
            return total, losses
        return record
    monkeypatch.setattr(train, "make_objective", recording)
    monkeypatch.setattr(train, "load_matching", lambda *_: _Losses())
    cost_of = train.cost_of
    monkeypatch.setattr(train, "cost_of", lambda path: (7.0, 11) if path == "r.pt" else cost_of(path))
    train.train(c, dataset, tmp_path, torch.arange(60), dro_reference="r.pt")
    alpha = np.full(3, 1 / 3)
    alphas = []
    for label, weight, losses in seen:                          # alpha weighs the next step's loss
        assert np.allclose(weight, (alpha * 60 / counts)[label], rtol=1e-4)
        excess = (losses[label == 0] - 0.1).clamp_min(0).mean().item()
        alpha = alpha * np.exp(0.5 * np.array([excess, 0, 0]))
        alpha = 0.999 * alpha / alpha.sum() + 0.001 / 3
        alphas.append(alpha)
    weights, seconds, examples = data.read_class_weights(tmp_path / "class_weights.json", c.class_names)
    expected = np.mean(alphas, 0) / counts
    assert np.allclose(weights, expected * 60 / (expected * counts).sum(), rtol=1e-4)
    assert alpha[0] > 0.6
    assert examples == 11 + len(seen) * 64 and seconds > 7      # those of the reference, too


def test_costs_of_what_a_run_needed_are_added():
    """Examples beside the run's own, unguided and guided: guides and proxies train on 8, `reference`, too."""
    flags = f"{SMALL} --steps 2 --eval-samples 3 --metrics none --guidance 2 --data {_folder()}/d.npz"
    reference, ajest = _folder() / "reference", _train(flags, "--selector ajest --guide train")
    weights = _train(flags, "--class-weights dro") / "proxy/class_weights.json"
    for more, main, guided in [
            ("--guide snapshot", 0, 0), ("--guide train", 0, 8), (f"--guide {reference}", 0, 8),
            (f"--selector ajest --guide {reference}", 8, 8), ("--class-weights dro", 16, 16),
            (f"--selector jest --reference {reference}", 8, 8), ("--selector ajest --score hard", 0, 8),
            (f"--guided-targets 2 --guide {ajest}", 16, 16),
            (f"--class-weights {weights}", 16, 16)]:
        records = _records(run := _train(flags, more), "eval")
        assert [r["guidance"] for r in records] == [1, 2]
        assert [r["other_examples"] for r in records] == [main, guided], more
        assert [r["other_seconds"] > 0 for r in records] == [main > 0, guided > 0]
        if str(reference) in more:
            assert records[1]["other_seconds"] == _load(reference)["progress"]["seconds"]
        assert {r["other_examples"] for r in _records(run)} == {main}


def test_features_count_when_they_come_from_the_cache_and_only_when_used(monkeypatch, tmp_path):
    flags = f"{SMALL} --steps 2 --guide none --keep 0.5 --data {_folder()}/d.npz --prune"
    _fid_classifier(tmp_path / "own.pt")
    monkeypatch.setattr(fid, "data_features", lambda network, dataset, label: (torch.randn(60, 5), 1000.0))
    run = _train(flags, f"gaussian --prune-features own:{tmp_path}/own.pt")
    assert 1000 < _records(run)[0]["other_seconds"] < 1010
    monkeypatch.setattr(data, "pixel_features", None)           # random pruning asks for no features
    assert _records(_train(flags, "random"))[0]["other_seconds"] < 10


# ------------------------------------------------------------------------------------------------------------
# Evaluation, the whole pipeline, and sample.py

def _sample(run, *flags, out):
    argv = [str(run), *"--device cpu --batch 16 --out".split(), str(out), *map(str, flags)]
    data.command(lambda: sample.main(argv))
    return dict(np.load(out)) if str(out).endswith(".npz") else None


def test_unlabelled_images_train_with_selection_and_validate_each_example_once():
    """At one noise level D = 0 has the loss lambda mean(x0^2), lambda(0.5) = 8, whatever the noise."""
    flags = f"{SMALL} --data {_folder()}/plain.npz --holdout 9 --selector ajest --filter 0.5 --metrics none"
    run = _train(flags, "--steps 20 --warmup 0 --eval-samples 4")
    dataset, c = data.load(_folder() / "plain.npz"), _settings(flags)
    c.eval_levels = dict(P_mean=math.log(0.5), P_std=1e-9)
    held_out = train.choose_examples(c, dataset, run)[2]
    evaluation = fid.Evaluation(c, dataset, run, held_out)
    expected = 8 * (dataset.x[held_out] / 127.5 - 1).square().mean().item()
    loss = evaluation.validation_loss(lambda x, sigma, labels: 0 * x)
    assert loss == pytest.approx(expected, rel=1e-4) and len(held_out) == 9
    loss = evaluation.validation_loss(lambda x, sigma, labels: x)
    assert loss == pytest.approx(8 * 0.5 ** 2, rel=0.2)         # lambda sigma^2, the noise that is in x
    logged = _records(run, "eval")[0]["validation_loss"]
    assert 0 < logged < 0.9 * expected and model.load_denoiser(run).classes == 2     # one is mirrored


def test_l2_is_taken_at_the_noise_level_and_steps_of_the_run(tmp_path):
    for flags in "--sigma-max 2 --sampling-steps 7", "--sigma-max 5 --sampling-steps 3", "":
        evaluation = fid.Evaluation(_settings(flags, "--eval-samples 64"), TREE, tmp_path)
        _, metrics = evaluation.sample(TREE.denoise)
        assert metrics["l2"] < 1e-5 and (flags or metrics["hit"] > 0.95)
        _, metrics = evaluation.sample(lambda x, *_: TREE.denoise(x, 1.0))
        assert metrics["l2"] > 0.01


def test_an_evaluation_accelerates_a_network_once_and_shows_how_far_it_is(tmp_path, monkeypatch):
    texts, accelerated = [], []
    accelerate = model.accelerate

    def counted(function, *args):
        accelerated.append(function)
        return accelerate(function, *args)
    monkeypatch.setattr(model, "accelerate", counted)
    monkeypatch.setattr(data, "progress", lambda text, last=False: texts.append((text, last)))
    c = _settings("--eval-samples 5000 --sampling-steps 1 --guidance 2")
    networks = [_denoiser(c), _denoiser(c)]
    evaluation = fid.Evaluation(c, TREE, tmp_path)
    evaluation.guide_costs = (3.0, 7)
    for step in 1, 2:
        progress = dict(step=step, other_seconds=1.0, other_examples=2)
        unguided, guided = evaluation(*networks, progress)
        assert [unguided["other_seconds"], unguided["other_examples"]] == [1, 2]
        assert [guided["other_seconds"], guided["other_examples"]] == [4, 9]
        log = [unguided, guided]
        assert evaluation.is_logged(log, step, 2.0) and not evaluation.is_logged(log, step, 3.0)
        assert not evaluation.is_logged([unguided], step, 2.0) and not evaluation.is_logged(log, 3, 2.0)
    assert accelerated == networks
    wanted = []
    for w in 1, 2:
        for drawn in "2,048", "4,096", "5,000":                 # in batches of 2,048 points
            wanted.append((f"evaluating, guidance {w}: {drawn}/5,000 samples", drawn == "5,000"))
    assert texts == wanted + wanted


def test_validation_noise_is_the_same_in_every_run_and_no_training_step_s(tmp_path):
    c = _settings(f"{SMALL} --data {_folder()}/plain.npz --batch 16 --eval-samples 4 --metrics none")
    dataset, seen = data.load(_folder() / "plain.npz"), []

    def denoiser(x, sigma, labels):
        seen.append(sigma)
        return x
    for seed in 0, 1:
        c.seed = seed
        fid.Evaluation(c, dataset, tmp_path, torch.arange(20)).validation_loss(denoiser)
    training = data.Batches(dataset, c.batch, 0, c.device, flip=c.flip, **c.eval_levels)
    assert torch.equal(torch.cat(seen[:2]), torch.cat(seen[2:])) and len(seen) == 4
    for step in 0, 1:
        assert not torch.isin(seen[step], training[step].sigma).any()


def test_every_run_is_evaluated_at_the_noise_levels_of_its_preset():
    for flags, P_mean, P_std in ("", -2.3, 1.5), (f"--data {_folder()}/d.npz", -1.2, 1.2):
        c = _settings(flags, "--P-mean 0.5 --P-std 3")
        assert (c.P_mean, c.P_std, c.eval_levels) == (0.5, 3, dict(P_mean=P_mean, P_std=P_std))


def test_the_real_examples_in_the_picture_have_the_classes_of_the_samples():
    labels = torch.tensor([0, 1, 1, 1, 1, 0, 1, 1])             # fewer examples than samples: they come again
    dataset = data.Dataset(torch.arange(8).view(8, 1, 1, 1), labels, ("few", "many"))
    c = argparse.Namespace(classes=2, class_shares=[0.25, 0.75])
    real = fid.Evaluation.real_examples(mock.Mock(c=c, dataset=dataset), 16).flatten()
    assert torch.equal(labels[real], data.classes_in_turn(c.class_shares, torch.arange(16)))
    assert set(real.tolist()) == set(range(8))                  # not one example again and again
    unlabelled = argparse.Namespace(classes=0, class_shares=[1.0])
    dataset = data.Dataset(torch.arange(8).view(8, 1, 1, 1))
    real = fid.Evaluation.real_examples(mock.Mock(c=unlabelled, dataset=dataset), 8)
    assert torch.equal(real, dataset.x)


@pytest.mark.parametrize("flags, number", [("", 0), ("--holdout 6", 1)])
def test_without_metrics_no_empty_line_is_printed(capsys, flags, number):
    _train(SMALL, f"--data {_folder()}/d.npz --guide none --eval-samples 4 --metrics none", flags)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == number and all("validation_loss 0." in line for line in lines), lines


def test_metrics_that_a_closed_terminal_loses_end_no_run(monkeypatch):
    evaluation = mock.Mock(records=mock.Mock(return_value=[dict(samples=4, l2=0.5)]))
    monkeypatch.setattr(sys, "stdout", GoneTerminal())
    fid.Evaluation.print_metrics(evaluation, [], 1, 1.0)
    assert evaluation.records.call_count == 1                   # it had a line to print


def test_the_whole_pipeline_on_images(tmp_path, capsys):
    flags = f"{SMALL} --data {_folder()}/named.npz --selector ajest --keep 0.5 --class-weights dro"
    flags += " --holdout 6 --steps 4 --eval-samples 10 --metrics "
    run = _train(flags, "pixels")
    unguided, guided = _records(run, "eval")
    assert {"FD(pixels)", "precision", "recall", "validation_loss"} <= set(unguided)
    assert (guided["guidance"], guided["features"], guided["samples"]) == (1.6, "pixels", 10)
    picture = Image.open(run / "samples.png")
    assert picture.size == (3 * (3 * 48 + 8), 4 * 48 + 24)      # real, unguided, guided: three columns each
    capsys.readouterr()
    before = (run / "checkpoint.pt").read_bytes()
    _train(flags, "pixels", out=run)                            # all is there: nothing is done again
    again = capsys.readouterr()                                 # but its metrics are said
    assert "step 4/4" not in again.err and (run / "checkpoint.pt").read_bytes() == before
    line = f"step 4, unguided (10 samples):  FD(pixels) {unguided['FD(pixels)']:.4f}  precision"
    assert again.out.startswith(line)
    for more in "none", "pixels --eval-samples 5", "pixels --guidance 2", "none --guidance 1.6":    # is there
        _train(flags, more, out=run)
        assert _load(run)["model_config"]["guidance"] == (2 if "2" in more else 1.6)    # for sample.py
    taken = [(r["features"], r["samples"], r["guidance"]) for r in _records(run, "eval")[2:]]
    assert taken == [("none", 10, 1), ("none", 10, 1.6), ("pixels", 5, 1), ("pixels", 5, 1.6),
                     ("pixels", 10, 1), ("pixels", 10, 2)]
    images = _sample(run, "--n", 5, out=tmp_path / "s.npz")
    assert images["images"].shape == (5, 3, 8, 8) and images["labels"].tolist() == [0, 1, 2, 0, 1]
    assert images["class_names"].tolist() == ["ant", "bee", "cat"]
    _sample(run, "--n", 5, "--batch", 2, out=tmp_path / "folder")
    pngs = [np.array(Image.open(path)).transpose(2, 0, 1) for path in sorted((tmp_path / "folder").iterdir())]
    assert np.array_equal(pngs, images["images"])
    _one_line(capsys, sample, f"{run} --n 1 --seed 4 --out {tmp_path}/folder", "folder: holds samples")


def test_latents_train_prune_reweight_guide_and_sample(tmp_path):
    labels = torch.arange(40) % 4 // 3                          # 30 and 10 examples
    latents = torch.randn(40, 4, 8, 8) * 3 + labels[:, None, None, None] * 4 + 1
    np.savez(tmp_path / "z.npz", latents=latents.half().numpy(), labels=labels.numpy())
    run = _train(SMALL, f"--data {tmp_path}/z.npz --selector ajest --keep 0.5 --class-weights dro",
                 "--eval-samples 6 --steps 3")
    assert "FD(pixels)" in _records(run, "eval")[0]
    latents, labels, _ = _sample(run, "--n", 4, "--steps", 12, out=tmp_path / "s.npz").values()
    assert latents.shape == (4, 4, 8, 8) and sorted(labels) == [0, 0, 0, 1]
    assert abs(latents.mean() - 2) < 1.5 and 2 < latents.std() < 6      # of the data: 2 and 3.5


@functools.cache
def _guided_runs():
    """A run whose samples are guided by its snapshot, and one that learned guided targets."""
    flags = f"{SMALL} --data {_folder()}/d.npz --lr 0.05 --warmup 0 --steps 4 --eval-samples 4 --metrics none"
    return _train(flags, "--guidance 2.5"), _train(flags, "--guided-targets 1.6")


def _draw_by_hand(w):
    """Four images of the guided run, with the settings of its evaluation and this weight of guidance."""
    run = _guided_runs()[0]
    network = model.load_denoiser(run)
    denoiser = guide.autoguided(network, model.load_denoiser(run / "guide.pt"), w)
    labels = torch.arange(4) % 3
    x = torch.cat(list(guide.generate(denoiser, range(4), labels, steps=2, sigma_max=80.0)))
    return data.unscale(x, network.config).numpy()


def test_samples_are_guided_as_the_run_was_evaluated_or_as_the_flags_say(tmp_path):
    run, distilled = _guided_runs()

    def draw(*flags, of=run):
        return _sample(of, "--n", 4, *flags, out=tmp_path / "x.npz")["images"]

    unguided = _draw_by_hand(1.0)
    guided = _draw_by_hand(2.5)
    assert not np.array_equal(unguided, guided)
    assert np.array_equal(draw(), guided)
    assert np.array_equal(draw("--guidance", 1), unguided)
    assert np.array_equal(draw("--interval", 1e3, 1e4), unguided)
    guide_alone = draw("--guidance", 0)
    assert np.array_equal(draw("--guide", run / "guide.pt", "--guidance", 0, of=distilled), guide_alone)
    for flags in ("--n", 1, "--class", "1", "--seed", 1), ("--n", 2, "--seed", 1):
        images = _sample(run, *flags, out=tmp_path / "y.npz")["images"]
        assert np.array_equal(images, guided[1:1 + len(images)])        # seed 1, class 1, whatever the number


def test_without_flags_samples_are_those_of_the_evaluation(tmp_path, monkeypatch):
    pictures = []
    image_grid = data.image_grid
    guide_run = _guided_runs()[0]                               # trained before pictures are remembered

    def remember(images, *args):
        pictures.append(images)
        return image_grid(images, *args)

    monkeypatch.setattr(data, "image_grid", remember)
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "far/away")       # the guide is found from a linked folder
    flags = f"{SMALL} --data {_folder()}/d.npz --lr 0.05 --warmup 0 --steps 4 --eval-samples 4 --metrics none"
    guided = _train(flags, "--sampling-steps 3 --sigma-max 9 --guidance 2 --guide", guide_run,
                    out=tmp_path / "runs/guided")
    distilled = _train(flags, "--guided-targets 1.6")
    _, unguided, with_guidance, _, of_distilled = pictures      # each run begins with real examples
    evaluated = [unguided, with_guidance, of_distilled]
    commands = [(guided, "--guidance", 1), (guided,), (distilled,)]
    for images, command in zip(evaluated, commands):
        sampled = _sample(*command, "--n", 4, out=tmp_path / "x.npz")["images"]
        assert np.array_equal(images, sampled)


def test_without_its_guide_a_run_is_sampled_unguided_only(tmp_path, capsys):
    run = shutil.copytree(_guided_runs()[0], tmp_path / "run")
    os.remove(run / "guide.pt")
    _one_line(capsys, sample, f"{run} --device cpu --out {tmp_path}/x.png", run / "guide.pt", "--guidance 1")
    assert not (tmp_path / "x.png").exists()
    images = _sample(run, "--n", 4, "--guidance", 1, out=tmp_path / "x.npz")["images"]
    assert np.array_equal(images, _draw_by_hand(1.0))


@pytest.mark.parametrize("flags, width", [([], 3 * 48), (["--class", "1"], 2 * 48)])
def test_a_picture_has_a_column_for_each_class(tmp_path, flags, width):
    _sample(_folder() / "other", "--n", 6, *flags, out=tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size[0] == width


@functools.cache
def _tree_run():
    return _train(TINY, "--guide none --ema 0.05")


def test_points_are_sampled(tmp_path):
    archive = _sample(_tree_run(), out=tmp_path / "points.npz")
    assert list(archive) == ["points"] and archive["points"].shape == (64, 2)


@pytest.mark.parametrize("flags, says", [
    ("IMAGES --out x.png --class dragon", "--class dragon: this model has 3 classes: 0, 1, 2"),
    ("TREE --out x.png --class dragon", "--class dragon: this model has 0 classes"),
    ("IMAGES --out x.gif", "--out x.gif: give a .png, an .npz or a folder"),
    ("IMAGES --out x.png --ema 0.2", "it has no EMA of length 0.2 (--ema), only 0.05, 0.1"),
    ("TREE --out x", "--out x: a folder holds images"),
    ("IMAGES --out x.png --guidance 2", "guidance 2 needs a guide, which this run does not have: give"),
    ("TREE --out x.png --guidance 3 --guide IMAGES", "kind image instead of tree"),
    ("TREE --out x.png --guidance 3 --guide absent.pt", "absent.pt: no such file"),
    ("TREE --out x.png --guidance 1 --guide TREE", "--guide has no effect with --guidance 1"),
    ("TREE --out x.png --guidance 1 --interval 1 2", "--interval has no effect with --guidance 1"),
    ("TREE --out x.png --guide TREE", "--guide has no effect without a --guidance"),
    ("TREE --out x.png --interval 1 2", "--interval has no effect without a --guidance"),
    ("TREE --out x.png --guidance 3 --guide TREE --interval 2 1", "--interval: give the lower level first")])
def test_flags_that_cannot_be_sampled_with_are_refused(tmp_path, monkeypatch, capsys, flags, says):
    flags = flags.replace("TREE", str(_tree_run())).replace("IMAGES", str(_folder() / "other"))
    monkeypatch.chdir(tmp_path)
    _one_line(capsys, sample, f"{flags} --device cpu", says)
    assert os.listdir() == []


@pytest.mark.parametrize("name, value, says", [
    ("bf16", None, "it has no bf16: another version of this program"),
    ("guide", 5, "its guide is of type int"),
    ("sampling_steps", "many", "its sampling_steps is of type str")])
def test_a_checkpoint_without_the_settings_of_its_evaluation_is_refused(tmp_path, capsys, name, value, says):
    checkpoint = _load(_tree_run())
    checkpoint["model_config"][name] = value
    if value is None:
        del checkpoint["model_config"][name]
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    _one_line(capsys, sample, f"{tmp_path} --device cpu --out {tmp_path}/x.png", "checkpoint.pt", says)


@pytest.mark.parametrize("device, bf16", [("cpu", False), ("cuda:0", True)])
def test_a_gpu_samples_in_the_precision_of_the_run(monkeypatch, device, bf16):
    accelerate = mock.Mock()
    monkeypatch.setattr(model, "accelerate", accelerate)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    for wanted in (True, False):
        config = train.model_config(_settings("--bf16" if wanted else "--no-bf16"))
        assert config["bf16"] == wanted
        sample.in_precision_of_run("network", config, device)
        accelerate.assert_called_with("network", device, wanted and bf16)


def test_the_guide_is_sampled_in_that_precision_too(tmp_path, monkeypatch):
    run = _train(TINY, "--guide-steps 6 --guidance 2 --bf16")
    calls = []

    def in_precision_of_run(network, config, device):
        calls.append(config["bf16"])
        return network

    monkeypatch.setattr(sample, "in_precision_of_run", in_precision_of_run)
    _sample(run, "--n", 1, out=tmp_path / "x.npz")
    assert calls == [True, True]


@pytest.mark.parametrize("encoding", [
    dict(PYTHONIOENCODING="ascii"), dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")])
def test_sampling_in_a_folder_with_an_umlaut_where_the_terminal_knows_none(tmp_path, encoding):
    folder = tmp_path / "K\u00f6ln"
    folder.mkdir()
    shutil.copy(_tree_run() / "checkpoint.pt", folder)
    command = [sys.executable, "sample.py", folder, "--out", folder / "x.npz", "--n", "2", "--device", "cpu"]
    done = subprocess.run(command, cwd=HERE, env=os.environ | encoding, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"wrote ") and (folder / "x.npz").exists()


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(_tree_run() / "checkpoint.pt", tmp_path)
    sample.main("~/checkpoint.pt --guide ~/checkpoint.pt --guidance 0 --out ~/x.npz --device cpu".split())
    assert (tmp_path / "x.npz").exists()


def test_help_without_docstrings():
    command = [sys.executable, "-OO", "sample.py", "--help"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sample.py runs/tree-ajest --n 10000" in done.stdout.split("options:")[0]


# ------------------------------------------------------------------------------------------------------------
# Damaged, foreign and hostile checkpoints: one line that names the file, nothing executed or half-written.

CHECKPOINTS = {                                                 # name: what(a good checkpoint) it holds
    "foreign class": lambda c: c | dict(x=types.SimpleNamespace()),
    "more bytes than the file": lambda c: c | dict(x=torch.zeros(1).expand(10 ** 12)),
    "other labels": lambda c: _load(_folder() / "other")}
USES = {"guide": (train, "RUN --guide {} --out {}/run"), "resume": (train, "RUN --guide none --out {1}"),
        "sample": (sample, "{} --n 2 --steps 2 --device cpu --out {}/x.npz"),
        "pair": (sample, "REFERENCE --device cpu --guidance 2 --guide {} --out {}/x.npz")}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoints_are_refused_in_one_line(tmp_path, capsys, name):
    good = {"sample", "resume"} if name == "other labels" else set()
    for use in USES.keys() - good:
        path, (program, flags) = tmp_path / "checkpoint.pt", USES[use]
        torch.save(CHECKPOINTS[name](_load(_folder() / "reference")), path)
        before, flags = path.read_bytes(), flags.replace("RUN", f"{SMALL} --data {_folder()}/d.npz")
        flags = flags.replace("REFERENCE", f"{_folder()}/reference").format(path, tmp_path)
        _one_line(capsys, program, flags, path)
        left = {file.name for file in tmp_path.rglob("*")}
        assert path.read_bytes() == before and left <= {"checkpoint.pt", "run", "config.json"}


# ------------------------------------------------------------------------------------------------------------
# Stopping anywhere: kills, a full disk; the same command again ends in the same bits. Several processes.

def _start(*flags, **env):
    return subprocess.Popen([sys.executable, *flags], cwd=HERE, text=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


@pytest.mark.parametrize("arm", ["--selector ajest --early-steps 90 --guided-targets 1.6"]
                         + ["--selector uniform", "--selector jest --targets sample"] * SLOW)
def test_killed_at_random_moments_ends_in_the_same_bits(tmp_path, arm):
    kills = 20 if SLOW else 1
    steps = 2000 if SLOW else 150
    random_time = random.Random(1)
    flags, killed = f"{TINY} {arm} --steps {steps} --log-every 7", tmp_path / "parts"
    saved, stamps = killed / "checkpoint.pt", [None]
    for _ in range(kills):
        process = _start("train.py", *flags.split(), "--save-every", "0", "--out", str(killed))
        while process.poll() is None and (saved.exists() and saved.stat().st_mtime_ns or None) == stamps[-1]:
            time.sleep(0.01)
        time.sleep(random_time.uniform(0, 0.2))
        process.kill()
        process.communicate()
        if process.returncode != 0:                             # 0: it was faster than the kill
            stamps.append(saved.stat().st_mtime_ns)
    assert len(stamps) > kills * 3 // 4
    _same_run(_train(flags), _train(flags, out=killed))


def test_a_full_disk_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    flags, stopped = TINY + "--guide none --save-every 0", tmp_path / "parts"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _interrupt(patch, 15)
        _train(flags, out=stopped)
    good, (soft, hard) = (stopped / "checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 2900, len(good) // 2, len(good) - 1):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            _one_line(capsys, train, f"{flags} --out {stopped}", stopped)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (stopped / "checkpoint.pt").read_bytes() == good and _load(stopped)["progress"]["step"] == 12
    _same_run(_train(flags), _train(flags, out=stopped))
    assert sorted(os.listdir(stopped)) == ["checkpoint.pt", "config.json", "log.jsonl"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_two_processes_give_the_weights_of_one(tmp_path):
    flags = [TINY + "--targets sample --guide-steps 9 --guided-targets 1.6 --steps 12",
             f"{SMALL} --data {_folder()}/d.npz --class-weights dro --keep 0.5 --steps 2"]
    flags[1] += " --guide-batch 24 --eta 400 --warmup 5"
    more = f" --eval-samples 4 --metrics pixels --selector ajest --debias --until-better --out {tmp_path}/2"
    runs = [f"{flags[0]} --out {tmp_path}/0", f"{flags[1]} --out {tmp_path}/1", flags[1] + more]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
    code = ("import sys, torch, train; train.join('cpu'); train.join = lambda device: None; "     # one group
            "torch.distributed.destroy_process_group = train.barrier; "
            "[train.main(flags.split()) for flags in sys.argv[1:]]")
    # As torchrun starts them.
    processes = [_start("-c", code, *runs, **env, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    errors = [part.communicate(timeout=300)[1] for part in processes]
    assert all(part.returncode == 0 for part in processes), errors
    for one, two in (_train(flags[0]), tmp_path / "0"), (_train(flags[1]), tmp_path / "1"):
        for a, b in zip(*(leaves([_load(run)[kind] for kind in ("model", "ema")]) for run in (one, two))):
            assert torch.allclose(a, b, rtol=0, atol=5e-5)     # small gradients differ by rounding
        for a, b in zip(_records(one), _records(two)):
            assert all(a[key] == b[key] for key in ("step", "examples_trained", "examples_drawn", "lr"))
    a = _load(one / "proxy")["dro"]["total"]
    b = _load(two / "proxy")["dro"]["total"]
    assert torch.allclose(a, b, rtol=1e-3) and a.std() > 0.01
    assert _load(_train(flags[0], "--steps 24", out=two.with_name("0")))["progress"]["step"] == 24
    assert len(_records(tmp_path / "2", "eval")) == 2 and len(_records(tmp_path / "2")) == 1


# ------------------------------------------------------------------------------------------------------------
# Files, flags and programs

def test_reading_turns_everything_into_one_line(tmp_path):
    path = tmp_path / "x.pt"
    for error in (ValueError("a\nb " + "c" * 500), RecursionError(), EOFError("\x1b[2J"), OSError(5, "out"),
                  KeyError("model"), TypeError("int"), struct.error("short"), SyntaxError("not a PNG file")):
        with pytest.raises(data.DataError, match="/x.pt: not it, [ -~]{1,200}$"), data.reading(path, "it"):
            raise error
    with pytest.raises(torch.OutOfMemoryError, match="^full$"), data.reading(path, "it"):
        raise torch.OutOfMemoryError("full")


def test_reading_lets_mistakes_of_the_program_pass(tmp_path):
    with pytest.raises(NameError), data.reading(tmp_path, "it"):
        no_such_name  # noqa: F821
    with pytest.raises(ImportError), data.reading(tmp_path, "it"):
        import no_such_module  # noqa: F401


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(), SystemExit("kill")])
def test_writing_is_whole_or_not_at_all_and_refused_before_the_work(tmp_path, monkeypatch, error):
    path = tmp_path / "new/x.pt"
    data.require_writable(path)                                           # makes the folder
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=error))            # the last moment
    with pytest.raises((data.DataError, SystemExit), match="/x.pt: cannot be written, |^kill$"):
        with data.writing(path) as file:
            file.write(b"new")
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["x.pt"]
    with pytest.raises(data.DataError, match="/new: is a folder"):
        data.require_writable(path.parent)
    with pytest.raises(data.DataError, match="/new/x.pt: cannot be written, File exists"):
        data.require_writable(path / "y.pt")


@pytest.mark.parametrize("error", [
    RuntimeError("shapes"), RuntimeError(), FileNotFoundError(2, "no", "other")])
def test_writing_lets_errors_of_the_block_pass(tmp_path, error):
    with pytest.raises(type(error)) as caught:
        with data.writing(tmp_path / "x.pt"):
            raise error
    assert caught.value is error and os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [0, 3000, 399_000])
def test_writing_names_the_file_that_torch_cannot_save(tmp_path, size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        with pytest.raises(data.DataError, match="/x.pt: cannot be written, File too large$"):
            with data.writing(tmp_path / "x.pt") as file:
                torch.save(torch.zeros(100_000), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, data.Terminated])
def test_a_stop_while_torch_saves_is_a_stop(tmp_path, stop):
    with pytest.raises(stop), data.writing(tmp_path / "x.pt") as file:
        writes = [len] * 3 + [mock.Mock(side_effect=stop)]     # torch then raises a RuntimeError of its own
        torch.save(torch.zeros(9), types.SimpleNamespace(
            write=lambda part: writes.pop(0)(part) and file.write(part), flush=file.flush))
    assert os.listdir(tmp_path) == []


def test_writing_knows_the_error_of_torch_by_its_words(tmp_path):
    words = "PytorchStreamWriter failed writing file data/0: file write failed"
    with pytest.raises(data.DataError, match=f"/x.pt: cannot be written, {words}"):
        with data.writing(tmp_path / "x.pt"):
            raise RuntimeError(words)


def test_leftovers_older_than_a_day_are_removed(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    (cache / "guide").mkdir(parents=True)
    ages = {"a.pt.12.tmp": 25, "guide/b.pt.7.tmp": 48, "new.pt.12.tmp": 23, "theirs.tmp": 99, "c.pt": 99}
    for name, hours in ages.items():
        (cache / name).write_bytes(b"x")
        then = time.time() - 3600 * hours
        os.utime(cache / name, times=(then, then))
    monkeypatch.setenv("DATA_CACHE", str(cache))
    data.load(data_write(tmp_path / "d", DATA_CLASSES))         # the start of a program
    assert not (cache / "a.pt.12.tmp").exists() and not (cache / "guide/b.pt.7.tmp").exists()
    assert all((cache / name).exists() for name in ("new.pt.12.tmp", "theirs.tmp", "c.pt"))
    data.remove_leftovers(tmp_path / "none")


def test_paths_begin_at_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA_CACHE", "~/c")
    assert data.path("~/runs/a") == f"{tmp_path}/runs/a" and data.path("runs/~") == "runs/~"
    assert data.cache_folder() == tmp_path / "c"


def test_flags_hold_their_range():
    count, share = data.number(int, "[1, inf)"), data.number(float, "(0, 1]")
    assert [count("1"), count("70000"), share("1"), share("1e-9")] == [1, 70000, 1, 1e-9]
    for parse, bad in ((count, ["0", "1.5", "x", "", "9" * 30, "9" * 5000]),
                       (share, ["0", "1.0001", "nan", "-inf"]), (data.device, ["no", "meta", "", "cuda:99"])):
        for text in bad:
            with pytest.raises((argparse.ArgumentTypeError, ValueError)):
                parse(text)


@pytest.mark.parametrize("error, status, says", [
    (data.DataError("f: not\na \x1b[2J thing"), 2, "error: f: not a  [2J thing\n"),
    (torch.OutOfMemoryError("CUDA"), 2, "error: out of device memory: give less\n"),
    (KeyboardInterrupt(), 130, "stopped")])
def test_command_ends_in_one_line(capsys, error, status, says):
    with pytest.raises(SystemExit, match=f"^{status}$"):
        data.command(mock.Mock(side_effect=error), "give less")
    text = capsys.readouterr().err
    assert says in text and text.count("\n") == 1


def test_sigterm_cleans_up_as_ctrl_c_does(tmp_path, capsys):
    def run():
        with data.writing(tmp_path / "x.pt") as file:
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    with pytest.raises(SystemExit, match="^143$"):
        data.command(run)
    assert os.listdir(tmp_path) == [] and "stopped" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class GoneTerminal(io.StringIO):
    """A stderr whose terminal has been closed."""

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")

    def isatty(self):
        return True


def _closed():
    file = io.StringIO()
    file.close()
    return file


@pytest.mark.parametrize("terminal", [GoneTerminal(), _closed(), None])
def test_a_closed_terminal_ends_no_program(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys, "stderr", terminal)
    data.progress("step 1", last=True)
    assert data.command(lambda: "done") == "done"
    with pytest.raises(SystemExit, match="^2$"):
        data.command(mock.Mock(side_effect=data.DataError("f: no")))
    assert capsys.readouterr().out == ""                        # nor does it go elsewhere


def test_no_program_dies_when_its_terminal_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", GoneTerminal())
    monkeypatch.setattr(sys, "stderr", GoneTerminal())
    run = _train(TINY.replace("--eval-samples 0", "--eval-samples 8"), out=tmp_path / "run")
    sample.main(f"{run} --n 2 --device cpu --out {tmp_path}/x.npz".split())
    fid.main(f"--compare {run} --out {tmp_path}/x.svg".split())
    fid.main(f"{_folder()}/d.npz {_folder()}/moved.npz --features pixels".split())
    model.supported("cuda", True, True)
    assert len(_records(run, "eval")) == 2
    assert {"run", "x.npz", "x.svg"} <= set(os.listdir(tmp_path))


def test_names_that_the_output_cannot_encode_are_escaped(monkeypatch):
    for stream in "stdout", "stderr":
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), "ascii"))

    def run():
        print("wrote K\xf6ln")
        raise data.DataError("\u732b: no such file")
    with pytest.raises(SystemExit, match="^2$"):
        data.command(run)
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"wrote K\\xf6ln\n"
    assert sys.stderr.buffer.getvalue() == b"error: \\u732b: no such file\n"


@pytest.mark.parametrize("columns, width", [(40, 39), (0, 79)])
def test_the_progress_line_fits_the_terminal(monkeypatch, columns, width):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(slave, "w") as terminal, open(master, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(data, "_progress_shown", -math.inf)
        data.progress("long " * 40)
        data.progress("too soon")
        data.progress("last", last=True)
        shown = b""
        while not shown.endswith(b"\n"):                        # a terminal passes on a piece at a time
            shown += screen.read(1000)
    rows = shown.decode().replace("\r\n", "\r").split("\r")
    assert [len(row) for row in rows] == [width, width, 0]
    assert rows[0].startswith("long long") and rows[1].rstrip() == "last"


# ------------------------------------------------------------------------------------------------------------
# The tree: built again from its description, without recursion, and evaluated component by component.

def data_tree(classes):
    """Weight [K], mean [K, 2] and covariance [K, 2, 2] of the mixture."""
    random = np.random.RandomState(2)
    scale = np.array([1.3136, 1.3844])
    weights = []
    means = []
    covs = []
    for name, start in (("A", math.pi / 4), ("B", 5 * math.pi / 4)):
        todo = [(0, np.array([0.0030, 0.0325]), start, 0)]
        while todo:
            d, position, a, sign = todo.pop()
            if sign != 0:
                a += sign * 0.7 ** (d - 1) * (0.2 * random.randn() + 1)
            if d == 7:                                          # its angle was drawn, but it does not grow
                continue
            u = np.array([math.cos(a), math.sin(a)])
            L = 0.292 * 0.8 ** d * (0.2 * random.randn() + 1)
            h = 0.2 * 0.8 ** d / L
            q = 0.06 * L * scale
            if name in classes:
                for t in np.linspace(0.07, 0.93, 8):
                    weights.append(L * 0.5 ** d)
                    means.append((position + u * L * t) * scale)
                    covs.append((np.outer(u, u) + h ** 2 * (np.eye(2) - np.outer(u, u))) * np.outer(q, q))
            todo += [(d + 1, position + u * L, a, sign) for sign in (-1, 1)]    # last in, first out
    weight = torch.tensor(weights, dtype=torch.float64)
    return weight / weight.sum(), torch.from_numpy(np.array(means)), torch.from_numpy(np.array(covs))


@pytest.mark.parametrize("classes", ["A", "B", "AB"])
def test_tree_is_the_mixture_of_its_description(classes):
    weight, mean, cov = data_tree(classes)
    tree = data.Tree(classes)
    generator = data.stream(0, 0, "x")
    x = tree.sample(50_000, generator).double()
    w = torch.randn(2, 100, generator=generator).double() * torch.logspace(-1, 2, 100)
    expect = weight.cdouble() @ (1j * (mean @ w) - (w * (cov @ w)).sum(1) / 2).exp()
    assert ((1j * (x @ w)).exp().mean(0) - expect).abs().max() < 3.5 / 50_000 ** 0.5        # E exp(i w x)
    x = x[:24] + 0.1 * torch.randn(24, 2, generator=generator)
    x[0] = torch.tensor([300, -40])                             # far away
    for sigma in (0.0, 0.1, torch.linspace(0.01, 5, 24, dtype=torch.float64)):
        at, square = x.clone().requires_grad_(), torch.as_tensor(sigma, dtype=x.dtype) ** 2
        total = cov + square.view(-1, 1, 1, 1) * torch.eye(2)                   # [n or 1, K, 2, 2]
        normals = torch.distributions.MultivariateNormal(mean, total)
        logp = (weight.log() + normals.log_prob(at[:, None])).logsumexp(1)
        score, = torch.autograd.grad(logp.sum(), at)
        torch.testing.assert_close(tree.logp(x, sigma), logp.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(tree.score(x, sigma), score, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(tree.logp(x.float(), sigma), logp.detach().float(), rtol=1e-4, atol=1e-2)


def test_tree_matches_published_values():
    # Class A by another implementation: log-density and score at sigma 0.3 and 2, mean.
    x, sigma = torch.tensor([[0.11582032, 0.18732561], [-0.23501758, 0.54852974]]), torch.tensor([0.3, 2])
    np.testing.assert_allclose(TREE.logp(x, sigma), [-0.25101787, -3.3006105], atol=1e-5)
    score = [[1.0193985, 0.82274252], [0.14667286, -0.044658203]]
    np.testing.assert_allclose(TREE.score(x, sigma), score, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Streams and batches

def test_stream_is_a_function_of_seed_step_and_name():
    keys = [(0, 0, "data"), (0, 1, "data"), (1, 0, "data"), (0, 0, "noise"), (0, 10, "data"), (1, 0, "0data")]
    assert len({tuple(torch.rand(4, generator=data.stream(*key)).tolist()) for key in keys}) == len(keys)
    assert data.stream(7, 11, "data").initial_seed() == 3203736056692259189     # everywhere


def data_set(kind="image", labelled=True):
    x = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (40, 3, 8, 8), dtype=np.uint8))
    labels, names = (torch.arange(40) % 4, list("abcd")) if labelled else (None, ())
    x = x if kind == "image" else x.half() / 8
    return data.Dataset(x, labels, names, kind, (9.0, 0, -4), (8.0, 2, 5))


DATA_POOL = torch.tensor([1, 2, 3, 7, 9, 21])


@pytest.mark.parametrize("dataset, options", [
    (data_set(), dict(examples=DATA_POOL, flip=True)), (data_set("latent"), {}),
    (TREE, dict(targets="exact"))])
def test_batches_depend_on_seed_and_step_alone_and_begin_alike(dataset, options):
    large, small = data.Batches(dataset, 48, 5, **options), data.Batches(dataset, 16, 5, **options)
    half = [data.Batches(dataset, 48, 5, rows=slice(rank, None, 2), **options) for rank in (0, 1)]
    for step in (4, 0, 4):                                      # in any order
        for got, rows in (small, slice(16)), (half[0], slice(0, None, 2)), (half[1], slice(1, None, 2)):
            torch.testing.assert_close(tuple(got[step]), tuple(large[step].rows(rows)))
    for other in (large[5], data.Batches(dataset, 48, 6, **options)[4]):
        assert not any(torch.equal(a, b) for a, b in zip(large[4][:3], other[:3]))


@pytest.mark.parametrize("kind, labelled, flip", [("image", 1, 1), ("image", 0, 1), ("latent", 1, 0)])
def test_batch_is_what_the_index_says_and_flips_are_labelled(kind, labelled, flip):
    dataset = data_set(kind, labelled)
    batches = data.Batches(dataset, 4096, 0, examples=DATA_POOL, flip=flip, P_mean=-2.3, P_std=1.5)
    batch = batches[0]
    mirrored = batch.labels >= max(dataset.classes, 1) if flip else torch.zeros(4096, dtype=torch.bool)
    plain = torch.where(mirrored[:, None, None, None], batch.x0.flip(3), batch.x0)
    mean = torch.tensor(dataset.mean).view(-1, 1, 1)
    std = torch.tensor(dataset.std).view(-1, 1, 1)
    every = (dataset.x - mean) / (2 * std)
    index = torch.cdist(plain.flatten(1), every.flatten(1)).argmin(1)           # which examples they are
    torch.testing.assert_close(plain, every[index])
    assert set(index.tolist()) == set(DATA_POOL.tolist()) and abs(mirrored.float().mean() - flip / 2) < 0.05
    assert not labelled or torch.equal(batch.labels, dataset.labels[index] + 4 * mirrored)
    torch.testing.assert_close(tuple(batches.of(index, 0)), tuple(batch))
    assert torch.equal(data.unscale(plain, vars(dataset)).to(dataset.x.dtype), dataset.x[index])
    for got, mean, std in ((batch.sigma.log(), -2.3, 1.5), (batch.noise, 0, 1)):
        assert abs(got.mean() - mean) < 0.1 and abs(got.std() - std) < 0.08


def test_classes_come_in_turn_or_in_their_shares():
    for classes in 1, 3, 1000:
        index = torch.arange(10 ** 5, 10 ** 5 + 5000)
        shares = torch.full((classes,), 1 / classes, dtype=torch.float64).tolist()
        assert torch.equal(data.classes_in_turn(shares, index), index % classes)
    shares = torch.tensor([0.7, 0.02, 0.0, 0.28])
    for part in torch.arange(4000).split(1000):
        counts = torch.bincount(data.classes_in_turn(shares.tolist(), part), minlength=4)
        assert (counts - 1000 * shares).abs().max() < 5 and counts[2] == 0


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.5, 0.3, 0.2]])
def test_classes_keep_their_shares_at_the_largest_seeds(shares):
    index = torch.arange(10 ** 15 - 30_000, 10 ** 15)
    counts = torch.bincount(data.classes_in_turn(shares, index), minlength=len(shares))
    assert (counts / 30_000 - torch.tensor(shares)).abs().max() < 0.001


def test_the_order_of_classes_is_the_one_that_doubles_gave():
    index = torch.arange(6000)
    turn = (index // 3).double()
    quantile = (index % 3 + (turn + 0.5) * 0.6180339887498949 % 1) / 3
    shares = [0.31, 0.49, 0.2]
    expect = torch.bucketize(quantile, torch.tensor(shares, dtype=torch.float64).cumsum(0))
    assert torch.equal(data.classes_in_turn(shares, index), expect)


def test_a_purpose_gives_batches_streams_of_their_own():
    training = data.Batches(TREE, 8, 0)
    validation = data.Batches(TREE, 8, 0, purpose="validation-")
    for ours, other in zip(training[0], validation[0]):
        assert ours is None or not torch.equal(ours, other)
    drawn = torch.randn(8, generator=data.stream(0, 0, "validation-sigma"))
    assert torch.equal(validation[0].sigma, (drawn * 1.2 - 1.2).exp())


def test_exact_targets_are_the_exact_denoiser():
    sample = data.Batches(TREE, 64, 3, targets="sample", P_mean=-2.3)[0]
    exact = data.Batches(TREE, 64, 3, targets="exact", P_mean=-2.3)[0]
    torch.testing.assert_close((*sample[:3], sample.target), (*exact[:3], exact.x0))
    x, sigma = exact.x0 + exact.sigma[:, None] * exact.noise, exact.sigma.double()
    expect = x + sigma[:, None] ** 2 * TREE.score(x.double(), sigma)            # Tweedie's formula
    torch.testing.assert_close(exact.target.double(), expect, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Loading: published layouts, and images as they are seen

def data_file(image, form="PNG", **options):
    """File content of a Pillow image or of pixels [H, W] or [H, W, C]."""
    file = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(file, form, **options)
    return file.getvalue()


def data_write(path, files):
    """Write {name: content} as an .npz, a .zip, a zip with .backslashes, or a folder (text: a link)."""
    if path.suffix == ".npz":
        np.savez(path, **files)
    elif path.suffix:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name if path.suffix == ".zip" else name.replace("/", "\\"), content)
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                (path / name).symlink_to(content)
            else:
                (path / name).write_bytes(content)
    return path


def data_batch(images, labels):
    """A CIFAR-10 batch (of four images) as Python 2 pickled it in 2009: byte strings, an array of numpy's."""
    return (b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            b"(K\x01K\x04M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
            b"J\xff\xff\xff\xffK\x00tb\x89T\x00\x30\x00\x00" + images.tobytes() + b"tbU\x06labels]("
            b"K%cK%cK%cK%ceU\x0bbatch_labelU\x15training batch 1 of 5u." % tuple(labels))


def data_under(folder, files):
    """The same files in a folder."""
    return {f"{folder}/{name}": content for name, content in files.items()}


def data_edm(*labels):
    """The files of a data set in EDM's format."""
    return DATA_EDM | {"dataset.json": json.dumps({"labels": [*zip(DATA_EDM, labels)] or None}).encode()}


DATA_R = np.random.RandomState(0)
DATA_C = DATA_R.randint(0, 256, (5, 4, 3, 32, 32), dtype=np.uint8)
DATA_TEN = [*range(10), *range(10)]
DATA_CIFAR = {f"data_batch_{i + 1}": data_batch(x, DATA_TEN[4 * i:4 * i + 4]) for i, x in enumerate(DATA_C)}
DATA_AGAIN = {b"data": DATA_C[4].reshape(4, -1), b"labels": DATA_TEN[16:]}
DATA_CIFAR["data_batch_5"] = pickle.dumps(DATA_AGAIN, 2)        # as Python 3 pickles it
DATA_RGB = DATA_R.randint(0, 256, (6, 8, 8, 3), dtype=np.uint8)
DATA_X = DATA_RGB.transpose(0, 3, 1, 2)
DATA_PNG = [data_file(pixels) for pixels in DATA_RGB]
DATA_CLASSES = {f"{'ant' if i < 3 else 'bee'}/{i}.png": png for i, png in enumerate(DATA_PNG)}
DATA_HIDDEN = {".trash/9.png": b"", "bee/@eaDir/3.png": b"", "__MACOSX/ant/0.png": b"", "bee/.3.png": b""}
DATA_EDM = {f"0000{i % 2}/img{i:08d}.png": png for i, png in enumerate(DATA_PNG)}
DATA_16, DATA_Z = np.uint16(DATA_R.randint(0, 2 ** 16, (8, 8))), np.float16(DATA_R.randn(9, 4, 8, 8))
DATA_GRAY = {"a.PNG": DATA_PNG[0], "b.png": data_file(DATA_RGB[1, ..., 0]), "c.png": data_file(DATA_16)}
DATA_AS = dict(labels=[0, 0, 0, 1, 1, 1], class_names=["ant", "bee"], x=DATA_X)
DATA_NO = dict(labels=None, class_names=[])
DATA_LAYOUTS = [                # suffixes (None: folder and zips), files, what is not as in DATA_AS
    (None, {**DATA_CLASSES, "x/a.txt": b"", "b.md": b""}, dict(
        report=["6 images of 3x8x8", "2 classes of 3 to 3: ant, bee",
                "2 other files left out (1 .md, 1 .txt)"])),
    (None, data_under("top/train", DATA_CLASSES | DATA_HIDDEN), {}),
    ([""], data_under(".all", DATA_CLASSES) | {"ant": ".all/ant", "test": ".all/ant"},          # links
     dict(class_names=["ant", "test"], x=DATA_X[[0, 1, 2] * 2])),
    (None, data_under("cifar-10-batches-py", DATA_CIFAR | {"test_batch": b""}), dict(
        labels=DATA_TEN, class_names=data.CIFAR_CLASSES, x=DATA_C.reshape(20, 3, 32, 32))),
    (None, data_edm(), DATA_NO | dict(x=DATA_X[[0, 2, 4, 1, 3, 5]])),
    (None, data_under("a/b", data_edm(0, 0, 2, 2, 5, 5)),
     dict(labels=[0, 0, 1, 1, 2, 2], class_names=[*"025"])),
    (None, DATA_GRAY, DATA_NO | dict(x=[DATA_X[0], [DATA_X[1, 0]] * 3, [DATA_16 >> 8] * 3])),
    ([".npz"], dict(images=DATA_X, other=np.array([{}])), DATA_NO),     # a pickled object, which is not read
    ([".npz"], dict(images=DATA_RGB, labels=[0, 0, 0, 2, 2, 2], class_names=["ant", "fly", "bee"]), {}),
    ([".npz"], dict(latents=DATA_Z), DATA_NO | dict(
        x=DATA_Z, kind="latent", mean=DATA_Z.mean((0, 2, 3), float), std=DATA_Z.std((0, 2, 3), float))),
    ([".npz"], dict(latents=DATA_Z, labels=[7] * 9, mean=[1.0, 0, 2, 3], std=[1.0, 2, 3, 4]), dict(
        x=DATA_Z, labels=[0] * 9, class_names=["7"], mean=[1, 0, 2, 3], std=[1, 2, 3, 4])),
]


@pytest.mark.parametrize("suffixes, files, more", DATA_LAYOUTS)
def test_published_layouts_are_read_back(tmp_path, suffixes, files, more):
    for suffix in suffixes or ("", ".zip", ".backslashes"):
        got = data.load(data_write(tmp_path / f"d{suffix}", files))
        for name, expect in (DATA_AS | more).items():
            same = np.allclose if name in ("mean", "std") else np.array_equal
            assert same(getattr(got, name), expect), (suffix, name)


def test_exif_turns_images_as_the_camera_was_held(tmp_path):
    # Where the standard's table for tag 0x112, 1 to 8, has the file's first row and first column.
    a, exif = DATA_RGB[0], b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0%c\0\0\0\0\0\0"
    files = {f"{i}.webp": data_file(a, "WEBP", exif=exif % i, lossless=True) for i in range(1, 9)}
    turned = [a.swapaxes(0, 1), np.rot90(a, -1), np.rot90(a, 2).swapaxes(0, 1), np.rot90(a)]
    seen = np.stack([a, a[:, ::-1], a[::-1, ::-1], a[::-1], *turned]).transpose(0, 3, 1, 2)
    assert np.array_equal(data.load(data_write(tmp_path / "d", files)).x, seen)


def test_what_is_transparent_is_on_white_paper(tmp_path):
    index = DATA_RGB[0, ..., 0] % 8                             # one picture of eight grays in three modes
    gray, alpha = np.arange(9, 249, 30, np.uint8), np.array([255, 255, 0, 255, 255, 51, 0, 255], np.uint8)
    g, a = gray[index], alpha[index]
    indexed = Image.fromarray(index).convert("P")
    indexed.putpalette(gray.repeat(3).tobytes())
    files = {"P.png": data_file(indexed, transparency=alpha.tobytes()),
             "LA.png": data_file(np.stack([g, a], 2)), "RGBA.png": data_file(np.stack([g, g, g, a], 2))}
    got = data.load(data_write(tmp_path / "d", files)).x.numpy()
    seen = 255 - (255.0 - g) * a / 255
    assert got.shape == (3, 3, 8, 8) and abs(got - seen).max() <= 0.5


def test_sizes_fingerprint_and_cache(tmp_path, monkeypatch):
    wide = DATA_RGB[:2].reshape(8, 16, 3)
    got = data.load(data_write(tmp_path / "d", {**DATA_CLASSES, "bee/wide.png": data_file(wide)}), size=4)
    seen = np.asarray(Image.fromarray(wide[:, 4:12]).resize((4, 4), Image.LANCZOS))
    one = data.load(data_write(tmp_path / "a", DATA_CLASSES))
    two = data.load(data_write(tmp_path / "b", DATA_CLASSES))
    assert one.fingerprint == two.fingerprint != got.fingerprint
    assert np.array_equal(got.x[6].permute(1, 2, 0), seen)
    (tmp_path / "b/ant/0.png").write_bytes(DATA_PNG[5])         # other content
    assert np.array_equal(data.load(tmp_path / "b").x, DATA_X[[5, 1, 2, 3, 4, 5]])
    monkeypatch.setattr(data, "_read_images", None)             # a second reading would fail
    assert np.array_equal(data.load(tmp_path / "a").x, DATA_X)
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(data.load("a").x, DATA_X)             # the same folder by another path


def data_report(path, size=None):
    return "; ".join(data.load(path, size).report)


def test_every_suffix_of_jpeg_is_read_and_others_are_named(tmp_path):
    jpeg = data_file(DATA_RGB[0], "JPEG")
    files = {"a/0.jfif": jpeg, "b/1.JPE": jpeg, "c/2.jpeg": jpeg}
    if ".avif" in data.IMAGES:
        files["d/3.avif"] = data_file(DATA_RGB[3], "AVIF")
    others = {"a/0.heic": b"", "a/1.heic": b"", "LICENSE": b"", "b/Thumbs.db": b""}
    got = data.load(data_write(tmp_path / "d", files | others))
    assert list(got.class_names) == [name[0] for name in files]
    assert got.report[2] == "4 other files left out (2 .heic, 1 .db, 1 without a suffix)"


@pytest.mark.parametrize("files, lost", [
    ("dog/0.png cat/0.heic cat/1.heic", "cat"),                 # dog is no folder that all share
    ("x/dog/0.png x/cat/0.heic", "cat"), ("a/0.png b/1.png c/2.bin c/notes.txt", "c"),
    ("a/0.png b/1.png c/d/2", "c")])
@pytest.mark.parametrize("form", ["", ".zip"])
def test_a_class_folder_that_loses_all_files_is_an_error(tmp_path, files, lost, form):
    contents = {name: DATA_PNG[0] if name.endswith(".png") else b"" for name in files.split()}
    with pytest.raises(data.DataError, match=f"the folder {lost} holds no image"):
        data.load(data_write(tmp_path / f"d{form}", contents))


def test_files_beside_the_classes_are_no_lost_class(tmp_path):
    layouts = "0.png 1.png raw/0.cr2", "a/0.png b/1.png notes/a.txt", "x/a/0.png x/b/1.png y/0.mat"
    for i, files in enumerate(layouts):
        contents = {name: DATA_PNG[0] if name.endswith(".png") else b"" for name in files.split()}
        assert "1 other files left out" in data_report(data_write(tmp_path / str(i), contents))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_that_holds_a_name_twice_is_an_error(tmp_path):
    path = data_write(tmp_path / "d.zip", DATA_CLASSES)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("bee\\4.png", DATA_PNG[0])             # the same name with another slash
    with pytest.raises(data.DataError, match="bee/4.png is in it twice"):
        data.load(path)


@pytest.mark.parametrize("name, seen", [
    ("K\xf6ln".encode(), "K\xf6ln"),
    (b"\x81ber", "\xfcber")])                                   # code page 437
def test_zip_names_without_the_flag_are_utf8_where_that_is_valid(tmp_path, name, seen):
    path = tmp_path / "d.zip"
    ascii_name = b"x" * len(name)
    data_write(path, {f"{ascii_name.decode()}/0.png": DATA_PNG[0], "dog/1.png": DATA_PNG[1]})
    path.write_bytes(path.read_bytes().replace(ascii_name + b"/", name + b"/"))
    assert set(data.load(path).class_names) == {"dog", seen}


def test_a_zip_of_the_current_folder_is_read(tmp_path):
    assert np.array_equal(data.load(data_write(tmp_path / "d.zip", data_under(".", DATA_CLASSES))).x, DATA_X)


def test_frames_left_out_are_counted(tmp_path):
    frames = [Image.fromarray(pixels) for pixels in DATA_RGB[:3]]
    for form in "TIFF", "GIF", "WEBP", "PNG":
        several = data_file(frames[0], form, save_all=True, append_images=frames[1:])
        path = data_write(tmp_path / form, {f"0.{form.lower()}": several, f"1.{form.lower()}": several})
        assert "4 frames left out: only the first is read of 2 files" in data_report(path)
        if form in ("TIFF", "PNG"):                             # the others are lossy
            assert np.array_equal(data.load(path).x, DATA_X[[0, 0]])
    photo = data_file(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert "frames" not in data_report(data_write(tmp_path / "phone", {"0.jpg": photo}))


def test_enlarged_images_are_counted(tmp_path):
    small, wide = data_file(DATA_RGB[0]), data_file(DATA_RGB[:4].reshape(16, 16, 3))
    path = data_write(tmp_path / "d", {"0.png": small, "1.png": wide})
    assert "1 images smaller than 12 pixels were enlarged" in data_report(path, 12)
    assert "enlarged" not in data_report(path, 8)
    path = data_write(tmp_path / "d.npz", dict(images=DATA_X))
    assert "6 images smaller than 12 pixels were enlarged" in data_report(path, 12)


def test_folders_of_runs_are_left_out(tmp_path):
    runs = {"runs/a/checkpoint.pt": b"", "runs/a/samples.png": DATA_PNG[5], "runs/b/guide/checkpoint.pt": b"",
            "runs/b/coreset.png": DATA_PNG[5], "runs/b/guide/x.png": DATA_PNG[5]}
    for form in "", ".zip":
        path = data_write(tmp_path / f"d{form}", DATA_CLASSES | runs)
        got = data.load(path)
        assert np.array_equal(got.x, DATA_X) and got.report[2:] == ["2 folders of runs left out"]
    monitored = (tmp_path / "d/runs/a/samples.png")
    monitored.write_bytes(b"newer")
    with mock.patch.object(data, "_read", None):                # the run changes nothing
        data.load(tmp_path / "d")
    with pytest.raises(data.DataError, match="/runs/a: not a data set, it is the folder of a run"):
        data.load(tmp_path / "d/runs/a")


def test_a_png_with_a_long_text_is_read(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a long prompt " * 200_000, zip=True)
    text.add_itxt("edits", "history " * 400_000, zip=True)
    assert len(data.load(data_write(tmp_path / "d", {"0.png": data_file(DATA_RGB[0], pnginfo=text)}))) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DATA_CACHE", f"{tmp_path}/file/cache")
    with pytest.raises(data.DataError, match="/file/cache: cannot be written, .*: set DATA_CACHE to a f"):
        data.load(data_write(tmp_path / "d", DATA_CLASSES))


def test_a_cache_in_a_folder_whose_name_is_not_utf8_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_CACHE", os.fsdecode(os.fsencode(tmp_path) + b"/l\xe4ufe"))
    path = data_write(tmp_path / os.fsdecode(b"\xe4"), DATA_CLASSES)
    assert np.array_equal(data.load(path).x, DATA_X) and np.array_equal(data.load(path).x, DATA_X)


def test_latents_that_the_unet_cannot_take_are_named(tmp_path, capsys):
    np.savez(tmp_path / "z.npz", latents=np.zeros((9, 4, 28, 28), np.float32))
    flags = f"{SMALL} --data {tmp_path}/z.npz --out {tmp_path}/run"
    err = _one_line(capsys, train, flags, "latents", "28", "8")
    assert "--size" not in err


@pytest.mark.parametrize("flags", ["--metrics inception", "--keep 0.5 --prune-features inception"])
def test_latents_are_refused_before_a_network_for_images_is_loaded(flags, tmp_path, capsys, monkeypatch):
    load_inception = mock.Mock()
    monkeypatch.setattr(fid, "load_inception", load_inception)
    np.savez(tmp_path / "z.npz", latents=np.random.default_rng(0).normal(size=(9, 4, 8, 8)).astype("f4"))
    flags = f"{SMALL} --data {tmp_path}/z.npz --out {tmp_path}/run {flags}"
    _one_line(capsys, train, flags, flags.split()[-2], "inception", "latents", "give pixels")
    assert not load_inception.called


# ------------------------------------------------------------------------------------------------------------
# Bad and hostile input: one line that names the file, and nothing runs.

DATA_BAD = [                    # what is loaded, the files there (or names of images), what the message says
    ("d/none", "0.png", "no such file"), ("d", ".a/0.png", "0 images"), ("d", "0.png a/1.png", "beside"),
    ("d", {"0.png": DATA_PNG[0], "1.png": data_file(DATA_RGB[0, :4])}, "--size"),
    ("d.zip", {"a/0.png": DATA_PNG[0], "a/\x1b[2J.png": DATA_PNG[0][:150]}, " [2J.png: "),
    ("d", {"f.tif": data_file(np.zeros((8, 8), np.float32), "TIFF")}, "f.tif: pixels of mode F"),
    ("d", {"i.tif": data_file(np.zeros((8, 8), np.int32), "TIFF")}, "i.tif: pixels of mode I"),
    ("d", "Training/ant/0.png VALID/ant/1.png", "Training, VALID look like splits"),
    ("d.zip", "x/ant/test/0.png x/ant/unlabeled/1.png x/bee/2.png", "in ant look like splits"),
    ("d", {"0.png": DATA_PNG[0], "1.txt": "gone"}, "1.txt: no such file"),
    ("d", {"0.png": DATA_PNG[0], "a": "../d"}, "symbolic links"),
    ("d", {"a/0.png": DATA_PNG[0], "b/1.png": DATA_PNG[1], "a/up": "../../d", "b/up": ".."}, "folder above"),
    ("d", data_under("x", DATA_CIFAR | {"data_batch_2": b"cos\nmkdir\n(S'ran'\ntR."}), "wants to run"),
    ("d", data_under("x", DATA_CIFAR) | data_under("copy", DATA_CIFAR), "10 of CIFAR-10's 5"),
    ("d.zip", data_edm(0, 1, 2, 3, 4), "img00000005.png is not listed (dataset.json)"),
    ("d", data_edm(0, 1, 2, 3, 4, "5"), "5, wanted a class number (dataset.json)"),
    ("d", data_edm(0, 1, 2, 3, 4, 1.5), "1.5, wanted a class number (dataset.json)"),
    ("d", data_under("a", data_edm()) | {"0.png": DATA_PNG[0]}, "a/dataset.json does not lie on top"),
    ("d", data_under("a", data_edm()) | data_edm(), "2 dataset.json"),
    ("d.npz", dict(latents=DATA_Z * np.nan), "NaN"), ("d.npz", dict(images=DATA_X, labels=[0]), "int64 [1]"),
    ("d.npz", dict(images=DATA_X, labels=[-1] * 6), "from 0 on"),
    ("d.npz", dict(images=DATA_X[:, :2]), "[6, 2, 8, 8], wanted three"),
    ("d.npz", dict(images=DATA_X, labels=[0] * 6, class_names=["a", "a"]), "K different"),
    ("d.npz", dict(samples=DATA_X), "neither `images` nor `latents`"),
    ("d.npz", dict(latents=DATA_Z, mean=[0] * 4, std=[1, 1, 1, 0]), "`std` above 0"),
]


@pytest.mark.parametrize("path, files, says", DATA_BAD, ids=[row[2] for row in DATA_BAD])
def test_bad_data_is_refused_in_one_line(tmp_path, monkeypatch, path, files, says):
    files = dict.fromkeys(files.split(), DATA_PNG[0]) if isinstance(files, str) else files
    data_write(tmp_path / path.split("/")[0], files)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError) as caught:
        data.load(tmp_path / path)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / path)) and says in text and text.isprintable()
    assert len(os.listdir()) == 1                               # nothing ran


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    entries = os.scandir(data_write(tmp_path / "d", DATA_CLASSES))              # root may read everything
    monkeypatch.setattr(os, "scandir", mock.Mock(side_effect=[entries, PermissionError("Permission denied")]))
    with pytest.raises(data.DataError, match="/d: not a data set, .*Permission denied"):
        data.load(tmp_path / "d")


def test_without_a_home_folder_the_cache_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("DATA_CACHE")
    monkeypatch.setattr(Path, "home", mock.Mock(side_effect=RuntimeError("no home")))
    with pytest.raises(data.DataError, match="DATA_CACHE"):
        data.load(data_write(tmp_path / "d", DATA_CLASSES))


# ------------------------------------------------------------------------------------------------------------
# Pruning and class weights

@pytest.mark.parametrize("n, d, scale", [(300, 6, 1), (5, 12, 1), (40, 6, 1e-6)])       # n < d, too
def test_gaussian_priority_is_the_shrunk_log_density(n, d, scale):
    random = np.random.RandomState(0)
    x = random.randn(n, d) @ random.randn(d, d) * scale
    S = np.cov(x.T, bias=True)
    tr, tr2 = np.trace(S), np.trace(S @ S)
    rho = min(1, ((1 - 2 / d) * tr2 + tr ** 2) / ((n + 1 - 2 / d) * (tr2 - tr ** 2 / d)))
    shrunk = (1 - rho) * S + rho * tr / d * np.eye(d)
    expect = multivariate_normal(x.mean(0), shrunk, allow_singular=True).logpdf(x)
    np.testing.assert_allclose(data.priorities(torch.from_numpy(x), None), expect, rtol=1e-9, atol=1e-8)


def test_knn_and_moderate_priorities_by_definition():
    x = np.random.RandomState(1).randn(2100, 5) + 50            # blocks of 2,048
    x[:40] = 80 + 1e-5 * np.arange(40)[:, None] ** 1.5          # near by: in float32 they would be one point
    knn = data.priorities(torch.from_numpy(x), None, "knn", k=4)
    moderate = data.priorities(torch.from_numpy(x), None, "moderate")
    distance = np.sqrt(sum((x[:, None, i] - x[None, :, i]) ** 2 for i in range(5)))
    np.testing.assert_allclose(knn, -np.partition(distance, 4, axis=1)[:, 4], rtol=1e-4)
    middle = np.linalg.norm(x - np.sort(x, 0)[(len(x) - 1) // 2], axis=1)
    np.testing.assert_allclose(moderate, -abs(middle - np.sort(middle)[(len(x) - 1) // 2]), atol=1e-6)


@pytest.mark.parametrize("method", data.PRUNING)
def test_kept_are_the_best_of_each_class_in_exact_numbers(method):
    labels = torch.arange(6).repeat_interleave(torch.tensor([50, 33, 17, 0, 1, 2]))[torch.randperm(103)]
    x = torch.randn(103, 4)
    priority = data.priorities(x, labels, method)
    wanted = {1.0: [50, 33, 17, 0, 1, 2], 0.5: [25, 16, 8, 0, 1, 1], 1e-6: [1, 1, 1, 0, 1, 1]}
    for keep, expect in wanted.items():
        kept = []
        for c, n in enumerate(expect):
            members = (labels == c).nonzero()[:, 0].tolist()
            kept += sorted(members, key=lambda i: -priority[i])[:n]
        assert data.prune(priority, labels, keep).tolist() == sorted(kept)
    alone = data.priorities(x[labels == 1], None, method)
    assert method == "random" or torch.allclose(priority[labels == 1], alone)


def test_pixel_features_are_principal_components_of_the_index_alone():
    dataset, index = data_set(), torch.arange(39, 4, -1)
    small = dataset.take(index).reshape(35, -1).double().numpy()                # 8x8 is the grid itself
    u, s, _ = np.linalg.svd(small - small.mean(0), full_matrices=False)
    got = data.pixel_features(dataset, index, 5).abs()
    np.testing.assert_allclose(got, abs(u[:, :5] * s[:5]), atol=1e-3)


def test_long_tail_counts():
    labels = torch.arange(1000) % 5
    kept = data.long_tail(labels, 16, seed=1)
    other = data.long_tail(labels, 16, seed=2)
    assert torch.bincount(labels[kept]).tolist() == [200, 100, 50, 25, 12]
    assert torch.equal(kept, kept.unique()) and not torch.equal(kept, other)
    labels = torch.tensor([0, 1, 3]).repeat_interleave(torch.tensor([90, 12, 30]))      # class 1 limits n_max
    assert torch.bincount(labels[data.long_tail(labels, 8)]).tolist() == [24, 12, 0, 3]


def test_the_pool_is_split_the_same_way_for_every_seed():
    dataset = data_set()                                        # 10 of each of four classes
    pool, held_out = data.split_pool(dataset)
    assert held_out is None and torch.equal(pool, torch.arange(40))
    pool, held_out = data.split_pool(dataset, holdout=7)
    assert torch.equal(torch.cat([pool, held_out]).sort().values, torch.arange(40)) and len(held_out) == 7
    assert torch.equal(held_out, held_out.sort().values)
    tail, same = data.split_pool(dataset, holdout=7, imbalance=8.0, seed=3)
    assert torch.equal(same, held_out) and torch.isin(tail, pool).all()
    assert torch.equal(tail, pool[data.long_tail(dataset.labels[pool], 8.0, 3)])


def test_class_weights_have_mean_one_over_the_examples():
    dataset = data_set()
    index = torch.tensor([0, 4, 8, 1, 2, 6])                    # classes 0 0 0 1 2 2
    counts = data.class_counts(dataset, index)
    assert counts.tolist() == [3, 1, 2, 0] and data.class_counts(dataset).tolist() == [10] * 4
    weights = data.class_weights_of_mean_one(torch.tensor([1.0, 2, 3, 4]), counts)
    assert torch.allclose(weights[dataset.labels[index]].mean(), torch.ones([]))
    assert torch.allclose(weights / weights[0], torch.tensor([1.0, 2, 3, 4]))
    inverse = data.class_weights_of_mean_one(data.inverse_frequency(counts), counts)
    assert torch.allclose((inverse * counts)[:3], torch.full((3,), 2.0))


def test_class_weights_are_read_back_with_their_cost(tmp_path):
    path, names = tmp_path / "w.json", ["a", "K\xf6ln"]
    data.write_class_weights(path, names, torch.tensor([0.25, 3.0]), 77.5, 76_800)
    weights, seconds, examples = data.read_class_weights(path, names[::-1])
    assert weights.tolist() == [3.0, 0.25] and (seconds, examples) == (77.5, 76_800)
    path.write_text('{"weights": {"a": 1, "b": 0}}')            # by hand
    weights, seconds, examples = data.read_class_weights(path, ["a", "b"])
    assert weights.tolist() == [1, 0] and (seconds, examples) == (0, 0)


@pytest.mark.parametrize("content", [
    "", "[1]", '{"a": 1, "b": 1}', '{"weights": [1, 1]}', '{"weights": {"a": 1}}',
    '{"weights": {"a": 0, "b": 0}}',
    '{"weights": {"a": -1, "b": 1}}', '{"weights": {"a": NaN, "b": 1}}', '{"weights": {"a": 1e300, "b": 1}}',
    '{"weights": {"a": "1", "b": 1}}', '{"weights": {"a": 1, "b": 1, "c": 1}}', "[" * 100_000,
    '{"weights": {"a": 1, "b": 1}, "seconds": -1}', '{"weights": {"a": 1, "b": 1}, "examples": null}'])
def test_other_files_are_no_class_weights(tmp_path, content):
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(data.DataError, match="/w.json: not class weights for these classes, "):
        data.read_class_weights(tmp_path / "w.json", ["a", "b"])


def test_group_dro_by_hand():
    dro = data.GroupDRO(3, eta=0.7, smoothing=0.01)
    alpha, total = np.full(3, 1 / 3), np.zeros(3)
    steps = [([0.4, -1.0, 0.8, 2.0, 1.0], [0, 0, 0, 2, 2], [0.4, 0, 1.5]),      # class 1 is absent
             ([0.3, 0.5, 9.0, math.nan, 0.2], [1, 1, 0, 2, 2], [9.0, 0.4, 0.1]),        # one of class 0 only
             ([0.2, 0.6], [1, 2], [9.0, 0.2, 0.6])]                     # class 0 is absent: it keeps its 9
    for excess, labels, e in steps:
        halves = zip(torch.tensor(excess).split(3), torch.tensor(labels).split(3))      # of two processes
        dro.update(sum(dro.totals(*half) for half in halves))
        alpha = alpha * np.exp(0.7 * np.array(e))
        alpha = 0.99 * alpha / alpha.sum() + 0.01 / 3
        total += alpha
        np.testing.assert_allclose(dro.alpha, alpha, rtol=1e-5)
    np.testing.assert_allclose(dro.mean_alpha, total / 3, rtol=1e-5)


def test_group_dro_takes_the_step_size_of_its_paper():
    dro = data.GroupDRO(2)
    dro.update(dro.totals(torch.tensor([0.5, 0.0]), torch.tensor([0, 1])))
    alpha = np.exp([0.5, 0.0]) / np.exp([0.5, 0.0]).sum()
    np.testing.assert_allclose(dro.alpha, 0.999 * alpha + 0.0005, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Pictures

def test_pictures():
    grid = np.array(data.image_grid(torch.from_numpy(DATA_X[:5]), 3, side=8)).transpose(2, 0, 1)
    assert np.array_equal(grid[:, 8:, 8:16], DATA_X[4]) and (grid[:, 8:, 16:] == 255).all()
    points = TREE.sample(400_000, data.stream(0, 0, ""))
    exact = np.asarray(data.density_picture(TREE, 60)) < 120
    drawn = np.asarray(data.density_picture(points, 60)) < 120
    assert 0.01 < exact.mean() < 0.2 and (exact == drawn).mean() > 0.95
    point = np.asarray(data.density_picture(torch.tensor([[1.2, 0.9]]), 30, center=0.0, side=3.0))
    assert np.argwhere(point < 255).tolist() == [[6, 27]]       # up and to the right


def test_coreset_picture_shows_who_is_kept_and_who_is_not():
    dataset, pool, priority = data_set(), torch.arange(38, 2, -1), torch.rand(36)       # 9 of each class
    dataset.x[:] = torch.arange(40).view(-1, 1, 1, 1) * 5       # each of one gray
    keep = data.prune(priority, dataset.labels[pool], 0.75)     # 7 of 9
    picture = np.asarray(data.coreset_picture(dataset, pool, priority, keep, columns=4))
    for c in range(4):                                          # best, last kept, first dropped: 4 each
        ranked = sorted((i for i in range(36) if pool[i] % 4 == c), key=lambda i: -priority[i])
        expect = [5 * int(pool[i]) for i in ranked[:4] + ranked[6:2:-1] + ranked[7:]] + [255, 255]
        middle = [(72 + 80 * c, 24 + 200 * part + 48 * i) for part in range(3) for i in range(4)]
        assert [picture[y, x, 0] for y, x in middle] == expect


# ------------------------------------------------------------------------------------------------------------
# fid.py: Fréchet distance, precision and recall

def _fid_normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _fid_naive_frechet(a, b):
    """tr sqrt(S_a S_b) is the nuclear norm of A B^T, the centered features over sqrt(n - 1), of any rank."""
    a, b = a.double(), b.double()
    A = (a - a.mean(0)) / (len(a) - 1) ** 0.5
    B = (b - b.mean(0)) / (len(b) - 1) ** 0.5
    traces = A.square().sum() + B.square().sum() - 2 * torch.linalg.svdvals(A @ B.T).sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + traces).item()


@pytest.mark.parametrize("n, m, d, offset", [(300, 200, 24, 0), (300, 200, 24, 1e3), (30, 25, 96, 0)])
def test_frechet_of_features_is_the_formula_by_singular_values(n, m, d, offset):
    a, b = offset + _fid_normal(0, n, d), offset + 0.3 + 1.5 * _fid_normal(1, m, d) @ _fid_normal(2, d, d)
    different = fid.image_metrics(a, b, "inception")["FID"]
    same = fid.image_metrics(a, a, "inception")["FID"]
    assert different == pytest.approx(_fid_naive_frechet(a, b), rel=1e-6) and abs(same) < 1e-3


def test_image_metrics_take_given_moments_and_leave_out_what_three_features_cannot_tell():
    x, nothing = torch.arange(9.0)[:, None], (torch.zeros(1), torch.zeros(1, 1))
    metrics = fid.image_metrics(x[:3], x, "own:1a", real_moments=nothing)
    assert metrics == {"FD(own)": pytest.approx(4 ** 2 + 7.5)}    # squared mean and variance of 0 ... 8


def test_precision_and_recall_of_many_are_those_of_a_fair_part():
    classes = torch.stack([torch.arange(600) // 200, torch.arange(600) % 3])    # one by one; in turn
    real, fake = 9 * classes[..., None] + _fid_normal(0, 2, 600, 1)
    metrics = fid.image_metrics(real, fake, "own:1a", most=200)
    assert metrics["precision"] > 0.9 and metrics["recall"] > 0.9


def _fid_naive_share(points, centres, k=3):
    radius = [sorted((c - other).norm() for other in centres)[k] for c in centres]      # 0 is c itself
    inside = [any((point - c).norm() <= r for c, r in zip(centres, radius)) for point in points]
    return np.mean(inside)


def test_precision_recall_equals_the_naive_version():
    real, fake = _fid_normal(0, 70, 5).double(), 0.3 + 0.7 * _fid_normal(1, 60, 5).double()
    both = _fid_naive_share(fake, real), _fid_naive_share(real, fake)
    assert fid.precision_recall(real, fake, block=16) == pytest.approx(both) and 1 > both[0] > both[1] > 0


# ------------------------------------------------------------------------------------------------------------
# fid.py: the Inception network. A row of the graph is blocks, then lines of convolutions, whose ends are
# joined; "/" halves, "-" does not pad.

FID_GRAPH = """5b 5c 5d, 1x1, 5x5_1 5x5_2, 3x3dbl_1 3x3dbl_2 3x3dbl_3, mean _pool
6a, 3x3/, 3x3dbl_1 3x3dbl_2 3x3dbl_3/, halve
6b 6c 6d 6e, 1x1, 7x7_1 7x7_2 7x7_3, 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5, mean _pool
7a, 3x3_1 3x3_2/, 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4/, halve
7b, 1x1, 3x3_1 3x3_2a, 3x3_1 3x3_2b, 3x3dbl_1 3x3dbl_2 3x3dbl_3a, 3x3dbl_1 3x3dbl_2 3x3dbl_3b, mean _pool
7c, 1x1, 3x3_1 3x3_2a, 3x3_1 3x3_2b, 3x3dbl_1 3x3dbl_2 3x3dbl_3a, 3x3dbl_1 3x3dbl_2 3x3dbl_3b, max _pool"""
FID_POOLS = {"halve": lambda x: F.max_pool2d(x, 3, 2), "max": lambda x: F.max_pool2d(x, 3, 1, 1),
             "mean": lambda x: F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)}


def _fid_naive_line(state, x, block, names):
    """A line of convolutions and pools of x [n, C, H, W] in float64, batch norms unfolded."""
    for name in names.split():
        if name in FID_POOLS:
            x = FID_POOLS[name](x)
            continue
        layer = f"{block}{name.strip('/-')}"
        weight = state[f"{layer}.conv.weight"].double()
        norm = {}
        for key in "running_mean", "running_var", "weight", "bias":
            norm[key] = state[f"{layer}.bn.{key}"].double()
        padding = [0 if name[-1] in "/-" else size // 2 for size in weight.shape[2:]]
        stride = 2 if name[-1] == "/" else 1
        x = F.conv2d(x, weight, None, stride, padding)
        x = F.relu(F.batch_norm(x, **norm, eps=0.001))
    return x


def test_inception_is_the_published_network_and_refuses_other_files(tmp_path):
    shapes = {key: value.shape for key, value in fid.Inception().state_dict().items() if value.ndim == 4}
    layout = sorted(f"{key[:-6]}conv.weight {'x'.join(map(str, shape))}" for key, shape in shapes.items())
    digest = hashlib.sha256("\n".join(layout).encode()).hexdigest()
    assert digest[:16] == "b0593a094ed0ea79"                    # of pt_inception-2015-12-05-6726825d.pth
    state, path = {"fc.weight": torch.zeros(1008, 2048)}, str(tmp_path / "weights.pth")
    for i, (key, shape) in enumerate(shapes.items()):
        state[f"{key[:-6]}conv.weight"] = _fid_normal(i, *shape) * (2 / shape[1:].numel()) ** 0.5
        for j, part in enumerate(("bias", "running_mean", "weight", "running_var")):
            state[f"{key[:-6]}bn.{part}"] = j // 2 + 0.1 * _fid_normal(4 * i + j, shape[0])
    torch.save(state, path, _use_new_zipfile_serialization=False)               # as the public file is
    images = torch.randint(256, (1, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = F.interpolate(images.double() / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    x = _fid_naive_line(state, x, "Conv2d_", "1a_3x3/ 2a_3x3- 2b_3x3 halve 3b_1x1 4a_3x3- halve")
    for blocks, *lines in (row.split(", ") for row in FID_GRAPH.splitlines()):
        for block in blocks.split():
            x = torch.cat([_fid_naive_line(state, x, f"Mixed_{block}.branch", names) for names in lines], 1)
    features, x = fid.extract(fid.network("inception", weights=path), images), x.mean((2, 3))
    assert fid.network("inception", weights=path).id.startswith("inception:")   # not the published ones
    assert features.dtype == torch.float32 and (features - x).abs().max() < 1e-4 * x.abs().max()
    less = {key: value for key, value in state.items() if "6b.branch1x1" not in key}
    for content in [1, 2], less, state | {f"more.{key}": value for key, value in state.items()}:
        torch.save(content, path)
        with pytest.raises(data.DataError, match="weights.pth: not the FID Inception weights"):
            fid.network("inception", weights=path)


# ------------------------------------------------------------------------------------------------------------
# fid.py: own features and the command line

def _fid_classifier(path, **changes):
    torch.manual_seed(0)
    net = fid.Classifier(2, width=4).eval()
    torch.save(dict(width=4, class_names=["a", "b"], size=8, model=net.state_dict()) | changes, path)
    return net


def _fid_run(capsys, *argv):
    """(exit status, stdout, stderr) of `python fid.py argv`."""
    try:
        status = data.command(lambda: fid.main([str(arg) for arg in argv]))
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_fit_learns_and_its_file_is_read_back(tmp_path, capsys):
    path = _images(tmp_path / "d.npz", 400)
    files = [tmp_path / f"{i}.pt" for i in range(3)]
    flags = [path, "--epochs", 12, "--width", 4, "--device", "cpu", "--seed"]
    dataset = data.load(path)
    printed = [_fid_run(capsys, "--fit", file, *flags, i // 2)[1] for i, file in enumerate(files)]
    nets = [fid.network(f"own:{file}") for file in files]
    right = [(net.logits(dataset.x).argmax(1) == dataset.labels).float().mean() for net in nets]
    assert min(right) > 0.9 and all(float(line.split("accuracy ")[1][:6]) > 0.9 for line in printed)
    assert nets[0].id == nets[1].id != nets[2].id               # a function of the seed


def test_classifier_round_trip_and_refusal(tmp_path):
    path, images = tmp_path / "own.pt", torch.randint(256, (5, 3, 24, 16), dtype=torch.uint8)
    net = _fid_classifier(path)
    assert torch.equal(fid.network(f"own:{path}")(images), net(images))
    with pytest.raises(data.DataError, match="give --size 8"):
        fid.extract(fid.network(f"own:{path}"), images)
    nan = {"model": {key: value * np.nan for key, value in net.state_dict().items()}}
    huge = {"model": {key: torch.zeros(1).expand(2 ** 50) for key in net.state_dict()}}     # holds one number
    for why, changes in ("not finite", nan), ("larger than", huge), ("size mismatch", {"width": 10 ** 6}):
        _fid_classifier(path, **changes)
        with pytest.raises(data.DataError, match=f"own.pt: not a classifier .*{why}"):
            fid.network(f"own:{path}")


def test_augment_shifts_and_flips_every_image_on_its_own():
    images, generator = _fid_normal(0, 64, 3, 9, 11), torch.Generator().manual_seed(1)
    out, padded = fid._augment(images, generator, shift=2), F.pad(images, (2, 2, 2, 2), mode="reflect")
    views = torch.stack([padded[..., y:y + 9, x:x + 11].flip(flip)
                         for flip in ((), (3,)) for y in range(5) for x in range(5)])
    same = (views == out).flatten(2).all(2)                     # [2 * 5 * 5, 64]
    assert (same.sum(0) == 1).all() and same[:25].any(1).sum() > 12 and same[25:].any(1).sum() > 12


def test_extract_pads_and_pixels_are_area_averages_also_of_latents(capsys):
    images, latents = (127 + 40 * _fid_normal(0, 7, 3, 16, 24)).to(torch.uint8), _fid_normal(0, 4, 4, 8, 8)
    net, shapes = fid.network("pixels"), set()
    net.register_forward_hook(lambda module, inputs, output: shapes.add(inputs[0].shape))
    expected = images.double().reshape(7, 3, 8, 2, 8, 3).mean((3, 5)).flatten(1) / 127.5 - 1
    assert torch.allclose(fid.extract(net, images, "images", batch=3).double(), expected, atol=1e-6)
    assert shapes == {(3, 3, 16, 24)} and "images: 7/7\n" in capsys.readouterr().err
    assert torch.equal(fid.extract(net, latents), latents.flatten(1))
    net.id = "inception"
    with pytest.raises(data.DataError, match="--features pixels"):
        fid.extract(net, latents)


def test_score_equals_a_direct_computation_warns_of_few_and_refuses_two_sizes(tmp_path, capsys):
    paths = _images(tmp_path / "real.npz", 60, 16), _images(tmp_path / "fake.npz", 45, 12)
    a = fid.Pixels()(data.load(paths[0], 8).x)
    b = fid.Pixels()(data.load(paths[1], 8).x)
    fid.warn_of_few(2048, "real")                               # these are enough
    _, out, err = _fid_run(capsys, *paths, "--features", "pixels", "--size", 8)
    precision, recall = _fid_naive_share(b, a), _fid_naive_share(a, b)
    assert out == (f"FD(pixels) {_fid_naive_frechet(a, b):.4g}  precision {precision:.4g}  "
                   f"recall {recall:.4g}  (60 real, 45 fake, features pixels)\n")
    assert "only 60" in err and "only 45" in err and "below 2048" in err and err.count("warning: ") == 2
    status, out, err = _fid_run(capsys, *paths, "--features", "pixels")
    assert (status, out) == (2, "") and "[3, 16, 16]" in err and err.endswith("give --size\n")


def test_statistics_files(tmp_path, capsys):
    paths = [tmp_path / f"{c}.npz" for c in "abc"]
    both = [_fid_normal(0, 50, 6), 2 + _fid_normal(1, 40, 6)]
    for path, f in zip(paths, both + [both[0] * np.nan]):       # as pytorch-fid writes them
        np.savez(path, mu=f.mean(0), sigma=np.cov(f, rowvar=False))
    out = _fid_run(capsys, *paths[:2])[1].split()
    assert out[0] == "FID" and float(out[1]) == pytest.approx(_fid_naive_frechet(*both), rel=1e-3)
    assert "--features pixels: statistics" in _fid_run(capsys, *paths[:2], "--features", "pixels")[2]
    assert "c.npz: not statistics" in _fid_run(capsys, *paths[1:])[2]


def test_data_features_are_computed_once_per_data_and_network(tmp_path, monkeypatch):
    _fid_classifier(tmp_path / "own.pt")
    nets = [fid.network(name) for name in ("pixels", f"own:{tmp_path / 'own.pt'}")]
    sets = [data.load(_images(tmp_path / f"{n}.npz", n)) for n in (20, 30)]
    pairs = [(net, dataset) for net in nets for dataset in sets]
    first = [fid.data_features(net, dataset) for net, dataset in pairs]
    for (net, dataset), (features, seconds) in zip(pairs, first):
        assert torch.equal(features, fid.extract(net, dataset.x)) and seconds > 0
    monkeypatch.setattr(fid, "extract", None)                   # the second time no network runs
    for (net, dataset), (features, seconds) in zip(pairs, first):
        again, seconds_again = fid.data_features(net, dataset)
        assert torch.equal(again, features) and seconds_again == seconds        # and costs the same


@pytest.mark.parametrize("argv, message", [
    ("d.npz", "REAL and FAKE, not 1"), ("--compare", "needs one or more run folders"),
    ("--fit own.pt --compare d.npz", "not allowed"), ("--fit own.pt d.npz one.npz", "one data set, not 2"),
    ("--fit own.pt d.npz", "20 or more"), ("d.npz d.npz --features vgg", "features vgg"),
    ("absent d.npz", "absent"), ("d.npz d.npz", "--inception-weights"), ("--compare d.npz", "not a run"),
    ("d.npz d.npz --features pixels --inception-weights w.pth", "--inception-weights has no effect"),
    ("one.npz d.npz --features pixels", "one.npz: only one image"),
    ("--compare d.npz --out c.png", "c.png: the chart")])
def test_what_does_not_fit_together_is_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.setenv("FID_INCEPTION_WEIGHTS", "d.npz")        # which holds none
    monkeypatch.chdir(tmp_path)
    _images("d.npz", 15)
    _images("one.npz", 1)
    status, out, err = _fid_run(capsys, *argv.split())
    assert (status, out) == (2, "") and message in err.splitlines()[-1]
    assert sorted(os.listdir()) == ["d.npz", "one.npz"]


def test_one_image_cannot_be_scored_and_the_way_out_is_said(tmp_path, capsys):
    path = _images(tmp_path / "one.npz", 1)
    flags = f"{SMALL} --data {path} --guide none --eval-samples 4 --steps 2 --out {tmp_path}/run"
    _one_line(capsys, train, flags, "one.npz", "--metrics none")
    train.main(f"{flags} --metrics none".split())
    assert _records(tmp_path / "run", "eval")[0]["features"] == "none"


def test_paths_may_begin_with_a_tilde(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    _images("d.npz", 60)
    flags = "--epochs 1 --width 2 --device cpu"
    _, out, _ = _fid_run(capsys, "--fit", "~/own.pt", "~/d.npz", *flags.split())
    assert "own.pt" in out and sorted(os.listdir()) == ["d.npz", "own.pt"]
    assert fid.network("own:~/own.pt").id == fid.network("own:own.pt").id
    _, out, _ = _fid_run(capsys, "~/d.npz", "~/d.npz", "--features", "own:~/own.pt")
    assert out.startswith("FD(own)")
    monkeypatch.setenv("FID_INCEPTION_WEIGHTS", "~/absent.pth")
    with pytest.raises(data.DataError, match=f"^{tmp_path}/absent.pth: no such file"):
        fid.network("inception")


def test_help_needs_no_docstrings_and_begins_with_commands():
    out = subprocess.check_output([sys.executable, "-OO", "fid.py", "--help"], cwd=HERE, text=True)
    assert out.index("python fid.py data/cifar10") < out.index("positional arguments") < out.index("--device")


def test_a_broken_download_of_inception_is_named_and_a_failed_one_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("FID_INCEPTION_WEIGHTS", raising=False)

    def broken(url, path, hash_prefix, progress):
        assert url.endswith(f"-{hash_prefix}.pth") and len(hash_prefix) == 8 and Path(path).parent.is_dir()
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", broken)
    with pytest.raises(data.DataError, match="^https.*: not downloaded.*FID_INCEPTION_WEIGHTS.*no network"):
        fid.network("inception")
    file = tmp_path / "hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"
    assert not file.exists()
    file.write_bytes(b"PK\3\4" + bytes(1000))                   # the beginning of an archive
    with pytest.raises(data.DataError, match=f"^{file}: not the FID .*delete this file"):
        fid.network("inception")


# ------------------------------------------------------------------------------------------------------------
# fid.py: metrics of the tree

def test_hit_coverage_and_reached_against_loops():
    tree = types.SimpleNamespace(logp=lambda x: x[:, 0] - 2.12)                 # hits are on the right
    cells = {}
    points = torch.cat([0.12 * _fid_normal(0, 3000, 2).double(), torch.tensor([[1.6, 0.0], [0.1, -1.51]])])
    for point in points[:-2]:                                   # the last two are hits outside of the grid
        cell = tuple(((point + 1.5) // (3 / 101)).tolist())
        cells[cell] = cells.get(cell, False) or bool(point[0] >= 0)
    hit = np.mean([bool(point[0] >= 0) for point in points])
    share = np.mean(list(cells.values()))
    metrics = fid.tree_metrics(points, tree, points[:50] + torch.tensor([3.0, 4.0]), exact_cells=1000)
    reached = sum(cells.values()) / 1000
    assert metrics == pytest.approx(dict(hit=hit, coverage=share, reached=reached, l2=5))


def test_a_collapsed_sampler_has_full_coverage_and_reaches_little():
    exact = TREE.sample(4000, data.stream(3, 0, "test"))
    good = exact[TREE.logp(exact).argmax()].expand(4000, 2)
    metrics = [fid.tree_metrics(points, TREE, points[:1]) for points in (exact, good)]
    assert metrics[1]["coverage"] == 1 and metrics[1]["reached"] < 0.01
    assert metrics[0]["coverage"] < 1 and abs(metrics[0]["reached"] - 1) < 0.1
    assert fid.exact_hit_cells(TREE, 400) < fid.exact_hit_cells(TREE, 4000) == fid.exact_hit_cells(TREE, 4000)


def test_score_error_is_zero_for_the_exact_denoiser_and_the_closed_form_for_a_biased_one():
    def biased(x, sigma, labels):                               # by c_out; lambda c_out^2 = 1
        return TREE.denoise(x, sigma) + (sigma * 0.5 / (sigma ** 2 + 0.25).sqrt())[:, None]
    assert fid.score_error(TREE.denoise, TREE, n=256) == 0
    assert fid.score_error(biased, TREE, n=5000) == pytest.approx(1, rel=1e-4)          # more than one block


# ------------------------------------------------------------------------------------------------------------
# fid.py: comparing runs

def _fid_log(folder, *points, **changes):
    """A run folder with an evaluation at each (step, distance): 10 examples and 0.1 seconds a step."""
    record = dict(kind="eval", step=1, other_seconds=0.0, other_examples=0, guidance=1.0, samples=64,
                  sampling_steps=4, features="pixels", data="1a") | changes
    records = [{"kind": "train", "loss": 1}]
    for step, y in points:
        records.append(record | {"seconds": step / 10, "examples_trained": 10 * step, "FD(pixels)": y})
    folder.mkdir()
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def _fid_rows(tables):
    return [line[2:-2].split(" | ") for line in tables.splitlines() if line.startswith("|")]


def test_compare_interpolates_counts_guides_averages_seeds_and_draws_each_arm(tmp_path, capsys):
    runs = [_fid_log(tmp_path / "a-s0", (10, 1), (30, 3)), _fid_log(tmp_path / "late", (40, 1), (50, 1)),
            _fid_log(tmp_path / "a-s1", (10, 3), (20, 2), (30, 5)),
            _fid_log(tmp_path / "<b&>-s0", (10, 4), (25, 1), other_seconds=1, other_examples=50)]
    _, out, _ = _fid_run(capsys, "--compare", *runs, "--out", tmp_path / "c.svg")
    rows = _fid_rows(out)
    assert rows[0] == rows[6] == ["arm", "runs", "FD(pixels)", "other_examples"]
    assert out.count("are from pixels, 64 samples, 4 steps, data 1a.") == 2
    assert [rows[2], rows[8]] == [["read at", "", x, x] for x in ("250", "3")]  # where the first run ends
    assert [rows[3], rows[9]] == [["a", "2", "3 ± 0.71", "0 ± 0"], ["a", "2", "4 ± 1.4", "0 ± 0"]]
    assert [rows[4], rows[10]] == [["late", "1", *2 * [f"from {x} on"]] for x in (400, 4)]
    assert [rows[5], rows[11]] == [["<b&>", "1", y, "50"] for y in "12"]
    root = xml.etree.ElementTree.parse(tmp_path / "c.svg").getroot()
    drawn = [np.array([pair.split(",") for pair in line.get("points").split()], float).T
             for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    ends = np.array([line[:, i] for line in drawn for i in (0, -1)]).T
    wanted = [1, 3, 4, 5, 2, 3.5], [2, 4, 1, 1, 4, 1]           # of a, late and <b&>: seconds, mean distance
    assert [np.corrcoef(*pair)[0, 1] for pair in zip(ends, wanted)] == pytest.approx([1, -1])  # y: down
    assert len(drawn) == 3 and "<b&>" in "".join(root.itertext())
    assert "the runs have FD(pixels)" in _fid_run(capsys, "--compare", *runs, "--metric", "beauty")[2]
    assert "no evaluations" in _fid_run(capsys, "--compare", _fid_log(tmp_path / "none"))[2]


@pytest.mark.parametrize("key", ["features", "guidance", "samples", "sampling_steps", "data"])
def test_compare_keeps_what_was_evaluated_differently_apart(tmp_path, key):
    runs = [_fid_log(tmp_path / f"a-s{i}", (10, i), **{"guidance": 3, key: i}) for i in (2, 4)]
    head, _, _, row = _fid_rows(fid.compare(runs, tmp_path / "c.svg"))[:4]
    assert len(set(head)) == 6 and sorted(row) == ["0", "0", "2", "2", "4", "a"]


def test_compare_reads_each_column_where_its_own_curves_end(tmp_path):
    """A guide's 5 seconds count for guided samples alone, or, where it also chose the batches, for all."""
    arms = {"uniform": (0, 5), "ajest": (1, 1)}                 # seconds besides, unguided and guided
    runs = []
    for name, (unguided, guided) in arms.items():
        runs.append(_fid_log(tmp_path / name, (10, 6), (30, 2), other_seconds=unguided))
        other = _fid_log(tmp_path / f"{name}-guided", (10, 3), (30, 1), other_seconds=guided, guidance=3)
        with open(runs[-1] / "log.jsonl", "a") as file:
            file.write("\n" + (other / "log.jsonl").read_text())
    rows = _fid_rows(fid.compare(runs, tmp_path / "c.svg"))
    assert rows[0][2:4] == ["FD(pixels)", "FD(pixels), guided 3"]
    assert rows[2][2:4] == ["300", "300"]                       # examples
    assert rows[7][2:4] == ["3", "4"]                           # seconds: of uniform, of AJEST
    assert rows[8][2:4] == ["2", "from 6 on"]
    assert rows[9][2:4] == ["4", "1"]                           # AJEST unguided, halfway from 2 to 4 seconds


def test_compare_reads_what_ended_early_where_it_ended(tmp_path):
    few = _fid_log(tmp_path / "few", (10, 1), samples=8)
    run = _fid_log(tmp_path / "run", (10, 5), (30, 2))
    both = (few / "log.jsonl").read_text() + "\n" + (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(both)
    rows = _fid_rows(fid.compare([run], tmp_path / "c.svg"))
    assert sorted(rows[2][2:]) == ["100", "100", "300", "300"]
    assert sorted(rows[3][2:]) == ["0", "0", "1", "2"]
