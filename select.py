"""Online batch selection: uniform, JEST, AJEST. Scores of a super-batch go in, indices to train on come out.

JEST is "Data curation via joint example selection further accelerates multimodal learning" (arXiv
2406.17711); AJEST is JEST with the guide of autoguidance (arXiv 2509.15267) as the reference. Used by
`train.py` as in:

    python train.py --selector ajest --early-steps 5000

This file has the name of a standard-library module. On interpreters that keep `select` in a shared library,
`import subprocess` or `import socket` run from this folder would find this file: it then puts the real module
in its own place and imports nothing else. To use it, load it by path under another name, as
`load_select` in train.py does.
"""
if __name__ == "select":
    import importlib.util
    import os
    import sys
    from importlib.machinery import PathFinder

    _here = os.path.dirname(os.path.abspath(__file__))
    _elsewhere = [p for p in sys.path if os.path.abspath(p or os.curdir) != _here]
    _spec = PathFinder.find_spec("select", _elsewhere)
    if _spec is None:
        raise ImportError("the interpreter's own select module was not found")
    sys.modules["select"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["select"])
else:
    import torch


# ------------------------------------------------------------------------------------------------------------
# Gumbel-top-k: sampling without replacement from softmax(logits), with inverse inclusion probabilities.

def gumbel(*shape, like, generator=None):
    """Standard Gumbel noise -log(-log u) on the device of `like`, fp32; much faster than exponential_."""
    return torch.rand(shape, device=like.device, generator=generator).log_().neg_().log_().neg_()


def gumbel_top_k(logits, k, generator=None):
    """Draw k of B indices without replacement from softmax(logits): [B] -> (indices int64 [k], weights [k]).

    The weights are inverse inclusion probabilities times k / B, so that (weights * f[indices]).mean() is an
    unbiased estimate of f.mean() for any f. Given the (k+1)-th largest perturbed logit kappa, example i is
    included with probability 1 - exp(-exp(logit_i - kappa)) (Kool et al., arXiv 1903.06059 and 2002.06043).
    """
    if k >= len(logits):
        return torch.arange(len(logits), device=logits.device), torch.ones_like(logits)
    perturbed, order = (logits + gumbel(len(logits), like=logits, generator=generator)).topk(k + 1)
    included = -torch.expm1(-torch.exp(logits[order[:k]] - perturbed[k]))
    return order[:k], (k / len(logits)) / included


# ------------------------------------------------------------------------------------------------------------
# JEST. Its joint score matrix S_ij = loss_i(learner) - loss_j(reference) is separable for a per-example loss,
# so the conditional logits of chunk m collapse to score * (m + 1) / (2 m + 1), m the number already chosen:
# no B x B matrix.

def jest(score, k, chunks=16, generator=None):
    """Choose k of B examples by JEST: score [B] -> int64 [k], no index twice.

    The first chunk is uniform; each further one is drawn without replacement from the softmax of the
    conditional logits over what is left. k that `chunks` does not divide ends in a smaller chunk. B, k and
    chunks fix every shape, so nothing here waits for the device.
    """
    size = max(1, k // chunks)
    starts = range(0, k, size)
    noise = gumbel(len(starts), len(score), like=score, generator=generator)  # [chunks, super-batch]
    logits, chosen = score - score.amax(), []
    for m, perturbed in zip(starts, noise):
        perturbed += logits * ((m + 1) / (2 * m + 1) if m else 0.0)
        chosen.append(perturbed.topk(min(size, k - m)).indices)
        logits.index_fill_(0, chosen[-1], -torch.inf)
    return torch.cat(chosen)


# ------------------------------------------------------------------------------------------------------------
# Scores: what makes an example worth training on.

SCORES = ("learnability", "hard", "easy", "gradient-norm", "target-norm")
NEEDS_REFERENCE = ("learnability", "easy")


def score(learner, reference, kind="learnability", invert=False, gain=0.0):
    """Per-example scores [B] from the losses [B] of learner and reference on the same sigma and noise.

    kind: "learnability" = learner - reference, "hard" = learner, "easy" = -reference (2406.17711, sec. 3.1).
    "gradient-norm" = log(learner + 0.1) / 2: its softmax draws in proportion to the root of the loss, the
    norm of the gradient with respect to the raw network's output up to a constant; 0.1 bounds the weights of
    --debias. "target-norm" is the same with the loss of F = 0, for which no network is run. `reference` may
    be None for the kinds that are not in NEEDS_REFERENCE. gain > 0 standardizes the scores over the
    super-batch and multiplies them by gain; 0 leaves them as they are.
    """
    if kind in ("gradient-norm", "target-norm"):
        s = (learner + 0.1).log() / 2
    else:
        s = {"learnability": lambda: learner - reference, "hard": lambda: learner,
             "easy": lambda: -reference}[kind]()
    s = -s if invert else s
    return gain * (s - s.mean()) / s.std().clamp_min(1e-12) if gain else s
