"""Keys of a config that do not exist, are missing, or name a type that does not exist."""

from __future__ import annotations

from safeloop.checks.check import Check


class UnknownKey(Check):
    """A key that nothing reads.

    ## What it does
    Every key of the config, of an override, an environment variable or a keyword is compared with what is
    accepted at its place. The nearest accepted key is suggested.

    ## Why it is bad
    A misspelled key that is skipped leaves a default in force: the run trains, with another learning rate than
    the one written.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lrr: 1e-3}
    losses: {ce: {type: CrossEntropyLoss}}
    ```

    ## Good
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
    losses: {ce: {type: CrossEntropyLoss}}
    ```

    ## Fix
    Use one of the keys listed under the line, or remove it. `safeloop schema` prints all of them; an editor
    with the YAML language server completes them.

    ## Source
    safeloop's own rule.
    """

    code = "SL101"
    title = "unknown key"


class MissingKey(Check):
    """A key without which the run is not defined.

    ## What it does
    Looks for what every run needs (an end, a model, data, an optimizer) and for arguments that torch requires.
    What is passed to the `Trainer` in code counts as given.

    ## Why it is bad
    There is no sensible default: a run without `max_steps` or `max_epochs` has no end, `CosineAnnealingLR` no
    period.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: SGD, lr: 0.1, scheduler: {type: CosineAnnealingLR}}
    losses: {ce: {type: CrossEntropyLoss}}
    ```

    ## Good
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: SGD, lr: 0.1, scheduler: {type: CosineAnnealingLR, T_max: 100}}
    losses: {ce: {type: CrossEntropyLoss}}
    ```

    ## Fix
    Add the key at the place that is named.

    ## Source
    safeloop's own rule; which arguments are required is read from torch's signatures.
    """

    code = "SL102"
    title = "missing key"


class UnknownType(Check):
    """A `type:` that is none of the known ones.

    ## What it does
    Compares `type` with the optimizers, schedulers, losses or sinks that exist. The nearest name is suggested.

    ## Why it is bad
    The block cannot be built.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamV, lr: 1e-3}
    losses: {ce: {type: CrossEntropyLoss}}
    ```

    ## Good
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
    losses: {ce: {type: CrossEntropyLoss}}
    ```

    ## Fix
    Use a known name; they are torch's class names. Your own loss or metric is named by `target:
    package.module:Class`.

    ## Source
    The names are read from `torch.optim`, `torch.optim.lr_scheduler` and `torch.nn`.
    """

    code = "SL105"
    title = "unknown type"
