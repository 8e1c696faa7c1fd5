"""Checks of the data and of the place where a run happens: SL851 to SL857."""

from __future__ import annotations

from typing import ClassVar

from safeloop.checks.check import Check
from safeloop.faults import Severity


class EmptyData(Check):
    """The data holds no batch.

    ## What it does
    Reports training or evaluation data of length zero when the run opens it, and data of unknown length when its first
    epoch ends without a batch. `drop_last` with fewer samples than `batch_size` counts as empty too.

    ## Why it is bad
    A loop over nothing ends at once and without an error: the weights are the initial ones, an average over nothing is
    NaN or 0, and both look like results. A wrong path, a filter that keeps nothing and a glob without a match all end
    here.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    batches = [batch for batch in [torch.randn(8, 4)] if len(batch) > 100]
    Run(model=nn.Linear(4, 1), data=batches, optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```

    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    batches = [batch for batch in [torch.randn(8, 4)] if len(batch) > 4]
    Run(model=nn.Linear(4, 1), data=batches, optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```

    ## Fix
    Print `len(dataset)` where the data set is made, and follow its path or filter back. With `data.drop_last: true`,
    lower `data.batch_size` to at most the number of samples.

    ## Source
    safeloop's own rule.
    """

    code = "SL851"
    title = "empty data"


class BatchCannotMove(Check):
    """A batch holds tensors that cannot be moved to the device of the run.

    ## What it does
    Reports a part of a batch that holds tensors on another device and offers no way to move them: an object that is no
    tuple, list, dict, namedtuple or dataclass and has no method `to(device)`, or a tensor on the `meta` device, which
    has no values. It names the path inside the batch.

    ## Why it is bad
    Left where it is, the part fails later in the model with "expected all tensors to be on the same device", which
    names neither the batch nor the part.

    ## Bad
    ```python
    class Pair:
        def __init__(self, x):
            self.x = x

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch["pair"].x).square().mean()

    data = [{"pair": Pair(torch.randn(8, 4, device="meta"))}]
    Run(model=nn.Linear(4, 1), data=data, optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```

    ## Good
    ```python
    class Pair:
        def __init__(self, x):
            self.x = x

        def to(self, device):
            return Pair(self.x.to(device))

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch["pair"].x).square().mean()

    data = [{"pair": Pair(torch.randn(8, 4))}]
    Run(model=nn.Linear(4, 1), data=data, optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```

    ## Fix
    Give the class a method `to(device)` that returns the moved object, or make it a dataclass, a namedtuple or a dict,
    which safeloop moves itself. Build tensors on the CPU or on the device of the run, not on `meta`.

    ## Source
    safeloop's own rule; the protocol `to(device)` is that of `torch.Tensor` and `torch.nn.utils.rnn.PackedSequence`.
    """

    code = "SL852"
    title = "batch cannot move to the device"


class DeviceMissing(Check):
    """The device of the config is not on this machine.

    ## What it does
    Reports `run.device` when it asks for CUDA and torch sees none, when the index is beyond the last device, and when
    it names no device.

    ## Why it is bad
    Going on with the CPU instead would be a run a hundred times slower than the one that was asked for, and one with
    other rounding.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    run = {"max_steps": 1, "device": "cuda:99"}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run=run).fit()
    ```

    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    run = {"max_steps": 1, "device": "auto"}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run=run).fit()
    ```

    ## Fix
    Set `run.device` to `auto`, which takes CUDA where there is one, or to `cpu`. When the machine has a GPU:
    `nvidia-smi` shows whether its driver works, `python -c "import torch; print(torch.version.cuda)"` whether the
    installed torch was built for it.

    ## Source
    torch documentation, `torch.cuda.is_available`, `torch.cuda.device_count`.
    """

    code = "SL853"
    title = "device is missing"


class DataEndedEarly(Check):
    """The data can be read once, and it ended before the run did.

    ## What it does
    Warns when `data` is a generator or another iterator, which gives its batches once, and ends before `run.max_steps`
    steps or `run.max_epochs` epochs are done. The run stops there.

    ## Why it is bad
    A run of 300 steps that was to take 10,000 is a result for another question; its schedule never came to its end.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    data = (torch.randn(8, 4) for _ in range(3))
    result = Run(model=nn.Linear(4, 1), data=data, optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 10}).fit()
    ```

    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    data = [torch.randn(8, 4) for _ in range(3)]
    result = Run(model=nn.Linear(4, 1), data=data, optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 10}).fit()
    ```

    ## Fix
    Give a list, a Dataset, or an object whose `__iter__` starts anew each time; or set `run.max_steps` to what the data
    holds.

    ## Source
    Python documentation, "iterator": "repeated calls to the iterator's `__next__` method ... raise `StopIteration`"
    once exhausted.
    """

    code = "SL854"
    title = "data ended early"
    severity: ClassVar[Severity] = "warning"


