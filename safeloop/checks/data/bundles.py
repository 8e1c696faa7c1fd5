"""Replay bundles that cannot be opened: SL861 to SL864."""

from __future__ import annotations

from safeloop.checks.check import Check


class BundleDamaged(Check):
    """A replay bundle is not what was written.

    ## What it does
    Compares the checksum of each file with the manifest before anything is parsed, and refuses missing files, links and
    contents that do not fit together. Only three files of fixed names are opened; nothing in them is ever run.

    ## Why it is bad
    A replay of other values than those of the step would give a diagnosis of something else.

    ## Bad
    ```python
    import contextlib

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().sum().sqrt()

    def trainer(width=4):
        model, sgd = nn.Linear(width, 1), {"type": "SGD", "lr": 0.1}
        run, log = {"name": "fails", "max_steps": 1}, {"sinks": ["jsonl"]}
        data = [torch.full((8, 4), float("nan"))]
        return Run(model=model, data=data, optimizers=sgd, run=run, log=log)

    def bundle():
        with contextlib.suppress(sl.FaultError):
            trainer().fit()
        return "runs/fails/bundles/step-0"

    path = bundle()
    with open(f"{path}/tensors.safetensors", "ab") as file:
        file.write(b"x")
    sl.replay(path, trainer())
    ```

    ## Good
    ```python
    import contextlib

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().sum().sqrt()

    def trainer(width=4):
        model, sgd = nn.Linear(width, 1), {"type": "SGD", "lr": 0.1}
        run, log = {"name": "fails", "max_steps": 1}, {"sinks": ["jsonl"]}
        data = [torch.full((8, 4), float("nan"))]
        return Run(model=model, data=data, optimizers=sgd, run=run, log=log)

    def bundle():
        with contextlib.suppress(sl.FaultError):
            trainer().fit()
        return "runs/fails/bundles/step-0"

    print(sl.replay(bundle(), trainer()))
    ```

    ## Fix
    Copy the whole folder again: `manifest.json`, `config.yaml` and `tensors.safetensors`.

    ## Source
    safeloop's own rule.
    """

    code = "SL861"
    title = "damaged bundle"


class BundleWithoutBatch(Check):
    """The batch of a failed step could not be saved, so that the step cannot be run again.

    ## What it does
    Reports a bundle whose batch held something else than tensors, numbers, strings, lists, tuples and dicts. The
    weights, the config and the text of the fault are in it all the same.

    ## Why it is bad
    Other objects could only be written as pickles, which run code when they are opened.

    ## Bad
    ```python
    import contextlib

    class Sample:
        def __init__(self, x):
            self.x = x

        def to(self, device):
            return Sample(self.x.to(device))

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch.x).square().sum().sqrt()

    def trainer(width=4):
        model, sgd = nn.Linear(width, 1), {"type": "SGD", "lr": 0.1}
        run, log = {"name": "fails", "max_steps": 1}, {"sinks": ["jsonl"]}
        data = [Sample(torch.full((8, 4), float("nan")))]
        return Run(model=model, data=data, optimizers=sgd, run=run, log=log)

    def bundle():
        with contextlib.suppress(sl.FaultError):
            trainer().fit()
        return "runs/fails/bundles/step-0"

    sl.replay(bundle(), trainer())
    ```

    ## Good
    ```python
    import contextlib

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch["x"]).square().sum().sqrt()

    def trainer(width=4):
        model, sgd = nn.Linear(width, 1), {"type": "SGD", "lr": 0.1}
        run, log = {"name": "fails", "max_steps": 1}, {"sinks": ["jsonl"]}
        data = [{"x": torch.full((8, 4), float("nan"))}]
        return Run(model=model, data=data, optimizers=sgd, run=run, log=log)

    def bundle():
        with contextlib.suppress(sl.FaultError):
            trainer().fit()
        return "runs/fails/bundles/step-0"

    print(sl.replay(bundle(), trainer()))
    ```

    ## Fix
    Let the data give tensors in dicts, lists or tuples: convert other objects in the data set or in `collate_fn`.

    ## Source
    safeloop's own rule.
    """

    code = "SL862"
    title = "bundle without its batch"


