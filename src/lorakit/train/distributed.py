"""Training one adapter in several processes: what they tell each other, and how the frozen base is cut up among them.

``accelerate launch`` and ``torchrun`` start the same program once for each device and say so in the environment. Every
process holds the whole adapter and computes the gradient of its share of the rows; the shares of the gradient are added
up in one message before each optimizer step. So the adapter, the optimizer and the methods' processes are what they are
in a single process, and a checkpoint can be resumed by any number of processes.

The base is frozen, so it needs no such message: each process holds all of it, or with FSDP 2
(``torch.distributed.fsdp.fully_shard``) a part, and layers are put together when they run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorakit.attach.attachments import attachments_of
from lorakit.core.walk import base_modules
from lorakit.errors import ConfigError, TrainingError, listing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FSDP = "ACCELERATE_USE_FSDP"
_OURS = "LORAKIT_USE_FSDP"
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"


@dataclass(frozen=True)
class World:
    """The processes that train together; most runs have one.

    Attributes:
        size: How many they are.
        rank: The number of this one; the main process is 0.
        device: On which messages lie.
        shards: Whether the base is cut up among them.
        layers: Names of the classes that are cut up each by itself; empty for what transformers names.
        reshards: Whether a layer is given back after its forward pass, to be put together again in backward.
    """

    size: int = 1
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shards: bool = False
    layers: tuple[str, ...] = ()
    reshards: bool = True

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and tells the progress."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def check_same(self, what: str, value: Any) -> None:
        """All processes must have found the same; this waits for them.

        Raises:
            TrainingError: They have not.
        """
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        if others := [rank for rank, other in enumerate(found) if other != found[0]]:
            raise TrainingError(
                f"The processes do not agree about {what}: that of process {others[0]} is not that of process 0. They "
                "must see the same files and use the same versions of the packages (lorakit doctor)."
            )

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value, summed over the processes."""
        return self._reduced(values, dist.ReduceOp.SUM) if self.size > 1 else list(values)

    def most(self, values: Sequence[float]) -> list[float]:
        """Each value, the greatest of the processes'."""
        return self._reduced(values, dist.ReduceOp.MAX) if self.size > 1 else list(values)

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, how)
        found: list[float] = tensor.tolist()
        return found

    def of_main(self, value: Any) -> Any:
        """What the main process found, for all."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0, device=self.device)
        return told[0]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of the processes, in one message for each dtype.

        A parameter that no process has a gradient for keeps none, as in a single process.
        """
        if self.size == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        reached = self.most([float(parameter.grad is not None) for parameter in trained])
        together: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter, has in zip(trained, reached, strict=True):
            if has:
                together.setdefault(parameter.dtype, []).append(parameter)
        for parameters_of_dtype in together.values():
            parts = [
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                for parameter in parameters_of_dtype
            ]
            flat = torch.cat([part.reshape(-1) for part in parts])
            dist.all_reduce(flat)
            sums = flat.split([part.numel() for part in parts])
            for parameter, part in zip(parameters_of_dtype, sums, strict=True):
                parameter.grad = part.view_as(parameter).clone()

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Put the main process's numbers into everybody's tensors, bit for bit."""
        if self.size > 1:
            with torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)


def is_main_process() -> bool:
    """Whether this process was started alone or as the first of several."""
    return int(os.environ.get("RANK", "0")) == 0


def join(model: nn.Module | None = None) -> World:
    """Join the processes that this one was started with.

    Args:
        model: The base model, where it is loaded already.

    Raises:
        ConfigError: The launcher was set up for what lorakit cannot do.
    """
    if os.environ.get(_DEEPSPEED, "false").lower() == "true":
        raise ConfigError(
            "lorakit does not train under DeepSpeed: its engine takes over the optimizer and cuts the adapter up, so "
            "neither checkpoints nor the methods' own steps would be exact. FSDP 2 cuts up the frozen base just as "
            "well: accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m lorakit train ..."
        )
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and "RANK" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but RANK is not set, so this process does not know which one it is. Start it with "
            "accelerate launch or torchrun, or unset WORLD_SIZE to train in one process."
        )
    by_mpi = [name for name in _MPI if int(os.environ.get(name, "1")) > 1]
    if by_mpi and size == 1:
        raise ConfigError(
            f"{by_mpi[0]} says that mpirun has started several processes, which would each train by themselves into "
            "the same folder. Start them with accelerate launch or torchrun."
        )
    if size == 1:
        return World()
    sharding = _sharding()
    from accelerate import PartialState

    on_cpu = next(model.parameters()).device.type == "cpu" if model is not None else _wants_cpu()
    alone = not dist.is_initialized()
    state = PartialState(cpu=on_cpu)
    if alone:
        import atexit

        atexit.register(_leave)
    return World(size=size, rank=dist.get_rank(), device=state.device, **sharding)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _wants_cpu() -> bool:
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


def _sharding() -> dict[str, Any]:
    """What accelerate's settings say about FSDP; accelerate and transformers are told that there is none.

    Their wrapper would cut the adapter up too, and leave the base without weights in all processes but one.
    """
    if os.environ.get(_FSDP, "false").lower() == "true":
        os.environ[_FSDP], os.environ[_OURS] = "false", "true"
    if os.environ.get(_OURS) != "true":
        return {}
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "The launcher is set up for FSDP 1, which flattens frozen and trained parameters into one tensor. Set "
            "fsdp_version: 2 in the config file of accelerate (see recipes/accelerate/fsdp2.yaml)."
        )
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ConfigError(
            "lorakit does not keep the base's parts in the CPU's memory: set fsdp_offload_params: false in the config "
            "file of accelerate, or quantise the base (model.quantize) and train without FSDP."
        )
    layers = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    return {
        "shards": True,
        "layers": tuple(name.strip() for name in layers.split(",") if name.strip()),
        "reshards": os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("false", "no_shard"),
    }


def without_wrapper(trainer: Any) -> None:
    """Keep accelerate from wrapping the model: the gradients are added up by `World.add_gradients`."""
    prepare = trainer.accelerator.prepare_model

    def as_it_is(model: nn.Module, device_placement: bool | None = None, **_: Any) -> nn.Module:
        prepared: nn.Module = prepare(model, device_placement=device_placement, evaluation_mode=True)
        return prepared

    trainer.accelerator.prepare_model = as_it_is
    trainer.args._n_gpu = min(
        trainer.args.n_gpu, 1
    )  # one process with several GPUs would get torch's DataParallel


def shard(model: PreTrainedModel, world: World) -> str:
    """Cut the base up among the processes, layer by layer; adapters stay whole in each of them.

    Args:
        model: With its adapters.
        world: With ``shards``.

    Returns:
        What was done, as text.

    Raises:
        ConfigError: The base is quantised, or has no layers of the given names.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    check_shardable(model)
    layers = _layers(model, world)
    attachments = attachments_of(model)
    whole = {
        parameter
        for name in attachments.adapters
        for _, adapter in attachments.parameters_of(name)
        for parameter in adapter._parameters.values()
        if parameter is not None
    }
    mesh = init_device_mesh(world.device.type, (world.size,))
    before = sum(p.numel() * p.element_size() for p in model.parameters() if p not in whole)
    for module in (*layers, model):
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=world.reshards and module is not model,
            ignored_params=whole,
        )
    each = before / world.size / 1e6
    return f"FSDP 2: {len(layers)} layers cut up among {world.size} processes, {each:,.1f} MB of the base in each"


def check_shardable(model: nn.Module) -> None:
    """Refuse a base whose weights are not plain floating-point numbers.

    Raises:
        ConfigError: It is one.
    """
    from lorakit.targets.quantized import quantized_storage

    few = [path for path, module in base_modules(model) if quantized_storage(module) is not None]
    odd = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if few or odd:
        raise ConfigError(
            f"FSDP cannot cut up a quantised base ({listing(few or odd, most=3)}): its packed numbers and scales "
            "belong together. Leave model.quantize out, or start the processes without FSDP: each then holds the whole "
            "quantised base."
        )


def _layers(model: PreTrainedModel, world: World) -> list[nn.Module]:
    names = world.layers or tuple(getattr(model, "_no_split_modules", None) or ())
    found = [module for _, module in base_modules(model) if type(module).__name__ in names]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no layers called {listing(names)} to cut up: name their class in "
            "fsdp_transformer_layer_cls_to_wrap in the config file of accelerate."
            if names
            else f"transformers does not say which layers of {type(model).__name__} belong together: name their class "
            "in fsdp_transformer_layer_cls_to_wrap in the config file of accelerate."
        )
    return found
