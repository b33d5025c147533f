"""Lightning's strategies by our names, and everything a stage needs for DeepSpeed's ZeRO.

ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) shards over the ranks: the optimizer's state
(zero1), the gradients too (zero2), the weights too (zero3). A stage calls `backward`, `step` and
`gathered`, which do what its strategy needs; without ZeRO that is plain Lightning.

Weights stay fp32 and forwards run under autocast, with and without ZeRO: DeepSpeed's own bf16 mode
would keep bf16 weights, and "bf16-mixed" in a run's id would mean two things.
"""

import functools
import gc
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch import Tensor, nn

from fourstage.job import TrainerConfig
from fourstage.model import ScalarModel, Transformer
from fourstage.model.moe import MoE
from fourstage.model.precision import full_precision
from fourstage.optim.muon import Muon
from fourstage.optim.zero_muon import ZeroMuon, layout, splits_of

ZERO = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}  # our name -> ZeRO stage


class ZeroPrecision(DeepSpeedPrecision):
    """fp32 weights, and forwards under autocast in bf16-mixed, as in Lightning's own plugin."""

    device = "cuda"

    def forward_context(self) -> AbstractContextManager[Any]:
        is_mixed = self.precision == "bf16-mixed"
        # a cache would keep a step's first weights for all updates of that step
        return torch.autocast(self.device, torch.bfloat16, is_mixed, cache_enabled=False)

    def convert_input(self, data: Any) -> Any:
        return data


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's own strategy, except that one piece of a step's loss is one engine forward.

    Lightning would wrap a whole training_step in the engine's forward: rollouts, several backward
    passes and optimizer steps, which ZeRO-3's bookkeeping can't handle.
    """

    def __init__(self, stage: int, clip_norm: float, offload: bool = False) -> None:
        super().__init__(
            stage=stage,
            offload_optimizer=offload,
            offload_parameters=offload,
            logging_batch_size_per_gpu=1,  # the loader, where it would look, has none
            logging_level=logging.ERROR,  # no warnings about outputs that are dataclasses
        )
        assert isinstance(self.config, dict)
        self.config |= {
            "gradient_clipping": clip_norm,
            "bf16": {"enabled": False},
            "zero_force_ds_cpu_optimizer": False,  # offload with PyTorch's AdamW
        }
        self.config["zero_optimization"]["leaf_module"] = {
            "classes": [f"{MoE.__module__}.{MoE.__qualname__}"]
        }

    @property
    def zero_stage(self) -> int:
        return self.config["zero_optimization"]["stage"]

    def setup(self, trainer: L.Trainer) -> None:
        if self.zero_stage_3 and trainer.training:
            import deepspeed

            # one parameter at a time: the engine would first put all of them on the GPU
            self._init_config_if_needed()
            deepspeed.zero.Init(module=self.model, config_dict_or_path=self.config)
            self.model.to(self.root_device)  # the buffers
            for layer in self.model.modules():
                if isinstance(layer, MoE):
                    reduce_at_last_use(layer)
        super().setup(trainer)

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        if not isinstance(optimizer, Muon):
            return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        splits = splits_of(optimizer)
        muon = ZeroMuon(optimizer.param_groups, optimizer.defaults["lr"])
        engine, zero = super()._setup_model_and_optimizer(model, muon, lr_scheduler)
        muon.device = self.root_device
        muon.pieces = layout(zero, self.zero_stage, splits, muon.device)
        return engine, zero

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.train_step_context():
            return self.lightning_module.training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self.lightning_module.validation_step(*args, **kwargs)

    # resume states are the same for all strategies (state.py): Lightning's part of them is written
    # as it is without DeepSpeed, which would write files of its own for just as many ranks

    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None:
        """Frees the engine, which would keep its networks during the next stages."""
        super().teardown()
        if self.model is not self.lightning_module:
            self.deepspeed_engine.destroy()
            forget_networks()
            self.model, self.optimizers = self.lightning_module, []

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """Nothing to set up: after training the networks are plain (see `make_plain`)."""
        self.model = model.to(self.root_device)


def reduce_at_last_use(leaf: nn.Module) -> None:
    """Lets ZeRO-3 reduce a leaf module's gradients only when the backward leaves it for good.

    DeepSpeed reduces them each time; but the reward stage's loss has two forwards, of chosen and
    rejected answers. Must be called before the engine adds its own hooks.
    """
    waiting = 0

    def entered(*_: Any) -> None:
        nonlocal waiting
        waiting += torch.is_grad_enabled()

    def left(*_: Any) -> None:
        nonlocal waiting
        waiting -= 1
        for parameter in leaf.parameters():
            parameter.ds_grad_is_ready = waiting == 0

    leaf.register_forward_hook(entered)
    leaf.register_full_backward_hook(left)


def forget_networks() -> None:
    """Empties DeepSpeed's process-wide references to networks, some of which are in caches."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK.clear()
    for found in gc.get_objects():
        if type(found) is functools._lru_cache_wrapper and found.__module__.startswith("deepspeed"):
            found.cache_clear()


