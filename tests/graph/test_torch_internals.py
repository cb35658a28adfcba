"""Private names of torch stand in one file, and what stands in for torch's own does the same."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from s2a_fx.graph.fake import fake_mode, fake_tensor
from s2a_fx.graph.torch_internals import VIEWS, FakeTensorMode, run_on_fake, storage_key

ROOT = Path(__file__).parents[2]
HOME = ROOT / "s2a_fx" / "graph" / "torch_internals.py"
TORCH = ("torch", "nn", "F", "fx")
FILES = [path for room in ("analysis", "passes", "s2a_fx") for path in sorted((ROOT / room).rglob("*.py")) if path != HOME]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_private_names() -> set[str]:
    """The private attributes that the package's own classes have."""
    found = set()
    for path in FILES:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        found |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        for statement in (s for n in nodes if isinstance(n, ast.ClassDef) for s in n.body):
            if isinstance(statement, ast.FunctionDef):
                found.add(statement.name)
            found |= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found


OWN = own_private_names()
ATTRIBUTES = {"_is_impure", "_orig_mod", "_metadata", "_tensor_name"}  # of objects that come and go
TAKEN = {*dir(nn.Module()), *dir(fx.Graph()), *dir(fx.GraphModule(nn.Module(), fx.Graph())), *dir(torch.zeros(()))}


def is_own(attribute: ast.Attribute) -> bool:
    """Whether the object is certainly one of the package, or a module of Python's."""
    whole = ast.unparse(attribute)
    if whole in ("os._exit", "sys._getframe"):
        return True
    of_self = isinstance(attribute.value, ast.Name) and attribute.value.id in ("self", "cls")
    return attribute.attr in OWN and (of_self or attribute.attr not in TAKEN) and whole.partition(".")[0] not in TORCH


def names_private(text: str) -> bool:
    """Whether a string is a private name, to be read by `getattr` or imported."""
    prefixes = ("torch._", "_saved_", "_raw_saved_")
    return text.startswith(prefixes) or (text.isidentifier() and is_private(text) and text in TAKEN | ATTRIBUTES)


def foreign_names(tree: ast.AST) -> Iterator[str]:
    """The private names in a file that are neither its package's nor Python's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            names = [node.module or "", *(alias.name for alias in node.names)]
            yield from (name for name in names if any(map(is_private, name.split("."))))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == "torch"]
            yield from (name for name in names if any(map(is_private, name.split("."))))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node):
            yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and names_private(node.value):
            yield node.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_reads_a_private_name_of_torch(path):
    assert not list(foreign_names(ast.parse(path.read_text())))


@pytest.mark.parametrize(
    "line",
    [
        "from torch._C import x",
        "import torch.utils._pytree",
        "torch.nn.modules.conv._ConvNd",
        "module._parameters",
        "getLogger('torch._dynamo')",
        "getattr(state, '_metadata', {})",
        "module._is_impure = True",
    ],
)
def test_private_names_are_seen(line):
    assert list(foreign_names(ast.parse(line)))


def described(tensors):
    return [(t.shape, t.stride(), t.storage_offset(), t.dtype, t.device, t.is_conj(), storage_key(t)) for t in tensors]


CASES = {
    torch.ops.aten.alias.default: (),
    torch.ops.aten.detach.default: (),
    torch.ops.aten.expand.default: ([4, 3, 6],),
    torch.ops.aten.permute.default: ([1, 0],),
    torch.ops.aten.select.int: (1, -1),
    torch.ops.aten.slice.Tensor: (1, 1, 6, 2),
    torch.ops.aten.split.Tensor: (4, 1),
    torch.ops.aten.t.default: (),
    torch.ops.aten.transpose.int: (0, 1),
    torch.ops.aten.unbind.int: (1,),
    torch.ops.aten.unsqueeze.default: (-1,),
    torch.ops.aten.view.default: ([3, -1, 2],),
}


def refuse(*_):
    raise AssertionError("looks in the cache")


def test_each_view_has_a_case():
    assert set(CASES) == VIEWS


@pytest.mark.parametrize("operator", CASES, ids=str)
@pytest.mark.parametrize("conjugate", [False, True])
def test_views_of_fake_tensors_are_torchs_own(operator, conjugate, monkeypatch):
    with fake_mode() as mode:
        x = fake_tensor(torch.empty(3, 6, dtype=torch.complex64), mode)
        x = x.conj() if conjugate else x
        wanted = operator(x, *CASES[operator])
        monkeypatch.setattr(FakeTensorMode, "dispatch", refuse)
        given = run_on_fake(operator, (x, *CASES[operator]), {})
        monkeypatch.undo()
        assert type(given) is type(wanted)
        if isinstance(wanted, torch.Tensor):
            wanted, given = [wanted], [given]
        assert described(given) == described(wanted)


def test_an_unsafe_view_is_a_view(monkeypatch):
    with fake_mode() as mode:
        x = fake_tensor(torch.empty(3, 6), mode)
        wanted = x.view(6, 3)
        monkeypatch.setattr(FakeTensorMode, "dispatch", refuse)
        given = run_on_fake(torch.ops.aten._unsafe_view.default, (x, [6, 3]), {})
        monkeypatch.undo()
        assert described([given]) == described([wanted])


def test_views_of_fake_tensors_that_do_not_fit_are_refused():
    with fake_mode() as mode:
        x = fake_tensor(torch.empty(2, 3).t(), mode)
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            run_on_fake(torch.ops.aten.view.default, (x, [6]), {})


def test_a_view_of_a_fake_tensor_of_known_value_knows_it():
    with fake_mode():
        assert run_on_fake(torch.ops.aten.view.default, (torch.tensor(3.0), [1]), {}).item() == 3


def test_views_of_real_tensors_are_real():
    x = torch.randn(2, 3)
    assert torch.equal(run_on_fake(torch.ops.aten.t.default, (x,), {}), x.t())
