"""Rank 0 of 2 of a class of transformers under `fully_shard`, recorded without the other: prints its figures."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import trainer
from estimator.describe.plan import Plan
from estimator.eager.ledger import Category
from trainer.referee.recorder.builds import of_config
from trainer.referee.recorder.world import one_rank


def main(configs, batch_size, seq_len):
    one_rank(2)
    mesh = init_device_mesh("cpu", (2,))
    found = {name: recorded(config, mesh, batch_size, seq_len) for name, config in configs.items()}
    sys.stdout.write(json.dumps(found) + "\n")


def recorded(config, mesh, batch_size, seq_len):
    """(peak, parameters, bytes of the optimizer's state) by recipe."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        given = of_config(file, batch_size, seq_len)
        for precision, policy in (
            ("fp32", MixedPrecisionPolicy()),
            ("bf16-fsdp", MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)),
        ):
            for checkpointing in ("none", "block"):

                def build(policy=policy, checkpointing=checkpointing):
                    module, loss, (batch,) = given()
                    if checkpointing == "block":
                        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                    for layer in module.model.layers:
                        fully_shard(layer, mesh=mesh, mp_policy=policy)
                    fully_shard(module, mesh=mesh, mp_policy=policy)
                    return module, loss, ({name: x.clone() for name, x in batch.items()},)

                recording = trainer.record(build, Plan(), "cpu")
                found[f"{precision}, {checkpointing}"] = (
                    recording.peak_bytes,
                    recording.parameters,
                    recording.bytes_before(Category.OPTIMIZER),
                )
    return found


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
