"""An adapter as data, copies of the model, and a model that is as before when the adapters are gone."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

import lorakit as lk
from tests.contracts.kinds import KINDS
from tests.contracts.pairs import SETTINGS, Case, close, name_of, pairs, randomise


@pairs()
def test_extract_and_attach_are_inverses(setting: str, kind: str) -> None:
    case = Case(kind)
    case.attach(setting)
    y = case.model(case.x)
    state = lk.extract(case.model, "a")
    assert all(not t.requires_grad for group in state.tensors.values() for t in group.values())
    fresh = copy.deepcopy(case.untouched)
    report = lk.attach(fresh, state, name="other", trainable=True)
    assert torch.equal(fresh(case.x), y)
    assert report.parameters == state.numel
    assert report.trainable == sum(p.numel() for p in case.trained("a").values())
    again = lk.extract(fresh, "other")
    assert again.spec == state.spec
    for path, group in state.tensors.items():
        for name, tensor in group.items():
            assert torch.equal(again.tensors[path][name], tensor)
    randomise((t for group in state.tensors.values() for t in group.values()), case.draw)
    assert torch.equal(fresh(case.x), y), "a state is data: changing it changes no model"
    assert torch.equal(case.model(case.x), y)


def test_a_state_is_attached_for_inference() -> None:
    case = Case("linear")
    case.attach("lora")
    report = lk.attach(case.stock, lk.extract(case.model, "a"), name="a")
    assert report.trainable == 0
    assert lk.trainable(case.stock) == {}


@pairs()
def test_shapes_are_those_of_the_tensors(setting: str, kind: str) -> None:
    case = Case(kind)
    case.attach(setting, random=False)
    state = lk.extract(case.model, "a")
    ((path, group),) = state.tensors.items()
    want = state.spec.methods[path].shapes(state.spec.shapes[path])
    assert {name: tuple(t.shape) for name, t in group.items()} == want
    shared = state.spec.methods[path].shared_shapes()
    assert {name: tuple(t.shape) for name, t in state.shared.items()} == shared
    assert {**want, **shared}.keys() == case.parameters("a").keys()
    assert state.numel == sum(p.numel() for p in case.parameters("a").values())


@pairs()
def test_shapes_can_be_counted_on_the_meta_device(setting: str, kind: str) -> None:
    method = SETTINGS[setting].method
    names = [name_of(KINDS[kind], setting)]
    with torch.device("meta"):
        model = KINDS[kind].build()
    (counted,) = lk.find(model, names, adapts=method.adapts)
    (real,) = lk.find(KINDS[kind].build(), names, adapts=method.adapts)
    assert counted.shape == real.shape
    here = method.for_targets({real.path: real.shape}).for_path(real.path)
    draw = torch.Generator().manual_seed(0)
    shared = here.start_shared(draw)
    assert {k: tuple(t.shape) for k, t in shared.items()} == here.shared_shapes()
    started = here.start(real, draw, shared)
    assert {k: tuple(t.shape) for k, t in started.items()} == here.shapes(counted.shape)
    assert all(torch.promote_types(t.dtype, torch.float32) is t.dtype for t in {**started, **shared}.values())


def by_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle])
@pairs()
def test_copies_are_equal_and_independent(
    setting: str, kind: str, copied: Callable[[nn.Module], nn.Module]
) -> None:
    case = Case(kind)
    case.attach(setting)
    y = case.model(case.x)
    with lk.use(case.model, None):
        base = case.model(case.x)
        twin = copied(case.model)  # a copy is in nobody's `use` block
    assert torch.equal(twin(case.x), y)
    assert [type(m) for m in twin.modules()] == [type(m) for m in case.model.modules()]
    with lk.use(case.model, None):
        assert torch.equal(twin(case.x), y)
    randomise(case.parameters("a", twin).values(), case.draw)
    changed = twin(case.x)
    assert not torch.equal(changed, y)
    assert torch.equal(case.model(case.x), y)
    lk.set_active(case.model, None)
    assert torch.equal(twin(case.x), changed)
    lk.detach(case.model)
    assert torch.equal(twin(case.x), changed)
    lk.detach(twin)
    close(twin(case.x), base, 1e-15)
    assert [type(m) for m in twin.modules()] == [type(m) for m in case.model.modules()]


@pairs(kinds=("linear", "embedding", "conv2d-groups", "mha-in", "mha-out", "experts"))
def test_the_whole_model_can_be_saved_by_torch(setting: str, kind: str) -> None:
    case = Case(kind)
    case.attach(setting)
    file = io.BytesIO()
    torch.save(case.model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(case.x), case.model(case.x))
    if case.mergeable({"a": 1.0}):
        lk.merge(twin)
    close(twin(case.x), case.expected({"a": 1.0}), 1e-12)


def test_a_hook_added_after_unpickling_does_not_take_the_place_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In another process torch counts its hooks from zero again, and may hand out the number of ours."""
    case = Case("linear")
    case.attach("lora")
    y = case.model(case.x)
    (hook,) = case.model.layer._forward_hooks
    blob = pickle.dumps(case.model)
    monkeypatch.setattr(RemovableHandle, "next_id", hook)
    twin = pickle.loads(blob)
    seen: list[int] = []
    twin.layer.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(twin(case.x), y)
    assert seen == [1]


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that attaching could leave a trace in."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[path] = (
            id(module),
            type(module),
            list(module.__dict__),
            {k: list(v) for k, v in module.__dict__.items() if k.endswith("hooks") or "_hooks_" in k},
            {k: (id(p), None if p is None else p.requires_grad) for k, p in module._parameters.items()},
            {k: id(b) for k, b in module._buffers.items()},
            list(module._modules),
            module.training,
        )
    return found


