"""Denoisers: the EDM2 UNet for images and latents and an MLP for 2-D points, with EDM's preconditioning.

Preconditioning and loss are those of EDM (arXiv 2206.00364). The UNet, the learned uncertainty and the
averages of the weights are those of "Analyzing and Improving the Training Dynamics of Diffusion Models"
(EDM2, arXiv 2312.02696, configuration G). A checkpoint holds all that is needed to sample from it:

    python -c "import model; print(model.load_denoiser('runs/tree-ajest/checkpoint.pt'))"

In order: the denoiser and its loss; the UNet, its blocks and their layers; the MLP; averages of the weights;
autocast and compilation; checkpoints.
"""
import functools
import math
import os
import zipfile

import numpy as np
import torch
import torch.nn.functional as F

SIGMA_DATA = 0.5        # standard deviation of the data, as the network sees them
FORMAT = 2              # of checkpoints; raised when a setting is added or what training does changes


# ------------------------------------------------------------------------------------------------------------
# EDM's preconditioning (2206.00364, table 1) around a raw network F, and its loss per example.

class Denoiser(torch.nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) for a raw network F (EDM eq. 7).

    `config` is the dictionary that `build` made it from. Its kind, shape and classes (the number of labels, 0
    for none) are attributes as well.
    """

    def __init__(self, net, config):
        super().__init__()
        self.net = net
        self.config = config
        self.kind = config["kind"]
        self.shape = tuple(config["shape"])
        self.classes = config["classes"]
        if self.kind != "tree":
            self.u_fourier = MPFourier(128)
            self.u_out = MPLayer(128, 1)

    def forward(self, x, sigma, labels=None):
        """x [N, ...], sigma [N] or a number, labels int64 [N] -> D(x; sigma) [N, ...], always in fp32.

        A network without classes ignores the labels.
        """
        x = x.float()
        if not torch.is_tensor(sigma):
            sigma = torch.full((len(x),), sigma, device=x.device)
        if self.classes == 0:
            labels = None
        elif labels is None:
            raise ValueError(f"this network has {self.classes} classes: give it labels")
        c_skip, c_out, c_in, c_noise = preconditioning(sigma)
        F_x = self.net(per_example(c_in, x) * x, c_noise, labels)
        return per_example(c_skip, x) * x + per_example(c_out, x) * F_x.float()

    def loss(self, x0, noise, sigma, labels=None, target=None):
        """The loss of D at x0 + sigma noise, where x0 [N, ...] is clean and noise [N, ...] has unit variance.

        sigma [N], labels int64 [N] or None, target [N, ...] (None: x0) -> (losses [N], D_x [N, ...]).
        """
        if target is None:
            target = x0
        D_x = self(x0 + per_example(sigma, x0) * noise, sigma, labels)
        return per_example_loss(D_x, target, sigma), D_x

    def u(self, sigma):
        """Learned log-uncertainty of the loss at noise levels [N] -> [N] (EDM2 section 2.2); UNet only."""
        return self.u_out(self.u_fourier(sigma.log() / 4)).squeeze(1).float()


def preconditioning(sigma):
    """c_skip, c_out, c_in, c_noise (EDM, table 1), each of sigma's shape."""
    total = sigma.square() + SIGMA_DATA ** 2
    c_skip = SIGMA_DATA ** 2 / total
    c_out = sigma * SIGMA_DATA / total.sqrt()
    c_in = 1 / total.sqrt()
    c_noise = sigma.log() / 4
    return c_skip, c_out, c_in, c_noise


