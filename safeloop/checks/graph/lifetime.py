"""Graphs that live longer than the iteration that made them."""

from __future__ import annotations

from safeloop.checks.check import Check


class GraphReachesBack(Check):
    """A loss depends on a graph of an earlier iteration.

    ## What it does
    Looks, before each backward pass, for edges from the graph of this iteration into one that was made with weights
    from before an earlier update. Speaks when the graph reaches back over two updates, or when the backward pass
    fails. A loss that is summed over many batches without an update between them is well.

    ## Why it is bad
    A state that is carried from batch to batch was not detached: each backward pass goes through all iterations before
    it, whose weights have changed since. PyTorch says "Trying to backward through the graph a second time", and
    `retain_graph=True` only hides the first error: then time and memory grow, or the gradients are silently wrong.

    ## Bad
    ```python
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        state = torch.zeros(8, 4)
        for _ in range(4):
            state = 0.5 * state + model(torch.randn(8, 4))
            optimizer.zero_grad()
            state.mean().backward(retain_graph=True)
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        state = torch.zeros(8, 4)
        for _ in range(4):
            state = 0.5 * state.detach() + model(torch.randn(8, 4))
            optimizer.zero_grad()
            state.mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Cut the graph at the border of the iteration: `state = state.detach()`.

    ## Source
    https://github.com/Eurus-Holmes/MNMT/issues/7; https://github.com/MorvanZhou/PyTorch-Tutorial/issues/57.
    """

    code = "SL310"
    title = "graph reaches back to an earlier iteration"


class GraphsKept(Check):
    """Graphs of earlier iterations are kept alive, more with each one.

    ## What it does
    After iterations 5, 10 and 19, looks through the variables of the loop, the attributes of its `self` and those of
    the modules, also in lists, dicts and objects such as meters, and through the variables and globals that their
    functions use, for tensors whose graphs were made before four or more different updates.

    ## Why it is bad
    A tensor that is kept keeps its whole graph, with every activation that it saved. Memory grows with each iteration
    until it ends, often hours later.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    history = []
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(8):
            optimizer.zero_grad()
            loss = F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))
            loss.backward()
            optimizer.step()
            history.append(loss)
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    history = []
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(8):
            optimizer.zero_grad()
            loss = F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))
            loss.backward()
            optimizer.step()
            history.append(loss.item())
            audit.step()
    ```
    ## Fix
    Keep the value alone: `.item()` for a number, `.detach()` for a tensor; update averages under `torch.no_grad()`.

    ## Source
    https://github.com/pytorch/pytorch/issues/64586; https://github.com/horovod/horovod/pull/641.
    """

    code = "SL311"
    title = "graphs of earlier iterations kept"


class StaleCasts(Check):
    """Autocast goes on using copies of the weights from before the last update.

    ## What it does
    Looks, before each backward pass, for a cast of a weight in its graph that is older than the last update of that
    weight, while autocast is on.

    ## Why it is bad
    Autocast keeps its copies of the weights until the outermost region ends. A region around the whole loop never ends:
    every forward uses the weights of the first iteration, while the optimizer moves others that nobody looks at.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with (
        sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit,
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        for _ in range(6):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)).float(), torch.randn(8, 1)).backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(torch.randn(8, 4))
            optimizer.zero_grad()
            F.mse_loss(out.float(), torch.randn(8, 1)).backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Open `with torch.autocast(...)` around each forward, not around the loop.

    ## Source
    https://github.com/X-GenGroup/Flow-Factory/pull/186; documentation of `torch.autocast`.
    """

    code = "SL648"
    title = "stale autocast copies of weights"
