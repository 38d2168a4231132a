"""Every test: pytest test_all.py. No network, no data, two CPU cores.

Each holds the code against an independent reference: a naive version, a closed form, a published layout. The
long ones (many kills, the compiled UNet) run with SLOW_TESTS=1; those that take a device also run on CUDA
where there is one.
"""
import argparse
import ast
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from unittest import mock

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
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
TEMP = tempfile.TemporaryDirectory(prefix="tests-")             # deleted at the end
os.environ["DATA_CACHE"] = os.path.join(TEMP.name, "cache")     # never the user's own
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"               # no pool of processes for a small graph


# ------------------------------------------------------------------------------------------------------------
# Small runs: settings, batches, images, what a run has written.

FEW = "--device cpu --eval-samples 0 --sampling-steps 2 "
TINY = FEW + "--steps 24 --batch 64 --guide-steps 8 --log-every 6 "                         # on the tree
SMALL = FEW + "--channels 8 --blocks 1 --batch 4 --guide-steps 2 --steps 6 --log-every 2 "  # on images
TREE = data.Tree()
SETTINGS = "model_config"                                       # the settings of a run in its checkpoint


def _images(path, n=60, size=8):
    """An .npz of smooth random images of three classes, each of its own colour."""
    labels = torch.arange(n) % 3
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 120
    coarse += labels[:, None, None, None] * 40
    images = F.interpolate(coarse, (size, size), mode="bilinear").to(torch.uint8)
    np.savez(path, images=images.numpy(), labels=labels.numpy())
    return path


@functools.cache
def _folder():
    """A folder with images, labelled and not, and models trained on them, with labels of mirrors or not."""
    folder = Path(tempfile.mkdtemp(dir=TEMP.name))
    with np.load(_images(folder / "d.npz")) as file:
        np.savez(folder / "plain.npz", images=file["images"])
        np.savez(folder / "named.npz", **file, class_names=np.array(["ant", "bee", "cat"]))
    shutil.copy(folder / "d.npz", folder / "moved.npz")
    _images(folder / "large.npz", size=32)
    np.savez(folder / "latents.npz", latents=np.ones((9, 4, 28, 28), np.float32))
    np.savez(folder / "wide.npz", images=np.ones((9, 3, 8, 16), np.uint8))
    for name, flip in ("reference", "--flip"), ("other", "--no-flip"):
        _train(SMALL, flip, "--guide none --steps 2 --data", folder / "d.npz", out=folder / name)
    return folder


def _words(flags):
    return " ".join(map(str, flags)).split()


def _settings(*flags):
    """The settings of a run with these flags."""
    return train.settings(["--device", "cpu", "--out", f"{TEMP.name}/none", *_words(flags)])[0]


def _denoiser(c):
    torch.manual_seed(0)
    return model.build(vars(c))


def _batches(c, dataset=TREE, n=64, **more):
    settings = dict(device=c.device, flip=c.flip, targets=c.targets, P_mean=c.P_mean, P_std=c.P_std)
    return data.Batches(dataset, n, c.seed, **settings | more)


def _train(*flags, out=None):
    """Train in the folder `out`, or in one of its own; returns the folder."""
    out = Path(out or tempfile.mkdtemp(dir=TEMP.name))
    train.main([*_words(flags), "--out", str(out)])
    return out


def _load(run, name="checkpoint.pt"):
    return torch.load(Path(run) / name, weights_only=True)


def _records(run, kind="train"):
    lines = (Path(run) / "log.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def _assert_close(a, b, tolerance=0.0):
    """Tensors, or lists and dictionaries of tensors and numbers, are equal up to a tolerance."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def _untimed(record):
    return {key: value for key, value in record.items() if "seconds" not in key}


def _same_run(a, b):
    """Two run folders hold the same stages: weights, averages, optimizer, class weights, counts and log."""
    stages = [sorted(path.relative_to(run) for path in run.rglob("*.pt")) for run in (a, b)]
    assert stages[0] == stages[1] != []
    for stage in stages[0]:
        one = _load(a, stage)
        two = _load(b, stage)
        for part in one.keys() - {SETTINGS, "progress", "log"}:
            _assert_close(one[part], two[part])
        assert _untimed(one["progress"]) == _untimed(two["progress"])
        assert list(map(_untimed, one["log"])) == list(map(_untimed, two["log"]))


def _call(capsys, program, *flags):
    """-> (exit status, stdout, stderr) of a program."""
    capsys.readouterr()
    status = 0
    try:
        data.command(lambda: program.main(_words(flags)))
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def _refused(capsys, program, flags, *words):
    """The program ends with status 2 and one printable error line that holds `words`."""
    status, _, err = _call(capsys, program, flags)
    last = err.splitlines()[-1]
    assert status == 2 and err.count("error: ") == 1 and last.isprintable() and "Traceback" not in err, err
    assert all(str(word) in last for word in words), err


def _interrupt(monkeypatch, *calls):
    """Ctrl-C in the middle of these steps, counted from now on over all stages and runs."""
    count = itertools.count(1)
    update = model.PowerEMA.update

    def interrupted(self, t):
        if next(count) in calls:
            raise KeyboardInterrupt
        update(self, t)
    monkeypatch.setattr(model.PowerEMA, "update", interrupted)


# ------------------------------------------------------------------------------------------------------------
# What the README says to copy, each group alone with these imports: tests of these names use these.

def _copied(**names):
    """A namespace with the text of these definitions, {module: their names}."""
    space = dict(torch=torch, np=np, math=math, hashlib=hashlib)
    for module, wanted in names.items():
        text = (HERE / f"{module}.py").read_text()
        for node in ast.parse(text).body:
            name = node.targets[0].id if isinstance(node, ast.Assign) else getattr(node, "name", None)
            if name in wanted.split():
                first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
                exec("\n".join(text.splitlines()[first - 1:node.end_lineno]), space)
    return argparse.Namespace(**space)


JEST = _copied(select="FACTORS gumbel finite jest")
GUIDANCE = _copied(guide="autoguided noise_levels heun generate")
PRUNING = _copied(
    data="stream prune ranked priorities indices_by_class _gaussian _knn _moderate neighbour_distance")
DRO = _copied(data="GroupDRO class_weights_of_mean_one")
FRECHET = _copied(fid="moments frechet")
PRECISION = _copied(data="neighbour_distance", fid="precision_recall _share_inside")
AVERAGE = _copied(model="PowerEMA ema_gamma")


# ------------------------------------------------------------------------------------------------------------
# select.py

@pytest.mark.parametrize("python", {
    sys.executable, shutil.which("python3", path="/usr/bin") or sys.executable})
def test_standard_library_finds_its_own_select(python):
    code = "import sys, subprocess, asyncio, select; assert select.select and 'torch' not in sys.modules"
    second_clone = shutil.copy(HERE / "select.py", tempfile.mkdtemp(dir=TEMP.name))
    env = os.environ | dict(PYTHONPATH=os.path.dirname(second_clone))
    assert subprocess.run([python, "-c", code], cwd=HERE, env=env).returncode == 0


def _naive_jest(S, joint, k, chunks, generator):
    """The matrix form, draw by draw: what the chosen add to i is the sum of S_ij + S_ji over them."""
    chosen = []
    while len(chosen) < k:
        logits = S.diagonal() + S[:, chosen].sum(1) + S[chosen].sum(0)
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
    learner, reference = scale * torch.rand(2, 24, generator=generator, dtype=torch.float64)
    reference = reference / 3
    scores = learner - reference
    S = torch.diag(scores)                                      # JEST's own pairs: none
    if joint != "independent":
        S = learner[:, None] - reference
    counts = torch.zeros(2, 24)
    for _ in range(runs):
        counts[0, JEST.jest(scores.float(), k, chunks, joint, generator)] += 1
        counts[1, _naive_jest(S, joint, k, chunks, generator)] += 1
    share = counts / runs
    _assert_close(share.sum(1), torch.full((2,), float(k)), 1e-4)      # no index twice
    mean = share.mean(0)
    error = (share[0] - share[1]) / (mean * (1 - mean) * 2 / runs).sqrt()
    assert error.abs().max() < 4 and share.std(1).min() > 0.1   # selection is far from uniform


@pytest.mark.parametrize("joint", JEST.FACTORS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e37, -3e38])
def test_no_score_makes_jest_choose_an_example_twice_or_always(joint, value):
    generator = torch.Generator().manual_seed(0)
    scores = torch.linspace(9, 11, 20)
    scores[10] = value                                          # between the others, where it is finite
    count = torch.zeros(20)
    for _ in range(400):
        chosen = JEST.jest(scores, 10, 4, joint, generator)
        assert chosen.unique().numel() == 10
        count[chosen] += 1
    assert JEST.jest(scores, 20, 3, joint, generator).unique().numel() == 20
    assert select.gumbel_top_k(scores, 10, generator)[1].isfinite().all()
    assert math.isfinite(value) or abs(count[10] - count[9]) < 4 * 200 ** 0.5   # as the mean score would


def test_half_precision_scores_are_taken_as_fp32_and_other_shapes_are_refused():
    scores = torch.linspace(-300, 300, 20, dtype=torch.float16)
    for k in 4, 20:
        index, weight = select.gumbel_top_k(scores, k)
        assert weight.dtype == torch.float32
        for best in index, JEST.jest(scores, k, joint="sum"):
            assert set(best.tolist()) == set(range(20 - k, 20))
    for choose, (shape, k) in itertools.product((JEST.jest, select.gumbel_top_k), (([5], 6), ([5, 1], 2))):
        with pytest.raises(ValueError) as error:
            choose(torch.zeros(shape), k)
        assert str(error.value) == f"scores must be [B] with B >= k: got {shape}, k = {k}"


def test_the_lines_of_the_readme_work_in_a_foreign_loop():
    block = (HERE / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    torch.manual_seed(0)
    networks = dict(learner=torch.nn.Linear(6, 1), guide=torch.nn.Linear(6, 1))

    def draw(n):
        x0 = torch.randn(n, 6)
        return x0, x0[:, 0].exp(), x0.flip(1)                   # both say which example they belong to

    def loss(network, x0, sigma, noise):
        return (network(x0 + 0.1 * noise) - sigma[:, None]).square().mean(1)
    chosen = {}
    exec(block, networks | dict(torch=torch, jest=JEST.jest, k=200, draw=draw, loss=loss), chosen)
    x0 = chosen["x0"]
    scores = chosen["scores"]
    assert torch.equal(chosen["sigma"], x0[:, 0].exp()) and torch.equal(chosen["noise"], x0.flip(1))
    advantage = scores[chosen["index"]]
    assert len(scores) == 1000 and len(x0.unique(dim=0)) == 200
    assert advantage.mean() > scores.mean() + 0.3 * scores.std()


def test_gumbel_top_k_weights_make_any_mean_unbiased():
    generator = torch.Generator().manual_seed(1)
    logits, f = torch.randn(2, 40, generator=generator)
    f = f + 1 + logits                  # what is selected more often is larger: ignoring the weights shows
    draws = [select.gumbel_top_k(logits, 8, generator) for _ in range(5000)]
    means = [torch.stack([(w * f[i]).mean(), f[i].mean()]) for i, w in draws]
    weighted, plain = torch.stack(means, 1).double()
    assert (weighted.mean() - f.mean()).abs() < 4 * weighted.std() / len(draws) ** 0.5
    assert (plain.mean() - f.mean()).abs() > 40 * plain.std() / len(draws) ** 0.5
    assert (select.gumbel_top_k(logits, 40, generator)[1] == 1).all()


def test_scores():
    learner, reference = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 2.0]])
    assert select.example_scores(learner, reference).tolist() == [2, -1, 0]
    assert select.example_scores(learner, score="hard").tolist() == [3, 1, 2]
    assert select.example_scores(learner, reference, score="easy", invert=True).tolist() == [1, 2, 2]
    with pytest.raises(ValueError, match="root-loss"):
        select.example_scores(learner, score="beauty")


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_loss_that_is_not_finite_changes_no_other_score(bad):
    losses = torch.linspace(0, 1, 101)
    losses[30] = bad
    finite = losses.isfinite()
    rest = losses[finite]
    batches = mock.MagicMock()
    batches.__getitem__.return_value = data.Batch(*[torch.zeros(101)] * 5)
    jest = select.Jest(batches, lambda batch: losses, lambda batch: losses / 2, 20,
                       torch.Generator().manual_seed, gain=4.0, joint="independent")
    jest(0)
    _assert_close(jest.scores[finite], 4 * (rest - rest.mean()) / rest.std(), 1e-4)
    assert losses[jest.index].nan_to_num(0.5, 0.5, 0.5).mean() > 0.7
    _assert_close(jest.statistics()[3].item(), rest.mean().item() / 2, 1e-5)           # of --until-better
    root = select.example_scores(losses, score="root-loss", u=torch.full((101,), 3.0))
    _assert_close(root[finite], (rest + 0.1 * rest.mean()).log() / 2 - 3, 1e-5)


def test_root_loss_is_the_gradient_norm_at_the_output_of_the_network():
    """With EDM2's uncertainty it is sqrt(loss) / e^u, up to a constant."""
    c = _settings("--data", _folder() / "d.npz", "--channels 8 --blocks 1 --batch 40 --guide none "
                  "--selector jest --score root-loss --filter 0.5 --dropout 0.2")
    dataset = data.load(c.data)
    denoiser = _randomized(_denoiser(c))
    denoiser.u_out.weight.data *= 3
    outputs = []
    denoiser.net.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    batch = _batches(c, dataset, 40)[0]
    total, losses = train.make_objective(c, denoiser)(*batch, torch.ones(40))
    gradient, = torch.autograd.grad(total, outputs[0])
    jest = train.make_selectors(c, dataset, denoiser, model.PowerEMA(denoiser, c.ema), None, None)[1]
    u = jest.uncertainty(batch.sigma)
    ratio = gradient.flatten(1).norm(dim=1).log() - (losses.log() / 2 - u)
    assert u.std() > 0.2 and ratio.std() < 1e-3
    scored = jest.learner_loss(batch)                           # without dropout
    assert denoiser.training and torch.equal(scored, denoiser.eval().loss(*batch)[0])


@pytest.mark.parametrize("options", [
    dict(joint="sum", gain=1.0), dict(score="root-loss", debias=True), dict(score="easy", invert=True)])
def test_choosing_and_training_read_nothing_from_the_device(options):
    """On the meta device, whose tensors hold no values, whatever would wait for a device raises."""
    c = _settings(SMALL, "--guided-targets 2 --dropout 0.1 --data", _folder() / "d.npz")
    denoiser = _denoiser(c).to("meta")
    batches = mock.MagicMock()
    batches.__getitem__.return_value = data.Batch(
        *(part.to("meta") for part in _batches(c, data.load(c.data), 20)[0]))
    loss = torch.no_grad()(lambda batch: denoiser.loss(*batch)[0])
    jest = select.Jest(batches, loss, loss, 4, lambda step: None, uncertainty=denoiser.u, **options)
    chosen, weight = jest(0)
    total, losses = train.make_objective(c, denoiser, _denoiser(c).to("meta"))(*chosen, weight)
    total.backward()
    model.make_finite([w.grad for w in denoiser.parameters() if w.grad is not None])
    model.project(model.projected_weights(denoiser))
    model.PowerEMA(denoiser, c.ema).update(1)
    dro = data.GroupDRO(6).to("meta")
    dro.update(dro.totals(losses, chosen.labels))
    assert DRO.class_weights_of_mean_one(dro.alpha, dro.alpha)[chosen.labels].shape == (4,)
    with pytest.raises(RuntimeError):
        losses[0].item()


def _jest(c, guide=None):
    """(the learner of a run on the tree, its Jest, its EMA)."""
    learner = _denoiser(c)
    torch.nn.init.normal_(learner.net.out.weight)
    ema = model.PowerEMA(learner, c.ema)
    return learner, train.make_selectors(c, TREE, learner, ema, None, guide)[1], ema


def test_scores_are_the_losses_on_exactly_what_is_chosen():
    """The gain is such that the noise of the draw is nothing beside the scores: the best are chosen."""
    c = _settings("--selector ajest --batch 64 --micro-batch 64 --gain 1e9 --joint independent")
    weak = _denoiser(c)
    learner, jest, _ = _jest(c, weak)
    batch = _batches(c, n=320)[3]
    expected = []
    for denoiser, loss in (learner, jest.learner_loss), (weak, jest.reference_loss):
        D_x = denoiser(batch.x0 + batch.sigma[:, None] * batch.noise, batch.sigma)
        weight = (batch.sigma ** 2 + 0.25) / (0.5 * batch.sigma) ** 2
        expected.append((weight * ((D_x - batch.target) ** 2).mean(1)).detach())
        torch.testing.assert_close(loss(batch), expected[-1], rtol=1e-4, atol=1e-5)
    chosen, weights = jest(3)
    assert set(jest.index.tolist()) == set((expected[0] - expected[1]).topk(64).indices.tolist())
    for part, every in zip(chosen, batch):
        assert part is None or torch.equal(part, every[jest.index])
    assert torch.equal(weights, torch.ones(64)) and not torch.equal(batch.target, batch.x0)
    assert jest.make_generator(3).initial_seed() != jest.make_generator(4).initial_seed()


def test_the_reference_of_jest_is_the_current_ema_of_the_learner():
    c = _settings("--selector jest --batch 64")
    learner, jest, ema = _jest(c)
    batch = _batches(c)[0]
    learner.net.out.weight.data *= 2
    ema.update(1)                                               # after one step the EMA is the learner
    before = jest.learner_loss(batch)
    learner.net.out.weight.data *= 2
    assert torch.equal(before, jest.reference_loss(batch))
    assert not torch.allclose(before, jest.learner_loss(batch))
    for flags, computed in ("", False), ("--until-better", True):       # else no score needs the reference
        hard = _jest(_settings("--selector ajest --score hard --batch 64", flags), learner)[1]
        assert (hard.reference_loss is not None) == computed


def test_records_of_selecting_steps_hold_the_scores(monkeypatch):
    """With the score "hard" the scores are the losses, and those of the chosen are what was trained on."""
    flags = f"{TINY} --guide none --selector jest --score hard"
    shown = []
    monkeypatch.setattr(data, "progress", lambda text, last: shown.append(text))
    monkeypatch.setattr(train, "average", lambda tensors: [2 * tensor for tensor in tensors])   # as if of two
    run = _train(flags, "--early-steps 1 --steps 2 --log-every 1")
    first, second = _records(run)
    c = _settings(flags)
    losses, _ = train.Learner(c).denoiser.loss(*_batches(c, n=320)[0])
    assert first["score_mean"] == pytest.approx(2 * losses.mean().item(), rel=1e-4)
    assert first["score_std"] == pytest.approx(2 * losses.std().item(), rel=1e-4)
    assert first["score_mean"] < first["score_chosen"] == pytest.approx(first["loss"], rel=1e-5)
    assert not any("score" in name for name in [*second, *_load(run)["progress"]])
    assert f"chosen {first['score_chosen'] - first['score_mean']:+.3g}" in shown[0]


def test_until_better_looks_at_log_lines_only(tmp_path, monkeypatch, capsys):
    """At step 6 nothing is finite, so the state stays; the last step of a shorter run does not look."""
    means = {3: 0.9, 6: math.nan, 8: 0.5, 12: 1.2, 18: 0.9}     # the learner's by step; the reference's is 1
    call = select.Jest.__call__

    def seen(self, step):
        chosen = call(self, step)
        self.excess = torch.full((9,), means.get(step + 1, 2.0) - 1)
        return chosen
    monkeypatch.setattr(select.Jest, "__call__", seen)
    flags = f"{TINY} --guide none --selector jest --until-better"
    run = _train(flags)
    drawn = [record["examples_drawn"] for record in _records(run)]
    assert drawn == [6 * 320, 12 * 320, 18 * 320, 18 * 320 + 6 * 64]
    stopped = _train(flags, "--steps 8", out=tmp_path / "run")
    _refused(capsys, train, f"{flags} --log-every 7 --out {stopped}", "--log-every")
    _assert_close(_load(_train(flags, out=stopped))["model"], _load(run)["model"])


# ------------------------------------------------------------------------------------------------------------
# model.py

def _config(kind="image", **changes):
    shape = [2] if kind == "tree" else [3, 16, 16]
    classes = 0 if kind == "tree" else 3
    return dict(kind=kind, shape=shape, channels=8, blocks=1, classes=classes, dropout=0.0) | changes


def _randomized(denoiser):
    """Parameters that begin as zero (the gains) become 0.5, so that every path of the network matters."""
    for parameter in denoiser.parameters():
        if not parameter.any():
            parameter.data += 0.5
    return denoiser


@pytest.mark.parametrize("resolution, classes, channels, parameters, gflop", [
    (64, 1000, 128, 124.7, 89.9), (32, 10, 64, 29.7, 6.0)])
def test_unet_has_the_published_size(resolution, classes, channels, parameters, gflop):
    counter = torch.utils.flop_counter.FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), counter:
        net = model.UNet(resolution, 3, channels, classes)
        net(torch.empty(1, 3, resolution, resolution), torch.empty(1), torch.zeros(1, dtype=torch.long))
    count = sum(parameter.numel() for parameter in net.parameters())
    assert round(count / 1e6, 1) == parameters
    assert round(counter.get_total_flops() / 1e9, 1) == gflop


