"""Sample a trained model, with autoguidance (arXiv 2406.02507): checkpoint in, images, latents or points out.

    python sample.py runs/tree-ajest --n 10000 --guidance 3 --out points.npz

The checkpoint alone rebuilds the model. Sample i depends on seed + i alone, not on the number or the batch.
"""
import argparse
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import guide
import model


# ------------------------------------------------------------------------------------------------------------
# The command line.

def build_parser():
    parser = data.parser(__doc__, "RUN_OR_CHECKPOINT --out OUT [flags]")
    count, amount = data.number(int, "[1, inf)"), data.number(float, "[0, inf)")
    on_off = argparse.BooleanOptionalAction
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="run folder or checkpoint file")
    parser.add_argument("--n", type=count, default=64, help="number of samples")
    parser.add_argument("--out", required=True, help="grid.png, samples.npz, or a folder/ of PNG files")
    parser.add_argument("--seed", type=data.number(int, "[0, 1e15]"), default=0,
                        help="sample i is drawn from seed + i")
    parser.add_argument("--class", dest="label", help="class name or number; none = all in turn")
    parser.add_argument("--ema", type=amount, help="EMA length (0 = raw weights); none = the first")
    parser.add_argument("--batch", type=count, default=64, help="samples at a time")
    g = parser.add_argument_group("guidance")
    g.add_argument("--guidance", type=amount, help="weight (1 = off); none = as trained")
    g.add_argument("--guide", help="checkpoint; none = the run's own guide")
    g.add_argument("--interval", type=amount, nargs=2, default=[0.0, float("inf")],
                   metavar=("LO", "HI"), help="guide only at LO <= sigma <= HI")
    g = parser.add_argument_group("sampler (EDM, arXiv 2206.00364, algorithms 1 and 2)")
    g.add_argument("--steps", type=count, default=32, help="Heun steps")
    g.add_argument("--sigma-max", type=data.number(float, "(0.002, inf)"),
                   help="first noise level; none = as trained")
    g.add_argument("--S-churn", type=amount, default=0.0, help="stochasticity (0 = off)")
    g = parser.add_argument_group("machine")
    g.add_argument("--device", type=data.device, default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda, cuda:1 or mps")
    g.add_argument("--bf16", action=on_off, help="bf16 autocast; none = on CUDA")
    g.add_argument("--compile", action=on_off, help="torch.compile; none = on CUDA")
    return parser


# ------------------------------------------------------------------------------------------------------------
# The denoiser that is sampled: the main model, guided where a guide is at hand.

def load(args):
    """-> (the denoiser for `guide.heun`, the main model's configuration)."""
    how = args.device, *model.able(args.device, args.bf16, args.compile)
    path = model.checkpoint_of(args.checkpoint)
    with data.reading(path, "a denoiser of this program"):
        main = model.load_denoiser(path, args.ema, args.device)
    run = Path(path).parent
    own = [p for p in (run / "guide" / "checkpoint.pt", run / "guide.pt", run / "reference" / "checkpoint.pt")
           if p.exists()]
    other = model.checkpoint_of(args.guide or own[0]) if args.guide or own else None
    w = args.guidance if args.guidance is not None else main.config["guidance"] if other else 1.0
    if w != 1 and other is None:
        raise data.DataError(f"--guidance {w:g} needs --guide: there is none in {run}")
    if w == 1:
        return guide.autoguided(model.accelerate(main, *how)), main.config
    with data.reading(other, "a guide for this model"):
        weak = model.load_denoiser(other, device=args.device)
        pair = (model.accelerate(denoiser, *how) for denoiser in (main, weak))
        return guide.autoguided(*pair, w, args.interval), main.config


def labels_of(args, config):
    """int64 [n] or None: one class, or all in turn. Labels of mirrored images are not sampled."""
    names = config["class_names"]
    if args.label is None:
        return torch.arange(args.n) % max(len(names), 1) if config["classes"] else None
    if args.label in names:
        return torch.full((args.n,), names.index(args.label))
    if args.label.isdecimal() and int(args.label) < len(names):
        return torch.full((args.n,), int(args.label))
    raise data.DataError(f"--class {args.label}: not a class of this model, which has "
                         + (", ".join(names[:12]) + ", ..." * (len(names) > 12) if names else "none"))


# ------------------------------------------------------------------------------------------------------------
# Output: a picture, an archive, or one PNG a sample. Each appears whole or not at all.

def run(args):
    """Sample and write --out."""
    suffix = os.path.splitext(args.out)[1]
    if suffix not in (".png", ".npz", ""):
        raise data.DataError(f"--out {args.out}: give a .png, an .npz or a folder")
    low, high = args.interval
    if low > high:
        raise data.DataError(f"--interval {low:g} {high:g}: give the lower level first")
    denoiser, config = load(args)
    labels, kind, parts = labels_of(args, config), config["kind"], []
    if not suffix and kind != "image":
        raise data.DataError(f"--out {args.out}: a folder holds images; give an .npz for {kind} samples")
    if not suffix:
        os.makedirs(args.out, exist_ok=True)
    seeds, sigma_max = range(args.seed, args.seed + args.n), args.sigma_max or config["sigma_max"]
    for x in guide.generate(denoiser, seeds, labels, args.batch, args.device, steps=args.steps,
                            sigma_max=sigma_max, S_churn=args.S_churn):
        parts.append(data.decode(x, config).cpu())
        done = sum(map(len, parts))
        data.progress(f"{done}/{args.n} samples", last=done == args.n)
        for i, image in enumerate(parts[-1] if not suffix else [], args.seed + done - len(x)):
            with data.writing(os.path.join(args.out, f"{i:06d}.png")) as file:
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="PNG")
    samples = torch.cat(parts)
    if suffix:
        with data.writing(args.out) as file:
            if suffix == ".npz":
                name = {"image": "images", "latent": "latents", "tree": "points"}[kind]
                extra = {} if labels is None else {"labels": labels.numpy()}
                np.savez(file, **{name: samples.numpy()}, **extra)
            elif kind == "tree":
                data.density_picture(samples).save(file, format="PNG")
            else:                                               # a column a class, or a square
                columns = min(len(config["class_names"]), 20) * (args.label is None) or round(args.n ** 0.5)
                data.image_grid(samples, columns).save(file, format="PNG")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    data.command(run, build_parser())
