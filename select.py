"""Choose the examples of a training step: JEST and AJEST, which pick a batch from a larger one.

JEST: "Data curation via joint example selection further accelerates multimodal learning" (arXiv 2406.17711).
AJEST is JEST with the guide of autoguidance as the reference (arXiv 2509.15267). In a loop of your own:

    x0, sigma, noise = draw(5 * k)                              # a super-batch; index labels likewise
    with torch.no_grad():                                       # same sigma and noise, both in eval() mode
        scores = loss(learner, x0, sigma, noise) - loss(guide, x0, sigma, noise)        # per example, [5 k]
    index = jest(scores, k)                                     # prefers what the guide does better
    x0, sigma, noise = x0[index], sigma[index], noise[index]    # train on exactly these

Copy `FACTORS`, `gumbel`, `finite` and `jest` with the imports of math and torch, or this file under another
name: the standard library has a module `select`, and `from select import jest` in this folder finds that one.
Scores are logits, so their scale matters: a loss that is summed over pixels selects far harder than a loss
that is averaged. train.py loads this file by path.
"""
from dataclasses import dataclass

if __name__ == "select":
    # The standard library looked for its own `select` and found this file, as it does where that module is a
    # shared library (pyenv, conda, macOS). Import it from the other folders; it takes this module's place.
    import os
    import sys
    folders = list(sys.path)
    this_folder = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [folder for folder in folders if os.path.realpath(folder) != this_folder]
    del sys.modules["select"]
    import select
    sys.path[:] = folders
else:
    import math

    import torch


# ------------------------------------------------------------------------------------------------------------
# JEST draws a batch in chunks. Once m examples are chosen, it scores every other example i by a matrix S of
# pairs: S_ii plus the sum of S_ij + S_ji over the m chosen j. For a loss without pairs JEST's own matrix is
# diagonal, so the chosen examples add nothing. The AJEST authors take S_ij = loss_i(learner) -
# loss_j(reference). Then the sum is (m + 1) * score_i plus a term that is the same for every i, and they
# divide it by its number of terms, 2 m + 1, which JEST's pseudo-code does not. Each way S reduces to a factor
# on the scores.

FACTORS = {
    "independent": lambda m: 1,                                 # JEST (2406.17711) for a loss without pairs
    "mean": lambda m: (m + 1) / (2 * m + 1) if m > 0 else 0,    # AJEST's code; the first chunk is uniform
    "sum": lambda m: m + 1}                                     # AJEST's matrix in JEST's form: not divided


def gumbel(n, device, generator=None):
    """Standard Gumbel noise, float32 [n]."""
    uniform = torch.rand(n, device=device, generator=generator).clamp(min=1e-30)        # rand may return 0
    return -torch.log(-torch.log(uniform))


def finite(scores, k):
    """The scores [B] as fp32, with the mean of the finite ones in place of NaN and infinities. ValueError for
    another shape, or if k is more than B."""
    if scores.ndim != 1 or k > len(scores):
        raise ValueError(f"scores must be [B] with B >= k: got {list(scores.shape)}, k = {k}")
    scores = scores.float()
    is_finite = scores.isfinite()
    total = scores.where(is_finite, 0.0).double().sum()
    mean = total / is_finite.sum().clamp(min=1)
    return scores.where(is_finite, mean.to(scores.dtype))


def jest(scores, k, chunks=16, joint="mean", generator=None):
    """Choose k of B examples, in at most `chunks` chunks: scores [B] -> indices int64 [k], none twice.

    A chunk is drawn without replacement from softmax(FACTORS[joint](m) * scores) by Gumbel-top-k: it takes
    the largest logits after Gumbel noise is added. The generator is on the scores' device. Nothing here waits
    for the device.
    """
    logits = finite(scores, k)
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
    """logits [B] -> (indices int64 [k], weights fp32 [k]): (weights * f[indices]).mean() estimates f.mean()
    without bias for any f [B]."""
    logits = finite(logits, k)
    B = len(logits)
    if k == B:
        return torch.arange(B, device=logits.device), torch.ones_like(logits)
    perturbed, order = (logits + gumbel(B, logits.device, generator)).topk(k + 1)
    index = order[:k]
    kappa = perturbed[k]
    inclusion = -torch.expm1(-torch.exp(logits[index] - kappa))
    return index, (k / B) / inclusion


