"""Penalties of the code and of the config that do not find each other, and those that have no effect."""

from __future__ import annotations

from safeloop.checks.check import Check


class PenaltyNotDeclared(Check):
    """A loss function returned a penalty, and the config does not say which.

    ## What it does
    `self.penalty(...)` says of which function and where; its key in the returned dict is its name, and
    `penalties.<name>` says the rest: type, weight, when. Looks that section up.

    ## Why it is bad
    Nobody can tell a WGAN-GP from an R1 by the call, and a default would train one of them in silence.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            score = self.model(batch)
            return {"score": score.mean(), "gp": self.penalty(self.model, at=batch)}

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            score = self.model(batch)
            return {"score": score.mean(), "gp": self.penalty(self.model, at=batch)}

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    sgd = {"type": "SGD", "lr": 0.1}
    gp = {"type": "gradient", "target": 1.0, "weight": 10.0}
    Run(
        model=model, data=[torch.randn(8, 4)], optimizers=sgd, penalties={"gp": gp}, run={"max_steps": 1}
    ).fit()
    ```
    ## Fix
    Add the section `penalties.<name>` with a `type`, or give the term the name of the section that is meant.

    ## Source
    safeloop's own rule.
    """

    code = "SL430"
    title = "penalty without a section"


class PenaltyMisdeclared(Check):
    """A section of `penalties:` that cannot be meant.

    ## What it does
    Refuses a name that is also under `losses:`; in a run without a Trainer of your own, a penalty that does not say
    `of` and `at`, or whose `of` names no loss; in a run with one, `of`, `at` and `targets`, which its code gives.

    ## Why it is bad
    One of two sections of a name would have no effect, and so would an `of` that nothing reads.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
    losses: {ce: {type: CrossEntropyLoss}}
    penalties: {smooth: {type: input_gradient, of: loss.cd, at: batch.0, weight: 0.1}}
    ```
    ## Good
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
    losses: {ce: {type: CrossEntropyLoss}}
    penalties: {smooth: {type: input_gradient, of: loss.ce, at: batch.0, weight: 0.1}}
    ```
    ## Fix
    Do what the line under the error says.

    ## Source
    safeloop's own rule.
    """

    code = "SL431"
    title = "penalty declared wrongly"


class PenaltyWithoutEffect(Check):
    """A penalty whose weight is zero.

    ## What it does
    Looks for `weight: 0` under `penalties:`. A weight that starts at 0 and moves is none.

    ## Why it is bad
    Its derivatives are computed on every step on which it is due, and train nothing; `every` does not change that.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
    losses: {ce: {type: CrossEntropyLoss}}
    penalties: {smooth: {type: input_gradient, of: loss.ce, at: batch.0, weight: 0.0, every: 4}}
    ```
    ## Good
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
    losses: {ce: {type: CrossEntropyLoss}}
    penalties: {smooth: {type: input_gradient, of: loss.ce, at: batch.0, weight: 0.1, every: 4}}
    ```
    ## Fix
    Take the penalty out, or give it a weight.

    ## Source
    safeloop's own rule.
    """

    code = "SL438"
    title = "penalty without effect"
    severity = "warning"


class DeclaredPenaltyMissing(Check):
    """The config declares a penalty that no loss function returns.

    ## What it does
    Compares the names under `penalties:` with those that came in the first step, from all phases.

    ## Why it is bad
    The run trains without its regularisation, and nothing shows it.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            return {"score": self.model(batch).square().mean()}

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    sgd = {"type": "SGD", "lr": 0.1}
    r1 = {"type": "r1", "weight": 1.0}
    Run(
        model=model, data=[torch.randn(8, 4)], optimizers=sgd, penalties={"r1": r1}, run={"max_steps": 1}
    ).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            x = self.leaf(batch)
            score = self.model(x)
            return {"score": score.square().mean(), "r1": self.penalty(of=score, at=x)}

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    sgd = {"type": "SGD", "lr": 0.1}
    r1 = {"type": "r1", "weight": 1.0}
    Run(
        model=model, data=[torch.randn(8, 4)], optimizers=sgd, penalties={"r1": r1}, run={"max_steps": 1}
    ).fit()
    ```
    ## Fix
    Return `self.penalty(...)` under that name, correct the name, or take the section out.

    ## Source
    safeloop's own rule.
    """

    code = "SL439"
    title = "declared penalty is missing"
