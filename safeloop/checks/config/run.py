"""Run names, losses and input paths that do not make a run."""

from __future__ import annotations

from safeloop.checks.check import Check


class BadRunName(Check):
    """A run name that is no plain folder name.

    ## What it does
    Accepts 1 to 100 letters, digits, dots, dashes and underscores, the first a letter or digit.

    ## Why it is bad
    The name becomes a folder under `run.dir`: a name like `../x` would write somewhere else.

    ## Bad
    ```yaml
    run: {name: "../elsewhere", max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
    losses: {ce: {type: CrossEntropyLoss}}
    ```

    ## Good
    ```yaml
    run: {name: digits-baseline, max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
    losses: {ce: {type: CrossEntropyLoss}}
    ```

    ## Fix
    Choose a plain name; put folders into `run.dir`.

    ## Source
    safeloop's own rule.
    """

    code = "SL116"
    title = "bad run name"


class NoLoss(Check):
    """A run without a loss.

    ## What it does
    A run needs a `Trainer` subclass with `loss` or `losses`, or a config whose `losses:` section says what each
    term is, by `type` or `target`.

    ## Why it is bad
    There is nothing to differentiate.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
    losses: {ce: {weight: 2.0}}
    ```

    ## Good
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
    losses: {ce: {type: CrossEntropyLoss, weight: 2.0}}
    ```

    ## Fix
    Override `loss(self, batch)` in a subclass of `Trainer`, or give each term under `losses:` a `type` or a
    `target`.

    ## Source
    safeloop's own rule.
    """

    code = "SL117"
    title = "no loss"


class LossAndLosses(Check):
    """A Trainer that overrides both `loss` and `losses`.

    ## What it does
    Looks at the class when the Trainer is made.

    ## Why it is bad
    One of the two would never be called, and nobody could tell which from reading the class.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

        def losses(self, batch):
            return {"square": self.model(batch).square().mean()}

    optimizers = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=optimizers, run={"max_steps": 1}).fit()
    ```

    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            return {"square": self.model(batch).square().mean()}

    optimizers = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=optimizers, run={"max_steps": 1}).fit()
    ```

    ## Fix
    Keep one: `loss` returns one tensor, `losses` a dict of named terms.

    ## Source
    safeloop's own rule.
    """

    code = "SL118"
    title = "loss and losses"


class BadInputPath(Check):
    """An input path that leads nowhere.

    ## What it does
    Inputs of config-only models, losses and metrics are paths: `batch` or `output`, then keys, indices or
    attributes, as in `batch.1` or `output.logits`. The form is checked when the config is loaded, the rest on
    the first batch.

    ## Why it is bad
    There is nothing to compute the loss from.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
    losses: {ce: {type: CrossEntropyLoss, inputs: [outputs, batch.1]}}
    ```

    ## Good
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
    losses: {ce: {type: CrossEntropyLoss, inputs: [output, batch.1]}}
    ```

    ## Fix
    Start with `batch` or `output` (a model's inputs: `batch`), and name a key that the batch has.

    ## Source
    safeloop's own rule.
    """

    code = "SL119"
    title = "bad input path"
