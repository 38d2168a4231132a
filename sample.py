"""Sample a trained model, with autoguidance (arXiv 2406.02507): checkpoint in, images, latents or points out.

    python sample.py runs/tree-ajest --n 10000 --guidance 3 --out points.npz

The checkpoint alone rebuilds the model. Sample i depends on seed + i alone, not on the number or the batch.
"""
import argparse
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
# The command line.

def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        usage="%(prog)s RUN_OR_CHECKPOINT --out OUT [flags]",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110))
    on_off = argparse.BooleanOptionalAction
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="run folder or checkpoint file")
    parser.add_argument("--n", type=int, default=64, help="number of samples")
    parser.add_argument("--out", required=True, help="grid.png, samples.npz, or a folder/ of PNG files")
    parser.add_argument("--seed", type=int, default=0, help="sample i is drawn from seed + i")
    parser.add_argument("--class", dest="label", help="class name or number (default: all in turn)")
    parser.add_argument("--ema", type=float,
                        help="EMA length (default: the checkpoint's first; 0 = raw weights)")
    parser.add_argument("--batch", type=int, default=64, help="samples at a time")
    parser.add_argument("--columns", type=int, default=0,
                        help="columns of a grid (0 = the classes, or square)")
    g = parser.add_argument_group("guidance")
    g.add_argument("--guidance", type=float,
                   help="weight w, 1 = off (default: as trained, 1 without a guide)")
    g.add_argument("--guide",
                   help="checkpoint; self = the model without its label (default: the run's own guide)")
    g.add_argument("--interval", type=float, nargs=2, metavar=("LO", "HI"),
                   help="guide only at LO <= sigma <= HI")
    g = parser.add_argument_group("sampler (EDM, arXiv 2206.00364, algorithms 1 and 2)")
    g.add_argument("--steps", type=int, default=32, help="Heun steps")
    g.add_argument("--sigma-min", type=float, default=0.002, help="last noise level before 0")
    g.add_argument("--sigma-max", type=float, help="first noise level (default: as trained)")
    g.add_argument("--rho", type=float, default=7.0, help="spacing of the noise levels")
    g.add_argument("--S-churn", type=float, default=0.0, help="stochasticity (0 = off)")
    g.add_argument("--S-min", type=float, default=0.0, help="lowest noise level with churn")
    g.add_argument("--S-max", type=float, default=float("inf"), help="highest noise level with churn")
    g.add_argument("--S-noise", type=float, default=1.0, help="standard deviation of the churn's noise")
    g = parser.add_argument_group("machine")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda or mps")
    g.add_argument("--bf16", action=on_off, help="bf16 autocast (default: on CUDA)")
    g.add_argument("--compile", action=on_off, help="torch.compile (default: on CUDA)")
    for action in parser._actions:
        if action.default not in (None, argparse.SUPPRESS):
            action.help += f" [{action.default}]"
    return parser


def check(args):
    """DataError for values that no sampler can work with, before anything is loaded or written."""
    if min(args.n, args.batch, args.steps) < 1:
        raise data.DataError("--n, --batch and --steps must be at least 1")
    if abs(args.seed) >= 2 ** 62:
        raise data.DataError(f"--seed {args.seed}: too large, give less than 2^62")
    if (args.sigma_min <= 0 or args.rho <= 0
            or args.sigma_max is not None and args.sigma_max <= args.sigma_min):
        raise data.DataError("--sigma-min and --rho must be positive, --sigma-max above --sigma-min")
    folder = os.path.dirname(args.out.rstrip("/")) or "."
    if not os.path.isdir(folder):
        raise data.DataError(f"--out {args.out}: no folder {folder}")
    if os.path.splitext(args.out)[1] not in (".png", ".npz", ""):
        raise data.DataError(f"--out {args.out}: give a .png, an .npz or a folder")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise data.DataError(f"--device {args.device}: {str(error).splitlines()[0]}") from None


# ------------------------------------------------------------------------------------------------------------
# The denoiser that is sampled: the main model, guided where a guide is at hand.

