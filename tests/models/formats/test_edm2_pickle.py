"""EDM2's pickles: a synthetic one of their structure, read without running anything, and computing what it did."""

import io
import math
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch

from reverie.base.errors import ModelFileError
from reverie.models.formats import read_model, recognise
from reverie.models.formats.edm2_pickle import EDM2Pickle, apart
from reverie.models.formats.inert import Call, Name, read
from reverie.networks.edm2 import EDM2, EDM2Config

CONFIG = EDM2Config(in_channels=3, channels=(64, 128), layers=2, attention=(False, True), num_class_embeds=5)


class Canary:
    """Makes a file as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the file was unpickled")


class Held:
    """A module as the published files hold it: a call with its source text and its attributes."""

    def __init__(self, **state) -> None:
        self.state = state

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": "import os; os.abort()", "class_name": "X",
                "state": self.state}  # fmt: skip
        return (_reconstruct_persistent_obj, (meta,), None)


@pytest.fixture(autouse=True)
def their_module(monkeypatch):
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setattr(_reconstruct_persistent_obj, "__module__", "torch_utils.persistence")
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)


def module(parameters: dict | None = None, buffers: dict | None = None, **modules) -> Held:
    return Held(training=False, _parameters={k: torch.nn.Parameter(v) for k, v in (parameters or {}).items()},
                _buffers=buffers or {}, _modules=modules)  # fmt: skip


def layer(weight: torch.Tensor) -> Held:
    return module({"weight": weight.half()})


def woven(weight: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values in turn, as their file has them."""
    return torch.stack(weight.chunk(3), 1).flatten(0, 1)


def their_block(state: dict[str, torch.Tensor]) -> Held:
    parts = {"conv_res0": layer(state["conv_1.weight"]), "emb_linear": layer(state["emb_linear.weight"]),
             "conv_res1": layer(state["conv_2.weight"]), "conv_skip": None}  # fmt: skip
    if "conv_skip.weight" in state:
        parts["conv_skip"] = layer(state["conv_skip.weight"])
    if "attention.qkv.weight" in state:
        parts["attn_qkv"] = layer(woven(state["attention.qkv.weight"]))
        parts["attn_proj"] = layer(state["attention.out.weight"])
    return module({"emb_gain": state["emb_gain"]}, {"resample_filter": torch.ones(2)}, **parts)


def their_file(network: EDM2, size: int = 16, **more) -> bytes:
    """Return the pickle of a network in the published files' structure."""
    state = network.state_dict()

    def of(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): w for name, w in state.items() if name.startswith(prefix)}

    enc, dec = torch.nn.ModuleDict(), torch.nn.ModuleDict()
    down = [f"{size}x{size}_block0", f"{size}x{size}_block1", f"{size // 2}x{size // 2}_down"]
    down += [f"{size // 2}x{size // 2}_block{i}" for i in range(2)]
    up = [f"{size // 2}x{size // 2}_{kind}" for kind in ("in0", "in1", "block0", "block1", "block2")]
    up += [f"{size}x{size}_{kind}" for kind in ("up", "block0", "block1", "block2")]
    enc._modules[f"{size}x{size}_conv"] = layer(state["conv_in.weight"])
    enc._modules.update({name: their_block(of(f"encoder.{i}.")) for i, name in enumerate(down)})
    dec._modules.update({name: their_block(of(f"decoder.{i}.")) for i, name in enumerate(up)})
    fourier = {"freqs": 2 * math.pi * state["fourier.frequencies"], "phases": 2 * math.pi * state["fourier.phases"]}
    unet = module(
        {"out_gain": state["out_gain"]}, emb_fourier=module({}, fourier), emb_noise=layer(state["emb_noise.weight"]),
        emb_label=layer(state["emb_label.weight"]), enc=enc, dec=dec, out_conv=layer(state["conv_out.weight"]),
    )  # fmt: skip
    logvar = {"logvar_fourier": module(buffers={"freqs": torch.ones(4)}), "logvar_linear": layer(torch.ones(1, 4))}
    whole = module(unet=unet, **logvar)
    whole.state |= {"img_resolution": size, "img_channels": 3, "sigma_data": 0.5, **more}
    return pickle.dumps({"ema": whole, "dataset_kwargs": {"path": "x"}, "loss_fn": Held(P_mean=-0.4)})


