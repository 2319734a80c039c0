from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from featherweight.data import Batch, batches, check, device_of
from featherweight.errors import UsageError

x, y = torch.arange(10.0).reshape(5, 2), torch.arange(5)
packed = pack_sequence([torch.zeros(3, 2), torch.ones(1, 2)])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(x, y, strict=True))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(TensorDataset(x, y), id="dataset"),
        pytest.param(Stream(), id="iterable-dataset"),
        pytest.param(DataLoader(TensorDataset(x, y), batch_size=2), id="loader"),
        pytest.param(zip(x.split(2), y.split(2), strict=True), id="iterator"),
    ],
)
def test_labelled_data_of_every_form_give_the_same_batches(data):
    found = batches(data, batch_size=2)
    assert [b.size for b in found] == [2, 2, 1]
    assert torch.equal(torch.cat([b.args[0] for b in found]), x)
    assert torch.equal(torch.cat([b.target for b in found]), y)
    assert all(len(b.args) == 1 and not b.kwargs for b in found)


def test_a_tensor_is_cut_into_unlabelled_batches():
    found = batches(x, batch_size=2)
    assert [b.size for b in found] == [2, 2, 1]
    assert torch.equal(torch.cat([b.args[0] for b in found]), x)
    assert all(b.target is None for b in found)


@pytest.mark.parametrize(
    ("item", "args", "kwargs", "target", "size"),
    [
        pytest.param(x, 1, set(), False, 5, id="tensor"),
        pytest.param((x,), 1, set(), False, 5, id="tuple-of-one"),
        pytest.param([x, y], 1, set(), True, 5, id="pair"),
        pytest.param((x, x, y), 2, set(), True, 5, id="two-inputs"),
        pytest.param({"a": x, "labels": y}, 0, {"a"}, True, 5, id="dict"),
        pytest.param({"flag": True, "a": x}, 0, {"flag", "a"}, False, 5, id="dict-with-a-flag-first"),
        pytest.param(UserDict(a=x), 0, {"a"}, False, 5, id="mapping"),
        pytest.param(([x[0], x[1], x[2]], ["t"] * 3), 1, set(), True, 3, id="list-of-images"),
        pytest.param((packed, y), 1, set(), True, 2, id="packed-and-target"),
        pytest.param(packed, 1, set(), False, 2, id="packed"),
        pytest.param(torch.tensor(3.0), 1, set(), False, 1, id="scalar"),
        pytest.param(Batch((x,), {"k": 1}, y), 1, {"k"}, True, 5, id="batch"),
    ],
)
def test_a_batch_of_each_kind(item, args, kwargs, target, size):
    (found,) = batches([item])
    assert (len(found.args), set(found.kwargs), found.target is not None, found.size) == (args, kwargs, target, size)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param([], id="empty-list"),
        pytest.param(torch.zeros(0, 3), id="empty-tensor"),
        pytest.param(torch.tensor(1.0), id="scalar-tensor"),
        pytest.param([torch.zeros(0, 3)], id="empty-batch"),
        pytest.param(TensorDataset(torch.zeros(0, 3)), id="empty-dataset"),
        pytest.param([Batch((), {})], id="batch-of-nothing"),
    ],
)
def test_data_without_a_sample_are_refused(data):
    with pytest.raises(UsageError, match="hold no sample"):
        batches(data)


@pytest.mark.parametrize(
    ("data", "got"),
    [
        pytest.param(3, "int", id="number"),
        pytest.param("calibration", "str", id="string"),
        pytest.param(b"calibration", "bytes", id="bytes"),
        pytest.param({"a": x}, "dict", id="dict"),
        pytest.param(Batch((x,), {}), "Batch", id="batch"),
        pytest.param(nn.Linear(2, 2), "Linear", id="module"),
        pytest.param(["calibration"], "str", id="list-of-strings"),
        pytest.param([()], "tuple", id="empty-tuple"),
        pytest.param([{"labels": y}], "dict", id="labels-alone"),
        pytest.param(x.numpy(), "ndarray", id="numpy"),
    ],
)
def test_data_of_a_wrong_type_are_refused_by_name(data, got):
    with pytest.raises(UsageError, match=f"got {got}$"):
        batches(data)


def test_moving_keeps_the_structure():
    pair = namedtuple("pair", "a b")
    batch = Batch((x, [x, (x, "s")], pair(x, 1), packed), {"d": {"e": x}, "n": None}, y)
    moved = batch.to(torch.device("meta"))
    assert type(moved.args[1]) is list
    assert type(moved.args[1][1]) is tuple
    assert type(moved.args[2]) is pair
    assert isinstance(moved.args[3], PackedSequence)
    assert moved.args[1][1][1] == "s"
    assert moved.kwargs["n"] is None
    tensors = [moved.args[0], moved.args[1][0], moved.args[2].a, moved.args[3].data, moved.kwargs["d"]["e"]]
    assert {t.device.type for t in (*tensors, moved.target)} == {"meta"}
    assert batch.args[0] is x


def test_check_accepts_what_the_network_accepts_and_leaves_no_gradient():
    model = nn.Linear(2, 3)
    check(model, Batch((), {"input": x}))
    assert model.weight.grad is None


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        pytest.param(Batch((torch.zeros(4, 7),), {}), r"torch.float32 \(4, 7\)\): RuntimeError", id="shape"),
        pytest.param(Batch((y,), {}), r"torch.int64 \(5,\)\)", id="type"),
        pytest.param(Batch((x, [1]), {}), r"torch.float32 \(5, 2\), list\): TypeError", id="arguments"),
        pytest.param(Batch((), {"pixels": x}), "unexpected keyword argument 'pixels'", id="keyword"),
    ],
)
def test_check_refuses_data_that_do_not_fit_and_says_what_came(batch, told):
    with pytest.raises(UsageError, match=told):
        check(nn.Linear(2, 3), batch)


def test_embeddings_that_get_other_than_whole_numbers_ask_for_data():
    words = nn.Sequential(nn.Embedding(9, 2), nn.Linear(2, 3))
    with pytest.raises(UsageError, match=r"embeddings take whole numbers; give --data, not an input shape: \w+Error: "):
        check(words, Batch((x,), {}))
    with pytest.raises(UsageError) as told:
        check(words, Batch((y + 9,), {}))
    assert "--data" not in str(told.value)


def test_device_of_a_network_with_and_without_parameters():
    assert device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    assert device_of(nn.ReLU()).type == "cpu"
