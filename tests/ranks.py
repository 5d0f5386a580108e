"""What several processes compute together, for test_distributed.py.

    python tests/ranks.py PROCESSES MODEL_DIRECTORY RESULTS SCENARIO…
    python tests/ranks.py launch

By the first, each process is a fork of this one, together a group over gloo. The first writes
RESULTS/<scenario>.safetensors. The second reads a launch from each line of its input:

    PROCESSES [sharded] [PHASE STEP] -- ARGUMENT…

It does with forks what torchrun does with processes that import everything anew: the command line with those arguments,
a checkpoint after each step; or, sharded, what accelerate launch does to ask for FSDP2. Given PHASE and STEP, process 1
kills itself at the end of that step, before its checkpoint. A line of JSON for each launch says how it ended.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from hlora import cli, pipeline  # noqa: F401
from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty
from hlora.importance.protect import protect
from hlora.importance.recorder import ImportanceRecorder
from hlora.numerics import encodings, equations
from hlora.parallel.dtensor import full_tensor
from hlora.parallel.fsdp import reshard
from hlora.parallel.group import all_gather_text, on_main, rank, world_size
from hlora.training import checkpoint
from hlora.training.checkpoint import Checkpoints
from hlora.training.trackers import add_callback_first

LR = 0.02
SCENARIOS = {
    "plain": {},
    "factored": {"encoding": "factored"},
    "q only": {"targets": ["q_proj"]},  # two matrices: at four processes two have nothing to do
    "in the loss": {"in_loss": True},
    "accumulated": {"accumulate": 2},
    "squares": {"method": "squared_gradients", "encoding": "factored"},
    "squares accumulated": {"method": "squared_gradients", "encoding": "factored", "accumulate": 2},
}
BY_TRAINER = {
    "clipped": {"max_grad_norm": 0.02},
    "accumulated": {"gradient_accumulation_steps": 2},
    "from the first": {"fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True}},  # accelerate's default
    "resumed": {"resumed": True},
    "in bfloat16": {"bf16": True},
    "squares": {"method": "squared_gradients", "gradient_accumulation_steps": 2},
    "squares resumed": {"method": "squared_gradients", "resumed": True},
}
EXACT = 8  # tokens of a row whose squared gradients are summed exactly; a sketch's signs differ between processes


def adapted(directory: str, dtype: torch.dtype, targets: list[str]) -> Any:
    """The tiny Llama with LoRA, B not zero."""
    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def trained_by(kind: str, model: Any, mixed: bool = False, in_blocks: bool = True) -> Any:
    """The model as a training of that kind has it: wrapped, or sharded in place."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind in ("fsdp2", "hsdp"):
        shape, names = ((2, 2), ("copies", "rows")) if kind == "hsdp" else ((world_size(),), ("rows",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
        for layer in model.get_base_model().model.layers if in_blocks else ():
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def record_and_tune(
    kind: str,
    directory: str,
    encoding: str = "float32",
    targets: list[str] | None = None,
    in_loss: bool = False,
    accumulate: int = 1,
    method: Any = "path_integral",
) -> dict[str, Tensor]:
    """Four steps of recording, four under the penalty, eight rows each; kind "alone" is one process without a group.

    Returns ω, Ω, the adapter after both phases, losses and what the penalty said.
    """
    model = adapted(directory, torch.float64, targets or ["q_proj", "v_proj"])
    rows = torch.randint(3, 384, (64, 12), generator=torch.Generator().manual_seed(2))
    held_out = torch.randint(3, 384, (8, 12), generator=torch.Generator().manual_seed(3))
    if method == "squared_gradients":
        rows = rows[:, :EXACT]
    running = trained_by(kind, model)
    found: dict[str, Tensor] = {}
    recorder = ImportanceRecorder(running, encoding, method=method, share=1.0)
    penalty: ImportancePenalty | None = None

    def phase(first: int, optimizer: Any) -> list[float]:
        losses = []
        for step in range(first, first + 4):
            if penalty is not None and step % 2 == 0:
                penalty.begin()
            total = 0.0
            batch = rows[8 * step : 8 * step + 8].unflatten(0, (accumulate, -1))
            for number, part in enumerate(batch):
                last = number + 1 == accumulate
                if kind in ("fsdp2", "hsdp"):
                    running.set_requires_gradient_sync(last)
                elsewhere = kind == "ddp" and not last
                with running.no_sync() if elsewhere else nullcontext():
                    mine = part if kind == "alone" else part[rank() :: world_size()]
                    loss = running(input_ids=mine, labels=mine).loss / accumulate
                    if penalty is not None and in_loss:
                        (loss + penalty() / accumulate).backward()
                    else:
                        loss.backward()
                total += float(average(loss.detach()))
            losses.append(total)
            if penalty is not None and not in_loss:
                losses.append(float(penalty.add_gradients_()))
            optimizer.step()
            optimizer.zero_grad()
        return losses

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    detach = recorder.attach(optimizer)
    found["losses"] = torch.tensor(phase(0, optimizer), dtype=torch.float64)
    found["move"] = torch.tensor(recorder.move())
    found |= {f"state.{name}": tensor for name, tensor in recorder.state_dict()["tensors"].items()}
    detach()
    importance = recorder.consolidate()
    penalty = ImportancePenalty(running, importance, phi=5.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    found["tuning"] = torch.tensor(phase(4, optimizer), dtype=torch.float64)
    with torch.no_grad():
        loss = running(input_ids=held_out, labels=held_out).loss
        found["held out"] = loss.double()
    found["share"] = torch.tensor(sum(encodings.nbytes(omega) for omega in penalty._omega.values()))
    return found | described(importance) | {f"tuned.{n}": t for n, t in factors(penalty).items()}


def average(loss: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(loss)
    return loss / world_size()


def described(importance: Importance) -> dict[str, Tensor]:
    found = {}
    for name, matrix in importance.matrices.items():
        found |= {f"importance.{name}.{part}": t for part, t in encodings.parts(matrix.omega).items()}
        found |= {f"general.{name}.A": matrix.A, f"general.{name}.B": matrix.B, f"sample.{name}": matrix.base_sample}
        found[f"undo.{name}"] = torch.tensor(matrix.undo_cost)
    return found


def factors(holder: Any) -> dict[str, Tensor]:
    return {f"{m.name}.{x}": full_tensor(getattr(m, x).detach()) for m in holder.matrices for x in "AB"}


def accelerate_shards_on_a_cpu() -> None:
    """Accelerate shards (FSDP2) on accelerators alone, though nothing else in its way needs one: so here it does."""
    usual = AcceleratorState.__init__

    def sharding(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        usual(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
            # What it does for a GPU, line by line (accelerate 1.15, state.py).
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = sharding


def by_trainer(
    kind: str, directory: str, resumed: bool = False, method: Any = "path_integral", **given: Any
) -> dict[str, Tensor]:
    """Four steps of recording and four under `protect`, by Trainer, of eight rows each.

    resumed: recording goes on from a checkpoint of its second step.
    """
    given = {"gradient_accumulation_steps": 1, "fsdp_config": {"version": 2}, "learning_rate": LR} | given
    rows = 8 // world_size() // given["gradient_accumulation_steps"]
    if kind != "trainer fsdp2":
        del given["fsdp_config"]
    else:
        given["fsdp"] = True
    batches = torch.randint(3, 384, (32, 12), generator=torch.Generator().manual_seed(2))
    if method == "squared_gradients":
        batches = batches[:, :EXACT]
    data = [{"input_ids": row, "labels": row} for row in batches]
    with tempfile.TemporaryDirectory() as directory_of_first:
        output = on_main(lambda: directory_of_first)

        def trainer(model: Any, **more: Any) -> Trainer:
            settings = given | {"save_strategy": "no", "report_to": [], "logging_steps": 1, "disable_tqdm": True} | more
            args = TrainingArguments(output, max_steps=4, per_device_train_batch_size=rows, use_cpu=True, **settings)
            return Trainer(model, args, train_dataset=data)

        def recorded(**more: Any) -> tuple[ImportanceRecorder, Trainer]:
            model = adapted(directory, torch.float32 if "bf16" in given else torch.float64, ["q_proj", "v_proj"])
            encoding = "float32" if method == "path_integral" else "factored"
            recorder = ImportanceRecorder(model, encoding, method=method, share=1.0)
            training = trainer(model, **more)
            add_callback_first(training, Checkpoints())
            add_callback_first(training, recorder.callback())
            return recorder, training

        if resumed:
            _, first = recorded(save_strategy="steps", save_steps=2, save_only_model=True)
            first.train()
        recorder, training = recorded()
        training.train(resume_from_checkpoint=f"{output}/checkpoint-2" if resumed else None)
        found = {"move": torch.tensor(recorder.move())}
        found["sharded"] = torch.tensor(float(isinstance(recorder.matrices[0].A, DTensor)))
        found |= {f"state.{name}": tensor for name, tensor in recorder.state_dict()["tensors"].items()}
        importance = recorder.consolidate()
        losses = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
        training = trainer(adapted(directory, recorder.matrices[0].A.dtype, ["q_proj", "v_proj"]))
        importance.load_adapter_into(training.model)
        time.sleep(0 if rank() else 0.3)  # the others must wait for what the main process saves
        saved = importance.save(f"{output}/importance")
        penalty = protect(training, saved, phi=5.0)
        training.train()
        all_gather_text("")  # the first one's directory is still in use
    tuning = [each[name] for each in training.state.log_history for name in ("loss", "total_loss") if name in each]
    found |= {"losses": torch.tensor(losses), "tuning": torch.tensor(tuning)}
    with torch.no_grad():
        held_out = torch.randint(3, 384, (8, 12), generator=torch.Generator().manual_seed(3))
        found["held out"] = training.model_wrapped(input_ids=held_out, labels=held_out).loss.double()
    found["share"] = torch.tensor(sum(encodings.nbytes(omega) for omega in penalty._omega.values()))
    return found | described(importance) | {f"tuned.{n}": t for n, t in factors(penalty).items()}


def not_finite(kind: str, directory: str) -> dict[str, Tensor]:
    """Three steps, the second with a gradient that is not finite: of one matrix, and sharded on one process alone."""
    model = adapted(directory, torch.float64, ["q_proj", "v_proj"])
    rows = torch.randint(3, 384, (24, 12), generator=torch.Generator().manual_seed(2))
    running = trained_by(kind, model)
    recorder = ImportanceRecorder(running, "float32", method="path_integral")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    for step in range(3):
        mine = rows[8 * step : 8 * step + 8]
        mine = mine if kind == "alone" else mine[rank() :: world_size()]
        running(input_ids=mine, labels=mine).loss.backward()
        gradient = recorder.matrices[-1].A.grad
        if step == 1 and kind == "fsdp2" and rank() == world_size() - 1:
            gradient.to_local().fill_(torch.nan)
        elif step == 1 and kind != "fsdp2":
            gradient.fill_(torch.nan)
        with recorder.step(LR):
            if step == 1:
                optimizer.zero_grad()
            optimizer.step()
        optimizer.zero_grad()
    skipped = average(torch.tensor(float(recorder.skipped_steps))) if kind != "alone" else torch.tensor(1.0)
    return {"skipped": skipped} | described(recorder.consolidate())


def changed_meanwhile(kind: str, directory: str) -> dict[str, Tensor]:
    """What the penalty says when a factor changed between `begin` and the step, and of an adapter that is θ^ν."""
    model = adapted(directory, torch.float64, ["q_proj", "v_proj"])
    running = trained_by(kind, model, in_blocks=False)
    recorder = ImportanceRecorder(running, "float32", method="path_integral")
    move(recorder, 0.01)
    with recorder.step(LR):
        move(recorder, 0.02)
    importance = recorder.consolidate()
    penalty = ImportancePenalty(running, importance, phi=5.0)
    penalty.begin()
    move(recorder, 0.1)
    found = {"value": penalty.add_gradients_()}
    found |= {f"{m.name}.{x}": full_tensor(getattr(m, x).grad) for m in penalty.matrices for x in "AB"}
    with torch.no_grad():
        running(input_ids=torch.full((1, 4), 3))  # leaves the factors gathered where all are one unit
    importance.load_adapter_into(running)
    reshard(running)
    return found | {"at anchor": penalty.regularisation_loss()} | {f"at.{n}": t for n, t in factors(penalty).items()}


def mixed_precision(kind: str, directory: str) -> dict[str, Tensor]:
    """Master weights in float32, passes in bfloat16: Ω, and what the equations make of weights and gradients."""
    model = adapted(directory, torch.float32, ["q_proj", "v_proj"])
    rows = torch.randint(3, 384, (24, 12), generator=torch.Generator().manual_seed(2))
    running = trained_by(kind, model, mixed=True)
    recorder = ImportanceRecorder(running, "float32", method="path_integral")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    expected = {m.name: torch.zeros(m.B.shape[0], m.A.shape[1], dtype=torch.float64) for m in recorder.matrices}
    start = {name: factor.clone() for name, factor in factors(recorder).items()}
    for step in range(3):
        mine = rows[8 * step : 8 * step + 8][rank() :: world_size()]
        with torch.autocast("cpu", torch.bfloat16) if kind == "ddp" else nullcontext():
            loss = running(input_ids=mine, labels=mine).loss
        loss.backward()
        before = {
            m.name: [full_tensor(t.detach()).double() for t in (m.A, m.B, m.A.grad, m.B.grad)]
            for m in recorder.matrices
        }
        with recorder.step(LR):
            optimizer.step()
        optimizer.zero_grad()
        after = {name: factor.double() for name, factor in factors(recorder).items()}
        for m in recorder.matrices:
            A, B, grad_A, grad_B = before[m.name]
            gradient = equations.effective_gradient(A, B, grad_A, grad_B, lr=LR, scale=m.scale)
            delta = equations.movement(A, B, after[f"{m.name}.A"], after[f"{m.name}.B"], scale=m.scale)
            expected[m.name] = equations.path_integral(expected[m.name], gradient, delta)
    found = described(recorder.consolidate())
    for m in recorder.matrices:
        ends = [each[f"{m.name}.{x}"].double() for each in (start, after) for x in "AB"]
        delta = equations.movement(*ends, scale=m.scale)
        found[f"expected.{m.name}.dense"] = equations.consolidate(expected[m.name], delta, 1e-3)
    return found


@torch.no_grad()
def move(recorder: ImportanceRecorder, by: float) -> None:
    """Every factor by its own pattern, whole or sharded; the first time with a gradient against it."""
    for number, matrix in enumerate(recorder.matrices):
        for factor in (matrix.A, matrix.B):
            factor.grad = -by * torch.sign(factor.detach()) if factor.grad is None else factor.grad
            factor.add_(factor.detach(), alpha=by * (number + 1))
            if by == 0.1:
                factor.grad = None


def run(kind: str, scenario: str, directory: str) -> dict[str, Tensor]:
    if kind.startswith("trainer"):
        return by_trainer(kind, directory, **BY_TRAINER[scenario])
    if scenario in SCENARIOS:
        return record_and_tune(kind, directory, **SCENARIOS[scenario])
    functions = {"not finite": not_finite, "changed meanwhile": changed_meanwhile, "mixed precision": mixed_precision}
    return functions[scenario](kind, directory)


def process(number: int, processes: int, directory: str, results: str, scenarios: list[str]) -> None:
    torch.set_num_threads(1)
    accelerate_shards_on_a_cpu()
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # Accelerate wants them set, and takes our group
    dist.init_process_group("gloo", init_method=f"file://{results}/meeting", rank=number, world_size=processes)
    before = dict(os.environ)
    for name in scenarios:
        os.environ |= before
        for added in set(os.environ) - set(before):  # Accelerate tells what comes later by variables
            del os.environ[added]
        found = run(*name.split(": "), directory)
        if number == 0:
            save_file({key: t.contiguous().clone() for key, t in found.items()}, f"{results}/{name}.safetensors")
    dist.destroy_process_group()


SHARDED = {  # by `accelerate launch --use_fsdp --fsdp_version 2`
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def launch(processes: int, arguments: list[str], asked: set[str], at: tuple[str, str] | None) -> dict[str, Any]:
    """Statuses, and what all processes wrote. When one fails the others are stopped, as torchrun does it.

    asked: `sharded`, by FSDP2; `unaided`, where Accelerate shards on accelerators alone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        running = {}
        for number in range(processes):
            pid = os.fork()
            if pid == 0:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                os.environ |= {name: str(value) for name, value in names.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                if "sharded" in asked:
                    os.environ |= SHARDED
                if "unaided" not in asked:
                    accelerate_shards_on_a_cpu()
                command_line(arguments, at)
            running[pid] = number
        statuses = [0] * processes
        while running:
            pid, status = os.wait()
            statuses[running.pop(pid)] = os.waitstatus_to_exitcode(status)
            if status != 0:
                time.sleep(1)
                for other in running:
                    os.kill(other, signal.SIGTERM)
        log.seek(0)
        return {"statuses": statuses, "said": log.read().decode()}


def command_line(arguments: list[str], at: tuple[str, str] | None) -> None:
    """Ends this process."""
    torch.set_num_threads(1)
    usual = Checkpoints.on_step_end
    checkpoint._EVERY = 0.0

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if at == (Path(args.output_dir).name, str(state.global_step)) and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        usual(self, args, state, control, **kwargs)

    Checkpoints.on_step_end = on_step_end  # type: ignore[method-assign]
    sys.argv = ["hlora", *arguments]
    status = 1
    try:
        cli.main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        import lm_eval.models.huggingface  # noqa: F401  # all that each fork would import by itself
        import trl.trainer.sft_trainer  # noqa: F401

        gc.collect(), gc.freeze()  # or each fork goes through all that was imported whenever Accelerate collects
        for given in sys.stdin:
            how, _, arguments_given = given.partition(" -- ")
            count, *words = how.split()
            asked = {"sharded", "unaided"} & {*words}
            at = tuple(word for word in words if word not in asked) or None
            print(json.dumps(launch(int(count), arguments_given.split(), asked, at)), flush=True)  # type: ignore[arg-type]
        sys.exit()
    count, directory, results, *scenarios = sys.argv[1:]
    Path(results).mkdir(exist_ok=True)
    arguments = (int(count), directory, results, scenarios)
    torch.multiprocessing.start_processes(process, arguments, int(count), start_method="fork")
