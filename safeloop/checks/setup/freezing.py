"""Freezing that freezes nothing: an attribute that looks like `requires_grad` and is not it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import lru_cache

from torch import nn

from safeloop.checks.check import Check
from safeloop.checks.setup.stores import read_through_self, stored_by
from safeloop.checks.views import SetupView
from safeloop.checks.wording import counted, listed
from safeloop.faults import Fault

_NEAR = 0.85
"""similarity of `requires_grad` with a misspelling: `required_grad` has 0.87, `input_requires_grad` 0.83"""


class FreezeWithoutEffect(Check):
    """A module or parameter was meant to be frozen by an attribute that nothing reads.

    ## What it does
    Looks for `module.requires_grad = False` (a module has no such attribute, only the method `requires_grad_`), for
    misspelled `requires_grad` on parameters and modules (`require_grad`, `required_grad`, `requires_gard`), for the
    method overwritten (`p.requires_grad_ = False`) and for `trainable = False` set from outside, where the parameters
    concerned do train. An attribute that the module's own class reads is a setting of that class and left alone.
    `module.requires_grad = True` on a module whose parameters are all frozen is the same mistake the other way round.
    Looks before the first step, and a few times later for what a callback or a phase has set meanwhile.

    ## Why it is bad
    Python stores the attribute without a word, and the parameters go on training: a pretrained backbone is changed
    from the first step.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad = False
    Run(model=model, data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    Run(model=model, data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Call `module.requires_grad_(False)` for a module, write `parameter.requires_grad = False` for a parameter, or list
    the names under `frozen:`.

    ## Source
    https://github.com/CSCYQJ/MICCAI23-ProtoContra-SFDA/issues/18;
    https://github.com/udacity/deep-learning-v2-pytorch/issues/12.
    """

    code = "SL210"
    title = "freezing without effect"
    severity = "warning"

    @classmethod
    def find(cls, view: SetupView, *, is_late: bool = False) -> Iterator[Fault]:
        """One fault for each module, and one for each attribute that parameters carry.

        Once the loop runs, what a class of the model stores by itself may be a state, and is left out.
        """
        for path, module in view.model.named_modules():
            for attribute, value in vars(module).items():
                if not _is_switch(attribute, value) or _is_setting(view.model, module, attribute):
                    continue
                if not is_late or attribute not in stored_by(type(module)):
                    yield from cls._of_module(view, path, module, attribute, bool(value))
        yield from cls._of_parameters(view)

    @classmethod
    def _of_module(cls, view: SetupView, path: str, module: nn.Module, attribute: str, value: bool) -> Iterator[Fault]:
        names = [f"{path}.{name}" if path else name for name, _ in module.named_parameters()]
        training = _training(view)
        wrong = [name for name in names if training.get(name, False)]
        if value:
            wrong = names if names and not wrong and attribute == "requires_grad" else []
        elif attribute == "trainable":
            wrong = wrong if all(name in view.ownership.owner_of for name in wrong) else []
        if wrong:
            shown = path or type(module).__name__
            yield cls.fault(
                f"`{shown}.{attribute} = {value}`, yet {counted(len(wrong), 'parameter')} of it "
                f"{'do not train' if value else 'train'}: {listed(wrong)}",
                where=f"module `{shown}` ({type(module).__name__})",
                why=f"a module has no attribute `{attribute}`: Python stores it, and nothing reads it",
                fix=f"call `{shown}.requires_grad_({value})`"
                + ("" if value else ", or list its parameters under `frozen:`; then take the attribute away"),
                names=(path or "(root)", *wrong),
            )

    @classmethod
    def _of_parameters(cls, view: SetupView) -> Iterator[Fault]:
        training = _training(view)
        marked: dict[str, list[str]] = {}
        for name, parameter in view.model.named_parameters():
            for attribute, value in vars(parameter).items():
                if _is_switch(attribute, value) and not value and training.get(name, False):
                    is_owned = name in view.ownership.owner_of
                    if attribute != "trainable" or is_owned:
                        marked.setdefault(attribute, []).append(name)
        for attribute, names in marked.items():
            yield cls.fault(
                f"`{attribute} = False` was set on {counted(len(names), 'parameter')} that train: {listed(names)}",
                where=f"attribute `{attribute}` of {listed(names)}",
                why=f"a tensor has no switch `{attribute}`: Python stores it, and nothing reads it",
                fix="write `requires_grad = False`, or list the names under `frozen:`",
                names=names,
            )


def _training(view: SetupView) -> Mapping[str, bool]:
    """Every name of each parameter -> whether it trains."""
    frozen = {parameter for name, parameter in view.model.named_parameters() if name in view.ownership.frozen}
    return {
        name: parameter.requires_grad and parameter not in frozen
        for name, parameter in view.model.named_parameters(remove_duplicate=False)
    }


def _is_switch(attribute: str, value: object) -> bool:
    """Whether the attribute is `requires_grad`, a misspelling of it, or the Keras word for it."""
    if not isinstance(value, bool | int) or value not in (0, 1):
        return False
    if attribute == "trainable":
        return not value
    return _is_like_requires_grad(attribute)


@lru_cache(maxsize=4096)
def _is_like_requires_grad(attribute: str) -> bool:
    plain = attribute.lower().replace("_", "")
    return difflib.SequenceMatcher(None, plain, "requiresgrad").ratio() >= _NEAR


def _is_setting(model: nn.Module, module: nn.Module, attribute: str) -> bool:
    """Whether code of the model knows the attribute: a class reads it, or (other than `requires_grad`) stores it."""
    cls = type(module)
    if (hasattr(cls, attribute) and attribute != "requires_grad_") or attribute in read_through_self(model):
        return True
    return attribute != "requires_grad" and attribute in stored_by(cls)
