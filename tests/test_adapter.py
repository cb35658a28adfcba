"""Task files: what was trained, apart from its base; and how files that are not whole, or of another model, are refused."""

import copy
import hashlib
import json
import os
import pickle
import random
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small_models import SMALL, small_model
from torch import nn

import s2a_fx
from s2a_fx.passes import CompressActivations, FreezeWeights, InsertLowRankPrompt
from s2a_fx.sharded import whole
from s2a_fx.tasks import base_digests, task_file

TINY = (FreezeWeights(keep=("bias", "head")),)


class Tiny(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def tiny(classes=3, recipe=TINY, seed=0):
    torch.manual_seed(seed)
    return s2a_fx.transform(Tiny(classes), X, recipe)


def trained(gm, x=X, seed=1):
    """The model after a step that changes whatever trains."""
    torch.manual_seed(seed)
    gm.train()(x)
    with torch.no_grad():
        for p in gm.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    return gm


def values(gm):
    return {name: value.clone() for name, value in gm.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "task.safetensors"


@pytest.fixture
def saved(path):
    gm = trained(tiny())
    s2a_fx.save_adapter(gm, path)
    return gm, path


AT_ONCE = [("vit", "s2a"), ("resnet", "lora+compress")]
PAIRS = [
    pytest.param(family, recipe, marks=() if (family, recipe) in AT_ONCE else pytest.mark.slow)
    for family in SMALL
    for recipe in ("s2a", "lora+compress", "unipt")
]


@pytest.mark.parametrize(("family", "recipe"), PAIRS)
def test_a_task_goes_to_a_file_and_into_a_fresh_base(family, recipe, path):
    model, x = small_model(family)
    fresh, gm = (s2a_fx.transform(copy.deepcopy(model), x, recipe) for _ in range(2))
    trained(gm, x)
    s2a_fx.save_adapter(gm, path)
    assert not same(values(fresh), values(gm))
    s2a_fx.load_adapter(fresh, path)
    assert same(values(fresh), values(gm))
    assert torch.equal(fresh.eval()(x), gm.eval()(x))


def test_the_file_holds_what_training_changes_and_nothing_else(saved):
    gm, path = saved
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert load_file(path).keys() == {"norm.bias", "head.weight", "head.bias"} | statistics
    with safetensors.safe_open(path, "pt") as file:
        said = file.metadata()
    assert said["model"] == "Tiny" and said["version"] == "1" and said["recipe"] == "bias"
    base = json.loads(said["base"])
    assert base.keys() == {"conv.weight", "norm.weight"}
    digest = hashlib.sha256(gm.conv.weight.detach().numpy().tobytes()).hexdigest()
    assert base["conv.weight"] == f"float32 [4, 3, 3, 3] {digest}"


def test_the_file_names_the_recipe_and_timm_s_model(vit, path):
    s2a_fx.save_adapter(s2a_fx.transform(*vit, "bias+lrp"), path)
    with safetensors.safe_open(path, "pt") as file:
        assert (file.metadata()["recipe"], file.metadata()["model"]) == ("bias+lrp", "vit_tiny_patch16_224")


@pytest.mark.parametrize("classes", [("red", "grün", "blue"), None])
def test_the_file_tells_the_classes_in_the_order_of_the_head_s_outputs(path, classes):
    s2a_fx.save_adapter(tiny(), path, classes)
    assert s2a_fx.read_adapter(path).classes == classes


def test_one_base_switches_between_tasks_without_reading_it_again(monkeypatch):
    gm = tiny()
    tasks = [s2a_fx.TaskAdapter.of(trained(gm, seed=seed)) for seed in (1, 2)]
    wanted = []
    for task in tasks:
        task.apply(gm)
        wanted.append(values(gm))
    assert not same(*wanted)
    monkeypatch.setattr(base_digests, "bytes_of", lambda tensor: pytest.fail("the base was read again"))
    for task, expected in [*zip(tasks, wanted, strict=True)] * 2:
        task.apply(gm)
        assert same(values(gm), expected)


def test_a_task_shares_no_memory_with_the_model(saved):
    gm, _ = saved
    task, before = s2a_fx.TaskAdapter.of(gm), values(gm)
    trained(gm, seed=5)
    task.apply(gm)
    assert same(values(gm), before)
    with torch.no_grad():
        gm.head.weight.zero_()
    assert task.tensors["head.weight"].any()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))], ids=["copy", "pickle"])
