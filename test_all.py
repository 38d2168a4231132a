"""Every test: python -m pytest test_all.py, or pytest test_all.py. No network, no data, two CPU cores.

Each holds the code against an independent reference: a naive version, a closed form, a published layout. The
long ones (random kills, the compiled UNet) run with SLOW_TESTS=1.
"""
import errno
import functools
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
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
SLOW = bool(os.environ.get("SLOW_TESTS"))  # long tests, off by default
os.environ["DATA_CACHE"] = tempfile.mkdtemp(prefix="test-data-cache-")  # never the user's own


# ------------------------------------------------------------------------------------------------------------
# select.py

def _interpreters():
    found = [sys.executable, shutil.which("python3", path="/usr/bin:/usr/local/bin"), shutil.which("python3")]
    return sorted({os.path.realpath(p) for p in found if p})


@pytest.mark.parametrize("python", _interpreters())
def test_standard_library_finds_its_own_select(python):
    code = ("import sys, subprocess, socket, selectors, asyncio, select; "
            "assert hasattr(select, 'select') and 'torch' not in sys.modules; "
            "selectors.DefaultSelector().close(); print('fine')")
    done = subprocess.run([python, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


def _naive_jest(learner, reference, k, chunks, generator):
    """The published matrix form: conditional logits from S_ij = learner_i - reference_j, draw by draw."""
    S = learner[:, None] - reference[None, :]
    n, chosen, size = len(learner), [], k // chunks
    for start in range(0, k, size):
        m = len(chosen)
        logits = torch.zeros(n, dtype=torch.float64)
        if m:
            rows, columns = S[:, chosen].sum(1), S[chosen, :].sum(0)
            logits = (S.diagonal() + rows + columns) / (2 * m + 1)
        p = (logits - logits.max()).exp()
        p[chosen] = 0
        chosen += torch.multinomial(p, min(size, k - m), replacement=False, generator=generator).tolist()
    return chosen


def test_jest_includes_as_often_as_the_matrix_form():
    generator = torch.Generator().manual_seed(0)
    learner = torch.rand(24, generator=generator).double() * 3
    reference = torch.rand(24, generator=generator).double()
    runs, k, chunks = 8000, 9, 4  # 4 chunks of 2 and a remainder of 1
    counts = torch.zeros(2, 24)
    for _ in range(runs):
        counts[0, select.jest((learner - reference).float(), k, chunks, generator)] += 1
        counts[1, _naive_jest(learner, reference, k, chunks, generator)] += 1
    p = counts / runs
    assert torch.allclose(p.sum(1), torch.full((2,), float(k)))
    error = (p[0] - p[1]) / (p.mean(0) * (1 - p.mean(0)) * 2 / runs).sqrt()
    assert error.abs().max() < 4 and p.std(1).min() > 0.1  # and selection is far from uniform


@pytest.mark.parametrize("B, k, chunks", [(10, 10, 3), (100, 17, 5), (5, 3, 16), (4080, 816, 16), (7, 1, 1)])
def test_jest_never_repeats_an_index(B, k, chunks):
    chosen = select.jest(torch.randn(B) * 1e4, k, chunks)
    assert chosen.shape == (k,) and chosen.unique().numel() == k and chosen.min() >= 0 and chosen.max() < B


def test_gumbel_top_k_weights_make_any_mean_unbiased():
    generator = torch.Generator().manual_seed(1)
    logits, f = 2 * torch.randn(40, generator=generator), torch.randn(40, generator=generator) + 1
    f = f + logits  # what is selected more often is larger, so that ignoring the weights shows
    draws = [select.gumbel_top_k(logits, 8, generator) for _ in range(10_000)]
    weighted = torch.stack([(w * f[i]).mean() for i, w in draws]).double()
    plain = torch.stack([f[i].mean() for i, _ in draws]).double()
    standard_error = weighted.std() / len(draws) ** 0.5
    assert (weighted.mean() - f.mean()).abs() < 4 * standard_error
    assert (plain.mean() - f.mean()).abs() > 40 * plain.std() / len(draws) ** 0.5
    everything, ones = select.gumbel_top_k(logits, 40, generator)
    assert everything.unique().numel() == 40 and (ones == 1).all()


def test_scores():
    learner, reference = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 2.0])
    assert select.score(learner, reference).tolist() == [2, -1, 0]
    assert select.score(learner, None, "hard").tolist() == [3, 1, 2]
    assert select.score(learner, reference, "easy", invert=True).tolist() == [1, 2, 2]
    standardized = select.score(learner, reference, gain=4.0)
    assert abs(standardized.mean()) < 1e-5 and abs(standardized.std() - 4) < 1e-5
    assert torch.allclose(select.score(learner, None, "gradient-norm").exp() ** 2, learner + 0.1)


def test_selection_never_waits_for_the_device():
    text = (HERE / "select.py").read_text().split("else:\n    import torch", 1)[1]
    assert not [word for word in (".item(", ".cpu(", ".numpy(", "nonzero", ".tolist(", "bool(")
                if word in text]


@pytest.mark.parametrize("kind, flags", [
    ("tree", "--selector ajest"), ("image", "--selector ajest --micro-batch 8"),
    ("image", "--selector jest --score gradient-norm --debias --label-dropout 0.1"),
    ("image", "--selector ajest --interpolate 2 --gain 1")])
def test_a_training_step_reads_nothing_from_the_device(monkeypatch, kind, flags):
    """The loop's calls on the meta device, whose tensors hold no values: whatever would wait for a device
    raises, and so does an operation on tensors of two devices."""
    class Adam(torch.optim.Adam):  # its fused kernel exists on real devices only
        def __init__(self, params, fused, **options):
            super().__init__(params, **options)

        def step(self):
            pass
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    monkeypatch.setattr(model, "accelerate", lambda function, *options: function)  # no autocast there
    stream, meta = data.stream, torch.device("meta")  # nor random generators
    monkeypatch.setattr(data, "stream", lambda seed, step, name, device="cpu": (
        None if device == meta else stream(seed, step, name)))
    images = data.Dataset(torch.zeros(64, 3, 16, 16, dtype=torch.uint8), torch.arange(64) % 4, list("abcd"))
    args = train.build_parser().parse_args([*flags.split(), *"--channels 8 --batch 16 --device cpu".split()])
    config = train.resolve(args, data.Tree("A") if kind == "tree" else images)
    tree = data.Tree("A").to(meta)
    [tree._p(name, torch.float32) for name in ("cumulative", "root", "mean")]  # to the device once
    images.x, images.labels = images.x.to(meta), images.labels.to(meta)
    dataset = tree if kind == "tree" else images
    ranks = train.Ranks(meta)
    state = train.State(config, meta, ranks)
    reference = model.build(train.model_config(config)).to(meta)
    curator = train.Curator(config, state, reference, meta)
    super_batch, batch = (train.Draw(config, dataset, n, meta, ranks) for n in (80, 16))
    dro = train.Dro(config, reference, torch.full((4,), 16.0), meta)
    for step in range(2):
        (x0, noise, sigma, labels, _), weight = curator.choose(*super_batch[step], step)
        state.learn(x0, noise, sigma, state.drop_labels(labels), weight)
        x0, noise, sigma, labels, _ = batch[step]
        losses = state.learn(x0, noise, sigma, labels, dro.weight(labels) if kind == "image" else None)
        if kind == "image":
            dro.update(losses, x0, noise, sigma, labels, ranks)
    for name in "item", "tolist", "cpu", "nonzero":
        with pytest.raises((RuntimeError, NotImplementedError)):
            getattr(losses[0], name)()


# ------------------------------------------------------------------------------------------------------------
# model.py

def _config(kind="image", **changes):
    base = dict(net="unet", kind=kind, shape=[3, 16, 16], channels=8, classes=3, dropout=0.0, sigma_data=0.5)
    if kind == "tree":
        base |= dict(net="mlp", shape=[2], classes=0)
    return base | changes


def _randomized(denoiser):
    """Gains away from their initial zero, so that every path of the network matters."""
    with torch.no_grad():
        for name, p in denoiser.named_parameters():
            if name.endswith("gain"):
                p.fill_(0.5)
    return denoiser


@pytest.mark.parametrize("resolution, classes, channels, parameters, gflop", [
    (64, 1000, 64, 31.3, 22.7), (64, 1000, 128, 124.7, 89.9),
    (32, 10, 64, 29.7, 6.0), (32, 10, 128, 118.7, 23.5)])
def test_unet_has_the_published_size(resolution, classes, channels, parameters, gflop):
    counter = torch.utils.flop_counter.FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), counter:
        net = model.UNet(resolution, 3, channels, classes)
        net(torch.empty(1, 3, resolution, resolution), torch.empty(1), torch.zeros(1, dtype=torch.long))
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == parameters
    assert round(counter.get_total_flops() / 1e9, 1) == gflop


def test_unet_keeps_magnitudes_near_one():
    torch.manual_seed(0)
    net, seen = model.UNet(32, 3, 32, 10), {}
    for name, block in net.named_modules():
        if isinstance(block, model.Block):
            block.register_forward_hook(lambda m, i, out, name=name: seen.setdefault(name, out))
    net.out_gain.data.fill_(1.0)
    x = torch.randn(8, 3, 32, 32, requires_grad=True)
    out = net(x, torch.randn(8), torch.arange(8))
    for value in seen.values():
        value.retain_grad()
    out.backward(torch.randn_like(out))
    rms = {name: value.square().mean().sqrt().item() for name, value in seen.items()}
    assert all(0.6 < r < 1.6 for r in rms.values()), rms
    assert 0.6 < out.square().mean().sqrt() < 1.6
    grads = [value.grad.square().mean().sqrt().item() for value in seen.values()]  # in forward order
    # neither vanish nor explode between blocks
    assert all(0.4 < a / b < 2.5 for a, b in zip(grads, grads[1:])), grads


def test_projection_leaves_the_function_unchanged():
    torch.manual_seed(0)
    denoiser = _randomized(model.build(_config()))
    with torch.no_grad():
        for w in model.projected_weights(denoiser):
            w.mul_(1 + torch.rand(len(w), *[1] * (w.ndim - 1)))
    x, sigma, labels = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 2.0]), torch.tensor([0, 2])
    before = denoiser(x, sigma, labels)
    model.project(model.projected_weights(denoiser))
    rms = torch.cat([w.square().flatten(1).mean(1).sqrt() for w in model.projected_weights(denoiser)])
    assert torch.allclose(rms, torch.ones_like(rms), atol=1e-5)
    assert torch.allclose(denoiser(x, sigma, labels), before, atol=1e-5)


def test_labels_matter_and_minus_one_is_no_label():
    torch.manual_seed(0)
    denoiser = _randomized(model.build(_config())).eval()
    x, sigma = torch.randn(1, 3, 16, 16).expand(4, -1, -1, -1), torch.ones(4)
    out = denoiser(x, sigma, torch.tensor([0, 1, -1, -1]))
    assert (out[0] - out[1]).abs().max() > 1e-3 and torch.allclose(out[2], out[3])
    assert torch.allclose(out[2:], denoiser(x, sigma, None)[2:], atol=1e-6)