def loss_weight(sigma):
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1 / c_out^2 (EDM, table 1)."""
    return (sigma.square() + SIGMA_DATA ** 2) / (sigma * SIGMA_DATA).square()


def per_example_loss(D_x, target, sigma):
    """lambda(sigma) times the mean over dimensions of (D_x - target)^2: [N, ...], [N, ...], [N] -> fp32 [N].

    EDM sums over the dimensions; this loss takes their mean.
    """
    squares = (D_x.float() - target).square()
    return loss_weight(sigma) * squares.flatten(1).mean(1)


def per_example(v, like):
    """v [N] as [N, 1, ...] with as many dimensions as `like`, so that it multiplies whole examples."""
    ones = (1,) * (like.ndim - 1)
    return v.reshape(-1, *ones)


def build(config):
    """A new Denoiser from its configuration, a dictionary of plain values.

    kind: "tree" (2-D points, by the MLP), "image" or "latent" (by the UNet). shape: of an example. channels:
    width of the network. classes: number of labels, 0 = none. Only for the UNet: blocks, dropout.
    """
    if config["kind"] == "tree":
        net = MLP(config["channels"])
    else:
        in_channels, resolution, _ = config["shape"]
        net = UNet(resolution, in_channels, config["channels"], config["classes"], config["dropout"],
                   config["blocks"])
    return Denoiser(net, config)


# ------------------------------------------------------------------------------------------------------------
# The raw network F of EDM2's configuration G, with four levels of 1, 2, 3 and 4 times `channels`. Every block
# at 16x16 and 8x8 has attention. EDM2 gives a block channels // 64 heads, so its blocks of fewer than 64
# channels have none.

class UNet(torch.nn.Module):
    """F(x, noise_label, class_labels): ([N, C, H, W], [N], int64 [N] or None) -> [N, C, H, W].

    resolution      of the images in pixels, a multiple of 8; else ValueError
    in_channels     of the images
    channels        of the uppermost level
    classes         number of labels; 0 = unconditional
    dropout         probability, inside the residual blocks
    blocks          in each level of the encoder; the decoder has one more
    """

    def __init__(self, resolution=64, in_channels=3, channels=64, classes=1000, dropout=0.0, blocks=3):
        super().__init__()
        if resolution < 8 or resolution % 8 != 0:
            raise ValueError(f"the UNet needs a resolution that is a multiple of 8, not {resolution}")
        self.classes = classes
        emb_channels = 4 * channels
        self.fourier = MPFourier(channels)
        self.emb_noise = MPLayer(channels, emb_channels)
        self.emb_class = MPLayer(classes, emb_channels) if classes > 0 else None
        self.encoder = torch.nn.ModuleList()
        self.decoder = torch.nn.ModuleList()
        self.first = MPLayer(in_channels + 1, channels, 3)
        make_block = functools.partial(Block, emb_channels=emb_channels, dropout=dropout)
        widths = [channels, 2 * channels, 3 * channels, 4 * channels]

        # Encoder: every level but the first begins by halving the resolution.
        width = channels
        skip_widths = [width]
        for level in (0, 1, 2, 3):
            attention = resolution >> level in (8, 16)
            if level > 0:
                self.encoder.append(make_block(width, width, mode="down"))
                skip_widths.append(width)
            for _ in range(blocks):
                self.encoder.append(make_block(width, widths[level], attention=attention))
                width = widths[level]
                skip_widths.append(width)

        # Decoder: two blocks at the bottom, then every level but the last begins by doubling the resolution.
        for level in (3, 2, 1, 0):
            attention = resolution >> level in (8, 16)
            if level == 3:
                self.decoder.append(make_block(width, width, decoder=True, attention=True))
                self.decoder.append(make_block(width, width, decoder=True))
            else:
                self.decoder.append(make_block(width, width, decoder=True, mode="up"))
            for _ in range(blocks + 1):
                in_width = width + skip_widths.pop()
                self.decoder.append(
                    make_block(in_width, widths[level], decoder=True, attention=attention, takes_skip=True))
                width = widths[level]

        self.out = MPLayer(width, in_channels, 3)
        self.out_gain = torch.nn.Parameter(torch.zeros([]))

    def forward(self, x, noise_label, class_labels=None):
        """x [N, C, H, W] = c_in times the noisy input, noise_label [N] = c_noise -> F [N, C, H, W]."""
        emb = self.embedding(noise_label, class_labels)
        ones = torch.ones_like(x[:, :1])                        # in place of biases
        x = torch.cat([x, ones], dim=1).contiguous(memory_format=torch.channels_last)
        x = self.first(x)
        skips = [x]
        for block in self.encoder:
            x = block(x, emb)
            skips.append(x)
        for block in self.decoder:
            if block.takes_skip:
                x = mp_cat(x, skips.pop())
            x = block(x, emb)
        return self.out(x, self.out_gain)

    def embedding(self, noise_label, class_labels):
        """The embedding [N, 4 * channels] of noise levels [N] and labels int64 [N] or None, for blocks."""
        emb = self.emb_noise(self.fourier(noise_label))
        if self.emb_class is not None:
            one_hot = torch.arange(self.classes, device=emb.device) == class_labels[:, None]
            one_hot = one_hot.to(emb.dtype) * math.sqrt(self.classes)           # unit variance
            emb = mp_sum(emb, self.emb_class(one_hot), 0.5)
        return mp_silu(emb)


# ------------------------------------------------------------------------------------------------------------
# Residual block with optional cosine attention (EDM2 figure 21). An encoder block first normalizes the
# channels of each pixel. A decoder block does not, and may take a skip connection, concatenated to its input.

class Block(torch.nn.Module):
    """(x [N, in_channels, H, W], emb [N, emb_channels]) -> [N, out_channels, H', W'].

    mode            what happens to the resolution: "down", "up" or "keep"
    dropout         probability, inside the residual branch
    takes_skip      the UNet concatenates a skip connection to x
    """

    def __init__(self, in_channels, out_channels, emb_channels, decoder=False, mode="keep", attention=False,
                 dropout=0.0, takes_skip=False):
        super().__init__()
        self.decoder = decoder
        self.mode = mode
        self.dropout = dropout
        self.takes_skip = takes_skip
        self.heads = attention_heads(out_channels) if attention else 0
        self.emb_gain = torch.nn.Parameter(torch.zeros([]))
        self.emb = MPLayer(emb_channels, out_channels)
        self.res0 = MPLayer(in_channels if decoder else out_channels, out_channels, 3)
        self.res1 = MPLayer(out_channels, out_channels, 3)
        self.skip = MPLayer(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.qkv = MPLayer(out_channels, 3 * out_channels, 1) if attention else None
        self.proj = MPLayer(out_channels, out_channels, 1) if attention else None

    def forward(self, x, emb):
        """x [N, in_channels, H, W], emb [N, emb_channels] -> [N, out_channels, H', W']."""
        x = resample(x, self.mode)
        if not self.decoder:
            if self.skip is not None:
                x = self.skip(x)
            x = normalize(x, dim=1)

        # Residual branch, modulated by the embedding.
        y = self.res0(mp_silu(x))
        scale = self.emb(emb, self.emb_gain) + 1
        y = mp_silu(y * scale[:, :, None, None].to(y.dtype))
        if self.dropout > 0:
            y = F.dropout(y, self.dropout, self.training)
        y = self.res1(y)

        # Main branch.
        if self.decoder and self.skip is not None:
            x = self.skip(x)
        x = mp_sum(x, y, 0.3)
        if self.heads > 0:
            x = mp_sum(x, self.attend(x), 0.3)

        # Clamp to +-256. Gradients pass straight through, where EDM2's clip stops them outside of the range:
        # so no mask has to be stored for the backward pass.
        return x + (x.clamp(-256, 256) - x).detach()

    def attend(self, x):
        """Attention between the pixels of x [N, C, H, W] -> [N, C, H, W].

        Queries and keys are normalized to unit rms, so that the logits are cosines times sqrt(head size).
        """
        n, c, h, w = x.shape
        qkv = self.qkv(x).permute(0, 2, 3, 1).reshape(n, h * w, self.heads, 3, c // self.heads)
        q, k, v = normalize(qkv, dim=4).unbind(3)               # [n, h w, heads, c / heads] each
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        y = y.transpose(1, 2).reshape(n, h, w, c)
        return self.proj(y.permute(0, 3, 1, 2))


def attention_heads(channels):
    """The largest number of equal heads of at least 64 channels; 1 for fewer channels."""
    heads = max(1, channels // 64)
    while channels % heads != 0:
        heads -= 1
    return heads


# ------------------------------------------------------------------------------------------------------------
# Magnitude-preserving layers (EDM2 section 2.3 and appendix B). Each keeps activations of unit variance at
# unit variance, so that batch statistics are not needed.

class MPLayer(torch.nn.Module):
    """Convolution (kernel > 0) or linear layer (kernel 0) with weights of unit norm per output (EDM2 eq. 66).

    The normalization in `forward` is part of the gradient and runs in fp32. `project` normalizes the stored
    weights themselves, after each optimizer step.
    """

    def __init__(self, in_channels, out_channels, kernel=0):
        super().__init__()
        kernel_shape = (kernel, kernel) if kernel > 0 else ()
        self.weight = torch.nn.Parameter(torch.randn(out_channels, in_channels, *kernel_shape))

    def forward(self, x, gain=1.0):
        """x [N, in_channels, ...] -> [N, out_channels, ...] in x's dtype; `gain` multiplies the result."""
        w = normalize(self.weight.float(), dim=tuple(range(1, self.weight.ndim)))
        fan_in = w[0].numel()
        w = (w * (gain / math.sqrt(fan_in))).to(x.dtype)
        if w.ndim == 2:
            return F.linear(x, w)
        return F.conv2d(x, w, padding=w.shape[-1] // 2)


class MPFourier(torch.nn.Module):
    """Random Fourier features of unit variance of a number: [N] -> [N, channels] (EDM2 eq. 75)."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x):
        return math.sqrt(2) * torch.cos(x.float().outer(self.freqs) + self.phases)


def normalize(x, dim, eps=1e-4):
    """x / rms(x) over `dim`, where rms is taken in fp32 and at least eps; in x's dtype (EDM2 eq. 47)."""
    rms = x.float().square().mean(dim, keepdim=True).sqrt().clamp_min(eps)
    return x / rms.to(x.dtype)


def mp_silu(x):
    """SiLU of unit variance (EDM2 eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a, b, t):
    """Weighted sum of two tensors of unit variance, where t is the weight of b (EDM2 eq. 88)."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a, b):
    """Concatenation along channels to which a and b contribute equally (EDM2 eq. 103, t = 1/2)."""
    channels_a = a.shape[1]
    channels_b = b.shape[1]
    scale = math.sqrt((channels_a + channels_b) / 2)
    return torch.cat([a * (scale / math.sqrt(channels_a)), b * (scale / math.sqrt(channels_b))], dim=1)


def resample(x, mode):
    """x [N, C, H, W] with its resolution halved by 2x2 means ("down"), doubled by repetition ("up"), or x."""
    if mode == "down":
        return F.avg_pool2d(x, 2)
    if mode == "up":
        # F.interpolate returns fp32 under CUDA's autocast, and its compiled gradient needs atomics. This is
        # one copy in channels_last order, and its gradient is a sum.
        n, c, h, w = x.shape
        x = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(n, h, 2, w, 2, c)
        return x.reshape(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)
    return x


# ------------------------------------------------------------------------------------------------------------
# Around the optimizer step: these functions change lists of tensors in place, and train.py compiles them.

@torch.no_grad()
def make_finite(gradients):
    """Set the entries of a list of gradients that are not finite to 0, in place."""
    torch._foreach_copy_(gradients, [g.nan_to_num(0, 0, 0) for g in gradients])


@torch.no_grad()
def project(weights):
    """Scale each row in a list of weights to rms 1, in place. This changes no output of the network."""
    if not weights:
        return
    scales = []
    for w in weights:
        mean_square = w.square().mean(tuple(range(1, w.ndim)), keepdim=True)
        scales.append(mean_square.sqrt_().clamp_min_(1e-4))
    torch._foreach_div_(weights, scales)


def projected_weights(module):
    """The weights that `project` applies to: those of all magnitude-preserving layers in `module`."""
    return [m.weight for m in module.modules() if isinstance(m, MPLayer)]


# ------------------------------------------------------------------------------------------------------------
# The raw network F for 2-D points. Its layers are ordinary linear layers: on the tree they reach a hit of
# 0.84 after 4,096 steps of 816 examples, and magnitude-preserving layers reach 0.75.

class MLP(torch.nn.Module):
    """F(x, noise_label, None): ([N, 2], [N]) -> [N, 2]."""

    def __init__(self, channels=64, layers=4):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, channels)])
        for _ in range(layers - 1):
            self.layers.append(torch.nn.Linear(channels, channels))
        self.out = torch.nn.Linear(channels, 2)
        torch.nn.init.zeros_(self.out.weight)

    def forward(self, x, noise_label, class_labels=None):
        ones = torch.ones_like(x[:, :1])
        h = torch.cat([x, noise_label[:, None], ones], dim=1)
        for layer in self.layers:
            h = F.silu(layer(h))
        return self.out(h)