def test_copies_and_pickles_know_their_recipe(saved, again):
    gm, path = saved
    other = again(again(tiny()))
    s2a_fx.load_adapter(other, path)
    assert same(values(other), values(gm))
    assert s2a_fx.TaskAdapter.of(other).passes == s2a_fx.TaskAdapter.of(gm).passes


def test_a_recipe_applied_in_two_parts_is_the_recipe(vit, path):
    s2a_fx.save_adapter(s2a_fx.transform(*vit, "bias+lrp"), path)
    gm = s2a_fx.transform(s2a_fx.transform(*vit, "bias"), vit[1], (InsertLowRankPrompt(rank=30),))
    s2a_fx.load_adapter(gm, path)


def test_mode_gradients_and_frozen_parameters_stay_as_they_are(saved):
    gm, path = saved
    other = tiny().eval().requires_grad_(False)
    with torch.inference_mode():
        s2a_fx.load_adapter(other, path)
    assert not other.training and not any(p.requires_grad for p in other.parameters())
    assert same(values(other), values(gm))
    F.cross_entropy(gm(X), torch.tensor([0, 1])).backward()
    gradient = gm.head.weight.grad.clone()
    s2a_fx.load_adapter(gm, path)
    assert torch.equal(gm.head.weight.grad, gradient)


def test_tied_parameters_are_kept_once_and_stay_tied(path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.second.bias = self.first.bias

        def forward(self, x):
            return self.head(self.second(self.first(x).relu()))

    x = torch.randn(2, 4)
    model = Tied()
    gm = s2a_fx.transform(model, x, TINY)
    s2a_fx.save_adapter(trained(gm, x), path)
    assert load_file(path).keys() == {"first.bias", "head.weight", "head.bias"}
    expected = values(gm)
    trained(gm, x, seed=3)
    s2a_fx.load_adapter(gm, path)
    assert same(values(gm), expected) and gm.second.bias is gm.first.bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_kept_bit_by_bit_and_not_mixed(path, saved, dtype):
    gm = trained(tiny())
    other = tiny().to(dtype)
    before = values(other)
    with pytest.raises(s2a_fx.AdapterError, match=str(dtype)):
        s2a_fx.load_adapter(other, path)
    assert same(values(other), before)
    s2a_fx.save_adapter(gm.to(dtype), path)
    s2a_fx.load_adapter(other, path)
    assert same(values(other), values(gm))


def test_a_base_of_other_values_is_refused_by_name(saved):
    _, path = saved
    for change in (lambda gm: gm.conv.weight.add_(1e-3), lambda gm: gm.norm.weight.neg_()):
        gm = tiny()
        name = "conv.weight" if change(copy.deepcopy(gm).requires_grad_(False)).ndim == 4 else "norm.weight"
        s2a_fx.load_adapter(gm, path)  # the base is known now
        with torch.no_grad():
            change(gm)
        before = values(gm)
        with pytest.raises(s2a_fx.AdapterError, match=f"fingerprint .*{name} differ"):
            s2a_fx.load_adapter(gm, path)
        assert same(values(gm), before)


def test_a_base_whose_data_is_another_tensor_is_read_again(saved):
    gm, path = saved
    s2a_fx.load_adapter(gm, path)
    for _ in range(2):  # the second may lie where the first one lay
        gm.conv.weight.data = gm.conv.weight.data + 1
    with pytest.raises(s2a_fx.AdapterError, match=r"conv\.weight"):
        s2a_fx.load_adapter(gm, path)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: tiny(recipe="bias"), None),
        (lambda: tiny(recipe=(*TINY, CompressActivations(smallest=0))), "recipe.*CompressActivations"),
        (lambda: tiny(recipe="linear"), "recipe.*linear"),
        (lambda: tiny(classes=7), "num_classes=3"),
        (Tiny, "transform"),
        (lambda: s2a_fx.trace(Tiny(), X), "transform"),
        (lambda: nn.DataParallel(tiny()), r"\.module"),
        (lambda: s2a_fx.transform(Tiny().to("meta"), X.to("meta"), TINY), "no values"),
    ],
)
def test_models_that_it_does_not_fit_are_refused(saved, model, words):
    _, path = saved
    torch.manual_seed(0)
    if words is None:  # the same recipe by its name
        s2a_fx.load_adapter(model(), path)
        return
    other = model()
    before = values(other)
    with pytest.raises(s2a_fx.S2AError, match=words):
        s2a_fx.load_adapter(other, path)
    assert all(v.is_meta for v in before.values()) or same(values(other), before)


