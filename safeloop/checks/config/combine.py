"""A `combine` section that cannot work."""

from __future__ import annotations

from safeloop.checks.check import Check


class PackageMissing(Check):
    """A section of the config needs a package that is not installed.

    ## What it does
    Looks, before anything runs, whether what `combine.type` needs can be imported: torchjd for all, a solver besides
    for `cagrad`.

    ## Why it is bad
    The run would end at its first step.

    ## Bad
    ```python
    from unittest.mock import patch

    sections = {
        "run": {"max_steps": 1},
        "model": {"target": "torch.nn:Linear", "args": {"in_features": 64, "out_features": 10}},
        "data": {"train": {"target": "safeloop.datasets:Digits", "args": {"flat": True}}},
        "optimizers": {"type": "AdamW", "lr": 1e-3},
        "losses": {"ce": {"type": "CrossEntropyLoss"}, "flat": {"type": "CrossEntropyLoss", "label_smoothing": 1.0}},
        "combine": {"type": "pcgrad"},
    }
    with patch("safeloop.config.combine.find_spec", return_value=None):  # as if torchjd were not installed
        sl.config.load(sections=sections)
    ```

    ## Good
    ```python
    sections = {
        "run": {"max_steps": 1},
        "model": {"target": "torch.nn:Linear", "args": {"in_features": 64, "out_features": 10}},
        "data": {"train": {"target": "safeloop.datasets:Digits", "args": {"flat": True}}},
        "optimizers": {"type": "AdamW", "lr": 1e-3},
        "losses": {"ce": {"type": "CrossEntropyLoss"}, "flat": {"type": "CrossEntropyLoss", "label_smoothing": 1.0}},
        "combine": {"type": "pcgrad"},
    }
    sl.config.load(sections=sections)
    ```

    ## Fix
    `pip install "safeloop[multitask]"`; for `cagrad`, `pip install "safeloop[multitask,cagrad]"`.

    ## Source
    safeloop's own rule.
    """

    code = "SL130"
    title = "package missing"


class CombineRefused(Check):
    """The gradients of loss terms are to be combined where that cannot be right.

    ## What it does
    Refuses `combine` beside accumulation, fp16, LBFGS and `simultaneous`.

    ## Why it is bad
    The rules are not linear in the batch: combined per micro-batch and then summed, gradients are not what the whole
    batch would give. In fp16 the scale is taken off after the backward pass, when the terms are no longer apart. LBFGS
    needs the gradient of one function, and a combination is the gradient of none. A simultaneous step keeps its terms
    apart on purpose.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
    losses:
      ce: {type: CrossEntropyLoss}
      flat: {type: CrossEntropyLoss, label_smoothing: 1.0}
    accumulate: {micro_batches: 4}
    combine: {type: pcgrad}
    ```

    ## Good
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}, batch_size: 128}
    optimizers: {type: AdamW, lr: 1e-3}
    losses:
      ce: {type: CrossEntropyLoss}
      flat: {type: CrossEntropyLoss, label_smoothing: 1.0}
    combine: {type: pcgrad}
    ```

    ## Fix
    Use a larger `data.batch_size` instead of accumulation, and bf16 or fp32; or take `combine` out.

    ## Source
    safeloop's own rule.
    """

    code = "SL131"
    title = "combine refused"