# ------------------------------------------------------------------------------------------------------------
# Power-function EMA (EDM2 section 3.1): theta_hat_t = beta_t theta_hat_{t-1} + (1 - beta_t) theta_t with
# beta_t = (1 - 1/t)^(gamma + 1). beta_1 = 0, so the initialization has no weight.

class PowerEMA:
    """Averages of a module's parameters (not its buffers), whose lengths `stds` are fractions of the training
    so far, below 0.28. They are made where the parameters are: after the module has moved to its device."""

    def __init__(self, module, stds):
        self.names = [name for name, _ in module.named_parameters()]
        self.parameters = list(module.parameters())
        self.gammas = {std: ema_gamma(std) for std in stds}
        self.averages = {std: [x.detach().clone() for x in self.parameters] for std in stds}

    @torch.no_grad()
    def update(self, t):
        """Fold the parameters after optimizer step t (1, 2, ...) into every average."""
        for std, gamma in self.gammas.items():
            beta = (1 - 1 / t) ** (gamma + 1)
            torch._foreach_lerp_(self.averages[std], self.parameters, 1 - beta)

    @torch.no_grad()
    def copy_to(self, module, std):
        """Write the average of length `std` into `module`, whose parameters have the same order."""
        torch._foreach_copy_(list(module.parameters()), self.averages[std])

    def state_dict(self):
        """{length as text: {name: averaged parameter}}."""
        return {str(std): dict(zip(self.names, average)) for std, average in self.averages.items()}

    def load_state_dict(self, state):
        """Take over what `state_dict` returned."""
        for std, average in self.averages.items():
            torch._foreach_copy_(average, [state[str(std)][name] for name in self.names])


