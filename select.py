"""Online batch selection, JEST and AJEST: a super-batch goes in, the batch to train on comes out.

JEST is "Data curation via joint example selection further accelerates multimodal learning" (arXiv
2406.17711); AJEST is JEST with the guide of autoguidance (arXiv 2509.15267) as the reference. Used by
`train.py` as in:

    python train.py --selector ajest --early-steps 5000

This file has the name of a standard-library module. On interpreters that keep `select` in a shared library,
`import subprocess` or `import socket` run from this folder would find this file: it then puts the real module
in its own place and imports nothing else. To use it, load it by path under another name, as train.py does.
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

    import model


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

SCORES = ("learnability", "hard", "easy", "gradient-norm")
NEEDS_REFERENCE = ("learnability", "easy")


def score(learner, reference, kind="learnability", invert=False, gain=0.0):
    """Per-example scores [B] from the losses [B] of learner and reference on one sigma, noise and target.

    kind: "learnability" = learner - reference, "hard" = learner, "easy" = -reference (2406.17711, sec. 3.1).
    "gradient-norm" = log(learner + 0.1) / 2: its softmax draws in proportion to the root of the loss, the
    norm of the gradient with respect to the raw network's output up to a constant; 0.1 bounds the weights of
    --debias. `reference` may be None for the kinds that are not in NEEDS_REFERENCE. gain > 0 standardizes the
    scores over the super-batch and multiplies them by gain; 0 leaves them as they are.
    """
    if kind == "gradient-norm":
        s = (learner + 0.1).log() / 2
    else:
        s = -reference if kind == "easy" else learner if kind == "hard" else learner - reference
    s = -s if invert else s
    return gain * (s - s.mean()) / s.std().clamp_min(1e-12) if gain else s


# ------------------------------------------------------------------------------------------------------------
# The curator: scores B examples with learner and reference on the same noise level, noise and target, keeps b
# of them with exactly these, and knows when to. AJEST is JEST whose reference is the guide.

class Curator:
    """c: the run's settings (score, invert, gain, interpolate, chunks, debias, micro_batch, the early and
    late rules). learner: the Denoiser in training; reference: a Denoiser, or None where neither score nor
    rules need one; accelerate: applied to the function that computes the losses."""

    def __init__(self, c, learner, reference=None, accelerate=lambda function: function):
        self.c, self.learner, self.reference = c, learner, reference
        self.losses = accelerate(self._losses)

    def _losses(self, x0, noise, sigma, labels, target):
        """Losses [2, B] of learner (or the autoguided pair, "interpolated AJEST") and reference."""
        learner, D_x = self.learner.loss(x0, noise, sigma, labels, target)
        if self.reference is None:
            return torch.stack([learner, learner])
        reference, D_reference = self.reference.loss(x0, noise, sigma, labels, target)
        if self.c.interpolate:
            learner = model.per_example_loss(torch.lerp(D_reference, D_x, self.c.interpolate), target, sigma)
        return torch.stack([learner, reference])

    def measure(self, batch):
        """Losses [2, B] of learner and reference on a super-batch, without dropout, by micro-batches."""
        training, size = self.learner.training, self.c.micro_batch or len(batch.x0)
        self.learner.eval()
        with torch.no_grad():
            losses = [self.losses(*batch.rows(slice(i, i + size))) for i in range(0, len(batch.x0), size)]
        self.learner.train(training)
        return torch.cat(losses, 1)

    def choose(self, batch, k, generator):
        """k of a super-batch, and their weights [k] (None: all alike)."""
        c, (learner, reference) = self.c, self.measure(batch)
        scores = score(learner, reference, c.score, c.invert, c.gain)
        if c.debias:
            index, weight = gumbel_top_k(scores, k, generator)
            return batch.rows(index), weight
        return batch.rows(jest(scores, k, c.chunks, generator)), None

    def statistics(self, batch, chosen):
        """For the log: the mean ln sigma of the super-batch and of what was chosen of it."""
        return dict(ln_sigma_drawn=batch.sigma.log().mean().item(),
                    ln_sigma_selected=chosen.sigma.log().mean().item())

    def active(self, step, progress, super_batches, average=lambda tensors: None):
        """Whether this step selects. Early AJEST does for its first steps. The other two rules compare the
        mean losses of learner and reference on the step's super-batch once per log interval (`average` makes
        several processes agree), and keep in progress["selecting"] what they found."""
        c, selecting = self.c, progress["selecting"]
        if step % c.log_every == 0 and (c.until_better and selecting or c.once_better and not selecting):
            means = self.measure(super_batches[step]).mean(1)                           # [2]
            average([means])
            progress["selecting"] = selecting != bool(means[0] < means[1])
        return progress["selecting"] and not 0 < c.early_steps <= step
