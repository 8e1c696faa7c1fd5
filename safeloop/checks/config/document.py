"""Config files, overrides and environment variables that cannot be read."""

from __future__ import annotations

from safeloop.checks.check import Check


class DuplicateKey(Check):
    """The same key twice in one section.

    ## What it does
    Compares the keys of each section of a YAML file.

    ## Why it is bad
    Most YAML readers keep the last one in silence; the other one stands there and has no effect.

    ## Bad
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 1e-3, weight_decay: 0.1, lr: 3e-4}
    losses: {ce: {type: CrossEntropyLoss}}
    ```

    ## Good
    ```yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
    data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
    optimizers: {type: AdamW, lr: 3e-4, weight_decay: 0.1}
    losses: {ce: {type: CrossEntropyLoss}}
    ```

    ## Fix
    Remove one of the two.

    ## Source
    YAML 1.2.2, section 3.2.1.1: mapping keys are unique.
    """

    code = "SL106"
    title = "duplicate key"


class UnreadableYaml(Check):
    """A file that is no YAML, or YAML that a config may not use.

    ## What it does
    Reads YAML 1.2 with plain values only: no tags, no merge keys, at most 10,000 values, 64 levels and 1 MB,
    `extends` without a circle. Nothing in a file can run code.

    ## Why it is bad
    The config cannot be read, or would be read in another way than it looks.

    ## Bad
    ```yaml
    run: {max_steps: 100
    optimizers: {type: AdamW, lr: 1e-3}
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
    Mend the line that is shown; the cause of a syntax error often stands one line above.

    ## Source
    YAML 1.2.2.
    """

    code = "SL107"
    title = "unreadable YAML"


class MissingFile(Check):
    """A config file that does not exist or cannot be opened.

    ## What it does
    Looks for the config and for each file named by `extends`, which is relative to the file that names it.

    ## Why it is bad
    Values that the file should bring would be missing.

    ## Bad
    ```yaml
    extends: nowhere.yaml
    run: {max_steps: 100}
    model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
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
    Correct the path; the nearest name in that folder is suggested.

    ## Source
    safeloop's own rule.
    """

    code = "SL108"
    title = "missing file"


class BadOverride(Check):
    """An override or environment variable that names no place in the config.

    ## What it does
    Reads overrides as `section.key=value` and environment variables as `SAFELOOP__SECTION__KEY=value`; the
    value is YAML.

    ## Why it is bad
    An override that is skipped leaves the old value in force.

    ## Bad
    ```python
    from safeloop.config import load

    given = ["model", "data", "optimizers", "trainer"]
    load(sections={"run": {"max_steps": 1}}, overrides=["run.max_steps: 5"], given=given)
    ```

    ## Good
    ```python
    from safeloop.config import load

    given = ["model", "data", "optimizers", "trainer"]
    load(sections={"run": {"max_steps": 1}}, overrides=["run.max_steps=5"], given=given)
    ```

    ## Fix
    Write `section.key=value`, without spaces around the equals sign.

    ## Source
    safeloop's own rule.
    """

    code = "SL109"
    title = "bad override"