def ema_gamma(std):
    """The exponent gamma of an average of length `std` < 0.28, a fraction of the training (EDM2 eq. 123)."""
    # std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for the largest real root.
    inverse = std ** -2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


# ------------------------------------------------------------------------------------------------------------
# bf16 autocast and one compiled graph with static shapes around a function of tensors.

def accelerate(function, device, bf16=False, compiled=False):
    """`function` under autocast and, if `compiled`, as one graph; it keeps a denoiser's shape."""
    device_type = torch.device(device).type
    torch.backends.cudnn.benchmark = True                       # all shapes are fixed

    def run(*args):
        with torch.autocast(device_type, torch.bfloat16, enabled=bf16):
            return function(*args)

    if compiled:
        # All accelerated functions share the code of `run`, and torch compiles the same code only eight times
        # by default. Torch 2.7 renamed this limit; the old name still works.
        torch._dynamo.config.cache_size_limit = 256
        run = torch.compile(run, fullgraph=True, dynamic=False)
    run.shape = getattr(function, "shape", None)
    return run


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: dictionaries of tensors and plain data, read with weights_only=True: nothing in one runs. The
# entry "model_config" holds all settings of the run: they build its denoiser and say whose checkpoint it is.

def checkpoint_of(path):
    """`path`, or the checkpoint inside it if it is a run folder."""
    return os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else path


