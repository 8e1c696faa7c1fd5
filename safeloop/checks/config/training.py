"""Clipping, schedules and averages that do not fit together."""

from __future__ import annotations

from safeloop.checks.check import Check


class ClippedTwice(Check):
    """An optimizer whose gradients would be clipped in two ways.

    ## What it does
    Accepts at most one of `max_norm`, `clip_value` and `agc` for each optimizer.

    ## Why it is bad
    The second would work on what the first has left: its limit would no longer mean what it says, and the result would
    depend on an order that the config does not show.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3, max_norm: 1.0, clip_value: 0.5}
    losses: {ce: {type: CrossEntropyLoss}}
    ```

    ## Good
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3, max_norm: 1.0}
    losses: {ce: {type: CrossEntropyLoss}}
    ```

    ## Fix
    Keep one. Different parameters can be clipped differently by different optimizers.

    ## Source
    safeloop's own rule.
    """

    code = "SL120"
    title = "clipped twice"


class AverageNeverTaken(Check):
    """An average of the weights that the run ends without taking.

    ## What it does
    Compares `average.start` with `run.max_steps` when the config is loaded; warns at the end of a run that has averaged
    nothing.

    ## Why it is bad
    The evaluations would be those of the live weights, and `average.safetensors` would be missing, after a run that
    asked for both.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
    losses: {ce: {type: CrossEntropyLoss}}
    average: {type: swa, start: 101}
    ```

    ## Good
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
    losses: {ce: {type: CrossEntropyLoss}}
    average: {type: swa, start: 75, every: 5}
    ```

    ## Fix
    Lower `average.start`; the paper averages over the last quarter of the run.

    ## Source
    Pavel Izmailov et al.: Averaging Weights Leads to Wider Optima and Better Generalization (arXiv 1803.05407, 2018).
    """

    code = "SL121"
    title = "average never taken"


class ScheduleNeverMoves(Check):
    """A learning-rate schedule that would never move, or not as it is written.

    ## What it does
    Refuses `ReduceLROnPlateau` where its `metric` is never measured: no evaluation data, no `evaluate.every`, no metric
    of that name. Refuses `per` inside a `SequentialLR` or `ChainedScheduler`, whose parts move with the whole, and
    `per: epoch` on data that can be read only once.

    ## Why it is bad
    The learning rate would stay what it was, and nothing would say so.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: SGD, lr: 0.1, scheduler: {type: ReduceLROnPlateau, metric: loss/eval}}
    losses: {ce: {type: CrossEntropyLoss}}
    ```

    ## Good
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data:
      train: {target: "safeloop.datasets:Digits", args: {flat: true}}
      eval: {target: "safeloop.datasets:Digits", args: {flat: true, split: test}}
    optimizers: {type: SGD, lr: 0.1, scheduler: {type: ReduceLROnPlateau, metric: loss/eval, patience: 2}}
    losses: {ce: {type: CrossEntropyLoss}}
    evaluate: {every: 10}
    ```

    ## Fix
    Add evaluation data and `evaluate.every`, and name a metric that `metrics` returns, or `loss/eval`. Write `per`
    beside the `type` of the outer schedule.

    ## Source
    torch.optim.lr_scheduler.ReduceLROnPlateau; otherwise safeloop's own rule.
    """

    code = "SL122"
    title = "schedule never moves"
