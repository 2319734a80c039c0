"""Checkpoints packed to the last bit, and back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from featherweight.artifact import read
from featherweight.artifact.read import from_bytes
from featherweight.artifact.write import to_bytes
from featherweight.cli import main
from featherweight.errors import FormatError, UsageError
from featherweight.lossless import pack, state_of, unpack
from tests.nets import tiny


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


def odd():
    """Every type, and what floats can hold."""
    rng = torch.Generator().manual_seed(0)
    wide = torch.randn(40, 200, generator=rng)
    wide[0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42])
    tensors = {"w": wide, "half": wide.half(), "double": wide.double(), "ids": torch.arange(3000), "flag": wide > 0}
    tensors |= {"bytes": (wide * 9).to(torch.uint8), "none": torch.zeros(0, 3), "one": torch.tensor(2.5)}
    return tensors | {"same": wide.clone(), "ones": torch.ones(5000), "small": torch.arange(9).to(torch.int16)}


def test_every_bit_comes_back():
    tensors = odd()
    again, metadata = unpack(from_bytes(to_bytes(pack(tensors, {"format": "pt"}))))
    assert metadata == {"format": "pt"}
    assert list(again) == list(tensors)
    assert all(same(again[n], t) for n, t in tensors.items())


def test_bfloat16_comes_back_in_its_type():
    tensors = {"w": torch.randn(64, 64).bfloat16()}
    data = to_bytes(pack(tensors))
    (again,) = unpack(from_bytes(data))[0].values()
    assert again.dtype == torch.bfloat16
    assert torch.equal(again, tensors["w"])
    assert len(data) < 0.75 * 2 * 64 * 64


def test_what_says_little_takes_little():
    plain = len(to_bytes(pack({"w": torch.randn(3000)})))
    assert len(to_bytes(pack({"w": torch.ones(100_000)}))) < 0.01 * 400_000
    assert len(to_bytes(pack({"w": torch.arange(10_000)}))) < 20_000
    noise = torch.randn(3000)
    twice = {"a": noise, "b": noise.clone()}
    assert len(to_bytes(pack(twice))) < plain + 60


def test_a_safetensors_file_becomes_smaller_and_the_same_again(tmp_path, capsys):
    source, packed, again = (tmp_path / n for n in ("a.safetensors", "a.fw", "b.safetensors"))
    save_file({n: t for n, t in odd().items() if n != "none"}, source, {"who": "us"})
    assert main(["compress", str(source), "--lossless", "-o", str(packed)]) == 0
    assert "every bit is the same" in capsys.readouterr().out
    assert main(["unpack", str(packed), "-o", str(again)]) == 0
    assert source.read_bytes() == again.read_bytes()
    assert packed.stat().st_size < source.stat().st_size


def test_a_network_is_packed_with_its_weights(tmp_path, capsys):
    torch.manual_seed(1)
    save_file(tiny().state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "net.py").write_text("from tests.nets import tiny as make\n")
    spec = [f"{tmp_path / 'net.py'}:make", "--weights", str(tmp_path / "w.safetensors")]
    assert main(["compress", *spec, "--lossless", "-o", str(tmp_path / "n.fw"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == (tmp_path / "n.fw").stat().st_size
    own, _ = unpack(read(tmp_path / "n.fw"))
    assert all(same(own[n], t) for n, t in load_file(tmp_path / "w.safetensors").items())


def test_other_files_are_unpacked_as_decoded_networks(tmp_path, capsys):
    (tmp_path / "net.py").write_text("from tests.nets import tiny as make\n")
    command = ["compress", f"{tmp_path / 'net.py'}:make", "--method", "rtn", "--bits", "4", "--input-shape", "3,8,8"]
    assert main([*command, "-o", str(tmp_path / "n.fw")]) == 0
    assert main(["unpack", str(tmp_path / "n.fw"), "-o", str(tmp_path / "n.safetensors"), "--json"]) == 0
    decoded = load_file(tmp_path / "n.safetensors")
    assert all(same(decoded[n], t) for n, t in read(tmp_path / "n.fw").state().items())
    capsys.readouterr()


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--target", "10x"], "leave out --target"),
        (["--bits", "4", "--finetune", "3"], "leave out --bits, --finetune"),
        (["--weights", "w.safetensors"], "leave out --weights"),
    ],
)
def test_what_would_lose_bits_is_refused(extra, told, tmp_path, capsys):
    source = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(3)}, source)
    assert main(["compress", str(source), "--lossless", "-o", str(tmp_path / "a.fw"), *extra]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "a.fw").exists()


def test_bad_input_is_one_line(tmp_path, capsys):
    source = tmp_path / "a.safetensors"
    source.write_bytes(b"no such file")
    for path, told in [(source, "as a safetensors file"), (tmp_path / "none.safetensors", "cannot read")]:
        assert main(["compress", str(path), "--lossless", "-o", str(tmp_path / "a.fw")]) == 2
        assert told in capsys.readouterr().err
    save_file({"w": torch.ones(3)}, source)
    assert main(["compress", str(source), "--lossless", "-o", str(source)]) == 2
    assert load_file(source)["w"].sum() == 3
    assert main(["unpack", str(source), "-o", str(tmp_path / "b.safetensors")]) == 1
    capsys.readouterr()


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(UsageError, match="no tensor"):
        pack({})
    with pytest.raises(UsageError, match="complex64"):
        pack({"z": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(FormatError, match="texts by name"):
        unpack(pack({"w": torch.ones(2)}, {"a": 1}))  # pyright: ignore

    class Odd(torch.nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(UsageError, match="no tensor"):
        state_of(Odd(2, 2))