def all_but_the_head_frozen():
    gm = tiny().requires_grad_(False)
    gm.head.requires_grad_(True)
    return gm


def unfrozen(gm):
    gm.conv.weight.requires_grad_(True)
    return gm


@pytest.mark.parametrize(
    ("of", "into", "words"),
    [
        (tiny, lambda: unfrozen(tiny()), r"lacks conv\.weight"),
        (lambda: unfrozen(tiny()), tiny, r"has conv\.weight"),
        (lambda: unfrozen(tiny()), lambda: unfrozen(tiny()).requires_grad_(False), r"has conv\.weight"),
        (tiny, all_but_the_head_frozen, r"has norm\.bias"),
    ],
    ids=["the model", "the task", "the task, inference", "the task, all but the head"],
)
def test_parameters_that_only_one_side_trains_are_named_and_none_is_overwritten(of, into, words, path):
    s2a_fx.save_adapter(trained(of()), path)
    gm = into()
    before = values(gm)
    with pytest.raises(s2a_fx.AdapterError, match=words):
        s2a_fx.load_adapter(gm, path)
    assert same(values(gm), before)


def test_what_was_unfrozen_by_hand_goes_into_a_model_unfrozen_likewise(path):
    gm, other = trained(unfrozen(tiny())), unfrozen(tiny())
    s2a_fx.save_adapter(gm, path)
    s2a_fx.load_adapter(other, path)
    assert same(values(other), values(gm))


