"""Distillation losses on predictions (KL, DKD, DIST), last feature maps and attention maps.

Prediction losses are pure functions of logits ``float32 [N, C]``; map losses, of maps ``float32 [N, C, h, w]``. All are
means over the batch. They are zero if the student equals its teacher, and values and gradients are finite whatever the
confidence. The default temperature is 1: T = 4, used in the papers on CIFAR-100, reduces accuracy with strong training
settings (Huang et al. 2022). Losses are multiplied by T², which keeps the scale of gradients (Hinton et al. 2015).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

# Shorter vectors are not normalised to length 1, which would amplify noise and gradients.
_MIN_LENGTH = 1e-8


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return T²·KL(softmax(teacher/T) ‖ softmax(student/T)) (Hinton, Vinyals & Dean 2015, section 2).

    Args:
        student: logits, ``float32 [N, C]``.
        teacher: logits, ``float32 [N, C]``.
        temperature: T.
    """
    return _divergence(student / temperature, teacher / temperature).mean() * temperature**2


def dkd(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    temperature: float = 1.0,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> torch.Tensor:
    """Return T²·(α·TCKD + β·NCKD), decoupled knowledge distillation (Zhao et al. 2022, equation 7).

    TCKD is the divergence of (p, 1 − p), where p is the probability of the target class; NCKD is that of the
    probabilities among the other classes. The KL divergence is TCKD + (1 − p of the teacher)·NCKD (equation 6), in
    which a confident teacher suppresses the other classes. α and β are the paper's for most pairs on CIFAR-100. On
    ImageNet the paper uses β = 0.5 and T = 1.

    Args:
        student: logits, ``float32 [N, C]``.
        teacher: logits, ``float32 [N, C]``.
        target: class of each image, ``int64 [N]``.
        temperature: T.
        alpha: α.
        beta: β.
    """
    pairs, others = zip(*(_decoupled(logits / temperature, target) for logits in (student, teacher)), strict=True)
    return (alpha * _divergence(*pairs) + beta * _divergence(*others)).mean() * temperature**2


def dist(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float = 1.0,
    *,
    beta: float = 2.0,
    gamma: float = 2.0,
) -> torch.Tensor:
    """Return T²·(β·inter + γ·intra), correlations instead of divergence (DIST, Huang et al. 2022, equations 7 to 10).

    Inter is the mean of 1 − ρ over images, where ρ is Pearson's correlation of student and teacher probabilities of an
    image. Intra is the mean over classes of the same for the probabilities of a class over the batch. An image or class
    with constant probabilities adds 1. With two classes ρ of an image is ±1, so that only intra has a gradient.
    Correlations do not determine the student's confidence: a·q + (1 − a)/C has the same ones as q for any a > 0. The
    paper therefore adds cross entropy (equation 10). β and γ are the paper's; in its authors' code both are 1.

    Args:
        student: logits, ``float32 [N, C]``.
        teacher: logits, ``float32 [N, C]``.
        temperature: T.
        beta: β.
        gamma: γ.
    """
    ours, theirs = (torch.softmax(logits / temperature, dim=1) for logits in (student, teacher))
    inter = pearson_distance(ours, theirs).mean()
    intra = pearson_distance(ours.T, theirs.T).mean()
    return (beta * inter + gamma * intra) * temperature**2


def pearson_distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return 1 − Pearson's correlation of the rows, ``float32 [N]`` in 0…2, of two ``float32 [N, C]``.

    It is invariant to shifts and to positive scales of a row (Huang et al. 2022, equation 5).
    """
    one, other = (rows - rows.mean(dim=1, keepdim=True) for rows in (one, other))
    return 1 - (F.normalize(one, dim=1, eps=_MIN_LENGTH) * F.normalize(other, dim=1, eps=_MIN_LENGTH)).sum(dim=1)


def feature_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean over positions and images of the squared distance of L2-normalised features, in 0…4.

    Hints of FitNets (Romero et al. 2015, equation 3). The caller applies the regressor to the student's maps. Features
    are normalised at every position, since scales of backbones differ by orders of magnitude.

    Args:
        student: maps, ``float32 [N, C, h, w]``, with the teacher's channels.
        teacher: maps, ``float32 [N, C, h', w']``. The finer of the two is average-pooled to the coarser.
    """
    student, teacher = _alike(student, teacher)
    apart = F.normalize(student, dim=1, eps=_MIN_LENGTH) - F.normalize(teacher, dim=1, eps=_MIN_LENGTH)
    return apart.square().sum(dim=1).mean()


def attention_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return ‖Q_S/‖Q_S‖₂ − Q_T/‖Q_T‖₂‖₂, mean over the images, in 0…√2; Q is the sum of A² over the channels A.

    Attention transfer (Zagoruyko & Komodakis 2017, equation 2, p = 2) for the last maps only. (The authors' code
    squares the norm.)

    Args:
        student: maps, ``float32 [N, C, h, w]``.
        teacher: maps, ``float32 [N, C', h', w']``. The finer of the two is average-pooled to the coarser.
    """
    maps = _alike(student.square().sum(dim=1, keepdim=True), teacher.square().sum(dim=1, keepdim=True))
    ours, theirs = (F.normalize(strength.flatten(1), dim=1, eps=_MIN_LENGTH) for strength in maps)
    apart: torch.Tensor = torch.linalg.vector_norm(ours - theirs, dim=1)
    return apart.mean()


def _divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return KL(softmax(teacher) ‖ softmax(student)) of every row, ``float32 [N]``."""
    log_student, log_teacher = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    return F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(dim=1)


def _decoupled(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of target and rest, ``float32 [N, 2]``, and of the other classes, ``float32 [N, C − 1]``."""
    own = F.one_hot(target, logits.shape[1]).bool()
    # Removed instead of masked by −∞, and summed as logarithms: 1 − p rounds to 0 if a network is confident.
    others = logits[~own].view(len(logits), -1)
    return torch.stack([logits[own], others.logsumexp(dim=1)], dim=1), others


def _alike(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Average-pool two ``float [N, C, h, w]`` to the coarser grid of the two."""
    size = (min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3]))
    small = [maps if maps.shape[2:] == size else F.adaptive_avg_pool2d(maps, size) for maps in (one, other)]
    return small[0], small[1]
