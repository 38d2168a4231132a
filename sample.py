"""Sample a trained model, with or without autoguidance (arXiv 2406.02507): checkpoint in, images, latents or
points out.

    python sample.py runs/tree-ajest --n 10000 --out points.npz

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
    refuse(args)
    network = load(args)
    config = network.config
    labels = choose_labels(args, config)
    denoiser = guided(args, network)
    files = output_files(args, config["kind"])
    data.require_writable(files[0])
    batches = draw(args, config, denoiser, labels)
    suffix = os.path.splitext(args.out)[1]
    if suffix == ".npz":
        write_archive(args.out, torch.cat(list(batches)), labels, config)
    elif suffix == ".png":
        write_picture(args, torch.cat(list(batches)), config)
    else:
        write_images(files, batches)
    data.say(f"wrote {args.out}", file=sys.stdout)


def draw(args, config, denoiser, labels):
    """Yield batches of samples, on the CPU: images uint8 or latents [n, C, H, W], or points [n, 2]."""
    steps = args.steps or config["sampling_steps"]
    sigma_max = args.sigma_max or config["sigma_max"]
    seeds = range(args.seed, args.seed + args.n)
    done = 0
    sampler = dict(steps=steps, sigma_max=sigma_max)
    for x in guide.generate(denoiser, seeds, labels, args.batch, args.device, **sampler):
        yield data.unscale(x, config).cpu()
        done += len(x)
        data.progress(f"{done}/{args.n} samples", last=done == args.n)


# ------------------------------------------------------------------------------------------------------------
# Flags. `python sample.py --help` begins with USAGE and DESCRIPTION.

USAGE = """RUN_OR_CHECKPOINT --out OUT [flags]

  python sample.py runs/tree-ajest --n 10000 --out points.npz        as the run was evaluated
  python sample.py runs/cifar10-ajest --class cat --out cats.png     a picture of one class
  python sample.py runs/cifar10-ajest --guidance 1 --out unguided    without guidance, one PNG an image"""
DESCRIPTION = (
    "Sample a trained model. Without flags it is sampled as its run was evaluated, in the same precision on "
    "a GPU (fp32 on a CPU), but eagerly where the run compiled its network, which changes the last digits.")


def build_parser():
    """The parser of all flags."""
    count = data.number(int, "[1, inf)")
    amount = data.number(float, "[0, inf)")
    parser = data.parser(DESCRIPTION, USAGE)
    parser.add_argument("checkpoint", type=data.path, metavar="RUN_OR_CHECKPOINT",
                        help="run folder or checkpoint file")
    add = parser.add_argument_group("samples").add_argument
    add("--out", type=data.path, required=True,
        help="NAME.png: one picture of all samples; NAME.npz: arrays; a folder: one PNG an image")
    add("--n", type=count, default=64, help="number of samples")
    add("--class", dest="class_name", metavar="NAME",
        help="sample this class; not given: all classes, in the proportions of the data")
    add("--seed", type=data.number(int, "[0, 1e15]"), default=0, help="sample i is drawn from seed + i")
    add = parser.add_argument_group("guidance").add_argument
    add("--guidance", type=amount, metavar="W",
        help="weight: samples follow D_guide + W (D_model - D_guide), so that 1 is the model alone; "
        "not given: as evaluated")
    add("--guide", type=data.path,
        help="the weaker model that guidance leads away from, a run folder or checkpoint; "
        "not given: the run's own guide")
    add("--interval", type=amount, nargs=2, metavar=("LO", "HI"),
        help="guide only at noise levels from LO to HI (2404.07724); not given: at all levels")
    add = parser.add_argument_group("rarely changed").add_argument
    add("--ema", type=amount, metavar="LENGTH",
        help="the average of the weights to sample, by its length as a fraction of the training (0 = the "
        "last weights, not averaged); not given: the average that was evaluated")
    add("--steps", type=count, help="Heun steps; not given: as evaluated")
    add("--sigma-max", type=data.number(float, "(0.002, inf)"), metavar="SIGMA",
        help="noise level of the first step; not given: as evaluated")
    add("--batch", type=count, default=64, help="samples at a time, which changes none of them")
    add("--device", type=data.device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N")
    return parser


def refuse(args):
    """DataError for flags that contradict each other."""
    if os.path.splitext(args.out)[1] not in (".png", ".npz", ""):
        raise data.DataError(f"--out {args.out}: give a .png, an .npz or a folder")
    if args.guidance == 1:
        refuse_guide_flags(args, "with --guidance 1")
    if args.interval is not None and args.interval[0] > args.interval[1]:
        raise data.DataError("--interval: give the lower level first")


def refuse_guide_flags(args, why):
    """DataError for flags about a guide where no guide is used."""
    if args.guide is not None:
        raise data.DataError(f"--guide has no effect {why}")
    if args.interval is not None:
        raise data.DataError(f"--interval has no effect {why}")


# ------------------------------------------------------------------------------------------------------------
# The model and its guide. A run's model_config says how the run was evaluated.

def load(args):
    """The model.Denoiser of the checkpoint; it has all settings that this program uses."""
    path = model.checkpoint_of(args.checkpoint)
    with data.reading(path, "a denoiser of this program"):
        network = model.load_denoiser(path, args.ema, args.device)
        require_settings(network.config)
    return network


def require_settings(config):
    """ValueError unless the configuration has what this program uses, of the right types."""
    number = (int, float)
    types = dict(class_shares=list, mean=list, std=list, guidance=number, guide=(str, type(None)), bf16=bool,
                 sampling_steps=int, sigma_max=number)
    for name, expected in types.items():
        if name not in config:
            raise ValueError(f"it has no {name}: another version of this program wrote it")
        if not isinstance(config[name], expected):
            raise ValueError(f"its {name} is of type {type(config[name]).__name__}")


def guided(args, network):
    """The denoiser for `guide.heun`: the model, guided as the flags say or as its run was evaluated."""
    config = network.config
    weight = config["guidance"] if args.guidance is None else args.guidance
    if weight == 1:
        refuse_guide_flags(args, "without a --guidance: this run was evaluated without one")
        return guide.autoguided(in_precision_of_run(network, config, args.device))
    path = guide_path(args, config, weight)
    with data.reading(path, "a guide for this model"):
        guide_network = model.load_denoiser(path, None, args.device, like=config)
    interval = (0.0, math.inf) if args.interval is None else args.interval
    network = in_precision_of_run(network, config, args.device)
    guide_network = in_precision_of_run(guide_network, config, args.device)
    return guide.autoguided(network, guide_network, weight, interval)


def guide_path(args, config, weight):
    """The checkpoint of the guide: --guide, else the guide of the run. DataError if there is none."""
    if args.guide is not None:
        return model.checkpoint_of(args.guide)
    advice = "give --guide, or --guidance 1"
    if config["guide"] is None:
        raise data.DataError(f"guidance {weight:g} needs a guide, which this run does not have: {advice}")
    path = Path(model.checkpoint_of(args.checkpoint)).parent / config["guide"]
    if not path.exists():
        raise data.DataError(f"guidance {weight:g} needs the run's guide, {path}, which is missing: {advice}")
    return path


def in_precision_of_run(network, config, device):
    """The network, not compiled: on a GPU in the precision of its run's evaluation, on a CPU in fp32."""
    is_gpu = device.startswith("cuda")
    bf16, _ = model.supported(device, config["bf16"] and is_gpu, False)
    return model.accelerate(network, device, bf16)


