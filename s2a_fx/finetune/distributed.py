"""One process or several: who is who, how weights and gradients are shared."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, is_distributed_env
from torch import fx, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from s2a_fx.errors import InputError, S2AError
from s2a_fx.finetune.units import make_units
from s2a_fx.graph.torch_internals import without_compiler

T = TypeVar("T")


_PATIENCE = timedelta(hours=12)
"""So long processes wait for one that fetches data or writes."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    parallel: str | None = None
    control: Any = None  # a group of gloo: questions and records go from host to host, and no GPU waits for them

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def added(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' counts."""
        if self.count > 1:
            dist.all_reduce(counts)
        return counts

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        if self.count == 1:
            return here
        asked = torch.tensor(int(here))
        dist.all_reduce(asked, group=self.control)
        return bool(asked)

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give each tensor the mean of its values in all processes."""
        if self.count == 1 or not tensors:
            return
        means = self.added(torch.cat([t.flatten() for t in tensors])) / self.count
        for tensor, mean in zip(tensors, means.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def of_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, in all of them; what it raises is raised in all. The others wait for it."""
        if self.count == 1:
            return make()
        made: list[Any] = [None]
        failure: BaseException | None = None
        if self.first:
            try:
                made = [make()]
            except BaseException as error:  # the others must not wait for what will never come
                failure = error
                made = [error if isinstance(error, S2AError) else S2AError(f"the first process failed: {error!r}")]
        dist.broadcast_object_list(made, src=0, group=self.control)
        if failure is not None:
            raise failure
        if isinstance(made[0], S2AError):
            raise made[0]
        return made[0]  # type: ignore[no-any-return]

    def once_a_machine(self, make: Callable[[], None]) -> None:
        """Run `make` in one process of each machine; the others wait, and raise if it does."""
        failure: S2AError | None = None
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            try:
                make()
            except S2AError as error:
                failure = error
        if self.any(failure is not None):
            raise failure or S2AError("another process failed; it tells why.")


@contextmanager
def joined(device: str | None, parallel: str | None) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did.

    Raises:
        InputError: the device is not there, or `parallel` is asked of a process that is alone.
    """
    if parallel and not is_distributed_env():
        raise InputError(
            f"parallel: got {parallel!r} and one process; start several: torchrun --nproc-per-node 2 -m s2a_fx.cli ..."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = init_distributed_device_so(device)
        found = torch.device(place["device"])
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(f"device: {device!r} cannot be used: {error}") from error
    several = place["world_size"] > 1
    try:
        control = dist.new_group(backend="gloo", timeout=_PATIENCE) if several else None
        yield Processes(place["global_rank"], place["world_size"], found, (parallel or "ddp") if several else None, control)
    finally:
        if several:
            dist.destroy_process_group()


def shared(gm: fx.GraphModule, processes: Processes, blocks: Sequence[str]) -> nn.Module:
    """The module to call for training: `gm` itself, or with its gradients (DDP), its weights too (FSDP2), shared.

    FSDP2 gathers the weights of one of the `blocks` at a time, and those of the rest of the model together.
    """
    if processes.parallel == "ddp":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)  # torch 2.11 has no other name for it
            return DistributedDataParallel(
                gm,
                device_ids=[processes.device] if processes.device.type == "cuda" else None,
                broadcast_buffers=False,  # the run averages statistics, and nothing else differs
                gradient_as_bucket_view=True,  # no second copy of the gradients
            )
    if processes.parallel == "fsdp":
        # A block is the least that is right. FSDP2 gathers a module's weights when it is called, and a group for each layer would
        # leave out those that coded layers read and recomputed branches run without calling their module: most of a ViT's.
        mesh = dist.init_device_mesh(processes.device.type, (processes.count,))
        units = make_units(gm, blocks)
        for unit in units:
            fully_shard(unit, mesh=mesh)
        in_units = {parameter for unit in units for parameter in unit.parameters()}
        fully_shard(gm, mesh=mesh, reshard_after_forward=True, ignored_params=in_units)
    return gm


def without_sync(model: nn.Module, without: bool) -> AbstractContextManager[Any]:
    """A context in which a backward adds up gradients in this process alone, if `without`."""
    model = without_compiler(model)  # its wrapper is neither
    if isinstance(model, DistributedDataParallel) and without:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not without)
    return nullcontext()


def spread(gm: nn.Module) -> None:
    """Let go of weights that FSDP2 has gathered: parameters are this process's shards again."""
    for module in gm.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
