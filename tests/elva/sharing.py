"""What several processes do with a stage, each in its own: `python -m tests.elva.sharing`, in
effect, from `test_processes`. Gradients and weights of float64 models go to safetensors files."""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file

from benchmarks.contrastive_batch import in_float64
from elva import checkpoint
from elva.processes import Processes
from elva.recipe import LoraSettings, NegativeConfig, RewardConfig, StageConfig
from elva.training import wrapping
from elva.training.plan import Saving
from elva.training.states import trained, weights_of, whole
from tests.elva.stages import INFO_NCE, POLICY, Stage

STEPS = 3

CASES: dict[str, StageConfig] = {
    # five queries among three processes: ragged; three tasks, each its own batches
    "infonce": replace(
        INFO_NCE, batch_size=5, symmetric=True, lm=0.5, ret=0.5, anchor=0.5,
        negatives=NegativeConfig(given=2), tasks={"t2i": 1.0, "i2t": 1.0, "t2t": 1.0},
        learn_infonce_temperature=True, micro_batch_size=3,
    ),
    # one query and its answer: of three processes one has nothing of its own
    "alone": replace(INFO_NCE, batch_size=1, lm=1.0, negatives=NegativeConfig(given=0)),
    "grpo": replace(
        POLICY, batch_size=2, num_generations=2, num_iterations=2, lora=LoraSettings(4, 8),
        micro_batch_size=4, loss_type="dapo", importance_sampling_level="sequence",
    ),
    "mixed": replace(
        POLICY, batch_size=3, num_generations=2, pathwise=0.5, infonce=0.5,
        rollout_candidates="query_positive", reward=RewardConfig(rank_temperature=0.1),
        negatives=NegativeConfig(given=1, mined=2, random=2, in_batch=True),
    ),
}  # fmt: skip


class Sharding(Accelerator):
    """accelerate's own FSDP2, which its configuration grants to GPUs alone, on a CPU."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
        )  # fmt: skip


class Zero(Accelerator):
    """accelerate's own DeepSpeed, likewise."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        import deepspeed

        # A minute of compiling, to exchange faster on a CPU; `deepspeed.comm.torch` names torch.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
        deepspeed.init_distributed("gloo", verbose=False)
        for state in (self.state, PartialState()):
            state.distributed_type = DistributedType.DEEPSPEED
        self.state.deepspeed_plugins = {"default": DeepSpeedPlugin(zero_stage=2)}
        self.state.deepspeed_plugins["default"].select(_from_accelerator_state=True)
        self.deepspeed_engine_wrapped = None


WRAPPERS: dict[str, type[Accelerator]] = {"ddp": Accelerator, "fsdp2": Sharding, "zero": Zero}


def run(
    name: str, model: str, corpus: str, out: str, resume: str | None = None, *,
    by: str = "ddp", optim: str = "adamw_torch", dtype: torch.dtype = torch.float64,
) -> None:  # fmt: skip
    """One case: gradients after each step, and the weights at its end.

    Args:
        by: what wraps the model.
        resume: a directory of checkpoints to go on from, after the first step.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)  # of an adapter's first weights
    processes = Processes()
    wrapping.Accelerator = WRAPPERS[by]  # type: ignore[misc]
    how = f"-{by}" * (by != "ddp") + "-resumed" * (resume is not None)
    directory = Path(out) / f"{name}-{processes.count}{how}"
    stage = Stage(
        Path(model), Path(corpus), CASES[name], directory, steps=STEPS,
        extra={"optim": optim}, dtype=dtype,
    )  # fmt: skip
    if dtype == torch.float64:
        in_float64(stage.retriever)
    kept: dict[str, torch.Tensor] = {}
    step = stage.work.step

    def keeping(number: int, *given: object) -> Mapping[str, float]:
        found = step(number, *given)
        kept.update({
            f"{number}|{n}": whole(p.grad).clone()
            for n, p in trained(stage.retriever).items() if p.grad is not None
        })  # fmt: skip
        return found

    stage.work.step = keeping
    if resume is None:
        stage.loop.saving = Saving(0.0)
        stage.loop.train()
    else:
        stage.loop.train(checkpoint.newest(Path(resume)))
    kept.update({f"end|{n}": p.clone() for n, p in weights_of(stage.retriever).items()})
    directory.mkdir(exist_ok=True)
    if processes.first:
        save_file(kept, directory / "kept.safetensors")
        (directory / "log.json").write_text(json.dumps(stage.log))
    processes.wait()