def test_unet_is_the_one_that_agreed_with_the_official_network():
    """These are values of the commit whose outputs were within 9e-7 of NVlabs' with copied weights."""
    torch.manual_seed(0)
    denoiser = _randomized(model.build(_config(channels=64)))
    x = torch.randn(3, 3, 16, 16)
    D_x = denoiser(x, torch.tensor([0.1, 1.0, 10.0]), torch.arange(3))
    gradients = torch.autograd.grad(D_x.square().mean(), list(denoiser.net.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert D_x.std((1, 2, 3)).tolist() == pytest.approx([0.97829, 0.26225, 0.20168], rel=1e-4)
    assert D_x[:, 0, 0, 0].tolist() == pytest.approx([0.97143, 0.62742, 0.12787], rel=1e-3)
    assert norm.item() == pytest.approx(0.116665, rel=1e-3)
    assert [model.attention_heads(width) for width in (24, 128, 192, 200)] == [1, 2, 3, 2]


def test_a_block_clamps_its_output_and_passes_gradients_of_what_it_clamps():
    torch.manual_seed(0)
    block = model.Block(8, 8, 4, decoder=True)
    x = (1000 * torch.randn(2, 8, 4, 4)).requires_grad_()
    y = block(x, torch.randn(2, 4))
    assert y.abs().max() == 256
    gradient = torch.autograd.grad(y.sum(), x)[0]
    assert (gradient[y.abs() == 256] - 0.7 / math.hypot(0.7, 0.3)).abs().mean() < 0.3   # of the main path


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
    rows = torch.cat([w.square().flatten(1).mean(1).detach() for w in weights])
    _assert_close(rows, torch.ones_like(rows), 1e-5)
    _assert_close(denoiser(x, 1.0, labels), before, 1e-5)
    assert (before[0] - before[1]).abs().max() > 1e-3 > (before[2] - before[3]).abs().max()
    with pytest.raises(ValueError, match="3 classes: give it labels"):
        denoiser(x, 1.0)


def test_preconditioning_and_loss_in_closed_form():
    denoiser = model.build(_config("tree"))                     # F = 0: D = c_skip x
    torch.nn.init.zeros_(denoiser.net.out.bias)
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 100_000, 2) * torch.tensor([0.5, 1]).view(2, 1, 1)
    for s in (0.05, 0.5, 5.0):
        weight = (s * s + 0.25) / (s * 0.5) ** 2
        level = torch.full((100_000,), s)
        loss, D_x = denoiser.loss(x0, noise, level)
        _assert_close(D_x, 0.25 / (s * s + 0.25) * (x0 + s * noise), 1e-6)
        assert abs(loss.mean() - 1) < 0.015                     # on data of variance sigma_data^2
        other, _ = denoiser.loss(x0, noise, level, None, x0 + 1)
        assert torch.allclose(other, weight * ((D_x - x0 - 1) ** 2).mean(1), rtol=1e-5)
        numbers = torch.stack(model.preconditioning(torch.tensor(s))[1:])       # c_out, c_in, c_noise
        _assert_close(numbers, torch.tensor([weight ** -0.5, (s * s + 0.25) ** -0.5, math.log(s) / 4]), 1e-5)


def test_power_function_ema_in_closed_form():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    history = torch.randn(200, 2, 3)
    ema = AVERAGE.PowerEMA(layer, (0.05, 0.10))
    for t, value in enumerate(history, 1):
        layer.weight.data.copy_(value)
        ema.update(t)
    t = torch.arange(0, 201, dtype=torch.float64)
    for std in (0.05, 0.10):
        gamma = AVERAGE.ema_gamma(std)
        assert math.isclose((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5), std, rel_tol=1e-9)
        weights = (t[1:] / 200) ** (gamma + 1) - (t[:-1] / 200) ** (gamma + 1)  # none for the initialization
        _assert_close(ema.averages[std][0].double(), (weights[:, None, None] * history).sum(0), 1e-5)


WAYS = [("cpu", "image", True, False), ("cpu", "tree", False, True)]
if "cuda" in DEVICES:
    WAYS += [("cuda", "image", bf16, compiled) for bf16 in (False, True) for compiled in (False, True)]


def _loss_and_gradients(kind, device, bf16, compiled):
    """The losses of a small denoiser and the gradients of their mean, both on the CPU."""
    torch.manual_seed(0)
    denoiser = _randomized(model.build(_config(kind))).to(device)
    x0, noise = torch.randn(2, 4, *denoiser.shape)
    rows = [values.to(device) for values in (x0, noise, torch.rand(4) + 0.1, torch.tensor([0, 1, 2, 0]))]
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


def test_a_checkpoint_gives_the_average_that_is_asked_for(tmp_path):
    content = _load(_folder() / "reference")
    for ema, weights in (None, content["ema"]["0.05"]), (0.1, content["ema"]["0.1"]), (0, content["model"]):
        network = model.load_denoiser(_folder() / "reference", ema)
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, weights[name]) and not network.training
    with pytest.raises(ValueError, match="no EMA of length 0.2 .*only 0.05, 0.1"):
        model.load_denoiser(_folder() / "reference", 0.2)


def test_a_checkpoint_that_is_damaged_or_not_finite_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    content = _load(_folder() / "reference")
    content["ema"]["0.05"]["net.first.weight"].fill_(math.nan)
    torch.save(content, path)
    assert model.load_denoiser(path, 0)                         # the raw weights are finite
    with pytest.raises(ValueError, match="not finite"):
        model.load_denoiser(path)
    weight = content["model"]["net.emb_noise.weight"].numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(weight, bytes(len(weight))))
    with pytest.raises(ValueError, match="data/.* is damaged"):         # its checksum
        model.load_denoiser(path, 0)


@pytest.mark.parametrize("name, value", [
    ("kind", "latent"), ("shape", [3, 24, 24]), ("classes", 7), ("class_names", ["a", "b", "d"]),
    ("mean", [127.5, 127.5, 0.0]), ("std", [1.0, 1.0, 1.0])])
def test_a_denoiser_for_other_data_is_refused(name, value):
    settings = _load(_folder() / "reference")[SETTINGS]
    assert model.load_denoiser(_folder() / "reference", like=settings | dict(channels=64, dropout=0.3))
    with pytest.raises(ValueError, match=f"its {name} .* not "):
        model.load_denoiser(_folder() / "reference", like=settings | {name: value})


# ------------------------------------------------------------------------------------------------------------
# guide.py

def _gaussian_denoiser(std):
    """The exact denoiser of N(0, std^2 I); sigma is a number or [N]. It lists the levels of its calls."""
    def denoise(x, sigma, labels=None):
        denoise.levels.append(sigma)
        variance = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1) ** 2
        return x * (std ** 2 / (std ** 2 + variance))
    denoise.levels = []
    return denoise


def test_heun_converges_at_second_order():
    noise = torch.randn(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = noise * 5 * 0.5 / math.sqrt(25 + 0.25)              # x(sigma) ~ sqrt(std^2 + sigma^2)
    errors = []
    for steps in (32, 64, 128):
        denoiser = _gaussian_denoiser(0.5)
        x = GUIDANCE.heun(denoiser, noise, steps=steps, sigma_min=0.002, sigma_max=5.0)
        errors.append((x - exact).norm() / exact.norm())
        assert len(denoiser.levels) == 2 * steps - 1 and {type(level) for level in denoiser.levels} == {float}
    assert 3.3 < errors[0] / errors[1] < 4.7 and 3.3 < errors[1] / errors[2] < 4.7, errors
    assert errors[2] < 4e-4
    _assert_close(GUIDANCE.heun(denoiser, noise, steps=1, sigma_max=5.0), denoiser(5.0 * noise, 5.0), 1e-9)


def test_autoguidance_weights_and_interval():
    main = _gaussian_denoiser(0.5)
    weak = _gaussian_denoiser(1.0)
    x = torch.randn(5, 2)
    D_main = x * 0.25 / 0.34
    D_weak = x / 1.09
    for w, expected in (1, D_main), (0, D_weak), (2.5, D_weak + 2.5 * (D_main - D_weak)):
        guided = GUIDANCE.autoguided(main, weak, w, (0.1, 1.0))
        _assert_close(guided(x, 0.3), expected, 1e-6)
    _assert_close(torch.stack(main.levels + weak.levels), torch.full((5, 5), 0.3))
    for sigma in (0.09, 2.0):                                   # outside of the interval the guide is not run
        assert torch.equal(guided(x, sigma), main(x, sigma))
    assert len(weak.levels) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_depends_on_its_seed_alone(device):
    denoiser = GUIDANCE.autoguided(_randomized(model.build(_config(shape=[3, 8, 8]))).eval().to(device))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])

    def draw(batch, seeds=range(7), labels=labels):
        batches = GUIDANCE.generate(denoiser, seeds, labels, batch, device, steps=3, sigma_max=5.0)
        return torch.cat(list(batches)).cpu()

    backwards = draw(2, range(7)[::-1], labels.flip(0)).flip(0)
    for other in draw(1), draw(20), backwards:
        _assert_close(other, draw(7), 0 if device == "cpu" else 1e-3)


# ------------------------------------------------------------------------------------------------------------
# train.py: gradients, targets, updates, the clock