def trainer_options(where: TrainerConfig, clip_norm: float) -> dict[str, Any]:
    """Arguments of Lightning's Trainer for a trainer config; clip_norm 0 is no clipping."""
    names = ("accelerator", "devices", "num_nodes")
    options: dict[str, Any] = {name: getattr(where, name) for name in names}
    if where.strategy not in ZERO:
        return {**options, "strategy": where.strategy, "precision": where.precision}
    strategy = ZeroStrategy(ZERO[where.strategy], clip_norm, where.strategy.endswith("_offload"))
    return {**options, "strategy": strategy, "plugins": [ZeroPrecision(where.precision)]}


@contextmanager
def others_wait() -> Iterator[None]:
    """Lets rank zero take as long as it likes inside; every rank has to enter. A collective of the
    default group, on which the others would wait, gives up after 30 minutes."""
    if not dist.is_initialized():
        yield
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    yield
    dist.barrier(group)
    dist.destroy_process_group(group)


# --- one optimizer step


def backward(module: L.LightningModule, loss: Callable[[], Tensor], is_last: bool) -> None:
    """Adds the gradient of `loss()`, averaged over ranks; `is_last`: the last one of its step."""
    strategy = module.trainer.strategy
    if not isinstance(strategy, ZeroStrategy):
        share = loss()
        with full_precision(share):  # else gradients of float32 operations would be in half
            module.manual_backward(share)
        return
    engine = strategy.deepspeed_engine

    def under_autocast() -> Tensor:
        with strategy.precision_plugin.forward_context():
            share = loss()
        # the engine looks at the gradient, so a loss that is not finite must show there
        return share * torch.where(share.isfinite(), 1.0, torch.nan)

    engine.set_gradient_accumulation_boundary(is_last)
    # inside autocast the engine would warn and turn it off
    with torch.autocast(strategy.precision_plugin.device, enabled=False):
        engine.backward(engine(under_autocast))


def step(
    module: L.LightningModule, clip_norm: float, is_finite: Callable[[Tensor], bool]
) -> tuple[Tensor, bool]:
    """Clips the gradient to `clip_norm` (0: not) and takes the optimizer's step if it is finite.

    Returns the norm before clipping, over all ranks, and whether the step was taken.
    `is_finite(norm)` checks the loss too. ZeRO clips, steps and skips by itself (see `backward`).
    """
    optimizer, strategy = module.optimizers(), module.trainer.strategy
    if isinstance(strategy, ZeroStrategy):
        optimizer.step()
        engine = strategy.deepspeed_engine
        return torch.as_tensor(engine.get_global_grad_norm()), engine.was_step_applied()
    scaler = getattr(module.trainer.precision_plugin, "scaler", None)  # of 16-mixed
    if scaler is not None:
        scaler.unscale_(optimizer.optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf)
    taken = is_finite(norm)
    if taken:
        optimizer.step()
    elif scaler is not None:
        scaler.update()  # lowers the scale, as a step would have done
    return norm, taken


# --- networks whose weights are sharded over the ranks


def is_sharded(network: nn.Module) -> bool:
    """Whether ZeRO-3 keeps a shard of each weight on each rank."""
    return hasattr(next(network.parameters()), "ds_id")


@contextmanager
def gathered(network: Transformer | ScalarModel) -> Iterator[Transformer | ScalarModel]:
    """The network with all of its weights here, to be read; every rank has to enter.

    Under ZeRO-3 it is a copy without ZeRO's hooks, so that ranks may run different numbers of
    forwards inside, as for answers of different lengths. Otherwise it is the network itself.
    """
    if not is_sharded(network):
        yield network
        return
    copy = plain_copy(network).eval()
    yield copy
    for own, other in zip(transformers(network), transformers(copy), strict=True):
        own.flops += other.flops


def transformers(network: nn.Module) -> list[Transformer]:
    return [module for module in network.modules() if isinstance(module, Transformer)]


@torch.no_grad()
def plain_copy(network: Transformer | ScalarModel) -> Transformer | ScalarModel:
    """A copy whose weights are gathered one at a time; every rank has to call it."""
    import deepspeed

    original = transformers(network)[0]
    with torch.device("meta"):
        copy = Transformer(original.config, original.vocab_size)
        if original.head is None:  # tied, or a scalar model's backbone
            copy.head = None
        if isinstance(network, ScalarModel):
            copy = ScalarModel(copy)
    copy.to_empty(device=next(network.parameters()).device)
    for own, other in zip(network.parameters(), copy.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([own]):
            other.copy_(own)
    for own, other in zip(network.buffers(), copy.buffers(), strict=True):
        other.copy_(own)
    return copy


def make_plain(module: L.LightningModule) -> None:
    """Gathers the module's networks on every rank after the last step; collective."""
    for name, network in list(module.named_children()):
        if isinstance(network, Transformer | ScalarModel) and is_sharded(network):
            setattr(module, name, plain_copy(network).cpu())  # two would fill a GPU