def test_anatomy_sees_hooks_and_attributes() -> None:
    model = KINDS["linear"].build()
    before = anatomy(model)
    handle = model.layer.register_forward_hook(lambda *_: None, always_call=True)
    assert anatomy(model) != before
    handle.remove()
    assert anatomy(model) == before
    model.layer.note = 1
    assert anatomy(model) != before


@pairs()
def test_detaching_leaves_nothing_behind(setting: str, kind: str) -> None:
    case = Case(kind)
    for i, p in enumerate(case.model.parameters()):
        p.requires_grad_(i % 2 == 0 and p.is_floating_point())
    before = anatomy(case.model)
    values = {k: v.clone() for k, v in case.model.state_dict().items()}
    with torch.no_grad():
        y = case.model(case.x)
    case.attach(setting, "a")
    case.attach_partner(setting, "b")
    case.model(case.x).sum().backward()
    if weights := case.mergeable({"a": 1.0, "b": 0.5}):
        lk.merge(case.model, weights)
    lk.detach(case.model, "a")
    assert anatomy(case.model) != before
    lk.detach(case.model, "b")
    assert anatomy(case.model) == before
    after = case.model.state_dict()
    assert list(after) == list(values)
    assert all(torch.equal(after[k], v) for k, v in values.items())
    with torch.no_grad():
        assert torch.equal(case.model(case.x), y)
    with pytest.raises(lk.LorakitError):
        lk.report(case.model)


@pairs(kinds=("linear", "mha-in", "mha-out", "conv2d", "experts", "linear-slice", "mha-slice"))
def test_detaching_all_at_once_while_merged(setting: str, kind: str) -> None:
    case = Case(kind)
    before = anatomy(case.model)
    values = {k: v.clone() for k, v in case.model.state_dict().items()}
    case.attach(setting, "a")
    case.attach_partner(setting, "b")
    if weights := case.mergeable({"a": 1.0, "b": 0.5}):
        lk.merge(case.model, weights)
    lk.detach(case.model)
    assert anatomy(case.model) == before
    assert all(torch.equal(v, values[k]) for k, v in case.model.state_dict().items())


@pairs(kinds=("linear", "mha-in", "mha-out", "conv2d", "embedding", "experts"))
def test_base_names_and_classes_do_not_change_while_attached(setting: str, kind: str) -> None:
    case = Case(kind)
    names = list(case.model.state_dict())
    classes = [type(m) for m in case.model.modules()]
    case.attach(setting)
    assert [n for n in case.model.state_dict() if ".lorakit." not in n] == names
    own = [m for n, m in case.model.named_modules() if "lorakit" not in n.split(".")]
    assert all(isinstance(m, c) for m, c in zip(own, classes, strict=True))
    assert [type(m).__name__ for m in own] == [c.__name__ for c in classes]
