"""Denoisers: the EDM2 UNet for images and latents, an MLP for 2-D points, EDM preconditioning, loss and EMA.

The network is configuration G of "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2,
arXiv 2312.02696); preconditioning and loss are those of EDM (arXiv 2206.00364). Everything a checkpoint needs
to be sampled from is in the checkpoint:

    python -c "import model; print(model.load_denoiser('runs/tree-ajest/checkpoint.pt'))"
"""
import importlib.util
import itertools
import math
import os
import shutil
import sys
import zipfile

import numpy as np
import torch
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------------------------
# Magnitude-preserving building blocks (EDM2, section 2.3 and appendix B): each keeps unit-variance
# activations at unit variance, so that no normalization by batch statistics is needed.

def normalize(x, dim, eps=1e-4):
    """x / rms(x) over `dim`, statistics in fp32, result in x's dtype (EDM2 eq. 47, with a floor for eps)."""
    rms = x.float().square().mean(dim, keepdim=True).sqrt().clamp_min(eps)
    return x / rms.to(x.dtype)


def mp_silu(x):
    return F.silu(x) / 0.596  # EDM2 eq. 81


def mp_sum(a, b, t):
    """Weighted sum of two unit-variance tensors, t the share of b (EDM2 eq. 88)."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a, b):
    """Concatenation along channels in which a and b contribute equally (EDM2 eq. 103, t = 1/2)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / 2)
    return torch.cat([a * (scale / math.sqrt(n_a)), b * (scale / math.sqrt(n_b))], dim=1)


def resample(x, mode):
    """Halve (2x2 mean) or double (nearest) the resolution, or keep it."""
    if mode == "down":
        return F.avg_pool2d(x, 2)
    if mode == "up":                                            # channels_last: one copy; gradient a sum
        n, c, h, w = x.shape
        x = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(n, h, 2, w, 2, c)
        return x.reshape(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)
    return x


# ------------------------------------------------------------------------------------------------------------
# Random Fourier features of the noise level (EDM2 eq. 75): [N] -> [N, channels], unit variance.

class MPFourier(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x):
        return math.sqrt(2) * torch.cos(x.float().outer(self.freqs) + self.phases)  # [batch, channels]


# ------------------------------------------------------------------------------------------------------------
# Convolution (kernel > 0) or linear layer (kernel 0) whose weights have unit norm per output (EDM2 eq. 66).
# The differentiable normalization runs here, in fp32; `project` makes the stored weights themselves
# unit-norm, once per optimizer step and outside of the compiled graph.

