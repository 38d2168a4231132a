"""Choose the examples of a training step: uniform batches, or JEST and AJEST, which pick from a larger batch.

JEST: "Data curation via joint example selection further accelerates multimodal learning" (arXiv 2406.17711).
AJEST is JEST with the guide of autoguidance as the reference (arXiv 2509.15267). In a loop of your own:

    x0, sigma, noise = draw(5 * k)                              # a super-batch
    with torch.no_grad():                                       # both networks see the same sigma and noise
        scores = loss(learner, x0, sigma, noise) - loss(guide, x0, sigma, noise)        # per example, [5 k]
    index = jest(scores, k)                                     # prefers what the guide does better
    x0, sigma, noise = x0[index], sigma[index], noise[index]    # train on exactly these

Copy `FACTORS`, `gumbel`, `finite` and `jest` with the imports of math and torch, or this file under another
name: `select` is a standard-library module. Scores are logits, so their scale matters: a loss that is summed
over pixels selects far harder than a loss that is averaged.

On interpreters that keep the standard `select` in a shared library (pyenv, conda, macOS), `import subprocess`
in this folder finds this file. It then puts the real module in its place. train.py loads this file by path.
"""
if __name__ == "select":
    import importlib.util
    import os
    import sys
    from importlib.machinery import PathFinder

    def _holds_select(folder):
        return os.path.exists(os.path.join(folder or os.curdir, "select.py"))

    _folders = [folder for folder in sys.path if not _holds_select(folder)]
    _spec = PathFinder.find_spec("select", _folders)
    if _spec is None:
        raise ImportError("the interpreter's own select module was not found")
    sys.modules["select"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["select"])
else:
    import math

    import torch


# ------------------------------------------------------------------------------------------------------------
# JEST draws a batch in chunks. Once m examples are chosen, it scores every other example i by a matrix S of
# pairs: S_ii plus the sum of S_ij + S_ji over the m chosen j. For a loss without pairs JEST's own matrix is
# diagonal, so the chosen examples add nothing. The AJEST authors take S_ij = loss_i(learner) -
# loss_j(reference). Then the sum is (m + 1) * score_i plus a term that is the same for every i, and they
# divide it by its number of terms, 2 m + 1. Either way S reduces to a factor on the scores.

FACTORS = {
    "independent": lambda m: 1,                                 # JEST (2406.17711) for a loss without pairs
    "mean": lambda m: (m + 1) / (2 * m + 1) if m > 0 else 0,    # AJEST's code; the first chunk is uniform
    "sum": lambda m: m + 1}                                     # an early version of it: no division


def gumbel(n, device, generator=None):
    """Standard Gumbel noise, float32 [n]."""
    uniform = torch.rand(n, device=device, generator=generator).clamp(min=1e-30)        # rand may return 0
    return -torch.log(-torch.log(uniform))


def finite(scores):
    """The scores [B], with the mean of the finite ones in place of NaN and infinities."""
    is_finite = scores.isfinite()
    total = scores.where(is_finite, 0.0).double().sum()
    mean = total / is_finite.sum().clamp(min=1)
    return scores.where(is_finite, mean.to(scores.dtype))


def jest(scores, k, chunks=16, joint="mean", generator=None):
    """Choose k of B examples, in at most `chunks` chunks: scores [B] -> indices int64 [k], none twice.

    A chunk is drawn without replacement from softmax(FACTORS[joint](m) * scores) by Gumbel-top-k: it takes
    the largest logits after Gumbel noise is added. Nothing here waits for the device.
    """
    logits = finite(scores)
    logits = (logits - logits.max()).clamp(min=-1e30)           # finite after any factor
    chunk_size = math.ceil(k / chunks)
    chosen = []
    for m in range(0, k, chunk_size):                           # m examples are chosen already
        perturbed = FACTORS[joint](m) * logits + gumbel(len(scores), scores.device, generator)
        if m > 0:
            perturbed = perturbed.index_fill(0, torch.cat(chosen), -math.inf)
        chunk = perturbed.topk(min(chunk_size, k - m)).indices
        chosen.append(chunk)
    return torch.cat(chosen)


# ------------------------------------------------------------------------------------------------------------
# One draw without replacement from softmax(logits), with the weights that undo the choice (Kool et al., arXiv
# 1903.06059 and 2002.06043): given the (k + 1)-th largest perturbed logit kappa, example i is included with
# probability 1 - exp(-exp(logit_i - kappa)).

