"""Autoguidance as a denoiser made of two, and the Heun sampler.

Autoguidance: "Guiding a Diffusion Model with a Bad Version of Itself" (arXiv 2406.02507). The sampler is that
of EDM (arXiv 2206.00364, algorithm 1). Used by `sample.py`:

    python sample.py runs/tree-ajest --guidance 3 --out samples.npz
"""
import math

import numpy as np
import torch


# ------------------------------------------------------------------------------------------------------------
# Autoguidance: D_w = D_guide + w (D_main - D_guide) (2406.02507 eq. 3). It is called with the noise level as
# a number on the host, so that an interval is decided there; the tensor is made on the device, never copied.

def autoguided(main, guide=None, w=1.0, interval=(0.0, math.inf)):
    """The denoiser to sample with: (x [N, ...], sigma as a number, labels [N] or None) -> D [N, ...].

    main and guide take sigma [N]. w = 1 is the main model alone, w = 0 the guide alone, w > 1 guides; outside
    of `interval` = (lo, hi) (2404.07724) the guide is not run. ValueError where the two do not fit together.
    """
    if w != 1 and (guide.shape, guide.classes) != (main.shape, main.classes):
        raise ValueError(f"it denoises {list(guide.shape)} with {guide.classes} labels, "
                         f"the model {list(main.shape)} with {main.classes}")

    def denoise(x, sigma, labels=None):
        level = torch.full((len(x),), sigma, device=x.device)
        if w == 1 or not interval[0] <= sigma <= interval[1]:
            return main(x, level, labels)
        return torch.lerp(guide(x, level, labels), main(x, level, labels), w)
    denoise.shape = main.shape
    return denoise


# ------------------------------------------------------------------------------------------------------------
# The noise levels of EDM (eq. 5) and Heun's second-order steps between them.

def noise_levels(steps, sigma_min, sigma_max, rho=7.0):
    """sigma_max = t_0 > ... > t_{steps-1} = sigma_min, then 0: float64 [steps + 1]."""
    ramp = np.linspace(0, 1, steps) if steps > 1 else np.zeros(1)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return np.append(levels, 0.0)


@torch.no_grad()
def heun(denoiser, noise, labels=None, steps=32, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Integrate the probability-flow ODE from `noise` (unit normal [N, ...]) to samples [N, ...].

    denoiser(x, sigma, labels) takes the noise level as a number, and is called 2 * steps - 1 times.
    """
    levels = noise_levels(steps, sigma_min, sigma_max, rho).tolist()
    x = noise * levels[0]
    for sigma, sigma_next in zip(levels[:-1], levels[1:]):
        d = (x - denoiser(x, sigma, labels)) / sigma  # dx / dsigma at sigma
        x_next = x + (sigma_next - sigma) * d
        if sigma_next > 0:  # correction: the mean of the slopes at both ends
            d_next = (x_next - denoiser(x_next, sigma_next, labels)) / sigma_next
            x_next = x + (sigma_next - sigma) * (d + d_next) / 2
        x = x_next
    return x


# ------------------------------------------------------------------------------------------------------------
# Samples by seed: noise is drawn on the CPU, one generator a sample. Batches have one size (a multiple of 16;
# the last is padded): one compiled graph, and the same sample to the last bit whatever the batch, since
# matrix kernels round differently for few rows.

def generate(denoiser, seeds, labels=None, batch=256, device="cpu", **sampler):
    """Yield samples [<= batch, ...] for seeds [N] and labels int64 [N] or None; `sampler` goes to `heun`."""
    batch = -(-batch // 16) * 16
    for start in range(0, len(seeds), batch):
        rows = [min(i, len(seeds) - 1) for i in range(start, start + batch)]    # the last is repeated
        generators = [torch.Generator().manual_seed(int(seeds[i])) for i in rows]
        noise = torch.stack([torch.randn(denoiser.shape, generator=g) for g in generators]).to(device)
        label = None if labels is None else labels[rows].to(device)
        x = heun(denoiser, noise, label, **sampler)
        yield x[:len(seeds) - start]
