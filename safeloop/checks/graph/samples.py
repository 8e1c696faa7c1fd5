"""Samples through which no gradient goes back to the parameters of their distribution."""

from __future__ import annotations

import os
from collections.abc import Iterator

from torch import Tensor, distributions

from safeloop.autograd.lineage import Mark
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.gradients.history import SAMPLED, SCORED, History
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_DISTRIBUTIONS = os.path.dirname(os.path.abspath(distributions.__file__)) + os.sep


class SampleWithoutGradient(CallCheck):
    """A sample of a normal distribution goes into the loss without a gradient to its mean and deviation.

    ## What it does
    Follows the results of `torch.normal(mean, std)` and of `Normal(...).sample()` whose mean or deviation depends on
    parameters. Speaks where on at least 3 steps one of them went into a loss that reaches the same parameters in
    another way alone, such as a KL term. Where the sample or anything else is scored by the log-probability of that
    distribution, as in policy gradients and likelihoods, nothing is said. Cost: none beyond the tape of calls.

    ## Why it is bad
    A variational autoencoder whose latent is drawn so has an encoder that only the KL term trains: it learns to encode
    nothing, while every parameter has a gradient.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            mean = self.model[0](batch)
            latent = torch.distributions.Normal(mean, torch.ones_like(mean)).sample()
            return {"fit": F.mse_loss(self.model[1](latent), batch), "kl": mean.square().mean()}

    model = nn.ModuleList([nn.Linear(4, 2), nn.Linear(2, 4)])
    Run(model=model, data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 6}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            mean = self.model[0](batch)
            latent = torch.distributions.Normal(mean, torch.ones_like(mean)).rsample()
            return {"fit": F.mse_loss(self.model[1](latent), batch), "kl": mean.square().mean()}

    model = nn.ModuleList([nn.Linear(4, 2), nn.Linear(2, 4)])
    Run(model=model, data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 6}).fit()
    ```
    ## Fix
    Use `rsample()`, or `mean + std * torch.randn_like(std)`. Where no gradient is wanted, draw the sample under
    `torch.no_grad()` from the network's first call on, or write `mean.detach()`.

    ## Source
    Kingma & Welling, "Auto-Encoding Variational Bayes", 2014, section 2.4; documentation of `torch.distributions`.
    """

    code = "SL317"
    title = "sample without gradient"
    severity = "warning"
    hears = frozenset(("normal", "sub", "rsub", "__sub__", "__rsub__", "subtract"))

    def hear(self, call: Call) -> Iterator[Fault]:
        """Mark samples, and what is scored by a log-probability."""
        tape = call.tape
        live = [tape.live(tensor) for tensor in call.tensors]
        if not isinstance(call.out, Tensor) or not any(live):
            return iter(())
        bits = live[0] | live[-1]
        if call.name == "normal":
            tape.mark(call.out, Mark(SAMPLED, call.name, "", call.site, tape.module, bits))
        elif is_in_log_prob(call) or _is_of_its_own_mean(call):
            tape.mark(call.out, Mark(SCORED, call.name, "", call.site, tape.module, bits))
        return iter(())

    @classmethod
    def find(cls, view: History) -> Iterator[Fault]:
        """Samples that went into losses on several steps, and were never scored."""
        for site, seen in view.samples.items():
            if seen.steps >= 3 and not seen.is_scored:
                names = [name for name in view.ordered(seen.names) if view.traces[name].largest]
                if not names:  # SL503 names them
                    continue
                yield cls.fault(
                    f"a sample that depends on {listed(names)} goes into the loss, and no gradient goes back through "
                    f"it, on {seen.steps} of {view.steps} steps",
                    where=at(site, view.where),
                    why="`sample()` and `torch.normal` have no derivative in mean and std: this part of their gradient "
                    "is missing, while another part of the loss gives them one",
                    fix="use `rsample()`, or `mean + std * torch.randn_like(std)`; where no gradient is meant, write "
                    "`mean.detach()`",
                    names=names,
                )


def is_in_log_prob(call: Call) -> bool:
    """Whether a log-probability of torch.distributions computes the difference."""
    code = None if call.caller is None else call.caller.f_code
    return code is not None and code.co_name == "log_prob" and code.co_filename.startswith(_DISTRIBUTIONS)


def _is_of_its_own_mean(call: Call) -> bool:
    """Whether a sample is compared with what it was drawn from, as in a log-probability that is written out."""
    tape = call.tape
    live = [tape.live(tensor) for tensor in call.tensors]
    drawn = [m.live for tensor in call.tensors for m in tape.marks_of(tensor) if m.kind == SAMPLED]
    return any(bits & one for bits in live for one in drawn)
