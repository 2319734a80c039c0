"""The demo network and its images."""

import pytest
import torch
from torch.utils.data import TensorDataset

from featherweight.demo import digits


def rows(data: TensorDataset) -> set[bytes]:
    return {image.numpy().tobytes() for image in data.tensors[0]}


def test_accuracy() -> None:
    images, labels = digits.test().tensors
    with torch.no_grad():
        right = (digits.make()(images).argmax(1) == labels).double().mean()
    assert right >= 0.985


def test_network_is_small_trained_and_in_eval_mode() -> None:
    model = digits.make()
    assert not any(module.training for module in model.modules())
    assert 35_000 <= sum(p.numel() for p in model.parameters()) <= 60_000
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    assert 150_000 <= digits.WEIGHTS.stat().st_size <= 250_000


def test_every_call_gives_a_network_of_its_own_and_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    first, second = digits.make(), digits.make()
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in first.state_dict().items():
        other = second.state_dict()[name]
        assert torch.equal(tensor, other)
        assert tensor.data_ptr() != other.data_ptr()


@pytest.mark.parametrize(("data", "count"), [(digits.train, 1255), (digits.calibration, 512), (digits.test, 542)])
def test_images(data, count: int) -> None:
    images, labels = data().tensors
    assert images.shape == (count, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert labels.shape == (count,)
    assert labels.dtype == torch.int64
    assert all(torch.equal(a, b) for a, b in zip(data().tensors, (images, labels), strict=True))


def test_splits_are_disjoint_and_complete() -> None:
    train, test, calibration = rows(digits.train()), rows(digits.test()), rows(digits.calibration())
    assert not train & test
    assert len(train | test) == 1797  # all images differ
    assert calibration <= train
    assert len(calibration) == 512


def test_split_is_stratified() -> None:
    trained, held_out = (data().tensors[1].bincount(minlength=10) for data in (digits.train, digits.test))
    share = held_out / (trained + held_out)
    assert share.min() > 0.295
    assert share.max() < 0.31
