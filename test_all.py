"""Every test: pytest test_all.py. No network, no data, two CPU cores.

Each holds the code against an independent reference: a naive version, a closed form, a published layout. The
long ones (many kills, the compiled UNet, milliseconds) run with SLOW_TESTS=1; those that take a device also
run on CUDA where there is one.
"""
import argparse
import copy
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import xml.etree.ElementTree
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.flop_counter
from PIL import Image
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
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
TEMP = tempfile.TemporaryDirectory(prefix="tests-")             # deleted at the end
os.environ["DATA_CACHE"] = os.path.join(TEMP.name, "cache")     # never the user's own
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"               # no pool of processes for a small graph


# ------------------------------------------------------------------------------------------------------------
# Small runs: settings, states, batches, images.

FEW = "--device cpu --eval-samples 0 --sampling-steps 2 "
TINY = FEW + "--steps 24 --batch 64 --guide-steps 8 --guide-batch 64 --log-every 6 "        # on the tree
SMALL = FEW + "--channels 8 --batch 4 --guide-steps 2 --steps 6 --log-every 2 "             # on images
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
    shutil.copy(folder / "d.npz", folder / "moved.npz")
    for name, flag in ("reference", "--flip"), ("other", "--no-flip"):
        _train(SMALL, flag, "--guide none --steps 2 --data", folder / "d.npz", out=folder / name)
    return folder


def _resolve(flags, dataset=TREE):
    return train.resolve(train.build_parser().parse_args(["--device", "cpu", *flags.split()]), dataset)


def _state(c):
    return train.State(c, Path(tempfile.mkdtemp(dir=TEMP.name)) / "checkpoint.pt")


def _batches(c, dataset=TREE, n=64, **more):
    how = dict(device=c.device, flip=c.flip, targets=c.targets, P_mean=c.P_mean, P_std=c.P_std)
    return data.Batches(dataset, n, c.seed, **how | more)


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
        one, two = (flatten(dict(_load(run, stage), config=None))[0] for run in (a, b))
        assert len(one) == len(two)
        for (where, x), (_, y) in zip(one, two):
            same = torch.equal(x, y) if torch.is_tensor(x) else x == y
            assert same or "second" in str(where[-1]), (stage, where)
    assert all(_load(run)["records"] == _records(run, None) for run in (a, b))


def _one_line(capsys, program, flags, *words):
    """The program ends with status 2 and one printable error line that holds `words`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        data.command(program.run, program.build_parser(), flags.split())
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    assert stop.value.code == 2 and err.count("error: ") == 1 and "error: " in last and "Traceback" not in err
    assert last.isprintable() and all(str(word) in last for word in words), err


@pytest.fixture(autouse=True)
def one_block_a_level(monkeypatch):
    """UNets built from a configuration have one block a level, not three: the same paths in half the time."""
    monkeypatch.setattr(model.UNet.__init__, "__defaults__", (*model.UNet.__init__.__defaults__[:-1], 1))


# ------------------------------------------------------------------------------------------------------------
# select.py

PYTHONS = {sys.executable, shutil.which("python3", path="/usr/bin") or sys.executable}


@pytest.mark.parametrize("python", PYTHONS)
def test_standard_library_finds_its_own_select(python):
    code = "import sys, subprocess, asyncio, select; assert select.select and 'torch' not in sys.modules"
    copy = shutil.copy(HERE / "select.py", tempfile.mkdtemp(dir=TEMP.name))     # a second clone on the path
    env = {**os.environ, "PYTHONPATH": os.path.dirname(copy)}
    assert subprocess.run([python, "-c", code], cwd=HERE, env=env).returncode == 0


def _naive_jest(learner, reference, k, chunks, generator):
    """The published matrix form: conditional logits from S_ij = learner_i - reference_j, draw by draw."""
    S, chosen = learner[:, None] - reference, []
    while len(chosen) < k:
        rows, columns = S[:, chosen].sum(1), S[chosen].sum(0)
        logits = (S.diagonal() + rows + columns) / (2 * len(chosen) + 1) if chosen else 0 * learner
        p = (logits - logits.max()).exp()
        p[chosen] = 0
        chosen += torch.multinomial(p, min(k // chunks, k - len(chosen)), generator=generator).tolist()
    return chosen


def test_jest_includes_as_often_as_the_matrix_form():
    generator, runs, k, chunks = torch.Generator().manual_seed(0), 1500, 9, 4   # chunks of two, one of one
    learner, reference = torch.rand(2, 24, generator=generator).double() * torch.tensor([[3.0], [1.0]])
    counts = torch.zeros(2, 24)
    for _ in range(runs):
        counts[0, select.jest((learner - reference).float(), k, chunks, generator)] += 1
        counts[1, _naive_jest(learner, reference, k, chunks, generator)] += 1
    p = counts / runs
    assert torch.allclose(p.sum(1), torch.full((2,), float(k)))         # no index twice
    error = (p[0] - p[1]) / (p.mean(0) * (1 - p.mean(0)) * 2 / runs).sqrt()
    assert error.abs().max() < 4 and p.std(1).min() > 0.1       # and selection is far from uniform
    for B, k, chunks in (10, 10, 3), (100, 17, 5), (5, 3, 16), (4080, 816, 16):
        assert select.jest(torch.randn(B) * 1e4, k, chunks).unique().numel() == k


def test_gumbel_top_k_weights_make_any_mean_unbiased():
    generator = torch.Generator().manual_seed(1)
    logits, f = 2 * torch.randn(40, generator=generator), torch.randn(40, generator=generator) + 1
    f = f + logits                      # what is selected more often is larger: ignoring the weights shows
    draws = [select.gumbel_top_k(logits, 8, generator) for _ in range(5000)]
    means = [torch.stack([(w * f[i]).mean(), f[i].mean()]) for i, w in draws]
    weighted, plain = torch.stack(means, 1).double()
    assert (weighted.mean() - f.mean()).abs() < 4 * weighted.std() / len(draws) ** 0.5
    assert (plain.mean() - f.mean()).abs() > 40 * plain.std() / len(draws) ** 0.5
    assert (select.gumbel_top_k(logits, 40, generator)[1] == 1).all()


def test_scores():
    learner, reference = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 2.0])
    assert select.score(learner, reference).tolist() == [2, -1, 0]
    assert select.score(learner, None, "hard").tolist() == [3, 1, 2]
    assert select.score(learner, reference, "easy", invert=True).tolist() == [1, 2, 2]
    standardized = select.score(learner, reference, gain=4.0)
    assert abs(standardized.mean()) < 1e-5 and abs(standardized.std() - 4) < 1e-5
    assert torch.allclose(select.score(learner, None, "gradient-norm").exp() ** 2, learner + 0.1)


@pytest.mark.parametrize("kind, flags", [
    ("tree", "--selector ajest --targets all --guided-targets 2"),
    ("image", "--selector jest --score gradient-norm --debias --targets all"),
    ("image", "--selector ajest --interpolate 2 --gain 1 --targets batch --dro a.pt --micro-batch 8 "
     "--guided-targets 1.5 --dropout 0.1")])
def test_a_training_step_reads_nothing_from_the_device(monkeypatch, kind, flags):
    """The loop's calls on the meta device, whose tensors hold no values: whatever would wait for a device
    raises, and so does an operation on tensors of two devices."""
    meta, stream, dataset = torch.device("meta"), data.stream, _images() if kind == "image" else data.Tree()
    c = _resolve(f"{flags} --channels 8 --batch 8 --filter 0.5", dataset)
    c.device = "meta"                                           # no fused Adam, autocast or generators there
    monkeypatch.setattr(torch.optim, "Adam", lambda params, lr, **_: torch.optim.SGD(params, lr))
    monkeypatch.setattr(model, "accelerate", lambda function, *options: function)
    monkeypatch.setattr(train, "matching", lambda *_: model.build(train.model_config(c)).to(meta))
    monkeypatch.setattr(data, "stream", lambda seed, step, name, device="cpu": (
        None if torch.device(device) == meta else stream(seed, step, name)))
    dataset = dataset.to(meta)                                  # the tree's constants are copied there once
    [dataset._p(name) for name in getattr(dataset, "parameters", ())]
    state = _state(c)
    curator, reweight = train.make_curator(state, "guide.pt"), train.Reweighting(state, dataset, None, None)
    state.guide = train.matching() if c.guided_targets != 1 else None
    batch, weight = curator.choose(_batches(c, dataset, 16)[0], 8, None)
    losses = state.learn(batch, reweight(batch, weight))
    reweight.update(batch, losses)
    with pytest.raises(RuntimeError):
        losses[0].item()


@pytest.mark.parametrize("w", [0, 2.5])
def test_scores_are_the_losses_on_exactly_what_is_chosen(monkeypatch, w):
    c = _resolve(f"--selector ajest --interpolate {w} --targets batch --batch 64 --micro-batch 64")
    state, weak = _state(c), model.build(train.model_config(c))
    for denoiser in state.denoiser, weak:
        torch.nn.init.normal_(denoiser.net.out.weight)
    monkeypatch.setattr(train, "matching", lambda *_: weak)
    monkeypatch.setattr(select, "jest", lambda s, k, *_: s.topk(k).indices)
    curator, batch = train.make_curator(state, "guide.pt"), _batches(c, n=320)[3]
    batch = batch._replace(sigma=torch.full((320,), 0.3))       # for `autoguided` takes a number
    both = guide.autoguided(state.denoiser, weak, w or 1), guide.autoguided(weak)
    expected = [model.per_example_loss(D(batch.x0 + 0.3 * batch.noise, 0.3), batch.target, batch.sigma)
                for D in both]
    losses = curator.measure(batch)
    assert torch.allclose(losses, torch.stack(expected), rtol=1e-4)
    chosen, index = curator.choose(batch, 64, None)[0], (losses[0] - losses[1]).topk(64).indices
    assert all(torch.equal(a, b[index]) for a, b in zip(chosen, batch) if b is not None)


def test_the_reference_of_jest_is_the_current_ema_of_the_learner():
    state = _state(_resolve("--selector jest --batch 64"))
    curator, batch = train.make_curator(state, None), _batches(state.c, n=320)[0]
    before, _ = curator.measure(batch)
    state.learn(batch.rows(slice(64)))
    learner, reference = curator.measure(batch)                 # after one step the EMA is the learner
    assert torch.allclose(learner, reference, atol=1e-5) and not torch.allclose(learner, before)


@pytest.mark.parametrize("rule", ["--until-better", "--once-better"])
@pytest.mark.parametrize("better", [False, True])
def test_early_and_late_rules_compare_the_mean_losses(monkeypatch, rule, better):
    state, until = _state(_resolve(f"--selector jest {rule} --early-steps 190")), rule == "--until-better"
    curator, losses = train.make_curator(state, None), torch.ones(2, 320)
    losses[1] = torch.linspace(0, 4 if better else 1, 320)      # of mean 2 or 0.5
    monkeypatch.setattr(curator, "measure", lambda batch: losses)
    active = [curator.active(step, state.progress, [None] * 400) for step in (99, 100)]     # at log lines
    losses = losses.flip(0) if better else losses
    active += [curator.active(step, state.progress, [None] * 400) for step in (180, 190)]   # it stays so
    assert active == [until, until != better, until != better, False]


def test_after_early_selection_whole_super_batches_or_uniform_batches(monkeypatch):
    seen, learn = [], train.State.learn
    monkeypatch.setattr(train.State, "learn", lambda s, *args: (seen.append(args[0]), learn(s, *args))[1])
    for after, size in ("full", 320), ("uniform", 64):
        run = _train(TINY, "--selector jest --targets batch --seed 3 --early-steps 6 --after", after)
        assert [len(batch.x0) for batch in seen] == [64] * 6 + [size] * 18
        drawn = _batches(_resolve("--targets batch --seed 3"), n=size)[23]      # the same whatever the arm
        assert all(torch.equal(a, b) for a, b in zip(seen[-1], drawn) if a is not None) and not seen.clear()
        found = [(r["examples_seen"], r["examples_trained"]) for r in _records(run)]
        assert (found[0], found[-1]) == ((6 * 320, 6 * 64), (6 * 320 + 18 * size, 6 * 64 + 18 * size))


def test_the_choice_moves_sampled_targets_towards_the_guide():
    """The weighted regression coefficient of target - D* on D - D_guide, over the chosen examples."""
    learner, weak = (_state(_resolve(f"--channels {n} --batch 816")) for n in (64, 32))
    for step in range(400):
        for state in [learner] + [weak] * (step < 200):
            state.learn(_batches(learner.c, n=816)[step])
    curator, found = select.Curator(learner.c, learner.denoiser, weak.denoiser), dict(sample=0, all=0)
    for targets, step in [(targets, step) for targets in found for step in range(5)]:
        batch = _batches(learner.c, n=4080, targets=targets)[1000 + step]
        batch, _ = curator.choose(batch, 816, data.stream(0, step, "select"))
        x, w = batch.x0 + batch.sigma[:, None] * batch.noise, model.loss_weight(batch.sigma)[:, None]
        towards = (learner.denoiser(x, batch.sigma) - weak.denoiser(x, batch.sigma)).detach()
        shift = batch.target - TREE.denoise(x, batch.sigma)
        found[targets] += torch.stack([(w * shift * towards).sum(), (w * towards ** 2).sum()])
    sample, everything = (products[0] / products[1] for products in found.values())
    assert sample < -0.1 and abs(everything) < 1e-4, (sample, everything)


# ------------------------------------------------------------------------------------------------------------
# model.py

def _config(kind="image", **changes):
    base = dict(net="unet", kind=kind, shape=[3, 16, 16], channels=8, classes=3, dropout=0.0, sigma_data=0.5)
    return base | (dict(net="mlp", shape=[2], classes=0) if kind == "tree" else {}) | changes


def _randomized(denoiser):
    """What is zero at first (the gains) is not, so that every path of the network matters."""
    for p in denoiser.parameters():
        p.data += 0.5 * (not p.any())
    return denoiser


@pytest.mark.parametrize("resolution, classes, channels, parameters, gflop", [
    (64, 1000, 128, 124.7, 89.9), (32, 10, 64, 29.7, 6.0), *[(64, 1000, 64, 31.3, 22.7)] * SLOW])
def test_unet_has_the_published_size(monkeypatch, resolution, classes, channels, parameters, gflop):
    monkeypatch.undo()
    counter = torch.utils.flop_counter.FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), counter:
        net = model.UNet(resolution, 3, channels, classes)
        net(torch.empty(1, 3, resolution, resolution), torch.empty(1), torch.zeros(1, dtype=torch.long))
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == parameters
    assert round(counter.get_total_flops() / 1e9, 1) == gflop


def test_unet_keeps_magnitudes_near_one():
    torch.manual_seed(0)
    net, seen = model.UNet(32, 3, 32, 10, blocks=3), []
    for block in (m for m in net.modules() if isinstance(m, model.Block)):
        block.register_forward_hook(lambda m, i, out: (out.retain_grad(), seen.append(out))[0])
    net.out_gain.data.fill_(1.0)
    net(torch.randn(4, 3, 32, 32), torch.randn(4), torch.arange(4)).backward(torch.randn(4, 3, 32, 32))
    assert all(0.6 < x.square().mean().sqrt() < 1.6 for x in seen)
    grads = [x.grad.square().mean().sqrt() for x in seen]       # neither vanish nor explode
    assert all(0.4 < a / b < 2.5 for a, b in zip(grads, grads[1:])), grads


def test_projection_changes_no_output_and_labels_do():
    torch.manual_seed(0)
    denoiser, labels = _randomized(model.build(_config())), torch.tensor([0, 1, -1, -1])
    weights, x = model.projected_weights(denoiser), torch.randn(1, 3, 16, 16).expand(4, -1, -1, -1)
    for w in weights:
        w.data *= 1 + torch.rand(len(w), *[1] * (w.ndim - 1))
    before = denoiser(x, torch.ones(4), labels)
    model.project(weights)
    assert all(torch.allclose(w.square().flatten(1).mean(1), torch.ones(len(w)), atol=1e-5) for w in weights)
    assert torch.allclose(denoiser(x, 1.0, labels), before, atol=1e-5)
    assert (before[0] - before[1]).abs().max() > 1e-3           # and -1 is no label
    assert torch.allclose(before[2:], denoiser(x, 1.0, None)[2:], atol=1e-5)


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


WAYS = [("cpu", "image", True, False), ("cpu", "tree", False, True), *[("cpu", "image", False, True)] * SLOW,
        *[("cuda", "image", half, graph) for half in (0, 1) for graph in (0, 1)] * (len(DEVICES) - 1)]


@pytest.mark.parametrize("device, kind, bf16, compiled", WAYS)
def test_forward_and_backward_are_those_of_the_cpu_in_fp32(device, kind, bf16, compiled):
    if compiled and not any(map(shutil.which, ("c++", "g++", "clang"))):
        pytest.skip("needs a C++ compiler")
    results = []
    for where, *how in ("cpu", False, False), (device, bf16, compiled):
        torch.manual_seed(0)
        denoiser = _randomized(model.build(_config(kind)))
        rows = *torch.randn(2, 4, *denoiser.shape), torch.rand(4) + 0.1, torch.tensor([0, 1, 2, -1])
        loss = model.accelerate(denoiser.to(where).loss, where, *how)(*(r.to(where) for r in rows))[0]
        gradients = torch.autograd.grad(loss.mean(), list(denoiser.net.parameters()))
        results.append([loss.detach().cpu(), torch.cat([g.flatten().cpu() for g in gradients])])
    for exact, other in zip(*results):
        assert bf16 * 1e-6 <= (other - exact).norm() / exact.norm() < (2e-2 if bf16 else 1e-3)


@pytest.mark.parametrize("device, wanted, missing, able, words", [
    ("cpu", None, "", (False, False), ""), ("cuda", None, "bf16", (False, True), "bf16"),
    ("cuda", None, "triton", (True, False), "triton"), ("cpu", True, "compiler", (True, False), "a C")])
def test_what_a_machine_cannot_do_is_said(monkeypatch, capsys, device, wanted, missing, able, words):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: "bf16" not in missing)
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None if name in missing else name)
    monkeypatch.setattr(shutil, "which", lambda name: None if "compiler" in missing else name)
    assert model.able(device, wanted, wanted) == able
    err = capsys.readouterr().err
    assert err.count("\n") == bool(words) and words in err


def test_checkpoint_round_trip(tmp_path):
    denoiser = _randomized(model.build(_config())).to(memory_format=torch.channels_last)
    ema, rows = model.PowerEMA(denoiser, (0.05, 0.10)), (torch.randn(2, 3, 16, 16), 0.7, torch.tensor([0, 1]))
    expected = []
    for which in (0.05, 0.10, 0):                               # each average and the weights differ
        denoiser.net.out_gain.data *= 2
        expected.append(denoiser(*rows))
        ema.averages |= {which: [p.detach().clone() for p in denoiser.parameters()]} if which else {}
    content = dict(model_config=denoiser.config, model=denoiser.state_dict(), ema=ema.state_dict())
    torch.save(content, tmp_path / "checkpoint.pt")
    for which, output in zip((None, 0.10, 0), expected):
        assert torch.equal(model.load_denoiser(tmp_path, which)(*rows), output)


# ------------------------------------------------------------------------------------------------------------
# guide.py

def _gaussian_denoiser(std, shape=(2,), classes=0):
    """The exact denoiser of N(0, std^2 I); sigma a number or [N]. Keeps the levels it was called with."""
    def denoise(x, sigma, labels=None):
        denoise.levels.append(sigma)
        return x * (std ** 2 / (std ** 2 + torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1) ** 2))
    denoise.shape, denoise.classes, denoise.levels = shape, classes, []
    return denoise


def test_heun_converges_at_second_order_and_churn_keeps_the_distribution():
    noise = torch.randn(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact, errors = noise * 5 * 0.5 / math.sqrt(25 + 0.25), []  # x(sigma) ~ sqrt(s^2 + sigma^2)
    for steps in (32, 64, 128):
        denoiser = _gaussian_denoiser(0.5)
        x = guide.heun(denoiser, noise, steps=steps, sigma_min=0.002, sigma_max=5.0)
        errors.append((x - exact).norm() / exact.norm())
        assert len(denoiser.levels) == 2 * steps - 1 and {type(level) for level in denoiser.levels} == {float}
    assert errors[-1] < 4e-4
    assert 3.3 < errors[0] / errors[1] < 4.7 and 3.3 < errors[1] / errors[2] < 4.7, errors
    churned = guide.heun(denoiser, noise, steps=64, sigma_max=5.0, S_churn=20,
                         fresh_noise=lambda: torch.randn_like(noise))
    assert abs(churned.std() - 0.5) < 0.01 and (churned * x).mean() < 0.9 * 0.5 ** 2    # it does add noise


def test_autoguidance_weights_and_interval():
    main, weak, x = _gaussian_denoiser(0.5), _gaussian_denoiser(1.0), torch.randn(5, 2)
    one, zero = x * 0.25 / 0.34, x / 1.09
    for w, expected in (1, one), (0, zero), (2.5, zero + 2.5 * (one - zero)):
        assert torch.allclose(guide.autoguided(main, weak, w, (0.1, 1.0))(x, 0.3), expected, atol=1e-6)
    assert all(level.shape == (5,) and (level == 0.3).all() for level in main.levels + weak.levels)
    for sigma in (0.09, 2.0):                                   # outside of the interval the guide rests
        assert torch.equal(guide.autoguided(main, weak, 2.5, (0.1, 1.0))(x, sigma), main(x, sigma))
    assert len(weak.levels) == 2
    for other in _gaussian_denoiser(1.0, (3,)), _gaussian_denoiser(1.0, classes=2):
        with pytest.raises(ValueError, match="denoises"):
            guide.autoguided(main, other, 2.0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_depends_on_its_seed_alone(device):
    denoiser = guide.autoguided(_randomized(model.build(_config(shape=[3, 8, 8]))).eval().to(device))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])

    def draw(batch, seeds=range(7), labels=labels):
        how = dict(steps=3, sigma_max=5.0, device=device, S_churn=4.0)
        return torch.cat(list(guide.generate(denoiser, seeds, labels, batch, **how))).cpu()
    for other in draw(1), draw(20), draw(2, range(7)[::-1], labels.flip(0)).flip(0):
        assert torch.allclose(other, draw(7), rtol=0, atol=0 if device == "cpu" else 1e-3)


# ------------------------------------------------------------------------------------------------------------
# train.py: gradients and targets

def test_gradients_by_hand_for_every_target():
    """EDM2's loss / e^u + u, but the network learns from the target, u from x0, each with the other fixed."""
    c = _resolve("--channels 8 --batch 8 --micro-batch 4 --no-flip --guided-targets 1.6", _images())
    state, weak = _state(c), _randomized(model.build(train.model_config(c)))
    networks, us, weight = [], [], torch.linspace(0.5, 1.5, 8)
    _randomized(state.denoiser)
    for kind in "sample", "batch", "guided":
        batch = _batches(c, _images(), 8, targets="batch" if kind == "batch" else "sample")[0]
        state.guide = weak if kind == "guided" else None
        state.optimizer.zero_grad(set_to_none=True)
        state.gradients(batch, weight)
        x, u = batch.x0 + batch.sigma.view(-1, 1, 1, 1) * batch.noise, state.denoiser.u(batch.sigma)
        D, target = state.denoiser(x, batch.sigma, batch.labels), batch.target
        if kind == "guided":
            target = target + (1 - 1 / 1.6) * (D - weak(x, batch.sigma, batch.labels)).detach()
        losses = model.per_example_loss(D, target, batch.sigma) / u.detach().exp()
        losses = losses + model.per_example_loss(D.detach(), batch.x0, batch.sigma) / u.exp() + u
        by_hand = torch.autograd.grad((weight * losses).mean(), state.params)
        assert all(torch.allclose(p.grad, g, atol=1e-5, rtol=1e-3) for p, g in zip(state.params, by_hand))
        networks.append(by_hand[0])
        us.append(state.denoiser.u_out.weight.grad)
    assert all(torch.allclose(u, us[0], atol=1e-6) for u in us)         # no target moves the weighting
    assert all((network - networks[0]).norm() > 1e-3 for network in networks[1:])


