"""Correct programs that look suspicious: losses of probabilities, of pairs, and losses that are zero now and then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :1] - X[:, 1:2]
CLASSES = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
MANY = (X[:, :4] > 0).float()


def mlp(outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs))


def with_model(outputs: int, loss: Callable[[Tensor], Any]) -> Callable[[], Any]:
    def make() -> Any:
        model = mlp(outputs)
        return model, lambda i: loss(model(X))

    return make


def focal(z: Tensor) -> Tensor:
    p = z.softmax(1).gather(1, CLASSES[:, None]).squeeze(1)
    return (-((1 - p) ** 2) * p.log()).mean()


def focal_by_cross_entropy(z: Tensor) -> Tensor:
    each = F.cross_entropy(z, CLASSES, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


def distillation(z: Tensor) -> dict[str, Tensor]:
    teacher = torch.softmax(X[:, :3] / 2, 1)
    soft = F.kl_div(F.log_softmax(z / 2, 1), teacher, reduction="batchmean") * 4
    return {"hard": F.cross_entropy(z, CLASSES), "soft": soft}


def distillation_of_logarithms(z: Tensor) -> Tensor:
    return F.kl_div(z.log_softmax(1), X[:, :3].log_softmax(1), log_target=True, reduction="batchmean")


def info_nce(z: Tensor) -> Tensor:
    a, b = F.normalize(z[:8], dim=1), F.normalize(z[8:], dim=1)
    return F.cross_entropy(a @ b.t() / 0.1, torch.arange(8))


def info_nce_of_positive_similarities(z: Tensor) -> Tensor:
    a, b = F.normalize(z[:8].relu() + 0.1, dim=1), F.normalize(z[8:].relu() + 0.1, dim=1)
    return F.cross_entropy(a @ b.t(), torch.arange(8))


def clip_with_both_directions(z: Tensor) -> Tensor:
    scores = F.normalize(z[:8], dim=1) @ F.normalize(z[8:], dim=1).t() * 14
    return (F.cross_entropy(scores, torch.arange(8)) + F.cross_entropy(scores.t(), torch.arange(8))) / 2


def siglip(z: Tensor) -> Tensor:
    scores = F.normalize(z[:8], dim=1) @ F.normalize(z[8:], dim=1).t() * 10 - 10
    return -F.logsigmoid(scores * (2 * torch.eye(8) - 1)).sum(1).mean()


def pairwise_ranking(z: Tensor) -> Tensor:
    z, y = z.squeeze(1), Y.squeeze(1)
    return F.softplus(-(z[:, None] - z[None]) * (y[:, None] - y[None]).sign()).mean()


def pairwise_distances(z: Tensor) -> Tensor:
    wanted = torch.cdist(X, X)
    found = (z[:, None] - z[None]).abs().squeeze(-1)
    return (found - wanted).square().mean()


def kernel_with_fixed_points(z: Tensor) -> Tensor:
    centres = torch.linspace(-1, 1, 5)
    return (-(z - centres).square()).exp().mean()


def distance_to_every_anchor(z: Tensor) -> Tensor:
    anchors = torch.linspace(-1, 1, 16)
    return (z - anchors).abs().amin(1).mean()


def quantile_regression(z: Tensor) -> Tensor:
    levels = torch.tensor([0.1, 0.5, 0.9])
    error = Y - z
    return torch.maximum(levels * error, (levels - 1) * error).mean()


def quantile_huber_of_pairs(z: Tensor) -> Tensor:
    target = torch.sort(X[:, :4], 1).values
    error = target[:, None, :] - z[:, :, None]
    levels = (torch.arange(4) + 0.5) / 4
    huber = F.huber_loss(z[:, :, None].expand(-1, 4, 4), target[:, None, :].expand(-1, 4, 4), reduction="none")
    return ((levels[None, :, None] - (error < 0).float()).abs() * huber).sum(1).mean()


def chamfer(z: Tensor) -> Tensor:
    gaps = (z[:, None] - X[None, :8, :3]).square().sum(-1)
    return gaps.amin(0).mean() + gaps.amin(1).mean()


def hinge(z: Tensor) -> Tensor:
    return (1 - z.squeeze(1) * Y.squeeze(1).sign() * 100).clamp(min=0).mean() + 0.0 * z.sum()


def triplet_that_is_solved_at_times(z: Tensor) -> Tensor:
    return F.triplet_margin_loss(z[:4], z[4:8], z[8:12], margin=0.05) + F.triplet_margin_loss(z[:4], z[8:12], z[4:8])


def margin_ranking(z: Tensor) -> Tensor:
    return F.margin_ranking_loss(z[:8, 0], z[8:, 0], (Y[:8, 0] - Y[8:, 0]).sign(), margin=0.1)


def multi_label(z: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, MANY, pos_weight=torch.tensor([1.0, 2.0, 3.0, 1.0]))


def multi_label_of_probabilities(z: Tensor) -> Tensor:
    return F.binary_cross_entropy(z.sigmoid(), MANY)


def label_smoothing(z: Tensor) -> Tensor:
    return F.cross_entropy(z, CLASSES, label_smoothing=0.1)


def soft_targets(z: Tensor) -> Tensor:
    return F.cross_entropy(z, F.one_hot(CLASSES, 3).float() * 0.9 + 0.1 / 3)


def mixup(z: Tensor) -> Tensor:
    return 0.3 * F.cross_entropy(z, CLASSES) + 0.7 * F.cross_entropy(z, CLASSES.flip(0))


def nll_of_log_softmax(z: Tensor) -> Tensor:
    return F.nll_loss(z.log_softmax(1), CLASSES)


def nll_of_the_logarithm_of_a_softmax(z: Tensor) -> Tensor:
    return F.nll_loss((z.softmax(1) + 1e-8).log(), CLASSES)


def nll_of_a_mixture(z: Tensor) -> Tensor:
    return F.nll_loss((0.5 * z.softmax(1) + 0.5 / 3).log(), CLASSES)


def entropy_of_a_softmax(z: Tensor) -> Tensor:
    p = z.softmax(1)
    return F.cross_entropy(z, CLASSES) - 0.1 * -(p * p.log()).sum(1).mean()


def attention_before_the_scores(z: Tensor) -> Tensor:
    weights = (z @ z.t()).softmax(1)
    return F.cross_entropy(weights @ z, CLASSES)


def cross_entropy_of_log_probabilities(z: Tensor) -> Tensor:
    return F.cross_entropy(z.log_softmax(1), CLASSES)


def cross_entropy_of_pixels(z: Tensor) -> Tensor:
    return F.cross_entropy(z.view(4, 4, 3, 1).permute(0, 2, 1, 3), CLASSES.view(4, 4, 1))


def ctc(z: Tensor) -> Tensor:
    lengths = torch.full((4,), 4)
    return F.ctc_loss(z.view(4, 4, 3).log_softmax(-1), torch.tensor([[1, 2]] * 4), lengths, torch.full((4,), 2))


def gaussian(z: Tensor) -> Tensor:
    return F.gaussian_nll_loss(z[:, :1], Y, F.softplus(z[:, 1:]))


def poisson(z: Tensor) -> Tensor:
    return F.poisson_nll_loss(z, Y.abs())


def dice(z: Tensor) -> Tensor:
    p = z.sigmoid()
    return 1 - (2 * (p * MANY).sum(0) + 1).div(p.sum(0) + MANY.sum(0) + 1).mean()


def mean_of_a_masked_error(z: Tensor) -> Tensor:
    mask = (X[:, 0] > 0).float()
    return ((z.squeeze(1) - Y.squeeze(1)).square() * mask).sum() / mask.sum()


def weights_of_samples(z: Tensor) -> Tensor:
    return (F.mse_loss(z, Y, reduction="none") * X[:, 2:3].abs()).mean()


def attention_of_weights(z: Tensor) -> Tensor:
    return F.mse_loss((z * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(1, keepdim=True), Y)


def centred_by_the_mean(z: Tensor) -> Tensor:
    return (z - z.mean(1, keepdim=True) - X[:, :4] + X[:, :4].mean(1, keepdim=True)).square().mean()


def one_against_a_row(z: Tensor) -> Tensor:
    return (z.view(16, 1, 4) - X[:, :4].view(1, 16, 4)).square().sum(-1).amin(1).mean()


def one_sample_in_the_batch(z: Tensor) -> Tensor:
    return F.mse_loss(z[:1], Y[:1]) + F.mse_loss(z[:1, 0], Y[:1, 0])


def advantages(z: Tensor) -> Tensor:
    logits, value = z[:, :3], z[:, 3]
    advantage = (Y.squeeze(1) - value).detach()
    return F.cross_entropy(logits, CLASSES, reduction="none").mul(advantage).mean() + F.mse_loss(value, Y.squeeze(1))


def ppo(z: Tensor) -> Tensor:
    new = z.log_softmax(1).gather(1, CLASSES[:, None]).squeeze(1)
    ratio = (new - new.detach()).exp()
    advantage = Y.squeeze(1)
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


def barlow_twins(z: Tensor) -> Tensor:
    a, b = ((h - h.mean(0)) / (h.std(0) + 1e-6) for h in (z[:8], z[8:]))
    return ((a.t() @ b / 8 - torch.eye(4)) ** 2).sum()


def vicreg(z: Tensor) -> Tensor:
    spread = F.relu(1 - z.std(0)).mean()
    return F.mse_loss(z[:8], z[8:]) + spread


def total_variation(z: Tensor) -> Tensor:
    return (z[1:] - z[:-1]).abs().mean() + F.mse_loss(z[:, :1], Y)


def cox(z: Tensor) -> Tensor:
    order = Y.squeeze(1).argsort(descending=True)
    risk = z.squeeze(1)[order]
    return -(risk - risk.logcumsumexp(0)).mean()


def crf_like_logsumexp(z: Tensor) -> Tensor:
    score = z[0]
    for t in range(1, 4):
        score = torch.logsumexp(score[:, None] + z[t][None, :] + X[:3, :3], 0)
    return score.logsumexp(0) - z[torch.arange(4), CLASSES[:4]].sum()


PROGRAMS = {
    "mlp_1": [
        pairwise_ranking, kernel_with_fixed_points, distance_to_every_anchor, hinge, mean_of_a_masked_error,
        weights_of_samples, one_sample_in_the_batch, cox, poisson, margin_ranking,
    ],
    "mlp_2": [gaussian],
    "mlp_3": [
        focal, focal_by_cross_entropy, distillation, distillation_of_logarithms, info_nce,
        info_nce_of_positive_similarities, clip_with_both_directions, siglip, pairwise_distances, chamfer,
        quantile_regression, triplet_that_is_solved_at_times, label_smoothing, soft_targets, mixup, nll_of_log_softmax,
        nll_of_the_logarithm_of_a_softmax, nll_of_a_mixture, entropy_of_a_softmax, attention_before_the_scores,
        cross_entropy_of_log_probabilities, cross_entropy_of_pixels, ctc, crf_like_logsumexp,
    ],
    "mlp_4": [
        multi_label, multi_label_of_probabilities, dice, quantile_huber_of_pairs, attention_of_weights,
        centred_by_the_mean, one_against_a_row, advantages, barlow_twins, vicreg, total_variation,
    ],
}  # fmt: skip
CASES = [(int(key[-1]), loss) for key, losses in PROGRAMS.items() for loss in losses] + [(3, ppo)]
CASES = [(1 if loss is pairwise_distances else outputs, loss) for outputs, loss in CASES]


@pytest.mark.parametrize(("outputs", "loss"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_nothing_is_told_in_a_loop(outputs: int, loss: Callable[[Tensor], Any], audited: Any) -> None:
    assert audited(with_model(outputs, loss)) == []


@pytest.mark.parametrize(("outputs", "loss"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_nothing_is_told_in_a_trainer(outputs: int, loss: Callable[[Tensor], Any], trained: Any) -> None:
    assert trained(with_model(outputs, loss)) == []
