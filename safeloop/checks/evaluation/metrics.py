"""The check of what `metrics` returns: SL701."""

from __future__ import annotations

from safeloop.checks.check import Check


class BadMetric(Check):
    """What `metrics` returned cannot be averaged into one number per name.

    ## What it does
    Reports a return value that is no mapping from names to values or an empty one; a value that is no tensor, number or
    object with `update`, `compute` and `reset`; a complex one; a value with one number of dimensions on one batch and
    another on the next; a name that comes with some batches only; a metric without a single element over the whole
    evaluation; a metric object that is made anew for each batch, and one whose `compute()` is not a single number.

    ## Why it is bad
    A metric is pooled over all batches: element by element when it has a dimension, weighted by `count(batch)` when it
    is a single number. When it changes from one to the other (a `squeeze()` on a last batch of one sample), when it is
    missing on some batches, or when only the last object of many is read, the average is that of something else, and
    nothing in the number shows it.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

        def metrics(self, batch):
            return {"error": self.model(batch).square().squeeze()}

    data = [torch.randn(8, 4), torch.randn(1, 4)]
    optimizer = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=data, eval_data=data, optimizers=optimizer, run={"max_steps": 2}).fit()
    ```

    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

        def metrics(self, batch):
            return {"error": self.model(batch).square().squeeze(1)}

    data = [torch.randn(8, 4), torch.randn(1, 4)]
    optimizer = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=data, eval_data=data, optimizers=optimizer, run={"max_steps": 2}).fit()
    ```

    ## Fix
    Return a dict of per-sample tensors, `{"accuracy": output.argmax(1) == labels}`: their mean over the data set is
    exact, whatever the sizes of the batches. Squeeze a named dimension, `squeeze(1)`. A batch that has nothing to say
    returns an empty tensor, `value[mask]`.

    ## Source
    torch documentation, `torch.squeeze`: "if the tensor has a batch dimension of size 1, then squeeze(input) will also
    remove the batch dimension, which can lead to unexpected errors".
    """

    code = "SL701"
    title = "bad metric"
