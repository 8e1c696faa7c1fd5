"""Parameters that no gradient reaches, or only zeros, and loss terms that are always zero."""

from __future__ import annotations

from collections.abc import Iterator

from safeloop.checks.check import Check
from safeloop.checks.gradients.choices import is_chosen
from safeloop.checks.gradients.history import Cause, History
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault


class NoGradient(Check):
    """A parameter that is to be trained never gets a gradient.

    ## What it does
    Looks at which parameters the backward passes reach on the steps that are looked at in depth, and tells those that
    none of at least 3 reached, with the line that cut their path, where there is one. Experts, layers and branches
    that are chosen by the data or by chance are left alone: members of a container of which others are used on some
    steps only. A member that is never used, beside others that always are, may come later (progressive growing): it
    is a warning. A path that is cut on every step is told after 20 steps; a parameter that is not used, at the end or,
    in a loop of your own, after 200 steps, unless it has moved since. A path that the code cuts under a condition is
    meant (`no_grad() if self.frozen else nullcontext()`), and so is a bias where only a derivative is trained. Cost: a
    walk over the graph, and the tape of calls.

    ## Why it is bad
    The parameter keeps its initial value, and weight decay may even shrink it. The model is smaller than it looks, and
    the loss goes down all the same.

    ## Bad
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.body(x).detach())

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=Net(), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 5}).fit()
    ```
    ## Good
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.body(x))

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=Net(), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 5}).fit()
    ```
    ## Fix
    Keep the path in differentiable torch functions, with grad mode on; use the parameter in the forward, or remove it.
    Where it is not to be trained, freeze it by `requires_grad_(False)`, or `frozen:` in a Trainer.

    ## Source
    https://github.com/facebookresearch/fairchem/pull/317; https://github.com/lanlan96/ARM3D/issues/1.
    """

    code = "SL502"
    title = "parameter without gradient"

    @classmethod
    def find(cls, view: History) -> Iterator[Fault]:
        """One fault for all parameters with one cause."""
        groups: dict[tuple[str, str, bool], list[str]] = {}
        for name, trace in view.traces.items():
            cause = trace.cause
            is_dropped = cause is not None and cause.kind == "dropped" and trace.dropped == trace.steps
            is_idle = bool(trace.steps) and (is_dropped or trace.absent == trace.steps)
            if is_idle and name not in view.routed | view.moved:
                is_sure = is_dropped or (cause is not None and bool(cause.cut))
                if (cause is not None and _is_meant(cause)) or not (is_sure or view.is_late):
                    continue
                text, site = ("", None) if cause is None else (cause.text, cause.site)
                groups.setdefault((text, at(site, ""), name in view.optional), []).append(name)
        for (text, place, is_optional), found in groups.items():
            names = view.ordered(found)
            trace = view.traces[names[0]]
            cause = trace.cause
            others = () if cause is None else cause.others
            yield cls.fault(
                f"{listed(names)} got no gradient on any of {trace.steps} steps",
                where=place + "".join(f"; also cut off at {at(site, '')}" for site in others) or view.where,
                why=text or "no loss depends on them, or every path to them is cut",
                fix=_FIXES["unused" if cause is None else cause.kind],
                severity="warning" if is_optional else None,
                names=names,
            )


def _is_meant(cause: Cause) -> bool:
    """Whether the missing gradient is one by design: thawed later, or not part of a derivative."""
    sites = () if cause.site is None else (cause.site, *cause.callers)
    return cause.kind == "derivative" or (bool(cause.cut) and is_chosen(sites, cause.cut))


_FIXES = {
    "cut": "keep the path in differentiable torch functions with grad mode on; freeze them by `requires_grad_(False)` "
    "where they are not to be trained",
    "escape": "use their result in a loss, without leaving torch; freeze them by "
    "`requires_grad_(False)` where they are "
    "not to be trained",
    "dropped": "return a gradient for each argument of `forward` that may need one (`ctx.needs_input_grad` says which)",
    "unused": "use them in the forward, remove them, or freeze them by `requires_grad_(False)`",
}