class MPLayer(torch.nn.Module):
    def __init__(self, in_channels, out_channels, kernel=0):
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.randn(out_channels, in_channels, *[kernel] * (2 if kernel else 0)))

    def forward(self, x, gain=1.0):
        """x [N, in_channels, ...] -> [N, out_channels, ...] in x's dtype; `gain` multiplies the result."""
        w = normalize(self.weight.float(), dim=tuple(range(1, self.weight.ndim)))
        w = (w * (gain / math.sqrt(w[0].numel()))).to(x.dtype)
        return F.conv2d(x, w, padding=w.shape[-1] // 2) if w.ndim == 4 else F.linear(x, w)


@torch.no_grad()
def project(weights):
    """Scale every row of a list of weight tensors to rms 1, in place; changes no output of the network."""
    scales = [w.square().mean(tuple(range(1, w.ndim)), keepdim=True).sqrt_().clamp_min_(1e-4)
              for w in weights]
    if weights:
        torch._foreach_div_(weights, scales)


@torch.no_grad()
def make_finite(gradients):
    """What is not finite in a list of gradients becomes 0, in place."""
    torch._foreach_copy_(gradients, [g.nan_to_num(0, 0, 0) for g in gradients])


def projected_weights(module):
    """The weights that `project` applies to: those of all magnitude-preserving layers in `module`."""
    return [m.weight for m in module.modules() if isinstance(m, MPLayer)]


# ------------------------------------------------------------------------------------------------------------
# Residual block with optional cosine attention (EDM2 figure 21). Encoder blocks normalize each pixel's
# channels and keep the main path at unit variance; decoder blocks take the concatenated skip connection.

class Block(torch.nn.Module):
    def __init__(self, in_channels, out_channels, emb_channels, decoder=False, mode="keep", attention=False,
                 dropout=0.0, takes_skip=False):
        super().__init__()
        self.decoder, self.mode, self.dropout, self.takes_skip = decoder, mode, dropout, takes_skip
        self.heads = max(1, out_channels // 64) if attention else 0
        while self.heads and out_channels % self.heads:
            self.heads -= 1
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
            x = self.skip(x) if self.skip else x
            x = normalize(x, dim=1)
        y = self.res0(mp_silu(x))
        y = mp_silu(y * (self.emb(emb, self.emb_gain) + 1)[:, :, None, None].to(y.dtype))
        y = self.res1(F.dropout(y, self.dropout, self.training) if self.dropout else y)
        if self.decoder and self.skip:
            x = self.skip(x)
        x = mp_sum(x, y, 0.3)
        if self.heads:
            x = mp_sum(x, self.attend(x), 0.3)
        return x + (x.clamp(-256, 256) - x).detach()            # straight through: no mask is kept

    def attend(self, x):
        """Cosine attention over the pixels of x [N, C, H, W]: unit-rms q, k make it cosine times sqrt(d)."""
        n, c, h, w = x.shape
        qkv = self.qkv(x).permute(0, 2, 3, 1).reshape(n, h * w, self.heads, 3, c // self.heads)
        q, k, v = (part.transpose(1, 2) for part in normalize(qkv, dim=4).unbind(3))    # [n, heads, h w, d]
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)                     # [n, h w, heads, d]
        return self.proj(y.reshape(n, h, w, c).permute(0, 3, 1, 2))


# ------------------------------------------------------------------------------------------------------------
# The raw network F of EDM2 configuration G: four levels of 1, 2, 3, 4 times `channels`, three `blocks` a
# level (and one more in the decoder), attention at 16x16 and 8x8 (below 64 channels, too; EDM2 not).

class UNet(torch.nn.Module):
    """F(x, noise_label, class_labels): ([N, C, H, W], [N], int64 [N] or None) -> [N, C, H, W].

    classes = 0 is the unconditional network; every other one needs labels. Raises ValueError for a resolution
    that is not a multiple of 8.
    """

    def __init__(self, resolution=64, in_channels=3, channels=64, classes=1000, dropout=0.0, blocks=3):
        super().__init__()
        if resolution < 8 or resolution % 8:
            raise ValueError(f"the UNet needs a resolution that is a multiple of 8, not {resolution}")
        self.resolution, self.in_channels, self.classes = resolution, in_channels, classes
        widths, emb = [channels * m for m in (1, 2, 3, 4)], channels * 4
        self.fourier = MPFourier(channels)
        self.emb_noise = MPLayer(channels, emb)
        self.emb_class = MPLayer(classes, emb) if classes else None
        self.encoder, self.decoder, skips = torch.nn.ModuleList(), torch.nn.ModuleList(), [channels]
        self.first = MPLayer(in_channels + 1, channels, 3)
        width = channels
        for level, w in enumerate(widths):
            attention = resolution >> level in (8, 16)
            for i in range(blocks + (level > 0)):  # the first block of each lower level halves the resolution
                down = level > 0 and i == 0
                self.encoder.append(Block(width, width if down else w, emb, mode="down" if down else "keep",
                                          attention=attention and not down, dropout=dropout))
                skips.append(width := width if down else w)
        for level, w in reversed(list(enumerate(widths))):
            attention = resolution >> level in (8, 16)
            # two blocks at the bottom; elsewhere one that doubles the resolution
            for i in range(2 if level == 3 else 1):
                self.decoder.append(Block(width, width, emb, True, mode="keep" if level == 3 else "up",
                                          attention=level == 3 and i == 0, dropout=dropout))
            for _ in range(blocks + 1):
                self.decoder.append(Block(width + skips.pop(), w, emb, True, attention=attention,
                                          dropout=dropout, takes_skip=True))
                width = w
        self.out = MPLayer(width, in_channels, 3)
        self.out_gain = torch.nn.Parameter(torch.zeros([]))

    def forward(self, x, noise_label, class_labels=None):
        """x [N, C, H, W] = c_in times the noisy input, noise_label [N] = c_noise -> F [N, C, H, W]."""
        emb = self.emb_noise(self.fourier(noise_label))  # [batch, 4 * channels]
        if self.emb_class is not None:
            if class_labels is None:
                raise ValueError(f"this network has {self.classes} classes: give it labels")
            one_hot = torch.arange(self.classes, device=x.device) == class_labels[:, None]
            one_hot = one_hot.to(emb.dtype) * math.sqrt(self.classes)
            emb = mp_sum(emb, self.emb_class(one_hot), 0.5)
        emb = mp_silu(emb)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1).contiguous(memory_format=torch.channels_last)
        x = self.first(x)
        skips = [x]
        for block in self.encoder:
            x = block(x, emb)
            skips.append(x)
        for block in self.decoder:
            x = block(mp_cat(x, skips.pop()) if block.takes_skip else x, emb)
        return self.out(x, self.out_gain)


# ------------------------------------------------------------------------------------------------------------
# The raw network F for 2-D points: (x [N, 2], noise_label [N], None) -> [N, 2]. Plain layers: on the tree
# they reach a hit of 0.84 after 4,096 steps of 816 examples where magnitude-preserving ones reach 0.75.

class MLP(torch.nn.Module):
    def __init__(self, channels=64, layers=4):
        super().__init__()
        widths = [4] + [channels] * layers
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        self.out = torch.nn.Linear(channels, 2)
        torch.nn.init.zeros_(self.out.weight)

    def forward(self, x, noise_label, class_labels=None):
        h = torch.cat([x, noise_label[:, None], torch.ones_like(x[:, :1])], dim=1)
        for layer in self.layers:
            h = F.silu(layer(h))
        return self.out(h)


# ------------------------------------------------------------------------------------------------------------
# EDM preconditioning (2206.00364, table 1) around a raw network, and EDM2's learned uncertainty u(sigma).

def preconditioning(sigma, sigma_data=0.5):
    """c_skip, c_out, c_in, c_noise of EDM, each of sigma's shape."""
    total = sigma.square() + sigma_data ** 2
    return sigma_data ** 2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


def loss_weight(sigma, sigma_data=0.5):
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1 / c_out^2 (EDM, table 1)."""
    return (sigma.square() + sigma_data ** 2) / (sigma * sigma_data).square()


def per_example_loss(D_x, target, sigma, sigma_data=0.5):
    """lambda(sigma) * mean over dimensions of (D_x - target)^2: [N, ...], [N, ...], [N] -> [N], in fp32."""
    return loss_weight(sigma, sigma_data) * (D_x.float() - target).square().flatten(1).mean(1)


class Denoiser(torch.nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) for a raw network F (EDM eq. 7).

    denoiser(x [N, ...], sigma [N] or a number, labels int64 [N] or None) -> [N, ...] in fp32. `config` is the
    plain dictionary that `build` made it from; it also holds `kind`, `shape` and `class_names` of the data.
    """

    def __init__(self, net, config):
        super().__init__()
        self.net, self.config = net, config
        self.kind, self.shape, self.classes = config["kind"], tuple(config["shape"]), config["classes"]
        self.class_names, self.sigma_data = config["class_names"], config["sigma_data"]
        if self.kind != "tree":
            self.u_fourier, self.u_out = MPFourier(128), MPLayer(128, 1)

    def forward(self, x, sigma, labels=None):
        """D(x; sigma), in fp32 whatever the precision of the network."""
        x = x.float()
        if not torch.is_tensor(sigma):
            sigma = torch.full((len(x),), sigma, device=x.device)
        c_skip, c_out, c_in, c_noise = (c.reshape(-1, *[1] * (x.ndim - 1))
                                        for c in preconditioning(sigma, self.sigma_data))
        F_x = self.net(c_in * x, c_noise.flatten(), labels if self.classes else None)
        return c_skip * x + c_out * F_x.float()

    def u(self, sigma):
        """Learned log-uncertainty of the loss at a noise level, [N] -> [N] (EDM2 section 2.2); UNet only."""
        return self.u_out(self.u_fourier(sigma.log() / 4)).squeeze(1).float()

    def loss(self, x0, noise, sigma, labels=None, target=None):
        """EDM losses at x = x0 + sigma noise against `target` (None: x0): -> (loss [N], D_x [N, ...])."""
        D_x = self(x0 + sigma.reshape(-1, *[1] * (x0.ndim - 1)) * noise, sigma, labels)
        return per_example_loss(D_x, x0 if target is None else target, sigma, self.sigma_data), D_x


def build(config):
    """A Denoiser from its plain configuration: kind, shape, channels, blocks, classes, class_names, dropout,
    sigma_data. A `kind` of "tree" has the MLP, images and latents the UNet."""
    if config["kind"] == "tree":
        return Denoiser(MLP(config["channels"]), config)
    in_channels, resolution, _ = config["shape"]
    return Denoiser(UNet(resolution, in_channels, config["channels"], config["classes"], config["dropout"],
                         config["blocks"]), config)


# ------------------------------------------------------------------------------------------------------------
# bf16 autocast and one compiled graph with static shapes around a function of tensors.

def accelerate(function, device, bf16=False, compiled=False):
    """The same function under autocast and, if `compiled`, as one graph. Keeps a denoiser's shape and classes."""
    device_type = torch.device(device).type

    def run(*args):
        with torch.autocast(device_type, torch.bfloat16, enabled=bf16):
            return function(*args)

    if compiled:
        # All accelerated functions share the code of `run`, and torch compiles the same code only eight times
        # by default. Torch 2.7 renamed this limit; the old name still works.
        torch._dynamo.config.cache_size_limit = 256
        run = torch.compile(run, fullgraph=True, dynamic=False)
    run.shape = getattr(function, "shape", None)
    run.classes = getattr(function, "classes", 0)
    return run


def able(device, bf16, compiled):
    """(bf16, compiled) as wanted, less what this machine cannot do, which one line says."""
    cuda = torch.device(device).type == "cuda"
    torch.backends.cudnn.benchmark = True                       # all shapes are fixed
    if bf16 and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        print("this GPU has no bf16: fp32 is used", file=sys.stderr)
        bf16 = False
    missing = "triton" if cuda and not importlib.util.find_spec("triton") else "a C compiler"
    if compiled and (missing == "triton" or not any(map(shutil.which, ("cc", "gcc", "clang", "g++", "cl")))):
        print(f"torch.compile needs {missing}, which is not here: running eagerly", file=sys.stderr)
        compiled = False
    return bf16, compiled


# ------------------------------------------------------------------------------------------------------------
# Power-function EMA (EDM2 section 3.1): theta_hat_t = beta_t theta_hat_{t-1} + (1 - beta_t) theta_t with
# beta_t = (1 - 1/t)^(gamma + 1). beta_1 = 0, so the initialization never enters.

def ema_gamma(std):
    """Exponent gamma of the profile with standard deviation `std` times the training time (EDM2 eq. 123)."""
    inverse = std ** -2  # std^2 (gamma + 2)^2 (gamma + 3) = gamma + 1, solved for its largest real root
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class PowerEMA:
    """Averages of a module's parameters at relative lengths `stds` (0.05 = 5 % of the training so far)."""

    def __init__(self, module, stds):
        self.params = [p for p in module.parameters()]
        self.names = [n for n, _ in module.named_parameters()]
        self.gammas = {std: ema_gamma(std) for std in stds}
        self.averages = {std: [p.detach().clone() for p in self.params] for std in stds}

    @torch.no_grad()
    def update(self, t):
        """Fold the parameters after optimizer step t (1, 2, ...) into every average."""
        for std, gamma in self.gammas.items():
            torch._foreach_lerp_(self.averages[std], self.params, 1 - (1 - 1 / t) ** (gamma + 1))

    @torch.no_grad()
    def copy_to(self, module, std):
        """Write the average of length `std` into `module`, whose parameters have the same order."""
        torch._foreach_copy_(list(module.parameters()), self.averages[std])

    def state_dict(self):
        return {str(std): dict(zip(self.names, average)) for std, average in self.averages.items()}

    def load_state_dict(self, state):
        for std, average in self.averages.items():
            values = [state[str(std)][name] for name in self.names]
            if [v.shape for v in values] != [a.shape for a in average]:
                raise ValueError("averages of another shape")
            torch._foreach_copy_(average, values)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: dictionaries of tensors and plain data, read with weights_only=True: nothing in one runs.

def checkpoint_of(path):
    """`path`, or the checkpoint inside it if it is a run folder."""
    if os.path.isdir(path):
        return os.path.join(path, "checkpoint.pt")
    return path


def load_checkpoint(path, device="cpu"):
    """The dictionary in a checkpoint file or run folder.

    ValueError if a checksum of the file is wrong, or if its tensors claim more bytes than the file has (a view
    of a single number can claim any size). Any other exception: not a checkpoint.
    """
    name = os.fspath(checkpoint_of(path))
    is_archive = zipfile.is_zipfile(name)                       # published FID weights use an older format
    if is_archive:
        with zipfile.ZipFile(name) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
    with open(name, "rb") as file:
        readable = name
        if os.fsencode(name) != name.encode("utf-8", "replace"):        # torch assumes that names are UTF-8
            readable = f"/dev/fd/{file.fileno()}"
        checkpoint = torch.load(readable, map_location=device, weights_only=True, mmap=is_archive)
    claimed = sum(leaf.nbytes for leaf in torch.utils._pytree.tree_leaves(checkpoint) if torch.is_tensor(leaf))
    if claimed > os.path.getsize(name):
        raise ValueError("its tensors are larger than the file")
    return checkpoint


def load_denoiser(path, ema=None, device="cpu", like=None):
    """The denoiser in a checkpoint file or run folder, ready for sampling or as a reference.

    ema: the length of an EMA in the checkpoint (None = the first, 0 = the raw weights). like: the configuration
    of a denoiser for the same data. ValueError says what is wrong; any other exception: not a denoiser.
    """
    checkpoint = load_checkpoint(path, device)
    config = checkpoint["model_config"]
    if like is not None:
        check_same_data(config, like)
    weights = dict(checkpoint["model"])
    if ema != 0:
        weights |= chosen_average(checkpoint["ema"], ema)
    with torch.device("meta"):                                  # only shapes: bad settings allocate nothing
        denoiser = build(config)
    denoiser.load_state_dict(weights, assign=True)
    for tensor in denoiser.state_dict().values():
        if not tensor.isfinite().all():
            raise ValueError("its weights are not finite")
    denoiser = denoiser.to(device).float().eval().requires_grad_(False)
    return denoiser.to(memory_format=torch.channels_last)


def chosen_average(averages, ema):
    """The averaged parameters of length `ema` (None = the first) in the state of a PowerEMA."""
    lengths = list(averages)
    length = lengths[0] if ema is None else str(float(ema))
    if length not in averages:
        raise ValueError(f"it has no EMA of length {ema} (--ema), only {', '.join(lengths)}")
    return averages[length]


# ------------------------------------------------------------------------------------------------------------
# What two denoisers must share, so that one can guide the other or be compared with it: those settings of
# `build` that describe the data, and what a message calls them.

SAME_DATA = {"kind": "kind", "shape": "shape", "classes": "number of labels", "class_names": "class",
             "mean": "mean", "std": "standard deviation"}


def check_same_data(config, like):
    """ValueError, which names what differs, unless two configurations are for the same data."""
    differences = []
    for name, word in SAME_DATA.items():
        value = plain(config[name])
        wanted = plain(like[name])
        if value != wanted and name in ("class_names", "mean", "std"):
            value, wanted = first_difference(value, wanted)     # there may be a thousand names
        if value != wanted:
            differences.append(f"{word} {value} instead of {wanted}")
    if differences:
        raise ValueError(f"it has {', '.join(differences)}")


def plain(value):
    """`value`, or the list of its items if it is a tuple."""
    return list(value) if isinstance(value, tuple) else value


def first_difference(values, others):
    """The first pair of unequal items of two lists; "none" stands for what the shorter one lacks."""
    pairs = itertools.zip_longest(values, others, fillvalue="none")
    return next(pair for pair in pairs if pair[0] != pair[1])