def choose_labels(args, config):
    """The labels int64 [n] to sample, None for an unconditional model: --class, or all classes in the shares
    of the data. The labels of mirrored images are not sampled."""
    names = list(config["class_names"])
    if args.class_name is not None:
        if args.class_name not in names:
            first = ", ".join(names[:12])
            raise data.DataError(f"--class {args.class_name}: this model has {len(names)} classes: {first}")
        return torch.full((args.n,), names.index(args.class_name))
    if config["classes"] == 0:
        return None
    seeds = torch.arange(args.seed, args.seed + args.n)
    return data.classes_in_turn(config["class_shares"], seeds)


# ------------------------------------------------------------------------------------------------------------
# Output: a picture, an archive, or one PNG an image. Each file appears whole or not at all.

def output_files(args, kind):
    """The paths that will be written. DataError if --out cannot hold these samples."""
    if os.path.splitext(args.out)[1]:
        return [args.out]
    if kind != "image":
        raise data.DataError(f"--out {args.out}: a folder holds images; give an .npz for {kind} samples")
    files = [os.path.join(args.out, f"{args.seed + i:06d}.png") for i in range(args.n)]
    if any(os.path.exists(file) for file in files):
        raise data.DataError(f"{args.out}: holds samples of these seeds already, give another folder")
    return files


def write_images(files, batches):
    """Write each image to a file of its own while the samples are drawn."""
    remaining = iter(files)
    for images in batches:
        for image in images.permute(0, 2, 3, 1).numpy():
            with data.writing(next(remaining)) as file:
                Image.fromarray(image).save(file, format="PNG")


def write_archive(path, samples, labels, config):
    """Write an .npz with the samples and, if the classes have names, their labels and these names."""
    key = {"image": "images", "latent": "latents", "tree": "points"}[config["kind"]]
    arrays = {key: samples.numpy()}
    if labels is not None and config["class_names"]:
        arrays["labels"] = labels.numpy()
        arrays["class_names"] = np.array(config["class_names"])
    with data.writing(path) as file:
        np.savez(file, **arrays)


def write_picture(args, samples, config):
    """Write one picture: the density of points, or a grid with a column for each class, else a square."""
    classes = len(config["class_names"])
    if config["kind"] == "tree":
        picture = data.density_picture(samples)
    elif classes and args.class_name is None:
        picture = data.image_grid(samples, min(classes, 20))
    else:
        picture = data.image_grid(samples, round(args.n ** 0.5))
    with data.writing(args.out) as file:
        picture.save(file, format="PNG")


if __name__ == "__main__":
    data.command(main, "give a smaller --batch, or --device cpu")
