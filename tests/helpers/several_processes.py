"""One process of test_distributed.py: `torchrun ... several_processes.py FOLDER KIND JSON`, with a Trainer on the CPU.

KIND is "ddp" or "fsdp2". Accelerate shards on GPUs only, so that for "fsdp2" it is told that this is one; the sharding
itself is torch's and runs over gloo.
"""

import json
import os
import signal
import sys

from accelerate import DistributedType, PartialState
from transformers import TrainerCallback

from tests.helpers.training_runs import Images, arguments, tiny
from training.engine.checkpoints import checkpoint_io
from training.engine.planning import auto_batch_size
from training.engine.trainer import Trainer


class Sigterm(TrainerCallback):
    """Asks the last process alone to stop, in the step after `step`."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and not state.is_world_process_zero:
            os.kill(os.getpid(), signal.SIGTERM)


def end_while_writing(checkpoint: str) -> None:
    """Kill the main process when all of a checkpoint but its last files has been written."""
    write_json = checkpoint_io.write_json

    def killed(path, value):
        if checkpoint in str(path.parent):
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(path, value)

    if os.environ["RANK"] == "0":
        checkpoint_io.write_json = killed


def main(folder: str, kind: str, values: dict) -> None:
    if kind == "fsdp2":
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    resume, sigterm, fitting, killed = (
        values.pop(name, None) for name in ("resume", "sigterm", "fitting", "killed_in")
    )
    if killed is not None:
        end_while_writing(killed)
    if fitting is not None:  # images of a pass that fit on each process
        auto_batch_size.fits_on_cpu = lambda *measured: lambda size: size <= fitting[PartialState().process_index]
    callbacks = [] if sigterm is None else [Sigterm(sigterm)]
    args = arguments(folder, **values)
    trainer = Trainer(tiny(num_hidden_layers=2), args, Images(40), Images(23), callbacks=callbacks)
    trainer.train(resume)
    trainer.evaluate()
    predicted = trainer.predict(Images(23)).predictions
    trainer.save_model()
    trainer.create_model_card()
    if trainer.rank == 0:
        (trainer.output_dir / "seen.json").write_text(
            json.dumps({"kind": str(trainer.accelerator.distributed_type), "logits": predicted.tolist()})
        )
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
