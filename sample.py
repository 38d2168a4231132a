"""Sample a trained model, with autoguidance (arXiv 2406.02507): checkpoint in, images, latents or points out.

    python sample.py runs/tree-ajest --n 10000 --out points.npz

The checkpoint alone rebuilds the model; without flags it is sampled as its run was evaluated, with the run's
guide, weight and Heun steps. Sample i depends on seed + i alone, not on the number or the batch.
"""
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import guide
import model


def build_parser():
    """The parser of all flags."""
    parser = data.parser(__doc__, "RUN_OR_CHECKPOINT --out OUT [flags]")
    count, amount = data.number(int, "[1, inf)"), data.number(float, "[0, inf)")
    add = parser.add_argument
    add("checkpoint", metavar="RUN_OR_CHECKPOINT", help="run folder or checkpoint file")
    add("--n", type=count, default=64, help="number of samples")
    add("--out", required=True, help="grid.png, samples.npz, or a folder/ of PNG files")
    add("--seed", type=data.number(int, "[0, 1e15]"), default=0, help="sample i is drawn from seed + i")
    add("--class", dest="class_name", metavar="NAME", help="a class by its name; none = in the data's shares")
    add("--ema", type=amount, help="EMA length (0 = raw weights); none = the first")
    add("--batch", type=count, default=64, help="samples at a time")
    add("--guidance", type=amount, help="weight (1 = off); none = as evaluated")
    add("--guide", help="checkpoint; none = the run's own guide")
    add("--interval", type=amount, nargs=2, default=[0.0, math.inf], metavar=("LO", "HI"),
        help="guide only at LO <= sigma <= HI")
    add("--steps", type=count, help="Heun steps; none = as evaluated")
    add("--sigma-max", type=data.number(float, "(0.002, inf)"), help="first noise level; none = as evaluated")
    add("--device", type=data.device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


# ------------------------------------------------------------------------------------------------------------
# The denoiser that is sampled: the main model, guided where its run was evaluated so, or as the flags say.

def load(args):
    """-> (the denoiser for `guide.heun`, the main model's configuration, labels)."""
    path = model.checkpoint_of(args.checkpoint)
    with data.reading(path, "a denoiser of this program"):
        main = model.load_denoiser(path, args.ema, args.device)
        config, labels = main.config, labels_of(args, main.config)
    own = config["guide"] and Path(path).parent / config["guide"]
    weak_path = model.checkpoint_of(args.guide or own or "")
    w = config["guidance"] if args.guidance is None else args.guidance
    if w == 1 and args.guidance is None and (args.guide or args.interval != [0.0, math.inf]):
        raise data.DataError("--guide and --interval need a --guidance: this run was evaluated without")
    if w == 1:
        return guide.autoguided(main), config, labels
    if not os.path.exists(weak_path):
        raise data.DataError(f"guidance {w:g} needs a guide, and {weak_path or 'the one of this run'} is not "
                             "there: give --guide, or --guidance 1")
    with data.reading(weak_path, "a guide for this model"):
        weak = model.load_denoiser(weak_path, None, args.device, like=config)
        return guide.autoguided(main, weak, w, args.interval), config, labels


def labels_of(args, config):
    """int64 [n] or None: one class, or by seed all in the data's shares. Labels of mirrored images are not
    sampled."""
    names = config["class_names"]
    if args.class_name is None:
        seeds = torch.arange(args.seed, args.seed + args.n)
        return data.classes_in_turn(config["class_shares"], seeds) if config["classes"] else None
    if args.class_name not in names:
        raise data.DataError(f"--class {args.class_name}: not a class of this model, which has "
                             + (", ".join(names[:12]) + ", ..." * (len(names) > 12) if names else "none"))
    return torch.full((args.n,), names.index(args.class_name))


# ------------------------------------------------------------------------------------------------------------
# Output: a picture, an archive, or one PNG a sample. Each appears whole or not at all.

def main(argv=None):
    """Sample and write --out."""
    args = build_parser().parse_args(argv)
    suffix = os.path.splitext(args.out)[1]
    if suffix not in (".png", ".npz", ""):
        raise data.DataError(f"--out {args.out}: give a .png, an .npz or a folder")
    if args.interval[0] > args.interval[1]:
        raise data.DataError("--interval: give the lower level first")
    denoiser, config, labels = load(args)
    kind, parts = config["kind"], []
    if not suffix and kind != "image":
        raise data.DataError(f"--out {args.out}: a folder holds images; give an .npz for {kind} samples")
    seeds = range(args.seed, args.seed + args.n)
    files = [args.out] if suffix else [os.path.join(args.out, f"{seed:06d}.png") for seed in seeds]
    data.output(files[0])
    if not suffix and any(map(os.path.exists, files)):
        raise data.DataError(f"{args.out}: holds samples of these seeds already, give another folder")
    how = dict(steps=args.steps or config["sampling_steps"], sigma_max=args.sigma_max or config["sigma_max"])
    for x in guide.generate(denoiser, seeds, labels, args.batch, args.device, **how):
        parts.append(data.decode(x, config).cpu())
        done = sum(map(len, parts))
        data.progress(f"{done}/{args.n} samples", last=done == args.n)
        for name, image in zip(files[done - len(x):], parts[-1] if not suffix else []):
            with data.writing(name) as file:
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="PNG")
    samples = torch.cat(parts)
    if suffix:
        with data.writing(args.out) as file:
            if suffix == ".npz":
                name = {"image": "images", "latent": "latents", "tree": "points"}[kind]
                named = labels is not None and config["class_names"]
                known = dict(labels=labels, class_names=np.array(config["class_names"])) if named else {}
                np.savez(file, **{name: samples.numpy()}, **known)
            elif kind == "tree":
                data.density_picture(samples).save(file, format="PNG")
            else:                                               # a column a class (of one size), or a square
                columns = min(len(config["class_names"]), 20) * (args.class_name is None)
                columns = columns or round(args.n ** 0.5)
                data.image_grid(samples, columns).save(file, format="PNG")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    data.command(main)
