"""Autoguidance, which makes one denoiser of two; Heun's sampler; and samples by seed.

Autoguidance: "Guiding a Diffusion Model with a Bad Version of Itself" (arXiv 2406.02507). The sampler is that
of EDM (arXiv 2206.00364, algorithm 1). In a program of your own:

    denoiser = autoguided(main, guide, 2.0)
    samples = torch.cat(list(generate(denoiser, seeds=range(1000), steps=32, sigma_max=80.0)))
"""
import math

import numpy as np
import torch


# ------------------------------------------------------------------------------------------------------------
# Autoguidance: D_w = D_guide + w (D_main - D_guide) (2406.02507 eq. 3). The noise level is a Python number,
# so the interval is checked without waiting for the device. Its tensor is made on the device, without a copy.

def autoguided(main, guide=None, w=1.0, interval=(0.0, math.inf)):
    """The denoiser to sample with: (x [N, ...], sigma as a number, labels int64 [N] or None) -> D_w [N, ...].

    main and guide are denoisers, called with sigma [N]. w = 1 is the main denoiser alone, w = 0 the guide
    alone, and w > 1 leads away from the guide. Outside of `interval` (lowest, highest) the main denoiser is
    used alone (2404.07724). ValueError if the two differ in shape or number of labels.
    """
    if w != 1 and (guide.shape, guide.classes) != (main.shape, main.classes):
        raise ValueError(f"it denoises {list(guide.shape)} with {guide.classes} labels, "
                         f"the model {list(main.shape)} with {main.classes}")
    lowest, highest = interval

    def denoise(x, sigma, labels=None):
        level = torch.full((len(x),), sigma, device=x.device)
        D_main = main(x, level, labels)
        if w == 1 or not lowest <= sigma <= highest:
            return D_main
        D_guide = guide(x, level, labels)
        return torch.lerp(D_guide, D_main, w)

    denoise.shape = main.shape
    return denoise


# ------------------------------------------------------------------------------------------------------------
# The noise levels of EDM (eq. 5) and Heun's second-order steps between them.

def noise_levels(steps, sigma_min, sigma_max, rho=7.0):
    """sigma_max = t_0 > ... > t_{steps-1} = sigma_min, then 0: float64 [steps + 1]; only sigma_max and 0 for
    one step."""
    ramp = np.linspace(0, 1, steps)
    first = sigma_max ** (1 / rho)
    last = sigma_min ** (1 / rho)
    levels = (first + ramp * (last - first)) ** rho
    return np.append(levels, 0.0)


@torch.no_grad()
def heun(denoiser, noise, labels=None, steps=32, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Integrate the probability-flow ODE from `noise` (unit normal [N, ...]) to samples [N, ...].

    denoiser(x, sigma, labels) takes the noise level as a number, and is called 2 * steps - 1 times.
    """
    levels = noise_levels(steps, sigma_min, sigma_max, rho).tolist()
    x = noise * levels[0]
    for sigma, sigma_next in zip(levels[:-1], levels[1:]):
        d = (x - denoiser(x, sigma, labels)) / sigma            # dx / dsigma at sigma
        x_next = x + (sigma_next - sigma) * d
        if sigma_next > 0:                                      # the mean of the slopes at both ends
            d_next = (x_next - denoiser(x_next, sigma_next, labels)) / sigma_next
            x_next = x + (sigma_next - sigma) * (d + d_next) / 2
        x = x_next
    return x


# ------------------------------------------------------------------------------------------------------------
# Samples by seed. Noise is drawn on the CPU, with one generator per sample. Every batch has the same size, a
# multiple of 16, and the last one is padded. So one compiled graph serves all batches, and a sample is the
# same to the last bit in any batch; matrix kernels would round differently for few rows.

def generate(denoiser, seeds, labels=None, batch=256, device="cpu", **sampler):
    """Yield samples [<= batch, ...] for seeds [N] and labels int64 [N] or None; `sampler` goes to `heun`."""
    batch_size = math.ceil(batch / 16) * 16
    for start in range(0, len(seeds), batch_size):
        rows = [min(i, len(seeds) - 1) for i in range(start, start + batch_size)]       # pad with the last
        noise = []
        for row in rows:
            generator = torch.Generator().manual_seed(int(seeds[row]))
            noise.append(torch.randn(denoiser.shape, generator=generator))
        noise = torch.stack(noise).to(device)
        batch_labels = None
        if labels is not None:
            batch_labels = labels[rows].to(device)
        x = heun(denoiser, noise, batch_labels, **sampler)
        yield x[:len(seeds) - start]
