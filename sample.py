"""Sample a trained model, with or without autoguidance (arXiv 2406.02507): checkpoint in, images, latents or
points out.

    python sample.py runs/tree-ajest --n 10000 --out points.npz        as the run was evaluated
    python sample.py runs/cifar10-ajest --class cat --out cats.png     a picture of one class
    python sample.py runs/cifar10-ajest --guidance 1 --out unguided    without guidance, one PNG an image

The checkpoint alone rebuilds the model. Without flags it is sampled as its run was evaluated: with the same
guide, guidance weight, noise levels and Heun steps and, on a GPU, in the same precision. One thing differs:
this program runs the network eagerly where the run compiled it, which changes the last digits. On a CPU it
computes in fp32. Sample i depends on seed + i alone, not on the number of samples or the batch.
"""
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import guide
import model


# ------------------------------------------------------------------------------------------------------------
# The program, from the flags to the files.

def main(argv=None):
    """Draw the samples that the flags describe and write them to --out."""
    args = build_parser().parse_args(argv)
    path = model.checkpoint_of(args.checkpoint)
    with data.reading(path, "a denoiser of this program"):
        network = model.load_denoiser(path, args.ema, args.device)
    config = network.config
    files = output_files(args, config["kind"])
    labels = choose_labels(args, config)
    batches = draw(args, config, guided(args, network), labels)
    data.require_writable(files[0])
    if files == [args.out]:
        write_samples(args.out, torch.cat(list(batches)), labels, config)
    else:
        write_images(files, batches)
    data.say(f"wrote {args.out}", file=sys.stdout)


def draw(args, config, denoiser, labels):
    """Yield batches of samples, on the CPU: images uint8 or latents [n, C, H, W], or points [n, 2]."""
    sampler = dict(steps=args.steps or config["sampling_steps"],
                   sigma_max=args.sigma_max or config["sigma_max"])
    seeds = range(args.seed, args.seed + args.n)
    done = 0
    for x in guide.generate(denoiser, seeds, labels, args.batch, args.device, **sampler):
        yield data.unscale(x, config).cpu()
        done += len(x)
        data.progress(f"{done:,}/{args.n:,} samples", last=done == args.n)


# ------------------------------------------------------------------------------------------------------------
# Flags.

def build_parser():
    """The parser of all flags."""
    count = data.number(int, "[1, inf)")
    amount = data.number(float, "[0, inf)")
    parser = data.parser(__doc__, "RUN_OR_CHECKPOINT --out OUT [flags]")
    add = parser.add_argument
    add("checkpoint", type=data.path, metavar="RUN_OR_CHECKPOINT", help="run folder or checkpoint file")
    add("--out", type=data.path, required=True, help="NAME.png: a picture; NAME.npz: arrays; a folder: PNGs")
    add("--device", type=data.device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N")
    add("--seed", type=data.number(int, "[0, 1e15]"), default=0, help="sample i takes seed + i")
    add("--n", type=count, default=64, help="number of samples")
    add("--class", dest="class_name", metavar="NAME", help="sample this class (default: all, as in the data)")
    add("--guidance", type=amount, metavar="W", help="samples follow D_guide + W (D_model - D_guide), so "
        "that 1 is the model alone (default: as evaluated)")
    add("--guide", type=data.path, help="the weaker model that guidance leads away from (default: the run's)")
    add("--interval", type=amount, nargs=2, metavar=("LO", "HI"), help="levels to guide at (default: all)")
    add("--ema", type=amount, metavar="LENGTH", help="average of the weights to sample, by its length as a "
        "fraction of the training; 0 = the last weights (default: as evaluated)")
    add("--steps", type=count, help="Heun steps (default: as evaluated)")
    add("--sigma-max", type=data.number(float, "(0.002, inf)"), help="initial sigma (default: as evaluated)")
    add("--batch", type=count, default=64, help="samples at a time, which changes none of them")
    return parser


# ------------------------------------------------------------------------------------------------------------
# The denoiser and the classes. The settings in a checkpoint say how its run was evaluated.

def guided(args, network):
    """The denoiser for `guide.heun`: the model, guided as the flags say or as its run was evaluated. With an
    interval it is guided only at these noise levels (2404.07724). DataError if the guide is missing."""
    config = network.config
    weight = args.guidance
    if weight is None:
        weight = config["guidance"] if config["guide_path"] is not None else 1.0
    bf16 = config["bf16"] and args.device != "cpu"
    network = model.accelerate(network, args.device, bf16)
    if weight == 1:
        if args.guide is not None or args.interval is not None:
            raise data.DataError("--guide and --interval need a --guidance other than 1")
        return guide.autoguided(network)
    interval = args.interval or (0.0, math.inf)
    if interval[0] > interval[1]:
        raise data.DataError("--interval: give the lower level first")
    path = args.guide
    if path is None and config["guide_path"] is not None:
        path = Path(model.checkpoint_of(args.checkpoint)).parent / config["guide_path"]
    if path is None or not os.path.exists(path):
        raise data.DataError(f"guidance {weight:g} needs a guide, {path or 'the own one'} is missing: "
                             "give --guide, or --guidance 1")
    with data.reading(path, "a guide for this model"):
        guide_network = model.load_denoiser(path, None, args.device, like=config)
    guide_network = model.accelerate(guide_network, args.device, bf16)
    return guide.autoguided(network, guide_network, weight, interval)


def choose_labels(args, config):
    """The labels int64 [n] to sample, None for an unconditional model: --class, or all classes in the shares
    of the data. The labels of mirrored images are not sampled."""
    names = config["class_names"]
    if args.class_name is not None:
        if args.class_name not in names:
            raise data.DataError(f"--class {args.class_name}: none of the {len(names)} classes {names[:12]}")
        return torch.full((args.n,), names.index(args.class_name))
    if config["classes"] == 0:
        return None
    return data.classes_in_turn(config["class_shares"], torch.arange(args.seed, args.seed + args.n))


# ------------------------------------------------------------------------------------------------------------
# Output: a picture, an archive, or one PNG an image. Each file is written atomically.

def output_files(args, kind):
    """The paths that will be written. DataError if --out cannot hold samples of this kind."""
    suffix = Path(args.out).suffix
    if suffix in (".npz", ".png"):
        return [args.out]
    if suffix or kind != "image":
        raise data.DataError(f"--out {args.out}: give a .png, an .npz or, for images, a folder")
    files = [os.path.join(args.out, f"{args.seed + i:06d}.png") for i in range(args.n)]
    if any(map(os.path.exists, files)):
        raise data.DataError(f"{args.out}: holds samples of these seeds already, give another folder")
    return files


def write_images(files, batches):
    """Write each image to a file of its own while the samples are drawn."""
    names = iter(files)
    for images in batches:
        for image in images.permute(0, 2, 3, 1).numpy():
            with data.writing(next(names)) as file:
                Image.fromarray(image).save(file, format="PNG")


def write_samples(path, samples, labels, config):
    """Write one picture, or an .npz with the samples and, if the classes have names, labels and names."""
    names = config["class_names"]
    arrays = {{"image": "images", "latent": "latents", "tree": "points"}[config["kind"]]: samples.numpy()}
    if labels is not None and names:
        arrays |= dict(labels=labels.numpy(), class_names=np.array(names))
    with data.writing(path) as file:
        if path.endswith(".npz"):
            np.savez(file, **arrays)
        elif config["kind"] == "tree":
            data.density_picture(samples).save(file, format="PNG")
        else:
            data.class_picture(samples, labels, names).save(file, format="PNG")


if __name__ == "__main__":
    data.command(main)
