"""Derivatives asked for where there are none: inference tensors, tensors without a graph, second derivatives."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.autograd import Function

from safeloop.autograd.second import once_differentiable_functions
from safeloop.checks.check import Check
from safeloop.checks.graph.scene import Scene
from safeloop.checks.wording import listed
from safeloop.faults import Fault


class InferenceTensor(Check):
    """A tensor that was made under `torch.inference_mode()` is used in training.

    ## What it does
    Recognises torch's errors about inference tensors, and names the module and the local variables that hold one.

    ## Why it is bad
    Inference tensors have no version counter, so that autograd can never save them. Features that are computed once
    and cached for training are often made this way.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    with torch.inference_mode():
        features = nn.Linear(4, 4)(torch.randn(8, 4))
    Run(model=nn.Linear(4, 1), data=[features], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    with torch.no_grad():
        features = nn.Linear(4, 4)(torch.randn(8, 4))
    Run(model=nn.Linear(4, 1), data=[features], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Compute the tensor under `torch.no_grad()`, or use a `.clone()` of it, made outside of inference mode.

    ## Source
    https://github.com/huggingface/trl/issues/2983; documentation of `torch.inference_mode`.
    """

    code = "SL304"
    title = "inference tensor used in training"

    @classmethod
    def of(cls, scene: Scene) -> Fault:
        """The fault for an error raised in the forward."""
        held = f": {listed(scene.inference)}" if scene.inference else ""
        user = f", by module {scene.module}" if scene.module else ""
        return cls.fault(
            f"a tensor made under torch.inference_mode() is used where gradients are recorded{user}{held}",
            where=scene.where,
            why="inference tensors have no version counter, so autograd cannot save them",
            fix="compute it under torch.no_grad() instead of torch.inference_mode(), or use a `.clone()` of it",
        )


class NoSecondDerivative(Check):
    """A second derivative was needed through a function that has only a first one.

    ## What it does
    Recognises torch's error about `@once_differentiable`, and names the functions so marked that the model's forward
    uses, or that are in the graphs of the tensors on the line.

    ## Why it is bad
    A gradient penalty differentiates a gradient. A custom `torch.autograd.Function` whose backward is not itself made
    of differentiable operations ends there, and the penalty cannot train what lies before it.

    ## Bad
    ```python
    from torch.autograd.function import once_differentiable

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.out(Square.apply(self.fc(x)))

    class Run(sl.Trainer):
        def loss(self, batch):
            x = batch.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.model(x).sum(), x, create_graph=True)
            return slope.square().sum(1).mean()

    Run(model=Critic(), data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 1, bias=False)

        def forward(self, x):
            return self.out(Square.apply(self.fc(x)))

    class Run(sl.Trainer):
        def loss(self, batch):
            x = batch.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.model(x).sum(), x, create_graph=True)
            return slope.square().sum(1).mean()

    Run(model=Critic(), data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Write the function's backward with differentiable torch operations and take `@once_differentiable` off, use
    torch's own operation in its place, or leave this part out of the penalty.

    ## Source
    https://github.com/pytorch/pytorch/issues/5261; "Double backward with custom functions" in torch's tutorials.
    """

    code = "SL305"
    title = "no second derivative"

    @classmethod
    def of(cls, scene: Scene) -> Fault:
        """The fault for an error raised by a backward pass."""
        marked = list(_once_differentiable(scene.model))
        met = once_differentiable_functions(scene.tensors().values())
        marked += [f"`{name}`" for name in met if not any(f"`{name}`" in known for known in marked)]
        return cls.fault(
            "a second derivative is needed through a function marked with @once_differentiable"
            + (f"; so marked: {', '.join(marked)}" if marked else ""),
            where=scene.where,
            why="a loss term differentiates a gradient (a penalty with create_graph=True), which this function does "
            "not allow",
            fix="write its backward with differentiable torch operations and take @once_differentiable off, or "
            "leave it out of what the penalty differentiates",
        )


class TensorWithoutGraph(Check):
    """A gradient was asked for of, or with respect to, a tensor that has no graph.

    ## What it does
    Recognises torch's errors about tensors that do not require grad, from `torch.autograd.grad`, `backward()` and
    `retain_grad()` in the user's own code, and names the tensors on that line that do not.

    ## Why it is bad
    The tensor was made under `no_grad`, detached, or never required grad: there is nothing to differentiate.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            x = batch.clone().requires_grad_()
            with torch.no_grad():
                score = self.model(x).square().sum()
            (slope,) = torch.autograd.grad(score, x, create_graph=True)
            return slope.square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            x = batch.clone().requires_grad_()
            score = self.model(x).square().sum()
            (slope,) = torch.autograd.grad(score, x, create_graph=True)
            return slope.square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Compute the differentiated value with grad mode on and without `detach()`; call `requires_grad_()` on an input
    *before* it is used.

    ## Source
    https://github.com/caogang/wgan-gp/issues/4; documentation of `torch.autograd.grad`.
    """

    code = "SL306"
    title = "gradient of a tensor without a graph"

    @classmethod
    def of(cls, scene: Scene) -> Fault:
        """The fault for an error raised on the line that asks for the gradient."""
        cut = [expr for expr, t in scene.tensors().items() if not t.requires_grad]
        return cls.fault(
            "a gradient is asked for of, or with respect to, a tensor that does not require grad"
            + (f": on this line {listed(cut)}" if cut else ""),
            where=scene.where,
            why="it was made under no_grad, detached, or `requires_grad_()` was not called before it was used",
            fix="compute it with grad mode on and without detach(); call `x.requires_grad_()` before `x` is used",
        )


class GradientOfNonScalar(Check):
    """A gradient was asked for of a tensor with several values, without saying how to sum them.

    ## What it does
    Recognises torch's error "grad can be implicitly created only for scalar outputs" from the user's own code, and
    shows the shapes of the tensors on that line. A loss term of this kind is SL403.

    ## Why it is bad
    A gradient belongs to one number.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            x = batch.clone().requires_grad_()
            score = self.model(x).square()
            (slope,) = torch.autograd.grad(score, x, create_graph=True)
            return slope.square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            x = batch.clone().requires_grad_()
            score = self.model(x).square()
            (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
            return slope.square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Sum first (`score.sum()`: each sample's score depends on its own input alone, so the sum keeps their gradients
    apart), or pass `grad_outputs=torch.ones_like(score)`.

    ## Source
    Documentation of `torch.autograd.grad`.
    """

    code = "SL307"
    title = "gradient of several values"

    @classmethod
    def of(cls, scene: Scene) -> Fault:
        """The fault for an error raised on the line that asks for the gradient."""
        several = [f"`{expr}` {list(t.shape)}" for expr, t in scene.tensors().items() if t.numel() != 1]
        return cls.fault(
            "a gradient is asked for of a tensor with several values"
            + (f"; on this line: {', '.join(several)}" if several else ""),
            where=scene.where,
            why="a gradient belongs to one number: how several are to be summed must be said",
            fix="sum first, `.sum()`, or pass `grad_outputs=torch.ones_like(...)`",
        )


def _once_differentiable(model: nn.Module) -> Iterator[str]:
    for cls in dict.fromkeys(type(module) for module in model.modules()):
        code, names = getattr(cls.forward, "__code__", None), getattr(cls.forward, "__globals__", {})
        for name in code.co_names if code is not None else ():
            function = names.get(name)
            if not (isinstance(function, type) and issubclass(function, Function)):
                continue
            if hasattr(function.backward, "__wrapped__"):
                yield f"`{name}` (in {cls.__name__}.forward)"