class AlwaysZero(Check):
    """A parameter's gradient is exactly zero on every step.

    ## What it does
    Looks at the norm of every gradient on the steps that are looked at in depth. Where it was exactly zero on all of at
    least 5, the operation or the hook that lets nothing through is looked for in the graph, and told with its line, at
    the end or, in a loop of your own, after 200 steps, unless the parameter has moved since: a weight may be zero at
    first. Attention to a single token gives its query and key no gradient, and is well; so is the bias of a layer whose
    weight gets one: differences of its outputs, as in a contrastive loss, do not depend on it. An error where the
    derivative of that operation is zero everywhere, as of a rounding: no value can revive it; where such an operation
    came into the model later, as with quantisation that is switched on, and the gradient has been zero on the last 5
    steps, it is a warning. Cost: a norm for each gradient; hooks on the graph for one backward pass where something is
    zero.

    ## Why it is bad
    The parameter does not learn, although it is connected: a ReLU whose units are all inactive, a saturated clamp or
    sigmoid, a rounding, a factor of zero.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    nn.init.constant_(model[0].bias, -100.0)
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 6}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    nn.init.constant_(model[0].bias, 0.0)
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 6}).fit()
    ```
    ## Fix
    Look at the values that go into the operation that is named: a bias or a scale far off, inputs that are not
    normalised, a weight of zero that nothing moves. LeakyReLU and GELU have no flat half; a rounding needs a
    straight-through estimator.

    ## Source
    Wardat et al., "DeepDiagnosis", 2022 (https://ar5iv.labs.arxiv.org/html/2112.04036): dying ReLU.
    """

    code = "SL503"
    title = "gradient always zero"
    severity = "warning"

    @classmethod
    def find(cls, view: History) -> Iterator[Fault]:
        """One fault for all parameters with one cause."""
        groups: dict[tuple[str, str, bool], list[str]] = {}
        cured: set[tuple[str, str, bool]] = set()
        for name, trace in view.traces.items() if view.is_late else ():
            is_always = trace.zero + trace.absent == trace.steps and not view.is_mere_shift(name)
            cause = trace.cause
            if (
                trace.still < 5
                or cause is None
                or cause.kind not in _SHOWN
                or not (is_always or _FOREVER in cause.text)
            ):
                continue
            key = cause.text, at(cause.site, ""), is_always
            groups.setdefault(key, []).append(name)
            if name in view.moved:  # what has let nothing through lets something through now
                cured.add(key)
        for (text, place, is_always), found in groups.items():
            if (text, place, is_always) in cured:
                continue
            names = view.ordered(found)
            steps = view.traces[names[0]].still
            when = f"on all of {steps} steps" if is_always else f"on the last {steps} steps, and was not before"
            yield cls.fault(
                f"the gradient of {listed(names)} was exactly zero {when}",
                where=place or view.where,
                why=text,
                fix=next((fix for word, fix in _ZERO_FIXES.items() if word in text), _VALUES),
                severity="error" if is_always and _FOREVER in text else None,
                names=names,
            )


_FOREVER = "zero everywhere"

_FLAT = (
    "use a smooth function in its place (tanh, softmax), a straight-through estimator `x + (hard - x).detach()`, or "
    "for a sample `mean + std * torch.randn_like(std)`, which `rsample()` of a distribution does"
)
_ZERO_FIXES = {
    _FOREVER: _FLAT,
    "a hook": "correct the hook; to keep a whole parameter from training, use `requires_grad_(False)`",
    "cancel": "look for a detach() that is missing: a straight-through estimator is `x + (hard - x).detach()`",
}
_SHOWN = ("zero", "hooked", "cancelled")
_VALUES = "look at the values that go into that operation: a bias far off, a scale, a weight of zero"


class TermAlwaysZero(Check):
    """A loss term is exactly zero on every step, although it depends on the model.

    ## What it does
    Looks at the value of every returned term on the steps that are looked at in depth, and tells at the end of the run
    those that were exactly 0 on all of at least 5. Cost: one reading for each term and step.

    ## Why it is bad
    The term is multiplied by zero, or clamped there, and trains nothing: an integer division such as `1 // 4`, a
    weight that was never set, a margin that is always met. What only it trains gets zero gradients.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            out = self.model(batch)
            return {"fit": (out - batch).square().mean(), "smooth": (1 // 4) * out.square().mean()}

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 6}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            out = self.model(batch)
            return {"fit": (out - batch).square().mean(), "smooth": (1 / 4) * out.square().mean()}

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 6}).fit()
    ```
    ## Fix
    Correct the weight, or take the term out. Where it is zero until later, give it a weight that moves
    (`losses.NAME.weight: {start, end, steps}`), or return it only when it is due.

    ## Source
    Seen as a loss weight that an integer division made zero.
    """

    code = "SL424"
    title = "loss term always zero"
    severity = "warning"

    @classmethod
    def find(cls, view: History) -> Iterator[Fault]:
        """Terms that were zero on every step that was looked at."""
        for term, steps in view.terms_zero.items():
            if steps >= 5:
                yield cls.fault(
                    f"loss term `{term}` was exactly 0 on all of {steps} steps, and has a graph",
                    where=view.term_sites.get(term, view.where),
                    why="it is multiplied by zero (an integer division such as `1 // 4`, a weight that "
                    "was never set), or "
                    "clamped there: what only it trains gets zero gradients",
                    fix="correct its weight, or take the term out; where it is zero until later, give it a weight that "
                    "moves (`losses.NAME.weight: {start, end, steps}`) or `every`",
                    names=(term,),
                )
