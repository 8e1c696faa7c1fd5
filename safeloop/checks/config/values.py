"""Values of a config that are of the wrong kind, out of range, refused by torch, or suspicious."""

from __future__ import annotations

from safeloop.checks.check import Check


class WrongType(Check):
    """A value of the wrong kind: text where a number belongs, `true` where a number belongs, 2.5 steps.

    ## What it does
    Numbers, text, booleans, lists and sections are told apart strictly. Nothing is converted.

    ## Why it is bad
    Conversions hide mistakes: `lr: true` would train with a learning rate of 1.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: "1e-3"}
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
    Write the value as YAML writes its kind: `1e-3` without quotes, `[a, b]` for a list. Numbers follow YAML
    1.2.

    ## Source
    YAML 1.2.2, section 10.3 (core schema); otherwise safeloop's own rule.
    """

    code = "SL103"
    title = "wrong type"


class ValueOutOfRange(Check):
    """A value of the right kind that cannot be meant: a negative learning rate, NaN, an unknown device.

    ## What it does
    Compares numbers with their range and words with the accepted ones. NaN and infinity are refused everywhere.

    ## Why it is bad
    A negative learning rate climbs the loss, a NaN reaches every weight in one step.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: -1e-3}
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
    Use a value in the range that is named. `maximize: true` is torch's way to climb.

    ## Source
    safeloop's own rule, where torch's signatures name no range.
    """

    code = "SL104"
    title = "value out of range"


class ArgumentsRefused(Check):
    """Arguments that torch itself refuses when the object is built.

    ## What it does
    Builds each optimizer with its scheduler and groups, and each loss, once on tensors without storage
    (`device="meta"`), and shows torch's own message. The argument without which torch would accept the rest is
    pointed at. Losses with parameters of their own are refused here too: an optimizer owns parameters of the model.

    ## Why it is bad
    Rules between arguments (`nesterov` needs `momentum`, a beta lies in [0, 1)) show only when the object is
    built, after the data is loaded.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3, betas: [0.9, 2.0]}
    losses: {ce: {type: CrossEntropyLoss}}
    ```

    ## Good
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3, betas: [0.9, 0.99]}
    losses: {ce: {type: CrossEntropyLoss}}
    ```

    ## Fix
    Change the argument that is pointed at, or the one that it depends on.

    ## Source
    The message is torch's.
    """

    code = "SL114"
    title = "arguments refused"


class SuspiciousValue(Check):
    """A value that is possible but rarely meant: a learning rate of 0 or above 10, zero steps.

    ## What it does
    Warns of `lr: 0`, `lr` of 10 and more, and `max_steps: 0`.

    ## Why it is bad
    With `lr: 0` nothing is learnt, at 1000 nearly every model diverges in a few steps, and zero steps train
    nothing.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: SGD, lr: 1000}
    losses: {ce: {type: CrossEntropyLoss}}
    ```

    ## Good
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: SGD, lr: 0.1}
    losses: {ce: {type: CrossEntropyLoss}}
    ```

    ## Fix
    Check the value. To keep parameters still, list them under `frozen`. If it is meant, the warning may stand.

    ## Source
    safeloop's own rule.
    """

    code = "SL115"
    title = "suspicious value"
    severity = "warning"
