"""What a student can match of its teachers: predictions (KL, DKD, DIST), last feature maps, and where these are strong.

Losses of predictions are pure functions of ``float32 [N, C]`` logits; those of maps, of ``float32 [N, C, h, w]``. All
are means over the batch, zero where the student equals its teacher, and finite with finite slopes however sure either
is. The temperature is 1 unless asked for otherwise: T = 4, the papers' on CIFAR-100, costs accuracy under a strong
config (Huang et al. 2022). Losses grow by T², so that their slopes keep their size (Hinton et al. 2015).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

# Vectors shorter than this are not brought to length 1, so that noise about zero gets no say and no steep slope.
_SHORTEST = 1e-8


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return T²·KL(softmax(teacher/T) ‖ softmax(student/T)) (Hinton, Vinyals & Dean 2015, section 2).

    Args:
        student: logits, ``float32 [N, C]``.
        teacher: likewise.
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

    TCKD is the divergence of (p, 1 − p), p being the probability of the target class; NCKD that of the probabilities
    among the other classes. The plain divergence is TCKD + (1 − p of the teacher)·NCKD (equation 6): a sure teacher
    hides there what it knows of the other classes. α and β are the paper's for most pairs on CIFAR-100; it has β = 0.5
    and T = 1 on ImageNet.

    Args:
        student: logits, ``float32 [N, C]``.
        teacher: likewise.
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
    """Return T²·(β·inter + γ·intra), relations in place of probabilities (Huang et al. 2022, equations 7 to 10).

    Inter is 1 − Pearson's correlation of student's and teacher's probabilities of an image, mean over the images; intra
    that of their probabilities of a class over the batch, mean over the classes. The student need not be as sure as its
    teacher, only agree on what is likelier than what. A class or an image whose probabilities are constant correlates
    with nothing and adds 1. Of two classes an image's correlation is 1 or −1 however sure the student is, so that intra
    alone teaches. How sure the student becomes is left open: a·q + (1 − a)/C correlates as q does, for any a > 0. So
    the paper adds cross entropy (equation 10). β and γ are the paper's; its authors' class has 1 for both.

    Args:
        student: logits, ``float32 [N, C]``.
        teacher: likewise.
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

    It does not change where a row is shifted, or scaled by a positive number (Huang et al. 2022, equation 5).
    """
    one, other = (rows - rows.mean(dim=1, keepdim=True) for rows in (one, other))
    return 1 - (F.normalize(one, dim=1, eps=_SHORTEST) * F.normalize(other, dim=1, eps=_SHORTEST)).sum(dim=1)


def feature_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean over positions and images of the squared distance of L2-normalised features, in 0…4.

    Hints of FitNets (Romero et al. 2015, equation 3), whose regressor the caller has applied to the student's maps. The
    channels of every position are brought to length 1 first, since backbones differ in scale by orders of magnitude.

    Args:
        student: maps, ``float32 [N, C, h, w]``, with the teacher's channels.
        teacher: maps, ``float32 [N, C, h', w']``; the finer of the two is averaged down to the coarser.
    """
    student, teacher = _alike(student, teacher)
    apart = F.normalize(student, dim=1, eps=_SHORTEST) - F.normalize(teacher, dim=1, eps=_SHORTEST)
    return apart.square().sum(dim=1).mean()


def attention_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return ‖Q_S/‖Q_S‖₂ − Q_T/‖Q_T‖₂‖₂, mean over the images, in 0…√2; Q is the sum of A² over the channels A.

    Attention transfer (Zagoruyko & Komodakis 2017, equation 2, p = 2), here of the last maps only. (The authors' code
    squares the norm.)

    Args:
        student: maps, ``float32 [N, C, h, w]``.
        teacher: maps, ``float32 [N, C', h', w']``; the finer of the two is averaged down to the coarser.
    """
    maps = _alike(student.square().sum(dim=1, keepdim=True), teacher.square().sum(dim=1, keepdim=True))
    ours, theirs = (F.normalize(strength.flatten(1), dim=1, eps=_SHORTEST) for strength in maps)
    apart: torch.Tensor = torch.linalg.vector_norm(ours - theirs, dim=1)
    return apart.mean()


def _divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return KL(softmax(teacher) ‖ softmax(student)) of every row, ``float32 [N]``."""
    log_student, log_teacher = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    return F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(dim=1)


def _decoupled(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of target against rest, ``float32 [N, 2]``, and of the rest alone, ``float32 [N, C − 1]``."""
    own = F.one_hot(target, logits.shape[1]).bool()
    # Taken out rather than masked by −∞, and summed in the logarithm: 1 − p rounds to 0 where a network is sure.
    others = logits[~own].view(len(logits), -1)
    return torch.stack([logits[own], others.logsumexp(dim=1)], dim=1), others


def _alike(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Average two ``float [N, C, h, w]`` down to the coarser grid of the two."""
    size = (min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3]))
    small = [maps if maps.shape[2:] == size else F.adaptive_avg_pool2d(maps, size) for maps in (one, other)]
    return small[0], small[1]
