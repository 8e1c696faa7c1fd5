"""What the journal hears on the tape: backward passes, zeroing, clipping, scaling, and who touches `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.amp import grad_scaler
from torch.nn.utils import clip_grad

from safeloop.audit.journal import Journal, is_zero
from safeloop.autograd.lineage import Mark
from safeloop.autograd.numbers import number_of
from safeloop.autograd.survey import Survey, leaves_below, survey
from safeloop.autograd.tape import Call, Listener
from safeloop.checks.events import Backward, Clip, Held, Stranger

_CLIPS = {"_clip_grads_with_norm_": "max_norm", "clip_grad_value_": "clip_value"}
_NODES_OF_A_CALL = 4
_CLAMPS = ("clamp", "clamp_", "_foreach_clamp_min_")
_ZEROES = ("zero_", "_foreach_zero_")
_WRITES = (
    *("mul_", "__imul__", "div_", "__itruediv__", "add_", "__iadd__", "sub_", "__isub__", "copy_", "fill_", "clamp_"),
    *("clip_", "lerp_", "normal_", "masked_fill_", "nan_to_num_", "sign_", "addcmul_", "__setitem__"),
    *("_foreach_mul_", "_foreach_div_", "_foreach_add_", "_foreach_sub_", "_foreach_copy_", "_foreach_clamp_"),
)
_PRODUCTS = (
    *("mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply", "multiply_"),
    *("div", "div_", "__truediv__", "__itruediv__", "true_divide", "divide"),
)


class Hearing:
    """Turns calls of torch functions into events.

    Args:
        journal: where they go.
        surveyed: is called with each backward pass about to run and the walk over its graph.
        found_scaler: is called with each gradient scaler that scales a loss.
    """

    def __init__(
        self,
        journal: Journal,
        surveyed: Callable[[Backward, list[Tensor], Survey, Call], None],
        found_scaler: Callable[[Any], None],
    ) -> None:
        self._journal = journal
        self._surveyed = surveyed
        self._found_scaler = found_scaler
        self._has_passed = False
        self._memory: dict[int, str] = {}
        """where the gradients lie that somebody has asked for -> the parameter"""

    @property
    def listeners(self) -> dict[str, list[Listener]]:
        """Which calls it wants to hear."""
        hear: dict[str, list[Listener]] = {
            "backward": [self._backward],
            ".grad=": [self._grad_set],
            ".grad": [self._grad_read],
        }
        for listener, names in (
            (self._zeroed, _ZEROES),
            (self._written, _WRITES),
            (self._clipped, _CLAMPS),
            (self._found_nothing, ("tensor",)),
            (self._multiplied, _PRODUCTS),
        ):
            for name in names:
                hear.setdefault(name, []).append(listener)
        return hear

    def _backward(self, call: Call) -> None:
        journal = self._journal
        self._has_passed = True
        first = call.args[0] if call.args else call.kwargs.get("tensors")
        roots = [first] if isinstance(first, Tensor) else [t for t in first or () if isinstance(t, Tensor)]
        journal.flush()
        found = survey(*roots, since=journal.since)
        for _, older in found.old:
            found.leaves |= leaves_below(older)
        only = call.kwargs.get("inputs")
        if only is not None:
            wanted = {id(t) for t in ([only] if isinstance(only, Tensor) else only)}
            found.leaves = {key: leaf for key, leaf in found.leaves.items() if key in wanted}
        names = frozenset(journal.names[key] for key in found.leaves if key in journal.names)
        self._look_at_held(names)
        marks = [mark for root in roots for mark in call.tape.marks_of(root)]
        is_weighted = len(roots) != 1 or _given(call, 1, "gradient") is not None or "grad_tensors" in call.kwargs
        event = Backward(
            call.site,
            journal.iteration,
            next(journal.numbers),
            names,
            found.is_complete,
            any(key not in journal.names or _is_hooked(leaf) for key, leaf in found.leaves.items()),
            is_scaled=any(mark.kind == "scaled" for mark in marks),
            factor=float("nan") if is_weighted else _factor_of(roots[0], marks),
            makes_graph=bool(_given(call, 3, "create_graph")),
            root=_number(roots[0]) if roots else -1,
            visited=frozenset(found.numbers),
            counts=tuple((mark.site, int(mark.name)) for mark in marks if mark.kind == "mean"),
            used_at={journal.names[key]: number for key, number in found.used_at.items() if key in journal.names},
        )
        self._surveyed(event, roots, found, call)
        journal.state.strangers = list(_strangers(found, call, journal.names))
        journal.record(event)
        journal.state.strangers = []

    def _look_at_held(self, names: Iterable[str]) -> None:
        """See whether `.grad` was emptied in a way that nobody has heard, such as a hook inside a backward pass."""
        for name in names:
            gradient = self._journal.parameters[name].grad
            held = self._journal.state.held.get(name)
            if gradient is None:
                if held is None or held.passes or held.is_manual:
                    self._journal.reset(name)
            elif held is not None and (held.used or held.is_manual) and is_zero(gradient):
                self._journal.reset(name)

    def _grad_set(self, call: Call) -> None:
        name = self._journal.names.get(id(call.args[0]))
        if name is not None:
            self._journal.note("zero" if call.args[1] is None else "write", call.site, [name])

    def _grad_read(self, call: Call) -> None:
        if not self._has_passed and not call.is_direct:  # `zero_grad` looks at each
            self._journal.state.early_zeroing.add(call.site)
        if not isinstance(call.out, Tensor):
            return
        name = self._journal.names.get(id(call.args[0]))
        if name is None:
            if call.is_direct:  # the gradient of an input or an activation: what the pass was for
                self._journal.note("read", call.site, [""])
            return
        if pointer := _pointer(call.out):
            self._memory[pointer] = name
        if call.is_direct:
            self._journal.note("read", call.site, [name])

    def _zeroed(self, call: Call) -> None:
        if names := self._gradients_in(call):
            self._journal.note("zero", call.site, names)

    def _written(self, call: Call) -> None:
        if call.is_direct and (names := self._gradients_in(call)):
            self._journal.note("write", call.site, names)

    def _gradients_in(self, call: Call) -> list[str]:
        """The parameters whose gradients the first argument holds."""
        return self._held_in(call.args[0] if call.args else None)

    def _held_in(self, value: Any) -> list[str]:
        """The parameters whose gradients these are."""
        if not self._memory:
            return []
        names = []
        for tensor in (value,) if isinstance(value, Tensor) else value if isinstance(value, (list, tuple)) else ():
            pointer = _pointer(tensor)
            name = self._memory.get(pointer) if pointer else None
            if name is None:
                continue
            gradient = self._journal.parameters[name].grad
            if gradient is not None and _pointer(gradient) == pointer:
                names.append(name)
        return names

    def _clipped(self, call: Call) -> None:
        caller = call.caller
        if caller is None or caller.f_code.co_filename != clip_grad.__file__:
            return
        key = _CLIPS.get(caller.f_code.co_name)
        if key is None:
            return
        values = caller.f_locals
        given = values.get("parameters", ())
        tensors = [given] if isinstance(given, Tensor) else list(given) if isinstance(given, (list, tuple)) else []
        known = self._journal.names
        names = frozenset(known[id(t)] for t in tensors if id(t) in known)
        names = names or frozenset(self._gradients_in(call))
        names = names or frozenset(self._held_in(values.get("grads")))  # what it was given is a generator, and used up
        limit = float(values.get(key, float("inf")))
        self._journal.flush()
        held = [self._journal.state.held.get(name, Held()) for name in names]
        gradients = [self._journal.parameters[name].grad for name in names]
        is_known = any(h.passes or h.is_manual for h in held)
        are_zero = not is_known and all(is_zero(gradient) for gradient in gradients if gradient is not None)
        function = caller.f_code.co_name
        coefficient = None
        if function == "_clip_grads_with_norm_":  # torch calls it for the user, mostly
            function = "clip_grad_norm_"
            coefficient = call.out if isinstance(call.out, Tensor) else None
        now = self._journal.iteration
        event = Clip(call.site, now, function, limit, names, are_zero, coefficient=coefficient)
        self._journal.record(event)

    def _found_nothing(self, call: Call) -> None:
        """`clip_grad_norm_` found no gradient at all: it then makes the norm 0 from nothing."""
        frame = call.caller
        while frame is not None and frame.f_code.co_filename == clip_grad.__file__:
            if frame.f_code.co_name == "clip_grad_norm_" and "parameters" in frame.f_locals:
                values = frame.f_locals
                given = values["parameters"]
                tensors = [given] if isinstance(given, Tensor) else list(given)
                names = frozenset(self._journal.names[id(t)] for t in tensors if id(t) in self._journal.names)
                now, unknown = self._journal.iteration, len(tensors) - len(names)
                limit = float(values.get("max_norm", float("inf")))
                event = Clip(call.site, now, "clip_grad_norm_", limit, names, is_empty=True, unknown=unknown)
                self._journal.record(event)
                return
            frame = frame.f_back

    def _multiplied(self, call: Call) -> None:
        out, tape = call.out, call.tape
        if not isinstance(out, Tensor) or out.dim() or not out.requires_grad or len(call.args) < 2:
            return
        one, other = call.args[:2]
        if not isinstance(one, Tensor) or one.dim():
            one, other = other, one
        before = _last_factor(one, tape.marks_of(one)) if isinstance(one, Tensor) and one is not out else None
        if one is out:  # in place: the node before is the one below
            below = out.grad_fn.next_functions[0][0] if out.grad_fn is not None else None
            number = None if below is None else number_of(below)
            before = _last_factor(None, tape.marks_of(out), number)
        caller = call.caller
        if caller is not None and caller.f_code.co_filename == grad_scaler.__file__:
            tape.mark(out, _mark("scaled", call.name, call, out))
            if before is not None:
                tape.mark(out, _mark("factor", repr(before), call, out))
            if (scaler := caller.f_locals.get("self")) is not None:
                self._found_scaler(scaler)
            return
        factor = float("nan")
        if isinstance(other, (int, float)) and not (other == 0 and "div" in call.name):
            factor = 1 / other if "div" in call.name else float(other)
        tape.mark(out, _mark("factor", repr(factor * (1.0 if before is None else before)), call, out))


def _given(call: Call, place: int, name: str) -> Any:
    """An argument of `Tensor.backward` or `torch.autograd.backward`, which have the same order."""
    return call.args[place] if len(call.args) > place else call.kwargs.get(name)


def _strangers(found: Survey, call: Call, names: Mapping[int, str]) -> Iterator[Stranger]:
    """The leaves that a pass fills and that nobody has named, with the line that used each first."""
    for key, leaf in found.leaves.items():
        if key in names:
            continue
        low, high = found.used_at.get(key, (-1, -1))
        # what one torch function makes in several nodes has an origin at its last one
        origins = (call.tape.origins.get(number) for number in range(low, high + _NODES_OF_A_CALL))
        origin = next(filter(None, origins), None) if low >= 0 else None
        yield Stranger(leaf, None if origin is None else origin.site, high)


def _is_hooked(leaf: Tensor) -> bool:
    """Whether a hook of the user's sees the gradient of a leaf."""
    return bool(leaf._backward_hooks) or bool(getattr(leaf, "_post_accumulate_grad_hooks", None))


def _number(tensor: Tensor) -> int:
    return -1 if tensor.grad_fn is None else number_of(tensor.grad_fn)


def _pointer(tensor: Tensor) -> int:
    """Where a tensor's values lie; 0 for one that does not say."""
    try:
        return int((tensor._values() if tensor.is_sparse else tensor).data_ptr())
    except (RuntimeError, AttributeError):
        return 0


def _mark(kind: str, name: str, call: Call, out: Tensor) -> Mark:
    return Mark(kind, name, "", call.site, call.tape.module, 0, _number(out))


def _last_factor(tensor: Tensor | None, marks: Iterable[Mark], number: int | None = None) -> float | None:
    """The factor of a product that a tensor is the direct result of; None where it is no product."""
    number = _number(tensor) if tensor is not None else number
    factors = [mark.name for mark in marks if mark.kind == "factor" and mark.node == number]
    return float(factors[-1]) if factors else None


def _factor_of(root: Tensor, marks: list[Mark]) -> float | None:
    """The number that a loss was multiplied by; NaN for one that nobody knows; None for none."""
    if not any(mark.kind == "factor" for mark in marks):
        return None
    factor = _last_factor(root, marks)
    return float("nan") if factor is None else factor
