"""Targets (`package.module:Class`) that are not allowed, do not exist, have the wrong class or get wrong arguments."""

from __future__ import annotations

from safeloop.checks.check import Check


class TargetNotAllowed(Check):
    """A target outside the modules that a config may import from.

    ## What it does
    Compares the module with a list of allowed prefixes before it is imported, and the module that the class
    really lives in after. The list holds `torch.nn`, `torch.optim`, `safeloop` and what code, the command line
    or `pyproject.toml` adds; never the config itself.

    ## Why it is bad
    A config that may import anything may run anything: `os:system` is one line.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "subprocess:Popen", args: {args: [ls]}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
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
    Add the package to `[tool.safeloop] allow_modules` in your pyproject.toml, or pass `--allow-module PACKAGE`.

    ## Source
    GHSA-37p2-j732-x8pj (Hydra): a block-list of targets was passed by another name of the same function.
    """

    code = "SL110"
    title = "target not allowed"


class TargetNotFound(Check):
    """A target whose module or class does not exist.

    ## What it does
    Imports the module (after it was found to be allowed) and looks the class up. The nearest name is suggested.

    ## Why it is bad
    The object cannot be built.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linaer", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
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
    Correct the name. The folder of the nearest pyproject.toml with a `[tool.safeloop]` table is searched too.

    ## Source
    safeloop's own rule.
    """

    code = "SL111"
    title = "target not found"


class TargetOfWrongClass(Check):
    """A target that is not the kind of class that its place needs.

    ## What it does
    A model is a subclass of `torch.nn.Module`, data is a `Dataset` or an iterable, losses and metrics are
    classes whose objects can be called, a trainer is a subclass of `safeloop.Trainer`. Functions are refused.

    ## Why it is bad
    The run would fail later, or call something that was never meant to be called from a config.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn.functional:relu"}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
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
    Name a class of the right kind; wrap a function in a small class.

    ## Source
    safeloop's own rule.
    """

    code = "SL112"
    title = "target of the wrong class"


class TargetArguments(Check):
    """Arguments that do not fit the signature of the target.

    ## What it does
    Binds `args` to the signature before anything is built. The nearest parameter name is suggested.

    ## Why it is bad
    The object cannot be built, or is built with a default in place of the value that was meant.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_feature: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3}
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
    Use the names of the parameters of the class.

    ## Source
    safeloop's own rule.
    """

    code = "SL113"
    title = "target arguments"