@pytest.fixture
def network() -> EDM2:
    torch.manual_seed(0)
    network = EDM2(CONFIG)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.half() if parameter.ndim else torch.rand(()) + 0.5)
    return network.eval()


def test_it_computes_what_the_network_in_the_file_does(network, tmp_path):
    path = tmp_path / "edm2.pkl"
    path.write_bytes(their_file(network))
    assert recognise(path).name == "edm2-pickle"
    model = read_model(path)
    assert model.card.shape == (3, 16, 16)
    assert model.card.network.config["channels"] == [64, 128]
    assert len(model.card.classes) == 5
    args = torch.randn(2, 3, 16, 16), torch.tensor([-0.5, 0.3]), torch.tensor([0, 4])
    want = network(*args)
    assert want.abs().max() > 0.1
    torch.testing.assert_close(model.denoiser.network(*args), want, rtol=1e-4, atol=1e-4)
    assert model.sample(1, steps=1, classes=2).uint8.shape == (1, 3, 16, 16)


def test_nothing_in_it_runs(network, tmp_path):
    canary = tmp_path / "canary"
    path = tmp_path / "edm2.pkl"
    path.write_bytes(their_file(network, evil=Canary(canary)))
    read_model(path)
    assert not canary.exists()
    with pytest.raises(AssertionError, match="the file was unpickled"):
        pickle.loads(path.read_bytes())


def test_a_call_in_the_place_of_a_tensor_is_refused(network, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "edm2.pkl"
    whole = pickle.dumps({"ema": module({}, {"x": Canary(canary)})})
    path.write_bytes(whole)
    with pytest.raises(ModelFileError, match="no tensor that can be read"):
        read_model(path)
    assert not canary.exists()


@pytest.mark.parametrize("cut", [100, 5000, -10])
def test_a_truncated_file_is_refused(network, tmp_path, cut):
    path = tmp_path / "edm2.pkl"
    path.write_bytes(their_file(network)[:cut])
    with pytest.raises(ModelFileError):
        EDM2Pickle().read(path)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    stored = torch.zeros(4)
    evil = types.SimpleNamespace(reduce=(torch._utils._rebuild_tensor_v2, (stored.untyped_storage(),)))

    class Beyond:
        def __reduce__(self):
            storage = torch.storage.TypedStorage(wrap_storage=evil.reduce[1][0], dtype=torch.float32, _internal=True)
            return (torch._utils._rebuild_tensor_v2, (storage, 2, (4,), (1,), False, {}))

    path = tmp_path / "edm2.pkl"
    path.write_bytes(pickle.dumps({"ema": module({}, {"x": Beyond()})}))
    with pytest.raises(ModelFileError, match="beyond its storage"):
        EDM2Pickle().read(path)


def test_other_tensors_have_no_place(network, tmp_path):
    path = tmp_path / "edm2.pkl"
    path.write_bytes(pickle.dumps({"ema": module({"strange": torch.ones(2)})}))
    with pytest.raises(ModelFileError, match="not the tensors of EDM2"):
        EDM2Pickle().read(path)


def test_rows_in_turn_are_put_apart():
    assert apart(torch.arange(6)[:, None]).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    weight = torch.randn(12, 2)
    assert torch.equal(apart(woven(weight)), weight)


# The reader ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
def test_data_comes_out_as_it_went_in(protocol):
    value = {"a": [1, -2, 2**70, 1.5, None, True], "b": ("x", ()), "c": {"d": [], 3: "é"}, "t": (1, 2, 3, 4)}
    assert read(pickle.dumps(value, protocol=protocol), "x") == value


def test_shared_parts_stay_shared():
    part = [1]
    found = read(pickle.dumps([part, part]), "x")
    assert found[0] is found[1]


@pytest.mark.parametrize("protocol", range(6))
def test_calls_are_told_and_not_made(tmp_path, protocol):
    found = read(pickle.dumps(Canary(tmp_path / "canary"), protocol=protocol), "x")
    assert isinstance(found, Call)
    assert isinstance(found.function, Name | Call)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "data", [b"", b".", b"\x80\x04K", b"t.", b"K\x01u.", b"\x80\x05\x97.", b"(I1\nd.", b"}(K\x01u."]
)
def test_what_is_no_pickle_of_weights_is_refused(data):
    with pytest.raises(ModelFileError):
        read(io.BytesIO(data), "x")