@pytest.mark.parametrize("W", [1.6, 3.0])
def test_the_fixed_point_of_guided_targets_is_the_guided_denoiser(W):
    state, (x0, noise) = _state(_resolve(f"--guided-targets {W}")), 0.7 * torch.randn(2, 999, 2)
    x, a = x0 + 0.4 * noise, torch.tensor(0.1, requires_grad=True)      # D(x) = a x, the guide x / 2
    state.denoiser = types.SimpleNamespace(loss=lambda *batch: (x0[:, 0], a * x))
    state.guide = lambda x, *_: 0.5 * x
    for _ in range(300):
        state.gradients(data.Batch(x0, noise, torch.full((999,), 0.4), None, x0))
        a.data -= 0.05 * a.grad
        a.grad = None
    best = (x * x0).sum() / (x * x).sum()                       # least squares: D* = best x
    assert torch.isclose(a, 0.5 + W * (best - 0.5), atol=1e-4) and abs(best - 0.5) > 0.1


def test_a_non_finite_gradient_element_becomes_zero_and_is_counted():
    states, batch = [_state(_resolve("--batch 64")) for _ in range(2)], _batches(_resolve("--batch 64"))[0]
    for state, value in zip(states, (0.0, math.inf)):
        state.learn(batch)
        hook = state.denoiser.net.out.weight.register_hook(
            lambda g: g.index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(value)))
        state.learn(batch)
        hook.remove()
    assert all(map(torch.equal, state.params, states[0].params)) and state.tally[1:].tolist() == [1, 1, 1]
    for x0, counts in (batch.x0 * math.nan, [1, 2, 2]), (batch.x0, [2, 2, 0]):          # none in a row
        state.learn(batch._replace(x0=x0))
        assert state.tally[1:].tolist() == counts and all(p.isfinite().all() for p in state.params)
    state.tally[3] = 100
    with pytest.raises(data.DataError, match="--lr"):
        state.log("", {})


# ------------------------------------------------------------------------------------------------------------
# train.py: runs that stop and go on

@pytest.mark.parametrize("flags", [
    "--selector uniform", "--selector ajest --early-steps 17", "--selector jest --debias --targets all",
    "--selector ajest --until-better --after full", "--guided-targets 1.6 --guide-steps 9",
    "--data d.npz --selector ajest --dro reference --dropout 0.2 --targets batch"])
@pytest.mark.parametrize("device", DEVICES)
def test_signals_save_first_and_resuming_is_bit_identical(tmp_path, monkeypatch, flags, device):
    monkeypatch.chdir(_folder())
    stops = dict(zip((2, 4) if "--data" in flags else (4, 13), (signal.SIGTERM, signal.SIGINT)))
    flags = (SMALL if "--data" in flags else TINY) + f"{flags} --device {device} --no-compile --no-bf16"
    whole, parts, learn = _train(flags), tmp_path / "parts", train.State.learn

    def interrupted(self, *args):
        if self.path == parts / "checkpoint.pt" and self.progress["step"] + 1 in stops:
            signal.raise_signal(stops[self.progress["step"] + 1])
        return learn(self, *args)
    monkeypatch.setattr(train.State, "learn", interrupted)
    for step, number in stops.items():                          # before and after the snapshot
        with pytest.raises(SystemExit, match=str(128 + number)):
            _train(flags, out=parts)
        assert _load(parts)["progress"]["step"] == step
    _train(flags.replace("d.npz", "moved.npz"), out=parts)      # the same examples, wherever they lie
    if device == "cpu":
        return _same_run(whole, parts)
    pairs = zip(*(leaves(_load(run)["ema"]) for run in (whole, parts)))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("flags", [
    TINY + "--selector ajest --interpolate 2 --after full --early-steps 6 --targets batch --guided-targets 2",
    SMALL + "--data d.npz --selector ajest --guide reference --dro reference --guided-targets 2 --steps 3"])
def test_a_compiled_run_is_the_eager_one(monkeypatch, flags):
    monkeypatch.chdir(_folder())
    compiled, calls = torch.compile, []
    monkeypatch.setattr(model, "able", lambda device, bf16, compile: (False, bool(compile)))
    monkeypatch.setattr(torch, "compile", lambda function, **how: calls.append(function) or compiled(
        function, backend="eager", **how))                      # traced as one graph, but not lowered
    runs = [leaves(_load(_train(flags, way))["ema"]) for way in ("--compile", "--no-compile")]
    assert all(map(lambda a, b: torch.allclose(a, b, rtol=0, atol=1e-5), *runs)) and len(calls) > 2


@pytest.mark.parametrize("W", [1, 1.6])
def test_the_snapshot_is_the_ema_of_its_step(W):
    whole = _train(TINY, "--guide-steps 9 --guided-targets", W)
    snapshot, stopped = _load(whole, "guide.pt"), _load(_train(TINY, "--guide none --steps 9"))
    for kind in "ema", "model":
        parts = leaves(snapshot[kind]), leaves(stopped[kind])
        assert all(map(torch.equal, *parts)) and len(parts[0]) == len(parts[1]) > 0
    assert snapshot["model_config"]["guided_targets"] == W and _load(whole)["progress"]["snapshot"] == 9
    same = all(map(torch.equal, leaves(_load(whole)["model"]), leaves(_load(_train(TINY))["model"])))
    assert same == (W == 1)                                     # a snapshot alone changes nothing


def test_the_same_command_goes_on_and_another_is_refused(capsys):
    flags = FEW + "--batch 16 --log-every 4 "
    run = _train(flags, "--steps 16")
    good, before = (run / "log.jsonl").read_bytes(), (run / "checkpoint.pt").read_bytes()
    for content in good[:-20] + b"\xff", b"[1]\n", b"":         # the log lives in the checkpoint
        (run / "log.jsonl").write_bytes(content)
        _train(flags, "--steps 16", out=run)
        assert (run / "log.jsonl").read_bytes() == good
    for flag in "--lr 0.02", "--targets sample", "--seed 3", "--guided-targets 1.5":
        _one_line(capsys, train, f"{flags} --steps 16 {flag} --out {run}", *flag.split(), run)
    assert (run / "log.jsonl").read_bytes() == good and (run / "checkpoint.pt").read_bytes() == before
    _same_run(_train(flags, "--steps 32", out=run), _train(flags, "--steps 32 --guide-steps 2"))