# ------------------------------------------------------------------------------------------------------------
# Scores of examples (2406.17711, section 3.1). "root-loss" is ours: its softmax draws in proportion to the
# norm of the gradient at the network's output. This norm is sqrt(loss), or sqrt(loss) / e^u where EDM2's
# uncertainty u(sigma) divides the loss by e^u. A tenth of the mean loss is added, so that --debias gives no
# example more than sqrt(11) times the weight that uniform batches give. Class weights and guided targets also
# scale the gradient; this score ignores them, which costs variance and no bias.

SCORES = ("learnability", "hard", "easy", "root-loss")


def example_scores(learner_losses, reference_losses=None, u=None, score="learnability", invert=False,
                   gain=0.0):
    """Scores [B] of a super-batch; an example with a higher score is more likely to be chosen.

    learner_losses      [B]
    reference_losses    [B], on the same noise levels, noise and targets; not used by "hard" and "root-loss"
    u                   log-uncertainty u(sigma) [B], for "root-loss"; None = 0
    score               a name in SCORES; ValueError for another
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
        mean, _ = mean_std(learner_losses)
        scores = (learner_losses + 0.1 * mean).log() / 2
        if u is not None:
            scores = scores - u
    else:
        raise ValueError(f"score {score}: give one of {', '.join(SCORES)}")
    if invert:
        scores = -scores
    if gain > 0:
        mean, std = mean_std(scores)
        scores = gain * (scores - mean) / std.clamp_min(1e-12)
    return scores


def mean_std(values):
    """Mean and standard deviation, float64 [], of the finite ones among values [B]; NaN if there are none."""
    values = values.double()
    is_finite = values.isfinite()
    n = is_finite.sum()
    mean = values.where(is_finite, 0).sum() / n
    squares = (values - mean).square().where(is_finite, 0)
    return mean, (squares.sum() / (n - 1)).sqrt()


# ------------------------------------------------------------------------------------------------------------
# The selector of JEST and AJEST. It is called with the step, and returns the batch to train on and a weight
# for each example.

@dataclass
class Jest:
    """k examples of a super-batch, chosen by their scores and trained on with the noise levels, noise and
    targets that they were scored on. With the guide as the reference this is AJEST."""
    batches: object                 # batches[step] -> data.Batch of B examples
    learner_loss: object            # learner_loss(batch) -> losses [B], without gradient
    reference_loss: object          # the same for the reference; None = the score needs no reference
    k: int                          # examples to choose
    make_generator: object          # make_generator(step) -> torch.Generator
    chunks: int = 16                # the batch is filled in at most this many chunks
    joint: str = "mean"             # a name in FACTORS
    debias: bool = False            # draw once and weigh by inverse inclusion probability
    uncertainty: object = None      # uncertainty(sigma [B]) -> u [B], for the score "root-loss"; None = 0
    score: str = "learnability"     # score, invert and gain: see `example_scores`
    invert: bool = False
    gain: float = 0.0

    def __call__(self, step):
        batch = self.batches[step]

        # Score the super-batch.
        learner_losses = self.learner_loss(batch)
        reference_losses = None
        self.excess = torch.full_like(learner_losses, math.nan)
        if self.reference_loss is not None:
            reference_losses = self.reference_loss(batch)
            self.excess = learner_losses - reference_losses
        u = None if self.uncertainty is None else self.uncertainty(batch.sigma)
        self.scores = example_scores(learner_losses, reference_losses, u, self.score, self.invert, self.gain)

        # Choose k examples.
        generator = self.make_generator(step)
        if self.debias:
            self.index, weight = gumbel_top_k(self.scores, self.k, generator)
        else:
            self.index = jest(self.scores, self.k, self.chunks, self.joint, generator)
            weight = torch.ones_like(batch.sigma[:self.k])
        return batch.rows(self.index), weight

    def statistics(self):
        """[4] of the last step: mean and standard deviation of the scores, as `jest` gets them, the mean of
        the chosen ones, and that of the learner's loss less the reference's. Only finite values count; NaN
        for none."""
        mean, std = mean_std(self.scores)
        chosen, _ = mean_std(self.scores[self.index])
        excess, _ = mean_std(self.excess)
        return torch.stack([mean, std, chosen, excess])