def test_what_cannot_be_saved_is_refused_and_leaves_nothing_behind(saved, tmp_path, monkeypatch):
    gm, path = saved
    before = path.read_bytes()
    with pytest.raises(s2a_fx.InputError, match="transform"):
        s2a_fx.save_adapter(Tiny(), path)
    for classes in ("red", [1, 2, 3], {"red": 0}, 3):
        with pytest.raises(s2a_fx.InputError, match="classes: got"):
            s2a_fx.save_adapter(gm, path, classes)
    with pytest.raises(s2a_fx.AdapterError, match="needs a gradient"):
        s2a_fx.save_adapter(tiny().requires_grad_(False), path)
    with pytest.raises(s2a_fx.AdapterError, match="no values"):
        s2a_fx.save_adapter(s2a_fx.transform(Tiny().to("meta"), X.to("meta"), TINY), path)
    for wrong in (tmp_path, tmp_path / "none" / "x", tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(s2a_fx.AdapterError, match="cannot be written"):
            s2a_fx.save_adapter(gm, wrong)
    (loop := tmp_path / "loop").symlink_to("loop")
    with pytest.raises(s2a_fx.AdapterError, match="cannot be written: Too many levels of symbolic links"):
        s2a_fx.save_adapter(gm, loop)
    loop.unlink()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(s2a_fx.AdapterError, match="No space"):
        s2a_fx.save_adapter(trained(gm), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


SAID = '"__metadata__": {"format": "s2a_fx.task", "version": "1", "digest": "0"}'


def entry(start, stop, shape=(1,), dtype="F32"):
    return json.dumps({"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\x01", "damaged"),
        (struct.pack("<Q", 2**63) + b"{}", "header alone"),
        (struct.pack("<Q", 10**9) + b"{}", "header alone"),
        (file_of(b"{}"), "no task file"),
        (file_of(b"[]"), "no task file"),
        (file_of(b"\xff\xfe"), "no JSON"),
        (file_of(b"[" * 100_000), "no JSON"),
        (file_of(b'{"__metadata__": NaN}'), "NaN"),
        (file_of({"__metadata__": {"format": 1}}), "no task file"),
        (file_of({"__metadata__": {"format": "s2a_fx.task", "version": "2"}}), "version '2'"),
        (file_of(f"{{{SAID}, {SAID}}}".encode()), "twice"),
        (file_of(f'{{{SAID}, "a": {entry(0, 4)}, "a": {entry(0, 4)}}}'.encode(), b"\0" * 4), "twice"),
        (file_of(f'{{{SAID}, "a": {entry(0, 4)}, "b": {entry(2, 6)}}}'.encode(), b"\0" * 6), "do not fill"),
        (file_of(f'{{{SAID}, "a": {entry(0, 4)}}}'.encode(), b"\0" * 3), "do not fill"),
        (file_of(f'{{{SAID}, "a": {entry(0, 4)}}}'.encode(), b"\0" * 5), "do not fill"),
        (file_of(f'{{{SAID}, "a": {entry(-4, 4)}}}'.encode(), b"\0" * 4), "do not fill"),
        (file_of(f'{{{SAID}, "a": {entry(0, 4, (2**62, 2**62))}}}'.encode(), b"\0" * 4), "safetensors refuses"),
        (file_of(f'{{{SAID}, "a": {entry(0, 4, dtype="X9")}}}'.encode(), b"\0" * 4), "safetensors refuses"),
        (file_of(f'{{{SAID}, "a": 3}}'.encode()), "do not fill"),
        (file_of(f"{{{SAID}}}".encode()), "digest"),
        (pickle.dumps({"a": 1}), "damaged|no task file"),
    ],
)
def test_files_that_are_no_task_files_are_refused(path, content, words):
    path.write_bytes(content)
    with pytest.raises(s2a_fx.AdapterError, match=words):
        s2a_fx.read_adapter(path)


def test_paths_that_are_no_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for wrong in (tmp_path, tmp_path / "none", tmp_path / "pipe", "a\0b"):
        with pytest.raises(s2a_fx.AdapterError, match=r"cannot be read|is no file"):
            s2a_fx.read_adapter(wrong)


def test_another_program_s_safetensors_are_no_task(path):
    save_file({"head.weight": torch.zeros(3, 4)}, path)
    with pytest.raises(s2a_fx.AdapterError, match="no task file"):
        s2a_fx.load_adapter(tiny(), path)


def _truncated(rng, data, path):
    path.write_bytes(data[: rng.randrange(len(data))])


def _flipped(rng, data, path):
    flipped = bytearray(data)
    flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(flipped)


def _lengthened(rng, data, path):
    place = rng.randrange(len(data) + 1)
    path.write_bytes(data[:place] + rng.randbytes(rng.randrange(1, 20)) + data[place:])


def _written_again(change):
    """A file whose digest is right, and something else is not."""

    def tamper(rng, data, path):
        path.write_bytes(data)
        metadata, tensors = task_file.read(path)
        change(rng, metadata, tensors)
        task_file.write(path, {k: v for k, v in metadata.items() if k not in ("format", "version")}, tensors)

    return tamper


def _reshaped(rng, metadata, tensors):
    name = rng.choice(sorted(tensors))
    shapes = [torch.zeros(rng.randrange(9, 20)), torch.zeros(0), torch.zeros(5, 4), torch.tensor(0.0)]
    tensors[name] = rng.choice([tensors[name][None], *shapes])


def _recast(rng, metadata, tensors):
    name = rng.choice(sorted(tensors))
    tensors[name] = tensors[name].to(rng.choice([torch.bfloat16, torch.float64, torch.uint8]))


def _renamed(rng, metadata, tensors):
    name = rng.choice(sorted(tensors))
    value = tensors.pop(name)
    if rng.random() < 0.7:
        tensors[rng.choice(["", "head", "head.", ".", "__class__", "conv.weight.x", name + "x"])] = value


def _other_metadata(rng, metadata, tensors):
    key = rng.choice(["passes", "base", "fingerprint", "model", "classes"])
    if key == "model" or rng.random() < 0.3:
        del metadata[key]
    elif key == "classes":
        metadata[key] = rng.choice(["", "{}", "[1]", '"red"', '["red", null]', '{"red": 0}', "0", "[" * 10**5, "NaN"])
    else:
        garbage = ["", "null", "[]", "{}", "[1]", '{"conv.weight": 1}', '["FreezeWeights()"]', "[" * 10**5, "NaN", "x" * 64]
        metadata[key] = rng.choice(garbage)


def _other_base(rng, metadata, tensors):
    base = json.loads(metadata["base"])
    name = rng.choice(sorted(base))
    if rng.random() < 0.5:
        base[name] = base[name][:-1] + ("0" if base[name][-1] != "0" else "1")
    else:
        base.pop(name)
    metadata["base"], metadata["fingerprint"] = json.dumps(base), base_digests.fingerprint(base)


WAYS = [
    *[_truncated, _flipped, _flipped, _lengthened],
    *map(_written_again, (_reshaped, _recast, _renamed, _other_metadata, _other_base)),
]


def test_of_a_thousand_broken_files_each_is_refused_and_changes_nothing(saved, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a thousand would take seconds
    gm, path = saved
    data = path.read_bytes()
    trained(gm, seed=9)
    before = values(gm)
    rng = random.Random(0)
    accepted = []
    for case in range(1000):
        way = WAYS[case % len(WAYS)]
        way(rng, data, path)
        try:
            s2a_fx.load_adapter(gm, path)
            accepted.append(case)
        except s2a_fx.S2AError:
            pass
        assert same(values(gm), before), case
    assert not accepted


def test_of_each_byte_of_a_file_no_bit_is_flipped_unseen(saved):
    """One bit of each byte, drawn at random."""
    _, path = saved
    data = path.read_bytes()
    rng = random.Random(1)
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(s2a_fx.AdapterError):
            s2a_fx.read_adapter(path)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_parameters_spread_by_fsdp_are_gathered_and_spread_again(one_process, path):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    gm = tiny()
    fully_shard(gm, mesh=one_process)
    trained(gm)
    assert not any(isinstance(p, DTensor) for p in gm.parameters())  # after a forward they are whole, until the backward
    s2a_fx.save_adapter(gm, path)
    assert all(isinstance(p, DTensor) for p in gm.parameters())
    alone = tiny()
    s2a_fx.load_adapter(alone, path)  # a file knows nothing of processes
    expected = values(alone)
    trained(gm, seed=4)
    s2a_fx.load_adapter(gm, path)
    assert all(isinstance(p, DTensor) for p in gm.parameters())
    assert same({name: whole(value) for name, value in gm.state_dict().items()}, expected)
    F.cross_entropy(gm(X), torch.tensor([0, 1])).backward()


def test_a_model_that_is_spread_is_finalized_from_its_task(one_process):
    from torch.distributed.fsdp import fully_shard

    gm = tiny()
    fully_shard(gm, mesh=one_process)
    with pytest.raises(s2a_fx.InputError, match=r"spread over processes.*save_adapter.*load_adapter.*finalize"):
        s2a_fx.finalize(gm)


TWO = """
import os, sys
sys.path.append(sys.argv[1])
import torch
from test_adapter import tiny
from torch.distributed.fsdp import fully_shard
import s2a_fx

torch.distributed.init_process_group("gloo")
gm = tiny()
fully_shard(gm, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
try:
    s2a_fx.save_adapter(gm, sys.argv[2])
except s2a_fx.AdapterError as error:
    print("told", flush=True)
torch.distributed.destroy_process_group()
os._exit(0)  # threads of gloo's that outlive Python abort the process now and then
"""


@pytest.mark.slow
def test_a_failed_write_is_told_in_every_process(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "two.py")]
    command += [str(Path(__file__).parent), str(tmp_path / "none" / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("told") == 2


def test_weights_that_cannot_be_written_are_as_they_were(saved):
    _, path = saved
    gm = tiny()
    with torch.inference_mode():
        gm.norm.running_var.mul_(2)
        gm.norm.running_var = gm.norm.running_var.clone()  # a tensor of inference mode
    before = values(gm)
    with pytest.raises(s2a_fx.AdapterError, match="cannot be written"):
        s2a_fx.load_adapter(gm, path)
    assert same(before, values(gm))


def test_a_base_of_another_name_is_refused_though_its_tensors_are_the_same(path):
    one, other = (timm.create_model(name, num_classes=2) for name in ("tf_efficientnet_lite0", "efficientnet_lite0"))
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 32, 32)
    s2a_fx.save_adapter(s2a_fx.transform(one, x, "linear"), path)
    with pytest.raises(s2a_fx.AdapterError, match="trained on tf_efficientnet_lite0, the model is a efficientnet_lite0"):
        s2a_fx.load_adapter(s2a_fx.transform(other, x, "linear"), path)


def test_many_writers_leave_a_whole_file(path):
    gm = trained(tiny())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: s2a_fx.save_adapter(gm, path), range(40)))
    s2a_fx.load_adapter(tiny(), path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_link_and_a_file_s_mode_stay(path):
    path.write_text("")
    path.chmod(0o600)
    link = path.with_name("link")
    link.symlink_to(path)
    s2a_fx.save_adapter(trained(tiny()), link)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o600
    s2a_fx.load_adapter(tiny(), path)


def test_a_pipe_is_written_to_and_stays(path):
    os.mkfifo(path)
    copy = path.with_name("copy")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: copy.write_bytes(path.read_bytes()))
        s2a_fx.save_adapter(trained(tiny()), path)
        reading.result()
    assert path.is_fifo()
    s2a_fx.load_adapter(tiny(), copy)