def load(args):
    """-> (denoiser, the main model's configuration); CheckpointError or DataError names the file or flag."""
    main = model.load_denoiser(args.checkpoint, args.ema, args.device)
    run = Path(args.checkpoint) if os.path.isdir(args.checkpoint) else Path(args.checkpoint).parent
    own = [p for p in (run / "guide" / "checkpoint.pt", run / "reference" / "checkpoint.pt") if p.exists()]
    other = args.guide or (own[0] if own else None)
    w = args.guidance if args.guidance is not None else main.config["guidance"] if other else 1.0
    if w != 1 and other is None:
        raise data.DataError(f"--guidance {w:g} needs --guide: there is none in {run}")
    cuda = torch.device(args.device).type == "cuda"
    how = args.device, *(cuda if flag is None else flag for flag in (args.bf16, args.compile))
    denoiser = model.accelerate(main, *how)
    if w != 1:
        weak = guide.Unlabelled(main) if other == "self" else model.load_denoiser(other, device=args.device)
        try:
            denoiser = guide.Autoguided(denoiser, model.accelerate(weak, *how), w, args.interval)
        except ValueError as error:
            raise data.DataError(f"--guide {other}: {error}") from None
        if getattr(weak, "classes", main.classes) != main.classes:
            raise data.DataError(f"--guide {other}: has {weak.classes} labels, the main model {main.classes}")
    return denoiser, main.config


def labels_of(args, config):
    """int64 [n] or None: one class, or all in turn. Labels of mirrored images are not sampled."""
    names = config["class_names"]
    if not config["classes"]:
        if args.label is not None:
            raise data.DataError("--class: this model has no classes")
        return None
    if args.label is None:
        return torch.arange(args.n) % max(len(names), 1)
    if args.label in names:
        return torch.full((args.n,), names.index(args.label))
    if args.label.isdecimal() and int(args.label) < len(names):
        return torch.full((args.n,), int(args.label))
    raise data.DataError(f"--class {args.label}: not a class of this model, which has "
                         + ", ".join(names[:12]) + (", ..." if len(names) > 12 else ""))


# ------------------------------------------------------------------------------------------------------------
# Output: a picture, an archive, or one PNG a sample.

def write(samples, labels, config, args):
    """Write samples [n, ...] to args.out, a .png or .npz; the file appears whole or not at all."""
    if args.out.endswith(".npz"):
        name = {"image": "images", "latent": "latents", "tree": "points"}[config["kind"]]
        arrays = {name: samples.numpy()} | ({} if labels is None else {"labels": labels.numpy()})
        with open(f"{args.out}.tmp", "wb") as file:
            np.savez(file, **arrays)
    elif config["kind"] == "tree":
        data.density_picture(samples).save(f"{args.out}.tmp", format="PNG")
    else:
        columns = args.columns or (min(len(config["class_names"]), 20)
                                   if labels is not None and args.label is None else round(args.n ** 0.5))
        data.image_grid(samples, columns).save(f"{args.out}.tmp", format="PNG")
    os.replace(f"{args.out}.tmp", args.out)


def main(argv=None):
    """Sample and write --out; exits with status 2 and one line on stderr where that is not possible."""
    args = build_parser().parse_args(argv)
    try:
        check(args)
        denoiser, config = load(args)
        labels = labels_of(args, config)
        folder = Path(args.out) if not os.path.splitext(args.out)[1] else None
        if folder and config["kind"] != "image":
            raise data.DataError(f"--out {args.out}: a folder holds images; "
                                 f"give an .npz for {config['kind']} samples")
        if folder:
            folder.mkdir(exist_ok=True)
        sampler = dict(steps=args.steps, sigma_min=args.sigma_min,
                       sigma_max=args.sigma_max or config["sigma_max"], rho=args.rho,
                       S_churn=args.S_churn, S_min=args.S_min, S_max=args.S_max, S_noise=args.S_noise)
        seeds, parts, done = range(args.seed, args.seed + args.n), [], 0
        for x in guide.generate(denoiser, seeds, labels, args.batch, args.device, **sampler):
            x = data.decode(x, config).cpu()
            for i, image in enumerate(x if folder else []):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{seeds[done + i]:06d}.png")
            parts += [] if folder else [x]
            done += len(x)
            data.progress(f"{done}/{args.n} samples", last=done == args.n)
        if not folder:
            write(torch.cat(parts), labels, config, args)
        print(f"wrote {args.out}")
    except (data.DataError, model.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if os.path.isfile(f"{args.out}.tmp"):
            os.remove(f"{args.out}.tmp")
        print(f"error: cannot write {args.out}: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