def test_preconditioning_and_loss_in_closed_form():
    sigma = torch.tensor([0.002, 0.5, 3.0, 80.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = model.preconditioning(sigma)
    assert torch.allclose(c_skip, 0.25 / (sigma ** 2 + 0.25)) and torch.allclose(c_noise, sigma.log() / 4)
    assert torch.allclose(c_out ** 2, 0.25 * sigma ** 2 / (sigma ** 2 + 0.25))
    assert torch.allclose(c_in ** 2 * (sigma ** 2 + 0.25), torch.ones(4, dtype=torch.float64))
    assert torch.allclose(model.loss_weight(sigma) * c_out ** 2, torch.ones(4, dtype=torch.float64))
    # F = 0 gives D = c_skip x; its expected loss on data of variance sigma_data^2 is 1 at every sigma.
    denoiser = model.build(_config("tree"))
    torch.nn.init.zeros_(denoiser.net.out.bias)
    torch.manual_seed(0)
    x0, noise = 0.5 * torch.randn(200_000, 2), torch.randn(200_000, 2)
    for s in (0.05, 0.5, 5.0):
        loss, D_x = denoiser.loss(x0, noise, torch.full((200_000,), s))
        x = x0 + s * noise
        assert torch.allclose(D_x, 0.25 / (s * s + 0.25) * x, atol=1e-6)
        by_hand = ((s * s + 0.25) / (s * 0.5) ** 2) * ((D_x - x0) ** 2).mean(1)
        assert torch.allclose(loss, by_hand, rtol=1e-5) and abs(loss.mean() - 1) < 0.01


def test_power_function_ema_in_closed_form():
    torch.manual_seed(0)
    layer, history = torch.nn.Linear(3, 2), []
    ema = model.PowerEMA(layer, (0.05, 0.10))
    for t in range(1, 201):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(2, 3))
        history.append(layer.weight.detach().double().clone())
        ema.update(t)
        if t == 1:
            assert torch.equal(ema.averages[0.05][0], layer.weight)  # the initialization has left no trace
    for std in (0.05, 0.10):
        gamma = model.ema_gamma(std)
        assert math.isclose((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5), std, rel_tol=1e-9)
        t = torch.arange(0, 201, dtype=torch.float64)
        survive = (1 - 1 / t[2:]) ** (gamma + 1)  # beta_2 ... beta_200
        weights = torch.stack([(1 - (1 - 1 / t[i]) ** (gamma + 1)) * survive[i - 1:].prod()
                               for i in range(1, 201)])
        assert math.isclose(weights.sum().item(), 1, rel_tol=1e-9)
        expected = sum(w * h for w, h in zip(weights, history))
        assert torch.allclose(ema.averages[std][0].double(), expected, atol=1e-5)
        # the power function's own weights
        continuous = (t[1:] / 200) ** (gamma + 1) - (t[:-1] / 200) ** (gamma + 1)
        assert torch.allclose(weights, continuous, atol=1e-6)


def test_bf16_and_compilation_change_little():
    torch.manual_seed(0)
    denoiser = _randomized(model.build(_config())).eval()
    x, sigma, labels = torch.randn(4, 3, 16, 16), torch.rand(4) + 0.1, torch.tensor([0, 1, 2, -1])
    with torch.no_grad():
        exact = denoiser.net(x, sigma.log() / 4, labels)
        half = model.accelerate(denoiser.net, "cpu", bf16=True)(x, sigma.log() / 4, labels).float()
        assert (half - exact).norm() / exact.norm() < 1e-2


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")),
                    reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("part", ["mlp", "block"] + ["unet"] * SLOW)
def test_compiled_equals_eager(part):
    torch.manual_seed(0)
    torch._dynamo.reset()
    if part == "block":
        block = model.Block(24, 16, 8, decoder=True, attention=True)
        block.emb_gain.data.fill_(0.5)
        function, rows = block, (torch.randn(4, 24, 8, 8), torch.randn(4, 8))
    else:
        denoiser = _randomized(model.build(_config("tree" if part == "mlp" else "image")))
        x0 = torch.randn(4, *denoiser.shape)
        function = lambda *rows: denoiser.loss(*rows)[0]
        rows = x0, torch.randn_like(x0), torch.rand(4) + 0.1, torch.tensor([0, 1, 2, -1])
    with torch.no_grad():
        compiled = model.accelerate(function, "cpu", compiled=True)
        assert torch.allclose(compiled(*rows), function(*rows), rtol=1e-5, atol=1e-5)


def test_checkpoint_round_trip(tmp_path):
    torch.manual_seed(0)
    denoiser = _randomized(model.build(_config())).to(memory_format=torch.channels_last)
    ema = model.PowerEMA(denoiser, (0.05, 0.10))
    x = torch.randn(2, 3, 16, 16)
    expected = denoiser(x, 0.7, torch.tensor([0, 1]))
    model.save(tmp_path / "c.pt",
               dict(model_config=denoiser.config, model=denoiser.state_dict(), ema=ema.state_dict()))
    for which in (None, 0.10, 0):
        again = model.load_denoiser(tmp_path / "c.pt", which)
        assert torch.equal(again(x, 0.7, torch.tensor([0, 1])), expected)
    with pytest.raises(model.CheckpointError, match="--ema"):
        model.load_denoiser(tmp_path / "c.pt", 0.2)
    assert os.listdir(tmp_path) == ["c.pt"]


# ------------------------------------------------------------------------------------------------------------
# guide.py

def _gaussian_denoiser(std):
    def denoise(x, sigma, labels=None):
        return x * (std ** 2 / (std ** 2 + torch.as_tensor(sigma, dtype=x.dtype) ** 2))
    denoise.shape = (2,)
    return denoise


def test_heun_converges_at_second_order_to_the_exact_end_point():
    noise = torch.randn(64, 2, dtype=torch.float64)
    # x(sigma) = x(sigma_max) sqrt(s^2 + sigma^2) / sqrt(s^2 + sigma_max^2)
    exact = noise * 5 * 0.5 / math.sqrt(25 + 0.25)
    errors = []
    for steps in (32, 64, 128):
        x = guide.heun(_gaussian_denoiser(0.5), noise, steps=steps, sigma_min=0.002, sigma_max=5.0)
        errors.append((x - exact).norm().item() / exact.norm().item())
    assert errors[-1] < 4e-4
    assert 3.3 < errors[0] / errors[1] < 4.7 and 3.3 < errors[1] / errors[2] < 4.7, errors


def test_churn_keeps_the_distribution():
    torch.manual_seed(0)
    noise = torch.randn(40_000, 2, dtype=torch.float64)
    x = guide.heun(_gaussian_denoiser(0.5), noise, steps=64, sigma_max=5.0, S_churn=20,
                   fresh_noise=lambda: torch.randn_like(noise))
    assert abs(x.std() - 0.5) < 0.01
    still = guide.heun(_gaussian_denoiser(0.5), noise, steps=64, sigma_max=5.0)
    # and it does add noise
    assert (torch.corrcoef(torch.stack([x.flatten(), still.flatten()]))[0, 1]).abs() < 0.9


def test_autoguidance_weights_and_interval():
    main, weak, x = _gaussian_denoiser(0.5), _gaussian_denoiser(1.0), torch.randn(5, 2)
    for w, expected in ((1, main(x, 0.3)), (0, weak(x, 0.3)),
                        (2.5, weak(x, 0.3) + 2.5 * (main(x, 0.3) - weak(x, 0.3)))):
        assert torch.allclose(guide.Autoguided(main, weak, w)(x, torch.tensor(0.3)), expected)
    limited = guide.Autoguided(main, weak, 2.5, interval=(0.1, 1.0))
    assert torch.equal(limited(x, torch.tensor(2.0)), main(x, 2.0))
    assert not torch.allclose(limited(x, torch.tensor(0.3)), main(x, 0.3))
    weak.shape = (3,)
    with pytest.raises(ValueError, match="denoises"):
        guide.Autoguided(main, weak, 2.0)


def test_a_sample_depends_on_its_seed_alone():
    torch.manual_seed(0)
    denoiser = _randomized(model.build(_config(channels=16))).eval()
    seeds, labels = list(range(7)), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    for sampler in (dict(), dict(S_churn=4.0)):
        def draw(batch):
            return torch.cat(list(guide.generate(denoiser, seeds, labels, batch,
                                                 steps=3, sigma_max=5.0, **sampler)))
        reference = draw(7)
        for batch in (1, 3, 16):
            assert torch.equal(draw(batch), reference), batch
        backwards = torch.cat(list(guide.generate(denoiser, seeds[::-1], labels.flip(0), 2,
                                                  steps=3, sigma_max=5.0, **sampler)))
        assert torch.equal(backwards.flip(0), reference)


# ------------------------------------------------------------------------------------------------------------
# train.py and sample.py

TINY = ["--steps", "24", "--batch", "64", "--guide-steps", "8", "--guide-batch", "64",
        "--eval-samples", "256", "--sampling-steps", "4", "--log-every", "6"]


def _tree_config(*flags):
    return train.resolve(train.build_parser().parse_args([*TINY, "--device", "cpu", *flags]), data.Tree("A"))


def _state(config):
    device = torch.device("cpu")
    return train.State(config, device, train.Ranks(device))


def _records(run, kind):
    return [r for r in train.read_log(Path(run) / "log.jsonl") if r["kind"] == kind]


@pytest.mark.parametrize("bf16", [[], ["--bf16"]])
def test_dry_run_estimates_what_a_step_keeps(bf16):
    images = data.Dataset(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.arange(8), list("abcdefgh"))
    args = train.build_parser().parse_args(["--device", "cpu", "--channels", "16", *bf16])
    config = train.resolve(args, images)
    denoiser, n = model.build(train.model_config(config)), 16
    estimate = train.activation_bytes(denoiser, config, n)
    objective = model.accelerate(denoiser.loss, "cpu", bool(bf16))
    rows = torch.randn(n, 3, 16, 16), torch.randn(n, 3, 16, 16), torch.ones(n), torch.arange(n) % 8
    with torch.profiler.profile(profile_memory=True) as profile:
        loss, _ = objective(*rows)  # what the profiler sees allocated and not freed
    assert sum(e.self_cpu_memory_usage for e in profile.events()) == pytest.approx(estimate, rel=0.05)


def test_dry_run_writes_nothing(tmp_path, capsys):
    train.main(["--dry-run", "--selector", "ajest", "--out", str(tmp_path / "run"), "--device", "cpu"])
    text = capsys.readouterr().out
    assert "816 examples, chosen from 4080 by ajest" in text and "guide (1,024 steps of 4096)" in text
    assert not list(tmp_path.iterdir())


def test_peak_memory_takes_real_steps(monkeypatch):
    """On CUDA --dry-run measures; here its calls, with both questions to the allocator answered by hand."""
    taken = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: taken.append(0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10 ** 9 * taken[0])
    monkeypatch.setattr(train.State, "learn", lambda self, x0, *rest, learn=train.State.learn: (
        taken.__setitem__(0, taken[0] + 1), learn(self, x0, *rest)))
    for flags in [], ["--selector", "ajest"], ["--selector", "jest", "--debias"]:
        taken.clear()
        assert train.peak_memory(_tree_config(*flags), data.Tree("A")) == 2 * 10 ** 9


def _images(path, n=60, size=16, classes=3, seed=0):
    """A labelled set of smooth random images, each class of its own colour."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    coarse = torch.rand(n, 3, 4, 4, generator=generator) * 120 + labels[:, None, None, None] * 120 / classes
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").to(torch.uint8)
    np.savez(path, images=images.numpy(), labels=labels.numpy())
    return str(path)


def _same_run(a, b):
    a, b = (torch.load(Path(p) / "checkpoint.pt", weights_only=True) for p in (a, b))
    for key in ("model", "ema", "optimizer", "tally", *(["dro"] if "dro" in a else [])):
        flat = [[leaf for leaf in torch.utils._pytree.tree_leaves(c[key])] for c in (a, b)]
        assert len(flat[0]) == len(flat[1])
        assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(*flat)), key
    for key in ("step", "examples_trained", "examples_seen", "selecting"):
        assert a["progress"][key] == b["progress"][key]


def test_all_arms_draw_the_same_data_and_noise():
    config, ranks = _tree_config("--selector", "ajest"), train.Ranks(torch.device("cpu"))
    small = train.Draw(config, data.Tree("A"), 64, "cpu", ranks)
    large = train.Draw(config, data.Tree("A"), 320, "cpu", ranks)
    for step in (0, 7):
        for a, b in zip(small[step], large[step]):
            assert a is None and b is None or torch.equal(a, b[:64])
    assert not torch.equal(small[0][0], small[1][0])
    other = train.Draw({**config, "seed": 1}, data.Tree("A"), 64, "cpu", ranks)
    assert not any(torch.equal(a, b) for a, b in zip(small[0][:3], other[0][:3]))


def test_the_selected_examples_keep_their_scored_sigma_and_noise(monkeypatch):
    config = _tree_config("--selector", "jest")
    state = _state(config)
    curator = train.make_curator(config, state, None, torch.device("cpu"))
    rows = train.Draw(config, data.Tree("A"), 320, "cpu", state.ranks)[3]
    seen = {}
    monkeypatch.setattr(train.select, "jest",
                        lambda score, k, chunks, generator: seen.setdefault("i", score.topk(k).indices))
    chosen, weight = curator.choose(*rows, 3)
    assert weight is None and all(torch.equal(c, r[seen["i"]]) for c, r in zip(chosen[:3], rows[:3]))
    x0, noise, sigma = rows[:3]  # and the scores are the two models' losses on exactly these
    learner, reference = curator.measure(*rows[:4])
    D_x = state.denoiser(x0 + sigma[:, None] * noise, sigma)
    assert torch.allclose(learner, model.per_example_loss(D_x, x0, sigma))
    assert torch.equal(learner, reference)  # before the first step the EMA is the learner itself
    state.learn(*[t[:64] if t is not None else None for t in rows[:4]], None)
    assert not torch.equal(*curator.measure(*rows[:4])[:1], learner)


def test_interpolated_score_is_that_of_the_autoguided_denoiser():
    config = _tree_config("--selector", "ajest", "--interpolate", "2.5")
    state, weak = _state(config), model.build(train.model_config(config))
    torch.nn.init.normal_(state.denoiser.net.out.weight)
    torch.nn.init.normal_(weak.net.out.weight)
    curator = train.Curator(config, state, weak, torch.device("cpu"))
    x0, noise, sigma, labels, _ = train.Draw(config, data.Tree("A"), 320, "cpu", state.ranks)[0]
    both = guide.Autoguided(state.denoiser, weak, 2.5)
    expected = model.per_example_loss(both(x0 + sigma[:, None] * noise, sigma), x0, sigma)
    assert torch.allclose(curator.measure(x0, noise, sigma, labels)[0], expected, rtol=1e-4)


def test_micro_batches_give_the_gradient_of_one_batch(tmp_path):
    args = ["--data", _images(tmp_path / "d.npz"), "--channels", "8", "--batch", "8",
            "--device", "cpu", "--dropout", "0"]
    dataset, weights = data.load(args[1]), []
    for extra in ([], ["--micro-batch", "3"]):
        config = train.resolve(train.build_parser().parse_args([*args, *extra]), dataset)
        state = _state(config)
        _randomized(state.denoiser)
        x0, noise, sigma, labels, _ = train.Draw(config, dataset, 8, "cpu", state.ranks)[0]
        state.optimizer = torch.optim.SGD(state.params, lr=1.0, fused=True)  # the step is minus the gradient
        state.projected = []
        before = [p.detach().clone() for p in state.params]
        state.learn(x0, noise, sigma, labels, torch.linspace(0.5, 1.5, 8))
        weights.append(torch.cat([(b - p.detach()).flatten() for b, p in zip(before, state.params)]))
    scale = config["lr"] / (config["warmup"] + 1)
    assert torch.allclose(weights[0] / scale, weights[1] / scale, atol=1e-5, rtol=1e-4)
    assert weights[0].norm() > 0


def test_a_step_with_a_non_finite_gradient_is_skipped_and_counted():
    state = _state(_tree_config())
    x0, noise, sigma, *_ = train.Draw(state.config, data.Tree("A"), 64, "cpu", state.ranks)[0]
    state.learn(x0, noise, sigma, None, None)
    before = [p.detach().clone() for p in state.params]
    momentum = state.optimizer.state[state.params[0]]["exp_avg"].clone()
    state.learn(x0 * float("nan"), noise, sigma, None, None)
    assert all(torch.equal(a, b) for a, b in zip(before, state.params)) and state.tally[2:].tolist() == [1, 1]
    assert torch.equal(momentum, state.optimizer.state[state.params[0]]["exp_avg"])
    state.learn(x0, noise, sigma, None, None)
    assert not torch.equal(before[0], state.params[0]) and state.tally[2:].tolist() == [1, 0]


@pytest.mark.parametrize("flags", [
    ["--selector", "uniform"], ["--selector", "ajest", "--early-steps", "17"],
    ["--selector", "jest", "--debias"], ["--selector", "ajest", "--until-better"]], ids=lambda f: f[-1])
def test_resuming_is_bit_identical(tmp_path, flags):
    train.main([*TINY, *flags, "--out", str(tmp_path / "whole")])
    for steps in ("5", "13", "24"):
        train.main([*TINY, *flags, "--out", str(tmp_path / "parts"), "--steps", steps])
    _same_run(tmp_path / "whole", tmp_path / "parts")
    losses = [[(r["step"], r["loss"]) for r in _records(tmp_path / name, "train")]
              for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_run_logs_counts_and_times(tmp_path):
    train.main([*TINY, "--selector", "ajest", "--early-steps", "6", "--eval-every", "12",
                "--out", str(tmp_path)])
    first, *_, last = _records(tmp_path, "train")
    assert first["examples_seen"] == 6 * 320 and first["examples_trained"] == 6 * 64
    assert last["examples_seen"] == 6 * 320 + 18 * 64 and last["step"] == 24
    assert 0 < last["select_seconds"] < last["seconds"]
    assert first["ln_sigma_selected"] != first["ln_sigma_drawn"] and "ln_sigma_selected" not in last
    records = _records(tmp_path, "eval")
    assert [(r["step"], r["guidance"]) for r in records] == [(12, 1), (12, 3), (24, 1), (24, 3)]
    assert all({"hit", "coverage", "l2", "reference_seconds"} <= set(r) for r in records)
    files = set(os.listdir(tmp_path))
    assert files == {"config.json", "log.jsonl", "checkpoint.pt", "samples.png", "guide", "stages.json"}


def test_early_selection_ends_in_a_uniform_step_without_a_reference():
    config = _tree_config("--selector", "jest", "--early-steps", "2")
    state = _state(config)
    curator = train.make_curator(config, state, None, torch.device("cpu"))
    assert curator.active(1, None) and curator.reference is not None
    assert not curator.active(2, None) and curator.reference is None


@pytest.mark.parametrize("rule, better, expected", [
    ("--until-better", False, True), ("--until-better", True, False),
    ("--once-better", False, False), ("--once-better", True, True)])
def test_early_and_late_rules_compare_the_mean_losses(monkeypatch, rule, better, expected):
    config = _tree_config("--selector", "ajest", rule)
    state = _state(config)
    curator = train.Curator(config, state, object(), torch.device("cpu"))
    losses = torch.ones(320), torch.full((320,), 2.0 if better else 0.5)
    monkeypatch.setattr(curator, "measure", lambda *rows: losses)
    draws = [[None] * 5] * 20
    assert curator.active(6, draws) is expected
    if rule == "--until-better" and better:
        losses = losses[::-1]
        assert not curator.active(12, draws) and curator.reference is None  # it does not begin again


@pytest.mark.parametrize("flags, words", [
    (["--data", "/no/such/place"], "/no/such/place"), (["--filter", "1"], "--filter"),
    (["--filter", "-0.1"], "--filter"), (["--early-steps", "-1"], "--early-steps"),
    (["--selector", "ajest", "--guide", "none"], "--guide"), (["--guide", "/no/guide.pt"], "/no/guide.pt"),
    (["--keep", "0.5"], "--keep"), (["--save-every", "soon"], "--save-every"), (["--ema", "0.4"], "--ema"),
    (["--batch", "0"], "--batch"), (["--steps", "0"], "--steps"), (["--lr", "0"], "--lr"),
    (["--selector", "best"], "--selector"), (["--device", "abacus"], "--device"),
    (["--no-such-flag"], "--no-such-flag"), (["--until-better", "--once-better"], "--once-better"),
    (["--micro-batch", "-1"], "--micro-batch")])
def test_bad_flags_end_in_one_line(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, "--out", str(tmp_path / "run"), *flags])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and words in error and "Traceback" not in error
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_bad_files_end_in_one_line(tmp_path, capsys):
    images, other = _images(tmp_path / "d.npz"), _images(tmp_path / "e.npz", size=8)
    small = ["--channels", "8", "--batch", "4", "--guide-channels", "8", "--guide-batch", "4",
             "--guide-steps", "1", "--steps", "1", "--eval-samples", "0", "--device", "cpu"]
    train.main(["--data", other, "--out", str(tmp_path / "other"), "--guide", "none", *small])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "weights.json").write_text(json.dumps({"classes": {"cat": 1.0}}))
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "nan.npz").write_bytes(b"")
    np.savez(tmp_path / "nan.npz", latents=np.full((8, 4, 8, 8), np.nan, np.float16))
    for flags, words in [
            (["--guide", str(tmp_path / "text.pt")], "text.pt"),
            (["--guide", str(tmp_path / "other")], "--guide"),
            (["--selector", "jest", "--reference", str(tmp_path / "other")], "--reference"),
            (["--dro", str(tmp_path / "other")], "--dro"),
            (["--class-weights", str(tmp_path / "weights.json")], "weights.json"),
            (["--class-weights", str(tmp_path / "list.json")], "list.json"), (["--keep", "0"], "--keep"),
            (["--keep", "1.5"], "--keep"), (["--keep", str(tmp_path / "none.npy")], "none.npy"),
            (["--size", "12"], "--size"), (["--data", str(tmp_path / "nan.npz")], "nan.npz"),
            (["--holdout", "60"], "--holdout"), (["--guide", "self"], "--label-dropout"),
            (["--features", str(tmp_path / "f.npy"), "--keep", "0.5"], "f.npy")]:
        with pytest.raises(SystemExit) as stop:
            train.main(["--data", images, "--out", str(tmp_path / "run"), *small, "--guide", "none", *flags])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and words in error, (flags, error)
        assert not (tmp_path / "run" / "checkpoint.pt").exists()
    with pytest.raises(SystemExit) as stop:  # the run folder holds another run
        train.main(["--data", other, "--out", str(tmp_path / "other"), "--guide", "none", *small,
                    "--batch", "5"])
    assert stop.value.code == 2 and "--batch" in capsys.readouterr().err


def test_the_whole_pipeline_on_images(tmp_path, capsys):
    images, run = _images(tmp_path / "d.npz"), str(tmp_path / "run")
    small = ["--channels", "8", "--batch", "8", "--guide-channels", "8", "--guide-batch", "8",
             "--guide-steps", "2", "--steps", "4", "--eval-samples", "6", "--sampling-steps", "2",
             "--log-every", "2", "--device", "cpu"]
    train.main(["--data", images, "--out", run, "--selector", "ajest", "--keep", "0.5", "--dro", "auto",
                "--metrics", "pixels", "--holdout", "6", *small])
    assert len(data.load_keep(Path(run) / "keep.npy", 60)) == 30
    weights = json.loads((Path(run) / "proxy" / "class_weights.json").read_text())["classes"]
    assert set(weights) == {"0", "1", "2"} and abs(np.mean(list(weights.values())) - 1) < 0.1
    unguided, guided = _records(run, "eval")
    table = fid.compare([run], str(tmp_path / "compare.png"))
    assert table.splitlines()[-1].startswith("Noise floor, half of the data")
    assert {"FD(pixels)", "precision", "recall", "validation_loss"} <= set(unguided)
    assert guided["guidance"] == 1.6
    assert unguided["reference_seconds"] > 0
    capsys.readouterr()
    train.main(["--data", images, "--out", run, "--selector", "ajest", "--keep", "0.5", "--dro", "auto",
                "--metrics", "pixels", "--holdout", "6", *small])  # all is there: nothing is trained again
    assert "step 4/4" not in capsys.readouterr().err
    for out in ("grid.png", "samples.npz", "folder"):
        sample.main([run, "--n", "5", "--steps", "2", "--out", str(tmp_path / out), "--device", "cpu"])
    with np.load(tmp_path / "samples.npz") as file:
        assert file["images"].shape == (5, 3, 16, 16) and file["images"].dtype == np.uint8
        first = file["images"][0]
    assert len(os.listdir(tmp_path / "folder")) == 5
    sample.main([run, "--n", "1", "--steps", "2", "--out", str(tmp_path / "one.npz"), "--class", "0",
                 "--device", "cpu"])
    with np.load(tmp_path / "one.npz") as file:
        assert np.array_equal(file["images"][0], first)  # seed 0, class 0, whatever the number of samples
    with pytest.raises(SystemExit):
        sample.main([run, "--class", "dragon", "--out", str(tmp_path / "x.png"), "--device", "cpu"])
    assert "--class dragon" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_latents_train_prune_reweight_guide_and_sample(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    latents = torch.randn(40, 4, 8, 8, generator=generator) * 3 + labels[:, None, None, None] * 4 + 1
    np.savez(tmp_path / "z.npz", latents=latents.half().numpy(), labels=labels.numpy())
    run = str(tmp_path / "run")
    train.main(["--data", str(tmp_path / "z.npz"), "--out", run, "--selector", "ajest", "--keep", "0.5",
                "--dro", "auto", "--channels", "8", "--batch", "8", "--guide-channels", "8",
                "--guide-batch", "8", "--guide-steps", "2", "--steps", "3", "--eval-samples", "6",
                "--sampling-steps", "2", "--device", "cpu"])
    config = json.loads((Path(run) / "config.json").read_text())
    assert np.allclose(config["latent_mean"], latents.half().float().mean((0, 2, 3)), atol=1e-2)
    assert not config["flip"]
    sample.main([run, "--n", "4", "--steps", "24", "--out", str(tmp_path / "s.npz"), "--device", "cpu"])
    with np.load(tmp_path / "s.npz") as file:  # back in the scale of the data: mean 3, standard deviation 3.6
        assert file["latents"].shape == (4, 4, 8, 8)
        assert abs(file["latents"].mean() - 3) < 1.5 and 2 < file["latents"].std() < 6
    assert "FD(pixels)" in _records(run, "eval")[0]


def test_training_beats_the_trivial_denoiser_on_held_out_images(tmp_path):
    images, run = _images(tmp_path / "d.npz", n=300), tmp_path / "run"
    flags = ["--data", images, "--out", str(run), "--guide", "none", "--channels", "8", "--batch", "16",
             "--steps", "120", "--eval-every", "40", "--eval-samples", "4", "--sampling-steps", "2",
             "--holdout", "64", "--metrics", "none", "--warmup", "10", "--device", "cpu"]
    train.main(flags)
    losses = [r["validation_loss"] for r in _records(run, "eval")]
    dataset, config = data.load(images), json.loads((run / "config.json").read_text())
    held_out = train.hold_out(config, dataset, None)[1]
    def trivial_denoiser(x, sigma, labels):
        return model.preconditioning(sigma[:, None, None, None])[0] * x
    trivial = train.validation_loss(trivial_denoiser, dataset, held_out, config, "cpu")
    assert len(losses) == 3 and losses[-1] < losses[0] < trivial, (losses, trivial)


# ------------------------------------------------------------------------------------------------------------
# Class weights

def test_dro_raises_the_weight_of_an_under_fitted_class_only():
    config = {**_tree_config("--eta", "0.05"), "classes": 4}
    for excess_of, expected in ((torch.tensor([0.5, 0.0, 0.0, 0.0]), "grows"),
                                (torch.full((4,), 0.2), "equal")):
        generator = torch.Generator().manual_seed(0)
        dro = train.Dro.__new__(train.Dro)
        dro.config, dro.counts = config, torch.full((4,), 100.0)
        dro.log_alpha, dro.sum_alpha, dro.steps = torch.full((4,), -math.log(4)), torch.zeros(4), 0
        dro.losses = lambda x0, noise, sigma, labels: torch.zeros(len(x0))
        for _ in range(200):
            labels = torch.randint(4, (64,), generator=generator)
            loss = excess_of[labels] + 0.05 * torch.randn(64, generator=generator)
            dro.update(loss, torch.empty(64, 1), None, None, labels, train.Ranks(torch.device("cpu")))
        weights = dro.class_weights(dro.sum_alpha / dro.steps)
        assert torch.isclose(weights.mean(), torch.ones(()), atol=1e-4)
        if expected == "grows":
            assert weights[0] > 1.5 and weights[1:].min() > 0.05 and weights[1:].max() < 1
        else:
            assert (weights - 1).abs().max() < 0.05


def test_inverse_frequency_weights():
    labels = torch.tensor([0] * 10 + [1] * 30 + [2] * 60)
    dataset = data.Dataset(torch.zeros(100, 3, 8, 8, dtype=torch.uint8), labels, ["a", "b", "c"])
    config = dict(dro=None, class_weights="inverse", class_names=["a", "b", "c"])
    weights, seconds = train.prepare_weights(config, dataset, None, None, None)
    assert torch.allclose(weights * torch.tensor([10.0, 30.0, 60.0]), torch.full((3,), 100 / 3))
    assert seconds == 0
    assert torch.isclose(weights[labels].mean(), torch.ones(()))
    half, _ = train.prepare_weights(config, dataset, None, torch.arange(5, 100), None)  # five of class a
    assert torch.isclose(half[0] / half[2], torch.tensor(12.0))


def test_loss_and_sampling_weights_have_the_same_expected_gradient(tmp_path):
    images = np.zeros((60, 3, 8, 8), np.uint8)
    labels = np.repeat([0, 1, 2], [10, 20, 30])
    images = images + labels[:, None, None, None].astype(np.uint8) * 40
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    dataset, class_weights = data.load(str(tmp_path / "d.npz")), torch.tensor([2.0, 1.0, 0.5])
    # mean 1 over the examples
    w = class_weights * 60 / (class_weights * torch.tensor([10.0, 20.0, 30.0])).sum()
    gradients = []
    for how in ("loss", "sampling"):
        config = dict(_tree_config(), reweight=how, flip=False, label_dropout=0)
        draw = train.Draw(config, dataset, 4096, "cpu", train.Ranks(torch.device("cpu")), class_weights=w)
        total = torch.zeros(2)
        for step in range(12):
            x0, _, _, label, _ = draw[step]
            x = x0.mean((1, 2, 3))
            residual = 0.3 * x - (label - 1.0)  # a linear model's
            each = torch.stack([residual * x, residual], dim=1)
            total += (each * w[label][:, None] if how == "loss" else each).mean(0) / 12
        gradients.append(total)
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()


# ---------------------------------------------------------------------------------------------------------
# The tree: built again from its description, without recursion, and evaluated component by component.
def data_tree_components(classes):
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
                if name in classes:
                    mean, cov = (p + u * L * t) * scale, (along + across) * np.outer(q, q)
                    components.append((L * 0.5 ** d, mean, cov))
            for sign in (-1, 1):                                # last in, first out
                todo.append((d + 1, p + u * L, lambda a=a, d=d, sign=sign:
                             a + sign * 0.7 ** d * (0.2 * random.randn() + 1)))
    return components

def data_naive_logp(x, sigma, components):
    """float64 [n]: log of the sum of the Gaussians, by autograd-friendly elementary steps."""
    terms, total = [], sum(weight for weight, _, _ in components)
    for weight, mean, cov in components:
        noise = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1) ** 2 * torch.eye(2)
        cov = torch.as_tensor(cov)[None] + noise
        diff = x - torch.as_tensor(mean)
        quad = (diff[:, None] @ torch.linalg.inv(cov) @ diff[:, :, None])[:, 0, 0]
        terms.append(math.log(weight / total) - 0.5 * (quad + torch.logdet(cov)) - math.log(2 * math.pi))
    return torch.logsumexp(torch.stack(terms), 0)

@pytest.mark.parametrize("classes", ["A", "B", "AB"])
def test_tree_is_the_mixture_of_its_description(classes):
    components, tree = data_tree_components(classes), data.Tree(classes)
    assert len(components) == 1016 * len(classes)
    x = tree.sample(24, generator=data.stream(0, 0, "x")).double() + 0.1 * torch.randn(24, 2).double()
    for sigma in (0.0, 0.1, torch.linspace(0.01, 5, 24, dtype=torch.float64)):
        at = x.clone().requires_grad_()
        expect = data_naive_logp(at, sigma, components)
        score, = torch.autograd.grad(expect.sum(), at)
        torch.testing.assert_close(tree.logp(x, sigma), expect.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(tree.score(x, sigma), score, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(tree.logp(x.float(), sigma), expect.detach().float(), rtol=1e-4, atol=1e-2)

# Class A: point, log-density at sigma 0.3 and 2, score at sigma 0.3 and 2, by another implementation.
DATA_TREE = [
    ([0.11582032, 0.18732561], [-0.25101787, -3.2637322],
     [[1.0193985, 0.82274252], [0.061653789, 0.042797159]]),
    ([-0.11281236, 0.57044697], [-0.82449239, -3.285543],
     [[2.4211724, -1.3950827], [0.11691481, -0.050096221]]),
    ([-0.23501758, 0.54852974], [-1.1409031, -3.3006105],
     [[3.1898525, -1.0511994], [0.14667286, -0.044658203]]),
    ([0.18651542, 0.24791977], [-0.16207457, -3.2578385],
     [[0.49611536, 0.3505131], [0.044395555, 0.027999319]]),
]

def test_tree_matches_published_values():
    # Mean of class A and densities at three points, from another implementation.
    weight, mean, _ = zip(*data_tree_components("A"))
    np.testing.assert_allclose(np.average(mean, axis=0, weights=weight), [0.37185106, 0.36460653], rtol=1e-6)
    x, tree = torch.tensor([point for point, _, _ in DATA_TREE]), data.Tree("A")
    for i, sigma in enumerate((0.3, 2.0)):
        logp, score = [torch.tensor([row[part][i] for row in DATA_TREE]) for part in (1, 2)]
        torch.testing.assert_close(tree.logp(x, sigma), logp, rtol=0, atol=1e-5)
        torch.testing.assert_close(tree.score(x, sigma), score, rtol=1e-4, atol=1e-5)

def test_tree_sample_has_the_moments_of_the_density():
    weight, mean, cov = [np.array(part) for part in zip(*data_tree_components("A"))]
    weight = weight / weight.sum()
    center = weight @ mean
    for sigma in (0, 0.5):
        x = data.Tree().sample(200_000, sigma, data.stream(1, 0, "x")).double().numpy()
        spread = np.einsum("k,kij->ij", weight, cov + np.einsum("ki,kj->kij", mean - center, mean - center))
        spread = spread + sigma ** 2 * np.eye(2)
        error = np.sqrt(np.diag(spread) / len(x))
        assert (abs(x.mean(0) - center) < 5 * error).all()
        np.testing.assert_allclose(np.cov(x.T), spread, atol=5 * spread.max() * math.sqrt(2 / len(x)))
    # Within a component the points are normal: the mean of -2 (log p - constant) of one Gaussian is 2 there,
    # and for the mixture E[log p] over samples equals that over another draw's grid-free estimate.
    x, y = [data.Tree().sample(50_000, generator=data.stream(s, 0, "x")) for s in (2, 3)]
    a, b = data.Tree().logp(x), data.Tree().logp(y)
    assert abs(a.mean() - b.mean()) < 5 * (a.std() ** 2 / 25_000) ** 0.5
    assert (a > a.mean() - 12).all()                            # no point where the density is nothing

def test_tree_score_integrates_to_zero_under_its_samples():
    # E[score] = 0 and E[score x^T] = -I under the density itself: ties sampling to the score.
    tree, x = data.Tree(), data.Tree().sample(40_000, 0.2, data.stream(4, 0, "x"))
    score = tree.score(x, 0.2).double()
    assert (score.mean(0).abs() < 5 * score.std(0) / 200).all()
    torch.testing.assert_close(score.T @ x.double() / len(x), -torch.eye(2).double(), rtol=0, atol=0.05)

def test_tree_far_away_and_exact_denoiser():
    tree, x = data.Tree(), torch.tensor([[1e4, -1e4], [300.0, 5.0], [0.0, -40.0]])
    assert torch.isfinite(tree.logp(x)).all() and torch.isfinite(tree.score(x)).all()
    weight, mean, _ = zip(*data_tree_components("A"))
    center = torch.tensor(np.average(mean, axis=0, weights=weight), dtype=torch.float64)
    got = tree.denoise(torch.zeros(1, 2, dtype=torch.float64), 1e4)             # no information: the mean
    torch.testing.assert_close(got[0], center, rtol=0, atol=1e-6)
    with pytest.raises(data.DataError):
        data.Tree("C")

# ---------------------------------------------------------------------------------------------------------
# Streams and batches.
def test_stream_is_a_function_of_seed_step_and_name():
    keys = [(0, 0, "data"), (0, 1, "data"), (1, 0, "data"), (0, 0, "noise"), (0, 10, "data"), (1, 0, "0data")]
    draws = {key: torch.rand(4, generator=data.stream(*key)) for key in keys}
    assert len({tuple(d.tolist()) for d in draws.values()}) == len(draws)
    assert data.stream(7, 11, "data").initial_seed() == 3203736056692259189     # everywhere

def data_set(n=40, classes=4, kind="image", labelled=True):
    rng = np.random.RandomState(0)
    labels = torch.arange(n) % classes if labelled else None
    names = [f"c{c}" for c in range(classes)] if labelled else []
    if kind == "latent":
        x = torch.from_numpy((rng.randn(n, 4, 8, 8) * [[[[1]], [[2]], [[3]], [[4]]]] + 5).astype(np.float16))
        mean, std = x.float().mean((0, 2, 3)), x.float().std((0, 2, 3), unbiased=False)
        return data.Dataset(x, labels, names, "latent", mean, std)
    return data.Dataset(torch.from_numpy(rng.randint(0, 256, (n, 3, 8, 8), dtype=np.uint8)), labels, names)

@pytest.mark.parametrize("options", [{}, dict(keep=torch.tensor([1, 2, 3, 7, 9, 21])), dict(flip=True),
                                     dict(class_weights=[1, 2, 3, 4], flip=True)])
def test_batches_depend_on_seed_and_step_alone_and_begin_alike(options):
    dataset = data_set()
    large, small = data.Batches(dataset, 37, 5, **options), data.Batches(dataset, 13, 5, **options)
    large[3], large[9]
    for step in (4, 0, 4):
        for a, b in zip(large[step], small[step]):
            assert torch.equal(a[:13], b)
    assert not torch.equal(large[4][2], large[5][2])
    assert not torch.equal(large[4][2], data.Batches(dataset, 37, 6, **options)[4][2])

def test_batch_is_what_the_index_says_and_stays_in_keep():
    dataset, keep = data_set(), torch.tensor([1, 2, 3, 7, 9, 21])
    batches = data.Batches(dataset, 64, 0, keep=keep)
    x0, labels, index = batches[0]
    assert x0.dtype == torch.float32 and set(index.tolist()) == set(keep.tolist())
    assert torch.equal(x0, dataset.x[index].float() / 127.5 - 1) and torch.equal(labels, index % 4)
    assert torch.equal(data.pixels(x0), dataset.x[index]) and batches.net_classes == 4
    batches.resident = False                                    # as if the array did not fit on the device
    ahead = [batches[step] for step in (0, 1, 2, 7)]
    for (x, c, i), step in zip(ahead, (0, 1, 2, 7)):
        expect = data.Batches(dataset, 64, 0, keep=keep)[step]
        assert torch.equal(x, expect[0]) and torch.equal(c, expect[1]) and torch.equal(i, expect[2])

@pytest.mark.parametrize("labelled", [True, False])
def test_flips_are_labelled(labelled):
    dataset = data_set(labelled=labelled)
    batches = data.Batches(dataset, 400, 0, flip=True)
    x0, labels, index = batches[0]
    plain = dataset.take(index)
    flipped = labels >= max(dataset.classes, 1)
    assert 140 < flipped.sum() < 260 and batches.net_classes == (8 if labelled else 2)
    assert torch.equal(x0[flipped], plain[flipped].flip(3)) and torch.equal(x0[~flipped], plain[~flipped])
    if labelled:
        assert torch.equal(labels % 4, dataset.labels[index])

def test_class_weights_give_weight_times_frequency():
    dataset = data_set()
    dataset.labels = torch.tensor([0] * 20 + [1] * 10 + [2] * 10 + [0] * 0)
    dataset.class_names = ["a", "b", "c"]
    _, labels, index = data.Batches(dataset, 60_000, 0, class_weights=[1.0, 3.0, 0.0])[0]
    share = torch.bincount(labels, minlength=3) / 60_000
    np.testing.assert_allclose(share, [0.4, 0.6, 0], atol=0.01)                 # 20 x 1 : 10 x 3 : 0
    count = torch.bincount(index, minlength=40).double()
    np.testing.assert_allclose(count[:20] / 60_000, 0.4 / 20, atol=0.004)       # uniform within a class
    keep = torch.tensor([0, 5, 12, 21, 35])                     # of what is kept: 3 x 1 : 1 x 3 : 1 x 6
    _, labels, index = data.Batches(dataset, 60_000, 0, keep=keep, class_weights=[1.0, 3.0, 6.0])[0]
    assert set(index.tolist()) == set(keep.tolist()) and torch.equal(labels, dataset.labels[index])
    np.testing.assert_allclose(torch.bincount(labels) / 60_000, [3 / 12, 3 / 12, 6 / 12], atol=0.01)
    for bad in ([1, 2], [1, -1, 1], [0, 0, 0], [1, math.nan, 1]):
        with pytest.raises(data.DataError):
            data.Batches(dataset, 4, 0, class_weights=bad)

def test_latents_are_standardized_and_restored():
    dataset = data_set(200, kind="latent")
    x0, _, index = data.Batches(dataset, 500, 0)[0]
    every = dataset.take(torch.arange(200))
    assert abs(every.mean((0, 2, 3))).max() < 1e-3 and abs(every.std((0, 2, 3)) - 0.5).max() < 1e-3
    back = data.unscale(x0, dataset.mean, dataset.std)
    torch.testing.assert_close(back, dataset.x[index].float(), rtol=0, atol=1e-4)
    with pytest.raises(data.DataError, match="latents"):
        data.Batches(dataset, 4, 0, flip=True)

def test_tree_batches():
    batches = data.Batches(data.Tree(), 50, 3)
    x0, labels, index = batches[2]
    assert x0.shape == (50, 2) and labels is None and index is None
    assert torch.equal(data.Batches(data.Tree(), 24, 3)[2][0], x0[:24]) and not torch.equal(batches[3][0], x0)

# ---------------------------------------------------------------------------------------------------------
# Writers of the published layouts.
def data_image(seed, size=(8, 8), mode="RGB"):
    shape = size[::-1] if mode == "L" else (*size[::-1], 3)
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8))

def data_png(seed=0, size=(8, 8), mode="RGB", form="PNG"):
    file = io.BytesIO()
    data_image(seed, size, mode).save(file, form)
    return file.getvalue()

def data_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path

def data_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path

def data_tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path

def data_batch(images, labels, key=b"data", dtype=b"u1"):
    """Bytes as Python 2 pickled a CIFAR-10 batch in 2009: protocol 2, byte strings, an array of numpy's."""
    raw, out = images.reshape(len(images), -1).tobytes(), b"\x80\x02}("
    out += b"U" + bytes([len(key)]) + key
    out += b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    out += struct.pack("<4sHcHc", b"(K\x01M", len(images), b"M", len(raw) // len(images), b"\x86")
    out += b"cnumpy\ndtype\nU\x02" + dtype + b"K\x00K\x01\x87R(K\x03U\x01|NNN"
    out += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    out += b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    out += b"U\x06labels](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return out + b"U\x0bbatch_labelU\x15training batch 1 of 5u."

def data_cifar(n=4):
    """Per training batch: uint8 [n, 3, 32, 32] and labels."""
    rng = np.random.RandomState(0)
    return [(rng.randint(0, 256, (n, 3, 32, 32), dtype=np.uint8), rng.randint(0, 10, n).tolist())
            for _ in range(5)]

def data_binary_batch(images, labels):
    return b"".join(bytes([label]) + image.tobytes() for image, label in zip(images, labels))

def data_npz(path, **arrays):
    path = path / "x.npz" if path.is_dir() else path
    np.savez(path, **arrays)
    return path

# ---------------------------------------------------------------------------------------------------------
# Every format, read back.
DATA_CLASSES = {f"{c}/{i}.png": data_png(10 * k + i) for k, c in enumerate(("ant", "bee")) for i in range(3)}
DATA_TINY = {f"tiny-imagenet-200/train/n0{c}/images/n0{c}_{i}.JPEG":
             data_png(10 * c + i, (64, 64), form="JPEG") for c in (2, 1) for i in range(3)}
DATA_TINY |= {f"tiny-imagenet-200/train/n0{c}/n0{c}_boxes.txt": b"0 0 1 1" for c in (1, 2)}
DATA_TINY |= {f"tiny-imagenet-200/{name}": content for name, content in {
    "val/images/val_0.JPEG": data_png(99), "test/images/test_0.JPEG": data_png(98),
    "words.txt": b"n01\tant", "wnids.txt": b"n01"}.items()}

@pytest.mark.parametrize("kind", ["folder", "zip", "train", "single", "single-train"])
def test_images_in_class_folders(tmp_path, kind):
    prefix = {"train": "train/", "single": "top/", "single-train": "top/train/"}.get(kind, "")
    files = {prefix + name: content for name, content in DATA_CLASSES.items()}
    if "train" in prefix:
        files[prefix.replace("train", "val") + "ant/9.png"] = data_png(99)
    path = data_zip(tmp_path / "d.zip", files) if kind == "zip" else data_folder(tmp_path / "d", files)
    got = data.load(path, cache=tmp_path / "cache")
    assert got.class_names == ["ant", "bee"] and got.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert got.shape == (3, 8, 8) and got.classes == 2 and len(got) == 6 and got.kind == "image"
    for i, seed in enumerate((0, 1, 2, 10, 11, 12)):
        assert np.array_equal(got.x[i].permute(1, 2, 0).numpy(), np.asarray(data_image(seed)))
    same = data.load(data_folder(tmp_path / "again", DATA_CLASSES), cache=tmp_path / "cache")
    assert same.fingerprint == got.fingerprint                  # of the content, wherever it lies

@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_tiny_imagenet_as_published(tmp_path, kind):
    path = data_zip(tmp_path / "tiny-imagenet-200.zip", DATA_TINY)
    path = path if kind == "zip" else data_folder(tmp_path, DATA_TINY) / "tiny-imagenet-200"
    got = data.load(path, cache=tmp_path / "cache")
    assert got.class_names == ["n01", "n02"] and got.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expect = np.asarray(Image.open(io.BytesIO(DATA_TINY["tiny-imagenet-200/train/n02/images/n02_1.JPEG"])))
    assert np.array_equal(got.x[4].permute(1, 2, 0).numpy(), expect)
    assert any("2 images in val or test" in line for line in got.report)
    assert any(".txt" in line for line in got.report)

def test_unlabelled_grayscale_and_sizes(tmp_path):
    path = data_dir(tmp_path, {"a.png": data_png(0), "b.png": data_png(1, mode="L"), "notes.md": b"x"})
    got = data.load(path, cache=tmp_path / "cache")
    assert got.labels is None and got.classes == 0 and len(got) == 2
    assert np.array_equal(got.x[1].numpy(), np.stack([np.asarray(data_image(1, mode="L"))] * 3))
    assert any(line.startswith("1 grayscale") for line in got.report)
    assert any(".md" in line for line in got.report)
    data_folder(path, {"c.png": data_png(2, (20, 10))})
    got = data.load(path, size=4, cache=tmp_path / "cache")
    expect = data_image(2, (20, 10)).crop((5, 0, 15, 10)).resize((4, 4), Image.LANCZOS)
    assert np.array_equal(got.x[2].permute(1, 2, 0).numpy(), np.asarray(expect))
    assert any("20x10 (1)" in line for line in got.report)

@pytest.mark.parametrize("kind", ["python2", "python3", "folder", "binary", "binary-folder"])
def test_cifar10_as_published(tmp_path, kind):
    batches, folder = data_cifar(), "cifar-10-batches-bin" if "binary" in kind else "cifar-10-batches-py"
    if kind.startswith("binary"):
        files = {f"{folder}/data_batch_{i + 1}.bin": data_binary_batch(*b) for i, b in enumerate(batches)}
        files |= {f"{folder}/test_batch.bin": b"", f"{folder}/batches.meta.txt": b"airplane\n"}
    elif kind == "python3":
        files = {f"{folder}/data_batch_{i + 1}": pickle.dumps(
            {b"data": x.reshape(len(x), -1), b"labels": c}, protocol=2) for i, (x, c) in enumerate(batches)}
    else:
        files = {f"{folder}/data_batch_{i + 1}": data_batch(*b) for i, b in enumerate(batches)}
        files |= {f"{folder}/test_batch": b"", f"{folder}/batches.meta": b""}
    if "folder" in kind:
        path = data_folder(tmp_path, files) / folder
    else:
        path = data_tar(tmp_path / f"cifar-10-{kind}.tar.gz", files)
    got = data.load(path, cache=tmp_path / "cache")
    assert np.array_equal(got.x.numpy(), np.concatenate([x for x, _ in batches]))
    assert got.labels.tolist() == sum([c for _, c in batches], [])
    assert got.class_names[3] == "cat" and got.classes == 10
    small = data.load(path, size=16, cache=tmp_path / "cache")
    expect = Image.fromarray(batches[0][0][0].transpose(1, 2, 0)).resize((16, 16), Image.LANCZOS)
    assert np.array_equal(small.x[0].permute(1, 2, 0).numpy(), np.asarray(expect))

@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "fortran", "compressed"])
def test_npz_images(tmp_path, layout):
    x = np.random.RandomState(0).randint(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    stored = {"NHWC": x.transpose(0, 2, 3, 1), "fortran": np.asfortranarray(x)}.get(layout, x)
    path = tmp_path / "x.npz"
    save = np.savez_compressed if layout == "compressed" else np.savez
    save(path, images=stored, labels=np.array([0, 2, 1, 1, 0]))
    got = data.load(path, cache=tmp_path / "cache")
    assert np.array_equal(got.x.numpy(), x) and got.labels.tolist() == [0, 2, 1, 1, 0] and got.classes == 3
    assert data.load(data_npz(tmp_path / "u.npz", images=x), cache=tmp_path / "cache").labels is None

def test_npz_latents(tmp_path):
    z = (np.random.RandomState(0).randn(20, 4, 8, 8) * 3 + 1).astype(np.float16)
    got = data.load(data_npz(tmp_path / "z.npz", latents=z), cache=tmp_path / "cache")
    assert got.kind == "latent" and got.x.dtype == torch.float16 and np.array_equal(got.x.numpy(), z)
    np.testing.assert_allclose(got.mean, z.astype(float).mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(got.std, z.astype(float).std((0, 2, 3)), rtol=1e-6)
    stored = dict(mean=np.arange(4.0), std=np.arange(1.0, 5))
    got = data.load(data_npz(tmp_path / "s.npz", latents=z, **stored), cache=tmp_path / "cache")
    assert got.mean.tolist() == [0, 1, 2, 3] and got.std.tolist() == [1, 2, 3, 4]

def test_cache_is_used_checked_and_renewed(tmp_path, monkeypatch, recwarn):
    path, cache = data_folder(tmp_path / "d", DATA_CLASSES), tmp_path / "cache"
    first = data.load(path, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(data, "_decode_one", None)                # a second decoding would fail
        again = data.load(path, cache=cache)
    assert torch.equal(first.x, again.x) and again.report == first.report
    assert again.fingerprint == first.fingerprint
    before = again.x.clone()
    again.x[0] = 0                                              # writes stay in memory
    file = next(cache.glob("*/x.npy"))
    content = bytearray(file.read_bytes())
    for damage in (lambda c: c[:-100], lambda c: c[:200] + bytes([c[200] ^ 1]) + c[201:], lambda c: b"junk"):
        file.write_bytes(damage(bytes(content)))
        assert torch.equal(data.load(path, cache=cache).x, before)
        file = next(cache.glob("*/x.npy"))
    (path / "ant/0.png").write_bytes(data_png(55))              # other content: another entry
    assert not torch.equal(data.load(path, cache=cache).x, before)
    assert not list(cache.glob("unfinished*")) and len(list(cache.iterdir())) == 2
    assert not [w for w in recwarn if "writable" in str(w.message)]

# ---------------------------------------------------------------------------------------------------------
# Bad and hostile input: one line that names the file; nothing runs, nothing is left in the cache.
class DataPayload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)

def data_dir(path, files):
    return data_folder(path / "d", files)

def data_raw_npz(path, name, header, body=b""):
    """An .npz whose one member has any header."""
    path = path / "x.npz"
    text = repr(header).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.npy", member)
    return path

def data_bomb_png(width, height):
    """A PNG that claims width x height pixels."""
    content = bytearray(data_png())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)

def data_link_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("a/link.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
        archive.writestr("a/0.png", data_png())
    return path

def data_cifar_with(path, batch):
    good = data_batch(*data_cifar()[0])
    return data_dir(path, {"data_batch_1": good, "data_batch_2": batch, "test_batch": b""})

DATA_X, DATA_Z = np.zeros((4, 3, 8, 8), np.uint8), np.zeros((4, 4, 8, 8), np.float32)
DATA_C, DATA_L = data_cifar()[0]
DATA_GIANT = dict(descr="|u1", fortran_order=False, shape=(10 ** 6, 3, 1024, 1024))
DATA_BAD = {                    # name: (how it is made under tmp_path, what the message says)
    "missing": (lambda p: p / "nothing", "nothing: no such"),
    "empty folder": (lambda p: data_folder(p, {}), "no images"),
    "folder of other files": (lambda p: data_dir(p, {"a/x.txt": b"x"}), "no images"),
    "image file": (lambda p: data_folder(p, {"x.png": data_png()}) / "x.png", "known kind"),
    "text file": (lambda p: data_folder(p, {"x.csv": b"1,2"}) / "x.csv", "known kind"),
    "unreadable image": (lambda p: data_dir(p, {"a/0.png": data_png(), "a/1.png": b"no"}), "a/1.png is not"),
    "truncated image": (lambda p: data_dir(p, {"a/0.png": data_png(0, (64, 64))[:3000]}), "a/0.png is not"),
    "empty image": (lambda p: data_dir(p, {"a/0.png": b""}), "a/0.png is not"),
    "sizes differ": (lambda p: data_dir(p, {"a/0.png": data_png(), "a/1.png": data_png(0, (9, 8))}),
        "--size"),
    "beside classes": (lambda p: data_dir(p, {"0.png": data_png(), "a/1.png": data_png()}), "beside"),
    "pixel bomb": (lambda p: data_dir(p, {"a/0.png": data_bomb_png(50_000, 50_000)}),
        "50000x50000|exceeds limit"),
    "mild pixel bomb": (lambda p: data_dir(p, {"a/0.png": data_bomb_png(10_000, 10_000)}), "10000x10000"),
    "zip path outside": (lambda p: data_zip(p / "x.zip", {"../a.png": data_png()}), "outside"),
    "zip absolute": (lambda p: data_zip(p / "x.zip", {"/tmp/a.png": data_png()}), "outside"),
    "zip drive": (lambda p: data_zip(p / "x.zip", {"C:\\a\\a.png": data_png()}), "outside"),
    "zip link": (lambda p: data_link_zip(p / "x.zip"), "link"),
    "zip empty": (lambda p: data_zip(p / "x.zip", {}), "no images"),
    "zip that is not": (lambda p: data_folder(p, {"x.zip": b"PK junk"}) / "x.zip", "x.zip: cannot be read"),
    "zip truncated": (lambda p: data_folder(p, {"x.zip": data_zip(p / "y.zip",
        DATA_CLASSES).read_bytes()[:-60]})
                      / "x.zip", "x.zip: cannot be read"),
    "zip member damaged": (lambda p: data_folder(p, {"x.zip": data_zip(p / "y.zip",
        {"a.png": data_png()}).read_bytes()
                           .replace(b"IDAT", b"JUNK")}) / "x.zip", "a.png"),
    "tar without batches": (lambda p: data_tar(p / "x.tar.gz", {"a.png": data_png()}), "no CIFAR-10"),
    "tar that is not": (lambda p: data_folder(p, {"x.tar.gz": b"junk"}) / "x.tar.gz",
        "x.tar.gz: cannot be read"),
    "cifar payload": (lambda p: data_cifar_with(p, pickle.dumps({"data": DataPayload(p / "ran")})), "run"),
    "cifar payload as labels": (lambda p: data_cifar_with(p, pickle.dumps(
        {"data": DATA_C.reshape(4, -1), "labels": DataPayload(p / "ran")}, protocol=2)), "run"),
    "cifar truncated": (lambda p: data_cifar_with(p, data_batch(DATA_C, DATA_L)[:5000]), "data_batch_2"),
    "cifar not a pickle": (lambda p: data_cifar_with(p, b"junk"), "data_batch_2"),
    "cifar a list": (lambda p: data_cifar_with(p, pickle.dumps([1, 2])), "data_batch_2"),
    "cifar foreign class": (lambda p: data_cifar_with(p, data_batch(DATA_C, [0, 1, 2, 10])), "0 to 9"),
    "cifar labels missing": (lambda p: data_cifar_with(p, data_batch(DATA_C, [0, 1])), "2 labels"),
    "cifar without data": (lambda p: data_cifar_with(p, data_batch(DATA_C, DATA_L, b"fine")), "data"),
    "cifar 16x16": (lambda p: data_cifar_with(p, data_batch(DATA_C[:, :, :16], DATA_L)), "3072"),
    "cifar objects": (lambda p: data_cifar_with(p, data_batch(DATA_C, DATA_L, dtype=b"O8")), "3072"),
    "cifar binary length": (lambda p: data_dir(p, {"data_batch_1.bin": bytes(3072)}), "3,073"),
    "cifar binary class": (lambda p: data_dir(p, {"data_batch_1.bin": b"\x0b" + bytes(3072)}), "0 to 9"),
    "npz of statistics": (lambda p: data_npz(p, mu=np.zeros(3), sigma=np.eye(3)), "mu, sigma"),
    "npz that is not": (lambda p: data_folder(p, {"x.npz": b"junk"}) / "x.npz", "x.npz: cannot be read"),
    "npz float images": (lambda p: data_npz(p, images=DATA_X.astype(np.float32)), "float32"),
    "npz shape": (lambda p: data_npz(p, images=DATA_X[:, :2]), r"\[4, 2, 8, 8\]"),
    "npz no images": (lambda p: data_npz(p, images=DATA_X[:0]), r"\[0, 3, 8, 8\]"),
    "npz objects": (lambda p: data_npz(p, images=np.array([DataPayload(p / "ran")], object)), "objects"),
    "npz terabytes": (lambda p: data_raw_npz(p, "images", DATA_GIANT, bytes(100)), "100 bytes"),
    "npz negative shape": (lambda p: data_raw_npz(p, "images", DATA_GIANT | dict(shape=(-1, 3, 8, -8)),
                           bytes(192)), "x.npz"),
    "npz header": (lambda p: data_raw_npz(p, "images", "__import__('os').mkdir('ran')"), "x.npz"),
    "npz labels short": (lambda p: data_npz(p, images=DATA_X, labels=np.arange(3)), "labels"),
    "npz labels float": (lambda p: data_npz(p, images=DATA_X, labels=np.zeros(4)), "labels"),
    "npz labels negative": (lambda p: data_npz(p, images=DATA_X, labels=np.array([0, 1, -1, 0])), "-1"),
    "npz labels giant": (lambda p: data_npz(p, images=DATA_X, labels=np.array([0, 1, 2 ** 40, 0])), "labels"),
    "npz labels objects": (lambda p: data_npz(p, images=DATA_X, labels=np.array([None] * 4)), "objects"),
    "latents NaN": (lambda p: data_npz(p, latents=DATA_Z * np.nan), "NaN"),
    "latents infinite": (lambda p: data_npz(p, latents=DATA_Z + np.inf), "NaN"),
    "latents integers": (lambda p: data_npz(p, latents=DATA_Z.astype(int)), "int64"),
    "latents std zero": (lambda p: data_npz(p, latents=DATA_Z, mean=np.zeros(4), std=np.zeros(4)), "std"),
    "latents mean shape": (lambda p: data_npz(p, latents=DATA_Z, mean=np.zeros(3), std=np.ones(3)), "mean"),
}

@pytest.mark.parametrize("name", DATA_BAD)
def test_bad_data_is_refused_in_one_line(tmp_path, monkeypatch, capsys, name):
    make, says = DATA_BAD[name]
    monkeypatch.setenv("DATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    path = make(tmp_path / "in")
    with warnings.catch_warnings(), pytest.raises(data.DataError, match=says) as caught:
        warnings.simplefilter("error")
        data.load(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value) and len(str(caught.value)) < 600
    assert not (tmp_path / "in/ran").exists() and not (tmp_path / "ran").exists()
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())
    with pytest.raises(SystemExit) as stop:
        data.main([str(path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")

def test_bytes_flipped_never_end_in_another_exception(tmp_path):
    files = [data_zip(tmp_path / "x.zip", DATA_CLASSES),
             data_npz(tmp_path / "x.npz", images=DATA_X, labels=np.arange(4)),
             data_folder(tmp_path / "py", {"data_batch_1": data_batch(DATA_C[:1], [1])}) / "data_batch_1"]
    random = np.random.RandomState(0)
    for file in files:
        content = file.read_bytes()
        for _ in range(30):
            bad = bytearray(content)
            for position in random.randint(0, min(len(bad), 400), 3) * random.choice([1, -1]):
                bad[position] = random.randint(256)
            file.write_bytes(bad)
            try:
                data.load(file.parent if "py" in str(file) else file, cache=tmp_path / "cache")
            except data.DataError as error:
                assert "\n" not in str(error)

# ---------------------------------------------------------------------------------------------------------
# Pruning.
def test_gaussian_score_is_the_shrunk_log_density():
    random = np.random.RandomState(0)
    for n, d in ((300, 6), (5, 12)):                            # also fewer examples than dimensions
        x = random.randn(n, d) @ random.randn(d, d)
        S = np.cov(x.T, bias=True)
        tr, tr2 = np.trace(S), np.trace(S @ S)
        rho = min(1, ((1 - 2 / d) * tr2 + tr ** 2) / ((n + 1 - 2 / d) * (tr2 - tr ** 2 / d)))
        expect = multivariate_normal(x.mean(0), (1 - rho) * S + rho * tr / d * np.eye(d)).logpdf(x)
        got = data.prune_scores(torch.from_numpy(x), None, "gaussian")
        np.testing.assert_allclose(got, expect, rtol=1e-4, atol=1e-3)

def test_knn_and_moderate_scores_by_definition():
    random = np.random.RandomState(1)
    x, labels = random.randn(2100, 5).astype(np.float32) + 20, np.arange(2100) % 3 == 0     # blocks of 1,024
    knn, moderate = [data.prune_scores(torch.from_numpy(x), torch.from_numpy(labels).long(), s, k=4)
                     for s in ("knn", "moderate")]
    for c in (0, 1):
        group = x[labels == c].astype(np.float64)
        distance = np.sort(np.linalg.norm(group[:, None] - group[None], axis=2), axis=1)
        np.testing.assert_allclose(knn[labels == c], -distance[:, 4], rtol=1e-3)    # 0 is the point itself
        middle = np.linalg.norm(group - np.sort(group, 0)[(len(group) - 1) // 2], axis=1)
        expect = -abs(middle - np.sort(middle)[(len(middle) - 1) // 2])
        np.testing.assert_allclose(moderate[labels == c], expect, atol=1e-4)

def test_scores_keep_the_core_or_the_middle_shell():
    random = np.random.RandomState(2)
    core, outliers = random.randn(80, 8) * 0.1, random.randn(20, 8) * 5
    x = torch.from_numpy(np.concatenate([outliers, core]))
    for score in ("gaussian", "knn"):
        assert data.prune(x, None, 0.8, score).tolist() == list(range(20, 100))
    direction = random.randn(300, 8)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    radius = np.repeat([1.0, 3.0, 9.0], 100)                    # the median distance is the middle shell's
    kept = data.prune(torch.from_numpy(direction * radius[:, None]), None, 1 / 3, "moderate")
    assert set(kept.tolist()) == set(range(100, 200))

@pytest.mark.parametrize("score", ["gaussian", "knn", "moderate", "random"])
def test_kept_counts_are_exact_by_class(score):
    counts = [50, 33, 17, 1, 2]
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    labels = labels[torch.randperm(103, generator=data.stream(0, 0, ""))]
    x = torch.randn(103, 4, generator=data.stream(0, 1, ""))
    for keep, expect in ((1.0, counts), (0.1, [4, 3, 1, 1, 1]), (0.5, [25, 17, 8, 1, 1]), (1e-6, [1] * 5)):
        kept = data.prune(x, labels, keep, score)
        assert torch.bincount(labels[kept]).tolist() == expect, keep
        assert kept.dtype == torch.int64 and torch.equal(kept, kept.unique())
    for keep in (0, -1, 1.5, math.nan):
        with pytest.raises(data.DataError, match="--keep"):
            data.prune(x, labels, keep, score)

def test_largest_remainder_against_apportionment_by_hand():
    random = np.random.RandomState(3)
    for _ in range(50):
        counts = random.randint(20, 400, 12)
        keep = random.uniform(0.1, 1)
        exact, quota = counts * keep, np.floor(counts * keep)
        for c in np.argsort(quota - exact)[:round(counts.sum() * keep) - int(quota.sum())]:
            quota[c] += 1
        labels = torch.from_numpy(np.repeat(np.arange(12), counts))
        kept = data.prune(torch.zeros(len(labels), 1), labels, keep, "random")
        assert torch.bincount(labels[kept]).tolist() == quota.tolist()

def test_prune_refuses_what_it_cannot_score():
    x = torch.zeros(4, 2)
    for features, labels, score in ((x * math.nan, None, "knn"), (x, torch.zeros(3).long(), "knn"),
                                    (x, None, "best"), (x[0], None, "knn")):
        with pytest.raises(data.DataError):
            data.prune(features, labels, 0.5, score)
    assert len(data.prune(x, None, 0.5, "gaussian")) == 2       # all alike is no error

def test_pixel_features_are_principal_components():
    dataset = data_set(60)
    small = dataset.take(torch.arange(60)).reshape(60, -1).double().numpy()     # 8x8 is the grid itself
    small = small - small.mean(0)
    u, s, _ = np.linalg.svd(small, full_matrices=False)
    got = data.pixel_features(dataset, 5).double().numpy()
    np.testing.assert_allclose(np.abs(got), np.abs(u[:, :5] * s[:5]), atol=1e-3)

def test_long_tail_counts():
    labels = torch.arange(1000) % 5
    kept = data.long_tail(labels, 16, seed=1)
    assert torch.bincount(labels[kept]).tolist() == [200, 100, 50, 25, 12]
    assert torch.equal(kept, kept.unique()) and len(data.long_tail(labels, 1)) == 1000
    assert not torch.equal(kept, data.long_tail(labels, 16, seed=2))
    with pytest.raises(data.DataError, match="--imbalance"):
        data.long_tail(labels, 0.5)

# ---------------------------------------------------------------------------------------------------------
# Class weights.
def test_dro_update_by_hand():
    alpha = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    excess, labels = torch.tensor([0.4, -1.0, 0.8, 2.0]), torch.tensor([0, 0, 0, 2])
    got = data.dro_update(alpha.log(), excess, labels, eta=0.7, smoothing=0.01).exp()
    raw = [0.5 * math.exp(0.7 * (0.4 + 0 + 0.8) / 3), 0.3, 0.2 * math.exp(0.7 * 2.0)]      # class 1 is absent
    expect = [0.99 * a / sum(raw) + 0.01 / 3 for a in raw]
    np.testing.assert_allclose(got, expect, atol=1e-6)
    assert abs(float(got.sum()) - 1) < 1e-9
    plain = data.dro_update(alpha.log(), excess, labels, 0.7, 0).exp()
    np.testing.assert_allclose(plain, np.array(raw) / sum(raw), atol=1e-6)
    assert torch.isfinite(data.dro_update(alpha.log(), excess * math.nan, labels, 0.7, 0.01)).all()

def test_dro_weights_neither_collapse_nor_drift():
    generator, log_alpha, path = torch.Generator().manual_seed(0), torch.full((4,), -math.log(4)).double(), []
    for under_fitted, low, high in ((0.0, 0.95, 1.05), (0.5, 1.2, 4.0)):
        log_alpha, path = torch.full((4,), -math.log(4)).double(), []
        for _ in range(2000):
            labels = torch.randint(4, (64,), generator=generator)
            excess = 0.05 * torch.randn(64, generator=generator) + under_fitted * (labels == 3)
            log_alpha = data.dro_update(log_alpha, excess, labels, eta=0.01, smoothing=1e-3)
            path.append(log_alpha.exp())
        mean = torch.stack(path).mean(0) * 4
        assert low < mean[3] < high and (mean > 0.01).all() and (log_alpha.exp() > 2e-4).all()
        assert under_fitted or (abs(mean - 1) < 0.05).all()

# ---------------------------------------------------------------------------------------------------------
# Files of kept indices and the command line.
def test_command_line_prunes_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATA_CACHE", str(tmp_path / "cache"))
    path, out, show = data_folder(tmp_path / "d", DATA_CLASSES), tmp_path / "keep.npy", tmp_path / "c.png"
    half = [str(path), "--keep", "0.5", "--out", str(out)]
    data.main([*half, "--prune", "knn", "--k", "1", "--show", str(show)])
    dataset = data.load(path)
    expect = data.prune(data.pixel_features(dataset), dataset.labels, 0.5, "knn", k=1)
    assert torch.equal(data.load_keep(out, 6), expect) and Image.open(show).width > 400
    assert "bee" in capsys.readouterr().out
    features = tmp_path / "f.npy"
    np.save(features, np.arange(6.0)[:, None])
    data.main([*half, "--prune", "moderate", "--features", str(features)])
    expect = data.prune(torch.arange(6.0)[:, None], dataset.labels, 0.5, "moderate")
    assert torch.equal(data.load_keep(out, 6), expect)
    data.main([str(path)])
    assert "6 images of 3x8x8" in capsys.readouterr().out
    bad = [["--keep", "0"], ["--keep", "1.1"], ["--prune", "best"], ["--keep", "0.5", "--k", "0"],
           ["--size", "0"], ["--keep", "0.5", "--features", str(tmp_path / "no.npy")],
           ["--keep", "0.5", "--out", str(tmp_path / "no/k.npy")]]
    for flags in bad:
        with pytest.raises(SystemExit) as stop:
            data.main([str(path), *flags])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "error: " in err.splitlines()[-1]
        assert flags[-2] in err or flags[-1] in err

def test_keep_files_are_checked(tmp_path):
    file = tmp_path / "keep.npy"
    for array in (np.array([0, 9]), np.array([-1]), np.array([0.5]), np.zeros((2, 2), int), np.zeros(0, int),
                  np.array([None])):
        np.save(file, array, allow_pickle=True)
        with pytest.raises(data.DataError, match="keep.npy"):
            data.load_keep(file, 9)
    for content in (b"", b"junk", b"\x93NUMPY\x01\x00\xff\xff"):
        file.write_bytes(content)
        with pytest.raises(data.DataError, match="keep.npy"):
            data.load_keep(file, 9)
    data.save_keep(file, torch.tensor([1, 3, 8]))
    assert data.load_keep(file, 9).tolist() == [1, 3, 8] and os.listdir(tmp_path) == ["keep.npy"]

def test_features_files_and_image_grid(tmp_path):
    file = tmp_path / "f.npy"
    for array in (np.zeros(4), np.zeros((3, 2)), np.zeros((4, 2), object)):
        np.save(file, array, allow_pickle=True)
        with pytest.raises(data.DataError, match="f.npy"):
            data.load_features(file, 4)
    np.save(file, np.asfortranarray(np.arange(8.0).reshape(4, 2)))
    assert data.load_features(file, 4).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    x = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8, generator=data.stream(0, 0, ""))
    grid = torch.from_numpy(np.array(data.image_grid(x, 3))).permute(2, 0, 1)   # [3, 2 x 4, 3 x 6]
    assert grid.shape == (3, 8, 18) and torch.equal(grid[:, 4:, 6:12], x[4])
    assert (grid[:, 4:, 12:] == 255).all()

def test_moved_latents_and_full_disk(tmp_path, monkeypatch):
    class Usage:
        free = 10
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(data.DataError, match="DATA_CACHE"):
        data.load(data_npz(tmp_path / "x.npz", images=DATA_X), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    dataset = data_set(kind="latent").to("cpu")
    assert dataset.take(torch.tensor([1])).shape == (1, 4, 8, 8)


# ------------------------------------------------------------------------------------------------------------
# fid.py: Fréchet distance, statistics, precision and recall

def _fid_features(seed, n, d, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(d)) / d ** 0.5
    return shift + scale * torch.randn(n, d, generator=generator) @ mixing


def _fid_naive_frechet(a, b):
    (mu_a, sigma_a), (mu_b, sigma_b) = ((np.mean(f.double().numpy(), 0), np.cov(f.double().numpy().T))
                                        for f in (a, b))
    root = scipy.linalg.sqrtm(sigma_a @ sigma_b).real
    return np.square(mu_a - mu_b).sum() + np.trace(sigma_a + sigma_b - 2 * root)


def test_frechet_equals_the_matrix_square_root_formula():
    a, b = _fid_features(0, 300, 24), _fid_features(1, 200, 24, shift=0.3, scale=1.5)
    assert fid.frechet_distance(a, b) == pytest.approx(_fid_naive_frechet(a, b), rel=1e-6)
    assert fid.frechet_distance(a.numpy(), b.numpy()) == pytest.approx(_fid_naive_frechet(a, b), rel=1e-6)


def test_frechet_of_a_set_with_itself_is_zero():
    for n in (500, 40):  # more and fewer samples than dimensions
        a = _fid_features(2, n, 64, scale=3.0)
        assert abs(fid.frechet_distance(a, a)) < 1e-3
        assert abs(fid.frechet_from_stats(a.mean(0), torch.cov(a.T), a.mean(0), torch.cov(a.T))) < 1e-3


def test_frechet_of_two_gaussians_is_the_closed_form():
    mu, s = np.array([1.0, -2.0, 0.5]), np.array([1.0, 2.0, 0.25])  # diagonal: sum (ds)^2 + |dmu|^2
    t = np.array([0.5, 3.0, 0.0])  # one dimension without variance
    expected = np.square(mu).sum() + np.square(s - t).sum()
    turn = scipy.linalg.expm(np.array([[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]))  # rotation changes no distance
    sigma_s, sigma_t = (turn @ np.diag(v ** 2) @ turn.T for v in (s, t))
    result = fid.frechet_from_stats(mu, sigma_s, mu * 0, sigma_t)
    assert result == pytest.approx(expected, rel=1e-6)
    swapped = fid.frechet_from_stats(mu * 0, np.diag(t ** 2), mu, np.diag(s ** 2))
    assert swapped == pytest.approx(expected, rel=1e-6)


def test_frechet_with_fewer_samples_than_dimensions_agrees_with_the_statistics():
    a, b = _fid_features(3, 30, 96), _fid_features(4, 25, 96, shift=0.5)
    by_stats = fid.frechet_from_stats(a.mean(0), torch.cov(a.double().T), b.mean(0), torch.cov(b.double().T))
    assert fid.frechet_distance(a, b) == pytest.approx(by_stats, rel=1e-4)


def test_stats_streaming_equals_numpy():
    features = _fid_features(5, 333, 16, shift=1e4)  # far from zero: raw sums would lose the covariance
    stats = fid.Stats()
    for part in features.split(50):
        stats.add(part)
    mu, sigma = stats.mean_cov()
    reference = features.double().numpy()
    assert np.allclose(mu.numpy(), reference.mean(0), rtol=1e-12)
    assert np.allclose(sigma.numpy(), np.cov(reference.T), rtol=1e-8, atol=1e-10)


def _fid_naive_share(points, centres, k):
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=2)
    radius = np.sort(distance, axis=1)[:, k]  # column 0 is the point itself
    return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radius)) for p in points])


def test_precision_recall_equals_the_naive_version():
    real, fake = _fid_features(6, 70, 5), _fid_features(7, 60, 5, shift=0.3, scale=0.7)
    for k in (1, 3):
        expected = (_fid_naive_share(fake.double().numpy(), real.double().numpy(), k),
                    _fid_naive_share(real.double().numpy(), fake.double().numpy(), k))
        assert fid.precision_recall(real, fake, k, block=16) == pytest.approx(expected)
        assert 0 < expected[1] < expected[0] < 1  # the case tells the two apart
    with pytest.raises(data.DataError, match="more than 3"):
        fid.precision_recall(real[:3], fake)


# ------------------------------------------------------------------------------------------------------------
# fid.py: the Inception network

def _fid_inception_state(seed=0):
    """Random weights with the names and shapes of the public file, written down again here."""
    rng, state = np.random.default_rng(seed), {}

    def conv(name, c_in, c_out, kh, kw=None):
        kw = kw or kh
        scale = (2 / (c_in * kh * kw)) ** 0.5
        weight = rng.standard_normal((c_out, c_in, kh, kw), np.float32) * np.float32(scale)
        state[f"{name}.conv.weight"] = torch.from_numpy(weight)
        for part, start, spread in (("weight", 1, 0.1), ("bias", 0, 0.1), ("running_mean", 0, 0.1)):
            noise = rng.standard_normal(c_out, np.float32)
            state[f"{name}.bn.{part}"] = torch.from_numpy((start + spread * noise).astype(np.float32))
        state[f"{name}.bn.running_var"] = torch.from_numpy(1 + rng.random(c_out, np.float32))
        return c_out
    conv("Conv2d_1a_3x3", 3, 32, 3), conv("Conv2d_2a_3x3", 32, 32, 3), conv("Conv2d_2b_3x3", 32, 64, 3)
    conv("Conv2d_3b_1x1", 64, 80, 1), conv("Conv2d_4a_3x3", 80, 192, 3)
    for name, c, pool in ("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64):
        conv(f"{name}.branch1x1", c, 64, 1), conv(f"{name}.branch_pool", c, pool, 1)
        conv(f"{name}.branch5x5_1", c, 48, 1), conv(f"{name}.branch5x5_2", 48, 64, 5)
        conv(f"{name}.branch3x3dbl_1", c, 64, 1), conv(f"{name}.branch3x3dbl_2", 64, 96, 3)
        conv(f"{name}.branch3x3dbl_3", 96, 96, 3)
    conv("Mixed_6a.branch3x3", 288, 384, 3), conv("Mixed_6a.branch3x3dbl_1", 288, 64, 1)
    conv("Mixed_6a.branch3x3dbl_2", 64, 96, 3), conv("Mixed_6a.branch3x3dbl_3", 96, 96, 3)
    for name, c in ("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192):
        conv(f"{name}.branch1x1", 768, 192, 1), conv(f"{name}.branch_pool", 768, 192, 1)
        conv(f"{name}.branch7x7_1", 768, c, 1), conv(f"{name}.branch7x7_2", c, c, 1, 7)
        conv(f"{name}.branch7x7_3", c, 192, 7, 1), conv(f"{name}.branch7x7dbl_1", 768, c, 1)
        conv(f"{name}.branch7x7dbl_2", c, c, 7, 1), conv(f"{name}.branch7x7dbl_3", c, c, 1, 7)
        conv(f"{name}.branch7x7dbl_4", c, c, 7, 1), conv(f"{name}.branch7x7dbl_5", c, 192, 1, 7)
    conv("Mixed_7a.branch3x3_1", 768, 192, 1), conv("Mixed_7a.branch3x3_2", 192, 320, 3)
    conv("Mixed_7a.branch7x7x3_1", 768, 192, 1), conv("Mixed_7a.branch7x7x3_2", 192, 192, 1, 7)
    conv("Mixed_7a.branch7x7x3_3", 192, 192, 7, 1), conv("Mixed_7a.branch7x7x3_4", 192, 192, 3)
    for name, c in ("Mixed_7b", 1280), ("Mixed_7c", 2048):
        conv(f"{name}.branch1x1", c, 320, 1), conv(f"{name}.branch_pool", c, 192, 1)
        conv(f"{name}.branch3x3_1", c, 384, 1), conv(f"{name}.branch3x3dbl_1", c, 448, 1)
        conv(f"{name}.branch3x3dbl_2", 448, 384, 3)
        for fork in "branch3x3_2", "branch3x3dbl_3":
            conv(f"{name}.{fork}a", 384, 384, 1, 3), conv(f"{name}.{fork}b", 384, 384, 3, 1)
    return {**state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


def _fid_naive_inception(state, images):
    """The same network, unfolded, as nested calls in float64."""
    def conv(name, x, stride=1, padding=0):
        weight, gamma, beta, mean, var = (state[f"{name}.{key}"].double() for key in (
            "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"))
        x = F.conv2d(x, weight, None, stride, padding)
        return F.relu(F.batch_norm(x, mean, var, gamma, beta, False, 0, 0.001))

    def mean(x):  # average over the pixels inside the picture
        ones = F.avg_pool2d(torch.ones_like(x), 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1) / ones
    x = F.interpolate(images.double() / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    x = conv("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", x, 2)), padding=1)
    x = conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", F.max_pool2d(x, 3, 2)))
    x = F.max_pool2d(x, 3, 2)
    for m in "Mixed_5b.", "Mixed_5c.", "Mixed_5d.":
        double = conv(m + "branch3x3dbl_2", conv(m + "branch3x3dbl_1", x), padding=1)
        five = conv(m + "branch5x5_2", conv(m + "branch5x5_1", x), padding=2)
        x = torch.cat([conv(m + "branch1x1", x), five, conv(m + "branch3x3dbl_3", double, padding=1),
                       conv(m + "branch_pool", mean(x))], 1)
    m = "Mixed_6a."
    double = conv(m + "branch3x3dbl_2", conv(m + "branch3x3dbl_1", x), padding=1)
    single, double = conv(m + "branch3x3", x, 2), conv(m + "branch3x3dbl_3", double, 2)
    x = torch.cat([single, double, F.max_pool2d(x, 3, 2)], 1)
    for m in "Mixed_6b.", "Mixed_6c.", "Mixed_6d.", "Mixed_6e.":
        single = conv(m + "branch7x7_2", conv(m + "branch7x7_1", x), padding=(0, 3))
        double = conv(m + "branch7x7dbl_2", conv(m + "branch7x7dbl_1", x), padding=(3, 0))
        for name, padding in ("3", (0, 3)), ("4", (3, 0)), ("5", (0, 3)):
            double = conv(m + "branch7x7dbl_" + name, double, padding=padding)
        x = torch.cat([conv(m + "branch1x1", x), conv(m + "branch7x7_3", single, padding=(3, 0)), double,
                       conv(m + "branch_pool", mean(x))], 1)
    m = "Mixed_7a."
    seven = conv(m + "branch7x7x3_2", conv(m + "branch7x7x3_1", x), padding=(0, 3))
    seven = conv(m + "branch7x7x3_4", conv(m + "branch7x7x3_3", seven, padding=(3, 0)), 2)
    x = torch.cat([conv(m + "branch3x3_2", conv(m + "branch3x3_1", x), 2), seven, F.max_pool2d(x, 3, 2)], 1)
    for m, pool in ("Mixed_7b.", mean), ("Mixed_7c.", lambda x: F.max_pool2d(x, 3, 1, 1)):
        one = conv(m + "branch3x3_1", x)
        two = conv(m + "branch3x3dbl_2", conv(m + "branch3x3dbl_1", x), padding=1)
        forks = [conv(m + name, y, padding=padding) for y, name, padding in (
            (one, "branch3x3_2a", (0, 1)), (one, "branch3x3_2b", (1, 0)),
            (two, "branch3x3dbl_3a", (0, 1)), (two, "branch3x3dbl_3b", (1, 0)))]
        x = torch.cat([conv(m + "branch1x1", x), *forks, conv(m + "branch_pool", pool(x))], 1)
    return x.mean((2, 3))


def test_inception_against_a_float64_recomputation(tmp_path):
    state = _fid_inception_state()
    torch.save(state, tmp_path / "weights.pth")
    net = fid.Inception(str(tmp_path / "weights.pth"))
    images = torch.randint(256, (1, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, expected = net(images), _fid_naive_inception(state, images)
    assert features.dtype == torch.float32 and features.shape == (1, 2048)
    assert (features - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("damage", ["missing", "shape", "foreign", "text", "absent"])
def test_inception_refuses_other_files(tmp_path, damage):
    path = tmp_path / "weights.pth"
    state = _fid_inception_state()
    if damage == "missing":
        del state["Mixed_6b.branch1x1.bn.bias"]
    elif damage == "shape":
        state["Mixed_7c.branch_pool.conv.weight"] = torch.zeros(192, 2048, 3, 3)
    if damage == "text":
        path.write_text("not a checkpoint")
    elif damage != "absent":
        torch.save([1, 2] if damage == "foreign" else state, path)
    with pytest.raises(model.CheckpointError, match="weights.pth") as caught:
        fid.Inception(str(path))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# fid.py: own features and the command line

def _fid_images(path, n=240, size=16, seed=0, classes=2, noise=40):
    """A labelled .npz: class c has horizontal or vertical stripes, so that a network can learn it."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    stripes = np.where(np.arange(size) // 2 % 2, 190, 60)
    images = np.where(labels[:, None, None, None] == 0, stripes[:, None], stripes[None, :])
    images = np.broadcast_to(images, (n, 3, size, size)) + noise * rng.standard_normal((n, 3, size, size))
    np.savez(path, images=images.clip(0, 255).astype(np.uint8), labels=labels)
    return str(path)


def _fid_classifier(path, classes=2, width=4, seed=0):
    torch.manual_seed(seed)
    net = fid.Classifier(classes, width)
    model.save(path, {"kind": "classifier", "width": width, "class_names": [str(c) for c in range(classes)],
                      "model": net.state_dict()})
    return net.eval()


def _fid_run(capsys, *argv):
    """(exit code, stdout, stderr without progress lines) of `python fid.py argv`."""
    try:
        code = fid.main([str(arg) for arg in argv])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    return code, out, "".join(line + "\n" for line in err.split("\n")[:-1] if "\r" not in line)


def test_fit_learns_and_its_file_is_read_back(tmp_path, capsys):
    path, checkpoint = _fid_images(tmp_path / "stripes.npz", 400), tmp_path / "own.pt"
    code, out, _ = _fid_run(capsys, "--fit", checkpoint, path, "--epochs", 6, "--width", 4, "--device", "cpu")
    assert code == 0
    stored = torch.load(checkpoint, weights_only=True)
    assert stored["accuracy"] >= 0.9 and f"{stored['accuracy']:.4f}" in out
    dataset = data.load(path)
    assert stored["data_fingerprint"] == dataset.fingerprint and len(stored["class_names"]) == 2
    net = fid.Classifier.load(str(checkpoint))
    with torch.no_grad():
        assert (net.logits(dataset.x).argmax(1) == dataset.labels).float().mean() >= 0.9


def test_classifier_round_trip_and_refusal(tmp_path):
    net = _fid_classifier(tmp_path / "own.pt")
    images = torch.randint(256, (5, 3, 24, 16), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(fid.Classifier.load(tmp_path / "own.pt")(images), net(images))
    model.save(tmp_path / "other.pt", {"kind": "denoiser", "model": {}})
    (tmp_path / "text.pt").write_text("no")
    for name in "other.pt", "text.pt", "absent.pt":
        with pytest.raises(model.CheckpointError, match=name):
            fid.Classifier.load(str(tmp_path / name))


def test_augment_shifts_and_flips_every_image_on_its_own():
    images = torch.randint(256, (64, 3, 9, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = fid._augment(images, torch.Generator().manual_seed(1), shift=2)
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="reflect")
    found = set()
    for image, result in zip(padded, out):
        windows = {(y, x, flip): image[:, y:y + 9, x:x + 11].flip([2] if flip else [])
                   for y in range(5) for x in range(5) for flip in (False, True)}
        matches = [key for key, window in windows.items() if torch.equal(window, result)]
        assert len(matches) == 1
        found.add(matches[0])
    assert len(found) > 20 and {flip for _, _, flip in found} == {False, True}


def test_score_line_is_reproducible_and_equals_a_direct_computation(tmp_path, capsys):
    net = _fid_classifier(tmp_path / "own.pt")
    real = _fid_images(tmp_path / "real.npz", 150)
    fake = _fid_images(tmp_path / "fake.npz", 120, seed=1, noise=70)
    own = f"own:{tmp_path / 'own.pt'}"
    command = [real, fake, "--features", own, "--batch", 37, "--device", "cpu"]
    code, out, err = _fid_run(capsys, *command)
    assert code == 0 and out == _fid_run(capsys, *command)[1]
    assert "only 150 real images: below 2048" in err and "biased upwards" in err
    with torch.no_grad():
        a, b = (net(data.load(path).x) for path in (real, fake))
    words = out.split()
    assert words[0] == "FD(own)" and "FID" not in out and "150 real, 120 fake, features own:" in out
    assert float(words[1]) == pytest.approx(_fid_naive_frechet(a, b), abs=2e-4)
    precision, recall = fid.precision_recall(a, b)
    assert words[2:6] == ["precision", f"{precision:.2f}", "recall", f"{recall:.2f}"]
    scorer = fid.Scorer(own)
    cached = scorer.summary(data.load(real))
    scores = scorer.score(cached, data.load(fake).x)
    assert scores["FD(own)"] == pytest.approx(float(words[1]), abs=1e-4) and scores["recall"] == recall


def test_statistics_files(tmp_path, capsys):
    _fid_classifier(tmp_path / "own.pt"), _fid_classifier(tmp_path / "else.pt", seed=1)
    real = _fid_images(tmp_path / "real.npz", 90)
    fake = _fid_images(tmp_path / "fake.npz", 90, seed=1, noise=70)
    own, stats = ("--features", f"own:{tmp_path / 'own.pt'}"), tmp_path / "stats.npz"
    assert _fid_run(capsys, real, "--save-stats", stats, *own)[0] == 0
    both, from_stats = _fid_run(capsys, real, fake, *own)[1], _fid_run(capsys, stats, fake, *own)[1]
    assert from_stats.split()[:2] == both.split()[:2] and "precision" not in from_stats
    code, out, err = _fid_run(capsys, stats, fake, "--features", f"own:{tmp_path / 'else.pt'}")
    assert (code, out) == (2, "") and err.startswith("error: ") and "own:" in err and err.count("\n") == 1
    rng = np.random.default_rng(0)  # files as pytorch-fid writes them: no network needed
    a, b = rng.standard_normal((50, 6)), 2 + rng.standard_normal((50, 6))
    for name, f in ("a", a), ("b", b):
        np.savez(tmp_path / f"{name}.npz", mu=f.mean(0), sigma=np.cov(f, rowvar=False))
    code, out, _ = _fid_run(capsys, tmp_path / "a.npz", tmp_path / "b.npz")
    expected = _fid_naive_frechet(torch.from_numpy(a), torch.from_numpy(b))
    assert out.split()[0] == "FID" and float(out.split()[1]) == pytest.approx(expected, abs=1e-4)


def test_cached_features_are_computed_once_per_data_and_network(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_CACHE", str(tmp_path / "cache"))
    _fid_classifier(tmp_path / "a.pt"), _fid_classifier(tmp_path / "b.pt", seed=1)
    dataset = data.load(_fid_images(tmp_path / "real.npz", 50))
    first, second = (fid.Scorer(f"own:{tmp_path / name}") for name in ("a.pt", "b.pt"))
    features = fid.cached_features(first, dataset)
    assert torch.equal(features, first.features(dataset))
    assert torch.equal(fid.cached_features(second, dataset), second.features(dataset))
    with monkeypatch.context() as patched:  # the second time no network runs
        patched.setattr(fid.Scorer, "features", None)
        assert torch.equal(fid.cached_features(first, dataset), features)
    for path in (tmp_path / "cache").glob("features-*.npy"):
        path.write_bytes(path.read_bytes()[:200])
    assert torch.equal(fid.cached_features(first, dataset), features)
    assert fid.features_id(f"own:{tmp_path / 'a.pt'}") == first.id != second.id


def test_pixels_are_area_averages_of_images_and_latents():
    images = torch.randint(256, (4, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scorer = fid.Scorer("pixels")
    expected = images.double().reshape(4, 3, 8, 2, 8, 3).mean((3, 5)).flatten(1) / 127.5 - 1
    assert torch.allclose(scorer.features(images).double(), expected, atol=1e-6)
    latents = torch.randn(4, 4, 8, 8)
    assert torch.equal(scorer.features(latents), latents.flatten(1)) and scorer.name == "FD(pixels)"


def test_noise_floor_features_and_num(tmp_path, capsys):
    net = _fid_classifier(tmp_path / "own.pt")
    path, own = _fid_images(tmp_path / "real.npz", 101), ("--features", f"own:{tmp_path / 'own.pt'}")
    with torch.no_grad():
        features = net(data.load(path).x)
    code, out, _ = _fid_run(capsys, path, "--noise-floor", *own)
    expected = _fid_naive_frechet(features[::2], features[1::2])
    assert code == 0 and float(out.split()[3]) == pytest.approx(expected, abs=2e-4)
    assert _fid_run(capsys, path, "--save-features", tmp_path / "f.npy", *own)[0] == 0
    saved = np.load(tmp_path / "f.npy", allow_pickle=False)
    assert saved.dtype == np.float32 and np.allclose(saved, features, atol=1e-5)
    assert "(50 real, 50 fake" in _fid_run(capsys, path, path, "--num", 50, *own)[1]


@pytest.mark.parametrize("argv, message", [
    (["absent", "real.npz"], "absent"),
    (["real.npz"], "paths"),
    (["real.npz", "real.npz", "real.npz"], "paths"),
    (["real.npz", "real.npz", "--features", "vgg"], "--features"),
    (["real.npz", "real.npz", "--features", "own:absent.pt"], "absent.pt"),
    (["real.npz", "real.npz", "--inception-weights", "absent.pth"], "absent.pth"),
    (["real.npz", "real.npz", "--device", "cuda:77"], "--device"),
    (["real.npz", "real.npz", "--batch", "0"], "--batch"),
    (["real.npz", "--noise-floor", "--save-features", "x.npy"], "--noise-floor"),
    (["broken.npz", "real.npz"], "broken.npz"),
    (["latents.npz", "latents.npz", "--features", "own:own.pt"], "uint8"),
    (["real.npz", "--fit", "new.pt", "--epochs", "0"], "--epochs"),
    (["unlabelled.npz", "--fit", "new.pt"], "--fit"),
    (["real.npz", "--save-stats", "absent/stats.npz", "--features", "own:own.pt"], "absent/stats.npz"),
    (["--compare", "absent"], "absent"),
])
def test_command_line_errors_are_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    _fid_images("real.npz", 30), _fid_classifier("own.pt")
    np.savez("broken.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    np.savez("latents.npz", latents=np.random.default_rng(0).standard_normal((8, 4, 8, 8)).astype(np.float32))
    np.savez("unlabelled.npz", images=np.zeros((30, 3, 8, 8), np.uint8))
    before = set(os.listdir("."))
    code, out, err = _fid_run(capsys, *argv)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert set(os.listdir(".")) - before <= {"cache"}


def test_no_network_and_no_weights_names_the_way_out(tmp_path, monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise OSError("network is unreachable")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv("FID_INCEPTION_WEIGHTS", raising=False)
    path = _fid_images(tmp_path / "real.npz", 30)
    code, _, err = _fid_run(capsys, path, path)
    assert code == 2 and "--features" in err and err.count("\n") == 1
    cached = tmp_path / "hub" / "checkpoints" / os.path.basename(fid.WEIGHTS_URL)
    cached.write_bytes(b"half a download")
    assert "checksum" in _fid_run(capsys, path, path)[2]


# ------------------------------------------------------------------------------------------------------------
# fid.py: metrics of the tree

class _FidFlatTree:
    """Log-density -2 - |x|: hits are the points within 0.12 of the origin."""

    def logp(self, x, sigma):
        return -2 - x.norm(dim=1)


def test_hit_and_coverage_against_loops():
    points = 0.12 * torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))
    points = torch.cat([points, torch.tensor([[1.6, 0.0], [0.0, -40.0]])])  # outside the grid
    hits = [bool(p.norm() <= 0.12) for p in points]
    reached, cells_hit = set(), set()
    for (x, y), is_hit in zip(points.tolist(), hits):
        if abs(x) < 1.5 and abs(y) < 1.5:
            cell = (int((x + 1.5) // (3 / 101)), int((y + 1.5) // (3 / 101)))
            reached.add(cell)
            cells_hit |= {cell} if is_hit else set()
    assert fid.hit(points, _FidFlatTree()) == pytest.approx(np.mean(hits), abs=1e-3)
    assert fid.coverage(points, _FidFlatTree()) == pytest.approx(len(cells_hit) / len(reached), abs=0.02)
    both = fid.tree_metrics(points, _FidFlatTree(), points[:50] + torch.tensor([3.0, 4.0]))
    assert both["l2"] == pytest.approx(5) and both["hit"] == fid.hit(points, _FidFlatTree())
    assert both["coverage"] == fid.coverage(points, _FidFlatTree())
    assert fid.coverage(torch.full((4, 2), 9.0), _FidFlatTree()) == 0


def test_score_error_is_zero_for_the_exact_denoiser_and_the_closed_form_for_a_biased_one():
    tree = data.Tree("A")
    assert fid.score_error(tree.denoise, tree, n=256) == 0

    def biased(x, sigma, labels=None):  # off by c_out: lambda c_out^2 = 1, so the error is exactly 1
        c_out = (sigma * 0.5 / (sigma ** 2 + 0.25).sqrt())[:, None]
        return tree.denoise(x, sigma) + c_out
    assert fid.score_error(biased, tree, n=256) == pytest.approx(1, rel=1e-4)


def test_exact_endpoints_reach_the_density():
    tree, noise = data.Tree("A"), torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    endpoints = fid.exact_endpoints(tree, noise)
    assert endpoints.shape == (256, 2) and fid.hit(endpoints, tree) > 0.97


# ------------------------------------------------------------------------------------------------------------
# fid.py: comparing runs

def _fid_write_run(folder, seed, records, **config):
    os.makedirs(folder, exist_ok=True)
    config = {"data_fingerprint": "d", "kind": "tree", "channels": 64, "size": 2, "features_id": None,
              "seed": seed, "selector": "uniform", "batch": 10, "out": str(folder), **config}
    (folder / "config.json").write_text(json.dumps(config))
    records = [{"kind": "train", "step": 1, "loss": 0.5}] + [{"kind": "eval", **r} for r in records]
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (folder / "log.jsonl").write_text(lines + '{"kind": "eval", "st')  # the last line is torn
    return str(folder)


def _fid_records(rate, steps, hit, seconds=0.01, reference=0.0, guided=True):
    """hit grows by `hit` a step, guided twice as fast."""
    return [{"step": s, "seconds": s * seconds, "select_seconds": s * seconds * rate, "guidance": w,
             "reference_seconds": reference, "eval_seconds": 1, "examples_trained": 10 * s,
             "examples_seen": 10 * s, "hit": w * hit * s}
            for s in steps for w in ((1, 2) if guided else (1,))]


def _fid_rows(table):
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


def test_compare_interpolates_exactly_and_counts_reference_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [_fid_write_run(tmp_path / f"uniform-s{s}", s, _fid_records(0, (10, 20, 50), 0.001 * (1 + s)))
            for s in range(3)]  # up to 500 examples, 0.5 s
    runs += [_fid_write_run(tmp_path / f"ajest-seed{s}", s, _fid_records(0.25, (10, 40), 0.002, 0.02, 0.1),
                            selector="ajest", guide=f"guides/g-s{s}/last.pt") for s in (0, 1)]  # 400; 0.9 s
    code, out, _ = _fid_run(capsys, "--compare", *runs, "--out", "c.png")
    assert code == 0
    rows = _fid_rows(out)
    head = ["arm", "runs", "hit", "hit, guided", "selection", "ms/step"]
    assert rows[0] == head and rows[5 - 1] == head
    # 400 examples: step 40, between the evaluations at 20 and 50 of the uniform arm
    assert rows[2] == ["uniform", "3", "0.0800 ± 0.0400", "0.160 ± 0.080", "0%", "10"]
    assert rows[3] == ["ajest", "2", "0.0800 ± 0.0000", "0.160 ± 0.000", "25%", "20"]
    # 0.5 s: uniform at step 50, AJEST at step 20 because the reference took 0.1 s
    assert rows[6] == ["uniform", "3", "0.100 ± 0.050", "0.200 ± 0.100", "0%", "10"]
    assert rows[7] == ["ajest", "2", "0.0400 ± 0.0000", "0.0800 ± 0.0000", "25%", "20"]
    assert "At 400 examples trained" in out and "At 0.5 seconds" in out
    with Image.open("c.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert {tuple(bytes.fromhex(c[1:])) for c in fid.COLORS[:2]} <= colors  # both arms are drawn


def test_compare_refuses_what_cannot_be_compared(tmp_path, capsys):
    a = _fid_write_run(tmp_path / "a-s0", 0, _fid_records(0, (10, 20), 0.01))
    for key, value in {"data_fingerprint": "e", "features_id": "x", "channels": 32, "kind": "image"}.items():
        b = _fid_write_run(tmp_path / f"b-{key}", 0, _fid_records(0, (10, 20), 0.01), **{key: value})
        code, out, err = _fid_run(capsys, "--compare", a, b, "--out", tmp_path / "c.png")
        assert (code, out) == (2, "") and key in err and err.count("\n") == 1
    late = _fid_write_run(tmp_path / "late-s0", 0, _fid_records(0, (30, 40), 0.01))
    code, _, err = _fid_run(capsys, "--compare", a, late, "--out", tmp_path / "c.png")
    assert code == 2 and "in common" in err and err.count("\n") == 1
    empty = _fid_write_run(tmp_path / "empty", 0, [])
    assert "no evaluations" in _fid_run(capsys, "--compare", a, empty)[2]
    assert "--metric" in _fid_run(capsys, "--compare", a, "--metric", "beauty")[2]
    assert not (tmp_path / "c.png").exists()


# ------------------------------------------------------------------------------------------------------------
# Stopping anywhere: kills, signals, a torn log, a full disk; the same command again ends in the same bits.


TIMES = {"seconds", "select_seconds", "eval_seconds", "reference_seconds", "examples_per_second"}
ROBUST_TREE = [*TINY, "--device", "cpu"]
ROBUST_IMAGES = ["--size", "8", "--channels", "8", "--batch", "4", "--guide-channels", "8",
                 "--guide-batch", "4", "--guide-steps", "2", "--steps", "2", "--eval-samples", "4",
                 "--sampling-steps", "2", "--log-every", "1", "--metrics", "pixels", "--device", "cpu"]


def _robust_log(run):
    """The lines of log.jsonl without what a clock decides."""
    lines = (Path(run) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def _robust_start(flags):
    return subprocess.Popen([sys.executable, "train.py", *flags], cwd=HERE, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)


def _robust_same(a, b):
    """Two run folders hold the same stages, weights, EMAs, optimizer, class weights and log."""
    stages = sorted(path.parent.relative_to(a) for path in Path(a).rglob("checkpoint.pt"))
    assert stages == sorted(path.parent.relative_to(b) for path in Path(b).rglob("checkpoint.pt"))
    for stage in stages:
        _same_run(Path(a) / stage, Path(b) / stage)
        assert _robust_log(Path(a) / stage) == _robust_log(Path(b) / stage)
        weights = [Path(run) / stage / "class_weights.json" for run in (a, b)]
        classes = [json.loads(w.read_text())["classes"] if w.exists() else None for w in weights]
        assert classes[0] == classes[1]


def _robust_killed(flags, out, kills, seconds, seed=0):
    """Run `flags` into `out`, SIGKILL at random moments, then to the end; -> the kills that hit."""
    random_time, hit, config = random.Random(seed), 0, Path(out) / "config.json"
    while True:
        before = config.stat().st_mtime_ns if config.exists() else 0
        process = _robust_start([*flags, "--out", str(out)])
        while hit < kills and process.poll() is None and (
                not config.exists() or config.stat().st_mtime_ns == before):
            time.sleep(0.01)
        if hit < kills:
            time.sleep(random_time.uniform(0, seconds))
        if hit < kills and process.poll() is None:
            process.kill()
            process.communicate()
            hit += 1
            continue
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
        return hit


ROBUST_ARMS = {"uniform": [], "ajest": ["--selector", "ajest", "--early-steps", "170"],
               "dro": ["--dro", "auto", "--selector", "ajest", "--keep", "0.5"]}


@pytest.mark.parametrize("arm, kills", [("ajest", 2)] + [(arm, 20) for arm in ROBUST_ARMS if SLOW])
def test_killed_at_random_moments_ends_in_the_same_bits(tmp_path, arm, kills):
    flags = [*ROBUST_TREE, *ROBUST_ARMS[arm], "--log-every", "7", "--save-every", "3"]
    flags += ["--steps", "2000", "--eval-every", "500"] if SLOW else ["--steps", "300", "--eval-samples", "0"]
    seconds = 0.6 if SLOW else 0.2
    if arm == "dro":
        flags = ["--data", _images(tmp_path / "d.npz", size=8), *ROBUST_IMAGES, *ROBUST_ARMS[arm],
                 "--steps", "150", "--guide-steps", "60", "--dro-steps", "100", "--save-every", "3",
                 "--log-every", "7", "--eval-every", "50"]
        seconds = 2.5
    if arm == "dro":
        assert _robust_killed([*flags, "--save-every", "1000s"], tmp_path / "whole", 0, 0) == 0
    else:
        train.main([*flags, "--save-every", "1000s", "--out", str(tmp_path / "whole")])
    assert _robust_killed(flags, tmp_path / "parts", kills, seconds) >= kills * 3 // 4
    _robust_same(tmp_path / "whole", tmp_path / "parts")


class _RobustKill(BaseException):
    """Stands for the end of the process: no handler of the program catches it."""


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_killed_inside_a_save_keeps_the_checkpoint_of_before(tmp_path, monkeypatch, where):
    flags = [*ROBUST_TREE, "--save-every", "5", "--guide", "none", "--eval-samples", "0"]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    calls, saved = [], {"write": torch.save, "fsync": os.fsync, "replace": os.replace}[where]

    def killed(*args):
        calls.extend([1] if where != "replace" or str(args[1]).endswith("checkpoint.pt") else [])
        if len(calls) == 3:
            if where == "write":
                args[1].write(b"PK half a checkpoint")
            raise _RobustKill
        return saved(*args)
    with monkeypatch.context() as patch, pytest.raises(_RobustKill):
        patch.setattr(torch if where == "write" else os, "save" if where == "write" else where, killed)
        train.main([*flags, "--out", str(tmp_path / "parts")])
    step = model.read(tmp_path / "parts" / "checkpoint.pt")["progress"]["step"]
    assert step == 10
    train.main([*flags, "--out", str(tmp_path / "parts")])
    _same_run(tmp_path / "whole", tmp_path / "parts")
    losses = [[(r["step"], r["loss"]) for r in _records(tmp_path / run, "train")]
              for run in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert not list((tmp_path / "parts").glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_first(tmp_path, monkeypatch, number):
    flags = [*ROBUST_TREE, "--selector", "ajest", "--early-steps", "17", "--eval-samples", "0"]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    learn, steps = train.State.learn, []

    def interrupted(self, *rows):
        steps.append(1)
        if len(steps) in (3, 8 + 11):  # in the guide, then in the model
            signal.raise_signal(number)
        return learn(self, *rows)
    monkeypatch.setattr(train.State, "learn", interrupted)
    for stage, step in (("guide", 3), (".", 11)):
        with pytest.raises(SystemExit) as stop:
            train.main([*flags, "--out", str(tmp_path / "parts")])
        assert stop.value.code == 128 + number
        assert model.read(tmp_path / "parts" / stage / "checkpoint.pt")["progress"]["step"] == step
    train.main([*flags, "--out", str(tmp_path / "parts")])
    _robust_same(tmp_path / "whole", tmp_path / "parts")


def test_ctrl_c_outside_of_the_loop_ends_without_a_traceback(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "resolve", interrupted)
    with pytest.raises(SystemExit) as stop:
        train.main([*ROBUST_TREE, "--out", str(tmp_path / "run")])
    assert stop.value.code == 130 and not os.listdir(tmp_path)


def test_a_torn_log_is_repaired(tmp_path):
    flags = [*ROBUST_TREE, "--guide", "none", "--eval-samples", "0"]
    for name in ("whole", "parts"):
        train.main([*flags, "--out", str(tmp_path / name), "--steps", "12" if name == "parts" else "24"])
    with open(tmp_path / "parts" / "log.jsonl", "ab") as file:
        file.write(b'{"kind": "train", "step": 18, "loss": 1}\n{"kind": "train", "st\xff')
    train.main([*flags, "--out", str(tmp_path / "parts")])
    assert _robust_log(tmp_path / "parts") == _robust_log(tmp_path / "whole")
    _same_run(tmp_path / "whole", tmp_path / "parts")


def _robust_one_line(capsys, main, argv, *words):
    """Run main(argv): exit code 2, and one error line on stderr that holds `words`."""
    capsys.readouterr()
    try:
        code = main([str(arg) for arg in argv])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1, (code, err)
    assert err.splitlines()[-1] == lines[0] and "Traceback" not in err, (code, err)
    assert all(str(word) in lines[0] for word in words), (words, lines[0])
    return lines[0]


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on the size of files")
def test_a_full_disk_ends_in_one_line_and_the_last_checkpoint_stays(tmp_path, capsys):
    import resource
    flags = [*ROBUST_TREE, "--guide", "none", "--save-every", "5", "--eval-samples", "0"]
    run = tmp_path / "run"
    train.main([*flags, "--out", str(tmp_path / "whole")])
    train.main([*flags, "--out", str(run), "--steps", "8"])
    good, soft = (run / "checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 700, 3000, 20_000, len(good) // 2, len(good) - 1):  # the first ones fail at other files
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, soft[1]))
            _robust_one_line(capsys, train.main, [*flags, "--out", run], run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        assert (run / "checkpoint.pt").read_bytes() == good
    train.main([*flags, "--out", str(run)])
    _same_run(tmp_path / "whole", run)


def test_a_full_disk_at_any_file_ends_in_one_line(tmp_path, monkeypatch, capsys):
    flags = ["--data", _images(tmp_path / "d.npz", size=8), *ROBUST_IMAGES, "--keep", "0.5",
             "--selector", "ajest", *(["--dro", "auto"] if SLOW else []), "--out", tmp_path / "run"]
    replace, targets = os.replace, ["config.json", "keep.npy", "stages.json", "log.jsonl", "samples.png"]
    if SLOW:  # in the order in which a run writes them
        targets[2:2] = ["guide/checkpoint.pt", "proxy/class_weights.json", "proxy/class_weights.png"]
    for target in targets:
        def full(source, destination):
            if Path(destination) == tmp_path / "run" / target:
                raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(destination))
            return replace(source, destination)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            _robust_one_line(capsys, train.main, flags, target, "No space left")
        assert not (tmp_path / "run" / target).exists()
    train.main([str(f) for f in flags])
    assert len(_records(tmp_path / "run", "eval")) == 2


# ------------------------------------------------------------------------------------------------------------
# Damaged, foreign and hostile files: one line that names the file, nothing executed, nothing half-written.

def _robust_deflated(path, checkpoint):
    """A checkpoint whose tensors inflate from kilobytes to gigabytes."""
    model.save(path, checkpoint | dict(more=torch.zeros(2 ** 18)))
    with zipfile.ZipFile(path) as old:
        members = [(m.filename, old.read(m)) for m in old.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in members:
            new.writestr(name, content)


def _robust_flipped(path, checkpoint):
    model.save(path, checkpoint)
    content, weight = bytearray(path.read_bytes()), next(iter(checkpoint["model"].values())).numpy().tobytes()
    content[bytes(content).index(weight) + 5] ^= 1
    path.write_bytes(content)


def _robust_with(**changes):
    return lambda path, checkpoint: model.save(path, checkpoint | changes)


def _robust_all(change, *kinds):
    """A checkpoint of which every tensor under `kinds` is changed."""
    def leaf(value):
        return change(value) if torch.is_tensor(value) else value
    return lambda path, c: model.save(
        path, c | {kind: torch.utils._pytree.tree_map(leaf, c[kind]) for kind in kinds})


def _robust_config(**changes):
    return lambda path, c: model.save(path, c | {"model_config": c["model_config"] | changes})


ROBUST_CHECKPOINTS = {  # name: write(path, a good checkpoint's dictionary)
    "missing": lambda path, c: None,
    "directory": lambda path, c: path.mkdir(),
    "empty": lambda path, c: path.write_bytes(b""),
    "text": lambda path, c: path.write_text("weights"),
    "truncated": lambda path, c: (model.save(path, c), path.write_bytes(path.read_bytes()[:-500])),
    "one bit flipped": _robust_flipped,
    "inflating": _robust_deflated,
    "pickle that executes": lambda path, c: path.write_bytes(pickle.dumps(DataPayload(path.parent / "ran"))),
    "payload in a checkpoint": lambda path, c: torch.save(
        {**c, "format": 1, "x": DataPayload(path.parent / "ran")}, path),
    "old torch format": lambda path, c: torch.save(
        {**c, "format": 1}, path, _use_new_zipfile_serialization=False),
    "list": lambda path, c: torch.save([1, 2], path),
    "no format": lambda path, c: torch.save(dict(c), path),
    "later format": lambda path, c: torch.save({**c, "format": 99}, path),
    "classifier": lambda path, c: _fid_classifier(path),
    "nothing in it": lambda path, c: model.save(path, {}),
    "weights missing": _robust_with(model={}, ema={}),
    "weights a number": _robust_with(model=3, ema=3),
    "other shapes": _robust_all(lambda v: v[..., None], "model", "ema"),
    "NaN weights": _robust_all(lambda v: v * math.nan, "model", "ema"),
    "weights without content": _robust_all(lambda v: v.to("meta"), "model", "ema"),
}
ROBUST_DENOISERS = {  # as a guide or to be sampled from; a run that resumes does not look at these
    "NaN average": _robust_all(lambda v: v * math.nan, "ema"),
    "no configuration": _robust_with(model_config=None),
    "unknown network": _robust_config(net="gan"),
    "a billion channels": _robust_config(channels=10 ** 9),
    "points with a UNet": _robust_config(net="unet"),
    "sigma_data a word": _robust_config(sigma_data="0.5"),
    "sigma_max infinite": _robust_config(sigma_max=math.inf),
    "shape negative": _robust_config(shape=[-2]),
    "classes a float": _robust_config(classes=1.5),
}
ROBUST_RUNS = {  # as the checkpoint of a run that resumes
    "no optimizer": _robust_with(optimizer={}),
    "optimizer of another shape": _robust_all(lambda v: v[..., None], "optimizer"),
    "average of another shape": _robust_all(lambda v: v[..., :1], "ema"),
    "step a word": _robust_with(progress=dict(step="three")),
    "step NaN": _robust_with(progress=dict(step=math.nan)),
    "tally of another shape": _robust_with(tally=torch.zeros(7)),
}


@functools.cache
def _robust_checkpoint():
    with tempfile.TemporaryDirectory() as run:
        train.main([*ROBUST_TREE, "--guide", "none", "--eval-samples", "0", "--steps", "2", "--out", run])
        return torch.load(f"{run}/checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("use, name", [
    *[("guide", name) for name in [*ROBUST_CHECKPOINTS, *ROBUST_DENOISERS]],
    *[("sample", name) for name in [*ROBUST_CHECKPOINTS, *ROBUST_DENOISERS]],
    *[("resume", name) for name in [*ROBUST_CHECKPOINTS, *ROBUST_RUNS] if name != "missing"],
    *[(use, name) for use in ("reference", "sample's guide")
      for name in ("truncated", "payload in a checkpoint")]])
def test_bad_checkpoints_are_refused_in_one_line(tmp_path, capsys, use, name):
    run = [*ROBUST_TREE, "--out", str(tmp_path / "run"), "--eval-samples", "0", "--steps", "4"]
    path = tmp_path / "bad" / "checkpoint.pt"
    if use == "resume":
        train.main([*run[:-1], "2", "--guide", "none"])
        path = tmp_path / "run" / "checkpoint.pt"
        path.unlink()
    path.parent.mkdir(exist_ok=True)
    make = {**ROBUST_CHECKPOINTS, **ROBUST_DENOISERS, **ROBUST_RUNS}[name]
    checkpoint = {k: v for k, v in _robust_checkpoint().items() if k != "format"}
    make(path, checkpoint)
    good = tmp_path / "good.pt"
    model.save(good, checkpoint)
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    out = ["--out", tmp_path / "x.npz", "--n", "2", "--steps", "2", "--device", "cpu"]
    program, argv = {
        "guide": (train, [*run, "--guide", path]), "resume": (train, [*run, "--guide", "none"]),
        "reference": (train, [*run, "--guide", "none", "--selector", "jest", "--reference", path]),
        "sample": (sample, [path, *out]),
        "sample's guide": (sample, [good, *out, "--guide", path, "--guidance", "2"])}[use]
    _robust_one_line(capsys, program.main, argv, path)
    assert not (path.parent / "ran").exists()
    changed = {p.name for p in tmp_path.rglob("*") if before.get(p) != (p.is_file() and p.read_bytes())}
    assert changed <= {"run", "config.json", "log.jsonl", "stages.json"}, changed


def _robust_npy(path, header, body=b""):
    text = repr(header).encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body)


def _robust_save(array):
    return lambda path: path.write_bytes(_robust_bytes(lambda file: np.save(file, array, allow_pickle=True)))


def _robust_savez(**arrays):
    return lambda path: path.write_bytes(_robust_bytes(lambda file: np.savez(file, **arrays)))


def _robust_bytes(write):
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def _robust_classes(values, **more):
    return lambda path: path.write_text(json.dumps({"classes": values, **more}))


def _robust_net(change):
    """A classifier's file with a change to its dictionary."""
    def write(path):
        _fid_classifier(path)
        checkpoint = torch.load(path, weights_only=True)
        torch.save(change(checkpoint) or checkpoint, path)
    return write


def _robust_payload(path):
    path.write_bytes(pickle.dumps(DataPayload(path.parent / "ran")))


ROBUST_COMMON = {"missing": lambda path: None, "directory": lambda path: path.mkdir(),
                 "payload": _robust_payload, "empty": lambda path: path.write_bytes(b""),
                 "not text": lambda path: path.write_bytes(b"\xff\xfe\x00{")}
ROBUST_GIANT = dict(descr="<i8", fortran_order=False, shape=(10 ** 13,))
ROBUST_FILES = {  # file: {name: write(path)}
    "weights.json": {
        "truncated": lambda path: path.write_text('{"classes": {"0": 1.0, '),
        "list": lambda path: path.write_text("[1]"), "classes a word": _robust_classes("012"),
        "deep": lambda path: path.write_text("[" * 100_000),
        "later format": _robust_classes({"0": 1, "1": 1, "2": 1}, format=2),
        "other classes": _robust_classes({"cat": 1.0}),
        "negative": _robust_classes({"0": -1, "1": 1, "2": 1}),
        "NaN": _robust_classes({"0": math.nan, "1": 1, "2": 1}),
        "beyond float32": _robust_classes({"0": 1e300, "1": 1, "2": 1}),
        "beyond float64": _robust_classes({"0": 10 ** 400, "1": 1, "2": 1}),
        "all zero": _robust_classes(dict.fromkeys("012", 0)),
        "list of a list": _robust_classes({"0": [1], "1": 1, "2": 1})},
    "keep.npy": {
        "objects": lambda path: _robust_save(np.array([DataPayload(path.parent / "ran")], object))(path),
        "floats": _robust_save(np.zeros(3)), "beyond the data": _robust_save(np.array([999])),
        "negative": _robust_save(np.array([-1])),
        "truncated": lambda path: _robust_npy(path, dict(ROBUST_GIANT, shape=(30,)), bytes(100)),
        "terabytes": lambda path: _robust_npy(path, ROBUST_GIANT, bytes(80))},
    "features.npy": {
        "NaN": _robust_save(np.full((30, 4), np.nan)), "other rows": _robust_save(np.zeros((29, 4))),
        "text": _robust_save(np.full((30, 4), "abc")), "records": _robust_save(np.zeros((30, 4), "f4,i4")),
        "objects": lambda path: _robust_save(
            np.array([[DataPayload(path.parent / "ran")]] * 30, object))(path),
        "terabytes": lambda path: _robust_npy(path, dict(ROBUST_GIANT, shape=(30, 10 ** 12)), bytes(80))},
    "own.pt": {
        "denoiser": lambda path: model.save(path, dict(kind="run", model={})),
        "list": lambda path: torch.save([1], path), "later format": _robust_net(lambda c: c | dict(format=2)),
        "width": _robust_net(lambda c: c | dict(width=10 ** 9)),
        "NaN": _robust_net(
            lambda c: [w.mul_(math.nan) for w in c["model"].values() if w.is_floating_point()] and None),
        "payload inside": lambda path: torch.save(
            {"format": 1, "x": DataPayload(path.parent / "ran")}, path)},
    "inception.pth": {
        "list": lambda path: torch.save([1], path),
        "other weights": lambda path: torch.save({"a": torch.zeros(1)}, path),
        "payload inside": lambda path: torch.save({"x": DataPayload(path.parent / "ran")}, path)},
    "stats.npz": {
        "truncated": lambda path: path.write_bytes(
            _robust_bytes(lambda f: np.savez(f, mu=np.zeros(3), sigma=np.eye(3)))[:-40]),
        "objects": lambda path: _robust_savez(
            mu=np.array([DataPayload(path.parent / "ran")], object), sigma=np.eye(3))(path),
        "NaN": _robust_savez(mu=np.full(3, np.nan), sigma=np.eye(3)),
        "shapes": _robust_savez(mu=np.zeros(3), sigma=np.eye(4)),
        "text": _robust_savez(mu=np.array(["a"]), sigma=np.array([["b"]])),
        "no dimensions": _robust_savez(mu=np.zeros(0), sigma=np.zeros((0, 0))),
        "terabytes": lambda path: data_raw_npz(path.parent, "mu", ROBUST_GIANT).rename(path)},
    "config.json": {"truncated": lambda path: path.write_text('{"seed": 0, '),
                    "list": lambda path: path.write_text("[1, 2]")},
    "log.jsonl": {},
}
ROBUST_CASES = [(file, name) for file, cases in ROBUST_FILES.items() for name in [*ROBUST_COMMON, *cases]
                if (file, name) not in {("config.json", "missing"),
                                        *[("log.jsonl", n) for n in ROBUST_COMMON if n != "directory"]}]


@pytest.mark.parametrize("file, name", ROBUST_CASES)
def test_bad_files_are_refused_in_one_line(tmp_path, capsys, file, name):
    images, run, path = _images(tmp_path / "d.npz", n=30, size=8), tmp_path / "run", tmp_path / file
    flags = ["--data", images, *ROBUST_IMAGES, "--steps", "1", "--guide", "none", "--eval-samples", "0",
             "--out", run]
    if file in ("config.json", "log.jsonl"):
        flags = [*ROBUST_TREE, "--steps", "1", "--guide", "none", "--eval-samples", "0", "--out", run]
        train.main([str(f) for f in flags])
        path = run / file
        path.unlink()
    {**ROBUST_COMMON, **ROBUST_FILES[file]}[name](path)
    program, argv = {
        "weights.json": (train, [*flags, "--class-weights", path]),
        "keep.npy": (train, [*flags, "--keep", path]),
        "features.npy": (train, [*flags, "--keep", "0.5", "--features", path]),
        "own.pt": (train, [*flags, "--keep", "0.5", "--features", f"own:{path}"]),
        "inception.pth": (fid, [images, images, "--inception-weights", path, "--device", "cpu"]),
        "stats.npz": (fid, [path, path]), "config.json": (train, flags), "log.jsonl": (train, flags)}[file]
    _robust_one_line(capsys, program.main, argv, file)
    assert not (tmp_path / "ran").exists()
    assert not list(tmp_path.rglob("*.tmp")) + list(tmp_path.rglob("*.unfinished"))
    assert (run / "checkpoint.pt").exists() == (file in ("config.json", "log.jsonl"))


def test_damaged_lines_of_a_log_are_dropped(tmp_path):
    flags = [*ROBUST_TREE, "--guide", "none", "--eval-samples", "0", "--out", str(tmp_path / "run"),
             "--steps"]
    train.main([*flags, "12"])
    log = tmp_path / "run" / "log.jsonl"
    good = log.read_bytes()
    log.write_bytes(b'[1]\n{"step": "x"}\n\xff\xfe\n' + b"[" * 50_000 + b'\n{"step": 3}\n' + good
                    + b'{"step": NaN, "kind": 1}')
    train.main([*flags, "13"])
    assert log.read_bytes() == good


# ------------------------------------------------------------------------------------------------------------
# Long runs, and several processes.

@pytest.mark.skipif(not SLOW or not Path("/proc/self/statm").exists(), reason="SLOW_TESTS=1, Linux")
@pytest.mark.parametrize("flags", [[], ["--selector", "ajest", "--batch", "16", "--filter", "0.5"]],
                         ids=["uniform", "ajest"])
def test_memory_is_flat_and_the_log_linear(tmp_path, monkeypatch, flags):
    resident, log = [], train.log

    def measured(state, *rest):
        log(state, *rest)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append((pages * os.sysconf("SC_PAGE_SIZE"), time.monotonic()))
    monkeypatch.setattr(train, "log", measured)
    train.main([*ROBUST_TREE, *flags, "--steps", "20000", "--log-every", "100", "--eval-samples", "0",
                "--out", str(tmp_path)])
    resident = resident[-200:]  # not the guide's
    memory, seconds = np.array(resident).T
    assert len(resident) == 200 and memory[-20:].mean() - memory[20:40].mean() < 4 * 2 ** 20, memory
    lines = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 200 and sum(map(len, lines[100:])) < 1.2 * sum(map(len, lines[:100]))


def test_non_finite_losses_end_in_one_line(tmp_path, monkeypatch, capsys):
    learn = train.State.learn
    monkeypatch.setattr(train.State, "learn", lambda self, x0, *rest: learn(self, x0 * math.nan, *rest))
    flags = [*ROBUST_TREE, "--guide", "none", "--steps", "400", "--log-every", "50", "--out", tmp_path]
    _robust_one_line(capsys, train.main, flags, "--lr")
    assert [r["skipped"] for r in _records(tmp_path, "train")] == [50, 100]


def test_the_time_budget_is_kept_by_a_monotonic_clock(tmp_path, monkeypatch):
    now = iter(range(10 ** 6))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(time, "time", lambda: 1e9 * (-1) ** next(now))  # a clock that is set back and forth
    train.main([*ROBUST_TREE, "--guide", "none", "--steps", "10000", "--minutes", "1",
                "--eval-samples", "0", "--out", str(tmp_path)])
    assert 10 < model.read(tmp_path / "checkpoint.pt")["progress"]["step"] < 60


def _robust_processes(n, flags):
    """torchrun with n processes; -> (exit code, stderr)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n),
               "train.py", *map(str, flags)]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)
    try:
        err = process.communicate(timeout=120)[1]
    finally:
        process.terminate()  # and with it the processes that it started
        process.wait()
    return process.returncode, err


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_two_processes_give_the_weights_of_one(tmp_path):
    flags = [*ROBUST_TREE, "--guide", "none", "--eval-samples", "0"]
    train.main([*flags, "--out", str(tmp_path / "one")])
    code, err = _robust_processes(2, [*flags, "--out", tmp_path / "two", "--steps", "12"])
    assert code == 0, err
    _robust_close(tmp_path / "one", tmp_path / "two", steps=12)
    train.main([*flags, "--out", str(tmp_path / "two")])  # goes on with one process
    _robust_close(tmp_path / "one", tmp_path / "two", steps=24)


def _robust_close(one, two, steps):
    a, b = (model.read(run / "checkpoint.pt") for run in (one, two))
    assert b["progress"]["step"] == steps
    assert [r["step"] for r in _records(two, "train")] == [*range(6, steps + 1, 6)]
    for r, s in zip(_records(one, "train"), _records(two, "train")):
        assert r["examples_trained"] == s["examples_trained"] and r["lr"] == s["lr"]
    if steps == a["progress"]["step"]:
        for kind in ("model", "ema"):
            assert all(torch.allclose(x, y, rtol=0, atol=1e-5) for x, y in zip(*(
                torch.utils._pytree.tree_leaves(c[kind]) for c in (a, b)))), kind


@pytest.mark.parametrize("flags, fits", [
    (["--batch", "64"], False), (["--guide-batch", "64"], False), ([], True),
    (["--selector", "jest", "--filter", "0.67"], False), (["--selector", "jest", "--filter", "0.5"], True)])
def test_sizes_that_the_processes_do_not_divide(monkeypatch, flags, fits):
    monkeypatch.setenv("WORLD_SIZE", "3")
    args = train.build_parser().parse_args([*ROBUST_TREE, "--batch", "66", "--guide-batch", "66", *flags])
    if fits:
        train.resolve(args, data.Tree("A"))
    else:
        with pytest.raises(data.DataError, match="divisible by the 3 processes"):
            train.resolve(args, data.Tree("A"))


@pytest.mark.skipif(not SLOW, reason="SLOW_TESTS=1")
@pytest.mark.parametrize("flags", [
    ["--selector", "jest", "--debias"], ["--selector", "ajest", "--until-better", "--gain", "1"],
    ["--dro", "auto", "--selector", "ajest", "--keep", "0.5"]], ids=lambda f: f[1])
def test_selection_and_all_stages_with_two_processes(tmp_path, flags):
    flags = [*ROBUST_TREE, *flags]
    if "--dro" in flags:
        flags = ["--data", _images(tmp_path / "d.npz", size=8), *ROBUST_IMAGES, *flags[len(ROBUST_TREE):],
                 "--metrics", "auto"]
    for n, steps in ((2, 6), (1, 9), (2, 12)):  # resumed with another number
        code, err = _robust_processes(n, [*flags, "--steps", steps, "--log-every", "3",
                                          "--out", tmp_path / "run"])
        assert code == 0, err
    records = _records(tmp_path / "run", "train")
    assert [r["step"] for r in records] == [3, 6, 9, 12] and all(math.isfinite(r["loss"]) for r in records)