class _Time:
    """A clock that moves where it is told."""
    monotonic = perf_counter = classmethod(lambda cls: cls.now)
    now = 0.0

    @classmethod
    def takes(cls, seconds, function):
        return lambda *args: (setattr(cls, "now", cls.now + seconds), function(*args))[1]


def test_seconds_leave_out_evaluation_and_saving(monkeypatch):
    for owner, name, seconds, function in (
            (train.State, "learn", 1, train.State.learn), (train.State, "save", 50, train.State.save),
            (select.Curator, "choose", 0.5, select.Curator.choose),
            (train.Evaluator, "__call__", 1000, lambda *_: [dict(guidance=1.0, hit=0.5)])):
        monkeypatch.setattr(owner, name, _Time.takes(seconds, function))
    monkeypatch.setattr(train, "time", _Time)
    flags = TINY + "--selector jest --early-steps 10 --eval-samples 8 --eval-every 5 --save-every 3"
    run = _train(flags, out=_train(flags, "--steps 12"))        # and so it is after a pause
    assert [(r["seconds"], r["select_seconds"]) for r in _records(run)] == [(9, 3), (17, 5), (23, 5), (29, 5)]
    assert [(r["step"], r["seconds"]) for r in _records(run, "eval")] == [
        (5, 7.5), (10, 15), (12, 17), (15, 20), (20, 25), (24, 29)]
    run = _train(TINY, "--guide none --steps 1000 --minutes 0.25")      # a time limit
    assert _load(run)["progress"]["step"] == _records(run)[-1]["step"] == 15
    state = _state(_resolve("--selector jest --steps 1000 --early-steps 200"))
    state.progress.update(step=100, seconds=300.0, select_seconds=200.0, select_steps=100)
    assert state.seconds_left() == 900 * 1 + 100 * 2            # selection ends at step 200
    state.progress.update(step=300, seconds=700.0, select_seconds=400.0, select_steps=200)
    assert state.seconds_left() == 700
    state.c.minutes = 20
    assert state.seconds_left() == 500


# ------------------------------------------------------------------------------------------------------------
# train.py: flags, stages, class weights

def test_defaults_follow_the_run_and_the_machine(capsys, monkeypatch):
    c = _resolve("--selector ajest --steps 40 --batch 16 --channels 16", _images(size=32))
    assert (c.guide, c.guide_channels, c.guide_batch, c.guide_steps) == ("train", 8, 16, 100)
    c = _resolve("--selector ajest")
    assert (c.guide_channels, c.guide_batch, c.guide_steps, c.guidance) == (32, 4096, 1024, 3.0)
    c = _resolve("--guided-targets 1.6 --steps 900")
    assert (c.guide, c.guide_steps, c.guidance) == ("snapshot", 113, 1.0)
    train.describe(_resolve("", _images(size=32)), _images())
    first = capsys.readouterr().err.splitlines()[0]
    assert all(word in first for word in ("for a CPU", "16 channels", "1,000 steps of 64", "256 samples"))
    monkeypatch.setattr(train, "WORLD", 3)
    _resolve("--batch 66 --guide-batch 66 --selector jest --filter 0.5")
    for flags in "--batch 64", "--guide-batch 64", "--micro-batch 4", "--selector jest --filter 0.67":
        with pytest.raises(data.DataError, match="multiple"):
            _resolve(f"--batch 66 --guide-batch 66 {flags}")


BAD_FLAGS = [                                                   # the message names the last flag or file
    "--selector ajest --guide none", "--selector ajest --guide snapshot", "--guided-targets 2 --guide none",
    "--until-better --once-better", "--keep 0.5", "--dro auto", "--holdout 5", "--flip", "--micro-batch 7",
    "--selector jest --micro-batch 8 --filter 0.7", "--data d.npz --holdout 60", "--data d.npz --size 12",
    "--data plain.npz --dro auto", "--data plain.npz --class-weights inverse", "--data /no/such/place",
    "--data d.npz --dro auto --class-weights inverse", "--filter 1", "--batch 0", "--steps 1.5", "--ema 0.4",
    "--selector best", "--device abacus", "--guided-targets 0.5", "--no-such-flag", "--keep 0",
    "--data d.npz --keep no.npy", "--data d.npz --keep 0.5 --features no.npy", "--class-weights w.json"]
BAD_WEIGHTS = ["[1]", "[" * 100_000, '{"classes": {"0": 1', '{"classes": {"0": 1, "1": 1}}', *[
    '{"classes": {"0": %s, "1": 1, "2": 1}}' % value for value in ("-1", "NaN", "[1]", "1e300")]]


@pytest.mark.parametrize("flags, content", [*((flags, "") for flags in BAD_FLAGS), *(
    ("--data d.npz --class-weights w.json", content) for content in BAD_WEIGHTS)])
def test_bad_flags_and_class_weights_end_in_one_line(tmp_path, monkeypatch, capsys, flags, content):
    monkeypatch.chdir(_folder())
    Path("w.json").write_text(content)
    words = [word for word in flags.split() if word[:2] == "--" or word[0] == "/" or word == "no.npy"]
    _one_line(capsys, train, f"{TINY} {flags} --out {tmp_path}/run", "w.json" if content else words[-1])
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("flags, stages", [
    ("--dro auto", ["guide", "proxy", "train"]), ("--dro auto --guide none", ["reference", "proxy", "train"]),
    ("--class-weights inverse --guide none", ["train"])])
def test_every_stage_sees_the_pool_only(monkeypatch, flags, stages):
    calls = []

    def fit(c, dataset, out, keep, guide_path=None, weights=None, evaluate=None, title="train"):
        calls.append((title, keep, c, weights))
        out.mkdir(exist_ok=True)
        (out / "class_weights.json").write_text('{"classes": {"0": 0.5, "1": 1.0, "2": 3.0}}')
        return [dict(kind="train", step=1, seconds=1.0)]
    monkeypatch.setattr(train, "fit", fit)
    _train(SMALL, flags, "--holdout 6 --imbalance 3 --keep 0.5 --data", _folder() / "d.npz")
    titles, keeps, settings, weights = zip(*calls)
    guide_of_run = "train" if "guide" in stages else "none"
    pool, kept, held_out = train.coreset(settings[-1], data.load(_folder() / "d.npz"))
    assert list(titles) == stages and len(held_out) == 6 and not torch.isin(held_out, pool).any()
    assert len(pool) < 54 and torch.isin(kept, pool).all() and abs(len(kept) - len(pool) / 2) < 2
    assert all(map(torch.equal, keeps, [pool, kept, kept][-len(stages):]))
    assert [(c.channels, c.guide, Path(c.dro or "").parent.name) for c in settings] == [
        (4, "none", ""), (4, "none", stages[0]), (8, guide_of_run, "")][-len(stages):]
    n = torch.bincount(torch.arange(60)[kept] % 3)              # inverse to frequency, of mean one
    assert torch.allclose(weights[-1], torch.tensor([0.5, 1, 3]) if "--dro" in flags else n.sum() / 3 / n)