class BundleDoesNotFit(Check):
    """A replay bundle is of another model or of another phase than the Trainer that is to replay it.

    ## What it does
    Compares the names, shapes and dtypes of parameters and buffers with the model's, and looks for the phase.

    ## Why it is bad
    With other weights the step would be another one.

    ## Bad
    ```python
    import contextlib

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().sum().sqrt()

    def trainer(width=4):
        model, sgd = nn.Linear(width, 1), {"type": "SGD", "lr": 0.1}
        run, log = {"name": "fails", "max_steps": 1}, {"sinks": ["jsonl"]}
        data = [torch.full((8, 4), float("nan"))]
        return Run(model=model, data=data, optimizers=sgd, run=run, log=log)

    def bundle():
        with contextlib.suppress(sl.FaultError):
            trainer().fit()
        return "runs/fails/bundles/step-0"

    sl.replay(bundle(), trainer(width=5))
    ```

    ## Good
    ```python
    import contextlib

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().sum().sqrt()

    def trainer(width=4):
        model, sgd = nn.Linear(width, 1), {"type": "SGD", "lr": 0.1}
        run, log = {"name": "fails", "max_steps": 1}, {"sinks": ["jsonl"]}
        data = [torch.full((8, 4), float("nan"))]
        return Run(model=model, data=data, optimizers=sgd, run=run, log=log)

    def bundle():
        with contextlib.suppress(sl.FaultError):
            trainer().fit()
        return "runs/fails/bundles/step-0"

    print(sl.replay(bundle(), trainer()))
    ```

    ## Fix
    Check out the code of the run that wrote the bundle; its config stands in `config.yaml`.

    ## Source
    safeloop's own rule.
    """

    code = "SL863"
    title = "bundle does not fit"


class BundleNeedsItsTrainer(Check):
    """A replay bundle is of a run that was built in code, and no Trainer was given.

    ## What it does
    Reports that the config in the bundle cannot build the model, the optimizers or the Trainer, as they were live
    objects.

    ## Why it is bad
    `safeloop replay BUNDLE` has the config alone.

    ## Bad
    ```python
    import contextlib

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().sum().sqrt()

    def trainer(width=4):
        model, sgd = nn.Linear(width, 1), {"type": "SGD", "lr": 0.1}
        run, log = {"name": "fails", "max_steps": 1}, {"sinks": ["jsonl"]}
        data = [torch.full((8, 4), float("nan"))]
        return Run(model=model, data=data, optimizers=sgd, run=run, log=log)

    def bundle():
        with contextlib.suppress(sl.FaultError):
            trainer().fit()
        return "runs/fails/bundles/step-0"

    sl.replay(bundle())
    ```

    ## Good
    ```python
    import contextlib

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().sum().sqrt()

    def trainer(width=4):
        model, sgd = nn.Linear(width, 1), {"type": "SGD", "lr": 0.1}
        run, log = {"name": "fails", "max_steps": 1}, {"sinks": ["jsonl"]}
        data = [torch.full((8, 4), float("nan"))]
        return Run(model=model, data=data, optimizers=sgd, run=run, log=log)

    def bundle():
        with contextlib.suppress(sl.FaultError):
            trainer().fit()
        return "runs/fails/bundles/step-0"

    print(sl.replay(bundle(), trainer()))
    ```

    ## Fix
    Build the Trainer as the run did and call `safeloop.replay(bundle, trainer)`; or name the classes in the config:
    `trainer: {target: ...}`, `model: {target: ...}`.

    ## Source
    safeloop's own rule.
    """

    code = "SL864"
    title = "bundle needs its Trainer"