def gumbel_top_k(logits, k, generator=None):
    """logits [B] -> (indices int64 [k], weights [k]): (weights * f[indices]).mean() estimates f.mean()
    without bias for any f [B]."""
    B = len(logits)
    if k >= B:
        return torch.arange(B, device=logits.device), torch.ones_like(logits)
    logits = finite(logits)
    perturbed, order = (logits + gumbel(B, logits.device, generator)).topk(k + 1)
    index, kappa = order[:k], perturbed[k]
    inclusion = -torch.expm1(-torch.exp(logits[index] - kappa))
    return index, (k / B) / inclusion


# ------------------------------------------------------------------------------------------------------------
# Scores of examples (2406.17711, section 3.1). "root-loss" is ours: its softmax draws in proportion to the
# norm of the gradient at the network's output. This norm is sqrt(loss), or sqrt(loss) / e^u where EDM2's
# uncertainty u(sigma) divides the loss by e^u. The 0.1 bounds the weights of --debias.

SCORES = ("learnability", "hard", "easy", "root-loss")


def example_scores(
    learner_losses, reference_losses=None, u=None, score="learnability", invert=False, gain=0.0,
):
    """Scores [B] of a super-batch; an example with a higher score is more likely to be chosen.

    learner_losses      [B]
    reference_losses    [B], on the same noise levels, noise and targets; not used by "hard" and "root-loss"
    u                   log-uncertainty u(sigma) [B], for "root-loss"; None = 0
    score               a name in SCORES
    invert              prefer low scores
    gain                > 0 standardizes the scores over the super-batch and multiplies them by gain; 0 = raw
    """
    if score == "learnability":
        scores = learner_losses - reference_losses
    elif score == "hard":
        scores = learner_losses
    elif score == "easy":
        scores = -reference_losses
    elif score == "root-loss":
        scores = (learner_losses + 0.1).log() / 2
        if u is not None:
            scores = scores - u
    else:
        raise ValueError(f"score {score}: give one of {', '.join(SCORES)}")
    if invert:
        scores = -scores
    if gain > 0:
        scores = gain * (scores - scores.mean()) / scores.std().clamp_min(1e-12)
    return scores


# ------------------------------------------------------------------------------------------------------------
# Selectors. A selector is called with the step and returns the batch to train on and a weight per example.

class Uniform:
    """Random batches, all weights 1."""

    def __init__(self, batches):
        self.batches = batches                                  # batches[step] -> data.Batch
        self.drawn = batches.n                                  # examples drawn per step

    def __call__(self, step):
        batch = self.batches[step]
        return batch, torch.ones_like(batch.sigma)


class Jest:
    """k examples of a super-batch, chosen by their scores and trained on with the noise levels, noise and
    targets that they were scored on. With the guide as the reference this is AJEST."""

    def __init__(
        self,
        super_batches,              # super_batches[step] -> data.Batch of B examples
        learner_loss,               # learner_loss(batch) -> losses [B], without gradient
        reference_loss,             # the same for the reference; None = the score needs no reference
        k,                          # examples to choose
        make_generator,             # make_generator(step) -> torch.Generator
        chunks=16,                  # the batch is filled in at most this many chunks
        joint="mean",               # a name in FACTORS
        debias=False,               # draw once and weigh by inverse inclusion probability
        uncertainty=None,           # uncertainty(sigma [B]) -> u [B], for the score "root-loss"
        score="learnability",       # score, invert and gain: see `example_scores`
        invert=False,
        gain=0.0,
    ):
        self.super_batches = super_batches
        self.learner_loss = learner_loss
        self.reference_loss = reference_loss
        self.k = k
        self.make_generator = make_generator
        self.chunks = chunks
        self.joint = joint
        self.debias = debias
        self.uncertainty = uncertainty
        self.score = score
        self.invert = invert
        self.gain = gain
        self.drawn = super_batches.n
        self.mean_excess = None     # mean of learner's loss - reference's loss, for --until-better

    def __call__(self, step):
        batch = self.super_batches[step]

        # Score the super-batch.
        learner_losses = self.learner_loss(batch)
        reference_losses = None
        if self.reference_loss is not None:
            reference_losses = self.reference_loss(batch)
            self.mean_excess = (learner_losses - reference_losses).mean()
        u = None
        if self.uncertainty is not None:
            u = self.uncertainty(batch.sigma)
        scores = example_scores(learner_losses, reference_losses, u, self.score, self.invert, self.gain)

        # Choose k examples.
        generator = self.make_generator(step)
        if self.debias:
            index, weight = gumbel_top_k(scores, self.k, generator)
        else:
            index = jest(scores, self.k, self.chunks, self.joint, generator)
            weight = torch.ones_like(scores[:self.k])
        return batch.rows(index), weight
