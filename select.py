"""Which examples a step trains on: uniform batches, or JEST and AJEST, which choose from a super-batch.

JEST: "Data curation via joint example selection further accelerates multimodal learning" (arXiv 2406.17711).
AJEST is JEST whose reference is the guide of autoguidance (arXiv 2509.15267). In a loop of your own:

    x0, sigma, noise = draw(5 * k)                              # a super-batch
    with torch.no_grad():                                       # the same sigma and noise for both networks
        scores = loss(learner, x0, sigma, noise) - loss(guide, x0, sigma, noise)        # per example, [5 k]
    index = jest(scores, k)                                     # what the guide does better is chosen more
    x0, sigma, noise = x0[index], sigma[index], noise[index]    # train on these, and with just these

This file has the name of a standard-library module. On interpreters that keep `select` in a shared library,
`import subprocess` or `import socket` run from this folder would find this file: it then puts the real module
in its own place and does nothing else. To use it, load it by path under another name, as train.py does.
"""
if __name__ == "select":
    import importlib.util
    import os
    import sys
    from importlib.machinery import PathFinder

    _elsewhere = [p for p in sys.path if not os.path.exists(os.path.join(p or os.curdir, "select.py"))]
    _spec = PathFinder.find_spec("select", _elsewhere)
    if _spec is None:
        raise ImportError("the interpreter's own select module was not found")
    sys.modules["select"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["select"])
else:
    import torch


# ------------------------------------------------------------------------------------------------------------
# JEST. For a per-example loss its joint score matrix S_ij = loss_i(learner) - loss_j(reference) is separable,
# so the conditional logits after m choices are score * (m + 1) / (2 m + 1): no B x B matrix. A chunk is drawn
# without replacement by Gumbel-top-k: the k largest of logits + Gumbel noise.

def gumbel(n, device, generator=None):
    """Standard Gumbel noise [n]."""
    return -torch.log(-torch.log(torch.rand(n, device=device, generator=generator)))


def jest(scores, k, chunks=16, generator=None):
    """Choose k of B examples: scores [B] -> int64 [k], no index twice. The first chunk is uniform; where
    `chunks` does not divide k, the last one is smaller. B, k and chunks fix every shape, so nothing here
    waits for the device."""
    size, logits, chosen = max(1, k // chunks), scores - scores.amax(), []
    for m in range(0, k, size):                                 # m are chosen so far
        slope = (m + 1) / (2 * m + 1) if m else 0.0
        perturbed = slope * logits + gumbel(len(scores), scores.device, generator)
        chosen.append(perturbed.topk(min(size, k - m)).indices)
        logits = logits.index_fill(0, chosen[-1], -torch.inf)
    return torch.cat(chosen)


# ------------------------------------------------------------------------------------------------------------
# One draw without replacement from softmax(logits), with the weights that undo the choice (Kool et al., arXiv
# 1903.06059 and 2002.06043): given the (k + 1)-th largest perturbed logit kappa, example i is included with
# probability 1 - exp(-exp(logit_i - kappa)).

def gumbel_top_k(logits, k, generator=None):
    """logits [B] -> (indices int64 [k], weights [k]): (weights * f[indices]).mean() estimates f.mean()
    without bias for any f [B]."""
    if k >= len(logits):
        return torch.arange(len(logits), device=logits.device), torch.ones_like(logits)
    perturbed, order = (logits + gumbel(len(logits), logits.device, generator)).topk(k + 1)
    included = -torch.expm1(-torch.exp(logits[order[:k]] - perturbed[k]))
    return order[:k], (k / len(logits)) / included


# ------------------------------------------------------------------------------------------------------------
# What makes an example worth training on (2406.17711, section 3.1). "gradient-norm" is ours: its softmax
# draws in proportion to the root of the loss, up to a constant the gradient's norm at the network's output.

SCORES = {
    "learnability": lambda learner, reference: learner - reference,
    "hard": lambda learner, reference: learner,
    "easy": lambda learner, reference: -reference,
    "gradient-norm": lambda learner, reference: (learner + 0.1).log() / 2}      # 0.1 bounds the weights


def example_scores(learner, reference, kind="learnability", invert=False, gain=0.0):
    """Scores [B] from the losses [B] of learner and reference on one sigma, noise and target. gain > 0
    standardizes them over the super-batch and multiplies by gain; 0 leaves them as they are."""
    scores = SCORES[kind](learner, reference)
    scores = -scores if invert else scores
    return gain * (scores - scores.mean()) / scores.std().clamp_min(1e-12) if gain else scores


# ------------------------------------------------------------------------------------------------------------
# Selectors: called with a step, they return the batch to train on and its weights in the loss [b].

class Uniform:
    """Batches of b, drawn at random, all weights 1."""

    def __init__(self, batches):
        self.batches, self.drawn = batches, batches.n           # batches[step] -> data.Batch

    def __call__(self, step):
        batch = self.batches[step]
        return batch, torch.ones_like(batch.sigma)


class Jest:
    """Out of super-batches of B the b examples that score best, with their noise levels, noise and targets.
    With the guide as the reference this is AJEST."""

    def __init__(self,
        super_batches,              # super_batches[step] -> data.Batch of B
        losses,                     # losses(batch) -> those of learner and reference [2, B], without gradient
        k,                          # b, the examples to keep
        stream,                     # stream(step) -> torch.Generator
        chunks=16,                  # in which the batch is filled
        debias=False,               # draw once, weigh by inverse inclusion probability
        **how,                      # kind, invert, gain of `example_scores`
    ):
        self.super_batches, self.losses, self.k, self.stream = super_batches, losses, k, stream
        self.chunks, self.debias, self.how, self.drawn = chunks, debias, how, super_batches.n

    def __call__(self, step):
        batch, generator = self.super_batches[step], self.stream(step)
        self.seen = learner, reference = self.losses(batch)     # for the rule that ends the selection
        scores = example_scores(learner, reference, **self.how)
        if self.debias:
            index, weight = gumbel_top_k(scores, self.k, generator)
            return batch.rows(index), weight
        index = jest(scores, self.k, self.chunks, generator)
        return batch.rows(index), torch.ones_like(scores[:self.k])