def test_the_proxy_learns_the_weights_of_classes(monkeypatch, tmp_path):
    """Group DRO itself is tested with data.py; here its input, and the weights of the loss."""
    dataset = data.Dataset(torch.zeros(60, 3, 8, 8).byte(), torch.arange(60).sqrt().long() // 3, list("abc"))
    c, counts = _resolve("--channels 8 --dro a.pt --eta 0.05", dataset), torch.bincount(dataset.labels)
    monkeypatch.setattr(train, "matching", lambda *_: types.SimpleNamespace(
        loss=lambda *batch: (torch.ones(64), None)))
    labels, by_hand = torch.arange(64) % 6, data.GroupDRO(3, 0.05)      # from 3 on: of mirrored images
    reweight = train.Reweighting(_state(c), dataset, None, None)
    batch = data.Batch(None, None, None, labels, None)
    for _ in range(20):
        reweight.update(batch, 1 + (labels % 3 == 0).float())
        by_hand.update((labels % 3 == 0).float(), labels % 3)
    expected = 2 * (by_hand.weights * 60 / counts)[labels % 3]
    assert torch.allclose(reweight(batch, torch.full((64,), 2.0)), expected) and by_hand.weights[0] > 0.4
    reweight.write(tmp_path / "w.json")
    assert torch.allclose(train.read_class_weights(tmp_path / "w.json", c), by_hand.mean * 60 / counts)


# ------------------------------------------------------------------------------------------------------------
# The whole pipeline, and sample.py

def _sample(*flags, out):
    argv = [*"--device cpu --steps 2 --out".split(), str(out), *map(str, flags)]
    data.command(sample.run, sample.build_parser(), argv)
    return dict(np.load(out)) if str(out).endswith(".npz") else None


def test_unlabelled_images_train_with_selection_and_validate_as_label_zero():
    run = _train(SMALL, f"--data {_folder()}/plain.npz --holdout 9 --selector ajest --filter 0.5 --steps 20",
                 "--batch 8 --warmup 0 --eval-samples 4 --metrics none --guidance 1")
    denoiser, dataset = model.load_denoiser(run), data.load(_folder() / "plain.npz")
    c = types.SimpleNamespace(**json.loads((run / "config.json").read_text()))
    x0, generator = dataset.take(train.coreset(c, dataset)[2]), data.stream(0, 0, "validation")
    sigma = (c.P_mean + c.P_std * torch.randn(256, generator=generator)).exp()[:9]
    x = x0 + sigma.view(-1, 1, 1, 1) * torch.randn(256, 3, 8, 8, generator=generator)[:9]
    trivial = model.preconditioning(sigma)[0].view(-1, 1, 1, 1) * x
    expected, worse = (model.per_example_loss(D_x, x0, sigma).mean().item() for D_x in (
        denoiser(x, sigma, torch.zeros(9).long()), trivial))    # label 0 of two: 1 is mirrored
    found = _records(run, "eval")[0]["validation_loss"]
    assert denoiser.classes == 2 and found == pytest.approx(expected, rel=1e-4) and found < worse


def test_the_whole_pipeline_on_images(tmp_path, capsys):
    flags = f"{SMALL} --data {_folder()}/d.npz --selector ajest --keep 0.5 --dro auto --holdout 6"
    flags += " --steps 4 --eval-samples 20 --metrics pixels"
    run = _train(flags)
    weights = json.loads((run / "proxy" / "class_weights.json").read_text())["classes"]
    assert set(weights) == {"0", "1", "2"} and abs(np.mean(list(weights.values())) - 1) < 0.1
    unguided, guided = _records(run, "eval")
    assert {"FD(pixels)", "precision", "recall", "validation_loss"} <= set(unguided)
    assert guided["guidance"] == 1.6 and unguided["reference_seconds"] > 0
    picture = Image.open(run / "samples.png")
    assert picture.width >= 2 * 3 * 48 and picture.height >= 7 * 48     # two grids of 20 in three columns
    capsys.readouterr()
    before = (run / "checkpoint.pt").read_bytes()
    _train(flags, out=run)                                      # all is there: nothing is trained again
    assert "step 4/4" not in capsys.readouterr().err and (run / "checkpoint.pt").read_bytes() == before
    images = _sample(run, "--n", 5, out=tmp_path / "s.npz")
    assert images["images"].shape == (5, 3, 8, 8) and images["labels"].tolist() == [0, 1, 2, 0, 1]
    _sample(run, "--n", 5, "--batch", 2, out=tmp_path / "folder")
    pngs = [np.array(Image.open(path)).transpose(2, 0, 1) for path in sorted((tmp_path / "folder").iterdir())]
    assert np.array_equal(pngs, images["images"])


def test_latents_train_prune_reweight_guide_and_sample(tmp_path):
    labels = torch.arange(40) % 2
    latents = torch.randn(40, 4, 8, 8) * 3 + labels[:, None, None, None] * 4 + 1
    np.savez(tmp_path / "z.npz", latents=latents.half().numpy(), labels=labels.numpy())
    run = _train(SMALL, f"--data {tmp_path}/z.npz --selector ajest --keep 0.5 --dro auto --eval-samples 6",
                 "--steps 3")
    assert "FD(pixels)" in _records(run, "eval")[0]
    found = _sample(run, "--n", 4, "--steps", 12, out=tmp_path / "s.npz")["latents"]
    assert found.shape == (4, 4, 8, 8) and abs(found.mean() - 3) < 1.5 and 2 < found.std() < 6  # 3 and 3.6


def test_sampling_classes_guides_weights_and_points(tmp_path, capsys):
    flags = f"{SMALL} --data {_folder()}/d.npz --lr 0.05 --warmup 0 --steps 4"
    run, distilled = _train(flags, "--guidance 2.5"), _train(flags, "--guided-targets 1.6")

    def draw(*more, of=run):
        return _sample(of, "--n", 4, *more, out=tmp_path / "c.npz")["images"]
    by_hand, config = [], json.loads((run / "config.json").read_text())
    for w in (2.5, 1.0):
        denoiser = guide.autoguided(*map(model.load_denoiser, (run, run / "guide.pt")), w)
        x = torch.cat(list(guide.generate(denoiser, range(4), torch.arange(4) % 3, steps=2, sigma_max=80.0)))
        by_hand.append(data.decode(x, config).numpy())
    guided, unguided = draw(), draw("--guidance", 1)            # the run's own guide, the weight as trained
    assert np.array_equal(by_hand, [guided, unguided]) and (guided != unguided).any()
    assert (draw("--interval", 1e3, 1e4) == unguided).all() and (draw("--S-churn", 2) != guided).any()
    assert (draw(of=distilled) == draw("--guidance", 1, of=distilled)).all()    # guided as it is
    assert (draw("--guide", run / "guide.pt", "--guidance", 0, of=distilled) == draw("--guidance", 0)).all()
    alone = _sample(run, "--n", 1, "--class", "1", "--seed", 1, out=tmp_path / "b.npz")["images"]
    assert np.array_equal(alone[0], guided[1])                  # seed 1, class 1, whatever the number
    tree, out = _train(TINY), f"--device cpu --n 1 --steps 1 --out {tmp_path}/x"
    assert {k: v.shape for k, v in _sample(tree, out=tmp_path / "p.npz").items()} == {"points": (64, 2)}
    for flags in (f"{run} {out}.png --class dragon", f"{run} {out}.png --class 3", f"{run} {out}.gif",
                  f"{run} {out}.png --ema 0.2", f"{run} {out}/no/x.png", f"{tree} {out}",
                  f"{_folder()}/other {out}.png --guidance 2"):
        _one_line(capsys, sample, flags, flags.split()[-1])
    assert not list(tmp_path.glob("x*"))


# ------------------------------------------------------------------------------------------------------------
# Damaged, foreign and hostile checkpoints: one line that names the file, nothing executed or half-written.

class _Payload:
    """Runs code where it is unpickled without care."""
    def __init__(self, path):
        self.path = str(path.parent / "ran")

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _changed(change, checkpoint):
    network = {kind: checkpoint[kind] for kind in ("model", "ema")}
    return checkpoint | torch.utils._pytree.tree_map(change, network)


CHECKPOINTS = {                                                 # name: what(path, a good checkpoint) it holds
    "missing": lambda path, c: None,
    "text": lambda path, c: path.write_text("weights\x1b[31m"),
    "truncated": lambda path, c: path.write_bytes((_folder() / "other/checkpoint.pt").read_bytes()[:-500]),
    "pickle that executes": lambda path, c: path.write_bytes(pickle.dumps(_Payload(path))),
    "payload in a checkpoint": lambda path, c: {**c, "x": _Payload(path)},
    "list": lambda path, c: [1, 2],
    "weights missing": lambda path, c: c | dict(model={}),
    "NaN weights": lambda path, c: _changed(lambda v: v * math.nan, c),
    "other shape": lambda path, c: _changed(lambda v: v[..., None], c),
    "other labels": lambda path, c: _load(_folder() / "other")}


USES = {"guide": (train, "RUN --guide {} --out {}/run"), "resume": (train, "RUN --guide none --out {1}"),
        "sample": (sample, "{} --n 2 --steps 2 --device cpu --out {}/x.npz"),
        "dro": (train, "RUN --guide none --dro {} --out {}/run"),
        "reference": (train, "RUN --selector jest --reference {} --out {}/run"),
        "pair": (sample, "REFERENCE --device cpu --guidance 2 --guide {} --out {}/x.npz")}
USES_OF = {"missing": ["guide", "sample"], "NaN weights": ["guide", "sample"], "list": USES,
           "other labels": USES.keys() - {"sample"}}            # elsewhere nothing is wrong, or seen later


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoints_are_refused_in_one_line(tmp_path, capsys, name):
    for use in USES_OF.get(name, ["guide", "resume", "sample"]):
        path = tmp_path / use / "checkpoint.pt"
        path.parent.mkdir()
        content = CHECKPOINTS[name](path, _load(_folder() / "reference"))
        if isinstance(content, (dict, list)):
            torch.save(content, path)
        before, (program, flags) = path.exists() and path.read_bytes(), USES[use]
        flags = flags.replace("RUN", f"{SMALL} --data {_folder()}/d.npz").format(path, path.parent)
        _one_line(capsys, program, flags.replace("REFERENCE", f"{_folder()}/reference"), path.parent)
        assert not path.exists() or path.read_bytes() == before
        left = {file.name for file in path.parent.rglob("*")}
        assert left <= {"checkpoint.pt", "run", "config.json", "log.jsonl"}


# ------------------------------------------------------------------------------------------------------------
# Stopping anywhere: kills, a full disk; the same command again ends in the same bits.

def _start(*flags, **env):
    return subprocess.Popen([sys.executable, *flags], cwd=HERE, text=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


@pytest.mark.parametrize("arm", ["--selector ajest --early-steps 90 --guided-targets 1.6"]
                         + ["--selector uniform", "--selector jest --targets all"] * SLOW)
def test_killed_at_random_moments_ends_in_the_same_bits(tmp_path, arm):
    kills, steps, random_time = 20 if SLOW else 1, 2000 if SLOW else 150, random.Random(1)
    flags, parts = f"{TINY} {arm} --steps {steps} --log-every 7", tmp_path / "parts"
    saved, stamps = parts / "checkpoint.pt", [None]
    for _ in range(kills):
        process = _start("train.py", *flags.split(), "--save-every", "0", "--out", str(parts))
        while process.poll() is None and (saved.exists() and saved.stat().st_mtime_ns or None) == stamps[-1]:
            time.sleep(0.01)
        time.sleep(random_time.uniform(0, 0.2))
        process.kill()
        process.communicate()
        stamps += [saved.stat().st_mtime_ns] * (process.returncode != 0)        # 0: it was faster
    assert len(stamps) > kills * 3 // 4
    for stray in parts.rglob("*.tmp"):                          # of a kill inside a save
        stray.unlink()
    _same_run(_train(flags), _train(flags, out=parts))


def test_a_kill_inside_a_save_and_a_full_disk_keep_the_checkpoint(tmp_path, monkeypatch, capsys):
    def killed(content, file):
        if content["progress"]["step"] == 10:
            file.write(b"PK half a checkpoint")
            raise GeneratorExit                                 # which no handler of the program catches
        save(content, file)
    flags, save, parts = TINY + "--guide none --save-every 0", torch.save, tmp_path / "parts"
    with monkeypatch.context() as patch, pytest.raises(GeneratorExit):
        patch.setattr(torch, "save", killed)
        _train(flags, out=parts)
    good, resource = (parts / "checkpoint.pt").read_bytes(), pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 700, 2900, 20_000, len(good) // 2, len(good) - 1):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            _one_line(capsys, train, f"{flags} --out {parts}", parts)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (parts / "checkpoint.pt").read_bytes() == good and _load(parts)["progress"]["step"] == 9
    _same_run(_train(flags), _train(flags, out=parts))
    assert sorted(os.listdir(parts)) == ["checkpoint.pt", "config.json", "log.jsonl"]


# ------------------------------------------------------------------------------------------------------------
# Several processes.

@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_two_processes_give_the_weights_of_one(tmp_path):
    flags = TINY + "--targets sample --guide-steps 9 --guided-targets 1.6"
    images = f"{SMALL} --data {_folder()}/d.npz --selector ajest --dro auto --keep 0.5 --steps 2"
    images += f" --eval-samples 4 --metrics pixels --debias --until-better --out {tmp_path}/images"
    runs = [f"{flags} --steps 12 --out {tmp_path}/two", images,
            f"{TINY} --minutes 0.005 --steps 100000 --log-every 5 --out {tmp_path}/timed"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
    code = "import sys, train; [train.run(train.build_parser().parse_args(f.split())) for f in sys.argv[1:]]"
    parts = [_start("-c", code, *runs, **env, RANK=rank, LOCAL_RANK=rank) for rank in "01"]     # as torchrun
    errors = [part.communicate(timeout=100)[1] for part in parts]
    assert all(part.returncode == 0 for part in parts), errors
    one, two = _train(flags, "--steps 12"), tmp_path / "two"
    for a, b in zip(*(leaves([_load(run)[kind] for kind in ("model", "ema")]) for run in (one, two))):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)
    for a, b in zip(_records(one), _records(two)):
        assert all(a[key] == b[key] for key in ("step", "examples_trained", "examples_seen", "lr"))
    assert _load(_train(flags, out=two))["progress"]["step"] == 24      # goes on with one process
    assert len(_records(tmp_path / "images", "eval")) == 2 and len(_records(tmp_path / "images")) == 1
    assert 0.3 <= _records(tmp_path / "timed")[-1]["seconds"] < 3


# ------------------------------------------------------------------------------------------------------------
# Where the time goes: SLOW_TESTS=1 pytest test_all.py -k milliseconds -s

ARMS = {"uniform": "--guide none", "uniform, 5b": "--guide none --batch {B}", "AJEST": "--selector ajest",
        "root of the loss": "--selector jest --score gradient-norm --debias",
        "root of the loss, filter 0.5": "--selector jest --score gradient-norm --debias --filter 0.5",
        "guided targets": "--guided-targets 2"}


@pytest.mark.skipif(not SLOW, reason="SLOW_TESTS=1")
@pytest.mark.parametrize("device", DEVICES)
def test_milliseconds(device, monkeypatch):
    monkeypatch.undo()                                          # three blocks a level
    torch.set_num_threads(1)
    for title, dataset, b, flags in (("tree", TREE, 816, ""),
                                     ("UNet at 8x8", _images(n=5000), 128, "--channels 8 --dropout 0")):
        dataset, sizes = dataset.to(device), f"--device {device} --no-compile --batch {b} {flags}"
        weak = _state(_resolve(f"{sizes} --channels {32 if title == 'tree' else 4}", dataset))
        weak.save()                                             # half as wide, as a trained guide is

        def step(flags):
            """A function that takes the next step of this arm: draw or select, then learn."""
            state = _state(c := _resolve(f"{sizes} {flags}".format(B=5 * b), dataset))
            keep = None if title == "tree" else torch.arange(len(dataset))
            draw = train.Draw(state, dataset, keep, None, weak.path)
            state.guide = copy.deepcopy(state.denoiser) if c.guided_targets != 1 else None      # a snapshot
            return lambda: state.learn(*draw(state.progress["step"], False)[:2])

        jobs = {f"{arm}, {targets}": step(f"{flags} --targets {targets}")
                for arm, flags in ARMS.items() for targets in ("sample", "batch", "all")}
        c = _resolve(f"{sizes} --selector ajest --targets sample", dataset)
        many = _batches(c, dataset, train.super_batch_size(c), pool=None)
        curator, scores = select.Curator(c, _state(c).denoiser, weak.denoiser), torch.randn(many.n).to(device)
        whole, g = many[0], torch.Generator(device)
        jobs |= {"drawing 5b": lambda: many[0], "scoring 5b": lambda: curator.measure(whole),
                 "JEST": lambda: select.jest(scores, c.batch, c.chunks, g)}
        seconds = {name: [] for name in jobs}
        for name in [*jobs] * (60 if title == "tree" else 12):
            began = time.perf_counter()
            jobs[name]()
            torch.cuda.synchronize() if device == "cuda" else None
            seconds[name].append(time.perf_counter() - began)
        row = {name: 1000 * np.median(times[2:]) for name, times in seconds.items()}
        lines = (f"{ms:9.2f}  {name}" for name, ms in row.items())
        print(f"\n{title}, {device}, milliseconds:", *lines, sep="\n")
        assert row["uniform, sample"] < row["AJEST, sample"] and row["JEST"] < row["scoring 5b"]


# ------------------------------------------------------------------------------------------------------------
# Files, flags and programs

def test_reading_turns_everything_into_one_line(tmp_path):
    path = tmp_path / "x.pt"
    for error in (ValueError("a\nb " + "c" * 500), RecursionError(), EOFError("\x1b[2J"), OSError(5, "out")):
        with pytest.raises(data.DataError) as caught, data.reading(path, "a thing"):
            raise error
        head, text, tail = str(caught.value).partition(f"{path}: not a thing, ")
        assert text and not head and tail.isprintable() and 0 < len(tail) <= 80
    for error in (data.DataError("as it is"), torch.OutOfMemoryError("full")):
        with pytest.raises(type(error), match=f"^{error}$"), data.reading(path, "a thing"):
            raise error
    torch.save(torch.arange(99), path)                          # a zip archive: its checksums are held
    path.write_bytes(path.read_bytes().replace(torch.arange(9).numpy().tobytes(), bytes(72)))
    with pytest.raises(data.DataError, match="x.pt: not a thing, .* damaged"), data.reading(path, "a thing"):
        torch.load(path)


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
@pytest.mark.parametrize("error, says", [
    (OSError(errno.ENOSPC, "No space left"), "x.pt: cannot be written, "), (SystemExit("kill"), "^kill$")])
def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch, where, error, says):
    def fail(*args):
        raise error

    def write(content):
        with data.writing(tmp_path / "x.pt") as file:
            file.write(content)
            if where == "write" and content == b"new":          # torch.save's own way to report it
                torch.save(torch.zeros(9), type("Full", (io.BytesIO,), {"write": fail})())
    write(b"old")
    monkeypatch.setattr(os, where, fail)
    with pytest.raises((data.DataError, SystemExit), match=says):
        write(b"new")
    assert (tmp_path / "x.pt").read_bytes() == b"old" and os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize("kind, interval, good, bad", [
    (int, "[1, inf)", ["1", "70000"], ["0", "1.5", "x", "", "9" * 30, "9" * 5000]),
    (float, "(0, 1]", ["1", "1e-9"], ["0", "1.0001", "nan", "-inf"]),
    (float, "(-inf, inf)", ["-3", "0.5"], ["nan", "inf", "1e300"])])
def test_number_holds_the_interval(kind, interval, good, bad):
    parse = data.number(kind, interval)
    assert [repr(parse(text)) for text in good] == [repr(kind(text)) for text in good]
    for text in bad:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            parse(text)


@pytest.mark.parametrize("error, code, says", [
    (data.DataError("f: not\na \x1b[2J thing"), 2, "error: f: not a  [2J thing\n"),
    (OSError(errno.ENOENT, "No such file", "f"), 2, "error: [Errno 2] No such file: 'f'\n"),
    (torch.OutOfMemoryError("CUDA"), 2, "--batch"), (KeyboardInterrupt(), 130, ""),
    (ZeroDivisionError(), None, "")])                           # a fault of the program is not hidden
def test_command_ends_in_one_line(capsys, error, code, says):
    def run(args):
        raise error
    parser = data.parser("Test.", "[flags]")
    parser.add_argument("--device", type=data.device, default="cpu")
    for flags, code, says in (([], code, says), (["--device", "no"], 2, "argument --device: no")):
        with pytest.raises(SystemExit if code else ZeroDivisionError) as stop:
            data.command(run, parser, flags)
        error_text = capsys.readouterr().err
        assert getattr(stop.value, "code", None) == code and says in error_text
        assert flags or error_text.count("\n") == (code == 2)


# ------------------------------------------------------------------------------------------------------------
# The tree: built again from its description, without recursion, and evaluated component by component.

def data_tree_components(classes):
    """Weight [K], mean [K, 2] and covariance [K, 2, 2] of the mixture."""
    random, components = np.random.RandomState(2), []
    scale = np.array([1.3136, 1.3844])
    for name, start in (("A", math.pi / 4), ("B", 5 * math.pi / 4)):
        todo = [(0, np.array([0.0030, 0.0325]), lambda: start)]
        while todo:
            d, p, draw_angle = todo.pop()
            a = draw_angle()
            if d == 7:                                          # its angle was drawn, but it does not grow
                continue
            u = np.array([math.cos(a), math.sin(a)])
            L = 0.292 * 0.8 ** d * (0.2 * random.randn() + 1)
            h, q = 0.2 * 0.8 ** d / L, 0.06 * L * scale
            for t in np.linspace(0.07, 0.93, 8):
                along, across = np.outer(u, u), h ** 2 * (np.eye(2) - np.outer(u, u))
                mean, cov = (p + u * L * t) * scale, (along + across) * np.outer(q, q)
                components += [(L * 0.5 ** d, mean, cov)] if name in classes else []
            for sign in (-1, 1):                                # last in, first out
                todo.append((d + 1, p + u * L, lambda a=a, d=d, sign=sign:
                             a + sign * 0.7 ** d * (0.2 * random.randn() + 1)))
    weight, mean, cov = (np.array(part) for part in zip(*components))
    return weight / weight.sum(), mean, cov


@pytest.mark.parametrize("classes", ["A", "B", "AB"])
def test_tree_is_the_mixture_of_its_description(classes):
    weight, mean, cov = (torch.from_numpy(part) for part in data_tree_components(classes))
    assert len(weight) == 1016 * len(classes)
    tree = data.Tree(classes)
    x = tree.sample(24, data.stream(0, 0, "x")).double() + 0.1 * torch.randn(24, 2).double()
    x[0] = torch.tensor([300, -40])                             # far away
    for sigma in (0.0, 0.1, torch.linspace(0.01, 5, 24, dtype=torch.float64)):
        at, square = x.clone().requires_grad_(), torch.as_tensor(sigma, dtype=x.dtype) ** 2
        noise = square.view(-1, 1, 1, 1) * torch.eye(2)
        normals = torch.distributions.MultivariateNormal(mean, cov + noise)     # [n or 1, K]
        expect = (weight.log() + normals.log_prob(at[:, None])).logsumexp(1)
        score, = torch.autograd.grad(expect.sum(), at)
        torch.testing.assert_close(tree.logp(x, sigma), expect.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(tree.score(x, sigma), score, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(tree.logp(x.float(), sigma), expect.detach().float(), rtol=1e-4, atol=1e-2)
    assert tree.logp(x.repeat(50, 1), 0.1).view(50, 24).std(0).max() < 1e-9     # more than one block


def test_tree_matches_published_values():
    # Class A by another implementation: log-density and score at sigma 0.3 and 2, mean.
    x = torch.tensor([[0.11582032, 0.18732561], [-0.23501758, 0.54852974]])
    expect = {0.3: ([-0.25101787, -1.1409031], [[1.0193985, 0.82274252], [3.1898525, -1.0511994]]),
              2.0: ([-3.2637322, -3.3006105], [[0.061653789, 0.042797159], [0.14667286, -0.044658203]])}
    tree = data.Tree()
    for sigma, (logp, score) in expect.items():
        torch.testing.assert_close(tree.logp(x, sigma), torch.tensor(logp), rtol=0, atol=1e-5)
        torch.testing.assert_close(tree.score(x, sigma), torch.tensor(score), rtol=1e-4, atol=1e-5)
    got = tree.denoise(torch.zeros(1, 2, dtype=torch.float64), 1e4)             # no information: the mean
    np.testing.assert_allclose(got[0], [0.37185106, 0.36460653], rtol=1e-6)


def test_tree_sample_has_the_moments_of_the_density():
    # Under a density itself E[score] = 0 and E[score x^T] = -I: this ties sampling to the score.
    generator, tree = data.stream(1, 0, "x"), data.Tree()
    x = tree.sample(100_000, generator) + 0.05 * torch.randn(100_000, 2, generator=generator)
    score = tree.score(x, 0.05)
    for terms, mean in ((score, 0), (score[:, :, None] * x[:, None], -torch.eye(2))):
        assert ((terms.mean(0) - mean).abs() < 4 * terms.std(0) / len(x) ** 0.5).all()
    weight, mean, cov = data_tree_components("A")               # drawn from the description
    normals = torch.distributions.MultivariateNormal(torch.from_numpy(mean), torch.from_numpy(cov))
    branch = torch.from_numpy(weight).multinomial(100_000, replacement=True, generator=generator)
    drawn = normals.mean[branch] + (normals.scale_tril[branch] @ torch.randn(100_000, 2, 1).double())[..., 0]
    assert abs(tree.logp(tree.sample(100_000)).mean() - tree.logp(drawn).mean()) < 0.04


def test_stream_is_a_function_of_seed_step_and_name():
    keys = [(0, 0, "data"), (0, 1, "data"), (1, 0, "data"), (0, 0, "noise"), (0, 10, "data"), (1, 0, "0data")]
    assert len({tuple(torch.rand(4, generator=data.stream(*key)).tolist()) for key in keys}) == len(keys)
    assert data.stream(7, 11, "data").initial_seed() == 3203736056692259189     # everywhere


# ------------------------------------------------------------------------------------------------------------
# Targets

def data_naive_mean(x, sigma, examples):
    """float64 [n, d]: the posterior mean of one of the examples [m, d], example by example."""
    x, sigma, examples = x.flatten(1).double(), sigma.double(), examples.flatten(1).double()
    logits = [-(row - examples).square().sum(1) / (2 * s ** 2) for row, s in zip(x, sigma)]
    return torch.stack([logit.softmax(0) @ examples for logit in logits])


@pytest.mark.parametrize("shape", [(2,), (3, 8, 8)])
@pytest.mark.parametrize("m", [1, 7, 5000])
def test_posterior_mean_against_the_naive_one(shape, m):
    generator = data.stream(m, 0, "x")
    y = 0.5 * torch.randn(m, *shape, generator=generator)
    y[m // 2:] = y[:m - m // 2] + 1e-3 * torch.randn(m - m // 2, *shape, generator=generator)   # near by
    sigma = torch.tensor([0.002, 0.01, 0.05, 0.2, 1, 5, 80]).repeat(2)
    x = y[torch.randint(m, (14,), generator=generator)]
    x = x + sigma.view(-1, *[1] * len(shape)) * torch.randn(14, *shape, generator=generator)
    expect, got = data_naive_mean(x, sigma, y), data.posterior_mean(x, sigma, y)
    error = (got.flatten(1) - expect).abs().amax(1)
    assert (error < 0.02 * sigma).all() and (error < 2e-4).all()                # float32, y partly 1e-3 apart
    parts = data.posterior_mean(x, sigma, (block for block in y.split(max(1, m // 3))))
    torch.testing.assert_close(parts, got, rtol=0, atol=2e-4)


@pytest.mark.parametrize("n, classes, group", [(48, 3, 12), (48, 1, 12), (47, 1, 47)])  # 47 is a prime
def test_batch_posterior_mean_against_the_naive_one(n, classes, group):
    x0, labels, sigma = torch.randn(n, 3, 4, 4), torch.randint(classes, (n,)), torch.rand(n) * 5 + 0.01
    x = x0 + sigma[:, None, None, None] * torch.randn_like(x0)
    got = data.batch_posterior_mean(x, sigma, x0, labels if classes > 1 else None, group=12).flatten(1)
    for members in labels.argsort(stable=True).split(group):    # neighbours in the order of labels
        for i in members.split(1):
            expect = data_naive_mean(x[i], sigma[i], x0[members[labels[members] == labels[i]]])
            torch.testing.assert_close(got[i].double(), expect, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Batches

def data_set(kind="image", labelled=True):
    rng, labels = np.random.RandomState(0), torch.arange(40) % 4 if labelled else None
    names = list("abcd") if labelled else []
    if kind == "latent":
        x = torch.from_numpy(rng.randn(40, 4, 8, 8).astype(np.float16))
        return data.Dataset(x, labels, names, "latent", [0.0, 0.5, -1.0, 2.0], [1.0, 2.0, 3.0, 0.5])
    return data.Dataset(torch.from_numpy(rng.randint(0, 256, (40, 3, 8, 8), dtype=np.uint8)), labels, names)


DATA_POOL = torch.tensor([1, 2, 3, 7, 9, 21])
DATA_OPTIONS = {"plain": {}, "pool": dict(pool=DATA_POOL, flip=True), "all": dict(targets="all", flip=True),
                "weights": dict(class_weights=torch.tensor([1.0, 2, 3, 4]), flip=True),
                "unlabelled": dict(flip=True, targets="all"), "tree": {}, "tree all": dict(targets="all")}


@pytest.mark.parametrize("name", DATA_OPTIONS)
def test_batches_depend_on_seed_and_step_alone_and_begin_alike(name):
    dataset = data.Tree() if "tree" in name else data_set(labelled=name != "unlabelled")
    options = DATA_OPTIONS[name]
    large, small = data.Batches(dataset, 48, 5, **options), data.Batches(dataset, 16, 5, **options)
    half = [data.Batches(dataset, 48, 5, rows=slice(rank, None, 2), **options) for rank in (0, 1)]
    for step in (4, 0, 4):                                      # in any order
        every = large[step]
        for got, rows in ((small, slice(16)), (half[0], slice(0, None, 2)), (half[1], slice(1, None, 2))):
            torch.testing.assert_close(tuple(got[step]), tuple(every.rows(rows)))
    for other in (large[5], data.Batches(dataset, 48, 6, **options)[4]):
        assert not any(torch.equal(a, b) for a, b in zip(large[4][:3], other[:3]))


@pytest.mark.parametrize("kind, labelled, flip", [
    ("image", True, False), ("image", True, True), ("image", False, True), ("latent", True, False)])
def test_batch_is_what_the_index_says_and_flips_are_labelled(kind, labelled, flip):
    dataset = data_set(kind, labelled)
    batches = data.Batches(dataset, 4096, 0, pool=DATA_POOL, flip=flip, P_mean=-2.3, P_std=1.5)
    batch, index = batches[0], batches.index(0)
    mirrored = batch.labels >= max(dataset.classes, 1) if flip else torch.zeros(4096, dtype=torch.bool)
    assert set(index.tolist()) == set(DATA_POOL.tolist()) and abs(mirrored.float().mean() - flip / 2) < 0.05
    assert not labelled or torch.equal(batch.labels, dataset.labels[index] + 4 * mirrored)
    plain = torch.where(mirrored[:, None, None, None], batch.x0.flip(3), batch.x0)
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (dataset.mean, dataset.std))
    torch.testing.assert_close(plain, (dataset.x[index].float() - mean) / (2 * std))
    assert torch.equal(data.decode(plain, vars(dataset)).to(dataset.x.dtype), dataset.x[index])
    for got, mean, std in ((batch.sigma.log(), -2.3, 1.5), (batch.noise, 0, 1)):
        assert abs(got.mean() - mean) < 0.1 and abs(got.std() - std) < 0.08


def test_class_weights_give_weight_times_frequency():
    dataset, weights = data_set(), torch.tensor([1.0, 3.0, 0.0, 6.0])
    dataset.labels = torch.tensor([0] * 20 + [1] * 10 + [2] * 5 + [3] * 5)
    for pool, expect in ((torch.arange(40), [0.25, 0.375, 0, 0.375]),           # 20 x 1 : 10 x 3 : 0 : 5 x 6
                         (torch.tensor([0, 5, 12, 21, 31, 36]), [0.25, 0.25, 0, 0.5])):
        index = data.Batches(dataset, 60_000, 0, pool=pool, class_weights=weights).index(0)
        member = torch.tensor([expect[c] / (dataset.labels[pool] == c).sum() for c in dataset.labels[pool]])
        share = torch.bincount(index, minlength=40) / 60_000    # uniform within a class
        np.testing.assert_allclose(share, torch.zeros(40).index_copy_(0, pool, member), atol=0.01)


@pytest.mark.parametrize("labelled, flip", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("targets", ["batch", "all"])
def test_targets_of_images_against_the_naive_ones(labelled, flip, targets):
    dataset, pool, rows = data_set(labelled=labelled), torch.arange(3, 37), slice(1, None, 2)
    batches = data.Batches(dataset, 64, 1, pool=pool, flip=flip, targets=targets, rows=rows, P_mean=1)
    batch, index = batches[2], batches.index(2)[rows]
    x, modulus = batch.x0 + batch.sigma[:, None, None, None] * batch.noise, 4 if labelled else 1
    mirrored = batch.labels >= max(dataset.classes, 1) if flip else torch.zeros(32, dtype=torch.bool)
    for i in torch.arange(32).split(1):
        among = batch.x0[(mirrored == mirrored[i]) & (index % modulus == index[i] % modulus)]
        if targets == "all":
            among = dataset.take(pool[pool % modulus == index[i] % modulus])
            among = among.flip(3) if mirrored[i] else among
        expect = data_naive_mean(x[i], batch.sigma[i], among)
        torch.testing.assert_close(batch.target[i].flatten(1).double(), expect, rtol=0, atol=1e-5)
    assert (batch.target - batch.x0).abs().mean() > 0.03        # it is not x0 itself


def test_targets_of_the_tree():
    tree = data.Tree()
    sample, batch, every = (data.Batches(tree, 816, 3, targets=targets, P_mean=-2.3)[0]
                            for targets in ("sample", "batch", "all"))
    exact = tree.denoise((every.x0 + every.sigma[:, None] * every.noise).double(), every.sigma.double())
    torch.testing.assert_close(every.target.double(), exact, rtol=0, atol=1e-4)
    error = [(b.target - exact).square().mean() for b in (sample, batch)]
    assert error[1] < error[0] / 20                             # far less variance than x0 itself


# ------------------------------------------------------------------------------------------------------------
# Writers of the published layouts

def data_png(pixels):
    """File content of pixels [H, W] or [H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_write(path, files, form="folder"):
    """Write {name: content} as a folder, .zip or .tar.gz."""
    folder = path if form == "folder" else path.parent / "files"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if form != "folder":
        with zipfile.ZipFile(path, "w", 8) if form == "zip" else tarfile.open(path, "w:gz") as archive:
            for name in files:
                (archive.write if form == "zip" else archive.add)(folder / name, name)


def data_batch(images, labels):
    """Bytes as Python 2 pickled a CIFAR-10 batch in 2009: protocol 2, byte strings, an array of numpy's."""
    raw, out = images.reshape(len(images), -1).tobytes(), b"\x80\x02}(U\x04data"
    out += b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    out += struct.pack("<4sHcHc", b"(K\x01M", len(images), b"M", len(raw) // len(images), b"\x86")
    out += b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
    out += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    out += b"U\x06labels](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return out + b"U\x0bbatch_labelU\x15training batch 1 of 5u."


DATA_RANDOM = np.random.RandomState(0)
DATA_C = {f"data_batch_{i}": (DATA_RANDOM.randint(0, 256, (4, 3, 32, 32), dtype=np.uint8),
                              DATA_RANDOM.randint(0, 10, 4).tolist()) for i in range(1, 6)}
DATA_TEN = (sum((c for _, c in DATA_C.values()), []), data.CIFAR_CLASSES,
            np.concatenate([x for x, _ in DATA_C.values()]))
DATA_CIFAR = {f"cifar-10-batches-py/{name}": data_batch(*batch) for name, batch in DATA_C.items()}
DATA_CIFAR3 = {f"cifar-10-batches-py/{name}": pickle.dumps({b"data": x.reshape(4, -1), b"labels": c}, 2)
               for name, (x, c) in DATA_C.items()}
DATA_CIFARB = {f"cifar-10-batches-bin/{name}.bin": b"".join(bytes([c]) + x.tobytes() for x, c in zip(*batch))
               for name, batch in DATA_C.items()}

DATA_RGB = DATA_RANDOM.randint(0, 256, (6, 64, 64, 3), dtype=np.uint8)
DATA_X = DATA_RGB[:, :8, :8].transpose(0, 3, 1, 2)
DATA_PNG = [data_png(pixels[:8, :8]) for pixels in DATA_RGB]
DATA_CLASSES = {f"{'ant' if i < 3 else 'bee'}/{i}.png": png for i, png in enumerate(DATA_PNG)}
DATA_AB = [0, 0, 0, 1, 1, 1], ["ant", "bee"], DATA_X
DATA_TINY = {f"train/n0{i // 3}/images/n0{i // 3}_{i}.JPEG": png for i, png in enumerate(DATA_PNG)}
DATA_TINY |= {"train/n00/n00_boxes.txt": b"0 0 1 1", "val/images/val_0.JPEG": DATA_PNG[0]}
DATA_EDM = {f"0000{i % 2}/img{i:08d}.png": png for i, png in enumerate(DATA_PNG)}
DATA_EDM_LABELS = [[name, label] for name, label in zip(DATA_EDM, (0, 0, 2, 2, 5, 5))]
DATA_16 = DATA_RANDOM.randint(0, 2 ** 16, (8, 8)).astype(np.uint16)
DATA_GRAY = {"a.png": DATA_PNG[0], "b.png": data_png(DATA_X[1, 0]), "c.png": data_png(DATA_16),
             "notes.md": b"x", "._a.png": b"junk"}
DATA_Z = (DATA_RANDOM.randn(20, 4, 8, 8) * 3 + 1).astype(np.float16)


def data_under(folder, files):
    """The same files in a folder."""
    return {f"{folder}/{name}": content for name, content in files.items()}


def data_edm(labels):
    """The files of a data set in EDM's format."""
    return {**DATA_EDM, "dataset.json": json.dumps({"labels": labels}).encode()}


DATA_FILES = {                  # name: (files, labels, class names, x)
    "classes": (DATA_CLASSES, *DATA_AB),
    "train and val": (data_under("train", DATA_CLASSES) | {"val/ant/9.png": DATA_PNG[5]}, *DATA_AB),
    "single top": (data_under("top/train", DATA_CLASSES), *DATA_AB),
    "tiny imagenet": (data_under("tiny-imagenet-200", DATA_TINY), DATA_AB[0], ["n00", "n01"], DATA_X),
    "cifar python 2": (DATA_CIFAR | {"cifar-10-batches-py/test_batch": b""}, *DATA_TEN),
    "cifar python 3": (DATA_CIFAR3, *DATA_TEN),
    "cifar binary": (DATA_CIFARB | {"cifar-10-batches-bin/batches.meta.txt": b"airplane\n"}, *DATA_TEN),
    "EDM": (data_edm(DATA_EDM_LABELS), [0, 0, 2, 2, 5, 5], list("012345"), DATA_X),
    "EDM null": (data_edm(None), None, [], DATA_X[[0, 2, 4, 1, 3, 5]]),
    "gray, 16 bit": (DATA_GRAY, None, [], [DATA_X[0], [DATA_X[1][0]] * 3, [DATA_16 >> 8] * 3]),
}
DATA_NPZ = {                    # name: (arrays, labels, class names, x)
    "images": (dict(images=DATA_X, labels=np.arange(6) % 3), [0, 1, 2] * 2, list("012"), DATA_X),
    "NHWC": (dict(images=DATA_X.transpose(0, 2, 3, 1)), None, [], DATA_X),
    "latents": (dict(latents=DATA_Z, labels=np.zeros(20, np.uint8)), [0] * 20, ["0"], DATA_Z),
    "latents with moments": (dict(latents=DATA_Z, mean=np.arange(4.0), std=np.arange(1.0, 5)),
                             None, [], DATA_Z),
}


@pytest.mark.parametrize("name, form", [*itertools.product(DATA_FILES, ("folder", "zip", "tar.gz")),
                                        *itertools.product(DATA_NPZ, ("npz",))])
def test_published_layouts_are_read_back(tmp_path, monkeypatch, name, form):
    files, labels, class_names, x = (DATA_NPZ if form == "npz" else DATA_FILES)[name]
    path, kind = tmp_path / f"d.{form}", "latent" if "latents" in name else "image"
    np.savez(path, **files) if form == "npz" else data_write(path, files, form)
    got = data.load(path)
    assert got.x.dtype == (torch.float16 if kind == "latent" else torch.uint8)
    assert np.array_equal(got.x.numpy(), np.array(x)) and (got.kind, got.class_names) == (kind, class_names)
    assert labels == (None if got.labels is None else got.labels.tolist())
    if kind == "latent":
        stored, z = "moments" in name, DATA_Z.astype(float)
        np.testing.assert_allclose(got.mean, np.arange(4) if stored else z.mean((0, 2, 3)), rtol=1e-6)
        np.testing.assert_allclose(got.std, np.arange(1, 5) if stored else z.std((0, 2, 3)), rtol=1e-6)
    got.x[0] = 0                                                # a change stays in memory
    monkeypatch.setattr(data, "_images", None)                  # a second reading would fail
    monkeypatch.setattr(data, "_npz", None)
    again = data.load(path)
    assert np.array_equal(again.x.numpy(), np.array(x)) and again.fingerprint == got.fingerprint


def test_sizes_fingerprint_and_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("DATA_CACHE", str(cache))
    data_write(tmp_path / "d", {**DATA_CLASSES, "bee/wide.png": data_png(DATA_RGB[0, :10, :20])})
    got = data.load(tmp_path / "d", size=4)
    expect = Image.fromarray(DATA_RGB[0, :10, 5:15]).resize((4, 4), Image.LANCZOS)
    assert np.array_equal(got.x[6].permute(1, 2, 0).numpy(), np.asarray(expect))
    for name in ("a", "b"):
        data_write(tmp_path / name, {**DATA_CLASSES, f"{name}.txt": b"x"})
    os.symlink(tmp_path / "a", tmp_path / "a/ant/loop")         # links are followed, each folder once
    one, two = data.load(tmp_path / "a"), data.load(tmp_path / "b")
    assert one.fingerprint == two.fingerprint != got.fingerprint    # of the content, wherever it is
    (tmp_path / "b/ant/0.png").write_bytes(DATA_PNG[5])         # other content
    assert not torch.equal(data.load(tmp_path / "b").x, two.x)
    for file in cache.iterdir():                                # a damaged cache names itself
        file.write_bytes(file.read_bytes()[:999])
    with pytest.raises(data.DataError, match=str(cache)):
        data.load(tmp_path / "b")


# ------------------------------------------------------------------------------------------------------------
# Bad and hostile input: one line that names the file; nothing runs, nothing is left in the cache.

class DataPayload:
    """A pickle of this runs code: it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def data_files(files, form="folder", cut=None):
    """A writer of such files; of an archive the first `cut` bytes."""
    def write(path):
        data_write(path, files, form)
        if cut:
            path.write_bytes(path.read_bytes()[:cut])
    return write


def data_npy(array=None, **arrays):
    """A writer of an .npy or .npz file."""
    return lambda path: np.savez(path, **arrays) if arrays else np.save(path, array)


def data_giant(path):
    """An .npz whose `images` claims terabytes."""
    file = io.BytesIO()
    header = dict(descr="|u1", fortran_order=False, shape=(10 ** 7, 3, 1024, 1024))
    np.lib.format.write_array_header_1_0(file, header)
    data_write(path, {"images.npy": file.getvalue()}, "zip")


def data_giant_tar(path):
    info = tarfile.TarInfo("ant/0.png")
    info.size = 2 ** 28 + 1
    path.write_bytes(info.tobuf() + bytes(10240))


def data_cifar(batch):
    return data_files({"data_batch_1": data_batch(*DATA_C["data_batch_1"]), "data_batch_2": batch})


DATA_BOMB = data_png(np.zeros((10_000, 10_000), bool))
DATA_U, DATA_L = np.zeros((4, 3, 8, 8), np.uint8), np.zeros((4, 4, 8, 8), np.float32)
DATA_OBJECT = np.array([DataPayload()], object)
DATA_FOUR = DATA_C["data_batch_1"][0]
DATA_BAD = {                    # name: (file name, writer, what the message says)
    "missing": ("nothing", lambda path: None, "no such"),
    "empty folder": ("d", lambda path: path.mkdir(), "no images"),
    "text file": ("x.csv", lambda path: path.write_bytes(b"1,2"), "not a data set"),
    "text with an image's suffix": ("d", data_files({"a/0.png": DATA_PNG[0], "a/1.png": b"no"}), "a/1.png"),
    "sizes differ": ("d", data_files({"a.png": DATA_PNG[0], "b.png": data_png(DATA_RGB[0])}), "--size"),
    "beside classes": ("d", data_files({"0.png": DATA_PNG[0], "a/1.png": DATA_PNG[1]}), "beside"),
    "image bomb": ("d", data_files({"a/0.png": DATA_BOMB}), "a/0.png: Image size"),
    "zip truncated": ("x.zip", data_files(DATA_CLASSES, "zip", -60), "not a data set"),
    "tar truncated": ("x.tar.gz", data_files(DATA_CIFAR, "tar.gz", -99), "not a data set"),
    "tar of 256 MB": ("x.tar", data_giant_tar, "268,435,457 bytes"),
    "cifar payload": ("d", data_cifar(pickle.dumps({b"data": DataPayload()})), "wants to run"),
    "cifar truncated": ("d", data_cifar(data_batch(DATA_FOUR, [0] * 4)[:5000]), "truncated"),
    "cifar foreign class": ("d", data_cifar(data_batch(DATA_FOUR, [0, 1, 2, 10])), "below 10"),
    "cifar binary length": ("d", data_files({"data_batch_1.bin": bytes(3072)}), "3073"),
    "EDM file missing": ("e.zip", data_files(data_edm(DATA_EDM_LABELS + [["no.png", 1]]), "zip"), "missing"),
    "EDM file not listed": ("e.zip", data_files(data_edm(DATA_EDM_LABELS[1:]), "zip"), "0.png is not listed"),
    "npz of statistics": ("x.npz", data_npy(mu=np.zeros(3)), "images"),
    "npz float images": ("x.npz", data_npy(images=DATA_L), "float32"),
    "npz objects": ("x.npz", data_npy(images=DATA_OBJECT), "Object arrays"),
    "npz terabytes": ("x.npz", data_giant, "not a data set"),
    "npz labels short": ("x.npz", data_npy(images=DATA_U, labels=np.arange(3)), "`labels` is int64 [3]"),
    "npz labels giant": ("x.npz", data_npy(images=DATA_U, labels=np.arange(4) * 2 ** 40), "`labels`"),
    "latents NaN": ("x.npz", data_npy(latents=DATA_L * np.nan), "NaN"),
    "latents std 0": ("x.npz", data_npy(latents=DATA_L, mean=np.zeros(4), std=np.zeros(4)), "std above 0"),
    "no room in the cache": ("x.npz", lambda path: (
        np.savez(path, images=DATA_U), (path.parent / "cache").touch()), "set DATA_CACHE"),
    "indices of other data": ("kept indices.npy", data_npy(np.array([0, 9])), "indices below 9"),
    "indices objects": ("kept indices.npy", data_npy(DATA_OBJECT), "Object arrays"),
    "features of other data": ("features.npy", data_npy(np.zeros((8, 2))), "finite [9, d]"),
    "features NaN": ("features.npy", data_npy(np.full((9, 2), np.nan)), "finite"),
}


@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")                 # Pillow's do not come through
@pytest.mark.parametrize("name", DATA_BAD)
def test_bad_data_is_refused_in_one_line(tmp_path, monkeypatch, name):
    file, write, says = DATA_BAD[name]
    monkeypatch.setenv("DATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / file
    write(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(data.DataError) as caught:
        data.load_npy(path, file[:-4], 9) if path.suffix == ".npy" else data.load(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and says in text, text
    assert text.isprintable() and len(text) < 2 * len(str(path)) + 120
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name, write", [
    ("x.zip", data_files(DATA_CLASSES, "zip")), ("x.tar.gz", data_files(DATA_CLASSES, "tar.gz")),
    ("x.npz", data_npy(images=DATA_U, labels=np.arange(4))),
    ("data_batch_1", lambda path: path.write_bytes(data_batch(DATA_FOUR[:1], [1])))])
def test_bytes_flipped_never_end_in_another_exception(tmp_path, monkeypatch, name, write):
    monkeypatch.setenv("DATA_CACHE", str(tmp_path / "cache"))
    path, random, refused = tmp_path / "d" / name, np.random.RandomState(0), 0
    path.parent.mkdir()
    write(path)
    content = np.fromfile(path, np.uint8)
    for _ in range(30):
        bad = content.copy()
        bad[random.randint(0, min(len(bad), 400), 3) * random.choice([1, -1])] = random.randint(256, size=3)
        bad.tofile(path)
        try:
            data.load(path.parent if name == "data_batch_1" else path)
        except data.DataError as error:
            refused += str(error).isprintable()
    assert refused > 5


# ------------------------------------------------------------------------------------------------------------
# Pruning

@pytest.mark.parametrize("n, d, scale", [(300, 6, 1), (5, 12, 1), (40, 6, 1e-6)])       # n < d, too
def test_gaussian_score_is_the_shrunk_log_density(n, d, scale):
    random = np.random.RandomState(0)
    x = random.randn(n, d) @ random.randn(d, d) * scale
    S = np.cov(x.T, bias=True)
    tr, tr2 = np.trace(S), np.trace(S @ S)
    rho = min(1, ((1 - 2 / d) * tr2 + tr ** 2) / ((n + 1 - 2 / d) * (tr2 - tr ** 2 / d)))
    shrunk = (1 - rho) * S + rho * tr / d * np.eye(d)
    expect = multivariate_normal(x.mean(0), shrunk, allow_singular=True).logpdf(x)
    np.testing.assert_allclose(data.prune_scores(torch.from_numpy(x), None), expect, rtol=1e-9, atol=1e-8)
    assert len(data.prune(torch.ones(4, 2), None, 0.5)) == 2    # all alike is no error


def test_knn_and_moderate_scores_by_definition():
    random = np.random.RandomState(1)
    x, labels = random.randn(4200, 5) + 50, np.arange(4200) % 3 == 0            # blocks of 2,048
    x[:40] = 80 + 1e-5 * np.arange(40)[:, None] ** 1.5          # near by: in float32 they would be one point
    knn, moderate = (data.prune_scores(torch.from_numpy(x), torch.from_numpy(labels).long(), s, k=4)
                     for s in ("knn", "moderate"))
    for c in (0, 1):
        group = x[labels == c]
        distance = np.sqrt(sum((group[:, None, i] - group[None, :, i]) ** 2 for i in range(5)))
        np.testing.assert_allclose(knn[labels == c], -np.partition(distance, 4, axis=1)[:, 4], rtol=1e-4)
        middle = np.linalg.norm(group - np.sort(group, 0)[(len(group) - 1) // 2], axis=1)
        expect = -abs(middle - np.sort(middle)[(len(middle) - 1) // 2])
        np.testing.assert_allclose(moderate[labels == c], expect, atol=1e-6)


@pytest.mark.parametrize("score", data.PRUNE_SCORES)
def test_kept_are_the_best_of_each_class_in_exact_numbers(score):
    labels = torch.repeat_interleave(torch.arange(5), torch.tensor([50, 33, 17, 1, 2]))
    labels = labels[torch.randperm(103, generator=data.stream(0, 0, ""))]
    x = torch.randn(103, 4, generator=data.stream(0, 1, ""))
    scores = data.prune_scores(x, labels, score)
    for keep, expect in ((1.0, [50, 33, 17, 1, 2]), (0.5, [25, 16, 8, 1, 1]), (1e-6, [1] * 5)):
        kept = [i for c, n in enumerate(expect)
                for i in sorted((labels == c).nonzero()[:, 0].tolist(), key=lambda i: -scores[i])[:n]]
        assert data.prune(x, labels, keep, score).tolist() == sorted(kept)


def test_pixel_features_are_principal_components():
    dataset = data_set()
    small = dataset.take(torch.arange(40)).reshape(40, -1).double().numpy()     # 8x8 is the grid itself
    u, s, _ = np.linalg.svd(small - small.mean(0), full_matrices=False)
    got = data.pixel_features(dataset, 5).double().numpy()
    np.testing.assert_allclose(np.abs(got), np.abs(u[:, :5] * s[:5]), atol=1e-3)


def test_long_tail_counts():
    labels = torch.arange(1000) % 5
    kept, other = (data.long_tail(labels, 16, seed=seed) for seed in (1, 2))
    assert torch.bincount(labels[kept]).tolist() == [200, 100, 50, 25, 12]
    assert torch.equal(kept, kept.unique()) and not torch.equal(kept, other)


# ------------------------------------------------------------------------------------------------------------
# Class weights by group DRO

def test_group_dro_by_hand():
    dro = data.GroupDRO(3, eta=0.7, smoothing=0.01)
    np.testing.assert_allclose(dro.mean, [1 / 3] * 3, rtol=1e-6)                # before the first step
    alpha, total = np.full(3, 1 / 3), np.zeros(3)
    steps = [([0.4, -1.0, 0.8, 2.0, 1.0], [0, 0, 0, 2, 2], [0.4, 0, 1.5]),      # class 1 is absent
             ([0.3, 0.5, 9.0, math.nan, 0.2], [1, 1, 0, 2, 2], [0.4, 0.4, 0.1])]        # one of class 0 only
    for excess, labels, e in steps:
        state, dro = dro.state_dict(), data.GroupDRO(3, eta=0.7, smoothing=0.01)
        dro.load_state_dict(state)                              # it holds all
        dro.update(torch.tensor(excess), torch.tensor(labels))
        alpha = alpha * np.exp(0.7 * np.array(e))
        alpha = 0.99 * alpha / alpha.sum() + 0.01 / 3
        total += alpha
        np.testing.assert_allclose(dro.weights, alpha, rtol=1e-5)
    np.testing.assert_allclose(dro.mean, total / 2, rtol=1e-5)


def test_group_dro_neither_forgets_nor_favours_rare_classes():
    # A long tail, R = 50, over 10 classes, batches of 128: the tail is in half of them.
    share = 50.0 ** (-torch.arange(10) / 9)
    for tail, low, high in ((0.02, 0.9, 1.1), (0.3, 2, math.inf)):
        generator, dro = torch.Generator().manual_seed(0), data.GroupDRO(10, eta=0.01)
        true = torch.tensor([0.02] * 9 + [tail])
        for _ in range(2500):
            labels = torch.multinomial(share, 128, replacement=True, generator=generator)
            dro.update(true[labels] + 0.15 * torch.randn(128, generator=generator), labels)
        assert low < dro.mean[9] / dro.mean[0] < high


# ------------------------------------------------------------------------------------------------------------
# Pictures and the command line

def test_pictures():
    x = torch.randint(256, (5, 3, 48, 48), dtype=torch.uint8, generator=data.stream(0, 0, ""))
    grid = torch.from_numpy(np.array(data.image_grid(x, 3))).permute(2, 0, 1)
    assert grid.shape == (3, 2 * 48, 3 * 48) and torch.equal(grid[:, 48:, 48:96], x[4])
    assert (grid[:, 48:, 96:] == 255).all()
    tree = data.Tree()
    exact, drawn = (np.asarray(data.density_picture(d, 60), float) for d in (tree, tree.sample(200_000)))
    assert abs(exact - drawn).mean() < 12 and 0.01 < (exact < 120).mean() < 0.2
    assert ((exact < 120) == (drawn < 120)).mean() > 0.97       # the same way up
    point = np.asarray(data.density_picture(torch.tensor([[1.2, 0.9]]), 30))
    assert np.argwhere(point < 255).tolist() == [[6, 27]]       # up and to the right


def test_command_line_prunes_and_draws(tmp_path, capsys):
    data_write(tmp_path / "d", DATA_CLASSES)
    out, half = tmp_path / "keep.npy", ["--keep", "0.5", "--out", tmp_path / "keep.npy"]

    def run(*flags):
        data.command(data.run, data.build_parser(), [str(flag) for flag in (tmp_path / "d", *flags)])
        return capsys.readouterr().out
    assert "6 images of 3x8x8" in run() and not out.exists()
    assert "kept 4 of 6" in run(*half, "--prune", "knn", "--k", 1, "--show", tmp_path / "c.png")
    dataset, features = data.load(tmp_path / "d"), torch.arange(6.0)[:, None] ** 2
    expect = data.prune(data.pixel_features(dataset), dataset.labels, 0.5, "knn", k=1)
    assert torch.equal(data.load_npy(out, "kept indices", 6), expect)
    assert Image.open(tmp_path / "c.png").width > 3 * 8 * 48
    np.save(tmp_path / "f.npy", np.asfortranarray(features))
    run(*half, "--prune", "moderate", "--features", tmp_path / "f.npy")
    assert np.load(out).tolist() == data.prune(features, dataset.labels, 0.5, "moderate").tolist()
    for *flags, bad in (["--keep", "nan"], ["--prune", "best"], ["--size", "0"], ["--ke", "0.5"],
                        [*half, "--features", "no.npy"], ["--keep", "0.5", "--out", tmp_path / "no/k.npy"]):
        with pytest.raises(SystemExit, match="2"):
            run(*flags, bad)
        last = capsys.readouterr().err.splitlines()[-1]
        assert "error: " in last and (flags[-1] in last or str(bad) in last)


# ------------------------------------------------------------------------------------------------------------
# fid.py: Fréchet distance, precision and recall

def _fid_features(seed, n, d, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(d)) / d ** 0.5
    return shift + scale * torch.randn(n, d, generator=generator) @ mixing


def _fid_naive_frechet(a, b):
    """tr sqrt(S_a S_b) is the nuclear norm of A B^T, the centered features over sqrt(n - 1), of any rank."""
    a, b = a.double(), b.double()
    A, B = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (a, b))
    traces = A.square().sum() + B.square().sum() - 2 * torch.linalg.svdvals(A @ B.T).sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + traces).item()


@pytest.mark.parametrize("n, m, d, offset", [(300, 200, 24, 0), (300, 200, 24, 1e3), (30, 25, 96, 0)])
def test_frechet_of_features_is_the_formula_by_singular_values(n, m, d, offset):
    a, b = offset + _fid_features(0, n, d), offset + _fid_features(1, m, d, shift=0.3, scale=1.5)
    got, same = (fid.score(fid.summary(a), fid.summary(other), "FID")["FID"] for other in (b, a))
    assert got == pytest.approx(_fid_naive_frechet(a, b), rel=1e-6) and abs(same) < 1e-3


def test_frechet_of_two_gaussians_is_the_closed_form():
    mu, s = np.array([1.0, -2.0, 0.5]), np.array([1.0, 2.0, 0.25])  # diagonal: sum (ds)^2 + |dmu|^2
    t = np.array([0.5, 3.0, 0.0])                               # one dimension without variance
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]    # changes no distance
    sigma_s, sigma_t = (turn @ np.diag(v ** 2) @ turn.T for v in (s, t))
    for result in fid.frechet(mu, sigma_s, mu * 0, sigma_t), fid.frechet(mu * 0, sigma_t, mu, sigma_s):
        assert result == pytest.approx(np.square(mu).sum() + np.square(s - t).sum(), rel=1e-6)


def _fid_naive_share(points, centres, k):
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=2)
    radius = np.sort(distance, axis=1)[:, k]  # column 0 is the point itself
    return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radius)) for p in points])


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_equals_the_naive_version(k):
    real, fake = _fid_features(6, 70, 5).double(), _fid_features(7, 60, 5, shift=0.3, scale=0.7).double()
    pairs = (fake.numpy(), real.numpy()), (real.numpy(), fake.numpy())
    precision, recall = (_fid_naive_share(points, centres, k) for points, centres in pairs)
    assert fid.precision_recall(real, fake, k, block=16) == pytest.approx((precision, recall))
    assert 0 < recall < precision < 1                           # the case tells the two apart


def test_summary_keeps_evenly_spaced_features_and_needs_two():
    features = torch.arange(25_000.0)[:, None]
    found = fid.summary(features)
    assert torch.equal(found["features"][:, 0], torch.arange(10_000) * 25_000 // 10_000)
    assert found["sigma"].item() == pytest.approx(25_000 * 25_001 / 12)    # n (n + 1) / 12 of 0 ... n - 1
    for other, says in (features[:1], "at least 2"), (torch.ones(9, 4), "1 and 4"):
        with pytest.raises(data.DataError, match=says):
            fid.score(found, fid.summary(other), "FD")
    assert list(fid.score(found, fid.summary(features[:3]), "FD")) == ["FD"]


# ------------------------------------------------------------------------------------------------------------
# fid.py: the Inception network

@pytest.fixture(scope="module")
def _fid_inception():
    """Random weights with the names and shapes of the public file."""
    generator, state = torch.Generator().manual_seed(0), {}
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in fid.Inception().state_dict().items()}
    for name in [key.removesuffix(".weight") for key in shapes if key.endswith(".weight")]:
        shape = shapes[f"{name}.weight"]
        weight = torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        state[f"{name}.conv.weight"] = weight
        for part, start in ("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1.5):
            state[f"{name}.bn.{part}"] = start + 0.1 * torch.randn(shape[0], generator=generator)
    return {**state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


def _fid_naive_inception(state, images):
    """The published graph in float64, batch norms unfolded, line by line; "/" halves, "-" does not pad."""
    def line(x, block, names):
        for name in names.split():
            weight, gamma, beta, mean, var = (state[f"{block}{name.strip('/-')}.{key}"].double() for key in (
                "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"))
            padding = [0 if name[-1] in "/-" else size // 2 for size in weight.shape[2:]]
            x = F.conv2d(x, weight, None, 2 if name[-1] == "/" else 1, padding)
            x = F.relu(F.batch_norm(x, mean, var, gamma, beta, False, 0, 0.001))
        return x

    def join(block, *lines, pooled=None):
        ends = [line(x, block, names) for names in lines]
        return torch.cat(ends + [halved(x) if pooled is None else line(pooled, block, "branch_pool")], 1)

    def halved(x):
        return F.max_pool2d(x, 3, 2)

    def mean(x):                                # over the pixels inside of the picture
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)
    x = F.interpolate(images.double() / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    x = halved(line(x, "Conv2d_", "1a_3x3/ 2a_3x3- 2b_3x3"))
    x = halved(line(x, "Conv2d_", "3b_1x1 4a_3x3-"))
    double, seven = "branch3x3dbl_1 branch3x3dbl_2 ", " ".join(f"branch7x7dbl_{i}" for i in range(1, 6))
    for name in "bcd":
        x = join(f"Mixed_5{name}.", "branch1x1", "branch5x5_1 branch5x5_2", double + "branch3x3dbl_3",
                 pooled=mean(x))
    x = join("Mixed_6a.", "branch3x3/", double + "branch3x3dbl_3/")
    for name in "bcde":
        x = join(f"Mixed_6{name}.", "branch1x1", "branch7x7_1 branch7x7_2 branch7x7_3", seven, pooled=mean(x))
    x = join("Mixed_7a.", "branch3x3_1 branch3x3_2/",
             "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/")
    for name, pooled in ("b", mean), ("c", lambda x: F.max_pool2d(x, 3, 1, 1)):
        x = join(f"Mixed_7{name}.", "branch1x1", "branch3x3_1 branch3x3_2a", "branch3x3_1 branch3x3_2b",
                 double + "branch3x3dbl_3a", double + "branch3x3dbl_3b", pooled=pooled(x))
    return x.mean((2, 3))


def test_inception_is_the_published_network(tmp_path, _fid_inception):
    layout = sorted(f"{name} {'x'.join(map(str, value.shape))}" for name, value in _fid_inception.items()
                    if "conv.weight" in name)
    digest = hashlib.sha256("\n".join(layout).encode()).hexdigest()[:16]
    assert (len(layout), digest) == (94, "b0593a094ed0ea79")    # of pt_inception-2015-12-05-6726825d.pth
    torch.save(_fid_inception, tmp_path / "weights.pth")
    net = fid.network("inception", weights=str(tmp_path / "weights.pth"))
    images = torch.randint(256, (1, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, expected = fid.extract(net, images), _fid_naive_inception(_fid_inception, images)
    assert features.dtype == torch.float32 and net.id == "inception"
    assert (features - expected).abs().max() < 1e-4 * expected.abs().max()


def test_inception_refuses_other_files(tmp_path, _fid_inception):
    path = tmp_path / "weights.pth"
    less = {key: value for key, value in _fid_inception.items() if "6b.branch1x1" not in key}
    more = _fid_inception | {"Mixed_6x" + key[8:]: value for key, value in less.items() if "6b" in key}
    wrong = _fid_inception | {"Mixed_7c.branch_pool.conv.weight": torch.zeros(192, 2048, 3, 3)}
    for content in None, [1, 2], less, more, wrong:
        if content:
            torch.save(content, path)
        with pytest.raises(data.DataError, match="weights.pth"):
            fid.network("inception", weights=str(path))


# ------------------------------------------------------------------------------------------------------------
# fid.py: own features and the command line

def _fid_images(path, n, seed=0, noise=40):
    """A labelled .npz: class c has horizontal or vertical stripes, so that a network can learn it."""
    rng, labels = np.random.default_rng(seed), np.arange(n) % 2
    stripes = np.where(np.arange(16) // 2 % 2, 190, 60)
    images = np.where(labels[:, None, None, None] == 0, stripes[:, None], stripes[None, :])
    images = images + noise * rng.standard_normal((n, 3, 16, 16))
    np.savez(path, images=images.clip(0, 255).astype(np.uint8), labels=labels)
    return str(path)


def _fid_classifier(path, seed=0, **changes):
    torch.manual_seed(seed)
    net = fid.Classifier(2, width=4)
    file = {"kind": "classifier", "width": 4, "class_names": ["0", "1"], "model": net.state_dict()}
    torch.save({**file, **changes}, path)
    return net.eval().requires_grad_(False)


@pytest.fixture
def _fid_own(tmp_path):
    """Two image sets and two classifiers: (real, fake, flags of the first classifier, the classifier)."""
    _fid_classifier(tmp_path / "else.pt", seed=1)
    return (_fid_images(tmp_path / "real.npz", 151), _fid_images(tmp_path / "fake.npz", 120, 1, noise=70),
            ("--features", f"own:{tmp_path / 'own.pt'}", "--batch", 37, "--device", "cpu"),
            _fid_classifier(tmp_path / "own.pt"))


def _fid_run(capsys, *argv):
    """(exit status, stdout, stderr without progress lines) of `python fid.py argv`."""
    code = 0
    try:
        data.command(fid.run, fid.build_parser(), [str(arg) for arg in argv])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    return code, out, "".join(line for line in err.splitlines(True) if not line.startswith(("epoch", os.sep)))


def test_fit_learns_and_its_file_is_read_back(tmp_path, capsys):
    path, checkpoint = _fid_images(tmp_path / "stripes.npz", 400), tmp_path / "own.pt"
    command, nets = ["--fit", checkpoint, path, "--epochs", 6, "--width", 4, "--device", "cpu"], []
    for seed in 0, 0, 1:
        code, out, _ = _fid_run(capsys, *command, "--seed", seed)
        nets.append(fid.network(f"own:{checkpoint}"))
    accuracy, dataset = torch.load(checkpoint, weights_only=True)["accuracy"], data.load(path)
    assert code == 0 and accuracy >= 0.9 and f"{accuracy:.4f}" in out
    assert (nets[2].logits(dataset.x).argmax(1) == dataset.labels).float().mean() >= 0.9
    assert torch.equal(nets[0].head.weight, nets[1].head.weight) and nets[1].id != nets[2].id
    with pytest.raises(data.DataError, match="--fit"):
        fid.fit(checkpoint, data.Dataset(dataset.x))            # without labels


def test_classifier_round_trip_and_refusal(tmp_path):
    net = _fid_classifier(tmp_path / "own.pt")
    images = torch.randint(256, (5, 3, 24, 16), dtype=torch.uint8)
    assert torch.equal(fid.network(f"own:{tmp_path / 'own.pt'}")(images), net(images))
    torch.save({"kind": "denoiser", "model": {}}, tmp_path / "other.pt")
    _fid_classifier(tmp_path / "wide.pt", width=10 ** 6)        # would take terabytes
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in fid.Classifier(2, 512).state_dict().items()}
    huge = {key: torch.zeros([]).expand(shape) for key, shape in shapes.items()}
    _fid_classifier(tmp_path / "huge.pt", width=512, model=huge)        # one number that claims to be many
    _fid_classifier(tmp_path / "nan.pt", model={k: v * float("nan") for k, v in net.state_dict().items()})
    for name in "other.pt", "wide.pt", "huge.pt", "nan.pt", "absent.pt":
        with pytest.raises(data.DataError, match=name):
            fid.network(f"own:{tmp_path / name}")


def test_augment_shifts_and_flips_every_image_on_its_own():
    images = torch.randint(256, (64, 3, 9, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out, found = fid._augment(images, torch.Generator().manual_seed(1), shift=2), set()
    for image, result in zip(F.pad(images.float(), (2, 2, 2, 2), mode="reflect"), out):
        key, = [(y, x, flip) for y in range(5) for x in range(5) for flip in ((), (2,))
                if torch.equal(image[:, y:y + 9, x:x + 11].flip(flip), result)]
        found.add(key)
    assert len(found) > 20 and len({flip for *_, flip in found}) == 2


def test_extract_pads_takes_an_index_and_scores_latents_as_pixels_only(_fid_own):
    net, shapes = fid.network(_fid_own[2][1]), set()
    net.register_forward_hook(lambda module, inputs, output: shapes.add(inputs[0].shape))
    images, index = torch.randint(256, (23, 3, 8, 8), dtype=torch.uint8), torch.tensor([5, 22, 0, 7, 7])
    features = fid.extract(net, images, batch=10)
    assert shapes == {(10, 3, 8, 8)} and torch.allclose(features, net(images), atol=1e-6)
    assert torch.allclose(fid.extract(net, images, index, batch=2), features[index], atol=1e-6)
    with pytest.raises(data.DataError, match="--features pixels"):
        fid.extract(net, torch.randn(4, 4, 8, 8))


def test_pixels_are_area_averages_of_images_and_latents():
    images = torch.randint(256, (4, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net, latents = fid.network("pixels"), torch.randn(4, 4, 8, 8)
    expected = images.double().reshape(4, 3, 8, 2, 8, 3).mean((3, 5)).flatten(1) / 127.5 - 1
    assert torch.allclose(fid.extract(net, images).double(), expected, atol=1e-6)
    assert torch.equal(fid.extract(net, latents), latents.flatten(1))


def test_score_noise_floor_and_features_equal_a_direct_computation(tmp_path, capsys, _fid_own):
    real, fake, own, net = _fid_own
    a, b = (net(data.load(path).x) for path in (real, fake))
    code, out, err = _fid_run(capsys, real, fake, *own)
    assert code == 0 and "only 151 real images: below 2048" in err and "biased upwards" in err
    precision, recall = fid.precision_recall(a, b)
    name, distance, *words = out.split()
    assert name == "FD(own)" and float(distance) == pytest.approx(_fid_naive_frechet(a, b), abs=2e-4)
    assert words[:4] == ["precision", f"{precision:.2f}", "recall", f"{recall:.2f}"]
    assert "151 real, 120 fake, features own:" in out and out == _fid_run(capsys, real, fake, *own)[1]
    out = _fid_run(capsys, real, "--noise-floor", *own)[1]
    assert "76 real, 75 fake" in out
    assert float(out.split()[3]) == pytest.approx(_fid_naive_frechet(a[::2], a[1::2]), abs=2e-4)
    assert _fid_run(capsys, real, "--save-features", tmp_path / "f.npy", *own)[0] == 0
    np.testing.assert_allclose(np.load(tmp_path / "f.npy", allow_pickle=False), a, atol=1e-5)


def test_statistics_files(tmp_path, capsys, _fid_own):
    real, fake, own, _ = _fid_own
    stats = tmp_path / "stats.npz"
    assert _fid_run(capsys, real, "--save-stats", stats, *own)[0] == 0
    both, from_stats = _fid_run(capsys, real, fake, *own)[1], _fid_run(capsys, stats, fake, *own)[1]
    assert from_stats.split()[:2] == both.split()[:2] and "precision" not in from_stats
    code, out, err = _fid_run(capsys, stats, fake, "--features", f"own:{tmp_path / 'else.pt'}")
    assert (code, out) == (2, "") and err.startswith("error: ") and "own:" in err and err.count("\n") == 1
    features = _fid_features(0, 50, 6), 2 + _fid_features(1, 50, 6)
    for name, f in zip("ab", features):                         # as pytorch-fid writes them
        np.savez(tmp_path / f"{name}.npz", mu=f.mean(0), sigma=np.cov(f, rowvar=False))
    out = _fid_run(capsys, tmp_path / "a.npz", tmp_path / "b.npz")[1].split()
    assert out[0] == "FID" and float(out[1]) == pytest.approx(_fid_naive_frechet(*features), abs=2e-4)
    for mu, sigma in (np.zeros(3), np.zeros((2, 2))), (np.zeros(2), np.full((2, 2), np.nan)):
        np.savez(tmp_path / "broken.npz", mu=mu, sigma=sigma)
        assert "broken.npz" in _fid_run(capsys, tmp_path / "a.npz", tmp_path / "broken.npz")[2]


def test_data_features_are_computed_once_per_data_and_network(tmp_path, monkeypatch, _fid_own):
    monkeypatch.setenv("DATA_CACHE", str(tmp_path / "cache"))
    dataset = data.load(_fid_own[0])
    nets = [fid.network(f"own:{tmp_path / name}") for name in ("own.pt", "else.pt")]
    features = [fid.extract(net, dataset.x) for net in nets]
    for _ in range(2):
        assert all(torch.equal(fid.data_features(net, dataset), f) for net, f in zip(nets, features))
        monkeypatch.setattr(fid, "extract", None)               # the second time no network runs
    for path in (tmp_path / "cache").glob("features-*.npy"):
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(data.DataError, match="delete it"):
        fid.data_features(nets[0], dataset)


@pytest.mark.parametrize("argv, message", [
    (["real.npz"], "paths"),
    (["real.npz", "real.npz", "--noise-floor"], "paths"),
    (["real.npz", "--noise-floor", "--save-features", "x.npy"], "--noise-floor"),
    (["real.npz", "--batch", "0"], "--batch"),
    (["real.npz", "real.npz", "--features", "vgg"], "--features vgg"),
    (["absent", "real.npz"], "absent"),                         # before Inception's weights are looked for
    (["real.npz", "real.npz"], "unreachable")])
def test_flags_that_do_not_fit_together_and_no_weights(tmp_path, monkeypatch, capsys, argv, message):
    def offline(*args, **kwargs):
        raise OSError("network is unreachable")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.delenv("FID_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)
    _fid_images("real.npz", 30)
    code, out, err = _fid_run(capsys, *argv)
    last = err.splitlines()[-1]
    assert (code, out) == (2, "") and message in last and os.listdir() == ["real.npz"]
    assert message != "unreachable" or "--inception-weights" in last and "own:CKPT" in last


# ------------------------------------------------------------------------------------------------------------
# fid.py: metrics of the tree

class _FidFlatTree:
    """Log-density -2 - |x|: hits are the points within 0.12 of the origin."""

    def logp(self, x, sigma=0):
        return -2 - x.norm(dim=1)


def test_hit_and_coverage_against_loops():
    points = 0.12 * torch.randn(3000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = torch.cat([points, torch.tensor([[1.6, 0.0], [0.0, -40.0]])])      # outside of the grid
    hits, reached, cells_hit = [bool(p.norm() <= 0.12) for p in points], set(), set()
    for (x, y), is_hit in zip(points.tolist(), hits):
        if abs(x) < 1.5 and abs(y) < 1.5:
            cell = (int((x + 1.5) // (3 / 101)), int((y + 1.5) // (3 / 101)))
            reached.add(cell)
            cells_hit |= {cell} if is_hit else set()
    both = fid.tree_metrics(points, _FidFlatTree(), points[:50] + torch.tensor([3.0, 4.0]))
    assert both == pytest.approx({"hit": np.mean(hits), "coverage": len(cells_hit) / len(reached), "l2": 5})
    assert [both["hit"], both["coverage"]] == [f(points, _FidFlatTree()) for f in (fid.hit, fid.coverage)]
    assert fid.coverage(torch.full((4, 2), 9.0), _FidFlatTree()) == 0


def test_score_error_is_zero_for_the_exact_denoiser_and_the_closed_form_for_a_biased_one():
    tree = data.Tree("A")
    assert fid.score_error(tree.denoise, tree, n=256) == 0

    def biased(x, sigma, labels):                               # by c_out; lambda c_out^2 = 1
        return tree.denoise(x, sigma) + (sigma * 0.5 / (sigma ** 2 + 0.25).sqrt())[:, None]
    assert fid.score_error(biased, tree, n=5000) == pytest.approx(1, rel=1e-4)     # more than one block


def test_exact_endpoints_reach_the_density():
    tree, noise = data.Tree("A"), torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    assert fid.hit(fid.exact_endpoints(tree, noise), tree) > 0.97


# ------------------------------------------------------------------------------------------------------------
# fid.py: comparing runs

def _fid_write_run(folder, seed, records, **config):
    config = {"data_fingerprint": "d", "kind": "tree", "channels": 64, "size": 2, "features_id": None,
              "seed": seed, "selector": "uniform", "batch": 10, "out": str(folder), **config}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    records = [{"kind": "train", "step": 1, "loss": 0.5}] + [{"kind": "eval", **r} for r in records]
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (folder / "log.jsonl").write_text(lines + '{"kind": "eval", "st')           # being written
    return str(folder)


def _fid_records(rate, steps, seconds=0.01, reference=0.0, weights=(1, 2), hit=0.002):
    """hit grows by `hit` a step, guided twice as fast."""
    return [{"step": s, "seconds": s * seconds, "select_seconds": s * seconds * rate, "guidance": w,
             "reference_seconds": reference, "eval_seconds": 1, "compile_seconds": 9,
             "examples_trained": 10 * s, "examples_seen": 10 * s, "hit": w * hit * s}
            for s in steps for w in weights]


def _fid_rows(table):
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines]


def _fid_svg(path, tag):
    return list(xml.etree.ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}" + tag))


def test_compare_interpolates_exactly_and_counts_reference_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [_fid_write_run(tmp_path / f"uniform<1>-s{s}", s, _fid_records(0, (10, 20, 50), hit=0.001 * s))
            for s in (1, 2, 3)]                                 # up to 500 examples, 0.5 s
    runs += [_fid_write_run(tmp_path / f"ajest-seed{s}", s, _fid_records(0.25, (10, 40), 0.02, 0.1),
                            selector="ajest", guide=f"guides/g-s{s}/last.pt") for s in (0, 1)]  # 400; 0.9 s
    code, out, _ = _fid_run(capsys, "--compare", *runs)
    rows = _fid_rows(out)
    assert code == 0 and rows[0] == rows[4] == ["arm", "runs", "hit", "hit, guided", "selection", "ms/step"]
    # 400 examples: step 40, between the evaluations at 20 and 50 of the uniform arm
    assert rows[2] == ["uniform<1>", "3", "0.08 ± 0.04", "0.16 ± 0.08", "0%", "10"]
    assert rows[3] == ["ajest", "2", "0.08 ± 0", "0.16 ± 0", "25%", "20"]
    # 0.5 s: uniform at step 50, AJEST at step 20 because the reference took 0.1 s
    assert rows[6] == ["uniform<1>", "3", "0.1 ± 0.05", "0.2 ± 0.1", "0%", "10"]
    assert rows[7] == ["ajest", "2", "0.04 ± 0", "0.08 ± 0", "25%", "20"]
    assert "At 400 examples trained" in out and "At 0.5 seconds" in out
    lines = _fid_svg("compare.svg", "polyline")
    assert len(lines) == len(_fid_svg("compare.svg", "polygon")) == 2 * 4       # panels; arms, guided or not
    assert sum("stroke-dasharray" in line.attrib for line in lines) == 4
    assert {"uniform<1>, guided  0.2", "ajest, unguided  0.08", "hit", "examples trained"} <= {
        text.text for text in _fid_svg("compare.svg", "text")}
    corners = [line for line in lines if line.attrib["stroke"] == fid.COLORS[0]][2].attrib["points"]
    (x1, y1), (x2, y2), (x3, y3) = (map(float, pair.split(",")) for pair in corners.split())
    assert ((x3 - x2) / (x2 - x1), (y3 - y2) / (y2 - y1)) == pytest.approx((3, 3), abs=0.01)


def test_compare_prints_the_table_that_exists_and_says_why_the_other_does_not(tmp_path, capsys):
    quick = _fid_write_run(tmp_path / "quick-s0", 0, _fid_records(0, (10, 20)))
    records = _fid_records(0, (10, 20), seconds=1, weights=(1,), hit=0.02)
    slow = _fid_write_run(tmp_path / "slow-s0", 0, records, batch=9)
    code, out, _ = _fid_run(capsys, "--compare", quick, slow, "--out", tmp_path / "c.svg")
    assert code == 0 and _fid_rows(out)[3][:3] == ["slow", "1", "0.4"] and out.count("| arm") == 1
    assert all(word in out.splitlines()[-1] for word in ("no seconds of training in common", "slow-s0"))
    assert len(_fid_svg(tmp_path / "c.svg", "polyline")) == 2 * 3


@pytest.mark.parametrize("config, records, flags, says", [
    ({"data_fingerprint": "e"}, _fid_records(0, (10, 20)), [], "data_fingerprint"),
    ({"channels": 32}, _fid_records(0, (10, 20)), [], "channels"),
    ({}, _fid_records(0, (30, 40)), [], "in common"),
    ({}, [], [], "no evaluations"),
    ({}, [dict(record, hit="high") for record in _fid_records(0, (10, 20))], [], "b: not a run folder"),
    ({}, _fid_records(0, (10, 20)), ["--metric", "beauty"], "--metric")])
def test_compare_refuses_what_cannot_be_compared(tmp_path, capsys, config, records, flags, says):
    a = _fid_write_run(tmp_path / "a-s0", 0, _fid_records(0, (10, 20)))
    b = _fid_write_run(tmp_path / "b", 0, records, **config)
    code, out, err = _fid_run(capsys, "--compare", a, b, "--out", tmp_path / "c.svg", *flags)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1
    assert not (tmp_path / "c.svg").exists()
