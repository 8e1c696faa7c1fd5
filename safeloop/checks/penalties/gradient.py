"""Penalties that train nothing, or something else than each sample's own gradient."""

from __future__ import annotations

from safeloop.checks.check import Check


class PenaltyWithoutGradient(Check):
    """A penalty has a value and no gradient to what its phase trains.

    ## What it does
    Looks at `requires_grad` of every penalty, and on the first steps at the parameters that its graph reaches.

    ## Why it is bad
    The sum of the loss and a constant trains as if the penalty were not there, and its value is logged as if it were.
    The function is frozen in this phase, or its gradient does not depend on any weight that is trained.

    ## Bad
    ```python
    class Run(sl.Trainer):
        @sl.phase(trains="generator")
        def generate(self, batch):
            generator, critic = self.model
            return {"score": -critic(generator(batch)).mean(), "gp": self.penalty(critic, at=batch)}

        @sl.phase(trains="critic")
        def criticise(self, batch):
            return {"critic": self.model[1](batch).square().mean()}

    model = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))])
    optimizers = {
        "generator": {"type": "SGD", "lr": 0.1, "params": ["0.*"]},
        "critic": {"type": "SGD", "lr": 0.1, "params": ["1.*"]},
    }
    gp = {"type": "gradient", "target": 1.0, "weight": 10.0}
    Run(
        model=model, data=[torch.randn(8, 4)], optimizers=optimizers, penalties={"gp": gp}, run={"max_steps": 1}
    ).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        @sl.phase(trains="generator")
        def generate(self, batch):
            generator, critic = self.model
            return {"score": -critic(generator(batch)).mean()}

        @sl.phase(trains="critic")
        def criticise(self, batch):
            critic = self.model[1]
            return {"critic": critic(batch).square().mean(), "gp": self.penalty(critic, at=batch)}

    model = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))])
    optimizers = {
        "generator": {"type": "SGD", "lr": 0.1, "params": ["0.*"]},
        "critic": {"type": "SGD", "lr": 0.1, "params": ["1.*"]},
    }
    gp = {"type": "gradient", "target": 1.0, "weight": 10.0}
    Run(
        model=model, data=[torch.randn(8, 4)], optimizers=optimizers, penalties={"gp": gp}, run={"max_steps": 1}
    ).fit()
    ```
    ## Fix
    Return the penalty from the phase that trains the function, and give it that function without `detach()` or
    `no_grad` inside.

    ## Source
    Row 14 of what safeloop was built for: a derivative without `create_graph` is a constant; safeloop's own rule.
    """

    code = "SL434"
    title = "penalty without a gradient"


class SamplesCoupled(Check):
    """A penalty of each sample's own gradient, of a function that mixes the samples of a batch.

    ## What it does
    Differentiates the first sample's value with respect to the whole batch, once, and looks for a gradient at the other
    samples. Names the BatchNorm modules in train mode.

    ## Why it is bad
    In train mode, batch normalisation makes each score depend on the whole batch. The gradient at a sample is then that
    of all scores together, which is not what the penalty is defined by, nor what the theory behind it bounds.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            return {"score": self.model(batch).mean(), "gp": self.penalty(self.model, at=batch)}

    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    sgd = {"type": "SGD", "lr": 0.1}
    gp = {"type": "gradient", "target": 1.0, "weight": 10.0}
    run = Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, penalties={"gp": gp}, run={"max_steps": 1})
    run.fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            return {"score": self.model(batch).mean(), "gp": self.penalty(self.model, at=batch)}

    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))
    sgd = {"type": "SGD", "lr": 0.1}
    gp = {"type": "gradient", "target": 1.0, "weight": 10.0}
    run = Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, penalties={"gp": gp}, run={"max_steps": 1})
    run.fit()
    ```
    ## Fix
    Use LayerNorm, GroupNorm or InstanceNorm, which stay within a sample, or put the batch normalisation into eval mode.
    Where the mixing is meant (a minibatch standard deviation), write `audit.accept: {SL436: ["gp"]}`.

    ## Source
    Ishaan Gulrajani et al.: Improved Training of Wasserstein GANs (arXiv 1704.00028, 2017), section 4, "No critic batch
    normalization".
    """

    code = "SL436"
    title = "samples coupled in a penalty"
    severity = "warning"


class SecondDerivativeVanishes(Check):
    """A penalty of second derivatives, of a function that has none: it is linear, or linear piece by piece.

    ## What it does
    On the first steps, looks whether the second derivative is exactly zero where the first is not, or is not there at
    all.

    ## Why it is bad
    The Hessian of a network of ReLUs with respect to its input is exactly zero, at every point and for all weights. The
    graph is connected, nothing raises, and the term trains nothing for ever.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            x = self.leaf(batch)
            values = self.model(x)
            return {"fit": values.square().mean(), "laplacian": self.penalty(of=values, at=x)}

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    sgd = {"type": "SGD", "lr": 0.01}
    trace = {"type": "hessian_trace", "weight": 0.1}
    Run(
        model=model, data=[torch.randn(8, 4)], optimizers=sgd, penalties={"laplacian": trace}, run={"max_steps": 1}
    ).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            x = self.leaf(batch)
            values = self.model(x)
            return {"fit": values.square().mean(), "laplacian": self.penalty(of=values, at=x)}

    model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))
    sgd = {"type": "SGD", "lr": 0.01}
    trace = {"type": "hessian_trace", "weight": 0.1}
    Run(
        model=model, data=[torch.randn(8, 4)], optimizers=sgd, penalties={"laplacian": trace}, run={"max_steps": 1}
    ).fit()
    ```
    ## Fix
    Use a smooth activation: `nn.SiLU`, `nn.GELU`, `nn.Tanh`, `nn.Softplus`.

    ## Source
    Measured: u_xx of a ReLU network is zero while its graph is connected; safeloop's own rule.
    """

    code = "SL437"
    title = "second derivative is zero everywhere"