def load_checkpoint(path, device="cpu"):
    """The dictionary in a checkpoint file or run folder. Its tensors are mapped from the file where they stay
    on the CPU, so reading one number is cheap. ValueError if a checksum is wrong; any other exception: not a
    checkpoint."""
    path = checkpoint_of(path)
    is_archive = zipfile.is_zipfile(path)                       # published FID weights use an older format
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location=device, weights_only=True, mmap=is_archive)


def check_format(settings):
    """ValueError if the settings of a run were written by another version of this program."""
    number = settings.get("format")
    if number != FORMAT:
        raise ValueError(f"another version of this program wrote it (format {number}, not {FORMAT})")


def load_denoiser(path, ema=None, device="cpu", like=None):
    """The denoiser in a checkpoint file or run folder, ready for sampling or as a reference.

    ema: the length of an EMA in the checkpoint (None = the first, 0 = the raw weights). like: the settings of
    a denoiser that must be for the same data. ValueError says what is wrong; any other exception: not a
    denoiser.
    """
    checkpoint = load_checkpoint(path, device)
    settings = checkpoint["model_config"]
    check_format(settings)
    if like is not None:
        check_same_data(settings, like)
    weights = dict(checkpoint["model"])
    if ema != 0:
        averages = checkpoint["ema"]
        length = next(iter(averages)) if ema is None else str(float(ema))
        if length not in averages:
            raise ValueError(f"it has no EMA of length {length} (--ema), only {', '.join(averages)}")
        weights |= averages[length]
    denoiser = with_weights(functools.partial(build, settings), weights)
    denoiser = denoiser.to(device, torch.float32, memory_format=torch.channels_last)
    return denoiser.eval().requires_grad_(False)


def with_weights(make, weights):
    """The module that make() returns, with these weights. It is made without memory, so that bad settings in
    a file allocate nothing. ValueError if a weight is not finite."""
    with torch.device("meta"):
        module = make()
    module.load_state_dict(weights, assign=True)
    for tensor in module.state_dict().values():
        if not tensor.isfinite().all():
            raise ValueError("its weights are not finite")
    return module


def check_same_data(settings, like):
    """ValueError unless two denoisers are for the same data, so that one can guide or judge the other."""
    for name in ("kind", "shape", "classes", "class_names", "mean", "std"):
        if settings[name] != like[name]:
            raise ValueError(f"its {name} {settings[name]} is not {like[name]}")
