"""Stages that do not go together with what stands beside them."""

from __future__ import annotations

from safeloop.checks.check import Check


class StagesRefused(Check):
    """Optimizers stand beside `stages`, so that a parameter would have two owners at a time.

    ## What it does
    Looks for an `optimizers` section, or ready optimizers given in code, beside a `stages` section, before anything is
    built.

    ## Why it is bad
    Each stage has optimizers of its own, and a parameter has exactly one owner while it lasts. Nothing says in which
    stage the others would train.

    ## Bad
    ```yaml
    run: {name: two-owners}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    losses: {ce: {type: CrossEntropyLoss}}
    optimizers: {type: Adam, lr: 1e-3}
    stages:
      polish: {max_steps: 10, optimizers: {type: LBFGS, line_search_fn: strong_wolfe}}
    ```
    ## Good
    ```yaml
    run: {name: one-at-a-time}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    losses: {ce: {type: CrossEntropyLoss}}
    stages:
      explore: {max_steps: 500, optimizers: {type: Adam, lr: 1e-3}}
      polish: {max_steps: 10, optimizers: {type: LBFGS, line_search_fn: strong_wolfe}}
    ```
    ## Fix
    Move the `optimizers` section into a stage of its own, or take `stages` out.

    ## Source
    safeloop's own rule.
    """

    code = "SL625"
    title = "optimizers beside stages"
