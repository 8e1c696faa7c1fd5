"""What a Hessian-vector product costs: against one gradient, and side by side with torch.func.

python benchmarks/products.py [--rounds 30] [--models mlp convnet transformer]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import MODELS, Contender, Work, measure, ratio, start, verdict

from safeloop.autograd import HessianProducts, hvp

BAR = 4.0


def compare(work: Work, rounds: int) -> str:
    """Ratios to a forward and a gradient; everything is timed with its forward.

    In eval mode, as torch.func refuses writes to running statistics, and with attention written out, as the flash
    kernel has no second derivative: the same for all.
    """
    work.model.eval()
    named = {name: p for name, p in work.model.named_parameters() if p.requires_grad}
    vector = {name: torch.randn_like(p) for name, p in named.items()}

    def loss() -> Tensor:
        return torch.stack(list(work.terms())).sum()

    def gradient() -> object:
        return torch.autograd.grad(loss(), list(named.values()))

    def of_values(values: dict[str, Tensor]) -> Tensor:
        return torch.stack(list(functional_call(_Whole(work), {f"model.{n}": v for n, v in values.items()}, ()))).sum()

    values = {name: p.detach() for name, p in named.items()}

    def reverse() -> object:
        return vjp(grad(of_values), values)[1](vector)

    def forward_over_reverse() -> object:
        return jvp(grad(of_values), (values,), (vector,))

    with HessianProducts(loss, named) as again:
        along = [vector[name] for name in again.names]
        contenders = {
            "gradient": gradient,
            "again": gradient,
            "hvp": lambda: hvp(loss, named, vector),
            "further": lambda: again(along),
            "func": reverse,
            **({"forward": forward_over_reverse} if _runs(forward_over_reverse) else {}),
        }
        times = measure({n: Contender(lambda: None, lambda _, run=run: run()) for n, run in contenders.items()}, rounds)
    product = ratio(times, "hvp", "gradient")
    columns = [str(ratio(times, "again", "gradient")), str(product), f"<= {BAR:g}: {verdict(product, BAR)}"]
    columns += [str(ratio(times, name, "gradient")) for name in ("further", "func")]
    columns.append(str(ratio(times, "forward", "gradient")) if "forward" in times else "no forward derivative")
    return "  ".join(f"{column:20}" for column in columns) + f"  {largest_difference(work, loss, named, vector):.1e}"


class _Whole(torch.nn.Module):
    """A module whose call gives all terms, for functional_call."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.model = work.model
        self._terms = work.terms

    def forward(self) -> list[Tensor]:
        """The terms."""
        return self._terms()


def _runs(call: Callable[[], object]) -> bool:
    """Whether torch has every derivative that the call needs."""
    try:
        call()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def largest_difference(
    work: Work, loss: Callable[[], Tensor], named: dict[str, Tensor], vector: dict[str, Tensor]
) -> float:
    """How far the product is from torch.func's, relative to its norm."""
    whole = _Whole(work)

    def of_values(values: dict[str, Tensor]) -> Tensor:
        return torch.stack(list(functional_call(whole, {f"model.{n}": v for n, v in values.items()}, ()))).sum()

    (expected,) = vjp(grad(of_values), {n: p.detach() for n, p in named.items()})[1](vector)
    found = hvp(loss, named, vector)
    off = torch.stack([(found[n] - expected[n]).norm() for n in named]).norm()
    return float(off / torch.stack([expected[n].norm() for n in named]).norm())


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    start()
    heads = ("gradient again (A/A)", "hvp", "bar", "further product", "func vjp of grad", "func jvp of grad")
    print(f"{'time / gradient':16}  " + "  ".join(f"{head:20}" for head in heads) + "  rel. difference")
    for name in args.models:
        with sdpa_kernel(SDPBackend.MATH):
            print(f"{name:16}", compare(MODELS[name](1), args.rounds), sep="  ", flush=True)


if __name__ == "__main__":
    main()
