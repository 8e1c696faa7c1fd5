"""The folder of a run that is to be read again: SL865."""

from __future__ import annotations

from pathlib import Path

from safeloop.checks.check import Check
from safeloop.faults import FaultError


class RunFolderUnreadable(Check):
    """The folder of a run cannot be read.

    ## What it does
    `safeloop doctor RUN` reads `metrics.jsonl` and `config.yaml` of a run folder. It reports a folder that does not
    exist or may not be read, one without `metrics.jsonl`, and a file in which no line is a record. A line that was cut
    off when the run was killed is left out.

    ## Why it is bad
    There is nothing to judge, and "nothing looks wrong" would be a lie.

    ## Bad
    ```python
    from safeloop.doctor import read_run

    read_run("runs/no-such-run")
    ```
    ## Good
    ```python
    from safeloop.doctor import read_run

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    log = {"every": 1, "sinks": ["jsonl"]}
    run = {"max_steps": 1, "dir": "runs", "name": "small"}
    data = [torch.randn(8, 4)]
    Run(model=nn.Linear(4, 1), data=data, optimizers={"type": "SGD", "lr": 0.1}, run=run, log=log).fit()
    read_run("runs/small")
    ```
    ## Fix
    Name the folder that `safeloop train` printed. A run writes `metrics.jsonl` where `log.sinks` has `jsonl`, and its
    first line after `log.every` steps.

    ## Source
    safeloop's own rule.
    """

    code = "SL865"
    title = "run folder cannot be read"

    @classmethod
    def of(cls, path: Path, problem: str) -> FaultError:
        """The error for the folder at `path`."""
        return cls.error(
            f"{path}: {problem}",
            where=str(path),
            why="a run writes `metrics.jsonl` only with `jsonl` in `log.sinks`, and not before step `log.every`",
            fix="name a run folder, such as `runs/digits`; add `jsonl` to `log.sinks` for the next run",
        )