@pytest.mark.parametrize("W", [1, 1.6])
def test_gradients_by_hand_for_every_target(W):
    """EDM2's loss / e^u + u, but the network learns from the target, u from x0, each with the other fixed."""
    c = _settings("--data", _folder() / "d.npz", "--channels 8 --blocks 1 --batch 8 --guided-targets", W)
    denoiser = _randomized(_denoiser(c))
    weak = _randomized(model.build(vars(c) | dict(channels=4)))
    batch = _batches(c, data.load(c.data), 8)[0]
    weight = torch.linspace(0.5, 1.5, 8)
    total, losses = train.make_objective(c, denoiser, weak if W != 1 else None)(*batch, weight)
    gradients = torch.autograd.grad(total, list(denoiser.parameters()))
    x = batch.x0 + batch.sigma.view(-1, 1, 1, 1) * batch.noise
    u = denoiser.u(batch.sigma)
    D = denoiser(x, batch.sigma, batch.labels)
    target = batch.x0
    if W != 1:
        target = target + (1 - 1 / W) * (D - weak(x, batch.sigma, batch.labels)).detach()
    plain = model.per_example_loss(D.detach(), batch.x0, batch.sigma)
    by_hand = model.per_example_loss(D, target, batch.sigma) / u.detach().exp() + plain / u.exp() + u
    by_hand = torch.autograd.grad((weight * by_hand).mean(), list(denoiser.parameters()))
    torch.testing.assert_close(gradients, by_hand, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(losses, plain, atol=0, rtol=1e-5)
    assert all(g.any() for g in gradients)


@pytest.mark.parametrize("flags, dimensions", [("--data d.npz --channels 8 --blocks 1", 3 * 8 * 8), ("", 1)])
def test_an_update_is_adam_s_for_a_loss_summed_over_dimensions(flags, dimensions):
    """EDM2 sums where this loss averages: D times larger gradients against the same eps. A gradient that is
    not finite is 0, the rate rises and falls, and after each step the rows have rms 1."""
    c = _settings("--lr 0.1 --lr-decay 2 --warmup 1", flags.replace("d.npz", f"{_folder()}/d.npz"))
    learner = train.Learner(c)
    copies = [parameter.detach().clone().requires_grad_() for parameter in learner.parameters]
    assert all(abs(w.square().mean() - 1) < 1e-5 for w in model.projected_weights(learner.denoiser))
    adam = torch.optim.Adam(copies, betas=(0.9, 0.99), eps=1e-8)
    generator = torch.Generator().manual_seed(0)
    for step, rate in enumerate([0.05, 0.1, 0.1, 0.1 / 1.5 ** 0.5]):
        for parameter, other in zip(learner.parameters, copies):
            parameter.grad = torch.empty_like(parameter).normal_(0, 1e-9, generator=generator)
            other.grad = dimensions * parameter.grad
            parameter.grad[(0,) * parameter.ndim] = [math.inf, -math.inf, math.nan, 0][step]
            other.grad[(0,) * parameter.ndim] = 0
        learner.update(step)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        for weight in [weight for weight in copies if flags and weight.ndim > 1]:       # of the UNet alone
            weight.data /= model.per_example(weight.data.square().flatten(1).mean(1).sqrt(), weight)
        assert step > 0 or all(map(torch.equal, learner.ema.averages[c.ema[0]], learner.parameters))
    for parameter, other in zip(learner.parameters, copies):
        _assert_close(parameter.detach(), other.detach(), 1e-5)


def test_a_run_ends_where_no_loss_since_the_last_line_is_finite(capsys, tmp_path, monkeypatch):
    """Bad steps but for one before a line, after the first line, and from the first step on."""
    noised = data.Batches._noised
    for bad, step_kept in (range(12, 17), 24), (range(6, 24), 6), (range(24), None):
        def spoiled(self, x0, labels, step):
            return noised(self, x0 * (math.nan if step in bad else 1), labels, step)
        monkeypatch.setattr(data.Batches, "_noised", spoiled)
        saved = tmp_path / f"{step_kept}/checkpoint.pt"
        status, _, err = _call(capsys, train, f"{TINY} --guide none --save-every 0 --out {saved.parent}")
        assert (status, "--lr with another --out" in err) == ((0, False) if step_kept == 24 else (2, True))
        assert saved.exists() == (step_kept is not None)
        assert step_kept == 24 or f"no finite loss from step {step_kept or 0} to " in err
        assert step_kept is None or _load(saved.parent)["progress"]["step"] == step_kept


# ------------------------------------------------------------------------------------------------------------
# Whole runs give the digits of commit f256ab9, whose parts were held against the papers' official code.

DIGITS = [          # flags; loss, lr, ln_sigma and examples drawn of the last line; what each evaluation gave
    (f"{TINY} --selector ajest --guide-batch 64 --invert --chunks 3 --gain 2 --sampling-steps 4 "
     "--sigma-max 3 --eval-samples 64", [0.260314, 0.01, -2.43204, 7680, 0.43444, 0.204289, 0.420151]),
    (f"{TINY} --selector jest --targets sample --gain 2 --ema 0.2 0.05 --early-steps 20 --after full",
     [1.12986, 0.01, -2.47391, 7680]),
    (f"{TINY} --selector jest --score hard --gain 1 --debias --early-steps 20 --sampling-steps 4 "
     "--eval-samples 64", [0.30654, 0.01, -2.29952, 6656, 0.488283, 0.198434, 0.617317]),
    (f"{SMALL} --data d.npz --dropout 0.2 --holdout 9 --imbalance 3 --keep 0.5 --prune random --guidance 1.5 "
     "--lr 0.05 --warmup 0 --eval-samples 12", [0.797572, 0.05, -0.625314, 24, 209.978, 0.9496, 214.69]),
    (f"{SMALL} --data d.npz --selector ajest --gain 4 --debias --lr 0.05 --warmup 9 --micro-batch 2",
     [0.734091, 0.03, -2.33164, 120])]


@pytest.mark.parametrize("flags, digits", DIGITS)
def test_digits_of_whole_runs(monkeypatch, flags, digits):
    monkeypatch.chdir(_folder())
    run = _train(flags, "--seed 3")
    last = _records(run)[-1]
    got = [last["loss"], last["lr"], last["ln_sigma"], last["examples_drawn"]]
    for record in _records(run, "eval"):
        names = {"l2", "score_error", "FD(pixels)", "validation_loss"}
        got += [record[name] for name in record["metrics"] if name in names]
    assert got == pytest.approx(digits, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------
# train.py: runs that stop and resume

@pytest.mark.parametrize("flags", [
    "--selector uniform", "--selector ajest --early-steps 17", "--selector jest --debias --targets sample",
    "--selector ajest --until-better --after full", "--guided-targets 1.6 --guide-steps 12",
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
        _same_run(whole, interrupted)
    else:
        _assert_close(_load(whole)["ema"], _load(interrupted)["ema"], 1e-5)


def test_the_same_command_resumes_and_another_is_refused(tmp_path, capsys, monkeypatch):
    images, run = shutil.copy(_folder() / "d.npz", tmp_path / "d.npz"), tmp_path / "run"
    flags = f"{FEW} --channels 8 --blocks 1 --batch 4 --log-every 4 --lr 0.02 --data {images} --out {run}"
    longer = _train(flags, "--steps 32 --guide-steps 2")
    _train(flags, "--steps 16", out=run)
    before = {path: path.read_bytes() for path in run.iterdir()}
    _train(flags, "--steps 16", out=run)                        # a finished run: its files stay as they are
    for flag in "--lr 0.01", "--seed 3", "--guided-targets 1.5", "--no-flip":   # 0.01: the default, but typed
        _refused(capsys, train, f"{flags} --steps 16 {flag}", flag.split()[0].replace("--no-", "--"), run)
    _refused(capsys, train, f"{flags} --steps 15", "--steps 15", run)
    with train.locked(run):
        _refused(capsys, train, f"{flags} --steps 32", run, "another process")
    _images(images, n=59)
    _refused(capsys, train, f"{flags} --steps 32", run, "other data")
    assert before == {path: path.read_bytes() for path in before}
    shutil.copy(_folder() / "d.npz", images)
    (run / "log.jsonl.99.tmp").write_bytes(b"of a process that was killed")
    monkeypatch.setattr(train, "CPU", train.CPU | dict(warmup=9, lr_decay=5))
    _train(flags, "--steps 32", out=run)                        # what is not typed is as the run began
    assert "taken from there: --lr-decay 400 --warmup 50 --guide-steps 2\n" in capsys.readouterr().err
    _same_run(longer, run)
    assert not (run / "log.jsonl.99.tmp").exists()


def test_a_run_resumes_from_another_working_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    _classifier("own.pt")
    shutil.copytree(_folder() / "reference", "guide")
    flags = f"{SMALL} --data {_folder()}/d.npz --keep 0.5 --prune-features own:~/own.pt --guide guide"
    _train(flags, "--metrics own:own.pt --eval-samples 8 --guidance 1.5 --steps 2", out="~/run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    _train(f"--device cpu --data {_folder()}/d.npz --steps 4", out=tmp_path / "run")
    records = _records(tmp_path / "run", "eval")
    assert [r["guidance"] for r in records] == [1, 1.5, 1, 1.5] and "FD(own)" in records[-1]["metrics"]
    (tmp_path / "guide").rename(tmp_path / "gone")              # without guidance none is needed
    _train(f"--device cpu --data {_folder()}/d.npz --steps 5 --guidance 1", out=tmp_path / "run")


@pytest.mark.parametrize("flags, lost", [
    ("--guidance 2", "guide.pt"), ("--guide train --guide-batch 64 --guidance 2", "guide/checkpoint.pt")])
def test_a_guide_that_is_missing_is_said_before_the_first_step(tmp_path, capsys, flags, lost):
    flags = f"{TINY} --eval-samples 8 {flags}"
    run = _train(flags, out=tmp_path / "run")
    os.remove(run / lost)
    _refused(capsys, train, f"{flags} --steps 40 --out {run}", run / lost)
    assert _load(run)["progress"]["step"] == 24
    _train(flags, "--steps 40 --guidance 1", out=run)           # which needs no guide


def test_the_guide_of_a_run_may_move_but_not_change(tmp_path, capsys):
    guide_run = shutil.copytree(_folder() / "reference", tmp_path / "guide")
    flags = f"{SMALL} --selector ajest --data {_folder()}/d.npz --out {tmp_path}/run"
    _train(flags, "--guide", guide_run, out=tmp_path / "run")
    guide_run.rename(tmp_path / "moved")
    _refused(capsys, train, f"{flags} --steps 8", guide_run, "No such file")
    _train(flags, "--guide", tmp_path / "moved", out=tmp_path / "run")         # sample.py must find it there
    assert _load(tmp_path / "run")[SETTINGS]["guide_path"] == "../moved/checkpoint.pt"
    _train(flags, "--steps 8 --guide", tmp_path / "moved", out=tmp_path / "run")
    torch.save(_load(tmp_path / "moved") | dict(log=[]), tmp_path / "moved/checkpoint.pt")
    _refused(capsys, train, f"{flags} --steps 9 --guide {tmp_path}/moved", "--guide", tmp_path / "moved")
    assert _load(tmp_path / "run")["progress"]["step"] == 8


def test_an_early_stop_holds_nothing_and_a_trained_guide_its_settings(tmp_path, capsys, monkeypatch):
    flags = f"{TINY} --selector ajest --guide-batch 64 --out {tmp_path}/run"
    for lr, step in ("0.02", 3), ("0.01", 10):                  # the guide has 8 steps
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            _interrupt(patch, step)
            _train(flags, "--lr", lr, out=tmp_path / "run")
    _refused(capsys, train, f"{flags} --lr 0.02", tmp_path / "run/guide", "--lr")


def test_a_signal_stops_a_run_after_its_step_and_the_same_command_resumes(tmp_path, capsys, monkeypatch):
    """SIGINT in the guide, SIGTERM in the model; the third start ends in the bits of a run without stops."""
    flags = f"{TINY} --selector ajest --guide-steps 12 --guide-batch 64"
    run = tmp_path / "run"
    update = train.Learner.update
    for number, stage in (signal.SIGINT, "guide"), (signal.SIGTERM, "."):
        def stopped(self, step):
            update(self, step)
            if step == 7:
                os.kill(os.getpid(), number)
        with monkeypatch.context() as patch:
            patch.setattr(data, "signals", data.Signals())
            patch.setattr(train.Learner, "update", stopped)
            status, _, err = _call(capsys, train, flags, "--out", run)
        assert status == 128 + number and "stopping after this step; again = now" in err
        assert err.endswith("stopped at step 8, saved: the same command resumes\n")
        content = _load(run / stage)
        assert content["progress"]["step"] == 8
        assert content["progress"]["seconds"] > content["log"][-1]["seconds"]
    _train(flags, out=run)
    said = capsys.readouterr().err
    assert "run: resumed at step 8" in said and "guide: trained before" in said
    whole = _train(flags)
    for stage, part in itertools.product((".", "guide"), ("model", "ema")):
        _assert_close(_load(whole / stage)[part], _load(run / stage)[part])


def test_a_stop_in_an_evaluation_leaves_the_last_step(tmp_path, monkeypatch, capsys):
    flags, run = f"{TINY} --eval-samples 8 --eval-every 20", tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(fid.Evaluation, "sample", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        status, _, err = _call(capsys, train, flags, "--out", run)
    assert status == 130 and "stopped" in err and _load(run)["progress"]["step"] == 20
    _train(flags, out=run)
    _same_run(_train(flags), run)                               # the loss at step 24, too


@functools.cache
def _tree_run():
    return _train(TINY, "--guide none --ema 0.05 --eval-samples 8")


@pytest.mark.parametrize("change", [
    lambda content: content[SETTINGS].update(format=1), lambda content: content[SETTINGS].pop("format"),
    lambda content: content.pop(SETTINGS)])
def test_a_run_of_another_version_is_one_line_for_every_program(tmp_path, capsys, change):
    run = shutil.copytree(_tree_run(), tmp_path / "run")
    content = _load(run)
    change(content)
    torch.save(content, run / "checkpoint.pt")
    (run / "config.json").write_text(json.dumps(content.get(SETTINGS, {})))
    for program, flags in [
            (train, f"{TINY} --guide none --ema 0.05 --out {run}"), (sample, f"{run} --out {tmp_path}/x.npz"),
            (train, f"{TINY} --guidance 2 --guide {run} --out {tmp_path}/new"),
            (fid, f"--compare {run} --out {tmp_path}/c.png")]:
        _refused(capsys, program, flags, "run")
    assert not list(tmp_path.glob("*.*")) and not list(tmp_path.glob("new/*.pt"))


def test_samples_that_are_not_finite_are_said_and_neither_written_nor_scored(tmp_path, capsys):
    flags = f"{SMALL} --data {_folder()}/d.npz --guidance 1 --eval-samples 6 --out {tmp_path}/run"
    run = _train(flags, out=tmp_path / "run")
    content = _load(run)
    for weights in content["model"], *content["ema"].values():
        weights["net.out_gain"].fill_(3e38)                     # finite, but its outputs are not
    torch.save(content | dict(log=[]), run / "checkpoint.pt")
    _refused(capsys, sample, f"{run} --n 4 --out {tmp_path}/s.npz", "finite")
    status, _, err = _call(capsys, train, flags)
    record, = _records(run, "eval")
    assert status == 0 and "finite" in err and record["metrics"] == [] and record["step"] == 6
    assert os.listdir(tmp_path) == ["run"]


def test_time_left_is_of_the_last_interval(tmp_path, monkeypatch):
    flags = f"{TINY} --guide none --log-every 20 --selector jest --early-steps 50"
    run = _train(flags, out=tmp_path / "run")
    content = _load(run)
    for record in content["progress"], content["log"][-1]:
        record["seconds"] = 1e6                                 # on a slow machine
    content[SETTINGS]["device"] = "cuda:9"                      # of another machine
    torch.save(content, run / "checkpoint.pt")
    shown = []
    monkeypatch.setattr(data, "progress", lambda text, last: shown.append(text))
    _train(flags.replace("--device cpu", ""), "--steps 60", out=run)
    assert " 0:" in shown[0] and shown[0].endswith("left of the selection")
    assert _records(run)[-1]["seconds"] == pytest.approx(1e6, abs=60)


@pytest.mark.parametrize("env, words", [
    (dict(RANK="0"), "RANK"), (dict(WORLD_SIZE="2"), "WORLD_SIZE"), (dict(WORLD_SIZE="two"), "WORLD_SIZE"),
    (dict(WORLD_SIZE="2", RANK="2", MASTER_ADDR="localhost", MASTER_PORT="1"), "RANK"),
    (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="localhost"), "MASTER_PORT"),
    (dict(RANK="", WORLD_SIZE="", MASTER_ADDR="localhost"), "")])
def test_variables_of_torchrun_are_whole_or_one_line(tmp_path, monkeypatch, capsys, env, words):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    status, _, err = _call(capsys, train, f"{TINY} --guide none --steps 1 --out {tmp_path}/run")
    assert (status, words in err) == (2 if words else 0, True)
    assert (tmp_path / "run/checkpoint.pt").exists() == (not words)


def test_each_process_takes_the_gpu_of_its_local_rank_and_draws_for_itself(monkeypatch):
    for name, value in ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"):
        monkeypatch.setenv(name, value)
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for flags in [], ["--device", "cuda"]:                      # typed or not
        assert train.build_parser().parse_args(flags).device == "cuda:1" and taken[-1] == 1
    seeds = set()
    for rank in 0, 1, 2:
        monkeypatch.setattr(train, "RANK", rank)
        seeds.add(train.process_stream(argparse.Namespace(seed=0), 3, "select").initial_seed())
    assert len(seeds) == 3


@pytest.mark.parametrize("W", [1, 1.6])
def test_the_snapshot_is_the_ema_of_its_step(W):
    whole = _train(TINY, "--guide-steps 9 --guided-targets", W)
    snapshot = _load(whole, "guide.pt")
    stopped = _load(_train(TINY, "--guide none --steps 9"))
    _assert_close([snapshot["ema"], snapshot["model"]], [stopped["ema"], stopped["model"]])
    trained = _load(whole)["model"]["net.out.weight"]
    unguided = _load(_train(TINY, "--guide none"))["model"]["net.out.weight"]
    assert torch.equal(trained, unguided) == (W == 1)           # a snapshot alone changes nothing


def test_defaults_follow_the_run_and_the_machine():
    c = _settings(f"--data {_folder()}/large.npz --selector ajest --steps 40 --batch 16")
    assert (c.guide, c.guide_channels, c.guide_batch, c.guide_steps) == ("train", 12, 16, 5)
    assert (c.channels, c.blocks, c.flip, c.bf16, c.P_std) == (24, 1, True, False, 1.2)
    c = _settings("--selector ajest")
    assert (c.guide_channels, c.guide_batch, c.guide_steps, c.guidance) == (32, 4096, 1024, 3.0)
    c = _settings("--guided-targets 1.6 --steps 900 --P-mean 0.5 --P-std 3")
    assert (c.guide, c.guide_steps, c.guidance, c.targets, c.P_std) == ("snapshot", 113, 1.0, "exact", 3)
    assert c.eval_levels == dict(P_mean=-2.3, P_std=1.5)        # those of evaluations never change


FLAGS_OF_JEST = ["--early-steps 5", "--until-better", "--filter 0.5", "--score hard", "--joint sum",
                 "--gain 1", "--chunks 2", "--invert", "--debias", "--after full"]
REFUSED = [         # program, flags before, flags; the error names the last of these or what stands behind ->
    (train, f"{TINY} --out new", [
        *FLAGS_OF_JEST, "--selector ajest --guide snapshot", "--guide none --guided-targets 2", "--keep 0.5",
        "--flip", "--micro-batch 7", "--selector jest --debias --chunks 4", "--filter 1", "--prune knn",
        "--selector jest --filter 0.7 --micro-batch 64", "--selector ajest --reference other",
        "--device abacus", "--no-such-flag", "--guide none --guidance 2", "--steps 9 --guide-steps 10",
        "--selector jest --after full", "--eval-samples 1"]),
    (train, f"{SMALL} --eval-samples 3 --out new --data d.npz", [
        "--holdout 60", "--size 12 -> multiple of 8", "--targets exact", "--eta 1", "--metrics beauty",
        "--eval-samples 2", "--guide large.npz -> large.npz", "--guide other -> other", "--data no -> no",
        "--selector ajest --class-weights plain.npz -> plain.npz", "--data plain.npz --class-weights inverse",
        "--selector ajest --metrics own:absent.pt -> absent.pt", "--data wide.npz -> squares",
        "--data named.npz --selector jest --reference reference -> reference", "--data latents.npz -> 28",
        "--data latents.npz --metrics inception", "--data latents.npz --size 8 -> size"]),
    (sample, "other --out x.png", ["--class dragon", "--ema 0.2", "--out x.gif -> x.gif", "--guidance 2"]),
    (sample, "TREE --out x.png", [
        "--class dragon", "--out x", "--guidance 3 --guide other -> other", "--guidance 1 --guide TREE",
        "--guidance 3 --guide absent.pt -> absent.pt", "--guidance 3 --guide TREE --interval 2 1"]),
    (fid, "d.npz", [
        " -> REAL and FAKE", "d.npz --features vgg", "absent -> absent", "--compare -> d.npz",
        "large.npz --features pixels -> --size", "d.npz --inception-weights d.npz -> d.npz: not the FID",
        "--fit x.pt --compare", "large.npz --fit x.pt -> REAL and FAKE"])]


@pytest.mark.parametrize("program, first, flags", [
    (program, first, flags) for program, first, rows in REFUSED for flags in rows])
def test_what_cannot_be_done_is_one_line_before_any_work(monkeypatch, capsys, program, first, flags):
    monkeypatch.chdir(_folder())
    before = sorted(os.listdir())
    flags, _, word = flags.partition(" -> ")
    word = word or [flag for flag in flags.split() if flag.startswith("--")][-1]
    _refused(capsys, program, f"{first} {flags}".replace("TREE", str(_tree_run())), word)
    assert not list(Path("new").rglob("*.pt"))                  # nothing was trained
    shutil.rmtree("new", ignore_errors=True)
    assert sorted(os.listdir()) == before                       # and nothing else written


# ------------------------------------------------------------------------------------------------------------
# train.py: the stages of a run, what each of them sees, and what it costs

@pytest.mark.parametrize("flags, stages", [
    ("--class-weights dro", ["guide", "proxy", "run"]), ("--selector ajest", ["guide", "run"]),
    ("--class-weights inverse", ["run"])])
def test_every_stage_sees_the_pool_only(monkeypatch, tmp_path, flags, stages):
    calls = []
    images = _folder() / "d.npz"                                # made before `train.train` is replaced

    def fit(c, dataset, folder, examples, guide_path=None, class_weights=None, dro_reference=None, **_):
        calls.append((folder.name, examples, c, class_weights))
        folder.mkdir(exist_ok=True)
        progress = dict(seconds=0, other_seconds=0, examples_trained=0, other_examples=0)
        torch.save({"progress": progress, SETTINGS: vars(c)}, folder / "checkpoint.pt")
        return torch.tensor([0.5, 1.0, 3.0])
    monkeypatch.setattr(train, "train", fit)
    monkeypatch.setattr(data, "pixel_features", functools.partial(data.pixel_features, dims=4))
    pool = f"--data {images} --holdout 6 --imbalance 3 --keep 0.5"
    _train(SMALL, flags, pool, "--dropout 0.2", out=tmp_path / "run")
    names, seen, settings, weights = zip(*calls)
    dataset = data.load(images)
    pool, kept, held_out, _ = train.choose_examples(settings[-1], dataset, tmp_path)
    assert list(names) == stages and len(held_out) == 6 and not torch.isin(held_out, pool).any()
    assert len(pool) < 54 and torch.isin(kept, pool).all() and abs(2 * len(kept) - len(pool)) < 4
    _assert_close(list(seen), [pool if "dro" in flags else kept, kept, kept][-len(stages):])  # dro's: all
    assert len({c.seed for c in settings}) == len(stages)       # a stage draws for itself
    assert [(c.channels, c.dropout) for c in settings] == [(4, 0), (4, 0), (8, 0.2)][-len(stages):]
    if "--class-weights" in flags:
        counts = torch.bincount(dataset.labels[kept])
        w = torch.tensor([0.5, 1, 3]) if "dro" in flags else 1 / counts
        _assert_close(weights[-1], w * counts.sum() / (w * counts).sum(), 1e-5)
    for changed, same in (held_out, True), (pool[::2], False):  # pruning, too, sees the pool only
        dataset.x[changed] = 255 - dataset.x[changed]
        assert torch.equal(train.choose_examples(settings[-1], dataset, tmp_path)[1], kept) == same


def test_the_proxy_finds_the_class_weights_of_doremi(monkeypatch, tmp_path):
    labels = torch.arange(60).sqrt().long() // 3
    counts = np.array([9, 27, 24])
    dataset = data.Dataset(torch.zeros(60, 3, 8, 8).byte(), labels, list("abc"))
    c = _settings(SMALL, "--class-weights dro --eta 0.5 --guide-batch 64 --data", _folder() / "d.npz")
    backward = train.backward
    seen = []

    def recording(objective, batch, weight, *more):
        losses = backward(objective, batch, weight, *more)
        seen.append((batch.labels % 3, weight, losses))
        return losses

    def loss(x0, noise, sigma, labels, target):
        """The reference's is 0.1 on class 0, and huge on others."""
        return torch.where(labels % 3 == 0, 0.1, 1e9), None
    monkeypatch.setattr(train, "backward", recording)
    monkeypatch.setattr(train, "load_matching", lambda *_: mock.Mock(training=False, loss=loss))
    c = train.stage_settings(c, "proxy")
    weights = train.train(c, dataset, tmp_path, torch.arange(60), dro_reference="r.pt")
    alphas = [np.full(3, 1 / 3)]
    for label, weight, losses in seen:                          # alpha weighs the next step's loss
        assert np.allclose(weight, (alphas[-1] * 60 / counts)[label], rtol=1e-4)
        excess = (losses[label == 0] - 0.1).clamp_min(0).mean().item()
        alpha = alphas[-1] * np.exp(0.5 * np.array([excess, 0, 0]))
        alphas.append(0.999 * alpha / alpha.sum() + 0.001 / 3)
    assert np.allclose(weights, np.mean(alphas[1:], 0) / counts, rtol=1e-4) and alphas[-1][0] > 0.6


def test_costs_of_what_a_run_needed_are_added():
    """Examples beside the run's own, unguided and guided: guides and proxies train on 8, `reference`, too."""
    flags = f"{SMALL} --steps 2 --eval-samples 3 --metrics none --guidance 2 --data {_folder()}/d.npz"
    reference = _folder() / "reference"
    ajest = _train(flags, "--selector ajest --guide train")
    weights = _train(flags, "--class-weights dro") / "class_weights.json"
    for more, main, guided in [
            ("--guide snapshot", 0, 0), ("--guide train", 0, 8), (f"--guide {reference}", 0, 8),
            (f"--selector ajest --guide {reference}", 8, 8), ("--class-weights dro", 16, 16),
            (f"--selector jest --reference {reference}", 8, 8), ("--selector ajest --score hard", 0, 8),
            (f"--guided-targets 2 --guide {ajest}", 16, 16),
            (f"--class-weights {weights}", 16, 16)]:
        run = _train(flags, more)
        records = _records(run, "eval")
        assert [r["guidance"] for r in records] == [1, 2]
        assert [r["other_examples"] for r in records] == [main, guided], more
        assert [r["other_seconds"] > 0 for r in records] == [main > 0, guided > 0]
        if "--guide /" in more:
            done = _load(more.split()[-1])["progress"]
            assert records[1]["other_seconds"] == done["seconds"] + done["other_seconds"]
        assert {r["other_examples"] for r in _records(run)} == {main}


@pytest.mark.parametrize("features, seconds", [("own:own.pt", 1000), ("pixels", 500)])
def test_features_and_steps_cost_what_they_took(monkeypatch, tmp_path, features, seconds):
    """And nothing else does. Two graphs, of plain and of guided targets, are compiled in steps 1 and 3."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_CACHE", str(tmp_path))
    _classifier("own.pt")
    clock = time.monotonic
    passed = []

    def takes(seconds, function):
        return lambda *args: passed.append(seconds) or function(*args)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + sum(passed))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(fid, "extract", takes(1000, lambda *_: torch.randn(60, 5)))
    monkeypatch.setattr(data, "pixel_features", takes(500, lambda *_: torch.randn(60, 5)))
    monkeypatch.setattr(fid.Evaluation, "__call__", takes(3000, lambda *_: True))
    monkeypatch.setattr(train, "save", takes(3000, train.save))
    monkeypatch.setattr(train, "backward", takes(10, train.backward))
    run = _train(SMALL, f"--compile --steps 5 --save-every 0 --guided-targets 2 --data {_folder()}/d.npz",
                 f"--keep 0.5 --prune-features {features} --eval-samples 4 --metrics none --eval-every 1")
    last = _records(run)[-1]
    assert [last["seconds"], last["other_seconds"]] == pytest.approx([30, seconds], abs=5)


# ------------------------------------------------------------------------------------------------------------
# Evaluation, the whole pipeline, and sample.py

def _sample(run, *flags, out):
    argv = [str(run), *"--device cpu --batch 16 --out".split(), str(out), *map(str, flags)]
    data.command(lambda: sample.main(argv))
    return dict(np.load(out)) if str(out).endswith(".npz") else None


def test_the_validation_loss_is_that_of_each_held_out_example_once():
    """At one noise level D = 0 has the loss lambda mean(x0^2), lambda(0.5) = 8, whatever the noise."""
    flags = f"{SMALL} --data {_folder()}/plain.npz --holdout 9 --selector ajest --filter 0.5 --metrics none"
    run = _train(flags, "--steps 20 --warmup 0 --eval-samples 4")
    dataset = data.load(_folder() / "plain.npz")
    c = _settings(flags)
    held_out = train.choose_examples(c, dataset, run)[2]
    expected = 8 * (dataset.x[held_out] / 127.5 - 1).square().mean().item()
    levels = []

    def nothing(x, sigma, labels):
        levels.append(sigma)
        return 0 * x
    for seed in 1, 0:                                           # the same noise in every run
        c.seed = seed
        fid.Evaluation(c, dataset, run, held_out).validation_loss(nothing)
    assert torch.equal(*torch.cat(levels).view(2, -1))
    assert not torch.isin(levels[0], _batches(c, dataset, c.batch)[0].sigma).any()      # nor that of training
    c.eval_levels = dict(P_mean=math.log(0.5), P_std=1e-9)
    evaluation = fid.Evaluation(c, dataset, run, held_out)
    assert evaluation.validation_loss(nothing) == pytest.approx(expected, rel=1e-4) and len(held_out) == 9
    identity = evaluation.validation_loss(lambda x, sigma, labels: x)
    assert identity == pytest.approx(8 * 0.5 ** 2, rel=0.2)     # lambda sigma^2, the noise that is in x
    logged = _records(run, "eval")[0]["validation_loss"]
    assert 0 < logged < 0.9 * expected and model.load_denoiser(run).classes == 2        # one is mirrored


def test_guided_records_hold_the_guide_s_cost_and_name_their_protocol(tmp_path):
    c = _settings("--eval-samples 500 --sampling-steps 1 --guidance 2")
    evaluation = fid.Evaluation(c, TREE, tmp_path)
    evaluation.guide_cost = (3.0, 7)
    networks = _denoiser(c), _denoiser(c)
    progress = dict(step=1, other_seconds=1.0, other_examples=2)
    log = []
    assert evaluation(*networks, progress, log) and not evaluation(*networks, progress, log)
    assert [(r["guidance"], r["other_seconds"], r["other_examples"]) for r in log] == [(1, 1, 2), (2, 4, 9)]
    assert evaluation(*networks, progress | dict(step=3), log[:]) and evaluation(*networks, progress, log[:1])
    c.sampling_steps = 2
    assert fid.Evaluation(c, TREE, tmp_path)(*networks, progress, log[:])


def test_the_whole_pipeline_on_images(tmp_path, capsys):
    flags = f"{SMALL} --data {_folder()}/named.npz --selector ajest --keep 0.5 --class-weights dro"
    flags += f" --holdout 6 --steps 4 --eval-samples 10 --out {tmp_path}/run --metrics"
    run = _train(flags, "pixels", out=tmp_path / "run")
    unguided, guided = _records(run, "eval")
    assert {"FD(pixels)", "precision", "recall", "validation_loss"} <= set(unguided["metrics"])
    assert (guided["guidance"], guided["features"], guided["samples"]) == (1.6, "pixels", 10)
    assert {"samples.png", "coreset.png", "class_weights.json", "config.json"} < set(os.listdir(run))
    before = (run / "log.jsonl").read_bytes()
    _, again, err = _call(capsys, train, flags, "pixels")       # all is done: only the metrics are said again
    assert "step 4/4" not in err and (run / "log.jsonl").read_bytes() == before
    assert f"step 4, unguided (10 samples):  FD(pixels) {unguided['FD(pixels)']:.4f}" in again
    for more in "none", "pixels --eval-samples 5", "pixels --guidance 2", "none --guidance 1.6":    # done
        _train(flags, more, out=run)
        assert _load(run)[SETTINGS]["guidance"] == (2 if "2" in more else 1.6)          # for sample.py
    taken = [(r["features"], r["samples"], r["guidance"]) for r in _records(run, "eval")[2:]]
    assert taken == [("none", 10, 1), ("none", 10, 1.6), ("pixels", 5, 1), ("pixels", 5, 1.6),
                     ("pixels", 10, 1), ("pixels", 10, 2)]
    images = _sample(run, "--n", 5, out=tmp_path / "s.npz")
    assert images["class_names"][images["labels"]].tolist() == ["ant", "bee", "cat", "ant", "bee"]
    _sample(run, "--n", 5, "--batch", 2, out=tmp_path / "folder")
    pngs = [np.array(Image.open(path)).transpose(2, 0, 1) for path in sorted((tmp_path / "folder").iterdir())]
    assert np.array_equal(pngs, images["images"])
    _refused(capsys, sample, f"{run} --n 1 --seed 4 --out {tmp_path}/folder", "folder")


def test_latents_train_prune_reweight_guide_and_sample(tmp_path):
    labels = torch.arange(40) % 4 // 3                          # 30 and 10 examples
    latents = torch.randn(40, 4, 8, 8) * 3 + labels[:, None, None, None] * 4 + 1
    np.savez(tmp_path / "z.npz", latents=latents.half().numpy(), labels=labels.numpy())
    run = _train(SMALL, f"--data {tmp_path}/z.npz --selector ajest --keep 0.5 --class-weights dro",
                 "--eval-samples 6 --steps 3")
    assert "FD(pixels)" in _records(run, "eval")[0]["metrics"]
    latents, labels, _ = _sample(run, "--n", 4, "--steps", 12, out=tmp_path / "s.npz").values()
    c = _settings(f"--data {tmp_path}/z.npz --metrics none --eval-samples 4")
    assert sorted(labels) == sorted(fid.Evaluation(c, None, run).labels) == [0, 0, 0, 1]
    assert latents.shape == (4, 4, 8, 8)
    assert abs(latents.mean() - 2) < 1.5 and 2 < latents.std() < 6      # of the data: 2 and 3.5


@functools.cache
def _guided_run(flags="--guidance 2.5"):
    """A run whose samples are guided by its snapshot."""
    return _train(SMALL, f"--data {_folder()}/d.npz --lr 0.05 --warmup 0 --steps 4 --eval-samples 12", flags)


def test_samples_are_guided_as_the_run_was_evaluated_or_as_the_flags_say(tmp_path, capsys):
    run = shutil.copytree(_guided_run(), tmp_path / "run")
    weak = model.load_denoiser(run / "guide.pt")

    def by_hand(w, ema=None, steps=2, sigma_max=80.0):
        network = model.load_denoiser(run, ema)
        denoiser = guide.autoguided(network, weak, w)
        batches = guide.generate(denoiser, range(4), torch.arange(4) % 3, steps=steps, sigma_max=sigma_max)
        return data.unscale(torch.cat(list(batches)), network.config).numpy()
    guided = by_hand(2.5)
    assert not np.array_equal(by_hand(1), guided)
    for expected, flags in [
            (guided, ""), (by_hand(1), "--guidance 1"), (by_hand(1), "--guidance 3 --interval 1e3 1e4"),
            (by_hand(0), f"--guide {run}/guide.pt --guidance 0"),
            (by_hand(2.5, 0.1, 3, 9.0), "--ema 0.1 --steps 3 --sigma-max 9")]:
        images = _sample(run, "--n", 4, *flags.split(), out=tmp_path / "x.npz")["images"]
        assert np.array_equal(images, expected), flags
    for flags in ("--n", 1, "--class", "1", "--seed", 1), ("--n", 2, "--seed", 1):
        images = _sample(run, *flags, out=tmp_path / "x.npz")["images"]
        assert np.array_equal(images, guided[1:1 + len(images)])  # seed 1, class 1, whatever the number
    os.remove(run / "guide.pt")
    _refused(capsys, sample, f"{run} --device cpu --out {tmp_path}/x.png", run / "guide.pt")
    _sample(run, "--guidance", 1, out=tmp_path / "y.npz")       # which needs none


def test_without_flags_samples_are_those_of_the_evaluation(tmp_path, capsys):
    """Scored by fid.py they have the distance that stands in the log."""
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "far/away")       # the guide is found from a linked folder
    flags = f"{SMALL} --data {_folder()}/d.npz --lr 0.05 --warmup 0 --steps 4 --eval-samples 12"
    guided = _train(flags, "--sampling-steps 3 --sigma-max 9 --guidance 2 --guide", _guided_run(),
                    out=tmp_path / "runs/guided")
    distilled = _guided_run("--guided-targets 1.6")
    for run, w, more in (guided, 1, ["--guidance", 1]), (guided, 2, []), (distilled, 1, []):
        logged, = [r["FD(pixels)"] for r in _records(run, "eval") if r["guidance"] == w]
        _sample(run, "--n", 12, *more, out=tmp_path / "x.npz")
        _, out, _ = _call(capsys, fid, f"{_folder()}/d.npz {tmp_path}/x.npz --features pixels")
        assert float(out.split()[1]) == pytest.approx(logged, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------
# Hostile checkpoints, kills, a full disk, several processes

def _start(*argv, **env):
    """A Python program in a process of its own."""
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=HERE, text=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, env=os.environ | dict(OMP_NUM_THREADS="1") | env)


class _Hostile:
    """What a pickle can hold: reading it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("program, flags", [
    (train, "--device cpu --out ."), (train, "--device cpu --guidance 2 --guide checkpoint.pt --out new"),
    (sample, "checkpoint.pt --out x.npz")])
def test_a_hostile_checkpoint_runs_nothing(tmp_path, monkeypatch, capsys, program, flags):
    monkeypatch.chdir(tmp_path)
    torch.save(_load(_tree_run()) | dict(x=_Hostile()), "checkpoint.pt")
    _refused(capsys, program, flags, "checkpoint.pt")
    assert set(os.listdir()) <= {"checkpoint.pt", "new", ".lock", "config.json"}


@pytest.mark.parametrize("arm", [
    "--selector uniform", "--selector jest --targets sample",
    "--selector ajest --early-steps 90 --guided-targets 1.6"])
def test_killed_at_random_moments_ends_in_the_same_bits(tmp_path, arm):
    kills = 20 if SLOW else 1
    flags = f"{TINY} {arm} --steps {2000 if SLOW else 150} --log-every 7"
    saved = tmp_path / "parts/checkpoint.pt"
    stamps = [0]
    for kill in range(kills):
        process = _start("train.py", *flags.split(), "--save-every", "0", "--out", saved.parent)
        while process.poll() is None and (not saved.exists() or saved.stat().st_mtime_ns == stamps[-1]):
            time.sleep(0.01)
        time.sleep(0.2 * np.random.RandomState(kill).rand())
        process.kill()
        process.communicate()
        if process.returncode != 0:                             # 0: it was faster than the kill
            stamps.append(saved.stat().st_mtime_ns)
    assert len(stamps) > kills * 3 // 4
    _same_run(_train(flags), _train(flags, out=saved.parent))


def test_a_full_disk_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    flags = f"{TINY} --guide none --save-every 0 --out {tmp_path}"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _interrupt(patch, 15)
        _train(flags, out=tmp_path)
    good = (tmp_path / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in (0, 2900, len(good) // 2, len(good) - 1):   # of the largest file that can be written
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            _refused(capsys, train, flags, tmp_path, "cannot be written")
            assert (tmp_path / "checkpoint.pt").read_bytes() == good and not list(tmp_path.glob("*.tmp"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    _same_run(_train(flags), _train(flags, out=tmp_path))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_two_processes_give_the_weights_of_one(tmp_path):
    tree = f"{TINY} --targets sample --guide-steps 9 --guided-targets 1.6 --steps 12"
    images = (f"{SMALL} --data {_folder()}/d.npz --class-weights dro --keep 0.5 --steps 2 --guide-batch 24 "
              "--eta 400 --warmup 5")
    selecting = f"{images} --eval-samples 4 --metrics pixels --selector ajest --debias --until-better"
    runs = [f"{flags} --out {tmp_path}/{i}" for i, flags in enumerate((tree, images, selecting))]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
    code = ("import sys, torch, train; train.read_processes(); train.join('cpu'); "             # one group
            "train.join = lambda device: None; torch.distributed.destroy_process_group = train.barrier; "
            "[train.main(flags.split()) for flags in sys.argv[1:]]")
    # As torchrun starts them.
    processes = [_start("-c", code, *runs, **env, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    errors = [part.communicate(timeout=300)[1] for part in processes]
    assert all(part.returncode == 0 for part in processes), errors
    for i, flags in enumerate((tree, images)):
        one = _train(flags)
        for part in "model", "ema":                             # small gradients differ by rounding
            _assert_close(_load(one)[part], _load(tmp_path / str(i))[part], 5e-5)
        for a, b in zip(_records(one), _records(tmp_path / str(i))):
            assert all(a[key] == b[key] for key in ("step", "examples_trained", "examples_drawn", "lr"))
    total = _load(one / "proxy")["dro"]["total"]
    assert total.std() > 0.01
    torch.testing.assert_close(total, _load(tmp_path / "1/proxy")["dro"]["total"], rtol=1e-3, atol=0)
    assert _records(_train(tree, "--steps 24", out=tmp_path / "0"))[-1]["step"] == 24   # of one process
    assert len(_records(tmp_path / "2", "eval")) == 2 and "score_mean" in _records(tmp_path / "2")[0]


# ------------------------------------------------------------------------------------------------------------
# Files, flags and programs

def test_reading_turns_everything_but_mistakes_of_the_program_into_one_line(tmp_path):
    for error in ValueError("a\nb " + "c" * 500), RecursionError(), EOFError("\n"), OSError(5), KeyError(1):
        with pytest.raises(data.DataError, match="^x.pt: not it, [ -~]{1,220}$"), data.reading("x.pt", "it"):
            raise error
    for error in NameError("name"), ImportError("module"), torch.OutOfMemoryError("full"):
        with pytest.raises(type(error)), data.reading("x.pt", "it"):
            raise error


@pytest.mark.parametrize("error", [OSError("full"), data.Stopped(signal.SIGTERM)])
def test_writing_is_atomic_and_refused_before_the_work(tmp_path, monkeypatch, error):
    path = tmp_path / "new/x.pt"
    data.require_writable(path)                                 # makes the folder
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=error))            # the last moment
    with pytest.raises((data.DataError, data.Stopped)) as caught, data.writing(path) as file:
        torch.save(torch.zeros(9), file)
    assert caught.value is error or "/x.pt: cannot be written, " in str(caught.value)
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["x.pt"]
    for target in path.parent, path / "y.pt":                   # a folder; below a file
        with pytest.raises(data.DataError, match=f"^{target}: "):
            data.require_writable(target)


def test_flags_hold_their_range():
    count = data.number(int, "[1, inf)")
    share = data.number(float, "(0, 1]")
    assert [count("1"), count("70000"), share("1"), share("1e-9")] == [1, 70000, 1, 1e-9]
    for parse, bad in (count, "0 1.5 x"), (share, "0 1.0001 nan -inf"), (data.device, "no meta cuda:99 9"):
        for text in bad.split():
            with pytest.raises((argparse.ArgumentTypeError, ValueError)):
                parse(text)


@pytest.mark.parametrize("terminal", [mock.Mock(**{"write.side_effect": OSError("closed")}), None])
def test_no_program_dies_when_its_terminal_is_closed(tmp_path, monkeypatch, terminal):
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    run = _train(TINY, "--eval-samples 8", out=tmp_path / "run")
    sample.main(f"{run} --n 2 --device cpu --out {tmp_path}/x.npz".split())
    fid.main(f"--compare {run} --out {tmp_path}/x.png".split())
    fid.main(f"{_folder()}/d.npz {_folder()}/moved.npz --features pixels".split())
    assert len(_records(run, "eval")) == 2 and {"x.npz", "x.png"} <= set(os.listdir(tmp_path))


def test_names_that_the_output_cannot_encode_are_escaped(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "ascii"))
    with pytest.raises(SystemExit, match="^2$"):
        data.command(mock.Mock(side_effect=data.DataError("K\xf6ln, \u732b: no such file")))
    assert sys.stderr.buffer.getvalue() == b"error: K\\xf6ln, \\u732b: no such file\n"


# ------------------------------------------------------------------------------------------------------------
# The tree: built again from its description, without recursion, and evaluated component by component.

def _naive_tree():
    """Weight [K], mean [K, 2] and covariance [K, 2, 2] of the mixture, class A."""
    random = np.random.RandomState(2)
    scale = np.array([1.3136, 1.3844])
    weights = []
    means = []
    covs = []
    todo = [(0, np.array([0.0030, 0.0325]), math.pi / 4, 0)]
    while todo:
        d, position, a, sign = todo.pop()
        if sign != 0:
            a += sign * 0.7 ** (d - 1) * (0.2 * random.randn() + 1)
        if d == 7:                                              # its angle was drawn, but it does not grow
            continue
        u = np.array([math.cos(a), math.sin(a)])
        L = 0.292 * 0.8 ** d * (0.2 * random.randn() + 1)
        h = 0.2 * 0.8 ** d / L
        q = 0.06 * L * scale
        for t in np.linspace(0.07, 0.93, 8):
            weights.append(L * 0.5 ** d)
            means.append((position + u * L * t) * scale)
            covs.append((np.outer(u, u) + h ** 2 * (np.eye(2) - np.outer(u, u))) * np.outer(q, q))
        todo += [(d + 1, position + u * L, a, sign) for sign in (-1, 1)]        # last in, first out
    weight = torch.tensor(weights, dtype=torch.float64)
    return weight / weight.sum(), torch.from_numpy(np.array(means)), torch.from_numpy(np.array(covs))


def test_tree_is_the_mixture_of_its_description():
    weight, mean, cov = _naive_tree()
    generator = data.stream(0, 0, "x")
    x = TREE.sample(50_000, generator).double()
    w = torch.randn(2, 100, generator=generator).double() * torch.logspace(-1, 2, 100)
    expect = weight.cdouble() @ (1j * (mean @ w) - (w * (cov @ w)).sum(1) / 2).exp()
    assert ((1j * (x @ w)).exp().mean(0) - expect).abs().max() < 3.5 / 50_000 ** 0.5        # E exp(i w x)
    x = x[:24] + 0.1 * torch.randn(24, 2, generator=generator)
    x[0] = torch.tensor([300, -40])                             # far away
    for sigma in (0.0, 0.1, torch.linspace(0.01, 5, 24, dtype=torch.float64)):
        at = x.clone().requires_grad_()
        square = torch.as_tensor(sigma, dtype=x.dtype) ** 2
        total = cov + square.view(-1, 1, 1, 1) * torch.eye(2)                   # [n or 1, K, 2, 2]
        normals = torch.distributions.MultivariateNormal(mean, total)
        logp = (weight.log() + normals.log_prob(at[:, None])).logsumexp(1)
        score, = torch.autograd.grad(logp.sum(), at)
        torch.testing.assert_close(TREE.logp(x, sigma), logp.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(TREE.score(x, sigma), score, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(TREE.logp(x.float(), sigma), logp.detach().float(), rtol=1e-4, atol=1e-2)


# ------------------------------------------------------------------------------------------------------------
# Streams and batches

def test_stream_is_a_function_of_seed_step_and_name():
    keys = [(0, 0, "data"), (0, 1, "data"), (1, 0, "data"), (0, 0, "noise"), (0, 10, "data"), (1, 0, "0data")]
    assert len({tuple(torch.rand(4, generator=data.stream(*key)).tolist()) for key in keys}) == len(keys)
    assert data.stream(7, 11, "data").initial_seed() == 3203736056692259189     # everywhere


def _data_set(kind="image", labelled=True):
    x = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (40, 3, 8, 8), dtype=np.uint8))
    if kind == "latent":
        x = x.half() / 8
    labels = torch.arange(40) % 4 if labelled else None
    return data.Dataset(x, labels, list("abcd") if labelled else (), kind, (9.0, 0, -4), (8.0, 2, 5))


POOL = torch.tensor([1, 2, 3, 7, 9, 21])


@pytest.mark.parametrize("dataset, options", [
    (_data_set(), dict(examples=POOL, flip=True)), (_data_set("latent"), {}), (TREE, dict(targets="exact"))])
def test_batches_depend_on_seed_and_step_alone_and_begin_alike(dataset, options):
    large = data.Batches(dataset, 48, 5, **options)
    small = data.Batches(dataset, 16, 5, **options)
    half = [data.Batches(dataset, 48, 5, rows=slice(rank, None, 2), **options) for rank in (0, 1)]
    for step in (4, 0, 4):                                      # in any order
        for got, rows in (small, slice(16)), (half[0], slice(0, None, 2)), (half[1], slice(1, None, 2)):
            torch.testing.assert_close(tuple(got[step]), tuple(large[step].rows(rows)))
    other_purpose = data.Batches(dataset, 48, 5, purpose="validation-", **options)
    for other in large[5], data.Batches(dataset, 48, 6, **options)[4], other_purpose[4]:
        assert not any(torch.equal(a, b) for a, b in zip(large[4][:3], other[:3]))


@pytest.mark.parametrize("kind, labelled, flip", [("image", 1, 1), ("image", 0, 1), ("latent", 1, 0)])
def test_batch_is_what_the_index_says_and_flips_are_labelled(kind, labelled, flip):
    dataset = _data_set(kind, labelled)
    batches = data.Batches(dataset, 4096, 0, examples=POOL, flip=flip, P_mean=-2.3, P_std=1.5)
    batch = batches[0]
    mirrored = batch.labels >= (4 if labelled else 1) if flip else torch.zeros(4096, dtype=torch.bool)
    plain = torch.where(mirrored[:, None, None, None], batch.x0.flip(3), batch.x0)
    raw = data.unscale(plain, vars(dataset)).to(dataset.x.dtype)
    index = torch.cdist(raw.float().flatten(1), dataset.x.float().flatten(1)).argmin(1)     # in the data
    assert torch.equal(raw, dataset.x[index])
    mean = torch.tensor(dataset.mean).view(-1, 1, 1)
    torch.testing.assert_close(plain, (raw - mean) / (2 * torch.tensor(dataset.std).view(-1, 1, 1)))
    assert set(index.tolist()) == set(POOL.tolist()) and abs(mirrored.float().mean() - flip / 2) < 0.05
    assert not labelled or torch.equal(batch.labels, dataset.labels[index] + 4 * mirrored)
    torch.testing.assert_close(tuple(batches.of(index, 0)), tuple(batch))
    for got, mean, std in (batch.sigma.log(), -2.3, 1.5), (batch.noise, 0, 1):
        assert abs(got.mean() - mean) < 0.1 and abs(got.std() - std) < 0.08


def test_classes_come_in_turn_or_in_their_shares():
    index = torch.arange(10 ** 5, 10 ** 5 + 5000)
    for classes in 1, 3, 1000:
        shares = torch.full((classes,), 1 / classes, dtype=torch.float64).tolist()
        assert torch.equal(data.classes_in_turn(shares, index), index % classes)
    shares = torch.tensor([0.7, 0.02, 0.0, 0.28])
    for start in 0, 1000, 10 ** 15 - 1000:                      # also at the largest seeds
        drawn = data.classes_in_turn(shares.tolist(), torch.arange(start, start + 1000))
        counts = torch.bincount(drawn, minlength=4)
        assert (counts - 1000 * shares).abs().max() < 5 and counts[2] == 0


# ------------------------------------------------------------------------------------------------------------
# Loading: published layouts, and images as they are seen

def _file(image, form="PNG", **options):
    """File content of a Pillow image or of pixels [H, W] or [H, W, C]."""
    file = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(file, form, **options)
    return file.getvalue()


def _write(path, files):
    """Write {name: content} as an .npz, a .zip, a .backslashes.zip, or a folder (text: a link)."""
    if path.suffix == ".npz":
        np.savez(path, **files)
    elif path.suffix == ".zip":
        slash = "\\" if ".backslashes" in path.suffixes else "/"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name.replace("/", slash), content)
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                (path / name).symlink_to(content)
            else:
                (path / name).write_bytes(content)
    return path


def _under(folder, files):
    """The same files in a folder."""
    return {f"{folder}/{name}": content for name, content in files.items()}


def _cifar_batch(images, labels):
    """A CIFAR-10 batch (of four images) as Python 2 pickled it in 2009: byte strings, an array of numpy's."""
    return (b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            b"(K\x01K\x04M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
            b"J\xff\xff\xff\xffK\x00tb\x89T\x00\x30\x00\x00" + images.tobytes() + b"tbU\x06labels]("
            b"K%cK%cK%cK%ceU\x0bbatch_labelU\x15training batch 1 of 5u." % tuple(labels))


RANDOM = np.random.RandomState(0)
CIFAR_X = RANDOM.randint(0, 256, (5, 4, 3, 32, 32), dtype=np.uint8)
TEN = [*range(10), *range(10)]
CIFAR = {f"data_batch_{i + 1}": _cifar_batch(x, TEN[4 * i:4 * i + 4]) for i, x in enumerate(CIFAR_X)}
CIFAR["data_batch_5"] = pickle.dumps({b"data": CIFAR_X[4].reshape(4, -1), b"labels": TEN[16:]}, 2)
RGB = RANDOM.randint(0, 256, (6, 8, 8, 3), dtype=np.uint8)
X = RGB.transpose(0, 3, 1, 2)
Z = np.float16(RANDOM.randn(9, 4, 8, 8))
PNG = [_file(pixels) for pixels in RGB]
CLASSES = {f"{'ant' if i < 3 else 'bee'}/{i}.png": png for i, png in enumerate(PNG)}
HIDDEN = {".trash/9.png": b"", "bee/@eaDir/3.png": b"", "__MACOSX/ant/0.png": b"", "bee/.3.png": b""}
EDM = {f"0000{i % 2}/img{i:08d}.png": png for i, png in enumerate(PNG)}
UNLABELLED = dict(labels=None, class_names=[])


def _edm(*labels):
    """The files of a data set in EDM's format."""
    listing = [*zip(EDM, labels)] or None
    return EDM | {"dataset.json": json.dumps({"labels": listing}).encode()}


LAYOUTS = [         # suffixes, files, what is not six images of three ants and three bees
    ("folder zip", {**CLASSES, "ant/a.txt": b"", "b.md": b""}, dict(
        report=["6 images of 3x8x8", "2 classes of 3 to 3: ant, bee", "2 other files left out (.md, .txt)"])),
    ("folder zip", _under("top/train", CLASSES | HIDDEN), {}),
    ("folder", _under(".all", CLASSES) | {"ant": ".all/ant", "test": ".all/ant"},               # links
     dict(class_names=["ant", "test"], x=X[[0, 1, 2] * 2])),
    ("folder zip", _under("cifar-10-batches-py", CIFAR | {"test_batch": b""}), dict(
        labels=TEN, class_names=data.CIFAR_CLASSES, x=CIFAR_X.reshape(20, 3, 32, 32))),
    ("folder zip", _edm(), UNLABELLED | dict(x=X[[0, 2, 4, 1, 3, 5]])),
    ("folder zip", _under("a/b", _edm(0, 0, 2, 2, 5, 5)),
     dict(labels=[0, 0, 1, 1, 2, 2], class_names=[*"025"])),
    ("folder zip", {"a.JPE": PNG[0], "b.jfif": _file(RGB[1, ..., 0])},                         # gray
     UNLABELLED | dict(x=[X[0], [X[1, 0]] * 3])),
    ("npz", dict(images=X), UNLABELLED),
    ("npz", dict(images=RGB, labels=[0, 0, 0, 2, 2, 2], class_names=["ant", "fly", "bee"]), {}),
    ("npz", dict(latents=Z), UNLABELLED | dict(
        x=Z, kind="latent", mean=Z.mean((0, 2, 3), float), std=Z.std((0, 2, 3), float))),
    ("npz", dict(latents=Z, labels=[7] * 9, mean=[1.0, 0, 2, 3], std=[1.0, 2, 3, 4]), dict(
        x=Z, labels=[0] * 9, class_names=["7"], mean=[1, 0, 2, 3], std=[1, 2, 3, 4]))]


@pytest.mark.parametrize("suffixes, files, more", LAYOUTS)
def test_published_layouts_are_read_back(tmp_path, suffixes, files, more):
    for suffix in suffixes.replace("zip", "zip backslashes.zip").split():
        got = data.load(_write(tmp_path / f"d.{suffix}", files))
        for name, expect in (dict(labels=[0, 0, 0, 1, 1, 1], class_names=["ant", "bee"], x=X) | more).items():
            same = np.allclose if name in ("mean", "std") else np.array_equal
            assert same(getattr(got, name), expect), (suffix, name)


def test_exif_turns_images_as_the_camera_was_held(tmp_path):
    # Where the standard's table for tag 0x112, 1 to 8, has the file's first row and first column.
    a = RGB[0]
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0%c\0\0\0\0\0\0"
    files = {f"{i}.webp": _file(a, "WEBP", exif=exif % i, lossless=True) for i in range(1, 9)}
    turned = [a.swapaxes(0, 1), np.rot90(a, -1), np.rot90(a, 2).swapaxes(0, 1), np.rot90(a)]
    seen = np.stack([a, a[:, ::-1], a[::-1, ::-1], a[::-1], *turned]).transpose(0, 3, 1, 2)
    assert np.array_equal(data.load(_write(tmp_path / "d", files)).x, seen)


def test_what_is_transparent_is_on_white_paper(tmp_path):
    gray, alpha = RGB[0, ..., 0], RGB[0, ..., 1]
    files = {"LA.png": _file(np.stack([gray, alpha], 2)), "L.png": _file(gray, transparency=int(gray[0, 0])),
             "RGBA.png": _file(np.stack([gray, gray, gray, alpha], 2))}
    got = data.load(_write(tmp_path / "d", files)).x.numpy()
    assert np.array_equal(got[0, 0], np.where(gray == gray[0, 0], 255, gray))
    assert got.shape == (3, 3, 8, 8) and abs(got[1:] - (255 - (255.0 - gray) * alpha / 255)).max() <= 0.5


def test_sizes_fingerprint_and_cache(tmp_path, monkeypatch):
    tall, wide = RGB[:2].reshape(16, 8, 3), RGB[:2].reshape(8, 16, 3)
    files = {**CLASSES, "bee/tall.png": _file(tall), "bee/wide.png": _file(wide)}
    got = data.load(_write(tmp_path / "d", files), size=4)
    for x, pixels in zip(got.x[6:], (tall[4:12], wide[:, 4:12])):
        assert np.array_equal(x.permute(1, 2, 0), Image.fromarray(pixels).resize((4, 4), Image.LANCZOS))
    one = data.load(_write(tmp_path / "a", CLASSES))
    two = data.load(_write(tmp_path / "b", CLASSES))
    arrays = dict(images=X, labels=[0, 1] * 3, class_names=["ant", "bee"])
    other = data.load(_write(tmp_path / "c.npz", arrays))
    assert one.fingerprint == two.fingerprint not in (got.fingerprint, other.fingerprint)
    (tmp_path / "b/ant/0.png").write_bytes(PNG[5])              # other content
    assert np.array_equal(data.load(tmp_path / "b").x, X[[5, 1, 2, 3, 4, 5]])
    monkeypatch.setattr(data, "_read", None)                    # a second reading would fail
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(data.load("a").x, X)                  # the same folder by another path


BAD = [             # what is loaded, the files there (or names of images), what the message says
    ("d/none", "0.png", "no such file"), ("d", ".a/0.png", "no images"), ("d", "0.png a/1.png", "0.png"),
    ("d", {"0.png": PNG[0], "1.png": _file(RGB[0, :4])}, "--size"), ("d", _edm(0, 1, 2, 3, 4, 0.5), "float"),
    ("d.zip", {"a/0.png": PNG[0], "a/\x1b[2J.png": PNG[0][:150]}, "[2J.png: "),
    ("d", {"16.png": _file(np.uint16(RGB[0, ..., 0]))}, "16.png: not an image, convert it to 8 bits"),
    ("d", {"F.tif": _file(np.float32(RGB[0, ..., 0]), "TIFF")}, "F.tif: not an image, convert it to 8 bits"),
    ("d.zip", CLASSES | {"bee\\4.png": PNG[0]}, "bee/4.png is in it twice"),
    ("d", "Training/ant/0.png VALID/ant/1.png", "Training, VALID look like splits"),
    ("d", {"a/0.png": PNG[0], "b/1.png": PNG[1], "c/2.heic": b""}, "c/2.heic"),
    ("d.zip", {"x/a/0.png": PNG[0], "x/b/2.heic": b""}, "b/2.heic"), ("d.npz", dict(samples=X), "neither"),
    ("d.zip", {"a/0.png": PNG[0], "b/1.png": PNG[1], "runs/x/checkpoint.pt": b""}, "folder of a run"),
    ("d", {"0.png": PNG[0], "dataset.json": b'{"labels": [["0.png", 0], ["1.png", 1]]}'}, "1.png is missing"),
    ("d", {"0.png": PNG[0], "1.txt": "gone"}, "1.txt"), ("d", {"0.png": PNG[0], "a": "../d"}, "links"),
    ("d", _under("x", CIFAR | {"data_batch_2": b"cos\nmkdir\n(S'ran'\ntR."}), "wants to run"),
    ("d", _under("x", CIFAR) | _under("copy", CIFAR), "10 of CIFAR-10's 5"),
    ("d.zip", _edm(0, 1, 2, 3, 4), "img00000005.png is missing"), ("d", _edm(0, 1, 2, 3, 4, "5"), "str"),
    ("d", _under("a", _edm(0, 1, 2, 3, 4, 5)) | {"0.png": PNG[0]}, "0.png"),
    ("d.npz", dict(latents=Z * np.nan), "finite"), ("d.npz", dict(images=X, labels=[0]), "int64 [1]"),
    ("d.npz", dict(images=X, labels=[-1] * 6), "numbers >= 0"), ("d.npz", dict(images=X[:, :2]), "uint8 [N"),
    ("d.npz", dict(images=X, labels=[0] * 6, class_names=["a", "a"]), "different"),
    ("d.npz", dict(latents=Z, mean=[0] * 4, std=[1, 1, 1, 0]), "`std` above 0")]


@pytest.mark.parametrize("path, files, says", BAD, ids=[row[2] for row in BAD])
def test_bad_data_is_refused_in_one_line(tmp_path, monkeypatch, path, files, says):
    if isinstance(files, str):
        files = dict.fromkeys(files.split(), PNG[0])
    _write(tmp_path / path.split("/")[0], files)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError) as caught:
        data.load(tmp_path / path)
    assert says in str(caught.value).replace("\x1b", "") and "\n" not in str(caught.value)
    assert len(os.listdir()) == 1                               # nothing ran


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
    np.testing.assert_allclose(PRUNING.priorities(torch.from_numpy(x), None), expect, rtol=1e-9, atol=1e-8)


def test_knn_and_moderate_priorities_by_definition():
    x = np.random.RandomState(1).randn(2100, 5) + 50            # blocks of 2,048
    x[:40] = 80 + 1e-5 * np.arange(40)[:, None] ** 1.5          # near by: in float32 they would be one point
    knn = PRUNING.priorities(torch.from_numpy(x), None, "knn", k=4)
    moderate = PRUNING.priorities(torch.from_numpy(x), None, "moderate")
    distance = np.sqrt(sum((x[:, None, i] - x[None, :, i]) ** 2 for i in range(5)))
    np.testing.assert_allclose(knn, -np.partition(distance, 4, axis=1)[:, 4], rtol=1e-4)
    middle = np.linalg.norm(x - np.sort(x, 0)[(len(x) - 1) // 2], axis=1)
    np.testing.assert_allclose(moderate, -abs(middle - np.sort(middle)[(len(x) - 1) // 2]), atol=1e-6)


@pytest.mark.parametrize("method", data.PRUNING)
def test_kept_are_the_best_of_each_class_in_exact_numbers(method):
    labels = torch.arange(6).repeat_interleave(torch.tensor([50, 33, 17, 0, 1, 2]))[torch.randperm(103)]
    x = torch.randn(103, 4)
    priority = data.priorities(x, labels, method)
    for keep, counts in (1.0, [50, 33, 17, 0, 1, 2]), (0.5, [25, 16, 8, 0, 1, 1]), (1e-6, [1, 1, 1, 0, 1, 1]):
        kept = []
        for c, n in enumerate(counts):
            members = (labels == c).nonzero()[:, 0].tolist()
            kept += sorted(members, key=lambda i: -priority[i])[:n]
        assert PRUNING.prune(priority, labels, keep).tolist() == sorted(kept)
    alone = PRUNING.priorities(x[labels == 1], None, method)
    assert method == "random" or torch.allclose(priority[labels == 1], alone)


def test_pixel_features_are_principal_components_of_the_index_alone():
    dataset = _data_set()
    index = torch.arange(39, 4, -1)
    small = dataset.take(index).reshape(35, -1).double().numpy()                # 8x8 is the grid itself
    u, s, _ = np.linalg.svd(small - small.mean(0), full_matrices=False)
    np.testing.assert_allclose(data.pixel_features(dataset, index, 5).abs(), abs(u[:, :5] * s[:5]), atol=1e-3)


def test_the_pool_is_split_the_same_way_for_every_seed_and_its_tail_is_exact():
    labels = torch.tensor([0, 1, 3]).repeat_interleave(torch.tensor([90, 12, 30]))      # class 1 limits n_max
    assert torch.bincount(labels[data.long_tail(labels, 8)]).tolist() == [24, 12, 0, 3]
    dataset = _data_set()                                       # 10 of each of four classes
    assert data.split_pool(dataset)[1] is None
    pool, held_out = data.split_pool(dataset, holdout=7)
    assert torch.equal(torch.cat([pool, held_out]).sort().values, torch.arange(40)) and len(held_out) == 7
    for seed in 3, 4:
        tail, same = data.split_pool(dataset, holdout=7, imbalance=8.0, seed=seed)
        assert torch.equal(same, held_out) and torch.equal(tail, tail.unique())
        assert torch.equal(tail, pool[data.long_tail(dataset.labels[pool], 8.0, seed)])


def test_class_weights_are_read_back_with_their_cost_and_other_files_refused(tmp_path):
    path = tmp_path / "w.json"
    data.write_class_weights(path, ["a", "K\xf6ln"], torch.tensor([0.25, 3.0]), (77.5, 76_800))
    weights, cost = data.read_class_weights(path, ["K\xf6ln", "a"])
    assert weights.tolist() == [3.0, 0.25] and cost == (77.5, 76_800)
    for weights in [0.25], [0.0, 0.0], [-1.0, 1.0], [math.nan, 1.0], [1.0, 1.0, 1.0]:
        data.write_class_weights(path, [*"abc"][:len(weights)], torch.tensor(weights), (0, 0))
        with pytest.raises(data.DataError, match="/w.json: not class weights for these classes, "):
            data.read_class_weights(path, ["a", "b"])


@pytest.mark.parametrize("eta, smoothing, settings", [(1, 1e-3, []), (0.7, 0.01, [0.7, 0.01])])
def test_group_dro_by_hand(eta, smoothing, settings):
    dro = DRO.GroupDRO(3, *settings)                            # without settings as in its paper
    alpha = np.full(3, 1 / 3)
    alphas = []
    steps = [([0.4, -1.0, 0.8, 2.0, 1.0], [0, 0, 0, 2, 2], [0.4, 0, 1.5]),      # class 1 is absent
             ([0.3, 0.5, 9.0, math.nan, 0.2], [1, 1, 0, 2, 2], [9.0, 0.4, 0.1]),
             ([0.2, 0.6], [1, 2], [9.0, 0.2, 0.6])]             # class 0 is absent: it keeps its 9
    for excess, labels, e in steps:
        halves = zip(torch.tensor(excess).split(3), torch.tensor(labels).split(3))      # of two processes
        dro.update(sum(dro.totals(*half) for half in halves))
        alpha = alpha * np.exp(eta * np.array(e))
        alpha = (1 - smoothing) * alpha / alpha.sum() + smoothing / 3
        alphas.append(alpha)
        np.testing.assert_allclose(dro.alpha, alpha, rtol=1e-5)
    np.testing.assert_allclose(dro.mean_alpha, np.mean(alphas, 0), rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Pictures

def test_a_density_is_drawn_upright_and_points_as_their_density():
    points = TREE.sample(400_000, data.stream(0, 0, ""))
    exact = np.asarray(data.density_picture(TREE, 60)) < 120
    drawn = np.asarray(data.density_picture(points, 60)) < 120
    assert 0.01 < exact.mean() < 0.2 and (exact == drawn).mean() > 0.95
    point = np.asarray(data.density_picture(torch.tensor([[1.2, 0.9]]), 30, center=0.0, side=3.0))
    assert np.argwhere(point < 255).tolist() == [[6, 27]]       # up and to the right


def _grays(n):
    """n images [n, 3, 48, 48], each of one gray: 0, 5, 10, ..."""
    return (torch.arange(n, dtype=torch.uint8) * 5).view(-1, 1, 1, 1).expand(-1, 3, 48, 48)


def _middles(picture, left, top, rows, columns):
    """The grays in the middles of the images in a picture, row by row; white is 255."""
    return np.asarray(picture)[top + 24::48, left + 24::48, 0][:rows, :columns].tolist()


def test_a_picture_has_a_row_for_each_class():
    shares = [1 / 8, 2 / 8, 5 / 8]
    labels = data.classes_in_turn(shares, torch.arange(16))
    picture = data.class_picture(_grays(16), labels, ["few", "some", "many"])
    rows = [[5 * i for i in range(16) if labels[i] == label] for label in range(3)]
    rows = [row + [255] * (max(map(len, rows)) - len(row)) for row in rows]
    assert _middles(picture, picture.width - 48 * len(rows[0]), 0, 3, len(rows[0])) == rows
    assert data.class_picture(_grays(3)).size == (96, 96)


def test_coreset_picture_shows_who_is_kept_and_who_is_not():
    dataset, pool, priority = _data_set(), torch.arange(38, 2, -1), torch.rand(36)      # 9 of each class
    dataset.x[:] = _grays(40)[..., :8, :8]
    keep = data.prune(priority, dataset.labels[pool], 0.75)     # 7 of 9
    shown = fid.Evaluation.real_examples(mock.Mock(dataset=dataset), torch.tensor([3, 1, 3]))
    assert torch.equal(shown, dataset.x[[3, 1, 7]])             # in samples.png: each class by turns
    picture = data.coreset_picture(dataset, pool, priority, keep, columns=4)
    for c in range(4):                                          # best, last kept, first dropped: 4, 4, 2
        ranked = sorted((i for i in range(36) if pool[i] % 4 == c), key=lambda i: -priority[i])
        for left, chosen in (100, ranked[:4]), (400 + 8, ranked[6:2:-1]), (700 + 8, ranked[7:]):
            row = _middles(picture, left, 24, 4, len(chosen))[c]
            assert row == [5 * int(pool[i]) for i in chosen]


# ------------------------------------------------------------------------------------------------------------
# fid.py: Fréchet distance, precision and recall

def _normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _naive_frechet(a, b):
    """tr sqrt(S_a S_b) is the nuclear norm of A B^T, the centered features over sqrt(n - 1), of any rank."""
    A, B = [(x.double() - x.double().mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    traces = A.square().sum() + B.square().sum() - 2 * torch.linalg.svdvals(A @ B.T).sum()
    return ((a.double().mean(0) - b.double().mean(0)).square().sum() + traces).item()


@pytest.mark.parametrize("n, m, d, offset", [(300, 200, 24, 0), (300, 200, 24, 1e3), (30, 25, 96, 0)])
def test_frechet_of_features_is_the_formula_by_singular_values(n, m, d, offset):
    a = offset + _normal(0, n, d)
    b = offset + 0.3 + 1.5 * _normal(1, m, d) @ _normal(2, d, d)
    distance = FRECHET.frechet(*FRECHET.moments(a), *FRECHET.moments(b))
    assert distance == pytest.approx(_naive_frechet(a, b), rel=1e-6)
    assert abs(fid.image_metrics(a, a, "inception")["FID"]) < 1e-3


def _naive_share(points, centres, k=3):
    radius = [sorted((c - other).norm() for other in centres)[k] for c in centres]      # 0 is c itself
    return np.mean([any((point - c).norm() <= r for c, r in zip(centres, radius)) for point in points])


def test_precision_recall_equals_the_naive_version_and_takes_a_fair_part_of_many():
    real = _normal(0, 70, 5).double()
    fake = 0.3 + 0.7 * _normal(1, 60, 5).double()
    both = PRECISION.precision_recall(real, fake, block=16)
    assert both == pytest.approx((_naive_share(fake, real), _naive_share(real, fake)))
    assert 1 > both[0] > both[1] > 0
    classes = torch.stack([torch.arange(600) // 200, torch.arange(600) % 3])    # one by one; in turn
    metrics = fid.image_metrics(*(9 * classes[..., None] + _normal(0, 2, 600, 1)), "own:1a", most=200)
    assert metrics["precision"] > 0.9 and metrics["recall"] > 0.9
    assert set(fid.image_metrics(real[:3], fake, "own:1a")) == {"FD(own)"}      # three cannot tell


# ------------------------------------------------------------------------------------------------------------
# fid.py: the Inception network. A row of the graph is blocks, with a width w where they differ, then lines of
# convolutions "name=channels x kernel" and pools, whose ends are joined; "/" halves, "-" does not pad.

GRAPH = """Conv2d_, 1a_3x3/=32x3x3 2a_3x3-=32x3x3 2b_3x3=64x3x3 halve 3b_1x1=80x1x1 4a_3x3-=192x3x3 halve
Mixed_5b.branch:32 Mixed_5c.branch:64 Mixed_5d.branch:64, 1x1=64x1x1, 5x5_1=48x1x1 5x5_2=64x5x5,\
 3x3dbl_1=64x1x1 3x3dbl_2=96x3x3 3x3dbl_3=96x3x3, mean _pool=wx1x1
Mixed_6a.branch, 3x3/=384x3x3, 3x3dbl_1=64x1x1 3x3dbl_2=96x3x3 3x3dbl_3/=96x3x3, halve
Mixed_6b.branch:128 Mixed_6c.branch:160 Mixed_6d.branch:160 Mixed_6e.branch:192, 1x1=192x1x1,\
 7x7_1=wx1x1 7x7_2=wx1x7 7x7_3=192x7x1, 7x7dbl_1=wx1x1 7x7dbl_2=wx7x1 7x7dbl_3=wx1x7 7x7dbl_4=wx7x1\
 7x7dbl_5=192x1x7, mean _pool=192x1x1
Mixed_7a.branch, 3x3_1=192x1x1 3x3_2/=320x3x3, 7x7x3_1=192x1x1 7x7x3_2=192x1x7 7x7x3_3=192x7x1\
 7x7x3_4/=192x3x3, halve
Mixed_7b.branch:mean Mixed_7c.branch:max, 1x1=320x1x1, 3x3_1=384x1x1 3x3_2a=384x1x3,\
 3x3_1=384x1x1 3x3_2b=384x3x1, 3x3dbl_1=448x1x1 3x3dbl_2=384x3x3 3x3dbl_3a=384x1x3,\
 3x3dbl_1=448x1x1 3x3dbl_2=384x3x3 3x3dbl_3b=384x3x1, w _pool=192x1x1"""
POOLS = {"halve": lambda x: F.max_pool2d(x, 3, 2), "max": lambda x: F.max_pool2d(x, 3, 1, 1),
         "mean": lambda x: F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)}


def _naive_line(state, x, block, width, steps):
    """A line of convolutions and pools of x [n, C, H, W] in float64, batch norms unfolded. Their weights are
    random, and are kept in `state`."""
    for step in steps.split():
        name, _, shape = step.replace("w", width).partition("=")
        if not shape:
            x = POOLS[name](x)
            continue
        channels, *kernel = map(int, shape.split("x"))
        layer = f"{block}{name.strip('/-')}"
        seed = zlib.crc32(layer.encode())
        fan_in = x.shape[1] * kernel[0] * kernel[1]
        weight = _normal(seed, channels, x.shape[1], *kernel) * (2 / fan_in) ** 0.5
        norm = {key: i // 2 + 0.1 * _normal(seed + i, channels)
                for i, key in enumerate(("bias", "running_mean", "weight", "running_var"))}
        state[f"{layer}.conv.weight"] = weight
        state |= {f"{layer}.bn.{key}": value for key, value in norm.items()}
        padding = [0 if name[-1] in "/-" else size // 2 for size in kernel]
        x = F.conv2d(x, weight.double(), None, 2 if name[-1] == "/" else 1, padding)
        x = F.relu(F.batch_norm(x, **{key: value.double() for key, value in norm.items()}, eps=0.001))
    return x


def test_inception_is_the_published_network_and_refuses_other_files(tmp_path):
    path = str(tmp_path / "weights.pth")
    images = torch.randint(256, (1, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = F.interpolate(images.double() / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    state = {"fc.weight": torch.zeros(1008, 2048)}
    for blocks, *lines in (row.split(", ") for row in GRAPH.splitlines()):
        for block in blocks.split():
            name, _, width = block.partition(":")
            x = torch.cat([_naive_line(state, x, name, width, line) for line in lines], 1)
    layout = [f"{key} {'x'.join(map(str, w.shape))}" for key, w in state.items() if w.ndim == 4]
    digest = hashlib.sha256("\n".join(sorted(layout)).encode()).hexdigest()
    assert digest[:16] == "b0593a094ed0ea79"                    # of pt_inception-2015-12-05-6726825d.pth
    torch.save(state, path, _use_new_zipfile_serialization=False)               # as the public file is
    network = fid.network("inception", weights=path)
    features = fid.extract(network, images)
    assert network.id.startswith("inception:")                  # not the published ones
    assert features.dtype == torch.float32 and (features - x.mean((2, 3))).abs().max() < 1e-4 * x.abs().max()
    less = {key: value for key, value in state.items() if "6b.branch1x1" not in key}
    for content in [1, 2], less, state | {f"more.{key}": value for key, value in state.items()}:
        torch.save(content, path)
        with pytest.raises(data.DataError, match="weights.pth: not the FID Inception weights"):
            fid.network("inception", weights=path)


# ------------------------------------------------------------------------------------------------------------
# fid.py: own features and the command line

def _classifier(path, **changes):
    torch.manual_seed(0)
    net = fid.Classifier(2, width=4).eval()
    torch.save(dict(width=4, class_names=["a", "b"], size=8, model=net.state_dict()) | changes, path)
    return net


def test_fit_learns_and_its_file_is_read_back(tmp_path, capsys, monkeypatch):
    path = _images(tmp_path / "d.npz", 400)
    dataset = data.load(path)
    ids = []
    used = {True: set(), False: set()}                          # while training; while scoring
    take = fid._images_and_labels
    monkeypatch.setattr(fid, "_images_and_labels", lambda dataset, rows, device: (
        used[torch.is_grad_enabled()].update(rows.tolist()) or take(dataset, rows, device)))
    for i in range(3):
        file = tmp_path / f"{i}.pt"
        flags = f"--fit {file} {path} --epochs 12 --width 4 --device cpu --seed {i // 2}"
        _, printed, _ = _call(capsys, fid, flags)
        net = fid.network(f"own:{file}")
        ids.append(net.id)
        right = (net.logits(dataset.x).argmax(1) == dataset.labels).float().mean()
        assert right > 0.9 and float(printed.split("accuracy ")[1][:6]) > 0.9
        assert i > 0 or (len(used[False]) == 40 and not used[True] & used[False])
    assert ids[0] == ids[1] != ids[2]                           # a function of the seed


def test_classifier_round_trip_and_refusal(tmp_path):
    path = tmp_path / "own.pt"
    images = torch.randint(256, (5, 3, 24, 16), dtype=torch.uint8)
    net = _classifier(path)
    assert torch.equal(fid.network(f"own:{path}")(images), net(images))
    with pytest.raises(data.DataError, match="give --size 8"):
        fid.extract(fid.network(f"own:{path}"), images)
    for changes in {"model": {key: value * np.nan for key, value in net.state_dict().items()}}, {"width": 5}:
        _classifier(path, **changes)
        with pytest.raises(data.DataError, match="own.pt: not a classifier"):
            fid.network(f"own:{path}")


def test_augment_shifts_and_flips_every_image_on_its_own():
    images = _normal(0, 64, 3, 9, 11)
    out = fid._augment(images, torch.Generator().manual_seed(1), shift=2)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    views = [padded[..., y:y + 9, x:x + 11] for y in range(5) for x in range(5)]
    views += [view.flip(3) for view in views]
    same = (torch.stack(views) == out).flatten(2).all(2)        # [2 * 5 * 5, 64]
    assert (same.sum(0) == 1).all() and same[:25].any(1).sum() > 12 and same[25:].any(1).sum() > 12


def test_extract_pads_the_last_batch_and_pixels_are_area_averages():
    images = (127 + 40 * _normal(0, 7, 3, 16, 24)).to(torch.uint8)
    net = fid.network("pixels")
    shapes = set()
    net.register_forward_hook(lambda module, inputs, output: shapes.add(inputs[0].shape))
    expected = images.double().reshape(7, 3, 8, 2, 8, 3).mean((3, 5)).flatten(1) / 127.5 - 1
    _assert_close(fid.extract(net, images, batch=3).double(), expected, 1e-6)
    assert shapes == {(3, 3, 16, 24)}


def test_score_equals_a_direct_computation_warns_of_few_and_refuses_two_sizes(tmp_path, capsys):
    paths = f"{_images(tmp_path / 'real.npz', 60, 16)} {_images(tmp_path / 'fake.npz', 45, 12)}"
    a, b = [fid.Pixels()(data.load(path, 8).x) for path in paths.split()]
    _, out, err = _call(capsys, fid, paths, "--features pixels --size 8")
    assert out == (f"FD(pixels) {_naive_frechet(a, b):.4g}  precision {_naive_share(b, a):.4g}  "
                   f"recall {_naive_share(a, b):.4g}  (60 real, 45 fake, features pixels)\n")
    assert "only 60" in err and "only 45" in err and err.count("warning: ") == 2
    _refused(capsys, fid, f"{paths} --features pixels", "16, 16", "give --size")


def test_statistics_files(tmp_path, capsys):
    for name, mean, variance in ("a", 0.0, 1.0), ("b", 0.1, 4.0), ("c", math.nan, 1.0):
        np.savez(tmp_path / f"{name}.npz", mu=np.full(2048, mean), sigma=np.eye(2048) * variance)
    flags = f"{tmp_path}/a.npz {tmp_path}/b.npz"
    name, value, *_ = _call(capsys, fid, flags)[1].split()
    assert name == "FID" and float(value) == pytest.approx(2048 * (0.1 ** 2 + (2 - 1) ** 2), rel=1e-3)
    _refused(capsys, fid, f"{flags} --features pixels", "--features pixels")
    _refused(capsys, fid, flags.replace("a.npz", "c.npz"), "c.npz: not")


def test_data_features_are_computed_once_per_data_and_network(tmp_path, monkeypatch):
    _classifier(tmp_path / "own.pt")
    nets = [fid.network(name) for name in ("pixels", f"own:{tmp_path / 'own.pt'}")]
    sets = [data.load(_images(tmp_path / f"{n}.npz", n)) for n in (20, 30)]
    pairs = list(itertools.product(nets, sets))
    first = [fid.data_features(*pair) for pair in pairs]
    for (net, dataset), (features, seconds) in zip(pairs, first):
        assert torch.equal(features, fid.extract(net, dataset.x)) and seconds > 0
    monkeypatch.setattr(fid, "extract", None)                   # the second time no network runs
    for pair, (features, seconds) in zip(pairs, first):
        again, seconds_again = fid.data_features(*pair)
        assert torch.equal(again, features) and seconds_again == seconds        # and costs the same


def test_a_broken_download_of_inception_begins_with_what_to_do_and_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("FID_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", mock.Mock(side_effect=OSError("no network")))
    with pytest.raises(data.DataError, match="^features inception .*own:CKPT, pixels, .*no network"):
        fid.network("inception")
    file = tmp_path / "hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"
    assert not file.exists()
    file.write_bytes(b"PK\3\4" + bytes(1000))                   # the beginning of an archive
    with pytest.raises(data.DataError, match=f"^{file}: not the FID .*delete it"):
        fid.network("inception")


# ------------------------------------------------------------------------------------------------------------
# fid.py: metrics of the tree

def test_hit_coverage_and_reached_against_loops():
    tree = argparse.Namespace(logp=lambda x: x[:, 0] - 2.12, device="cpu")   # hits are on the right
    tree.sample = lambda n, _: torch.tensor([[0.01, 0.0], [-0.1, 0.0]])[torch.arange(n) % 2]      # one hit
    cells = {}
    points = torch.cat([0.12 * _normal(0, 3000, 2).double(), torch.tensor([[1.6, 0.0], [0.1, -1.51]])])
    for point in points[:-2]:                                   # the last two are hits outside of the grid
        cell = tuple(((point + 1.5) // (3 / 101)).tolist())
        cells[cell] = cells.get(cell, False) or bool(point[0] >= 0)
    metrics = fid.tree_metrics(points, tree, points[:50] + torch.tensor([3.0, 4.0]))
    hit = (points[:, 0] >= 0).double().mean().item()
    hit_cells = sum(cells.values())
    assert metrics == pytest.approx(dict(hit=hit, coverage=hit_cells / len(cells), reached=hit_cells, l2=5))


def test_score_error_is_zero_for_the_exact_denoiser_and_the_closed_form_for_a_biased_one():
    def biased(x, sigma, labels):                               # by c_out; lambda c_out^2 = 1
        return TREE.denoise(x, sigma) + (sigma * 0.5 / (sigma ** 2 + 0.25).sqrt())[:, None]
    assert fid.score_error(TREE.denoise, TREE, n=256) == 0
    assert fid.score_error(biased, TREE, n=5000) == pytest.approx(1, rel=1e-4)          # more than one block


# ------------------------------------------------------------------------------------------------------------
# fid.py: comparing runs

def _log(folder, *points, settings=None, **changes):
    """A run folder with an evaluation at each (step, distance): 10 examples and 0.1 seconds a step."""
    settings = dict(seed=int(folder.name[-1]), lr=0.01, format=model.FORMAT) | (settings or {})
    record = dict(kind="eval", other_seconds=0.0, other_examples=0, guidance=1.0, features="pixels", data=1,
                  samples=64, sampling_steps=4, metrics=["FD(pixels)"]) | changes
    records = [{"kind": "train", "loss": 1}]
    for step, y in points:
        records.append(record | {"seconds": step / 10, "examples_trained": 10 * step, "FD(pixels)": y})
    folder.mkdir()
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "config.json").write_text(json.dumps(dict.fromkeys(data.FILES) | settings))
    return folder


def _cells(tables, row="FD(pixels)"):
    """The cells of this row in the two tables, at equal examples and at equal seconds."""
    return [line[2:-2].split(" | ")[2:] for line in tables.splitlines() if line.startswith(f"| {row} |")]


def test_compare_interpolates_counts_guides_and_averages_seeds(tmp_path, capsys):
    runs = [_log(tmp_path / "a-s0", (10, 1), (30, 3)), _log(tmp_path / "late-s0", (40, 1), (50, 1)),
            _log(tmp_path / "a-s1", (10, 3), (20, 2), (30, 5)),
            _log(tmp_path / "other-s0", (10, 4), (25, 1), other_seconds=1, other_examples=50)]
    _, out, _ = _call(capsys, fid, "--compare", *runs, f"{runs[0]}/ --out {tmp_path}/c.png")
    assert "/a (2) | " in out
    none = "none (0 of 1)"
    assert _cells(out) == [["250", "3 ± 0.71", none, "1"], ["3", "4 ± 1.4", none, "2"]]
    assert _cells(out, "other_examples")[0][1:] == ["0 ± 0", none, "50"] and (tmp_path / "c.png").exists()
    _refused(capsys, fid, f"--compare {runs[0]} --metric beauty", "FD(pixels)")
    _refused(capsys, fid, f"--compare {_log(tmp_path / 'none-s0')}", "[]")


def test_compare_reads_each_protocol_and_guidance_where_its_own_curves_end(tmp_path):
    """A guide's 5 seconds count for guided samples alone, or, where it also chose the batches, for all."""
    runs = []
    for name, unguided, guided in ("uniform", 0, 5), ("ajest", 1, 1):   # seconds besides
        run = _log(tmp_path / f"{name}-s0", (10, 6), (30, 2), other_seconds=unguided)
        other = _log(tmp_path / f"{name}-s1", (10, 3), (30, 1), other_seconds=guided, guidance=3)
        early = _log(tmp_path / f"{name}-s2", (10, 7), samples=8)
        lines = [(folder / "log.jsonl").read_text() for folder in (run, other, early)]
        (run / "log.jsonl").write_text("\n".join(lines))
        runs.append(run)
    tables = fid.compare(runs, tmp_path / "c.png")
    assert _cells(tables) == [["300", "2", "2"], ["100", "7", "7"], ["3", "2", "4"], ["1", "7", "7"]]
    assert _cells(tables, "FD(pixels), guided 3") == [["300", "1", "1"], ["4", "none (0 of 1)", "1"]]


def test_compare_takes_runs_of_one_arm_that_differ_in_their_seed_only(tmp_path, capsys):
    a = _log(tmp_path / "a-s0", (10, 1), settings=dict(guide="/one/guide.pt", steps=10))
    same = _log(tmp_path / "a-s1", (10, math.nan), settings=dict(guide="/other/guide.pt", steps=20))
    assert _cells(fid.compare([a, same], tmp_path / "c.png"))[0] == ["100", "1 (1 of 2)"]
    for i, settings, words in ((2, dict(lr=0.02), "lr 0.01"), (3, dict(guide="none"), "guide"),
                               (4, dict(seed=0), "seed 0")):
        other = _log(tmp_path / f"a-s{i}", (10, 1), settings=dict(guide="/one/guide.pt") | settings)
        _refused(capsys, fid, f"--compare {a} {other} --out {tmp_path}/c.png", words)


# ------------------------------------------------------------------------------------------------------------
# What the README promises: its commands, and that what a reader copies stands alone

def test_the_commands_of_the_readme_run_as_printed_on_a_small_folder(tmp_path, monkeypatch, capsys):
    """Only the steps are fewer; `data/cifar10` and `photos` hold train/<class>/ as CIFAR-10 unpacks."""
    monkeypatch.chdir(tmp_path)
    images = data.load(_images(tmp_path / "d.npz", 42, 16)).x.permute(0, 2, 3, 1).numpy()
    names = [f"train/{name}/{i}.png" for i in range(14) for name in ("cat", "dog", "owl")]
    files = {name: _file(pixels) for name, pixels in zip(names, images)}
    for folder in "data/cifar10", "photos":
        _write(tmp_path / folder, files)
    few = "--steps 4 --log-every 2 --batch 8 --guide-steps 2 --eval-samples 8 --sampling-steps 2 --device cpu"
    programs = {"train.py": (train, few), "sample.py": (sample, "--steps 2 --n 8 --device cpu"),
                "fid.py": (fid, "--device cpu")}
    lines = (HERE / "README.md").read_text().splitlines()
    commands = [line.partition(" #")[0] for line in lines if line.startswith("python ")]
    for command in commands:
        _, name, *flags = command.split()
        program, more = programs[name]
        if "--fit" in flags:
            more += " --epochs 1 --width 2"
        status, out, err = _call(capsys, program, *flags, more)
        assert status == 0 and out, (command, err)
    assert len(commands) >= 6


def test_a_short_run_on_the_tree_reaches_what_broken_parts_do_not():
    """Healthy, three seeds: score error 0.0115 to 0.0131, guided hit 0.918 to 0.929."""
    run = _train("--selector jest --score root-loss --debias --filter 0.75 --batch 128 --steps 4000",
                 "--guide-steps 500 --lr-decay 100000 --ema 0.1 --eval-samples 4096 --sampling-steps 16")
    unguided, guided = _records(run, "eval")
    assert unguided["score_error"] < 0.015 and guided["hit"] > 0.895
