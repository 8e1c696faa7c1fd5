"""Training programs with one planted NaN or infinity each; the guilty line ends in `# born here`.

Other models, layers and operations than those by which the locator was written.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

import safeloop as sl


def x(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case(sl.Trainer):
    """A planted fault: `data`, a model and a loss; `settings` are further sections."""

    settings = {}
    data = ()
    trap = None

    @classmethod
    def net(cls):
        return nn.Linear(4, 3)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 2)
        self.drop = nn.Dropout(0.1)

    def forward(self, tokens, padding):
        q, k, v = self.qkv(tokens).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / math.sqrt(8)
        scores = scores.masked_fill(padding[:, None], float("-inf"))
        weights = scores.softmax(-1)  # born here
        return self.out(self.drop(weights @ v).mean(1))


class FullyPaddedSentence(Case):
    data = ((x(3, 5, 8), torch.arange(5)[None] >= torch.tensor([5, 2, 0])[:, None]),)
    trap = "fully masked softmax"
    net = Attention

    def loss(self, batch):
        return self.model(*batch).square().mean()


class Vae(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
        self.decoder = nn.Linear(2, 6)

    def forward(self, images):
        mean, log_variance = self.encoder(images).chunk(2, 1)
        return mean, log_variance * 400


class VarianceOverflow(Case):
    data = (x(16, 6),)
    net = Vae
    trap = "overflow of an exponential"

    def losses(self, batch):
        mean, log_variance = self.model(batch)
        variance = log_variance.exp()  # born here
        kl = 0.5 * (mean.square() + variance - 1 - log_variance).sum(1).mean()
        return {"fit": (self.model.decoder(mean) - batch).square().mean(), "kl": kl}


class ContrastiveZeroVector(Case):
    data = (torch.cat([x(5, 4), torch.zeros(1, 4)]),)
    trap = "zero over zero"

    @classmethod
    def net(cls):
        return nn.Linear(4, 3, bias=False)

    def loss(self, batch):
        features = self.model(batch)
        unit = features / features.norm(dim=1, keepdim=True)  # born here
        return F.cross_entropy(unit @ unit.T / 0.1, torch.arange(6))


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.means = nn.Parameter(x(3, 2))
        self.logits = nn.Parameter(torch.tensor([0.0, 0.0, -200.0]))


class MixtureWeightUnderflow(Case):
    data = (x(8, 2),)
    net = Mixture
    trap = "logarithm of zero"

    def loss(self, batch):
        weights = self.model.logits.softmax(0)
        density = torch.exp(-(batch[:, None] - self.model.means).square().sum(-1)) * weights
        return -(density.sum(1).log().mean()) + weights.log().mean()  # born here


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.cell.weight.copy_(torch.eye(4) * 1e4)

    def forward(self, sequence):
        state = torch.ones(2, 4)
        for step in sequence:
            state = self.cell(state) + step  # born here
        return state


class RecurrentGain(Case):
    data = (x(12, 2, 4),)
    net = Recurrent
    trap = "overflow"

    def loss(self, batch):
        return self.model(batch).mean()


class MaskedDistance(Case):
    data = (x(6, 4),)
    trap = "masked branch"

    def loss(self, batch):
        points = self.model(batch)
        squares = (points[:, None] - points[None]).square().sum(-1)
        apart = ~torch.eye(6, dtype=torch.bool)
        distances = squares.sqrt()  # born here
        return (-distances[apart]).exp().mean()


class PairLoss(Case):
    data = ((x(8, 4), x(8, 4)),)
    trap = "root at zero"
    settings = {"accumulate": {"micro_batches": 2}}

    @classmethod
    def net(cls):
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))

    def losses(self, batch):
        a, b = (self.model(part) for part in batch)
        gap = torch.sqrt((a - a.detach()).square().sum(1))  # born here
        return {"pair": (a - b).square().mean(), "gap": gap.mean()}


class RelativeError(Case):
    data = ((x(8, 4), torch.tensor([1.0, 0.0, 2.0, 3.0, 1.0, 1.0, 4.0, 1.0])),)
    trap = "division by zero"

    def loss(self, batch):
        inputs, target = batch
        predicted = self.model(inputs).mean(1)
        return ((predicted - target).abs() / target).mean()  # born here


class GatedRatio(Case):
    data = (x(8, 4),)
    trap = "masked branch"

    def loss(self, batch):
        y = self.model(batch)
        counts = F.relu(y - 100)
        ratio = y / counts  # born here
        return torch.where(counts > 0, ratio, y).mean()


class AngleOfItself(Case):
    data = (x(8, 4),)
    trap = "edge of an inverse function"

    def loss(self, batch):
        unit = F.normalize(self.model(batch), dim=1).double()
        cosine = (unit * unit / (unit * unit).sum(1, keepdim=True)).sum(1).round()
        other = unit[:, 0] * 0 + cosine
        return torch.acos(other).mean()  # born here


class GammaCorrection(Case):
    data = (x(8, 4),)
    trap = "power at zero"

    def loss(self, batch):
        y = self.model(batch)
        light = y - y.detach().amin(1, keepdim=True)
        return light.pow(1 / 2.2).mean()  # born here


class SignedPower(Case):
    data = (x(8, 4),)
    trap = "power of a negative"

    def losses(self, batch):
        y = self.model(batch)
        return {"fit": y.square().mean(), "tail": (y**1.5).mean()}  # born here


class GroupStatistics(Case):
    data = (x(6, 4),)
    trap = "one sample"

    def loss(self, batch):
        y = self.model(batch)
        spread = [group.std(0) for group in (y[:5], y[5:])]  # born here
        return torch.cat(spread).mean()


class EmptySelection(Case):
    data = ((x(6, 4), torch.zeros(6, dtype=torch.bool)),)
    trap = "mean of nothing"

    def losses(self, batch):
        inputs, is_labelled = batch
        y = self.model(inputs)
        supervised = y[is_labelled].square().mean()  # born here
        return {"all": y.abs().mean(), "supervised": supervised}


class EveryTargetIgnored(Case):
    data = ((x(6, 4), torch.full((6,), -100)),)
    trap = "no targets"

    def loss(self, batch):
        inputs, target = batch
        return F.cross_entropy(self.model(inputs), target)  # born here


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        ctx.save_for_backward(values)
        return values.sign()

    @staticmethod
    def backward(ctx, gradient):
        (values,) = ctx.saved_tensors
        return gradient / values.clamp(min=0)  # born here


class OwnBackward(Case):
    data = (x(8, 4),)
    trap = "custom backward"

    def loss(self, batch):
        return (StraightThrough.apply(self.model(batch)) + 1).square().mean()


class HandmadeNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(4, 1)
        self.head = nn.Linear(6, 1)

    def forward(self, inputs):
        h = self.lift(inputs).expand(-1, 6)
        deviation = h.var(1, keepdim=True).sqrt()  # born here
        return self.head((h - h.mean(1, keepdim=True)) / (deviation + 1e-5))


class ConstantRowsNormalised(Case):
    data = (x(5, 4),)
    net = HandmadeNorm
    trap = "root at zero"

    def loss(self, batch):
        return self.model(batch).square().mean()


class MaskByProduct(Case):
    data = ((x(2, 4), torch.tensor([[1.0, 1.0, 0.0]])),)
    trap = "zero times infinity"

    def loss(self, batch):
        inputs, keep = batch
        scores = self.model(inputs)
        return (scores + (1 - keep) * float("-inf")).softmax(1)[:, 0].mean()  # born here


class HandmadeEntropy(Case):
    data = (x(8, 4),)
    trap = "logarithm of zero"

    def loss(self, batch):
        p = torch.sigmoid(self.model(batch) * 1e4)
        return -(p * torch.log(p)).sum()  # born here


class BalancedFocal(Case):
    data = (x(8, 4),)
    trap = "logarithm of zero"
    settings = {"run": {"precision": "bf16", "max_steps": 1}}

    @classmethod
    def net(cls):
        return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))

    def loss(self, batch):
        p = torch.sigmoid(self.model(batch).float() * 80)
        return -((1 - p) ** 2 * (1 - p).log()).mean()  # born here


class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(4))
        self.shift = nn.Linear(4, 4)

    def forward(self, inputs):
        z = torch.tanh(self.shift(inputs) * 1e3)
        return torch.atanh(z) * self.log_scale.exp()  # born here


class FlowInverse(Case):
    data = (x(8, 4),)
    net = Flow
    trap = "edge of an inverse function"

    def loss(self, batch):
        return self.model(batch).square().mean()


class PenaltyAtZero(Case):
    data = (x(8, 4),)
    trap = "second derivative"

    @classmethod
    def net(cls):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def losses(self, batch):
        inputs = batch.clone().requires_grad_()
        value = self.model(inputs).mul(0).norm(dim=1).sum()
        (slope,) = torch.autograd.grad(value, inputs, create_graph=True)  # born here
        return {"slope": slope.nan_to_num().square().sum() + self.model(inputs).mean()}


class GraphDegree(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(4, 3)

    def forward(self, nodes, adjacency):
        degree = adjacency.sum(1, keepdim=True)
        scale = degree.rsqrt()  # born here
        return scale * (adjacency @ (scale * self.lift(nodes)))


class IsolatedNode(Case):
    data = ((x(4, 4), torch.tensor([[0.0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])),)
    net = GraphDegree
    trap = "inverse root of zero"

    def loss(self, batch):
        return self.model(*batch).square().mean()


class InPlaceLog(Case):
    data = (x(8, 4),)
    trap = "logarithm of a negative"

    @classmethod
    def net(cls):
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))

    def loss(self, batch):
        y = self.model(batch) - 5
        y.log_()  # born here
        return y.mean()


class SpeechAlignment(Case):
    data = (x(4, 1, 4),)
    trap = "ctc target too long"

    def loss(self, batch):
        log_p = self.model(batch).log_softmax(-1)
        target = torch.tensor([[1, 1, 2, 2]])
        return F.ctc_loss(log_p, target, torch.tensor([4]), torch.tensor([4]))  # born here


class ConvolutionOverflow(Case):
    data = (x(2, 1, 6, 6) * 1e30,)
    trap = "overflow"

    @classmethod
    def net(cls):
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 3))
        nn.init.constant_(net[2].weight, 1e20)
        return net

    def loss(self, batch):
        return self.model(batch).mean()  # born here


PLANTED = list(Case.__subclasses__())