class DataEndedInsideAStep(Check):
    """The data ended in the middle of a step, and some optimizers were updated while others were not.

    ## What it does
    A step of several turns, as of phases that repeat, is not begun where the data is known to be too short for it.
    Where nobody can know, because the data has no length or a `custom_step` draws for itself, this warns: what was
    updated stays updated, the step is not counted, its schedules and averages do not move.

    ## Why it is bad
    The last weights of the optimizers do not belong together: of a GAN, the critic is ahead of its generator.

    ## Bad
    ```python
    class Run(sl.Trainer):
        @sl.phase(trains="main", repeat=3)
        def fit_three_times(self, batch):
            return {"value": self.model(batch).square().mean()}

    class Batches:
        def __iter__(self):
            yield from torch.randn(5, 8, 4)

    sgd = {"main": {"type": "SGD", "lr": 0.1}}
    Run(model=nn.Linear(4, 1), data=Batches(), optimizers=sgd, run={"max_epochs": 1}).fit()
    ```

    ## Good
    ```python
    class Run(sl.Trainer):
        @sl.phase(trains="main", repeat=3)
        def fit_three_times(self, batch):
            return {"value": self.model(batch).square().mean()}

    class Batches:
        def __iter__(self):
            yield from torch.randn(5, 8, 4)

        def __len__(self):
            return 5

    sgd = {"main": {"type": "SGD", "lr": 0.1}}
    Run(model=nn.Linear(4, 1), data=Batches(), optimizers=sgd, run={"max_epochs": 1}).fit()
    ```

    ## Fix
    Give the data a length, or set `run.max_steps` to the steps that it can complete.

    ## Source
    safeloop's own rule.
    """

    code = "SL857"
    title = "data ended inside a step"
    severity: ClassVar[Severity] = "warning"


class NotData(Check):
    """What was given as data is neither a Dataset, nor a DataLoader, nor an iterable of micro-batches.

    ## What it does
    Reports a bare tensor, array or data frame, a dict, a string or a path, a function or class that was not called, an
    object with items but no `__iter__`, a map-style Dataset without a length, and an IterableDataset with
    `data.num_workers` (each worker would read all of it).

    ## Why it is bad
    Most of these can be iterated, and give something: a tensor its rows one by one, a dict its keys, a string its
    letters, a data frame the names of its columns. The loop would run, on nonsense.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    data = torch.randn(8, 4)
    Run(model=nn.Linear(4, 1), data=data, optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```

    ## Good
    ```python
    from torch.utils.data import TensorDataset

    class Run(sl.Trainer):
        def loss(self, batch):
            (x,) = batch
            return self.model(x).square().mean()

    data = TensorDataset(torch.randn(8, 4))
    Run(model=nn.Linear(4, 1), data=data, optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```

    ## Fix
    `TensorDataset(x, y)` for tensors whose rows are samples; `[batch]` for one ready micro-batch; a class that inherits
    `torch.utils.data.Dataset` for samples read on demand.

    ## Source
    torch documentation, `torch.utils.data`: map-style and iterable-style data sets.
    """

    code = "SL855"
    title = "not data"


class RunFolderUnwritable(Check):
    """The folder of the run cannot be made or written.

    ## What it does
    Makes the run's folder and a file in it before training, and reports when the operating system refuses: a file in
    the place of a folder, missing permission, a read-only or full disk.

    ## Why it is bad
    Found only when the first log or checkpoint is due, it costs the training until then.

    ## Bad
    ```python
    from pathlib import Path

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    Path("results").write_text("a file, where the folder of runs is to be")
    run = {"max_steps": 1, "dir": "results"}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run=run).fit()
    ```

    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    run = {"max_steps": 1, "dir": "results"}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run=run).fit()
    ```

    ## Fix
    Set `run.dir` to a folder that the user of this process may write, on a disk with space left.

    ## Source
    safeloop's own rule.
    """

    code = "SL856"
    title = "run folder cannot be written"
