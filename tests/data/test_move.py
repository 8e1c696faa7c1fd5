from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from safeloop.data.move import Mover, resolve_device
from safeloop.faults import FaultError

Pair = namedtuple("Pair", "image label")
META = torch.device("meta")


@dataclass(frozen=True)
class Sample:
    image: torch.Tensor
    name: str


@dataclass(slots=True)
class Slotted:
    image: torch.Tensor


class Movable:
    def __init__(self, x):
        self.x = x

    def to(self, device):
        return Movable(self.x.to(device))


class Opaque:
    def __init__(self, inner):
        self.inner = inner
        self.name = "mask"


class OpaqueSlots:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner


def x():
    return torch.zeros(2)


def fault(call):
    with pytest.raises(FaultError) as caught:
        call()
    return caught.value.fault


@pytest.mark.parametrize(
    "batch",
    [
        x(),
        (x(), x()),
        [x(), [x(), (x(),)]],
        {"a": x(), "b": {"c": (x(),)}},
        Pair(x(), x()),
        Sample(x(), "a"),
        Slotted(x()),
        OrderedDict(a=x()),
        MappingProxyType({"a": x()}),
        "text",
        None,
        [1, 2.5, "a", None, torch.float32],
        Opaque(x()),
        {x()},
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_a_batch_that_is_in_place_is_returned_itself(batch):
    assert Mover(torch.device("cpu"))(batch) is batch


@pytest.mark.parametrize(
    ("batch", "read"),
    [
        (x(), lambda b: b),
        ((x(), "a"), lambda b: b[0]),
        ([[x()]], lambda b: b[0][0]),
        ({"a": {"b": x()}}, lambda b: b["a"]["b"]),
        (Pair(x(), 1), lambda b: b.image),
        (Sample(x(), "a"), lambda b: b.image),
        (Slotted(x()), lambda b: b.image),
        (OrderedDict(a=x()), lambda b: b["a"]),
        (Movable(x()), lambda b: b.x),
        (pack_sequence([x(), x()]), lambda b: b.data),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_tensor_moves_in_a_new_container_of_the_same_type(batch, read):
    moved = Mover(META)(batch)
    assert type(moved) is type(batch)
    assert read(moved).device == META
    assert read(batch).device.type == "cpu"


def test_a_default_dict_keeps_its_factory():
    moved = Mover(META)(defaultdict(list, a=x()))
    assert moved["a"].device == META
    assert moved["new"] == []


def test_what_is_in_place_stays_the_same_object_beside_what_moves():
    label, image = torch.zeros(1, device=META), x()
    moved = Mover(META)({"image": image, "label": label, "text": ["a"]})
    assert moved["label"] is label


def test_an_object_that_moves_in_place_stays_the_same_object():
    class InPlace(Movable):
        def to(self, device):
            self.x = self.x.to(device)

    batch = InPlace(x())
    assert Mover(META)([batch])[0] is batch
    assert batch.x.device == META


def test_a_packed_sequence_moves_by_its_own_method():
    assert isinstance(Mover(META)([pack_sequence([x()])])[0], PackedSequence)


@pytest.mark.parametrize(
    ("batch", "path", "kind"),
    [
        ({"mask": Opaque(x())}, 'batch["mask"].inner', "Opaque"),
        ([0, OpaqueSlots({"a": [x()]})], 'batch[1].inner["a"][0]', "OpaqueSlots"),
        (Pair(Opaque(x()), 1), "batch.image.inner", "Opaque"),
        ({3: {x()}}, "batch[3][0]", "set"),
        ({"m": MappingProxyType({"a": x()})}, 'batch["m"]', "mappingproxy"),
    ],
)
def test_an_object_that_holds_tensors_and_cannot_move_is_named_with_its_path_and_type(batch, path, kind):
    found = fault(lambda: Mover(META)(batch))
    assert found.code == "SL852"
    assert path in found.what
    assert kind in found.what


def test_a_tensor_without_values_cannot_move_to_a_real_device():
    found = fault(lambda: Mover(torch.device("cpu"))([x(), {"y": torch.zeros(1, device="meta")}]))
    assert found.code == "SL852"
    assert 'batch[1]["y"]' in found.what


def test_an_object_that_refers_to_itself_is_looked_at_once():
    loop = Opaque(None)
    loop.inner = [loop]
    assert Mover(META)(loop) is loop


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_a_device_that_is_there_is_found(name):
    if name == "auto" and torch.cuda.is_available():
        assert resolve_device(name).type == "cuda"
    else:
        assert resolve_device(name) == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "banana", "cuda:x", "meta"])
def test_a_device_that_is_not_there_is_refused(name):
    found = fault(lambda: resolve_device(name))
    assert found.code == "SL853"
    assert name in found.what


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none_with_the_reason():
    found = fault(lambda: resolve_device("cuda"))
    assert found.code == "SL853"
    assert found.why
    assert "run.device" in found.fix


@pytest.mark.cuda
def test_batches_move_to_cuda():
    device = resolve_device("cuda")
    moved = Mover(torch.device("cuda"))((x(), x()))
    assert {tensor.device for tensor in moved} == {device}
    assert Mover(device)(moved) is moved
